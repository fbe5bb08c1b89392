# SPDX-License-Identifier: Apache-2.0
"""GSViT's public methods: shapes, colour order, resizing, errors, and that nothing is modified or remembered."""

from __future__ import annotations

import copy

import cv2
import gsvit_reference as reference
import numpy as np
import pytest
import torch

from surg_perception.gsvit import FrameGraph, GSViT, GSViTConfig
from surg_perception.gsvit.checkpoint import build_gsvit, released_name
from surg_perception.gsvit.network import PhaseHead

LATENT_CHANNELS = {"m0": 192, "m1": 192, "m2": 224, "m3": 320, "m4": 384, "m5": 384}


@pytest.fixture(scope="module")
def model() -> GSViT:
    """M0 with a head and weights under which every layer matters (a fresh timm network is nearly silent)."""
    original = reference.randomise(reference.ReferenceGSViT("m0", decoder=False))
    model = build_gsvit(original.state_dict(), size="m0", predict_change=False, source="test")
    torch.manual_seed(0)
    model.head = PhaseHead(192 * 16, (32,), 7).eval()
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def rgb() -> torch.Tensor:
    return torch.rand(2, 3, 240, 320, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("size", "channels"), LATENT_CHANNELS.items())
def test_latent_and_probability_shapes_of_every_size(size: str, channels: int) -> None:
    model = GSViT(GSViTConfig(size, decoder=False, classes=7, head_hidden=(16, 8))).eval()
    with torch.inference_mode():
        latent, probabilities = (
            model.encode(torch.rand(3, 3, 50, 70)),
            model.phase_probabilities(torch.rand(1, 3, 9, 9)),
        )
    assert latent.shape == (3, *model.latent_shape) == (3, channels, 4, 4)
    assert latent.dtype == torch.float32
    assert probabilities.shape == (1, 7)
    torch.testing.assert_close(probabilities.sum(), torch.tensor(1.0))


def test_the_papers_network_has_the_papers_size() -> None:
    """12.4 M with its classification layer, of which 12.1 M are kept; the head 13.7 M (13.6 counted)."""
    model = GSViT(GSViTConfig(decoder=False, classes=7))
    counts = [sum(p.numel() for p in part.parameters()) for part in (model.encoder, model.head)]
    assert counts == [12_088_004, 13_642_759]


def test_the_network_sees_bgr(model: GSViT) -> None:
    """The encoder gets the blue channel first; without the flip a red image would look like a blue one."""
    red = torch.zeros(1, 3, 224, 224)
    red[:, 0] = 1.0
    blue_first = torch.zeros(1, 3, 224, 224)
    blue_first[:, 2] = 1.0
    torch.testing.assert_close(model.encode(red), model.encoder.forward_features(blue_first))
    assert (model.encode(red) - model.encoder.forward_features(red)).abs().max() > 1e-3


class _FixedDecoder(torch.nn.Module):
    def __init__(self, bgr: tuple[float, float, float]) -> None:
        super().__init__()
        self.bgr = bgr

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        return torch.tensor(self.bgr).reshape(1, 3, 1, 1).expand(len(latent), 3, 224, 224)


@pytest.mark.parametrize(
    ("predict_change", "expected_rgb"), [(False, (0.3, 0.2, 0.1)), (True, (0.3 + 0.9, 0.2 + 0.5, 0.1 + 0.4))]
)
def test_predictions_come_back_as_rgb_in_range(model: GSViT, predict_change: bool, expected_rgb) -> None:
    with_decoder = copy.deepcopy(model)
    with_decoder.decoder = _FixedDecoder((0.1, 0.2, 0.3))
    with_decoder.config = GSViTConfig("m0", predict_change=predict_change, classes=7, head_hidden=(32,))
    rgb = torch.tensor((0.9, 0.5, 0.4)).reshape(1, 3, 1, 1).expand(2, 3, 60, 80)
    expected = torch.tensor(expected_rgb).clamp(0, 1).reshape(1, 3, 1, 1).expand(2, 3, 224, 224)
    torch.testing.assert_close(with_decoder.predict_next(rgb), expected)


def test_methods_without_their_part_say_so(model: GSViT, rgb: torch.Tensor) -> None:
    with pytest.raises(RuntimeError, match="no frame decoder"):
        model.predict_next(rgb)
    headless = GSViT(GSViTConfig("m0", decoder=False)).eval()
    with pytest.raises(RuntimeError, match="no phase head"):
        headless.phase_probabilities(rgb)


@pytest.mark.parametrize("size", [(240, 320), (224, 224)])
def test_input_is_not_modified(model: GSViT, size: tuple[int, int]) -> None:
    rgb = torch.rand(2, 3, *size)
    before = rgb.clone()
    model.encode(rgb)
    model.phase_probabilities(rgb)
    assert torch.equal(rgb, before)


@pytest.mark.parametrize(("height", "width"), [(480, 854), (1080, 1920), (120, 160), (225, 224)])
def test_resizing_is_opencvs_bilinear(model: GSViT, height: int, width: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    expected = cv2.resize(image, (224, 224), interpolation=cv2.INTER_LINEAR)
    rgb = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    seen: list[torch.Tensor] = []
    hook = model.encoder.patch_embed.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.encode(rgb)
    hook.remove()
    difference = (seen[0].flip(1)[0].permute(1, 2, 0) * 255 - torch.from_numpy(expected).float()).abs().max()
    assert difference <= 1.0


def test_the_exported_graphs_view_equals_the_public_one(model: GSViT) -> None:
    bgr = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)
    rgb = torch.from_numpy(bgr[..., ::-1].copy()).permute(0, 3, 1, 2).float() / 255
    probabilities, latent = FrameGraph(model)(torch.from_numpy(bgr))
    torch.testing.assert_close(latent, model.encode(rgb))
    torch.testing.assert_close(probabilities, model.phase_probabilities(rgb))


def test_temperature_softens_probabilities_and_not_logits(model: GSViT, rgb: torch.Tensor) -> None:
    hot = copy.deepcopy(model)
    hot.head.temperature.fill_(5.0)
    torch.testing.assert_close(hot.phase_logits(rgb), model.phase_logits(rgb))
    torch.testing.assert_close(hot.phase_probabilities(rgb), torch.softmax(model.phase_logits(rgb) / 5.0, 1))


@pytest.mark.parametrize(
    ("bad", "error", "words"),
    [
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), TypeError, "divide uint8 by 255"),
        (np.zeros((1, 3, 8, 8), np.float32), TypeError, "ndarray"),
        (torch.zeros(3, 8, 8), ValueError, r"\[3, 8, 8\]"),
        (torch.zeros(1, 8, 8, 3), ValueError, r"\[1, 8, 8, 3\]"),
        (torch.zeros(0, 3, 8, 8), ValueError, r"\[0, 3, 8, 8\]"),
        (torch.full((1, 3, 8, 8), 200.0), ValueError, "0..1, found 200 to 200"),
        (torch.full((1, 3, 8, 8), -1.0), ValueError, "found -1 to -1"),
        (torch.full((1, 3, 8, 8), float("nan")), ValueError, "nan"),
    ],
)
def test_wrong_images_are_refused_with_what_was_found(model: GSViT, bad, error, words: str) -> None:
    with pytest.raises(error, match=words):
        model.encode(bad)


def test_changed_attention_biases_count_at_once(rgb: torch.Tensor) -> None:
    """timm keeps them in evaluation mode; GSViT must not answer with kept ones, nor lose their gradient."""
    model = GSViT(GSViTConfig("m0", decoder=False)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bn.weight"):
            torch.nn.init.ones_(parameter)
    with torch.no_grad():
        before = model.encode(rgb)
    model.encode(rgb).sum().backward()
    biases = model.encoder.stages[0].blocks[0].mixer.m.attn.attention_biases
    assert biases.grad is not None
    copy.deepcopy(model)
    with torch.no_grad():
        biases.normal_(0, 3)
        assert not torch.allclose(model.encode(rgb), before)


def test_an_impossible_network_is_refused() -> None:
    with pytest.raises(ValueError, match="'m7'; expected one of m0"):
        GSViTConfig("m7")
    with pytest.raises(ValueError, match="hidden widths"):
        GSViTConfig("m0", classes=7, head_hidden=(0,))


@pytest.mark.parametrize(("width", "rank"), [(16, 4), (32, 0)])
def test_a_light_decoder_keeps_the_shape_and_comes_back_from_its_tensors(width: int, rank: int) -> None:
    torch.manual_seed(0)
    model = GSViT(GSViTConfig("m0", decoder_width=width, decoder_rank=rank)).eval()
    tensors = {released_name(name): value for name, value in model.state_dict().items()}
    again = build_gsvit(tensors, size="m0", predict_change=False, source="here")
    assert (again.config.decoder_width, again.config.decoder_rank) == (width, rank)
    picture = torch.rand(1, 3, 40, 50)
    assert model.predict_next(picture).shape == (1, 3, 224, 224)
    assert torch.equal(model.predict_next(picture), again.predict_next(picture))


def test_a_decoder_that_cannot_be_built_is_refused() -> None:
    for width, rank in ((8, 0), (40, 0), (32, -1)):
        with pytest.raises(ValueError, match=f"width {width} and rank {rank}"):
            GSViTConfig(decoder_width=width, decoder_rank=rank)
