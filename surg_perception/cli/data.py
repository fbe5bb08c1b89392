# SPDX-License-Identifier: Apache-2.0
"""`surg-perception data`: look at data sets before training on them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surg_perception.cli import manifest, questions

if TYPE_CHECKING:
    from surg_perception.data.check import CheckReport

_COLOURS = {"error": "red", "warning": "yellow", "note": "cyan"}


def add_parser(verbs: Any) -> None:
    """Add the verb `data` to the command's subparsers."""
    data = verbs.add_parser("data", help="check data sets, keep a manifest of videos, make questions")
    actions = data.add_subparsers(dest="action", required=True, metavar="ACTION")
    check = actions.add_parser(
        "check",
        help="what a data set holds, what is missing and what is wrong",
        description="Exit status 0: no error, 1: errors found, 2: no data set recognised. Layouts: docs/data.md",
    )
    check.add_argument("path", help="folder of a data set, a video file, or 'phantom'")
    check.add_argument("--kind", help="layout, instead of recognising it: cholec80, cholect50, videos, …")
    check.add_argument("--labels", type=Path, help="phase labels that lie elsewhere")
    check.add_argument("--deep", action="store_true", help="decode every picture (slow); otherwise a few of each video")
    check.add_argument("--json", type=Path, metavar="FILE", help="also write the report here")
    check.set_defaults(run=_check)
    manifest.add_actions(actions)
    questions.add_parser(actions)


def _check(options: argparse.Namespace) -> int:
    import json

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from surg_perception.data.check import check_dataset

    console = Console()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as bars:
        bar = bars.add_task("", total=None)

        def progress(name: str, done: int, total: int) -> None:
            bars.update(bar, description=name, completed=done, total=total)

        report = check_dataset(options.path, options.kind, options.deep, labels=options.labels, progress=progress)
    if options.json is not None:
        options.json.write_text(json.dumps(report.to_dict(), indent=2) + "\n")
    _show(report, console)
    return 1 if report.errors else 0


def _show(report: CheckReport, console: Any) -> None:
    from rich.table import Table
    from rich.text import Text

    console.print(f"[bold]{report.path}[/bold]: {report.kind}, labels {report.label_set or 'none'}", highlight=False)
    videos = Table("video", "length", "frames", "rate", "size", "phases", "labelled", title=None)
    for video in report.videos:
        minutes, seconds = divmod(round(video.duration_s), 60)
        videos.add_row(
            video.name,
            f"{minutes}:{seconds:02d}",
            str(video.frames),
            f"{video.rate_hz:.4g} Hz",
            f"{video.width}x{video.height}" if video.width else "–",
            str(sum(seconds > 0 for seconds in video.phases_s.values())),
            f"{100 * video.labelled:.0f} %",
        )
    console.print(videos)
    frames = sum(video.frames for video in report.videos)
    console.print(f"{len(report.videos)} videos, {report.hours:.2f} h, {frames} frames", highlight=False)
    if report.phases_s:
        total_s = sum(report.phases_s.values()) or 1.0
        phases = Table("phase", "labelled s", "share")
        for phase, seconds_ in report.phases_s.items():
            phases.add_row(phase, f"{seconds_:.0f}", f"{100 * seconds_ / total_s:.1f} %")
        console.print(phases)
    if report.tools:
        console.print("tools: " + ", ".join(f"{tool} {count}" for tool, count in report.tools.items()), highlight=False)
    for finding in report.findings:
        line = Text(f"{finding.severity}: ", style=_COLOURS[finding.severity])
        line.append(f"{finding.where}: {finding.found}; expected {finding.expected}; {finding.advice}", style="default")
        console.print(line, soft_wrap=True)
    warnings = sum(finding.severity == "warning" for finding in report.findings)
    looked = "every picture decoded" if report.deep else "a few pictures of each video decoded; --deep takes all"
    console.print(f"{_count(report.errors, 'error')}, {_count(warnings, 'warning')} ({looked})", highlight=False)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
