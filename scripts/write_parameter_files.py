# SPDX-License-Identifier: Apache-2.0
"""Writes config/pipeline.yaml and docs/parameters.md from the nodes' parameter tables.

.venv/bin/python scripts/write_parameter_files.py           write both
.venv/bin/python scripts/write_parameter_files.py --check   fail if either differs (a test does this)
"""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from surg_perception.nodes.parameter_table import TABLES, Parameter, Value  # noqa: E402


def scalar(value: Value) -> str:
    """The value as YAML."""
    return json.dumps(value)


def limits(parameter: Parameter) -> str:
    """Choices or range, for people."""
    if parameter.choices:
        return ", ".join(parameter.choices)
    if parameter.minimum is not None and parameter.maximum is not None:
        return f"{parameter.minimum:g} to {parameter.maximum:g}"
    return ""


def yaml_text() -> str:
    """config/pipeline.yaml: every parameter of every node with its default."""
    lines = [
        "# Every parameter of every node with its default. Written by scripts/write_parameter_files.py from",
        "# surg_perception/nodes/parameter_table.py: change it there. For your own settings copy this file, keep",
        "# the lines you change, and pass it with params_file:=…",
    ]
    for table in TABLES.values():
        lines += ["", f"/**/{table.node}:", "  ros__parameters:"]
        for parameter in table.parameters:
            lines += [f"    # {line}" for line in textwrap.wrap(parameter.description, 104)]
            lines.append(f"    {parameter.name}: {scalar(parameter.default)}")
    return "\n".join(lines) + "\n"


def markdown_text() -> str:
    """docs/parameters.md: the same as tables."""
    lines = [
        "# Parameters",
        "",
        "Written by `scripts/write_parameter_files.py` from `surg_perception/nodes/parameter_table.py`.",
        "*Live* parameters may be set while the node runs (`ros2 param set`); the others are read at configure, and",
        "setting them on a configured node is refused with a reason. A parameter file that holds them all with their",
        "defaults: `config/pipeline.yaml`.",
    ]
    for table in TABLES.values():
        lines += ["", f"## `{table.node}`", "", "| parameter | type | default | range | live | meaning |"]
        lines.append("|---|---|---|---|---|---|")
        for p in table.parameters:
            lines.append(
                f"| `{p.name}` | {type(p.default).__name__} | `{scalar(p.default)}` | {limits(p)} | "
                f"{'yes' if p.live else ''} | {p.description} |"
            )
        lines += [f"\n`{low}` must not exceed `{high}`." for low, high in table.ordered]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write or check both files; returns the exit status."""
    stale = []
    for path, text in (
        (ROOT / "config" / "pipeline.yaml", yaml_text()),
        (ROOT / "docs" / "parameters.md", markdown_text()),
    ):
        if "--check" in sys.argv:
            if not path.is_file() or path.read_text() != text:
                stale.append(str(path.relative_to(ROOT)))
        else:
            path.write_text(text)
    if stale:
        print(f"{', '.join(stale)} differ from the parameter tables: run scripts/write_parameter_files.py")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
