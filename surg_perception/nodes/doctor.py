# SPDX-License-Identifier: Apache-2.0
"""Reads the live ROS graph into a plain snapshot: who is there, what comes, what the nodes say. Changes nothing."""

from __future__ import annotations

import os
import pickle
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import rclpy
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from lifecycle_msgs.srv import GetState
from rcl_interfaces.srv import GetParameters
from rclpy.executors import SingleThreadedExecutor
from rclpy.parameter import parameter_value_to_python
from rclpy.qos import (
    DurabilityPolicy,
    QoSCompatibility,
    QoSProfile,
    ReliabilityPolicy,
    qos_check_compatible,
)
from rclpy.serialization import deserialize_message
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import CompressedImage, Image
from surg_perception_msgs.msg import SurgicalPhase

from surg_perception.diagnosis.snapshot import (
    DEFAULT_NAMESPACE,
    IMAGE_TYPES,
    RAW,
    Endpoint,
    Graph,
    Images,
    Mismatch,
    OurNode,
    Phases,
    Process,
    Status,
    Topic,
)
from surg_perception.nodes.dds_profile import loaded_profile
from surg_perception.nodes.parameter_table import TABLES
from surg_perception.stream.image_decode import ImageError, decode_image
from surg_perception.stream.phase_pipeline import PhaseState

DISCOVERY_S, DISCOVERY_MOST_S = 3.0, 8.0
"""Discovery goes on until the graph stays the same, within these bounds."""
ANSWER_S = 5.0
"""A node that has not said its state by then is taken for one that does not answer."""
ENOUGH_IMAGES = 10
"""After so many the subscription to an image topic ends: each costs the camera's bandwidth once more."""
_PARAMETERS = {
    "phase": (
        "model.path",
        "runtime.backend",
        "runtime.precision",
        "runtime.server_url",
        "input.transport",
        "input.max_pixels",
        "state.max_age_s",
        "state.no_signal_after_s",
        "state.uncertain_below",
    ),
    "vqa": ("model.path", "input.transport", "input.max_pixels"),
    "overlay": ("input.transport", "input.max_pixels"),
    "source": ("source", "output.transport"),
}
_LEVELS = {DiagnosticStatus.OK: "OK", DiagnosticStatus.WARN: "WARN", DiagnosticStatus.ERROR: "ERROR"}
_NO_TOPICS = ("/rosout", "/parameter_events", "/diagnostics")


def look(namespace: str, image: str, seconds: float, processes: Iterable[Process]) -> Graph:
    """What the ROS graph of this shell's domain holds.

    Args:
        namespace: only the package's nodes in it; "" for all of them.
        image: a topic that is looked at beside those that the nodes read; "" for none.
        seconds: how long to listen, after at most DISCOVERY_MOST_S for discovery.
        processes: those of this machine, to find the nodes' in.

    Raises:
        Exception: whatever rclpy raises where it cannot join; the middleware's reason is in its text.
    """
    with _participant(None) as (node, executor):
        doctor = _Doctor(node, executor, tuple(processes))
        return doctor.look(namespace, image, seconds)


@contextmanager
def _participant(domain: int | None) -> Iterator[tuple[Any, Any]]:
    # Large images would not reach the doctor otherwise, as they do not reach a node without it.
    with loaded_profile(), ExitStack() as undo:
        context = rclpy.Context()
        rclpy.init(context=context, domain_id=domain)
        undo.callback(rclpy.try_shutdown, context=context)
        node = rclpy.create_node(
            f"doctor_{os.getpid()}",
            context=context,
            enable_rosout=False,
            start_parameter_services=False,
            use_global_arguments=False,
        )
        undo.callback(node.destroy_node)
        executor = SingleThreadedExecutor(context=context)
        undo.callback(executor.shutdown, timeout_sec=1.0)
        executor.add_node(node)
        yield node, executor


class _Doctor:
    def __init__(self, node: Any, executor: Any, processes: tuple[Process, ...]) -> None:
        self._node, self._executor, self._processes = node, executor, processes
        self._sim_ns: int | None = None
        self._clock_messages = 0
        self._statuses: dict[tuple[str, str], Status] = {}

    def look(self, namespace: str, image: str, seconds: float) -> Graph:
        node = self._node
        if image and not image.startswith("/"):
            image = f"{(namespace or DEFAULT_NAMESPACE).rstrip('/')}/{image}"
        best_effort = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
        node.create_subscription(Clock, "/clock", self._take_clock, best_effort)
        node.create_subscription(DiagnosticArray, "/diagnostics", self._take_diagnostics, QoSProfile(depth=10))
        for _ in range(2):  # again where something was discovered only meanwhile
            ours = self._discover(namespace)
            seen = self._image_topics(ours, namespace, image)
            cameras = [_Camera(node, name, self._topic(name).image_type, self) for name in self._with_images(seen)]
            phases = [_PhaseListener(node, one.name, best_effort) for one in ours if one.kind == "phase"]
            self._spin_until(lambda: False, seconds)
            images = tuple(camera.images() for camera in cameras)
            known = {one.name for one in ours}, {one.topic for one in images}
            if ({name for name, _ in self._ours(namespace)}, set(self._with_images(seen))) == known:
                break
        ours_names = {one.name for one in ours}
        topics = {name: self._topic(name) for name, _ in node.get_topic_names_and_types() if name not in _NO_TOPICS}
        found = any(topic.publishers for name, topic in topics.items() if name in seen)
        return Graph(
            domain=node.context.get_domain_id(),
            rmw=rclpy.get_rmw_implementation_identifier(),
            names=tuple(name for name in self._names()),
            nodes=tuple(ours),
            topics=topics,
            images=images,
            phases=tuple(listener.phases() for listener in phases),
            statuses=tuple(status for status in self._statuses.values() if status.node in ours_names),
            other_domains={} if ours and found else self._peek(),
            clock_publishers=len(node.get_publishers_info_by_topic("/clock")),
            clock_messages=self._clock_messages,
        )

    @staticmethod
    def _image_topics(ours: list[OurNode], namespace: str, image: str) -> set[str]:
        """Topics to look at: what is read, what was asked for, and where a node would look that reads nothing yet."""
        topics = {topic for one in ours for topic, _ in one.reads} | (set(_with_compressed(image)) if image else set())
        homes = {one.namespace for one in ours if not one.reads and one.kind != "source"}
        for home in homes if ours else {namespace or DEFAULT_NAMESPACE}:
            topics |= set(_guessed(home))
        return topics

    def _with_images(self, topics: set[str]) -> list[str]:
        return [name for name in sorted(topics) if self._topic(name).image_type]

    # Who is there -------------------------------------------------------------------------------------------------

    def _discover(self, namespace: str) -> list[OurNode]:
        """Our nodes, once no further ones appear; waits longer where a process or a topic says that there are some."""
        start_s, quiet_s, before = time.monotonic(), 0.0, 0
        here = self._node.context.get_domain_id()
        running = any(process.ours and process.domain == here for process in self._processes)
        while (spent_s := time.monotonic() - start_s) < DISCOVERY_MOST_S:
            self._spin_until(lambda: False, 0.25)
            topics = self._node.get_topic_names_and_types()
            now = len(self._names()) + len(topics) + len(self._node.get_service_names_and_types())
            quiet_s, before = (quiet_s + 0.25 if now == before else 0.0), now
            expected = (
                running or self._names() or any(types[0].startswith("surg_perception_msgs/") for _, types in topics)
            )
            if spent_s > DISCOVERY_S and quiet_s >= 1.0 and (self._ours(namespace) or not expected):
                break
        found = self._ours(namespace)
        answers = self._ask(found)
        return [OurNode(full, kind, *answers[full], self._reads(full), self._process(full)) for full, kind in found]

    def _names(self) -> list[str]:
        """Full names of all nodes but this one and the hidden ones."""
        names = (f"{ns.rstrip('/')}/{name}" for name, ns in self._node.get_node_names_and_namespaces())
        own = self._node.get_fully_qualified_name()
        return sorted(name for name in names if name != own and not name.rpartition("/")[2].startswith("_"))

    def _ours(self, namespace: str) -> list[tuple[str, str]]:
        """Full name and kind of the package's nodes."""
        services = self._node.get_service_names_and_types()
        offered = {name for name, types in services if types[0].startswith("surg_perception_msgs/")}
        lifecycle = {name.removesuffix("/get_state") for name, _ in services if name.endswith("/get_state")}
        # `phase` and `vqa` are known by a service of this package; the other two by standing beside one of them.
        homes = {name.rpartition("/")[0] for name in offered}
        homes = {home.removesuffix("/phase") for home in homes} | {namespace or DEFAULT_NAMESPACE}
        found = []
        for full in sorted(set(self._names())):
            home, _, name = full.rpartition("/")
            ours = (name != "phase" or f"{full}/set_procedure" in offered) and home in homes
            if name in TABLES and ours and full in lifecycle and (not namespace or home == namespace):
                found.append((full, name))
        return found

    def _ask(self, nodes: list[tuple[str, str]]) -> dict[str, tuple[str, dict[str, Any]]]:
        """State and parameters of the nodes; "" and nothing of one that does not answer."""
        asked = {}
        for full, kind in nodes:
            names = [*_PARAMETERS.get(kind, ()), "use_sim_time"]
            state = self._node.create_client(GetState, f"{full}/get_state")
            values = self._node.create_client(GetParameters, f"{full}/get_parameters")
            asked[full] = [names, state, values, None, None]

        def all_answered() -> bool:
            for entry in asked.values():
                names, state, values = entry[:3]
                if entry[3] is None and state.service_is_ready() and values.service_is_ready():
                    entry[3] = state.call_async(GetState.Request())
                    entry[4] = values.call_async(GetParameters.Request(names=names))
            return all(entry[3] is not None and entry[3].done() and entry[4].done() for entry in asked.values())

        self._spin_until(all_answered, ANSWER_S if asked else 0.0)
        found = {}
        for full, (names, state, values, state_answer, value_answer) in asked.items():
            label = state_answer.result().current_state.label if state_answer and state_answer.done() else ""
            given = value_answer.result().values if value_answer and value_answer.done() else []
            pairs = zip(names, map(parameter_value_to_python, given), strict=False)
            found[full] = (label, {name: value for name, value in pairs if value is not None})
            self._node.destroy_client(state)
            self._node.destroy_client(values)
        return found

    def _reads(self, full: str) -> tuple[tuple[str, str], ...]:
        namespace, _, name = full.rpartition("/")
        try:
            topics = self._node.get_subscriber_names_and_types_by_node(name, namespace or "/")
        except rclpy.node.NodeNameNonExistentError:  # it left meanwhile
            return ()
        return tuple(
            (topic, type_)
            for topic, types in topics
            for type_ in types
            if type_ in IMAGE_TYPES and full in [s.node for s in self._topic(topic).subscriptions if s.type == type_]
        )

    def _process(self, full: str) -> Process | None:
        """Its process, by the id that Fast DDS writes into its endpoints, else by its command line."""
        publishers = self._topic("/parameter_events").publishers  # every node is one
        pids = {p.pid for p in publishers if p.node == full and p.here}
        exact = [process for process in self._processes if process.pid & 0xFFFF in pids]
        found = exact or [process for process in self._processes if process.node == full]
        return found[0] if len(found) == 1 else None

    def _topic(self, name: str) -> Topic:
        node, own = self._node, self._node.get_fully_qualified_name()
        publishers = [info for info in node.get_publishers_info_by_topic(name) if _name_of(info) != own]
        subscriptions = [info for info in node.get_subscriptions_info_by_topic(name) if _name_of(info) != own]
        mismatches = []
        for publisher in publishers:
            for subscription in subscriptions:
                if publisher.topic_type != subscription.topic_type:
                    continue
                verdict, reason = qos_check_compatible(publisher.qos_profile, subscription.qos_profile)
                if verdict == QoSCompatibility.ERROR:
                    pair = self._endpoint(publisher), self._endpoint(subscription)
                    mismatches.append(Mismatch(*pair, reason.strip().rstrip(";")))
        return Topic(
            name,
            tuple(map(self._endpoint, publishers)),
            tuple(map(self._endpoint, subscriptions)),
            tuple(mismatches),
        )

    def _endpoint(self, info: Any) -> Endpoint:
        qos = info.qos_profile
        gid = bytes(info.endpoint_gid)
        pid = here = None
        if rclpy.get_rmw_implementation_identifier().startswith("rmw_fastrtps") and gid[:2] == b"\x01\x0f":
            # Fast DDS: vendor (2 bytes), host (2), lower half of the process id (2), and more.
            pid, here = int.from_bytes(gid[4:6], "little"), gid[2:4] == self._own_gid()[2:4]
        type_hash = getattr(info, "topic_type_hash", None)
        return Endpoint(
            _name_of(info),
            info.topic_type,
            str(type_hash) if type_hash is not None and any(type_hash.value) else "",
            f"{qos.reliability.name.lower()}, {qos.durability.name.lower()}",
            qos.durability.name.lower(),
            pid,
            here,
        )

    def _own_gid(self) -> bytes:
        own = self._node.get_fully_qualified_name()
        infos = self._node.get_subscriptions_info_by_topic("/diagnostics")
        return next((bytes(info.endpoint_gid) for info in infos if _name_of(info) == own), b"")

    def _peek(self) -> dict[int, tuple[str, ...]]:
        """Nodes in domain 0, where everything is that was started without a domain, and of our own kinds elsewhere."""
        here = self._node.context.get_domain_id()
        domains = {0, *(p.domain for p in self._processes if p.ours and 0 <= p.domain <= 232)} - {here}
        found = {}
        for domain in sorted(domains)[:3]:
            with _participant(domain) as (node, executor):
                end_s = time.monotonic() + DISCOVERY_S / 2
                while time.monotonic() < end_s:
                    executor.spin_once(timeout_sec=0.1)
                own = node.get_fully_qualified_name()
                names = [f"{ns.rstrip('/')}/{name}" for name, ns in node.get_node_names_and_namespaces()]
                found[domain] = tuple(sorted(n for n in names if n != own and not n.rpartition("/")[2].startswith("_")))
        return {domain: names for domain, names in found.items() if names}

    # What comes ---------------------------------------------------------------------------------------------------

    def sim_age_s(self, stamp: int) -> float | None:
        """Age of a stamp by /clock, if there is one."""
        return None if self._sim_ns is None else (self._sim_ns - stamp) * 1e-9

    def _take_clock(self, message: Clock) -> None:
        self._clock_messages += 1
        self._sim_ns = message.clock.sec * 10**9 + message.clock.nanosec

    def _take_diagnostics(self, message: DiagnosticArray) -> None:
        for status in message.status:
            name = status.name.rpartition(": ")[2]
            values = {value.key: value.value for value in status.values}
            level = _LEVELS.get(status.level, "STALE")
            self._statuses[status.hardware_id, name] = Status(status.hardware_id, name, level, status.message, values)

    def _spin_until(self, condition: Callable[[], bool], limit_s: float) -> None:
        end_s = time.monotonic() + limit_s
        while time.monotonic() < end_s and not condition():
            self._executor.spin_once(timeout_sec=0.05)


class _Camera:
    """Takes a few images of a topic, serialized, and lets go of it."""

    def __init__(self, node: Any, topic: str, type_: str, doctor: _Doctor) -> None:
        self._node, self._doctor = node, doctor
        self._topic, self._type = topic, type_
        self._taken: list[tuple[float, int, bytes]] = []
        self._sim_ages: list[float] = []
        self._class = Image if type_ == RAW else CompressedImage
        qos = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT, durability=DurabilityPolicy.VOLATILE)
        self._subscription = node.create_subscription(self._class, topic, self._take, qos, raw=True)

    def _take(self, data: bytes) -> None:
        if len(self._taken) == ENOUGH_IMAGES:
            return
        self._taken.append((time.monotonic(), time.time_ns(), data))
        age_s = self._doctor.sim_age_s(_stamp_of(data))
        if age_s is not None:
            self._sim_ages.append(age_s)

    def images(self) -> Images:
        """What they were."""
        self._node.destroy_subscription(self._subscription)
        faults: dict[str, str] = {}
        width = height = 0
        for _, _, data in self._taken:
            try:
                # The limit is the reader's: whether it holds is a finding.
                message = deserialize_message(data, self._class)
                width, height = getattr(message, "width", 0), getattr(message, "height", 0)
                height, width = decode_image(message, max_pixels=2**31 - 1).shape[:2]
            except ImageError as error:
                faults.setdefault(error.kind, str(error))
            except Exception as error:
                faults.setdefault("message", f"not a {self._type}: {error}")
        stamps = [_stamp_of(data) for _, _, data in self._taken]
        return Images(
            topic=self._topic,
            type=self._type,
            arrivals_s=tuple(steady_s for steady_s, _, _ in self._taken),
            stamps_ns=tuple(stamps),
            ages_s=tuple((wall - stamp) * 1e-9 for (_, wall, _), stamp in zip(self._taken, stamps, strict=True)),
            sim_ages_s=tuple(self._sim_ages),
            width=width,
            height=height,
            bytes=max((len(data) for _, _, data in self._taken), default=0),
            faults=tuple(faults.items()),
        )


class _PhaseListener:
    """Collects what a node `phase` publishes."""

    def __init__(self, node: Any, full: str, qos: QoSProfile) -> None:
        self._name = full
        self._seen: list[SurgicalPhase] = []
        node.create_subscription(SurgicalPhase, f"{full}/phase", self._seen.append, qos)

    def phases(self) -> Phases:
        """Their summary."""
        if not self._seen:
            return Phases(self._name)
        first, last = self._seen[0], self._seen[-1]
        counted = {n: getattr(last, f"frames_{n}") - getattr(first, f"frames_{n}") for n in ("received", "processed")}
        blank = (SurgicalPhase.NO_SIGNAL, SurgicalPhase.FAULT)
        latencies = [message.latency_ms for message in self._seen if message.state not in blank]
        known = {state.value for state in PhaseState}
        return Phases(
            node=self._name,
            states=tuple(PhaseState(m.state).name for m in self._seen if m.state in known),
            model_id=last.model_id,
            backend=last.backend,
            replaced=last.frames_replaced - first.frames_replaced,
            lost=last.frames_lost - first.frames_lost,
            rejected=last.frames_rejected,
            latency_ms=latencies[-1] if latencies else 0.0,
            **counted,
        )


def _stamp_of(data: bytes) -> int:
    """Stamp of a serialized message that begins with a header (CDR: 4 bytes of encapsulation, then sec, nanosec)."""
    order = "little" if data[1] & 1 else "big"
    return int.from_bytes(data[4:8], order, signed=True) * 10**9 + int.from_bytes(data[8:12], order)


def _name_of(info: Any) -> str:
    return f"{info.node_namespace.rstrip('/')}/{info.node_name}"


def _with_compressed(topic: str) -> tuple[str, str]:
    return topic, f"{topic}/compressed"


def _guessed(namespace: str) -> tuple[str, str]:
    """Where a node would look for images that nobody has remapped."""
    return _with_compressed(f"{namespace.rstrip('/')}/image")


def _main() -> None:
    """As a process of its own (`cli.doctor`): question by standard input, graph by standard output."""
    answer = os.dup(1)
    os.dup2(2, 1)  # Fast DDS writes its errors there
    namespace, image, seconds, processes = pickle.load(sys.stdin.buffer)
    graph = look(namespace, image, seconds, processes)
    with os.fdopen(answer, "wb") as out:
        pickle.dump(graph, out)


if __name__ == "__main__":
    _main()
