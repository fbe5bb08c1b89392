# SPDX-License-Identifier: Apache-2.0
"""A ROS 2 Jazzy inside a virtual environment, for machines that have none.

The package index has rclpy, Fast DDS, the common messages and the interface generators as wheels (``ros-jazzy-*``,
requirements/ros-jazzy.txt); a virtual environment so filled is an ament prefix. It has neither ``launch`` nor
``ros2``: those are taken, unmodified, out of one large wheel, and the interface packages in it that are compiled
for one Python only are built again here from their .msg and .srv files. On a robot nothing of this is used.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent

# The wheel is for CPython 3.12, which does not matter: only pure-Python packages are taken out of it.
WHEEL_REQUIREMENT = "isaacsim-ros2==6.2.0.0"
WHEEL_TAGS = ["--python-version", "3.12", "--platform", "manylinux_2_35_x86_64", "--only-binary=:all:"]
WHEEL_SHA256 = "34910c880e452528f5771e0f31673b08703e522f2d09cdb173216be7cd89844f"
WHEEL_ROOT = "isaacsim/exts/isaacsim.ros2.core/jazzy/"

# Upstream ROS 2 packages under Apache-2.0 or BSD-3-Clause. The rest of the wheel is NVIDIA's and stays in it.
PACKAGES = (
    "launch",
    "launch_ros",
    "launch_xml",
    "launch_yaml",
    "launch_testing",
    "launch_testing_ros",
    "osrf_pycommon",
    "rosidl_runtime_py",
    "ros2cli",
    "ros2node",
    "ros2param",
    "ros2pkg",
    "ros2run",
    "ros2service",
    "ros2topic",
    "ament_copyright",  # `ros2 pkg` imports it
    "diagnostic_updater",
    "message_filters",
)
SINGLE_MODULES = ("launch_testing_ros_pytest_entrypoint.py",)

# Interface packages to build, with what each depends on. launch_ros imports the first;
# the phase node publishes vision_msgs/Classification where vision_msgs is installed.
INTERFACES = {
    "composition_interfaces": ["rcl_interfaces"],
    "vision_msgs": ["std_msgs", "geometry_msgs"],
}

CONSOLE_SCRIPTS = {
    "ros2": "ros2cli.cli",
    "_ros2_daemon": "ros2cli.daemon",
    "launch_test": "launch_testing.launch_test",
}

# Paths of the machine that built the ros-jazzy wheels, left in their exported CMake files.
BUILD_INCLUDE = re.compile(r"/opt/python/cp3\d+-cp3\d+/include/python3\.\d+")
BUILD_NUMPY = re.compile(r"/opt/python/cp3\d+-cp3\d+/lib/python3\.\d+/site-packages/numpy/_?core/include")

# colcon's install/setup.* source these for every prefix below the workspace, so that one file is enough for users.
LOCAL_SETUP = """\
# Written by scripts/setup.py; install/setup.bash sources it, source that one instead.
_surg_venv="{venv}"
_surg_prepend() {{
  eval "_surg_value=\\"\\${{$1-}}\\""
  case ":$_surg_value:" in
    *":$2:"*) ;;
    *) export "$1=$2${{_surg_value:+:$_surg_value}}" ;;
  esac
}}
_surg_prepend PATH "$_surg_venv/bin"
{ros}unset -f _surg_prepend
unset _surg_venv _surg_value
"""
LOCAL_SETUP_ROS = """\
_surg_prepend AMENT_PREFIX_PATH "$_surg_venv"
_surg_prepend CMAKE_PREFIX_PATH "$_surg_venv"
_surg_prepend LD_LIBRARY_PATH "$_surg_venv/lib"
export ROS_DISTRO=jazzy ROS_VERSION=2 ROS_PYTHON_VERSION=3
"""


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def is_intact(wheel: Path, sha256: str) -> bool:
    """True if the file is there and is, byte for byte, the one that this project was tested with."""
    return wheel.is_file() and sha256_of(wheel) == sha256


def extract(wheel: Path, venv: Path, site_packages: Path, sources: Path) -> int:
    """Unpacks PACKAGES into the virtual environment and the INTERFACES' definitions below ``sources``.

    Returns the number of files written. Raises KeyError if a package is not in the wheel.
    """
    written = 0
    seen = set()
    with zipfile.ZipFile(str(wheel)) as archive:
        for member in archive.namelist():
            if member.endswith("/") or not member.startswith(WHEEL_ROOT):
                continue
            target = _target(member[len(WHEEL_ROOT) :], venv, site_packages, sources)
            if target is None:
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member) as source, target.open("wb") as file:
                shutil.copyfileobj(source, file)
            seen.add(member[len(WHEEL_ROOT) :].split("/")[1])
            written += 1
    missing = (set(PACKAGES) | set(INTERFACES)) - seen
    if missing:
        raise KeyError(f"not in {wheel.name}: {', '.join(sorted(missing))}")
    for package in INTERFACES:
        shutil.copy(str(HERE / "interfaces" / "CMakeLists.txt"), str(sources / package))
    return written


def _target(name: str, venv: Path, site_packages: Path, sources: Path) -> Path | None:
    """Where a member goes, or None if it stays in the wheel."""
    top, _, rest = name.partition("/")
    package, _, inner = rest.partition("/")
    if top == "rclpy":
        distribution = package.split("-")[0] if package.endswith(".egg-info") else package
        if distribution in PACKAGES or package in SINGLE_MODULES:
            return site_packages / rest
    elif top == "share":
        if package in PACKAGES and inner == "package.xml":
            return venv / name
        if package in INTERFACES and (inner == "package.xml" or inner.endswith((".msg", ".srv"))):
            return sources / rest
        if name.rpartition("/")[0] == "share/ament_index/resource_index/packages" and Path(name).name in PACKAGES:
            return venv / name
    return None


def write_console_scripts(venv: Path) -> None:
    for name, module in CONSOLE_SCRIPTS.items():
        script = venv / "bin" / name
        script.write_text(
            f"#!{venv}/bin/python\nimport sys\n\nfrom {module} import main\n\nsys.exit(main())\n", encoding="utf-8"
        )
        script.chmod(script.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)


def write_local_setup(venv: Path, has_ros: bool) -> None:
    """Writes local_setup.{sh,bash,zsh}: the environment's own bin, and ROS 2 where it lies in the environment."""
    for shell in ("sh", "bash", "zsh"):
        text = LOCAL_SETUP.format(venv=venv, ros=LOCAL_SETUP_ROS if has_ros else "")
        (venv / f"local_setup.{shell}").write_text(text, encoding="utf-8")


def fix_cmake_paths(venv: Path, include: str, numpy_include: str) -> int:
    """Replaces the build machine's paths in exported CMake files; returns the number of files changed."""
    changed = 0
    for path in sorted((venv / "share").glob("*/cmake/*.cmake")):
        old = path.read_text(encoding="utf-8")
        new = BUILD_NUMPY.sub(lambda _: numpy_include, BUILD_INCLUDE.sub(lambda _: include, old))
        if new != old:
            temporary = path.with_suffix(".new")
            temporary.write_text(new, encoding="utf-8")
            os.replace(str(temporary), str(path))
            changed += 1
    return changed
