# SPDX-License-Identifier: Apache-2.0
"""One graph on one device: backends, ONNX export, precision checks. The only room that knows a vendor."""
