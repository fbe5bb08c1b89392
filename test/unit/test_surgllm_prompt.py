# SPDX-License-Identifier: Apache-2.0
"""Interleaving of visual tokens, time labels, question and answer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from surg_perception.surgllm.config import CONFIGS
from surg_perception.surgllm.prompt import IGNORED, Prompted, Prompter

CONFIG = CONFIGS["tiny"]
QUERIES = CONFIG.qformer.queries
SHORT = Prompted("Where is the hook?", [(0, 4)], "upper left")
LONG = Prompted("When does it go?", [(0, 2), (2, 6), (6, 10)], "at second 7")


@pytest.fixture(scope="module")
def prompter() -> Prompter:
    return Prompter(CONFIG)


def shown(prompter: Prompter, batch: dict[str, Tensor], row: int) -> str:
    """The row as text, a visual token as its number in angle brackets, padding left out."""
    text, pending = "", []
    for token, visual, attend in zip(
        *(batch[key][row].tolist() for key in ("ids", "visual", "attention")), strict=True
    ):
        if visual >= 0 or not attend:
            text += prompter.tokenizer.decode(pending) + (f"<{visual}>" if attend else "")
            pending = []
        else:
            pending.append(token)
    return text + prompter.tokenizer.decode(pending)


def tokens(first: int) -> str:
    return "".join(f"<{i}>" for i in range(first, first + QUERIES))


def test_a_prompt_is_label_tokens_question_answer_end(prompter: Prompter) -> None:
    batch = prompter.batch([SHORT])
    assert shown(prompter, batch, 0) == (
        "A laparoscopic video of 4 seconds.\n"
        f"From time 0s to 4s : {tokens(0)}\n"
        "Question: Where is the hook?\nAnswer: upper left</s>"
    )


def test_without_an_answer_it_ends_where_the_answer_begins(prompter: Prompter) -> None:
    batch = prompter.batch([replace(SHORT, answer=None)])
    assert shown(prompter, batch, 0).endswith("\nAnswer:")
    assert (batch["labels"] == IGNORED).all()


def test_labels_behind_the_tokens_as_in_the_release() -> None:
    other = Prompter(replace(CONFIG, label_first=False))
    text = shown(other, other.batch([LONG]), 0)
    assert text.startswith(
        f"A laparoscopic video of 10 seconds.\n{tokens(0)}From time 0s to 2s : \n"
        f"{tokens(QUERIES)}From time 2s to 6s : \n"
    )


@pytest.mark.parametrize("pad_left", [False, True])
def test_windows_of_a_batch_have_their_own_segments(prompter: Prompter, pad_left: bool) -> None:
    batch = prompter.batch([LONG, SHORT], pad_left=pad_left)
    assert shown(prompter, batch, 0) == (
        "A laparoscopic video of 10 seconds.\n"
        f"From time 0s to 2s : {tokens(0)}\n"
        f"From time 2s to 6s : {tokens(QUERIES)}\n"
        f"From time 6s to 10s : {tokens(2 * QUERIES)}\n"
        "Question: When does it go?\nAnswer: at second 7</s>"
    )
    assert shown(prompter, batch, 1).count(f"From time 0s to 4s : {tokens(3 * QUERIES)}\n") == 1
    used = batch["attention"].sum(dim=1)
    assert used[0] == batch["ids"].shape[1] > used[1]
    padding = slice(None, -int(used[1])) if pad_left else slice(int(used[1]), None)
    assert not batch["attention"][1, padding].any()
    assert (batch["visual"][1, padding] == -1).all()
    assert (batch["labels"][1, padding] == IGNORED).all()
    # The question once for each segment, behind its time, as the Q-Former reads it.
    asked = [prompter.question_tokenizer.decode(ids, skip_special_tokens=True) for ids in batch["question_ids"]]
    times = ("0s to 2s", "2s to 6s", "6s to 10s")
    assert asked == [f"From time {t} : {LONG.question}" for t in times] + [f"From time 0s to 4s : {SHORT.question}"]
    assert batch["question_attention"].sum(dim=1).tolist() == [len(text) + 1 for text in asked]


@pytest.mark.parametrize("pad_left", [False, True])
def test_only_the_answer_and_its_end_are_learned(prompter: Prompter, pad_left: bool) -> None:
    batch = prompter.batch([LONG, SHORT], pad_left=pad_left)
    for row, item in enumerate((LONG, SHORT)):
        learned = batch["labels"][row] != IGNORED
        assert torch.equal(batch["labels"][row][learned], batch["ids"][row][learned])
        assert prompter.tokenizer.decode(batch["labels"][row][learned]) == f" {item.answer}</s>"
        assert prompter.text(batch["labels"][row][learned].tolist()) == item.answer


def test_times_are_whole_seconds(prompter: Prompter) -> None:
    batch = prompter.batch([Prompted("Why?", [(0.0, 3.9666), (3.9666, 8.02)])])
    text = shown(prompter, batch, 0)
    assert "of 8 seconds" in text
    assert "From time 0s to 4s" in text
    assert "From time 4s to 8s" in text


def test_a_long_question_is_cut_for_the_q_former_alone(prompter: Prompter) -> None:
    question = "Where is the hook " * 20
    batch = prompter.batch([replace(SHORT, question=question)])
    assert batch["question_ids"].shape[1] == CONFIG.qformer.question_tokens
    assert question in shown(prompter, batch, 0)
