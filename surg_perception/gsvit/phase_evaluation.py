# SPDX-License-Identifier: Apache-2.0
"""Evaluate phase recognition: a model on a data set, with the code of the running pipeline, or saved predictions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from surg_perception.data.datasets import Dataset, Video
from surg_perception.data.frame_cache import cached_frames
from surg_perception.data.label_files import DatasetError, phase_index
from surg_perception.data.labels import LABEL_SETS
from surg_perception.gsvit.phase_labels_io import align_folders, read_phase_folder, write_phase_file
from surg_perception.gsvit.phase_metrics import VideoPhases, evaluate
from surg_perception.models import ModelCard, ModelError, find_model
from surg_perception.runtime import open_backend
from surg_perception.runtime.backend import Backend
from surg_perception.stream.phase_pipeline import PhasePipeline, PhaseSettings
from surg_perception.stream.temporal_head import TemporalHead

VARIANTS = {
    "published": "what the node publishes: after filter and hysteresis",
    "temporal_head": "the most probable phase of the temporal head, before hysteresis",
    "single_frame": "the most probable phase of the frame head, each frame alone",
}
"""Predictions of one model. metrics.json is about the first; "temporal_head" exists where the model has one."""


@dataclass(frozen=True)
class Evaluation:
    """What was evaluated and what came out.

    Attributes:
        metrics: content of metrics.json.
        videos: what `metrics` was computed from.
        phases: names.
        source: what was evaluated, for the report's reader.
    """

    metrics: dict[str, Any]
    videos: list[VideoPhases]
    phases: tuple[str, ...]
    source: str


def evaluate_folders(
    labels: str | Path,
    predictions: str | Path,
    *,
    label_set: str = "cholec80",
    videos: Sequence[str] | None = None,
    first_number: int | None = None,
    frame_unit: str = "auto",
    rate_hz: float | None = None,
) -> Evaluation:
    """Evaluate saved predictions against labels, both one text file per video.

    Args:
        labels, predictions: folders; the labels may hold more videos than the predictions.
        label_set: a name of `LABEL_SETS`.
        videos: only these; every predicted one unless told.
        first_number, frame_unit: as `align_folders`.
        rate_hz: of the evaluation; unless told 1 fps, and for M2CAI16, as in its challenge, all samples.

    Raises:
        DatasetError: a folder or file that cannot be used; see `align_folders`.
    """
    if label_set not in LABEL_SETS:
        raise DatasetError(f"unknown label set {label_set!r}, expected one of {', '.join(LABEL_SETS)}")
    phases = LABEL_SETS[label_set]
    if rate_hz is None and label_set != "m2cai16":
        rate_hz = 1.0
    aligned, notes = align_folders(
        read_phase_folder(labels),
        read_phase_folder(predictions, videos),
        phases,
        first_number=first_number,
        frame_unit=frame_unit,
        rate_hz=rate_hz,
    )
    metrics = evaluate(aligned, phases, label_set)
    metrics["notes"] = notes
    return Evaluation(metrics, aligned, phases, f"predictions in {Path(predictions).resolve().name}/")


def evaluate_model(
    model: str | Path | ModelCard,
    dataset: Dataset,
    out: str | Path,
    *,
    backend: str = "auto",
    precision: str = "fp32",
    device: str | None = None,
    threads: int | None = None,
    cache: Path | None = None,
    console: Console | None = None,
) -> Evaluation:
    """Run a model over a data set with the code of the running pipeline, and evaluate what it says.

    Each video starts the pipeline anew; its frames go through it one after another with their own times, as
    they are sampled (where they come every 4 s, that is what is evaluated, and the notes say so). A blank
    picture has no phase in the pipeline; here the last phase stays, the first one of the label set before any.

    Under `out`: `truth/` and, for each of `VARIANTS`, `predictions_<variant>/`, with one text file per video, and
    `probabilities/<video>.npz`. A video whose npz is there, from the same model, engine, filter and
    sample times, is not run again.

    Args:
        model: what `find_model` takes, or a card; its files are checked against their sha256.
        dataset: with the model's phases.
        out: folder, made where it is missing.
        backend, precision, device, threads: as `open_backend`.
        cache: folder of frames kept at the network's size (`cached_frames`); each run decodes anew unless given.
        console: for progress; none unless given.

    Raises:
        ModelError: a model without phases, or of other phases than the data set's.
        DatasetError: a data set without labels, or a frame that cannot be read.
        BackendUnavailable, InferenceError, ModelOutputError: the model does not run.
    """
    card = model if isinstance(model, ModelCard) else find_model(model)
    card.verify()
    order = _phase_order(card, dataset)
    scored = [video for video in dataset.videos if (video.phases >= 0).any()]
    if not scored:
        raise DatasetError(
            f"{dataset.path}: none of its {len(dataset.videos)} videos has phase labels to score against"
        )
    out = Path(out)
    variants: dict[str, list[VideoPhases]] = {}
    with (
        open_backend(card, backend, precision, device=device, threads=threads) as engine,
        _progress(console) as progress,
    ):
        for video in scored:
            answers = _answers(engine, video, order, out, cache, progress)
            for name, result in _as_predictions(video, answers, temporal=card.temporal is not None).items():
                variants.setdefault(name, []).append(result)
                write_phase_file(
                    _made(out / f"predictions_{name}") / f"{video.name}-phase.txt",
                    *(video.times_s, result.prediction, dataset.phases),
                )
            write_phase_file(
                _made(out / "truth") / f"{video.name}-phase.txt", video.times_s, video.phases, dataset.phases
            )
        ran = engine.name
    results = {name: evaluate(videos, dataset.phases, dataset.label_set) for name, videos in variants.items()}
    notes = [f"{card.model_id} on {ran}, with the default filter of the node"]
    if len(scored) < len(dataset.videos):
        notes.append(f"{len(dataset.videos) - len(scored)} videos without phase labels were left out")
    metrics = results.pop("published")
    metrics |= {"model": card.model_id, "backend": ran, "data": dataset.kind, "notes": notes, "variants": results}
    return Evaluation(metrics, variants["published"], dataset.phases, f"{card.model_id} on {dataset.kind}")


def _phase_order(card: ModelCard, dataset: Dataset) -> NDArray[np.int64]:
    """Index into the data set's phases for each phase of the model."""
    if not card.labels.names:
        raise ModelError(
            f"{card.name} has no phase head, so there is no phase to evaluate; train one with `train phase`"
        )
    found = [phase_index(name, dataset.phases) for name in card.labels.names]
    if not dataset.phases or None in found or len(found) != len(dataset.phases):
        raise ModelError(
            f"{card.name} knows {', '.join(card.labels.names)}, but {dataset.path} is labelled with "
            f"{', '.join(dataset.phases) or 'nothing'}: choose a model and a data set of the same phases"
        )
    return np.array(found, np.int64)


def _answers(
    engine: Backend, video: Video, order: NDArray[np.int64], out: Path, cache: Path | None, progress: Progress
) -> dict[str, NDArray[Any]]:
    """The pipeline's answers for one video, from its npz where that is of the same run, else computed and kept.

    times_s, truth, phase_id (-1: none) and confidence [n]; frame_probabilities and smoothed float32 [n, C], over
    the data set's phases, NaN where there are none.
    """
    card, settings = engine.card, PhaseSettings()
    run = [card.model_id, [file.sha256 for file in card.files.values()], engine.name, asdict(settings), order.tolist()]
    key = hashlib.sha256(json.dumps(run).encode() + video.times_s.tobytes()).hexdigest()
    path = _made(out / "probabilities") / f"{video.name}.npz"
    if path.is_file():
        with np.load(path) as stored:
            answers = {name: stored[name] for name in stored.files}
        if str(answers.pop("run", "")) == key:
            return answers
    head = TemporalHead.open(card.temporal_path) if card.temporal else None
    pipeline = PhasePipeline(engine, card.labels.names, settings, head)
    count, width = len(video.times_s), len(order)
    answers = {
        "times_s": video.times_s,
        "truth": video.phases,
        "phase_id": np.full(count, -1, np.int64),
        "confidence": np.full(count, np.nan),
        "frame_probabilities": np.full((count, width), np.nan, np.float32),
        "smoothed": np.full((count, width), np.nan, np.float32),
    }
    frames = video.frames() if cache is None else cached_frames(video, cache)
    task = progress.add_task(video.name, total=count)
    for row, (frame, time_s) in enumerate(zip(frames, video.times_s, strict=True)):
        result = pipeline.process_frame(frame, round(time_s * 1e9))
        if result.phase_id >= 0:
            answers["phase_id"][row] = order[result.phase_id]
            answers["confidence"][row] = result.confidence
            answers["frame_probabilities"][row, order] = result.probabilities
            answers["smoothed"][row, order] = result.smoothed
        progress.advance(task)
    progress.remove_task(task)
    partial = path.with_suffix(".part")
    with partial.open("wb") as file:
        np.savez_compressed(file, run=np.array(key), **answers)
    partial.replace(path)
    return answers


def _as_predictions(video: Video, answers: dict[str, NDArray[Any]], *, temporal: bool) -> dict[str, VideoPhases]:
    """The answers as one prediction per variant."""
    none = answers["phase_id"] < 0
    notes = [f"one sample every {step_s:g} s"] if (step_s := _step_s(video)) > 1.5 else []
    if none.any():
        notes.append(f"{int(none.sum())} blank pictures, for which the last phase stays")
    most_probable = {"single_frame": "frame_probabilities"} | ({"temporal_head": "smoothed"} if temporal else {})
    found = {"published": (answers["phase_id"], answers["confidence"])}
    for name, key in most_probable.items():
        table = np.where(none[:, None], -1.0, answers[key])
        found[name] = (np.where(none, -1, table.argmax(axis=1)), np.where(none, np.nan, table.max(axis=1)))
    return {
        name: VideoPhases(video.name, video.times_s, video.phases, _held(ids), confidence, tuple(notes))
        for name, (ids, confidence) in found.items()
    }


def _held(ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Phases with each -1 replaced by the one before it, 0 where there is none."""
    last = np.maximum.accumulate(np.where(ids >= 0, np.arange(len(ids)), -1))
    return np.where(last >= 0, ids[last], 0)


def _step_s(video: Video) -> float:
    return float(np.median(np.diff(video.times_s))) if len(video.times_s) > 1 else 1.0


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _progress(console: Console | None) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=console is None,
        transient=True,
    )
