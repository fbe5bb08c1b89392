# SPDX-License-Identifier: Apache-2.0
"""Surgical videos second by second: which instrument does what to what, where, in which phase, and the frame shown.

`open_clip_videos` reads CholecT50, the phantom, and data sets with tool or phase labels alone (Cholec80). Opening
reads labels, never a picture. docs/questions.md says what is made of them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surg_perception.data.datasets import Dataset, Video, find_layout, open_dataset
from surg_perception.data.frame_readers import FrameReader, PhantomFrames
from surg_perception.data.label_files import DatasetError, nearest
from surg_perception.data.labels import (
    CHOLEC80_PHASES,
    CHOLEC80_TOOLS,
    CHOLECT50_INSTRUMENTS,
    CHOLECT50_TARGETS,
    CHOLECT50_VERBS,
)

STILL_S = 4
"""Seconds for which a frame without neighbours in time is shown: one segment of the model."""

OLDEST_S = 2
"""A second shows a frame at most this much older than it."""

TOOL_NAMES = tuple("specimen_bag" if tool == "SpecimenBag" else tool.lower() for tool in CHOLEC80_TOOLS)
"""CHOLEC80_TOOLS spelled as CHOLECT50_INSTRUMENTS are."""

# CholecT50's rows: EndoVis 2022 / CAMMA, https://github.com/CAMMA-public/cholect50, "Data format".
_INSTRUMENT, _BOX, _VERB, _TARGET = 1, slice(3, 7), 7, 8
_CACHE_FORMAT = 1


@dataclass(frozen=True)
class InstrumentState:
    """One instrument in view.

    Attributes:
        instrument: of CHOLECT50_INSTRUMENTS, or "specimen_bag" in Cholec80.
        verb, target: of CHOLECT50_VERBS and CHOLECT50_TARGETS; "null_verb" and "null_target" where it does nothing;
            "" where it is not annotated.
        box: (left, top, width, height) in shares of the frame, 0..1; None where it is not annotated.
    """

    instrument: str
    verb: str = ""
    target: str = ""
    box: tuple[float, float, float, float] | None = None

    @property
    def centre(self) -> tuple[float, float] | None:
        """Centre (x, y) of the box, in shares of the frame from its upper left corner."""
        return None if self.box is None else (self.box[0] + self.box[2] / 2, self.box[1] + self.box[3] / 2)


@dataclass(frozen=True)
class SecondLabels:
    """What is known of one second.

    Attributes:
        phase: name as in the data set's label set (CHOLEC80_PHASES); None unknown.
        instruments: those in view, in the order of the labels; None where the second has no instrument label.
    """

    phase: str | None
    instruments: tuple[InstrumentState, ...] | None


@dataclass(frozen=True, eq=False)
class ClipVideo:
    """Seconds without a gap, at one frame each.

    Attributes:
        name: unique: the video's name and, after "@", the second of the video at which it begins ("VID68@0016").
        video: the video's name; clips of one video must not be split between training and test.
        seconds: labels of each second: those of the frame that is shown, [n].
        vocabulary: instruments that are annotated; others are not known to be absent.
        hold_s: 1 for moving video; STILL_S where every frame stands alone and is shown for that long, so that seconds
            0-3, 4-7, … are each one still.
        reader, indices: the frame of second i is the reader's indices[i].
    """

    name: str
    video: str
    seconds: tuple[SecondLabels, ...]
    vocabulary: tuple[str, ...]
    hold_s: int
    reader: FrameReader
    indices: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.seconds)

    def frames(self, seconds: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
        """Frames uint8 BGR [H, W, 3] of the seconds, in the order given; equal ones in a row are read once.

        Raises IndexError for a second out of range and DatasetError where a frame cannot be read.
        """
        for second in seconds:
            if not 0 <= second < len(self):
                raise IndexError(f"{self.name}: second {second} found, expected 0 to {len(self) - 1}")
        wanted = [self.indices[second] for second in seconds]
        changes = [index for i, index in enumerate(wanted) if i == 0 or index != wanted[i - 1]]
        frames = self.reader.read(changes)
        for i, index in enumerate(wanted):
            if i == 0 or index != wanted[i - 1]:
                frame = next(frames)
            yield frame

    def fingerprint(self) -> str:
        """Changes when the pictures do: their source, or which of them is shown in which second."""
        return hashlib.sha256(f"{self.reader.fingerprint()}\n{self.indices}".encode()).hexdigest()[:24]


def open_clip_videos(path: str | Path, *, stills: bool = False, labelled: bool = True) -> list[ClipVideo]:
    """Open a data set as clips at one frame a second.

    Second i shows the newest frame at or before i, at most OLDEST_S old; a longer gap begins a new clip. Where frames
    are further apart than that throughout (Cholec80 at one frame in 4 s), each is shown for STILL_S seconds.

    Args:
        path: as in `open_dataset`: a folder (CholecT50: videos/ and labels/; Cholec80, …), a video file, or
            "phantom:seeds=1000-1009,duration_s=120". The phantom's labels are kept in the user's cache.
        stills: give the frames of clips shorter than STILL_S seconds as stills, in one clip "<video>+stills" per video
            in place of those clips.
        labelled: refuse a data set of which nothing is labelled.

    Raises DatasetError where the data set or its labels cannot be used.
    """
    dataset = open_dataset(path)
    files = {}
    if dataset.kind == "cholect50":
        files = {entry.name: entry.phases for entry in find_layout(dataset.path, "cholect50").entries}
    clips: list[ClipVideo] = []
    for video in dataset.videos:
        labels, vocabulary = _labels_of(dataset, video, files.get(video.name))
        clips += _clips(video, labels, vocabulary, stills)
    known = any(second.phase or second.instruments is not None for clip in clips for second in clip.seconds)
    if labelled and not known:
        raise DatasetError(f"{path}: no phase and no instrument is labelled; questions need labels (docs/questions.md)")
    return clips


def select_groups(videos: Sequence[ClipVideo], names: Sequence[str]) -> list[ClipVideo]:
    """Clips of the videos named. Raises DatasetError for a name that no clip has."""
    known = list(dict.fromkeys(clip.video for clip in videos))
    for name in names:
        if name not in known:
            like = nearest(name, known)
            there = ", ".join(known[:8]) + (", …" if len(known) > 8 else "")
            raise DatasetError(
                f"there is no video {name!r}; " + (f"did you mean {like!r}?" if like else f"expected {there}")
            )
    return [clip for clip in videos if clip.video in names]


def split_groups(videos: Sequence[ClipVideo], held_out: Sequence[str]) -> tuple[list[ClipVideo], list[ClipVideo]]:
    """(the rest, held out): clips parted by the name of their video, so that no video is in both.

    Raises DatasetError for a name that no clip has, and where one side would be empty.
    """
    held = select_groups(videos, held_out)
    rest = [clip for clip in videos if clip.video not in held_out]
    if not held or not rest:
        raise DatasetError(f"{len(held)} of {len(videos)} clips held out; expected at least one on each side")
    return rest, held


def _clips(video: Video, labels: Sequence[SecondLabels], vocabulary: tuple[str, ...], stills: bool) -> list[ClipVideo]:
    times = np.floor(video.times_s + 1e-6).astype(int).tolist()
    shown: dict[int, int] = {}  # second of the video -> index of its frame
    for index, second in enumerate(times):
        shown[second] = index
    frames = sorted(shown)
    if len(frames) > 1 and min(np.diff(frames)) > OLDEST_S + 1:
        return [_stills(video, [shown[second] for second in frames], labels, vocabulary)]
    runs: list[list[int]] = []
    for second in frames:
        if runs and second - times[runs[-1][-1]] <= OLDEST_S + 1:
            runs[-1] += [runs[-1][-1]] * (second - times[runs[-1][-1]] - 1) + [shown[second]]
        else:
            runs.append([shown[second]])
    clips, lone = [], []
    for run in runs:
        if stills and len(run) < STILL_S:
            lone += list(dict.fromkeys(run))
            continue
        name = f"{video.name}@{times[run[0]]:04d}"
        seconds = tuple(labels[index] for index in run)
        clips.append(ClipVideo(name, video.name, seconds, vocabulary, 1, video.reader, tuple(run)))
    if lone:
        clips.append(_stills(video, lone, labels, vocabulary))
    return clips


def _stills(video: Video, frames: list[int], labels: Sequence[SecondLabels], vocabulary: tuple[str, ...]) -> ClipVideo:
    held = tuple(index for index in frames for _ in range(STILL_S))
    seconds = tuple(labels[index] for index in held)
    return ClipVideo(f"{video.name}+stills", video.name, seconds, vocabulary, STILL_S, video.reader, held)


def _labels_of(dataset: Dataset, video: Video, file: Path | None) -> tuple[list[SecondLabels], tuple[str, ...]]:
    """Labels of each sampled time of a video, and the instruments that are annotated."""
    phases = [dataset.phases[index] if index >= 0 else None for index in video.phases]
    if isinstance(video.reader, PhantomFrames):
        return _phantom_labels(video.reader, len(phases)), CHOLECT50_INSTRUMENTS
    if file is not None:
        instruments = _read_instruments(file)
        seconds = [round(time_s) for time_s in video.times_s.tolist()]
        labels = [SecondLabels(p, instruments.get(s)) for p, s in zip(phases, seconds, strict=True)]
        return labels, CHOLECT50_INSTRUMENTS
    if video.tools is None:
        return [SecondLabels(phase, None) for phase in phases], ()
    labels = []
    for phase, tools in zip(phases, video.tools.tolist(), strict=True):
        present = tuple(InstrumentState(name) for name, tool in zip(TOOL_NAMES, tools, strict=True) if tool > 0)
        labels.append(SecondLabels(phase, None if -1 in tools else present))
    return labels, TOOL_NAMES


def _read_instruments(file: Path) -> dict[int, tuple[InstrumentState, ...]]:
    """Instruments by second from CholecT50's JSON, whose rows `read_triplets` has found to be sound."""
    content = json.loads(file.read_text(encoding="utf-8"))
    categories = content.get("categories")
    verbs = _category(file, categories, "verb", CHOLECT50_VERBS)
    targets = _category(file, categories, "target", CHOLECT50_TARGETS)
    found = {}
    for key, rows in content["annotations"].items():
        if rows:
            states: dict[InstrumentState, None] = {}
            for row in rows:
                number = int(row[_INSTRUMENT])
                if 0 <= number < len(CHOLECT50_INSTRUMENTS):
                    verb, target = verbs.get(int(row[_VERB]), ""), targets.get(int(row[_TARGET]), "")
                    states[InstrumentState(CHOLECT50_INSTRUMENTS[number], verb, target, _box(row[_BOX]))] = None
            found[int(key)] = tuple(states)
    return found


def _category(file: Path, categories: Any, name: str, known: tuple[str, ...]) -> dict[int, str]:
    """Names by number as the file has them under `categories`; the usual ones where it has none."""
    names = categories.get(name) if isinstance(categories, Mapping) else None
    if not isinstance(names, Mapping):
        return dict(enumerate(known))
    for word in names.values():
        if word not in known:
            raise DatasetError(f"{file}: unknown {name} {word!r} under categories; expected {', '.join(known)}")
    return {int(number): word for number, word in names.items()}


def _box(cells: Sequence[float]) -> tuple[float, float, float, float] | None:
    """The part of a box that lies in the frame; None for -1, which stands for no box, and where nothing is left."""
    left, top, width, height = map(float, cells)
    if min(left, top, width, height) <= -1:
        return None
    right, bottom = min(1.0, left + width), min(1.0, top + height)
    left, top = max(0.0, left), max(0.0, top)
    return (left, top, right - left, bottom - top) if right > left and bottom > top else None


def _phantom_labels(reader: PhantomFrames, count: int) -> list[SecondLabels]:
    """Labels of the phantom's seconds, from the user's cache where they are there: drawing the masks takes 10 ms each.

    The key holds the phantom's sources and its options, so a change of either makes new ones.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "surg_perception" / "phantom_labels"
    key = hashlib.sha256(f"{_CACHE_FORMAT}\n{reader.fingerprint()}".encode()).hexdigest()[:24]
    file = folder / f"phantom-{reader.seed}-{key}.json"
    if (stored := _stored(file, count)) is not None:
        return stored
    labels = []
    for index in range(count):
        found = reader.phantom.labels(index)
        states = tuple(
            InstrumentState(
                CHOLECT50_INSTRUMENTS[i.instrument], CHOLECT50_VERBS[i.verb], CHOLECT50_TARGETS[i.target], i.box
            )
            for i in found.instruments
        )
        labels.append(SecondLabels(CHOLEC80_PHASES[found.phase], states))
    _store(file, labels)
    return labels


def _store(file: Path, labels: Sequence[SecondLabels]) -> None:
    """Keep labels for the next time; without a place to write the labels are made anew then."""
    rows = [
        [second.phase, [[i.instrument, i.verb, i.target, i.box] for i in second.instruments or ()]] for second in labels
    ]
    partial = file.with_suffix(f".{os.getpid()}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(rows), encoding="utf-8")
        os.replace(partial, file)
    except OSError:
        with suppress(OSError):
            partial.unlink()


def _stored(file: Path, count: int) -> list[SecondLabels] | None:
    """Labels kept by `_store`; None where there are none or the file is damaged."""
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
        labels = [
            SecondLabels(
                phase, tuple(InstrumentState(name, verb, target, tuple(box)) for name, verb, target, box in states)
            )
            for phase, states in rows
        ]
    except (OSError, ValueError, TypeError):
        return None
    return labels if len(labels) == count else None
