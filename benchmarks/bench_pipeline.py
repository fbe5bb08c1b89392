# SPDX-License-Identifier: Apache-2.0
"""Latency and delivered share of the running pipeline, with the package's DDS profile and with DDS's defaults.

    source setup.bash
    python benchmarks/bench_pipeline.py                 30 s a case, both profiles
    python benchmarks/bench_pipeline.py --model NAME    another model

A camera process publishes pictures made beforehand at an exact rate (so that making them costs nothing while it is
measured), stamped at publication; `ros2 launch surg_perception pipeline.launch.py` runs the phase node; this process
listens to its answers. delivered = images that reached the phase node / images sent. Latency is the node's own:
stamp to publication of the phase.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import rclpy
from rclpy.qos import QoSProfile, ReliabilityPolicy
from report import machine, sha256_of_arrays, write_json
from rich.console import Console
from rich.table import Table
from sensor_msgs.msg import CompressedImage, Image
from surg_perception_msgs.msg import SurgicalPhase

from surg_perception.data.phantom import Phantom
from surg_perception.stream.image_decode import encode_image, encode_jpeg

CASES = {
    "480p25 raw": (854, 480, 25.0, "raw"),
    "1080p30 raw": (1920, 1080, 30.0, "raw"),
    "1080p30 jpeg": (1920, 1080, 30.0, "compressed"),
}
PICTURES = 8
PROFILE = Path(__file__).resolve().parents[1] / "config" / "fastdds_large_images.xml"


def pictures(width: int, height: int) -> list[np.ndarray]:
    """Phantom pictures spread over a procedure, uint8 [height, width, 3]."""
    phantom = Phantom(width=width, height=height, rate_hz=1.0, seed=7, duration_s=80.0)
    return [phantom.frame(round((i + 0.5) * len(phantom) / PICTURES))[0] for i in range(PICTURES)]


def camera(
    width: int, height: int, rate_hz: float, transport: str, duration_s: float, namespace: str = "surg_perception"
) -> None:
    """Publish at rate_hz for duration_s as a camera driver does (best effort, depth 1); print how many were sent."""
    messages: list[Any] = []
    for bgr in pictures(width, height):
        if transport == "raw":
            encoding, step, data = encode_image(bgr, "bgr8")
            messages.append(Image(height=height, width=width, encoding=encoding, step=step, data=data))
        else:
            messages.append(CompressedImage(format="jpeg", data=encode_jpeg(bgr, 90)))
    rclpy.init()
    node = rclpy.create_node("camera", namespace=namespace)
    topic = "image" if transport == "raw" else "image/compressed"
    qos = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
    publisher = node.create_publisher(type(messages[0]), topic, qos)
    while publisher.get_subscription_count() == 0:
        time.sleep(0.05)
    time.sleep(1.0)
    sent, start_s = 0, time.monotonic()
    while sent < duration_s * rate_hz:
        time.sleep(max(0.0, start_s + sent / rate_hz - time.monotonic()))
        message = messages[sent % PICTURES]
        message.header.stamp = node.get_clock().now().to_msg()
        publisher.publish(message)
        sent += 1
    print(sent, flush=True)
    time.sleep(1.0)


def with_profile(environment: dict[str, str]) -> dict[str, str]:
    """The environment that a camera driver outside the launch file needs for large images (docs/large_images.md)."""
    return {
        **environment,
        "FASTDDS_DEFAULT_PROFILES_FILE": str(PROFILE),
        "FASTRTPS_DEFAULT_PROFILES_FILE": str(PROFILE),
        "MALLOC_MMAP_THRESHOLD_": str(2**30),
        "MALLOC_TRIM_THRESHOLD_": str(2**31),
        "MALLOC_TOP_PAD_": str(2**26),
    }


def measure(case: str, duration_s: float, own_profile: bool, model: str) -> dict[str, Any]:
    """Run one case; returns counts and latencies."""
    width, height, rate_hz, transport = CASES[case]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    for name in ("FASTDDS_DEFAULT_PROFILES_FILE", "FASTRTPS_DEFAULT_PROFILES_FILE"):
        environment.pop(name, None)
    launch = subprocess.Popen(
        [
            *("ros2", "launch", "surg_perception", "pipeline.launch.py", f"transport:={transport}"),
            *(f"dds_profile:={str(own_profile).lower()}", f"model:={model}", "vqa:=false"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )
    assert launch.stdout is not None
    for line in launch.stdout:
        if "pipeline up" in line:
            break
    else:
        raise RuntimeError("the pipeline did not come up: run its launch command by hand to see why")
    if own_profile:
        environment = with_profile(environment)
    driver = subprocess.Popen(
        [sys.executable, __file__, "--camera", str(width), str(height), str(rate_hz), transport, str(duration_s)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    phases: list[SurgicalPhase] = []
    node = rclpy.create_node("bench", namespace="surg_perception")
    node.create_subscription(SurgicalPhase, "phase/phase", phases.append, QoSProfile(depth=1000))
    while driver.poll() is None:
        rclpy.spin_once(node, timeout_sec=0.2)
    node.destroy_node()
    assert driver.stdout is not None
    sent = int(driver.stdout.read())
    os.killpg(launch.pid, signal.SIGINT)  # as a terminal does: launch and its nodes
    launch.communicate(timeout=20)
    return figures(phases, sent)


def figures(phases: list[SurgicalPhase], sent: int) -> dict[str, Any]:
    """Shares and percentiles of one run."""
    of_images = [p for p in phases if p.state != SurgicalPhase.NO_SIGNAL]
    last = phases[-1] if phases else SurgicalPhase()
    result: dict[str, Any] = {
        "sent": sent,
        "delivered": last.frames_received / sent,
        "processed": last.frames_processed / sent,
        "replaced": last.frames_replaced,
        "backend": last.backend,
        "model_id": last.model_id,
    }
    for name in ("latency", "wait", "decode", "inference", "filter"):
        values = [getattr(p, f"{name}_ms") for p in of_images]
        for percent in (50, 95, 99, 100):
            result[f"{name}_p{percent}_ms"] = float(np.percentile(values, percent)) if values else None
    return result


def main() -> None:
    """Run every case and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30.0, help="of images a case (default: %(default)s)")
    parser.add_argument("--model", default="gsvit_m0_phantom", help="model name or folder (default: %(default)s)")
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES), help="default: all")
    parser.add_argument("--out", type=Path, default=Path("out/bench_pipeline.json"))
    parser.add_argument("--camera", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.camera:
        width, height, rate_hz, transport, duration_s = options.camera
        camera(int(width), int(height), float(rate_hz), transport, float(duration_s))
        return

    os.environ.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    rclpy.init()
    console = Console()
    table = Table("case", "DDS", "delivered", "processed", "p50 ms", "p95 ms", "p99 ms", "max ms")
    results = []
    for case in options.cases:
        for own_profile in (True, False):
            name = "package's profile" if own_profile else "defaults"
            with console.status(f"{case}, {name}: {options.seconds:.0f} s"):
                result = measure(case, options.seconds, own_profile, options.model)
            results.append({"case": case, "dds": name, **result})
            latencies = [result[f"latency_p{p}_ms"] for p in (50, 95, 99, 100)]
            shown = ["-" if value is None else f"{value:.1f}" for value in latencies]
            table.add_row(case, name, f"{result['delivered']:.1%}", f"{result['processed']:.1%}", *shown)
    width, height, *_ = CASES[options.cases[0]]
    write_json(
        options.out,
        {
            "machine": machine(),
            "seconds": options.seconds,
            "input_sha256": sha256_of_arrays(pictures(width, height)),
            "results": results,
        },
    )
    console.print(table)
    console.print(f"{results[0]['model_id']} on {results[0]['backend']}; {options.out}")


if __name__ == "__main__":
    main()
