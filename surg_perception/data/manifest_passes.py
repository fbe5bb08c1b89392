# SPDX-License-Identifier: Apache-2.0
"""Passes over the videos of a manifest: find duplicates, screen; write decisions and pictures for review.

A pass can be stopped and started again: each video's survey is kept in a cache. It writes decisions.csv at its
end, reading it anew before, so that what a person wrote meanwhile stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from surg_perception.data.decisions import Decision, Decisions, read_decisions, today
from surg_perception.data.duplicates import DuplicatePair, find_duplicates, propose_drops
from surg_perception.data.gensurgery import Manifest
from surg_perception.data.label_files import DatasetError
from surg_perception.data.screening import screen
from surg_perception.data.video_survey import (
    EVERY_S,
    MOST_FRAMES,
    Survey,
    cached_survey,
    clock,
    contact_sheet,
)

SCREEN = "screen v1"
DUPLICATES = "duplicates v1"
"""Who signs a row. Another number where another version would judge otherwise."""

_SHEET_FRAMES = 12
_SHEET_SEGMENTS = 40

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class PassResult:
    """What a pass did.

    Attributes:
        decisions: all rows now in decisions.csv.
        found: the pass's own rows.
        seen: ids of the videos looked at.
        unreadable: why a video could not be looked at, by id.
        away: ids of videos that are not here.
        pairs: of videos that share something (duplicates only).
    """

    decisions: Decisions
    found: tuple[Decision, ...]
    seen: tuple[str, ...]
    unreadable: dict[str, str]
    away: tuple[str, ...]
    pairs: tuple[DuplicatePair, ...] = ()


@dataclass(frozen=True)
class _Sheet:
    """Rows of a contact sheet: (heading, id of the video, times in s)."""

    video: str
    rows: list[tuple[str, str, list[float]]]


def cache_folder(manifest: Manifest) -> Path:
    """Where surveys are kept unless said otherwise."""
    return manifest.path.parent / ".survey-cache"


def review_folder(manifest: Manifest) -> Path:
    """Where pictures for review are written: <id>.screen.png, <id>.duplicates.png."""
    return manifest.path.parent / "review"


def screen_videos(
    manifest: Manifest,
    *,
    cache: Path | None = None,
    every_s: float = EVERY_S,
    most: int = MOST_FRAMES,
    progress: Progress | None = None,
) -> PassResult:
    """Drop what is no view into the body (`screening`), and videos that cannot be read.

    Nothing of an address is opened. progress is called with (id, share 0..1 of that video).
    """
    surveys, unreadable, away = _surveys(manifest, cache, every_s, most, progress)
    found = [
        Decision(name, None, None, "drop", f"unreadable: {why}", 1.0, SCREEN, today())
        for name, why in unreadable.items()
    ]
    sheets = []
    for name, survey in surveys.items():
        segments = screen(survey)
        rows = [Decision(name, s.start_s, s.end_s, "drop", s.reason, s.score, SCREEN, today()) for s in segments]
        lost_s = survey.duration_s - survey.times_s[-1]
        if lost_s > 2.0 + every_s and len(survey.times_s) < most:
            why = f"unreadable from here to the end ({lost_s:.0f} s)"
            rows.append(Decision(name, float(survey.times_s[-1]), None, "drop", why, 1.0, SCREEN, today()))
        found += rows
        if segments:
            sheets.append(
                _Sheet(name, [_sheet_row(row, survey) for row in rows[: min(len(segments), _SHEET_SEGMENTS)]])
            )
    return _written(manifest, SCREEN, found, surveys, unreadable, away, sheets, ())


def drop_duplicates(
    manifest: Manifest,
    *,
    mirrored: bool = False,
    cache: Path | None = None,
    every_s: float = EVERY_S,
    most: int = MOST_FRAMES,
    progress: Progress | None = None,
) -> PassResult:
    """Drop what another kept video shows too (`duplicates`).

    Videos that persons or screening drop as a whole are not compared, so nothing is dropped in favour of them; a
    stretch stays where its counterpart is dropped. Videos that a person keeps as a whole stay. progress as in
    `screen_videos`, then with ("", share of the pairs compared).
    """
    surveys, unreadable, away = _surveys(manifest, cache, every_s, most, progress)
    decisions = read_decisions(manifest.decisions_path).after_pass(DUPLICATES, surveys, ())
    compared = {name: survey for name, survey in surveys.items() if decisions.kept_spans(name)}

    def told(done: int, in_all: int) -> None:
        if progress:
            progress("", done / in_all)

    pairs = find_duplicates(compared, mirrored=mirrored, progress=told)
    stays = {row.video for row in decisions.rows if row.decision == "keep" and row.whole}
    found, sheets = [], dict[str, _Sheet]()
    for drop in propose_drops(pairs, compared, stays):
        overlap = drop.overlap
        pair = next(pair for pair in pairs if {pair.first, pair.second} == {drop.name, drop.kept})
        first = drop.name == pair.first
        here = overlap.start_s + (0.0 if first else overlap.offset_s)
        there = overlap.start_s + (overlap.offset_s if first else 0.0)
        kept = decisions.kept_spans(drop.kept)
        kept_s = sum(max(0.0, min(b, there + overlap.duration_s) - max(a, there)) for a, b in kept)
        if kept_s < 0.5 * overlap.duration_s:
            continue
        shift = f"{'mirrored, ' if overlap.mirrored else ''}at {clock(here)} what {drop.kept} has at {clock(there)}"
        reason = f"duplicate of {drop.kept}: {shift}"
        row = Decision(drop.name, drop.start_s, drop.end_s, "drop", reason, drop.score, DUPLICATES, today())
        found.append(row)
        times_s = _spread(here, here + overlap.duration_s, 6)
        sheet = sheets.setdefault(drop.name, _Sheet(drop.name, []))
        sheet.rows.append((f"drop {drop.name}: {reason}", drop.name, times_s))
        sheet.rows.append((f"keep {drop.kept}", drop.kept, [time_s + there - here for time_s in times_s]))
    return _written(manifest, DUPLICATES, found, surveys, unreadable, away, sheets.values(), tuple(pairs))


def _surveys(
    manifest: Manifest, cache: Path | None, every_s: float, most: int, progress: Progress | None
) -> tuple[dict[str, Survey], dict[str, str], tuple[str, ...]]:
    """(surveys, reasons why others are unreadable, those that are not here), by id."""
    for package in ("av", "imagehash"):  # else every video would seem unreadable
        if find_spec(package) is None:
            raise ImportError(f"looking through videos needs the package {package}; install it")
    surveys: dict[str, Survey] = {}
    unreadable: dict[str, str] = {}
    away = []
    for row in manifest.rows:
        file = manifest.file_of(row)
        if file is None or not file.is_file():
            away.append(row.id)
            continue

        def told(share: float, name: str = row.id) -> None:
            if progress:
                progress(name, share)

        told(0.0)
        try:
            surveys[row.id] = cached_survey(
                file, cache or cache_folder(manifest), every_s=every_s, most=most, progress=told
            )
        except DatasetError as error:
            unreadable[row.id] = str(error).replace(str(file), row.source)
        told(1.0)
    return surveys, unreadable, tuple(away)


def _written(
    manifest: Manifest,
    by: str,
    found: list[Decision],
    surveys: dict[str, Survey],
    unreadable: dict[str, str],
    away: tuple[str, ...],
    sheets: Iterable[_Sheet],
    pairs: tuple[DuplicatePair, ...],
) -> PassResult:
    seen = (*surveys, *(unreadable if by == SCREEN else ()))
    review, kind = review_folder(manifest), by.partition(" ")[0]
    for name in seen:
        (review / f"{name}.{kind}.png").unlink(missing_ok=True)
    for sheet in sheets:
        rows = [(heading, _file(manifest, name), times_s) for heading, name, times_s in sheet.rows]
        contact_sheet(rows, review / f"{sheet.video}.{kind}.png")
    decisions = read_decisions(manifest.decisions_path).after_pass(by, seen, found)
    decisions.write()
    own = tuple(row for row in decisions.rows if row.machine == kind and row.video in seen)
    return PassResult(decisions, own, tuple(surveys), unreadable, away, pairs)


def _file(manifest: Manifest, name: str) -> Path:
    file = manifest.file_of(manifest.row(name))
    assert file is not None, "only files are surveyed"
    return file


def _sheet_row(row: Decision, survey: Survey) -> tuple[str, str, list[float]]:
    start_s, end_s = row.span
    end_s = min(end_s, float(survey.times_s[-1]) + 0.1)
    heading = f"{row.video} {clock(start_s)} to {clock(end_s)}: {row.reason} (score {row.score:.2f})"
    return heading, row.video, _spread(start_s, end_s, _SHEET_FRAMES)


def _spread(start_s: float, end_s: float, most: int) -> list[float]:
    """Times in the middles of equal parts of a stretch, at most two a second."""
    count = max(1, min(most, int(2 * (end_s - start_s))))
    return (start_s + (np.arange(count) + 0.5) / count * (end_s - start_s)).tolist()
