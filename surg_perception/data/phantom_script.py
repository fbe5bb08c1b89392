# SPDX-License-Identifier: Apache-2.0
"""What happens in a phantom procedure: anatomy, timetable, instruments' motion. No pixels here.

World coordinates: x right, y down, unit = radius of the endoscope's circular picture at zoom 1, origin near
the gallbladder's neck. Everything is a pure function of the seed and the time, so any frame can be asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from surg_perception.data.labels import CHOLEC80_PHASES, CHOLECT50_INSTRUMENTS, CHOLECT50_TARGETS, CHOLECT50_VERBS

Vec = NDArray[np.float64]

# Natural logarithm of the phases' durations in seconds, mean and standard deviation, measured on the 1 fps
# labels of all 80 Cholec80 videos (videos without the phase left out).
_LOG_DURATION_S = ((4.49, 0.79), (6.67, 0.55), (4.96, 0.63), (6.38, 0.66), (4.47, 0.40), (4.98, 0.77), (4.17, 0.70))
_LEAST_SHARE = 0.012
_CLIP_PLACES = {"duct": (0.62, 0.74, 0.34), "artery": (0.66, 0.36)}  # 0 at the neck, cut at 0.5
_BAG_GONE = 0.5  # share of the last phase after which the bag has left

_INSTRUMENT = {name: i for i, name in enumerate(CHOLECT50_INSTRUMENTS)}
_VERB = {name: i for i, name in enumerate(CHOLECT50_VERBS)}
_TARGET = {name: i for i, name in enumerate(CHOLECT50_TARGETS)}

WORKING, ASSISTING, FUNDUS = 0, 1, 2
"""The three trocars: the operator's right hand, the left hand, the assistant who lifts the fundus."""

BAG_MOUTH_HALF, BAG_MOUTH_WIDENS, BAG_MOUTH_Y = 0.30, 0.22, -0.42
"""Specimen bag of unit size: half-width of its closed mouth, what opening adds to it, the mouth's height."""

_CAUTERY_VERBS = {_VERB["dissect"], _VERB["coagulate"]}


def _vec(x: float, y: float) -> Vec:
    return np.array([x, y], dtype=np.float64)


def smoothstep(x: float) -> float:
    """Cubic ease from 0 (x <= 0) to 1 (x >= 1)."""
    x = min(max(x, 0.0), 1.0)
    return x * x * (3.0 - 2.0 * x)


@dataclass(frozen=True)
class Act:
    """One instrument doing one thing to one target, `start_s` to `end_s`, at a named site plus an offset."""

    start_s: float
    end_s: float
    verb: int
    target: int
    site: str
    offset: tuple[float, float]


@dataclass(frozen=True)
class Visit:
    """One instrument's stay: in through its trocar, one act after another, out again."""

    instrument: int
    trocar: int
    start_s: float
    end_s: float
    travel_s: float
    acts: tuple[Act, ...]


@dataclass(frozen=True)
class Bleed:
    """Blood from a point: spreads from `start_s`, stands, and is taken away between `clear_s` and `gone_s`."""

    at: tuple[float, float]
    size: float
    start_s: float
    clear_s: float
    gone_s: float

    def amount(self, time_s: float) -> float:
        """0 (none) to 1 (all of it) at `time_s`."""
        if not self.start_s < time_s < self.gone_s:
            return 0.0
        grown = 1.0 - math.exp(-(time_s - self.start_s) / max(1e-6, 0.3 * (self.clear_s - self.start_s)))
        return grown * (1.0 - smoothstep((time_s - self.clear_s) / max(1e-6, self.gone_s - self.clear_s)))


@dataclass(frozen=True)
class Anatomy:
    """This patient: places in world units. Colours and textures are the renderer's."""

    fundus: Vec
    neck: Vec
    bow: float
    duct_base: Vec
    artery_base: Vec
    fat_line: float
    bag_spot: Vec
    bag_park: Vec
    swing: float
    pivots: tuple[Vec, Vec, Vec]

    @classmethod
    def from_seed(cls, seed: int) -> Anatomy:
        rng = np.random.default_rng([seed, 1])
        neck = _vec(rng.uniform(-0.12, 0.12), rng.uniform(0.22, 0.36))
        fundus = neck + _vec(rng.uniform(-0.42, 0.30), rng.uniform(-1.35, -1.15))
        side = 1.0 if rng.random() < 0.75 else -1.0
        right = math.radians(rng.uniform(-48, 8))
        left = math.radians(rng.uniform(150, 205))
        top = math.radians(rng.uniform(-125, -75))
        pivots = [2.6 * _vec(side * math.cos(a), math.sin(a)) for a in (right, left)]
        pivots.append(2.6 * _vec(math.cos(top), math.sin(top)))
        return cls(
            fundus=fundus,
            neck=neck,
            bow=rng.uniform(-0.16, 0.16),
            duct_base=neck + _vec(rng.uniform(0.12, 0.30), rng.uniform(0.46, 0.58)),
            artery_base=neck + _vec(rng.uniform(-0.18, -0.02), rng.uniform(0.42, 0.52)),
            fat_line=float(neck[1]) + rng.uniform(0.14, 0.40),
            bag_spot=_vec(side * rng.uniform(0.25, 0.45), rng.uniform(0.12, 0.30)),
            bag_park=_vec(side * rng.uniform(0.75, 1.05), rng.uniform(0.45, 0.70)),
            swing=side * math.radians(rng.uniform(65, 100)),
            pivots=(pivots[0], pivots[1], pivots[2]),
        )

    def vessel(self, name: str, neck: Vec, place: Vec) -> Vec:
        """Points [N, 2] of the "duct" or "artery" at `place` [N], 0 at the gallbladder's neck to 1 at the base."""
        u = place[:, None]
        if name == "duct":
            top, base, bend = neck + _vec(0.0, -0.03), self.duct_base, _vec(0.05, 0.0)
        else:
            top, base, bend = neck + _vec(-0.08, -0.12), self.artery_base, _vec(-0.07, 0.02)
        return (1 - u) * top + u * base + 4 * u * (1 - u) * (1 - 0.3 * u) * bend


@dataclass(frozen=True)
class ToolPose:
    """One instrument at one instant. `opening` 0 (closed) to 1; `flow` 0..1 is water leaving an irrigator."""

    instrument: int
    trocar: int
    tip: Vec
    pivot: Vec
    opening: float
    verb: int
    target: int
    cautery: float
    flow: float


@dataclass(frozen=True)
class Bag:
    """The specimen bag: centre, size, tilt (radians), how wide it is open (0..1)."""

    at: Vec
    size: float
    tilt: float
    opening: float


@dataclass(frozen=True)
class SceneState:
    """All that the renderer needs for one instant."""

    time_s: float
    camera: tuple[float, float, float, float]  # x, y, zoom, roll (radians)
    spine: tuple[Vec, Vec, Vec] | None  # gallbladder: fundus, control point, neck
    girth: float
    expose: float
    detach: float
    clips: tuple[tuple[str, float], ...]  # "duct" or "artery", place along it: 0 neck, 1 base
    cut: frozenset[str]
    bag: Bag | None
    bleeds: tuple[float, ...]
    char: float
    wet: float
    smoke: float
    smoke_at: Vec
    exposure: float
    light: Vec
    trocar_view: float  # 0 no, 1 the endoscope is drawn back into its trocar
    tools: tuple[ToolPose, ...]


@dataclass
class _Plan:
    visits: list[Visit] = field(default_factory=list)
    bleeds: list[Bleed] = field(default_factory=list)


_ActSpec = tuple[str, str, str, float]  # verb, target, site, weight


class Script:
    """The whole procedure of one seed: phases, visits, events; `state(time_s)` gives any instant.

    Modelled on shares measured on Cholec80's 1 fps tool labels: grasper 35 to 79 % of every phase, hook 77 and 76 % of
    the two dissections, clipper 40 and scissors 20 % of ClippingCutting, irrigator 39 and bipolar 31 % of
    CleaningCoagulation. Not modelled: phases out of order or missing (29 of 80 videos), rare uses (the hook outside
    the dissections), and as many instruments as there in Preparation and GallbladderRetraction.
    """

    def __init__(self, seed: int, duration_s: float) -> None:
        self.anatomy = Anatomy.from_seed(seed)
        self.duration_s = duration_s
        self._seed = seed
        rng = np.random.default_rng([seed, 2])
        self.phases = self._phase_times(rng)
        self._cycle_s = 7.0 * (duration_s / 120.0) ** (1.0 / 3.0)
        plan = _Plan()
        for start_s, end_s, phase in self.phases:
            self._plan_phase(plan, phase, start_s, end_s, rng)
        self.visits = tuple(sorted(plan.visits, key=lambda v: (v.trocar, v.start_s)))
        self.bleeds = tuple(plan.bleeds)
        self._visit_ends = np.array([v.end_s for v in self.visits])
        self._visit_starts = np.array([v.start_s for v in self.visits])
        self._acts = sorted(
            ((a, v) for v in self.visits for a in v.acts), key=lambda pair: (pair[0].start_s, pair[1].trocar)
        )
        self._progress = {phase: self._progress_knots(phase) for phase in (1, 3, 5)}
        self._clips, self._cuts = self._clip_events()
        self._cautery = np.array(
            [
                (a.start_s, a.end_s, v.instrument == _INSTRUMENT["hook"])
                for a, v in self._acts
                if a.verb in _CAUTERY_VERBS and v.instrument in (_INSTRUMENT["hook"], _INSTRUMENT["bipolar"])
            ]
        ).reshape(-1, 3)
        self._smoke_strength = np.random.default_rng([seed, 3]).uniform(0.2, 1.0, len(self._cautery))
        self._waves = np.random.default_rng([seed, 4]).uniform(0, 2 * math.pi, (8, 4))
        self._views = self._camera_views()

    # ---- timetable -------------------------------------------------------------------------------------

    def _phase_times(self, rng: np.random.Generator) -> tuple[tuple[float, float, int], ...]:
        nominal_s = np.array([math.exp(rng.normal(mean, 0.8 * sd)) for mean, sd in _LOG_DURATION_S])
        share = _LEAST_SHARE + (1.0 - _LEAST_SHARE * len(nominal_s)) * nominal_s / nominal_s.sum()
        edges = np.concatenate([[0.0], np.cumsum(share)]) * self.duration_s
        edges[-1] = self.duration_s
        return tuple((float(edges[k]), float(edges[k + 1]), k) for k in range(len(CHOLEC80_PHASES)))

    def phase_at(self, time_s: float) -> tuple[int, float]:
        """Phase id at `time_s` and how far into the phase it is, 0..1."""
        for start_s, end_s, phase in self.phases:
            if time_s < end_s or phase == len(self.phases) - 1:
                return phase, min(1.0, (time_s - start_s) / (end_s - start_s))
        raise AssertionError("phases cover the whole procedure")

    def _visit(
        self, plan: _Plan, rng: np.random.Generator, instrument: str, trocar: int, start_s: float, end_s: float,
        specs: Sequence[_ActSpec], spread: float = 0.06,
    ) -> Visit:  # fmt: skip
        """Append a visit whose acts share the time left after travelling in proportion to their weights."""
        travel_s = min(0.9, 0.18 * (end_s - start_s))
        moves_s = 0.35 * travel_s
        busy_s = (end_s - start_s) - 2 * travel_s - moves_s * (len(specs) - 1)
        total = sum(spec[3] for spec in specs)
        acts = []
        at_s = start_s + travel_s
        for verb, target, site, weight in specs:
            length_s = busy_s * weight / total
            offset = (float(rng.normal(0, spread)), float(rng.normal(0, spread)))
            acts.append(Act(at_s, at_s + length_s, _VERB[verb], _TARGET[target], site, offset))
            at_s += length_s + moves_s
        visit = Visit(_INSTRUMENT[instrument], trocar, start_s, end_s, travel_s, tuple(acts))
        plan.visits.append(visit)
        return visit

    def _cycles(
        self, start_s: float, end_s: float, rng: np.random.Generator, factor: float = 1.0
    ) -> list[tuple[float, float]]:
        count = max(1, round((end_s - start_s) / (self._cycle_s * factor)))
        cuts = np.cumsum(rng.uniform(0.7, 1.3, count))
        edges = start_s + (end_s - start_s) * np.concatenate([[0.0], cuts / cuts[-1]])
        return [(float(a), float(b)) for a, b in pairwise(edges)]

    def _plan_phase(self, plan: _Plan, phase: int, start_s: float, end_s: float, rng: np.random.Generator) -> None:
        span = end_s - start_s

        def at(u: float) -> float:
            return start_s + u * span

        if phase == 0:
            for a, b in self._cycles(at(0.2), end_s, rng, 0.8):
                spec = [
                    ("retract", "gallbladder", "body", 1.0), ("grasp", "gallbladder", "neck", 1.0),
                    ("retract", "omentum", "omentum", 1.0), ("retract", "liver", "liver", 1.0),
                    ("grasp", "omentum", "omentum", 1.0),
                ][int(rng.integers(5))]  # fmt: skip
                self._visit(plan, rng, "grasper", ASSISTING, a, a + rng.uniform(0.5, 0.75) * (b - a), [spec])
            if rng.random() < 0.15:
                adhesion: _ActSpec = ("cut", "adhesion", "omentum", 1.0)
                self._visit(plan, rng, "scissors", WORKING, at(0.72), at(0.98), [adhesion])
        elif phase in (1, 3):
            self._plan_dissection(plan, phase, start_s, end_s, rng)
        elif phase == 2:
            duct: list[_ActSpec] = [("clip", "cystic_duct", f"clip_duct_{k}", 1.0) for k in range(3)]
            artery: list[_ActSpec] = [("clip", "cystic_artery", f"clip_artery_{k}", 1.0) for k in range(2)]
            cut: list[_ActSpec] = [("cut", "cystic_duct", "cut_duct", 1.2), ("cut", "cystic_artery", "cut_artery", 1.0)]
            self._visit(plan, rng, "clipper", WORKING, at(0.04), at(0.32), duct, 0.0)
            self._visit(plan, rng, "clipper", WORKING, at(0.40), at(0.58), artery, 0.0)
            self._visit(plan, rng, "scissors", WORKING, at(0.64), at(0.90), cut, 0.0)
            hold: _ActSpec = ("retract", "gallbladder", "neck", 1.0)
            a = rng.uniform(0.0, 0.3)
            self._visit(plan, rng, "grasper", ASSISTING, at(a), at(a + 0.6), [hold], 0.02)
        elif phase == 4:
            handle: list[_ActSpec] = [("grasp", "specimen_bag", "bag_rim", 1.0)]
            self._visit(plan, rng, "grasper", WORKING, at(0.02), at(0.96), handle, 0.0)
            pack: list[_ActSpec] = [("grasp", "gallbladder", "neck", 0.5), ("pack", "gallbladder", "neck", 1.0)]
            self._visit(plan, rng, "grasper", ASSISTING, at(0.2), at(0.80), pack, 0.0)
        elif phase == 5:
            self._plan_cleaning(plan, start_s, end_s, rng)
        elif phase == 6:
            pull: list[_ActSpec] = [("grasp", "specimen_bag", "bag_rim", 1.0)]
            self._visit(plan, rng, "grasper", WORKING, at(0.02), at(0.55), pull, 0.0)

    def _plan_dissection(self, plan: _Plan, phase: int, start_s: float, end_s: float, rng: np.random.Generator) -> None:
        targets = (
            ["peritoneum", "gallbladder", "cystic_pedicle", "cystic_duct", "cystic_artery", "cystic_plate"]
            if phase == 1
            else ["gallbladder", "gallbladder", "gallbladder", "cystic_plate", "liver"]
        )
        site = "calot" if phase == 1 else "front"
        for a, b in self._cycles(start_s, end_s, rng):
            gap = rng.uniform(0.05, 0.25) * (b - a)
            acts: list[_ActSpec] = []
            for _ in range(int(rng.integers(2, 4))):
                target = targets[int(rng.integers(len(targets)))]
                verb = "coagulate" if target == "liver" else "dissect"
                acts.append((verb, target, site, float(rng.uniform(0.7, 1.4))))
            self._visit(plan, rng, "hook", WORKING, a, b - gap, acts, 0.05)
        self._bleed_and_stop(plan, start_s, end_s, rng, site, (0.55 if phase == 1 else 0.45))
        for a, b in self._cycles(start_s, end_s, rng, 2.2):
            hold: _ActSpec = ("retract", "gallbladder", "neck", 1.0)
            rest = rng.uniform(0.2, 0.45) * (b - a)
            lead = rng.uniform(0.0, 1.0) * rest
            self._visit(plan, rng, "grasper", ASSISTING, a + lead, b - (rest - lead), [hold], 0.02)
        top: _ActSpec = ("retract", "gallbladder", "fundus", 1.0)
        until_s = end_s if phase == 1 else start_s + 0.5 * (end_s - start_s)
        self._visit(plan, rng, "grasper", FUNDUS, start_s, until_s, [top], 0.01)

    def _bleed_and_stop(
        self, plan: _Plan, start_s: float, end_s: float, rng: np.random.Generator, site: str, chance: float
    ) -> None:
        """Now and then a vessel bleeds and one hook visit gives way to bipolar forceps or suction."""
        if rng.random() > chance:
            return
        hooks = [v for v in plan.visits if v.instrument == _INSTRUMENT["hook"] and start_s <= v.start_s < end_s]
        if len(hooks) < 3:
            return
        chosen = hooks[int(rng.integers(1, len(hooks) - 1))]
        plan.visits.remove(chosen)
        a, b = chosen.start_s, chosen.end_s
        if rng.random() < 0.5:
            acts: list[_ActSpec] = [("coagulate", "blood_vessel" if site == "calot" else "liver", site, 1.0)]
            self._visit(plan, rng, "bipolar", WORKING, a, b, acts, 0.02)
        else:
            self._visit(plan, rng, "irrigator", WORKING, a, b, [("aspirate", "fluid", site, 1.0)], 0.02)
        at = self._fixed_site(site, 0.5)
        plan.bleeds.append(Bleed((float(at[0]), float(at[1])), rng.uniform(0.3, 0.5), a - 0.5 * (b - a), b, b + 2.0))

    def _plan_cleaning(self, plan: _Plan, start_s: float, end_s: float, rng: np.random.Generator) -> None:
        wash: list[list[_ActSpec]] = [
            [("irrigate", "liver", "bed", 1.0), ("aspirate", "fluid", "pool", 1.3)],
            [("irrigate", "abdominal_wall_cavity", "pool", 1.0), ("aspirate", "fluid", "pool", 1.2)],
        ]
        stop: list[list[_ActSpec]] = [
            [("coagulate", "liver", "bed", 1.0)], [("coagulate", "cystic_plate", "bed", 1.0)],
        ]  # fmt: skip
        pairs = self._cycles(start_s, end_s, rng, 2.0)
        for a, b in pairs:
            mid = a + rng.uniform(0.46, 0.56) * (b - a)
            self._visit(plan, rng, "irrigator", WORKING, a, mid - 0.06 * (b - a), wash[int(rng.integers(2))], 0.05)
            self._visit(plan, rng, "bipolar", WORKING, mid, b - 0.08 * (b - a), stop[int(rng.integers(2))], 0.06)
        retract: _ActSpec = ("retract", "liver", "liver_edge", 1.0)
        a = start_s + rng.uniform(0.0, 0.35) * (end_s - start_s)
        self._visit(plan, rng, "grasper", ASSISTING, a, a + 0.6 * (end_s - start_s), [retract], 0.02)
        bed, pool = self._fixed_site("bed", 0.5), self._fixed_site("pool", 0.0)
        span = end_s - start_s
        plan.bleeds.append(
            Bleed((float(bed[0]), float(bed[1])), 0.42, start_s - 0.3 * span, start_s + 0.4 * span, end_s)
        )
        plan.bleeds.append(
            Bleed((float(pool[0]), float(pool[1])), 0.55, start_s - 0.2 * span, start_s + 0.3 * span, end_s)
        )

    # ---- events that leave a trace ---------------------------------------------------------------------

    def _progress_knots(self, phase: int) -> tuple[Vec, Vec]:
        """Work done in a phase: grows only while the hook (phase 5: the bipolar) acts."""
        start_s, end_s, _ = self.phases[phase]
        tool = _INSTRUMENT["bipolar" if phase == 5 else "hook"]
        spans = [
            (a.start_s, a.end_s)
            for a, v in self._acts
            if v.instrument == tool and v.trocar == WORKING and start_s <= a.start_s < end_s
        ]
        times, done = [start_s], [0.0]
        for a, b in spans:
            times += [a, b]
            done += [done[-1], done[-1] + (b - a)]
        return np.array(times), np.array(done) / max(done[-1], 1e-9)

    def progress(self, phase: int, time_s: float) -> float:
        """Share 0..1 of the phase's dissection (1, 3) or coagulation (5) done by `time_s`."""
        times, done = self._progress[phase]
        return float(np.interp(time_s, times, done))

    def _clip_events(self) -> tuple[list[tuple[float, str, float]], list[tuple[float, str]]]:
        clips, cuts = [], []
        for act, _ in self._acts:
            if act.site.startswith("clip_"):
                _, vessel, k = act.site.split("_")
                clips.append((act.start_s + 0.6 * (act.end_s - act.start_s), vessel, _CLIP_PLACES[vessel][int(k)]))
            elif act.site.startswith("cut_"):
                cuts.append((act.start_s + 0.6 * (act.end_s - act.start_s), act.site.split("_")[1]))
        return clips, cuts

    # ---- motion ----------------------------------------------------------------------------------------

    def _wave(self, k: int, time_s: float, rate_hz: float) -> float:
        """Smooth wandering in about -1..1 with a seeded phase."""
        p = self._waves[k]
        w = 2 * math.pi * rate_hz * time_s
        return 0.5 * math.sin(w + p[0]) + 0.3 * math.sin(1.71 * w + p[1]) + 0.2 * math.sin(2.93 * w + p[2])

    def _hold(self, time_s: float) -> float:
        """How firmly the assisting grasper has the gallbladder, 0..1."""
        best = 0.0
        for visit in self._present(time_s):
            if visit.trocar != ASSISTING:
                continue
            for act in visit.acts:
                if act.site == "neck":
                    ease = min(0.8, 0.25 * (act.end_s - act.start_s)) + 1e-9
                    best = max(
                        best, smoothstep((time_s - act.start_s) / ease) * smoothstep((act.end_s - time_s) / ease)
                    )
        return best

    def _present(self, time_s: float) -> list[Visit]:
        return [self.visits[k] for k in np.flatnonzero((self._visit_starts <= time_s) & (time_s < self._visit_ends))]

    def _bag_mouth(self, time_s: float) -> tuple[Vec, float, float, float]:
        """Where the bag is: centre, size, tilt, opening (phases 4 to 6)."""
        phase, u = self.phase_at(time_s)
        a = self.anatomy
        side = 1.0 if a.bag_spot[0] > 0 else -1.0
        outside = a.bag_spot + 0.75 * a.pivots[WORKING]
        exit_ = a.bag_spot + _vec(-0.2 * side, -2.3)
        if phase == 4:
            ease = smoothstep((u - 0.02) / 0.2)
            opening = 0.25 + 0.75 * smoothstep((u - 0.22) / 0.12) - 0.85 * smoothstep((u - 0.78) / 0.14)
            return outside + (a.bag_spot - outside) * ease, 0.62, 0.25 * side, opening
        if phase == 5:
            ease = smoothstep(u / 0.12)
            return a.bag_spot + (a.bag_park - a.bag_spot) * ease, 0.62, 0.25 * side + 0.3 * ease, 0.1
        back = smoothstep((u - 0.1) / 0.12)
        out = smoothstep((u - 0.22) / 0.26)
        at = a.bag_park + (a.bag_spot - a.bag_park) * back
        return at + (exit_ - at) * out, 0.62, 0.25 * side + 0.3 * (1 - back), 0.1

    def _bagged_spine(self, time_s: float) -> tuple[Vec, Vec, Vec]:
        at, size, tilt, _ = self._bag_mouth(time_s)
        middle = at + _vec(0.0, 0.10 * size)
        along = 0.42 * size * _vec(math.cos(tilt + 1.2), math.sin(tilt + 1.2))
        return middle - along, middle + _vec(0.06 * size, 0.0), middle + along

    def _spine(self, time_s: float) -> tuple[tuple[Vec, Vec, Vec] | None, float]:
        """The gallbladder's axis (fundus, control point, neck) and girth; None once it has left."""
        a = self.anatomy
        phase, u = self.phase_at(time_s)
        if phase == 6 and u > _BAG_GONE:
            return None, 1.0
        if phase > 4:
            return self._bagged_spine(time_s), 0.62
        detach = self.progress(3, time_s)
        hold = self._hold(time_s)
        breath = _vec(0.0, 0.012 * math.sin(2 * math.pi * 0.25 * time_s))
        axis = a.neck - a.fundus
        across = _vec(-axis[1], axis[0]) / np.hypot(*axis)
        pull = hold * (
            0.07 * (a.pivots[ASSISTING] - a.neck) / 2.6
            + _vec(0.05 * self._wave(0, time_s, 0.11), 0.04 * self._wave(1, time_s, 0.13) - 0.03)
        )
        angle = a.swing * smoothstep(detach)
        c, s = math.cos(angle), math.sin(angle)
        swung = _vec(c * axis[0] - s * axis[1], s * axis[0] + c * axis[1]) * (1.0 - 0.2 * detach)
        fundus = a.fundus + breath + _vec(0.0, 0.10 * smoothstep((detach - 0.6) / 0.4))
        neck = fundus + swung + pull
        control = fundus + 0.5 * (axis * (1 - detach) + swung * detach) + across * (2 * a.bow + 0.05 * hold)
        girth = 1.0 - 0.12 * smoothstep(detach)
        if phase == 4:
            goal = self._bagged_spine(time_s)
            ease = smoothstep((u - 0.42) / 0.28)
            lift = _vec(0.0, -0.35 * math.sin(math.pi * ease))
            fundus, control, neck = (
                p + (g - p) * ease + lift for p, g in zip((fundus, control, neck), goal, strict=True)
            )
            girth += (0.62 - girth) * ease
        return (fundus, control, neck), girth

    def _fixed_site(self, name: str, done: float) -> Vec:
        a = self.anatomy
        if name == "calot":
            return a.neck + _vec(0.10 - 0.16 * done, 0.30 - 0.34 * done)
        if name == "front":
            return a.neck + (a.fundus - a.neck) * (0.08 + 0.80 * done)
        if name == "bed":
            return a.neck + (a.fundus - a.neck) * 0.45
        if name == "pool":
            return a.neck + _vec(-0.35, 0.22)
        if name == "liver":
            return a.neck + _vec(-0.55, -0.25)
        if name == "liver_edge":
            return a.neck + _vec(-0.28, 0.02)
        if name == "omentum":
            return _vec(0.1, a.fat_line + 0.1)
        raise AssertionError(f"no site {name!r}")

    def _site(self, name: str, time_s: float) -> Vec:
        if name in ("neck", "body", "fundus"):
            spine, _ = self._spine(time_s)
            assert spine is not None  # no act is planned on a gallbladder that has left
            fundus, control, neck = spine
            s = {"neck": 0.88, "body": 0.55, "fundus": 0.03}[name]
            return (1 - s) ** 2 * fundus + 2 * s * (1 - s) * control + s * s * neck
        if name == "bag_rim":
            at, size, tilt, opening = self._bag_mouth(time_s)
            side = 1.0 if self.anatomy.bag_spot[0] > 0 else -1.0
            rim = _vec(side * (BAG_MOUTH_HALF + BAG_MOUTH_WIDENS * opening), BAG_MOUTH_Y)
            c, s_ = math.cos(tilt), math.sin(tilt)
            return at + size * _vec(c * rim[0] - s_ * rim[1], s_ * rim[0] + c * rim[1])
        if name.startswith(("clip_", "cut_")):
            kind, vessel, *rest = name.split("_")
            place = 0.5 if kind == "cut" else _CLIP_PLACES[vessel][int(rest[0])]
            spine, _ = self._spine(time_s)
            assert spine is not None
            return self.anatomy.vessel(vessel, spine[2], np.array([place]))[0]
        if name == "front":
            return self._fixed_site(name, self.progress(3, time_s))
        return self._fixed_site(name, self.progress(1, time_s))

    def _act_motion(self, visit: Visit, act: Act, time_s: float) -> tuple[Vec, float, float, float]:
        """Tip while acting, opening, cautery, flow."""
        t = time_s - act.start_s
        u = t / max(1e-9, act.end_s - act.start_s)
        site = self._site(act.site, time_s) + _vec(*act.offset)
        out = self.anatomy.pivots[visit.trocar] - site
        out = out / np.hypot(*out)
        across = _vec(-out[1], out[0])
        kind = CHOLECT50_INSTRUMENTS[visit.instrument]
        wander = 0.015 * _vec(self._wave(2, time_s, 0.5), self._wave(3, time_s, 0.45))
        if kind == "hook":
            stroke = (t / 1.25) % 1.0
            if stroke < 0.3:
                reach, burn = -0.5 * smoothstep(stroke / 0.3), 0.0
            elif stroke < 0.75:
                reach, burn = -0.5 + 1.5 * smoothstep((stroke - 0.3) / 0.45), 1.0
            else:
                reach, burn = 1.0 - smoothstep((stroke - 0.75) / 0.25), 0.0
            sway = 0.05 * math.sin(2 * math.pi * t / 4.1 + self._waves[5, 0])
            return site + wander + out * 0.07 * reach + across * sway, 0.0, burn, 0.0
        if kind == "grasper":
            return site + wander * (0.2 if act.site in ("neck", "bag_rim", "fundus") else 1.0), 0.0, 0.0, 0.0
        if kind == "bipolar":
            squeeze = 0.5 - 0.5 * math.cos(2 * math.pi * t / 1.7)
            walk = across * 0.07 * math.sin(2 * math.pi * t / 5.3)
            return site + wander + walk, 0.65 * (1 - smoothstep(squeeze)), float(squeeze > 0.6), 0.0
        if kind == "clipper":
            return site + wander * 0.3, 1.0 - smoothstep((u - 0.3) / 0.3) + smoothstep((u - 0.75) / 0.2), 0.0, 0.0
        if kind == "scissors":
            snip = 0.5 + 0.5 * math.cos(2 * math.pi * u * 2)
            return site + wander * 0.3 + out * 0.02 * snip, snip, 0.0, 0.0
        sweep = 0.12 * _vec(math.sin(2 * math.pi * t / 3.7), 0.6 * math.sin(2 * math.pi * t / 2.9))
        return site + wander + sweep, 0.0, 0.0, float(act.verb == _VERB["irrigate"])

    def _tool(self, visit: Visit, time_s: float) -> ToolPose:
        """The visit's instrument at `time_s`: on its way in or out, between acts, or acting."""
        pivot = self.anatomy.pivots[visit.trocar]
        null = (_VERB["null_verb"], _TARGET["null_target"])
        ready = {"grasper": 0.8, "bipolar": 0.7, "scissors": 0.6, "clipper": 1.0}.get(
            CHOLECT50_INSTRUMENTS[visit.instrument], 0.0
        )
        before: Act | None = None
        after: Act | None = None
        for act in visit.acts:
            if act.start_s <= time_s < act.end_s:
                tip, opening, cautery, flow = self._act_motion(visit, act, time_s)
                ease_s = min(0.35, 0.2 * (act.end_s - act.start_s)) + 1e-9
                opening += (ready - opening) * (1 - smoothstep((time_s - act.start_s) / ease_s))
                return ToolPose(
                    visit.instrument, visit.trocar, tip, pivot, opening, act.verb, act.target, cautery, flow
                )
            if act.end_s <= time_s:
                before = act
            elif after is None:
                after = act

        def end_of(act: Act, time_of_act_s: float) -> Vec:
            return self._act_motion(visit, act, time_of_act_s)[0]

        def outside(tip: Vec) -> Vec:
            return tip + (pivot - tip) * 0.85

        if before is None:
            assert after is not None
            goal = end_of(after, after.start_s)
            start, ease = outside(goal), (time_s - visit.start_s) / max(1e-9, after.start_s - visit.start_s)
        elif after is None:
            start = end_of(before, before.end_s)
            goal, ease = outside(start), (time_s - before.end_s) / max(1e-9, visit.end_s - before.end_s)
        else:
            start, goal = end_of(before, before.end_s), end_of(after, after.start_s)
            ease = (time_s - before.end_s) / max(1e-9, after.start_s - before.end_s)
        tip = start + (goal - start) * smoothstep(ease)
        return ToolPose(visit.instrument, visit.trocar, tip, pivot, ready, *null, 0.0, 0.0)

    # ---- camera, light ---------------------------------------------------------------------------------

    def _camera_views(self) -> list[tuple[float, float, float, float]]:
        a = self.anatomy
        rng = np.random.default_rng([self._seed, 5])
        roll = rng.uniform(-0.2, 0.2)
        zoom = rng.uniform(0.92, 1.12)
        middle = 0.5 * (a.neck + a.fundus)
        bases = [
            (_vec(-0.05, -0.05), 1.05), (a.neck + _vec(0.02, -0.02), 1.38), (a.neck + _vec(0.05, 0.12), 1.55),
            (a.neck + 0.33 * (a.fundus - a.neck), 1.2), (0.5 * (a.bag_spot + middle) + _vec(0, 0.1), 0.98),
            (middle + _vec(0.0, 0.25), 1.10), (_vec(0.1, -0.15), 0.92),
        ]  # fmt: skip
        return [
            (
                float(c[0] + rng.uniform(-0.1, 0.1)),
                float(c[1] + rng.uniform(-0.08, 0.08)),
                float(z * zoom * rng.uniform(0.93, 1.07)),
                float(roll + rng.uniform(-0.06, 0.06)),
            )
            for c, z in bases
        ]

    def _framing(self, phase: int, time_s: float) -> Vec:
        """Camera x, y, zoom, roll meant for a phase; in phase 3 it follows the dissection up the liver bed."""
        view = np.array(self._views[phase])
        if phase == 3:
            view[:2] += 0.6 * (self._fixed_site("front", self.progress(3, time_s)) - self._fixed_site("front", 0.35))
        return view

    def _camera(self, time_s: float) -> tuple[float, float, float, float]:
        phase, _ = self.phase_at(time_s)
        start_s, end_s, _ = self.phases[phase]
        view = self._framing(phase, time_s)
        if phase > 0:
            blend_s = min(2.5, 0.35 * (end_s - start_s))
            previous = self._framing(phase - 1, time_s)
            view = previous + (view - previous) * smoothstep((time_s - start_s) / blend_s)
        wave = self._wave
        drift = np.array(
            [
                0.09 * wave(4, time_s, 0.06), 0.07 * wave(5, time_s, 0.05),
                0.09 * wave(6, time_s, 0.04) * view[2], 0.05 * wave(7, time_s, 0.05),
            ]
        )  # fmt: skip
        shake = 0.0035 * np.array([wave(1, time_s, 2.3), wave(2, time_s, 2.7), 0.0, 0.6 * wave(3, time_s, 1.9)])
        jolt = 0.02 * max(0.0, self._wave(0, time_s, 0.21) - 0.62)
        shake += jolt * np.array([math.sin(31.0 * time_s), math.cos(27.0 * time_s), 0.0, 0.0])
        x, y, zoom, roll = view + drift + shake
        return float(x), float(y), float(zoom), float(roll)

    def _smoke(self, time_s: float) -> float:
        if not len(self._cautery):
            return 0.0
        start, end, hook = self._cautery.T
        on = np.clip(time_s - start, 0.0, None)
        off = np.clip(time_s - end, 0.0, None)
        puff = (1 - np.exp(-np.minimum(on, end - start) / 1.2)) * np.exp(-off / 2.2)
        return float(min(1.0, np.sum(puff * self._smoke_strength * (0.4 + 0.35 * hook))))

    def _trocar_view(self, time_s: float) -> float:
        phase, u = self.phase_at(time_s)
        if phase == 0:
            return 1.0 - smoothstep(u / 0.12)
        if phase == 6:
            return smoothstep((u - 0.68) / 0.25)
        return 0.0

    def state(self, time_s: float) -> SceneState:
        """Everything at one instant."""
        phase, u = self.phase_at(time_s)
        spine, girth = self._spine(time_s)
        tools = [self._tool(visit, time_s) for visit in self._present(time_s)]
        tools.sort(key=lambda tool: -tool.trocar)
        bag = None
        if phase >= 4 and not (phase == 6 and u > _BAG_GONE):
            at, size, tilt, opening = self._bag_mouth(time_s)
            bag = Bag(at, size, tilt, opening)
        working = [tool.tip for tool in tools if tool.trocar == WORKING]
        return SceneState(
            time_s=time_s,
            camera=self._camera(time_s),
            spine=spine,
            girth=girth,
            expose=self.progress(1, time_s),
            detach=self.progress(3, time_s),
            clips=tuple((vessel, place) for at_s, vessel, place in self._clips if at_s <= time_s),
            cut=frozenset(vessel for at_s, vessel in self._cuts if at_s <= time_s),
            bag=bag,
            bleeds=tuple(bleed.amount(time_s) for bleed in self.bleeds),
            char=self.progress(5, time_s),
            wet=smoothstep(u / 0.3) if phase == 5 else float(phase == 6),
            smoke=self._smoke(time_s),
            smoke_at=working[0] if working else self.anatomy.neck,
            exposure=1.0 + 0.10 * self._wave(6, time_s, 0.09) + 0.015 * self._wave(7, time_s, 3.1),
            light=_vec(0.10 * self._wave(3, time_s, 0.07), 0.10 * self._wave(2, time_s, 0.06) - 0.05),
            trocar_view=self._trocar_view(time_s),
            tools=tuple(tools),
        )
