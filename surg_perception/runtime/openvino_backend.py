# SPDX-License-Identifier: Apache-2.0
"""OpenVINO: Intel and Arm CPUs, Intel GPUs; fp32, and bf16 where the device has it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import openvino
from numpy.typing import NDArray
from openvino import opset13
from openvino.passes import ConstantFolding, Manager

from surg_perception.models import ModelCard, ModelError
from surg_perception.runtime.backend import Backend, BackendUnavailable
from surg_perception.runtime.graph import FRAME_SHAPE, GraphFacts, RunGraph, Shape, check_contract
from surg_perception.runtime.user_cache import cache_folder

_TYPES = {"fp32": openvino.Type.f32, "bf16": openvino.Type.bf16}


@lru_cache(maxsize=1)
def _core() -> Any:
    return openvino.Core()


class OpenVinoBackend(Backend):
    """The graph in OpenVINO: compiled for one frame, and for any number when a batch first comes."""

    kind: ClassVar[str] = "openvino"
    devices: ClassVar[tuple[str, ...]] = ("CPU", "GPU")

    def __init__(self, card: ModelCard, device: str, precision: str, threads: int) -> None:
        super().__init__(card, device, precision, threads)
        self._batch_request: Any = None
        self._request = self._compile(1)
        self._input: Any = self._request.get_input_tensor().data

    @classmethod
    def refusal(cls, device: str, precision: str) -> str | None:
        if precision not in _TYPES:
            return f"computes in fp32 and bf16, not {precision}"
        present = _core().available_devices
        if not any(name.split(".")[0] == device for name in present):
            return f"finds no {device}, only {', '.join(present) or 'no device'}"
        if precision == "bf16" and "BF16" not in _core().get_property(device, "OPTIMIZATION_CAPABILITIES"):
            return f"this {device} has no bf16 arithmetic"
        return None

    def _compile(self, batch: int) -> Any:
        """An inference request for `batch` frames, -1 for any number."""
        path = self.card.graph_path
        model = _read(path)
        check_contract(_facts(model), path, self.card)
        model.reshape({"frame": openvino.PartialShape([batch, *FRAME_SHAPE])})
        _split_convolutions(model)
        settings: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": _TYPES[self.precision],  # a CPU with bf16 uses it unless told
        }
        if self.device == "CPU":
            # Pinned threads wait for whatever else runs on their core: paced at 30 Hz beside a loaded pipeline
            # on two cores, p99 is 60 ms with pinning and 33 ms without.
            settings |= {"INFERENCE_NUM_THREADS": self.threads, "ENABLE_CPU_PINNING": False}
        # On the CPU a cache would save 0.2 s; a GPU's kernels take long to build.
        elif folder := cache_folder("openvino", "compiled kernels"):
            settings["CACHE_DIR"] = str(folder)
        compiled = _core().compile_model(model, self.device, settings)
        found = compiled.get_property("INFERENCE_PRECISION_HINT")
        if found != _TYPES[self.precision]:
            raise BackendUnavailable(f"computes in {found.get_type_name()} instead of {self.precision}")
        return compiled.create_infer_request()

    def _run(self, frames: NDArray[np.uint8]) -> tuple[NDArray[np.float32] | None, NDArray[np.float32]]:
        if len(frames) == 1:
            request = self._request
            np.copyto(self._input, frames)
        else:
            request = self._batch_request = self._batch_request or self._compile(-1)
            request.set_input_tensor(openvino.Tensor(frames))
        request.infer(share_outputs=True)  # in this thread: handing over to another costs up to 1 ms
        latent = request.get_tensor("latent").data.copy()
        return (request.get_tensor("probabilities").data.copy() if self.card.labels.names else None), latent

    def _free(self) -> None:
        self._request = self._batch_request = self._input = None


def read_graph(path: Path) -> GraphFacts:
    """What a graph says about itself.

    Raises:
        ModelError: not a readable ONNX file.
    """
    return _facts(_read(path))


def load_graph(path: Path, threads: int) -> tuple[GraphFacts, RunGraph]:
    """Any graph on the CPU in fp32: what it says about itself, and a function from its inputs to its first output.

    Raises:
        ModelError: not a readable ONNX file.
    """
    model = _read(path)
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": _TYPES["fp32"],
        "INFERENCE_NUM_THREADS": threads,
        "ENABLE_CPU_PINNING": False,
    }
    request = _core().compile_model(model, "CPU", settings).create_infer_request()

    def run(inputs: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        request.infer(dict(inputs), share_inputs=True, share_outputs=True)
        output: NDArray[Any] = request.get_output_tensor(0).data.copy()
        return output

    return _facts(model), run


def _read(path: Path) -> Any:
    try:
        return _core().read_model(path)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ModelError(f"{path} is no ONNX graph that can be read ({reason}); copy or export it again") from error


def _facts(model: Any) -> GraphFacts:
    def described(ports: Any) -> dict[str, tuple[str, Shape]]:
        return {
            port.any_name: (
                str(port.element_type.to_dtype()),
                tuple(size.get_length() if size.is_static else None for size in port.partial_shape),
            )
            for port in ports
        }

    metadata = model.get_rt_info(["framework"]).astype(dict) if model.has_rt_info(["framework"]) else {}
    return GraphFacts(described(model.inputs), described(model.outputs), metadata)


def _split_convolutions(model: Any) -> None:
    """Replace each convolution whose channels are then cut into unequal parts by one convolution for each part.

    EfficientViT cuts query, key and value out of one convolution. OpenVINO's CPU plugin has only a reference
    kernel for that cut, a fifth of a frame's time in bf16; the parts' own convolutions give the same numbers.
    """
    passes = Manager()
    passes.register_pass(ConstantFolding())  # weights stored as fp16 become constants
    passes.run_passes(model)
    for split in model.get_ordered_ops():
        if split.get_type_name() != "VariadicSplit":
            continue
        # Back from the cut: a reshape that changes nothing and the bias, either of which may be absent.
        chain = [split]
        for kind in ("Reshape", "Add", "Convolution"):
            node = chain[-1].input_value(0).get_node()
            if node.get_type_name() == kind:
                chain.append(node)
        convolution = chain[-1]
        if convolution.get_type_name() != "Convolution":
            continue
        weights = convolution.input_value(1).get_node()
        axis, lengths = (split.input_value(i).get_node() for i in (1, 2))
        biases = [node.input_value(1).get_node() for node in chain[1:-1] if node.get_type_name() == "Add"]
        if (
            any(node.get_type_name() != "Constant" for node in (weights, axis, lengths, *biases))
            or axis.data.item() not in (1, -3)
            or lengths.data.min() < 0
            or any(bias.data.shape[:2] != (1, len(weights.data)) for bias in biases)
            or convolution.output(0).partial_shape != split.input_value(0).partial_shape
            or any(len(node.output(0).get_target_inputs()) != 1 for node in chain[1:])
        ):
            continue
        facts = convolution.get_attributes()
        start = 0
        for part, length in zip(split.outputs(), lengths.data.tolist(), strict=True):
            rows = slice(start, start + length)
            start += length
            piece = opset13.convolution(
                convolution.input_value(0),
                opset13.constant(np.ascontiguousarray(weights.data[rows])),
                *(facts[name] for name in ("strides", "pads_begin", "pads_end", "dilations")),
            )
            for bias in biases:
                piece = opset13.add(piece, opset13.constant(np.ascontiguousarray(bias.data[:, rows])))
            part.replace(piece.output(0))
    model.validate_nodes_and_infer_types()
