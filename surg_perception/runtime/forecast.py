# SPDX-License-Identifier: Apache-2.0
"""The second graph of a model folder, from a latent to the frame expected `gap_s` later, in an engine for the CPU."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surg_perception.models import ModelCard, ModelError
from surg_perception.runtime.backend import BackendUnavailable, InferenceError, first_line
from surg_perception.runtime.graph import FRAME_SHAPE, RunGraph, check_forecast_contract

_ENGINES = ("openvino", "onnxruntime")


class ForecastBackend:
    """A model's frame decoder, loaded. Use it from one thread at a time; `close` may come from any.

    Attributes:
        card: the model.
        name: what runs, as "openvino:CPU:fp32".
        gap_s: how far ahead it looks, in seconds.
    """

    def __init__(self, card: ModelCard, name: str, run: RunGraph) -> None:
        assert card.forecast is not None
        self.card = card
        self.name = name
        self.gap_s = card.forecast.gap_s
        self._run: RunGraph | None = run

    def predict(self, latent: NDArray[np.float32], frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The frame expected `gap_s` after `frame`.

        Args:
            latent: float32 [D, 4, 4], of `frame`.
            frame: uint8 [224, 224, 3], BGR.

        Returns:
            uint8 [224, 224, 3], BGR.

        Raises:
            InferenceError: the engine failed, or it is closed.
        """
        run = self._run
        if run is None:
            raise InferenceError(self.name, "is closed; open another forecast")
        inputs: dict[str, NDArray[Any]] = {"latent": np.ascontiguousarray(latent[np.newaxis])}
        if self.card.network.predict_change:
            inputs["frame"] = np.ascontiguousarray(frame[np.newaxis])
        try:
            forecast: NDArray[np.uint8] = run(inputs)[0]
        except Exception as error:
            raise InferenceError(self.name, first_line(error)) from error
        return forecast

    def close(self) -> None:
        """Free the engine as soon as a prediction under way has ended; calling it again does nothing."""
        self._run = None


def open_forecast(card: ModelCard, backend: str = "openvino", threads: int = 1) -> ForecastBackend:
    """Load a model's forecast graph.

    Args:
        card: of a model with a forecast (`card.forecast`). sha256 is not checked here (`ModelCard.verify`).
        backend: engine to try first: "openvino" or "onnxruntime"; any other name means no preference.
        threads: CPU threads.

    Raises:
        ModelError: the model has no forecast graph, or one that is none of this project's, or that gives pictures
            of one level whatever the latent (NaN in the weights does that).
        BackendUnavailable: neither engine is installed, or none runs the graph; says why.
    """
    path = card.forecast_path
    reasons = []
    for kind in sorted(_ENGINES, key=lambda name: name != backend):
        try:
            engine = importlib.import_module(f"surg_perception.runtime.{kind}_backend")
        except ImportError as error:
            reasons.append(f"{kind}: not installed, or does not import ({first_line(error)})")
            continue
        try:
            facts, run = engine.load_graph(path, threads)
            check_forecast_contract(facts, path, card)
            opened = ForecastBackend(card, f"{kind}:CPU:fp32", run)
            _check(opened)
        except (ModelError, BackendUnavailable):
            raise
        except Exception as error:
            reasons.append(f"{kind}: {first_line(error)}")
            continue
        return opened
    raise BackendUnavailable(f"the forecast of {card.name} does not run on this machine: {'; '.join(reasons)}")


def _check(opened: ForecastBackend) -> None:
    rng = np.random.default_rng(0)
    frame = np.full(FRAME_SHAPE, 128, np.uint8)
    for _ in range(2):
        latent = rng.normal(size=opened.card.network.latent_shape).astype(np.float32)
        forecast = opened.predict(latent, frame)
        if forecast.min() == forecast.max():
            raise ModelError(
                f"{opened.card.forecast_path}: the forecast is a picture of the one level {forecast.min()}, as NaN in "
                "the weights makes it; copy the model folder again, whole, or export it again"
            )
