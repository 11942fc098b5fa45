"""Where meiqa keeps what belongs to the user."""

from __future__ import annotations

import os
import sys
from pathlib import Path

__all__ = ["user_memory"]


def user_memory() -> Path:
    """Give the directory of the user's contrast memory, which need not exist yet.

    `MEIQA_MEMORY` names it; otherwise it is `meiqa/memory` in the platform's data directory.
    """
    if named := os.environ.get("MEIQA_MEMORY"):
        return Path(named)
    return _data_directory() / "meiqa" / "memory"


def _data_directory() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support"
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
