# SPDX-License-Identifier: Apache-2.0
"""The examples of test/replay, run as who copies them would, on a bag of the phantom; the pytest plugin."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from phantom_bags import write_phantom_bag

EXAMPLES = Path(__file__).resolve().parents[1] / "replay"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the example beside a recording, with no conftest around."""
    shutil.copy(EXAMPLES / "test_my_recording.py", tmp_path)
    return tmp_path


def run(folder: Path, *arguments: str) -> tuple[int, str]:
    """Exit status and output of pytest in the folder."""
    path = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "surg_perception.testing", "-p", "no:cacheprovider", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))},
        capture_output=True,
        text=True,
        timeout=600,
    )
    return done.returncode, done.stdout + done.stderr


def test_the_offline_example_writes_its_golden_file_then_passes_then_fails_on_a_change(folder: Path) -> None:
    write_phantom_bag(folder / "my_recording")
    golden = folder / "my_recording.golden.yaml"

    status, said = run(folder)
    assert status == 1
    assert "there is no golden file" in said

    status, said = run(folder, "--update-golden-replays")
    assert status == 0, said
    text = golden.read_text()
    status, said = run(folder)
    assert status == 0, said

    assert "phase: ClippingCutting}" in text
    golden.write_text(text.replace("phase: ClippingCutting}", "phase: Preparation}", 1))
    status, said = run(folder)
    assert status == 1
    assert "not as in the golden file: phase once" in said
    assert "phase: ClippingCutting, golden Preparation" in said
    assert golden.read_text() != text, "only the option writes it"


def test_without_a_recording_the_example_says_where_it_belongs(folder: Path) -> None:
    status, said = run(folder, "-rs")
    assert status == 0
    assert "there is no bag" in said
    assert "MY_RECORDING" in said


def test_the_plugin_costs_other_tests_no_import(tmp_path: Path) -> None:
    (tmp_path / "test_nothing.py").write_text(
        "import sys\n\n\ndef test_nothing():\n    assert not {'numpy', 'cv2', 'rosbags'} & set(sys.modules)\n"
    )
    status, said = run(tmp_path, "-p", "no:hypothesispytest", "-p", "no:launch_testing", "-p", "no:launch_ros")
    assert status == 0, said
