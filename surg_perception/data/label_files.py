# SPDX-License-Identifier: Apache-2.0
"""Label files of surgical data sets as text: phases and tools by frame number, by interval, and CholecT50's JSON.

A parser never stops at the first fault. It returns what could be read together with every fault found, so that
opening a data set can refuse it and checking one can list them all.
"""

from __future__ import annotations

import csv
import difflib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surg_perception.data.labels import CHOLEC80_PHASES, CHOLEC80_TOOLS, CHOLECT50_INSTRUMENTS, PHASE_ALIASES

# Times are quotients of frame numbers and rates: this much is no difference.
SAME_S = 1e-6
_IMAGE_SUFFIX = re.compile(r"\.(jpe?g|png|bmp)$", re.IGNORECASE)
_PHASE_COLUMN = 14
_INSTRUMENT_COLUMN = 1


class DatasetError(ValueError):
    """A data set that cannot be used: where, what was found, what was expected and what to do."""


@dataclass
class Fault:
    """One kind of fault in a label file.

    Attributes:
        severity: "error" (the labels cannot be trusted) or "warning".
        line: number of the first line that has it, from 1; 0 where no line can be named.
        found, expected, advice: for the reader.
        count: lines that have it.
    """

    severity: str
    line: int
    found: str
    expected: str
    advice: str
    count: int = 1


@dataclass(frozen=True, eq=False)
class Labels:
    """Labels that each hold for a while.

    Attributes:
        start_s, end_s: float64 [m], seconds; each label holds in [start, end); starts strictly increase.
        values: phase indices int64 [m], or tools int8 [m, 7]; -1 is unknown.
    """

    start_s: NDArray[np.float64]
    end_s: NDArray[np.float64]
    values: NDArray[Any]

    def at(self, times_s: NDArray[np.float64]) -> NDArray[Any]:
        """Values in force at times_s [n], shape [n] or [n, 7]; -1 where none is."""
        if not len(self.start_s):
            return np.full((len(times_s), *self.values.shape[1:]), -1, self.values.dtype)
        row = np.searchsorted(self.start_s, times_s + SAME_S, side="right") - 1
        known = (row >= 0) & (times_s < self.end_s[np.maximum(row, 0)] - SAME_S)
        values = self.values[np.maximum(row, 0)].copy()
        values[~known] = -1
        return values


@dataclass
class PhaseRows:
    """Rows of a phase file before names become indices.

    Attributes:
        start_s, end_s: seconds, one each per row.
        names: phase name or number as written.
        lines: line numbers from 1.
        frames: frame numbers; None in a file of times.
    """

    start_s: list[float] = field(default_factory=list)
    end_s: list[float] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    frames: list[int] | None = None


class Faults:
    """Faults of one file, those of one kind counted together."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], Fault] = {}

    def add(self, line: int, found: str, expected: str, advice: str, *, severity: str = "error", key: str = "") -> None:
        """Note a fault; those with the same key (default: the same text found) count as one."""
        fault = self._found.setdefault((severity, key or found), Fault(severity, line, found, expected, advice, 0))
        fault.count += 1

    def __iter__(self) -> Iterator[Fault]:
        return iter(self._found.values())

    def check(self, path: Path) -> None:
        """Raise DatasetError with the first error, if there is any."""
        for fault in self:
            if fault.severity == "error":
                where = f"{path}, line {fault.line}" if fault.line else str(path)
                more = f" ({fault.count} lines)" if fault.count > 1 else ""
                raise DatasetError(f"{where}: {fault.found}{more}; expected {fault.expected}; {fault.advice}")


def phase_index(name: str, phases: Sequence[str]) -> int | None:
    """Index of a phase by name, whatever its case, separators and known aliases; None where it is unknown."""
    wanted = _plain(name)
    wanted = PHASE_ALIASES.get(wanted, wanted)
    for index, phase in enumerate(phases):
        if _plain(phase) == wanted:
            return index
    return None


def nearest(name: str, known: Sequence[str]) -> str | None:
    """The known name most like the one given; None where none is near."""
    plain = {_plain(word): word for word in known}
    found = difflib.get_close_matches(_plain(name), plain, n=1, cutoff=0.5)
    return plain[found[0]] if found else None


def read_phase_rows(path: Path, *, rate_hz: float, first_frame: int = 0) -> tuple[PhaseRows, Faults]:
    """Rows `Frame Phase` separated by tabs, commas or spaces, with or without a header.

    A frame number (also as a file name, "100.jpg") is at (number - first_frame) / rate_hz seconds. Where the header's
    first column is `time_s`, it is seconds. Each row holds for the file's usual step and at most to the next row.
    """
    rows, faults = PhaseRows(frames=[]), Faults()
    in_seconds = False
    last = -math.inf
    for line, text in _lines(path, faults):
        separator = "\t" if "\t" in text else "," if "," in text else None
        cells = text.split(separator, 1)
        if len(cells) < 2 or not cells[1].strip():
            faults.add(
                line, f"{text[:60]!r}", "two columns, frame number and phase", "correct or remove it", key="columns"
            )
            continue
        first, name = cells[0].strip(), cells[1].strip().rstrip(",").strip()
        if line == 1 and not first[:1].isdigit() and first[:1] not in "-+":
            in_seconds = first.lower() == "time_s"
            if first.lower() in ("frame", "time_s"):
                continue
        number = _number(first if first.isdecimal() else _IMAGE_SUFFIX.sub("", first), whole=not in_seconds)
        if number is None:
            what = "a time in seconds" if in_seconds else "a whole frame number"
            faults.add(line, f"{first[:40]!r}", what, "correct or remove the line", key="number")
            continue
        if number <= last:
            how = "twice" if number == last else f"after {last:g}"
            faults.add(
                line, f"{first} comes {how}", "numbers that increase", "sort the file, remove doubles", key="order"
            )
            continue
        last = number
        rows.start_s.append(number if in_seconds else (number - first_frame) / rate_hz)
        rows.names.append(name)
        rows.lines.append(line)
        if rows.frames is not None:
            rows.frames.append(int(number))
    if in_seconds:
        rows.frames = None
    starts = np.array(rows.start_s)
    rows.end_s = (starts + _usual_step(starts)).tolist()
    if not rows.names and not list(faults):
        faults.add(0, "no labels", "rows of frame number and phase", "export the labels again", key="empty")
    return rows, faults


def phase_labels(
    rows: PhaseRows, faults: Faults, phases: Sequence[str], *, first_number: int = 0, label_set: str = ""
) -> Labels:
    """Rows with indices into `phases` for names; numbers count from first_number. Unknown ones are -1 and a fault."""
    index_of: dict[str, int] = {}
    values = np.full(len(rows.names), -1, np.int64)
    for row, name in enumerate(rows.names):
        index = index_of.get(name)
        if index is None:
            named, number = phase_index(name, phases), _number(name, whole=True)
            if named is None and number is not None:
                named = int(number) - first_number
            index = index_of[name] = named if named is not None and 0 <= named < len(phases) else -1
        values[row] = index
        if index < 0:
            if _number(name, whole=True) is None:
                like = nearest(name, phases)
                expected = f"one of {', '.join(phases)}"
                advice = (
                    f"did you mean {like!r}?" if like else f"the labels may be of another procedure than {label_set}"
                )
            else:
                expected = f"{first_number} to {first_number + len(phases) - 1}"
                advice = f"the labels may be of another procedure than {label_set}"
            faults.add(rows.lines[row], f"unknown phase {name[:40]!r}", expected, advice)
    return Labels(np.array(rows.start_s, np.float64), np.array(rows.end_s, np.float64), values)


def read_interval_rows(path: Path) -> tuple[dict[str, PhaseRows], Faults]:
    """Phases by video from a CSV with the columns video, start_s, end_s, phase (in any order, more are ignored).

    `video` is a file name with or without its suffix. Intervals of one video must not overlap.
    """
    faults = Faults()
    by_video: dict[str, list[tuple[float, float, str, int]]] = {}
    needed = ("video", "start_s", "end_s", "phase")
    lines = [text for _, text in _lines(path, faults, keep_blank=True)]
    reader = csv.DictReader(lines, skipinitialspace=True)
    names = [name.strip().lower() for name in reader.fieldnames or []]
    reader.fieldnames = names
    if missing := [name for name in needed if name not in names]:
        faults.add(1, f"columns {', '.join(names) or 'none'}", f"{', '.join(needed)}", f"add {', '.join(missing)}")
        return {}, faults
    for row in reader:
        line = reader.line_num
        cells = {name: (row[name] or "").strip() for name in needed}
        start_s, end_s = _number(cells["start_s"]), _number(cells["end_s"])
        if start_s is None or end_s is None:
            bad = cells["start_s"] if start_s is None else cells["end_s"]
            faults.add(line, f"{bad[:40]!r}", "a time in seconds", "correct or remove the line", key="number")
        elif not 0 <= start_s < end_s:
            found = f"interval {start_s:g} to {end_s:g} s"
            faults.add(line, found, "0 <= start_s < end_s", "correct or remove the line", key="interval")
        elif not cells["video"] or not cells["phase"]:
            faults.add(line, "an empty cell", "a video and a phase", "correct or remove the line", key="cell")
        else:
            by_video.setdefault(cells["video"], []).append((start_s, end_s, cells["phase"], line))
    videos = {}
    for video, intervals in by_video.items():
        rows = videos[video] = PhaseRows()
        last_s = 0.0
        for start_s, end_s, name, line in sorted(intervals):
            if start_s < last_s - SAME_S:
                found = f"{video}: {start_s:g} to {end_s:g} s begins before {last_s:g} s, where another ends"
                faults.add(line, found, "intervals that do not overlap", "correct the times", key=f"overlap {video}")
                continue
            last_s = end_s
            rows.start_s.append(start_s)
            rows.end_s.append(end_s)
            rows.names.append(name)
            rows.lines.append(line)
    if not videos and not list(faults):
        faults.add(0, "no labels", "rows of video, start_s, end_s, phase", "fill the file or remove it", key="empty")
    return videos, faults


def read_tools(path: Path, *, rate_hz: float) -> tuple[Labels, Faults]:
    """Cholec80's tool files: `Frame` and one column of 0 or 1 for each of CHOLEC80_TOOLS, tab-separated."""
    faults = Faults()
    frames: list[int] = []
    values: list[tuple[int, ...]] = []
    seen: dict[str, tuple[int, ...] | None] = {}  # few combinations of tools occur, in many rows
    for line, text in _lines(path, faults):
        first, *rest = text.split(None, 1)
        tools_text = rest[0] if rest else ""
        if line == 1 and not first.isdigit():
            if [_plain(cell) for cell in tools_text.split()] != [_plain(tool) for tool in CHOLEC80_TOOLS]:
                expected = f"Frame {' '.join(CHOLEC80_TOOLS)}"
                faults.add(1, f"columns {text[:80]!r}", expected, "is it a tool file?")
            continue
        if tools_text not in seen:
            cells = tools_text.split()
            good = len(cells) == len(CHOLEC80_TOOLS) and set(cells) <= {"0", "1"}
            seen[tools_text] = tuple(int(cell) for cell in cells) if good else None
        frame, tools = _number(first, whole=True), seen[tools_text]
        if frame is None or tools is None:
            expected = f"a frame number and {len(CHOLEC80_TOOLS)} times 0 or 1"
            faults.add(line, f"{text[:60]!r}", expected, "correct or remove the line", key="row")
        elif frames and frame <= frames[-1]:
            found = f"frame {frame:g} after {frames[-1]}"
            faults.add(line, found, "frame numbers that increase", "sort the file, remove doubles", key="order")
        else:
            frames.append(int(frame))
            values.append(tools)
    start_s = np.array(frames, np.float64) / rate_hz
    if not frames and not list(faults):
        faults.add(0, "no labels", "rows of frame number and tools", "export the labels again", key="empty")
    tools_ = np.array(values, np.int8).reshape(-1, len(CHOLEC80_TOOLS))
    return Labels(start_s, start_s + _usual_step(start_s), tools_), faults


@dataclass(frozen=True, eq=False)
class TripletLabels:
    """What CholecT50's JSON says about phases and instruments; each holds from its frame's time to the next frame's.

    Attributes:
        phases: index into CHOLEC80_PHASES; -1 where the frame has no row, or rows without a phase.
        tools: in the order of CHOLEC80_TOOLS; the specimen bag is not annotated and stays -1.
    """

    phases: Labels
    tools: Labels


def read_triplets(path: Path) -> tuple[TripletLabels, Faults]:
    """CholecT50's `labels/VIDxx.json`: `annotations[frame]` is a list of rows of 15 numbers.

    Column 1 is the instrument, column 14 the phase; their names are under `categories` and are matched by name.
    """
    faults = Faults()
    nothing = _triplet_labels(1.0, {}, {})
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        faults.add(
            getattr(error, "lineno", 0), f"no readable JSON ({error})", "CholecT50's labels", "get the file again"
        )
        return nothing, faults
    annotations = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(annotations, dict):
        faults.add(0, "no table `annotations`", "CholecT50's labels", "get the file again")
        return nothing, faults
    categories = content.get("categories")
    names = categories.get("phase") if isinstance(categories, dict) else None
    phase_of = {index: index for index in range(len(CHOLEC80_PHASES))}
    if isinstance(names, Mapping):
        phase_of = {}
        for number, name in names.items():
            index = phase_index(str(name), CHOLEC80_PHASES)
            if index is None:
                like = nearest(str(name), CHOLEC80_PHASES)
                expected = f"one of {', '.join(CHOLEC80_PHASES)}"
                advice = f"did you mean {like!r}?" if like else "is it CholecT50?"
                faults.add(0, f"unknown phase {name!r} under categories", expected, advice)
            else:
                phase_of[int(number)] = index
    rate_hz = _number(str(content.get("fps", 1)))
    if rate_hz is None or rate_hz <= 0:
        faults.add(0, f"fps {content.get('fps')!r}", "a rate above 0", "correct the file")
        return nothing, faults
    phases: dict[int, int] = {}
    tools: dict[int, NDArray[np.int8]] = {}
    for key, rows in annotations.items():
        frame = _number(str(key), whole=True)
        if frame is None or not isinstance(rows, list):
            faults.add(
                0, f"annotation {str(key)[:40]!r}", "a frame number with a list of rows", "correct it", key="frame"
            )
            continue
        if not rows:
            continue
        present = np.array([0] * len(CHOLECT50_INSTRUMENTS) + [-1], np.int8)
        seen = set()
        for row in rows:
            if not isinstance(row, list) or len(row) <= _PHASE_COLUMN or not all(_finite(cell) for cell in row):
                found = f"frame {key}: a row of {len(row) if isinstance(row, list) else type(row).__name__}"
                faults.add(0, found, "15 finite numbers", "get the file again", key="row")
                continue
            if 0 <= int(row[_INSTRUMENT_COLUMN]) < len(CHOLECT50_INSTRUMENTS):
                present[int(row[_INSTRUMENT_COLUMN])] = 1
            number = int(row[_PHASE_COLUMN])
            if number != -1 and number not in phase_of:
                faults.add(
                    0, f"frame {key}: phase {number}", f"-1 or {sorted(phase_of)}", "get the file again", key="phase"
                )
            seen.add(phase_of.get(number, -1))
        known = sorted(seen - {-1})
        if len(known) > 1:
            found = f"frame {key} has the phases {', '.join(CHOLEC80_PHASES[index] for index in known)}"
            faults.add(0, found, "one phase per frame", "its phase is taken as unknown", severity="warning", key="two")
        phases[int(frame)] = known[0] if len(known) == 1 else -1
        tools[int(frame)] = present
    if not phases and not list(faults):
        faults.add(0, "no annotated frame", "CholecT50's labels", "get the file again")
    return _triplet_labels(rate_hz, phases, tools), faults


def _triplet_labels(rate_hz: float, phases: dict[int, int], tools: dict[int, NDArray[np.int8]]) -> TripletLabels:
    frames = sorted(phases)
    start_s = np.array(frames, np.float64) / rate_hz
    end_s = start_s + 1.0 / rate_hz
    present = np.array([tools[frame] for frame in frames], np.int8).reshape(-1, len(CHOLEC80_TOOLS))
    values = np.array([phases[frame] for frame in frames], np.int64)
    return TripletLabels(Labels(start_s, end_s, values), Labels(start_s, end_s, present))


def _lines(path: Path, faults: Faults, keep_blank: bool = False) -> list[tuple[int, str]]:
    try:
        data = path.read_bytes()
    except OSError as error:
        faults.add(0, f"cannot be read ({error.strerror})", "a text file", "check the path and its permissions")
        return []
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        faults.add(line, f"byte {data[error.start]:#04x}, which is no text", "UTF-8 text", "export the labels again")
        text = data.decode("utf-8-sig", errors="replace")
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        faults.add(line, "a zero byte", "text", "the file is damaged or no text; export the labels again")
        text = text.replace("\0", "")
    return [(n, line) for n, line in enumerate(text.splitlines(), 1) if keep_blank or line.strip()]


def _usual_step(starts: NDArray[np.float64]) -> float:
    return float(np.median(np.diff(starts))) if len(starts) > 1 else 1.0


def _number(text: str, whole: bool = False) -> float | None:
    """A finite number that is not negative, or None."""
    try:
        number = float(int(text)) if whole else float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) and number >= 0 else None


def _finite(cell: object) -> bool:
    return isinstance(cell, (int, float)) and math.isfinite(cell)


def _plain(name: str) -> str:
    return re.sub(r"[\W_]", "", name.casefold())
