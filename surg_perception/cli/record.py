# SPDX-License-Identifier: Apache-2.0
"""`surg-perception record`: images, phases, latents and answers of a running pipeline into a bag."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surg_perception.cli.names import namespace

if TYPE_CHECKING:
    from surg_perception.nodes.recorder import Progress

_PLAIN_LINE_EVERY_S = 5.0
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def size(text: str) -> int:
    """Bytes of "2GB", "500 MB" or "0".

    Raises:
        argparse.ArgumentTypeError: written otherwise.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)b?", text.strip().lower())
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size, expected such as 2GB or 500MB")
    return int(float(found[1]) * _UNITS[found[2]])


def rectangle(text: str) -> tuple[int, int, int, int]:
    """Left, top, width, height of "0,0,300,40".

    Raises:
        argparse.ArgumentTypeError: written otherwise.
    """
    parts = text.split(",")
    if len(parts) != 4 or not all(part.strip().isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is no rectangle, expected x,y,width,height in pixels: 0,0,300,40")
    left, top, width, height = (int(part) for part in parts)
    return left, top, width, height


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no time, expected seconds above 0")
    return value


def _quality(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} is no JPEG quality, expected 1 to 100")
    return int(text)


def add_parser(verbs: Any) -> None:
    """Add the verb `record` to the command line."""
    entry = verbs.add_parser(
        "record",
        help="record a running pipeline into a bag (MCAP), for oneself or de-identified to be shared",
        description="Records until Ctrl-C, --seconds or --max-size. The folder is readable by you alone: video is "
        "patient data. Exit status 0: recorded, 1: recorded, but something is missing (the text says what), "
        "2: nothing recorded.",
    )
    entry.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="new folder of the bag")
    entry.add_argument(
        "--namespace", type=namespace, default="surg_perception", help="of the nodes (default: %(default)s)"
    )
    entry.add_argument("--image", default="", metavar="TOPIC", help="image topic (default: the one the nodes take)")
    entry.add_argument("--seconds", type=_seconds, default=0.0, metavar="S", help="end S seconds after the first image")
    entry.add_argument(
        "--topics",
        nargs="+",
        metavar="TOPIC",
        help="only these: image, phase, labels, latent, novelty, answers, truth, or a topic with its whole name "
        "(default: all seven; with --share neither latent nor answers)",
    )
    entry.add_argument("--also", nargs="+", default=[], metavar="TOPIC", help="these too, such as /joint_states")
    entry.add_argument("--without", nargs="+", default=[], metavar="TOPIC", help="not these")
    entry.add_argument(
        "--jpeg-quality", type=_quality, default=90, metavar="Q", help="of images that come raw (default: %(default)s)"
    )
    entry.add_argument("--raw", action="store_true", help="keep raw images raw; 1080p at 30 Hz is 187 MB a second")
    entry.add_argument("--max-size", type=size, default=0, metavar="SIZE", help="end at so much, such as 20GB")
    entry.add_argument(
        "--split", type=size, default=10**9, metavar="SIZE", help="begin a new file at so much (default: 1GB)"
    )
    entry.add_argument(
        "--min-free", type=size, default=2 * 10**9, metavar="SIZE", help="leave so much of the disk free (default: 2GB)"
    )
    share = entry.add_argument_group("to be shared (docs/record.md says what this finds, and what it cannot)")
    share.add_argument(
        "--share",
        action="store_true",
        help="de-identify: keep the view into the body alone, blank text on it and views out of the body, remove names "
        "and times",
    )
    share.add_argument("--no-deidentify", action="store_true", help="with --share: change nothing; you answer for it")
    share.add_argument(
        "--mask",
        type=rectangle,
        action="append",
        default=[],
        metavar="X,Y,W,H",
        help="blank this rectangle too, in pixels; may be given again",
    )
    share.add_argument("--keep-times", action="store_true", help="with --share: keep the true times")
    entry.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Record, show how it goes, and say what was recorded. Returns the exit status."""
    share = options.share and not options.no_deidentify
    _check(options, share)
    try:
        from surg_perception.nodes import recorder
        from surg_perception.nodes.dds_profile import profile_environment
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("rclpy", "surg_perception_msgs"):
            raise
        print(
            "ROS 2 is not in this shell's environment: `source setup.bash` in the project's folder first",
            file=sys.stderr,
        )
        return 2
    settings = recorder.RecordOptions(
        folder=options.out,
        namespace=options.namespace,
        topics=_topics(options, recorder.TOPICS, recorder.NOT_SHARED if share else ()),
        image=options.image,
        seconds=options.seconds,
        jpeg_quality=0 if options.raw else options.jpeg_quality,
        max_bytes=options.max_size,
        split_bytes=options.split,
        min_free_bytes=options.min_free,
        share=share,
        rectangles=tuple(options.mask),
        shift_times=not options.keep_times,
    )
    variables, note = profile_environment()
    os.environ.update(variables)  # read when this process joins ROS
    if variables and note:
        print(note, file=sys.stderr)
    with _Shower() as show:
        progress = recorder.record(settings, show)
    for line in _summary(progress, options):
        print(line)
    problems = _problems(progress, {"image", *(options.topics or ()), *options.also})
    for line in problems:
        print(line, file=sys.stderr)
    if not progress.messages:
        print(f"nothing was recorded: {options.out} was not made", file=sys.stderr)
        return 2
    return 1 if problems else 0


def _check(options: argparse.Namespace, share: bool) -> None:
    if options.no_deidentify and not options.share:
        raise ValueError("--no-deidentify goes with --share; without --share nothing is de-identified anyway")
    if options.mask and not share:
        raise ValueError("--mask blanks in a de-identified recording: it goes with --share")
    if options.keep_times and not share:
        raise ValueError("--keep-times goes with --share; without --share the times are kept anyway")
    if options.raw and share:
        raise ValueError("--raw and --share exclude each other: de-identified images are written as JPEG")


def _topics(options: argparse.Namespace, known: dict[str, str], left_out: tuple[str, ...]) -> tuple[str, ...]:
    """Short and full names of what is wanted, each once.

    Raises:
        ValueError: a name that is neither, or nothing is left.
    """
    for name in (*(options.topics or ()), *options.also, *options.without):
        if name not in known and not name.startswith("/"):
            raise ValueError(f"{name!r} is no topic, expected one of {', '.join(known)}, or a whole name: /{name}")
    chosen = [*(options.topics or (name for name in known if name not in left_out)), *options.also]
    topics = tuple(name for name in dict.fromkeys(chosen) if name not in options.without)
    if not topics:
        raise ValueError("no topic is left: --without takes away all that --topics names")
    return topics


class _Shower:
    """Progress as one line that changes on a terminal, and as a line now and then elsewhere."""

    def __enter__(self) -> _Shower:
        from rich.console import Console
        from rich.live import Live

        self._console = Console(stderr=True)
        self._live = Live(console=self._console, refresh_per_second=5, transient=True)
        self._printed_s = time.monotonic()
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def __call__(self, progress: Progress) -> None:
        """Take the state of things."""
        if progress.waiting_for:
            line = f"waiting for {progress.waiting_for}"
        else:
            line = f"{progress.seconds:7.1f} s  {progress.bytes / 1e6:9.1f} MB  {progress.images} images"
            if progress.dropped:
                line += f"  {progress.dropped} dropped"
        if self._console.is_terminal:
            from rich.text import Text

            self._live.update(Text(line))
        elif time.monotonic() - self._printed_s >= _PLAIN_LINE_EVERY_S:
            self._printed_s = time.monotonic()
            print(line, file=sys.stderr, flush=True)


def _summary(progress: Progress, options: argparse.Namespace) -> list[str]:
    if not progress.messages:
        return []
    lines = [
        f"{options.out}: {progress.seconds:.1f} s, {progress.bytes / 1e6:.1f} MB, {progress.images} images; "
        f"ended: {progress.stopped_because}"
    ]
    lines += [f"  {count:7d}  {topic}" for topic, count in sorted(progress.messages.items())]
    if progress.shown:
        kept, learning, blanked = (progress.shown[kind] for kind in sorted(progress.shown))
        lines.append(
            f"  de-identified: {kept} images show the view into the body, {blanked} are blank (not in the body), "
            f"{learning} are blank (too little seen yet). Look at it before you share it: no machine finds every name"
        )
    elif options.share:
        lines.append("  NOT de-identified, as --no-deidentify asked")
    return lines


def _problems(progress: Progress, asked: set[str]) -> list[str]:
    """What makes the recording less than what was asked for, a line each."""
    lines = []
    if progress.failed:
        lines.append(f"ended early: {progress.stopped_because}")
    if progress.dropped:
        lines.append(f"{progress.dropped} messages were dropped: encoder or disk are too slow; lower rate or quality")
    if progress.lost:
        lines.append(f"{progress.lost} messages were lost on their way here (docs/large_images.md)")
    for reason, count in progress.unreadable.items():
        lines.append(f"{count} messages were left out: {reason}")
    for topic, reason in progress.refused.items():
        lines.append(f"not recorded: {reason if topic in reason else f'{topic}: {reason}'}")
    if progress.messages:
        lines += [f"nothing came of {name}" for name in progress.missing if name in asked]
    return lines
