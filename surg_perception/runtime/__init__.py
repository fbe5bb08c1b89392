# SPDX-License-Identifier: Apache-2.0
"""One graph on one device: backends, ONNX export, precision checks. The only room that knows a vendor."""

from surg_perception.runtime.backend import (
    BACKENDS,
    PRECISIONS,
    Backend,
    BackendUnavailable,
    InferenceError,
    PrecisionRefused,
    available_backends,
    default_threads,
    open_backend,
)

__all__ = [
    "BACKENDS",
    "PRECISIONS",
    "Backend",
    "BackendUnavailable",
    "InferenceError",
    "PrecisionRefused",
    "available_backends",
    "default_threads",
    "open_backend",
]
