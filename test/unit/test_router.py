# SPDX-License-Identifier: Apache-2.0
"""The sentence encoder against a published reference, and the router on wordings that it has not seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from surgllm_sentences import OTHERS_ALLOWED, OTHERS_DECLINED, PARAPHRASES, template_questions

from surg_perception.surgllm.base_models import BaseModelMissing
from surg_perception.surgllm.question_check import QuestionRefused, check_question
from surg_perception.surgllm.router import NO_TASK, Router, RouterError
from surg_perception.surgllm.sentence_encoder import MAX_TOKENS, SentenceEncoder
from surg_perception.torch_extras import import_transformers

PER_TASK = 60


class Remembering:
    """The encoder, which encodes a sentence once in all tests."""

    def __init__(self, encoder: SentenceEncoder) -> None:
        self.encoder = encoder
        self.known: dict[str, NDArray[np.float32]] = {}

    def embed(self, sentences: list[str]) -> NDArray[np.float32]:
        new = [sentence for sentence in dict.fromkeys(sentences) if sentence not in self.known]
        self.known.update(zip(new, self.encoder.embed(new), strict=True))
        return np.stack([self.known[sentence] for sentence in sentences])


@pytest.fixture(scope="module")
def encoder() -> SentenceEncoder:
    try:
        return SentenceEncoder()
    except BaseModelMissing as error:
        pytest.skip(str(error).splitlines()[0])


@pytest.fixture(scope="module")
def remembering(encoder: SentenceEncoder) -> Remembering:
    return Remembering(encoder)


def spread(questions: list[str], count: int) -> list[str]:
    return [questions[i] for i in np.linspace(0, len(questions) - 1, min(count, len(questions))).astype(int)]


@pytest.fixture(scope="module")
def router(remembering: Remembering) -> Router:
    return Router.fit({task: spread(asked, PER_TASK) for task, asked in template_questions().items()}, remembering)


# ----------------------------------------------------------------------------------------------------------- encoder


def test_similarities_are_the_published_ones(encoder: SentenceEncoder) -> None:
    """The example of sentence-transformers' quickstart for this model."""
    vectors = encoder.embed(["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."])
    expected = [[1.0, 0.6660, 0.1046], [0.6660, 1.0, 0.1411], [0.1046, 0.1411, 1.0]]
    np.testing.assert_allclose(vectors @ vectors.T, expected, atol=2e-4)
    assert vectors.dtype == np.float32
    assert vectors.shape == (3, encoder.width)


def test_vectors_are_means_over_a_sentences_own_tokens(encoder: SentenceEncoder) -> None:
    """Each alone, with transformers' own tokenizer and NumPy, against a batch with padding."""
    import torch

    tokenizer = import_transformers().AutoTokenizer.from_pretrained(str(encoder.folder))
    sentences = ["Hook?", "In which part of the picture is the bipolar forceps now?", "tool " * 300]
    for sentence, vector in zip(sentences, encoder.embed(sentences), strict=True):
        tokens = tokenizer(sentence, return_tensors="pt", truncation=True, max_length=MAX_TOKENS)
        with torch.inference_mode():
            states = encoder.model(**tokens).last_hidden_state[0].numpy()
        mean = states.mean(axis=0)
        np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), atol=1e-5)


def test_paraphrases_are_nearer_than_other_questions(encoder: SentenceEncoder) -> None:
    one, same, other = encoder.embed(["Where is the hook?", "Where can I see the hook?", "When does phase two start?"])
    assert one @ same > 0.8 > one @ other


def test_an_encoder_leaves_the_threads_as_they_were(encoder: SentenceEncoder) -> None:
    import torch

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert encoder.embed([]).shape == (0, encoder.width)
        encoder.embed(["hook"])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------------------------ router


def test_unseen_fillings_of_the_wordings_go_to_their_task(router: Router) -> None:
    seen = {question for asked in router.questions.values() for question in asked}
    pairs = [
        (question, task)
        for task, asked in template_questions().items()
        for question in spread([question for question in asked if question not in seen], 30)
    ]
    assert len(pairs) > 120
    scores = router.scores(pairs)
    assert scores.accuracy > 0.97
    assert scores.declined == 0
    assert scores.confusion.sum() == scores.questions == len(pairs)


def test_a_users_own_words_go_to_their_task_mostly(router: Router) -> None:
    pairs = [(question, task) for task, asked in PARAPHRASES.items() for question in asked]
    scores = router.scores(pairs)
    assert scores.accuracy >= 0.85
    assert scores.routed_accuracy >= 0.9
    assert scores.routed >= 0.75
    assert scores.declined <= 0.02
    assert 0.8 < router.held_out_accuracy < 1, "held out in whole wordings, not in single sentences"


def test_what_the_rules_leave_out_is_declined_by_likeness(router: Router) -> None:
    def refused(questions: tuple[str, ...]) -> list[str]:
        found = []
        for question, route in zip(questions, router.route_all(list(questions)), strict=True):
            try:
                check_question(question)
            except QuestionRefused:
                found.append(question)
            else:
                found += [question] if route.declined else []
                assert not (route.declined and route.task)
        return found

    assert len(refused(OTHERS_DECLINED)) >= 0.88 * len(OTHERS_DECLINED)
    assert len(refused(OTHERS_ALLOWED)) <= 0.03 * len(OTHERS_ALLOWED)


def test_below_the_threshold_the_joint_adapter_is_taken(router: Router, remembering: Remembering) -> None:
    questions = {task: asked[:20] for task, asked in router.questions.items()}
    strict = Router.fit(questions, remembering, threshold=0.999999)
    route = strict.route("Hook?")
    assert route.task == NO_TASK
    assert route.best in strict.tasks
    assert route.probability < 0.999999
    scores = strict.scores([("Hook?", "location")])
    assert scores.confusion[strict.tasks.index("location"), len(strict.tasks)] == 1
    assert scores.routed == 0
    assert np.isnan(scores.routed_accuracy)
    sure = Router.fit(questions, remembering, threshold=0).route("Where is the hook?")
    assert (sure.task, sure.declined) == ("location", False)


def test_a_saved_router_is_the_same(router: Router, remembering: Remembering, tmp_path: Path) -> None:
    for path in router.save(tmp_path):
        assert path.parent == tmp_path
        assert path.stat().st_size < 1_000_000
    loaded = Router.load(tmp_path, remembering)
    asked = ["Where is the hook?", "What now?", "Who is she?"]
    assert loaded.route_all(asked) == router.route_all(asked)
    assert loaded.questions == router.questions
    assert (loaded.threshold, loaded.tasks) == (router.threshold, router.tasks)


def test_a_task_more_needs_a_name_and_questions_only(router: Router, remembering: Remembering, tmp_path: Path) -> None:
    router.save(tmp_path)
    smoke = ["Is there smoke?", "How thick is the smoke?", "Does smoke hide the view?", "Has the smoke cleared?"]
    smoke += ["Is the view smoky?", "Where does the smoke come from?", "Is smoke visible?", "Is the smoke dense?"]
    larger = Router.load(tmp_path, remembering).with_task("smoke", smoke)
    assert larger.tasks == (*router.tasks, "smoke")
    assert larger.route("Can you see any smoke in the picture?").best == "smoke"
    pairs = [(question, task) for task, asked in PARAPHRASES.items() for question in asked]
    assert larger.scores(pairs).accuracy >= router.scores(pairs).accuracy - 0.05


def test_unusable_questions_and_files_say_why(router: Router, remembering: Remembering, tmp_path: Path) -> None:
    for questions in ({}, {"a": ["x", "y"]}, {"a": ["x", "y"], "b": ["z", "z"]}, {"a": ["x", "y"], "": ["z", "w"]}):
        with pytest.raises(RouterError, match="two tasks or more"):
            Router.fit(questions, remembering)
    with pytest.raises(RouterError, match="got colour"):
        router.scores([("What colour is it?", "colour")])
    with pytest.raises(RouterError, match=str(tmp_path)):
        Router.load(tmp_path, remembering)
    weights, facts = router.save(tmp_path)
    facts.write_text(facts.read_text().replace('"caption",', "", 1))
    with pytest.raises(RouterError, match="names 6 tasks"):
        Router.load(tmp_path, remembering)
    weights.write_bytes(b"no safetensors")
    with pytest.raises(RouterError, match="No router in"):
        Router.load(tmp_path, remembering)
