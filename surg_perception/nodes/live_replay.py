# SPDX-License-Identifier: Apache-2.0
"""Plays a bag's images through a running node `phase`, with /clock from the bag's time, and notes what came of each."""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import rclpy
from lifecycle_msgs.srv import GetState
from rcl_interfaces.srv import GetParameters
from rclpy.clock import Clock as RclpyClock
from rclpy.clock import ClockType
from rclpy.executors import SingleThreadedExecutor
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.signals import SignalHandlerOptions
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import CompressedImage, Image
from surg_perception_msgs.msg import LatentFeatures, PhaseLabels, SurgicalPhase

from surg_perception.data.bags import BagError, BagImage, BagReader
from surg_perception.nodes.ask_client import counted_interrupts
from surg_perception.nodes.dds_profile import loaded_profile
from surg_perception.nodes.lifecycle import stamp_ns

Wait = Callable[[Callable[[], Any], float], Any]
DISCOVERY_S = 3.0
CLOCK_RATE_HZ = 40.0
CLOCK_QOS = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
"""Rate and QoS of /clock as `ros2 bag play --clock` has them."""
SETTLE_S = 0.25
"""So long /clock shows a new time before an image of that time, after a jump: it is another topic, in no order."""
JUMP_S = 0.2
RESEND_AFTER_S = 1.0
RESENDS = 3
QUIET_S = 1.5
LEAST_WAIT_S = 0.002
FORGOTTEN_S = 25.0
"""DDS forgets a participant that was killed after its lease, 20 s with Fast DDS."""
IMAGE_TYPES = {"sensor_msgs/msg/Image": Image, "sensor_msgs/msg/CompressedImage": CompressedImage}
TRANSPORTS = {"sensor_msgs/msg/Image": "raw", "sensor_msgs/msg/CompressedImage": "compressed"}


class LiveReplayError(RuntimeError):
    """The replay cannot go on. One line: what was found, what was expected, what to do."""


@dataclass(frozen=True)
class LiveSettings:
    """How to play.

    Attributes:
        namespace: of the node `phase`.
        rate: times real time; None: in lockstep, the next image when the phase of the one before has come.
        timeout_s: longest wait for the node's answer to an image.
        start_limit_s: longest wait for the node to be there and active.
        late_ms: a phase that takes longer from sending the image is late; None: the node's state.max_age_s.
    """

    namespace: str = "surg_perception"
    rate: float | None = None
    timeout_s: float = 30.0
    start_limit_s: float = 10.0
    late_ms: float | None = None


@dataclass
class Played:
    """One image of the bag and what the node said of it.

    Attributes:
        number: of the image in the bag, from 0.
        header: of the image, as the bag has it.
        phase: the node's message; None where none came.
        latent_rms: root mean square of the latent; None where none came, or a pooled one.
        latency_ms: from sending the image to its phase, by the steady clock; NaN without one.
        sent: how often it was sent, once unless it did not arrive.
        fate: "answered", "rejected" (the node refused it), or "missing".
    """

    number: int
    image_stamp_ns: int
    log_ns: int
    header: Any
    sent_s: float = 0.0
    phase: SurgicalPhase | None = None
    latent_rms: float | None = None
    latency_ms: float = float("nan")
    sent: int = 1
    fate: str = "missing"


@dataclass
class LiveResult:
    """What came of a replay, whole or cut short.

    Attributes:
        labels: what the node published on ~/labels; None if nothing.
        max_age_s: the node's state.max_age_s.
        received, processed, replaced, rejected: by the node's own counts, during this replay.
        input_sha256: of the bytes of the images that were sent, in their order.
        behind_s: how late the player itself sent an image at most.
        ended: "end of the bag", "interrupted", or why the replay could not go on.
    """

    topic: str = ""
    labels: PhaseLabels | None = None
    max_age_s: float = 0.0
    late_ms: float = 0.0
    images: list[Played] = field(default_factory=list)
    received: int = 0
    processed: int = 0
    replaced: int = 0
    rejected: int = 0
    input_sha256: str = ""
    behind_s: float = 0.0
    ended: str = "end of the bag"
    interrupted: bool = False
    failed: bool = False

    @property
    def answered(self) -> list[Played]:
        """Images with a phase, in the bag's order."""
        return [one for one in self.images if one.phase is not None]

    @property
    def resent(self) -> int:
        """How often an image had to be sent again."""
        return sum(one.sent - 1 for one in self.images)

    @property
    def lost(self) -> int:
        """Images that were sent and did not reach the node."""
        return max(0, len(self.images) + self.resent - self.received)

    @property
    def late(self) -> int:
        """Images whose phase took longer than late_ms."""
        return sum(one.latency_ms > self.late_ms for one in self.answered)

    @property
    def states(self) -> Counter[int]:
        """How many phases have which state."""
        return Counter(one.phase.state for one in self.images if one.phase is not None)

    def latency_ms(self, percent: float) -> float:
        """Percentile of the latencies; NaN without any."""
        latencies = [one.latency_ms for one in self.answered]
        return float(np.percentile(latencies, percent)) if latencies else float("nan")


def replay_live(
    bag: BagReader,
    settings: LiveSettings,
    *,
    tell: Callable[[str], None] = lambda text: None,
    check: Callable[[], None] = lambda: None,
    on_image: Callable[[LiveResult], None] = lambda result: None,
) -> LiveResult:
    """Play an open bag.

    Args:
        tell: given a line for the user now and then.
        check: called often; raises LiveReplayError where going on is of no use.
        on_image: called after each image, with the result so far.

    Returns:
        The result, also where it was cut short: `ended` says why, `interrupted` by Ctrl-C, `failed` by an error.

    Raises:
        LiveReplayError: nothing could be played: no such node, not active, by another clock, on another transport.
    """
    with _joined(settings.namespace, check, tell) as (node, wait):
        player = _Player(node, wait, bag, settings)
        player.prepare()
        return player.play(on_image)


def check_free(namespace: str) -> None:
    """Raise LiveReplayError where there is a node `phase` in the namespace already, for who wants to launch one."""
    with _joined(namespace) as (node, wait):
        seen = _PhaseNodeSeen(node, wait, namespace)
        if wait(lambda: seen.count, DISCOVERY_S) and not wait(lambda: not seen.count, FORGOTTEN_S):
            raise LiveReplayError(
                f"there is a node {seen.name} already: stop it, or leave out --launch to play through it"
            )


@contextmanager
def _joined(
    namespace: str, check: Callable[[], None] = lambda: None, tell: Callable[[str], None] = lambda text: None
) -> Iterator[tuple[Any, Wait]]:
    """A node in a context of its own, and what lets callbacks run until a condition holds or time is up.

    The latter gives the condition's last value, and raises KeyboardInterrupt after Ctrl-C and what `check` raises.
    """
    with counted_interrupts() as interrupts, ExitStack() as undo:
        if note := undo.enter_context(loaded_profile()):
            tell(note)
        context = rclpy.Context()
        rclpy.init(context=context, signal_handler_options=SignalHandlerOptions.NO)
        undo.callback(rclpy.shutdown, context=context)
        node = rclpy.create_node(f"replay_{os.getpid()}", namespace=namespace, context=context)
        undo.callback(node.destroy_node)
        executor = SingleThreadedExecutor(context=context)
        undo.callback(executor.shutdown, timeout_sec=1.0)
        executor.add_node(node)

        def wait(condition: Callable[[], Any], limit_s: float) -> Any:
            end_s = time.monotonic() + limit_s
            while not (value := condition()):
                left_s = end_s - time.monotonic()
                if left_s <= 0:
                    return value
                executor.spin_once(timeout_sec=min(left_s, 0.1))
                if interrupts:
                    raise KeyboardInterrupt
                check()
            return value

        yield node, wait


class _PhaseNodeSeen:
    """The node `phase` from outside: is it there, active, by which clock, on which topic."""

    def __init__(self, node: Any, wait: Wait, namespace: str) -> None:
        self._node, self._wait = node, wait
        self.namespace = "/" + namespace.strip("/")
        self.name = f"{self.namespace.rstrip('/')}/phase"

    def find(self, limit_s: float) -> None:
        """Wait for it; raise LiveReplayError if it does not come."""
        if not self._wait(lambda: self.count, limit_s):
            others = [
                f"{space.rstrip('/')}/phase"
                for name, space in self._node.get_node_names_and_namespaces()
                if name == "phase"
            ]
            hint = f"; there is {', '.join(others)}: name its --namespace" if others else ""
            raise LiveReplayError(
                f"there is no node {self.name} in ROS domain {os.environ.get('ROS_DOMAIN_ID', '0')}{hint}; start it "
                "with `ros2 launch surg_perception pipeline.launch.py use_sim_time:=true`, or let --launch do so"
            )

    def check_alone(self) -> None:
        """Raise LiveReplayError if there are two of its name; one that was killed stays listed for a while."""
        if not self._wait(lambda: self.count == 1, FORGOTTEN_S):
            raise LiveReplayError(
                f"{self.count} nodes are called {self.name}: stop all but one, their answers would mix"
            )

    def check_alive(self) -> None:
        """Raise LiveReplayError where it has gone."""
        if not self.count:
            raise LiveReplayError(f"{self.name} has gone during the replay: its log, or that of the launch, says why")

    def wait_until_active(self, limit_s: float) -> None:
        """Raise LiveReplayError with the state it is in where that does not become active in time."""
        end_s, label = time.monotonic() + limit_s, ""
        while label != "active":
            # A node that is being configured answers afterwards.
            left_s = max(5.0, end_s - time.monotonic())
            response = self._call(GetState, "get_state", GetState.Request(), left_s)
            label = response.current_state.label
            if label != "active" and time.monotonic() > end_s:
                step = "configure, then activate" if label == "unconfigured" else "activate"
                raise LiveReplayError(
                    f"{self.name} is {label}, expected active: ros2 lifecycle set {self.name} {step} "
                    "(pipeline.launch.py does it by itself; its log says why if it did not)"
                )
            if label != "active":
                self._wait(lambda: False, 0.3)

    def parameters(self, *names: str) -> list[Any]:
        """Values of parameters, in the order of the names."""
        request = GetParameters.Request(names=list(names))
        values = self._call(GetParameters, "get_parameters", request, 10.0).values
        return [rclpy.parameter.parameter_value_to_python(value) for value in values]

    def image_topic(self, msgtype: str) -> str:
        """Where it takes images of this type; raise LiveReplayError where it takes those of the other."""
        (transport,) = self.parameters("input.transport")

        def topics() -> list[str]:
            names = [name for name, kinds in self._node.get_topic_names_and_types() if msgtype in kinds]
            return [name for name in names if self.subscribes_to(name)]

        if transport != TRANSPORTS[msgtype]:
            raise LiveReplayError(
                f"the bag's images are {msgtype}, and {self.name} listens to transport '{transport}': launch it with "
                f"transport:={TRANSPORTS[msgtype]}"
            )
        if not self._wait(topics, 10.0):
            raise LiveReplayError(f"{self.name} is active and subscribes to no {msgtype}; its log should say why")
        return topics()[0]

    def subscribes_to(self, topic: str) -> bool:
        """Whether it is listed among those who do."""
        listed = self._node.get_subscriptions_info_by_topic(topic)
        return any((one.node_name, one.node_namespace) == ("phase", self.namespace) for one in listed)

    @property
    def count(self) -> int:
        """How many nodes of its name are listed."""
        return self._node.get_node_names_and_namespaces().count(("phase", self.namespace))

    def _call(self, kind: type, service: str, request: Any, limit_s: float) -> Any:
        client = self._node.create_client(kind, f"{self.name}/{service}")
        try:
            end_s = time.monotonic() + limit_s
            while time.monotonic() < end_s:
                if not self._wait(client.service_is_ready, end_s - time.monotonic()):
                    break
                # An answer given before the node has discovered this client is lost: ask again.
                future = client.call_async(request)
                if self._wait(future.done, min(3.0, end_s - time.monotonic())):
                    return future.result()
                client.remove_pending_request(future)
        finally:
            self._node.destroy_client(client)
        raise LiveReplayError(
            f"{self.name} is there and does not answer {service} within {limit_s:.0f} s: it is still loading its "
            "model, or hangs; look at its log"
        )


class _Player:
    """The sending side; everything runs in one thread, callbacks while it waits."""

    def __init__(self, node: Any, wait: Wait, bag: BagReader, settings: LiveSettings) -> None:
        self._node, self._wait, self._bag, self._settings = node, wait, bag, settings
        self._seen = _PhaseNodeSeen(node, wait, settings.namespace)
        self._result = LiveResult()
        self._newest: Any = None
        self._newest_s = 0.0
        self._before: Any = None
        self._answered = (0, 0)
        self._answered_s = 0.0
        self._waiting: dict[int, deque[Played]] = {}
        self._rms: dict[int, float] = {}
        self._digest = hashlib.sha256()
        self._bag_now_ns: Callable[[], int] = lambda: 0
        self._publisher: Any = None
        self._clock = node.create_publisher(Clock, "/clock", CLOCK_QOS)
        # The executor sleeps until something happens: this is what happens at least.
        steady = RclpyClock(clock_type=ClockType.STEADY_TIME)
        node.create_timer(1.0 / CLOCK_RATE_HZ, self._tick, clock=steady)
        latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        many = QoSProfile(depth=1000)
        node.create_subscription(SurgicalPhase, f"{self._seen.name}/phase", self._take, many)
        node.create_subscription(LatentFeatures, f"{self._seen.name}/latent", self._take_latent, many)
        node.create_subscription(PhaseLabels, f"{self._seen.name}/labels", self._take_labels, latched)

    # Before the first image -------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Find the node, check that it can be played to, connect to it."""
        seen, settings = self._seen, self._settings
        seen.find(settings.start_limit_s)
        seen.wait_until_active(settings.start_limit_s)
        seen.check_alone()
        sim_time, max_age_s = seen.parameters("use_sim_time", "state.max_age_s")
        if not sim_time:
            raise LiveReplayError(
                f"{seen.name} has use_sim_time false, so images of a recording would all be STALE: launch it with "
                f"use_sim_time:=true, or ros2 param set {seen.name} use_sim_time true"
            )
        topic = seen.image_topic(self._bag.msgtype)
        for name, what in ((topic, "images"), ("/clock", "time")):
            strangers = self._strangers(name)
            if strangers:
                raise LiveReplayError(f"{', '.join(strangers)} publishes {what} on {name} too: stop it first")
        self._result.topic, self._result.max_age_s = topic, max_age_s
        self._result.late_ms = max_age_s * 1e3 if settings.late_ms is None else settings.late_ms
        qos = QoSProfile(depth=10, reliability=ReliabilityPolicy.RELIABLE)
        self._publisher = self._node.create_publisher(IMAGE_TYPES[self._bag.msgtype], topic, qos)
        for publisher, name in ((self._publisher, topic), (self._clock, "/clock")):
            if not self._wait(lambda p=publisher, n=name: self._connected(p, n), settings.timeout_s):
                raise LiveReplayError(
                    f"{seen.name} subscribes to {name}, and the two sides do not connect within "
                    f"{settings.timeout_s:g} s: are both in the same ROS domain, with the same RMW and discovery range?"
                )
        # vqa and overlay, where they run, are to see the first image too; who died lately is still listed.
        self._wait(lambda: self._publisher.get_subscription_count() >= self._listed(topic), SETTLE_S)
        # An active node says at least every second that no images come.
        if not self._wait(lambda: self._newest is not None, settings.timeout_s):
            raise LiveReplayError(f"{seen.name} is active and nothing comes on {seen.name}/phase: look at its log")

    def _listed(self, topic: str) -> int:
        return len(self._node.get_subscriptions_info_by_topic(topic))

    def _strangers(self, topic: str) -> list[str]:
        own = self._node.get_fully_qualified_name()
        publishers = self._node.get_publishers_info_by_topic(topic)
        names = {f"{info.node_namespace.rstrip('/')}/{info.node_name}" for info in publishers}
        return sorted(names - {own})

    def _connected(self, publisher: Any, topic: str) -> bool:
        return self._seen.subscribes_to(topic) and publisher.get_subscription_count() > 0

    # Play -------------------------------------------------------------------------------------------------------

    def play(self, on_image: Callable[[LiveResult], None]) -> LiveResult:
        """Send every image; what came of them."""
        result = self._result
        self._before = self._newest
        self._answered = (self._newest.frames_processed, self._newest.frames_rejected)
        rate = self._settings.rate
        try:
            images = self._in_lockstep() if rate is None else self._at_rate(rate)
            for _ in images:
                on_image(result)
            last_ns = next((one.image_stamp_ns for one in reversed(result.images) if one.phase is not None), None)
            # Latents come after phases, and not of every image.
            self._wait(lambda: last_ns is None or last_ns in self._rms, SETTLE_S)
        except KeyboardInterrupt:
            result.ended, result.interrupted = "interrupted", True
        except (LiveReplayError, BagError) as error:
            result.ended, result.failed = str(error), True
        self._count()
        result.input_sha256 = self._digest.hexdigest()
        for one in result.images:
            one.latent_rms = self._rms.get(one.image_stamp_ns) if one.phase is not None else None
        return result

    def _in_lockstep(self) -> Iterator[Played]:
        for number, image in enumerate(self._bag.images()):
            self._set_clock(image.log_ns)
            one = self._send(number, image)
            self._wait_for_answer(one, image)
            yield one

    def _set_clock(self, log_ns: int) -> None:
        jump_s = abs(log_ns - self._bag_now_ns()) * 1e-9
        self._bag_now_ns = lambda: log_ns
        self._tick()
        if jump_s > JUMP_S:
            self._wait(lambda: False, SETTLE_S)

    def _wait_for_answer(self, one: Played, image: BagImage) -> None:
        """Wait for the phase; send the image again where the node itself says that it has not come."""
        settings, received = self._settings, self._newest.frames_received
        processed, rejected = self._answered
        end_s = time.monotonic() + settings.timeout_s

        def arrived() -> bool:
            return self._newest.frames_received > received

        def refused() -> bool:
            return self._newest.frames_rejected > rejected and arrived()

        told_s = time.monotonic() + RESEND_AFTER_S
        while True:
            self._wait(
                lambda t=told_s: one.phase or refused() or self._newest_s > t, min(1.0, end_s - time.monotonic())
            )
            if one.phase is not None:
                return
            if refused():
                one.fate = "rejected"
                self._answered = (processed, self._newest.frames_rejected)
                return
            if time.monotonic() >= end_s:
                break
            if not arrived() and self._newest_s > told_s and one.sent <= RESENDS:
                one.sent += 1
                self._publisher.publish(image.raw)
                told_s = time.monotonic() + RESEND_AFTER_S
            self._seen.check_alive()
        what = "has the image and gives no phase" if arrived() else f"did not get the image in {one.sent} tries"
        raise LiveReplayError(
            f"{self._seen.name} {what} within {settings.timeout_s:g} s (image {one.number}, stamp "
            f"{one.image_stamp_ns * 1e-9:.3f}): look at its log and at `ros2 topic echo /diagnostics`"
        )

    def _at_rate(self, rate: float) -> Iterator[Played]:
        start_s, first_ns = 0.0, 0
        for number, image in enumerate(self._bag.images()):
            if number == 0:
                first_ns = image.log_ns
                self._set_clock(first_ns)
                start_s = time.monotonic()
                self._run_clock(first_ns, start_s, rate)
            due_s = start_s + (image.log_ns - first_ns) * 1e-9 / rate
            # Also where it is late: what comes back, /clock and Ctrl-C are seen to while it waits, and only then.
            self._wait(lambda: False, max(LEAST_WAIT_S, due_s - time.monotonic()))
            self._result.behind_s = max(self._result.behind_s, time.monotonic() - due_s)
            if time.monotonic() - self._newest_s > self._settings.timeout_s:
                self._seen.check_alive()
                raise LiveReplayError(
                    f"{self._seen.name} has been silent for {self._settings.timeout_s:g} s, and while it is active it "
                    "speaks every second: was it deactivated, or does it hang? Look at its log"
                )
            yield self._send(number, image)
        self._wait_for_the_last()

    def _run_clock(self, first_ns: int, start_s: float, rate: float) -> None:
        self._bag_now_ns = lambda: first_ns + round((time.monotonic() - start_s) * rate * 1e9)

    def _wait_for_the_last(self) -> None:
        """Wait until every image has its phase, or the node has told of none for a while and has none under way."""
        sent_s = time.monotonic()

        def settled() -> bool:
            if not any(self._waiting.values()):
                return True
            quiet_s = self._newest_s - max(sent_s, self._answered_s)
            self._count()
            done = self._result.processed + self._result.replaced + self._result.rejected
            return quiet_s > QUIET_S and done >= self._result.received

        self._answered_s = sent_s
        if not self._wait(settled, self._settings.timeout_s):
            raise LiveReplayError(
                f"{self._seen.name} has images under way and gave no phase for {self._settings.timeout_s:g} s after "
                "the last one: look at its log"
            )

    def _send(self, number: int, image: BagImage) -> Played:
        one = Played(number, image.stamp_ns, image.log_ns, image.message.header, time.monotonic())
        self._result.images.append(one)
        self._waiting.setdefault(image.stamp_ns, deque()).append(one)
        self._publisher.publish(image.raw)
        self._digest.update(image.raw)
        return one

    # Callbacks --------------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        now_ns = self._bag_now_ns()
        if now_ns:
            message = Clock()
            message.clock.sec, message.clock.nanosec = divmod(now_ns, 10**9)
            self._clock.publish(message)

    def _take(self, message: SurgicalPhase) -> None:
        newest, self._newest, self._newest_s = self._newest, message, time.monotonic()
        if newest is not None and message.frames_received < newest.frames_received:
            raise LiveReplayError(f"{self._seen.name} was started anew during the replay: look at its log")
        waiting = self._waiting.get(stamp_ns(message))
        processed, rejected = self._answered
        # While it gets no image the node repeats the last stamp, with the counts as they were.
        is_new = message.frames_processed > processed or (
            message.state == SurgicalPhase.FAULT and message.frames_rejected > rejected
        )
        if not waiting or not is_new:
            return
        one = waiting.popleft()
        one.phase, one.fate = message, "answered"
        one.latency_ms = (self._newest_s - one.sent_s) * 1e3
        self._answered = (message.frames_processed, message.frames_rejected)
        self._answered_s = self._newest_s

    def _take_latent(self, message: LatentFeatures) -> None:
        if len(message.shape) == 3:
            latent = np.asarray(message.data, np.float64)
            self._rms[stamp_ns(message)] = float(np.sqrt(np.mean(np.square(latent))))

    def _take_labels(self, message: PhaseLabels) -> None:
        self._result.labels = message

    def _count(self) -> None:
        """Take over the node's counts since the first image."""
        for name in ("received", "processed", "replaced", "rejected"):
            field_name = f"frames_{name}"
            setattr(self._result, name, getattr(self._newest, field_name) - getattr(self._before, field_name))
