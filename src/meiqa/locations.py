"""Where meiqa finds what is shipped with it and keeps what belongs to the user."""

from __future__ import annotations

import os
from pathlib import Path

from platformdirs import user_cache_path, user_data_path


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
    return user_data_path("meiqa", appauthor=False) / "memory"


def user_cache() -> Path:
    """Give the directory of what can be computed again; `MEIQA_CACHE` names another."""
    if named := os.environ.get("MEIQA_CACHE"):
        return Path(named)
    return user_cache_path("meiqa", appauthor=False)
