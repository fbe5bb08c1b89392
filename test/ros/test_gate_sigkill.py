# SPDX-License-Identifier: Apache-2.0
"""The example consumer beside a pipeline that is killed, stopped and changed: real processes, real DDS.

The figures that are printed (`pytest -s`) are this machine's now; docs/consumer.md has those of the default parameters.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("rclpy", reason="ROS 2 is not in the environment: `source setup.bash` first")

from conftest import Graph, Launched, wait_until
from folders import copied
from surg_perception_msgs.msg import PhaseTrust, SurgicalPhase
from surg_perception_msgs.srv import SetProcedure

DEADLINE_S = 1.0
# A busy machine is slow, and the small model is not always sure of itself: neither is what is shown here.
PARAMETERS = {
    "/**/phase": {"state.max_age_s": 20.0, "state.uncertain_below": 0.0, "output.deadline_s": DEADLINE_S},
    "/**/gate": {
        "input.deadline_s": DEADLINE_S,
        "max_age_s": 20.0,
        "confidence.leave_below": 0.0,
        "confidence.return_above": 0.0,
        "hold_s": 0.5,
    },
}


class Theatre:
    """A launched pipeline with phantom and gate, and what the gate says."""

    def __init__(self, launched: Callable[..., Launched], graph: Graph, tmp_path: Path, *arguments: str) -> None:
        self.graph = graph
        self.trusts: list[PhaseTrust] = graph.collect(PhaseTrust, "gate/trust")
        self.phases: list[SurgicalPhase] = graph.collect(SurgicalPhase, "phase/phase")
        file = tmp_path / "parameters.yaml"
        file.write_text(yaml.safe_dump({node: {"ros__parameters": values} for node, values in PARAMETERS.items()}))
        self.launch = launched(
            "gate:=true",
            "source:=phantom",
            "source_width:=160",
            "source_height:=120",
            "source_rate_hz:=10",
            "source_duration_s:=3600",
            f"params_file:={file}",
            *arguments,
        )
        self.until(lambda t: t.trusted, "trust at the start", 120)

    def until(self, condition: Callable[[PhaseTrust], bool], what: str, within_s: float = 60.0) -> PhaseTrust:
        """The first decision from now on that meets the condition."""
        start = len(self.trusts)
        return wait_until(
            lambda: next((t for t in self.trusts[start:] if condition(t)), None),
            within_s,
            f"{what}; the last decision was: {self.trusts[-1].reason_text if self.trusts else 'none'}",
        )

    def pids(self, executable: str) -> list[int]:
        """The node's process."""
        return self.launch.pids(f"/surg_perception/{executable}")

    def signal(self, executable: str, number: signal.Signals) -> float:
        """Send a signal to the node's process; when, by the steady clock."""
        (pid,) = self.pids(executable)
        sent_s = time.monotonic()
        os.kill(pid, number)
        return sent_s


def test_a_killed_phase_node_ends_trust_in_time_and_its_respawn_brings_it_back(
    launched: Any, graph: Graph, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theatre = Theatre(launched, graph, tmp_path, "respawn:=true")
    (before,) = theatre.pids("phase_node")
    killed_s = theatre.signal("phase_node", signal.SIGKILL)
    lost = theatre.until(lambda t: not t.trusted, "the end of trust")
    lost_s = time.monotonic() - killed_s
    assert lost.reason in (PhaseTrust.SILENT, PhaseTrust.LOST)
    assert lost.phase_id == -1
    count = len(theatre.phases)
    wait_until(lambda: theatre.pids("phase_node") not in ([], [before]), 60, "the new process")
    started_s = time.monotonic() - killed_s
    wait_until(lambda: any(p.state == SurgicalPhase.OK for p in theatre.phases[count:]), 60, "a phase again")
    phase_s = time.monotonic() - killed_s
    back = theatre.until(lambda t: t.trusted, "trust again")
    back_s = time.monotonic() - killed_s
    with capsys.disabled():
        print(
            f"\nSIGKILL of phase: no longer trusted after {lost_s:.2f} s, process again {started_s:.2f} s, "
            f"first OK phase {phase_s:.2f} s, trusted {back_s:.2f} s"
        )
    assert back.model_id == lost.model_id
    assert lost_s < DEADLINE_S + 5.0
    assert back_s < 60.0


def test_a_stopped_node_a_changed_model_and_a_dead_camera_end_trust(
    launched: Any, graph: Graph, tmp_path: Path
) -> None:
    theatre = Theatre(launched, graph, tmp_path)
    theatre.signal("phase_node", signal.SIGSTOP)  # alive, and silent
    silent = theatre.until(lambda t: not t.trusted, "the end of trust")
    assert silent.reason in (PhaseTrust.SILENT, PhaseTrust.LOST)
    theatre.signal("phase_node", signal.SIGCONT)
    trusted = theatre.until(lambda t: t.trusted, "trust again")

    other = copied(tmp_path / "other")
    service = graph.client.create_client(SetProcedure, "phase/set_procedure")
    assert service.wait_for_service(timeout_sec=30.0)
    answer = service.call_async(SetProcedure.Request(procedure=str(other.folder)))
    changed = theatre.until(lambda t: not t.trusted, "the end of trust")
    assert changed.reason == PhaseTrust.MODEL_CHANGED
    assert trusted.model_id in changed.reason_text
    wait_until(answer.done, 60, "the answer of set_procedure")
    back = service.call_async(SetProcedure.Request(procedure="gsvit_m0_phantom"))
    theatre.until(lambda t: t.trusted, "trust in the model that was trusted")
    wait_until(back.done, 60, "the answer of set_procedure")

    theatre.signal("source_node", signal.SIGKILL)
    dead = theatre.until(lambda t: not t.trusted, "the end of trust")
    assert dead.reason == PhaseTrust.STATE, dead.reason_text
    assert "NO_SIGNAL" in dead.reason_text
    assert theatre.launch.process.poll() is None
