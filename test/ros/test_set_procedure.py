# SPDX-License-Identifier: Apache-2.0
"""Service set_procedure: another model between two images, refusals that keep the old one, safe in every state."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

pytest.importorskip("rclpy", reason="ROS 2 is not in the environment: `source setup.bash` first")

from conftest import Graph, wait_until
from folders import SHIPPED, copied, forecast_folder
from images import raw_image, stamped
from onnx import numpy_helper
from rclpy.qos import DurabilityPolicy, QoSProfile
from sensor_msgs.msg import Image
from surg_perception_msgs.msg import PhaseLabels, SurgicalPhase
from surg_perception_msgs.srv import SetProcedure

from surg_perception.data.phantom import Phantom
from surg_perception.models import LabelFacts, ModelCard, ModelFile, read_card
from surg_perception.nodes.phase_node import PhaseNode
from surg_perception.runtime.backend import InferenceError

RATE_HZ = 12.5
LATCHED = QoSProfile(depth=5, durability=DurabilityPolicy.TRANSIENT_LOCAL)
Answer = SetProcedure.Response


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    """One endoscope image, uint8 [120, 160, 3]."""
    return Phantom(width=160, height=120, seed=5, duration_s=60.0, rate_hz=1.0).frame(30)[0]


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which models are found by name; "old" is there."""
    monkeypatch.setenv("SURG_PERCEPTION_MODELS", str(tmp_path))
    copied(tmp_path / "old")
    return tmp_path


def other(models: Path, name: str, **changes: object) -> ModelCard:
    """A sound model with another id."""
    card = copied(models / name, **changes)
    graph = onnx.load(card.graph_path)
    onnx.helper.set_model_props(graph, {"note": name})
    return with_graph(card, graph)


def with_graph(card: ModelCard, graph: onnx.ModelProto) -> ModelCard:
    onnx.save(graph, card.graph_path)
    card = replace(card, graph=ModelFile.of(card.graph_path))
    card.write()
    return card


class Theatre:
    """A phase node that runs "old", a camera that does not stop, and a client of the service."""

    def __init__(self, graph: Graph, picture: np.ndarray, **parameters: Any) -> None:
        self.graph = graph
        defaults = {"model__path": "old", "state__max_age_s": 3600.0, "input__reliability": "reliable"}
        defaults |= {"state__no_signal_after_s": 50.0, "output__deadline_s": 100.0}
        self.node = graph.start(PhaseNode, **{**defaults, **parameters})
        self.phases: list[SurgicalPhase] = graph.collect(SurgicalPhase, "phase/phase", 1000)
        self.labels: list[PhaseLabels] = graph.collect(PhaseLabels, "phase/labels", LATCHED)
        self._image = raw_image(picture)
        self._publisher = graph.client.create_publisher(Image, "image", 10)
        self._service = graph.client.create_client(SetProcedure, "phase/set_procedure")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._film, daemon=True)
        self.sent = 0

    def __enter__(self) -> Theatre:
        assert self.graph.transition(self.node, "configure", "activate")
        wait_until(lambda: self._publisher.get_subscription_count() == 1, 10, "the node's image subscription")
        self._thread.start()
        wait_until(lambda: self.node._counts.processed > 3, 10, "phases")
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(5.0)

    def _film(self) -> None:
        """Images stamped 1 / RATE_HZ apart, published at most so fast: stamps do not tell how busy the machine is."""
        start_ns = self.graph.client.get_clock().now().nanoseconds
        while not self._stop.wait(1.0 / RATE_HZ):
            self._publisher.publish(stamped(self._image, start_ns + round(self.sent * 1e9 / RATE_HZ)))
            self.sent += 1

    def ask(self, procedure: str) -> Any:
        assert self._service.wait_for_service(timeout_sec=10.0)
        return self._service.call_async(SetProcedure.Request(procedure=procedure))

    def set(self, procedure: str) -> Any:
        future = self.ask(procedure)
        wait_until(future.done, 60.0, f"the answer to set_procedure {procedure}")
        return future.result()

    def stamps_s(self, since: int = 0) -> np.ndarray:
        stamps = [p.header.stamp for p in self.phases[since:] if p.state != SurgicalPhase.NO_SIGNAL]
        return np.array([stamp.sec + stamp.nanosec * 1e-9 for stamp in stamps])


def test_a_procedure_is_switched_to_with_no_gap_over_a_second(graph: Graph, picture: np.ndarray, models: Path) -> None:
    names = tuple(f"step {k}" for k in range(7))
    new = other(models, "new", procedure="Colectomy", labels=LabelFacts("colectomy", names))
    with Theatre(graph, picture) as theatre:
        old_card, old_backend = theatre.node._card, theatre.node._backend
        before = len(theatre.phases)
        answer = theatre.set("Colectomy")
        assert (answer.success, answer.error_code, answer.model_id) == (True, Answer.OK, new.model_id), answer.message
        wait_until(lambda: [p.model_id for p in theatre.phases[-3:]] == [new.model_id] * 3, 10, "the new model")
        assert theatre.node.get_parameter("model.path").value == "new"
        wait_until(lambda: theatre.labels[-1].model_id == new.model_id, 5, "the new labels")
        assert tuple(theatre.labels[-1].labels) == names

        ids = [p.model_id for p in theatre.phases[before:] if p.state != SurgicalPhase.NO_SIGNAL]
        assert ids == sorted(ids, key=lambda i: i != old_card.model_id), "first the old one, then the new one"
        assert ids.count(old_card.model_id) > 0, "the old one goes on while the new one is loaded"
        stamps_s = theatre.stamps_s(before)
        assert (np.diff(stamps_s) > 0).all()
        assert np.diff(stamps_s).max() <= 1.0
        assert all(p.phase in ("", *names) for p in theatre.phases if p.model_id == new.model_id)
        last = theatre.phases[-1]
        assert last.frames_received - last.frames_processed <= RATE_HZ, "at most a second of images is lost"
        wait_until(lambda: old_backend._closed, 10, "the old model to be given back")
        with pytest.raises(InferenceError, match="closed"):
            old_backend.infer(np.zeros((224, 224, 3), np.uint8))

        assert theatre.set("old").success, "and back, by name"
        assert theatre.node._card.model_id == old_card.model_id
        assert graph.transition(theatre.node, "deactivate", "cleanup", "configure", "activate")
        assert theatre.node._card.name == "old", "the parameter says what runs"


def no_such(models: Path) -> str:
    return "no_such_model"


def no_model_of_it(models: Path) -> str:
    return "hernia repair"


def two_of_it(models: Path) -> str:
    other(models, "a", procedure="Hepatectomy")
    other(models, "b", procedure="Hepatectomy")
    return "Hepatectomy"


def wrong_hash(models: Path) -> str:
    path = copied(models / "bad").graph_path
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    return "bad"


def missing_graph(models: Path) -> str:
    copied(models / "bad").graph_path.unlink()
    return "bad"


def half_a_graph(models: Path) -> str:
    card = copied(models / "bad")
    card.graph_path.write_bytes(card.graph_path.read_bytes()[:100_000])
    replace(card, graph=ModelFile.of(card.graph_path)).write()
    return str(models / "bad")


def nan_weights(models: Path) -> str:
    card = copied(models / "bad")
    graph = onnx.load(card.graph_path)
    tensor = next(t for t in graph.graph.initializer if t.data_type == onnx.TensorProto.FLOAT16)
    values = numpy_helper.to_array(tensor).copy()
    values[:] = np.nan
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    with_graph(card, graph)
    return "bad"


def without_phases(models: Path) -> str:
    card = copied(models / "bad", labels=LabelFacts("", ()))
    graph = onnx.load(card.graph_path)
    del graph.graph.output[0]
    assert [output.name for output in graph.graph.output] == ["latent"]
    with_graph(card, graph)
    return "bad"


BAD: dict[Callable[[Path], str], tuple[int, str]] = {
    no_such: (Answer.UNKNOWN_PROCEDURE, "no_such_model"),
    no_model_of_it: (Answer.UNKNOWN_PROCEDURE, "Hernia Repair"),
    two_of_it: (Answer.BAD_MODEL, "several models"),
    wrong_hash: (Answer.BAD_MODEL, "sha256"),
    missing_graph: (Answer.BAD_MODEL, "no such file"),
    half_a_graph: (Answer.BAD_MODEL, "no ONNX graph"),
    nan_weights: (Answer.BAD_MODEL, "latent is the same"),
    without_phases: (Answer.BAD_MODEL, "has no phases"),
}


def test_bad_models_are_refused_with_the_reason_and_cost_no_image(
    graph: Graph, picture: np.ndarray, models: Path
) -> None:
    with Theatre(graph, picture) as theatre:
        running = theatre.node._card.model_id
        for make, (code, word) in BAD.items():
            answer = theatre.set(make(models))
            assert (answer.success, answer.error_code) == (False, code), (make.__name__, answer.message)
            assert word in answer.message, make.__name__
            assert answer.model_id == running
            assert theatre.node.get_parameter("model.path").value == "old"
            for name in ("bad", "a", "b"):
                shutil.rmtree(models / name, ignore_errors=True)
        seen = theatre.node._counts.processed
        wait_until(lambda: theatre.node._counts.processed > seen + 3, 5, "phases of the old model")
        last = theatre.phases[-1]
        assert {p.model_id for p in theatre.phases} == {running}
        assert last.frames_replaced + last.frames_rejected + last.frames_lost == 0, "no image was lost"
        assert np.diff(theatre.stamps_s()).max() <= 1.0


def slowed(theatre: Theatre) -> threading.Event:
    """Loading waits for the event that is returned."""
    gate, load = threading.Event(), theatre.node._load_other
    theatre.node._load_other = lambda *request: (gate.wait(30.0), load(*request))[1]
    return gate


def test_a_second_request_is_busy_and_the_first_one_goes_through(
    graph: Graph, picture: np.ndarray, models: Path
) -> None:
    new = other(models, "new")
    with Theatre(graph, picture) as theatre:
        gate = slowed(theatre)
        first = theatre.ask("new")
        wait_until(lambda: theatre.node._switch is not None, 5, "the first request")
        second = theatre.set("new")
        assert (second.success, second.error_code) == (False, Answer.BUSY)
        seen = theatre.node._counts.processed
        wait_until(lambda: theatre.node._counts.processed > seen + 3, 5, "phases while it is being loaded")
        gate.set()
        wait_until(first.done, 30, "the first answer")
        assert first.result().success
        assert theatre.node._card.model_id == new.model_id


def test_deactivation_and_cleanup_while_loading(graph: Graph, picture: np.ndarray, models: Path) -> None:
    other(models, "new")
    with Theatre(graph, picture) as theatre:
        opened: list[Any] = []
        load = theatre.node._load

        def noted(*arguments: Any) -> Any:
            opened.append(load(*arguments))
            return opened[-1]

        theatre.node._load = noted
        gate = slowed(theatre)
        future = theatre.ask("new")
        wait_until(lambda: theatre.node._switch is not None, 5, "the request")
        assert graph.transition(theatre.node, "deactivate")
        wait_until(future.done, 5, "an answer at once")
        assert (future.result().success, future.result().error_code) == (False, Answer.NOT_ACTIVE)
        gate.set()
        assert graph.transition(theatre.node, "cleanup")
        wait_until(lambda: opened and opened[0].backend._closed, 30, "what was loaded to be given back")
        answer = theatre.set("new")
        assert (answer.success, answer.error_code, answer.model_id) == (False, Answer.NOT_ACTIVE, "")
        del theatre.node._load
        assert graph.transition(theatre.node, "configure", "activate")
        assert theatre.node._card.name == "old"
        seen = theatre.node._counts.processed
        wait_until(lambda: theatre.node._counts.processed > seen + 2, 10, "phases again")


def test_a_backend_that_the_worker_has_just_replaced_is_the_one_that_is_closed() -> None:
    """The worker, which holds the model, falls back to another backend while the new model waits for it."""
    closed: list[str] = []
    first, fallen_back, new = (SimpleNamespace(name=n, close=lambda n=n: closed.append(n)) for n in "abc")
    card = SimpleNamespace(model_id="m@1")
    node = SimpleNamespace(_card=card, _backend=first, _temporal=None, _forecast_backend=None, _labels=None)
    node._forecast = None

    class Held:
        def __enter__(self) -> None:
            node._backend = fallen_back

        def __exit__(self, *error: object) -> None:
            pass

    node._model = Held()
    node._take_over = lambda loaded: setattr(node, "_backend", loaded.backend)
    for name in ("_new_pipeline", "_publish_labels", "_start_forecast", "_start_engine", "_await_server"):
        setattr(node, name, lambda: None)
    node.correct_parameter, node.get_logger = lambda *_: None, lambda: SimpleNamespace(info=lambda text: None)
    PhaseNode._replace_model(node, SimpleNamespace(card=card, backend=new), "m")
    wait_until(lambda: closed, 30, "the old backend's end")
    assert (closed, node._backend) == (["b"], new)


def test_the_forecast_follows_the_model(graph: Graph, picture: np.ndarray, models: Path) -> None:
    forecast_folder(models / "seer", gap_s=0.4)
    with Theatre(graph, picture, forecast__enabled="auto") as theatre:
        images: list[Image] = graph.collect(Image, "phase/forecast")
        had_one = theatre.node._forecast is not None
        assert had_one == (read_card(SHIPPED).forecast is not None)
        assert theatre.set("seer").success
        wait_until(lambda: len(images) > 2, 10, "forecasts of the new model")
        assert theatre.node._forecast.backend.card.name == "seer"
        assert theatre.set("old").success
        assert (theatre.node._forecast is not None) == had_one
