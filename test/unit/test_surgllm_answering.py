# SPDX-License-Identifier: Apache-2.0
"""The assistant: routing, refusals, streaming, stopping, and what it does with frames and windows."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from surg_perception.surgllm.answering import Assistant, Features
from surg_perception.surgllm.question_check import QuestionRefused

WHERE, WHICH, DOING = "Where is the hook?", "What is the surgical phase?", "What is the hook doing?"
Window = list[tuple[float, float, Features]]


@pytest.fixture(scope="module")
def assistant(tiny_surgllm: Path) -> Assistant:
    return Assistant.load(tiny_surgllm, threads=1)


def frames(seed: int, count: int = 4) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), np.uint8)


@pytest.fixture(scope="module")
def window(assistant: Assistant) -> Window:
    return [(4.0 * i, 4.0 * i + 4, assistant.encode(frames(i))) for i in range(6)]


def test_it_says_what_it_takes(assistant: Assistant, tiny_surgllm: Path) -> None:
    assert (assistant.image_size, assistant.segment_frames, assistant.max_segments) == (32, 4, 4)
    assert set(assistant.tasks) == {"location", "phase", "triplet"}
    assert assistant.model_id.startswith("tiny@")


# ---- routing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("question", "task"), [(WHERE, "location"), (WHICH, "phase"), (DOING, "triplet")])
def test_a_question_goes_to_its_task(assistant: Assistant, window: Window, question: str, task: str) -> None:
    reply = assistant.ask(question, window[:1])
    assert reply.task == task
    assert reply.adapter in (task, "joint")
    assert (reply.adapter == task) == (reply.task_probability >= assistant.router.threshold)
    assert 0 < reply.task_probability <= 1
    assert 0 <= reply.confidence <= 1
    assert 0 < reply.first_token_ms <= reply.total_ms


def test_a_router_that_is_not_sure_leaves_it_to_the_joint_adapter(
    assistant: Assistant, window: Window, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assistant, "router", replace(assistant.router, threshold=2.0))
    reply = assistant.ask(WHERE, window[:1])
    assert (reply.task, reply.adapter) == ("location", "joint")
    assert reply.text == assistant.ask_batch([WHERE], [window[:1]], adapters=["joint"])[0]


def test_a_task_can_be_asked_for(assistant: Assistant, window: Window) -> None:
    reply = assistant.ask(WHERE, window[:1], task="phase")
    assert (reply.task, reply.adapter, reply.task_probability) == ("phase", "phase", 1.0)


def test_adapters_answer_by_themselves_whatever_was_asked_before(assistant: Assistant, window: Window) -> None:
    first = {task: assistant.ask(WHERE, window[:1], task=task) for task in assistant.tasks}
    for task in reversed(assistant.tasks):
        again = assistant.ask(WHERE, window[:1], task=task)
        assert (again.text, again.confidence) == (first[task].text, first[task].confidence)
    assert len({reply.confidence for reply in first.values()}) == len(first)


@pytest.mark.parametrize(
    ("question", "task", "code"),
    [
        (WHERE, "smoke", "UNKNOWN_TASK"),
        (WHERE, "joint", "UNKNOWN_TASK"),
        ("Who is the patient?", "", "DECLINED"),
        ("Who is the patient?", "phase", "DECLINED"),
        ("", "", "INVALID_QUESTION"),
        ("x" * 100_000, "", "INVALID_QUESTION"),
    ],
)
def test_what_is_not_answered_has_a_code(
    assistant: Assistant, window: Window, question: str, task: str, code: str
) -> None:
    with pytest.raises(QuestionRefused) as refused:
        assistant.ask(question, window[:1], task=task)
    assert refused.value.code_name == code


def test_what_the_router_takes_for_out_of_scope_is_declined(
    assistant: Assistant, window: Window, monkeypatch: pytest.MonkeyPatch
) -> None:
    scope = assistant.router.scope
    monkeypatch.setattr(assistant, "router", replace(assistant.router, scope=replace(scope, bias=scope.bias + 100)))
    for task in ("", "phase"):
        with pytest.raises(QuestionRefused) as refused:
            assistant.ask(WHERE, window[:1], task=task)
        assert refused.value.code_name == "DECLINED"


# ---- streaming and stopping --------------------------------------------------------------------------------


def test_the_text_grows_with_every_token(assistant: Assistant, window: Window) -> None:
    told: list[str] = []
    reply = assistant.ask(WHICH, window[:2], on_text=told.append)
    assert told[-1] == reply.text != ""
    assert all(len(shorter) <= len(longer) for shorter, longer in pairwise(told))
    assert len(told) == reply.tokens + reply.complete  # the end token too


@pytest.mark.parametrize("most", [0, 1, 3])
def test_it_stops_when_told(assistant: Assistant, window: Window, most: int) -> None:
    told: list[str] = []
    reply = assistant.ask(WHICH, window[:1], on_text=told.append, stop=lambda: len(told) >= most)
    assert len(told) == reply.tokens == most
    assert not reply.complete
    assert reply.text == (told[-1] if told else "")
    assert 0 <= reply.confidence <= 1
    whole = assistant.ask(WHICH, window[:1])
    assert whole.text.startswith(reply.text)
    assert whole.tokens > most


# ---- windows and batches -----------------------------------------------------------------------------------


def seen_by_the_model(assistant: Assistant, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any]]:
    seen: list[tuple[Any, Any]] = []
    make, generate = assistant._prompter.batch, assistant._model.generate
    spans: list[Any] = []

    def batch(items: Any, **options: Any) -> Any:
        spans.extend(item.spans for item in items)
        return make(items, **options)

    def remember(segments: Any, batch: Any, **options: Any) -> Any:
        seen.append((list(spans), segments))
        return generate(segments, batch, **options)

    monkeypatch.setattr(assistant._prompter, "batch", batch)
    monkeypatch.setattr(assistant._model, "generate", remember)
    return seen


def test_of_too_many_segments_the_newest_are_kept(
    assistant: Assistant, window: Window, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = seen_by_the_model(assistant, monkeypatch)
    assistant.ask(WHERE, window)
    [(spans, segments)] = seen
    assert spans == [[(0, 4), (4, 8), (8, 12), (12, 16)]]
    assert torch.equal(segments, torch.stack([features for _, _, features in window[-4:]]))


def test_a_window_needs_a_segment(assistant: Assistant) -> None:
    with pytest.raises(ValueError, match="a window without a segment found"):
        assistant.ask(WHERE, [])


def test_a_batch_answers_as_single_questions_do(assistant: Assistant, window: Window) -> None:
    questions = [WHERE, WHICH, DOING, WHERE]
    windows = [window[:1], window[:3], window[2:4], window[4:]]
    single = [assistant.ask(q, w).text for q, w in zip(questions, windows, strict=True)]
    assert assistant.ask_batch(questions, windows) == single
    chosen = [assistant.ask(q, w, task="phase").text for q, w in zip(questions, windows, strict=True)]
    assert assistant.ask_batch(questions, windows, adapters=["phase"] * 4) == chosen
    with pytest.raises(ValueError, match="adapter 'smoke' found, expected one of"):
        assistant.ask_batch([WHERE], [window[:1]], adapters=["smoke"])


# ---- frames ------------------------------------------------------------------------------------------------


def test_a_short_segment_repeats_its_last_frame(assistant: Assistant) -> None:
    clip = frames(20)
    padded = np.stack([clip[0], clip[1], clip[1], clip[1]])
    assert torch.equal(assistant.encode(clip[:2]), assistant.encode(padded))
    assert not torch.equal(assistant.encode(clip[:2]), assistant.encode(clip))
    assert assistant.encode(clip[:1]).shape == assistant.encode(clip).shape == (32, 32)


def test_a_frame_passes_the_stem_once(assistant: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    passed = []
    features = assistant._model.encoder.features
    monkeypatch.setattr(assistant._model.encoder, "features", lambda x: passed.append(x) or features(x))
    clip = frames(30)
    growing = [assistant.encode(clip[:n]) for n in range(1, 5)]
    assert len(passed) == 4
    again = assistant.encode(clip)
    assert len(passed) == 4
    assert torch.equal(again, growing[-1])
    for seed in range(31, 36):
        assistant.encode(frames(seed))
    assistant.encode(clip)  # forgotten by now: memory does not grow
    assert len(passed) == 4 + 20 + 4
    assert len(assistant._stems) <= 16


def test_frames_are_left_alone(assistant: Assistant) -> None:
    clip = frames(40)
    read_only = clip.copy()
    read_only.flags.writeable = False
    mirrored = clip[:, :, ::-1].copy()[:, :, ::-1]  # negative strides
    expected = assistant.encode(clip)
    assert torch.equal(assistant.encode(read_only), expected)
    assert torch.equal(assistant.encode(mirrored), expected)
    assert np.array_equal(clip, frames(40))


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((0, 32, 32, 3), np.uint8),
        np.zeros((5, 32, 32, 3), np.uint8),
        np.zeros((4, 16, 32, 3), np.uint8),
        np.zeros((32, 32, 3), np.uint8),
        np.zeros((4, 32, 32, 3), np.float32),
    ],
)
def test_frames_that_do_not_fit_are_refused(assistant: Assistant, wrong: NDArray[Any]) -> None:
    with pytest.raises(ValueError, match=r"expected uint8 BGR \[1 to 4, 32, 32, 3\]"):
        assistant.encode(wrong)


def test_the_number_of_threads_is_its_own(assistant: Assistant, window: Window) -> None:
    before = torch.get_num_threads()
    during: list[int] = []
    torch.set_num_threads(2)
    try:
        assistant.ask(WHERE, window[:1], on_text=lambda text: during.append(torch.get_num_threads()))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert set(during) == {1}


# ---- a folder gives what was trained -----------------------------------------------------------------------


def test_a_folder_that_is_loaded_again_gives_the_same_answers(
    assistant: Assistant, window: Window, tiny_surgllm: Path
) -> None:
    from surg_perception.surgllm.model_folder import find_surgllm
    from surg_perception.surgllm.prompt import Prompted
    from surg_perception.surgllm.training import open_surgllm

    other = Assistant.load(tiny_surgllm, threads=1)
    questions = [WHERE, WHICH, DOING]
    windows = [window[:1], window[:2], window[3:]]
    assert other.ask_batch(questions, windows) == assistant.ask_batch(questions, windows)
    # With adapter layers in place of fused weights, as it was trained.
    model = open_surgllm(find_surgllm(tiny_surgllm)).eval()
    for task in assistant.tasks:
        model.language_model.set_adapter(task)
        batch = assistant._prompter.batch([Prompted(WHERE, [(0, 4)])], pad_left=True)
        [answer] = model.generate(window[0][2][None], batch)
        reply = assistant.ask(WHERE, window[:1], task=task)
        assert assistant._prompter.text(answer.ids) == reply.text
        assert answer.confidence == pytest.approx(reply.confidence, abs=1e-3)
