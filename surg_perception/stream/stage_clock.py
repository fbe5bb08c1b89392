# SPDX-License-Identifier: Apache-2.0
"""How long each stage of a frame took, and the recent percentiles of it for diagnostics."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from time import perf_counter

import numpy as np


class FrameTimes:
    """Stage times of one frame in ms, in the order of the work. Used by one thread at a time."""

    def __init__(self) -> None:
        self.times_ms: dict[str, float] = {}
        self._last_s = perf_counter()

    def lap(self, stage: str) -> None:
        """Book the time since construction or the last lap under `stage` (added where it has some)."""
        now_s = perf_counter()
        self.add(stage, (now_s - self._last_s) * 1e3)
        self._last_s = now_s

    def add(self, stage: str, duration_ms: float) -> None:
        """Book a time measured elsewhere, such as the wait in the mailbox."""
        self.times_ms[stage] = self.times_ms.get(stage, 0.0) + duration_ms


class StageClock:
    """Rolling window of the last `window` times of each stage, and of their sum as "total". Thread-safe."""

    def __init__(self, window: int = 512) -> None:
        if window < 1:
            raise ValueError(f"window is {window} frames; it must be at least 1")
        self._window = window
        self._lock = threading.Lock()
        self._times_ms: dict[str, deque[float]] = {}

    def record(self, times_ms: Mapping[str, float]) -> None:
        """Add one frame's stage times in ms; a frame need not have every stage."""
        with self._lock:
            for stage, duration_ms in {**times_ms, "total": sum(times_ms.values())}.items():
                self._times_ms.setdefault(stage, deque(maxlen=self._window)).append(duration_ms)

    def percentiles_ms(self, percents: Sequence[float] = (50, 95, 99)) -> dict[str, list[float]]:
        """For each stage seen, its percentiles in ms (linear interpolation) in the order asked."""
        with self._lock:
            windows = {stage: np.array(times) for stage, times in self._times_ms.items()}
        return {stage: np.percentile(times, percents).tolist() for stage, times in windows.items()}
