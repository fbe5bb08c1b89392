# SPDX-License-Identifier: Apache-2.0
"""The one training loop: averaging of weights, exact resume, progress, many GPUs through Accelerate.

Everything random in a step is drawn from generators seeded with (seed, epoch, step, process), so a training
that was killed and resumed does what the unbroken one would have done: same losses, on a CPU the same bits.

A training's folder holds
- `state.pt`: weights, averaged weights, optimiser, gradient scaler, position and settings, replaced atomically;
- `losses.jsonl`: one line per step, `{"epoch", "step", "loss", "lr"}`, both counted from 0, each step once;
- `metrics.jsonl`: one line per validation, `{"epoch", "step", "images_per_s", …}`, `step` = steps done;
- `pictures/step_<n>/`: what the task drew at that validation;
- `tensorboard/`.
"""

from __future__ import annotations

import copy
import errno
import json
import math
import os
import shutil
import signal
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

STATE_NAME, LOSSES_NAME, METRICS_NAME = "state.pt", "losses.jsonl", "metrics.jsonl"
SCHEDULES = ("linear", "exponential", "one_cycle")
OPTIMISERS = ("adam", "adamw")
PRECISIONS = ("fp32", "bf16", "fp16")
_WARM_UP_SHARE, _WARM_UP_FROM = 0.15, 1.0 / 25.0
_STATE_FORMAT = 1


class TrainingError(RuntimeError):
    """A training that cannot start, go on or be saved: what was found, what was expected and what to do."""


class TrainingDiverged(TrainingError):
    """The loss, or its gradient, is NaN or infinite. The last checkpoint is the one before.

    Attributes:
        epoch, step: where, counted from 0; `step` from the start of the training.
        loss: its value.
        indices: of the samples in the batch.
    """

    def __init__(self, epoch: int, step: int, loss: float, indices: NDArray[np.int64], what: str, kept: str) -> None:
        self.epoch, self.step, self.loss, self.indices = epoch, step, loss, indices
        super().__init__(
            f"{what} in epoch {epoch}, step {step} (counted from 0): loss {loss}, samples {indices.tolist()}. "
            f"{kept} Look at these samples, lower the learning rate, clip the gradient or train in fp32"
        )


class TrainingStopped(SystemExit):
    """SIGTERM or SIGINT ended the training after a checkpoint; the exit status is 128 + the signal's number."""


@dataclass(frozen=True)
class TrainSettings:
    """How to train. The defaults are those of GSViT's pre-training.

    Attributes:
        epochs: passes over the training set.
        batch: samples per step over all processes; a last, smaller batch of an epoch is left out.
        learning_rate, final_learning_rate: first (one_cycle: highest) and last value.
        schedule: "linear" or "exponential" from the first to the last step, or "one_cycle": up by a cosine during
            the first 15 % of the steps from 1/25 of the highest, down by a cosine.
        optimiser: "adam" or "adamw".
        betas: of the optimiser's moving averages of the gradient and of its square.
        weight_decay: of matrices and kernels; vectors (biases, norms) have none.
        gradient_clip: largest norm of the gradient; 0 for no limit.
        ema_half_life_steps: half-life of the moving average of weights and batch-norm statistics; 0 for none.
        precision: "fp32", or autocast to "bf16" or (GPU only) "fp16".
        channels_last: keep images and kernels as NHWC, faster on most devices.
        seed: of order, augmentation and dropout. Weights are the task's to seed.
        threads: of PyTorch on the CPU; 0 leaves them as they are.
        loader_threads: how many prepare batches ahead.
        checkpoint_every_steps: 0 for one at the end of each epoch only.
        validate_every_steps: as well as at the end of each epoch; 0 for not.
    """

    epochs: int = 5
    batch: int = 100
    learning_rate: float = 1e-3
    final_learning_rate: float = 1e-5
    schedule: str = "linear"
    optimiser: str = "adam"
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    gradient_clip: float = 0.0
    ema_half_life_steps: float = 0.0
    precision: str = "fp32"
    channels_last: bool = False
    seed: int = 0
    threads: int = 0
    loader_threads: int = 1
    checkpoint_every_steps: int = 0
    validate_every_steps: int = 0

    def __post_init__(self) -> None:
        wrong = [
            f"{name} {getattr(self, name)!r} (expected {expected})"
            for name, expected, right in (
                ("epochs", "1 or more", self.epochs >= 1),
                ("batch", "1 or more", self.batch >= 1),
                ("learning_rate", "a number > 0", 0 < self.learning_rate < math.inf),
                ("final_learning_rate", "a number > 0", 0 < self.final_learning_rate < math.inf),
                ("schedule", " or ".join(SCHEDULES), self.schedule in SCHEDULES),
                ("optimiser", " or ".join(OPTIMISERS), self.optimiser in OPTIMISERS),
                ("betas", "two numbers from 0 to below 1", [0 <= b < 1 for b in self.betas] == [True, True]),
                ("weight_decay", "0 or more", 0 <= self.weight_decay < math.inf),
                ("gradient_clip", "0 or more", 0 <= self.gradient_clip < math.inf),
                ("ema_half_life_steps", "0 or more", 0 <= self.ema_half_life_steps < math.inf),
                ("precision", " or ".join(PRECISIONS), self.precision in PRECISIONS),
                ("seed", "0 or more", self.seed >= 0),
                ("threads", "0 or more", self.threads >= 0),
                ("loader_threads", "1 or more", self.loader_threads >= 1),
                ("checkpoint_every_steps", "0 or more", self.checkpoint_every_steps >= 0),
                ("validate_every_steps", "0 or more", self.validate_every_steps >= 0),
            )
            if not right
        ]
        if wrong:
            raise ValueError(f"training settings that cannot be used: {', '.join(wrong)}")

    def learning_rate_at(self, step: int, steps: int) -> float:
        """Learning rate of step 0 … steps - 1."""
        part = step / max(steps - 1, 1)
        first, last = self.learning_rate, self.final_learning_rate
        if self.schedule == "linear":
            return first + (last - first) * part
        if self.schedule == "exponential":
            return first * (last / first) ** part
        if part < _WARM_UP_SHARE:
            return _cosine(first * _WARM_UP_FROM, first, part / _WARM_UP_SHARE)
        return _cosine(first, last, (part - _WARM_UP_SHARE) / (1.0 - _WARM_UP_SHARE))


def order_of_groups(groups: NDArray[np.int64], most: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """A random order of samples in which each group (a video) has at most `most` samples, drawn anew each time.

    So that one long surgery does not outweigh the others.

    Args:
        groups: int64 [n], each sample's group.
        most: samples of a group; 0 for no limit.
    """
    order = rng.permutation(len(groups))
    if not most:
        return order
    kept = [order[groups[order] == group][:most] for group in np.unique(groups)]
    return rng.permutation(np.concatenate(kept))


# How a training is done, not what it gives: these may differ at a resume.
_FREE_SETTINGS = ("threads", "loader_threads", "checkpoint_every_steps", "validate_every_steps")


def _deciding(settings: TrainSettings) -> dict[str, Any]:
    return {k: v for k, v in asdict(settings).items() if k not in _FREE_SETTINGS}


def _cosine(start: float, end: float, part: float) -> float:
    return end + (start - end) * (1.0 + math.cos(math.pi * part)) / 2.0


class Task(ABC):
    """What is trained and on what.

    Attributes:
        module: everything that is trained, in one module; changed in place. Parameters that need no gradient are
            left alone.
        samples: length of the training set.
    """

    module: nn.Module
    samples: int

    @abstractmethod
    def batch(self, indices: NDArray[np.int64], rng: np.random.Generator) -> dict[str, Tensor]:
        """CPU tensors of these samples, augmented by `rng` alone.

        Called in threads ahead of the step: it must change nothing and draw from no other generator.
        """

    @abstractmethod
    def loss(self, module: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        """Loss (a scalar) of a batch on the device, and figures of the step for TensorBoard.

        `module` is `self.module` as Accelerate wraps it. Where several processes train, only a call of `module(…)`
        (its `forward`) brings their gradients together.
        """

    def identity(self) -> Mapping[str, Any]:
        """What, beside the settings, decides the training (data, network, …): JSON values, compared at resume."""
        return {}

    def order(self, epoch: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """Indices of an epoch in the order of training; the same number in each epoch."""
        return rng.permutation(self.samples)

    def end_of_epoch(self, epoch: int, module: nn.Module, folder: Path) -> dict[str, float]:
        """Validation: figures of the averaged weights (`module`, in evaluation mode on the device, no gradient).

        In the main process only. PNG pictures written into `folder`, which exists, also go to TensorBoard.
        """
        return {}


def fit(
    task: Task, settings: TrainSettings, folder: Path, *, resume: bool = True, console: Console | None = None
) -> nn.Module:
    """Train, or go on where a run in this folder ended; SIGTERM and SIGINT end it after the step, resumably.

    Args:
        task: what to train.
        settings: how; those of the run that is resumed, `threads`, `loader_threads` and the two `…_every_steps`
            apart.
        folder: the training's own folder, made if it does not exist (see the module's text).
        resume: False starts again and deletes what an earlier run left in the folder.
        console: for progress; a new one unless told.

    Returns:
        The averaged weights, or the last ones where averaging is off; in evaluation mode on the CPU.

    Raises:
        TrainingError: a state that is damaged or of other settings, which are named; a disk that is full.
        TrainingDiverged: the loss is NaN or infinite.
        TrainingStopped: a signal came; progress is saved.
    """
    threads = torch.get_num_threads()
    try:
        if settings.threads:
            torch.set_num_threads(settings.threads)
        with _disk_full_explained(folder):
            return _Run(task, settings, folder, resume, console or Console()).train()
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def follow(average: nn.Module, module: nn.Module, decay: float) -> None:
    """One step of an exponential moving average over weights and batch-norm statistics.

    Not `torch.optim.swa_utils.AveragedModel`: with its `use_buffers` it also averages, and so rounds down, the
    integer tables that tell timm's attention which bias belongs where.
    """
    pairs = list(zip(average.state_dict().values(), module.state_dict().values(), strict=True))
    floating = [pair for pair in pairs if pair[0].is_floating_point()]
    if floating:
        kept, new = map(list, zip(*floating, strict=True))
        get_ema_multi_avg_fn(decay)(kept, new, None)
    for kept_one, new_one in pairs:
        if not kept_one.is_floating_point():
            kept_one.copy_(new_one)


class _Run:
    """One call of `fit`."""

    def __init__(self, task: Task, settings: TrainSettings, folder: Path, resume: bool, console: Console) -> None:
        self.task, self.settings, self.folder, self.console = task, settings, Path(folder), console
        # Accelerate keeps one precision for a process's lifetime; a later training may want another.
        AcceleratorState._reset_state()
        precision = "no" if settings.precision == "fp32" else settings.precision
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=precision)
        self.main, self.device = self.accelerator.is_main_process, self.accelerator.device
        self.batch, self.steps_per_epoch = self._steps_per_epoch()
        self.steps = settings.epochs * self.steps_per_epoch
        self.signal: int | None = None

        module = task.module.to(self.device)
        if settings.channels_last:
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        averaging = settings.ema_half_life_steps > 0
        self.average = copy.deepcopy(module).eval() if averaging else None
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": settings.weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        kind = torch.optim.Adam if settings.optimiser == "adam" else torch.optim.AdamW
        optimiser = kind([g for g in groups if g["params"]], lr=settings.learning_rate, betas=settings.betas)
        self.module, self.optimiser = self.accelerator.prepare(module, optimiser)
        self.bare = self.accelerator.unwrap_model(self.module)
        self.trained = trained
        self.done = self._start(resume)

    def _steps_per_epoch(self) -> tuple[int, int]:
        """Samples per step, and steps per epoch."""
        samples = len(self._order(0))
        if samples == 0:
            raise TrainingError("the training set is empty: nothing to train on. Check the data and its selection")
        processes = self.accelerator.num_processes
        batch = min(self.settings.batch, samples)
        if batch % processes:
            raise TrainingError(
                f"a batch of {batch} samples cannot be shared equally by {processes} processes; "
                f"choose a multiple of {processes}, at most {samples}"
            )
        return batch, samples // batch

    def _order(self, epoch: int) -> NDArray[np.int64]:
        return self.task.order(epoch, np.random.default_rng([self.settings.seed, epoch]))

    # ---- state -------------------------------------------------------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        content = {
            **_deciding(self.settings),
            "samples": self.task.samples,
            **self.task.identity(),
        }
        return json.loads(json.dumps(content))

    def _start(self, resume: bool) -> int:
        """Load the state, if there is one, and bring the folder to it; returns the number of steps done."""
        state_file = self.folder / STATE_NAME
        if self.main:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not resume:
                for name in (STATE_NAME, LOSSES_NAME, METRICS_NAME):
                    (self.folder / name).unlink(missing_ok=True)
                for name in ("tensorboard", "pictures"):
                    shutil.rmtree(self.folder / name, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        done = self._load(state_file) if state_file.exists() else 0
        if self.main:
            _keep_lines(self.folder / LOSSES_NAME, lambda line: line["step"] < done)
            _keep_lines(self.folder / METRICS_NAME, lambda line: line["step"] <= done)
            if done:
                self.console.print(f"going on after step {done} of {self.steps} ({state_file})")
        self.accelerator.wait_for_everyone()
        metrics = self.folder / METRICS_NAME
        self.validated = metrics.exists() and done in [line["step"] for line in read_lines(metrics)]
        self.accelerator.wait_for_everyone()
        return done

    def _load(self, state_file: Path) -> int:
        try:
            state = torch.load(state_file, map_location="cpu", weights_only=True)
            # A setting that is newer than the state had its default then.
            found = json.loads(json.dumps(_deciding(TrainSettings()))) | state["identity"]
            if state["format"] != _STATE_FORMAT:
                raise ValueError(f"its format is {state['format']}, expected {_STATE_FORMAT}")
        except Exception as error:  # damaged bytes make the unpickler fail in every way there is
            raise TrainingError(
                f"{state_file} cannot be read as a training's state ({type(error).__name__}: {error}). "
                "Start again without resuming (--restart), or choose another folder"
            ) from error
        expected = self._identity()
        differing = [
            f"{name} was {found.get(name, 'absent')!r} and is now {expected.get(name, 'absent')!r}"
            for name in sorted({*found, *expected})
            if found.get(name) != expected.get(name)
        ]
        if differing:
            raise TrainingError(
                f"{state_file} is of a training with other settings: {'; '.join(differing)}. Resume with the "
                "same settings, start again without resuming (--restart), or choose another folder"
            )
        try:
            self.bare.load_state_dict(state["module"])
            if self.average is not None:
                self.average.load_state_dict(state["average"])
        except RuntimeError as error:
            raise TrainingError(
                f"{state_file} is of another network: {error}. Start again without resuming (--restart), or "
                "choose another folder"
            ) from error
        self.optimiser.load_state_dict(state["optimiser"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        return int(state["done"])

    def _save(self) -> None:
        if self.main:
            scaler = self.accelerator.scaler
            state = {
                "format": _STATE_FORMAT,
                "identity": self._identity(),
                "done": self.done,
                "module": self.bare.state_dict(),
                "average": self.average.state_dict() if self.average is not None else None,
                "optimiser": self.optimiser.state_dict(),
                "scaler": scaler.state_dict() if scaler is not None else None,
            }
            write_atomically(state, self.folder / STATE_NAME)
        self.accelerator.wait_for_everyone()

    def _kept(self) -> str:
        state_file = self.folder / STATE_NAME
        return f"The last checkpoint, {state_file}, is kept." if state_file.exists() else "There is no checkpoint yet."

    # ---- the loop ----------------------------------------------------------------------------------------------

    def train(self) -> nn.Module:
        from torch.utils.tensorboard import SummaryWriter

        with ExitStack() as stack:
            self.board = losses = None
            if self.main:
                self.board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=self.done)
                stack.callback(self.board.close)
                losses = stack.enter_context((self.folder / LOSSES_NAME).open("a", buffering=1, encoding="utf-8"))
            stack.enter_context(self._signals())
            progress = stack.enter_context(
                Progress(
                    TextColumn("{task.description}"),
                    BarColumn(),
                    MofNCompleteColumn(),
                    TextColumn("loss {task.fields[loss]:.4f}"),
                    TextColumn("{task.fields[images_per_s]:.0f} images/s"),
                    TimeElapsedColumn(),
                    TimeRemainingColumn(elapsed_when_finished=True),
                    console=self.console,
                    disable=not self.main,
                )
            )
            bar = progress.add_task("", total=self.steps, completed=self.done, loss=math.nan, images_per_s=0.0)
            self.module.train()
            # Killed after a checkpoint and before its validation was written down.
            if self.done and self._due(self.settings.validate_every_steps) and not self.validated:
                self._validate((self.done - 1) // self.steps_per_epoch, 0.0)
            for epoch in range(self.done // self.steps_per_epoch, self.settings.epochs):
                self._epoch(epoch, progress, bar, losses)
        module = self.average if self.average is not None else self.bare
        module = self.accelerator.unwrap_model(module, keep_fp32_wrapper=False)
        self.accelerator.free_memory()
        return module.eval().to("cpu", memory_format=torch.contiguous_format)

    def _due(self, every_steps: int) -> bool:
        return self.done % self.steps_per_epoch == 0 or bool(every_steps and self.done % every_steps == 0)

    def _epoch(self, epoch: int, progress: Progress, bar: Any, losses: TextIO | None) -> None:
        settings = self.settings
        progress.update(bar, description=f"epoch {epoch + 1} of {settings.epochs}")
        total = 0.0
        first, started_s = self.done, time.monotonic()
        for indices, batch in self._batches(epoch):
            rate = settings.learning_rate_at(self.done, self.steps)
            loss = self._step(epoch, indices, batch, rate)
            if losses is not None and self.board is not None:
                line = {"epoch": epoch, "step": self.done, "loss": loss, "lr": rate}
                losses.write(json.dumps(line) + "\n")
                self.board.add_scalar("train/loss", loss, self.done)
                self.board.add_scalar("train/learning_rate", rate, self.done)
            self.done += 1
            total += loss
            images_per_s = (self.done - first) * self.batch / (time.monotonic() - started_s)
            progress.update(bar, completed=self.done, loss=total / (self.done - first), images_per_s=images_per_s)
            stopping = self._stopping()
            if stopping or self._due(settings.checkpoint_every_steps) or self._due(settings.validate_every_steps):
                self._save()
            if stopping:
                if self.main:
                    self.console.print(
                        f"stopped by {signal.Signals(stopping).name} after step {self.done} of {self.steps}; start "
                        f"the same command again to go on from there ({self.folder / STATE_NAME})"
                    )
                raise TrainingStopped(128 + stopping)
            if self._due(settings.validate_every_steps):
                if self.main and self.board is not None:
                    self.board.add_scalar("train/images_per_s", images_per_s, self.done)
                    self.console.print(
                        f"epoch {epoch + 1} of {settings.epochs}, step {self.done}: training loss "
                        f"{total / (self.done - first):.4f}, {images_per_s:.0f} images/s"
                    )
                self._validate(epoch, images_per_s)
                total, first, started_s = 0.0, self.done, time.monotonic()

    def _batches(self, epoch: int) -> Iterator[tuple[NDArray[np.int64], dict[str, Tensor]]]:
        """The rest of an epoch: indices of all processes' batch, and this process's tensors, prepared ahead."""
        order = np.asarray(self._order(epoch), np.int64)
        if len(order) // self.batch != self.steps_per_epoch:
            raise TrainingError(f"epoch {epoch} has {len(order)} samples, epoch 0 another number; they must not differ")
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        first = self.done - epoch * self.steps_per_epoch
        waiting = deque(range(first, self.steps_per_epoch))
        ahead: deque[tuple[NDArray[np.int64], Future[dict[str, Tensor]]]] = deque()
        pool = ThreadPoolExecutor(self.settings.loader_threads, thread_name_prefix="batch")
        try:
            while waiting or ahead:
                while waiting and len(ahead) <= self.settings.loader_threads:
                    step = waiting.popleft()
                    indices = order[step * self.batch : (step + 1) * self.batch]
                    rng = np.random.default_rng([self.settings.seed, epoch, step, rank])
                    ahead.append((indices, pool.submit(self._prepare, indices[rank::processes], rng)))
                indices, batch = ahead.popleft()
                yield indices, batch.result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _prepare(self, indices: NDArray[np.int64], rng: np.random.Generator) -> dict[str, Tensor]:
        batch = self.task.batch(indices, rng)
        return {name: tensor.pin_memory() for name, tensor in batch.items()} if self.device.type == "cuda" else batch

    def _step(self, epoch: int, indices: NDArray[np.int64], batch: dict[str, Tensor], rate: float) -> float:
        """One update of the weights; returns the loss, the mean over processes."""
        accelerator, settings = self.accelerator, self.settings
        key = [settings.seed, epoch, self.done, accelerator.process_index]
        set_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))  # dropout
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        batch = {name: self._to_device(tensor) for name, tensor in batch.items()}
        with accelerator.autocast():
            loss, figures = self.task.loss(self.module, batch)
        value = float(accelerator.reduce(loss.detach().float(), "mean"))
        if not math.isfinite(value):
            raise TrainingDiverged(epoch, self.done, value, indices, "the loss is not finite", self._kept())
        self.optimiser.zero_grad(set_to_none=True)
        accelerator.backward(loss)
        norm = float(accelerator.clip_grad_norm_(self.trained, settings.gradient_clip or math.inf))
        # In fp16 an overflow is ordinary: the gradient scaler leaves the step out and scales less.
        if not math.isfinite(norm) and settings.precision != "fp16":
            raise TrainingDiverged(epoch, self.done, value, indices, "the gradient is not finite", self._kept())
        self.optimiser.step()
        if self.average is not None:
            # At the start the average would be of random weights; so it begins short.
            decay = min(0.5 ** (1.0 / settings.ema_half_life_steps), (1.0 + self.done) / (10.0 + self.done))
            follow(self.average, self.bare, decay)
        if self.board is not None:
            for name, figure in {**figures, "gradient_norm": norm}.items():
                self.board.add_scalar(f"train/{name}", figure, self.done)
        return value

    def _to_device(self, tensor: Tensor) -> Tensor:
        image = self.settings.channels_last and tensor.ndim == 4
        layout = torch.channels_last if image else torch.preserve_format
        return tensor.to(self.device, non_blocking=True, memory_format=layout)

    # ---- validation --------------------------------------------------------------------------------------------

    def _validate(self, epoch: int, images_per_s: float) -> None:
        if self.main:
            pictures = self.folder / "pictures" / f"step_{self.done:07d}"
            pictures.mkdir(parents=True, exist_ok=True)
            module = self.average if self.average is not None else self.bare
            module.eval()
            with torch.no_grad():
                figures = self.task.end_of_epoch(epoch, module, pictures)
            self._report(epoch, images_per_s, figures, pictures)
        self.accelerator.wait_for_everyone()
        self.module.train()

    def _report(self, epoch: int, images_per_s: float, figures: dict[str, float], pictures: Path) -> None:
        import cv2

        assert self.board is not None
        for name, figure in figures.items():
            self.board.add_scalar(f"validation/{name}", figure, self.done)
        for path in sorted(pictures.glob("*.png")):
            picture = cv2.imread(str(path))
            if picture is not None:
                self.board.add_image(path.stem, picture[..., ::-1].copy(), self.done, dataformats="HWC")
        if not any(pictures.iterdir()):
            pictures.rmdir()
        line = {"epoch": epoch, "step": self.done, "images_per_s": round(images_per_s, 1), **figures}
        with (self.folder / METRICS_NAME).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.board.flush()
        if figures:
            self.console.print(", ".join(f"{name} {figure:.4g}" for name, figure in figures.items()))

    # ---- signals -----------------------------------------------------------------------------------------------

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT are remembered; a second one acts as it always did."""

        def remember(number: int, frame: FrameType | None) -> None:
            self.signal = number
            signal.signal(number, before[number])

        before: dict[int, Any] = {}
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                before[number] = signal.getsignal(number)
                signal.signal(number, remember)
        except ValueError:  # not in the main thread, where signals are not ours to take
            pass
        try:
            yield
        finally:
            for taken, handler in before.items():
                if signal.getsignal(taken) is remember:
                    signal.signal(taken, handler)

    def _stopping(self) -> int:
        """Number of a signal that came to any process, or 0; all processes learn of it at the same step."""
        number = self.signal or 0
        if self.accelerator.num_processes == 1:
            return number
        return int(self.accelerator.reduce(torch.tensor(number, device=self.device), "max"))


def write_atomically(content: object, path: Path) -> None:
    """`torch.save` to a partial file beside `path`, then rename: a failure leaves an earlier file as it was.

    Raises:
        TrainingError: the file could not be written, for example because the disk is full.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # PyTorch's writer turns some failures of the file into RuntimeError
        partial.unlink(missing_ok=True)
        kept = "the one before is intact" if path.exists() else "there is none before"
        raise TrainingError(
            f"the checkpoint {path} could not be written ({_reason(error)}); {kept}. Make room "
            f"({shutil.disk_usage(path.parent).free / 1e6:.0f} MB are free) and start the same command again to go on"
        ) from error


def _reason(error: BaseException) -> str:
    """What went wrong first: the operating system's word for it, where it is in the chain."""
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, OSError):
            return str(chain)
        chain = chain.__cause__ or chain.__context__
    return str(error).splitlines()[0]


@contextmanager
def _disk_full_explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise TrainingError(
            f"no room left for the training in {folder} ({error}); what {STATE_NAME} holds is intact. Make room and "
            "start the same command again to go on"
        ) from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of `losses.jsonl` or `metrics.jsonl`; a last one that a kill cut short is left out."""
    lines = []
    for line in path.read_text("utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def _keep_lines(path: Path, keep: Any) -> None:
    """Drop the lines of steps that the resumed run will do again."""
    if path.exists():
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in read_lines(path) if keep(line)), "utf-8")
        os.replace(partial, path)
