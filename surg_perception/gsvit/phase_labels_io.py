# SPDX-License-Identifier: Apache-2.0
"""Phase labels and predictions in Cholec80's text format: `video41-phase.txt` with `Frame<tab>Phase` lines.

As such files are met: phases by name (several spellings) or by number (from 0 or from 1), one line per frame
at 25 fps, per second with 25 fps frame numbers (0, 25, 50, …), or per second with plain counters (0, 1, 2, …),
with or without a header. What a file means is decided from all files of a folder, and of both folders.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from surg_perception.data.label_files import DatasetError, phase_index, read_phase_rows
from surg_perception.gsvit.phase_metrics import VideoPhases

FRAME_RATE_HZ = 25
"""Of the Frame column in Cholec80 and M2CAI16."""

FRAME_UNITS = ("auto", "frames", "seconds")
# The shortest Cholec80 surgery has 18,475 frames, the longest 5,993 seconds: a file that counts by ones up to
# here is taken to count seconds, a longer one frames.
_LONGEST_IN_SECONDS = 12000
# A prediction may lack this much of the truth (or the truth of it), at the ends or in gaps, without an error.
_TOLERATED_S, _TOLERATED_SHARE = 5.0, 0.01


class PhaseFileError(DatasetError):
    """Phase files that cannot be used: what was found, what was expected and what to do."""


@dataclass(frozen=True)
class PhaseTrack:
    """One file as read: `frames` int64 [n] of its first column (increasing), `entries` its second, as text."""

    name: str
    path: Path
    frames: NDArray[np.int64]
    entries: tuple[str, ...]

    @property
    def step(self) -> float:
        """Usual difference between lines of the Frame column; 1 for a single line."""
        return float(np.median(np.diff(self.frames))) if len(self.frames) > 1 else 1.0


def read_phase_file(path: str | Path) -> PhaseTrack:
    """Read one file, without judging what its numbers mean.

    As `read_phase_rows`: tabs, commas or spaces between the columns, with or without a header.

    Raises:
        DatasetError: not text, empty, a line without two columns, a frame that is no whole number, or frames
            that do not increase; the line is named.
    """
    path = Path(path)
    rows, faults = read_phase_rows(path, rate_hz=FRAME_RATE_HZ)
    faults.check(path)
    frames = rows.frames if rows.frames is not None else np.rint(np.array(rows.start_s) * FRAME_RATE_HZ)
    return PhaseTrack(video_name(path), path, np.asarray(frames, np.int64), tuple(rows.names))


def read_phase_folder(folder: str | Path, videos: Iterable[str] | None = None) -> dict[str, PhaseTrack]:
    """The .txt files of a folder by video, in order of name.

    Args:
        folder: where they lie; folders inside it are not looked at.
        videos: only these ("video41", "41"); all unless told.

    Raises:
        PhaseFileError: no such folder, no file in it, a video without a file, two files of one video.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise PhaseFileError(f"there is no folder {folder}")
    paths: dict[str, Path] = {}
    for path in sorted(folder.glob("*.txt")):
        name = video_name(path)
        if name in paths:
            raise PhaseFileError(f"{folder}: {paths[name].name} and {path.name} are both of {name}; keep one")
        paths[name] = path
    if not paths:
        raise PhaseFileError(f"{folder} holds no .txt file, expected one per video such as video41-phase.txt")
    if videos is not None:
        paths = {name: paths[name] for name in dict.fromkeys(match_video(video, paths, folder) for video in videos)}
    return {name: read_phase_file(path) for name, path in paths.items()}


def video_name(path: Path) -> str:
    """Name of a file's video: video41-phase.txt, video41_pred.txt and video41.txt are all of video41."""
    return re.sub(r"(?i)([-_.](phases?|pred(iction)?s?|gt|labels?))+$", "", path.stem)


def video_number(name: str) -> int | None:
    """The number at the end of a video's name: 41 of video41; None where there is none."""
    match = re.search(r"(\d+)$", name)
    return int(match[1]) if match else None


def match_video(video: str, names: Iterable[str], where: object) -> str:
    """The one of `names` that is meant by `video`: the same name, or the only one that ends in the same number.

    Raises:
        PhaseFileError: none, or several.
    """
    names = list(names)
    if video in names:
        return video
    number = video_number(video)
    found = [name for name in names if number is not None and video_number(name) == number]
    if len(found) != 1:
        shown = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
        raise PhaseFileError(f"{where} has no video {video!r}; it has {shown}")
    return found[0]


def phase_indices(
    tracks: Mapping[str, PhaseTrack], phases: Sequence[str], first_number: int | None
) -> dict[str, NDArray[np.int64]]:
    """Indices 0..C-1 into `phases` for each file of one folder.

    Args:
        tracks: the files, read as one: all by number with one origin, or by name.
        phases: names.
        first_number: the number of the first phase, 0 or 1, where files hold numbers.

    Raises:
        PhaseFileError: an unknown name or a number out of range; file and line are named.
    """
    indices = {}
    for name, track in tracks.items():
        lookup: dict[str, int] = {}
        for entry in set(track.entries):
            number = _whole(entry)
            index = phase_index(entry, phases) if number is None else number - (first_number or 0)
            if index is None or not 0 <= index < len(phases):
                row = track.entries.index(entry)
                wanted = (
                    f"one of {', '.join(phases)}"
                    if number is None
                    else f"{first_number or 0}..{len(phases) - 1 + (first_number or 0)}"
                )
                raise PhaseFileError(
                    f"{track.path}, frame {track.frames[row]}: phase {entry!r} is unknown, expected {wanted}"
                )
            lookup[entry] = index
        indices[name] = np.array([lookup[entry] for entry in track.entries], np.int64)
    return indices


def first_phase_number(tracks: Mapping[str, PhaseTrack], num_phases: int) -> int | None:
    """0 or 1 where the numbers of a folder tell (a 0, or C itself, occurs), None where they do not.

    Raises:
        PhaseFileError: both occur.
    """
    numbers = {
        number for track in tracks.values() for entry in set(track.entries) if (number := _whole(entry)) is not None
    }
    if {0, num_phases} <= numbers:
        raise PhaseFileError(
            f"{next(iter(tracks.values())).path.parent}: phases 0 and {num_phases} both occur; "
            f"expected 0..{num_phases - 1} or 1..{num_phases}"
        )
    if 0 in numbers:
        return 0
    return 1 if num_phases in numbers else None


def align_folders(
    truths: Mapping[str, PhaseTrack],
    predictions: Mapping[str, PhaseTrack],
    phases: Sequence[str],
    *,
    first_number: int | None = None,
    frame_unit: str = "auto",
    rate_hz: float | None = 1.0,
) -> tuple[list[VideoPhases], list[str]]:
    """Bring truth and prediction of each predicted video together, by the Frame column.

    Phases by number count from `first_number`; where that is None it is 0 if a 0 occurs in the folder and 1 if
    C occurs; where neither occurs it is that of the other folder, else 0, and a note says so.

    The Frame column counts frames at 25 fps, or seconds: `frame_unit` says so. With "auto", steps above 1 are
    frames; steps of 1 are told by the other file (whichever of frames or seconds makes both equally long),
    and where both step by 1 by the length (up to 12,000 lines are seconds).

    Samples are those that both files have, thinned to at most `rate_hz` (the first of each second; None: all).
    A file may lack 1 % of the other's length, at least 5 s, at the ends or in gaps; a note says so.

    Args:
        truths: by video; may hold videos without a prediction, which are left out.
        predictions: by video.
        phases: names.
        first_number: 0 or 1, or None to tell from the files.
        frame_unit: one of `FRAME_UNITS`, of both folders.
        rate_hz: of the evaluation.

    Returns:
        The videos in order of name, and what the reader of the numbers should know about all of them.

    Raises:
        PhaseFileError: a prediction without truth, files that do not cover the same time, unknown phases.
    """
    if frame_unit not in FRAME_UNITS:
        raise PhaseFileError(f"frame unit {frame_unit!r}, expected one of {', '.join(FRAME_UNITS)}")
    pairs = {name: match_video(name, truths, _folder(truths)) for name in predictions}
    notes: list[str] = []
    used = {name: truths[name] for name in pairs.values()}
    numbers = _first_numbers(used, predictions, len(phases), first_number, notes)
    true_ids = phase_indices(used, phases, numbers[0])
    predicted_ids = phase_indices(predictions, phases, numbers[1])

    videos = []
    for name, true_name in sorted(pairs.items()):
        truth, prediction = _at_25_fps(used[true_name], predictions[name], frame_unit)
        frames, at_truth, at_prediction = np.intersect1d(
            truth.frames, prediction.frames, assume_unique=True, return_indices=True
        )
        video_notes = _check_cover(truth, prediction, frames)
        keep = _thinned(frames, rate_hz)
        videos.append(
            VideoPhases(
                name=true_name,
                times_s=frames[keep] / FRAME_RATE_HZ,
                truth=true_ids[true_name][at_truth[keep]],
                prediction=predicted_ids[name][at_prediction[keep]],
                notes=tuple(video_notes),
            )
        )
    return videos, notes


def write_phase_file(path: str | Path, times_s: ArrayLike, indices: ArrayLike, phases: Sequence[str]) -> Path:
    """Write `Frame<tab>Phase` lines, as Cholec80 has them; returns the path.

    Args:
        path: the file; written whole or not at all.
        times_s: [n] in seconds from the start of the video; Frame is 25 times that, rounded.
        indices: [n], 0..C-1; samples of -1 (unknown) get no line.
        phases: names.

    Raises:
        PhaseFileError: two samples on one frame number (more than 25 samples per second).
    """
    path = Path(path)
    ids = np.asarray(indices, np.int64)
    frames = np.rint(np.asarray(times_s, np.float64) * FRAME_RATE_HZ).astype(np.int64)
    if (np.diff(frames) <= 0).any():
        raise PhaseFileError(
            f"{path.name}: samples lie closer than 1/{FRAME_RATE_HZ} s, which this format cannot hold; "
            "evaluate at a lower rate"
        )
    lines = [f"{frame}\t{phases[index]}\n" for frame, index in zip(frames, ids, strict=True) if index >= 0]
    partial = path.with_name(f"{path.name}.part")
    partial.write_text("".join(["Frame\tPhase\n", *lines]), "utf-8")
    return partial.replace(path)


def _whole(text: str) -> int | None:
    """The whole number that a text is ("3", "3.0"); None if it is none."""
    match = re.fullmatch(r"([+-]?\d+)(\.0*)?", text.strip())
    return int(match[1]) if match else None


def _folder(tracks: Mapping[str, PhaseTrack]) -> Path:
    return next(iter(tracks.values())).path.parent


def _first_numbers(
    truths: Mapping[str, PhaseTrack],
    predictions: Mapping[str, PhaseTrack],
    num_phases: int,
    asked: int | None,
    notes: list[str],
) -> tuple[int, int]:
    if asked is not None:
        return asked, asked
    found = [first_phase_number(tracks, num_phases) for tracks in (truths, predictions)]
    chosen = []
    for tracks, own, other in ((truths, found[0], found[1]), (predictions, found[1], found[0])):
        numbered = any(_whole(entry) is not None for track in tracks.values() for entry in set(track.entries))
        number = own if own is not None else (other or 0)
        if numbered and own is None:
            notes.append(
                f"{_folder(tracks).name}: neither phase 0 nor phase {num_phases} occurs, so the files do not tell "
                f"where their numbers start; taken as {number}..{num_phases - 1 + number}"
            )
        chosen.append(number)
    return chosen[0], chosen[1]


def _at_25_fps(truth: PhaseTrack, prediction: PhaseTrack, unit: str) -> tuple[PhaseTrack, PhaseTrack]:
    """Both files with a Frame column that counts frames at 25 fps."""
    tracks = (truth, prediction)
    by_ones = [track.step <= 1 for track in tracks]
    lengths = [track.frames[-1] + track.step for track in tracks]
    if unit != "auto":
        in_seconds = [unit == "seconds"] * 2
    elif all(by_ones) and max(lengths) < 5 * min(lengths):
        in_seconds = [max(lengths) <= _LONGEST_IN_SECONDS] * 2
    else:
        # The same video in frames is 25 times as long as in seconds.
        in_seconds = [by_ones[i] and lengths[i] * 5 <= lengths[1 - i] for i in (0, 1)]
    factors = [FRAME_RATE_HZ if seconds else 1 for seconds in in_seconds]
    return replace(truth, frames=truth.frames * factors[0]), replace(prediction, frames=prediction.frames * factors[1])


def _check_cover(truth: PhaseTrack, prediction: PhaseTrack, common: NDArray[np.int64]) -> list[str]:
    """Notes on what one file lacks of the other; an error where that is too much to overlook."""
    notes = []
    grid = max(truth.step, prediction.step)  # between lines of the coarser file nothing is lacking
    for one, other in ((truth, prediction), (prediction, truth)):
        length_s = len(one.frames) * one.step / FRAME_RATE_HZ
        lacking_s = length_s
        if len(common):
            right = np.searchsorted(common, one.frames).clip(0, len(common) - 1)
            left = (right - 1).clip(0)
            distance = np.minimum(abs(common[right] - one.frames), abs(common[left] - one.frames))
            lacking_s = float((distance > grid / 2).sum() * one.step / FRAME_RATE_HZ)
        if lacking_s > max(_TOLERATED_S, _TOLERATED_SHARE * length_s):
            raise PhaseFileError(
                f"{other.path} lacks about {lacking_s:.0f} of the {length_s:.0f} s of {one.path} (frames at 25 fps: "
                f"{_span(other)}, against {_span(one)}). They must cover the same time: check that both are of the "
                "same video, and set what the Frame column counts if it was taken wrongly"
            )
        if lacking_s * FRAME_RATE_HZ >= grid:
            notes.append(f"{other.path.name} lacks {lacking_s:.1f} s of its counterpart: left out of the scores")
    return notes


def _span(track: PhaseTrack) -> str:
    return f"{track.frames[0]}..{track.frames[-1]} in {len(track.frames)} lines"


def _thinned(frames: NDArray[np.int64], rate_hz: float | None) -> NDArray[np.int64]:
    """Indices of the first sample in each period of 1/rate_hz; all where samples are no denser or rate_hz is None."""
    if rate_hz is None or len(frames) < 2 or np.median(np.diff(frames)) * rate_hz >= FRAME_RATE_HZ:
        return np.arange(len(frames))
    return np.unique(np.floor(frames * rate_hz / FRAME_RATE_HZ + 1e-9), return_index=True)[1]
