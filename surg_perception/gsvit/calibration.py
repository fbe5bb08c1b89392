# SPDX-License-Identifier: Apache-2.0
"""Temperature scaling (Guo et al., arXiv 1706.04599): probabilities that mean what they say."""

from __future__ import annotations

import math

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.nn import functional as F


def best_temperature(logits: Tensor, phases: Tensor, *, lowest: float = 0.2, highest: float = 20.0) -> float:
    """The temperature T for which softmax(logits / T) has the least negative log-likelihood.

    It changes no ranking, so no class and no accuracy. Take it from videos that were not trained on.

    Args:
        logits: float [n, C], uncalibrated.
        phases: int64 [n], the truth; rows of -1 are left out.
        lowest, highest: bounds of T. The likelihood of a set without a single error grows towards T = 0, which
            would make the model certain of everything; `lowest` ends that.

    Raises:
        ValueError: no row with a known phase, shapes that do not fit, or logits that are not finite.
    """
    if logits.ndim != 2 or phases.shape != logits.shape[:1]:
        raise ValueError(f"expected logits [n, C] and phases [n], found {list(logits.shape)}, {list(phases.shape)}")
    known = phases >= 0
    if not known.any():
        raise ValueError(f"none of the {len(phases)} rows has a known phase; temperature cannot be calibrated on them")
    values, truth = logits.detach()[known].double(), phases[known]
    if not torch.isfinite(values).all():
        raise ValueError("the logits are not finite; look at the training before calibrating it")
    result = minimize_scalar(
        lambda log_temperature: float(F.cross_entropy(values / math.exp(log_temperature), truth)),
        bounds=(math.log(lowest), math.log(highest)),
        method="bounded",
        options={"xatol": 1e-5},
    )
    return math.exp(result.x)
