# SPDX-License-Identifier: Apache-2.0
"""Small bags of each kind, whole and broken."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import cv2
import numpy as np
from mcap.writer import CompressionType, IndexType
from mcap.writer import Writer as McapWriter
from rosbags.rosbag1 import Writer as Ros1Writer
from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

from surg_perception.data.ros_types import typestore
from surg_perception.stream.image_decode import encode_image

START_NS = 1_700_000_000 * 10**9
STEP_NS = 40_000_000
IMAGE, COMPRESSED, STRING = "sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage", "std_msgs/msg/String"
_MODES = {"file": CompressionMode.FILE, "message": CompressionMode.MESSAGE, "chunk": CompressionMode.STORAGE}


def pictures(count, height=24, width=32):
    """Noise, uint8 BGR: bags of it do not compress away."""
    rng = np.random.default_rng(7)
    return [rng.integers(0, 256, (height, width, 3), np.uint8) for _ in range(count)]


def header(stamp_ns, store=None):
    types = (store or typestore()).types
    stamp = types["builtin_interfaces/msg/Time"](*divmod(stamp_ns, 10**9))
    sequence = {"seq": 0} if store else {}  # ROS 1
    return types["std_msgs/msg/Header"](stamp=stamp, frame_id="endoscope", **sequence)


def image_message(bgr, stamp_ns, encoding="bgr8", store=None):
    """Image in an encoding of encode_image(), or CompressedImage for "jpeg" and "png", of a picture uint8 [H, W, 3]."""
    types = (store or typestore()).types
    if encoding in ("jpeg", "png"):
        data = cv2.imencode(f".{encoding}", bgr)[1].ravel()
        return types[COMPRESSED](header=header(stamp_ns, store), format=encoding, data=data)
    name, step, data = encode_image(bgr, encoding)
    height, width = bgr.shape[:2]
    return types[IMAGE](header(stamp_ns, store), height, width, name, 0, step, np.frombuffer(data, np.uint8))


def string_message(text):
    return typestore().types[STRING](text)


def cdr(message):
    return bytes(typestore().serialize_cdr(message, message.__msgtype__))


def stamps_of(count):
    return [START_NS + STEP_NS * index for index in range(count)]


def image_messages(frames, topic="/image", encoding="bgr8", stamps_ns=None):
    """(topic, message, log_ns) of pictures uint8 BGR [H, W, 3], 25 per second from START_NS by default."""
    frames = list(frames)
    stamps = stamps_of(len(frames)) if stamps_ns is None else stamps_ns
    return [(topic, image_message(bgr, ns, encoding), ns) for bgr, ns in zip(frames, stamps, strict=True)]


def write_messages(path, messages, storage="mcap", compression="", version=9):
    """A bag folder of (topic, message, log_ns) by rosbags' writer; compression "", "file", "message" or "chunk"."""
    path = Path(path)
    plugin = StoragePlugin.MCAP if storage == "mcap" else StoragePlugin.SQLITE3
    writer = Writer(path, version=version, storage_plugin=plugin)
    if compression:
        writer.set_compression(_MODES[compression], CompressionFormat.ZSTD)
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
    return write_messages(path, image_messages(frames, topic, encoding, stamps_ns), storage, compression)


def write_mcap(
    path,
    messages,
    *,
    profile="ros2",
    schema_encoding="ros2msg",
    message_encoding="cdr",
    spelling=str,
    serialise=cdr,
    compression=CompressionType.NONE,
    chunk_size=16 * 1024,
    index=True,
    finish=True,
    **options,
):
    """One .mcap file as another recorder than rosbag2 might write it; `spelling` changes the types' names."""
    with Path(path).open("wb") as file:
        extra = {} if index else {"index_types": IndexType.NONE, "repeat_channels": False, "use_statistics": False}
        writer = McapWriter(file, chunk_size=chunk_size, compression=compression, **extra, **options)
        writer.start(profile=profile, library="a test")
        channels = {}
        for number, (topic, message, log_ns) in enumerate(messages):
            if topic not in channels:
                name = spelling(message.__msgtype__)
                schema = writer.register_schema(name, schema_encoding, b"string nobody_reads_this")
                channels[topic] = writer.register_channel(topic, message_encoding, schema)
            writer.add_message(channels[topic], log_ns, serialise(message), log_ns, number)
        if finish:
            writer.finish()
    return path


def write_database(path, messages, *, schema=2, index=True, journal="delete", encoding="cdr"):
    """One .db3 file as rosbag2 of Foxy (schema 1) or Humble (2) writes it. Returns its connection, still open."""
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA journal_mode = {journal}")
    qos = ", offered_qos_profiles TEXT NOT NULL" if schema > 1 else ""
    connection.executescript(
        "CREATE TABLE topics(id INTEGER PRIMARY KEY, name TEXT NOT NULL, type TEXT NOT NULL, "
        f"serialization_format TEXT NOT NULL{qos});"
        "CREATE TABLE messages(id INTEGER PRIMARY KEY, topic_id INTEGER NOT NULL, timestamp INTEGER NOT NULL, "
        "data BLOB NOT NULL);" + ("CREATE INDEX timestamp_idx ON messages (timestamp ASC);" if index else "")
    )
    topics = {}
    for topic, message, log_ns in messages:
        if topic not in topics:
            topics[topic] = len(topics) + 1
            row = (topics[topic], topic, message.__msgtype__, encoding, *([""] if schema > 1 else []))
            connection.execute(f"INSERT INTO topics VALUES({', '.join('?' * len(row))})", row)
        row = topics[topic], log_ns, cdr(message)
        connection.execute("INSERT INTO messages(topic_id, timestamp, data) VALUES(?, ?, ?)", row)
    connection.commit()
    return connection


def write_ros1(path, frames, topic="/image", encoding="bgr8", compression=None):
    """A ROS 1 .bag file."""
    store = get_typestore(Stores.ROS1_NOETIC)
    writer = Ros1Writer(path)
    if compression:
        writer.set_compression(Ros1Writer.CompressionFormat[compression])
    with writer:
        connections = {}
        for bgr, stamp_ns in zip(frames, stamps_of(len(frames)), strict=True):
            message = image_message(bgr, stamp_ns, encoding, store)
            name = message.__msgtype__
            if name not in connections:
                connections[name] = writer.add_connection(topic, name, typestore=store)
            writer.write(connections[name], stamp_ns, store.serialize_ros1(message, name))
    return path


def flip(path, position, bits=0xFF):
    """Change one byte."""
    data = bytearray(Path(path).read_bytes())
    data[position] ^= bits
    Path(path).write_bytes(data)


def cut(path, length):
    """Keep the first bytes only."""
    Path(path).write_bytes(Path(path).read_bytes()[:length])
