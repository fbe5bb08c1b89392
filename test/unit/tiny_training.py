# SPDX-License-Identifier: Apache-2.0
"""A training of a fraction of a second with everything that resuming must get right; run as a program, it is killed.

Usage: tiny_training.py FOLDER [--kill-at STEP] [--plain]
"""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from surg_perception.gsvit.trainer import Task, TrainSettings, fit

SAMPLES, BATCH, EPOCHS = 45, 6, 3
STEPS_PER_EPOCH = SAMPLES // BATCH
STEPS = EPOCHS * STEPS_PER_EPOCH
SETTINGS = TrainSettings(
    epochs=EPOCHS,
    batch=BATCH,
    learning_rate=1e-2,
    final_learning_rate=1e-3,
    ema_half_life_steps=4.0,
    weight_decay=0.01,
    optimiser="adamw",
    gradient_clip=1.0,
    seed=3,
    threads=1,
    checkpoint_every_steps=4,
)


class Network(nn.Module):
    """Batch norm, dropout and an integer table; `plain` has none of them, so that batches can be split."""

    def __init__(self, plain: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.norm = nn.Identity() if plain else nn.BatchNorm2d(6)
        self.drop = nn.Identity() if plain else nn.Dropout(0.2)
        self.out = nn.Linear(6, 4)
        self.register_buffer("table", torch.arange(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.drop(F.relu(self.norm(self.conv(x))).mean((2, 3))))


class TinyTask(Task):
    """Noise images with random classes; `hook(step)` is called in every step, before its update."""

    def __init__(self, hook: Callable[[int], None] | None = None, plain: bool = False, data: str = "noise") -> None:
        torch.manual_seed(1)
        self.module = Network(plain)
        self.samples = SAMPLES
        generator = torch.Generator().manual_seed(2)
        self.images = torch.randn(SAMPLES, 3, 8, 8, generator=generator)
        self.classes = torch.randint(0, 4, (SAMPLES,), generator=generator)
        self.hook, self.plain, self.data = hook, plain, data
        self.step = 0
        self.validated: list[int] = []

    def identity(self) -> Mapping[str, Any]:
        return {"data": self.data}

    def batch(self, indices: NDArray[np.int64], rng: np.random.Generator) -> dict[str, Tensor]:
        noise = 0.0 if self.plain else 0.3
        images = self.images[indices]
        images = images + noise * torch.from_numpy(rng.normal(size=images.shape).astype(np.float32))
        return {"image": images, "class": self.classes[indices]}

    def loss(self, module: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        if self.hook:
            self.hook(self.step)
        self.step += 1
        logits = module(batch["image"])
        return F.cross_entropy(logits, batch["class"]), {"largest_logit": float(logits.detach().max())}

    def end_of_epoch(self, epoch: int, module: nn.Module, folder: Path) -> dict[str, float]:
        self.validated.append(epoch)
        assert not module.training
        return {"loss": float(F.cross_entropy(module(self.images), self.classes))}


def quiet() -> Console:
    return Console(quiet=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kill-at", type=int, default=-1)
    parser.add_argument("--plain", action="store_true")
    options = parser.parse_args()

    def hook(step: int) -> None:
        if step == options.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    fit(TinyTask(hook, options.plain), SETTINGS, options.folder, console=quiet())


if __name__ == "__main__":
    main()
