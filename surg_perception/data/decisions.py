# SPDX-License-Identifier: Apache-2.0
"""What is kept and what is dropped of the videos of a manifest, and who said so: decisions.csv beside it.

Machines only add rows that drop; a row of a person always wins; nothing is ever deleted from disk. Deleting a row
takes a decision back.
"""

from __future__ import annotations

import csv
import datetime
import io
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from surg_perception.data.label_files import DatasetError
from surg_perception.data.video_survey import write_whole

COLUMNS = ("video", "start_s", "end_s", "decision", "reason", "score", "by", "date")
_REQUIRED = ("video", "decision")
_MACHINE = re.compile(r"(screen|duplicates) v\d+")

Span = tuple[float, float]


@dataclass(frozen=True)
class Decision:
    """One row.

    Attributes:
        video: id in the manifest.
        start_s, end_s: of the part it is about, in seconds; None for the video's start and end.
        decision: "keep" or "drop".
        reason: free text.
        score: how sure a machine is, 0..1; None for a person.
        by: "screen v1", "duplicates v1", or a person's name.
        date: as YYYY-MM-DD.
        extra: cells of other columns.
    """

    video: str
    start_s: float | None
    end_s: float | None
    decision: str
    reason: str = ""
    score: float | None = None
    by: str = ""
    date: str = ""
    extra: Mapping[str, str] = field(default_factory=dict)

    @property
    def machine(self) -> str | None:
        """The pass that wrote the row, "screen" or "duplicates"; None for a person's.

        A row that keeps is a person's whatever it is signed with: no machine writes such.
        """
        found = _MACHINE.fullmatch(self.by.strip())
        return found[1] if found and self.decision == "drop" else None

    @property
    def whole(self) -> bool:
        """Whether it is about the whole video."""
        return self.start_s is None and self.end_s is None

    @property
    def span(self) -> Span:
        """(start, end) in s, the end infinite where it is the video's."""
        return self.start_s or 0.0, math.inf if self.end_s is None else self.end_s


@dataclass(frozen=True)
class Decisions:
    """Rows of the file at path, which need not be there yet."""

    path: Path
    rows: tuple[Decision, ...] = ()
    columns: tuple[str, ...] = COLUMNS

    def of(self, video: str) -> list[Decision]:
        """A video's rows, in the order of the file."""
        return [row for row in self.rows if row.video == video]

    def kept_spans(self, video: str) -> list[Span]:
        """Parts (start, end) in s that are kept: all, less what machines drop, then as persons say, one by one."""
        rows = self.of(video)
        spans: list[Span] = [(0.0, math.inf)]
        for row in [row for row in rows if row.machine] + [row for row in rows if not row.machine]:
            start, end = row.span
            spans = [part for a, b in spans for part in ((a, min(b, start)), (max(a, end), b)) if part[0] < part[1]]
            if row.decision == "keep":
                spans = _joined([*spans, (start, end)])
        return spans

    def after_pass(self, by: str, videos: Collection[str], found: Iterable[Decision]) -> Decisions:
        """With what a pass, such as "screen v1", found in the videos it looked at, instead of what it found before.

        Rows of persons, of other passes and of other videos stay. A finding that stood already keeps its date.
        """
        matched = _MACHINE.fullmatch(by)
        if not matched:
            raise ValueError(f"{by!r} is no pass; expected such as 'screen v1'")
        old = {_what(row): row for row in self.rows if row.machine == matched[1]}
        stay = [row for row in self.rows if row.machine != matched[1] or row.video not in videos]
        new = [old.get(_what(row), row) for row in (_rounded(replace(row, by=by)) for row in found)]
        return self._ordered([*new, *stay])

    def said(self, row: Decision) -> Decisions:
        """With a person's row, which has the last word on its part of the video."""
        if row.decision not in ("keep", "drop"):
            raise DatasetError(f"decision {row.decision!r} found, expected keep or drop")
        if not row.by.strip() or _MACHINE.fullmatch(row.by.strip()):
            raise DatasetError(f"by {row.by!r} found, expected a person's name")
        if row.span[0] >= row.span[1]:
            raise DatasetError(f"from {row.span[0]} s to {row.span[1]} s found, expected an end after the start")
        return self._ordered([*self.rows, _rounded(row)])

    def undone(self, video: str) -> tuple[Decisions, list[Decision]]:
        """Without the video's rows, whoever wrote them: all of it is back. Second, the rows taken away."""
        return replace(self, rows=tuple(row for row in self.rows if row.video != video)), self.of(video)

    def write(self) -> None:
        """Write the file, all or nothing."""
        extra = dict.fromkeys(name for row in self.rows for name in row.extra)
        columns = tuple(dict.fromkeys([*self.columns, *COLUMNS, *extra]))
        write_table(self.path, columns, ([_cell(row, name) for name in columns] for row in self.rows))

    def _ordered(self, rows: Sequence[Decision]) -> Decisions:
        """Videos in order of id; in each the machines' rows by time, then persons' in the order they were said."""

        def place(row: Decision) -> tuple[str, int, str, float]:
            return (row.video, 0, row.machine, row.span[0]) if row.machine else (row.video, 1, "", 0.0)

        return replace(self, rows=tuple(sorted(rows, key=place)))


def decisions_path(manifest: Path) -> Path:
    """Where the decisions on a manifest's videos are: decisions.csv beside it."""
    return manifest.parent / "decisions.csv"


def today() -> str:
    """The date of a row made now."""
    return datetime.date.today().isoformat()


def read_decisions(path: str | Path) -> Decisions:
    """Read decisions; none where there is no file. Raises DatasetError with row and column of all that is wrong."""
    path = Path(path)
    if not path.exists():
        return Decisions(path)
    columns, cells = read_table(path, _REQUIRED)
    wrong: list[str] = []
    rows = []

    for number, row in cells:

        def told(column: str, problem: str, number: int = number) -> None:
            wrong.append(f"row {number}, column {column}: {problem}")

        numbers = {name: _number(row.get(name, ""), name, told) for name in ("start_s", "end_s", "score")}
        decision = row["decision"].strip().lower()
        if decision not in ("keep", "drop"):
            told("decision", f"{row['decision']!r} found, expected keep or drop")
        if not row["video"].strip():
            told("video", "nothing found, expected the id of a video")
        if (numbers["start_s"] or 0.0) < 0 or (
            numbers["end_s"] is not None and numbers["end_s"] <= (numbers["start_s"] or 0.0)
        ):
            told(
                "end_s", f"{row.get('start_s')} to {row.get('end_s')} found, expected an end after a start of 0 or more"
            )
        texts = {name: row.get(name, "").strip() for name in ("reason", "by", "date")}
        extra = {name: text for name, text in row.items() if name not in COLUMNS}
        rows.append(
            Decision(
                row["video"].strip(),
                numbers["start_s"],
                numbers["end_s"],
                decision,
                texts["reason"],
                numbers["score"],
                texts["by"],
                texts["date"],
                extra,
            )
        )
    if wrong:
        raise DatasetError(f"{path} cannot be used:\n  " + "\n  ".join(wrong[:20]))
    return Decisions(path, tuple(rows), columns)


def read_table(path: Path, required: Sequence[str]) -> tuple[tuple[str, ...], list[tuple[int, dict[str, str]]]]:
    """(columns, [(row number, cells by column)]) of a CSV with a header, "," or ";" between cells, UTF-8.

    Rows are numbered as in a spreadsheet, the header being 1; empty rows are left out, missing cells are "".
    Raises DatasetError where it cannot be read, a required column is missing or a row has too many cells.
    """
    try:
        text = path.read_text("utf-8-sig")
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path} is not UTF-8 (byte {error.start}); save it as 'CSV UTF-8'") from error
    header = text.partition("\n")[0]
    table = list(
        csv.reader(io.StringIO(text, newline=""), delimiter=";" if header.count(";") > header.count(",") else ",")
    )
    columns = tuple(name.strip() for name in table[0]) if table else ()
    if missing := [name for name in required if name not in columns]:
        raise DatasetError(
            f"{path}: row 1 has the columns {', '.join(columns) or 'none'}; {', '.join(missing)} must be there"
        )
    if twice := [name for name in columns if columns.count(name) > 1]:
        raise DatasetError(f"{path}: row 1 has the column {twice[0]!r} twice; rename one")
    rows = []
    for number, cells in enumerate(table[1:], 2):
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) > len(columns):
            raise DatasetError(
                f"{path}: row {number} has {len(cells)} cells, the header {len(columns)}; put quotes around a text with"
                f" a comma. The first cell too many is {cells[len(columns)]!r}"
            )
        rows.append((number, dict(zip(columns, [*cells, *[""] * (len(columns) - len(cells))], strict=True))))
    return columns, rows


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Write a CSV as `read_table` reads it: UTF-8, ",", one line a row, all or nothing."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    try:
        write_whole(path, text.getvalue().encode())
    except OSError as error:
        raise DatasetError(f"{path} cannot be written: {error.strerror}; what was there is unchanged") from error


def _what(row: Decision) -> tuple[object, ...]:
    return row.video, row.start_s, row.end_s, row.reason, row.score, row.by


def _rounded(row: Decision) -> Decision:
    """Times and score to hundredths, as they are written, so that a row written and read again is the same row."""

    def hundredths(value: float | None) -> float | None:
        return None if value is None else round(value, 2)

    return replace(row, start_s=hundredths(row.start_s), end_s=hundredths(row.end_s), score=hundredths(row.score))


def _joined(spans: list[Span]) -> list[Span]:
    joined: list[Span] = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((start, end))
    return joined


def _number(text: str, column: str, told: Callable[[str, str], None]) -> float | None:
    if not text.strip():
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        told(column, f"{text!r} found, expected a number or nothing")
        return None
    return value


def _cell(row: Decision, column: str) -> str:
    if column not in COLUMNS:
        return row.extra.get(column, "")
    value = getattr(row, column)
    return "" if value is None else str(value).removesuffix(".0") if isinstance(value, float) else str(value)
