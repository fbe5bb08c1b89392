# SPDX-License-Identifier: Apache-2.0
"""Node `overlay`: the image with phase, confidence, state and the procedure so far drawn on it, for people."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from diagnostic_msgs.msg import DiagnosticStatus
from rclpy.qos import DurabilityPolicy, QoSProfile
from sensor_msgs.msg import CompressedImage, Image
from surg_perception_msgs.msg import PhaseLabels, SurgicalPhase

from surg_perception.data.video_writer import VideoWriter
from surg_perception.nodes.lifecycle import ConfigureError, PerceptionNode, join, run, stamp_ns
from surg_perception.nodes.parameter_table import OVERLAY
from surg_perception.stream.image_decode import ImageError, decode_image, encode_jpeg
from surg_perception.stream.mailbox import Mailbox
from surg_perception.stream.overlay_canvas import OverlayCanvas, OverlayInfo

IMAGES_KEPT = 8
"""Newest images, among which the one that a phase belongs to is found by its stamp."""
SILENCE_S = 1.0
"""After so long without a phase the picture says so itself."""


class OverlayNode(PerceptionNode):
    """Subscribes to the image and `phase/phase`; publishes `~/image/compressed` (JPEG).

    A phase is drawn on the very image that it was computed from (same stamp). Work happens in a thread of its own,
    at most `max_rate_hz` times a second, and in a process of its own, off the phase node's path.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(OVERLAY, **kwargs)
        self._thread: threading.Thread | None = None
        self._video: VideoWriter | None = None
        self._publisher = None
        self._subscriptions_: list[Any] = []
        self._timer = None
        self._labels_message: PhaseLabels | None = None
        self._drawn = 0
        self._fault = ""
        self.updater.add("pictures", self._picture_diagnostics)

    def configure(self) -> None:
        for name in ("record.video_path", "record.image_path"):
            folder = Path(self.values[name]).expanduser().resolve().parent
            if self.values[name] and not folder.is_dir():
                raise ConfigureError(f"{name} is {self.values[name]}: there is no folder {folder}; make it first")
        self._publisher = self.create_lifecycle_publisher(CompressedImage, "~/image/compressed", QoSProfile(depth=2))

    def activate(self) -> None:
        self._mailbox: Mailbox[tuple[Any, SurgicalPhase | None]] = Mailbox()
        self._images: OrderedDict[int, Any] = OrderedDict()
        self._arrivals_s: list[float] = []
        self._next_due_s = 0.0
        self._last_phase_s = time.monotonic()
        self._drawn, self._fault = 0, ""
        if self.values["record.video_path"]:
            self._video = VideoWriter(Path(self.values["record.video_path"]).expanduser())
        raw = self.values["input.transport"] == "raw"
        topic = "image" if raw else "image/compressed"
        latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        self._subscriptions_ = [
            self.create_subscription(
                Image if raw else CompressedImage, topic, self._take_image, self.image_qos(topic, 2)
            ),
            self.create_subscription(SurgicalPhase, "phase/phase", self._take_phase, QoSProfile(depth=10)),
            self.create_subscription(PhaseLabels, "phase/labels", self._take_labels, latched),
        ]
        self._timer = self.create_timer(SILENCE_S / 2, self._watch)
        self._thread = threading.Thread(target=self._work, name="overlay", daemon=True)
        self._thread.start()

    def deactivate(self) -> None:
        for subscription in self._subscriptions_:
            self.destroy_subscription(subscription)
        self._subscriptions_ = []
        if self._timer is not None:
            self.destroy_timer(self._timer)
            self._timer = None
        if self._thread is not None:
            self._mailbox.close()
            join(self._thread)
            self._thread = None
        if self._video is not None:
            self._video.close()
            self._video = None

    def cleanup(self) -> None:
        if self._publisher is not None:
            self.destroy_lifecycle_publisher(self._publisher)
            self._publisher = None

    # The executor's thread: messages only ---------------------------------------------------------------------

    def _take_image(self, message: Any) -> None:
        self._images[stamp_ns(message)] = message
        while len(self._images) > IMAGES_KEPT:
            self._images.popitem(last=False)
        self._arrivals_s = [*self._arrivals_s[-49:], time.monotonic()]

    def _take_labels(self, message: PhaseLabels) -> None:
        self._labels_message = message

    def _take_phase(self, message: SurgicalPhase) -> None:
        now_s = self._last_phase_s = time.monotonic()
        if now_s < self._next_due_s:
            return
        image = self._images.get(stamp_ns(message)) if message.state != SurgicalPhase.NO_SIGNAL else None
        if image is None and message.state != SurgicalPhase.NO_SIGNAL:
            return
        self._next_due_s = max(self._next_due_s + 1.0 / self.values["max_rate_hz"], now_s)
        self._mailbox.put((image, message))

    def _watch(self) -> None:
        if time.monotonic() - self._last_phase_s > SILENCE_S:
            self._mailbox.put((None, None))

    # The worker's thread: pictures ----------------------------------------------------------------------------

    def _work(self) -> None:
        size = (640, 480)
        canvas: OverlayCanvas | None = None
        canvas_labels: list[str] = []
        last_stamp_s, last_stamp_seen_s = 0.0, time.monotonic()
        last_live: np.ndarray | None = None
        saved_s = 0.0
        while (item := self._mailbox.get()) is not None:
            image, phase = item
            labels = list(self._labels_message.labels) if self._labels_message else []
            if canvas is None or labels != canvas_labels:
                history = canvas.history if canvas is not None else None
                canvas, canvas_labels = OverlayCanvas(labels, history=history), labels
            info = self._info(phase)
            try:
                if image is not None:
                    bgr = self._picture(image)
                    size = (bgr.shape[1], bgr.shape[0])
                    last_stamp_s, last_stamp_seen_s = info.stamp_s, time.monotonic()
                    picture = last_live = canvas.draw(bgr, info)
                else:
                    # No stamp says when "now" is on the camera's clock: count on from the last one.
                    now_s = last_stamp_s + time.monotonic() - last_stamp_seen_s
                    picture = canvas.no_signal_frame(*size, self._info(phase, now_s))
                self._publish(picture, phase)
                if self._video is not None:
                    self._video.write(cv2.resize(picture, self._video.size or size), time.monotonic())
            except (ImageError, ValueError) as error:
                self._fault = str(error)
                self.get_logger().error(f"picture skipped: {error}", throttle_duration_sec=5.0)
                continue
            self._drawn, self._fault = self._drawn + 1, ""
            if last_live is not None and time.monotonic() - saved_s >= 1.0:
                saved_s = time.monotonic()
                self._save(last_live)
        if last_live is not None:
            self._save(last_live)

    def _picture(self, message: Any) -> np.ndarray:
        bgr = decode_image(message, max_pixels=self.values["input.max_pixels"])
        scale = self.values["max_width"] / bgr.shape[1]
        if scale < 1:
            bgr = cv2.resize(bgr, None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR)
        return bgr

    def _info(self, phase: SurgicalPhase | None, now_s: float | None = None) -> OverlayInfo:
        if phase is None:
            return OverlayInfo(stamp_s=now_s or 0.0, state=SurgicalPhase.NO_SIGNAL, backend="no phase node")
        arrivals = self._arrivals_s
        span_s = arrivals[-1] - arrivals[0] if len(arrivals) > 1 else 0.0
        return OverlayInfo(
            stamp_s=now_s if now_s is not None else stamp_ns(phase) * 1e-9,
            phase_id=phase.phase_id,
            phase=phase.phase,
            confidence=phase.confidence,
            probabilities=tuple(phase.probabilities),
            state=phase.state,
            latency_ms=phase.latency_ms,
            rate_hz=(len(arrivals) - 1) / span_s if span_s > 0 else float("nan"),
            backend=phase.backend,
            model_id=phase.model_id,
        )

    def _publish(self, picture: np.ndarray, phase: SurgicalPhase | None) -> None:
        message = CompressedImage(format="jpeg", data=encode_jpeg(picture, self.values["jpeg_quality"]))
        if phase is not None:
            message.header = phase.header
        if self._publisher is not None:
            self._publisher.publish(message)

    def _save(self, picture: np.ndarray) -> None:
        if not self.values["record.image_path"]:
            return
        path = Path(self.values["record.image_path"]).expanduser()
        part = path.with_name(f".{path.name}.part.png")
        if not cv2.imwrite(str(part), picture):
            self.get_logger().error(f"cannot write {path}", throttle_duration_sec=10.0)
            return
        part.replace(path)

    def _picture_diagnostics(self, status: Any) -> Any:
        if self._fault:
            status.summary(DiagnosticStatus.WARN, self._fault)
        else:
            status.summary(DiagnosticStatus.OK, self.state_label)
        status.add("pictures_drawn", str(self._drawn))
        return status


def main() -> None:
    """Entry point of `ros2 run surg_perception overlay_node`."""
    run(OverlayNode)
