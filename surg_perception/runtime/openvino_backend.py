# SPDX-License-Identifier: Apache-2.0
"""OpenVINO: Intel and Arm CPUs, Intel GPUs; fp32, and bf16 where the device has it; int8 weights of the phase head."""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import openvino
from numpy.typing import NDArray
from openvino import opset13
from openvino.passes import ConstantFolding, Manager

from surg_perception.models import ModelCard, ModelError, known_sha256
from surg_perception.runtime.agreement import Outputs, reference_frames
from surg_perception.runtime.backend import Backend, BackendUnavailable, first_line
from surg_perception.runtime.engine_cache import CacheError, EngineCache, EngineKey
from surg_perception.runtime.graph import FRAME_SHAPE, GraphFacts, RunGraph, Shape, check_contract
from surg_perception.runtime.user_cache import cache_folder

_TYPES = {
    "fp32": openvino.Type.f32,
    "bf16": openvino.Type.bf16,
    "fp32-w8": openvino.Type.f32,
    "bf16-w8": openvino.Type.bf16,
}
_logger = logging.getLogger("surg_perception.runtime")
_W8_FROM_ELEMENTS = 1 << 16  # smaller matrices stay in the processor's caches anyhow


@lru_cache(maxsize=1)
def _core() -> Any:
    return openvino.Core()


class OpenVinoBackend(Backend):
    """The graph in OpenVINO: compiled for one frame, and for any number when a batch first comes.

    With "-w8" in two parts, "encoder" and "head", else as "whole": the head then computes in fp32, for which alone
    OpenVINO has a fast kernel that reads int8 weights.
    """

    kind: ClassVar[str] = "openvino"
    devices: ClassVar[tuple[str, ...]] = ("CPU", "GPU")

    def __init__(self, card: ModelCard, device: str, precision: str, threads: int) -> None:
        super().__init__(card, device, precision, threads)
        self._parts = ("encoder", "head") if precision.endswith("-w8") else ("whole",)
        self._batch_requests: list[Any] = []
        self._requests = [compiled.create_infer_request() for compiled in self._open()]
        self._input: Any = self._requests[0].get_input_tensor().data

    @classmethod
    def refusal(cls, device: str, precision: str) -> str | None:
        if precision not in _TYPES:
            return f"computes in {', '.join(_TYPES)}, not {precision}"
        present = _core().available_devices
        if not any(name.split(".")[0] == device for name in present):
            return f"finds no {device}, only {', '.join(present) or 'no device'}"
        if precision.endswith("-w8") and device != "CPU":
            return f"the phase head's weights are held in int8 on the CPU only, not on {device}"
        capabilities = _core().get_property(device, "OPTIMIZATION_CAPABILITIES")
        if _TYPES[precision] == openvino.Type.bf16 and "BF16" not in capabilities:
            return f"this {device} has no bf16 arithmetic"
        return None

    def _open(self) -> list[Any]:
        """The parts compiled for one frame: on the CPU from the cache, where an earlier start left them."""
        if self.device != "CPU":  # OpenVINO's own cache has it
            return self._compile(1)
        try:
            cache, keys = EngineCache("openvino", "compiled models"), self._keys()
            entries = [cache.find(key)[0] for key in keys]
        except (CacheError, OSError) as error:
            _logger.warning("no cache of compiled models: %s", error)
            return self._compile(1)
        whole = [entry for entry in entries if entry is not None]
        if len(whole) == len(keys):
            try:
                found = [
                    self._checked(_core().import_model(entry.read(), self.device, self._settings(part)), part)
                    for entry, part in zip(whole, self._parts, strict=True)
                ]
            except (OSError, RuntimeError) as error:
                _logger.warning("%s is compiled anew: %s", self.card.model_id, first_line(error))
            else:
                check_contract(_facts(*found, any_number=True), self.card.graph_path, self.card)
                self.notes.append(f"{self.name}: compiled by an earlier start")
                return found
        compiled = self._compile(1)
        try:
            for key, part in zip(keys, compiled, strict=True):
                content = part.export_model().getvalue(), {"model": self.card.model_id}
                cache.get(key, lambda content=content: content, force=True)  # type: ignore[misc]
        except CacheError as error:
            _logger.warning("%s", error)
        return compiled

    def _keys(self) -> list[EngineKey]:
        """What each compiled part depends on."""
        properties = ("FULL_DEVICE_NAME", "OPTIMIZATION_CAPABILITIES")
        cpu, capabilities = (_core().get_property(self.device, name) for name in properties)
        key = EngineKey(
            graph_sha256=known_sha256(self.card.graph_path),
            flavour="openvino",
            version=openvino.get_version(),
            gpu="",
            targets=(cpu,),
            precision=self.precision,
            shapes={"frame": (1, *FRAME_SHAPE)},
            options={
                "changes": known_sha256(Path(__file__)),  # what is done to the graph before it is compiled
                "threads": self.threads,
                "capabilities": sorted(capabilities),
            },
        )
        return [replace(key, options={**key.options, "part": part}) for part in self._parts]

    def _reference_key(self) -> EngineKey:
        """What the outputs of fp32 on the sample frames are found by: what its engine depends on, and the frames."""
        key, frames = self._keys()[0], hashlib.sha256(reference_frames().tobytes()).hexdigest()
        return replace(key, precision="fp32", options={**key.options, "part": "outputs", "frames": frames})

    def kept_reference(self) -> Outputs | None:
        if self.device != "CPU":
            return None
        try:
            entry, _ = EngineCache("openvino", "compiled models").find(self._reference_key())
            if entry is None:
                return None
            with np.load(io.BytesIO(entry.read())) as kept:
                return kept["probabilities"], kept["latent"]
        except (CacheError, OSError, ValueError, KeyError) as error:
            _logger.warning("%s is compared with fp32 anew: %s", self.card.model_id, first_line(error))
            return None

    def keep_reference(self, outputs: Outputs) -> None:
        if self.device != "CPU":
            return
        content = io.BytesIO()
        np.savez(content, probabilities=outputs[0], latent=outputs[1])
        try:
            facts = {"model": self.card.model_id}
            cache = EngineCache("openvino", "compiled models")
            cache.get(self._reference_key(), lambda: (content.getvalue(), facts), force=True)
        except (CacheError, OSError) as error:
            _logger.warning("%s", error)

    def _type(self, part: str) -> Any:
        return openvino.Type.f32 if part == "head" else _TYPES[self.precision]

    def _settings(self, part: str) -> dict[str, Any]:
        settings: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": self._type(part),  # a CPU with bf16 uses it unless told
        }
        if self.device == "CPU":
            # Pinned threads wait for whatever else runs on their core: paced at 30 Hz beside a loaded pipeline
            # on two cores, p99 is 60 ms with pinning and 33 ms without.
            settings |= {"INFERENCE_NUM_THREADS": self.threads, "ENABLE_CPU_PINNING": False}
            if part == "head":
                # What int8 weights are multiplied with is rounded to int8 too, with a scale for each 32 numbers.
                settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 32
        elif folder := cache_folder("openvino", "compiled kernels"):
            settings["CACHE_DIR"] = str(folder)
        return settings

    def _compile(self, batch: int) -> list[Any]:
        """The parts compiled for `batch` frames, -1 for any number."""
        path = self.card.graph_path
        model = _read(path)
        check_contract(_facts(model), path, self.card)
        model.reshape({"frame": openvino.PartialShape([batch, *FRAME_SHAPE])})
        _split_convolutions(model)
        models = [model]
        if "head" in self._parts:
            if not self.card.labels.names or not _compress_head(model):
                raise BackendUnavailable(
                    f"{self.card.name} has no phase head with weights to hold in int8; leave -w8 away"
                )
            models = _encoder_and_head(model)
        return [
            self._checked(_core().compile_model(piece, self.device, self._settings(part)), part)
            for piece, part in zip(models, self._parts, strict=True)
        ]

    def _checked(self, compiled: Any, part: str) -> Any:
        """A compiled part that computes as it should."""
        found = compiled.get_property("INFERENCE_PRECISION_HINT")
        if found != self._type(part):
            raise BackendUnavailable(f"computes in {found.get_type_name()} instead of {self.precision}")
        if part == "head" and not _has_int8_weights(compiled):
            raise BackendUnavailable("this OpenVINO expands the phase head's int8 weights to floats again")
        return compiled

    def _run(self, frames: NDArray[np.uint8]) -> tuple[NDArray[np.float32] | None, NDArray[np.float32]]:
        if len(frames) == 1:
            requests = self._requests
            np.copyto(self._input, frames)
        else:
            if not self._batch_requests:
                self._batch_requests = [compiled.create_infer_request() for compiled in self._compile(-1)]
            requests = self._batch_requests
            requests[0].set_input_tensor(openvino.Tensor(frames))
        requests[0].infer(share_outputs=True)  # in this thread: handing over to another costs up to 1 ms
        latent = requests[0].get_tensor("latent")
        for head in requests[1:]:
            head.set_input_tensor(latent)
            head.infer(share_outputs=True)
        probabilities = requests[-1].get_tensor("probabilities").data.copy() if self.card.labels.names else None
        return probabilities, latent.data.copy()

    def _free(self) -> None:
        self._requests, self._batch_requests, self._input = [], [], None


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


def _facts(model: Any, *more: Any, any_number: bool = False) -> GraphFacts:
    """What a model (in one or more parts) says about itself, or, compiled for one frame, would say for any number."""

    def described(ports: Any) -> dict[str, tuple[str, Shape]]:
        return {
            port.any_name: (
                str(port.element_type.to_dtype()),
                tuple(
                    size.get_length() if size.is_static and not (any_number and index == 0) else None
                    for index, size in enumerate(port.partial_shape)
                ),
            )
            for port in ports
        }

    compiled = isinstance(model, openvino.CompiledModel)
    has_metadata = not compiled and model.has_rt_info(["framework"])
    metadata = model.get_rt_info(["framework"]).astype(dict) if has_metadata else {}
    outputs = [port for part in (model, *more) for port in part.outputs]
    return GraphFacts(described(model.inputs), described(outputs), metadata)


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


def _compress_head(model: Any) -> bool:
    """Hold the weights of the phase head's large layers in int8, one scale per output channel; whether there are any.

    For one frame such a layer only reads its weights, 50 MB in fp32 with GSViT-M5 and the paper's head. OpenVINO keeps
    Constant, Convert, Multiply, MatMul as it is and expands the weights inside the product. Only the head has matrix
    products with constants; the encoder's are of activations.
    """
    found = False
    for product in model.get_ordered_ops():
        if product.get_type_name() != "MatMul":
            continue
        weights = product.input_value(1).get_node()
        if weights.get_type_name() != "Constant" or weights.data.ndim != 2 or weights.data.size < _W8_FROM_ELEMENTS:
            continue
        facts = product.get_attributes()
        values = weights.data if facts["transpose_b"] else weights.data.T
        scales = np.abs(values).max(axis=1, keepdims=True).astype(np.float32) / 127
        scales[scales == 0] = 1
        rounded = opset13.constant(np.rint(values / scales).astype(np.int8))
        expanded = opset13.multiply(opset13.convert(rounded, "f32"), opset13.constant(scales))
        compressed = opset13.matmul(product.input_value(0), expanded, facts["transpose_a"], True)
        product.output(0).replace(compressed.output(0))
        found = True
    model.validate_nodes_and_infer_types()
    return found


def _encoder_and_head(model: Any) -> list[Any]:
    """A model from frame to latent and one from latent to probabilities; they take the given model apart."""
    latent, probabilities = (model.output(name).get_node() for name in ("latent", "probabilities"))
    source = latent.input_value(0)
    joint = opset13.parameter(source.partial_shape, source.element_type, name="latent_in")
    for consumer in source.get_target_inputs():
        if consumer.get_node().get_type_name() != "Result":
            consumer.replace_source_output(joint.output(0))
    return [openvino.Model([latent], model.get_parameters()), openvino.Model([probabilities], [joint])]


def _has_int8_weights(compiled: Any) -> bool:
    """Whether a compiled model has a product that reads int8 weights."""
    return any(
        operation.get_rt_info()["layerType"].astype(str) == "FullyConnected"
        and any(port.get_element_type() == openvino.Type.i8 for port in operation.inputs())
        for operation in compiled.get_runtime_model().get_ordered_ops()
    )
