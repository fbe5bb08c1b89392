# SPDX-License-Identifier: Apache-2.0
"""The files of a bag: MCAP, SQLite3 and ROS 1, whole or damaged; their messages in log-time order, a few at a time.

The readers of rosbags and mcap end at the first damaged byte, refuse a file without its end record and pass over an
SQLite journal, so the files are walked here; records are parsed by mcap, pages by SQLite, ROS 1 bags by rosbags.
"""

from __future__ import annotations

import bz2
import errno
import heapq
import itertools
import os
import re
import shutil
import sqlite3
import struct
import tempfile
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import lz4.frame  # type: ignore[import-untyped]
from backports import zstd
from mcap import records
from mcap.data_stream import ReadDataStream
from mcap.exceptions import McapError
from mcap.opcode import Opcode

# A larger chunk or message is damage: its length was read from the wrong bytes.
MAX_CHUNK_BYTES = 1 << 29
# Messages of chunks that overlap in time wait for each other up to this; beyond it they come in file order.
MAX_HELD_BYTES = 256 << 20
# Messages outside chunks are read in runs of this many bytes.
_RUN_BYTES = 1 << 20
_PIECE_BYTES = 1 << 20

ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_MCAP_MAGIC = b"\x89MCAP0\r\n"
_SQLITE_MAGIC = b"SQLite format 3\0"
_ROS1_MAGIC = b"#ROSBAG V2.0"


class BagError(ValueError):
    """A bag that cannot be read at all. The text is one line: what was found, what was expected, what to do."""

    def __init__(self, text: str) -> None:
        super().__init__(_one_line(text))


@dataclass(frozen=True)
class BagProblem:
    """Something wrong with a bag that did not keep the rest from being read.

    `kind` is a short stable word (docs/bags.md lists them), `text` one line for the user, which tells of the first,
    `count` how many there are: show `f"{count} × {text}"`.
    """

    kind: str
    text: str
    count: int


def _one_line(text: str) -> str:
    """Names in a bag may hold line ends and what a terminal obeys."""
    return "".join(letter if letter.isprintable() else "�" for letter in text)


class Channel(NamedTuple):
    """What messages belong to: their topic, type ("package/msg/Name") and encoding ("cdr", "ros1", …)."""

    topic: str
    msgtype: str
    encoding: str


class Record(NamedTuple):
    """One message as the bag holds it; `log_ns` is when it was received, nanoseconds."""

    log_ns: int
    channel: Channel
    raw: bytes


class Block(NamedTuple):
    """Messages that are loaded together; `first_ns` is the log time of the earliest."""

    first_ns: int
    load: Callable[[], Iterable[Record]]


class Problems:
    """Problems, each kind counted and told by the first one met."""

    def __init__(self) -> None:
        self._texts: dict[str, str] = {}
        self._counts: Counter[str] = Counter()
        self._places: set[tuple[str, str, int]] = set()

    def add(self, kind: str, text: str, place: tuple[str, int] | None = None) -> None:
        """A place (file, byte or row) counts once, however often it is read."""
        if place is not None:
            if (kind, *place) in self._places:
                return
            self._places.add((kind, *place))
        self._texts.setdefault(kind, _one_line(text))
        self._counts[kind] += 1

    def __iter__(self) -> Iterator[BagProblem]:
        for kind, text in self._texts.items():
            yield BagProblem(kind, text, self._counts[kind])


class Workspace:
    """Private temporary folder for a file that must be unpacked or copied to be read; it holds one at a time."""

    def __init__(self) -> None:
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._source, self._target = Path(), Path()

    def close(self) -> None:
        if self._folder is not None:
            self._folder.cleanup()
        self._folder = None

    def unpacked(self, source: Path, problems: Problems) -> Path:
        """The .zst or .zstd file unpacked, as far as it can be."""
        if self._folder is None or self._source != source:
            target = self._room(source) / source.stem
            with _disk_errors(source), source.open("rb") as packed, target.open("wb") as plain:
                whole = _unzstd(packed, plain)
            if not whole:
                text = f"{source.name} is cut or damaged: {target.stat().st_size} bytes of it could be unpacked"
                problems.add("cut_packed_file", text, (source.name, 0))
            self._target = target
        return self._target

    def copied(self, source: Path, companions: list[Path]) -> Path:
        """A copy with its companions beside it, which a reader may write to."""
        if self._folder is None or self._source != source:
            folder = self._room(source)
            with _disk_errors(source):
                for file in (source, *companions):
                    shutil.copyfile(file, folder / file.name)
            self._target = folder / source.name
        return self._target

    def _room(self, source: Path) -> Path:
        self.close()
        self._folder, self._source = tempfile.TemporaryDirectory(prefix="surg_perception_bag_"), source
        return Path(self._folder.name)


@contextmanager
def _disk_errors(source: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise BagError(
            f"{source} must be unpacked to be read, and {tempfile.gettempdir()} is full; "
            "free space there or set TMPDIR to a larger place"
        ) from error


def _unzstd(packed: BinaryIO, plain: BinaryIO) -> bool:
    """Whether all frames were whole."""
    frame, data = zstd.ZstdDecompressor(), packed.read(_PIECE_BYTES)
    if not data:
        return False
    while True:
        try:
            plain.write(frame.decompress(data, _PIECE_BYTES))
        except zstd.ZstdError:
            return False
        if frame.eof:
            data = frame.unused_data or packed.read(_PIECE_BYTES)
            if not data:
                return True
            frame = zstd.ZstdDecompressor()
        else:
            data = packed.read(_PIECE_BYTES) if frame.needs_input else b""
            if frame.needs_input and not data:
                return False


def unzstd_message(raw: bytes) -> bytes:
    """A message that the recorder compressed by itself. Raises ValueError where it is damaged or too large."""
    frame = zstd.ZstdDecompressor()
    try:
        plain = frame.decompress(raw, MAX_CHUNK_BYTES)
    except zstd.ZstdError as error:
        raise ValueError(f"zstd: {error}") from error
    if not frame.eof:
        raise ValueError("its zstd frame is cut or too large")
    return plain


def ros_type(name: str) -> str:
    """package/msg/Name, also where it is spelled as in ROS 1 (package/Name) or DDS (package::msg::dds_::Name_)."""
    parts = [part for part in re.split(r"::|/", name) if part != "dds_"]
    if "::dds_::" in name:
        parts[-1] = parts[-1].removesuffix("_")
    return f"{parts[0]}/msg/{parts[1]}" if len(parts) == 2 else "/".join(parts)


class StorageFile(ABC):
    """One file of a bag. It is opened when read and closed after the last message; `close()` ends it early."""

    storage: str

    def __init__(self, path: Path, workspace: Workspace, problems: Problems) -> None:
        """Find out what it holds. Raises BagError where that cannot be told."""
        self.path, self._workspace, self._problems = path, workspace, problems
        self.counts: Counter[Channel] = Counter()
        self.first_ns, self.last_ns = 0, 0
        self._handle: Any = None

    def blocks(self, wanted: Collection[Channel]) -> Iterator[Block]:
        """Blocks with messages of the channels, by first_ns; to be loaded one after the other."""
        # The first is empty: whoever merges files opens this one only when its time has come.
        yield Block(self.first_ns, tuple)
        yield from self._blocks(wanted)
        self.close()

    @abstractmethod
    def _blocks(self, wanted: Collection[Channel]) -> Iterator[Block]: ...

    def close(self) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            handle.close()

    def _plain_path(self) -> Path:
        if _begins(self.path).startswith(ZSTD_MAGIC):
            return self._workspace.unpacked(self.path, self._problems)
        return self.path

    def _damaged(self, place: int, text: str) -> None:
        self._problems.add("damaged", f"damaged places, first {self.path.name}: {text}", (self.path.name, place))

    def _span(self, first_ns: int, last_ns: int) -> None:
        self.first_ns = min(self.first_ns or first_ns, first_ns)
        self.last_ns = max(self.last_ns, last_ns)


def open_storage(path: Path, workspace: Workspace, problems: Problems) -> StorageFile:
    """The file at path, whatever its name. Raises BagError where it holds no bag."""
    try:
        head = _begins(path)
        if head.startswith(ZSTD_MAGIC):
            head = _begins(workspace.unpacked(path, problems))
        for magic, kind in _KINDS.items():
            if head.startswith(magic):
                file: StorageFile = kind(path, workspace, problems)
                file.close()
                return file
    except OSError as error:
        raise BagError(f"{path} cannot be read: {error.strerror or error}") from error
    if not head:
        raise BagError(f"{path} has no bytes: nothing was recorded, or copying it failed")
    raise BagError(
        f"{path} is no bag: it starts with {head[:8].hex(' ')}; an MCAP, SQLite3 (.db3) or ROS 1 (.bag) file is needed"
    )


def in_log_order(blocks: Iterable[Block], max_held_bytes: int = MAX_HELD_BYTES) -> Iterator[Record]:
    """Messages of blocks sorted by first_ns, by log time; of the same time, in file order."""
    waiting: list[tuple[int, int, Record]] = []
    held, serial = 0, itertools.count()

    def due(until_ns: float) -> Iterator[Record]:
        nonlocal held
        while waiting and (waiting[0][0] <= until_ns or held > max_held_bytes):
            record = heapq.heappop(waiting)[2]
            held -= len(record.raw)
            yield record

    for block in blocks:
        yield from due(block.first_ns)
        for record in block.load():
            heapq.heappush(waiting, (record.log_ns, next(serial), record))
            held += len(record.raw)
    yield from due(float("inf"))


# --- MCAP (https://mcap.dev/spec) ---

_RECORD = struct.Struct("<BQ")
_MESSAGE = struct.Struct("<HIQQ")
_CHUNK = struct.Struct("<QQQII")  # first and last log time, size and checksum unpacked, length of the next string
_NO_RECORD = 0
_FOOTER_BYTES = _RECORD.size + 20 + len(_MCAP_MAGIC)


class _Run(NamedTuple):
    """A chunk, or a run of messages outside chunks: bytes start to end of the file."""

    first_ns: int
    start: int
    end: int
    chunk: bool


class McapFile(StorageFile):
    """A file of any MCAP recorder, with or without chunks, indexes, summary and end."""

    storage = "mcap"

    def __init__(self, path: Path, workspace: Workspace, problems: Problems) -> None:
        super().__init__(path, workspace, problems)
        self._types: dict[int, str] = {}
        self._channels: dict[int, Channel] = {}
        self._runs: list[_Run] = []
        self._scan()
        self._runs.sort()

    def _blocks(self, wanted: Collection[Channel]) -> Iterator[Block]:
        for run in self._runs:
            yield Block(run.first_ns, partial(self._load, run, wanted))

    def _load(self, run: _Run, wanted: Collection[Channel]) -> Iterator[Record]:
        for opcode, body in self._records(run):
            if opcode != Opcode.MESSAGE:
                self._define(opcode, body, run.start)
            elif len(body) < _MESSAGE.size:
                self._damaged(run.start, f"a message of {len(body)} bytes at byte {run.start}")
            else:
                channel_id, sequence, log_ns, _ = _MESSAGE.unpack_from(body)
                channel = self._channels.get(channel_id)
                if channel is None:
                    text = f"messages of no known topic, first in {self.path.name} of channel {channel_id}"
                    self._problems.add("unknown_topic", text, (self.path.name, hash((run.start, sequence, log_ns))))
                elif channel in wanted:
                    yield Record(log_ns, channel, bytes(body[_MESSAGE.size :]))

    def _file(self) -> BinaryIO:
        if self._handle is None:
            self._handle = self._plain_path().open("rb")
        handle: BinaryIO = self._handle
        return handle

    def _scan(self) -> None:
        """Find the runs, channels and counts; only chunks that no index describes are unpacked for it."""
        file = self._file()
        self._size = os.fstat(file.fileno()).st_size
        chunk_starts, has_end = self._read_summary(file)
        position, chunk, indexed = len(_MCAP_MAGIC), None, Counter[int]()
        while True:
            file.seek(position)
            head = file.read(_RECORD.size + _CHUNK.size)
            opcode, length = _RECORD.unpack_from(head) if len(head) >= _RECORD.size else (_NO_RECORD, self._size)
            end = position + _RECORD.size + length
            if (
                opcode == Opcode.MESSAGE_INDEX
                and chunk is not None
                and len(head) >= _RECORD.size + 6
                and end <= self._size
            ):
                channel_id, index_bytes = struct.unpack_from("<HI", head, _RECORD.size)
                indexed[channel_id] += index_bytes // 16
                position = end
                continue
            if chunk is not None:
                self._count(chunk, indexed)
                chunk, indexed = None, Counter[int]()
            if opcode in (Opcode.DATA_END, Opcode.FOOTER):
                break
            # Without a list of the chunks, one that ends behind the file's end was cut, and its begin is good.
            fits = end <= self._size or not chunk_starts
            if opcode == Opcode.CHUNK and fits and min(length, len(head) - _RECORD.size) >= _CHUNK.size:
                first_ns, last_ns, *_ = _CHUNK.unpack_from(head, _RECORD.size)
                chunk = _Run(first_ns, position, min(end, self._size), True)
                self._runs.append(chunk)
                if last_ns:
                    self._span(first_ns, last_ns)
            if opcode == _NO_RECORD or end > self._size:
                following = next((start for start in chunk_starts if start > position), None)
                if following is None:
                    position = self._size if chunk is not None else position
                    break
                self._damaged(position, f"no record at byte {position}, {following - position} bytes skipped")
                end = following
            elif opcode not in (Opcode.CHUNK, Opcode.ATTACHMENT) and length > MAX_CHUNK_BYTES:
                self._damaged(position, f"a record of {length} bytes at byte {position}")
            elif opcode in (Opcode.SCHEMA, Opcode.CHANNEL):
                file.seek(position + _RECORD.size)
                self._define(opcode, file.read(length), position)
            elif opcode == Opcode.MESSAGE and length >= _MESSAGE.size:
                channel_id, _, log_ns, _ = _MESSAGE.unpack_from(head, _RECORD.size)
                self._add_message(channel_id, log_ns, position, end)
            position = end
        if chunk is not None:
            self._count(chunk, indexed)
        if not has_end:
            text = (
                f"{self.path.name} has no end record: its recorder was killed or still runs, or it was cut; "
                f"read up to byte {position} of {self._size}"
            )
            self._problems.add("unfinished", text, (self.path.name, 0))
        elif position < self._size and opcode not in (Opcode.DATA_END, Opcode.FOOTER):
            self._damaged(position, f"no record at byte {position}, nothing after it could be read")

    def _read_summary(self, file: BinaryIO) -> tuple[list[int], bool]:
        """Where chunks start and whether the file has its end; channels that the summary repeats are taken over."""
        footer_start = self._size - _FOOTER_BYTES
        file.seek(max(0, footer_start))
        footer = file.read(_FOOTER_BYTES)
        if (
            footer_start < len(_MCAP_MAGIC)
            or footer[:9] != _RECORD.pack(Opcode.FOOTER, 20)
            or footer[29:] != _MCAP_MAGIC
        ):
            return [], False
        start, _, checksum = struct.unpack_from("<QQI", footer, _RECORD.size)
        if not start:
            return [], True
        file.seek(min(start, footer_start))
        length = footer_start - file.tell()
        summary = file.read(length) if length <= MAX_CHUNK_BYTES else b""
        if not summary or (checksum and zlib.crc32(summary + footer[:25]) != checksum):
            text = f"{self.path.name}: its index is damaged, and was not used"
            self._problems.add("damaged_index", text, (self.path.name, 0))
            return [], True
        starts = []
        try:
            # By opcode: schemas come before the channels that name them.
            for opcode, body in sorted(_records(summary), key=lambda record: record[0]):
                if opcode == Opcode.CHUNK_INDEX:
                    starts.append(_parse(records.ChunkIndex, body).chunk_start_offset)
                else:
                    self._define(opcode, body, start)
        except _Damage as damage:
            self._damaged(start, f"its index: {damage}")
        return sorted(starts), True

    def _add_message(self, channel_id: int, log_ns: int, start: int, end: int) -> None:
        last = self._runs[-1] if self._runs else None
        if last is not None and not last.chunk and last.end == start and end - last.start <= _RUN_BYTES:
            self._runs[-1] = _Run(min(last.first_ns, log_ns), last.start, end, False)
        else:
            self._runs.append(_Run(log_ns, start, end, False))
        self._span(log_ns, log_ns)
        if channel_id in self._channels:
            self.counts[self._channels[channel_id]] += 1

    def _count(self, chunk: _Run, indexed: Counter[int]) -> None:
        if not indexed or not indexed.keys() <= self._channels.keys():
            indexed = Counter()
            for opcode, body in self._records(chunk):
                if opcode == Opcode.MESSAGE and len(body) >= _MESSAGE.size:
                    indexed[_MESSAGE.unpack_from(body)[0]] += 1
                else:
                    self._define(opcode, body, chunk.start)
        for channel_id, number in indexed.items():
            if channel_id in self._channels:
                self.counts[self._channels[channel_id]] += number

    def _define(self, opcode: int, body: bytes | memoryview, place: int) -> None:
        if opcode == Opcode.SCHEMA:
            try:
                schema = _parse(records.Schema, body)
            except _Damage as damage:
                self._damaged(place, f"a schema at byte {place}: {damage}")
            else:
                self._types[schema.id] = ros_type(schema.name)
        elif opcode == Opcode.CHANNEL:
            try:
                channel = _parse(records.Channel, body)
            except _Damage as damage:
                self._damaged(place, f"a channel at byte {place}: {damage}")
            else:
                found = Channel(channel.topic, self._types.get(channel.schema_id, ""), channel.message_encoding)
                self.counts[self._channels.setdefault(channel.id, found)] += 0

    def _records(self, run: _Run) -> Iterator[tuple[int, memoryview]]:
        """Records of a run, as far as it is whole; of a damaged chunk none, since which are good cannot be told."""
        file = self._file()
        file.seek(run.start)
        data = file.read(min(run.end - run.start, 2 * MAX_CHUNK_BYTES))
        try:
            yield from _records(*(_unpack_chunk(data, run.end == self._size) if run.chunk else (data, True)))
        except _Damage as damage:
            self._damaged(run.start, f"the {'chunk' if run.chunk else 'records'} at byte {run.start}: {damage}")


class _Damage(Exception):
    """What is wrong with a part of a file."""


def _records(data: bytes | memoryview, whole: bool = True) -> Iterator[tuple[int, memoryview]]:
    view, position = memoryview(data), 0
    while position < len(data):
        end = len(data) + 1
        if position + _RECORD.size <= len(data):
            opcode, length = _RECORD.unpack_from(data, position)
            end = position + _RECORD.size + length
        if end > len(data):
            if whole:
                raise _Damage("its last record is incomplete")
            return
        yield opcode, view[position + _RECORD.size : end]
        position = end


def _parse(kind: Any, body: bytes | memoryview) -> Any:
    try:
        return kind.read(ReadDataStream(BytesIO(body)))
    except (McapError, struct.error, ValueError) as error:
        raise _Damage(f"not readable ({error})") from error


def _unpack_chunk(record: bytes, last: bool) -> tuple[bytes | memoryview, bool]:
    """What a chunk record holds, and whether it is whole: the last one of a file may be cut, and its begin is good."""
    _, _, size, checksum, name_length = _CHUNK.unpack_from(record, _RECORD.size)
    position = _RECORD.size + _CHUNK.size + name_length
    if position + 8 > len(record):
        raise _Damage("its head is incomplete")
    compression = record[position - name_length : position].decode(errors="replace")
    (length,) = struct.unpack_from("<Q", record, position)
    data: bytes | memoryview = memoryview(record)[position + 8 : position + 8 + length]
    cut = last and len(data) < length
    if size > MAX_CHUNK_BYTES:
        raise _Damage(f"it claims {size} bytes")
    try:
        if compression == "zstd":
            data = zstd.ZstdDecompressor().decompress(data, size) if data else b""
        elif compression == "lz4":
            data = lz4.frame.LZ4FrameDecompressor().decompress(data, size) if data else b""
        elif compression:
            raise _Damage(f"compression {compression!r} is unknown; lz4 and zstd are known")
    except (zstd.ZstdError, RuntimeError, ValueError, EOFError, MemoryError) as error:
        raise _Damage(f"{compression} cannot unpack it ({error})") from error
    if not cut:
        if len(data) != size:
            raise _Damage(f"it unpacks to {len(data)} bytes instead of {size}")
        if checksum and zlib.crc32(data) != checksum:
            raise _Damage("its checksum is wrong")
    return data, not cut


# --- SQLite3 ---


_MAX_LOST_ROWS = 20_000
_JOURNAL_MAGIC = b"\xd9\xd5\x05\xf9\x20\xa1\x63\xd7"


class SqliteFile(StorageFile):
    """A .db3 file of any version of rosbag2, also one with a journal, which is copied and recovered first."""

    storage = "sqlite3"

    def __init__(self, path: Path, workspace: Workspace, problems: Problems) -> None:
        super().__init__(path, workspace, problems)
        self._topics: dict[int, Channel] = {}
        try:
            rows = self._connection().execute("SELECT id, name, type, serialization_format FROM topics").fetchall()
            self._connection().execute("SELECT id, topic_id, timestamp, data FROM messages LIMIT 0")
            for topic_id, name, msgtype, encoding in rows:
                self._topics[topic_id] = Channel(str(name), ros_type(str(msgtype)), str(encoding))
                self.counts[self._topics[topic_id]] += 0
        except sqlite3.Error as error:
            self.close()
            raise BagError(f"{path} is no rosbag2 database, or its list of topics is damaged: {error}") from error
        self._summarise()

    def _blocks(self, wanted: Collection[Channel]) -> Iterator[Block]:
        topic_ids = [topic_id for topic_id, channel in self._topics.items() if channel in wanted]
        for log_ns, row, topic_id in self._rows(topic_ids):
            yield Block(log_ns, partial(self._load, log_ns, row, self._topics[topic_id]))

    def _load(self, log_ns: int, row: int, channel: Channel) -> list[Record]:
        try:
            query = "SELECT data FROM messages WHERE id = ? AND length(data) <= ?"
            found = self._connection().execute(query, (row, MAX_CHUNK_BYTES)).fetchone()
        except sqlite3.Error as error:
            self._damaged(row, f"message {row}: {error}")
            return []
        if found is None or not isinstance(found[0], bytes):
            self._damaged(row, f"message {row} has no bytes, or more than {MAX_CHUNK_BYTES}")
            return []
        return [Record(log_ns, channel, found[0])]

    def _summarise(self) -> None:
        groups = "SELECT topic_id, count(*), min(timestamp), max(timestamp) FROM messages GROUP BY topic_id"
        try:
            found = self._connection().execute(groups).fetchall()
        except sqlite3.Error as error:
            self._damaged(0, str(error))
            found = [(topic_id, 1, log_ns, log_ns) for log_ns, _, topic_id in self._salvaged()]
        for topic_id, number, first_ns, last_ns in found:
            if topic_id in self._topics and isinstance(first_ns, int) and _is_time(last_ns):
                self.counts[self._topics[topic_id]] += number
                self._span(max(0, first_ns), last_ns)
            else:
                text = f"messages of no known topic, first in {self.path.name} of topic {topic_id}"
                self._problems.add("unknown_topic", text, (self.path.name, hash(topic_id)))

    def _rows(self, topic_ids: list[int]) -> Iterator[tuple[int, int, int]]:
        """Log time, row and topic of messages, by log time."""
        marks = ", ".join("?" * len(topic_ids))
        query = f"SELECT timestamp, id, topic_id FROM messages WHERE topic_id IN ({marks}) ORDER BY timestamp, id"
        last = (-(1 << 63), 0, 0)
        try:
            for row in self._connection().execute(query, topic_ids):
                if _is_time(row[0]):
                    yield row
                    last = row
                else:
                    self._damaged(row[1], f"message {row[1]} has no time")
        except sqlite3.Error as error:
            self._damaged(0, str(error))
            yield from (row for row in sorted(self._salvaged()) if row > last and row[2] in topic_ids)

    def _salvaged(self) -> Iterator[tuple[int, int, int]]:
        """As _rows, but of a database with damaged pages: each row is looked up by itself, in the order of writing."""
        connection, row, last_good = self._connection(), 0, 0
        query = "SELECT timestamp, id, topic_id FROM messages WHERE id = ?"
        # Rows are numbered from one; how many there are cannot be asked where the last page is lost.
        while (row := row + 1) <= last_good + _MAX_LOST_ROWS:
            try:
                found = connection.execute(query, (row,)).fetchone()
            except sqlite3.Error:
                continue
            if found is not None and _is_time(found[0]):
                last_good = row
                yield found

    def _connection(self) -> sqlite3.Connection:
        if self._handle is None:
            path = self._plain_path()
            journals = [path.with_name(path.name + suffix) for suffix in ("-wal", "-journal")]
            journals = [journal for journal in journals if journal.exists() and journal.stat().st_size]
            # Immutable: SQLite makes no lock, journal or shared-memory file beside the user's.
            options = "mode=ro&immutable=1"
            if journals:
                text = (
                    f"{path.name} has a journal: its recorder was killed or still runs; what the journal holds was read"
                )
                self._problems.add("unfinished", text, (path.name, 0))
                path, options = self._workspace.copied(path, journals), "mode=rw"
                _forget_super_journal(path.with_name(f"{path.name}-journal"))
            self._size = path.stat().st_size
            self._handle = sqlite3.connect(f"{path.resolve().as_uri()}?{options}", uri=True, check_same_thread=False)
            # Else a database that was cut would not be opened at all.
            self._handle.execute("PRAGMA writable_schema = ON")
            self._handle.set_authorizer(_plain_tables_only)
            self._handle.text_factory = partial(str, encoding="utf-8", errors="replace")
        handle: sqlite3.Connection = self._handle
        return handle


def _is_time(value: object) -> bool:
    return isinstance(value, int) and value >= 0


def _plain_tables_only(action: int, _first: object, _second: object, _database: object, inside: object) -> int:
    """SQLite's authorizer: tables named topics and messages may be views, made to compute without end."""
    return sqlite3.SQLITE_DENY if inside or action == sqlite3.SQLITE_RECURSIVE else sqlite3.SQLITE_OK


def _forget_super_journal(journal: Path) -> None:
    """Of a journal's copy. SQLite would delete the file that a journal names as the one of several databases."""
    if journal.exists() and journal.stat().st_size >= len(_JOURNAL_MAGIC):
        with journal.open("r+b") as file:
            file.seek(-len(_JOURNAL_MAGIC), os.SEEK_END)
            if file.read() == _JOURNAL_MAGIC:
                file.seek(-len(_JOURNAL_MAGIC), os.SEEK_END)
                file.write(bytes(len(_JOURNAL_MAGIC)))


# --- ROS 1 ---


class Ros1File(StorageFile):
    """A ROS 1 .bag file, as rosbags reads it: it must have its index."""

    storage = "ros1"

    def __init__(self, path: Path, workspace: Workspace, problems: Problems) -> None:
        super().__init__(path, workspace, problems)
        reader = self._reader()
        for connection in reader.connections:
            self.counts[_ros1_channel(connection)] += connection.msgcount
        if reader.message_count:
            self._span(reader.start_time, reader.end_time)

    def _blocks(self, wanted: Collection[Channel]) -> Iterator[Block]:
        reader = self._reader()
        connections = [connection for connection in reader.connections if _ros1_channel(connection) in wanted]
        try:
            for connection, log_ns, raw in reader.messages(connections):
                record = Record(log_ns, _ros1_channel(connection), bytes(raw))
                yield Block(log_ns, partial(list, (record,)))
        except Exception as error:  # rosbags raises whatever parsing damaged bytes raises
            self._damaged(0, f"{error}; nothing after it could be read")

    def _reader(self) -> Any:
        from rosbags.rosbag1 import Reader

        if self._handle is None:
            try:
                self._handle = Reader(self._plain_path())
                self._handle.open()
                for place, chunk in self._handle.chunks.items():
                    unpack = partial(_unpack_ros1_chunk, chunk.decompressor)
                    self._handle.chunks[place] = chunk._replace(decompressor=unpack)
            except Exception as error:  # as above
                self._handle = None
                raise BagError(f"{self.path} cannot be read: {error}; `rosbag reindex` may repair it") from error
        return self._handle


def _unpack_ros1_chunk(unlimited: Callable[[bytes], bytes], data: bytes) -> bytes:
    """What rosbags' function makes of a chunk; a few bytes that would fill the memory are damage."""
    for magic, kind in ((b"BZh", bz2.BZ2Decompressor), (b"\x04\x22\x4d\x18", lz4.frame.LZ4FrameDecompressor)):
        if data.startswith(magic):
            frame = kind()
            plain: bytes = frame.decompress(data, MAX_CHUNK_BYTES)
            if not frame.eof:
                raise ValueError(f"a chunk is cut, or has more than {MAX_CHUNK_BYTES} bytes")
            return plain
    return unlimited(data)


def _ros1_channel(connection: Any) -> Channel:
    return Channel(connection.topic, ros_type(connection.msgtype), "ros1")


def _begins(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(16)


_KINDS: dict[bytes, type[StorageFile]] = {_MCAP_MAGIC: McapFile, _SQLITE_MAGIC: SqliteFile, _ROS1_MAGIC: Ros1File}
