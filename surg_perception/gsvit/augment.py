# SPDX-License-Identifier: Apache-2.0
"""Augmentation of training frames: other views (geometry) and other cameras and lights (photometry).

All functions take and give uint8 BGR images [224, 224, 3] or batches of them, leave their input as it is, and
draw from the generator they are given, so that a training can be repeated.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]


def random_view(side: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """A random rotation, zoom, change of aspect, shift and mirror: matrix [2, 3] for `warp`."""
    angle, zoom = rng.uniform(-20, 20), rng.uniform(0.85, 1.2)
    matrix = np.asarray(cv2.getRotationMatrix2D((side / 2, side / 2), angle, zoom), np.float64)
    matrix[:, 0] *= rng.uniform(0.85, 1.18) * rng.choice((-1.0, 1.0))
    centre = matrix @ (side / 2, side / 2, 1.0)
    matrix[:, 2] += side / 2 - centre + rng.uniform(-0.1, 0.1, 2) * side
    return matrix


def warp(image: Image, matrix: NDArray[np.float64]) -> Image:
    """The view `matrix` of an image, black outside."""
    height, width = image.shape[:2]
    return np.asarray(cv2.warpAffine(image, matrix, (width, height), flags=cv2.INTER_LINEAR), np.uint8)


def scope_mask(image: Image, rng: np.random.Generator) -> Image:
    """The image within a scope's round field of view, black outside, as from a camera whose border is not cropped."""
    height, width = image.shape[:2]
    mask = np.zeros((height, width), np.uint8)
    centre = (rng.uniform(0.45, 0.55, 2) * (width, height)).astype(int).tolist()
    # Frames of 16:9 are squeezed to a square, so a round field of view becomes a tall ellipse.
    axes = (rng.uniform(0.4, 0.6) * width, rng.uniform(0.55, 0.75) * height)
    cv2.ellipse(mask, centre, [int(axis) for axis in axes], 0, 0, 360, 255, -1)
    return np.asarray(cv2.bitwise_and(image, image, mask=mask), np.uint8)


def relight(image: Image, rng: np.random.Generator, noise: NDArray[np.float32], strength: float = 1.0) -> Image:
    """Another camera and light: blur, saturation, brightness, white balance, gamma and noise.

    Args:
        image: uint8 [H, W, 3].
        rng: decides the values.
        noise: normal noise float32 [H, W, 3] with a standard deviation of 1.
        strength: factor on all ranges but the blur's.
    """
    if rng.random() < 0.3:
        image = np.asarray(cv2.GaussianBlur(image, (0, 0), rng.uniform(0.5, 1.5)), np.uint8)
    grey = strength * rng.uniform(-0.4, 0.4)
    image = np.asarray(cv2.transform(image, (1.0 - grey) * np.eye(3) + grey / 3.0), np.uint8)
    levels = np.linspace(0.0, 1.0, 256)[:, None]
    gains = np.exp(strength * rng.uniform(-0.3, 0.3)) * np.exp(strength * rng.uniform(-0.16, 0.16, 3))
    table = np.clip(255.0 * gains * levels ** np.exp(strength * rng.uniform(-0.35, 0.35)), 0, 255)
    image = np.asarray(cv2.LUT(image, table.astype(np.uint8)[None]), np.uint8)
    amount = strength * rng.uniform(-10.0, 10.0)
    return np.asarray(cv2.addWeighted(image, 1.0, noise, amount, 0.0, dtype=cv2.CV_8U), np.uint8)


def augment(images: Image, rng: np.random.Generator) -> Image:
    """Other views, cameras and lights of uint8 BGR [n, 224, 224, 3]; some behind a scope's mask or with a patch."""
    side = images.shape[1]
    noise = noise_for(images[0], rng)
    out = np.empty_like(images)
    for i, image in enumerate(images):
        view = relight(warp(image, random_view(side, rng)), rng, noise)
        if rng.random() < 0.2:
            view = scope_mask(view, rng)
        if rng.random() < 0.2:
            height, width = rng.integers(24, 80, 2)
            top, left = rng.integers(0, side - height), rng.integers(0, side - width)
            view[top : top + height, left : left + width] = rng.integers(0, 256, 3)
        out[i] = view
    return out


def noise_for(image: Image, rng: np.random.Generator) -> NDArray[np.float32]:
    """Normal noise of an image's shape; one pattern for a batch is enough for `relight`."""
    return rng.standard_normal(image.shape, np.float32)
