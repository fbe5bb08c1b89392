# SPDX-License-Identifier: Apache-2.0
"""Node `phase`: surgical phase and latent features of the newest endoscope image."""

from __future__ import annotations

import array
import math
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

from diagnostic_msgs.msg import DiagnosticStatus
from rclpy.callback_groups import ReentrantCallbackGroup
from rclpy.duration import Duration
from rclpy.qos import DurabilityPolicy, LivelinessPolicy, QoSProfile
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import Header
from surg_perception_msgs.msg import LatentFeatures, PhaseLabels, SurgicalPhase
from surg_perception_msgs.srv import SetProcedure

from surg_perception.models import ModelCard, ModelError, find_model
from surg_perception.nodes.engine_switch import BackOff, EngineSwitch
from surg_perception.nodes.forecast_stage import ForecastStage, ForecastTopics
from surg_perception.nodes.lifecycle import (
    ConfigureError,
    PerceptionNode,
    join,
    process_memory_mib,
    run,
    stamp_ns,
)
from surg_perception.nodes.model_switch import LoadedModel, ModelSwitch, Refusal
from surg_perception.nodes.parameter_table import PHASE
from surg_perception.phase_setup import model_server, open_phase_backend
from surg_perception.procedures import resolve_model
from surg_perception.runtime.backend import BACKENDS, Backend, BackendUnavailable, InferenceError, open_backend
from surg_perception.runtime.engine_build import EngineBuilder
from surg_perception.runtime.forecast import ForecastBackend, open_forecast
from surg_perception.stream.forecast import ForecastSettings
from surg_perception.stream.image_decode import ImageError
from surg_perception.stream.mailbox import Mailbox
from surg_perception.stream.phase_message import (
    Counts,
    LatentFields,
    blank_fields,
    labels_fields,
    phase_fields,
    phase_settings,
)
from surg_perception.stream.phase_pipeline import PhasePipeline, PhaseResult, PhaseState
from surg_perception.stream.stage_clock import StageClock
from surg_perception.stream.temporal_head import TemporalHead

try:
    from rclpy.event_handler import SubscriptionEventCallbacks, UnsupportedEventTypeError
except ImportError:  # Humble
    from rclpy.qos_event import SubscriptionEventCallbacks, UnsupportedEventTypeError

try:  # published beside our own message where it is installed
    from vision_msgs.msg import Classification, ObjectHypothesis
except ImportError:
    Classification = None

RUN_OF_SLOW_FRAMES = 5
"""So many slow frames in a row are an ERROR in diagnostics, fewer a WARN."""
FAULTS_BEFORE_FALLBACK = 3
"""After so many failed inferences in a row the backend is replaced, where allowed; after one if its GPU failed."""


@dataclass(frozen=True)
class Arrival:
    """An image message and when it came, by the steady clock."""

    message: Any
    received_s: float


class PhaseNode(PerceptionNode):
    """Subscribes to `image` or `image/compressed`; publishes `~/phase`, `~/latent`, `~/labels`, and the forecast.

    The executor's thread only takes messages into the newest-frame mailbox and watches for silence; one worker
    thread decodes, infers, filters and publishes. Forecasts have a thread of their own, and so has the loading of
    another model for the service `~/set_procedure`, of an engine that is built in the background, and of a model
    server that is away; the executor's thread then puts it in between two images.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(PHASE, **kwargs)
        self._card: ModelCard | None = None
        self._backend: Backend | None = None
        self._temporal: TemporalHead | None = None
        self._labels = PhaseLabels()
        self._forecast_backend: ForecastBackend | None = None
        self._forecast_topics: ForecastTopics | None = None
        self._forecast: ForecastStage | None = None
        self._model = threading.Lock()
        """Held while an image is worked on and while the model is replaced."""
        self._switch: ModelSwitch | None = None
        self._loader: threading.Thread | None = None
        self._engine: EngineSwitch | None = None
        """A better engine that is being built."""
        self._server: EngineSwitch | None = None
        """The model server while it is away."""
        self._back_off = BackOff(0.0)
        self._failed_backends: list[str] = []
        self._pipeline: PhasePipeline | None = None
        self._worker: threading.Thread | None = None
        self._subscription = None
        self._timers_: list[Any] = []
        self._outputs: dict[str, Any] = {}
        self._counts = Counts()
        self._mailbox: Mailbox[Arrival] = Mailbox()
        self._publishing = threading.Lock()
        self._last_header = Header()
        self._last_output_s = 0.0
        self._last_frame_s = 0.0
        self._last_arrival_s = self._last_rejection_s = -math.inf
        self._rejected_because = ""
        self._fault = ""
        self._reset_figures()
        self.updater.add("images", self._image_diagnostics)
        self.updater.add("model", self._model_diagnostics)
        # Its own group: the wait for the loading must not hold up the images, nor a second request.
        self.create_service(
            SetProcedure, "~/set_procedure", self._set_procedure, callback_group=ReentrantCallbackGroup()
        )

    # Transitions ----------------------------------------------------------------------------------------------

    def configure(self) -> None:
        v = self.values
        try:
            card = find_model(v["model.path"])
            if v["model.verify"]:
                card.verify()
            loaded = self._load(card, v["runtime.backend"], [], self._new_builder())
        except (ValueError, OSError, BackendUnavailable) as error:
            raise ConfigureError(str(error)) from error
        self._take_over(loaded)
        self._back_off = BackOff(v["runtime.server_retry_s"])
        self._start_engine()
        self._await_server()
        deadline = Duration(seconds=v["output.deadline_s"])
        controlled = QoSProfile(
            depth=1,
            deadline=deadline,
            liveliness=LivelinessPolicy.AUTOMATIC,
            liveliness_lease_duration=deadline,
        )
        latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        self._outputs = {
            "phase": self.create_lifecycle_publisher(SurgicalPhase, "~/phase", controlled),
            "latent": self.create_lifecycle_publisher(LatentFeatures, "~/latent", QoSProfile(depth=1)),
            "labels": self.create_lifecycle_publisher(PhaseLabels, "~/labels", latched),
        }
        if v["forecast.enabled"] != "never":
            self._forecast_topics = ForecastTopics.create(self)
        if Classification is not None:
            self._outputs["classification"] = self.create_lifecycle_publisher(
                Classification, "~/classification", QoSProfile(depth=1)
            )

    def _load(self, card: ModelCard, name: str, exclude: list[str], builder: EngineBuilder | None) -> LoadedModel:
        backend = self._open(card, name, exclude, builder)
        try:
            temporal = TemporalHead.open(card.temporal_path) if card.temporal is not None else None
            # Checks that head and model belong together.
            PhasePipeline(backend, card.labels.names, temporal=temporal)
            forecast = self._open_forecast(card, backend)
            return LoadedModel(card, backend, temporal, forecast, PhaseLabels(**labels_fields(card, backend.name)))
        except BaseException:
            backend.close()
            raise

    def _take_over(self, loaded: LoadedModel) -> None:
        self._card, self._backend = loaded.card, loaded.backend
        self._temporal, self._forecast_backend, self._labels = loaded.temporal, loaded.forecast, loaded.labels

    def _new_builder(self) -> EngineBuilder | None:
        """Builds the engine of a model that is loaded now, where loading is to wait for it."""
        return EngineBuilder(self.get_logger().info) if self.values["engine.build"] == "configure" else None

    def _open(self, card: ModelCard, name: str, exclude: list[str], builder: EngineBuilder | None = None) -> Backend:
        """A backend that has passed its check; its engine is built first where there is a builder."""
        v = self.values
        backend = open_phase_backend(v, card, name, exclude, builder, standby=v["runtime.allow_fallback"])
        for note in backend.notes:
            self.get_logger().info(note)
        self.get_logger().info(f"model {card.model_id} runs on {backend.name}")
        return backend

    def _start_engine(self) -> None:
        """Build the best engine that was missing, if there is one and it is wanted; the backend serves meanwhile."""
        self._stop_engine()
        v, card = self.values, self._card
        if v["engine.build"] != "background" or not self._backend.unbuilt:
            return
        name = self._backend.unbuilt[0]
        kind, device, precision = name.split(":")
        exclude = [*(other for other in BACKENDS if other != kind), *self._failed_backends]

        def load(builder: EngineBuilder) -> Backend:
            threads, standby = v["runtime.threads"] or None, v["runtime.allow_fallback"]
            return open_backend(card, kind, precision, True, device, threads, exclude, builder=builder, standby=standby)

        self._engine = EngineSwitch(name, load, self.get_logger().info)

    def _await_server(self) -> None:
        """Try the model server again and again if it is wanted and does not run; the backend serves meanwhile."""
        self._stop_waiting()
        v, card, server = self.values, self._card, model_server(self.values)
        if server is None or not v["runtime.server_retry_s"] or self._backend.kind == "triton":
            return
        if v["runtime.backend"] == "auto" and v["runtime.precision"] != "fp32":
            return  # the engine that has the precision was taken, not the server

        def load(builder: EngineBuilder) -> Backend:
            threads = v["runtime.threads"] or None
            return open_backend(card, "triton", allow_fallback=False, threads=threads, server=server, standby=True)

        name = f"the model server at {server.url}"
        self._server = EngineSwitch(name, load, self.get_logger().info, self._back_off.pauses_s())

    def _stop_engine(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.cancel()

    def _stop_waiting(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.cancel()

    def _open_forecast(self, card: ModelCard, backend: Backend) -> ForecastBackend | None:
        """The model's forecast, if it has one and it is wanted; a faulty one is an error only where it is demanded."""
        enabled = self.values["forecast.enabled"]
        if enabled == "never" or (enabled == "auto" and card.forecast is None):
            return None
        try:
            return open_forecast(card, backend.kind)
        except (ModelError, BackendUnavailable) as error:
            if enabled == "always":
                raise
            self.get_logger().error(f"no forecast: {error}")
            return None

    def activate(self) -> None:
        self._counts = Counts()
        self._failed_backends = []
        self._rejected_because = self._fault = ""
        self._reset_figures()
        self._last_header = Header()
        self._pipeline = self._new_pipeline()
        self._mailbox = Mailbox()
        self._last_frame_s = self._warned_s = time.monotonic()
        self._last_output_s = 0.0
        self._last_arrival_s = self._last_rejection_s = -math.inf
        self._publish_labels()
        self._start_forecast()
        self._worker = threading.Thread(target=self._work, name="phase", daemon=True)
        self._worker.start()
        self._subscribe()
        v = self.values
        watch_s = min(0.1, v["state.no_signal_after_s"] / 2, v["output.deadline_s"] / 4)
        self._timers_ = [
            self.create_timer(watch_s, self._watch),
            self.create_timer(1.0, self._warn_of_silence),
            self.create_timer(0.2, self._look_for_engine),
        ]

    def _new_pipeline(self) -> PhasePipeline:
        if self._temporal is not None:
            self._temporal.reset()
        return PhasePipeline(self._backend, self._card.labels.names, phase_settings(self.values), self._temporal)

    def _start_forecast(self) -> None:
        if self._forecast_backend is not None and self._forecast_topics is not None:
            self._forecast = ForecastStage(
                self, self._forecast_backend, self._forecast_topics, self._forecast_settings()
            )
            self._forecast.start()

    def _forecast_settings(self) -> ForecastSettings:
        return ForecastSettings(self.values["forecast.rate_hz"], self.values["filter.reset_gap_s"])

    def _subscribe(self) -> None:
        raw = self.values["input.transport"] == "raw"
        self._topic = "image" if raw else "image/compressed"
        qos = self.image_qos(self._topic, self.values["input.depth"])
        arguments = (Image if raw else CompressedImage, self._topic, self._take, qos)
        try:
            events = SubscriptionEventCallbacks(message_lost=self._count_lost)
            self._subscription = self.create_subscription(*arguments, event_callbacks=events)
        except UnsupportedEventTypeError:
            self._subscription = self.create_subscription(*arguments)
        self.get_logger().info(
            f"subscribed to {self.resolve_topic_name(self._topic)}, {qos.reliability.name.lower()}; "
            f"{self.describe_publishers(self._topic)}"
        )

    def deactivate(self) -> None:
        if self._switch is not None:
            self._switch.cancel()
        if self._subscription is not None:
            self.destroy_subscription(self._subscription)
            self._subscription = None
        for timer in self._timers_:
            self.destroy_timer(timer)
        self._timers_ = []
        if self._worker is not None:
            self._mailbox.close()
            join(self._worker)
            self._worker = None
        if self._forecast is not None:
            self._forecast.stop()
            self._forecast = None
        self._pipeline = None

    def cleanup(self) -> None:
        self._stop_engine()
        self._stop_waiting()
        join(self._loader, 60.0)
        topics = self._forecast_topics
        for publisher in (*self._outputs.values(), *((topics.image, topics.novelty) if topics else ())):
            self.destroy_lifecycle_publisher(publisher)
        self._outputs, self._forecast_topics = {}, None
        if self._forecast_backend is not None:
            self._forecast_backend.close()
            self._forecast_backend = None
        if self._backend is not None:
            self._backend.close()
            self._backend = None
        self._card = self._temporal = None

    def apply_live_parameters(self) -> None:
        if self._pipeline is not None:
            self._pipeline.settings = phase_settings(self.values)
        if self._forecast is not None:
            self._forecast.forecaster.settings = self._forecast_settings()

    # The executor's thread: messages and silence --------------------------------------------------------------

    def _take(self, message: Any) -> None:
        self._counts.received += 1
        self._last_arrival_s = time.monotonic()
        self._mailbox.put(Arrival(message, self._last_arrival_s))

    def _count_lost(self, event: Any) -> None:
        self._counts.lost += event.total_count_change

    def _watch(self) -> None:
        """Say so while nothing comes out, often enough that the offered deadline holds.

        NO_SIGNAL where no usable image comes in, FAULT where images come in and the model gives no answer.
        """
        if self._forecast is not None:
            self._forecast.look_for_subscribers()
        now_s, after_s = time.monotonic(), self.values["state.no_signal_after_s"]
        if now_s - self._last_frame_s < after_s:
            return
        stuck = now_s - self._last_arrival_s < after_s and now_s - self._last_rejection_s >= after_s
        state = PhaseState.FAULT if stuck else PhaseState.NO_SIGNAL
        with self._publishing:
            if now_s - self._last_output_s >= self.values["output.deadline_s"] / 2:
                self._send_phase(self._blank_message(state, self._last_header))

    def _warn_of_silence(self) -> None:
        now_s = time.monotonic()
        after_s = self.values["input.warn_after_s"]
        if now_s - max(self._last_frame_s, self._warned_s) < after_s:
            return
        self._warned_s = now_s
        why = f"; the last one was refused: {self._rejected_because}" if self._rejected_because else ""
        self.get_logger().warning(
            f"no usable image for {now_s - self._last_frame_s:.0f} s on {self.resolve_topic_name(self._topic)} "
            f"({self._subscription.msg_type.__name__}): {self.describe_publishers(self._topic)}{why}"
        )

    def _look_for_engine(self) -> None:
        """Let an engine that was built in the background, or a server that is back, run from the next image on."""
        for coming in (self._server, self._engine):
            if coming is None:
                continue
            if failure := coming.new_failure():
                self.get_logger().error(f"not yet {coming.name}, {self._backend.name} goes on: {failure}")
            backend = coming.take()
            if backend is None:
                continue
            for note in backend.notes:
                self.get_logger().info(note)
            with self._model:
                old = self._exchange(backend)
            self._stop_engine()  # taken; or not to take over from the server, which is the first choice
            if backend.kind == "triton":
                self._stop_waiting()
                self._back_off.succeeded()
                self._failed_backends = [name for name in self._failed_backends if name != backend.name]
            self.get_logger().info(f"{backend.name} from now on instead of {old.name}")
            return

    # The executor's thread: another model ---------------------------------------------------------------------

    async def _set_procedure(self, request: SetProcedure.Request, response: SetProcedure.Response) -> Any:
        """Load a model in the background and put it in between two images; the old one runs on until then."""
        refusal = None
        if self.state_label != "active":
            reason = f"the node is {self.state_label}: activate it first, or set model.path before configure"
            refusal = Refusal(SetProcedure.Response.NOT_ACTIVE, reason)
        elif self._switch is not None:
            refusal = Refusal(SetProcedure.Response.BUSY, "another model is being loaded: wait for that answer")
        if refusal is None:
            switch = self._switch = ModelSwitch(
                lambda builder: self._load_other(request.procedure, builder), self._new_builder()
            )
            self._loader = switch.thread
            await switch.done
            self._switch = None
            outcome = switch.take()
            if isinstance(outcome, Refusal):
                refusal = outcome
            else:
                response.message = self._replace_model(*outcome)
        if refusal is not None:
            response.error_code, response.message = refusal.error_code, refusal.reason
            self.get_logger().error(f"set_procedure {request.procedure!r} refused: {refusal.reason}")
        response.success = refusal is None
        response.model_id = self._card.model_id if self._card is not None else ""
        return response

    def _load_other(self, text: str, builder: EngineBuilder | None) -> tuple[LoadedModel, str]:
        """The model, and what model.path must be for it; in the thread of a ModelSwitch."""
        running = self._backend
        card = resolve_model(text)
        if self.values["model.verify"]:
            card.verify()
        if running.card.labels.names and not card.labels.names:
            raise ModelError(
                f"the model {card.name!r} has no phases, and {running.card.name!r}, which runs, has "
                f"{len(running.card.labels.names)}: who reads them would be left without; configure the node with it"
            )
        # Importing PyTorch for a try would hold up the running model for seconds.
        exclude = [] if running.kind == "torch" else ["torch"]
        path = _path_of(card, text)
        # An engine on its way for the old model is wanted for the new one too.
        engine = self._engine
        kind = engine.name.split(":")[0] if engine is not None and not engine.failure else running.kind
        return self._load(card, kind, [*self._failed_backends, *exclude], builder), path

    def _replace_model(self, loaded: LoadedModel, path: str) -> str:
        """Let another model run from the next image on; returns what to say about it. Nothing slow in here."""
        if self._forecast is not None:
            self._forecast.stop(wait=False)
            self._forecast = None
        with self._model:  # the worker may be replacing the backend
            old = LoadedModel(self._card, self._backend, self._temporal, self._forecast_backend, self._labels)
            self._take_over(loaded)
            self._pipeline = self._new_pipeline()
            self._consecutive_faults, self._fault = 0, ""
            self._publish_labels()
        threading.Thread(target=old.close, name="old model", daemon=True).start()
        self._start_forecast()
        self._start_engine()
        self._await_server()
        self.correct_parameter("model.path", path)
        done = f"{loaded.card.model_id} on {loaded.backend.name} runs instead of {old.card.model_id}"
        self.get_logger().info(done)
        return done

    # The worker's thread --------------------------------------------------------------------------------------

    def _work(self) -> None:
        while (arrival := self._mailbox.get()) is not None:
            started_s = time.monotonic()
            message = arrival.message
            with self._model:
                try:
                    result = self._pipeline.process(message, stamp_ns=stamp_ns(message), age_s=self._age_s(message))
                    self._publish(arrival, started_s, result)
                    if result.state == PhaseState.STALE:
                        self.get_logger().warning(f"STALE: {self._why_stale()}", throttle_duration_sec=10.0)
                    self._consecutive_faults, self._fault = 0, ""
                    if self._forecast is not None:
                        self._forecast.offer(result, message.header)
                except ImageError as error:
                    self._reject(error)
                except Exception as error:
                    # Of whatever kind: the worker must not end and leave a node that looks alive.
                    self._fail(error, message.header)

    def _age_s(self, message: Any) -> float:
        return (self.get_clock().now().nanoseconds - stamp_ns(message)) * 1e-9

    def _why_stale(self) -> str:
        if self.clock_missing:
            return "use_sim_time is true, and nothing has come on /clock: play the bag with --clock"
        latency_ms = self._latency_ms
        where = f"{latency_ms / 1e3:.1f} s old" if latency_ms > 0 else f"{-latency_ms / 1e3:.1f} s ahead"
        return (
            f"images are {where} by their stamps: clocks differ, or a recording is played without use_sim_time:=true "
            "and --clock"
        )

    def _reject(self, error: ImageError) -> None:
        self._counts.rejected += 1
        self._rejected_because = str(error)
        now_s = self._last_rejection_s = time.monotonic()
        if now_s >= self._next_report_s.get(error.kind, 0.0):
            self._next_report_s[error.kind] = now_s + 5.0
            self.get_logger().error(f"image refused: {error}")

    def _fail(self, error: Exception, header: Header) -> None:
        self._counts.faults += 1
        self._consecutive_faults += 1
        self._fault = f"{type(error).__name__}: {error}"
        self.get_logger().error(f"no phase for this image: {self._fault}", throttle_duration_sec=5.0)
        self._last_frame_s = time.monotonic()
        with self._publishing:
            self._last_header = header
            self._send_phase(self._blank_message(PhaseState.FAULT, header))
        if not self.values["runtime.allow_fallback"]:
            return
        device_failed = isinstance(error, InferenceError) and error.device_failed
        at_once = device_failed and self._backend.name not in self._failed_backends
        if at_once or self._consecutive_faults == FAULTS_BEFORE_FALLBACK:
            self._fall_back(device_failed)

    def _fall_back(self, device_failed: bool) -> None:
        """Replace a backend that fails by the one that stands by, else the next best one that needs no building."""
        failed = self._backend
        self._failed_backends.append(failed.name)
        if device_failed:
            self._failed_backends += [f"{kind}:{failed.device}" for kind in BACKENDS]
            self._stop_engine()
        try:
            other = failed.take_standby() or self._open(self._card, "auto", self._failed_backends)
        except (BackendUnavailable, ModelError) as error:
            self.get_logger().error(f"no other backend runs: {error}")
            return
        self.get_logger().warning(f"{failed.name} failed: {other.name} from now on")
        self._exchange(other)
        if failed.kind == "triton":
            self._await_server()

    def _exchange(self, backend: Backend) -> Backend:
        """Let a backend of the same model run from now on, with `_model` held; returns the one before, being closed."""
        old, self._backend = self._backend, backend
        self._pipeline.backend = backend
        self._labels.backend = backend.name
        self._publish_labels()
        # In a thread: giving memory back to a GPU that hangs can take for ever.
        threading.Thread(target=old.close, name="old backend", daemon=True).start()
        return old

    def _publish(self, arrival: Arrival, started_s: float, result: PhaseResult) -> None:
        ended_s = time.monotonic()
        header = arrival.message.header
        self._counts.processed += 1
        message = SurgicalPhase(header=header, **phase_fields(result, *self._origin()))
        message.wait_ms = (started_s - arrival.received_s) * 1e3
        message.decode_ms = result.stages_ms["decode"]
        message.inference_ms = result.stages_ms["inference"]
        message.filter_ms = result.stages_ms["filter"]
        with self._publishing:
            self._last_header = header
            message.latency_ms = self._age_s(arrival.message) * 1e3
            self._send_phase(message)
            self._last_frame_s = time.monotonic()
        self._publish_latent(header, result)
        if "classification" in self._outputs and len(result.probabilities):
            self._outputs["classification"].publish(
                Classification(
                    header=header,
                    results=[
                        ObjectHypothesis(class_id=name, score=float(p))
                        for name, p in zip(self._card.labels.names, result.probabilities, strict=True)
                    ],
                )
            )
        self._note_figures(arrival, message, (time.monotonic() - ended_s) * 1e3)

    def _publish_latent(self, header: Header, result: PhaseResult) -> None:
        fields = self._latents.of(result, self._card.model_id, self._backend.name, self.values)
        if fields is not None:
            data = array.array("f", fields.pop("data").tobytes())
            self._outputs["latent"].publish(LatentFeatures(header=header, data=data, **fields))

    # Messages -------------------------------------------------------------------------------------------------

    def _origin(self) -> tuple[str, str, Counts, int]:
        """What made a message, and the counts that it carries."""
        return self._card.model_id, self._backend.name, self._counts, self._mailbox.counts().replaced

    def _blank_message(self, state: PhaseState, header: Header) -> SurgicalPhase:
        return SurgicalPhase(header=header, **blank_fields(state, *self._origin()))

    def _send_phase(self, message: SurgicalPhase) -> None:
        self._last_output_s = time.monotonic()
        if self.context.ok():
            self._outputs["phase"].publish(message)

    def _publish_labels(self) -> None:
        self._outputs["labels"].publish(self._labels)

    # Diagnostics ----------------------------------------------------------------------------------------------

    def _reset_figures(self) -> None:
        self._stage_clock = StageClock()
        self._consecutive_faults = 0
        self._slow_in_a_row = 0
        self._latents = LatentFields()
        self._latency_ms = math.nan
        self._next_report_s: dict[str, float] = {}
        self._arrivals_s: deque[float] = deque(maxlen=100)

    def _note_figures(self, arrival: Arrival, message: SurgicalPhase, publish_ms: float) -> None:
        stages = {name: getattr(message, f"{name}_ms") for name in ("wait", "decode", "inference", "filter")}
        self._stage_clock.record({**stages, "publish": publish_ms})
        took_ms = (time.monotonic() - arrival.received_s) * 1e3
        slow = took_ms > self.values["diagnostics.slow_frame_ms"]
        self._slow_in_a_row = self._slow_in_a_row + 1 if slow else 0
        self._latency_ms = message.latency_ms
        self._arrivals_s.append(arrival.received_s)

    def _image_diagnostics(self, status: Any) -> Any:
        now_s = time.monotonic()
        silent_s = now_s - self._last_frame_s
        if self._worker is None:
            status.summary(DiagnosticStatus.OK, self.state_label)
        elif silent_s > self.values["state.no_signal_after_s"]:
            status.summary(DiagnosticStatus.STALE, f"no usable image for {silent_s:.1f} s")
        elif self._slow_in_a_row:
            run = self._slow_in_a_row
            level = DiagnosticStatus.ERROR if run >= RUN_OF_SLOW_FRAMES else DiagnosticStatus.WARN
            limit_ms = self.values["diagnostics.slow_frame_ms"]
            status.summary(level, f"{run} frames in a row took over {limit_ms:.0f} ms")
        elif abs(self._latency_ms) > self.values["state.max_age_s"] * 1e3:
            status.summary(DiagnosticStatus.WARN, self._why_stale())
        else:
            status.summary(DiagnosticStatus.OK, "images are processed")
        if self._rejected_because:
            status.mergeSummary(DiagnosticStatus.WARN, f"refused: {self._rejected_because}")
        recent = list(self._arrivals_s)
        rate_hz = (len(recent) - 1) / (recent[-1] - recent[0]) if len(recent) > 1 else 0.0
        status.add("rate_hz", f"{rate_hz if silent_s < 2 else 0.0:.1f}")
        status.add("stamp_to_phase_ms", f"{self._latency_ms:.1f}")
        for name in ("received", "processed", "rejected", "lost"):
            status.add(f"frames_{name}", str(getattr(self._counts, name)))
        status.add("frames_replaced", str(self._mailbox.counts().replaced))
        for stage, (p50, p99) in self._stage_clock.percentiles_ms((50, 99)).items():
            status.add(f"{stage}_ms_p50_p99", f"{p50:.2f} {p99:.2f}")
        return status

    def _model_diagnostics(self, status: Any) -> Any:
        if self._backend is None or self._card is None:
            status.summary(DiagnosticStatus.OK, "no model loaded")
            return status
        if self._fault:
            status.summary(DiagnosticStatus.ERROR, self._fault)
        else:
            status.summary(DiagnosticStatus.OK, f"{self._card.model_id} on {self._backend.name}")
        status.add("model", self._card.model_id)
        status.add("backend", self._backend.name)
        status.add("notes", "; ".join(self._backend.notes))
        standby = self._backend.standby  # read once: the worker may take it away
        if standby is not None:
            status.add("standby", standby.name)
        for key, coming in (("engine", self._engine), ("server", self._server)):
            if coming is not None:
                status.add(key, coming.progress)
                if coming.failure:
                    status.mergeSummary(DiagnosticStatus.WARN, f"not yet {coming.name}: {coming.failure}")
        status.add("temporal_head", "yes" if self._temporal is not None else "no")
        status.add("inference_faults", str(self._counts.faults))
        if self._forecast is not None:
            if self._forecast.fault:
                status.mergeSummary(DiagnosticStatus.WARN, f"no forecast: {self._forecast.fault}")
            for name, value in self._forecast.figures().items():
                status.add(name, value)
        status.add("memory_mib", f"{process_memory_mib():.0f}")
        return status


def _path_of(card: ModelCard, text: str) -> str:
    """What model.path must be for configure to find this model: what was asked for, else its name, else its folder."""
    for candidate in (text, card.name):
        try:
            if find_model(candidate).folder == card.folder:
                return candidate
        except ModelError:
            continue
    return str(card.folder)


def main() -> None:
    """Entry point of `ros2 run surg_perception phase_node`."""
    run(PhaseNode)
