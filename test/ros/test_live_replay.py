# SPDX-License-Identifier: Apache-2.0
"""`surg-perception replay --live`: a bag through running nodes with /clock, in lockstep and by time, and what fails."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from itertools import islice, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("rclpy", reason="ROS 2 is not in the environment: `source setup.bash` first")

from conftest import Graph, wait_until
from images import jpeg_image, raw_image, stamped
from rclpy.serialization import serialize_message
from rosbags.highlevel import AnyReader
from sensor_msgs.msg import CompressedImage, Image
from surg_perception_msgs.msg import SurgicalPhase

from surg_perception.data.bag_writer import BagWriter
from surg_perception.data.bags import BagError, BagReader
from surg_perception.data.phantom import Phantom
from surg_perception.data.ros_types import typestore
from surg_perception.nodes import live_replay
from surg_perception.nodes.lifecycle import stamp_ns
from surg_perception.nodes.live_replay import LiveReplayError, LiveResult, LiveSettings, replay_live
from surg_perception.nodes.phase_node import PhaseNode

RECORDED_NS = 1_600_000_000 * 10**9
"""A bag of some years ago."""
STEP_S = 0.1
COMMAND = (sys.executable, "-m", "surg_perception.cli.main", "replay")
PATIENT = LiveSettings(timeout_s=60.0, start_limit_s=60.0)


def write_bag(
    folder: Path, count: int = 8, raw: bool = True, spoil: int = -1, driver_s: float = 0.01, width: int = 160
) -> Path:
    """A bag of phantom images every 0.1 s, received driver_s after their stamps; the one of number `spoil` is cut."""
    phantom = Phantom(width=width, height=width * 3 // 4, seed=5, duration_s=60.0, rate_hz=5.0)
    kind = "sensor_msgs/msg/Image" if raw else "sensor_msgs/msg/CompressedImage"
    with BagWriter(folder) as bag:
        for number in range(count):
            picture = phantom.frame(150 + number)[0]
            stamp_ns = RECORDED_NS + round(number * STEP_S * 1e9)
            message: Any = stamped(raw_image(picture) if raw else jpeg_image(picture), stamp_ns)
            if number == spoil:
                message.data = message.data[: len(message.data) // 2]
            data = bytes(serialize_message(message))
            bag.write("/camera/image_raw", kind, stamp_ns + round(driver_s * 1e9), data)
    return folder


@pytest.fixture
def bag(tmp_path: Path) -> Path:
    """Eight raw images."""
    return write_bag(tmp_path / "bag")


def started(graph: Graph, **parameters: Any) -> Any:
    """An active phase node with use_sim_time."""
    node = graph.start(PhaseNode, **{"use_sim_time": True, **parameters})
    assert graph.transition(node, "configure", "activate")
    return node


def played(bag: Path, settings: LiveSettings = PATIENT, **callbacks: Any) -> LiveResult:
    with BagReader(bag) as reader:
        return replay_live(reader, settings, **callbacks)


def test_in_lockstep_every_image_has_its_phase_and_twice_the_same(graph: Graph, bag: Path) -> None:
    started(graph)
    seen: list[int] = []
    first = played(bag, on_image=lambda result: seen.append(len(result.images)))
    assert (first.ended, first.failed, first.interrupted) == ("end of the bag", False, False)
    assert seen == list(range(1, 9))
    assert [one.fate for one in first.images] == ["answered"] * 8
    assert [one.image_stamp_ns for one in first.images] == [RECORDED_NS + i * 10**8 for i in range(8)]
    assert set(first.states) == {SurgicalPhase.OK}
    assert (first.processed, first.replaced, first.rejected, first.lost) == (8, 0, 0, 0)
    assert all(one.latency_ms > 0 for one in first.images)
    assert first.topic == "/surg_perception/image"
    assert all(one.latent_rms and one.latent_rms > 0 for one in first.images)
    assert all(9 < one.phase.latency_ms < 50 for one in first.images), "by /clock, which stands at the log time"

    second = played(bag)  # /clock jumps back, as when a bag loops
    assert set(second.states) == {SurgicalPhase.OK}
    assert [one.phase.probabilities.tolist() for one in second.images] == [
        one.phase.probabilities.tolist() for one in first.images
    ]
    assert [one.phase.confidence for one in second.images] == pytest.approx(
        [one.phase.confidence for one in first.images], abs=1e-6
    )
    assert second.input_sha256 == first.input_sha256


def test_by_time_all_images_are_accounted_for_and_slow_ones_are_late(graph: Graph, bag: Path) -> None:
    node = started(graph, state__max_age_s=3600.0)
    infer = node._backend.infer
    node._backend.infer = lambda frame: (time.sleep(0.5), infer(frame))[1]
    result = played(bag, LiveSettings(rate=4.0, timeout_s=60.0, start_limit_s=60.0, late_ms=400.0))
    assert result.ended == "end of the bag"
    assert len(result.images) == 8
    assert result.received + result.lost == 8
    assert result.processed + result.replaced == result.received
    assert result.replaced > 0, "eight images in 0.2 s, half a second for each"
    assert len(result.answered) == result.processed
    assert result.late == len(result.answered) > 0
    assert result.latency_ms(50) > 500


def test_a_player_that_is_late_still_lets_callbacks_run_before_each_image(monkeypatch: pytest.MonkeyPatch) -> None:
    player = live_replay._Player.__new__(live_replay._Player)
    events: list[Any] = []
    player._bag = SimpleNamespace(images=lambda: (SimpleNamespace(log_ns=RECORDED_NS + k) for k in range(4)))
    player._settings, player._result, player._newest_s = LiveSettings(), LiveResult(), time.monotonic()
    player._wait = lambda condition, limit_s: events.append(limit_s)
    for name in ("_set_clock", "_run_clock", "_wait_for_the_last"):
        monkeypatch.setattr(player, name, lambda *_: None)
    monkeypatch.setattr(player, "_send", lambda number, image: events.append("sent"))
    list(player._at_rate(1e6))
    assert events[1::2] == ["sent"] * 4
    assert min(events[0::2]) > 0, "without time to wait nothing that comes is taken"


def test_a_bag_that_cannot_be_read_any_further_leaves_what_came(graph: Graph, bag: Path) -> None:
    started(graph)
    with BagReader(bag) as reader:
        images = reader.images

        def broken() -> Any:
            yield from islice(images(), 3)
            raise BagError("the disk is gone")

        reader.images = broken  # type: ignore[method-assign]
        result = replay_live(reader, PATIENT)
    assert (result.ended, result.failed, len(result.answered)) == ("the disk is gone", True, 3)


def test_clock_goes_on_at_the_rate_and_images_come_at_their_time(graph: Graph, tmp_path: Path) -> None:
    started(graph, state__max_age_s=3600.0)
    began_s = time.monotonic()
    result = played(write_bag(tmp_path / "slow", 3), LiveSettings(rate=0.1, timeout_s=60.0, start_limit_s=60.0))
    assert time.monotonic() - began_s > 2.0
    first, *_, last = (one.sent_s for one in result.images)
    assert last - first == pytest.approx(2.0 + result.behind_s / 2, abs=result.behind_s + 0.05)
    assert {one.phase.state for one in result.answered} <= {SurgicalPhase.OK}


def test_an_image_that_is_refused_is_told_and_the_rest_goes_on(graph: Graph, tmp_path: Path) -> None:
    started(graph)
    result = played(write_bag(tmp_path / "spoiled", 5, spoil=2))
    assert [one.fate for one in result.images] == ["answered", "answered", "rejected", "answered", "answered"]
    assert (result.rejected, result.processed) == (1, 4)
    assert result.ended == "end of the bag"


def test_images_that_were_old_when_recorded_are_stale(graph: Graph, tmp_path: Path) -> None:
    started(graph)
    result = played(write_bag(tmp_path / "old", 3, driver_s=1.0))
    assert result.states == {SurgicalPhase.STALE: 3}


def test_a_node_that_gives_no_phase_is_named_and_what_came_before_is_kept(graph: Graph, bag: Path) -> None:
    node = started(graph)
    gate, infer, count = threading.Event(), node._backend.infer, iter(range(100))
    node._backend.infer = lambda frame: (gate.wait(120) if next(count) == 3 else None, infer(frame))[1]
    try:
        result = played(bag, LiveSettings(timeout_s=5.0, start_limit_s=60.0))
    finally:
        gate.set()
    assert result.failed
    assert "/surg_perception/phase has the image and gives no phase within 5 s (image 3" in result.ended
    assert [one.fate for one in result.images] == ["answered"] * 3 + ["missing"]


def test_by_time_a_node_that_falls_silent_is_told(graph: Graph, bag: Path) -> None:
    node = started(graph)

    def deactivate(result: LiveResult) -> None:
        if len(result.images) == 2:
            assert graph.transition(node, "deactivate")

    result = played(bag, LiveSettings(rate=0.02, timeout_s=4.0, start_limit_s=60.0), on_image=deactivate)
    assert result.failed
    assert "/surg_perception/phase has been silent for 4 s" in result.ended


def test_a_node_that_is_started_anew_is_told(graph: Graph, bag: Path) -> None:
    node = started(graph)

    def deactivate(result: LiveResult) -> None:
        if len(result.images) == 3:
            assert graph.transition(node, "deactivate", "activate")

    result = played(bag, on_image=deactivate)
    assert result.failed
    assert "started anew during the replay" in result.ended
    assert len(result.answered) >= 3


@pytest.mark.parametrize(
    ("parameters", "steps", "says"),
    [
        (None, (), r"no node /surg_perception/phase .* pipeline.launch.py use_sim_time:=true"),
        ({}, (), r"/surg_perception/phase is unconfigured, expected active: ros2 lifecycle set"),
        ({}, ("configure",), r"/surg_perception/phase is inactive, expected active: ros2 lifecycle set \S+ activate"),
        ({"use_sim_time": False}, ("configure", "activate"), r"use_sim_time false.*use_sim_time:=true"),
        ({"input__transport": "compressed"}, ("configure", "activate"), r"'compressed': launch it with transport:=raw"),
    ],
    ids=["no node", "unconfigured", "inactive", "wall time", "transport"],
)
def test_what_cannot_be_played_to_is_said_with_the_fix(
    graph: Graph, bag: Path, parameters: dict[str, Any] | None, steps: tuple[str, ...], says: str
) -> None:
    if parameters is not None:
        node = graph.start(PhaseNode, **{"use_sim_time": True, **parameters})
        assert graph.transition(node, *steps) if steps else True
    limit_s = 1.0 if parameters is None else 20.0 if "active" not in says else 5.0
    with pytest.raises(LiveReplayError, match=says):
        played(bag, LiveSettings(start_limit_s=limit_s, timeout_s=60.0))


def test_another_camera_on_the_topic_is_named(graph: Graph, bag: Path) -> None:
    started(graph)
    graph.stranger().create_publisher(Image, "image", 1)
    wait_until(lambda: graph.client.count_publishers("image"), 30, "the stranger to be seen")
    with pytest.raises(LiveReplayError, match=r"/surg_perception/stranger publishes images .*/image too"):
        played(bag)


def test_compressed_images_go_to_the_compressed_topic(graph: Graph, tmp_path: Path) -> None:
    started(graph, input__transport="compressed")
    heard = graph.collect(CompressedImage, "image/compressed")
    result = played(write_bag(tmp_path / "jpeg", 3, raw=False))
    assert set(result.states) == {SurgicalPhase.OK}
    assert result.topic == "/surg_perception/image/compressed"
    wait_until(lambda: len(heard) >= 3, 30, "the images as recorded")
    assert heard[0].header.frame_id == "endoscope"


# The command ------------------------------------------------------------------------------------------------------


def command(bag: Path, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """`surg-perception replay BAG --out OUT OPTIONS`."""
    return subprocess.run(
        [*COMMAND, str(bag), "--out", str(out), *options], capture_output=True, text=True, timeout=300, check=False
    )


def lines(out: Path, kind: str) -> list[dict[str, Any]]:
    entries = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return [entry for entry in entries if entry["kind"] == kind]


def test_a_launched_pipeline_says_what_the_offline_replay_says_again_and_again(
    launched: Any, tmp_path: Path, bag: Path
) -> None:
    launch = launched("use_sim_time:=true")
    golden = tmp_path / "golden.yaml"
    offline = command(bag, tmp_path / "offline", "--golden", str(golden), "--update")
    assert offline.returncode == 0, offline.stderr
    wait_until(lambda: "pipeline up" in launch.text(), 120, "the pipeline to come up")

    for out in (tmp_path / "first", tmp_path / "second"):  # /clock jumps back in between
        live = command(bag, out, "--live", "--golden", str(golden), "--timeout", "60")
        assert live.returncode == 0, live.stdout + live.stderr
        frames = lines(out, "frame")
        assert [frame["state"] for frame in frames] == ["OK"] * 8
        assert all(frame["latency_ms"] > 0 for frame in frames)
        (head,) = lines(out, "replay")
        assert (head["live"]["answered"], head["live"]["lost"], head["live"]["stale"]) == (8, 0, 0)
        with AnyReader([out / "bag"], default_typestore=typestore()) as results:
            (topic,) = (c for c in results.connections if c.topic == "/surg_perception/phase/phase")
            said = [results.deserialize(raw, topic.msgtype) for _, _, raw in results.messages([topic])]
        assert [message.phase for message in said] == [frame["phase"] for frame in frames]
        assert all(message.inference_ms > 0 for message in said), "times as the node told them"


def test_played_in_real_time_as_ros2_bag_play_does_the_launched_pipeline_says_ok(
    launched: Any, graph: Graph, tmp_path: Path
) -> None:
    bag = write_bag(tmp_path / "bag", 20)
    phases = graph.collect(SurgicalPhase, "phase/phase")
    launch = launched("use_sim_time:=true")
    wait_until(lambda: "pipeline up" in launch.text(), 120, "the pipeline to come up")
    for out in (tmp_path / "first", tmp_path / "second"):
        live = command(bag, out, "--live", "--rate", "0.5", "--timeout", "60")
        assert live.returncode == 0, live.stdout + live.stderr
        states = [frame["state"] for frame in lines(out, "frame")]
        assert states.count("OK") >= 15, "some may be late on a busy machine"
    recorded = [p for p in phases if p.phase_id >= 0 and stamp_ns(p) >= RECORDED_NS]
    assert any(stamp_ns(b) < stamp_ns(a) for a, b in pairwise(recorded)), "the bag was played twice"
    assert "Traceback" not in launch.text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_a_replay_with_what_came_so_far(
    graph: Graph, tmp_path: Path, bag: Path, number: signal.Signals
) -> None:
    started(graph, state__max_age_s=3600.0)
    phases = graph.collect(SurgicalPhase, "phase/phase")
    out = tmp_path / "out"
    process = subprocess.Popen(
        [*COMMAND, str(bag), "--out", str(out), "--live", "--rate", "0.01"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        wait_until(lambda: any(p.frames_processed >= 1 for p in phases), 120, "the first phase")
        time.sleep(1.0)  # the player has it too
        process.send_signal(number)
        said = process.communicate(timeout=60)[0]
    finally:
        process.kill()
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert 1 <= len(lines(out, "frame")) < 8
    assert lines(out, "end")[0]["interrupted"] is True


def test_launch_brings_the_pipeline_up_and_takes_it_down(domain: int, tmp_path: Path, bag: Path) -> None:
    out = tmp_path / "out"
    # Large images: with DDS as it is by default hardly one would arrive.
    large = write_bag(tmp_path / "large", 6, width=1600)
    done = command(large, out, "--launch", "log_level:=warn", "--timeout", "60")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {frame["state"] for frame in lines(out, "frame")} <= {"OK", "UNCERTAIN"}
    assert "use_sim_time:=true transport:=raw" in done.stdout.replace("\n", " ")

    failed = command(bag, tmp_path / "failed", "--launch", "model:=no_such_model")
    assert failed.returncode == 1
    assert "the launch ended with exit status 1" in failed.stderr
    left = [p for p in Path("/proc").glob("[0-9]*") if environment_of(p).get("ROS_DOMAIN_ID") == str(domain)]
    assert not [p for p in left if b"phase_node" in (p / "cmdline").read_bytes()]


def environment_of(process: Path) -> dict[str, str]:
    """Environment of a process of /proc; empty where it is another user's, or gone."""
    try:
        entries = (process / "environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return {}
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--rate", "2"], "--rate is for a replay through running nodes: add --live"),
        (["--live", "--rate", "0"], "--rate is 0, expected a number above 0"),
        (["--live", "--model", "gsvit_m0_phantom"], "--model is for an offline replay"),
        (["--launch", "use_sim_time"], "--launch use_sim_time: expected ARG:=VALUE"),
        (["--launch", "namespace:=or1"], "in the namespace that --namespace names"),
    ],
)
def test_options_that_do_not_go_together(bag: Path, tmp_path: Path, options: list[str], says: str) -> None:
    done = command(bag, tmp_path / "out", *options)
    assert done.returncode == 2
    assert says in done.stderr
