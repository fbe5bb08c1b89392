# SPDX-License-Identifier: Apache-2.0
"""What `surg-perception doctor` saw: plain data, so that findings are functions of it. Unknown is None or empty.

Node and topic names are fully qualified. Times in seconds, stamps in nanoseconds, sizes in bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

RAW = "sensor_msgs/msg/Image"
COMPRESSED = "sensor_msgs/msg/CompressedImage"
IMAGE_TYPES = (RAW, COMPRESSED)
DEFAULT_NAMESPACE = "/surg_perception"


@dataclass(frozen=True)
class Endpoint:
    """A publisher or subscription.

    Attributes:
        node: its node.
        type: such as `sensor_msgs/msg/Image`.
        type_hash: of the message's definition; "" where ROS 2 does not give it (before Jazzy).
        qos: in words.
        durability: "volatile", "transient_local", or what else the middleware says.
        pid: lower 16 bits of the process id as Fast DDS writes them into the endpoint's id; None with another RMW.
        here: whether the same host made it; None where unknown.
    """

    node: str
    type: str
    type_hash: str = ""
    qos: str = ""
    durability: str = "volatile"
    pid: int | None = None
    here: bool | None = None


@dataclass(frozen=True)
class Mismatch:
    """A publisher and a subscription that the middleware does not connect, and why."""

    publisher: Endpoint
    subscription: Endpoint
    reason: str


@dataclass(frozen=True)
class Topic:
    """Who is at a topic."""

    name: str
    publishers: tuple[Endpoint, ...] = ()
    subscriptions: tuple[Endpoint, ...] = ()
    mismatches: tuple[Mismatch, ...] = ()

    @property
    def image_type(self) -> str:
        """Type of the images that are published here, "" if none are."""
        return next((p.type for p in self.publishers if p.type in IMAGE_TYPES), "")


@dataclass(frozen=True)
class OurNode:
    """A node of this package.

    Attributes:
        kind: "phase", "vqa", "overlay" or "source".
        state: of its lifecycle; "" where it did not answer.
        parameters: those that were asked for and answered.
        reads: image topics that it subscribes to, with their types.
        process: its process on this machine, as far as it could be told.
    """

    name: str
    kind: str
    state: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    reads: tuple[tuple[str, str], ...] = ()
    process: Process | None = None

    @property
    def namespace(self) -> str:
        return self.name.rpartition("/")[0] or "/"


@dataclass(frozen=True)
class Images:
    """A short look at an image topic.

    Attributes:
        arrivals_s: steady time of each image's arrival.
        stamps_ns: of each.
        ages_s: arrival minus stamp, by this machine's clock.
        sim_ages_s: the same by /clock; empty where nothing came on it.
        width, height, bytes: of the newest image; width and height 0 for a compressed one that does not decode.
        faults: kind and text (`stream.image_decode.ImageError`) of images that hold no picture.
    """

    topic: str
    type: str
    arrivals_s: tuple[float, ...] = ()
    stamps_ns: tuple[int, ...] = ()
    ages_s: tuple[float, ...] = ()
    sim_ages_s: tuple[float, ...] = ()
    width: int = 0
    height: int = 0
    bytes: int = 0
    faults: tuple[tuple[str, str], ...] = ()

    @property
    def rate_hz(self) -> float:
        """Images a second by their arrival; 0 where fewer than two came."""
        times = self.arrivals_s
        return (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 and times[-1] > times[0] else 0.0


@dataclass(frozen=True)
class Phases:
    """What a node `phase` published meanwhile.

    Attributes:
        states: names of `PhaseState`, in order.
        received, processed, replaced, lost: frames between the first and the last message.
        rejected: frames since activation.
        latency_ms: of the newest message that had an image.
    """

    node: str
    states: tuple[str, ...] = ()
    model_id: str = ""
    backend: str = ""
    received: int = 0
    processed: int = 0
    replaced: int = 0
    lost: int = 0
    rejected: int = 0
    latency_ms: float = 0.0


@dataclass(frozen=True)
class Status:
    """One status of /diagnostics; level "OK", "WARN", "ERROR" or "STALE"."""

    node: str
    name: str
    level: str
    message: str
    values: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Graph:
    """The ROS graph, as one participant saw it for some seconds.

    Attributes:
        names: of all nodes, as often as they are there.
        other_domains: nodes seen in other domains, by domain.
        clock_publishers, clock_messages: on /clock.
    """

    domain: int
    rmw: str
    names: tuple[str, ...] = ()
    nodes: tuple[OurNode, ...] = ()
    topics: Mapping[str, Topic] = field(default_factory=dict)
    images: tuple[Images, ...] = ()
    phases: tuple[Phases, ...] = ()
    statuses: tuple[Status, ...] = ()
    other_domains: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    clock_publishers: int = 0
    clock_messages: int = 0


@dataclass(frozen=True)
class Process:
    """A process of this user that has ROS 2 loaded.

    Attributes:
        command: short, for people.
        environment: ROS and middleware variables that it was started with.
        rmw: the middleware that it has loaded, "" if none.
        node: `__node` and `__ns` of its command line as a full name, "" where not given.
        ours: it runs one of this package's nodes.
        stopped: by Ctrl-Z or a debugger.
    """

    pid: int
    command: str
    environment: Mapping[str, str] = field(default_factory=dict)
    rmw: str = ""
    node: str = ""
    ours: bool = False
    stopped: bool = False

    @property
    def domain(self) -> int:
        return domain_of(self.environment)


@dataclass(frozen=True)
class SharedMemory:
    """/dev/shm: its size, what is free, and how many files of Fast DDS in it belong to other users."""

    total: int
    free: int
    foreign_files: int = 0


@dataclass(frozen=True)
class Profile:
    """A Fast DDS profile file: what its shared-memory transport holds (0 if it has none), or why it is no use."""

    path: str
    segment_bytes: int = 0
    fault: str = ""


@dataclass(frozen=True)
class PhaseModel:
    """A phase model that is, or would be, run; `fault` "missing", "hash" or "" with `text` for the reason."""

    asked: str
    model_id: str = ""
    phases: int = 0
    fault: str = ""
    text: str = ""


@dataclass(frozen=True)
class Engines:
    """Inference engines of this machine.

    Attributes:
        refusals: engine → why it does not run, None if it does.
        name: what ran the model in a trial as parameters ask, "" where it was not tried or failed.
        notes: why what was asked was not taken.
        fault: why nothing runs, or why it could not be told.
        gpu: an NVIDIA driver is there and finds a GPU.
    """

    refusals: Mapping[str, str | None] = field(default_factory=dict)
    name: str = ""
    notes: tuple[str, ...] = ()
    fault: str = ""
    gpu: bool = False


@dataclass(frozen=True)
class Answers:
    """What the node vqa lacks: its model, base models (each as the command that fetches it), packages."""

    asked: str
    model_fault: str = ""
    missing_base: tuple[str, ...] = ()
    missing_packages: tuple[str, ...] = ()


@dataclass(frozen=True)
class Machine:
    """This machine and this shell.

    Attributes:
        environment: ROS and middleware variables of this shell.
        profiles: profile files that the environments of this shell and of the processes name, by path.
        shipped_profile: path of the package's own.
        rmem_max: largest receive buffer of a socket (net.core.rmem_max), 0 if unknown.
        security_fault: why security cannot work as the environment asks, "" if it can or is not asked for.
        cache_fault: why compiled engines cannot be kept, "" if they can.
    """

    environment: Mapping[str, str] = field(default_factory=dict)
    processes: tuple[Process, ...] = ()
    shm: SharedMemory | None = None
    profiles: Mapping[str, Profile] = field(default_factory=dict)
    shipped_profile: str = ""
    memory_free: int | None = None
    rmem_max: int = 0
    security_fault: str = ""
    cache_fault: str = ""
    models: tuple[PhaseModel, ...] = ()
    engines: Engines | None = None
    answers: tuple[Answers, ...] = ()


@dataclass(frozen=True)
class Snapshot:
    """Everything; `graph` is None where it could not be looked at, and `graph_fault` says why.

    Attributes:
        namespace, image: what the user asked about, "" where not said.
    """

    machine: Machine
    graph: Graph | None = None
    graph_fault: str = ""
    namespace: str = ""
    image: str = ""


def domain_of(environment: Mapping[str, str]) -> int:
    """The ROS domain that an environment asks for; 0 where it says none, -1 where it is no number."""
    text = environment.get("ROS_DOMAIN_ID", "").strip() or "0"
    return int(text) if text.isdigit() else -1


def profile_of(environment: Mapping[str, str]) -> str:
    """Path of the Fast DDS profile that an environment names, "" if none."""
    return environment.get("FASTDDS_DEFAULT_PROFILES_FILE") or environment.get("FASTRTPS_DEFAULT_PROFILES_FILE") or ""
