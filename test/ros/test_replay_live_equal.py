# SPDX-License-Identifier: Apache-2.0
"""A replay says of each image, field by field, what the live node says of it."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="ROS 2 is not in the environment: `source setup.bash` first")

from conftest import Graph, wait_until
from phantom_bags import jpeg, messages_of, write_phantom_bag
from rclpy.qos import DurabilityPolicy, QoSProfile
from rclpy.serialization import deserialize_message
from sensor_msgs.msg import CompressedImage
from surg_perception_msgs.msg import LatentFeatures, PhaseLabels, SurgicalPhase

from surg_perception.data.bags import BagReader
from surg_perception.nodes.phase_node import PhaseNode
from surg_perception.replay.run import run_replay
from surg_perception.stream.phase_pipeline import PhasePipeline

MODEL = "gsvit_m0_phantom"
LATCHED = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
TIMES = ("latency_ms", "wait_ms", "decode_ms", "inference_ms", "filter_ms")
BAD, BLANK, FAULTY = 20, 30, 40
# Nothing is stale or silent by the wall clock, and latents come at a lower rate.
PARAMETERS = {
    "state.max_age_s": 3600.0,
    "state.no_signal_after_s": 3600.0,
    "output.deadline_s": 3600.0,
    "filter.hold_s": 0.8,
    "latent.max_rate_hz": 2.0,
    "input.transport": "compressed",
    "input.reliability": "reliable",
}


def plain(message: Any) -> Any:
    """A message of rclpy or of a bag as plain values."""
    if hasattr(message, "get_fields_and_field_types"):
        return {name: plain(getattr(message, name)) for name in message.get_fields_and_field_types()}
    if hasattr(message, "__msgtype__"):
        # Constants and the type's name are fields of it too.
        names = [field.name for field in dataclasses.fields(message) if field.name[0].islower()]
        return {name: plain(getattr(message, name)) for name in names}
    if isinstance(message, (str, int, float)):
        return message
    return [value.item() if hasattr(value, "item") else value for value in message]


def untimed(message: Any) -> dict[str, Any]:
    """A SurgicalPhase without the times that it took."""
    return {name: value for name, value in plain(message).items() if name not in TIMES}


def test_every_field_of_every_message_is_the_live_nodes(
    graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    green = np.full((240, 320, 3), (0, 255, 0), np.uint8)
    green[::2] = (0, 200, 0)  # not blank
    black = np.zeros((240, 320, 3), np.uint8)
    bag = write_phantom_bag(
        tmp_path / "bag",
        start_ns=time.time_ns() - 60 * 10**9,
        instead={BAD: jpeg(black)[:60], BLANK: jpeg(black), FAULTY: jpeg(green)},
    )
    infer = PhasePipeline._infer

    def failing(self: PhasePipeline, frame: np.ndarray) -> Any:
        if frame[..., 0].mean() < 30 and frame[..., 1].mean() > 150:
            raise RuntimeError("no green")
        return infer(self, frame)

    monkeypatch.setattr(PhasePipeline, "_infer", failing)

    parameters = {name.replace(".", "__"): value for name, value in PARAMETERS.items()}
    node = graph.start(PhaseNode, model__path=MODEL, **parameters)
    phases = graph.collect(SurgicalPhase, "phase/phase", 1000)
    latents = graph.collect(LatentFeatures, "phase/latent", 1000)
    publisher = graph.client.create_publisher(CompressedImage, "image/compressed", 10)
    assert graph.transition(node, "configure", "activate")
    labels = graph.collect(PhaseLabels, "phase/labels", LATCHED)
    wait_until(lambda: publisher.get_subscription_count() == 1 and labels, 30, "the node's connections")
    wait_until(lambda: node.count_subscribers("phase/phase") and node.count_subscribers("phase/latent"), 30, "ours")
    counts = node._counts

    def taken() -> int:
        return counts.processed + counts.rejected + counts.faults

    with BagReader(bag) as reader:
        for number, image in enumerate(reader.images(), 1):
            publisher.publish(deserialize_message(image.raw, CompressedImage))
            wait_until(lambda n=number: taken() == n, 60, f"image {number}")
            wait_until(lambda n=number: len(phases) == n - counts.rejected, 60, f"the phase of image {number}")

    arguments = [f"phase:{name}:={str(value).lower()}" for name, value in PARAMETERS.items()]
    outcome = run_replay(bag, tmp_path / "out", model=MODEL, assignments=arguments)
    replayed = messages_of(outcome.out / "bag")
    assert [untimed(one) for one in replayed["/surg_perception/phase/phase"]] == [untimed(one) for one in phases]
    assert len(phases) == 59
    assert len({phase.phase for phase in phases}) > 3
    states = {phase.state for phase in phases}
    assert states >= {SurgicalPhase.OK, SurgicalPhase.UNCERTAIN, SurgicalPhase.NO_SIGNAL, SurgicalPhase.FAULT}
    expected = [plain(one) for one in replayed["/surg_perception/phase/latent"]]
    wait_until(lambda: len(latents) >= len(expected), 30, "all latents")
    assert [plain(one) for one in latents] == expected
    assert 10 < len(expected) < 30
    assert [plain(one) for one in replayed["/surg_perception/phase/labels"]] == [plain(labels[0])]
