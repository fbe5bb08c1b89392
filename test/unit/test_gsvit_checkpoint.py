# SPDX-License-Identifier: Apache-2.0
"""Released GSViT files give the original's numbers, damaged ones say what is wrong, hostile ones do nothing."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import gsvit_reference as reference
import pytest
import torch
from safetensors.torch import save_file

from surg_perception.gsvit import CheckpointError, load_gsvit


@pytest.fixture(scope="module")
def rgb() -> torch.Tensor:
    return torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def small() -> reference.ReferenceGSViT:
    """An original-format network small enough to be written often: M0 without decoder."""
    return reference.randomise(reference.ReferenceGSViT("m0", decoder=False))


def test_released_file_gives_the_original_networks_latents_and_frames(tmp_path: Path, rgb: torch.Tensor) -> None:
    """897 tensors, 1.3 GB: the real thing but for the values."""
    original = reference.randomise(reference.ReferenceGSViT("m5"))
    state = original.state_dict()
    assert len(state) == 897
    assert state["evit.0.0.c.weight"].shape == (24, 3, 3, 3)
    assert state["evit.0.2.bn.weight"].shape == (48,)
    assert state["evit.3.6.ffn1.m.pw2.bn.running_mean"].shape == (384,)
    file = tmp_path / "GSViT.pkl"
    torch.save(state, file)
    with torch.inference_mode():
        latent = original.evit(rgb.flip(1))
        frame = original.decode(latent).flip(1)
    del original, state
    model = load_gsvit(file)
    file.unlink()
    assert not model.training
    with torch.inference_mode():
        torch.testing.assert_close(model.encode(rgb), latent, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(model.predict_next(rgb), frame, rtol=0, atol=1e-4)
    assert frame.std() > 0.05  # a decoder that says the same everywhere would prove nothing


@pytest.mark.parametrize("size", sorted(reference.ARCHITECTURES))
def test_every_encoder_size_gives_the_originals_latent(tmp_path: Path, rgb: torch.Tensor, size: str) -> None:
    original = reference.randomise(reference.ReferenceGSViT(size, decoder=False), seed=3)
    torch.save(original.state_dict(), tmp_path / "x.pkl")
    model = load_gsvit(tmp_path / "x.pkl", size=size)
    with torch.inference_mode():
        expected = original.evit(rgb.flip(1))
        torch.testing.assert_close(model.encode(rgb), expected, rtol=1e-5, atol=1e-4)
        original.evit[3][-1].mixer.m.attn.attention_biases.add_(torch.rand(1, 16))
        assert (original.evit(rgb.flip(1)) - expected).abs().max() > 1e-2  # attention biases do matter here


def _variants(state: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    heads_table = {
        name.replace("attention_bias_idxs", "ab"): state[name.replace("_idxs", "es")][:, table]
        for name, table in state.items()
        if name.endswith("attention_bias_idxs")
    }
    return {
        "data parallel": {f"module.{name}": value for name, value in state.items()},
        "nested": {"state_dict": state},  # type: ignore[dict-item]
        "with per-evaluation tensors": {**state, **heads_table},
        "without index tables": {n: v for n, v in state.items() if not n.endswith("attention_bias_idxs")},
        "without counters": {n: v for n, v in state.items() if not n.endswith("num_batches_tracked")},
        "double precision": {n: v.double() if v.is_floating_point() else v for n, v in state.items()},
    }


VARIANTS = (
    "data parallel",
    "nested",
    "with per-evaluation tensors",
    "without index tables",
    "without counters",
    "double precision",
)


@pytest.mark.parametrize("variant", VARIANTS)
def test_ways_in_which_the_same_weights_are_written(
    tmp_path: Path, small: reference.ReferenceGSViT, rgb: torch.Tensor, variant: str
) -> None:
    torch.save(_variants(small.state_dict())[variant], tmp_path / "x.pkl")
    model = load_gsvit(tmp_path / "x.pkl", size="m0")
    with torch.inference_mode():
        torch.testing.assert_close(model.encode(rgb), small.evit(rgb.flip(1)), rtol=1e-5, atol=1e-4)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_safetensors_and_legacy_pickle_are_twins_of_the_zip_pickle(
    tmp_path: Path, small: reference.ReferenceGSViT, rgb: torch.Tensor
) -> None:
    state = small.state_dict()
    save_file(state, tmp_path / "x.safetensors")
    torch.save(state, tmp_path / "x.pkl", _use_new_zipfile_serialization=False)
    with torch.inference_mode():
        latents = [load_gsvit(tmp_path / name, size="m0").encode(rgb) for name in ("x.safetensors", "x.pkl")]
        expected = small.evit(rgb.flip(1))
    for latent in latents:
        torch.testing.assert_close(latent, expected, rtol=1e-5, atol=1e-4)


def test_every_wrong_tensor_is_named_with_what_was_expected(tmp_path: Path, small: reference.ReferenceGSViT) -> None:
    state = dict(small.state_dict())
    del state["evit.3.5.ffn1.m.pw2.bn.running_mean"], state["evit.1.0.mixer.m.attn.attention_biases"]
    del state["evit.2.0.0.m.bn.num_batches_tracked"]  # the other counters are there, so this one is lost
    state["evit.0.0.c.weight"] = torch.zeros(8, 1, 3, 3)
    state["evit.4.weight"] = torch.zeros(5)
    torch.save(state, tmp_path / "x.pkl")
    with pytest.raises(CheckpointError) as caught:
        load_gsvit(tmp_path / "x.pkl", size="m0")
    message = str(caught.value)
    assert "3 missing" in message
    for name in (
        "evit.3.5.ffn1.m.pw2.bn.running_mean",
        "evit.1.0.mixer.m.attn.attention_biases",
        "evit.2.0.0.m.bn.num_batches_tracked",
    ):
        assert name in message
    assert "1 not expected (evit.4.weight)" in message
    assert "1 misshapen (evit.0.0.c.weight is [8, 1, 3, 3], expected [8, 3, 3, 3])" in message


def test_a_piece_of_a_decoder_is_not_a_decoder(tmp_path: Path, small: reference.ReferenceGSViT) -> None:
    torch.save({**small.state_dict(), "decoder.bn1.weight": torch.ones(512)}, tmp_path / "x.pkl")
    with pytest.raises(CheckpointError, match=r"missing \(decoder\.fc\.weight, decoder\.fc\.bias"):
        load_gsvit(tmp_path / "x.pkl", size="m0")


def test_the_wrong_size_is_an_error_that_counts_instead_of_listing_hundreds(
    tmp_path: Path, small: reference.ReferenceGSViT
) -> None:
    torch.save(small.state_dict(), tmp_path / "x.pkl")
    with pytest.raises(CheckpointError, match=r"size 'm5'.*and \d+ more") as caught:
        load_gsvit(tmp_path / "x.pkl")
    assert len(str(caught.value)) < 4000


@pytest.mark.parametrize(
    ("name", "value"),
    [("evit.2.3.dw0.m.c.weight", float("nan")), ("evit.2.3.mixer.m.attn.attention_bias_idxs", 0)],
)
def test_values_that_cannot_be_right_are_named(
    tmp_path: Path, small: reference.ReferenceGSViT, name: str, value: float
) -> None:
    state = dict(small.state_dict())
    state[name] = torch.full_like(state[name], value)
    torch.save(state, tmp_path / "x.pkl")
    with pytest.raises(CheckpointError, match=name):
        load_gsvit(tmp_path / "x.pkl", size="m0")


class Payload:
    """Unpickled by an unsafe loader, this makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2))])
def test_a_malicious_pickle_executes_nothing(tmp_path: Path, small: reference.ReferenceGSViT, write) -> None:
    trap, file = tmp_path / "owned", tmp_path / "GSViT.pkl"
    write({**small.state_dict(), "evit.9.weight": Payload(trap)}, file)
    with pytest.raises(CheckpointError, match="nothing in it was executed"):
        load_gsvit(file, size="m0")
    assert not trap.exists()
    pickle.loads(pickle.dumps(Payload(trap)))
    assert trap.exists()  # the payload is a real one


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 cut off"])
@pytest.mark.parametrize("name", ["x.pkl", "x.safetensors"])
def test_files_that_are_no_checkpoints(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        load_gsvit(tmp_path / name)


def test_dictionaries_of_other_things_are_refused_by_name(tmp_path: Path) -> None:
    torch.save({"evit.0.0.c.weight": torch.zeros(1), "epoch": 3}, tmp_path / "x.pkl")
    with pytest.raises(CheckpointError, match=r"no tensors \(epoch\)"):
        load_gsvit(tmp_path / "x.pkl")
    with pytest.raises(FileNotFoundError, match="no GSViT weights"):
        load_gsvit(tmp_path / "absent.pkl")


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, surg_perception.gsvit as g; assert 'load_gsvit' in g.__all__; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parents[2])
