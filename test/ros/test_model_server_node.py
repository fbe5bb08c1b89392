# SPDX-License-Identifier: Apache-2.0
"""Node `phase` on a real model server that goes away."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="ROS 2 is not in the environment: `source setup.bash` first")

sys.path.append(str(Path(__file__).parents[1] / "unit"))

from conftest import Graph, Spoken, wait_until
from diagnostic_msgs.msg import DiagnosticArray
from images import raw_image
from surg_perception_msgs.msg import SurgicalPhase
from test_phase_node import MODEL, Rig
from triton_server import TritonServer

from surg_perception.data.phantom import Phantom
from surg_perception.models import find_model
from surg_perception.runtime.model_repository import write_repository

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("grpc", "tritonclient")),
    reason="tritonclient is not installed: make setup-test",
)

REMOTE = "triton:REMOTE:fp32"


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    """One endoscope image, uint8 [240, 320, 3]."""
    return Phantom(width=320, height=240, seed=5, duration_s=60.0, rate_hz=5.0).frame(150)[0]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[TritonServer]:
    server = TritonServer(tmp_path)
    write_repository(find_model(MODEL), server.repository)
    server.start()
    yield server
    server.stop(kill=True)


def settings(server: TritonServer, **more: Any) -> dict[str, Any]:
    return {
        "runtime__backend": "triton",
        "runtime__server_url": server.url,
        "runtime__server_timeout_s": 20.0,
        **more,
    }


def test_phases_come_again_when_the_server_is_back(graph: Graph, picture: np.ndarray, server: TritonServer) -> None:
    rig = Rig(graph, **settings(server, runtime__allow_fallback=False)).up()
    before = rig.ask(raw_image(picture))
    assert (before.backend, before.phase_id >= 0) == (REMOTE, True)
    server.stop(kill=True)
    for _ in range(4):
        fault = rig.ask(raw_image(picture))
        assert (fault.state, fault.phase_id, fault.backend) == (SurgicalPhase.FAULT, -1, REMOTE)
    server.start()
    after = rig.ask(raw_image(picture))
    assert (after.backend, after.phase_id) == (REMOTE, before.phase_id)
    np.testing.assert_allclose(after.probabilities, before.probabilities, atol=1e-3)


def test_the_room_goes_on_by_itself_where_it_may(
    graph: Graph, picture: np.ndarray, server: TritonServer, spoken: Spoken
) -> None:
    rig = Rig(graph, **settings(server)).up()
    before = rig.ask(raw_image(picture))
    assert before.backend == REMOTE
    assert rig.node._backend.standby is not None
    server.stop(kill=True)
    for _ in range(3):
        assert rig.ask(raw_image(picture)).state == SurgicalPhase.FAULT
    wait_until(lambda: rig.node._backend.name != REMOTE, 60, "a backend of this machine")
    after = rig.ask(raw_image(picture))
    assert (after.backend, after.phase_id) == (rig.node._backend.name, before.phase_id)
    assert ":CPU:" in after.backend
    assert spoken.lines(REMOTE, f"{after.backend} from now on")
    assert spoken.lines("no phase for this image", server.url, "is away")


def test_the_server_runs_again_by_itself_once_it_is_back(
    graph: Graph, picture: np.ndarray, server: TritonServer, spoken: Spoken
) -> None:
    diagnostics: list[DiagnosticArray] = graph.collect(DiagnosticArray, "/diagnostics", 100)
    rig = Rig(graph, **settings(server, runtime__server_retry_s=0.5)).up()
    before = rig.ask(raw_image(picture))
    server.stop(kill=True)
    for _ in range(3):
        assert rig.ask(raw_image(picture)).state == SurgicalPhase.FAULT
    wait_until(lambda: rig.node._backend.name != REMOTE, 60, "a backend of this machine")
    local = rig.node._backend
    wait_until(lambda: spoken.lines("not yet the model server", f"{local.name} goes on", "is away"), 60, "a try")
    wait_until(
        lambda: any(
            (v.key, server.url in v.value) == ("server", True) for m in diagnostics for s in m.status for v in s.values
        ),
        60,
        "diagnostics to say so",
    )
    assert rig.ask(raw_image(picture)).backend == local.name
    server.start()
    wait_until(lambda: rig.node._backend.name == REMOTE, 120, "the server")
    after = rig.ask(raw_image(picture))
    assert (after.backend, after.phase_id, after.state) == (REMOTE, before.phase_id, before.state)
    assert after.frames_rejected == 3, "none but those of the fault"
    assert rig.node._server is None
    assert rig.node._backend.standby is not None
    wait_until(lambda: local._closed, 30, "the backend that served meanwhile to be given back")
    assert REMOTE not in rig.node._failed_backends, "it may be taken for another model too"


def test_a_server_that_comes_after_the_node_is_used(graph: Graph, picture: np.ndarray, server: TritonServer) -> None:
    server.stop(kill=True)
    rig = Rig(graph, **settings(server, runtime__server_retry_s=0.5)).up()
    assert ":CPU:" in rig.ask(raw_image(picture)).backend
    server.start()
    wait_until(lambda: rig.node._backend.name == REMOTE, 120, "the server")
    assert rig.ask(raw_image(picture)).backend == REMOTE
    assert graph.transition(rig.node, "deactivate", "cleanup")


@pytest.mark.parametrize(
    "changes",
    [
        {"runtime__server_retry_s": 0.0},
        {"runtime__backend": "openvino"},
        {"runtime__backend": "auto", "runtime__precision": "bf16"},
    ],
)
def test_a_server_is_waited_for_only_where_it_is_wanted(
    graph: Graph, server: TritonServer, changes: dict[str, Any]
) -> None:
    server.stop(kill=True)
    rig = Rig(graph, **settings(server, **changes)).up()
    assert rig.node._backend.name != REMOTE
    assert rig.node._server is None


@pytest.mark.parametrize(
    ("url", "reason"),
    [("server:8001", "expected grpc://host:port"), ("grpc://127.0.0.1:1", "grpc://127.0.0.1:1 is away")],
)
def test_configure_fails_without_the_server_that_is_demanded(
    graph: Graph, spoken: Spoken, url: str, reason: str
) -> None:
    rig = Rig(graph, runtime__backend="triton", runtime__server_url=url, runtime__allow_fallback=False)
    assert not graph.transition(rig.node, "configure")
    assert spoken.lines("configure failed", reason)
