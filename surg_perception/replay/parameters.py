# SPDX-License-Identifier: Apache-2.0
"""Parameters of a node from the files and the arguments that ROS takes them from, without ROS."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from surg_perception.nodes.parameter_table import TABLES, ParameterTable

_VALUES = "ros__parameters"


def node_values(
    table: ParameterTable, namespace: str, files: Iterable[Path] = (), assignments: Sequence[str] = ()
) -> dict[str, Any]:
    """All values of a node's parameters: defaults, then the files in their order, then the assignments.

    Args:
        table: of the node; its name is that of the node.
        namespace: of the node, such as "surg_perception"; which sections of a file count depends on it.
        files: YAML as `ros2 run … --params-file` takes it.
        assignments: "NAME:=VALUE" for every node that has such a parameter, or "NODE:NAME:=VALUE".

    Raises:
        ValueError: a file that is no parameter file, a parameter that none of the nodes has, or a value that it does
            not take.
    """
    given: dict[str, Any] = {}
    node = "/" + "/".join([*(part for part in namespace.split("/") if part), table.node])
    for file in files:
        given.update(_of_file(file, node))
    for assignment in assignments:
        for_node, name, value = _assignment(assignment)
        if for_node == table.node or (not for_node and name in table):
            given[name] = value
    try:
        # A section for all nodes holds parameters of the others too.
        others = {name for name in given if any(name in other for other in TABLES.values())}
        if unknown := table.unknown(name for name in given if name not in others):
            raise ValueError("; ".join(unknown))
        return table.with_defaults(given)
    except ValueError as error:
        raise ValueError(f"parameters of the node {table.node}: {error}") from error


def check_assignments(assignments: Sequence[str], tables: Sequence[ParameterTable]) -> None:
    """Raise ValueError where an assignment is for none of these nodes."""
    for assignment in assignments:
        for_node, name, _ = _assignment(assignment)
        if not any(for_node == table.node or (not for_node and name in table) for table in tables):
            hints = tables[0].unknown([name]) if not for_node else [f"there is no node '{for_node}'"]
            raise ValueError(f"-p {assignment}: {hints[0]}")


def _of_file(file: Path, node: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{file} holds no parameters, expected 'NODE:' with '{_VALUES}:' below, as config/pipeline.yaml"
        )
    given: dict[str, Any] = {}
    found = False
    for pattern, values in _sections(content, ""):
        found = True
        if not isinstance(values, dict):
            raise ValueError(f"{file}: {pattern}: {_VALUES} is {values!r}, expected names with values")
        if _matches(pattern, node):
            given.update(_flat(values, ""))
    if not found:
        raise ValueError(f"{file} has no '{_VALUES}:', expected 'NODE:' with it below, as config/pipeline.yaml")
    return given


def _sections(content: dict[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, below in content.items():
        if key == _VALUES:
            yield prefix, below
        elif isinstance(below, dict):
            yield from _sections(below, f"{prefix}/{str(key).strip('/')}")


def _matches(pattern: str, node: str) -> bool:
    """As rcl: "**" stands for any number of parts of the name, "*" for one."""
    parts = [".*" if part == "**" else "[^/]+" if part == "*" else re.escape(part) for part in pattern.split("/")[1:]]
    text = "/".join(parts).replace(".*/", "(?:.*/)?")
    return re.fullmatch("/" + text, node) is not None


def _flat(values: dict[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _assignment(text: str) -> tuple[str, str, Any]:
    name, sign, value = text.partition(":=")
    node, colon, bare = name.rpartition(":")
    if not sign or not bare or (colon and not node):
        raise ValueError(f"-p {text}: expected NAME:=VALUE or NODE:NAME:=VALUE, as `ros2 run … --ros-args -p` takes it")
    try:
        return node, bare, yaml.safe_load(value) if value else ""
    except yaml.YAMLError as error:
        raise ValueError(f"-p {text}: the value is no YAML; put it in quotes") from error
