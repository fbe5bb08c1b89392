# SPDX-License-Identifier: Apache-2.0
"""`surg-perception doctor` on live graphs in which something is wrong, each fault made for real."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

rclpy = pytest.importorskip("rclpy", reason="ROS 2 is not in the environment: `source setup.bash` first")

from conftest import Graph, wait_until
from folders import SHIPPED, copied
from images import jpeg_image, raw_image, stamped
from rclpy.duration import Duration
from rclpy.parameter import Parameter
from rclpy.qos import DurabilityPolicy, LivelinessPolicy, QoSProfile, ReliabilityPolicy
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import Image
from std_msgs.msg import String
from surg_perception_msgs.msg import LatentFeatures, PhaseLabels, SurgicalPhase

from surg_perception.cli import doctor as command
from surg_perception.diagnosis.findings import Finding, examine
from surg_perception.diagnosis.machine import machine
from surg_perception.diagnosis.snapshot import Snapshot
from surg_perception.nodes import doctor
from surg_perception.nodes.phase_node import PhaseNode

PICTURE = np.random.default_rng(0).integers(40, 200, (240, 320, 3), np.uint8)
SECONDS = 1.5

# A camera in a process of its own: node name, topic, width, height.
CAMERA = """
import sys, time, rclpy
from sensor_msgs.msg import Image
name, topic, width, height = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
rclpy.init()
node = rclpy.create_node(name)
publisher = node.create_publisher(Image, topic, 1)
image = Image(width=width, height=height, step=3 * width, encoding="bgr8")
import array
image.data = array.array("B", bytes(range(1, 251)) * (3 * width * height // 250 + 1))[: 3 * width * height]
while True:
    image.header.stamp = node.get_clock().now().to_msg()
    publisher.publish(image)
    time.sleep(0.1)
"""


@pytest.fixture
def processes() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts processes of the test's own, and ends them."""
    with ExitStack() as undo:

        def start(*words: str, **environment: str) -> subprocess.Popen[bytes]:
            process = subprocess.Popen([*words], env={**os.environ, **environment}, stderr=subprocess.DEVNULL)
            undo.callback(process.wait)
            undo.callback(process.kill)
            return process

        yield start


class Patient:
    """A phase node, a camera that keeps publishing, and the doctor."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.node: Any = None

    def up(self, *transitions: str, **parameters: Any) -> Patient:
        defaults = {"runtime__backend": "onnxruntime", "state__max_age_s": 60.0, "state__no_signal_after_s": 0.9}
        self.node = self.graph.start(PhaseNode, **{**defaults, **parameters})
        for transition in transitions:
            assert self.graph.transition(self.node, transition)
        return self

    def active(self, **parameters: Any) -> Patient:
        return self.up("configure", "activate", **parameters)

    def camera(
        self,
        topic: str = "image",
        message: Any = None,
        stamp: Callable[[int], int] = lambda now_ns: now_ns,
        qos: Any = 1,
        rate_hz: float = 10.0,
    ) -> Any:
        """Publish this message again and again, stamped by a function of the time now."""
        message = raw_image(PICTURE) if message is None else message
        publisher = self.graph.client.create_publisher(type(message), topic, qos)
        self.graph.client.create_timer(1 / rate_hz, lambda: publisher.publish(stamped(message, stamp(time.time_ns()))))
        return publisher

    def examined(self, namespace: str = "", image: str = "") -> list[Finding]:
        """What the doctor finds in the graph."""
        here = machine()
        return examine(Snapshot(here, doctor.look(namespace, image, SECONDS, here.processes), "", namespace, image))

    def found(self, check: str, *words: str, **where: str) -> Finding:
        """The finding of this check that holds all words in its text or fix."""
        all_ = self.examined(**where)
        for finding in all_:
            if finding.check == check and all(word in finding.text + finding.fix for word in words):
                return finding
        pytest.fail(f"no {check} with {words}; found: {[f for f in all_ if f.level != 'ok']}")


@pytest.fixture
def patient(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> Patient:
    monkeypatch.setattr(doctor, "DISCOVERY_S", 1.5)
    return Patient(graph)


def cli(*words: str, prefix: tuple[str, ...] = (), **environment: str) -> tuple[int, dict[str, dict[str, str]]]:
    """Exit status and findings of the command, as a user runs it."""
    done = subprocess.run(
        [*prefix, sys.executable, "-m", "surg_perception.cli.main", "doctor", "--json", "--seconds", "1", *words],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
    )
    assert done.stdout, done.stderr
    findings = json.loads(done.stdout)["findings"]
    return done.returncode, {f["check"]: f for f in sorted(findings, key=lambda f: f["level"] != "ok")}


# A graph that is well, and none ---------------------------------------------------------------------------------------


def test_a_healthy_pipeline_has_no_errors_and_is_left_as_it_was(patient: Patient) -> None:
    patient.active()
    publisher = patient.camera()
    phases = patient.graph.collect(SurgicalPhase, "phase/phase")
    wait_until(
        lambda: [p for p in phases if p.state == SurgicalPhase.OK or p.state == SurgicalPhase.UNCERTAIN], 60, "a phase"
    )
    before = dict(patient.node.values)
    found = patient.examined()
    assert [f for f in found if f.level == "error"] == []
    good = {f.check for f in found if f.level == "ok"}
    assert good >= {"node.found", "image.publisher", "image.stream", "stamp.age", "qos.incompatible"}
    assert (patient.node.values, patient.node.state_label) == (before, "active")
    wait_until(lambda: publisher.get_subscription_count() == 1, 30, "the doctor's subscription to be gone")


def test_versions_of_messages_and_processes_are_read_from_the_endpoints(patient: Patient) -> None:
    patient.active()
    patient.camera()
    seen = doctor.look("", "", SECONDS, ())
    for endpoint in (
        *seen.topics["/surg_perception/image"].publishers,
        *seen.topics["/surg_perception/image"].subscriptions,
    ):
        assert endpoint.type_hash == "" or endpoint.type_hash.startswith("RIHS01_")
        if endpoint.pid is not None:
            assert (endpoint.pid, endpoint.here) == (os.getpid() & 0xFFFF, True)
    assert seen.nodes[0].parameters["runtime.backend"] == "onnxruntime"


def test_nothing_runs(domain: int) -> None:
    status, found = cli()
    assert status == 1
    assert found["node.missing"]["fix"] == "ros2 launch surg_perception pipeline.launch.py"
    assert found["image.no_publisher"]["level"] == "error"
    assert found["model"]["level"] == "ok"


def test_the_table_for_people_names_the_fix(domain: int) -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "surg_perception.cli.main", "doctor", "--seconds", "1"], capture_output=True, text=True
    )
    assert shown.returncode == 1
    assert "✗ no surg_perception node found" in shown.stdout
    assert "fix: ros2 launch surg_perception pipeline.launch.py" in shown.stdout


# Nodes ----------------------------------------------------------------------------------------------------------------


def test_nodes_that_are_not_active(patient: Patient) -> None:
    patient.up()
    assert "configure" in patient.found("node.inactive", "is unconfigured").fix
    assert patient.graph.transition(patient.node, "configure")
    assert patient.found("node.inactive", "is inactive").fix == "ros2 lifecycle set /surg_perception/phase activate"


def test_two_nodes_of_one_name(patient: Patient) -> None:
    patient.up()
    patient.up()
    patient.found("node.duplicate", "2 nodes are called /surg_perception/phase")


def test_another_namespace(patient: Patient) -> None:
    patient.active()
    patient.found("node.other_namespace", "--namespace /surg_perception", namespace="/ECM")


def test_a_node_that_is_stopped(patient: Patient, processes: Any, tmp_path: Path) -> None:
    script = tmp_path / "phase_node"  # as setuptools installs it
    script.write_text("from surg_perception.nodes.phase_node import main; main()")
    process = processes(
        sys.executable, str(script),
        *("--ros-args", "-r", "__node:=phase", "-r", "__ns:=/surg_perception"),
    )  # fmt: skip
    services = patient.graph.client.get_service_names_and_types
    wait_until(lambda: "/surg_perception/phase/get_state" in dict(services()), 60, "the node")
    process.send_signal(signal.SIGSTOP)
    patient.found("node.unseen", f"process {process.pid}", f"kill -CONT {process.pid}")


def test_a_node_that_hangs(patient: Patient) -> None:
    context = patient.graph.stranger().context
    hanging = PhaseNode(context=context, namespace="surg_perception")  # nothing spins it
    patient.found("node.silent", "/surg_perception/phase does not answer")
    hanging.destroy_node()


# Images: topic, type, QoS ---------------------------------------------------------------------------------------------


def test_images_on_another_topic(patient: Patient) -> None:
    patient.active()
    patient.camera("/depth/picture")
    patient.camera("/endoscope/image")
    fix = patient.found("image.no_publisher", "/endoscope/image (Image), /depth/picture").fix
    assert fix.endswith("image:=/endoscope/image")
    patient.found("image.other_topic", "not /endoscope/image", image="/endoscope/image")


def test_only_compressed_images(patient: Patient) -> None:
    patient.active()
    patient.camera("image/compressed", jpeg_image(PICTURE))
    assert patient.found("image.transport", "/surg_perception/image/compressed").fix.endswith("transport:=compressed")


def test_only_raw_images(patient: Patient) -> None:
    patient.active(input__transport="compressed")
    patient.camera()
    assert patient.found("image.transport").fix.endswith("transport:=raw")


def test_another_type_on_the_topic(patient: Patient) -> None:
    patient.active()
    other = patient.graph.stranger()
    publisher = other.create_publisher(String, "image", 1)
    patient.found("image.type", "std_msgs/msg/String")
    other.destroy_publisher(publisher)


def test_two_cameras_on_one_topic(patient: Patient) -> None:
    patient.active()
    patient.camera()
    patient.camera(stamp=lambda now_ns: now_ns - 10**9, rate_hz=7.0)
    found = {f.check for f in patient.examined()}
    assert {"image.two_publishers", "stamp.backwards"} <= found


def test_qos_that_cannot_match(patient: Patient) -> None:
    patient.active(input__reliability="reliable")
    patient.camera(qos=QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT))
    client, ignore = patient.graph.client, lambda message: None
    short = Duration(seconds=0.1)
    for topic, type_, qos in (
        ("phase/phase", SurgicalPhase, QoSProfile(depth=1, deadline=short)),
        ("phase/latent", LatentFeatures, QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)),
        ("phase/labels", PhaseLabels, QoSProfile(depth=1)),
        (
            "phase/phase",
            SurgicalPhase,
            QoSProfile(depth=1, liveliness=LivelinessPolicy.AUTOMATIC, liveliness_lease_duration=short),
        ),
    ):
        client.create_subscription(type_, topic, ignore, qos)
    found = patient.examined()
    bad = [f for f in found if f.check == "qos.incompatible" and f.level == "error"]
    assert any("input.reliability: match" in f.fix for f in bad), bad
    assert any("deadline" in f.text and "output.deadline_s" in f.fix for f in bad), bad
    assert any("lease" in f.fix for f in bad), bad
    assert any("latent" in f.text and "VOLATILE" in f.fix for f in bad), bad
    assert any(f.check == "qos.labels_volatile" for f in found), found


# What the images are --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stamp", "check", "words"),
    [
        (lambda now_ns: 0, "stamp.zero", ()),
        (lambda now_ns: 10**18, "stamp.frozen", ()),
        (lambda now_ns: now_ns + 3600 * 10**9, "stamp.future", ("NTP",)),
        (lambda now_ns: now_ns - 9 * 365 * 86400 * 10**9, "stamp.old", ("years", "use_sim_time:=true")),
        (lambda now_ns: now_ns - 90 * 10**9, "stamp.old", ("90.", "depth 1")),
    ],
    ids=["zero", "frozen", "future", "years", "late"],
)
def test_stamps(patient: Patient, stamp: Callable[[int], int], check: str, words: tuple[str, ...]) -> None:
    patient.camera(stamp=stamp)
    patient.found(check, *words)


def test_simulated_time_without_a_clock_and_a_clock_that_is_not_used(patient: Patient) -> None:
    patient.active(use_sim_time=True)
    patient.camera()
    patient.found("clock.missing", "ros2 bag play BAG --clock")
    clock = patient.graph.client.create_publisher(Clock, "/clock", 1)
    patient.found("clock.paused")
    patient.node.set_parameters([Parameter("use_sim_time", value=False)])
    message = Clock()
    message.clock.sec = 1000
    patient.graph.client.create_timer(0.1, lambda: clock.publish(message))
    patient.found("clock.ignored", "use_sim_time:=true")


def test_malformed_and_too_large_images(patient: Patient) -> None:
    patient.active(input__max_pixels=1000)
    message = raw_image(PICTURE)
    patient.camera(message=message)
    patient.found("image.too_large", "76800", "input.max_pixels 76800")
    message.step = 7
    patient.found("image.malformed", "step")


def test_a_camera_that_publishes_nothing_and_a_slow_one(patient: Patient) -> None:
    patient.active()
    publisher = patient.graph.client.create_publisher(Image, "image", 1)
    patient.found("image.silent", "no image came")
    patient.graph.client.destroy_publisher(publisher)
    patient.camera(rate_hz=2.0)
    patient.found("image.rate")


# What the node says ---------------------------------------------------------------------------------------------------


def test_states_are_explained(patient: Patient, monkeypatch: pytest.MonkeyPatch) -> None:
    patient.active(state__max_age_s=0.5)
    found = {f.check for f in patient.examined()}
    assert {"phase.no_signal", "diagnostics"} <= found
    age_s = 5
    patient.camera(stamp=lambda now_ns: now_ns - age_s * 10**9)
    found = {f.check for f in patient.examined()}
    assert {"phase.stale", "stamp.old"} <= found

    def fail(frame: Any) -> Any:
        raise RuntimeError("out of order")

    monkeypatch.setattr(patient.node._backend, "infer", fail)
    patient.node.values = {**patient.node.values, "runtime.allow_fallback": False}
    found_fault = patient.examined()
    assert "phase.fault" in {f.check for f in found_fault}
    assert any(f.check == "diagnostics" and "out of order" in f.text for f in found_fault)


def test_a_blank_screen(patient: Patient) -> None:
    patient.active()
    patient.camera(message=raw_image(np.zeros_like(PICTURE)))
    patient.found("phase.no_signal", "though images come")


# Models and engines ---------------------------------------------------------------------------------------------------


def whole_look() -> list[Finding]:
    return examine(command.look("", "", SECONDS))


def test_a_model_that_is_missing_or_damaged(patient: Patient, tmp_path: Path) -> None:
    copied(tmp_path / "mine")
    with (tmp_path / "mine/model.onnx").open("ab") as file:
        file.write(b"x")
    patient.up(model__path=str(tmp_path / "mine"))
    found = whole_look()
    assert "model.hash" in {f.check for f in found}, found
    (tmp_path / "mine/model.yaml").unlink()
    assert "model.missing" in {f.check for f in whole_look()}


def test_an_engine_that_was_asked_for_and_does_not_run(patient: Patient) -> None:
    patient.active(runtime__backend="tensorrt", engine__build="never")
    if patient.node._backend.kind == "tensorrt":
        pytest.skip("TensorRT runs here")
    patient.camera()
    fell_back = next(f for f in whole_look() if f.check == "engine.fell_back")
    assert "tensorrt was asked for" in fell_back.text


def test_what_questions_lack(domain: int, tmp_path: Path) -> None:
    models = tmp_path / "models"
    models.mkdir()
    shutil.copytree(SHIPPED.parent / "surgllm_small_phantom", models / "surgllm_small_phantom")
    with (models / "surgllm_small_phantom/adapters.safetensors").open("ab") as file:
        file.write(b"x")
    _, found = cli(SURG_PERCEPTION_MODELS=str(models))
    assert "sha256" in found["vqa.model"]["text"]


# The middleware -------------------------------------------------------------------------------------------------------


def test_a_camera_in_another_domain(patient: Patient, processes: Any, domain: int) -> None:
    other = domain + 100
    process = processes(sys.executable, "-c", CAMERA, "camera", "/image", "64", "48", ROS_DOMAIN_ID=str(other))
    wait_until(lambda: any(p.pid == process.pid for p in machine().processes), 60, "the camera's process")
    # Other ROS processes may run on this machine, so look at this one alone.
    here = machine()
    mine = tuple(p for p in here.processes if p.pid == process.pid)
    here = type(here)(environment=here.environment, processes=mine)
    before = dict(os.environ)
    found = examine(Snapshot(here, doctor.look("", "", SECONDS, mine)))
    assert os.environ == before
    finding = next(f for f in found if f.check == "dds.domain")
    assert finding.fix == f"export ROS_DOMAIN_ID={other}"
    assert f"process {process.pid}" in finding.text


def test_discovery_that_is_off(patient: Patient, processes: Any) -> None:
    process = processes(
        sys.executable, "-c", CAMERA, "camera", "/image", "64", "48", ROS_AUTOMATIC_DISCOVERY_RANGE="OFF"
    )
    wait_until(lambda: any(p.pid == process.pid for p in machine().processes), 60, "the camera's process")
    patient.found("dds.discovery_range", f"process {process.pid}")


def test_a_driver_without_profile_and_one_with_a_small_segment(
    patient: Patient, processes: Any, tmp_path: Path
) -> None:
    patient.active()
    small = tmp_path / "small.xml"
    text = Path(machine().shipped_profile).read_text()
    small.write_text(text.replace("134217728", "2097152"))
    large = "/surg_perception/image", "1280", "720"
    bare = {"FASTDDS_DEFAULT_PROFILES_FILE": "", "FASTRTPS_DEFAULT_PROFILES_FILE": ""}
    process = processes(sys.executable, "-c", CAMERA, "driver", *large, **bare)
    wait_until(lambda: patient.node.count_publishers("image"), 60, "the camera")
    if rclpy.get_rmw_implementation_identifier() != "rmw_fastrtps_cpp":
        pytest.skip("another middleware than Fast DDS")
    patient.found("dds.profile_unloaded", f"/driver (process {process.pid})")
    process.kill()
    process.wait()
    processes(sys.executable, "-c", CAMERA, "small", *large, **dict.fromkeys(bare, str(small)))
    there = patient.node.get_publishers_info_by_topic
    wait_until(lambda: "small" in {p.node_name for p in there("/surg_perception/image")}, 60, "the other camera")
    patient.found("dds.segment_small", "the publisher /small", "2.1 MB")


def test_a_profile_file_that_is_not_there(domain: int) -> None:
    status, found = cli(FASTDDS_DEFAULT_PROFILES_FILE="/no/such/profile.xml")
    assert status == 1
    assert "/no/such/profile.xml" in found["dds.profile_missing"]["text"]


def test_a_middleware_that_is_not_installed(domain: int) -> None:
    status, found = cli(RMW_IMPLEMENTATION="rmw_nonsense_cpp")
    assert status == 2
    assert "rmw_nonsense_cpp" in found["ros.environment"]["text"]
    assert "unset RMW_IMPLEMENTATION" in found["ros.environment"]["fix"]
    assert found["model"]["level"] == "ok"


def test_security_without_a_keystore(domain: int, tmp_path: Path) -> None:
    status, found = cli(
        ROS_SECURITY_ENABLE="true", ROS_SECURITY_STRATEGY="Enforce", ROS_SECURITY_KEYSTORE=str(tmp_path)
    )
    assert status == 2
    assert "no folder enclaves" in found["security.keystore"]["text"]
    assert found["ros.environment"]["level"] == "error"


def test_a_small_shared_memory(domain: int) -> None:
    mount = 'mount -t tmpfs -o size=2m tmpfs /dev/shm && exec "$@"'
    prefix = ("unshare", "-r", "-m", "sh", "-c", mount, "sh")
    if not shutil.which("unshare") or subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("this user may make no mount of its own")
    _, found = cli(prefix=prefix)
    assert "of 2 MiB free" in found["dds.shm_full"]["text"]
    assert "--shm-size=1g" in found["dds.shm_full"]["fix"]
