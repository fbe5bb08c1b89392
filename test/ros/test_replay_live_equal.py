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
from surg_perception_msgs.msg import LatentFeatures, PhaseLabels, QuestionAnswer, SurgicalPhase
from surg_perception_msgs.srv import Ask

from surg_perception.data.bags import BagReader
from surg_perception.nodes.parameter_table import VQA
from surg_perception.nodes.phase_node import PhaseNode
from surg_perception.nodes.vqa_node import VqaNode
from surg_perception.replay.questions import PlannedQuestion, QuestionReplay
from surg_perception.replay.run import run_replay
from surg_perception.replay.session import ResultWriter
from surg_perception.stream.phase_pipeline import PhasePipeline
from surg_perception.surgllm.answering import Reply

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


class BrightnessAssistant:
    """Answers with the brightness of the window's frames."""

    image_size, segment_frames, max_segments = 32, 4, 16
    model_id, backend, tasks = "brightness@0", "none", ("phase", "caption")

    def encode(self, frames: np.ndarray) -> list[int]:
        return [round(float(frame.mean())) for frame in frames]

    def ask(self, question: str, segments: Any, *, task: str = "", on_text: Any = None, stop: Any = None) -> Reply:
        text = " ".join(f"{start:g}-{end:g}:{features}" for start, end, features in segments)
        return Reply(text, task or "phase", 0.75 if not task else 1.0, "joint", 0.5, 1, 0.0, 0.0, True)


def test_every_field_of_every_answer_is_the_live_nodes(graph: Graph, tmp_path: Path) -> None:
    # Nothing is kept between 8 and 10 s: a gap.
    seconds = [*range(9), *range(11, 24)]
    questions = [
        PlannedQuestion("What is seen?", 7.0),
        PlannedQuestion("What is seen?", 14.0, window_s=10.0),
        PlannedQuestion("What is seen?", 15.0, task="caption", window_s=2.0),
        PlannedQuestion("What is the patient's name?", 16.0),
        PlannedQuestion("What is seen?", 16.0, task="nonsense"),
        PlannedQuestion("  ", 17.0),
        PlannedQuestion("What is seen?", 23.0, window_s=60.0),
    ]
    values = {**VQA.defaults, "input.transport": "compressed", "input.reliability": "reliable", "buffer.length_s": 12.0}
    start_ns = time.time_ns() - 60 * 10**9

    def message(second: int) -> CompressedImage:
        picture = np.full((32, 32, 3), second * 10, np.uint8)
        image = CompressedImage(format="jpeg", data=jpeg(picture))
        image.header.stamp.sec, image.header.stamp.nanosec = divmod(start_ns + second * 10**9, 10**9)
        return image

    asked = QuestionReplay(questions, BrightnessAssistant(), values)
    node = graph.start(
        lambda **kwargs: VqaNode(load=lambda model, threads: BrightnessAssistant(), **kwargs),
        **{name.replace(".", "__"): value for name, value in values.items() if value != VQA.defaults[name]},
    )
    told = graph.collect(QuestionAnswer, "vqa/answered")
    publisher = graph.client.create_publisher(CompressedImage, "image/compressed", 10)
    client = graph.client.create_client(Ask, "ask")
    assert graph.transition(node, "configure", "activate")
    wait_until(lambda: publisher.get_subscription_count() == 1 and client.service_is_ready(), 30, "the node")
    wait_until(lambda: node.count_subscribers("vqa/answered"), 30, "ours")
    for count, second in enumerate(seconds, 1):
        asked.take(message(second), start_ns + second * 10**9, start_ns + second * 10**9)
        publisher.publish(message(second))
        wait_until(lambda n=count: node._received == n, 30, f"image {count}")
        encoded = node._buffer
        wait_until(lambda b=encoded: all(one.attempted for one in b._samples), 30, "its segment")
        for question in [one for one in questions if one.at_s == second]:
            request = Ask.Request(question=question.ask, task=question.task, window_s=question.window_s)
            future = client.call_async(request)
            wait_until(future.done, 30, "an answer")
    asked.end()
    wait_until(lambda: len(told) == len(questions), 30, "all answers")
    (tmp_path / "out").mkdir()
    with ResultWriter(tmp_path / "out", "surg_perception") as writer:
        for answer in asked.answers:
            writer.answer(answer)
    replayed = messages_of(tmp_path / "out" / "bag")["/surg_perception/vqa/answered"]

    def untimed_answer(one: Any) -> dict[str, Any]:
        return {
            name: value for name, value in plain(one).items() if name not in ("header", "first_token_ms", "total_ms")
        }

    assert [untimed_answer(one) for one in replayed] == [untimed_answer(one) for one in told]
    assert [one.error_code for one in told] == [0, 0, 0, 10, 5, 4, 0]
    assert len({one.answer for one in told}) == 5
