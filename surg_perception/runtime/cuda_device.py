# SPDX-License-Identifier: Apache-2.0
"""The few CUDA calls that running an engine takes, through cuda-python; each failure names the call."""

from __future__ import annotations

import ctypes
import importlib
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surg_perception.runtime.backend import BackendUnavailable, first_line

_POLL_S = 50e-6


class CudaError(RuntimeError):
    """A CUDA call failed, or the GPU does not answer."""


@dataclass(frozen=True)
class Gpu:
    """A GPU: its name, compute capability as "sm87", and memory in MiB."""

    name: str
    target: str
    memory_mib: int


class CudaDevice:
    """The first GPU that CUDA shows (`CUDA_VISIBLE_DEVICES` chooses).

    Raises:
        BackendUnavailable: cuda-python is missing, or there is no driver or no GPU.
    """

    def __init__(self) -> None:
        self._rt = _runtime()
        try:
            (count,) = self._call("cudaGetDeviceCount")
            if count < 1:
                raise CudaError("cudaGetDeviceCount: 0")
            (facts,) = self._call("cudaGetDeviceProperties", 0)
        except CudaError as error:
            raise BackendUnavailable(f"finds no CUDA device ({error})") from error
        name = facts.name.decode() if isinstance(facts.name, bytes) else str(facts.name)
        self.gpu = Gpu(name.rstrip("\0"), f"sm{facts.major}{facts.minor}", int(facts.totalGlobalMem) >> 20)

    def _call(self, name: str, *arguments: Any) -> tuple[Any, ...]:
        code, *results = getattr(self._rt, name)(*arguments)
        if int(code) != 0:
            raise CudaError(f"{name}: {getattr(code, 'name', code)}")
        return tuple(results)

    def malloc(self, size: int) -> int:
        """Address of `size` bytes on the device."""
        return int(self._call("cudaMalloc", size)[0])

    def free(self, address: int) -> None:
        """Give device memory back."""
        self._call("cudaFree", address)

    def host_array(self, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """A pinned array; `free_host` gives it back, after which nobody may touch it."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        # Pinned memory is copied while the CPU goes on.
        (address,) = self._call("cudaHostAlloc", size, 0)
        buffer = (ctypes.c_uint8 * size).from_address(int(address))
        return np.frombuffer(buffer, np.uint8).view(dtype).reshape(shape)

    def free_host(self, array: NDArray[Any]) -> None:
        """Give a pinned array back."""
        self._call("cudaFreeHost", array.ctypes.data)

    def create_stream(self) -> int:
        """A stream that does not wait for the default one."""
        return int(self._call("cudaStreamCreateWithFlags", self._rt.cudaStreamNonBlocking)[0])

    def destroy_stream(self, stream: int) -> None:
        """Give a stream back."""
        self._call("cudaStreamDestroy", stream)

    def copy_in(self, address: int, array: NDArray[Any], stream: int) -> None:
        """Copy a pinned array to the device, in the stream's order."""
        kind = self._rt.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", address, array.ctypes.data, array.nbytes, kind, stream)

    def copy_out(self, array: NDArray[Any], address: int, stream: int) -> None:
        """Copy from the device into a pinned array, in the stream's order."""
        kind = self._rt.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", array.ctypes.data, address, array.nbytes, kind, stream)

    def begin_capture(self, stream: int) -> None:
        """Note down, instead of doing, what is put into the stream from now on."""
        # Thread-local: other threads' own CUDA calls go on meanwhile.
        mode = self._rt.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", stream, mode)

    def end_capture(self, stream: int) -> Any:
        """What was noted down, ready to be launched as often as wanted."""
        (graph,) = self._call("cudaStreamEndCapture", stream)
        try:
            return self._call("cudaGraphInstantiateWithFlags", graph, 0)[0]
        finally:
            self._call("cudaGraphDestroy", graph)

    def launch(self, captured: Any, stream: int) -> None:
        """Do what was noted down."""
        self._call("cudaGraphLaunch", captured, stream)

    def destroy_capture(self, captured: Any) -> None:
        """Give it back."""
        self._call("cudaGraphExecDestroy", captured)

    def synchronize(self, stream: int, timeout_s: float) -> None:
        """Wait until the stream is done.

        Asks again and again instead of waiting inside CUDA, which a GPU that hangs would hold up for ever.

        Raises:
            CudaError: something in the stream failed, or it is not done in time.
        """
        end_s = time.monotonic() + timeout_s
        not_ready = int(self._rt.cudaError_t.cudaErrorNotReady)
        while True:
            (code,) = self._rt.cudaStreamQuery(stream)
            if int(code) == 0:
                return
            if int(code) != not_ready:
                raise CudaError(f"cudaStreamQuery: {getattr(code, 'name', code)}")
            if time.monotonic() > end_s:
                raise CudaError(f"the GPU has not answered for {timeout_s:g} s")
            time.sleep(_POLL_S)

    def memory_used_mib(self) -> int:
        """Device memory in use, by every process."""
        free, total = self._call("cudaMemGetInfo")
        return (int(total) - int(free)) >> 20


def _runtime() -> Any:
    for name in ("cuda.bindings.runtime", "cuda.cudart"):  # since cuda-python 12.6, and before
        try:
            return importlib.import_module(name)
        except ImportError as error:
            reason = error
    raise BackendUnavailable(
        f"cuda-python is not installed ({first_line(reason)}); pip install cuda-python"
    ) from reason
