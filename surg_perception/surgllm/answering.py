# SPDX-License-Identifier: Apache-2.0
"""Questions in, answers out: a loaded SurgLLM with its router, as the node and the evaluation use it."""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from surg_perception.models import ModelError
from surg_perception.surgllm.config import JOINT
from surg_perception.surgllm.language_model import fast_dtype
from surg_perception.surgllm.model import Generated, SurgLLM
from surg_perception.surgllm.model_folder import SurgLLMCard, find_surgllm, load_weights
from surg_perception.surgllm.prompt import Prompted, Prompter
from surg_perception.surgllm.question_check import OUT_OF_SCOPE, QuestionRefused, check_question
from surg_perception.surgllm.router import Router
from surg_perception.surgllm.sentence_encoder import SentenceEncoder

_STEMS_KEPT = 16  # frames; a frame is in four segments, one after another

Features = Tensor
"""A segment's tokens [N, width]; opaque to those who keep them."""


@dataclass(frozen=True)
class Reply:
    """An answer.

    Attributes:
        text: the answer.
        task: that was asked for, or that the router found likeliest.
        task_probability: the router's, 0..1; 1 where the task was asked for.
        adapter: that answered: the task's, or "joint" where the router was not sure.
        confidence: mean probability of the answer's tokens, 0..1.
        tokens: of the answer.
        first_token_ms, total_ms: from the call to the first token and to the end.
        complete: False where `stop` or the most tokens of an answer ended it.
    """

    text: str
    task: str
    task_probability: float
    adapter: str
    confidence: float
    tokens: int
    first_token_ms: float
    total_ms: float
    complete: bool


class Assistant:
    """A SurgLLM that answers; `Assistant.load` makes one. One call at a time.

    Attributes:
        card: of the model.
        router: from questions to tasks.
    """

    def __init__(
        self, card: SurgLLMCard, model: SurgLLM, adapters: dict[str, dict[str, Tensor]], router: Router, threads: int
    ) -> None:
        self.card, self.router = card, router
        self._model, self._adapters, self._threads = model.eval().requires_grad_(False), adapters, threads
        self._prompter = Prompter(card.config)
        self._active = ""
        self._stems: OrderedDict[bytes, Tensor] = OrderedDict()

    @classmethod
    def load(cls, model: str | Path, *, threads: int = 0) -> Assistant:
        """Load a model and the base models that it stands on, and answer once to warm up.

        Args:
            model: name or folder.
            threads: of PyTorch while it computes; 0 leaves its own choice.

        Raises:
            ModelError: no such model, or a file that is missing, damaged or does not fit.
            BaseModelMissing: files of a base model are not on this machine.
        """
        card = find_surgllm(model)
        stored, adapters = load_weights(card)
        dtype = torch.float32 if card.config.language_model == "tiny" else fast_dtype("cpu")
        try:
            surgllm = SurgLLM(card.config, dtype)
            surgllm.load_stored_weights(stored)
            for weights in adapters.values():
                surgllm.language_model.fuse(weights)
            router = Router.load(card.folder, SentenceEncoder(threads=max(threads, 1)))
        except ValueError as error:
            raise ModelError(f"{card.folder}: {error}") from error
        if unknown := set(router.tasks) - set(card.tasks):
            raise ModelError(f"{card.folder}: the router names {', '.join(sorted(unknown))}, which the card does not")
        assistant = cls(card, surgllm, adapters, router, threads)
        size = assistant.image_size
        blank = assistant.encode(np.zeros((assistant.segment_frames, size, size, 3), np.uint8))
        question = "What is the surgical phase?"
        router.route(question)
        assistant._generate([question], [[(0.0, float(assistant.segment_frames), blank)]], JOINT)
        return assistant

    @property
    def model_id(self) -> str:
        """`name@sha256 prefix`."""
        return self.card.model_id

    @property
    def backend(self) -> str:
        """What truly runs, `torch:CPU:precision`; the precision is the language model's, the largest part."""
        fast = self._model.language_model.base.dtype == torch.bfloat16
        return f"torch:CPU:{'bf16' if fast else 'fp32'}"

    @property
    def tasks(self) -> tuple[str, ...]:
        """With an adapter of their own."""
        return self.card.tasks

    @property
    def image_size(self) -> int:
        """Side of a frame in pixels."""
        return self.card.config.encoder.image_size

    @property
    def segment_frames(self) -> int:
        """Frames of a segment, one a second."""
        return self.card.config.segment_frames

    @property
    def max_segments(self) -> int:
        """Of a window."""
        return self.card.config.max_segments

    @torch.inference_mode()
    def encode(self, frames: NDArray[np.uint8]) -> Features:
        """Tokens of one segment; frames seen a moment ago are not computed again.

        Args:
            frames: uint8 BGR [T, S, S, 3], 1 to `segment_frames` frames; the last one is repeated to fill up.

        Raises:
            ValueError: another type or shape.
        """
        size = self.image_size
        fits = frames.shape[1:] == (size, size, 3) and frames.dtype == np.uint8
        if not fits or not 1 <= len(frames) <= self.segment_frames:
            raise ValueError(
                f"frames {frames.dtype} {frames.shape} found, expected uint8 BGR [1 to {self.segment_frames}, {size}, "
                f"{size}, 3]"
            )
        with self._threads_of_its_own():  # the stem in float32, as the trainings' features are
            stems = [self._stem_of(frame) for frame in frames]
            stems += [stems[-1]] * (self.segment_frames - len(stems))
        with self._computing():
            return self._model.encoder.encode(torch.stack(stems, dim=1)[None]).half()[0]

    def ask(
        self,
        question: str,
        segments: Sequence[tuple[float, float, Features]],
        *,
        task: str = "",
        on_text: Callable[[str], None] | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> Reply:
        """Answer a question about a window.

        Args:
            question: text.
            segments: (start, end, features), seconds from the window's first frame, oldest first; of more than
                `max_segments` the newest.
            task: whose adapter answers; "" lets the router choose.
            on_text: called with the text so far after every token.
            stop: asked before every token; True ends the answer there.

        Raises:
            QuestionRefused: no usable question, out of scope, or an unknown task.
            ValueError: no segment.
        """
        started = time.monotonic()
        question = check_question(question)
        probability = 1.0
        adapter = task
        if task and task not in self.tasks:
            raise QuestionRefused("UNKNOWN_TASK", f"task {task!r} found, expected one of {', '.join(self.tasks)}")
        route = self.router.route(question)
        if route.declined:
            raise QuestionRefused("DECLINED", OUT_OF_SCOPE)
        if not task:
            task, probability, adapter = route.best, route.probability, route.task or JOINT
        first: list[float] = []

        def on_token(ids: list[int]) -> None:
            if not first:
                first.append(time.monotonic())
            if on_text is not None:
                on_text(self._prompter.text(ids))

        [answer] = self._generate([question], [segments], adapter, on_token, stop)
        ended = time.monotonic()
        return Reply(
            text=self._prompter.text(answer.ids),
            task=task,
            task_probability=probability,
            adapter=adapter,
            confidence=answer.confidence,
            tokens=len(answer.ids),
            first_token_ms=1e3 * ((first[0] if first else ended) - started),
            total_ms=1e3 * (ended - started),
            complete=answer.complete,
        )

    def ask_batch(
        self,
        questions: Sequence[str],
        windows: Sequence[Sequence[tuple[float, float, Features]]],
        *,
        adapters: Sequence[str] | None = None,
    ) -> list[str]:
        """Answers of many questions at once, for evaluation; questions are not checked.

        Args:
            questions: B texts.
            windows: the segments of each, as in `ask`.
            adapters: "joint" or a task for each; None lets the router choose.

        Raises:
            ValueError: a window without a segment, or an adapter that there is not.
        """
        if adapters is None:
            adapters = [route.task or JOINT for route in self.router.route_all(questions)]
        answers = [""] * len(questions)
        for adapter in sorted(set(adapters)):
            rows = [i for i, name in enumerate(adapters) if name == adapter]
            found = self._generate([questions[i] for i in rows], [windows[i] for i in rows], adapter)
            for i, answer in zip(rows, found, strict=True):
                answers[i] = self._prompter.text(answer.ids)
        return answers

    def _generate(
        self,
        questions: Sequence[str],
        windows: Sequence[Sequence[tuple[float, float, Features]]],
        adapter: str,
        on_token: Callable[[list[int]], None] | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> list[Generated]:
        windows = [_newest(window, self.max_segments) for window in windows]
        if adapter not in self._adapters:
            raise ValueError(f"adapter {adapter!r} found, expected one of {', '.join(self._adapters)}")
        if self._active != adapter:
            self._model.language_model.fuse(self._adapters[adapter])
            self._active = adapter
        items = [
            Prompted(question, [(start, end) for start, end, _ in window])
            for question, window in zip(questions, windows, strict=True)
        ]
        batch = self._prompter.batch(items, pad_left=True)
        segments = torch.stack([features for window in windows for _, _, features in window])
        with self._computing():
            return self._model.generate(segments, batch, on_token=on_token, stop=stop)

    def _stem_of(self, frame: NDArray[np.uint8]) -> Tensor:
        """[C, h, w] of a frame [S, S, 3]."""
        key = hashlib.blake2b(frame.tobytes(), digest_size=16).digest()
        if key not in self._stems:
            self._stems[key] = self._model.encoder.features(torch.from_numpy(frame.copy())[None, None])[0, :, 0]
            while len(self._stems) > _STEMS_KEPT:
                self._stems.popitem(last=False)
        self._stems.move_to_end(key)
        return self._stems[key]

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """This assistant's threads, and bfloat16 where the processor is fast at it."""
        fast = self._model.language_model.base.dtype == torch.bfloat16
        with self._threads_of_its_own(), torch.autocast("cpu", torch.bfloat16, enabled=fast):
            yield

    @contextmanager
    def _threads_of_its_own(self) -> Iterator[None]:
        before = torch.get_num_threads()
        try:
            if self._threads:
                torch.set_num_threads(self._threads)
            yield
        finally:
            torch.set_num_threads(before)


def _newest(window: Sequence[tuple[float, float, Features]], most: int) -> list[tuple[float, float, Features]]:
    """The last `most` segments of a window, their times from the first of them."""
    if not window:
        raise ValueError("a window without a segment found, expected at least one")
    kept = list(window)[-most:]
    first = kept[0][0]
    return [(start - first, end - first, features) for start, end, features in kept]
