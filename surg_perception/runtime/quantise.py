# SPDX-License-Identifier: Apache-2.0
"""Static INT8: a model's graph with Q/DQ nodes, its ranges from the user's frames, in as many layers as fp32 bears.

Quantising all layers of a GSViT turns its latents by more than `runtime.agreement` accepts. So each layer is quantised
alone first, which tells what part of the bounds it uses up; then as many as pass together are, the harmless ones first.
"""

from __future__ import annotations

import copy
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surg_perception.models import ModelCard, ModelFile
from surg_perception.runtime.agreement import MAX_PROBABILITY_DIFFERENCE, MIN_LATENT_COSINE, Agreement, Outputs, compare
from surg_perception.runtime.backend import BACKENDS, BackendUnavailable, PrecisionRefused, first_line
from surg_perception.runtime.engine_build import Reference
from surg_perception.runtime.engine_graph import fold_constants
from surg_perception.runtime.export import save_graph

LAYERS = ("Conv", "Gemm", "MatMul")
"""Operators that are computed in int8, where their weights are constants."""
MIN_FRAMES = 8
_FRAMES_PER_LAYER = 4
Progress = Callable[[float, str], None]
"""Told the part done, 0 to 1, and what is done."""


@dataclass(frozen=True)
class Quantised:
    """A quantised model that passed.

    Attributes:
        card: of the new model folder.
        in_int8, layers: layers that compute in int8, of how many.
        agreements: each engine's agreement with fp32 on the frames that were not calibrated on.
    """

    card: ModelCard
    in_int8: int
    layers: int
    agreements: Mapping[str, Agreement]


def quantise(
    card: ModelCard,
    frames: NDArray[np.uint8],
    folder: Path,
    threads: int = 1,
    tell: Progress = lambda done, what: None,
) -> Quantised:
    """Write a model folder whose graph computes in int8 where fp32 bears it.

    Weights are int8 per output channel, activations int8 per tensor with zero at zero, as TensorRT wants them; the
    graph runs in ONNX Runtime, OpenVINO and TensorRT alike, asked for "fp32".

    Args:
        card: the model, with a graph.
        frames: uint8 [N, 224, 224, 3], BGR, N at least `MIN_FRAMES`; of what the model will see. Every other one is
            calibrated on, the rest decides whether the result is accepted.
        folder: of the new model, named as it is to be called; made here.
        threads: of the CPU.
        tell: told the progress.

    Raises:
        PrecisionRefused: not one layer can be quantised; nothing was written.
        ModelError, BackendUnavailable: the model's graph cannot be read or run.
        ValueError: too few frames.
        FileExistsError: the folder is there already.
        ImportError: the package onnx or onnxruntime is missing.
    """
    import onnx

    if len(frames) < MIN_FRAMES:
        raise ValueError(f"calibration needs {MIN_FRAMES} frames or more, found {len(frames)}; give a longer video")
    if folder.exists():
        raise FileExistsError(f"{folder} is there already; name another folder, or remove it")
    path = card.graph_path
    calibration, check = frames[::2], frames[1::2]
    tell(0.0, "fp32")
    wanted, known = (Reference.of(card, part, threads) for part in (check, calibration))
    model = onnx.shape_inference.infer_shapes(fold_constants(onnx.load(path)))
    quantiser = _Quantiser(model, calibration, threads)
    order = quantiser.by_harm(tell)

    tell(0.9, "layers together")
    low, high = 0, len(order)  # so many pass; no more than so many can
    while low < high:
        middle = (low + high + 1) // 2
        _, refused = known.judge(quantiser.outputs(order[:middle], calibration))
        low, high = (low, middle - 1) if refused else (middle, high)
    refused = "each layer alone is too much"
    while low > 0:
        with _beside(folder) as made:
            agreements, refused = _on_engines(quantiser.write(order[:low], made, card, folder.name), wanted, threads)
            if not refused:
                facts = {
                    "int8_layers": f"{low} of {len(order)}",
                    "compared_with": f"{card.model_id} in {wanted.name}",
                    "frames": len(check),
                    **{name: asdict(agreement) for name, agreement in agreements.items()},
                }
                found = replace(
                    quantiser.write(order[:low], made, card, folder.name),
                    metrics={"int8_against_fp32": facts},
                    training={"quantised_from": card.model_id, "calibrated_on_frames": len(calibration)},
                )
                found.write()
                made.rename(folder)
                return Quantised(replace(found, folder=folder), low, len(order), agreements)
        low = low * 7 // 8  # passed on the frames of the calibration, but not on the others
    raise PrecisionRefused(f"int8 agrees with {wanted.name} in no layer of {card.model_id}: {refused}")


class _Quantiser:
    """One graph and the ranges of its values."""

    def __init__(self, model: Any, frames: NDArray[np.uint8], threads: int) -> None:
        from onnxruntime.quantization import calibrate

        self._model, self._frames, self._threads = model, frames, threads
        constants = {tensor.name for tensor in model.graph.initializer}
        for index, node in enumerate(model.graph.node):
            node.name = node.name or f"node_{index}"
        self._layers = [n.name for n in model.graph.node if n.op_type in LAYERS and n.input[1] in constants]
        with tempfile.TemporaryDirectory() as folder, _quiet():
            import onnx

            onnx.save(model, Path(folder) / "model.onnx")
            calibrator = calibrate.create_calibrator(
                Path(folder) / "model.onnx", LAYERS, str(Path(folder) / "augmented.onnx")
            )
            calibrator.collect_data(_Reader(frames))
            self._ranges = calibrator.compute_data()

    def graph(self, layers: Sequence[str]) -> Any:
        """The graph with these layers in int8."""
        from onnxruntime.quantization import QuantType
        from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

        with _quiet():
            quantizer = QDQQuantizer(
                copy.deepcopy(self._model),
                per_channel=True,
                reduce_range=False,
                weight_qType=QuantType.QInt8,
                activation_qType=QuantType.QInt8,
                tensors_range=self._ranges,
                nodes_to_quantize=list(layers),
                nodes_to_exclude=[],
                op_types_to_quantize=list(LAYERS),
                extra_options={"ActivationSymmetric": True, "WeightSymmetric": True},
            )
            quantizer.quantize_model()
            quantizer.model.topological_sort()
        return quantizer.model.model

    def outputs(self, layers: Sequence[str], frames: NDArray[np.uint8]) -> Outputs:
        """What the graph gives with these layers in int8, computed as its nodes say."""
        from surg_perception.runtime.onnxruntime_backend import outputs_of

        model = self.graph(layers) if layers else self._model
        return outputs_of(model.SerializeToString(), frames, self._threads)

    def by_harm(self, tell: Progress) -> list[str]:
        """All layers, those first that use up the least of the bounds when they alone are in int8."""
        frames = self._frames[:: max(1, len(self._frames) // _FRAMES_PER_LAYER)][:_FRAMES_PER_LAYER]
        reference = self.outputs([], frames)
        harm = {}
        for index, layer in enumerate(self._layers):
            tell(0.1 + 0.8 * index / len(self._layers), f"layer {index + 1} of {len(self._layers)}")
            found = compare(self.outputs([layer], frames), reference)
            harm[layer] = max(
                (1 - found.latent_cosine) / (1 - MIN_LATENT_COSINE),
                found.probability_difference / MAX_PROBABILITY_DIFFERENCE,
            )
        return sorted(self._layers, key=lambda layer: harm[layer])

    def write(self, layers: Sequence[str], folder: Path, card: ModelCard, name: str) -> ModelCard:
        """A model folder with these layers in int8; its card, not yet written."""
        model = self.graph(layers)
        del model.graph.value_info[:], model.metadata_props[:]
        model.metadata_props.extend(self._model.metadata_props)
        graph = save_graph(model, folder / "model.onnx", {})
        for file in (card.temporal_file, card.forecast_file):
            if file is not None:
                shutil.copyfile(card.folder / file.name, folder / file.name)
        return replace(card, folder=folder, name=name, weights=None, graph=ModelFile.of(graph))


class _Reader:
    """Frames one by one, as ONNX Runtime's calibration takes them."""

    def __init__(self, frames: NDArray[np.uint8]) -> None:
        self._frames = iter(frames)

    def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
        frame = next(self._frames, None)
        return None if frame is None else {"frame": frame[np.newaxis]}


def _on_engines(card: ModelCard, wanted: Reference, threads: int) -> tuple[dict[str, Agreement], str]:
    """Agreement of each engine that is installed, and why the model is refused ("" if it is not)."""
    found: dict[str, Agreement] = {}
    for kind in ("onnxruntime", "openvino"):
        try:
            engine = BACKENDS[kind]()
        except BackendUnavailable:
            continue
        try:
            with engine(card, "CPU", "fp32", threads) as opened:
                single = [opened.infer(frame) for frame in wanted.frames]
        except Exception as error:
            return found, f"{kind} does not run it: {first_line(error)}"
        outputs = np.stack([p for p, _ in single]), np.stack([latent for _, latent in single])
        agreement, refused = wanted.judge(outputs)
        if refused:
            return found, f"{kind} {refused}"
        found[f"{kind}:CPU"] = agreement
    return found, ""


@contextmanager
def _beside(folder: Path) -> Iterator[Path]:
    """A folder that goes at the end, unless it was renamed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
    made.chmod(0o755)
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without advice to pre-process the graph, which `fold_constants` has done."""
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logging.root.setLevel(level)
