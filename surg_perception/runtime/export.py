# SPDX-License-Identifier: Apache-2.0
"""ONNX graphs: encoder and phase head, from uint8 camera frames to probabilities and latent; the frame decoder."""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from surg_perception.gsvit.network import GSViT

OPSET = 20
WEIGHT_STORAGES = ("fp32", "fp16")
_FP16_FROM_ELEMENTS = 1024  # smaller initialisers stay as they are


def export_onnx(model: GSViT, path: str | Path, *, weight_storage: str = "fp32", phases: Sequence[str] = ()) -> Path:
    """Write `model` (encoder and, if it has one, phase head) as one ONNX file with its weights inside.

    Input `frame`: uint8 [N, 224, 224, 3], BGR, N free, already resized (bilinear); the graph divides by 255.
    Outputs: `probabilities` float32 [N, classes], calibrated (only with a phase head), and `latent` float32
    [N, D, 4, 4]. Batch norm is folded into the convolutions. The same model gives the same bytes.

    Args:
        model: left as it is; exported in evaluation mode. A frame decoder is left out.
        path: file to write; its folder must exist. An existing file is replaced in one step.
        weight_storage: "fp16" halves the file: matrices are stored as fp16 and cast (and, where batch norm
            was folded in, scaled) to fp32 by nodes that runtimes compute once at load. Arithmetic and speed
            stay those of fp32, and if the model's own matrices are fp16 values, no precision is lost.
        phases: names of the classes, written into the graph's metadata as `phases` (a JSON list), so that the
            graph can be used without its card.

    Returns:
        `path`.

    Raises:
        ValueError: unknown `weight_storage`.
    """
    import torch

    from surg_perception.gsvit.network import IMAGE_SIZE, FrameGraph
    from surg_perception.torch_extras import import_timm

    _check_storage(weight_storage)
    graph = copy.deepcopy(FrameGraph(model)).cpu().eval().requires_grad_(False)
    folded = import_timm().utils.model.reparameterize_model(graph, inplace=False)
    example = {"frame": torch.zeros((2, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=torch.uint8)}
    with torch.no_grad():
        folded(**example)  # fills timm's cache of attention biases, which then export as constants
    proto = _exported(folded, example, list(graph.output_names))
    if weight_storage == "fp16":
        _store_as_fp16(proto, _batch_norm_scales(graph))
    return save_graph(proto, path, {"phases": json.dumps(list(phases))} if phases else {})


def export_forecast_onnx(model: GSViT, path: str | Path, *, weight_storage: str = "fp32") -> Path:
    """Write the frame decoder of `model` as an ONNX file of its own: latent in, the frame expected out.

    Input `latent`: float32 [N, D, 4, 4], as the graph of `export_onnx` gives it, N free; where the decoder predicts
    the change, also `frame`: uint8 [N, 224, 224, 3], BGR, the one the latent is of. Output `forecast`: uint8
    [N, 224, 224, 3], BGR.

    Args:
        model: left as it is; exported in evaluation mode.
        path, weight_storage: as in `export_onnx`.

    Returns:
        `path`.

    Raises:
        ValueError: unknown `weight_storage`, or a model without a frame decoder.
    """
    import torch

    from surg_perception.gsvit.forecast_graph import ForecastGraph
    from surg_perception.gsvit.network import IMAGE_SIZE

    _check_storage(weight_storage)
    graph = copy.deepcopy(ForecastGraph(model)).cpu().eval().requires_grad_(False)
    example = {"latent": torch.zeros((2, *model.latent_shape))}
    if graph.decoder.predict_change:
        example["frame"] = torch.zeros((2, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=torch.uint8)
    proto = _exported(graph, example, ["forecast"])
    if weight_storage == "fp16":
        _store_as_fp16(proto, {})
    return save_graph(proto, path, {})


def _check_storage(weight_storage: str) -> None:
    if weight_storage not in WEIGHT_STORAGES:
        raise ValueError(f"unknown weight storage {weight_storage!r}; expected one of {', '.join(WEIGHT_STORAGES)}")


def _exported(graph: Any, example: dict[str, Any], outputs: list[str]) -> Any:
    """The graph as an ONNX model whose inputs are named as in `example`, with the first size of each free."""
    import torch

    size = torch.export.Dim("N", min=1)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside the exporter
        program = torch.onnx.export(
            graph,
            tuple(example.values()),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(example),
            output_names=outputs,
            dynamic_shapes={name: {0: size} for name in example},
            verbose=False,
        )
    if program is None:
        raise RuntimeError("torch.onnx.export gave no graph; expected one from its dynamo exporter")
    proto = program.model_proto
    _strip_provenance(proto)
    return proto


def save_graph(proto: Any, path: str | Path, metadata: dict[str, str]) -> Path:
    """Check and write an ONNX model in one step; returns its path."""
    import onnx

    if metadata:
        onnx.helper.set_model_props(proto, metadata)
    onnx.checker.check_model(proto)
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        onnx.save(proto, partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _strip_provenance(proto: Any) -> None:
    """Drop the exporter's notes, which hold stack traces with paths of the exporting machine."""
    graph = proto.graph
    for item in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del item.metadata_props[:]
        item.doc_string = ""
    del graph.value_info[:]
    graph.name = "gsvit"


def _batch_norm_scales(graph: Any) -> dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """For each folded weight, by its name in the graph: the weight before folding, the factor per channel."""
    scales = {}
    for name, module in graph.named_modules():
        if hasattr(module, "fuse"):
            norm = module.bn
            factor = (norm.weight / (norm.running_var + norm.eps) ** 0.5).detach().numpy()
            scales[f"{name}.weight"] = (module.conv.weight.detach().numpy(), factor.reshape(-1, 1, 1, 1))
    return scales


def _store_as_fp16(proto: Any, scales: dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]) -> None:
    from onnx import TensorProto, helper, numpy_helper

    initialisers, nodes = [], []
    for tensor in proto.graph.initializer:
        name = tensor.name
        if tensor.data_type != TensorProto.FLOAT or len(tensor.dims) < 2 or np.prod(tensor.dims) < _FP16_FROM_ELEMENTS:
            initialisers.append(tensor)
            continue
        weight, factor = scales.get(name, (numpy_helper.to_array(tensor), None))
        with np.errstate(over="ignore"):
            stored = weight.astype(np.float16)
        if not np.isfinite(stored).all():
            initialisers.append(tensor)
            continue
        initialisers.append(numpy_helper.from_array(stored, f"{name}.fp16"))
        if factor is None:
            nodes.append(helper.make_node("Cast", [f"{name}.fp16"], [name], to=TensorProto.FLOAT))
        else:
            initialisers.append(numpy_helper.from_array(factor, f"{name}.scale"))
            nodes.append(helper.make_node("Cast", [f"{name}.fp16"], [f"{name}.unscaled"], to=TensorProto.FLOAT))
            nodes.append(helper.make_node("Mul", [f"{name}.unscaled", f"{name}.scale"], [name]))
    nodes.extend(proto.graph.node)
    del proto.graph.initializer[:]
    del proto.graph.node[:]
    proto.graph.initializer.extend(initialisers)
    proto.graph.node.extend(nodes)
