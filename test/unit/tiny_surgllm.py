# SPDX-License-Identifier: Apache-2.0
"""A SurgLLM of the configuration `tiny`, trained through all stages in seconds; `test/unit/conftest.py` shares it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rich.console import Console

from surg_perception.gsvit.trainer import TrainSettings
from surg_perception.surgllm.alignment import AlignmentConfig
from surg_perception.surgllm.config import CONFIGS
from surg_perception.surgllm.model_folder import SurgLLMCard
from surg_perception.surgllm.reconstruction import ReconstructionOptions
from surg_perception.surgllm.training import SurgLLMOptions, train_surgllm

DATA = "phantom:seeds=11-12,duration_s=30"
TRAINED_ON, HELD_OUT = "phantom-11@0000", "phantom-12"
SETTINGS = TrainSettings(
    epochs=1,
    batch=8,
    learning_rate=1e-2,
    final_learning_rate=1e-4,
    schedule="one_cycle",
    optimiser="adamw",
    gradient_clip=1.0,
    threads=1,
)
OPTIONS = SurgLLMOptions(
    config=CONFIGS["tiny"],
    held_out=(HELD_OUT,),
    per_task=16,
    adapter_per_task=16,
    validation_per_task=2,
    tasks=("location", "phase", "triplet"),
    reconstruction=replace(SETTINGS, batch=4),
    grounding=SETTINGS,
    alignment=SETTINGS,
    warm_up=SETTINGS,
    tuning=SETTINGS,
    adapting=SETTINGS,
    masking=ReconstructionOptions(decoder_width=32, decoder_layers=1, decoder_heads=2, validation_clips=1, pictures=0),
    text=AlignmentConfig(start="", layers=2, fusion_layers=1, width=32, embedding=16, validation_clips=16),
)


def quiet() -> Console:
    return Console(quiet=True)


def train(out: Path, cache: Path, options: SurgLLMOptions = OPTIONS) -> SurgLLMCard:
    return train_surgllm([DATA], out, options, cache=cache, console=quiet())
