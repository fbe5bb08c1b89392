# SPDX-License-Identifier: Apache-2.0
"""Forecasts: the graph says what PyTorch says; the stream judges each one at its time; novelty is what it says."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx_graphs import SmallNetwork, graph_of, write_folder

from surg_perception.data.phantom import Phantom
from surg_perception.gsvit import GSViT, GSViTConfig
from surg_perception.gsvit.model_folder import round_matrices_to_fp16
from surg_perception.models import ForecastFacts, ModelCard, ModelError, ModelFile, find_model
from surg_perception.runtime import InferenceError, open_backend
from surg_perception.runtime.export import export_forecast_onnx
from surg_perception.runtime.forecast import open_forecast
from surg_perception.stream.forecast import (
    MIN_HISTORY,
    Forecast,
    Forecaster,
    ForecastSettings,
    Novelty,
    block_colours,
    picture_difference,
)
from surg_perception.stream.image_decode import resize_to_model_input

ENGINES = ("openvino", "onnxruntime")
SHAPE = (192, 4, 4)
S = 10**9


# The graph ----------------------------------------------------------------------------------------------------


def decoder(predict_change: bool = False) -> GSViT:
    """M0 with a light decoder whose every layer matters."""
    torch.manual_seed(1)
    model = GSViT(GSViTConfig("m0", predict_change=predict_change, decoder_width=32, decoder_rank=6))
    for module in model.decoder.modules():
        if isinstance(module, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.uniform_(module.bias, -0.5, 0.5)
            torch.nn.init.uniform_(module.running_mean, -0.5, 0.5)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    return round_matrices_to_fp16(model.eval())


def folder_of(model: GSViT, folder: Path, weight_storage: str = "fp32") -> ModelCard:
    """A model folder whose forecast is that of the model."""
    card = write_folder(folder, graph_of(SmallNetwork.random()))
    path = export_forecast_onnx(model, folder / "forecast.onnx", weight_storage=weight_storage)
    network = replace(card.network, latent_shape=SHAPE, predict_change=model.config.predict_change, decoder=True)
    return replace(card, network=network, forecast=ForecastFacts(1.0), forecast_file=ModelFile.of(path))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> ModelCard:
    return folder_of(decoder(), tmp_path_factory.mktemp("models") / "plain")


@pytest.mark.parametrize("weight_storage", ["fp32", "fp16"])
@pytest.mark.parametrize("predict_change", [False, True])
def test_the_graph_gives_the_picture_that_pytorch_gives(
    tmp_path: Path, predict_change: bool, weight_storage: str
) -> None:
    model = decoder(predict_change)
    card = folder_of(model, tmp_path / "model", weight_storage)
    rng = np.random.default_rng(0)
    for engine in ENGINES:
        opened = open_forecast(card, engine)
        assert opened.name == f"{engine}:CPU:fp32"
        for _ in range(3):
            latent = rng.normal(size=SHAPE).astype(np.float32)
            frame = rng.integers(0, 256, (224, 224, 3), np.uint8)
            with torch.no_grad():
                expected = model.decoder(torch.from_numpy(latent)[None])[0].permute(1, 2, 0).numpy()
            if predict_change:
                expected = expected + frame / 255.0
            expected = np.clip(expected, 0.0, 1.0) * 255.0
            found = opened.predict(latent, frame)
            assert found.dtype == np.uint8
            assert expected.std() > 5, "the picture must not be flat"
            np.testing.assert_allclose(found, expected, atol=0.52)
    assert card.forecast_path.stat().st_size < (0.75 if weight_storage == "fp16" else 1.1) * 4 * sum(
        parameter.numel() for parameter in model.decoder.parameters()
    )


def test_a_model_without_decoder_has_no_forecast_to_export(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no frame decoder"):
        export_forecast_onnx(GSViT(GSViTConfig("m0", decoder=False)), tmp_path / "forecast.onnx")
    with pytest.raises(ValueError, match="weight storage"):
        export_forecast_onnx(decoder(), tmp_path / "forecast.onnx", weight_storage="int4")
    card = write_folder(tmp_path / "small", graph_of(SmallNetwork.random()))
    with pytest.raises(ModelError, match=r"files\.forecast"):
        open_forecast(card)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_forecast_of_another_model_or_a_broken_one_is_refused(plain: ModelCard, tmp_path: Path, engine: str) -> None:
    wider = replace(plain, network=replace(plain.network, latent_shape=(384, 4, 4)))
    with pytest.raises(ModelError, match=r"latent float32 \[\?, 192, 4, 4\].*latent float32 \[\?, 384, 4, 4\]"):
        open_forecast(wider, engine)
    change = replace(plain, network=replace(plain.network, predict_change=True))
    with pytest.raises(ModelError, match="frame uint8"):
        open_forecast(change, engine)

    half = tmp_path / "half.onnx"
    half.write_bytes(plain.forecast_path.read_bytes()[:5000])
    with pytest.raises(ModelError, match="no ONNX graph"):
        open_forecast(replace(plain, folder=tmp_path, forecast_file=ModelFile.of(half)), engine)

    poisoned = onnx.load(plain.forecast_path)
    for tensor in poisoned.graph.initializer:
        if len(tensor.dims) == 4:
            values = numpy_helper.to_array(tensor).copy()
            values[:] = np.nan
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(poisoned, tmp_path / "nan.onnx")
    with pytest.raises(ModelError, match="one level"):
        open_forecast(replace(plain, folder=tmp_path, forecast_file=ModelFile.of(tmp_path / "nan.onnx")), engine)


def test_a_closed_forecast_says_so_and_the_other_engine_is_taken_where_one_is_missing(
    plain: ModelCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    from surg_perception.runtime import forecast

    opened = open_forecast(plain)
    opened.close()
    opened.close()
    with pytest.raises(InferenceError, match="closed"):
        opened.predict(np.zeros(SHAPE, np.float32), np.zeros((224, 224, 3), np.uint8))

    load = forecast.importlib.import_module

    def without_openvino(name: str) -> object:
        if name.endswith("openvino_backend"):
            raise ImportError("No module named 'openvino'")
        return load(name)

    monkeypatch.setattr(forecast.importlib, "import_module", without_openvino)
    assert open_forecast(plain, "openvino").name == "onnxruntime:CPU:fp32"


def test_the_shipped_forecast_draws_what_was_seen() -> None:
    """Nearer to what comes than the forecast made from another procedure's picture, and than their mean."""
    card = find_model("gsvit_m0_phantom")
    assert card.forecast is not None
    assert card.forecast.gap_s == 1.0
    card.verify("forecast")
    forecasts, truths = [], []
    with open_backend(card, threads=1) as backend:
        opened = open_forecast(card, backend.kind)
        for seed in range(7000, 7008):
            phantom = Phantom(427, 240, rate_hz=1.0, seed=seed, duration_s=60.0)
            now, later = (resize_to_model_input(phantom.frame(index)[0], 224) for index in (25, 26))
            forecasts.append(opened.predict(backend.infer(now)[1], now))
            truths.append(later)
    errors = np.array([[picture_difference(f, t) for t in truths] for f in forecasts])
    own = np.diag(errors).mean()
    strange = errors[~np.eye(len(errors), dtype=bool)].mean()
    mean = np.mean(truths, axis=0)
    flat = np.mean([np.abs(mean - truth).mean() / 255.0 for truth in truths])
    assert own < 0.85 * strange
    assert own < flat


# The stream ---------------------------------------------------------------------------------------------------


def picture(level: int) -> NDArray[np.uint8]:
    return np.full((224, 224, 3), level, np.uint8)


def red(level: int) -> NDArray[np.uint8]:
    return picture(level) // np.array([4, 2, 1], np.uint8)


LATENT = np.zeros((8, 4, 4), np.float32)


def brighter(latent: NDArray[np.float32], frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Expects each picture to be ten levels brighter a gap later."""
    return frame + np.uint8(10)


def of(kind: type, found: list[object]) -> list[object]:
    return [each for each in found if isinstance(each, kind)]


def test_forecasts_keep_their_rate_by_stamps_and_are_judged_by_the_image_of_their_time() -> None:
    stream = Forecaster(brighter, 1.0, ForecastSettings(rate_hz=2.0))
    found: list[Forecast | Novelty] = []
    for k in range(76):  # three seconds at 25 Hz, each image a level brighter
        found += stream.update(picture(20 + k), LATENT, k * S // 25, tag=k)
    forecasts, news = of(Forecast, found), of(Novelty, found)
    assert [f.stamp_ns for f in forecasts] == [0, 13 * S // 25, 26 * S // 25, 39 * S // 25, 52 * S // 25, 65 * S // 25]
    assert [f.tag for f in forecasts] == [0, 13, 26, 39, 52, 65]
    assert (forecasts[1].frame == 20 + 13 + 10).all()
    assert [(n.tag, n.predicted_from_ns) for n in news] == [(k + 25, k * S // 25) for k in (0, 13, 26, 39)]
    for n in news:
        assert n.stamp_ns == n.tag * S // 25
        assert n.error == pytest.approx(15 / 255)
        assert n.copy_error == pytest.approx(25 / 255)
        assert math.isnan(n.score)
    assert (stream.counts.forecasts, stream.counts.judged, stream.counts.dropped) == (6, 4, 0)


def test_the_nearest_image_judges_and_none_too_far_away() -> None:
    def judged(*stamps_s: float) -> tuple[list[int], int]:
        stream = Forecaster(brighter, 1.0, ForecastSettings(rate_hz=2.0))
        found = [each for k, t in enumerate(stamps_s) for each in stream.update(picture(k), LATENT, int(t * S), tag=k)]
        return [n.tag for n in of(Novelty, found) if n.predicted_from_ns == 0], stream.counts.dropped

    assert judged(0.0, 0.95, 1.2) == ([1], 0)
    assert judged(0.0, 0.7, 1.2) == ([2], 0)
    assert judged(0.0, 0.8, 1.0, 1.4) == ([2], 0)
    assert judged(0.0, 1.25) == ([1], 0)
    assert judged(0.0, 0.74, 1.26) == ([], 1)
    assert judged(0.0, 3.0) == ([], 1)


def test_the_score_is_the_distance_from_the_median_of_the_last_minute_in_robust_deviations() -> None:
    rng = np.random.default_rng(0)
    levels = rng.integers(30, 200, 200)
    stream = Forecaster(brighter, 1.0, ForecastSettings(rate_hz=1.0))
    news = []
    for k, level in enumerate(levels):
        news += of(Novelty, stream.update(picture(level), LATENT, k * S))
    change = np.diff(levels) / 255
    errors, copies = np.abs(change - 10 / 255), np.abs(change)
    for name, expected in (("error", errors), ("copy_error", copies)):
        np.testing.assert_allclose([getattr(n, name) for n in news], expected, atol=1e-6)

    def share(level: NDArray[np.float64]) -> NDArray[np.float64]:
        return level / 255 / (3 * level / 255 + 0.15)

    colour_errors = np.abs(share(levels[1:]) - share(levels[:-1] + 10.0))
    colour_copies = np.abs(share(levels[1:]) - share(levels[:-1] * 1.0))
    np.testing.assert_allclose([n.colour_error for n in news], colour_errors, atol=1e-6)
    np.testing.assert_allclose([n.colour_copy_error for n in news], colour_copies, atol=1e-6)
    sums = colour_errors + colour_copies
    floored = 0
    for k, n in enumerate(news):
        past = sums[max(0, k - 60) : k]
        if len(past) < MIN_HISTORY:
            assert math.isnan(n.score)
            continue
        spread = 1.4826 * np.median(np.abs(past - np.median(past)))
        floored += spread < 0.001
        assert n.score == pytest.approx((sums[k] - np.median(past)) / max(spread, 0.001), rel=1e-3, abs=1e-3)
    assert len(news) == 199
    assert floored < 10


def test_texture_motion_and_light_do_not_count_as_news_and_a_coloured_spot_does() -> None:
    rng = np.random.default_rng(0)
    texture = (rng.integers(0, 200, (224, 224, 3)) // np.array([4, 2, 1])).astype(np.uint8)
    colours = block_colours(texture)
    means = texture[16:32, 32:48].mean(axis=(0, 1)) / 255
    np.testing.assert_allclose(colours[1, 2], means / (means.sum() + 0.15), atol=1e-5)
    moved, dimmer, spotted = np.roll(texture, 3, axis=1), (texture * 0.7).astype(np.uint8), texture.copy()
    spotted[:32, :32] = texture[:32, :32] // np.array([4, 4, 1], np.uint8)

    def difference(other: NDArray[np.uint8]) -> float:
        return float(np.abs(colours - block_colours(other)).mean())

    assert picture_difference(texture, moved) > 5 * picture_difference(texture, spotted)
    assert max(difference(moved), difference(dimmer)) < 0.04
    spot = np.abs(colours - block_colours(spotted))
    assert spot[:2, :2].mean() > 0.1
    assert spot[2:, 2:].max() == 0


def test_one_strange_image_stands_out_and_a_still_stream_does_not() -> None:
    def copy(latent: NDArray[np.float32], frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return frame

    stream = Forecaster(copy, 1.0, ForecastSettings(rate_hz=1.0))
    scores = {}
    for k in range(40):
        for n in of(Novelty, stream.update(red(100) if k == 30 else picture(100 + k % 2), LATENT, k * S)):
            scores[n.stamp_ns // S] = n.score
    assert scores[30] > 20
    assert scores[31] > 20, "and so does the way back"
    assert max(abs(score) for k, score in scores.items() if k > 10 and k not in (30, 31)) < 2


@pytest.mark.parametrize("jump_s", [-5.0, 20.0])
def test_a_seek_or_a_gap_starts_anew(jump_s: float) -> None:
    stream = Forecaster(brighter, 1.0, ForecastSettings(rate_hz=2.0, reset_gap_s=10.0))
    for k in range(40):
        stream.update(picture(k), LATENT, 100 * S + k * S // 4)
    judged, dropped = stream.counts.judged, stream.counts.dropped
    assert judged > MIN_HISTORY
    start_ns = 110 * S + int(jump_s * S)
    found = stream.update(picture(99), LATENT, start_ns)
    assert [type(each) for each in found] == [Forecast], "nothing is judged across the jump, and a forecast begins"
    assert stream.counts.dropped == dropped + 2
    news = [n for k in range(1, 9) for n in of(Novelty, stream.update(picture(k), LATENT, start_ns + k * S // 4))]
    assert news
    assert all(math.isnan(n.score) for n in news), "earlier errors are forgotten"
    assert all(n.predicted_from_ns >= start_ns for n in news)


def test_a_blank_picture_judges_and_starts_nothing_and_a_fault_is_passed_on() -> None:
    faults = [False]

    def moody(latent: NDArray[np.float32], frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
        if faults[0]:
            raise RuntimeError("out of memory")
        return frame

    stream = Forecaster(moody, 1.0, ForecastSettings(rate_hz=1.0))
    stream.update(picture(100), LATENT, 0)
    found = stream.update(picture(0), None, S)
    assert [type(each) for each in found] == [Novelty]
    assert found[0].error == pytest.approx(100 / 255)
    faults[0] = True
    with pytest.raises(RuntimeError, match="out of memory"):
        stream.update(picture(100), LATENT, 2 * S)
    faults[0] = False
    assert [type(each) for each in stream.update(picture(100), LATENT, 3 * S)] == [Forecast]
    assert [type(each) for each in stream.update(picture(100), LATENT, 4 * S)] == [Novelty, Forecast]


def test_what_waits_is_bounded() -> None:
    stream = Forecaster(brighter, 5.0, ForecastSettings(rate_hz=2.0))
    for k in range(1000):
        stream.settings = ForecastSettings(rate_hz=100.0 if k < 900 else 2.0)
        stream.update(picture(0), LATENT, k * S // 1000)
    assert len(stream._pending) <= 5.0 * 2.0 + 2


@pytest.mark.parametrize("settings", [{"rate_hz": 0.0}, {"rate_hz": math.nan}, {"reset_gap_s": 0.0}])
def test_settings_that_make_no_sense_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        ForecastSettings(**settings)
    with pytest.raises(ValueError, match="gap_s"):
        Forecaster(brighter, 0.0)
