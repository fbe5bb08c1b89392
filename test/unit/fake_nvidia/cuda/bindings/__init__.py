# SPDX-License-Identifier: Apache-2.0
"""A CUDA without a GPU, for tests."""
