# SPDX-License-Identifier: Apache-2.0
"""Small bags of each kind, whole and broken."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer

from surg_perception.data.ros_types import typestore
from surg_perception.stream.image_decode import encode_image

START_NS = 1_700_000_000 * 10**9
STEP_NS = 40_000_000
IMAGE, COMPRESSED = "sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage"


def header(stamp_ns, frame_id="endoscope"):
    types = typestore().types
    stamp = types["builtin_interfaces/msg/Time"](*divmod(stamp_ns, 10**9))
    return types["std_msgs/msg/Header"](stamp=stamp, frame_id=frame_id)


def image_message(bgr, stamp_ns, encoding="bgr8"):
    """Image in an encoding of encode_image(), or CompressedImage for "jpeg" and "png", of a picture uint8 [H, W, 3]."""
    types = typestore().types
    if encoding in ("jpeg", "png"):
        data = cv2.imencode(f".{encoding}", bgr)[1].ravel()
        return types[COMPRESSED](header=header(stamp_ns), format=encoding, data=data)
    name, step, data = encode_image(bgr, encoding)
    height, width = bgr.shape[:2]
    return types[IMAGE](header(stamp_ns), height, width, name, 0, step, np.frombuffer(data, np.uint8))


def cdr(message):
    return bytes(typestore().serialize_cdr(message, message.__msgtype__))


def write_messages(path, messages, storage="mcap", compression="", version=9):
    """A bag folder of (topic, message, log_ns) by rosbags' writer; compression "", "file", "message" or "chunk"."""
    path = Path(path)
    plugin = StoragePlugin.MCAP if storage == "mcap" else StoragePlugin.SQLITE3
    writer = Writer(path, version=version, storage_plugin=plugin)
    if compression:
        modes = {"file": CompressionMode.FILE, "message": CompressionMode.MESSAGE, "chunk": CompressionMode.STORAGE}
        writer.set_compression(modes[compression], CompressionFormat.ZSTD)
    connections = {}
    with writer:
        for topic, message, log_ns in messages:
            key = topic, message.__msgtype__
            if key not in connections:
                connections[key] = writer.add_connection(*key, typestore=typestore())
            writer.write(connections[key], log_ns, cdr(message))
    return path


def write_bag(path, frames, topic="/image", storage="mcap", compression="", encoding="bgr8", stamps_ns=None):
    """A bag folder with pictures uint8 BGR [H, W, 3], 25 per second from START_NS unless stamps_ns says otherwise."""
    frames = list(frames)
    stamps = [START_NS + STEP_NS * index for index in range(len(frames))] if stamps_ns is None else stamps_ns
    messages = [(topic, image_message(bgr, ns, encoding), ns) for bgr, ns in zip(frames, stamps, strict=True)]
    return write_messages(path, messages, storage, compression)
