# SPDX-License-Identifier: Apache-2.0
"""What people see in the operating room: phase, confidence, state and the procedure so far, on the picture.

A header (phase, confidence, state, latency, rate, backend, model) and a footer (ribbon of the procedure, time
axis, legend) lie on dark translucent bands; the picture between them stays as it is. No ROS here.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from surg_perception.stream.phase_palette import clock, phase_colour_rgb, readable_name, tick_step_s
from surg_perception.stream.phase_pipeline import PhaseState

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont

Image = npt.NDArray[np.uint8]
Colour = tuple[int, int, int]  # BGR, 0..255

BAND_BGR: Colour = (24, 20, 17)
BAND_OPACITY = 0.82
TRACK_BGR: Colour = (52, 46, 42)  # ribbon and bar where there is nothing
BRIGHT_BGR: Colour = (240, 240, 240)
DIM_BGR: Colour = (178, 172, 166)
RULE_BGR: Colour = (92, 84, 78)
DARK_BGR: Colour = (22, 18, 16)
NO_PICTURE_BGR: Colour = (40, 34, 30)

STATE_BADGES: dict[int, tuple[str, Colour]] = {
    PhaseState.OK: ("OK", (110, 190, 76)),
    PhaseState.UNCERTAIN: ("UNCERTAIN", (56, 194, 250)),
    PhaseState.STALE: ("STALE", (40, 128, 245)),
    PhaseState.NO_SIGNAL: ("NO SIGNAL", (72, 76, 232)),
    PhaseState.OUT_OF_BODY: ("OUT OF BODY", (190, 180, 170)),
    PhaseState.NO_MODEL: ("NO MODEL", (190, 180, 170)),
    PhaseState.FAULT: ("FAULT", (72, 76, 232)),
}
UNSURE_STATES = (PhaseState.UNCERTAIN, PhaseState.STALE)
EMPTY_STATES = (PhaseState.NO_SIGNAL, PhaseState.NO_MODEL, PhaseState.FAULT)


@dataclass(frozen=True)
class OverlayInfo:
    """What is known about one picture.

    stamp_s: stamp of the picture, seconds on any clock that does not jump (the ribbon's time axis).
    phase_id: index into the labels, -1: unknown. phase: its name, used where the labels lack the id.
    confidence: 0..1, NaN: none. probabilities: one per label, 0..1, or empty.
    state: a PhaseState. latency_ms, rate_hz: NaN: unknown, not shown.
    """

    stamp_s: float
    phase_id: int = -1
    phase: str = ""
    confidence: float = math.nan
    probabilities: Sequence[float] = ()
    state: int = PhaseState.UNCERTAIN
    latency_ms: float = math.nan
    rate_hz: float = math.nan
    backend: str = ""
    model_id: str = ""


@dataclass(frozen=True)
class RibbonSegment:
    """A stretch of one phase between two stamps; phase_id -1: unknown; not sure: uncertain or stale."""

    start_s: float
    end_s: float
    phase_id: int
    sure: bool


class RibbonHistory:
    """The procedure so far as runs of equal phase, in bounded memory.

    It starts with the first signal. Each sample holds until the next one; where the state says that there is
    no signal, or where the next sample is more than `max_gap_s` away, the ribbon is empty.
    When there are more than `max_segments` runs (a flickering phase, for hours), the past is resampled to at
    most `max_segments / 2` equal bins, each with what filled most of it. A stamp that jumps back by more than
    `restart_back_s` (a recording that loops) or ahead by more than `restart_ahead_s` (a clock that was set)
    starts a new procedure; a stamp that is slightly late is ignored.
    """

    restart_back_s = 1.0
    restart_ahead_s = 12 * 3600.0

    def __init__(self, *, max_gap_s: float = 3.0, max_segments: int = 4096) -> None:
        if not max_gap_s > 0 or max_segments < 4:
            raise ValueError(
                f"max_gap_s={max_gap_s}, max_segments={max_segments}: expected a gap above 0 and at least 4"
            )
        self._max_gap_s = max_gap_s
        self._start_s = np.zeros(max_segments + 1)
        self._end_s = np.zeros(max_segments + 1)
        self._code = np.zeros(max_segments + 1, np.int32)
        self.version = 0  # counts changes other than the growth of the last run
        self.clear()

    def clear(self) -> None:
        """Forget everything: a new procedure begins with the next sample."""
        self._n = 0
        self._open = False
        self.start_s = math.nan
        self.end_s = math.nan
        self.version += 1

    def __len__(self) -> int:
        return self._n

    @property
    def segments(self) -> list[RibbonSegment]:
        """All stretches in order of time; what is missing between them is a gap."""
        return [
            RibbonSegment(float(self._start_s[i]), float(self._end_s[i]), *_decode(int(self._code[i])))
            for i in range(self._n)
        ]

    @property
    def elapsed_s(self) -> float:
        """Time from the first signal to the latest sample, with or without signal; 0 before the first."""
        return 0.0 if math.isnan(self.start_s) else self.end_s - self.start_s

    @property
    def last_signal_s(self) -> float:
        """Stamp of the last sample that had a signal; NaN before the first."""
        return float(self._end_s[self._n - 1]) if self._n else math.nan

    @property
    def nbytes(self) -> int:
        """Memory of the history in bytes; constant."""
        return self._start_s.nbytes + self._end_s.nbytes + self._code.nbytes

    def add(self, stamp_s: float, phase_id: int, state: int) -> None:
        """Take one sample: the phase (-1: unknown) and state at a stamp in seconds.

        Raises ValueError if the stamp is not a finite number.
        """
        if not math.isfinite(stamp_s):
            raise ValueError(f"stamp_s is {stamp_s}, expected seconds as a finite number")
        if self._jumped(stamp_s):
            self.clear()
        if math.isnan(self.start_s):
            if state in EMPTY_STATES:
                return
            self.start_s = self.end_s = stamp_s
        elif stamp_s < self.end_s:
            return
        self._open = self._open and stamp_s - self.end_s <= self._max_gap_s and state not in EMPTY_STATES
        self.end_s = stamp_s
        if self._open:
            self._end_s[self._n - 1] = stamp_s
        if state in EMPTY_STATES:
            return
        code = _encode(phase_id, state not in UNSURE_STATES)
        if self._open and code == self._code[self._n - 1]:
            return
        self._start_s[self._n] = self._end_s[self._n] = stamp_s
        self._code[self._n] = code
        self._n += 1
        self._open = True
        self.version += 1
        if self._n == len(self._code):
            self._decimate()

    def _jumped(self, stamp_s: float) -> bool:
        return stamp_s < self.end_s - self.restart_back_s or stamp_s > self.end_s + self.restart_ahead_s

    def sample(self, n_bins: int, span_s: float) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
        """What fills most of each of `n_bins` equal parts of [start_s, start_s + span_s].

        Returns phase ids [n_bins] (-1: unknown phase, -2: nothing) and sureness [n_bins].
        """
        start_s = 0.0 if math.isnan(self.start_s) else self.start_s
        codes = self._most(start_s + np.linspace(0.0, span_s, n_bins + 1))
        return np.where(codes < 0, -2, codes // 2 - 1), codes % 2 == 1

    def _most(self, edges_s: npt.NDArray[np.float64]) -> npt.NDArray[np.int32]:
        """Code of what fills most of each bin between edges_s [n + 1], -1: nothing; int32 [n]."""
        start_s, end_s, code = self._start_s[: self._n], self._end_s[: self._n], self._code[: self._n]
        present = np.unique(code)
        filled_s = np.empty((len(present) + 1, len(edges_s) - 1))
        for row, c in enumerate(present):
            of_code = code == c
            knots_s = np.stack([start_s[of_code], end_s[of_code]], axis=1)
            total_s = np.cumsum(knots_s[:, 1] - knots_s[:, 0])
            before_s = np.stack([np.concatenate([[0.0], total_s[:-1]]), total_s], axis=1)
            filled_s[row] = np.diff(np.interp(edges_s, knots_s.ravel(), before_s.ravel()))
        filled_s[-1] = np.diff(edges_s) - filled_s[:-1].sum(axis=0)
        return np.append(present, -1).astype(np.int32)[filled_s.argmax(axis=0)]

    def _decimate(self) -> None:
        """Resample to bins of a power of two seconds: old bins stay as they are until the width doubles."""
        most_bins = (len(self._code) - 1) // 2
        bin_s = 2.0 ** math.ceil(math.log2(max(self.elapsed_s, 1e-6) / most_bins))
        edges_s = np.append(np.arange(self.start_s, self.end_s, bin_s), self.end_s)
        codes = self._most(edges_s)
        first = np.flatnonzero(np.diff(codes, prepend=-2))
        last = np.append(first[1:], len(codes))
        kept = codes[first] >= 0
        self._n = int(kept.sum())
        self._start_s[: self._n] = edges_s[first][kept]
        self._end_s[: self._n] = edges_s[last][kept]
        self._code[: self._n] = codes[first][kept]
        self._open = bool(self._n) and bool(kept[-1])


def _encode(phase_id: int, sure: bool) -> int:
    return 2 * (max(-1, phase_id) + 1) + sure


def _decode(code: int) -> tuple[int, bool]:
    return code // 2 - 1, code % 2 == 1


def shorten(text: str, fits: Callable[[str], bool]) -> str:
    """A name as long as fits: whole, with words cut ("Gallb. dissec."), with an ellipsis, or ''."""
    if fits(text):
        return text
    words = text.split(" ")
    kept = [len(w) for w in words]
    while max(kept) > 4:
        kept[kept.index(max(kept))] -= 1
        cut = " ".join(w if k == len(w) else w[: k - 1] + "." for w, k in zip(words, kept, strict=True))
        if fits(cut):
            return cut
    for n in range(len(text) - 1, 0, -1):
        if fits(text[:n].rstrip() + "…"):
            return text[:n].rstrip() + "…"
    return ""


class Typeface:
    """Antialiased text as 8-bit coverage masks.

    DejaVu Sans through Pillow where both are found (the system's font, else the one inside matplotlib);
    otherwise OpenCV's own letters, thinner but always there. All masks of one size share height and baseline.
    """

    def __init__(self) -> None:
        self._files = _dejavu_files()
        self.width = lru_cache(maxsize=2048)(self._width)
        self._font = lru_cache(maxsize=64)(self._open_font)

    @property
    def name(self) -> str:
        """Which letters are drawn."""
        return "DejaVu Sans" if self._files else "Hershey"

    def _open_font(self, size_px: int, bold: bool) -> FreeTypeFont:
        from PIL import ImageFont

        assert self._files
        # 0 is Layout.BASIC, which Pillow 9.0 (Humble) spells otherwise; raqm fails on some characters.
        return ImageFont.truetype(self._files[bold], size_px, layout_engine=0)  # type: ignore[arg-type]

    def height(self, size_px: int) -> int:
        """Height of a line of text in pixels."""
        return math.ceil(1.2 * size_px)

    def _width(self, text: str, size_px: int, bold: bool) -> int:
        if self._files:
            return math.ceil(self._font(size_px, bold).getlength(_printable(text)))
        (width, _), _ = cv2.getTextSize(*self._hershey(text, size_px, bold))
        return int(width)

    def mask(self, text: str, size_px: int, bold: bool) -> Image:
        """Coverage 0..255, uint8 [height(size_px), width(text)], ascenders and descenders included."""
        size = (self.width(text, size_px, bold), self.height(size_px))
        baseline = round(0.93 * size_px)
        if not self._files:
            mask = np.zeros((size[1], size[0]), np.uint8)
            shown, face, scale, thickness = self._hershey(text, size_px, bold)
            cv2.putText(mask, shown, (0, baseline), face, scale, 255, thickness, cv2.LINE_AA)
            return mask
        from PIL import Image as PillowImage
        from PIL import ImageDraw

        picture = PillowImage.new("L", size)
        ImageDraw.Draw(picture).text(
            (0, baseline), _printable(text), fill=255, font=self._font(size_px, bold), anchor="ls"
        )
        return np.asarray(picture)

    @staticmethod
    def _hershey(text: str, size_px: int, bold: bool) -> tuple[str, int, float, int]:
        ascii_text = text.replace("…", "..").encode("ascii", "replace").decode()
        return (
            ascii_text,
            cv2.FONT_HERSHEY_SIMPLEX,
            size_px / 32.0,
            max(1, round(size_px * (0.09 if bold else 0.06))),
        )


def _printable(text: str) -> str:
    return text if text.isprintable() else "".join(c if c.isprintable() else "\ufffd" for c in text)


def _dejavu_files() -> tuple[str, str] | None:
    if importlib.util.find_spec("PIL") is None:
        return None
    from PIL import ImageFont

    names = ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf")
    matplotlib = importlib.util.find_spec("matplotlib")
    folders = [""]
    if matplotlib is not None and matplotlib.origin:
        folders.append(str(Path(matplotlib.origin).parent / "mpl-data" / "fonts" / "ttf"))
    for folder in folders:
        try:
            regular, bold = (ImageFont.truetype(str(Path(folder, name)), 12).path for name in names)
        except OSError:
            continue
        return str(regular), str(bold)
    return None


class _Fact(NamedTuple):
    """A value in the header, its label (may be ''), and the widest usual value: the room it takes."""

    label: str
    value: str
    widest: str


@dataclass(frozen=True)
class _Geometry:
    """Where the static parts lie in pictures of one size, in pixels; None or empty where there is no room."""

    width: int
    height: int
    pad: int
    title_px: int
    body_px: int
    small_px: int
    header_h: int
    header_rows: int
    footer_y: int
    ribbon: tuple[int, int, int, int] | None  # x, y, w, h
    tick_y: int
    legend: tuple[tuple[int, int, int, str], ...]  # x, y, w, name
    meter_h: int


class OverlayCanvas:
    """Draws what the perception knows onto pictures of any size, and remembers the procedure for its ribbon.

    labels: phase names in the order of phase_id; may be empty, longer than the palette, or of any length.
    One canvas belongs to one stream and one thread. `history` is public: samples not drawn may be added.
    """

    min_span_s = 60.0

    def __init__(self, labels: Sequence[str], *, history: RibbonHistory | None = None) -> None:
        self.labels = tuple(readable_name(label) for label in labels)
        self.history = history if history is not None else RibbonHistory()
        self.typeface = Typeface()
        self.text_boxes: list[tuple[int, int, int, int, str]] = []
        """x, y, width, height and text of everything written by the latest draw."""
        self._geometry = lru_cache(maxsize=8)(self._lay_out)
        self._text_sprite = lru_cache(maxsize=512)(self._make_text_sprite)
        self._pill_sprite = lru_cache(maxsize=256)(_make_pill_sprite)
        self._band = lru_cache(maxsize=8)(lambda h, w: np.full((h, w, 3), BAND_BGR, np.uint8))
        self._hatch = lru_cache(maxsize=8)(_make_hatch)
        # What the kept pixels of the ribbon show: version of the history, width, height, elapsed_s.
        self._ribbon_key = (-1, 0, 0, 0.0)
        self._ribbon_px = np.zeros((0, 0, 3), np.uint8)

    def draw(self, bgr: Image, info: OverlayInfo) -> Image:
        """A copy of the picture with everything drawn on it; the sample joins the history.

        bgr: uint8 [H, W, 3], any size from 1x1; never modified. Raises ValueError on anything else.
        """
        if bgr.ndim != 3 or bgr.shape[2] != 3 or bgr.dtype != np.uint8 or 0 in bgr.shape:
            raise ValueError(f"picture is {bgr.dtype} {list(bgr.shape)}, expected uint8 [H, W, 3] in BGR")
        self.history.add(info.stamp_s, info.phase_id, info.state)
        canvas = np.array(bgr, order="C")
        self._draw_on(canvas, info)
        return canvas

    def no_signal_frame(self, width: int, height: int, info: OverlayInfo) -> Image:
        """What to show when there is no picture: NO SIGNAL, the procedure so far; uint8 [height, width, 3].

        info.stamp_s is the time now, on the clock of the pictures; how long ago the last signal was is
        written where that is a second or more. Raises ValueError if a side is below 1.
        """
        if width < 1 or height < 1:
            raise ValueError(f"{width}x{height} is no picture size, expected at least 1x1")
        info = replace(info, state=int(PhaseState.NO_SIGNAL))
        self.history.add(info.stamp_s, info.phase_id, info.state)
        canvas = np.full((height, width, 3), NO_PICTURE_BGR, np.uint8)
        geometry = self._draw_on(canvas, info)
        self._draw_no_signal(canvas, geometry, info.stamp_s - self.history.last_signal_s)
        return canvas

    def _draw_on(self, canvas: Image, info: OverlayInfo) -> _Geometry:
        self.text_boxes = []
        g = self._geometry(canvas.shape[1], canvas.shape[0])
        if g.header_rows:
            self._draw_header(canvas, g, info)
        if g.ribbon is not None:
            self._draw_footer(canvas, g, info)
        return g

    def _lay_out(self, width: int, height: int) -> _Geometry:
        size_px = min(height, 0.75 * width)
        title_px, body_px = max(13, round(6 + 0.0285 * size_px)), max(10, round(5 + 0.0143 * size_px))
        small_px, pad = max(9, round(0.86 * body_px)), max(3, round(0.45 * body_px))
        line = self.typeface.height
        meter_h = max(2, round(0.12 * small_px))
        ribbon_h = max(8, round(1.25 * body_px))
        legend_row_h = line(small_px) + meter_h + pad
        header_h = (0, 2 * pad + line(title_px), 2 * pad + line(title_px) + pad // 2 + line(body_px))
        footer_h = pad + ribbon_h + pad // 2 + line(small_px) + pad
        side = 2 * pad
        cells = self._legend_cells(width - 2 * side, small_px)
        legend_h = len(cells) * legend_row_h

        for header_rows, ribbon, legend, share in (
            (2, True, True, 0.34),
            (2, True, False, 0.45),
            (1, True, False, 0.45),
            (1, False, False, 0.6),
            (0, False, False, 1.0),
        ):
            total_h = header_h[header_rows] + (footer_h if ribbon else 0) + (legend_h if legend else 0)
            if total_h <= share * height and width >= 4 * title_px * bool(header_rows):
                break
        footer_y = height - (footer_h if ribbon else 0) - (legend_h if legend else 0)
        tick_y = footer_y + pad + ribbon_h + pad // 2
        legend_y = tick_y + line(small_px) + pad // 2
        return _Geometry(
            width=width,
            height=height,
            pad=pad,
            title_px=title_px,
            body_px=body_px,
            small_px=small_px,
            header_h=header_h[header_rows],
            header_rows=header_rows,
            footer_y=footer_y,
            ribbon=(side, footer_y + pad, width - 2 * side, ribbon_h) if ribbon else None,
            tick_y=tick_y,
            legend=tuple(
                (side + column * cell_w, legend_y + row * legend_row_h, cell_w, name)
                for row, (cell_w, names) in enumerate(cells if legend else ())
                for column, name in enumerate(names)
            ),
            meter_h=meter_h,
        )

    def _legend_cells(self, width: int, small_px: int) -> list[tuple[int, list[str]]]:
        """Rows of (cell width, names): few rows before many, whole names before shortened ones, or none."""
        n = len(self.labels)
        for rows, whole in ((1, True), (2, True), (2, False), (3, True), (3, False), (4, False)):
            columns = -(-n // rows)
            if rows > n:
                continue
            cell_w = width // columns
            names = self._shortened(cell_w - _chip_room(small_px) - small_px, small_px)
            distinct = all(names) and len(set(names)) == len(set(self.labels))
            if names == list(self.labels) if whole else distinct:
                return [(cell_w, names[i : i + columns]) for i in range(0, n, columns)]
        return []

    def _shortened(self, room: int, size_px: int) -> list[str]:
        return [shorten(name, lambda t: self.typeface.width(t, size_px, False) <= room) for name in self.labels]

    def _draw_header(self, canvas: Image, g: _Geometry, info: OverlayInfo) -> None:
        badge, colour = STATE_BADGES.get(info.state, (f"STATE {info.state}", DIM_BGR))
        self._darken(canvas, 0, g.header_h)
        if info.state != PhaseState.OK:
            rule_h = max(2, g.pad // 3)
            canvas[g.header_h - rule_h : g.header_h] = colour
        side, title_h, body_h = 2 * g.pad, self.typeface.height(g.title_px), self.typeface.height(g.body_px)

        pill_h = body_h + g.pad // 2
        pill_w = self.typeface.width(badge, g.body_px, True) + pill_h
        if pill_w > 0.45 * g.width:
            badge, pill_w = "", pill_h
        pill_x, pill_y = g.width - side - pill_w, g.pad + (title_h - pill_h) // 2
        _blit(canvas, pill_x, pill_y, self._pill_sprite(pill_w, pill_h, colour))
        self._write(canvas, pill_x + pill_h // 2, pill_y + g.pad // 4, badge, g.body_px, True, DARK_BGR)

        chip_w = max(4, g.title_px // 4)
        chip_y = g.pad + title_h // 10
        canvas[chip_y : chip_y + title_h * 8 // 10, side : side + chip_w] = phase_colour_rgb(info.phase_id)[::-1]
        title_x = side + chip_w + g.pad
        title, title_px = self._fit_title(self._phase_name(info), pill_x - g.pad - title_x, g)
        title_y = g.pad + (title_h - self.typeface.height(title_px)) // 2
        title_bgr = BRIGHT_BGR if info.state in (PhaseState.OK, PhaseState.UNCERTAIN) else DIM_BGR
        self._write(canvas, title_x, title_y, title, title_px, True, title_bgr)
        if g.header_rows == 2:
            self._draw_facts(canvas, g, info, colour, g.pad + title_h + g.pad // 2)

    def _phase_name(self, info: OverlayInfo) -> str:
        if info.state == PhaseState.NO_MODEL:
            return "No phase model"
        if info.phase_id < 0:
            return "Phase unknown"
        if info.phase_id < len(self.labels):
            return self.labels[info.phase_id]
        return readable_name(info.phase) or f"Phase {info.phase_id}"

    def _fit_title(self, name: str, width: int, g: _Geometry) -> tuple[str, int]:
        for size_px in range(g.title_px, g.body_px - 1, -1):
            if self.typeface.width(name, size_px, True) <= width:
                return name, size_px
        return shorten(name, lambda t: self.typeface.width(t, g.body_px, True) <= width), g.body_px

    def _draw_facts(self, canvas: Image, g: _Geometry, info: OverlayInfo, colour: Colour, y: int) -> None:
        """Second row of the header: confidence on the left, on the right as many facts as fit."""
        width_of = self.typeface.width
        side, body_h = 2 * g.pad, self.typeface.height(g.body_px)
        bar_w, bar_h = min(g.width // 4, 11 * g.body_px), max(4, g.body_px // 2)
        bar_y = y + (body_h - bar_h) // 2
        known = math.isfinite(info.confidence)
        share = min(1.0, max(0.0, info.confidence)) if known else 0.0
        _blit(canvas, side, bar_y, self._pill_sprite(bar_w, bar_h, RULE_BGR))
        if share * bar_w >= 1:
            _blit(canvas, side, bar_y, self._pill_sprite(max(bar_h, round(share * bar_w)), bar_h, colour))
        percent_x = side + bar_w + g.pad
        self._write(canvas, percent_x, y, f"{100 * share:.0f} %" if known else "–", g.body_px, True, BRIGHT_BGR)

        left = percent_x + width_of("100 %", g.body_px, True) + 2 * g.pad
        facts = []
        if math.isfinite(info.latency_ms) and info.state not in EMPTY_STATES:
            facts.append(_Fact("latency", f"{info.latency_ms:.1f} ms", "000.0 ms"))
        if math.isfinite(info.rate_hz):
            facts.append(_Fact("input", f"{info.rate_hz:.1f} fps", "00.0 fps"))
        facts += [_Fact("", text, text) for text in (info.backend, info.model_id) if text]
        gap = g.body_px // 2
        for n in range(len(facts), 0, -1):
            slots = [self._fact_width(fact, g.body_px) for fact in facts[:n]]
            x = g.width - side - sum(slots) - 2 * gap * (n - 1)
            if x < left:
                continue
            for fact, slot in zip(facts, slots, strict=False):
                if fact is not facts[0]:
                    canvas[y + body_h // 6 : y + body_h - body_h // 6, x - gap] = RULE_BGR
                self._write(canvas, x, y, fact.label, g.body_px, False, DIM_BGR)
                value_x = x + slot - width_of(fact.value, g.body_px, False)
                self._write(canvas, value_x, y, fact.value, g.body_px, False, BRIGHT_BGR if fact.label else DIM_BGR)
                x += slot + 2 * gap
            return

    def _fact_width(self, fact: _Fact, size_px: int) -> int:
        label_w = self.typeface.width(fact.label, size_px, False) + size_px // 2 if fact.label else 0
        return label_w + max(self.typeface.width(text, size_px, False) for text in (fact.value, fact.widest))

    def _draw_footer(self, canvas: Image, g: _Geometry, info: OverlayInfo) -> None:
        assert g.ribbon is not None
        self._darken(canvas, g.footer_y, g.height)
        x0, y0, w, h = g.ribbon
        elapsed_s = self.history.elapsed_s
        span_s = max(self.min_span_s, elapsed_s)
        canvas[y0 : y0 + h, x0 : x0 + w] = self._ribbon(w, h, span_s, elapsed_s)
        now_x = x0 + min(w - 1, int(w * elapsed_s / span_s))
        canvas[y0 - g.pad // 2 : y0 + h + g.pad // 2, max(x0, now_x - g.pad // 4) : now_x + 1] = BRIGHT_BGR

        width_of = self.typeface.width
        now = clock(elapsed_s)
        now_w = width_of(now, g.small_px, True)
        now_left = min(max(x0, now_x - now_w // 2), x0 + w - now_w)
        self._write(canvas, now_left, g.tick_y, now, g.small_px, True, BRIGHT_BGR)
        step_s = tick_step_s(span_s, max(1, w // (3 * width_of("00:00", g.small_px, False))))
        free_x = x0
        for i in range(int(span_s / step_s) + 1):
            tick = clock(i * step_s)
            tick_x, tick_w = x0 + round(w * i * step_s / span_s), width_of(tick, g.small_px, False)
            left = min(max(x0, tick_x - tick_w // 2), x0 + w - tick_w)
            if left >= free_x and (left + tick_w + g.pad < now_left or left > now_left + now_w + g.pad):
                canvas[y0 + h : y0 + h + g.pad // 2, min(tick_x, x0 + w - 1)] = DIM_BGR
                self._write(canvas, left, g.tick_y, tick, g.small_px, False, DIM_BGR)
                free_x = left + tick_w + g.pad

        small_h, chip_px = self.typeface.height(g.small_px), round(0.74 * g.small_px)
        for phase_id, (x, y, cell_w, name) in enumerate(g.legend):
            colour = phase_colour_rgb(phase_id)[::-1]
            current = phase_id == info.phase_id and info.state not in EMPTY_STATES
            chip_y = y + round(0.93 * g.small_px) - chip_px
            canvas[chip_y : chip_y + chip_px, x : x + chip_px] = colour
            name_x, name_bgr = x + _chip_room(g.small_px), BRIGHT_BGR if current else DIM_BGR
            self._write(canvas, name_x, y, name, g.small_px, False, name_bgr)
            if phase_id < len(info.probabilities) and math.isfinite(info.probabilities[phase_id]):
                meter_w = cell_w - g.small_px
                filled = round(meter_w * min(1.0, max(0.0, info.probabilities[phase_id])))
                canvas[y + small_h : y + small_h + g.meter_h, x : x + meter_w] = TRACK_BGR
                canvas[y + small_h : y + small_h + g.meter_h, x : x + filled] = colour

    def _ribbon(self, w: int, h: int, span_s: float, elapsed_s: float) -> Image:
        """Pixels of the procedure, uint8 [h, w, 3]; drawn anew when a pixel's worth of time has passed."""
        version, last_w, last_h, last_elapsed_s = self._ribbon_key
        if (version, last_w, last_h) == (
            self.history.version,
            w,
            h,
        ) and elapsed_s - last_elapsed_s < span_s / w:
            return self._ribbon_px
        phase_ids, sure = self.history.sample(w, span_s)
        ids, inverse = np.unique(phase_ids, return_inverse=True)
        table = np.array([TRACK_BGR if i == -2 else phase_colour_rgb(i)[::-1] for i in ids.tolist()], np.uint8)
        row = table[inverse.reshape(-1)]
        self._ribbon_px = np.repeat(row[None], h, axis=0)
        unsure = ~sure & (phase_ids != -2)
        if unsure.any():
            dimmed = (0.3 * row + 0.7 * np.array(BAND_BGR)).astype(np.uint8)
            self._ribbon_px = np.where((self._hatch(h, w) & unsure)[..., None], dimmed[None], self._ribbon_px)
        self._ribbon_key = (self.history.version, w, h, elapsed_s)
        return self._ribbon_px

    def _draw_no_signal(self, canvas: Image, g: _Geometry, silent_s: float) -> None:
        room_h = g.footer_y - g.header_h
        size_px = int(min(2.4 * g.title_px, 0.22 * room_h, 0.1 * g.width))
        if size_px < g.body_px:
            return
        x_mid, y = g.width // 2, g.header_h + room_h // 2 - int(1.1 * size_px)
        lines = [
            ("NO SIGNAL", size_px, True, BRIGHT_BGR),
            ("No picture from the endoscope", size_px // 2, False, DIM_BGR),
        ]
        if silent_s >= 1.0:
            lines.append((f"Last picture {clock(silent_s)} ago", size_px // 2, False, DIM_BGR))
        for text, text_px, bold, colour in lines:
            if text_px >= 9:
                self._write(
                    canvas,
                    x_mid - self.typeface.width(text, text_px, bold) // 2,
                    y,
                    text,
                    text_px,
                    bold,
                    colour,
                )
                y += self.typeface.height(text_px) + text_px // 3

    def _darken(self, canvas: Image, top: int, bottom: int) -> None:
        rows = canvas[top:bottom]
        cv2.addWeighted(rows, 1.0 - BAND_OPACITY, self._band(*rows.shape[:2]), BAND_OPACITY, 0.0, dst=rows)

    def _write(self, canvas: Image, x: int, y: int, text: str, size_px: int, bold: bool, colour: Colour) -> None:
        """Write a line of text from its top left corner; not at all if it would leave the picture."""
        if not text:
            return
        sprite = self._text_sprite(text, size_px, bold, colour)
        h, w = sprite[0].shape[:2]
        if x < 0 or y < 0 or x + w > canvas.shape[1] or y + h > canvas.shape[0]:
            return
        _blit(canvas, x, y, sprite)
        self.text_boxes.append((x, y, w, h, text))

    def _make_text_sprite(self, text: str, size_px: int, bold: bool, colour: Colour) -> _Sprite:
        return _sprite(self.typeface.mask(text, size_px, bold), colour)


def _chip_room(small_px: int) -> int:
    """From the left edge of a legend's colour chip to its name, in pixels."""
    return round(1.2 * small_px)


_Sprite = tuple[Image, Image]  # colour times coverage, and 255 - coverage; both uint8 [h, w, 3]


def _sprite(coverage: Image, colour: Colour) -> _Sprite:
    coverage_3 = np.repeat(coverage[..., None], 3, axis=2)
    return (coverage_3.astype(np.uint16) * np.array(colour, np.uint16) // 255).astype(np.uint8), 255 - coverage_3


def _blit(canvas: Image, x: int, y: int, sprite: _Sprite) -> None:
    premultiplied, transparency = sprite
    h, w = premultiplied.shape[:2]
    under = canvas[y : y + h, x : x + w]
    canvas[y : y + h, x : x + w] = cv2.add(cv2.multiply(under, transparency, scale=1 / 255), premultiplied)


def _make_pill_sprite(w: int, h: int, colour: Colour) -> _Sprite:
    """A bar with round ends, antialiased by its distance to the middle line."""
    x, y = np.arange(w) + 0.5, np.arange(h)[:, None] + 0.5
    beyond_x = np.maximum(np.maximum(h / 2 - x, x - (w - h / 2)), 0.0)
    inside = h / 2 - np.hypot(beyond_x, y - h / 2) + 0.5
    return _sprite((255 * np.clip(inside, 0.0, 1.0)).astype(np.uint8), colour)


def _make_hatch(h: int, w: int) -> npt.NDArray[np.bool_]:
    """Diagonal stripes, about three to the height: bool [h, w]."""
    stripe = max(2, h // 5)
    return (np.arange(h)[:, None] + np.arange(w)) // stripe % 2 == 0
