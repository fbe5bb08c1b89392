# SPDX-License-Identifier: Apache-2.0
"""Bags that are written: read by rosbags, mcap and the package's own reader, also after SIGKILL in the middle."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import textwrap
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from mcap.exceptions import McapError
from mcap.reader import NonSeekingReader, make_reader
from rosbags.interfaces import QosDurability, QosReliability
from rosbags.rosbag2 import Reader

from surg_perception.data.bag_writer import BagWriter, Qos, definition_of
from surg_perception.data.bags import BagReader
from surg_perception.data.ros_types import typestore

STRING, IMAGE, LABELS = "std_msgs/msg/String", "sensor_msgs/msg/Image", "surg_perception_msgs/msg/PhaseLabels"


def string(text: str) -> bytes:
    store = typestore()
    return bytes(store.serialize_cdr(store.types[STRING](text), STRING))


def image(level: int, stamp_s: int, side: int = 8) -> bytes:
    store = typestore()
    header = store.types["std_msgs/msg/Header"](store.types["builtin_interfaces/msg/Time"](stamp_s, 0), "endoscope")
    data = np.full(side * side * 3, level, np.uint8)
    return bytes(store.serialize_cdr(store.types[IMAGE](header, side, side, "bgr8", 0, side * 3, data), IMAGE))


def fill(folder: Path, **options: Any) -> BagWriter:
    with BagWriter(folder, **options) as bag:
        bag.add_topic("/image", IMAGE, [Qos(reliable=False)])
        bag.add_topic("/labels", LABELS, [Qos(transient_local=True, depth=1)])
        for k in range(20):
            bag.write("/image", IMAGE, 10**9 * (100 + k), image(k, k), 10**9 * (100 + k) - 5)
            bag.write("/text", STRING, 10**9 * (100 + k) + 1, string(f"number {k}"))
    return bag


def test_rosbags_and_mcap_read_every_message_with_its_times_type_and_qos(tmp_path):
    fill(tmp_path / "bag")
    with Reader(tmp_path / "bag") as reader:
        by_topic = {connection.topic: connection for connection in reader.connections}
        assert {name: c.msgcount for name, c in by_topic.items()} == {"/image": 20, "/labels": 0, "/text": 20}
        (offered,) = by_topic["/labels"].ext.offered_qos_profiles
        assert (offered.durability, offered.depth) == (QosDurability.TRANSIENT_LOCAL, 1)
        (offered,) = by_topic["/image"].ext.offered_qos_profiles
        assert offered.reliability == QosReliability.BEST_EFFORT
        texts = [typestore().deserialize_cdr(raw, STRING).data for c, _, raw in reader.messages() if c.topic == "/text"]
        assert texts == [f"number {k}" for k in range(20)]
    with (tmp_path / "bag" / "bag_0.mcap").open("rb") as stream:
        reader = make_reader(stream)
        schemas = {schema.name: schema for schema in reader.get_summary().schemas.values()}
        assert schemas[IMAGE].encoding == "ros2msg"
        assert b"MSG: std_msgs/Header" in schemas[IMAGE].data
        first = next(iter(reader.iter_messages("/image")))[2]
        assert (first.log_time, first.publish_time) == (100 * 10**9, 100 * 10**9 - 5)
        assert {len(channel.metadata) for channel in reader.get_summary().channels.values()} == {1}


def test_the_same_calls_give_the_same_bytes(tmp_path):
    for parent in ("one", "two"):
        fill(tmp_path / parent / "bag")
    files = sorted(path.name for path in (tmp_path / "one" / "bag").iterdir())
    assert files == ["bag_0.mcap", "metadata.yaml"]
    for name in files:
        assert (tmp_path / "one/bag" / name).read_bytes() == (tmp_path / "two/bag" / name).read_bytes(), name


def test_a_split_bag_is_one_bag(tmp_path):
    # A chunk goes to the file when a mebibyte is full, so files are a little larger than asked for.
    big = image(7, 7, side=512)
    with BagWriter(tmp_path / "bag", split_bytes=3 << 20) as bag:
        for k in range(10):
            bag.write("/image", IMAGE, k, big)
    assert len(bag.files) > 1
    with Reader(tmp_path / "bag") as reader:
        assert [log_ns for _, log_ns, _ in reader.messages()] == list(range(10))
    told = yaml.safe_load((tmp_path / "bag/metadata.yaml").read_text())["rosbag2_bagfile_information"]
    assert told["relative_file_paths"] == bag.files
    assert sum(file["message_count"] for file in told["files"]) == 10
    assert bag.bytes_written == sum((tmp_path / "bag" / name).stat().st_size for name in bag.files)


def test_only_the_user_can_read_it_and_nothing_is_overwritten(tmp_path):
    fill(tmp_path / "bag")
    assert stat.S_IMODE((tmp_path / "bag").stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "bag").iterdir()} == {0o600}
    before = (tmp_path / "bag/bag_0.mcap").read_bytes()
    with pytest.raises(ValueError, match="is there already"):
        BagWriter(tmp_path / "bag")
    assert (tmp_path / "bag/bag_0.mcap").read_bytes() == before


def test_wrong_types_are_refused(tmp_path):
    with BagWriter(tmp_path / "bag") as bag:
        bag.write("/text", STRING, 1, string("a"))
        with pytest.raises(ValueError, match="holds std_msgs/msg/String already"):
            bag.add_topic("/text", IMAGE)
        with pytest.raises(ValueError, match="no_such_msgs/msg/Thing is not known"):
            bag.write("/thing", "no_such_msgs/msg/Thing", 2, b"")
    with Reader(tmp_path / "bag") as reader:
        assert reader.message_count == 1


def test_definitions_hold_the_types_inside():
    text = definition_of("surg_perception_msgs/msg/QuestionAnswer")
    assert "string question" in text
    assert "MSG: builtin_interfaces/Time" in text


def test_types_of_sourced_workspaces_are_found_with_those_inside(tmp_path, monkeypatch):
    for name, text in (("Outer", "std_msgs/Header header\nInner[] parts\nfloat64[3] at"), ("Inner", "string word")):
        file = tmp_path / "prefix/share/arm_msgs/msg" / f"{name}.msg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.setenv("AMENT_PREFIX_PATH", f"/nowhere:{tmp_path / 'prefix'}")
    text = definition_of("arm_msgs/msg/Outer")
    assert "Inner[] parts" in text
    for inside in ("MSG: arm_msgs/Inner\nstring word", "MSG: std_msgs/Header", "MSG: builtin_interfaces/Time"):
        assert inside in text
    with BagWriter(tmp_path / "bag") as bag:
        bag.write("/arm", "arm_msgs/msg/Outer", 1, b"\x00\x01\x00\x00")
    with Reader(tmp_path / "bag") as reader:
        assert reader.connections[0].msgdef.data == text


KILLED = """
import sys, time
from pathlib import Path
sys.path.insert(0, {folder!r})
from test_bag_writer import IMAGE, STRING, BagWriter, image, string
bag = BagWriter(Path({bag!r}), split_bytes=3 << 20)
for k in range(13):
    bag.write("/image", IMAGE, k * 10**9, image(k % 256, k, side=512))
    bag.write("/text", STRING, k * 10**9 + 1, string(f"number {{k}}"))
bag.flush()
print("flushed", flush=True)
time.sleep(1000)
"""


def test_after_sigkill_everything_up_to_the_last_flush_can_be_read(tmp_path):
    program = textwrap.dedent(KILLED.format(folder=str(Path(__file__).parent), bag=str(tmp_path / "bag")))
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=os.environ.copy()
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "flushed\n"
    process.send_signal(signal.SIGKILL)
    process.wait()

    told = yaml.safe_load((tmp_path / "bag/metadata.yaml").read_text())["rosbag2_bagfile_information"]
    names = told["relative_file_paths"]
    assert len(names) > 1
    assert {topic["topic_metadata"]["name"] for topic in told["topics_with_message_count"]} == {"/image", "/text"}
    seen: list[int] = []
    for name in names:
        unfinished = suppress(McapError) if name == names[-1] else nullcontext()
        with (tmp_path / "bag" / name).open("rb") as stream, unfinished:
            for _, channel, message in NonSeekingReader(stream).iter_messages(log_time_order=False):
                if channel.topic == "/text":
                    seen.append(message.log_time // 10**9)
    assert seen == list(range(13))
    with BagReader(tmp_path / "bag") as bag:
        assert [picture.stamp_ns // 10**9 for picture in bag.images()] == list(range(13))
    with Reader(tmp_path / "bag" / names[0]) as reader:  # a file that was finished needs no recovery
        assert reader.message_count > 0
