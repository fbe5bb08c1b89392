# SPDX-License-Identifier: Apache-2.0
"""The last seconds of a live stream, sampled at a low rate and grouped into segments whose features are cached.

One thread offers messages, another one encodes and asks; every method may be called from any thread.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
class _Sample(Generic[F]):
    tick: int
    stamp_ns: int
    arrived_s: float
    frame: Bgr
    place: int  # in its run of frames without a gap, counted from 0
    attempted: bool = False  # the segment that ends with it was given to the encoder
    features: F | None = None  # of that segment
    encoded: int = 0  # frames of that segment


class ClipBuffer(Generic[F]):
    """Ring buffer of frames at `rate_hz`, by image stamps.

    Sampling: ticks lie one period apart, from the first frame on. The first frame at a tick (or up to a tenth of a
    period before it) is the newest one there and is kept; further frames until the next tick are not even decoded.

    Segments: with every kept frame the segment of the last `segment_frames` frames is encoded, once, and its features
    are kept. So the newest segment of a window is always whole, as in training, and the others of a window (every
    `segment_frames`-th one back) were encoded when they were the newest.

    Stamps: a step ahead of more than 2.5 periods is a gap; no segment holds frames from both sides of it, so those
    just after it are shorter. A step back of more than 2.5 periods (a recording that loops) clears the buffer. A
    smaller step back is frames in the wrong order: they are left out.

    Age: a frame is dropped when it is `length_s` old, by stamps as frames come, and by the steady clock in `expire`.
    Features of segments that it was in are not used from then on.

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
        self._samples: deque[_Sample[F]] = deque()
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

    def _newest(self) -> _Sample[F] | None:
        return self._samples[-1] if self._samples else None

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
            self._samples.clear()
            newest = None
        if newest is None:
            self._grid_ns = stamp_ns
        new_run = newest is None or stamp_ns - newest.stamp_ns > BREAK_PERIODS * self._period_ns
        place = 0 if newest is None or new_run else newest.place + 1
        self._samples.append(_Sample(self._tick(stamp_ns), stamp_ns, arrived_s, frame, place))
        while stamp_ns - self._samples[0].stamp_ns >= self._length_s * 1e9:
            self._samples.popleft()

    def expire(self, now_s: float) -> None:
        """Drop what came `length_s` ago, by time.monotonic(): for a stream that has stopped."""
        with self._lock:
            while self._samples and now_s - self._samples[0].arrived_s >= self._length_s:
                self._samples.popleft()

    # Encoding -------------------------------------------------------------------------------------------------------

    def encode_next(self) -> bool:
        """Encode the newest segment that the encoder has not seen; False if there is none.

        Not to be called by two threads at once. An exception of the encoder goes through; that segment is not tried
        again.
        """
        with self._lock:
            samples = list(self._samples)
            at = next((i for i in reversed(range(len(samples))) if not samples[i].attempted), None)
            if at is None:
                return False
            last = samples[at]
            last.attempted = True
            frames: NDArray[np.uint8] = np.stack([sample.frame for sample in self._segment(samples, at)])
        features = self._encode(frames)
        with self._lock:
            last.features, last.encoded = features, len(frames)
        return True

    def _segment(self, samples: list[_Sample[F]], at: int) -> list[_Sample[F]]:
        """The frames of the segment that ends with samples[at]: those of its run that are still there."""
        count = min(self._segment_frames, samples[at].place + 1, at + 1)
        return samples[at + 1 - count : at + 1]

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
            samples = list(self._samples)
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
        """The cached features of segments that reach from the newest encoded frame of the span back to its start.

        Segments are used whole, so up to segment_frames - 1 frames before the span may count; the stamps of the window
        say so. More than max_segments: the newest ones. Where the buffer begins, up to segment_frames - 1 frames whose
        segment has lost a frame are left out.

        Raises:
            NoFrames: the buffer holds no whole encoded segment.
            WindowOutside: none of the encoded frames lies in the span.
        """
        with self._lock:
            samples = list(self._samples)
            features = [sample.features if sample.encoded <= i + 1 else None for i, sample in enumerate(samples)]
        known = [i for i, found in enumerate(features) if found is not None]
        if not known:
            raise NoFrames("no encoded segment is in the buffer")
        inside = [i for i in known if start_ns <= samples[i].stamp_ns <= end_ns]
        if not inside:
            raise _outside(start_ns, end_ns, [samples[i] for i in known])
        used: list[tuple[list[_Sample[F]], F]] = []
        at = inside[-1]
        while at >= 0 and samples[at].stamp_ns >= start_ns and len(used) < self._max_segments:
            found = features[at]
            if found is None:
                break
            segment = samples[at + 1 - samples[at].encoded : at + 1]
            used.insert(0, (segment, found))
            at -= len(segment)
        first = used[0][0][0]
        return Window(
            tuple(
                (
                    (segment[0].tick - first.tick) / self._rate_hz,
                    (segment[-1].tick + 1 - first.tick) / self._rate_hz,
                    found,
                )
                for segment, found in used
            ),
            first.stamp_ns,
            used[-1][0][-1].stamp_ns,
            sum(len(segment) for segment, _ in used),
        )

    @property
    def frames(self) -> int:
        """Frames in the buffer."""
        with self._lock:
            return len(self._samples)

    @property
    def newest_ns(self) -> int | None:
        """Stamp of the newest frame; None if there is none."""
        with self._lock:
            newest = self._newest()
            return None if newest is None else newest.stamp_ns


def _outside(start_ns: int, end_ns: int, held: Sequence[_Sample[Any]]) -> WindowOutside:
    span = (start_ns, end_ns, held[0].stamp_ns, held[-1].stamp_ns)
    start, end, first, last = (f"{stamp_ns * 1e-9:.3f}" for stamp_ns in span)
    return WindowOutside(
        f"no frame is stamped {start} to {end}: the buffer holds {len(held)}, stamped {first} to {last}"
    )
