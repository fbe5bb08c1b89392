# SPDX-License-Identifier: Apache-2.0
"""Asks a running node `vqa` one question through its action, with the answer streamed and Ctrl-C as cancel."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import rclpy
from rclpy.action import ActionClient
from rclpy.executors import SingleThreadedExecutor
from rclpy.signals import SignalHandlerOptions
from rclpy.task import Future
from surg_perception_msgs.action import Answer

from surg_perception.nodes.question_worker import CODE_NAMES as CODE_NAMES

DISCOVERY_S = 10.0
SETTLE_S = 0.3
CANCEL_S = 5.0


def ask(
    question: str,
    *,
    task: str = "",
    window_s: float = 0.0,
    namespace: str = "surg_perception",
    timeout_s: float = 60.0,
    on_text: Callable[[str], None] = lambda text: None,
) -> tuple[Answer.Result, bool]:
    """The answer, and whether Ctrl-C ended it.

    Args:
        question, task, window_s: as in Answer.action.
        namespace: of the node.
        timeout_s: how long to wait for the whole answer; the goal is canceled then.
        on_text: called with the answer so far, as it comes.

    Raises:
        TimeoutError: no such action, or no answer in time.
    """
    with counted_interrupts() as interrupts, ExitStack() as undo:
        context = rclpy.Context()
        # Ctrl-C must reach the node as a cancel; rclpy's own handler would take the connection down first.
        rclpy.init(context=context, signal_handler_options=SignalHandlerOptions.NO)
        undo.callback(rclpy.shutdown, context=context)
        node = rclpy.create_node(f"ask_{os.getpid()}", namespace=namespace, context=context)
        undo.callback(node.destroy_node)
        client = ActionClient(node, Answer, "answer")
        undo.callback(client.destroy)
        executor = SingleThreadedExecutor(context=context)
        undo.callback(executor.shutdown, timeout_sec=1.0)
        executor.add_node(node)
        goal = Answer.Goal(question=question, task=task, window_s=window_s)
        name = node.resolve_service_name("answer")
        return _Asking(client, name, executor, goal, on_text, interrupts).run(timeout_s)


@contextmanager
def counted_interrupts() -> Iterator[list[int]]:
    """A list that grows with each Ctrl-C or SIGTERM; from the second on they raise KeyboardInterrupt.

    A KeyboardInterrupt can hit rclpy where it is lost (a callback from C++) or leaves a task half done.
    """
    interrupts: list[int] = []

    def note(number: int, frame: object) -> None:
        interrupts.append(number)
        if len(interrupts) > 1:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield interrupts  # Ctrl-C never arrives there
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupts
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Asking:
    def __init__(
        self,
        client: ActionClient,
        name: str,
        executor: Any,
        goal: Answer.Goal,
        on_text: Callable[[str], None],
        interrupts: list[int],
    ) -> None:
        self._client, self._name = client, name
        self._executor = executor
        self._goal = goal
        self._on_text = on_text
        self._interrupts = interrupts

    def run(self, timeout_s: float) -> tuple[Answer.Result, bool]:
        end_s = time.monotonic() + timeout_s
        self._find_server(min(end_s, time.monotonic() + DISCOVERY_S))
        sent = self._client.send_goal_async(self._goal, feedback_callback=lambda f: self._on_text(f.feedback.text))
        answered: Future | None = None
        if self._spin(sent, end_s):
            answered = sent.result().get_result_async()
            if self._spin(answered, end_s):
                return answered.result().result, False
        interrupted = bool(self._interrupts)
        result = self._cancel(sent, answered)
        if interrupted and result is not None:
            return result, True
        if interrupted:
            raise KeyboardInterrupt
        raise TimeoutError(f"{self._name} gave no answer within {timeout_s:g} s: the question was canceled")

    def _find_server(self, end_s: float) -> None:
        while not self._interrupts and not self._client.server_is_ready():
            if time.monotonic() > end_s:
                raise TimeoutError(
                    f"there is no action {self._name} in ROS domain {os.environ.get('ROS_DOMAIN_ID', '0')}: start the "
                    "node with `ros2 launch surg_perception pipeline.launch.py` (vqa:=true), or name its --namespace"
                )
            self._executor.spin_once(timeout_sec=0.1)
        # The node discovers this client a moment after it was discovered; a response sent before that is lost.
        self._spin(Future(), time.monotonic() + SETTLE_S)
        if self._interrupts:
            raise KeyboardInterrupt

    def _cancel(self, sent: Future, answered: Future | None) -> Answer.Result | None:
        """Cancel the goal; its result, if it still comes."""
        end_s = time.monotonic() + CANCEL_S
        if not self._spin(sent, end_s, interruptible=False):
            return None
        canceled = sent.result().cancel_goal_async()
        answered = answered or sent.result().get_result_async()
        if self._spin(canceled, end_s, interruptible=False) and self._spin(answered, end_s, interruptible=False):
            return answered.result().result
        return None

    def _spin(self, future: Future, end_s: float, interruptible: bool = True) -> bool:
        """Let callbacks run until the future has its result, Ctrl-C or time is up; whether it has."""
        while not future.done() and time.monotonic() < end_s and not (interruptible and self._interrupts):
            self._executor.spin_once(timeout_sec=0.1)
        return future.done()
