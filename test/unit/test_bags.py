# SPDX-License-Identifier: Apache-2.0
"""Bags of all kinds, whole and broken: which images come, and what is said about the rest."""

from __future__ import annotations

import itertools
import os
import shutil
import sqlite3
import struct
import tempfile
import tracemalloc
from pathlib import Path

import bag_files
import numpy as np
import pytest
import yaml
from bag_files import START_NS, STEP_NS, cut, flip, image_message, image_messages, pictures, stamps_of, string_message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mcap.reader import make_reader
from mcap.writer import CompressionType

from surg_perception.data import bag_storage
from surg_perception.data.bag_storage import Block, Channel, Record, in_log_order
from surg_perception.data.bags import BagError, BagReader
from surg_perception.data.ros_types import typestore
from surg_perception.stream.image_decode import ImageError, decode_image

FRAMES = pictures(10)
EVERY_KIND = [
    (storage, compression, encoding)
    for storage, compression in [
        *itertools.product(("mcap", "sqlite3"), ("", "file", "message")),
        ("mcap", "chunk"),
    ]
    for encoding in ("bgr8", "png")
]


def read(path, topic=""):
    """Images, and the problems by their kind."""
    with BagReader(path, topic) as bag:
        images = list(bag.images())
        problems = {problem.kind: problem for problem in bag.problems}
    assert len(problems) == len(bag.problems)
    for problem in problems.values():
        assert "\n" not in problem.text
        assert "{" not in problem.text
    return images, problems


def numbers(images, frames=FRAMES):
    """Which of the frames the images are; -1: none of them."""
    known = {frame.tobytes(): number for number, frame in enumerate(frames)}
    return [known.get(decode_image(image.message).tobytes(), -1) for image in images]


def fails(path, topic=""):
    with pytest.raises(BagError) as error:
        BagReader(path, topic)
    assert "\n" not in str(error.value)
    return str(error.value)


def snapshot(folder):
    """All files below the folder, their bytes and times."""
    files = sorted(file for file in Path(folder).rglob("*") if file.is_file())
    return [(file, file.stat().st_mtime_ns, file.read_bytes()) for file in files]


def only_file(folder, pattern):
    (file,) = Path(folder).glob(pattern)
    return file


def get_summary(path):
    with path.open("rb") as file:
        return make_reader(file).get_summary()


# --- Whole bags ---


@pytest.mark.parametrize(("storage", "compression", "encoding"), EVERY_KIND)
def test_every_kind_gives_the_same_images(tmp_path, storage, compression, encoding):
    path = bag_files.write_bag(tmp_path / "bag", FRAMES, "/cam", storage, compression, encoding)
    before = snapshot(tmp_path)
    with BagReader(path) as bag:
        assert (bag.storage, bag.topic, bag.count) == (storage, "/cam", 10)
        assert bag.msgtype == (bag_files.IMAGE if encoding == "bgr8" else bag_files.COMPRESSED)
        assert [(topic.name, topic.count) for topic in bag.topics] == [("/cam", 10)]
        assert bag.duration_s == pytest.approx(0.36)
        images = list(bag.images())
        assert bag.problems == ()
        assert [decode_image(image.message).tolist() for image in bag.images()] == [frame.tolist() for frame in FRAMES]
    assert numbers(images) == list(range(10))
    assert [image.stamp_ns for image in images] == [image.log_ns for image in images] == stamps_of(10)
    assert {image.topic for image in images} == {"/cam"}
    assert images[3].raw == bag_files.cdr(images[3].message)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("compression", list(CompressionType))
@pytest.mark.parametrize(("chunks", "index"), [(True, True), (True, False), (False, True), (False, False)])
def test_mcap_of_other_recorders(tmp_path, compression, chunks, index):
    messages = [("/talk", string_message("hello"), START_NS), *image_messages(FRAMES)]
    path = bag_files.write_mcap(
        tmp_path / "a.mcap", messages, compression=compression, use_chunking=chunks, index=index, profile=""
    )
    with BagReader(path) as bag:
        assert bag.count == 10
        assert numbers(bag.images()) == list(range(10))
        assert bag.problems == ()
        assert list(bag.messages(["/talk"])) == [
            ("/talk", bag_files.STRING, START_NS, bag_files.cdr(string_message("hello")))
        ]


@pytest.mark.parametrize(
    ("encoding", "spelling"),
    [
        ("ros2idl", str),
        ("omgidl", lambda name: name.replace("/msg/", "::msg::dds_::") + "_"),
        ("ros2msg", lambda name: name.replace("/msg", "")),
        ("", str),
    ],
)
def test_schemas_of_other_recorders(tmp_path, encoding, spelling):
    path = bag_files.write_mcap(
        tmp_path / "a.mcap", image_messages(FRAMES), schema_encoding=encoding, spelling=spelling
    )
    with BagReader(path) as bag:
        assert bag.msgtype == bag_files.IMAGE
        assert numbers(bag.images()) == list(range(10))


@pytest.mark.parametrize(("schema", "index"), itertools.product((1, 2), (True, False)))
def test_database_alone(tmp_path, schema, index):
    bag_files.write_database(tmp_path / "a.db3", image_messages(FRAMES), schema=schema, index=index).close()
    images, problems = read(tmp_path / "a.db3")
    assert numbers(images) == list(range(10))
    assert not problems
    assert set(read(tmp_path)[1]) == {"metadata"}  # as a folder, it lacks its metadata.yaml


@pytest.mark.parametrize("version", range(1, 10))
def test_metadata_of_all_versions(tmp_path, version):
    path = bag_files.write_bag(tmp_path / "bag", FRAMES, storage="sqlite3")
    file = path / "metadata.yaml"
    content = yaml.safe_load(file.read_text())
    bag = content["rosbag2_bagfile_information"]
    bag["version"] = version
    if version < 4:
        bag["relative_file_paths"] = [f"bag/{name}" for name in bag["relative_file_paths"]]
    for first, key in ((5, "files"), (6, "custom_data"), (8, "ros_distro"), (3, "compression_mode")):
        if version < first:
            bag.pop(key, None)
    file.write_text(yaml.safe_dump(content))
    images, problems = read(path)
    assert numbers(images) == list(range(10))
    assert not problems
    assert numbers(read(file)[0]) == list(range(10))


@pytest.mark.parametrize("compression", ["", "file"])
def test_split_files_come_in_order_of_time(tmp_path, compression):
    folder = tmp_path / "bag"
    folder.mkdir()
    for number in range(12):
        stamps = [START_NS + STEP_NS * number]
        part = bag_files.write_bag(
            tmp_path / f"p{number}", [FRAMES[number % 10]], compression=compression, stamps_ns=stamps
        )
        shutil.copy(only_file(part, "*.mcap*"), folder / f"bag_{number}.mcap{'.zstd' * bool(compression)}")
    images, problems = read(folder)
    assert [image.stamp_ns for image in images] == stamps_of(12)
    assert set(problems) == {"metadata"}


@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
def test_files_of_the_same_time_come_by_their_numbers(tmp_path, storage):
    folder = tmp_path / "bag"
    folder.mkdir()
    for number in (10, 9):
        part = bag_files.write_bag(tmp_path / str(number), FRAMES[:1] * 2, storage=storage, stamps_ns=[START_NS] * 2)
        file = next(file for file in part.iterdir() if file.name != "metadata.yaml")
        shutil.copy(file, folder / f"bag_{number}{file.suffix}")
    with BagReader(folder) as bag:
        assert [file.path.stem for file in bag._files] == ["bag_9", "bag_10"]
        assert len(list(bag.images())) == 4


def test_file_compression_is_told_by_content(tmp_path):
    path = bag_files.write_bag(tmp_path / "bag", FRAMES, storage="sqlite3", compression="file")
    packed = only_file(path, "*.zstd")
    assert numbers(read(packed)[0]) == list(range(10))
    packed.rename(path / "other.db3")
    assert numbers(read(path / "other.db3")[0]) == list(range(10))


@pytest.mark.parametrize("encoding", ["bgr8", "png"])
def test_ros1(tmp_path, encoding):
    path = bag_files.write_ros1(tmp_path / "a.bag", FRAMES, encoding=encoding)
    with BagReader(path) as bag:
        assert (bag.storage, bag.count) == ("ros1", 10)
        images = list(bag.images())
        assert bag.duration_s == pytest.approx(0.36, abs=1e-6)
    assert numbers(images) == list(range(10))
    assert [image.stamp_ns for image in images] == stamps_of(10)
    cut(path, path.stat().st_size // 2)
    assert "reindex" in fails(path)


def test_own_messages_are_known():
    types = typestore().types
    phase = "surg_perception_msgs/msg/SurgicalPhase"
    assert {phase, "surg_perception_msgs/srv/Ask_Request", "surg_perception_msgs/action/Answer_Feedback"} <= set(types)
    labels = types["surg_perception_msgs/msg/PhaseLabels"](
        model_id="m", labels=["a", "b"], latent_shape=np.array([384], np.uint32), backend="", licence="",
        intended_use="", card="",
    )  # fmt: skip
    assert typestore().deserialize_cdr(bag_files.cdr(labels), labels.__msgtype__).labels == ["a", "b"]


# --- Which topic ---


def test_two_cameras_must_be_told_apart(tmp_path):
    messages = sorted(
        [*image_messages(FRAMES, "/left"), *image_messages(FRAMES[:4], "/right", "png")], key=lambda item: item[2]
    )
    path = bag_files.write_messages(tmp_path / "bag", messages)
    error = fails(path)
    assert "/left (sensor_msgs/msg/Image, 10 messages)" in error
    assert "/right (sensor_msgs/msg/CompressedImage, 4 messages)" in error
    assert numbers(read(path, "/right")[0]) == [0, 1, 2, 3]
    assert numbers(read(path, "left")[0]) == list(range(10))  # the slash may be left out
    assert "/left" in fails(path, "/middle")


def test_wrong_and_missing_topics(tmp_path):
    talk = [("/talk", string_message("hello"), START_NS)]
    error = fails(bag_files.write_messages(tmp_path / "both", [*talk, *image_messages(FRAMES)]), "/talk")
    assert "std_msgs/msg/String" in error
    assert "/image" in error
    error = fails(bag_files.write_messages(tmp_path / "none", talk))
    assert "holds no image" in error
    assert "/talk (std_msgs/msg/String, 1 message)" in error
    assert "its topics: none" in fails(bag_files.write_messages(tmp_path / "empty", []))
    # A camera that was announced and sent nothing.
    path = tmp_path / "a.db3"
    connection = bag_files.write_database(path, image_messages(FRAMES[:1]))
    connection.execute("DELETE FROM messages")
    connection.commit()
    connection.close()
    assert "holds no image" in fails(path)
    assert "no message" in fails(path, "/image")


def test_other_encodings_are_named(tmp_path):
    path = bag_files.write_mcap(tmp_path / "a.mcap", image_messages(FRAMES), message_encoding="protobuf")
    assert "protobuf" in fails(path, "/image")
    assert "holds no image" in fails(path)
    bag_files.write_database(tmp_path / "a.db3", image_messages(FRAMES), encoding="json").close()
    assert "json" in fails(tmp_path / "a.db3", "/image")


def test_topics_of_unknown_types_do_not_matter(tmp_path):
    exotic = string_message("x")
    messages = [("/exotic", exotic, START_NS), *image_messages(FRAMES)]
    path = bag_files.write_mcap(
        tmp_path / "a.mcap",
        messages,
        spelling=lambda name: name if "Image" in name else "vendor_msgs/msg/Unheard",
        schema_encoding="no such language",
    )
    with BagReader(path) as bag:
        assert numbers(bag.images()) == list(range(10))
        assert (bag.topics[0].name, bag.topics[0].type) == ("/exotic", "vendor_msgs/msg/Unheard")
        assert [raw for *_, raw in bag.messages(["/exotic"])] == [bag_files.cdr(exotic)]
        assert bag.problems == ()


def test_two_types_on_one_topic(tmp_path):
    messages = [*image_messages(FRAMES), *image_messages(FRAMES[:3], encoding="png")]
    images, problems = read(bag_files.write_messages(tmp_path / "bag", messages))
    assert numbers(images) == list(range(10))
    assert "3 of sensor_msgs/msg/CompressedImage" in problems["mixed_types"].text


# --- Stamps and order ---


def test_images_come_by_log_time(tmp_path):
    stamps = [START_NS + STEP_NS * number for number in (3, 1, 2, 0, 9, 8, 7, 6, 5, 4)]
    for chunk_size in (1, 4000, 1 << 20):
        for chunks in (True, False):
            messages = image_messages(FRAMES, stamps_ns=stamps)
            path = bag_files.write_mcap(tmp_path / "a.mcap", messages, chunk_size=chunk_size, use_chunking=chunks)
            images, problems = read(path)
            assert numbers(images) == [3, 1, 2, 0, 9, 8, 7, 6, 5, 4]
            assert not problems
    images, _ = read(bag_files.write_bag(tmp_path / "bag", FRAMES, storage="sqlite3", stamps_ns=stamps))
    assert numbers(images) == [3, 1, 2, 0, 9, 8, 7, 6, 5, 4]


@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
def test_equal_log_times_keep_the_order_of_the_file(tmp_path, storage):
    path = bag_files.write_bag(tmp_path / "bag", FRAMES, storage=storage, stamps_ns=[START_NS] * 10)
    images, problems = read(path)
    assert numbers(images) == list(range(10))
    assert problems["duplicate_stamp"].count == 9


def with_stamps(path, steps, log_steps=None):
    """A bag whose images have these distances of stamps and log times, in seconds."""
    log_steps = [0.04] * len(steps) if log_steps is None else log_steps
    stamp, log, messages = START_NS, START_NS, []
    for frame, step, log_step in zip(itertools.cycle(FRAMES), steps, log_steps, strict=False):
        stamp, log = stamp + round(step * 1e9), log + round(log_step * 1e9)
        messages.append(("/image", image_message(frame, stamp), log))
    return bag_files.write_messages(path, messages)


@pytest.mark.parametrize(
    ("steps", "log_steps", "kind", "count", "text"),
    [
        ([0.04] * 3 + [0.0, 0.0] + [0.04] * 3, None, "duplicate_stamp", 2, "one before, first image 4"),
        ([0.04] * 3 + [-0.02] + [0.04] * 3, None, "stamp_back", 1, "before, first image 4, by 0.020 s"),
        ([0.04] * 3 + [3600.0] + [0.04] * 3, None, "stamp_jump", 1, "stamps, first at image 4, by 3600.000 s"),
        ([0.04] * 3 + [7.0] + [0.04] * 3, [0.04] * 3 + [7.0] + [0.04] * 3, "gap", 1, "first before image 4, 7.000 s"),
    ],
)
def test_odd_stamps_are_told_and_their_images_used(tmp_path, steps, log_steps, kind, count, text):
    images, problems = read(with_stamps(tmp_path / "bag", steps, log_steps))
    assert len(images) == len(steps)
    assert [image.log_ns for image in images] == sorted(image.log_ns for image in images)
    assert set(problems) == {kind}
    assert text in problems[kind].text
    assert problems[kind].count == count


def test_a_slow_camera_has_no_gaps(tmp_path):
    steps = [2.0, 2.1, 1.9] * 5
    assert not read(with_stamps(tmp_path / "bag", steps, steps))[1]


def test_images_without_or_with_impossible_stamps(tmp_path):
    messages = image_messages(FRAMES)
    for number in (2, 3):
        messages[number][1].header.stamp.sec = messages[number][1].header.stamp.nanosec = 0
    messages[5][1].header.stamp.nanosec = 4_000_000_000
    messages[6][1].header.stamp.sec = -1
    images, problems = read(bag_files.write_messages(tmp_path / "bag", messages))
    assert numbers(images) == list(range(10))
    assert [image.stamp_ns for image in images[2:4]] == [0, 0]
    assert {kind: problem.count for kind, problem in problems.items()} == {"zero_stamp": 2, "invalid_stamp": 2}


def test_reading_again_tells_the_same(tmp_path):
    path = with_stamps(tmp_path / "bag", [0.04, 0.0, 0.0, -1.0, 0.04])
    flip(only_file(path, "*.mcap"), 3000)
    with BagReader(path) as bag:
        list(bag.images())
        first = bag.problems
        list(bag.images())
        assert bag.problems == first


def test_changes_of_size_and_encoding(tmp_path):
    frames = [*FRAMES[:4], *pictures(2, 16, 20)]
    messages = [
        *image_messages(frames),
        ("/image", image_message(FRAMES[0], START_NS + 6 * STEP_NS, "rgb8"), START_NS + 6 * STEP_NS),
    ]
    images, problems = read(bag_files.write_messages(tmp_path / "bag", messages))
    assert len(images) == 7
    assert problems["changed"].count == 2
    assert "first at image 5, now 20x16 bgr8" in problems["changed"].text


# --- Messages that are broken ---


@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
def test_broken_messages_are_counted_and_passed_over(tmp_path, storage):
    path = tmp_path / f"a.{'mcap' if storage == 'mcap' else 'db3'}"
    messages = image_messages(FRAMES)
    raws = [bag_files.cdr(message) for _, message, _ in messages]
    raws[2], raws[4], raws[5], raws[6], raws[7] = (
        raws[2][: len(raws[2]) // 2],
        b"",
        raws[5][:11],
        bytes(40),
        b"\xff" * 99,
    )
    if storage == "mcap":
        taken = iter(raws)
        bag_files.write_mcap(path, messages, serialise=lambda _: next(taken))
    else:
        connection = bag_files.write_database(path, messages)
        for row, raw in enumerate(raws, 1):
            connection.execute("UPDATE messages SET data = ? WHERE id = ?", (raw, row))
        connection.commit()
        connection.close()
    images, problems = read(path)
    assert numbers(images) == [0, 1, 3, 8, 9]
    assert set(problems) == {"message"}
    assert problems["message"].count == 5
    assert "first image 3" in problems["message"].text


def test_an_image_that_lies_about_its_size_goes_on_to_the_decoder(tmp_path):
    messages = image_messages(FRAMES[:3])
    short = messages[1][1]
    short.width, short.height, short.step, short.data = 640, 480, 1920, np.zeros(30, np.uint8)
    images, _ = read(bag_files.write_messages(tmp_path / "a", messages))
    assert len(images) == 3
    with pytest.raises(ImageError, match="data has 30 bytes"):
        decode_image(images[1].message)

    messages = image_messages(FRAMES[:3], encoding="jpeg")
    messages[1][1].data = np.zeros(10, np.uint8)
    images, problems = read(bag_files.write_messages(tmp_path / "b", messages))
    assert (len(images), problems) == (3, {})
    with pytest.raises(ImageError):
        decode_image(images[1].message)


def test_message_compression_of_a_damaged_message(tmp_path):
    path = bag_files.write_bag(tmp_path / "bag", FRAMES, storage="sqlite3", compression="message")
    connection = sqlite3.connect(only_file(path, "*.db3"))
    connection.execute("UPDATE messages SET data = substr(data, 1, 100) WHERE id = 3")
    connection.commit()
    connection.close()
    images, problems = read(path)
    assert numbers(images) == [0, 1, *range(3, 10)]
    assert "zstd" in problems["message"].text


# --- Folders that lie ---


def test_metadata_that_lies(tmp_path):
    path = bag_files.write_bag(tmp_path / "bag", FRAMES)
    file = path / "metadata.yaml"
    content = yaml.safe_load(file.read_text())
    bag = content["rosbag2_bagfile_information"]
    bag["topics_with_message_count"][0]["message_count"] = 99
    file.write_text(yaml.safe_dump(content))
    images, problems = read(path)
    assert numbers(images) == list(range(10))
    assert "claims 99 messages of /image, there are 10" in problems["counts"].text

    bag["topics_with_message_count"][0]["message_count"] = 10
    bag["relative_file_paths"].append("bag_7.mcap")
    file.write_text(yaml.safe_dump(content))
    images, problems = read(path)
    assert numbers(images) == list(range(10))
    assert set(problems) == {"missing_file"}
    assert "names bag_7.mcap, which is not there" in problems["missing_file"].text

    bag["relative_file_paths"] = ["bag_7.mcap"]
    file.write_text(yaml.safe_dump(content))
    images, problems = read(path)
    assert numbers(images) == list(range(10))
    assert set(problems) == {"missing_file", "extra_file"}


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "[1, 2",
        "rosbag2_bagfile_information: 7",
        "a: &x [*x]",
        "\x00\xff",
        "rosbag2_bagfile_information: {relative_file_paths: 3}",
    ],
)
def test_metadata_missing_or_garbage(tmp_path, text):
    path = bag_files.write_bag(tmp_path / "bag", FRAMES)
    (path / "metadata.yaml").unlink()
    if text is not None:
        (path / "metadata.yaml").write_text(text, "latin-1")
    images, problems = read(path)
    assert numbers(images) == list(range(10))
    assert set(problems) == {"metadata"}


def test_one_unreadable_file_of_several(tmp_path):
    path = bag_files.write_bag(tmp_path / "bag", FRAMES)
    (path / "z.mcap").write_bytes(b"garbage, and more of it")
    (path / "zz.mcap").write_bytes(b"")
    images, problems = read(path)
    assert numbers(images) == list(range(10))
    assert problems["unreadable_file"].count == 2


def test_both_storages_in_one_folder(tmp_path):
    path = bag_files.write_bag(tmp_path / "bag", FRAMES)
    shutil.copy(only_file(bag_files.write_bag(tmp_path / "other", FRAMES, storage="sqlite3"), "*.db3"), path)
    assert "name one of the files" in fails(path)
    assert numbers(read(only_file(path, "*.mcap"))[0]) == list(range(10))


def test_an_unfinished_packed_file_beside_the_plain_one(tmp_path):
    path = bag_files.write_bag(tmp_path / "bag", FRAMES)
    (path / "bag.mcap.zstd").write_bytes(b"\x28\xb5\x2f\xfd")
    images, problems = read(path)
    assert numbers(images) == list(range(10))
    assert not problems


def test_nothing_to_read(tmp_path):
    assert "does not exist" in fails(tmp_path / "nowhere")
    assert "holds no bag" in fails(tmp_path)
    bag_files.write_bag(tmp_path / "inner", FRAMES)
    assert "it has the folder inner" in fails(tmp_path)
    for name, data, text in [
        ("a.mcap", b"", "has no bytes"),
        ("b.mcap", np.random.default_rng(1).bytes(5000), "is no bag"),
        ("c.db3", b"SQLite format 3\x00" + bytes(200), "no rosbag2 database"),
        ("d.db3", b"hello", "is no bag"),
        ("e.mcap.zstd", b"\x28\xb5\x2f\xfd", "has no bytes"),
        ("f.bag", b"#ROSBAG V2.0\n", "reindex"),
        ("g.mcap", b"\x89MCAP0\r\n", "holds no image"),
    ]:
        (tmp_path / name).write_bytes(data)
        assert text in fails(tmp_path / name)
    sqlite3.connect(tmp_path / "h.db3").execute("CREATE TABLE cats(name)").connection.close()
    assert "no rosbag2 database" in fails(tmp_path / "h.db3")


# --- Files that are cut, damaged or still written ---


@pytest.mark.parametrize("compression", list(CompressionType))
@pytest.mark.parametrize("chunks", [True, False])
@pytest.mark.parametrize("index", [True, False])
def test_cut_mcap_gives_all_before_the_cut(tmp_path, compression, chunks, index):
    path = tmp_path / "a.mcap"
    messages = image_messages(FRAMES)
    options = {"compression": compression, "use_chunking": chunks, "index": index, "chunk_size": 4000}
    bag_files.write_mcap(path, messages, **options)
    whole = path.read_bytes()
    # Where each image ends in the file, from the outside: the position after which its bytes are all there.
    last = 0
    for length in range(len(whole) - 100, 600, -997):
        path.write_bytes(whole[:length])
        try:
            images, problems = read(path)
        except BagError:
            assert length < 6000
            continue
        found = numbers(images)
        assert found == list(range(len(found)))
        # Noise does not compress: each image takes 2.3 kB, and a chunk holds two.
        assert len(found) >= min(10, length // 2400 - 2)
        assert "unfinished" in problems
        last = max(last, len(found))
    assert last >= 9


def test_the_part_of_a_cut_chunk_that_is_there_is_read(tmp_path):
    frames = pictures(120)
    # LZ4 and zstd unpack whole blocks of 64 and 128 kB, an image takes 2.3 kB.
    for compression, least in ((CompressionType.NONE, 82), (CompressionType.LZ4, 80), (CompressionType.ZSTD, 50)):
        path = tmp_path / "a.mcap"
        bag_files.write_mcap(path, image_messages(frames), compression=compression, chunk_size=1 << 20)
        cut(path, 200_000)
        with BagReader(path) as bag:
            found = numbers(bag.images(), frames)
            assert bag.count == len(found)
            assert "read up to byte 200000 of 200000" in bag.problems[0].text
        assert found == list(range(len(found)))
        assert least <= len(found) <= 87


def test_a_damaged_chunk_is_passed_over(tmp_path):
    path = bag_files.write_mcap(tmp_path / "a.mcap", image_messages(FRAMES), chunk_size=4000)
    whole = path.read_bytes()
    chunks = list(get_summary(path).chunk_indexes)
    assert len(chunks) == 5
    for number, chunk in enumerate(chunks):
        path.write_bytes(whole)
        flip(path, chunk.chunk_start_offset + chunk.chunk_length - 1000)
        images, problems = read(path)
        assert numbers(images) == [n for n in range(10) if n // 2 != number]
        assert set(problems) == {"damaged"}
        assert "checksum" in problems["damaged"].text


def test_a_damaged_length_is_stepped_over_by_the_index(tmp_path):
    path = bag_files.write_mcap(tmp_path / "a.mcap", image_messages(FRAMES), chunk_size=4000)
    whole = path.read_bytes()
    start = get_summary(path).chunk_indexes[1].chunk_start_offset
    for position in (start, start + 8, start + 4):  # opcode; length beyond all; length beyond the file's end
        path.write_bytes(whole)
        flip(path, position, 0x06 if position == start else 0x7F)
        images, problems = read(path)
        assert numbers(images) == [0, 1, 4, 5, 6, 7, 8, 9]
        assert "bytes skipped" in problems["damaged"].text


def test_a_damaged_index_is_not_believed(tmp_path):
    path = bag_files.write_mcap(tmp_path / "a.mcap", image_messages(FRAMES), chunk_size=4000)
    flip(path, path.stat().st_size - 300)
    images, problems = read(path)
    assert numbers(images) == list(range(10))
    assert set(problems) == {"damaged_index"}


def test_zeros_after_a_crash_end_the_file(tmp_path):
    path = bag_files.write_mcap(tmp_path / "a.mcap", image_messages(FRAMES), finish=False, chunk_size=4000)
    path.write_bytes(path.read_bytes() + bytes(10_000_000))
    images, problems = read(path)
    assert numbers(images) == list(range(len(images)))
    assert len(images) >= 8
    assert set(problems) == {"unfinished"}


def test_an_unknown_compression_is_named(tmp_path):
    path = bag_files.write_mcap(tmp_path / "a.mcap", image_messages(FRAMES), compression=CompressionType.LZ4)
    path.write_bytes(path.read_bytes().replace(b"\x03\x00\x00\x00lz4", b"\x03\x00\x00\x00br7"))
    assert "'br7' is unknown" in fails(path)


@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
def test_cut_packed_file(tmp_path, storage):
    path = bag_files.write_bag(tmp_path / "bag", pictures(200), storage=storage, compression="file")
    file = only_file(path, "*.zstd")
    cut(file, file.stat().st_size * 2 // 3)
    images, problems = read(path)
    assert numbers(images, pictures(200)) == list(range(len(images)))
    assert len(images) > (80 if storage == "mcap" else 60)
    assert "cut or damaged" in problems["cut_packed_file"].text


def test_database_with_a_journal_is_read_with_it(tmp_path):
    folder = tmp_path / "bag"
    folder.mkdir()
    connection = bag_files.write_database(folder / "bag_0.db3", image_messages(FRAMES), journal="wal")
    before = snapshot(folder)
    assert any(file.name.endswith("-wal") for file, *_ in before)
    images, problems = read(folder)
    assert numbers(images) == list(range(10))
    assert set(problems) == {"metadata", "unfinished"}
    assert snapshot(folder) == before
    # The recorder goes on, unharmed.
    connection.execute("DELETE FROM messages WHERE id > 5")
    connection.commit()
    assert numbers(read(folder)[0]) == list(range(5))
    connection.close()


def test_nothing_is_made_beside_a_database_while_it_is_read(tmp_path):
    bag_files.write_database(tmp_path / "a.db3", image_messages(FRAMES), journal="wal").close()
    with BagReader(tmp_path / "a.db3") as bag:
        for _ in bag.images():
            assert [file.name for file in tmp_path.iterdir()] == ["a.db3"]


def test_database_whose_recorder_was_killed_within_a_transaction(tmp_path):
    connection = bag_files.write_database(tmp_path / "live.db3", image_messages(FRAMES))
    connection.execute("PRAGMA cache_size = 1")
    connection.execute(
        "UPDATE messages SET data = zeroblob(2000)"
    )  # spills into the file, the old pages in the journal
    folder = tmp_path / "bag"
    folder.mkdir()
    for suffix in ("", "-journal"):
        shutil.copy(tmp_path / f"live.db3{suffix}", folder / f"bag_0.db3{suffix}")
    connection.rollback()
    connection.close()
    before = snapshot(folder)
    images, problems = read(folder)
    assert numbers(images) == list(range(10))
    assert "unfinished" in problems
    assert snapshot(folder) == before


def test_a_journal_cannot_have_another_file_deleted(tmp_path):
    connection = bag_files.write_database(tmp_path / "live.db3", image_messages(FRAMES))
    connection.execute("PRAGMA cache_size = 1")
    connection.execute("UPDATE messages SET data = zeroblob(2000)")
    folder = tmp_path / "bag"
    folder.mkdir()
    for suffix in ("", "-journal"):
        shutil.copy(tmp_path / f"live.db3{suffix}", folder / f"bag_0.db3{suffix}")
    connection.rollback()
    connection.close()
    victim = tmp_path / "thesis.tex"
    victim.write_text("all of it")
    # How SQLite names the super-journal of several databases, which it deletes once their journals are gone.
    name = str(victim).encode()
    with (folder / "bag_0.db3-journal").open("ab") as journal:
        journal.write(struct.pack(">I", (1 << 30) // 4096 + 1) + name + struct.pack(">II", len(name), sum(name)))
        journal.write(bytes.fromhex("d9d505f920a163d7"))
    assert numbers(read(folder)[0]) == list(range(10))
    assert victim.exists()


def test_a_database_that_computes_its_messages_is_refused(tmp_path):
    path = tmp_path / "a.db3"
    connection = bag_files.write_database(path, image_messages(FRAMES))
    connection.executescript(
        "DROP TABLE messages; CREATE VIEW messages AS WITH RECURSIVE n(id) AS (SELECT 1 UNION ALL SELECT id + 1 FROM n)"
        "SELECT id, 1 AS topic_id, id AS timestamp, x'00' AS data FROM n"
    )
    connection.close()
    assert "is no rosbag2 database" in fails(path)


def test_rows_with_a_time_before_1970_are_left_out(tmp_path):
    connection = bag_files.write_database(tmp_path / "a.db3", image_messages(FRAMES))
    connection.execute("UPDATE messages SET timestamp = -1 WHERE id = 3")
    connection.commit()
    connection.close()
    images, problems = read(tmp_path / "a.db3")
    assert numbers(images) == [0, 1, *range(3, 10)]
    assert "message 3 has no time" in problems["damaged"].text


def test_metadata_that_is_no_file_or_endless_is_told_and_not_waited_for(tmp_path):
    bag_files.write_database(tmp_path / "a.db3", image_messages(FRAMES)).close()
    os.mkfifo(tmp_path / "metadata.yaml")
    images, problems = read(tmp_path)
    assert len(images) == 10
    assert "is not readable" in problems["metadata"].text
    (tmp_path / "metadata.yaml").unlink()
    for content in (b"[" * 100_000, b"{a: " * 100_000):
        (tmp_path / "metadata.yaml").write_bytes(content)
        assert "is not readable" in read(tmp_path)[1]["metadata"].text


def test_names_cannot_break_the_line_or_steer_the_terminal(tmp_path):
    note = "/note\n\x1b[2J"
    path = bag_files.write_mcap(tmp_path / "a.mcap", [(note, string_message("x"), START_NS)])
    text = fails(path)
    assert "/note" in text
    assert text.isprintable()


def test_a_row_larger_than_any_message_is_damage(tmp_path, monkeypatch):
    bag_files.write_database(tmp_path / "a.db3", image_messages(FRAMES)).close()
    monkeypatch.setattr(bag_storage, "MAX_CHUNK_BYTES", 1000)
    images, problems = read(tmp_path / "a.db3")
    assert images == []
    assert "more than 1000" in problems["damaged"].text


@pytest.mark.parametrize("compression", ["BZ2", "LZ4"])
def test_chunks_of_ros1_are_unpacked_up_to_a_limit(tmp_path, monkeypatch, compression):
    path = bag_files.write_ros1(tmp_path / "a.bag", FRAMES, compression=compression)
    assert numbers(read(path)[0]) == list(range(10))
    monkeypatch.setattr(bag_storage, "MAX_CHUNK_BYTES", 5000)
    images, problems = read(path)
    assert images == []
    assert "more than 5000 bytes" in problems["damaged"].text


def test_an_index_longer_than_any_chunk_is_not_loaded(tmp_path, monkeypatch):
    path = bag_files.write_mcap(tmp_path / "a.mcap", image_messages(FRAMES))
    data = bytearray(path.read_bytes())
    struct.pack_into("<QQI", data, len(data) - 28, 8, 0, 0)
    path.write_bytes(data)
    monkeypatch.setattr(bag_storage, "MAX_CHUNK_BYTES", len(data) - 100)
    images, problems = read(path)
    assert numbers(images) == list(range(10))
    assert "damaged_index" in problems


def test_damaged_pages_of_a_database_cost_their_messages_only(tmp_path):
    frames = pictures(60)
    path = tmp_path / "a.db3"
    for index in (True, False):
        path.unlink(missing_ok=True)
        bag_files.write_database(path, image_messages(frames), index=index).close()
        data = path.read_bytes()
        start = data.index(frames[30].tobytes()) // 4096 * 4096
        path.write_bytes(data[:start] + b"\xaa" * 4096 + data[start + 4096 :])
        images, problems = read(path)
        found = numbers(images, frames)
        good = [number for number in found if number >= 0]
        assert good == sorted(good)
        assert set(range(60)) - set(good) <= set(range(28, 34))
        assert len(good) >= 55
        assert "damaged" in problems or "message" in problems or -1 in found


def test_cut_database_gives_all_before_the_cut(tmp_path):
    frames = pictures(60)
    path = tmp_path / "a.db3"
    bag_files.write_database(path, image_messages(frames)).close()
    size = path.stat().st_size
    for length in (size - 4096, size * 3 // 4, size // 2 + 100):
        cut(path, length)
        images, problems = read(path)
        found = numbers(images, frames)
        assert found == list(range(len(found)))
        assert len(found) >= 60 * length // size - 4
        assert "damaged" in problems


# --- Bounds ---


def test_overlapping_blocks_are_held_only_so_long():
    channel = Channel("/image", bag_files.IMAGE, "cdr")
    loaded = []

    def block(number):
        def load():
            loaded.append(number)
            return [Record(time, channel, bytes(100)) for time in range(number + 1, 1001, 10)]

        return Block(0, load)

    assert [record.log_ns for record in in_log_order([block(n) for n in range(10)])] == list(range(1, 1001))
    loaded.clear()
    records = in_log_order((block(n) for n in range(10)), max_held_bytes=5000)
    assert next(records).log_ns == 1
    assert loaded == [0]  # the next is not loaded before there is room
    assert len(list(records)) == 999


@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
def test_memory_does_not_grow_with_the_bag(tmp_path, storage):
    frame = pictures(1, 200, 200)[0]
    messages = image_messages([frame] * 400)
    if storage == "mcap":
        path = bag_files.write_mcap(tmp_path / "a.mcap", messages, chunk_size=1 << 20)
    else:
        path = tmp_path / "a.db3"
        bag_files.write_database(path, messages).close()
    assert path.stat().st_size > 48_000_000
    del messages
    with BagReader(path) as bag:
        next(bag.images())
        tracemalloc.start()
        assert sum(1 for _ in bag.images()) == 400
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 8_000_000


def test_what_was_unpacked_is_removed(tmp_path, monkeypatch):
    room = tmp_path / "room"
    room.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(room))
    path = bag_files.write_bag(tmp_path / "bag", FRAMES, compression="file")
    with BagReader(path) as bag:
        next(bag.images())
        (folder,) = room.iterdir()
        assert folder.stat().st_mode & 0o077 == 0
    assert not list(room.iterdir())
    flip(only_file(path, "*.zstd"), 60)
    with pytest.raises(BagError):
        BagReader(path, "/nothing")
    assert not list(room.iterdir())


@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
def test_packed_files_are_unpacked_when_their_time_comes(tmp_path, monkeypatch, storage):
    folder = tmp_path / "bag"
    folder.mkdir()
    for number in range(3):
        stamps = [START_NS + STEP_NS * (2 * number + k) for k in range(2)]
        part = bag_files.write_bag(tmp_path / f"p{number}", FRAMES[:2], "/image", storage, "file", stamps_ns=stamps)
        file = only_file(part, "*.zstd")
        shutil.copy(file, folder / f"bag_{number}{''.join(file.suffixes)}")
    asked = []
    unpacked = bag_storage.Workspace.unpacked
    with BagReader(folder) as bag:
        monkeypatch.setattr(
            bag_storage.Workspace,
            "unpacked",
            lambda self, source, problems: (asked.append(source.name[:5]), unpacked(self, source, problems))[1],
        )
        found = [(image.stamp_ns, len(dict.fromkeys(asked))) for image in bag.images()]
    assert found == list(zip(stamps_of(6), [1, 1, 2, 2, 3, 3], strict=True))


def test_a_drive_that_fails_is_told(tmp_path, monkeypatch):
    path = bag_files.write_mcap(tmp_path / "a.mcap", image_messages(FRAMES), chunk_size=4000)
    with BagReader(path) as bag:
        images = bag.images()
        next(images)

        def fail(run):
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(bag._files[0], "_records", fail)
        with pytest.raises(BagError, match=r"cannot be read any further: .*Input/output error"):
            list(images)


# --- Any damage ---


@pytest.fixture(scope="module")
def good_bags(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    messages = [("/talk", string_message("hello"), START_NS), *image_messages(FRAMES)]
    for name, compression in (
        ("none", CompressionType.NONE),
        ("lz4", CompressionType.LZ4),
        ("zstd", CompressionType.ZSTD),
    ):
        bag_files.write_mcap(folder / f"{name}.mcap", messages, compression=compression, chunk_size=4000)
    bag_files.write_mcap(folder / "plain.mcap", messages, use_chunking=False, index=False)
    bag_files.write_database(folder / "a.db3", messages).close()
    bag_files.write_ros1(folder / "a.bag", FRAMES)
    packed = bag_files.write_bag(tmp_path_factory.mktemp("packed") / "bag", FRAMES, compression="file")
    shutil.copy(only_file(packed, "*.zstd"), folder / "a.mcap.zstd")
    return {file.name: file.read_bytes() for file in folder.iterdir()}


NAMES = ["none.mcap", "lz4.mcap", "zstd.mcap", "plain.mcap", "a.db3", "a.bag", "a.mcap.zstd"]
DAMAGE = st.one_of(
    st.tuples(st.just("cut"), st.floats(0, 1), st.just(0)),
    st.tuples(st.just("set"), st.floats(0, 1), st.integers(0, 255)),
    st.tuples(st.just("zero"), st.floats(0, 1), st.integers(1, 5000)),
    st.tuples(st.just("insert"), st.floats(0, 1), st.integers(1, 30)),
)


@settings(
    max_examples=250, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(name=st.sampled_from(NAMES), damages=st.lists(DAMAGE, min_size=1, max_size=4))
def test_any_damage_ends_in_images_or_one_clear_error(tmp_path, good_bags, name, damages):
    data = bytearray(good_bags[name])
    for kind, where, value in damages:
        position = int(where * max(0, len(data) - 1))
        if kind == "cut":
            del data[position:]
        elif kind == "set" and data:
            data[position] = value
        elif kind == "zero":
            data[position : position + value] = bytes(len(data[position : position + value]))
        elif kind == "insert":
            data[position:position] = bytes(range(value))
    path = tmp_path / name
    path.write_bytes(data)
    try:
        images, _ = read(path, "/image")
    except BagError as error:
        lines = str(error).splitlines()
        images = []
    else:
        lines = [""]
    assert len(lines) == 1
    assert len(images) <= 20
    for image in images:
        try:
            decode_image(image.message)
        except ImageError:
            continue
