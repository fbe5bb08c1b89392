# SPDX-License-Identifier: Apache-2.0
"""Answers are right for hand-made labels, balanced, repeatable, and files of three forms are read."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter, defaultdict
from dataclasses import replace

import pytest

from surg_perception.cli.main import parser
from surg_perception.data.clip_labels import TOOL_NAMES, ClipVideo, InstrumentState, SecondLabels, open_clip_videos
from surg_perception.data.frame_readers import NoFrames
from surg_perception.data.labels import CHOLEC80_PHASES, CHOLECT50_INSTRUMENTS, M2CAI16_PHASES
from surg_perception.surgllm import questions
from surg_perception.surgllm.questions import (
    KINDS,
    QUESTION_TYPES,
    TASKS,
    SampleError,
    long_caption,
    make_captions,
    make_samples,
    phase_name,
    read_samples,
    segment_answer,
    short_caption,
    write_samples,
)


def state(instrument, x=0.5, y=0.5, verb="null_verb", target="null_target", size=0.2):
    return InstrumentState(instrument, verb, target, (x - size / 2, y - size / 2, size, size))


def clip(seconds, name="v@0000", phase="Preparation", vocabulary=CHOLECT50_INSTRUMENTS, hold_s=1):
    """A clip from lists of instruments (None: not labelled), or from (phase, instruments)."""
    labels = []
    for second in seconds:
        own_phase, states = second if isinstance(second, tuple) else (phase, second)
        labels.append(SecondLabels(own_phase, None if states is None else tuple(states)))
    group = name.split("@")[0].split("+")[0]
    return ClipVideo(name, group, tuple(labels), vocabulary, hold_s, NoFrames("no pictures"), tuple(range(len(labels))))


def answers(seconds, *others, length=None, **options):
    """What the rules say about the window of all seconds, by type and subject; others are clips of the same video."""
    video = clip(seconds, **options)
    seen = questions._occurring([video, *others])[video.video]
    window = questions._Window(video, 0, questions._visible(video.seconds))
    found = defaultdict(dict)
    for fact in questions._facts(window, seen, random.Random(0)):
        assert fact.subject not in found[fact.type]
        found[fact.type][fact.subject] = fact.answer
    return found


def random_clips(count=6, length=60, seed=0):
    """Instruments that come, go, wander and act, with phases in order."""
    rng = random.Random(seed)
    clips = []
    for number in range(count):
        places = {name: [rng.random(), rng.random()] for name in CHOLECT50_INSTRUMENTS}
        present, acts, seconds = {}, {}, []
        for i in range(length):
            for name, place in places.items():
                if rng.random() < 0.12 or i == 0:
                    present[name] = rng.random() < 0.4
                    verb = rng.choice(["retract", "dissect", "cut", "null_verb"])
                    target = "null_target" if verb == "null_verb" else rng.choice(["gallbladder", "cystic_duct"])
                    acts[name] = verb, target
                place[:] = [min(0.95, max(0.05, value + rng.choice([0, 0, 0.08, -0.08]))) for value in place]
            states = [state(name, *places[name], *acts[name]) for name in places if present[name]]
            seconds.append((CHOLEC80_PHASES[7 * i // length], states))
        clips.append(clip(seconds, f"v{number}@0000"))
    return clips


# ---- rules


@pytest.mark.parametrize(
    ("x", "y", "place"),
    [
        (0.1, 0.1, "upper left"),
        (0.5, 0.1, "top"),
        (0.9, 0.1, "upper right"),
        (0.32, 0.5, "left"),
        (0.34, 0.5, "center"),
        (0.68, 0.5, "right"),
        (0.1, 0.7, "lower left"),
        (0.5, 0.7, "bottom"),
        (0.9, 0.9, "lower right"),
    ],
)
def test_place(x, y, place):
    assert answers([[state("hook", x, y, size=0.1)]] * 4)["where"] == {"hook": place}


def test_presence_list_and_count_are_about_the_last_second():
    graspers = [state("grasper", 0.1), state("grasper", 0.9)]
    found = answers([[state("clipper")]] * 3 + [[*graspers, state("hook"), state("scissors")]])
    assert found["presence"] == {
        "grasper": "yes", "bipolar": "no", "hook": "yes", "scissors": "yes", "clipper": "no", "irrigator": "no",
    }  # fmt: skip
    assert found["list"] == {"": "grasper, hook and scissors"}
    assert found["count"] == {"": "4"}
    assert "count_kinds" not in found
    assert set(found["where"]) == {"hook", "scissors"}  # "the grasper" would be ambiguous


def test_one_instrument_with_two_actions_is_counted_once():
    both = [state("hook", verb="dissect", target="gallbladder"), state("hook", verb="retract", target="liver")]
    assert answers([both] * 4)["count"] == {"": "1"}


def test_nothing_in_view_and_nothing_known():
    empty, unknown = answers([[state("hook")]] * 3 + [[]]), answers([[state("hook")]] * 3 + [None])
    assert empty["list"] == {"": "none"}
    assert empty["count"] == {"": "0"}
    assert set(empty["presence"].values()) == {"no"}
    assert not {"list", "count", "presence", "where", "doing", "move", "appears"} & set(unknown)
    assert unknown["phase"] == {"": "preparation"}


def test_a_sliver_is_not_visible():
    assert answers([[state("hook", size=0.03)]] * 4, clip([[state("grasper")]]))["list"] == {"": "none"}
    assert answers([[state("hook", size=0.04)]] * 4)["list"] == {"": "hook"}


def test_tools_without_boxes():
    seconds = [[InstrumentState("grasper"), InstrumentState("specimen_bag")]] * 4
    found = answers(seconds, vocabulary=TOOL_NAMES, hold_s=4)
    assert found["list"] == {"": "grasper and specimen bag"}
    assert found["presence"]["specimen_bag"] == "yes"
    assert found["count_kinds"] == {"": "2"}
    assert set(found) == {"presence", "list", "count_kinds", "phase", "phase_is"}


@pytest.mark.parametrize(
    ("places", "move"),
    [
        ([(0.3, 0.5), (0.3, 0.5), (0.3, 0.5), (0.39, 0.55)], "to the right"),
        ([(0.6, 0.5), (0.2, 0.5), (0.9, 0.5), (0.5, 0.5)], "to the left"),
        ([(0.5, 0.5), (0.5, 0.4), (0.5, 0.3), (0.45, 0.2)], "up"),
        ([(0.5, 0.5), (0.5, 0.5), (0.5, 0.5), (0.5, 0.59)], "down"),
        ([(0.5, 0.5), (0.52, 0.5), (0.5, 0.53), (0.5, 0.5)], "stays in place"),
        ([(0.5, 0.5), (0.6, 0.5), (0.5, 0.5), (0.5, 0.5)], None),  # it went and came back
        ([(0.5, 0.5), (0.5, 0.5), (0.5, 0.5), (0.6, 0.6)], None),  # diagonal
        ([(0.5, 0.5), (0.5, 0.5), (0.5, 0.5), (0.56, 0.5)], None),  # neither far nor near
        ([None, None, (0.5, 0.5), (0.5, 0.5)], "enters the view"),
        ([(0.5, 0.5), (0.5, 0.5), (0.5, 0.5), None], "leaves the view"),
        ([(0.5, 0.5), None, (0.5, 0.5), None], None),
    ],
)
def test_movement(places, move):
    seconds = [[] if place is None else [state("hook", *place, size=0.1)] for place in places]
    found = answers([[state("hook", 0.9, 0.9, size=0.1)], *seconds])  # the second before the last four counts not
    assert found["move"].get("hook") == move
    moves = {"stays in place": "no", "enters the view": None, "leaves the view": None, None: None}
    assert found["moves"].get("hook") == moves.get(move, "yes")
    direction = {"to the left": "hook across", "to the right": "hook across", "up": "hook along", "down": "hook along"}
    assert found["direction"] == ({direction[move]: move} if move in direction else {})


def test_two_graspers_have_no_movement():
    seconds = [[state("grasper", 0.2 + 0.1 * i), state("grasper", 0.9)] for i in range(4)]
    assert "move" not in answers(seconds)


def test_phase():
    other = clip([("ClippingCutting", [])])
    found = answers([*[("Preparation", [])] * 3, ("CalotTriangleDissection", [])], other)
    assert found["phase"] == {"": "Calot's triangle dissection"}
    assert found["phase_is"] == {"Preparation": "no", "CalotTriangleDissection": "yes", "ClippingCutting": "no"}
    assert phase_name("CleaningCoagulation") == "cleaning and coagulation"
    assert phase_name("Dividing Ligament and Peritoneum") == "dividing ligament and peritoneum"
    assert len({phase_name(phase) for phase in M2CAI16_PHASES}) == 8


@pytest.mark.parametrize(
    ("hook", "beside", "above"),
    [((0.7, 0.52), "grasper", None), ((0.2, 0.3), "hook", "hook"), ((0.55, 0.9), None, "grasper")],
)
def test_relation(hook, beside, above):
    """Whichever way the random wording turns, the answer is that of the places (grasper in the middle)."""
    video = clip([[state("grasper", 0.5, 0.5, size=0.1), state("hook", *hook, size=0.1)]] * 4)
    first = {"left": beside, "right": beside, "above": above, "below": above, "higher": above, "lower": above}
    seen_sides = set()
    for seed in range(40):
        for fact in questions._relation_facts(video.seconds[-1].instruments, random.Random(seed)):
            a, side, b = fact.subject.split()
            seen_sides.add((fact.type, side))
            other = {"grasper": "hook", "hook": "grasper"}[first[side]]
            truth = first[side] if side in ("left", "above", "higher") else other
            if fact.type in ("beside", "above"):
                assert fact.answer == ("yes" if truth == a else "no")
                assert {a, b} == {"grasper", "hook"}
            else:
                assert fact.answer == truth
    expected = {("beside", "left"), ("beside", "right"), ("which_beside", "left"), ("which_beside", "right")}
    expected |= {("above", "above"), ("above", "below"), ("which_above", "higher"), ("which_above", "lower")}
    apart = {"beside": beside, "above": above}
    assert seen_sides == {(name, side) for name, side in expected if apart[name.removeprefix("which_")]}


def test_triplet():
    other = clip([[state("grasper", verb="grasp", target="specimen_bag"), state("scissors", verb="cut", target="gut")]])
    states = [state("grasper", verb="retract", target="gallbladder"), state("hook")]
    found = answers([states] * 4, other)
    assert found["doing"] == {"grasper": "retracting the gallbladder", "hook": "nothing"}
    assert found["who"] == {"retract gallbladder": "grasper", "grasp specimen_bag": "none", "cut gut": "none"}
    assert found["what"] == {"grasper retract": "gallbladder", "grasper grasp": "nothing"}
    assert found["acts"] == {"grasper retract gallbladder": "yes", "grasper grasp specimen_bag": "no"}


def test_who_is_not_asked_of_two_kinds():
    both = [state(name, verb="dissect", target="gallbladder") for name in ("hook", "scissors")]
    assert answers([both] * 4)["who"] == {}
    graspers = [state("grasper", x, verb="retract", target="liver") for x in (0.2, 0.8)]
    found = answers([graspers] * 4)
    assert found["who"] == {"retract liver": "grasper"}
    assert "doing" not in found


@pytest.mark.parametrize(
    ("shown", "appears", "disappears", "visible"),
    [
        ("00011110", "at second 3", "at second 7", "3 to 6"),
        ("00000001", "at second 7", None, "7 to 7"),
        ("11110000", None, "at second 4", "0 to 3"),
        ("11111111", None, "it does not disappear", "0 to 7"),
        ("00000000", "it does not appear", None, "it is not visible"),
        ("01100110", None, None, None),
        ("11001111", None, None, None),
    ],
)
def test_temporal(shown, appears, disappears, visible):
    found = answers([[state("hook")] if digit == "1" else [] for digit in shown])
    assert found["appears"].get("hook") == appears
    assert found["disappears"].get("hook") == disappears
    assert found["visible"].get("hook") == visible


def test_phases_within_the_window():
    other = clip([("GallbladderRetraction", [])])
    found = answers([("Preparation", [])] * 5 + [("ClippingCutting", [])] * 3, other)
    assert found["phase_change"] == {"": "yes"}
    assert found["phase_starts"] == {"ClippingCutting": "at second 5", "GallbladderRetraction": "it does not start"}
    assert answers([("Preparation", [])] * 8)["phase_change"] == {"": "no"}
    assert not answers([("Preparation", [])] * 4)["phase_change"]  # temporal questions need more than 4 s
    assert not answers([("Preparation", [])] * 7 + [(None, [])])["phase_change"]


def test_short_caption():
    hook = state("hook", 0.1, 0.9, "dissect", "gallbladder")
    idle = state("hook", 0.1, 0.9)
    grasper = state("grasper", 0.9, 0.1, "retract", "liver")
    text = short_caption(clip([[hook, grasper], [idle], [hook, grasper], [hook]]).seconds)
    assert text == (
        "During preparation, the grasper at the upper right retracts the liver while the hook at the lower left "
        "dissects the gallbladder."
    )
    scissors = state("scissors", verb="cut", target="cystic_duct")
    assert (
        short_caption(clip([[scissors]] * 4).seconds, 1)
        == "Preparation: the scissors in the center cut the cystic duct."
    )
    assert short_caption(clip([[], [], [], [hook]]).seconds, 2) == "No instrument is in view; the phase is preparation."
    assert short_caption(clip([[hook], None, None, None]).seconds) is None
    two = [replace(grasper, verb="null_verb", target="null_target"), grasper]
    assert "one of two graspers retracts the liver" in short_caption(clip([two] * 4).seconds)
    assert short_caption(clip([[InstrumentState("scissors")]] * 4, phase=None).seconds) == "The scissors are in view."


def test_long_caption_tells_the_order():
    grasp = state("grasper", verb="retract", target="gallbladder")
    cut = state("scissors", verb="cut", target="cystic_artery")
    brief = state("irrigator", verb="aspirate", target="fluid")
    seconds = [("ClippingCutting", [grasp])] * 4 + [("ClippingCutting", [grasp, cut])] * 3
    seconds += [("GallbladderDissection", [brief])] + [("GallbladderDissection", [])] * 2
    assert long_caption(clip(seconds).seconds) == (
        "During clipping and cutting and then gallbladder dissection, first the grasper retracts the gallbladder, "
        "then the scissors cut the cystic artery, finally no instrument is in view."
    )
    assert long_caption(clip([[grasp], None, None, None] * 2).seconds) is None


# ---- samples


@pytest.fixture(scope="module")
def videos():
    return random_clips()


@pytest.fixture(scope="module")
def samples(videos):
    return make_samples(videos, seed=1, per_task=240)


def test_samples_are_repeatable_and_differ_by_seed(videos, samples):
    assert make_samples(videos, seed=1, per_task=240) == samples
    assert make_samples(videos, seed=2, per_task=240) != samples


def test_samples_are_well_formed(videos, samples):
    by_name = {video.name: video for video in videos}
    assert {sample.task for sample in samples} == set(TASKS)
    assert max(Counter(sample.task for sample in samples).values()) <= 240
    assert len({sample.id for sample in samples}) == len(samples)
    assert {sample.type for sample in samples} == set(QUESTION_TYPES) - {"count_kinds"}
    for sample in samples:
        type_ = QUESTION_TYPES[sample.type]
        assert (sample.task, sample.kind) == (type_.task, type_.kind)
        assert sample.kind in KINDS
        assert sample.group == by_name[sample.video].video
        assert 0 <= sample.start_s < sample.end_s <= len(by_name[sample.video])
        assert sample.end_s - sample.start_s in (4, 8, 12, 16)
        assert "{" not in sample.question
        words = len(sample.answer.split())
        assert words <= {"short": 25, "long": 45}.get(sample.type, 8)
        if sample.task == "temporal":
            assert sample.end_s - sample.start_s >= 8


def test_answers_agree_with_the_labels(videos, samples):
    """The two answers that one can see without the rules' own code."""
    by_name = {video.name: video for video in videos}
    checked = Counter()
    for sample in samples:
        seconds = by_name[sample.video].seconds[sample.start_s : sample.end_s]
        subject = sample.id.split("/")[-1]
        if sample.type == "presence":
            there = any(s.instrument == subject for s in seconds[-1].instruments)
            assert sample.answer == ("yes" if there else "no")
        elif sample.type == "visible" and " to " in sample.answer:
            first, last = map(int, sample.answer.split(" to "))
            there = [any(s.instrument == subject for s in second.instruments) for second in seconds]
            assert there == [first <= i <= last for i in range(len(seconds))]
        elif sample.type == "phase":
            assert sample.answer == phase_name(seconds[-1].phase)
        else:
            continue
        checked[sample.type] += 1
    assert set(checked) == {"presence", "visible", "phase"}


def test_balance(samples):
    by_type = defaultdict(list)
    for sample in samples:
        by_type[sample.type].append(sample)
    for name in ("presence", "moves", "phase_is", "phase_change", "beside", "above", "acts"):
        counts = Counter(sample.answer for sample in by_type[name])
        assert abs(counts["yes"] - counts["no"]) <= 1
        of_subject = defaultdict(Counter)
        for sample in by_type[name]:
            of_subject[sample.id.split("/", 3)[-1]][sample.answer] += 1
        assert all(abs(counts["yes"] - counts["no"]) <= 1 for counts in of_subject.values())
    counts = Counter(sample.answer for sample in by_type["direction"])
    assert abs(counts["to the left"] - counts["to the right"]) <= 3  # one for each instrument at most
    for name in ("where", "phase", "list", "doing"):
        counts = sorted(Counter(sample.answer for sample in by_type[name]).values())
        assert counts[-1] <= 2 * counts[len(counts) // 2] + 1
    assert max(Counter(s.type for s in samples if s.task == "triplet").values()) == 60
    lengths = Counter(s.end_s - s.start_s for s in samples if s.task in ("location", "triplet", "relation"))
    assert 0.5 < lengths[4] / lengths.total() < 0.7


def test_the_rarer_answer_bounds_its_opposite():
    """The hook is there in 2 of 30 s: as many questions find it as do not. Another instrument never is: not asked."""
    seconds = [[state("hook", x)] if i in (10, 11) else [] for i, x in enumerate([0.5] * 30)]
    found = make_samples([clip(seconds)], 0, 10_000, tasks=["location"], window_shares={4: 1.0})
    presence = Counter((s.id.split("/")[-1], s.answer) for s in found if s.type == "presence")
    assert presence == {("hook", "yes"): 2, ("hook", "no"): 2}


def test_a_type_with_one_answer_is_left_out():
    found = make_samples([clip([[state("hook")]] * 20)], 0, 100, tasks=["phase", "temporal", "movement"])
    assert {s.type for s in found} <= {"disappears", "visible"}
    assert not any(s.task == "phase" for s in found)


def test_negatives_are_mostly_hard():
    """An instrument is said to be away mostly in videos in which it also occurs (here 200 s of 500)."""
    never = clip([[]] * 300, "never@0000")
    often = clip([[state("irrigator")] if i // 10 % 3 == 0 else [] for i in range(300)], "often@0000")
    found = make_samples([never, often], 0, 1000, tasks=["location"], window_shares={4: 1.0})
    away = Counter(s.group for s in found if s.type == "presence" and s.answer == "no")
    assert away.total() >= 90
    assert away["often"] > 0.55 * away.total()
    assert away["never"] > 0


def test_stills_are_asked_about_single_pictures():
    pictures = [[state("hook", x, verb="dissect", target="gallbladder")] for x in (0.1, 0.5, 0.9)] + [[]]
    video = clip(list(itertools.chain(*([picture] * 4 for picture in pictures))), "v+stills", hold_s=4)
    found = make_samples([video], 0, 100)
    assert {(s.start_s % 4, s.end_s - s.start_s) for s in found} == {(0, 4)}
    assert not {s.task for s in found} & {"movement", "temporal"}
    assert {"where", "presence", "who", "short"} <= {s.type for s in found}
    assert [(c.start_s, c.end_s) for c in make_captions([video], 0)] == [(0, 4), (4, 8), (8, 12), (12, 16)]


def told(seconds, type_, *, start=0, end=None, window=None, **options):
    """What the segment start … end of the clip says to each question of a type about the window, by subject."""
    video = clip(seconds, **options)
    window = window or (0, len(video))
    view = questions._Window(video, window[0], questions._visible(video.seconds)[slice(*window)])
    facts = questions._facts(view, questions._occurring([video])[video.video], random.Random(0))
    samples = [questions._sample(view, fact, random.Random(0)) for fact in facts if fact.type == type_]
    assert samples
    return {s.subject: segment_answer(s, video, start, end or len(video)) for s in samples}


def test_a_segment_tells_in_which_seconds_of_the_window_something_is_seen():
    hook = [state("hook")]
    seconds = [[], [], [], hook, hook, hook, [], [], [], [], [], []]
    for type_ in ("appears", "disappears", "visible"):
        assert told(seconds, type_, start=0, end=4)["hook"] == "3 to 3"
        assert told(seconds, type_, start=4, end=8)["hook"] == "4 to 5"
        assert told(seconds, type_, start=8, end=12)["hook"] == "it is not visible"
    # Counted from the window's first second, not the clip's.
    assert told(seconds, "visible", start=4, end=8, window=(2, 12))["hook"] == "2 to 3"
    phases = [("Preparation", [])] * 6 + [("ClippingCutting", [])] * 6
    assert told(phases, "phase_starts", start=4, end=8)["ClippingCutting"] == "6 to 7"
    assert told(phases, "phase_change", start=4, end=8)[""] == "preparation and then clipping and cutting"
    assert told(phases, "phase_change", start=8)[""] == "clipping and cutting"


def test_a_segment_tells_a_captions_words():
    grasp = state("grasper", 0.1, 0.5, "retract", "gallbladder")
    assert told([[grasp]] * 4, "short")[""] == "preparation grasper left retracts gallbladder"
    assert told([[grasp]] * 8, "long", start=4)[""] == "preparation grasper retracts gallbladder"
    unknown = [[grasp]] * 12 + [None] * 2
    assert told(unknown, "long", start=12, end=14)[""] is None


def test_only_the_last_segment_tells_of_the_windows_end():
    seconds = [[state("hook", 0.1)]] * 4 + [[state("hook", 0.9)]] * 4
    assert told(seconds, "where", start=0, end=4) == {"hook": None}
    assert told(seconds, "where", start=4) == {"hook": "right"}


def test_behind_a_conclusion_stands_what_is_seen():
    hook, grasper = state("hook", 0.3, 0.8, "dissect", "liver"), state("grasper", 0.6, 0.2)
    seconds = [[hook, grasper]] * 4
    assert {text.split(" ", 1)[1] for text in told(seconds, "beside").values()} == {"hook left grasper right"}
    assert set(told(seconds, "which_above").values()) <= {
        f"{name} grasper above hook below" for name in ("hook", "grasper")
    }
    acts = told([*seconds, [state("hook", 0.3, 0.8)]], "acts")
    assert acts == {"hook dissect liver": "no nothing"}
    assert told(seconds, "acts") == {"hook dissect liver": "yes dissecting the liver"}
    assert told(seconds, "presence")["clipper"] == "no grasper and hook"
    assert told(seconds, "count") == {"": "2 grasper and hook"}
    assert told(seconds, "phase_is") == {"Preparation": "yes preparation"}
    assert told(seconds, "moves")["hook"] == "no stays in place"


def test_captions(videos):
    captions = make_captions(videos, 3)
    assert captions == make_captions(videos, 3)
    assert {(c.start_s, c.end_s - c.start_s) for c in captions if c.video == "v0@0000"} == {
        (start, 4) for start in range(0, 57, 2)
    }
    assert all(len(c.text.split()) <= 25 for c in captions)


def test_every_type_has_six_wordings_that_are_its_own():
    for type_ in QUESTION_TYPES.values():
        assert len(set(type_.templates)) == len(type_.templates) >= 6
    everything = [t for type_ in QUESTION_TYPES.values() for t in type_.templates]
    assert len(set(everything)) == len(everything)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per_task": 0}, "per_task 0 found"),
        ({"per_task": 1, "tasks": ["colour"]}, "task 'colour' found"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        make_samples(random_clips(1), 0, **options)


def test_clips_that_are_too_short():
    with pytest.raises(SampleError, match="no clip has 4 seconds"):
        make_samples([clip([[]] * 3)], 0, 10)


# ---- files


def test_written_samples_are_read(tmp_path, videos, samples):
    write_samples(tmp_path / "q.json", samples)
    assert read_samples(tmp_path / "q.json") == samples
    assert read_samples(tmp_path / "q.json", videos=videos) == samples
    write_samples(tmp_path / "none.json", [])
    assert read_samples(tmp_path / "none.json") == []


def written(tmp_path, content):
    path = tmp_path / "theirs.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_videochat_form(tmp_path):
    entry = {
        "video": "surgery/v@0000.mp4",
        "QA": [{"i": "", "q": "Who?", "a": "hook"}, {"i": "What?", "q": "", "a": "x"}],
    }
    first, second = read_samples(written(tmp_path, [entry]), task="triplet", videos=[clip([[]] * 9)])
    assert (first.video, first.group, first.start_s, first.end_s) == ("v@0000", "v", 0, 9)
    assert (first.task, first.kind, first.question, first.answer) == ("triplet", "closed", "Who?", "hook")
    assert second.question == "What?"
    assert first.id != second.id


def test_llava_form(tmp_path):
    turns = [
        ("human", "<video>\nWhen does the hook appear?"),
        ("gpt", "at second 3"),
        ("human", "How long?"),
        ("gpt", "4 to 7"),
    ]
    conversations = [{"from": who, "value": value} for who, value in turns]
    entry = {"id": "a", "video": "v", "start": 1, "end": 9, "conversations": conversations}
    first, second = read_samples(written(tmp_path, [entry]), task="temporal")
    assert (first.id, first.question, first.kind) == ("a/0", "When does the hook appear?", "second")
    assert (second.question, second.answer, second.kind) == ("How long?", "4 to 7", "interval")
    assert (first.start_s, first.end_s) == (1, 9)


QA = [{"q": "Where?", "a": "left"}]
GOOD = {"video": "v", "start_s": 0, "end_s": 4, "task": "location", "QA": QA}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "is no JSON"),
        ({}, "an object found, expected a list"),
        ([GOOD, "x"], "entry 2: 'x' found, expected an object"),
        ([{**GOOD, "video": 3}], "entry 1: video 3 found, expected text"),
        ([{k: v for k, v in GOOD.items() if k != "QA"}], "keys video, start_s, end_s, task found, expected QA or conv"),
        ([{**GOOD, "QA": []}], "QA is not a list of objects"),
        ([{**GOOD, "QA": [{"q": "Where?"}]}], "a None found, expected text"),
        ([{**GOOD, "QA": [{"q": " ", "a": "left"}]}], "q ' ' found, expected text"),
        ([{k: v for k, v in GOOD.items() if k != "task"}], "task '' found, expected one of caption, "),
        ([{**GOOD, "task": "My task"}], "task 'My task' found"),
        ([{**GOOD, "kind": "shut"}], "kind 'shut' found, expected one of closed"),
        ([{**GOOD, "end_s": 2.5}], "end_s 2.5 found, expected whole seconds"),
        ([{**GOOD, "end_s": 0}], "start_s 0, end_s 0 found, expected 0 <= start_s < end_s"),
        ([{k: v for k, v in GOOD.items() if k != "end_s"}], "no end_s found"),
        ([{**GOOD, "id": "a"}, {**GOOD, "id": "a"}], "entry 2: id 'a' is that of entry 1 too"),
        ([{"video": "v", "end": 4, "task": "x", "conversations": [{"from": "gpt", "value": "a"}]}], "turns from human"),
    ],
)
def test_wrong_files(tmp_path, content, message):
    with pytest.raises(SampleError, match=message) as error:
        read_samples(written(tmp_path, content))
    assert "theirs.json" in str(error.value)


def test_wrong_videos(tmp_path):
    clips = [clip([[]] * 6, "a@0000"), clip([[]] * 6, "a@0100"), clip([[]] * 6, "b@0000")]
    (sample,) = read_samples(written(tmp_path, [{**GOOD, "video": "b"}]), videos=clips)
    assert sample.video == "b@0000"
    for change, message in (
        ({"video": "a"}, "video 'a' has 2 clips; expected one of them: a@0000, a@0100"),
        ({"video": "b@000"}, "there is no video 'b@000'; did you mean 'b@0000'"),
        ({"video": "b", "end_s": 7}, "end_s 7 found, expected 0 <= start_s < end_s <= 6"),
    ):
        with pytest.raises(SampleError, match=message):
            read_samples(written(tmp_path, [{**GOOD, **change}]), videos=clips)
    with pytest.raises(SampleError, match="cannot be read"):
        read_samples(tmp_path / "absent.json")


def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    spec = "phantom:seeds=0-2,duration_s=20,width=128,height=96"
    out = tmp_path / "q.json"
    arguments = ["data", "questions", spec, "--out", str(out), "--per-task", "40", "--videos", "phantom-0,phantom-2"]
    options = parser().parse_args(arguments)
    assert options.run(options) == 0
    found = read_samples(out, videos=open_clip_videos(spec))
    assert {sample.group for sample in found} == {"phantom-0", "phantom-2"}
    shown = capsys.readouterr().out
    assert f"{len(found)} questions about 2 videos (40 s)" in shown
    assert "presence" in shown
    assert "50 %" in shown


def test_real_cholect50(shared_data):
    clips = open_clip_videos(shared_data / "cholect50", stills=True)
    found = make_samples(clips, 0, 100)
    assert {sample.task for sample in found} == set(TASKS)
    assert {sample.group for sample in found} == {"VID68", "VID70", "VID73", "VID74"}
    said = {sample.answer for sample in found if sample.type == "doing"}
    assert {"nothing", "dissecting the gallbladder", "clipping the cystic duct"} <= said
