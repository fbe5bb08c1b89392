# SPDX-License-Identifier: Apache-2.0
from setuptools import setup

setup(
    name="surg-perception-ros2-commands",
    version="0.1.0",
    description="`ros2 launch` and `ros2 lifecycle` where ROS 2 comes from wheels, which lack both",
    packages=["ros2_commands"],
    entry_points={
        "ros2cli.command": [
            "launch = ros2_commands.launch:LaunchCommand",
            "lifecycle = ros2_commands.lifecycle:LifecycleCommand",
        ],
    },
)
