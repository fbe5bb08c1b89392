# SPDX-License-Identifier: Apache-2.0
"""The example consumer among real topics: what ends its trust, what brings it back, and that it can move nothing."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rclpy", reason="ROS 2 is not in the environment: `source setup.bash` first")

from conftest import Graph, Spoken, wait_until
from images import stamped
from rclpy.duration import Duration
from rclpy.parameter import Parameter
from rclpy.qos import DurabilityPolicy, LivelinessPolicy, QoSProfile
from surg_perception_msgs.msg import LatentFeatures, PhaseTrust, SurgicalPhase

from surg_perception.nodes import gate_node
from surg_perception.nodes.gate_node import GateNode
from surg_perception.stream.phase_gate import GateSettings, TrustReason

LATCHED = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
SOUND = {"state": SurgicalPhase.OK, "phase_id": 1, "phase": "dissection", "confidence": 0.9, "model_id": "m@1"}


def phase_publisher(node: Any, deadline_s: float = 0.5) -> Any:
    """A publisher of the phase with the QoS of the phase node."""
    deadline = Duration(seconds=deadline_s)
    qos = QoSProfile(
        depth=1, deadline=deadline, liveliness=LivelinessPolicy.AUTOMATIC, liveliness_lease_duration=deadline
    )
    return node.create_publisher(SurgicalPhase, "phase/phase", qos)


class Rig:
    """An active gate, and a stream of phases for it; times are long, as a busy machine needs."""

    def __init__(self, graph: Graph, **parameters: Any) -> None:
        self.graph = graph
        defaults = {"input__deadline_s": 5.0, "max_age_s": 20.0, "max_ahead_s": 1.0, "hold_s": 0.3}
        self.node = graph.start(GateNode, **{**defaults, **parameters})
        self.trusts: list[PhaseTrust] = graph.collect(PhaseTrust, "gate/trust")
        self.publisher = phase_publisher(graph.client)
        self.latents = graph.client.create_publisher(LatentFeatures, "phase/latent", 1)
        self.fields: dict[str, Any] = {}
        self.latent_model = ""
        self.offset_s = 0.0
        self._flow = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._feed, daemon=True)

    def __enter__(self) -> Rig:
        assert self.graph.transition(self.node, "configure", "activate")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(5.0)

    def _feed(self) -> None:
        while not self._stop.wait(0.04):
            if self._flow.is_set():
                now_ns = self.graph.client.get_clock().now().nanoseconds + round(self.offset_s * 1e9)
                if self.latent_model:
                    self.latents.publish(stamped(LatentFeatures(model_id=self.latent_model), now_ns))
                self.publisher.publish(stamped(SurgicalPhase(**{**SOUND, **self.fields}), now_ns))

    def flow(self, **fields: Any) -> None:
        self.fields = fields
        self._flow.set()

    def pause(self) -> None:
        self._flow.clear()

    def until(self, reason: TrustReason, within_s: float = 30.0) -> PhaseTrust:
        """The first decision from now on with this reason."""
        start = len(self.trusts)
        return wait_until(
            lambda: next((t for t in self.trusts[start:] if t.reason == reason), None),
            within_s,
            f"{reason.name}; the last decision was: {self.trusts[-1].reason_text if self.trusts else 'none'}",
        )


@pytest.fixture
def rig(graph: Graph) -> Iterator[Rig]:
    with Rig(graph) as rig:
        yield rig


def test_the_reasons_are_those_of_the_message() -> None:
    constants = {name for name in dir(PhaseTrust) if name.isupper() and isinstance(getattr(PhaseTrust, name), int)}
    assert {name: getattr(PhaseTrust, name) for name in constants} == {r.name: r.value for r in TrustReason}


def test_parameters_default_to_those_of_the_core(graph: Graph) -> None:
    assert graph.start(GateNode)._settings() == GateSettings()


def test_a_sound_phase_is_trusted_and_the_first_bad_message_ends_it(rig: Rig) -> None:
    assert rig.until(TrustReason.NO_PHASE).operating_state == "FAULT"
    rig.flow()
    trust = rig.until(TrustReason.TRUSTED)
    assert (trust.trusted, trust.phase_id, trust.phase, trust.operating_state) == (True, 1, "dissection", "ENABLED")
    assert trust.model_id == "m@1"
    assert trust.confidence == pytest.approx(0.9)
    assert trust.header.frame_id == "endoscope"
    for fields, reason in (
        ({"state": SurgicalPhase.STALE}, TrustReason.STATE),
        ({"state": SurgicalPhase.NO_SIGNAL, "phase_id": -1}, TrustReason.STATE),
        ({"confidence": 0.2}, TrustReason.CONFIDENCE),
        ({"phase_id": 2, "phase": "clipping"}, TrustReason.SETTLING),
    ):
        rig.flow(**fields)
        trust = rig.until(reason)
        assert (trust.trusted, trust.phase_id, trust.phase, trust.operating_state) == (False, -1, "", "PAUSED")
        rig.flow()
        rig.until(TrustReason.TRUSTED)


def test_stamps_of_the_past_and_of_the_future_are_not_trusted(rig: Rig) -> None:
    rig.offset_s = -3600.0
    rig.flow()
    assert rig.until(TrustReason.OLD).age_s == pytest.approx(3600.0, abs=20.0)
    rig.offset_s = 3600.0
    assert "ahead of the clock" in rig.until(TrustReason.STAMP).reason_text
    rig.offset_s = 0.0
    rig.until(TrustReason.TRUSTED)


def test_another_model_is_trusted_only_when_it_is_accepted(rig: Rig) -> None:
    rig.flow()
    rig.until(TrustReason.TRUSTED)
    rig.flow(model_id="m@2")
    assert "m@2 instead of m@1" in rig.until(TrustReason.MODEL_CHANGED).reason_text
    (result,) = rig.node.set_parameters([Parameter("model.id", value="m@2")])
    assert result.successful
    rig.until(TrustReason.TRUSTED)
    rig.flow()
    rig.until(TrustReason.MODEL_CHANGED)


def test_silence_is_told_by_the_deadline_event_alone(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GateNode, "_liveliness_changed", lambda node, event: None)
    with Rig(graph, input__deadline_s=1.0, max_age_s=3600.0) as rig:
        rig.flow()
        rig.until(TrustReason.TRUSTED)
        rig.node._timer.cancel()
        rig.pause()
        rig.until(TrustReason.SILENT)


def test_silence_is_told_by_the_own_watchdog_alone(
    graph: Graph, spoken: Spoken, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(**_: Any) -> None:
        raise gate_node.UnsupportedEventTypeError("no such event")

    monkeypatch.setattr(gate_node, "SubscriptionEventCallbacks", unsupported)
    with Rig(graph, input__deadline_s=1.0, max_age_s=3600.0) as rig:
        rig.flow()
        rig.until(TrustReason.TRUSTED)
        rig.pause()
        rig.until(TrustReason.SILENT)
        assert spoken.lines("own watchdog is alone")


def test_a_second_publisher_and_one_that_left_end_trust(rig: Rig, graph: Graph) -> None:
    rig.flow()
    rig.until(TrustReason.TRUSTED)
    stranger = graph.stranger()
    second = phase_publisher(stranger)
    rig.until(TrustReason.AMBIGUOUS)
    stranger.destroy_publisher(second)
    rig.until(TrustReason.TRUSTED)
    rig.pause()
    graph.client.destroy_publisher(rig.publisher)
    assert rig.until(TrustReason.LOST).operating_state == "FAULT"


def test_latents_are_no_substitute_for_phases_and_can_be_required(graph: Graph) -> None:
    with Rig(graph, latent__required=True) as rig:
        for _ in range(5):
            rig.latents.publish(stamped(LatentFeatures(model_id="m@0"), graph.client.get_clock().now().nanoseconds))
        rig.until(TrustReason.NO_PHASE)
        rig.flow()
        rig.until(TrustReason.NO_LATENT)
        rig.latent_model = "m@1"
        rig.until(TrustReason.TRUSTED)
        rig.latent_model = "m@2"
        rig.until(TrustReason.NO_LATENT)


def test_a_publisher_that_offers_too_little_is_named(graph: Graph, spoken: Spoken) -> None:
    rig = Rig(graph, input__deadline_s=0.2)
    assert graph.transition(rig.node, "configure", "activate")
    wait_until(lambda: spoken.lines("longer deadline than input.deadline_s, 0.2 s"), 20, "the reason")


def test_the_decision_is_latched_and_ends_with_the_node_s_activity(rig: Rig, graph: Graph) -> None:
    rig.flow()
    rig.until(TrustReason.TRUSTED)
    late = graph.collect(PhaseTrust, "gate/trust", LATCHED)
    wait_until(lambda: late, 10, "the decision for a late subscriber")
    assert graph.transition(rig.node, "deactivate")
    last = wait_until(lambda: rig.trusts[-1].reason == TrustReason.NOT_ACTIVE and rig.trusts[-1], 10, "the last word")
    assert (last.trusted, last.phase_id, last.operating_state) == (False, -1, "DISABLED")
    assert math.isnan(last.age_s)
    count = len(rig.trusts)
    assert graph.transition(rig.node, "activate")
    wait_until(lambda: len(rig.trusts) > count, 10, "a decision after activation")
    rig.until(TrustReason.TRUSTED)


def test_the_gate_can_tell_and_nothing_else(rig: Rig, graph: Graph) -> None:
    rig.flow()
    rig.until(TrustReason.TRUSTED)
    name = ("gate", "/surg_perception")
    stranger = graph.stranger()
    published: dict[str, list[str]] = {}

    def discovered() -> bool:
        published.update(
            (topic, types)
            for topic, types in stranger.get_topic_names_and_types()
            if any((p.node_name, p.node_namespace) == name for p in stranger.get_publishers_info_by_topic(topic))
        )
        return len(published) >= 5

    wait_until(discovered, 20, "the gate's five publishers")
    assert published == {
        "/surg_perception/gate/trust": ["surg_perception_msgs/msg/PhaseTrust"],
        "/surg_perception/gate/transition_event": ["lifecycle_msgs/msg/TransitionEvent"],
        "/diagnostics": ["diagnostic_msgs/msg/DiagnosticArray"],
        "/rosout": ["rcl_interfaces/msg/Log"],
        "/parameter_events": ["rcl_interfaces/msg/ParameterEvent"],
    }
    assert not stranger.get_client_names_and_types_by_node(*name), "a client could ask somebody to move"


def test_the_reader_in_the_docs_gives_the_phase_while_it_is_trusted_and_fresh(rig: Rig, graph: Graph) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "consumer.md").read_text()
    names: dict[str, Any] = {}
    exec(page.split("```python\n")[1].split("```")[0].replace("LIMIT_S = 0.5", "LIMIT_S = 5.0"), names)
    reader = names["PhaseReader"](graph.client)
    assert reader.phase is None
    rig.flow()
    assert wait_until(lambda: reader.phase, 30, "the phase") == "dissection"
    rig.flow(state=SurgicalPhase.UNCERTAIN)
    wait_until(lambda: reader.phase is None, 30, "no phase")
    rig.flow()
    wait_until(lambda: reader.phase, 30, "the phase")
    rig.node._timer.cancel()
    rig.flow()
    wait_until(lambda: reader.phase is None, 30, "no phase once the gate is silent")
