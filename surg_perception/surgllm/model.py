# SPDX-License-Identifier: Apache-2.0
"""SurgLLM (arXiv 2509.00357): video encoder, instruction-aware Q-Former, language model with adapters.

A segment of video becomes tokens once (`VideoEncoder`). For each question the Q-Former picks from them what the
question is about, and the language model reads that between time labels (`prompt.Prompter`) and answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surg_perception.surgllm.base_models import find_base_model
from surg_perception.surgllm.config import QFormerConfig, SurgLLMConfig
from surg_perception.surgllm.encoder import VideoEncoder
from surg_perception.surgllm.language_model import LanguageModel
from surg_perception.surgllm.prompt import IGNORED
from surg_perception.torch_extras import import_transformers

_NOT_STORED = ("language_model.", "qformer.words.base.")


class QFormer(nn.Module):
    """Learned queries that look at a segment's tokens with the question in mind.

    `InstructBlipVideoQFormerModel` of transformers, which is the publication's, with a start from a sentence
    encoder's layers where the configuration names one.

    Args:
        config: its shapes.
        video_width: of the encoder's tokens.

    Raises:
        BaseModelMissing: the files of `config.start` are not on this machine.
    """

    def __init__(self, config: QFormerConfig, video_width: int) -> None:
        super().__init__()
        transformers = import_transformers()
        from transformers.models.instructblipvideo import InstructBlipVideoQFormerModel

        shapes = transformers.InstructBlipVideoQFormerConfig(
            vocab_size=1 if config.start else config.vocabulary,
            hidden_size=config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            intermediate_size=config.mlp,
            cross_attention_frequency=config.cross_attention_every,
            encoder_hidden_size=video_width,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            attn_implementation="eager",
        )
        self.network = InstructBlipVideoQFormerModel(shapes)
        self.queries = nn.Parameter(torch.randn(1, config.queries, config.width) * 0.02)
        if config.start:
            self.words = _Words(config)
            self.network.set_input_embeddings(nn.Identity())

    def forward(self, tokens: Tensor, question_ids: Tensor, question_attention: Tensor) -> Tensor:
        """Visual tokens.

        Args:
            tokens: [S, N, video width].
            question_ids, question_attention: int64 [S, L].

        Returns:
            [S, queries, width].
        """
        queries = self.queries.expand(len(tokens), -1, -1)
        words = self.words(question_ids) if hasattr(self, "words") else question_ids
        count = queries.shape[1]
        seen = torch.cat([question_attention.new_ones(len(tokens), count), question_attention], dim=1)
        return self.network(
            input_ids=words, attention_mask=seen, query_embeds=queries, encoder_hidden_states=tokens
        ).last_hidden_state[:, :count]


class _Words(nn.Module):
    """Word embeddings of the base model, frozen and not stored with the model, then a map to the Q-Former's width."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        from safetensors.torch import load_file

        weights = load_file(find_base_model(config.start) / "model.safetensors")
        table = next(value for key, value in weights.items() if key.endswith("word_embeddings.weight"))
        self.base = nn.Embedding.from_pretrained(table.float(), freeze=True)
        self.project = nn.Linear(table.shape[1], config.width)
        if table.shape[1] == config.width:
            nn.init.eye_(self.project.weight)
            nn.init.zeros_(self.project.bias)

    def forward(self, ids: Tensor) -> Tensor:
        return self.project(self.base(ids))


def start_qformer(qformer: QFormer, config: QFormerConfig) -> None:
    """Fill a fresh Q-Former with the layers of the base model `config.start`.

    Self-attention and both feed-forward parts start from the same BERT layers, cross-attention stays random, as
    BLIP-2 (Li et al., arXiv 2301.12597) starts from BERT.
    """
    from safetensors.torch import load_file

    weights = load_file(find_base_model(config.start) / "model.safetensors")
    weights = {key.removeprefix("bert."): value for key, value in weights.items()}
    own = qformer.network.state_dict()
    taken = {}
    for key in own:
        source = key.replace("embeddings.layernorm", "embeddings.LayerNorm")
        source = source.replace("attention.attention.", "attention.self.").replace("_query.", ".")
        if source in weights and "crossattention" not in key and own[key].shape == weights[source].shape:
            taken[key] = weights[source].float()
    missing = [key for key in own if key not in taken and "crossattention" not in key]
    if missing:
        raise ValueError(f"{config.start} does not fit the Q-Former's shapes: nothing for {', '.join(missing[:3])}")
    qformer.network.load_state_dict(taken, strict=False)


@dataclass(frozen=True)
class Generated:
    """An answer in tokens.

    Attributes:
        ids: without the end token.
        confidence: mean probability of its tokens, the end token among them, 0..1.
        complete: False where `stop` or `answer_tokens` ended it.
    """

    ids: list[int]
    confidence: float
    complete: bool


class SurgLLM(nn.Module):
    """The whole model.

    Args:
        config: its shapes.
        dtype: of the frozen language model.

    Raises:
        BaseModelMissing: files of a base model are not on this machine.
    """

    def __init__(self, config: SurgLLMConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        self.encoder = VideoEncoder(config.encoder)
        self.encoder.requires_grad_(False)
        self.qformer = QFormer(config.qformer, config.encoder.width)
        self.language_model = LanguageModel(config, dtype)
        self.project = nn.Linear(config.qformer.width, self.language_model.width)
        nn.init.normal_(self.project.weight, std=0.02)
        nn.init.zeros_(self.project.bias)

    def stored_weights(self) -> dict[str, Tensor]:
        """Everything but the base models and the adapters."""
        return {k: v for k, v in self.state_dict().items() if not k.startswith(_NOT_STORED)}

    def load_stored_weights(self, weights: dict[str, Tensor]) -> None:
        """Set what `stored_weights` gave.

        Raises:
            ValueError: other names or shapes, which are told.
        """
        own = self.stored_weights()
        wrong = sorted(own.keys() ^ weights.keys()) + [
            key for key in own.keys() & weights.keys() if own[key].shape != weights[key].shape
        ]
        if wrong:
            raise ValueError(f"{len(wrong)} weights do not fit this SurgLLM, first {wrong[0]}")
        self.load_state_dict({key: value.to(own[key].dtype) for key, value in weights.items()}, strict=False)

    def embeddings(self, segments: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Embeddings of the interleaved prompt [B, T, language model's width].

        Args:
            segments: encoder tokens [S, N, width] of all segments of the batch, in the prompts' order.
            batch: of `Prompter.batch`.
        """
        visual = self.visual(segments, batch).flatten(0, 1)
        words = self.language_model.embed(batch["ids"])
        place = batch["visual"]
        seen = visual[place.clamp(min=0)].to(words.dtype)
        return torch.where((place >= 0)[..., None], seen, words)

    def visual(self, segments: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Visual tokens [S, queries, language model's width], as long as the language model's words are on average.

        Args:
            segments: encoder tokens [S, N, width].
            batch: `question_ids` and `question_attention` of `Prompter.batch`.
        """
        queried = self.qformer(segments.float(), batch["question_ids"], batch["question_attention"])
        return F.normalize(self.project(queried).float(), dim=-1) * self.language_model.word_length

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Loss of the answers: mean over answers of the mean cross-entropy of their tokens and end tokens.

        Args:
            batch: of `Prompter.batch`, with `segments` [S, N, width].
        """
        hidden = self.language_model.hidden(self.embeddings(batch["segments"], batch), batch["attention"])
        labels = batch["labels"][:, 1:]
        asked = labels != IGNORED
        logits = self.language_model.logits(hidden[:, :-1][asked])
        loss = F.cross_entropy(logits, labels[asked], reduction="none")
        weight = (1.0 / asked.sum(dim=1, keepdim=True)).expand_as(asked)[asked]
        return (loss * weight).sum() / len(labels)

    @torch.inference_mode()
    def generate(
        self,
        segments: Tensor,
        batch: dict[str, Tensor],
        *,
        on_token: Callable[[list[int]], None] | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> list[Generated]:
        """Answer by greedy decoding: the likeliest token, one after another.

        Args:
            segments: as for `embeddings`.
            batch: of `Prompter.batch` with `pad_left`.
            on_token: called with the first answer's tokens so far, after each.
            stop: asked before each token; True ends the answer there.

        Returns:
            One answer a question.
        """
        transformers = import_transformers()
        base = self.language_model.base
        if stop():
            return [Generated([], 0.0, False) for _ in batch["ids"]]
        embeddings = self.embeddings(segments, batch).to(base.dtype)
        ends = self._ends

        def watch(input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
            if on_token is not None:
                on_token(input_ids[0].tolist())
            return torch.full((len(input_ids),), stop(), dtype=torch.bool, device=input_ids.device)

        out = base.generate(
            inputs_embeds=embeddings,
            attention_mask=batch["attention"],
            max_new_tokens=self.config.answer_tokens,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            pad_token_id=ends[0],
            eos_token_id=ends,
            stopping_criteria=transformers.StoppingCriteriaList([watch]),
            return_dict_in_generate=True,
            output_logits=True,
        )
        steps = zip(out.logits, out.sequences.T, strict=True)
        chosen = [logits.float().softmax(-1).gather(-1, ids[:, None]) for logits, ids in steps]
        answers = []
        for row, probability in zip(out.sequences.tolist(), torch.cat(chosen, dim=1), strict=True):
            length = next((i for i, token in enumerate(row) if token in ends), len(row))
            ended = length < len(row)
            answers.append(Generated(row[:length], float(probability[: length + ended].mean()), complete=ended))
        return answers

    @property
    def _ends(self) -> list[int]:
        """Tokens that end an answer; some language models have several."""
        end = self.language_model.base.generation_config.eos_token_id
        return list(end) if isinstance(end, Sequence) else [end]
