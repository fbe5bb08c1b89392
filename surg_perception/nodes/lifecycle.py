# SPDX-License-Identifier: Apache-2.0
"""What all nodes of the package share: a lifecycle node whose parameters come from its table."""

from __future__ import annotations

import resource
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import rclpy
from diagnostic_msgs.msg import DiagnosticStatus
from diagnostic_updater import Updater
from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor, SetParametersResult
from rclpy.clock import Clock, ClockType
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.parameter import Parameter as RosParameter
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.timer import Timer

from surg_perception.nodes.parameter_table import Parameter, ParameterTable

_CONFIGURED = ("inactive", "active")


class ConfigureError(RuntimeError):
    """A node cannot be configured; the message says what was found, what was expected and what to do."""


class PerceptionNode(LifecycleNode):
    """Lifecycle node with parameters from a table, diagnostics, and transitions that cannot leave it half done.

    A subclass overrides `configure`, `activate`, `deactivate` and `cleanup`. An exception in configure or
    activate is logged with its reason, what was built is given back, and the transition fails, so that the node
    is back in its former state; it never ends the process.

    Timers run by the steady clock: with use_sim_time the node's own clock stands still when /clock does, and silence
    must be told then too.
    """

    _steady_clock = Clock(clock_type=ClockType.STEADY_TIME)

    def __init__(self, table: ParameterTable, **kwargs: Any) -> None:
        super().__init__(table.node, namespace=kwargs.pop("namespace", None), **kwargs)
        self.table = table
        self.values: dict[str, Any] = {}
        self._refused_at_start: dict[str, str] = {}
        self._correcting = ""
        for parameter in table.parameters:
            self._declare(parameter)
        self._warn_unknown()
        self._guard_transitions()
        self.add_on_set_parameters_callback(self._validate)
        self._apply_after_set = hasattr(self, "add_post_set_parameters_callback")
        if self._apply_after_set:  # not in Humble
            self.add_post_set_parameters_callback(self._apply)
        # The period and use_fqn parameters stay with diagnostic_updater.
        self.updater = Updater(self)
        self.updater.setHardwareID(self.get_fully_qualified_name())
        self.updater.add("state", self._lifecycle_diagnostics)

    # Parameters -----------------------------------------------------------------------------------------------

    def _declare(self, parameter: Parameter) -> None:
        """Declare one parameter; an override that does not fit is kept as the reason why configure will fail."""
        descriptor = ParameterDescriptor(
            description=parameter.description + ("" if parameter.live else " Read at configure."),
            additional_constraints=f"one of: {', '.join(parameter.choices)}" if parameter.choices else "",
        )
        if parameter.minimum is not None and parameter.maximum is not None:
            if isinstance(parameter.default, float):
                descriptor.floating_point_range = [
                    FloatingPointRange(from_value=float(parameter.minimum), to_value=float(parameter.maximum))
                ]
            else:
                descriptor.integer_range = [
                    IntegerRange(from_value=int(parameter.minimum), to_value=int(parameter.maximum), step=1)
                ]
        value = parameter.default
        override = self._parameter_overrides.get(parameter.name)
        if override is not None:
            reason = parameter.fault(override.value)
            if reason:
                self._refused_at_start[parameter.name] = reason
            else:
                value = type(parameter.default)(override.value)
        self.declare_parameter(parameter.name, value, descriptor, ignore_override=True)
        self.values[parameter.name] = value

    def _warn_unknown(self) -> None:
        for text in self.table.unknown(self._parameter_overrides):
            self.get_logger().warning(f"ignored: {text}")

    def _validate(self, parameters: list[RosParameter]) -> SetParametersResult:
        ours = {p.name: p.value for p in parameters if p.name in self.table}
        if not ours:
            return SetParametersResult(successful=True)
        state = self.state_label
        for name in ours:
            if not self.table[name].live and state in _CONFIGURED and name != self._correcting:
                return SetParametersResult(
                    successful=False,
                    reason=f"{name} is read at configure and the node is {state}: clean the node up first "
                    f"(ros2 lifecycle set {self.get_fully_qualified_name()} cleanup)",
                )
        reason = self.table.fault({**self.values, **ours})
        if reason:
            return SetParametersResult(successful=False, reason=reason)
        if not self._apply_after_set:
            self._apply(parameters)
        return SetParametersResult(successful=True)

    def _apply(self, parameters: list[RosParameter]) -> None:
        ours = {p.name: p.value for p in parameters if p.name in self.table}
        if not ours:
            return
        for name in ours:
            self._refused_at_start.pop(name, None)
        self.values = {**self.values, **ours}
        if self.state_label in _CONFIGURED:
            self.apply_live_parameters()

    def correct_parameter(self, name: str, value: Any) -> None:
        """Make a parameter that is read at configure say what runs now; in the executor's thread."""
        self._correcting = name
        try:
            self.set_parameters([RosParameter(name, value=value)])
        finally:
            self._correcting = ""

    def apply_live_parameters(self) -> None:
        """Take over changed live parameters; called in the executor's thread while the node is configured."""

    @property
    def state_label(self) -> str:
        """Lifecycle state now: unconfigured, inactive, active, configuring, …"""
        return self._state_machine.current_state[1]

    # Transitions ----------------------------------------------------------------------------------------------

    def configure(self) -> None:
        """Check, load, warm up; slow is allowed. Raise ConfigureError to fail."""

    def activate(self) -> None:
        """Start taking frames; quick."""

    def deactivate(self) -> None:
        """Stop taking frames. Must not raise, and must work after a half-done activate."""

    def cleanup(self) -> None:
        """Give everything back. Must not raise, and must work after a half-done configure."""

    def _guard_transitions(self) -> None:
        """Refuse a transition that the state does not have; rclpy lets it end the process."""
        change_state = self._service_change_state.callback

        def guarded(request: Any, response: Any) -> Any:
            try:
                return change_state(request, response)
            except Exception as error:
                self.get_logger().warning(f"transition {request.transition.id} refused in {self.state_label}: {error}")
                response.success = False
                return response

        self._service_change_state.callback = guarded

    def _attempt(self, step: Callable[[], None], undo: Callable[[], None], what: str) -> TransitionCallbackReturn:
        try:
            step()
        except Exception as error:
            self.get_logger().error(f"{what} failed: {error}")
            if not isinstance(error, ConfigureError):
                self.get_logger().error(traceback.format_exc())
            undo()
            return TransitionCallbackReturn.FAILURE
        return TransitionCallbackReturn.SUCCESS

    def _configure_checked(self) -> None:
        reasons = list(self._refused_at_start.values())
        fault = self.table.fault(self.values)
        if fault:
            reasons.append(fault)
        if reasons:
            raise ConfigureError("; ".join(reasons))
        self.configure()

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        return self._attempt(self._configure_checked, self.cleanup, "configure")

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        super().on_activate(state)
        result = self._attempt(self.activate, self.deactivate, "activate")
        if result != TransitionCallbackReturn.SUCCESS:
            super().on_deactivate(state)
        return result

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        self.deactivate()
        return super().on_deactivate(state)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        self.cleanup()
        return super().on_cleanup(state)

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        self.deactivate()
        self.cleanup()
        return super().on_shutdown(state)

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        self.get_logger().error("a transition raised: back to unconfigured")
        self.deactivate()
        self.cleanup()
        return TransitionCallbackReturn.SUCCESS

    # Helpers --------------------------------------------------------------------------------------------------

    def create_timer(
        self, timer_period_sec: float, callback: Callable, callback_group: Any = None, clock: Any = None, **kwargs: Any
    ) -> Timer:
        """As rclpy's, by the steady clock unless another is given; the timer of the diagnostics comes from here too."""
        return super().create_timer(timer_period_sec, callback, callback_group, clock or self._steady_clock, **kwargs)

    @property
    def clock_missing(self) -> bool:
        """Whether the node waits for its first /clock (use_sim_time): its time is 0, and no age means anything."""
        clock = self.get_clock()
        return clock.ros_time_is_active and clock.now().nanoseconds == 0

    def _lifecycle_diagnostics(self, status: Any) -> Any:
        status.summary(DiagnosticStatus.OK, self.state_label)
        return status

    def image_qos(self, topic: str, depth: int) -> QoSProfile:
        """QoS for subscribing to images as the parameter input.reliability says; logs what publishes there."""
        publishers = self.get_publishers_info_by_topic(self.resolve_topic_name(topic))
        wanted = self.values["input.reliability"]
        reliable = wanted == "reliable" or (
            wanted == "match"
            and bool(publishers)
            and all(p.qos_profile.reliability == ReliabilityPolicy.RELIABLE for p in publishers)
        )
        return QoSProfile(
            depth=depth,
            reliability=ReliabilityPolicy.RELIABLE if reliable else ReliabilityPolicy.BEST_EFFORT,
            durability=DurabilityPolicy.VOLATILE,
        )

    def describe_publishers(self, topic: str) -> str:
        """Who publishes on topic, with type and QoS, for messages to people."""
        publishers = self.get_publishers_info_by_topic(self.resolve_topic_name(topic))
        if not publishers:
            return "nobody publishes there"
        return "; ".join(
            f"{p.node_namespace.rstrip('/')}/{p.node_name} publishes {p.topic_type}, "
            f"{p.qos_profile.reliability.name.lower()}, {p.qos_profile.durability.name.lower()}"
            for p in publishers
        )


def run(make: Callable[[], PerceptionNode]) -> None:
    """Entry point of a node's process: spin until the context is shut down, then give everything back."""
    rclpy.init(args=sys.argv)
    node = make()
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    try:
        executor.spin()
    except (KeyboardInterrupt, ExternalShutdownException):
        pass
    finally:
        node.deactivate()
        node.cleanup()
        executor.shutdown(timeout_sec=1.0)
        node.destroy_node()
        rclpy.try_shutdown()


def stamp_ns(message: Any) -> int:
    """Stamp of a message with a header, in nanoseconds."""
    return message.header.stamp.sec * 10**9 + message.header.stamp.nanosec


def process_memory_mib() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def join(thread: threading.Thread | None, timeout_s: float = 5.0) -> None:
    """Wait for a worker thread to end, if there is one."""
    if thread is not None and thread.is_alive() and thread is not threading.current_thread():
        thread.join(timeout_s)
