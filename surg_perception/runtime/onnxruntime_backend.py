# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime: fp32 on the CPU and on CUDA."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from surg_perception.models import ModelCard, ModelError
from surg_perception.runtime.agreement import Outputs
from surg_perception.runtime.backend import Backend, BackendUnavailable
from surg_perception.runtime.graph import GraphFacts, RunGraph, Shape, check_contract

_ERRORS_ONLY = 3
_DTYPES = {"tensor(uint8)": "uint8", "tensor(float)": "float32"}


class OnnxRuntimeBackend(Backend):
    """The graph in ONNX Runtime."""

    kind: ClassVar[str] = "onnxruntime"
    devices: ClassVar[tuple[str, ...]] = ("CUDA", "CPU")

    def __init__(self, card: ModelCard, device: str, precision: str, threads: int) -> None:
        super().__init__(card, device, precision, threads)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # A worker that spins while it waits takes its core from the nodes beside: paced at 30 Hz beside a
        # loaded pipeline on two cores, without spinning p99 halves and so does the CPU time.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        provider = "CUDAExecutionProvider" if device == "CUDA" else "CPUExecutionProvider"
        settings = {"use_tf32": "0"} if device == "CUDA" else {}
        self._session: Any = _session(card.graph_path, options, (provider, settings))
        if self._session.get_providers()[0] != provider:
            raise BackendUnavailable(f"{provider} did not start; ONNX Runtime's own messages name the missing library")
        facts = _facts(self._session)
        check_contract(facts, card.graph_path, card)
        self._names = [name for name in ("probabilities", "latent") if name in facts.outputs]

    @classmethod
    def refusal(cls, device: str, precision: str) -> str | None:
        if precision != "fp32":
            return f"computes in fp32 only, not {precision}"
        if device == "CUDA" and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            return "this onnxruntime was built without CUDA (the package onnxruntime-gpu has it)"
        return None

    def _run(self, frames: NDArray[np.uint8]) -> tuple[NDArray[np.float32] | None, NDArray[np.float32]]:
        *probabilities, latent = self._session.run(self._names, {"frame": frames})
        return (probabilities[0] if probabilities else None), latent

    def _free(self) -> None:
        self._session = None


def read_graph(path: Path) -> GraphFacts:
    """What a graph says about itself.

    Raises:
        ModelError: not a readable ONNX file.
    """
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return _facts(_session(path, options, ("CPUExecutionProvider", {})))


def load_graph(path: Path, threads: int) -> tuple[GraphFacts, RunGraph]:
    """Any graph on the CPU in fp32: what it says about itself, and a function from its inputs to its first output.

    Raises:
        ModelError: not a readable ONNX file.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = _session(path, options, ("CPUExecutionProvider", {}))

    def run(inputs: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        output: NDArray[Any] = session.run(None, dict(inputs))[0]
        return output

    return _facts(session), run


def outputs_of(graph: bytes, frames: NDArray[np.uint8], threads: int) -> Outputs:
    """Outputs of a graph for one frame (`engine_graph`), on the CPU, for frames uint8 [N, 224, 224, 3]."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = _ERRORS_ONLY
    # Optimisations would undo `rounding_shown`.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    names = [tensor.name for tensor in session.get_outputs()]
    rows = [dict(zip(names, session.run(names, {"frame": frame[np.newaxis]}), strict=True)) for frame in frames]
    latents = np.concatenate([row["latent"] for row in rows])
    if "probabilities" not in names:
        return np.zeros((len(frames), 0), np.float32), latents
    return np.concatenate([row["probabilities"] for row in rows]), latents


def _session(path: Path, options: Any, provider: tuple[str, dict[str, str]]) -> Any:
    options.log_severity_level = _ERRORS_ONLY
    errors = onnxruntime.capi.onnxruntime_pybind11_state
    try:
        return onnxruntime.InferenceSession(path, options, providers=[provider])
    except (errors.InvalidProtobuf, errors.InvalidGraph, errors.NoSuchFile) as error:
        raise ModelError(f"{path} is no ONNX graph that can be read ({error}); copy or export it again") from error


def _facts(session: Any) -> GraphFacts:
    def described(tensors: Any) -> dict[str, tuple[str, Shape]]:
        return {
            tensor.name: (
                _DTYPES.get(tensor.type, tensor.type),
                tuple(size if isinstance(size, int) else None for size in tensor.shape),
            )
            for tensor in tensors
        }

    return GraphFacts(
        described(session.get_inputs()),
        described(session.get_outputs()),
        session.get_modelmeta().custom_metadata_map,
    )
