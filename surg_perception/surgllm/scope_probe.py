# SPDX-License-Identifier: Apache-2.0
"""Which questions are not to be answered, by likeness to examples: what the rules of question_check.py leave out.

A support vector machine with a Gaussian kernel on sentence vectors. It is local: a question is declined for being near
the declined examples, not for one word of theirs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

GAMMA = 2.0
_COST = 10.0


@dataclass(frozen=True)
class ScopeProbe:
    """A fitted probe; `fit` makes one.

    Attributes:
        support: float32 [S, width], the examples that matter, unit length.
        weights: float32 [S], positive for declined ones.
        bias: float.
    """

    support: NDArray[np.float32]
    weights: NDArray[np.float32]
    bias: float

    @classmethod
    def fit(
        cls, declined: NDArray[np.float32], allowed: Mapping[str, NDArray[np.float32]], cost: float = _COST
    ) -> ScopeProbe:
        """Fits a probe; scikit-learn is needed here.

        Args:
            declined: unit vectors of questions that are not to be answered, float32 [n, width].
            allowed: groups of questions that are, such as those of a task; each group weighs the same.
            cost: of an example on the wrong side, for a group of mean size.
        """
        from sklearn.svm import SVC

        vectors = np.concatenate([*allowed.values(), declined])
        share = np.concatenate([np.full(len(group), 1 / len(group) / len(allowed)) for group in allowed.values()])
        weights = np.concatenate([share, np.full(len(declined), 1 / len(declined))])
        labels = np.repeat([0, 1], [len(share), len(declined)])
        machine = SVC(C=cost, gamma=GAMMA).fit(vectors, labels, sample_weight=weights * len(weights) / weights.sum())
        # Half precision halves the file, and is what a saved probe comes back with.
        support = machine.support_vectors_.astype(np.float16).astype(np.float32)
        return cls(support, machine.dual_coef_[0].astype(np.float32), float(machine.intercept_[0]))

    def margins(self, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """Signed distance to the border, float32 [n]: over 0 for questions to be declined. vectors: unit length."""
        squared = 2 - 2 * vectors @ self.support.T
        return (np.exp(-GAMMA * squared) @ self.weights + self.bias).astype(np.float32)


def held_out(
    declined: NDArray[np.float32], allowed: Mapping[str, NDArray[np.float32]], folds: Sequence[NDArray[np.int64]]
) -> tuple[float, float]:
    """Share of declined ones that a probe which has not seen them declines, and the same of allowed ones (each group
    weighs the same).

    Args:
        declined, allowed: see `ScopeProbe.fit`.
        folds: for each group of `allowed`, then for `declined`, the fold in which each is kept back.
    """
    caught, lost = [], []
    for fold in np.unique(np.concatenate(folds)):
        groups = {name: group[own != fold] for (name, group), own in zip(allowed.items(), folds, strict=False)}
        probe = ScopeProbe.fit(declined[folds[-1] != fold], groups)
        caught.append(probe.margins(declined[folds[-1] == fold]) > 0)
        lost.append(
            [probe.margins(group[own == fold]) > 0 for group, own in zip(allowed.values(), folds, strict=False)]
        )
    by_group = [np.concatenate(parts).mean() for parts in zip(*lost, strict=True)]
    return float(np.concatenate(caught).mean()), float(np.mean(by_group))
