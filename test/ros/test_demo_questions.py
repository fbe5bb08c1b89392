# SPDX-License-Identifier: Apache-2.0
"""The demo's questions: which are asked, which frames and truths they have, and what is shown of them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

pytest.importorskip("rclpy", reason="ROS 2 is not in the environment: `source setup.bash` first")

from builtin_interfaces.msg import Time
from conftest import Graph, wait_until
from rich.console import Console
from surg_perception_msgs.msg import QuestionError
from surg_perception_msgs.srv import Ask

from surg_perception.data.frames import SourceFrame
from surg_perception.data.labels import CHOLECT50_INSTRUMENTS, CHOLECT50_TARGETS, CHOLECT50_VERBS
from surg_perception.data.phantom import FrameLabels, InstrumentLabel, Phantom
from surg_perception.nodes import demo_questions
from surg_perception.nodes.demo_questions import DemoQuestions, choose, facts_of, frame_numbers, plot_questions, report
from surg_perception.nodes.monitor import Record

S = 10**9
START_NS = 1_700_000_000 * S
DURATION_S = 35.0


def tool(name: str, verb: str, target: str, left: float = 0.1) -> InstrumentLabel:
    numbers = CHOLECT50_INSTRUMENTS.index(name), CHOLECT50_VERBS.index(verb), CHOLECT50_TARGETS.index(target)
    return InstrumentLabel(numbers[0], (left, 0.4, 0.1, 0.1), *numbers[1:])


HOOK = tool("hook", "dissect", "gallbladder", 0.8)
IDLE = tool("grasper", "null_verb", "null_target")


def moment(*tools: InstrumentLabel, phase: int = 3) -> FrameLabels:
    return FrameLabels(0, 0.0, phase, tools)


@pytest.fixture(scope="module")
def patient() -> Phantom:
    return Phantom(duration_s=DURATION_S)


def seen(patient: Phantom, numbers: range, late: dict[int, int] | None = None) -> Record:
    """What the monitor has of these frames; from the frames in `late` on, stamps are so many ns later."""
    record = Record()
    ids = {n: next(i for a, b, i in patient.phases if a <= n / patient.rate_hz < b) for n in numbers}
    for n in numbers:
        shift_ns = sum(ns for first, ns in (late or {}).items() if n >= first)
        record.truth[START_NS + n * S // 25 + shift_ns] = ids[n]
    return record


def test_the_truth_is_that_of_the_last_frame_of_the_window() -> None:
    facts = facts_of([moment(HOOK), moment(HOOK, phase=2), moment(tool("hook", "cut", "cystic_duct"), phase=3)])
    assert facts["doing", "hook"].question == "What is the hook doing?"
    assert facts["doing", "hook"].answer == "cutting the cystic duct"
    assert facts["phase", ""].answer == "gallbladder dissection"
    assert facts["where", "hook"].answer == "left"


def test_only_what_has_a_truth_throughout_is_asked_and_rather_about_an_action() -> None:
    assert choose("doing", [moment(IDLE, HOOK), moment(IDLE, HOOK)]) == ("What is the hook doing?", "hook")
    assert choose("doing", [moment(IDLE, HOOK), moment(IDLE)]) == ("What is the grasper doing?", "grasper")
    assert choose("where", [moment(IDLE, tool("grasper", "retract", "liver", 0.6)), moment(IDLE)]) is None
    assert choose("phase", [moment(), moment()]) == ("What is the surgical phase?", "")


def test_frames_are_counted_though_the_source_was_late_and_the_first_truths_were_lost(patient: Phantom) -> None:
    record = seen(patient, range(7, len(patient)), late={100: 90_000_000, 400: 3 * S})
    record.published = [(START_NS + 60 * S, len(patient))]
    stamps, numbers, exact = frame_numbers(record, patient)
    assert exact
    assert numbers[np.searchsorted(stamps, START_NS + 500 * S // 25 + 90_000_000 + 3 * S)] == 500
    assert numbers[0] == 7


def test_a_truth_lost_on_the_way_makes_the_numbers_inexact(patient: Phantom) -> None:
    record = seen(patient, range(len(patient)))
    del record.truth[START_NS + 200 * S // 25]
    record.published = [(START_NS + 10 * S, 251), (START_NS + 35 * S, len(patient))]
    stamps, numbers, exact = frame_numbers(record, patient)
    assert not exact
    assert np.interp(START_NS + 10 * S, stamps, numbers) == 250


class Answerer:
    """The service `ask`: first not available, then the answers given, about the last two seconds."""

    def __init__(self, graph: Graph, answers: list[str], unavailable: int = 1) -> None:
        self.questions: list[str] = []
        self.last_ns = 0
        self._answers, self._unavailable = answers, unavailable
        graph.client.create_service(Ask, "ask", self._answer)

    def _answer(self, request: Ask.Request, response: Ask.Response) -> Ask.Response:
        self.questions.append(request.question)
        if len(self.questions) <= self._unavailable:
            response.error_code = QuestionError.NOT_AVAILABLE
            response.error_message = "there is no model: fetch it. After that: cleanup"
            return response
        response.answer = self._answers.pop(0)
        response.task, response.frames_used, response.total_ms = "any", 3, 120.0
        for name, ns in (("first_stamp", self.last_ns - 2 * S), ("last_stamp", self.last_ns)):
            setattr(response, name, Time(sec=ns // S, nanosec=ns % S))
        return response


def printed(view: Any) -> str:
    text = io.StringIO()
    Console(width=220, file=text).print(view)
    return text.getvalue()


def asked_at(asking: DemoQuestions, answerer: Answerer, record: Record, patient: Phantom, second: float) -> None:
    """Let the run reach this second, and wait until the question that is due then is answered."""
    count = len(asking.asked)
    record.truth = seen(patient, range(round(second * 25) + 1)).truth
    answerer.last_ns = max(record.truth)

    def step() -> bool:
        asking.step(second, 0.0)
        return len(asking.asked) > count

    wait_until(step, 120.0, f"the question at {second} s")


def test_questions_are_asked_when_due_and_shown_with_frames_and_truth(
    domain: int, patient: Phantom, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_questions, "RETRY_S", 0.0)
    graph = Graph(domain)
    try:
        record = Record()
        answerer = Answerer(graph, ["Retracting gallbladder.", "nowhere", "gallbladder dissection"])
        asking = DemoQuestions(graph.client, record, "phantom", DURATION_S)
        wait_until(asking._client.service_is_ready, 120.0, "the service")
        asking.step(11.9, 0.0)
        assert not answerer.questions
        # At second 12 of this patient a grasper retracts the gallbladder; the hook came less than 1.5 s before.
        for second in (12.2, 20.2, 28.0):
            asked_at(asking, answerer, record, patient, second)
        asking.step(40.0, 5.0)
        assert len(answerer.questions) == 4
        record.truth = seen(patient, range(len(patient))).truth
        record.published = [(max(record.truth), len(patient))]
        view, files = asking.finish(tmp_path)
    finally:
        graph.close()

    result = json.loads((tmp_path / "questions.json").read_text())
    assert [name for name, _ in files] == ["questions", "their frames"]
    doing, where, phase = result["questions"]
    for row, second in ((doing, 12.2), (where, 20.2), (phase, 28.0)):
        assert row["frames_s"] == pytest.approx([second - 2, second - 1, second], abs=0.021)
        number = round(row["frames_s"][-1] * 25)
        truths = {fact.question: fact.answer for fact in facts_of([patient.labels(number)]).values()}
        assert row["truth"] == truths[row["question"]]
    assert (where["right"], phase["right"]) == (False, True)
    assert (doing["question"], doing["right"]) == ("What is the grasper doing?", True)
    text = printed(view)
    assert "nowhere" in text
    assert phase["truth"] in text
    assert "nothing here says how well it answers about a person" in text


@pytest.mark.parametrize("trouble", ["there is no model: fetch it. After that: cleanup", ""])
def test_without_an_answer_one_line_says_why(trouble: str) -> None:
    text = printed(report([], 3, trouble))
    assert "no question was answered" in text
    assert ("fetch it. Afterwards" in text) if trouble else ("the images ended" in text)
    assert "cleanup" not in text
    assert len(text.splitlines()) == 1


def test_pictures_keep_their_colours(tmp_path: Path) -> None:
    blue = np.full((48, 80, 3), (200, 40, 10), np.uint8)
    row = dict.fromkeys(("question", "answer", "task", "error"), "x") | {"right": None, "truth": None}
    row |= {"asked_s": 1.0, "total_ms": 2.0}
    plot_questions(tmp_path / "q.png", [row], [[SourceFrame(0, 0.0, blue)]])
    picture = cv2.imread(str(tmp_path / "q.png"))
    assert (picture == blue[0, 0]).all(axis=2).sum() > 20_000


def test_of_a_video_the_frames_are_found_by_what_the_source_counted(domain: int, tmp_path: Path) -> None:
    for n in range(40):
        cv2.imwrite(str(tmp_path / f"{n:03d}.png"), np.full((24, 32, 3), 5 * n, np.uint8))
    record = Record(stamp_ns=[START_NS], published=[(START_NS + n * S, n + 1) for n in range(1, 40)])
    graph = Graph(domain)
    try:
        answerer = Answerer(graph, ["a", "b", "c"], unavailable=0)
        answerer.last_ns = START_NS + 30 * S
        asking = DemoQuestions(graph.client, record, str(tmp_path), DURATION_S)
        wait_until(asking._client.service_is_ready, 120.0, "the service")

        def step() -> bool:
            asking.step(5.0, 1.0)  # the pictures ended early: everything is due
            return len(asking.asked) == 3

        wait_until(step, 120.0, "the answers")
        frames = [int(frame.bgr[0, 0, 0]) for frame in asking._results()[1][0]]
        view, _ = asking.finish(tmp_path / "out")
    finally:
        graph.close()
    assert answerer.questions == ["What is the hook doing?", "Where is the grasper?", "What is the surgical phase?"]
    assert frames == [5 * 28, 5 * 29, 5 * 30]
    assert "unknown" in printed(view)
