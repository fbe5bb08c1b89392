# SPDX-License-Identifier: Apache-2.0
"""The evaluation of SurgLLM with a model of a few lines that answers from the pixels it is given."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from rich.console import Console

from surg_perception.cli.main import parser
from surg_perception.data.clip_labels import ClipVideo, SecondLabels, open_clip_videos
from surg_perception.models import ModelFile
from surg_perception.surgllm import evaluation as module
from surg_perception.surgllm.evaluation import EvaluationError, bootstrap, evaluate, majority_answers
from surg_perception.surgllm.questions import TASKS, Sample, write_samples
from surg_perception.surgllm.report import choose_examples, summary_table, write_report
from surg_perception.surgllm.router import Route
from surg_perception.surgllm.text_metrics import CAPTION_METRICS, CaptionScores

NUMBERED = "Which number is shown?"
LOST = "Which number is it?"  # the router sends it to the wrong task
UNSURE = "And the number?"  # the router leaves it to the joint adapter
DECLINED = "Which number will it be?"  # the router takes it for out of scope


class NumberedFrames:
    """Every pixel of frame i is i + 1, so that no frame is black."""

    def __init__(self, key: str) -> None:
        self.key = key

    def read(self, indices: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
        for index in indices:
            yield np.full((6, 10, 3), index + 1, np.uint8)

    def fingerprint(self) -> str:
        return self.key


def clip(name: str, seconds: int = 20, key: str = "") -> ClipVideo:
    labels = (SecondLabels("Preparation", ()),) * seconds
    return ClipVideo(f"{name}@0000", name, labels, (), 1, NumberedFrames(key or name), tuple(range(seconds)))


@dataclass
class NumberReader:
    """Answers with the greatest number in its window; other adapters than "number" do not know the question."""

    model_id: str = "reader@1"
    tasks: tuple[str, ...] = ("colour", "number")
    image_size: int = 8
    segment_frames: int = 4
    max_segments: int = 4
    encoded: list[tuple[int, ...]] = field(default_factory=list)
    asked: list[tuple[str, str]] = field(default_factory=list)
    fails_after: int = 1_000

    @property
    def router(self) -> NumberReader:
        return self

    def route(self, question: str) -> Route:
        return self.route_all([question])[0]

    def route_all(self, questions: Sequence[str]) -> list[Route]:
        known = {
            LOST: Route("colour", 0.9, "colour"),
            UNSURE: Route("", 0.4, "number"),
            DECLINED: Route("", 0.9, "number", declined=True),
        }
        return [known.get(question, Route("number", 0.9, "number")) for question in questions]

    def encode(self, frames: NDArray[np.uint8]) -> tuple[int, ...]:
        assert frames.shape[1:] == (8, 8, 3)
        assert 1 <= len(frames) <= 4
        self.encoded.append(tuple(int(frame[0, 0, 0]) for frame in frames))
        return self.encoded[-1]

    def ask_batch(self, questions: Any, windows: Any, *, adapters: Any) -> list[str]:
        answers = []
        for question, window, adapter in zip(questions, windows, adapters, strict=True):
            if len(self.asked) == self.fails_after:
                raise KeyboardInterrupt
            self.asked.append((question, adapter))
            ends = [end for _, end, _ in window]
            assert [start for start, _, _ in window] == [0, *ends[:-1]]
            assert [end - start for start, end, _ in window] == [len(features) for _, _, features in window]
            number = max(max(features) for _, _, features in window)
            answers.append({"number": f"The {number}.", "joint": f"{number}"}.get(adapter, "blue"))
        return answers


def ask(start_s: int, end_s: int, question: str = NUMBERED, name: str = "A", **changed: Any) -> Sample:
    """Its true answer is what the frames show: the window's last second, counted from 1."""
    sample = Sample(
        f"{name}/{start_s}-{end_s}/{question}",
        f"{name}@0000",
        name,
        start_s,
        end_s,
        "number",
        "closed",
        question,
        str(end_s),
        "which",
    )
    return replace(sample, **changed)


def test_each_condition_asks_the_right_adapter_with_the_right_frames(tmp_path: Path) -> None:
    reader = NumberReader()
    samples = [ask(0, 4), ask(3, 9, LOST), ask(3, 9, UNSURE), ask(5, 8, name="B")]
    found = evaluate(reader, samples, [clip("A"), clip("B")], out=tmp_path, batch=2)
    assert found.answers["routed"] == ["The 4.", "blue", "9", "The 8."]
    assert found.answers["oracle"] == ["The 4.", "The 9.", "The 9.", "The 8."]
    assert found.answers["joint"] == ["4", "9", "9", "8"]
    assert found.answers["blank"] == ["The 0.", "blue", "0", "The 0."]
    scores = {name: values.tolist() for name, values in found.scores.items()}
    assert scores["routed"] == [1, 0, 1, 1]
    assert scores["oracle"] == scores["joint"] == [1, 1, 1, 1]
    assert scores["blank"] == [0, 0, 0, 0]
    # Once each: the segments of A, of B, and black ones.
    assert sorted(reader.encoded) == [
        (0,),
        (0, 0),
        (0, 0, 0),
        (0, 0, 0, 0),
        (1, 2, 3, 4),
        (4, 5),
        (6, 7, 8),
        (6, 7, 8, 9),
    ]
    # An adapter that two conditions share is asked once.
    assert len(reader.asked) == 4 + 2 + 3 + 4


def test_an_interrupted_evaluation_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    samples = [ask(start, start + 4, name=name) for name in ("A", "B") for start in range(6)]
    clips = [clip("A"), clip("B")]
    whole = evaluate(NumberReader(), samples, clips, out=tmp_path / "whole", batch=1)
    with pytest.raises(KeyboardInterrupt):
        evaluate(NumberReader(fails_after=7), samples, clips, out=tmp_path / "cut", batch=1)
    [file] = (tmp_path / "cut").glob("answers_*.jsonl")
    with file.open("ab") as cut:
        cut.write(b'{"id": "A/5-9')  # the process ended within a line
    rest = NumberReader()
    calls: list[tuple[int, int]] = []
    again = evaluate(rest, samples, clips, out=tmp_path / "cut", batch=1, progress=lambda *n: calls.append(n))
    assert again.answers == whole.answers
    assert again.results == whole.results == json.loads((tmp_path / "cut" / "results.json").read_text())
    # Routed and oracle share the first 12 answers, joint has 12, and one blank window serves all 12.
    assert len(rest.asked) == 12 + 12 + 1 - 7
    assert calls[-1] == (36, 36)
    assert len({json.dumps(json.loads(line)) for line in file.read_text().splitlines()}) == 36
    third = NumberReader()
    evaluate(third, samples, clips, out=tmp_path / "cut", batch=1)
    assert third.asked == []


def test_progress_counts_the_answers_of_the_conditions_asked_for(tmp_path: Path) -> None:
    samples, calls = [ask(start, start + 4) for start in range(3)], []
    evaluate(NumberReader(), samples, [clip("A")], out=tmp_path, conditions=["oracle"])
    conditions = ["joint", "blank"]  # beside which the folder has those of "oracle"
    evaluate(
        NumberReader(),
        samples,
        [clip("A")],
        out=tmp_path,
        conditions=conditions,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert calls == [(i, 6) for i in range(1, 7)]


@pytest.mark.parametrize(
    "change",
    [
        {"reader": NumberReader(model_id="reader@2")},
        {"samples": [ask(0, 5)]},
        {"samples": [ask(0, 4, answer="9")]},
        {"clips": [clip("A", key="other pictures")]},
    ],
)
def test_answers_of_another_model_or_other_questions_are_not_taken(tmp_path: Path, change: dict[str, Any]) -> None:
    evaluate(NumberReader(), [ask(0, 4)], [clip("A")], out=tmp_path)
    reader = change.get("reader", NumberReader())
    evaluate(reader, change.get("samples", [ask(0, 4)]), change.get("clips", [clip("A")]), out=tmp_path)
    assert reader.asked


def test_majority_answers_are_those_of_the_training_videos(tmp_path: Path) -> None:
    train = [ask(0, i + 1, name="C", answer=answer, id=str(i)) for i, answer in enumerate(["Yes.", "yes", "YES", "no"])]
    train += [ask(0, 4, name="C", id=f"how{i}", type="how", answer="up") for i in range(2)]
    train += [ask(0, 4, name="A", id=f"evaluated {i}", answer="4") for i in range(9)]
    samples = [ask(0, 4), ask(1, 5, type="how"), ask(2, 6, type="new"), ask(3, 7, task="colour")]
    found = evaluate(NumberReader(), samples, [clip("A")], out=tmp_path, train=train)
    assert found.answers["majority"] == ["YES", "YES", "YES", ""]
    assert found.answers["majority_type"] == ["YES", "up", "YES", ""]
    assert found.results["majority_from"] == "6 training samples"
    with pytest.raises(EvaluationError, match="every training sample is of an evaluated video"):
        evaluate(NumberReader(), samples, [clip("A")], out=tmp_path, train=train[-2:])


def test_majority_of_equally_frequent_answers_is_the_first_in_the_alphabet() -> None:
    train = [ask(0, 4, id=str(i), answer=answer, type="") for i, answer in enumerate(["no", "yes", "yes", "no"])]
    assert majority_answers(train, [ask(0, 4)])["majority"] == ["no"]
    # Without types, the words of the question tell them apart.
    train.append(ask(0, 4, "WHICH NUMBER is it", id="other", answer="yes", type=""))
    found = majority_answers(train, [ask(0, 4, type=""), ask(0, 4, LOST, type="")])
    assert found == {"majority": ["yes", "yes"], "majority_type": ["no", "yes"]}


def test_a_model_beats_both_baselines_or_it_does_not(tmp_path: Path) -> None:
    """Eight videos; "number" is read from the frames, "colour" is asked the wrong way and always "blue"."""
    clips = [clip(name) for name in "ABCDEFGH"]
    samples = [ask(i, i + 4, name=one.video) for one in clips for i in range(3)]
    samples += [ask(i, i + 4, LOST, one.video, task="colour", answer="blue") for one in clips for i in range(3)]
    results = evaluate(NumberReader(), samples, clips, out=tmp_path).results
    number, colour = results["tasks"]["number"], results["tasks"]["colour"]
    assert (number["samples"], number["videos"], number["interval_over"]) == (24, 8, "videos")
    assert number["scores"]["routed"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
    assert number["scores"]["majority"]["mean"] == pytest.approx(1 / 3)
    assert number["scores"]["blank"]["mean"] == 0.0
    assert number["margins"]["majority"]["mean"] == pytest.approx(2 / 3)
    assert number["beats_both"] is True
    assert colour["scores"]["routed"]["mean"] == colour["scores"]["blank"]["mean"] == 1.0
    assert colour["beats_both"] is False


def test_without_the_blank_condition_nothing_is_said_of_beating_it(tmp_path: Path) -> None:
    found = evaluate(NumberReader(), [ask(0, 4)], [clip("A")], out=tmp_path, conditions=["joint"])
    assert found.results["tasks"]["number"]["beats_both"] is None
    assert found.results["model_condition"] == "joint"
    assert list(found.answers) == ["joint", "majority", "majority_type"]


def test_times_have_their_own_metrics(tmp_path: Path) -> None:
    """The model answers 4, 8, 12 and 16."""
    truths = ["at second 5", "at second 10", "it does not appear", "15 to 16"]
    samples = [ask(0, 4 * i + 4, kind="second", answer=truth) for i, truth in enumerate(truths[:3])]
    samples.append(ask(0, 16, kind="interval", answer=truths[3]))
    kinds = evaluate(NumberReader(), samples, [clip("A")], out=tmp_path).results["tasks"]["number"]["kinds"]
    assert kinds["second"]["metrics"]["routed"] == {"within_1_s": pytest.approx(1 / 3), "readable": 1.0}
    assert kinds["interval"]["metrics"]["routed"] == {"mean_iou": 0.5, "iou_50": 1.0, "readable": 1.0}
    assert kinds["interval"]["metrics"]["majority"]["readable"] == 1.0
    assert kinds["second"]["metrics"]["majority"]["within_1_s"] == 0.0


def test_router_confusion_has_a_column_for_the_joint_adapter(tmp_path: Path) -> None:
    samples = [ask(0, 4), ask(0, 4, LOST), ask(0, 4, UNSURE), ask(0, 8, LOST, task="colour")]
    router = evaluate(NumberReader(), samples, [clip("A")], out=tmp_path).results["router"]
    assert router["tasks"] == ["colour", "number"]
    assert router["confusion"] == [[1, 0, 0, 0], [1, 1, 1, 0]]
    assert router["accuracy"] == 3 / 4  # the unsure one had the right task on top
    assert router["picked"] == 3 / 4
    assert router["picked_accuracy"] == pytest.approx(2 / 3)


def test_a_refused_question_has_no_answer_but_from_a_chosen_adapter(tmp_path: Path) -> None:
    """The router declines one, the check of questions another; neither is put to the model."""
    samples = [ask(0, 4), ask(0, 4, DECLINED), ask(0, 4, "Who is the patient?")]
    reader = NumberReader()
    found = evaluate(reader, samples, [clip("A")], out=tmp_path, conditions=["routed", "blank"])
    assert found.answers["routed"] == ["The 4.", "", ""]
    assert found.answers["blank"] == ["The 0.", "", ""]
    assert len(reader.asked) == 2
    assert found.results["router"]["refused"] == pytest.approx(2 / 3)
    assert found.results["router"]["confusion"] == [[0, 0, 0, 0], [0, 1, 0, 2]]
    joint = evaluate(reader, samples, [clip("A")], out=tmp_path, conditions=["joint"])
    assert joint.answers["joint"] == ["4", "4", "4"]


def test_bootstrap_draws_videos_whole_where_there_are_enough() -> None:
    values = np.repeat([0.0, 1.0] * 5, 50)
    videos = [str(i // 50) for i in range(500)]
    low, high = bootstrap(values, videos)
    assert 0.1 <= low <= 0.3
    assert 0.7 <= high <= 0.9
    low, high = bootstrap(values, ["one"] * 500)  # over samples: 0.5 ± 1.96 sqrt(0.25 / 500)
    assert low == pytest.approx(0.456, abs=0.006)
    assert high == pytest.approx(0.544, abs=0.006)
    # Videos of unequal length weigh by their questions.
    assert bootstrap(np.array([1.0] * 9 + [0.0]), ["a"] * 9 + ["b"], resamples=100)[1] == 1.0


def bad(change: Callable[[Sample], Sample]) -> list[Sample]:
    return [ask(0, 4), change(ask(1, 5))]


@pytest.mark.parametrize(
    ("samples", "options", "message"),
    [
        (bad(lambda s: replace(s, video="Z@0000")), {}, "no clip 'Z@0000'; there are A@0000"),
        (bad(lambda s: replace(s, end_s=21)), {}, "seconds 1 to 21 found, A@0000 has 20"),
        (bad(lambda s: replace(s, end_s=1)), {}, "seconds 1 to 1 found"),
        (bad(lambda s: replace(s, end_s=18)), {}, "a window of 17 s found, reader@1 takes at most 16 s"),
        (bad(lambda s: replace(s, task="mood")), {}, "no adapter for task 'mood', only for colour, number"),
        (bad(lambda s: replace(s, id=ask(0, 4).id)), {}, "1 sample ids are used twice"),
        ([], {}, "0 samples and a batch of 8 found"),
        ([ask(0, 4)], {"conditions": ["routed", "blnk"]}, "unknown condition 'blnk', expected some of routed"),
        ([ask(0, 4)], {"conditions": ["blank"]}, "no condition with the video shown"),
    ],
)
def test_what_does_not_fit_is_told_before_anything_is_asked(
    tmp_path: Path, samples: list[Sample], options: dict[str, Any], message: str
) -> None:
    reader = NumberReader()
    with pytest.raises(EvaluationError, match=message):
        evaluate(reader, samples, [clip("A")], out=tmp_path, **options)
    assert reader.encoded == reader.asked == []


class SharedWords:
    """Stands in for `CaptionScorer`, whose own tests start Java: the share of the reference's words, all metrics."""

    def __enter__(self) -> SharedWords:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def score(self, candidates: Sequence[str], references: Sequence[Sequence[str]]) -> CaptionScores:
        shares = [
            len({*one.split()} & {*other.split()}) / len(other.split())
            for one, [other] in zip(candidates, references, strict=True)
        ]
        return CaptionScores(
            {name: float(np.mean(shares)) for name in CAPTION_METRICS},
            {name: np.array(shares) for name in CAPTION_METRICS},
        )


@pytest.fixture(scope="module")
def report_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report on captions, closed answers and times of six videos."""
    tmp_path = tmp_path_factory.mktemp("report")
    clips = [clip(name) for name in "ABCDEF"]
    samples = [ask(i, i + 4, name=one.video) for one in clips for i in range(2)]
    samples += [ask(0, 9, LOST, one.video, answer="a|b $x$ red") for one in clips]
    samples += [ask(1, 5, LOST, one.video, task="even", answer="blue") for one in clips]
    samples += [ask(2, 18, name=one.video, task="tell", kind="open", answer="The 18. it is") for one in clips]
    reader = NumberReader(tasks=("even", "number", "tell"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CaptionScorer", SharedWords)
        evaluation = evaluate(reader, samples, clips, out=tmp_path)
    write_report(evaluation, clips, tmp_path, source="a reader on numbers", per_task=4)
    assert evaluation.results["tasks"]["tell"]["metric"] == "cider"
    assert evaluation.results["tasks"]["tell"]["scores"]["routed"]["mean"] == 0.5
    chosen = choose_examples(evaluation, 4, seed=1)
    right = [evaluation.scores["routed"][i] for i in chosen["number"]]
    assert right == [1, 1, 0, 0]
    assert choose_examples(evaluation, 4, seed=1) == chosen != choose_examples(evaluation, 4, seed=2)
    assert len(choose_examples(evaluation, 17, seed=1)["number"]) == 17  # of 12 right and 6 wrong ones
    assert summary_table(evaluation.results).row_count == 3
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(summary_table(evaluation.results))
    assert "number 18 66.7 0.0 33.3 33.3 yes, surely" in " ".join(console.export_text().split())
    return tmp_path


def test_the_report_has_every_table_and_its_pictures(report_folder: Path) -> None:
    report = (report_folder / "report.md").read_text()
    assert (
        "| number | 18 | 66.7 (67 to 67) | 0.0 (0 to 0) | 33.3 (33 to 33) | 33.3 (33 to 33) | yes, surely |" in report
    )
    assert "| tell (CIDEr) | 6 | 0.50 (0.50 to 0.50) |" in report
    assert "| task | kind | n | metric | model (routed) |" in report
    assert "## N-gram metrics: tell" in report
    assert "BLEU-4 | METEOR | ROUGE-L | CIDEr" in report
    for name in ("tasks.png", "router.png"):
        assert f"(pictures/{name})" in report
        assert cv2.imread(str(report_folder / "pictures" / name)).shape[1] > 400
    assert "examples/" not in report


def test_frames_of_the_data_are_in_the_examples_alone(report_folder: Path) -> None:
    page = (report_folder / "examples.md").read_text()
    sheets = sorted(path.name for path in (report_folder / "examples").iterdir())
    assert sheets == ["1_even.png", "2_number.png", "3_tell.png"]
    assert all(f"(examples/{name})" in page for name in sheets)
    sheet = cv2.imread(str(report_folder / "examples" / "3_tell.png"))
    grey = sheet[(sheet == sheet[..., :1]).all(axis=2)][:, 0]
    frames = set(np.flatnonzero(np.bincount(grey)).tolist())
    assert frames >= {*range(3, 19)}  # all 16 seconds of a window are shown


def test_the_assistant_is_asked_as_a_user_asks_it(tmp_path: Path) -> None:
    """A real, tiny SurgLLM with random weights: its evaluated answers are those of `ask`, whatever the batch."""
    import torch

    from surg_perception.surgllm.answering import Assistant
    from surg_perception.surgllm.config import CONFIGS
    from surg_perception.surgllm.model import SurgLLM
    from surg_perception.surgllm.model_folder import SurgLLMCard

    torch.manual_seed(0)
    model = SurgLLM(CONFIGS["tiny"])
    adapters = {}
    for name in ("joint", "colour", "number"):
        model.language_model.add_adapter(name)
        for parameter in model.language_model.adapter_parameters(name):
            torch.nn.init.normal_(parameter, std=0.5)
        adapters[name] = model.language_model.adapter_weights(name)
    files = {"adapters": ModelFile("adapters.safetensors", "0" * 64)}
    card = SurgLLMCard(tmp_path, "tiny", "1", CONFIGS["tiny"], ("colour", "number"), {}, {}, {}, "", "", files)
    assistant = Assistant(card, model, adapters, NumberReader(), 1)
    samples = [ask(i, i + length, text) for i, length in enumerate((4, 9, 16)) for text in (NUMBERED, LOST, UNSURE)]
    found = evaluate(assistant, samples, [clip("A")], out=tmp_path / "three", batch=3)
    alone = evaluate(assistant, samples, [clip("A")], out=tmp_path / "one", batch=1)
    assert found.answers == alone.answers
    assert len(set(found.answers["joint"] + found.answers["oracle"])) > 2
    frames = [np.full((32, 32, 3), i + 1, np.uint8) for i in range(20)]
    for i, sample in enumerate(samples):
        starts = [max(sample.start_s, end - 4) for end in range(sample.end_s, sample.start_s, -4)][::-1]
        window = [
            (start - sample.start_s, end - sample.start_s, assistant.encode(np.stack(frames[start:end])))
            for start, end in zip(starts, [*starts[1:], sample.end_s], strict=True)
        ]
        assert assistant.ask(sample.question, window).text == found.answers["routed"][i]
        assert assistant.ask(sample.question, window, task="number").text == found.answers["oracle"][i]


def test_the_command_makes_questions_or_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from surg_perception.surgllm.answering import Assistant

    reader = NumberReader(tasks=TASKS)
    monkeypatch.setattr(Assistant, "load", lambda model, threads: reader)
    monkeypatch.setattr(module, "CaptionScorer", SharedWords)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(*words: str) -> dict[str, Any]:
        data = "phantom:seeds=7-8,duration_s=24"
        options = parser().parse_args(["evaluate", "surgllm", "reader", data, "--out", str(tmp_path / "out"), *words])
        assert options.run(options) == 0
        return json.loads((tmp_path / "out" / "results.json").read_text())

    made = run("--per-task", "1", "--examples", "0", "--videos", "8", "--train", "phantom:seeds=7-8,duration_s=24")
    assert list(made["video_fingerprints"]) == ["phantom-8@0000"]
    assert made["majority_from"].endswith("training samples")
    assert set(made["tasks"]) <= set(TASKS)
    assert len(made["tasks"]) > 3
    clips = open_clip_videos("phantom:seeds=7-8,duration_s=24")
    own = [ask(0, 4, name="phantom-7", task="location"), ask(2, 5, name="phantom-8", task="location")]
    write_samples(tmp_path / "own.json", own)
    read = run("--questions", str(tmp_path / "own.json"), "--videos", clips[0].video, "--conditions", "joint, oracle")
    assert read["samples"] == 1
    assert list(read["conditions"]) == ["oracle", "joint", "majority", "majority_type"]
    assert (tmp_path / "out" / "report.md").is_file()
