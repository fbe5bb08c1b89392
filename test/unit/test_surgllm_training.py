# SPDX-License-Identifier: Apache-2.0
"""SurgLLM's whole training in its tiny shape, model folders, and one task more."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_surgllm
import torch
import yaml
from tiny_surgllm import DATA, HELD_OUT, OPTIONS, SETTINGS, TRAINED_ON, quiet

from surg_perception.cli.main import parser
from surg_perception.data.label_files import DatasetError
from surg_perception.gsvit.trainer import TrainingError, TrainingStopped, read_lines
from surg_perception.models import CARD_NAME, ModelError, OtherModel, find_model, list_models, sha256_of
from surg_perception.surgllm import base_models, training
from surg_perception.surgllm.answering import Assistant
from surg_perception.surgllm.base_models import BaseModelMissing
from surg_perception.surgllm.config import CONFIGS
from surg_perception.surgllm.model_folder import find_surgllm, list_surgllm, load_weights, read_surgllm_card
from surg_perception.surgllm.questions import SampleError
from surg_perception.surgllm.training import add_task, open_surgllm, train_surgllm
from surg_perception.surgllm.tuning import TuningTask

FILES = ("surgllm.safetensors", "adapters.safetensors", "router.safetensors", "router.json")
SMOKE = ("Is there smoke?", "Can you see any smoke?", "Is the view smoky?", "Does smoke hide the organs?")


def copied(folder: Path, into: Path) -> Path:
    shutil.copytree(folder, into / "model", ignore=shutil.ignore_patterns("training"))
    return into / "model"


def edited(folder: Path, change: Callable[[dict[str, Any]], object], rehash: str = "") -> Path:
    """The folder with another card; `rehash` names a file whose sha256 is brought up to date."""
    path = folder / CARD_NAME
    content = yaml.safe_load(path.read_text())
    change(content)
    for file in content["files"].values() if rehash else ():
        if file["name"] == rehash:
            file["sha256"] = sha256_of(folder / rehash)
    path.write_text(yaml.safe_dump(content))
    return folder


# ---- the whole training ------------------------------------------------------------------------------------


def test_the_model_folder_says_what_it_is(tiny_surgllm: Path) -> None:
    card = find_surgllm(tiny_surgllm)
    assert {path.name for path in tiny_surgllm.iterdir()} == {CARD_NAME, "training", *FILES}
    assert card.config == CONFIGS["tiny"]
    assert set(card.tasks) == set(OPTIONS.tasks)
    assert card.licence == "Apache-2.0"
    assert card.base_models == {}
    assert card.training["data"] == [DATA]
    assert card.training["videos"] == ["phantom-11"]
    assert card.training["held_out"] == [HELD_OUT]
    assert card.training["seconds"] == 30
    assert card.training["questions"]["location"] == OPTIONS.per_task
    assert 0 <= card.metrics["router_held_out_accuracy"] <= 1
    assert card.metrics["reconstruction"]["mse"] > 0
    assert card.model_id == f"{card.name}@{sha256_of(tiny_surgllm / 'adapters.safetensors')[:12]}"
    card.verify()
    for name in FILES:
        assert (tiny_surgllm / name).stat().st_mode & 0o044 == 0o044, f"{name} cannot be read by others"
    assert str(tiny_surgllm.parent) not in (tiny_surgllm / CARD_NAME).read_text()


def test_each_stage_measured_the_video_held_out(tiny_surgllm: Path) -> None:
    figures = {
        stage: read_lines(tiny_surgllm / "training" / stage / "metrics.jsonl")[-1]
        for stage in ("a_reconstruction", "b_grounding", "b_alignment", "c_warm_up", "d_joint", "e_phase")
    }
    assert figures["a_reconstruction"]["mse"] > 0
    assert figures["b_alignment"]["gallery"] > 0
    assert 0 <= figures["c_warm_up"]["spelled_phase"] <= 1
    assert {"loss_phase", "loss_location", "loss_triplet"} <= figures["d_joint"].keys()
    assert [key for key in figures["e_phase"] if key.startswith("loss_")] == ["loss_phase"]


def test_one_encoder_goes_through_all_stages(tiny_surgllm: Path) -> None:
    stored, _ = load_weights(find_surgllm(tiny_surgllm))
    state = torch.load(tiny_surgllm / "training" / "b_alignment" / "state.pt", weights_only=True)["module"]
    before = torch.load(tiny_surgllm / "training" / "a_reconstruction" / "state.pt", weights_only=True)["module"]
    for key in (
        "encoder.project.weight",
        "encoder.norm.weight",
        "encoder.blocks.layer.0.attention.output.dense.weight",
    ):
        assert torch.equal(stored[key], state[key].half())
        assert not torch.equal(state[key], before[key])


def test_a_training_that_was_interrupted_gives_the_same_model(
    tiny_surgllm: Path, tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 0

    def loss(task: TuningTask, module: Any, batch: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(task, module, batch)

    whole = TuningTask.loss
    monkeypatch.setattr(TuningTask, "loss", loss)
    out = tmp_path / "tiny"
    with pytest.raises(TrainingStopped):
        train_tiny(out, tiny_cache)
    assert len(read_lines(out / "training" / "d_joint" / "losses.jsonl")) == 4
    finished = out / "training" / "b_alignment" / "losses.jsonl"
    written = finished.read_text()
    card = train_tiny(out, tiny_cache)
    assert finished.read_text() == written
    expected = find_surgllm(tiny_surgllm)
    assert {kind: file.sha256 for kind, file in card.files.items()} == {
        kind: file.sha256 for kind, file in expected.files.items()
    }


def train_tiny(out: Path, cache: Path) -> Any:
    return tiny_surgllm.train(out, cache)


# ---- refused before anything takes long --------------------------------------------------------------------


@pytest.fixture
def refused(
    tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sentence_model: None
) -> Callable[..., None]:
    """Starts a training that must not come as far as its first stage."""

    class Began(Exception):
        pass

    def began(*args: object, **options: object) -> None:
        raise Began

    monkeypatch.setattr(training, "reconstruct_pretrain", began)

    def start(data: Sequence[str] = (DATA,), *, begins: bool = False, **changes: Any) -> None:
        options = replace(OPTIONS, **changes)
        if begins:
            with pytest.raises(Began):
                train_surgllm(data, tmp_path, options, cache=tiny_cache, console=quiet())
        else:
            train_surgllm(data, tmp_path, options, cache=tiny_cache, console=quiet())

    return start


def test_options_that_cannot_work_are_refused_before_the_first_stage(refused: Callable[..., None]) -> None:
    with pytest.raises(ValueError, match="task 'smoke' found, expected some of caption, location"):
        refused(tasks=("phase", "smoke"))
    with pytest.raises(ValueError, match="task name 'joint' found"):
        refused(tasks=("phase", "joint"))
    with pytest.raises(TrainingError, match="questions of phase can be made from these labels, expected two tasks"):
        refused(tasks=("phase",))
    with pytest.raises(DatasetError, match="2 clips are in the data twice, first phantom-11@0000"):
        refused([DATA, DATA])
    with pytest.raises(DatasetError, match="there is no video 'phantom-13'"):
        refused(held_out=("phantom-13",))
    with pytest.raises(BaseModelMissing, match="vicuna-7b is neither a folder"):
        refused(config=replace(OPTIONS.config, language_model="vicuna-7b"))


def test_no_video_needs_to_be_held_out(refused: Callable[..., None]) -> None:
    refused(held_out=(), begins=True)


def test_the_command_line_sets_each_stage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    def train(data: Sequence[str], out: Path, what: Any, **options: Any) -> Any:
        seen.update(data=data, out=out, what=what, **options)
        raise TrainingError("seen")

    monkeypatch.setattr(training, "train_surgllm", train)
    line = f"train surgllm {DATA} --out {tmp_path} --cache {tmp_path / 'c'} --config tiny --held-out a,b --tasks phase,"
    line += "location --per-task 7 --warm-up-epochs 3 --adapt-epochs 2 --threads 1 --restart --no-stills --seed 5"
    options = parser().parse_args([*line.split(), "--language-model", str(tmp_path)])
    assert options.run(options) == 1
    what = seen["what"]
    assert seen["data"] == [DATA]
    assert not seen["resume"]
    assert what.config == replace(CONFIGS["tiny"], language_model=str(tmp_path))
    assert (what.held_out, what.tasks, what.per_task, what.seed, what.stills) == (
        ("a", "b"),
        ("phase", "location"),
        7,
        5,
        False,
    )
    stages = ("reconstruction", "alignment", "warm_up", "tuning", "adapting")
    defaults = training.SurgLLMOptions()
    epochs = [getattr(what, stage).epochs for stage in stages]
    usual = [getattr(defaults, stage).epochs for stage in stages]
    assert epochs == [usual[0], usual[1], 3, usual[3], 2]
    assert {getattr(what, stage).threads for stage in stages} == {1}


# ---- model folders -----------------------------------------------------------------------------------------


def test_a_model_is_found_by_name_and_is_no_phase_model(tiny_surgllm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SURG_PERCEPTION_MODELS", str(tiny_surgllm.parent))
    assert find_surgllm("tiny").folder == tiny_surgllm
    assert "tiny" in [card.folder.name for card in list_surgllm()]
    assert "tiny" not in [card.folder.name for card in list_models()]
    with pytest.raises(OtherModel, match="holds a SurgLLM"):
        find_model("tiny")
    with pytest.raises(ModelError, match=r"no SurgLLM 'huge': neither a model folder nor a name among .*tiny"):
        find_surgllm("huge")


def test_a_card_that_is_wrong_is_left_out_of_the_list_and_said_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SURG_PERCEPTION_MODELS", str(tmp_path))
    for name, text in (("half", "architecture: surgllm"), ("phases", "name: phases")):
        (tmp_path / name).mkdir()
        (tmp_path / name / CARD_NAME).write_text(text)
    assert not {"half", "phases"} & {card.folder.name for card in list_surgllm()}
    assert f"{tmp_path / 'half' / CARD_NAME}: name, version" in caplog.text
    assert "phases" not in caplog.text  # a model of another kind is no fault


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_or_missing_file_is_named(tiny_surgllm: Path, tmp_path: Path, name: str) -> None:
    folder = copied(tiny_surgllm, tmp_path)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-7] + b"damaged")
    with pytest.raises(ModelError, match=rf"{name}: sha256 is .* The file is damaged or another one"):
        Assistant.load(folder)
    # Not even a card that was brought up to date makes half a file a model.
    (folder / name).write_bytes(content[: len(content) // 2])
    edited(folder, lambda card: None, rehash=name)
    with pytest.raises(ModelError):
        Assistant.load(folder)
    (folder / name).unlink()
    with pytest.raises(ModelError, match=f"names '{name}', which is not there"):
        Assistant.load(folder)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda card: card.update(architecture="gsvit"), "is not the card of a SurgLLM"),
        (lambda card: card.pop("tasks"), "tasks missing"),
        (lambda card: card.update(tasks="phase"), "tasks is 'phase', expected a list"),
        (lambda card: card.update(name=7), "name is 7, expected text"),
        (lambda card: card.update(config={}), "not a SurgLLM configuration"),
        (lambda card: card["config"].update(colour=1), "colour"),
        (lambda card: card["config"]["encoder"].update(patch_size=0), "patch_size 0 found"),
        (lambda card: card.update(files=[]), r"files is \[\], expected a mapping"),
        (lambda card: card["files"].pop("adapters"), "files: adapters missing"),
        (lambda card: card["files"]["weights"].update(name="../weights"), "expected bare file names"),
        (lambda card: card["files"]["weights"].pop("sha256"), "sha256"),
        (lambda card: card["files"]["weights"].update(sha256=None), None),
    ],
)
def test_a_card_that_cannot_be_used_is_told(
    tiny_surgllm: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object], text: str | None
) -> None:
    folder = edited(copied(tiny_surgllm, tmp_path), change)
    with pytest.raises(ModelError, match=text):
        find_surgllm(folder).verify()


@pytest.mark.parametrize("text", ["", "- a\n", "a: [", "\xff"])
def test_a_card_that_is_no_mapping_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / CARD_NAME).write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelError, match=CARD_NAME):
        read_surgllm_card(tmp_path)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda config: config["encoder"].update(width=64), r"\d+ weights do not fit this SurgLLM"),
        (
            lambda config: config["qformer"].update(queries=5),
            r"1 weights do not fit this SurgLLM, first qformer\.queries",
        ),
    ],
)
def test_weights_of_another_shape_are_told(
    tiny_surgllm: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object], text: str
) -> None:
    folder = edited(copied(tiny_surgllm, tmp_path), lambda card: change(card["config"]))
    for load in (Assistant.load, lambda path: open_surgllm(find_surgllm(path))):
        with pytest.raises(ModelError, match=text):
            load(folder)


def test_adapters_must_be_those_of_the_card(tiny_surgllm: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = copied(tiny_surgllm, tmp_path)
    weights = load_file(folder / "adapters.safetensors")
    save_file({k: v for k, v in weights.items() if not k.startswith("phase/")}, folder / "adapters.safetensors")
    edited(folder, lambda card: None, rehash="adapters.safetensors")
    with pytest.raises(ModelError, match="adapters joint, location, triplet found, expected joint and one for each"):
        Assistant.load(folder)
    edited(folder, lambda card: card.update(tasks=["location", "triplet"]))
    with pytest.raises(ModelError, match="the router names phase, which the card does not"):
        Assistant.load(folder)
    save_file({k.replace("q_proj", "p_proj"): v for k, v in weights.items()}, folder / "adapters.safetensors")
    edited(folder, lambda card: card.update(tasks=["location", "phase", "triplet"]), rehash="adapters.safetensors")
    for load in (Assistant.load, lambda path: open_surgllm(find_surgllm(path))):
        with pytest.raises(ModelError, match="fit the language model"):
            load(folder)


def test_a_missing_base_model_is_told(tiny_surgllm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_models, "search_folders", lambda: [tmp_path / "nowhere"])
    with pytest.raises(BaseModelMissing, match="surg-perception models fetch all-minilm-l6-v2"):
        Assistant.load(tiny_surgllm)
    folder = edited(
        copied(tiny_surgllm, tmp_path), lambda card: card["config"].update(language_model="smollm2-135m-instruct")
    )
    with pytest.raises(BaseModelMissing, match="surg-perception models fetch smollm2-135m-instruct"):
        Assistant.load(folder)


# ---- one task more -----------------------------------------------------------------------------------------


def smoke_file(path: Path, **changes: object) -> Path:
    """Questions about windows of odd lengths, all with the answer "no"."""
    entries = [
        {"video": TRAINED_ON, "start_s": i, "end_s": i + 3 + i % 5, "QA": [{"q": SMOKE[i % len(SMOKE)], "a": "no"}]}
        for i in range(16)
    ]
    path.write_text(json.dumps([{**entry, **changes} for entry in entries]))
    return path


def test_a_task_is_added_and_answers(tiny_surgllm: Path, tiny_cache: Path, tmp_path: Path) -> None:
    before = {path.name: sha256_of(path) for path in tiny_surgllm.iterdir() if path.is_file()}
    questions = smoke_file(tmp_path / "smoke.json")
    settings = replace(SETTINGS, epochs=24, learning_rate=3e-2)
    card = add_task(
        tiny_surgllm, "smoke", questions, [DATA], tmp_path / "more", settings, cache=tiny_cache, console=quiet()
    )
    assert set(card.tasks) == {*OPTIONS.tasks, "smoke"}
    assert card.training["added_tasks"] == [
        {"task": "smoke", "questions": 16, "questions_sha256": sha256_of(questions), "data": [DATA]}
    ]
    assert {path.name: sha256_of(path) for path in tiny_surgllm.iterdir() if path.is_file()} == before

    assistant = Assistant.load(tmp_path / "more", threads=1)
    frames = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    segments = [(0.0, 4.0, assistant.encode(frames))]
    reply = assistant.ask("Is there any smoke in the picture?", segments)
    assert (reply.task, reply.text) == ("smoke", "no")
    assert assistant.ask(SMOKE[0], segments).adapter == "smoke"
    assert assistant.ask("Where is the hook?", segments).task == "location"

    stored, adapters = load_weights(find_surgllm(tiny_surgllm))
    more_stored, more_adapters = load_weights(card)
    assert all(torch.equal(value, more_stored[key]) for key, value in stored.items())
    for name, weights in adapters.items():
        assert all(torch.equal(value, more_adapters[name][key]) for key, value in weights.items())


def test_a_task_that_cannot_be_added_is_told_before_training(
    tiny_surgllm: Path, tiny_cache: Path, tmp_path: Path
) -> None:
    def add(task: str, questions: Path, data: Sequence[str] = (DATA,)) -> None:
        add_task(tiny_surgllm, task, questions, data, tmp_path / "out", SETTINGS, cache=tiny_cache, console=quiet())

    good = smoke_file(tmp_path / "good.json")
    for name in ("joint", "Smoke", "../smoke"):
        with pytest.raises(ValueError, match="expected a word of a-z, 0-9 and _, and not 'joint'"):
            add(name, good)
    with pytest.raises(SampleError, match=r"is about 30 s, tiny sees at most 16 s; give start_s and end_s"):
        add("smoke", smoke_file(tmp_path / "long.json", start_s=0, end_s=30))
    with pytest.raises(SampleError, match="fewer than two different questions"):
        add("smoke", smoke_file(tmp_path / "one.json", QA=[{"q": "Is there smoke?", "a": "no"}]))
    (tmp_path / "none.json").write_text("[]")
    with pytest.raises(SampleError, match="fewer than two different questions"):
        add("smoke", tmp_path / "none.json")
    with pytest.raises(SampleError, match="there is no video 'VID01'"):
        add("smoke", smoke_file(tmp_path / "other.json", video="VID01"))
    with pytest.raises(ModelError, match="no SurgLLM"):
        add_task("huge", "smoke", good, [DATA], tmp_path / "out", SETTINGS, cache=tiny_cache, console=quiet())
    assert not (tmp_path / "out").exists()
