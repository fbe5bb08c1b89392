# SPDX-License-Identifier: Apache-2.0
"""A TensorRT without a GPU, for tests: an engine is the graph, and runs in ONNX Runtime over the fake CUDA's memory.

`made(version)` gives the library as that version has it. Environment: FAKE_TENSORRT_VERSION; FAKE_TENSORRT_HOLD, a file
that a build waits for; FAKE_TENSORRT_WRONG, with which engines that compute in fp16 swap phases; FAKE_TENSORRT_FAILS;
FAKE_TENSORRT_DIES, which ends the process in the middle of a build.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from enum import IntEnum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

_MAGIC = b"fake engine of "


class DataType(IntEnum):
    FLOAT = 0
    HALF = 1
    INT32 = 3
    INT64 = 8
    UINT8 = 5


class TensorIOMode(IntEnum):
    NONE = 0
    INPUT = 1
    OUTPUT = 2


class MemoryPoolType(IntEnum):
    WORKSPACE = 0


_ONNX_TYPES = {1: DataType.FLOAT, 10: DataType.HALF, 2: DataType.UINT8, 6: DataType.INT32, 7: DataType.INT64}


def made(version: str) -> ModuleType:
    """The library in a version: 8.6.1, 10.3.0 or 11.1.0."""
    major = int(version.split(".")[0])
    trt = ModuleType("tensorrt")
    trt.__version__ = version
    trt.DataType, trt.TensorIOMode, trt.MemoryPoolType = DataType, TensorIOMode, MemoryPoolType
    flags = {"TF32": 1} | ({"FP16": 2, "OBEY_PRECISION_CONSTRAINTS": 4} if major < 11 else {})
    trt.BuilderFlag = IntEnum("BuilderFlag", flags)
    network_flags = {"EXPLICIT_BATCH": 0} if major < 11 else {}
    network_flags |= {"STRONGLY_TYPED": 1} if major >= 10 else {}
    trt.NetworkDefinitionCreationFlag = IntEnum("NetworkDefinitionCreationFlag", network_flags)

    class ILogger:
        Severity = IntEnum("Severity", {"INTERNAL_ERROR": 0, "ERROR": 1, "WARNING": 2, "INFO": 3, "VERBOSE": 4})

        def __init__(self) -> None:
            pass

    class Config:
        def __init__(self) -> None:
            self.flags = {"TF32"}
            self.progress_monitor: Any = None
            self.pools: dict[Any, int] = {}

        def set_flag(self, flag: Any) -> None:
            self.flags.add(flag.name)

        def clear_flag(self, flag: Any) -> None:
            self.flags.discard(flag.name)

        def set_memory_pool_limit(self, pool: Any, size: int) -> None:
            self.pools[pool] = size

    class Builder:
        def __init__(self, log: Any) -> None:
            self._log = log

        def create_network(self, flags: int) -> Any:
            known = sum(1 << int(flag) for flag in trt.NetworkDefinitionCreationFlag)
            assert flags & ~known == 0, f"unknown network flags {flags}"
            return Network(flags)

        def create_builder_config(self) -> Config:
            return Config()

        def build_serialized_network(self, network: Network, config: Config) -> bytes | None:
            trt.last_build = (network, config)
            if os.environ.get("FAKE_TENSORRT_FAILS"):
                self._log.log(ILogger.Severity.ERROR, "out of workspace")
                return None
            monitor = config.progress_monitor
            if monitor is not None:
                monitor.phase_start("Building engine", None, 2)
                monitor.phase_start("Timing tactics", "Building engine", 4)
            for step in range(4):
                if monitor is not None and not monitor.step_complete("Timing tactics", step):
                    return None
            hold = os.environ.get("FAKE_TENSORRT_HOLD")
            while hold and not Path(hold).exists():
                time.sleep(0.02)
            if os.environ.get("FAKE_TENSORRT_DIES"):
                os.kill(os.getpid(), signal.SIGSEGV)
            if monitor is not None:
                monitor.phase_finish("Timing tactics")
                monitor.step_complete("Building engine", 1)
                monitor.phase_finish("Building engine")
            return _MAGIC + version.encode() + b"\n" + network.graph

    class Network:
        def __init__(self, flags: int) -> None:
            self.flags, self.graph = flags, b""
            self._layers: list[Any] = []

        @property
        def num_layers(self) -> int:
            return len(self._layers)

        def get_layer(self, index: int) -> Any:
            return self._layers[index]

        def fill(self, model: Any) -> None:
            import onnx

            self.graph = model.SerializeToString()
            typed = onnx.shape_inference.infer_shapes(model).graph
            types = {t.name: t.type.tensor_type.elem_type for t in (*typed.value_info, *typed.output)}
            for node in typed.node:
                outputs = [SimpleNamespace(dtype=_ONNX_TYPES[types[name]]) for name in node.output]
                self._layers.append(Layer(node.op_type, outputs))

    class Layer:
        def __init__(self, kind: str, outputs: list[Any]) -> None:
            self.kind, self._outputs = kind, outputs
            self.num_outputs = len(outputs)
            self.precision: Any = None

        def get_output(self, index: int) -> Any:
            return self._outputs[index]

        def set_output_type(self, index: int, dtype: Any) -> None:
            self._outputs[index].dtype = dtype

    class OnnxParser:
        def __init__(self, network: Network, log: Any) -> None:
            self._network, self._faults = network, []

        def parse(self, graph: bytes) -> bool:
            import onnx

            try:
                model = onnx.load_from_string(graph)
                onnx.checker.check_model(model)
            except Exception as error:
                self._faults.append(str(error))
                return False
            for node in model.graph.node:
                if node.input[0] == "frame" and node.op_type != "Cast":
                    self._faults.append(f"{node.op_type}: first input has type UInt8")
                    return False
            self._network.fill(model)
            return True

        @property
        def num_errors(self) -> int:
            return len(self._faults)

        def get_error(self, index: int) -> str:
            return self._faults[index]

    class Runtime:
        def __init__(self, log: Any) -> None:
            self._log = log

        def deserialize_cuda_engine(self, engine: bytes) -> Any:
            from cuda.bindings.runtime import state

            head = _MAGIC + version.encode() + b"\n"
            if state.outcome("deserialize_cuda_engine"):  # as TensorRT says it, one after the other
                self._log.log(ILogger.Severity.ERROR, "Error Code 1: Cuda Runtime (out of memory)")
                self._log.log(ILogger.Severity.ERROR, "Error Code 4: Internal Error (Engine deserialization failed.)")
                return None
            if not engine.startswith(head):
                self._log.log(ILogger.Severity.ERROR, "the engine was built by another version")
                return None
            return Engine(engine[len(head) :], self._log)

    class Engine:
        def __init__(self, graph: bytes, log: Any) -> None:
            import onnxruntime

            self._log = log

            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads, options.log_severity_level = 1, 3
            self.session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
            self._tensors = [*self.session.get_inputs(), *self.session.get_outputs()]
            self.wrong = bool(os.environ.get("FAKE_TENSORRT_WRONG")) and _is_half(graph)
            self.num_io_tensors = len(self._tensors)

        def get_tensor_name(self, index: int) -> str:
            return self._tensors[index].name

        def _tensor(self, name: str) -> Any:
            return next(tensor for tensor in self._tensors if tensor.name == name)

        def get_tensor_shape(self, name: str) -> Any:
            return self._tensor(name).shape

        def get_tensor_dtype(self, name: str) -> DataType:
            return {"tensor(uint8)": DataType.UINT8, "tensor(float)": DataType.FLOAT}[self._tensor(name).type]

        def get_tensor_mode(self, name: str) -> TensorIOMode:
            inputs = [tensor.name for tensor in self.session.get_inputs()]
            return TensorIOMode.INPUT if name in inputs else TensorIOMode.OUTPUT

        def create_execution_context(self) -> Any:
            from cuda.bindings.runtime import state

            # The library's own device memory.
            if state.outcome("create_execution_context"):
                self._log.log(ILogger.Severity.ERROR, "Error Code 2: OutOfMemory (Requested size was 8388608 bytes.)")
                return None
            return Context(self)

    class Context:
        def __init__(self, engine: Engine) -> None:
            self._engine, self._addresses = engine, {}

        def set_tensor_address(self, name: str, address: int) -> bool:
            self._addresses[name] = int(address)
            return True

        def execute_async_v3(self, stream: int) -> bool:
            from cuda.bindings.runtime import state

            if state.outcome("execute_async_v3"):
                return False
            engine, addresses = self._engine, dict(self._addresses)

            def run() -> None:
                def array(tensor: Any, dtype: Any) -> Any:
                    size = int(np.prod(tensor.shape)) * np.dtype(dtype).itemsize
                    buffer = (ctypes.c_uint8 * size).from_address(addresses[tensor.name])
                    return np.frombuffer(buffer, dtype).reshape(tensor.shape)

                (source,) = engine.session.get_inputs()
                outputs = engine.session.get_outputs()
                values = engine.session.run(None, {source.name: array(source, np.uint8).copy()})
                for tensor, value in zip(outputs, values, strict=True):
                    if engine.wrong and tensor.name == "probabilities":
                        value = np.roll(value, 1, axis=1)
                    array(tensor, np.float32)[:] = value

            state.streams[int(stream)].put(run)
            return True

    if major >= 10:

        class IProgressMonitor:
            def __init__(self) -> None:
                pass

        trt.IProgressMonitor = IProgressMonitor
    for thing in (ILogger, Builder, OnnxParser, Runtime):
        setattr(trt, thing.__name__, thing)
    return trt


def _is_half(graph: bytes) -> bool:
    import onnx

    nodes = onnx.load_from_string(graph).graph.node
    return any(node.op_type == "Cast" and node.attribute[0].i == onnx.TensorProto.FLOAT16 for node in nodes)


_own = made(os.environ.get("FAKE_TENSORRT_VERSION", "10.3.0"))
for _name, _value in vars(_own).items():
    if not _name.startswith("__") or _name == "__version__":
        globals()[_name] = _value
