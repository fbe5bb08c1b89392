# SPDX-License-Identifier: Apache-2.0
"""Whether an engine computes what it should: sound outputs, and agreement with fp32 on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from surg_perception.runtime.graph import FRAME_SHAPE

FRAMES = 16
FRAMES_FILE = Path(__file__).with_name("sample_frames.png")
# A trained GSViT-M0 in bf16: probabilities within 0.012 of fp32 on the phantom and 0.027 on Cholec80, latent cosines
# above 0.9998. The bounds leave room for other weights; swapped channels lie far outside (0.7 and 0.3).
MAX_PROBABILITY_DIFFERENCE = 0.05
DECISIVE_MARGIN = 0.02
MIN_LATENT_COSINE = 0.999
_SUM_TOLERANCE = 1e-3

Outputs = tuple[NDArray[np.float32], NDArray[np.float32]]
"""`probabilities` [N, C] (C is 0 without a phase head) and `latent` [N, D, 4, 4]."""


@lru_cache(maxsize=1)
def reference_frames() -> NDArray[np.uint8]:
    """Sixteen pictures spread over the phantom's seven phases, uint8 [16, 224, 224, 3], BGR, read-only.

    Drawn once by scripts/write_sample_frames.py, since drawing them takes as long as the rest of a start. They are
    the same on every machine, whichever OpenCV it has.

    Raises:
        RuntimeError: the file is missing or damaged.
    """
    picture = cv2.imread(str(FRAMES_FILE), cv2.IMREAD_COLOR)
    if picture is None or picture.shape != (FRAMES * FRAME_SHAPE[0], *FRAME_SHAPE[1:]):
        found = "cannot be read" if picture is None else f"has shape {list(picture.shape)}"
        raise RuntimeError(f"{FRAMES_FILE} {found}, expected {FRAMES} pictures below each other; install again")
    frames = np.asarray(picture, np.uint8).reshape(FRAMES, *FRAME_SHAPE)
    frames.flags.writeable = False
    return frames


@dataclass(frozen=True)
class Agreement:
    """How far outputs lie from reference outputs.

    Attributes:
        probability_difference: greatest absolute difference of a probability.
        phase_changes: frames whose most probable phase differs although the reference's two most probable
            phases lie more than `DECISIVE_MARGIN` apart.
        latent_cosine: least cosine between a frame's two latents.
        mean_difference: mean absolute difference of all probabilities.
        same_phase: share of all frames, 0 to 1, whose most probable phase is the same.
    """

    probability_difference: float
    phase_changes: int
    latent_cosine: float
    mean_difference: float = 0.0
    same_phase: float = 1.0

    @property
    def holds(self) -> bool:
        """Whether the outputs can stand for the reference's."""
        return (
            self.probability_difference <= MAX_PROBABILITY_DIFFERENCE
            and self.phase_changes == 0
            and self.latent_cosine >= MIN_LATENT_COSINE
        )

    def __str__(self) -> str:
        return (
            f"max |dp| {self.probability_difference:.2g} (bound {MAX_PROBABILITY_DIFFERENCE}), "
            f"{self.phase_changes} phases changed (bound 0), "
            f"min latent cosine {self.latent_cosine:.6f} (bound {MIN_LATENT_COSINE})"
        )


def compare(found: Outputs, reference: Outputs) -> Agreement:
    """Agreement of two engines' outputs on the same frames; NaN counts as disagreement."""
    (p, latent), (p_ref, latent_ref) = found, reference
    difference, changes, mean, same_phase = 0.0, 0, 0.0, 1.0
    if p_ref.shape[1]:
        mean = float(np.nan_to_num(np.abs(p - p_ref).mean(), nan=np.inf))
        same_phase = float((p.argmax(axis=1) == p_ref.argmax(axis=1)).mean())
        difference = float(np.nan_to_num(np.abs(p - p_ref).max(), nan=np.inf))
        top_two = np.sort(p_ref, axis=1)[:, -2:]
        decisive = top_two[:, -1] - (top_two[:, 0] if p_ref.shape[1] > 1 else 0.0) > DECISIVE_MARGIN
        changes = int((decisive & (p.argmax(axis=1) != p_ref.argmax(axis=1))).sum())
    a, b = (x.reshape(len(x), -1).astype(np.float64) for x in (latent, latent_ref))
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    same = (a == b).all(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        cosines = np.where(same, 1.0, (a * b).sum(axis=1) / lengths)
    return Agreement(difference, changes, float(np.nan_to_num(cosines, nan=-1.0).min()), mean, same_phase)


def unsound(outputs: Outputs) -> Iterator[str]:
    """What is wrong with outputs of different frames: NaN, infinity, no probabilities, one latent for all of them."""
    probabilities, latent = outputs
    if len(latent) > 1 and (latent == latent[0]).all():
        # An engine's ReLU may turn NaN from broken weights into 0.
        yield f"latent is the same for {len(latent)} different frames; are the weights damaged?"
    for name, values in (("probabilities", probabilities), ("latent", latent)):
        if not np.isfinite(values).all():
            yield f"{name} hold {int((~np.isfinite(values)).sum())} of {values.size} values that are not finite"
    if probabilities.shape[1] and np.isfinite(probabilities).all():
        sums = probabilities.sum(axis=1)
        if probabilities.min() < 0 or np.abs(sums - 1).max() > _SUM_TOLERANCE:
            yield (
                f"probabilities sum to {sums.min():.4g} to {sums.max():.4g} and are at least "
                f"{probabilities.min():.4g}, expected sums of 1 and no negative value"
            )
