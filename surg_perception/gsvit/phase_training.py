# SPDX-License-Identifier: Apache-2.0
"""Phase training: a phase head on GSViT's latents, encoder frozen or trained along, then a causal temporal head.

Frozen, as in the paper (arXiv 2403.05949): latents of the frames and of augmented views of them are computed once
and the head learns from these. Fine-tuned: encoder and head learn from images, augmented anew in each step; where
the data has tool labels, a second, smaller task (which tools are seen, as in EndoNet, arXiv 1602.03012) shapes the
encoder and is then dropped. The temporal head (`gsvit.temporal`) learns from the latents of the trained encoder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

from surg_perception.data.datasets import Dataset
from surg_perception.data.frame_cache import cached_frames
from surg_perception.gsvit.augment import augment
from surg_perception.gsvit.calibration import best_temperature
from surg_perception.gsvit.model_folder import round_matrices_to_fp16, save_model_folder
from surg_perception.gsvit.network import GSViT, GSViTConfig, PhaseHead
from surg_perception.gsvit.pretrain import model_licence, read_start
from surg_perception.gsvit.resequence import LabelledSurgery, resequence
from surg_perception.gsvit.temporal import LatentSequence, TemporalNetwork, TemporalSettings, train_temporal
from surg_perception.gsvit.trainer import Task, TrainSettings, fit, order_of_groups
from surg_perception.models import CARD_NAME, LabelFacts, ModelCard, ModelFile, read_card
from surg_perception.stream.temporal_head import pool_latents

FROZEN = TrainSettings(
    epochs=20,
    batch=128,
    learning_rate=3e-4,
    final_learning_rate=3e-5,
    schedule="exponential",
    optimiser="adamw",
    weight_decay=0.05,
    ema_half_life_steps=50.0,
)
FINE_TUNED = TrainSettings(
    epochs=6,
    batch=32,
    learning_rate=5e-4,
    final_learning_rate=5e-6,
    schedule="one_cycle",
    optimiser="adamw",
    weight_decay=0.05,
    gradient_clip=1.0,
    ema_half_life_steps=100.0,
    channels_last=True,
)
_TOOL_CLASSES = 7


@dataclass(frozen=True)
class PhaseOptions:
    """What is trained.

    Attributes:
        start: encoder weights: a model folder, a released checkpoint or an encoder's safetensors; None for random.
        size: EfficientViT variant where `start` does not tell.
        frozen: the encoder stays as it is; otherwise it learns too.
        head_hidden: widths of the phase head; (2048, 512) in the paper.
        class_weights: weigh classes by median frequency.
        label_smoothing: share of the truth spread over all phases.
        tools_weight: of the tool task in fine-tuning; 0 for none.
        frames_of_a_video: at most this many frames of each video in an epoch, drawn anew each time; 0 for all. With
            few videos, a long one would outweigh the others.
        views: augmented views of each frame for frozen training and for the temporal head.
        temporal: the temporal head's network and training; None for no temporal head. Its `features` and `classes`
            are set here.
        surgeries: labels of further surgeries, from which the temporal head learns too (`gsvit.resequence`).
        validation: videos kept back, which calibrate the temperatures and are measured.
        temperatures: of frame head and temporal head, measured elsewhere (as by leaving one video out); None to
            calibrate on `validation`, or to leave them at 1 where there is none.
    """

    start: Path | None = None
    size: str | None = None
    frozen: bool = False
    head_hidden: tuple[int, ...] = (2048, 512)
    class_weights: bool = False
    label_smoothing: float = 0.1
    tools_weight: float = 0.5
    frames_of_a_video: int = 500
    views: int = 2
    temporal: TemporalSettings | None = None
    surgeries: tuple[LabelledSurgery, ...] = ()
    validation: tuple[str, ...] = ()
    temperatures: tuple[float, float] | None = None


@dataclass(frozen=True)
class LabelledVideo:
    """Frames uint8 [n, 224, 224, 3] BGR of a video with what is known of them; -1 where it is not.

    `phases` int64 [n]; `tools` float32 [n, 7]; `times_s` float64 [n].
    """

    name: str
    frames: NDArray[np.uint8]
    times_s: NDArray[np.float64]
    phases: NDArray[np.int64]
    tools: NDArray[np.float32]


@dataclass(frozen=True)
class VideoLatents:
    """Latents float32 [n, D, 4, 4] of a video's frames and of each of its augmented views."""

    video: LabelledVideo
    latents: NDArray[np.float32]
    views: tuple[NDArray[np.float32], ...]


def open_videos(datasets: Sequence[Dataset], cache: Path) -> list[LabelledVideo]:
    """The labelled videos of data sets that share one set of phases.

    Raises:
        ValueError: different phases, or no labelled video.
    """
    names = {dataset.phases for dataset in datasets}
    if len(names) != 1:
        raise ValueError(
            f"the data sets have {len(names)} different sets of phases ({'; '.join(', '.join(n) for n in names)}); "
            "train a model for each"
        )
    videos = []
    for video in (video for dataset in datasets for video in dataset.videos):
        if (video.phases >= 0).any():
            unknown = np.full((len(video.times_s), _TOOL_CLASSES), -1)
            tools = unknown if video.tools is None else video.tools
            frames = cached_frames(video, cache)
            videos.append(LabelledVideo(video.name, frames, video.times_s, video.phases, tools.astype(np.float32)))
    if not videos:
        raise ValueError("no video has phase labels; `surg-perception data check` tells what was found")
    return videos


# ---- latents -----------------------------------------------------------------------------------------------


@torch.no_grad()
def latents_of(model: GSViT, frames: NDArray[np.uint8], batch: int = 32) -> NDArray[np.float32]:
    """Latents [n, D, 4, 4] of BGR frames uint8 [n, 224, 224, 3]; the model is put into evaluation mode."""
    model.eval()
    device = next(model.parameters()).device
    out = np.empty((len(frames), *model.latent_shape), np.float32)
    for start in range(0, len(frames), batch):
        out[start : start + batch] = model.features(_images(frames[start : start + batch]).to(device)).cpu().numpy()
    return out


def all_latents(model: GSViT, videos: Sequence[LabelledVideo], views: int, console: Console) -> list[VideoLatents]:
    """Latents of videos and of `views` augmented views of each frame, which are the same in each run."""
    found = []
    for video in track(videos, "latents", console=console):
        versions = []
        for view in range(views):
            rng = np.random.default_rng([view, *hashlib.sha256(video.name.encode()).digest()[:4]])
            parts = [augment(np.asarray(video.frames[i : i + 32]), rng) for i in range(0, len(video.frames), 32)]
            versions.append(latents_of(model, np.concatenate(parts)))
        found.append(VideoLatents(video, latents_of(model, video.frames), tuple(versions)))
    return found


def _images(frames: NDArray[np.uint8]) -> Tensor:
    """uint8 [n, 224, 224, 3] to float [n, 3, 224, 224] in 0..1."""
    return torch.from_numpy(np.array(frames)).permute(0, 3, 1, 2).to(torch.float32) / 255.0


# ---- tasks -------------------------------------------------------------------------------------------------


def class_weights(phases: NDArray[np.int64], classes: int) -> Tensor:
    """Median-frequency weights float32 [C] (Eigen & Fergus, arXiv 1411.4734); 0 for a class that does not occur."""
    counts = np.bincount(phases[phases >= 0], minlength=classes).astype(np.float64)
    weights = np.divide(np.median(counts[counts > 0]), counts, out=np.zeros(classes), where=counts > 0)
    return torch.from_numpy(weights.astype(np.float32))


class HeadTask(Task):
    """The phase head on latents that were computed before."""

    def __init__(
        self, model: GSViT, training: Sequence[VideoLatents], validation: Sequence[VideoLatents], options: PhaseOptions
    ) -> None:
        assert model.head is not None
        self.module, self.options, self.validation = model.head, options, list(validation)
        known = [entry.video.phases >= 0 for entry in training]
        versions = len(training[0].views) + 1
        self._latents = [
            torch.from_numpy(
                np.concatenate([(e.latents, *e.views)[v][k] for e, k in zip(training, known, strict=True)])
            )
            for v in range(versions)
        ]
        self._phases = np.concatenate([e.video.phases[k] for e, k in zip(training, known, strict=True)])
        self.samples = len(self._phases)
        self._groups = np.repeat(np.arange(len(known)), [int(one.sum()) for one in known])
        self._weights = class_weights(self._phases, model.config.classes) if options.class_weights else None
        self._names = [entry.video.name for entry in training]

    def identity(self) -> Mapping[str, Any]:
        return {"videos": self._names, **_identity(self.options)}

    def order(self, epoch: int, rng: np.random.Generator) -> NDArray[np.int64]:
        return order_of_groups(self._groups, self.options.frames_of_a_video, rng)

    def batch(self, indices: NDArray[np.int64], rng: np.random.Generator) -> dict[str, Tensor]:
        versions = rng.integers(len(self._latents), size=len(indices))
        rows = [self._latents[v][i] for v, i in zip(versions, indices, strict=True)]
        return {"latent": torch.stack(rows), "phase": torch.from_numpy(self._phases[indices])}

    def loss(self, module: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        return _phase_loss(module(batch["latent"]), batch["phase"], self._weights, self.options), {}

    def end_of_epoch(self, epoch: int, module: nn.Module, folder: Path) -> dict[str, float]:
        pairs = ((module(torch.from_numpy(e.latents)), e.video.phases) for e in self.validation)
        return _accuracy(pairs)


class EndToEnd(nn.Module):
    """Encoder, phase head and the tool task's linear head."""

    def __init__(self, model: GSViT) -> None:
        super().__init__()
        self.model = model
        self.tools = nn.Linear(model.latent_shape[0], _TOOL_CLASSES)

    def forward(self, bgr: Tensor) -> tuple[Tensor, Tensor]:
        """BGR [B, 3, 224, 224] in 0..1 to logits of phases [B, C] and of tools [B, 7]."""
        assert self.model.head is not None
        latent = self.model.features(bgr)
        return self.model.head(latent), self.tools(latent.mean((2, 3)))


class EndToEndTask(Task):
    """Encoder and phase head on images."""

    def __init__(
        self,
        model: GSViT,
        training: Sequence[LabelledVideo],
        validation: Sequence[LabelledVideo],
        options: PhaseOptions,
    ) -> None:
        self.training, self.validation, self.options = list(training), list(validation), options
        self._index = np.concatenate(
            [[(number, i) for i in np.flatnonzero(video.phases >= 0)] for number, video in enumerate(training)]
        )
        self.samples = len(self._index)
        phases = np.concatenate([video.phases for video in training])
        self._weights = class_weights(phases, model.config.classes) if options.class_weights else None
        self.module = EndToEnd(model)

    def identity(self) -> Mapping[str, Any]:
        return {"videos": [video.name for video in self.training], **_identity(self.options)}

    def order(self, epoch: int, rng: np.random.Generator) -> NDArray[np.int64]:
        return order_of_groups(self._index[:, 0], self.options.frames_of_a_video, rng)

    def batch(self, indices: NDArray[np.int64], rng: np.random.Generator) -> dict[str, Tensor]:
        chosen = self._index[indices]
        frames = np.stack([self.training[v].frames[i] for v, i in chosen])
        return {
            "bgr": _images(augment(frames, rng)),
            "phase": torch.from_numpy(np.array([self.training[v].phases[i] for v, i in chosen])),
            "tools": torch.from_numpy(np.stack([self.training[v].tools[i] for v, i in chosen])),
        }

    def loss(self, module: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        phases, tools = module(batch["bgr"])
        phase_loss = _phase_loss(phases, batch["phase"], self._weights, self.options)
        known = (batch["tools"] >= 0).to(torch.float32)
        tool_loss = F.binary_cross_entropy_with_logits(tools, batch["tools"].clamp_min(0.0), known)
        return phase_loss + self.options.tools_weight * tool_loss, {
            "phase": float(phase_loss.detach()),
            "tools": float(tool_loss.detach()),
        }

    def end_of_epoch(self, epoch: int, module: nn.Module, folder: Path) -> dict[str, float]:
        assert isinstance(module, EndToEnd)
        assert module.model.head is not None
        head = module.model.head
        device = next(module.parameters()).device
        return _accuracy(
            (head(torch.from_numpy(latents_of(module.model, video.frames)).to(device)).cpu(), video.phases)
            for video in self.validation
        )


def _phase_loss(logits: Tensor, phases: Tensor, weights: Tensor | None, options: PhaseOptions) -> Tensor:
    weights = None if weights is None else weights.to(logits.device)
    return F.cross_entropy(logits, phases, weight=weights, label_smoothing=options.label_smoothing)


def _accuracy(pairs: Iterator[tuple[Tensor, NDArray[np.int64]]]) -> dict[str, float]:
    """Mean over videos of the share of known frames that are right."""
    shares = [float((logits.argmax(1).numpy() == phases)[phases >= 0].mean()) for logits, phases in pairs]
    return {"accuracy": float(np.mean(shares))} if shares else {}


def _identity(options: PhaseOptions) -> dict[str, Any]:
    kept = asdict(replace(options, temporal=None, surgeries=(), start=None, temperatures=None))
    return {key: value for key, value in kept.items() if value is not None} | {"start": str(options.start)}


# ---- the whole ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PhaseModel:
    """What `train_phase` gives.

    Attributes:
        model, temporal: the network with its phase head, and the temporal head or None; in evaluation mode.
        training: latents of the training videos; empty where neither frozen training nor a temporal head asks for
            them.
        validation: latents of the videos kept back.
        start: what a card says of the start weights.
    """

    model: GSViT
    temporal: TemporalNetwork | None
    training: tuple[VideoLatents, ...]
    validation: tuple[VideoLatents, ...]
    start: dict[str, Any]


def train_phase(
    videos: Sequence[LabelledVideo],
    classes: int,
    options: PhaseOptions,
    settings: TrainSettings,
    folder: Path,
    *,
    resume: bool = True,
    console: Console | None = None,
) -> PhaseModel:
    """Train phase head, encoder if it is not frozen, and temporal head.

    Args:
        videos: training videos and those of `options.validation`.
        classes: number of phases.
        options, settings: what and how.
        folder: of the training's state (`trainer.fit`).
        resume, console: as `fit`.

    Raises:
        ValueError: no training video, or a validation video that is not there.
        TrainingError: as `fit`.
    """
    console = console or Console()
    missing = set(options.validation) - {video.name for video in videos}
    training = [video for video in videos if video.name not in options.validation]
    validation = [video for video in videos if video.name in options.validation]
    if missing or not training:
        raise ValueError(
            f"videos {', '.join(video.name for video in videos)} found; expected among them the validation videos "
            f"{', '.join(options.validation)} and at least one other with phase labels to train on"
        )
    model, start = _start(options, settings.seed)
    torch.manual_seed(settings.seed)
    model.add_phase_head(classes, options.head_hidden)
    if options.frozen:
        latents = all_latents(model, training, options.views, console)
        held_back = all_latents(model, validation, 0, console)
        head = fit(HeadTask(model, latents, held_back, options), settings, folder, resume=resume, console=console)
        assert isinstance(head, PhaseHead)
        model.head = head
    else:
        model.drop_decoder()  # it reads latents of the encoder as it was
        trained = fit(
            EndToEndTask(model, training, validation, options), settings, folder, resume=resume, console=console
        )
        assert isinstance(trained, EndToEnd)
        model = trained.model
        held_back = all_latents(model, validation, 0, console)
        latents = all_latents(model, training, options.views, console) if options.temporal else []
    model.requires_grad_(False).eval()
    temporal = None
    if options.temporal is not None:
        config = replace(options.temporal.config, features=model.latent_shape[0], classes=classes)
        donors = [sequence(model, entry) for entry in latents]
        temporal = train_temporal(
            temporal_sequences(donors, [entry.video.tools for entry in latents], options.surgeries, options.temporal),
            replace(options.temporal, config=config),
            [sequence(model, entry) for entry in held_back],
            console,
        )
    assert model.head is not None
    if options.temperatures is not None:
        model.head.temperature.fill_(options.temperatures[0])
        if temporal is not None:
            temporal.temperature.fill_(options.temperatures[1])
    elif held_back:
        logits = torch.cat([head_logits(model, entry.latents) for entry in held_back])
        phases = torch.from_numpy(np.concatenate([entry.video.phases for entry in held_back]))
        model.head.temperature.fill_(best_temperature(logits, phases))
    return PhaseModel(model, temporal, tuple(latents), tuple(held_back), start)


@torch.no_grad()
def head_logits(model: GSViT, latents: NDArray[np.float32]) -> Tensor:
    """Uncalibrated logits [n, C] of the phase head on latents [n, D, 4, 4]."""
    assert model.head is not None
    return model.head(torch.from_numpy(latents))


def sequence(model: GSViT, entry: VideoLatents) -> LatentSequence:
    """A video as the temporal head sees it."""

    def probabilities(latents: NDArray[np.float32]) -> NDArray[np.float32]:
        assert model.head is not None
        return torch.softmax(head_logits(model, latents) / model.head.temperature, 1).numpy()

    return LatentSequence(
        latents=pool_latents(entry.latents),
        probabilities=probabilities(entry.latents),
        times_s=entry.video.times_s,
        phases=entry.video.phases,
        name=entry.video.name,
        versions=[pool_latents(view) for view in entry.views],
        version_probabilities=[probabilities(view) for view in entry.views],
    )


def temporal_sequences(
    donors: Sequence[LatentSequence],
    tools: Sequence[NDArray[np.float32]],
    surgeries: Sequence[LabelledSurgery],
    settings: TemporalSettings,
) -> list[LatentSequence]:
    """What the temporal head learns from in an epoch: the training videos, and surgeries filled with their latents.

    Beside surgeries, each training video comes three times, so that real sequences keep their weight.
    """
    if not surgeries:
        return list(donors)
    rng = np.random.default_rng(settings.seed)
    seen = [one.astype(np.int8) for one in tools]
    return [*donors, *donors, *donors, *resequence(donors, seen, surgeries, settings.config.step_s, rng)]


def _start(options: PhaseOptions, seed: int) -> tuple[GSViT, dict[str, Any]]:
    """The network to train, with the start's decoder and without a phase head, and what a card says of the start."""
    torch.manual_seed(seed)
    if options.start is None:
        return GSViT(GSViTConfig(options.size or "m5", decoder=False)), {"start_weights": "random"}
    model = read_start(options.start, options.size)
    model.head, model.config = None, replace(model.config, classes=0)
    if not (options.start / CARD_NAME).is_file():
        return model.train(), {"start_weights": asdict(ModelFile.of(options.start))}
    card = read_card(options.start)
    return model.train(), {"start_weights": card.model_id, "start_training": card.training}


def train_phase_model(
    datasets: Sequence[Dataset],
    out: Path,
    options: PhaseOptions,
    settings: TrainSettings,
    *,
    cache: Path,
    name: str | None = None,
    licence: str | None = None,
    weight_storage: str = "fp32",
    procedure: str = "",
    resume: bool = True,
    console: Console | None = None,
) -> ModelCard:
    """Train on data sets and write a model folder; killed and called again, it goes on.

    Args:
        datasets: labelled, with the same phases, opened at the rate at which frames are to be used.
        out: the model folder; the training's own files are in `out/training`.
        options, settings: what and how.
        cache: where resized frames are kept.
        name, licence, weight_storage, procedure: of the card (`model_folder.save_model_folder`); the licence is
            what data and start weights demand unless told.
        resume, console: as `trainer.fit`.

    Raises:
        ValueError, TrainingError: as `train_phase` and `open_videos`.
    """
    videos = open_videos(datasets, cache)
    phases = datasets[0].phases
    trained = train_phase(videos, len(phases), options, settings, out / "training", resume=resume, console=console)
    if weight_storage == "fp16":
        round_matrices_to_fp16(trained.model)
    gap_s = None
    if trained.model.decoder is not None and options.start is not None and (options.start / CARD_NAME).is_file():
        forecast = read_card(options.start).forecast
        gap_s = forecast.gap_s if forecast is not None else None
    return save_model_folder(
        trained.model,
        out,
        name=name or out.resolve().name,
        version="0.1.0",
        labels=LabelFacts(datasets[0].label_set, phases),
        metrics=_measured(trained),
        training=trained.start
        | {
            "data": [f"{dataset.kind}: {', '.join(video.name for video in dataset.videos)}" for dataset in datasets],
            "videos": [video.name for video in videos if video.name not in options.validation],
            "validation": list(options.validation),
            "options": {k: v for k, v in _identity(options).items() if k not in ("start", "surgeries", "validation")},
            "settings": asdict(settings),
            "temporal": None if options.temporal is None else asdict(options.temporal),
            "label_only_surgeries": [surgery.name for surgery in options.surgeries],
        },
        licence=licence or model_licence(datasets, options.start),
        intended_use="Research. Surgical phase of single frames and, with the temporal head, of the whole history. "
        "Not a medical device.",
        weight_storage=weight_storage,
        procedure=procedure,
        temporal=trained.temporal,
        forecast_gap_s=gap_s,
    )


def _measured(trained: PhaseModel) -> dict[str, Any]:
    """Accuracy on the videos kept back, which also calibrated the temperatures."""
    if not trained.validation:
        return {}
    single, history = {}, {}
    for entry in trained.validation:
        known = entry.video.phases >= 0
        found = head_logits(trained.model, entry.latents).argmax(1).numpy()
        single[entry.video.name] = round(float((found == entry.video.phases)[known].mean()), 4)
        if trained.temporal is not None:
            one = sequence(trained.model, entry)
            streamed = trained.temporal.head().run(one.latents, one.probabilities, one.times_s).argmax(1)
            history[entry.video.name] = round(float((streamed == entry.video.phases)[known].mean()), 4)
    return {
        "validation": {
            "accuracy_single_frame": single,
            **({"accuracy_temporal_head": history} if history else {}),
            "measured_on": "whole videos that were kept back from training, but calibrated the temperatures",
        }
    }
