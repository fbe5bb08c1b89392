# SPDX-License-Identifier: Apache-2.0
"""Engines are built, checked against fp32, and kept; in this process, or in one of its own for a node that serves."""

from __future__ import annotations

import json
import logging
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surg_perception.models import CARD_NAME, ModelCard, sha256_of
from surg_perception.runtime.agreement import Agreement, Outputs, compare, unsound
from surg_perception.runtime.backend import (
    BACKENDS,
    LADDER,
    BackendUnavailable,
    PrecisionRefused,
    first_line,
)
from surg_perception.runtime.cuda_device import CudaDevice, CudaError, Gpu
from surg_perception.runtime.engine_cache import EngineCache, EngineKey, Entry
from surg_perception.runtime.engine_graph import GRAPH_VERSION, engine_graph, rounding_shown
from surg_perception.runtime.graph import FRAME_SHAPE
from surg_perception.runtime.tensorrt_layer import (
    WORKSPACE_MIB,
    EngineRunner,
    Library,
    Progress,
    build_engine,
)

CPU_ENGINES = ("onnxruntime", "openvino", "torch")
"""Engines whose fp32 on the CPU can stand for the model, cheapest to load first."""
_logger = logging.getLogger("surg_perception.runtime")


def engine_key(
    card: ModelCard, library: Library, precision: str, gpu: Gpu | None, targets: Sequence[str] = ()
) -> EngineKey:
    """What an engine of a model is found by.

    Args:
        card: the model; the graph's sha256 is taken from the file.
        library, precision: what builds and runs it, and how it computes.
        gpu: the GPU here; None where there is none, which only TensorRT-RTX can do without.
        targets: compute capabilities to build for (TensorRT-RTX); this GPU's unless told.

    Raises:
        BackendUnavailable: neither a GPU nor targets, or a target that the library does not have.
    """
    if not library.ahead_of_time:
        if targets:
            raise BackendUnavailable(
                f"{library.flavour} tunes engines on the GPU that is there and takes no targets; "
                "leave --targets out, or build with tensorrt_rtx"
            )
        if gpu is None:
            raise BackendUnavailable(f"{library.flavour} builds on a GPU, and there is none here; build on the target")
    chosen = tuple(sorted(set(targets))) or ((gpu.target,) if gpu is not None else ())
    if not chosen:
        raise BackendUnavailable(f"there is no GPU here: name targets, of {', '.join(library.targets)}")
    unknown = [target for target in chosen if library.ahead_of_time and target not in library.targets]
    if unknown:
        raise BackendUnavailable(
            f"{library.flavour} {library.version} does not build for {', '.join(unknown)}; "
            f"it builds for {', '.join(library.targets)}"
        )
    options: dict[str, Any] = {"graph_version": GRAPH_VERSION, "strongly_typed": library.strongly_typed}
    if not library.ahead_of_time:
        options["workspace_mib"] = WORKSPACE_MIB
    return EngineKey(
        graph_sha256=sha256_of(card.graph_path),
        flavour=library.flavour,
        version=library.version,
        gpu=gpu.name if gpu is not None and not library.ahead_of_time else "",
        targets=chosen,
        precision=precision,
        shapes={"frame": (1, *FRAME_SHAPE)},
        options=options,
    )


@dataclass(frozen=True)
class Attempt:
    """What came of one precision.

    Attributes:
        precision: the one that was tried.
        graph: the graph in this precision, on the CPU, against the reference; None where it was not measured.
        engine: the engine on this GPU against the reference; None where there is none to run it.
        entry: the engine in the cache; None if it was refused.
        cached: whether it was there already.
        seconds, memory_mib, gpu_mib: what building took: time, most memory of the process, most GPU memory in use.
        refused: why, "" if it passed.
    """

    precision: str
    graph: Agreement | None = None
    engine: Agreement | None = None
    entry: Entry | None = None
    cached: bool = False
    seconds: float = 0.0
    memory_mib: int = 0
    gpu_mib: int = 0
    refused: str = ""


@dataclass(frozen=True)
class Reference:
    """What fp32 gives on some frames, and which engine said so."""

    name: str
    frames: NDArray[np.uint8]
    outputs: Outputs

    @classmethod
    def of(cls, card: ModelCard, frames: NDArray[np.uint8], threads: int, first: str = "torch") -> Reference:
        """The numbers of one engine where it is installed and runs the model, else those of another.

        Raises:
            BackendUnavailable: no engine runs the model on the CPU, with every reason.
        """
        with cpu_engine(card, threads, tuple(dict.fromkeys((first, *CPU_ENGINES)))) as opened:
            return cls(opened.name, frames, opened.infer_batch(frames))

    def judge(self, outputs: Outputs) -> tuple[Agreement, str]:
        """How outputs agree, and why they are refused ("" if they hold)."""
        agreement = compare(outputs, self.outputs)
        problems = list(unsound(outputs))
        if not agreement.holds:
            problems.append(f"disagrees with {self.name} on {len(self.frames)} frames: {agreement}")
        return agreement, "; ".join(problems)


def cpu_engine(card: ModelCard, threads: int, kinds: Sequence[str] = CPU_ENGINES) -> Any:
    """The first of these engines that runs a model in fp32 on the CPU.

    Raises:
        BackendUnavailable: none does, with every reason.
    """
    reasons = []
    for kind in kinds:
        if kind == "torch" and card.weights is None:
            reasons.append("torch: the model has no weights")  # told before PyTorch is imported
            continue
        try:
            engine = BACKENDS[kind]()
            getattr(card, f"{engine.needs}_path")
            return engine(card, "CPU", "fp32", threads)
        except Exception as error:
            reasons.append(f"{kind}: {first_line(error)}")
    raise BackendUnavailable(f"no engine gives fp32 on the CPU to compare with: {'; '.join(reasons)}")


@dataclass(frozen=True)
class Workbench:
    """All that building engines of one model takes.

    Attributes:
        card: the model.
        library, cache: what builds, and where engines are kept.
        cuda: the GPU here; None where there is none.
        targets: compute capabilities to build for; empty for this GPU's.
        reference: what engines must agree with.
        threads: of the CPU, for checks.
        tell: told the progress of a build.
        say: told what happens, in sentences.
    """

    card: ModelCard
    library: Library
    cache: EngineCache
    cuda: CudaDevice | None
    targets: tuple[str, ...]
    reference: Reference
    threads: int = 1
    tell: Progress = lambda done, phase: None
    say: Callable[[str], None] = lambda text: None

    def build(self, precision: str, strict: bool = False, force: bool = False) -> list[Attempt]:
        """Engines in falling precision of `LADDER`, until one passes; the last one passed, or none did.

        Args:
            precision: the first to be tried.
            strict: this precision or none.
            force: build even if the cache has the engine.

        Raises:
            BackendUnavailable, EngineError, CacheError, ModelError, ImportError: nothing can be built here.
        """
        attempts = []
        for wanted in (precision,) if strict else (precision, *LADDER.get(precision, ())):
            attempts.append(self._attempt(wanted, force))
            if not attempts[-1].refused:
                break
            self.say(f"{wanted} is refused: {attempts[-1].refused}")
        return attempts

    def _attempt(self, precision: str, force: bool) -> Attempt:
        gpu = None if self.cuda is None else self.cuda.gpu
        key = engine_key(self.card, self.library, precision, gpu, self.targets)
        entry, _ = self.cache.find(key)
        graph = engine_graph(self.card.graph_path, precision)
        agreement, refused = self._on_cpu(graph)
        attempt = Attempt(precision, graph=agreement, cached=entry is not None and not force, refused=refused)
        if refused:
            return attempt
        meter = _Meter(self.cuda)

        def build() -> tuple[bytes, Mapping[str, Any]]:
            with meter:
                engine = build_engine(self.library, graph, key.targets if self.library.ahead_of_time else (), self.tell)
            notes: dict[str, Any] = {"seconds": round(meter.seconds, 1), "model": self.card.model_id}
            if attempt.graph is not None:
                notes["graph_agreement"] = vars(attempt.graph)
            return engine, notes

        entry = self.cache.get(key, build, force, self.say)
        attempt = replace(
            attempt, entry=entry, seconds=meter.seconds, memory_mib=meter.memory_mib, gpu_mib=meter.gpu_mib
        )
        if gpu is None or gpu.target not in entry.facts["key"]["targets"]:
            return attempt
        agreement, refused = self._on_gpu(entry)
        if refused:
            self.cache.remove(entry)
            return replace(attempt, engine=agreement, refused=refused, entry=None)
        self.cache.note(entry, engine_agreement=vars(agreement))
        return replace(attempt, engine=agreement)

    def _on_cpu(self, graph: bytes) -> tuple[Agreement | None, str]:
        """Whether the graph, in its precision, still computes the model; unknown without ONNX Runtime."""
        try:
            from surg_perception.runtime.onnxruntime_backend import outputs_of
        except ImportError:
            return None, ""
        return self.reference.judge(outputs_of(rounding_shown(graph), self.reference.frames, self.threads))

    def _on_gpu(self, entry: Entry) -> tuple[Agreement, str]:
        assert self.cuda is not None
        runner = EngineRunner(self.library, entry.read(), self.cuda, self.cache.read_jit(entry))
        try:
            agreement, refused = self.reference.judge(on_frames(runner, self.reference.frames))
            kernels = runner.kernels()
            if kernels is not None and not refused:
                self.cache.write_jit(entry, kernels)
        finally:
            runner.close()
        return agreement, refused


def on_frames(runner: EngineRunner, frames: NDArray[np.uint8]) -> Outputs:
    """Outputs of an engine on frames uint8 [N, 224, 224, 3]."""
    rows = [runner.run(frame[np.newaxis]) for frame in frames]
    latents = np.concatenate([row["latent"] for row in rows])
    if "probabilities" not in rows[0]:
        return np.zeros((len(frames), 0), np.float32), latents
    return np.concatenate([row["probabilities"] for row in rows]), latents


class _Meter:
    """Time and memory of a build."""

    def __init__(self, cuda: CudaDevice | None) -> None:
        self.seconds, self.memory_mib, self.gpu_mib = 0.0, 0, 0
        self._cuda = cuda
        self._stop = threading.Event()

    def __enter__(self) -> _Meter:
        self._started_s = time.monotonic()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        if self._cuda is not None:
            self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.2):
            try:
                self.gpu_mib = max(self.gpu_mib, self._cuda.memory_used_mib() if self._cuda is not None else 0)
            except CudaError:
                return

    def __exit__(self, *_: object) -> None:
        self.seconds = time.monotonic() - self._started_s
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        self.memory_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


class EngineBuilder:
    """Builds engines in a process of its own, at low priority: it can be stopped, and takes nothing down with it.

    Attributes:
        progress: what is being done, for people; "" while nothing is.
    """

    def __init__(self, say: Callable[[str], None] = _logger.info, niceness: int = 10) -> None:
        self.progress = ""
        self._say = say
        self._niceness = niceness
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._cancelled = False

    def build(self, card: ModelCard, precision: str, flavour: str) -> None:
        """Have the engine of a model in the cache, built in this precision and checked on this GPU.

        Raises:
            PrecisionRefused: it disagrees with fp32.
            BackendUnavailable: it could not be built, with the reason, or `cancel` was called.
        """
        model = card.folder if (card.folder / CARD_NAME).is_file() else card.graph_path
        command = [sys.executable, "-m", "surg_perception.cli.main", "build-engine", str(model), "--json", "--strict"]
        command += ["--precision", precision, "--flavour", flavour, "--niceness", str(self._niceness)]
        command += ["--reference", CPU_ENGINES[0]]  # PyTorch takes seconds to load
        what = f"an engine of {card.model_id} for {flavour} in {precision}"
        self._say(f"{what} is built; this can take minutes, once")
        with tempfile.TemporaryFile("w+") as errors:
            with self._lock:
                if self._cancelled:
                    raise BackendUnavailable("the build was cancelled")
                # In a session of its own, so that Ctrl-C reaches the node alone, which then stops this.
                self._process = subprocess.Popen(
                    command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
                )
            result: dict[str, Any] = {}
            try:
                result = self._follow(self._process, what)
                status = self._process.wait()
            finally:
                self._process.kill()
                self._process.wait()
                self.progress = ""
            errors.seek(0)
            said = errors.read().strip()
        if self._cancelled:
            raise BackendUnavailable("the build was cancelled")
        if status == 0:
            self._say(f"{what} is ready")
            return
        if result.get("refused"):
            raise PrecisionRefused(result["refused"])
        reason = said.splitlines()[-1] if said else "it said nothing"
        how = f"signal {-status}" if status < 0 else f"status {status}"
        raise BackendUnavailable(f"{what} could not be built ({how}): {reason}")

    def _follow(self, process: subprocess.Popen[str], what: str) -> dict[str, Any]:
        """Read what the process says; its result."""
        result: dict[str, Any] = {}
        told = 0.0
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                try:
                    message = json.loads(line)
                except json.JSONDecodeError:
                    continue  # a library that prints on its own
                if "done" in message:
                    self.progress = f"{what}: {message['done']:.0%}, {message['phase']}"
                    if time.monotonic() > told + 10.0:
                        told = time.monotonic()
                        self._say(self.progress)
                elif "attempts" in message:
                    result = message
        return result

    def cancel(self) -> None:
        """Stop the build under way, and refuse further ones."""
        with self._lock:
            self._cancelled = True
            if self._process is not None:
                self._process.kill()
