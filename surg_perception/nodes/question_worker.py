# SPDX-License-Identifier: Apache-2.0
"""A question under way, and the thread that owns the model: it loads it, encodes frames and answers."""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from rclpy.task import Future
from surg_perception_msgs.msg import QuestionError

from surg_perception.stream.clip_buffer import ClipBuffer, NoFrames, Window
from surg_perception.stream.stage_clock import StageClock
from surg_perception.surgllm.window_answers import answer, refusal_of

THREAD_NAME = "vqa model"
CODE_NAMES = {
    getattr(QuestionError, name): name
    for name in dir(QuestionError)
    if name.isupper() and isinstance(getattr(QuestionError, name), int)
}
"""Error code to its name in QuestionError.msg."""


@dataclass
class Outcome:
    """What is known of the answer, in the fields of Ask.srv and Answer.action; stamps in nanoseconds."""

    error_code: int = QuestionError.NONE
    error_message: str = ""
    answer: str = ""
    task: str = ""
    task_probability: float = 0.0
    confidence: float = 0.0
    first_ns: int = 0
    last_ns: int = 0
    frames_used: int = 0
    first_token_ms: float = 0.0
    total_ms: float = 0.0
    model_id: str = ""
    backend: str = ""


class Question:
    """One question from its reception to its end. Whoever ends it first decides how; later ends change nothing.

    Args:
        text, task: as asked; task "" leaves the choice to the model.
        on_text: called with the answer so far after each token, in the worker's thread.
        on_end: called once when it is over, in the thread that ended it.

    Attributes:
        span: stamps of the first and the last image it is about, in nanoseconds.
        deadline_s: when it must be over, by time.monotonic().
        done: completed when it is over.
    """

    def __init__(
        self,
        text: str,
        task: str,
        on_text: Callable[[str], None] = lambda text: None,
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        self.text, self.task = text, task
        self.span = (0, 0)
        self.deadline_s = float("inf")
        self.outcome = Outcome()
        self.done = Future()
        self._received_s = time.monotonic()
        self._on_text, self._on_end = on_text, on_end
        self._lock = threading.Lock()
        self._over = False

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        return self._over

    def note_window(self, window: Window[Any], model_id: str, backend: str) -> None:
        """Say what it is answered from."""
        with self._lock:
            if not self._over:
                out = self.outcome
                out.first_ns, out.last_ns, out.frames_used = window.first_ns, window.last_ns, window.frames
                out.model_id, out.backend = model_id, backend

    def note_text(self, text: str) -> None:
        """Take the answer so far."""
        with self._lock:
            if self._over:
                return
            self.outcome.answer = text
            self.outcome.first_token_ms = self.outcome.first_token_ms or self._age_ms()
        self._on_text(text)

    def end(self, error_code: int, error_message: str = "", **answer: Any) -> bool:
        """End it; False if it was over already.

        Args:
            error_code: of QuestionError.msg.
            error_message: what was found, what was expected, what to do; empty for NONE.
            answer: further fields of the outcome.
        """
        with self._lock:
            if self._over:
                return False
            self._over = True
            for name, value in {**answer, "error_code": error_code, "error_message": error_message}.items():
                setattr(self.outcome, name, value)
            self.outcome.total_ms = self._age_ms()
        self.done.set_result(None)
        self._on_end()
        return True

    def _age_ms(self) -> float:
        return (time.monotonic() - self._received_s) * 1e3


class QuestionWorker:
    """Loads the model in a thread of its own, which then encodes new frames and answers questions, never both at once.

    A question goes before frames; what came meanwhile is encoded afterwards, or just before the next question.

    Args:
        load: gives the model (`surg_perception.surgllm.answering.Assistant` or what has its interface); seconds are
            allowed. Not interruptible: after `close` its result is dropped.
        log: logger of the node.
        threads: of PyTorch, for the environment that its libraries read when they are first imported; 0: as it is.
        niceness: at least this niceness for the thread and the threads that the model's libraries start in it.
        cpus: the cores that these threads may run on; empty: all.
        after: the thread of a former worker; loading waits for its end.
    """

    def __init__(
        self,
        load: Callable[[], Any],
        log: Any,
        *,
        threads: int = 0,
        niceness: int = 0,
        cpus: Collection[int] = (),
        after: threading.Thread | None = None,
    ) -> None:
        self.assistant: Any = None
        self.failure = ""
        """Why there is no model and will be none; empty while it is being loaded and when it is there."""
        self.encode_fault = ""
        """Why the newest frames could not be encoded; empty if they could."""
        self.encode_clock = StageClock()
        self.started_s = time.monotonic()
        self._load, self._log, self._after = load, log, after
        self._threads, self._niceness, self._cpus = threads, niceness, cpus
        self._changed = threading.Condition()
        self._buffer: ClipBuffer[Any] | None = None
        self._has_new_frames = False
        self._waiting: deque[Question] = deque()
        self._current: Question | None = None
        self._closed = False
        self.thread = threading.Thread(target=self._run, name=THREAD_NAME, daemon=True)
        self.thread.start()

    # The executor's thread ------------------------------------------------------------------------------------------

    def serve(self, buffer: ClipBuffer[Any]) -> None:
        """Encode the frames of this buffer, and take questions about them, from now on."""
        with self._changed:
            self._buffer = buffer

    def frames_came(self) -> None:
        """Say that the buffer has a new frame."""
        with self._changed:
            self._has_new_frames = True
            self._changed.notify()

    def submit(self, question: Question, depth: int) -> bool:
        """Have a question answered; False if another one is under way and `depth` more wait already."""
        with self._changed:
            if len(self._open_questions()) > depth:
                return False
            self._waiting.append(question)
            self._changed.notify()
            return True

    def end_overdue(self) -> None:
        """End the questions whose deadline has passed."""
        now_s = time.monotonic()
        with self._changed:
            overdue = [question for question in self._open_questions() if now_s >= question.deadline_s]
        for question in overdue:
            question.end(QuestionError.TIMEOUT, "the deadline passed (parameter deadline_s): the answer is cut there")

    def pause(self, reason: str) -> None:
        """End all questions as canceled and stop encoding; the model stays. What runs ends at its next token."""
        with self._changed:
            ended = self._open_questions()
            self._waiting.clear()
            self._buffer = None
        for question in ended:
            question.end(QuestionError.CANCELED, reason)

    def close(self, timeout_s: float = 5.0) -> None:
        """Give the model up. A model that is still being loaded is given up when it is there."""
        self.pause("the node was cleaned up")
        with self._changed:
            self._closed = True
            self._changed.notify()
            loading = self.assistant is None
        if not loading:
            self.thread.join(timeout_s)

    def _open_questions(self) -> list[Question]:
        current = [] if self._current is None else [self._current]
        return [question for question in (*current, *self._waiting) if not question.over]

    # The model's thread ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        if self._after is not None:
            self._after.join()
            self._after = None
        if self._closed:
            return
        try:
            self._limit()
            assistant = self._load()
        except (ValueError, OSError, ImportError) as error:
            self._fail(str(error))
            return
        except Exception as error:
            self._fail(f"{type(error).__name__}: {error}")
            self._log.error(traceback.format_exc())
            return
        with self._changed:
            self.assistant = assistant
        self._log.info(f"model {assistant.model_id} is ready after {time.monotonic() - self.started_s:.1f} s")
        while self._step():
            pass
        self.assistant = None

    def _limit(self) -> None:
        if self._threads and "torch" not in sys.modules:
            for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
                os.environ[name] = str(self._threads)
        me = threading.get_native_id()
        if self._niceness > os.getpriority(os.PRIO_PROCESS, me):
            os.setpriority(os.PRIO_PROCESS, me, self._niceness)
        if self._cpus:
            os.sched_setaffinity(me, self._cpus)

    def _fail(self, reason: str) -> None:
        self.failure = reason
        self._log.error(f"no model, so no answers: {reason}")

    def _step(self) -> bool:
        """Answer the next question, or else encode new frames; False when closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._waiting or self._has_new_frames)
            if self._closed:
                return False
            buffer, self._has_new_frames = self._buffer, False
            question = self._current = self._waiting.popleft() if self._waiting else None
        if question is not None:
            self._answer(question, buffer)
            with self._changed:
                self._current = None
        elif buffer is not None:
            # A pause in the meantime takes the buffer away.
            while not self._waiting and self._buffer is buffer and self._encode_next(buffer):
                pass
        return True

    def _encode_next(self, buffer: ClipBuffer[Any]) -> bool:
        started_s = time.perf_counter()
        try:
            if not buffer.encode_next():
                return False
        except Exception as error:
            self.encode_fault = f"{type(error).__name__}: {error}"
            self._log.error(f"frames could not be encoded: {self.encode_fault}", throttle_duration_sec=5.0)
            return True
        self.encode_clock.record({"encode": (time.perf_counter() - started_s) * 1e3})
        self.encode_fault = ""
        return True

    def _answer(self, question: Question, buffer: ClipBuffer[Any] | None) -> None:
        assistant = self.assistant
        try:
            if buffer is None:
                raise NoFrames("the node was deactivated")
            while not question.over and self._encode_next(buffer):
                pass
            if question.over:
                return
            reply = answer(
                assistant,
                buffer,
                question.text,
                question.task,
                question.span,
                on_window=lambda window: question.note_window(window, assistant.model_id, assistant.backend),
                on_text=question.note_text,
                stop=lambda: question.over,
            )
            question.end(
                QuestionError.NONE,
                answer=reply.text,
                task=reply.task,
                task_probability=reply.task_probability,
                confidence=reply.confidence,
            )
        except Exception as error:
            refusal = refusal_of(error, self.encode_fault)
            if refusal is not None:
                question.end(getattr(QuestionError, refusal.code_name), str(refusal))
            elif question.end(QuestionError.INTERNAL, f"{type(error).__name__}: {error}; the node's log says more"):
                self._log.error(f"no answer: {traceback.format_exc()}")


def cores(text: str) -> set[int]:
    """Numbers of cores written as in taskset, such as "0,2-3"; empty for an empty text.

    Raises:
        ValueError: not written so.
    """
    found: set[int] = set()
    for part in filter(None, text.replace(" ", "").split(",")):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"{text!r} is no list of cores, expected such as '1' or '0,2-3'")
        found.update(range(int(first), int(last or first) + 1))
    return found
