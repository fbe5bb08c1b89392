# SPDX-License-Identifier: Apache-2.0
"""A model's graph as an engine builder wants it: one frame, constants folded, precision written into it.

TensorRT 11 has no switch for half precision any more: what the graph says is what the engine computes.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from surg_perception.models import ModelError

GRAPH_VERSION = 1
"""Raised when the same file and precision give another graph: engines are then built anew."""
_OWN_DOMAIN = "surg_perception"
NORMS_AND_SOFTMAX = (
    "Softmax",
    "LogSoftmax",
    "LayerNormalization",
    "BatchNormalization",
    "InstanceNormalization",
    "GroupNormalization",
    "RMSNormalization",
    "ReduceMean",
    "ReduceSum",
    "Pow",
    "Sqrt",
    "Exp",
)
"""Operators that overflow or lose digits first in half precision; "fp16-mixed" keeps them in fp32."""


def engine_graph(path: str | Path, precision: str) -> bytes:
    """The ONNX graph for an engine: inputs and outputs as in the file, but for N, which is 1.

    Weights that the file computes from others (fp16 storage, folded batch norm) become constants, and the frame
    becomes a float at once, since TensorRT does nothing else with uint8. The softmax of the probabilities stays in
    fp32 always: in fp16 their sum strays from 1 by more than the runtime accepts.

    Args:
        path: a graph that keeps the contract (`runtime.graph`).
        precision: "fp32"; "fp16"; or "fp16-mixed", with `NORMS_AND_SOFTMAX` in fp32.

    Raises:
        ModelError: not a readable ONNX file.
        ImportError: the package onnx, or for fp16 onnxruntime, is missing.
        ValueError: another precision.
    """
    try:
        import onnx
    except ImportError as error:
        raise ImportError("building an engine needs the package onnx: pip install onnx") from error
    if precision not in ("fp32", "fp16", "fp16-mixed"):
        raise ValueError(f"precision is {precision!r}, expected fp32, fp16 or fp16-mixed")
    try:
        model = onnx.load(path)
        onnx.checker.check_model(model)
    except Exception as error:  # protobuf's errors are of a kind of their own
        raise ModelError(f"{path} is no ONNX graph that can be read ({error}); copy or export it again") from error
    fold_constants(model)
    for tensor in (*model.graph.input, *model.graph.output):
        tensor.type.tensor_type.shape.dim[0].dim_value = 1
    _frame_to_float(model)
    for index, node in enumerate(model.graph.node):
        node.name = node.name or f"node_{index}"
    if precision != "fp32":
        model = _halved(model, NORMS_AND_SOFTMAX if precision == "fp16-mixed" else ())
    onnx.checker.check_model(model)
    content: bytes = model.SerializeToString(deterministic=True)
    return content


def rounding_shown(graph: bytes) -> bytes:
    """The same graph in fp32, with each value that is fp16 in it rounded as fp16 rounds, and overflowing as it does.

    ONNX Runtime's CPU computes fp16 operators in fp32 and leaves out the casts between them, so that running the graph
    itself would show too little. Rounding to 11 binary digits is Veltkamp's splitting (T. J. Dekker, "A floating-point
    technique for extending the available precision", 1971); numbers below fp16's smallest normal one stay as they are.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.shape_inference.infer_shapes(onnx.load_from_string(graph), strict_mode=True)
    types = {tensor.name: tensor.type.tensor_type.elem_type for tensor in model.graph.value_info}
    nodes = list(model.graph.node)
    del model.graph.node[:]
    del model.graph.value_info[:]
    for node in nodes:
        rounded = []
        for index, name in enumerate(node.output):
            if types.get(name) == TensorProto.FLOAT16:
                node.output[index] = f"{name}.exact"
                rounded.append(helper.make_node("RoundToHalf", [f"{name}.exact"], [name], domain=_OWN_DOMAIN))
        if node.op_type == "Cast" and node.attribute[0].i == TensorProto.FLOAT16:
            node.attribute[0].i = TensorProto.FLOAT
        model.graph.node.extend([node, *rounded])
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT16:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    constants = {"factor": 2.0**13 + 1, "largest": 65504.0, "infinity": float("inf")}
    steps = [
        *(helper.make_node("Constant", [], [name], value_float=value) for name, value in constants.items()),
        helper.make_node("Mul", ["x", "factor"], ["large"]),
        helper.make_node("Sub", ["large", "x"], ["difference"]),
        helper.make_node("Sub", ["large", "difference"], ["short"]),
        helper.make_node("Abs", ["short"], ["size"]),
        helper.make_node("Greater", ["size", "largest"], ["overflows"]),
        helper.make_node("Mul", ["short", "infinity"], ["endless"]),
        helper.make_node("Where", ["overflows", "endless", "short"], ["y"]),
    ]
    opset = next(entry for entry in model.opset_import if entry.domain == "")
    model.functions.append(helper.make_function(_OWN_DOMAIN, "RoundToHalf", ["x"], ["y"], steps, [opset]))
    model.opset_import.append(helper.make_opsetid(_OWN_DOMAIN, 1))
    content: bytes = model.SerializeToString()
    return content


def fold_constants(model: Any) -> Any:
    """Make constants of weights that a graph computes from others (fp16 storage, folded batch norm); the same model."""
    from onnx import numpy_helper
    from onnx.reference import ReferenceEvaluator

    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    kept = []
    for node in model.graph.node:
        if node.op_type in ("Cast", "Mul", "Identity", "Reshape", "Transpose") and all(
            n in constants for n in node.input
        ):
            values = ReferenceEvaluator(node).run(None, {n: numpy_helper.to_array(constants[n]) for n in node.input})
            for name, value in zip(node.output, values, strict=True):
                constants[name] = numpy_helper.from_array(np.ascontiguousarray(value), name)
        else:
            kept.append(node)
    used = {name for node in kept for name in node.input}
    del model.graph.node[:]
    del model.graph.initializer[:]
    model.graph.node.extend(kept)
    model.graph.initializer.extend(tensor for name, tensor in constants.items() if name in used)
    return model


def _frame_to_float(model: Any) -> None:
    from onnx import TensorProto, helper

    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name == "frame":
                node.input[index] = "frame.float"
    model.graph.node.insert(0, helper.make_node("Cast", ["frame"], ["frame.float"], to=TensorProto.FLOAT))


def _halved(model: Any, in_fp32: tuple[str, ...]) -> Any:
    """The graph in fp16, but for some operators and the softmax of the probabilities."""
    import onnx
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    outputs = {tensor.name for tensor in model.graph.output}
    last = [node.name for node in model.graph.node if node.op_type == "Softmax" and outputs & set(node.output)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # weights too small for fp16 become 0: the agreement tells whether it matters
        halved = convert_float_to_float16(
            onnx.shape_inference.infer_shapes(model),
            keep_io_types=True,
            op_block_list=[*DEFAULT_OP_BLOCK_LIST, *in_fp32],
            node_block_list=last,
        )
    _join_fp32(halved)
    OnnxModel(halved).topological_sort(is_deterministic=True)
    return halved


def _join_fp32(model: Any) -> None:
    """Between two operators in fp32 a value stays fp32: a squared one overflows in fp16 before its root is taken."""
    from onnx import TensorProto

    def casts(to: int) -> dict[str, str]:
        return {
            node.output[0]: node.input[0]
            for node in model.graph.node
            if node.op_type == "Cast" and node.attribute[0].i == to
        }

    halved, widened = casts(TensorProto.FLOAT16), casts(TensorProto.FLOAT)
    computed = {name for node in model.graph.node for name in node.output if node.op_type != "Cast"}
    for node in model.graph.node:
        if node.op_type == "Cast":
            continue
        for index, name in enumerate(node.input):
            origin = halved.get(widened.get(name, ""), "")
            if origin in computed:
                node.input[index] = origin
    while True:
        used = {name for node in model.graph.node for name in node.input} | {
            tensor.name for tensor in model.graph.output
        }
        dead = [node for node in model.graph.node if node.op_type == "Cast" and node.output[0] not in used]
        if not dead:
            return
        for node in dead:
            model.graph.node.remove(node)
