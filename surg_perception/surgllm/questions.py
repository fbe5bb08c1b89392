# SPDX-License-Identifier: Apache-2.0
"""Questions about surgical video with answers by rule from labels, and the JSON files that hold them.

A window is seconds start_s … end_s-1 of a clip; its seconds count from 0. Questions in the present tense are about its
last second, movement is about its last 4, captions and temporal questions are about all of it. docs/questions.md has
every type with its rule and thresholds.
"""

from __future__ import annotations

import heapq
import itertools
import json
import math
import random
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from surg_perception.data.clip_labels import ClipVideo, InstrumentState, SecondLabels
from surg_perception.data.label_files import nearest

TASKS = ("caption", "location", "movement", "phase", "relation", "triplet", "temporal")
KINDS = ("closed", "open", "second", "interval")

WINDOW_SHARES = {4: 0.6, 8: 0.14, 12: 0.13, 16: 0.13}
"""Lengths of windows in seconds and their shares; whole-window tasks take the lengths from 8 s on."""

MOVED = 0.08
"""A box centre that went at least this share of the frame along one axis in 4 s moved."""

STAYED = 0.04
"""A box centre whose 4 places lie within this share of the frame on both axes stays in place."""

DOMINANT = 1.5
"""The axis of a movement has at least this many times the way of the other."""

APART = 0.08
"""Two centres nearer than this share of the frame along an axis are neither left nor right, neither above nor below."""

SMALLEST = 0.001
"""An instrument whose box is less than this share of the frame's area is not counted as visible."""

SHORT_S = 4
"""Seconds of a short caption, and those that a movement is judged by."""

SHORT_WORDS, LONG_WORDS = 25, 45

# An answer may be this many times as frequent as the median answer of its type; of two opposite ones none is more.
_MOST = 2.0
_WINDOWS_PER_SAMPLE, _FEWEST_WINDOWS, _MOST_WINDOWS = 4, 2_000, 20_000
_EASY_NEGATIVE = 0.25  # how readily one is chosen, where a hard one is 1


class SampleError(ValueError):
    """A file of questions that cannot be used: file, entry, what was found, what was expected."""


@dataclass(frozen=True)
class Sample:
    """A question about a window and its answer.

    Attributes:
        id: unique in its file.
        video: name of the ClipVideo.
        group: name of the video it is from; a group is never in two splits.
        start_s, end_s: seconds start_s … end_s-1 of the clip.
        task: one of TASKS, or a user's own.
        kind: "closed" (exact match), "open" (captions), "second" ("at second 12"), "interval" ("4 to 7").
        type: the rule that made it, such as "where"; "" for other people's questions.
        subject: instrument, phase or pair that it asks about; "" where it asks about none, or others wrote it.
    """

    id: str
    video: str
    group: str
    start_s: int
    end_s: int
    task: str
    kind: str
    question: str
    answer: str
    type: str = ""
    subject: str = ""


@dataclass(frozen=True)
class Caption:
    """One sentence about seconds start_s … end_s-1 of the ClipVideo `video`."""

    video: str
    start_s: int
    end_s: int
    text: str


@dataclass(frozen=True)
class _Noun:
    """A thing as people call it; `plural` for scissors."""

    text: str
    plural: bool = False

    @property
    def article(self) -> str:
        """With its indefinite article."""
        return self.text if self.plural else f"{'an' if self.text[0] in 'aeiou' else 'a'} {self.text}"


_NOUNS = {
    "grasper": _Noun("grasper"),
    "bipolar": _Noun("bipolar forceps"),
    "hook": _Noun("hook"),
    "scissors": _Noun("scissors", plural=True),
    "clipper": _Noun("clipper"),
    "irrigator": _Noun("irrigator"),
    "specimen_bag": _Noun("specimen bag"),
}
_ORDER = {name: number for number, name in enumerate(_NOUNS)}
_TARGETS = {"abdominal_wall_cavity": "abdominal wall"}
_GERUNDS = {"clip": "clipping", "cut": "cutting"}
_PHASES = {"CalotTriangleDissection": "Calot's triangle dissection", "ClippingCutting": "clipping and cutting"}
_PHASES |= {"CleaningCoagulation": "cleaning and coagulation"}
_PLACES = (
    ("upper left", "top", "upper right"),
    ("left", "center", "right"),
    ("lower left", "bottom", "lower right"),
)
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six")

NOT_APPEARING = "it does not appear"
NOT_DISAPPEARING = "it does not disappear"
NOT_VISIBLE = "it is not visible"
NOT_STARTING = "it does not start"
_NEGATIVE = {"none", "nothing"}
_TEMPORAL_NEGATIVE = {NOT_APPEARING, NOT_DISAPPEARING, NOT_VISIBLE, NOT_STARTING}


def phase_name(phase: str) -> str:
    """A phase as people write it: "ClippingCutting" is "clipping and cutting"."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", phase)
    return _PHASES.get(phase, words[0].lower() + words[1:].lower())


def instrument_name(instrument: str) -> str:
    """An instrument as people write it: "bipolar" is "bipolar forceps"."""
    return _noun(instrument).text


def target_name(target: str) -> str:
    """A target as people write it: "cystic_duct" is "cystic duct"."""
    return _TARGETS.get(target, target.replace("_", " "))


@dataclass(frozen=True)
class _Type:
    """A type of question.

    Attributes:
        opposite: its answers come in opposite pairs, which are made equally frequent.
        templates: wordings with {x} and {y} (instruments), {a} (x with its article), {is} {does} {has} (as fits x),
            {verb} {verbs} {ing} {s} (plain, third person, participle, as fits x), {target}, {phase}, {side}, and {one}
            and {other} (ways to move).
    """

    task: str
    templates: tuple[str, ...]
    kind: str = "closed"
    opposite: bool = False


QUESTION_TYPES: dict[str, _Type] = {
    "short": _Type(
        "caption",
        (
            "Describe this clip in one sentence.",
            "Describe the scene briefly.",
            "Give a short description of the clip.",
            "Summarize what is seen here in a sentence.",
            "Write a short caption for this video.",
            "What is shown in this clip? Answer in one sentence.",
            "Caption these seconds of surgery.",
        ),
        "open",
    ),
    "long": _Type(
        "caption",
        (
            "Describe what happens in this clip, in order.",
            "Describe the course of events in this video.",
            "Tell what happens from start to end.",
            "Give a longer description of the clip.",
            "Narrate the events of this video step by step.",
            "Summarize the sequence of events in this clip.",
            "Write a long caption that tells the order of events.",
        ),
        "open",
    ),
    "where": _Type(
        "location",
        (
            "Where {is} the {x}?",
            "Where in the picture {is} the {x}?",
            "In which part of the image {is} the {x}?",
            "Where can the {x} be seen?",
            "What is the position of the {x}?",
            "In which area of the view {is} the {x} located?",
            "Locate the {x}.",
        ),
    ),
    "presence": _Type(
        "location",
        (
            "{Is} there {a}?",
            "{Is} {a} visible?",
            "Can you see {a}?",
            "{Is} {a} in view?",
            "{Does} {a} show in the picture?",
            "{Is} there {a} in the image?",
            "{Is} the {x} present?",
        ),
        opposite=True,
    ),
    "list": _Type(
        "location",
        (
            "Which instruments are visible?",
            "What instruments can be seen?",
            "Which instruments are in view?",
            "List the instruments in the picture.",
            "Name the visible instruments.",
            "What tools are present?",
            "Which tools are in the image?",
        ),
    ),
    "count": _Type(
        "location",
        (
            "How many instruments are visible?",
            "How many instruments can be seen?",
            "How many instruments are in view?",
            "Count the instruments.",
            "What is the number of visible instruments?",
            "How many tools are in the picture?",
            "How many instruments are present?",
        ),
    ),
    "count_kinds": _Type(
        "location",
        (
            "How many kinds of instrument are visible?",
            "How many different instruments can be seen?",
            "How many types of instrument are in view?",
            "Count the different instruments.",
            "What is the number of different tools in the picture?",
            "How many kinds of tool are present?",
        ),
    ),
    "move": _Type(
        "movement",
        (
            "How {does} the {x} move?",
            "How {is} the {x} moving?",
            "In which direction {does} the {x} move?",
            "What is the movement of the {x}?",
            "Describe the motion of the {x}.",
            "Which way {does} the {x} go?",
            "Where {is} the {x} moving to?",
        ),
    ),
    "moves": _Type(
        "movement",
        (
            "{Does} the {x} move?",
            "{Is} the {x} moving?",
            "{Does} the {x} change position?",
            "{Is} the {x} in motion?",
            "{Does} the {x} shift in the picture?",
            "{Has} the {x} moved?",
        ),
        opposite=True,
    ),
    "direction": _Type(
        "movement",
        (
            "{Does} the {x} move {one} or {other}?",
            "{Is} the {x} moving {one} or {other}?",
            "Which way {does} the {x} move, {one} or {other}?",
            "{Has} the {x} moved {one} or {other}?",
            "{Does} the {x} go {one} or {other}?",
            "Is the motion of the {x} {one} or {other}?",
        ),
        opposite=True,
    ),
    "phase": _Type(
        "phase",
        (
            "What is the surgical phase?",
            "Which phase is this?",
            "Which surgical phase is shown?",
            "What phase of the operation is this?",
            "In which phase is the surgery?",
            "Name the current phase.",
            "What stage of the procedure is this?",
        ),
    ),
    "phase_is": _Type(
        "phase",
        (
            "Is this the {phase} phase?",
            "Is the surgical phase {phase}?",
            "Is the operation in the {phase} phase?",
            "Are they in the {phase} phase?",
            "Does this show the phase {phase}?",
            "Is {phase} the current phase?",
            "Is {phase} under way?",
        ),
        opposite=True,
    ),
    "phase_change": _Type(
        "phase",
        (
            "Does the phase change in this clip?",
            "Does the surgical phase change during these seconds?",
            "Is there a change of phase in the clip?",
            "Does a new phase begin in this video?",
            "Is there a phase transition in this clip?",
            "Do they go on to another phase during the clip?",
        ),
        opposite=True,
    ),
    "beside": _Type(
        "relation",
        (
            "{Is} the {x} {side} of the {y}?",
            "{Is} the {x} to the {side} of the {y}?",
            "{Does} the {x} lie {side} of the {y}?",
            "{Is} the {x} further {side} than the {y}?",
            "{Is} the {x} on the {side} side of the {y}?",
            "Would you find the {x} {side} of the {y}?",
        ),
        opposite=True,
    ),
    "above": _Type(
        "relation",
        (
            "{Is} the {x} {side} the {y}?",
            "{Does} the {x} lie {side} the {y}?",
            "{Is} the {x} located {side} the {y}?",
            "{Is} the {x} {side} the {y} in the picture?",
            "{Is} the position of the {x} {side} the {y}?",
            "Would you find the {x} {side} the {y}?",
        ),
        opposite=True,
    ),
    "which_beside": _Type(
        "relation",
        (
            "Which is further {side}, the {x} or the {y}?",
            "Which instrument is further {side}, the {x} or the {y}?",
            "Which of the {x} and the {y} is further {side}?",
            "Of the {x} and the {y}, which one is more to the {side}?",
            "What lies further {side}, the {x} or the {y}?",
            "Tell which is on the {side}: the {x} or the {y}.",
            "Which instrument is further {side}?",
        ),
        opposite=True,
    ),
    "which_above": _Type(
        "relation",
        (
            "Which is {side}, the {x} or the {y}?",
            "Which instrument is {side}, the {x} or the {y}?",
            "Which of the {x} and the {y} is {side}?",
            "Of the {x} and the {y}, which one is {side} in the picture?",
            "What lies {side}, the {x} or the {y}?",
            "Which instrument is {side}?",
        ),
        opposite=True,
    ),
    "doing": _Type(
        "triplet",
        (
            "What {is} the {x} doing?",
            "What {does} the {x} do?",
            "What is being done with the {x}?",
            "What action {does} the {x} perform?",
            "What {is} the {x} used for now?",
            "Describe the action of the {x}.",
            "What task {is} the {x} carrying out?",
        ),
    ),
    "who": _Type(
        "triplet",
        (
            "Which instrument {verbs} the {target}?",
            "Which instrument is {ing} the {target}?",
            "What tool {verbs} the {target}?",
            "With which instrument are they {ing} the {target}?",
            "Which tool is {ing} the {target}?",
            "What is used for {ing} the {target}?",
            "Name the instrument that {verbs} the {target}.",
        ),
    ),
    "what": _Type(
        "triplet",
        (
            "What {does} the {x} {verb}?",
            "What {is} the {x} {ing}?",
            "Which structure {does} the {x} {verb}?",
            "Which structure {is} the {x} {ing}?",
            "Name what the {x} {s}.",
            "What is the target that the {x} {s}?",
        ),
    ),
    "acts": _Type(
        "triplet",
        (
            "{Is} the {x} {ing} the {target}?",
            "{Does} the {x} {verb} the {target}?",
            "Do they use the {x} for {ing} the {target}?",
            "Is it the {target} that the {x} {s}?",
            "Can you see the {x} {ing} the {target}?",
            "Is the action of the {x} {ing} the {target}?",
        ),
        opposite=True,
    ),
    "appears": _Type(
        "temporal",
        (
            "When {does} the {x} appear?",
            "At which second {does} the {x} appear?",
            "When {does} the {x} come into view?",
            "At what second {does} the {x} enter the picture?",
            "When can the {x} first be seen?",
            "At which second {is} the {x} first visible?",
        ),
        "second",
    ),
    "disappears": _Type(
        "temporal",
        (
            "When {does} the {x} disappear?",
            "At which second {does} the {x} disappear?",
            "When {does} the {x} go out of view?",
            "At what second {does} the {x} leave the picture?",
            "From which second on {is} the {x} gone?",
            "At which second {is} the {x} no longer visible?",
        ),
        "second",
    ),
    "visible": _Type(
        "temporal",
        (
            "Between which seconds {is} the {x} visible?",
            "From when to when {is} the {x} visible?",
            "During which seconds can the {x} be seen?",
            "From which to which second {is} the {x} in view?",
            "In which seconds {does} the {x} show?",
            "Give the first and last second with the {x} in view.",
        ),
        "interval",
    ),
    "phase_starts": _Type(
        "temporal",
        (
            "When does the {phase} phase start?",
            "At which second does the {phase} phase begin?",
            "When does {phase} start?",
            "At what second does {phase} begin?",
            "When do they start the {phase} phase?",
            "At which second is the change to {phase}?",
        ),
        "second",
    ),
}
"""Every type of question by name, in the order of TASKS."""


@dataclass(frozen=True)
class Fact:
    """An answer that the labels give.

    Attributes:
        subject: what it is about; answers are balanced within each, so that the question alone says little.
        easy: a negative about what does not occur in the video at all, which is chosen less readily.
        words: for the templates.
    """

    type: str
    subject: str
    answer: str
    words: Mapping[str, str] = field(default_factory=dict)
    easy: bool = False


@dataclass(frozen=True)
class _Window:
    clip: ClipVideo
    start_s: int
    seconds: tuple[SecondLabels, ...]


@dataclass
class _Seen:
    """What occurs anywhere in a video; a negative about it is a hard one."""

    instruments: set[str] = field(default_factory=set)
    acts: set[tuple[str, str, str]] = field(default_factory=set)
    phases: set[str] = field(default_factory=set)
    boxes: bool = False
    """Boxes are annotated: each instrument for itself, and not only its kind."""


def make_samples(
    videos: Sequence[ClipVideo],
    seed: int,
    per_task: int,
    *,
    tasks: Sequence[str] = TASKS,
    window_shares: Mapping[int, float] = WINDOW_SHARES,
) -> list[Sample]:
    """Questions and answers about windows of the clips, the same for the same arguments.

    At most per_task samples of each task, spread evenly over its types; per type the subjects (instruments, pairs,
    phases) and their answers are about equally frequent as far as the labels allow: opposite answers (yes and no, left
    and right) exactly so per subject, others at most twice the median one. Fewer come back where labels are few. No
    fact about a window is asked twice. Clips that hold stills are asked about single pictures only.

    Raises ValueError for per_task below 1 and an unknown task, SampleError where no clip is as long as a window.
    """
    if per_task < 1:
        raise ValueError(f"per_task {per_task} found, expected at least 1")
    if unknown := [task for task in tasks if task not in TASKS]:
        raise ValueError(f"task {unknown[0]!r} found, expected some of {', '.join(TASKS)}")
    rng = random.Random(f"questions {seed}")
    seen = _occurring(videos)
    windows = _windows(videos, window_shares, per_task, rng)
    if not windows:
        raise SampleError(f"no clip has {min(window_shares)} seconds in a row, the shortest window; see window_shares")
    pools: dict[str, _Pool] = {name: {} for name in QUESTION_TYPES}
    for window, weight in windows:
        for fact in _facts(window, seen[window.clip.video], rng):
            # Weighted sampling without replacement: the greatest of u^(1/w) (Efraimidis and Spirakis, 2006).
            key = rng.random() ** (1.0 / (weight * (_EASY_NEGATIVE if fact.easy else 1.0)))
            pools[fact.type].setdefault((fact.subject, fact.answer), []).append((key, window, fact))
    samples = []
    for task in tasks:
        types = {name: type_ for name, type_ in QUESTION_TYPES.items() if type_.task == task}
        room = {name: _caps(type_, pools[name])[1].total() for name, type_ in types.items()}
        for name, count in _shared_out(room, per_task, rng).items():
            chosen = _balanced(types[name], pools[name], count, rng)
            samples += [_sample(window, fact, rng) for window, fact in chosen]
    rng.shuffle(samples)
    return samples


def facts_of(clip: ClipVideo) -> list[Fact]:
    """Everything that can be asked about a whole clip taken as one window, with the answers."""
    return list(_facts(_Window(clip, 0, _visible(clip.seconds)), _occurring([clip])[clip.video], random.Random(0)))


def make_captions(videos: Sequence[ClipVideo], seed: int, *, stride_s: int = 2) -> list[Caption]:
    """A short caption for windows of 4 s that begin every stride_s seconds (stills: for each still)."""
    rng = random.Random(f"captions {seed}")
    captions = []
    for clip in videos:
        step = clip.hold_s if clip.hold_s > 1 else stride_s
        seconds = _visible(clip.seconds)
        for start in range(0, len(clip) - SHORT_S + 1, step):
            text = short_caption(seconds[start : start + SHORT_S], rng.randrange(_WORDINGS))
            if text is not None:
                captions.append(Caption(clip.name, start, start + SHORT_S, text))
    return captions


def segment_answer(sample: Sample, clip: ClipVideo, start_s: int, end_s: int) -> str | None:
    """What seconds start_s … end_s-1 of a sample's window have to say to its question, in few words.

    A segment of a longer window knows a part only: of a temporal question the seconds in which its subject is there
    ("4 to 6", counted as the window's), of a change of phase the phases, of a caption the words that carry it. All
    other questions are about the window's end, so that the segment there has the answer and the others nothing, which
    is None, as is what cannot be told (others' temporal questions, unlabelled seconds). Behind an answer that is a
    conclusion follows what is seen, from which it can be drawn: "no hook left grasper right".
    """
    seconds = _visible(clip.seconds[start_s:end_s])
    if sample.kind == "open":
        return _keywords(seconds, places=sample.end_s - sample.start_s <= SHORT_S)
    if sample.type == "phase_change":
        return _phase_course(seconds) or None
    if sample.subject and sample.type == "phase_starts":
        there = [second.phase == sample.subject for second in seconds]
    elif sample.subject and sample.type in ("appears", "disappears", "visible"):
        there = [any(state.instrument == sample.subject for state in second.instruments or ()) for second in seconds]
    elif sample.end_s == end_s and (sample.task != "temporal" or sample.start_s == start_s):
        return " ".join(filter(None, (sample.answer, _evidence(sample, seconds))))
    else:
        return None
    found = [start_s - sample.start_s + i for i, is_there in enumerate(there) if is_there]
    return f"{found[0]} to {found[-1]}" if found else NOT_VISIBLE


def _evidence(sample: Sample, seconds: Sequence[SecondLabels]) -> str:
    """What is seen at the end of these seconds, where a sample's answer follows from it and does not say it."""
    last = seconds[-1]
    states = last.instruments or ()
    one = _unambiguous(states)
    named = sample.subject.split()
    if sample.type == "phase_is" and last.phase is not None:
        return phase_name(last.phase)
    if sample.type in ("presence", "count", "count_kinds"):
        return join_names([instrument_name(kind) for kind in sorted({s.instrument for s in states}, key=_order)])
    if sample.type == "moves":
        moves = {fact.subject: fact.answer for fact in _movement_facts(seconds[-SHORT_S:]) if fact.type == "move"}
        return moves.get(sample.subject, "")
    if sample.type == "acts" and named:
        state = one.get(named[0])
        return (_act(state, "ing") or "nothing") if state is not None else ""
    if sample.type in ("beside", "above", "which_beside", "which_above") and len(named) == 3:
        axis, sides = (0, ("left", "right")) if sample.type.endswith("beside") else (1, ("above", "below"))
        pair = [(one[name].centre, name) for name in (named[0], named[2]) if name in one]
        ordered = sorted((centre[axis], instrument_name(name)) for centre, name in pair if centre is not None)
        return " ".join(f"{name} {side}" for (_, name), side in zip(ordered, sides, strict=False))
    return ""


def _windows(
    videos: Sequence[ClipVideo], shares: Mapping[int, float], per_task: int, rng: random.Random
) -> list[tuple[_Window, float]]:
    """Windows at any second with their weights, by which each length has its share."""
    most = min(_MOST_WINDOWS, max(_FEWEST_WINDOWS, _WINDOWS_PER_SAMPLE * per_task))
    seconds = {clip.name: _visible(clip.seconds) for clip in videos}
    chosen = []
    for length, share in shares.items():
        places: list[tuple[ClipVideo, int]] = []
        for clip in videos:
            if clip.hold_s == 1:
                places += [(clip, start) for start in range(len(clip) - length + 1)]
            elif length == clip.hold_s:
                places += [(clip, start) for start in range(0, len(clip), clip.hold_s)]
        count = min(len(places), math.ceil(most * share))
        for clip, start in rng.sample(places, count):
            chosen.append((_Window(clip, start, seconds[clip.name][start : start + length]), share / count))
    heaviest = max((weight for _, weight in chosen), default=1.0)
    return [(window, weight / heaviest) for window, weight in chosen]


def _visible(seconds: Sequence[SecondLabels]) -> tuple[SecondLabels, ...]:
    """Labels without the instruments of which next to nothing is in the picture."""
    return tuple(
        second
        if second.instruments is None
        else replace(
            second, instruments=tuple(s for s in second.instruments if s.box is None or _area(s.box) >= SMALLEST)
        )
        for second in seconds
    )


def _area(box: tuple[float, float, float, float]) -> float:
    return box[2] * box[3]


def _occurring(videos: Sequence[ClipVideo]) -> dict[str, _Seen]:
    seen: dict[str, _Seen] = defaultdict(_Seen)
    for clip in videos:
        for second in _visible(clip.seconds):
            found = seen[clip.video]
            found.phases |= {second.phase} if second.phase else set()
            for state in second.instruments or ():
                found.instruments.add(state.instrument)
                found.boxes |= state.box is not None
                if _acts(state):
                    found.acts.add((state.instrument, state.verb, state.target))
    return seen


# ---- balance


_Pool = dict[tuple[str, str], list[tuple[float, _Window, Fact]]]


def _caps(
    type_: _Type, pool: Mapping[tuple[str, str], Sequence[object]]
) -> tuple[dict[tuple[str, str], int], Counter[str]]:
    """The most that may be taken of each (subject, answer), and of each answer in all."""
    cells = {cell: len(found) for cell, found in pool.items()}
    of_answer: Counter[str] = Counter()
    if type_.opposite:
        by_subject: dict[str, list[int]] = defaultdict(list)
        for (subject, _), count in cells.items():
            by_subject[subject].append(count)
        cells = {cell: min(by_subject[cell[0]]) if len(by_subject[cell[0]]) > 1 else 0 for cell in cells}
    for (_, answer), count in cells.items():
        of_answer[answer] += count
    if type_.kind != "open" and len(of_answer) < 2:
        return cells, Counter()
    if not type_.opposite and of_answer:
        most = _MOST * statistics.median(of_answer.values())
        of_answer = Counter({answer: min(count, math.ceil(most)) for answer, count in of_answer.items()})
    return cells, of_answer


def _shared_out(room: Mapping[str, int], count: int, rng: random.Random) -> dict[str, int]:
    """count dealt as evenly as the room of each allows."""
    given = dict.fromkeys(room, 0)
    left = count
    while left > 0 and (open_ := [name for name in room if given[name] < room[name]]):
        if left < len(open_):
            for name in rng.sample(open_, left):
                given[name] += 1
            break
        each = min(left // len(open_), min(room[name] - given[name] for name in open_))
        for name in open_:
            given[name] += each
        left -= each * len(open_)
    return given


def _balanced(type_: _Type, pool: _Pool, count: int, rng: random.Random) -> Iterator[tuple[_Window, Fact]]:
    """count facts of a type, even over every (subject, answer), so that neither answer nor question tells much."""
    cells, of_answer = _caps(type_, pool)
    tie: defaultdict[object, float] = defaultdict(rng.random)
    # Opposite answers about one subject follow each other, so that at most one lacks its opposite.
    queue = [(0.0, tie[cell[0] if type_.opposite else cell], cell) for cell in cells]
    heapq.heapify(queue)
    given: Counter[tuple[str, str]] = Counter()
    total: Counter[str] = Counter()
    while queue and count > 0:
        _, order, cell = heapq.heappop(queue)
        answer = cell[1]
        if given[cell] < cells[cell] and total[answer] < of_answer[answer]:
            given[cell] += 1
            total[answer] += 1
            count -= 1
            heapq.heappush(queue, (given[cell] / _weight(answer), order, cell))
    for cell, number in given.items():
        for _, window, fact in sorted(pool[cell], key=lambda entry: -entry[0])[:number]:
            yield window, fact


def _weight(answer: str) -> float:
    """ "none" is the answer about many subjects, and would be too frequent in all; "it does not appear" too rare."""
    return 0.5 if answer in _NEGATIVE else 2.0 if answer in _TEMPORAL_NEGATIVE else 1.0


def _sample(window: _Window, fact: Fact, rng: random.Random) -> Sample:
    type_ = QUESTION_TYPES[fact.type]
    templates = type_.templates
    if fact.type in ("which_beside", "which_above") and "only" not in fact.words:
        templates = templates[:-1]  # the last asks without naming the two, which needs that no other is in view
    question = rng.choice(templates).format_map(fact.words)
    end_s = window.start_s + len(window.seconds)
    identity = f"{window.clip.name}/{window.start_s}-{end_s}/{fact.type}"
    return Sample(
        identity + (f"/{fact.subject}" if fact.subject else ""),
        window.clip.name,
        window.clip.video,
        window.start_s,
        end_s,
        type_.task,
        type_.kind,
        question,
        fact.answer,
        fact.type,
        fact.subject,
    )


# ---- facts


def _facts(window: _Window, seen: _Seen, rng: random.Random) -> Iterator[Fact]:
    """Everything that can be asked about a window."""
    last = window.seconds[-1]
    if last.instruments is not None and window.clip.vocabulary:
        yield from _location_facts(last.instruments, window.clip.vocabulary, seen)
        yield from _relation_facts(last.instruments, rng)
        yield from _triplet_facts(last.instruments, seen, rng)
    if last.phase is not None:
        yield from _phase_facts(last.phase, seen)
    if any(state.verb for second in window.seconds for state in second.instruments or ()):
        yield from _caption_facts(window, rng)
    if window.clip.hold_s == 1:
        yield from _movement_facts(window.seconds[-SHORT_S:])
        if len(window.seconds) > SHORT_S:
            yield from _temporal_facts(window, seen)


def _caption_facts(window: _Window, rng: random.Random) -> Iterator[Fact]:
    short = len(window.seconds) <= SHORT_S
    text = (short_caption if short else long_caption)(window.seconds, rng.randrange(_WORDINGS))
    if text is not None:
        yield Fact("short" if short else "long", "", text)


def _location_facts(states: Sequence[InstrumentState], vocabulary: Sequence[str], seen: _Seen) -> Iterator[Fact]:
    kinds = sorted({state.instrument for state in states}, key=_order)
    for name, state in _unambiguous(states).items():
        if state.centre is not None:
            yield Fact("where", name, _place(state.centre), _words(name))
    for name in vocabulary:
        easy = name not in seen.instruments
        yield Fact("presence", name, "yes" if name in kinds else "no", _words(name), easy)
    yield Fact("list", "", join_names([instrument_name(kind) for kind in kinds]) or "none")
    if seen.boxes:
        yield Fact("count", "", str(len({(state.instrument, state.box) for state in states})))
    else:
        yield Fact("count_kinds", "", str(len(kinds)))


def _movement_facts(seconds: Sequence[SecondLabels]) -> Iterator[Fact]:
    if any(second.instruments is None for second in seconds):
        return
    for name in sorted({state.instrument for second in seconds for state in second.instruments or ()}, key=_order):
        there = [any(state.instrument == name for state in second.instruments or ()) for second in seconds]
        words = _words(name)
        if all(there):
            states = [_unambiguous(second.instruments or ()).get(name) for second in seconds]
            centres = [state.centre for state in states if state is not None and state.centre is not None]
            answer = _movement(centres) if len(centres) == len(seconds) else None
            if answer is None:
                continue
            yield Fact("move", name, answer, words)
            yield Fact("moves", name, "no" if answer == "stays in place" else "yes", words)
            for axis, one, other in (("across", "to the left", "to the right"), ("along", "up", "down")):
                if answer in (one, other):
                    yield Fact("direction", f"{name} {axis}", answer, {**words, "one": one, "other": other})
        elif sum(a != b for a, b in itertools.pairwise(there)) == 1:
            yield Fact("move", name, "enters the view" if there[-1] else "leaves the view", words)


def _phase_facts(phase: str, seen: _Seen) -> Iterator[Fact]:
    yield Fact("phase", "", phase_name(phase))
    for other in sorted(seen.phases):
        yield Fact("phase_is", other, "yes" if other == phase else "no", {"phase": phase_name(other)})


def _relation_facts(states: Sequence[InstrumentState], rng: random.Random) -> Iterator[Fact]:
    one = [(name, state.centre) for name, state in _unambiguous(states).items() if state.centre is not None]
    only = {"only": ""} if len(states) == 2 else {}
    for i, (first, (x1, y1)) in enumerate(one):
        for second, (x2, y2) in one[i + 1 :]:
            for way, sides, which, apart in (
                ("beside", ("left", "right"), ("left", "right"), x2 - x1),
                ("above", ("above", "below"), ("higher", "lower"), y2 - y1),
            ):
                if abs(apart) < APART:
                    continue
                a, b = rng.sample((first, second), 2)
                side = rng.randrange(2)
                truth = (apart > 0) == (a == first) if side == 0 else (apart > 0) != (a == first)
                words = {**_words(a), "y": instrument_name(b), **only}
                yield Fact(way, f"{a} {sides[side]} {b}", "yes" if truth else "no", {**words, "side": sides[side]})
                answer = instrument_name(a if truth else b)
                pair = f"{first} {which[side]} {second}"
                yield Fact(f"which_{way}", pair, answer, {**words, "side": which[side]})


def _triplet_facts(states: Sequence[InstrumentState], seen: _Seen, rng: random.Random) -> Iterator[Fact]:
    if any(not state.verb for state in states):
        return
    acts = {(state.instrument, state.verb, state.target) for state in states if _acts(state)}
    for name, state in _unambiguous(states).items():
        words = _words(name)
        act = _act(state, "ing")
        yield Fact("doing", name, act or "nothing", words)
        others = sorted({(verb, target) for kind, verb, target in seen.acts if kind == name})
        for verb, target in others:
            if (verb, target) != (state.verb, state.target):
                yield Fact("acts", f"{name} {verb} {target}", "no", {**words, **_verb_words(verb, target, name)})
        if _acts(state):
            more = {**words, **_verb_words(state.verb, state.target, name)}
            yield Fact("acts", f"{name} {state.verb} {state.target}", "yes", more)
        for verb in sorted({verb for verb, _ in others}):
            answer = target_name(state.target) if _acts(state) and verb == state.verb else "nothing"
            yield Fact("what", f"{name} {verb}", answer, {**words, **_verb_words(verb, "", name)})
    for verb, target in sorted({(verb, target) for _, verb, target in seen.acts}):
        by = sorted({name for name, *act in acts if act == [verb, target]}, key=_order)
        if len(by) < 2:
            answer = instrument_name(by[0]) if by else "none"
            yield Fact("who", f"{verb} {target}", answer, _verb_words(verb, target))


def _temporal_facts(window: _Window, seen: _Seen) -> Iterator[Fact]:
    seconds = window.seconds
    if all(second.instruments is not None for second in seconds):
        for name in window.clip.vocabulary:
            there = [any(state.instrument == name for state in second.instruments or ()) for second in seconds]
            words, easy = _words(name), name not in seen.instruments
            rises = [i for i in range(1, len(there)) if there[i] and not there[i - 1]]
            falls = [i for i in range(1, len(there)) if there[i - 1] and not there[i]]
            if not any(there):
                yield Fact("appears", name, NOT_APPEARING, words, easy)
                yield Fact("visible", name, NOT_VISIBLE, words, easy)
                continue
            if len(rises) == 1 and not there[0]:
                yield Fact("appears", name, f"at second {rises[0]}", words)
            if len(falls) == 1 and not there[-1]:
                yield Fact("disappears", name, f"at second {falls[0]}", words)
            if all(there):
                yield Fact("disappears", name, NOT_DISAPPEARING, words)
            if len(rises) + there[0] == 1:
                first = there.index(True)
                yield Fact("visible", name, f"{first} to {first + sum(there) - 1}", words)
    phases = [second.phase for second in seconds]
    if None not in phases:
        starts = [i for i in range(1, len(phases)) if phases[i] != phases[i - 1]]
        yield Fact("phase_change", "", "yes" if starts else "no")
        for phase in sorted(seen.phases):
            words = {"phase": phase_name(phase)}
            begun = [i for i in starts if phases[i] == phase]
            if phase not in phases:
                yield Fact("phase_starts", phase, NOT_STARTING, words)
            elif len(begun) == 1 and phases[0] != phase:
                yield Fact("phase_starts", phase, f"at second {begun[0]}", words)


def _movement(centres: Sequence[tuple[float, float]]) -> str | None:
    """How a centre moves, by its first and last place; None where that is not clear."""
    dx, dy = centres[-1][0] - centres[0][0], centres[-1][1] - centres[0][1]
    if max(max(axis) - min(axis) for axis in zip(*centres, strict=True)) <= STAYED:
        return "stays in place"
    if abs(dx) >= MOVED and abs(dx) >= DOMINANT * abs(dy):
        return "to the right" if dx > 0 else "to the left"
    if abs(dy) >= MOVED and abs(dy) >= DOMINANT * abs(dx):
        return "down" if dy > 0 else "up"
    return None


def _place(centre: tuple[float, float]) -> str:
    column, row = (min(2, int(3 * share)) for share in centre)
    return _PLACES[row][column]


def _unambiguous(states: Sequence[InstrumentState]) -> dict[str, InstrumentState]:
    """Instruments of which one is in view, by name, in the usual order."""
    counts = Counter(state.instrument for state in states)
    one = {state.instrument: state for state in states if counts[state.instrument] == 1}
    return dict(sorted(one.items(), key=lambda entry: _order(entry[0])))


def _acts(state: InstrumentState) -> bool:
    return bool(state.verb) and state.verb != "null_verb" and state.target not in ("", "null_target")


# ---- words


def join_names(names: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"; "" for none."""
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def _order(instrument: str) -> int:
    return _ORDER.get(instrument, len(_ORDER))


def _noun(instrument: str) -> _Noun:
    return _NOUNS.get(instrument) or _Noun(instrument.replace("_", " "))


def _words(instrument: str) -> dict[str, str]:
    noun = _noun(instrument)
    verbs = {"is": "are", "does": "do", "has": "have"} if noun.plural else {"is": "is", "does": "does", "has": "has"}
    verbs |= {name.capitalize(): word.capitalize() for name, word in verbs.items()}
    return {"x": noun.text, "a": noun.article, **verbs}


def _verb_words(verb: str, target: str, instrument: str = "") -> dict[str, str]:
    third = verb + "s"
    return {
        "verb": verb,
        "verbs": third,
        "s": verb if _noun(instrument).plural else third,
        "ing": _gerund(verb),
        "target": target_name(target),
    }


def _gerund(verb: str) -> str:
    return _GERUNDS.get(verb) or verb.removesuffix("e") + "ing"


def _act(state: InstrumentState, form: str) -> str:
    """ "dissecting the gallbladder" for "ing", "dissects the gallbladder" for "s"; "" where it does nothing."""
    words = _verb_words(state.verb, state.target, state.instrument)
    return f"{words[form]} the {words['target']}" if _acts(state) else ""


# ---- captions

_WORDINGS = 3
_FILLERS = frozenset({"the", "at", "in", "while", "is", "are", "of", "view"})
_EVENTS = 4


def short_caption(seconds: Sequence[SecondLabels], wording: int = 0) -> str | None:
    """One sentence of at most SHORT_WORDS words: phase, and the instruments with place, verb and target.

    Instruments that are in view in half of the labelled seconds or more, each with its most frequent action and its
    last place; without places, then without the last instruments, where that is too long. None where fewer than half
    of the seconds have instrument labels. wording is 0, 1 or 2.
    """
    known = [second.instruments for second in seconds if second.instruments is not None]
    if 2 * len(known) < len(seconds) or not known:
        return None
    placed, plain = _instrument_clauses(known, places=True), _instrument_clauses(known, places=False)
    for clauses in (placed, *(plain[:count] for count in range(len(plain), -1, -1))):
        text = _with_phase(_joined(clauses), _main_phase(seconds), wording)
        if len(text.split()) <= SHORT_WORDS:
            break
    return text


def long_caption(seconds: Sequence[SecondLabels], wording: int = 0) -> str | None:
    """The order of what happens, in at most LONG_WORDS words.

    The actions (instrument, verb, target) that last 2 s or more by their first second, at most four, the longest ones.
    None where a quarter of the seconds or more have no instrument labels. wording is 0, 1 or 2.
    """
    known = [(i, second.instruments) for i, second in enumerate(seconds) if second.instruments is not None]
    if 4 * len(known) <= 3 * len(seconds):
        return None
    first: dict[str, int] = {}
    lasted: Counter[str] = Counter()
    for i, states in known:
        for clause in sorted({_clause(state, "") for state in states}):
            first.setdefault(clause, i)
            lasted[clause] += 1
    events = sorted((c for c in lasted if lasted[c] >= 2), key=lambda c: (-lasted[c], first[c], c))
    for count in range(min(_EVENTS, len(events)), -1, -1):
        ordered = sorted(events[:count], key=lambda c: (first[c], c))
        text = _with_phase(_in_order(ordered, first, bool(known[-1][1])), _phase_course(seconds), wording)
        if len(text.split()) <= LONG_WORDS:
            return text
    return None


def _keywords(seconds: Sequence[SecondLabels], places: bool) -> str | None:
    """A short caption without the words that carry nothing: "preparation grasper left retracts gallbladder"."""
    known = [second.instruments for second in seconds if second.instruments is not None]
    if not known:
        return None
    text = f"{_main_phase(seconds)} {_joined(_instrument_clauses(known, places))}"
    return " ".join(word for word in text.replace(",", "").split() if word not in _FILLERS)


def _instrument_clauses(known: Sequence[Sequence[InstrumentState]], places: bool) -> list[str]:
    """One clause for each kind of instrument in view for half of the seconds or more."""
    clauses = []
    for name in sorted({state.instrument for states in known for state in states}, key=_order):
        of_kind = [[state for state in states if state.instrument == name] for states in known]
        there = [states for states in of_kind if states]
        if 2 * len(there) < len(known):
            continue
        number = Counter(len(states) for states in there).most_common(1)[0][0]
        actions = Counter((s.verb, s.target) for states in there for s in states)
        active = {action: n for action, n in actions.items() if _acts(InstrumentState(name, *action))}
        verb, target = max(active or actions, key=lambda action: (actions[action], action))
        last = there[-1][-1]
        if number > 1:
            state = InstrumentState(name, verb, target)
            several = f"{_NUMBERS[min(number, 6)]} {instrument_name(name)}s"
            clauses.append(f"one of {several} {_does(state)}" if _acts(state) else f"{several} are in view")
            continue
        where = f" {_at(_place(last.centre))}" if places and last.centre is not None else ""
        clauses.append(_clause(InstrumentState(name, verb, target), where))
    return clauses


def _clause(state: InstrumentState, where: str) -> str:
    """ "the hook at the left dissects the gallbladder"."""
    return f"the {instrument_name(state.instrument)}{where} {_does(state)}"


def _does(state: InstrumentState) -> str:
    be = "are" if _noun(state.instrument).plural else "is"
    return _act(state, "s") or (f"{be} idle" if state.verb else f"{be} in view")


def _at(place: str) -> str:
    return f"in the {place}" if place == "center" else f"at the {place}"


def _joined(clauses: Sequence[str]) -> str:
    if not clauses:
        return "no instrument is in view"
    return " while ".join(filter(None, (", ".join(clauses[:-1]), clauses[-1])))


def _in_order(events: Sequence[str], first: Mapping[str, int], in_view_at_end: bool) -> str:
    """ "first the grasper …, then the hook … while …, finally no instrument is in view"."""
    steps: dict[int, list[str]] = {}
    for clause in events:
        steps.setdefault(first[clause], []).append(clause)
    texts = [" while ".join(clauses) for clauses in steps.values()]
    if not in_view_at_end:
        texts.append("no instrument is in view")
    if not texts:
        return "instruments are in view only briefly"
    if len(texts) == 1:
        return texts[0]
    return f"first {texts[0]}, " + "".join(f"then {text}, " for text in texts[1:-1]) + f"finally {texts[-1]}"


def _with_phase(text: str, phase: str, wording: int) -> str:
    if not phase:
        sentence = text
    elif wording == 0:
        sentence = f"during {phase}, {text}"
    elif wording == 1:
        sentence = f"{phase}: {text}"
    else:
        sentence = f"{text}; the phase is {phase}"
    return sentence[0].upper() + sentence[1:] + "."


def _main_phase(seconds: Sequence[SecondLabels]) -> str:
    """The phase of most seconds; "" where none is known."""
    phases = Counter(second.phase for second in seconds if second.phase is not None)
    return phase_name(phases.most_common(1)[0][0]) if phases else ""


def _phase_course(seconds: Sequence[SecondLabels]) -> str:
    """ "preparation", or "preparation and then clipping and cutting" where the phase changes."""
    phases = [phase_name(second.phase) for second in seconds if second.phase is not None]
    return " and then ".join(p for i, p in enumerate(phases) if i == 0 or p != phases[i - 1])


# ---- files


def write_samples(path: str | Path, samples: Iterable[Sample]) -> None:
    """Write questions as JSON, one object each, which VideoChat's readers understand; see docs/questions.md."""
    rows = []
    for s in samples:
        entry = {"id": s.id, "video": s.video, "group": s.group, "start_s": s.start_s, "end_s": s.end_s, "task": s.task}
        entry |= {"kind": s.kind, "type": s.type, "subject": s.subject}
        entry["QA"] = [{"i": "", "q": s.question, "a": s.answer}]
        rows.append(json.dumps(entry, ensure_ascii=False))
    Path(path).write_text("[\n" + ",\n".join(rows) + "\n]\n", encoding="utf-8")


def read_samples(path: str | Path, *, task: str = "", videos: Sequence[ClipVideo] | None = None) -> list[Sample]:
    """Read questions: this project's files, VideoChat's ("QA": [{"i", "q", "a"}]) and LLaVA's ("conversations").

    Args:
        task: of entries that name none.
        videos: the clips that the questions are about. Each entry must then name one of them (its name, or a path whose
            stem is its name, or the name of a video that has one clip), and an entry without start_s and end_s is
            about all of it. Without videos such an entry cannot be read.

    Raises SampleError with file, entry (from 1), what was found and what was expected.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SampleError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise SampleError(f"{path} is no JSON: {error}; expected a list of entries (docs/questions.md)") from error
    if not isinstance(content, list):
        raise SampleError(f"{path}: {_kind_of(content)} found, expected a list of entries (docs/questions.md)")
    clips = _ClipNames(videos) if videos is not None else None
    samples: list[Sample] = []
    ids: dict[str, int] = {}
    for number, entry in enumerate(content, 1):
        try:
            found = _read_entry(entry, task, clips, f"{path.stem}/{number}")
        except SampleError as error:
            raise SampleError(f"{path}, entry {number}: {error}") from error
        for sample in found:
            if ids.setdefault(sample.id, number) != number:
                raise SampleError(f"{path}, entry {number}: id {sample.id!r} is that of entry {ids[sample.id]} too")
        samples += found
    return samples


class _ClipNames:
    """Clips by what a file may call them."""

    def __init__(self, videos: Sequence[ClipVideo]) -> None:
        self._clips = {clip.name: clip for clip in videos}
        self._groups: dict[str, list[ClipVideo]] = defaultdict(list)
        for clip in videos:
            self._groups[clip.video].append(clip)

    def find(self, name: str) -> ClipVideo:
        for wanted in dict.fromkeys((name, name.rsplit("/", 1)[-1], Path(name).stem)):
            if wanted in self._clips:
                return self._clips[wanted]
            if of_video := self._groups.get(wanted):
                if len(of_video) == 1:
                    return of_video[0]
                names = ", ".join(clip.name for clip in of_video[:4])
                raise SampleError(f"video {name!r} has {len(of_video)} clips; expected one of them: {names}, …")
        like = nearest(name, list(self._clips))
        raise SampleError(f"there is no video {name!r}" + (f"; did you mean {like!r}?" if like else ""))


def _read_entry(entry: object, task: str, clips: _ClipNames | None, fallback: str) -> list[Sample]:
    if not isinstance(entry, dict):
        raise SampleError(f"{_kind_of(entry)} found, expected an object with video and QA or conversations")
    video = _text(entry, "video")
    task = _text(entry, "task") if "task" in entry else task
    if not re.fullmatch(r"[a-z][a-z0-9_]*", task):
        expected = f"one of {', '.join(TASKS)}, or a new one of a-z, 0-9 and _"
        raise SampleError(f"task {task!r} found, expected {expected}; give it as `task` or to the reader")
    clip = clips.find(video) if clips is not None else None
    start_s, end_s = _span(entry, clip)
    name = clip.name if clip is not None else video
    group = clip.video if clip is not None else entry.get("group") or name.split("@")[0]
    kind = entry.get("kind")
    if kind is not None and kind not in KINDS:
        raise SampleError(f"kind {kind!r} found, expected one of {', '.join(KINDS)}")
    pairs = list(_pairs(entry))
    identity = str(entry.get("id") or fallback)
    return [
        Sample(
            identity if len(pairs) == 1 else f"{identity}/{i}",
            name,
            str(group),
            start_s,
            end_s,
            task,
            kind or _guessed_kind(task, answer),
            question,
            answer,
            str(entry.get("type") or ""),
            str(entry.get("subject") or ""),
        )
        for i, (question, answer) in enumerate(pairs)
    ]


def _span(entry: Mapping[str, Any], clip: ClipVideo | None) -> tuple[int, int]:
    """Window of an entry; other people's files spell it start, end."""
    numbers = {}
    for name, default in (("start", 0), ("end", len(clip) if clip is not None else None)):
        value = entry.get(f"{name}_s", entry.get(name, default))
        if value is None:
            raise SampleError("no end_s found; give it, or the videos, so that the whole video is the window")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value != int(value):
            raise SampleError(f"{name}_s {value!r} found, expected whole seconds")
        numbers[name] = int(value)
    start_s, end_s = numbers["start"], numbers["end"]
    most = f" <= {len(clip)}" if clip is not None else ""
    if not 0 <= start_s < end_s or (clip is not None and end_s > len(clip)):
        raise SampleError(f"start_s {start_s}, end_s {end_s} found, expected 0 <= start_s < end_s{most}")
    return start_s, end_s


def _pairs(entry: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Questions and answers of an entry in either form."""
    if "QA" in entry:
        rows = entry["QA"]
        if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
            raise SampleError('QA is not a list of objects; expected [{"q": "…", "a": "…"}]')
        for row in rows:
            # VideoChat puts the question into the instruction "i" where a data set asks the same one throughout.
            question = row.get("q") or row.get("i")
            yield _text({"q": question}, "q"), _text(row, "a")
    elif "conversations" in entry:
        turns = entry["conversations"]
        sound = isinstance(turns, list) and turns and all(isinstance(turn, dict) for turn in turns)
        if not sound or [turn.get("from") for turn in turns] != ["human", "gpt"] * (len(turns) // 2):
            raise SampleError("conversations is not a list of turns from human, gpt, human, gpt, …")
        for human, gpt in zip(turns[::2], turns[1::2], strict=True):
            yield _text({"value": _without_marks(human.get("value"))}, "value"), _text(gpt, "value")
    else:
        raise SampleError(f"keys {', '.join(map(str, entry)) or 'none'} found, expected QA or conversations")


def _without_marks(value: object) -> object:
    return re.sub(r"<(video|image)>", "", value) if isinstance(value, str) else value


def _guessed_kind(task: str, answer: str) -> str:
    if task == "temporal":
        return "interval" if re.fullmatch(r"\d+ to \d+", answer) else "second"
    return "open" if task == "caption" else "closed"


def _text(entry: Mapping[str, Any], key: str) -> str:
    value = entry.get(key)
    if not isinstance(value, str) or not value.strip():
        raise SampleError(f"{key} {value!r} found, expected text")
    return value.strip()


def _kind_of(value: object) -> str:
    return "an object" if isinstance(value, dict) else "a list" if isinstance(value, list) else repr(value)[:40]
