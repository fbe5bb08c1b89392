# SPDX-License-Identifier: Apache-2.0
"""Static INT8: calibrated on half of the frames, accepted on the other half, in as many layers as fp32 bears."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnx_graphs import SmallNetwork, graph_of, write_folder

from surg_perception.cli.main import main
from surg_perception.models import ModelCard, find_model
from surg_perception.runtime import PrecisionRefused, open_backend
from surg_perception.runtime.agreement import compare, reference_frames
from surg_perception.runtime.engine_graph import engine_graph
from surg_perception.runtime.quantise import quantise


@pytest.fixture
def network() -> SmallNetwork:
    return SmallNetwork.random()


@pytest.fixture
def card(network: SmallNetwork, tmp_path: Path) -> ModelCard:
    return write_folder(tmp_path / "small", graph_of(network, metadata={"phases": '["a", "b", "c", "d", "e"]'}))


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def test_a_model_in_int8_runs_in_each_engine_and_agrees(card: ModelCard, network: SmallNetwork, tmp_path: Path) -> None:
    before = card.graph_path.read_bytes()
    told: list[float] = []
    made = quantise(card, reference_frames(), tmp_path / "small_int8", tell=lambda done, what: told.append(done))
    assert card.graph_path.read_bytes() == before
    assert told == sorted(told)
    assert 2 <= made.in_int8 <= made.layers == 3
    assert set(made.agreements) == {"onnxruntime:CPU", "openvino:CPU"}

    found = find_model(tmp_path / "small_int8")
    found.verify()
    assert found.model_id == made.card.model_id != card.model_id
    assert found.name == "small_int8"
    assert found.labels == card.labels
    assert found.weights is None
    assert found.training["quantised_from"] == card.model_id
    assert found.metrics["int8_against_fp32"]["int8_layers"] == f"{made.in_int8} of 3"
    assert [entry.key for entry in onnx.load(found.graph_path).metadata_props] == ["phases"]
    assert operators(found.graph_path)["QuantizeLinear"] >= 2
    expected = network(reference_frames())
    for engine in ("onnxruntime", "openvino"):
        with open_backend(found, engine, allow_fallback=False, threads=1) as opened:
            outputs = opened.infer_batch(reference_frames())
        assert 1e-5 < np.abs(outputs[0] - expected[0]).max() < 0.05, engine
        assert compare(outputs, expected).holds, engine
    assert not list(tmp_path.glob(".*"))


def test_weights_are_int8_per_output_channel_and_zero_is_zero(card: ModelCard, tmp_path: Path) -> None:
    """As TensorRT wants them."""
    made = quantise(card, reference_frames(), tmp_path / "q")
    graph = onnx.load(made.card.graph_path).graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    assert any(value.dtype == np.int8 and value.shape == (8, 3, 56, 56) for value in constants.values())
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert not constants[node.input[2]].any()
            assert constants[node.input[2]].dtype in (np.int8, np.int32)
    onnx.checker.check_model(onnx.load_from_string(engine_graph(made.card.graph_path, "fp32")))


def test_layers_that_int8_spoils_stay_in_fp32(network: SmallNetwork, tmp_path: Path) -> None:
    card = write_folder(tmp_path / "m", graph_of(network, cancelling=300.0))
    made = quantise(card, reference_frames(), tmp_path / "q")
    assert 0 < made.in_int8 < made.layers == 3
    assert all(agreement.holds for agreement in made.agreements.values())
    with open_backend(made.card, "onnxruntime", allow_fallback=False, threads=1) as opened:
        assert compare(opened.infer_batch(reference_frames()), network(reference_frames())).holds


def test_a_model_that_int8_spoils_everywhere_is_refused(network: SmallNetwork, tmp_path: Path) -> None:
    model = graph_of(network, head=False)
    kernel = next(tensor for tensor in model.graph.initializer if tensor.name == "kernel")
    checkers = np.indices((56, 56)).sum(axis=0) % 2 * 2 - 1
    kernel.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(kernel) + np.float32(3 * checkers), "kernel"))
    card = write_folder(tmp_path / "m", model, head=False)
    with pytest.raises(PrecisionRefused, match=r"int8 agrees with .* in no layer of m@"):
        quantise(card, reference_frames(), tmp_path / "q")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_too_few_frames_and_a_folder_that_is_there_are_refused(card: ModelCard, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs 8 frames or more, found 7"):
        quantise(card, reference_frames()[:7], tmp_path / "q")
    with pytest.raises(FileExistsError, match="small is there already"):
        quantise(card, reference_frames(), card.folder)


def test_the_command_writes_a_model(
    card: ModelCard, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pictures").mkdir()
    for index, frame in enumerate(reference_frames()):
        assert cv2.imwrite(str(tmp_path / "pictures" / f"{index:02}.png"), frame)
    command = ["export", "int8", str(card.folder), "--frames", str(tmp_path / "pictures"), "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["surg-perception", *command, "--out", str(tmp_path / "q")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert "of 3 layers in int8" in capsys.readouterr().out
    assert find_model(tmp_path / "q").name == "q"
