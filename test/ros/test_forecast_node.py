# SPDX-License-Identifier: Apache-2.0
"""Node `phase` with a forecast: what it publishes and when, and that it never delays the phase."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="ROS 2 is not in the environment: `source setup.bash` first")

from conftest import Graph, Spoken, wait_until
from folders import forecast_folder
from images import raw_image, stamped
from rclpy.parameter import Parameter
from sensor_msgs.msg import Image
from surg_perception_msgs.msg import Novelty, SurgicalPhase

from surg_perception.data.phantom import Phantom
from surg_perception.nodes.phase_node import PhaseNode

START_NS = 10**12
PERIOD_NS = 40_000_000


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    """Thirty different endoscope images, uint8 [120, 160, 3]."""
    phantom = Phantom(width=160, height=120, seed=5, duration_s=60.0, rate_hz=1.0)
    return [phantom.frame(index)[0] for index in range(10, 40)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped encoder and head with a small decoder that looks 0.4 s ahead."""
    return forecast_folder(tmp_path_factory.mktemp("models") / "forecasting", gap_s=0.4)


class Camera:
    """A phase node with a model that forecasts, and a camera of 25 Hz by its stamps."""

    def __init__(self, graph: Graph, **parameters: Any) -> None:
        self.graph = graph
        defaults = {"state__max_age_s": 3600.0, "input__reliability": "reliable", "state__no_signal_after_s": 5.0}
        defaults |= {"output__deadline_s": 10.0, "forecast__rate_hz": 5.0}
        self.node = graph.start(PhaseNode, **{**defaults, **parameters})
        self.phases: list[SurgicalPhase] = graph.collect(SurgicalPhase, "phase/phase")
        self.publisher = graph.client.create_publisher(Image, "image", 10)
        assert graph.transition(self.node, "configure", "activate")
        wait_until(lambda: self.publisher.get_subscription_count() == 1, 10, "the node's image subscription")
        self.sent = 0

    def send(self, picture: np.ndarray, each: bool = True) -> int:
        """Publish the next image, and wait until it was worked on unless told not to; returns its stamp."""
        stamp_ns = START_NS + self.sent * PERIOD_NS
        self.sent += 1
        self.publisher.publish(stamped(raw_image(picture), stamp_ns, "scope"))
        if each:
            wait_until(lambda: self.node._counts.processed == self.sent, 10, f"image {self.sent} to be worked on")
            forecast = self.node._forecast
            wait_until(lambda: forecast is None or not forecast._mailbox.counts().pending, 10, "the forecast's turn")
        return stamp_ns


def ns(stamp: Any) -> int:
    return stamp.sec * 10**9 + stamp.nanosec


def test_forecasts_and_novelty_come_with_their_stamps_while_somebody_listens(
    graph: Graph, pictures: list[np.ndarray], model: Path
) -> None:
    camera = Camera(graph, model__path=str(model))
    for picture in pictures[:5]:
        camera.send(picture)
    assert camera.node._forecast.forecaster.counts.forecasts == 0, "nobody listens"

    images: list[Image] = graph.collect(Image, "phase/forecast")
    found: list[Novelty] = graph.collect(Novelty, "phase/novelty")
    wait_until(lambda: camera.node._forecast.wanted, 5, "the node to notice who listens")
    sent = [camera.send(pictures[5 + index % 20]) for index in range(40)]
    wait_until(lambda: len(images) >= 8 and len(found) >= 5, 5, "forecasts and novelties")

    stamps = [ns(image.header.stamp) for image in images]
    assert stamps == sent[::5][: len(stamps)], "five a second, stamped as the image they were made from"
    for image in images:
        assert (image.encoding, image.height, image.width, image.step) == ("bgr8", 224, 224, 672)
        assert image.header.frame_id == "scope"
        assert len(image.data) == 224 * 224 * 3
    card = camera.node._card
    for novelty in found:
        assert ns(novelty.header.stamp) - ns(novelty.predicted_from) == 400_000_000
        assert ns(novelty.predicted_from) in stamps
        assert novelty.header.frame_id == "scope"
        assert novelty.gap_s == pytest.approx(0.4)
        assert novelty.model_id == card.model_id
        assert novelty.backend.startswith("openvino:CPU")
        assert 0.0 < novelty.error < 1.0
        assert 0.0 < novelty.copy_error < 1.0
        assert np.isnan(novelty.score), "fewer than ten errors before it"
    from surg_perception.stream.forecast import picture_difference
    from surg_perception.stream.image_decode import resize_to_model_input

    first = found[0]
    forecast = next(i for i in images if i.header.stamp == first.predicted_from)
    shown = np.frombuffer(bytes(forecast.data), np.uint8).reshape(224, 224, 3)
    truth = resize_to_model_input(pictures[5 + sent.index(ns(first.header.stamp)) % 20], 224)
    assert first.error == pytest.approx(picture_difference(shown, truth), abs=1e-6)


def test_a_slow_forecast_costs_no_phase_and_no_order(graph: Graph, pictures: list[np.ndarray], model: Path) -> None:
    camera = Camera(graph, model__path=str(model), forecast__enabled="always")
    backend = camera.node._forecast_backend
    predict, slow_calls = backend.predict, []

    def slow(latent: np.ndarray, frame: np.ndarray) -> np.ndarray:
        slow_calls.append(time.monotonic())
        time.sleep(0.5)
        return predict(latent, frame)

    backend.predict = slow
    sent = []
    for picture in [*pictures, *pictures]:
        stamp_ns = START_NS + camera.sent * PERIOD_NS
        camera.sent += 1
        camera.publisher.publish(stamped(raw_image(picture), stamp_ns))
        sent.append(stamp_ns)
        wait_until(lambda: camera.node._counts.processed == len(sent), 10, "the phase of this image")
    elapsed = wait_until(lambda: len(camera.phases) >= len(sent) and camera.phases, 5, "a phase for every image")
    assert [ns(phase.header.stamp) for phase in elapsed if ns(phase.header.stamp)] == sent
    assert slow_calls, "the forecast was at work meanwhile"
    assert camera.phases[-1].frames_processed == len(sent)
    assert camera.phases[-1].frames_replaced == 0
    assert len(slow_calls) < len(sent) / 5, "a forecast that is late skips images instead of catching up"


def test_a_forecast_that_fails_is_said_and_the_phase_goes_on(
    graph: Graph, spoken: Spoken, pictures: list[np.ndarray], model: Path
) -> None:
    camera = Camera(graph, model__path=str(model), forecast__enabled="always")

    def broken(latent: np.ndarray, frame: np.ndarray) -> np.ndarray:
        raise RuntimeError("no memory for the decoder")

    camera.node._forecast_backend.predict = broken
    for picture in pictures[:8]:
        camera.send(picture)
    assert camera.node._counts.faults == 0
    assert len(spoken.lines("ERROR", "no forecast", "no memory for the decoder")) == 1
    assert camera.node._forecast._thread.is_alive()


def test_never_and_a_model_without_forecast(
    graph: Graph, spoken: Spoken, pictures: list[np.ndarray], model: Path, tmp_path: Path
) -> None:
    from folders import plain_folder

    plain = plain_folder(tmp_path / "plain")
    node = graph.start(PhaseNode, model__path=str(plain), forecast__enabled="always")
    assert not graph.transition(node, "configure")
    assert spoken.lines("ERROR", "configure failed", "files.forecast")
    node.set_parameters([Parameter("forecast.enabled", value="auto")])
    assert graph.transition(node, "configure", "activate")
    assert node._forecast is None
    assert graph.transition(node, "deactivate", "cleanup")
    node.set_parameters([Parameter("forecast.enabled", value="never"), Parameter("model.path", value=str(model))])
    assert graph.transition(node, "configure", "activate")
    assert node._forecast is None
    assert "phase/forecast" not in " ".join(name for name, _ in graph.client.get_topic_names_and_types())


def test_lifecycle_again_and_again_with_a_forecast_under_way(
    graph: Graph, pictures: list[np.ndarray], model: Path
) -> None:
    camera = Camera(graph, model__path=str(model), forecast__enabled="always")
    for _ in range(2):
        for picture in pictures[:6]:
            camera.send(picture)
        assert camera.node._forecast.forecaster.counts.forecasts > 0
        assert graph.transition(camera.node, "deactivate", "cleanup", "configure", "activate")
        wait_until(lambda: camera.publisher.get_subscription_count() == 1, 10, "the node's image subscription")
        camera.sent = 0
