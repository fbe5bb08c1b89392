# SPDX-License-Identifier: Apache-2.0
"""`surg-perception record` on a real graph: what comes is in the bag, with its QoS; limits, faults, kill, sharing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="ROS 2 is not in the environment: `source setup.bash` first")

from conftest import Graph, wait_until
from images import jpeg_image, raw_image, stamped
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.serialization import serialize_message
from rosbags.interfaces import QosDurability, QosReliability
from rosbags.rosbag2 import Reader
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import String
from surg_perception_msgs.msg import LatentFeatures, Novelty, PhaseLabels, QuestionAnswer, SurgicalPhase

from surg_perception.data.bags import BagReader
from surg_perception.data.phantom import Phantom
from surg_perception.data.ros_types import typestore
from surg_perception.nodes import recorder
from surg_perception.nodes.recorder import Progress, RecordOptions, record

LONG_S = 60.0
PLENTY = 1 << 20
BEST_EFFORT = QoSProfile(depth=5, reliability=ReliabilityPolicy.BEST_EFFORT)
LATCHED = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
PICTURE = np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)


class Recording:
    """A recording under way in a thread, and what was last told of it."""

    def __init__(self, options: RecordOptions) -> None:
        self.told = Progress()
        self.error: Exception | None = None
        self.result: Progress | None = None
        self._options = options
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.result = record(self._options, self._note)
        except Exception as error:
            self.error = error

    def _note(self, progress: Progress) -> None:
        self.told = progress

    def while_running(self, publish: Callable[[int], None], period_s: float = 0.05) -> Progress:
        """Publish again and again until it ends; its result."""
        end_s = time.monotonic() + LONG_S
        for k in range(100_000):
            if not self._thread.is_alive():
                break
            assert time.monotonic() < end_s, f"the recording does not end: {self.told}"
            publish(k)
            self._thread.join(period_s)
        if self.error is not None:
            raise self.error
        assert self.result is not None
        return self.result


def options(folder: Path, **fields: Any) -> RecordOptions:
    return RecordOptions(**{"folder": folder, "min_free_bytes": PLENTY, "seconds": 2.0, **fields})


def picture(k: int) -> Image:
    return stamped(raw_image(PICTURE), 1000 * 10**9 + k * 40_000_000)


def contents(folder: Path) -> dict[str, list[Any]]:
    """Messages of a bag by topic."""
    found: dict[str, list[Any]] = {}
    with Reader(folder) as reader:
        for connection, _, raw in reader.messages():
            message = typestore().deserialize_cdr(raw, connection.msgtype)
            found.setdefault(connection.topic, []).append(message)
    return found


def test_all_topics_with_their_qos_and_what_was_latched_before(graph: Graph, tmp_path: Path) -> None:
    node = graph.stranger()
    latched = node.create_publisher(PhaseLabels, "phase/labels", LATCHED)
    latched.publish(PhaseLabels(model_id="m@1", labels=["one", "two"]))
    images = node.create_publisher(Image, "image", BEST_EFFORT)
    others = {
        topic: node.create_publisher(kind, topic, 10)
        for topic, kind in (
            ("phase/phase", SurgicalPhase),
            ("phase/latent", LatentFeatures),
            ("phase/novelty", Novelty),
            ("vqa/answered", QuestionAnswer),
            ("source/truth", SurgicalPhase),
            ("/robot/note", String),
        )
    }

    def publish(k: int) -> None:
        images.publish(picture(k))
        others["phase/phase"].publish(stamped(SurgicalPhase(phase="Clipping", phase_id=2), 1000 * 10**9 + k, "cam"))
        others["phase/latent"].publish(LatentFeatures(shape=[2], data=[0.5, -1.0]))
        others["phase/novelty"].publish(Novelty(score=1.5))
        others["source/truth"].publish(SurgicalPhase(phase_id=1))
        others["vqa/answered"].publish(QuestionAnswer(question="What?", answer="The hook."))
        others["/robot/note"].publish(String(data=f"note {k}"))

    running = Recording(options(tmp_path / "bag", topics=(*recorder.TOPICS, "/robot/note")))
    result = running.while_running(publish)
    assert result.stopped_because == "2 s are over"
    assert (result.dropped, result.failed, result.refused, result.missing) == (0, False, {}, [])
    found = contents(tmp_path / "bag")
    assert {topic: len(messages) for topic, messages in found.items()} == result.messages
    assert [(m.model_id, m.labels) for m in found["/surg_perception/phase/labels"]] == [("m@1", ["one", "two"])]
    pictures = found["/surg_perception/image/compressed"]
    assert len(pictures) == result.images > 3
    assert pictures[0].format == "jpeg"
    stamps = [(message.header.stamp.sec, message.header.stamp.nanosec) for message in pictures]
    assert stamps == sorted(stamps)
    assert found["/surg_perception/phase/phase"][0].phase == "Clipping"
    assert found["/surg_perception/phase/latent"][0].data.tolist() == [0.5, -1.0]
    assert found["/surg_perception/vqa/answered"][0].answer == "The hook."
    assert found["/robot/note"][0].data.startswith("note ")
    with Reader(tmp_path / "bag") as reader:
        offered = {connection.topic: connection.ext.offered_qos_profiles[0] for connection in reader.connections}
    assert offered["/surg_perception/phase/labels"].durability == QosDurability.TRANSIENT_LOCAL
    assert offered["/surg_perception/image/compressed"].reliability == QosReliability.BEST_EFFORT
    assert offered["/surg_perception/phase/phase"].reliability == QosReliability.RELIABLE
    with BagReader(tmp_path / "bag") as bag:
        assert sum(1 for _ in bag.images()) == result.images


def test_the_image_that_the_phase_node_takes_is_found_and_jpeg_is_kept_as_it_came(graph: Graph, tmp_path: Path) -> None:
    node = graph.stranger()
    jpegs = node.create_publisher(CompressedImage, "/tower/left/image/compressed", BEST_EFFORT)
    import rclpy

    phase = rclpy.create_node("phase", namespace="surg_perception", context=node.context)
    phase.create_subscription(CompressedImage, "/tower/left/image/compressed", lambda message: None, BEST_EFFORT)
    sent = jpeg_image(PICTURE)
    running = Recording(options(tmp_path / "bag", topics=("image",), seconds=1.0))
    result = running.while_running(lambda k: jpegs.publish(stamped(sent, 10**9 * k)))
    phase.destroy_node()
    (messages,) = contents(tmp_path / "bag").values()
    assert list(result.messages) == ["/tower/left/image/compressed"]
    assert bytes(messages[0].data) == bytes(sent.data)


def test_a_publisher_that_comes_back_with_less_is_recorded_on(graph: Graph, tmp_path: Path) -> None:
    node = graph.stranger()
    publisher = node.create_publisher(Image, "image", 10)
    running = Recording(options(tmp_path / "bag", topics=("image",), seconds=0.0, max_bytes=60 * PICTURE.nbytes))
    wait_until(lambda: publisher.publish(picture(0)) or running.told.images > 2, LONG_S, "images")
    node.destroy_publisher(publisher)
    before = running.told.images
    publisher = node.create_publisher(Image, "image", BEST_EFFORT)
    wait_until(lambda: publisher.publish(picture(1)) or running.told.images > before + 5, LONG_S, "more images")
    result = running.while_running(lambda k: publisher.publish(picture(k)), 0.01)
    assert "--max-size" in result.stopped_because
    assert result.bytes < 3 * 60 * PICTURE.nbytes


def test_images_that_come_too_fast_are_dropped_and_counted_and_phases_are_not(
    graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "_IMAGE_QUEUE_BYTES", 4 * PICTURE.nbytes)
    took = recorder.PrivateMessages.__call__

    def slowly(self: Any, topic: str, msgtype: str, log_ns: int, raw: bytes) -> Any:
        if msgtype == "sensor_msgs/msg/Image":
            time.sleep(0.3)
        return took(self, topic, msgtype, log_ns, raw)

    monkeypatch.setattr(recorder.PrivateMessages, "__call__", slowly)
    node = graph.stranger()
    images, phases = node.create_publisher(Image, "image", 10), node.create_publisher(SurgicalPhase, "phase/phase", 10)
    running = Recording(options(tmp_path / "bag", topics=("image", "phase")))

    def publish(k: int) -> None:
        images.publish(picture(k))
        phases.publish(SurgicalPhase(phase_id=k))

    result = running.while_running(publish)
    assert result.dropped > 3
    ids = [message.phase_id for message in contents(tmp_path / "bag")["/surg_perception/phase/phase"]]
    assert ids == list(range(ids[0], ids[0] + len(ids))), "no phase is missing"
    assert len(ids) > result.images


def test_large_messages_that_are_no_images_do_not_fill_memory_and_leave_room_for_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "_OTHER_QUEUE_BYTES", 1000)
    go_on = threading.Event()
    monkeypatch.setattr(recorder.PrivateMessages, "__call__", lambda *_: go_on.wait(LONG_S) and None)
    sink = recorder._Sink(options(tmp_path / "bag"))
    for _ in range(6):
        sink.take("/cloud", "sensor_msgs/msg/PointCloud2", bytes(600))
    assert sink.dropped in (4, 5), "one waits, and one may be with the writer"
    before = sink.dropped
    sink.take("/image", "sensor_msgs/msg/Image", bytes(600))
    assert sink.dropped == before
    go_on.set()
    sink.close()
    assert sink._queued_bytes == [0, 0]


def test_the_files_of_a_shared_recording_do_not_tell_its_date(tmp_path: Path) -> None:
    sink = recorder._Sink(options(tmp_path / "bag", share=True))
    sink.names["/phase"] = "/surg_perception/phase/phase"
    sink.take("/phase", "surg_perception_msgs/msg/SurgicalPhase", bytes(serialize_message(SurgicalPhase())))
    sink.close()
    assert sink.counts == {"/surg_perception/phase/phase": 1}
    paths = [tmp_path / "bag", *(tmp_path / "bag").iterdir()]
    assert {path.name for path in paths} == {"bag", "bag_0.mcap", "metadata.yaml"}
    assert {path.stat().st_mtime for path in paths} == {946_684_800}


def test_it_ends_before_the_disk_is_full_and_leaves_a_whole_bag(
    graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage, free = namedtuple("usage", "free"), [100 * PLENTY]
    monkeypatch.setattr(recorder.shutil, "disk_usage", lambda path: usage(free[0]))
    publisher = graph.stranger().create_publisher(Image, "image", 10)
    running = Recording(options(tmp_path / "bag", topics=("image",), seconds=0.0))
    wait_until(lambda: publisher.publish(picture(0)) or running.told.images > 2, LONG_S, "images")
    free[0] = 1000
    result = running.while_running(lambda k: publisher.publish(picture(k)))
    assert result.failed
    assert "--min-free" in result.stopped_because
    assert len(contents(tmp_path / "bag")["/surg_perception/image/compressed"]) == result.images
    with pytest.raises(ValueError, match=r"not started: the disk of .* must stay free \(--min-free\)"):
        record(options(tmp_path / "other"))
    assert not (tmp_path / "other").exists()


def test_a_shared_recording_holds_no_name_of_the_room_and_refuses_what_it_cannot_clean(
    graph: Graph, tmp_path: Path
) -> None:
    node = graph.stranger()
    images = node.create_publisher(Image, "/or_3/camera", 10)
    second = node.create_publisher(Image, "/or_3/millers_camera", 10)
    notes = node.create_publisher(String, "/or_3/note", 10)
    latents = node.create_publisher(LatentFeatures, "phase/latent", 10)
    phases = node.create_publisher(SurgicalPhase, "phase/phase", 10)
    patient = Phantom(320, 180, rate_hz=4, seed=2, duration_s=60)
    frames = [raw_image(patient.frame(60 + k)[0]) for k in range(12)]

    def publish(k: int) -> None:
        now = time.time_ns()
        images.publish(stamped(frames[k % len(frames)], now, "or_3_endoscope"))
        second.publish(stamped(frames[k % len(frames)], now, "or_3_endoscope"))
        phases.publish(stamped(SurgicalPhase(phase="Clipping"), now, "or_3_endoscope"))
        latents.publish(LatentFeatures(data=[1.0]))
        notes.publish(String(data="Mrs Miller"))

    topics = ("image", "phase", "latent", "/or_3/note", "/or_3/millers_camera")
    running = Recording(options(tmp_path / "bag", topics=topics, image="/or_3/camera", share=True, seconds=6.0))
    result = running.while_running(publish, 0.1)
    assert set(result.messages) == {
        "/surg_perception/image/compressed",
        "/surg_perception/phase/phase",
        "/surg_perception/topic_5/compressed",
    }
    assert set(result.refused) == {"/or_3/note", "/surg_perception/phase/latent"}
    assert sum(result.shown.values()) == result.images
    found = contents(tmp_path / "bag")
    assert {message.header.frame_id for messages in found.values() for message in messages} == {"endoscope"}
    assert all(message.header.stamp.sec < 946684800 + 120 for messages in found.values() for message in messages)
    for path in (tmp_path / "bag").iterdir():
        content = path.read_bytes()
        host = os.uname().nodename.encode()
        # Two or three letters are somewhere in the pictures' bytes by chance.
        for name in (b"or_3", b"Miller", b"millers", str(tmp_path).encode(), *([host] if len(host) > 4 else [])):
            assert name not in content, (path, name)


# The command --------------------------------------------------------------------------------------------------------


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "surg_perception.cli.main", "record", "--min-free", "1MB", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def publish_until(process: subprocess.Popen[str], publisher: Any, ready: Callable[[], bool], what: str) -> None:
    def once() -> bool:
        assert process.poll() is None, process.communicate()
        publisher.publish(picture(int(time.monotonic() * 25)))
        time.sleep(0.02)
        return ready()

    wait_until(once, LONG_S, what)


def test_the_command_records_until_ctrl_c_and_says_what(graph: Graph, tmp_path: Path) -> None:
    publisher = graph.stranger().create_publisher(Image, "image", 10)
    bag = tmp_path / "bag"
    process = start("--out", str(bag))
    file = bag / "bag_0.mcap"
    publish_until(process, publisher, lambda: file.exists() and file.stat().st_size > 9000, "images")
    process.send_signal(signal.SIGINT)
    said, complained = process.communicate(timeout=LONG_S)
    assert process.returncode == 0, complained
    count = len(contents(bag)["/surg_perception/image/compressed"])
    assert f"{count} images; ended: SIGINT" in said
    assert "/surg_perception/image/compressed" in said


def test_a_killed_recorder_leaves_what_it_had_flushed(graph: Graph, tmp_path: Path) -> None:
    publisher = graph.stranger().create_publisher(Image, "image", 10)
    bag = tmp_path / "bag"
    process = start("--out", str(bag), "--split", "30kB")
    publish_until(process, publisher, lambda: (bag / "bag_2.mcap").exists(), "three files")
    process.kill()
    process.communicate(timeout=LONG_S)
    with BagReader(bag) as reader:
        assert sum(1 for _ in reader.images()) > 5


def test_nothing_recorded_is_said_and_leaves_no_folder(graph: Graph, tmp_path: Path) -> None:
    process = start("--out", str(tmp_path / "bag"), "--topics", "phase")
    wait_until(lambda: (tmp_path / "bag").exists(), LONG_S, "the folder")
    process.send_signal(signal.SIGINT)
    said, complained = process.communicate(timeout=LONG_S)
    assert process.returncode == 2
    assert "nothing was recorded" in complained
    assert not said
    assert not (tmp_path / "bag").exists()
