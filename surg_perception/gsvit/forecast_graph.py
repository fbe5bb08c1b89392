# SPDX-License-Identifier: Apache-2.0
"""The frame decoder as it is exported and deployed: from a latent to a camera frame."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from surg_perception.gsvit.network import FrameDecoder, GSViT


class ForecastGraph(nn.Module):
    """What the running pipeline forecasts with; weights are shared with the model.

    Args:
        model: a GSViT with a frame decoder.

    Raises:
        ValueError: it has none.
    """

    def __init__(self, model: GSViT) -> None:
        super().__init__()
        if model.decoder is None:
            raise ValueError("this GSViT has no frame decoder, so there is no forecast to export")
        self.decoder: FrameDecoder = model.decoder
        self.training = model.training

    def forward(self, latent: Tensor, frame: Tensor | None = None) -> Tensor:
        """The frame expected next.

        Args:
            latent: float32 [N, D, 4, 4].
            frame: uint8 [N, 224, 224, 3], BGR, the frame the latent is of; used, and then needed, only where the
                decoder predicts the change.

        Returns:
            uint8 [N, 224, 224, 3], BGR.
        """
        prediction = self.decoder(latent)
        if self.decoder.predict_change:
            assert frame is not None
            prediction = prediction + frame.permute(0, 3, 1, 2).to(torch.float32) / 255.0
        levels = prediction.clamp(0.0, 1.0) * 255.0 + 0.5
        return levels.to(torch.uint8).permute(0, 2, 3, 1)
