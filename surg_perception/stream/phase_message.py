# SPDX-License-Identifier: Apache-2.0
"""What is said of an image, as the fields of the messages SurgicalPhase, LatentFeatures and PhaseLabels, without ROS.

The phase node publishes these fields and a replay writes them into a bag, so that neither can say something else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from surg_perception.models import ModelCard
from surg_perception.stream.phase_pipeline import PhaseResult, PhaseSettings, PhaseState
from surg_perception.stream.temporal_filter import FilterSettings

FILTER_PARAMETERS = ("time_constant_s", "switch_margin", "hold_s", "reset_gap_s")


@dataclass
class Counts:
    """Frames since activation."""

    received: int = 0
    processed: int = 0
    rejected: int = 0
    lost: int = 0
    faults: int = 0


def phase_settings(values: Mapping[str, Any]) -> PhaseSettings:
    """Settings of the pipeline from the parameters of the node `phase`.

    Raises:
        ValueError: a value that the settings do not take.
    """
    return PhaseSettings(
        FilterSettings(**{name: values[f"filter.{name}"] for name in FILTER_PARAMETERS}),
        uncertain_below=values["state.uncertain_below"],
        max_age_s=values["state.max_age_s"],
        max_pixels=values["input.max_pixels"],
    )


def blank_fields(state: PhaseState, model_id: str, backend: str, counts: Counts, replaced: int = 0) -> dict[str, Any]:
    """Fields of SurgicalPhase, except header and times, where there is no phase to tell.

    Args:
        replaced: frames that a newer one replaced before they were processed.
    """
    return {
        "state": int(state),
        "phase_id": -1,
        "phase": "",
        "confidence": 0.0,
        "probabilities": np.empty(0, np.float32),
        "raw_phase_id": -1,
        "model_id": model_id,
        "backend": backend,
        "frames_received": counts.received,
        "frames_processed": counts.processed,
        "frames_replaced": replaced,
        "frames_rejected": counts.rejected + counts.faults,
        "frames_lost": counts.lost,
    }


def phase_fields(result: PhaseResult, model_id: str, backend: str, counts: Counts, replaced: int = 0) -> dict[str, Any]:
    """Fields of SurgicalPhase, except header and times, of a result that `counts.processed` includes."""
    return {
        **blank_fields(result.state, model_id, backend, counts, replaced),
        "phase_id": result.phase_id,
        "phase": result.phase,
        "confidence": result.confidence,
        "probabilities": result.probabilities,
        "raw_phase_id": result.raw_phase_id,
    }


class LatentFields:
    """Fields of LatentFeatures, except the header, for the results whose latent is to be published."""

    def __init__(self) -> None:
        self._last_s = -math.inf

    def of(self, result: PhaseResult, model_id: str, backend: str, values: Mapping[str, Any]) -> dict[str, Any] | None:
        """Fields, `data` as float32 [n] in C order; None where there is no latent or the parameters want none.

        Args:
            values: parameters of the node `phase`.
        """
        if not values["latent.publish"] or result.latent is None:
            return None
        rate_hz, stamp_s = values["latent.max_rate_hz"], result.stamp_ns * 1e-9
        # A stamp that went back (a bag that loops) starts anew.
        if rate_hz and 0 <= stamp_s - self._last_s < 1 / rate_hz - 1e-6:
            return None
        self._last_s = stamp_s
        latent = result.latent.mean(axis=(1, 2)) if values["latent.pooled"] else result.latent
        return {
            "model_id": model_id,
            "backend": backend,
            "shape": list(latent.shape),
            "data": np.ascontiguousarray(latent, np.float32).reshape(-1),
        }


def labels_fields(card: ModelCard, backend: str) -> dict[str, Any]:
    """Fields of PhaseLabels. Slow: the card is written as YAML."""
    return {
        "model_id": card.model_id,
        "labels": list(card.labels.names),
        "latent_shape": list(card.network.latent_shape),
        "backend": backend,
        "licence": card.licence,
        "intended_use": card.intended_use,
        "card": card.to_yaml(),
    }
