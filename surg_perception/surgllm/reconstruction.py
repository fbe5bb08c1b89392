# SPDX-License-Identifier: Apache-2.0
"""Surg-Pretrain A: from the visible part of a clip, the pixels of the hidden part (SurgLLM, arXiv 2509.00357).

VideoMAE (Tong et al., arXiv 2203.12602) with masks that hide the instruments (`masking`). The encoder goes on to the
later stages; the decoder is of use here only.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from surg_perception.gsvit.trainer import Task, TrainSettings, fit
from surg_perception.surgllm.encoder import GREY, VideoEncoder
from surg_perception.surgllm.masking import (
    GROUP_LENGTHS,
    crop_boxes,
    group_length,
    instrument_mask,
    instrument_patches,
    random_crop,
)

if TYPE_CHECKING:
    from surg_perception.data.clip_labels import ClipVideo

_logger = logging.getLogger(__name__)

RECONSTRUCTION = TrainSettings(
    epochs=20,
    batch=16,
    learning_rate=1e-3,
    final_learning_rate=1e-5,
    schedule="one_cycle",
    optimiser="adamw",
    betas=(0.9, 0.95),
    weight_decay=0.05,
    gradient_clip=0.02,
    precision="bf16",
)
"""The release's optimiser; rate, batch and length are for the `small` configuration."""

_WHOLE = (0.0, 0.0, 1.0, 1.0)
_FLAT = 1e-6  # of 0..1: added to a patch's standard deviation


@dataclass(frozen=True)
class ReconstructionOptions:
    """What is hidden, and what restores it. The release: clips of 16, a decoder of 4 layers, 512 wide, 8 heads.

    Attributes:
        clip_frames: of a clip at 1 fps, a multiple of the encoder's tubelet.
        mask_ratio: share of the tokens that is hidden; 0.7 in the release for 16 frames, 0.8 for 64.
        crop_area: of the random part of a frame that a training clip shows, lowest and highest, 1 = the whole frame.
        decoder_width, decoder_layers, decoder_heads: of the decoder.
        validation_clips: at most this many, evenly spaced, are measured each time.
        pictures: how many of them are drawn each time.
    """

    clip_frames: int = 8
    mask_ratio: float = 0.7
    crop_area: tuple[float, float] = (0.5, 1.0)
    decoder_width: int = 128
    decoder_layers: int = 2
    decoder_heads: int = 4
    validation_clips: int = 32
    pictures: int = 2

    def __post_init__(self) -> None:
        if not (0 < self.mask_ratio < 1 and 0 < self.crop_area[0] <= self.crop_area[1] <= 1):
            raise ValueError(
                f"mask ratio {self.mask_ratio} and crop area {self.crop_area} found; expected a ratio between 0 "
                "and 1, and two areas above 0, ascending, at most 1"
            )
        if self.validation_clips < 1 or self.pictures < 0:
            raise ValueError(
                f"{self.validation_clips} validation clips and {self.pictures} pictures found, expected at least "
                "1 and 0"
            )


# ---- network and target ------------------------------------------------------------------------------------


class MaskedReconstruction(nn.Module):
    """Encoder of the visible tokens and decoder of all: uint8 BGR frames and masks to the hidden tokens' pixels.

    Args:
        encoder: trained in place.
        options: of the decoder.
    """

    def __init__(self, encoder: VideoEncoder, options: ReconstructionOptions) -> None:
        super().__init__()
        self.encoder = encoder
        config, width = encoder.config, options.decoder_width
        self.embed = nn.Linear(config.width, width)
        self.place = nn.Linear(config.width, width, bias=False)
        self.hidden = nn.Parameter(torch.zeros(width).normal_(std=0.02))
        shape: dict[str, Any] = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        heads, layers = options.decoder_heads, range(options.decoder_layers)
        blocks = [nn.TransformerEncoderLayer(width, heads, 4 * width, **shape) for _ in layers]
        self.decoder = nn.Sequential(*blocks, nn.LayerNorm(width))
        self.pixels = nn.Linear(width, config.tubelet * config.patch_size**2 * 3)

    def forward(self, frames: Tensor, masked: Tensor) -> Tensor:
        """The hidden tokens' normalised pixels, as `hidden_pixels` orders them.

        Args:
            frames: uint8 BGR [B, T, S, S, 3].
            masked: bool [B, N], True = hidden, the same number in each row.

        Returns:
            [B, hidden, tubelet * patch², 3].
        """
        visible = self.embed(self.encoder(frames, masked))
        tokens = self.hidden.to(visible).expand(*masked.shape, -1).masked_scatter(~masked[..., None], visible)
        tokens = self.decoder(tokens + self.place(self.encoder.positions(frames.shape[1]).to(visible)))
        return self.pixels(tokens[masked].unflatten(0, (len(masked), -1))).unflatten(-1, (-1, 3))


def hidden_pixels(frames: Tensor, masked: Tensor, tubelet: int) -> tuple[Tensor, Tensor, Tensor]:
    """What is to be restored: the hidden tokens' pixels, each token and channel with mean 0 and deviation 1.

    Args:
        frames: uint8 [B, T, S, S, 3].
        masked: bool [B, N], the same number of True in each row.
        tubelet: frames of a token.

    Returns:
        float32 [B, hidden, tubelet * patch², 3], and mean and standard deviation [B, hidden, 1, 3] in 0..1.
    """
    pixels = _tokens(frames, masked.shape[1], tubelet)[masked].unflatten(0, (len(masked), -1)).float() / 255.0
    mean, deviation = pixels.mean(2, keepdim=True), pixels.std(2, keepdim=True) + _FLAT
    return (pixels - mean) / deviation, mean, deviation


def _tokens(frames: Tensor, count: int, tubelet: int) -> Tensor:
    """[B, T, S, S, 3] to [B, count, tubelet * patch², 3], tubelet-major, then row by row."""
    steps = frames.shape[1] // tubelet
    grid = round((count / steps) ** 0.5)
    cells = frames.unflatten(3, (grid, -1)).unflatten(2, (grid, -1)).unflatten(1, (steps, tubelet))
    return cells.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4, 6).flatten(1, 3)


def _frames(tokens: Tensor, shape: torch.Size, tubelet: int) -> Tensor:
    """The inverse of `_tokens`."""
    steps, side = shape[1] // tubelet, shape[2]
    grid = round((tokens.shape[1] / steps) ** 0.5)
    cells = tokens.unflatten(2, (tubelet, side // grid, -1)).unflatten(1, (steps, grid, grid))
    return cells.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(shape)


# ---- data --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Video:
    """Frames uint8 [n, S, S, 3] and the boxes of each, float64 [k, 4]; one that is not known is not there."""

    name: str
    frames: NDArray[np.uint8]
    boxes: list[NDArray[np.float64]]


def _open(videos: Sequence[ClipVideo], frames: Mapping[str, NDArray[np.uint8]], clip_frames: int) -> list[_Video]:
    short = [video.name for video in videos if len(video) < clip_frames]
    if short:
        _logger.warning("left out, being shorter than a clip of %d s: %s", clip_frames, ", ".join(short))
    opened = []
    for video in videos:
        if len(frames[video.name]) != len(video):
            raise ValueError(f"{video.name}: {len(frames[video.name])} frames for {len(video)} seconds of labels")
        if video.name not in short:
            found = [[tool.box for tool in second.instruments or () if tool.box] for second in video.seconds]
            boxes = [np.asarray(rows, np.float64).reshape(-1, 4) for rows in found]
            opened.append(_Video(video.name, frames[video.name], boxes))
    return opened


class ReconstructionTask(Task):
    """Masked reconstruction of clips; an epoch sees each second of each video about once.

    Args:
        encoder: trained in place.
        training, validation: labelled videos at 1 fps; the latter may be none. Seconds without boxes are masked at
            random. Videos shorter than a clip are left out, with a warning.
        frames: of each video, by its name: uint8 BGR [seconds, S, S, 3], S that of the encoder.
        options: clips, masks, decoder.
        epochs: of the training, over which the groups grow (`masking.group_length`).
        facts: what else decides the training (`Task.identity`).

    Raises:
        ValueError: no training video is as long as a clip; frames and labels, or clip and tubelet, do not fit.
    """

    def __init__(
        self,
        encoder: VideoEncoder,
        training: Sequence[ClipVideo],
        validation: Sequence[ClipVideo],
        frames: Mapping[str, NDArray[np.uint8]],
        options: ReconstructionOptions,
        epochs: int,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self.module = MaskedReconstruction(encoder, options)
        self.config, self.options, self.epochs = encoder.config, options, epochs
        self.config.tokens(options.clip_frames)
        self._facts = dict(facts or {})
        self.training = _open(training, frames, options.clip_frames)
        if not self.training:
            raise ValueError(
                f"none of {len(training)} training videos has {options.clip_frames} seconds without a break; give "
                "longer ones or choose shorter clips"
            )
        self._clips = _clips(self.training, options.clip_frames)
        self.samples = len(self._clips)
        self.validation = _open(validation, frames, options.clip_frames)
        held_back = _clips(self.validation, options.clip_frames)
        spaced = np.linspace(0, max(len(held_back) - 1, 0), min(options.validation_clips, len(held_back)))
        self.measured = [held_back[int(k)] for k in spaced.round()]
        """Video and first second of the held-back clips that are measured."""

    def identity(self) -> Mapping[str, Any]:
        options = {k: v for k, v in asdict(self.options).items() if k not in ("validation_clips", "pictures")}
        return {"task": "masked reconstruction", "encoder": asdict(self.config), **options, **self._facts}

    def order(self, epoch: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """Clips, each with the length of its groups at that point: clip + samples * place in GROUP_LENGTHS."""
        progress = (epoch + np.arange(self.samples) / self.samples) / self.epochs
        groups = [GROUP_LENGTHS.index(group_length(part, self.options.clip_frames)) for part in progress]
        return rng.permutation(self.samples) + self.samples * np.asarray(groups, np.int64)

    def batch(self, indices: NDArray[np.int64], rng: np.random.Generator) -> dict[str, Tensor]:
        length, clips, masks = self.options.clip_frames, [], []
        for index in indices:
            place, clip = divmod(int(index), self.samples)
            number, start = self._clips[clip]
            video = self.training[number]
            shift = rng.integers(-(length // 2), length // 2, endpoint=True)
            start = int(np.clip(start + shift, 0, len(video.frames) - length))
            frames, instruments = self._view(video, start, random_crop(rng, self.options.crop_area))
            clips.append(frames)
            masks.append(self._mask(instruments, GROUP_LENGTHS[place], rng))
        return {"frames": torch.from_numpy(np.stack(clips)), "masked": torch.from_numpy(np.stack(masks))}

    def loss(self, module: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        target, _, _ = hidden_pixels(batch["frames"], batch["masked"], self.config.tubelet)
        return F.mse_loss(module(batch["frames"], batch["masked"]).float(), target), {}

    def end_of_epoch(self, epoch: int, module: nn.Module, folder: Path) -> dict[str, float]:
        if not self.measured:
            return {}
        if self.options.pictures:
            held_back = list(self._held_back())
            chosen = np.linspace(0, len(held_back) - 1, min(self.options.pictures, len(held_back))).round()
            shown = [held_back[int(k)] for k in chosen]
            reconstruction_picture(
                module,
                np.stack([frames for frames, _, _ in shown]),
                np.stack([masked for _, masked, _ in shown]),
                [self._label(int(k)) for k in chosen],
                folder / "reconstruction.png",
            )
        return self.measure(module)

    @torch.no_grad()
    def measure(self, module: nn.Module) -> dict[str, float]:
        """Mean squared error over the held-back clips, of normalised pixels.

        Args:
            module: a `MaskedReconstruction` in evaluation mode.

        Returns:
            "mse" of all hidden tokens, "mse_instruments" of those that an instrument touches (where there are any),
            each beside "…_mean", the error of guessing each token's mean colour.
        """
        device = next(module.parameters()).device
        errors, guesses, on_instruments = [], [], []
        for frames, masked, instruments in self._held_back():
            images, hidden = (torch.from_numpy(part)[None].to(device) for part in (frames, masked))
            target, _, _ = hidden_pixels(images, hidden, self.config.tubelet)
            errors.append((module(images, hidden) - target).square().mean((2, 3))[0].cpu().numpy())
            guesses.append(target.square().mean((2, 3))[0].cpu().numpy())
            on_instruments.append(instruments[masked])
        error, guess, touched = map(np.concatenate, (errors, guesses, on_instruments))
        figures = {"mse": error.mean(), "mse_mean": guess.mean()}
        if touched.any():
            figures |= {"mse_instruments": error[touched].mean(), "mse_instruments_mean": guess[touched].mean()}
        return {name: float(value) for name, value in figures.items()}

    def _view(
        self, video: _Video, start: int, crop: tuple[float, float, float, float]
    ) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """A part of a clip's frames, resized to whole frames, and the patches of its instruments."""
        size, seconds = self.config.image_size, range(start, start + self.options.clip_frames)
        left, top, width, height = (round(edge * size) for edge in crop)
        pixels = video.frames[start : start + len(seconds), top : top + height, left : left + width]
        frames = np.stack([cv2.resize(image, (size, size), interpolation=cv2.INTER_LINEAR) for image in pixels])
        shown = (left / size, top / size, pixels.shape[2] / size, pixels.shape[1] / size)
        grid = self.config.grid
        instruments = [instrument_patches(crop_boxes(video.boxes[second], shown), grid) for second in seconds]
        return frames.astype(np.uint8), np.stack(instruments)

    def _mask(self, instruments: NDArray[np.bool_], group: int, rng: np.random.Generator) -> NDArray[np.bool_]:
        return instrument_mask(instruments, self.options.mask_ratio, group, rng, self.config.tubelet)

    def _held_back(self) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.bool_], NDArray[np.bool_]]]:
        """The measured clips: whole frames, masks that are the same each time, tokens that an instrument touches."""
        for k, (number, start) in enumerate(self.measured):
            frames, instruments = self._view(self.validation[number], start, _WHOLE)
            masked = self._mask(instruments, GROUP_LENGTHS[0], np.random.default_rng(k))
            tubelets = instruments.reshape(-1, self.config.tubelet, self.config.grid**2)
            yield frames, masked, tubelets.any(axis=1).reshape(-1)

    def _label(self, k: int) -> str:
        number, start = self.measured[k]
        return f"{self.validation[number].name}, seconds {start} to {start + self.options.clip_frames - 1}"


def _clips(videos: Sequence[_Video], length: int) -> list[tuple[int, int]]:
    """Video and first second of clips that cover all videos, the last of each ending with it."""
    starts = [(k, start) for k, video in enumerate(videos) for start in range(0, len(video.frames), length)]
    return [(k, min(start, len(videos[k].frames) - length)) for k, start in starts]


# ---- picture -----------------------------------------------------------------------------------------------


@torch.no_grad()
def reconstruction_picture(
    module: nn.Module,
    frames: NDArray[np.uint8],
    masked: NDArray[np.bool_],
    labels: Sequence[str],
    path: Path,
) -> None:
    """Write a PNG with three rows per clip: its frames, what the encoder sees of them, and the reconstruction.

    The network says how a patch looks, not how bright it is: mean and deviation of each hidden token are those of
    the truth. Visible patches are those of the input.

    Args:
        module: a `MaskedReconstruction` in evaluation mode.
        frames: uint8 BGR [n, T, S, S, 3].
        masked: bool [n, N], True = hidden.
        labels: of the clips.
        path: of the PNG.

    Raises:
        OSError: the picture could not be written.
    """
    assert isinstance(module, MaskedReconstruction)
    tubelet = module.encoder.config.tubelet
    device = next(module.parameters()).device
    images, hidden = torch.from_numpy(frames).to(device), torch.from_numpy(masked).to(device)
    _, mean, deviation = hidden_pixels(images, hidden, tubelet)
    restored = (module(images, hidden) * deviation + mean).clamp(0.0, 1.0) * 255.0
    tokens = _tokens(images, hidden.shape[1], tubelet)
    seen, whole = tokens.clone(), tokens.clone()
    seen[hidden] = GREY
    whole[hidden] = restored.round().to(torch.uint8).flatten(0, 1)
    rows = [frames, *(_frames(part, images.shape, tubelet).cpu().numpy() for part in (seen, whole))]

    count, length, side = frames.shape[:3]
    margin, text = 6, 22
    canvas = np.full((count * (text + 3 * (side + margin)), margin + length * (side + margin), 3), 255, np.uint8)
    for clip in range(count):
        top = clip * (text + 3 * (side + margin))
        words = f"{labels[clip]}: input, visible part, reconstruction"
        cv2.putText(canvas, words, (margin, top + text - 7), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (0, 0, 0), 1, cv2.LINE_AA)
        for row, shown in enumerate(rows):
            above = top + text + row * (side + margin)
            for column, image in enumerate(shown[clip]):
                left = margin + column * (side + margin)
                canvas[above : above + side, left : left + side] = image
    if not cv2.imwrite(str(path), canvas):
        raise OSError(f"the picture {path} could not be written")


# ---- the whole ---------------------------------------------------------------------------------------------


def reconstruct_pretrain(
    encoder: VideoEncoder,
    training: Sequence[ClipVideo],
    validation: Sequence[ClipVideo],
    frames: Mapping[str, NDArray[np.uint8]],
    folder: Path,
    options: ReconstructionOptions = ReconstructionOptions(),
    settings: TrainSettings = RECONSTRUCTION,
    *,
    resume: bool = True,
    console: Console | None = None,
) -> tuple[MaskedReconstruction, dict[str, float]]:
    """Train an encoder by masked reconstruction; killed and called again, it goes on.

    Args:
        encoder: trained in place; its weights (and a frozen stem's) are the caller's to set.
        training, validation, frames, options: as `ReconstructionTask`.
        folder: of the training (`gsvit.trainer`), with a picture of held-back clips at each validation.
        settings, resume, console: as `fit`.

    Returns:
        What was trained, on the CPU in evaluation mode, with `.encoder` for the next stage; and the figures of
        `ReconstructionTask.measure` on the held-back clips ({} without any).

    Raises:
        ValueError: as `ReconstructionTask`.
        TrainingError: as `fit`.
    """
    torch.manual_seed(settings.seed)  # the decoder's weights
    names = {"training_videos": [v.name for v in training], "held_back": [v.name for v in validation]}
    task = ReconstructionTask(encoder, training, validation, frames, options, settings.epochs, names)
    trained = fit(task, settings, folder, resume=resume, console=console)
    assert isinstance(trained, MaskedReconstruction)
    return trained, task.measure(trained) if task.measured else {}
