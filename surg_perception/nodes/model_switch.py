# SPDX-License-Identifier: Apache-2.0
"""A model with all that runs it, and loading one in the background while another runs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from rclpy.task import Future
from surg_perception_msgs.msg import PhaseLabels
from surg_perception_msgs.srv import SetProcedure

from surg_perception.models import ModelCard
from surg_perception.procedures import UnknownProcedure
from surg_perception.runtime.backend import Backend, BackendUnavailable
from surg_perception.runtime.engine_build import EngineBuilder
from surg_perception.runtime.forecast import ForecastBackend
from surg_perception.stream.temporal_head import TemporalHead

Answer = SetProcedure.Response


@dataclass
class LoadedModel:
    """A model that has passed its checks, warm.

    Attributes:
        card, backend: the model and the engine that runs it.
        temporal: its causal temporal head; None where it has none.
        forecast: None where it has none, or none is wanted.
        labels: what is said of it. Made beforehand: writing the card as YAML takes longer than an image may wait.
    """

    card: ModelCard
    backend: Backend
    temporal: TemporalHead | None
    forecast: ForecastBackend | None
    labels: PhaseLabels

    def close(self) -> None:
        """Give everything back; a forecast under way ends first."""
        self.backend.close()
        if self.forecast is not None:
            self.forecast.close()


@dataclass(frozen=True)
class Refusal:
    """Why there is no new model: an error code of SetProcedure.srv, and its reason."""

    error_code: int
    reason: str


class ModelSwitch:
    """One request for another model; `load` runs in a thread of its own, everything else in the executor's.

    What `load` gives, the model and what model.path must be for it, ends up in one place: with `take`, or closed.

    Args:
        load: gives it; handed the builder.
        builder: of an engine that the model may need first; this request's own, and canceled with it.
    """

    def __init__(
        self, load: Callable[[EngineBuilder | None], tuple[LoadedModel, str]], builder: EngineBuilder | None
    ) -> None:
        self.done = Future()
        self._load = load
        self._builder = builder
        self._lock = threading.Lock()
        self._outcome: tuple[LoadedModel, str] | Refusal | None = None
        self._canceled = False
        # Not a thread of low priority: the engine's own threads would inherit that, and keep it.
        self.thread = threading.Thread(target=self._run, name="set_procedure", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            outcome: tuple[LoadedModel, str] | Refusal = self._load(self._builder)
        except UnknownProcedure as error:
            outcome = Refusal(Answer.UNKNOWN_PROCEDURE, str(error))
        except (ValueError, OSError, BackendUnavailable) as error:
            outcome = Refusal(Answer.BAD_MODEL, str(error))
        except Exception as error:
            outcome = Refusal(Answer.INTERNAL, f"{type(error).__name__}: {error}")
        with self._lock:
            if not self._canceled:
                self._outcome = outcome
                self.done.set_result(None)
                return
        if isinstance(outcome, tuple):
            outcome[0].close()

    def cancel(self) -> None:
        """End the request; what was, or is still being loaded is closed."""
        if self._builder is not None:
            self._builder.cancel()
        with self._lock:
            self._canceled = True
            outcome, self._outcome = self._outcome, None
        if isinstance(outcome, tuple):
            outcome[0].close()
        if not self.done.done():
            self.done.set_result(None)

    def take(self) -> tuple[LoadedModel, str] | Refusal:
        """The outcome, once `done`: the model and what model.path must be for it, or why there is none."""
        with self._lock:
            outcome, self._outcome = self._outcome, None
        return outcome or Refusal(Answer.NOT_ACTIVE, "the node was deactivated while the model was being loaded")
