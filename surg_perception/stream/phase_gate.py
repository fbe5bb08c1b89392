# SPDX-License-Identifier: Apache-2.0
"""Whether a robot's controller may use the phase now: the decision of the example consumer, without ROS.

No clock is read here: every call is given the time, so that tests and replays decide as the node does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from enum import IntEnum

from surg_perception.stream.phase_pipeline import PhaseState


class TrustReason(IntEnum):
    """Why the phase is trusted or not; values are those of PhaseTrust.msg."""

    TRUSTED = 0
    NO_PHASE = 1
    LOST = 2
    AMBIGUOUS = 3
    SILENT = 4
    STATE = 5
    STAMP = 6
    OLD = 7
    CONFIDENCE = 8
    MODEL_CHANGED = 9
    NO_LATENT = 10
    SETTLING = 11
    NOT_ACTIVE = 12


_OPERATING_STATES = {
    TrustReason.TRUSTED: "ENABLED",
    TrustReason.STATE: "PAUSED",
    TrustReason.OLD: "PAUSED",
    TrustReason.CONFIDENCE: "PAUSED",
    TrustReason.SETTLING: "PAUSED",
    TrustReason.NOT_ACTIVE: "DISABLED",
}


@dataclass(frozen=True)
class GateSettings:
    """Checked when made: ValueError names the setting, what was found and what is allowed.

    Attributes:
        deadline_s: silence for longer than this, by the steady clock, ends trust.
        max_age_s: a stamp older than this ends trust.
        max_ahead_s: so far may a stamp be ahead of the clock (clocks of two machines).
        leave_below: confidence below this ends trust (0 to 1).
        return_above: confidence below this does not count towards new trust; at least `leave_below`.
        hold_s: for so long, by image stamps, the same phase must hold without a fault before it is trusted.
        hold_messages: and over so many messages.
        model_id: the only model to be trusted; empty: the first one that was.
        latent_required: trust only while latent features of the same model come too.
    """

    deadline_s: float = 1.0
    max_age_s: float = 0.5
    max_ahead_s: float = 0.05
    leave_below: float = 0.6
    return_above: float = 0.7
    hold_s: float = 1.0
    hold_messages: int = 5
    model_id: str = ""
    latent_required: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value, highest = getattr(self, field.name), 1.0 if field.name.endswith(("below", "above")) else math.inf
            if isinstance(value, (int, float)) and not 0.0 <= value <= highest:
                raise ValueError(f"{field.name} is {value}; it must be from 0 to {highest:g}")
        if self.leave_below > self.return_above:
            raise ValueError(f"leave_below is {self.leave_below}; it must not exceed return_above, {self.return_above}")


@dataclass(frozen=True)
class SeenPhase:
    """What the gate reads of one SurgicalPhase message. `model_id` is its name@sha256 prefix."""

    stamp_ns: int
    state: int
    phase_id: int
    phase: str
    confidence: float
    model_id: str


@dataclass(frozen=True)
class Trust:
    """The decision.

    Attributes:
        reason, text: why, for a program and for people.
        phase_id, phase: the trusted phase; -1 and "" while none is.
        age_s: of the newest phase by its stamp; NaN if there was none.
        held_s: for how long, by stamps, the phase has held without a fault.
    """

    reason: TrustReason
    text: str
    phase_id: int
    phase: str
    age_s: float
    held_s: float

    @property
    def trusted(self) -> bool:
        """Whether the phase may be used."""
        return self.reason == TrustReason.TRUSTED

    @property
    def operating_state(self) -> str:
        """ENABLED, PAUSED, FAULT or DISABLED, as CRTK calls it."""
        return _OPERATING_STATES.get(self.reason, "FAULT")


class PhaseGate:
    """Trusts a phase that has held for long enough; stops at once on any bad sign.

    Trust is given after `hold_messages` sound messages in a row that name the same phase and model and whose stamps
    span `hold_s`, and is taken away by the first message, event or passing of time that is not sound. The same run of
    sound messages is needed again after that, also for another phase. A run ends at a pause of more than `deadline_s`
    between stamps. The first model that is trusted is the only one from then on, until `settings.model_id` names
    another: a model must not change unnoticed. `settings` may be replaced at any time.

    `now_ns` is the clock of the stamps, `steady_s` a clock that never stands still or jumps.
    """

    def __init__(self, settings: GateSettings | None = None) -> None:
        self.settings = settings or GateSettings()
        self.publishers: int | None = None
        """How many publishers the middleware says are alive; None where it does not say."""
        self.pinned_model = ""
        """The model that was trusted last."""
        self._seen: SeenPhase | None = None
        self._heard_s = -math.inf
        self._jump = ""
        self._latent: tuple[int, str] | None = None
        self._run_start_ns = 0
        self._run_messages = 0
        self._trusted = False
        self._last_fault = ""

    def see_phase(self, seen: SeenPhase, now_ns: int, steady_s: float) -> Trust:
        """Take in a phase message; the decision with it."""
        before, self._seen, self._heard_s = self._seen, seen, steady_s
        if self.publishers == 0:  # a message is a sign of life, whatever the event before it said
            self.publishers = None
        gap_s = (seen.stamp_ns - before.stamp_ns) * 1e-9 if before else math.inf
        self._jump = f"the stamp is {-gap_s:.3f} s before the one before it" if gap_s <= 0 else ""
        goes_on = before is not None and gap_s <= self.settings.deadline_s
        if not goes_on or (seen.phase_id, seen.model_id) != (before.phase_id, before.model_id):  # type: ignore[union-attr]
            self._end_run()
        if self._fault(now_ns, steady_s) is None:
            if self._run_messages == 0:
                self._run_start_ns = seen.stamp_ns
            self._run_messages += 1
        return self.decide(now_ns, steady_s)

    def see_latent(self, stamp_ns: int, model_id: str) -> None:
        """Take in what a LatentFeatures message says of itself."""
        self._latent = (stamp_ns, model_id)

    def miss_deadline(self) -> None:
        """Take in the middleware's word that no message came within the deadline."""
        self._heard_s = -math.inf

    def decide(self, now_ns: int, steady_s: float) -> Trust:
        """The decision now; to be asked again and again, because time alone can end trust."""
        settings = self.settings
        fault = self._fault(now_ns, steady_s)
        if fault is not None:
            self._end_run()
            self._last_fault = f"; before: {fault[1]}"
            return self._trust(*fault, now_ns)
        seen = self._seen
        assert seen is not None
        held_s = self._held_s()
        if not self._trusted and (self._run_messages < settings.hold_messages or held_s < settings.hold_s):
            count = f"{self._run_messages} of {settings.hold_messages} messages"
            text = f"{seen.phase!r} has held for {held_s:.1f} of {settings.hold_s:g} s, {count}{self._last_fault}"
            return self._trust(TrustReason.SETTLING, text, now_ns)
        self._trusted, self._last_fault = True, ""
        self.pinned_model = seen.model_id
        return self._trust(TrustReason.TRUSTED, f"{seen.phase!r} has held for {held_s:.1f} s", now_ns)

    def _fault(self, now_ns: int, steady_s: float) -> tuple[TrustReason, str] | None:
        """The first reason not to trust the newest message now."""
        settings, seen = self.settings, self._seen
        if seen is None:
            return TrustReason.NO_PHASE, "no phase message yet"
        if self.publishers == 0:
            return TrustReason.LOST, "the phase's publisher is gone"
        if self.publishers is not None and self.publishers > 1:
            return TrustReason.AMBIGUOUS, f"{self.publishers} publishers on the phase topic, expected one"
        if steady_s - self._heard_s > settings.deadline_s:
            return TrustReason.SILENT, f"no phase message for {settings.deadline_s:g} s"
        if seen.state != PhaseState.OK or seen.phase_id < 0:
            known = {state.value: state.name for state in PhaseState}
            return TrustReason.STATE, f"state {known.get(seen.state, seen.state)}, phase_id {seen.phase_id}"
        age_s = (now_ns - seen.stamp_ns) * 1e-9
        if -age_s > settings.max_ahead_s:
            return TrustReason.STAMP, f"the stamp is {-age_s:.3f} s ahead of the clock (NTP, PTP, use_sim_time?)"
        if self._jump:
            return TrustReason.STAMP, self._jump
        if age_s > settings.max_age_s:
            return TrustReason.OLD, f"the stamp is older than {settings.max_age_s:g} s"
        least = settings.leave_below if self._trusted else settings.return_above
        if not seen.confidence >= least:  # NaN too
            return TrustReason.CONFIDENCE, f"confidence {seen.confidence:.2f}, expected at least {least:g}"
        model_id = settings.model_id or self.pinned_model
        if model_id and seen.model_id != model_id:
            return TrustReason.MODEL_CHANGED, f"model {seen.model_id} instead of {model_id}: somebody must accept it"
        if settings.latent_required:
            return self._latent_fault(seen, now_ns)
        return None

    def _latent_fault(self, seen: SeenPhase, now_ns: int) -> tuple[TrustReason, str] | None:
        settings, (stamp_ns, model_id) = self.settings, self._latent or (0, "")
        age_s = (now_ns - stamp_ns) * 1e-9
        # One far ahead, from before the clock went back, would be young for as long as that.
        if self._latent is None or not -settings.max_ahead_s <= age_s <= settings.max_age_s:
            return TrustReason.NO_LATENT, f"no latent features younger than {settings.max_age_s:g} s"
        if model_id != seen.model_id:
            return TrustReason.NO_LATENT, f"latent features of {model_id}, but the phase of {seen.model_id}"
        return None

    def _end_run(self) -> None:
        self._run_messages, self._trusted = 0, False

    def _held_s(self) -> float:
        seen = self._seen
        return (seen.stamp_ns - self._run_start_ns) * 1e-9 if seen is not None and self._run_messages else 0.0

    def _trust(self, reason: TrustReason, text: str, now_ns: int) -> Trust:
        seen = self._seen
        age_s = (now_ns - seen.stamp_ns) * 1e-9 if seen is not None else math.nan
        named = seen if seen is not None and reason == TrustReason.TRUSTED else None
        phase_id, phase = (named.phase_id, named.phase) if named else (-1, "")
        return Trust(reason, text, phase_id, phase, age_s, self._held_s())
