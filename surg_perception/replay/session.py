# SPDX-License-Identifier: Apache-2.0
"""The images of a bag, one after another, through the code of the nodes `phase` and `vqa`; the results in files.

No clock counts: every image is worked on, in the order of the bag, and no result depends on how long that took. So two
replays on one machine with one backend write the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from surg_perception.data.bag_writer import BagWriter, Qos
from surg_perception.data.bags import BagImage, BagReader
from surg_perception.data.ros_types import typestore
from surg_perception.models import find_model
from surg_perception.phase_setup import open_phase_backend
from surg_perception.replay.questions import AnsweredQuestion, QuestionReplay
from surg_perception.runtime.engine_build import EngineBuilder
from surg_perception.stream.image_decode import ImageError
from surg_perception.stream.phase_message import (
    Counts,
    LatentFields,
    blank_fields,
    labels_fields,
    phase_fields,
    phase_settings,
)
from surg_perception.stream.phase_pipeline import PhasePipeline, PhaseState
from surg_perception.stream.temporal_head import TemporalHead

_PACKAGE = "surg_perception_msgs/msg"
REJECTED = "REJECTED"
"""State of an image that holds no usable picture; the node publishes nothing for it."""
MISSING = "MISSING"
"""State of an image that was sent to a running node and has no phase: lost, or replaced by a newer one."""


@dataclass(frozen=True)
class Frame:
    """What was said of one image.

    Attributes:
        number: of the image in the bag, from 0.
        stamp_ns, log_ns: of the image.
        state: a name of PhaseState, REJECTED, or in a live replay MISSING.
        phase, phase_id, raw_phase_id, confidence, probabilities: as in SurgicalPhase.msg.
        latent_rms: root mean square of the latent, float32 before any pooling; None where there is none.
        error: why there is no phase, for REJECTED and FAULT.
        error_kind: one word for it.
    """

    number: int
    stamp_ns: int
    log_ns: int
    state: str
    phase: str = ""
    phase_id: int = -1
    raw_phase_id: int = -1
    confidence: float = 0.0
    probabilities: tuple[float, ...] = ()
    latent_rms: float | None = None
    error: str = ""
    error_kind: str = ""


@dataclass(frozen=True)
class Problem:
    """Something that a user should know of a replay: a stable word, how often, and one line."""

    kind: str
    count: int
    text: str


@dataclass
class Replayed:
    """What a replay gave.

    Attributes:
        topic, msgtype: of the images.
        model_id, backend, labels: what made the phases, and their names.
        vqa_model_id: of the model that answered; empty without questions.
        notes: of the backend, such as what did not run.
        frames: one for each image.
        answers: in the order of their times.
        problems: in the bag or with its images.
        input_sha256: of the images' bytes, in their order.
        interrupted: it was stopped before the end of the bag.
        asks: questions can be asked; False in a live replay.
    """

    topic: str
    msgtype: str
    model_id: str
    backend: str
    labels: tuple[str, ...]
    vqa_model_id: str = ""
    notes: tuple[str, ...] = ()
    frames: list[Frame] = field(default_factory=list)
    answers: list[AnsweredQuestion] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    input_sha256: str = ""
    interrupted: bool = False
    asks: bool = True

    @property
    def times_s(self) -> list[float]:
        """Seconds of each frame since the first: by stamps, or by log times where stamps do not ascend."""
        stamps = [frame.stamp_ns for frame in self.frames]
        if any(b <= a for a, b in pairwise(stamps)):
            stamps = [frame.log_ns for frame in self.frames]
        return [(stamp - stamps[0]) * 1e-9 for stamp in stamps]

    @property
    def counts(self) -> dict[str, int]:
        """Images, and of these processed, rejected, and those on which the model failed."""
        states = [frame.state for frame in self.frames]
        rejected, faults, missing = (states.count(state) for state in (REJECTED, PhaseState.FAULT.name, MISSING))
        return {
            "images": len(states),
            "processed": len(states) - rejected - faults - missing,
            "rejected": rejected,
            "faults": faults,
        }


class PhaseReplay:
    """The node `phase` without its threads and clock: an image in, the fields of its messages out.

    A backend that fails is not replaced by another, as the node would do after some faults: results of two backends
    in one replay could not be compared with anything.

    Args:
        values: parameters of the node `phase`. An engine is built beforehand where engine.build is "configure".
        say: told what is done where that takes long.

    Raises:
        ModelError, BackendUnavailable: as the node's configure would fail.
    """

    def __init__(self, values: Mapping[str, Any], say: Callable[[str], None] = lambda text: None) -> None:
        self.values = values
        self.card = find_model(values["model.path"])
        if values["model.verify"]:
            self.card.verify()
        builder = EngineBuilder(say) if values["engine.build"] == "configure" else None
        self.backend = open_phase_backend(values, self.card, values["runtime.backend"], builder=builder)
        temporal = TemporalHead.open(self.card.temporal_path) if self.card.temporal is not None else None
        self._pipeline = PhasePipeline(self.backend, self.card.labels.names, phase_settings(values), temporal)
        self._latents = LatentFields()
        self._counts = Counts()
        self._origin = (self.card.model_id, self.backend.name, self._counts)

    def close(self) -> None:
        """Give the backend back."""
        self.backend.close()

    def take(self, image: BagImage) -> tuple[Frame, dict[str, Any] | None, dict[str, Any] | None]:
        """The frame, and the fields of SurgicalPhase and LatentFeatures; None where the node publishes none."""
        self._counts.received += 1
        place = (self._counts.received - 1, image.stamp_ns, image.log_ns)
        try:
            result = self._pipeline.process(image.message, stamp_ns=image.stamp_ns)
        except ImageError as error:
            self._counts.rejected += 1
            return Frame(*place, REJECTED, error=str(error), error_kind=error.kind), None, None
        except Exception as error:
            self._counts.faults += 1
            reason, kind = f"{type(error).__name__}: {error}", type(error).__name__
            frame = Frame(*place, PhaseState.FAULT.name, error=reason, error_kind=kind)
            return frame, blank_fields(PhaseState.FAULT, *self._origin), None
        self._counts.processed += 1
        latent = result.latent
        frame = Frame(
            *place,
            result.state.name,
            phase=result.phase,
            phase_id=result.phase_id,
            raw_phase_id=result.raw_phase_id,
            confidence=round(float(result.confidence), 6),
            probabilities=tuple(round(float(p), 6) for p in result.probabilities),
            latent_rms=None
            if latent is None
            else round(float(np.sqrt(np.mean(np.square(latent, dtype=np.float64)))), 6),
        )
        latents = self._latents.of(result, self.card.model_id, self.backend.name, self.values)
        return frame, phase_fields(result, *self._origin), latents


class ResultWriter:
    """The bag `bag` and `results.jsonl` in a folder; messages on the topics of the live nodes.

    Args:
        out: folder, there and without either.
        namespace: of the nodes.
    """

    def __init__(self, out: Path, namespace: str) -> None:
        root = "/".join(["", *(part for part in namespace.split("/") if part)])
        self._phase, self._vqa = f"{root}/phase", f"{root}/vqa"
        self._store = typestore()
        self._bag = BagWriter(out / "bag")
        self._lines = (out / "results.jsonl").open("x", encoding="utf-8")

    def __enter__(self) -> ResultWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._lines.close()
        self._bag.close()

    def labels(self, log_ns: int, fields: Mapping[str, Any]) -> None:
        """Write PhaseLabels, for players to send to late subscribers too."""
        topic, msgtype = f"{self._phase}/labels", f"{_PACKAGE}/PhaseLabels"
        self._bag.add_topic(topic, msgtype, [Qos(transient_local=True, depth=1)])
        self._write(topic, msgtype, log_ns, {**fields, "latent_shape": np.array(fields["latent_shape"], np.uint32)})

    def frame(
        self, frame: Frame, header: Any, phase: Mapping[str, Any] | None, latent: Mapping[str, Any] | None
    ) -> None:
        """Write what was said of an image; the header is the image's. Times that `phase` does not name are 0."""
        times = dict.fromkeys(("latency_ms", "wait_ms", "decode_ms", "inference_ms", "filter_ms"), 0.0)
        if phase is not None:
            fields = {**times, **phase, "header": header}
            self._write(f"{self._phase}/phase", f"{_PACKAGE}/SurgicalPhase", frame.log_ns, fields)
        if latent is not None:
            fields = {**latent, "header": header, "shape": np.array(latent["shape"], np.uint32)}
            self._write(f"{self._phase}/latent", f"{_PACKAGE}/LatentFeatures", frame.log_ns, fields)

    def answer(self, answer: AnsweredQuestion) -> None:
        """Write the answer to a question."""
        types = self._store.types
        time, codes = types["builtin_interfaces/msg/Time"], types[f"{_PACKAGE}/QuestionError"]
        fields = {
            "header": types["std_msgs/msg/Header"](stamp=time(*divmod(answer.log_ns, 10**9)), frame_id=""),
            "error_code": getattr(codes, answer.error),
            "first_stamp": time(*divmod(answer.first_stamp_ns, 10**9)),
            "last_stamp": time(*divmod(answer.last_stamp_ns, 10**9)),
            "first_token_ms": 0.0,
            "total_ms": 0.0,
        }
        same = ("question", "error_message", "answer", "task", "task_probability", "confidence", "frames_used")
        fields |= {name: getattr(answer, name) for name in (*same, "model_id", "backend")}
        self._write(f"{self._vqa}/answered", f"{_PACKAGE}/QuestionAnswer", answer.log_ns, fields)

    def line(self, kind: str, **content: Any) -> None:
        """Write a line of results.jsonl."""
        self._lines.write(json.dumps({"kind": kind, **content}, ensure_ascii=False) + "\n")

    def _write(self, topic: str, msgtype: str, log_ns: int, fields: Mapping[str, Any]) -> None:
        message = self._store.types[msgtype](**fields)
        self._bag.write(topic, msgtype, log_ns, bytes(self._store.serialize_cdr(message, msgtype)))


def replay(
    reader: BagReader,
    phases: PhaseReplay,
    out: Path,
    *,
    namespace: str = "surg_perception",
    questions: QuestionReplay | None = None,
    vqa_model_id: str = "",
    progress: Callable[[int], None] = lambda done: None,
    stop: Callable[[], bool] = lambda: False,
) -> Replayed:
    """Take every image of an open bag; write the bag and results.jsonl into out.

    Args:
        questions: takes the images too, where there are questions.
        vqa_model_id: of the model that answers them.
        progress: told the number of images taken so far.
        stop: asked before every image; True ends there, with readable results of what came before.

    Raises:
        BagError: the bag holds no image.
    """
    card = phases.card
    done = Replayed(reader.topic, reader.msgtype, card.model_id, phases.backend.name, tuple(card.labels.names))
    done.notes, done.vqa_model_id = tuple(phases.backend.notes), vqa_model_id
    digest = hashlib.sha256()
    with ResultWriter(out, namespace) as writer:
        writer.line(
            "replay",
            topic=done.topic,
            type=done.msgtype,
            model_id=done.model_id,
            backend=done.backend,
            vqa_model_id=done.vqa_model_id,
            labels=done.labels,
        )
        for image in reader.images():
            if stop():
                done.interrupted = True
                break
            digest.update(image.raw)
            if not done.frames:
                writer.labels(image.log_ns, labels_fields(card, done.backend))
            if questions is not None:
                _tell(writer, done, questions.take(image.message, image.stamp_ns, image.log_ns))
            frame, phase, latent = phases.take(image)
            done.frames.append(frame)
            writer.frame(frame, image.message.header, phase, latent)
            writer.line("frame", **frame_line(frame, done.frames[0].stamp_ns))
            progress(len(done.frames))
        if questions is not None and not done.interrupted:
            _tell(writer, done, questions.end())
        done.input_sha256 = digest.hexdigest()
        done.problems = [*(Problem(p.kind, p.count, p.text) for p in reader.problems), *_problems(done, phases.values)]
        for problem in done.problems:
            writer.line("problem", problem=problem.kind, count=problem.count, text=problem.text)
        writer.line("end", **done.counts, input_sha256=done.input_sha256, interrupted=done.interrupted)
    return done


def _tell(writer: ResultWriter, done: Replayed, answers: Sequence[AnsweredQuestion]) -> None:
    for answer in answers:
        done.answers.append(answer)
        writer.answer(answer)
        line = dict(vars(answer))
        rounded = {name: round(line[name], 6) for name in ("at_s", "task_probability", "confidence")}
        writer.line("answer", **{**line, **rounded})


def frame_line(frame: Frame, first_ns: int) -> dict[str, Any]:
    """What results.jsonl holds of a frame; first_ns is the stamp of the first one."""
    line = {"t_s": round((frame.stamp_ns - first_ns) * 1e-9, 6), **vars(frame)}
    return {name: value for name, value in line.items() if not name.startswith("error") or value}


def _problems(done: Replayed, values: Mapping[str, Any]) -> Iterator[Problem]:
    times_s = done.times_s
    for state, what in ((REJECTED, "refused, as the node refuses them"), (PhaseState.FAULT.name, "without a phase")):
        first: dict[str, Frame] = {}
        count: dict[str, int] = {}
        for frame in done.frames:
            if frame.state == state:
                first.setdefault(frame.error_kind, frame)
                count[frame.error_kind] = count.get(frame.error_kind, 0) + 1
        for kind, frame in first.items():
            where = f"the first one at {times_s[frame.number]:.2f} s"
            yield Problem(kind, count[kind], f"images {what}, {where}: {frame.error}")
    limit_s = values["state.no_signal_after_s"]
    logs_ns = [frame.log_ns for frame in done.frames]
    steps_s = [((b - a) * 1e-9, n) for n, (a, b) in enumerate(pairwise(logs_ns))]
    if gaps := [step for step in steps_s if step[0] > limit_s]:
        longest_s, number = max(gaps, key=lambda gap: (gap[0], -gap[1]))
        yield Problem(
            "silence",
            len(gaps),
            f"gaps between images longer than state.no_signal_after_s ({limit_s:g} s), the longest {longest_s:.2f} s "
            f"at {times_s[number]:.2f} s: the live node says NO_SIGNAL in them",
        )
