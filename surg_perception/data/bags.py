# SPDX-License-Identifier: Apache-2.0
"""Images of recorded bags, in log-time order, whatever state the bag is in."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surg_perception.data.ros_types import typestore

IMAGE_TYPES = ("sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage")


class BagError(ValueError):
    """A bag from which no image can be read. The text is one line: what was found, what was expected, what to do."""


@dataclass(frozen=True)
class TopicInfo:
    """A topic of a bag: its name, its type as "package/msg/Name", how many messages it has."""

    name: str
    type: str
    count: int


@dataclass(frozen=True)
class BagProblem:
    """Something wrong with a bag that did not keep the rest from being read.

    `kind` is a short stable word, `text` one line for the user, `count` how often it was met.
    """

    kind: str
    text: str
    count: int


@dataclass(frozen=True)
class BagImage:
    """One image of a bag.

    Args:
        topic: where it was recorded.
        message: sensor_msgs/Image or CompressedImage by duck typing, as image_decode and PhasePipeline take it.
        stamp_ns: stamp of its header, nanoseconds; 0 where the camera set none.
        log_ns: when the recorder received it, nanoseconds.
        raw: the message as CDR bytes.
    """

    topic: str
    message: Any
    stamp_ns: int
    log_ns: int
    raw: bytes


class BagReader:
    """A bag, opened for reading: a folder or a single file of either storage."""

    def __init__(self, path: str | Path, topic: str = "") -> None:
        self.path = Path(path).expanduser()
        self._asked = topic

    def __enter__(self) -> BagReader:
        from rosbags.rosbag2 import Reader, ReaderError

        try:
            self._reader = Reader(self.path)
            self._reader.open()
        except (ReaderError, OSError) as error:
            raise BagError(f"{self.path} cannot be read: {error}") from error
        self.storage = "mcap"
        self.topics = tuple(TopicInfo(c.topic, c.msgtype, c.msgcount) for c in self._reader.connections)
        images = [t for t in self.topics if t.type in IMAGE_TYPES and (not self._asked or t.name == self._asked)]
        if len(images) != 1:
            raise BagError(f"{self.path}: one image topic is needed, found {images}; name one")
        self.topic, self.msgtype, self.count = images[0].name, images[0].type, images[0].count
        self.duration_s = self._reader.duration * 1e-9
        self.problems: tuple[BagProblem, ...] = ()
        return self

    def __exit__(self, *error: object) -> None:
        self._reader.close()

    def images(self) -> Iterator[BagImage]:
        for topic, msgtype, log_ns, raw in self.messages([self.topic]):
            message: Any = typestore().deserialize_cdr(raw, msgtype)
            stamp = message.header.stamp
            yield BagImage(topic, message, stamp.sec * 10**9 + stamp.nanosec, log_ns, raw)

    def messages(self, topics: Collection[str]) -> Iterator[tuple[str, str, int, bytes]]:
        wanted = [c for c in self._reader.connections if c.topic in topics]
        for connection, log_ns, raw in self._reader.messages(wanted):
            yield connection.topic, connection.msgtype, log_ns, bytes(raw)
