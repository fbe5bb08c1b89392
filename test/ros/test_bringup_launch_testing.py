# SPDX-License-Identifier: Apache-2.0
"""The launch file under launch_testing: all nodes active, phases published, every process ends cleanly.

Copy this file as a start for tests of your own launch files that include the pipeline.
"""

from __future__ import annotations

import os
import time
import unittest
from pathlib import Path

import pytest

pytest.importorskip("rclpy", reason="ROS 2 is not in the environment: `source setup.bash` first")

import launch_testing.actions
import launch_testing.asserts
import rclpy
from launch import LaunchDescription
from launch.actions import IncludeLaunchDescription
from launch.launch_description_sources import PythonLaunchDescriptionSource
from lifecycle_msgs.srv import GetState
from surg_perception_msgs.msg import SurgicalPhase

LAUNCH_FILE = Path(__file__).resolve().parents[2] / "launch" / "pipeline.launch.py"
DOMAIN = 9  # below those that the other tests take
NODES = ("phase", "overlay", "source")


@pytest.mark.launch_test
def generate_test_description() -> LaunchDescription:
    os.environ.update(ROS_DOMAIN_ID=str(DOMAIN), ROS_AUTOMATIC_DISCOVERY_RANGE="LOCALHOST")
    arguments = {"source": "phantom", "source_width": "320", "source_height": "240", "overlay": "true"}
    arguments["vqa"] = "false"
    arguments["dds_profile"] = "false"  # launch runs in this process: its environment would stay for other tests
    return LaunchDescription(
        [
            IncludeLaunchDescription(
                PythonLaunchDescriptionSource(str(LAUNCH_FILE)), launch_arguments=arguments.items()
            ),
            launch_testing.actions.ReadyToTest(),
        ]
    )


class TestPipeline(unittest.TestCase):
    def setUp(self) -> None:
        self.context = rclpy.Context()
        rclpy.init(context=self.context, domain_id=DOMAIN)
        self.node = rclpy.create_node("launch_test", namespace="surg_perception", context=self.context)
        self.executor = rclpy.executors.SingleThreadedExecutor(context=self.context)
        self.executor.add_node(self.node)

    def tearDown(self) -> None:
        self.node.destroy_node()
        rclpy.shutdown(context=self.context)

    def spin_until(self, condition, timeout_s: float, what: str) -> None:
        end_s = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < end_s, f"waited {timeout_s:g} s in vain for {what}"
            self.executor.spin_once(timeout_sec=0.1)

    def state_of(self, name: str) -> str:
        client = self.node.create_client(GetState, f"{name}/get_state")
        self.spin_until(client.service_is_ready, 30, f"the node {name}")
        future = client.call_async(GetState.Request())
        self.spin_until(future.done, 5, f"the state of {name}")
        self.node.destroy_client(client)
        return future.result().current_state.label

    def test_every_node_becomes_active_and_phases_flow(self) -> None:
        phases: list[SurgicalPhase] = []
        self.node.create_subscription(SurgicalPhase, "phase/phase", phases.append, 10)
        self.spin_until(lambda: any(p.phase_id >= 0 for p in phases), 60, "a phase")
        assert {name: self.state_of(name) for name in NODES} == dict.fromkeys(NODES, "active")
        count = len(phases)
        self.spin_until(lambda: len(phases) > count + 10, 10, "more phases")


@launch_testing.post_shutdown_test()
class TestShutdown(unittest.TestCase):
    def test_every_process_ends_cleanly(self, proc_info) -> None:
        launch_testing.asserts.assertExitCodes(proc_info)
