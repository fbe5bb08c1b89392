# SPDX-License-Identifier: Apache-2.0
"""Golden files: what a replay of a bag must say, small enough to read in a diff, with tolerances for each field."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import groupby, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from surg_perception.replay.session import Replayed
from surg_perception.stream.ribbon import Row, plot_ribbons

FORMAT = 1
_HEADER = """\
# Golden file of `surg-perception replay`: what was said of a bag. --golden compares with it, --update writes it anew
# and keeps its tolerances. Times in seconds after the first image; docs/replay.md says what is compared, and how.
"""
_STEPS_S = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600)
_MOST_SCORES = 60
_ANSWERS = ("exact", "words", "off")


class GoldenError(ValueError):
    """A golden file that cannot be compared with; says what was found, what was expected and what to do."""


@dataclass(frozen=True)
class Tolerances:
    """How much a replay may differ from the golden file.

    Attributes:
        boundary_s: a change of phase or state may come so much earlier or later; 0: every image must be the same.
        score: absolute, of mean confidence and mean probabilities of a stretch.
        latent: relative, of the mean root mean square of the latent of a stretch.
        answer: "exact", "words" (case, punctuation and spaces do not count) or "off" (the text does not count).
        answer_confidence: absolute.
    """

    boundary_s: float = 0.0
    score: float = 0.02
    latent: float = 0.02
    answer: str = "words"
    answer_confidence: float = 0.05

    @classmethod
    def read(cls, content: Any, where: str) -> Tolerances:
        """From the mapping of a golden file; what it does not name has its default."""
        names = [entry.name for entry in fields(cls)]
        if not isinstance(content, Mapping) or not set(content) <= set(names):
            raise GoldenError(f"{where}: tolerances are {content!r}, expected of {', '.join(names)}")
        for name, value in content.items():
            if name == "answer":
                if value not in _ANSWERS:
                    raise GoldenError(f"{where}: tolerance answer is {value!r}, expected one of {', '.join(_ANSWERS)}")
            elif isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise GoldenError(f"{where}: tolerance {name} is {value!r}, expected a number from 0 up")
        return cls(**content)


@dataclass(frozen=True)
class Difference:
    """Something that is not as in the golden file, from start_s to end_s."""

    kind: str
    start_s: float
    end_s: float
    text: str

    def __str__(self) -> str:
        span = f"{self.start_s:.2f}" if self.end_s <= self.start_s else f"{self.start_s:.2f}–{self.end_s:.2f}"
        return f"{span} s  {self.kind}: {self.text}"


@dataclass
class Comparison:
    """Outcome of a comparison: differences fail, notes do not."""

    differences: list[Difference] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def summary(self) -> str:
        """One line."""
        if not self.differences:
            return "as in the golden file"
        kinds = [difference.kind for difference in self.differences]
        return "not as in the golden file: " + ", ".join(
            f"{kind} {'once' if kinds.count(kind) == 1 else f'{kinds.count(kind)} times'}"
            for kind in dict.fromkeys(kinds)
        )


@dataclass
class Golden:
    """The content of a golden file, as `Golden.of` makes and `read` finds it."""

    input: dict[str, Any]
    model: dict[str, Any]
    tolerances: Tolerances
    counts: dict[str, int]
    labels: list[str]
    phases: list[tuple[float, int, str]]
    """(seconds, images, name) of each run of one phase."""
    states: list[tuple[float, int, str]]
    step_s: float
    scores: list[list[float | None]]
    """Seconds, mean confidence, mean latent RMS and mean probabilities of each stretch of step_s with images."""
    answers: list[dict[str, Any]]

    @classmethod
    def of(cls, replayed: Replayed, tolerances: Tolerances | None = None, step_s: float | None = None) -> Golden:
        """What a golden file says of a replay."""
        times_s = replayed.times_s
        step_s = step_s or next((s for s in _STEPS_S if times_s[-1] / s <= _MOST_SCORES), _STEPS_S[-1])
        return cls(
            input={"topic": replayed.topic, "images": len(times_s), "sha256": replayed.input_sha256},
            model={"id": replayed.model_id, "backend": replayed.backend, "vqa_id": replayed.vqa_model_id},
            tolerances=tolerances or Tolerances(),
            counts=replayed.counts,
            labels=list(replayed.labels),
            phases=_runs(times_s, [frame.phase for frame in replayed.frames]),
            states=_runs(times_s, [frame.state for frame in replayed.frames]),
            step_s=step_s,
            scores=list(_scores(replayed, times_s, step_s)),
            answers=[
                {
                    "at": round(answer.at_s, 3),
                    "ask": answer.question,
                    "error": answer.error,
                    "answer": answer.answer,
                    "task": answer.task,
                    "confidence": round(answer.confidence, 3),
                }
                for answer in replayed.answers
            ],
        )

    def text(self) -> str:
        """As YAML with a line for each run, stretch and answer."""
        content = {
            "format": FORMAT,
            "input": self.input,
            "model": self.model,
            "tolerances": asdict(self.tolerances),
            "counts": self.counts,
            "labels": self.labels,
            "phases": [{"at": at, "images": images, "phase": name} for at, images, name in self.phases],
            "states": [{"at": at, "images": images, "state": name} for at, images, name in self.states],
            "score_step_s": self.step_s,
            "score_columns": ["at", "confidence", "latent_rms", *self.labels],
            "scores": self.scores,
            "answers": self.answers,
        }
        dumped = yaml.safe_dump(content, sort_keys=False, default_flow_style=None, allow_unicode=True, width=1000)
        return _HEADER + dumped

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        part.write_text(self.text(), encoding="utf-8")
        part.replace(path)

    @classmethod
    def read(cls, path: Path) -> Golden:
        """Read a file that `write` wrote and people may have edited.

        Raises:
            GoldenError: it is none, or one of another version.
            OSError: it cannot be read.
        """
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
            if not isinstance(content, Mapping) or content.get("format") != FORMAT:
                found = content.get("format") if isinstance(content, Mapping) else content
                raise GoldenError(
                    f"{path} is no golden file of format {FORMAT} (format {str(found)[:40]!r} found); {_REPLACE}"
                )
            return cls(
                input=dict(content["input"]),
                model=dict(content["model"]),
                tolerances=Tolerances.read(content.get("tolerances") or {}, str(path)),
                counts=dict(content["counts"]),
                labels=[str(name) for name in content["labels"]],
                phases=[(float(run["at"]), int(run["images"]), str(run["phase"])) for run in content["phases"]],
                states=[(float(run["at"]), int(run["images"]), str(run["state"])) for run in content["states"]],
                step_s=float(content["score_step_s"]),
                scores=[[None if x is None else float(x) for x in row] for row in content["scores"]],
                answers=[dict(entry) for entry in content.get("answers") or []],
            )
        except GoldenError:
            raise
        except (yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
            reason = " ".join(str(error).split())
            raise GoldenError(
                f"{path} cannot be read as a golden file ({type(error).__name__}: {reason}); {_REPLACE}"
            ) from error

    def compare(self, replayed: Replayed) -> Comparison:
        """What is different in a replay of the same bag.

        Raises:
            GoldenError: it is a replay of other images.
        """
        new = Golden.of(replayed, self.tolerances, self.step_s)
        if self.input.get("sha256") != new.input["sha256"]:
            was, now = (f"{one.get('images')} images of {one.get('topic')}" for one in (self.input, new.input))
            raise GoldenError(
                f"the golden file is of another bag: {was}, sha256 {str(self.input.get('sha256'))[:12]}…; this one has "
                f"{now}, sha256 {new.input['sha256'][:12]}…; give the bag it was made of, or {_ANEW}"
            )
        found = Comparison()
        for key, what in (("id", "model"), ("backend", "backend"), ("vqa_id", "model for questions")):
            if key == "vqa_id" and not replayed.asks:
                continue
            if self.model.get(key) != new.model[key]:
                found.notes.append(
                    f"the {what} is {new.model[key] or 'none'}, the golden file's {self.model.get(key) or 'none'}"
                )
        times_s = replayed.times_s
        for kind, ours, theirs in (("phase", new.phases, self.phases), ("state", new.states, self.states)):
            found.differences += _changed_runs(kind, times_s, ours, theirs, self.tolerances.boundary_s)
        found.differences += self._changed_scores(new)
        if replayed.asks:
            found.differences += self._changed_answers(new)
        elif self.answers:
            found.notes.append(f"no questions were asked, the golden file's {len(self.answers)} answers do not count")
        found.differences.sort(key=lambda difference: (difference.start_s, difference.kind))
        return found

    def _changed_scores(self, new: Golden) -> Iterator[Difference]:
        if new.labels != self.labels:
            yield Difference("labels", 0.0, 0.0, f"{', '.join(new.labels)}; golden {', '.join(self.labels)}")
            return
        columns = ["confidence", "latent RMS", *(f"probability of {name}" for name in self.labels)]
        for ours, theirs in zip_longest(new.scores, self.scores, fillvalue=[0.0]):
            at_s, worst = float((ours if len(ours) > 1 else theirs)[0] or 0.0), None
            for name, now, was in zip_longest(columns, ours[1:], theirs[1:]):
                if now is None and was is None:
                    continue
                if now is None or was is None:
                    over, text = math.inf, f"{name} {_number(now)}, golden {_number(was)}"
                else:
                    allowed = self.tolerances.latent * abs(was) if name == "latent RMS" else self.tolerances.score
                    over = abs(now - was) - allowed - 1e-9
                    over = math.inf if math.isnan(over) else over
                    text = f"{name} {now:.3f}, golden {was:.3f} (tolerance {allowed:.3g})"
                if over > 0 and (worst is None or over > worst[0]):
                    worst = (over, text)
            if worst is not None:
                yield Difference("score", at_s, at_s + self.step_s, worst[1])

    def _changed_answers(self, new: Golden) -> Iterator[Difference]:
        for ours, theirs in zip_longest(new.answers, self.answers):
            if ours is None or theirs is None:
                one, what = (theirs, "was not asked") if ours is None else (ours, "is not in the golden file")
                yield Difference("answer", _at(one), _at(one), f"{one.get('ask')!r} {what}")
                continue
            at_s, where = _at(ours), repr(ours["ask"])
            was = theirs["confidence"] if isinstance(theirs.get("confidence"), (int, float)) else None
            if (ours["ask"], at_s) != (theirs.get("ask"), _at(theirs)):
                text = f"{where} was asked, in the golden file {theirs.get('ask')!r} at {_at(theirs):.2f} s"
            elif ours["error"] != theirs.get("error"):
                text = f"{where}: error code {ours['error']}, golden {theirs.get('error')}"
            elif ours["task"] != theirs.get("task"):
                text = f"{where}: task {ours['task']}, golden {theirs.get('task')}"
            elif not self._same_answer(ours["answer"], str(theirs.get("answer"))):
                text = f"{where}: {ours['answer']!r}, golden {theirs.get('answer')!r}"
            elif was is None or not abs(ours["confidence"] - was) <= self.tolerances.answer_confidence + 1e-9:
                text = f"{where}: confidence {ours['confidence']:.3f}, golden {_number(was)}"
            else:
                continue
            yield Difference("answer", at_s, at_s, text)

    def _same_answer(self, now: str, was: str) -> bool:
        how = self.tolerances.answer
        return how == "off" or now == was or (how == "words" and _words(now) == _words(was))


_ANEW = "write it anew with --update"
_REPLACE = f"remove it and {_ANEW}"


def plot(path: Path, replayed: Replayed, golden: Golden | None = None, comparison: Comparison | None = None) -> None:
    """Save a PNG: the phases of the golden file, if given, of the replay and of each image alone; what is different.

    Raises ImportError where matplotlib is missing.
    """
    labels = list(
        dict.fromkeys([*replayed.labels, *(name for _, _, name in (golden.phases if golden else ()) if name)])
    )
    ids = {name: number for number, name in enumerate(labels)}
    times_s = replayed.times_s
    rows: list[Row] = []
    if golden is not None:
        rows.append(("golden file", times_s, [ids.get(name, -1) for name in _expanded(golden.phases)]))
    rows.append(("replay", times_s, [frame.phase_id for frame in replayed.frames]))
    rows.append(("each image alone", times_s, [frame.raw_phase_id for frame in replayed.frames]))
    marks = [(difference.start_s, difference.end_s) for difference in comparison.differences] if comparison else []
    plot_ribbons(
        path,
        rows,
        labels,
        confidence=(times_s, [frame.confidence if frame.phase else math.nan for frame in replayed.frames]),
        title=f"{replayed.model_id} on {replayed.backend}",
        marks=("different", marks) if golden is not None else None,
    )


def _runs(times_s: Sequence[float], names: Sequence[str]) -> list[tuple[float, int, str]]:
    runs = []
    for name, group in groupby(zip(times_s, names, strict=True), key=lambda entry: entry[1]):
        members = list(group)
        runs.append((round(members[0][0], 3), len(members), name))
    return runs


def _expanded(runs: Sequence[tuple[float, int, str]]) -> list[str]:
    return [name for _, images, name in runs for _ in range(images)]


def _scores(replayed: Replayed, times_s: Sequence[float], step_s: float) -> Iterator[list[float | None]]:
    entries = zip(times_s, replayed.frames, strict=True)
    for stretch, group in groupby(entries, key=lambda entry: math.floor(entry[0] / step_s + 1e-6)):
        frames = [frame for _, frame in group]
        sure = [frame.confidence for frame in frames if frame.phase]
        latents = [frame.latent_rms for frame in frames if frame.latent_rms is not None]
        seen = [frame.probabilities for frame in frames if frame.probabilities]
        means = np.mean(seen, axis=0).tolist() if seen else [None] * len(replayed.labels)
        row = [float(np.mean(one)) if one else None for one in (sure, latents)]
        yield [round(stretch * step_s, 3), *(None if x is None else round(x, 3) for x in (*row, *means))]


def _changed_runs(
    kind: str,
    times_s: Sequence[float],
    ours: Sequence[tuple[float, int, str]],
    theirs: Sequence[tuple[float, int, str]],
    boundary_s: float,
) -> Iterator[Difference]:
    now, was = _expanded(ours), _expanded(theirs)
    if len(now) != len(was):
        raise GoldenError(f"the golden file's {kind}s are of {len(was)} images, expected {len(now)}; {_ANEW}")
    different = [
        (i, now[i], was[i])
        for i in range(len(now))
        if now[i] != was[i] and not _near_a_change(i, times_s, now, was, boundary_s)
    ]
    for _, group in groupby(enumerate(different), key=lambda entry: (entry[1][0] - entry[0], *entry[1][1:])):
        members = [entry for _, entry in group]
        first, last = members[0][0], members[-1][0]
        text = f"{members[0][1] or 'none'}, golden {members[0][2] or 'none'} ({len(members)} images)"
        yield Difference(kind, times_s[first], times_s[last], text)


def _near_a_change(i: int, times_s: Sequence[float], now: Sequence[str], was: Sequence[str], boundary_s: float) -> bool:
    """Whether both sides say within boundary_s what the other one says at i."""
    if not boundary_s:
        return False
    seen_now, seen_was = set(), set()
    for step in (-1, 1):
        j = i
        while 0 <= j < len(times_s) and abs(times_s[j] - times_s[i]) <= boundary_s + 1e-9:
            seen_now.add(now[j])
            seen_was.add(was[j])
            j += step
    return now[i] in seen_was and was[i] in seen_now


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _at(entry: Mapping[str, Any]) -> float:
    return float(entry.get("at", 0.0))


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"
