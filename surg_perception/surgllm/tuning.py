# SPDX-License-Identifier: Apache-2.0
"""TM-Tuning: the Q-Former and an adapter learn to answer about interleaved segments; then an adapter for each task.

The encoder is frozen, so that the tokens of every segment are computed once and kept on disk. Before the language
model joins, a warm-up lets the Q-Former spell what each segment has to say to the question: its first visual token is
to point where the language model has the word embedding of the first token, the second where it has the second, and so
on to the end token. It costs a tenth of a step through the language model, which then finds the answer, or its parts,
before its eyes in its own words and has to learn little more than to read it out; without, a few thousand questions do
not teach a frozen language model to see.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from surg_perception.data.clip_labels import ClipVideo
from surg_perception.gsvit.trainer import Task, TrainSettings, fit
from surg_perception.surgllm.config import JOINT
from surg_perception.surgllm.encoder import VideoEncoder
from surg_perception.surgllm.feature_cache import write_array
from surg_perception.surgllm.model import SurgLLM
from surg_perception.surgllm.prompt import IGNORED, Prompted, Prompter, Span
from surg_perception.surgllm.questions import Sample, segment_answer

WARM_UP = TrainSettings(
    epochs=6,
    batch=128,
    learning_rate=7e-4,
    final_learning_rate=1e-5,
    schedule="one_cycle",
    optimiser="adamw",
    weight_decay=0.02,
    gradient_clip=1.0,
    precision="bf16",
)
"""Of the Q-Former, before the language model joins."""

TUNING = TrainSettings(
    epochs=1,
    batch=16,
    learning_rate=6e-4,
    final_learning_rate=1e-5,
    schedule="one_cycle",
    optimiser="adamw",
    weight_decay=0.01,
    gradient_clip=1.0,
    precision="bf16",
)
"""Of the joint tuning."""

ADAPTING = replace(TUNING, learning_rate=4e-4, weight_decay=0.0)
"""Of one task's adapter, from the joint one."""

_TEMPERATURE = 0.05
_ORDER_CHUNK = 16  # batches whose samples are sorted by length together
_ENCODED_AT_ONCE = 16


class SegmentTokens:
    """Tokens of some of a clip's segments: `tokens[start]` float16 [N, width] of the one that begins there.

    Args:
        starts: first seconds, ascending.
        rows: [n, N, width], in that order.
    """

    def __init__(self, starts: Sequence[int], rows: NDArray[np.float16]) -> None:
        self._row = {start: row for row, start in enumerate(starts)}
        self.rows = rows

    def __getitem__(self, start: int) -> NDArray[np.float16]:
        return self.rows[self._row[start]]


Tokens = Mapping[str, SegmentTokens]
"""For each clip's name its whole segments' tokens; for `<name>/<n>` those of its segments of n frames, where windows
need shorter ones."""


def segments_of(start_s: int, end_s: int, frames: int) -> list[tuple[int, int]]:
    """Segments of a window, (first second, end): as many whole ones as fit counted from its end, then the rest.

    A live window ends now and its newest segment is always whole, so windows are cut from their end.
    """
    ends = list(range(end_s, start_s, -frames))
    return [(max(start_s, end - frames), end) for end in reversed(ends)]


def spans_of(segments: Sequence[tuple[int, int]]) -> list[Span]:
    """The same in seconds from the window's first frame, for the time labels."""
    first = segments[0][0]
    return [(start - first, end - first) for start, end in segments]


def cached_tokens(
    encoder: VideoEncoder,
    features: Mapping[str, NDArray[np.float16]],
    frames: int,
    cache: Path,
    samples: Sequence[Sample],
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, SegmentTokens]:
    """The encoder's tokens of all segments of the samples' windows, as memory maps that are written once.

    In a segment that is not full the last frame is repeated, as `answering.Assistant.encode` does.

    Args:
        encoder: trained; not trained further.
        features: of `feature_cache.cached_features`.
        frames: of a segment.
        cache: folder; 150 kB a segment for the model `small`.
        samples: whose windows' segments are wanted.
        progress: called with (segments done, all).

    Returns:
        See `Tokens`. A file is found again while encoder, features and segments stay the same.

    Raises:
        DatasetError: the disk is full.
    """
    digest = hashlib.sha256(repr((encoder.config, frames)).encode())
    for key, value in encoder.state_dict().items():
        digest.update(key.encode() + value.cpu().numpy().tobytes())
    folder = cache / f"tokens-{digest.hexdigest()[:16]}"
    wanted: dict[tuple[str, int], set[int]] = {}
    for sample in samples:
        for start, end in segments_of(sample.start_s, sample.end_s, frames):
            wanted.setdefault((sample.video, end - start), set()).add(start)
    total, done = sum(map(len, wanted.values())), 0
    found: dict[str, SegmentTokens] = {}
    for (name, shown), chosen in sorted(wanted.items()):
        maps, starts = features[name], sorted(chosen)
        content = hashlib.sha256(repr(starts).encode() + np.ascontiguousarray(maps).tobytes()).hexdigest()
        file = folder / f"{content[:24]}-{shown}.npy"
        if not file.exists():
            write_array(file, _segment_tokens(encoder, maps, np.array(starts), frames, shown), name)
        found[name if shown == frames else f"{name}/{shown}"] = SegmentTokens(starts, np.load(file, mmap_mode="r"))
        done += len(starts)
        if progress:
            progress(done, total)
    return found


@torch.no_grad()
def _segment_tokens(
    encoder: VideoEncoder, maps: NDArray[np.float16], starts: NDArray[np.int64], frames: int, shown: int
) -> NDArray[np.float16]:
    """[n, N, width] of features [seconds, C, h, w]; of each segment `shown` frames are seen."""
    encoder.eval()
    steps = np.minimum(np.arange(frames), shown - 1)
    rows = []
    for first in range(0, len(starts), _ENCODED_AT_ONCE):
        seconds = np.minimum(starts[first : first + _ENCODED_AT_ONCE, None] + steps, len(maps) - 1)
        clips = torch.from_numpy(maps[seconds]).float().transpose(1, 2)
        with torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported()):
            rows.append(encoder.encode(clips).half().numpy())
    return np.concatenate(rows)


def _rows(tokens: Tokens, video: str, segments: Sequence[tuple[int, int]], frames: int) -> list[NDArray[np.float16]]:
    """Tokens of segments of a clip, each [N, width]."""
    return [tokens[video if end - start == frames else f"{video}/{end - start}"][start] for start, end in segments]


class TuningTask(Task):
    """Answers of questions about windows, through the language model.

    Args:
        model: its encoder is not used.
        prompter: of the same configuration.
        samples: to train on.
        tokens: see `Tokens`.
        adapter: that is trained; with the Q-Former and the projection where it is the joint one.
        batch: samples a step, for an order in which a batch's windows are about equally long.
        validation: samples whose loss is measured.
    """

    def __init__(
        self,
        model: SurgLLM,
        prompter: Prompter,
        samples: Sequence[Sample],
        tokens: Tokens,
        adapter: str,
        batch: int,
        validation: Sequence[Sample] = (),
    ) -> None:
        self.module, self.prompter = model, prompter
        self.training, self.validation, self.tokens = list(samples), list(validation), tokens
        self.adapter, self.batch_size, self.samples = adapter, batch, len(samples)
        model.requires_grad_(False)
        model.language_model.set_adapter(adapter)
        trained: list[nn.Parameter] = model.language_model.adapter_parameters(adapter)
        if adapter == JOINT:
            trained += [p for key, p in model.qformer.named_parameters() if not key.startswith("words.base.")]
            trained += model.project.parameters()
        for parameter in trained:
            parameter.requires_grad_(True)

    def identity(self) -> Mapping[str, Any]:
        text = json.dumps([asdict(sample) for sample in self.training], sort_keys=True)
        return {"adapter": self.adapter, "questions_sha256": hashlib.sha256(text.encode()).hexdigest()}

    def order(self, epoch: int, rng: np.random.Generator) -> NDArray[np.int64]:
        order = rng.permutation(self.samples)
        if not len(order):
            return order
        length = np.array([sample.end_s - sample.start_s for sample in self.training])
        batches: list[NDArray[np.int64]] = []
        for first in range(0, len(order), _ORDER_CHUNK * self.batch_size):
            chunk = order[first : first + _ORDER_CHUNK * self.batch_size]
            chunk = chunk[np.argsort(length[chunk], kind="stable")]
            batches += np.split(chunk, range(self.batch_size, len(chunk), self.batch_size))
        whole = [batch for batch in batches if len(batch) == self.batch_size]
        rest = [batch for batch in batches if len(batch) < self.batch_size]
        return np.concatenate([*(whole[i] for i in rng.permutation(len(whole))), *rest])

    def batch(self, indices: NDArray[np.int64], rng: np.random.Generator) -> dict[str, Tensor]:
        return self._tensors([self.training[i] for i in indices])

    def loss(self, module: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        return module(batch), {}

    def end_of_epoch(self, epoch: int, module: nn.Module, folder: Path) -> dict[str, float]:
        if not self.validation:
            return {}
        device = next(module.parameters()).device
        figures = {}
        for task in sorted({sample.task for sample in self.validation}):
            own = [sample for sample in self.validation if sample.task == task]
            own.sort(key=lambda sample: sample.end_s - sample.start_s)
            total = 0.0
            for first in range(0, len(own), self.batch_size):
                chunk = own[first : first + self.batch_size]
                batch = {key: value.to(device) for key, value in self._tensors(chunk).items()}
                with torch.autocast(device.type, torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported()):
                    total += float(module(batch)) * len(chunk)
            figures[f"loss_{task}"] = total / len(own)
        return figures

    def _tensors(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        frames = self.prompter.config.segment_frames
        windows = [segments_of(sample.start_s, sample.end_s, frames) for sample in samples]
        items = [
            Prompted(sample.question, spans_of(window), sample.answer)
            for sample, window in zip(samples, windows, strict=True)
        ]
        rows = [
            row
            for sample, window in zip(samples, windows, strict=True)
            for row in _rows(self.tokens, sample.video, window, frames)
        ]
        return {**self.prompter.batch(items), "segments": torch.from_numpy(np.stack(rows))}


class _WarmUpNetwork(nn.Module):
    """The Q-Former and the map to the language model's embeddings."""

    def __init__(self, model: SurgLLM) -> None:
        super().__init__()
        self.qformer, self.project = model.qformer, model.project

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Directions of the visual tokens, float [B, queries, width], unit length."""
        seen = self.qformer(batch["segments"].float(), batch["question_ids"], batch["question_attention"])
        return F.normalize(self.project(seen).float(), dim=-1)


@dataclass(frozen=True)
class Lesson:
    """What the visual tokens of one segment, seconds start_s … end_s-1 of a clip, are to spell when they are asked.

    `span` is the segment's in seconds from its window's first frame.
    """

    task: str
    question: str
    video: str
    start_s: int
    end_s: int
    span: Span
    text: str


def lessons_of(samples: Sequence[Sample], videos: Sequence[ClipVideo], frames: int) -> list[Lesson]:
    """A lesson for each segment of the samples' windows that has something to say (`segment_answer`).

    Args:
        samples: questions about the clips `videos`.
        frames: of a segment.
    """
    clips = {video.name: video for video in videos}
    found = []
    for sample in samples:
        window = segments_of(sample.start_s, sample.end_s, frames)
        for (start, end), span in zip(window, spans_of(window), strict=True):
            text = segment_answer(sample, clips[sample.video], start, end)
            if text:
                found.append(Lesson(sample.task, sample.question, sample.video, start, end, span, text))
    return found


class WarmUpTask(Task):
    """Visual tokens of a segment spell what it has to say, in the language model's own word embeddings.

    What is longer than there are queries is cut.

    Args:
        model: its Q-Former and projection are trained.
        prompter: of the same configuration.
        lessons: to train on.
        tokens: see `Tokens`.
        validation: lessons that are only measured.
    """

    def __init__(
        self,
        model: SurgLLM,
        prompter: Prompter,
        lessons: Sequence[Lesson],
        tokens: Tokens,
        validation: Sequence[Lesson] = (),
    ) -> None:
        self.prompter, self.tokens = prompter, tokens
        self.training, self.validation, self.samples = list(lessons), list(validation), len(lessons)
        queries = prompter.config.qformer.queries
        spelled = {lesson.text: prompter.answer_ids(lesson.text)[:queries] for lesson in (*lessons, *validation)}
        self.known = sorted({token for tokens_of in spelled.values() for token in tokens_of})
        number = {token: i for i, token in enumerate(self.known)}
        self.spelling = {text: [number[token] for token in ids] for text, ids in spelled.items()}
        self.words = F.normalize(model.language_model.words[self.known].float(), dim=-1)
        self.module = _WarmUpNetwork(model)
        model.requires_grad_(False)
        for key, parameter in self.module.named_parameters():
            parameter.requires_grad_(not key.startswith("qformer.words.base."))

    def identity(self) -> Mapping[str, Any]:
        text = json.dumps([asdict(lesson) for lesson in self.training], sort_keys=True)
        return {"lessons_sha256": hashlib.sha256(text.encode()).hexdigest()}

    def batch(self, indices: NDArray[np.int64], rng: np.random.Generator) -> dict[str, Tensor]:
        return self._tensors([self.training[i] for i in indices])

    def loss(self, module: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        scores = module(batch) @ self.words.to(batch["spelled"].device).T / _TEMPERATURE
        return F.cross_entropy(scores.flatten(0, 1), batch["spelled"].flatten(), ignore_index=IGNORED), {}

    def end_of_epoch(self, epoch: int, module: nn.Module, folder: Path) -> dict[str, float]:
        """Share of lessons that are spelled right to the end, by task."""
        right: dict[str, list[bool]] = {}
        for first in range(0, len(self.validation), 128):
            chunk = self.validation[first : first + 128]
            device = next(module.parameters()).device
            batch = {key: value.to(device) for key, value in self._tensors(chunk).items()}
            found = (module(batch) @ self.words.to(device).T).argmax(dim=-1)
            whole = ((found == batch["spelled"]) | (batch["spelled"] == IGNORED)).all(dim=1)
            for lesson, spelled in zip(chunk, whole.tolist(), strict=True):
                right.setdefault(lesson.task, []).append(spelled)
        return {f"spelled_{task}": float(np.mean(marks)) for task, marks in right.items()}

    def _tensors(self, lessons: Sequence[Lesson]) -> dict[str, Tensor]:
        asked = self.prompter.batch([Prompted(lesson.question, [lesson.span]) for lesson in lessons])
        rows = [
            row
            for lesson in lessons
            for row in _rows(
                self.tokens, lesson.video, [(lesson.start_s, lesson.end_s)], self.prompter.config.segment_frames
            )
        ]
        spelled = np.full((len(lessons), self.prompter.config.qformer.queries), IGNORED, np.int64)
        for row, lesson in zip(spelled, lessons, strict=True):
            row[: len(self.spelling[lesson.text])] = self.spelling[lesson.text]
        return {
            "question_ids": asked["question_ids"],
            "question_attention": asked["question_attention"],
            "segments": torch.from_numpy(np.stack(rows)),
            "spelled": torch.from_numpy(spelled),
        }


def tune(
    model: SurgLLM,
    prompter: Prompter,
    samples: Sequence[Sample],
    tokens: Tokens,
    adapter: str,
    settings: TrainSettings,
    folder: Path,
    *,
    validation: Sequence[Sample] = (),
    resume: bool = True,
    console: Console | None = None,
) -> None:
    """Train the joint parameters, or one task's adapter from the joint one, in place; resumable as every `fit`.

    Args:
        model: with the adapter `JOINT`.
        adapter: JOINT, or a task's name, whose adapter is added where there is none.

    Raises:
        TrainingError: as `fit`.
    """
    if adapter not in model.language_model.adapters:
        model.language_model.add_adapter(adapter, None if adapter == JOINT else JOINT)
    task = TuningTask(model, prompter, samples, tokens, adapter, settings.batch, validation)
    fit(task, settings, folder, resume=resume, console=console)
    model.requires_grad_(False)
