# SPDX-License-Identifier: Apache-2.0
"""Alignment with captions: the three losses, what counts as true, who sees what; and that it is learned."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from rich.console import Console

from surg_perception.data.clip_labels import ClipVideo, SecondLabels
from surg_perception.data.frame_readers import FrameReader
from surg_perception.gsvit.trainer import read_lines
from surg_perception.surgllm.alignment import (
    ALIGNMENT_SETTINGS,
    AlignmentConfig,
    AlignmentTask,
    align,
    contrastive_loss,
    hard_negatives,
    masked_places,
    matching_loss,
    word_vocabulary,
)
from surg_perception.surgllm.config import CONFIGS
from surg_perception.surgllm.encoder import VideoEncoder
from surg_perception.surgllm.feature_cache import cached_features
from surg_perception.surgllm.questions import Caption
from surg_perception.torch_extras import import_transformers

ENCODER = CONFIGS["tiny"].encoder
SIZE = ENCODER.image_size
TEXT = AlignmentConfig(start="", layers=2, fusion_layers=1, embedding=32, drop=0.5)
COLOURS = {"red": (1, -1, -1), "green": (-1, 1, -1), "blue": (-1, -1, 1), "white": (1, 1, 1)}
PLACES = {"upper left": (0, 0), "upper right": (0, 1), "lower left": (1, 0), "lower right": (1, 1)}


def squares(name: str, clips: int, seed: int) -> tuple[list[Caption], NDArray[np.float16]]:
    """Clips of 4 s with a coloured square in a corner, what they show, and their pixels [4 * clips, 3, SIZE, SIZE]."""
    rng = np.random.default_rng(seed)
    frames = rng.normal(0, 0.1, (clips, 4, 3, SIZE, SIZE))
    captions, half = [], SIZE // 2
    for k in range(clips):
        colour, place = rng.choice(list(COLOURS)), rng.choice(list(PLACES))
        top, left = (half * side for side in PLACES[place])
        frames[k, :, :, top : top + half, left : left + half] += np.array(COLOURS[colour])[:, None, None]
        captions.append(Caption(name, 4 * k, 4 * k + 4, f"The {colour} square is at the {place}."))
    return captions, frames.reshape(-1, 3, SIZE, SIZE).astype(np.float16)


def task_of(captions: Sequence[Caption], config: AlignmentConfig = TEXT, **others: object) -> AlignmentTask:
    torch.manual_seed(0)
    seconds = max(caption.end_s for caption in captions)
    pixels = np.random.default_rng(0).normal(size=(seconds, 3, SIZE, SIZE)).astype(np.float16)
    return AlignmentTask(VideoEncoder(ENCODER), captions, {"v": pixels}, config, **others)  # type: ignore[arg-type]


def captions_of(*texts: str) -> list[Caption]:
    return [Caption("v", 4 * k, 4 * k + 4, text) for k, text in enumerate(texts)]


# ---- losses ------------------------------------------------------------------------------------------------


def test_all_equal_captions_share_the_contrastive_target() -> None:
    similarity = torch.tensor([[2.0, 1.0, 0.0], [0.5, 1.5, -1.0], [0.0, 3.0, 1.0]])
    positive = torch.tensor([[True, True, False], [True, True, False], [False, False, True]])

    def by_hand(rows: list[list[float]]) -> float:
        logs = [[x - math.log(sum(map(math.exp, row))) for x in row] for row in rows]
        return -((logs[0][0] + logs[0][1]) / 2 + (logs[1][0] + logs[1][1]) / 2 + logs[2][2]) / 3

    expected = (by_hand(similarity.tolist()) + by_hand(similarity.T.tolist())) / 2
    assert float(contrastive_loss(similarity, positive)) == pytest.approx(expected, abs=1e-6)
    assert float(contrastive_loss(similarity, torch.eye(3, dtype=torch.bool))) != pytest.approx(expected, abs=1e-2)


def test_hard_negatives_are_wrong_and_mostly_similar() -> None:
    torch.manual_seed(0)
    texts = [0, 0, 1, 2, 3, 0]
    positive = torch.tensor([[a == b for b in texts] for a in texts])
    similarity = torch.where(positive, 50.0, 0.0)
    similarity[2, 4] = similarity[3, 4] = 3.0
    drawn = torch.stack([hard_negatives(similarity, positive)[0] for _ in range(300)])
    for row in range(6):
        assert not positive[row, drawn[:, row]].any()
    share = math.exp(3) / (math.exp(3) + 4)  # of clip 2 and caption 4, were caption 2 itself not there
    assert (drawn[:, 3] == 4).float().mean() < share  # the floor: its own caption takes nearly all the similarity
    similarity[positive] = 0.0
    drawn = torch.stack([hard_negatives(similarity, positive)[0] for _ in range(300)])
    assert (drawn[:, 2] == 4).float().mean() == pytest.approx(share, abs=0.07)
    assert {int(column) for column in drawn[:, 0]} == {2, 3, 4}


def test_clips_for_which_every_caption_is_true_have_no_hard_negative() -> None:
    positive = torch.tensor([[True, True], [True, False]])
    wrong, rows = hard_negatives(torch.zeros(2, 2), positive)
    assert (wrong.tolist(), rows.tolist()) == ([1], [1])
    wrong, rows = hard_negatives(torch.zeros(2, 2), torch.ones(2, 2, dtype=torch.bool))
    assert len(wrong) == len(rows) == 0
    task = task_of(captions_of("the hook", "the hook"))
    loss, figures = task.loss(task.module, task.batch(np.arange(2), np.random.default_rng(0)))
    assert math.isfinite(loss.item())
    assert figures["contrastive"] == pytest.approx(math.log(2), abs=0.05)


def test_true_and_wrong_pairs_weigh_the_same() -> None:
    truth = torch.tensor([True, False, False])
    logits = torch.tensor([1.0, 2.0, -1.0])
    wrong = (math.log1p(math.exp(2)) + math.log1p(math.exp(-1))) / 2
    assert float(matching_loss(logits, truth)) == pytest.approx((math.log1p(math.exp(-1)) + wrong) / 2)


def test_the_loss_is_the_weighted_sum_of_three() -> None:
    captions = captions_of("the hook", "a grasper", "two clips")
    task = task_of(captions, replace(TEXT, weights=(1.0, 2.0, 3.0)))
    loss, figures = task.loss(task.module, task.batch(np.arange(3), np.random.default_rng(0)))
    parts = figures["contrastive"] + 2 * figures["matching"] + 3 * figures["words"]
    assert loss.item() == pytest.approx(parts, rel=1e-5)


# ---- batches -----------------------------------------------------------------------------------------------


def test_half_of_the_word_pieces_are_masked_and_no_mark() -> None:
    words = np.zeros((200, 14), dtype=bool)
    words[:, 1:11] = True
    words[0, 2:] = False
    hidden = masked_places(words, 0.5, np.random.default_rng(0))
    assert not hidden[~words].any()
    assert hidden[0].sum() == 1
    assert (hidden[1:].sum(axis=1) == 5).all()
    assert np.abs(hidden[1:, 1:11].mean(axis=0) - 0.5).max() < 0.12
    assert masked_places(words, 1.0, np.random.default_rng(0)).tolist() == words.tolist()


def test_a_batch_holds_captions_their_clips_and_half_of_the_tokens() -> None:
    captions = captions_of("The hook dissects the gallbladder.", "No instrument", "The hook dissects the gallbladder.")
    task = task_of(captions)
    batch = task.batch(np.array([2, 1, 0]), np.random.default_rng(0))
    for row, caption in enumerate((captions[2], captions[1], captions[0])):
        clip = torch.from_numpy(task.features["v"][caption.start_s : caption.end_s]).transpose(0, 1)
        assert torch.equal(batch["features"][row], clip)
    assert batch["attend"].sum(1).tolist() == [8, 4, 8]
    masked = batch["labels"] != -100
    assert masked.sum(1).tolist() == [3, 1, 3]
    assert torch.equal(batch["labels"][masked], batch["ids"][masked])
    assert (batch["masked_ids"][masked] == task.vocabulary.mask_token_id).all()
    assert torch.equal(batch["masked_ids"][~masked], batch["ids"][~masked])
    assert batch["positive"].tolist() == [[True, False, True], [False, True, False], [True, False, True]]
    tokens = ENCODER.tokens(4)
    assert tuple(batch["keep"].shape) == (3, tokens // 2)
    assert all(len(set(row)) == tokens // 2 and max(row) < tokens for row in batch["keep"].tolist())
    assert not torch.equal(batch["keep"][0], batch["keep"][1])


def test_other_words_for_the_same_are_true_as_well() -> None:
    captions = captions_of("Preparation: a hook.", "A hook; the phase is preparation.", "Preparation: a grasper.")
    plain, told = task_of(captions), task_of(captions, meaning=lambda c: "hook" if "hook" in c.text else c.text)
    assert torch.equal(plain._tensors(captions, np.random.default_rng(0))["positive"], torch.eye(3, dtype=torch.bool))
    positive = told._tensors(captions, np.random.default_rng(0))["positive"]
    assert positive.tolist() == [[True, True, False], [True, True, False], [False, False, True]]
    assert plain.identity() != told.identity()


def test_every_caption_of_a_clip_is_true_of_it() -> None:
    captions = [Caption("v", 0, 4, "A hook."), Caption("v", 0, 4, "Preparation."), Caption("v", 4, 8, "A grasper.")]
    positive = task_of(captions)._tensors(captions, np.random.default_rng(0))["positive"]
    assert positive.tolist() == [[True, True, False], [True, True, False], [False, False, True]]


@pytest.mark.parametrize(
    ("caption", "message"),
    [
        (Caption("w", 0, 4, "a"), "no features"),
        (Caption("v", 0, 5, "a"), "expected 4 seconds"),
        (Caption("v", 6, 10, "a"), "within its 8"),
    ],
)
def test_captions_that_do_not_fit_are_refused(caption: Caption, message: str) -> None:
    features = {"v": np.zeros((8, 3, SIZE, SIZE), np.float16)}
    with pytest.raises(ValueError, match=message):
        AlignmentTask(VideoEncoder(ENCODER), [caption], features, TEXT)


# ---- who sees what -----------------------------------------------------------------------------------------


def fused(task: AlignmentTask, ids: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Word logits [n, L, spoken]."""
    attend, network = torch.ones_like(ids, dtype=torch.bool), task.module.eval()
    with torch.no_grad():
        video = network.encoder.encode(features)
        states = network.fuse(network.read(ids, attend), attend, video, torch.arange(len(ids)))
        return network.word_logits(states)


def test_a_word_sees_later_words_and_the_clip_it_is_paired_with() -> None:
    task = task_of(captions_of("one two three four", "five six seven eight"))
    ids = torch.tensor([[2, 5, 6, 7, 3], [2, 5, 6, 7, 3]])
    features = torch.randn(2, 3, 4, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    before = fused(task, ids, features)
    later = ids.clone()
    later[0, 3] = 9
    after = fused(task, later, features)
    assert not torch.allclose(before[0, 1], after[0, 1], atol=1e-5)
    assert torch.allclose(before[1], after[1], atol=1e-6)
    other = fused(task, ids, features.flip(0))
    assert not torch.allclose(before[0], other[0], atol=1e-5)
    assert torch.allclose(before[0], other[1], atol=1e-6)


def test_padding_is_not_seen() -> None:
    network = task_of(captions_of("one two three", "five six")).module.eval()
    ids, attend = torch.tensor([[2, 5, 3, 0, 0]]), torch.tensor([[True, True, True, False, False]])
    video = torch.randn(1, 8, ENCODER.width, generator=torch.Generator().manual_seed(0))
    own = torch.zeros(1, dtype=torch.int64)
    with torch.no_grad():
        long, short = network.read(ids, attend), network.read(ids[:, :3], attend[:, :3])
        assert torch.allclose(network.embed_text(long, attend), network.embed_text(short, attend[:, :3]), atol=1e-6)
        long, short = network.fuse(long, attend, video, own), network.fuse(short, attend[:, :3], video, own)
    assert torch.allclose(long[:, :3], short, atol=1e-6)


def test_a_base_model_gives_the_text_side_its_layers_and_its_words_as_they_are(tmp_path: Path) -> None:
    transformers = import_transformers()
    texts = ["the hook dissects the gallbladder", "a grasper"]
    tokenizer = word_vocabulary(texts)
    tokenizer.save_pretrained(tmp_path)  # type: ignore[attr-defined]
    shapes = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64
    )
    torch.manual_seed(1)
    bert = transformers.BertModel(shapes).eval()
    bert.save_pretrained(tmp_path)
    task = task_of(captions_of(*texts), replace(TEXT, start=str(tmp_path)))
    encoded = tokenizer(texts, padding=True, return_tensors="pt")
    attend = encoded["attention_mask"].bool()
    with torch.no_grad():
        expected = bert(**encoded, output_hidden_states=True).hidden_states[1]
        found = task.module.eval().read(encoded["input_ids"], attend)
    assert torch.allclose(found[attend], expected[attend], atol=1e-5)
    stored = task.module.state_dict()
    assert not any(len(tensor) == len(tokenizer) and tensor.ndim == 2 for tensor in stored.values() if tensor.ndim)
    task.module.train()
    loss, _ = task.loss(task.module, task.batch(np.arange(2), np.random.default_rng(0)))
    loss.backward()
    assert torch.equal(task.module.words, bert.embeddings.word_embeddings.weight)
    assert not task.module.words.requires_grad
    without = [n for n, p in task.module.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


# ---- training ----------------------------------------------------------------------------------------------


def test_alignment_beats_guessing_on_held_out_clips(tmp_path: Path) -> None:
    captions, features = squares("a", 768, 0)
    held_out, others = squares("b", 48, 1)
    torch.manual_seed(0)
    encoder = VideoEncoder(ENCODER)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    settings = replace(ALIGNMENT_SETTINGS, epochs=6, batch=16, learning_rate=3e-3, precision="fp32", threads=1)
    aligned = align(
        encoder,
        captions,
        {"a": features, "b": others},
        settings,
        tmp_path,
        config=TEXT,
        validation=held_out,
        console=Console(file=io.StringIO()),
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())
    figures = read_lines(tmp_path / "metrics.jsonl")[-1]
    assert figures["gallery"] >= 12
    assert figures["chance_r1"] == pytest.approx(1 / figures["gallery"])
    assert figures["chance_r5"] == pytest.approx(5 / figures["gallery"])
    for way in ("video_to_text", "text_to_video"):
        assert figures[f"{way}_r1"] > 0.8
        assert figures[f"{way}_r5"] >= figures[f"{way}_r1"]
    assert figures["matching"] > 0.7
    assert figures["words"] > figures["words_other_clip"] + 0.1 > figures["words_chance"] + 0.1
    # What comes back is what was measured.
    task = AlignmentTask(aligned, captions, {"a": features, "b": others}, TEXT, held_out)
    state = torch.load(tmp_path / "state.pt", weights_only=True)["module"]
    task.module.load_state_dict({k: v for k, v in state.items() if not k.startswith("encoder.")}, strict=False)
    again = task.measure(task.module.eval())
    assert again["video_to_text_r1"] == figures["video_to_text_r1"]


# ---- features ----------------------------------------------------------------------------------------------


class Pictures(FrameReader):
    """Random pictures; counts how many were read."""

    def __init__(self, count: int) -> None:
        self.pictures = np.random.default_rng(0).integers(0, 256, (count, 40, 60, 3), dtype=np.uint8)
        self.read_so_far = 0

    def read(self, indices: Iterable[int]) -> Iterator[NDArray[np.uint8]]:
        for index in indices:
            self.read_so_far += 1
            yield self.pictures[index]

    def fingerprint(self) -> str:
        return "pictures"


def test_features_are_computed_once_and_anew_for_another_stem(tmp_path: Path) -> None:
    config = replace(ENCODER, image_size=32, patch_size=16, stem="efficientnet_lite0")
    encoder = VideoEncoder(config).eval()
    reader = Pictures(5)
    shown = (0, 0, 1, 1, 2, 3, 4)
    clip = ClipVideo("v@0000", "v", tuple(SecondLabels(None, None) for _ in shown), (), 1, reader, shown)
    told: list[tuple[int, int]] = []
    found = cached_features(encoder, [clip], tmp_path, lambda done, all: told.append((done, all)))["v@0000"]
    assert (found.shape, found.dtype) == ((7, 112, 2, 2), np.float16)
    assert told == [(7, 7)]
    import cv2

    frames = np.stack([cv2.resize(reader.pictures[i], (32, 32), interpolation=cv2.INTER_LINEAR) for i in shown])
    with torch.no_grad():
        expected = encoder.features(torch.from_numpy(frames)[None])[0].transpose(0, 1).numpy()
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3)
    read = reader.read_so_far
    np.testing.assert_array_equal(cached_features(encoder, [clip], tmp_path)["v@0000"], found)
    assert reader.read_so_far == read
    with torch.no_grad():
        next(encoder.stem.parameters()).mul_(1.1)
    assert not np.array_equal(cached_features(encoder, [clip], tmp_path)["v@0000"], found)
    assert not list(tmp_path.glob("*.partial"))
