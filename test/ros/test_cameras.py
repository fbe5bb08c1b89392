# SPDX-License-Identifier: Apache-2.0
"""Several cameras in one launch: apart from each other, and one that fails leaves the others alone."""

from __future__ import annotations

import os
import runpy
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("rclpy", reason="ROS 2 is not in the environment: `source setup.bash` first")

from conftest import Graph, Launched, wait_until
from rcl_interfaces.srv import GetParameters
from surg_perception_msgs.msg import SurgicalPhase

LAUNCH_FILE = Path(__file__).parents[2] / "launch" / "pipeline.launch.py"
SMALL = ("source:=phantom", "source_width:=160", "source_height:=120", "source_rate_hz:=5", "source_duration_s:=3600")


def phases_of(graph: Graph, *names: str) -> dict[str, list[SurgicalPhase]]:
    return {name: graph.collect(SurgicalPhase, f"/surg_perception/{name}/phase/phase") for name in names}


def wait_for_phases(phases: dict[str, list[SurgicalPhase]]) -> None:
    counts = {name: len(messages) for name, messages in phases.items()}
    for name, messages in phases.items():
        wait_until(
            lambda name=name, messages=messages: any(p.phase_id >= 0 for p in messages[counts[name] :]),
            120,
            f"phases of {name}",
        )


def namespace_of(pid: int) -> str:
    command = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    return next(word for word in command if word.startswith("__ns:=")).removeprefix("__ns:=")


def ends(query: Any, topic: str) -> set[tuple[str, str]]:
    """Names and namespaces of the publishers or subscriptions of a topic, once they are known."""

    def known() -> set[tuple[str, str]]:
        found = {(end.node_name, end.node_namespace) for end in query(topic)}
        return set() if any("UNKNOWN" in name for name, _ in found) else found

    return wait_until(known, 120, f"who publishes or subscribes {topic}")


def test_each_of_three_cameras_has_nodes_and_topics_of_its_own(launched: Any, graph: Graph) -> None:
    phases = phases_of(graph, "left", "right", "psm1/wrist")
    launch: Launched = launched(
        "cameras:={left: {source_seed: 1, gate: true}, right: {source_seed: 2, threads: 3}, psm1/wrist: null}", *SMALL
    )
    wait_for_phases(phases)
    expected = {(node, f"/surg_perception/{camera}") for camera in phases for node in ("phase", "source")}
    expected.add(("gate", "/surg_perception/left"))

    def theirs() -> set[tuple[str, str]]:
        nodes = graph.client.get_node_names_and_namespaces()
        return {(name, space) for name, space in nodes if space.startswith("/surg_perception/")}

    wait_until(lambda: theirs() >= expected, 30, "all nodes")
    assert theirs() == expected, "and no vqa, which nobody asked for"
    for camera in phases:
        space, topic = f"/surg_perception/{camera}", f"/surg_perception/{camera}/image"
        assert ends(graph.client.get_publishers_info_by_topic, topic) == {("source", space)}
        assert ends(graph.client.get_subscriptions_info_by_topic, topic) == {("phase", space)}

    share = max(1, len(os.sched_getaffinity(0)) // 3)
    for camera, threads in (("left", share), ("right", 3), ("psm1/wrist", share)):
        client = graph.client.create_client(GetParameters, f"/surg_perception/{camera}/phase/get_parameters")
        assert client.wait_for_service(30)
        future = client.call_async(GetParameters.Request(names=["runtime.threads"]))
        wait_until(future.done, 30, f"the parameters of {camera}")
        assert future.result().values[0].integer_value == threads
    assert launch.stop() == 0
    assert "Traceback" not in launch.text()


def test_a_camera_that_fails_leaves_the_other_alone(launched: Any, graph: Graph) -> None:
    phases = phases_of(graph, "left", "right")
    launch: Launched = launched("cameras:={left: null, right: null, broken: {model: no_such_model}}", *SMALL)
    wait_for_phases(phases)
    wait_until(lambda: "/surg_perception/broken/phase could not be configured" in launch.text(), 60, "the failure")

    (left,) = [pid for pid in launch.pids("/surg_perception/phase_node") if namespace_of(pid).endswith("/left")]
    os.kill(left, signal.SIGKILL)
    wait_until(
        lambda: "/surg_perception/left/phase ended with exit status -9" in launch.text(), 30, "its end in the log"
    )
    wait_for_phases({"right": phases["right"]})
    assert launch.process.poll() is None


def test_on_failure_stop_ends_the_launch(launched: Any) -> None:
    launch: Launched = launched("cameras:={left: null, broken: {model: no_such_model}}", "on_failure:=stop", *SMALL)
    assert launch.process.wait(120) == 1
    assert "broken/phase could not be configured" in launch.text()


@pytest.mark.parametrize("how", ["configuring", "activating", "died"])
def test_where_it_is_to_go_on_a_node_that_fails_holds_up_none_behind_it(how: str) -> None:
    nodes = [SimpleNamespace(node_name=name) for name in ("phase", "overlay", "gate")]
    bring_up = runpy.run_path(str(LAUNCH_FILE))["BringUp"](nodes, respawn=False, go_on=True)
    asked: list[int] = []
    bring_up._change = lambda i, transition: asked.append(i)

    def moved(i: int, before: str, after: str) -> None:
        event = SimpleNamespace(start_state=before, goal_state=after)
        bring_up._moved(SimpleNamespace(locals=SimpleNamespace(event=event)), i)

    moved(2, "configuring", "inactive")
    moved(0, "configuring", "inactive")
    moved(0, "activating", "active")
    assert asked == [0], "the overlay's turn comes before the gate's"
    if how == "died":
        bring_up._exited(1)(SimpleNamespace(returncode=-9), SimpleNamespace(is_shutdown=False))
    else:
        if how == "activating":
            moved(1, "configuring", "inactive")
        moved(1, how, "unconfigured" if how == "configuring" else "inactive")
    assert asked[-1] == 2
    moved(2, "activating", "active")
    assert bring_up.state == ["active", "failed", "active"]


@pytest.mark.parametrize(
    ("cameras", "says"),
    [
        ("{left/: a}", "a name is letters"),
        ("{left: a, left: b}", "is there 2 times"),
        ("{left: {imgae: a}}", "did you mean image?"),
        ("{left: {namespace: a}}", "no argument of one camera"),
        ("{left: {vqa: maybe}}", "expected one of: auto, true, false"),
        ("{left: [1]}", "expected {name: topic"),
        ("{left", "expected {name: topic"),
        ("{}", "expected {name: topic"),
        ("/no/such/cameras.yaml", "No such file"),
    ],
)
def test_a_list_of_cameras_that_cannot_be_meant_is_refused(launched: Any, cameras: str, says: str) -> None:
    launch: Launched = launched(f"cameras:={cameras}")
    assert launch.process.wait(60) == 1
    assert says in launch.text()
    assert "process started" not in launch.text()


def test_the_cameras_can_stand_in_a_file(launched: Any, graph: Graph, tmp_path: Path) -> None:
    file = tmp_path / "cameras.yaml"
    file.write_text("left: /left/image_raw\nright:\n  image: /right/image_raw\n  threads: 1\n")
    launched(f"cameras:={file}", "namespace:=ECM")
    for camera in ("left", "right"):
        found = ends(graph.client.get_subscriptions_info_by_topic, f"/{camera}/image_raw")
        assert found == {("phase", f"/ECM/{camera}")}
