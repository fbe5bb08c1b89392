# SPDX-License-Identifier: Apache-2.0
"""GSViT (arXiv 2403.05949): network, released checkpoints, phase head, frame decoder.

Importing this package imports no PyTorch; using one of its names does.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from surg_perception.gsvit.checkpoint import CheckpointError, load_gsvit
    from surg_perception.gsvit.model_folder import import_released, save_model_folder
    from surg_perception.gsvit.network import FrameGraph, GSViT, GSViTConfig

_MODULES = {
    "CheckpointError": "checkpoint",
    "load_gsvit": "checkpoint",
    "import_released": "model_folder",
    "save_model_folder": "model_folder",
    "FrameGraph": "network",
    "GSViT": "network",
    "GSViTConfig": "network",
}

__all__ = [
    "CheckpointError",
    "FrameGraph",
    "GSViT",
    "GSViTConfig",
    "import_released",
    "load_gsvit",
    "save_model_folder",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
