# SPDX-License-Identifier: Apache-2.0
"""What follows from a snapshot: pure functions, one a subject, each yielding what is well and what is not, and the fix.

The subjects are those that users of perception nodes, nav2 and Isaac ROS lose most time to (docs/doctor.md).
"""

from __future__ import annotations

import difflib
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from surg_perception.diagnosis.snapshot import (
    COMPRESSED,
    DEFAULT_NAMESPACE,
    RAW,
    Endpoint,
    OurNode,
    Process,
    Snapshot,
    Status,
    Topic,
    domain_of,
    profile_of,
)

OK, WARNING, ERROR = "ok", "warning", "error"
DEFAULT_SEGMENT = 512 * 1024
"""Fast DDS's shared-memory segment where no profile says otherwise."""
_FULL_HD_BYTES = 1920 * 1080 * 3
READERS = ("phase", "vqa", "overlay")
LAUNCH = "ros2 launch surg_perception pipeline.launch.py"
SOURCE = "source /opt/ros/$ROS_DISTRO/setup.bash && source ~/ws/install/setup.bash   # in a clone: source setup.bash"
UNNAMED = "_NODE_NAME_UNKNOWN_"
FUTURE_S = 0.05
HOUR_S = 3600.0
LOW_MEMORY, NO_MEMORY = 1 << 30, 256 << 20
SLOW_HZ = 5.0
DISCOVERY_VARIABLES = ("ROS_AUTOMATIC_DISCOVERY_RANGE", "ROS_LOCALHOST_ONLY", "ROS_STATIC_PEERS")


@dataclass(frozen=True)
class Finding:
    """One thing that is well (`level` "ok") or not ("warning", "error").

    Attributes:
        check: stable name, as `image.no_publisher`; docs/doctor.md lists them.
        text: what was found.
        why: why it matters.
        fix: a command to paste, or what to do.
    """

    check: str
    level: str
    text: str
    why: str = ""
    fix: str = ""


Findings = Iterator[Finding]


def examine(snapshot: Snapshot) -> list[Finding]:
    """All findings, in the order in which to look at them."""
    return [finding for check in CHECKS for finding in check(snapshot)]


def good(check: str, text: str) -> Finding:
    return Finding(check, OK, text)


# The graph as a whole -----------------------------------------------------------------------------------------------


def environment(s: Snapshot) -> Findings:
    """ROS 2 in this shell, its middleware and security."""
    if s.machine.security_fault:
        yield Finding(
            "security.keystore",
            ERROR,
            s.machine.security_fault,
            "A node without its keys does not start where ROS_SECURITY_STRATEGY is Enforce, and is alone otherwise.",
            "unset ROS_SECURITY_ENABLE   # or: export ROS_SECURITY_KEYSTORE=<folder made by `ros2 security`>",
        )
    wrong_domain = not 0 <= domain_of(s.machine.environment) <= 232
    if wrong_domain:
        yield Finding(
            "ros.domain_id",
            ERROR,
            f"ROS_DOMAIN_ID is {s.machine.environment['ROS_DOMAIN_ID']!r}, expected a number from 0 to 232",
            "Nodes do not start with it.",
            "export ROS_DOMAIN_ID=0",
        )
    if s.graph is None:
        rmw = s.machine.environment.get("RMW_IMPLEMENTATION")
        fix = SOURCE
        if s.machine.security_fault or wrong_domain:
            fix = "surg-perception doctor   # again, after the fix above"
        elif rmw and "import" not in s.graph_fault and "No module named" not in s.graph_fault:
            fix = f"unset RMW_IMPLEMENTATION   # or: sudo apt install ros-$ROS_DISTRO-{rmw.replace('_', '-')}"
        yield Finding(
            "ros.environment",
            ERROR,
            f"ROS 2 cannot be used from this shell: {s.graph_fault}",
            "Nothing is known about the live graph; models and engines were looked at.",
            fix,
        )
    else:
        yield good("ros.environment", f"ROS domain {s.graph.domain}, {s.graph.rmw}")


def nodes_there(s: Snapshot) -> Findings:
    """Whether any node of ours is seen, and where else one is."""
    g = s.graph
    if g is None:
        return
    if g.nodes:
        for node in g.nodes:
            yield good("node.found", f"{node.name} ({node.state or 'no answer'})")
        if s.namespace and not any(node.kind == "phase" for node in g.nodes):
            yield Finding("node.no_phase", WARNING, f"no node phase in {s.namespace}", "No phase comes out.", LAUNCH)
        return
    elsewhere = sorted({_home(t.name) for t in g.topics.values() if _is_phase(t)} - {_namespace(s)})
    if elsewhere:
        yield Finding(
            "node.other_namespace",
            ERROR,
            f"no node of surg_perception in {s.namespace or DEFAULT_NAMESPACE}, but a pipeline in "
            f"{', '.join(elsewhere)}",
            "Topics and services are named after the namespace.",
            f"surg-perception doctor --namespace {elsewhere[0]}",
        )
    else:
        yield Finding(
            "node.missing",
            ERROR,
            f"no surg_perception node found in ROS domain {g.domain}",
            "Nothing takes images and nothing publishes a phase.",
            _launch(s, image=s.image),
        )


def unnamed(s: Snapshot) -> Findings:
    """Endpoints whose node's name has not come: discovery works half."""
    topics = s.graph.topics.values() if s.graph else ()
    found = [t.name for t in topics for e in (*t.publishers, *t.subscriptions) if UNNAMED in e.node]
    if found:
        yield Finding(
            "dds.unnamed",
            WARNING,
            f"nodes at {_list(found)} have no name yet: who they are does not arrive",
            "They are starting or just ended; or data between the processes is cut off: /dev/shm of another user, a "
            "firewall, more participants than Fast DDS looks for on one machine (dozens in one domain).",
            "surg-perception doctor   # again; if it stays: end what is left of old nodes, or another ROS_DOMAIN_ID",
        )


def unseen(s: Snapshot) -> Findings:
    """Processes of ours that run in this domain, and that nobody sees."""
    g = s.graph
    for p in s.machine.processes if g else ():
        name = p.node or f"/{p.command.removesuffix('_node')}"
        if g is None or not p.ours or (p.domain, p.rmw) != (g.domain, g.rmw) or name in g.names:
            continue
        if _range(p.environment) == "OFF":
            continue  # said below
        yield Finding(
            "node.unseen",
            ERROR,
            f"{p.command} (process {p.pid}) runs in this domain, and its node {name} is not seen",
            "It was stopped (Ctrl-Z)." if p.stopped else "It is starting, hangs, or its discovery is cut off.",
            f"kill -CONT {p.pid}"
            if p.stopped
            else f"surg-perception doctor   # again in some seconds, then restart it: kill -INT {p.pid}",
        )


def other_graphs(s: Snapshot) -> Findings:
    """Processes and nodes that this shell cannot see: another domain, middleware or discovery range."""
    g, here = s.graph, s.machine.environment
    if g is None:
        return
    lost = not g.nodes or not any(topic.image_type for topic in _inputs(s).values())
    hidden = [p for p in s.machine.processes if p.domain not in (g.domain, -1) and (p.ours or not g.nodes)]
    if any(p.ours for p in hidden):
        hidden = [p for p in hidden if p.ours]
    if lost and hidden:
        yield Finding(
            "dds.domain",
            ERROR if hidden[0].ours and not g.nodes else WARNING,
            f"this shell is in ROS domain {g.domain}; elsewhere run {_list(_process(p, 'domain') for p in hidden)}",
            "Nodes in different domains do not see each other.",
            f"export ROS_DOMAIN_ID={hidden[0].domain}",
        )
    hidden_domains = {p.domain for p in hidden}
    for domain, names in g.other_domains.items():
        if domain not in hidden_domains and lost:
            yield Finding(
                "dds.domain",
                WARNING,
                f"in ROS domain {domain} are the nodes {_list(names)}; this shell is in domain {g.domain}",
                "Nodes in different domains do not see each other.",
                f"export ROS_DOMAIN_ID={domain}",
            )
    beside = [p for p in s.machine.processes if p.domain == g.domain]
    foreign = [p for p in beside if p.rmw and p.rmw != g.rmw]
    if foreign:
        yield Finding(
            "dds.rmw",
            ERROR if any(p.ours for p in foreign) else WARNING,
            f"this shell uses {g.rmw}; {_list(_process(p, 'rmw') for p in foreign)}",
            "Different middlewares do not, or only partly, talk to each other.",
            f"export RMW_IMPLEMENTATION={foreign[0].rmw}   # everywhere the same",
        )
    for p in beside:
        if (
            (p.ours or lost)
            and _range(p.environment) != _range(here)
            and "OFF" in (_range(p.environment), _range(here))
        ):
            yield Finding(
                "dds.discovery_range",
                ERROR,
                f"{p.command} (process {p.pid}) has discovery range {_range(p.environment)}, this shell {_range(here)}",
                "With OFF a process sees nobody, not even on the same machine.",
                "export ROS_AUTOMATIC_DISCOVERY_RANGE=SUBNET   # and restart the node with it",
            )
    if lost and _range(here) == "LOCALHOST" and not here.get("ROS_STATIC_PEERS"):
        variable = "ROS_LOCALHOST_ONLY" if here.get("ROS_LOCALHOST_ONLY") == "1" else "ROS_AUTOMATIC_DISCOVERY_RANGE"
        yield Finding(
            "dds.localhost",
            WARNING,
            f"{variable}={here[variable]}: only this machine is seen",
            "A camera or a node on another machine stays invisible.",
            "unset ROS_LOCALHOST_ONLY; export ROS_AUTOMATIC_DISCOVERY_RANGE=SUBNET",
        )


def duplicates(s: Snapshot) -> Findings:
    """Two nodes of one name."""
    if s.graph is None:
        return
    for name, count in Counter(s.graph.names).items():
        if count > 1:
            yield Finding(
                "node.duplicate",
                ERROR if name in {node.name for node in s.graph.nodes} else WARNING,
                f"{count} nodes are called {name}",
                "Requests reach either of them, and their outputs mix. A killed node is seen for some 20 s.",
                f"{LAUNCH} namespace:=another   # or stop one: pgrep -af {name.rpartition('/')[2]}_node",
            )


def lifecycle(s: Snapshot) -> Findings:
    """Nodes that are there and do not work."""
    for node in s.graph.nodes if s.graph else ():
        set_state = f"ros2 lifecycle set {node.name}"
        if node.state == "":
            yield Finding(
                "node.silent",
                ERROR,
                f"{node.name} does not answer",
                "Its process hangs, is stopped, or was killed less than 20 s ago.",
                f"kill -CONT {node.process.pid}   # if it was stopped (Ctrl-Z); else restart it"
                if node.process
                else "restart it",
            )
        elif node.state == "unconfigured":
            yield Finding(
                "node.inactive",
                ERROR,
                f"{node.name} is unconfigured",
                "It has no model and takes no images; if configure failed, its log says why.",
                f"{set_state} configure && {set_state} activate",
            )
        elif node.state == "inactive":
            yield Finding(
                "node.inactive", ERROR, f"{node.name} is inactive", "It takes no images.", f"{set_state} activate"
            )
        elif node.state != "active":
            yield Finding(
                "node.inactive",
                WARNING if node.state.endswith("ing") else ERROR,
                f"{node.name} is {node.state}",
                "A transition is under way (loading a model, building an engine), or it is about to end.",
                f"ros2 lifecycle get {node.name}   # again in a while",
            )


# Images: who publishes, what, and does it connect -------------------------------------------------------------------


def image_topics(s: Snapshot) -> Findings:
    """Whether somebody publishes what the nodes read."""
    for name, topic in _inputs(s).items():
        wanted, readers = _wanted(s, name), _readers(s, name)
        if s.image and not _is_image(s.image, name, s):
            yield Finding(
                "image.other_topic",
                ERROR,
                f"{_list(readers)} reads {name}, not {s.image}",
                "The node waits for another topic than you look at.",
                _launch(s, image=s.image),
            )
        matching = [p for p in topic.publishers if p.type == wanted]
        others = [p for p in topic.publishers if p.type != wanted]
        if matching:
            publishers = _list(sorted({p.node for p in matching}))
            yield good("image.publisher", f"{name} ({_short(wanted)}) is published by {publishers}")
        if len(matching) > 1:
            yield Finding(
                "image.two_publishers",
                WARNING,
                f"{len(matching)} publishers on {name}: {_list(p.node for p in matching)}",
                "Their images mix: the phase jumps and stamps go back and forth.",
                f"{_launch(s)} image:=/one/camera   # one topic, and one namespace, a camera",
            )
        if others and not matching:
            yield Finding(
                "image.type",
                ERROR,
                f"{name} carries {others[0].type} (from {others[0].node}), expected {wanted}",
                "ROS 2 connects only equal types; nothing is said about it.",
                _type_fix(s, name, others[0].type),
            )
        elif not matching:
            yield _no_publisher(s, name, wanted)


def _no_publisher(s: Snapshot, name: str, wanted: str) -> Finding:
    topics = s.graph.topics if s.graph else {}
    other = name.removesuffix("/compressed") if wanted == COMPRESSED else f"{name}/compressed"
    if other in topics and topics[other].image_type not in ("", wanted):
        transport = "compressed" if wanted == RAW else "raw"
        base = name.removesuffix("/compressed")
        return Finding(
            "image.transport",
            ERROR,
            f"nobody publishes {name} ({_short(wanted)}), but {other} ({_short(topics[other].image_type)}) is there",
            "The node subscribes to one of the two.",
            _launch(s, image=base, transport=transport),
        )
    found = _image_candidates(s, name)
    if not found:
        return Finding(
            "image.no_publisher",
            ERROR,
            f"nobody publishes {name}, nor images on any other topic of this domain",
            "The state is NO_SIGNAL until images come.",
            f"{_launch(s)} source:=phantom   # to try without a camera; else start the camera driver",
        )
    best = found[0]
    compressed = best.image_type == COMPRESSED and best.name.endswith("/compressed")
    return Finding(
        "image.no_publisher",
        ERROR,
        f"nobody publishes {name} ({_short(wanted)}); images are on "
        f"{_list(f'{t.name} ({_short(t.image_type)})' for t in found)}",
        "The state is NO_SIGNAL until images come.",
        _launch(s, image=best.name.removesuffix("/compressed"), transport="compressed" if compressed else "raw"),
    )


def _image_candidates(s: Snapshot, name: str) -> list[Topic]:
    """Topics with images from others than our own outputs, the most similar name first."""
    outputs = {node.name for node in s.graph.nodes if node.kind != "source"} if s.graph else set()
    found = [
        topic
        for topic in (s.graph.topics if s.graph else {}).values()
        if topic.image_type and not any(p.node in outputs for p in topic.publishers)
    ]
    return sorted(found, key=lambda t: (-difflib.SequenceMatcher(None, t.name, name).ratio(), t.name))


def _type_fix(s: Snapshot, name: str, found: str) -> str:
    if found == COMPRESSED:
        return (
            f"# CompressedImage is read from <image>/compressed: remap the driver's topic to {name}/compressed, then "
            f"{_launch(s, image=name, transport='compressed')}"
        )
    if found == RAW:
        return f"# remap the driver's topic, then {_launch(s, image=name.removesuffix('/compressed'), transport='raw')}"
    return f"ros2 topic info -v {name}   # and give the camera's topic: {LAUNCH} image:=/camera/image_raw"


def qos(s: Snapshot) -> Findings:
    """Publishers and subscriptions of our nodes that the middleware does not connect."""
    if s.graph is None:
        return
    names, connected = {node.name for node in s.graph.nodes}, 0
    for topic in s.graph.topics.values():
        for m in topic.mismatches:
            if not {m.publisher.node, m.subscription.node} & names and topic.name not in _inputs(s):
                continue
            into = m.subscription.node in names
            yield Finding(
                "qos.incompatible",
                ERROR,
                f"{topic.name}: {m.subscription.node} ({m.subscription.qos}) gets nothing from {m.publisher.node} "
                f"({m.publisher.qos}): {_lower(m.reason)}",
                "The middleware does not connect them, and only a line in a log says so.",
                "set input.reliability: match (or best_effort) in params_file, then " + _launch(s, params=True)
                if into and "effort" in m.reason
                else f"# in {m.subscription.node}: {_qos_fix(m.reason)}",
            )
        connected += sum(p.node in names for p in topic.publishers) * len(topic.subscriptions) - len(topic.mismatches)
        if topic.name.endswith("/labels") and any(p.node in names for p in topic.publishers):
            for sub in topic.subscriptions:
                if sub.durability == "volatile":
                    yield Finding(
                        "qos.labels_volatile",
                        WARNING,
                        f"{sub.node} subscribes to {topic.name} as volatile",
                        "Labels are sent once an activation: who comes later gets none.",
                        f"# in {sub.node}: QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)",
                    )
    if connected > 0 and not any(t.mismatches for t in s.graph.topics.values()):
        yield good("qos.incompatible", f"QoS of all {connected} connections of our outputs match")


def _qos_fix(reason: str) -> str:
    text = reason.lower()
    if "deadline" in text:
        return "ask for a deadline no shorter than the publisher's (of ~/phase: output.deadline_s, 1 s)"
    if "lease" in text or "liveliness" in text:
        return (
            "ask for AUTOMATIC liveliness with a lease no shorter than the publisher's (of ~/phase: output.deadline_s)"
        )
    if "durab" in text or "volatile" in text or "transient" in text:
        return "ask for durability VOLATILE, or publish TRANSIENT_LOCAL"
    if "effort" in text:
        return "ask for reliability BEST_EFFORT, or publish RELIABLE"
    return "take the publisher's QoS (ros2 topic info -v)"


def type_hashes(s: Snapshot) -> Findings:
    """Two versions of one message."""
    for topic in s.graph.topics.values() if s.graph else ():
        for type_ in {e.type for e in (*topic.publishers, *topic.subscriptions)}:
            same = [e for e in (*topic.publishers, *topic.subscriptions) if e.type == type_ and e.type_hash]
            if len({e.type_hash for e in same}) > 1:
                odd = next(e for e in same if e.type_hash != same[0].type_hash)
                yield Finding(
                    "type.hash",
                    ERROR,
                    f"{topic.name}: {same[0].node} and {odd.node} have different versions of {type_}",
                    "Fields are read from the wrong places, or messages are dropped.",
                    "colcon build --packages-up-to surg_perception && source install/setup.bash   # on both machines, "
                    "then restart both nodes",
                )


# Transport ----------------------------------------------------------------------------------------------------------


def transport(s: Snapshot) -> Findings:
    """Whether the middleware carries images of this size."""
    if s.graph is None or not s.graph.rmw.startswith("rmw_fastrtps"):
        return
    machine = s.machine
    for who, env in [("this shell", machine.environment)] + [
        (f"{p.command} (process {p.pid})", p.environment) for p in machine.processes if p.domain == s.graph.domain
    ]:
        profile = machine.profiles.get(profile_of(env))
        if profile is not None and profile.fault:
            yield Finding(
                "dds.profile_missing",
                ERROR,
                f"{who} names the Fast DDS profile {profile.path}, which cannot be read: {profile.fault}",
                "Fast DDS then runs with its defaults and says nothing.",
                _export_profile(s),
            )
    for seen in s.graph.images:
        raw_publishers = [p for p in _topic(s, seen.topic).publishers if p.type == seen.type]
        if seen.arrivals_s and seen.bytes <= DEFAULT_SEGMENT:
            continue
        # Where none came, size is unknown, and being lost for it the first thing to think of.
        size = f"{seen.topic} ({f'{seen.bytes / 1e6:.1f} MB an image' if seen.arrivals_s else 'no image came'})"
        image_bytes = seen.bytes if seen.arrivals_s else _FULL_HD_BYTES
        if machine.rmem_max and machine.rmem_max < seen.bytes and any(p.here is False for p in raw_publishers):
            yield Finding(
                "dds.receive_buffer",
                WARNING,
                f"{size} comes from another machine, and net.core.rmem_max is {machine.rmem_max / 1e6:.1f} MB",
                "An image arrives as thousands of UDP packets; what does not fit the buffer is lost.",
                "sudo sysctl -w net.core.rmem_max=67108864 net.core.rmem_default=67108864   # or transport:=compressed",
            )
        # The publisher's segment carries the image; a reader's own does not matter.
        well = 0
        for publisher in raw_publishers:
            process = _process_of(s, publisher)
            if process is None:
                continue
            who = f"the publisher {publisher.node} (process {process.pid})"
            profile = machine.profiles.get(profile_of(process.environment))
            if profile is None and not process.environment.get("FASTDDS_BUILTIN_TRANSPORTS"):
                yield Finding(
                    "dds.profile_unloaded",
                    ERROR if seen.arrivals_s else WARNING,
                    f"{who} runs without a Fast DDS profile for large images; {size}",
                    "With the default shared-memory segment of 0.5 MB most raw images are lost without an error.",
                    f"{_export_profile(s)}   # where it is started, then restart it; or transport:=compressed",
                )
            elif profile is not None and not profile.fault and profile.segment_bytes < 2 * image_bytes:
                yield Finding(
                    "dds.segment_small",
                    ERROR if seen.arrivals_s else WARNING,
                    f"{who} loads {profile.path}, whose shared-memory segment of {profile.segment_bytes / 1e6:.1f} MB "
                    f"holds no two images of {size if seen.arrivals_s else f'1920x1080; {size}'}",
                    "Images that do not fit are lost without an error.",
                    f"{_export_profile(s)}   # or a larger <segment_size>; or transport:=compressed",
                )
            else:
                well += 1
        if well and well == len(raw_publishers) and seen.arrivals_s:
            yield good("dds.profile", f"the publisher of {size} is set up for large images")


def shared_memory(s: Snapshot) -> Findings:
    """/dev/shm: size, room, owners."""
    shm = s.machine.shm
    if shm is None:
        return
    image = max((i.bytes for i in s.graph.images), default=0) if s.graph else 0
    text = f"/dev/shm has {shm.free / 2**20:.0f} of {shm.total / 2**20:.0f} MiB free"
    big = "docker run --shm-size=1g --ipc=host …   # or: sudo mount -o remount,size=1G /dev/shm"
    why = "Fast DDS keeps images there; where it cannot, they go over UDP and most are lost."
    if shm.free < max(4 * image, 4 << 20):
        full = shm.total >= 256 << 20
        fix = "fastdds shm clean   # removes what killed processes left; else `ls -lS /dev/shm`" if full else big
        yield Finding("dds.shm_full", ERROR, text, why, fix)
    elif shm.total < 256 << 20:
        yield Finding(
            "dds.shm_small", WARNING, text, f"{why} The profile asks for 128 MiB a process as it is used.", big
        )
    else:
        yield good("dds.shm", text)
    if shm.foreign_files:
        yield Finding(
            "dds.shm_owner",
            WARNING,
            f"{shm.foreign_files} Fast DDS files in /dev/shm belong to another user and are closed to this one",
            "A node that ran as root keeps nodes of other users from being reached through shared memory.",
            "run all nodes as one user; when none runs: sudo rm -f /dev/shm/fastrtps_* /dev/shm/sem.fastrtps_* "
            "/dev/shm/fastdds_* /dev/shm/sem.fastdds_*",
        )


# What the images are ------------------------------------------------------------------------------------------------


def image_stream(s: Snapshot) -> Findings:
    """Whether images arrive, at which rate, and whether they hold pictures."""
    for seen in s.graph.images if s.graph else ():
        topic = _topic(s, seen.topic)
        if not seen.arrivals_s:
            yield Finding(
                "image.silent",
                ERROR,
                f"{seen.topic} has a publisher ({_list(p.node for p in topic.publishers)}), and no image came",
                "The driver is paused or waits for its device, or large images are lost on the way.",
                f"ros2 topic info -v {seen.topic}   # then the driver's log; transport:=compressed for a slow link",
            )
            continue
        size = f"{seen.width}x{seen.height}, {seen.bytes / 1e6:.2f} MB" if seen.width else f"{seen.bytes / 1e6:.2f} MB"
        if seen.faults:
            for kind, text in seen.faults:
                yield Finding(
                    "image.malformed",
                    ERROR,
                    f"{seen.topic}: {text}",
                    f"Such images are refused ({kind}) and counted in frames_rejected.",
                    f"ros2 topic echo --once --no-arr {seen.topic}   # and correct it in the driver "
                    f"({_list(p.node for p in topic.publishers)})",
                )
            continue
        rate = seen.rate_hz
        node = next((n for n in _nodes(s, *READERS) if seen.topic in dict(n.reads)), None)
        silence_s = float(node.parameters.get("state.no_signal_after_s", 0.5)) if node else 0.5
        if 0 < rate < SLOW_HZ:
            flickers = 1 / rate > silence_s
            yield Finding(
                "image.rate",
                WARNING,
                f"{seen.topic} comes at {rate:.1f} Hz ({size})",
                f"State is NO_SIGNAL between two images: state.no_signal_after_s is {silence_s:g}."
                if flickers
                else "The phase follows with as much delay.",
                f"ros2 param set {_phase_name(s)} state.no_signal_after_s {min(2 / rate, 3600):.1f}   # and no longer "
                "than output.deadline_s; or raise the camera's rate"
                if flickers
                else f"ros2 param dump {next((p.node for p in topic.publishers), '/camera')}   # its frame rate",
            )
        else:
            yield good("image.stream", f"{seen.topic}: {size}{f', {rate:.0f} Hz' if rate else ''}")
        for node in _nodes(s, *READERS):
            limit = node.parameters.get("input.max_pixels")
            if seen.topic in dict(node.reads) and limit and seen.width * seen.height > limit:
                yield Finding(
                    "image.too_large",
                    ERROR,
                    f"{seen.topic} has {seen.width}x{seen.height} = {seen.width * seen.height} pixels, "
                    f"{node.name} takes {limit} (input.max_pixels)",
                    "Larger images are refused, to guard memory against a wrong header.",
                    _reconfigure(node.name, "input.max_pixels", str(seen.width * seen.height)),
                )


def stamps(s: Snapshot) -> Findings:
    """Whether stamps and clocks belong together."""
    g = s.graph
    if g is None:
        return
    for seen in g.images:
        if not seen.stamps_ns:
            continue
        readers = [n for n in _nodes(s, *READERS) if seen.topic in dict(n.reads)]
        sim = any(n.parameters.get("use_sim_time") for n in readers)
        ages = seen.sim_ages_s if sim and seen.sim_ages_s else seen.ages_s
        max_age_s = max((float(n.parameters.get("state.max_age_s", 0.5)) for n in readers), default=0.5)
        publisher = _list(p.node for p in _topic(s, seen.topic).publishers)
        if not any(seen.stamps_ns):
            yield Finding(
                "stamp.zero",
                ERROR,
                f"{seen.topic}: all stamps are zero",
                "A phase cannot be told from an old one: every state is STALE.",
                f"# in {publisher}: image.header.stamp = node.get_clock().now().to_msg()",
            )
            continue
        if len(seen.stamps_ns) > 2 and len(set(seen.stamps_ns)) == 1:
            yield Finding(
                "stamp.frozen",
                ERROR,
                f"{seen.topic}: {len(seen.stamps_ns)} images have the same stamp",
                "The filter's time stands still, and vqa keeps no image.",
                f"# in {publisher}: stamp each image when it is taken",
            )
        elif any(b < a for a, b in zip(seen.stamps_ns, seen.stamps_ns[1:], strict=False)):
            yield Finding(
                "stamp.backwards",
                WARNING,
                f"{seen.topic}: stamps go back",
                "Two publishers mix, a bag loops, or a clock was set: the temporal filter starts anew each time.",
                f"ros2 topic info -v {seen.topic}",
            )
        if sim and not seen.sim_ages_s:
            continue  # there is no clock to compare with; said below
        youngest, oldest = min(ages), max(ages)
        if oldest < -FUTURE_S:
            yield Finding(
                "stamp.future",
                ERROR if oldest < -max_age_s else WARNING,
                f"{seen.topic}: stamps are {_span(-oldest)} in the future",
                "The clocks differ: an old image passes for a fresh one, and the age in state and latency_ms is wrong.",
                "chronyc tracking   # on both machines; set up NTP or PTP between camera and this computer",
            )
        elif youngest > max_age_s:
            recording = youngest > HOUR_S
            yield Finding(
                "stamp.old",
                ERROR,
                f"{seen.topic}: stamps are {_span(youngest)} old, state.max_age_s is {max_age_s:g} s",
                "Every state is STALE. "
                + ("A recording is played." if recording else "Clocks differ, or images wait."),
                f"{_launch(s)} use_sim_time:=true   # and: ros2 bag play BAG --clock"
                if recording
                else "chronyc tracking   # clocks in step (NTP, PTP)? Else: depth 1 in the driver and in every relay",
            )
        else:
            yield good("stamp.age", f"{seen.topic}: stamps are {max(0.0, youngest) * 1e3:.0f} ms old")
    for node in g.nodes:
        sim = bool(node.parameters.get("use_sim_time"))
        restart = f"{_launch(s)} use_sim_time:={'false' if sim else 'true'}"
        if sim and not g.clock_publishers:
            yield Finding(
                "clock.missing",
                ERROR,
                f"{node.name} has use_sim_time, and nobody publishes /clock",
                "Its time stands still at zero: ages and timeouts mean nothing.",
                f"ros2 bag play BAG --clock   # or {restart}",
            )
        elif sim and not g.clock_messages:
            yield Finding(
                "clock.paused",
                WARNING,
                f"{node.name} has use_sim_time, and /clock stands still",
                "Its time stands still too.",
                "ros2 service call /rosbag2_player/resume rosbag2_interfaces/srv/Resume",
            )
        elif not sim and g.clock_messages and node.kind in READERS:
            yield Finding(
                "clock.ignored",
                WARNING,
                f"/clock is published, and {node.name} does not use it (use_sim_time is false)",
                "Ages are told by the machine's clock: images of a recording or a simulator are STALE.",
                restart,
            )


# What the nodes say -------------------------------------------------------------------------------------------------

_STATES: Mapping[str, tuple[str, str, str]] = {
    "NO_SIGNAL": (ERROR, "No usable image comes in, or the screen is blank (blue, black): look at the camera.", ""),
    "STALE": (
        WARNING,
        "Images are older than state.max_age_s when their phase is published.",
        "ros2 topic echo {node}/phase --field latency_ms   # and see the stamps above",
    ),
    "FAULT": (ERROR, "The model fails on images.", "ros2 topic echo /diagnostics --once   # `model` says why"),
    "NO_MODEL": (
        WARNING,
        "The model has no phase head: latent features only.",
        "surg-perception models list   # {launch} model:=<one with phases>; `surg-perception train phase` makes one",
    ),
    "UNCERTAIN": (
        WARNING,
        "The model is less sure than state.uncertain_below: another procedure, another camera, or a model that was not "
        "trained for it.",
        "surg-perception models list   # which model, trained for what",
    ),
}


def phase_output(s: Snapshot) -> Findings:
    """What `~/phase` says."""
    g = s.graph
    for seen in g.phases if g else ():
        node = next((n for n in _nodes(s, "phase") if n.name == seen.node), None)
        if node is None or node.state != "active":
            continue
        if not seen.states:
            yield Finding(
                "phase.silent",
                ERROR,
                f"{seen.node} is active, and nothing comes on {seen.node}/phase",
                "Even without images NO_SIGNAL is published within output.deadline_s: the node hangs.",
                f"ros2 lifecycle set {seen.node} deactivate && ros2 lifecycle set {seen.node} activate",
            )
            continue
        state, count = Counter(seen.states).most_common(1)[0]
        text = f"{seen.node}/phase is {state} in {count} of {len(seen.states)} messages"
        if state in _STATES:
            level, why, fix = _STATES[state]
            if state == "NO_SIGNAL":
                fix = f"surg-perception doctor --image {next((t for t, _ in node.reads), '/camera/image_raw')}"
                blank = next((i for i in (g.images if g else ()) if i.topic in dict(node.reads) and i.stamps_ns), None)
                if blank is not None and not blank.faults:
                    text += ", though images come"
                    why = (
                        "The picture is blank (towers send blue or black without a camera), or few images get through."
                    )
                    fix = f"ros2 run rqt_image_view rqt_image_view {blank.topic}"
            yield Finding(f"phase.{state.lower()}", level, text, why, fix.format(node=seen.node, launch=_launch(s)))
        else:
            yield good("phase.state", text)
        if seen.received >= 10 and seen.replaced > seen.received / 5:
            yield Finding(
                "phase.replaced",
                WARNING,
                f"{seen.node} leaves out {seen.replaced} of {seen.received} images: it is slower than the camera",
                "Newer images replace older ones (no delay builds up); the phase comes at a lower rate.",
                f"{_launch(s)} precision:=bf16   # or a GPU (docs/tensorrt.md), or a slower camera",
            )
        if seen.lost:
            yield Finding(
                "phase.lost",
                WARNING,
                f"{seen.lost} images were lost on their way to {seen.node} meanwhile",
                "The middleware drops what does not fit its buffers.",
                f"{_export_profile(s)}   # for driver and node; or {_launch(s, transport='compressed')}",
            )


def diagnostics(s: Snapshot) -> Findings:
    """WARN, ERROR and STALE of /diagnostics, as the nodes word them."""
    for status in s.graph.statuses if s.graph else ():
        if status.level in ("WARN", "ERROR", "STALE"):
            yield Finding(
                "diagnostics",
                ERROR if status.level == "ERROR" else WARNING,
                f"{status.node} says of its {status.name}: {status.message}",
                _diagnostics_why(status),
                _diagnostics_fix(s, status),
            )


def _diagnostics_why(status: Status) -> str:
    if "frames in a row took over" in status.message:
        return "Processing is slower than diagnostics.slow_frame_ms: the machine is busy, or the engine slow."
    if status.level == "STALE":
        return "Nothing usable comes in."
    return "The node found it itself."


def _diagnostics_fix(s: Snapshot, status: Status) -> str:
    if "frames in a row took over" in status.message:
        return (
            f"top -H -p $(pgrep -f {status.node.rpartition('/')[2]}_node | head -1)   # then {LAUNCH} precision:=bf16"
        )
    if "loading" in status.message:
        return "surg-perception doctor   # again in some seconds"
    return f"ros2 topic echo /diagnostics   # hardware_id {status.node}; then the node's log"


# Models, engines, machine -------------------------------------------------------------------------------------------


def models(s: Snapshot) -> Findings:
    """The phase model: there, whole, with phases."""
    for model in s.machine.models:
        if model.fault == "missing":
            yield Finding(
                "model.missing",
                ERROR,
                model.text,
                "configure fails.",
                "surg-perception models list   # then model:=<name or folder>; SURG_PERCEPTION_MODELS adds folders",
            )
        elif model.fault == "hash":
            yield Finding(
                "model.hash",
                ERROR,
                model.text,
                "The file is damaged or another one: configure refuses it.",
                f"surg-perception models verify {shlex.quote(model.asked)}   # after copying the folder again, whole",
            )
        elif not model.phases:
            yield Finding(
                "model.no_labels",
                WARNING,
                f"the model {model.model_id} has no phases",
                "The state is NO_MODEL: latent features only.",
                f"surg-perception train phase DATA --start {shlex.quote(model.asked)} --out MODEL   # docs/training.md",
            )
        else:
            yield good("model", f"{model.model_id}: {model.phases} phases, files as its card says")


def engines(s: Snapshot) -> Findings:
    """Inference engines: which run, and whether what was asked for is what runs."""
    found = s.machine.engines
    if found is None:
        return
    running = [kind for kind, reason in found.refusals.items() if reason is None and kind != "triton"]
    text = "; ".join(f"{kind}: {reason}" for kind, reason in found.refusals.items() if reason)
    if found.fault:
        yield Finding(
            "engine.none",
            ERROR,
            found.fault,
            "configure fails, or falls back.",
            "pip install -r requirements/runtime.txt   # ONNX Runtime and OpenVINO; with apt: rosdep install",
        )
    elif not running:
        yield Finding(
            "engine.none", ERROR, f"no inference engine runs: {text}", "configure fails.", "pip install onnxruntime"
        )
    else:
        yield good("engine.installed", f"engines that run here: {', '.join(running)}" + (f" ({text})" if text else ""))
    what_runs = [(p.node, p.backend) for p in (s.graph.phases if s.graph else ()) if p.backend]
    phases = {node.name: node for node in _nodes(s, "phase")}
    notes = {st.node: st.values.get("notes", "") for st in (s.graph.statuses if s.graph else ()) if st.name == "model"}
    for name, backend in what_runs or ([("a trial", found.name)] if found.name else []):
        node = phases.get(name) or (next(iter(phases.values()), None) if name == "a trial" else None)
        asked = node.parameters if node else {}
        kind, device, precision = [*backend.split(":"), "", ""][:3]
        wanted, wanted_precision = asked.get("runtime.backend", "auto"), asked.get("runtime.precision", "fp32")
        reason = notes.get(name) or "; ".join(found.notes)
        if wanted not in ("auto", kind):
            yield Finding(
                "engine.fell_back",
                ERROR,
                f"{name}: {wanted} was asked for, {backend} runs: {found.refusals.get(wanted) or reason}",
                "It falls back where runtime.allow_fallback is true, with another speed than expected.",
                _install(wanted),
            )
        if wanted_precision != precision and precision:
            yield Finding(
                "engine.precision",
                WARNING,
                f"{name}: {wanted_precision} was asked for, {backend} runs: {reason}",
                "The asked precision does not exist on the engine, or does not agree with fp32 on sample images.",
                f"{_launch(s)} precision:={precision}   # to say so; or backend:=openvino|tensorrt (docs/precision.md)",
            )
        if found.gpu and device == "CPU" and wanted == "auto":
            yield Finding(
                "engine.gpu_unused",
                WARNING,
                f"{name} runs {backend} though there is an NVIDIA GPU: {reason or text}",
                "No engine for the GPU is installed, or its engine is not built yet.",
                "surg-perception build-engine "
                + shlex.quote(str(asked.get("model.path", "gsvit_m0_phantom")))
                + "   # docs/tensorrt.md",
            )
        if name == "a trial":
            yield good("engine.trial", f"{backend} runs the model")
    if s.machine.cache_fault:
        yield Finding(
            "engine.cache",
            WARNING,
            f"compiled engines cannot be kept: {s.machine.cache_fault}",
            "TensorRT's engines would be built at every start, which takes minutes.",
            "export XDG_CACHE_HOME=<folder of your own>   # or: chmod 700 ~/.cache/surg_perception/engines",
        )


def _install(kind: str) -> str:
    packages = {"tensorrt": "tensorrt cuda-python"}
    if kind == "triton":
        return f"{LAUNCH} backend:=triton server_url:=grpc://host:8001   # docs/model_server.md"
    return f"pip install {packages.get(kind, kind)}   # or {LAUNCH} backend:=auto"


def questions(s: Snapshot) -> Findings:
    """What questions need: a model, its base models, PyTorch."""
    for answers in s.machine.answers:
        fine = not (answers.model_fault or answers.missing_base or answers.missing_packages)
        level = ERROR if any(n.kind == "vqa" for n in _nodes(s, "vqa")) else WARNING
        why = "Every question is answered with NOT_AVAILABLE; the phase is not concerned."
        if answers.missing_packages:
            yield Finding(
                "vqa.packages",
                level,
                f"questions need Python packages that are not installed: {', '.join(answers.missing_packages)}",
                why,
                "pip install -r requirements/surgllm.txt && pip install --no-deps -r requirements/surgllm-no-deps.txt",
            )
        if answers.model_fault:
            fix = "surg-perception models list   # and vqa_model:=<name or folder>"
            yield Finding("vqa.model", level, answers.model_fault, why, fix)
        for command in answers.missing_base:
            yield Finding(
                "vqa.base_model",
                level,
                f"the base model {command.rpartition(' ')[2]} is not on this machine",
                why,
                command,
            )
        if fine:
            yield good("vqa.model", f"questions: {answers.asked}, its base models and PyTorch are there")


def memory(s: Snapshot) -> Findings:
    """Room for models."""
    free = s.machine.memory_free
    if free is None:
        return
    text = f"{free / 2**30:.1f} GiB of memory free"
    if free < LOW_MEMORY:
        yield Finding(
            "memory.low",
            ERROR if free < NO_MEMORY else WARNING,
            text,
            "Nodes are killed where it runs out; vqa alone holds 1.3 GiB.",
            f"{_launch(s)} vqa:=false   # or end what holds memory: ps aux --sort=-rss | head",
        )
    else:
        yield good("memory", text)


CHECKS = (
    environment,
    nodes_there,
    unnamed,
    unseen,
    other_graphs,
    duplicates,
    lifecycle,
    image_topics,
    image_stream,
    stamps,
    qos,
    type_hashes,
    transport,
    shared_memory,
    phase_output,
    diagnostics,
    models,
    engines,
    questions,
    memory,
)


# Helpers ------------------------------------------------------------------------------------------------------------


def _nodes(s: Snapshot, *kinds: str) -> list[OurNode]:
    return [node for node in (s.graph.nodes if s.graph else ()) if node.kind in kinds]


def _inputs(s: Snapshot) -> dict[str, Topic]:
    """The image topics that matter: those that are read, else where a node would look."""
    g = s.graph
    if g is None:
        return {}
    names = {name for node in _nodes(s, *READERS) for name, _ in node.reads}
    if not names:
        phase = next(iter(_nodes(s, *READERS)), None)
        base = _absolute(s.image, s) if s.image else f"{phase.namespace if phase else _namespace(s)}/image"
        raw = phase is None or phase.parameters.get("input.transport", "raw") == "raw"
        names = {base if raw else f"{base}/compressed"}
        if phase is None and s.image and g.topics.get(base, Topic(base)).image_type == COMPRESSED:
            names = {base}
    return {name: g.topics.get(name, Topic(name)) for name in sorted(names)}


def _topic(s: Snapshot, name: str) -> Topic:
    return (s.graph.topics if s.graph else {}).get(name, Topic(name))


def _wanted(s: Snapshot, name: str) -> str:
    """The type in which a topic is, or would be, read."""
    types = {type_ for node in _nodes(s, *READERS) for topic, type_ in node.reads if topic == name}
    return next(iter(types), COMPRESSED if name.endswith("/compressed") else RAW)


def _readers(s: Snapshot, name: str) -> list[str]:
    return [node.name for node in _nodes(s, *READERS) if name in dict(node.reads)]


def _is_image(image: str, name: str, s: Snapshot) -> bool:
    base = _absolute(image, s)
    return not _readers(s, name) or name in (base, f"{base}/compressed")


def _absolute(topic: str, s: Snapshot) -> str:
    return topic.rstrip("/") if topic.startswith("/") else f"{_namespace(s)}/{topic}".rstrip("/")


def _namespace(s: Snapshot) -> str:
    return (s.namespace or DEFAULT_NAMESPACE).rstrip("/")


def _is_phase(topic: Topic) -> bool:
    owned = [p for p in topic.publishers if p.node == _parent(topic.name)]
    return topic.name.endswith("/phase") and any(p.type == "surg_perception_msgs/msg/SurgicalPhase" for p in owned)


def _parent(name: str) -> str:
    return name.rpartition("/")[0]


def _home(topic: str) -> str:
    """Namespace of the node that owns a private topic."""
    return _parent(_parent(topic)) or "/"


def _phase_name(s: Snapshot) -> str:
    return next((node.name for node in _nodes(s, "phase")), f"{_namespace(s)}/phase")


def _process_of(s: Snapshot, endpoint: Endpoint) -> Process | None:
    """The process of a publisher on this machine."""
    if endpoint.here is False:
        return None
    exact = [p for p in s.machine.processes if endpoint.pid is not None and p.pid & 0xFFFF == endpoint.pid]
    found = exact or [p for p in s.machine.processes if p.node == endpoint.node]
    return found[0] if len(found) == 1 else None


def _launch(s: Snapshot, image: str = "", transport: str = "", params: bool = False) -> str:
    """The launch command with what it needs beside its defaults."""
    nodes = s.graph.nodes if s.graph else ()
    namespace = (s.namespace or (nodes[0].namespace if nodes else DEFAULT_NAMESPACE)).strip("/")
    words = [LAUNCH]
    if namespace != DEFAULT_NAMESPACE.strip("/"):
        words.append(f"namespace:={namespace or '/'}")
    if image:
        words.append(f"image:={shlex.quote(image)}")
    if transport and transport != "raw":
        words.append(f"transport:={transport}")
    if transport == "raw" and any(n.parameters.get("input.transport") == "compressed" for n in nodes):
        words.append("transport:=raw")
    if params:
        words.append("params_file:=FILE")
    return " ".join(words)


def _reconfigure(node: str, parameter: str, value: str) -> str:
    """Commands that set a parameter which is read at configure."""
    step = f"ros2 lifecycle set {node}"
    return (
        f"{step} deactivate && {step} cleanup && ros2 param set {node} {parameter} {value} && "
        f"{step} configure && {step} activate"
    )


def _export_profile(s: Snapshot) -> str:
    path = s.machine.shipped_profile or "$(ros2 pkg prefix --share surg_perception)/config/fastdds_large_images.xml"
    return f"export FASTDDS_DEFAULT_PROFILES_FILE={path} FASTRTPS_DEFAULT_PROFILES_FILE={path}"


def _range(environment: Mapping[str, str]) -> str:
    """Discovery range that an environment asks for; ROS_LOCALHOST_ONLY comes first where it is set."""
    if environment.get("ROS_LOCALHOST_ONLY") == "1":
        return "LOCALHOST"
    text = environment.get("ROS_AUTOMATIC_DISCOVERY_RANGE", "").upper()
    return text if text in ("OFF", "LOCALHOST", "SYSTEM_DEFAULT") else "SUBNET"


def _process(p: Process, what: str) -> str:
    return f"{p.node or p.command} (process {p.pid}, {what} {getattr(p, what)})"


def _list(items: Iterable[str], most: int = 4) -> str:
    """The first of them, and how many more."""
    found = list(dict.fromkeys(items))
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return ", ".join(found[:most]) + more


def _short(type_: str) -> str:
    return type_.rpartition("/")[2]


def _lower(text: str) -> str:
    return text.removeprefix("ERROR: ").rstrip(".")


def _span(seconds: float) -> str:
    for unit, length in (("years", 31557600.0), ("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.2f} s"
