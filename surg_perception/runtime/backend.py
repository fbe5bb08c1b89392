# SPDX-License-Identifier: Apache-2.0
"""One interface to the inference engines, and the choice among those that truly run on this machine."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import logging
import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from surg_perception.models import ModelCard, ModelError, find_model
from surg_perception.runtime.agreement import Agreement, Outputs, compare, reference_frames, unsound
from surg_perception.runtime.graph import FRAME_SHAPE
from surg_perception.runtime.model_repository import MAX_BATCH, ModelServer

if TYPE_CHECKING:
    from surg_perception.runtime.engine_build import EngineBuilder

PRECISIONS = ("fp32", "bf16", "fp16", "fp16-mixed", "fp32-w8", "bf16-w8")
"""What can be asked for; "fp16-mixed" is fp16 with norms and softmax in fp32, "-w8" computes in fp32 or bf16 with the
phase head's weights held in int8."""
LADDER = {
    "fp16": ("fp16-mixed", "fp32"),
    "fp16-mixed": ("fp32",),
    "bf16": ("fp32",),
    "fp32-w8": ("fp32",),
    "bf16-w8": ("bf16", "fp32-w8", "fp32"),
}
"""What is tried, in this order, where a precision does not agree with fp32."""
MAX_DEFAULT_THREADS = 4
_WITHOUT_FP16 = ("openvino", "onnxruntime", "torch")  # known without importing them, which can take seconds
_logger = logging.getLogger("surg_perception.runtime")


class BackendUnavailable(RuntimeError):
    """No engine runs as asked; says which were tried and why each one does not.

    Attributes:
        unbuilt: names of engines that would run here, had they been built.
    """

    unbuilt: Sequence[str] = ()


class PrecisionRefused(BackendUnavailable):
    """An engine runs, but at the asked precision its outputs are not those of fp32."""


class EngineMissing(BackendUnavailable):
    """An engine would run here, but has to be built first."""


class InferenceError(RuntimeError):
    """An engine that had loaded failed on a frame.

    Attributes:
        backend: its name.
        device_failed: whether a call on a GPU failed, after which nothing on it can be expected to work.
    """

    def __init__(self, backend: str, reason: str, device_failed: bool = False) -> None:
        super().__init__(f"{backend}: {reason}")
        self.backend = backend
        self.device_failed = device_failed


class Backend(ABC):
    """A model loaded into one engine on one device. Use it from one thread at a time.

    Attributes:
        kind: "tensorrt", "openvino", "onnxruntime", "torch", "triton".
        devices: devices that the engine can have; CUDA is NVIDIA's, GPU is Intel's, REMOTE a model server's.
        needs: which file of the model folder it runs, "graph" or "weights".
        card: the model.
        device, precision, threads: what it runs on, in which arithmetic (`PRECISIONS`), with how many threads.
        notes: what was tried before this engine was taken and why it was not, and how it was checked.
        unbuilt: names of engines that would have been taken, had they been built.
        standby: the fp32 engine on the CPU that this one was checked against, if `open_backend` was to keep it.
    """

    kind: ClassVar[str]
    devices: ClassVar[tuple[str, ...]]
    needs: ClassVar[str] = "graph"

    def __init__(self, card: ModelCard, device: str, precision: str, threads: int) -> None:
        self.card = card
        self.device = device
        self.precision = precision
        self.threads = threads
        self.notes: list[str] = []
        self.unbuilt: list[str] = []
        self.standby: Backend | None = None
        self._closed = False

    @classmethod
    @abstractmethod
    def refusal(cls, device: str, precision: str) -> str | None:
        """Why this machine cannot run this engine so; None if it can."""

    @abstractmethod
    def _run(self, frames: NDArray[np.uint8]) -> tuple[NDArray[np.float32] | None, NDArray[np.float32]]:
        """Probabilities (None without a phase head) and latents of C-contiguous frames, in arrays of their own."""

    @abstractmethod
    def _free(self) -> None:
        """Let go of the engine."""

    @property
    def is_reference(self) -> bool:
        """Whether it computes as the reference does: fp32 on the CPU."""
        return (self.device, self.precision) == ("CPU", "fp32")

    def reference(self) -> Backend | None:
        """An engine in fp32 on the CPU whose outputs this one's must be, for the caller to close.

        None where there is none: this one is the reference, or none can be had.

        Raises:
            BackendUnavailable: it does not load.
        """
        if self.is_reference:
            return None
        return _construct(type(self), self.card, "CPU", "fp32", self.threads)

    def kept_reference(self) -> Outputs | None:
        """What `reference`, or this one where there is none, gave on the sample frames at an earlier start, if kept."""
        return None

    def keep_reference(self, outputs: Outputs) -> None:
        """Keep what `reference` gave on the sample frames for later starts, where the engine has a place for it."""
        _logger.debug("%s keeps no outputs", self.name)

    @property
    def name(self) -> str:
        """What runs, as "openvino:CPU:bf16"."""
        return f"{self.kind}:{self.device}:{self.precision}"

    def infer(self, frame: NDArray[np.uint8]) -> Outputs:
        """Phase probabilities and latent of one frame.

        Args:
            frame: uint8 [224, 224, 3], BGR, resized by plain bilinear interpolation.

        Returns:
            probabilities float32 [C], calibrated, summing to 1 (C is 0 without a phase head), and latent
            float32 [D, 4, 4]; both the caller's own.

        Raises:
            TypeError, ValueError: not such a frame.
            InferenceError: the engine failed, its outputs are not finite, or it is closed.
        """
        _check_frames(frame, FRAME_SHAPE)
        probabilities, latent = self._outputs(frame[np.newaxis])
        return probabilities[0], latent[0]

    def infer_batch(self, frames: NDArray[np.uint8]) -> Outputs:
        """Probabilities [N, C] and latents [N, D, 4, 4] of frames uint8 [N, 224, 224, 3]; else as `infer`."""
        _check_frames(frames, (None, *FRAME_SHAPE))
        parts = [self._outputs(frames[start : start + MAX_BATCH]) for start in range(0, len(frames), MAX_BATCH)]
        if not parts:
            return (
                np.zeros((0, len(self.card.labels.names)), np.float32),
                np.zeros((0, *self.card.network.latent_shape), np.float32),
            )
        return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])

    def _outputs(self, frames: NDArray[np.uint8]) -> Outputs:
        if self._closed:
            raise InferenceError(self.name, "is closed; open another backend")
        try:
            probabilities, latent = self._run(np.ascontiguousarray(frames))
        except Exception as error:
            raise InferenceError(self.name, first_line(error), self.device in ("CUDA", "GPU")) from error
        if probabilities is None:
            probabilities = np.zeros((len(frames), 0), np.float32)
        if not (np.isfinite(latent).all() and np.isfinite(probabilities).all()):
            raise InferenceError(self.name, "the outputs hold NaN or infinity")
        return probabilities, latent

    def close(self) -> None:
        """Free the engine; calling it again does nothing."""
        if not self._closed:
            self._closed = True
            if standby := self.take_standby():
                standby.close()
            self._free()

    def take_standby(self) -> Backend | None:
        """The engine on the CPU that stands by, from now on the caller's to close; None where there is none."""
        standby, self.standby = self.standby, None
        return standby

    def __enter__(self) -> Backend:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _check_frames(frames: object, shape: tuple[int | None, ...]) -> None:
    expected = f"uint8 [{', '.join('N' if size is None else str(size) for size in shape)}], BGR"
    if not isinstance(frames, np.ndarray):
        raise TypeError(f"expected a NumPy array {expected}, found {type(frames).__name__}")
    if frames.dtype != np.uint8:
        raise TypeError(f"expected {expected}, found {frames.dtype} {list(frames.shape)}; do not scale to 0..1")
    if frames.ndim != len(shape) or any(w not in (None, f) for f, w in zip(frames.shape, shape, strict=True)):
        raise ValueError(f"expected {expected}, found {list(frames.shape)}; resize with cv2.INTER_LINEAR")


def _engine_in(module: str, name: str) -> Callable[[], type[Backend]]:
    def load() -> type[Backend]:
        try:
            engine: type[Backend] = getattr(importlib.import_module(f"surg_perception.runtime.{module}"), name)
        except ImportError as error:
            raise BackendUnavailable(f"not installed, or does not import ({first_line(error)})") from error
        return engine

    return load


def _torch() -> type[Backend]:
    # OpenMP's threads spin while they wait for each other. On cores shared with the nodes beside, that makes a
    # frame of 10 ms take 140; sleeping instead costs half as much again on idle cores. It can be chosen only
    # before PyTorch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return _engine_in("torch_backend", "TorchBackend")()


BACKENDS: dict[str, Callable[[], type[Backend]]] = {
    "tensorrt": _engine_in("tensorrt_backend", "TensorRtBackend"),
    "openvino": _engine_in("openvino_backend", "OpenVinoBackend"),
    "onnxruntime": _engine_in("onnxruntime_backend", "OnnxRuntimeBackend"),
    "torch": _torch,
    "triton": _engine_in("server_backend", "ServerBackend"),
}
"""Engines by name; each is imported when it is asked for, and raises `BackendUnavailable` if it cannot be."""

AUTO_ORDER: tuple[tuple[str, str], ...] = (
    ("triton", "REMOTE"),
    ("tensorrt", "CUDA"),
    ("onnxruntime", "CUDA"),
    ("torch", "CUDA"),
    ("openvino", "CPU"),
    ("onnxruntime", "CPU"),
    ("torch", "CPU"),
    ("openvino", "GPU"),
)
"""Engine and device, best first. A model server is asked only where its address is given."""


def available_backends(kinds: Iterable[str] = ()) -> dict[str, str | None]:
    """These engines (all) by name: None where one is installed and finds a device, else the reason why not."""
    found: dict[str, str | None] = {}
    for kind in kinds or BACKENDS:
        try:
            engine = BACKENDS[kind]()
        except BackendUnavailable as error:
            found[kind] = str(error)
            continue
        reasons = [engine.refusal(device, "fp32") for device in engine.devices]
        found[kind] = None if None in reasons else "; ".join(filter(None, reasons))
    return found


def open_backend(
    model: str | Path | ModelCard,
    backend: str = "auto",
    precision: str = "fp32",
    allow_fallback: bool = True,
    device: str | None = None,
    threads: int | None = None,
    exclude: Collection[str] = (),
    server: ModelServer | None = None,
    builder: EngineBuilder | None = None,
    standby: bool = False,
) -> Backend:
    """Load a model into the engine that is asked for, or into the best one that truly runs here.

    An engine runs truly when it has loaded the model and its outputs on sixteen sample frames are sound
    and those of fp32 on the CPU in the same engine (`runtime.agreement`).

    Args:
        model: what `find_model` takes, or a card. sha256 is not checked here (`ModelCard.verify`).
        backend: "auto", or a name of `BACKENDS`.
        precision: "fp32"; "bf16" where the device has it; "fp16" or "fp16-mixed" with TensorRT; "fp32-w8" or "bf16-w8"
            with OpenVINO on a CPU.
        allow_fallback: whether, instead of what was asked for, another precision of `LADDER` will do, and then
            another engine. Asked for "auto", engines that have the precision come first.
        device: "CPU", "CUDA", "GPU" (Intel) or "REMOTE"; the best one unless told.
        threads: CPU threads; `default_threads()` unless told.
        exclude: engines not to take, by name or its beginning: "openvino", "onnxruntime:CUDA".
        server: the model server of the backend "triton", which "auto" tries first then; never a fallback.
        builder: builds TensorRT's engine where it is missing, which can take minutes; without one, only an engine that
            was built before is taken, and `unbuilt` names those that were missing.
        standby: keep, of an engine on a GPU or a server, the one on the CPU that it was checked against, in `standby`.

    Returns:
        A backend whose `name` says what runs and whose `notes` say what does not, and why.

    Raises:
        ModelError: the model cannot be found, or its graph is not one of this project's.
        BackendUnavailable: nothing runs as asked, with every reason.
        ValueError: an argument that does not exist.
    """
    card = model if isinstance(model, ModelCard) else find_model(model)
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}; expected one of {', '.join(PRECISIONS)}")
    if threads is not None and threads < 1:
        raise ValueError(f"threads is {threads}, expected at least 1, or None for the default")
    asked = _candidates(backend, device)
    if backend == "auto" and server is None:
        asked = [candidate for candidate in asked if candidate[0] != "triton"]
    # A frame leaves the machine only for a server that was asked for.
    others = [place for place in AUTO_ORDER if place not in asked and place[0] != "triton"] if allow_fallback else []
    precisions = (precision, *LADDER.get(precision, ())) if allow_fallback else (precision,)
    queue = deque((kind, where, how) for places in (asked, others) for how in precisions for kind, where in places)
    notes: list[str] = []
    unbuilt: list[str] = []

    def note(text: str) -> None:
        if text not in notes:
            notes.append(text)

    tried: set[str] = set()
    while queue:
        kind, where, how = queue.popleft()
        name = f"{kind}:{where}:{how}"
        if name in tried:
            continue
        tried.add(name)
        if backend == "auto" and (kind, where) == ("torch", "CUDA") and not has_cuda_device():
            note("torch:CUDA: NVIDIA's driver is not there or finds no GPU")
            continue
        if any(f"{name}:".startswith(f"{part}:") for part in exclude):
            note(f"{name}: excluded")
            continue
        if how.startswith("fp16") and kind in _WITHOUT_FP16:
            note(f"{kind}:{where}: does not compute in fp16")
            continue
        try:
            options: dict[str, Any] = {"server": server} if kind == "triton" else {}
            if kind == "tensorrt":
                options = {"builder": builder}
            engine = _load(card, kind, where, how, threads or default_threads(), options, standby)
        except PrecisionRefused as error:
            note(f"{name}: {error}")
            _logger.warning("%s refused: %s", name, error)
            if allow_fallback:
                queue.extendleft((kind, where, lower) for lower in reversed(LADDER.get(how, ())))
        except EngineMissing as error:
            note(f"{name}: {error}")
            unbuilt.append(name)
        except BackendUnavailable as error:
            note(f"{kind}:{where}: {error}")
        else:
            if backend not in ("auto", kind) or how != precision or (device and where != device.upper()):
                wanted = ":".join(filter(None, (backend, device, precision)))
                note(f"{wanted} was asked for, {engine.name} runs instead")
                _logger.warning("%s was asked for, %s runs instead: %s", wanted, engine.name, "; ".join(notes))
            else:
                _logger.info("%s runs %s", engine.name, card.model_id)
            engine.notes = notes + engine.notes
            engine.unbuilt = unbuilt
            return engine
    wanted = ":".join(filter(None, (backend, device, precision)))
    advice = "" if allow_fallback else "; allow_fallback would take the next best instead"
    nothing = BackendUnavailable(f"{card.name} does not run as {wanted} on this machine: {'; '.join(notes)}{advice}")
    nothing.unbuilt = unbuilt
    raise nothing


def default_threads() -> int:
    """CPU threads of a backend unless told: the physical cores this process may use, at most four.

    EfficientViT's many small layers gain little from more, and every thread takes time from the nodes beside.
    """
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = set()
    for cpu in cpus:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            cores.add(siblings.read_text().strip())
        except OSError:
            cores.add(str(cpu))
    return max(1, min(len(cores), MAX_DEFAULT_THREADS))


def has_cuda_device() -> bool:
    """Whether NVIDIA's driver is there and finds a GPU; asked first, since importing PyTorch for it takes seconds."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


def _candidates(backend: str, device: str | None) -> list[tuple[str, str]]:
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; expected auto or one of {', '.join(BACKENDS)}")
    places = [(kind, where) for kind, where in AUTO_ORDER if backend in ("auto", kind)]
    if device is None:
        return places
    if device.upper() not in ("CPU", "CUDA", "GPU", "REMOTE"):
        raise ValueError(f"unknown device {device!r}; expected CPU, CUDA, GPU or REMOTE")
    found = [(kind, where) for kind, where in places if where == device.upper()]
    if not found:
        raise ValueError(f"{backend} has no device {device!r}; it has {', '.join(where for _, where in places)}")
    return found


def _load(
    card: ModelCard,
    kind: str,
    device: str,
    precision: str,
    threads: int,
    options: Mapping[str, Any],
    standby: bool,
) -> Backend:
    """An engine that has passed its check; options are for the engine alone.

    Raises:
        BackendUnavailable: it does not run.
        ModelError: the model is to blame.
    """
    engine = BACKENDS[kind]()
    reason = engine.refusal(device, precision)
    if reason:
        raise BackendUnavailable(reason)
    try:
        getattr(card, f"{engine.needs}_path")
    except ModelError as error:
        raise BackendUnavailable(str(error)) from error
    backend = _construct(engine, card, device, precision, threads, options)
    try:
        _check(backend, standby)
    except InferenceError as error:
        backend.close()
        raise BackendUnavailable(f"failed on a sample frame: {error}") from error
    except BaseException:
        backend.close()
        raise
    return backend


def _construct(
    engine: type[Backend],
    card: ModelCard,
    device: str,
    precision: str,
    threads: int,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> Backend:
    try:
        return engine(card, device, precision, threads, **options)
    except (ModelError, BackendUnavailable):
        raise
    except Exception as error:
        raise BackendUnavailable(f"could not load {card.name}: {first_line(error)}") from error


def _check(backend: Backend, standby: bool) -> None:
    """Run the sample frames; refuse unsound outputs, and outputs that are not those of fp32 on the CPU."""
    outputs = _on_samples(backend)
    problems = list(unsound(outputs))
    if problems:
        raise BackendUnavailable(f"gives wrong outputs on sample frames: {'; '.join(problems)}")
    agreement, reference = _agreement_with_kept(backend, outputs), "fp32 at an earlier start"
    advice = f"; if that start was at fault, remove the folder surg_perception/{backend.kind} in the user's cache"
    if agreement is None:
        (agreement, reference), advice = _agreement_with_fp32(backend, outputs, standby), ""
    if not agreement.holds:
        refused = PrecisionRefused if backend.precision != "fp32" else BackendUnavailable
        raise refused(f"disagrees with {reference} on {len(outputs[0])} sample frames: {agreement}{advice}")
    backend.notes.append(f"{backend.name}: agrees with {reference} on {len(outputs[0])} sample frames: {agreement}")


def _agreement_with_kept(backend: Backend, outputs: Outputs) -> Agreement | None:
    """Agreement with what fp32 gave at an earlier start; None where fp32 itself has to be asked."""
    kept = backend.kept_reference()
    if kept is None or any(found.shape != known.shape for found, known in zip(outputs, kept, strict=True)):
        return None
    agreement = compare(outputs, kept)
    return agreement if agreement.holds or backend.is_reference else None


def _agreement_with_fp32(backend: Backend, outputs: Outputs, standby: bool) -> tuple[Agreement, str]:
    """Agreement with fp32 on the CPU, which stays as the standby if it may; and who that was."""
    fp32 = backend.reference()
    if fp32 is None:
        expected, reference = _on_samples(backend), "itself"
        agreement = compare(outputs, expected)
    else:
        with contextlib.ExitStack() as stack:
            stack.callback(fp32.close)
            expected, reference = _on_samples(fp32), fp32.name
            agreement = compare(outputs, expected)
            if standby and agreement.holds and fp32.device != backend.device:
                stack.pop_all()
                backend.standby = fp32
    if agreement.holds:
        backend.keep_reference(expected)
    return agreement, reference


def _on_samples(backend: Backend) -> Outputs:
    results = [backend.infer(frame) for frame in reference_frames()]
    return np.stack([result[0] for result in results]), np.stack([result[1] for result in results])


def first_line(error: BaseException) -> str:
    """An error in one line: its type and the first line of its text."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
