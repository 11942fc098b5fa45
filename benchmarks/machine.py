"""What a figure was measured on."""

from __future__ import annotations

import os
import platform
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

__all__ = ["machine", "versions"]

_PROCESSORS = Path("/proc/cpuinfo")


def machine() -> dict[str, Any]:
    """Name the processor, the cores it lends and the operating system."""
    listed = _PROCESSORS.read_text() if _PROCESSORS.is_file() else ""
    named = re.search(r"^model name\s*:\s*(.+)$", listed, re.MULTILINE)
    return {
        "processor": named[1] if named else platform.machine(),
        "cores": os.cpu_count(),
        "system": platform.system(),
    }


def versions(*packages: str) -> dict[str, str]:
    """Give the versions of Python and of installed packages."""
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}
