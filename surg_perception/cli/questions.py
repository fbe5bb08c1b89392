# SPDX-License-Identifier: Apache-2.0
"""`surg-perception data questions`: make questions and answers from labels."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from surg_perception.surgllm.questions import Sample

_ANSWERS = 3


def add_parser(actions: Any) -> None:
    """Add the action `questions` to the verb `data`."""
    entry = actions.add_parser(
        "questions",
        help="make questions and answers about windows of video from its labels",
        description="Questions by rule from phases, instruments, verbs, targets and boxes. Rules: docs/questions.md",
    )
    entry.add_argument("path", help="folder of a data set, or 'phantom:seeds=0-9,duration_s=120'")
    entry.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON file to write")
    entry.add_argument("--per-task", type=int, default=1000, metavar="N", help="at most (default: %(default)s)")
    entry.add_argument("--seed", type=int, default=0, help="another one chooses other windows and wordings (0)")
    entry.add_argument("--videos", metavar="A,B", help="only these videos; make training and test from different ones")
    entry.add_argument("--stills", action="store_true", help="also frames without neighbours in time, each as a still")
    entry.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from rich.console import Console

    from surg_perception.data.clip_labels import open_clip_videos, select_groups
    from surg_perception.surgllm.questions import make_samples, write_samples

    with Console(stderr=True).status(f"reading the labels of {options.path}"):
        clips = open_clip_videos(options.path, stills=options.stills)
        if options.videos is not None:
            clips = select_groups(clips, [name.strip() for name in options.videos.split(",")])
        samples = make_samples(clips, options.seed, options.per_task)
    write_samples(options.out, samples)
    _show(samples, Console())
    videos = len({clip.video for clip in clips})
    print(f"{options.out}: {len(samples)} questions about {videos} videos ({sum(map(len, clips))} s)")
    return 0


def _show(samples: Sequence[Sample], console: Any) -> None:
    """One row for each type: how many, how many different answers, and the most frequent ones with their shares."""
    from rich.table import Table

    from surg_perception.surgllm.questions import QUESTION_TYPES

    table = Table("task", "type", "questions", "answers", "most frequent answers")
    for name, type_ in QUESTION_TYPES.items():
        answers = Counter(sample.answer for sample in samples if sample.type == name)
        count = answers.total()
        first = [f"{answer} {100 * n / count:.0f} %" for answer, n in answers.most_common(_ANSWERS)]
        shown = "" if type_.kind == "open" else ", ".join(first)
        table.add_row(type_.task, name, str(count), str(len(answers)), shown)
    console.print(table)
