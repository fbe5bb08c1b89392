# SPDX-License-Identifier: Apache-2.0
"""`surg-perception ask`: a question about the live image from a terminal; the answer appears as it is made."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from surg_perception.cli.names import namespace


def add_parser(verbs: Any) -> None:
    """Add the verb `ask` to the command line."""
    entry = verbs.add_parser(
        "ask",
        help="ask a running pipeline about the last seconds of its image",
        description="Asks the node vqa of a running pipeline. Ctrl-C cancels the answer. Exit status 0: answered, "
        "1: answered with an error code, 2: no such node, or no answer within --timeout, 130: canceled.",
    )
    entry.add_argument("question", help='such as "What is the hook doing?"')
    entry.add_argument("--task", default="", help="one of the model's tasks (default: the node picks)")
    entry.add_argument(
        "--window", type=float, default=0.0, metavar="SECONDS", help="how far to look back (default: the node's)"
    )
    entry.add_argument(
        "--namespace", type=namespace, default="surg_perception", help="of the node (default: %(default)s)"
    )
    entry.add_argument(
        "--timeout",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="how long to wait for the answer (default: %(default)g)",
    )
    entry.set_defaults(run=run)


class TextStream:
    """Writes a text that grows, only what is new of it; a text that changed what was written starts a new line."""

    def __init__(self) -> None:
        self._written = ""

    def __call__(self, text: str) -> None:
        """Take the text so far."""
        if not text.startswith(self._written):
            print()
            self._written = ""
        print(text[len(self._written) :], end="", flush=True)
        self._written = text


def run(options: argparse.Namespace) -> int:
    """Ask, show the answer as it comes, then what it rests on. Returns the exit status."""
    try:
        from surg_perception.nodes import ask_client
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("rclpy", "surg_perception_msgs"):
            raise
        print(
            "ROS 2 is not in this shell's environment: `source setup.bash` in the project's folder first",
            file=sys.stderr,
        )
        return 2
    write = TextStream()
    result, interrupted = ask_client.ask(
        options.question,
        task=options.task,
        window_s=options.window,
        namespace=options.namespace,
        timeout_s=options.timeout,
        on_text=write,
    )
    write(result.answer)
    print()
    for line in details(result):
        print(line)
    if result.error_code:
        print(f"{ask_client.CODE_NAMES[result.error_code]}: {result.error_message}", file=sys.stderr)
    return 130 if interrupted else 1 if result.error_code else 0


def details(result: Any) -> list[str]:
    """What an answer (Answer.Result) rests on, a line each; lines of which nothing is known are left out."""
    lines = []
    if result.task:
        lines.append(
            f"  task    {result.task} (probability {result.task_probability:.2f}); "
            f"confidence of the answer {result.confidence:.2f}"
        )
    if result.frames_used:
        first_s, last_s = (stamp.sec + stamp.nanosec * 1e-9 for stamp in (result.first_stamp, result.last_stamp))
        lines.append(f"  images  {result.frames_used}, stamped {first_s:.3f} to {last_s:.3f} s")
    if result.first_token_ms:
        lines.append(f"  time    first token {result.first_token_ms:.0f} ms, whole answer {result.total_ms:.0f} ms")
    if result.model_id:
        lines.append(f"  model   {result.model_id} on {result.backend}")
    return lines
