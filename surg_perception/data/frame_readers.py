# SPDX-License-Identifier: Apache-2.0
"""Sampled frames in any order: of a video file (PyAV), a folder of images, the phantom. One frame in memory."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from surg_perception.data.label_files import DatasetError
from surg_perception.stream.image_decode import ImageError, decode_compressed

if TYPE_CHECKING:
    from surg_perception.data.phantom import Phantom

Bgr = NDArray[np.uint8]

# Decoding this far ahead is cheaper than a seek, which lands up to one key-frame distance (ffmpeg: 10 s) early.
_SEEK_AHEAD_S = 10.0
# A video whose frames end this much before a wanted time is not merely rounded: it cannot be decoded to its end.
_END_TOLERANCE_S = 1.0


class FrameReader(ABC):
    """Frames of one video by index of its samples."""

    @abstractmethod
    def read(self, indices: Iterable[int]) -> Iterator[Bgr]:
        """Frames uint8 BGR [H, W, 3] in the order asked. Raises DatasetError where one cannot be read."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Changes when the source does: paths, sizes and modification times; the decoders' versions."""


@dataclass(frozen=True)
class ImageFiles(FrameReader):
    """One image file per sample."""

    files: tuple[Path, ...]

    def read(self, indices: Iterable[int]) -> Iterator[Bgr]:
        for index in indices:
            file = self.files[index]
            try:
                yield decode_compressed(file.read_bytes())
            except (ImageError, OSError) as error:
                raise DatasetError(
                    f"{file} cannot be read: {error}; get the file again, or remove it to go without this frame"
                ) from error

    def fingerprint(self) -> str:
        import cv2

        return _digest("images", cv2.__version__, *(_file_facts(file) for file in self.files))


@dataclass(frozen=True)
class PhantomFrames(FrameReader):
    """The phantom's frames; the arguments are those of `Phantom`."""

    seed: int
    duration_s: float
    width: int
    height: int
    rate_hz: float

    def read(self, indices: Iterable[int]) -> Iterator[Bgr]:
        for index in indices:
            yield self.phantom.frame(index)[0]

    def fingerprint(self) -> str:
        from surg_perception.data import phantom, phantom_render, phantom_script, phantom_tools

        # Their text, not where and since when they lie there: another checkout has the same phantom.
        modules = (phantom, phantom_render, phantom_script, phantom_tools)
        sources = (hashlib.sha256(Path(str(m.__file__)).read_bytes()).hexdigest() for m in modules)
        return _digest(
            "phantom", *map(repr, (self.seed, self.duration_s, self.width, self.height, self.rate_hz)), *sources
        )

    @cached_property
    def phantom(self) -> Phantom:
        """The phantom itself, made when it is first needed."""
        from surg_perception.data.phantom import Phantom

        return Phantom(self.width, self.height, self.rate_hz, self.seed, self.duration_s)


@dataclass(frozen=True)
class NoFrames(FrameReader):
    """Labels without pictures."""

    why: str

    def read(self, indices: Iterable[int]) -> Iterator[Bgr]:
        raise DatasetError(self.why)

    def fingerprint(self) -> str:
        raise DatasetError(self.why)


@dataclass(frozen=True)
class VideoFacts:
    """What a video file is.

    Attributes:
        width, height: pixels.
        rate_hz: average frame rate.
        duration_s: from the first frame to the end of the last one that is really in the file.
        declared_s: the duration in the header; 0 where it has none.
        start: presentation stamp of the first picture that can be decoded, in units of time_base seconds.
        codec: ffmpeg's name.
    """

    width: int
    height: int
    rate_hz: float
    duration_s: float
    declared_s: float
    start: int
    time_base: Fraction
    codec: str


@dataclass(frozen=True, eq=False)
class VideoFrames(FrameReader):
    """Frames of a video file on display at times_s, seconds since its first frame.

    The frame on display at t is the last one whose presentation stamp is not after t, whatever the order in which
    frames were coded and whether t was reached by decoding on or by seeking.
    """

    path: Path
    times_s: NDArray[np.float64]

    def read(self, indices: Iterable[int]) -> Iterator[Bgr]:
        with _Cursor(self.path) as cursor:
            for index in indices:
                yield cursor.at(float(self.times_s[index])).to_ndarray(format="bgr24")

    def fingerprint(self) -> str:
        import av

        versions = repr(sorted(av.library_versions.items()))
        return _digest("video", versions, _file_facts(self.path))


def video_facts(path: Path) -> VideoFacts:
    """Facts of a video file from its header, its first picture and its last packets; cheap whatever its length.

    Raises DatasetError where it is no readable video or no picture of it can be decoded.
    """
    with open_video(path) as container:
        stream = container.streams.video[0]
        base = stream.time_base
        rate_hz = float(stream.average_rate or stream.guessed_rate or 25)
        declared = stream.duration
        if declared is None and container.duration is not None:
            declared = int(Fraction(container.duration, 1_000_000) / base)
        first = next(decoded(container), None)
        if first is None:
            raise DatasetError(f"{path}: no picture of it can be decoded; get the file again or remove it")
        start, picture = first
        usual = 1 / (Fraction(rate_hz) * base)
        # MPEG-TS has no index: a seek can land between the last pictures, which are not coded in the order shown.
        end = _end_stamp(container, usual, start + declared - int(_END_TOLERANCE_S / base)) if declared else None
        codec = stream.codec_context.name
    if end is None:
        with open_video(path) as container:
            end = _end_stamp(container, usual, None)
    return VideoFacts(
        picture.width,
        picture.height,
        rate_hz,
        float(((end or start) - start) * base),
        float((declared or 0) * base),
        start,
        base,
        codec,
    )


def open_video(path: Path) -> Any:
    """PyAV container with a video stream. Raises DatasetError where it cannot be had."""
    try:
        import av
    except ImportError as error:
        raise DatasetError(f"{path}: reading a video needs PyAV (package av): {error}") from error
    try:
        container = av.open(str(path))
    except (av.FFmpegError, OSError) as error:
        raise DatasetError(
            f"{path} cannot be read as a video ({error.strerror}); it may be cut or empty: get the file again"
        ) from error
    if not container.streams.video:
        kinds = ", ".join(stream.type for stream in container.streams) or "none"
        container.close()
        raise DatasetError(f"{path} has no video stream (streams: {kinds})")
    return container


def decoded(container: Any, on_fault: Callable[[str], object] = lambda reason: None) -> Iterator[tuple[int, Any]]:
    """Intact pictures from where the container stands, each with its stamp in units of the stream's time base.

    on_fault is called with the reason for each packet or picture that is not intact.
    """
    import av

    for packet in _packets(container, on_fault):
        try:
            pictures = packet.decode()
        except av.FFmpegError as error:
            on_fault(error.strerror)
            continue
        for picture in pictures:
            stamp = _stamp(picture)
            if picture.is_corrupt:
                on_fault("picture marked corrupt by the decoder")
            elif stamp is not None:
                yield stamp, picture


def _packets(container: Any, on_fault: Callable[[str], object] = lambda reason: None) -> Iterator[Any]:
    """Packets of the video stream up to the end, or to where the file can no longer be read."""
    import av

    try:
        yield from container.demux(container.streams.video[0])
    except av.FFmpegError as error:
        on_fault(error.strerror)


def _stamp(packet_or_picture: Any) -> int | None:
    stamp = packet_or_picture.pts
    return packet_or_picture.dts if stamp is None else stamp


def _end_stamp(container: Any, usual: Fraction, near: int | None) -> Fraction | None:
    """End of the picture shown last, in units of the time base, from the packets after `near` or all of them."""
    import av

    if near is not None:
        try:
            container.seek(near, stream=container.streams.video[0], backward=True, any_frame=False)
        except av.FFmpegError:
            return None
    ends = [
        stamp + (Fraction(packet.duration) if packet.duration else usual)
        for packet in _packets(container)
        if packet.size and not packet.is_corrupt and (stamp := _stamp(packet)) is not None
    ]
    return max(ends, default=None)


class _Cursor:
    """A place in a video: the picture on display and the one after it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._container: Any = None
        self._rewind()

    def __enter__(self) -> _Cursor:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; may be called again."""
        if self._container is not None:
            self._container.close()

    def at(self, time_s: float) -> Any:
        """The picture on display time_s seconds after the first."""
        wanted = self._first + time_s / self._base + min(1.0, 0.001 / self._base)
        ahead = wanted - self._shown[0]
        if (ahead < 0 and self._shown[0] > self._first) or ahead > _SEEK_AHEAD_S / self._base:
            self._seek(wanted)
        self._advance(wanted)
        if self._next is None and (wanted - self._shown[0]) * self._base > _END_TOLERANCE_S + self._frame_s:
            reached_s = (self._shown[0] - self._first) * self._base
            raise DatasetError(
                f"{self._path}: no frame can be decoded after {reached_s:.2f} s, but one at {time_s:.2f} s is wanted;"
                " the file is damaged: look at it with `surg-perception data check --deep`, get it again"
            )
        return self._shown[1]

    def _rewind(self) -> None:
        self.close()
        self._container = open_video(self._path)
        stream = self._container.streams.video[0]
        stream.thread_type = "AUTO"
        self._base = float(stream.time_base)
        self._frame_s = 1.0 / float(stream.average_rate or stream.guessed_rate or 25)
        if not self._begin():
            raise DatasetError(f"{self._path}: no picture of it can be decoded; get the file again or remove it")
        self._first = self._shown[0]

    def _begin(self) -> bool:
        """Take the first two pictures from where the container stands."""
        self._pictures = decoded(self._container)
        shown = next(self._pictures, None)
        if shown is None:
            return False
        self._shown: tuple[int, Any] = shown
        self._next: tuple[int, Any] | None = next(self._pictures, None)
        return True

    def _advance(self, wanted: float) -> None:
        while self._next is not None and self._next[0] <= wanted:
            if self._next[0] > self._shown[0]:
                self._shown = self._next
            self._next = next(self._pictures, None)

    def _seek(self, wanted: float) -> None:
        """To a key frame not after `wanted`. Indices by decoding time can land too late: go further back then."""
        import av

        back_s = 0.0
        while (target := int(wanted - back_s / self._base)) > self._first:
            try:
                self._container.seek(target, stream=self._container.streams.video[0], backward=True, any_frame=False)
            except av.FFmpegError:
                break
            if self._begin() and self._shown[0] <= wanted:
                return
            back_s = 2.0 * back_s or 1.0
        self._rewind()


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _file_facts(file: Path) -> str:
    facts = file.stat()
    return f"{file.resolve()} {facts.st_size} {facts.st_mtime_ns}"
