# SPDX-License-Identifier: Apache-2.0
"""Causal smoothing and hysteresis of class probabilities, driven by stamps and not by the frame rate."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class FilterSettings:
    """Checked when made: ValueError names the setting, what was found and what is allowed.

    Attributes:
        time_constant_s: of the exponential smoothing; 0 turns smoothing off.
        switch_margin: by how much, in smoothed probability (0 to 1), a challenger must exceed the incumbent.
        hold_s: for how long it must do so without a break; 0 switches at once.
        reset_gap_s: after a longer pause between stamps the filter starts anew (may be infinite).
    """

    time_constant_s: float = 1.0
    switch_margin: float = 0.1
    hold_s: float = 0.5
    reset_gap_s: float = 10.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            highest = {"switch_margin": 1.0, "reset_gap_s": math.inf}.get(field.name, 3600.0)
            if not 0.0 <= value <= highest:
                raise ValueError(f"{field.name} is {value}; it must be from 0 to {highest}")
        if self.reset_gap_s == 0.0:
            raise ValueError("reset_gap_s is 0; it must be above 0, or every frame would start the filter anew")


class FilteredPhase(NamedTuple):
    """Output for one frame: class published, its smoothed probability, all smoothed ones float32 [C]."""

    phase_id: int
    confidence: float
    probabilities: NDArray[np.float32]


class TemporalFilter:
    """Smooths probabilities over time and lets the published class change only on lasting evidence.

    Smoothing: s += (1 - exp(-dt / time_constant_s)) * (p - s), dt from the stamps, so that a result does not
    depend on how many frames came in between. A class replaces the incumbent once its s has exceeded the
    incumbent's by more than switch_margin in every frame of at least hold_s seconds. A stamp before the last
    one, or more than reset_gap_s after it, starts anew. Deterministic, with constant work per frame.
    `settings` may be replaced at any time and acts from the next frame on.
    """

    def __init__(self, num_classes: int, settings: FilterSettings | None = None) -> None:
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}; it must be at least 1")
        self.num_classes = num_classes
        self.settings = settings or FilterSettings()
        self.reset()

    def reset(self) -> None:
        """Forget the past; the next frame starts anew."""
        self._stamp_s: float | None = None
        self._smoothed = np.zeros(self.num_classes)
        self._phase_id = -1
        # Since when each class exceeds the incumbent by the margin; NaN where it does not.
        self._ahead_since_s = np.full(self.num_classes, np.nan)

    def update(self, probabilities: ArrayLike, stamp_s: float) -> FilteredPhase:
        """Take the frame of `stamp_s` seconds with probabilities float [C] in 0..1.

        Raises ValueError, and keeps its state, for another shape or values that are not finite.
        """
        current = np.asarray(probabilities, np.float64)
        if current.shape != (self.num_classes,):
            raise ValueError(f"probabilities have shape {current.shape}, expected ({self.num_classes},)")
        if not (np.isfinite(current).all() and math.isfinite(stamp_s)):
            raise ValueError(f"not finite: probabilities {current.tolist()}, stamp {stamp_s} s")

        settings, last = self.settings, self._stamp_s
        self._stamp_s = stamp_s
        if last is None or not 0.0 <= stamp_s - last <= settings.reset_gap_s:
            self._smoothed = current.copy()
            self._phase_id = int(current.argmax())
            self._ahead_since_s[:] = np.nan
        else:
            time_constant_s = settings.time_constant_s
            weight = -math.expm1(-(stamp_s - last) / time_constant_s) if time_constant_s else 1.0
            self._smoothed += weight * (current - self._smoothed)
            self._switch(stamp_s, settings)
        confidence = float(self._smoothed[self._phase_id])
        return FilteredPhase(self._phase_id, confidence, self._smoothed.astype(np.float32))

    def _switch(self, stamp_s: float, settings: FilterSettings) -> None:
        ahead = self._smoothed - self._smoothed[self._phase_id] > settings.switch_margin
        since = np.where(np.isnan(self._ahead_since_s), stamp_s, self._ahead_since_s)
        self._ahead_since_s = np.where(ahead, since, np.nan)
        lasting = ahead & (stamp_s - since >= settings.hold_s)
        if lasting.any():
            self._phase_id = int(np.where(lasting, self._smoothed, -np.inf).argmax())
            self._ahead_since_s[:] = np.nan
