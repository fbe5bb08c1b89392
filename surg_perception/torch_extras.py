# SPDX-License-Identifier: Apache-2.0
"""The one place that imports timm and transformers first; their submodules may be imported afterwards.

Both import torchvision, and package indexes often hold only CUDA builds of torchvision. Beside a CPU build
of PyTorch such a build finds no compiled operators, and its import fails with "operator torchvision::nms
does not exist", although none of the networks here uses them. Declaring the missing schemas lets it import.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from typing import Any

_MISSING_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declared: list[Any] = []  # a torch.library.Library undoes its declarations when it is collected


def import_timm() -> Any:
    """The module timm, also where a CUDA torchvision lies beside a CPU PyTorch.

    Raises:
        ImportError: timm or torchvision is not installed.
    """
    _mend_torchvision()
    import timm

    return timm


def import_transformers() -> Any:
    """The module transformers, with the network switched off and without its progress bars.

    Raises:
        ImportError: transformers is not installed.
    """
    if importlib.util.find_spec("torchvision") is not None:
        _mend_torchvision()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return transformers


def _mend_torchvision() -> None:
    import torch

    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
        library = torch.library.Library("torchvision", "DEF")
        for schema in _MISSING_SCHEMAS:
            library.define(schema)
        _declared.append(library)
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
