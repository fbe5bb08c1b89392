# SPDX-License-Identifier: Apache-2.0
"""The monitor's figures, from messages whose right answers are known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("rclpy", reason="ROS 2 is not in the environment: `source setup.bash` first")

from surg_perception_msgs.msg import SurgicalPhase

from surg_perception.data.labels import CHOLEC80_PHASES
from surg_perception.nodes.monitor import Record, line, save, summary


def record_of_four() -> Record:
    """Four images: three right after the filter, two right before it; the fourth has no truth."""
    newest = SurgicalPhase(frames_received=6, frames_processed=4, frames_replaced=1, frames_rejected=1, backend="b")
    return Record(
        stamp_ns=[0, 10**9, 2 * 10**9, 3 * 10**9],
        phase_id=[0, 1, 1, 2],
        raw_phase_id=[0, 2, 1, 2],
        confidence=[0.9, 0.8, 0.7, 0.6],
        state=[0, 0, 0, 0],
        latency_ms=[1.0, 2.0, 3.0, 4.0],
        truth={0: 0, 10**9: 1, 2 * 10**9: 0},
        labels=list(CHOLEC80_PHASES),
        newest=newest,
        source={"frames_published": "7"},
    )


def test_summary_counts_latency_and_accuracy() -> None:
    result = summary(record_of_four())
    assert (result["frames_sent"], result["frames_received"], result["frames_replaced"]) == (7, 6, 1)
    assert result["latency_p50_ms"] == pytest.approx(2.5)
    assert result["accuracy_filtered"] == pytest.approx(2 / 3)
    assert result["accuracy_single_image"] == pytest.approx(1 / 3)


def test_nothing_recorded_is_no_accuracy_and_no_latency() -> None:
    result = summary(Record())
    assert result["frames_sent"] is None
    assert "latency_p50_ms" not in result
    assert "accuracy_filtered" not in result
    assert "waiting" in line(Record()).plain


def test_saved_files_say_the_same(tmp_path: Path) -> None:
    record = record_of_four()
    result = summary(record)
    files = dict(save(record, result, tmp_path / "out"))
    assert json.loads(files["summary"].read_text()) == result
    assert files["ribbon"].stat().st_size > 5000
