# SPDX-License-Identifier: Apache-2.0
"""The table of docs/results.md: leave-one-video-out over whole Cholec80 surgeries, from nothing.

.venv/bin/python scripts/leave_one_out.py DATA --clips CLIPS --out DIR

Resumable; an hour or two on two cores. At the end, and with --report alone, it prints the table of what is there as
Markdown and writes DIR/summary.json.

DATA is a data set with phases (Cholec80, or its frames), CLIPS a folder of videos without labels. For each video of
DATA, everything is trained without it: distillation of the encoder, next-frame pre-training, phase head, temporal
head. Settings are those of the commands `surg-perception train distil | gsvit | phase`, and none was chosen by the
held-out videos unless docs/results.md says so. Two processes may work on different --folds of one --out.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from surg_perception.data.datasets import open_dataset
from surg_perception.gsvit.distil import DEFAULTS as DISTILLATION
from surg_perception.gsvit.distil import distil
from surg_perception.gsvit.phase_metrics import VideoPhases, evaluate
from surg_perception.gsvit.phase_training import (
    FINE_TUNED,
    FROZEN,
    LabelledVideo,
    PhaseOptions,
    all_latents,
    head_logits,
    open_videos,
    temporal_sequences,
    train_phase,
)
from surg_perception.gsvit.pretrain import PretrainOptions, pretrain
from surg_perception.gsvit.resequence import LabelledSurgery, read_surgeries
from surg_perception.gsvit.temporal import LatentSequence, TemporalConfig, TemporalSettings, train_temporal
from surg_perception.gsvit.trainer import TrainSettings
from surg_perception.models import CARD_NAME
from surg_perception.stream.temporal_head import pool_latents

STEP_S = 4.0  # the frames at hand are four seconds apart
HEAD_HIDDEN = (128,)
LABEL_FILES = range(6, 41)  # the rest of the training half of Cholec80's usual split
LABEL_FILE_EPOCHS = 15
NEXT_FRAME = TrainSettings(
    epochs=2, batch=32, learning_rate=5e-4, final_learning_rate=1e-5, gradient_clip=1.0, channels_last=True
)
DECODER_WIDTH = DECODER_RANK = 128  # the release's decoder is beyond a CPU


@dataclass(frozen=True)
class Variant:
    """A way to train: from which encoder, and whether it is frozen."""

    name: str
    start: str  # "random", "distilled" or "next-frame"
    frozen: bool


VARIANTS = (
    Variant("distilled, frozen", "distilled", True),
    Variant("distilled, fine-tuned", "distilled", False),
    Variant("distilled + next frame, frozen", "next-frame", True),
    Variant("distilled + next frame, fine-tuned", "next-frame", False),
    Variant("random, fine-tuned", "random", False),
)


# ---- baselines ---------------------------------------------------------------------------------------------


def colour_histograms(video: LabelledVideo) -> NDArray[np.float32]:
    """HSV histograms [n, 512] of a video's frames, each summing to 1, square-rooted (Hellinger distance)."""
    rows = []
    for frame in video.frames:
        hsv = cv2.cvtColor(np.asarray(frame), cv2.COLOR_BGR2HSV)
        rows.append(cv2.calcHist([hsv], [0, 1, 2], None, [8, 8, 8], [0, 180, 0, 256, 0, 256]).ravel())
    histograms = np.stack(rows)
    return np.sqrt(histograms / histograms.sum(1, keepdims=True)).astype(np.float32)


def majority(training: Sequence[LabelledVideo], test: LabelledVideo, classes: int) -> NDArray[np.int64]:
    """The most frequent phase of the training videos, always."""
    counts = np.bincount(np.concatenate([video.phases for video in training]), minlength=classes)
    return np.full(len(test.phases), counts.argmax())


def nearest_colours(training: Sequence[LabelledVideo], test: LabelledVideo, classes: int) -> NDArray[np.int64]:
    """The phase of the training frame with the nearest colour histogram."""
    from sklearn.neighbors import KNeighborsClassifier

    model = KNeighborsClassifier(n_neighbors=1)
    model.fit(
        np.concatenate([colour_histograms(video) for video in training]),
        np.concatenate([video.phases for video in training]),
    )
    return np.asarray(model.predict(colour_histograms(test)), np.int64)


def transition_prior(training: Sequence[LabelledVideo], test: LabelledVideo, classes: int) -> NDArray[np.int64]:
    """The most probable phase at each step of a Markov chain with the training videos' transitions; no image."""
    counts = np.full((classes, classes), 1e-6)
    for video in training:
        np.add.at(counts, (video.phases[:-1], video.phases[1:]), 1.0)
    transitions = counts / counts.sum(1, keepdims=True)
    state = np.bincount([video.phases[0] for video in training], minlength=classes) / len(training)
    found = []
    for _ in test.phases:
        found.append(int(state.argmax()))
        state = state @ transitions
    return np.array(found)


BASELINES: Mapping[str, Callable[[Sequence[LabelledVideo], LabelledVideo, int], NDArray[np.int64]]] = {
    "majority": majority,
    "colour histogram + nearest neighbour": nearest_colours,
    "transition prior": transition_prior,
}


# ---- one fold ----------------------------------------------------------------------------------------------


class Fold:
    """All trainings without one video; each result is a file, and what is there is not made again."""

    def __init__(
        self, arguments: argparse.Namespace, videos: Sequence[LabelledVideo], held_out: str, classes: int
    ) -> None:
        self.arguments, self.held_out, self.classes = arguments, held_out, classes
        self.videos = videos
        self.training = [video for video in videos if video.name != held_out]
        self.test = next(video for video in videos if video.name == held_out)
        self.folder = arguments.out / held_out
        self.console = Console(width=120)

    def baseline(self, name: str) -> None:
        found = BASELINES[name](self.training, self.test, self.classes)
        self._write(name, {"phases": found})

    def variant(self, variant: Variant) -> None:
        """Train and predict, unless that is done."""
        if self._file(variant.name).exists():
            return
        start = {"random": lambda: None, "distilled": self._distilled, "next-frame": self._next_frame}[variant.start]()
        began = time.monotonic()
        options = PhaseOptions(
            start=start,
            size="m0",
            frozen=variant.frozen,
            head_hidden=HEAD_HIDDEN,
            validation=(self.held_out,),
            temperatures=(1.0, 1.0),
        )
        settings = replace(FROZEN if variant.frozen else FINE_TUNED, threads=self.arguments.threads)
        trained = train_phase(
            self.videos, self.classes, options, settings, self.folder / variant.name / "training", console=self.console
        )
        (entry,) = trained.validation
        entries = [*all_latents(trained.model, self.training, options.views, self.console), entry]
        latents: dict[str, Any] = {
            one.video.name: np.stack([pool_latents(version) for version in (one.latents, *one.views)])
            for one in entries[:-1]
        }
        latents[self.held_out] = pool_latents(entry.latents)[None]
        np.savez(self.folder / variant.name / "latents.npz", **latents)
        single = torch.softmax(head_logits(trained.model, entry.latents), 1).numpy()
        self._write(variant.name, {"single": single, "seconds": np.array(time.monotonic() - began)})

    def temporal_head(self, variant: Variant, surgeries: Sequence[LabelledSurgery]) -> None:
        """Train a temporal head on the variant's latents, with label files of further surgeries or without."""
        name = f"{variant.name}, temporal head" + (" with label files" if surgeries else "")
        if self._file(name).exists():
            return
        with np.load(self.folder / variant.name / "latents.npz") as stored:
            donors, (test,) = (
                [
                    LatentSequence(v[0], None, video.times_s, video.phases, video.name, list(v[1:]))
                    for video in videos
                    for v in (stored[video.name],)
                ]
                for videos in (self.training, [self.test])
            )
        config = TemporalConfig(test.latents.shape[1], self.classes, inputs="latent", step_s=STEP_S)
        settings = TemporalSettings(config, epochs=LABEL_FILE_EPOCHS if surgeries else TemporalSettings.epochs)
        tools = [video.tools for video in self.training]
        began = time.monotonic()
        head = train_temporal(temporal_sequences(donors, tools, surgeries, settings), settings, console=self.console)
        streamed = head.head().run(test.latents, None, test.times_s)
        self._write(name, {"temporal": streamed, "seconds": np.array(time.monotonic() - began)})

    def _distilled(self) -> Path:
        folder = self.folder / "distilled"
        if not (folder / CARD_NAME).exists():
            distil(
                [open_dataset(self.arguments.data), open_dataset(self.arguments.clips, rate_hz=2.0)],
                folder,
                replace(DISTILLATION, threads=self.arguments.threads),
                validation=(self.held_out,),
                cache=self.arguments.cache,
                console=self.console,
            )
        return folder

    def _next_frame(self) -> Path:
        folder = self.folder / "next-frame"
        if not (folder / CARD_NAME).exists():
            options = PretrainOptions(
                gap_s=STEP_S,
                start=self._distilled(),
                validation=(self.held_out,),
                mirror=True,
                augment=True,
                decoder_width=DECODER_WIDTH,
                decoder_rank=DECODER_RANK,
            )
            datasets = [open_dataset(self.arguments.data), open_dataset(self.arguments.clips)]
            settings = replace(NEXT_FRAME, threads=self.arguments.threads)
            pretrain(
                datasets, folder, options, settings, cache=self.arguments.cache, forecast=False, console=self.console
            )
        return folder

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.npz"

    def _write(self, name: str, content: Mapping[str, NDArray[Any]]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, Any] = {"truth": self.test.phases, "times_s": self.test.times_s, **content}
        np.savez(self._file(name), **arrays)
        found = {key: value if value.ndim == 1 else value.argmax(1) for key, value in content.items() if value.ndim}
        known = self.test.phases >= 0
        accuracies = {key: round(float((value == self.test.phases)[known].mean()), 4) for key, value in found.items()}
        self.console.print(f"{self.held_out}, {name}: {json.dumps(accuracies)}")


# ---- the table ---------------------------------------------------------------------------------------------


def rows(out: Path, names: Sequence[str]) -> dict[str, dict[str, NDArray[Any]]]:
    """Predictions by row of the table and video, int64 [n]; rows that lack a video are left out."""
    found: dict[str, dict[str, NDArray[Any]]] = {}
    heads = ("", ", temporal head", ", temporal head with label files")
    variants = [f"{variant.name}{head}" for variant in VARIANTS for head in heads]
    for entry in (*BASELINES, *variants):
        for name in names:
            file = out / name / f"{entry}.npz"
            if file.exists():
                with np.load(file) as content:
                    value = next(content[key] for key in ("phases", "single", "temporal") if key in content)
                    found.setdefault(entry, {})[name] = value if value.ndim == 1 else value.argmax(1)
    return {row: videos for row, videos in found.items() if len(videos) == len(names)}


def report(out: Path, videos: Sequence[LabelledVideo], phases: Sequence[str]) -> str:
    """The table as Markdown; all figures go to summary.json."""
    summary = {}
    names = [video.name for video in videos]
    lines = [
        f"| | {' | '.join(names)} | accuracy | Jaccard | edit | F1@50 |",
        "|---|" + "---|" * (len(names) + 4),
    ]
    for row, predictions in rows(out, names).items():
        scored = [VideoPhases(v.name, v.times_s, v.phases, predictions[v.name].astype(np.int64)) for v in videos]
        metrics = summary[row] = evaluate(scored, phases, "cholec80")
        accuracies = [metrics["per_video"][name]["accuracy_strict"] for name in names]
        mean, segmental = metrics["strict"]["accuracy"], metrics["segmental"]
        by_video = " | ".join(f"{value:.1f}" for value in accuracies)
        lines.append(
            f"| {row} | {by_video} | {mean['mean']:.1f} ± {mean['std']:.1f} | "
            f"{metrics['strict']['jaccard']['mean']:.1f} | {segmental['edit']['mean']:.1f} | "
            f"{segmental['f1@50']['mean']:.1f} |"
        )
    (out / "summary.json").write_text(json.dumps(summary, indent=1), "utf-8")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="data set with phases")
    parser.add_argument("--clips", type=Path, help="folder of videos without labels")
    parser.add_argument("--surgeries", type=Path, help="Cholec80 label files, of which videos 6 to 40 are used")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path(".cache/frames"), help="for resized frames")
    parser.add_argument("--folds", nargs="+", metavar="VIDEO", help="videos to hold out (default: each)")
    parser.add_argument("--variants", nargs="*", type=int, metavar="N", help=f"of {[v.name for v in VARIANTS]}, from 0")
    parser.add_argument("--report", action="store_true", help="train nothing, print the table of what is there")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dataset = open_dataset(arguments.data)
    videos = open_videos([dataset], arguments.cache)
    if not arguments.report:
        held_out = arguments.folds or [video.name for video in videos]
        folds = [Fold(arguments, videos, name, len(dataset.phases)) for name in held_out]
        numbers = range(len(VARIANTS)) if arguments.variants is None else arguments.variants
        surgeries: list[LabelledSurgery] = []
        if arguments.surgeries:
            surgeries = read_surgeries(arguments.surgeries, STEP_S, dataset.phases, LABEL_FILES)
        for fold in folds:
            for name in BASELINES:
                fold.baseline(name)
        for variant in (VARIANTS[number] for number in numbers):
            for fold in folds:
                fold.variant(variant)
                fold.temporal_head(variant, [])
                if surgeries:
                    fold.temporal_head(variant, surgeries)
    print(report(arguments.out, videos, dataset.phases))


if __name__ == "__main__":
    main()
