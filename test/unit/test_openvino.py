# SPDX-License-Identifier: Apache-2.0
"""OpenVINO on the CPU: the phase head's weights in int8, and compiled models kept for the next start."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest
from onnx_graphs import SmallNetwork, graph_of, write_folder
from openvino import opset13

from surg_perception.models import ModelCard, ModelError, find_model
from surg_perception.runtime import BackendUnavailable, open_backend, openvino_backend
from surg_perception.runtime.agreement import compare, reference_frames
from surg_perception.runtime.openvino_backend import OpenVinoBackend


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of this test's own; the folder of compiled models."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "surg_perception" / "openvino"


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Warnings of the backend."""
    lines: list[str] = []
    monkeypatch.setattr(openvino_backend._logger, "warning", lambda text, *values: lines.append(text % values))
    return lines


@pytest.fixture
def card(tmp_path: Path) -> ModelCard:
    return write_folder(tmp_path / "small", graph_of(SmallNetwork.random()))


def opened_in(card: ModelCard, precision: str = "fp32", threads: int = 1) -> Any:
    return open_backend(card, "openvino", precision, allow_fallback=False, threads=threads)


# Weights in int8 ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transposed", [False, True])
def test_weights_are_rounded_per_output_channel_and_stay_int8(transposed: bool) -> None:
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(512, 256)).astype(np.float32) * np.logspace(-3, 3, 256, dtype=np.float32)
    weights[:, 7] = 0
    x = rng.normal(size=(1, 512)).astype(np.float32)
    parameter = opset13.parameter([1, 512], np.float32)
    constant = opset13.constant(np.ascontiguousarray(weights.T) if transposed else weights)
    model = openvino.Model([opset13.matmul(parameter, constant, False, transposed)], [parameter])
    assert openvino_backend._compress_head(model)
    settings = {"INFERENCE_PRECISION_HINT": openvino.Type.f32, "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}  # weights alone
    compiled = openvino.Core().compile_model(model, "CPU", settings)
    assert openvino_backend._has_int8_weights(compiled)
    steps = np.abs(weights).max(axis=0) / 127
    expected = x @ (np.rint(weights / np.where(steps == 0, 1, steps)) * steps)
    found = compiled(x)[0]
    np.testing.assert_allclose(
        found / np.where(steps == 0, 1, steps), expected / np.where(steps == 0, 1, steps), atol=0.05
    )
    assert found[0, 7] == 0
    assert np.abs(found - x @ weights).max() > 0


def test_a_gsvit_runs_with_its_head_in_int8() -> None:
    with (
        opened_in(find_model("gsvit_m0_phantom"), "fp32-w8") as opened,
        opened_in(find_model("gsvit_m0_phantom")) as fp32,
    ):
        assert opened.name == "openvino:CPU:fp32-w8"
        found, expected = (engine.infer_batch(reference_frames()) for engine in (opened, fp32))
        single = opened.infer(reference_frames()[0])[0]
    agreement = compare(found, expected)
    assert agreement.holds
    assert agreement.same_phase == 1
    assert 0 < agreement.probability_difference < 0.02
    np.testing.assert_allclose(found[1], expected[1], atol=1e-4)  # the encoder is as it was
    assert np.abs(single - found[0][0]).max() < 1e-4
    assert np.abs(single - expected[0][0]).max() > 0


def test_weights_that_int8_spoils_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_backend, "_W8_FROM_ELEMENTS", 1)
    card = write_folder(tmp_path / "m", graph_of(SmallNetwork.random(), cancelling=300.0))
    with pytest.raises(BackendUnavailable, match="fp32-w8: disagrees with"):
        opened_in(card, "fp32-w8")
    with open_backend(card, "openvino", "fp32-w8", threads=1) as opened:
        assert opened.name == "openvino:CPU:fp32"


def test_a_model_without_a_head_is_told_to_leave_w8_away(tmp_path: Path) -> None:
    card = write_folder(tmp_path / "m", graph_of(SmallNetwork.random(), head=False), head=False)
    with pytest.raises(BackendUnavailable, match="has no phase head with weights to hold in int8"):
        opened_in(card, "fp32-w8")
    with open_backend(card, "openvino", "fp32-w8", threads=1) as opened:
        assert opened.name == "openvino:CPU:fp32"


def test_weights_that_do_not_stay_int8_are_said_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_backend, "_has_int8_weights", lambda compiled: False)
    with pytest.raises(BackendUnavailable, match="expands the phase head's int8 weights"):
        opened_in(find_model("gsvit_m0_phantom"), "fp32-w8")


def test_int8_weights_are_for_the_cpu() -> None:
    assert "not fp16" in str(OpenVinoBackend.refusal("CPU", "fp16"))
    assert OpenVinoBackend.refusal("GPU", "fp32-w8") is not None


# Compiled models ----------------------------------------------------------------------------------------------


def kept(cache: Path, part: str) -> list[Path]:
    """What is kept of models in this part: "whole", "encoder", "head", or "outputs" of fp32 on the sample frames."""
    facts = {path: json.loads(path.read_bytes()) for path in cache.glob("*.json")}
    return [path.with_suffix(".engine") for path in facts if facts[path]["key"]["options"]["part"] == part]


def no_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_model(self: OpenVinoBackend, batch: int) -> Any:
        raise AssertionError("compiled")

    monkeypatch.setattr(OpenVinoBackend, "_compile", compile_model)


def test_the_second_start_compiles_nothing_and_gives_the_same_numbers(
    card: ModelCard, cache: Path, log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    frame = reference_frames()[3]
    with opened_in(card) as first:
        expected = first.infer(frame)
    assert (len(kept(cache, "whole")), cache.stat().st_mode & 0o777) == (1, 0o700)
    with monkeypatch.context() as patched:
        no_compiling(patched)
        with opened_in(card) as second:
            assert any("compiled by an earlier start" in note for note in second.notes)
            for found, wanted in zip(second.infer(frame), expected, strict=True):
                np.testing.assert_array_equal(found, wanted)
    with opened_in(card) as third:
        np.testing.assert_allclose(third.infer_batch(reference_frames()[:3])[1].shape[0], 3)
    assert not log


def test_another_number_of_threads_or_graph_is_another_compiled_model(
    card: ModelCard, cache: Path, tmp_path: Path
) -> None:
    other = write_folder(tmp_path / "other", graph_of(SmallNetwork.random(1)))
    for model, threads in ((card, 1), (card, 2), (other, 1)):
        with opened_in(model, threads=threads) as opened:
            assert not any("earlier start" in note for note in opened.notes)
    assert len(kept(cache, "whole")) == 3


@pytest.mark.parametrize("damage", ["cut", "bit", "foreign"])
def test_a_damaged_compiled_model_is_made_anew(
    card: ModelCard, cache: Path, log: list[str], damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    frame = reference_frames()[3]
    with opened_in(card) as first:
        expected = first.infer(frame)
    (path,) = kept(cache, "whole")
    content = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "bit":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    else:  # whole, as its side file says, but nothing that OpenVINO reads
        path.write_bytes(b"nonsense" * 999)
        monkeypatch.setattr("surg_perception.runtime.engine_cache._whole", lambda path, _: (path.read_bytes(), ""))
    with opened_in(card) as second:
        np.testing.assert_array_equal(second.infer(frame)[0], expected[0])
        assert not any("compiled by an earlier start" in note for note in second.notes)
    assert len(log) == 1
    assert path.read_bytes()[:8] != b"nonsense"
    with opened_in(card) as third:
        assert any("compiled by an earlier start" in note for note in third.notes)


def test_a_later_start_is_compared_with_what_fp32_gave_at_the_first(
    card: ModelCard, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino_backend, "_W8_FROM_ELEMENTS", 1)
    with opened_in(card, "fp32-w8") as first:
        assert any("agrees with openvino:CPU:fp32 on 16 sample frames" in note for note in first.notes)
    assert len(kept(cache, "outputs")) == 1
    asked: list[Any] = []
    monkeypatch.setattr(OpenVinoBackend, "reference", lambda self: asked.append(self))
    for precision in ("fp32-w8", "fp32"):
        with opened_in(card, precision) as second:
            assert any("agrees with fp32 at an earlier start on 16 sample frames" in note for note in second.notes)
    assert not asked, "no second engine is loaded"


@pytest.mark.parametrize("precision", ["fp32", "fp32-w8"])
def test_an_engine_that_no_longer_gives_what_it_gave_is_refused(
    card: ModelCard, cache: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino_backend, "_W8_FROM_ELEMENTS", 1)
    opened_in(card, precision).close()

    infer = OpenVinoBackend._run

    def other(self: OpenVinoBackend, frames: Any) -> Any:
        p, z = infer(self, frames)
        return (p, z) if self.precision != precision else (np.roll(p, 1, axis=1), z)

    monkeypatch.setattr(OpenVinoBackend, "_run", other)
    who = "fp32 at an earlier start" if precision == "fp32" else "openvino:CPU:fp32"
    with pytest.raises(BackendUnavailable, match=f"disagrees with {who} on 16 sample frames") as refused:
        opened_in(card, precision)
    assert ("remove the folder surg_perception/openvino" in str(refused.value)) == (precision == "fp32")


@pytest.mark.parametrize("damage", ["bit", "foreign", "shape"])
def test_outputs_that_are_damaged_are_made_anew(
    card: ModelCard, cache: Path, log: list[str], damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened_in(card).close()
    (path,) = kept(cache, "outputs")
    content = path.read_bytes()
    with monkeypatch.context() as patched:
        if damage == "bit":
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        else:  # whole, as its side file says
            patched.setattr("surg_perception.runtime.engine_cache._whole", lambda path, _: (path.read_bytes(), ""))
            if damage == "foreign":
                path.write_bytes(b"nonsense" * 999)
            else:
                with path.open("wb") as file:
                    np.savez(file, probabilities=np.zeros((16, 9)), latent=np.zeros((16, 8, 4, 4)))
        with opened_in(card) as opened:
            assert any("agrees with itself" in note for note in opened.notes)
    assert len(log) == (damage != "shape")
    with opened_in(card) as opened:
        assert any("agrees with fp32 at an earlier start" in note for note in opened.notes)


def test_a_cache_that_others_may_write_is_not_used(card: ModelCard, cache: Path) -> None:
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    with opened_in(card) as opened:
        assert opened.name == "openvino:CPU:fp32"
    assert not list(cache.iterdir())


def test_a_full_disk_only_warns(card: ModelCard, log: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("surg_perception.runtime.engine_cache.os.fsync", full)
    with opened_in(card) as opened:
        assert opened.name == "openvino:CPU:fp32"
    assert any("No space left" in line for line in log)


def test_a_card_of_another_graph_is_refused_from_the_cache_too(card: ModelCard) -> None:
    with opened_in(card):
        pass
    wrong = replace(card, network=replace(card.network, latent_shape=(192, 4, 4)))
    with pytest.raises(ModelError, match=r"latent shape is \[8, 4, 4\], but the card says \[192, 4, 4\]"):
        opened_in(wrong)
