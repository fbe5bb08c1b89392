# SPDX-License-Identifier: Apache-2.0
"""Writes ROS 2 bags (rosbag2 folder, MCAP files) without ROS; what a killed process left can be read.

The same calls give the same bytes: no clock, no random number, no name of this machine goes into a bag. Nothing is
compressed, since pictures are already, and bytes would depend on the compressor's version.
"""

from __future__ import annotations

import os
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import yaml
from mcap.writer import CompressionType, Writer

_METADATA_VERSION = 5
"""Of metadata.yaml: the oldest with times for each file, which rosbag2 of every distribution since Humble reads."""
_CHUNK_BYTES = 1 << 20
_KEEP_LAST, _RELIABLE, _BEST_EFFORT, _TRANSIENT_LOCAL, _VOLATILE, _AUTOMATIC = 1, 1, 2, 1, 2, 1


@dataclass(frozen=True)
class Qos:
    """What a topic's publisher offered, for who plays the bag. Attributes as in rclpy's QoSProfile."""

    reliable: bool = True
    transient_local: bool = False
    depth: int = 10

    def _entry(self) -> dict[str, object]:
        return {
            "history": _KEEP_LAST,
            "depth": self.depth,
            "reliability": _RELIABLE if self.reliable else _BEST_EFFORT,
            "durability": _TRANSIENT_LOCAL if self.transient_local else _VOLATILE,
            "deadline": _unlimited(),
            "lifespan": _unlimited(),
            "liveliness": _AUTOMATIC,
            "liveliness_lease_duration": _unlimited(),
            "avoid_ros_namespace_conventions": False,
        }


def _unlimited() -> dict[str, int]:
    return {"sec": 9223372036, "nsec": 854775807}


@dataclass
class _Topic:
    msgtype: str
    qos_text: str
    definition: bytes
    count: int = 0


@dataclass
class _File:
    name: str
    first_ns: int = 0
    last_ns: int = 0
    count: int = 0

    def note(self, log_ns: int) -> None:
        self.first_ns = min(self.first_ns, log_ns) if self.count else log_ns
        self.last_ns = max(self.last_ns, log_ns) if self.count else log_ns
        self.count += 1

    def times(self) -> dict[str, object]:
        return {
            "starting_time": {"nanoseconds_since_epoch": self.first_ns},
            "duration": {"nanoseconds": self.last_ns - self.first_ns},
            "message_count": self.count,
        }


@dataclass
class _Open:
    """The MCAP file that is being written."""

    stream: IO[bytes]
    writer: Writer
    channels: dict[str, int] = field(default_factory=dict)
    schemas: dict[str, int] = field(default_factory=dict)


class BagWriter:
    """A new bag, for one thread. `with` closes it, also after an exception.

    Args:
        folder: to be made, mode 0700, its files 0600: the bag may hold patient data.
        split_bytes: a file that has grown beyond this is closed and the next one begun; 0: one file.

    Raises:
        ValueError: there is something at folder already.
        OSError: from any method, where the disk does not take what is written.
    """

    def __init__(self, folder: Path, *, split_bytes: int = 0) -> None:
        self.folder = folder
        self.bytes_written = 0
        """In all files so far, without the chunk that is being filled."""
        self._split_bytes = split_bytes
        self._topics: dict[str, _Topic] = {}
        self._files: list[_File] = []
        self._closed_bytes = 0
        self._whole = _File("")
        self._stale_metadata = True
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            folder.mkdir(mode=0o700)
        except FileExistsError:
            raise ValueError(f"{folder} is there already: a bag is written to a new folder") from None
        self._open = self._begin()
        self.flush()

    def __enter__(self) -> BagWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @property
    def counts(self) -> dict[str, int]:
        """Messages written so far by topic."""
        return {name: topic.count for name, topic in self._topics.items()}

    @property
    def files(self) -> list[str]:
        """Names of the files in the folder so far."""
        return [file.name for file in self._files]

    def add_topic(self, topic: str, msgtype: str, qos: Sequence[Qos] = (Qos(),), definition: str = "") -> None:
        """Announce a topic; needed only for what differs from the defaults.

        Args:
            topic: full name, such as "/surg_perception/phase/phase".
            msgtype: such as "sensor_msgs/msg/Image".
            qos: what each of its publishers offers.
            definition: the type's text and that of all types in it, as ros2msg; empty: as `ros_types` knows it.

        Raises:
            ValueError: another type was announced for the topic, or the type is not known.
        """
        known = self._topics.get(topic)
        if known is not None:
            if known.msgtype != msgtype:
                raise ValueError(f"{topic} holds {known.msgtype} already, {msgtype} cannot be written to it")
            return
        text = _yaml([entry._entry() for entry in qos])
        self._topics[topic] = _Topic(msgtype, text.strip(), (definition or definition_of(msgtype)).encode())
        self._stale_metadata = True

    def write(self, topic: str, msgtype: str, log_ns: int, raw: bytes, publish_ns: int | None = None) -> None:
        """Write one message: its CDR bytes with their header, the time it was received and, if known, published."""
        if topic not in self._topics:
            self.add_topic(topic, msgtype)
        if self._split_bytes and self._open.stream.tell() >= self._split_bytes:
            self._finish()
            self._open = self._begin()
        entry, file = self._topics[topic], self._files[-1]
        self._open.writer.add_message(
            self._channel(topic, entry), log_ns, raw, log_ns if publish_ns is None else publish_ns, entry.count
        )
        entry.count += 1
        file.note(log_ns)
        self._whole.note(log_ns)
        self._stale_metadata = True
        self.bytes_written = self._closed_bytes + self._open.stream.tell()

    def flush(self) -> None:
        """Hand everything so far to the operating system: a process killed after this loses nothing of it."""
        self._open.writer.flush()
        self.bytes_written = self._closed_bytes + self._open.stream.tell()
        self._write_metadata()

    def close(self) -> None:
        """Finish the bag and wait until the disk has it. Nothing is done the second time."""
        if not self._open.stream.closed:
            self._finish()
            self._write_metadata()

    def _begin(self) -> _Open:
        name = f"{self.folder.resolve().name}_{len(self._files)}.mcap"
        descriptor = os.open(self.folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        stream = os.fdopen(descriptor, "wb")
        writer = Writer(stream, chunk_size=_CHUNK_BYTES, compression=CompressionType.NONE)
        writer.start(profile="ros2", library="surg_perception")
        self._files.append(_File(name))
        # Without it rosbag2 takes the channels' QoS for that of its newest version.
        own = {**self._information(), "relative_file_paths": [name], "files": []}
        writer.add_metadata("rosbag2", {"serialized_metadata": _yaml(own)})
        self._stale_metadata = True
        return _Open(stream, writer)

    def _finish(self) -> None:
        try:
            self._open.writer.finish()
            self._open.stream.flush()
            os.fsync(self._open.stream.fileno())
            self._closed_bytes += self._open.stream.tell()
            self.bytes_written = self._closed_bytes
        finally:
            self._open.stream.close()

    def _channel(self, topic: str, entry: _Topic) -> int:
        channels, schemas, writer = self._open.channels, self._open.schemas, self._open.writer
        if topic not in channels:
            if entry.msgtype not in schemas:
                schemas[entry.msgtype] = writer.register_schema(entry.msgtype, "ros2msg", entry.definition)
            qos = {"offered_qos_profiles": entry.qos_text}
            channels[topic] = writer.register_channel(topic, "cdr", schemas[entry.msgtype], qos)
        return channels[topic]

    def _information(self) -> dict[str, object]:
        return {
            "version": _METADATA_VERSION,
            "storage_identifier": "mcap",
            **self._whole.times(),
            "topics_with_message_count": [
                {
                    "topic_metadata": {
                        "name": name,
                        "type": topic.msgtype,
                        "serialization_format": "cdr",
                        "offered_qos_profiles": topic.qos_text,
                    },
                    "message_count": topic.count,
                }
                for name, topic in self._topics.items()
            ],
            "compression_format": "",
            "compression_mode": "",
            "relative_file_paths": self.files,
            "files": [{"path": file.name, **file.times()} for file in self._files],
        }

    def _write_metadata(self) -> None:
        if not self._stale_metadata:
            return
        part = self.folder / ".metadata.yaml.part"
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(_yaml({"rosbag2_bagfile_information": self._information()}))
        part.replace(self.folder / "metadata.yaml")
        self._stale_metadata = False


def _yaml(content: object) -> str:
    return yaml.safe_dump(content, sort_keys=False, width=10_000)


def definition_of(msgtype: str) -> str:
    """The text of a message type and of all types in it, as MCAP's encoding ros2msg has it.

    Raises:
        ValueError: it, or a type in it, is none of ROS 2's common ones, of this package or of an installed one.
    """
    from surg_perception.data.ros_types import typestore

    store = typestore()
    found: dict[str, Any] = {}
    _find_installed(msgtype, store.fielddefs, found)
    store.register(found)
    return str(store.generate_msgdef(msgtype, ros_version=2)[0])


def _find_installed(msgtype: str, known: Container[str], found: dict[str, Any]) -> None:
    """Add to found what is not known of the type and of those in it, from the packages of the sourced workspaces."""
    from rosbags.typesys import get_types_from_msg

    if msgtype in known or msgtype in found:
        return
    package, _, name = msgtype.partition("/msg/")
    prefixes = filter(None, os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep))
    files = [Path(prefix) / "share" / package / "msg" / f"{name}.msg" for prefix in prefixes]
    file = next((file for file in files if name.isidentifier() and package.isidentifier() and file.is_file()), None)
    if file is None:
        raise ValueError(
            f"the message type {msgtype} is not known here, so it cannot be written to a bag: source the workspace "
            "that has its package"
        )
    found |= get_types_from_msg(file.read_text(), msgtype)
    for _, (kind, detail) in found[msgtype][1]:
        inner = detail if kind.name == "NAME" else detail[0][1] if kind.name in ("ARRAY", "SEQUENCE") else None
        if isinstance(inner, str):
            _find_installed(inner, known, found)
