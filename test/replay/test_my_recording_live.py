# SPDX-License-Identifier: Apache-2.0
"""Your recording through the whole launched pipeline, with launch_testing. Copy this file.

    pytest test_my_recording_live.py        # in a shell where the workspace is sourced

Starts pipeline.launch.py by the bag's time, plays the bag with `surg-perception replay --live`, each image when the
phase of the one before has come, and compares with the golden file of the offline test beside it, where there is one:
live and offline must say the same. Include your own launch file instead to have your parameters under test.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import unittest
from pathlib import Path

import launch_testing.actions
import launch_testing.asserts
import pytest
from ament_index_python.packages import get_package_share_directory
from launch import LaunchDescription
from launch.actions import IncludeLaunchDescription
from launch.launch_description_sources import PythonLaunchDescriptionSource

from surg_perception.data.bags import BagReader

BAG = Path(os.environ.get("MY_RECORDING", Path(__file__).with_name("my_recording")))
GOLDEN = BAG.with_name(f"{BAG.name}.golden.yaml")
LAUNCH_FILE = Path(get_package_share_directory("surg_perception"), "launch", "pipeline.launch.py")
if not BAG.exists():
    pytest.skip(f"there is no bag {BAG}: put yours there, or name it in MY_RECORDING", allow_module_level=True)


@pytest.mark.launch_test
def generate_test_description() -> LaunchDescription:
    # A domain of its own: no robot, and no other test, is to see these images.
    os.environ.setdefault("ROS_DOMAIN_ID", "87")
    os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
    with BagReader(BAG) as bag:
        transport = "raw" if bag.msgtype == "sensor_msgs/msg/Image" else "compressed"
    arguments = {"use_sim_time": "true", "transport": transport, "vqa": "false"}
    pipeline = IncludeLaunchDescription(
        PythonLaunchDescriptionSource(str(LAUNCH_FILE)), launch_arguments=arguments.items()
    )
    return LaunchDescription([pipeline, launch_testing.actions.ReadyToTest()])


class TestMyRecording(unittest.TestCase):
    def test_every_image_has_its_phase(self, proc_output) -> None:
        proc_output.assertWaitFor("subscribed to", timeout=300)  # the node is active
        command = ["surg-perception", "replay", str(BAG), "--live", "--timeout", "120"]
        command += ["--out", str(Path(tempfile.mkdtemp(), "results"))]
        if GOLDEN.exists():
            command += ["--golden", str(GOLDEN)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"


@launch_testing.post_shutdown_test()
class TestEnd(unittest.TestCase):
    def test_every_process_ends_cleanly(self, proc_info) -> None:
        launch_testing.asserts.assertExitCodes(proc_info)
