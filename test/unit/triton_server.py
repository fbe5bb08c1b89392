# SPDX-License-Identifier: Apache-2.0
"""A real Triton Inference Server as a subprocess: the one in the wheel `nvidia-pytriton`.

It comes with Triton's Python backend alone, so models run in the ONNX Runtime of this environment there; the rest of
the configuration that `export triton` writes is Triton's to read and to obey.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import uuid
from pathlib import Path

import pytest

MODEL = """
import os, time
import numpy as np
import onnxruntime
import triton_python_backend_utils as pb


class TritonPythonModel:
    def initialize(self, args):
        self.folder = args["model_repository"]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        graph = os.path.join(self.folder, args["model_version"], "model.onnx")
        self.session = onnxruntime.InferenceSession(graph, options)
        self.names = [output.name for output in self.session.get_outputs()]

    def execute(self, requests):
        delay = os.path.join(self.folder, "delay_s")
        if os.path.exists(delay):
            with open(delay) as file:
                seconds = float(file.read())
            with open(os.path.join(self.folder, "running"), "w"):
                time.sleep(seconds)
        # DLPack: this backend was built for NumPy 1 and misreads the arrays of NumPy 2.
        frames = [np.from_dlpack(pb.get_input_tensor_by_name(request, "frame")) for request in requests]
        outputs = self.session.run(self.names, {"frame": np.concatenate(frames)})
        responses, start = [], 0
        for frame in frames:
            rows = slice(start, start + len(frame))
            start += len(frame)
            tensors = [pb.Tensor.from_dlpack(n, o[rows].copy()) for n, o in zip(self.names, outputs)]
            responses.append(pb.InferenceResponse(tensors))
        return responses
"""


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


class TritonServer:
    """One server on one port over the repository `folder/models`, which may be started again and again."""

    def __init__(self, folder: Path) -> None:
        found = importlib.util.find_spec("pytriton")
        if found is None or found.origin is None:
            pytest.skip("no Triton here: pip install --no-deps nvidia-pytriton")
        package = Path(found.origin).parent
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        library = f"libpython{version}.so.1.0"
        libraries = [sysconfig.get_config_var("LIBDIR"), str(package.parent / "nvidia_pytriton.libs")]
        try:
            if not (Path(libraries[0]) / library).exists():
                ctypes.CDLL(library)
        except OSError:
            pytest.skip(f"Triton's Python backend needs {library}, which this Python does not have")
        if platform.machine() != "x86_64":
            pytest.skip(f"the wheel's Triton is for x86_64, this is {platform.machine()}")
        server = package / "tritonserver"
        self._backends = folder / "backends"
        shutil.copytree(server / "backends" / "python", self._backends / "python")
        shutil.copy(server / "python_backend_stubs" / version / "triton_python_backend_stub", self._backends / "python")
        self.repository = folder / "models"
        self.port = free_port()
        self.url = f"grpc://127.0.0.1:{self.port}"
        self._shm = f"surg_perception_{uuid.uuid4().hex[:8]}_"
        self._log = folder / "server.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._binary = server / "bin" / "tritonserver"
        site = Path(importlib.util.find_spec("onnxruntime").origin).parents[1]  # type: ignore[union-attr,arg-type]
        self._environment = {
            **os.environ,
            "PYTHONHOME": sys.base_prefix,
            "PYTHONPATH": str(site),
            "LD_LIBRARY_PATH": os.pathsep.join([*libraries, os.environ.get("LD_LIBRARY_PATH", "")]),
            "OMP_NUM_THREADS": "1",
        }

    def prepare(self) -> None:
        """Let the Python backend run what `export triton` wrote."""
        for config in self.repository.glob("*/config.pbtxt"):
            text = config.read_text()
            config.write_text(
                text.replace('backend: "onnxruntime"', 'backend: "python"').replace(
                    'default_model_filename: "model.onnx"', 'default_model_filename: "model.py"'
                )
            )
            for version in config.parent.glob("[0-9]*"):
                (version / "model.py").write_text(MODEL)

    def start(self) -> None:
        self.prepare()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    self._binary,
                    f"--model-repository={self.repository}",
                    f"--backend-directory={self._backends}",
                    f"--backend-config=python,shm-region-prefix-name={self._shm}",
                    "--allow-http=false",
                    "--allow-metrics=false",
                    "--grpc-address=127.0.0.1",
                    f"--grpc-port={self.port}",
                    "--exit-timeout-secs=1",
                ],
                env=self._environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        end_s = time.monotonic() + 180
        while "Started GRPCInferenceService" not in self._log.read_text(errors="replace"):
            if self._process.poll() is not None or time.monotonic() > end_s:
                text = self._log.read_text(errors="replace")
                self.stop()
                raise AssertionError(f"Triton did not start:\n{text[-6000:]}")
            time.sleep(0.1)

    def stop(self, *, kill: bool = False) -> None:
        """End it as an operator would, or kill it."""
        if self._process is None:
            return
        if not kill:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(60)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process = None
        for left in Path("/dev/shm").glob(f"{self._shm}*"):
            left.unlink(missing_ok=True)
