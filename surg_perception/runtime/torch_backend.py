# SPDX-License-Identifier: Apache-2.0
"""PyTorch: the model folder's weights in the network itself, on the CPU and on CUDA; fp32 and bf16."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from surg_perception.gsvit import load_gsvit
from surg_perception.gsvit.network import FrameGraph
from surg_perception.models import ModelCard
from surg_perception.runtime.backend import Backend
from surg_perception.torch_extras import import_timm


class TorchBackend(Backend):
    """The network, batch norm folded into its convolutions.

    The number of threads and, on CUDA, the ban on TF32 hold for the whole process, as PyTorch has it.
    """

    kind: ClassVar[str] = "torch"
    devices: ClassVar[tuple[str, ...]] = ("CUDA", "CPU")
    needs: ClassVar[str] = "weights"

    def __init__(self, card: ModelCard, device: str, precision: str, threads: int) -> None:
        super().__init__(card, device, precision, threads)
        graph = FrameGraph(load_gsvit(card.folder)).requires_grad_(False)
        graph = import_timm().utils.model.reparameterize_model(graph, inplace=True)
        if precision == "bf16":
            # Under autocast alone every frame would convert all weights anew. Logits and softmax stay fp32.
            graph.encoder.to(torch.bfloat16)
            if graph.head is not None:
                graph.head.mlp.to(torch.bfloat16).register_forward_hook(lambda _, __, logits: logits.float())
        if device == "CUDA":
            torch.backends.cuda.matmul.allow_tf32 = False
            torch.backends.cudnn.allow_tf32 = False
        torch.set_num_threads(threads)
        self._torch_device = torch.device(device.lower())
        self._graph: Any = graph.to(self._torch_device)

    @classmethod
    def refusal(cls, device: str, precision: str) -> str | None:
        if precision not in ("fp32", "bf16"):
            return f"computes in fp32 and bf16, not {precision}"
        if device == "CUDA":
            if not torch.cuda.is_available():
                return "PyTorch finds no CUDA device"
            if precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
                return "this CUDA device has no bf16 arithmetic"
        elif precision == "bf16" and not any(
            found and "bf16" in name for name, found in torch.cpu.get_capabilities().items()
        ):
            return "this CPU has no bf16 arithmetic"
        return None

    def _run(self, frames: NDArray[np.uint8]) -> tuple[NDArray[np.float32] | None, NDArray[np.float32]]:
        with (
            torch.inference_mode(),
            torch.autocast(
                self._torch_device.type, torch.bfloat16, enabled=self.precision == "bf16", cache_enabled=False
            ),
        ):
            outputs = self._graph(torch.tensor(frames).to(self._torch_device))
        *probabilities, latent = (output.float().cpu().numpy() for output in outputs)
        return (probabilities[0] if probabilities else None), latent

    def _free(self) -> None:
        self._graph = None
        if self.device == "CUDA":
            torch.cuda.empty_cache()
