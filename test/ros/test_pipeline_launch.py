# SPDX-License-Identifier: Apache-2.0
"""The whole pipeline through its launch file: real processes, real DDS, the phantom and a real clip."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import cv2
import pytest

pytest.importorskip("rclpy", reason="ROS 2 is not in the environment: `source setup.bash` first")

from conftest import Graph, wait_until
from rcl_interfaces.srv import GetParameters
from rclpy.qos import DurabilityPolicy, QoSProfile
from sensor_msgs.msg import CompressedImage
from surg_perception_msgs.msg import LatentFeatures, PhaseLabels, QuestionError, SurgicalPhase
from surg_perception_msgs.srv import Ask

LATCHED = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)


def stamps(messages: list[Any]) -> list[int]:
    return [m.header.stamp.sec * 10**9 + m.header.stamp.nanosec for m in messages]


def images(phases: list[SurgicalPhase]) -> list[SurgicalPhase]:
    """The messages that belong to an image (silence repeats the last stamp)."""
    return [p for p in phases if p.state != SurgicalPhase.NO_SIGNAL]


def assert_every_frame_accounted_for(phases: list[SurgicalPhase], sent: int) -> None:
    last = phases[-1]
    assert last.frames_received + last.frames_lost == sent
    assert last.frames_processed + last.frames_replaced + last.frames_rejected == last.frames_received


def test_phantom_from_launch_to_phase(launched: Any, graph: Graph, tmp_path: Path) -> None:
    phases = graph.collect(SurgicalPhase, "phase/phase")
    latents = graph.collect(LatentFeatures, "phase/latent")
    truth = graph.collect(SurgicalPhase, "source/truth", 1000)
    overlays = graph.collect(CompressedImage, "overlay/image/compressed")
    picture = tmp_path / "overlay.png"
    launch = launched(
        "source:=phantom:duration_s=12", "source_width:=640", "source_height:=360", f"overlay_image:={picture}"
    )

    wait_until(lambda: "pipeline up" in launch.text(), 60, "the pipeline to come up")
    wait_until(lambda: "end of the source" in launch.text(), 40, "the source to end")
    wait_until(lambda: phases and phases[-1].state == SurgicalPhase.NO_SIGNAL, 5, "NO_SIGNAL after the last image")

    assert len(truth) == 300
    seen = images(phases)
    sent = stamps(truth)
    assert stamps(seen) == sorted(set(stamps(seen)))
    assert set(stamps(seen)) <= set(sent)
    assert set(stamps(latents)) <= set(sent)
    assert_every_frame_accounted_for(phases, len(sent))
    assert seen[-1].frames_processed == len(seen)
    assert len(seen) >= 0.9 * len(sent), "frames were replaced though the model is faster than the source"
    assert list(latents[0].shape) == [192, 4, 4]
    assert len(latents[0].data) == 192 * 4 * 4

    true_phase = dict(zip(sent, truth, strict=True))
    right = sum(p.raw_phase_id == true_phase[s].phase_id for p, s in zip(seen, stamps(seen), strict=True))
    assert right / len(seen) > 0.6, "the model shipped for the phantom does not know the phantom"

    labels = graph.collect(PhaseLabels, "phase/labels", LATCHED)
    wait_until(lambda: labels, 5, "labels for a late subscriber")
    assert len(labels[0].labels) == 7
    assert labels[0].model_id == seen[0].model_id
    assert seen[0].backend.split(":")[0] in ("openvino", "onnxruntime", "torch", "tensorrt")

    assert overlays
    assert launch.stop() == 0
    assert cv2.imread(str(picture)).shape == (360, 640, 3)
    assert "Traceback" not in launch.text()


def test_real_clip_no_signal_when_the_source_dies_and_ok_when_it_returns(
    launched: Any, graph: Graph, shared_data: Path
) -> None:
    clip = sorted((shared_data / "cholec-clips").glob("*.mp4"))[0]
    print(f"on real video: {clip.name}")
    phases = graph.collect(SurgicalPhase, "phase/phase")
    launch = launched(f"source:={clip}", "respawn:=true", "transport:=compressed")
    wait_until(lambda: "pipeline up" in launch.text(), 60, "the pipeline to come up")
    wait_until(lambda: len(images(phases)) > 50, 20, "phases of the clip")
    assert {p.state for p in phases} <= {SurgicalPhase.OK, SurgicalPhase.UNCERTAIN, SurgicalPhase.NO_SIGNAL}
    assert stamps(images(phases)) == sorted(set(stamps(images(phases))))

    (source,) = launch.pids("source_node")
    os.kill(source, signal.SIGKILL)
    before = len(phases)
    wait_until(
        lambda: any(p.state == SurgicalPhase.NO_SIGNAL for p in phases[before:]), 2, "NO_SIGNAL after the source died"
    )
    silent = next(p for p in phases[before:] if p.state == SurgicalPhase.NO_SIGNAL)
    assert silent.phase_id == -1
    assert stamps([silent])[0] == stamps(images(phases))[-1], "silence carries the stamp of the last image"

    count = len(images(phases))
    wait_until(lambda: len(images(phases)) > count + 20, 20, "phases again after the source was respawned")
    assert images(phases)[-1].state in (SurgicalPhase.OK, SurgicalPhase.UNCERTAIN)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["model:=no_such_model"], "no_such_model"),
        (["backend:=tensorrt", "allow_fallback:=false"], "tensorrt"),
        (["source:=/no/such/video.mp4"], "/no/such/video.mp4"),
        (["overlay_image:=/no/such/folder/x.png"], "/no/such/folder"),
    ],
    ids=["model", "backend", "source", "overlay"],
)
def test_a_node_that_cannot_be_configured_ends_the_launch_with_its_reason(
    launched: Any, arguments: list[str], says: str
) -> None:
    launch = launched(*arguments)
    assert launch.process.wait(60) == 1
    assert says in launch.text()
    assert "could not be configured" in launch.text()


def test_launch_arguments_are_all_explained() -> None:
    shown = subprocess.run(
        ["ros2", "launch", "surg_perception", "pipeline.launch.py", "--show-args"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    for name in (
        "image",
        "cameras",
        "on_failure",
        "threads",
        "gate",
        "transport",
        "model",
        "backend",
        "precision",
        "server_url",
        "source",
        "overlay",
        "vqa",
        "vqa_model",
        "vqa_threads",
        "vqa_niceness",
        "vqa_cpus",
        "namespace",
        "use_sim_time",
    ):
        assert f"'{name}':" in shown
    assert "no description given" not in shown
    assert all(f"'{value}'" in shown for value in ("fp16-mixed", "triton"))


def test_a_users_own_dds_profile_is_respected(launched: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    profile = tmp_path / "mine.xml"
    profile.write_text('<dds xmlns="http://www.eprosima.com"><profiles/></dds>')
    monkeypatch.setenv("FASTRTPS_DEFAULT_PROFILES_FILE", str(profile))
    launch = launched()
    wait_until(lambda: "pipeline up" in launch.text(), 60, "the pipeline to come up")
    (pid,) = launch.pids("phase_node")
    environment = Path(f"/proc/{pid}/environ").read_bytes().decode()
    assert f"FASTRTPS_DEFAULT_PROFILES_FILE={profile}" in environment
    assert "fastdds_large_images.xml" not in environment
    assert str(profile) in launch.text()


def test_nodes_get_the_large_image_profile_and_namespace(launched: Any, graph: Graph) -> None:
    launch = launched("namespace:=or1/ecm")
    wait_until(lambda: "pipeline up" in launch.text(), 60, "the pipeline to come up")
    (pid,) = launch.pids("phase_node")
    environment = Path(f"/proc/{pid}/environ").read_bytes().decode()
    assert "fastdds_large_images.xml" in environment
    assert "MALLOC_MMAP_THRESHOLD_=" in environment
    deadline = time.monotonic() + 10
    while ("phase", "/or1/ecm") not in graph.client.get_node_names_and_namespaces():
        assert time.monotonic() < deadline, graph.client.get_node_names_and_namespaces()
        time.sleep(0.1)


def test_without_its_model_vqa_says_so_and_the_pipeline_runs(launched: Any, graph: Graph) -> None:
    phases = graph.collect(SurgicalPhase, "phase/phase")
    launch = launched(
        "source:=phantom",
        "source_width:=160",
        "source_height:=120",
        "vqa_model:=no_such_model",
        "vqa_threads:=1",
        "vqa_niceness:=15",
        "vqa_cpus:=0",
    )
    wait_until(lambda: "pipeline up" in launch.text(), 60, "the pipeline to come up")
    wait_until(lambda: any(p.phase_id >= 0 for p in phases), 20, "a phase")
    wait_until(lambda: "no model, so no answers" in launch.text(), 60, "the reason in the log")

    def answer(service: type, name: str, request: Any) -> Any:
        client = graph.client.create_client(service, name)
        assert client.wait_for_service(30)
        future = client.call_async(request)
        wait_until(future.done, 30, f"an answer of {name}")
        return future.result()

    refused = answer(Ask, "ask", Ask.Request(question="What is the hook doing?"))
    assert refused.error_code == QuestionError.NOT_AVAILABLE
    assert "no_such_model" in refused.error_message
    names = ["runtime.threads", "runtime.niceness", "runtime.cpus", "model.path"]
    threads, niceness, cpus, model = answer(
        GetParameters, "vqa/get_parameters", GetParameters.Request(names=names)
    ).values
    assert (threads.integer_value, niceness.integer_value, cpus.string_value) == (1, 15, "0")
    assert model.string_value == "no_such_model"
    count = len(phases)
    wait_until(lambda: len(phases) > count + 10, 20, "more phases")
    (pid,) = launch.pids("vqa_node")
    assert "libtorch" not in Path(f"/proc/{pid}/maps").read_text(), "a node without a model costs no PyTorch"
    assert launch.stop() == 0
    assert not [line for line in launch.text().splitlines() if "[vqa_node" in line and "Traceback" in line]
