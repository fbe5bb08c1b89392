# SPDX-License-Identifier: Apache-2.0
"""Causal temporal head in PyTorch: TeCNO's network (Czempiel et al., arXiv 2003.10751) and its training.

`surg_perception.stream.temporal_head` runs it live; both know the same file. Training takes whole videos, one a
step, of latents computed beforehand, and is made for few of them: what it varies from epoch to epoch is where a
video begins, how long its segments take, and the look of the whole video.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from surg_perception.gsvit.calibration import best_temperature
from surg_perception.stream.temporal_head import (
    INPUT_LIMIT,
    KERNEL,
    TemporalConfig,
    TemporalHead,
    plan_steps,
    read_temporal,
    temporal_inputs,
)

__all__ = [
    "LatentSequence",
    "TemporalConfig",
    "TemporalNetwork",
    "TemporalSettings",
    "load_temporal",
    "save_temporal",
    "train_temporal",
]


@dataclass(frozen=True)
class LatentSequence:
    """One video as the temporal head sees it.

    Attributes:
        latents: float32 [n, D], pooled (`surg_perception.stream.temporal_head.pool_latents`).
        probabilities: of the frame head, float32 [n, C]; None where the head does not use them. For training
            they should come from a frame head that did not learn from this video (cross-fitting): on its own
            training videos a frame head is nearly always right, and a temporal head that sees only such
            probabilities learns to repeat them.
        times_s: float64 [n], not decreasing; at any rate: the steps are chosen as they are live.
        phases: int64 [n], -1 where unknown (ignored).
        name: for messages.
        versions: further latents [n, D] of the same frames, of augmented pictures; training draws one of all
            versions for each epoch.
        version_probabilities: the frame head's [n, C] for each of `versions`; where there are none, those of
            the plain pictures go with every version.
    """

    latents: NDArray[np.float32]
    probabilities: NDArray[np.float32] | None
    times_s: NDArray[np.float64]
    phases: NDArray[np.int64]
    name: str = ""
    versions: Sequence[NDArray[np.float32]] = ()
    version_probabilities: Sequence[NDArray[np.float32]] = ()


@dataclass(frozen=True)
class TemporalSettings:
    """How to train a temporal head. Checked when made: ValueError names what is wrong.

    Attributes:
        config: the network.
        epochs: each takes every video once, one video a step of the optimiser.
        learning_rate, final_learning_rate: of Adam; falls from one to the other along half a cosine.
        weight_decay: decoupled (AdamW).
        gradient_clip: largest norm of the gradient.
        ema_half_life_steps: of the average of the weights; 0 takes the last ones.
        class_weights: weigh classes by median frequency (median of all frequencies / own frequency), as TeCNO.
        label_smoothing: share of the truth spread over all classes.
        smoothing_weight, smoothing_limit: of the truncated mean squared error between the log-probabilities of
            neighbouring steps (MS-TCN, eq. 9 to 11: lambda 0.15, tau 4).
        cut: share of the videos of an epoch that begin at a random step of their first half.
        gaps: share of the videos of an epoch of which only excerpts are shown, for recordings that were paused often;
            tried only with starts anywhere, and lost accuracy on whole videos then (docs/results.md).
        speed: each segment of a video lasts up to this many times longer or shorter, the whole video as well.
        noise: standard deviation of noise on every step, in standard deviations of a feature.
        video_noise: the same for an offset that is one for a whole video, as another camera or patient has.
        feature_dropout: share of the features that are blanked for a whole video.
        seed: decides everything random.
    """

    config: TemporalConfig
    epochs: int = 80
    learning_rate: float = 1e-3
    final_learning_rate: float = 1e-5
    weight_decay: float = 1e-3
    gradient_clip: float = 1.0
    ema_half_life_steps: float = 20.0
    class_weights: bool = False
    label_smoothing: float = 0.1
    smoothing_weight: float = 0.15
    smoothing_limit: float = 4.0
    cut: float = 0.3
    gaps: float = 0.0
    speed: float = 1.5
    noise: float = 0.2
    video_noise: float = 0.3
    feature_dropout: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        lowest: dict[str, float] = {"epochs": 1, "speed": 1.0}
        above = ("learning_rate", "gradient_clip", "smoothing_limit")
        shares = {"label_smoothing": 1.0, "cut": 1.0, "gaps": 1.0, "feature_dropout": 0.95}
        for name in (*lowest, *above, *shares, "final_learning_rate", "weight_decay", "ema_half_life_steps",
                     "smoothing_weight", "noise", "video_noise"):  # fmt: skip
            value, low, high = getattr(self, name), lowest.get(name, 0.0), shares.get(name, math.inf)
            if not (low <= value <= high and math.isfinite(value)) or (name in above and value == 0):
                bounds = "above 0" if name in above else f"at least {low:g}"
                raise ValueError(
                    f"{name} is {value}; it must be {bounds}" + (f", at most {high:g}" * (high < math.inf))
                )


class _CausalLayer(nn.Module):
    """Residual layer: linear over x(t - 2d), x(t - d), x(t), ReLU, linear, dropout. Zeros before the start."""

    def __init__(self, channels: int, dilation: int, dropout: float) -> None:
        super().__init__()
        self.dilation = dilation
        self.dilated = nn.Linear(KERNEL * channels, channels)
        self.pointwise = nn.Linear(channels, channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        steps, dilation = len(x), self.dilation
        padded = F.pad(x, (0, 0, 2 * dilation, 0))
        taps = torch.cat((padded[:steps], padded[dilation : dilation + steps], x), dim=1)
        return x + self.dropout(self.pointwise(F.relu(self.dilated(taps))))


class _Stage(nn.Module):
    def __init__(self, config: TemporalConfig, width: int) -> None:
        super().__init__()
        self.inlet = nn.Linear(width, config.channels)
        self.layers = nn.ModuleList(
            _CausalLayer(config.channels, 2**layer, config.dropout) for layer in range(config.layers)
        )
        self.outlet = nn.Linear(config.channels, config.classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inlet(x)
        for layer in self.layers:
            x = layer(x)
        return self.outlet(x)


class TemporalNetwork(nn.Module):
    """Multi-stage causal temporal convolutional network on the steps of one video.

    Buffers: `mean`, `std` [width] of the inputs over the training videos; `temperature`, which divides the last
    stage's logits before the softmax.
    """

    mean: Tensor
    std: Tensor
    temperature: Tensor

    def __init__(self, config: TemporalConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("mean", torch.zeros(config.input_width))
        self.register_buffer("std", torch.ones(config.input_width))
        self.register_buffer("temperature", torch.ones(()))
        self.stages = nn.ModuleList(
            _Stage(config, config.classes if stage else config.input_width) for stage in range(config.stages)
        )

    def standardise(self, inputs: Tensor) -> Tensor:
        """`temporal_inputs` [n, width] to what the first stage sees."""
        return ((inputs - self.mean) / self.std).clamp(-INPUT_LIMIT, INPUT_LIMIT)

    def forward(self, standardised: Tensor) -> Tensor:
        """Standardised inputs [n, width] of n steps to uncalibrated logits of every stage [stages, n, C]."""
        logits = [self.stages[0](standardised)]
        for stage in list(self.stages)[1:]:
            logits.append(stage(torch.softmax(logits[-1], dim=1)))
        return torch.stack(logits)

    @torch.no_grad()
    def logits(self, latents: NDArray[np.float32] | None, probabilities: NDArray[np.float32] | None) -> Tensor:
        """Uncalibrated logits [n, C] of the last stage for n steps of one unbroken history.

        Args:
            latents: [n, D] or [n, D, 4, 4]; None where the head does not use them.
            probabilities: of the frame head, [n, C]; None likewise.

        Raises:
            ValueError: as `surg_perception.stream.temporal_head.temporal_inputs`.
        """
        return self(self.standardise(torch.from_numpy(temporal_inputs(self.config, latents, probabilities))))[-1]

    def probabilities(self, latents: NDArray[np.float32] | None, probabilities: NDArray[np.float32] | None) -> Tensor:
        """Calibrated probabilities [n, C]; arguments and errors as `logits`."""
        return torch.softmax(self.logits(latents, probabilities) / self.temperature, dim=1)

    def head(self, *, reset_gap_s: float | None = None) -> TemporalHead:
        """The streaming form of the weights as they are now."""
        return TemporalHead(
            self.config,
            {name: value.numpy(force=True) for name, value in self.state_dict().items()},
            reset_gap_s=reset_gap_s,
        )


@dataclass(frozen=True)
class _History:
    """An unbroken stretch of one sequence: inputs of each version [n, width], times, phases."""

    name: str
    inputs: tuple[NDArray[np.float32], ...]
    times_s: NDArray[np.float64]
    phases: NDArray[np.int64]

    def steps(self, config: TemporalConfig, start: int = 0) -> NDArray[np.int64]:
        """Indices of the steps when the history begins at frame `start`."""
        return start + np.flatnonzero(plan_steps(self.times_s[start:], config.step_s, math.inf).joins)


def train_temporal(
    sequences: Sequence[LatentSequence],
    settings: TemporalSettings,
    validation: Sequence[LatentSequence] | None = None,
    console: Console | None = None,
) -> TemporalNetwork:
    """Train a temporal head on whole videos, one a step.

    Args:
        sequences: the training videos.
        settings: with the network's configuration.
        validation: videos that calibrate the temperature; it stays 1 without them.
        console: for a progress bar; None shows none.

    Returns:
        The averaged weights in evaluation mode. Same bits for the same arguments, number of threads and machine.

    Raises:
        ValueError: no video, or one whose arrays do not fit each other or the configuration, or are not finite,
            which is named.
        surg_perception.gsvit.trainer.TrainingDiverged: a loss that is not finite, with its epoch and video.
    """
    config = settings.config
    videos = [history for sequence in sequences for history in _histories(sequence, config)]
    held_out = [history for sequence in validation or () for history in _histories(sequence, config)]
    truth = [video.phases[video.steps(config)] for video in videos]
    if not any((phases >= 0).any() for phases in truth):
        raise ValueError(f"{len(sequences)} training videos hold no frame with a known phase; give labelled videos")
    weights = _median_frequency_weights(truth, config.classes) if settings.class_weights else None

    rng = np.random.default_rng(settings.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        network = TemporalNetwork(config)
        _standardise_by(network, videos)
        optimiser = torch.optim.AdamW(
            network.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        total = settings.epochs * len(videos)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, total, settings.final_learning_rate)
        decay = 0.5 ** (1.0 / settings.ema_half_life_steps) if settings.ema_half_life_steps else 0.0
        averaged = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(decay))
        inputs = [[network.standardise(torch.from_numpy(version)) for version in video.inputs] for video in videos]
        with Progress(console=console, disable=console is None) as bar:
            task = bar.add_task("temporal head", total=total)
            for epoch in range(settings.epochs):
                for turn, number in enumerate(rng.permutation(len(videos)).tolist()):
                    steps = _augmented_steps(videos[number], settings, rng)
                    version = inputs[number][rng.integers(len(inputs[number]))]
                    batch = _disturbed(version[torch.from_numpy(steps)], settings, rng)
                    phases = torch.from_numpy(videos[number].phases[steps])
                    loss = _loss(network(batch), phases, weights, settings)
                    if not torch.isfinite(loss):
                        raise _diverged(epoch, epoch * len(videos) + turn, number, loss.item(), videos[number].name)
                    optimiser.zero_grad(set_to_none=True)
                    loss.backward()
                    nn.utils.clip_grad_norm_(network.parameters(), settings.gradient_clip, error_if_nonfinite=False)
                    optimiser.step()
                    schedule.step()
                    averaged.update_parameters(network)
                    bar.update(task, advance=1, description=f"temporal head, loss {loss.item():.3f}")
    trained = averaged.module.eval().requires_grad_(False)
    assert isinstance(trained, TemporalNetwork)
    if not all(torch.isfinite(value).all() for value in trained.state_dict().values()):
        raise _diverged(settings.epochs - 1, total - 1, 0, math.nan, videos[0].name)
    if held_out:
        pairs = [(video, video.steps(config)) for video in held_out]
        logits = [trained(trained.standardise(torch.from_numpy(video.inputs[0][one])))[-1] for video, one in pairs]
        known = np.concatenate([video.phases[one] for video, one in pairs])
        trained.temperature.fill_(best_temperature(torch.cat(logits), torch.from_numpy(known)))
    return trained


def _diverged(epoch: int, step: int, video: int, loss: float, name: str) -> Exception:
    from surg_perception.gsvit.trainer import TrainingDiverged

    what = f"the temporal head's loss on the video {name!r} is not finite"
    return TrainingDiverged(epoch, step, loss, np.array([video]), what, "Nothing was saved.")


def _histories(sequence: LatentSequence, config: TemporalConfig) -> list[_History]:
    """The unbroken stretches of a sequence, checked."""
    count = len(sequence.times_s)
    times_s = np.asarray(sequence.times_s, np.float64)
    phases = np.asarray(sequence.phases, np.int64)
    versions = (sequence.latents, *sequence.versions)
    probabilities = [sequence.probabilities, *sequence.version_probabilities]
    if len(probabilities) == 1:
        probabilities *= len(versions)
    where = f"video {sequence.name!r}"
    if len(probabilities) != len(versions):
        raise ValueError(
            f"{where}: {len(versions) - 1} versions, but version_probabilities for {len(probabilities) - 1}"
        )
    if phases.shape != (count,) or times_s.shape != (count,) or count == 0:
        raise ValueError(f"{where}: times_s has shape {times_s.shape}, phases {phases.shape}; expected [n], n > 0")
    if not (np.isfinite(times_s).all() and (np.diff(times_s) >= 0).all()):
        raise ValueError(f"{where}: times_s must be finite and must not decrease")
    if phases.min() < -1 or phases.max() >= config.classes:
        raise ValueError(
            f"{where}: phases from {phases.min()} to {phases.max()}, but the temporal head has {config.classes} "
            "classes (-1 is unknown); are these labels of another procedure?"
        )
    inputs = []
    for latents, own in zip(versions, probabilities, strict=True):
        try:
            inputs.append(temporal_inputs(config, latents, own))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if len(inputs[-1]) != count:
            raise ValueError(f"{where}: {len(inputs[-1])} latents or probabilities for {count} times")
    histories = []
    plan = plan_steps(times_s, config.step_s)
    for first in np.unique(plan.first):
        part = plan.first == first
        histories.append(_History(sequence.name, tuple(one[part] for one in inputs), times_s[part], phases[part]))
    return histories


def _standardise_by(network: TemporalNetwork, videos: Sequence[_History]) -> None:
    """Mean and standard deviation over all versions of all videos; features that never change get 1."""
    values = np.concatenate([version for video in videos for version in video.inputs]).astype(np.float64)
    std = values.std(axis=0)
    network.mean.copy_(torch.from_numpy(values.mean(axis=0)))
    network.std.copy_(torch.from_numpy(np.where(std > 1e-6, std, 1.0)))


def _median_frequency_weights(truth: Sequence[NDArray[np.int64]], classes: int) -> Tensor:
    """Median frequency balancing (Eigen and Fergus, arXiv 1411.4734): the frequency of a class counts only the
    videos in which it occurs."""
    counts = np.stack([np.bincount(phases[phases >= 0], minlength=classes) for phases in truth]).astype(float)
    present = counts > 0
    frequency = counts.sum(axis=0) / np.maximum((present * counts.sum(axis=1, keepdims=True)).sum(axis=0), 1.0)
    seen = frequency > 0
    weights = np.zeros(classes)
    weights[seen] = np.median(frequency[seen]) / frequency[seen]
    return torch.from_numpy(weights).float()


def _augmented_steps(video: _History, settings: TemporalSettings, rng: np.random.Generator) -> NDArray[np.int64]:
    """Indices of the frames that one epoch takes for steps: another start, other lengths of the segments."""
    count = len(video.times_s)
    start = 0
    if rng.random() < settings.cut:
        start = int(rng.integers(count // 2 + 1))
    else:  # another grid of steps, where there are more frames than steps
        start = int(rng.integers(max(1, np.searchsorted(video.times_s, video.times_s[0] + settings.config.step_s))))
    steps = video.steps(settings.config, start)
    if settings.gaps and rng.random() < settings.gaps:
        steps = _excerpts(steps, rng)
    phases = video.phases[steps]
    segment = np.concatenate(([0], np.cumsum(np.diff(phases) != 0)))
    limit = math.log(settings.speed)
    speeds = np.exp(rng.uniform(-limit, limit, segment[-1] + 1) / 2 + rng.uniform(-limit, limit) / 2)
    # Where on the new, evenly spaced steps each old one begins; a new step shows the old one it falls into.
    ends = np.cumsum(1.0 / speeds[segment])
    taken = np.searchsorted(ends, np.arange(max(1, math.floor(ends[-1]))) + 0.5, side="right")
    return steps[np.minimum(taken, len(steps) - 1)]


def _excerpts(steps: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """Stretches of the steps, shown ones and missing ones of random lengths in turn; at least the first step."""
    shown, missing = rng.uniform(3.0, 20.0), rng.uniform(3.0, 30.0)
    lengths = np.ceil(rng.exponential(np.tile([shown, missing], len(steps)))).astype(np.int64)
    ends = np.cumsum(lengths)
    return steps[np.searchsorted(ends, np.arange(len(steps)), side="right") % 2 == 0]


def _disturbed(inputs: Tensor, settings: TemporalSettings, rng: np.random.Generator) -> Tensor:
    """Standardised inputs [n, width] with noise, an offset of the whole video, and blanked features."""
    steps, width = inputs.shape
    noise = settings.noise * rng.standard_normal((steps, width), np.float32)
    offset = settings.video_noise * rng.standard_normal(width, np.float32)
    kept = (rng.random(width) >= settings.feature_dropout).astype(np.float32)
    kept /= 1.0 - settings.feature_dropout
    return (inputs + torch.from_numpy(noise + offset)) * torch.from_numpy(kept)


def _loss(logits: Tensor, phases: Tensor, weights: Tensor | None, settings: TemporalSettings) -> Tensor:
    """Logits [stages, n, C]: cross-entropy plus smoothing, summed over stages."""
    loss = logits.new_zeros(())
    known = bool((phases >= 0).any())
    for stage in logits:
        if known:
            loss = loss + F.cross_entropy(
                stage, phases, weight=weights, ignore_index=-1, label_smoothing=settings.label_smoothing
            )
        if len(stage) > 1 and settings.smoothing_weight:
            log_probabilities = F.log_softmax(stage, dim=1)
            change = (log_probabilities[1:] - log_probabilities[:-1].detach()).abs()
            loss = loss + settings.smoothing_weight * change.clamp(max=settings.smoothing_limit).square().mean()
    return loss


def save_temporal(network: TemporalNetwork, path: str | Path) -> Path:
    """Write a temporal head as safetensors with its configuration in the metadata; returns the path.

    The file appears whole or not at all; one that is there is replaced.
    """
    from safetensors.torch import save_file

    path = Path(path).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        save_file(tensors, partial, metadata={"temporal_config": json.dumps(asdict(network.config))})
        partial.chmod(0o644)  # safetensors makes files that only their owner can read
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def load_temporal(path: str | Path) -> TemporalNetwork:
    """The network of a file of `save_temporal`, in evaluation mode.

    Raises:
        surg_perception.models.ModelError: no such file, or not a temporal head.
    """
    config, tensors = read_temporal(path)
    network = TemporalNetwork(config)
    network.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in tensors.items()})
    return network.eval().requires_grad_(False)
