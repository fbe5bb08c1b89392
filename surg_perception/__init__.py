# SPDX-License-Identifier: Apache-2.0
"""Surgical phase, next-frame latent features and questions about the live endoscope image, for ROS 2."""

__version__ = "0.1.0"
