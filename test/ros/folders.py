# SPDX-License-Identifier: Apache-2.0
"""Model folders for tests: the shipped model as it is, without its forecast, with another one, and with faults."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from surg_perception.models import ForecastFacts, ModelCard, ModelFile, read_card

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "models" / "gsvit_m0_phantom"


def copied(folder: Path, **changes: object) -> ModelCard:
    """The shipped folder under another name; the card with these changes."""
    shutil.copytree(SHIPPED, folder)
    card = replace(read_card(folder), name=folder.name, **changes)  # type: ignore[arg-type]
    card.write()
    return card


def plain_folder(folder: Path) -> Path:
    """Without a forecast."""
    copied(folder, forecast=None, forecast_file=None)
    return folder


def forecast_folder(folder: Path, gap_s: float) -> Path:
    """With a small random decoder that is said to look gap_s ahead."""
    import torch

    from surg_perception.gsvit import GSViT, GSViTConfig
    from surg_perception.runtime.export import export_forecast_onnx

    card = copied(folder)
    torch.manual_seed(0)
    decoder = GSViT(GSViTConfig("m0", decoder_width=16, decoder_rank=4)).eval()
    file = export_forecast_onnx(decoder, folder / "forecast.onnx")
    replace(card, forecast=ForecastFacts(gap_s), forecast_file=ModelFile.of(file)).write()
    return folder
