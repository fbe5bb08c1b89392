# SPDX-License-Identifier: Apache-2.0
"""The filter follows time and not the frame rate, and changes its mind only on lasting evidence."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surg_perception.stream.temporal_filter import FilterSettings, TemporalFilter

OFF = FilterSettings(time_constant_s=0.0, switch_margin=0.0, hold_s=0.0, reset_gap_s=10.0)


def certain(phase, confidence=1.0, classes=3):
    rest = (1.0 - confidence) / (classes - 1)
    return np.array([confidence if c == phase else rest for c in range(classes)])


def run(settings, steps, classes=3):
    """Filter output for (stamp_s, probabilities) pairs."""
    temporal = TemporalFilter(classes, settings)
    return [temporal.update(probabilities, stamp_s) for stamp_s, probabilities in steps]


def test_switched_off_it_passes_everything_through():
    frames = np.random.default_rng(0).dirichlet(np.ones(3), 50)
    for frame, result in zip(frames, run(OFF, enumerate(frames)), strict=True):
        assert result.phase_id == frame.argmax()
        np.testing.assert_allclose(result.probabilities, frame, atol=1e-6)
        assert result.confidence == pytest.approx(frame.max())


def test_a_step_is_followed_with_the_time_constant():
    smooth = FilterSettings(time_constant_s=2.0, switch_margin=0.0, hold_s=0.0)
    result = run(smooth, [(0.0, certain(0)), (3.0, certain(1))])[-1]
    expected = 1 - math.exp(-3.0 / 2.0)
    np.testing.assert_allclose(result.probabilities, [1 - expected, expected, 0], atol=1e-6)
    assert result.phase_id == 1
    assert result.confidence == pytest.approx(expected)


@pytest.mark.parametrize("rate_hz", [1, 5, 25, 60])
def test_the_response_does_not_depend_on_the_frame_rate(rate_hz):
    steps = [(0.0, certain(0))] + [(k / rate_hz, certain(1)) for k in range(1, 4 * rate_hz + 1)]
    result = run(FilterSettings(time_constant_s=1.5, switch_margin=0.1, hold_s=0.5), steps)[-1]
    np.testing.assert_allclose(result.probabilities[0], math.exp(-4 / 1.5), atol=1e-6)


def test_a_repeated_stamp_has_no_weight():
    results = run(FilterSettings(time_constant_s=1.0), [(5.0, certain(0))] + [(5.0, certain(1))] * 100)
    np.testing.assert_allclose(results[-1].probabilities, certain(0))


def switch_times(hold_s, margin, steps, **rest):
    held = FilterSettings(time_constant_s=0.0, switch_margin=margin, hold_s=hold_s, **rest)
    phases = [result.phase_id for result in run(held, steps)]
    return [steps[k][0] for k in range(1, len(steps)) if phases[k] != phases[k - 1]]


def test_a_challenger_must_hold_for_hold_s():
    steps = [(k / 4, certain(0 if k < 8 else 1)) for k in range(24)]
    assert switch_times(0.0, 0.1, steps) == [2.0]
    assert switch_times(1.0, 0.1, steps) == [3.0]
    assert switch_times(1.1, 0.1, steps) == [3.25]
    assert switch_times(60.0, 0.1, steps) == []


def test_an_interruption_starts_the_hold_again():
    phase = [0] * 4 + [1] * 3 + [0] + [1] * 12
    steps = [(k / 4, certain(p)) for k, p in enumerate(phase)]
    assert switch_times(1.0, 0.1, steps) == [3.0]  # ahead again from 2.0 s on


def test_a_challenger_within_the_margin_changes_nothing():
    steps = [(float(k), np.array([0.45, 0.55, 0.0]) if k else certain(0)) for k in range(9)]
    assert switch_times(1.0, 0.11, steps) == []
    assert switch_times(1.0, 0.09, steps) == [2.0]


def test_challengers_that_take_turns_do_not_protect_the_incumbent():
    turns = [np.array([0.0, 0.6, 0.4]), np.array([0.0, 0.4, 0.6])]
    steps = [(0.0, certain(0))] + [(1.0 + k / 4, turns[k % 2]) for k in range(8)]
    assert switch_times(1.0, 0.1, steps) == [2.0]
    results = run(FilterSettings(0.0, 0.1, 1.0), steps)
    assert results[5].phase_id == 1  # the one ahead at that moment


def test_confidence_is_that_of_the_published_phase():
    results = run(FilterSettings(0.0, 0.1, hold_s=5.0), [(0.0, certain(0, 0.8)), (1.0, certain(1, 0.9))])
    assert results[1].phase_id == 0
    assert results[1].confidence == pytest.approx(0.05)


@pytest.mark.parametrize(("stamp_s", "anew"), [(9.9, True), (10.0, False), (15.0, False), (15.1, True)])
def test_stamps_that_go_back_or_jump_start_anew(stamp_s, anew):
    settings = FilterSettings(time_constant_s=100.0, switch_margin=0.1, hold_s=2.0, reset_gap_s=5.0)
    result = run(settings, [(9.0, certain(0)), (10.0, certain(0)), (stamp_s, certain(1))])[-1]
    assert result.phase_id == (1 if anew else 0)
    assert (result.confidence == pytest.approx(1.0)) == (anew or stamp_s == 10.0)


def test_a_reset_forgets_a_challenger_too():
    settings = FilterSettings(0.0, 0.1, hold_s=1.0, reset_gap_s=5.0)
    steps = [(0.0, certain(0)), (1.0, certain(1)), (100.0, certain(0)), (100.5, certain(1)), (101.0, certain(1))]
    assert [result.phase_id for result in run(settings, steps)] == [0, 0, 0, 0, 0]
    temporal = TemporalFilter(3, settings)
    temporal.update(certain(0), 0.0)
    temporal.reset()
    assert temporal.update(certain(2), 0.1).phase_id == 2


def test_an_infinite_gap_never_starts_anew():
    settings = FilterSettings(time_constant_s=1e3, reset_gap_s=math.inf)
    assert run(settings, [(0.0, certain(0)), (100.0, certain(1))])[-1].phase_id == 0


def test_settings_act_from_the_next_frame_on_and_keep_the_state():
    temporal = TemporalFilter(3, FilterSettings(time_constant_s=1e3, hold_s=0.0))
    temporal.update(certain(0), 0.0)
    assert temporal.update(certain(1), 1.0).phase_id == 0
    temporal.settings = OFF
    assert temporal.update(certain(1), 2.0).phase_id == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("time_constant_s", -0.1),
        ("time_constant_s", math.inf),
        ("time_constant_s", math.nan),
        ("switch_margin", -0.01),
        ("switch_margin", 1.01),
        ("hold_s", -1.0),
        ("hold_s", math.nan),
        ("reset_gap_s", 0.0),
        ("reset_gap_s", -1.0),
        ("reset_gap_s", math.nan),
    ],
)
def test_impossible_settings_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        FilterSettings(**{name: value})


@pytest.mark.parametrize(
    ("probabilities", "stamp_s", "says"),
    [
        ([0.5, 0.5], 2.0, r"shape \(2,\), expected \(3,\)"),
        ([[0.2, 0.3, 0.5]], 2.0, r"shape \(1, 3\)"),
        ([0.5, math.nan, 0.5], 2.0, "not finite"),
        ([0.5, math.inf, 0.5], 2.0, "not finite"),
        ([0.2, 0.3, 0.5], math.nan, "not finite"),
    ],
)
def test_bad_input_is_refused_and_leaves_no_trace(probabilities, stamp_s, says):
    steps = [(0.0, certain(0)), (1.0, certain(1)), (3.0, certain(1))]
    temporal = TemporalFilter(3, FilterSettings())
    for stamp, frame in steps[:2]:
        temporal.update(frame, stamp)
    with pytest.raises(ValueError, match=says):
        temporal.update(probabilities, stamp_s)
    after = temporal.update(steps[2][1], steps[2][0])
    np.testing.assert_array_equal(after.probabilities, run(FilterSettings(), steps)[-1].probabilities)


def test_at_least_one_class_is_needed():
    with pytest.raises(ValueError, match="num_classes is 0"):
        TemporalFilter(0)
    assert TemporalFilter(1).update([1.0], 0.0) == (0, 1.0, np.ones(1, np.float32))


def test_the_input_is_kept_as_it_was_and_outputs_are_independent():
    temporal = TemporalFilter(3, FilterSettings())
    frame = certain(0)
    first = temporal.update(frame, 0.0)
    before = first.probabilities.copy()
    temporal.update(certain(1), 1.0)
    np.testing.assert_array_equal(frame, certain(0))
    np.testing.assert_array_equal(first.probabilities, before)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    time_constant_s=st.sampled_from([0.0, 0.3, 5.0]),
    margin=st.sampled_from([0.0, 0.1, 0.5]),
    hold_s=st.sampled_from([0.0, 0.4, 3.0]),
    start_s=st.sampled_from([0.0, 1.7e9]),
)
def test_it_is_deterministic_causal_and_a_distribution(seed, time_constant_s, margin, hold_s, start_s):
    rng = np.random.default_rng(seed)
    stamps = start_s + np.cumsum(rng.exponential(0.3, 60))
    frames = rng.dirichlet(np.full(7, 0.3), 60)
    held = FilterSettings(time_constant_s, margin, hold_s)
    steps = list(zip(stamps, frames, strict=True))
    results = run(held, steps, 7)
    for result, again in zip(results[:30], run(held, steps[:30], 7), strict=True):
        assert result.phase_id == again.phase_id
        np.testing.assert_array_equal(result.probabilities, again.probabilities)
    last_switch_s = stamps[0]
    for k in range(1, len(results)):
        assert results[k].probabilities.sum() == pytest.approx(1.0, abs=1e-5)
        assert results[k].probabilities.min() >= 0.0
        assert results[k].confidence == pytest.approx(float(results[k].probabilities[results[k].phase_id]))
        if results[k].phase_id != results[k - 1].phase_id:
            assert stamps[k] - last_switch_s >= hold_s
            smoothed = results[k].probabilities
            assert smoothed[results[k].phase_id] - smoothed[results[k - 1].phase_id] > margin - 1e-6
            last_switch_s = stamps[k]
