# SPDX-License-Identifier: Apache-2.0
"""The whole SurgLLM in its tiny shape: it learns what is seen, streams, stops, and switches adapters."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from surg_perception.surgllm.config import CONFIGS, JOINT
from surg_perception.surgllm.language_model import LanguageModel, adapters_that_fit, fast_dtype, load_tokenizer
from surg_perception.surgllm.model import SurgLLM, start_qformer
from surg_perception.surgllm.prompt import Prompted, Prompter

CONFIG = CONFIGS["tiny"]
QUESTION = "What is seen?"
SPANS = [(0, 4)]


def new_model() -> SurgLLM:
    torch.manual_seed(0)
    model = SurgLLM(CONFIG)
    model.language_model.add_adapter(JOINT)
    return model.eval()


def random_adapter(model: SurgLLM, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights = model.language_model.adapter_weights(JOINT)
    return {key: torch.randn(value.shape, generator=generator) * 0.3 for key, value in weights.items()}


@dataclass
class Taught:
    """A model that was shown two clips, with another answer to the same question about each."""

    model: SurgLLM
    prompter: Prompter
    segments: Tensor
    losses: list[float]

    def asked(self, rows: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
        batch = self.prompter.batch([Prompted(QUESTION, SPANS)] * len(rows), pad_left=True)
        return self.segments[rows], batch


@pytest.fixture(scope="module")
def taught() -> Taught:
    model, prompter = new_model(), Prompter(CONFIG)
    generator = torch.Generator().manual_seed(1)
    clips = torch.randint(0, 256, (2, 4, 32, 32, 3), dtype=torch.uint8, generator=generator)
    with torch.no_grad():
        segments = model.encoder(clips)
    batch = prompter.batch([Prompted(QUESTION, SPANS, answer) for answer in ("hook", "no")])
    trained = [
        *model.qformer.parameters(),
        *model.project.parameters(),
        *model.language_model.adapter_parameters(JOINT),
    ]
    for parameter in trained:
        parameter.requires_grad_(True)
    optimiser = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(60):
        loss = model({**batch, "segments": segments})
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        losses.append(loss.item())
    model.requires_grad_(False)
    return Taught(model, prompter, segments, losses)


def test_a_few_samples_are_learned_by_heart(taught: Taught) -> None:
    assert taught.losses[-1] < 0.1 * taught.losses[0]


def test_the_answer_depends_on_the_video(taught: Taught) -> None:
    found = taught.model.generate(*taught.asked([0, 1]))
    assert [taught.prompter.text(answer.ids) for answer in found] == ["hook", "no"]
    assert all(answer.complete and 0.5 < answer.confidence <= 1 for answer in found)


def test_a_batch_answers_as_one_by_one(taught: Taught) -> None:
    items = [
        Prompted(QUESTION, SPANS),
        Prompted("And what about the last of these three segments?", [(0, 4), (4, 8), (8, 12)]),
        Prompted(QUESTION, [(0, 4), (4, 8)]),
    ]
    segments = taught.segments[[1, 0, 1, 0, 1, 0]]
    together = taught.model.generate(segments, taught.prompter.batch(items, pad_left=True))
    for answer, item, own in zip(together, items, segments.split([1, 3, 2]), strict=True):
        [alone] = taught.model.generate(own, taught.prompter.batch([item], pad_left=True))
        assert answer.ids == alone.ids
        assert answer.confidence == pytest.approx(alone.confidence, abs=1e-4)
        assert answer.complete == alone.complete
    assert len({tuple(answer.ids) for answer in together}) > 1


def test_padding_does_not_change_the_loss(taught: Taught) -> None:
    items = [
        Prompted(QUESTION, SPANS, "hook"),
        Prompted("Between which seconds is it visible?", [(0, 2), (2, 6)], "it is not visible"),
    ]
    with torch.no_grad():
        segments = taught.segments[[0, 1, 0]]
        together = taught.model({**taught.prompter.batch(items), "segments": segments})
        alone = [
            taught.model({**taught.prompter.batch([item]), "segments": own})
            for item, own in zip(items, segments.split([1, 2]), strict=True)
        ]
    torch.testing.assert_close(together, torch.stack(alone).mean(), atol=1e-4, rtol=1e-4)


def test_only_the_answer_counts_for_the_loss(taught: Taught) -> None:
    batch = taught.prompter.batch([Prompted(QUESTION, SPANS, "hook")])
    with torch.no_grad():
        known = taught.model({**batch, "segments": taught.segments[:1]})
        batch["labels"][:, -1] = -100  # the end token
        shorter = taught.model({**batch, "segments": taught.segments[:1]})
    assert known < 1.0
    assert known != shorter


@pytest.mark.parametrize("most", range(5))
def test_an_answer_stops_at_any_token(taught: Taught, most: int) -> None:
    told: list[list[int]] = []
    [answer] = taught.model.generate(
        *taught.asked([0]), on_token=lambda ids: told.append(list(ids)), stop=lambda: len(told) >= most
    )
    assert answer.ids == taught.prompter.tokenizer(" hook", add_special_tokens=False).input_ids[:most]
    assert [len(ids) for ids in told] == list(range(1, most + 1))  # once a token, each time all so far
    assert all(ids == answer.ids[: len(ids)] for ids in told)
    assert not answer.complete
    assert (answer.confidence > 0) == (most > 0)


def test_an_answer_that_is_cut_is_not_complete(taught: Taught) -> None:
    taught.model.config = replace(CONFIG, answer_tokens=len(" hoo"))
    try:
        [answer] = taught.model.generate(*taught.asked([0]))
    finally:
        taught.model.config = CONFIG
    assert taught.prompter.text(answer.ids) == "hoo"
    assert not answer.complete


def test_every_end_token_of_a_language_model_ends_an_answer(taught: Taught) -> None:
    generation = taught.model.language_model.base.generation_config
    [letter] = taught.prompter.tokenizer("k", add_special_tokens=False).input_ids
    generation.eos_token_id = [1, letter]
    try:
        [answer] = taught.model.generate(*taught.asked([0]))
    finally:
        generation.eos_token_id = 1
    assert taught.prompter.text(answer.ids) == "hoo"
    assert answer.complete


def test_the_likeliest_token_is_taken_whatever_a_language_model_likes_better(taught: Taught) -> None:
    """Folders of language models bring settings of their own, such as a penalty on the second "o" of "hook"."""
    generation = taught.model.language_model.base.generation_config
    generation.repetition_penalty = 100.0
    try:
        [answer] = taught.model.generate(*taught.asked([0]))
    finally:
        generation.repetition_penalty = None
    assert taught.prompter.text(answer.ids) == "hook"


def test_the_q_former_looks_for_what_is_asked(taught: Taught) -> None:
    batches = [taught.prompter.batch([Prompted(q, SPANS)]) for q in (QUESTION, "Where is it?")]
    one, other = (
        taught.model.qformer(taught.segments[:1], b["question_ids"], b["question_attention"]) for b in batches
    )
    assert one.shape == (1, CONFIG.qformer.queries, CONFIG.qformer.width)
    assert (one - other).abs().mean() > 1e-3
    # Padding of a shorter question in a batch changes nothing.
    both = taught.prompter.batch([Prompted(q, SPANS) for q in (QUESTION, "Where is it?")])
    together = taught.model.qformer(taught.segments[[0, 0]], both["question_ids"], both["question_attention"])
    torch.testing.assert_close(together, torch.cat([one, other]), atol=1e-5, rtol=1e-4)


# ---- adapters ----------------------------------------------------------------------------------------------


@torch.no_grad()
def hidden(model: SurgLLM) -> Tensor:
    ids = torch.arange(5, 45).view(2, 20)
    return model.language_model.hidden(model.language_model.embed(ids), torch.ones_like(ids))


def test_adapters_switch_in_memory_and_back() -> None:
    model = new_model()
    language_model = model.language_model
    first, second = random_adapter(model, 1), random_adapter(model, 2)
    language_model.load_adapter_weights(JOINT, first)
    language_model.add_adapter("phase", start=JOINT)
    same = hidden(model)
    language_model.load_adapter_weights("phase", second)
    phase = hidden(model)
    language_model.set_adapter(JOINT)
    joint = hidden(model)
    assert torch.equal(joint, same)
    assert (joint - phase).abs().mean() > 0.01
    language_model.set_adapter("phase")
    assert torch.equal(hidden(model), phase)
    with pytest.raises(ValueError, match="no adapter 'smoke'; there are joint, phase"):
        language_model.set_adapter("smoke")


def test_a_new_adapter_changes_nothing() -> None:
    plain = SurgLLM(CONFIG).eval()
    torch.testing.assert_close(hidden(new_model()), hidden(plain))


def test_fused_weights_answer_as_the_adapter_and_are_undone() -> None:
    with_layers, fused = new_model(), SurgLLM(CONFIG).eval()
    first, second = random_adapter(with_layers, 1), random_adapter(with_layers, 2)
    plain = hidden(fused)
    found = {}
    for name, weights in (("first", first), ("second", second), ("first", first)):
        with_layers.language_model.load_adapter_weights(JOINT, weights)
        fused.language_model.fuse(weights)
        found.setdefault(name, hidden(fused))
        torch.testing.assert_close(hidden(fused), hidden(with_layers), atol=1e-4, rtol=1e-4)
        assert torch.equal(hidden(fused), found[name])
        assert (hidden(fused) - plain).abs().mean() > 0.01
    fused.language_model.fuse({key: torch.zeros_like(value) for key, value in first.items()})
    assert torch.equal(hidden(fused), plain)
    fused.language_model.fuse(first)
    fused.language_model.fuse({})
    assert torch.equal(hidden(fused), plain)


def test_an_adapter_of_another_language_model_is_refused() -> None:
    model = SurgLLM(CONFIG).eval()
    good = random_adapter(new_model(), 1)
    model.language_model.fuse(good)
    before = hidden(model)
    for wrong in (
        {key.replace("layers.1", "layers.7"): value for key, value in good.items()},
        {key: value[:, :1] for key, value in good.items()},
        {key: value for key, value in good.items() if "lora_B" not in key},
        {key: value for key, value in good.items() if "layers.1" not in key},
        {key.replace("lora_", "other_"): value for key, value in good.items()},
    ):
        with pytest.raises(ValueError, match="an adapter does not fit the language model"):
            model.language_model.fuse(wrong)
        assert torch.equal(hidden(model), before)
    with pytest.raises(ValueError, match="adapter 'joint': 1 matrices do not fit"):
        new_model().language_model.load_adapter_weights(JOINT, dict(list(good.items())[1:]))


@pytest.mark.parametrize("name", ["model", "layers", "q_proj", "lora_a", "weight"])
def test_a_task_may_have_the_name_of_a_layer(name: str) -> None:
    model = new_model()
    model.language_model.add_adapter(name, start=JOINT)
    weights = model.language_model.adapter_weights(name)
    assert weights.keys() == model.language_model.adapter_weights(JOINT).keys()
    assert len(model.language_model.adapter_parameters(name)) == len(weights) == 2 * 2 * 2


@pytest.mark.parametrize("name", ["joint", "Phase", "a b", "a/b", "1st", "größe", ""])
def test_a_task_name_that_no_adapter_can_have_is_refused(name: str) -> None:
    adapters_that_fit(["smoke", "step_2"])
    with pytest.raises(ValueError, match="expected a word of a-z, 0-9 and _"):
        adapters_that_fit([name])


def test_stored_weights_leave_the_language_model_out() -> None:
    model, other = new_model(), new_model()
    stored = model.stored_weights()
    assert {key.split(".")[0] for key in stored} == {"encoder", "qformer", "project"}
    torch.manual_seed(5)
    changed = {key: torch.rand_like(value) for key, value in stored.items()}
    other.load_stored_weights(changed)
    assert all(torch.equal(value, changed[key]) for key, value in other.stored_weights().items())
    with pytest.raises(ValueError, match=r"1 weights do not fit this SurgLLM, first project\.bias"):
        other.load_stored_weights({key: value for key, value in stored.items() if key != "project.bias"})
    with pytest.raises(ValueError, match=r"first project\.bias"):
        other.load_stored_weights({**stored, "project.bias": torch.zeros(3)})


def test_a_gpu_does_not_decide_for_a_model_that_stays_on_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert (fast_dtype(), fast_dtype("cpu")) == (torch.bfloat16, torch.float32)


# ---- base models -------------------------------------------------------------------------------------------


def test_the_q_former_starts_from_the_sentence_encoder(sentence_model: None) -> None:
    from surg_perception.surgllm.sentence_encoder import SentenceEncoder

    config = replace(CONFIG, qformer=replace(CONFIGS["small"].qformer, layers=2))
    torch.manual_seed(0)
    model = SurgLLM(config)
    start_qformer(model.qformer, config.qformer)
    bert, own = SentenceEncoder().model, model.qformer.network.encoder.layer
    for layer in range(2):
        source = bert.encoder.layer[layer]
        assert torch.equal(own[layer].attention.attention.query.weight, source.attention.self.query.weight)
        assert torch.equal(own[layer].intermediate.dense.weight, source.intermediate.dense.weight)
        assert torch.equal(own[layer].intermediate_query.dense.weight, source.intermediate.dense.weight)
        assert torch.equal(own[layer].output_query.LayerNorm.weight, source.output.LayerNorm.weight)
    ids = Prompter(config).batch([Prompted("Where is the hook?", SPANS)])["question_ids"]
    torch.testing.assert_close(model.qformer.words(ids), bert.embeddings.word_embeddings(ids))
    assert not any(key.startswith("qformer.words.base.") for key in model.stored_weights())
    assert not model.qformer.words.base.weight.requires_grad
    with pytest.raises(ValueError, match="all-minilm-l6-v2 does not fit the Q-Former's shapes"):
        start_qformer(new_model().qformer, config.qformer)


def test_smollm2_speaks_through_embeddings(smollm2: str) -> None:
    config = replace(CONFIG, language_model=smollm2, answer_tokens=4)
    torch.manual_seed(0)
    model, tokenizer = SurgLLM(config).eval(), load_tokenizer(config)
    assert sum(p.numel() for p in model.language_model.parameters()) == 134_515_008
    # As the base model reads text: embeddings in, words out.
    ids = torch.tensor([tokenizer("The capital of France is the city of").input_ids])
    told = model.language_model.base.generate(
        inputs_embeds=model.language_model.embed(ids), attention_mask=torch.ones_like(ids), max_new_tokens=3
    )
    assert "Paris" in tokenizer.decode(told[0])
    # As SurgLLM: untrained visual tokens between labels.
    prompter = Prompter(config)
    segments = torch.randn(1, config.encoder.tokens(4), config.encoder.width)
    [answer] = model.generate(segments, prompter.batch([Prompted("Where is the hook?", SPANS)], pad_left=True))
    assert prompter.text(answer.ids)
    assert LanguageModel(config, torch.bfloat16).base.dtype == torch.bfloat16
