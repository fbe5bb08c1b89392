# SPDX-License-Identifier: Apache-2.0
"""`surg-perception replay --live`: a bag through the running nodes, or through a pipeline launched for it."""

from __future__ import annotations

import argparse
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from surg_perception.nodes.live_replay import LiveResult

LAUNCH_LIMIT_S = 180.0
_OFFLINE_ONLY = ("model", "backend", "precision", "vqa_model", "params", "assignments", "questions")
_LIVE_ONLY = ("launch", "rate", "timeout", "late_ms")


def add_options(entry: argparse.ArgumentParser) -> None:
    """Add the options of a live replay to the verb `replay`."""
    group = entry.add_argument_group(
        "live", "Through the nodes of a running pipeline, with /clock from the bag; needs ROS 2 in the environment."
    )
    group.add_argument(
        "--live",
        action="store_true",
        help="through the running node NAMESPACE/phase, each image when the phase of the one before has come",
    )
    group.add_argument(
        "--launch",
        nargs="*",
        metavar="ARG:=VALUE",
        help="--live, and launch the pipeline for it (use_sim_time:=true, transport as in the bag, vqa:=false) with "
        "these arguments",
    )
    group.add_argument("--rate", type=float, metavar="R", help="R times real time, whether the node keeps up or not")
    group.add_argument("--timeout", type=float, metavar="SECONDS", help="longest wait for a phase (default: 30)")
    group.add_argument("--late-ms", type=float, metavar="MS", help="later is late (default: the node's max_age_s)")


def check(options: argparse.Namespace) -> bool:
    """Whether a live replay is asked for. Raises ValueError for options that do not go together."""
    live = options.live or options.launch is not None
    given = vars(options)
    if not live:
        wrong = [name for name in _LIVE_ONLY if given[name] is not None]
        if wrong:
            raise ValueError(f"--{wrong[0].replace('_', '-')} is for a replay through running nodes: add --live")
        return False
    wrong = [name for name in _OFFLINE_ONLY if given[name]]
    if wrong:
        option = "-p" if wrong[0] == "assignments" else f"--{wrong[0].replace('_', '-')}"
        raise ValueError(
            f"{option} is for an offline replay; with --live the nodes are as they were launched: give it to the "
            "launch, such as --launch model:=NAME params_file:=FILE"
        )
    for name in ("rate", "timeout", "late_ms"):
        value = given[name]
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"--{name.replace('_', '-')} is {value:g}, expected a number above 0")
    for argument in options.launch or ():
        name, sign, _ = argument.partition(":=")
        if not sign or not name:
            raise ValueError(
                f"--launch {argument}: expected ARG:=VALUE, as `ros2 launch` takes it; name the bag before"
            )
        if name in ("namespace", "cameras"):
            raise ValueError(f"--launch {argument}: one pipeline is launched, in the namespace that --namespace names")
    return True


def run(options: argparse.Namespace) -> int:
    """Play the bag, show what came of it. Returns the exit status."""
    from rich.console import Console

    try:
        from surg_perception.nodes import live_replay
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in ("surg_perception", "numpy"):
            raise
        print(
            "ROS 2 is not in this shell's environment: `source setup.bash` in the project's folder first",
            file=sys.stderr,
        )
        return 2
    from surg_perception.cli.replay import show
    from surg_perception.data.bags import BagReader
    from surg_perception.replay.live import live_figures, write_live
    from surg_perception.replay.run import conclude, expected_of, prepare

    console = Console()
    if options.update and options.golden is None:
        raise ValueError("--update writes the golden file: name it with --golden FILE")
    expected = expected_of(options.golden, options.update)
    settings = live_replay.LiveSettings(options.namespace, options.rate, late_ms=options.late_ms)
    if options.timeout is not None:
        settings = replace(settings, timeout_s=options.timeout)

    def tell(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    with BagReader(options.bag, options.topic) as reader:
        prepare(options.out, options.bag, options.force)
        try:
            if options.launch is None:
                result = _play(reader, settings, tell, console)
            else:
                transport = "raw" if reader.msgtype == "sensor_msgs/msg/Image" else "compressed"
                arguments = [
                    *("use_sim_time:=true", f"transport:={transport}", f"namespace:={options.namespace}"),
                    *([] if any(text.startswith("vqa:=") for text in options.launch) else ["vqa:=false"]),
                    *options.launch,
                ]
                live_replay.check_free(options.namespace)
                with _launched(arguments, options.out / "launch.log", tell) as check_launch:
                    settings = replace(settings, start_limit_s=LAUNCH_LIMIT_S)
                    result = _play(reader, settings, tell, console, check_launch)
        except live_replay.LiveReplayError as error:
            print(f"surg-perception: {error}", file=sys.stderr)
            return 1
        replayed = write_live(result, reader, options.out, options.namespace)
    outcome = conclude(replayed, options.out, options.golden, expected, options.update)
    show(outcome, options, console)
    _show_figures(live_figures(result), options, console)
    return outcome.status or (1 if result.failed or not result.answered else 0)


def _play(
    reader: Any,
    settings: Any,
    tell: Callable[[str], None],
    console: Console,
    check_launch: Callable[[], None] = lambda: None,
) -> LiveResult:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from surg_perception.nodes.live_replay import replay_live

    columns = (TextColumn("images"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        bar = bars.add_task("", total=reader.count or None)
        return replay_live(
            reader,
            settings,
            tell=tell,
            check=check_launch,
            on_image=lambda result: bars.update(bar, completed=len(result.images)),
        )


@contextmanager
def _launched(arguments: list[str], log: Path, tell: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """The pipeline, while the block runs; gives what raises LiveReplayError once it has ended."""
    from surg_perception.cli.demo import stop
    from surg_perception.nodes.live_replay import LiveReplayError

    if shutil.which("ros2") is None:
        raise LiveReplayError(
            "there is no command ros2 for --launch: `source setup.bash` in the project's folder first"
        )
    command = ["ros2", "launch", "surg_perception", "pipeline.launch.py", *arguments]
    tell(f"{' '.join(command)}\n(its log: {log})")
    with log.open("w") as stream:
        launch = subprocess.Popen(
            command,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )

    def check_launch() -> None:
        if launch.poll() is not None:
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            why = next((line for line in reversed(lines) if "rror" in line), lines[-1] if lines else "it said nothing")
            raise LiveReplayError(f"the launch ended with exit status {launch.returncode} ({log}): {why.strip()}")

    try:
        yield check_launch
    finally:
        stop(launch)


def _show_figures(figures: dict[str, Any], options: argparse.Namespace, console: Console) -> None:
    from rich.table import Table

    how = "in lockstep" if options.rate is None else f"at {options.rate:g} times real time"
    table = Table(title=f"live, {how}", title_justify="left", show_header=False)
    for name in ("sent", "answered", "lost", "sent_again", "replaced", "rejected", "stale"):
        table.add_row(name.replace("_", " "), str(figures[name]))
    table.add_row(f"late (over {figures['late_ms']:g} ms)", str(figures["late"]))
    p50, p99 = figures["latency_p50_ms"], figures["latency_p99_ms"]
    shown = "no phase came" if p50 is None else f"{p50:.1f} / {p99:.1f} ms"
    table.add_row("sending to phase, p50 / p99", shown)
    if options.rate is not None:
        table.add_row("player behind the bag at most", f"{figures['player_behind_ms']:.1f} ms")
    console.print(table)
