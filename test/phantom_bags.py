# SPDX-License-Identifier: Apache-2.0
"""Small bags of the phantom for tests of replays."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from surg_perception.data.bag_writer import BagWriter
from surg_perception.data.phantom import Phantom
from surg_perception.data.ros_types import typestore
from surg_perception.stream.image_decode import encode_jpeg

START_NS = 1_700_000_000 * 10**9
TOPIC = "/endoscope/image/compressed"
RATE_HZ = 5.0
COMPRESSED = "sensor_msgs/msg/CompressedImage"


def jpeg(bgr: np.ndarray) -> bytes:
    """A picture as JPEG."""
    return bytes(encode_jpeg(bgr))


def write_phantom_bag(
    folder: Path,
    *,
    duration_s: float = 12.0,
    start_ns: int = START_NS,
    instead: Mapping[int, bytes] | None = None,
    seed: int = 0,
) -> Path:
    """A bag of a whole short operation, 5 images a second, logged 1 ms after their stamps.

    Args:
        start_ns: stamp of the first image.
        instead: image number to the bytes that stand for its JPEG.
    """
    store, patient = typestore(), Phantom(320, 240, rate_hz=RATE_HZ, duration_s=duration_s, seed=seed)
    types: Any = store.types
    with BagWriter(folder) as bag:
        for number in range(len(patient)):
            stamp_ns = start_ns + round(patient.time_s(number) * 1e9)
            data = (instead or {}).get(number) or jpeg(patient.frame(number)[0])
            header = types["std_msgs/msg/Header"](
                stamp=types["builtin_interfaces/msg/Time"](*divmod(stamp_ns, 10**9)), frame_id="endoscope"
            )
            message = types[COMPRESSED](header=header, format="jpeg", data=np.frombuffer(data, np.uint8))
            bag.write(TOPIC, COMPRESSED, stamp_ns + 10**6, bytes(store.serialize_cdr(message, COMPRESSED)))
    return folder


def messages_of(folder: Path) -> dict[str, list[Any]]:
    """Every message of a bag by topic, deserialized."""
    from rosbags.highlevel import AnyReader

    found: dict[str, list[Any]] = {}
    with AnyReader([folder], default_typestore=typestore()) as reader:
        for connection, _, raw in reader.messages():
            found.setdefault(connection.topic, []).append(reader.deserialize(raw, connection.msgtype))
    return found
