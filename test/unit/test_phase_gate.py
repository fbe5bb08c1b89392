# SPDX-License-Identifier: Apache-2.0
"""The gate trusts only what has been sound for long enough, and stops at the first bad sign."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surg_perception.stream.phase_gate import GateSettings, PhaseGate, SeenPhase, Trust, TrustReason
from surg_perception.stream.phase_pipeline import PhaseState

START_NS = 10**18
STEP_S = 0.05
SETTINGS = GateSettings(hold_s=0.5, hold_messages=5)


class Play:
    """A gate, the stream that it sees, and the two clocks."""

    def __init__(self, **changes: object) -> None:
        self.gate = PhaseGate(replace(SETTINGS, **changes))  # type: ignore[arg-type]
        self.now_ns, self.steady_s = START_NS, 100.0

    def wait(self, seconds: float) -> Trust:
        self.now_ns += round(seconds * 1e9)
        self.steady_s += seconds
        return self.gate.decide(self.now_ns, self.steady_s)

    def see(self, *, age_s: float = 0.01, **fields: object) -> Trust:
        sound = SeenPhase(self.now_ns - round(age_s * 1e9), PhaseState.OK, 3, "dissection", 0.9, "m@1")
        return self.gate.see_phase(replace(sound, **fields), self.now_ns, self.steady_s)  # type: ignore[arg-type]

    def stream(self, seconds: float, **fields: object) -> Trust:
        for _ in range(round(seconds / STEP_S)):
            self.wait(STEP_S)
            trust = self.see(**fields)  # type: ignore[arg-type]
        return trust

    def trusting(self) -> Play:
        assert self.stream(0.6).trusted
        return self


def test_nothing_is_trusted_before_anything_came() -> None:
    trust = Play().wait(1.0)
    assert (trust.reason, trust.phase_id, trust.operating_state) == (TrustReason.NO_PHASE, -1, "FAULT")
    assert math.isnan(trust.age_s)


def test_a_phase_is_trusted_once_it_has_held() -> None:
    play = Play()
    trust = play.stream(0.5)
    assert (trust.reason, trust.phase_id, trust.operating_state) == (TrustReason.SETTLING, -1, "PAUSED")
    trust = play.stream(STEP_S)
    assert (trust.trusted, trust.phase_id, trust.phase, trust.operating_state) == (True, 3, "dissection", "ENABLED")
    assert trust.held_s == pytest.approx(0.5)
    assert trust.age_s == pytest.approx(0.01)


def test_few_messages_are_not_enough_however_long_they_span() -> None:
    play = Play(hold_messages=20)
    assert play.stream(0.95).reason == TrustReason.SETTLING
    assert play.stream(STEP_S).trusted


BAD_MESSAGES = {
    "uncertain": ({"state": PhaseState.UNCERTAIN}, TrustReason.STATE),
    "stale": ({"state": PhaseState.STALE}, TrustReason.STATE),
    "no signal": ({"state": PhaseState.NO_SIGNAL, "phase_id": -1}, TrustReason.STATE),
    "a state of the future": ({"state": 200}, TrustReason.STATE),
    "no phase though OK": ({"phase_id": -1}, TrustReason.STATE),
    "stamp in the past": ({"age_s": 5.0}, TrustReason.STAMP),
    "stamp ahead of the clock": ({"age_s": -0.2}, TrustReason.STAMP),
    "confidence": ({"confidence": 0.59}, TrustReason.CONFIDENCE),
    "confidence NaN": ({"confidence": math.nan}, TrustReason.CONFIDENCE),
    "another model": ({"model_id": "m@2"}, TrustReason.MODEL_CHANGED),
    "another phase": ({"phase_id": 4, "phase": "clipping"}, TrustReason.SETTLING),
}


@pytest.mark.parametrize("case", BAD_MESSAGES)
def test_one_bad_message_ends_trust_and_the_whole_run_is_needed_again(case: str) -> None:
    fields, reason = BAD_MESSAGES[case]
    play = Play().trusting()
    play.wait(STEP_S)
    trust = play.see(**fields)  # type: ignore[arg-type]
    assert (trust.reason, trust.phase_id) == (reason, -1)
    assert not play.stream(0.45).trusted
    assert play.stream(0.15).trusted


def test_a_repeated_stamp_ends_trust() -> None:
    play = Play().trusting()
    assert play.see().reason == TrustReason.STAMP


def test_age_grows_while_nothing_comes() -> None:
    play = Play().trusting()
    assert play.wait(0.45).trusted
    assert play.wait(0.1).reason == TrustReason.OLD


def test_silence_is_seen_though_the_clock_of_the_stamps_stands_still() -> None:
    play = Play().trusting()
    assert play.gate.decide(play.now_ns, play.steady_s + 0.9).trusted
    assert play.gate.decide(play.now_ns, play.steady_s + 1.1).reason == TrustReason.SILENT


def test_the_middleware_s_events_end_trust_before_the_own_watchdog() -> None:
    play = Play(max_age_s=60.0).trusting()
    play.gate.miss_deadline()
    assert play.wait(0.0).reason == TrustReason.SILENT
    play.gate.publishers = 0
    assert play.wait(0.0).reason == TrustReason.LOST
    assert play.stream(0.6).trusted, "a message is a sign of life"
    play.gate.publishers = 2
    assert play.wait(0.0).reason == TrustReason.AMBIGUOUS
    play.gate.publishers = 1
    assert play.stream(0.6).trusted


def test_a_pause_between_stamps_starts_the_run_anew() -> None:
    play = Play(deadline_s=0.2, max_age_s=60.0).trusting()
    play.now_ns += 10**9  # the steady clock saw no silence: the messages were held back and came at once
    assert play.see().reason == TrustReason.SETTLING


def test_confidence_has_hysteresis() -> None:
    play = Play().trusting()
    assert play.stream(1.0, confidence=0.65).trusted
    assert play.stream(STEP_S, confidence=0.55).reason == TrustReason.CONFIDENCE
    assert play.stream(1.0, confidence=0.65).reason == TrustReason.CONFIDENCE
    assert play.stream(0.6, confidence=0.75).trusted


def test_another_model_waits_until_somebody_accepts_it() -> None:
    play = Play().trusting()
    trust = play.stream(5.0, model_id="m@2")
    assert (trust.reason, trust.operating_state) == (TrustReason.MODEL_CHANGED, "FAULT")
    assert "m@2 instead of m@1" in trust.text
    play.gate.settings = replace(play.gate.settings, model_id="m@2")
    assert play.stream(0.6, model_id="m@2").trusted


def test_an_expected_model_is_expected_from_the_start() -> None:
    assert Play(model_id="m@1").stream(0.6).trusted
    assert Play(model_id="m@9").stream(0.6).reason == TrustReason.MODEL_CHANGED


def test_latents_are_no_substitute_for_a_phase_and_can_be_required() -> None:
    play = Play(latent_required=True)
    play.gate.see_latent(play.now_ns, "m@1")
    assert play.wait(0.0).reason == TrustReason.NO_PHASE
    play.stream(0.6)
    assert play.see(age_s=0.0).reason == TrustReason.NO_LATENT
    for model_id, expected in (("m@1", TrustReason.TRUSTED), ("m@2", TrustReason.NO_LATENT)):
        for _ in range(20):
            play.gate.see_latent(play.now_ns, model_id)
            trust = play.stream(STEP_S)
        assert trust.reason == expected


def test_a_latent_of_before_the_clock_went_back_is_none() -> None:
    play = Play(latent_required=True)
    play.gate.see_latent(play.now_ns + 60 * 10**9, "m@1")
    assert play.stream(0.6).reason == TrustReason.NO_LATENT


@pytest.mark.parametrize(
    ("changes", "names"),
    [({"leave_below": 0.8}, "return_above"), ({"hold_s": -1.0}, "hold_s"), ({"max_age_s": math.nan}, "max_age_s")],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, float], names: str) -> None:
    with pytest.raises(ValueError, match=names):
        GateSettings(**changes)  # type: ignore[arg-type]


# Any stream at all -------------------------------------------------------------------------------------------------

SOUND = {"age_s": 0.01, "state": PhaseState.OK, "phase_id": 3, "confidence": 0.9, "model_id": "m@1"}
doubtful = {
    "age_s": st.sampled_from([0.01] * 5 + [0.0, 0.2, 0.6, -0.04, -0.2]),
    "state": st.sampled_from([PhaseState.OK] * 20 + list(PhaseState)),
    "phase_id": st.sampled_from([3] * 10 + [4, -1]),
    "confidence": st.sampled_from([0.9] * 5 + [0.72, 0.65, 0.5, math.nan]),
    "model_id": st.sampled_from(["m@1"] * 10 + ["m@2"]),
}
single = st.tuples(st.just("message"), st.sampled_from([0.05, 0.05, 0.0, 0.3, 2.0]), st.fixed_dictionaries(doubtful))
bursts = st.tuples(
    st.integers(1, 25), st.sampled_from([{}, {}, {"phase_id": 4}, {"model_id": "m@2"}, {"confidence": 0.65}])
).map(lambda burst: [("message", STEP_S, {**SOUND, **burst[1]})] * burst[0])
others = st.tuples(
    st.sampled_from(["tick", "deadline", "lost", "two", "one"]), st.sampled_from([0.0, 0.05, 0.3]), st.just({})
)
streams = st.lists(st.one_of(bursts, bursts, st.lists(st.one_of(single, others), max_size=3)), max_size=12).map(
    lambda parts: [event for part in parts for event in part]
)


@given(streams)
@settings(max_examples=300, deadline=None)
def test_trust_is_always_borne_out_by_what_was_seen(events: list) -> None:
    play, rule = Play(), SETTINGS
    history: list[tuple[int, float, SeenPhase]] = []
    alive: int | None = None
    told_silent, pinned, was_trusted = False, "", False
    for kind, after_s, fields in events:
        trust = play.wait(after_s)
        if kind == "message":
            sound = SeenPhase(
                play.now_ns - round(fields["age_s"] * 1e9),
                fields["state"],
                fields["phase_id"],
                "p",
                fields["confidence"],
                fields["model_id"],
            )
            trust = play.gate.see_phase(sound, play.now_ns, play.steady_s)
            history.append((play.now_ns, play.steady_s, sound))
            told_silent, alive = False, None if alive == 0 else alive
        elif kind == "deadline":
            told_silent = True
            play.gate.miss_deadline()
        elif kind != "tick":
            alive = play.gate.publishers = {"lost": 0, "two": 2, "one": 1}[kind]
        trust = play.wait(0.0)

        assert trust.trusted == (trust.reason == TrustReason.TRUSTED)
        assert (trust.phase_id >= 0) == trust.trusted == (trust.operating_state == "ENABLED") == bool(trust.phase)
        if not trust.trusted:
            was_trusted = False
            continue
        _, heard_s, newest = history[-1]
        assert not told_silent
        assert alive in (None, 1)
        assert play.steady_s - heard_s <= rule.deadline_s
        assert -rule.max_ahead_s <= (play.now_ns - newest.stamp_ns) * 1e-9 <= rule.max_age_s
        assert newest.confidence >= rule.leave_below
        assert trust.phase_id == newest.phase_id
        pinned = pinned or newest.model_id
        assert newest.model_id == pinned
        # The messages that trust rests on: all sound, one phase, one model, stamps that go on.
        run = history[-rule.hold_messages :]
        assert len(run) == rule.hold_messages
        assert {(seen.state, seen.phase_id, seen.model_id) for *_, seen in run} == {
            (PhaseState.OK, newest.phase_id, pinned)
        }
        stamps = [seen.stamp_ns for *_, seen in run]
        assert all(0 < b - a <= rule.deadline_s * 1e9 for a, b in pairwise(stamps))
        if not was_trusted:
            since = [
                k for k, (*_, s) in enumerate(history) if newest.stamp_ns - s.stamp_ns == round(trust.held_s * 1e9)
            ]
            assert trust.held_s >= rule.hold_s
            assert {(s.state, s.phase_id, s.model_id) for *_, s in history[since[-1] :]} == {
                (PhaseState.OK, newest.phase_id, pinned)
            }
            assert all(seen.confidence >= rule.return_above for *_, seen in run)
        was_trusted = True


@given(streams)
@settings(max_examples=100, deadline=None)
def test_whatever_came_before_a_sound_stream_is_trusted_in_the_end(events: list) -> None:
    play = Play(model_id="m@1")
    for kind, after_s, fields in events:
        play.wait(after_s)
        if kind == "message":
            play.see(phase="p", **fields)
        elif kind == "deadline":
            play.gate.miss_deadline()
    play.wait(0.3)  # past a stamp that was ahead of the clock
    assert play.stream(1.0).trusted
    assert all(play.stream(STEP_S).trusted for _ in range(20))
