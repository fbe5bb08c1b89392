# SPDX-License-Identifier: Apache-2.0
"""How a phantom procedure looks: tissue, gallbladder, bag, instruments, light, smoke, blood.

Two pictures are carried along for every place: its colour (diffuse light from the camera's lamp already in it) and
its surface (normal x, normal y, gloss; 128 = facing the camera). Textures are made once; a frame warps them into the
view, lays gallbladder, bag and instruments over, and lights the result: a headlight with shadows, and highlights where
the surface looks half-way between lamp and eye. Eight-bit arithmetic throughout keeps it far faster than real time.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from surg_perception.data.labels import CHOLECT50_INSTRUMENTS
from surg_perception.data.phantom_script import (
    ASSISTING,
    BAG_MOUTH_HALF,
    BAG_MOUTH_WIDENS,
    BAG_MOUTH_Y,
    Anatomy,
    Bag,
    Bleed,
    SceneState,
    ToolPose,
    Vec,
)
from surg_perception.data.phantom_tools import (
    HALF_HEIGHT,
    LEFT,
    OPENING_STAGES,
    RIGHT,
    SHAFT_SCALE,
    Sprite,
    draw_sprite,
)

# OpenCV's type stubs know no element types: these names say what is meant, the checker sees Any.
U8 = NDArray[Any]
F32 = NDArray[Any]
Matrix = NDArray[Any]  # float64
Rect = tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels

_WORLD_X, _WORLD_Y = 2.1, 1.9  # half extent of the painted world
_TEXTURE_LIMIT = 420.0  # texture pixels per world unit
_SHAFT_HALF_WIDTH = 0.064
_NEARER = 2.0  # how much wider a shaft is at its far (near the eye) end
_LENGTH = 0.8  # foreshortening of a shaft
_GAIN = 96.0  # gain map value that means 1
_QUANTA = 24
_SHRED_COLOURS = {
    "duct": ((92, 132, 172), (88, 108, 164), (66, 84, 136), (122, 152, 180)),
    "artery": ((72, 74, 164), (78, 92, 168), (44, 40, 118), (90, 96, 178)),
}


# ---- textures --------------------------------------------------------------------------------------------


def _noise(
    rng: np.random.Generator,
    shape: tuple[int, int],
    cells: float,
    octaves: int,
    fade: float = 0.5,
    stretch: float = 1.0,
) -> F32:
    """Value noise of mean 0 and about unit deviation.

    `cells` counts the lattice cells down the picture; `stretch` above 1 draws the grain out downwards.
    """
    height, width = shape
    total = np.zeros(shape, np.float32)
    weight, power = 1.0, 0.0
    for _ in range(octaves):
        rows = max(2, round(cells))
        columns = max(2, round(cells * stretch * width / height))
        lattice = rng.standard_normal((rows + 1, columns + 1)).astype(np.float32)
        if rows < height:
            total += np.float32(weight) * cv2.resize(lattice, (width, height), interpolation=cv2.INTER_CUBIC)
            power += weight * weight
        weight *= fade
        cells *= 2.0
    return total * np.float32(1.6 / math.sqrt(max(power, 1e-6)))


def _smooth(value: F32, low: float, high: float) -> F32:
    x = np.clip((value - low) / (high - low), 0.0, 1.0)
    return x * x * (3 - 2 * x)


def _vessels(rng: np.random.Generator, shape: tuple[int, int], unit: float, trees: int, reach: float) -> F32:
    """Branching blood vessels, 0..1, softened; `unit` pixels per world unit, `reach` length of a trunk."""
    height, width = shape
    canvas = np.zeros(shape, np.uint8)

    def grow(x: float, y: float, heading: float, length: float, thick: float, depth: int) -> None:
        points = [(x, y)]
        steps = 10
        bend = rng.normal(0, 0.12)
        for _ in range(steps):
            heading += rng.normal(bend, 0.22)
            x += math.cos(heading) * length / steps
            y += math.sin(heading) * length / steps
            points.append((x, y))
        line = np.round(np.array(points) * 16).astype(np.int32)
        tone = int(np.clip(90 + 60 * thick, 60, 255))
        cv2.polylines(canvas, [line], False, tone, max(1, round(thick * unit / 260)), cv2.LINE_AA, 4)
        if depth == 0:
            return
        for _ in range(int(rng.integers(2, 4))):
            k = int(rng.integers(3, steps))
            turn = rng.choice([-1, 1]) * rng.uniform(0.4, 0.9)
            grow(*points[k], heading + turn, length * rng.uniform(0.5, 0.75), thick * 0.66, depth - 1)

    for _ in range(trees):
        grow(
            rng.uniform(0, width), rng.uniform(0, height), rng.uniform(0, 2 * math.pi), reach * unit,
            rng.uniform(1.2, 2.4), 3,
        )  # fmt: skip
    return cv2.GaussianBlur(canvas, (0, 0), max(0.6, unit / 400)).astype(np.float32) / 255.0


def _cells(rng: np.random.Generator, shape: tuple[int, int], size: float, warp: F32) -> tuple[F32, F32]:
    """Lobules: dome height 0..1 per cell (0 at the borders) and a random tone per cell; `size` in pixels."""
    height, width = shape
    rows, columns = max(2, int(height / size)), max(2, int(width / size))
    grid_y, grid_x = np.mgrid[0:rows, 0:columns]
    px = np.clip((grid_x + rng.uniform(0.05, 0.95, grid_x.shape)) * width / columns, 0, width - 1)
    py = np.clip((grid_y + rng.uniform(0.05, 0.95, grid_y.shape)) * height / rows, 0, height - 1)
    seeds = np.full(shape, 255, np.uint8)
    seeds[py.astype(int), px.astype(int)] = 0
    distance, label = cv2.distanceTransformWithLabels(seeds, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
    tone = rng.standard_normal(int(label.max()) + 1).astype(np.float32)[label]
    dome = np.clip(1.0 - (distance / (0.75 * size)) ** 2, 0.0, 1.0)
    yy, xx = np.mgrid[0:height, 0:width].astype(np.float32)
    shift = warp * np.float32(0.35 * size)
    map_x, map_y = xx + shift, yy + np.roll(shift, height // 3, axis=0)
    remapped = [
        cv2.remap(np.asarray(a, np.float32), map_x, map_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
        for a in (dome, tone)
    ]
    return remapped[0], remapped[1]


def _tile(field: F32) -> F32:
    """Mirror a field both ways, so that it can be repeated without a seam, and soften it."""
    half = np.hstack([field, field[:, ::-1]])
    return cv2.GaussianBlur(np.vstack([half, half[::-1]]), (0, 0), 1.5, borderType=cv2.BORDER_REFLECT)


class _Surface:
    """Colour and surface of a patch under construction, float32, same size; `unit` = pixels per world unit."""

    def __init__(self, shape: tuple[int, int], unit: float) -> None:
        self.unit = unit
        self.colour = np.zeros((*shape, 3), np.float32)
        self.surface = np.full((*shape, 3), 128.0, np.float32)

    def lay(
        self, alpha: F32 | None, colour: F32, height: F32, gloss: F32 | float, shadow: float = 0.0, glow: float = 0.1
    ) -> None:
        """Lay tissue over: `height` in world units gives normals and shading, `alpha` 0..1 (None: 1) its extent.

        `glow` is the light left on slopes that face away: the more translucent the tissue, the more.
        """
        area: tuple[slice, slice] = (slice(None), slice(None))
        if alpha is not None:
            if shadow:
                self._shade_below(alpha, shadow)
            x, y, w, h = cv2.boundingRect((alpha > 0).astype(np.uint8))
            area = (slice(y, y + h), slice(x, x + w))
        height = height[area]
        gx = cv2.Sobel(height, cv2.CV_32F, 1, 0, scale=0.125) * np.float32(self.unit)
        gy = cv2.Sobel(height, cv2.CV_32F, 0, 1, scale=0.125) * np.float32(self.unit)
        norm = 1.0 / np.sqrt(gx * gx + gy * gy + 1.0)
        facing = np.clip((0.12 * gx + 0.30 * gy + 0.95) * norm, 0.0, 1.0)
        lit = colour[area] * (glow + (1 - glow) * facing)[..., None]
        shine = np.broadcast_to(np.asarray(255.0 * gloss, np.float32), self.colour.shape[:2])[area]
        normal = np.dstack([128 - 127 * gx * norm, 128 - 127 * gy * norm, shine])
        if alpha is None:
            self.colour[:], self.surface[:] = lit, normal
            return
        over = alpha[area][..., None]
        self.colour[area] += (lit - self.colour[area]) * over
        self.surface[area] += (normal - self.surface[area]) * over

    def _shade_below(self, alpha: F32, strength: float) -> None:
        """Soft contact shadow of what is about to be laid, cast a little to the right and downwards."""
        step = max(1, round(self.unit / 50))
        h, w = alpha.shape
        small = cv2.resize(alpha, (max(1, w // step), max(1, h // step)), interpolation=cv2.INTER_AREA)
        small = cv2.GaussianBlur(small, (0, 0), 0.07 * self.unit / step)
        k = self.unit / step
        moved = cv2.warpAffine(small, np.array([[1, 0, 0.01 * k], [0, 1, 0.03 * k]]), small.shape[::-1])
        left = 1.0 - np.float32(strength) * cv2.resize(np.maximum(moved, small), (w, h))
        self.colour *= left[..., None]

    def bytes(self) -> tuple[U8, U8]:
        return (
            np.clip(np.rint(self.colour), 0, 255).astype(np.uint8),
            np.clip(np.rint(self.surface), 0, 255).astype(np.uint8),
        )


def _tint(*channels: float) -> F32:
    return np.array(channels, np.float32)


def _blend(under: U8, over: U8, alpha: U8) -> None:
    """under <- over where alpha is 255, in place; `alpha` one channel, no premultiplication."""
    a = cv2.cvtColor(alpha, cv2.COLOR_GRAY2BGR)
    kept = cv2.multiply(under, cv2.bitwise_not(a), scale=1 / 255)
    under[:] = cv2.add(kept, cv2.multiply(over, a, scale=1 / 255))


def _four(bgr: U8, alpha: U8 | None = None) -> U8:
    """Add a fourth channel: OpenCV warps four channels more than twice as fast as three."""
    if alpha is None:
        return cv2.cvtColor(bgr, cv2.COLOR_BGR2BGRA)
    return cv2.merge([*cv2.split(bgr), alpha])


def _three(bgra: U8) -> U8:
    return cv2.cvtColor(bgra, cv2.COLOR_BGRA2BGR)


class _Patient:
    """Tissue textures of one seed at one resolution."""

    def __init__(self, seed: int, anatomy: Anatomy, bleeds: Sequence[Bleed], unit: float) -> None:
        self.unit = unit
        self.anatomy = anatomy
        rng = np.random.default_rng([seed, 11])
        self.shape = (round(2 * _WORLD_Y * unit), round(2 * _WORLD_X * unit))
        yy, xx = np.mgrid[0 : self.shape[0], 0 : self.shape[1]].astype(np.float32)
        self._x, self._y = xx / np.float32(unit) - _WORLD_X, yy / np.float32(unit) - _WORLD_Y
        self._palette(rng)
        self._paint_world(rng)
        self._paint_bed(rng)
        self._paint_veil(rng)
        self._paint_gallbladder(rng)
        self._paint_bag(rng)
        self._blood_fields(rng, bleeds)
        del self._x, self._y
        self._composed: OrderedDict[tuple[object, ...], tuple[U8, U8]] = OrderedDict()

    def _palette(self, rng: np.random.Generator) -> None:
        warm = rng.normal(0, 1)
        balance = _tint(1.0 - 0.05 * warm, 1.0 + rng.normal(0, 0.02), 1.0 + 0.03 * warm)

        def hue(b: float, g: float, r: float, spread: float = 0.07) -> F32:
            return _tint(b, g, r) * (1 + rng.normal(0, spread, 3).astype(np.float32)) * balance

        depth = rng.uniform(0.68, 1.08)
        self.liver = hue(48, 46, 122) * np.float32(depth)
        self.wall = hue(98, 104, 172)
        self.fat = hue(96, 180, 240, 0.03)
        self.gut = hue(150, 150, 226)
        kinds = [(178, 160, 196), (150, 176, 190), (138, 136, 208), (186, 182, 192)]
        self.gall = hue(*kinds[int(rng.integers(len(kinds)))], 0.035)
        self.blood = hue(14, 8, 104, 0.05)

    def _blob(
        self, rng: np.random.Generator, cx: float, cy: float, rx: float, ry: float, tilt: float, rough: float
    ) -> F32:
        """Field of a rounded organ: 1 in its middle, 0 on its outline, negative outside."""
        c, s = math.cos(tilt), math.sin(tilt)
        dx, dy = self._x - cx, self._y - cy
        u, v = (c * dx + s * dy) / rx, (c * dy - s * dx) / ry
        distance = cv2.pow(cv2.pow(np.abs(u), 2.4) + cv2.pow(np.abs(v), 2.4), 1 / 2.4)
        return 1.0 - distance + np.float32(rough) * _noise(rng, self.shape, 5, 4)

    def _paint_world(self, rng: np.random.Generator) -> None:
        a, shape, unit = self.anatomy, self.shape, self.unit
        ground = _Surface(shape, unit)
        grain = _noise(rng, shape, 110, 3, 0.7)
        soft = _noise(rng, shape, 4, 4)
        mid = _noise(rng, shape, 18, 4)

        veins = _vessels(rng, shape, unit, 22, 0.8)
        far = 0.84 - 0.34 * _smooth(self._y, -0.7, 0.1)
        wall = self.wall * (far + 0.10 * soft + 0.03 * mid)[..., None]
        wall += (_tint(20, 10, 110) * 0.8 - wall) * (0.55 * veins)[..., None]
        yellow = _smooth(_noise(rng, shape, 5, 3), 0.4, 1.6)
        wall += (self.fat * 0.7 - wall) * (0.5 * yellow)[..., None]
        ground.lay(None, wall, 0.05 * soft + 0.005 * mid + 0.0004 * grain, 0.6)

        speckle = _smooth(_noise(rng, shape, 290, 2, 0.8), 0.3, 1.8)
        pores = _smooth(_noise(rng, shape, 200, 2, 0.8), 0.8, 1.9)
        liver = self.liver * (0.94 + 0.10 * soft + 0.035 * mid + 0.13 * speckle - 0.15 * pores)[..., None]
        lobes = [
            (0.15, -0.75, 1.35, 0.80, rng.uniform(-0.2, 0.2)),
            (1.15, -0.25 + rng.uniform(-0.15, 0.15), 0.85, rng.uniform(0.5, 0.72), rng.uniform(-0.5, 0.3)),
            (
                -1.05 + rng.uniform(-0.1, 0.1),
                0.05,
                rng.uniform(0.86, 1.0),
                rng.uniform(0.62, 0.8),
                rng.uniform(-0.1, 0.5),
            ),
        ]
        for cx, cy, rx, ry, tilt in lobes:
            f = self._blob(rng, a.neck[0] + cx, cy, rx, ry, tilt, 0.020)
            dome = np.sqrt(np.clip(1 - (1 - np.clip(f / 0.5, 0, 1)) ** 2, 0, 1))
            height = 0.34 * dome + 0.030 * soft + 0.003 * mid + 0.0010 * speckle
            edge = _smooth(f, 0.0, 0.05)
            rim = (_tint(30, 26, 60) * (1 - edge)[..., None]).astype(np.float32)
            ground.lay(_smooth(f, -0.006, 0.012), liver + rim, height.astype(np.float32), 0.95, 0.65, 0.05)

        line = a.fat_line + 0.07 * _noise(rng, shape, 4, 2) + 0.10 * np.cos(2.1 * self._x + rng.uniform(0, 6))
        bend = _noise(rng, shape, 9, 2)
        lobule, tone = _cells(rng, shape, rng.uniform(0.20, 0.30) * unit, bend)
        small, small_tone = _cells(rng, shape, 0.085 * unit, bend)
        fat_veins = _vessels(rng, shape, unit, 26, 0.35)
        fat = self.fat * (0.88 + 0.03 * tone + 0.02 * small_tone + 0.03 * mid + 0.10 * lobule)[..., None]
        fat *= np.float32(1.0) - _tint(0.34, 0.15, 0.03) * (1 - 0.6 * lobule - 0.4 * small)[..., None]
        fat += (_tint(44, 40, 172) - fat) * (0.55 * fat_veins)[..., None]
        relief = 0.060 * np.sqrt(lobule) + 0.011 * small + 0.0008 * grain
        self._fat_colour, self._fat_height = fat, cv2.GaussianBlur(relief.astype(np.float32), (0, 0), 0.008 * unit)
        for depth_, lift in ((0.0, 0.94), (0.20, 1.06)):
            f = (self._y - line - depth_ + 0.07 * lobule).astype(np.float32)
            dome = 0.10 * np.sqrt(np.clip(f / 0.2, 0, 1))
            ground.lay(_smooth(f, 0.0, 0.012), fat * np.float32(lift), self._fat_height + dome, 0.62, 0.6, 0.46)

        if rng.random() < 0.85:
            side = rng.choice([-1.0, 1.0])
            f = self._blob(
                rng, side * rng.uniform(0.6, 1.1), a.fat_line + rng.uniform(0.34, 0.62), 0.9, 0.36, side * 0.3, 0.02
            )
            gut_veins = _vessels(rng, shape, unit, 30, 0.4)
            gut = self.gut * (0.86 + 0.05 * soft + 0.03 * mid)[..., None]
            gut += (_tint(40, 26, 190) - gut) * (0.6 * gut_veins)[..., None]
            dome = 0.22 * np.sqrt(np.clip(1 - (1 - np.clip(f / 0.5, 0, 1)) ** 2, 0, 1))
            ground.lay(_smooth(f, 0.0, 0.02), gut, (dome + 0.005 * mid).astype(np.float32), 1.0, 0.6, 0.35)
        self.colour, self.surface = ground.bytes()

    def _patch(self, x0: float, y0: float, x1: float, y1: float) -> tuple[slice, slice]:
        unit = self.unit
        return (
            slice(max(0, round((y0 + _WORLD_Y) * unit)), min(self.shape[0], round((y1 + _WORLD_Y) * unit))),
            slice(max(0, round((x0 + _WORLD_X) * unit)), min(self.shape[1], round((x1 + _WORLD_X) * unit))),
        )

    def _paint_bed(self, rng: np.random.Generator) -> None:
        """The raw liver bed under the gallbladder, and the char that coagulation leaves on it."""
        a = self.anatomy
        low, high = np.minimum(a.neck, a.fundus) - 0.5, np.maximum(a.neck, a.fundus) + 0.5
        self.bed_area = area = self._patch(low[0], low[1], high[0], high[1])
        x, y = self._x[area], self._y[area]
        shape = (x.shape[0], x.shape[1])
        axis = a.fundus - a.neck
        length = float(np.hypot(*axis))
        ux, uy = axis / length
        along = ((x - a.neck[0]) * ux + (y - a.neck[1]) * uy) / length
        aside = (x - a.neck[0]) * -uy + (y - a.neck[1]) * ux
        ragged = _noise(rng, shape, 14, 4)
        half = 0.10 + 0.17 * np.sin(np.pi * np.clip(along * 0.85 + 0.1, 0, 1)) + 0.02 * ragged
        inside = (
            _smooth(1 - np.abs(aside) / half, -0.05, 0.30) * _smooth(along, 0.0, 0.06) * _smooth(-along, -0.98, -0.86)
        )
        fibres = _noise(rng, shape, 13, 4, 0.5)
        patchy = _noise(rng, shape, 8, 4)
        raw = _tint(44, 52, 132) * (0.95 + 0.10 * fibres + 0.08 * patchy)[..., None]
        raw += (_tint(84, 132, 182) - raw) * (0.6 * _smooth(patchy + 0.5 * fibres, 0.2, 1.8))[..., None]
        raw += (_tint(22, 24, 52) - raw) * (0.6 * _smooth(-patchy + 0.6 * fibres, 0.4, 1.9))[..., None]
        raw += (_tint(20, 12, 112) - raw) * (0.7 * _smooth(_noise(rng, shape, 12, 3), 0.7, 1.5))[..., None]
        bed = _Surface(shape, self.unit)
        bed.lay(
            None, raw.astype(np.float32), (0.0055 * fibres + 0.006 * patchy - 0.03 * inside).astype(np.float32), 0.64
        )
        self.bed_colour, self.bed_surface = bed.bytes()
        self.bed_alpha = np.rint(255 * inside).astype(np.uint8)
        self.bed_order = np.clip(np.rint(255 * (along + 0.035 * ragged)), 0, 255).astype(np.uint8)
        crust = 1.0 - np.clip(np.abs(fibres + patchy) * 0.5, 0, 1)
        self.char_order = np.clip(np.rint(255 * (0.55 + 0.3 * patchy - 0.2 * crust)), 1, 255).astype(np.uint8)
        self.char_colour = np.broadcast_to(np.rint(_tint(26, 30, 38)).astype(np.uint8), self.bed_colour.shape).copy()

    def _paint_veil(self, rng: np.random.Generator) -> None:
        """Peritoneum and fat that hide duct and artery until they are dissected."""
        a = self.anatomy
        x0, x1 = a.neck[0] - 0.5, a.neck[0] + 0.6
        self.veil_area = area = self._patch(x0, a.neck[1] - 0.24, x1, a.fat_line + 0.35)
        self.veil_at = (area[1].start / self.unit - _WORLD_X, area[0].start / self.unit - _WORLD_Y)
        x, y = self._x[area], self._y[area]
        shape = (x.shape[0], x.shape[1])
        rough = _noise(rng, shape, 7, 4)
        top = np.clip((y - a.neck[1] + 0.16) / (a.fat_line - a.neck[1] + 0.20), 0, 1)
        middle = a.neck[0] + 0.06 + (a.duct_base[0] - a.neck[0] - 0.05) * 0.4 * top
        half = 0.13 + 0.30 * top**1.5 + 0.035 * rough
        cover = _smooth((half - np.abs(x - middle)).astype(np.float32), 0.0, 0.05) * _smooth(
            top + 0.03 * rough, 0.02, 0.2
        )
        edge = np.minimum(y[-1, 0] - y, np.minimum(x - x[0, 0], x[0, -1] - x)) + 0.02 * rough
        cover = cover * _smooth(edge.astype(np.float32), 0.03, 0.14)
        strands = _noise(rng, shape, 4, 3, 0.5, 2.5)
        sheet = np.clip(0.5 + 0.45 * rough - 0.55 * top, 0, 1)[..., None]
        colour = self._fat_colour[area] * (1.02 + 0.06 * strands)[..., None]
        pink = (0.5 * self.gall + 0.5 * _tint(90, 110, 205)) * (0.92 + 0.08 * strands)[..., None]
        colour = colour + (pink - colour) * sheet
        red = 0.35 * _smooth(_noise(rng, shape, 5, 3), 0.3, 2.0) + 0.5 * _vessels(rng, shape, self.unit, 14, 0.3)
        colour = colour + (_tint(50, 44, 160) - colour) * np.clip(red, 0, 1)[..., None]
        veil = _Surface(shape, self.unit)
        height = self._fat_height[area] * (1 - 0.7 * sheet[..., 0]) + 0.006 * strands + 0.06 * cover
        veil.lay(None, colour.astype(np.float32), height.astype(np.float32), 0.75, 0.0, 0.35)
        self.veil_colour, facing = veil.bytes()
        self.veil_surface = _four(facing)
        self._veils: OrderedDict[int, U8] = OrderedDict()
        self.veil_alpha = np.rint(255 * cover).astype(np.uint8)
        reach = np.hypot(x - a.neck[0] - 0.03, (y - a.neck[1] - 0.24) * 0.8)
        order = 0.06 + 0.66 * top + 0.06 * rough + 0.04 * strands
        rest = _smooth((y - a.duct_base[1] + 0.12 + 0.05 * rough).astype(np.float32), 0.0, 0.06)
        order = np.minimum(order, 0.80) * (1 - rest) + rest
        self.veil_order = np.clip(np.rint(255 * order), 0, 255).astype(np.uint8)
        # Under the veil: a dark hollow (Calot's triangle) that comes to light as it is opened.
        self.hollow = np.rint(215 * np.exp(-((reach / 0.30) ** 2)) * _smooth(edge.astype(np.float32), 0.0, 0.2)).astype(
            np.uint8
        )

    def _paint_gallbladder(self, rng: np.random.Generator) -> None:
        """Straightened along its axis: x = fundus to neck, y across, in world units of the resting organ."""
        a, unit = self.anatomy, self.unit
        self.gall_length = float(np.hypot(*(a.neck - a.fundus)))
        self.gall_margin, self.gall_half = 0.14, 0.46
        shape = (round(2 * self.gall_half * unit), round((self.gall_length + 2 * self.gall_margin) * unit))
        yy, xx = np.mgrid[0 : shape[0], 0 : shape[1]].astype(np.float32)
        s = (xx / unit - self.gall_margin) / self.gall_length
        v = yy / unit - self.gall_half
        body, waist = rng.uniform(0.30, 0.40), rng.uniform(0.15, 0.21)
        peak = rng.uniform(0.28, 0.5)
        knots = np.array([-0.08, -0.05, 0.0, peak * 0.5, peak, 0.72, 0.86, 0.94, 1.0, 1.04, 1.06])
        radii = np.array([0, 0.5, 0.74, 0.95, 1.0, 0.78, 0.56, 0.40, 0.24, 0.15, 0.0]) * body
        radii[6] = max(radii[6], waist)
        t = np.linspace(-0.1, 1.1, 600)
        curve = np.interp(t, knots, radii)
        curve = np.convolve(np.pad(curve, 15, mode="edge"), np.hanning(31) / np.hanning(31).sum(), mode="valid")
        radius = np.interp(s, t, curve).astype(np.float32)
        lump = _noise(rng, shape, 2.5, 2, 0.4)
        radius = radius * (1 + 0.035 * lump)
        f = 1 - np.abs(v) / np.maximum(radius, 1e-3)
        alpha = _smooth(np.where(radius > 0.015, (radius - np.abs(v)), -1.0).astype(np.float32), -0.002, 0.006)
        dome = np.sqrt(np.clip(1 - (1 - np.clip(f, 0, 1)) ** 2, 0, 1)) * radius
        soft, mid = _noise(rng, shape, 4, 3), _noise(rng, shape, 16, 3)
        veins = _vessels(rng, shape, unit, 12, 0.55)
        fine = _vessels(rng, shape, unit, 26, 0.25)
        colour = self.gall * (0.94 + 0.06 * soft + 0.025 * mid)[..., None]
        pink = _tint(110, 100, 200)
        colour += (pink - colour) * (0.5 * _smooth(soft, -0.2, 1.8))[..., None]
        colour += (_tint(70, 44, 150) - colour) * (0.62 * veins + 0.35 * fine)[..., None]
        fatty = _smooth(
            _noise(rng, shape, 6, 4) + 1.4 * (s - 0.55) + 2.0 * (np.abs(v) / np.maximum(radius, 0.05) - 0.8), 0.3, 2.2
        )
        colour += (self.fat * 0.95 - colour) * (rng.uniform(0.35, 0.85) * fatty)[..., None]
        height = (0.85 * dome + 0.010 * soft + 0.0028 * mid + 0.005 * veins + 0.010 * fatty).astype(np.float32)
        organ = _Surface(shape, unit)
        gloss = _smooth(f.astype(np.float32), 0.02, 0.16)
        organ.lay(None, colour.astype(np.float32), cv2.GaussianBlur(height, (0, 0), 0.008 * unit), gloss, 0.0, 0.22)
        self.gall_colour, facing = organ.bytes()
        self.gall_surface = _four(facing)
        self.gall_alpha = np.rint(255 * alpha).astype(np.uint8)
        # The side that was torn off the liver: raw, brown-yellow, along one edge, from the neck on.
        ragged = _noise(rng, shape, 12, 3)
        torn_edge = _smooth(
            (np.sign(a.swing) * v / np.maximum(radius, 0.03) + 0.14 * ragged).astype(np.float32), 0.05, 0.35
        )
        raw = _tint(60, 104, 158) * (0.85 + 0.2 * ragged)[..., None]
        raw = raw + (_tint(26, 22, 92) - raw) * (0.7 * _smooth(_noise(rng, shape, 12, 3), 0.2, 1.2))[..., None]
        raw = raw + (_tint(24, 28, 40) - raw) * (0.6 * _smooth(_noise(rng, shape, 22, 3), 0.7, 1.4))[..., None]
        torn = _Surface(shape, unit)
        torn.lay(None, raw.astype(np.float32), (0.7 * dome + 0.010 * ragged).astype(np.float32), 0.7)
        self.torn_colour, _ = torn.bytes()
        self.torn_alpha = np.rint(255 * torn_edge).astype(np.uint8)
        self.torn_order = np.clip(np.rint(255 * (1 - s + 0.04 * ragged)), 0, 255).astype(np.uint8)
        self._gall_worn: OrderedDict[int, U8] = OrderedDict()

    def _paint_bag(self, rng: np.random.Generator) -> None:
        """Specimen bag seen from the front, opening on top; drawn for unit size, `bag_half` world units around."""
        self.bag_half = 0.75
        side = max(24, round(2 * self.bag_half * self.unit * 0.7))
        self.bag_density = side / (2 * self.bag_half)
        self._bag_folds = (_noise(rng, (side, side), 3, 3, 0.7, 2.2), _noise(rng, (side, side), 3, 2))
        self._bags: dict[int, tuple[U8, U8, U8]] = {}

    def bag_pictures(self, opening: float) -> tuple[U8, U8, U8]:
        """Surface, colour with the alpha of the back wall, of the front wall, for an opening 0..1."""
        stage = round(opening * 8)
        if stage not in self._bags:
            self._bags[stage] = self._draw_bag(stage / 8)
        return self._bags[stage]

    def _draw_bag(self, opening: float) -> tuple[U8, U8, U8]:
        folds, soft = self._bag_folds
        side = folds.shape[0]
        axis = (np.arange(side, dtype=np.float32) + 0.5) / self.bag_density - self.bag_half
        x, y = np.meshgrid(axis, axis)
        mouth_x, mouth_y = BAG_MOUTH_HALF + BAG_MOUTH_WIDENS * opening, 0.03 + 0.15 * opening
        mouth_at = BAG_MOUTH_Y
        ring = np.hypot(x / mouth_x, (y - mouth_at) / mouth_y)
        depth = np.clip((y - mouth_at) / 0.95, 0, 1)
        half = (mouth_x + (0.10 - 0.1 * opening) * np.sin(np.pi * depth)) * np.sqrt(
            np.clip(1 - depth**3.2, 0, 1)
        ) + 0.02 * soft
        body = _smooth((half - np.abs(x)).astype(np.float32), 0.0, 0.015) * (y > mouth_at)
        mouth = _smooth((1 - ring).astype(np.float32), 0.0, 0.06)
        band = np.exp(-(((ring - 1.0) * min(mouth_x, 3 * mouth_y) / 0.022) ** 2)).astype(np.float32)
        crease = np.exp(-np.abs(folds) / 0.35)
        height = 0.12 * np.sqrt(np.clip(half - np.abs(x), 0, 1)) + 0.016 * crease + 0.03 * soft + 0.04 * band
        cloth = _Surface((side, side), self.bag_density)
        tone = 0.92 + 0.06 * soft + 0.10 * crease + 0.25 * band - 0.25 * mouth * (1 - band)
        cloth.lay(
            None, _tint(226, 220, 212) * tone[..., None].astype(np.float32), height.astype(np.float32), 1.0, 0.0, 0.4
        )
        colour, surface = cloth.bytes()
        front = np.maximum(body * (1 - mouth) * np.clip(0.52 + 0.10 * soft + 0.22 * crease, 0.3, 0.95), band * 0.95)
        back = np.maximum(body * 0.35, mouth * 0.75)
        walls = (_four(colour, np.rint(255 * np.clip(wall, 0, 1)).astype(np.uint8)) for wall in (back, front))
        return _four(surface), next(walls), next(walls)

    def _blood_fields(self, rng: np.random.Generator, bleeds: Sequence[Bleed]) -> None:
        """For each bleed where it is, the order in which blood reaches a place (0 first), and its wet surface."""
        self.blood_fields: list[tuple[tuple[slice, slice], U8, U8]] = []
        for bleed in bleeds:
            x, y = bleed.at
            area = self._patch(x - 1.2 * bleed.size, y - bleed.size, x + 1.2 * bleed.size, y + 2.0 * bleed.size)
            dx, dy = self._x[area] - x, self._y[area] - y
            shape = (dx.shape[0], dx.shape[1])
            narrow = np.where(dy > 0, 1.0 / (1 + 0.9 * np.clip(dy / bleed.size, 0, 2)), 1.0)
            far = np.hypot(dx * 1.5 / narrow**0.4, np.where(dy > 0, dy * 0.62, dy * 1.3)) / bleed.size
            order = far + 0.16 * _noise(rng, shape, 7, 4, 0.65)
            wet = _Surface(shape, self.unit)
            ripple = _noise(rng, shape, 6, 3)
            wet.lay(None, np.zeros((*shape, 3), np.float32), 0.010 * ripple - 0.05 * np.clip(order, 0, 1), 0.86)
            self.blood_fields.append((area, np.clip(np.rint(200 * order), 0, 255).astype(np.uint8), wet.bytes()[1]))

    # ---- what changes slowly: composed on demand, kept for the frames around --------------------------------

    def world(self, state: SceneState) -> tuple[U8, U8]:
        """Colour and surface of the whole field with bed, char, blood and hollow as they are at this instant."""
        amounts = tuple(round(b * _QUANTA) for b in state.bleeds)
        key = (round(state.detach * 2 * _QUANTA), round(state.char * _QUANTA), round(state.expose * _QUANTA),
               round(state.wet * 4), amounts)  # fmt: skip
        if key not in self._composed:
            self._composed[key] = self._compose(*key)
            while len(self._composed) > 3:
                self._composed.popitem(last=False)
        self._composed.move_to_end(key)
        return self._composed[key]

    def _compose(self, detach: int, char: int, expose: int, wet: int, amounts: tuple[int, ...]) -> tuple[U8, U8]:
        colour, surface = self.colour.copy(), self.surface.copy()
        if expose:
            area = self.veil_area
            alpha = cv2.convertScaleAbs(self.hollow, alpha=expose / _QUANTA)
            _blend(colour[area], np.full_like(self.veil_colour, (26, 24, 74)), alpha)
        if detach:
            area = self.bed_area
            front = -0.1 + 1.2 * detach / (2 * _QUANTA)
            alpha = cv2.multiply(self.bed_alpha, cv2.LUT(self.bed_order, _step_lut(front, 0.03)), scale=1 / 255)
            _blend(colour[area], self.bed_colour, alpha)
            _blend(surface[area], self.bed_surface, alpha)
            if char:
                burnt = cv2.LUT(self.char_order, _step_lut(0.12 + 0.22 * char / _QUANTA, 0.10))
                crust = cv2.multiply(alpha, burnt, scale=0.75 / 255)
                _blend(colour[area], self.char_colour, crust)
                _blend(surface[area], np.full_like(self.bed_surface, (128, 128, 60)), crust)
        for amount, (area, order, wet_surface) in zip(amounts, self.blood_fields, strict=True):
            if amount:
                reach = 0.78 * amount / _QUANTA
                alpha = cv2.LUT(order, _step_lut(reach, 0.05))
                thick = cv2.LUT(order, _step_lut(0.6 * reach, 0.3))
                red = cv2.LUT(cv2.cvtColor(thick, cv2.COLOR_GRAY2BGR), self._blood_lut())
                _blend(colour[area], red, cv2.convertScaleAbs(alpha, alpha=0.92))
                _blend(surface[area], wet_surface, cv2.convertScaleAbs(alpha, alpha=0.88))
        if wet:
            surface[..., 2] = cv2.convertScaleAbs(surface[..., 2], alpha=1.0, beta=12.0 * wet)
        return _four(colour), _four(surface)

    def _blood_lut(self) -> U8:
        ramp = np.linspace(0, 1, 256, dtype=np.float32)[:, None]
        lut = _tint(22, 14, 128) * (1 - ramp) + self.blood * 0.62 * ramp
        return np.rint(lut).astype(np.uint8)[None]

    def gallbladder(self, detach: float) -> U8:
        """Its colour and alpha, torn as far as it has come off the liver."""
        stage = round(detach * _QUANTA)
        if stage not in self._gall_worn:
            colour = self.gall_colour.copy()
            if stage:
                alpha = cv2.multiply(
                    self.torn_alpha,
                    cv2.LUT(self.torn_order, _step_lut(-0.05 + 1.1 * stage / _QUANTA, 0.05)),
                    scale=1 / 255,
                )
                _blend(colour, self.torn_colour, alpha)
            self._gall_worn[stage] = _four(colour, self.gall_alpha)
            while len(self._gall_worn) > 3:
                self._gall_worn.popitem(last=False)
        self._gall_worn.move_to_end(stage)
        return self._gall_worn[stage]

    def veil(self, expose: float) -> U8:
        """Colour and alpha of the tissue still covering duct and artery."""
        stage = round(expose * 2 * _QUANTA)
        if stage not in self._veils:
            keep = cv2.bitwise_not(cv2.LUT(self.veil_order, _step_lut(0.88 * stage / (2 * _QUANTA), 0.05)))
            self._veils[stage] = _four(self.veil_colour, cv2.multiply(self.veil_alpha, keep, scale=1 / 255))
            while len(self._veils) > 3:
                self._veils.popitem(last=False)
        self._veils.move_to_end(stage)
        return self._veils[stage]


def _step_lut(edge: float, soft: float) -> U8:
    """Table: 255 where value/255 is below `edge`, 0 above, over a soft border."""
    x = np.linspace(0, 1, 256, dtype=np.float32)
    return np.rint(255 * _smooth(edge - x, -soft, soft)).astype(np.uint8)


class Renderer:
    """Draws any `SceneState` of one patient at one frame size."""

    def __init__(self, width: int, height: int, seed: int, anatomy: Anatomy, bleeds: Sequence[Bleed]) -> None:
        rng = np.random.default_rng([seed, 12])
        self.width, self.height, self.seed = width, height, seed
        self.radius = min(width, height) * rng.uniform(0.535, 0.60)
        self.centre = (
            0.5 * width + rng.uniform(-0.02, 0.02) * min(width, height),
            0.5 * height + rng.uniform(-0.015, 0.015) * min(width, height),
        )
        reach = self.radius + 2
        self._x0, self._y0 = max(0, math.floor(self.centre[0] - reach)), max(0, math.floor(self.centre[1] - reach))
        x1, y1 = min(width, math.ceil(self.centre[0] + reach)), min(height, math.ceil(self.centre[1] + reach))
        self._size = (x1 - self._x0, y1 - self._y0)
        self._patient = _Patient(seed, anatomy, bleeds, min(_TEXTURE_LIMIT, max(60.0, 1.12 * self.radius)))
        self._sprites: dict[tuple[int, int], Sprite] = {}
        self._density = max(5.0, min(48.0, _SHAFT_HALF_WIDTH * self.radius * 1.55))
        self._blank = np.empty((height, width, 3), np.uint8)
        self._blank[:] = rng.integers((2, 1, 3), (7, 4, 12))
        self._shreds = {
            vessel: rng.uniform((0.05, -0.8, 0.1, 0.2, -0.6, 0), (1.0, 0.8, 0.9, 0.8, 0.6, 4), (count, 6))
            for vessel, count in (("duct", 18), ("artery", 10))
        }
        self._prepare_optics(rng)
        self._prepare_light(rng)

    # ---- made once -----------------------------------------------------------------------------------------

    def _grid(self, step: int, margin: float = 0.0) -> tuple[F32, F32]:
        """Coordinates of ROI pixels (every `step`-th) in picture radii from the picture's centre."""
        w, h = self._size
        pad = round(margin * self.radius / step)
        xs = (np.arange(-pad, math.ceil(w / step) + pad) + 0.5) * step + self._x0 - self.centre[0]
        ys = (np.arange(-pad, math.ceil(h / step) + pad) + 0.5) * step + self._y0 - self.centre[1]
        x, y = np.meshgrid(xs / self.radius, ys / self.radius)
        return x.astype(np.float32), y.astype(np.float32)

    def _prepare_optics(self, rng: np.random.Generator) -> None:
        x, y = self._grid(1)
        r = np.hypot(x, y)
        soft = 1.5 / self.radius
        disc = np.clip((1.0 - r) / soft + 0.5, 0, 1)
        shade = 1.0 - rng.uniform(0.35, 0.7) * _smooth(r, rng.uniform(0.72, 0.84), 1.04)
        self._radial = np.clip(np.rint(r * 200), 0, 255).astype(np.uint8)
        self._disc = disc > 0.5
        self._aperture = np.repeat(np.rint(255 * disc * shade).astype(np.uint8)[..., None], 3, axis=2)
        tube_x, tube_y = rng.uniform(-0.5, 0.5, 2)
        self._tube_light = np.rint(np.clip(200 + 60 * (tube_x * x + tube_y * y) / np.maximum(r, 0.05), 0, 255)).astype(
            np.uint8
        )

    def _prepare_light(self, rng: np.random.Generator) -> None:
        self._step = max(2, round(self.radius / 70))
        x, y = self._grid(self._step, 0.3)
        r2 = x * x + y * y
        width = rng.uniform(0.62, 0.85)
        fall = 1.30 * np.exp(-r2 / (2 * width * width)) + 0.12
        self._fall = np.dstack([fall**1.10, fall**1.05, fall**0.92]).astype(np.float32)
        self._pad = round(0.3 * self.radius / self._step)
        self._low = (math.ceil(self._size[0] / self._step), math.ceil(self._size[1] / self._step))
        ramp_x, ramp_y = self._grid(1, 0.3)
        slope = 127 * 0.62
        self._half_way = np.clip(
            np.rint(np.dstack([128 - slope * ramp_x, 128 - slope * ramp_y, 0 * ramp_x])), 0, 255
        ).astype(np.uint8)
        self._half_pad = round(0.3 * self.radius)
        level = np.arange(256, dtype=np.float32)
        miss = np.minimum(255, 26 * (level / 127 / 0.11) ** 2)
        self._miss_lut = np.rint(np.dstack([miss, miss, 0.75 * (255 - level)])).astype(np.uint8).reshape(1, 256, 3)
        shine = 220 * np.exp(-level / 26) + 46 * np.exp(-level / 90)
        shine[-1] = 0
        self._shine_lut = np.rint(np.clip(shine - shine[-2], 0, 255)).astype(np.uint8)
        smoke_rng = np.random.default_rng([self.seed, 13])
        self._smoke_layers = [_tile(_noise(smoke_rng, (96, 96), cells, 4, 0.6)) for cells in (3, 5)]
        grain = np.random.default_rng([self.seed, 14])
        w, h = self._size
        self._grain_mean = np.array([8.0, 8.0, 8.0, 0.0])
        self._grain = np.clip(np.rint(8 + 1.7 * grain.standard_normal((h + 64, w + 64, 3))), 0, 16).astype(np.uint8)

    # ---- geometry ------------------------------------------------------------------------------------------

    def _view(self, state: SceneState) -> Matrix:
        """World to ROI pixels, 2x3."""
        x, y, zoom, roll = state.camera
        zoom *= 1.0 - 0.35 * state.trocar_view
        k = self.radius * zoom
        c, s = k * math.cos(roll), k * math.sin(roll)
        ox, oy = self.centre[0] - self._x0, self.centre[1] - self._y0
        return np.array([[c, -s, ox - c * x + s * y], [s, c, oy - s * x - c * y]])

    def _sprite(self, tool: ToolPose) -> Sprite:
        key = (tool.instrument, round(min(max(tool.opening, 0.0), 1.0) * (OPENING_STAGES - 1)))
        if key not in self._sprites:
            self._sprites[key] = draw_sprite(*key, self._density)
        return self._sprites[key]

    def _pose(self, tool: ToolPose, view: Matrix) -> tuple[Matrix, Rect] | None:
        """Sprite canvas to ROI pixels (3x3), and the ROI rectangle (x0, y0, x1, y1) it can touch; None if none."""
        tip = view[:, :2] @ tool.tip + view[:, 2]
        away = view[:, :2] @ (tool.pivot - tool.tip)
        along = away / np.hypot(*away)
        across = np.array([-along[1], along[0]])
        kind = CHOLECT50_INSTRUMENTS[tool.instrument]
        zoom = math.hypot(view[0, 0], view[1, 0])
        half = _SHAFT_HALF_WIDTH * zoom * SHAFT_SCALE[kind]
        length = (RIGHT) * _NEARER * half * _LENGTH
        end = tip + along * length
        if tool.trocar == ASSISTING:
            across = -across
        density = self._density
        source = np.array([[0, -1], [0, 1], [RIGHT, -1], [RIGHT, 1]], np.float64)
        canvas = (source - (LEFT, -HALF_HEIGHT)) * density - 0.5
        target = np.array([tip - across * half, tip + across * half,
                           end - across * half * _NEARER, end + across * half * _NEARER])  # fmt: skip
        matrix = cv2.getPerspectiveTransform(canvas.astype(np.float32), target.astype(np.float32))
        reach = HALF_HEIGHT * half
        corners = np.array([tip - along * 2 * half - across * reach, tip - along * 2 * half + across * reach,
                            end - across * reach * _NEARER, end + across * reach * _NEARER])  # fmt: skip
        x0, y0 = np.maximum(0, np.floor(corners.min(axis=0))).astype(int)
        x1, y1 = np.minimum(self._size, np.ceil(corners.max(axis=0)) + 1).astype(int)
        if x1 <= x0 or y1 <= y0:
            return None
        return matrix, (int(x0), int(y0), int(x1), int(y1))

    @staticmethod
    def _warp(picture: U8, matrix: Matrix, rect: Rect) -> U8:
        x0, y0, x1, y1 = rect
        shift = np.array([[1, 0, -x0], [0, 1, -y0], [0, 0, 1.0]])
        return cv2.warpPerspective(picture, shift @ matrix, (x1 - x0, y1 - y0), flags=cv2.INTER_LINEAR)

    # ---- the picture ---------------------------------------------------------------------------------------

    def instrument_mask(self, state: SceneState) -> U8:
        """uint8 [H, W]: n where the n-th of `state.tools` is seen, else 0."""
        view = self._view(state)
        mask = np.zeros(self._size[::-1], np.uint8)
        for number, tool in enumerate(state.tools, start=1):
            pose = self._pose(tool, view)
            if pose is not None:
                self._mark(mask, number, self._warp(self._sprite(tool).bgra, *pose), pose[1])
        return self._whole_mask(mask, state)

    @staticmethod
    def _mark(mask: U8, number: int, bgra: U8, rect: Rect) -> None:
        x0, y0, x1, y1 = rect
        _, solid = cv2.threshold(cv2.extractChannel(bgra, 3), 127, 255, cv2.THRESH_BINARY)
        mask[y0:y1, x0:x1][solid > 0] = number

    def _whole_mask(self, mask: U8, state: SceneState) -> U8:
        mask[~self._disc] = 0
        if state.trocar_view > 0:
            mask[self._radial > 200 * self._tube_radius(state.trocar_view)] = 0
        full = np.zeros((self.height, self.width), np.uint8)
        full[self._y0 : self._y0 + self._size[1], self._x0 : self._x0 + self._size[0]] = mask
        return full

    def draw(self, state: SceneState, index: int, hide: frozenset[int] = frozenset()) -> tuple[U8, U8]:
        """BGR picture and instrument mask. `hide` leaves the sprites (not the shadows) of tools 1.. away."""
        view = self._view(state)
        patient = self._patient
        colour, surface = self._warp_world(*patient.world(state), view)
        if state.expose > 0.02:
            self._draw_vessels(colour, surface, state, view)
        if state.bag is not None:
            self._draw_bag(colour, surface, state.bag, view, back=True)
        if state.spine is not None:
            self._draw_gallbladder(colour, surface, state.spine, state, view)
        veil_to_view = self._texture_to_view(view, patient.unit, *patient.veil_at)
        self._lay(colour, surface, patient.veil(state.expose), patient.veil_surface, veil_to_view)
        if state.bag is not None:
            self._draw_bag(colour, surface, state.bag, view, back=False)
        poses = [(k, tool, self._pose(tool, view)) for k, tool in enumerate(state.tools, start=1)]
        self._cast_shadows(colour, [(tool, pose) for _, tool, pose in poses if pose is not None])
        mask = np.zeros(self._size[::-1], np.uint8)
        for number, tool, pose in poses:
            if pose is None or number in hide:
                continue
            x0, y0, x1, y1 = pose[1]
            bgra = self._warp(self._sprite(tool).bgra, *pose)
            self._mark(mask, number, bgra, pose[1])
            clear = cv2.cvtColor(cv2.bitwise_not(cv2.extractChannel(bgra, 3)), cv2.COLOR_GRAY2BGR)
            area = np.s_[y0:y1, x0:x1]
            colour[area] = cv2.add(cv2.multiply(colour[area], clear, scale=1 / 255), _three(bgra))
            surface[area] = cv2.multiply(surface[area], clear, scale=1 / 255)
        for tool in state.tools:
            if tool.flow:
                self._draw_water(colour, tool, view, index)
        lit = self._light(colour, surface, state, view, index)
        if state.trocar_view > 0:
            self._draw_tube(lit, state.trocar_view)
        lit = cv2.multiply(lit, self._aperture, scale=1 / 255)
        frame = self._blank.copy()
        inside = frame[self._y0 : self._y0 + self._size[1], self._x0 : self._x0 + self._size[0]]
        cv2.max(inside, lit, dst=inside)
        return frame, self._whole_mask(mask, state)

    @staticmethod
    def _texture_to_view(view: Matrix, unit: float, x: float, y: float) -> Matrix:
        """2x3 from texture pixels, whose first pixel lies at world (x, y), to ROI pixels."""
        m = view.copy()
        m[:, :2] /= unit
        m[:, 2] = view[:, :2] @ np.array([x, y]) + view[:, 2]
        return m

    def _warp_world(self, colour: U8, surface: U8, view: Matrix) -> tuple[U8, U8]:
        m = self._texture_to_view(view, self._patient.unit, -_WORLD_X, -_WORLD_Y)
        a, b = (
            _three(cv2.warpAffine(t, m, self._size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101))
            for t in (colour, surface)
        )
        return a, b

    def _lay(self, colour: U8, surface: U8, over: U8, over_surface: U8, m: Matrix) -> None:
        """Warp a texture patch (colour with alpha, surface) by `m` and blend it into colour and surface."""
        h, w = over.shape[:2]
        corners = np.array([[0, 0], [w, 0], [0, h], [w, h]]) @ m[:, :2].T + m[:, 2]
        x0, y0 = np.maximum(0, np.floor(corners.min(axis=0))).astype(int)
        x1, y1 = np.minimum(self._size, np.ceil(corners.max(axis=0))).astype(int)
        if x1 <= x0 or y1 <= y0:
            return
        m = m.copy()
        m[:, 2] -= (x0, y0)
        size = (int(x1 - x0), int(y1 - y0))
        bgra = cv2.warpAffine(over, m, size)
        alpha = cv2.extractChannel(bgra, 3)
        area = np.s_[y0:y1, x0:x1]
        _blend(colour[area], _three(bgra), alpha)
        _blend(surface[area], _three(cv2.warpAffine(over_surface, m, size)), alpha)

    def _draw_gallbladder(
        self, colour: U8, surface: U8, spine: tuple[Vec, Vec, Vec], state: SceneState, view: Matrix
    ) -> None:
        girth = state.girth
        patient = self._patient
        fundus, control, neck = (view[:, :2] @ p + view[:, 2] for p in spine)
        t = np.linspace(0, 1, 33)[:, None]
        curve = (1 - t) ** 2 * fundus + 2 * t * (1 - t) * control + t * t * neck
        scale = math.hypot(view[0, 0], view[1, 0])
        half = patient.gall_half * girth * scale
        x0, y0 = np.maximum(0, np.floor(curve.min(axis=0) - half)).astype(int)
        x1, y1 = np.minimum(self._size, np.ceil(curve.max(axis=0) + half)).astype(int)
        if x1 - x0 < 2 or y1 - y0 < 2:
            return
        size = (int(x1 - x0), int(y1 - y0))
        # Nearest point of the axis on a coarse grid; the map between is smooth enough to interpolate.
        step = max(4, round(self.radius / 30))
        gx = np.arange(0, size[0] + step, step) + x0
        gy = np.arange(0, size[1] + step, step) + y0
        px, py = np.meshgrid(gx.astype(np.float64), gy.astype(np.float64))
        d2 = (px[..., None] - curve[:, 0]) ** 2 + (py[..., None] - curve[:, 1]) ** 2
        near = d2.argmin(axis=2)
        tangent = np.gradient(curve, axis=0)
        speed = np.hypot(tangent[:, 0], tangent[:, 1])
        arc = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(curve, axis=0).T))])
        ux, uy = (tangent / speed[:, None])[near].transpose(2, 0, 1)
        dx, dy = px - curve[near, 0], py - curve[near, 1]
        s = (arc[near] + dx * ux + dy * uy) / arc[-1]
        v = (dy * ux - dx * uy) / (scale * girth)
        map_x = ((s * patient.gall_length + patient.gall_margin) * patient.unit).astype(np.float32)
        map_y = ((v + patient.gall_half) * patient.unit).astype(np.float32)
        shift = np.array([[step, 0, 0], [0, step, 0]], np.float64)
        smooth_x = cv2.warpAffine(map_x, shift, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        smooth_y = cv2.warpAffine(map_y, shift, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        whole, part = cv2.convertMaps(smooth_x, smooth_y, cv2.CV_16SC2)
        bgra = cv2.remap(patient.gallbladder(state.detach), whole, part, cv2.INTER_LINEAR)
        facing = cv2.remap(patient.gall_surface, whole, part, cv2.INTER_LINEAR)
        alpha = cv2.extractChannel(bgra, 3)
        area = np.s_[y0:y1, x0:x1]
        self._shade_below(colour[area], alpha)
        _blend(colour[area], _three(bgra), alpha)
        turn = math.atan2(*(neck - fundus)[::-1])
        c, sn = math.cos(turn), math.sin(turn)
        nx, ny, gloss, _ = cv2.split(facing)
        turned = (
            cv2.addWeighted(nx, c, ny, -sn, 128 * (1 - c + sn)),
            cv2.addWeighted(nx, sn, ny, c, 128 * (1 - sn - c)),
            gloss,
        )
        _blend(surface[area], cv2.merge(turned), alpha)

    def _shade_below(self, colour: U8, alpha: U8, strength: float = 0.55) -> None:
        """Soft contact shadow around and below something about to be laid over."""
        h, w = alpha.shape
        step = self._step
        small = cv2.resize(alpha, (max(1, w // step), max(1, h // step)), interpolation=cv2.INTER_AREA)
        small = cv2.GaussianBlur(small, (0, 0), 0.055 * self.radius / step)
        m = np.array([[1, 0, 0.02 * self.radius / step], [0, 1, 0.05 * self.radius / step]])
        small = cv2.warpAffine(small, m, small.shape[::-1], borderMode=cv2.BORDER_REPLICATE)
        left = cv2.convertScaleAbs(cv2.resize(small, (w, h), interpolation=cv2.INTER_LINEAR), alpha=strength)
        colour[:] = cv2.multiply(colour, cv2.cvtColor(cv2.bitwise_not(left), cv2.COLOR_GRAY2BGR), scale=1 / 255)

    def _strand(self, state: SceneState, vessel: str) -> list[Vec]:
        """Pieces of duct or artery as world polylines (one, or two when cut), neck end first."""
        anatomy = self._patient.anatomy
        place = np.linspace(0, 1, 15)
        base_piece = anatomy.vessel(vessel, anatomy.neck, place)[8:]
        if state.spine is None:
            return [base_piece]
        _, control, neck = state.spine
        if vessel not in state.cut:
            return [anatomy.vessel(vessel, neck, place)]
        heading = (neck - control) / max(1e-6, float(np.hypot(*(neck - control))))
        u = place[:7, None]
        return [neck + (0.42 * u - 0.04) * heading + u * u * (0.0, 0.08), base_piece]

    def _draw_vessels(self, colour: U8, surface: U8, state: SceneState, view: Matrix) -> None:
        scale = math.hypot(view[0, 0], view[1, 0])
        looks = (("artery", 0.023, (24, 20, 78), (74, 72, 180)), ("duct", 0.038, (30, 46, 78), (112, 148, 182)))
        for vessel, half, dark, bright in looks:
            for piece, line in enumerate(self._strand(state, vessel)):
                points = line @ view[:, :2].T + view[:, 2]
                pixels = np.round(points * 16).astype(np.int32)
                for k in range(8):
                    share = k / 7
                    tone = tuple(float(d + (b - d) * share) for d, b in zip(dark, bright, strict=True))
                    thick = max(1, round(2 * half * scale * (1 - 0.75 * share)))
                    lift = np.array([-0.10, -0.22]) * half * scale * share * 16
                    cv2.polylines(
                        colour, [pixels + np.round(lift).astype(np.int32)], False, tone, thick, cv2.LINE_AA, 4
                    )
                cv2.polylines(
                    surface, [pixels], False, (128, 118, 150), max(1, round(1.2 * half * scale)), cv2.LINE_AA, 4
                )
                self._draw_shreds(colour, vessel, points, half * scale)
                self._draw_clips(colour, state, vessel, piece, points, half * scale)

    def _draw_shreds(self, colour: U8, vessel: str, points: Vec, half: float) -> None:
        """Threads of fat and connective tissue that dissection leaves on a vessel."""
        tangent = np.gradient(points, axis=0)
        tangent /= np.maximum(np.hypot(tangent[:, 0], tangent[:, 1]), 1e-6)[:, None]
        for place, aside, length, thick, lean, tone in self._shreds[vessel]:
            k = int(place * (len(points) - 1))
            across = np.array([-tangent[k, 1], tangent[k, 0]])
            middle = points[k] + across * aside * half
            reach = (tangent[k] + lean * across) * length * half
            ends = np.round(np.array([middle - reach, middle + reach]) * 16).astype(np.int32)
            bgr = _SHRED_COLOURS[vessel][int(tone)]
            cv2.polylines(colour, [ends], False, bgr, max(1, round(thick * half)), cv2.LINE_AA, 4)

    def _draw_clips(self, colour: U8, state: SceneState, vessel: str, piece: int, points: Vec, half: float) -> None:
        for name, place in state.clips:
            if name != vessel:
                continue
            at = place
            if vessel in state.cut:
                if (place < 0.5) != (piece == 0 and state.spine is not None):
                    continue
                at = place / 0.5 * 0.75 if place < 0.5 else (place - 8 / 14) / (6 / 14)
            k = min(len(points) - 2, max(0, int(at * (len(points) - 1))))
            middle = points[k] + (points[k + 1] - points[k]) * (at * (len(points) - 1) - k)
            along = points[k + 1] - points[k]
            along = along / max(1e-6, float(np.hypot(*along)))
            across = np.array([-along[1], along[0]])
            for reach, thick, tone in (
                (1.55, 1.0, (40, 40, 44)),
                (1.45, 0.66, (150, 154, 158)),
                (1.2, 0.22, (236, 238, 240)),
            ):
                ends = np.array([middle - across * half * reach, middle + across * half * reach])
                cv2.polylines(
                    colour,
                    [np.round(ends * 16).astype(np.int32)],
                    False,
                    tone,
                    max(1, round(half * thick)),
                    cv2.LINE_AA,
                    4,
                )

    def _draw_bag(self, colour: U8, surface: U8, bag: Bag, view: Matrix, *, back: bool) -> None:
        patient = self._patient
        facing, behind, front = patient.bag_pictures(min(max(bag.opening, 0.0), 1.0))
        c, s = bag.size * math.cos(bag.tilt), bag.size * math.sin(bag.tilt)
        k = 1 / patient.bag_density
        turn = np.array([[c * k, -s * k], [s * k, c * k]])
        m = np.empty((2, 3))
        m[:, :2] = view[:, :2] @ turn
        corner = bag.at - turn @ np.array([facing.shape[1] / 2, facing.shape[0] / 2])
        m[:, 2] = view[:, :2] @ corner + view[:, 2]
        self._lay(colour, surface, behind if back else front, facing, m)

    def _cast_shadows(self, colour: U8, tools: Sequence[tuple[ToolPose, tuple[Matrix, Rect]]]) -> None:
        if not tools:
            return
        dark = np.zeros(self._low[::-1], np.uint8)
        k = 1.0 / self._step
        move = np.array([[k, 0, 0.035 * self.radius * k], [0, k, 0.085 * self.radius * k], [0, 0, 1]])
        for tool, (matrix, _) in tools:
            cv2.max(dark, cv2.warpPerspective(self._sprite(tool).alpha, move @ matrix, self._low), dst=dark)
        dark = cv2.GaussianBlur(dark, (0, 0), 0.03 * self.radius * k)
        full = cv2.resize(cv2.convertScaleAbs(dark, alpha=0.6), self._size, interpolation=cv2.INTER_LINEAR)
        cv2.multiply(colour, cv2.cvtColor(cv2.bitwise_not(full), cv2.COLOR_GRAY2BGR), dst=colour, scale=1 / 255)

    def _draw_water(self, colour: U8, tool: ToolPose, view: Matrix, index: int) -> None:
        tip = view[:, :2] @ tool.tip + view[:, 2]
        away = view[:, :2] @ (tool.pivot - tool.tip)
        angle = math.atan2(-away[1], -away[0])
        scale = math.hypot(view[0, 0], view[1, 0])
        rng = np.random.default_rng([self.seed, 15, index])
        for _ in range(14):
            turn = angle + rng.normal(0, 0.16)
            start, length = rng.uniform(0, 0.14), rng.uniform(0.08, 0.24)
            heading = np.array([math.cos(turn), math.sin(turn)]) * scale
            line = np.array([tip + heading * start, tip + heading * (start + length) + (0, 0.05 * scale * length)])
            tone = float(rng.uniform(110, 205))
            cv2.polylines(
                colour,
                [np.round(line * 16).astype(np.int32)],
                False,
                (tone, tone, tone),
                max(1, round(0.007 * scale)),
                cv2.LINE_AA,
                4,
            )

    # ---- light, smoke, noise -------------------------------------------------------------------------------

    def _light(self, colour: U8, surface: U8, state: SceneState, view: Matrix, index: int) -> U8:
        w, h = self._low
        limit = self._pad
        ox = min(max(round(float(state.light[0]) * self.radius / self._step), -limit), limit)
        oy = min(max(round(float(state.light[1]) * self.radius / self._step), -limit), limit)
        gain = self._fall[limit - oy : limit - oy + h, limit - ox : limit - ox + w] * np.float32(state.exposure)
        smoke = self._smoke_map(state, view) if state.smoke > 0.02 else None
        if smoke is not None:
            gain = gain * (1.0 - smoke[..., None])
        gain_u8 = cv2.resize(np.clip(gain * _GAIN, 0, 255).astype(np.uint8), self._size, interpolation=cv2.INTER_LINEAR)
        pad = self._half_pad
        dx = min(max(round(float(state.light[0]) * 0.9 * self.radius), -pad), pad)
        dy = min(max(round(float(state.light[1]) * 0.9 * self.radius), -pad), pad)
        half_way = self._half_way[pad - dy : pad - dy + self._size[1], pad - dx : pad - dx + self._size[0]]
        miss = cv2.LUT(cv2.absdiff(surface, half_way), self._miss_lut)
        across, down, dull = cv2.split(miss)
        shine = cv2.LUT(cv2.add(cv2.add(across, down), dull), self._shine_lut)
        lit = cv2.add(colour, cv2.cvtColor(shine, cv2.COLOR_GRAY2BGR))
        lit = cv2.multiply(lit, gain_u8, scale=1 / _GAIN)
        if smoke is not None:
            haze = smoke[..., None] * np.minimum(gain[..., 1:2] + 0.45, 1.2) * np.array([178, 176, 182], np.float32)
            lit = cv2.add(
                lit, cv2.resize(np.clip(haze, 0, 255).astype(np.uint8), self._size, interpolation=cv2.INTER_LINEAR)
            )
        gx, gy = (index * 37) % 64, (index * 23 + 11) % 64
        lit = cv2.add(lit, self._grain[gy : gy + self._size[1], gx : gx + self._size[0]])
        return cv2.subtract(lit, self._grain_mean)

    def _smoke_map(self, state: SceneState, view: Matrix) -> F32:
        """Opacity 0..1 on the low-resolution grid: wisps that rise from where the cautery is."""
        w, h = self._low
        t = state.time_s
        scale = 192 / (3.2 * self.radius / self._step)
        layers = []
        for field, vx, vy in zip(self._smoke_layers, (9.0, -14.0), (26.0, 39.0), strict=True):
            xs = ((np.arange(w) * scale + vx * t) % 192).astype(np.int32)
            ys = ((np.arange(h) * scale + vy * t) % 192).astype(np.int32)
            layers.append(field[np.ix_(ys, xs)])
        wisps = np.clip(0.42 + 0.30 * layers[0] + 0.22 * layers[1], 0.0, 1.0)
        at = (view[:, :2] @ state.smoke_at + view[:, 2]) / self._step
        y, x = np.mgrid[0:h, 0:w].astype(np.float32)
        r = self.radius / self._step
        rise = np.clip((at[1] - y) / (1.3 * r), -0.2, 1.0)
        plume = np.exp(-(((x - at[0]) / (r * (0.28 + 0.5 * np.clip(rise, 0, 1)))) ** 2)) * _smooth(rise, -0.18, 0.05)
        opacity = state.smoke * (0.75 * plume * wisps + 0.45 * wisps * wisps)
        return cv2.GaussianBlur(np.clip(opacity, 0, 0.9).astype(np.float32), (0, 0), 1.2)

    @staticmethod
    def _tube_radius(drawn_back: float) -> float:
        return 1.08 - 0.84 * drawn_back

    def _draw_tube(self, lit: U8, drawn_back: float) -> None:
        """The trocar's inside around what is still seen through it."""
        edge = 200 * self._tube_radius(drawn_back)
        level = np.arange(256, dtype=np.float32)
        depth = np.clip(edge / np.maximum(level, 1.0), 0, 1)  # 1 at the far rim, falling towards the eye
        tone = 236 * (1.0 - 0.55 * depth**2.5) + 60 * np.exp(-(((level - edge - 6) / 4.0) ** 2))
        cover = np.clip((level - edge) / 2.5 + 0.5, 0, 1)
        wall = cv2.multiply(
            cv2.LUT(self._radial, np.clip(tone, 0, 255).astype(np.uint8)), self._tube_light, scale=1 / 235
        )
        tube = cv2.merge([wall, cv2.convertScaleAbs(wall, alpha=0.985), cv2.convertScaleAbs(wall, alpha=0.96)])
        _blend(lit, tube, cv2.LUT(self._radial, np.rint(255 * cover).astype(np.uint8)))
