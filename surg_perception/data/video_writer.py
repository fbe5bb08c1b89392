# SPDX-License-Identifier: Apache-2.0
"""Writing pictures with their own times to an MP4 file."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np

TIME_BASE = Fraction(1, 1000)


class VideoWriter:
    """H.264 MP4 of BGR pictures at irregular times; what was written opens even if the process is killed.

    All pictures have the size of the first one (others are refused). Odd sizes lose their last row or column,
    since H.264's 4:2:0 needs even ones.
    """

    def __init__(self, path: str | Path) -> None:
        """Open path for writing; raises OSError where its folder is missing or not writable."""
        import av

        self._path = Path(path)
        if not self._path.parent.is_dir():
            raise OSError(f"cannot write {self._path}: there is no folder {self._path.parent}; make it first")
        # Fragments are complete in themselves, so a file cut off at any time still plays.
        self._file = av.open(
            str(self._path),
            "w",
            format="mp4",
            options={"movflags": "frag_keyframe+empty_moov+default_base_moof", "flush_packets": "1"},
        )
        self._stream: av.VideoStream | None = None
        self._first_s = 0.0
        self._last_pts = -1

    @property
    def size(self) -> tuple[int, int] | None:
        """Width and height of the video in pixels, once the first picture is written."""
        return (self._stream.width, self._stream.height) if self._stream is not None else None

    def write(self, bgr: np.ndarray, time_s: float) -> None:
        """Append picture uint8 [H, W, 3] shown from time_s (seconds, any origin); earlier times are moved up."""
        import av

        height, width = bgr.shape[0] // 2 * 2, bgr.shape[1] // 2 * 2
        if self._stream is None:
            options = {"preset": "veryfast", "tune": "zerolatency", "crf": "23", "g": "20"}
            self._stream = self._file.add_stream("libx264", options=options)
            self._stream.width, self._stream.height = width, height
            self._stream.pix_fmt = "yuv420p"
            self._stream.time_base = self._stream.codec_context.time_base = TIME_BASE
            self._first_s = time_s
        if (width, height) != (self._stream.width, self._stream.height):
            raise ValueError(
                f"{self._path}: picture is {width}x{height}, the video {self._stream.width}x{self._stream.height}"
            )
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(bgr[:height, :width]), format="bgr24")
        frame.time_base = TIME_BASE
        self._last_pts = frame.pts = max(self._last_pts + 1, round((time_s - self._first_s) * 1000))
        self._file.mux(self._stream.encode(frame))

    def close(self) -> None:
        """Write what the encoder still holds and close the file."""
        if self._stream is not None:
            self._file.mux(self._stream.encode(None))
            self._stream = None
        self._file.close()
