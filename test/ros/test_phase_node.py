# SPDX-License-Identifier: Apache-2.0
"""Node `phase`: encodings, malformed images, lifecycle, failing configures, states, parameters, faults."""

from __future__ import annotations

import array
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="ROS 2 is not in the environment: `source setup.bash` first")

from conftest import Graph, Spoken, wait_until
from diagnostic_msgs.msg import DiagnosticArray
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from images import in_every_encoding, jpeg_image, packed, raw_image, stamped
from rclpy.duration import Duration
from rclpy.parameter import Parameter
from rclpy.qos import DurabilityPolicy, QoSProfile
from sensor_msgs.msg import CompressedImage, Image
from surg_perception_msgs.msg import LatentFeatures, PhaseLabels, SurgicalPhase

from surg_perception.data.phantom import Phantom
from surg_perception.models import find_model
from surg_perception.nodes.phase_node import PhaseNode
from surg_perception.runtime.backend import InferenceError

LATCHED = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
MODEL = "gsvit_m0_phantom"


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    """One endoscope image, uint8 [240, 320, 3]."""
    return Phantom(width=320, height=240, seed=5, duration_s=60.0, rate_hz=5.0).frame(150)[0]


class Rig:
    """A phase node and what goes in and comes out."""

    def __init__(self, graph: Graph, **parameters: Any) -> None:
        self.graph = graph
        # Reliable: the very first image must not be lost while the two sides discover each other.
        defaults = {"model__path": MODEL, "state__max_age_s": 60.0, "input__reliability": "reliable"}
        self.node = graph.start(PhaseNode, **{**defaults, **parameters})
        self.phases: list[SurgicalPhase] = graph.collect(SurgicalPhase, "phase/phase")
        self.latents: list[LatentFeatures] = graph.collect(LatentFeatures, "phase/latent")
        self.raw = graph.client.create_publisher(Image, "image", 10)
        self.compressed = graph.client.create_publisher(CompressedImage, "image/compressed", 10)

    def up(self) -> Rig:
        assert self.graph.transition(self.node, "configure", "activate")
        sub = self.raw if self.node.values["input.transport"] == "raw" else self.compressed
        wait_until(lambda: sub.get_subscription_count() == 1, 10, "the node's image subscription")
        return self

    def send(self, message: Any, stamp_ns: int | None = None) -> int:
        """Publish an image, stamped now unless told; returns the stamp."""
        stamp_ns = stamp_ns if stamp_ns is not None else self.graph.client.get_clock().now().nanoseconds
        (self.raw if isinstance(message, Image) else self.compressed).publish(stamped(message, stamp_ns))
        return stamp_ns

    def ask(self, message: Any, stamp_ns: int | None = None) -> SurgicalPhase:
        """Publish an image and wait for its phase."""
        stamp_ns = self.send(message, stamp_ns)
        return wait_until(lambda: self.phase_of(stamp_ns), 10, f"the phase of the image stamped {stamp_ns}")

    def phase_of(self, stamp_ns: int) -> SurgicalPhase | None:
        for phase in reversed(self.phases):
            stamp = phase.header.stamp
            if stamp.sec * 10**9 + stamp.nanosec == stamp_ns and phase.state != SurgicalPhase.NO_SIGNAL:
                return phase
        return None


# What comes out ---------------------------------------------------------------------------------------------------


def test_phase_latent_and_labels_of_an_image(graph: Graph, picture: np.ndarray) -> None:
    rig = Rig(graph).up()
    phase = rig.ask(raw_image(picture), stamp_ns=123_000_000_456)
    card = find_model(MODEL)
    assert phase.header.frame_id == "endoscope"
    assert phase.model_id == card.model_id
    assert phase.phase == card.labels.names[phase.phase_id]
    assert len(phase.probabilities) == 7
    assert sum(phase.probabilities) == pytest.approx(1.0, abs=1e-4)
    assert phase.raw_phase_id == int(np.argmax(phase.probabilities))
    assert phase.confidence == pytest.approx(max(phase.probabilities), abs=1e-6), "the first frame is not smoothed"
    assert phase.inference_ms > 0
    assert (phase.frames_received, phase.frames_processed) == (1, 1)

    latent = wait_until(lambda: rig.latents and rig.latents[-1], 5, "the latent")
    assert latent.header.stamp == phase.header.stamp
    assert (latent.model_id, latent.backend) == (phase.model_id, phase.backend)
    assert list(latent.shape) == list(card.network.latent_shape)
    assert len(latent.data) == np.prod(card.network.latent_shape)

    labels = graph.collect(PhaseLabels, "phase/labels", LATCHED)
    wait_until(lambda: labels, 5, "labels for a late subscriber")
    assert list(labels[0].labels) == list(card.labels.names)
    assert labels[0].backend == phase.backend
    assert "phantom" in labels[0].intended_use


def test_every_common_encoding_gives_the_same_latent(graph: Graph, picture: np.ndarray) -> None:
    rig = Rig(graph).up()

    def latent(message: Image) -> np.ndarray:
        stamp = rig.ask(message).header.stamp
        found = wait_until(lambda: next((x for x in rig.latents if x.header.stamp == stamp), None), 5, "the latent")
        return np.array(found.data)

    expected = latent(raw_image(picture))

    def difference(message: Image) -> float:
        return float(np.linalg.norm(latent(message) - expected) / np.linalg.norm(expected))

    swapped = difference(packed(picture, "rgb8", 320, 240, 960))
    for name, message in in_every_encoding(picture).items():
        subsampled = any(word in name for word in ("yu", "uy", "nv"))
        assert difference(message) < (swapped / 2 if subsampled else 1e-3), name
    assert swapped > 0.05, "this picture cannot show a wrong channel order"
    grey = rig.ask(packed(picture[:, :, 1], "mono8", 320, 240, 320))
    assert grey.state in (SurgicalPhase.OK, SurgicalPhase.UNCERTAIN)
    assert rig.phases[-1].frames_rejected == 0


def test_compressed_images(graph: Graph, picture: np.ndarray) -> None:
    rig = Rig(graph, input__transport="compressed", filter__time_constant_s=0.0).up()
    good = rig.ask(jpeg_image(picture))
    assert good.phase_id >= 0
    half = jpeg_image(picture)
    half.data = half.data[: len(half.data) // 2]
    rig.send(half)
    wait_until(lambda: rig.node._counts.rejected == 1, 5, "the half JPEG to be refused")
    after = rig.ask(jpeg_image(picture))
    assert after.frames_rejected == 1
    assert list(after.probabilities) == pytest.approx(list(good.probabilities), abs=1e-6)


# Malformed images -------------------------------------------------------------------------------------------------


def broken(picture: np.ndarray) -> dict[str, tuple[Image, str]]:
    """Images that lie about themselves, and what the error must name."""

    def changed(**fields: Any) -> Image:
        message = raw_image(picture)
        for name, value in fields.items():
            setattr(message, name, value)
        return message

    return {
        "step": (changed(step=5), "step"),
        "truncated": (changed(data=array.array("B", b"\0" * 30)), "30"),
        "encoding": (changed(encoding="klingon8"), "klingon8"),
        "0x0": (changed(width=0, height=0, step=0, data=array.array("B")), "0"),
        "8K": (changed(width=7680, height=4320, step=7680 * 3), "input.max_pixels"),
    }


@pytest.mark.parametrize("kind", ["step", "truncated", "encoding", "0x0", "8K"])
def test_a_malformed_image_is_one_error_and_the_next_good_one_works(
    graph: Graph, spoken: Spoken, picture: np.ndarray, kind: str
) -> None:
    rig = Rig(graph).up()
    message, names = broken(picture)[kind]
    for _ in range(20):
        rig.send(message)
        time.sleep(0.01)
    wait_until(lambda: rig.node._counts.rejected >= 10, 10, "the malformed images to be refused")
    phase = rig.ask(raw_image(picture))
    assert phase.frames_rejected >= 10
    assert phase.frames_received == phase.frames_processed + phase.frames_rejected + phase.frames_replaced
    errors = spoken.lines("ERROR", "refused")
    assert len(errors) == 1, "the error is throttled"
    assert names in errors[0]


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    encoding=st.sampled_from(["bgr8", "rgb8", "mono8", "yuv422", "nv12", "bayer_rggb8", "rgb16", "", "x"]),
    height=st.integers(0, 2**32 - 1) | st.integers(0, 64),
    width=st.integers(0, 2**32 - 1) | st.integers(0, 64),
    step=st.integers(0, 2**32 - 1) | st.integers(0, 256),
    data=st.binary(max_size=4096),
)
def test_no_header_can_stop_the_worker(
    shared_rig: Rig, picture: np.ndarray, encoding: str, height: int, width: int, step: int, data: bytes
) -> None:
    before = shared_rig.node._counts
    done = before.processed + before.rejected + before.faults
    shared_rig.send(Image(encoding=encoding, height=height, width=width, step=step, data=array.array("B", data)))
    counts = shared_rig.node._counts
    wait_until(lambda: counts.processed + counts.rejected + counts.faults > done, 10, "an answer to a random header")
    assert counts.faults == 0
    assert shared_rig.node._worker.is_alive()


@pytest.fixture
def shared_rig(graph: Graph) -> Rig:
    """One rig for all examples of a property."""
    return Rig(graph).up()


# States -----------------------------------------------------------------------------------------------------------


def test_silence_is_no_signal_within_the_deadline_and_images_end_it(graph: Graph, picture: np.ndarray) -> None:
    rig = Rig(graph, state__no_signal_after_s=0.3, output__deadline_s=0.6).up()
    wait_until(lambda: rig.phases, 3, "NO_SIGNAL before the first image")
    assert rig.phases[0].state == SurgicalPhase.NO_SIGNAL
    assert rig.phases[0].header.stamp.sec == 0
    phase = rig.ask(raw_image(picture))
    assert phase.state != SurgicalPhase.NO_SIGNAL
    count = len(rig.phases)
    wait_until(lambda: len(rig.phases) >= count + 4, 5, "NO_SIGNAL to be repeated")
    for silent in rig.phases[count:]:
        assert silent.state == SurgicalPhase.NO_SIGNAL
        assert silent.phase_id == -1
        assert silent.header == phase.header
    assert rig.ask(raw_image(picture)).state != SurgicalPhase.NO_SIGNAL


def test_a_controller_with_the_same_deadline_sees_no_miss_while_the_node_lives_and_one_when_it_stops(
    graph: Graph,
) -> None:
    from rclpy.event_handler import SubscriptionEventCallbacks

    rig = Rig(graph, output__deadline_s=0.6).up()
    wait_until(lambda: rig.phases, 3, "the first message")
    missed: list[Any] = []
    heard: list[Any] = []
    graph.client.create_subscription(
        SurgicalPhase,
        "phase/phase",
        heard.append,
        QoSProfile(depth=1, deadline=Duration(seconds=0.6)),
        event_callbacks=SubscriptionEventCallbacks(deadline=missed.append),
    )
    wait_until(lambda: len(heard) >= 6, 5, "messages")
    assert not missed
    assert graph.transition(rig.node, "deactivate")
    wait_until(lambda: missed, 5, "the deadline event after the node fell silent")


def test_old_stamps_are_stale(graph: Graph, picture: np.ndarray) -> None:
    rig = Rig(graph, state__max_age_s=0.5).up()
    now_ns = graph.client.get_clock().now().nanoseconds
    old = rig.ask(raw_image(picture), stamp_ns=now_ns - 2 * 10**9)
    assert old.state == SurgicalPhase.STALE
    assert 2000 < old.latency_ms < 12000
    assert rig.ask(raw_image(picture)).state in (SurgicalPhase.OK, SurgicalPhase.UNCERTAIN)


def test_low_confidence_is_uncertain_and_the_threshold_is_live(graph: Graph, picture: np.ndarray) -> None:
    rig = Rig(graph, state__uncertain_below=1.0).up()
    assert rig.ask(raw_image(picture)).state == SurgicalPhase.UNCERTAIN
    results = rig.node.set_parameters([Parameter("state.uncertain_below", value=0.0)])
    assert results[0].successful
    assert rig.ask(raw_image(picture)).state == SurgicalPhase.OK


def test_a_blank_screen_is_no_signal(graph: Graph) -> None:
    rig = Rig(graph).up()
    blue = np.zeros((240, 320, 3), np.uint8)
    blue[:, :, 0] = 200
    rig.send(raw_image(blue))
    wait_until(lambda: rig.node._counts.processed == 1, 5, "the blue screen to be looked at")
    wait_until(lambda: rig.phases and rig.phases[-1].frames_processed == 1, 5, "its phase")
    assert rig.phases[-1].state == SurgicalPhase.NO_SIGNAL
    assert rig.phases[-1].phase_id == -1
    assert not rig.latents


def test_latents_pooled_rate_limited_and_off(graph: Graph, picture: np.ndarray) -> None:
    rig = Rig(graph, latent__pooled=True, latent__max_rate_hz=1.0).up()
    for i in range(21):
        rig.ask(raw_image(picture), stamp_ns=10**12 + i * 10**8)
    wait_until(lambda: len(rig.latents) >= 3, 5, "latents")
    time.sleep(0.2)
    assert [latent.header.stamp.sec for latent in rig.latents] == [1000, 1001, 1002]
    assert list(rig.latents[0].shape) == [find_model(MODEL).network.latent_shape[0]]
    rig.node.set_parameters([Parameter("latent.publish", value=False)])
    rig.ask(raw_image(picture), stamp_ns=2 * 10**12)
    time.sleep(0.3)
    assert len(rig.latents) == 3


def test_replaced_frames_are_counted(graph: Graph, picture: np.ndarray) -> None:
    rig = Rig(graph).up()
    gate = threading.Event()
    infer = rig.node._backend.infer
    rig.node._backend.infer = lambda frame: (gate.wait(10), infer(frame))[1]
    sent = [rig.send(raw_image(picture)) for _ in range(8) if not time.sleep(0.05)]
    wait_until(lambda: rig.node._counts.received == 8, 5, "eight images")
    gate.set()
    last = wait_until(lambda: rig.phase_of(sent[-1]), 5, "the newest image's phase")
    assert (last.frames_received, last.frames_processed, last.frames_replaced) == (8, 2, 6)


# Faults -----------------------------------------------------------------------------------------------------------


def test_a_failing_backend_is_a_fault_then_replaced_where_allowed(graph: Graph, picture: np.ndarray) -> None:
    rig = Rig(graph, runtime__backend="openvino").up()
    first = rig.node._backend

    def broken_engine(frame: np.ndarray) -> Any:
        raise InferenceError(first.name, "the device is gone")

    first.infer = broken_engine
    for _ in range(3):
        assert rig.ask(raw_image(picture)).state == SurgicalPhase.FAULT
    wait_until(lambda: rig.node._backend is not first, 60, "another backend")
    phase = rig.ask(raw_image(picture))
    assert phase.phase_id >= 0
    assert not phase.backend.startswith("openvino")


def test_a_failing_backend_stays_a_fault_where_fallback_is_not_allowed(graph: Graph, picture: np.ndarray) -> None:
    rig = Rig(graph, runtime__allow_fallback=False).up()
    diagnostics = graph.collect(DiagnosticArray, "/diagnostics")
    backend = rig.node._backend
    infer = backend.infer
    backend.infer = lambda frame: 1 / 0
    for _ in range(5):
        phase = rig.ask(raw_image(picture))
        assert (phase.state, phase.phase_id) == (SurgicalPhase.FAULT, -1)
    assert phase.frames_received == phase.frames_rejected == 5
    wait_until(
        lambda: any(s.level == b"\x02" and "division" in s.message for d in diagnostics for s in d.status),
        5,
        "an ERROR in diagnostics that says why",
    )
    backend.infer = infer
    assert rig.ask(raw_image(picture)).phase_id >= 0


def test_a_backend_that_hangs_is_a_fault_and_not_silence(graph: Graph, picture: np.ndarray) -> None:
    rig = Rig(graph, state__no_signal_after_s=0.3, output__deadline_s=0.4).up()
    answered = rig.ask(raw_image(picture))
    gate = threading.Event()
    infer = rig.node._backend.infer
    rig.node._backend.infer = lambda frame: (gate.wait(20), infer(frame))[1]
    before = len(rig.phases)

    def fault() -> list[SurgicalPhase]:
        rig.send(raw_image(picture))
        time.sleep(0.05)
        return [p for p in rig.phases[before:] if p.state == SurgicalPhase.FAULT]

    silent = wait_until(fault, 10, "FAULT while images come in and nothing comes out")[0]
    assert (silent.phase_id, silent.header) == (-1, answered.header)
    gate.set()
    assert rig.ask(raw_image(picture)).phase_id >= 0


# Lifecycle --------------------------------------------------------------------------------------------------------


def test_lifecycle_twice_around_gives_everything_back(graph: Graph, picture: np.ndarray) -> None:
    rig = Rig(graph)
    graph.transition(rig.node, "configure", "cleanup")
    threads = threading.active_count()
    for _ in range(2):
        rig.up()
        assert rig.ask(raw_image(picture)).frames_processed == 1
        assert graph.transition(rig.node, "deactivate")
        count = len(rig.phases)
        rig.send(raw_image(picture))
        time.sleep(0.2)
        assert len(rig.phases) == count, "an inactive node publishes nothing"
        assert graph.transition(rig.node, "cleanup")
        assert rig.node._backend is None
        wait_until(lambda: graph.client.count_publishers("/surg_perception/phase/phase") == 0, 5, "publishers gone")
    assert threading.active_count() <= threads
    assert graph.transition(rig.node, "unconfigured_shutdown")


def test_a_transition_that_the_state_does_not_have_is_refused_and_the_node_lives(
    graph: Graph, picture: np.ndarray
) -> None:
    rig = Rig(graph)
    assert not graph.transition(rig.node, "activate")
    assert graph.transition(rig.node, "configure")
    assert not graph.transition(rig.node, "configure")
    assert not graph.transition(rig.node, "deactivate")
    rig.graph.transition(rig.node, "activate")
    wait_until(lambda: rig.raw.get_subscription_count() == 1, 10, "the node's image subscription")
    assert rig.ask(raw_image(picture)).phase_id >= 0


def test_deactivate_while_a_frame_is_being_processed(graph: Graph, picture: np.ndarray) -> None:
    rig = Rig(graph).up()
    infer = rig.node._backend.infer
    rig.node._backend.infer = lambda frame: (time.sleep(0.5), infer(frame))[1]
    rig.send(raw_image(picture))
    wait_until(lambda: rig.node._counts.received == 1, 5, "the image")
    assert graph.transition(rig.node, "deactivate")
    assert rig.node._worker is None
    assert graph.transition(rig.node, "activate", "deactivate", "cleanup")


FAILURES = {
    "no such model": ({"model__path": "no_such_model"}, "no_such_model"),
    "no such folder": ({"model__path": "/no/such/folder"}, "/no/such/folder"),
    "a pickle": ({"model__path": "GSViT.pkl"}, "GSViT.pkl"),
    "tensorrt only": ({"runtime__backend": "tensorrt", "runtime__allow_fallback": False}, "tensorrt"),
    "precision": (
        {"runtime__backend": "onnxruntime", "runtime__precision": "bf16", "runtime__allow_fallback": False},
        "bf16",
    ),
    "choice": ({"runtime__backend": "cuda"}, "runtime.backend"),
    "type": ({"input__depth": "many"}, "input.depth"),
    "range": ({"filter__switch_margin": 2.0}, "filter.switch_margin"),
    "order": ({"state__no_signal_after_s": 5.0}, "output.deadline_s"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_configure_that_cannot_work_fails_with_its_reason(graph: Graph, spoken: Spoken, case: str) -> None:
    parameters, names = FAILURES[case]
    rig = Rig(graph, **parameters)
    assert not graph.transition(rig.node, "configure")
    assert rig.node.state_label == "unconfigured"
    assert spoken.lines("configure failed", names)


def test_a_damaged_model_fails_and_a_repaired_one_configures(graph: Graph, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(find_model(MODEL).folder, folder)
    graph_file = folder / "model.onnx"
    whole = graph_file.read_bytes()
    graph_file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    rig = Rig(graph, model__path=str(folder))
    assert not graph.transition(rig.node, "configure")
    graph_file.write_bytes(whole)
    assert graph.transition(rig.node, "configure")


# Parameters -------------------------------------------------------------------------------------------------------


def test_parameters_that_need_a_configure_are_refused_while_configured(graph: Graph) -> None:
    rig = Rig(graph).up()
    (result,) = rig.node.set_parameters([Parameter("model.path", value="other")])
    assert not result.successful
    assert "cleanup" in result.reason
    assert rig.node.get_parameter("model.path").value == MODEL
    (result,) = rig.node.set_parameters([Parameter("state.no_signal_after_s", value=30.0)])
    assert not result.successful
    assert "output.deadline_s" in result.reason


def test_a_wrong_parameter_can_be_mended_without_a_restart(graph: Graph) -> None:
    rig = Rig(graph, runtime__backend="cuda")
    assert not graph.transition(rig.node, "configure")
    (result,) = rig.node.set_parameters([Parameter("runtime.backend", value="auto")])
    assert result.successful
    assert graph.transition(rig.node, "configure")


def test_every_parameter_is_described(graph: Graph) -> None:
    rig = Rig(graph)
    for name in rig.node.table.defaults:
        descriptor = rig.node.describe_parameter(name)
        assert len(descriptor.description) > 15
    assert rig.node.describe_parameter("filter.hold_s").floating_point_range[0].to_value == 600.0
    assert "openvino" in rig.node.describe_parameter("runtime.backend").additional_constraints


def test_an_unknown_parameter_is_named_with_a_suggestion(graph: Graph, spoken: Spoken) -> None:
    Rig(graph, filter__hold=1.0)
    assert spoken.lines("unknown parameter 'filter.hold'", "did you mean 'filter.hold_s'")


def test_silence_is_explained_with_topic_type_and_qos(graph: Graph, spoken: Spoken) -> None:
    rig = Rig(graph, input__transport="compressed", input__warn_after_s=0.5).up()
    wrong = graph.stranger()
    wrong.create_publisher(Image, "image/compressed", 10)
    wait_until(
        lambda: spoken.lines("no usable image", "/surg_perception/image/compressed", "sensor_msgs/msg/Image, reliable"),
        10,
        "a warning that names topic, type and QoS",
    )
    assert rig.node._worker.is_alive()


def test_qos_can_be_matched_to_the_publisher(graph: Graph) -> None:
    rig = Rig(graph, input__reliability="match").up()
    info = graph.client.get_subscriptions_info_by_topic("/surg_perception/image")
    assert [i.qos_profile.reliability.name for i in info if i.node_name == "phase"] == ["RELIABLE"]
    assert rig.node.state_label == "active"
