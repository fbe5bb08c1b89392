# SPDX-License-Identifier: Apache-2.0
"""Surg-Pretrain B: video and text are aligned, so that the encoder's tokens tell what a caption would say.

Three losses as in ALBEF (Li et al., arXiv 2107.07651), BLIP (arXiv 2201.12086) and Unmasked Teacher (arXiv
2303.16058): contrast of clips with captions, matching of a caption with a clip, in which the wrong ones are hard,
and words masked in the caption, filled in with the help of the clip. Most video tokens are left out in training.
docs/surgllm_pretraining.md describes the stage.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from surg_perception.gsvit.trainer import Task, TrainSettings, fit
from surg_perception.surgllm.base_models import find_base_model
from surg_perception.surgllm.encoder import VideoEncoder
from surg_perception.torch_extras import import_transformers

if TYPE_CHECKING:
    from surg_perception.surgllm.questions import Caption

ALIGNMENT_SETTINGS = TrainSettings(
    epochs=4,
    batch=64,
    learning_rate=3e-4,
    final_learning_rate=3e-6,
    schedule="one_cycle",
    optimiser="adamw",
    betas=(0.9, 0.98),
    weight_decay=0.02,
    gradient_clip=1.0,
    precision="bf16",
)
"""How `small` is aligned."""

_PAD, _UNKNOWN, _CLS, _SEP, _MASK = _SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_LEAST_SCALE, _MOST_SCALE = 1.0, 100.0  # of similarities: the inverse temperature
_CHUNK = 64
_NO_LOSS = -100


@dataclass(frozen=True)
class AlignmentConfig:
    """The text side and the losses.

    Attributes:
        start: base model whose first layers the text side starts from and whose word embeddings it uses as they are;
            "" for random weights and the words of the training captions as vocabulary.
        layers, fusion_layers: of the text side; the last `fusion_layers` look at the video.
        width, heads, mlp: of the text side where `start` is "".
        embedding: numbers that a clip and a caption are compared by.
        drop: share of the video tokens that are left out in training (0.8 in the publication, whose clips have
            many more tokens).
        mask: share of a caption's word pieces that are masked.
        weights: of the contrastive, the matching and the masked-word loss.
        frames: of a clip.
        text_tokens: most word pieces of a caption; what is longer is cut.
        validation_clips: most clips that are measured.
    """

    start: str = "all-minilm-l6-v2"
    layers: int = 3
    fusion_layers: int = 1
    width: int = 64
    heads: int = 2
    mlp: int = 128
    embedding: int = 256
    drop: float = 0.7
    mask: float = 0.5
    weights: tuple[float, float, float] = (1.0, 1.0, 1.0)
    frames: int = 4
    text_tokens: int = 48
    validation_clips: int = 512

    def __post_init__(self) -> None:
        if not 0 < self.fusion_layers < self.layers:
            raise ValueError(f"{self.fusion_layers} fusion layers of {self.layers} found, expected at least 1 of each")
        if not (0 <= self.drop < 1 and 0 < self.mask <= 1):
            raise ValueError(f"drop {self.drop} and mask {self.mask} found, expected 0 <= drop < 1 and 0 < mask <= 1")


# ---- text --------------------------------------------------------------------------------------------------


class Vocabulary(Protocol):
    """What is used of a tokenizer of `transformers`."""

    mask_token_id: int
    all_special_ids: list[int]

    def __len__(self) -> int: ...

    def __call__(self, text: list[str], **kwargs: Any) -> Any: ...


def word_vocabulary(texts: Sequence[str]) -> Vocabulary:
    """A tokenizer whose vocabulary are the words and marks of these texts, in lower case."""
    transformers = import_transformers()
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    words = sorted({word for text in texts for word in re.findall(r"\w+|[^\w\s]+", text.lower())})
    numbers = {word: i for i, word in enumerate((*_SPECIAL, *words))}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token=_UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(token, numbers[token]) for token in (_CLS, _SEP)]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{_CLS} $A {_SEP}", special_tokens=ends)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=_PAD,
        unk_token=_UNKNOWN,
        cls_token=_CLS,
        sep_token=_SEP,
        mask_token=_MASK,
    )


class _LookAtVideo(nn.Module):
    """Cross-attention of text to video tokens, residual, with the norm behind it, as BERT's layers have.

    Several texts look at one clip; its keys and values are computed once.
    """

    def __init__(self, width: int, video_width: int, heads: int, norm_eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.key_value = nn.Linear(video_width, 2 * width)
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        for layer in (self.query, self.out, self.key_value):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, text: Tensor, video: Tensor, which: Tensor) -> Tensor:
        """Text [n, L, width], video [B, N, video width], `which` [n]: the clip that each text looks at."""
        key, value = (self._heads(part)[which] for part in self.key_value(video).chunk(2, dim=-1))
        found = F.scaled_dot_product_attention(self._heads(self.query(text)), key, value)
        return self.norm(text + self.out(found.transpose(1, 2).flatten(2)))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


# ---- network -----------------------------------------------------------------------------------------------


class AlignmentNetwork(nn.Module):
    """Encoder, text side and the three heads.

    The text side is BERT's encoder: each word sees all others. Its first layers read the text alone and give the
    caption's embedding; the last ones look at the video between self-attention and feed-forward.

    Args:
        encoder: trained along, apart from its stem.
        config: the text side.
        vocabulary: word pieces where `config.start` is "".
        spoken: int64 [n], ascending: the word pieces that captions have, the only ones that a mask may hide. The
            other of BERT's 30,000 would only cost time.
    """

    words: Tensor
    spoken: Tensor

    def __init__(self, encoder: VideoEncoder, config: AlignmentConfig, vocabulary: int, spoken: Tensor) -> None:
        super().__init__()
        self.register_buffer("spoken", spoken, persistent=False)
        transformers = import_transformers()
        encoder.stem.requires_grad_(False)
        self.encoder, self.config = encoder, config
        if config.start:
            bert = transformers.BertModel.from_pretrained(
                find_base_model(config.start), attn_implementation="sdpa", attention_probs_dropout_prob=0.0
            )
        else:
            shapes = transformers.BertConfig(
                vocab_size=vocabulary,
                hidden_size=config.width,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                intermediate_size=config.mlp,
                max_position_embeddings=config.text_tokens,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                attn_implementation="sdpa",
            )
            bert = transformers.BertModel(shapes)
        width, self.first_fusion = bert.config.hidden_size, config.layers - config.fusion_layers
        words = bert.embeddings.word_embeddings.weight
        if config.start:
            self.register_buffer("words", words.detach(), persistent=False)
        else:
            self.words = nn.Parameter(words.detach())
        bert.embeddings.word_embeddings = None
        self.embed, self.layers = bert.embeddings, bert.encoder.layer[: config.layers]
        self.look = nn.ModuleList(
            _LookAtVideo(width, encoder.config.width, bert.config.num_attention_heads, bert.config.layer_norm_eps)
            for _ in range(config.fusion_layers)
        )
        self.video_out = nn.Linear(encoder.config.width, config.embedding)
        self.text_out = nn.Linear(width, config.embedding)
        self.match_out = nn.Linear(width, 1)
        self.word_out = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))
        self.word_bias = nn.Parameter(torch.zeros(len(words)))
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    # Parts

    def scale(self) -> Tensor:
        """The inverse temperature of similarities, 1..100."""
        return self.log_scale.exp().clamp(_LEAST_SCALE, _MOST_SCALE)

    def read(self, ids: Tensor, attend: Tensor) -> Tensor:
        """Text layers: ids int64 [n, L] and attend bool [n, L] (False for padding) to states [n, L, width]."""
        states = self.embed(inputs_embeds=F.embedding(ids, self.words))
        for layer in self.layers[: self.first_fusion]:
            states = layer(states, attend[:, None, None, :])
        return states

    def fuse(self, states: Tensor, attend: Tensor, video: Tensor, which: Tensor) -> Tensor:
        """Fusion layers: states of `read` to states that know the clip `which` [n] of video [B, N, width]."""
        for layer, look in zip(self.layers[self.first_fusion :], self.look, strict=True):
            states, _ = layer.attention(states, attend[:, None, None, :])
            states = layer.feed_forward_chunk(look(states, video, which))
        return states

    def embed_video(self, video: Tensor) -> Tensor:
        """Tokens [B, N, width] to unit vectors float32 [B, embedding]."""
        return F.normalize(self.video_out(video.mean(1)).float(), dim=-1)

    def embed_text(self, states: Tensor, attend: Tensor) -> Tensor:
        """States of `read` to unit vectors float32 [n, embedding]."""
        share = attend / attend.sum(1, keepdim=True)
        return F.normalize(self.text_out((states * share[..., None]).sum(1)).float(), dim=-1)

    def word_logits(self, states: Tensor) -> Tensor:
        """Fused states [n, width] of word pieces to logits [n, spoken]; the weights are the word embeddings."""
        return F.linear(self.word_out(states), self.words[self.spoken], self.word_bias[self.spoken])

    def forward(
        self,
        features: Tensor,
        ids: Tensor,
        attend: Tensor,
        masked_ids: Tensor,
        labels: Tensor,
        positive: Tensor,
        keep: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The three losses of a batch of clips and their captions, and how often matching and words are right.

        Args:
            features: [B, C, T, h, w], what `encoder.features` gave.
            ids: int64 [B, L], captions; `masked_ids` the same with masks.
            attend: bool [B, L], False for padding.
            labels: int64 [B, L], the word piece under a mask, -100 elsewhere.
            positive: bool [B, B], caption j is true of clip i.
            keep: int64 [B, n], video tokens that are seen; None for all.
        """
        video = self.encoder.encode(features.float(), keep)
        states, masked_states = self.read(torch.cat((ids, masked_ids)), attend.repeat(2, 1)).chunk(2)
        with torch.autocast(video.device.type, enabled=False):
            similarity = self.embed_video(video.float()) @ self.embed_text(states.float(), attend).T * self.scale()
        own = torch.arange(len(ids), device=ids.device)
        wrong_text, clips_with_wrong = hard_negatives(similarity, positive)
        wrong_clip, texts_with_wrong = hard_negatives(similarity.T, positive.T)
        texts = torch.cat((own, wrong_text, texts_with_wrong))
        clips = torch.cat((own, clips_with_wrong, wrong_clip))
        fused = self.fuse(
            torch.cat((states[texts], masked_states)),
            torch.cat((attend[texts], attend)),
            video,
            torch.cat((clips, own)),
        )
        match = self.match_out(fused[: len(texts), 0]).float().squeeze(-1)
        truth = torch.arange(len(texts), device=ids.device) < len(own)
        hidden = labels != _NO_LOSS
        logits = self.word_logits(fused[len(texts) :][hidden]).float()
        pieces = torch.searchsorted(self.spoken, labels[hidden])
        right = ((match > 0) == truth).float()
        return {
            "contrastive": contrastive_loss(similarity, positive),
            "matching": matching_loss(match, truth),
            "words": F.cross_entropy(logits, pieces),
            "matching_right": right[truth].mean() / 2 + right[~truth].mean() / 2,
            "words_right": (logits.argmax(-1) == pieces).float().mean(),
        }


def contrastive_loss(similarity: Tensor, positive: Tensor) -> Tensor:
    """InfoNCE in both directions, whose target is spread evenly over all that is true (Radford et al., 2103.00020).

    Args:
        similarity: float [clips, captions], divided by the temperature.
        positive: bool, the same shape; at least one in each row and column.
    """
    both = [
        F.cross_entropy(logits, true.float() / true.sum(1, keepdim=True))
        for logits, true in ((similarity, positive), (similarity.T, positive.T))
    ]
    return (both[0] + both[1]) / 2


def matching_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Binary cross-entropy in which true pairs and wrong ones weigh the same, however many there are of each.

    Args:
        logits: float [n].
        truth: bool [n], at least one True.
    """
    each = F.binary_cross_entropy_with_logits(logits, truth.float(), reduction="none")
    return each[truth].mean() / 2 + (each[~truth].mean() / 2 if bool((~truth).any()) else 0.0)


@torch.no_grad()
def hard_negatives(similarity: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """One wrong column for each row, drawn by its similarity (Li et al., ALBEF, section 3.2).

    Args:
        similarity: [n, m], divided by the temperature.
        positive: bool [n, m], columns that are not wrong.

    Returns:
        int64 columns, and int64 rows that they belong to: all rows but those to which no column is wrong.
    """
    rows = (~positive).any(1).nonzero().squeeze(1)
    if not len(rows):
        return rows, rows
    # A floor, so that no wrong column is out of reach and the weights do not all vanish.
    weights = (similarity[rows].float().softmax(1) + 1e-4).masked_fill(positive[rows], 0.0)
    return torch.multinomial(weights, 1).squeeze(1), rows


# ---- task --------------------------------------------------------------------------------------------------


class AlignmentTask(Task):
    """Alignment on captions whose clips' features lie in memory or on disk.

    A batch holds one clip with its caption per sample. True of a clip are all captions in the batch that mean the same
    as one that was made for this very clip; equal captions always do.

    Args:
        encoder: trained in place.
        captions: to learn from.
        features: for each video's name float16 [seconds, C, h, w] (`feature_cache.cached_features`).
        config: text side and losses.
        validation: captions of other videos; may be none.
        meaning: of a caption, the same for two wordings of one statement; its text unless told.
        seed: of the new weights and of what is drawn for validation.
    """

    def __init__(
        self,
        encoder: VideoEncoder,
        captions: Sequence[Caption],
        features: Mapping[str, NDArray[np.float16]],
        config: AlignmentConfig,
        validation: Sequence[Caption] = (),
        meaning: Callable[[Caption], str] | None = None,
        seed: int = 0,
    ) -> None:
        self.config, self.features, self.seed = config, features, seed
        self.captions, self.validation = list(captions), list(validation)
        for caption in (*self.captions, *self.validation):
            self._check(caption)
        self.samples = len(self.captions)
        self.tokens = encoder.config.tokens(config.frames)
        self.vocabulary: Vocabulary = (
            import_transformers().AutoTokenizer.from_pretrained(find_base_model(config.start))
            if config.start
            else word_vocabulary([caption.text for caption in self.captions])
        )
        self._meaning = {c: meaning(c) if meaning else c.text for c in (*self.captions, *self.validation)}
        self._true: dict[tuple[str, int], set[str]] = {}
        for caption, what in self._meaning.items():
            self._true.setdefault((caption.video, caption.start_s), set()).add(what)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.module = AlignmentNetwork(encoder, config, len(self.vocabulary), self._spoken())

    def _check(self, caption: Caption) -> None:
        frames, clip = self.config.frames, f"{caption.start_s} to {caption.end_s} of {caption.video}"
        if caption.video not in self.features:
            raise ValueError(f"the caption of seconds {clip} has no features; features of that video are expected")
        known = len(self.features[caption.video])
        if caption.end_s - caption.start_s != frames or not 0 <= caption.start_s <= known - frames:
            raise ValueError(f"a caption of seconds {clip} found, expected {frames} seconds within its {known}")

    def identity(self) -> Mapping[str, Any]:
        digest = hashlib.sha256()
        for caption in self.captions:
            digest.update(repr((caption, self._meaning[caption])).encode())
        return {"alignment": json.loads(json.dumps(asdict(self.config))), "captions": digest.hexdigest()[:16]}

    def batch(self, indices: NDArray[np.int64], rng: np.random.Generator) -> dict[str, Tensor]:
        batch = self._tensors([self.captions[i] for i in indices], rng)
        if self.config.drop:
            kept = max(1, round(self.tokens * (1 - self.config.drop)))
            order = rng.permuted(np.tile(np.arange(self.tokens), (len(indices), 1)), axis=1)
            batch["keep"] = torch.from_numpy(np.sort(order[:, :kept], axis=1))
        return batch

    def _tensors(self, captions: Sequence[Caption], rng: np.random.Generator) -> dict[str, Tensor]:
        """What `AlignmentNetwork.forward` takes, but for `keep`."""
        texts = [caption.text for caption in captions]
        encoded = self.vocabulary(
            texts, padding=True, truncation=True, max_length=self.config.text_tokens, return_tensors="np"
        )
        ids = encoded["input_ids"].astype(np.int64)
        hidden = masked_places(~np.isin(ids, self.vocabulary.all_special_ids), self.config.mask, rng)
        clips = [self.features[c.video][c.start_s : c.end_s] for c in captions]
        return {
            "features": torch.from_numpy(np.stack(clips)).transpose(1, 2),
            "ids": torch.from_numpy(ids),
            "attend": torch.from_numpy(encoded["attention_mask"].astype(bool)),
            "masked_ids": torch.from_numpy(np.where(hidden, self.vocabulary.mask_token_id, ids)),
            "labels": torch.from_numpy(np.where(hidden, ids, _NO_LOSS)),
            "positive": self._positive(captions, captions),
        }

    def _spoken(self) -> Tensor:
        """Word pieces of all captions, int64, ascending."""
        texts = sorted({caption.text for caption in (*self.captions, *self.validation)})
        ids = self.vocabulary(
            texts, padding=True, truncation=True, max_length=self.config.text_tokens, return_tensors="np"
        )["input_ids"]
        return torch.from_numpy(np.unique(ids.astype(np.int64)))

    def _positive(self, clips: Sequence[Caption], captions: Sequence[Caption]) -> Tensor:
        """bool [clips, captions]: which caption is true of which clip."""
        meanings = [self._meaning[caption] for caption in captions]
        return torch.tensor([[what in self._true[c.video, c.start_s] for what in meanings] for c in clips])

    def loss(self, module: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        found = module(**batch)
        parts = ("contrastive", "matching", "words")
        total = sum(weight * found[part] for weight, part in zip(self.config.weights, parts, strict=True))
        return total, {name: float(value.detach()) for name, value in found.items()}

    def end_of_epoch(self, epoch: int, module: nn.Module, folder: Path) -> dict[str, float]:
        return self.measure(cast(AlignmentNetwork, module)) if self.validation else {}

    @torch.no_grad()
    def measure(self, module: AlignmentNetwork) -> dict[str, float]:
        """Figures over the validation clips, whose tokens are all seen, each beside what guessing gives.

        Returns:
            The three losses; `video_to_text_r1`, `…_r5`, `text_to_video_r1`, `…_r5`: share of clips (captions) for
            which a true caption (clip) is among the 1 (5) most similar ones, in a gallery with each meaning once;
            `gallery` its size and `chance_r1`, `chance_r5`; `matching`: share of caption and clip pairs judged
            right, true and hard wrong ones counting the same (chance 0.5); `words`: share of masked word pieces filled
            in right, `words_other_clip` the same with another clip shown, and `words_chance`, always the most
            frequent one.
        """
        rng = np.random.default_rng([self.seed, len(self.validation)])
        torch.manual_seed(self.seed)
        device = module.words.device
        order = [self.validation[i] for i in rng.permutation(len(self.validation))]
        sums: dict[str, list[float]] = {}
        hidden: list[NDArray[np.int64]] = []
        chosen = order[: self.config.validation_clips]
        for first in range(0, len(chosen), _CHUNK):
            batch = self._tensors(chosen[first : first + _CHUNK], rng)
            hidden.append(batch["labels"][batch["labels"] != _NO_LOSS].numpy())
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            found = module(**batch)
            other = module(**batch | {"features": batch["features"].roll(1, 0)})
            found["words_other_clip"] = other["words_right"]
            for name, value in found.items():
                sums.setdefault(name, []).append(float(value))
        means = {name: float(np.nanmean(values)) for name, values in sums.items()}
        pieces = np.concatenate(hidden)
        return {
            "contrastive_loss": means["contrastive"],
            "matching_loss": means["matching"],
            "words_loss": means["words"],
            "matching": means["matching_right"],
            "words": means["words_right"],
            "words_other_clip": means["words_other_clip"],
            "words_chance": float(np.unique(pieces, return_counts=True)[1].max() / len(pieces)),
            **self._retrieval(module, list({self._meaning[c]: c for c in order}.values()), rng),
        }

    def _retrieval(
        self, module: AlignmentNetwork, gallery: Sequence[Caption], rng: np.random.Generator
    ) -> dict[str, float]:
        videos, texts = [], []
        gallery = gallery[: self.config.validation_clips]
        for first in range(0, len(gallery), _CHUNK):
            part = gallery[first : first + _CHUNK]
            batch = {name: tensor.to(module.words.device) for name, tensor in self._tensors(part, rng).items()}
            videos.append(module.embed_video(module.encoder.encode(batch["features"].float())))
            texts.append(module.embed_text(module.read(batch["ids"], batch["attend"]), batch["attend"]))
        similarity, true = torch.cat(videos) @ torch.cat(texts).T, self._positive(gallery, gallery)
        figures = {"gallery": float(len(gallery))}
        for k in (1, 5):
            k_here = min(k, len(gallery))
            for name, s, t in (("video_to_text", similarity, true), ("text_to_video", similarity.T, true.T)):
                best = s.topk(k_here, dim=1).indices.cpu()
                figures[f"{name}_r{k}"] = float(t.gather(1, best).any(1).float().mean())
            wrong = (~true).sum(1)
            misses = [math.comb(int(w), k_here) / math.comb(len(gallery), k_here) for w in wrong]
            figures[f"chance_r{k}"] = 1.0 - float(np.mean(misses))
        return figures


def masked_places(words: NDArray[np.bool_], share: float, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Which word pieces to mask: `share` of each row's, at least one, bool [n, L].

    Args:
        words: bool [n, L], False for padding and marks of beginning and end.
    """
    rank = np.where(words, rng.random(words.shape), 2.0).argsort(axis=1).argsort(axis=1)
    count = np.maximum(1, np.rint(share * words.sum(axis=1)))
    return (rank < count[:, None]) & words


def align(
    encoder: VideoEncoder,
    captions: Sequence[Caption],
    features: Mapping[str, NDArray[np.float16]],
    settings: TrainSettings,
    folder: Path,
    *,
    config: AlignmentConfig | None = None,
    validation: Sequence[Caption] = (),
    meaning: Callable[[Caption], str] | None = None,
    resume: bool = True,
    console: Console | None = None,
) -> VideoEncoder:
    """Surg-Pretrain B.

    Args:
        encoder: as stage A gave it, left as it is.
        captions: to learn from, each of `config.frames` seconds.
        features: for each video's name float16 [seconds, C, h, w] (`feature_cache.cached_features`).
        settings: how to train, for `small` ALIGNMENT_SETTINGS.
        folder: the training's own folder (`trainer`); its metrics.jsonl has the figures of `AlignmentTask.measure`.
        config: text side and losses; those of `small` unless told.
        validation: captions of other videos.
        meaning: of a caption, as for `AlignmentTask`.
        resume, console: as for `trainer.fit`.

    Returns:
        The aligned encoder, in evaluation mode on the CPU.

    Raises:
        BaseModelMissing: the text side's base model is not on this machine.
        ValueError: a caption that does not fit the features.
        TrainingError and its kind: as `trainer.fit`.
    """
    task = AlignmentTask(
        copy.deepcopy(encoder), captions, features, config or AlignmentConfig(), validation, meaning, settings.seed
    )
    aligned: Any = fit(task, settings, folder, resume=resume, console=console)
    return aligned.encoder
