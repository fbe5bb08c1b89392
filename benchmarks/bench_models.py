# SPDX-License-Identifier: Apache-2.0
"""Time of one frame through the model, each engine against PyTorch eager, all in one run.

Every round times a few frames in every engine in turn, so that whatever else the machine does falls on all of them.
The base is the network as PyTorch runs it (`FrameGraph` in fp32, batch norm not folded). Ratios are of medians and
of the fastest frames. Run it on a machine that does nothing else: PyTorch's OpenMP threads spin while they wait, so
any neighbour makes PyTorch many times slower and the ratios of medians as much too good.

Engines are timed whether or not the runtime would take them: the column "agrees" says whether it would
(`surg_perception.runtime.agreement`).

GSViT-M5 with the paper's phase head has random weights here, made anew in a temporary folder: times do not depend on
them, and in bf16 its latents differ from fp32 as those of a trained GSViT-M0 do (cosine 0.9999).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from report import machine, sha256_of_arrays, write_json
from rich.console import Console
from rich.progress import track
from rich.table import Table

from surg_perception.data.labels import CHOLEC80_PHASES
from surg_perception.gsvit import FrameGraph, GSViT, GSViTConfig, load_gsvit, save_model_folder
from surg_perception.models import LabelFacts, ModelCard, ModelError, find_model
from surg_perception.runtime import BACKENDS, PRECISIONS, Backend, BackendUnavailable, default_threads
from surg_perception.runtime.agreement import Outputs, compare, reference_frames

EAGER = "torch eager"
BUSY_LOAD = 0.5
Infer = Callable[[NDArray[np.uint8]], Outputs]


def random_m5(folder: Path) -> ModelCard:
    """GSViT-M5 with the paper's head and random weights, every branch at work."""
    torch.manual_seed(0)
    model = GSViT(GSViTConfig(size="m5", decoder=False, classes=len(CHOLEC80_PHASES), head_hidden=(2048, 512)))
    for module in model.modules():  # timm starts the ends of residual branches at 0
        if isinstance(module, torch.nn.BatchNorm2d) and not module.weight.any():
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    return save_model_folder(
        model.eval(),
        folder,
        name="gsvit_m5_random",
        version="1",
        labels=LabelFacts("cholec80", CHOLEC80_PHASES),
        metrics={},
        training={},
        licence="Apache-2.0",
        intended_use="Timing.",
    )


def eager(card: ModelCard) -> Infer:
    """The network as PyTorch runs it, fp32, on the CPU."""
    graph = FrameGraph(load_gsvit(card.folder))

    def infer(frame: NDArray[np.uint8]) -> Outputs:
        with torch.inference_mode():
            probabilities, latent = graph(torch.tensor(frame)[None])
        return probabilities[0].numpy(), latent[0].numpy()

    return infer


def engines(card: ModelCard, threads: int) -> Iterator[tuple[str, Backend | str]]:
    """Every engine, device and precision: loaded, or the reason why not."""
    for kind, load in BACKENDS.items():
        try:
            engine = load()
        except BackendUnavailable as error:
            yield kind, str(error)
            continue
        for device in engine.devices:
            for precision in PRECISIONS:
                name = f"{kind}:{device}:{precision}"
                try:
                    yield name, engine.refusal(device, precision) or engine(card, device, precision, threads)
                except BackendUnavailable as error:  # an engine that has not been built, a server without an address
                    yield name, str(error)


def on_all(infer: Infer, frames: NDArray[np.uint8]) -> Outputs:
    """Outputs of all frames, one by one."""
    results = [infer(frame) for frame in frames]
    return np.stack([p for p, _ in results]), np.stack([z for _, z in results])


def measure(card: ModelCard, frames: NDArray[np.uint8], threads: int, rounds: int, burst: int) -> dict[str, Any]:
    """Times and agreement of every engine on one model."""
    backends: dict[str, Backend] = {}
    skipped: dict[str, str] = {}
    for name, engine in engines(card, threads):
        if isinstance(engine, str):
            skipped[name] = engine
        else:
            backends[name] = engine
    torch.set_num_threads(threads)
    runs: dict[str, Infer] = {EAGER: eager(card)} | {name: engine.infer for name, engine in backends.items()}
    outputs = {name: on_all(infer, frames) for name, infer in runs.items()}
    times_s: dict[str, list[float]] = {name: [] for name in runs}
    for turn in track(range(rounds), description=card.name, transient=True):
        for name, infer in runs.items():
            infer(frames[turn % len(frames)])  # brings this engine's weights back into the caches
            for step in range(burst):
                frame = frames[(turn + step) % len(frames)]
                started_s = time.perf_counter()
                infer(frame)
                times_s[name].append(time.perf_counter() - started_s)
    for engine in backends.values():
        engine.close()
    figures = {}
    for name, values in times_s.items():
        ms = np.array(values) * 1e3
        agreement = compare(outputs[name], outputs[EAGER])
        figures[name] = {
            "p50_ms": float(np.median(ms)),
            "p99_ms": float(np.percentile(ms, 99)),
            "mean_ms": float(ms.mean()),
            "min_ms": float(ms.min()),
            "times_faster_p50": float(np.median(times_s[EAGER]) * 1e3 / np.median(ms)),
            "times_faster_min": float(min(times_s[EAGER]) * 1e3 / ms.min()),
            "max_probability_difference": agreement.probability_difference,
            "phase_changes": agreement.phase_changes,
            "min_latent_cosine": agreement.latent_cosine,
            "agrees": agreement.holds,
        }
    return {"model_id": card.model_id, "engines": figures, "not_run": skipped}


def table(result: dict[str, Any], threads: int) -> Table:
    """The figures of one model for a reader."""
    shown = Table(
        "engine",
        "p50 ms",
        "p99 ms",
        "mean ms",
        "fastest ms",
        "× eager (p50)",
        "× eager (fastest)",
        "max |Δp|",
        "latent cosine",
        "agrees",
        title=f"{result['model_id']}, one frame, {threads} threads",
    )
    for name, f in result["engines"].items():
        shown.add_row(
            name,
            *(f"{f[key]:.2f}" for key in ("p50_ms", "p99_ms", "mean_ms", "min_ms")),
            *(f"{f[key]:.2f}" for key in ("times_faster_p50", "times_faster_min")),
            f"{f['max_probability_difference']:.1e}",
            f"{f['min_latent_cosine']:.6f}",
            "yes" if f["agrees"] else "no",
        )
    return shown


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="*", default=["gsvit_m0_phantom"], help="beside GSViT-M5: names or folders")
    parser.add_argument("--frames", type=Path, help="folder of images (default: sixteen frames of the phantom)")
    parser.add_argument("--rounds", type=int, default=60, help="turns of every engine (default: %(default)s)")
    parser.add_argument("--burst", type=int, default=5, help="timed frames a turn (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=default_threads(), help="of each engine (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out/bench_models.json"))
    options = parser.parse_args()

    frames = reference_frames()
    if options.frames:
        files = sorted(path for path in options.frames.rglob("*") if path.suffix.lower() in (".jpg", ".png"))
        if not files:
            parser.error(f"{options.frames} holds no .jpg or .png")
        chosen = [files[int(i)] for i in np.linspace(0, len(files) - 1, min(16, len(files)))]
        frames = np.stack([cv2.resize(cv2.imread(str(path)), (224, 224)) for path in chosen])

    content: dict[str, Any] = {
        "machine": machine(),
        "threads": options.threads,
        "input": {"frames": len(frames), "sha256": sha256_of_arrays(frames)},
        "models": {},
    }
    console = Console()
    if content["machine"]["load_before"] > BUSY_LOAD:
        console.print(f"[red]load {content['machine']['load_before']}: too busy a machine for ratios to be trusted")
    with tempfile.TemporaryDirectory() as folder:
        cards = [random_m5(Path(folder) / "gsvit_m5_random")]
        for name in options.model:
            try:
                cards.append(find_model(name))
            except ModelError as error:
                console.print(f"left out: {error}")
        for card in cards:
            result = measure(card, frames, options.threads, options.rounds, options.burst)
            content["models"][card.name] = result
            console.print(table(result, options.threads))
            for name, reason in result["not_run"].items():
                console.print(f"[dim]{name}: {reason}")
    write_json(options.out, content)
    console.print(f"written to {options.out}")


if __name__ == "__main__":
    main()
