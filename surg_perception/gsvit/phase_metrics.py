# SPDX-License-Identifier: Apache-2.0
"""How good phase predictions are: strict, relaxed as the official script has it, and relaxed as it was meant.

Published Cholec80 and M2CAI16 tables come from one MATLAB script (`Evaluate.m`, handed on with the code of
SV-RCNet, TMRNet and others). Its rules are kept here to the letter, bug included; docs/evaluation.md spells them
out. Funke et al., "Metrics Matter in Surgical Phase Recognition" (arXiv 2305.13961), is about what such choices do.

Notation, for one video: y the true phase of each sample, p the predicted one, d = p - y, and u = d after
forgiving (u = d in the strict mode). For phase c: G = {y = c}, Q = {p = c}, tp = |{u = 0} in G or Q|.

    Jaccard = 100 tp / |G or Q|    precision = 100 tp / |Q|    recall = 100 tp / |G|    F1 = 200 tp / (|G| + |Q|)
    accuracy = 100 |{u = 0}| / n

Arrays here are NumPy; nothing imports PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

RELAXED_WINDOW_S = 10.0
ECE_BINS = 15
SEGMENTAL_OVERLAPS = (0.10, 0.25, 0.50)
MODES = ("strict", "relaxed_official", "relaxed_corrected")
PHASE_METRICS = ("precision", "recall", "jaccard", "f1")


@dataclass(frozen=True)
class RelaxedRules:
    """Which transitions are forgiven near the ends of a true segment; phases count from 1, as in the script.

    Attributes:
        phases: number of phases.
        late_two_from: from this phase on, d = -2 is forgiven beside d = -1 at a segment's start.
        early_two_from: from this phase on, d = +2 is forgiven beside d = +1 at a segment's end.
    """

    phases: int
    late_two_from: int
    early_two_from: int


RELAXED_RULES: Mapping[str, RelaxedRules] = {
    "cholec80": RelaxedRules(phases=7, late_two_from=6, early_two_from=4),
    "m2cai16": RelaxedRules(phases=8, late_two_from=7, early_two_from=5),
}
"""By label set. Other label sets have no relaxed metrics: the rules name phases of a cholecystectomy."""


@dataclass(frozen=True)
class VideoPhases:
    """Truth and prediction of one video, sample by sample.

    Attributes:
        name: the video's.
        times_s: float64 [n], strictly increasing.
        truth: int64 [n], 0..C-1; -1 where nobody labelled the sample (it is not counted anywhere).
        prediction: int64 [n], 0..C-1.
        confidence: float [n], probability in 0..1 that was given to the predicted phase, NaN where there was
            none; None where nothing is known of it.
        notes: what the reader of the numbers should know about this video.
    """

    name: str
    times_s: NDArray[np.float64]
    truth: NDArray[np.int64]
    prediction: NDArray[np.int64]
    confidence: NDArray[np.float64] | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def step_s(self) -> float:
        """Usual time from sample to sample (the median), 1 where there is one sample only."""
        return float(np.median(np.diff(self.times_s))) if len(self.times_s) > 1 else 1.0

    @property
    def window(self) -> int:
        """Samples in the relaxed window of 10 s: 10 at 1 fps, 250 at 25 fps; at least 1."""
        return max(1, math.floor(RELAXED_WINDOW_S / self.step_s + 1e-6))


@dataclass(frozen=True)
class VideoScores:
    """Scores of one video in percent, clamped to 100.

    Attributes:
        accuracy: 0..100.
        precision, recall, jaccard, f1: float64 [C]; NaN where the phase is absent from the truth, and
            precision NaN as well where the phase is never predicted and nothing of it was forgiven (0/0).
    """

    accuracy: float
    precision: NDArray[np.float64]
    recall: NDArray[np.float64]
    jaccard: NDArray[np.float64]
    f1: NDArray[np.float64]


def segments(sequence: ArrayLike) -> Iterator[tuple[int, int, int]]:
    """Stretches of equal value, (value, first, one past the last), in order; none for an empty sequence."""
    values = np.asarray(sequence)
    if not len(values):
        return
    firsts = np.flatnonzero(np.r_[True, values[1:] != values[:-1]])
    for first, end in zip(firsts, np.r_[firsts[1:], len(values)], strict=True):
        yield int(values[first]), int(first), int(end)


def forgiven_difference(
    truth: NDArray[np.int64], prediction: NDArray[np.int64], window: int, rules: RelaxedRules, *, official: bool
) -> NDArray[np.int64]:
    """u: the difference prediction - truth after forgiving late and early transitions.

    For each true segment, with t = min(window, its length): where d in its first t samples is -1 (from
    `late_two_from` on, also -2), d becomes 0; then, on the d that this left, where d in its last t samples is
    +1 (from `early_two_from` on, also +2), d becomes 0.

    Args:
        truth, prediction: [n], 0..C-1.
        window: samples in 10 s.
        rules: of the label set.
        official: as the script does it: the mask found in the last t samples is applied to the first t
            (MATLAB pads a short logical index), whatever stands there. False: to the last t.
    """
    difference = prediction - truth
    for phase, first, end in segments(truth):
        part = difference[first:end]  # a view: what is written here is written there
        t = min(window, len(part))
        late = part[:t] == -1
        if phase + 1 >= rules.late_two_from:
            late |= part[:t] == -2
        part[:t][late] = 0
        early = part[-t:] == 1
        if phase + 1 >= rules.early_two_from:
            early |= part[-t:] == 2
        (part[:t] if official else part[-t:])[early] = 0
    return difference


def score_video(
    truth: ArrayLike,
    prediction: ArrayLike,
    num_phases: int,
    *,
    mode: str = "strict",
    window: int = 10,
    rules: RelaxedRules | None = None,
) -> VideoScores:
    """Scores of one video; see the module's equations.

    Args:
        truth: [n], 0..C-1, -1 where not labelled: those samples are taken out first.
        prediction: [n], 0..C-1.
        num_phases: C.
        mode: one of `MODES`.
        window: samples in 10 s (relaxed modes).
        rules: of the label set (relaxed modes).

    Raises:
        ValueError: nothing to score, lengths that differ, phases out of range, a mode without rules.
    """
    y, p = _checked(truth, prediction, num_phases)
    if mode == "strict":
        difference = p - y
    elif mode in MODES:
        if rules is None or rules.phases != num_phases:
            raise ValueError(f"mode {mode!r} needs the rules of a label set with {num_phases} phases, found {rules}")
        difference = forgiven_difference(y, p, window, rules, official=mode == "relaxed_official")
    else:
        raise ValueError(f"unknown mode {mode!r}, expected one of {', '.join(MODES)}")

    right = difference == 0
    in_truth, predicted = (np.bincount(ids, minlength=num_phases).astype(np.float64) for ids in (y, p))
    both = np.bincount(y[y == p], minlength=num_phases)
    # Samples of G or Q with u = 0; those of both sets (y = p = c) would be counted twice.
    hits = np.bincount(y[right], minlength=num_phases) + np.bincount(p[right], minlength=num_phases)
    hits = hits - np.bincount(y[right & (y == p)], minlength=num_phases)
    absent = in_truth == 0
    scores = {}
    with np.errstate(divide="ignore", invalid="ignore"):
        for name, size in (
            ("precision", predicted),
            ("recall", in_truth),
            ("jaccard", in_truth + predicted - both),
            ("f1", (in_truth + predicted) / 2.0),
        ):
            percent = np.minimum(hits / size * 100.0, 100.0)  # x/0 is infinite: 100. 0/0 stays NaN
            percent[absent] = np.nan
            scores[name] = percent
    return VideoScores(accuracy=float(right.mean() * 100.0), **scores)


def _checked(truth: ArrayLike, prediction: ArrayLike, num_phases: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    y, p = np.asarray(truth, np.int64), np.asarray(prediction, np.int64)
    if y.ndim != 1 or y.shape != p.shape:
        raise ValueError(f"truth {y.shape} and prediction {p.shape}: expected two sequences of one length")
    y, p = y[y >= 0], p[y >= 0]
    if not len(y):
        raise ValueError("no labelled sample to score")
    if y.max() >= num_phases or p.min() < 0 or p.max() >= num_phases:
        raise ValueError(
            f"phases must be 0..{num_phases - 1}; found truth {y.min()}..{y.max()}, prediction {p.min()}..{p.max()}"
        )
    return y, p


def mean_std(values: ArrayLike, *, skip_nan: bool = False) -> dict[str, float]:
    """Mean and standard deviation with N - 1 as MATLAB gives them: NaN if any value is, 0 for a single value.

    `skip_nan`: over the values that are numbers (nanmean, nanstd); NaN where there is none.
    """
    x = np.asarray(values, np.float64).ravel()
    if skip_nan:
        x = x[~np.isnan(x)]
    if not len(x):
        return {"mean": math.nan, "std": math.nan}
    return {"mean": float(x.mean()), "std": float(x.std(ddof=1)) if len(x) > 1 else float(x[0] - x[0])}


def aggregate(scores: Mapping[str, VideoScores], phases: Sequence[str], *, official: bool = False) -> dict[str, Any]:
    """Scores of many videos as one block of metrics.json.

    Accuracy: mean and standard deviation (N-1) over videos. Precision, recall, Jaccard and F1: per phase the
    mean over the videos that have it, then mean and standard deviation (N-1) over phases.

    Args:
        scores: by video.
        phases: names.
        official: as the script averages: recall and Jaccard (and F1) are NaN where a phase is absent from
            every video; precision alone skips such phases. False: all skip them.

    Returns:
        `accuracy`, `precision`, `recall`, `jaccard`, `f1` as {mean, std}; `per_phase`, the same by phase over
        videos; `over_videos`, {mean, std} over videos of each video's mean over its phases; `per_video`.
    """
    tables = {name: np.array([getattr(video, name) for video in scores.values()]) for name in PHASE_METRICS}
    per_phase = {
        name: {phase: mean_std(table[:, i], skip_nan=True) for i, phase in enumerate(phases)}
        for name, table in tables.items()
    }
    over_phases = {
        name: mean_std(
            [entry["mean"] for entry in per_phase[name].values()], skip_nan=not official or name == "precision"
        )
        for name in PHASE_METRICS
    }
    per_video: dict[str, dict[str, Any]] = {
        video: {
            "accuracy": one.accuracy,
            **{name: mean_std(getattr(one, name), skip_nan=True)["mean"] for name in PHASE_METRICS},
            "per_phase": {name: dict(zip(phases, getattr(one, name).tolist(), strict=True)) for name in PHASE_METRICS},
        }
        for video, one in scores.items()
    }
    return {
        "accuracy": mean_std([one.accuracy for one in scores.values()]),
        **over_phases,
        "per_phase": per_phase,
        "over_videos": {
            name: mean_std([video[name] for video in per_video.values()], skip_nan=True) for name in PHASE_METRICS
        },
        "per_video": per_video,
    }


def edit_score(truth: ArrayLike, prediction: ArrayLike) -> float:
    """Segmental edit score in percent: 100 (1 - L / max(m, n)).

    L is the Levenshtein distance between the orders of the m true and n predicted segments, whatever their
    lengths (Lea et al., CVPR 2017; Farha and Gall, MS-TCN, CVPR 2019). 100 for the right order of phases.
    """
    y = [value for value, _, _ in segments(truth)]
    p = [value for value, _, _ in segments(prediction)]
    row = list(range(len(y) + 1))
    for i, one in enumerate(p, 1):
        above, row[0] = row[0], i
        for j, other in enumerate(y, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (one != other))
    return 100.0 * (1.0 - row[-1] / max(len(y), len(p), 1))


def segment_hits(truth: ArrayLike, prediction: ArrayLike, overlap: float) -> tuple[int, int, int]:
    """True positive, false positive and false negative segments (Lea et al., CVPR 2017; MS-TCN, CVPR 2019).

    Each predicted segment, in order of time, is held against the true segment of its phase with the greatest
    intersection over union (the first of equals): a hit if that is at least `overlap` (0..1) and no earlier
    prediction has hit it.
    """
    y = np.array(list(segments(truth))).reshape(-1, 3)
    hit = np.zeros(len(y), bool)
    predicted = list(segments(prediction))
    for phase, first, end in predicted:
        inside = np.maximum(np.minimum(end, y[:, 2]) - np.maximum(first, y[:, 1]), 0)
        union = np.maximum(end, y[:, 2]) - np.minimum(first, y[:, 1])
        iou = np.where(y[:, 0] == phase, inside / union, 0.0)
        best = int(iou.argmax())
        hit[best] |= iou[best] >= overlap
    positives = int(hit.sum())
    return positives, len(predicted) - positives, len(y) - positives


def segment_f1(hits: tuple[int, int, int]) -> float:
    """F1 in percent of (true positives, false positives, false negatives): 200 tp / (2 tp + fp + fn)."""
    tp, fp, fn = hits
    return 200.0 * tp / (2 * tp + fp + fn)


@dataclass(frozen=True)
class Reliability:
    """Calibration over equal bins of confidence; bin b holds confidences in (b/B, (b+1)/B].

    Attributes:
        count: samples, int64 [B].
        confidence: their mean confidence, float64 [B]; NaN for an empty bin.
        accuracy: share of them that is right, float64 [B]; NaN for an empty bin.
    """

    count: NDArray[np.int64]
    confidence: NDArray[np.float64]
    accuracy: NDArray[np.float64]

    @property
    def ece(self) -> float:
        """Expected calibration error in 0..1: sum over bins of count/n |accuracy - confidence|."""
        full = self.count > 0
        gaps = np.abs(self.accuracy[full] - self.confidence[full])
        return float((self.count[full] * gaps).sum() / self.count.sum())


def reliability(confidence: ArrayLike, right: ArrayLike, bins: int = ECE_BINS) -> Reliability:
    """Calibration of confidences [n] in 0..1 against whether each prediction is right [n] (Guo et al., ICML 2017).

    NaN confidences are not counted. Raises ValueError for other shapes or nothing to count.
    """
    values, hits = np.asarray(confidence, np.float64), np.asarray(right, bool)
    if values.ndim != 1 or hits.shape != values.shape:
        raise ValueError(f"confidence {values.shape} and right {hits.shape}: expected two sequences of one length")
    known = ~np.isnan(values)
    values, hits = values[known], hits[known]
    if not len(values):
        raise ValueError("no confidence to judge")
    where = np.digitize(values, np.linspace(0.0, 1.0, bins + 1)[1:-1], right=True)
    count = np.bincount(where, minlength=bins)
    with np.errstate(invalid="ignore"):
        return Reliability(
            count,
            np.bincount(where, values, bins) / count,
            np.bincount(where, hits, bins) / count,
        )


def confusion(truth: ArrayLike, prediction: ArrayLike, num_phases: int) -> NDArray[np.int64]:
    """Samples by true phase (rows) and predicted phase (columns), int64 [C, C]; truth -1 is not counted."""
    y, p = _checked(truth, prediction, num_phases)
    return np.bincount(y * num_phases + p, minlength=num_phases**2).reshape(num_phases, num_phases)


def evaluate(videos: Sequence[VideoPhases], phases: Sequence[str], label_set: str) -> dict[str, Any]:
    """Everything in metrics.json for these videos.

    Args:
        videos: at least one, with different names.
        phases: names, in the order of the indices.
        label_set: "cholec80" and "m2cai16" have relaxed metrics; for any other those two blocks are None.

    Returns:
        Plain dicts, lists, numbers, text and None (for what is not defined: strict JSON has no NaN). Percent,
        save for `calibration` (0..1). Keys: docs/evaluation.md.

    Raises:
        ValueError: no videos, a name twice, or a video that cannot be scored, which is named.
    """
    if not videos:
        raise ValueError("no videos to evaluate, expected at least one")
    names = [video.name for video in videos]
    if len(set(names)) != len(names):
        raise ValueError(f"a video is there twice: {', '.join(sorted({n for n in names if names.count(n) > 1}))}")
    count, rules = len(phases), RELAXED_RULES.get(label_set)
    blocks: dict[str, Any] = {}
    per_video: dict[str, Any] = {}
    matrix = np.zeros((count, count), np.int64)
    pooled = {overlap: np.zeros(3, np.int64) for overlap in SEGMENTAL_OVERLAPS}
    for video in videos:
        try:
            matrix += confusion(video.truth, video.prediction, count)
        except ValueError as error:
            raise ValueError(f"video {video.name}: {error}") from error
        known = video.truth >= 0
        y, p = video.truth[known], video.prediction[known]
        hits = {overlap: segment_hits(y, p, overlap) for overlap in SEGMENTAL_OVERLAPS}
        for overlap, found in hits.items():
            pooled[overlap] += found
        per_video[video.name] = {
            "samples": len(y),
            "unlabelled_samples": len(known) - len(y),
            "step_s": video.step_s,
            "relaxed_window_samples": video.window,
            "edit": edit_score(y, p),
            **{_f1_key(overlap): segment_f1(found) for overlap, found in hits.items()},
            "notes": list(video.notes),
        }
    for mode in MODES:
        if mode != "strict" and rules is None:
            blocks[mode] = None
            continue
        scores = {
            video.name: score_video(video.truth, video.prediction, count, mode=mode, window=video.window, rules=rules)
            for video in videos
        }
        blocks[mode] = aggregate(scores, phases, official=mode == "relaxed_official")
        for name, one in scores.items():
            per_video[name][f"accuracy_{mode}"] = one.accuracy

    absent = [phase for phase, row in zip(phases, matrix, strict=True) if not row.sum()]
    metrics = {
        "label_set": label_set,
        "phases": list(phases),
        "videos": len(videos),
        "samples": int(matrix.sum()),
        **blocks,
        "segmental": {
            "edit": mean_std([one["edit"] for one in per_video.values()]),
            **{
                _f1_key(overlap): {
                    "pooled": segment_f1((int(found[0]), int(found[1]), int(found[2]))),
                    **mean_std([one[_f1_key(overlap)] for one in per_video.values()]),
                }
                for overlap, found in pooled.items()
            },
        },
        "calibration": _calibration(videos),
        "confusion": matrix.tolist(),
        "phases_absent_from_truth": absent,
        "phases_never_predicted": [phase for i, phase in enumerate(phases) if not matrix[:, i].sum()],
        "per_video": per_video,
    }
    return _without_nan(metrics)


def _f1_key(overlap: float) -> str:
    return f"f1@{overlap * 100:.0f}"


def _calibration(videos: Sequence[VideoPhases]) -> dict[str, Any] | None:
    confidences = [video.confidence[video.truth >= 0] for video in videos if video.confidence is not None]
    if len(confidences) < len(videos) or np.isnan(np.concatenate(confidences)).all():
        return None
    right = np.concatenate([(video.truth == video.prediction)[video.truth >= 0] for video in videos])
    result = reliability(np.concatenate(confidences), right)
    bins = len(result.count)
    return {
        "ece": result.ece,
        "bins": [
            {
                "lower": i / bins,
                "upper": (i + 1) / bins,
                "count": int(result.count[i]),
                "confidence": float(result.confidence[i]),
                "accuracy": float(result.accuracy[i]),
            }
            for i in range(bins)
        ],
    }


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_nan(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
