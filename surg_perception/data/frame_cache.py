# SPDX-License-Identifier: Apache-2.0
"""Frames at the model's input size on disk, so that a video is decoded once and not once an epoch."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import IO

import cv2
import numpy as np
from numpy.typing import NDArray

from surg_perception.data.datasets import DatasetError, Video
from surg_perception.stream.image_decode import resize_to_model_input

_FORMAT = "1"


def cached_frames(
    video: Video, cache: Path, size: int = 224, progress: Callable[[int, int], None] | None = None
) -> NDArray[np.uint8]:
    """All sampled frames of a video, uint8 BGR [n, size, size, 3], as a read-only memory map.

    Frames are resized by plain bilinear interpolation, as the model's input is. The file is written at the first call
    and found again as long as nothing that decides it changes: source (path, size, time of change), sampled times,
    size, decoder. Writing takes n * size**2 * 3 bytes (150 kB a frame at 224), is atomic, and is done once where
    several processes ask at the same time. progress is called with (frames done, all) while writing.

    Raises DatasetError where the source cannot be read or the disk is full; nothing half-written is left as a cache.
    """
    if size < 1:
        raise DatasetError(f"frame size {size} found, expected at least 1 pixel")
    key = hashlib.sha256(
        "\n".join(
            [_FORMAT, str(size), cv2.__version__, video.reader.fingerprint(), video.times_s.tobytes().hex()]
        ).encode()
    ).hexdigest()[:24]
    name = re.sub(r"[^A-Za-z0-9._-]", "_", video.name)
    final = cache / f"{name}-{key}.npy"
    if not final.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with _exclusive(final.with_suffix(".partial"), final) as partial:
            if partial is not None:
                try:
                    _write(partial, video, size, progress)
                    os.replace(partial.name, final)
                except BaseException as error:
                    os.unlink(partial.name)
                    if isinstance(error, OSError):
                        need_mb = len(video.times_s) * size * size * 3 / 1e6
                        raise DatasetError(
                            f"the frames of {video.name} cannot be cached in {cache}: {error.strerror or error};"
                            f" they take {need_mb:.1f} MB: make room or choose another folder"
                        ) from error
                    raise
    return np.load(final, mmap_mode="r")


def _write(file: IO[bytes], video: Video, size: int, progress: Callable[[int, int], None] | None) -> None:
    """Plain writes, not a memory map: a full disk is then an error and not the end of the process."""
    count = len(video.times_s)
    file.truncate(0)
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, size, size, 3)}
    np.lib.format.write_array_header_1_0(file, header)
    done = 0
    for frame in video.frames():
        file.write(resize_to_model_input(frame, size).tobytes())
        done += 1
        if progress:
            progress(done, count)
    if done != count:
        raise DatasetError(f"{video.name}: {done} frames could be read, expected {count}")
    file.flush()
    os.fsync(file.fileno())


class _exclusive:
    """The partial file opened for this process alone; None where meanwhile another process finished the final one."""

    def __init__(self, partial: Path, final: Path) -> None:
        self._partial, self._final = partial, final

    def __enter__(self) -> IO[bytes] | None:
        while True:
            self._file = self._partial.open("ab")
            fcntl.flock(self._file, fcntl.LOCK_EX)
            if self._final.exists():
                self._partial.unlink(missing_ok=True)
                return None
            # The name may have gone to the final file, or away, while this process waited for the lock.
            if self._partial.exists() and os.path.samestat(os.fstat(self._file.fileno()), self._partial.stat()):
                return self._file
            self._file.close()

    def __exit__(self, *exc: object) -> None:
        self._file.close()
