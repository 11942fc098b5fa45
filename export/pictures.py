"""Photographs of a folder, to calibrate on."""

from __future__ import annotations

import hashlib
from pathlib import Path

from meiqa.engine.images import IMAGE_SUFFIXES
from meiqa.errors import UsageError


def pictures_in(folder: Path, count: int) -> list[Path]:
    """Up to `count` photographs of a folder, spread by a hash of their names.

    Raises:
        UsageError: there are none.
    """
    if not folder.is_dir():
        raise UsageError("there is no folder with photographs", seen=folder)
    photographs = [
        path
        for path in folder.iterdir()
        if path.suffix.lower() in IMAGE_SUFFIXES and path.name[0] != "." and path.is_file()
    ]
    if not photographs:
        allowed = ", ".join(sorted(IMAGE_SUFFIXES))
        raise UsageError(f"{folder} holds no photographs", allowed=allowed)
    by_hash = sorted(photographs, key=lambda p: hashlib.sha256(p.name.encode()).hexdigest())
    return by_hash[:count]
