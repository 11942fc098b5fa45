"""Where meiqa finds what is shipped with it and keeps what belongs to the user."""

from __future__ import annotations

import os
import sys
from pathlib import Path

__all__ = ["embedded_assets", "package_memory", "user_cache", "user_memory"]


def embedded_assets() -> Path:
    """Give the directory of the embedded engine package (`package`) and anchors (`memory`)."""
    return Path(__file__).parent / "assets"


def package_memory(package_digest: str) -> Path:
    """Give the directory of the user's memory for a package, which need not exist yet."""
    return user_memory() / package_digest[:16]


def user_memory() -> Path:
    """Give the directory that holds the user's memories, one directory for each package.

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


def user_cache() -> Path:
    """Give the directory of what can be computed again; `MEIQA_CACHE` names another."""
    if named := os.environ.get("MEIQA_CACHE"):
        return Path(named)
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "meiqa"
