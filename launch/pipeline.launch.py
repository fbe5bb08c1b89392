# SPDX-License-Identifier: Apache-2.0
"""The pipeline: endoscope images in, surgical phase and latent features out.

    ros2 launch surg_perception pipeline.launch.py image:=/endoscope/left/image_raw model:=/models/my_gsvit
    ros2 launch surg_perception pipeline.launch.py cameras:="{left: /left/image_raw, right: /right/image_raw}"

Starts `phase` and `vqa` (questions about the images), on request `overlay` (pictures to look at), `gate` (the example
consumer) and `source` (a video or the phantom instead of a camera), and brings their lifecycles up, the source's last:
images flow only when everything that reads them is ready. The model of `vqa` is loaded in the background; nothing waits
for it. With several cameras each has all of this in a namespace of its own, and one that fails leaves the others alone.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable
from pathlib import Path

import yaml
from ament_index_python.packages import get_package_share_directory
from launch import LaunchContext, LaunchDescription
from launch.actions import (
    DeclareLaunchArgument,
    EmitEvent,
    LogInfo,
    OpaqueFunction,
    RegisterEventHandler,
    SetEnvironmentVariable,
    TimerAction,
)
from launch.event_handler import EventHandler
from launch.event_handlers import OnProcessExit, OnProcessStart
from launch.events import matches_action
from launch.events.process import ProcessExited
from launch.launch_description_entity import LaunchDescriptionEntity as Entity
from launch.logging import get_logger
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import LifecycleNode
from launch_ros.events.lifecycle import ChangeState, StateTransition
from launch_ros.ros_adapters import get_ros_node
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import GetState
from rclpy.client import Client

from surg_perception.nodes.dds_profile import ALLOCATOR, profile_environment
from surg_perception.nodes.parameter_table import PHASE

SHARE = Path(get_package_share_directory("surg_perception"))

AS_PARAMS_FILE = "(empty: as in params_file)"
SHARED = ("namespace", "cameras", "on_failure", "dds_profile")
"""Arguments of the whole launch, which a camera cannot have for itself."""

# name, default, description, choices
ARGUMENTS: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    ("namespace", "surg_perception", "Namespace of all nodes, e.g. one per arm or operating room.", ()),
    (
        "image",
        "image",
        "Topic of the endoscope images (sensor_msgs/Image); compressed images are expected at <image>/compressed.",
        (),
    ),
    (
        "cameras",
        "",
        "Several cameras, as YAML or a file of it: {name: topic, ...} or {name: {image: topic, argument: value, ...}, "
        "...} with this file's own arguments. Each gets all nodes in <namespace>/<name>. Empty: one, as image says.",
        (),
    ),
    (
        "on_failure",
        "auto",
        "stop: a node that cannot be brought up, or a phase node that dies, ends the launch; go_on: it is said, and "
        "the rest goes on; auto: stop, with several cameras go_on.",
        ("auto", "stop", "go_on"),
    ),
    ("transport", "raw", "Which of the two the nodes subscribe to.", ("raw", "compressed")),
    ("params_file", str(SHARE / "config" / "pipeline.yaml"), "Parameters of all nodes (YAML).", ()),
    (
        "model",
        "",
        f"Model name (`surg-perception models list`), model folder or ONNX file {AS_PARAMS_FILE}.",
        (),
    ),
    (
        "backend",
        "",
        f"Inference engine {AS_PARAMS_FILE}.",
        ("", *PHASE["runtime.backend"].choices),
    ),
    ("precision", "", f"Arithmetic of the network {AS_PARAMS_FILE}.", ("", *PHASE["runtime.precision"].choices)),
    (
        "threads",
        "",
        "CPU threads of the phase node's inference, 0: the engine chooses (empty: as in params_file; with several "
        "cameras an equal share of the cores).",
        (),
    ),
    ("server_url", "", f"Model server, grpc://host:port or grpcs://host:port {AS_PARAMS_FILE}.", ()),
    (
        "allow_fallback",
        "",
        f"false: configure fails where backend or precision cannot run as asked {AS_PARAMS_FILE}.",
        ("", "true", "false"),
    ),
    (
        "source",
        "",
        "Instead of a camera: 'phantom', a video file, or a folder of images. Empty: no source node.",
        (),
    ),
    ("source_width", "", f"Picture width of the source {AS_PARAMS_FILE}.", ()),
    ("source_height", "", f"Picture height of the source {AS_PARAMS_FILE}.", ()),
    ("source_rate_hz", "", f"Pictures a second of the source {AS_PARAMS_FILE}.", ()),
    ("source_duration_s", "", f"Length of the phantom's procedure {AS_PARAMS_FILE}.", ()),
    ("source_seed", "", f"Which phantom patient {AS_PARAMS_FILE}.", ()),
    ("source_loop", "", f"Start the source again at its end {AS_PARAMS_FILE}.", ("", "true", "false")),
    ("overlay", "false", "Start the overlay node (pictures with the phase drawn on).", ("true", "false")),
    (
        "overlay_video",
        "",
        "Write the overlay to this MP4 file. Video is patient data. Empty: not written.",
        (),
    ),
    ("overlay_image", "", "Write the newest overlay to this PNG file. Empty: not written.", ()),
    (
        "gate",
        "false",
        "Start the example consumer, which says on gate/trust whether a controller may use the phase.",
        ("true", "false"),
    ),
    (
        "vqa",
        "auto",
        "Start the node that answers questions (1.3 GiB with its model; without it the answer is NOT_AVAILABLE); auto: "
        "true, with several cameras false.",
        ("auto", "true", "false"),
    ),
    ("vqa_model", "", f"Model that answers questions, name or folder {AS_PARAMS_FILE}.", ()),
    ("vqa_threads", "", f"CPU threads of that model, 0: PyTorch chooses {AS_PARAMS_FILE}.", ()),
    ("vqa_niceness", "", f"Niceness of that model's threads, 0 to 19 {AS_PARAMS_FILE}.", ()),
    ("vqa_cpus", "", f"Cores that model may run on, such as 1 or 0,2-3 {AS_PARAMS_FILE}.", ()),
    ("use_sim_time", "false", "Use /clock (bag replay with --clock).", ("true", "false")),
    ("respawn", "false", "Restart a node that died, and bring it up again.", ("true", "false")),
    ("log_level", "info", "Log level of the nodes.", ("debug", "info", "warn", "error")),
    (
        "dds_profile",
        "true",
        "Load the package's Fast DDS profile and allocator settings for large images into the nodes; a profile "
        "that is already set in the environment is left alone. Default Fast DDS settings lose most raw images.",
        ("true", "false"),
    ),
)

# launch argument -> (node, parameter, type); an empty argument leaves the parameter to params_file
OVERRIDES: dict[str, tuple[str, str, type]] = {
    "model": ("phase", "model.path", str),
    "backend": ("phase", "runtime.backend", str),
    "precision": ("phase", "runtime.precision", str),
    "threads": ("phase", "runtime.threads", int),
    "server_url": ("phase", "runtime.server_url", str),
    "allow_fallback": ("phase", "runtime.allow_fallback", bool),
    "source": ("source", "source", str),
    "source_width": ("source", "width", int),
    "source_height": ("source", "height", int),
    "source_rate_hz": ("source", "rate_hz", float),
    "source_duration_s": ("source", "duration_s", float),
    "source_seed": ("source", "seed", int),
    "source_loop": ("source", "loop", bool),
    "overlay_video": ("overlay", "record.video_path", str),
    "overlay_image": ("overlay", "record.image_path", str),
    "vqa_model": ("vqa", "model.path", str),
    "vqa_threads": ("vqa", "runtime.threads", int),
    "vqa_niceness": ("vqa", "runtime.niceness", int),
    "vqa_cpus": ("vqa", "runtime.cpus", str),
}


class BringUp:
    """Drives the lifecycles: configure each node when its process starts, activate them in order.

    A node that cannot be configured or activated ends the launch with a non-zero exit code, or where it is to go on,
    is named as an error. With respawn a node that comes back is brought up again.
    """

    def __init__(self, nodes: list[LifecycleNode], respawn: bool, go_on: bool) -> None:
        self.nodes = nodes
        self.respawn = respawn
        self.go_on = go_on
        self.state = ["starting"] * len(nodes)
        self.answer = [""] * len(nodes)
        self.clients: dict[int, Client] = {}

    def handlers(self) -> list[Entity]:
        handlers: list[Entity] = []
        for i, node in enumerate(self.nodes):
            handlers.append(
                RegisterEventHandler(
                    OnProcessStart(target_action=node, on_start=[OpaqueFunction(function=self._started, args=[i])])
                )
            )
            handlers.append(RegisterEventHandler(OnProcessExit(target_action=node, on_exit=self._exited(i))))
            handlers.append(
                RegisterEventHandler(
                    EventHandler(
                        matcher=lambda event, node=node: isinstance(event, StateTransition) and event.action is node,
                        entities=[OpaqueFunction(function=self._moved, args=[i])],
                    )
                )
            )
        return handlers

    def _change(self, i: int, transition_id: int) -> Entity:
        return EmitEvent(
            event=ChangeState(lifecycle_node_matcher=matches_action(self.nodes[i]), transition_id=transition_id)
        )

    def _started(self, context: LaunchContext, i: int) -> list[Entity]:
        self.state[i] = "starting"
        self.answer[i] = ""
        return self._configure(context, i)

    def _configure(self, context: LaunchContext, i: int) -> list[Entity]:
        """Ask the node for its state until it answers, and only then for configure; again, if it stays unconfigured.

        While DDS discovers a new process, or still shows the service of one that crashed, a request can be lost and
        never gets an answer. Asking for the state again does no harm; asking for configure again would.
        """
        if self.state[i] != "starting" or context.is_shutdown:
            return []
        answer, self.answer[i] = self.answer[i], ""
        if answer == "unconfigured":
            return [self._change(i, Transition.TRANSITION_CONFIGURE), self._again(i, 3.0)]
        if i not in self.clients:
            name = f"{self.nodes[i].node_name}/get_state"
            self.clients[i] = get_ros_node(context).create_client(GetState, name)
        if self.clients[i].service_is_ready():
            asked = self.clients[i].call_async(GetState.Request())
            asked.add_done_callback(lambda done: self.answer.__setitem__(i, done.result().current_state.label))
        return [self._again(i, 0.1)]

    def _again(self, i: int, after_s: float) -> Entity:
        return TimerAction(period=after_s, actions=[OpaqueFunction(function=self._configure, args=[i])])

    def _exited(self, i: int) -> Callable[[ProcessExited, LaunchContext], list[Entity]]:
        def check(event: ProcessExited, context: LaunchContext) -> list[Entity]:
            if context.is_shutdown or self.respawn:
                return []
            ended = f"{self.nodes[i].node_name} ended with exit status {event.returncode}"
            # The pipeline is of no use without phase; without pictures to look at, or answers, it is.
            if (i == 0 or "active" not in self.state[i]) and not self.go_on:
                raise RuntimeError(f"{ended}: its output above says why")
            get_logger("launch").error(f"{ended}; the rest goes on")
            before, self.state[i] = self.state[i], "failed"
            return [] if before == "active" else self._activate_next()

        return check

    def _moved(self, context: LaunchContext, i: int) -> list[Entity]:
        event = context.locals.event
        before, self.state[i] = event.start_state, event.goal_state
        if (before, event.goal_state) in (("configuring", "unconfigured"), ("activating", "inactive")):
            verb = "configured" if before == "configuring" else "activated"
            failed = f"{self.nodes[i].node_name} could not be {verb}: its own message above says why"
            if not self.go_on:
                raise RuntimeError(f"{failed}. Stopping the pipeline")
            get_logger("launch").error(f"{failed}. The rest goes on")
            self.state[i] = "failed"
            return self._activate_next()
        if before not in ("configuring", "activating"):
            return []
        return self._activate_next()

    def _activate_next(self) -> list[Entity]:
        """Activate the first node whose turn it is; one that has failed has none."""
        for j, state in enumerate(self.state):
            if state == "inactive":
                self.state[j] = "activating"
                return [self._change(j, Transition.TRANSITION_ACTIVATE)]
            if state not in ("active", "failed"):
                return []
        up = [node.node_name for node, state in zip(self.nodes, self.state, strict=True) if state == "active"]
        return [LogInfo(msg=f"pipeline up: {', '.join(up)} active")] if up else []


def dds_environment(cameras: int) -> list[Entity]:
    """Environment that lets large images through, where the user has not chosen otherwise."""
    allocator = {name: value for name, value in ALLOCATOR.items() if name not in os.environ}
    profile, note = profile_environment(cameras)
    variables = [SetEnvironmentVariable(name, value) for name, value in {**allocator, **profile}.items()]
    return [*variables, *([LogInfo(msg=note)] if note else [])]


def truth(text: str) -> bool:
    return text.lower() in ("true", "1", "yes", "on")


def read_cameras(text: str) -> dict[str, dict[str, str]]:
    """The argument `cameras`: name to the launch arguments of that camera alone; RuntimeError says what is wrong."""
    expected = "expected {name: topic, ...} or {name: {image: topic, ...}, ...}"
    try:
        content = Path(text).read_text() if not text.lstrip().startswith("{") else text
        root = yaml.compose(content, yaml.SafeLoader)
        cameras = yaml.safe_load(content)
    except (OSError, yaml.YAMLError) as error:
        raise RuntimeError(f"cameras:={text}: {' '.join(str(error).split())}; {expected}, or a file of it") from None
    if not isinstance(cameras, dict) or not cameras:
        raise RuntimeError(f"cameras:={text}: {expected}")
    choices = {name: choices for name, _, _, choices in ARGUMENTS if name not in SHARED}
    names = [key.value for key, _ in root.value]
    result: dict[str, dict[str, str]] = {}
    for name, own in cameras.items():
        where = f"cameras:={text}: camera {name!r}"
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*(/[A-Za-z][A-Za-z0-9_]*)*", str(name)) or "__" in str(name):
            raise RuntimeError(f"{where}: a name is letters, digits and single _, from a letter on, with / between")
        if names.count(name) > 1:
            raise RuntimeError(f"{where} is there {names.count(name)} times, expected once")
        own = {"image": own} if isinstance(own, str) else own or {}
        if not isinstance(own, dict):
            raise RuntimeError(f"{where} is {own!r}; {expected}")
        for key, value in own.items():
            if key not in choices:
                close = difflib.get_close_matches(str(key), choices, n=1)
                hint = f"; did you mean {close[0]}?" if close else f"; expected any of {', '.join(choices)}"
                raise RuntimeError(f"{where}: {key} is no argument of one camera{hint}")
            own[key] = "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
            if choices[key] and own[key] not in choices[key]:
                raise RuntimeError(f"{where}: {key} is {value!r}, expected one of: {', '.join(choices[key])}")
        result[name] = own
    return result


def pipeline(context: LaunchContext) -> list[Entity]:
    argument = {name: LaunchConfiguration(name).perform(context) for name, *_ in ARGUMENTS}
    cameras = read_cameras(argument["cameras"]) if argument["cameras"] else {}
    entities = dds_environment(max(1, len(cameras))) if truth(argument["dds_profile"]) else []
    if not cameras:
        return [*entities, *camera_nodes(argument, go_on=argument["on_failure"] == "go_on")]
    several = {"threads": argument["threads"] or str(max(1, len(os.sched_getaffinity(0)) // len(cameras)))}
    several["vqa"] = "false" if argument["vqa"] == "auto" else argument["vqa"]
    for name, own in cameras.items():
        namespace = f"{argument['namespace'].rstrip('/')}/{name}"
        entities += camera_nodes(
            {**argument, **several, **own, "namespace": namespace}, go_on=argument["on_failure"] != "stop"
        )
    return entities


def camera_nodes(argument: dict[str, str], go_on: bool) -> list[Entity]:
    """The nodes of one camera and what brings them up."""
    if not Path(argument["params_file"]).is_file():
        raise RuntimeError(f"params_file:={argument['params_file']}: there is no such file")

    overrides: dict[str, dict[str, object]] = {"phase": {}, "overlay": {}, "gate": {}, "source": {}, "vqa": {}}
    for name, (node, parameter, kind) in OVERRIDES.items():
        text = argument[name]
        if text == "":
            continue
        try:
            overrides[node][parameter] = truth(text) if kind is bool else kind(text)
        except ValueError:
            raise RuntimeError(f"{name}:={text}: expected {kind.__name__}") from None
    for reader in ("phase", "overlay", "vqa"):
        overrides[reader]["input.transport"] = argument["transport"]
    overrides["source"]["output.transport"] = argument["transport"]

    names = ["phase"]
    if truth(argument["overlay"]) or argument["overlay_video"] or argument["overlay_image"]:
        names.append("overlay")
    if truth(argument["gate"]):
        names.append("gate")
    if argument["vqa"] != "false":
        names.append("vqa")
    if argument["source"]:
        names.append("source")
    image = argument["image"].rstrip("/")
    nodes = [
        LifecycleNode(
            package="surg_perception",
            executable=f"{name}_node",
            name=name,
            namespace=argument["namespace"],
            parameters=[
                argument["params_file"],
                {**overrides[name], "use_sim_time": truth(argument["use_sim_time"])},
            ],
            remappings=[("image", image), ("image/compressed", f"{image}/compressed")],
            arguments=["--ros-args", "--log-level", f"{name}:={argument['log_level']}"],
            output="screen",
            respawn=truth(argument["respawn"]),
            respawn_delay=0.2,  # starting Python takes longer: a node that dies at once does not spin
        )
        for name in names
    ]
    return [*BringUp(nodes, truth(argument["respawn"]), go_on).handlers(), *nodes]


def generate_launch_description() -> LaunchDescription:
    return LaunchDescription(
        [
            *(
                DeclareLaunchArgument(name, default_value=default, description=description, choices=choices or None)
                for name, default, description, choices in ARGUMENTS
            ),
            OpaqueFunction(function=pipeline),
        ]
    )
