# SPDX-License-Identifier: Apache-2.0
"""`surg-perception build-engine`: TensorRT engines, built, checked against fp32, and kept for the nodes."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from rich.table import Table

    from surg_perception.runtime.engine_build import Attempt

_FRAMES = 64


def add_parser(verbs: Any) -> None:
    """Add the verb `build-engine` to the command line."""
    build = verbs.add_parser(
        "build-engine",
        help="build a model's TensorRT engine, check it against fp32, and keep it for the nodes",
        description="Builds a TensorRT engine of a model, or takes the one in the cache, compares it with fp32 on "
        "frames, and keeps it where nodes look for it. Where a precision disagrees, norms and softmax in fp32 are "
        "tried next, then fp32. TensorRT-RTX builds without a GPU for named targets; what could not be measured then "
        "is said. Exit status 1: no precision passed.",
    )
    build.add_argument("model", metavar="MODEL", help="name or folder of a model, or an ONNX file")
    build.add_argument("--flavour", choices=("tensorrt", "tensorrt_rtx"), help="default: TensorRT, else TensorRT-RTX")
    build.add_argument(
        "--precision",
        choices=("fp32", "fp16", "fp16-mixed"),
        default="fp16",
        help="fp16-mixed: norms and softmax in fp32 (default: %(default)s)",
    )
    build.add_argument(
        "--strict", action="store_true", help="this precision or none, instead of the next one that agrees"
    )
    build.add_argument(
        "--targets", metavar="LIST", default="", help="compute capabilities by commas, as sm86,sm89 (TensorRT-RTX)"
    )
    build.add_argument(
        "--out", type=Path, metavar="DIR", help="also copy engine and side file there, to bring to the target"
    )
    build.add_argument("--force", action="store_true", help="build even if the cache has the engine")
    build.add_argument(
        "--frames",
        metavar="PATH",
        help=f"video or folder of images to compare on, {_FRAMES} of it (default: 16 pictures of the phantom)",
    )
    build.add_argument(
        "--reference",
        choices=("torch", "onnxruntime", "openvino"),
        default="torch",
        help="whose fp32 on the CPU to compare with; another one where it does not run (default: %(default)s)",
    )
    build.add_argument("--threads", type=int, default=0, metavar="N", help="of the CPU (default: cores, at most four)")
    build.add_argument("--niceness", type=int, default=0, choices=range(20), metavar="0..19", help="give way to others")
    build.add_argument("--json", action="store_true", help="one JSON object a line, for programs")
    build.set_defaults(run=_build_engine)


def _build_engine(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from surg_perception.models import find_model
    from surg_perception.runtime import BackendUnavailable, default_threads
    from surg_perception.runtime.cuda_device import CudaDevice, CudaError
    from surg_perception.runtime.engine_build import Reference, Workbench, engine_key
    from surg_perception.runtime.engine_cache import CacheError, EngineCache
    from surg_perception.runtime.tensorrt_layer import EngineError, find_library

    os.nice(options.niceness)
    console = Console(quiet=options.json)
    card = find_model(options.model)
    threads = options.threads or default_threads()
    targets = tuple(target for target in options.targets.lower().replace(" ", "").split(",") if target)
    try:
        library = find_library(options.flavour)
        try:
            cuda, no_cuda = CudaDevice(), ""
        except BackendUnavailable as error:
            cuda, no_cuda = None, str(error)
        cache = EngineCache()
        # Says at once what cannot be, before the slow part.
        engine_key(card, library, options.precision, None if cuda is None else cuda.gpu, targets)
        reference = Reference.of(card, frames_of(options.frames), threads, options.reference)
        progress = Progress(
            TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console, transient=True
        )
        with progress:
            task = progress.add_task("reading the graph", total=1.0)

            def tell(done: float, phase: str) -> None:
                progress.update(task, completed=done, description=phase)
                if options.json:
                    _say_json(done=round(done, 4), phase=phase)

            def say(text: str) -> None:
                progress.console.print(text, markup=False, highlight=False)

            bench = Workbench(card, library, cache, cuda, targets, reference, threads, tell, say)
            attempts = bench.build(options.precision, options.strict, options.force)
    except (BackendUnavailable, EngineError, CacheError, CudaError) as error:
        raise ValueError(f"no engine of {card.model_id}: {error}") from error
    last = attempts[-1]
    if last.entry is not None and options.out is not None:
        _copy(last.entry.path, options.out)
    if options.json:
        _say_json(attempts=[_facts(attempt) for attempt in attempts], refused=last.refused)
        return 1 if last.refused else 0
    console.print(_table(f"{card.model_id}, {library.flavour} {library.version}", attempts))
    lines = [f"compared with {reference.name} on {len(reference.frames)} frames"]
    if last.refused:
        lines.append(f"no precision passed; the last reason: {last.refused}")
    elif last.entry is not None:
        lines.append(f"{last.precision} passed: {last.entry.path}")
        if last.engine is None:
            lines += [
                f"The engine itself was not run here ({no_cuda or 'it is for another GPU'}): whether it agrees with "
                "fp32 was not measured.",
                "On the target, with the engine's two files in the folder surg_perception/engines of its cache "
                "($XDG_CACHE_HOME, else ~/.cache), run: surg-perception "
                f"build-engine {card.name} --flavour {library.flavour} --precision {last.precision}",
            ]
    if options.out is not None and last.entry is not None:
        lines.append(f"copied to {options.out}")
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return 1 if last.refused else 0


def frames_of(path: str | None) -> NDArray[Any]:
    """Frames uint8 [N, 224, 224, 3], BGR: spread over what lies at a path, else of the phantom."""
    import cv2
    import numpy as np

    from surg_perception.data.frames import open_source
    from surg_perception.runtime.agreement import reference_frames

    if path is None:
        return reference_frames()
    kept: list[Any] = []
    every = 1
    with open_source(path) as source:
        for frame in source:
            if frame.index % every:
                continue
            kept.append(cv2.resize(frame.bgr, (224, 224), interpolation=cv2.INTER_LINEAR))
            if len(kept) == 2 * _FRAMES:  # however long it is, evenly spread in the end
                kept, every = kept[::2], 2 * every
    if len(kept) > _FRAMES:
        kept = [kept[round(i)] for i in np.linspace(0, len(kept) - 1, _FRAMES)]
    return np.stack(kept)


def _copy(engine: Path, folder: Path) -> None:
    """Copy an engine and its side file, each in one step, readable for the user alone."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in (engine, engine.with_suffix(".json")):
        partial = folder / f".{path.name}.{os.getpid()}.partial"
        try:
            partial.touch(mode=0o600, exist_ok=False)
            partial.write_bytes(path.read_bytes())
            os.replace(partial, folder / path.name)
        finally:
            partial.unlink(missing_ok=True)


def _table(title: str, attempts: list[Attempt]) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for heading in ("precision", "measured on", "max |dp|", "mean |dp|", "same phase", "latent cosine", "result"):
        table.add_column(heading, justify="right" if "|" in heading or "same" in heading else "left")
    for attempt in attempts:
        for name, agreement in (("graph, on the CPU", attempt.graph), ("engine, on this GPU", attempt.engine)):
            figures = (f"{name.split(',')[0]}: not measured here", "", "", "", "")
            if agreement is not None:
                figures = (
                    name,
                    f"{agreement.probability_difference:.2g}",
                    f"{agreement.mean_difference:.2g}",
                    f"{agreement.same_phase:.0%}",
                    f"{agreement.latent_cosine:.6f}",
                )
            ends = (attempt.precision, _result(attempt)) if name.startswith("graph") else ("", "")
            table.add_row(ends[0], *figures, ends[1])
    return table


def _result(attempt: Attempt) -> str:
    if attempt.refused:
        return "refused"
    if attempt.entry is None:
        return ""
    size = f"{attempt.entry.facts['bytes'] / 2**20:.0f} MiB"
    if attempt.cached:
        return f"passed; from the cache, {size}"
    gpu = f", GPU {attempt.gpu_mib} MiB" if attempt.gpu_mib else ""
    return f"passed; built in {attempt.seconds:.1f} s, {size}, memory {attempt.memory_mib} MiB{gpu}"


def _facts(attempt: Attempt) -> dict[str, Any]:
    return {
        "precision": attempt.precision,
        "refused": attempt.refused,
        "cached": attempt.cached,
        "seconds": round(attempt.seconds, 2),
        "memory_mib": attempt.memory_mib,
        "gpu_mib": attempt.gpu_mib,
        "engine": str(attempt.entry.path) if attempt.entry is not None else None,
        "graph_agreement": vars(attempt.graph) if attempt.graph is not None else None,
        "engine_agreement": vars(attempt.engine) if attempt.engine is not None else None,
    }


def _say_json(**message: Any) -> None:
    try:
        print(json.dumps(message), flush=True)
    except BrokenPipeError:  # who asked for the engine is gone
        os._exit(1)
