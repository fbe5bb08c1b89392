# SPDX-License-Identifier: Apache-2.0
"""Parameters are declared once: YAML and docs agree with the table, and the table with itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from surg_perception.nodes.parameter_table import PHASE, SOURCE, TABLES
from surg_perception.stream.phase_pipeline import PhaseSettings

ROOT = Path(__file__).resolve().parents[2]


def test_yaml_and_docs_are_those_of_the_tables() -> None:
    script = ROOT / "scripts" / "write_parameter_files.py"
    checked = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_the_yaml_holds_every_default() -> None:
    content = yaml.safe_load((ROOT / "config" / "pipeline.yaml").read_text())
    assert {name: table.defaults for name, table in TABLES.items()} == {
        key.removeprefix("/**/"): value["ros__parameters"] for key, value in content.items()
    }


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES.keys())
def test_defaults_are_valid_and_described(table) -> None:
    assert table.fault(table.defaults) is None
    for parameter in table.parameters:
        assert parameter.description.endswith(".")
        if isinstance(parameter.default, (int, float)) and not isinstance(parameter.default, bool):
            assert parameter.minimum is not None, f"{parameter.name} has no range"
            assert parameter.maximum is not None, f"{parameter.name} has no range"


def test_defaults_are_those_of_the_code_behind() -> None:
    settings = PhaseSettings()
    for name in ("time_constant_s", "switch_margin", "hold_s", "reset_gap_s"):
        assert PHASE.defaults[f"filter.{name}"] == getattr(settings.filter, name)
    for name in ("uncertain_below", "max_age_s"):
        assert PHASE.defaults[f"state.{name}"] == getattr(settings, name)
    assert PHASE.defaults["input.max_pixels"] == settings.max_pixels


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("rate_hz", "fast", "expected float"),
        ("rate_hz", 1e9, "expected 0 to 240"),
        ("rate_hz", True, "expected float"),
        ("seed", 1.5, "expected int"),
        ("loop", 1, "expected bool"),
        ("output.encoding", "yuv", "expected one of: bgr8"),
    ],
)
def test_a_value_that_cannot_be_used_has_a_reason(name: str, value: object, says: str) -> None:
    assert says in (SOURCE[name].fault(value) or "")


def test_an_int_will_do_for_a_float() -> None:
    assert SOURCE["rate_hz"].fault(25) is None


def test_rules_between_parameters() -> None:
    values = {**PHASE.defaults, "state.no_signal_after_s": 3.0}
    assert PHASE.fault(values) == "state.no_signal_after_s is 3, expected at most output.deadline_s (1)"
