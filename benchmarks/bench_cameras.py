# SPDX-License-Identifier: Apache-2.0
"""Memory and latency of one launch with one, two, three and four cameras: what each further one costs.

    source setup.bash
    python benchmarks/bench_cameras.py                  30 s for each number of cameras, 854x480 raw at 25 Hz
    python benchmarks/bench_cameras.py --cameras 1 2 --seconds 5

Each camera is a process that publishes pictures made beforehand at an exact rate, stamped at publication. One
`ros2 launch surg_perception pipeline.launch.py cameras:=…` runs a phase node for each. Memory is the phase nodes' (pss
counts a page that several processes share once), read half-way; latency the nodes' own, stamp to publication of the
phase, and where there are several cameras that of the slowest.
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

import rclpy
from bench_pipeline import camera, figures, pictures, with_profile
from rclpy.qos import QoSProfile
from report import machine, sha256_of_arrays, write_json
from rich.console import Console
from rich.table import Table
from surg_perception_msgs.msg import SurgicalPhase

WIDTH, HEIGHT, RATE_HZ = 854, 480, 25.0
NAMESPACE = "/surg_perception"


def phase_processes(names: list[str]) -> dict[str, int]:
    """Camera to the process of its phase node."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_text().split("\0")
        except OSError:
            continue
        if any(word.endswith("/surg_perception/phase_node") for word in words):
            found.update({name: int(folder.name) for name in names if f"__ns:={NAMESPACE}/{name}" in words})
    if set(found) != set(names):
        raise RuntimeError(f"phase nodes of {', '.join(found) or 'no camera'} run, expected {', '.join(names)}")
    return found


def memory_mib(pid: int) -> dict[str, float]:
    """Rss and Pss of a process, in MiB."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    fields = {line.split(":")[0]: line.split()[1] for line in lines if line.endswith("kB")}
    return {"rss_mib": int(fields["Rss"]) / 1024, "pss_mib": int(fields["Pss"]) / 1024}


def cpu_s(pid: int) -> float:
    """Processor time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def shared_memory_mib() -> float:
    """What lies in /dev/shm, where Fast DDS keeps images."""
    stat = os.statvfs("/dev/shm")
    return (stat.f_blocks - stat.f_bfree) * stat.f_frsize / 2**20


def measure(count: int, duration_s: float, model: str) -> dict[str, Any]:
    """Run so many cameras; returns memory, processor time, counts and latencies of each."""
    names = [f"camera{k}" for k in range(count)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    for name in ("FASTDDS_DEFAULT_PROFILES_FILE", "FASTRTPS_DEFAULT_PROFILES_FILE"):
        environment.pop(name, None)
    shared_before_mib = shared_memory_mib()
    cameras = "{" + ", ".join(f"{name}: null" for name in names) + "}"
    launch = subprocess.Popen(
        ["ros2", "launch", "surg_perception", "pipeline.launch.py", f"cameras:={cameras}", f"model:={model}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )
    drivers: list[subprocess.Popen[str]] = []
    node = rclpy.create_node("bench", namespace=NAMESPACE)
    try:
        assert launch.stdout is not None
        up = 0
        for line in launch.stdout:
            up += "pipeline up" in line
            if up == count:
                break
        else:
            raise RuntimeError("the cameras did not come up: run the launch command by hand to see why")
        processes = phase_processes(names)
        phases: dict[str, list[SurgicalPhase]] = {name: [] for name in names}
        for name in names:
            topic = f"{NAMESPACE}/{name}/phase/phase"
            node.create_subscription(SurgicalPhase, topic, phases[name].append, QoSProfile(depth=1000))
        for k, name in enumerate(names):
            delay_s = k / count / RATE_HZ
            drivers.append(
                subprocess.Popen(
                    [sys.executable, __file__, "--driver", f"{NAMESPACE}/{name}", str(duration_s), str(delay_s)],
                    stdout=subprocess.PIPE,
                    text=True,
                    env=with_profile(environment),
                )
            )
        while not all(any(p.state != SurgicalPhase.NO_SIGNAL for p in phases[name]) for name in names):
            rclpy.spin_once(node, timeout_sec=0.2)
        cpu_before_s, started_s = {name: cpu_s(pid) for name, pid in processes.items()}, time.monotonic()
        memory: dict[str, dict[str, float]] = {}
        shared_mib = took_s = 0.0
        cpu: dict[str, float] = {}
        while any(driver.poll() is None for driver in drivers):
            rclpy.spin_once(node, timeout_sec=0.2)
            took_s = time.monotonic() - started_s
            if not memory and took_s > duration_s / 2:
                memory = {name: memory_mib(pid) for name, pid in processes.items()}
                shared_mib = shared_memory_mib() - shared_before_mib
                cpu = {name: (cpu_s(pid) - cpu_before_s[name]) / took_s for name, pid in processes.items()}
        sent = [int(driver.communicate()[0]) for driver in drivers]
    finally:
        node.destroy_node()
        for driver in drivers:
            driver.kill()
        os.killpg(launch.pid, signal.SIGINT)  # as a terminal does: launch and its nodes
        launch.communicate(timeout=60)
    each = [
        {"camera": name, **memory[name], "cpu_cores": cpu[name], **figures(phases[name], sent[k])}
        for k, name in enumerate(names)
    ]
    return {
        "cameras": count,
        "rss_mib": sum(one["rss_mib"] for one in each),
        "pss_mib": sum(one["pss_mib"] for one in each),
        "shared_memory_mib": shared_mib,
        "cpu_cores": sum(one["cpu_cores"] for one in each),
        "delivered": min(one["delivered"] for one in each),
        "processed": min(one["processed"] for one in each),
        "latency_p50_ms": max(one["latency_p50_ms"] for one in each),
        "latency_p99_ms": max(one["latency_p99_ms"] for one in each),
        "each": each,
    }


def main() -> None:
    """Measure each number of cameras and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30.0, help="of images (default: %(default)s)")
    parser.add_argument("--cameras", nargs="*", type=int, default=[1, 2, 3, 4], help="default: 1 2 3 4")
    parser.add_argument("--model", default="gsvit_m0_phantom", help="model name or folder (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out/bench_cameras.json"))
    parser.add_argument("--driver", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.driver:
        namespace, duration_s, delay_s = options.driver
        time.sleep(float(delay_s))
        camera(WIDTH, HEIGHT, RATE_HZ, "raw", float(duration_s), namespace)
        return

    os.environ.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    before = machine()
    rclpy.init()
    console = Console()
    table = Table("cameras", "rss MiB", "pss MiB", "+ pss", "/dev/shm MiB", "cores", "processed", "p50 ms", "p99 ms")
    results: list[dict[str, Any]] = []
    for count in options.cameras:
        with console.status(f"{count} cameras: {options.seconds:.0f} s"):
            result = measure(count, options.seconds, options.model)
        more = result["pss_mib"] - results[-1]["pss_mib"] if results else result["pss_mib"]
        results.append(result)
        table.add_row(
            str(count),
            *(f"{value:.0f}" for value in (result["rss_mib"], result["pss_mib"], more, result["shared_memory_mib"])),
            f"{result['cpu_cores']:.2f}",
            f"{result['processed']:.1%}",
            *(f"{result[f'latency_p{percent}_ms']:.1f}" for percent in (50, 99)),
        )
    write_json(
        options.out,
        {
            "machine": before,
            "seconds": options.seconds,
            "width": WIDTH,
            "height": HEIGHT,
            "rate_hz": RATE_HZ,
            "transport": "raw",
            "input_sha256": sha256_of_arrays(pictures(WIDTH, HEIGHT)),
            "results": results,
        },
    )
    console.print(table)
    first = results[0]["each"][0]
    console.print(f"{first['model_id']} on {first['backend']}; {options.out}")


if __name__ == "__main__":
    main()
