# SPDX-License-Identifier: Apache-2.0
"""TM-Tuning: how windows are cut, what is trained, in which order, and what is kept on disk."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tiny_surgllm import SETTINGS, quiet
from torch import Tensor

from surg_perception.data.clip_labels import ClipVideo, InstrumentState, SecondLabels
from surg_perception.data.frame_readers import NoFrames
from surg_perception.gsvit.trainer import TrainingError, fit, read_lines
from surg_perception.surgllm.config import CONFIGS, JOINT
from surg_perception.surgllm.encoder import VideoEncoder
from surg_perception.surgllm.model import SurgLLM
from surg_perception.surgllm.prompt import IGNORED, Prompter
from surg_perception.surgllm.questions import Sample
from surg_perception.surgllm.tuning import (
    Lesson,
    TuningTask,
    WarmUpTask,
    cached_tokens,
    lessons_of,
    segments_of,
    spans_of,
    tune,
)

CONFIG = CONFIGS["tiny"]
FRAMES = CONFIG.segment_frames
FEW = replace(SETTINGS, batch=4)


def sample(start_s: int, end_s: int, answer: str = "hook", task: str = "triplet", video: str = "V@0") -> Sample:
    name = f"{video}/{start_s}-{end_s}/{task}/{answer}"
    return Sample(name, video, "V", start_s, end_s, task, "closed", f"What is seen by {task}?", answer)


def new_model() -> SurgLLM:
    torch.manual_seed(0)
    model = SurgLLM(CONFIG)
    model.language_model.add_adapter(JOINT)
    return model


def new_tokens(seconds: int = 24) -> dict[str, NDArray[np.float16]]:
    shape = (seconds, CONFIG.encoder.tokens(FRAMES), CONFIG.encoder.width)
    return {"V@0": np.random.default_rng(0).normal(size=shape).astype(np.float16)}


# ---- windows -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        ((0, 4), [(0, 4)]),
        ((3, 11), [(3, 7), (7, 11)]),
        ((0, 10), [(0, 2), (2, 6), (6, 10)]),
        ((5, 6), [(5, 6)]),
        ((2, 7), [(2, 3), (3, 7)]),
    ],
)
def test_segments_are_cut_from_the_end_of_the_window(window: tuple[int, int], expected: list[tuple[int, int]]) -> None:
    assert segments_of(*window, FRAMES) == expected


def test_spans_count_from_the_first_frame_of_the_window() -> None:
    assert spans_of(segments_of(7, 17, FRAMES)) == [(0, 2), (2, 6), (6, 10)]


# ---- what is trained ---------------------------------------------------------------------------------------


def state(model: SurgLLM) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def changed(before: dict[str, Tensor], model: SurgLLM) -> set[str]:
    """The parts of a model whose weights are no longer the same bits."""
    parts = set()
    for key, value in model.state_dict().items():
        if key not in before:
            parts.add("new")
        elif not torch.equal(value, before[key]):
            adapter = next((name for name in ("joint", "phase", "triplet") if f".{name}." in key), "")
            parts.add(f"adapter {adapter}" if adapter else key.split(".")[0])
    return parts


def test_joint_tuning_trains_the_joint_adapter_the_q_former_and_the_projection(tmp_path: Path) -> None:
    model, prompter = new_model(), Prompter(CONFIG)
    samples = [sample(i, i + 4) for i in range(4)] + [sample(i, i + 8) for i in range(4)]
    before = state(model)
    tune(model, prompter, samples, new_tokens(), JOINT, FEW, tmp_path, console=quiet())
    assert changed(before, model) == {"adapter joint", "qformer", "project"}
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_tasks_tuning_trains_its_adapter_alone(tmp_path: Path) -> None:
    model, prompter, tokens = new_model(), Prompter(CONFIG), new_tokens()
    samples = [sample(i, i + 4, task="phase") for i in range(8)]
    with torch.no_grad():
        for parameter in model.language_model.adapter_parameters(JOINT):
            parameter.normal_(std=0.1)
    model.language_model.add_adapter("triplet", start=JOINT)
    model.language_model.add_adapter("phase", start=JOINT)
    before = state(model)
    tune(model, prompter, samples, tokens, "phase", FEW, tmp_path / "a", console=quiet())
    assert changed(before, model) == {"adapter phase"}
    # One that is not there yet starts as the joint one.
    del model
    model = new_model()
    before = state(model)
    none = replace(FEW, learning_rate=1e-12, final_learning_rate=1e-12)
    tune(model, prompter, samples, tokens, "phase", none, tmp_path / "b", console=quiet())
    assert changed(before, model) == {"new"}
    joint, phase = (model.language_model.adapter_weights(name) for name in (JOINT, "phase"))
    assert all(torch.allclose(phase[key], joint[key], atol=1e-6) for key in joint)


def test_tuning_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    samples = [sample(i, i + 4, answer) for i in range(8) for answer in ("hook", "no")]
    settings = replace(FEW, epochs=2, checkpoint_every_steps=1)

    class Stop(Exception):
        pass

    class Interrupted(TuningTask):
        def loss(self, module, batch):
            if self.steps == 3:
                raise Stop
            self.steps += 1
            return super().loss(module, batch)

    def task(kind: type[TuningTask]) -> TuningTask:
        made = kind(new_model(), Prompter(CONFIG), samples, new_tokens(), JOINT, 4)
        made.steps = 0  # type: ignore[attr-defined]
        return made

    whole, parts = task(TuningTask), task(Interrupted)
    fit(whole, settings, tmp_path / "whole", console=quiet())
    with pytest.raises(Stop):
        fit(parts, settings, tmp_path / "parts", console=quiet())
    again = task(TuningTask)
    fit(again, settings, tmp_path / "parts", console=quiet())
    losses = [[line["loss"] for line in read_lines(tmp_path / name / "losses.jsonl")] for name in ("whole", "parts")]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 8
    assert changed(state(whole.module), again.module) == set()  # type: ignore[arg-type]
    other = TuningTask(new_model(), Prompter(CONFIG), samples[::-1], new_tokens(), JOINT, 4)
    with pytest.raises(TrainingError, match="questions_sha256"):
        fit(other, settings, tmp_path / "parts", console=quiet())


def test_nothing_to_train_on_is_told(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="training set is empty"):
        tune(new_model(), Prompter(CONFIG), [], new_tokens(), JOINT, FEW, tmp_path, console=quiet())


def test_a_batch_holds_each_windows_segments() -> None:
    tokens = new_tokens()
    samples = [sample(3, 11), sample(5, 9, "no")]
    task = TuningTask(new_model(), Prompter(CONFIG), samples, tokens, JOINT, 2)
    batch = task.batch(np.array([0, 1]), np.random.default_rng(0))
    expected = np.stack([tokens["V@0"][start] for start in (3, 7, 5)])
    assert np.array_equal(batch["segments"].numpy(), expected)
    assert int(batch["visual"].max()) == 3 * CONFIG.qformer.queries - 1
    assert (batch["labels"] != IGNORED).sum(dim=1).tolist() == [len(" hook") + 1, len(" no") + 1]


def test_shorter_segments_have_tokens_of_their_own() -> None:
    tokens = new_tokens() | {"V@0/2": new_tokens()["V@0"] + 1}
    task = TuningTask(new_model(), Prompter(CONFIG), [sample(3, 9)], tokens, JOINT, 1)
    batch = task.batch(np.array([0]), np.random.default_rng(0))
    assert np.array_equal(batch["segments"].numpy(), np.stack([tokens["V@0/2"][3], tokens["V@0"][5]]))


def test_an_epoch_covers_all_in_batches_of_like_length() -> None:
    lengths = (4, 8, 12, 16)
    samples = [sample(0, lengths[i % 4], str(i)) for i in range(203)]
    task = TuningTask(new_model(), Prompter(CONFIG), samples, new_tokens(), JOINT, 8)
    orders = [task.order(epoch, np.random.default_rng(epoch)) for epoch in range(2)]
    for order in orders:
        assert sorted(order) == list(range(203))
        batches = [{samples[i].end_s for i in order[first : first + 8]} for first in range(0, 200, 8)]
        # Sorted within chunks of 16 batches: at most three batches a chunk hold two lengths.
        assert Counter(map(len, batches)).keys() <= {1, 2}
        assert sum(len(batch) > 1 for batch in batches) <= 2 * 3
        assert [max(batch) for batch in batches] != sorted(max(batch) for batch in batches)
    assert not np.array_equal(*orders)
    few = TuningTask(new_model(), Prompter(CONFIG), samples[:5], new_tokens(), JOINT, 8)
    assert sorted(few.order(0, np.random.default_rng(0))) == list(range(5))


def test_validation_measures_each_task_by_itself(tmp_path: Path) -> None:
    model = new_model().eval()
    held = [sample(i, i + 4, task=task, answer=task) for i in range(3) for task in ("phase", "triplet")]
    task = TuningTask(model, Prompter(CONFIG), held, new_tokens(), JOINT, 2, validation=held)
    with torch.no_grad():
        figures = task.end_of_epoch(0, model, tmp_path)
        single = [float(model(task._tensors([s]))) for s in held if s.task == "phase"]
    assert set(figures) == {"loss_phase", "loss_triplet"}
    assert figures["loss_phase"] == pytest.approx(np.mean(single), rel=0.02)


def unlabelled(seconds: int) -> ClipVideo:
    """The clip "V@0", of which nothing is known."""
    return ClipVideo("V@0", "V", (SecondLabels(None, None),) * seconds, (), 1, NoFrames(""), tuple(range(seconds)))


def test_each_segment_of_a_window_is_a_lesson_with_its_own_time() -> None:
    seconds = [SecondLabels("Preparation", (InstrumentState("hook"),) * (i in (3, 6, 7))) for i in range(12)]
    clip = replace(unlabelled(12), seconds=tuple(seconds))
    asked = replace(sample(2, 12, "1 to 1", task="temporal"), kind="interval", type="visible", subject="hook")
    found = [(x.start_s, x.end_s, x.span, x.text) for x in lessons_of([asked], [clip], FRAMES)]
    assert found == [(2, 4, (0, 2), "1 to 1"), (4, 8, (2, 6), "4 to 5"), (8, 12, (6, 10), "it is not visible")]
    # A question about the end of a long window is told by its last segment alone.
    assert [(x.start_s, x.span) for x in lessons_of([sample(2, 12)], [clip], FRAMES)] == [(8, (6, 10))]


def test_a_lesson_longer_than_the_queries_is_cut() -> None:
    queries = CONFIG.qformer.queries
    long = Lesson("caption", "Describe it.", "V@0", 0, 4, (0, 4), "a text of many more tokens than that")
    task = WarmUpTask(new_model(), Prompter(CONFIG), [long], new_tokens())
    spelled = task._tensors([long])["spelled"][0].tolist()
    assert task.prompter.text([task.known[i] for i in spelled]) == long.text[: queries - 1]


def test_the_warm_up_lets_visual_tokens_spell_the_answer(tmp_path: Path) -> None:
    """Odd and even segments look different; the Q-Former has to find out which is which, letter by letter."""
    tokens = new_tokens(40)
    tokens["V@0"][:, :, : CONFIG.encoder.width // 2] += np.float16(3) * (np.arange(40) % 2)[:, None, None]
    samples = [sample(i, i + 4, ("up", "no")[i % 2]) for i in range(36)]
    lessons = lessons_of(samples, [unlabelled(40)], FRAMES)
    assert [lesson.text for lesson in lessons] == [sample.answer for sample in samples]
    model, prompter = new_model(), Prompter(CONFIG)
    task = WarmUpTask(model, prompter, lessons[:24], tokens, validation=lessons[24:])
    spelled = task._tensors(lessons[:1])["spelled"][0].tolist()
    assert prompter.text([task.known[i] for i in spelled if i >= 0]) == "up"
    before = state(model)
    fit(task, replace(SETTINGS, epochs=20, batch=12), tmp_path, console=quiet())
    assert changed(before, model) == {"qformer", "project"}
    figures = read_lines(tmp_path / "metrics.jsonl")
    assert figures[-1]["spelled_triplet"] > 0.9 > figures[0]["spelled_triplet"]


# ---- tokens on disk ----------------------------------------------------------------------------------------


class Counting(VideoEncoder):
    """Counts the clips that are encoded."""

    def encode(self, features: Tensor, keep: Tensor | None = None) -> Tensor:
        self.encoded = getattr(self, "encoded", 0) + len(features)
        return super().encode(features, keep)


def counting(seed: int = 0, **shapes: object) -> Counting:
    torch.manual_seed(seed)
    return Counting(replace(CONFIG.encoder, **shapes)).eval()


def new_features(seed: int = 0, seconds: int = 20) -> dict[str, NDArray[np.float16]]:
    shape = (seconds, 3, CONFIG.encoder.image_size, CONFIG.encoder.image_size)
    return {"V@0": np.random.default_rng(seed).normal(size=shape).astype(np.float16)}


def test_tokens_are_those_of_the_windows_segments(tmp_path: Path) -> None:
    encoder, features = counting(), new_features()
    samples = [sample(0, 4), sample(16, 20), sample(3, 9), sample(1, 2)]
    found = cached_tokens(encoder, features, FRAMES, tmp_path, samples)
    assert set(found) == {"V@0", "V@0/2", "V@0/1"}
    assert encoder.encoded == 5
    for name, second, seen in (
        ("V@0", 0, [0, 1, 2, 3]),
        ("V@0", 5, [5, 6, 7, 8]),
        ("V@0", 16, [16, 17, 18, 19]),
        ("V@0/2", 3, [3, 4, 4, 4]),
        ("V@0/1", 1, [1, 1, 1, 1]),
    ):
        clip = torch.from_numpy(features["V@0"][seen]).float().transpose(0, 1)
        with torch.no_grad():
            expected = encoder.encode(clip[None])[0]
        row = torch.from_numpy(found[name][second].astype(np.float32))
        torch.testing.assert_close(row, expected, atol=0.05, rtol=0.05)


def test_tokens_are_kept_until_something_changes(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    samples = [sample(0, 16), sample(2, 6)]  # segments from 0, 4, 8, 12 and 2
    first = counting()
    cached_tokens(first, new_features(), FRAMES, tmp_path, samples, lambda *progress: told.append(progress))
    assert first.encoded == 5
    assert told == [(5, 5)]
    same = counting()
    cached_tokens(same, new_features(), FRAMES, tmp_path, [*samples, samples[0]])
    assert not hasattr(same, "encoded")
    for encoder, features, frames, asked, count in (
        (counting(seed=1), new_features(), FRAMES, samples, 5),  # other weights
        (counting(positions="flat"), new_features(), FRAMES, samples, 5),  # same weights, other positions
        (counting(heads=4), new_features(), FRAMES, samples, 5),
        (counting(), new_features(seed=1), FRAMES, samples, 5),  # other pictures under the same name
        (counting(), new_features(), FRAMES, samples[:1], 4),
        (counting(), new_features(), 2, samples, 8),
    ):
        found = cached_tokens(encoder, features, frames, tmp_path, asked)
        assert encoder.encoded == count
        assert found["V@0"][4].shape == (CONFIG.encoder.tokens(frames), CONFIG.encoder.width)
    assert not list(tmp_path.rglob("*.partial*"))
