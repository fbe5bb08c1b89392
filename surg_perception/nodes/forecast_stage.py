# SPDX-License-Identifier: Apache-2.0
"""The forecast beside the phase: a thread of its own that may be late, and makes nobody wait."""

from __future__ import annotations

import os
import sys
import threading
from dataclasses import dataclass
from typing import Any

from rclpy.qos import QoSProfile
from rclpy.time import Time
from sensor_msgs.msg import Image
from std_msgs.msg import Header
from surg_perception_msgs.msg import Novelty as NoveltyMessage

from surg_perception.nodes.lifecycle import PerceptionNode, join
from surg_perception.runtime.forecast import ForecastBackend
from surg_perception.stream.forecast import Forecast, Forecaster, ForecastSettings, Novelty
from surg_perception.stream.image_decode import encode_image
from surg_perception.stream.mailbox import Mailbox
from surg_perception.stream.phase_pipeline import PhaseResult

_NICENESS = 10


@dataclass(frozen=True)
class ForecastTopics:
    """The two publishers, kept while the node is configured."""

    image: Any
    novelty: Any

    @classmethod
    def create(cls, node: PerceptionNode) -> ForecastTopics:
        """Lifecycle publishers `~/forecast` and `~/novelty`."""
        return cls(
            node.create_lifecycle_publisher(Image, "~/forecast", QoSProfile(depth=1)),
            node.create_lifecycle_publisher(NoveltyMessage, "~/novelty", QoSProfile(depth=1)),
        )

    def have_subscribers(self) -> bool:
        """Whether anybody listens to either."""
        return bool(self.image.get_subscription_count() or self.novelty.get_subscription_count())


@dataclass(frozen=True)
class _Item:
    result: PhaseResult
    header: Header


class ForecastStage:
    """Forecasts of one model, from `start` to `stop`.

    `offer` only swaps a mailbox; the thread behind it has a lower priority than the rest of the process (Linux) and
    one CPU thread. Images that come while it works are seen by it no more than the newest of them.
    """

    def __init__(
        self, node: PerceptionNode, backend: ForecastBackend, topics: ForecastTopics, settings: ForecastSettings
    ) -> None:
        self.backend = backend
        self.forecaster = Forecaster(lambda latent, frame: backend.predict(latent, frame), backend.gap_s, settings)
        self.wanted = False
        self.fault = ""
        self._node = node
        self._topics = topics
        self._mailbox: Mailbox[_Item] = Mailbox()
        self._thread = threading.Thread(target=self._work, name="forecast", daemon=True)

    def start(self) -> None:
        """Begin; once."""
        self.look_for_subscribers()
        self._thread.start()

    def stop(self, wait: bool = True) -> None:
        """End, waiting for a forecast under way unless told not to."""
        self._mailbox.close()
        if wait:
            join(self._thread)

    def look_for_subscribers(self) -> None:
        """Decide whether images are taken from now on; call it now and then."""
        self.wanted = self._node.values["forecast.enabled"] == "always" or self._topics.have_subscribers()

    def offer(self, result: PhaseResult, header: Header) -> None:
        """Take note of a processed image; never blocks."""
        if self.wanted:
            self._mailbox.put(_Item(result, header))

    def _work(self) -> None:
        if sys.platform == "linux":  # there a thread has a priority of its own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        while (item := self._mailbox.get()) is not None:
            try:
                found = self.forecaster.update(
                    item.result.frame, item.result.latent, item.result.stamp_ns, tag=item.header
                )
                for each in found:
                    self._publish(each)
                self.fault = ""
            except Exception as error:
                # Of whatever kind: the phase goes on, and so does the next forecast.
                self.fault = f"{type(error).__name__}: {error}"
                self._node.get_logger().error(f"no forecast for this image: {self.fault}", throttle_duration_sec=5.0)

    def _publish(self, found: Forecast | Novelty) -> None:
        if self._mailbox.closed or not self._node.context.ok():
            return
        if isinstance(found, Forecast):
            height, width = found.frame.shape[:2]
            encoding, step, data = encode_image(found.frame, "bgr8")
            self._topics.image.publish(
                Image(header=found.tag, height=height, width=width, encoding=encoding, step=step, data=data)
            )
            return
        self._topics.novelty.publish(
            NoveltyMessage(
                header=found.tag,
                predicted_from=Time(nanoseconds=found.predicted_from_ns).to_msg(),
                error=found.error,
                copy_error=found.copy_error,
                score=found.score,
                gap_s=self.forecaster.gap_s,
                model_id=self.backend.card.model_id,
                backend=self.backend.name,
            )
        )

    def figures(self) -> dict[str, str]:
        """For diagnostics."""
        counts = self.forecaster.counts
        return {
            "forecast_backend": self.backend.name,
            "forecast_wanted": str(self.wanted),
            "forecasts": str(counts.forecasts),
            "forecasts_judged": str(counts.judged),
            "forecasts_dropped": str(counts.dropped),
        }
