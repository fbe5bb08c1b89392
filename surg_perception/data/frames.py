# SPDX-License-Identifier: Apache-2.0
"""Frames with their times, from a video file, a folder of images or the phantom."""

from __future__ import annotations

import logging
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from numpy.typing import NDArray

from surg_perception.stream.image_decode import ImageError, decode_compressed

if TYPE_CHECKING:
    from surg_perception.data.phantom import FrameLabels

_LOG = logging.getLogger(__name__)
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
_PHANTOM_OPTIONS = {"seed": int, "duration_s": float, "width": int, "height": int, "rate_hz": float}
# Stamps are sums of floats and multiples of a time base: this much is no difference.
_SAME_S = 1e-6


class SourceError(ValueError):
    """A source that cannot be opened or holds no frame; says what was looked for and what was found."""


@dataclass(frozen=True)
class SourceFrame:
    """One frame.

    Attributes:
        index: 0, 1, 2, … in order of output; goes on over the passes of a loop.
        time_s: seconds, strictly increasing, over the passes of a loop too. The first frame has 0, save in a
            folder with times by name.
        bgr: uint8 [H, W, 3], C-contiguous; not to be written into, since a repeated frame shares it.
        labels: exact labels (phantom only).
    """

    index: int
    time_s: float
    bgr: NDArray[np.uint8]
    labels: FrameLabels | None = None


# Each frame with the time in s at which the next one is due. Indices are given later.
_TimedFrames = Generator[tuple[SourceFrame, float], None, None]


class FrameSource(ABC):
    """An iterable of SourceFrame that keeps one frame in memory; each iteration starts at the beginning.

    Attributes:
        width, height: of the first frame in pixels (a folder may mix sizes).
        rate_hz: of the output; the average of a video with variable frame rate; 0 where it is unknown.
        skipped: packets, frames or files left out as unreadable, in all iterations so far.
    """

    def __init__(self, spec: str, width: int | None, height: int | None, loop: bool) -> None:
        for name, pixels in (("width", width), ("height", height)):
            if pixels is not None and pixels < 1:
                raise SourceError(f"{name} is {pixels}; it must be at least 1 pixel, or None")
        self.spec = spec
        self.width = self.height = 0
        self.rate_hz = 0.0
        self.skipped = 0
        self._asked = (width, height)
        self._loop = loop
        self._closed = False

    @property
    @abstractmethod
    def length(self) -> int | None:
        """Frames in one pass as far as the source declares it; None where unknown or where it loops."""

    @abstractmethod
    def _pass(self) -> _TimedFrames:
        """One pass."""

    def __iter__(self) -> Generator[SourceFrame, None, None]:
        index, offset_s = 0, 0.0
        while True:
            first_s = end_s = None
            with closing(self._pass()) as frames:
                for frame, next_s in frames:
                    if self._closed:
                        return
                    first_s = frame.time_s if first_s is None else first_s
                    end_s = next_s
                    yield replace(frame, index=index, time_s=offset_s + frame.time_s)
                    index += 1
            if first_s is None or end_s is None:
                raise SourceError(f"{self.spec}: no readable frame ({self.skipped} skipped)")
            if not self._loop:
                return
            offset_s += end_s - first_s

    def close(self) -> None:
        """End every iteration at its next frame. May be called again, from any thread."""
        self._closed = True

    def __enter__(self) -> FrameSource:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _probe(self) -> None:
        """Read the first frame, so that a source without any fails when it is opened."""
        with closing(iter(self)) as frames:
            self.height, self.width = next(frames).bgr.shape[:2]
        self.skipped = 0

    def _skip(self, what: str, why: object) -> None:
        self.skipped += 1
        _LOG.warning("%s: %s skipped: %s", self.spec, what, why)

    def _sized(self, bgr: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The picture at the size asked; with only one side asked the aspect is kept."""
        height, width = bgr.shape[:2]
        asked_width, asked_height = self._asked
        if asked_width is None and asked_height is None:
            return np.ascontiguousarray(bgr)
        new_width = asked_width or max(1, round(width * (asked_height or height) / height))
        new_height = asked_height or max(1, round(height * new_width / width))
        shrinks = new_width * new_height < width * height
        method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        resized = cv2.resize(bgr, (new_width, new_height), interpolation=method)
        return np.ascontiguousarray(resized, np.uint8)


def open_source(
    spec: str | Path,
    *,
    width: int | None = None,
    height: int | None = None,
    rate_hz: float | None = None,
    seed: int = 0,
    duration_s: float = 120.0,
    loop: bool = False,
    name_rate_hz: float | None = None,
) -> FrameSource:
    """Open frames by what `spec` names.

    - "phantom", or with options that go before the arguments, "phantom:seed=3,duration_s=60": the procedural
      patient, 854x480 at 25 Hz unless asked otherwise. `seed` and `duration_s` are for it alone.
    - A video file, with the container's presentation stamps, counted from its first frame. With `rate_hz`,
      frame k is the last one shown at k / rate_hz. Rotation marks are ignored, corrupt packets skipped.
    - A folder of JPEG, PNG, WebP or BMP images in natural order ("2.jpg" before "10.jpg"). Frame k has the
      time k / rate_hz (1 Hz unless asked). With `name_rate_hz` the last number in a file's name is its frame
      number at that rate and gives the time (Cholec80 frames: 25, CholecT50: 1), and `rate_hz` resamples as
      for a video. EXIF rotation is ignored, unreadable files are skipped.

    `width`, `height` in pixels resize each frame (area average when shrinking); one alone keeps the aspect.
    `loop` starts again at the end, without end; stamps go on. What is skipped is logged and counted.
    Raises SourceError where there is no such source, or none of its frames can be read.
    """
    text = str(spec)
    for name, rate in (("rate_hz", rate_hz), ("name_rate_hz", name_rate_hz)):
        if rate is not None and not 0.0 < rate <= 1000.0:
            raise SourceError(f"{name} is {rate}; it must be above 0 and at most 1000, or None")
    path = Path(spec).expanduser()
    source: FrameSource
    if text == "phantom" or text.startswith("phantom:"):
        options: dict[str, Any] = {"seed": seed, "duration_s": duration_s, "rate_hz": rate_hz or 25.0}
        options |= {name: side for name, side in (("width", width), ("height", height)) if side is not None}
        source = _PhantomSource(text, options | _phantom_options(text), loop)
    elif path.is_dir():
        source = _FolderSource(path, width, height, rate_hz, name_rate_hz, loop)
    elif path.is_file():
        source = _VideoSource(path, width, height, rate_hz, loop)
    else:
        raise SourceError(
            f"no such source: {text!r} is neither 'phantom' nor a video file nor a folder of images"
            f" (looked for {path.absolute()})"
        )
    source._probe()
    return source


def _phantom_options(spec: str) -> dict[str, Any]:
    options = {}
    for part in filter(None, spec.partition(":")[2].split(",")):
        name, _, value = (text.strip() for text in part.partition("="))
        if name not in _PHANTOM_OPTIONS:
            raise SourceError(f"{spec!r}: no option {name!r}; known: {', '.join(_PHANTOM_OPTIONS)}")
        try:
            options[name] = _PHANTOM_OPTIONS[name](value)
        except ValueError as error:
            raise SourceError(f"{spec!r}: {name} is {value!r}, not a number it can take") from error
    return options


class _PhantomSource(FrameSource):
    def __init__(self, spec: str, options: dict[str, Any], loop: bool) -> None:
        from surg_perception.data.phantom import Phantom

        super().__init__(spec, None, None, loop)
        try:
            self._phantom = Phantom(**options)
        except ValueError as error:
            raise SourceError(f"{spec}: {error}") from error
        self.rate_hz = float(options["rate_hz"])

    @property
    def length(self) -> int | None:
        return None if self._loop else len(self._phantom)

    def _pass(self) -> _TimedFrames:
        for index in range(len(self._phantom)):
            bgr, labels = self._phantom.frame(index)
            yield SourceFrame(index, index / self.rate_hz, bgr, labels), (index + 1) / self.rate_hz


class _FolderSource(FrameSource):
    def __init__(
        self,
        folder: Path,
        width: int | None,
        height: int | None,
        rate_hz: float | None,
        name_rate_hz: float | None,
        loop: bool,
    ) -> None:
        super().__init__(str(folder), width, height, loop)
        files = [file for file in folder.iterdir() if file.suffix.lower() in _IMAGE_SUFFIXES and file.is_file()]
        if not files:
            raise SourceError(f"{folder}: no images found; looked for {', '.join('*' + s for s in _IMAGE_SUFFIXES)}")
        files.sort(key=_natural_order)
        self._resampled_hz = None
        self.rate_hz = rate_hz or 1.0
        if name_rate_hz is None:
            times_s = [index / self.rate_hz for index in range(len(files))]
        else:
            files.sort(key=_last_number)
            times_s = [_last_number(file) / name_rate_hz for file in files]
            for k in range(1, len(files)):
                if times_s[k] == times_s[k - 1]:
                    raise SourceError(f"{folder}: {files[k - 1].name} and {files[k].name} have the same number")
            self._resampled_hz = rate_hz
            self.rate_hz = rate_hz or 0.0
        self._files = list(zip(files, times_s, strict=True))
        gap_s = times_s[1] - times_s[0] if len(files) > 1 else 1.0 / (name_rate_hz or self.rate_hz)
        self._end_s = times_s[-1] + gap_s

    @property
    def length(self) -> int | None:
        return None if self._loop or self._resampled_hz else len(self._files)

    def _pass(self) -> _TimedFrames:
        frames = self._read()
        return _resampled(frames, self._resampled_hz) if self._resampled_hz else frames

    def _read(self) -> _TimedFrames:
        next_s = [time_s for _, time_s in self._files[1:]] + [self._end_s]
        for (file, time_s), due_s in zip(self._files, next_s, strict=True):
            try:
                bgr = decode_compressed(file.read_bytes())
            except (ImageError, OSError) as error:
                self._skip(file.name, error)
            else:
                yield SourceFrame(0, time_s, self._sized(bgr)), due_s


class _VideoSource(FrameSource):
    def __init__(self, path: Path, width: int | None, height: int | None, rate_hz: float | None, loop: bool) -> None:
        super().__init__(str(path), width, height, loop)
        self._resampled_hz = rate_hz
        with self._open() as container:
            stream = container.streams.video[0]
            self._declared_frames = stream.frames or None
            self._average_hz = float(stream.average_rate or 0.0)
        self.rate_hz = rate_hz or self._average_hz

    @property
    def length(self) -> int | None:
        return None if self._loop or self._resampled_hz else self._declared_frames

    def _open(self) -> Any:
        try:
            import av
        except ImportError as error:
            raise SourceError(f"{self.spec}: reading a video needs PyAV (package av): {error}") from error
        try:
            container = av.open(self.spec)
        except av.FFmpegError as error:
            raise SourceError(f"{self.spec} cannot be read as a video: {error.strerror}") from error
        if not container.streams.video:
            kinds = ", ".join(stream.type for stream in container.streams) or "none"
            container.close()
            raise SourceError(f"{self.spec} has no video stream (streams: {kinds})")
        return container

    def _pass(self) -> _TimedFrames:
        frames = self._decode()
        return _resampled(frames, self._resampled_hz) if self._resampled_hz else frames

    def _decode(self) -> _TimedFrames:
        typical_s = 1.0 / self._average_hz if self._average_hz else 0.04
        start_s = last_s = None
        with self._open() as container:
            for frame in self._pictures(container):
                time_s = frame.time if frame.time is not None else (last_s or 0.0) + typical_s
                if last_s is not None and time_s <= last_s:
                    self._skip("frame", f"its stamp {time_s:.3f} s is not after the last one, {last_s:.3f} s")
                    continue
                start_s = time_s if start_s is None else start_s
                last_s = time_s
                shown_s = float(frame.duration * frame.time_base) if frame.duration else typical_s
                bgr = self._sized(frame.to_ndarray(format="bgr24"))
                time_s -= start_s
                yield SourceFrame(0, time_s, bgr), time_s + shown_s

    def _pictures(self, container: Any) -> Generator[Any, None, None]:
        """Intact decoded pictures in order of presentation."""
        import av

        packets = container.demux(video=0)
        while True:
            try:
                packet = next(packets, None)
                if packet is None:
                    return
                pictures = packet.decode()
            except av.FFmpegError as error:
                self._skip("packet", error.strerror)
                continue
            for picture in pictures:
                if picture.is_corrupt:
                    self._skip("frame", "marked corrupt by the decoder")
                else:
                    yield picture


def _resampled(frames: _TimedFrames, rate_hz: float) -> _TimedFrames:
    """At each k / rate_hz the last frame that has begun by then, until the last frame's own end."""
    shown: SourceFrame | None = None
    tick, end_s = 0, 0.0
    for frame, next_s in frames:
        if shown is None:
            tick = math.ceil((frame.time_s - _SAME_S) * rate_hz)
        while shown is not None and tick / rate_hz < frame.time_s - _SAME_S:
            yield replace(shown, time_s=tick / rate_hz), (tick + 1) / rate_hz
            tick += 1
        shown, end_s = frame, next_s
    while shown is not None and tick / rate_hz < end_s - _SAME_S:
        yield replace(shown, time_s=tick / rate_hz), (tick + 1) / rate_hz
        tick += 1


def _natural_order(file: Path) -> list[tuple[int, int | str]]:
    parts = re.split(r"(\d+)", file.name)
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in parts if part]


def _last_number(file: Path) -> int:
    numbers = re.findall(r"\d+", file.stem)
    if not numbers:
        raise SourceError(f"{file}: name_rate_hz is given, but there is no number in the name")
    return int(numbers[-1])
