# SPDX-License-Identifier: Apache-2.0
"""The phantom: a procedural laparoscopic cholecystectomy video with exact labels.

It is the demo's patient and the tests' ground truth, never a substitute for real data. `phantom_script` decides
what happens, `phantom_render` draws it, `phantom_tools` has the instruments' shapes. A frame is a pure function of
the arguments and its index: no state, no global random numbers, any order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from surg_perception.data.phantom_render import Renderer
from surg_perception.data.phantom_script import SceneState, Script

SIDE_RANGE = (64, 1920)
"""Least and greatest width and height in pixels."""


@dataclass(frozen=True)
class InstrumentLabel:
    """One visible instrument.

    `instrument`, `verb`, `target` index `CHOLECT50_INSTRUMENTS`, `CHOLECT50_VERBS`, `CHOLECT50_TARGETS`.
    `box` is (left, top, width, height) in shares of the whole frame, 0..1, around the visible pixels.
    """

    instrument: int
    box: tuple[float, float, float, float]
    verb: int
    target: int


@dataclass(frozen=True)
class FrameLabels:
    """Ground truth of one frame; `phase` indexes `CHOLEC80_PHASES`."""

    index: int
    time_s: float
    phase: int
    instruments: tuple[InstrumentLabel, ...]

    @property
    def triplets(self) -> tuple[tuple[int, int, int], ...]:
        """(instrument, verb, target) of every visible instrument, in the order of `instruments`."""
        return tuple((i.instrument, i.verb, i.target) for i in self.instruments)


class Phantom:
    """A whole procedure, frame by frame.

    Args:
        width, height: size in pixels, each 64 to 1920.
        rate_hz: frames per second, above 0 and at most 240.
        seed: the patient and the procedure, 0 to 2**63 - 1.
        duration_s: length of the procedure; Cholec80's phase proportions are scaled to it.

    Raises:
        ValueError: an argument out of range; says what was found and what was expected.
    """

    def __init__(
        self,
        width: int = 854,
        height: int = 480,
        rate_hz: float = 25.0,
        seed: int = 0,
        duration_s: float = 120.0,
    ) -> None:
        low, high = SIDE_RANGE
        self.width = _whole("width", width, low, high)
        self.height = _whole("height", height, low, high)
        self.seed = _whole("seed", seed, 0, 2**63 - 1)
        self.rate_hz = _positive("rate_hz", rate_hz, 240.0)
        self.duration_s = _positive("duration_s", duration_s, 24 * 3600.0)
        self._count = round(self.rate_hz * self.duration_s)
        if self._count < 1:
            raise ValueError(
                f"duration_s {duration_s} at rate_hz {rate_hz} found, which makes no frame; expected at least one"
            )
        self._script = Script(self.seed, self.duration_s)
        self._renderer = Renderer(self.width, self.height, self.seed, self._script.anatomy, self._script.bleeds)

    def __len__(self) -> int:
        return self._count

    @property
    def phases(self) -> list[tuple[float, float, int]]:
        """(start_s, end_s, phase id) of the seven phases, in order, without gaps."""
        return list(self._script.phases)

    def time_s(self, index: int) -> float:
        """Time of a frame since the first. Raises IndexError outside 0..len-1."""
        if isinstance(index, bool) or not isinstance(index, (int, np.integer)):
            raise TypeError(f"frame index {index!r} found, expected an integer")
        if not 0 <= index < self._count:
            raise IndexError(f"frame index {index} found, expected 0 to {self._count - 1}")
        return int(index) / self.rate_hz

    def frame(self, index: int) -> tuple[NDArray[np.uint8], FrameLabels]:
        """Picture, BGR uint8 [H, W, 3], and its labels. Raises IndexError outside 0..len-1."""
        state = self._script.state(self.time_s(index))
        bgr, mask = self._renderer.draw(state, int(index))
        return bgr, self._labels(int(index), state, mask)

    def labels(self, index: int) -> FrameLabels:
        """The labels alone, without drawing the picture. Raises IndexError outside 0..len-1."""
        state = self._script.state(self.time_s(index))
        return self._labels(int(index), state, self._renderer.instrument_mask(state))

    def instrument_mask(self, index: int) -> NDArray[np.uint8]:
        """Segmentation, uint8 [H, W]: 0 no instrument, n the n-th of the scene's instruments (1-based).

        Numbers are those of the scene: an instrument that is out of sight leaves its number unused.
        """
        return self._renderer.instrument_mask(self._script.state(self.time_s(index)))

    def _labels(self, index: int, state: SceneState, mask: NDArray[np.uint8]) -> FrameLabels:
        found = []
        for number, tool in enumerate(state.tools, start=1):
            box = _box(mask == number)
            if box is not None:
                found.append(InstrumentLabel(tool.instrument, box, tool.verb, tool.target))
        return FrameLabels(index, state.time_s, self._script.phase_at(state.time_s)[0], tuple(found))


def _box(mask: NDArray[np.bool_]) -> tuple[float, float, float, float] | None:
    """Smallest box around True pixels as shares (left, top, width, height); None when there are none."""
    height, width = mask.shape
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    if not len(columns):
        return None
    left, top = int(columns[0]), int(rows[0])
    return left / width, top / height, (int(columns[-1]) + 1 - left) / width, (int(rows[-1]) + 1 - top) / height


def _whole(name: str, value: object, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not low <= value <= high:
        raise ValueError(f"{name} {value!r} found, expected a whole number from {low} to {high}")
    return int(value)


def _positive(name: str, value: object, high: float) -> float:
    good = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if not good or not math.isfinite(value) or not 0 < value <= high:  # type: ignore[arg-type, operator]
        raise ValueError(f"{name} {value!r} found, expected a number above 0 and at most {high:g}")
    return float(value)  # type: ignore[arg-type]
