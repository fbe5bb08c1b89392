# SPDX-License-Identifier: Apache-2.0
"""GSViT (Schmidgall et al., arXiv 2403.05949): EfficientViT encoder, next-frame decoder, phase head.

Everything inside works on BGR images of 224 x 224 in 0..1, as the released weights do. `GSViT`'s public
methods take RGB of any size and give RGB back; `FrameGraph` is the form that is exported and deployed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surg_perception.torch_extras import import_timm

IMAGE_SIZE = 224
LATENT_GRID = 4
SIZES = ("m0", "m1", "m2", "m3", "m4", "m5")
_RANGE_TOLERANCE = 1e-3


@dataclass(frozen=True)
class GSViTConfig:
    """What a GSViT consists of. The defaults are the released network.

    Attributes:
        size: EfficientViT variant, "m0" to "m5"; GSViT is "m5".
        decoder: whether the next-frame decoder is part of the network (328 M parameters for "m5").
        predict_change: the decoder predicts the change to the next frame (tanh), not the frame (sigmoid).
        decoder_width: channels of the decoder's widest layer, a multiple of 16; the others follow. 1024 is the
            release, 328 M parameters for "m5"; 64 or 128 can be trained without a GPU.
        decoder_rank: width of a bottleneck in the decoder's first layer, which holds nearly all its parameters;
            0 for the release's one full matrix.
        classes: number of surgical phases; 0 for a network without a phase head.
        head_hidden: widths of the phase head's hidden layers; the paper has 2048 and 512.
    """

    size: str = "m5"
    decoder: bool = True
    predict_change: bool = False
    decoder_width: int = 1024
    decoder_rank: int = 0
    classes: int = 0
    head_hidden: tuple[int, ...] = (2048, 512)

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise ValueError(f"unknown EfficientViT size {self.size!r}; expected one of {', '.join(SIZES)}")
        if self.decoder_width < 16 or self.decoder_width % 16 or self.decoder_rank < 0:
            raise ValueError(
                f"a decoder of width {self.decoder_width} and rank {self.decoder_rank} cannot be built; expected "
                "a width that is a multiple of 16, and a rank of 0 (none) or more"
            )
        if self.classes < 0 or any(width < 1 for width in self.head_hidden):
            raise ValueError(
                f"a phase head of {self.classes} classes with hidden widths {self.head_hidden} cannot be "
                "built; expected 0 or more classes and positive widths"
            )


class SqueezeExcitation(nn.Module):
    """Channel attention without biases: global mean, C -> C/16, ReLU, -> C, sigmoid, times the input."""

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        squeezed = max(1, channels // reduction)
        self.fc = nn.Sequential(
            nn.Linear(channels, squeezed, bias=False),
            nn.ReLU(),
            nn.Linear(squeezed, channels, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc(x.mean(dim=(2, 3)))[:, :, None, None]


def _residual_branch(channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.BatchNorm2d(channels),
        nn.Sigmoid(),
        SqueezeExcitation(channels),
        nn.ReLU(),
    )


class FrameDecoder(nn.Module):
    """The decoder of next-frame pre-training; attribute names are those of the released checkpoint.

    Args:
        latent_channels: channels D of the latent [B, D, 4, 4].
        predict_change: end with tanh (change, -1..1) instead of sigmoid (frame, 0..1).
        width, rank: `GSViTConfig.decoder_width` and `decoder_rank`.
    """

    def __init__(self, latent_channels: int, predict_change: bool = False, width: int = 1024, rank: int = 0) -> None:
        super().__init__()
        self.predict_change = predict_change
        self.width = width
        features, half, quarter, last = latent_channels * LATENT_GRID**2, width // 2, width // 4, width // 16
        self.fc: nn.Module = nn.Linear(features, 7 * 7 * width)
        if rank:
            self.fc = nn.Sequential(nn.Linear(features, rank), nn.Linear(rank, 7 * 7 * width))
        self.bn1d = nn.BatchNorm1d(7 * 7 * width)
        self.conv1 = nn.ConvTranspose2d(width, half, 4, stride=2, padding=1)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = nn.ConvTranspose2d(half, half, 4, stride=2, padding=1)
        self.bn2 = nn.BatchNorm2d(half)
        self.res1 = _residual_branch(half)
        self.conv3 = nn.ConvTranspose2d(half, quarter, 4, stride=2, padding=1)
        self.bn3 = nn.BatchNorm2d(quarter)
        self.conv4 = nn.ConvTranspose2d(quarter, last, 4, stride=2, padding=1)
        self.bn4 = nn.BatchNorm2d(last)
        self.res2 = _residual_branch(last)
        self.conv5 = nn.ConvTranspose2d(last, 3, 4, stride=2, padding=1)

    def forward(self, latent: Tensor) -> Tensor:
        """Latent [B, D, 4, 4] to a BGR frame in 0..1, or a change in -1..1, [B, 3, 224, 224]."""
        x = F.gelu(self.bn1d(self.fc(latent.flatten(1)))).unflatten(1, (self.width, 7, 7))
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = x + self.res1(x)
        x = F.relu(self.bn3(self.conv3(x)))
        x = F.relu(self.bn4(self.conv4(x)))
        x = x + self.res2(x)
        x = self.conv5(x)
        return torch.tanh(x) if self.predict_change else torch.sigmoid(x)


def frame_decoder(config: GSViTConfig, latent_channels: int) -> FrameDecoder:
    """The decoder that `config` describes, with random weights."""
    return FrameDecoder(latent_channels, config.predict_change, config.decoder_width, config.decoder_rank)


class PhaseHead(nn.Module):
    """MLP on the flattened latent with calibrated probabilities.

    The paper names linear layers, ELU, layer norm and dropout 0.1 but not their order; here each hidden layer
    is linear, layer norm, ELU, dropout, so that the activation sees normalised values.

    Args:
        features: length of the flattened latent (6144 for "m5").
        hidden: widths of the hidden layers.
        classes: number of phases.

    The buffer `temperature` (> 0) divides the logits before the softmax (Guo et al., arXiv 1706.04599).
    """

    temperature: Tensor

    def __init__(self, features: int, hidden: tuple[int, ...], classes: int, dropout: float = 0.1) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in hidden:
            layers += [nn.Linear(features, width), nn.LayerNorm(width), nn.ELU(), nn.Dropout(dropout)]
            features = width
        self.mlp = nn.Sequential(*layers, nn.Linear(features, classes))
        self.register_buffer("temperature", torch.ones(()))

    def forward(self, latent: Tensor) -> Tensor:
        """Latent [B, D, 4, 4] to uncalibrated logits [B, classes]."""
        return self.mlp(latent.flatten(1))

    def probabilities(self, latent: Tensor) -> Tensor:
        """Latent [B, D, 4, 4] to calibrated probabilities [B, classes], each row summing to 1."""
        return torch.softmax(self(latent) / self.temperature, dim=1)


def forget_attention_biases(encoder: nn.Module) -> None:
    """Empty the cache in which timm keeps attention biases in evaluation mode.

    A kept one is stale once the weights change, gives the biases no gradient if it was made without, and
    cannot be copied if it was made with.
    """
    for module in encoder.modules():
        cache = getattr(module, "attention_bias_cache", None)
        if isinstance(cache, dict):
            cache.clear()


class GSViT(nn.Module):
    """Encoder with, by configuration, next-frame decoder and phase head.

    A fresh network is in training mode with random weights; `surg_perception.gsvit.load_gsvit` returns one
    with weights in evaluation mode. No method modifies its input.
    """

    def __init__(self, config: GSViTConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or GSViTConfig()
        self.encoder = import_timm().create_model(f"efficientvit_{config.size}", num_classes=0)
        self.latent_shape = (int(self.encoder.num_features), LATENT_GRID, LATENT_GRID)
        self.decoder = frame_decoder(config, self.latent_shape[0]) if config.decoder else None
        self.head: PhaseHead | None = None
        if config.classes:
            self.add_phase_head(config.classes, config.head_hidden)

    def add_phase_head(self, classes: int, hidden: tuple[int, ...]) -> None:
        """Put a phase head with random weights on the encoder, in the place of one that may be there."""
        self.config = replace(self.config, classes=classes, head_hidden=hidden)
        self.head = PhaseHead(self.latent_shape[0] * LATENT_GRID**2, hidden, classes)

    def drop_decoder(self) -> None:
        """Give up the frame decoder and its memory; `predict_next` is an error from then on."""
        self.decoder = None
        self.config = replace(self.config, decoder=False)

    def features(self, bgr: Tensor) -> Tensor:
        """BGR [B, 3, 224, 224] in 0..1 to the latent [B, D, 4, 4]; unchecked, for training."""
        forget_attention_biases(self.encoder)
        latent = self.encoder.forward_features(bgr)
        forget_attention_biases(self.encoder)
        return latent

    def encode(self, rgb: Tensor) -> Tensor:
        """Latent features of RGB images.

        Args:
            rgb: floating point [B, 3, H, W] in 0..1, any H and W; resized to 224 x 224 bilinearly, without
                antialiasing and without keeping the aspect, as in GSViT's pre-training.

        Returns:
            float32 [B, D, 4, 4]; D is 384 for "m5".

        Raises:
            TypeError: not a floating point tensor.
            ValueError: wrong shape, NaN, or values outside 0..1.
        """
        return self.features(self._bgr_224(rgb))

    def predict_next(self, rgb: Tensor) -> Tensor:
        """The frame expected next, RGB [B, 3, 224, 224] in 0..1; `rgb` as in `encode`.

        Raises:
            RuntimeError: the model has no decoder.
            TypeError, ValueError: as `encode`.
        """
        if self.decoder is None:
            raise RuntimeError(
                "this GSViT has no frame decoder, so it cannot predict the next frame: its file holds no "
                "'decoder.*' tensors. Load a checkpoint that has them (a released GSViT.pkl with its decoder)"
            )
        bgr = self._bgr_224(rgb)
        prediction = self.decoder(self.features(bgr))
        if self.config.predict_change:
            prediction = (bgr + prediction).clamp(0.0, 1.0)
        return prediction.flip(1)

    def phase_logits(self, rgb: Tensor) -> Tensor:
        """Uncalibrated phase logits [B, classes]; `rgb` as in `encode`.

        Raises:
            RuntimeError: the model has no phase head.
            TypeError, ValueError: as `encode`.
        """
        return self._phase_head()(self.encode(rgb))

    def phase_probabilities(self, rgb: Tensor) -> Tensor:
        """Calibrated phase probabilities [B, classes]; arguments and errors as `phase_logits`."""
        return self._phase_head().probabilities(self.encode(rgb))

    def _phase_head(self) -> PhaseHead:
        if self.head is None:
            raise RuntimeError(
                "this GSViT has no phase head (a released GSViT.pkl has none), so it gives latents only. "
                "Train a head, or load a model folder that has one"
            )
        return self.head

    def _bgr_224(self, rgb: Tensor) -> Tensor:
        if not isinstance(rgb, Tensor) or not rgb.is_floating_point():
            found = rgb.dtype if isinstance(rgb, Tensor) else type(rgb).__name__
            raise TypeError(f"expected a floating point tensor of RGB in 0..1, found {found}; divide uint8 by 255")
        if rgb.ndim != 4 or rgb.shape[1] != 3 or 0 in rgb.shape:
            raise ValueError(f"expected RGB images [B, 3, H, W], found shape {list(rgb.shape)}")
        rgb = rgb.to(next(self.encoder.parameters()).dtype)
        if rgb.shape[2:] != (IMAGE_SIZE, IMAGE_SIZE):
            rgb = F.interpolate(rgb, (IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", align_corners=False)
        low, high = (float(bound) for bound in torch.aminmax(rgb.detach()))
        if not (low >= -_RANGE_TOLERANCE and high <= 1.0 + _RANGE_TOLERANCE):
            raise ValueError(
                f"expected RGB values in 0..1, found {low:.4g} to {high:.4g}; "
                "divide 8-bit values by 255 and apply no mean or standard deviation"
            )
        return rgb.flip(1)


class FrameGraph(nn.Module):
    """Encoder and head in one pass on camera frames: what is exported and what a backend runs.

    Input `frame`: uint8 [N, 224, 224, 3], BGR. Outputs: `probabilities` float32 [N, classes] where the model
    has a phase head, and `latent` float32 [N, D, 4, 4]. The decoder is left out. Weights are shared with the
    model and must not change between calls.
    """

    def __init__(self, model: GSViT) -> None:
        super().__init__()
        self.encoder = model.encoder
        self.head = model.head
        self.training = model.training
        forget_attention_biases(self.encoder)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the outputs, in the order of `forward`'s tuple."""
        return ("latent",) if self.head is None else ("probabilities", "latent")

    def forward(self, frame: Tensor) -> tuple[Tensor, ...]:
        latent = self.encoder.forward_features(frame.permute(0, 3, 1, 2).to(torch.float32) / 255.0)
        return (latent,) if self.head is None else (self.head.probabilities(latent), latent)
