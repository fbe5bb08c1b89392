# SPDX-License-Identifier: Apache-2.0
"""Could decoding and resizing on a GPU pay? The CPU's whole way against what a GPU cannot do without.

    python benchmarks/bench_preprocess.py

cpu: an image message becomes the model's input, uint8 [224, 224, 3] (`stream.image_decode.decode_to_model_input`).
copy: the whole image is copied into the page-locked buffer that a GPU reads from; a message comes in the middleware's
memory, so no GPU's way is without this. Ordinary memory stands in for page-locked here, which the CPU writes no faster.
pcie: the image's bytes at a rate that is given, not measured. The GPU's own work, its launches and the wait for it come
on top: copy + pcie is less than a GPU takes. cpu + input is what runs now; input: the model's input at the same rate.

Messages differ and take turns, so that none lies in the processor's caches; each round times all ways in turn.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from report import machine, write_json
from rich.console import Console
from rich.table import Table

from surg_perception.stream.image_decode import decode_to_model_input

SIZES = {"480p": (640, 480), "1080p": (1920, 1080), "4K": (3840, 2160)}
ENCODINGS = {"bgr8": 3, "uyvy": 2}
MESSAGES = 6
INPUT_BYTES = 224 * 224 * 3


def messages(width: int, height: int, encoding: str) -> list[SimpleNamespace]:
    """Image messages of smooth noise, as many as take turns."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(MESSAGES):
        small = rng.integers(0, 256, (height // 16, width // 16, 3), np.uint8)
        picture = cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)
        if encoding == "uyvy":
            picture = cv2.cvtColor(picture, cv2.COLOR_BGR2YUV_UYVY)
        name = {"uyvy": "yuv422"}.get(encoding, encoding)
        step = width * ENCODINGS[encoding]
        data = memoryview(picture.tobytes())
        found.append(SimpleNamespace(encoding=name, height=height, width=width, step=step, is_bigendian=0, data=data))
    return found


def measure(width: int, height: int, encoding: str, rounds: int, pcie_gb_s: float) -> dict[str, Any]:
    """Milliseconds of each way, least and median; of pcie as computed."""
    all_messages = messages(width, height, encoding)
    size = len(all_messages[0].data)
    staging = np.zeros(size, np.uint8)

    def copy(message: SimpleNamespace) -> None:
        np.copyto(staging, np.frombuffer(message.data, np.uint8))

    ways: dict[str, Callable[[SimpleNamespace], Any]] = {"cpu": decode_to_model_input, "copy": copy}
    times_ms: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds):
        for offset, (name, way) in enumerate(ways.items()):
            message = all_messages[(turn * len(ways) + offset) % MESSAGES]
            started_s = time.perf_counter()
            way(message)
            times_ms[name].append((time.perf_counter() - started_s) * 1e3)
    figures: dict[str, Any] = {"bytes": size, "pcie_ms": size / pcie_gb_s / 1e6}
    figures["input_pcie_ms"] = INPUT_BYTES / pcie_gb_s / 1e6
    for name, values in times_ms.items():
        kept: NDArray[Any] = np.array(values[len(ways) :])  # the first ones meet cold code
        figures[name] = {"min_ms": float(kept.min()), "p50_ms": float(np.median(kept))}
    return figures


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200, help="of every way (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of OpenCV (default: %(default)s)")
    parser.add_argument("--pcie", type=float, default=24.0, help="GB/s to the GPU (default: PCIe 4 x16, %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out/bench_preprocess.json"))
    options = parser.parse_args()

    cv2.setNumThreads(options.threads)
    content: dict[str, Any] = {
        "machine": machine(),
        "threads": options.threads,
        "pcie_gb_s": options.pcie,
        "images": {},
    }
    table = Table(
        "image", "MB", "cpu ms", "copy ms", f"pcie ms at {options.pcie:g} GB/s", "(copy + pcie) / (cpu + input)"
    )
    for size, (width, height) in SIZES.items():
        for encoding in ENCODINGS:
            figures = measure(width, height, encoding, options.rounds, options.pcie)
            content["images"][f"{size} {encoding}"] = figures
            cpu = figures["cpu"]["p50_ms"] + figures["input_pcie_ms"]
            gpu = figures["copy"]["p50_ms"] + figures["pcie_ms"]
            cells = (figures["bytes"] / 1e6, figures["cpu"]["p50_ms"], figures["copy"]["p50_ms"], figures["pcie_ms"])
            table.add_row(f"{size} {encoding}", *(f"{value:.2f}" for value in (*cells, gpu / cpu)))
    Console().print(table)
    write_json(options.out, content)
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
