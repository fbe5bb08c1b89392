# SPDX-License-Identifier: Apache-2.0
"""Masked reconstruction: what is to be restored, from what, with instruments hidden; and that it is learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from rich.console import Console

from surg_perception.data.clip_labels import ClipVideo, InstrumentState, SecondLabels
from surg_perception.data.frame_readers import NoFrames
from surg_perception.gsvit.trainer import read_lines
from surg_perception.surgllm.config import CONFIGS, EncoderConfig
from surg_perception.surgllm.encoder import VideoEncoder
from surg_perception.surgllm.masking import GROUP_LENGTHS, hidden_patches
from surg_perception.surgllm.reconstruction import (
    RECONSTRUCTION,
    MaskedReconstruction,
    ReconstructionOptions,
    ReconstructionTask,
    hidden_pixels,
    reconstruct_pretrain,
    reconstruction_picture,
)

CONFIG = CONFIGS["tiny"].encoder
SIZE, GRID, PATCH = CONFIG.image_size, CONFIG.grid, CONFIG.patch_size
OPTIONS = ReconstructionOptions(decoder_width=32, decoder_layers=1, decoder_heads=2, mask_ratio=0.5)
TOOL = 6  # pixels, the side of the tool in `video`


def video(
    name: str, seconds: int, seed: int = 0, boxes: bool = True, tool: bool = True
) -> tuple[ClipVideo, NDArray[np.uint8]]:
    """A white square tool on a darker ground, and its labels; uint8 [seconds, SIZE, SIZE, 3].

    The ground is blue and grows brighter to the right where the seed is even, red and downwards where it is odd.
    """
    rng = np.random.default_rng(seed)
    ramp = np.tile(np.linspace(0, 120, SIZE), (SIZE, 1))
    ground = np.stack([ramp.T if seed % 2 else ramp] * 3, axis=-1).astype(np.uint8)
    ground[..., 2 if seed % 2 else 0] += 120
    frames = np.repeat(ground[None], seconds, axis=0)
    labels = []
    for second in range(seconds):
        left, top = rng.integers(0, SIZE - TOOL, 2)
        if tool:
            frames[second, top : top + TOOL, left : left + TOOL] = 255
        box = (left / SIZE, top / SIZE, TOOL / SIZE, TOOL / SIZE)
        tools = (InstrumentState("hook", box=box), InstrumentState("clipper")) if tool and boxes else None
        labels.append(SecondLabels(None, tools))
    clip = ClipVideo(name, name, tuple(labels), ("hook", "clipper"), 1, NoFrames(name), tuple(range(seconds)))
    return clip, frames.astype(np.uint8)


def task_of(
    *lengths: int, held_back: Sequence[int] = (), options: ReconstructionOptions = OPTIONS, boxes: bool = True
) -> ReconstructionTask:
    torch.manual_seed(0)
    made = [video(f"v{k}", seconds, k, boxes) for k, seconds in enumerate([*lengths, *held_back])]
    clips, frames = [clip for clip, _ in made], {clip.name: images for clip, images in made}
    count = len(lengths)
    return ReconstructionTask(VideoEncoder(CONFIG), clips[:count], clips[count:], frames, options, epochs=6)


def random_masks(count: int, tokens: int, seed: int = 0) -> torch.Tensor:
    """bool [count, tokens], half of each row True."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(np.stack([rng.permutation(tokens) < tokens // 2 for _ in range(count)]))


def patch(images: NDArray[np.uint8], token: int) -> NDArray[np.uint8]:
    """View of a token's pixels [2, PATCH, PATCH, 3] in images [T, SIZE, SIZE, 3]."""
    tubelet, place = divmod(token, GRID * GRID)
    row, column = divmod(place, GRID)
    rows, columns = slice(row * PATCH, (row + 1) * PATCH), slice(column * PATCH, (column + 1) * PATCH)
    return images[2 * tubelet : 2 * tubelet + 2, rows, columns]


# ---- target and network ------------------------------------------------------------------------------------


def test_the_target_is_each_hidden_tokens_pixels_normalised_per_channel() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 4, SIZE, SIZE, 3), dtype=np.uint8)
    masked = random_masks(2, CONFIG.tokens(4))
    patch(images[1], int(masked[1].nonzero()[0]))[:] = (10, 20, 30)  # flat: no pattern to restore
    target, mean, deviation = hidden_pixels(torch.from_numpy(images), masked, 2)
    assert target.shape == (2, masked.shape[1] // 2, 2 * PATCH * PATCH, 3)
    for row in range(2):
        for k, token in enumerate(masked[row].nonzero()[:, 0].tolist()):
            pixels = patch(images[row], token).reshape(-1, 3) / 255.0
            expected = (pixels - pixels.mean(0)) / (pixels.std(0, ddof=1) + 1e-6)
            np.testing.assert_allclose(target[row, k], expected, atol=2e-3)
            np.testing.assert_allclose(target[row, k] * deviation[row, k] + mean[row, k], pixels, atol=1e-5)
    assert target[1, 0].abs().max() < 1e-2


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        EncoderConfig(64, 16, width=24, layers=1, heads=2, mlp=32, stem="efficientnet_lite0", positions="separable"),
    ],
    ids=["patch", "efficientnet_lite0"],
)
def test_the_network_never_sees_hidden_pixels(config: EncoderConfig) -> None:
    torch.manual_seed(0)
    module = MaskedReconstruction(VideoEncoder(config), OPTIONS).eval()
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (2, 4, config.image_size, config.image_size, 3), dtype=np.uint8)
    masked = random_masks(2, config.tokens(4), seed=2)
    cells = masked.reshape(2, 2, config.grid, config.grid, 1).numpy()
    hidden = cells.repeat(2, 1).repeat(config.patch_size, 2).repeat(config.patch_size, 3)
    other = rng.integers(0, 256, images.shape, dtype=np.uint8)
    with torch.no_grad():
        found, hidden_changed, visible_changed = (
            module(torch.from_numpy(frames), masked)
            for frames in (images, np.where(hidden, other, images), np.where(hidden, images, other))
        )
    assert found.shape == (2, masked.shape[1] // 2, 2 * config.patch_size**2, 3)
    torch.testing.assert_close(hidden_changed, found, rtol=0, atol=0)
    assert (visible_changed - found).abs().max() > 1e-3


def test_a_prediction_knows_its_place() -> None:
    """Two hidden tokens differ only by where they are, and a visible token counts where it is."""
    torch.manual_seed(0)
    module = MaskedReconstruction(VideoEncoder(CONFIG), OPTIONS).eval()
    images = torch.full((1, 2, SIZE, SIZE, 3), 90, dtype=torch.uint8)
    masked = torch.ones(1, CONFIG.tokens(2), dtype=torch.bool)
    masked[0, 5] = False
    with torch.no_grad():
        here = module(images, masked)
        assert (here[0, 0] - here[0, 9]).abs().max() > 1e-3
        there = module(images, masked.roll(7, 1))
    hidden = masked & masked.roll(7, 1)
    same_tokens = [part[0, hidden[place]] for part, place in ((here, masked), (there, masked.roll(7, 1)))]
    assert (same_tokens[0] - same_tokens[1]).abs().max() > 1e-3


def test_the_loss_is_the_squared_error_on_hidden_tokens() -> None:
    task = task_of(8)
    batch = task.batch(np.arange(1), np.random.default_rng(0))
    target, _, _ = hidden_pixels(batch["frames"], batch["masked"], 2)

    class Off(torch.nn.Module):
        def forward(self, frames: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
            return target + 0.5

    assert float(task.loss(Off(), batch)[0]) == pytest.approx(0.25, rel=1e-5)
    loss, _ = task.loss(task.module, batch)
    loss.backward()
    for name, parameter in task.module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0 or "key" in name, name


# ---- clips and masks ---------------------------------------------------------------------------------------


def test_the_tool_is_hidden_in_every_clip_wherever_the_crop_shows_it() -> None:
    task = task_of(24, 9)
    indices = np.tile(np.arange(task.samples), 8)
    batch = task.batch(indices, np.random.default_rng(0))
    masks = batch["masked"].numpy().reshape(len(indices), 4, GRID, GRID)
    assert (masks.sum((2, 3)) == hidden_patches(GRID, 0.5)).all()
    bright = batch["frames"].numpy().min(-1).reshape(len(indices), 4, 2, GRID, PATCH, GRID, PATCH) > 200
    tool = bright.any(axis=(4, 6))
    assert tool.any(axis=(3, 4)).mean() > 0.5
    assert (masks >= tool[:, :, 0]).all()  # groups of two: the first frame of each tubelet
    assert not (masks >= tool[:, :, 1]).all()
    # Crops zoom: the tool is larger than in the whole frame.
    assert bright.sum() / tool.any(axis=(3, 4)).sum() > 1.2 * TOOL**2 * 0.8
    assert not np.array_equal(masks[0], masks[task.samples])


def test_later_in_the_training_longer_groups_share_their_first_frames_tool() -> None:
    task = task_of(40)
    indices = np.tile(np.arange(task.samples), 6) + GROUP_LENGTHS.index(8) * task.samples
    batch = task.batch(indices, np.random.default_rng(0))
    masks = batch["masked"].numpy().reshape(len(indices), 4, GRID, GRID)
    bright = batch["frames"].numpy().min(-1).reshape(len(indices), 4, 2, GRID, PATCH, GRID, PATCH) > 200
    tool = bright.any(axis=(4, 6))[:, :, 0]
    assert (masks >= tool[:, :1]).all()
    assert not (masks[:, 1:] >= tool[:, 1:]).all()


def test_without_boxes_the_mask_is_a_tube() -> None:
    task = task_of(16, boxes=False)
    masks = task.batch(np.arange(task.samples), np.random.default_rng(0))["masked"].reshape(task.samples, 4, -1)
    assert (masks == masks[:, :1]).all()


def test_a_batch_shows_consecutive_seconds_and_is_decided_by_the_generator() -> None:
    clip, frames = video("v", 30)
    frames[:] = np.arange(30)[:, None, None, None]  # each second its own colour
    task = ReconstructionTask(VideoEncoder(CONFIG), [clip], [], {"v": frames}, OPTIONS, 1)
    assert task.samples == 4
    batch = task.batch(np.arange(4), np.random.default_rng(3))
    again = task.batch(np.arange(4), np.random.default_rng(3))
    assert torch.equal(batch["frames"], again["frames"])
    assert torch.equal(batch["masked"], again["masked"])
    starts = set()
    for seed in range(40):
        found = task.batch(np.arange(4), np.random.default_rng(seed))["frames"].numpy()
        assert found.shape == (4, 8, SIZE, SIZE, 3)
        seconds = found[:, :, 0, 0, 0].astype(int)
        assert (np.diff(seconds, axis=1) == 1).all()
        starts |= set(seconds[:, 0].tolist())
    assert starts == set(range(23))


def test_an_epoch_has_each_clip_once_and_groups_grow_over_the_epochs() -> None:
    task = task_of(24, 9)
    assert task.samples == 3 + 2
    places = []
    for epoch in range(6):
        order = task.order(epoch, np.random.default_rng(epoch))
        assert sorted(order % task.samples) == list(range(task.samples))
        places += [GROUP_LENGTHS[place] for place in order // task.samples]
    assert places == sorted(places)
    assert [places.count(length) for length in GROUP_LENGTHS] == [10, 10, 10, 0]


def test_short_videos_are_left_out_and_said_so(caplog: pytest.LogCaptureFixture) -> None:
    task = task_of(7, 8)
    assert [opened.name for opened in task.training] == ["v1"]
    assert "shorter than a clip of 8 s: v0" in caplog.text
    with pytest.raises(ValueError, match="none of 2 training videos has 8 seconds"):
        task_of(7, 3)


def test_what_does_not_fit_is_refused() -> None:
    clip, frames = video("v", 9)
    encoder = VideoEncoder(CONFIG)
    with pytest.raises(ValueError, match="v: 8 frames for 9 seconds of labels"):
        ReconstructionTask(encoder, [clip], [], {"v": frames[:8]}, OPTIONS, 1)
    with pytest.raises(ValueError, match="multiple of the tubelet's 2"):
        ReconstructionTask(encoder, [clip], [], {"v": frames}, replace(OPTIONS, clip_frames=5), 1)
    for wrong in ({"mask_ratio": 1.0}, {"crop_area": (0.0, 1.0)}, {"crop_area": (0.9, 0.5)}):
        with pytest.raises(ValueError, match=r"mask ratio .* found"):
            replace(OPTIONS, **wrong)


# ---- picture and training ----------------------------------------------------------------------------------


def test_the_picture_shows_input_visible_part_and_reconstruction(tmp_path: Path) -> None:
    class Oracle(MaskedReconstruction):
        def forward(self, frames: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
            target = hidden_pixels(frames, masked, 2)[0]
            target[0] = 0.0  # the first clip's patterns are missed, the second's found
            return target

    images = np.random.default_rng(4).integers(0, 256, (2, 4, SIZE, SIZE, 3), dtype=np.uint8)
    masked = random_masks(2, CONFIG.tokens(4), seed=5).numpy()
    reconstruction_picture(
        Oracle(VideoEncoder(CONFIG), OPTIONS), images, masked, ["VID68, seconds 0 to 3", "b"], tmp_path / "p.png"
    )
    picture = cv2.imread(str(tmp_path / "p.png"))
    assert picture is not None
    margin, text, step = 6, 22, SIZE + 6
    assert picture.shape == (2 * (text + 3 * step), margin + 4 * step, 3)
    for clip in range(2):
        top = clip * (text + 3 * step)
        assert picture[top : top + text].min() < 60
        shown, seen, restored = (
            np.stack([picture[top + text + row * step :, margin + k * step :][:SIZE, :SIZE] for k in range(4)])
            for row in range(3)
        )
        np.testing.assert_array_equal(shown, images[clip])
        for token, hidden in enumerate(masked[clip]):
            truth = patch(images[clip], token)
            if not hidden:
                np.testing.assert_array_equal(patch(seen, token), truth)
                np.testing.assert_array_equal(patch(restored, token), truth)
            else:
                assert (patch(seen, token) == 128).all()
                expected = truth if clip else truth.mean((0, 1, 2), keepdims=True)
                assert np.abs(patch(restored, token) - expected).max() <= 1


def test_measured_figures_part_instruments_from_the_rest() -> None:
    task = task_of(8, held_back=(20, 9))
    assert task.measured == [(0, 0), (0, 8), (0, 12), (1, 0), (1, 1)]
    tokens, side = CONFIG.tokens(8), 2 * PATCH**2

    class WrongAboutTools(torch.nn.Module):
        """The truth, and 2 too much where a token's pixels are those of a tool, in part."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, frames: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
            assert masked.shape == (1, tokens)
            target, mean, deviation = hidden_pixels(frames, masked, 2)
            tool = (target * deviation + mean).amin(3).amax(2) > 0.9
            assert target.shape[2:] == (side, 3)
            return target + 2.0 * tool[..., None, None]

    figures = task.measure(WrongAboutTools())
    assert figures["mse_instruments"] == pytest.approx(4.0, rel=1e-5)
    assert 0.4 < figures["mse"] / 4.0 < 0.9
    assert figures["mse_mean"] == pytest.approx(1.0, abs=0.02)
    assert figures == task.measure(WrongAboutTools())
    none = task_of(8, held_back=(8,), boxes=False)
    assert set(none.measure(WrongAboutTools())) == {"mse", "mse_mean"}


def test_training_learns_to_restore_what_is_hidden_and_goes_on_where_it_ended(tmp_path: Path) -> None:
    settings = replace(RECONSTRUCTION, epochs=3, batch=8, learning_rate=5e-3, precision="fp32", threads=1)
    options = replace(OPTIONS, clip_frames=2)

    def train() -> tuple[MaskedReconstruction, dict[str, float]]:
        torch.manual_seed(0)
        made = [video(f"v{k}", 30, k, tool=False) for k in range(10)]
        clips, frames = [clip for clip, _ in made], {clip.name: images for clip, images in made}
        encoder, quiet = VideoEncoder(CONFIG), Console(quiet=True)
        return reconstruct_pretrain(encoder, clips[:8], clips[8:], frames, tmp_path, options, settings, console=quiet)

    trained, figures = train()
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert len(lines) == settings.epochs
    assert figures == {name: pytest.approx(lines[-1][name], rel=1e-4) for name in figures}
    # Which way the ground grows brighter is to be seen in the visible patches; to guess it leaves half of the error.
    assert figures["mse"] < 0.25
    assert len(list((tmp_path / "pictures").rglob("*.png"))) == settings.epochs
    torch.manual_seed(0)
    start = VideoEncoder(CONFIG).state_dict()
    moved = [name for name, value in trained.encoder.state_dict().items() if not torch.equal(value, start[name])]
    assert {"project.weight", "norm.weight"} <= set(moved)
    again, same = train()
    assert same == figures
    for value, wanted in zip(again.state_dict().values(), trained.state_dict().values(), strict=True):
        assert torch.equal(value, wanted)
