# SPDX-License-Identifier: Apache-2.0
"""ROS message types for bags, without a ROS installation: those of Jazzy and this package's own."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rosbags.typesys.store import Typestore

MESSAGES = "surg_perception_msgs"
# What follows from a service's and an action's file, in the order of their parts.
_PARTS = {".msg": ("",), ".srv": ("_Request", "_Response"), ".action": ("_Goal", "_Result", "_Feedback")}


@cache
def typestore() -> Typestore:
    """Types of ROS 2 Jazzy and of surg_perception_msgs, there also `srv/Ask_Request`, `action/Answer_Goal` and so on.

    Raises FileNotFoundError where the interface files lie neither in the source tree nor in an installed share folder.
    """
    from rosbags.typesys import Stores, get_types_from_msg, get_typestore

    store = get_typestore(Stores.ROS2_JAZZY)
    types: dict[str, Any] = {}
    for file in sorted(_interfaces().glob("*/*.*")):
        parts = _PARTS.get(file.suffix, ())
        for part, text in zip(parts, file.read_text().split("\n---\n"), strict=bool(parts)):
            found = get_types_from_msg(text, f"{MESSAGES}/{file.parent.name}/{file.stem}{part}")
            types |= {name.replace("/srv/msg/", "/srv/"): fields for name, fields in found.items()}
    store.register(types)
    return store


def _interfaces() -> Path:
    here = Path(__file__).resolve()
    prefixes = [Path(prefix) for prefix in os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep) if prefix]
    folders = [here.parents[2] / MESSAGES]
    # Below the package's own prefix, and beside it: colcon installs each package apart.
    folders += [prefix / "share" / MESSAGES for prefix in (*prefixes, *here.parents[2:7])]
    folders += [prefix / MESSAGES / "share" / MESSAGES for prefix in here.parents[2:8]]
    for folder in folders:
        if (folder / "msg").is_dir():
            return folder
    raise FileNotFoundError(
        f"the interface files of {MESSAGES} are in none of {', '.join(map(str, folders))}; "
        "build and source the workspace"
    )
