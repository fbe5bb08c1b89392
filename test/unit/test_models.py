# SPDX-License-Identifier: Apache-2.0
"""The model card, the search for models and the sha256 check."""

from __future__ import annotations

import copy
import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
import yaml
from onnx_graphs import CLASSES, SmallNetwork, graph_of, write_folder

from surg_perception import models
from surg_perception.data.labels import CHOLEC80_PHASES
from surg_perception.models import ModelError, find_model, list_models, read_card

GOOD: dict[str, Any] = {
    "name": "gsvit_m0_test",
    "version": "1.0",
    "network": {
        "architecture": "gsvit",
        "size": "m0",
        "head_hidden": [64],
        "latent_shape": [192, 4, 4],
        "decoder": False,
    },
    "input": {"size": 224, "channels": "BGR", "scale": "0..1", "resize": "bilinear"},
    "labels": {"set": "cholec80", "names": list(CHOLEC80_PHASES)},
    "temperature": 1.3,
    "metrics": {"accuracy": 0.9},
    "training": {"data": "phantom"},
    "licence": "Apache-2.0",
    "intended_use": "Tests.",
    "files": {
        "weights": {"name": "model.safetensors", "sha256": "a" * 64},
        "graph": {"name": "model.onnx", "sha256": "b" * 64},
    },
}


def with_value(path: str, value: object) -> dict[str, Any]:
    """GOOD with one key set; "-" removes it."""
    content = copy.deepcopy(GOOD)
    *above, key = path.split(".")
    table = content
    for step in above:
        table = table[step]
    if value == "-":
        del table[key]
    else:
        table[key] = value
    return content


def write(folder: Path, content: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.yaml").write_text(yaml.safe_dump(content), "utf-8")
    return folder


@pytest.fixture(autouse=True)
def no_search_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SURG_PERCEPTION_MODELS", raising=False)


def test_a_card_is_read_and_written_back_unchanged(tmp_path: Path) -> None:
    card = read_card(write(tmp_path / "m", GOOD))
    assert card.network.latent_shape == (192, 4, 4)
    assert card.network.predict_change is False
    assert card.labels.names == CHOLEC80_PHASES
    assert card.temperature == 1.3
    assert card.graph_path == tmp_path / "m" / "model.onnx"
    assert card.weights_path == tmp_path / "m" / "model.safetensors"
    assert card.model_id == "gsvit_m0_test@" + "b" * 12
    card.write()
    assert read_card(tmp_path / "m") == card
    said = yaml.safe_load((tmp_path / "m" / "model.yaml").read_text())
    assert said == with_value("network.predict_change", False)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", "../elsewhere"),
        ("name", "-"),
        ("version", 1.0),
        ("network", "m0"),
        ("network.architecture", "resnet"),
        ("network.size", "m6"),
        ("network.head_hidden", [64, 0]),
        ("network.head_hidden", 64),
        ("network.latent_shape", [192, 7, 7]),
        ("network.latent_shape", "-"),
        ("network.decoder", "no"),
        ("network.predict_change", 1),
        ("input.size", 256),
        ("input.channels", "RGB"),
        ("input.scale", "imagenet"),
        ("input.resize", "area"),
        ("labels.names", ["a", "a"]),
        ("labels.names", ["Dissection", "Preparation"]),
        ("labels.set", None),
        ("temperature", 0),
        ("temperature", float("nan")),
        ("temperature", True),
        ("metrics", []),
        ("training", None),
        ("licence", "-"),
        ("intended_use", 3),
        ("files", {}),
        ("files.graph.sha256", "B" * 64),
        ("files.graph.sha256", "-"),
        ("files.graph.name", "../model.onnx"),
        ("files.graph.name", "/etc/model.onnx"),
        ("files.graph.name", "..\\model.onnx"),
        ("files.graph.name", "sub/model.onnx"),
        ("files.graph.name", "model.pkl"),
        ("files.weights.name", "weights.pkl"),
    ],
)
def test_a_wrong_card_is_refused_with_file_key_and_value(tmp_path: Path, key: str, value: object) -> None:
    write(tmp_path, with_value(key, value))
    with pytest.raises(ModelError) as refused:
        read_card(tmp_path)
    text = str(refused.value)
    assert str(tmp_path / "model.yaml") in text
    assert key in text
    assert "expected" in text
    assert ("missing" in text) if value == "-" else (repr(value) in text)


@pytest.mark.parametrize("key", ["author", "network.depth", "files.graph.url", "input.mean"])
def test_an_unknown_key_is_refused_by_name(tmp_path: Path, key: str) -> None:
    write(tmp_path, with_value(key, 1))
    with pytest.raises(ModelError, match=f"unknown: {key}; expected only"):
        read_card(tmp_path)


@pytest.mark.parametrize("text", ["", "a: [", "- 1", "!!python/object/apply:os.system [true]", "\xff"])
def test_what_is_no_card_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.yaml").write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelError, match=r"model\.yaml"):
        read_card(tmp_path)


def test_a_card_that_could_not_be_read_back_is_not_written(tmp_path: Path) -> None:
    from dataclasses import replace

    card = replace(read_card(write(tmp_path, GOOD)), temperature=-1.0)
    before = (tmp_path / "model.yaml").read_bytes()
    with pytest.raises(ModelError, match=r"temperature is -1\.0"):
        card.write()
    assert (tmp_path / "model.yaml").read_bytes() == before


def test_verify_finds_a_changed_and_a_missing_file(tmp_path: Path) -> None:
    card = write_folder(tmp_path / "small", graph_of(SmallNetwork.random()))
    content = card.graph_path.read_bytes()
    assert card.graph is not None
    assert card.graph.sha256 == hashlib.sha256(content).hexdigest()
    card.verify()
    card.graph_path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ModelError) as refused:
        card.verify()
    assert card.graph.sha256 in str(refused.value)
    assert str(card.graph_path) in str(refused.value)
    card.graph_path.unlink()
    with pytest.raises(ModelError, match=r"files\.graph names 'model\.onnx', but there is no such file"):
        card.verify()
    with pytest.raises(ModelError, match="has no weights"):
        card.verify("weights")


def test_a_model_is_found_by_folder_card_and_name_in_the_order_of_the_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    write(first / "m", with_value("version", "first"))
    write(second / "m", with_value("version", "second"))
    write(second / "n", with_value("name", "n"))
    assert find_model(second / "m").version == "second"
    assert find_model(second / "m" / "model.yaml").version == "second"
    assert find_model(str(first / "m")).version == "first"
    monkeypatch.setenv("SURG_PERCEPTION_MODELS", f"{first}:{second}:{tmp_path / 'absent'}")
    assert find_model("m").version == "first"
    assert find_model("n").folder == second / "n"
    listed = {card.folder for card in list_models()}
    assert {first / "m", second / "n"} <= listed
    assert second / "m" not in listed
    with pytest.raises(ModelError, match=r"no model 'absent'.*among.*m, n") as refused:
        find_model("absent")
    assert str(first) in str(refused.value)
    with pytest.raises(ModelError, match="no model"):
        find_model("../second/n")


def test_list_models_leaves_out_a_broken_card_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(models._logger, "warning", lambda text, *values: warnings.append(text % values))
    write(tmp_path / "good", GOOD)
    write(tmp_path / "bad", with_value("licence", "-"))
    monkeypatch.setenv("SURG_PERCEPTION_MODELS", str(tmp_path))
    assert "good" in {card.folder.name for card in list_models()}
    assert "bad" not in {card.folder.name for card in list_models()}
    assert "licence is missing" in warnings[0]


@pytest.mark.parametrize("layout", ["lib/python3.12/site-packages", "local/lib/python3.10/dist-packages"])
def test_models_are_found_in_an_installed_share_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    package = tmp_path / layout / "surg_perception"
    package.mkdir(parents=True)
    (package / "models.py").write_bytes(Path(models.__file__).read_bytes())
    write(tmp_path / "share" / "surg_perception" / "models" / "installed", with_value("name", "installed"))
    monkeypatch.setattr(models, "__file__", str(package / "models.py"))
    assert models.find_model("installed").name == "installed"


def test_models_are_found_in_the_source_tree_behind_a_symlink_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    (source / "surg_perception").mkdir(parents=True)
    (source / "surg_perception" / "models.py").touch()
    (source / "package.xml").touch()
    write(source / "models" / "linked", with_value("name", "linked"))
    build = tmp_path / "build" / "surg_perception"
    build.mkdir(parents=True)
    (build / "surg_perception").symlink_to(source / "surg_perception")
    monkeypatch.setattr(models, "__file__", str(build / "surg_perception" / "models.py"))
    assert models.find_model("linked").folder == source / "models" / "linked"


@pytest.mark.parametrize("name", ["GSViT.pkl", "GSViT-Cholecystectomy.pkl", "model.safetensors", "a.pt"])
def test_released_weights_must_be_imported_first(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelError, match="surg-perception models import"):
        find_model(tmp_path / name)


def test_a_bare_graph_gets_a_card_from_what_it_says_about_itself(tmp_path: Path) -> None:
    path = tmp_path / "mine.onnx"
    onnx.save(graph_of(SmallNetwork.random()), path)
    card = find_model(path)
    assert card.labels.names == tuple(f"phase {i}" for i in range(CLASSES))
    assert card.network.latent_shape == (8, 4, 4)
    assert card.model_id == f"mine@{hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"
    card.verify()

    onnx.save(graph_of(SmallNetwork.random(), metadata={"phases": '["a", "b", "c", "d", "e"]'}), path)
    assert find_model(path).labels.names == ("a", "b", "c", "d", "e")
    onnx.save(graph_of(SmallNetwork.random(), metadata={"phases": '["a", "b"]'}), path)
    with pytest.raises(ModelError, match="expected a JSON list of 5 names"):
        find_model(path)
    onnx.save(graph_of(SmallNetwork.random(), head=False), path)
    assert find_model(path).labels.names == ()


def test_a_graph_beside_its_card_has_that_card(tmp_path: Path) -> None:
    card = write_folder(tmp_path / "small", graph_of(SmallNetwork.random()))
    assert find_model(card.graph_path) == card
    onnx.save(graph_of(SmallNetwork.random()), tmp_path / "small" / "other.onnx")
    assert find_model(tmp_path / "small" / "other.onnx").name == "other"


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no ONNX graph at"):
        find_model(tmp_path / "absent.onnx")
    with pytest.raises(ModelError, match=r"it has no model\.yaml"):
        find_model(tmp_path)
    (tmp_path / "broken.onnx").write_bytes(b"this is no protobuf\xff\xff" * 10)
    with pytest.raises(ModelError, match=r"broken\.onnx is no ONNX graph"):
        find_model(tmp_path / "broken.onnx")


def test_cards_and_search_import_no_torch_and_no_engine(tmp_path: Path) -> None:
    write(tmp_path / "m", GOOD)
    code = (
        "import sys; from surg_perception.models import find_model, list_models; "
        f"find_model({str(tmp_path / 'm')!r}); list_models(); "
        "print(sorted({'torch', 'timm', 'onnxruntime', 'openvino'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


RICH = copy.deepcopy(GOOD) | {
    "procedure": "Cholecystectomy",
    "temporal": {"stages": 2, "layers": 8, "channels": 32, "inputs": "latent", "step_s": 4.0},
    "forecast": {"gap_s": 1.0},
}
RICH["network"] |= {"decoder": True, "predict_change": False, "decoder_width": 64, "decoder_rank": 0}
RICH["files"] |= {
    "temporal": {"name": "temporal.safetensors", "sha256": hashlib.sha256(b"t").hexdigest()},
    "forecast": {"name": "forecast.onnx", "sha256": hashlib.sha256(b"f").hexdigest()},
}


def test_temporal_head_and_forecast_are_part_of_the_card_and_are_verified(tmp_path: Path) -> None:
    card = read_card(write(tmp_path / "m", RICH))
    assert card.temporal is not None
    assert (card.temporal.layers, card.temporal.step_s) == (8, 4.0)
    assert card.forecast is not None
    assert card.forecast.gap_s == 1.0
    assert card.procedure == "Cholecystectomy"
    assert yaml.safe_load(card.to_yaml()) == RICH
    card.temporal_path.write_bytes(b"t")
    card.forecast_path.write_bytes(b"f")
    card.verify("temporal", "forecast")
    card.forecast_path.write_bytes(b"g")
    with pytest.raises(ModelError, match=r"forecast\.onnx: sha256"):
        card.verify("forecast")
    with pytest.raises(ModelError, match=r"no files\.temporal"):
        _ = read_card(write(tmp_path / "plain", GOOD)).temporal_path


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("temporal", None, "temporal"),
        ("files.temporal", None, "temporal"),
        ("temporal.inputs", "pixels", r"temporal\.inputs"),
        ("temporal.step_s", 0, r"temporal\.step_s"),
        ("temporal.colour", "red", r"temporal\.colour"),
        ("forecast.gap_s", -1.0, r"forecast\.gap_s"),
        ("network.decoder_rank", -1, r"network\.decoder_rank"),
        ("procedure", 3, "procedure"),
    ],
)
def test_what_is_wrong_with_them_is_named(tmp_path: Path, key: str, value: object, named: str) -> None:
    content = copy.deepcopy(RICH)
    *above, last = key.split(".")
    table = content
    for step in above:
        table = table[step]
    if value is None:
        del table[last]
    else:
        table[last] = value
    with pytest.raises(ModelError, match=named):
        read_card(write(tmp_path / "m", content))
