# SPDX-License-Identifier: Apache-2.0
"""A model server in this process that can be made to answer what it should not."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
from onnx_graphs import CHANNELS, CLASSES, SmallNetwork
from tritonclient.grpc import service_pb2, service_pb2_grpc


class Impostor(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Speaks the protocol and computes the small network; `metadata` and `answer` may spoil what it says."""

    def __init__(self, network: SmallNetwork, version: str) -> None:
        self.network, self.version = network, version
        self.metadata: Callable[[Any], None] = lambda reply: None
        self.answer: Callable[[Any], None] = lambda reply: None

    def ModelMetadata(self, request: Any, context: Any) -> Any:
        tensor = service_pb2.ModelMetadataResponse.TensorMetadata
        reply = service_pb2.ModelMetadataResponse(
            name=request.name,
            versions=[self.version],
            inputs=[tensor(name="frame", datatype="UINT8", shape=[-1, 224, 224, 3])],
            outputs=[
                tensor(name="probabilities", datatype="FP32", shape=[-1, CLASSES]),
                tensor(name="latent", datatype="FP32", shape=[-1, CHANNELS, 4, 4]),
            ],
        )
        self.metadata(reply)
        return reply

    def ModelInfer(self, request: Any, context: Any) -> Any:
        frames = np.frombuffer(request.raw_input_contents[0], np.uint8).reshape(request.inputs[0].shape)
        p, z = (values.astype(np.float32) for values in self.network(frames))
        tensor = service_pb2.ModelInferResponse.InferOutputTensor
        reply = service_pb2.ModelInferResponse(
            model_name=request.model_name,
            model_version=self.version,
            id=request.id,
            outputs=[
                tensor(name="probabilities", datatype="FP32", shape=p.shape),
                tensor(name="latent", datatype="FP32", shape=z.shape),
            ],
            raw_output_contents=[p.tobytes(), z.tobytes()],
        )
        self.answer(reply)
        return reply


@contextlib.contextmanager
def serving(servicer: Impostor, identity: tuple[bytes, bytes] | None = None) -> Iterator[int]:
    """Its port on this machine; over TLS where a private key and a certificate are given (PEM)."""
    server = grpc.server(ThreadPoolExecutor(2))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)
    if identity is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        port = server.add_secure_port("localhost:0", grpc.ssl_server_credentials([identity]))
    server.start()
    try:
        yield port
    finally:
        server.stop(None)
