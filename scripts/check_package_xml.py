# SPDX-License-Identifier: Apache-2.0
"""Checks package.xml files: the rules of package format 3 (REP 149) as catkin_pkg knows them, warnings included."""

from __future__ import annotations

import sys
from pathlib import Path

from catkin_pkg.package import InvalidPackage, parse_package


def problems(path: Path) -> list[str]:
    """What is wrong with a package.xml; empty if nothing is."""
    warnings: list[str] = []
    try:
        package = parse_package(str(path), warnings=warnings)
    except (InvalidPackage, OSError) as error:
        return [str(error)]
    if package.package_format != 3:
        warnings.append(f"format is {package.package_format}, expected 3")
    return [f"{path}: {warning}" for warning in warnings]


def main() -> int:
    found = [problem for name in sys.argv[1:] for problem in problems(Path(name))]
    print("\n".join(found), end="\n" if found else "", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
