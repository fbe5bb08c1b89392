# SPDX-License-Identifier: Apache-2.0
"""Pictures without what says whose they are: the view into the body stays, all around and all else becomes black.

Four rules, each on the side of blanking too much:

- Only where tissue has been seen lately, and where this picture is lit, is kept: the scope's black mask, the tower's
  text beside it and its panels go.
- What stands still on the glass while the picture behind it moves (a name, a date, a menu over the tissue) goes.
- A picture that is no view into the body, and the half second after it, is black as a whole.
- Until enough has been seen to know all this, pictures are black as a whole.

How well that works, measured, is in docs/record.md. It looks at pixels and cannot read: what moves with the tissue or
is seen for a few seconds only stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import cv2
import numpy as np
from numpy.typing import NDArray

from surg_perception.data.screening import View, view
from surg_perception.data.video_survey import colours, picture_statistics

Bgr = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Rectangle = tuple[int, int, int, int]
"""Left, top, width, height in pixels."""

_SIDE = 320
"""Width of the small picture that the field of view is found on; the height keeps the aspect."""
_BLACK = 24
_TISSUE_SHARE = 0.5
_LEAST_PART = 0.01
_EVIDENCE, _EVIDENCE_TAU_S = 0.1, 20.0
_LEARN_PICTURES = 8
_CLEAR_S = 0.5
_MARGIN = 0.012

_GLASS_SIDE = 640
_GLASS_EVERY_S, _GLASS_CHANGE = 0.25, 3.0
_GLASS_PICTURES, _GLASS_MEMORY = 10, 14
_GLASS_STEADY, _GLASS_EDGE, _GLASS_SHARP = 0.8, 40.0, 100.0
_GLASS_MOVES = 5.0
_GLASS_SHARE, _GLASS_REACH = 0.09, 0.02


class Shown(IntEnum):
    """What became of a picture."""

    VIEW = 0
    LEARNING = 1
    """Black: too little has been seen yet."""
    NOT_IN_BODY = 2
    """Black: no view into the body, or half a second has not passed since."""


class Deidentifier:
    """The pictures of one camera, in their order.

    Args:
        rectangles: areas that are always blanked.

    Attributes:
        counts: pictures by what became of them.
    """

    def __init__(self, rectangles: Sequence[Rectangle] = ()) -> None:
        self.counts = dict.fromkeys(Shown, 0)
        self._rectangles = tuple(rectangles)
        self._size = (0, 0)
        self._reset((0, 0))

    def _reset(self, size: tuple[int, int]) -> None:
        self._size = size
        self._field = _Field()
        self._glass = _Glass()
        self._blocked_until_s = -np.inf
        self._last_s = -np.inf

    def __call__(self, bgr: Bgr, time_s: float) -> tuple[Bgr, Shown]:
        """A new picture of the same size, and what became of it. time_s: ascending; a jump back begins anew."""
        if bgr.shape[:2] != self._size or time_s < self._last_s:
            self._reset((bgr.shape[0], bgr.shape[1]))
        self._last_s = time_s
        small = _small(bgr, _SIDE)
        field = self._field.box(bgr.shape)
        left, top, right, bottom = field or (0, 0, bgr.shape[1], bgr.shape[0])
        seen = picture_statistics(bgr[top:bottom, left:right])
        # Stricter than screening, which throws nothing away that it is not sure of: here what is unsure goes.
        if view(seen) != View.IN_BODY or seen.tissue < _TISSUE_SHARE:
            self._blocked_until_s = time_s + _CLEAR_S
        else:
            self._field.note(small, time_s)
            self._glass.note(bgr, time_s)
        if time_s < self._blocked_until_s:
            shown = Shown.NOT_IN_BODY
        elif not (self._field.known and self._glass.known):
            shown = Shown.LEARNING
        else:
            shown = Shown.VIEW
        self.counts[shown] += 1
        if shown != Shown.VIEW:
            return np.zeros_like(bgr), shown
        keep = self._field.mask(small) & ~_resized(self._glass.overlay, small.shape[1::-1])
        # Linear and nearly 255: a pixel is kept only where all of the small mask around it is.
        full = cv2.resize(keep.astype(np.uint8) * 255, bgr.shape[1::-1], interpolation=cv2.INTER_LINEAR)
        full = cv2.threshold(full, 252, 255, cv2.THRESH_BINARY)[1]
        out = np.asarray(cv2.bitwise_and(bgr, bgr, mask=full), np.uint8)
        for x, y, width, height in self._rectangles:
            out[max(0, y) : max(0, y + height), max(0, x) : max(0, x + width)] = 0
        return out, shown


class _Field:
    """Where the picture is: where tissue was seen in a tenth of the last pictures, and all between."""

    def __init__(self) -> None:
        self._evidence: NDArray[np.float32] | None = None
        self._hull: Mask | None = None
        self._seen = 0
        self._last_s = 0.0

    @property
    def known(self) -> bool:
        return self._seen >= _LEARN_PICTURES and self._hull is not None

    def note(self, small: Bgr, time_s: float) -> None:
        """Take a picture of the body."""
        if self._seen and time_s - self._last_s < 0.1:
            return
        _, tissue, _ = colours(small.astype(np.float32))
        parts = _parts(tissue, 5).astype(np.float32)
        self._seen += 1
        if self._evidence is None:
            self._evidence = parts
        else:
            fade = float(np.exp(-(time_s - self._last_s) / _EVIDENCE_TAU_S))
            share = max(1.0 - fade, 1.0 / self._seen)
            self._evidence += share * (parts - self._evidence)
        self._last_s = time_s
        hull = _hull(_parts(self._evidence > _EVIDENCE, 9))
        self._hull = _shrunk(hull) if hull.any() else None

    def box(self, shape: tuple[int, ...]) -> tuple[int, int, int, int] | None:
        """Left, top, right, bottom around it in a picture of this shape; None while it is not known."""
        if self._hull is None or not self.known:
            return None
        rows, columns = np.flatnonzero(self._hull.any(axis=1)), np.flatnonzero(self._hull.any(axis=0))
        scale_y, scale_x = shape[0] / self._hull.shape[0], shape[1] / self._hull.shape[1]
        return (
            int(columns[0] * scale_x),
            int(rows[0] * scale_y),
            int((columns[-1] + 1) * scale_x),
            int((rows[-1] + 1) * scale_y),
        )

    def mask(self, small: Bgr) -> Mask:
        """What of this picture is kept, at the small size: there, and inside what is lit now."""
        assert self._hull is not None
        return self._hull & _hull(_parts(small.max(axis=2) > _BLACK, 9))


class _Glass:
    """What stands still while the picture moves: edges whose direction and strength stay the same in many pictures.

    Pictures count only when they differ from the last one that counted, so a camera at rest does not make tissue
    stand still.
    """

    def __init__(self) -> None:
        self.overlay: Mask = np.zeros((1, 1), np.bool_)
        self._seen = 0
        self._last_s = -np.inf
        self._last: NDArray[np.float32] | None = None
        self._mean: NDArray[np.float32] | None = None
        self._strength: NDArray[np.float32] | None = None
        self._change: NDArray[np.float32] | None = None

    @property
    def known(self) -> bool:
        return self._seen >= _GLASS_PICTURES

    def note(self, bgr: Bgr, time_s: float) -> None:
        """Take a picture of the body."""
        if time_s - self._last_s < _GLASS_EVERY_S:
            return
        grey = np.asarray(cv2.cvtColor(_small(bgr, _GLASS_SIDE), cv2.COLOR_BGR2GRAY), np.float32)
        lit = grey > _BLACK
        if self._last is not None and np.abs(grey - self._last)[lit].sum() < _GLASS_CHANGE * max(1, int(lit.sum())):
            return
        change = np.zeros_like(grey) if self._last is None else np.abs(grey - self._last)
        self._last, self._last_s = grey, time_s
        slope = np.asarray([cv2.Sobel(grey, cv2.CV_32F, 1, 0), cv2.Sobel(grey, cv2.CV_32F, 0, 1)], np.float32)
        strength = np.asarray(np.hypot(slope[0], slope[1]), np.float32)
        self._seen += 1
        if self._mean is None or self._strength is None or self._change is None:
            self._mean, self._strength, self._change = slope, strength, change
        else:
            share = 1.0 / min(self._seen, _GLASS_MEMORY)
            self._mean += share * (slope - self._mean)
            self._strength += share * (strength - self._strength)
            self._change += share * (change - self._change)
        if self.known:
            self._find()

    def _find(self) -> None:
        assert self._mean is not None
        assert self._strength is not None
        assert self._change is not None
        reach = 2 * round(_GLASS_REACH * self._change.shape[1]) + 1
        steady = np.hypot(self._mean[0], self._mean[1])
        # Tissue that nothing moves has steady edges too: weak ones count only where all around them moves.
        moves = cv2.boxFilter(self._change, -1, (reach, reach)) > _GLASS_MOVES
        found = (steady > np.where(moves, _GLASS_EDGE, _GLASS_SHARP)) & (steady > _GLASS_STEADY * self._strength)
        # Text is many such edges close together; a single line, as a scope's rim or an instrument at rest, is not.
        dense = cv2.boxFilter(found.astype(np.float32), -1, (reach, reach)) > _GLASS_SHARE
        self.overlay = cv2.dilate((dense & found).astype(np.uint8), np.ones((reach, reach), np.uint8)) > 0


def _small(bgr: Bgr, side: int) -> Bgr:
    height = max(1, round(bgr.shape[0] * side / bgr.shape[1]))
    return np.asarray(cv2.resize(bgr, (side, height), interpolation=cv2.INTER_AREA), np.uint8)


def _resized(mask: Mask, size: tuple[int, int]) -> Mask:
    """True wherever any of it is."""
    return np.asarray(cv2.resize(mask.astype(np.float32), size, interpolation=cv2.INTER_AREA) > 0, np.bool_)


def _parts(mask: Mask, kernel: int) -> Mask:
    """Its connected parts of a hundredth of the picture or more, after what is thinner than `kernel` went."""
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (kernel, kernel))
    opened = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_OPEN, disc)
    _, labels, statistics, _ = cv2.connectedComponentsWithStats(opened)
    large = statistics[:, cv2.CC_STAT_AREA] >= _LEAST_PART * mask.size
    large[0] = False
    return np.asarray(large[labels], np.bool_)


def _hull(mask: Mask) -> Mask:
    """The convex hull of all of it."""
    outlines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    hull = np.zeros(mask.shape, np.uint8)
    if outlines:
        cv2.fillConvexPoly(hull, cv2.convexHull(np.concatenate(outlines)), 1)
    return hull > 0


def _shrunk(mask: Mask) -> Mask:
    """Without its outermost hundredth, save where it reaches the picture's own edge."""
    width = max(1, round(_MARGIN * mask.shape[1]))
    bordered = cv2.copyMakeBorder(mask.astype(np.uint8), width, width, width, width, cv2.BORDER_REPLICATE)
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * width + 1, 2 * width + 1))
    return cv2.erode(bordered, kernel)[width:-width, width:-width] > 0
