# SPDX-License-Identifier: Apache-2.0
"""Image messages for tests, whole and broken."""

from __future__ import annotations

import array
from typing import Any

import cv2
import numpy as np
from sensor_msgs.msg import CompressedImage, Image

from surg_perception.stream.image_decode import encode_image, encode_jpeg


def stamped(message: Any, stamp_ns: int, frame_id: str = "endoscope") -> Any:
    """The message with this stamp."""
    message.header.stamp.sec, message.header.stamp.nanosec = divmod(stamp_ns, 10**9)
    message.header.frame_id = frame_id
    return message


def raw_image(bgr: np.ndarray, encoding: str = "bgr8") -> Image:
    """sensor_msgs/Image of a picture."""
    encoding, step, data = encode_image(bgr, encoding)
    return Image(height=bgr.shape[0], width=bgr.shape[1], encoding=encoding, step=step, data=data)


def jpeg_image(bgr: np.ndarray, quality: int = 95) -> CompressedImage:
    """sensor_msgs/CompressedImage of a picture."""
    return CompressedImage(format="bgr8; jpeg compressed bgr8", data=encode_jpeg(bgr, quality))


def packed(array_: np.ndarray, encoding: str, width: int, height: int, step: int) -> Image:
    """An Image made by hand, for encodings that the package itself never writes."""
    return Image(height=height, width=width, encoding=encoding, step=step, data=array.array("B", array_.tobytes()))


def in_every_encoding(bgr: np.ndarray) -> dict[str, Image]:
    """The same picture (even size) in the encodings that cameras send, made with OpenCV alone."""
    height, width = bgr.shape[:2]
    rgb = cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)
    yuyv = cv2.cvtColor(bgr, cv2.COLOR_BGR2YUV_YUY2)
    uyvy = cv2.cvtColor(bgr, cv2.COLOR_BGR2YUV_UYVY)
    i420 = cv2.cvtColor(bgr, cv2.COLOR_BGR2YUV_I420).reshape(-1)
    luma, quarter = i420[: width * height].reshape(height, width), width * height // 4
    u, v = i420[width * height :][:quarter], i420[width * height + quarter :]
    nv12 = np.vstack([luma, np.stack([u, v], axis=1).reshape(height // 2, width)])
    nv21 = np.vstack([luma, np.stack([v, u], axis=1).reshape(height // 2, width)])
    padded = np.zeros((height, width * 3 + 64), np.uint8)
    padded[:, : width * 3] = bgr.reshape(height, -1)
    return {
        "bgr8": packed(bgr, "bgr8", width, height, width * 3),
        "bgr8 with padded rows": packed(padded, "bgr8", width, height, width * 3 + 64),
        "rgb8": packed(rgb, "rgb8", width, height, width * 3),
        "bgra8": packed(cv2.cvtColor(bgr, cv2.COLOR_BGR2BGRA), "bgra8", width, height, width * 4),
        "rgba8": packed(cv2.cvtColor(bgr, cv2.COLOR_BGR2RGBA), "rgba8", width, height, width * 4),
        "8UC3": packed(bgr, "8UC3", width, height, width * 3),
        "bgr16": packed((bgr.astype("<u2") * 257).view(np.uint8), "bgr16", width, height, width * 6),
        "yuv422_yuy2": packed(yuyv, "yuv422_yuy2", width, height, width * 2),
        "yuyv": packed(yuyv, "yuyv", width, height, width * 2),
        "uyvy": packed(uyvy, "uyvy", width, height, width * 2),
        "yuv422": packed(uyvy, "yuv422", width, height, width * 2),
        "nv12": packed(nv12, "nv12", width, height, width),
        "nv21": packed(nv21, "nv21", width, height, width),
    }
