# SPDX-License-Identifier: Apache-2.0
"""TensorRT 8.6 to 11 and TensorRT-RTX behind one face: a graph becomes an engine, and an engine runs.

What a version has is asked of the library itself, never told from its number.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surg_perception.runtime.backend import BackendUnavailable, first_line
from surg_perception.runtime.cuda_device import CudaDevice, CudaError

FLAVOURS = ("tensorrt", "tensorrt_rtx")
WORKSPACE_MIB = 1024
RUN_TIMEOUT_S = 0.5
_FIRST_RUN_TIMEOUT_S = 120.0  # TensorRT-RTX compiles its kernels then
# What the library says of a file that no retry will load, and of a GPU that may do so later. The second outweighs the
# first: after a failed allocation it reports a failed deserialization too.
_UNFIT = re.compile(r"rebuild|compatible|version|magic|serialization assertion", re.IGNORECASE)
_NO_MEMORY = re.compile(r"out ?of ?memory|could not be allocated|MemoryAllocation", re.IGNORECASE)
_DEVICE = re.compile(r"cuda (runtime|driver|error)|cudaError", re.IGNORECASE)
_logger = logging.getLogger("surg_perception.runtime")

Progress = Callable[[float, str], None]
"""Told how much of a build is done, 0 to 1, and what it does."""


class EngineError(RuntimeError):
    """An engine could not be built or loaded; says what the library said."""


class UnfitEngine(EngineError):
    """A file that is no engine for this library and GPU, and never will be: of another version or GPU, or damaged."""


def lacks_memory(error: Exception) -> bool:
    """Whether an engine failed for want of memory on the GPU, which others may give back."""
    return bool(_NO_MEMORY.search(str(error)))


@dataclass(frozen=True)
class Library:
    """TensorRT or TensorRT-RTX as it is installed here."""

    flavour: str
    module: Any

    @property
    def version(self) -> str:
        """Such as "10.3.0"."""
        return str(self.module.__version__)

    @property
    def ahead_of_time(self) -> bool:
        """Whether engines are built for named compute capabilities, without a GPU."""
        return hasattr(self.module, "ComputeCapability")

    @property
    def targets(self) -> tuple[str, ...]:
        """Compute capabilities that can be named, as "sm86"; empty where engines are tuned on the GPU itself."""
        if not self.ahead_of_time:
            return ()
        names = (name for name in dir(self.module.ComputeCapability) if re.fullmatch(r"SM\d+", name))
        return tuple(sorted((name.lower() for name in names), key=lambda name: int(name[2:])))

    @property
    def strongly_typed(self) -> bool:
        """Whether an engine computes in the types that the graph has (since TensorRT 10)."""
        return hasattr(self.module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")


def find_library(flavour: str | None = None) -> Library:
    """The library of that name; unless told TensorRT, else TensorRT-RTX.

    Raises:
        BackendUnavailable: not installed, or does not load.
        ValueError: unknown name.
    """
    if flavour is not None and flavour not in FLAVOURS:
        raise ValueError(f"unknown flavour {flavour!r}; expected one of {', '.join(FLAVOURS)}")
    reasons = []
    for name in FLAVOURS if flavour is None else (flavour,):
        try:
            return Library(name, importlib.import_module(name))
        except ModuleNotFoundError as error:
            reasons.append(f"{name} is not installed" if error.name == name else f"{name}: {first_line(error)}")
        except Exception as error:  # a library of its own that is missing shows in many ways
            reasons.append(f"{name}: {first_line(error)}")
    raise BackendUnavailable("; ".join(reasons))


# Building -----------------------------------------------------------------------------------------------------------


def build_engine(library: Library, graph: bytes, targets: Sequence[str], progress: Progress) -> bytes:
    """Turn a graph (`engine_graph`) into an engine.

    Args:
        library: what builds.
        graph: an ONNX model with fixed shapes.
        targets: compute capabilities for TensorRT-RTX; empty for TensorRT, which tunes on the GPU that is there.
        progress: told how far it is; not by TensorRT 8.6, which does not say.

    Raises:
        EngineError: with what the library said.
        KeyboardInterrupt: after the library has stopped cleanly.
    """
    trt = library.module
    log = _log_of(library)
    log.errors.clear()
    builder = _made(trt.Builder(log), "a builder", log)
    flags = trt.NetworkDefinitionCreationFlag
    wanted = "STRONGLY_TYPED" if library.strongly_typed else "EXPLICIT_BATCH"
    network = _made(builder.create_network(1 << int(getattr(flags, wanted))), "a network", log)
    parser = trt.OnnxParser(network, log)
    if not parser.parse(graph):
        faults = "; ".join(str(parser.get_error(index)) for index in range(parser.num_errors))
        raise EngineError(f"{library.flavour} {library.version} cannot read the graph: {faults or log.text()}")
    config = builder.create_builder_config()
    if hasattr(trt.BuilderFlag, "TF32"):
        config.clear_flag(trt.BuilderFlag.TF32)  # fp32 means fp32
    if not library.strongly_typed:
        _obey_types(trt, network, config)
    if targets:
        config.num_compute_capabilities = len(targets)
        for index, target in enumerate(targets):
            config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), index)
    else:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, WORKSPACE_MIB << 20)
    monitor = None
    if hasattr(trt, "IProgressMonitor"):
        monitor = config.progress_monitor = _monitor_class(trt)(progress)
    engine = builder.build_serialized_network(network, config)
    if monitor is not None and monitor.interrupted:
        raise KeyboardInterrupt
    if engine is None:
        raise EngineError(f"{library.flavour} {library.version} built no engine: {log.text()}")
    progress(1.0, "built")
    return bytes(engine)


def _obey_types(trt: Any, network: Any, config: Any) -> None:
    """TensorRT before strong typing: allow fp16, and hold each layer to the type that the graph gives it."""
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    types = [[layer.get_output(number).dtype for number in range(layer.num_outputs)] for layer in layers]
    if not any(trt.DataType.HALF in found for found in types):
        return  # without the flag there is nothing but fp32
    config.set_flag(trt.BuilderFlag.FP16)
    config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
    for layer, found in zip(layers, types, strict=True):
        if found and all(dtype in (trt.DataType.FLOAT, trt.DataType.HALF) for dtype in found):
            layer.precision = found[0]
            for number, dtype in enumerate(found):
                layer.set_output_type(number, dtype)


def _monitor_class(trt: Any) -> type[Any]:
    class Monitor(trt.IProgressMonitor):
        """Phases nest: each step of a phase holds the phases that begin while it runs."""

        def __init__(self, progress: Progress) -> None:
            trt.IProgressMonitor.__init__(self)
            self.interrupted = False
            self._progress = progress
            self._open: dict[str, tuple[int, int]] = {}
            self._told = 0.0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._open[phase_name] = (0, max(num_steps, 1))
            self._tell(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self._open:
                self._open[phase_name] = (step + 1, self._open[phase_name][1])
            self._tell(phase_name)
            return not self.interrupted

        def phase_finish(self, phase_name: str) -> None:
            self._open.pop(phase_name, None)

        def _tell(self, phase: str) -> None:
            share, done = 1.0, 0.0
            for steps_done, steps in self._open.values():  # in the order in which they began: the outermost first
                done += share * min(steps_done, steps) / steps
                share /= steps
            self._told = max(self._told, min(done, 1.0))
            # An exception must not pass through the library: Ctrl-C stops the build instead.
            try:
                self._progress(self._told, phase)
            except KeyboardInterrupt:
                self.interrupted = True

    return Monitor


# Running ------------------------------------------------------------------------------------------------------------


class EngineRunner:
    """An engine on the GPU, for one frame at a time; nothing is allocated on the device after it is made.

    Copy in, engine and copy out are one CUDA graph where the engine can be captured, else three calls in one stream.
    After a failure every further call fails at once: CUDA errors last, and a caller must not wait for them again.

    Attributes:
        captured: whether it runs as a CUDA graph.
        why_not_captured: the reason if it does not.
    """

    def __init__(self, library: Library, engine: bytes, cuda: CudaDevice, jit: bytes | None = None) -> None:
        """Load an engine and run it once.

        Args:
            library, cuda: where.
            engine: what `build_engine` gave.
            jit: kernels that `kernels` gave at an earlier start (TensorRT-RTX).

        Raises:
            UnfitEngine: the engine is not one for this library and GPU.
            EngineError: the engine does not load now.
            CudaError: the GPU fails.
        """
        self._cuda = cuda
        self._lost: Exception | None = None
        self._undo: list[Callable[[], None]] = []
        self.captured = False
        self.why_not_captured = ""
        try:
            self._load(library, engine, jit)
            self._capture()
        except BaseException:
            self.close()
            raise

    def _load(self, library: Library, engine: bytes, jit: bytes | None) -> None:
        trt, log = library.module, _log_of(library)
        log.errors.clear()
        self._runtime = _made(trt.Runtime(log), "a runtime", log)
        self._engine = self._runtime.deserialize_cuda_engine(engine)
        if self._engine is None:
            said = log.text()
            passing = _NO_MEMORY.search(said) or _DEVICE.search(said)
            kind = UnfitEngine if _UNFIT.search(said) and not passing else EngineError
            raise kind(f"the engine does not load in {library.flavour} {library.version}: {said}")
        self._jit: Any = None
        if hasattr(self._engine, "create_runtime_config") and hasattr(trt, "IRuntimeCache"):
            config = self._engine.create_runtime_config()
            self._jit = config.create_runtime_cache()
            if jit is not None and not self._jit.deserialize(jit):
                _logger.info("kernels of an earlier start do not fit this GPU or driver; compiled anew")
            config.set_runtime_cache(self._jit)
            self._context = _made(self._engine.create_execution_context(config), "an execution context", log)
        else:
            self._context = _made(self._engine.create_execution_context(), "an execution context", log)
        self._stream = self._cuda.create_stream()
        self._undo.append(lambda: self._cuda.destroy_stream(self._stream))
        dtypes = {trt.DataType.UINT8: np.uint8, trt.DataType.FLOAT: np.float32}
        self._inputs: list[tuple[NDArray[Any], int]] = []
        self._outputs: dict[str, tuple[NDArray[Any], int]] = {}
        for index in range(self._engine.num_io_tensors):
            name = self._engine.get_tensor_name(index)
            dtype, shape = self._engine.get_tensor_dtype(name), tuple(self._engine.get_tensor_shape(name))
            if dtype not in dtypes or min(shape) < 1:
                raise UnfitEngine(f"tensor {name!r} of the engine is {dtype} {list(shape)}, expected uint8 or float32")
            host = self._pinned(shape, dtypes[dtype])
            address = self._device_memory(host.nbytes)
            if not self._context.set_tensor_address(name, address):
                raise EngineError(f"the engine does not take memory for {name!r}: {log.text()}")
            if self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT:
                self._inputs.append((host, address))
            else:
                self._outputs[name] = (host, address)
        if [host.shape for host, _ in self._inputs] != [(1, 224, 224, 3)]:
            raise UnfitEngine(
                f"the engine's inputs are {[h.shape for h, _ in self._inputs]}, expected (1, 224, 224, 3)"
            )
        self._log = log

    def _pinned(self, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        array = self._cuda.host_array(shape, dtype)
        self._undo.append(lambda: self._cuda.free_host(array))
        return array

    def _device_memory(self, size: int) -> int:
        address = self._cuda.malloc(size)
        self._undo.append(lambda: self._cuda.free(address))
        return address

    def _capture(self) -> None:
        self._inputs[0][0][:] = 0
        self._enqueue()
        self._cuda.synchronize(self._stream, _FIRST_RUN_TIMEOUT_S)
        if hasattr(self._context, "is_stream_capturable") and not self._context.is_stream_capturable(self._stream):
            self.why_not_captured = "the library says that this engine cannot be captured"
            return
        try:
            self._cuda.begin_capture(self._stream)
            try:
                self._enqueue()
            finally:
                self._captured_graph = self._cuda.end_capture(self._stream)
        except (CudaError, EngineError) as error:
            self.why_not_captured = str(error)
            # It must still run without; where the device is to blame, this fails.
            self._enqueue()
            self._cuda.synchronize(self._stream, _FIRST_RUN_TIMEOUT_S)
            return
        self._undo.append(lambda: self._cuda.destroy_capture(self._captured_graph))
        self.captured = True
        self._cuda.launch(self._captured_graph, self._stream)
        self._cuda.synchronize(self._stream, _FIRST_RUN_TIMEOUT_S)

    def _enqueue(self) -> None:
        for host, address in self._inputs:
            self._cuda.copy_in(address, host, self._stream)
        if not self._context.execute_async_v3(self._stream):
            raise EngineError(f"the engine did not start: {self._log.text()}")
        for host, address in self._outputs.values():
            self._cuda.copy_out(host, address, self._stream)

    def run(self, frame: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        """Outputs by name, in arrays of the caller's own, of a frame uint8 [1, 224, 224, 3].

        Raises:
            CudaError, EngineError: the GPU failed, now or earlier.
        """
        if self._lost is not None:
            raise self._lost
        try:
            np.copyto(self._inputs[0][0], frame)
            if self.captured:
                self._cuda.launch(self._captured_graph, self._stream)
            else:
                self._enqueue()
            self._cuda.synchronize(self._stream, RUN_TIMEOUT_S)
        except (CudaError, EngineError) as error:
            self._lost = error
            raise
        return {name: host.copy() for name, (host, _) in self._outputs.items()}

    def kernels(self) -> bytes | None:
        """Kernels compiled for this GPU so far (TensorRT-RTX), for the next start."""
        return None if self._jit is None else bytes(self._jit.serialize())

    def close(self) -> None:
        """Give everything back, as far as a lost GPU lets it; calling it again does nothing."""
        self._lost = self._lost or EngineError("closed")
        self._context = None
        # Memory that a stream may still write to goes after the stream's last work; a lost GPU writes no more.
        while self._undo:
            with contextlib.suppress(CudaError):
                self._undo.pop()()
        self._inputs, self._outputs = [], {}
        self._jit = self._engine = self._runtime = None


def _made(thing: Any, what: str, log: Any) -> Any:
    if thing is None:
        raise EngineError(f"the library gave no {what.removeprefix('a ').removeprefix('an ')}: {log.text()}")
    return thing


@lru_cache(maxsize=2)
def _log_class(trt: Any) -> type[Any]:
    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                self.errors.append(msg.strip())
                _logger.debug("%s", msg)
            elif severity == trt.ILogger.Severity.WARNING:
                _logger.debug("%s", msg)

        def text(self) -> str:
            """What went wrong, in one line."""
            return "; ".join(dict.fromkeys(self.errors)) or "it gave no reason"

    return Log


@lru_cache(maxsize=2)
def _log_of(library: Library) -> Any:
    """The one logger of a process: the library keeps the first that it is given."""
    return _log_class(library.module)()
