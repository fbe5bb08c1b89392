# SPDX-License-Identifier: Apache-2.0
"""Questions at times of a bag, and their answers with the clip buffer and the model of the node `vqa`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from surg_perception.stream.clip_buffer import ClipBuffer, Window
from surg_perception.stream.image_decode import ImageError
from surg_perception.surgllm.question_check import QuestionRefused, check_question
from surg_perception.surgllm.window_answers import answer, check_task, refusal_of, span_of

_KEYS = ("at", "stamp", "ask", "task", "window_s")


@dataclass(frozen=True)
class PlannedQuestion:
    """A question of the file.

    Attributes:
        ask: its text.
        at_s: seconds after the first image's stamp at which it is asked; None where `stamp_ns` says it.
        stamp_ns: image stamp at which it is asked.
        task: one of the model's; "" leaves the choice to it.
        window_s: look back so many seconds; 0: as the parameter window.default_s says.
    """

    ask: str
    at_s: float | None = None
    stamp_ns: int | None = None
    task: str = ""
    window_s: float = 0.0

    def due_ns(self, first_ns: int) -> int:
        """Image stamp at which it is asked, in a bag whose first image is stamped first_ns."""
        if self.stamp_ns is not None:
            return self.stamp_ns
        return first_ns + round((self.at_s or 0.0) * 1e9)


@dataclass(frozen=True)
class AnsweredQuestion:
    """A question that has ended.

    Attributes:
        at_s: seconds after the first image's stamp at which it was asked.
        log_ns: log time of the newest image then.
        error: name of an error code of QuestionError.msg, "NONE" where it was answered.
        Others: as in QuestionAnswer.msg; stamps in nanoseconds.
    """

    at_s: float
    log_ns: int
    question: str
    asked_task: str
    error: str = "NONE"
    error_message: str = ""
    answer: str = ""
    task: str = ""
    task_probability: float = 0.0
    confidence: float = 0.0
    first_stamp_ns: int = 0
    last_stamp_ns: int = 0
    frames_used: int = 0
    model_id: str = ""
    backend: str = ""


def read_plan(path: Path) -> list[PlannedQuestion]:
    """Questions of a YAML file, a list of `at` (or `stamp`), `ask` and, if wanted, `task` and `window_s`.

    Raises:
        ValueError: what is wrong, and with which entry.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, list) or not content:
        raise ValueError(f"{path} holds no list of questions, expected entries such as '- {{at: 12.0, ask: \"…\"}}'")
    return [_planned(entry, f"{path}, question {number}") for number, entry in enumerate(content, 1)]


def _planned(entry: Any, where: str) -> PlannedQuestion:
    if not isinstance(entry, Mapping):
        raise ValueError(f"{where} is {entry!r}, expected 'at: SECONDS' and 'ask: TEXT'")
    if unknown := [str(key) for key in entry if key not in _KEYS]:
        raise ValueError(f"{where} has {', '.join(unknown)}, expected only {', '.join(_KEYS)}")
    if ("at" in entry) == ("stamp" in entry):
        raise ValueError(f"{where} needs either 'at' (seconds after the first image) or 'stamp' (an image's stamp)")
    text, task = entry.get("ask"), entry.get("task") or ""
    if not isinstance(text, str) or not isinstance(task, str):
        raise ValueError(f"{where}: 'ask' is {text!r} and 'task' {task!r}, expected text")
    at_s = _seconds(entry["at"], "at", where) if "at" in entry else None
    stamp_ns = round(_seconds(entry["stamp"], "stamp", where) * 1e9) if "stamp" in entry else None
    return PlannedQuestion(text, at_s, stamp_ns, task, _seconds(entry.get("window_s", 0.0), "window_s", where))


def _seconds(value: Any, key: str, where: str) -> float:
    text = value.removesuffix("s").strip() if isinstance(value, str) else value
    try:
        seconds = math.nan if isinstance(text, bool) else float(text)
    except (TypeError, ValueError):
        seconds = math.nan
    if not 0.0 <= seconds < math.inf:
        raise ValueError(f"{where}: '{key}' is {value!r}, expected seconds from 0 up, such as 12.0 or '12.0 s'")
    return seconds


class QuestionReplay:
    """Takes the images of a bag, and answers its questions where their times come.

    Every image is encoded when it is kept, as by a node that keeps up, so that an answer rests on the images alone.
    Where no question will look at an image any more, it is not encoded.

    Args:
        plan: the questions, in any order.
        assistant: `surgllm.answering.Assistant`.
        values: parameters of the node `vqa`; those of queue, deadline, threads and cores have no effect here.

    Raises:
        ValueError: the buffer would be shorter than a segment.
    """

    def __init__(self, plan: Sequence[PlannedQuestion], assistant: Any, values: Mapping[str, Any]) -> None:
        self.answers: list[AnsweredQuestion] = []
        self._plan = list(plan)
        self._open: list[tuple[int, PlannedQuestion]] = []
        self._assistant = assistant
        self._default_s, self._length_s = values["window.default_s"], values["buffer.length_s"]
        self._buffer: ClipBuffer[Any] = ClipBuffer(
            assistant.encode,
            size=assistant.image_size,
            rate_hz=values["buffer.rate_hz"],
            length_s=self._length_s,
            segment_frames=assistant.segment_frames,
            max_segments=assistant.max_segments,
            max_pixels=values["input.max_pixels"],
        )
        self._first_ns: int | None = None
        self._log_ns = 0
        self._encode_fault = self._refused_because = ""

    def take(self, message: Any, stamp_ns: int, log_ns: int) -> list[AnsweredQuestion]:
        """Take the next image of the bag; returns the answers to questions whose time came before it."""
        if self._first_ns is None:
            self._first_ns, self._log_ns = stamp_ns, log_ns
            due = [(question.due_ns(stamp_ns), question) for question in self._plan]
            self._open = sorted(due, key=lambda entry: entry[0])
        came = self._answer_until(stamp_ns)
        if not self._open:
            return came
        self._log_ns = log_ns
        try:
            if self._buffer.offer(message, stamp_ns, arrived_s=log_ns * 1e-9):
                self._refused_because = ""
                if stamp_ns >= self._open[0][0] - self._length_s * 1e9:
                    self._encode_next()
        except ImageError as error:
            self._refused_because = str(error)
        return came

    def end(self) -> list[AnsweredQuestion]:
        """The bag has ended; returns the answers to the questions that are left."""
        return [] if self._first_ns is None else self._answer_until(None)

    def _encode_next(self) -> bool:
        try:
            if not self._buffer.encode_next():
                return False
        except Exception as error:
            self._encode_fault = f"{type(error).__name__}: {error}"
            return True
        self._encode_fault = ""
        return True

    def _answer_until(self, stamp_ns: int | None) -> list[AnsweredQuestion]:
        came = []
        while self._open and (stamp_ns is None or self._open[0][0] < stamp_ns):
            due_ns, question = self._open.pop(0)
            came.append(self._answer(question, due_ns))
        self.answers += came
        return came

    def _answer(self, question: PlannedQuestion, due_ns: int) -> AnsweredQuestion:
        assert self._first_ns is not None
        at_s = (due_ns - self._first_ns) * 1e-9
        found = AnsweredQuestion(at_s, self._log_ns, question.ask, question.task)
        windows: list[Window[Any]] = []
        try:
            check_question(question.ask)
            newest_ns = self._buffer.newest_ns
            if newest_ns is not None:
                # The node forgets by its clock, which goes on where images do not.
                self._buffer.expire((self._log_ns + max(0, due_ns - newest_ns)) * 1e-9)
            check_task(question.task, self._assistant.tasks)
            span = span_of(self._buffer, self._default_s, question.window_s)
            while self._encode_next():
                pass
            reply = answer(self._assistant, self._buffer, question.ask, question.task, span, on_window=windows.append)
            found = replace(
                found,
                answer=reply.text,
                task=reply.task,
                task_probability=reply.task_probability,
                confidence=reply.confidence,
            )
        except Exception as error:
            refusal = refusal_of(error, self._encode_fault)
            if refusal is None:
                refusal = QuestionRefused("INTERNAL", f"{type(error).__name__}: {error}")
            reason = str(refusal)
            if refusal.code_name == "NO_FRAMES":
                reason = f"no image in the last {self._length_s:g} s"
                reason += f": the last one was refused: {self._refused_because}" if self._refused_because else ""
            found = replace(found, error=refusal.code_name, error_message=reason)
        if windows:
            found = replace(
                found,
                first_stamp_ns=windows[0].first_ns,
                last_stamp_ns=windows[0].last_ns,
                frames_used=windows[0].frames,
                model_id=self._assistant.model_id,
                backend=self._assistant.backend,
            )
        return found
