# SPDX-License-Identifier: Apache-2.0
"""Environment that lets large images through Fast DDS, for nodes that are launched and for a process that publishes.

Measured effect and what it is made of: docs/large_images.md.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ament_index_python.packages import get_package_share_directory

VARIABLES = ("FASTDDS_DEFAULT_PROFILES_FILE", "FASTRTPS_DEFAULT_PROFILES_FILE")

# glibc gives large freed blocks back to the kernel at once; each image then costs 6 MB of page faults again.
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**31),
    "MALLOC_TOP_PAD_": str(2**26),
}


def profile_environment(cameras: int = 1) -> tuple[dict[str, str], str]:
    """Variables that load the shipped profile, to be set before a process joins ROS, and what to tell the user.

    The processes of so many cameras share /dev/shm. No variables where the user has chosen a profile.
    """
    chosen = [name for name in VARIABLES if os.environ.get(name)]
    if chosen:
        return {}, f"Fast DDS profile of the environment is used: {os.environ[chosen[0]]}"
    profile, note = _sized_profile(6 * cameras)
    return dict.fromkeys(VARIABLES, str(profile)), note


@contextmanager
def loaded_profile() -> Iterator[str]:
    """The profile for the participants that this process makes meanwhile; gives what to tell the user.

    It is read when a participant is made, and is no business of a process that is started later.
    """
    variables, note = profile_environment()
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield note
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _sized_profile(processes: int) -> tuple[Path, str]:
    """The shipped profile, or a copy whose shared-memory segments fit a small /dev/shm (as containers have)."""
    shipped = Path(get_package_share_directory("surg_perception")) / "config" / "fastdds_large_images.xml"
    text = shipped.read_text()
    match = re.search(r"<segment_size>(\d+)</segment_size>", text)
    wanted = int(match.group(1)) if match else 0
    try:
        fits = shutil.disk_usage("/dev/shm").free // processes
    except OSError:
        fits = wanted
    if fits >= wanted:
        return shipped, ""
    size = max(fits, 2**20) // 2**20 * 2**20
    copy = Path(tempfile.mkdtemp(prefix="surg_perception_")) / shipped.name
    copy.write_text(text.replace(f"<segment_size>{wanted}<", f"<segment_size>{size}<"))
    return copy, (
        f"/dev/shm is small: {size >> 20} MiB of shared memory a process instead of {wanted >> 20}; large raw images "
        "may be lost. Give the container more (docker run --shm-size=1g) or use transport:=compressed"
    )
