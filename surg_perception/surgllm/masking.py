# SPDX-License-Identifier: Apache-2.0
"""Which tokens of a clip are hidden: instrument-centric tube masks of Surg-Pretrain A (SurgLLM, arXiv 2509.00357).

One random tube mask, the same in every tubelet, onto which the patches of the instruments are forced; as many random
background patches are shown again, so that each tubelet hides the same number of patches.

Boxes are (left, top, width, height). Tokens are counted tubelet by tubelet, in each row by row.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

GROUP_LENGTHS = (2, 4, 8, 16)
"""Frames that share the instrument patches of the first of them, from the start of a training to its end."""

_TOUCH = 1e-6  # of a patch: less is rounding


def random_crop(
    rng: np.random.Generator, scale: tuple[float, float] = (0.5, 1.0), aspect: tuple[float, float] = (3 / 4, 4 / 3)
) -> tuple[float, float, float, float]:
    """A random part of a frame: (left, top, width, height) in 0..1.

    Args:
        rng: decides area, aspect and place.
        scale: its area, as a share of the frame's: lowest and highest, in 0..1.
        aspect: its width / height, as a multiple of the frame's; drawn so that a ratio is as likely as its inverse.
    """
    area = rng.uniform(*scale)
    stretch = np.exp(rng.uniform(np.log(aspect[0]), np.log(aspect[1])))
    width, height = min(np.sqrt(area * stretch), 1.0), min(np.sqrt(area / stretch), 1.0)
    return float(rng.uniform(0.0, 1.0 - width)), float(rng.uniform(0.0, 1.0 - height)), float(width), float(height)


def crop_boxes(boxes: ArrayLike, crop: tuple[float, float, float, float]) -> NDArray[np.float64]:
    """Boxes of a whole frame as boxes of a part of it.

    Args:
        boxes: [n, 4] in 0..1 of the whole frame; n may be 0.
        crop: the part, in 0..1 of the whole frame, to whatever size it is resized.

    Returns:
        float64 [m, 4] in 0..1 of the part, cut at its edges; boxes that lie outside are left out.

    Raises:
        ValueError: a part without area.
    """
    left, top, width, height = crop
    if not (width > 0 and height > 0):
        raise ValueError(f"a crop {width:g} wide and {height:g} high found, expected above 0")
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    near = np.clip((boxes[:, :2] - (left, top)) / (width, height), 0.0, 1.0)
    far = np.clip((boxes[:, :2] + boxes[:, 2:] - (left, top)) / (width, height), 0.0, 1.0)
    cropped = np.concatenate([near, far - near], axis=1)
    return cropped[(cropped[:, 2:] > 0).all(axis=1)]


def instrument_patches(boxes: ArrayLike, grid: int) -> NDArray[np.bool_]:
    """The patches of one frame that a box touches.

    Args:
        boxes: [n, 4] in 0..1 of what the encoder sees; n may be 0.
        grid: patches per side.

    Returns:
        bool [grid, grid], row by row.
    """
    patches = np.zeros((grid, grid), bool)
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    first = np.floor(np.clip(boxes[:, :2], 0.0, 1.0) * grid + _TOUCH).astype(int)
    end = np.ceil(np.clip(boxes[:, :2] + boxes[:, 2:], 0.0, 1.0) * grid - _TOUCH).astype(int)
    for (left, top), (right, bottom) in zip(first, end, strict=True):
        patches[top:bottom, left:right] = True
    return patches


def group_length(progress: float, frames: int) -> int:
    """Frames that share one grid of instrument patches: 2, 4, 8, 16 in equal parts of a training.

    Args:
        progress: share of the training that is done, 0 to 1.
        frames: of a clip, 2 or more; no group is longer.
    """
    lengths = [length for length in GROUP_LENGTHS if length <= frames]
    if not lengths:
        raise ValueError(f"clips of {frames} frames found, expected {GROUP_LENGTHS[0]} or more")
    return lengths[min(int(progress * len(lengths)), len(lengths) - 1)]


def hidden_patches(grid: int, ratio: float) -> int:
    """How many patches of each tubelet a mask hides: `ratio` of grid², at least one and not all."""
    return int(np.clip(round(ratio * grid * grid), 1, grid * grid - 1))


def instrument_mask(
    instruments: NDArray[np.bool_], ratio: float, group: int, rng: np.random.Generator, tubelet: int = 2
) -> NDArray[np.bool_]:
    """A mask of one clip that hides the instruments; without instruments a plain tube mask.

    Where a tubelet has more instrument patches than may be hidden, a random part of them is, those in the tube first.

    Args:
        instruments: bool [T, grid, grid], the instrument patches of each frame (`instrument_patches`).
        ratio: share of the patches that is hidden, in 0..1; 0.7 in the release for 16 frames, 0.8 for 64.
        group: frames that share the instrument patches of the first of them, a multiple of `tubelet`.
        rng: decides the mask.
        tubelet: frames of a token; T is a multiple of it.

    Returns:
        bool [T / tubelet * grid²], True = hidden, `hidden_patches(grid, ratio)` in each tubelet.

    Raises:
        ValueError: T or `group` is no multiple of `tubelet`.
    """
    frames, grid = instruments.shape[:2]
    if not frames or frames % tubelet or group < 1 or group % tubelet:
        raise ValueError(
            f"a clip of {frames} frames in groups of {group} found, expected multiples of {tubelet} frames, the tubelet"
        )
    leading = np.arange(0, frames, tubelet) // group * group
    forced = instruments[leading].reshape(len(leading), -1)
    hidden = hidden_patches(grid, ratio)
    tube = np.zeros(grid * grid, bool)
    tube[rng.permutation(grid * grid)[:hidden]] = True
    # Instruments first, then the tube, at random within each. The tube alone holds `hidden` patches, so what is
    # hidden lies in the union, and what the union has too many is background, unless the instruments are too many.
    rank = 2.0 * forced + 1.0 * tube + rng.random(forced.shape)
    masked = np.zeros(forced.shape, bool)
    np.put_along_axis(masked, np.argsort(-rank, axis=1)[:, :hidden], True, axis=1)
    return masked.reshape(-1)
