# SPDX-License-Identifier: Apache-2.0
"""Small videos in which every picture carries its number."""

from __future__ import annotations

from fractions import Fraction

import av
import numpy as np

WIDTH, HEIGHT = 96, 32  # six by two squares of 16 pixels: twelve bits
TIME_BASE = Fraction(1, 1000)


def numbered_picture(number, width=WIDTH, height=HEIGHT):
    """uint8 BGR picture whose squares are the bits of the number, so that it survives lossy coding and resizing."""
    bits = [255 if number >> bit & 1 else 0 for bit in range(12)]
    small = np.array(bits, np.uint8).reshape(2, 6)
    rows, columns = np.arange(height) * 2 // height, np.arange(width) * 6 // width
    return np.repeat(small[rows][:, columns, None], 3, axis=2)


def number_of(bgr):
    height, width = bgr.shape[:2]
    rows, columns = [height // 4, 3 * height // 4], [width * (2 * k + 1) // 12 for k in range(6)]
    bits = bgr[rows][:, columns, 1].ravel() > 127
    return int(sum(1 << bit for bit in np.flatnonzero(bits)))


def write_video(path, times_ms, codec="libx264", rate=25, size=(WIDTH, HEIGHT), numbers=None, **options):
    """Pictures 0, 1, 2, … at the times given, by default H.264 with B-frames and a key frame each second."""
    if codec == "libx264":
        options = {"preset": "ultrafast", "bf": "3", "g": "25", **options}
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        if not codec.startswith("mpeg"):
            stream.time_base = stream.codec_context.time_base = TIME_BASE
        base = stream.codec_context.time_base or Fraction(1, rate)
        for index, time_ms in enumerate(times_ms):
            number = index if numbers is None else numbers[index]
            frame = av.VideoFrame.from_ndarray(numbered_picture(number, *size), format="bgr24")
            frame.pts, frame.time_base = round(Fraction(time_ms, 1000) / base), base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path
