# SPDX-License-Identifier: Apache-2.0
"""Nodes `source` and `overlay`: true stamps, formats, pictures that show what they should, recordings."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

pytest.importorskip("rclpy", reason="ROS 2 is not in the environment: `source setup.bash` first")

from conftest import Graph, Spoken, wait_until
from images import raw_image, stamped
from rclpy.qos import DurabilityPolicy, QoSProfile
from sensor_msgs.msg import CompressedImage, Image
from surg_perception_msgs.msg import PhaseLabels, SurgicalPhase

from surg_perception.data.labels import CHOLEC80_PHASES
from surg_perception.data.phantom import Phantom
from surg_perception.data.video_writer import VideoWriter
from surg_perception.nodes.overlay_node import OverlayNode
from surg_perception.nodes.source_node import SourceNode
from surg_perception.stream.image_decode import decode_image


def stamp_ns(message: Any) -> int:
    return message.header.stamp.sec * 10**9 + message.header.stamp.nanosec


# source -----------------------------------------------------------------------------------------------------------


def test_phantom_pictures_carry_the_stamps_of_their_times_and_their_truth(graph: Graph) -> None:
    node = graph.start(
        SourceNode, source="phantom", width=160, height=120, rate_hz=20.0, duration_s=3.0, seed=4, frame_id="scope"
    )
    images = graph.collect(Image, "image")
    truth = graph.collect(SurgicalPhase, "source/truth")
    assert graph.transition(node, "configure")
    wait_until(lambda: graph.client.count_publishers("/surg_perception/image") == 1, 5, "the publisher")
    before_ns = graph.client.get_clock().now().nanoseconds
    assert graph.transition(node, "activate")
    wait_until(lambda: len(truth) == 60, 20, "sixty pictures")
    wait_until(lambda: images and stamp_ns(images[-1]) == stamp_ns(truth[-1]), 5, "the last picture")

    stamps = np.array([stamp_ns(t) for t in truth])
    assert before_ns <= stamps[0] <= graph.client.get_clock().now().nanoseconds
    assert np.all(np.diff(stamps) >= 50_000_000 - 1000), "never closer than the rate"
    if node._late == 0:
        assert np.allclose(np.diff(stamps), 50_000_000, atol=1000)
    phantom = Phantom(width=160, height=120, rate_hz=20.0, seed=4, duration_s=3.0)
    assert [t.phase_id for t in truth] == [phantom.labels(i).phase for i in range(60)]
    by_stamp = {stamp_ns(t): i for i, t in enumerate(truth)}
    last = images[-1]
    assert last.header.frame_id == "scope"
    assert np.array_equal(decode_image(last), phantom.frame(by_stamp[stamp_ns(last)])[0])


@pytest.mark.parametrize("encoding", ["rgb8", "bgra8", "mono8"])
def test_raw_and_jpeg_show_the_same_picture(graph: Graph, encoding: str) -> None:
    node = graph.start(
        SourceNode,
        source="phantom",
        width=160,
        height=120,
        rate_hz=10.0,
        duration_s=2.0,
        output__transport="both",
        output__encoding=encoding,
        output__jpeg_quality=100,
    )
    images = graph.collect(Image, "image")
    jpegs = graph.collect(CompressedImage, "image/compressed")
    assert graph.transition(node, "configure", "activate")

    def pair() -> tuple[Image, CompressedImage] | None:
        by_stamp = {stamp_ns(j): j for j in jpegs}
        return next(((i, by_stamp[stamp_ns(i)]) for i in images if stamp_ns(i) in by_stamp), None)

    image, jpeg = wait_until(pair, 10, "a picture in both forms")
    assert image.encoding == encoding
    raw, compressed = decode_image(image), decode_image(jpeg)
    if encoding == "mono8":
        compressed = cv2.cvtColor(cv2.cvtColor(compressed, cv2.COLOR_BGR2GRAY), cv2.COLOR_GRAY2BGR)
    assert np.abs(raw.astype(int) - compressed).mean() < 2.0


def test_a_video_plays_at_its_own_stamps_and_loops_on(graph: Graph, tmp_path: Path) -> None:
    writer = VideoWriter(tmp_path / "clip.mp4")
    times_s = [0.0, 0.1, 0.25, 0.3, 0.5]  # variable frame rate
    for i, time_s in enumerate(times_s):
        writer.write(np.full((64, 96, 3), 40 * i, np.uint8), time_s)
    writer.close()
    node = graph.start(SourceNode, source=str(tmp_path / "clip.mp4"), loop=True)
    images = graph.collect(Image, "image")
    assert graph.transition(node, "configure")
    wait_until(lambda: graph.client.count_publishers("/surg_perception/image") == 1, 5, "the publisher")
    time.sleep(0.3)
    assert graph.transition(node, "activate")
    wait_until(lambda: len(images) >= 8, 15, "eight pictures of a clip of five")
    levels = [int(decode_image(image).mean()) for image in images]
    start = next(i for i, level in enumerate(levels) if abs(level - 40) < 15)
    gaps_s = np.diff([stamp_ns(image) for image in images]) * 1e-9
    assert gaps_s[start] == pytest.approx(0.15, abs=0.03 if node._late else 0.002)
    assert np.all(gaps_s > 0), "stamps go on when the clip starts again"


def test_the_end_is_announced_and_a_second_activation_starts_anew(graph: Graph, spoken: Spoken) -> None:
    node = graph.start(SourceNode, width=64, height=64, rate_hz=20.0, duration_s=1.0)
    truth = graph.collect(SurgicalPhase, "source/truth")
    assert graph.transition(node, "configure", "activate")
    wait_until(lambda: spoken.lines("end of the source: 20 pictures published"), 10, "the end")
    assert graph.transition(node, "deactivate", "activate")
    wait_until(lambda: len(spoken.lines("end of the source: 20 pictures published")) == 2, 10, "the second end")
    assert len(truth) <= 40


@pytest.mark.parametrize("source", ["/no/such.mp4", "phantom:sed=3", "text.mp4"])
def test_a_source_that_cannot_be_read_fails_to_configure(
    graph: Graph, spoken: Spoken, tmp_path: Path, source: str
) -> None:
    (tmp_path / "text.mp4").write_text("this is no video")
    path = str(tmp_path / source) if source == "text.mp4" else source
    node = graph.start(SourceNode, source=path)
    assert not graph.transition(node, "configure")
    assert spoken.lines("configure failed", source)


# overlay ----------------------------------------------------------------------------------------------------------


class OverlayRig:
    """An overlay node, fed with images and phases by hand."""

    def __init__(self, graph: Graph, **parameters: Any) -> None:
        self.graph = graph
        self.node = graph.start(OverlayNode, **{"input__reliability": "reliable", "max_rate_hz": 100.0, **parameters})
        self.pictures = graph.collect(CompressedImage, "overlay/image/compressed")
        latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        self.labels = graph.client.create_publisher(PhaseLabels, "phase/labels", latched)
        self.labels.publish(PhaseLabels(labels=list(CHOLEC80_PHASES)))
        self.phase = graph.client.create_publisher(SurgicalPhase, "phase/phase", 10)
        self.image = graph.client.create_publisher(Image, "image", 10)
        assert graph.transition(self.node, "configure", "activate")
        wait_until(lambda: self.image.get_subscription_count() and self.phase.get_subscription_count(), 10, "overlay")
        wait_until(lambda: self.node._labels_message, 10, "the labels")

    def show(self, bgr: np.ndarray, stamp: int, phase_id: int, state: int = SurgicalPhase.OK) -> np.ndarray:
        """Feed one image with its phase; returns the picture drawn for it."""
        image = stamped(raw_image(bgr), stamp)
        self.image.publish(image)
        wait_until(lambda: stamp in self.node._images, 5, "the image at the node")
        name = CHOLEC80_PHASES[phase_id] if phase_id >= 0 else ""
        self.phase.publish(
            SurgicalPhase(header=image.header, phase_id=phase_id, phase=name, confidence=0.9, state=state)
        )
        message = wait_until(
            lambda: next((p for p in self.pictures if stamp_ns(p) == stamp), None), 10, "the overlay picture"
        )
        return decode_image(message)


def test_the_phase_is_drawn_on_the_very_image_it_belongs_to(graph: Graph) -> None:
    rig = OverlayRig(graph)
    grey = [np.full((240, 320, 3), 60 + 40 * i, np.uint8) for i in range(3)]
    drawn = [rig.show(bgr, 10**9 * (i + 1), phase_id=i) for i, bgr in enumerate(grey)]
    for bgr, picture in zip(grey, drawn, strict=True):
        assert picture.shape == bgr.shape
        assert abs(int(np.median(picture[100:140])) - int(bgr[0, 0, 0])) <= 3, "the picture's middle is the image"
        assert np.abs(picture[:40].astype(int) - bgr[:40]).max() > 60, "something is written at the top"
    assert np.abs(drawn[0][:40].astype(int) - drawn[1][:40]).max() > 40, "another phase, another text"


def test_no_signal_has_a_picture_of_its_own(graph: Graph) -> None:
    rig = OverlayRig(graph)
    rig.show(np.full((240, 320, 3), 200, np.uint8), 10**9, phase_id=0)
    silent = SurgicalPhase(state=SurgicalPhase.NO_SIGNAL, phase_id=-1)
    silent.header.stamp.sec = 1
    count = len(rig.pictures)
    rig.phase.publish(silent)
    wait_until(lambda: len(rig.pictures) > count, 5, "a picture of silence")
    picture = decode_image(rig.pictures[-1])
    assert picture.shape == (240, 320, 3)
    assert np.median(picture) < 80, "the last image must not stay up as if it were live"


def test_a_phase_node_that_is_gone_is_shown_too(graph: Graph) -> None:
    rig = OverlayRig(graph)
    rig.show(np.full((240, 320, 3), 200, np.uint8), 10**9, phase_id=0)
    count = len(rig.pictures)
    wait_until(lambda: len(rig.pictures) > count, 5, "a picture without any message from the phase node")
    assert np.median(decode_image(rig.pictures[-1])) < 80


def test_recordings_are_written_where_parameters_say_and_nowhere_else(graph: Graph, tmp_path: Path) -> None:
    video, image = tmp_path / "overlay.mp4", tmp_path / "overlay.png"
    rig = OverlayRig(graph, record__video_path=str(video), record__image_path=str(image), max_width=160)
    for i in range(5):
        rig.show(np.full((240, 320, 3), 90, np.uint8), 10**9 * (i + 1), phase_id=1)
    assert graph.transition(rig.node, "deactivate")
    assert cv2.imread(str(image)).shape == (120, 160, 3)
    capture = cv2.VideoCapture(str(video))
    count = 0
    while capture.read()[0]:
        count += 1
    assert count >= 5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["overlay.mp4", "overlay.png"]


def test_the_rate_is_limited_before_anything_is_drawn(graph: Graph) -> None:
    rig = OverlayRig(graph, max_rate_hz=2.0)
    image = raw_image(np.full((64, 64, 3), 90, np.uint8))
    start_s = time.monotonic()
    for i in range(40):
        stamped(image, 10**9 + i * 25_000_000)
        rig.image.publish(image)
        rig.phase.publish(SurgicalPhase(header=image.header, phase_id=0, phase="Preparation"))
        time.sleep(0.025)
    took_s = time.monotonic() - start_s
    assert rig.node._drawn <= 2.0 * took_s + 2
