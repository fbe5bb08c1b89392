# SPDX-License-Identifier: Apache-2.0
"""Watches a running pipeline: a live phase line, and at the end a table, a ribbon plot and JSON.

`ros2 run surg_perception monitor` watches until Ctrl-C; `surg-perception demo` calls it with --until-silent.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.executors import ExternalShutdownException
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile
from rclpy.utilities import remove_ros_args
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text
from surg_perception_msgs.msg import PhaseLabels, SurgicalPhase

from surg_perception.nodes.lifecycle import stamp_ns
from surg_perception.stream.phase_pipeline import PhaseState
from surg_perception.stream.ribbon import plot_ribbons

PLAIN_LINE_EVERY_S = 2.0
STATE_STYLES = {PhaseState.OK: "green", PhaseState.UNCERTAIN: "yellow", PhaseState.STALE: "dark_orange"}


@dataclass
class Record:
    """What was seen of the pipeline, one entry per processed image (silence and faults left out)."""

    stamp_ns: list[int] = field(default_factory=list)
    phase_id: list[int] = field(default_factory=list)
    raw_phase_id: list[int] = field(default_factory=list)
    confidence: list[float] = field(default_factory=list)
    state: list[int] = field(default_factory=list)
    latency_ms: list[float] = field(default_factory=list)
    truth: dict[int, int] = field(default_factory=dict)
    labels: list[str] = field(default_factory=list)
    newest: SurgicalPhase | None = None
    source: dict[str, str] = field(default_factory=dict)
    published: list[tuple[int, int]] = field(default_factory=list)
    """(stamp in ns, images that the source had published by then), while they grew."""


class Monitor(Node):
    """Collects what the nodes of one namespace publish; owns no image."""

    def __init__(self) -> None:
        super().__init__("monitor", namespace="surg_perception")
        self.record = Record()
        self.last_image_s: float | None = None
        latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        self.create_subscription(SurgicalPhase, "phase/phase", self._take_phase, QoSProfile(depth=100))
        self.create_subscription(PhaseLabels, "phase/labels", self._take_labels, latched)
        self.create_subscription(SurgicalPhase, "source/truth", self._take_truth, QoSProfile(depth=1000))
        self.create_subscription(DiagnosticArray, "/diagnostics", self._take_diagnostics, QoSProfile(depth=10))

    def _take_phase(self, message: SurgicalPhase) -> None:
        record = self.record
        record.newest = message
        if message.state in (SurgicalPhase.NO_SIGNAL, SurgicalPhase.FAULT):
            return
        self.last_image_s = time.monotonic()
        record.stamp_ns.append(stamp_ns(message))
        record.phase_id.append(message.phase_id)
        record.raw_phase_id.append(message.raw_phase_id)
        record.confidence.append(message.confidence)
        record.state.append(message.state)
        record.latency_ms.append(message.latency_ms)

    def _take_labels(self, message: PhaseLabels) -> None:
        self.record.labels = list(message.labels)

    def _take_truth(self, message: SurgicalPhase) -> None:
        self.record.truth[stamp_ns(message)] = message.phase_id

    def _take_diagnostics(self, message: DiagnosticArray) -> None:
        for status in message.status:
            if status.hardware_id == f"{self.get_namespace()}/source" and status.name.endswith("frames"):
                self.record.source = {value.key: value.value for value in status.values}
                count = int(self.record.source.get("frames_published", 0))
                if count > (self.record.published[-1][1] if self.record.published else 0):
                    self.record.published.append((stamp_ns(message), count))


def summary(record: Record) -> dict[str, Any]:
    """Counts, latency percentiles and, where there is a truth, accuracy of what was recorded."""
    newest = record.newest
    out: dict[str, Any] = {
        "frames_sent": int(record.source["frames_published"]) if record.source else None,
        "frames_received": newest.frames_received if newest else 0,
        "frames_processed": newest.frames_processed if newest else 0,
        "frames_replaced": newest.frames_replaced if newest else 0,
        "frames_rejected": newest.frames_rejected if newest else 0,
        "frames_lost": newest.frames_lost if newest else 0,
        "model_id": newest.model_id if newest else "",
        "backend": newest.backend if newest else "",
    }
    if record.latency_ms:
        for percent in (50, 95, 99):
            out[f"latency_p{percent}_ms"] = float(np.percentile(record.latency_ms, percent))
    known = [i for i, stamp in enumerate(record.stamp_ns) if stamp in record.truth]
    if known:
        truth = np.array([record.truth[record.stamp_ns[i]] for i in known])
        for name, ids in (("filtered", record.phase_id), ("single_image", record.raw_phase_id)):
            out[f"accuracy_{name}"] = float(np.mean(np.array(ids)[known] == truth))
    return out


def line(record: Record) -> Text:
    """The newest phase as one line of text."""
    phase = record.newest
    if phase is None:
        return Text("waiting for the phase node …", style="dim")
    state = PhaseState(phase.state)
    seconds = (stamp_ns(phase) - record.stamp_ns[0]) / 1e9 if record.stamp_ns else 0.0
    bar = "█" * round(10 * phase.confidence) if math.isfinite(phase.confidence) else ""
    return Text.assemble(
        (f"{int(seconds // 60):02d}:{seconds % 60:04.1f}  ", "dim"),
        (f"{state.name:<10}", STATE_STYLES.get(state, "red")),
        (f"{phase.phase or '-':<24}", "bold"),
        f"{bar:<10} {phase.confidence:4.2f} ",
        (f"{phase.latency_ms:5.1f} ms  {phase.frames_processed} images, {phase.frames_replaced} replaced", "dim"),
    )


def table(result: dict[str, Any], files: list[tuple[str, Path]]) -> Table:
    """The summary for people."""
    view = Table(title="pipeline", title_justify="left", show_header=False)
    view.add_row("model", result["model_id"])
    view.add_row("backend", result["backend"])
    for name in ("sent", "received", "processed", "replaced", "rejected", "lost"):
        count = result[f"frames_{name}"]
        view.add_row(f"frames {name}", "unknown" if count is None else str(count))
    if "latency_p50_ms" in result:
        figures = " / ".join(f"{result[f'latency_p{p}_ms']:.1f}" for p in (50, 95, 99))
        view.add_row("latency p50 / p95 / p99, stamp to publication", f"{figures} ms")
    if "accuracy_filtered" in result:
        view.add_row("phase accuracy against the phantom's truth", f"{result['accuracy_filtered']:.1%}")
        view.add_row("  of single images, before the filter", f"{result['accuracy_single_image']:.1%}")
    for name, path in files:
        view.add_row(name, str(path))
    return view


def save(record: Record, result: dict[str, Any], folder: Path) -> list[tuple[str, Path]]:
    """Write summary.json and ribbon.png; returns what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(result, indent=2) + "\n")
    files = [("summary", folder / "summary.json")]
    if record.stamp_ns and record.labels:
        times_s = (np.array(record.stamp_ns) - record.stamp_ns[0]) / 1e9
        rows = [("single image", times_s, record.raw_phase_id), ("filtered", times_s, record.phase_id)]
        if record.truth:
            stamps = sorted(record.truth)
            truth_s = (np.array(stamps) - record.stamp_ns[0]) / 1e9
            rows.insert(0, ("truth", truth_s, [record.truth[stamp] for stamp in stamps]))
        plot_ribbons(folder / "ribbon.png", rows, record.labels, confidence=(times_s, np.array(record.confidence)))
        files.append(("ribbon", folder / "ribbon.png"))
    return files


def main() -> None:
    """Entry point of `ros2 run surg_perception monitor`."""
    parser = argparse.ArgumentParser(prog="monitor", description=__doc__)
    parser.add_argument("--until-silent", action="store_true", help="end when images have come and ceased")
    parser.add_argument("--limit-s", type=float, default=math.inf, help="end after so many seconds of images")
    parser.add_argument("--start-limit-s", type=float, default=math.inf, help="give up when no image came by then")
    parser.add_argument("--out", type=Path, help="folder for summary.json and ribbon.png")
    parser.add_argument("--ask", metavar="SOURCE", help="ask the demo's questions; the source is 'phantom' or a file")
    parser.add_argument("--phantom-duration-s", type=float, default=120.0, help="length of the phantom's procedure")
    options = parser.parse_args(remove_ros_args(sys.argv)[1:])
    if options.ask and not options.out:
        parser.error("--ask needs --out, where questions.json and questions.png go")

    rclpy.init(args=sys.argv)
    monitor = Monitor()
    asking = None
    if options.ask:
        from surg_perception.nodes.demo_questions import DemoQuestions

        asking = DemoQuestions(monitor, monitor.record, options.ask, options.phantom_duration_s)
    console = Console()
    started_s = time.monotonic()
    first_image_s: float | None = None
    printed_s = 0.0
    try:
        with Live(console=console, refresh_per_second=10, transient=True) as live:
            while True:
                rclpy.spin_once(monitor, timeout_sec=0.1)
                now_s = time.monotonic()
                if console.is_terminal:
                    live.update(line(monitor.record))
                elif now_s - printed_s > PLAIN_LINE_EVERY_S:
                    printed_s = now_s
                    console.print(line(monitor.record), soft_wrap=True)
                if monitor.last_image_s is None:
                    if now_s - started_s > options.start_limit_s:
                        break
                    continue
                first_image_s = first_image_s or now_s
                if asking is not None:
                    asking.step(now_s - first_image_s, now_s - monitor.last_image_s)
                # Diagnostics come once a second: wait for the last of them.
                if options.until_silent and now_s - monitor.last_image_s > 2.5:
                    break
                if now_s - first_image_s > options.limit_s:
                    break
    except (KeyboardInterrupt, ExternalShutdownException):
        pass
    record = monitor.record
    result = summary(record)
    files = save(record, result, options.out) if options.out else []
    shown = None
    if asking is not None and record.stamp_ns:
        shown, more = asking.finish(options.out)
        files += more
    console.print(table(result, files))
    if shown is not None:
        console.print(shown)
    monitor.destroy_node()
    rclpy.try_shutdown()
    if not record.stamp_ns:
        console.print("no image was processed", style="red")
        sys.exit(1)


if __name__ == "__main__":
    main()
