# SPDX-License-Identifier: Apache-2.0
"""From a question about a clip buffer to its answer or error code: what the node `vqa` and a replay both do.

Needs no PyTorch itself: the model comes as an argument.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from surg_perception.stream.clip_buffer import ClipBuffer, NoFrames, Window, WindowOutside
from surg_perception.surgllm.question_check import QuestionRefused


def check_task(task: str, tasks: Collection[str]) -> None:
    """Raise QuestionRefused where the task is none of the model's; "" leaves the choice to the model."""
    if task and task not in tasks:
        reason = f"the task is {task[:60]!r}, expected one of {', '.join(tasks)}, or nothing"
        raise QuestionRefused("UNKNOWN_TASK", reason)


def span_of(
    buffer: ClipBuffer[Any], default_s: float, window_s: float = 0.0, start_ns: int = 0, end_ns: int = 0
) -> tuple[int, int]:
    """Stamps of the first and the last buffered frame that a question is about, from the fields of Ask.srv.

    Args:
        default_s: the parameter window.default_s.
        window_s: look back so many seconds; 0: default_s. Counts where both stamps are 0.
        start_ns, end_ns: else this span of stamps.

    Raises:
        NoFrames, WindowOutside: see `refusal_of`.
    """
    if start_ns == 0 and end_ns == 0:
        return buffer.span(window_s or default_s)
    return buffer.span(start_ns=start_ns, end_ns=end_ns)


def answer(
    assistant: Any,
    buffer: ClipBuffer[Any],
    question: str,
    task: str,
    span: tuple[int, int],
    *,
    on_window: Callable[[Window[Any]], None],
    on_text: Callable[[str], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Any:
    """The model's Reply to a question about the encoded frames of a span.

    Args:
        assistant: `surgllm.answering.Assistant`.
        on_window: told what it is answered from, before it is.
        on_text, stop: as for `Assistant.ask`.

    Raises:
        QuestionRefused, NoFrames, WindowOutside: see `refusal_of`.
    """
    window = buffer.window(*span)
    on_window(window)
    return assistant.ask(question, window.segments, task=task, on_text=on_text, stop=stop)


def refusal_of(error: Exception, encode_fault: str = "") -> QuestionRefused | None:
    """An exception on the way to an answer as an error code of QuestionError.msg; None: it is a fault of its own.

    Args:
        encode_fault: why the newest frames could not be encoded, if they could not.
    """
    if isinstance(error, QuestionRefused):
        return error
    if not isinstance(error, (NoFrames, WindowOutside)):
        return None
    if encode_fault:
        return QuestionRefused("INTERNAL", f"frames could not be encoded: {encode_fault}")
    return QuestionRefused("NO_FRAMES" if isinstance(error, NoFrames) else "WINDOW_OUTSIDE", str(error))
