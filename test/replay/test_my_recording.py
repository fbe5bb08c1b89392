# SPDX-License-Identifier: Apache-2.0
"""Your recording under test, offline: what is said of it is what it was when you last looked. Copy this file.

    pytest test_my_recording.py --update-golden-replays    # once, and after a change that is meant
    pytest test_my_recording.py                            # from then on: fails where anything differs, and says what

Keep the golden file beside the bag, and look at its difference before you commit a new one. It needs no ROS graph, no
conftest and no GPU, only surg_perception installed (the fixture `replay_bag` comes with it).
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

BAG = Path(os.environ.get("MY_RECORDING", Path(__file__).with_name("my_recording")))
GOLDEN = BAG.with_name(f"{BAG.name}.golden.yaml")


def test_my_recording_is_as_it_was(replay_bag):
    if not BAG.exists():
        pytest.skip(f"there is no bag {BAG}: put yours there, or name it in MY_RECORDING")
    outcome = replay_bag(BAG, GOLDEN)  # also: model="…", params=[Path("…")], questions=Path("…"), topic="…"
    # What must hold of any recording of yours, whatever the golden file says:
    assert outcome.replayed.counts["faults"] == 0
    assert outcome.replayed.counts["processed"] > 0.9 * outcome.replayed.counts["images"]
