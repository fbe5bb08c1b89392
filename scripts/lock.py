# SPDX-License-Identifier: Apache-2.0
"""Writes requirements/constraints.txt: the exact version of every package that another one brings along.

    python3 scripts/lock.py [--keep] PYTHON3.10 PYTHON3.11 PYTHON3.12

Run it after changing a requirements file. pip resolves all of them together on each interpreter; nothing is
installed. Packages that PyTorch brings for CUDA are left to PyTorch, which pins them itself. --keep leaves the versions
that constraints.txt has, and only adds and removes.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "requirements"
FILES = ("build", "numpy2", "runtime", "colcon", "ros-jazzy", "surgllm", "model-server", "test")
LEFT_TO_PYTORCH = re.compile(r"(nvidia|cuda)-.*|triton|torch")
HEADER = "# Written by scripts/lock.py; versions of what the other files bring along, where ROS 2 comes from wheels.\n"


def direct_names() -> set[str]:
    lines = "\n".join((FOLDER / f"{name}.txt").read_text() for name in FILES).splitlines()
    names = (re.match(r"[A-Za-z0-9_.-]+", line) for line in lines)
    return {canonical(match.group()) for match in names if match}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def resolve(python: str, kept: Path | None) -> tuple[str, dict[str, str]]:
    """The interpreter's version as major.minor, and the version of every package that pip would install there.

    Args:
        python: the interpreter.
        kept: constraints to obey.
    """
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([python, "-m", "venv", folder], check=True)
        pip = [f"{folder}/bin/python", "-m", "pip"]
        subprocess.run([*pip, "install", "--quiet", "-r", str(FOLDER / "build.txt")], check=True)
        report = Path(folder) / "report.json"
        command = [*pip, "install", "--quiet", "--dry-run", "--ignore-installed", "--report", str(report)]
        if kept is not None:
            command += ["-c", str(kept)]
        for name in FILES:
            command += ["-r", str(FOLDER / f"{name}.txt")]
        subprocess.run(command, check=True)
        answer = json.loads(report.read_text())
    version = ".".join(answer["environment"]["python_full_version"].split(".")[:2])
    found = {canonical(i["metadata"]["name"]): i["metadata"]["version"].partition("+")[0] for i in answer["install"]}
    return version, found


def lines(resolved: dict[str, dict[str, str]], direct: set[str]) -> list[str]:
    """One line per package and version, marked with the Pythons it is for unless it is for all."""
    everything = {name for found in resolved.values() for name in found}
    result = []
    for name in sorted(everything - direct):
        if LEFT_TO_PYTORCH.fullmatch(name):
            continue
        versions: dict[str, list[str]] = {}
        for python, found in resolved.items():
            if name in found:
                versions.setdefault(found[name], []).append(python)
        for version, pythons in versions.items():
            marker = " or ".join(f'python_version == "{python}"' for python in pythons)
            result.append(f"{name}=={version}" + ("" if len(pythons) == len(resolved) else f"; {marker}"))
    return result


def main() -> None:
    keep = "--keep" in sys.argv[1:]
    pythons = [word for word in sys.argv[1:] if word != "--keep"]
    if not pythons:
        sys.exit(__doc__)
    constraints = FOLDER / "constraints.txt"
    resolved = dict(resolve(python, constraints if keep else None) for python in pythons)
    constraints.write_text(HEADER + "\n".join(lines(resolved, direct_names())) + "\n")


if __name__ == "__main__":
    main()
