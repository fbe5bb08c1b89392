# SPDX-License-Identifier: Apache-2.0
"""Grounding, the first half of Surg-Pretrain B: each video token learns what is at its place.

Ours, not the publication's: captions alone teach an encoder little from a few thousand clips. Where instruments have
boxes, every token is told which instrument covers it and what that does (as region-phrase alignment does, Li et al.,
GLIP, arXiv 2112.03857); where only their presence is known, the most certain token of a clip answers for it (multiple
instance learning). The mean of the tokens tells the phase. The linear heads are thrown away afterwards.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from surg_perception.data.clip_labels import ClipVideo, SecondLabels
from surg_perception.data.labels import CHOLEC80_PHASES
from surg_perception.gsvit.trainer import Task, TrainSettings, fit
from surg_perception.surgllm.encoder import VideoEncoder

GROUNDING = TrainSettings(
    epochs=4,
    batch=32,
    learning_rate=1e-3,
    final_learning_rate=1e-5,
    schedule="one_cycle",
    optimiser="adamw",
    weight_decay=0.02,
    gradient_clip=1.0,
    precision="bf16",
)
"""How `small` is grounded."""

KEPT_TOKENS = 0.5
"""Share of the tokens that a training clip shows."""

_UNKNOWN = -100
_NOTHING_WEIGHT = 0.3  # of tokens without an instrument, which are most


class GroundingNetwork(nn.Module):
    """Encoder and linear heads.

    Args:
        encoder: trained along, apart from its stem.
        instruments, acts, phases: classes; `instruments` without "nothing".
    """

    def __init__(self, encoder: VideoEncoder, instruments: int, acts: int, phases: int) -> None:
        super().__init__()
        encoder.stem.requires_grad_(False)
        self.encoder = encoder
        width = encoder.config.width
        self.instrument, self.act = nn.Linear(width, instruments + 1), nn.Linear(width, max(acts, 1))
        self.phase = nn.Linear(width, phases)

    def forward(self, features: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of instruments [B, n, instruments + 1] (0: nothing), acts [B, n, acts], phases [B, phases]."""
        tokens = self.encoder.encode(features.float(), keep)
        return self.instrument(tokens).float(), self.act(tokens).float(), self.phase(tokens.mean(dim=1)).float()


class GroundingTask(Task):
    """Clips of one segment, every `stride_s` seconds.

    Args:
        encoder: trained in place.
        videos: with labels, to train on.
        features: of `feature_cache.cached_features`.
        frames: of a segment.
        validation: other videos.
        stride_s: between the clips' first seconds; stills give one clip each.
    """

    def __init__(
        self,
        encoder: VideoEncoder,
        videos: Sequence[ClipVideo],
        features: Mapping[str, NDArray[np.float16]],
        frames: int,
        validation: Sequence[ClipVideo] = (),
        stride_s: int = 1,
    ) -> None:
        self.features, self.frames, self.grid = features, frames, encoder.config.grid
        self.tubelet, self.tokens = encoder.config.tubelet, encoder.config.tokens(frames)
        states = [state for video in videos for second in video.seconds for state in second.instruments or ()]
        self.instruments = sorted({state.instrument for state in states})
        self.acts = sorted({(state.verb, state.target) for state in states if state.verb})
        self.videos = {video.name: video for video in (*videos, *validation)}
        self.clips = _clips(videos, frames, stride_s)
        self.held_back = _clips(validation, frames, frames)
        self.samples = len(self.clips)
        self.module = GroundingNetwork(encoder, len(self.instruments), len(self.acts), len(CHOLEC80_PHASES))

    def identity(self) -> Mapping[str, Any]:
        digest = hashlib.sha256()
        for name, start in self.clips:
            digest.update(repr((name, start, self.videos[name].seconds[start])).encode())
        return {"clips": digest.hexdigest()}

    def batch(self, indices: NDArray[np.int64], rng: np.random.Generator) -> dict[str, Tensor]:
        batch = self._tensors([self.clips[i] for i in indices])
        kept = round(self.tokens * KEPT_TOKENS)
        order = rng.permuted(np.tile(np.arange(self.tokens), (len(indices), 1)), axis=1)
        batch["keep"] = torch.from_numpy(np.sort(order[:, :kept], axis=1))
        return batch

    def loss(self, module: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        keep = batch["keep"]
        instruments, acts, phases = module(batch["features"], keep)
        where, what = batch["where"].gather(1, keep), batch["what"].gather(1, keep)
        weight = torch.ones(instruments.shape[-1], device=instruments.device)
        weight[0] = _NOTHING_WEIGHT
        parts = {
            "where": _cross_entropy(instruments.flatten(0, 1), where.flatten(), weight),
            "what": _cross_entropy(acts.flatten(0, 1), what.flatten()),
            "phase": _cross_entropy(phases, batch["phase"]),
            "presence": _presence_loss(instruments, batch["present"]),
        }
        return torch.stack(list(parts.values())).sum(), {key: float(value.detach()) for key, value in parts.items()}

    def end_of_epoch(self, epoch: int, module: nn.Module, folder: Path) -> dict[str, float]:
        """Shares of held-back tokens and clips that are right, each beside the most frequent answer's."""
        right: dict[str, list[NDArray[np.int64]]] = {"where": [], "what": [], "phase": []}
        device = next(module.parameters()).device
        for first in range(0, len(self.held_back), 32):
            batch = {k: v.to(device) for k, v in self._tensors(self.held_back[first : first + 32]).items()}
            found = dict(zip(right, module(batch["features"]), strict=True))
            for name, logits in found.items():
                truth = batch[name]
                known = truth >= (1 if name == "where" else 0)  # tokens with an instrument
                right[name].append(torch.stack([logits.argmax(-1)[known], truth[known]], dim=1).cpu().numpy())
        figures = {}
        for name, parts in right.items():
            pairs = np.concatenate(parts) if parts else np.zeros((0, 2), np.int64)
            if len(pairs):
                figures[name] = float((pairs[:, 0] == pairs[:, 1]).mean())
                figures[f"{name}_majority"] = float(np.bincount(pairs[:, 1]).max() / len(pairs))
        return figures

    def _tensors(self, clips: Sequence[tuple[str, int]]) -> dict[str, Tensor]:
        features, where, what, phase, present = [], [], [], [], []
        for name, start in clips:
            seconds = self.videos[name].seconds[start : start + self.frames]
            shown = seconds[self.tubelet - 1 :: self.tubelet]
            features.append(self.features[name][start : start + self.frames])
            maps = [self._maps(second) for second in shown]
            where.append(np.concatenate([one[0] for one in maps]))
            what.append(np.concatenate([one[1] for one in maps]))
            last = seconds[-1]
            phase.append(CHOLEC80_PHASES.index(last.phase) if last.phase in CHOLEC80_PHASES else _UNKNOWN)
            present.append(self._presence(seconds, self.videos[name].vocabulary))
        return {
            "features": torch.from_numpy(np.stack(features)).transpose(1, 2),
            "where": torch.from_numpy(np.stack(where)),
            "what": torch.from_numpy(np.stack(what)),
            "phase": torch.tensor(phase),
            "present": torch.from_numpy(np.stack(present)),
        }

    def _maps(self, second: SecondLabels) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Instrument and act at each patch [grid**2]; where boxes overlap, those of the smallest."""
        grid = self.grid
        where, what = (np.full((grid, grid), _UNKNOWN, np.int64) for _ in range(2))
        if second.instruments is None or any(state.box is None for state in second.instruments):
            return where.ravel(), what.ravel()
        where[:] = 0
        centre = (np.arange(grid) + 0.5) / grid
        boxed = [(state, state.box) for state in second.instruments if state.box is not None]
        for state, (left, top, width, height) in sorted(boxed, key=lambda pair: -pair[1][2] * pair[1][3]):
            covered = np.outer((centre >= top) & (centre < top + height), (centre >= left) & (centre < left + width))
            if state.instrument in self.instruments:
                where[covered] = 1 + self.instruments.index(state.instrument)
                act = (state.verb, state.target)
                what[covered] = self.acts.index(act) if act in self.acts else _UNKNOWN
        return where.ravel(), what.ravel()

    def _presence(self, seconds: Sequence[SecondLabels], vocabulary: Sequence[str]) -> NDArray[np.float32]:
        """1 or 0 for each instrument, NaN where it is not known."""
        known = [second.instruments for second in seconds if second.instruments is not None]
        there = {state.instrument for states in known for state in states}
        values = [float(name in there) if known and name in vocabulary else np.nan for name in self.instruments]
        return np.array(values, np.float32)


def ground(
    encoder: VideoEncoder,
    videos: Sequence[ClipVideo],
    features: Mapping[str, NDArray[np.float16]],
    frames: int,
    settings: TrainSettings,
    folder: Path,
    *,
    validation: Sequence[ClipVideo] = (),
    resume: bool = True,
    console: Console | None = None,
) -> VideoEncoder:
    """Train an encoder to know what is at each token's place; returns a copy of it, trained, on the CPU.

    Args:
        encoder: as stage A gave it.
        videos, features, frames, validation: as `GroundingTask`.
        settings: how to train, for `small` GROUNDING.
        folder: the training's own folder; its metrics.jsonl has the figures of `GroundingTask.end_of_epoch`.
        resume, console: as for `fit`.

    Raises:
        TrainingError: as `fit`.
    """
    task = GroundingTask(copy.deepcopy(encoder), videos, features, frames, validation)
    grounded = fit(task, settings, folder, resume=resume, console=console)
    assert isinstance(grounded, GroundingNetwork)
    return grounded.encoder


def _clips(videos: Sequence[ClipVideo], frames: int, stride_s: int) -> list[tuple[str, int]]:
    return [
        (video.name, start)
        for video in videos
        for start in range(0, len(video) - frames + 1, video.hold_s if video.hold_s > 1 else stride_s)
    ]


def _cross_entropy(logits: Tensor, truth: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean over what is known; 0 where nothing is."""
    if not bool((truth >= 0).any()):
        return logits.sum() * 0.0
    return F.cross_entropy(logits, truth, weight, ignore_index=_UNKNOWN)


def _presence_loss(instruments: Tensor, present: Tensor) -> Tensor:
    """Binary cross-entropy of the greatest margin of an instrument over "nothing" among a clip's tokens."""
    margin = (instruments[..., 1:] - instruments[..., :1]).amax(dim=1)
    known = ~present.isnan()
    if not bool(known.any()):
        return margin.sum() * 0.0
    return F.binary_cross_entropy_with_logits(margin[known], present[known])
