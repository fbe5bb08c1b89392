# SPDX-License-Identifier: Apache-2.0
"""One image message in, one phase result out: what the phase node and a replay both call, without ROS."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from surg_perception.stream.image_decode import MAX_PIXELS, Bgr, decode_to_model_input, resize_to_model_input
from surg_perception.stream.stage_clock import FrameTimes
from surg_perception.stream.temporal_filter import FilterSettings, TemporalFilter
from surg_perception.stream.temporal_head import TemporalHead

_INPUT_SIZE = 224
_NONE = np.empty(0, np.float32)

# Share of pixels close to the median colour from which a picture counts as blank, and what is close.
# On real video at 224x224: black frames 1.00, a tower's blue menu 0.94; in 3,570 Cholec80 and 1,082 CholecT50
# frames at most 0.78, save for two white-outs of the camera (0.96, 0.95), hence the stricter share for white.
_BLANK_SHARE = 0.9
_BLANK_SHARE_WHITE = 0.995
_BLANK_LEVELS = 8
_WHITE_LEVEL = 240


class PhaseState(IntEnum):
    """What a result is worth; values are those of SurgicalPhase.msg. Only OK is fit to act on."""

    OK = 0
    UNCERTAIN = 1
    STALE = 2
    NO_SIGNAL = 3
    OUT_OF_BODY = 4
    NO_MODEL = 5
    FAULT = 6


class ModelOutputError(RuntimeError):
    """The backend's answer breaks its contract: wrong shape, or values that are not finite."""


class PhaseBackend(Protocol):
    """What the pipeline asks of a backend."""

    def infer(self, frame_bgr_224: Bgr) -> tuple[NDArray[np.float32] | None, NDArray[np.float32]]:
        """(probabilities float32 [C], or None without a head; latent float32 [D, 4, 4]) of one frame."""


@dataclass(frozen=True)
class PhaseSettings:
    """Checked when made: ValueError names the setting, what was found and what is allowed.

    Attributes:
        filter: of the probabilities over time. With a temporal head its `time_constant_s` has no effect.
        uncertain_below: below this smoothed probability (0 to 1) the state is UNCERTAIN.
        max_age_s: an image older than this is STALE.
        max_pixels: a larger image is refused (ImageError "too_large").
    """

    filter: FilterSettings = field(default_factory=FilterSettings)
    uncertain_below: float = 0.5
    max_age_s: float = 0.5
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        if not 0.0 <= self.uncertain_below <= 1.0:
            raise ValueError(f"uncertain_below is {self.uncertain_below}; it must be from 0 to 1")
        if not self.max_age_s > 0.0:
            raise ValueError(f"max_age_s is {self.max_age_s}; it must be above 0")
        if self.max_pixels < 1:
            raise ValueError(f"max_pixels is {self.max_pixels}; it must be at least 1")


@dataclass(frozen=True)
class PhaseResult:
    """Result of one frame.

    Attributes:
        state: the first that applies of STALE, NO_SIGNAL, NO_MODEL, UNCERTAIN, OK.
        stamp_ns: the image's own stamp, unchanged.
        phase_id, phase: filtered class and its name; -1 and "" where there is none.
        raw_phase_id: class of this frame alone; -1 where there is none.
        confidence: smoothed probability of `phase_id`, 0 where there is none.
        probabilities: of this frame alone, float32 [C]; empty where there are none.
        smoothed: probabilities over time, float32 [C]; empty where there are none. From the temporal head where
            there is one, otherwise from the filter's exponential smoothing.
        latent: float32 [D, 4, 4]; None for a blank picture, which the model does not see.
        stages_ms: decode, inference, filter (with the temporal head).
        frame: what the model saw, or would have seen, uint8 [224, 224, 3] BGR.
        decided_by: what `smoothed` and `phase_id` rest on, "temporal_head" or "filter"; "" where there is none.
    """

    state: PhaseState
    stamp_ns: int
    phase_id: int
    phase: str
    raw_phase_id: int
    confidence: float
    probabilities: NDArray[np.float32]
    smoothed: NDArray[np.float32]
    latent: NDArray[np.float32] | None
    stages_ms: Mapping[str, float]
    frame: Bgr
    decided_by: str


def is_blank(frame_bgr: Bgr) -> bool:
    """Whether uint8 [224, 224, 3] is a blank screen: no light, or the tower's own "no camera" picture.

    True where 90 % of a 4-pixel grid lies within 8 levels of the median colour in every channel (a menu may
    cover the rest). For white it takes 99.5 %: an overexposed camera picture is no blank screen.
    """
    grid = frame_bgr[::4, ::4].reshape(-1, 3)
    median = np.median(grid, axis=0)
    share = float((np.abs(grid - median) <= _BLANK_LEVELS).all(axis=1).mean())
    return share >= (_BLANK_SHARE_WHITE if median.min() >= _WHITE_LEVEL else _BLANK_SHARE)


class PhasePipeline:
    """Decode, infer and filter, one frame after another, for one camera. Used by one thread at a time.

    `labels` are the names of the C classes; empty for a backend without a phase head, whose results have the
    state NO_MODEL and a latent. `settings` may be replaced at any time and acts from the next frame on.

    States: NO_SIGNAL is for a blank picture here (the tower sends blue or black when the camera is unplugged
    or dark), and for no pictures at all in the node, which is the one to notice that. A blank picture does
    not touch the temporal filter, nor the temporal head. OUT_OF_BODY is left to a model that knows it, FAULT to
    the node that catches what process() raises. `backend` may be replaced between frames.

    With a `temporal` head, its probabilities are the smoothed ones, and the filter's exponential smoothing is
    left out: the head has seen the history, so an average over the last second would only delay it. The
    filter's margin and hold stay: between two steps of the head every frame is judged anew, and near a change
    of phase its answers may flicker at the frame rate, which who acts on a phase must not see.

    Raises ValueError where the temporal head's classes are not as many as the labels.
    """

    def __init__(
        self,
        backend: PhaseBackend,
        labels: Sequence[str],
        settings: PhaseSettings | None = None,
        temporal: TemporalHead | None = None,
    ) -> None:
        self.labels = tuple(labels)
        if temporal is not None and temporal.config.classes != len(self.labels):
            raise ValueError(
                f"the temporal head has {temporal.config.classes} classes, but the model has {len(self.labels)} "
                "phases; use a temporal head that was trained for this model"
            )
        self.settings = settings or PhaseSettings()
        self.backend = backend
        self.temporal = temporal
        self._filter = TemporalFilter(len(self.labels), self.settings.filter) if self.labels else None

    def reset(self) -> None:
        """Forget the past, as for a new procedure."""
        if self._filter:
            self._filter.reset()
        if self.temporal:
            self.temporal.reset()

    def process(self, msg: Any, stamp_ns: int, age_s: float | None = None) -> PhaseResult:
        """Result for one Image or CompressedImage message (by duck typing).

        `stamp_ns` is the image's stamp in nanoseconds; `age_s` how old it is now, None where that means
        nothing (replay). Raises ImageError for an unusable image and ModelOutputError for a broken model;
        filter and temporal head are untouched by either, and the next good frame works.
        """
        times = FrameTimes()
        frame = decode_to_model_input(msg, _INPUT_SIZE, max_pixels=self.settings.max_pixels)
        return self._process(frame, stamp_ns, age_s, times)

    def process_frame(self, frame_bgr: Bgr, stamp_ns: int, age_s: float | None = None) -> PhaseResult:
        """As process(), for a decoded picture uint8 [H, W, 3] BGR."""
        times = FrameTimes()
        return self._process(resize_to_model_input(frame_bgr, _INPUT_SIZE), stamp_ns, age_s, times)

    def _process(self, frame: Bgr, stamp_ns: int, age_s: float | None, times: FrameTimes) -> PhaseResult:
        settings = self.settings
        # Stamped ahead of the clock: how old it truly is cannot be told, which is no better.
        stale = age_s is not None and abs(age_s) > settings.max_age_s
        blank = is_blank(frame)
        times.lap("decode")
        probabilities, latent = (_NONE, None) if blank else self._infer(frame)
        times.lap("inference")

        phase_id, raw_phase_id, phase, confidence, smoothed, decided_by = -1, -1, "", 0.0, _NONE, ""
        if self._filter and probabilities.size:
            stamp_s = stamp_ns * 1e-9
            if self.temporal is None:
                decided_by, self._filter.settings = "filter", settings.filter
                phase_id, confidence, smoothed = self._filter.update(probabilities, stamp_s)
            else:
                decided_by, self._filter.settings = "temporal_head", replace(settings.filter, time_constant_s=0.0)
                smoothed = self._judge(self.temporal, probabilities, latent, stamp_s)
                phase_id = self._filter.update(smoothed, stamp_s).phase_id
                confidence = float(smoothed[phase_id])
            raw_phase_id, phase = int(probabilities.argmax()), self.labels[phase_id]
        times.lap("filter")

        if stale:
            state = PhaseState.STALE
        elif blank:
            state = PhaseState.NO_SIGNAL
        elif phase_id < 0:
            state = PhaseState.NO_MODEL
        elif confidence < settings.uncertain_below:
            state = PhaseState.UNCERTAIN
        else:
            state = PhaseState.OK
        return PhaseResult(
            state=state,
            stamp_ns=stamp_ns,
            phase_id=phase_id,
            phase=phase,
            raw_phase_id=raw_phase_id,
            confidence=confidence,
            probabilities=probabilities,
            smoothed=smoothed,
            latent=latent,
            stages_ms=times.times_ms,
            frame=frame,
            decided_by=decided_by,
        )

    @staticmethod
    def _judge(
        temporal: TemporalHead, probabilities: NDArray[np.float32], latent: NDArray[np.float32] | None, stamp_s: float
    ) -> NDArray[np.float32]:
        try:
            return temporal.step(latent, probabilities, stamp_s)
        except ValueError as error:
            raise ModelOutputError(str(error)) from error

    def _infer(self, frame: Bgr) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        probabilities, latent = self.backend.infer(frame)
        if not np.isfinite(latent).all():
            raise ModelOutputError("the model's latent is not finite; check the weights and the precision")
        if self._filter is None:
            return _NONE, latent
        if probabilities is None or probabilities.shape != (len(self.labels),):
            found = None if probabilities is None else probabilities.shape
            raise ModelOutputError(f"probabilities from the model are {found}, expected ({len(self.labels)},)")
        if not np.isfinite(probabilities).all():
            raise ModelOutputError(f"the model's probabilities are not finite: {probabilities}")
        return probabilities, latent
