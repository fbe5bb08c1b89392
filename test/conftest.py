# SPDX-License-Identifier: Apache-2.0
"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Examples to copy, for recordings that are not here: test_replay_examples.py runs them as their users do.
collect_ignore = ["replay"]

# `make test &` starts with SIGINT ignored, which launches and trainings would inherit that tests end with it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real surgical video; it lies beside the checkout of developers and CI, never in it."""
    folder = Path(os.environ.get("SURG_PERCEPTION_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "cholec-clips").is_dir():
        pytest.skip(f"real surgical video not found at {folder} (set SURG_PERCEPTION_SHARED_DATA to test on it)")
    return folder
