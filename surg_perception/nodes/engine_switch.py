# SPDX-License-Identifier: Apache-2.0
"""An engine that is built and loaded in the background while another backend serves."""

from __future__ import annotations

import threading
from collections.abc import Callable

from surg_perception.runtime.backend import Backend
from surg_perception.runtime.engine_build import EngineBuilder


class EngineSwitch:
    """One engine on its way; `load` runs in a thread of its own, and builds in a process of its own.

    What `load` gives ends up in one place: with `take`, or closed.

    Attributes:
        name: of the backend that is to run, as "tensorrt:CUDA:fp16".
        failure: why there will be no engine; "" as long as there may be.
    """

    def __init__(self, name: str, load: Callable[[EngineBuilder], Backend], say: Callable[[str], None]) -> None:
        self.name = name
        self.failure = ""
        self._load = load
        self._builder = EngineBuilder(say)
        self._lock = threading.Lock()
        self._ready: Backend | None = None
        self._canceled = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            backend = self._load(self._builder)
        except Exception as error:
            # Of whatever kind: what serves meanwhile goes on.
            self.failure = str(error) or type(error).__name__
            return
        with self._lock:
            if not self._canceled:
                self._ready = backend
                return
        backend.close()

    @property
    def progress(self) -> str:
        """What is going on, for people."""
        return self.failure or self._builder.progress or f"{self.name} is loaded and checked"

    def take(self) -> Backend | None:
        """The engine, warm and checked, once; None as long as there is none."""
        with self._lock:
            backend, self._ready = self._ready, None
        return backend

    def cancel(self) -> None:
        """Stop building; what was, or is still being loaded is closed."""
        self._builder.cancel()
        with self._lock:
            self._canceled = True
            backend, self._ready = self._ready, None
        if backend is not None:
            backend.close()
