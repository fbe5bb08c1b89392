# SPDX-License-Identifier: Apache-2.0
"""The phantom: exact labels, the same picture for the same arguments, a whole procedure."""

from __future__ import annotations

import dataclasses
import itertools

import cv2
import numpy as np
import pytest

from surg_perception.data.labels import CHOLEC80_PHASES, CHOLECT50_INSTRUMENTS, CHOLECT50_TARGETS, CHOLECT50_VERBS
from surg_perception.data.phantom import FrameLabels, Phantom
from surg_perception.data.phantom_script import Script

HOOK = CHOLECT50_INSTRUMENTS.index("hook")
NULL_VERB = CHOLECT50_VERBS.index("null_verb")

# What CholecT50's triplet table allows, for the combinations that the phantom plays.
PLAUSIBLE = {
    "grasper": {
        "retract": {"gallbladder", "omentum", "liver"},
        "grasp": {"gallbladder", "omentum", "specimen_bag"},
        "pack": {"gallbladder"},
    },
    "bipolar": {"coagulate": {"blood_vessel", "liver", "cystic_plate"}},
    "hook": {
        "dissect": {"gallbladder", "cystic_plate", "cystic_duct", "cystic_artery", "peritoneum"},
        "coagulate": {"liver", "cystic_pedicle"},
    },
    "scissors": {"cut": {"cystic_duct", "cystic_artery", "adhesion"}},
    "clipper": {"clip": {"cystic_duct", "cystic_artery"}},
    "irrigator": {"aspirate": {"fluid"}, "irrigate": {"liver", "abdominal_wall_cavity"}},
}


@pytest.fixture(scope="module")
def phantom() -> Phantom:
    return Phantom(320, 240, rate_hz=10.0, seed=3, duration_s=90.0)


@pytest.fixture(scope="module")
def all_labels(phantom: Phantom) -> list[FrameLabels]:
    return [phantom.labels(i) for i in range(0, len(phantom), 3)]


def indices_with_tools(phantom: Phantom, labels: list[FrameLabels], count: int) -> list[int]:
    found = [frame.index for frame in labels if frame.instruments]
    return [found[k] for k in np.linspace(0, len(found) - 1, count).astype(int)]


def test_frames_are_the_same_for_the_same_arguments_in_any_order() -> None:
    order = [140, 3, 77, 140, 199, 20, 160]
    first = Phantom(160, 120, rate_hz=10.0, seed=5, duration_s=20.0)
    second = Phantom(160, 120, rate_hz=10.0, seed=5, duration_s=20.0)
    forwards = {i: second.frame(i) for i in sorted(set(order))}
    for i in order:
        bgr, labels = first.frame(i)
        np.testing.assert_array_equal(bgr, forwards[i][0])
        assert labels == forwards[i][1]


def test_global_random_state_is_neither_read_nor_changed() -> None:
    np.random.seed(1)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    a = Phantom(64, 64, rate_hz=5.0, seed=1, duration_s=5.0).frame(12)[0]
    np.testing.assert_array_equal(before, np.random.get_state()[1])  # noqa: NPY002
    np.random.seed(2)  # noqa: NPY002
    np.testing.assert_array_equal(a, Phantom(64, 64, rate_hz=5.0, seed=1, duration_s=5.0).frame(12)[0])


@pytest.mark.parametrize(("width", "height"), [(64, 64), (854, 480), (1920, 1080), (100, 400), (401, 97), (250, 250)])
def test_any_size_gives_a_contiguous_bgr_picture_with_dark_corners(width: int, height: int) -> None:
    bgr, labels = Phantom(width, height, seed=2, duration_s=10.0).frame(150)
    assert bgr.shape == (height, width, 3)
    assert bgr.dtype == np.uint8
    assert bgr.flags["C_CONTIGUOUS"]
    corners = bgr[:: height - 1, :: width - 1].reshape(-1, 3)
    assert corners.max() < 16
    centre = bgr[2 * height // 5 : 3 * height // 5, 2 * width // 5 : 3 * width // 5]
    assert centre.mean() > 30
    assert labels.index == 150


def test_phases_come_in_order_without_gaps_and_labels_agree(phantom: Phantom, all_labels: list[FrameLabels]) -> None:
    phases = phantom.phases
    assert [phase for _, _, phase in phases] == list(range(len(CHOLEC80_PHASES)))
    assert phases[0][0] == 0.0
    assert phases[-1][1] == pytest.approx(phantom.duration_s)
    for (_, end_s, _), (start_s, _, _) in itertools.pairwise(phases):
        assert end_s == start_s
    for frame in all_labels:
        start_s, end_s, _ = phases[frame.phase]
        assert start_s <= frame.time_s < end_s
    assert {frame.phase for frame in all_labels} == set(range(7))


def test_phase_durations_follow_cholec80() -> None:
    shares = np.array([[b - a for a, b, _ in Script(seed, 100.0).phases] for seed in range(200)])
    measured = [4.65, 40.56, 7.63, 31.67, 4.13, 7.77, 3.60]  # % of all labelled seconds of the 80 videos
    np.testing.assert_allclose(shares.mean(axis=0), measured, atol=5.0)
    assert shares.std(axis=0).min() > 1.0
    assert shares.min() > 1.0


def test_labels_are_in_range_plausible_and_the_same_without_drawing(
    phantom: Phantom, all_labels: list[FrameLabels]
) -> None:
    for frame in all_labels:
        assert frame.time_s == pytest.approx(frame.index / phantom.rate_hz)
        assert frame.triplets == tuple((i.instrument, i.verb, i.target) for i in frame.instruments)
        for label in frame.instruments:
            left, top, width, height = label.box
            assert min(left, top) >= 0.0
            assert min(width, height) > 0.0
            assert max(left + width, top + height) <= 1.0 + 1e-9
            kind, verb = CHOLECT50_INSTRUMENTS[label.instrument], CHOLECT50_VERBS[label.verb]
            target = CHOLECT50_TARGETS[label.target]
            if verb == "null_verb":
                assert target == "null_target"
            else:
                assert target in PLAUSIBLE[kind][verb]
    for i in indices_with_tools(phantom, all_labels, 5):
        assert phantom.frame(i)[1] == phantom.labels(i)
    with pytest.raises(dataclasses.FrozenInstanceError):
        all_labels[0].phase = 1  # type: ignore[misc]


@pytest.mark.parametrize("seed", [0, 4, 11])
def test_all_six_instruments_are_seen_in_a_procedure_and_in_their_phases(seed: int) -> None:
    phantom = Phantom(96, 96, rate_hz=4.0, seed=seed, duration_s=90.0)
    seen: dict[int, set[str]] = {phase: set() for phase in range(7)}
    for i in range(len(phantom)):
        frame = phantom.labels(i)
        seen[frame.phase] |= {CHOLECT50_INSTRUMENTS[label.instrument] for label in frame.instruments}
    assert set.union(*seen.values()) == set(CHOLECT50_INSTRUMENTS)
    assert {"clipper", "scissors"} <= seen[2]
    assert "hook" in seen[1] & seen[3]
    assert "hook" not in seen[0] | seen[2] | seen[4] | seen[5] | seen[6]
    assert {"irrigator", "bipolar"} <= seen[5]


@pytest.mark.parametrize("seed", [3, 8])
def test_boxes_enclose_exactly_the_drawn_pixels(seed: int) -> None:
    """Leave one instrument's sprite out (its shadow stays): what changes is the instrument, its bound is the box."""
    phantom = Phantom(427, 240, rate_hz=5.0, seed=seed, duration_s=60.0)
    checked: set[int] = set()
    visits = phantom._script.visits
    firsts = [next(v.acts[0] for v in visits if v.instrument == kind) for kind in range(len(CHOLECT50_INSTRUMENTS))]
    acting = {round(0.5 * (act.start_s + act.end_s) * phantom.rate_hz) for act in firsts}
    for i in sorted(acting | set(range(0, len(phantom), 17))):
        state = phantom._script.state(phantom.time_s(i))
        bgr, frame = phantom.frame(i)
        mask = phantom.instrument_mask(i)
        visible = [n for n in range(1, len(state.tools) + 1) if (mask == n).any()]
        assert len(visible) == len(frame.instruments)
        for number, label in zip(visible, frame.instruments, strict=True):
            without, _ = phantom._renderer.draw(state, i, hide=frozenset({number}))
            changed = np.abs(bgr.astype(int) - without.astype(int)).max(axis=2) > 2
            ys, xs = np.nonzero(changed)
            if len(xs) < 60:
                continue  # all but covered, or in the dark
            left, top, width, height = np.array(label.box) * [427, 240, 427, 240]
            assert xs.min() >= left - 2.5
            assert ys.min() >= top - 2.5
            assert xs.max() + 1 <= left + width + 2.5
            assert ys.max() + 1 <= top + height + 2.5
            bright = without.max(axis=2) > 40  # in the dark rim a dark shaft changes nothing
            lit = (mask == number) & bright
            assert changed[lit].sum() >= 0.9 * lit.sum()
            widened = cv2.dilate((mask == number).astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
            assert (changed & ~widened).sum() < 5
            own = np.nonzero(mask == number)
            np.testing.assert_allclose(
                [left, top, left + width, top + height],
                [own[1].min(), own[0].min(), own[1].max() + 1, own[0].max() + 1],
                atol=1e-6,
            )
            checked.add(label.instrument)
    assert checked == set(range(len(CHOLECT50_INSTRUMENTS)))


def test_nothing_is_labelled_outside_the_visible_circle(phantom: Phantom, all_labels: list[FrameLabels]) -> None:
    radius = phantom._renderer.radius
    cx, cy = phantom._renderer.centre
    yy, xx = np.mgrid[0 : phantom.height, 0 : phantom.width]
    outside = np.hypot(xx + 0.5 - cx, yy + 0.5 - cy) > radius + 1
    assert outside.any()
    for i in indices_with_tools(phantom, all_labels, 12):
        assert not phantom.instrument_mask(i)[outside].any()
    # At the very end the endoscope is in its trocar: a grey ring, no instruments.
    assert phantom.labels(len(phantom) - 1).instruments == ()


def test_an_instrument_out_of_view_has_no_label(phantom: Phantom) -> None:
    entering = next(v for v in phantom._script.visits if v.instrument == HOOK)
    just_in = phantom._script.state(entering.start_s + 1e-3)
    assert HOOK in {tool.instrument for tool in just_in.tools}
    number = [tool.instrument for tool in just_in.tools].index(HOOK) + 1
    assert not (phantom._renderer.instrument_mask(just_in) == number).any()


def test_the_hook_approaches_acts_and_withdraws(phantom: Phantom) -> None:
    """Verbs are null on the way, and the tip reaches the gallbladder's neighbourhood only while acting."""
    visit = next(v for v in phantom._script.visits if v.instrument == HOOK)
    step_s = 0.05
    verbs, distances = [], []
    goal = phantom._script.anatomy.neck
    for t in np.arange(visit.start_s, visit.end_s, step_s):
        tool = next(tool for tool in phantom._script.state(float(t)).tools if tool.instrument == HOOK)
        verbs.append(tool.verb)
        distances.append(float(np.hypot(*(tool.tip - goal))))
    assert verbs[0] == verbs[-1] == NULL_VERB
    acting = [d for d, v in zip(distances, verbs, strict=True) if v != NULL_VERB]
    assert acting
    assert max(acting) < 0.75
    assert min(distances[0], distances[-1]) > 1.2
    assert max(abs(a - b) for a, b in itertools.pairwise(distances)) < 0.35  # no jumps


def test_anatomy_changes_only_by_what_instruments_do(phantom: Phantom) -> None:
    script = phantom._script
    states = [script.state(float(t)) for t in np.linspace(0, phantom.duration_s, 400, endpoint=False)]
    for before, after in itertools.pairwise(states):
        assert after.expose >= before.expose
        assert after.detach >= before.detach
        assert set(before.clips) <= set(after.clips)
        assert before.cut <= after.cut
        acting = {CHOLECT50_INSTRUMENTS[t.instrument] for s in (before, after) for t in s.tools}
        if after.expose > before.expose or after.detach > before.detach:
            assert "hook" in acting
        if after.clips != before.clips:
            assert "clipper" in acting
        if after.cut != before.cut:
            assert "scissors" in acting
    last = states[-1]
    assert (last.expose, last.detach, len(last.clips), last.cut) == (1.0, 1.0, 5, {"duct", "artery"})
    assert last.spine is None
    assert last.bag is None


def test_the_gallbladder_leaves_the_picture(phantom: Phantom) -> None:
    """Pictures of the same place before and after differ far more than neighbouring frames."""
    dissection = phantom.phases[3]
    k = int(0.5 * (dissection[0] + dissection[1]) * phantom.rate_hz)
    near = np.abs(phantom.frame(k)[0].astype(int) - phantom.frame(k + 1)[0]).mean()
    late = int((phantom.phases[5][0] + 0.8) * phantom.rate_hz)
    far = np.abs(phantom.frame(k)[0].astype(int) - phantom.frame(late)[0]).mean()
    assert near > 0.1
    assert far > 3 * near


def test_seeds_are_different_patients() -> None:
    pictures = [Phantom(128, 128, rate_hz=5.0, seed=s, duration_s=30.0).frame(60)[0].astype(int) for s in range(6)]
    for a, b in itertools.combinations(pictures, 2):
        assert np.abs(a - b).mean() > 8


def test_phase_is_not_told_by_mean_colour_alone() -> None:
    """Nearest mean colour of the phases, learnt on some patients, must fail on others: no tint gives it away."""

    def table(seeds: range) -> tuple[np.ndarray, np.ndarray]:
        colours, phases = [], []
        for s in seeds:
            phantom = Phantom(64, 64, rate_hz=1.0, seed=s, duration_s=70.0)
            for start_s, end_s, phase in phantom.phases:
                for u in (0.3, 0.6):
                    index = min(len(phantom) - 1, int(start_s + u * (end_s - start_s)))
                    if phantom.labels(index).phase == phase:
                        colours.append(phantom.frame(index)[0].reshape(-1, 3).mean(axis=0))
                        phases.append(phase)
        return np.array(colours), np.array(phases)

    colours, phases = table(range(8))
    means = np.array([colours[phases == k].mean(axis=0) for k in range(7)])
    held_out, truth = table(range(20, 26))
    guess = np.linalg.norm(held_out[:, None] - means, axis=2).argmin(axis=1)
    assert (guess == truth).mean() < 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 63}, "width 63 found, expected a whole number from 64 to 1920"),
        ({"height": 1921}, "height 1921 found"),
        ({"width": 320.0}, "width 320.0 found"),
        ({"width": True}, "width True found"),
        ({"seed": -1}, "seed -1 found"),
        ({"rate_hz": 0.0}, "rate_hz 0.0 found, expected a number above 0"),
        ({"rate_hz": float("nan")}, "rate_hz nan found"),
        ({"duration_s": -5.0}, "duration_s -5.0 found"),
        ({"duration_s": float("inf")}, "duration_s inf found"),
        ({"duration_s": "long"}, "duration_s 'long' found"),
        ({"rate_hz": 1.0, "duration_s": 0.2}, "makes no frame"),
    ],
)
def test_bad_arguments_say_what_was_found_and_expected(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Phantom(**arguments)  # type: ignore[arg-type]


def test_frame_index_outside_raises(phantom: Phantom) -> None:
    assert len(phantom) == 900
    for index in (-1, 900):
        with pytest.raises(IndexError, match=f"frame index {index} found, expected 0 to 899"):
            phantom.frame(index)
        with pytest.raises(IndexError):
            phantom.labels(index)
    with pytest.raises(TypeError, match="expected an integer"):
        phantom.frame(1.5)  # type: ignore[arg-type]


def test_short_and_slow_procedures_still_work() -> None:
    tiny = Phantom(64, 64, rate_hz=200.0, seed=1, duration_s=0.5)
    assert {tiny.frame(i)[1].phase for i in range(len(tiny))} == set(range(7))
    slow = Phantom(64, 64, rate_hz=0.1, seed=1, duration_s=2400.0)
    assert len(slow) == 240
    assert slow.frame(239)[1].phase == 6
