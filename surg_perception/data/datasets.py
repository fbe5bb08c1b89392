# SPDX-License-Identifier: Apache-2.0
"""Surgical video data sets as users have them: videos sampled in time, with phases and tools aligned by time.

`open_dataset` recognises a data set by the layout of its folder. Opening reads labels and video headers, never a
picture; `Video.frames` decodes, one picture in memory. docs/data.md shows the layouts.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from surg_perception.data.frame_readers import (
    FrameReader,
    ImageFiles,
    NoFrames,
    PhantomFrames,
    VideoFacts,
    VideoFrames,
    video_facts,
)
from surg_perception.data.label_files import (
    SAME_S,
    DatasetError,
    Faults,
    Labels,
    PhaseRows,
    nearest,
    phase_index,
    phase_labels,
    read_interval_rows,
    read_phase_rows,
    read_tools,
    read_triplets,
)
from surg_perception.data.labels import AUTOLAPARO_PHASES, CHOLEC80_PHASES, CHOLEC80_TOOLS, LABEL_SETS, M2CAI16_PHASES

__all__ = ["KINDS", "Dataset", "DatasetError", "Video", "open_dataset"]

VIDEO_SUFFIXES = (".mp4", ".avi", ".mkv", ".mov", ".mpg", ".mpeg", ".m4v", ".ts", ".webm")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
INTERVALS_NAME = "phases.csv"
_PHANTOM_OPTIONS = ("seeds", "duration_s", "width", "height")


@dataclass(frozen=True, eq=False)
class Video:
    """One video and its labels at the sampled times.

    Attributes:
        name: unique in its data set.
        procedure: such as "Cholecystectomy"; "" where it is unknown.
        times_s: float64 [n], seconds since the start of the video, strictly increasing, at least one.
        phases: int64 [n], index into Dataset.phases; -1 unknown.
        tools: int8 [n, 7], presence 0 or 1 of CHOLEC80_TOOLS, -1 unknown; None where there are no tool labels.
        reader: where the frames come from.
    """

    name: str
    procedure: str
    times_s: NDArray[np.float64]
    phases: NDArray[np.int64]
    tools: NDArray[np.int8] | None
    reader: FrameReader

    def __post_init__(self) -> None:
        count = len(self.times_s)
        if not count:
            raise DatasetError(f"{self.name} has no frame; remove it, or get it again")
        if not (np.diff(self.times_s) > 0).all():
            raise DatasetError(f"{self.name}: times are not strictly increasing")
        tools_shape = (count, len(CHOLEC80_TOOLS))
        if self.phases.shape != (count,) or (self.tools is not None and self.tools.shape != tools_shape):
            raise DatasetError(f"{self.name}: phases {self.phases.shape} or tools do not fit its {count} frames")

    def frames(self, indices: Iterable[int] | None = None) -> Iterator[NDArray[np.uint8]]:
        """Frames uint8 BGR [H, W, 3]: all in order, or those of the indices (0 to n-1) in the order given.

        Increasing indices are read without going back. Raises DatasetError where a frame cannot be read, and
        IndexError for an index out of range.
        """
        count = len(self.times_s)
        wanted = list(range(count)) if indices is None else [int(index) for index in indices]
        if wrong := [index for index in wanted if not 0 <= index < count]:
            raise IndexError(f"{self.name}: frame {wrong[0]} found, expected 0 to {count - 1}")
        return self.reader.read(wanted)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Videos of one layout.

    Attributes:
        path: where it lies.
        kind: one of KINDS.
        label_set: "cholec80", "m2cai16", "autolaparo"; "own" for phases that only this data set has; "" without labels.
        phases: names in the order of the indices; empty without labels.
        videos: in natural order of their names.
    """

    path: Path
    kind: str
    label_set: str
    phases: tuple[str, ...]
    videos: tuple[Video, ...]

    def video(self, name: str) -> Video:
        """The video of that name. Raises DatasetError where there is none."""
        for video in self.videos:
            if video.name == name:
                return video
        names = [video.name for video in self.videos]
        like = nearest(name, names)
        hint = f"did you mean {like!r}?" if like else f"it has {', '.join(names[:5])}{', …' if len(names) > 5 else ''}"
        raise DatasetError(f"{self.path} has no video {name!r}; {hint}")

    def select(self, names: Iterable[str]) -> Dataset:
        """The data set with these videos only, in the order given. Raises DatasetError for a name it does not have."""
        return replace(self, videos=tuple(self.video(name) for name in names))


@dataclass(frozen=True)
class Entry:
    """Files of one video of a layout; a media of None means labels alone."""

    name: str
    media: Path | None
    phases: Path | None = None
    tools: Path | None = None


@dataclass(frozen=True)
class Layout:
    """A recognised folder: which files belong to which video, and how their numbers count.

    Attributes:
        label_rate_hz, first_frame: a label with frame number f is at (f - first_frame) / label_rate_hz seconds.
        first_number: the number that stands for the first phase.
        stray_labels: label files without a video.
        intervals: one CSV with the phases of all videos.
    """

    root: Path
    kind: str
    entries: tuple[Entry, ...]
    label_set: str = ""
    phases: tuple[str, ...] = ()
    procedure: str = ""
    label_rate_hz: float = 25.0
    first_frame: int = 0
    first_number: int = 0
    stray_labels: tuple[Path, ...] = ()
    intervals: Path | None = None


def open_dataset(
    path: str | Path, *, rate_hz: float = 1.0, kind: str | None = None, labels: str | Path | None = None
) -> Dataset:
    """Open a data set, sampled at most rate_hz times a second.

    Args:
        path: the data set's folder; one video file; or "phantom", also with options,
            "phantom:seeds=1000-1009,duration_s=120,width=480,height=270".
        rate_hz: frames per second, above 0 and at most 1000. Sample k of a video file is the frame on display at
            k / rate_hz seconds (its own average rate where that is lower); of a folder of frames one is taken in each
            1 / rate_hz seconds.
        kind: one of KINDS, instead of recognising the layout.
        labels: phase labels elsewhere: for kind "videos" a CSV of intervals or a folder with one file per video; for
            Cholec80 the folder with the files videoNN-phase.txt.

    A sampled time without a label has phase -1. Raises DatasetError where no layout is recognised, or where a label
    file or a video cannot be used: `surg-perception data check` then lists everything that is wrong.
    """
    if not 0 < rate_hz <= 1000:
        raise DatasetError(f"rate_hz {rate_hz} found, expected above 0 and at most 1000")
    if str(path).partition(":")[0] == "phantom" and kind in (None, "phantom"):
        return _phantom(str(path), rate_hz)
    layout = find_layout(Path(path), kind, Path(labels) if labels is not None else None)
    if twins := same_names(layout):
        raise DatasetError(f"{twins[0][0]} and {twins[0][1]} have the same name; keep one of them")
    opened = open_entries(layout, rate_hz)
    for entry in opened.entries:
        if isinstance(entry, DatasetError):
            raise entry
    for file, faults in opened.faults.items():
        faults.check(file)
    videos = tuple(entry.video for entry in opened.entries if isinstance(entry, OpenedEntry))
    return Dataset(layout.root, layout.kind, opened.label_set, opened.phases, videos)


def find_layout(root: Path, kind: str | None = None, labels: Path | None = None) -> Layout:
    """Recognise a folder. Raises DatasetError that says what was looked for."""
    if kind is not None and kind not in KINDS:
        raise DatasetError(f"kind {kind!r} found, expected one of {', '.join(KINDS)}")
    root = root.expanduser()
    if not root.exists():
        raise DatasetError(f"there is no {root}; give the folder of a data set, a video file or 'phantom'")
    if labels is not None and not labels.expanduser().exists():
        raise DatasetError(f"there is no {labels}, where the labels should be")
    labels = labels.expanduser() if labels is not None else None
    for name, (find, _) in _FINDERS.items():
        if kind in (None, name):
            layout = find(root, labels)
            if layout is not None:
                if labels is not None and layout.kind not in ("videos", "cholec80", "cholec80-frames"):
                    raise DatasetError(f"{root} is {layout.kind}, which has its own labels; leave out labels={labels}")
                return layout
    looked = [f"  {name}: {what}" for name, (_, what) in _FINDERS.items() if kind in (None, name)]
    inside = sorted(entry.name + "/" * entry.is_dir() for entry in root.iterdir()) if root.is_dir() else []
    there = ", ".join(inside[:8]) + (", …" if len(inside) > 8 else "") if inside else "nothing"
    raise DatasetError(
        f"{root}: no data set recognised. In it: {there}. Looked for:\n" + "\n".join(looked) + "\n"
        "Give the folder that holds these, or name the layout with kind="
    )


@dataclass(frozen=True, eq=False)
class OpenedEntry:
    """One video of a layout.

    Attributes:
        labels: its phases; None where it has none.
        tools: its tools; None where it has none.
        facts: of its video file; None for a folder of frames.
    """

    entry: Entry
    video: Video
    labels: Labels | None
    tools: Labels | None
    facts: VideoFacts | None


@dataclass(frozen=True, eq=False)
class OpenedLayout:
    """All of a layout that can be opened, and why the rest cannot.

    Attributes:
        entries: as Layout.entries, with an error in the place of each video that cannot be used.
        faults: of each label file.
    """

    label_set: str
    phases: tuple[str, ...]
    entries: tuple[OpenedEntry | DatasetError, ...]
    faults: dict[Path, Faults]


def open_entries(layout: Layout, rate_hz: float) -> OpenedLayout:
    """Open every video of a layout, whatever is wrong with others."""
    faults: dict[Path, Faults] = {}
    label_set, phases = layout.label_set, layout.phases
    rows: dict[str, PhaseRows] = {}
    if layout.kind == "videos":
        rows = _plain_phase_rows(layout, faults)
        label_set, phases = _plain_phase_names(rows)
    entries: list[OpenedEntry | DatasetError] = []
    for entry in layout.entries:
        try:
            if layout.kind == "videos":
                own = rows.get(entry.name)
                labels = phase_labels(own, Faults(), phases) if own is not None else None
                tools = None
            else:
                labels, tools = _read_labels(layout, entry, faults)
            entries.append(_open_entry(layout, entry, labels, tools, rate_hz))
        except DatasetError as error:
            entries.append(error)
    return OpenedLayout(label_set, phases, tuple(entries), faults)


def same_names(layout: Layout) -> list[tuple[Path, Path]]:
    """Pairs of video files that would have the same name."""
    folders = dict.fromkeys(entry.media.parent for entry in layout.entries if entry.media and entry.media.is_file())
    names = {entry.name for entry in layout.entries}
    files = [file for folder in folders for file in sorted(folder.iterdir())]
    first: dict[str, Path] = {}
    pairs = []
    for file in files:
        if file.suffix.lower() in VIDEO_SUFFIXES and file.stem in names:
            if file.stem in first:
                pairs.append((first[file.stem], file))
            first.setdefault(file.stem, file)
    return pairs


def _read_labels(layout: Layout, entry: Entry, faults: dict[Path, Faults]) -> tuple[Labels | None, Labels | None]:
    """Phases and tools of a video; what is wrong with their files goes into faults."""
    labels = tools = None
    if entry.phases is not None and layout.kind == "cholect50":
        triplets, faults[entry.phases] = read_triplets(entry.phases)
        return triplets.phases, triplets.tools
    if entry.phases is not None:
        rows, found = read_phase_rows(entry.phases, rate_hz=layout.label_rate_hz, first_frame=layout.first_frame)
        faults[entry.phases] = found
        labels = phase_labels(rows, found, layout.phases, first_number=layout.first_number, label_set=layout.label_set)
    if entry.tools is not None:
        tools, faults[entry.tools] = read_tools(entry.tools, rate_hz=layout.label_rate_hz)
    return labels, tools


def _open_entry(
    layout: Layout, entry: Entry, labels: Labels | None, tools: Labels | None, rate_hz: float
) -> OpenedEntry:
    facts = None
    reader: FrameReader
    if entry.media is None:
        if labels is None or not len(labels.start_s):
            raise DatasetError(f"{entry.name}: neither frames nor labels can be read")
        times_s = labels.start_s[_thinned(labels.start_s, rate_hz)]
        reader = NoFrames(f"{entry.name} has only labels; its frames are needed here: add the videos to {layout.root}")
    elif entry.media.is_dir():
        numbered = numbered_images(entry.media)
        all_s = np.array([number for number, _ in numbered], np.float64) / layout.label_rate_hz
        kept = _thinned(all_s, rate_hz)
        times_s = all_s[kept]
        reader = ImageFiles(tuple(numbered[index][1] for index in kept))
    else:
        facts = video_facts(entry.media)
        rate_hz = min(rate_hz, facts.rate_hz)
        count = max(1, math.ceil((facts.duration_s - SAME_S) * rate_hz - SAME_S))
        times_s = np.arange(count) / rate_hz
        reader = VideoFrames(entry.media, times_s)
    phases = labels.at(times_s) if labels is not None else np.full(len(times_s), -1, np.int64)
    present = tools.at(times_s) if tools is not None else None
    return OpenedEntry(
        entry, Video(entry.name, layout.procedure, times_s, phases, present, reader), labels, tools, facts
    )


def numbered_images(folder: Path) -> list[tuple[int, Path]]:
    """Images of a folder by the number that is their name, in its order. Raises DatasetError without any."""
    images = [file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES and file.stem.isdecimal()]
    if not images:
        raise DatasetError(f"{folder}: no image with a number as its name (*.jpg, *.png); remove it, or get it again")
    numbered = sorted((int(file.stem), file) for file in images)
    for (number, first), (again, second) in itertools.pairwise(numbered):
        if number == again:
            raise DatasetError(f"{folder}: {first.name} and {second.name} have the same number; remove one")
    return numbered


def _thinned(times_s: NDArray[np.float64], rate_hz: float) -> NDArray[np.intp]:
    """Indices of the first time in each 1 / rate_hz seconds."""
    return np.unique(np.floor((times_s + SAME_S) * rate_hz), return_index=True)[1]


def _plain_phase_rows(layout: Layout, faults: dict[Path, Faults]) -> dict[str, PhaseRows]:
    """Phase rows of a folder of videos by video name."""
    rows: dict[str, PhaseRows] = {}
    if layout.intervals is not None:
        by_video, found = read_interval_rows(layout.intervals)
        faults[layout.intervals] = found
        names = {entry.name for entry in layout.entries}
        for video, of_video in by_video.items():
            stem = Path(video).stem if Path(video).suffix.lower() in VIDEO_SUFFIXES else video
            if stem in names:
                rows[stem] = of_video
            else:
                like = nearest(stem, sorted(names))
                advice = f"did you mean {like!r}?" if like else "add the video or remove its lines"
                found.add(of_video.lines[0], f"labels of {video!r}", "a video that is here", advice, severity="warning")
    for entry in layout.entries:
        if entry.phases is not None and entry.media is not None:
            try:
                rate_hz = video_facts(entry.media).rate_hz
            except DatasetError:
                continue  # said again when the video itself is opened
            rows[entry.name], faults[entry.phases] = read_phase_rows(entry.phases, rate_hz=rate_hz)
    return rows


def _plain_phase_names(rows: dict[str, PhaseRows]) -> tuple[str, tuple[str, ...]]:
    """Label set and phase names of a folder of videos.

    The set whose names all of them are; else the names themselves: numbers in numerical order, words in order of
    first appearance.
    """
    names: list[str] = []
    for name in dict.fromkeys(name for found in rows.values() for name in found.names):
        if phase_index(name, names) is None:
            names.append(name)
    if not names:
        return "", ()
    for label_set, phases in LABEL_SETS.items():
        if all(phase_index(name, phases) is not None for name in names):
            return label_set, phases
    return "own", tuple(sorted(names, key=int) if all(name.isdecimal() for name in names) else names)


def _phantom(spec: str, rate_hz: float) -> Dataset:
    from surg_perception.data.phantom_script import Script

    options: dict[str, str] = {}
    for part in filter(None, spec.partition(":")[2].split(",")):
        name, _, value = (text.strip() for text in part.partition("="))
        if name not in _PHANTOM_OPTIONS:
            raise DatasetError(f"{spec!r}: option {name!r} found, expected one of {', '.join(_PHANTOM_OPTIONS)}")
        options[name] = value
    try:
        first, _, last = options.get("seeds", "0-9").partition("-")
        seeds = range(int(first), int(last or first) + 1)
        duration_s = float(options.get("duration_s", 120.0))
        width, height = int(options.get("width", 854)), int(options.get("height", 480))
        videos = []
        for seed in seeds:
            reader = PhantomFrames(seed, duration_s, width, height, rate_hz)
            times_s = np.arange(max(1, round(duration_s * rate_hz))) / rate_hz
            starts, ends, values = zip(*Script(seed, duration_s).phases, strict=True)
            labels = Labels(np.array(starts, np.float64), np.array(ends, np.float64), np.array(values, np.int64))
            videos.append(Video(f"phantom-{seed}", "Cholecystectomy", times_s, labels.at(times_s), None, reader))
    except ValueError as error:
        raise DatasetError(f"{spec!r}: {error}; an example is phantom:seeds=1000-1009,duration_s=120") from error
    if not videos:
        raise DatasetError(f"{spec!r}: no seed found, expected first-last such as 1000-1009")
    return Dataset(Path(spec), "phantom", "cholec80", CHOLEC80_PHASES, tuple(videos))


def _cholec80(root: Path, labels: Path | None) -> Layout | None:
    phases = _cholec80_labels(labels or root, "phase", labels is not None)
    videos = _matching(root / "videos", r"video\d+", VIDEO_SUFFIXES) or _matching(root, r"video\d+", VIDEO_SUFFIXES)
    if not phases:
        return None
    names = videos or phases
    tools = _cholec80_labels(root, "tool", False)
    entries = tuple(Entry(name, videos.get(name), phases.get(name), tools.get(name)) for name in names)
    stray = tuple(file for name, file in [*phases.items(), *tools.items()] if name not in names)
    return Layout(root, "cholec80", entries, "cholec80", CHOLEC80_PHASES, "Cholecystectomy", stray_labels=stray)


def _cholec80_frames(root: Path, labels: Path | None) -> Layout | None:
    folders = _folders(root / "frames", r"video\d+")
    if not folders:
        return None
    phases = _matching(root / "annotation", r"video\d+", (".csv",)) if labels is None else {}
    phases = {**_cholec80_labels(labels or root, "phase", labels is not None), **phases}
    tools = _cholec80_labels(root, "tool", False)
    entries = tuple(Entry(name, folder, phases.get(name), tools.get(name)) for name, folder in folders.items())
    # Label files of the whole data set beside a part of its frames are usual, so none of them is stray.
    return Layout(root, "cholec80-frames", entries, "cholec80", CHOLEC80_PHASES, "Cholecystectomy")


def _cholec80_labels(root: Path, what: str, only_here: bool) -> dict[str, Path]:
    """videoNN-<what>.txt by video, from the first of the usual folders that has any."""
    folders = (f"{what}_annotations", f"{what}_1fps", f"labels/{what}_1fps", "labels", ".")
    for folder in ["."] if only_here else folders:
        files = _matching(root / folder, rf"video\d+-{what}", (".txt",))
        if files:
            return {name.removesuffix(f"-{what}"): file for name, file in files.items()}
    return {}


def _cholect50(root: Path, labels: Path | None) -> Layout | None:
    del labels
    folders = _folders(root / "videos", r"VID\d+")
    if not folders:
        return None
    jsons = _matching(root / "labels", r"VID\d+", (".json",))
    entries = tuple(Entry(name, folder, jsons.get(name)) for name, folder in folders.items())
    stray = tuple(file for name, file in jsons.items() if name not in folders)
    return Layout(
        root,
        "cholect50",
        entries,
        "cholec80",
        CHOLEC80_PHASES,
        "Cholecystectomy",
        label_rate_hz=1.0,
        stray_labels=stray,
    )


def _autolaparo(root: Path, labels: Path | None) -> Layout | None:
    del labels
    files = _matching(root / "labels", r"label_\d+", (".txt",))
    if not files:
        return None
    files = {name.removeprefix("label_"): file for name, file in files.items()}
    videos = _matching(root / "videos", r"\d+", VIDEO_SUFFIXES)
    names = videos or files
    entries = tuple(Entry(name, videos.get(name), files.get(name)) for name in names)
    return Layout(
        root,
        "autolaparo",
        entries,
        "autolaparo",
        AUTOLAPARO_PHASES,
        "Hysterectomy",
        label_rate_hz=1.0,
        first_frame=1,
        first_number=1,
        stray_labels=tuple(file for name, file in files.items() if name not in names),
    )


def _m2cai(root: Path, labels: Path | None) -> Layout | None:
    del labels
    pattern = r"(test_)?workflow_video_\d+"
    videos: dict[str, Path] = {}
    files: dict[str, Path] = {}
    for folder in (root, root / "train_dataset", root / "test_dataset"):
        videos |= _matching(folder, pattern, VIDEO_SUFFIXES)
        files |= _matching(folder, pattern, (".txt",))
    names = videos or files
    if not names:
        return None
    entries = tuple(Entry(name, videos.get(name), files.get(name)) for name in sorted(names, key=_natural))
    stray = tuple(file for name, file in files.items() if name not in names)
    return Layout(root, "m2cai", entries, "m2cai16", M2CAI16_PHASES, "Cholecystectomy", stray_labels=stray)


def _videos(root: Path, labels: Path | None) -> Layout | None:
    if root.is_file():
        media = {root.stem: root} if root.suffix.lower() in VIDEO_SUFFIXES else {}
        root = root.parent
    else:
        media = _matching(root, r".+", VIDEO_SUFFIXES)
    if not media:
        return None
    beside = labels if labels is not None and labels.is_dir() else root
    intervals = labels if labels is not None and labels.is_file() else root / INTERVALS_NAME
    files = {} if intervals.is_file() else _matching(beside, r".+", (".csv", ".txt"))
    entries = tuple(Entry(name, file, files.get(name)) for name, file in media.items())
    stray = tuple(file for name, file in files.items() if name not in media and file.suffix == ".csv")
    return Layout(root, "videos", entries, stray_labels=stray, intervals=intervals if intervals.is_file() else None)


def _matching(folder: Path, pattern: str, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """Files by stem, in natural order; of several with one stem the first."""
    found: dict[str, Path] = {}
    if folder.is_dir():
        for file in sorted(folder.iterdir(), key=lambda file: _natural(file.name)):
            if file.suffix.lower() in suffixes and re.fullmatch(pattern, file.stem) and file.is_file():
                found.setdefault(file.stem, file)
    return found


def _folders(parent: Path, pattern: str) -> dict[str, Path]:
    if not parent.is_dir():
        return {}
    folders = [folder for folder in parent.iterdir() if folder.is_dir() and re.fullmatch(pattern, folder.name)]
    return {folder.name: folder for folder in sorted(folders, key=lambda folder: _natural(folder.name))}


def _natural(name: str) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", name) if part]


_Finder = Callable[[Path, "Path | None"], "Layout | None"]
_FINDERS: dict[str, tuple[_Finder, str]] = {
    "cholec80-frames": (_cholec80_frames, "frames/videoNN/<frame number at 25 fps>.jpg, annotation/videoNN.csv"),
    "cholec80": (_cholec80, "videos/videoNN.mp4, phase_annotations/videoNN-phase.txt (or these files alone)"),
    "cholect50": (_cholect50, "videos/VIDnn/NNNNNN.png, labels/VIDnn.json"),
    "autolaparo": (_autolaparo, "videos/NN.mp4, labels/label_NN.txt"),
    "m2cai": (_m2cai, "workflow_video_NN.mp4 and .txt, here or in train_dataset/, test_dataset/"),
    "videos": (_videos, f"video files ({', '.join(VIDEO_SUFFIXES)}), labels in {INTERVALS_NAME} or <video>.csv"),
}
KINDS = (*_FINDERS, "phantom")
"""Layouts that can be opened."""
