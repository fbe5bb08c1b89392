# SPDX-License-Identifier: Apache-2.0
"""What an answer costs: time to first token and to the end, a segment's cost, the router's, memory, phase beside it.

    source setup.bash
    python benchmarks/bench_surgllm.py                the shipped model, in this process and in the running pipeline
    python benchmarks/bench_surgllm.py --no-live      in this process only

In this process: questions of every task about windows of 16 s of the phantom, one after another. In the pipeline: a
camera publishes 854x480 pictures at 25 Hz, `ros2 launch` runs phase and vqa with its defaults, and a client asks
again and again with pauses. Phase latency (stamp to publication, the node's own) is compared between images that were
answered for while a question was in flight and the others, in the same run.
"""

from __future__ import annotations

import argparse
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from bench_pipeline import PROFILE
from report import machine, sha256_of_arrays, write_json
from rich.console import Console
from rich.table import Table

from surg_perception.data.phantom import Phantom
from surg_perception.models import ModelError
from surg_perception.stream.image_decode import resize_to_model_input
from surg_perception.surgllm.answering import Assistant
from surg_perception.surgllm.model_folder import find_surgllm

QUESTIONS = (
    "What is the surgical phase?",
    "Where is the grasper?",
    "How does the hook move?",
    "What is the hook doing?",
    "Is the grasper left of the hook?",
    "When does the grasper appear?",
    "Describe what happens in this video.",
)
WINDOWS = 6


def in_process(assistant: Assistant) -> dict[str, Any]:
    """Timings of a loaded assistant, in ms."""
    seconds = assistant.segment_frames * assistant.max_segments
    phantom = Phantom(rate_hz=1.0, seed=6500, duration_s=float(WINDOWS * seconds))
    frames = np.stack([resize_to_model_input(phantom.frame(i)[0], assistant.image_size) for i in range(len(phantom))])
    encode_ms, per_frame_ms, first_ms, total_ms, tokens, router_ms = [], [], [], [], [], []
    step = assistant.segment_frames
    for window in range(WINDOWS):
        segments = []
        for start in range(0, seconds, step):
            at = window * seconds + start
            started = time.perf_counter()
            features = assistant.encode(frames[at : at + step])
            encode_ms.append(1e3 * (time.perf_counter() - started))
            segments.append((float(start), float(start + step), features))
            if at + step < len(frames):  # as frames arrive: three of the four were seen a second ago
                started = time.perf_counter()
                assistant.encode(frames[at + 1 : at + 1 + step])
                per_frame_ms.append(1e3 * (time.perf_counter() - started))
        for question in QUESTIONS:
            started = time.perf_counter()
            assistant.router.route(question)
            router_ms.append(1e3 * (time.perf_counter() - started))
            reply = assistant.ask(question, segments)
            first_ms.append(reply.first_token_ms)
            total_ms.append(reply.total_ms)
            tokens.append(reply.tokens)

    def percentiles(values: list[float]) -> dict[str, float]:
        return {f"p{p}": round(float(np.percentile(values, p)), 2) for p in (50, 95, 100)}

    return {
        "input_sha256": sha256_of_arrays([frames]),
        "answers": len(total_ms),
        "first_token_ms": percentiles(first_ms),
        "whole_answer_ms": percentiles(total_ms),
        "tokens_median": float(np.median(tokens)),
        "segment_of_new_frames_ms": percentiles(encode_ms),
        "per_arriving_frame_ms": percentiles(per_frame_ms),
        "router_ms": percentiles(router_ms),
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
    }


def live(seconds: float, model: str) -> dict[str, Any]:
    """Phase latency with and without a question in flight, answers as a client sees them, memory of the node."""
    import rclpy
    from diagnostic_msgs.msg import DiagnosticArray
    from rclpy.executors import SingleThreadedExecutor
    from rclpy.qos import QoSProfile
    from surg_perception_msgs.msg import QuestionError, SurgicalPhase
    from surg_perception_msgs.srv import Ask

    os.environ.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    launch = subprocess.Popen(
        [*("ros2", "launch", "surg_perception", "pipeline.launch.py", "vqa:=true"), f"vqa_model:={model}"],
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
    output = launch.stdout
    threading.Thread(target=lambda: [None for _ in output], daemon=True).start()
    environment.update(FASTDDS_DEFAULT_PROFILES_FILE=str(PROFILE), FASTRTPS_DEFAULT_PROFILES_FILE=str(PROFILE))
    pipeline = Path(__file__).with_name("bench_pipeline.py")
    limit_s = seconds + 60.0
    driver = subprocess.Popen(
        [sys.executable, str(pipeline), "--camera", "854", "480", "25.0", "raw", str(limit_s)],
        stdout=subprocess.DEVNULL,
        env=environment,
    )
    rclpy.init()
    node = rclpy.create_node("bench", namespace="surg_perception")
    phases: list[tuple[float, SurgicalPhase]] = []
    node.create_subscription(
        SurgicalPhase, "phase/phase", lambda m: phases.append((time.monotonic(), m)), QoSProfile(depth=1000)
    )
    memory_mib: list[float] = []

    def note_memory(message: DiagnosticArray) -> None:
        of_vqa = [status for status in message.status if status.hardware_id == "/surg_perception/vqa"]
        memory_mib.extend(float(v.value) for status in of_vqa for v in status.values if v.key == "memory_mib")

    node.create_subscription(DiagnosticArray, "/diagnostics", note_memory, 10)
    client = node.create_client(Ask, "ask")
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    spinning = threading.Thread(target=executor.spin, daemon=True)
    spinning.start()

    def ask(question: str) -> Any:
        future = client.call_async(Ask.Request(question=question, window_s=16.0))
        end_s = time.monotonic() + 60.0
        while not future.done():
            if time.monotonic() > end_s:
                raise RuntimeError("vqa gave no answer within 60 s: run the launch command by hand to see why")
            time.sleep(0.005)
        return future.result()

    try:
        client.wait_for_service(30.0)
        started = time.monotonic()
        while ask(QUESTIONS[0]).error_code != QuestionError.NONE:
            if time.monotonic() - started > 60.0:
                raise RuntimeError("vqa did not answer within 60 s: run the launch command by hand to see why")
            time.sleep(0.5)
        time.sleep(20.0)  # the buffer fills
        phases.clear()
        spans, replies = [], []
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            begin = time.monotonic()
            replies.append(ask(QUESTIONS[len(replies) % len(QUESTIONS)]))
            spans.append((begin, time.monotonic()))
            time.sleep(max(2.0, 2.0 * (spans[-1][1] - begin)))
    finally:
        driver.kill()
        executor.shutdown()
        os.killpg(launch.pid, signal.SIGINT)
        launch.wait(timeout=30)
        rclpy.shutdown()
    of_images = [(at, m.latency_ms) for at, m in phases if m.state != SurgicalPhase.NO_SIGNAL]
    during = [ms for at, ms in of_images if any(begin <= at <= stop for begin, stop in spans)]
    without = [ms for at, ms in of_images if not any(begin <= at <= stop + 0.1 for begin, stop in spans)]
    result: dict[str, Any] = {
        "answers": len(replies),
        "errors": sum(reply.error_code != QuestionError.NONE for reply in replies),
        "first_token_ms_p50": round(float(np.median([reply.first_token_ms for reply in replies])), 1),
        "whole_answer_ms_p50": round(float(np.median([reply.total_ms for reply in replies])), 1),
        "vqa_memory_mib_most": max(memory_mib, default=None),
    }
    for name, values in (("answering", during), ("idle", without)):
        result[f"phase_images_{name}"] = len(values)
        for p in (50, 99):
            result[f"phase_latency_{name}_p{p}_ms"] = round(float(np.percentile(values, p)), 2)
    result["phase_p99_ratio"] = round(result["phase_latency_answering_p99_ms"] / result["phase_latency_idle_p99_ms"], 3)
    return result


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="surgllm_small_phantom", help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch in this process (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=90.0, help="of the pipeline (default: %(default)s)")
    parser.add_argument("--live", action=argparse.BooleanOptionalAction, default=True, help="also in the pipeline")
    parser.add_argument("--out", type=Path, default=Path("out/bench_surgllm.json"))
    options = parser.parse_args()
    console = Console()
    try:
        find_surgllm(options.model)
    except ModelError as error:
        console.print(f"no answers measured: {error}")
        return
    with console.status("the model in this process"):
        started = time.perf_counter()
        assistant = Assistant.load(options.model, threads=options.threads)
        load_s = round(time.perf_counter() - started, 2)
        result: dict[str, Any] = {"model_id": assistant.model_id, "threads": options.threads, "load_s": load_s}
        result["in_process"] = in_process(assistant)
        del assistant
    if options.live:
        with console.status(f"the pipeline, {options.seconds:.0f} s"):
            result["pipeline"] = live(options.seconds, options.model)
    write_json(options.out, {"machine": machine(), **result})
    table = Table("what", "measured")
    for part in ("in_process", "pipeline"):
        for name, value in result.get(part, {}).items():
            if name != "input_sha256":
                table.add_row(f"{part}: {name}", str(value))
    console.print(table)
    console.print(f"{result['model_id']}, loaded in {load_s} s; {options.out}")


if __name__ == "__main__":
    main()
