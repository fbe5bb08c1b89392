# SPDX-License-Identifier: Apache-2.0
"""GSViT (arXiv 2403.05949): network, released checkpoints, phase head, frame decoder."""
