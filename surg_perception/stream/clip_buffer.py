# SPDX-License-Identifier: Apache-2.0
"""The last seconds of a live stream, sampled at a low rate and grouped into segments whose features are cached.

One thread offers messages, another one encodes and asks; every method may be called from any thread.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from surg_perception.stream.image_decode import MAX_PIXELS, Bgr, decode_to_model_input

F = TypeVar("F")

EARLY = 0.1
"""A frame that comes this part of a sampling period before its tick counts for it: stamps jitter."""
BREAK_PERIODS = 2.5
"""A step of the stamps longer than this many sampling periods breaks the stream."""


class NoFrames(LookupError):
    """The buffer holds no frame."""


class WindowOutside(LookupError):
    """The buffer holds frames, but none in the asked span; the message says which it holds."""


@dataclass(frozen=True)
class Window(Generic[F]):
    """What a question is answered from.

    Attributes:
        segments: (start_s, end_s, features) of each segment, oldest first; seconds since the first frame used, on
            the sampling grid. end_s is one sampling period after the segment's last frame.
        first_ns, last_ns: stamps of the first and the last frame used.
        frames: number of frames used.
    """

    segments: tuple[tuple[float, float, F], ...]
    first_ns: int
    last_ns: int
    frames: int


@dataclass
class _Sample:
    tick: int
    stamp_ns: int
    arrived_s: float
    frame: Bgr


@dataclass
class _Segment(Generic[F]):
    samples: list[_Sample] = field(default_factory=list)
    attempted: int = 0  # so many of the samples were given to the encoder
    encoded: int = 0  # so many are in `features`
    features: F | None = None


class ClipBuffer(Generic[F]):
    """Ring buffer of frames at `rate_hz`, by image stamps.

    Sampling: ticks lie one period apart, from the first frame on. The first frame at a tick (or up to a tenth of a
    period before it) is the newest one there and is kept; further frames until the next tick are not even decoded.
    Every `segment_frames` kept frames make a segment; the newest segment grows, and only it is encoded again.

    Stamps: a step ahead of more than 2.5 periods (a gap) ends the growing segment, so that no segment holds frames
    from both sides of it. A step back of more than 2.5 periods (a recording that loops) clears the buffer. A
    smaller step back is frames in the wrong order: they are left out.

    Age: a segment is dropped as a whole when its oldest frame is `length_s` old, by stamps as frames come, and by
    the steady clock in `expire`. So no frame is kept longer than that.

    Args:
        encode: uint8 [T, size, size, 3] BGR, T from 1 to segment_frames, to features; called by `encode_next` only.
        size: side of the model's input in pixels.
        rate_hz: sampling rate.
        length_s: seconds kept; must hold a segment.
        segment_frames: frames in a whole segment.
        max_segments: at most so many segments, the newest ones, make a window.
        max_pixels: larger images are refused.

    Raises:
        ValueError: the buffer would be shorter than a segment.
    """

    def __init__(
        self,
        encode: Callable[[Bgr], F],
        *,
        size: int,
        rate_hz: float = 1.0,
        length_s: float = 64.0,
        segment_frames: int = 4,
        max_segments: int = 16,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        if length_s * rate_hz < segment_frames:
            raise ValueError(
                f"a buffer of {length_s:g} s holds {length_s * rate_hz:g} frames at {rate_hz:g} Hz, expected at least "
                f"{segment_frames} (a segment of the model): raise buffer.length_s or buffer.rate_hz"
            )
        self._encode = encode
        self._size = size
        self._rate_hz = rate_hz
        self._period_ns = round(1e9 / rate_hz)
        self._length_s = length_s
        self._segment_frames = segment_frames
        self._max_segments = max_segments
        self._max_pixels = max_pixels
        self._lock = threading.Lock()
        self._segments: deque[_Segment[F]] = deque()
        self._grid_ns = 0

    # Frames come and go ---------------------------------------------------------------------------------------------

    def offer(self, message: Any, stamp_ns: int, arrived_s: float | None = None) -> bool:
        """Keep the picture of an image message if a tick of the sampling grid is due; whether it was kept.

        Args:
            message: raw or compressed image, as `stream.image_decode` takes it; decoded only if it is kept.
            stamp_ns: its stamp.
            arrived_s: when it came, by time.monotonic(); None: now.

        Raises:
            ImageError: the image is due and holds no usable picture; the buffer is unchanged, the next one is due.
        """
        with self._lock:
            if not self._due(stamp_ns):
                return False
        frame = decode_to_model_input(message, self._size, max_pixels=self._max_pixels)
        arrived_s = time.monotonic() if arrived_s is None else arrived_s
        with self._lock:
            if not self._due(stamp_ns):
                return False
            self._keep(stamp_ns, arrived_s, frame)
        return True

    def _newest(self) -> _Sample | None:
        return self._segments[-1].samples[-1] if self._segments else None

    def _tick(self, stamp_ns: int) -> int:
        return (stamp_ns - self._grid_ns + round(EARLY * self._period_ns)) // self._period_ns

    def _due(self, stamp_ns: int) -> bool:
        newest = self._newest()
        if newest is None or newest.stamp_ns - stamp_ns > BREAK_PERIODS * self._period_ns:
            return True
        return stamp_ns > newest.stamp_ns and self._tick(stamp_ns) > newest.tick

    def _keep(self, stamp_ns: int, arrived_s: float, frame: Bgr) -> None:
        newest = self._newest()
        if newest is not None and stamp_ns < newest.stamp_ns:
            self._segments.clear()
            newest = None
        if newest is None:
            self._grid_ns = stamp_ns
        if (
            newest is None
            or len(self._segments[-1].samples) == self._segment_frames
            or stamp_ns - newest.stamp_ns > BREAK_PERIODS * self._period_ns
        ):
            self._segments.append(_Segment())
        self._segments[-1].samples.append(_Sample(self._tick(stamp_ns), stamp_ns, arrived_s, frame))
        while stamp_ns - self._segments[0].samples[0].stamp_ns >= self._length_s * 1e9:
            self._segments.popleft()

    def expire(self, now_s: float) -> None:
        """Drop what came `length_s` ago, by time.monotonic(): for a stream that has stopped."""
        with self._lock:
            while self._segments and now_s - self._segments[0].samples[0].arrived_s >= self._length_s:
                self._segments.popleft()

    # Encoding -------------------------------------------------------------------------------------------------------

    def encode_next(self) -> bool:
        """Encode one segment that has frames the encoder has not seen, the oldest such; False if there is none.

        Not to be called by two threads at once. An exception of the encoder goes through; the segment is not tried
        again until it grows, and keeps the features of its earlier frames, if it had any.
        """
        with self._lock:
            stale = next((s for s in self._segments if s.attempted < len(s.samples)), None)
            if stale is None:
                return False
            count = stale.attempted = len(stale.samples)
            frames: NDArray[np.uint8] = np.stack([sample.frame for sample in stale.samples])
        features = self._encode(frames)
        with self._lock:
            stale.features, stale.encoded = features, count
        return True

    # Questions ------------------------------------------------------------------------------------------------------

    def span(
        self, seconds_back: float | None = None, *, start_ns: int | None = None, end_ns: int | None = None
    ) -> tuple[int, int]:
        """Stamps of the first and the last buffered frame inside the asked span, encoded or not.

        Args:
            seconds_back: that many seconds up to the newest frame, > 0; the newest frame stands for one period.
            start_ns, end_ns: instead, stamps, both included.

        Raises:
            NoFrames: the buffer is empty.
            WindowOutside: no buffered frame lies in the span.
        """
        with self._lock:
            samples = [sample for segment in self._segments for sample in segment.samples]
        if not samples:
            raise NoFrames("no frame is in the buffer")
        if seconds_back is not None:
            if not seconds_back > 0:
                raise WindowOutside(f"the window is {seconds_back:g} s long, expected more than 0")
            first_tick = samples[-1].tick - seconds_back * self._rate_hz + 1e-6
            inside = [s for s in samples if s.tick > first_tick] or samples[-1:]
        elif start_ns is not None and end_ns is not None:
            inside = [s for s in samples if start_ns <= s.stamp_ns <= end_ns]
            if not inside:
                raise _outside(start_ns, end_ns, samples)
        else:
            raise ValueError("a span is seconds_back, or start_ns and end_ns")
        return inside[0].stamp_ns, inside[-1].stamp_ns

    def window(self, start_ns: int, end_ns: int) -> Window[F]:
        """The cached features of every segment with an encoded frame stamped start_ns to end_ns, both included.

        Segments are used whole, so up to segment_frames - 1 frames more than asked count at either end; the stamps
        of the window say so. More than max_segments: the newest ones.

        Raises:
            NoFrames: the buffer holds no encoded frame.
            WindowOutside: none of the encoded frames lies in the span.
        """
        with self._lock:
            known = [
                (segment.samples[: segment.encoded], features)
                for segment in self._segments
                if (features := segment.features) is not None
            ]
        if not known:
            raise NoFrames("no encoded frame is in the buffer")
        used = [entry for entry in known if any(start_ns <= sample.stamp_ns <= end_ns for sample in entry[0])]
        if not used:
            raise _outside(start_ns, end_ns, [sample for samples, _ in known for sample in samples])
        used = used[-self._max_segments :]
        first = used[0][0][0]
        return Window(
            tuple(
                (
                    (samples[0].tick - first.tick) / self._rate_hz,
                    (samples[-1].tick + 1 - first.tick) / self._rate_hz,
                    features,
                )
                for samples, features in used
            ),
            first.stamp_ns,
            used[-1][0][-1].stamp_ns,
            sum(len(samples) for samples, _ in used),
        )

    @property
    def frames(self) -> int:
        """Frames in the buffer."""
        with self._lock:
            return sum(len(segment.samples) for segment in self._segments)

    @property
    def newest_ns(self) -> int | None:
        """Stamp of the newest frame; None if there is none."""
        with self._lock:
            newest = self._newest()
            return None if newest is None else newest.stamp_ns


def _outside(start_ns: int, end_ns: int, held: list[_Sample]) -> WindowOutside:
    asked, first, last = (f"{stamp_ns * 1e-9:.3f}" for stamp_ns in (end_ns, held[0].stamp_ns, held[-1].stamp_ns))
    return WindowOutside(
        f"no frame is stamped {start_ns * 1e-9:.3f} to {asked}: the buffer holds {len(held)}, stamped {first} to {last}"
    )
