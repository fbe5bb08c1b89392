# SPDX-License-Identifier: Apache-2.0
"""Findings of `surg-perception doctor`: for each, a snapshot that has the fault, and a whole one that has none."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from surg_perception.cli import doctor
from surg_perception.diagnosis import findings, machine
from surg_perception.diagnosis.findings import ERROR, OK, WARNING, Finding, examine
from surg_perception.diagnosis.snapshot import (
    COMPRESSED,
    RAW,
    Answers,
    Endpoint,
    Engines,
    Graph,
    Images,
    Machine,
    Mismatch,
    OurNode,
    PhaseModel,
    Phases,
    Process,
    Profile,
    SharedMemory,
    Snapshot,
    Status,
    Topic,
)
from surg_perception.nodes.parameter_table import PHASE

ROOT = Path(__file__).resolve().parents[2]
IMAGE, PHASE_NAME = "/surg_perception/image", "/surg_perception/phase"
BIG = {"FASTDDS_DEFAULT_PROFILES_FILE": "/big.xml"}
CAMERA = Process(70_001, "camera", BIG, "rmw_fastrtps_cpp", "/camera")
NODE = Process(70_002, "phase_node", BIG, "rmw_fastrtps_cpp", PHASE_NAME, True)
PUBLISHER = Endpoint("/camera", RAW, "RIHS01_1", "reliable, volatile", pid=70_001 & 0xFFFF, here=True)
READER = Endpoint(PHASE_NAME, RAW, "RIHS01_1", "best_effort, volatile", pid=70_002 & 0xFFFF, here=True)


def whole() -> Snapshot:
    """A pipeline that works."""
    times = tuple(i / 30 for i in range(10))
    stamps = tuple(10**18 + int(t * 1e9) for t in times)
    return Snapshot(
        Machine(
            processes=(CAMERA, NODE),
            shm=SharedMemory(8 << 30, 7 << 30),
            profiles={"/big.xml": Profile("/big.xml", 128 << 20)},
            shipped_profile="/share/config/fastdds_large_images.xml",
            memory_free=16 << 30,
            rmem_max=1 << 18,
            models=(PhaseModel("gsvit_m0_phantom", "gsvit_m0_phantom@123456789abc", 7),),
            engines=Engines({"openvino": None, "tensorrt": "not installed"}),
            answers=(Answers("surgllm_small_phantom"),),
        ),
        Graph(
            domain=0,
            rmw="rmw_fastrtps_cpp",
            names=("/camera", PHASE_NAME),
            nodes=(OurNode(PHASE_NAME, "phase", "active", dict(PHASE.defaults), ((IMAGE, RAW),), NODE),),
            topics={IMAGE: Topic(IMAGE, (PUBLISHER,), (READER,))},
            images=(Images(IMAGE, RAW, times, stamps, (0.01,) * 10, (), 1920, 1080, 6_220_800),),
            phases=(Phases(PHASE_NAME, ("OK",) * 30, "m", "openvino:CPU:fp32", 30, 30),),
        ),
    )


Change = Callable[[Snapshot], Snapshot]


def on_graph(**changes: Any) -> Change:
    return lambda s: replace(s, graph=replace(s.graph, **changes))  # type: ignore[type-var]


def on_machine(**changes: Any) -> Change:
    return lambda s: replace(s, machine=replace(s.machine, **changes))


def on_node(**changes: Any) -> Change:
    return lambda s: on_graph(nodes=(replace(s.graph.nodes[0], **changes),))(s)  # type: ignore[union-attr]


def on_parameters(**values: Any) -> Change:
    given = {name.replace("__", "."): value for name, value in values.items()}
    return lambda s: on_node(parameters={**s.graph.nodes[0].parameters, **given})(s)  # type: ignore[union-attr]


def on_images(**changes: Any) -> Change:
    return lambda s: on_graph(images=(replace(s.graph.images[0], **changes),))(s)  # type: ignore[union-attr]


def on_phases(**changes: Any) -> Change:
    return lambda s: on_graph(phases=(replace(s.graph.phases[0], **changes),))(s)  # type: ignore[union-attr]


def topics(*all_of_them: Topic) -> Change:
    return on_graph(topics={topic.name: topic for topic in all_of_them}, images=())


def both(*changes: Change) -> Change:
    def change(s: Snapshot) -> Snapshot:
        for one in changes:
            s = one(s)
        return s

    return change


def camera(name: str, type_: str = RAW) -> Topic:
    return Topic(name, (replace(PUBLISHER, type=type_),))


def read(name: str, type_: str = RAW, *publishers: Endpoint) -> Topic:
    return Topic(name, publishers, (replace(READER, type=type_),))


ELSEWHERE = Process(8, "phase_node", {"ROS_DOMAIN_ID": "7"}, "rmw_fastrtps_cpp", PHASE_NAME, True)
NOBODY = both(on_graph(nodes=(), names=(), topics={}, images=(), phases=()), on_machine(processes=()))
BAD_QOS = Mismatch(PUBLISHER, READER, "ERROR: Best effort publisher and reliable subscription;")
SHORT_DEADLINE = Mismatch(
    Endpoint(PHASE_NAME, "x"),
    Endpoint("/gate", "x"),
    "ERROR: Subscription has a deadline smaller than the publisher's;",
)
NOISY = Status(PHASE_NAME, "images", "ERROR", "6 frames in a row took over 100 ms")

# check, level, what makes it, and words that text and fix must hold
FAULTS: list[tuple[str, str, Change, str, str]] = [
    (
        "ros.environment",
        ERROR,
        lambda s: replace(s, graph=None, graph_fault="No module named 'rclpy'"),
        "rclpy",
        "source setup.bash",
    ),
    ("ros.domain_id", ERROR, on_machine(environment={"ROS_DOMAIN_ID": "lab"}), "'lab'", "export ROS_DOMAIN_ID=0"),
    ("ros.domain_id", ERROR, on_machine(environment={"ROS_DOMAIN_ID": "500"}), "'500'", "export ROS_DOMAIN_ID=0"),
    (
        "ros.environment",
        ERROR,
        lambda s: replace(
            on_machine(environment={"RMW_IMPLEMENTATION": "rmw_x_cpp"})(s), graph=None, graph_fault="102"
        ),
        "102",
        "unset RMW_IMPLEMENTATION",
    ),
    ("security.keystore", ERROR, on_machine(security_fault="no keystore"), "keystore", "unset ROS_SECURITY_ENABLE"),
    ("node.missing", ERROR, NOBODY, "domain 0", "ros2 launch surg_perception pipeline.launch.py"),
    (
        "node.other_namespace",
        ERROR,
        both(
            NOBODY,
            topics(
                Topic("/ECM/left/phase/phase", (Endpoint("/ECM/left/phase", "surg_perception_msgs/msg/SurgicalPhase"),))
            ),
        ),
        "/ECM/left",
        "--namespace /ECM/left",
    ),
    (
        "node.no_phase",
        WARNING,
        lambda s: replace(on_node(kind="overlay")(s), namespace="/surg_perception"),
        "no node phase",
        "launch",
    ),
    (
        "node.duplicate",
        ERROR,
        on_graph(names=(PHASE_NAME, PHASE_NAME)),
        f"2 nodes are called {PHASE_NAME}",
        "namespace",
    ),
    ("node.silent", ERROR, on_node(state=""), "does not answer", "kill -CONT 70002"),
    (
        "dds.unnamed",
        WARNING,
        topics(read(IMAGE, RAW, replace(PUBLISHER, node="/_NODE_NAME_UNKNOWN_"))),
        IMAGE,
        "another ROS_DOMAIN_ID",
    ),
    (
        "node.unseen",
        ERROR,
        on_machine(processes=(CAMERA, replace(NODE, node="/a/phase"))),
        "/a/phase",
        "kill -INT 70002",
    ),
    (
        "node.unseen",
        ERROR,
        on_machine(processes=(CAMERA, replace(NODE, node="/a/phase", stopped=True))),
        "not seen",
        "kill -CONT 70002",
    ),
    ("node.inactive", ERROR, on_node(state="unconfigured"), "unconfigured", f"set {PHASE_NAME} configure && "),
    ("node.inactive", ERROR, on_node(state="inactive"), "inactive", f"ros2 lifecycle set {PHASE_NAME} activate"),
    ("node.inactive", WARNING, on_node(state="configuring"), "configuring", "ros2 lifecycle get"),
    ("dds.domain", ERROR, both(NOBODY, on_machine(processes=(ELSEWHERE,))), "domain 7", "export ROS_DOMAIN_ID=7"),
    ("dds.domain", WARNING, both(NOBODY, on_graph(other_domains={5: ("/camera",)})), "/camera", "ROS_DOMAIN_ID=5"),
    (
        "dds.rmw",
        ERROR,
        on_machine(processes=(replace(NODE, rmw="rmw_zenoh_cpp"),)),
        "rmw_zenoh_cpp",
        "export RMW_IMPLEMENTATION=rmw_zenoh_cpp",
    ),
    (
        "dds.discovery_range",
        ERROR,
        on_machine(processes=(replace(NODE, environment={**BIG, "ROS_AUTOMATIC_DISCOVERY_RANGE": "OFF"}),)),
        "OFF",
        "RANGE=SUBNET",
    ),
    ("dds.localhost", WARNING, both(NOBODY, on_machine(environment={"ROS_LOCALHOST_ONLY": "1"})), "LOCALHOST", "unset"),
    (
        "image.other_topic",
        ERROR,
        lambda s: replace(s, image="/left/image_raw"),
        "not /left/image_raw",
        "image:=/left/image_raw",
    ),
    (
        "image.no_publisher",
        ERROR,
        topics(read(IMAGE), camera("/depth"), camera("/endoscope/image")),
        "/endoscope/image (Image), /depth",
        "image:=/endoscope/image",
    ),
    (
        "image.no_publisher",
        ERROR,
        topics(read(IMAGE), camera("/cam/image_raw/compressed", COMPRESSED)),
        "/cam/image_raw/compressed",
        "image:=/cam/image_raw transport:=compressed",
    ),
    ("image.no_publisher", ERROR, topics(read(IMAGE)), "any other topic", "source:=phantom"),
    (
        "image.transport",
        ERROR,
        topics(read(IMAGE), camera(f"{IMAGE}/compressed", COMPRESSED)),
        "CompressedImage",
        "transport:=compressed",
    ),
    (
        "image.type",
        ERROR,
        topics(read(IMAGE, RAW, replace(PUBLISHER, type="std_msgs/msg/String"))),
        "std_msgs/msg/String",
        "image:=",
    ),
    (
        "image.two_publishers",
        WARNING,
        topics(read(IMAGE, RAW, PUBLISHER, replace(PUBLISHER, node="/other"))),
        "/camera, /other",
        "image:=",
    ),
    (
        "qos.incompatible",
        ERROR,
        topics(Topic(IMAGE, (PUBLISHER,), (READER,), (BAD_QOS,))),
        "gets nothing from /camera",
        "input.reliability: match",
    ),
    (
        "qos.incompatible",
        ERROR,
        topics(read(IMAGE, RAW, PUBLISHER), Topic("/p", (), (), (SHORT_DEADLINE,))),
        "/gate",
        "output.deadline_s",
    ),
    (
        "qos.labels_volatile",
        WARNING,
        topics(
            read(IMAGE, RAW, PUBLISHER),
            Topic(f"{PHASE_NAME}/labels", (Endpoint(PHASE_NAME, "x"),), (Endpoint("/viewer", "x"),)),
        ),
        "/viewer",
        "TRANSIENT_LOCAL",
    ),
    (
        "type.hash",
        ERROR,
        topics(read(IMAGE, RAW, replace(PUBLISHER, type_hash="RIHS01_2"))),
        "different versions",
        "colcon build",
    ),
    (
        "dds.profile_unloaded",
        ERROR,
        on_machine(processes=(replace(CAMERA, environment={}), NODE)),
        "the publisher /camera (process 70001)",
        "export FASTDDS_DEFAULT_PROFILES_FILE=/share/config/fastdds_large_images.xml",
    ),
    (
        "dds.profile_unloaded",
        WARNING,
        both(
            on_machine(processes=(replace(CAMERA, environment={}), NODE)),
            on_images(arrivals_s=(), stamps_ns=(), ages_s=(), bytes=0),
        ),
        "no image came",
        "export FASTDDS_DEFAULT_PROFILES_FILE=",
    ),
    (
        "dds.profile_missing",
        ERROR,
        on_machine(profiles={"/big.xml": Profile("/big.xml", fault="no such file")}),
        "no such file",
        "export FASTDDS_DEFAULT_PROFILES_FILE=/share",
    ),
    (
        "dds.segment_small",
        ERROR,
        on_machine(profiles={"/big.xml": Profile("/big.xml", 1 << 20)}),
        "1.0 MB",
        "segment_size",
    ),
    (
        "dds.segment_small",
        WARNING,
        both(
            on_machine(profiles={"/big.xml": Profile("/big.xml", 1 << 20)}),
            on_images(arrivals_s=(), stamps_ns=(), ages_s=(), bytes=0),
        ),
        "no image came",
        "segment_size",
    ),
    (
        "dds.receive_buffer",
        WARNING,
        lambda s: on_graph(topics={IMAGE: read(IMAGE, RAW, replace(PUBLISHER, here=False))})(s),
        "another machine",
        "sysctl -w net.core.rmem_max",
    ),
    ("dds.shm_full", ERROR, on_machine(shm=SharedMemory(1 << 30, 1 << 20)), "1 of 1024 MiB", "fastdds shm clean"),
    ("dds.shm_full", ERROR, on_machine(shm=SharedMemory(8 << 20, 8 << 20)), "8 of 8 MiB", "--shm-size"),
    ("dds.shm_small", WARNING, on_machine(shm=SharedMemory(64 << 20, 60 << 20)), "60 of 64", "--shm-size"),
    ("dds.shm_owner", WARNING, on_machine(shm=SharedMemory(8 << 30, 7 << 30, 3)), "3 Fast DDS files", "one user"),
    ("image.silent", ERROR, on_images(arrivals_s=(), stamps_ns=(), ages_s=()), "no image came", "topic info"),
    ("image.malformed", ERROR, on_images(faults=(("step", "step is 3"),)), "step is 3", "ros2 topic echo"),
    (
        "image.too_large",
        ERROR,
        on_parameters(input__max_pixels=1000),
        "takes 1000",
        f"ros2 param set {PHASE_NAME} input.max_pixels 2073600",
    ),
    ("image.rate", WARNING, on_images(arrivals_s=(0.0, 1.0, 2.0)), "1.0 Hz", "state.no_signal_after_s 2.0"),
    ("stamp.zero", ERROR, on_images(stamps_ns=(0,) * 10, ages_s=(1.7e9,) * 10), "zero", "header.stamp"),
    ("stamp.frozen", ERROR, on_images(stamps_ns=(10**18,) * 10), "same stamp", "stamp each image"),
    ("stamp.backwards", WARNING, on_images(stamps_ns=(3, 4, 1, 2)), "go back", "topic info"),
    ("stamp.future", ERROR, on_images(ages_s=(-3600.0,) * 10), "in the future", "NTP"),
    ("stamp.future", WARNING, on_images(ages_s=(-0.2,) * 10), "0.20 s in the future", "chronyc"),
    ("stamp.old", ERROR, on_images(ages_s=(3e8,) * 10), "9.5 years", "use_sim_time:=true"),
    ("stamp.old", ERROR, on_images(ages_s=(2.0,) * 10), "2.00 s old", "depth 1"),
    ("clock.missing", ERROR, on_parameters(use_sim_time=True), "nobody publishes /clock", "ros2 bag play BAG --clock"),
    ("clock.paused", WARNING, both(on_parameters(use_sim_time=True), on_graph(clock_publishers=1)), "still", "resume"),
    (
        "clock.ignored",
        WARNING,
        on_graph(clock_publishers=1, clock_messages=9),
        "does not use it",
        "use_sim_time:=true",
    ),
    ("phase.silent", ERROR, on_phases(states=()), "nothing comes", "deactivate"),
    ("phase.no_signal", ERROR, on_phases(states=("NO_SIGNAL",)), "though images come", "rqt_image_view"),
    ("phase.stale", WARNING, on_phases(states=("STALE",)), "STALE in 1 of 1", "latency_ms"),
    ("phase.fault", ERROR, on_phases(states=("FAULT", "FAULT", "OK")), "FAULT in 2 of 3", "/diagnostics"),
    ("phase.no_model", WARNING, on_phases(states=("NO_MODEL",)), "NO_MODEL", "train phase"),
    ("phase.uncertain", WARNING, on_phases(states=("UNCERTAIN",)), "UNCERTAIN", "models list"),
    ("phase.replaced", WARNING, on_phases(replaced=10), "10 of 30", "precision:=bf16"),
    ("phase.lost", WARNING, on_phases(lost=3), "3 images were lost", "FASTDDS_DEFAULT_PROFILES_FILE"),
    ("diagnostics", ERROR, on_graph(statuses=(NOISY,)), "took over 100 ms", "top -H"),
    (
        "model.missing",
        ERROR,
        on_machine(models=(PhaseModel("x", fault="missing", text="no model 'x'"),)),
        "no model 'x'",
        "models list",
    ),
    ("model.hash", ERROR, on_machine(models=(PhaseModel("x", "x@1", 7, "hash", "sha256 is 1"),)), "sha256", "verify x"),
    ("model.no_labels", WARNING, on_machine(models=(PhaseModel("x", "x@1"),)), "no phases", "train phase"),
    ("engine.none", ERROR, on_machine(engines=Engines(fault="a driver may hang")), "hang", "pip install"),
    ("engine.none", ERROR, on_machine(engines=Engines({"torch": "not installed"})), "torch", "pip install"),
    ("engine.fell_back", ERROR, on_parameters(runtime__backend="tensorrt"), "not installed", "cuda-python"),
    ("engine.precision", WARNING, on_parameters(runtime__precision="fp16"), "fp16 was asked", "precision:=fp32"),
    (
        "engine.gpu_unused",
        WARNING,
        on_machine(engines=Engines({"openvino": None}, gpu=True)),
        "though there is an NVIDIA GPU",
        "build-engine gsvit_m0_phantom",
    ),
    ("engine.cache", WARNING, on_machine(cache_fault="/home is not writable"), "not writable", "XDG_CACHE_HOME"),
    (
        "vqa.model",
        WARNING,
        on_machine(answers=(Answers("x", model_fault="no SurgLLM 'x'"),)),
        "no SurgLLM",
        "vqa_model",
    ),
    (
        "vqa.base_model",
        WARNING,
        on_machine(answers=(Answers("x", missing_base=("surg-perception models fetch b",)),)),
        "base model b",
        "surg-perception models fetch b",
    ),
    ("vqa.packages", WARNING, on_machine(answers=(Answers("x", missing_packages=("torch",)),)), "torch", "pip install"),
    ("memory.low", WARNING, on_machine(memory_free=900 << 20), "0.9 GiB", "vqa:=false"),
    ("memory.low", ERROR, on_machine(memory_free=100 << 20), "0.1 GiB", "vqa:=false"),
]


def test_a_pipeline_that_works_has_no_findings_but_good_ones() -> None:
    assert [f for f in examine(whole()) if f.level != OK] == []
    assert {f.check for f in examine(whole())} >= {
        "node.found",
        "image.stream",
        "stamp.age",
        "dds.profile",
        "phase.state",
    }


@pytest.mark.parametrize(
    ("check", "level", "fault", "text", "fix"), FAULTS, ids=[f"{f[0]}_{i}" for i, f in enumerate(FAULTS)]
)
def test_a_fault_is_found_and_its_fix_named(check: str, level: str, fault: Change, text: str, fix: str) -> None:
    found = [f for f in examine(fault(whole())) if f.check == check and f.level == level]
    assert found, [f for f in examine(fault(whole())) if f.level != OK]
    assert any(text in f.text and fix in f.fix for f in found), found
    assert all(f.why for f in found)


def test_every_finding_is_tested_and_documented() -> None:
    source = (ROOT / "surg_perception/diagnosis/findings.py").read_text()
    named = set(re.findall(r'Finding\(\s*"([a-z_.]+)"', source)) | {f"phase.{s.lower()}" for s in findings._STATES}
    assert named == {fault[0] for fault in FAULTS}
    rows = re.findall(r"^\| (`[^|]+) \|", (ROOT / "docs/doctor.md").read_text(), re.MULTILINE)
    documented = {name for row in rows for name in re.findall(r"`([a-z_.]+)`", row)}
    assert documented == named


@pytest.mark.parametrize(("check", "level", "fault", "text", "fix"), FAULTS, ids=lambda value: "")
def test_one_fault_raises_no_alarm_that_is_not_its_consequence(
    check: str, level: str, fault: Change, text: str, fix: str
) -> None:
    """At most two further errors: a cause and what follows from it, never a flood."""
    errors = {f.check for f in examine(fault(whole())) if f.level == ERROR} - {check}
    assert len(errors) <= 2, errors


def test_fixes_are_single_lines_that_a_shell_can_read() -> None:
    for _, _, fault, _, _ in FAULTS:
        for finding in examine(fault(whole())):
            assert "\n" not in finding.fix + finding.text
            if finding.fix.startswith(("ros2 ", "export ", "surg-perception ", "unset ", "pip ", "sudo ")):
                shlex.split(finding.fix, comments=True)


def test_namespace_and_other_values_are_in_the_launch_command() -> None:
    s = replace(NOBODY(whole()), namespace="/ECM/left", image="/left/image_raw")
    fix = next(f.fix for f in examine(s) if f.check == "node.missing")
    assert fix.endswith("namespace:=ECM/left image:=/left/image_raw")


# The machine --------------------------------------------------------------------------------------------------------


def test_profiles_are_read_and_bad_ones_have_a_reason(tmp_path: Path) -> None:
    assert machine.read_profile(str(ROOT / "config/fastdds_large_images.xml")).segment_bytes == 128 << 20
    assert "No such file" in machine.read_profile(str(tmp_path / "none.xml")).fault
    (tmp_path / "bad.xml").write_text("<dds>")
    assert machine.read_profile(str(tmp_path / "bad.xml")).fault


def test_security_is_checked_where_it_is_asked_for(tmp_path: Path) -> None:
    enabled = {"ROS_SECURITY_ENABLE": "true"}
    assert machine.security_fault({}) == ""
    assert "KEYSTORE is not set" in machine.security_fault(enabled)
    assert "no folder enclaves" in machine.security_fault({**enabled, "ROS_SECURITY_KEYSTORE": str(tmp_path)})
    (tmp_path / "enclaves" / "surg_perception").mkdir(parents=True)
    there = {**enabled, "ROS_SECURITY_KEYSTORE": str(tmp_path)}
    assert machine.security_fault(there) == ""
    assert "no enclave /gone" in machine.security_fault({**there, "ROS_SECURITY_ENCLAVE_OVERRIDE": "/gone"})


def test_no_variable_but_those_of_ros_is_kept() -> None:
    kept = machine.ros_environment({"ROS_DOMAIN_ID": "3", "FASTDDS_X": "1", "API_TOKEN": "secret", "HOME": "/root"})
    assert kept == {"ROS_DOMAIN_ID": "3", "FASTDDS_X": "1"}


@pytest.mark.parametrize(
    ("words", "command", "node"),
    [
        (["python3", "/ws/lib/surg_perception/phase_node", "--ros-args", "-r", "__node:=phase", "-r", "__ns:=/a/b"],
         "phase_node", "/a/b/phase"),
        (["/opt/ros/camera", "-r", "__node:=cam"], "camera", "/cam"),
        (["python3", "-c", "import rclpy"], "python3 -c import rclpy", ""),
    ],
)  # fmt: skip
def test_processes_are_named(words: list[str], command: str, node: str) -> None:
    assert (machine._command(words), machine._node_name(words)) == (command, node)


def test_a_model_that_was_changed_and_one_that_is_not_there(tmp_path: Path) -> None:
    import shutil

    shutil.copytree(ROOT / "models/gsvit_m0_phantom", tmp_path / "mine")
    assert machine.phase_model(str(tmp_path / "mine")).fault == ""
    with (tmp_path / "mine/model.onnx").open("ab") as file:
        file.write(b"x")
    damaged = machine.phase_model(str(tmp_path / "mine"))
    assert (damaged.fault, damaged.phases) == ("hash", 7)
    assert "sha256" in damaged.text
    assert machine.phase_model("no_such_model").fault == "missing"


def test_what_questions_lack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from surg_perception.surgllm import base_models

    monkeypatch.setattr(base_models, "search_folders", lambda: [tmp_path])
    lacking = machine.answers("surgllm_small_phantom")
    assert "surg-perception models fetch all-minilm-l6-v2" in lacking.missing_base
    assert "no SurgLLM" in machine.answers("no_such_model").model_fault
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: None)
    assert machine.answers("no_such_model").missing_packages == machine.PACKAGES_OF_VQA


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from surg_perception.runtime.user_cache import cache_fault, cache_folder

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "new"))
    assert cache_fault("engines") == ""
    assert not (tmp_path / "new").exists()
    folder = cache_folder("engines", "tests")
    assert folder is not None
    assert cache_fault("engines") == ""
    folder.chmod(0o777)
    assert "this user alone" in cache_fault("engines")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert "is not a folder" in cache_fault("engines")


def test_engines_are_tried_in_a_process_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    found = machine.engines("gsvit_m0_phantom", "onnxruntime", "fp32", True)
    assert found.refusals["onnxruntime"] is None
    assert found.name == "onnxruntime:CPU:fp32"
    assert found.fault == ""
    monkeypatch.setattr(machine, "ENGINE_LIMIT_S", 0.01)
    assert "a driver may hang" in machine.engines("gsvit_m0_phantom", "auto", "fp32", True).fault


def test_an_engine_that_is_not_there_falls_back_and_says_so() -> None:
    found = machine.engines("gsvit_m0_phantom", "tensorrt", "fp16", True)
    if found.refusals["tensorrt"] is None:
        pytest.skip("TensorRT runs here")
    assert found.name
    s = both(on_machine(engines=found), on_graph(phases=()), on_parameters(runtime__backend="tensorrt"))(whole())
    assert "engine.fell_back" in {f.check for f in examine(s)}


# The command --------------------------------------------------------------------------------------------------------


def test_without_ros_it_says_how_to_source_and_looks_at_models(tmp_path: Path) -> None:
    (tmp_path / "rclpy").mkdir()
    (tmp_path / "rclpy/__init__.py").write_text("raise ModuleNotFoundError(\"No module named 'rclpy'\", name='rclpy')")
    done = subprocess.run(
        [sys.executable, "-m", "surg_perception.cli.main", "doctor", "--json"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"},
    )
    assert done.returncode == 2, done.stderr
    said = {f["check"]: Finding(**f) for f in json.loads(done.stdout)["findings"]}
    assert said["ros.environment"].level == ERROR
    assert "source setup.bash" in said["ros.environment"].fix
    assert said["model"].level == OK
    assert said["engine.trial"].level == OK


def test_time_to_listen_twice_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = []

    def run(command: list[str], **options: Any) -> Any:
        limits.append(options["timeout"])
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(doctor.subprocess, "run", run)
    with pytest.raises(doctor.GraphUnseen, match="did not let go within"):
        doctor.look_at_graph("", "", 60.0, ())
    assert limits[0] > 2 * 60.0 + 2 * 13.0, "discovery and questions come twice as well"
