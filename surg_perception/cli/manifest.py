# SPDX-License-Identifier: Apache-2.0
"""`surg-perception data manifest | duplicates | screen | review`: manifests of videos in the manner of GenSurgery."""

from __future__ import annotations

import argparse
import getpass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from surg_perception.data.manifest_passes import PassResult, Progress

_NOTES = 20


def add_actions(actions: Any) -> None:
    """Add the actions to the verb `data`."""
    manifest = actions.add_parser("manifest", help="a table of videos with procedure and approach (docs/gensurgery.md)")
    what = manifest.add_subparsers(dest="manifest_action", required=True, metavar="ACTION")
    entry = what.add_parser("import", help="make a manifest from lists of addresses, one text file per procedure")
    entry.add_argument("lists", type=Path, help="folder of the text files")
    entry.add_argument("--out", type=Path, required=True, metavar="FILE", help="manifest to write, a CSV")
    entry.add_argument("--media", type=Path, metavar="DIR", help="folder with the videos, found by id in their names")
    entry.set_defaults(run=_import)
    entry = what.add_parser("resolve", help="find the files of addresses by id in their names")
    entry.add_argument("file", type=Path, help="the manifest, which is rewritten")
    entry.add_argument("media", type=Path, help="folder with the videos")
    entry.set_defaults(run=_resolve)
    entry = what.add_parser("check", help="what is wrong with a manifest, and what is not here")
    entry.add_argument("file", type=Path)
    entry.set_defaults(run=_check)

    for action, text, run in (
        ("duplicates", "find recordings that are in two videos of a manifest, and drop the lesser copy", _duplicates),
        ("screen", "drop title cards, views out of the body, blank screens and non-surgical videos", _screen),
    ):
        entry = actions.add_parser(action, help=text)
        entry.add_argument("file", type=Path, help="the manifest")
        entry.add_argument("--every", type=float, default=0.5, metavar="S", help="seconds between frames (0.5)")
        entry.add_argument("--most", type=int, default=20_000, metavar="N", help="frames of a video at most (20000)")
        entry.add_argument("--cache", type=Path, metavar="DIR", help="default: .survey-cache beside the manifest")
        if action == "duplicates":
            entry.add_argument("--mirrored", action="store_true", help="find mirror images too (twice the comparing)")
        entry.set_defaults(run=run)

    entry = actions.add_parser("review", help="what is kept and dropped of a manifest, and say otherwise")
    entry.add_argument("file", type=Path, help="the manifest")
    say = entry.add_mutually_exclusive_group()
    say.add_argument("--keep", metavar="ID", help="keep this video, whatever a machine finds")
    say.add_argument("--drop", metavar="ID", help="drop this video")
    say.add_argument("--undo", metavar="ID", help="take all decisions on this video back")
    entry.add_argument("--reason", default="", help="why; needed with --drop")
    entry.add_argument("--from", dest="start_s", type=float, metavar="S", help="only from this second")
    entry.add_argument("--to", dest="end_s", type=float, metavar="S", help="only to this second")
    entry.add_argument("--by", metavar="NAME", help="your name (default: your user name)")
    entry.set_defaults(run=_review)


def _import(options: argparse.Namespace) -> int:
    from surg_perception.data.gensurgery import ManifestError, import_address_lists, resolve, write_manifest

    if options.out.exists():
        raise ManifestError(f"{options.out} is there already; give another name, or remove it yourself")
    manifest, notes = import_address_lists(options.lists, options.out)
    if options.media:
        manifest, more = resolve(manifest, options.media)
        notes += more
    write_manifest(manifest)
    _print_notes(notes)
    here = sum(not row.is_address for row in manifest.rows)
    print(f"{options.out}: {len(manifest.rows)} videos, {here} of them here. Nothing was downloaded.")
    return 0


def _resolve(options: argparse.Namespace) -> int:
    from surg_perception.data.gensurgery import read_manifest, resolve, write_manifest

    manifest, notes = resolve(read_manifest(options.file), options.media)
    write_manifest(manifest)
    _print_notes(notes)
    print(
        f"{options.file}: {sum(not row.is_address for row in manifest.rows)} of {len(manifest.rows)} videos have files"
    )
    return 0


def _check(options: argparse.Namespace) -> int:
    from collections import Counter

    from rich.console import Console
    from rich.table import Table

    from surg_perception.data.decisions import read_decisions
    from surg_perception.data.gensurgery import check_manifest, kept_videos, read_manifest

    manifest = read_manifest(options.file)
    decisions = read_decisions(manifest.decisions_path)
    _print_notes(check_manifest(manifest))
    ids = {row.id for row in manifest.rows}
    _print_notes(
        sorted(
            f"{row.video}: decided on in {decisions.path.name}, not in the manifest"
            for row in decisions.rows
            if row.video not in ids
        )
    )
    table = Table("procedure", "laparoscopic", "robotic", "unknown")
    counts = Counter((row.procedure, row.approach) for row in manifest.rows)
    for procedure in sorted({row.procedure for row in manifest.rows}):
        table.add_row(procedure, *(str(counts[procedure, name]) for name in ("laparoscopic", "robotic", "unknown")))
    Console().print(table)
    kept = kept_videos(manifest, decisions)
    print(f"{len(manifest.rows)} videos; {len(kept)} are here and kept, at least in part")
    return 0


def _screen(options: argparse.Namespace) -> int:
    from surg_perception.data.gensurgery import read_manifest
    from surg_perception.data.manifest_passes import screen_videos

    manifest = read_manifest(options.file)
    with _Bar("screen", len(manifest.rows)) as progress:
        result = screen_videos(
            manifest, cache=options.cache, every_s=options.every, most=options.most, progress=progress
        )
    return _report(result, options.file)


def _duplicates(options: argparse.Namespace) -> int:
    from surg_perception.data.duplicates import duplicate_groups
    from surg_perception.data.gensurgery import read_manifest
    from surg_perception.data.manifest_passes import drop_duplicates

    manifest = read_manifest(options.file)
    with _Bar("hash", len(manifest.rows)) as progress:
        result = drop_duplicates(
            manifest,
            mirrored=options.mirrored,
            cache=options.cache,
            every_s=options.every,
            most=options.most,
            progress=progress,
        )
    for pair in result.pairs:
        offset = ", ".join(f"{overlap.offset_s:+.1f} s" for overlap in pair.overlaps)
        print(f"{pair.first} and {pair.second}: share {pair.overlap_s:.1f} s, score {pair.score:.2f}, offset {offset}")
    for group in duplicate_groups(result.pairs):
        print(f"group: {', '.join(group)}")
    return _report(result, options.file)


def _report(result: PassResult, file: Path) -> int:
    for name, why in result.unreadable.items():
        print(f"unreadable: {name}: {why}")
    for row in result.found:
        where = "whole" if row.whole else f"{row.start_s or 0:g} s to {row.end_s or 'end'} s"
        print(f"drop {row.video} ({where}): {row.reason}")
    print(
        f"{len(result.seen)} videos looked at, {len(result.unreadable)} unreadable, {len(result.away)} not here;"
        f" {len(result.found)} parts dropped in {result.decisions.path}.\n"
        f"Look at the pictures in {file.parent / 'review'}; `surg-perception data review {file}` changes a decision."
    )
    return 0


def _review(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from surg_perception.data.decisions import Decision, read_decisions, today
    from surg_perception.data.gensurgery import ManifestError, read_manifest

    manifest = read_manifest(options.file)
    decisions = read_decisions(manifest.decisions_path)
    name = options.keep or options.drop or options.undo
    if name is None:
        table = Table("video", "part", "decision", "reason", "score", "by", "date")
        for row in decisions.rows:
            end = "end" if row.end_s is None else f"{row.end_s:g}"
            part = "whole" if row.whole else f"{row.start_s or 0:g} to {end} s"
            score = "" if row.score is None else f"{row.score:.2f}"
            table.add_row(row.video, part, row.decision, row.reason, score, row.by, row.date)
        Console().print(table)
        dropped = sum(not decisions.kept_spans(row.id) for row in manifest.rows)
        print(f"{len(decisions.rows)} decisions; {dropped} of {len(manifest.rows)} videos are dropped as a whole")
        return 0
    manifest.row(name)
    if options.undo:
        decisions, gone = decisions.undone(name)
        decisions.write()
        for row in gone:
            print(f"taken back: {row.decision} {row.reason} ({row.by}, {row.date})")
        print(f"{name} is kept whole; a machine may drop it again, `--keep {name}` prevents that")
        return 0
    if options.drop and not options.reason:
        raise ManifestError("--drop needs --reason, so that others can judge it")
    decision = "keep" if options.keep else "drop"
    by = options.by or getpass.getuser()
    row = Decision(name, options.start_s, options.end_s, decision, options.reason, None, by, today())
    decisions = decisions.said(row)
    decisions.write()
    spans = decisions.kept_spans(name)
    kept = ", ".join(f"{a:g} to {'the end' if b == float('inf') else f'{b:g}'} s" for a, b in spans) or "nothing"
    print(f"{name}: {decision} by {by}; kept now: {kept}")
    return 0


def _print_notes(notes: list[str]) -> None:
    for note in notes[:_NOTES]:
        print(note)
    if len(notes) > _NOTES:
        print(f"… and {len(notes) - _NOTES} more")


class _Bar:
    """Progress over the videos of a pass, then over the comparing, on the error output."""

    def __init__(self, what: str, videos: int) -> None:
        self._what, self._videos = what, max(1, videos)
        self._name, self._done = "", 0

    def __enter__(self) -> Progress:
        from rich.console import Console
        from rich.progress import Progress

        self._progress = Progress(console=Console(stderr=True))
        self._task = self._progress.add_task(self._what, total=self._videos)
        self._progress.start()
        return self._told

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()

    def _told(self, name: str, share: float) -> None:
        if not name:
            self._progress.update(self._task, description="compare", completed=share, total=1.0)
            return
        self._done += name != self._name and self._name != ""
        self._name = name
        self._progress.update(self._task, description=f"{self._what} {name}", completed=self._done + share)
