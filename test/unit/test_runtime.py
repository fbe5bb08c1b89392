# SPDX-License-Identifier: Apache-2.0
"""Backends: the same numbers from each, the choice among them, precision checks, faults."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto
from onnx_graphs import CHANNELS, CLASSES, SmallNetwork, graph_of, write_folder

from surg_perception.data.labels import CHOLEC80_PHASES
from surg_perception.models import ModelCard, ModelError, ModelFile, find_model
from surg_perception.runtime import (
    Backend,
    BackendUnavailable,
    InferenceError,
    PrecisionRefused,
    available_backends,
    backend,
    default_threads,
    open_backend,
)
from surg_perception.runtime.agreement import (
    MAX_PROBABILITY_DIFFERENCE,
    Agreement,
    compare,
    reference_frames,
    unsound,
)
from surg_perception.runtime.openvino_backend import OpenVinoBackend
from surg_perception.runtime.user_cache import cache_folder

ENGINES = ("openvino", "onnxruntime")
needs_bf16 = pytest.mark.skipif(
    OpenVinoBackend.refusal("CPU", "bf16") is not None, reason="this CPU has no bf16 arithmetic for OpenVINO"
)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Warnings of the runtime."""
    lines: list[str] = []
    monkeypatch.setattr(backend._logger, "warning", lambda text, *values: lines.append(text % values))
    return lines


@pytest.fixture(scope="module")
def network() -> SmallNetwork:
    return SmallNetwork.random()


@pytest.fixture(scope="module")
def card(network: SmallNetwork, tmp_path_factory: pytest.TempPathFactory) -> ModelCard:
    return write_folder(tmp_path_factory.mktemp("models") / "small", graph_of(network))


@pytest.fixture(scope="module")
def frames() -> NDArray[np.uint8]:
    return np.random.default_rng(1).integers(0, 256, (40, 224, 224, 3), np.uint8)


# Numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_gives_the_numbers_of_the_definition(
    engine: str, card: ModelCard, network: SmallNetwork, frames: NDArray[np.uint8]
) -> None:
    coloured = frames // np.array([1, 2, 4], np.uint8)
    expected_p, expected_latent = network(coloured)
    swapped_p, _ = network(coloured[..., ::-1])
    assert np.abs(swapped_p - expected_p).max() > 0.05
    with open_backend(card, engine, allow_fallback=False) as opened:
        assert opened.name == f"{engine}:CPU:fp32"
        probabilities, latent = opened.infer_batch(coloured)
        np.testing.assert_allclose(probabilities, expected_p, atol=5e-5)
        np.testing.assert_allclose(latent, expected_latent, atol=5e-5)
        for index in (0, 39):
            p, z = opened.infer(coloured[index])
            assert (p.dtype, p.shape, z.dtype, z.shape) == (np.float32, (CLASSES,), np.float32, (CHANNELS, 4, 4))
            np.testing.assert_allclose(p, expected_p[index], atol=5e-5)
            np.testing.assert_allclose(z, expected_latent[index], atol=5e-5)
        none_p, none_latent = opened.infer_batch(coloured[:0])
        assert (none_p.shape, none_latent.shape) == ((0, CLASSES), (0, CHANNELS, 4, 4))


@pytest.mark.parametrize("engine", ENGINES)
def test_results_are_the_callers_own_and_the_frame_stays_untouched(
    engine: str, card: ModelCard, frames: NDArray[np.uint8]
) -> None:
    with open_backend(card, engine) as opened:
        frame = frames[0].copy()
        p, z = opened.infer(frame)
        kept_p, kept_z = p.copy(), z.copy()
        opened.infer(frames[1])
        batch_p, _ = opened.infer_batch(frames[:2])
        kept_batch = batch_p.copy()
        opened.infer_batch(frames[2:4])
        assert (p == kept_p).all()
        assert (z == kept_z).all()
        assert (batch_p == kept_batch).all()
        assert (frame == frames[0]).all()
        p[:], z[:] = 7, 7
        np.testing.assert_array_equal(opened.infer(frame)[0], kept_p)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_view_with_strides_gives_what_its_copy_gives(engine: str, card: ModelCard, frames: NDArray[np.uint8]) -> None:
    mirrored = frames[0][:, ::-1]
    with open_backend(card, engine) as opened:
        np.testing.assert_array_equal(opened.infer(mirrored)[1], opened.infer(mirrored.copy())[1])
        np.testing.assert_array_equal(opened.infer_batch(frames[:6:2])[1], opened.infer_batch(frames[:6:2].copy())[1])


@pytest.mark.parametrize("engine", ENGINES)
def test_a_model_without_a_head_gives_latents_only(
    engine: str, network: SmallNetwork, frames: NDArray[np.uint8], tmp_path: Path
) -> None:
    card = write_folder(tmp_path / "m", graph_of(network, head=False), head=False)
    with open_backend(card, engine, allow_fallback=False) as opened:
        p, z = opened.infer(frames[0])
        assert p.shape == (0,)
        np.testing.assert_allclose(z, network(frames[:1])[1][0], atol=5e-5)
        assert opened.infer_batch(frames[:3])[0].shape == (3, 0)


def test_a_path_to_a_bare_graph_opens(network: SmallNetwork, frames: NDArray[np.uint8], tmp_path: Path) -> None:
    onnx.save(graph_of(network), tmp_path / "bare.onnx")
    with open_backend(tmp_path / "bare.onnx") as opened:
        np.testing.assert_allclose(opened.infer(frames[0])[0], network(frames[:1])[0][0], atol=5e-5)


def test_fp32_is_fp32_even_where_the_engine_prefers_bf16(network: SmallNetwork, tmp_path: Path) -> None:
    """The classifier's weights vanish in bf16 beside 300; in fp32 they lose four digits."""
    card = write_folder(tmp_path / "m", graph_of(network, cancelling=300.0))
    expected, _ = network(reference_frames())
    for engine in ENGINES:
        with open_backend(card, engine, allow_fallback=False) as opened:
            assert np.abs(opened.infer_batch(reference_frames())[0] - expected).max() < 0.02
            single = np.stack([opened.infer(frame)[0] for frame in reference_frames()])
            assert np.abs(single - expected).max() < 0.02


# The real network ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gsvit(tmp_path_factory: pytest.TempPathFactory) -> ModelCard:
    """The shipped model, or a GSViT-M0 with random weights and every branch at work."""
    try:
        return find_model("gsvit_m0_phantom")
    except ModelError:
        pass
    import torch

    from surg_perception.data.labels import CHOLEC80_PHASES
    from surg_perception.gsvit import GSViT, GSViTConfig, save_model_folder
    from surg_perception.models import LabelFacts

    torch.manual_seed(0)
    model = GSViT(GSViTConfig(size="m0", decoder=False, classes=7, head_hidden=(64,)))
    for module in model.modules():  # timm starts the ends of residual branches at 0
        if isinstance(module, torch.nn.BatchNorm2d) and not module.weight.any():
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    return save_model_folder(
        model.eval(),
        tmp_path_factory.mktemp("gsvit") / "m0",
        name="gsvit_m0_random",
        version="1",
        labels=LabelFacts("cholec80", CHOLEC80_PHASES),
        metrics={},
        training={},
        licence="Apache-2.0",
        intended_use="Tests.",
    )


def assert_engines_agree(gsvit: ModelCard, frames: NDArray[np.uint8]) -> None:
    with open_backend(gsvit, "torch", allow_fallback=False, threads=1) as opened:
        assert opened.name == "torch:CPU:fp32"
        reference = opened.infer_batch(frames)
        swapped = compare(opened.infer_batch(frames[..., ::-1]), reference)
        assert swapped.latent_cosine < 0.99, "these frames cannot tell BGR from RGB"
    for engine in ("torch", *ENGINES):
        with open_backend(gsvit, engine, allow_fallback=False, threads=1) as opened:
            single = [opened.infer(frame) for frame in frames]
            stacked = np.stack([p for p, _ in single]), np.stack([z for _, z in single])
            for outputs in (stacked, opened.infer_batch(frames)):
                agreement = compare(outputs, reference)
                assert agreement.latent_cosine > 0.9999, engine
                assert agreement.probability_difference < 2e-3, engine
                assert agreement.phase_changes == 0, engine


def test_engines_agree_on_a_gsvit_on_the_phantom(gsvit: ModelCard) -> None:
    pytest.importorskip("torch")
    assert_engines_agree(gsvit, reference_frames()[::4].copy())


def test_engines_agree_on_a_gsvit_on_real_frames(gsvit: ModelCard, shared_data: Path) -> None:
    pytest.importorskip("torch")
    files = sorted((shared_data / "cholec80" / "frames").glob("video0*/*.jpg"))[::600]
    frames = np.stack([cv2.resize(cv2.imread(str(file)), (224, 224), interpolation=cv2.INTER_LINEAR) for file in files])
    assert len(frames) >= 5
    print(f"ran on {len(frames)} real frames of {shared_data / 'cholec80'}")
    assert_engines_agree(gsvit, frames)


@needs_bf16
def test_a_gsvit_runs_in_bf16(gsvit: ModelCard) -> None:
    with open_backend(gsvit, "openvino", "bf16", allow_fallback=False) as opened:
        assert opened.name == "openvino:CPU:bf16"


def test_openvino_cuts_no_tensors_into_unequal_parts(gsvit: ModelCard) -> None:
    from surg_perception.runtime import openvino_backend

    model = openvino_backend._read(gsvit.graph_path)
    before = [op.get_type_name() for op in model.get_ordered_ops()]
    assert "VariadicSplit" in before
    model.reshape({"frame": [1, 224, 224, 3]})
    openvino_backend._split_convolutions(model)
    after = [op.get_type_name() for op in model.get_ordered_ops()]
    assert "VariadicSplit" not in after
    attention_heads = 4 * (1 + 2 + 3)
    assert after.count("Convolution") == before.count("Convolution") + 2 * attention_heads


def test_the_running_pipeline_needs_no_torch(gsvit: ModelCard) -> None:
    code = (
        "import sys, json, numpy as np\n"
        "sys.modules['torch'] = None\n"
        "from surg_perception.runtime import available_backends, open_backend\n"
        f"opened = open_backend({str(gsvit.folder)!r})\n"
        "p, z = opened.infer(np.zeros((224, 224, 3), np.uint8))\n"
        "try:\n"
        f"    open_backend({str(gsvit.folder)!r}, 'torch', allow_fallback=False)\n"
        "except Exception as error:\n"
        "    print(json.dumps([opened.name, len(p), available_backends()['torch'], str(error)]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    name, classes, reason, error = json.loads(done.stdout.splitlines()[-1])
    assert name in ("openvino:CPU:fp32", "onnxruntime:CUDA:fp32")
    assert classes == len(gsvit.labels.names)
    assert "not installed" in reason
    assert "torch:CPU: not installed" in error


def test_torch_says_that_a_bare_graph_has_no_weights(card: ModelCard) -> None:
    pytest.importorskip("torch")
    with pytest.raises(BackendUnavailable, match=r"torch:CPU: the model 'small' in .* has no weights"):
        open_backend(card, "torch", allow_fallback=False)


# Input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frame", "error", "text"),
    [
        (None, TypeError, "NoneType"),
        ([[[0, 0, 0]]], TypeError, "list"),
        (np.zeros((224, 224, 3), np.float32), TypeError, "float32"),
        (np.zeros((224, 224, 3), np.int8), TypeError, "int8"),
        (np.zeros((480, 854, 3), np.uint8), ValueError, r"\[480, 854, 3\]"),
        (np.zeros((3, 224, 224), np.uint8), ValueError, r"\[3, 224, 224\]"),
        (np.zeros((224, 224), np.uint8), ValueError, r"\[224, 224\]"),
        (np.zeros((1, 224, 224, 3), np.uint8), ValueError, r"\[1, 224, 224, 3\]"),
        (np.zeros((0, 224, 3), np.uint8), ValueError, r"\[0, 224, 3\]"),
    ],
)
def test_what_is_no_frame_is_refused(card: ModelCard, frame: Any, error: type[Exception], text: str) -> None:
    with open_backend(card, "onnxruntime") as opened:
        with pytest.raises(error, match=text):
            opened.infer(frame)
        if not (isinstance(frame, np.ndarray) and frame.shape == (1, 224, 224, 3)):
            with pytest.raises(error, match=r"expected .*uint8 \[N, 224, 224, 3\], BGR"):
                opened.infer_batch(frame)
        opened.infer(np.zeros((224, 224, 3), np.uint8))


# Models that cannot be loaded ---------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("graph", "text"),
    [
        ({"input_name": "image"}, "inputs are image, expected frame"),
        ({"input_type": TensorProto.FLOAT}, r"'frame' is float32 \[\?, 224, 224, 3\], expected uint8"),
        ({"input_shape": (1, 224, 224, 3)}, r"\[1, 224, 224, 3\].* with only the first size free"),
        ({"input_shape": ("N", 224, 224, "C")}, r"\[\?, 224, 224, \?\]"),
        ({"latent_name": "features"}, "outputs are features, probabilities, expected latent"),
    ],
)
def test_a_graph_that_breaks_the_contract_is_refused(
    engine: str, graph: dict[str, Any], text: str, network: SmallNetwork, tmp_path: Path
) -> None:
    card = write_folder(tmp_path / "m", graph_of(network, **graph))
    with pytest.raises(ModelError, match=text) as refused:
        open_backend(card, engine)
    assert str(card.graph_path) in str(refused.value)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_card_that_belongs_to_another_graph_is_refused(engine: str, network: SmallNetwork, tmp_path: Path) -> None:
    card = write_folder(tmp_path / "m", graph_of(network), classes=7)
    with pytest.raises(ModelError, match="number of phases is 5, but the card says 7"):
        open_backend(card, engine)
    card = write_folder(tmp_path / "n", graph_of(network))
    card = replace(card, network=replace(card.network, latent_shape=(192, 4, 4)))
    with pytest.raises(ModelError, match=r"latent shape is \[8, 4, 4\], but the card says \[192, 4, 4\]"):
        open_backend(card, engine)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("damage", ["absent", "garbage", "half", "empty"])
def test_a_missing_or_damaged_graph_is_refused(engine: str, damage: str, network: SmallNetwork, tmp_path: Path) -> None:
    card = write_folder(tmp_path / "m", graph_of(network))
    content = card.graph_path.read_bytes()
    if damage == "absent":
        card.graph_path.unlink()
    else:
        card.graph_path.write_bytes(
            {"garbage": b"\xff" * 999, "half": content[: len(content) // 2], "empty": b""}[damage]
        )
    with pytest.raises(ModelError, match=r"model\.onnx"):
        open_backend(card, engine)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("graph", "text"),
    [({"poison": "latent"}, "NaN or infinity"), ({"softmax": False}, "probabilities sum to")],
)
def test_a_model_with_unsound_outputs_runs_on_no_engine(
    engine: str, graph: dict[str, Any], text: str, network: SmallNetwork, tmp_path: Path
) -> None:
    card = write_folder(tmp_path / "m", graph_of(network, **graph))
    with pytest.raises(BackendUnavailable, match=text) as refused:
        open_backend(card, engine)
    for name in ("openvino:CPU", "onnxruntime:CPU", "torch:CPU", "tensorrt:CUDA"):
        assert name in str(refused.value)


def test_a_folder_without_a_graph_says_how_to_make_one(card: ModelCard) -> None:
    bare = replace(card, graph=None, weights=ModelFile("model.safetensors", "0" * 64))
    with pytest.raises(BackendUnavailable, match="surg-perception export"):
        open_backend(bare, "onnxruntime", allow_fallback=False)


# The choice among engines -------------------------------------------------------------------------------------


class FakeBackend(Backend):
    """ONNX Runtime behind a mask that can fail or perturb; counts how many are open."""

    kind: ClassVar[str] = "fake"
    devices: ClassVar[tuple[str, ...]] = ("CUDA", "CPU")
    open_now: ClassVar[int] = 0
    fault: ClassVar[str] = ""

    def __init__(self, card: ModelCard, device: str, precision: str, threads: int) -> None:
        super().__init__(card, device, precision, threads)
        if self.fault == "load":
            raise MemoryError("no memory left\nstack trace")
        self._inner: Backend = backend.BACKENDS["onnxruntime"]()(card, "CPU", "fp32", threads)
        self._calls = 0
        type(self).open_now += 1

    @classmethod
    def refusal(cls, device: str, precision: str) -> str | None:
        return "the fake is asleep" if cls.fault == "refusal" else None

    def _run(self, frames: NDArray[np.uint8]) -> tuple[NDArray[np.float32] | None, NDArray[np.float32]]:
        self._calls += 1
        if self.fault == "infer" or (self.fault == "later" and self._calls > 100):
            raise RuntimeError("device lost\nstack trace")
        p, z = self._inner._run(frames)
        assert p is not None
        native = (self.device, self.precision) == ("CPU", "fp32")
        short = (self.device, self.precision) == ("CUDA", "bf16")
        if self.fault == "wobble" or (self.fault == "phases" and not native) or (self.fault == "short" and short):
            p = np.roll(p, self._calls, axis=1)
        if self.fault == "latent" and not native:
            z = z + 0.1 * np.abs(z).max() * np.sign(np.sin(np.arange(z.size, dtype=np.float32))).reshape(z.shape)
        if self.fault == "nan" or (self.fault == "nan later" and self._calls > 100):
            z = np.full_like(z, np.nan)
        return p, z.astype(np.float32)

    def _free(self) -> None:
        type(self).open_now -= 1
        self._inner.close()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeBackend]]:
    """A fake engine, best of all on CUDA and third best on the CPU."""
    engine = type("FakeBackend", (FakeBackend,), {"open_now": 0, "fault": ""})
    monkeypatch.setitem(backend.BACKENDS, "fake", lambda: engine)
    order = (("fake", "CUDA"), ("onnxruntime", "CPU"), ("fake", "CPU"))
    monkeypatch.setattr(backend, "AUTO_ORDER", order)
    yield engine
    assert engine.open_now == 0


def test_auto_takes_the_first_that_runs(card: ModelCard, fake: type[FakeBackend]) -> None:
    with open_backend(card) as opened:
        assert opened.name == "fake:CUDA:fp32"
        assert fake.open_now == 1, "the fp32 reference on the CPU was not closed"
        assert any("agrees with fake:CPU:fp32 on 16 sample frames" in note for note in opened.notes)
    with open_backend(card, "fake", device="cpu") as opened:
        assert opened.name == "fake:CPU:fp32"
    with open_backend(card, exclude=["fake:CUDA"]) as opened:
        assert opened.name == "onnxruntime:CPU:fp32"
        assert "fake:CUDA:fp32: excluded" in opened.notes
    with open_backend(card, exclude=["onnxruntime:CPU:fp32", "fake:CUDA"]) as opened:
        assert opened.name == "fake:CPU:fp32"


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("refusal", "the fake is asleep"),
        ("load", "could not load small: MemoryError: no memory left"),
        ("infer", "RuntimeError: device lost"),
        ("nan", "the outputs hold NaN or infinity"),
        ("phases", "disagrees with fake:CPU:fp32 on 16 sample frames"),
        ("latent", "disagrees with fake:CPU:fp32 on 16 sample frames"),
    ],
)
def test_an_engine_that_does_not_truly_run_is_passed_over_or_refused(
    card: ModelCard, fake: type[FakeBackend], log: list[str], fault: str, reason: str
) -> None:
    fake.fault = fault
    with open_backend(card) as opened:
        assert opened.name == "onnxruntime:CPU:fp32"
        assert any(note.startswith("fake:CUDA") and reason in note for note in opened.notes)
        assert "stack trace" not in "".join(opened.notes)
    assert not log
    with open_backend(card, "fake", device="CUDA") as opened:
        assert opened.name == "onnxruntime:CPU:fp32"
        assert any("fake:CUDA:fp32 was asked for, onnxruntime:CPU:fp32 runs instead" in n for n in opened.notes)
    assert any(reason in line for line in log)
    with pytest.raises(BackendUnavailable, match="does not run as fake:CUDA:fp32") as refused:
        open_backend(card, "fake", device="CUDA", allow_fallback=False)
    assert reason in str(refused.value)


def test_an_engine_that_contradicts_itself_is_refused(card: ModelCard, fake: type[FakeBackend]) -> None:
    fake.fault = "wobble"
    with pytest.raises(BackendUnavailable, match="disagrees with itself"):
        open_backend(card, "fake", device="CPU", allow_fallback=False)


def test_a_precision_that_disagrees_is_refused_loudly(card: ModelCard, fake: type[FakeBackend], log: list[str]) -> None:
    fake.fault = "phases"
    with open_backend(card, "fake", "bf16", device="CPU") as opened:
        assert opened.name == "fake:CPU:fp32"
        assert any(note.startswith("fake:CPU:bf16: disagrees with fake:CPU:fp32") for note in opened.notes)
    assert any("fake:CPU:bf16 refused: disagrees" in line for line in log)
    with pytest.raises(BackendUnavailable, match="fake:CPU:bf16: disagrees"):
        open_backend(card, "fake", "bf16", device="CPU", allow_fallback=False)


def test_auto_keeps_the_engine_and_drops_a_precision_that_disagrees(
    card: ModelCard, fake: type[FakeBackend], log: list[str]
) -> None:
    fake.fault = "short"
    with open_backend(card, "auto", "bf16") as opened:
        assert opened.name == "fake:CUDA:fp32"
    assert any("fake:CUDA:bf16 refused: disagrees" in line for line in log)
    with open_backend(card, "auto", "bf16", allow_fallback=False) as opened:
        assert opened.name == "fake:CPU:bf16"


@needs_bf16
def test_bf16_is_refused_where_its_arithmetic_truly_fails(
    network: SmallNetwork, log: list[str], tmp_path: Path
) -> None:
    card = write_folder(tmp_path / "m", graph_of(network, cancelling=300.0))
    with open_backend(card, "openvino", "bf16") as opened:
        assert opened.name == "openvino:CPU:fp32"
        assert np.abs(opened.infer(reference_frames()[0])[0] - network(reference_frames()[:1])[0]).max() < 0.02
    assert any("openvino:CPU:bf16 refused" in line for line in log)
    with pytest.raises(BackendUnavailable, match="openvino:CPU:bf16: disagrees with openvino:CPU:fp32"):
        open_backend(card, "openvino", "bf16", allow_fallback=False)


@needs_bf16
def test_bf16_runs_where_it_agrees(card: ModelCard, log: list[str]) -> None:
    with (
        open_backend(card, "auto", "bf16", device="CPU") as opened,
        open_backend(card, "openvino", "fp32") as fp32,
    ):
        assert opened.name == "openvino:CPU:bf16"
        difference = np.abs(opened.infer(reference_frames()[0])[1] - fp32.infer(reference_frames()[0])[1]).max()
        assert 0 < difference < 0.05
    assert not log


def test_onnxruntime_does_not_pretend_to_bf16(card: ModelCard, log: list[str]) -> None:
    with pytest.raises(BackendUnavailable, match="onnxruntime:CPU: computes in fp32 only, not bf16"):
        open_backend(card, "onnxruntime", "bf16", allow_fallback=False)
    with open_backend(card, "onnxruntime", "bf16") as opened:
        assert opened.name == "onnxruntime:CPU:fp32"
    assert any("runs instead" in line for line in log)


@pytest.mark.parametrize("kind", [*ENGINES, "torch"])
def test_only_tensorrt_takes_fp16(kind: str) -> None:
    if kind == "torch":
        pytest.importorskip("torch")
    assert "not fp16" in str(backend.BACKENDS[kind]().refusal("CPU", "fp16"))


def test_tensorrt_has_its_place_and_does_not_pretend(card: ModelCard, monkeypatch: pytest.MonkeyPatch) -> None:
    for library in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, library, None)
    reason = "tensorrt is not installed; tensorrt_rtx is not installed"
    assert available_backends()["tensorrt"] == reason
    with pytest.raises(BackendUnavailable, match=f"tensorrt:CUDA: {reason}"):
        open_backend(card, "tensorrt", allow_fallback=False)
    with open_backend(card, "tensorrt") as opened:
        assert opened.kind in ("openvino", "onnxruntime")


def test_available_backends_names_every_engine(fake: type[FakeBackend]) -> None:
    fake.fault = "refusal"
    found = available_backends()
    assert list(found) == ["tensorrt", "openvino", "onnxruntime", "torch", "triton", "fake"]
    assert found["openvino"] is None
    assert found["onnxruntime"] is None
    assert found["fake"] == "the fake is asleep; the fake is asleep"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"backend": "tflite"}, "unknown backend 'tflite'"),
        ({"precision": "int8"}, "unknown precision 'int8'"),
        ({"device": "TPU"}, "unknown device 'TPU'"),
        ({"threads": 0}, "threads is 0"),
    ],
)
def test_an_argument_that_does_not_exist_is_refused(card: ModelCard, arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        open_backend(card, **arguments)


# A running engine ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fault", "text"), [("later", "RuntimeError: device lost"), ("nan later", "NaN or infinity")])
def test_a_fault_while_running_names_the_backend(
    card: ModelCard, fake: type[FakeBackend], frames: NDArray[np.uint8], fault: str, text: str
) -> None:
    fake.fault = fault
    with open_backend(card, "fake", device="CPU") as opened:
        opened._calls = 200
        with pytest.raises(InferenceError, match=text) as failed:
            opened.infer(frames[0])
    assert failed.value.backend == "fake:CPU:fp32"
    assert str(failed.value).startswith("fake:CPU:fp32: ")
    assert "stack trace" not in str(failed.value)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_closed_backend_says_so(engine: str, card: ModelCard, frames: NDArray[np.uint8]) -> None:
    opened = open_backend(card, engine)
    opened.infer_batch(frames[:2])
    opened.close()
    opened.close()
    with pytest.raises(InferenceError, match="is closed"):
        opened.infer(frames[0])


@pytest.mark.parametrize("engine", ENGINES)
def test_a_worker_thread_gets_the_same_numbers(engine: str, card: ModelCard, frames: NDArray[np.uint8]) -> None:
    with open_backend(card, engine) as opened:
        here = opened.infer(frames[0])
        there: list[Any] = []
        worker = threading.Thread(target=lambda: there.extend(opened.infer(frames[0])))
        worker.start()
        worker.join()
        np.testing.assert_array_equal(here[0], there[0])
        np.testing.assert_array_equal(here[1], there[1])


def test_the_number_of_threads_reaches_the_engine(card: ModelCard) -> None:
    with open_backend(card, "openvino", threads=1) as opened:
        assert opened._requests[0].get_compiled_model().get_property("INFERENCE_NUM_THREADS") == 1
    with open_backend(card, "onnxruntime", threads=1) as opened:
        assert opened._session.get_session_options().intra_op_num_threads == 1
    with open_backend(card, "onnxruntime") as opened:
        assert opened.threads == default_threads()


def test_default_threads_are_bounded_by_the_cores_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 <= default_threads() <= backend.MAX_DEFAULT_THREADS
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    assert default_threads() == 1
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(5000, 5064)))
    assert default_threads() == backend.MAX_DEFAULT_THREADS


# Checks and cache ---------------------------------------------------------------------------------------------


def test_reference_frames_are_lively_and_fixed() -> None:
    frames = reference_frames()
    assert (frames.shape, frames.dtype) == ((16, 224, 224, 3), np.uint8)
    assert frames.std(axis=(1, 2, 3)).min() > 10
    assert np.abs(frames[0].astype(int) - frames[-1]).mean() > 5
    assert reference_frames() is frames
    with pytest.raises(ValueError, match="read-only"):
        frames[0] = 0


def test_agreement_sees_each_kind_of_difference() -> None:
    p = np.array([[0.512, 0.488], [0.508, 0.492], [0.9, 0.1]], np.float32)
    z = np.ones((3, 8, 4, 4), np.float32)
    assert compare((p, z), (p, z)) == Agreement(0.0, 0, 1.0)
    assert compare((p, 2 * z), (p, z)).latent_cosine == pytest.approx(1.0)

    undecided = p.copy()
    undecided[1] = undecided[1, ::-1]
    slight = compare((undecided, z), (p, z))
    assert slight.holds
    assert slight.same_phase == pytest.approx(2 / 3)
    assert slight.mean_difference == pytest.approx(2 * 0.016 / 6, abs=1e-6)
    decided = p.copy()
    decided[0] = decided[0, ::-1]
    changed = compare((decided, z), (p, z))
    assert (changed.phase_changes, changed.holds) == (1, False)
    assert changed.probability_difference < MAX_PROBABILITY_DIFFERENCE

    shifted = p.copy()
    shifted[2] = 0.8, 0.2
    assert not compare((shifted, z), (p, z)).holds
    turned = z.copy()
    turned[1, 0] = 0.5
    assert not compare((p, turned), (p, z)).holds
    assert not compare((p, np.full_like(z, np.nan)), (p, z)).holds
    assert not compare((np.full_like(p, np.nan), z), (p, z)).holds
    assert compare((p, 0 * z), (p, 0 * z)).holds
    assert not compare((p, 0 * z), (p, z)).holds


def test_unsound_outputs_are_named() -> None:
    p, z = np.array([[0.5, 0.5]], np.float32), np.zeros((1, 8, 4, 4), np.float32)
    assert list(unsound((p, z))) == []
    assert list(unsound((p[:, :0], z))) == []
    assert "sum to 2" in next(unsound((4 * p / 2, z)))
    assert "at least -1" in next(unsound((np.array([[2.0, -1.0]], np.float32), z)))
    z[0, 0, 0, 0] = np.inf
    assert "1 of 128" in next(unsound((p, z)))
    assert "the same for 2 different frames" in next(unsound((np.tile(p, (2, 1)), np.ones((2, 8, 4, 4), np.float32))))


def test_the_cache_is_the_users_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = cache_folder("openvino", "kernels")
    assert folder == tmp_path / "surg_perception" / "openvino"
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o770)
    assert cache_folder("openvino", "kernels") is None
    folder.rmdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    folder.symlink_to(tmp_path / "elsewhere")
    assert cache_folder("openvino", "kernels") is None
    folder.unlink()
    folder.write_text("a file")
    assert cache_folder("openvino", "kernels") is None
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder("openvino", "kernels") == tmp_path / "home" / ".cache" / "surg_perception" / "openvino"


def test_precision_refused_is_a_kind_of_unavailable() -> None:
    assert issubclass(PrecisionRefused, BackendUnavailable)


def test_the_pipeline_runs_without_pytorch() -> None:
    script = (
        "import sys\n"
        "sys.modules['torch'] = None\n"  # importing it fails, as where it is not installed
        "import numpy as np\n"
        "from surg_perception.data.phantom import Phantom\n"
        "from surg_perception.runtime.backend import open_backend\n"
        "from surg_perception.stream.phase_pipeline import PhasePipeline\n"
        "backend = open_backend('gsvit_m0_phantom')\n"
        "pipeline = PhasePipeline(backend, backend.card.labels.names)\n"
        "frame = Phantom(width=320, height=240, rate_hz=1.0, duration_s=60.0).frame(20)[0]\n"
        "print(pipeline.process_frame(frame, 0).phase)\n"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() in CHOLEC80_PHASES
