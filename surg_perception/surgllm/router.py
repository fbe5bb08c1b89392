# SPDX-License-Identifier: Apache-2.0
"""Which task a question is about: logistic regression on the question's sentence vector, with two ways out.

Under a threshold of probability no task is picked, and the joint adapter answers; and a question that is like those
which are not to be answered is marked. Probability and threshold come from questions kept back in whole groups of
similar wording: with single sentences kept back, the other fillings of the same template would stay in, and everything
would look certain.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from surg_perception.surgllm.declined_examples import ALLOWED_EXAMPLES, DECLINED_EXAMPLES
from surg_perception.surgllm.scope_probe import ScopeProbe, held_out

WEIGHTS_NAME = "router.safetensors"
FACTS_NAME = "router.json"
NO_TASK = ""
"""The task of a `Route` where the joint adapter is to answer."""

MOST_QUESTIONS = 300
"""Of a task, this many distinct questions at most are used and kept."""

_FOLDS = 5
_WORDINGS_PER_FOLD = 2
_STRENGTHS = (1.0, 10.0, 100.0)  # inverse regularisation, of which the folds choose one
_FREE = ""  # the group of allowed questions that belong to no task
_NEVER = 2.0  # no probability reaches it


class RouterError(ValueError):
    """Questions or files that make no router: what was found, what was expected."""


class Encoder(Protocol):
    """What gives sentence vectors, such as `sentence_encoder.SentenceEncoder`."""

    def embed(self, sentences: Sequence[str]) -> NDArray[np.float32]:
        """Vectors of length 1, float32 [n, width]."""
        ...


@dataclass(frozen=True)
class Route:
    """Where a question goes.

    Attributes:
        task: the task's name, or `NO_TASK` where the probability is below the threshold.
        probability: of the best task, 0..1.
        best: the best task, also where it is not taken.
        declined: the question is like those that are not to be answered; then the task is `NO_TASK`.
    """

    task: str
    probability: float
    best: str
    declined: bool = False


@dataclass(frozen=True)
class RouterScores:
    """A router against questions whose tasks are known.

    Attributes:
        questions: how many.
        accuracy: share of questions whose best task is the right one, threshold aside.
        routed: share of questions that are over the threshold.
        routed_accuracy: of those, the share that go to the right task; NaN where there are none.
        declined: share of questions taken for ones that are not to be answered.
        tasks: names of the confusion's rows, and of its columns but the last two.
        confusion: int64 [K, K + 2]: true task, task picked; the last columns are the joint adapter and declined ones.
    """

    questions: int
    accuracy: float
    routed: float
    routed_accuracy: float
    declined: float
    tasks: tuple[str, ...]
    confusion: NDArray[np.int64]


@dataclass(frozen=True)
class Router:
    """A fitted router; `Router.fit` makes one, `Router.load` reads one.

    Attributes:
        tasks: K names.
        weights, bias: float32 [K, width] and [K]; probabilities are softmax(weights @ vector + bias).
        threshold: probability from which the best task is taken.
        scope: tells questions that are not to be answered.
        held_out_accuracy: share of kept-back questions whose best task was the right one.
        held_out_declined: share of kept-back questions to be declined that were.
        held_out_refused: share of other kept-back questions that were declined.
        questions: the distinct questions of each task that it was fitted on.
        declined, allowed: questions that are not to be answered, and others that are.
        encoder: what gives the sentence vectors.
    """

    tasks: tuple[str, ...]
    weights: NDArray[np.float32]
    bias: NDArray[np.float32]
    threshold: float
    scope: ScopeProbe
    held_out_accuracy: float
    held_out_declined: float
    held_out_refused: float
    questions: Mapping[str, tuple[str, ...]]
    declined: tuple[str, ...]
    allowed: tuple[str, ...]
    encoder: Encoder

    @classmethod
    def fit(
        cls,
        questions: Mapping[str, Sequence[str]],
        encoder: Encoder,
        threshold: float | None = None,
        *,
        declined: Sequence[str] = DECLINED_EXAMPLES,
        allowed: Sequence[str] = ALLOWED_EXAMPLES,
        precision: float = 0.95,
        seed: int = 0,
    ) -> Router:
        """Fits a router; scikit-learn is needed here and nowhere else.

        Args:
            questions: task → its questions, at least 2 distinct ones, at least 2 tasks.
            encoder: what gives the sentence vectors.
            threshold: None: the lowest one over which at least `precision` of the kept-back questions go right, but
                not under 0.5, where the best task is more likely wrong than right.
            declined: questions that are not to be answered, at least 2.
            allowed: questions that are, of whatever task, beside those of `questions`, at least 2.
            precision: see threshold, 0..1.
            seed: of the grouping of similar questions.

        Raises:
            RouterError: too few tasks or questions, or a task without a name.
        """
        kept = {task: _some_distinct(asked) for task, asked in questions.items()}
        few = [task for task, asked in kept.items() if len(asked) < 2]
        if len(kept) < 2 or few or NO_TASK in kept:
            raise RouterError(
                "A router needs two tasks or more, each with a name and two distinct questions; "
                f"got {', '.join(map(repr, kept)) or 'none'}"
                + (f", with too few questions for {', '.join(map(repr, few))}." if few else ".")
            )
        tasks = tuple(kept)
        labels = np.repeat(np.arange(len(tasks)), [len(kept[task]) for task in tasks])
        vectors = encoder.embed([question for task in tasks for question in kept[task]])
        folds = [_folds(vectors[labels == k], seed) for k in range(len(tasks))]
        weights, bias, logits = _calibrated(vectors, labels, np.concatenate(folds))
        probabilities = _softmax(logits)
        right = probabilities.argmax(1) == labels
        weight = _balance(labels)
        if threshold is None:
            threshold = _threshold(probabilities.max(1), right, weight, precision)

        declined, allowed = tuple(dict.fromkeys(declined)), tuple(dict.fromkeys(allowed))
        out = encoder.embed(declined)
        inside = {**{task: vectors[labels == k] for k, task in enumerate(tasks)}, _FREE: encoder.embed(allowed)}
        caught, lost = held_out(out, inside, [*folds, _folds(inside[_FREE], seed), _folds(out, seed)])
        return cls(
            tasks,
            weights.astype(np.float32),
            bias.astype(np.float32),
            float(threshold),
            ScopeProbe.fit(out, inside),
            float(np.average(right, weights=weight)),
            caught,
            lost,
            kept,
            declined,
            allowed,
            encoder,
        )

    def with_task(self, task: str, questions: Sequence[str], threshold: float | None = None) -> Router:
        """A router that knows one task more, or other questions for one; all other questions are its own."""
        asked = {**self.questions, task: questions}
        return Router.fit(asked, self.encoder, threshold, declined=self.declined, allowed=self.allowed)

    def route(self, question: str) -> Route:
        """Where a question goes."""
        return self.route_all([question])[0]

    def route_all(self, questions: Sequence[str]) -> list[Route]:
        """Where each question goes; one batch for the sentence encoder."""
        vectors = self.encoder.embed(questions)
        probabilities = _softmax(vectors @ self.weights.T + self.bias)
        routes = []
        for row, declined in zip(probabilities, self.scope.margins(vectors) > 0, strict=True):
            best, probability = self.tasks[int(row.argmax())], float(row.max())
            task = best if probability >= self.threshold and not declined else NO_TASK
            routes.append(Route(task, probability, best, bool(declined)))
        return routes

    def scores(self, pairs: Sequence[tuple[str, str]]) -> RouterScores:
        """Accuracy and confusion on pairs of question and true task.

        Raises:
            RouterError: no pairs, or a task that the router does not know.
        """
        unknown = sorted({task for _, task in pairs} - set(self.tasks))
        if unknown or not pairs:
            raise RouterError(f"Expected questions about {', '.join(self.tasks)}; got {', '.join(unknown) or 'none'}.")
        routes = self.route_all([question for question, _ in pairs])
        count = len(self.tasks)
        confusion = np.zeros((count, count + 2), np.int64)
        column = {**{task: k for k, task in enumerate(self.tasks)}, NO_TASK: count}
        for (_, task), route in zip(pairs, routes, strict=True):
            confusion[column[task], count + 1 if route.declined else column[route.task]] += 1
        routed = int(confusion[:, :count].sum())
        best = sum(route.best == task for (_, task), route in zip(pairs, routes, strict=True))
        return RouterScores(
            len(pairs),
            best / len(pairs),
            routed / len(pairs),
            float(np.trace(confusion)) / routed if routed else float("nan"),
            float(confusion[:, -1].sum()) / len(pairs),
            self.tasks,
            confusion,
        )

    def save(self, folder: str | Path) -> tuple[Path, Path]:
        """Writes weights (`router.safetensors`) and facts (`router.json`) into a model folder; returns both paths."""
        from safetensors.numpy import save_file

        weights, facts = Path(folder) / WEIGHTS_NAME, Path(folder) / FACTS_NAME
        tensors = {
            "weights": np.ascontiguousarray(self.weights),
            "bias": self.bias,
            "scope.support": self.scope.support.astype(np.float16),
            "scope.weights": self.scope.weights,
            "scope.bias": np.array([self.scope.bias], np.float32),
        }
        save_file(tensors, weights)
        content = {
            "tasks": self.tasks,
            "threshold": self.threshold,
            "held_out_accuracy": round(self.held_out_accuracy, 4),
            "held_out_declined": round(self.held_out_declined, 4),
            "held_out_refused": round(self.held_out_refused, 4),
            "questions": self.questions,
            "declined": self.declined,
            "allowed": self.allowed,
        }
        facts.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return weights, facts

    @classmethod
    def load(cls, folder: str | Path, encoder: Encoder) -> Router:
        """Reads what `save` wrote.

        Raises:
            RouterError: a file is missing, cannot be read, or the two do not belong together.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            tensors = load_file(Path(folder) / WEIGHTS_NAME)
            facts = json.loads((Path(folder) / FACTS_NAME).read_text(encoding="utf-8"))
            router = cls(
                tuple(facts["tasks"]),
                tensors["weights"],
                tensors["bias"],
                float(facts["threshold"]),
                ScopeProbe(
                    tensors["scope.support"].astype(np.float32),
                    tensors["scope.weights"],
                    float(tensors["scope.bias"][0]),
                ),
                float(facts["held_out_accuracy"]),
                float(facts["held_out_declined"]),
                float(facts["held_out_refused"]),
                {str(task): tuple(asked) for task, asked in facts["questions"].items()},
                tuple(facts["declined"]),
                tuple(facts["allowed"]),
                encoder,
            )
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RouterError(f"No router in {folder}: {type(error).__name__}: {error}") from None
        shapes = [
            list(part.shape) for part in (router.weights, router.bias, router.scope.support, router.scope.weights)
        ]
        count, width, size = len(router.tasks), router.weights.shape[-1], len(router.scope.weights)
        if shapes != [[count, width], [count], [size, width], [size]]:
            raise RouterError(f"{folder}: {FACTS_NAME} names {count} tasks; {WEIGHTS_NAME} holds tensors {shapes}.")
        return router


def _some_distinct(questions: Sequence[str]) -> tuple[str, ...]:
    """Distinct questions in their order; where there are too many, evenly picked from the sorted ones."""
    distinct = list(dict.fromkeys(questions))
    if len(distinct) <= MOST_QUESTIONS:
        return tuple(distinct)
    chosen = np.linspace(0, len(distinct) - 1, MOST_QUESTIONS).round().astype(int)
    ordered = sorted(distinct)
    return tuple(ordered[i] for i in chosen)


def _folds(vectors: NDArray[np.float32], seed: int) -> NDArray[np.int64]:
    """The fold in which each question of one kind is kept back, int64 [n]: similar questions have the same one."""
    from sklearn.cluster import KMeans

    groups = min(_FOLDS * _WORDINGS_PER_FOLD, len(vectors))
    found = KMeans(groups, n_init=3, random_state=seed).fit_predict(vectors)
    by_size = np.argsort(-np.bincount(found, minlength=groups), kind="stable")
    fold_of = np.empty(groups, np.int64)
    fold_of[by_size] = np.arange(groups) % _FOLDS
    folds = fold_of[found]
    # Near-equal questions must not be kept back as a whole.
    return folds if len(set(folds)) > 1 else np.arange(len(vectors)) % 2


def _calibrated(
    vectors: NDArray[np.float32], labels: NDArray[np.int64], folds: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Weights [K, width] and bias [K] of a regression on all questions, and the kept-back logits [n, K].

    Both are divided by the temperature that suits the kept-back ones. Each strength is tried at its own temperature,
    since regularisation shrinks the logits, which alone is no fault.
    """
    tried = []
    for strength in _STRENGTHS:
        logits = _held_out_logits(vectors, labels, folds, strength)
        tried.append((*_temperature(logits, labels), strength, logits))
    _, temperature, strength, logits = min(tried, key=lambda entry: entry[0])
    weights, bias = _regression(vectors, labels, strength)
    return weights / temperature, bias / temperature, logits / temperature


def _balance(labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """Weight of each question, so that every task weighs the same, float64 [n]."""
    return 1.0 / np.bincount(labels)[labels]


def _regression(
    vectors: NDArray[np.float32], labels: NDArray[np.int64], strength: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Weights [K, width] and bias [K] of a multinomial logistic regression."""
    from sklearn.linear_model import LogisticRegression

    fitted = LogisticRegression(C=strength, class_weight="balanced", max_iter=1000).fit(vectors, labels)
    weights, bias = fitted.coef_, fitted.intercept_
    if len(weights) == 1:  # for two classes scikit-learn keeps the difference of the two
        weights, bias = np.concatenate([-weights, weights]) / 2, np.concatenate([-bias, bias]) / 2
    return weights, bias


def _held_out_logits(
    vectors: NDArray[np.float32], labels: NDArray[np.int64], folds: NDArray[np.int64], strength: float
) -> NDArray[np.float64]:
    """Logits of each question by a regression that has not seen its fold, float64 [n, K]."""
    logits = np.zeros((len(labels), int(labels.max()) + 1))
    for fold in np.unique(folds):
        out = folds == fold
        weights, bias = _regression(vectors[~out], labels[~out], strength)
        logits[out] = vectors[out] @ weights.T + bias
    return logits


def _temperature(logits: NDArray[np.float64], labels: NDArray[np.int64]) -> tuple[float, float]:
    """The least mean negative log-likelihood and the temperature that gives it (Guo et al., arXiv 1706.04599)."""
    weights = _balance(labels)

    def loss(temperature: float) -> float:
        of_truth = _softmax(logits / temperature)[np.arange(len(labels)), labels]
        return float(np.average(-np.log(np.maximum(of_truth, 1e-12)), weights=weights))

    return min((loss(temperature), float(temperature)) for temperature in np.geomspace(0.1, 10, 81))


def _threshold(
    probability: NDArray[np.float64], right: NDArray[np.bool_], weights: NDArray[np.float64], precision: float
) -> float:
    """The lowest probability over which at least `precision` of the questions are right, 0.5 or more."""
    order = np.argsort(-probability, kind="stable")
    share = np.cumsum((right * weights)[order]) / np.cumsum(weights[order])
    good = np.flatnonzero(share >= precision)
    return max(0.5, float(probability[order[good[-1]]])) if len(good) else _NEVER


def _softmax(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    exponents = np.exp(logits - logits.max(axis=1, keepdims=True), dtype=np.float64)
    return exponents / exponents.sum(axis=1, keepdims=True)
