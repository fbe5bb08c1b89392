# SPDX-License-Identifier: Apache-2.0
"""One look through a video: hashes and simple picture statistics of frames sampled by time, kept in a cache.

What finds duplicates (`duplicates`) and what screens (`screening`) both work on such a survey, so that each
video is decoded once.
"""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from surg_perception.data.frame_readers import VideoFacts, VideoFrames, decoded, open_video, video_facts
from surg_perception.data.label_files import DatasetError

EVERY_S = 0.5
"""Seconds between sampled frames: a copy cut at any time is at most a quarter of a second off the grid."""
MOST_FRAMES = 20_000
"""Frames sampled of one video at most (2.8 h at EVERY_S)."""
HASH_BITS = 256

_VERSION = 1  # of what is computed here: a change makes every cached survey void
_HASH_SIDE = 16
_HASH_INPUT = 128
_PICTURE = (128, 72)
_EDGE_PICTURE = (320, 180)
_BOX_FRAMES = 24
_BLACK = 24
_BOX_SHARE = 0.2
_LIT = 40
_DISTINCT_BITS = 24
_SAME_S = 1e-6

Bgr = NDArray[np.uint8]


class FrameStatistics(NamedTuple):
    """Of one picture inside its black border; shares are 0..1.

    lit: pixels brighter than 40 of 255. tissue: of those, the share whose red is clearly above green and not
    below blue, the colour of tissue in an endoscope's light. cool: of those, the share whose blue is clearly above
    red, as drapes, plastic and shaded rooms are. flat: within 8 levels of the most common colour.
    smooth, edges: almost no and very strong gradient. contrast: standard deviation of grey, 0 to 128 levels.
    change: mean absolute difference of grey to the sample before, in levels; NaN for the first.
    """

    lit: float
    tissue: float
    cool: float
    flat: float
    smooth: float
    edges: float
    contrast: float
    change: float


@dataclass(frozen=True)
class Survey:
    """What was seen of a video.

    Attributes:
        duration_s: time from the first frame to the end of the last one.
        width, height: in pixels. box: left, top, right, bottom of the picture inside black borders.
        skipped: packets and frames that could not be decoded.
        times_s: float64 [n], from the video's first frame.
        hashes, mirrored: uint8 [n, 32], perceptual hash of 256 bits, of the picture and of its mirror image.
        statistics: float32 [n, 8], columns as in FrameStatistics.
    """

    duration_s: float
    width: int
    height: int
    box: tuple[int, int, int, int]
    skipped: int
    times_s: NDArray[np.float64]
    hashes: NDArray[np.uint8]
    mirrored: NDArray[np.uint8]
    statistics: NDArray[np.float32]

    def column(self, name: str) -> NDArray[np.float32]:
        """float32 [n] of one statistic."""
        return self.statistics[:, FrameStatistics._fields.index(name)]

    @property
    def pixels(self) -> int:
        """Of the picture inside its black border."""
        left, top, right, bottom = self.box
        return (right - left) * (bottom - top)

    @property
    def usable(self) -> NDArray[np.bool_]:
        """bool [n]: has enough in it to be told from other pictures; blank screens, fades and sparse titles do not."""
        return (self.column("flat") < 0.85) & (self.column("contrast") > 10.0) & (self.column("lit") > 0.05)

    @property
    def distinct(self) -> NDArray[np.bool_]:
        """bool [n]: usable, and differs from the distinct frame before; a still picture counts once."""
        distinct = np.zeros(len(self.times_s), np.bool_)
        last: NDArray[np.uint8] | None = None
        for k in np.flatnonzero(self.usable):
            if last is None or np.unpackbits(self.hashes[k] ^ last).sum() > _DISTINCT_BITS:
                distinct[k], last = True, self.hashes[k]
        return distinct


def survey_video(
    path: Path,
    *,
    every_s: float = EVERY_S,
    most: int = MOST_FRAMES,
    progress: Callable[[float], None] | None = None,
) -> Survey:
    """Look at the frame shown at 0, every_s, 2 * every_s, … (at most `most` of them) of the video at path.

    progress is called with the share 0..1 of the video that is done. Packets that do not decode are skipped
    and counted. Raises DatasetError where no frame can be read.
    """
    facts = video_facts(path)
    box = content_box(_spread_frames(path, facts))
    faults: list[str] = []

    def frames() -> Iterator[tuple[float, Bgr]]:
        for time_s, bgr in _sampled(path, facts, every_s, most, faults.append):
            yield time_s, bgr
            if progress:
                progress(min(1.0, time_s / facts.duration_s))

    survey = survey_frames(frames(), box)
    if not len(survey.times_s):
        raise DatasetError(f"{path}: no frame could be decoded ({len(faults)} faults); get the file again")
    return replace(
        survey,
        duration_s=max(facts.duration_s, survey.duration_s),
        width=facts.width,
        height=facts.height,
        skipped=len(faults),
    )


def survey_frames(frames: Iterable[tuple[float, Bgr]], box: tuple[int, int, int, int]) -> Survey:
    """Look at given frames: (time in s, uint8 BGR [H, W, 3]), ascending; box as `content_box` gives it."""
    times_s: list[float] = []
    hashes, mirrored, statistics = [], [], []
    before: NDArray[np.float32] | None = None
    left, top, right, bottom = box
    for time_s, bgr in frames:
        picture = bgr[top:bottom, left:right]
        if not picture.size:
            raise DatasetError(f"the frame at {time_s:.1f} s is {bgr.shape[1]}x{bgr.shape[0]}, which has no box {box}")
        grey = np.asarray(cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY), np.uint8)
        times_s.append(time_s)
        hashes.append(_hash(grey))
        mirrored.append(_hash(grey[:, ::-1]))
        numbers, before = _statistics(picture, grey, before)
        statistics.append(numbers)
    return Survey(
        duration_s=times_s[-1] if times_s else 0.0,
        width=right - left,
        height=bottom - top,
        box=box,
        skipped=0,
        times_s=np.array(times_s),
        hashes=np.array(hashes),
        mirrored=np.array(mirrored),
        statistics=np.array(statistics, np.float32),
    )


def content_box(pictures: Iterable[Bgr]) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of the view into the body inside letterbox, pillarbox and scope mask, for one video.

    Only frames that show mostly tissue count, since a title card fills the border too; all where there is none. A row
    or column belongs to the view when in a fifth of the frames a fifth of it is brighter than black; a logo in the
    border is narrower than that. The whole frame where the result would be less than a third of a side. Frames of
    another size than the first are not looked at.
    """
    frames = [(bgr.max(axis=2) > _BLACK, _tissue_share(bgr)) for bgr in pictures]
    height, width = frames[0][0].shape
    frames = [(light, share) for light, share in frames if light.shape == (height, width)]
    bright = [light for light, share in frames if share >= 0.5] or [light for light, _ in frames]
    left, top, right, bottom = 0, 0, width, height
    for _ in range(2):
        rows = np.quantile([light[:, left:right].mean(axis=1) for light in bright], 0.8, axis=0) > _BOX_SHARE
        if rows.any():
            top, bottom = int(rows.argmax()), height - int(rows[::-1].argmax())
        columns = np.quantile([light[top:bottom].mean(axis=0) for light in bright], 0.8, axis=0) > _BOX_SHARE
        if columns.any():
            left, right = int(columns.argmax()), width - int(columns[::-1].argmax())
    if right - left < width / 3 or bottom - top < height / 3:
        return 0, 0, width, height
    return left, top, right, bottom


def cached_survey(
    path: Path,
    cache: Path,
    *,
    every_s: float = EVERY_S,
    most: int = MOST_FRAMES,
    progress: Callable[[float], None] | None = None,
) -> Survey:
    """`survey_video`, kept in the folder cache under the file's name, size and time of change.

    A survey is written to a partial file and renamed, so a pass that was killed goes on where it stopped.
    """
    try:
        facts = path.stat()
    except OSError as error:
        raise DatasetError(f"{path}: {error.strerror}") from error
    key = f"{path.name}|{facts.st_size}|{facts.st_mtime_ns}|{every_s}|{most}|{_VERSION}"
    file = cache / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.npz"
    if (survey := _stored(file)) is not None:
        return survey
    survey = survey_video(path, every_s=every_s, most=most, progress=progress)
    cache.mkdir(parents=True, exist_ok=True)
    memory = io.BytesIO()
    np.savez(memory, **asdict(survey))
    write_whole(file, memory.getvalue())
    return survey


def _stored(file: Path) -> Survey | None:
    """The survey in a file of the cache; None where there is none, or a broken one."""
    try:
        with np.load(file) as stored:
            return Survey(
                duration_s=float(stored["duration_s"]),
                width=int(stored["width"]),
                height=int(stored["height"]),
                box=tuple(stored["box"].tolist()),
                skipped=int(stored["skipped"]),
                times_s=stored["times_s"],
                hashes=stored["hashes"],
                mirrored=stored["mirrored"],
                statistics=stored["statistics"],
            )
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        return None


def write_whole(path: Path, content: bytes) -> None:
    """Write content to path so that path holds either all of it or what it held before."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def contact_sheet(rows: Iterable[tuple[str, Path, Sequence[float]]], out: Path, columns: int = 6) -> None:
    """Write a PNG of small pictures with their times: for each (heading, video, times in s) the frames there."""
    width, height = 192, 108
    strips: list[Bgr] = []
    for heading, video, times_s in rows:
        bar = np.full((22, columns * width, 3), 32, np.uint8)
        _text(bar, heading, 16)
        strips.append(bar)
        tiles: list[Bgr] = []
        for time_s, bgr in zip(times_s, VideoFrames(video, np.array(times_s)).read(range(len(times_s))), strict=True):
            scale = min(width / bgr.shape[1], height / bgr.shape[0])
            size = (max(1, int(bgr.shape[1] * scale)), max(1, int(bgr.shape[0] * scale)))
            tile = np.zeros((height, width, 3), np.uint8)
            tile[: size[1], : size[0]] = cv2.resize(bgr, size, interpolation=cv2.INTER_AREA)
            _text(tile, clock(time_s), height - 5)
            tiles.append(tile)
        tiles += [np.zeros((height, width, 3), np.uint8)] * (-len(tiles) % columns)
        strips += [np.hstack(tiles[k : k + columns]) for k in range(0, len(tiles), columns)]
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, cv2.imencode(".png", np.vstack(strips))[1].tobytes())


def clock(time_s: float) -> str:
    """Seconds as h:mm:ss.s."""
    minutes, seconds = divmod(round(time_s * 10) / 10, 60)
    return f"{int(minutes) // 60}:{int(minutes) % 60:02d}:{seconds:04.1f}"


def _text(picture: Bgr, text: str, y: int) -> None:
    for colour, thickness in (((0, 0, 0), 3), ((255, 255, 255), 1)):
        cv2.putText(picture, text, (4, y), cv2.FONT_HERSHEY_SIMPLEX, 0.45, colour, thickness, cv2.LINE_AA)


def _sampled(
    path: Path, facts: VideoFacts, every_s: float, most: int, on_fault: Callable[[str], None]
) -> Iterator[tuple[float, Bgr]]:
    """(time, frame on display then) at each multiple of every_s up to the last frame, at most `most`; no seeking."""
    base, tick, shown = float(facts.time_base), 0, None
    with open_video(path) as container:
        container.streams.video[0].thread_type = "AUTO"
        for stamp, picture in decoded(container, on_fault):
            time_s = (stamp - facts.start) * base
            while shown is not None and tick < most and tick * every_s < time_s - _SAME_S:
                yield tick * every_s, shown.to_ndarray(format="bgr24")
                tick += 1
            if tick >= most:
                return
            shown = picture
            end_s = time_s + 1.0 / facts.rate_hz
        while shown is not None and tick < most and tick * every_s < end_s - _SAME_S:
            yield tick * every_s, shown.to_ndarray(format="bgr24")
            tick += 1


def _spread_frames(path: Path, facts: VideoFacts) -> Iterator[Bgr]:
    """Frames from all over the video, to find its border; fewer where its end is damaged."""
    times_s = (np.arange(_BOX_FRAMES) + 0.5) / _BOX_FRAMES * facts.duration_s
    any_read = False
    try:
        for bgr in VideoFrames(path, times_s).read(range(_BOX_FRAMES)):
            any_read = True
            yield bgr
    except DatasetError:
        if not any_read:
            raise


def _hash(grey: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Perceptual hash (sign of the 16x16 lowest DCT coefficients against their median), uint8 [32]."""
    import imagehash
    from PIL import Image

    small = cv2.resize(grey, (_HASH_INPUT, _HASH_INPUT), interpolation=cv2.INTER_AREA)
    return np.packbits(imagehash.phash(Image.fromarray(small), hash_size=_HASH_SIDE).hash)


def colours(levels: NDArray[np.float32]) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.bool_]]:
    """Masks of lit, tissue-coloured and bluish pixels of BGR [h, w, 3], as FrameStatistics has them."""
    blue, green, red = levels[..., 0], levels[..., 1], levels[..., 2]
    total = levels.sum(axis=2) + 1.0
    lit = levels.max(axis=2) > _LIT
    return lit, lit & (red - green > 0.03 * total) & (red >= blue), lit & (blue - red > 0.02 * total)


def _tissue_share(bgr: Bgr) -> float:
    lit, tissue, _ = colours(cv2.resize(bgr, _PICTURE, interpolation=cv2.INTER_AREA).astype(np.float32))
    return float(tissue.sum() / max(1, int(lit.sum())))


def picture_statistics(bgr: Bgr) -> FrameStatistics:
    """Of one picture uint8 BGR [H, W, 3] by itself: its `change` is NaN."""
    return _statistics(bgr, np.asarray(cv2.cvtColor(bgr, cv2.COLOR_BGR2GRAY), np.uint8), None)[0]


def _statistics(
    bgr: Bgr, grey: NDArray[np.uint8], before: NDArray[np.float32] | None
) -> tuple[FrameStatistics, NDArray[np.float32]]:
    small = np.asarray(cv2.resize(bgr, _PICTURE, interpolation=cv2.INTER_AREA), np.uint8)
    levels = small.astype(np.float32)
    lit, tissue, cool = colours(levels)

    bins = (small >> 4).astype(np.int32)
    codes = (bins[..., 0] << 8) | (bins[..., 1] << 4) | bins[..., 2]
    common = np.bincount(codes.ravel()).argmax()
    centre = np.median(levels[codes == common], axis=0)
    flat = (np.abs(levels - centre) <= 8.0).all(axis=2)

    edge_grey = cv2.resize(grey, _EDGE_PICTURE, interpolation=cv2.INTER_AREA)
    gradient = np.hypot(cv2.Sobel(edge_grey, cv2.CV_32F, 1, 0), cv2.Sobel(edge_grey, cv2.CV_32F, 0, 1))
    now = cv2.resize(grey, _PICTURE, interpolation=cv2.INTER_AREA).astype(np.float32)
    numbers = FrameStatistics(
        lit=float(lit.mean()),
        tissue=float(tissue.sum() / max(1, int(lit.sum()))),
        cool=float(cool.sum() / max(1, int(lit.sum()))),
        flat=float(flat.mean()),
        smooth=float((gradient < 8.0).mean()),
        edges=float((gradient > 200.0).mean()),
        contrast=float(now.std()),
        change=float("nan") if before is None else float(np.abs(now - before).mean()),
    )
    return numbers, now
