# SPDX-License-Identifier: Apache-2.0
"""Shapes of the phantom's six instruments, drawn once as shaded pictures with transparency.

An instrument lies along x with its tip at the origin and its shaft towards +x; the unit is the shaft's
half-width. Every part is a polygon whose edge is bevelled: distance to the edge gives a height, the height a
normal, and the normal is lit by a lamp beside the camera, which makes cylinders round and jaws sharp.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from surg_perception.data.labels import CHOLECT50_INSTRUMENTS

LEFT, RIGHT, HALF_HEIGHT = -1.0, 26.0, 3.4
OPENING_STAGES = 6
SHAFT_SCALE = {"grasper": 1.0, "bipolar": 1.05, "hook": 1.0, "scissors": 0.95, "clipper": 1.55, "irrigator": 1.0}
"""Shaft width relative to the 5 mm grasper; the clip applier needs a 10 mm trocar."""

_Points = Sequence[tuple[float, float]]
_STEEL = (172, 176, 178)
_LAMP = np.array([0.10, -0.34, 0.935], np.float32)


@dataclass(frozen=True)
class Sprite:
    """Premultiplied BGRA uint8 picture, and its alpha alone.

    The pixel of (x, y) is ((x - LEFT) * density, (y + HALF_HEIGHT) * density).
    """

    bgra: NDArray[Any]
    alpha: NDArray[Any]


class _Canvas:
    def __init__(self, density: float) -> None:
        self.density = density
        self.height, self.width = round(2 * HALF_HEIGHT * density), round((RIGHT - LEFT) * density)
        self.bgr = np.zeros((self.height, self.width, 3), np.float32)
        self.alpha = np.zeros((self.height, self.width), np.float32)

    def _pixels(self, points: _Points) -> NDArray[np.int32]:
        scaled = (np.asarray(points, np.float64) - (LEFT, -HALF_HEIGHT)) * self.density
        return np.round(scaled * 16).astype(np.int32)

    def solid(
        self, outline: _Points, colour: tuple[int, int, int], *, bevel: float, shine: float = 0.8,
        holes: Sequence[_Points] = (), sharpness: float = 14.0, tube: bool = False,
    ) -> None:  # fmt: skip
        """Paint a bevelled polygon; `bevel` in units, `shine` 0..1 is the strength of the highlight.

        A `tube` is round across and straight along x: its two ends are cut, not bevelled.
        """
        xy = np.asarray(outline)
        pad = 2
        pad_x = 0 if tube else pad
        x0 = max(0, int((xy[:, 0].min() - LEFT) * self.density) - pad_x)
        x1 = min(self.width, int((xy[:, 0].max() - LEFT) * self.density) + pad_x)
        y0 = max(0, int((xy[:, 1].min() + HALF_HEIGHT) * self.density) - pad)
        y1 = min(self.height, int((xy[:, 1].max() + HALF_HEIGHT) * self.density) + pad + 1)
        if x1 <= x0 or y1 <= y0:
            return
        mask = np.zeros((y1 - y0, x1 - x0), np.uint8)
        shift = np.array([x0, y0]) * 16
        cv2.fillPoly(mask, [self._pixels(outline) - shift.astype(np.int32)], 255, cv2.LINE_AA, 4)
        for hole in holes:
            cv2.fillPoly(mask, [self._pixels(hole) - shift.astype(np.int32)], 0, cv2.LINE_AA, 4)
        left, right = (self.height if tube else 0), (self.height if tube or x1 == self.width else 0)
        inside = cv2.copyMakeBorder(mask, 0, 0, left, right, cv2.BORDER_REPLICATE)
        distance = cv2.distanceTransform((inside > 127).astype(np.uint8), cv2.DIST_L2, 5)[:, left : left + x1 - x0]
        rise = np.clip(distance / (bevel * self.density), 0.0, 1.0)
        height = np.sqrt(np.maximum(1.0 - (1.0 - rise) ** 2, 0.0)) * np.float32(bevel * self.density)
        height = cv2.GaussianBlur(height, (0, 0), max(0.5, 0.05 * self.density))
        gx = cv2.Sobel(height, cv2.CV_32F, 1, 0, scale=0.125)
        gy = cv2.Sobel(height, cv2.CV_32F, 0, 1, scale=0.125)
        norm = 1.0 / np.sqrt(gx * gx + gy * gy + 1.0)
        facing = np.clip((-gx * _LAMP[0] - gy * _LAMP[1] + _LAMP[2]) * norm, 0.0, 1.0)
        light = 0.16 + 0.84 * facing * np.sqrt(norm)
        gloss = shine * (cv2.pow(facing, sharpness * 6) + 0.35 * cv2.pow(facing, sharpness))
        shaded = light[..., None] * np.array(colour, np.float32) + 150.0 * gloss[..., None]
        over = (mask.astype(np.float32) / 255.0)[..., None]
        area = np.s_[y0:y1, x0:x1]
        self.bgr[area] = self.bgr[area] * (1 - over) + shaded * over
        self.alpha[area] = self.alpha[area] * (1 - over[..., 0]) + over[..., 0]

    def tone(self, outline: _Points, colour: tuple[int, int, int], strength: float) -> None:
        """Stain what is already painted, without changing the outline."""
        mask = np.zeros((self.height, self.width), np.uint8)
        cv2.fillPoly(mask, [self._pixels(outline)], 255, cv2.LINE_AA, 4)
        share = (mask.astype(np.float32) * (strength / 255.0) * self.alpha)[..., None]
        self.bgr = self.bgr * (1 - share) + np.array(colour, np.float32) * share

    def sprite(self) -> NDArray[np.uint8]:
        premultiplied = np.dstack([np.clip(self.bgr, 0, 255) * self.alpha[..., None], self.alpha * 255.0])
        return np.clip(np.rint(premultiplied), 0, 255).astype(np.uint8)


def _bar(x0: float, x1: float, half0: float = 1.0, half1: float | None = None) -> list[tuple[float, float]]:
    half1 = half0 if half1 is None else half1
    return [(x0, -half0), (x1, -half1), (x1, half1), (x0, half0)]


def _capsule(x0: float, x1: float, y: float, half: float) -> list[tuple[float, float]]:
    turn = np.linspace(0.5 * np.pi, 1.5 * np.pi, 9)
    left = [(x0 + half * float(np.cos(a)), y + half * float(np.sin(a))) for a in turn]
    right = [(x1 - half * float(np.cos(a)), y - half * float(np.sin(a))) for a in turn]
    return left + right


def _turn(points: _Points, pivot_x: float, angle: float) -> list[tuple[float, float]]:
    c, s = np.cos(angle), np.sin(angle)
    return [(pivot_x + c * (x - pivot_x) - s * y, s * (x - pivot_x) + c * y) for x, y in points]


def _mirror(points: _Points) -> list[tuple[float, float]]:
    return [(x, -y) for x, y in points]


def _grasper(canvas: _Canvas, opening: float) -> None:
    canvas.solid(_bar(9.5, 60), (62, 56, 54), bevel=1.0, shine=0.34, tube=True)
    canvas.solid(_bar(9.2, 9.9, 1.06), (40, 38, 38), bevel=0.3, shine=0.3)
    canvas.solid(_bar(4.6, 9.5, 0.86, 0.92), _STEEL, bevel=0.9, tube=True)
    upper = [(0.0, 0.04), (0.25, 0.5), (1.2, 0.72), (5.2, 0.82), (5.6, 0.1), (5.0, 0.02)]
    upper += [(4.6 - 0.3 * k, 0.02 + 0.10 * (k % 2)) for k in range(15)]
    window = _capsule(1.5, 3.9, 0.42, 0.16)
    for sign in (1, -1):
        jaw, hole = (upper, window) if sign > 0 else (_mirror(upper), _mirror(window))
        angle = -sign * 0.30 * opening
        canvas.solid(_turn(jaw, 5.4, angle), (150, 156, 160), bevel=0.28, holes=[_turn(hole, 5.4, angle)], sharpness=9)
    canvas.solid(_capsule(5.1, 5.7, 0.0, 0.32), (120, 124, 126), bevel=0.3)


def _bipolar(canvas: _Canvas, opening: float) -> None:
    canvas.solid(_bar(6.3, 60), (128, 142, 150), bevel=1.0, shine=0.75, tube=True)
    for x in np.arange(9.0, RIGHT, 3.1):
        canvas.tone(_capsule(float(x), float(x) + 0.25, 0.15, 0.2), (24, 24, 26), 0.85)
    canvas.solid(_bar(5.6, 6.5, 0.94, 1.02), (150, 160, 164), bevel=0.5)
    arm = [(0.0, 0.03), (0.1, 0.30), (1.1, 0.46), (2.3, 1.0), (3.6, 1.22), (6.0, 0.85), (6.0, 0.3), (3.9, 0.66),
           (2.7, 0.5), (1.4, 0.05)]  # fmt: skip
    pad = [(0.0, 0.03), (0.1, 0.28), (0.9, 0.38), (1.25, 0.05)]
    for sign in (1, -1):
        angle = -sign * 0.20 * opening
        arm_, pad_ = (arm, pad) if sign > 0 else (_mirror(arm), _mirror(pad))
        canvas.solid(_turn(arm_, 6.0, angle), (206, 128, 62), bevel=0.3, shine=0.55)
        canvas.solid(_turn(pad_, 6.0, angle), (150, 178, 196), bevel=0.16, shine=0.9)


def _hook(canvas: _Canvas, opening: float) -> None:
    del opening
    canvas.solid(_bar(6.2, 60), (66, 58, 54), bevel=1.0, shine=0.42, tube=True)
    for x in (13.5, 20.5):
        canvas.tone(_bar(x, x + 0.35, 1.0), (96, 90, 86), 0.5)
    wire = [(2.6, -0.15), (0.55, -0.17), (0.26, -0.05), (0.16, 0.25), (0.05, 1.0), (0.22, 1.14), (0.42, 1.02),
            (0.52, 0.3), (0.66, 0.17), (2.6, 0.15)]  # fmt: skip
    canvas.solid(wire, (96, 138, 158), bevel=0.16, shine=1.0)
    cone = [(2.0, -0.3), (2.25, -0.42), (6.3, -1.0), (6.3, 1.0), (2.25, 0.42), (2.0, 0.3)]
    canvas.solid(cone, (206, 212, 214), bevel=0.9, shine=0.5, sharpness=6, tube=True)
    canvas.tone([(2.0, -0.3), (2.5, -0.46), (2.7, 0.48), (2.0, 0.3)], (40, 70, 110), 0.35)


def _scissors(canvas: _Canvas, opening: float) -> None:
    canvas.solid(_bar(8.2, 60), (88, 84, 82), bevel=1.0, shine=0.5, tube=True)
    canvas.solid(_bar(4.4, 8.4, 0.7, 0.94), _STEEL, bevel=0.8, tube=True)
    blade = [(0.0, 0.62), (0.5, 0.78), (2.0, 0.72), (4.9, 0.6), (4.9, -0.12), (3.2, -0.05), (1.2, 0.22)]
    for sign in (1, -1):
        angle = -sign * 0.42 * opening + sign * 0.13
        blade_ = blade if sign > 0 else _mirror(blade)
        colour = (188, 192, 194) if sign > 0 else (140, 144, 148)
        canvas.solid(_turn(blade_, 4.7, angle), colour, bevel=0.24, shine=1.0, sharpness=7)
    canvas.solid(_capsule(4.5, 4.9, 0.0, 0.34), (108, 112, 114), bevel=0.3)


def _clipper(canvas: _Canvas, opening: float) -> None:
    canvas.solid(_bar(4.4, 60), (176, 182, 186), bevel=1.0, shine=1.0, sharpness=10, tube=True)
    for x in (4.9, 5.5, 11.0):
        canvas.tone(_bar(x, x + 0.22, 1.0), (52, 54, 58), 0.8)
    canvas.solid(_bar(3.2, 4.5, 0.72, 0.86), (142, 146, 150), bevel=0.7, tube=True)
    jaw = [(0.0, 0.10), (0.05, 0.34), (0.5, 0.46), (2.6, 0.5), (3.6, 0.62), (3.9, 0.2), (2.6, 0.16), (0.4, 0.10)]
    clip = [(0.12, 0.04), (0.12, 0.16), (2.2, 0.2), (2.2, 0.06)]
    for sign in (1, -1):
        angle = -sign * 0.20 * min(opening, 1.0)
        jaw_, clip_ = (jaw, clip) if sign > 0 else (_mirror(jaw), _mirror(clip))
        canvas.solid(_turn(jaw_, 3.7, angle), (158, 162, 166), bevel=0.18, shine=0.9, sharpness=8)
        canvas.solid(_turn(clip_, 3.7, angle), (206, 200, 190), bevel=0.08, shine=1.0)


def _irrigator(canvas: _Canvas, opening: float) -> None:
    del opening
    canvas.solid([(0.0, -0.86), (0.3, -0.94), (60, -0.94), (60, 0.94), (0.3, 0.94), (0.0, 0.86)],
                 (196, 198, 196), bevel=0.94, shine=0.75, sharpness=8, tube=True)  # fmt: skip
    canvas.tone(_capsule(0.12, 0.36, 0.0, 0.62), (22, 20, 30), 0.9)
    for x, y in ((1.7, -0.35), (2.6, 0.4), (3.5, -0.3), (4.4, 0.35)):
        canvas.tone(_capsule(x, x + 0.18, y, 0.17), (30, 28, 36), 0.9)


_DRAW = {
    "grasper": _grasper, "bipolar": _bipolar, "hook": _hook, "scissors": _scissors, "clipper": _clipper,
    "irrigator": _irrigator,
}  # fmt: skip


def draw_sprite(instrument: int, stage: int, density: float) -> Sprite:
    """One instrument, opened `stage` of 0..OPENING_STAGES-1, at `density` pixels per unit.

    Drawn at twice the density and averaged down, so that edges are smooth.
    """
    canvas = _Canvas(2 * density)
    _DRAW[CHOLECT50_INSTRUMENTS[instrument]](canvas, stage / (OPENING_STAGES - 1))
    full = canvas.sprite()
    size = (round((RIGHT - LEFT) * density), round(2 * HALF_HEIGHT * density))
    bgra = cv2.resize(full, size, interpolation=cv2.INTER_AREA)
    return Sprite(bgra, cv2.extractChannel(bgra, 3))
