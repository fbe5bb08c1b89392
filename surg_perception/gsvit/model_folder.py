# SPDX-License-Identifier: Apache-2.0
"""Model folders with GSViT weights: writing one, opening one, making one from a released checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from surg_perception.gsvit.checkpoint import (
    CheckpointError,
    build_gsvit,
    load_gsvit,
    read_tensors,
    released_name,
)
from surg_perception.gsvit.network import GSViT
from surg_perception.models import (
    ForecastFacts,
    InputFacts,
    LabelFacts,
    ModelCard,
    ModelFile,
    NetworkFacts,
    TemporalFacts,
    read_card,
)

if TYPE_CHECKING:
    from surg_perception.gsvit.temporal import TemporalNetwork

_WEIGHTS, _GRAPH, _TEMPORAL, _FORECAST = "model.safetensors", "model.onnx", "temporal.safetensors", "forecast.onnx"


def save_model_folder(
    model: GSViT,
    folder: str | Path,
    *,
    name: str,
    version: str,
    labels: LabelFacts,
    metrics: Mapping[str, Any],
    training: Mapping[str, Any],
    licence: str,
    intended_use: str,
    weight_storage: str = "fp32",
    procedure: str = "",
    temporal: TemporalNetwork | None = None,
    forecast_gap_s: float | None = None,
) -> ModelCard:
    """Write `model.safetensors`, `model.onnx` and the card `model.yaml`, replacing those that are there.

    The card is written last, so an interrupted write leaves files that do not match their card, which every
    loader refuses. Weights lie under the released names (`gsvit.checkpoint`).

    Args:
        model: exported in evaluation mode, left as it is.
        folder: made if it does not exist.
        name, version, labels, metrics, training, licence, intended_use: of the card (`ModelCard`).
        weight_storage: "fp32", or "fp16" for files half as big (`runtime.export.export_onnx`). Call
            `round_matrices_to_fp16` before measuring a model that is to be stored so.
        procedure: what surgery the model is for; "" for any.
        temporal: causal temporal head, written as `temporal.safetensors`.
        forecast_gap_s: how far ahead the model's decoder looks, in seconds; writes `forecast.onnx`, with which
            the running pipeline forecasts. None leaves the decoder to the weights alone.

    Raises:
        ValueError: not as many label names as the model has classes, or a forecast without a decoder.
        surg_perception.models.ModelError: a value that a card cannot have.
    """
    from safetensors.torch import save_file

    from surg_perception.runtime.export import export_onnx

    if len(labels.names) != model.config.classes:
        raise ValueError(f"{len(labels.names)} label names given for a model of {model.config.classes} classes")
    if forecast_gap_s is not None and model.decoder is None:
        raise ValueError(f"a forecast {forecast_gap_s} s ahead was asked for, but the model has no frame decoder")
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    temporal_file = forecast_file = None
    if temporal is not None:
        from surg_perception.gsvit.temporal import save_temporal

        save_temporal(temporal, folder / _TEMPORAL)
        temporal_file = ModelFile.of(folder / _TEMPORAL)
    if forecast_gap_s is not None:
        from surg_perception.runtime.export import export_forecast_onnx

        export_forecast_onnx(model, folder / _FORECAST, weight_storage=weight_storage)
        forecast_file = ModelFile.of(folder / _FORECAST)
    graph = export_onnx(model, folder / _GRAPH, weight_storage=weight_storage, phases=labels.names)
    weights, partial = folder / _WEIGHTS, folder / f".{_WEIGHTS}.{os.getpid()}.partial"
    try:
        save_file(_stored_tensors(model, weight_storage), partial)
        partial.chmod(graph.stat().st_mode)  # safetensors makes files that only their owner can read
        os.replace(partial, weights)
    finally:
        partial.unlink(missing_ok=True)
    config = model.config
    card = ModelCard(
        folder=folder,
        name=name,
        version=version,
        network=NetworkFacts(
            architecture="gsvit",
            size=config.size,
            head_hidden=config.head_hidden if config.classes else (),
            latent_shape=model.latent_shape,
            decoder=config.decoder,
            predict_change=config.predict_change,
            decoder_width=config.decoder_width,
            decoder_rank=config.decoder_rank,
        ),
        input=InputFacts(),
        labels=labels,
        temperature=float(model.head.temperature) if model.head is not None else 1.0,
        metrics=dict(metrics),
        training=dict(training),
        licence=licence,
        intended_use=intended_use,
        weights=ModelFile.of(weights),
        graph=ModelFile.of(graph),
        procedure=procedure,
        temporal=_temporal_facts(temporal),
        temporal_file=temporal_file,
        forecast=None if forecast_gap_s is None else ForecastFacts(forecast_gap_s),
        forecast_file=forecast_file,
    )
    card.write()
    return card


def _temporal_facts(temporal: TemporalNetwork | None) -> TemporalFacts | None:
    if temporal is None:
        return None
    config = temporal.config
    return TemporalFacts(config.stages, config.layers, config.channels, config.inputs, config.step_s)


def load_model_folder(folder: str | Path) -> GSViT:
    """Open the weights of a model folder after comparing them with the card; see `load_gsvit`.

    Raises:
        surg_perception.models.ModelError: no card, or a card that cannot be read, or weights that are missing
            or not the ones that the card names (`CheckpointError` where their tensors are wrong).
    """
    card = read_card(folder)
    card.verify("weights")
    facts = card.network
    model = build_gsvit(
        read_tensors(card.weights_path),
        size=facts.size,
        predict_change=facts.predict_change,
        source=str(card.weights_path),
    )
    found = (
        model.config.decoder,
        model.config.classes,
        model.config.head_hidden if model.config.classes else (),
    )
    said = (facts.decoder, len(card.labels.names), facts.head_hidden)
    if found != said:
        raise CheckpointError(
            f"{card.weights_path} has decoder, classes, hidden widths {found}, but its card says {said}; "
            "correct the card or copy the model folder again, whole"
        )
    return model


def import_released(
    path: str | Path,
    folder: str | Path,
    *,
    name: str,
    licence: str = "that of the imported checkpoint",
    version: str = "released",
    size: str = "m5",
    predict_change: bool = False,
    keep_decoder: bool = True,
    weight_storage: str = "fp32",
) -> ModelCard:
    """Turn a released checkpoint (`GSViT.pkl`, `GSViT-<Procedure>.pkl`) into a model folder.

    A released checkpoint has no phase head: the folder's graph has the one output `latent`, and its card
    names no phases. The weights keep its decoder (1.3 GB) unless told otherwise; the graph never has it.

    Args:
        path, size, predict_change: as in `load_gsvit`.
        folder, name, version, licence, weight_storage: as in `save_model_folder`; the licence is that under
            which the user holds the weights.
        keep_decoder: whether the folder's weights keep the next-frame decoder.

    Raises:
        FileNotFoundError, surg_perception.models.ModelError: as `load_gsvit` and `save_model_folder`.
    """
    model = load_gsvit(path, size=size, predict_change=predict_change)
    if model.head is not None:
        raise CheckpointError(f"{path} has a phase head, so it is no released GSViT checkpoint; use its model folder")
    if not keep_decoder:
        model.drop_decoder()
    return save_model_folder(
        model,
        folder,
        name=name,
        version=version,
        labels=LabelFacts("", ()),
        metrics={},
        training={"data": "as published with the checkpoint", "imported_from": asdict(ModelFile.of(path))},
        licence=licence,
        intended_use="Research. Latent features and no phases: the checkpoint has no phase head. Not a medical device.",
        weight_storage=weight_storage,
    )


@torch.no_grad()
def round_matrices_to_fp16(model: GSViT) -> GSViT:
    """Round, in place, every weight that "fp16" storage rounds: what is measured is then what is stored."""
    for parameter in model.parameters():
        if _fits_fp16(parameter):
            parameter.copy_(parameter.to(torch.float16))
    return model


def _fits_fp16(tensor: Tensor) -> bool:
    """Whether "fp16" storage takes it: matrices do, vectors are few and their precision counts."""
    return tensor.ndim >= 2 and float(tensor.abs().max()) <= torch.finfo(torch.float16).max


def _stored_tensors(model: GSViT, weight_storage: str) -> dict[str, Tensor]:
    """Tensors by released name, without the batch-norm counters, matrices as fp16 if asked for."""
    half = weight_storage == "fp16"
    return {
        released_name(name): (value.to(torch.float16) if half and _fits_fp16(value) else value).cpu().contiguous()
        for name, value in model.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
