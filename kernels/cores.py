"""How many processors there are to share work among, of what kinds, and how much memory."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

_SPEEDS = ("cpu_capacity", "cpufreq/cpuinfo_max_freq")
"""Where Linux tells how fast a processor is: ARM by a measure of its own, others in kHz."""
_GROUP_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)
_ALIKE = 0.9
"""Processors of one kind differ by less: some may run faster while others rest."""


def usable_cores() -> int:
    """Processors that this process may use; all of the machine's where the system does not say."""
    return len(_numbers())


def cores_differ(listed: Path = Path("/sys/devices/system/cpu")) -> bool:
    """Tell whether some of these processors are slower by design, as far as the system says."""
    if sys.platform == "darwin":
        return platform.machine() == "arm64"  # all of which have two kinds
    speeds = [speed for number in _numbers() if (speed := _speed(listed / f"cpu{number}"))]
    return bool(speeds) and min(speeds) < _ALIKE * max(speeds)


def usable_memory() -> int:
    """Bytes of memory that this process may use: the machine's, or its control group's if less."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for limit in _GROUP_LIMITS:
        try:
            limits.append(int(limit.read_text()))
        except (OSError, ValueError):  # there is no such group, or it has no limit
            continue
    return min(limits)


def _numbers() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return [*range(os.cpu_count() or 1)]


def _speed(processor: Path) -> int | None:
    for name in _SPEEDS:
        try:
            return int((processor / name).read_text())
        except (OSError, ValueError):  # it is not told here
            continue
    return None
