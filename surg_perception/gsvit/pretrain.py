# SPDX-License-Identifier: Apache-2.0
"""Pre-training by video prediction (GSViT, arXiv 2403.05949): from a frame, the frame `gap_s` later; L1 on pixels.

Procedure fine-tuning is the same on the videos of one procedure, from pre-trained weights: `FINE_TUNING`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import torch
from accelerate import PartialState
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional as F

from surg_perception.data.labels import PROCEDURES
from surg_perception.gsvit.augment import noise_for, random_view, relight, warp
from surg_perception.gsvit.checkpoint import CheckpointError, build_gsvit, load_gsvit, read_tensors, released_name
from surg_perception.gsvit.model_folder import load_model_folder, round_matrices_to_fp16, save_model_folder
from surg_perception.gsvit.network import IMAGE_SIZE, GSViT, GSViTConfig
from surg_perception.gsvit.temporal import load_temporal
from surg_perception.gsvit.trainer import STATE_NAME, Task, TrainSettings, fit
from surg_perception.models import CARD_NAME, LabelFacts, ModelCard, ModelFile, read_card
from surg_perception.procedures import procedure_name

if TYPE_CHECKING:
    from surg_perception.data.datasets import Dataset, Video

PRE_TRAINING = TrainSettings()
"""The paper's: Adam, batch 100, 5 epochs, learning rate linear from 1e-3 to 1e-5."""

FINE_TUNING = TrainSettings(epochs=1, learning_rate=1e-4, final_learning_rate=1e-4)
"""The paper's for one procedure: one epoch at 1e-4."""

_TIMM_ANCHOR = "patch_embed.conv1.conv.weight"
_HELD_BACK_SHARE = 0.1
_CHUNK = 50
_ERROR_SCALE = 0.5
_PUBLIC_LICENCE = "CC BY-NC-SA 4.0"
_LICENCES = {"phantom": "Apache-2.0"} | dict.fromkeys(
    ("cholec80", "cholec80-frames", "cholect50", "autolaparo", "m2cai"), _PUBLIC_LICENCE
)


@dataclass(frozen=True)
class PretrainOptions:
    """What is predicted, by what network, from what start.

    Attributes:
        gap_s: how much later the predicted frame is, in seconds; above 0.
        start: a released checkpoint, a model folder, or a file with an encoder's weights (this project's names or
            timm's); None for random weights.
        size, decoder_width, decoder_rank, predict_change: of the network (`GSViTConfig`); None for those of the
            start weights, else of the release.
        procedure: train on the videos of this procedure only; "" for all. Where no video names its procedure, they are
            all taken to be of this one.
        validation: names of the videos held back; None for a tenth of them, () for none.
        validation_pairs: at most this many pairs, evenly spaced, are measured each time.
        pictures: how many of them are drawn each time.
        mirror: mirror half of the pairs left to right.
        augment: another view (mirrored or not), camera and light, the same for both frames of a pair.
    """

    gap_s: float = 1.0
    start: Path | None = None
    size: str | None = None
    decoder_width: int | None = None
    decoder_rank: int | None = None
    predict_change: bool | None = None
    procedure: str = ""
    validation: tuple[str, ...] | None = None
    validation_pairs: int = 500
    pictures: int = 4
    mirror: bool = False
    augment: bool = False
    freeze_encoder: bool = False

    def __post_init__(self) -> None:
        if not 0.0 < self.gap_s < float("inf"):
            raise ValueError(f"a gap of {self.gap_s} s found, expected a number of seconds above 0")
        if self.validation_pairs < 1 or self.pictures < 0:
            raise ValueError(
                f"{self.validation_pairs} validation pairs and {self.pictures} pictures found, "
                "expected at least 1 and 0"
            )
        if self.freeze_encoder and (self.start is None or not (self.start / CARD_NAME).is_file()):
            raise ValueError(f"a frozen encoder needs a model folder to come from, found {self.start} as the start")


# ---- pairs -------------------------------------------------------------------------------------------------


def frame_pairs(times_s: NDArray[np.float64], gap_s: float) -> NDArray[np.int64]:
    """Which frame follows which: for each frame at t, the one nearest to t + gap_s.

    A frame without a later one within half the sampling step (the median distance of frames) of t + gap_s has no
    pair, so that breaks in the video are never bridged.

    Args:
        times_s: float64 [n], strictly increasing.
        gap_s: seconds, above 0.

    Returns:
        int64 [p, 2], indices of frame and target, target > frame.
    """
    times_s = np.asarray(times_s, np.float64)
    if len(times_s) < 2:
        return np.zeros((0, 2), np.int64)
    tolerance_s = np.median(np.diff(times_s)) / 2.0 + 1e-6
    wanted_s = times_s + gap_s
    later = np.clip(np.searchsorted(times_s, wanted_s), 1, len(times_s) - 1)
    target = np.where(wanted_s - times_s[later - 1] <= times_s[later] - wanted_s, later - 1, later)
    frame = np.arange(len(times_s))
    good = (target > frame) & (np.abs(times_s[target] - wanted_s) <= tolerance_s)
    return np.stack([frame[good], target[good]], axis=1).astype(np.int64)


@dataclass(frozen=True)
class Clip:
    """The frames of one video and which of them form pairs.

    Attributes:
        name: of the video.
        frames: uint8 [n, 224, 224, 3], BGR.
        times_s: float64 [n].
        pairs: int64 [p, 2], indices of frame and target.
    """

    name: str
    frames: NDArray[np.uint8]
    times_s: NDArray[np.float64]
    pairs: NDArray[np.int64]


def augment_pair(
    frame: NDArray[np.uint8], target: NDArray[np.uint8], rng: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The same other view, camera and light (`gsvit.augment`) of two uint8 BGR images [224, 224, 3]."""
    view, light, noise = random_view(IMAGE_SIZE, rng), rng.integers(2**32), noise_for(frame, rng)
    other, other_target = (relight(warp(image, view), np.random.default_rng(light), noise) for image in (frame, target))
    return other, other_target


# ---- network -----------------------------------------------------------------------------------------------


class NextFrameNetwork(nn.Module):
    """Encoder and decoder in one pass. BGR [B, 3, 224, 224] in 0..1 to the BGR frame expected `gap_s` later.

    Where the decoder predicts the change, the change is added to the frame and nothing is clamped, so that L1 to
    the target is L1 between predicted and true change. A frozen encoder keeps its batch-norm statistics as well.
    """

    def __init__(self, model: GSViT, freeze_encoder: bool = False) -> None:
        super().__init__()
        self.model = model
        self.freeze_encoder = freeze_encoder
        if freeze_encoder:
            model.encoder.requires_grad_(False)

    def train(self, mode: bool = True) -> NextFrameNetwork:
        """As of `torch.nn.Module`; a frozen encoder stays in evaluation mode."""
        super().train(mode)
        if self.freeze_encoder:
            self.model.encoder.eval()
        return self

    def forward(self, bgr: Tensor) -> Tensor:
        assert self.model.decoder is not None
        prediction = self.model.decoder(self.model.features(bgr))
        return bgr + prediction if self.model.config.predict_change else prediction


def start_model(options: PretrainOptions, seed: int) -> tuple[GSViT, dict[str, Any]]:
    """The network to train, without a phase head, in training mode, and what its card says of the start.

    The start's decoder is taken over if it is of the size and kind asked for; otherwise it begins at random.

    Raises:
        FileNotFoundError: no such start weights.
        CheckpointError: start weights that are damaged or of another size.
    """
    start = None if options.start is None else read_start(options.start, options.size)
    asked = {
        name: value
        for name in ("size", "decoder_width", "decoder_rank", "predict_change")
        if (value := getattr(options, name)) is not None
    }
    base = GSViTConfig() if start is None else replace(start.config, decoder=True, classes=0)
    config = replace(base, **asked)
    torch.manual_seed(seed)
    if start is None:
        return GSViT(config), {"start_weights": "random"}
    if start.config.size != config.size:
        raise CheckpointError(
            f"{options.start} is of size {start.config.size!r}, but {config.size!r} was asked for; "
            "leave the size out to take that of the start weights"
        )
    model = GSViT(config) if start.decoder is None or config != base else start
    kept = model is start
    model.encoder.load_state_dict(start.encoder.state_dict())
    model.head, model.config = None, config
    assert options.start is not None
    card = options.start / CARD_NAME
    facts: dict[str, Any] = {
        "start_weights": asdict(ModelFile.of(read_card(card.parent).weights_path if card.is_file() else options.start)),
        "start_decoder": "that of the start weights" if kept else "random",
    }
    if card.is_file():
        facts["start_model"] = read_card(card.parent).model_id
    return model.train(), facts


def read_start(path: Path, size: str | None) -> GSViT:
    """Start weights: a model folder, or a file with a released or saved GSViT or with timm's EfficientViT.

    Args:
        path: folder or file.
        size: EfficientViT variant of a file, "m5" unless told; a folder's card says its own.

    Returns:
        In evaluation mode; decoder and phase head where the weights have them.

    Raises:
        FileNotFoundError, CheckpointError: as `load_gsvit`.
    """
    if path.is_dir():
        return load_gsvit(path)
    tensors = read_tensors(path)
    prefix = next((name[: -len(_TIMM_ANCHOR)] for name in tensors if name.endswith(_TIMM_ANCHOR)), None)
    if prefix is None:
        return load_gsvit(path, size=size)
    named = {
        released_name(f"encoder.{name.removeprefix(prefix)}"): value
        for name, value in tensors.items()
        if name.startswith((f"{prefix}patch_embed.", f"{prefix}stages."))
    }
    return build_gsvit(named, size=size or GSViTConfig.size, predict_change=False, source=str(path))


# ---- task --------------------------------------------------------------------------------------------------


class NextFrameTask(Task):
    """Next-frame prediction on clips.

    Args:
        model: with a decoder; trained in place.
        training, validation: clips; the latter may be none.
        options: augmentation, number of validation pairs and pictures.
        facts: what else decides the training (`Task.identity`).
    """

    def __init__(
        self,
        model: GSViT,
        training: Sequence[Clip],
        validation: Sequence[Clip],
        options: PretrainOptions,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self.module = NextFrameNetwork(model, options.freeze_encoder)
        self.training, self.validation, self.options = list(training), list(validation), options
        self.samples = sum(len(clip.pairs) for clip in training)
        self._index = _pair_index(self.training)
        self._facts = dict(facts or {})
        measured = _pair_index(self.validation)
        spaced = np.linspace(0, max(len(measured) - 1, 0), min(options.validation_pairs, len(measured)))
        self.measured = measured[np.unique(spaced.round().astype(np.int64))]
        """int64 [m, 2], validation clip and pair: the ones that are measured."""

    def identity(self) -> Mapping[str, Any]:
        return {"gap_s": self.options.gap_s, "mirror": self.options.mirror, "augment": self.options.augment} | (
            self._facts
        )

    def batch(self, indices: NDArray[np.int64], rng: np.random.Generator) -> dict[str, Tensor]:
        frames, targets = _gather(self.training, self._index[indices])
        for i in range(len(frames)):
            if self.options.augment:
                frames[i], targets[i] = augment_pair(frames[i], targets[i], rng)
            if self.options.mirror and rng.random() < 0.5:
                frames[i], targets[i] = frames[i][:, ::-1].copy(), targets[i][:, ::-1].copy()
        return {"frame": _as_images(frames), "target": _as_images(targets)}

    def loss(self, module: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        return F.l1_loss(module(batch["frame"] / 255.0), batch["target"] / 255.0), {}

    def end_of_epoch(self, epoch: int, module: nn.Module, folder: Path) -> dict[str, float]:
        if not len(self.measured):
            return {}
        if self.options.pictures:
            chosen = self.measured[
                np.linspace(0, len(self.measured) - 1, self.options.pictures).round().astype(np.int64)
            ]
            self._draw(module, chosen, folder / "prediction.png")
        return self.measure(module)

    @torch.no_grad()
    def measure(self, module: nn.Module) -> dict[str, float]:
        """Over the validation pairs: L1 in 0..1 and mean PSNR in dB of the prediction, and of the input repeated.

        Args:
            module: a `NextFrameNetwork` in evaluation mode.
        """
        device = next(module.parameters()).device
        sums = np.zeros(4)
        for first in range(0, len(self.measured), _CHUNK):
            frames, targets = (
                _as_images(images).to(device) / 255.0
                for images in _gather(self.validation, self.measured[first : first + _CHUNK])
            )
            prediction = module(frames).clamp(0.0, 1.0)
            for k, found in enumerate((prediction, frames)):
                sums[k] += float((found - targets).abs().mean((1, 2, 3)).sum())
                squared = (found - targets).square().mean((1, 2, 3))
                sums[2 + k] += float((-10.0 * torch.log10(squared.clamp_min(1e-10))).sum())
        values = sums / len(self.measured)
        return dict(zip(("l1", "l1_copy", "psnr_db", "psnr_copy_db"), map(float, values), strict=True))

    @torch.no_grad()
    def _draw(self, module: nn.Module, chosen: NDArray[np.int64], path: Path) -> None:
        frames, targets = _gather(self.validation, chosen)
        device = next(module.parameters()).device
        output = module(_as_images(frames).to(device) / 255.0).clamp(0.0, 1.0)
        predictions = (output.permute(0, 2, 3, 1) * 255.0).round().to(torch.uint8).cpu().numpy()
        labels = []
        for clip_number, pair in chosen:
            clip = self.validation[clip_number]
            labels.append(f"{clip.name}, {clip.times_s[clip.pairs[pair, 0]]:.1f} s")
        draw_predictions(frames, predictions, targets, labels, self.options.gap_s, path)


def _pair_index(clips: Sequence[Clip]) -> NDArray[np.int64]:
    """int64 [n, 2]: clip and pair of every pair, in order."""
    parts = [np.stack([np.full(len(clip.pairs), k), np.arange(len(clip.pairs))], 1) for k, clip in enumerate(clips)]
    return np.concatenate(parts).astype(np.int64) if parts else np.zeros((0, 2), np.int64)


def _gather(clips: Sequence[Clip], chosen: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Frames and targets, each uint8 [n, 224, 224, 3], of clips' pairs, int64 [n, 2]."""
    out = np.empty((2, len(chosen), IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    for i, (clip, pair) in enumerate(chosen):
        frame, target = clips[clip].pairs[pair]
        out[0, i], out[1, i] = clips[clip].frames[frame], clips[clip].frames[target]
    return out[0], out[1]


def _as_images(images: NDArray[np.uint8]) -> Tensor:
    """uint8 [n, H, W, 3] as uint8 [n, 3, H, W], without copying."""
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def draw_predictions(
    frames: NDArray[np.uint8],
    predictions: NDArray[np.uint8],
    targets: NDArray[np.uint8],
    labels: Sequence[str],
    gap_s: float,
    path: Path,
) -> None:
    """Write a PNG with a row per sample: input, prediction, truth, error (mean over channels, coloured).

    Args:
        frames, predictions, targets: uint8 [n, H, W, 3], BGR.
        labels: of the rows.
        gap_s: between input and truth.
        path: of the PNG.
    """
    count, height, width = frames.shape[:3]
    margin, text = 6, 22
    titles = (
        "input",
        f"prediction, {gap_s:g} s later",
        f"truth, {gap_s:g} s later",
        f"error, 0 to {_ERROR_SCALE:g}",
    )
    canvas = np.full((text + count * (height + text), margin + 4 * (width + margin), 3), 255, np.uint8)

    def write(words: str, left: int, baseline: int) -> None:
        cv2.putText(canvas, words, (left, baseline), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (0, 0, 0), 1, cv2.LINE_AA)

    for column, title in enumerate(titles):
        write(title, margin + column * (width + margin), text - 7)
    for row in range(count):
        top = text + row * (height + text)
        difference = predictions[row].astype(np.float32) - targets[row]
        level = np.clip(np.abs(difference).mean(2) / _ERROR_SCALE, 0, 255).astype(np.uint8)
        error = cv2.applyColorMap(level, cv2.COLORMAP_INFERNO)
        for column, image in enumerate((frames[row], predictions[row], targets[row], error)):
            left = margin + column * (width + margin)
            canvas[top : top + height, left : left + width] = image
        write(labels[row], margin, top + height + text - 7)
    if not cv2.imwrite(str(path), canvas):
        raise OSError(f"the picture {path} could not be written")


# ---- the whole ---------------------------------------------------------------------------------------------


def pretrain(
    datasets: Sequence[Dataset],
    out: Path,
    options: PretrainOptions,
    settings: TrainSettings,
    *,
    cache: Path,
    name: str | None = None,
    licence: str | None = None,
    weight_storage: str = "fp32",
    forecast: bool = True,
    resume: bool = True,
    console: Console | None = None,
) -> ModelCard:
    """Train on data sets and write a model folder; killed and called again, it goes on.

    Args:
        datasets: opened at the rate at which frames are to be used.
        out: the model folder; the training's own files are in `out/training` (`trainer`).
        options, settings: what and how.
        cache: where resized frames are kept.
        name: the model's; `GSViT-<Procedure>` with a procedure, else the folder's, unless told.
        licence: of the model; what the data and the start weights demand unless told.
        weight_storage, forecast: as `save_model_folder`; `forecast` also writes the decoder as a graph with
            which the running pipeline forecasts.
        resume, console: as `fit`.

    Raises:
        ValueError: no pairs, or names of videos or procedures that the data has not.
        TrainingError: as `fit`.
        CheckpointError, FileNotFoundError: as `start_model`.
    """
    process = PartialState(cpu=not torch.cuda.is_available())
    console = console or Console(quiet=not process.is_main_process)
    out = Path(out)
    split = _split(datasets, options)
    for videos in split:
        _check_pairs(videos, options)
    model, start = start_model(options, settings.seed)
    training, validation = _open_clips(split, options, cache, console)
    pairs = sum(len(clip.pairs) for clip in training)
    if min(settings.batch, pairs) // process.num_processes < 2:
        raise ValueError(
            f"batch {settings.batch}, {pairs} pairs and {process.num_processes} processes found; expected at least "
            "2 pairs per batch and process, for the decoder's batch norm"
        )
    facts = _facts(datasets, split, training, validation, options, start, model)
    console.print(
        f"{pairs} pairs of {len(training)} videos, {options.gap_s:g} s apart; held back: "
        f"{', '.join(clip.name for clip in validation) or 'nothing, so there will be no validation'}"
    )
    task = NextFrameTask(model, training, validation, options, facts)
    trained = fit(task, settings, out / "training", resume=resume, console=console)
    assert isinstance(trained, NextFrameNetwork)
    if process.is_main_process:
        if options.freeze_encoder:
            assert options.start is not None
            weight_storage = _storage(read_card(options.start))
        if weight_storage == "fp16":
            round_matrices_to_fp16(trained.model)
        metrics = {}
        if len(task.measured):
            metrics["next_frame"] = {key: round(value, 5) for key, value in task.measure(trained).items()} | {
                "measured_on": f"{len(task.measured)} evenly spaced pairs of the held-back videos "
                f"{', '.join(clip.name for clip in validation)}; 'copy' is the input repeated as the prediction"
            }
        if options.freeze_encoder:
            assert options.start is not None
            return _save_with_forecast(trained.model, options, out, name, metrics, facts, weight_storage)
        save_model_folder(
            trained.model,
            out,
            name=name or (model_name(options.procedure) if options.procedure else out.resolve().name),
            version="0.1.0",
            labels=LabelFacts("", ()),
            metrics=metrics,
            training=facts
            | {"settings": asdict(settings), "state_sha256": ModelFile.of(out / "training" / STATE_NAME).sha256},
            licence=licence or model_licence(datasets, options.start),
            intended_use="Research. Latent features and the predicted next frame, no phases. Not a medical device.",
            weight_storage=weight_storage,
            procedure=_canonical(options.procedure),
            forecast_gap_s=options.gap_s if forecast else None,
        )
    process.wait_for_everyone()
    return read_card(out)


def model_name(procedure: str) -> str:
    """`GSViT-<Procedure>`, without spaces: "Hernia Repair" gives "GSViT-HerniaRepair"."""
    return f"GSViT-{_canonical(procedure).replace(' ', '')}"


def _canonical(procedure: str) -> str:
    """A procedure of the paper in the paper's spelling, any other as it is."""
    return procedure_name(procedure) or procedure


def _plain(procedure: str) -> str:
    return "".join(procedure.split()).replace("-", "").replace("_", "").casefold()


Split = tuple[list["Video"], list["Video"]]


def _split(datasets: Sequence[Dataset], options: PretrainOptions) -> Split:
    """Videos for training and for validation, of the procedure asked for."""
    videos = [video for dataset in datasets for video in dataset.videos]
    known = sorted({video.procedure for video in videos if video.procedure})
    if options.procedure and known:
        videos = [video for video in videos if _plain(video.procedure) == _plain(options.procedure)]
        if not videos:
            raise ValueError(
                f"no video of the procedure {options.procedure!r}; the data has {', '.join(known)}. "
                f"The paper's are {', '.join(PROCEDURES)}"
            )
    names = [video.name for video in videos]
    held_back = options.validation
    if held_back is None:
        held_back = tuple(names[len(names) - max(1, round(_HELD_BACK_SHARE * len(names))) :] if len(names) > 1 else ())
    unknown = [name for name in held_back if name not in names]
    if unknown:
        raise ValueError(f"no video {', '.join(unknown)} to hold back; the data has {', '.join(names) or 'none'}")
    training = [video for video in videos if video.name not in held_back]
    if not training:
        raise ValueError(f"all {len(videos)} videos are held back for validation; none is left to train on")
    return training, [video for video in videos if video.name in held_back]


def _check_pairs(videos: Sequence[Video], options: PretrainOptions) -> None:
    if videos and not any(len(frame_pairs(video.times_s, options.gap_s)) for video in videos):
        steps_s = [float(np.median(np.diff(video.times_s))) for video in videos if len(video.times_s) > 1]
        raise ValueError(
            f"none of {', '.join(video.name for video in videos)} has two frames {options.gap_s:g} s apart; their "
            f"frames are {', '.join(f'{step:g}' for step in sorted(set(steps_s))) or 'single'} s apart. Choose such "
            "a gap (--gap), or a higher rate (--rate-hz) where the video has it"
        )


def _open_clips(split: Split, options: PretrainOptions, cache: Path, console: Console) -> tuple[list[Clip], list[Clip]]:
    from surg_perception.data.frame_cache import cached_frames

    process = PartialState()
    todo = [(part, place) for part, videos in enumerate(split) for place in range(len(videos))]
    # Each process begins elsewhere, so that they share the decoding where the cache is empty.
    first = process.process_index * len(todo) // process.num_processes
    opened: dict[tuple[int, int], Clip] = {}
    columns = (TextColumn("frames of {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("", total=len(todo))
        for part, place in todo[first:] + todo[:first]:
            video = split[part][place]
            progress.update(bar, description=video.name)
            frames = cached_frames(video, cache, IMAGE_SIZE)
            opened[part, place] = Clip(video.name, frames, video.times_s, frame_pairs(video.times_s, options.gap_s))
            progress.advance(bar)
    clips = [[opened[part, place] for place in range(len(videos))] for part, videos in enumerate(split)]
    return clips[0], clips[1]


def _facts(
    datasets: Sequence[Dataset],
    split: Split,
    training: Sequence[Clip],
    validation: Sequence[Clip],
    options: PretrainOptions,
    start: Mapping[str, Any],
    model: GSViT,
) -> dict[str, Any]:
    """The training facts of the card, which also decide whether a training may be resumed."""
    return {
        "task": "next-frame prediction, L1",
        "data": sorted({dataset.kind for dataset in datasets}),
        "videos": [clip.name for clip in training],
        "frames": sum(len(clip.frames) for clip in training),
        "pairs": sum(len(clip.pairs) for clip in training),
        "held_back": [clip.name for clip in validation],
        "gap_s": options.gap_s,
        "procedures": sorted({video.procedure for video in split[0] if video.procedure}),
        "mirror": options.mirror,
        "augment": options.augment,
        "freeze_encoder": options.freeze_encoder,
        "network": {
            "size": model.config.size,
            "decoder_width": model.config.decoder_width,
            "decoder_rank": model.config.decoder_rank,
            "predict_change": model.config.predict_change,
        },
        **start,
    }


def _storage(card: ModelCard) -> str:
    """How a model folder stores its matrices."""
    half = any(value.dtype == torch.float16 for value in read_tensors(card.weights_path).values())
    return "fp16" if half else "fp32"


def _save_with_forecast(
    model: GSViT,
    options: PretrainOptions,
    out: Path,
    name: str | None,
    metrics: Mapping[str, Any],
    facts: Mapping[str, Any],
    weight_storage: str,
) -> ModelCard:
    """The start's model folder again, with the decoder of `model`."""
    assert options.start is not None
    start, base = read_card(options.start), load_model_folder(options.start)
    model.head = base.head
    model.config = replace(model.config, classes=base.config.classes, head_hidden=base.config.head_hidden)
    return save_model_folder(
        model.eval().requires_grad_(False),
        out,
        name=name or out.resolve().name,
        version=start.version,
        labels=start.labels,
        metrics=start.metrics | dict(metrics),
        training=start.training | {"forecast": dict(facts)},
        licence=start.licence,
        intended_use=start.intended_use,
        weight_storage=weight_storage,
        procedure=start.procedure,
        temporal=load_temporal(start.temporal_path) if start.temporal is not None else None,
        forecast_gap_s=options.gap_s,
    )


def model_licence(datasets: Sequence[Dataset], start: Path | None) -> str:
    """What the licences of data and start weights ask of a model made from them, each named once."""
    parts = [_LICENCES.get(dataset.kind, "that of the training videos") for dataset in datasets]
    if start is not None:
        card = start / CARD_NAME
        parts.append(read_card(start).licence if card.is_file() else "that of the start weights")
    return " and ".join(dict.fromkeys(licence for part in parts for licence in part.split(" and ")))
