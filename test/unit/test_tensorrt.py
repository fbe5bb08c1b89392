# SPDX-License-Identifier: Apache-2.0
"""TensorRT over a fake CUDA and a fake library: building, running, every CUDA call failing, the choice of precision."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx_graphs import SmallNetwork, graph_of, write_folder

from surg_perception.models import ModelCard, ModelError
from surg_perception.runtime import BackendUnavailable, InferenceError, PrecisionRefused, open_backend, tensorrt_layer
from surg_perception.runtime.agreement import reference_frames
from surg_perception.runtime.cuda_device import CudaDevice
from surg_perception.runtime.engine_build import EngineBuilder, Reference, Workbench, engine_key
from surg_perception.runtime.engine_cache import EngineCache
from surg_perception.runtime.engine_graph import engine_graph, rounding_shown
from surg_perception.runtime.onnxruntime_backend import outputs_of
from surg_perception.runtime.tensorrt_layer import (
    EngineError,
    EngineRunner,
    Library,
    UnfitEngine,
    build_engine,
    find_library,
)

FAKES = Path(__file__).parent / "fake_nvidia"
PATIENCE_S = 300.0


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The fake CUDA, with the fake TensorRT beside it, here and in processes that are started; an empty cache."""
    for name in [name for name in sys.modules if name.split(".")[0] in ("cuda", "tensorrt")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(FAKES))
    paths = [str(FAKES), str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fake = importlib.import_module("cuda.bindings.runtime").state
    fake.reset()
    yield fake
    for name in [name for name in sys.modules if name.split(".")[0] in ("cuda", "tensorrt")]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def network() -> SmallNetwork:
    return SmallNetwork.random()


@pytest.fixture(scope="module")
def card(network: SmallNetwork, tmp_path_factory: pytest.TempPathFactory) -> ModelCard:
    return write_folder(tmp_path_factory.mktemp("models") / "small", graph_of(network))


def bench(card: ModelCard, **changes: Any) -> Workbench:
    cuda = changes.pop("cuda", None) or CudaDevice()
    facts = {"targets": (), "reference": Reference.of(card, reference_frames(), 1), **changes}
    return Workbench(card, find_library("tensorrt"), EngineCache(), cuda, **facts)


def built(card: ModelCard, precision: str = "fp32") -> None:
    assert not bench(card).build(precision, strict=True)[-1].refused


def runner(card: ModelCard) -> EngineRunner:
    library = find_library("tensorrt")
    engine = build_engine(library, engine_graph(card.graph_path, "fp32"), (), lambda done, phase: None)
    return EngineRunner(library, engine, CudaDevice())


# The graph ----------------------------------------------------------------------------------------------------------


def types_of(graph: bytes) -> dict[str, set[int]]:
    """Types of the outputs of each kind of operator."""
    inferred = onnx.shape_inference.infer_shapes(onnx.load_from_string(graph), strict_mode=True).graph
    types = {tensor.name: tensor.type.tensor_type.elem_type for tensor in (*inferred.value_info, *inferred.output)}
    found: dict[str, set[int]] = {}
    for node in inferred.node:
        found.setdefault(node.op_type, set()).update(types[name] for name in node.output)
    return found


@pytest.mark.parametrize("precision", ["fp32", "fp16", "fp16-mixed"])
def test_the_graph_computes_the_model_in_its_precision(precision: str, card: ModelCard, network: SmallNetwork) -> None:
    graph = engine_graph(card.graph_path, precision)
    assert graph == engine_graph(card.graph_path, precision), "the same bytes each time"
    model = onnx.load_from_string(graph).graph
    assert [node.op_type for node in model.node if "frame" in node.input] == ["Cast"], "TensorRT only casts uint8"
    assert model.input[0].type.tensor_type.shape.dim[0].dim_value == 1
    assert {output.type.tensor_type.elem_type for output in model.output} == {TensorProto.FLOAT}
    types = types_of(graph)
    assert types["Conv"] == {TensorProto.FLOAT if precision == "fp32" else TensorProto.FLOAT16}
    assert types["Softmax"] == {TensorProto.FLOAT}
    p, z = outputs_of(rounding_shown(graph), reference_frames(), 1)
    expected_p, expected_z = network(reference_frames())
    bound = 5e-5 if precision == "fp32" else 0.02
    np.testing.assert_allclose(p, expected_p, atol=bound)
    np.testing.assert_allclose(z, expected_z, atol=bound)
    assert precision == "fp32" or np.abs(p - expected_p).max() > 1e-5, "fp16 leaves its traces"


def test_rounding_is_that_of_fp16() -> None:
    values = np.random.default_rng(0).normal(scale=100.0, size=4096).astype(np.float32)
    values[:4] = 70000, -70000, 65504, 0
    shape = [1, 4096]
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["x"], ["half"], to=TensorProto.FLOAT16),
            helper.make_node("Cast", ["half"], ["y"], to=TensorProto.FLOAT),
        ],
        "round",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(rounding_shown(model.SerializeToString()), options)
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(session.run(None, {"x": values[np.newaxis]})[0][0], expected)


def squaring(network: SmallNetwork, folder: Path) -> ModelCard:
    """A model that squares numbers of several hundred and takes the root: fp16 ends at 65504."""
    model = graph_of(network)
    graph = model.graph
    latent = next(node for node in graph.node if "latent" in node.output)
    latent.output[0] = "sound"
    for name, value in (("two", 2.0), ("many", 600.0)):
        graph.initializer.append(onnx.numpy_helper.from_array(np.float32(value), name))
    index = list(graph.node).index(latent) + 1
    for node in (
        helper.make_node("Mul", ["sound", "many"], ["large"]),
        helper.make_node("Pow", ["large", "two"], ["squared"]),
        helper.make_node("Sqrt", ["squared"], ["root"]),
        helper.make_node("Div", ["root", "many"], ["latent"]),
    ):
        graph.node.insert(index, node)
        index += 1
    onnx.checker.check_model(model)
    return write_folder(folder, model)


def test_norms_in_fp32_save_what_overflows_in_fp16(state: Any, network: SmallNetwork, tmp_path: Path) -> None:
    card = squaring(network, tmp_path / "squaring")
    assert types_of(engine_graph(card.graph_path, "fp16-mixed"))["Pow"] == {TensorProto.FLOAT}
    said: list[str] = []
    attempts = bench(card, say=said.append).build("fp16")
    assert attempts[0].precision == "fp16"
    assert "not finite" in attempts[0].refused
    assert attempts[0].entry is None
    assert attempts[1].precision == "fp16-mixed"
    assert not attempts[1].refused
    assert attempts[1].engine.holds
    assert len(attempts) == 2
    assert said[0].startswith("fp16 is refused")
    only = bench(card).build("fp16", strict=True)
    assert [attempt.precision for attempt in only] == ["fp16"]


def test_a_file_that_is_no_graph_is_refused(tmp_path: Path, card: ModelCard) -> None:
    (tmp_path / "model.onnx").write_bytes(b"\xff" * 99)
    with pytest.raises(ModelError, match=r"model\.onnx is no ONNX graph"):
        engine_graph(tmp_path / "model.onnx", "fp32")
    with pytest.raises(ValueError, match="precision is 'int8'"):
        engine_graph(card.graph_path, "int8")


# Building -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["8.6.1", "10.3.0", "11.1.0"])
def test_each_version_is_asked_for_what_it_has(state: Any, card: ModelCard, version: str) -> None:
    trt = importlib.import_module("tensorrt").made(version)
    library = Library("tensorrt", trt)
    told: list[float] = []
    engine = build_engine(library, engine_graph(card.graph_path, "fp16"), (), lambda done, phase: told.append(done))
    network, config = trt.last_build
    assert "TF32" not in config.flags, "fp32 means fp32"
    assert config.pools == {trt.MemoryPoolType.WORKSPACE: tensorrt_layer.WORKSPACE_MIB << 20}
    if version == "8.6.1":
        assert network.flags == 1 << trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH
        assert config.flags == {"FP16", "OBEY_PRECISION_CONSTRAINTS"}
        layers = {layer.kind: layer.precision for layer in map(network.get_layer, range(network.num_layers))}
        assert (layers["Conv"], layers["Softmax"]) == (trt.DataType.HALF, trt.DataType.FLOAT)
        build_engine(library, engine_graph(card.graph_path, "fp32"), (), lambda done, phase: None)
        assert trt.last_build[1].flags == set()
    else:
        assert network.flags == 1 << trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
        assert config.flags == set()
        assert told == sorted(told)
        assert 0 < told[2] < 1
    assert told[-1] == 1.0
    other = Library("tensorrt", importlib.import_module("tensorrt").made("9.9.9"))
    with pytest.raises(EngineError, match=r"does not load in tensorrt 9\.9\.9: the engine was built by another"):
        EngineRunner(other, engine, CudaDevice())
    assert state.nothing_held()


def test_what_the_library_says_is_passed_on(state: Any, card: ModelCard, monkeypatch: pytest.MonkeyPatch) -> None:
    library = find_library("tensorrt")
    swapped = onnx.load(card.graph_path)
    swapped.graph.node.insert(0, helper.make_node("Transpose", ["frame"], ["unused"], perm=[0, 3, 1, 2]))
    with pytest.raises(EngineError, match=r"cannot read the graph: Transpose: first input has type UInt8"):
        build_engine(library, swapped.SerializeToString(), (), lambda done, phase: None)
    monkeypatch.setenv("FAKE_TENSORRT_FAILS", "1")
    with pytest.raises(EngineError, match="built no engine: out of workspace"):
        build_engine(library, engine_graph(card.graph_path, "fp32"), (), lambda done, phase: None)


def test_an_interrupt_stops_the_build_and_goes_on_afterwards(state: Any, card: ModelCard) -> None:
    def interrupted(done: float, phase: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engine(find_library("tensorrt"), engine_graph(card.graph_path, "fp32"), (), interrupted)


def test_the_key_says_what_cannot_be_built(state: Any, card: ModelCard) -> None:
    library, gpu = find_library("tensorrt"), CudaDevice().gpu
    key = engine_key(card, library, "fp16", gpu)
    assert (key.gpu, key.targets, key.version, key.precision) == ("Fake GPU", ("sm87",), "10.3.0", "fp16")
    with pytest.raises(BackendUnavailable, match="takes no targets"):
        engine_key(card, library, "fp16", gpu, ("sm86",))
    with pytest.raises(BackendUnavailable, match="build on the target"):
        engine_key(card, library, "fp16", None)
    with pytest.raises(ValueError, match="unknown flavour"):
        find_library("tensorrt_lite")


def test_an_engine_that_disagrees_on_the_gpu_is_refused_and_leaves_the_cache(
    state: Any, card: ModelCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_TENSORRT_WRONG", "1")
    attempts = bench(card).build("fp16")
    assert [attempt.precision for attempt in attempts] == ["fp16", "fp16-mixed", "fp32"]
    for attempt in attempts[:2]:
        assert attempt.graph.holds, "the graph is sound, the engine is not"
        assert not attempt.engine.holds
        assert "disagrees with onnxruntime:CPU:fp32 on 16 frames" in attempt.refused
        assert attempt.entry is None
    assert attempts[2].engine.holds
    assert len(list(EngineCache().folder.glob("*.engine"))) == 1
    again = bench(card).build("fp32")
    assert again[-1].cached
    assert again[-1].graph == attempts[2].graph
    assert state.nothing_held()


# Running ------------------------------------------------------------------------------------------------------------


def test_frames_run_as_one_cuda_graph_without_allocating(state: Any, card: ModelCard, network: SmallNetwork) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, 224, 224, 3), np.uint8)
    running = runner(card)
    assert running.captured
    state.calls.clear()
    kept = [running.run(frame[np.newaxis]) for frame in frames]
    assert set(state.calls) == {"cudaGraphLaunch", "cudaStreamQuery"}
    assert state.calls.count("cudaGraphLaunch") == 3
    expected_p, expected_z = network(frames)
    np.testing.assert_allclose(np.concatenate([row["probabilities"] for row in kept]), expected_p, atol=5e-5)
    np.testing.assert_allclose(np.concatenate([row["latent"] for row in kept]), expected_z, atol=5e-5)
    running.close()
    running.close()
    assert state.nothing_held()
    with pytest.raises(EngineError, match="closed"):
        running.run(frames[:1])


@pytest.mark.parametrize("call", ["cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiate"])
def test_an_engine_that_cannot_be_captured_runs_call_by_call(state: Any, card: ModelCard, call: str) -> None:
    state.fail(call, "cudaErrorStreamCaptureUnsupported")
    running = runner(card)
    assert not running.captured
    assert call.removesuffix("WithFlags") in running.why_not_captured
    frames = reference_frames()
    first, second = running.run(frames[:1]), running.run(frames[5:6])
    assert np.abs(first["latent"] - second["latent"]).max() > 0
    running.close()
    assert state.nothing_held()


@pytest.mark.parametrize(
    ("call", "code"),
    [
        ("cudaGetDeviceCount", "cudaErrorNoDevice"),
        ("cudaGetDeviceProperties", "cudaErrorIllegalAddress"),
        ("cudaStreamCreateWithFlags", "cudaErrorMemoryAllocation"),
        ("cudaHostAlloc", "cudaErrorMemoryAllocation"),
        ("cudaMalloc", "cudaErrorMemoryAllocation"),
        ("create_execution_context", "cudaErrorMemoryAllocation"),
        ("copy_in", "cudaErrorIllegalAddress"),
        ("execute_async_v3", "cudaErrorLaunchFailure"),
        ("copy_out", "cudaErrorIllegalAddress"),
        ("cudaStreamQuery", "cudaErrorLaunchFailure"),
        ("cudaStreamBeginCapture", "cudaErrorIllegalAddress"),
        ("cudaGraphLaunch", "cudaErrorLaunchFailure"),
    ],
)
def test_a_call_that_fails_at_start_leaves_the_cpu_to_run_and_nothing_behind(
    state: Any, card: ModelCard, call: str, code: str
) -> None:
    built(card)
    # Both questions for the device come first when the engine is asked whether it can run, then when it is made.
    state.fail(call, code, after=1 if call.startswith("cudaGetDevice") else 0)
    with open_backend(card, "tensorrt", threads=1, exclude=["torch"]) as opened:
        assert opened.device == "CPU"
        assert any(note.startswith("tensorrt:CUDA") for note in opened.notes), opened.notes
        opened.infer(reference_frames()[0])
    assert state.nothing_held()


@pytest.mark.parametrize(
    "call", ["deserialize_cuda_engine", "create_execution_context", "cudaMalloc", "cudaHostAlloc", "cudaGraphLaunch"]
)
def test_an_engine_that_the_gpu_has_no_memory_for_is_kept(state: Any, card: ModelCard, call: str) -> None:
    built(card)
    (path,) = EngineCache().folder.glob("*.engine")
    content = path.read_bytes()
    state.fail(call, "cudaErrorMemoryAllocation")
    with pytest.raises(BackendUnavailable, match=r"no memory for the engine, 2048 of 8192 MiB are in use \(.*is kept"):
        open_backend(card, "tensorrt", allow_fallback=False, threads=1, builder=EngineBuilder(niceness=0))
    assert path.read_bytes() == content
    assert state.nothing_held()
    with open_backend(card, "tensorrt", allow_fallback=False, threads=1) as opened:
        assert opened.name == "tensorrt:CUDA:fp32", "once there is memory again"


def test_an_engine_that_a_lost_gpu_does_not_load_is_kept(state: Any, card: ModelCard) -> None:
    built(card)
    state.fail("cudaStreamQuery", "cudaErrorLaunchFailure")
    with pytest.raises(BackendUnavailable, match=r"cudaErrorLaunchFailure; the engine is kept \(.*\.engine\)"):
        open_backend(card, "tensorrt", allow_fallback=False, threads=1)
    assert list(EngineCache().folder.glob("*.engine"))


@pytest.mark.parametrize(
    ("said", "unfit"),
    [
        ("The engine plan file is not compatible with this version of TensorRT, expecting library version 8.6.1", True),
        ("The engine plan file is generated on an incompatible device, expecting compute 8.6 got compute 7.5", True),
        ("Error Code 1: Serialization (Serialization assertion stdVersionRead == kVERSION failed.)", True),
        ("Error Code 1: Cuda Runtime (out of memory); Error Code 4: (Engine deserialization failed, rebuild)", False),
        ("Requested amount of GPU memory (1074790400 bytes) could not be allocated; version tag", False),
        ("cudaError 35: CUDA driver version is insufficient for CUDA runtime version", False),
        ("it gave no reason", False),
    ],
)
def test_only_what_no_retry_loads_is_unfit(
    state: Any, card: ModelCard, monkeypatch: pytest.MonkeyPatch, said: str, unfit: bool
) -> None:
    library = find_library("tensorrt")
    monkeypatch.setattr(library.module.Runtime, "deserialize_cuda_engine", lambda self, engine: self._log.log(1, said))
    with pytest.raises(EngineError) as failed:
        EngineRunner(library, b"engine", CudaDevice())
    assert isinstance(failed.value, UnfitEngine) == unfit
    assert said in str(failed.value)


@pytest.mark.parametrize("captured", [True, False])
@pytest.mark.parametrize("code", ["cudaErrorIllegalAddress", "cudaErrorLaunchFailure", "cudaErrorMemoryAllocation"])
def test_a_gpu_that_is_lost_fails_at_once_and_for_good(state: Any, card: ModelCard, captured: bool, code: str) -> None:
    built(card)
    frame = reference_frames()[0]
    calls = ["cudaGraphLaunch"] if captured else ["copy_in", "execute_async_v3", "copy_out"]
    for call in (*calls, "cudaStreamQuery"):
        state.reset()
        if not captured:
            state.fail("cudaStreamBeginCapture", "cudaErrorStreamCaptureUnsupported")
        opened = open_backend(card, "tensorrt", allow_fallback=False, threads=1, standby=True)
        state.fail(call, code)
        with pytest.raises(InferenceError) as failed:
            opened.infer(frame)
        assert failed.value.device_failed
        assert failed.value.backend == "tensorrt:CUDA:fp32"
        assert "the engine did not start" in str(failed.value) if call.startswith("exec") else code in str(failed.value)
        state.calls.clear()
        with pytest.raises(InferenceError):
            opened.infer(frame)
        assert state.calls == [], "a lost GPU is not asked again"
        standby = opened.take_standby()
        assert standby.name == "onnxruntime:CPU:fp32"
        opened.close()
        assert state.nothing_held()
        standby.infer(frame)
        standby.close()


def test_a_gpu_that_hangs_is_given_up(state: Any, card: ModelCard) -> None:
    built(card)
    with open_backend(card, "tensorrt", allow_fallback=False, threads=1) as opened:
        state.hangs = True
        started_s = time.monotonic()
        with pytest.raises(InferenceError, match=r"has not answered for 0\.5 s"):
            opened.infer(reference_frames()[0])
        assert time.monotonic() - started_s < 20 * tensorrt_layer.RUN_TIMEOUT_S
        state.calls.clear()
        with pytest.raises(InferenceError, match="has not answered"):
            opened.infer(reference_frames()[0])
        assert state.calls == []


# The choice ---------------------------------------------------------------------------------------------------------


def test_an_engine_that_is_not_built_is_named_and_the_cpu_runs(state: Any, card: ModelCard) -> None:
    with open_backend(card, "tensorrt", "fp16", threads=1) as opened:
        assert opened.device == "CPU"
        assert opened.unbuilt == ["tensorrt:CUDA:fp16", "tensorrt:CUDA:fp16-mixed", "tensorrt:CUDA:fp32"]
        assert any("surg-perception build-engine" in note for note in opened.notes)
    with pytest.raises(BackendUnavailable, match="no engine of this model has been built yet; build it with"):
        open_backend(card, "tensorrt", "fp16", allow_fallback=False)
    with pytest.raises(BackendUnavailable, match="computes in fp32, fp16 and fp16-mixed, not bf16"):
        open_backend(card, "tensorrt", "bf16", allow_fallback=False)
    built(card, "fp16")
    with open_backend(card, "auto", "fp16", threads=1) as opened:
        assert opened.name == "tensorrt:CUDA:fp16"
        assert opened.unbuilt == []
        assert any("tensorrt 10.3.0 on Fake GPU, as a CUDA graph" in note for note in opened.notes)
        assert opened.standby is None
        batch_p, batch_z = opened.infer_batch(reference_frames()[:3].copy())
        assert (len(batch_p), len(batch_z)) == (3, 3)
    state.devices = 0
    with open_backend(card, "tensorrt", threads=1) as opened:
        assert any("finds no CUDA device" in note for note in opened.notes)
        assert opened.unbuilt == []


def test_fp16_does_not_import_what_cannot_have_it(state: Any, card: ModelCard) -> None:
    with open_backend(card, "onnxruntime", "fp16") as opened:
        assert opened.name == "onnxruntime:CPU:fp32"
        assert "onnxruntime:CPU: does not compute in fp16" in opened.notes


def test_a_builder_is_a_process_of_its_own(state: Any, card: ModelCard, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    builder = EngineBuilder(said.append, niceness=0)
    with open_backend(card, "tensorrt", "fp16", allow_fallback=False, threads=1, builder=builder) as opened:
        assert opened.name == "tensorrt:CUDA:fp16"
    assert builder.progress == ""
    assert said[-1].endswith("for tensorrt in fp16 is ready")
    # An engine that this version does not load, whole as its file is, is built again.
    entry, _ = EngineCache().find(engine_key(card, find_library("tensorrt"), "fp16", CudaDevice().gpu))
    cache = EngineCache()
    cache._store(engine_key(card, find_library("tensorrt"), "fp16", CudaDevice().gpu), b"stranger", {})
    said.clear()
    with open_backend(card, "tensorrt", "fp16", allow_fallback=False, threads=1, builder=builder) as opened:
        assert opened.name == "tensorrt:CUDA:fp16"
    assert len(said) >= 2
    assert entry is not None

    monkeypatch.setenv("FAKE_TENSORRT_WRONG", "1")
    with pytest.raises(PrecisionRefused, match="disagrees with onnxruntime:CPU:fp32"):
        builder.build(card, "fp16-mixed", "tensorrt")
    monkeypatch.delenv("FAKE_TENSORRT_WRONG")
    monkeypatch.setenv("FAKE_TENSORRT_DIES", "1")
    with pytest.raises(BackendUnavailable, match=r"could not be built \(signal 11\)"):
        builder.build(card, "fp32", "tensorrt")


def test_a_build_can_be_cancelled(state: Any, card: ModelCard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_TENSORRT_HOLD", str(tmp_path / "never"))
    builder = EngineBuilder(lambda text: None, niceness=0)
    outcome: list[BaseException] = []

    def work() -> None:
        try:
            builder.build(card, "fp32", "tensorrt")
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    end_s = time.monotonic() + PATIENCE_S
    while "Timing tactics" not in builder.progress:
        assert time.monotonic() < end_s
        assert thread.is_alive()
        time.sleep(0.05)
    builder.cancel()
    thread.join(PATIENCE_S)
    assert [str(error) for error in outcome] == ["the build was cancelled"]
    with pytest.raises(BackendUnavailable, match="cancelled"):
        builder.build(card, "fp32", "tensorrt")


# The command --------------------------------------------------------------------------------------------------------


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "surg_perception.cli.main", "build-engine", *words],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env={**os.environ, "COLUMNS": "200"},
    )


def test_the_command_builds_compares_and_copies(state: Any, card: ModelCard, tmp_path: Path) -> None:
    done = command(str(card.folder), "--precision", "fp16", "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    for text in ("graph, on the CPU", "engine, on this GPU", "100%", "fp16 passed", "compared with onnxruntime:CPU"):
        assert text in done.stdout, text
    copied = sorted(path.suffix for path in (tmp_path / "out").iterdir())
    assert copied == [".engine", ".json"]
    again = command(str(card.folder), "--json")
    lines = [json.loads(line) for line in again.stdout.splitlines()]
    assert lines[-1]["attempts"][0]["cached"] is True
    assert lines[-1]["attempts"][0]["engine_agreement"]["phase_changes"] == 0


def test_the_command_refuses_and_says_why(state: Any, card: ModelCard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_TENSORRT_WRONG", "1")
    done = command(str(card.folder), "--precision", "fp16", "--strict")
    assert done.returncode == 1, done.stderr
    assert "no precision passed" in done.stdout
    failed = command(str(card.folder), "--targets", "sm86")
    assert failed.returncode == 2
    assert "takes no targets" in failed.stderr
    assert "Traceback" not in failed.stderr
