# SPDX-License-Identifier: Apache-2.0
"""What a camera will show, and how wrong that was: forecasts of one stream, judged when their time has come."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from surg_perception.stream.image_decode import Bgr

Predict = Callable[[NDArray[np.float32], Bgr], Bgr]
"""Latent float32 [D, 4, 4] and its frame uint8 [224, 224, 3] BGR to the frame expected gap_s later."""

HISTORY_S = 60.0
"""What came in so many seconds is what a new image is compared with."""
MIN_HISTORY = 10
"""A score needs so many judged images before it."""
_LEAST_SPREAD = 0.001  # in shares of colour: below it a still picture's noise would score as news
_BLOCK = 16
_DARK = 0.15  # of the sum of the three channels, 0..3: in the dark, noise has no colour
_MAD_TO_SD = 1.4826
_SAME_S = 1e-6


@dataclass(frozen=True)
class ForecastSettings:
    """Checked when made: ValueError names the setting, what was found and what is allowed.

    Attributes:
        rate_hz: at most so many forecasts per second of image stamps.
        reset_gap_s: after a longer pause between stamps, or a stamp that goes back, everything starts anew.
    """

    rate_hz: float = 2.0
    reset_gap_s: float = 10.0

    def __post_init__(self) -> None:
        if not 0.0 < self.rate_hz <= 100.0:
            raise ValueError(f"rate_hz is {self.rate_hz}; it must be above 0 and at most 100")
        if not self.reset_gap_s > 0.0:
            raise ValueError(f"reset_gap_s is {self.reset_gap_s}; it must be above 0")


@dataclass(frozen=True)
class Forecast:
    """What is expected gap_s after `stamp_ns`; `tag` is what came with the image it was made from."""

    stamp_ns: int
    frame: Bgr
    tag: Any


@dataclass(frozen=True)
class Novelty:
    """How far one image was from what had been forecast.

    Attributes:
        stamp_ns, tag: of the image that came.
        predicted_from_ns: stamp of the image that the forecast was made from.
        error: mean absolute difference between forecast and image, pixel values in 0..1.
        copy_error: the same for the image that the forecast was made from: how much the picture changed at all.
        colour_error, colour_copy_error: the same two of what `block_colours` makes of the pictures.
        score: (c - median) / (1.4826 * median absolute deviation), where c = colour_error + colour_copy_error, and both
            statistics are those of c in the 60 s before; NaN as long as there are fewer than ten. The forecast
            knows what is usual and so notices a strange picture as long as it lasts; the copy notices every change.
            Their sum separates the phantom's events better than either (docs/forecast.md).
    """

    stamp_ns: int
    predicted_from_ns: int
    error: float
    copy_error: float
    colour_error: float
    colour_copy_error: float
    score: float
    tag: Any


@dataclass
class ForecastCounts:
    """Since construction. `dropped`: forecasts that no image came for in time, or that a reset discarded."""

    forecasts: int = 0
    judged: int = 0
    dropped: int = 0


@dataclass(frozen=True)
class _Seen:
    stamp_ns: int
    frame: Bgr
    tag: Any


@dataclass(frozen=True)
class _Pending:
    due_ns: int
    source: _Seen
    forecast: Bgr


class Forecaster:
    """Forecasts of one camera. Used by one thread at a time; `settings` may be replaced at any time.

    A forecast is judged by the image nearest to its time, if that is at most half a period of `rate_hz` away;
    otherwise it is dropped and counted. At most gap_s * rate_hz + 2 forecasts wait.
    """

    def __init__(self, predict: Predict, gap_s: float, settings: ForecastSettings | None = None) -> None:
        if not gap_s > 0.0:
            raise ValueError(f"gap_s is {gap_s}; it must be above 0")
        self.gap_s = gap_s
        self.settings = settings or ForecastSettings()
        self.counts = ForecastCounts()
        self._predict = predict
        self._last: _Seen | None = None
        self._last_forecast_ns: int | None = None
        self._pending: deque[_Pending] = deque()
        self._past: deque[tuple[int, float]] = deque()

    def reset(self) -> None:
        """Forget the past, as for a new procedure."""
        self.counts.dropped += len(self._pending)
        self._pending.clear()
        self._past.clear()
        self._last = self._last_forecast_ns = None

    def update(
        self, frame: Bgr, latent: NDArray[np.float32] | None, stamp_ns: int, tag: Any = None
    ) -> list[Novelty | Forecast]:
        """Take an image in; what it says about earlier forecasts, then the forecast made from it, if one is due.

        Args:
            frame: uint8 [224, 224, 3], BGR; kept, so it must not change.
            latent: float32 [D, 4, 4]; None for a picture the model did not see, which judges but starts nothing.
            stamp_ns: of the image.
            tag: handed back with what comes of this image.

        Raises whatever `predict` raises; the image still counts as seen.
        """
        settings = self.settings
        if self._last is not None and not 0 <= stamp_ns - self._last.stamp_ns <= settings.reset_gap_s * 1e9:
            self.reset()
        now = _Seen(stamp_ns, frame, tag)
        found: list[Novelty | Forecast] = list(self._judge(now))
        self._last = now
        while len(self._pending) > self.gap_s * settings.rate_hz + 1:
            self._pending.popleft()
            self.counts.dropped += 1
        if latent is None or not self._is_due(stamp_ns):
            return found
        self._last_forecast_ns = stamp_ns
        forecast = self._predict(latent, frame)
        self.counts.forecasts += 1
        self._pending.append(_Pending(stamp_ns + round(self.gap_s * 1e9), now, forecast))
        found.append(Forecast(stamp_ns, forecast, tag))
        return found

    def _is_due(self, stamp_ns: int) -> bool:
        last_ns = self._last_forecast_ns
        return last_ns is None or (stamp_ns - last_ns) * 1e-9 >= 1.0 / self.settings.rate_hz - _SAME_S

    def _judge(self, now: _Seen) -> list[Novelty]:
        """Forecasts whose time has come, each against the nearer of this image and the one before."""
        found = []
        tolerance_ns = 0.5e9 / self.settings.rate_hz
        while self._pending and self._pending[0].due_ns <= now.stamp_ns:
            pending = self._pending.popleft()
            truth = min(
                (seen for seen in (self._last, now) if seen is not None),
                key=lambda seen: abs(seen.stamp_ns - pending.due_ns),
            )
            if abs(truth.stamp_ns - pending.due_ns) > tolerance_ns:
                self.counts.dropped += 1
                continue
            forecast, source, image = (
                block_colours(picture) for picture in (pending.forecast, pending.source.frame, truth.frame)
            )
            colour_error = float(np.abs(forecast - image).mean())
            colour_copy_error = float(np.abs(source - image).mean())
            found.append(
                Novelty(
                    stamp_ns=truth.stamp_ns,
                    predicted_from_ns=pending.source.stamp_ns,
                    error=picture_difference(pending.forecast, truth.frame),
                    copy_error=picture_difference(pending.source.frame, truth.frame),
                    colour_error=colour_error,
                    colour_copy_error=colour_copy_error,
                    score=self._score(truth.stamp_ns, colour_error + colour_copy_error),
                    tag=truth.tag,
                )
            )
            self.counts.judged += 1
        return found

    def _score(self, stamp_ns: int, value: float) -> float:
        past = self._past
        while past and stamp_ns - past[0][0] > HISTORY_S * 1e9:
            past.popleft()
        score = math.nan
        if len(past) >= MIN_HISTORY:
            values = np.array([earlier for _, earlier in past])
            median = float(np.median(values))
            spread = _MAD_TO_SD * float(np.median(np.abs(values - median)))
            score = (value - median) / max(spread, _LEAST_SPREAD)
        past.append((stamp_ns, value))
        return score


def picture_difference(a: Bgr, b: Bgr) -> float:
    """Mean absolute difference of two pictures uint8 of one shape, pixel values in 0..1."""
    return float(np.abs(a.astype(np.int16) - b).mean() / 255.0)


def block_colours(frame: Bgr) -> NDArray[np.float32]:
    """Shares of blue, green and red in blocks of 16 x 16 pixels of uint8 [224, 224, 3]: float32 [14, 14, 3], 0..1.

    Texture, which no light decoder draws, a little motion and the shading of a moving light leave them as they are;
    blood, smoke and steel do not.
    """
    side = frame.shape[0] // _BLOCK
    blocks = np.asarray(cv2.resize(frame.astype(np.float32), (side, side), interpolation=cv2.INTER_AREA)) / 255.0
    return np.asarray(blocks / (blocks.sum(axis=2, keepdims=True) + _DARK), np.float32)
