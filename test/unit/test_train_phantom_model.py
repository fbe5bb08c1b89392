# SPDX-License-Identifier: Apache-2.0
"""The script behind models/gsvit_m0_phantom: the whole road once, and going on after an interruption."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from rich.progress import Progress

from surg_perception.models import read_card

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "train_phantom_model.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_phantom_model", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_training_script_runs_from_frames_to_folder(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--quick", "--cache", str(tmp_path / "cache")]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "quick")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    card = read_card(tmp_path / "quick")
    card.verify()
    assert 0.0 <= card.metrics["held_out_phantom"]["accuracy"] <= 1.0
    assert card.training["start_weights"] == "random"


def test_an_interrupted_training_goes_on_and_ends_as_an_uninterrupted_one(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, (1, 8, 224, 224, 3), dtype=np.uint8), rng.integers(0, 7, (1, 8))
    plan = script.replace(script.QUICK, epochs=2, batch=4)

    def train(state: str) -> dict[str, torch.Tensor]:
        cpu = torch.device("cpu")
        return script.train(plan, data, data, cpu, tmp_path / state, Progress(disable=True)).state_dict()

    whole = train("whole.pt")
    augment, batches = script.augment, iter(range(3))

    def interrupted(*arguments: object) -> object:
        if next(batches, None) is None:
            raise KeyboardInterrupt
        return augment(*arguments)

    monkeypatch.setattr(script, "augment", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train("pieces.pt")
    monkeypatch.setattr(script, "augment", augment)
    pieces = train("pieces.pt")
    for name, value in whole.items():
        torch.testing.assert_close(pieces[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_the_average_approaches_the_weights_and_keeps_attention_tables(script: ModuleType) -> None:
    model = script.GSViT(script.GSViTConfig("m0", decoder=False, classes=7, head_hidden=(8,)))
    average = script.copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    for _ in range(10):
        script.follow(average, model, 0.5**0.1)
    for (name, kept), new in zip(average.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(kept, new - 0.5, rtol=1e-4, atol=1e-4, msg=name)
    for (name, kept), new in zip(average.named_buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(kept, new, msg=name)


def test_figures_are_those_of_a_hand_count(script: ModuleType) -> None:
    phases = np.array([[0, 0, 1, 1], [2, 2, 2, 1]])
    said = np.array([[0, 1, 1, 1], [2, 2, 2, 2]])
    probabilities = np.full((2, 4, 7), 0.1 / 6, np.float32)
    np.put_along_axis(probabilities, said[..., None], 0.9, axis=-1)
    found = script.figures(probabilities, phases)
    assert found["accuracy"] == 0.75
    assert found["accuracy_sd_over_procedures"] == 0.0
    assert found["recall"] == {"Preparation": 0.5, "CalotTriangleDissection": 0.6667, "ClippingCutting": 1.0}
    assert found["macro_f1"] == pytest.approx((2 / 3 + 2 / 3 + 6 / 7) / 3, abs=1e-4)
    assert found["expected_calibration_error"] == pytest.approx(0.15, abs=1e-4)


def test_temperature_of_overconfident_logits_is_found(script: ModuleType) -> None:
    """Labels drawn from softmax(logits); logits times 3 need the temperature 3."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4000, 7, generator=generator)
    phases = torch.multinomial(torch.softmax(logits, 1), 1, generator=generator).flatten()
    assert script.best_temperature(3.0 * logits, phases) == pytest.approx(3.0, rel=0.1)
