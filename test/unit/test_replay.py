# SPDX-License-Identifier: Apache-2.0
"""Replay of bags: what is written, the same bytes twice, bad images, parameters, questions, interrupts, the command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from phantom_bags import RATE_HZ, START_NS, TOPIC, jpeg, messages_of, write_phantom_bag

from surg_perception.data.bags import BagError
from surg_perception.models import find_model
from surg_perception.nodes.parameter_table import PHASE, VQA
from surg_perception.replay.parameters import node_values
from surg_perception.replay.questions import PlannedQuestion, QuestionReplay, read_plan
from surg_perception.replay.run import run_replay
from surg_perception.stream.phase_pipeline import PhasePipeline

MODEL = "gsvit_m0_phantom"
BAD, BLANK, FAULTY = 20, 30, 40
GREEN = np.full((240, 320, 3), (0, 255, 0), np.uint8)
GREEN[::2] = (0, 200, 0)  # not blank


@pytest.fixture(scope="module")
def bag(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 s of the phantom with an image cut off, a black one and a green one."""
    black = np.zeros((240, 320, 3), np.uint8)
    odd = {BAD: jpeg(black)[:60], BLANK: jpeg(black), FAULTY: jpeg(GREEN)}
    return write_phantom_bag(tmp_path_factory.mktemp("bags") / "recording", instead=odd)


@pytest.fixture
def green_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model fails on the green image."""
    infer = PhasePipeline._infer

    def failing(self: PhasePipeline, frame: np.ndarray) -> Any:
        if frame[..., 0].mean() < 30 and frame[..., 1].mean() > 150:
            raise RuntimeError("no green")
        return infer(self, frame)

    monkeypatch.setattr(PhasePipeline, "_infer", failing)


def lines_of(out: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


# What is written --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("green_fails")
def test_every_image_has_a_line_and_the_messages_of_the_live_node(bag: Path, tmp_path: Path) -> None:
    outcome = run_replay(bag, tmp_path / "out", model=MODEL)
    frames = lines_of(outcome.out, "frame")
    assert [frame["number"] for frame in frames] == list(range(60))
    assert [frame["stamp_ns"] for frame in frames] == [START_NS + round(n / RATE_HZ * 1e9) for n in range(60)]
    states = {frame["number"]: frame["state"] for frame in frames if frame["state"] not in ("OK", "UNCERTAIN")}
    assert states == {BAD: "REJECTED", BLANK: "NO_SIGNAL", FAULTY: "FAULT"}
    assert "no readable JPEG" in frames[BAD]["error"]
    assert frames[FAULTY]["error"] == "RuntimeError: no green"
    assert outcome.replayed.counts == {"images": 60, "processed": 58, "rejected": 1, "faults": 1}

    messages = messages_of(outcome.out / "bag")
    phases, latents = messages["/surg_perception/phase/phase"], messages["/surg_perception/phase/latent"]
    (labels,) = messages["/surg_perception/phase/labels"]
    card = find_model(MODEL)
    assert list(labels.labels) == list(card.labels.names)
    said = [frame for frame in frames if frame["state"] != "REJECTED"]
    assert [phase.header.stamp.sec * 10**9 + phase.header.stamp.nanosec for phase in phases] == [
        frame["stamp_ns"] for frame in said
    ]
    for phase, frame in zip(phases, said, strict=True):
        assert (phase.phase, phase.phase_id) == (frame["phase"], frame["phase_id"])
        assert phase.model_id == card.model_id
        assert phase.header.frame_id == "endoscope"
        assert phase.confidence == pytest.approx(frame["confidence"], abs=1e-6)
        assert phase.probabilities == pytest.approx(frame["probabilities"], abs=1e-6)
        assert phase.latency_ms == phase.wait_ms == phase.inference_ms == phase.decode_ms == phase.filter_ms == 0
    last = phases[-1]
    counts = (last.frames_received, last.frames_processed, last.frames_rejected, last.frames_replaced)
    assert counts == (60, 58, 2, 0)
    assert len(latents) == 57, "all but the refused, the blank and the failed one"
    assert list(latents[0].shape) == list(card.network.latent_shape)
    rms = float(np.sqrt(np.mean(np.square(latents[0].data, dtype=np.float64))))
    assert rms == pytest.approx(frames[0]["latent_rms"], abs=1e-5)


def test_log_times_are_the_images(bag: Path, tmp_path: Path) -> None:
    from rosbags.rosbag2 import Reader

    run_replay(bag, tmp_path / "out", model=MODEL)
    with Reader(tmp_path / "out" / "bag") as reader:
        times = [time for connection, time, _ in reader.messages() if connection.topic.endswith("/phase")]
    assert times[:2] == [START_NS + 10**6, START_NS + 200 * 10**6 + 10**6]


def test_problems_are_told_in_a_line_each(bag: Path, tmp_path: Path) -> None:
    outcome = run_replay(bag, tmp_path / "out", model=MODEL, assignments=["state.no_signal_after_s:=0.1"])
    told = {problem.kind: problem for problem in outcome.replayed.problems}
    assert "at 4.00 s" in told["corrupt"].text
    assert told["silence"].count == 59, "5 images a second, and NO_SIGNAL after 0.1 s"
    assert all("\n" not in problem.text for problem in told.values())
    assert [line["problem"] for line in lines_of(outcome.out, "problem")] == list(told)


def test_two_replays_write_the_same_bytes(bag: Path, tmp_path: Path) -> None:
    """In processes of their own: neither hash seeds nor what ran before may matter."""
    for name in ("first", "second"):
        command(bag, "--out", tmp_path / name, "--model", MODEL)
    files = {path.relative_to(tmp_path / "first") for path in (tmp_path / "first").rglob("*") if path.is_file()}
    assert {str(path) for path in files} == {"bag/bag_0.mcap", "bag/metadata.yaml", "results.jsonl", "phases.png"}
    for path in files:
        assert (tmp_path / "first" / path).read_bytes() == (tmp_path / "second" / path).read_bytes(), path


def test_a_former_replay_is_replaced_only_when_asked_and_nothing_else_is(bag: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_replay(bag, out, model=MODEL)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"is not empty .*--force"):
        run_replay(bag, out, model=MODEL)
    run_replay(bag, out, model=MODEL, force=True)
    assert (out / "notes.txt").read_text() == "mine"
    (out / "bag" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"thesis\.txt"):
        run_replay(bag, out, model=MODEL, force=True)
    assert (out / "bag" / "thesis.txt").exists()


def test_the_bag_that_is_replayed_is_never_replaced(tmp_path: Path) -> None:
    for bag in (tmp_path / "bag", tmp_path / "bag" / "bag_0.mcap"):
        if not bag.exists():
            write_phantom_bag(tmp_path / "bag", duration_s=1.0)
        with pytest.raises(ValueError, match=r"is the bag to be replayed"):
            run_replay(bag, tmp_path, model=MODEL, force=True)
        assert (tmp_path / "bag" / "bag_0.mcap").stat().st_size


def test_a_bag_without_a_usable_image_is_an_error(tmp_path: Path) -> None:
    broken = write_phantom_bag(tmp_path / "bag", duration_s=2.0, instead=dict.fromkeys(range(10), b"no jpeg"))
    golden = tmp_path / "golden.yaml"
    with pytest.raises(ValueError, match=r"none of the 10 images of .* has a phase: "):
        run_replay(broken, tmp_path / "out", model=MODEL, golden=golden, update=True)
    assert not golden.exists()
    with pytest.raises(BagError):
        run_replay(tmp_path / "nothing", tmp_path / "out2", model=MODEL)


def test_an_interrupted_replay_leaves_what_it_has(bag: Path, tmp_path: Path) -> None:
    done: list[int] = []
    outcome = run_replay(
        bag,
        tmp_path / "out",
        model=MODEL,
        progress=lambda n, total: done.append(total),
        stop=lambda: len(done) == 7,
    )
    assert outcome.status == 130
    assert done == [60] * 7
    assert len(messages_of(outcome.out / "bag")["/surg_perception/phase/phase"]) == 7
    assert lines_of(outcome.out, "end")[0]["interrupted"] is True


# Parameters -------------------------------------------------------------------------------------------------------


def test_parameters_act_as_on_the_node(bag: Path, tmp_path: Path) -> None:
    params = tmp_path / "params.yaml"
    params.write_text("/**:\n  ros__parameters:\n    latent: {pooled: true, max_rate_hz: 1.0}\n")
    outcome = run_replay(
        bag, tmp_path / "out", model=MODEL, params=[params], assignments=["state.uncertain_below:=1.0"]
    )
    latents = messages_of(outcome.out / "bag")["/surg_perception/phase/latent"]
    assert len(latents) == 12
    assert list(latents[0].shape) == [find_model(MODEL).network.latent_shape[0]]
    assert {frame.state for frame in outcome.replayed.frames} <= {"UNCERTAIN", "NO_SIGNAL", "REJECTED"}


def test_sections_of_a_parameter_file_count_as_in_ros(tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    file.write_text(
        yaml.safe_dump(
            {
                "/**": {"ros__parameters": {"input.max_pixels": 1000}},
                "/**/phase": {"ros__parameters": {"filter.hold_s": 1.5, "use_sim_time": True}},
                "/surg_perception/phase": {"ros__parameters": {"filter": {"switch_margin": 0.3}}},
                "/surg_perception": {"phase": {"ros__parameters": {"latent.pooled": True}}},
                "/*/phase": {"ros__parameters": {"filter.reset_gap_s": 7}},
                "/other/phase": {"ros__parameters": {"filter.hold_s": 9.0}},
                "phase": {"ros__parameters": {"filter.time_constant_s": 9.0}},
                "/**/vqa": {"ros__parameters": {"window.default_s": 4.0}},
            },
            sort_keys=False,
        )
    )
    changed = {
        "input.max_pixels": 1000,
        "filter.hold_s": 1.5,
        "filter.switch_margin": 0.3,
        "latent.pooled": True,
        "filter.reset_gap_s": 7.0,
    }
    values = node_values(PHASE, "surg_perception", [file])
    assert values == {**PHASE.defaults, **changed}
    assert isinstance(values["filter.reset_gap_s"], float)
    assert node_values(VQA, "surg_perception", [file])["window.default_s"] == 4.0
    assert node_values(PHASE, "", [file])["filter.time_constant_s"] == 9.0, "/phase"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["filter.hold:=1.0"], "did you mean 'filter.hold_s'"),
        (["filter.hold_s:=soon"], "expected float"),
        (["phase:filter.hold_s:=-1"], "expected 0 to 600"),
        (["gate:hold_s:=1"], "no node 'gate'"),
        (["filter.hold_s=1"], "expected NAME:=VALUE"),
        (["vqa:window.default_s:=100.0"], "expected at most buffer.length_s"),
    ],
)
def test_a_wrong_assignment_is_an_error(tmp_path: Path, given: list[str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        run_replay(tmp_path / "never read", tmp_path / "out", assignments=given)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("just text", "holds no parameters"),
        ("phase:\n  filter.hold_s: 1.0\n", "has no 'ros__parameters:'"),
        ("/**/phase:\n  ros__parameters:\n    filter.hold: 1.0\n", "did you mean 'filter.hold_s'"),
        ("a: [", "is no YAML"),
    ],
)
def test_a_wrong_parameter_file_is_an_error(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "params.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=says):
        run_replay(tmp_path / "never read", tmp_path / "out", params=[file])


# Questions --------------------------------------------------------------------------------------------------------


def test_questions_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "questions.yaml"
    file.write_text(
        '- {at: 12.5, ask: "What?", task: phase, window_s: 4}\n- {at: 3 s, ask: "Who?"}\n'
        '- {stamp: 5.25, ask: "Where?"}\n'
    )
    assert read_plan(file) == [
        PlannedQuestion("What?", 12.5, None, "phase", 4.0),
        PlannedQuestion("Who?", 3.0),
        PlannedQuestion("Where?", None, 5_250_000_000),
    ]


def test_the_questions_of_the_page_are_read(tmp_path: Path) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "replay.md").read_text()
    block = page.split("## Questions\n```yaml\n")[1].split("```")[0]
    (tmp_path / "questions.yaml").write_text(block)
    plan = read_plan(tmp_path / "questions.yaml")
    assert [question.at_s for question in plan] == [12.0, 47.5, None]
    assert plan[1].task == "triplet"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{}", "holds no list"),
        ("- {at: 1.0}", "question 1: 'ask' is None"),
        ("- {at: soon, ask: x}", "'at' is 'soon', expected seconds"),
        ("- {at: -1, ask: x}", "expected seconds from 0 up"),
        ("- {at: true, ask: x}", "expected seconds"),
        ("- {ask: x}", "either 'at'"),
        ("- {at: 1, stamp: 2, ask: x}", "either 'at'"),
        ("- {at: 1, ask: x, when: 2}", "has when, expected only"),
        ("- what", "question 1 is 'what'"),
    ],
)
def test_wrong_questions_are_an_error(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "questions.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=says):
        read_plan(file)


class CountingAssistant:
    """Answers with the brightness of the frames of the window, and counts what it encodes."""

    image_size, segment_frames, max_segments = 32, 4, 16
    model_id, backend, tasks = "counting@0", "none", ("phase", "caption")

    def __init__(self) -> None:
        self.encoded = 0

    def encode(self, frames: np.ndarray) -> list[int]:
        self.encoded += 1
        return [round(float(frame.mean())) for frame in frames]

    def ask(self, question: str, segments: Any, *, task: str = "", on_text: Any = None, stop: Any = None) -> Any:
        from surg_perception.surgllm.answering import Reply

        text = " ".join(str(value) for _, _, features in segments for value in features)
        return Reply(text, task or "phase", 1.0, "joint", 0.5, 1, 0.0, 0.0, True)


def grey(value: int) -> Any:
    """A CompressedImage-like message of one grey."""
    picture = np.full((32, 32, 3), value, np.uint8)
    return type("Message", (), {"format": "jpeg", "data": np.frombuffer(jpeg(picture), np.uint8)})()


def ask_all(plan: list[PlannedQuestion], seconds: range, **values: Any) -> tuple[QuestionReplay, CountingAssistant]:
    assistant = CountingAssistant()
    asked = QuestionReplay(plan, assistant, {**VQA.defaults, **values})
    for second in seconds:
        asked.take(grey(second), START_NS + second * 10**9, START_NS + second * 10**9 + 10**6)
    asked.end()
    return asked, assistant


def test_a_question_sees_the_images_up_to_its_time_and_none_after() -> None:
    plan = [PlannedQuestion("later?", 21.0), PlannedQuestion("now?", 8.0, window_s=4.0)]
    asked, _ = ask_all(plan, range(0, 40))
    first, second = asked.answers
    assert (first.question, first.answer, first.frames_used) == ("now?", "5 6 7 8", 4)
    assert first.last_stamp_ns == START_NS + 8 * 10**9
    assert second.answer == "14 15 16 17 18 19 20 21"


def test_refusals_have_the_codes_of_the_node() -> None:
    plan = [
        PlannedQuestion("What is the patient's name?", 4.0),
        PlannedQuestion("", 4.0),
        PlannedQuestion("What?", 4.0, task="nonsense"),
        PlannedQuestion("What?", 200.0),
    ]
    asked, _ = ask_all(plan, range(0, 8))
    assert [answer.error for answer in asked.answers] == ["DECLINED", "INVALID_QUESTION", "UNKNOWN_TASK", "NO_FRAMES"]
    assert all(answer.error_message and not answer.answer for answer in asked.answers)
    assert "64 s" in asked.answers[3].error_message


def test_segments_that_have_lost_an_image_are_left_out_as_by_a_node_that_keeps_up() -> None:
    plan = [PlannedQuestion("What?", 95.0, window_s=10.0)]
    asked, _ = ask_all(plan, range(0, 100), **{"buffer.length_s": 10.0})
    assert asked.answers[0].answer == "88 89 90 91 92 93 94 95", "86 and 87 are there, of a segment from 84 on"


def test_images_that_no_question_will_look_at_are_not_encoded() -> None:
    plan = [PlannedQuestion("What?", 95.0, window_s=4.0)]
    asked, assistant = ask_all(plan, range(0, 250), **{"buffer.length_s": 10.0})
    assert asked.answers[0].answer == "92 93 94 95"
    assert assistant.encoded == 11
    assert ask_all(plan, range(80, 96), **{"buffer.length_s": 10.0})[0].answers[0].error == "NO_FRAMES"


def test_what_fails_in_the_model_is_an_answer_with_internal() -> None:
    class Failing(CountingAssistant):
        def ask(self, *args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("out of memory")

    asked = QuestionReplay([PlannedQuestion("What?", 2.0)], Failing(), VQA.defaults)
    for second in range(4):
        asked.take(grey(second), second * 10**9 + 1, second * 10**9)
    assert asked.answers[0].error == "INTERNAL"
    assert "out of memory" in asked.answers[0].error_message


def test_questions_about_a_bag_are_answered_and_repeatable(bag: Path, tmp_path: Path, tiny_surgllm: Path) -> None:
    file = tmp_path / "questions.yaml"
    file.write_text(
        '- {at: 8, ask: "What is the surgical phase?"}\n- {at: 9, ask: "Will the patient survive?"}\n'
        '- {at: 10, ask: "What is the hook doing?", window_s: 4}\n'
    )
    outs = [tmp_path / name for name in ("first", "second")]
    golden = tmp_path / "golden.yaml"
    for out, update in zip(outs, (True, False), strict=True):
        outcome = run_replay(
            bag, out, model=MODEL, vqa_model=str(tiny_surgllm), questions=file, golden=golden, update=update
        )
    assert outcome.comparison is not None
    assert not outcome.comparison.differences
    assert [answer.error for answer in outcome.replayed.answers] == ["NONE", "DECLINED", "NONE"]
    assert outcome.replayed.answers[2].frames_used == 4
    told = messages_of(outs[0] / "bag")["/surg_perception/vqa/answered"]
    assert [message.error_code for message in told] == [0, 10, 0]
    assert [message.answer for message in told] == [answer.answer for answer in outcome.replayed.answers]
    for name in ("bag/bag_0.mcap", "results.jsonl"):
        assert (outs[0] / name).read_bytes() == (outs[1] / name).read_bytes()

    changed = replace(outcome.replayed.answers[0], answer="something else")
    outcome.replayed.answers[0] = changed
    from surg_perception.replay.golden import Golden

    (difference,) = Golden.read(golden).compare(outcome.replayed).differences
    assert difference.kind == "answer"
    assert "something else" in difference.text


# The command ------------------------------------------------------------------------------------------------------


def command(*arguments: Any, status: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "surg_perception.cli.main", "replay", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_command_and_its_exit_status(bag: Path, tmp_path: Path) -> None:
    golden = tmp_path / "golden.yaml"
    said = command(bag, "--out", tmp_path / "a", "--golden", golden, status=2)
    assert "there is no golden file" in said
    said = command(bag, "--out", tmp_path / "a", "--golden", golden, "--update")
    assert f"60 of {TOPIC}" in said
    assert "problem: 1 × images refused" in said
    assert "as in the golden file" in command(bag, "--out", tmp_path / "b", "--golden", golden)
    said = command(bag, "--out", tmp_path / "c", "--golden", golden, "-p", "filter.hold_s:=2.0", status=1)
    assert "not as in the golden file: " in said
    assert "phase: CalotTriangleDissection, golden " in said
    assert (tmp_path / "c" / "differences.txt").read_text().count("phase: ") > 0
    assert command(tmp_path / "nothing", "--out", tmp_path / "d", status=2).count("\n") == 1
    assert not (tmp_path / "d").exists()
    assert "--golden FILE" in command(bag, "--out", tmp_path / "d", "--update", status=2)


def test_ctrl_c_leaves_readable_results(tmp_path: Path) -> None:
    bag = write_phantom_bag(tmp_path / "bag", duration_s=100.0)
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "surg_perception.cli.main", "replay", str(bag), "--out", str(out), "--model", MODEL],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        while process.poll() is None and not (out / "bag").exists():
            pass
        os.kill(process.pid, signal.SIGINT)
        said, _ = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 130, said
    assert "interrupted" in said
    (end,) = lines_of(out, "end")
    assert end["interrupted"] is True
    assert end["images"] < 500
    found = messages_of(out / "bag") if end["images"] else {}
    assert len(found.get("/surg_perception/phase/phase", [])) == end["images"]
