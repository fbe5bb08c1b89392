# SPDX-License-Identifier: Apache-2.0
"""Instrument-centric masks: what is hidden, how much of it, and where boxes lie after a crop."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from surg_perception.surgllm.masking import (
    crop_boxes,
    group_length,
    hidden_patches,
    instrument_mask,
    instrument_patches,
    random_crop,
)

share = st.floats(0.0, 1.0)
boxes = st.lists(st.tuples(share, share, share, share), max_size=4)
crops = st.tuples(share, share, st.floats(0.2, 1.0), st.floats(0.2, 1.0)).map(
    lambda c: (c[0] * (1 - c[2]), c[1] * (1 - c[3]), c[2], c[3])
)


@st.composite
def clips(draw: st.DrawFn) -> tuple[NDArray[np.bool_], float, int, int]:
    """Instrument patches [T, grid, grid], ratio, group length and seed."""
    grid, frames = draw(st.integers(2, 14)), 2 * draw(st.integers(1, 8))
    seed = draw(st.integers(0, 2**32 - 1))
    instruments = np.random.default_rng(seed).random((frames, grid, grid)) < draw(share)
    return instruments, draw(st.floats(0.05, 0.95)), draw(st.sampled_from((2, 4, 8, 16))), seed


def mask_of(
    instruments: NDArray[np.bool_], ratio: float, group: int, seed: int
) -> tuple[NDArray[np.bool_], NDArray[np.bool_], int]:
    """The mask, the instrument patches that it must hide, each bool [T / 2, grid²], and how many a tubelet hides."""
    frames, grid = instruments.shape[:2]
    mask = instrument_mask(instruments, ratio, group, np.random.default_rng(seed))
    assert mask.dtype == np.bool_
    assert mask.shape == (frames // 2 * grid**2,)
    first_of_group = [instruments[2 * tubelet - (2 * tubelet) % group] for tubelet in range(frames // 2)]
    return (
        mask.reshape(frames // 2, -1),
        np.stack(first_of_group).reshape(frames // 2, -1),
        hidden_patches(grid, ratio),
    )


@given(clips())
@settings(deadline=None, max_examples=60)
def test_each_tubelet_hides_the_same_number_of_patches(clip: tuple[NDArray[np.bool_], float, int, int]) -> None:
    mask, _, hidden = mask_of(*clip)
    assert (mask.sum(axis=1) == hidden).all()
    assert 0 < hidden < mask.shape[1]
    assert abs(hidden - clip[1] * mask.shape[1]) <= 1


@given(clips())
@settings(deadline=None, max_examples=60)
def test_every_instrument_patch_of_the_groups_first_frame_is_hidden_up_to_the_cap(
    clip: tuple[NDArray[np.bool_], float, int, int],
) -> None:
    mask, instruments, hidden = mask_of(*clip)
    for tubelet, forced in zip(mask, instruments, strict=True):
        if forced.sum() <= hidden:
            assert tubelet[forced].all()
        else:
            assert forced[tubelet].all()


@given(clips())
@settings(deadline=None, max_examples=60)
def test_what_is_hidden_beside_instruments_is_one_tube(clip: tuple[NDArray[np.bool_], float, int, int]) -> None:
    mask, instruments, hidden = mask_of(*clip)
    background = (mask & ~instruments).any(axis=0)
    if not instruments.any(axis=0).any():
        assert (mask == mask[0]).all()
    assert background.sum() <= hidden
    # The same draw without instruments is the tube, and nothing else is hidden.
    plain, _, _ = mask_of(np.zeros_like(clip[0]), *clip[1:])
    assert (mask <= (plain | instruments)).all()


def test_known_clip_in_two_groups() -> None:
    instruments = np.zeros((8, 4, 4), bool)
    instruments[0, 0, :] = True  # leads frames 0 to 3
    instruments[2, 3, :] = True  # inside the first group: of no effect
    instruments[4, 1, :] = True  # leads frames 4 to 7
    masks = np.stack([instrument_mask(instruments, 0.5, 4, np.random.default_rng(seed)) for seed in range(200)])
    shown = masks.reshape(200, 4, 4, 4).mean(axis=0)
    assert (shown[:2, 0] == 1.0).all()
    assert (shown[2:, 1] == 1.0).all()
    # The other four of the eight hidden patches are spread over the other twelve.
    assert np.abs(shown[:2, 1:] - 4 / 12).max() < 0.15
    assert np.abs(shown[2:, [0, 2, 3]] - 4 / 12).max() < 0.15
    two = instrument_mask(instruments, 0.5, 2, np.random.default_rng(0)).reshape(4, 4, 4)
    assert two[1, 3].all()


def test_more_instrument_patches_than_may_be_hidden_are_capped_at_random() -> None:
    instruments = np.ones((2, 4, 4), bool)
    instruments[:, 0] = False
    masks = np.stack([instrument_mask(instruments, 0.25, 2, np.random.default_rng(seed)) for seed in range(300)])
    assert (masks.sum(axis=1) == 4).all()
    shown = masks.mean(axis=0).reshape(4, 4)
    assert (shown[0] == 0).all()
    assert np.abs(shown[1:] - 4 / 12).max() < 0.12


def test_groups_and_clips_are_whole_tubelets() -> None:
    for frames, group in ((3, 2), (0, 2), (4, 3), (4, 0)):
        with pytest.raises(ValueError, match=f"{frames} frames in groups of {group} found"):
            instrument_mask(np.zeros((frames, 4, 4), bool), 0.5, group, np.random.default_rng(0))


@given(boxes, st.integers(1, 14))
@settings(deadline=None, max_examples=60)
def test_a_patch_is_an_instruments_where_a_box_touches_it(found: list[tuple[float, ...]], grid: int) -> None:
    patches = instrument_patches(found, grid)
    edges, least = np.arange(grid) / grid, 1e-5 / grid
    touched, near = np.zeros((2, grid, grid), bool)
    for x, y, width, height in found:
        across = np.minimum(min(x + width, 1), edges + 1 / grid) - np.maximum(x, edges)
        down = np.minimum(min(y + height, 1), edges + 1 / grid) - np.maximum(y, edges)
        touched |= np.outer(down > least, across > least)
        near |= np.outer(down >= 0, across >= 0)
    assert (patches >= touched).all()
    assert (patches <= near).all()


def test_a_box_that_ends_at_a_patchs_edge_does_not_touch_the_next() -> None:
    patches = instrument_patches([(0.1, 0.3, 0.2, 0.3)], 10)  # 0.1 + 0.2 and 0.3 + 0.3 are a little off in binary
    assert np.argwhere(patches).tolist() == [[row, column] for row in (3, 4, 5) for column in (1, 2)]


@given(boxes, crops)
@settings(deadline=None, max_examples=60)
def test_cropped_boxes_lie_where_the_cropped_picture_shows_them(
    found: list[tuple[float, ...]], crop: tuple[float, float, float, float]
) -> None:
    cropped = crop_boxes(found, crop)
    assert cropped.shape[1] == 4
    assert ((cropped >= 0) & (cropped <= 1)).all()
    left, top, width, height = crop
    middles = (np.arange(16) + 0.5) / 16
    points = np.stack(np.meshgrid(middles, middles), axis=-1).reshape(-1, 2)

    def inside(at: NDArray[np.float64], rectangles: NDArray[np.float64]) -> NDArray[np.bool_]:
        x, y = at[:, :1], at[:, 1:]
        a, b, w, h = rectangles.reshape(-1, 4).T
        return np.asarray(((x > a) & (x < a + w) & (y > b) & (y < b + h)).any(axis=1))

    whole = points * (width, height) + (left, top)
    exact, edge = np.asarray(found, np.float64).reshape(-1, 4), np.array([1, 1, -2, -2]) * 1e-9
    shrunk, grown = exact + edge, exact - edge
    assert (inside(points, cropped) >= inside(whole, shrunk)).all()
    assert (inside(points, cropped) <= inside(whole, grown)).all()


def test_crop_and_resize_of_pixels_and_of_boxes_agree() -> None:
    """A white instrument, cropped and resized as pixels, covers the patches of its cropped box."""
    frame = np.zeros((96, 96), np.uint8)
    frame[24:60, 36:48] = 255
    crop = (24 / 96, 12 / 96, 48 / 96, 60 / 96)
    view = cv2.resize(frame[12:72, 24:72], (96, 96), interpolation=cv2.INTER_AREA)
    box = (36 / 96, 24 / 96, 12 / 96, 36 / 96)
    patches = instrument_patches(crop_boxes([box], crop), 8)
    # 64 = a quarter: what a resized edge leaves of a patch it only just touches does not count.
    white = view.reshape(8, 12, 8, 12).max(axis=(1, 3)) > 64
    np.testing.assert_array_equal(patches, white)
    assert not np.array_equal(instrument_patches([box], 8), white)


def test_boxes_outside_a_crop_and_crops_without_area() -> None:
    assert crop_boxes([(0.0, 0.0, 0.2, 0.2), (0.6, 0.6, 0.2, 0.2)], (0.5, 0.5, 0.5, 0.5)).tolist() == pytest.approx(
        np.array([[0.2, 0.2, 0.4, 0.4]])
    )
    assert crop_boxes([], (0, 0, 1, 1)).shape == (0, 4)
    with pytest.raises(ValueError, match="0 wide and 1 high"):
        crop_boxes([], (0, 0, 0, 1))


@given(st.integers(0, 2**32 - 1))
def test_a_random_crop_lies_in_the_frame(seed: int) -> None:
    left, top, width, height = random_crop(np.random.default_rng(seed), (0.4, 0.9))
    assert min(left, top) >= 0
    assert max(left + width, top + height) <= 1 + 1e-12
    assert 0.3 < width * height < 0.9 + 1e-12


def test_groups_grow_with_the_training_up_to_the_clip() -> None:
    assert [group_length(progress, 16) for progress in (0, 0.24, 0.25, 0.5, 0.75, 1)] == [2, 2, 4, 8, 16, 16]
    assert [group_length(progress, 8) for progress in (0, 0.33, 0.34, 0.67, 1)] == [2, 2, 4, 8, 8]
    assert [group_length(progress, 2) for progress in (0, 1)] == [2, 2]
    with pytest.raises(ValueError, match="clips of 1 frames"):
        group_length(0.5, 1)
