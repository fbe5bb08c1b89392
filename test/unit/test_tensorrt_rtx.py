# SPDX-License-Identifier: Apache-2.0
"""TensorRT-RTX, the real library: engines built ahead of time, on a machine that needs no GPU."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from onnx_graphs import SmallNetwork, graph_of, write_folder

from surg_perception.models import find_model
from surg_perception.runtime import BackendUnavailable, tensorrt_layer
from surg_perception.runtime.cuda_device import Gpu
from surg_perception.runtime.engine_build import engine_key
from surg_perception.runtime.engine_cache import EngineCache
from surg_perception.runtime.engine_graph import engine_graph
from surg_perception.runtime.tensorrt_layer import EngineError, EngineRunner, build_engine, find_library

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="TensorRT-RTX is not installed: pip install tensorrt-rtx-cu12 (91 MB)",
)

PATIENCE_S = 900.0


@pytest.mark.parametrize("precision", ["fp32", "fp16", "fp16-mixed"])
def test_a_small_graph_becomes_an_engine(precision: str, tmp_path: Path) -> None:
    card = write_folder(tmp_path / "small", graph_of(SmallNetwork.random()))
    told: list[float] = []
    library = find_library("tensorrt_rtx")
    assert library.ahead_of_time
    assert library.strongly_typed
    graph = engine_graph(card.graph_path, precision)
    engine = build_engine(library, graph, ("sm86", "sm89"), lambda done, phase: told.append(done))
    assert len(engine) > 10_000
    assert told == sorted(told)
    assert told[-1] == 1.0
    assert len(set(told)) > 2


def test_what_it_cannot_read_is_said(tmp_path: Path) -> None:
    card = write_folder(tmp_path / "small", graph_of(SmallNetwork.random()))
    model = onnx.load_from_string(engine_graph(card.graph_path, "fp32"))
    model.graph.node.insert(0, onnx.helper.make_node("Transpose", ["frame"], ["turned"], perm=[0, 3, 1, 2]))
    model.graph.output.append(onnx.helper.make_tensor_value_info("turned", onnx.TensorProto.UINT8, [1, 3, 224, 224]))
    with pytest.raises(EngineError, match=r"tensorrt_rtx .* cannot read the graph: .*Transpose"):
        build_engine(find_library("tensorrt_rtx"), model.SerializeToString(), ("sm86",), lambda done, phase: None)


def test_a_stranger_is_known_by_what_it_says() -> None:
    with pytest.raises(EngineError, match="Serialization assertion") as failed:
        EngineRunner(find_library("tensorrt_rtx"), b"stranger" * 100, None)
    assert tensorrt_layer._UNFIT.search(str(failed.value))


def test_targets_are_those_that_the_library_has(tmp_path: Path) -> None:
    card = write_folder(tmp_path / "small", graph_of(SmallNetwork.random()))
    library = find_library("tensorrt_rtx")
    assert {"sm75", "sm86", "sm89"} <= set(library.targets)
    with pytest.raises(BackendUnavailable, match=r"does not build for sm61; it builds for sm75"):
        engine_key(card, library, "fp16", None, ("sm61",))
    with pytest.raises(BackendUnavailable, match="there is no GPU here: name targets, of sm75"):
        engine_key(card, library, "fp16", None)
    ahead = engine_key(card, library, "fp16", None, ("sm89", "sm86"))
    at_home = engine_key(card, library, "fp16", Gpu("NVIDIA GeForce RTX 4090", "sm89", 24000))
    assert at_home.served_by(ahead.content()), "an engine built elsewhere is found on its target"
    assert not engine_key(card, library, "fp16", Gpu("T4", "sm75", 16000)).served_by(ahead.content())


def test_the_command_builds_the_shipped_model_and_finds_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    command = [sys.executable, "-m", "surg_perception.cli.main", "build-engine", "gsvit_m0_phantom"]
    command += ["--flavour", "tensorrt_rtx", "--targets", "sm86,sm89", "--threads", "1"]
    done = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    assert "fp16 passed" in done.stdout
    assert "graph, on the CPU" in done.stdout
    (side_file,) = EngineCache().folder.glob("*.json")
    facts = json.loads(side_file.read_text())
    assert facts["key"]["targets"] == ["sm86", "sm89"]
    assert facts["key"]["graph_sha256"] == find_model("gsvit_m0_phantom").graph.sha256
    assert facts["graph_agreement"]["phase_changes"] == 0
    assert 0 < facts["graph_agreement"]["mean_difference"] <= facts["graph_agreement"]["probability_difference"]
    assert (tmp_path / f"{side_file.stem}.engine").stat().st_size == facts["bytes"]
    again = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=PATIENCE_S)
    assert json.loads(again.stdout.splitlines()[-1])["attempts"][0]["cached"] is True
