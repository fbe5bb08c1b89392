# SPDX-License-Identifier: Apache-2.0
"""The demo's three questions to node `vqa`: asked during the run, shown afterwards with their frames and the truth."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from numpy.typing import NDArray
from rclpy.node import Node
from rich.console import Group
from rich.table import Table
from rich.text import Text
from surg_perception_msgs.msg import QuestionError
from surg_perception_msgs.srv import Ask

from surg_perception.data.clip_labels import ClipVideo, InstrumentState, SecondLabels
from surg_perception.data.frame_readers import NoFrames
from surg_perception.data.frames import SourceFrame, open_source
from surg_perception.data.labels import (
    CHOLEC80_PHASES,
    CHOLECT50_INSTRUMENTS,
    CHOLECT50_TARGETS,
    CHOLECT50_VERBS,
)
from surg_perception.data.phantom import FrameLabels, Phantom
from surg_perception.nodes.question_worker import CODE_NAMES
from surg_perception.surgllm import questions
from surg_perception.surgllm.text_metrics import score_answer

if TYPE_CHECKING:
    from surg_perception.nodes.monitor import Record

PLAN = ((12.0, "doing", "hook"), (20.0, "where", "grasper"), (28.0, "phase", ""))
"""Seconds of video after which to ask, type of question, and what about where there are no labels to choose by."""

LOOK_BACK_S = 1.5
"""The newest frame that an answer uses is about this much older than the newest image, at most."""

RETRY_S = 1.0
CHOOSE_AGAIN_S = 0.3
SILENT_S = 0.7
ANSWER_LIMIT_S = 15.0
NOT_YET = (QuestionError.NOT_ACTIVE, QuestionError.NOT_AVAILABLE, QuestionError.NO_FRAMES, QuestionError.BUSY)
NO_PERSON = (
    "The model that answers was trained on the procedural phantom too: nothing here says how well it answers about a "
    "person."
)
PICTURE_WIDTH = 360


@dataclass(frozen=True)
class Fact:
    """A question that labels answer; `kind` as in `questions.Sample`."""

    question: str
    kind: str
    answer: str


@dataclass(frozen=True)
class Asked:
    """A question that was answered, or ended with an error code.

    Attributes:
        at_s: seconds after the first image at which it was asked.
        fact: (type, subject) of the rule that gives its truth.
    """

    at_s: float
    question: str
    fact: tuple[str, str]
    reply: Ask.Response


def facts_of(window: Sequence[FrameLabels]) -> dict[tuple[str, str], Fact]:
    """What the rules of `surgllm.questions` ask about a window of phantom frames, by (type, subject)."""
    seconds = tuple(_second(frame) for frame in window)
    clip = ClipVideo("phantom", "phantom", seconds, CHOLECT50_INSTRUMENTS, 1, NoFrames("labels alone"), ())
    return {
        (f.type, f.subject): Fact(wording(f.type, f.words), _kind(f.type), f.answer) for f in questions.facts_of(clip)
    }


def wording(type_name: str, words: Mapping[str, str]) -> str:
    """The first wording of a type of question."""
    return questions.QUESTION_TYPES[type_name].templates[0].format_map(words)


def choose(type_name: str, moments: Sequence[FrameLabels]) -> tuple[str, str] | None:
    """(question, subject) of a type that has a truth at each of the moments; one with an action, where there is one."""
    each = [facts_of([moment]) for moment in moments]
    shared = [key for key in each[0] if key[0] == type_name and all(key in facts for facts in each)]
    if not shared:
        return None
    key = min(shared, key=lambda key: sum(facts[key].answer == "nothing" for facts in each))
    return each[0][key].question, key[1]


def frame_numbers(record: Record, patient: Phantom | None) -> tuple[NDArray[np.int64], NDArray[np.float64], bool]:
    """Stamps in ns and the numbers of the source's frames at them, both ascending [n]; whether they are exact.

    The phantom publishes a truth with each frame, so that they count the frames. That none is missing is seen from
    their phases, which must change where the phantom's do. Else (and for a video) what the source says of its count
    once a second gives the number to about a frame.
    """
    stamps = np.array(sorted(record.truth), np.int64)
    published = record.published[-1][1] if record.published else len(stamps)
    if patient is not None and len(stamps):
        said = np.array([record.truth[stamp] for stamp in stamps.tolist()])
        starts_s = [start_s for start_s, _, _ in patient.phases]
        ids = np.array([phase for _, _, phase in patient.phases])
        # The first ones can be lost, while the two are still finding each other.
        for first in dict.fromkeys((0, max(0, published - len(stamps)))):
            numbers = np.arange(first, first + len(stamps))
            if np.array_equal(ids[np.searchsorted(starts_s, numbers / patient.rate_hz, side="right") - 1], said):
                return stamps, numbers.astype(float), True
    counted = [(stamp, count - 1) for stamp, count in record.published]
    if record.stamp_ns and (not counted or record.stamp_ns[0] < counted[0][0]):
        counted.insert(0, (record.stamp_ns[0], 0))
    return np.array([s for s, _ in counted], np.int64), np.array([n for _, n in counted], float), False


class DemoQuestions:
    """Asks the questions of PLAN, each as soon as it is due and the model is there; never more than one at a time.

    Args:
        node: for the client; who spins it calls `step`.
        record: what the monitor has seen so far.
        source: "phantom", or a video file or folder of images.
        duration_s: of the phantom's procedure.
    """

    def __init__(self, node: Node, record: Record, source: str, duration_s: float) -> None:
        self.asked: list[Asked] = []
        self.trouble = ""
        """Why the newest attempt got no answer; empty if it got one."""
        self._record = record
        self._source = source
        self._patient = Phantom(duration_s=duration_s) if source == "phantom" else None
        # Choosing needs no more than small masks; the truth is taken from the frames as published.
        self._small = Phantom(214, 120, duration_s=duration_s) if source == "phantom" else None
        self._client = node.create_client(Ask, "ask")
        self._open = list(PLAN)
        self._future: Any = None
        self._under_way: tuple[float, str, tuple[str, str], tuple[float, str, str]] | None = None
        self._sent_s = 0.0
        self._next_s = 0.0

    def step(self, elapsed_s: float, silent_s: float) -> None:
        """Take an answer that came, else ask what is due.

        Args:
            elapsed_s: time since the first image.
            silent_s: time since the newest one; at the end of the video all that is left is due.
        """
        now_s = time.monotonic()
        if self._future is not None:
            if self._future.done():
                self._take(self._future.result())
                self._future = None
            elif now_s - self._sent_s > ANSWER_LIMIT_S:
                self.trouble = f"{self._client.srv_name} gave no answer within {ANSWER_LIMIT_S:g} s (see launch.log)"
                self._client.remove_pending_request(self._future)
                self._future = None
            return
        if now_s < self._next_s:
            return
        due = [entry for entry in self._open if elapsed_s >= entry[0] or silent_s > SILENT_S]
        if due:
            self._next_s = now_s + CHOOSE_AGAIN_S
        for entry in due:
            _, type_name, subject = entry
            if (chosen := self._choose(type_name, subject)) is not None:
                self._next_s = now_s + RETRY_S
                self._send(chosen[0], elapsed_s, (type_name, chosen[1]), entry)
                return

    def _choose(self, type_name: str, subject: str) -> tuple[str, str] | None:
        if self._small is None:
            return wording(type_name, {"is": "is", "does": "does", "x": subject}), subject
        newest, step = len(self._record.truth) - 1, round(self._small.rate_hz * 0.5)
        back = round(LOOK_BACK_S * self._small.rate_hz)
        if newest < back:
            return None
        return choose(type_name, [self._small.labels(n) for n in range(newest - back, newest + 1, step)])

    def _send(self, question: str, at_s: float, fact: tuple[str, str], entry: Any) -> None:
        if not self._client.service_is_ready():
            self.trouble = f"there is no service {self._client.srv_name}: launch.log says why the node vqa is not there"
            return
        self._under_way = (at_s, question, fact, entry)
        self._sent_s = time.monotonic()
        self._future = self._client.call_async(Ask.Request(question=question))

    def _take(self, reply: Ask.Response) -> None:
        at_s, question, fact, entry = self._under_way
        if reply.error_code in NOT_YET:
            self.trouble = reply.error_message
            return
        self.trouble = ""
        self._next_s = 0.0
        self._open.remove(entry)
        self.asked.append(Asked(at_s, question, fact, reply))

    # Afterwards -----------------------------------------------------------------------------------------------------

    def finish(self, folder: Path) -> tuple[Group | Text, list[tuple[str, Path]]]:
        """Write questions.json and questions.png; gives what to print and the files. No picture without an answer."""
        folder.mkdir(parents=True, exist_ok=True)
        if self._future is not None:
            self.trouble = self.trouble or "an answer was still under way when the demo ended"
        rows, strips = self._results()
        result = {"source": self._source, "questions": rows, "not_asked": len(self._open), "trouble": self.trouble}
        (folder / "questions.json").write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
        files = [("questions", folder / "questions.json")]
        if rows:
            plot_questions(folder / "questions.png", rows, strips)
            files.append(("their frames", folder / "questions.png"))
        return report(rows, len(self._open), self.trouble), files

    def _results(self) -> tuple[list[dict[str, Any]], list[list[SourceFrame]]]:
        stamps, numbers, exact = frame_numbers(self._record, self._patient)
        used = [_used(asked.reply, stamps, numbers) for asked in self.asked]
        frames = self._read({number for one in used for number in one})
        rows, strips = [], []
        for asked, wanted in zip(self.asked, used, strict=True):
            strip = [frames[number] for number in wanted if number in frames]
            truth = None
            if exact and strip:
                truth = facts_of([frame.labels for frame in strip]).get(asked.fact)
            rows.append(_row(asked, truth, strip))
            strips.append(strip)
        return rows, strips

    def _read(self, wanted: Collection[int]) -> dict[int, SourceFrame]:
        """The source's frames with these numbers."""
        if not wanted:
            return {}
        if self._patient is not None:
            made = {n: self._patient.frame(n) for n in sorted(wanted) if n < len(self._patient)}
            return {n: SourceFrame(n, self._patient.time_s(n), *frame) for n, frame in made.items()}
        found = {}
        with open_source(self._source) as source:
            for frame in source:
                if frame.index in wanted:
                    found[frame.index] = frame
                if frame.index >= max(wanted):
                    break
        return found


def report(rows: Sequence[Mapping[str, Any]], not_asked: int, trouble: str) -> Group | Text:
    """Questions and answers for people; one line where there is none."""
    again = 'Afterwards run the demo again, or ask a pipeline that is up: surg-perception ask "…"'
    if not rows:
        # The way back of a pipeline that stays up is of no use here.
        reason = trouble.partition(". After that: ")[0] or "the images ended before the first one was due"
        return Text(f"no question was answered: {reason}. {again}", style="yellow")
    view = Table(title="questions", title_justify="left")
    for name in ("at", "question", "answer", "truth", "", "task"):
        view.add_column(name)
    view.add_column("first token / total", justify="right")
    view.add_column("frames", justify="right")
    for row in rows:
        mark = {True: Text("✓", style="green"), False: Text("✗", style="red"), None: Text("")}[row["right"]]
        view.add_row(
            f"{row['asked_s']:.1f} s",
            row["question"],
            Text(_answer(row)),
            row["truth"] or "unknown",
            mark,
            row["task"],
            f"{row['first_token_ms']:.0f} / {row['total_ms']:.0f} ms",
            f"{row['frames_used']}",
        )
    lines: list[Any] = [view]
    if not_asked:
        lines.append(
            Text(f"{not_asked} of {len(PLAN)} questions had no answer: {trouble or 'the images ended before'}")
        )
    if any(row["truth"] is None for row in rows):
        lines.append("Truth unknown: nobody labelled these frames for that question.")
    lines.append(NO_PERSON)
    return Group(*lines)


def plot_questions(
    path: Path, rows: Sequence[Mapping[str, Any]], strips: Sequence[Sequence[SourceFrame]], *, dpi: int = 110
) -> None:
    """Save a PNG: per question its words, answer, truth and mark above the frames that the answer used."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = max([4, *map(len, strips)])
    width_in, text_in = 16.0, 1.05
    pictures_in = [
        width_in / columns * strip[0].bgr.shape[0] / strip[0].bgr.shape[1] + 0.25 if strip else 0.2 for strip in strips
    ]
    height_in = sum(pictures_in) + text_in * len(rows) + 0.4
    fig = Figure(figsize=(width_in, height_in), dpi=dpi)
    FigureCanvasAgg(fig)
    fig.set_facecolor("white")
    top_in = 0.0

    def write(x: float, y_in: float, text: str, **style: Any) -> None:
        fig.text(x, 1 - (top_in + y_in) / height_in, text, va="center", **style)

    for row, strip, picture_in in zip(rows, strips, pictures_in, strict=True):
        colour = {True: "#1a7f37", False: "#cf222e", None: "#57606a"}[row["right"]]
        mark = {True: "✓ ", False: "✗ ", None: ""}[row["right"]]
        write(0.008, 0.32, row["question"], fontsize=17, fontweight="bold", color="#24292f")
        facts = f"asked at {row['asked_s']:.1f} s · {row['task'] or 'no task'} · {row['total_ms']:.0f} ms"
        write(0.992, 0.32, facts, fontsize=12, color="#57606a", ha="right")
        write(0.008, 0.68, f"{mark}{_answer(row)}", fontsize=16, fontweight="bold", color=colour)
        write(0.992, 0.68, f"truth: {row['truth'] or 'unknown'}", fontsize=15, color="#24292f", ha="right")
        top_in += text_in
        for column, frame in enumerate(strip):
            left, bottom = column / columns, 1 - (top_in + picture_in) / height_in
            ax = fig.add_axes((left + 0.0015, bottom, 1 / columns - 0.003, (picture_in - 0.25) / height_in))
            height = round(PICTURE_WIDTH * frame.bgr.shape[0] / frame.bgr.shape[1])
            small = cv2.resize(frame.bgr, (PICTURE_WIDTH, height), interpolation=cv2.INTER_AREA)
            ax.imshow(cv2.cvtColor(small, cv2.COLOR_BGR2RGB), aspect="auto")
            ax.set_title(f"{frame.time_s:.1f} s", fontsize=10, color="#57606a", pad=3)
            ax.set_xticks([])
            ax.set_yticks([])
            for spine in ax.spines.values():
                spine.set(color=colour, linewidth=3.0, visible=column == len(strip) - 1)
        top_in += picture_in
    note = f"Framed: the moment that the question is about. {NO_PERSON}"
    fig.text(0.008, 0.17 / height_in, note, va="center", fontsize=10.5, color="#57606a")
    fig.savefig(path, format="png", dpi=dpi)


def _row(asked: Asked, truth: Fact | None, strip: Sequence[SourceFrame]) -> dict[str, Any]:
    reply = asked.reply
    right = None if truth is None else score_answer(truth.kind, reply.answer, truth.answer) == 1.0
    return {
        "asked_s": round(asked.at_s, 2),
        "question": asked.question,
        "answer": reply.answer,
        "truth": truth.answer if truth is not None else None,
        "right": right,
        "task": reply.task,
        "task_probability": round(reply.task_probability, 3),
        "confidence": round(reply.confidence, 3),
        "first_token_ms": round(reply.first_token_ms, 1),
        "total_ms": round(reply.total_ms, 1),
        "frames_used": reply.frames_used,
        "frames_s": [round(frame.time_s, 3) for frame in strip],
        "error": CODE_NAMES[reply.error_code] if reply.error_code else "",
        "model_id": reply.model_id,
    }


def _answer(row: Mapping[str, Any]) -> str:
    return row["answer"] + (f" ({row['error']})" if row["error"] else "") or "(nothing)"


def _used(reply: Ask.Response, stamps: NDArray[np.int64], numbers: NDArray[np.float64]) -> list[int]:
    """Numbers of the frames that an answer used: they lie evenly between its two stamps."""
    if not reply.frames_used or not len(stamps):
        return []
    first_ns, last_ns = (stamp.sec * 10**9 + stamp.nanosec for stamp in (reply.first_stamp, reply.last_stamp))
    # Relative to the first: nanoseconds since 1970 are too many for a float.
    times_ns = np.linspace(first_ns - stamps[0], last_ns - stamps[0], reply.frames_used)
    return np.rint(np.interp(times_ns, stamps - stamps[0], numbers)).astype(int).tolist()


def _second(frame: FrameLabels) -> SecondLabels:
    states = tuple(
        InstrumentState(
            CHOLECT50_INSTRUMENTS[i.instrument], CHOLECT50_VERBS[i.verb], CHOLECT50_TARGETS[i.target], i.box
        )
        for i in frame.instruments
    )
    return SecondLabels(CHOLEC80_PHASES[frame.phase], states)


def _kind(type_name: str) -> str:
    return questions.QUESTION_TYPES[type_name].kind
