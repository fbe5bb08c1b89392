# SPDX-License-Identifier: Apache-2.0
"""Thin ROS 2 lifecycle nodes: parameters in, messages out. The only room that imports rclpy."""
