# SPDX-License-Identifier: Apache-2.0
"""The launch_testing example of test/replay, run as who copies it would, on a bag of the phantom."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("rclpy", reason="ROS 2 is not in the environment: `source setup.bash` first")

from phantom_bags import write_phantom_bag

from surg_perception.replay.run import run_replay

EXAMPLE = Path(__file__).resolve().parents[1] / "replay" / "test_my_recording_live.py"


def run(folder: Path) -> tuple[int, str]:
    """Exit status and output of pytest on the example."""
    command = [sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=900, env={**os.environ})
    return done.returncode, done.stdout + done.stderr


def test_the_live_example_passes_on_what_the_offline_replay_says_and_fails_on_a_change(
    domain: int, tmp_path: Path
) -> None:
    shutil.copy(EXAMPLE, tmp_path)
    status, said = run(tmp_path)
    assert status == 5, said  # nothing was run
    assert "there is no bag" in said

    bag = write_phantom_bag(tmp_path / "my_recording")
    golden = tmp_path / "my_recording.golden.yaml"
    run_replay(bag, tmp_path / "offline", golden=golden, update=True)
    status, said = run(tmp_path)
    assert status == 0, said

    text = golden.read_text()
    assert "phase: ClippingCutting}" in text
    golden.write_text(text.replace("phase: ClippingCutting}", "phase: Preparation}", 1))
    status, said = run(tmp_path)
    assert status == 1, said
    assert "phase: ClippingCutting, golden Preparation" in said
