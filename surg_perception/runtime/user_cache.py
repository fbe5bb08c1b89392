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
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():  # so says the XDG base directory specification
        base = Path.home() / ".cache"
    folder = base / "surg_perception" / name
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
