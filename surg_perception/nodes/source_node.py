# SPDX-License-Identifier: Apache-2.0
"""Node `source`: a camera that isn't one. Publishes a video, a folder of images or the phantom at its own pace."""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import dataclass
from typing import Any

from diagnostic_msgs.msg import DiagnosticStatus
from rclpy.duration import Duration
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rclpy.time import Time
from sensor_msgs.msg import CompressedImage, Image
from surg_perception_msgs.msg import SurgicalPhase

from surg_perception.data.frames import FrameSource, SourceFrame, open_source
from surg_perception.nodes.lifecycle import ConfigureError, PerceptionNode, join, run
from surg_perception.nodes.parameter_table import SOURCE
from surg_perception.stream.image_decode import encode_image, encode_jpeg

AHEAD = 8
"""Pictures made ahead of time, so that encoding does not delay publication."""


@dataclass
class _Prepared:
    time_s: float
    image: Image | None
    compressed: CompressedImage | None
    truth: SurgicalPhase | None


class SourceNode(PerceptionNode):
    """Publishes `image`, `image/compressed` and, for the phantom, `~/truth` (its exact phase, same stamps).

    The stamp of a picture is the time at which it was due: start of publication plus its time in the video.
    Where pictures cannot be made in time, the schedule is moved on (and counted as late), as a camera would do.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(SOURCE, **kwargs)
        self._frames: FrameSource | None = None
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self._published = 0
        self._late = 0
        self._ended = ""
        self.updater.add("frames", self._frame_diagnostics)

    def configure(self) -> None:
        v = self.values
        try:
            self._frames = open_source(
                v["source"],
                width=v["width"] or None,
                height=v["height"] or None,
                rate_hz=v["rate_hz"] or None,
                duration_s=v["duration_s"],
                seed=v["seed"],
                loop=v["loop"],
            )
        except (ValueError, OSError) as error:
            raise ConfigureError(f"source '{v['source']}': {error}") from error
        qos = QoSProfile(
            depth=4,
            reliability=ReliabilityPolicy.RELIABLE
            if v["output.reliability"] == "reliable"
            else ReliabilityPolicy.BEST_EFFORT,
        )
        transport = v["output.transport"]
        self._raw = self.create_lifecycle_publisher(Image, "image", qos) if transport != "compressed" else None
        self._jpeg = (
            self.create_lifecycle_publisher(CompressedImage, "image/compressed", qos) if transport != "raw" else None
        )
        self._truth = self.create_lifecycle_publisher(SurgicalPhase, "~/truth", QoSProfile(depth=100))

    def activate(self) -> None:
        self._stop.clear()
        self._published = self._late = 0
        self._ended = ""
        ready: queue.Queue[_Prepared | None] = queue.Queue(AHEAD)
        self._threads = [
            threading.Thread(target=self._prepare, args=(ready,), name="source-prepare", daemon=True),
            threading.Thread(target=self._publish, args=(ready,), name="source-publish", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def deactivate(self) -> None:
        self._stop.set()
        for thread in self._threads:
            join(thread)
        self._threads = []

    def cleanup(self) -> None:
        if self._frames is not None:
            self._frames.close()
            self._frames = None
        for name in ("_raw", "_jpeg", "_truth"):
            publisher = getattr(self, name, None)
            if publisher is not None:
                self.destroy_lifecycle_publisher(publisher)
                setattr(self, name, None)

    def _prepare(self, ready: queue.Queue[_Prepared | None]) -> None:
        assert self._frames is not None
        try:
            for frame in self._frames:
                self._put(ready, self._messages(frame))
                if self._stop.is_set():
                    return
            self._ended = "end of the source"
        except Exception as error:
            self._ended = f"stopped by an error: {error}"
            self.get_logger().error(f"source '{self.values['source']}' {self._ended}")
        self._put(ready, None)

    def _put(self, ready: queue.Queue[_Prepared | None], item: _Prepared | None) -> None:
        while not self._stop.is_set():
            try:
                ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def _messages(self, frame: SourceFrame) -> _Prepared:
        image = compressed = truth = None
        if self._raw is not None:
            encoding, step, data = encode_image(frame.bgr, self.values["output.encoding"])
            image = Image(height=frame.bgr.shape[0], width=frame.bgr.shape[1], encoding=encoding, step=step, data=data)
        if self._jpeg is not None:
            compressed = CompressedImage(format="jpeg", data=encode_jpeg(frame.bgr, self.values["output.jpeg_quality"]))
        if frame.labels is not None:
            truth = SurgicalPhase(
                state=SurgicalPhase.OK,
                phase_id=frame.labels.phase,
                raw_phase_id=frame.labels.phase,
                confidence=1.0,
                model_id="truth",
            )
        return _Prepared(frame.time_s, image, compressed, truth)

    def _publish(self, ready: queue.Queue[_Prepared | None]) -> None:
        start: Time | None = None
        start_steady_s = first_s = 0.0
        while not self._stop.is_set():
            try:
                item = ready.get(timeout=0.1)
            except queue.Empty:
                continue
            if item is None:
                self.get_logger().info(f"{self._ended}: {self._published} pictures published")
                return
            if start is None:
                start, start_steady_s, first_s = self.get_clock().now(), time.monotonic(), item.time_s
            due_steady_s = start_steady_s + item.time_s - first_s
            wait_s = due_steady_s - time.monotonic()
            if wait_s > 0:
                if self._stop.wait(wait_s):
                    return
            elif wait_s < -0.02:
                self._late += 1
                start_steady_s -= wait_s
                start += Duration(nanoseconds=round(-wait_s * 1e9))
            stamp = (start + Duration(nanoseconds=round((item.time_s - first_s) * 1e9))).to_msg()
            for message, publisher in (
                (item.truth, self._truth),
                (item.image, self._raw),
                (item.compressed, self._jpeg),
            ):
                if message is not None and publisher is not None:
                    message.header.stamp = stamp
                    message.header.frame_id = self.values["frame_id"]
                    publisher.publish(message)
            self._published += 1

    def _frame_diagnostics(self, status: Any) -> Any:
        if self._ended.startswith("stopped"):
            status.summary(DiagnosticStatus.ERROR, self._ended)
        else:
            status.summary(DiagnosticStatus.OK, self._ended or self.state_label)
        status.add("source", str(self.values["source"]))
        status.add("frames_published", str(self._published))
        status.add("frames_late", str(self._late))
        return status


def main() -> None:
    """Entry point of `ros2 run surg_perception source_node`."""
    run(SourceNode)
