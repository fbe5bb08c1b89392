# SPDX-License-Identifier: Apache-2.0
"""Results of a replay through running nodes, in the files and the form of an offline one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from surg_perception.data.bags import BagReader
from surg_perception.replay.session import MISSING, REJECTED, Frame, Problem, Replayed, ResultWriter, frame_line
from surg_perception.stream.phase_pipeline import PhaseState

if TYPE_CHECKING:
    from surg_perception.nodes.live_replay import LiveResult, Played

_FIELDS = ("state", "phase_id", "phase", "confidence", "raw_phase_id", "model_id", "backend")
_COUNTS = tuple(f"frames_{name}" for name in ("received", "processed", "replaced", "rejected", "lost"))
_TIMES = tuple(f"{name}_ms" for name in ("latency", "wait", "decode", "inference", "filter"))
_LABELS = ("model_id", "labels", "latent_shape", "backend", "licence", "intended_use", "card")


def write_live(result: LiveResult, reader: BagReader, out: Path, namespace: str) -> Replayed:
    """Write the bag and results.jsonl of a live replay into out, and give it as an offline one would be.

    The bag holds the node's phases as they came, with their times; latents are left out.

    Args:
        reader: of the bag that was played.
        namespace: of the node.
    """
    first = next((one.phase for one in result.images if one.phase is not None), None)
    labels = result.labels
    done = Replayed(
        reader.topic,
        reader.msgtype,
        first.model_id if first is not None else "",
        first.backend if first is not None else "",
        tuple(labels.labels) if labels is not None else (),
        frames=[_frame(one) for one in result.images],
        problems=[*(Problem(p.kind, p.count, p.text) for p in reader.problems), *_problems(result)],
        input_sha256=result.input_sha256,
        interrupted=result.interrupted,
        asks=False,
    )
    with ResultWriter(out, namespace) as writer:
        writer.line(
            "replay",
            topic=done.topic,
            type=done.msgtype,
            model_id=done.model_id,
            backend=done.backend,
            vqa_model_id="",
            labels=done.labels,
            live={"image": result.topic, **live_figures(result)},
        )
        for frame, one in zip(done.frames, result.images, strict=True):
            if not frame.number and labels is not None:
                writer.labels(one.log_ns, {name: getattr(labels, name) for name in _LABELS})
            if one.phase is not None:
                fields = {name: getattr(one.phase, name) for name in (*_FIELDS, *_COUNTS, *_TIMES)}
                fields["probabilities"] = np.array(one.phase.probabilities, np.float32)
                writer.frame(frame, one.header, fields, None)
            latency = {"latency_ms": round(one.latency_ms, 3)} if one.phase is not None else {}
            writer.line("frame", **frame_line(frame, done.frames[0].stamp_ns), **latency, sent=one.sent)
        for problem in done.problems:
            writer.line("problem", problem=problem.kind, count=problem.count, text=problem.text)
        writer.line("end", **done.counts, input_sha256=done.input_sha256, interrupted=done.interrupted)
    return done


def live_figures(result: LiveResult) -> dict[str, Any]:
    """Counts of a live replay, and milliseconds from sending an image to its phase (None without any)."""
    return {
        "sent": len(result.images),
        "answered": len(result.answered),
        "lost": result.lost,
        "sent_again": result.resent,
        "replaced": result.replaced,
        "rejected": result.rejected,
        "late": result.late,
        "late_ms": round(result.late_ms, 3),
        "stale": result.states[PhaseState.STALE],
        "latency_p50_ms": round(result.latency_ms(50), 3) if result.answered else None,
        "latency_p99_ms": round(result.latency_ms(99), 3) if result.answered else None,
        "player_behind_ms": round(result.behind_s * 1e3, 3),
    }


def _frame(one: Played) -> Frame:
    place = (one.number, one.image_stamp_ns, one.log_ns)
    phase = one.phase
    if phase is None:
        refused = one.fate == "rejected"
        return Frame(*place, REJECTED if refused else MISSING, error="see the node's log" if refused else "")
    return Frame(
        *place,
        PhaseState(phase.state).name,
        phase=phase.phase,
        phase_id=phase.phase_id,
        raw_phase_id=phase.raw_phase_id,
        confidence=round(float(phase.confidence), 6),
        probabilities=tuple(round(float(p), 6) for p in phase.probabilities),
        latent_rms=None if one.latent_rms is None else round(one.latent_rms, 6),
    )


def _problems(result: LiveResult) -> list[Problem]:
    """What a user should know that the counts alone do not say."""
    problems = []
    stale = result.states[PhaseState.STALE]
    old = sum((one.log_ns - one.image_stamp_ns) * 1e-9 > result.max_age_s for one in result.images)
    if stale:
        why = "were that old when they were recorded" if old >= stale else "took that long, or /clock came late"
        text = f"images STALE: older than the node's state.max_age_s ({result.max_age_s:g} s); they {why}"
        problems.append(Problem("stale", stale, text))
    if result.lost:
        text = "images that did not reach the node: its subscription is best effort (input.reliability); large raw "
        problems.append(Problem("lost", result.lost, f"{text}images need the DDS profile (docs/large_images.md)"))
    if result.replaced:
        text = "images that a newer one replaced before the node had time for them: it cannot keep up at this rate"
        problems.append(Problem("replaced", result.replaced, text))
    if result.ended != "end of the bag" and not result.interrupted:
        problems.append(Problem("ended", 1, result.ended))
    return problems
