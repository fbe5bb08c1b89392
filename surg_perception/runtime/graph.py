# SPDX-License-Identifier: Apache-2.0
"""The contract that an ONNX graph must keep, and what a graph says about itself.

One input `frame`, uint8 [N, 224, 224, 3], BGR, already resized; outputs `latent`, float32 [N, D, 4, 4], and,
from a model with a phase head, `probabilities`, float32 [N, classes]. N is free.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from surg_perception.models import ModelCard, ModelError

FRAME_SHAPE = (224, 224, 3)

Shape = tuple[int | None, ...]
"""Sizes of a tensor; None where a size is free."""

RunGraph = Callable[[Mapping[str, NDArray[Any]]], NDArray[Any]]
"""A loaded graph: inputs by name to its one output, the caller's own."""


@dataclass(frozen=True)
class GraphFacts:
    """Inputs and outputs by name, as (NumPy type name, shape), and the graph's metadata."""

    inputs: Mapping[str, tuple[str, Shape]]
    outputs: Mapping[str, tuple[str, Shape]]
    metadata: Mapping[str, str]

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(D, 4, 4) of a graph that passed `check_contract`."""
        channels = self.outputs["latent"][1][1]
        assert channels is not None
        return channels, 4, 4

    @property
    def phases(self) -> tuple[str, ...]:
        """Names in the metadata key `phases`, else "phase 0" and so on; empty without a phase head."""
        if "probabilities" not in self.outputs:
            return ()
        classes = self.outputs["probabilities"][1][1]
        assert classes is not None
        if "phases" not in self.metadata:
            return tuple(f"phase {index}" for index in range(classes))
        try:
            names = json.loads(self.metadata["phases"])
        except json.JSONDecodeError:
            names = None
        if not isinstance(names, list) or len(names) != classes or not all(isinstance(n, str) for n in names):
            raise ModelError(
                f"the graph's metadata key 'phases' is {self.metadata['phases']!r}, "
                f"expected a JSON list of {classes} names"
            )
        return tuple(names)


def check_contract(graph: GraphFacts, path: Path | str, card: ModelCard | None = None) -> None:
    """Check inputs and outputs, also against what a card says of them.

    Raises:
        ModelError: names what was found and what was expected.
    """
    expected_inputs: dict[str, tuple[str, Shape]] = {"frame": ("uint8", (None, *FRAME_SHAPE))}
    expected_outputs: dict[str, tuple[str, Shape]] = {"latent": ("float32", (None, None, 4, 4))}
    if "probabilities" in graph.outputs:
        expected_outputs["probabilities"] = ("float32", (None, None))
    for kind, found, expected in (
        ("input", graph.inputs, expected_inputs),
        ("output", graph.outputs, expected_outputs),
    ):
        if found.keys() != expected.keys():
            wanted = "frame" if kind == "input" else "latent and, with a phase head, probabilities"
            raise ModelError(
                f"{path}: {kind}s are {', '.join(sorted(found)) or 'none'}, expected {wanted}. This is no graph "
                "of this project; make one with `surg-perception export onnx`"
            )
        for name, (dtype, shape) in expected.items():
            if not _fits(found[name], dtype, shape):
                raise ModelError(
                    f"{path}: {kind} {name!r} is {_text(*found[name])}, expected {_text(dtype, shape)} with "
                    "only the first size free; make the graph with `surg-perception export onnx`"
                )
    if card is None:
        return
    classes = graph.outputs["probabilities"][1][1] if "probabilities" in graph.outputs else 0
    for what, found_facts, said in (
        ("latent shape", list(graph.latent_shape), list(card.network.latent_shape)),
        ("number of phases", classes, len(card.labels.names)),
    ):
        if found_facts != said:
            raise ModelError(
                f"{path}: {what} is {found_facts}, but the card says {said}; card and graph belong to different "
                "models, copy the model folder again, whole"
            )


def check_forecast_contract(graph: GraphFacts, path: Path, card: ModelCard) -> None:
    """Check the forecast graph of a model: `latent` and, from a decoder of changes, `frame` in, `forecast` out.

    Raises:
        ModelError: names what was found and what was expected.
    """
    frame: tuple[str, Shape] = ("uint8", (None, *FRAME_SHAPE))
    inputs: dict[str, tuple[str, Shape]] = {"latent": ("float32", (None, *card.network.latent_shape))}
    if card.network.predict_change:
        inputs["frame"] = frame
    for kind, found, expected in (("input", graph.inputs, inputs), ("output", graph.outputs, {"forecast": frame})):
        wrong = found.keys() != expected.keys() or any(
            not _fits(found[name], *facts) for name, facts in expected.items()
        )
        if wrong:
            found_text, expected_text = (
                ", ".join(f"{name} {_text(*facts)}" for name, facts in sorted(tensors.items())) or "none"
                for tensors in (found, expected)
            )
            raise ModelError(
                f"{path}: {kind}s are {found_text}, expected {expected_text} with only the first size free; "
                "the forecast graph belongs to another model, copy the model folder again, whole"
            )


def _fits(found: tuple[str, Shape], dtype: str, shape: Shape) -> bool:
    """Same type and sizes; the first size must be free, another one that is None in `shape` must be fixed."""
    sizes = found[1]
    return (
        found[0] == dtype
        and len(sizes) == len(shape)
        and sizes[0] is None
        and all(size is not None and wanted in (None, size) for size, wanted in zip(sizes[1:], shape[1:], strict=True))
    )


def _text(dtype: str, shape: Shape) -> str:
    return f"{dtype} [{', '.join('?' if size is None else str(size) for size in shape)}]"


def describe_graph(path: str | Path) -> GraphFacts:
    """What an ONNX file says about itself, read by whichever ONNX engine is installed.

    Raises:
        ModelError: no ONNX file, or a graph that does not keep the contract.
        ImportError: neither onnxruntime nor openvino is installed.
    """
    path = Path(path)
    if importlib.util.find_spec("onnxruntime"):
        from surg_perception.runtime.onnxruntime_backend import read_graph
    elif importlib.util.find_spec("openvino"):
        from surg_perception.runtime.openvino_backend import read_graph
    else:
        raise ImportError(f"reading {path} needs onnxruntime or openvino; install one of them")
    graph = read_graph(path)
    check_contract(graph, path)
    return graph
