# SPDX-License-Identifier: Apache-2.0
"""Grounding: what each token is told, what is left out where labels do not know, and that it is learned."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from surg_perception.data.clip_labels import ClipVideo, InstrumentState, SecondLabels
from surg_perception.data.frame_readers import NoFrames
from surg_perception.surgllm.config import CONFIGS
from surg_perception.surgllm.encoder import VideoEncoder
from surg_perception.surgllm.grounding import GROUNDING, GroundingTask, ground

CONFIG = CONFIGS["tiny"].encoder  # 4 x 4 patches
HOOK = InstrumentState("hook", "dissect", "gallbladder", (0.0, 0.0, 0.5, 0.25))
GRASPER = InstrumentState("grasper", "retract", "liver", (0.25, 0.0, 0.75, 1.0))


def clip(seconds: list[SecondLabels], name: str = "a@0000") -> ClipVideo:
    video, vocabulary = name.partition("@")[0], ("hook", "grasper")
    return ClipVideo(
        name, video, tuple(seconds), vocabulary, 1, NoFrames("no pictures here"), tuple(range(len(seconds)))
    )


def pictures(count: int, seed: int = 0) -> NDArray[np.float16]:
    """What the patch stem gives: pixels [seconds, 3, 32, 32]."""
    return np.random.default_rng(seed).standard_normal((count, 3, 32, 32)).astype(np.float16)


def task_of(seconds: list[SecondLabels]) -> GroundingTask:
    video = clip(seconds)
    return GroundingTask(VideoEncoder(CONFIG), [video], {video.name: pictures(len(seconds))}, 4)


def known(*states: InstrumentState) -> SecondLabels:
    return SecondLabels("ClippingCutting", states)


def test_a_token_is_told_the_instrument_whose_box_covers_its_centre_and_the_smaller_box_wins() -> None:
    task = task_of([known(HOOK, GRASPER)] * 4)
    where = task._tensors([("a@0000", 0)])["where"][0].view(2, 4, 4)
    names = ["nothing", *task.instruments]
    assert [names[i] for i in where[0, 0]] == ["hook", "hook", "grasper", "grasper"]
    assert [names[i] for i in where[0, 1]] == ["nothing", "grasper", "grasper", "grasper"]
    what = task._tensors([("a@0000", 0)])["what"][0].view(2, 4, 4)
    assert task.acts[what[0, 0, 0]] == ("dissect", "gallbladder")
    assert what[0, 1, 0] < 0


def test_a_tubelet_has_the_labels_of_its_later_frame() -> None:
    task = task_of([known(HOOK), known(GRASPER), known(GRASPER), known(HOOK)])
    where = task._tensors([("a@0000", 0)])["where"][0].view(2, 16)
    hook, grasper = (1 + task.instruments.index(name) for name in ("hook", "grasper"))
    assert set(where[0].tolist()) == {0, grasper}
    assert set(where[1].tolist()) == {0, hook}


def test_nothing_is_told_where_boxes_are_not_annotated_but_presence_is() -> None:
    without = InstrumentState("hook")
    task = task_of([SecondLabels("Preparation", (without,)), *[known(HOOK)] * 3, *[SecondLabels(None, None)] * 4])
    maps = task._tensors([("a@0000", 0)])
    assert (maps["where"][0].view(2, 16)[0] > 0).any()  # second 1 has a box
    unlabelled = task._tensors([("a@0000", 4)])
    assert (unlabelled["where"] < 0).all()
    assert unlabelled["present"].isnan().all()
    assert unlabelled["phase"].item() < 0
    network = task.module
    loss, parts = task.loss(network, {**unlabelled, "keep": torch.arange(32)[None]})
    assert float(loss.detach()) == 0.0
    assert all(math.isfinite(value) for value in parts.values())


def test_present_and_absent_instruments_of_the_vocabulary() -> None:
    task = task_of([known(HOOK)] * 4 + [known(GRASPER)] * 4)
    present = dict(zip(task.instruments, task._tensors([("a@0000", 0)])["present"][0].tolist(), strict=True))
    assert present == {"hook": 1.0, "grasper": 0.0}


def test_places_are_learned_and_the_encoder_that_came_in_is_left_as_it_was(tmp_path: Path) -> None:
    """Bright patches are a hook: after a short training held-back clips are read well above the majority."""

    def video(name: str, seed: int) -> tuple[ClipVideo, NDArray[np.float16]]:
        rng = np.random.default_rng(seed)
        seconds, maps = [], []
        for _ in range(64):
            column, row, hook = rng.integers(0, 3), rng.integers(0, 3), rng.random() < 0.5
            picture = rng.standard_normal((3, 32, 32)) * 0.1
            part = picture[:, row * 8 : row * 8 + 16, column * 8 : column * 8 + 16]
            part[0 if hook else 1] += 2.0
            state = HOOK if hook else GRASPER
            seconds += [known(replace(state, box=(column / 4, row / 4, 0.5, 0.5)))] * 4
            maps += [picture.astype(np.float16)] * 4
        return clip(seconds, name), np.stack(maps)

    torch.manual_seed(0)
    encoder = VideoEncoder(CONFIG)
    before = encoder.project.weight.detach().clone()
    train, test = video("a@0000", 1), video("b@0000", 2)
    settings = replace(GROUNDING, epochs=4, batch=16, learning_rate=5e-3, precision="fp32", threads=1)
    features = {train[0].name: train[1], test[0].name: test[1]}
    grounded = ground(encoder, [train[0]], features, 4, settings, tmp_path, validation=[test[0]])
    assert torch.equal(encoder.project.weight, before)
    assert not torch.equal(grounded.project.weight, before)
    measured = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert measured["where"] > measured["where_majority"] + 0.2


def test_training_clips_show_half_of_their_tokens_in_order() -> None:
    task = task_of([known(HOOK)] * 6)
    keep = task.batch(np.array([0, 1]), np.random.default_rng(0))["keep"]
    assert keep.shape == (2, 16)
    assert (keep.diff(dim=1) > 0).all()
