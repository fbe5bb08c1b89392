# SPDX-License-Identifier: Apache-2.0
"""Node `vqa`: answers questions about the last seconds of the live endoscope image."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from builtin_interfaces.msg import Time
from diagnostic_msgs.msg import DiagnosticStatus
from rclpy.action import ActionServer, CancelResponse
from rclpy.callback_groups import ReentrantCallbackGroup
from rclpy.qos import QoSProfile
from sensor_msgs.msg import CompressedImage, Image
from surg_perception_msgs.action import Answer
from surg_perception_msgs.msg import QuestionAnswer, QuestionError
from surg_perception_msgs.srv import Ask

from surg_perception.nodes.lifecycle import ConfigureError, PerceptionNode, process_memory_mib, run, stamp_ns
from surg_perception.nodes.parameter_table import VQA
from surg_perception.nodes.question_worker import CODE_NAMES, THREAD_NAME, Outcome, Question, QuestionWorker, cores
from surg_perception.stream.clip_buffer import BREAK_PERIODS, ClipBuffer, NoFrames, WindowOutside
from surg_perception.stream.image_decode import ImageError
from surg_perception.surgllm.question_check import QuestionRefused, check_question
from surg_perception.surgllm.window_answers import check_task, refusal_of, span_of

WATCH_S = 0.1


class _Refused(Exception):
    """A question that is not taken."""

    def __init__(self, error_code: int, reason: str) -> None:
        super().__init__(reason)
        self.error_code = error_code


def load_assistant(model: str, threads: int) -> Any:
    """The model that answers; imports PyTorch, so it takes seconds, and memory only where there is a model."""
    from surg_perception.surgllm.model_folder import find_surgllm

    folder = find_surgllm(model).folder
    from surg_perception.surgllm.answering import Assistant

    return Assistant.load(folder, threads=threads)


class VqaNode(PerceptionNode):
    """Subscribes to `image` or `image/compressed`; serves `ask` (Ask.srv) and `answer` (Answer.action).

    The executor's thread takes images into the clip buffer, checks questions and keeps deadlines; the thread of a
    QuestionWorker owns the model. Service and action are there in every state: what cannot be answered has a code.

    Args:
        load: gives the model for the parameters model.path and runtime.threads.
    """

    def __init__(self, load: Callable[[str, int], Any] = load_assistant, **kwargs: Any) -> None:
        super().__init__(VQA, **kwargs)
        self._load = load
        self._worker: QuestionWorker | None = None
        self._former: threading.Thread | None = None
        self._buffer: ClipBuffer[Any] | None = None
        self._buffer_fault = ""
        self._subscription = None
        self._watch_timer = None
        self._goals: dict[bytes, Question] = {}
        self._reset_figures()
        self.updater.add("images", self._image_diagnostics)
        self.updater.add("model", self._model_diagnostics)
        self.updater.add("questions", self._question_diagnostics)
        # Not a lifecycle publisher: a question that finds the node inactive has ended too.
        self._answered = self.create_publisher(QuestionAnswer, "~/answered", QoSProfile(depth=10))
        # A group of its own: the wait for an answer must hold up neither images nor the next question.
        group = ReentrantCallbackGroup()
        self.create_service(Ask, "ask", self._ask, callback_group=group)
        self._action_server = ActionServer(
            self,
            Answer,
            "answer",
            self._answer,
            cancel_callback=self._cancel,
            callback_group=group,
            result_timeout=60,
        )

    def destroy_node(self) -> None:
        self._action_server.destroy()  # rclpy leaves it in the ROS graph otherwise
        super().destroy_node()

    # Transitions ----------------------------------------------------------------------------------------------------

    def configure(self) -> None:
        v = self.values
        here = os.sched_getaffinity(0)
        try:
            cpus = cores(v["runtime.cpus"])
        except ValueError as error:
            raise ConfigureError(f"runtime.cpus: {error}") from error
        if not cpus <= here:
            have = ", ".join(map(str, sorted(here)))
            raise ConfigureError(f"runtime.cpus is {v['runtime.cpus']!r}, but this process may run on {have} only")
        model, threads, load = v["model.path"], v["runtime.threads"], self._load
        self.get_logger().info(f"loading the model {model!r} in the background")
        self._worker = QuestionWorker(
            lambda: load(model, threads),
            self.get_logger(),
            threads=threads,
            niceness=v["runtime.niceness"],
            cpus=cpus,
            after=self._former,
        )
        self._former = self._worker.thread

    def activate(self) -> None:
        self._reset_figures()
        self._buffer_fault = ""
        self._watch_timer = self.create_timer(WATCH_S, self._watch)
        self._watch()

    def deactivate(self) -> None:
        if self._subscription is not None:
            self.destroy_subscription(self._subscription)
            self._subscription = None
        if self._watch_timer is not None:
            self.destroy_timer(self._watch_timer)
            self._watch_timer = None
        if self._worker is not None:
            self._worker.pause("the node was deactivated")
        self._buffer = None

    def cleanup(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    # The executor's thread: images and time -------------------------------------------------------------------------

    def _watch(self) -> None:
        """Start to take images once the model is there; keep deadlines; forget old images."""
        if self._buffer is None:
            if self._worker.assistant is not None and not self._buffer_fault:
                self._start_stream()
            return
        self._worker.end_overdue()
        self._buffer.expire(time.monotonic())

    def _start_stream(self) -> None:
        v, assistant = self.values, self._worker.assistant
        try:
            self._buffer = ClipBuffer(
                assistant.encode,
                size=assistant.image_size,
                rate_hz=v["buffer.rate_hz"],
                length_s=v["buffer.length_s"],
                segment_frames=assistant.segment_frames,
                max_segments=assistant.max_segments,
                max_pixels=v["input.max_pixels"],
            )
        except ValueError as error:
            self._buffer_fault = str(error)
            self.get_logger().error(f"no answers: {error}")
            return
        self._worker.serve(self._buffer)
        raw = v["input.transport"] == "raw"
        topic = "image" if raw else "image/compressed"
        qos = self.image_qos(topic, 1)
        self._subscription = self.create_subscription(Image if raw else CompressedImage, topic, self._take, qos)
        self.get_logger().info(
            f"subscribed to {self.resolve_topic_name(topic)}, {qos.reliability.name.lower()}; "
            f"{self.describe_publishers(topic)}"
        )

    def _take(self, message: Any) -> None:
        self._received += 1
        self._last_arrival_s = time.monotonic()
        try:
            if self._buffer.offer(message, stamp_ns(message), self._last_arrival_s):
                self._last_kept_s = self._last_arrival_s
                self._refused_because = ""
                self._worker.frames_came()
        except ImageError as error:
            self._refused += 1
            self._refused_because = str(error)
            self.get_logger().error(f"image refused: {error}", throttle_duration_sec=5.0)

    # The executor's thread: questions -------------------------------------------------------------------------------

    async def _ask(self, request: Ask.Request, response: Ask.Response) -> Ask.Response:
        return _fill(response, await self._outcome_of(self._open(request)))

    async def _answer(self, goal: Any) -> Answer.Result:
        key = bytes(goal.goal_id.uuid)
        question = self._goals[key] = self._open(goal.request, lambda text: self._send_text(goal, text))
        if goal.is_cancel_requested:
            question.end(QuestionError.CANCELED, "canceled by the client")
        outcome = await self._outcome_of(question)
        del self._goals[key]
        if outcome.error_code == QuestionError.NONE:
            goal.succeed()
        elif goal.is_cancel_requested:
            goal.canceled()
        else:
            goal.abort()
        return _fill(Answer.Result(), outcome)

    def _send_text(self, goal: Any, text: str) -> None:
        if self.context.ok():
            goal.publish_feedback(Answer.Feedback(text=text))

    def _cancel(self, goal: Any) -> CancelResponse:
        question = self._goals.get(bytes(goal.goal_id.uuid))
        if question is not None:
            question.end(QuestionError.CANCELED, "canceled by the client")
        return CancelResponse.ACCEPT

    def _open(self, request: Any, on_text: Callable[[str], None] = lambda text: None) -> Question:
        """The question on its way, or ended with the reason why it is not taken."""
        question = Question(request.question, request.task, on_text, self._wake)
        try:
            self._check(question, request)
            question.deadline_s = time.monotonic() + self.values["deadline_s"]
            if not self._worker.submit(question, self.values["queue.depth"]):
                raise _Refused(
                    QuestionError.BUSY,
                    "another question is being answered: ask again afterwards, or raise the parameter queue.depth",
                )
        except _Refused as refusal:
            question.end(refusal.error_code, str(refusal))
        return question

    async def _outcome_of(self, question: Question) -> Outcome:
        """Wait for its end, count it and tell it: here and not where it ends, so that one thread alone counts."""
        await question.done
        outcome = question.outcome
        self._outcomes[CODE_NAMES[outcome.error_code]] += 1
        if outcome.error_code == QuestionError.NONE:
            self._last_answer = outcome
        if self.context.ok():
            told = _fill(QuestionAnswer(question=question.text), outcome)
            told.header.stamp = self.get_clock().now().to_msg()
            self._answered.publish(told)
        return outcome

    def _check(self, question: Question, request: Any) -> None:
        """Refuse what cannot be answered before it costs anything; else give the question its span."""
        if self.state_label != "active":
            raise _Refused(QuestionError.NOT_ACTIVE, f"the node is {self.state_label}: configure and activate it first")
        try:
            # Bytes that are no UTF-8 come from rclpy as U+FFFD, which is refused here too.
            check_question(question.text)
        except QuestionRefused as error:
            raise _Refused(getattr(QuestionError, error.code_name), str(error)) from error
        reason = self._why_not_available()
        if reason:
            raise _Refused(QuestionError.NOT_AVAILABLE, reason)
        start_ns, end_ns = (_nanoseconds(stamp) for stamp in (request.window_start, request.window_end))
        try:
            check_task(question.task, self._worker.assistant.tasks)
            default_s = self.values["window.default_s"]
            question.span = span_of(self._buffer, default_s, request.window_s, start_ns, end_ns)
        except NoFrames:
            topic = self._subscription.topic_name
            raise _Refused(
                QuestionError.NO_FRAMES,
                f"no image in the last {self.values['buffer.length_s']:g} s on {topic}: {self._image_trouble()}",
            ) from None
        except (QuestionRefused, WindowOutside) as error:
            refusal = refusal_of(error)
            raise _Refused(getattr(QuestionError, refusal.code_name), str(refusal)) from error

    def _why_not_available(self) -> str:
        """Why questions cannot be answered though the node is active; empty if they can."""
        worker = self._worker
        again = f"ros2 lifecycle set {self.get_fully_qualified_name()} cleanup, then configure and activate"
        if worker.failure or self._buffer_fault:
            return f"{worker.failure or self._buffer_fault}. After that: {again}"
        if self._buffer is None:
            model, since_s = self.values["model.path"], time.monotonic() - worker.started_s
            return f"the model {model!r} is still loading, for {since_s:.0f} s now: ask again in a few seconds"
        return ""

    def _image_trouble(self) -> str:
        if self._refused_because:
            return f"the last one was refused: {self._refused_because}"
        transport = "" if self.values["input.transport"] == "raw" else "/compressed"
        return self.describe_publishers(f"image{transport}")

    def _wake(self) -> None:
        # Whoever awaits the question does so in the executor, which must notice.
        if self.executor is not None and self.context.ok():
            self.executor.wake()

    # Diagnostics ----------------------------------------------------------------------------------------------------

    def _reset_figures(self) -> None:
        self._received = self._refused = 0
        self._last_arrival_s = self._last_kept_s = 0.0
        self._refused_because = ""
        self._outcomes: Counter[str] = Counter()
        self._last_answer: Outcome | None = None

    def _image_diagnostics(self, status: Any) -> Any:
        buffer, now_s = self._buffer, time.monotonic()
        if buffer is None:
            status.summary(DiagnosticStatus.OK, f"{self.state_label}, no images are taken")
            return status
        newest_ns, slow_s = buffer.newest_ns, BREAK_PERIODS / self.values["buffer.rate_hz"]
        if now_s - self._last_arrival_s > slow_s:
            status.summary(DiagnosticStatus.STALE, f"no image: {self._image_trouble()}")
        elif now_s - self._last_kept_s > slow_s + 1.0:
            why = self._refused_because or "their stamps do not advance"
            status.summary(DiagnosticStatus.WARN, f"images come, but none is usable: {why}")
        else:
            status.summary(DiagnosticStatus.OK, "images are buffered")
        status.add("frames_buffered", str(buffer.frames))
        if newest_ns is not None:
            age_s = (self.get_clock().now().nanoseconds - newest_ns) * 1e-9
            status.add("newest_stamp_age_s", f"{age_s:.2f}")
        status.add("frames_received", str(self._received))
        status.add("frames_rejected", str(self._refused))
        return status

    def _model_diagnostics(self, status: Any) -> Any:
        worker = self._worker
        status.add("memory_mib", f"{process_memory_mib():.0f}")
        if worker is None:
            status.summary(DiagnosticStatus.OK, "no model loaded")
        elif worker.failure or self._buffer_fault:
            status.summary(DiagnosticStatus.ERROR, worker.failure or self._buffer_fault)
        elif worker.assistant is None:
            status.summary(DiagnosticStatus.WARN, f"loading {self.values['model.path']!r}")
        else:
            status.summary(DiagnosticStatus.OK, worker.assistant.model_id)
            if worker.encode_fault:
                status.summary(DiagnosticStatus.ERROR, f"frames cannot be encoded: {worker.encode_fault}")
            status.add("model", worker.assistant.model_id)
            status.add("tasks", ", ".join(worker.assistant.tasks))
            for stage, (p50, p99) in worker.encode_clock.percentiles_ms((50, 99)).items():
                if stage == "encode":
                    status.add("encode_ms_p50_p99", f"{p50:.1f} {p99:.1f}")
        return status

    def _question_diagnostics(self, status: Any) -> Any:
        faults = self._outcomes["INTERNAL"]
        level = DiagnosticStatus.WARN if faults else DiagnosticStatus.OK
        status.summary(level, f"{faults} faults while answering" if faults else self.state_label)
        for name, count in sorted(self._outcomes.items()):
            status.add(f"answers_{name.lower()}", str(count))
        if self._last_answer is not None:
            status.add("last_first_token_ms", f"{self._last_answer.first_token_ms:.0f}")
            status.add("last_total_ms", f"{self._last_answer.total_ms:.0f}")
            status.add("last_task", self._last_answer.task)
        return status


def _nanoseconds(stamp: Time) -> int:
    return stamp.sec * 10**9 + stamp.nanosec


def _fill(message: Any, outcome: Outcome) -> Any:
    for name, value in vars(outcome).items():
        if name in ("first_ns", "last_ns"):
            sec, nanosec = divmod(value, 10**9)
            setattr(message, name.replace("_ns", "_stamp"), Time(sec=sec, nanosec=nanosec))
        else:
            setattr(message, name, value)
    return message


def main() -> None:
    """Entry point of `ros2 run surg_perception vqa_node`."""
    run(VqaNode)
    if any(thread.name == THREAD_NAME for thread in threading.enumerate()):
        # It is inside PyTorch, cannot be interrupted, and would crash in an interpreter that is taken down below it.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
