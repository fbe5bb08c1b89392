# SPDX-License-Identifier: Apache-2.0
"""Phase metrics: every rule by hand, against a slow second implementation, and against the official script itself."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score, jaccard_score, precision_score, recall_score

from surg_perception.data.labels import CHOLEC80_PHASES, M2CAI16_PHASES
from surg_perception.gsvit.phase_labels_io import phase_indices, read_phase_folder
from surg_perception.gsvit.phase_metrics import (
    MODES,
    RELAXED_RULES,
    VideoPhases,
    confusion,
    edit_score,
    evaluate,
    forgiven_difference,
    mean_std,
    reliability,
    score_video,
    segment_f1,
    segment_hits,
    segments,
)

CHOLEC80 = RELAXED_RULES["cholec80"]
M2CAI16 = RELAXED_RULES["m2cai16"]


def video(name, truth, prediction, *, rate_hz=1.0, confidence=None):
    return VideoPhases(
        name, np.arange(len(truth)) / rate_hz, np.asarray(truth), np.asarray(prediction), confidence=confidence
    )


def expand(runs):
    """(truth, prediction) from runs of (true phase from 1, predicted phase from 1, samples)."""
    pairs = np.array([(y, p) for y, p, count in runs for _ in range(count)]) - 1
    return pairs[:, 0], pairs[:, 1]


def forgiven(runs, *, official, rules=CHOLEC80, window=10):
    """Indices of wrong samples that are forgiven."""
    truth, prediction = expand(runs)
    u = forgiven_difference(truth, prediction, window, rules, official=official)
    return np.flatnonzero((u == 0) & (truth != prediction)).tolist()


# A late transition: the previous phase is still predicted at the start of the segment.


def test_a_late_transition_is_forgiven_for_ten_seconds():
    runs = [(2, 2, 20), (3, 2, 14), (3, 3, 20)]
    for official in (True, False):
        assert forgiven(runs, official=official) == list(range(20, 30))


@pytest.mark.parametrize(("phase", "is_forgiven"), [(3, False), (4, False), (5, False), (6, True), (7, True)])
def test_two_phases_late_is_forgiven_from_phase_six_on(phase, is_forgiven):
    runs = [(phase, phase - 2, 4), (phase, phase, 30)]
    for official in (True, False):
        assert forgiven(runs, official=official) == (list(range(4)) if is_forgiven else [])


def test_an_earlier_phase_in_the_middle_of_a_segment_is_not_forgiven():
    for official in (True, False):
        assert forgiven([(3, 3, 20), (3, 2, 5), (3, 3, 20)], official=official) == []


# An early transition: the next phase is already predicted at the end of the segment.


def test_corrected_an_early_transition_is_forgiven_in_the_last_ten_seconds():
    assert forgiven([(2, 2, 20), (2, 3, 14), (3, 3, 20)], official=False) == list(range(24, 34))


def test_official_an_early_transition_is_not_forgiven_where_it_is():
    assert forgiven([(2, 2, 20), (2, 3, 14), (3, 3, 20)], official=True) == []


def test_official_the_mask_of_the_last_ten_seconds_lands_on_the_first_ten():
    # Wrong at 2..5 by anything; d = +1 at the positions 2, 3 and 9 of the last ten.
    runs = [(2, 2, 2), (2, 6, 4), (2, 2, 20), (2, 2, 2), (2, 3, 2), (2, 2, 5), (2, 3, 1), (3, 3, 20)]
    assert forgiven(runs, official=True) == [2, 3]
    assert forgiven(runs, official=False) == [28, 29, 35]


@pytest.mark.parametrize(("phase", "is_forgiven"), [(1, False), (2, False), (3, False), (4, True), (5, True)])
def test_two_phases_early_is_forgiven_from_phase_four_on(phase, is_forgiven):
    runs = [(phase, phase, 30), (phase, phase + 2, 4)]
    assert forgiven(runs, official=False) == (list(range(30, 34)) if is_forgiven else [])


def test_m2cai16_has_one_phase_more_before_the_two_phase_rules():
    for phase, late, early in ((6, False, True), (7, True, True), (4, False, False), (5, False, True)):
        runs = [(phase, phase - 2, 4), (phase, phase, 30)]
        assert forgiven(runs, official=False, rules=M2CAI16) == (list(range(4)) if late else [])
        if phase <= 6:
            runs = [(phase, phase, 30), (phase, phase + 2, 4)]
            assert forgiven(runs, official=False, rules=M2CAI16) == (list(range(30, 34)) if early else [])


# Windows.


def test_a_segment_shorter_than_the_window_is_its_own_window():
    runs = [(2, 2, 20), (3, 2, 3), (3, 3, 1), (3, 4, 2), (4, 4, 20)]
    # Official: the mask [0 0 0 0 1 1] of the six seconds lands on the same six, so bug and correction agree.
    assert forgiven(runs, official=True) == forgiven(runs, official=False) == [20, 21, 22, 24, 25]


def test_windows_that_overlap_see_each_other():
    # Fifteen seconds: the last ten begin at 5, the first ten end at 10.
    runs = [(3, 4, 5), (3, 4, 5), (3, 4, 5)]
    assert forgiven(runs, official=False) == list(range(5, 15))
    assert forgiven(runs, official=True) == list(range(10))


def test_every_segment_of_a_phase_has_its_own_windows():
    runs = [(3, 2, 4), (3, 3, 12), (4, 4, 30), (3, 2, 4), (3, 3, 12)]
    assert forgiven(runs, official=False) == [0, 1, 2, 3, 46, 47, 48, 49]


def test_the_window_is_ten_seconds_at_any_rate():
    assert video("a", [0] * 30, [0] * 30).window == 10
    assert video("a", [0] * 30, [0] * 30, rate_hz=25.0).window == 250
    assert video("a", [0] * 30, [0] * 30, rate_hz=0.25).window == 2
    assert video("a", [0] * 30, [0] * 30, rate_hz=0.01).window == 1
    assert video("a", [0], [0]).window == 10


# Scores of one video.


def test_scores_by_hand():
    truth, prediction = expand([(1, 1, 30), (2, 1, 5), (2, 2, 15), (2, 3, 20), (3, 3, 30)])
    strict = score_video(truth, prediction, 7)
    assert strict.accuracy == pytest.approx(100 * 75 / 100)
    np.testing.assert_allclose(strict.precision[:3], [100 * 30 / 35, 100, 100 * 30 / 50])
    np.testing.assert_allclose(strict.recall[:3], [100, 100 * 15 / 40, 100])
    np.testing.assert_allclose(strict.jaccard[:3], [100 * 30 / 35, 100 * 15 / 40, 100 * 30 / 50])
    np.testing.assert_allclose(strict.f1[:3], [200 * 30 / 65, 200 * 15 / 55, 200 * 30 / 80])

    # Late: the 5 seconds are forgiven. Early: all ten of the last ten seconds are +1, so the first ten become 0,
    # of which 5 already are.
    official = score_video(truth, prediction, 7, mode="relaxed_official", rules=CHOLEC80)
    assert official.accuracy == pytest.approx(80)
    np.testing.assert_allclose(official.precision[:3], [100, 100, 100 * 30 / 50])  # 20 of 15: clamped
    np.testing.assert_allclose(official.recall[:3], [100, 50, 100])  # 35 of 30: clamped
    np.testing.assert_allclose(official.jaccard[:3], [100, 50, 60])

    corrected = score_video(truth, prediction, 7, mode="relaxed_corrected", rules=CHOLEC80)
    assert corrected.accuracy == pytest.approx(90)
    np.testing.assert_allclose(corrected.jaccard[:3], [100, 75, 80])
    np.testing.assert_allclose(corrected.recall[:3], [100, 75, 100])
    np.testing.assert_allclose(corrected.precision[:3], [100, 100, 80])


def test_a_phase_that_the_truth_lacks_has_no_scores():
    scores = score_video([0, 0, 1, 1], [0, 0, 2, 1], 3)
    for values in (scores.precision, scores.recall, scores.jaccard, scores.f1):
        assert np.isnan(values).tolist() == [False, False, True]


@pytest.mark.parametrize("mode", MODES)
def test_a_phase_that_is_never_predicted_has_no_precision(mode):
    truth, prediction = expand([(1, 1, 20), (2, 4, 20), (4, 4, 20)])
    scores = score_video(truth, prediction, 7, mode=mode, rules=CHOLEC80)
    assert np.isnan(scores.precision[1])
    assert scores.recall[1] == scores.jaccard[1] == scores.f1[1] == 0.0


def test_a_phase_never_predicted_but_forgiven_has_infinite_precision_which_is_100():
    truth, prediction = expand([(1, 1, 20), (2, 1, 8), (3, 3, 20)])
    for mode in MODES[1:]:
        assert score_video(truth, prediction, 7, mode=mode, rules=CHOLEC80).precision[1] == 100.0


def test_unlabelled_samples_are_taken_out_first():
    truth, prediction = np.array([0, 0, -1, -1, 1, 1]), np.array([0, 1, 6, 6, 1, 1])
    with_gap, without = score_video(truth, prediction, 7), score_video(truth[truth >= 0], prediction[truth >= 0], 7)
    assert with_gap.accuracy == without.accuracy == 75.0
    np.testing.assert_array_equal(with_gap.jaccard, without.jaccard)
    assert confusion(truth, prediction, 7).sum() == 4


@pytest.mark.parametrize(
    ("truth", "prediction", "text"),
    [
        ([0, 1], [0], "one length"),
        ([], [], "no labelled sample"),
        ([-1, -1], [0, 0], "no labelled sample"),
        ([0, 7], [0, 0], "0..6"),
        ([0, 1], [0, -1], "0..6"),
    ],
)
def test_what_cannot_be_scored_is_refused(truth, prediction, text):
    with pytest.raises(ValueError, match=text):
        score_video(truth, prediction, 7)


def test_relaxed_modes_want_rules_that_fit():
    with pytest.raises(ValueError, match="needs the rules"):
        score_video([0], [0], 7, mode="relaxed_official")
    with pytest.raises(ValueError, match="8 phases"):
        score_video([0], [0], 8, mode="relaxed_official", rules=CHOLEC80)
    with pytest.raises(ValueError, match="unknown mode"):
        score_video([0], [0], 7, mode="lenient")


# Averages.


def test_mean_and_deviation_are_matlabs():
    assert mean_std([1.0, 2.0, 6.0]) == {"mean": 3.0, "std": pytest.approx(math.sqrt(7.0))}
    assert mean_std([5.0]) == {"mean": 5.0, "std": 0.0}
    assert mean_std([5.0, np.nan], skip_nan=True) == {"mean": 5.0, "std": 0.0}
    for undefined in (mean_std([5.0, np.nan]), mean_std([np.nan]), mean_std([np.nan], skip_nan=True)):
        assert math.isnan(undefined["mean"])
        assert math.isnan(undefined["std"])


def test_over_videos_first_and_then_over_phases():
    videos = [video("a", [0, 0, 1, 1], [0, 0, 1, 0]), video("b", [0, 0, 0, 0], [0, 0, 1, 1])]
    block = evaluate(videos, ("one", "two"), "own")["strict"]
    assert block["accuracy"] == {"mean": 62.5, "std": pytest.approx(25 / math.sqrt(2))}
    # Recall of phase one: (100 + 50) / 2; of phase two, which only video a has: 50.
    assert block["recall"] == {"mean": 62.5, "std": pytest.approx(25 / math.sqrt(2))}
    assert block["per_phase"]["recall"]["two"] == {"mean": 50.0, "std": 0.0}
    assert block["over_videos"]["recall"] == {"mean": 62.5, "std": pytest.approx(25 / math.sqrt(2))}
    assert block["per_video"]["b"]["recall"] == 50.0
    assert block["per_video"]["b"]["per_phase"]["recall"] == {"one": 50.0, "two": None}


def test_a_phase_absent_from_every_video_makes_the_official_means_undefined_as_in_the_script():
    truth, prediction = expand([(2, 2, 20), (3, 3, 20), (3, 2, 2)])
    metrics = evaluate([video("a", truth, prediction)], CHOLEC80_PHASES, "cholec80")
    official = metrics["relaxed_official"]
    assert official["jaccard"] == official["recall"] == {"mean": None, "std": None}
    assert official["precision"]["mean"] == pytest.approx((100 * 20 / 22 + 100) / 2)
    assert metrics["strict"]["recall"]["mean"] == pytest.approx((100 + 100 * 20 / 22) / 2)
    assert len(metrics["phases_absent_from_truth"]) == 5
    json.dumps(metrics, allow_nan=False)


@pytest.mark.parametrize(("label_set", "phases"), [("cholec80", CHOLEC80_PHASES), ("m2cai16", M2CAI16_PHASES)])
def test_a_perfect_prediction_has_100_everywhere(label_set, phases):
    truth = np.repeat(np.arange(len(phases)), 15)
    confidence = np.ones(len(truth))
    metrics = evaluate([video(name, truth, truth, confidence=confidence) for name in ("a", "b")], phases, label_set)
    for mode in MODES:
        for name in ("accuracy", "precision", "recall", "jaccard", "f1"):
            assert metrics[mode][name] == {"mean": 100.0, "std": 0.0}
    assert metrics["segmental"]["edit"]["mean"] == 100.0
    for key in ("f1@10", "f1@25", "f1@50"):
        assert metrics["segmental"][key] == {"pooled": 100.0, "mean": 100.0, "std": 0.0}
    assert metrics["calibration"]["ece"] == 0.0
    assert np.array_equal(metrics["confusion"], np.diag([30] * len(phases)))


def test_other_label_sets_have_no_relaxed_figures():
    metrics = evaluate([video("a", [0, 1], [0, 1])], ("one", "two"), "own")
    assert metrics["relaxed_official"] is None
    assert metrics["relaxed_corrected"] is None


def test_videos_that_cannot_be_evaluated_are_named():
    with pytest.raises(ValueError, match="no videos"):
        evaluate([], CHOLEC80_PHASES, "cholec80")
    with pytest.raises(ValueError, match="twice: a"):
        evaluate([video("a", [0], [0])] * 2, CHOLEC80_PHASES, "cholec80")
    with pytest.raises(ValueError, match=r"video b: .*0\.\.6"):
        evaluate([video("a", [0], [0]), video("b", [9], [0])], CHOLEC80_PHASES, "cholec80")


# The official script itself. Expected values: Evaluate.m as published with TMRNet, and its M2CAI16 variant, run in
# GNU Octave 7.3 on these sequences and averaged as its main script does.

OFFICIAL_VIDEOS = {
    "a": [
        *((1, 1, 20), (1, 2, 6), (2, 1, 5), (2, 2, 40), (2, 4, 3), (2, 3, 8), (3, 2, 12), (3, 3, 9), (3, 4, 4)),
        *((4, 3, 2), (4, 4, 50), (4, 6, 7), (4, 5, 5), (5, 4, 3), (5, 5, 2), (5, 7, 3), (6, 5, 6), (6, 4, 5)),
        *((6, 6, 30), (6, 7, 9), (7, 5, 4), (7, 6, 4), (7, 7, 25)),
    ],
    "b": [
        *((1, 2, 3), (2, 1, 12), (2, 2, 31), (2, 3, 14), (3, 3, 4), (3, 4, 4), (4, 4, 60), (4, 3, 5), (4, 4, 11)),
        *((4, 6, 4), (6, 4, 7), (6, 6, 13), (5, 6, 9), (5, 5, 5), (7, 5, 12), (7, 6, 3), (7, 7, 2)),
    ],
    "c": [
        *((2, 2, 25), (2, 1, 4), (2, 2, 16), (3, 4, 15), (4, 4, 33), (4, 2, 6), (4, 5, 9), (5, 6, 8), (6, 6, 21)),
        *((6, 5, 3), (7, 6, 5)),
    ],
}
SHIFTED = {name: [(y + 1, p + 1, n) for y, p, n in runs] for name, runs in OFFICIAL_VIDEOS.items()}
SHIFTED["a"] = [(1, 1, 9), (1, 2, 4), *SHIFTED["a"]]
SHIFTED["c"] = [(1, 3, 5), *SHIFTED["c"]]


def check_official(videos, phases, label_set, rate_hz, means, jaccard):
    metrics = evaluate(
        [video(name, *expand(runs), rate_hz=rate_hz) for name, runs in videos.items()], phases, label_set
    )
    block = metrics["relaxed_official"]
    for name, (mean, std) in means.items():
        assert block[name]["mean"] == pytest.approx(mean, abs=1e-7), name
        assert block[name]["std"] == pytest.approx(std, abs=1e-7), name
    np.testing.assert_allclose([block["per_phase"]["jaccard"][phase]["mean"] for phase in phases], jaccard, atol=1e-7)


def test_cholec80_figures_are_the_official_scripts():
    check_official(
        OFFICIAL_VIDEOS,
        CHOLEC80_PHASES,
        "cholec80",
        1.0,
        {
            "accuracy": (82.37277023, 0.861541325274),
            "precision": (92.7317934321, 7.38076875627),
            "recall": (92.9416611336, 5.75867437816),
            "jaccard": (73.6952819562, 11.3666124794),
        },
        [83.6559139785, 76.0166048401, 52.0987654321, 77.6824675559, 65.0613154961, 77.8224946258, 83.5294117647],
    )


def test_m2cai16_figures_are_the_official_scripts():
    check_official(
        SHIFTED,
        M2CAI16_PHASES,
        "m2cai16",
        1.0,
        {
            "accuracy": (81.3755646921, 2.35322299574),
            "precision": (92.6442721662, 6.88472812218),
            "recall": (86.372030415, 20.16087654),
            "jaccard": (68.594520617, 15.8107418287),
        },
        [
            *(38.4615384615, 80.4761904762, 73.623981124, 52.0987654321),
            *(77.6824675559, 65.0613154961, 77.8224946258, 83.5294117647),
        ],
    )


def test_m2cai16_figures_at_25_fps_are_the_official_scripts():
    check_official(
        SHIFTED,
        M2CAI16_PHASES,
        "m2cai16",
        25.0,
        {
            "accuracy": (97.1919191919, 3.95676047723),
            "precision": (99.4391025641, 1.58645752189),
            "recall": (93.75, 17.6776695297),
            "jaccard": (92.2075754552, 17.3053917022),
        },
        [50, 100, 92.101029601, 100, 95.5595740406, 100, 100, 100],
    )


# A second implementation, written from the rules alone: loops, 1-based positions, no arrays.


def slow_scores(truth, prediction, phases, mode, window, late_two_from, early_two_from):
    n = len(truth)
    y = {s: truth[s - 1] + 1 for s in range(1, n + 1)}
    p = {s: prediction[s - 1] + 1 for s in range(1, n + 1)}
    u = {s: p[s] - y[s] for s in y}
    for phase in range(1, phases + 1):
        s = 1
        while s <= n and mode != "strict":
            if y[s] != phase or (s > 1 and y[s - 1] == phase):
                s += 1
                continue
            end = s
            while end < n and y[end + 1] == phase:
                end += 1
            length = end - s + 1
            t = min(window, length)
            late = [-1, -2] if phase >= late_two_from else [-1]
            early = [1, 2] if phase >= early_two_from else [1]
            late_mask = [u[s + k] in late for k in range(t)]
            for k in range(t):
                if late_mask[k]:
                    u[s + k] = 0
            early_mask = [u[end - t + 1 + k] in early for k in range(t)]
            for k in range(t):
                if early_mask[k]:
                    u[s + k if mode == "relaxed_official" else end - t + 1 + k] = 0
            s = end + 1
    columns = []
    for phase in range(1, phases + 1):
        in_truth = [s for s in y if y[s] == phase]
        predicted = [s for s in p if p[s] == phase]
        if not in_truth:
            columns.append((None, None, None))
            continue
        either = set(in_truth) | set(predicted)
        tp = sum(1 for s in either if u[s] == 0)
        precision = 100.0 if tp else None
        if predicted:
            precision = min(100.0 * tp / len(predicted), 100.0)
        columns.append((precision, min(100.0 * tp / len(in_truth), 100.0), min(100.0 * tp / len(either), 100.0)))
    return 100.0 * sum(1 for s in u if u[s] == 0) / n, columns


def slow_block(videos, phases, mode, window, late_two_from, early_two_from):
    results = [
        slow_scores(y, p, phases, mode, 10 if len(y) == 1 else window, late_two_from, early_two_from) for y, p in videos
    ]

    def deviation(values):
        if len(values) == 1:
            return 0.0
        mean = sum(values) / len(values)
        return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))

    accuracies = [accuracy for accuracy, _ in results]
    block = {"accuracy": (sum(accuracies) / len(accuracies), deviation(accuracies))}
    for k, name in enumerate(("precision", "recall", "jaccard")):
        means = []
        for phase in range(phases):
            values = [columns[phase][k] for _, columns in results if columns[phase][k] is not None]
            means.append(sum(values) / len(values) if values else None)
        if None in means and mode == "relaxed_official" and name != "precision":
            block[name] = (None, None)
            continue
        means = [mean for mean in means if mean is not None]
        block[name] = (sum(means) / len(means), deviation(means)) if means else (None, None)
    return block


@st.composite
def predicted_video(draw, phases):
    """A truth of segments and a prediction with shifted ends, blips of near phases, or nothing to do with it."""
    runs = draw(st.lists(st.tuples(st.integers(0, phases - 1), st.integers(1, 35)), min_size=1, max_size=9))
    truth = [phase for phase, length in runs for _ in range(length)]
    shift = draw(st.integers(-14, 14))
    prediction = [truth[min(max(i + shift, 0), len(truth) - 1)] for i in range(len(truth))]
    blips = draw(
        st.lists(st.tuples(st.integers(0, len(truth) - 1), st.integers(1, 12), st.integers(-3, 3)), max_size=8)
    )
    for start, length, change in blips:
        for i in range(start, min(start + length, len(truth))):
            prediction[i] = min(max(truth[i] + change, 0), phases - 1)
    return truth, prediction


@settings(deadline=None, derandomize=True, max_examples=150)
@given(st.data(), st.sampled_from(["cholec80", "m2cai16"]), st.sampled_from([1.0, 0.4, 2.0]))
def test_figures_are_those_of_the_slow_implementation(data, label_set, rate_hz):
    names = {"cholec80": CHOLEC80_PHASES, "m2cai16": M2CAI16_PHASES}[label_set]
    late, early = {"cholec80": (6, 4), "m2cai16": (7, 5)}[label_set]
    pairs = data.draw(st.lists(predicted_video(len(names)), min_size=1, max_size=4))
    videos = [video(f"v{i}", *pair, rate_hz=rate_hz) for i, pair in enumerate(pairs)]
    metrics = evaluate(videos, names, label_set)
    for mode in MODES:
        expected_block = slow_block(pairs, len(names), mode, int(10 * rate_hz), late, early)
        for name, expected in expected_block.items():
            found = metrics[mode][name]
            for key, value in zip(("mean", "std"), expected, strict=True):
                assert found[key] == (None if value is None else pytest.approx(value, abs=1e-9)), (mode, name)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(predicted_video(7))
def test_strict_scores_are_scikit_learns(pair):
    truth, prediction = map(np.array, pair)
    scores = score_video(truth, prediction, 7)
    present, predicted = np.unique(truth), np.unique(prediction)
    for name, reference in (("recall", recall_score), ("jaccard", jaccard_score), ("f1", f1_score)):
        expected = 100 * reference(truth, prediction, labels=present, average=None, zero_division=0)
        np.testing.assert_allclose(getattr(scores, name)[present], expected, atol=1e-9)
    both = np.intersect1d(present, predicted)
    expected = 100 * precision_score(truth, prediction, labels=both, average=None, zero_division=0)
    np.testing.assert_allclose(scores.precision[both], expected, atol=1e-9)


# Segments (MS-TCN).


def test_segments():
    assert list(segments([2, 2, 0, 2])) == [(2, 0, 2), (0, 2, 3), (2, 3, 4)]
    assert list(segments([])) == []


def test_edit_score_by_hand():
    assert edit_score([0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 1, 2]) == 100.0
    # 0 1 2 against 0 1 0 1 2: two insertions, five segments.
    assert edit_score([0, 0, 0, 1, 1, 2], [0, 1, 0, 1, 1, 2]) == pytest.approx(100 * (1 - 2 / 5))
    # 0 1 2 against 3: two deletions and a change.
    assert edit_score([0, 1, 2], [3, 3, 3]) == 0.0
    assert edit_score([0, 1], [1, 0]) == 0.0
    assert edit_score([0, 1, 2, 3], [1, 2, 3, 3]) == pytest.approx(75.0)


def test_segment_f1_by_hand():
    truth = [0] * 10 + [1] * 10 + [2] * 10
    prediction = [0] * 4 + [1] * 4 + [0] * 2 + [1] * 10 + [2] * 10
    # Predicted: 0 (IoU 4/10), 1 (IoU 0 with 10..20), 0 again (2/10), 1 (10/10), 2 (10/10).
    assert segment_hits(truth, prediction, 0.10) == (3, 2, 0)
    assert segment_hits(truth, prediction, 0.25) == (3, 2, 0)
    assert segment_hits(truth, prediction, 0.50) == (2, 3, 1)
    assert segment_f1((3, 2, 0)) == pytest.approx(600 / 8)
    assert segment_f1((2, 3, 1)) == 50.0


def test_a_true_segment_is_hit_once_and_an_overlap_at_the_threshold_counts():
    truth = [0] * 10
    assert segment_hits(truth, [0] * 5 + [1] * 5, 0.5) == (1, 1, 0)
    assert segment_hits(truth, [0] * 4 + [1] * 6, 0.5) == (0, 2, 1)
    assert segment_hits(truth, [0] * 4 + [1] * 2 + [0] * 4, 0.25) == (1, 2, 0)


def test_a_tie_goes_to_the_first_true_segment():
    # The prediction 0 at 2..8 overlaps both true segments of 0 by 2 of 8; a second one hits the second.
    truth = [0] * 4 + [1] * 2 + [0] * 4
    prediction = [1, 1] + [0] * 6 + [1, 1]
    assert segment_hits(truth, prediction, 0.25) == (1, 2, 2)


def test_segment_f1_is_pooled_and_by_video():
    perfect = video("a", [0] * 5 + [1] * 5, [0] * 5 + [1] * 5)
    wrong = video("b", [0] * 10, [1] * 10)
    found = evaluate([perfect, wrong], ("one", "two"), "own")["segmental"]["f1@50"]
    assert found["mean"] == 50.0
    assert found["pooled"] == pytest.approx(200 * 2 / (2 * 2 + 1 + 1))


# Calibration.


def test_calibration_error_by_hand():
    confidence = [0.95, 0.95, 0.95, 0.95, 0.55, 0.55]
    right = [1, 1, 1, 0, 0, 1]
    found = reliability(confidence, right, bins=10)
    assert found.count.tolist() == [0, 0, 0, 0, 0, 2, 0, 0, 0, 4]
    np.testing.assert_allclose(found.accuracy[[5, 9]], [0.5, 0.75])
    assert found.ece == pytest.approx(4 / 6 * 0.20 + 2 / 6 * 0.05)
    assert np.isnan(found.accuracy[0])


def test_bins_include_their_upper_end():
    found = reliability([0.0, 0.1, 0.2, 0.2000001, 1.0], [1] * 5, bins=10)
    assert found.count.tolist() == [2, 1, 1, 0, 0, 0, 0, 0, 0, 1]


def test_calibration_is_of_the_published_phase_and_skips_what_has_no_confidence():
    one = video("a", [0, 0, 1, -1], [0, 1, 1, 0], confidence=np.array([0.8, 0.6, np.nan, 0.1]))
    found = evaluate([one], ("one", "two"), "own")["calibration"]
    assert sum(entry["count"] for entry in found["bins"]) == 2
    assert len(found["bins"]) == 15
    assert found["ece"] == pytest.approx((0.2 + 0.6) / 2)
    assert evaluate([one, video("b", [0], [0])], ("one", "two"), "own")["calibration"] is None


def test_confusion_has_true_phases_in_rows():
    assert confusion([0, 0, 1, 2], [0, 2, 1, 2], 3).tolist() == [[1, 0, 1], [0, 1, 0], [0, 0, 1]]


# Real label sequences of Cholec80.


def disturbed(truth, rng):
    """A realistic prediction: transitions early or late by some seconds, and blips of near phases."""
    prediction = truth.copy()
    runs = list(segments(truth))
    for (before, start, middle), (after, _, end) in itertools.pairwise(runs):
        shift = int(rng.normal(0, 15))
        if shift > 0:
            prediction[middle : min(middle + shift, end)] = before
        else:
            prediction[max(middle + shift, start) : middle] = after
    for start in rng.integers(0, len(truth), len(truth) // 200):
        prediction[start : start + rng.integers(1, 25)] = np.clip(truth[start] + rng.choice([-2, -1, 1, 2]), 0, 6)
    return prediction


def test_the_bug_costs_what_the_literature_says_on_real_labels(shared_data):
    tracks = read_phase_folder(shared_data / "cholec80" / "labels" / "phase_1fps", [str(n) for n in range(41, 81)])
    rng = np.random.default_rng(0)
    videos = [
        VideoPhases(name, tracks[name].frames / 25.0, truth, disturbed(truth, rng))
        for name, truth in phase_indices(tracks, CHOLEC80_PHASES, None).items()
    ]
    metrics = evaluate(videos, CHOLEC80_PHASES, "cholec80")
    strict, official, corrected = (metrics[mode] for mode in MODES)
    gains = {
        name: corrected[name]["mean"] - official[name]["mean"]
        for name in ("accuracy", "precision", "recall", "jaccard")
    }
    print(f"corrected minus official on the labels of videos 41 to 80: {gains}")
    assert len(videos) == 40
    assert 0.5 < gains["accuracy"] < 2.0
    assert 1.5 < gains["jaccard"] < 6.0
    for name in gains:
        assert strict[name]["mean"] < official[name]["mean"] < corrected[name]["mean"]
