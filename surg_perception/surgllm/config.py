# SPDX-License-Identifier: Apache-2.0
"""Shapes of SurgLLM: `tiny` for tests, `small` for two CPU cores, `paper` for those of the publication."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

STEMS = ("patch", "efficientnet_lite0")
POSITIONS = ("flat", "separable")

JOINT = "joint"
"""Name of the adapter that is tuned on all tasks together."""


def _check_shapes(config: Any, width: int = 1, heads: int = 1) -> None:
    """Refuse values of another type than the defaults', numbers that are not positive, and heads of unequal width."""
    for field in dataclasses.fields(config):
        value, default = getattr(config, field.name), field.default
        sound = isinstance(value, type(default)) and (isinstance(default, bool) or not isinstance(value, bool))
        if sound and isinstance(default, int | float) and not isinstance(default, bool):
            sound = value > 0
        if not sound:
            raise ValueError(f"{field.name} {value!r} found, expected something like {default!r}")
    if width % heads:
        raise ValueError(f"width {width} and {heads} heads found, expected a width that the heads can share")


@dataclass(frozen=True)
class EncoderConfig:
    """A VideoMAE encoder (Tong et al., arXiv 2203.12602).

    Attributes:
        image_size: side of the square input in pixels, a multiple of `patch_size`.
        patch_size: side of a patch in pixels.
        tubelet: frames that share a token.
        width, layers, heads, mlp: of the transformer; `mlp` is the hidden width of its feed-forward part.
        stem: how pixels become tokens: "patch", VideoMAE's own linear projection, or "efficientnet_lite0",
            EfficientNet-Lite0 with ImageNet weights down to stride 16 and a linear projection on top. A few thousand
            frames do not teach a network to see; the convolutional stem brings edges and textures along.
        positions: fixed sinusoids of the token's number ("flat", as VideoMAE) or of time, row and column, a third
            of the channels each ("separable", learned from fewer videos).
        norm_eps: of layer norms.
    """

    image_size: int = 224
    patch_size: int = 14
    tubelet: int = 2
    width: int = 1408
    layers: int = 40
    heads: int = 16
    mlp: int = 6144
    stem: str = "patch"
    positions: str = "flat"
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        _check_shapes(self, self.width, self.heads)
        if self.image_size % self.patch_size:
            raise ValueError(f"image size {self.image_size} is no multiple of patch size {self.patch_size}")
        if self.stem not in STEMS or self.positions not in POSITIONS:
            raise ValueError(
                f"stem {self.stem!r} and positions {self.positions!r} found; expected one of {STEMS} and {POSITIONS}"
            )
        if self.stem == "efficientnet_lite0" and self.patch_size != 16:
            raise ValueError(f"patch size {self.patch_size} found; the stem efficientnet_lite0 has stride 16")

    @property
    def grid(self) -> int:
        """Patches along a side."""
        return self.image_size // self.patch_size

    def tokens(self, frames: int) -> int:
        """Tokens of a clip of so many frames, a multiple of `tubelet`."""
        if frames < self.tubelet or frames % self.tubelet:
            raise ValueError(f"{frames} frames found, expected a multiple of the tubelet's {self.tubelet}")
        return frames // self.tubelet * self.grid**2


@dataclass(frozen=True)
class QFormerConfig:
    """The instruction-aware Q-Former (Dai et al., InstructBLIP, arXiv 2305.06500).

    Attributes:
        width, layers, heads, mlp: of the transformer.
        queries: learned queries, so visual tokens of a segment.
        cross_attention_every: layers 0, n, 2n, … look at the video.
        start: base model that the text side starts from, whose word embeddings are used as they are and not stored
            ("all-minilm-l6-v2"); "" for random weights and word embeddings of its own.
        vocabulary: word pieces where `start` is "".
        question_tokens: most word pieces of a segment's time and the question; what is longer is cut.
    """

    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp: int = 3072
    queries: int = 32
    cross_attention_every: int = 2
    start: str = ""
    vocabulary: int = 30523
    question_tokens: int = 64

    def __post_init__(self) -> None:
        _check_shapes(self, self.width, self.heads)


@dataclass(frozen=True)
class SurgLLMConfig:
    """All of SurgLLM.

    Attributes:
        language_model: base model's name or a folder with any Hugging Face causal language model; "tiny" and
            "vicuna-7b" are shapes with random weights, for tests and for counting.
        segment_frames: frames (1 a second) that become `qformer.queries` visual tokens; F in the publication.
        label_first: time label before the visual tokens of a segment; the release had it behind.
        lora_rank, lora_alpha, lora_targets: of the adapters (Hu et al., LoRA, arXiv 2106.09685).
        answer_tokens: most tokens of an answer.
        max_segments: of a window.
    """

    encoder: EncoderConfig = EncoderConfig()
    qformer: QFormerConfig = QFormerConfig()
    language_model: str = "smollm2-135m-instruct"
    segment_frames: int = 4
    label_first: bool = True
    lora_rank: int = 8
    lora_alpha: int = 8
    lora_targets: tuple[str, ...] = ("q_proj", "v_proj")
    answer_tokens: int = 80
    max_segments: int = 4

    def __post_init__(self) -> None:
        _check_shapes(self)
        if self.segment_frames % self.encoder.tubelet:
            raise ValueError(
                f"segments of {self.segment_frames} frames found, expected a multiple of the tubelet's "
                f"{self.encoder.tubelet}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for YAML and JSON."""
        content = dataclasses.asdict(self)
        content["lora_targets"] = list(self.lora_targets)
        return content

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> SurgLLMConfig:
        """The configuration that `to_dict` wrote.

        Raises:
            ValueError: a field is unknown or has a value that cannot be used.
        """
        try:
            rest = {k: v for k, v in content.items() if k not in ("encoder", "qformer", "lora_targets")}
            return cls(
                encoder=EncoderConfig(**content["encoder"]),
                qformer=QFormerConfig(**content["qformer"]),
                lora_targets=tuple(content["lora_targets"]),
                **rest,
            )
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"not a SurgLLM configuration: {type(error).__name__}: {error}") from error


CONFIGS = {
    "tiny": SurgLLMConfig(
        encoder=EncoderConfig(image_size=32, patch_size=8, width=32, layers=2, heads=2, mlp=64, positions="separable"),
        qformer=QFormerConfig(width=32, layers=2, heads=2, mlp=64, queries=4, vocabulary=300),
        language_model="tiny",
        lora_rank=4,
        lora_alpha=4,
        answer_tokens=16,
    ),
    "small": SurgLLMConfig(
        encoder=EncoderConfig(
            image_size=192,
            patch_size=16,
            width=256,
            layers=4,
            heads=4,
            mlp=1024,
            stem="efficientnet_lite0",
            positions="separable",
        ),
        qformer=QFormerConfig(width=384, layers=3, heads=12, mlp=1536, queries=16, start="all-minilm-l6-v2"),
    ),
    "paper": SurgLLMConfig(language_model="vicuna-7b", answer_tokens=256, max_segments=16),
}
"""Shapes by name; `small` is what models/ ships."""
