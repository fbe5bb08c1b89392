# SPDX-License-Identifier: Apache-2.0
"""Model folders: graph, weights and PyTorch say the same; cards are true; released files become folders."""

from __future__ import annotations

from pathlib import Path

import cv2
import gsvit_reference as reference
import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from surg_perception.data.labels import CHOLEC80_PHASES
from surg_perception.data.phantom import Phantom
from surg_perception.gsvit import CheckpointError, FrameGraph, GSViT, import_released, load_gsvit, save_model_folder
from surg_perception.gsvit.checkpoint import build_gsvit
from surg_perception.gsvit.model_folder import round_matrices_to_fp16
from surg_perception.gsvit.network import PhaseHead
from surg_perception.models import LabelFacts, ModelError, read_card
from surg_perception.runtime.export import export_onnx

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "models" / "gsvit_m0_phantom"


def phantom_frames(count: int) -> np.ndarray:
    """uint8 BGR [count, 224, 224, 3], spread over a procedure."""
    phantom = Phantom(427, 240, rate_hz=1.0, seed=11)
    picked = np.linspace(0, len(phantom) - 1, count).astype(int)
    return np.stack([cv2.resize(phantom.frame(int(i))[0], (224, 224)) for i in picked])


def real_frames(shared_data: Path, count: int) -> np.ndarray:
    """uint8 BGR [count, 224, 224, 3] of Cholec80."""
    files = sorted((shared_data / "cholec80" / "frames" / "video01").glob("*.jpg"))[:: 400 // count][:count]
    return np.stack([cv2.resize(cv2.imread(str(file)), (224, 224)) for file in files])


def strong_model(with_head: bool) -> GSViT:
    """M0 under whose random weights every layer matters, with real-looking probabilities."""
    original = reference.randomise(reference.ReferenceGSViT("m0", decoder=False), seed=5)
    model = build_gsvit(original.state_dict(), size="m0", predict_change=False, source="test")
    if with_head:
        torch.manual_seed(0)
        model.head = PhaseHead(192 * 16, (64, 32), 7).eval()
        model.head.temperature.fill_(0.7)
        model.config = type(model.config)("m0", decoder=False, classes=7, head_hidden=(64, 32))
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, GSViT]:
    """A folder stored as fp16 and the model that it was written from."""
    folder = tmp_path_factory.mktemp("models") / "strong"
    model = round_matrices_to_fp16(strong_model(with_head=True))
    save_model_folder(
        model,
        folder,
        name="strong",
        version="1",
        labels=LabelFacts("cholec80", CHOLEC80_PHASES),
        metrics={},
        training={},
        licence="Apache-2.0",
        intended_use="a test",
        weight_storage="fp16",
    )
    return folder, model


def run_graph(path: Path, frames: np.ndarray) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {"frame": frames}), strict=True))


def assert_graph_equals(path: Path, model: GSViT, frames: np.ndarray) -> None:
    found = run_graph(path, frames)
    with torch.no_grad():
        graph = FrameGraph(model)
        expected = dict(zip(graph.output_names, graph(torch.from_numpy(frames)), strict=True))
    assert list(found) == list(expected)
    scale = float(expected["latent"].abs().max())  # float32 itself is off by 6e-5 of it on such random weights
    np.testing.assert_allclose(found["latent"], expected["latent"], rtol=0, atol=2e-4 * scale)
    if "probabilities" in expected:
        np.testing.assert_allclose(found["probabilities"], expected["probabilities"], rtol=0, atol=2e-4)
        assert found["probabilities"].std() > 0.01


@pytest.mark.parametrize("count", [1, 3])
def test_the_graph_gives_pytorchs_numbers_on_phantom_frames(saved: tuple[Path, GSViT], count: int) -> None:
    folder, model = saved
    assert_graph_equals(folder / "model.onnx", model, phantom_frames(count))


@pytest.mark.parametrize("count", [1, 3])
def test_the_graph_gives_pytorchs_numbers_on_real_frames(
    saved: tuple[Path, GSViT], shared_data: Path, count: int
) -> None:
    folder, model = saved
    assert_graph_equals(folder / "model.onnx", model, real_frames(shared_data, count))


def test_the_weights_of_a_folder_are_those_of_the_model(saved: tuple[Path, GSViT]) -> None:
    folder, model = saved
    loaded = load_gsvit(folder)
    assert loaded.config == model.config
    rgb = torch.rand(2, 3, 100, 150)
    with torch.no_grad():
        torch.testing.assert_close(loaded.encode(rgb), model.encode(rgb), rtol=0, atol=0)
        torch.testing.assert_close(loaded.phase_probabilities(rgb), model.phase_probabilities(rgb), rtol=0, atol=0)


def test_the_graph_keeps_the_contract_and_holds_its_weights_as_fp16(saved: tuple[Path, GSViT]) -> None:
    folder, model = saved
    proto = onnx.load(folder / "model.onnx", load_external_data=False)
    (frame,) = proto.graph.input
    assert frame.name == "frame"
    assert frame.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    dims = frame.type.tensor_type.shape.dim
    assert dims[0].dim_param
    assert [dim.dim_value for dim in dims[1:]] == [224, 224, 3]
    assert not any(node.op_type == "BatchNormalization" for node in proto.graph.node)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert (folder / "model.onnx").stat().st_size < 2.5 * parameters
    assert b"site-packages" not in proto.SerializeToString()  # the exporter notes where it ran


def test_runtimes_fold_fp16_weights_away_at_load(saved: tuple[Path, GSViT], tmp_path: Path) -> None:
    """What runs has no Cast but the camera frame's, so fp16 storage costs no time per frame."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    onnxruntime.InferenceSession(str(saved[0] / "model.onnx"), options, providers=["CPUExecutionProvider"])
    operators = [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]
    assert operators.count("Cast") == 1


def test_a_released_checkpoint_becomes_a_folder_with_latents_only(tmp_path: Path) -> None:
    original = reference.randomise(reference.ReferenceGSViT("m0", decoder=False))
    torch.save(original.state_dict(), tmp_path / "GSViT.pkl")
    card = import_released(
        tmp_path / "GSViT.pkl", tmp_path / "released", name="gsvit_released", licence="CC-BY-4.0", size="m0"
    )
    assert card == read_card(tmp_path / "released")
    card.verify()
    assert card.labels.names == ()
    assert card.network.latent_shape == (192, 4, 4)
    frames = phantom_frames(2)
    found = run_graph(card.graph_path, frames)
    assert list(found) == ["latent"]
    with torch.no_grad():
        expected = original.evit(torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255)
    np.testing.assert_allclose(found["latent"], expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert load_gsvit(card.folder).head is None


def test_a_folder_that_does_not_match_its_card_is_refused(saved: tuple[Path, GSViT], tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in saved[0].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    card = (folder / "model.yaml").read_text()
    (folder / "model.yaml").write_text(card.replace("decoder: false", "decoder: true"))
    with pytest.raises(CheckpointError, match="its card says"):
        load_gsvit(folder)
    (folder / "model.yaml").write_text(card)
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match="sha256"):
        load_gsvit(folder)


def test_export_leaves_the_model_and_the_old_file_alone(tmp_path: Path) -> None:
    model = strong_model(with_head=False).train()
    model.encoder.eval()
    (tmp_path / "model.onnx").write_text("old")
    with pytest.raises(ValueError, match="'int4'; expected one of fp32, fp16"):
        export_onnx(model, tmp_path / "model.onnx", weight_storage="int4")
    assert (tmp_path / "model.onnx").read_text() == "old"
    FrameGraph(model)
    assert model.training
    assert not model.encoder.training


def test_the_shipped_model_is_the_one_of_its_card() -> None:
    card = read_card(SHIPPED)
    card.verify()
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) <= 12_000_000
    assert card.labels.names == CHOLEC80_PHASES
    assert "Not a medical device" in card.intended_use
    assert_graph_equals(card.graph_path, load_gsvit(SHIPPED), phantom_frames(3))


def test_the_shipped_model_knows_the_phantoms_phases() -> None:
    """A procedure that it was not trained on, single frames; far above the 1 in 7 of a guess."""
    phantom = Phantom(854, 480, rate_hz=0.5, seed=424242)
    frames = [phantom.frame(i) for i in range(len(phantom))]
    images = np.stack([cv2.resize(bgr, (224, 224)) for bgr, _ in frames])
    phases = np.array([labels.phase for _, labels in frames])
    probabilities = run_graph(read_card(SHIPPED).graph_path, images)["probabilities"]
    assert (probabilities.argmax(1) == phases).mean() > 0.8
