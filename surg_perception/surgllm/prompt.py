# SPDX-License-Identifier: Apache-2.0
"""Interleaving: segments' visual tokens between time labels, the question behind them, as tensors of a batch.

A laparoscopic video of 8 seconds.
From time 0s to 4s : <visual tokens>
From time 4s to 8s : <visual tokens>
Question: What is the hook doing?
Answer: dissecting the gallbladder<end>
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from surg_perception.surgllm.base_models import find_base_model
from surg_perception.surgllm.config import SurgLLMConfig
from surg_perception.surgllm.language_model import load_tokenizer
from surg_perception.torch_extras import import_transformers

IGNORED = -100
"""Label of tokens that the loss leaves out (PyTorch's own)."""

Span = tuple[float, float]
"""Start and end of a segment in seconds from the window's first frame."""


@dataclass(frozen=True)
class Prompted:
    """A question about a window, and its answer in training."""

    question: str
    spans: Sequence[Span]
    answer: str | None = None


class Prompter:
    """Makes tensors of questions.

    Args:
        config: which tokenizers, how many queries, on which side the time label stands.

    Raises:
        BaseModelMissing: a tokenizer's files are not on this machine.
    """

    def __init__(self, config: SurgLLMConfig) -> None:
        self.config = config
        self.tokenizer = load_tokenizer(config)
        if config.qformer.start:
            self.question_tokenizer: Any = import_transformers().AutoTokenizer.from_pretrained(
                find_base_model(config.qformer.start)
            )
        else:
            self.question_tokenizer = import_transformers().ByT5Tokenizer(extra_ids=0)
        self._ids = lru_cache(maxsize=4096)(self._tokenize)

    def batch(self, items: Sequence[Prompted], *, pad_left: bool = False) -> dict[str, Tensor]:
        """Tensors of B questions about S segments in all.

        Returns:
            `ids` int64 [B, T], 0 where a visual token stands; `visual` int64 [B, T], the visual token's number among
            the S * queries of the batch, -1 elsewhere; `attention` int64 [B, T]; `labels` int64 [B, T], IGNORED
            but for the answer and its end token; `question_ids`, `question_attention` int64 [S, L], for each segment
            its time label and the question, so that the Q-Former can tell times as the window counts them.
        """
        rows, labels, visual = [], [], []
        questions: list[str] = []
        queries = self.config.qformer.queries
        for item in items:
            ids: list[int] = []
            seen: list[int] = []

            def text(tokens: Sequence[int], ids: list[int] = ids, seen: list[int] = seen) -> None:
                ids.extend(tokens)
                seen.extend([-1] * len(tokens))

            text(self._ids(f"A laparoscopic video of {item.spans[-1][1]:.0f} seconds.\n"))
            for start_s, end_s in item.spans:
                label = f"From time {start_s:.0f}s to {end_s:.0f}s : "
                first = len(questions) * queries
                questions.append(label + item.question)
                if self.config.label_first:
                    text(self._ids(label))
                ids.extend([0] * queries)
                seen.extend(range(first, first + queries))
                if not self.config.label_first:
                    text(self._ids(label))
                text(self._ids("\n"))
            text(self._ids(f"Question: {item.question}\nAnswer:"))
            asked = len(ids)
            if item.answer is not None:
                text(self.answer_ids(item.answer))
            rows.append(ids)
            visual.append(seen)
            labels.append([IGNORED] * asked + ids[asked:])
        asked_of = self.question_tokenizer(
            questions,
            padding=True,
            truncation=True,
            max_length=self.config.qformer.question_tokens,
            return_tensors="pt",
        )
        return {
            "ids": _padded(rows, 0, pad_left),
            "visual": _padded(visual, -1, pad_left),
            "attention": _padded([[1] * len(row) for row in rows], 0, pad_left),
            "labels": _padded(labels, IGNORED, pad_left),
            "question_ids": asked_of["input_ids"],
            "question_attention": asked_of["attention_mask"],
        }

    def answer_ids(self, answer: str) -> list[int]:
        """Tokens of an answer as the language model is to say it, its end token last."""
        return [*self._ids(f" {answer}"), self.tokenizer.eos_token_id]

    def text(self, ids: Sequence[int]) -> str:
        """The answer in tokens, as text."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def _tokenize(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False).input_ids)


def _padded(rows: Sequence[Sequence[int]], value: int, left: bool) -> Tensor:
    length = max(map(len, rows))
    padded = [
        [value] * (length - len(row)) + list(row) if left else [*row, *[value] * (length - len(row))] for row in rows
    ]
    return torch.tensor(padded, dtype=torch.int64)
