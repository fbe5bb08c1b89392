# SPDX-License-Identifier: Apache-2.0
"""Golden files: what is in them, what counts as a difference, tolerances, faulty files, the picture."""

from __future__ import annotations

import argparse
import io
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import pytest
import yaml
from rich.console import Console

from surg_perception.cli.replay import show
from surg_perception.replay.golden import Golden, GoldenError, Tolerances, plot
from surg_perception.replay.questions import AnsweredQuestion
from surg_perception.replay.run import Outcome, conclude, expected_of
from surg_perception.replay.session import Frame, Replayed

LABELS = ("Preparation", "Dissection", "Cleaning")


def replayed(change: Callable[[Frame], Frame] = lambda frame: frame, **fields: Any) -> Replayed:
    """20 s at 5 Hz: 10 s of each of two phases, one image refused, one question."""
    frames = []
    for n in range(100):
        phase_id = n // 50
        probabilities = tuple(0.9 if i == phase_id else 0.05 for i in range(3))
        stamp_ns = 10**18 + n * 200_000_000
        frame = Frame(n, stamp_ns, stamp_ns, "OK", LABELS[phase_id], phase_id, phase_id, 0.9, probabilities, 1.5)
        if n == 70:
            frame = Frame(n, stamp_ns, stamp_ns, "REJECTED", error="broken", error_kind="corrupt")
        frames.append(change(frame))
    answer = AnsweredQuestion(
        12.0, 0, "What?", "", answer="The gallbladder is dissected.", task="phase", confidence=0.8
    )
    made = Replayed("/image", "sensor_msgs/msg/Image", "m@1", "openvino:CPU:fp32", LABELS, "q@1", frames=frames)
    made.answers, made.input_sha256 = [answer], "ab" * 32
    return replace(made, **fields)


@pytest.fixture
def golden(tmp_path: Path) -> Golden:
    """Of replayed(), written and read."""
    Golden.of(replayed()).write(tmp_path / "golden.yaml")
    return Golden.read(tmp_path / "golden.yaml")


def told(golden: Golden, found: Replayed, **tolerances: Any) -> list[str]:
    return [str(one) for one in replace(golden, tolerances=Tolerances(**tolerances)).compare(found).differences]


def test_a_file_is_small_and_readable(tmp_path: Path) -> None:
    Golden.of(replayed()).write(tmp_path / "golden.yaml")
    text = (tmp_path / "golden.yaml").read_text()
    assert text.startswith("# Golden file")
    assert "- {at: 10.0, images: 20, phase: Dissection}\n" in text
    assert "- {at: 14.0, images: 1, state: REJECTED}\n" in text
    assert "- [19, 0.9, 1.5, 0.05, 0.9, 0.05]\n" in text
    assert len(text.splitlines()) < 60
    assert yaml.safe_load(text)["tolerances"] == {
        "boundary_s": 0.0,
        "score": 0.02,
        "latent": 0.02,
        "answer": "words",
        "answer_confidence": 0.05,
    }


def test_a_long_bag_has_no_longer_file() -> None:
    frames = [replace(frame, stamp_ns=frame.stamp_ns * 1, log_ns=0) for frame in replayed().frames]
    long = [replace(frame, stamp_ns=10**18 + n * 36 * 10**9) for n, frame in enumerate(frames)]
    made = Golden.of(replayed(frames=long))
    assert made.step_s == 60
    assert len(made.scores) <= 61


def test_the_same_is_no_difference(golden: Golden) -> None:
    comparison = golden.compare(replayed())
    assert not comparison.differences
    assert not comparison.notes
    assert comparison.summary == "as in the golden file"


def test_another_model_or_backend_is_a_note(golden: Golden) -> None:
    comparison = golden.compare(replayed(model_id="m@2", backend="onnxruntime:CPU:fp32"))
    assert not comparison.differences
    assert comparison.notes == [
        "the model is m@2, the golden file's m@1",
        "the backend is onnxruntime:CPU:fp32, the golden file's openvino:CPU:fp32",
    ]


def test_another_phase_is_told_with_its_time_and_both_names(golden: Golden) -> None:
    def change(frame: Frame) -> Frame:
        return replace(frame, phase="Cleaning", phase_id=2) if frame.number in (20, 21, 22, 80) else frame

    assert told(golden, replayed(change)) == [
        "4.00–4.40 s  phase: Cleaning, golden Preparation (3 images)",
        "16.00 s  phase: Cleaning, golden Dissection (1 images)",
    ]


def test_a_shifted_boundary_passes_within_its_tolerance_only(golden: Golden) -> None:
    def change(frame: Frame) -> Frame:
        return replace(frame, phase=LABELS[1], phase_id=1) if 47 <= frame.number < 50 else frame

    shifted = ["9.40–9.80 s  phase: Dissection, golden Preparation (3 images)"]
    assert told(golden, replayed(change)) == shifted
    assert told(golden, replayed(change), boundary_s=0.3) == shifted, "0.6 s early"
    assert told(golden, replayed(change), boundary_s=0.6) == []


def test_a_phase_that_neither_has_nearby_never_passes(golden: Golden) -> None:
    def change(frame: Frame) -> Frame:
        return replace(frame, phase="Cleaning", phase_id=2) if frame.number == 50 else frame

    assert len(told(golden, replayed(change), boundary_s=2.0)) == 1


def test_another_state_is_told(golden: Golden) -> None:
    def change(frame: Frame) -> Frame:
        return replace(frame, state="UNCERTAIN") if frame.number == 5 else frame

    assert told(golden, replayed(change)) == ["1.00 s  state: UNCERTAIN, golden OK (1 images)"]


def test_scores_have_a_tolerance_and_the_worst_is_told(golden: Golden) -> None:
    def by(step: float) -> Callable[[Frame], Frame]:
        def change(frame: Frame) -> Frame:
            if not 25 <= frame.number < 30:
                return frame
            return replace(frame, confidence=0.9 - step, probabilities=(0.9 - 2 * step, 0.05 + 2 * step, 0.05))

        return change

    assert told(golden, replayed(by(0.01))) == []
    assert told(golden, replayed(by(0.03))) == [
        "5.00–6.00 s  score: probability of Preparation 0.840, golden 0.900 (tolerance 0.02)"
    ]
    assert told(golden, replayed(by(0.03)), score=0.1) == []


def test_a_drifting_latent_is_told(golden: Golden) -> None:
    def change(frame: Frame) -> Frame:
        return replace(frame, latent_rms=None if frame.latent_rms is None else frame.latent_rms * 1.05)

    found = told(golden, replayed(change))
    assert len(found) == 20
    assert "latent RMS 1.575, golden 1.500 (tolerance 0.03)" in found[0]
    assert told(golden, replayed(change), latent=0.06) == []


@pytest.mark.parametrize(
    ("answer", "how", "differs"),
    [
        ("the  gallbladder is dissected", "words", False),
        ("the gallbladder is dissected", "exact", True),
        ("The gallbladder is retracted.", "words", True),
        ("The gallbladder is retracted.", "off", False),
    ],
)
def test_answers(golden: Golden, answer: str, how: str, differs: bool) -> None:
    found = replayed()
    found.answers[0] = replace(found.answers[0], answer=answer)
    assert bool(told(golden, found, answer=how)) == differs


def test_codes_tasks_and_missing_questions_are_told(golden: Golden) -> None:
    for fields, says in (
        ({"error": "NO_FRAMES"}, "error code NO_FRAMES, golden NONE"),
        ({"task": "caption"}, "task caption, golden phase"),
        ({"confidence": 0.7}, "confidence 0.700, golden 0.800"),
        ({"question": "Who?"}, "in the golden file 'What?' at 12.00 s"),
    ):
        found = replayed()
        found.answers[0] = replace(found.answers[0], **fields)
        (text,) = told(golden, found, answer="off")
        assert says in text
    assert "was not asked" in told(golden, replayed(answers=[]))[0]
    twice = replayed()
    twice.answers *= 2
    assert "is not in the golden file" in told(golden, twice)[0]


def test_what_is_no_number_is_a_difference(golden: Golden) -> None:
    golden.scores[0][1] = math.nan
    golden.answers[0]["confidence"] = None
    score, answer = told(golden, replayed())
    assert "confidence 0.900, golden nan" in score
    assert "confidence 0.800, golden none" in answer


def test_a_file_that_cannot_be_read_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "notes.yaml").write_text("mine")
    with pytest.raises(GoldenError, match="remove it and write it anew with --update"):
        expected_of(tmp_path / "notes.yaml", update=True)


def test_a_live_replay_asks_nothing_and_that_is_a_note(golden: Golden) -> None:
    comparison = golden.compare(replayed(answers=[], vqa_model_id="", asks=False))
    assert not comparison.differences
    assert comparison.notes == ["no questions were asked, the golden file's 1 answers do not count"]


def test_writing_anew_keeps_the_tolerances(tmp_path: Path) -> None:
    path = tmp_path / "golden.yaml"
    (tmp_path / "out").mkdir()
    Golden.of(replayed(), Tolerances(boundary_s=0.4, answer="exact")).write(path)
    conclude(replayed(input_sha256="cd" * 32), tmp_path / "out", path, expected_of(path, update=True), update=True)
    again = Golden.read(path)
    assert again.tolerances == Tolerances(boundary_s=0.4, answer="exact")
    assert again.input["sha256"] == "cd" * 32


def test_other_labels_are_a_difference(golden: Golden) -> None:
    assert any("labels" in text for text in told(golden, replayed(labels=("A", "B", "C"))))


def test_a_golden_file_of_another_bag_is_refused(golden: Golden) -> None:
    with pytest.raises(GoldenError, match=r"of another bag: 100 images of /image, sha256 abababababab….*--update"):
        golden.compare(replayed(input_sha256="cd" * 32))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda content: "text", "is no golden file"),
        (lambda content: {**content, "format": 7}, "format '7' found"),
        (lambda content: {k: v for k, v in content.items() if k != "phases"}, "KeyError"),
        (lambda content: {**content, "tolerances": {"scores": 1}}, "tolerances are"),
        (lambda content: {**content, "tolerances": {"score": "much"}}, "expected a number"),
        (lambda content: {**content, "tolerances": {"answer": "nearly"}}, "expected one of exact, words, off"),
        (
            lambda content: {**content, "phases": [{"at": 0, "images": 3, "phase": "x"}]},
            "are of 3 images, expected 100",
        ),
    ],
)
def test_a_faulty_file_is_an_error(tmp_path: Path, change: Callable[[Any], Any], says: str) -> None:
    path = tmp_path / "golden.yaml"
    path.write_text(yaml.safe_dump(change(yaml.safe_load(Golden.of(replayed()).text()))))
    with pytest.raises(GoldenError, match=says):
        Golden.read(path).compare(replayed())


def test_stamps_that_go_back_are_no_obstacle() -> None:
    def change(frame: Frame) -> Frame:
        return replace(frame, stamp_ns=frame.stamp_ns if frame.number < 50 else frame.stamp_ns - 10**10)

    looped = replayed(change)
    assert Golden.of(looped).compare(looped).differences == []


def test_the_picture_marks_what_differs(golden: Golden, tmp_path: Path) -> None:
    def change(frame: Frame) -> Frame:
        return replace(frame, phase="Cleaning", phase_id=2) if 20 <= frame.number < 40 else frame

    red = {}
    for name, found in (("same", replayed()), ("other", replayed(change))):
        plot(tmp_path / f"{name}.png", found, golden, golden.compare(found))
        picture = cv2.imread(str(tmp_path / f"{name}.png"))
        red[name] = int((abs(picture.astype(int) - (46, 34, 207)).max(axis=2) < 8).sum())
    assert red["same"] == 0
    assert red["other"] > 1000


def test_names_with_brackets_are_shown_as_they_are(tmp_path: Path) -> None:
    found, console = replayed(topic="/camera[/left]", model_id="m[bold]@1"), Console(file=io.StringIO(), width=200)
    show(Outcome(tmp_path, found, None, updated=False, notes=[]), argparse.Namespace(), console)
    assert "/camera[/left]" in console.file.getvalue()
    assert "m[bold]@1" in console.file.getvalue()
