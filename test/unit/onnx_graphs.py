# SPDX-License-Identifier: Apache-2.0
"""Small ONNX graphs, with and without faults, and model folders around them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from surg_perception.models import InputFacts, LabelFacts, ModelCard, ModelFile, NetworkFacts

CHANNELS, CLASSES = 8, 5


@dataclass(frozen=True)
class SmallNetwork:
    """Patch means of each colour, mixed to a latent [N, 8, 4, 4], then a linear classifier.

    The mixing weights of blue, green and red differ, so that swapped channels give other numbers.
    """

    mix: NDArray[np.float32]
    classifier: NDArray[np.float32]

    @classmethod
    def random(cls, seed: int = 0) -> SmallNetwork:
        rng = np.random.default_rng(seed)
        mix = rng.normal(size=(CHANNELS, 3)).astype(np.float32)
        return cls(mix, rng.normal(size=(CLASSES, CHANNELS * 16)).astype(np.float32))

    def __call__(self, frames: NDArray[np.uint8]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Probabilities and latent in float64, straight from the definition."""
        patches = (frames.astype(np.float64) / 255).reshape(len(frames), 4, 56, 4, 56, 3).mean(axis=(2, 4))
        latent = np.einsum("nyxc,dc->ndyx", patches, self.mix)
        logits = latent.reshape(len(frames), -1) @ self.classifier.T
        exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
        return exponents / exponents.sum(axis=1, keepdims=True), latent


def graph_of(
    network: SmallNetwork,
    *,
    head: bool = True,
    cancelling: float = 0.0,
    poison: str = "",
    input_name: str = "frame",
    input_type: int = TensorProto.UINT8,
    input_shape: Sequence[Any] = ("N", 224, 224, 3),
    latent_name: str = "latent",
    softmax: bool = True,
    metadata: dict[str, str] | None = None,
) -> onnx.ModelProto:
    """The network as a graph.

    Args:
        head: with `probabilities`.
        cancelling: added to every weight of the classifier and taken off again by a second matrix product:
            nothing changes in exact arithmetic, everything does in a short one.
        poison: "latent" divides the latent by zero.
        softmax: without it `probabilities` hold logits.
    """
    weights = {
        "kernel": np.repeat(network.mix[:, :, None, None], 56, 2).repeat(56, 3) / 56**2,
        "scale": np.float32(1 / 255),
        "zero": np.float32(0),
        "classifier": (network.classifier + cancelling).T.copy(),
        "offset": np.full((CHANNELS * 16, CLASSES), cancelling),
    }
    nodes = [
        helper.make_node("Cast", [input_name], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["float", "scale"], ["scaled"]),
        helper.make_node("Transpose", ["scaled"], ["bgr"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["bgr", "kernel"], ["mixed"], strides=[56, 56]),
        helper.make_node("Div" if poison == "latent" else "Add", ["mixed", "zero"], [latent_name]),
    ]
    outputs = [helper.make_tensor_value_info(latent_name, TensorProto.FLOAT, ["N", CHANNELS, 4, 4])]
    if head:
        nodes += [
            helper.make_node("Flatten", [latent_name], ["flat"]),
            helper.make_node("MatMul", ["flat", "classifier"], ["raw"]),
            helper.make_node("MatMul", ["flat", "offset"], ["shift"]),
            helper.make_node("Sub", ["raw", "shift"], ["logits"]),
            helper.make_node("Softmax" if softmax else "Identity", ["logits"], ["probabilities"]),
        ]
        outputs.insert(0, helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["N", CLASSES]))
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info(input_name, input_type, list(input_shape))],
        outputs,
        [numpy_helper.from_array(np.asarray(value, np.float32), name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    if metadata:
        helper.set_model_props(model, metadata)
    onnx.checker.check_model(model)
    return model


def write_folder(folder: Path, model: onnx.ModelProto, *, head: bool = True, classes: int = CLASSES) -> ModelCard:
    """A model folder with a card and the graph, without weights."""
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(model, folder / "model.onnx")
    card = ModelCard(
        folder=folder,
        name=folder.name,
        version="1",
        network=NetworkFacts("gsvit", "m0", (), (CHANNELS, 4, 4), decoder=False),
        input=InputFacts(),
        labels=LabelFacts("test", tuple(f"p{i}" for i in range(classes)) if head else ()),
        temperature=1.0,
        metrics={},
        training={},
        licence="Apache-2.0",
        intended_use="Tests.",
        weights=None,
        graph=ModelFile.of(folder / "model.onnx"),
    )
    card.write()
    return card
