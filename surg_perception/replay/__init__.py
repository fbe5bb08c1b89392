# SPDX-License-Identifier: Apache-2.0
"""Replay of recorded images through the code of the nodes, without ROS and without a clock (docs/replay.md)."""
