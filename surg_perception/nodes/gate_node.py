# SPDX-License-Identifier: Apache-2.0
"""Node `gate`: whether a controller may use the surgical phase now. An example of a consumer, to copy and change.

It reads and tells; it has no publisher, service or action that could move anything (docs/consumer.md).
"""

from __future__ import annotations

import time
from typing import Any

from diagnostic_msgs.msg import DiagnosticStatus
from rclpy.duration import Duration
from rclpy.qos import DurabilityPolicy, LivelinessPolicy, QoSProfile
from surg_perception_msgs.msg import LatentFeatures, PhaseTrust, SurgicalPhase

from surg_perception.nodes.lifecycle import PerceptionNode, run, stamp_ns
from surg_perception.nodes.parameter_table import GATE
from surg_perception.stream.phase_gate import GateSettings, PhaseGate, SeenPhase, Trust, TrustReason

try:
    from rclpy.event_handler import SubscriptionEventCallbacks, UnsupportedEventTypeError
except ImportError:  # Humble
    from rclpy.qos_event import SubscriptionEventCallbacks, UnsupportedEventTypeError

LEVELS = {"ENABLED": DiagnosticStatus.OK, "PAUSED": DiagnosticStatus.WARN, "FAULT": DiagnosticStatus.ERROR}


class GateNode(PerceptionNode):
    """Subscribes to `phase/phase`, where required to `phase/latent`; publishes `~/trust`.

    The middleware's events (deadline missed, liveliness lost) and a timer of the steady clock watch over silence,
    each on its own: not every middleware has the events.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(GATE, **kwargs)
        self._publisher = None
        self._subscriptions_: list[Any] = []
        self._timer = None
        self._told: tuple[str, int, int] | None = None
        self._times_lost = 0
        self.updater.add("trust", self._trust_diagnostics)

    def configure(self) -> None:
        deadline = Duration(seconds=self.values["output.deadline_s"])
        qos = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL, deadline=deadline)
        self._publisher = self.create_lifecycle_publisher(PhaseTrust, "~/trust", qos)

    def activate(self) -> None:
        self._gate = PhaseGate(self._settings())
        self._newest = SurgicalPhase()
        self._told, self._times_lost = None, 0
        deadline = Duration(seconds=self.values["input.deadline_s"])
        watched = QoSProfile(
            depth=1, deadline=deadline, liveliness=LivelinessPolicy.AUTOMATIC, liveliness_lease_duration=deadline
        )
        arguments = (SurgicalPhase, "phase/phase", self._take_phase, watched)
        try:
            events = SubscriptionEventCallbacks(
                deadline=self._deadline_missed, liveliness=self._liveliness_changed, incompatible_qos=self._qos_refused
            )
            phases = self.create_subscription(*arguments, event_callbacks=events)
        except UnsupportedEventTypeError:
            self.get_logger().info("no deadline or liveliness events from this middleware: the own watchdog is alone")
            phases = self.create_subscription(*arguments)
        self._subscriptions_ = [phases]
        if self.values["latent.required"]:
            latents = self.create_subscription(LatentFeatures, "phase/latent", self._take_latent, QoSProfile(depth=1))
            self._subscriptions_.append(latents)
        self._timer = self.create_timer(self.values["output.deadline_s"] / 5, self._look)
        self._look()

    def _settings(self) -> GateSettings:
        v = self.values
        return GateSettings(
            deadline_s=v["input.deadline_s"],
            max_age_s=v["max_age_s"],
            max_ahead_s=v["max_ahead_s"],
            leave_below=v["confidence.leave_below"],
            return_above=v["confidence.return_above"],
            hold_s=v["hold_s"],
            hold_messages=v["hold_messages"],
            model_id=v["model.id"],
            latent_required=v["latent.required"],
        )

    def apply_live_parameters(self) -> None:
        if self._timer is not None:
            self._gate.settings = self._settings()

    def deactivate(self) -> None:
        for subscription in self._subscriptions_:
            self.destroy_subscription(subscription)
        self._subscriptions_ = []
        if self._timer is not None:
            self.destroy_timer(self._timer)
            self._timer = None
            text = "the gate was deactivated"
            self._tell(Trust(TrustReason.NOT_ACTIVE, text, -1, "", float("nan"), 0.0))

    def cleanup(self) -> None:
        if self._publisher is not None:
            self.destroy_lifecycle_publisher(self._publisher)
            self._publisher = None

    # What comes in --------------------------------------------------------------------------------------------

    def _take_phase(self, message: SurgicalPhase) -> None:
        self._newest = message
        seen = SeenPhase(
            stamp_ns(message), message.state, message.phase_id, message.phase, message.confidence, message.model_id
        )
        trust = self._gate.see_phase(seen, self.get_clock().now().nanoseconds, time.monotonic())
        if self._is_news(trust):
            self._tell(trust)

    def _take_latent(self, message: LatentFeatures) -> None:
        self._gate.see_latent(stamp_ns(message), message.model_id)

    def _deadline_missed(self, event: Any) -> None:
        self._gate.miss_deadline()
        self._look()

    def _liveliness_changed(self, event: Any) -> None:
        self._gate.publishers = event.alive_count
        self._look()

    def _qos_refused(self, event: Any) -> None:
        self.get_logger().error(
            f"a publisher of {self._subscriptions_[0].topic_name} offers a longer deadline than input.deadline_s, "
            f"{self.values['input.deadline_s']:g} s, or less reliability: nothing is received from it. Set "
            "input.deadline_s to at least the phase node's output.deadline_s"
        )

    # What goes out --------------------------------------------------------------------------------------------

    def _look(self) -> None:
        self._tell(self._gate.decide(self.get_clock().now().nanoseconds, time.monotonic()))

    def _is_news(self, trust: Trust) -> bool:
        return (trust.operating_state, trust.reason, trust.phase_id) != self._told

    def _tell(self, trust: Trust) -> None:
        if not self.context.ok():
            return
        if self._is_news(trust):
            state, before = trust.operating_state, self._told[0] if self._told else ""
            if trust.trusted:
                self.get_logger().info(f"trusted: {trust.text}")
            elif before == "ENABLED":
                self._times_lost += 1
                self.get_logger().warning(f"no longer trusted: {trust.text}")
            elif state == "FAULT":
                self.get_logger().warning(f"not trusted: {trust.text}", throttle_duration_sec=5.0)
            self._told = (state, trust.reason, trust.phase_id)
        self._publisher.publish(
            PhaseTrust(
                header=self._newest.header,
                operating_state=trust.operating_state,
                trusted=trust.trusted,
                reason=int(trust.reason),
                reason_text=trust.text,
                phase_id=trust.phase_id,
                phase=trust.phase,
                confidence=self._newest.confidence,
                age_s=trust.age_s,
                held_s=trust.held_s,
                model_id=self._newest.model_id,
            )
        )

    def _trust_diagnostics(self, status: Any) -> Any:
        if self._timer is None:
            status.summary(DiagnosticStatus.OK, self.state_label)
            return status
        trust = self._gate.decide(self.get_clock().now().nanoseconds, time.monotonic())
        status.summary(LEVELS[trust.operating_state], f"{trust.reason.name}: {trust.text}")
        status.add("age_s", f"{trust.age_s:.3f}")
        status.add("trust_lost", str(self._times_lost))
        status.add("model_id", self._newest.model_id)
        alive = self._gate.publishers
        status.add("publishers_alive", "unknown" if alive is None else str(alive))
        return status


def main() -> None:
    """Entry point of `ros2 run surg_perception gate_node`."""
    run(GateNode)
