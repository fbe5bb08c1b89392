# SPDX-License-Identifier: Apache-2.0
"""The Foxglove layout and the RViz configuration name panels, topics and fields that exist."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PANEL_TYPES = {
    "Image", "StateTransitions", "Plot", "DiagnosticSummary", "DiagnosticStatusPanel", "RawMessages", "Tab",
}  # fmt: skip
OVERLAY_TOPIC = "/surg_perception/overlay/image/compressed"
MESSAGE_OF_TOPIC = {
    "/surg_perception/phase/phase": "SurgicalPhase",
    "/surg_perception/phase/latent": "LatentFeatures",
    "/surg_perception/phase/labels": "PhaseLabels",
}
NUMBERS = r"(float|u?int)\d+"


@pytest.fixture(scope="module")
def layout() -> dict:
    return json.loads((ROOT / "config/foxglove/surg_perception.json").read_text())


def fields(message: str) -> dict[str, str]:
    """Name and type of each field of a message of surg_perception_msgs; constants are left out."""
    found = {}
    for line in (ROOT / "surg_perception_msgs/msg" / f"{message}.msg").read_text().splitlines():
        declared = line.split("#")[0].split()
        if len(declared) == 2 and "=" not in declared[1]:
            found[declared[1]] = declared[0]
    return found


def panels_in(node: str | dict) -> list[str]:
    if isinstance(node, str):
        return [node]
    assert node["direction"] in ("row", "column")
    assert 0 < node["splitPercentage"] < 100
    return panels_in(node["first"]) + panels_in(node["second"])


def field_type(path: str) -> str:
    """Type of what a Foxglove message path `/topic.field` names; the message for a bare topic."""
    topic, _, field = path.partition(".")
    assert topic in MESSAGE_OF_TOPIC, f"{path}: no such topic"
    message = MESSAGE_OF_TOPIC[topic]
    if not field:
        return message
    assert field in fields(message), f"{path}: {message}.msg has no field {field}"
    return fields(message)[field]


def test_message_files_are_read() -> None:
    assert fields("SurgicalPhase")["confidence"] == "float32"
    assert "OK" not in "".join(fields("SurgicalPhase"))


def test_every_panel_is_placed_once_and_configured(layout: dict) -> None:
    placed = panels_in(layout["layout"])
    for panel, config in layout["configById"].items():
        if panel.startswith("Tab!"):
            assert 0 <= config["activeTabIdx"] < len(config["tabs"])
            for tab in config["tabs"]:
                assert tab["title"]
                placed += panels_in(tab["layout"])
    assert Counter(placed) == Counter(layout["configById"].keys())
    assert {panel.split("!")[0] for panel in placed} == PANEL_TYPES


def test_panels_have_titles_in_both_viewers(layout: dict) -> None:
    for panel, config in layout["configById"].items():
        assert config["foxglovePanelTitle"] == config["lichtblickPanelTitle"] != "", panel


def test_every_path_names_a_field_that_can_be_shown(layout: dict) -> None:
    checked = 0
    for panel, config in layout["configById"].items():
        kind = panel.split("!")[0]
        if kind == "Plot":
            for path in config["paths"]:
                assert re.fullmatch(NUMBERS, field_type(path["value"])), f"{path['value']} is not a number"
                checked += 1
        elif kind == "StateTransitions":
            for path in config["paths"]:
                assert re.fullmatch(NUMBERS + "|string", field_type(path["value"]))
                checked += 1
        elif kind == "RawMessages":
            assert field_type(config["topicPath"])
            checked += 1
        elif kind == "Image":
            assert config["imageMode"]["imageTopic"] == OVERLAY_TOPIC
            checked += 1
        elif kind.startswith("Diagnostic"):
            assert config["topicToRender"] == "/diagnostics"
            checked += 1
    assert checked >= 15


def test_phase_confidence_and_latency_are_shown(layout: dict) -> None:
    paths = {p["value"] for config in layout["configById"].values() for p in config.get("paths", ())}
    wanted = {f"/surg_perception/phase/phase.{field}" for field in ("phase", "state", "confidence", "latency_ms")}
    assert wanted <= paths


def test_rviz_shows_the_overlay() -> None:
    config = yaml.safe_load((ROOT / "config/rviz/surg_perception.rviz").read_text())
    displays = config["Visualization Manager"]["Displays"]
    assert [d["Class"] for d in displays] == ["rviz_default_plugins/Image"]
    assert displays[0]["Topic"]["Value"] == OVERLAY_TOPIC
    assert displays[0]["Enabled"] is True
    assert displays[0]["Name"] in config["Window Geometry"]
