# SPDX-License-Identifier: Apache-2.0
"""Trains the small GSViT that ships in models/: EfficientViT-M0 with phase head and frame decoder, on the phantom.

.venv/bin/python scripts/train_phantom_model.py            about 25 minutes on two cores
.venv/bin/python scripts/train_phantom_model.py --quick    the same road in seconds, for tests; useless weights

Two stages: `phase` trains encoder and head and writes the model folder; `forecast` leaves these as they are and adds
a decoder that draws the picture one second ahead from the latent. `--stage forecast` adds it to a folder that exists.

Rendered frames (1 GB) and the state of an interrupted training are kept below .cache/; running the same command
again goes on where it stopped. Procedures (seeds) for training, calibration and the card's figures are disjoint.
"""

from __future__ import annotations

import argparse
import copy
import functools
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from surg_perception.data.labels import CHOLEC80_PHASES  # noqa: E402
from surg_perception.data.phantom import Phantom  # noqa: E402
from surg_perception.gsvit import load_gsvit  # noqa: E402
from surg_perception.gsvit.calibration import best_temperature  # noqa: E402
from surg_perception.gsvit.model_folder import round_matrices_to_fp16, save_model_folder  # noqa: E402
from surg_perception.gsvit.network import IMAGE_SIZE, GSViT, GSViTConfig, frame_decoder  # noqa: E402
from surg_perception.gsvit.trainer import (  # noqa: E402
    Task,
    TrainSettings,
    fit,
    follow,
)
from surg_perception.models import LabelFacts, ModelCard, read_card  # noqa: E402
from surg_perception.runtime import open_backend  # noqa: E402

CLASSES = len(CHOLEC80_PHASES)
FRAME_SIZES = ((320, 240), (427, 240), (480, 270), (480, 360), (640, 360), (640, 480), (854, 480))
DURATIONS_S = (60.0, 1200.0)
TEST_SIZE, TEST_DURATION_S = (854, 480), 120.0
MAX_BYTES = 12_000_000


@dataclass(frozen=True)
class Plan:
    """All that decides the result. Seeds of the three sets start at 1000, 2000 and 3000."""

    train_procedures: int = 60
    calibration_procedures: int = 10
    test_procedures: int = 16
    frames: int = 80
    epochs: int = 12
    batch: int = 64
    peak_learning_rate: float = 2e-3
    weight_decay: float = 0.05
    label_smoothing: float = 0.05
    ema_half_life_steps: float = 100.0
    head_hidden: tuple[int, ...] = (128,)
    seed: int = 0


@dataclass(frozen=True)
class ForecastPlan:
    """All that decides the forecast decoder. Seeds: training from 4000, validation from 4900."""

    gap_s: float = 1.0
    train_procedures: int = 64
    validation_procedures: int = 8
    frames: int = 90
    sizes: tuple[tuple[int, int], ...] = ((427, 240), (480, 270), (640, 360))
    durations_s: tuple[float, float] = (60.0, 300.0)
    decoder_width: int = 64
    decoder_rank: int = 32
    epochs: int = 5
    batch: int = 8
    peak_learning_rate: float = 3e-3
    seed: int = 0


QUICK_FORECAST = ForecastPlan(
    train_procedures=2, validation_procedures=1, frames=9, sizes=((160, 120),), decoder_width=16, decoder_rank=4,
    epochs=1, batch=8,
)  # fmt: skip
QUICK = Plan(train_procedures=2, calibration_procedures=1, test_procedures=1, frames=14, epochs=1, batch=14)


# ---- frames ------------------------------------------------------------------------------------------------


def render(task: tuple[int, int, bool, Path]) -> Path:
    """Write one procedure's frames, uint8 [n, 224, 224, 3] BGR, and their phases to a file; returns its path.

    For the test, frames are evenly spaced in time at the size and length that the demo has. Otherwise size and
    length vary, and every second frame is drawn from a phase chosen evenly, since short phases are rare.
    """
    seed, frames, test, file = task
    if file.exists():
        return file
    rng = np.random.default_rng([seed, frames])
    (width, height), duration_s = TEST_SIZE, TEST_DURATION_S
    if not test:
        width, height = FRAME_SIZES[rng.integers(len(FRAME_SIZES))]
        duration_s = float(np.exp(rng.uniform(*np.log(DURATIONS_S))))
    phantom = Phantom(width, height, seed=seed, duration_s=duration_s)
    images, phases = [], []
    for k in range(frames):
        time_s = (k + 0.5) / frames * duration_s
        if not test and k % 2:
            start_s, end_s, _ = phantom.phases[(k // 2) % CLASSES]
            time_s = rng.uniform(start_s, end_s)
        bgr, labels = phantom.frame(min(int(time_s * phantom.rate_hz), len(phantom) - 1))
        images.append(cv2.resize(bgr, (IMAGE_SIZE, IMAGE_SIZE), interpolation=cv2.INTER_LINEAR))
        phases.append(labels.phase)
    partial = file.with_suffix(f".{os.getpid()}.partial.npz")
    np.savez(partial, images=np.stack(images), phases=np.array(phases, np.int64))
    os.replace(partial, file)
    return file


@functools.cache
def phantom_sha256() -> str:
    """sha256 over the phantom's source, so that frames of another phantom are never mixed in."""
    digest = hashlib.sha256()
    for file in sorted((ROOT / "surg_perception" / "data").glob("phantom*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def render_run(task: tuple[int, ForecastPlan, Path]) -> Path:
    """Write one procedure's pictures, one every gap_s, uint8 [n, 224, 224, 3] BGR, to a file; returns its path."""
    seed, plan, file = task
    if file.exists():
        return file
    rng = np.random.default_rng([seed, plan.frames])
    width, height = plan.sizes[rng.integers(len(plan.sizes))]
    duration_s = float(np.exp(rng.uniform(*np.log(plan.durations_s))))
    phantom = Phantom(width, height, rate_hz=1.0 / plan.gap_s, seed=seed, duration_s=duration_s)
    first = int(rng.integers(max(1, len(phantom) - plan.frames + 1)))
    images = [
        cv2.resize(phantom.frame(index)[0], (IMAGE_SIZE, IMAGE_SIZE), interpolation=cv2.INTER_LINEAR)
        for index in range(first, min(first + plan.frames, len(phantom)))
    ]
    partial = file.with_suffix(f".{os.getpid()}.partial.npy")
    np.save(partial, np.stack(images))
    os.replace(partial, file)
    return file


def load_runs(
    name: str, first_seed: int, procedures: int, plan: ForecastPlan, cache: Path, workers: int, progress: Progress
) -> list[NDArray[np.uint8]]:
    """Pictures of each procedure, gap_s apart, uint8 [n, 224, 224, 3]; rendered where not cached."""
    settings = json.dumps([phantom_sha256(), plan.frames, plan.gap_s, plan.sizes, plan.durations_s])
    folder = cache / "phantom_frames" / f"runs-{hashlib.sha256(settings.encode()).hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    tasks = [(seed, plan, folder / f"{seed}.npy") for seed in range(first_seed, first_seed + procedures)]
    bar = progress.add_task(f"frames for {name}", total=procedures)
    runs = []
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for file in pool.map(render_run, tasks):
            runs.append(np.load(file, mmap_mode="r"))
            progress.advance(bar)
    return runs


def load_frames(
    name: str, first_seed: int, procedures: int, frames: int, test: bool, cache: Path, progress: Progress
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images [procedures, frames, 224, 224, 3] and phases [procedures, frames], rendered where not cached."""
    settings = json.dumps([phantom_sha256(), FRAME_SIZES, DURATIONS_S, TEST_SIZE, TEST_DURATION_S, frames, test])
    folder = cache / "phantom_frames" / hashlib.sha256(settings.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    tasks = [(seed, frames, test, folder / f"{seed}.npz") for seed in range(first_seed, first_seed + procedures)]
    bar = progress.add_task(f"frames for {name}", total=procedures)
    images, phases = [], []
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        for file in pool.map(render, tasks):
            with np.load(file) as content:
                images.append(content["images"])
                phases.append(content["phases"])
            progress.advance(bar)
    return np.stack(images), np.stack(phases)


# ---- training ----------------------------------------------------------------------------------------------


def to_network(images: NDArray[np.uint8], device: torch.device) -> Tensor:
    """uint8 BGR [n, 224, 224, 3] to float BGR [n, 3, 224, 224] in 0..1."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).to(torch.float32) / 255.0


def augment(images: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Other cameras, lights and views of uint8 BGR [n, 224, 224, 3], which is left as it is.

    Rotation, zoom, aspect, shift, mirror; blur; saturation; brightness, white balance and gamma; noise; patches.
    """
    side = IMAGE_SIZE
    levels = np.linspace(0.0, 1.0, 256)[:, None]
    noise = rng.normal(0.0, 1.0, (side, side, 3)).astype(np.float32)  # one pattern a batch is enough
    out = np.empty_like(images)
    for i, image in enumerate(images):
        angle, zoom = rng.uniform(-20, 20), rng.uniform(0.85, 1.2)
        matrix = np.asarray(cv2.getRotationMatrix2D((side / 2, side / 2), angle, zoom), np.float64)
        matrix[:, 0] *= rng.uniform(0.85, 1.18) * rng.choice((-1.0, 1.0))
        centre = matrix @ (side / 2, side / 2, 1.0)
        matrix[:, 2] += side / 2 - centre + rng.uniform(-0.1, 0.1, 2) * side
        x = cv2.warpAffine(image, matrix, (side, side), flags=cv2.INTER_LINEAR)
        if rng.random() < 0.4:
            x = cv2.blur(x, (3, 3))
        grey = rng.uniform(-0.4, 0.4)
        x = cv2.transform(x, (1.0 - grey) * np.eye(3) + grey / 3.0)
        gains = rng.uniform(0.7, 1.35) * rng.uniform(0.85, 1.18, 3)
        table = np.clip(255.0 * gains * levels ** np.exp(rng.uniform(-0.35, 0.35)), 0, 255).astype(np.uint8)
        x = cv2.LUT(x, table[None])
        x = cv2.addWeighted(x, 1.0, noise, rng.uniform(-12.0, 12.0), 0.0, dtype=cv2.CV_8U)
        if rng.random() < 0.3:
            height, width = rng.integers(24, 80, 2)
            top, left = rng.integers(0, side - height), rng.integers(0, side - width)
            x[top : top + height, left : left + width] = rng.integers(0, 256, 3)
        out[i] = x
    return out


def logits_of(model: GSViT, images: NDArray[np.uint8], device: torch.device) -> Tensor:
    """Uncalibrated logits [n, classes] on the CPU."""
    assert model.head is not None
    with torch.no_grad():
        parts = [
            model.head(model.features(to_network(images[i : i + 64], device))).cpu() for i in range(0, len(images), 64)
        ]
    return torch.cat(parts)


def train(
    plan: Plan,
    data: tuple[NDArray[np.uint8], NDArray[np.int64]],
    check: tuple[NDArray[np.uint8], NDArray[np.int64]],
    device: torch.device,
    state_file: Path,
    progress: Progress,
) -> GSViT:
    """The moving average of the weights after the last epoch, in evaluation mode on the CPU."""
    images, phases = data[0].reshape(-1, *data[0].shape[2:]), torch.from_numpy(data[1].reshape(-1))
    steps = len(images) // plan.batch
    torch.manual_seed(plan.seed)
    model = GSViT(GSViTConfig("m0", decoder=False, classes=CLASSES, head_hidden=plan.head_hidden)).to(device)
    average = copy.deepcopy(model).eval()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": plan.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=plan.peak_learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, plan.peak_learning_rate, total_steps=plan.epochs * steps, pct_start=0.15
    )
    parts: dict[str, Any] = {"model": model, "average": average, "optimiser": optimiser, "schedule": schedule}
    first = 0
    if state_file.exists():
        state = torch.load(state_file, map_location=device, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        first = state["epochs"]
        progress.console.print(f"going on after epoch {first} ({state_file})")
    bar = progress.add_task("training", total=plan.epochs * steps, completed=first * steps)
    for epoch in range(first, plan.epochs):
        torch.manual_seed(1000 * plan.seed + epoch)  # dropout; so that a resumed run equals an uninterrupted one
        rng = np.random.default_rng([plan.seed, epoch])
        order = torch.from_numpy(rng.permutation(len(images))[: steps * plan.batch])
        model.train()
        total = 0.0
        for chosen in order.split(plan.batch):
            batch = to_network(augment(images[chosen.numpy()], rng), device)
            assert model.head is not None
            logits = model.head(model.features(batch))
            loss = F.cross_entropy(logits, phases[chosen].to(device), label_smoothing=plan.label_smoothing)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            follow(average, model, 0.5 ** (1.0 / plan.ema_half_life_steps))
            total += loss.item()
            progress.advance(bar)
        found = logits_of(average, check[0].reshape(-1, *check[0].shape[2:]), device).argmax(1).numpy()
        accuracy = float((found == check[1].reshape(-1)).mean())
        progress.console.print(
            f"epoch {epoch + 1} of {plan.epochs}: training loss {total / steps:.3f}, "
            f"accuracy of the averaged weights on the calibration procedures {accuracy:.3f}"
        )
        partial = state_file.with_suffix(".partial")
        torch.save({"epochs": epoch + 1, **{name: part.state_dict() for name, part in parts.items()}}, partial)
        os.replace(partial, state_file)
    return average.cpu()


# ---- calibration and figures -------------------------------------------------------------------------------


def figures(probabilities: NDArray[np.float32], phases: NDArray[np.int64]) -> dict[str, object]:
    """Accuracy, macro F1, expected calibration error (15 bins) and recall per phase.

    Args:
        probabilities: [procedures, frames, classes].
        phases: [procedures, frames].
    """
    found = probabilities.argmax(-1)
    per_procedure = (found == phases).mean(axis=1)
    confusion = np.zeros((CLASSES, CLASSES), np.int64)
    np.add.at(confusion, (phases.ravel(), found.ravel()), 1)
    hits, truth, said = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    with np.errstate(invalid="ignore"):
        f1 = 2 * hits / (truth + said)
        recall = hits / truth
    confidence, right = probabilities.max(-1).ravel(), (found == phases).ravel()
    bins = np.minimum((confidence * 15).astype(int), 14)
    gaps = [abs(float((confidence[bins == b] - right[bins == b]).sum())) for b in range(15)]
    return {
        "accuracy": round(float(per_procedure.mean()), 4),
        "accuracy_sd_over_procedures": round(float(per_procedure.std(ddof=1)), 4) if len(phases) > 1 else None,
        "macro_f1": round(float(np.nanmean(f1)), 4),
        "expected_calibration_error": round(sum(gaps) / right.size, 4),
        "recall": {
            name: round(float(value), 4) for name, value in zip(CHOLEC80_PHASES, recall, strict=True) if value == value
        },
    }


def train_phases(arguments: argparse.Namespace, console: Console) -> None:
    """The first stage: encoder and head, measured, in a model folder."""
    plan = replace(QUICK if arguments.quick else Plan(), seed=arguments.seed)
    plan = replace(plan, epochs=arguments.epochs or plan.epochs)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = json.dumps([phantom_sha256(), Path(__file__).read_text("utf-8"), asdict(plan)])
    key = hashlib.sha256(settings.encode()).hexdigest()[:16]
    state_file = arguments.cache / "train_phantom_model" / f"{key}.pt"
    state_file.parent.mkdir(parents=True, exist_ok=True)

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        sets = {
            name: load_frames(name, first, count, plan.frames, name == "the test", arguments.cache, progress)
            for name, first, count in (
                ("training", 1000, plan.train_procedures),
                ("calibration", 2000, plan.calibration_procedures),
                ("the test", 3000, plan.test_procedures),
            )
        }
        model = train(plan, sets["training"], sets["calibration"], device, state_file, progress)
    round_matrices_to_fp16(model)
    assert model.head is not None
    cpu = torch.device("cpu")
    flat = {name: images.reshape(-1, *images.shape[2:]) for name, (images, _) in sets.items()}
    calibration = torch.from_numpy(sets["calibration"][1].reshape(-1))
    model.head.temperature.fill_(best_temperature(logits_of(model, flat["calibration"], cpu), calibration))
    logits = logits_of(model, flat["the test"], cpu) / model.head.temperature
    phases = sets["the test"][1]
    measured = figures(torch.softmax(logits, 1).numpy().reshape(*phases.shape, CLASSES), phases)

    width, height = TEST_SIZE
    card = save_model_folder(
        model,
        arguments.out,
        name=arguments.out.name,
        version="0.2.0",
        labels=LabelFacts("cholec80", CHOLEC80_PHASES),
        metrics={
            "held_out_phantom": {
                **measured,
                "measured_on": f"{plan.test_procedures} phantom procedures of {TEST_DURATION_S:g} s that were not "
                f"trained on, {width}x{height}, {plan.frames} evenly spaced single frames each, no temporal filter",
            }
        },
        training={
            "data": f"the phantom of this project (procedural images, no patient): {plan.train_procedures} procedures "
            f"of {DURATIONS_S[0]:g} to {DURATIONS_S[1]:g} s, {plan.frames} frames each",
            "phantom_sha256": phantom_sha256(),
            "seeds": {
                "training": [1000, 1000 + plan.train_procedures - 1],
                "calibration": [2000, 2000 + plan.calibration_procedures - 1],
                "test": [3000, 3000 + plan.test_procedures - 1],
            },
            "start_weights": "random",
            "script": "scripts/train_phantom_model.py",
            "settings": {**asdict(plan), "head_hidden": list(plan.head_hidden)},
        },
        licence="Apache-2.0",
        intended_use="Demonstration and tests of the pipeline on its own phantom. Trained on procedural images, never "
        "on a patient: on real video its phases mean nothing. Not a medical device.",
        weight_storage="fp16",
    )
    state_file.unlink()
    console.print(f"{card.model_id} in {arguments.out}: {json.dumps(measured, indent=2)}")


# ---- forecast ----------------------------------------------------------------------------------------------


class ForecastTask(Task):
    """Latents of the frozen encoder and the pictures one gap later.

    Args:
        runs: per procedure, pictures one gap apart, uint8 [n, 224, 224, 3].
        latents: of the same pictures, float32 [n, D, 4, 4].
        held_out: runs and latents of other procedures.
    """

    def __init__(
        self,
        decoder: torch.nn.Module,
        runs: list[NDArray[np.uint8]],
        latents: list[NDArray[np.float32]],
        held_out: tuple[list[NDArray[np.uint8]], list[NDArray[np.float32]]],
        identity: dict[str, Any],
    ) -> None:
        self.module = decoder
        self._runs, self._latents, self._held_out, self._identity = runs, latents, held_out, identity
        self._pairs = [(run, k) for run, pictures in enumerate(runs) for k in range(len(pictures) - 1)]
        self.samples = len(self._pairs)

    def identity(self) -> dict[str, Any]:
        return self._identity

    def batch(self, indices: NDArray[np.int64], rng: np.random.Generator) -> dict[str, Tensor]:
        pairs = [self._pairs[index] for index in indices]
        return {
            "latent": torch.from_numpy(np.stack([self._latents[run][k] for run, k in pairs])),
            "target": torch.from_numpy(np.stack([self._runs[run][k + 1] for run, k in pairs])),
        }

    def loss(self, module: torch.nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        target = batch["target"].permute(0, 3, 1, 2).to(torch.float32) / 255.0
        return F.l1_loss(module(batch["latent"]), target), {}

    def end_of_epoch(self, epoch: int, module: torch.nn.Module, folder: Path) -> dict[str, float]:
        return forecast_figures(module, *self._held_out)


@torch.no_grad()
def forecast_figures(
    decoder: torch.nn.Module, runs: list[NDArray[np.uint8]], latents: list[NDArray[np.float32]]
) -> dict[str, float]:
    """Mean absolute error of the forecast, and of the picture before taken for it, pixel values in 0..1."""
    device = next(decoder.parameters()).device
    errors, copy_errors = [], []
    for pictures, latent in zip(runs, latents, strict=True):
        truth = to_network(np.array(pictures), device)  # a copy: the cache is read-only
        forecast = torch.cat([decoder(part.to(device)) for part in torch.from_numpy(latent[:-1]).split(32)])
        errors.append(float(F.l1_loss(forecast, truth[1:])))
        copy_errors.append(float(F.l1_loss(truth[:-1], truth[1:])))
    return {"mean_absolute_error": float(np.mean(errors)), "copy_error": float(np.mean(copy_errors))}


def add_forecast(plan: ForecastPlan, folder: Path, cache: Path, threads: int, console: Console) -> ModelCard:
    """Train a decoder on the folder's own encoder and write the folder again, encoder and head as they are."""
    card = read_card(folder)
    model = load_gsvit(folder)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress, open_backend(card, threads=threads) as encoder:
        sets = []
        for name, first, count in (
            ("the forecast", 4000, plan.train_procedures),
            ("its test", 4900, plan.validation_procedures),
        ):
            runs = load_runs(name, first, count, plan, cache, threads, progress)
            bar = progress.add_task(f"latents for {name}", total=count)
            latents = []
            for pictures in runs:
                latents.append(encoder.infer_batch(pictures)[1])
                progress.advance(bar)
            sets.append((runs, latents))
    config = replace(model.config, decoder=True, decoder_width=plan.decoder_width, decoder_rank=plan.decoder_rank)
    torch.manual_seed(plan.seed)
    identity = {"plan": asdict(plan), "encoder": card.graph.sha256 if card.graph else "", "phantom": phantom_sha256()}
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    settings = TrainSettings(
        epochs=plan.epochs,
        batch=plan.batch,
        learning_rate=plan.peak_learning_rate,
        final_learning_rate=plan.peak_learning_rate * 1e-3,
        schedule="one_cycle",
        seed=plan.seed,
        threads=threads,
        checkpoint_every_steps=200,
    )
    state = cache / "train_phantom_model" / f"forecast-{key}"
    task = ForecastTask(frame_decoder(config, model.latent_shape[0]), *sets[0], sets[1], identity)
    model.decoder = fit(task, settings, state, console=console)  # type: ignore[assignment]
    model.config = config
    round_matrices_to_fp16(model)
    assert model.decoder is not None
    measured = {name: round(value, 4) for name, value in forecast_figures(model.decoder, *sets[1]).items()}
    new_card = save_model_folder(
        model,
        folder,
        name=card.name,
        version=card.version,
        labels=card.labels,
        metrics={
            **card.metrics,
            "held_out_phantom_forecast": {
                **measured,
                "measured_on": f"{plan.validation_procedures} phantom procedures that were not trained on, one picture "
                f"every {plan.gap_s:g} s; pixel values 0..1; copy_error: the picture before taken for the forecast",
            },
        },
        training={
            **card.training,
            "forecast": {
                "data": f"{plan.train_procedures} phantom procedures of {plan.durations_s[0]:g} to "
                f"{plan.durations_s[1]:g} s, one picture every {plan.gap_s:g} s; encoder and head unchanged",
                "seeds": {
                    "training": [4000, 4000 + plan.train_procedures - 1],
                    "test": [4900, 4900 + plan.validation_procedures - 1],
                },
                "settings": json.loads(json.dumps(asdict(plan))),
            },
        },
        licence=card.licence,
        intended_use=card.intended_use,
        weight_storage="fp16",
        procedure=card.procedure,
        forecast_gap_s=plan.gap_s,
    )
    shutil.rmtree(state)
    console.print(f"forecast in {folder}: {json.dumps(measured)}")
    return new_card


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "models" / "gsvit_m0_phantom", help="model folder to write")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache", help="where frames and progress are kept")
    parser.add_argument("--epochs", type=int, help=f"default {Plan.epochs}")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and augmentation")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="of PyTorch; 1 is fastest on a busy machine"
    )
    parser.add_argument("--stage", choices=("all", "phase", "forecast"), default="all")
    parser.add_argument("--quick", action="store_true", help="a few frames and one epoch: tests the road only")
    arguments = parser.parse_args()
    console = Console()
    torch.set_num_threads(arguments.threads)
    if arguments.stage != "forecast":
        train_phases(arguments, console)
    if arguments.stage != "phase":
        plan = QUICK_FORECAST if arguments.quick else ForecastPlan()
        add_forecast(replace(plan, seed=arguments.seed), arguments.out, arguments.cache, arguments.threads, console)
    size = sum(file.stat().st_size for file in arguments.out.iterdir())
    if size > MAX_BYTES:
        raise SystemExit(f"{arguments.out} holds {size} bytes; at most {MAX_BYTES} may ship")
    console.print(f"{arguments.out} ({size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
