# SPDX-License-Identifier: Apache-2.0
"""A manifest of surgical videos: one CSV row a video, with its procedure and approach, as GenSurgery has them.

The table is for people: it opens in a spreadsheet and its changes can be read in a diff. Nothing here downloads
anything; an address is a name for a video that somebody may have on disk. docs/gensurgery.md has the format.

GenSurgery: Schmidgall et al., General surgery vision transformer, arXiv 2403.05949.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, urlsplit

import numpy as np

from surg_perception.data.datasets import VIDEO_SUFFIXES, Dataset, DatasetError, Video
from surg_perception.data.decisions import Decisions, decisions_path, read_decisions, read_table, write_table
from surg_perception.data.frame_readers import VideoFrames, video_facts
from surg_perception.data.labels import PROCEDURES

COLUMNS = ("id", "source", "procedure", "approach", "license", "title")
"""Columns of a manifest; the first four must be there. Others are kept as they are."""
_REQUIRED = COLUMNS[:4]
APPROACHES = ("laparoscopic", "robotic", "unknown")
UNKNOWN = "unknown"

KNOWN_PROCEDURES = (
    *PROCEDURES,
    "Anal Surgery",
    "Cardiomyotomy",
    "Colorectal Disease",
    "Fundoplication",
    "Gastrojejunostomy",
    "Heller Myotomy",
    "Inflammatory Bowel Surgery",
    "Ladd's Procedure",
    "Rectal Cancer",
    "Rectal Prolapse",
    "Rectopexy",
    "Sigmoidectomy",
    "Colon Cancer",
    "Superior Mesenteric Artery Syndrome",
)
"""The ten procedures of the paper's fine-tuned models, then what the authors' other address lists are named for.

The paper counts 28 procedures and does not name them, so another name is a warning and no error.
"""

_LISTS: Mapping[str, tuple[str, str]] = {
    "ibs": ("Inflammatory Bowel Surgery", UNKNOWN),
    "anal_surgery": ("Anal Surgery", UNKNOWN),
    "cardiomytomy": ("Cardiomyotomy", UNKNOWN),
    "cholestectomy": ("Cholecystectomy", UNKNOWN),
    "davinci_instructions": (UNKNOWN, "robotic"),
    "hernia": ("Hernia Repair", UNKNOWN),
    "ladds_procedure": ("Ladd's Procedure", UNKNOWN),
    "liver_resection": ("Hepatectomy", UNKNOWN),
    "robotic_chole": ("Cholecystectomy", "robotic"),
    "superior_mesenteric_artery": ("Superior Mesenteric Artery Syndrome", UNKNOWN),
    "unsorted": (UNKNOWN, UNKNOWN),
    "video_atlas": (UNKNOWN, UNKNOWN),
}
"""Procedure and approach behind the authors' file names that do not say it in so many words."""

_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_YOUTUBE_ID = re.compile(r"[A-Za-z0-9_-]{11}")
_YOUTUBE_HOSTS = ("youtube.com", "www.youtube.com", "m.youtube.com", "youtu.be", "www.youtu.be")
_SHOWN = 20


class ManifestError(DatasetError):
    """A manifest or address list that cannot be used; names file, row and column of everything that is wrong."""


@dataclass(frozen=True)
class ManifestRow:
    """One video.

    Attributes:
        id: letters, digits, "_", "-", "."; unique.
        source: path relative to the manifest's folder with "/", or an address http(s)://…
        procedure: such as "Cholecystectomy"; "unknown".
        approach: one of APPROACHES.
        license, title: free text, may be empty.
        extra: cells of other columns.
    """

    id: str
    source: str
    procedure: str = UNKNOWN
    approach: str = UNKNOWN
    license: str = ""
    title: str = ""
    extra: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_address(self) -> bool:
        """Whether the source is an address: nothing that can be read here."""
        return "://" in self.source

    def cell(self, column: str) -> str:
        """What stands in a column; "" where it has none."""
        return str(getattr(self, column)) if column in COLUMNS else self.extra.get(column, "")


@dataclass(frozen=True)
class Manifest:
    """Rows of the manifest at path; columns in the order of the file."""

    path: Path
    rows: tuple[ManifestRow, ...]
    columns: tuple[str, ...] = COLUMNS

    def file_of(self, row: ManifestRow) -> Path | None:
        """The row's video file; None for an address."""
        return None if row.is_address else self.path.parent / PurePosixPath(row.source)

    def row(self, name: str) -> ManifestRow:
        """The row with that id. Raises ManifestError where there is none."""
        for row in self.rows:
            if row.id == name:
                return row
        near = difflib.get_close_matches(name, [row.id for row in self.rows], 1)
        hint = f"did you mean {near[0]!r}?" if near else "look in its column id"
        raise ManifestError(f"{self.path} has no video {name!r}; {hint}")

    @property
    def decisions_path(self) -> Path:
        """Where what is kept and dropped is written."""
        return decisions_path(self.path)


def read_manifest(path: str | Path) -> Manifest:
    """Read a manifest: CSV in UTF-8 with a header; "," or, as some spreadsheets write it, ";".

    Raises ManifestError that lists what is wrong with row (as a spreadsheet counts, the header is 1) and column.
    """
    path = Path(path)
    columns, cells = read_table(path, _REQUIRED)
    wrong: list[str] = []
    rows: list[ManifestRow] = []
    row_of_id: dict[str, int] = {}
    for number, row in cells:
        known = {name: row[name].strip() for name in COLUMNS if name in row}
        extra = {name: text for name, text in row.items() if name not in COLUMNS}
        known["approach"] = known["approach"].lower()
        for column, problem in _problems(known):
            wrong.append(f"row {number}, column {column}: {problem}")
        if (first := row_of_id.setdefault(known["id"], number)) != number:
            wrong.append(f"row {number}, column id: {known['id']!r} is also in row {first}; an id stands for one video")
        rows.append(ManifestRow(**known, extra=extra))
    if wrong:
        more = f"\n  and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise ManifestError(f"{path} cannot be used:\n  " + "\n  ".join(wrong[:_SHOWN]) + more)
    return Manifest(path, tuple(rows), columns)


def _problems(cells: Mapping[str, str]) -> Iterable[tuple[str, str]]:
    if not _ID.fullmatch(cells["id"]):
        yield (
            "id",
            f"{cells['id']!r} found, expected 1 to 128 of letters, digits, '_', '-' and '.', the first no '-' or '.'"
            " (a spreadsheet takes those for a formula)",
        )
    source = cells["source"]
    scheme, separator, _ = source.partition("://")
    if not source:
        yield "source", "nothing found, expected a path relative to the manifest's folder, or https://…"
    elif separator and scheme.lower() not in ("http", "https"):
        yield "source", f"an address {scheme}:// found, expected https:// (or http://), or a relative path"
    elif not separator and (source.startswith(("/", "~")) or re.match(r"[A-Za-z]:[\\/]", source)):
        yield "source", f"{source!r} found, expected a path relative to the manifest's folder, such as videos/a.mp4"
    if not cells["procedure"]:
        yield "procedure", f"nothing found, expected a procedure such as Cholecystectomy, or {UNKNOWN}"
    if cells["approach"] not in APPROACHES:
        yield "approach", f"{cells['approach']!r} found, expected one of {', '.join(APPROACHES)}"


def write_manifest(manifest: Manifest, path: str | Path | None = None) -> Manifest:
    """Write a manifest to path (its own by default), all or nothing; returns it with that path.

    Sources stay as they are, so a manifest with files belongs into the folder that it was read from.
    """
    path = Path(path) if path is not None else manifest.path
    extra = dict.fromkeys(name for row in manifest.rows for name in row.extra)
    columns = tuple(dict.fromkeys([*manifest.columns, *COLUMNS, *extra]))
    write_table(path, columns, ([row.cell(name) for name in columns] for row in manifest.rows))
    return replace(manifest, path=path, columns=columns)


def check_manifest(manifest: Manifest) -> list[str]:
    """What a person should look at: names not known, files not here, addresses without a file, one file twice."""
    found: list[str] = []
    row_of_source: dict[str, str] = {}
    strange: dict[str, list[str]] = {}
    addresses = 0
    for row in manifest.rows:
        if row.procedure not in (*KNOWN_PROCEDURES, UNKNOWN):
            strange.setdefault(row.procedure, []).append(row.id)
        if (first := row_of_source.setdefault(row.source, row.id)) != row.id:
            found.append(f"{row.id}: has the same source as {first}: {row.source}")
        file = manifest.file_of(row)
        if file is None:
            addresses += 1
        elif not file.is_file():
            found.append(f"{row.id}: {row.source} is not here; get it, or correct the path")
    for procedure, ids in strange.items():
        like = {name.lower(): name for name in KNOWN_PROCEDURES}
        near = difflib.get_close_matches(procedure.lower(), like, 1, 0.8)
        hint = f"did you mean {like[near[0]]!r}?" if near else "it is kept as it is"
        where = f"{ids[0]} and {len(ids) - 1} more" if len(ids) > 1 else ids[0]
        found.append(f"{where}: procedure {procedure!r} is none of the {len(KNOWN_PROCEDURES)} known; {hint}")
    if addresses:
        found.append(
            f"{addresses} of {len(manifest.rows)} videos are addresses without a file here and are left out;"
            " nothing is downloaded: get them yourself, then `surg-perception data manifest resolve`"
        )
    return found


def video_id(address: str) -> str:
    """The name of a video in its address: YouTube's id, else the last part of the path without its suffix.

    Raises ManifestError where the address is none, or YouTube's without a whole id (11 characters).
    """
    parts = urlsplit(address.strip())
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ManifestError(f"{address!r} is no address https://…")
    last = parts.path.rstrip("/").rpartition("/")[2]
    if parts.hostname.lower() in _YOUTUBE_HOSTS:
        name = parse_qs(parts.query).get("v", [last])[0]
        if not _YOUTUBE_ID.fullmatch(name):
            raise ManifestError(f"{address!r}: {name!r} is no id of a YouTube video, which has 11 characters")
        return name
    name = PurePosixPath(last).stem
    if not name:
        raise ManifestError(f"{address!r} names no video")
    return name


def import_address_lists(folder: str | Path, out: str | Path) -> tuple[Manifest, list[str]]:
    """A manifest for out of the authors' lists: one text file per procedure, one address a line.

    Nothing is opened but the text files. A video in several lists has one row; the column `lists` names them all.
    Where lists say different procedures, it is "unknown". An id is the video's own with "yt_" before it, since it
    may begin with "-". Returns the manifest, not yet written, and what was met: lines that are no address,
    repetitions, contradictions. Raises ManifestError where there is no list or no address.
    """
    folder = Path(folder)
    lists = sorted(folder.glob("*.txt"), key=lambda file: file.name.lower())
    if not lists:
        raise ManifestError(f"{folder}: no *.txt found, expected one text file per procedure with an address a line")
    notes: list[str] = []
    rows: dict[str, ManifestRow] = {}
    for file in lists:
        procedure, approach = _of_list(file.stem)
        repeated = 0
        for number, line in enumerate(file.read_text("utf-8-sig", "replace").splitlines(), 1):
            address = line.strip()
            if not address or address.startswith("#"):
                continue
            try:
                name = video_id(address)
            except ManifestError as error:
                notes.append(f"{file.name}, line {number}: {error}; left out")
                continue
            name = re.sub(r"[^A-Za-z0-9_.-]", "_", f"{'yt' if _YOUTUBE_ID.fullmatch(name) else 'web'}_{name}")
            seen = rows.get(name)
            if seen is None:
                rows[name] = ManifestRow(name, address, procedure, approach, extra={"lists": file.stem})
            elif file.stem in seen.extra["lists"].split("; "):
                repeated += 1
            else:
                rows[name] = _merged(seen, procedure, approach, file.stem, notes)
        if repeated:
            notes.append(f"{file.name}: {repeated} lines repeat a video of this list")
    if not rows:
        raise ManifestError(f"{folder}: no address found in {len(lists)} lists")
    return Manifest(Path(out), tuple(rows.values()), (*COLUMNS, "lists")), notes


def _of_list(stem: str) -> tuple[str, str]:
    known = {re.sub(r"[^a-z]+", "_", name.lower()): name for name in KNOWN_PROCEDURES}
    name = stem.lower()
    if name in _LISTS:
        return _LISTS[name]
    return known.get(name) or stem.replace("_", " ").strip().title(), UNKNOWN


def _merged(seen: ManifestRow, procedure: str, approach: str, stem: str, notes: list[str]) -> ManifestRow:
    known = {name for name in (seen.procedure, procedure) if name != UNKNOWN}
    lists = f"{seen.extra['lists']}; {stem}"
    if len(known) > 1:
        notes.append(f"{seen.id}: in the lists {lists}, so its procedure is {UNKNOWN}; look at it and write it in")
    # A contradiction stays one, also when a third list agrees with one side: the lists column is what is judged.
    settled = {_of_list(name)[0] for name in lists.split("; ")} - {UNKNOWN}
    return replace(
        seen,
        procedure=settled.pop() if len(settled) == 1 else UNKNOWN,
        approach=approach if seen.approach == UNKNOWN else seen.approach,
        extra={**seen.extra, "lists": lists},
    )


def resolve(manifest: Manifest, media_folder: str | Path) -> tuple[Manifest, list[str]]:
    """Find the files of addresses by the video's id in the file name, anywhere below media_folder.

    "Title [ID].mp4", "Title-ID.mp4", "ID.Title.webm" and "watch?v=ID.Title.mkv" are found; ids are told apart by
    case. The path relative to the manifest's folder becomes the source, the address goes into the column `address`.
    Returns the manifest, not yet written, and one line for each video that is not here or here more than once.
    """
    media = Path(media_folder)
    if not media.is_dir():
        raise ManifestError(f"there is no folder {media}; give the one with the video files")
    files = sorted(f for f in media.rglob("*") if f.suffix.lower() in VIDEO_SUFFIXES and f.is_file())
    by_name = {file: file.name for file in files}
    base = manifest.path.parent.resolve()
    notes: list[str] = []
    rows = []
    for row in manifest.rows:
        if not row.is_address:
            rows.append(row)
            continue
        try:
            pattern = re.compile(rf"(?:^|[^A-Za-z0-9_-]|(?<=.)-){re.escape(video_id(row.source))}(?![A-Za-z0-9_-])")
        except ManifestError as error:
            notes.append(f"{row.id}: {error}")
            rows.append(row)
            continue
        found = [file for file, name in by_name.items() if pattern.search(name)]
        if len(found) == 1:
            source = Path(os.path.relpath(found[0].resolve(), base)).as_posix()
            rows.append(replace(row, source=source, extra={**row.extra, "address": row.source}))
            continue
        rows.append(row)
        names = ", ".join(file.name for file in found)
        notes.append(f"{row.id}: {f'several files: {names}; keep one' if found else f'not here ({row.source})'}")
    columns = manifest.columns if "address" in manifest.columns else (*manifest.columns, "address")
    return replace(manifest, rows=tuple(rows), columns=columns), notes


@dataclass(frozen=True)
class KeptVideo:
    """A video that training uses: its row, its file, and the spans (start, end) in s of it that are kept."""

    row: ManifestRow
    file: Path
    spans: tuple[tuple[float, float], ...]


def kept_videos(manifest: Manifest, decisions: Decisions | None = None) -> list[KeptVideo]:
    """Videos of which something is kept and whose file is here, in the manifest's order.

    decisions: those beside the manifest unless given. The last span ends at infinity where the end is kept.
    """
    decisions = decisions if decisions is not None else read_decisions(manifest.decisions_path)
    kept = []
    for row in manifest.rows:
        file = manifest.file_of(row)
        spans = decisions.kept_spans(row.id)
        if file is not None and file.is_file() and spans:
            kept.append(KeptVideo(row, file, tuple(spans)))
    return kept


def open_manifest(path: str | Path, rate_hz: float = 1.0) -> Dataset:
    """The videos that a manifest and the decisions beside it keep, as a data set without labels.

    Sample k of a video is the frame on display at k / rate_hz seconds (at its own average rate where that is lower);
    what is dropped leaves a gap in `Video.times_s`. Raises DatasetError where nothing is left, or a video cannot be
    read (`surg-perception data screen` drops such videos).
    """
    if not 0 < rate_hz <= 1000:
        raise DatasetError(f"rate_hz {rate_hz} found, expected above 0 and at most 1000")
    manifest = read_manifest(path)
    videos = []
    for kept in kept_videos(manifest):
        facts = video_facts(kept.file)
        step_hz = min(rate_hz, facts.rate_hz)
        times_s = np.arange(max(1, math.ceil(facts.duration_s * step_hz - 1e-6))) / step_hz
        times_s = times_s[np.any([(times_s >= a) & (times_s < b) for a, b in kept.spans], axis=0)]
        if len(times_s):
            procedure = "" if kept.row.procedure == UNKNOWN else kept.row.procedure
            phases = np.full(len(times_s), -1, np.int64)
            videos.append(Video(kept.row.id, procedure, times_s, phases, None, VideoFrames(kept.file, times_s)))
    if not videos:
        raise DatasetError(
            f"{path}: nothing to train on: of {len(manifest.rows)} videos none is both here and kept; see"
            " `surg-perception data manifest check` and `surg-perception data review`"
        )
    return Dataset(manifest.path, "manifest", "", (), tuple(videos))
