# SPDX-License-Identifier: Apache-2.0
"""TensorRT and TensorRT-RTX: NVIDIA GPUs; fp32, fp16, and fp16 with norms and softmax in fp32."""

from __future__ import annotations

import contextlib
import logging
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from surg_perception.models import ModelCard
from surg_perception.runtime.backend import Backend, BackendUnavailable, EngineMissing
from surg_perception.runtime.cuda_device import CudaDevice, CudaError
from surg_perception.runtime.engine_build import EngineBuilder, cpu_engine, engine_key, on_frames
from surg_perception.runtime.engine_cache import CacheError, EngineCache, EngineKey, Entry
from surg_perception.runtime.tensorrt_layer import EngineError, EngineRunner, UnfitEngine, find_library, lacks_memory

_logger = logging.getLogger("surg_perception.runtime")


class TensorRtBackend(Backend):
    """An engine from the user's cache, built there first where a builder is given."""

    kind: ClassVar[str] = "tensorrt"
    devices: ClassVar[tuple[str, ...]] = ("CUDA",)

    def __init__(
        self, card: ModelCard, device: str, precision: str, threads: int, builder: EngineBuilder | None = None
    ) -> None:
        super().__init__(card, device, precision, threads)
        self._library = find_library()
        self._cuda = CudaDevice()
        self._builder = builder
        try:
            cache = EngineCache()
            key = engine_key(card, self._library, precision, self._cuda.gpu)
            entry = self._find(cache, key)
            try:
                self._runner = self._load(cache, entry)
            except UnfitEngine as error:
                _logger.warning("engine %s is not used: %s", entry.path, error)
                cache.remove(entry)
                self._runner = self._load(cache, self._find(cache, key))
        except CacheError as error:
            raise BackendUnavailable(str(error)) from error
        how = "as a CUDA graph" if self._runner.captured else f"call by call ({self._runner.why_not_captured})"
        self.notes.append(
            f"{self.name}: {self._library.flavour} {self._library.version} on {self._cuda.gpu.name}, {how}"
        )

    @classmethod
    def refusal(cls, device: str, precision: str) -> str | None:
        if precision not in ("fp32", "fp16", "fp16-mixed"):
            return f"computes in fp32, fp16 and fp16-mixed, not {precision}"
        try:
            library, gpu = find_library(), CudaDevice().gpu
        except BackendUnavailable as error:
            return str(error)
        if library.ahead_of_time and gpu.target not in library.targets:
            return f"{library.flavour} {library.version} does not run on {gpu.name} ({gpu.target})"
        return None

    def _find(self, cache: EngineCache, key: EngineKey) -> Entry:
        entry, reason = cache.find(key)
        if entry is None:
            if self._builder is None:
                raise EngineMissing(
                    f"{reason}; build it with `surg-perception build-engine {self.card.folder} "
                    f"--precision {key.precision}`"
                )
            _logger.info("an engine is built: %s", reason)
            self._builder.build(self.card, key.precision, key.flavour)
            entry, reason = cache.find(key)
        if entry is None:
            raise BackendUnavailable(f"the engine was built, and yet {reason}")
        return entry

    def _load(self, cache: EngineCache, entry: Entry) -> EngineRunner:
        try:
            runner = EngineRunner(self._library, entry.read(), self._cuda, cache.read_jit(entry))
        except UnfitEngine:
            raise
        except (EngineError, CudaError) as error:
            raise BackendUnavailable(self._why_not_now(entry, error)) from error
        kernels = runner.kernels()
        if kernels is not None:
            cache.write_jit(entry, kernels)
        return runner

    def _why_not_now(self, entry: Entry, error: Exception) -> str:
        """What to say of a whole engine that does not load: the GPU is to blame, so the file stays."""
        if not lacks_memory(error):
            return f"{error}; the engine is kept ({entry.path}); build-engine --force makes it anew if this lasts"
        used = ""
        with contextlib.suppress(CudaError):  # a lost GPU does not say
            used = f", {self._cuda.memory_used_mib()} of {self._cuda.gpu.memory_mib} MiB are in use"
        return (
            f"the GPU has no memory for the engine{used} ({error}); the engine is kept: end what else uses the GPU, "
            "and configure again"
        )

    def reference(self) -> Backend:
        engine: Backend = cpu_engine(self.card, self.threads)
        return engine

    def _run(self, frames: NDArray[np.uint8]) -> tuple[NDArray[np.float32] | None, NDArray[np.float32]]:
        return on_frames(self._runner, frames)

    def _free(self) -> None:
        self._runner.close()
