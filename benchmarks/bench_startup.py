# SPDX-License-Identifier: Apache-2.0
"""Start-up: from the start of a process to an engine that has passed its check, and to a phase node that is active.

    source setup.bash
    python benchmarks/bench_startup.py                  the engines and, with ROS 2, the node

Every start is a process of its own. cold: nothing in the cache of compiled models. cached: the same once more, with
what the cold start left there. The files themselves are in memory (page cache) in both. Of several starts the median.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from report import machine, sha256_of_arrays, write_json
from rich.console import Console
from rich.progress import track
from rich.table import Table

ENGINES = (
    ("openvino", "fp32"),
    ("openvino", "bf16"),
    ("openvino", "fp32-w8"),
    ("openvino", "bf16-w8"),
    ("onnxruntime", "fp32"),
    ("torch", "fp32"),
)


def engine(model: str, backend: str, precision: str, threads: int) -> dict[str, Any]:
    """In a fresh process: open an engine with its check, infer one frame."""
    from surg_perception.runtime import open_backend

    imported_s = time.monotonic()
    with open_backend(model, backend, precision, allow_fallback=False, threads=threads) as opened:
        ready_s = time.monotonic()
        opened.infer(np.zeros((224, 224, 3), np.uint8))
        return {"imported_s": imported_s, "ready_s": ready_s, "frame_s": time.monotonic(), "name": opened.name}


def node(model: str, backend: str, precision: str, threads: int) -> dict[str, Any]:
    """In a fresh process: configure and activate a phase node."""
    import rclpy
    from rclpy.lifecycle import TransitionCallbackReturn
    from rclpy.parameter import Parameter

    from surg_perception.nodes.phase_node import PhaseNode

    imported_s = time.monotonic()
    rclpy.init()
    values = {
        "model.path": model,
        "runtime.backend": backend,
        "runtime.precision": precision,
        "runtime.threads": threads,
        "runtime.allow_fallback": False,
    }
    phase = PhaseNode(parameter_overrides=[Parameter(name, value=value) for name, value in values.items()])
    for transition in (phase.trigger_configure, phase.trigger_activate):
        if transition() != TransitionCallbackReturn.SUCCESS:
            raise RuntimeError(f"the node does not become active with {backend} in {precision}; its log says why")
    found = {"imported_s": imported_s, "ready_s": time.monotonic(), "name": phase._backend.name}
    phase.destroy_node()
    rclpy.shutdown()
    return found


CHILDREN = {"engine": engine, "node": node}


def start(what: str, model: str, backend: str, precision: str, threads: int, cache: Path) -> dict[str, Any]:
    """One start in a process of its own; seconds since it was started.

    Raises:
        RuntimeError: it failed; the last line that it said.
    """
    begun_s = time.monotonic()  # one clock for all processes of this machine
    done = subprocess.run(
        [sys.executable, __file__, "--child", what, model, backend, precision, str(threads)],
        env={**os.environ, "XDG_CACHE_HOME": str(cache)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["it said nothing"])[-1])
    found = json.loads(done.stdout.splitlines()[-1])
    return {key: value - begun_s if key.endswith("_s") else value for key, value in found.items()}


def measure(what: str, model: str, backend: str, precision: str, threads: int, rounds: int) -> dict[str, Any]:
    """Cold and cached starts, in turn; medians and the slowest."""
    starts: dict[str, list[dict[str, Any]]] = {"cold": [], "cached": []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as cache:
            for kind in starts:
                starts[kind].append(start(what, model, backend, precision, threads, Path(cache)))
    figures: dict[str, Any] = {"runs": starts["cold"][0]["name"]}
    for kind, found in starts.items():
        ready = [run["ready_s"] for run in found]
        figures[kind] = {
            "ready_s": float(np.median(ready)),
            "slowest_s": max(ready),
            "imports_s": float(np.median([run["imported_s"] for run in found])),
        }
    return figures


def main() -> None:
    """Measure, print and write."""
    if sys.argv[1:2] == ["--child"]:
        _, _, what, model, backend, precision, threads = sys.argv
        print("\n" + json.dumps(CHILDREN[what](model, backend, precision, int(threads))))
        return
    from surg_perception.models import find_model
    from surg_perception.runtime import default_threads
    from surg_perception.runtime.agreement import reference_frames

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="*", default=["gsvit_m0_phantom"], help="names or folders")
    parser.add_argument("--no-m5", action="store_true", help="without GSViT-M5 with the paper's head, random weights")
    parser.add_argument("--starts", default="", help="only those with this in their name, as 'node openvino'")
    parser.add_argument("--rounds", type=int, default=5, help="cold and cached starts each (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=default_threads(), help="of each engine (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out/bench_startup.json"))
    options = parser.parse_args()

    console = Console()
    content: dict[str, Any] = {
        "machine": machine(),
        "threads": options.threads,
        "rounds": options.rounds,
        "input": {"frames": len(reference_frames()), "sha256": sha256_of_arrays(reference_frames())},
        "models": {},
    }
    kinds = [kind for kind in CHILDREN if kind != "node" or importlib.util.find_spec("surg_perception_msgs")]
    with tempfile.TemporaryDirectory() as folder:
        cards = [find_model(name) for name in options.model]
        if not options.no_m5:
            from bench_models import random_m5

            cards.append(random_m5(Path(folder) / "gsvit_m5_random"))
        for card in cards:
            table = Table("start", "cold s", "cached s", "slowest cached s", "of it imports s", title=card.model_id)
            found: dict[str, Any] = {}
            cases = [(kind, *engine) for kind in kinds for engine in ENGINES]
            for kind, backend, precision in track(cases, description=card.name, transient=True):
                name = f"{kind} {backend}:CPU:{precision}"
                if options.starts not in name:
                    continue
                try:
                    found[name] = figures = measure(
                        kind, str(card.folder), backend, precision, options.threads, options.rounds
                    )
                except RuntimeError as error:
                    found[name] = {"not_run": str(error)}
                    table.add_row(name, str(error))
                    continue
                cold, cached = figures["cold"], figures["cached"]
                seconds = (cold["ready_s"], cached["ready_s"], cached["slowest_s"], cached["imports_s"])
                table.add_row(name, *(f"{value:.2f}" for value in seconds))
            content["models"][card.name] = {"model_id": card.model_id, "starts": found}
            console.print(table)
    write_json(options.out, content)
    console.print(f"written to {options.out}")


if __name__ == "__main__":
    main()
