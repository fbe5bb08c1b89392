# SPDX-License-Identifier: Apache-2.0
"""Node `phase` and TensorRT over a fake GPU: an engine built in the background takes over, a lost GPU gives way."""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="ROS 2 is not in the environment: `source setup.bash` first")

from conftest import Graph, Spoken, wait_until
from diagnostic_msgs.msg import DiagnosticArray
from folders import copied
from rclpy.parameter import Parameter
from surg_perception_msgs.msg import SurgicalPhase
from test_set_procedure import Theatre, other

from surg_perception.data.phantom import Phantom
from surg_perception.nodes import engine_switch, phase_node
from surg_perception.runtime.engine_build import EngineBuilder

FAKES = Path(__file__).parents[1] / "unit" / "fake_nvidia"
PATIENCE_S = 300.0


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    """One endoscope image, uint8 [120, 160, 3]."""
    return Phantom(width=160, height=120, seed=5, duration_s=60.0, rate_hz=1.0).frame(30)[0]


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A fake GPU and TensorRT, here and in the builder's process, an empty cache, and the model "old"."""
    for name in [name for name in sys.modules if name.split(".")[0] in ("cuda", "tensorrt")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(FAKES))
    paths = [str(FAKES), str(FAKES.parents[2]), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("SURG_PERCEPTION_MODELS", str(tmp_path))
    copied(tmp_path / "old")
    # The tests do not wait behind everything else on the machine.
    monkeypatch.setattr(engine_switch, "EngineBuilder", lambda say: EngineBuilder(say, niceness=0))
    monkeypatch.setattr(phase_node, "EngineBuilder", lambda say: EngineBuilder(say, niceness=0))
    state = importlib.import_module("cuda.bindings.runtime").state
    state.reset()
    yield state
    for name in [name for name in sys.modules if name.split(".")[0] in ("cuda", "tensorrt")]:
        del sys.modules[name]


def backends(theatre: Theatre) -> list[str]:
    return [phase.backend for phase in theatre.phases if phase.state != SurgicalPhase.NO_SIGNAL]


def test_an_engine_built_in_the_background_takes_over_between_two_images_and_a_lost_gpu_gives_way(
    graph: Graph, picture: np.ndarray, gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = tmp_path / "release"
    monkeypatch.setenv("FAKE_TENSORRT_HOLD", str(release))
    diagnostics: list[DiagnosticArray] = graph.collect(DiagnosticArray, "/diagnostics", 100)

    def told(key: str) -> list[str]:
        return [v.value for message in diagnostics for s in message.status for v in s.values if v.key == key]

    settings = {"runtime__backend": "tensorrt", "runtime__precision": "fp16", "engine__build": "background"}
    with Theatre(graph, picture, **settings) as theatre:
        first = theatre.node._backend
        assert first.device == "CPU"
        wait_until(lambda: any("Timing tactics" in text for text in told("engine")), PATIENCE_S, "progress")
        assert set(backends(theatre)) == {first.name}, "the CPU serves meanwhile"
        release.touch()
        wait_until(lambda: backends(theatre)[-1] == "tensorrt:CUDA:fp16", PATIENCE_S, "the engine")
        wait_until(lambda: theatre.labels[-1].backend == "tensorrt:CUDA:fp16", 30, "the labels")
        wait_until(lambda: told("standby"), 30, "the standby in diagnostics")
        assert told("standby")[-1].endswith(":CPU:fp32")
        names = backends(theatre)
        assert names == sorted(names, key=lambda name: name != first.name), "first the one, then the other"
        stamps_s = theatre.stamps_s()
        assert (np.diff(stamps_s) > 0).all()
        last = theatre.phases[-1]
        assert last.frames_rejected == 0
        assert last.frames_received - last.frames_processed - last.frames_replaced <= 2, "no image is lost"
        wait_until(lambda: first._closed, 30, "the CPU's backend to be given back")

        before = len(theatre.phases)
        failed_s = time.monotonic()
        gpu.fail("cudaGraphLaunch", "cudaErrorIllegalAddress")
        wait_until(lambda: backends(theatre)[-1].endswith(":CPU:fp32"), 30, "the CPU")
        took_s = time.monotonic() - failed_s
        later = [phase for phase in theatre.phases[before:] if phase.state != SurgicalPhase.NO_SIGNAL]
        faults = [index for index, phase in enumerate(later) if phase.state == SurgicalPhase.FAULT]
        assert len(faults) == 1, "one image is lost, no more"
        gap_s = theatre.stamps_s(before)[faults[0] + 1] - theatre.stamps_s(before)[faults[0]]
        print(f"{took_s:.2f} s after the fault, {gap_s:.2f} s of images between")
        assert gap_s <= 2.0
        assert theatre.node._engine is None
        wait_until(gpu.nothing_held, 30, "the GPU's memory to be given back")
    assert graph.transition(theatre.node, "deactivate", "cleanup")


def test_without_a_fallback_a_lost_gpu_is_a_fault_that_lasts_and_costs_nothing(
    graph: Graph, picture: np.ndarray, gpu: Any
) -> None:
    settings = {"runtime__backend": "tensorrt", "engine__build": "configure", "runtime__allow_fallback": False}
    with Theatre(graph, picture, **settings) as theatre:
        assert theatre.node._backend.name == "tensorrt:CUDA:fp32"
        assert theatre.node._backend.standby is None
        gpu.fail("cudaStreamQuery", "cudaErrorLaunchFailure")
        wait_until(lambda: theatre.phases[-1].state == SurgicalPhase.FAULT, 30, "FAULT")
        gpu.calls.clear()
        seen = len(theatre.phases)
        wait_until(lambda: len(theatre.phases) > seen + 5, 30, "the node to live on")
        assert {phase.state for phase in theatre.phases[seen:]} <= {SurgicalPhase.FAULT}
        assert theatre.phases[-1].backend == "tensorrt:CUDA:fp32"
        assert gpu.calls == [], "a lost GPU is not asked again"
    gpu.reset()
    assert graph.transition(theatre.node, "deactivate", "cleanup", "configure", "activate")
    assert theatre.node._backend.name == "tensorrt:CUDA:fp32", "from the cache"


def test_another_procedure_gets_its_engine_too(
    graph: Graph, picture: np.ndarray, gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_TENSORRT_HOLD", str(tmp_path / "release"))
    new = other(tmp_path, "new")
    with Theatre(graph, picture, runtime__backend="tensorrt", engine__build="background") as theatre:
        first = theatre.node._engine
        assert theatre.set("new").success
        assert theatre.node._engine is not first
        assert theatre.phases[-1].backend != "tensorrt:CUDA:fp32"
        (tmp_path / "release").touch()
        wait_until(lambda: backends(theatre)[-1] == "tensorrt:CUDA:fp32", PATIENCE_S, "the new model's engine")
        assert theatre.phases[-1].model_id == new.model_id
        assert first.take() is None


def builders() -> list[int]:
    """Processes of this one that build an engine."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid() and b"build-engine" in (path / "cmdline").read_bytes():
                found.append(int(path.name))
        except OSError:  # ended meanwhile
            continue
    return found


def test_deactivate_stops_the_build_of_another_procedure_whatever_fails_meanwhile(
    graph: Graph, picture: np.ndarray, gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other(tmp_path, "new")
    with Theatre(graph, picture, runtime__backend="tensorrt", engine__build="configure") as theatre:
        assert theatre.node._backend.name == "tensorrt:CUDA:fp32"
        monkeypatch.setenv("FAKE_TENSORRT_HOLD", str(tmp_path / "never"))
        answer = theatre.ask("new")
        wait_until(builders, PATIENCE_S, "the new model's engine to be built")
        # Another backend is opened meanwhile, which builds nothing.
        theatre.node._backend.take_standby().close()
        gpu.fail("cudaGraphLaunch", "cudaErrorIllegalAddress")
        wait_until(lambda: backends(theatre)[-1].endswith(":CPU:fp32"), PATIENCE_S, "the CPU")
        assert builders()
        assert graph.transition(theatre.node, "deactivate")
        wait_until(lambda: not builders(), 30, "the builder to be stopped")
        wait_until(answer.done, 30, "the answer")
        assert not answer.result().success
    assert graph.transition(theatre.node, "cleanup")


def test_without_a_fallback_nothing_can_be_built_in_the_background(
    graph: Graph, picture: np.ndarray, gpu: Any, spoken: Spoken
) -> None:
    settings = {"runtime__backend": "tensorrt", "runtime__precision": "fp16", "runtime__allow_fallback": False}
    theatre = Theatre(graph, picture, engine__build="background", **settings)
    assert not graph.transition(theatre.node, "configure")
    said = ("tensorrt:CUDA:fp16 has not been built", "engine.build is 'background'", "runtime.allow_fallback is false")
    assert spoken.lines("configure failed", *said, "set engine.build to 'configure'", "--precision fp16` first")
    assert not builders()
    theatre.node.set_parameters([Parameter("engine.build", value="configure")])
    assert graph.transition(theatre.node, "configure"), "as it says"
    assert theatre.node._backend.name == "tensorrt:CUDA:fp16"
    assert graph.transition(theatre.node, "cleanup")


def test_never_builds_nothing_and_a_failed_build_leaves_the_cpu_serving(
    graph: Graph, picture: np.ndarray, gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_TENSORRT_DIES", "1")
    with Theatre(graph, picture, runtime__backend="tensorrt", engine__build="never") as theatre:
        assert theatre.node._engine is None
        assert theatre.node._backend.device == "CPU"
        assert any("build-engine" in note for note in theatre.node._backend.notes)
    assert graph.transition(theatre.node, "deactivate", "cleanup")
    theatre.node.set_parameters([Parameter("engine.build", value="background")])
    assert graph.transition(theatre.node, "configure", "activate")
    engine = theatre.node._engine
    wait_until(lambda: engine.failure, PATIENCE_S, "the builder to die")
    assert "signal 11" in engine.failure
    assert theatre.node._backend.device == "CPU"
    assert theatre.node.state_label == "active"
