# SPDX-License-Identifier: Apache-2.0
"""Images of recorded bags, in log-time order, whatever state the bag is in. docs/bags.md says what happens to which.

with BagReader("appendectomy_1") as bag:
    for image in bag.images():
        picture = decode_image(image.message)
    for problem in bag.problems:
        print(f"{problem.count} × {problem.text}")
"""

from __future__ import annotations

import heapq
import statistics
from collections import Counter, deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import yaml

from surg_perception.data.bag_storage import (
    ZSTD_MAGIC,
    BagError,
    BagProblem,
    Channel,
    Problems,
    Record,
    StorageFile,
    Workspace,
    in_log_order,
    open_storage,
    unzstd_message,
)
from surg_perception.data.ros_types import typestore

__all__ = ["IMAGE_TYPES", "BagError", "BagImage", "BagProblem", "BagReader", "TopicInfo"]

IMAGE_TYPES = ("sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage")

_METADATA = "metadata.yaml"
_MOST_METADATA_BYTES, _MOST_METADATA_DEPTH = 16 << 20, 50
_SUFFIXES = (".mcap", ".db3", ".bag")
_PACKED_SUFFIXES = (".zstd", ".zst")
_ENCODINGS = ("cdr", "ros1")
_SECOND = 10**9
# A pause is a gap from this many usual distances on, and from one second on.
_GAP_INTERVALS = 5
_USUAL = 31


@dataclass(frozen=True)
class TopicInfo:
    """A topic of a bag: its name, its type as "package/msg/Name", how many messages it has."""

    name: str
    type: str
    count: int

    def __str__(self) -> str:
        return f"{self.name} ({self.type or 'no type'}, {self.count} message{'s' * (self.count != 1)})"


@dataclass(frozen=True)
class BagImage:
    """One image of a bag.

    Args:
        topic: where it was recorded.
        message: sensor_msgs/Image or CompressedImage by duck typing, as image_decode and PhasePipeline take it.
            Its fields are as recorded: an image whose size and data disagree is told apart by image_decode.
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
    """A bag, opened for reading; a context manager.

    Takes a bag folder, with or without metadata.yaml, or one .mcap, .db3 or ROS 1 .bag file, each also packed
    (.zstd). Nothing is written beside it. Memory does not grow with its length.

    Args:
        path: the folder or file.
        topic: the images' topic; empty: the only one with images.

    Attributes:
        storage: "mcap", "sqlite3" or "ros1".
        topics: all topics, sorted by name.
        topic: of the images.
        msgtype: of the images, one of IMAGE_TYPES.
        count: messages on that topic, as far as indexes and whole parts of the files tell.
        duration_s: first to last message of any topic, by log time.

    Raises:
        BagError: nothing there, no bag, or no one topic with images; while it is opened.
    """

    def __init__(self, path: str | Path, topic: str = "") -> None:
        self.path = Path(path).expanduser()
        self._workspace, self._found, self._stream = Workspace(), Problems(), Problems()
        self._files: list[StorageFile] = []
        try:
            self._open(topic)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> BagReader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        for file in self._files:
            file.close()
        self._workspace.close()

    @property
    def problems(self) -> tuple[BagProblem, ...]:
        """What was wrong so far; complete once images() has ended."""
        return (*self._found, *self._stream)

    def images(self) -> Iterator[BagImage]:
        """All images that can be read, in log-time order, those of the same time in file order.

        Stamps that repeat or go back change nothing in that order, since a live node would take the images as
        they came; they are told in `problems`.
        """
        self._stream = Problems()
        watch = _Watch(self._stream)
        for record in self._records({self._channel}):
            number = watch.number = watch.number + 1
            try:
                raw = _cdr(record.raw, record.channel)
                message: Any = typestore().deserialize_cdr(raw, self.msgtype)
            except Exception as error:  # generated parsers raise whatever damaged bytes lead to
                text = f"messages that are no {self.msgtype}, first image {number}: {_line(error)}"
                self._stream.add("message", text)
                continue
            stamp = message.header.stamp
            image = BagImage(self.topic, message, stamp.sec * _SECOND + stamp.nanosec, record.log_ns, raw)
            watch.see(image)
            yield image

    def messages(self, topics: Collection[str]) -> Iterator[tuple[str, str, int, bytes]]:
        """Topic, type, log time in nanoseconds and CDR bytes of all messages on these topics, in log-time order."""
        wanted = {channel for file in self._files for channel in file.counts if channel.topic in topics}
        for record in self._records(wanted):
            try:
                raw = _cdr(record.raw, record.channel)
            except Exception as error:  # as above
                self._found.add("other_message", f"messages of other topics not readable, first {_line(error)}")
                continue
            yield record.channel.topic, record.channel.msgtype, record.log_ns, raw

    def _records(self, wanted: Collection[Channel]) -> Iterator[Record]:
        files = [file for file in self._files if wanted & file.counts.keys()]
        blocks = heapq.merge(*(file.blocks(wanted) for file in files), key=lambda block: block.first_ns)
        try:
            yield from in_log_order(blocks)
        except OSError as error:
            raise BagError(f"{self.path} cannot be read any further: {error}") from error

    def _open(self, topic: str) -> None:
        paths, said = self._locate()
        errors: list[BagError] = []
        for path in paths:
            try:
                self._files.append(open_storage(path, self._workspace, self._found))
            except BagError as error:
                if len(paths) == 1:
                    raise
                errors.append(error)
        if not self._files:
            raise BagError(f"none of the {len(paths)} files of {self.path} can be read; the first: {errors[0]}")
        for unreadable in errors:
            self._found.add("unreadable_file", f"files that cannot be read, first {unreadable}")
        storages = {file.storage for file in self._files}
        if len(storages) > 1:
            raise BagError(f"{self.path} holds bags of {' and '.join(sorted(storages))}; name one of the files")
        self.storage = storages.pop()
        counts = Counter[Channel]()
        for file in self._files:
            counts.update(file.counts)
        self._check_counts(said, counts)
        self._choose(topic, counts)
        times = [time for file in self._files for time in (file.first_ns, file.last_ns) if time]
        self.duration_s = (max(times) - min(times)) * 1e-9 if times else 0.0

    def _locate(self) -> tuple[list[Path], dict[str, int]]:
        """Files in the order of recording, and the counts of messages that metadata.yaml claims."""
        if self.path.name == _METADATA:
            self.path = self.path.parent
        if not self.path.exists():
            raise BagError(f"{self.path} does not exist; a bag folder, .mcap, .db3 or .bag file is needed")
        if not self.path.is_dir():
            return [self.path], {}
        try:
            there = {file.name: file for file in sorted(self.path.iterdir(), key=_by_number) if _is_storage(file)}
        except OSError as error:
            raise BagError(f"{self.path} cannot be read: {error.strerror}") from error
        # A recorder that was killed while it packed a file leaves both: the packed one is the unfinished.
        there = {
            name: file
            for name, file in there.items()
            if _unpacked_name(name) not in there or name == _unpacked_name(name)
        }
        if not there:
            inner = [file.name for file in sorted(self.path.iterdir()) if file.is_dir()]
            hint = f"; it has the folder {inner[0]}: is the bag there?" if inner else ""
            raise BagError(f"{self.path} holds no bag: no .mcap, .db3 or .bag file is in it{hint}")
        names, said = self._read_metadata()
        missing = [name for name in names if name not in there and _unpacked_name(name) not in there]
        if missing:
            self._found.add(
                "missing_file", f"{_METADATA} names {', '.join(missing)}, which is not there; the others were read"
            )
        extra = [name for name in there if names and name not in names and f"{name}.zstd" not in names]
        if extra:
            self._found.add("extra_file", f"{_METADATA} does not name {', '.join(extra)}, which was read too")
        return list(there.values()), said

    def _read_metadata(self) -> tuple[list[str], dict[str, int]]:
        file = self.path / _METADATA
        try:
            bag = _metadata(file)["rosbag2_bagfile_information"]
            names = [PurePath(name).name for name in bag["relative_file_paths"]]
            topics = [
                (topic["topic_metadata"]["name"], int(topic["message_count"]))
                for topic in bag["topics_with_message_count"]
            ]
        except FileNotFoundError:
            self._found.add("metadata", f"there is no {_METADATA}; the files were read as one recording")
        except (OSError, yaml.YAMLError, LookupError, TypeError, ValueError, AttributeError) as error:
            self._found.add(
                "metadata", f"{_METADATA} is not readable ({_line(error)}); the files were read as one recording"
            )
        else:
            said = Counter[str]()
            for name, count in topics:
                said[name] += count
            return names, said
        return [], {}

    def _check_counts(self, said: dict[str, int], counts: Counter[Channel]) -> None:
        if not said:
            return
        found = Counter[str]()
        for channel, count in counts.items():
            found[channel.topic] += count
        wrong = [name for name in sorted(said.keys() | found.keys()) if said.get(name, 0) != found[name]]
        if wrong:
            name = wrong[0]
            text = f"{_METADATA} claims {said.get(name, 0)} messages of {name}, there are {found[name]}"
            self._found.add("counts", text + (f"; {len(wrong) - 1} more topics are wrong" if wrong[1:] else ""))

    def _choose(self, topic: str, counts: Counter[Channel]) -> None:
        infos: Counter[tuple[str, str]] = Counter()
        for channel, count in counts.items():
            infos[channel.topic, channel.msgtype] += count
        self.topics = tuple(TopicInfo(*key, count) for key, count in sorted(infos.items()))

        images = {channel: count for channel, count in counts.items() if channel.msgtype in IMAGE_TYPES}
        usable = {channel: count for channel, count in images.items() if channel.encoding in _ENCODINGS and count}
        if topic:
            usable = {channel: count for channel, count in usable.items() if channel.topic in (topic, f"/{topic}")}
        listed = _listed([TopicInfo(channel.topic, channel.msgtype, count) for channel, count in images.items()])
        reasons = [problem.text for problem in self._found]
        if topic and not usable:
            named = [channel for channel in counts if channel.topic in (topic, f"/{topic}")]
            if not named:
                known = f"image topics: {listed}" if listed else f"its topics: {_listed(self.topics) or 'none'}"
                raise BagError("; ".join([f"{self.path} has no topic {topic}; {known}", *reasons]))
            channel = named[0]
            if channel not in images:
                raise BagError(
                    f"topic {topic} of {self.path} holds {channel.msgtype or 'messages without a type'}, not "
                    f"{' or '.join(IMAGE_TYPES)}; image topics: {listed or 'none'}"
                )
            if channel.encoding not in _ENCODINGS:
                raise BagError(f"topic {topic} of {self.path} is in {channel.encoding!r}; CDR or ROS 1 is needed")
            raise BagError("; ".join([f"topic {topic} of {self.path} has no message", *reasons]))
        if not usable:
            listed = _listed(self.topics) or "none"
            raise BagError("; ".join([f"{self.path} holds no image; its topics: {listed}", *reasons]))
        if len({channel.topic for channel in usable}) > 1:
            raise BagError(f"{self.path} has several image topics, name one: {listed}")
        self._channel = max(usable, key=lambda channel: usable[channel])
        self.topic, self.msgtype, self.count = self._channel.topic, self._channel.msgtype, usable[self._channel]
        others = [
            f"{count} of {channel.msgtype} in {channel.encoding}"
            for channel, count in usable.items()
            if channel != self._channel
        ]
        if others:
            self._found.add("mixed_types", f"{self.topic} has two types of messages; not read: {', '.join(others)}")


class _Watch:
    """What is strange about the course of the images."""

    def __init__(self, problems: Problems) -> None:
        self.number = 0
        self._problems = problems
        self._last: BagImage | None = None
        self._format: tuple[object, ...] | None = None
        self._usual: deque[int] = deque(maxlen=_USUAL)

    def see(self, image: BagImage) -> None:
        message, number, add = image.message, self.number, self._problems.add
        if hasattr(message, "format"):
            found: tuple[object, ...] = (message.format,)
        else:
            found = (f"{message.width}x{message.height}", message.encoding)
        if self._format is not None and found != self._format:
            text = " ".join(map(str, found))
            add("changed", f"changes of size or encoding, first at image {number}, now {text}")
        self._format = found

        stamp = message.header.stamp
        if stamp.sec == stamp.nanosec == 0:
            add("zero_stamp", f"images without a stamp, first image {number}")
            return
        if stamp.sec < 0 or stamp.nanosec >= _SECOND:
            add(
                "invalid_stamp",
                f"images with an impossible stamp, first image {number}, {stamp.sec} s {stamp.nanosec} ns",
            )
            return
        last, self._last = self._last, image
        if last is None:
            return
        step, log_step = image.stamp_ns - last.stamp_ns, image.log_ns - last.log_ns
        usual = statistics.median(self._usual) if self._usual else _SECOND
        if step == 0:
            add("duplicate_stamp", f"images with the stamp of the one before, first image {number}")
        elif step < 0:
            add(
                "stamp_back",
                f"stamps before that of the image before, first image {number}, by {-step * 1e-9:.3f} s",
            )
        elif abs(step - log_step) > _SECOND:
            text = f"by {step * 1e-9:.3f} s while {log_step * 1e-9:.3f} s passed"
            add("stamp_jump", f"jumps of the stamps, first at image {number}, {text}")
        elif step > max(_SECOND, _GAP_INTERVALS * usual):
            add("gap", f"gaps without an image, first before image {number}, {step * 1e-9:.3f} s long")
        else:
            self._usual.append(step)


def _cdr(raw: bytes, channel: Channel) -> bytes:
    if raw.startswith(ZSTD_MAGIC):
        raw = unzstd_message(raw)
    return raw if channel.encoding == "cdr" else bytes(typestore().ros1_to_cdr(raw, channel.msgtype))


def _metadata(file: Path) -> Any:
    if file.exists() and not (file.is_file() and file.stat().st_size <= _MOST_METADATA_BYTES):
        raise ValueError(f"no file of at most {_MOST_METADATA_BYTES >> 20} MB")
    text, loader, depth = file.read_bytes(), getattr(yaml, "CSafeLoader", yaml.SafeLoader), 0
    for event in yaml.parse(text, Loader=loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MOST_METADATA_DEPTH:  # load() of the C library would overrun the stack
            raise ValueError("it is nested too deeply")
    return yaml.load(text, Loader=loader)


def _is_storage(file: Path) -> bool:
    return _unpacked_name(file.name).endswith(_SUFFIXES) and file.is_file()


def _unpacked_name(name: str) -> str:
    return name.rsplit(".", 1)[0] if name.endswith(_PACKED_SUFFIXES) else name


def _by_number(file: Path) -> tuple[int, str]:
    """bag_10 after bag_9."""
    return len(file.name), file.name


def _listed(topics: Collection[TopicInfo]) -> str:
    return ", ".join(map(str, sorted(topics, key=lambda topic: topic.name)))


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
