# SPDX-License-Identifier: Apache-2.0
"""cuda-python's runtime calls over host memory, as strict as CUDA is, and failing where a test says so.

What is put into a stream happens when the stream is next asked for, not before; copies take only addresses that were
allocated and lengths that fit; after an error of the device every call fails; capture notes down instead of doing.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

cudaStreamNonBlocking = 1


class cudaError_t(IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorNoDevice = 100
    cudaErrorNotReady = 600
    cudaErrorIllegalAddress = 700
    cudaErrorLaunchFailure = 719
    cudaErrorStreamCaptureUnsupported = 900


class cudaMemcpyKind(IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2


class cudaStreamCaptureMode(IntEnum):
    cudaStreamCaptureModeThreadLocal = 1


_LASTING = (cudaError_t.cudaErrorIllegalAddress, cudaError_t.cudaErrorLaunchFailure)
Work = Callable[[], None]


class Stream:
    def __init__(self) -> None:
        self.waiting: list[Work] = []
        self.captured: list[Work] | None = None
        self.asked = 0

    def put(self, work: Work) -> None:
        (self.waiting if self.captured is None else self.captured).append(work)


class State:
    """All that the fake holds, and what it shall do wrong."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.device: dict[int, Any] = {}
        self.host: dict[int, Any] = {}
        self.streams: dict[int, Stream] = {}
        self.graphs: dict[int, list[Work]] = {}
        self.handles = itertools.count(1000)
        self.calls: list[str] = []
        self.lost: cudaError_t | None = None
        self.hangs = False
        self.devices = 1
        self.name = b"Fake GPU"
        self.capability = (8, 7)
        self._faults: dict[str, tuple[int, cudaError_t]] = {}

    def fail(self, call: str, code: str = "cudaErrorIllegalAddress", after: int = 0) -> None:
        """Let a call fail after it has worked `after` times more."""
        self._faults[call] = (after, cudaError_t[code])

    def nothing_held(self) -> bool:
        return not (self.device or self.host or self.streams or self.graphs)

    def outcome(self, call: str) -> cudaError_t:
        self.calls.append(call)
        if self.lost is not None:
            return self.lost
        if call in self._faults:
            left, code = self._faults[call]
            self._faults[call] = (left - 1, code)
            if left == 0:
                del self._faults[call]
                self.lost = code if code in _LASTING else None
                return code
        return cudaError_t.cudaSuccess


state = State()
_WRONG = cudaError_t.cudaErrorInvalidValue
_OK = cudaError_t.cudaSuccess


def cudaGetDeviceCount() -> tuple[Any, ...]:
    code = state.outcome("cudaGetDeviceCount")
    if not code and not state.devices:
        code = cudaError_t.cudaErrorNoDevice
    return code, None if code else state.devices


def cudaGetDeviceProperties(device: int) -> tuple[Any, ...]:
    code = state.outcome("cudaGetDeviceProperties")
    major, minor = state.capability
    return code, SimpleNamespace(name=state.name, major=major, minor=minor, totalGlobalMem=8 << 30)


def cudaMemGetInfo() -> tuple[Any, ...]:
    return state.outcome("cudaMemGetInfo"), 6 << 30, 8 << 30


def _allocate(call: str, into: dict[int, Any], size: int) -> tuple[Any, ...]:
    code = state.outcome(call)
    if code:
        return code, None
    buffer = ctypes.create_string_buffer(b"\xcd" * size, size)
    into[ctypes.addressof(buffer)] = buffer
    return _OK, ctypes.addressof(buffer)


def cudaMalloc(size: int) -> tuple[Any, ...]:
    return _allocate("cudaMalloc", state.device, size)


def cudaHostAlloc(size: int, flags: int) -> tuple[Any, ...]:
    return _allocate("cudaHostAlloc", state.host, size)


def _give_back(call: str, held: dict[int, Any], handle: Any) -> tuple[Any, ...]:
    # A process that lost its device has lost what was on it.
    code = state.outcome(call)
    found = held.pop(int(handle), None)
    return (code or (_OK if found is not None else _WRONG),)


def cudaFree(address: int) -> tuple[Any, ...]:
    return _give_back("cudaFree", state.device, address)


def cudaFreeHost(address: int) -> tuple[Any, ...]:
    return _give_back("cudaFreeHost", state.host, address)


def cudaStreamCreateWithFlags(flags: int) -> tuple[Any, ...]:
    code = state.outcome("cudaStreamCreateWithFlags")
    if code:
        return code, None
    handle = next(state.handles)
    state.streams[handle] = Stream()
    return _OK, handle


def cudaStreamDestroy(stream: int) -> tuple[Any, ...]:
    return _give_back("cudaStreamDestroy", state.streams, stream)


def cudaMemcpyAsync(to: int, source: int, size: int, kind: cudaMemcpyKind, stream: int) -> tuple[Any, ...]:
    code = state.outcome("copy_in" if kind == cudaMemcpyKind.cudaMemcpyHostToDevice else "copy_out")
    if code:
        return (code,)
    tables = (state.device, state.host) if kind == cudaMemcpyKind.cudaMemcpyHostToDevice else (state.host, state.device)
    for address, table in zip((to, source), tables, strict=True):
        if address not in table or len(table[address]) < size:
            return (_WRONG,)
    state.streams[int(stream)].put(lambda: ctypes.memmove(to, source, size) and None)
    return (_OK,)


def cudaStreamBeginCapture(stream: int, mode: cudaStreamCaptureMode) -> tuple[Any, ...]:
    code = state.outcome("cudaStreamBeginCapture")
    if not code:
        state.streams[int(stream)].captured = []
    return (code,)


def cudaStreamEndCapture(stream: int) -> tuple[Any, ...]:
    code = state.outcome("cudaStreamEndCapture")
    work, state.streams[int(stream)].captured = state.streams[int(stream)].captured, None
    if code or work is None:
        return code or _WRONG, None
    handle = next(state.handles)
    state.graphs[handle] = work
    return _OK, handle


def cudaGraphInstantiateWithFlags(graph: int, flags: int) -> tuple[Any, ...]:
    code = state.outcome("cudaGraphInstantiate")
    if code:
        return code, None
    handle = next(state.handles)
    state.graphs[handle] = list(state.graphs[int(graph)])
    return _OK, handle


def cudaGraphDestroy(graph: int) -> tuple[Any, ...]:
    return _give_back("cudaGraphDestroy", state.graphs, graph)


def cudaGraphExecDestroy(graph: int) -> tuple[Any, ...]:
    return _give_back("cudaGraphExecDestroy", state.graphs, graph)


def cudaGraphLaunch(graph: int, stream: int) -> tuple[Any, ...]:
    code = state.outcome("cudaGraphLaunch")
    if not code:
        for work in state.graphs[int(graph)]:
            state.streams[int(stream)].put(work)
    return (code,)


def cudaStreamQuery(stream: int) -> tuple[Any, ...]:
    code = state.outcome("cudaStreamQuery")
    if code:
        return (code,)
    found = state.streams[int(stream)]
    found.asked += 1
    if state.hangs or (found.waiting and found.asked % 2):
        return (cudaError_t.cudaErrorNotReady,)
    while found.waiting:
        found.waiting.pop(0)()
    return (_OK,)
