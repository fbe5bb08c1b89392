# SPDX-License-Identifier: Apache-2.0
"""An engine that is made ready in the background while another backend serves: one to be built, or a model server."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator

from surg_perception.runtime.backend import Backend
from surg_perception.runtime.engine_build import EngineBuilder

LONGEST_PAUSE_S = 120.0
STEADY_S = 600.0


class BackOff:
    """Pauses before tries: each twice the one before, up to two minutes; short again after ten minutes of success.

    Args:
        first_s: the first pause.
    """

    def __init__(self, first_s: float) -> None:
        self._first_s = self._next_s = first_s
        self._succeeded_s = -math.inf

    def pauses_s(self) -> Iterator[float]:
        """Pauses without end, from now on."""
        if time.monotonic() - self._succeeded_s > STEADY_S:
            self._next_s = self._first_s
        while True:
            pause_s = self._next_s
            self._next_s = max(self._first_s, min(2 * pause_s, LONGEST_PAUSE_S))
            yield pause_s

    def succeeded(self) -> None:
        """A try has just succeeded; what fails again soon is not worth a short pause."""
        self._succeeded_s = time.monotonic()


class EngineSwitch:
    """One engine on its way; `load` runs in a thread of its own, and builds in a process of its own.

    What `load` gives ends up in one place: with `take`, or closed.

    Args:
        name: of the backend that is to run, as "tensorrt:CUDA:fp16".
        load: gives it, warm and checked.
        say: told what the builder does.
        pauses_s: before each try; as many tries as there are pauses.

    Attributes:
        name: as given.
        failure: why there is no engine yet, or will be none; "" as long as no try has failed.
    """

    def __init__(
        self,
        name: str,
        load: Callable[[EngineBuilder], Backend],
        say: Callable[[str], None],
        pauses_s: Iterable[float] = (0.0,),
    ) -> None:
        self.name = name
        self.failure = ""
        self._told = ""
        self._load = load
        self._pauses_s = pauses_s
        self._builder = EngineBuilder(say)
        self._lock = threading.Lock()
        self._ready: Backend | None = None
        self._canceled = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        for pause_s in self._pauses_s:
            if self._canceled.wait(pause_s):
                return
            try:
                backend = self._load(self._builder)
            except Exception as error:
                # Of whatever kind: what serves meanwhile goes on.
                self.failure = str(error) or type(error).__name__
                continue
            with self._lock:
                if not self._canceled.is_set():
                    self._ready = backend
                    return
            backend.close()

    @property
    def progress(self) -> str:
        """What is going on, for people."""
        if self._ready is not None:
            return f"{self.name} is loaded and checked"
        return self.failure or self._builder.progress or f"{self.name} is on its way"

    def new_failure(self) -> str:
        """Why the last try failed, if it was not told before; else ""."""
        failure, told = self.failure, self._told
        self._told = failure
        return failure if failure != told else ""

    def take(self) -> Backend | None:
        """The engine, warm and checked, once; None as long as there is none."""
        with self._lock:
            backend, self._ready = self._ready, None
        return backend

    def cancel(self) -> None:
        """Stop building and trying; what was, or is still being loaded is closed."""
        self._builder.cancel()
        with self._lock:
            self._canceled.set()
            backend, self._ready = self._ready, None
        if backend is not None:
            backend.close()
