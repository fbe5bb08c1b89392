# SPDX-License-Identifier: Apache-2.0
"""Folders below the user's cache for what an inference engine compiled: the user's alone, for it is loaded as code."""

from __future__ import annotations

import logging
import os
from pathlib import Path

_logger = logging.getLogger("surg_perception.runtime")


def cache_folder(name: str, holds: str) -> Path | None:
    """Folder `$XDG_CACHE_HOME/surg_perception/<name>`, made if need be (0700); None, with a warning, if it is unsafe.

    What lies there is loaded as code by a GPU driver, so a folder that others own or may write is not used.

    Args:
        name: of the folder.
        holds: what it holds, for the warning: "compiled kernels".
    """
    folder = _path(name)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.mkdir(exist_ok=True, mode=0o700)
        status = folder.lstat()
    except (OSError, RuntimeError) as error:
        _logger.warning("no cache of %s: %s", holds, error)
        return None
    if folder.is_symlink() or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        _logger.warning("no cache of %s: %s is not a folder of this user alone (mode 0700)", holds, folder)
        return None
    return folder


def cache_fault(name: str) -> str:
    """Why `cache_folder` would give no folder, "" if it would; makes nothing."""
    folder = _path(name)
    status = None
    try:
        nearest = next(path for path in (folder, *folder.parents) if path.exists() or path.is_symlink())
        status = folder.lstat() if nearest == folder else None
    except OSError as error:
        return str(error)
    if not nearest.is_dir():
        return f"{nearest} is not a folder"
    if not os.access(nearest, os.W_OK | os.X_OK):
        return f"{nearest} is not writable for this user"
    if status is not None and (folder.is_symlink() or status.st_uid != os.geteuid() or status.st_mode & 0o077):
        return f"{folder} is not a folder of this user alone (mode 0700)"
    return ""


def _path(name: str) -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():  # so says the XDG base directory specification
        base = Path.home() / ".cache"
    return base / "surg_perception" / name
