# SPDX-License-Identifier: Apache-2.0
"""`surg-perception replay`: a bag through the code of the live nodes, offline and repeatable, or through the nodes."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surg_perception.cli import replay_live
from surg_perception.cli.names import namespace

if TYPE_CHECKING:
    from rich.console import Console

    from surg_perception.replay.run import Outcome

_SHOWN = 20


def add_parser(verbs: Any) -> None:
    """Add the verb `replay` to the command line."""
    entry = verbs.add_parser(
        "replay",
        help="phases, latents and answers of a recorded bag, offline and repeatable; compare with a golden file",
        description="Takes every image of a ROS 2 bag through the code of the live nodes, without ROS or a clock. "
        "Two replays on one machine with one backend write the same bytes. Exit status 0: done, 1: not as in the "
        "golden file, or a live node gave no phases, 2: input that cannot be used, 130: interrupted, with results so "
        "far. See docs/replay.md.",
    )
    entry.add_argument("bag", type=Path, metavar="BAG", help="folder or file of a ROS 2 bag (MCAP or SQLite)")
    entry.add_argument("--topic", default="", help="of the images, where the bag has several image topics")
    entry.add_argument("--out", type=Path, default=Path("out/replay"), metavar="DIR", help="default: %(default)s")
    entry.add_argument("--force", action="store_true", help="replace the results of a former replay in --out")
    nodes = entry.add_argument_group("the nodes")
    nodes.add_argument("--model", default="", help="name, folder or ONNX file (default: as in the parameters)")
    nodes.add_argument("--backend", default="", help="inference engine (default: as in the parameters)")
    nodes.add_argument("--precision", default="", help="arithmetic of the network (default: as in the parameters)")
    nodes.add_argument("--vqa-model", default="", metavar="MODEL", help="that answers (default: as in the parameters)")
    nodes.add_argument(
        "--params", type=Path, action="append", default=[], metavar="FILE", help="parameters, as config/pipeline.yaml"
    )
    nodes.add_argument(
        "-p",
        "--param",
        dest="assignments",
        action="append",
        default=[],
        metavar="NAME:=VALUE",
        help="one parameter, as with --ros-args; NODE:NAME:=VALUE for one node",
    )
    nodes.add_argument(
        "--namespace", type=namespace, default="surg_perception", help="of the result's topics (default: %(default)s)"
    )
    entry.add_argument("--questions", type=Path, metavar="FILE", help="questions to ask at times of the bag (YAML)")
    golden = entry.add_argument_group("golden file")
    golden.add_argument("--golden", type=Path, metavar="FILE", help="what the results must be (YAML)")
    golden.add_argument("--update", action="store_true", help="write the golden file anew instead of comparing")
    replay_live.add_options(entry)
    entry.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Replay and show what came of it. Returns the exit status."""
    if replay_live.check(options):
        return replay_live.run(options)
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from surg_perception.replay.run import run_replay
    from surg_perception.runtime.backend import BackendUnavailable

    console = Console()
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    quiet = not console.is_terminal
    with _Interrupts() as interrupts, Progress(*columns, console=console, transient=True, disable=quiet) as bars:
        bar = bars.add_task("", total=None)

        def say(text: str) -> None:
            interrupts.gentle = not text
            bars.update(bar, description=text or "images")

        try:
            outcome = run_replay(
                options.bag,
                options.out,
                topic=options.topic,
                model=options.model,
                backend=options.backend,
                precision=options.precision,
                vqa_model=options.vqa_model,
                params=options.params,
                assignments=options.assignments,
                questions=options.questions,
                golden=options.golden,
                update=options.update,
                force=options.force,
                namespace=options.namespace,
                say=say,
                progress=lambda done, total: bars.update(bar, completed=done, total=total or None),
                stop=lambda: interrupts.seen,
            )
        except BackendUnavailable as error:
            print(f"surg-perception: {error}", file=sys.stderr)
            return 2
    show(outcome, options, console)
    return outcome.status


class _Interrupts:
    """Ctrl-C: while images are taken the first one lets the one under way end, so that results are closed properly.

    Attributes:
        gentle: images are taken.
        seen: Ctrl-C came then.
    """

    def __init__(self) -> None:
        self.gentle = self.seen = False

    def __enter__(self) -> _Interrupts:
        self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _note(self, number: int, frame: Any) -> None:
        if self.seen or not self.gentle:
            raise KeyboardInterrupt
        self.seen = True


def show(outcome: Outcome, options: argparse.Namespace, console: Console) -> None:
    """Print a short table, problems and differences in a line each."""
    from collections import Counter

    from rich.table import Table
    from rich.text import Text

    replayed = outcome.replayed
    counts, times_s = replayed.counts, replayed.times_s
    rows = {
        "images": f"{counts['images']} of {replayed.topic}, {times_s[-1] if times_s else 0.0:.1f} s",
        "model": f"{replayed.model_id} on {replayed.backend}",
    }
    states = Counter(frame.state for frame in replayed.frames)
    rows["states"] = ", ".join(f"{state} {count}" for state, count in states.most_common())
    phases = Counter(frame.phase for frame in replayed.frames if frame.phase)
    rows["phases"] = ", ".join(f"{name} {100 * n / counts['images']:.0f} %" for name, n in phases.most_common())
    if replayed.answers:
        errors = Counter(answer.error for answer in replayed.answers)
        answered = errors.pop("NONE", 0)
        rows["answers"] = ", ".join([str(answered), *(f"{name} {n}" for name, n in sorted(errors.items()))])
    table = Table(show_header=False)
    for name, row in rows.items():
        table.add_row(name, Text(row))  # not markup, as "/camera[/left]" would be
    console.print(table)
    for answer in replayed.answers:
        said = answer.answer if answer.error == "NONE" else f"{answer.error}: {answer.error_message}"
        console.print(Text(f"{answer.at_s:.2f} s  {answer.question}  →  {said}"), soft_wrap=True)
    for problem in replayed.problems:
        line = Text("problem: ", style="yellow")
        console.print(line.append(f"{problem.count} × {problem.text}", style="default"), soft_wrap=True)
    for note in outcome.notes:
        console.print(Text(f"note: {note}"), soft_wrap=True)
    if outcome.comparison is not None:
        found = outcome.comparison
        console.print(Text(found.summary, style="red" if found.differences else "green"), soft_wrap=True)
        for difference in found.differences[:_SHOWN]:
            console.print(Text(f"  {difference}"), soft_wrap=True)
        if len(found.differences) > _SHOWN:
            more = f"  and {len(found.differences) - _SHOWN} more, in {outcome.out / 'differences.txt'}"
            console.print(more, markup=False, highlight=False)
    if outcome.updated:
        console.print(f"wrote {options.golden}", markup=False, highlight=False)
    if replayed.interrupted:
        console.print("interrupted: results are of the images so far", style="yellow")
    console.print(f"results in {outcome.out}", markup=False, highlight=False)
