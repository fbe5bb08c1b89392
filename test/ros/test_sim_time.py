# SPDX-License-Identifier: Apache-2.0
"""Nodes with use_sim_time: /clock that comes late, stands still, jumps back as a bag that loops, or never comes."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("rclpy", reason="ROS 2 is not in the environment: `source setup.bash` first")

from conftest import Graph, Spoken, wait_until
from diagnostic_msgs.msg import DiagnosticArray
from images import raw_image, stamped
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import Image
from surg_perception_msgs.msg import SurgicalPhase

from surg_perception.data.phantom import Phantom
from surg_perception.nodes.lifecycle import stamp_ns
from surg_perception.nodes.overlay_node import OverlayNode
from surg_perception.nodes.phase_node import PhaseNode
from surg_perception.nodes.vqa_node import VqaNode

RECORDED_NS = 1_600_000_000 * 10**9
"""A bag of some years ago."""
CLOCK_QOS = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
"""That of `ros2 bag play --clock` (rclcpp::ClockQoS)."""


class Replayed:
    """A phase node that takes its time from the /clock of this test."""

    def __init__(self, graph: Graph, **parameters: Any) -> None:
        self.node = graph.start(PhaseNode, use_sim_time=True, input__reliability="reliable", **parameters)
        self.phases: list[SurgicalPhase] = graph.collect(SurgicalPhase, "phase/phase")
        self._clock = graph.client.create_publisher(Clock, "/clock", CLOCK_QOS)
        self._images = graph.client.create_publisher(Image, "image", 10)
        self._picture = Phantom(width=160, height=120, seed=5, duration_s=60.0, rate_hz=5.0).frame(150)[0]
        assert graph.transition(self.node, "configure", "activate")
        wait_until(lambda: self._images.get_subscription_count() == 1, 30, "the node's image subscription")

    def clock(self, bag_s: float) -> None:
        """Let the node's time be so many seconds after the start of the bag."""
        wanted = RECORDED_NS + round(bag_s * 1e9)
        message = Clock()
        message.clock.sec, message.clock.nanosec = divmod(wanted, 10**9)

        def taken() -> bool:
            self._clock.publish(message)
            return bool(self.node.get_clock().now().nanoseconds == wanted)

        wait_until(taken, 30, f"/clock at {bag_s} s in the node")

    def image(self, bag_s: float) -> SurgicalPhase:
        """Send the image of this time of the bag; its phase."""
        before = self.node._counts.processed
        wanted = RECORDED_NS + round(bag_s * 1e9)
        self._images.publish(stamped(raw_image(self._picture), wanted))
        return wait_until(
            lambda: next((p for p in self.phases[::-1] if stamp_ns(p) == wanted and p.frames_processed > before), None),
            30,
            f"the phase of the image at {bag_s} s",
        )


def test_a_bag_that_is_played_twice_gives_the_same_phases_twice(graph: Graph) -> None:
    replayed = Replayed(graph)

    def play() -> list[SurgicalPhase]:
        seen = []
        for step in range(5):
            replayed.clock(step * 0.2 + 0.01)
            seen.append(replayed.image(step * 0.2))
        return seen

    first, second = play(), play()
    assert {p.state for p in first + second} == {SurgicalPhase.OK}
    for one, other in zip(first, second, strict=True):
        assert (one.phase, one.header.stamp) == (other.phase, other.header.stamp)
        assert one.confidence == pytest.approx(other.confidence, abs=1e-6), "the filter remembers the first round"
        assert 0 <= other.latency_ms < 100, "by /clock, which stands still while an image is worked on"


def test_age_is_by_the_clock_and_what_is_far_ahead_of_it_is_stale(graph: Graph, spoken: Spoken) -> None:
    replayed = Replayed(graph)
    replayed.clock(10.0)
    assert replayed.image(9.7).state == SurgicalPhase.OK
    assert replayed.image(9.0).state == SurgicalPhase.STALE
    assert replayed.image(10.02).state == SurgicalPhase.OK, "/clock comes in steps, images in between"
    ahead = replayed.image(20.0)
    assert ahead.state == SurgicalPhase.STALE, "after a loop, an image of the bag's end"
    assert ahead.latency_ms == pytest.approx(-10_000, abs=1)
    wait_until(lambda: spoken.lines("STALE", "1.0 s old by their stamps"), 10, "the reason in the log")


def test_before_the_first_clock_images_are_stale_and_the_log_says_why(graph: Graph, spoken: Spoken) -> None:
    replayed = Replayed(graph)
    assert replayed.image(1.0).state == SurgicalPhase.STALE
    wait_until(lambda: spoken.lines("STALE", "nothing has come on /clock"), 10, "the reason in the log")
    replayed.clock(2.0)
    assert replayed.image(2.0).state == SurgicalPhase.OK


@pytest.mark.parametrize("clock_comes", [True, False], ids=["stands still", "never comes"])
def test_silence_is_told_though_the_clock_stands_still(graph: Graph, clock_comes: bool) -> None:
    diagnostics: list[DiagnosticArray] = graph.collect(DiagnosticArray, "/diagnostics")
    replayed = Replayed(graph)
    if clock_comes:
        replayed.clock(5.0)
        replayed.image(5.0)
    before = len(replayed.phases)
    wait_until(
        lambda: sum(p.state == SurgicalPhase.NO_SIGNAL for p in replayed.phases[before:]) >= 3,
        30,
        "NO_SIGNAL, again and again",
    )
    count = len(diagnostics)
    wait_until(lambda: len(diagnostics) >= count + 2, 30, "diagnostics that go on")


def test_every_timer_of_the_nodes_runs_by_the_steady_clock(graph: Graph) -> None:
    for node_class in (PhaseNode, VqaNode, OverlayNode):
        node = graph.start(node_class, use_sim_time=True)
        timers = list(node.timers)
        assert timers, "at least that of the diagnostics"
        assert all(timer.clock.clock_type.name == "STEADY_TIME" for timer in timers), node.get_name()
