# SPDX-License-Identifier: Apache-2.0
"""The shipped SurgLLM sees: its answers about phantom procedures that it was not trained on depend on the picture."""

from __future__ import annotations

from pathlib import Path

import pytest

from surg_perception.data.clip_labels import open_clip_videos
from surg_perception.surgllm.answering import Assistant
from surg_perception.surgllm.base_models import BaseModelMissing
from surg_perception.surgllm.evaluation import evaluate
from surg_perception.surgllm.model_folder import find_surgllm
from surg_perception.surgllm.questions import make_samples

NAME = "surgllm_small_phantom"
SEEDS = range(6500, 6502)


@pytest.fixture(scope="module")
def assistant() -> Assistant:
    try:
        return Assistant.load(NAME, threads=1)
    except BaseModelMissing as error:
        pytest.skip(str(error))


def test_it_was_not_trained_on_what_measures_it_here() -> None:
    assert not {f"phantom-{seed}" for seed in SEEDS} & set(find_surgllm(NAME).training["videos"])


def test_it_fits_a_repository() -> None:
    card = find_surgllm(NAME)
    assert sum(file.stat().st_size for file in card.folder.iterdir()) < 40e6


def test_answers_come_from_the_picture(assistant: Assistant, tmp_path: Path) -> None:
    clips = open_clip_videos(f"phantom:seeds={SEEDS[0]}-{SEEDS[-1]},duration_s=60")
    samples = make_samples(clips, 0, 24, tasks=("phase",), window_shares={4: 1.0})
    found = evaluate(assistant, samples, clips, out=tmp_path, conditions=("routed", "blank"), batch=8)
    right = {condition: found.scores[condition].sum() for condition in ("routed", "blank")}
    assert len(samples) == 24
    assert right["routed"] >= 16
    assert right["routed"] >= right["blank"] + 6
