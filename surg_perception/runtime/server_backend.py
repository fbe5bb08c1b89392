# SPDX-License-Identifier: Apache-2.0
"""A model server: KServe v2 over gRPC, as Triton and OpenVINO Model Server speak it. One server, many rooms."""

from __future__ import annotations

import itertools
import math
import time
import uuid
from typing import Any, ClassVar

import grpc
import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2, service_pb2_grpc

from surg_perception.models import ModelCard, ModelError
from surg_perception.runtime.agreement import Outputs, compare, reference_frames
from surg_perception.runtime.backend import BACKENDS, Backend, BackendUnavailable
from surg_perception.runtime.graph import GraphFacts, Shape, check_contract
from surg_perception.runtime.model_repository import ModelServer, repository_version

CONNECT_TIMEOUT_S = 5.0
TRUST_S = 1.0
"""gRPC renews a broken connection without a word. No server restarts and loads a model in less than this."""
_SAMPLES = (0, 8)
"""Of `reference_frames`: asked again after a lost connection, to see that the server still gives what it gave."""
_DTYPES = {"UINT8": "uint8", "FP32": "float32"}
_CHANNEL_OPTIONS = (
    # gRPC would give a new channel the dead connection of the old one.
    ("grpc.use_local_subchannel_pool", 1),
    # A frame is asked for once; the next one is newer.
    ("grpc.enable_retries", 0),
)


class ServerError(BackendUnavailable):
    """A model server that is away, refuses, or answers something else than was asked."""


class ServerBackend(Backend):
    """The graph on a model server, under its name and the version made of its sha256.

    Every answer must carry the id of its request and the model's name and version, or it is thrown away. After any
    fault, and where the last answer is older than `TRUST_S`, the next frame connects anew: the server must then have
    the same model and give for two sample frames what it gave at first, else that frame fails too. So a server that is
    restarted is used again by itself, and one that comes back with another model is not.
    """

    kind: ClassVar[str] = "triton"
    devices: ClassVar[tuple[str, ...]] = ("REMOTE",)

    def __init__(
        self, card: ModelCard, device: str, precision: str, threads: int, server: ModelServer | None = None
    ) -> None:
        super().__init__(card, device, precision, threads)
        if server is None:
            raise BackendUnavailable(
                "no address of a model server is given; set runtime.server_url, such as grpc://server:8001"
            )
        self.server = server
        self.version = server.version or repository_version(card)
        self._client = uuid.uuid4().hex
        self._numbers = itertools.count()
        self._channel: Any = None
        self._stub: Any = None
        self._answered_s = 0.0
        self._samples = np.ascontiguousarray(reference_frames()[list(_SAMPLES)])
        self._sampled: Outputs | None = None
        self._connect(max(CONNECT_TIMEOUT_S, server.timeout_s))
        self.notes.append(f"{self.name}: {card.name} version {self.version} at {server.url}")

    @classmethod
    def refusal(cls, device: str, precision: str) -> str | None:
        if precision != "fp32":
            return f"the server's configuration decides about the arithmetic; ask for fp32, not {precision}"
        return None

    def reference(self) -> Backend | None:
        """fp32 on the CPU of this machine, where the graph and an engine for it are here; else None, with a note."""
        path = self.card.graph_path
        reasons = []
        if path.is_file():
            for kind in ("openvino", "onnxruntime"):
                try:
                    return BACKENDS[kind]()(self.card, "CPU", "fp32", self.threads)
                except BackendUnavailable as error:
                    reasons.append(f"{kind}: {error}")
        else:
            reasons.append(f"{path} is not here")
        reason = "; ".join(reasons)
        if self.server.version:
            raise BackendUnavailable(
                f"version {self.version!r} was asked for, which does not say which graph it is, and the server's "
                f"outputs cannot be compared with those of {self.card.model_id} ({reason}); leave the version empty, "
                "or bring the graph here"
            )
        self.notes.append(f"{self.name}: not compared with an engine of this machine, only with itself ({reason})")
        return None

    def _run(self, frames: NDArray[np.uint8]) -> tuple[NDArray[np.float32] | None, NDArray[np.float32]]:
        if self._channel is None or time.monotonic() - self._answered_s > TRUST_S:
            self._connect(self.server.timeout_s)
        try:
            return self._ask(frames, len(frames) * self.server.timeout_s)
        except BaseException:
            self._free()
            raise

    def _connect(self, timeout_s: float) -> None:
        """Connect anew and see that the model is the right one; without a connection on any error."""
        self._free()
        if self.server.secure:  # against the usual certificate authorities, or $GRPC_DEFAULT_SSL_ROOTS_FILE_PATH
            self._channel = grpc.secure_channel(self.server.target, grpc.ssl_channel_credentials(), _CHANNEL_OPTIONS)
        else:
            self._channel = grpc.insecure_channel(self.server.target, _CHANNEL_OPTIONS)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        try:
            self._check_model(timeout_s)
            outputs = self._ask(self._samples, len(self._samples) * timeout_s)
            sampled = np.zeros((len(self._samples), 0), np.float32) if outputs[0] is None else outputs[0], outputs[1]
            if self._sampled is None:
                self._sampled = sampled
            elif not (agreement := compare(sampled, self._sampled)).holds:
                raise ServerError(
                    f"{self.server.url} has come back with another model under the name {self.card.name!r}, version "
                    f"{self.version}: its outputs on sample frames are no longer what they were ({agreement})"
                )
        except BaseException:
            self._free()
            raise

    def _check_model(self, timeout_s: float) -> None:
        name = self.card.name
        try:
            metadata = self._call("ModelMetadata", timeout_s, name=name, version=self.version)
        except grpc.RpcError as error:
            raise self._wrong_version(error, timeout_s) from error
        if metadata.versions and self.version not in metadata.versions:
            raise ServerError(self._expected(f"versions {', '.join(metadata.versions)}"))

        def described(tensors: Any) -> dict[str, tuple[str, Shape]]:
            return {
                tensor.name: (
                    _DTYPES.get(tensor.datatype, tensor.datatype),
                    tuple(None if size < 0 else size for size in tensor.shape),
                )
                for tensor in tensors
            }

        facts = GraphFacts(described(metadata.inputs), described(metadata.outputs), {})
        try:
            check_contract(facts, f"{self.server.url}, model {name}", self.card)
        except ModelError as error:  # of the server, not of the model here
            raise ServerError(str(error)) from error

    def _wrong_version(self, error: grpc.RpcError, timeout_s: float) -> ServerError:
        """What to say of a server that does not have the version: which ones it has."""
        try:
            versions = self._call("ModelMetadata", timeout_s, name=self.card.name).versions
        except grpc.RpcError:
            return ServerError(self._expected(f"no such model ({error.details()})"))
        return ServerError(self._expected(f"versions {', '.join(versions) or 'without numbers'}"))

    def _expected(self, found: str) -> str:
        graph = f", the graph of {self.card.model_id}" if not self.server.version else ""
        return (
            f"{self.server.url} has of model {self.card.name!r} {found}, expected version {self.version}{graph}; put "
            "it there with `surg-perception export triton`, or take the model folder of what the server has"
        )

    def _ask(
        self, frames: NDArray[np.uint8], timeout_s: float
    ) -> tuple[NDArray[np.float32] | None, NDArray[np.float32]]:
        names = ["latent", "probabilities"] if self.card.labels.names else ["latent"]
        asked = {
            "model_name": self.card.name,
            "model_version": self.version,
            "id": f"{self._client}-{next(self._numbers)}",
        }
        tensors = service_pb2.ModelInferRequest
        try:
            answer = self._call(
                "ModelInfer",
                timeout_s,
                **asked,
                inputs=[tensors.InferInputTensor(name="frame", datatype="UINT8", shape=frames.shape)],
                outputs=[tensors.InferRequestedOutputTensor(name=name) for name in names],
                raw_input_contents=[frames.tobytes()],
            )
        except grpc.RpcError as error:
            raise ServerError(f"{self.server.url} refuses the frame: {error.code().name}, {error.details()}") from error
        for what, expected in asked.items():
            found = getattr(answer, what)
            if found != expected:
                raise ServerError(
                    f"{self.server.url} answers with {what} {found!r}, expected {expected!r}: it is the answer to "
                    "another request and is thrown away"
                )
        latent = self._tensor(answer, "latent", (len(frames), *self.card.network.latent_shape))
        if len(names) == 1:
            return None, latent
        return self._tensor(answer, "probabilities", (len(frames), len(self.card.labels.names))), latent

    def _tensor(self, answer: Any, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        found = "nothing"
        for output, raw in zip(answer.outputs, answer.raw_output_contents, strict=False):
            if output.name == name:
                if (output.datatype, tuple(output.shape), len(raw)) == ("FP32", shape, 4 * math.prod(shape)):
                    return np.frombuffer(raw, np.float32).reshape(shape).copy()
                found = f"{output.datatype} {list(output.shape)} in {len(raw)} bytes"
        raise ServerError(f"{self.server.url} answers for {name!r} {found}, expected FP32 {list(shape)}")

    def _call(self, method: str, timeout_s: float, **fields: Any) -> Any:
        """The server's answer.

        Raises:
            ServerError: it is away.
            grpc.RpcError: it refuses.
        """
        message = getattr(service_pb2, f"{method}Request")(**fields)
        try:
            answer = getattr(self._stub, method)(message, timeout=timeout_s)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
                raise ServerError(f"no answer from {self.server.url} within {timeout_s:g} s") from error
            if error.code() == grpc.StatusCode.UNAVAILABLE:
                raise ServerError(
                    f"{self.server.url} is away ({error.details()}); is the server running, "
                    "is the address right, and does it speak gRPC and TLS as the address says?"
                ) from error
            raise
        self._answered_s = time.monotonic()
        return answer

    def _free(self) -> None:
        if self._channel is not None:
            self._channel.close()
        self._channel = self._stub = None
