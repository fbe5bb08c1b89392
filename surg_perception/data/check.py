# SPDX-License-Identifier: Apache-2.0
"""What is in a data set, what is missing and what is wrong with it, before anything is trained on it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from surg_perception.data.datasets import (
    IMAGE_SUFFIXES,
    Entry,
    Layout,
    OpenedEntry,
    OpenedLayout,
    Video,
    find_layout,
    open_dataset,
    open_entries,
    same_names,
)
from surg_perception.data.frame_readers import VideoFacts, decoded, open_video
from surg_perception.data.label_files import SAME_S, DatasetError, Labels, nearest, phase_index
from surg_perception.data.labels import CHOLEC80_TOOLS, LABEL_SETS

SEVERITIES = ("error", "warning", "note")
_SAMPLES = 8  # frames decoded of each video unless deep
_SIZES = 64  # image headers read of each folder unless deep
_LENGTH_TOLERANCE_S = 2.0
_ALL_HZ = 1000.0


@dataclass(frozen=True)
class Finding:
    """One thing that the user should know.

    Attributes:
        severity: "error" (training would fail or learn something wrong), "warning" (it would go, but with less than
            there could be) or "note" (unusual, perhaps right).
        where: file, with a line number where there is one.
        found, expected, advice: for the reader.
    """

    severity: str
    where: str
    found: str
    expected: str
    advice: str


@dataclass(frozen=True)
class VideoSummary:
    """One video that can be opened.

    Attributes:
        frames: pictures in it (of a video file: its length times its rate).
        duration_s: seconds.
        rate_hz: average frames per second.
        width, height: pixels of the first picture; 0 for labels alone.
        labelled: share of its pictures with a known phase, 0 to 1.
        phases_s: labelled seconds per phase; a CholecT50 frame counts as one second.
        tools: pictures with each tool that is annotated; empty without tool labels.
    """

    name: str
    frames: int
    duration_s: float
    rate_hz: float
    width: int
    height: int
    labelled: float
    phases_s: dict[str, float]
    tools: dict[str, int]


@dataclass(frozen=True)
class CheckReport:
    """What `check_dataset` found."""

    path: str
    kind: str
    label_set: str
    deep: bool
    videos: tuple[VideoSummary, ...]
    findings: tuple[Finding, ...]

    @property
    def errors(self) -> int:
        """Number of findings that are errors."""
        return sum(finding.severity == "error" for finding in self.findings)

    @property
    def hours(self) -> float:
        """Length of all videos."""
        return sum(video.duration_s for video in self.videos) / 3600.0

    @property
    def phases_s(self) -> dict[str, float]:
        """Labelled seconds per phase over all videos."""
        return _summed(video.phases_s for video in self.videos)

    @property
    def tools(self) -> dict[str, int]:
        """Frames with each tool over all videos."""
        return _summed(video.tools for video in self.videos)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the fields, and the totals hours, frames, errors, phases_s, tools."""
        totals = {
            "hours": self.hours,
            "frames": sum(video.frames for video in self.videos),
            "errors": self.errors,
            "phases_s": self.phases_s,
            "tools": self.tools,
        }
        return {**asdict(self), **totals}


Progress = Callable[[str, int, int], None]


def check_dataset(
    path: str | Path,
    kind: str | None = None,
    deep: bool = False,
    *,
    labels: str | Path | None = None,
    progress: Progress | None = None,
) -> CheckReport:
    """Look at everything in a data set that can go wrong, and go on after each fault.

    Label files are read whole. Of each video a few pictures are decoded; with deep every one. progress is called with
    (video's name, pictures decoded, pictures to decode). Arguments else as in open_dataset. Raises DatasetError where
    no data set is recognised.
    """
    if str(path).partition(":")[0] == "phantom":
        return _check_phantom(str(path), deep, progress)
    layout = find_layout(Path(path), kind, Path(labels) if labels is not None else None)
    opened = open_entries(layout, _ALL_HZ)
    findings = [*_about_files(layout), *_about_label_files(opened)]
    videos = []
    for entry, result in zip(layout.entries, opened.entries, strict=True):
        if isinstance(result, DatasetError):
            where = str(entry.media or entry.phases or entry.name)
            text = str(result).removeprefix(where).lstrip(": ")
            findings.append(Finding("error", where, text, "a video that can be used", "get it again or remove it"))
            continue
        size, found = _about_pictures(result, deep, progress)
        findings += [*_about_labels(layout, result, opened), *found]
        videos.append(_summary(result, opened.phases, size))
    findings += _about_all(layout, opened, videos)
    findings.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    return CheckReport(str(layout.root), layout.kind, opened.label_set, deep, tuple(videos), tuple(findings))


def _check_phantom(spec: str, deep: bool, progress: Progress | None) -> CheckReport:
    dataset = open_dataset(spec)
    videos, findings = [], []
    for video in dataset.videos:
        size, found = _decode_some(video, range(len(video.times_s) if deep else 1), spec, progress)
        findings += found
        seconds = _seconds(video.phases, np.ones(len(video.phases)), dataset.phases)
        count = len(video.times_s)
        videos.append(VideoSummary(video.name, count, float(count), 1.0, *size, 1.0, seconds, {}))
    return CheckReport(spec, dataset.kind, dataset.label_set, deep, tuple(videos), tuple(findings))


def _about_files(layout: Layout) -> Iterator[Finding]:
    for first, second in same_names(layout):
        yield Finding("error", str(second), f"the same name as {first}", "one file per video", "remove or rename one")
    for file in layout.stray_labels:
        yield Finding("warning", str(file), "labels without a video", "a video of that name", "add it or remove this")
    has_labels = any(entry.phases is not None for entry in layout.entries)
    has_tools = any(entry.tools is not None for entry in layout.entries)
    for entry in layout.entries:
        where = str(entry.media or entry.name)
        if has_labels and entry.phases is None:
            yield Finding("warning", where, "no phase labels", "a label file", "its phases are unknown in training")
        if has_tools and entry.tools is None:
            yield Finding("note", where, "no tool labels", "a tool file", "its tools are unknown in training")
        if entry.media is not None and entry.media.is_dir():
            yield from _about_names(entry.media)
    if layout.entries and all(entry.media is None for entry in layout.entries):
        found = f"labels of {len(layout.entries)} videos, without a video"
        yield Finding("note", str(layout.root), found, "videos", "labels alone do for evaluation and transitions")


def _about_names(folder: Path) -> Iterator[Finding]:
    others = [f for f in folder.iterdir() if f.suffix.lower() in IMAGE_SUFFIXES and not f.stem.isdecimal()]
    if others:
        found = f"{len(others)} images without a number as their name, such as {others[0].name}"
        yield Finding("warning", str(folder), found, "<frame number>.jpg", "they are left out; rename or remove them")


def _about_label_files(opened: OpenedLayout) -> Iterator[Finding]:
    for file, faults in opened.faults.items():
        for fault in faults:
            where = f"{file}:{fault.line}" if fault.line else str(file)
            more = f" ({fault.count} lines)" if fault.count > 1 else ""
            yield Finding(fault.severity, where, fault.found + more, fault.expected, fault.advice)


def _about_labels(layout: Layout, opened: OpenedEntry, whole: OpenedLayout) -> Iterator[Finding]:
    entry, labels = opened.entry, opened.labels
    by_picture = layout.kind == "cholect50" or (entry.phases is not None and entry.phases.parent.name == "annotation")
    for file, found in ((entry.phases, labels), (entry.tools, opened.tools)):
        if file is not None and found is not None and len(found.start_s) and entry.media is not None:
            if by_picture and file == entry.phases:
                yield from _about_rows(file, found, opened.video, usual=layout.kind == "cholect50")
            else:
                yield from _about_length(file, found, opened)
    if layout.intervals is not None and labels is not None and labels.end_s[-1] > _end_s(opened) + _LENGTH_TOLERANCE_S:
        found_ = f"{entry.name}: a phase ends at {labels.end_s[-1]:.1f} s"
        yield Finding("error", str(layout.intervals), found_, f"{_end_s(opened):.1f} s at most", "correct the times")
    if labels is not None and whole.label_set in LABEL_SETS:
        yield from _about_order(entry, labels, whole.phases)


def _about_rows(file: Path, labels: Labels, video: Video, usual: bool) -> Iterator[Finding]:
    """Labels that belong to one picture each: are there as many of the one as of the other?"""
    without_label = int((~np.isin(video.times_s, labels.start_s)).sum())
    without_picture = int((~np.isin(labels.start_s, video.times_s)).sum())
    if without_label:
        found = f"{without_label} of {len(video.times_s)} pictures have no label"
        advice = "usual in this data set; their phase is unknown in training" if usual else "export the labels again"
        yield Finding("note" if usual else "warning", str(file), found, "a label for each", advice)
    if without_picture:
        found = f"{without_picture} of {len(labels.start_s)} labels have no picture"
        yield Finding("warning", str(file), found, "a picture for each", "get the pictures again")


def _about_length(file: Path, labels: Labels, opened: OpenedEntry) -> Iterator[Finding]:
    """Labels that go on in time: do they end with the video, and have they holes?"""
    times_s, end_s, video_end_s = opened.video.times_s, float(labels.end_s[-1]), _end_s(opened)
    last_s = video_end_s if opened.facts is not None else float(times_s[-1])
    tolerance_s = max(_LENGTH_TOLERANCE_S, 2.0 * float(labels.end_s[0] - labels.start_s[0]))
    advice = _other_rate(video_end_s / end_s) or "get both again from one source"
    if end_s < last_s - tolerance_s:
        found = f"labels end at {end_s:.1f} s, {last_s - end_s:.1f} s before the video"
        yield Finding("error", str(file), found, f"labels up to {last_s:.1f} s", advice)
    elif end_s > video_end_s + tolerance_s:
        found = f"labels end at {end_s:.1f} s, {end_s - video_end_s:.1f} s after the video"
        yield Finding("error", str(file), found, f"labels up to {video_end_s:.1f} s", advice)
    holes_s = labels.start_s[1:] - labels.end_s[:-1]
    if np.any(holes_s > SAME_S):
        first_s, total_s = labels.end_s[:-1][holes_s > SAME_S][0], holes_s[holes_s > SAME_S].sum()
        found = f"no label for {total_s:.1f} s in between, first at {first_s:.1f} s"
        yield Finding("warning", str(file), found, "rows at an even step", "export the labels again")


def _other_rate(ratio: float) -> str | None:
    """Advice where two lengths differ by the ratio of 25 and 1 frames per second."""
    if abs(math.log(ratio / 25.0)) < 0.1:
        return "the numbers look like seconds, where frames at 25 fps are expected: multiply them by 25"
    if abs(math.log(ratio * 25.0)) < 0.1:
        return "the numbers look like frames at 25 fps, where seconds are expected: divide them by 25"
    return None


def _about_order(entry: Entry, labels: Labels, phases: tuple[str, ...]) -> Iterator[Finding]:
    """Every change of phase in Cholec80's 80 videos goes one or two phases on, or one back."""
    known = labels.values >= 0
    values, starts = labels.values[known], labels.start_s[known]
    jumps = [
        (before, after, float(start_s))
        for (before, after), start_s in zip(itertools.pairwise(values), starts[1:], strict=True)
        if after - before not in (-1, 0, 1, 2)
    ]
    if jumps:
        before, after, start_s = jumps[0]
        found = f"{phases[before]} is followed by {phases[after]} at {start_s:.1f} s"
        found += f" ({len(jumps)} such jumps)" if len(jumps) > 1 else ""
        yield Finding("note", entry.name, found, "mostly the usual order of phases", "look whether it is right")


def _about_pictures(
    opened: OpenedEntry, deep: bool, progress: Progress | None
) -> tuple[tuple[int, int], list[Finding]]:
    """Size of the pictures, and what is wrong with them."""
    media, video, facts = opened.entry.media, opened.video, opened.facts
    if media is None:
        return (0, 0), []
    count = len(video.times_s)
    some = list(range(count)) if deep else np.unique(np.linspace(0, count - 1, _SAMPLES).astype(int)).tolist()
    if facts is None:
        size, findings = _decode_some(video, some, str(media), progress)
        return size, [*findings, *_about_sizes(media, deep)]
    if deep:
        findings = list(_decode_all(media, facts, video.name, progress))
    else:
        findings = _decode_some(video, some, str(media), progress)[1]
    if facts.declared_s > facts.duration_s + _LENGTH_TOLERANCE_S:
        found = f"its pictures end at {facts.duration_s:.1f} s"
        expected = f"{facts.declared_s:.1f} s, as its header says"
        findings.append(Finding("error", str(media), found, expected, "the file is cut: get it again"))
    return (facts.width, facts.height), findings


def _decode_some(
    video: Video, indices: Sequence[int], where: str, progress: Progress | None
) -> tuple[tuple[int, int], list[Finding]]:
    """Size of the first picture that can be decoded, and the finding that some cannot."""
    size, faults = (0, 0), []
    done = 0
    while done < len(indices):
        try:
            for frame in video.frames(indices[done:]):
                height, width = frame.shape[:2]
                size = size if any(size) else (width, height)
                done += 1
                if progress:
                    progress(video.name, done, len(indices))
        except DatasetError as error:
            faults.append(str(error).removeprefix(where).lstrip(": "))
            done += 1
    if not faults:
        return size, []
    more = f" ({len(faults)} of the {len(indices)} pictures tried)" if len(faults) > 1 else ""
    return size, [Finding("error", where, faults[0] + more, "pictures that can be decoded", "get the file again")]


def _decode_all(path: Path, facts: VideoFacts, name: str, progress: Progress | None) -> Iterator[Finding]:
    """Every picture of a video file: what cannot be decoded, and where pictures are missing."""
    faults: list[str] = []
    last_s, first_fault_s = 0.0, None
    expected = round(facts.duration_s * facts.rate_hz)
    sizes = set()
    with open_video(path) as container:
        # Without this a decoder paints over what is damaged and says nothing.
        container.streams.video[0].codec_context.options = {"err_detect": "explode"}
        for count, (stamp, picture) in enumerate(decoded(container, faults.append), 1):
            if faults and first_fault_s is None:
                first_fault_s = last_s
            last_s = float((stamp - facts.start) * facts.time_base)
            sizes.add((picture.width, picture.height))
            if progress and count % 25 == 0:
                progress(name, min(count, expected), expected)
    if faults:
        at_s = last_s if first_fault_s is None else first_fault_s
        found = f"{len(faults)} packets or pictures cannot be decoded, the first after {at_s:.2f} s ({faults[0]})"
        yield Finding("error", str(path), found, "a video without damage", "get the file again")
    if facts.duration_s - last_s > _LENGTH_TOLERANCE_S:
        found = f"the last picture that can be decoded is at {last_s:.1f} s"
        yield Finding("error", str(path), found, f"pictures up to {facts.duration_s:.1f} s", "get the file again")
    if len(sizes) > 1:
        yield _mixed(str(path), sizes)


def _about_sizes(folder: Path, deep: bool) -> Iterator[Finding]:
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
    step = 1 if deep else max(1, len(files) // _SIZES)
    sizes = set()
    for file in files[::step]:
        try:
            with Image.open(file) as image:
                sizes.add(image.size)
        except (OSError, SyntaxError, ValueError) as error:
            yield Finding("error", str(file), f"no readable image ({error})", "a JPEG or PNG", "get the file again")
    if len(sizes) > 1:
        yield _mixed(str(folder), sizes)


def _mixed(where: str, sizes: set[tuple[int, int]]) -> Finding:
    found = "pictures of " + ", ".join(f"{width}x{height}" for width, height in sorted(sizes))
    return Finding("warning", where, found, "one size in a video", "are they of one recording?")


def _about_all(layout: Layout, opened: OpenedLayout, videos: list[VideoSummary]) -> Iterator[Finding]:
    sizes: dict[tuple[int, int], list[str]] = {}
    for video in videos:
        if video.width:
            sizes.setdefault((video.width, video.height), []).append(video.name)
    if len(sizes) > 1:
        common = max(sizes, key=lambda size: len(sizes[size]))
        rest = [f"{names[0]}{' …' * (len(names) > 1)} {w}x{h}" for (w, h), names in sizes.items() if (w, h) != common]
        found = f"{len(sizes)} resolutions: mostly {common[0]}x{common[1]}; {', '.join(rest)}"
        yield Finding("note", str(layout.root), found, "one resolution", "frames are resized, so training goes")
    if opened.label_set == "own":
        foreign_to = {
            label_set: [name for name in opened.phases if phase_index(name, phases) is None]
            for label_set, phases in LABEL_SETS.items()
        }
        label_set = min(foreign_to, key=lambda name: len(foreign_to[name]))
        foreign = foreign_to[label_set]
        if len(foreign) <= len(opened.phases) // 2:
            like = nearest(foreign[0], LABEL_SETS[label_set])
            advice = f"did you mean {like!r}?" if like else "otherwise it is a phase of its own"
            found = f"phase {foreign[0]!r}, while others are those of {label_set}"
            yield Finding("warning", str(layout.root), found, f"one of {', '.join(LABEL_SETS[label_set])}", advice)
    if opened.phases and videos:
        unseen = [phase for phase in opened.phases if not any(video.phases_s.get(phase) for video in videos)]
        if unseen:
            found = f"no second of {', '.join(unseen)}"
            yield Finding("note", str(layout.root), found, "every phase", "what is missing cannot be learned")


def _summary(opened: OpenedEntry, phases: tuple[str, ...], size: tuple[int, int]) -> VideoSummary:
    video, labels, facts = opened.video, opened.labels, opened.facts
    end_s = _end_s(opened)
    frames = round(facts.duration_s * facts.rate_hz) if facts is not None else len(video.times_s)
    rate_hz = facts.rate_hz if facts is not None else frames / end_s
    labelled = float((video.phases >= 0).mean())
    seconds: dict[str, float] = {}
    if labels is not None:
        ends = np.minimum(labels.end_s, np.append(labels.start_s[1:], end_s))
        seconds = _seconds(labels.values, np.clip(ends - labels.start_s, 0.0, None), phases)
    tools: dict[str, int] = {}
    if video.tools is not None:
        columns = zip(CHOLEC80_TOOLS, video.tools.T, strict=True)
        tools = {name: int((column == 1).sum()) for name, column in columns if (column >= 0).any()}
    return VideoSummary(video.name, frames, end_s, rate_hz, *size, labelled, seconds, tools)


def _end_s(opened: OpenedEntry) -> float:
    """End of the last picture; where there are no pictures, of the last label."""
    if opened.facts is not None:
        return opened.facts.duration_s
    times_s = opened.video.times_s
    return float(times_s[-1] + (np.median(np.diff(times_s)) if len(times_s) > 1 else 1.0))


def _seconds(values: NDArray[np.int64], lasting_s: NDArray[np.float64], phases: tuple[str, ...]) -> dict[str, float]:
    known = values >= 0
    total = np.bincount(values[known], lasting_s[known], minlength=len(phases))
    return {phase: round(float(total[k]), 2) for k, phase in enumerate(phases)}


def _summed(parts: Any) -> dict[str, Any]:
    total: dict[str, Any] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total.get(name, 0) + value
    return total
