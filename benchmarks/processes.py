"""Measuring in processes of their own: what opening takes, and what several of them share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

__all__ = [
    "ENVIRONMENT",
    "asked_afresh",
    "memory_kb",
    "module_command",
    "peak_kb",
    "reported_together",
    "resident_kb",
    "say",
    "wait_for_go",
]

_NO_SITE = ("-S",) if sys.flags.no_site else ()  # a child starts as this interpreter did
_ROOT = str(Path(__file__).parents[1])
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(filter(None, (_ROOT, os.environ.get("PYTHONPATH")))),
}
"""Of a child, which finds this folder wherever it starts."""


def asked_afresh(module: str, *arguments: object) -> dict[str, Any]:
    """Run a module in a fresh process and give the JSON that it prints."""
    run = subprocess.run(
        module_command(module, *arguments),
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    printed: dict[str, Any] = json.loads(run.stdout)
    return printed


def reported_together(count: int, module: str, *arguments: object) -> list[dict[str, Any]]:
    """Run a module in several processes, and have each report while all are there.

    The module works, calls `wait_for_go`, reports with `say`, and waits again.
    """
    command = module_command(module, *arguments)
    readers = [
        subprocess.Popen(
            command, env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(count)
    ]
    reports = []
    try:
        for reader in readers:
            assert reader.stdout is not None
            reader.stdout.readline()
        for reader in readers:
            assert reader.stdin is not None
            assert reader.stdout is not None
            reader.stdin.write("\n")
            reader.stdin.flush()
            reports.append(json.loads(reader.stdout.readline()))
    finally:
        for reader in readers:
            reader.communicate("\n")
    return reports


def wait_for_go() -> None:
    """Tell the parent of `reported_together` that the work is done, and wait for the others."""
    say("ready")
    sys.stdin.readline()


def say(text: str) -> None:
    """Print a line at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def resident_kb() -> int:
    """Give the resident memory of this process in KiB."""
    return memory_kb("/proc/self/smaps_rollup", "")["Rss"]


def peak_kb() -> int:
    """Give the most memory that was resident in this process, in KiB.

    What `getrusage` says would be that of the process that started this one, where it was more.
    """
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])


def memory_kb(listing: str, mapping: str) -> dict[str, int]:
    """Sum resident (Rss) and proportional (Pss) memory over the mappings of one file, or all."""
    sums = {"Rss": 0, "Pss": 0}
    counted = False
    for line in Path(listing).read_text().splitlines():
        field, *rest = line.split()
        if not field.endswith(":"):
            counted = line.endswith(mapping)
        elif counted and field[:-1] in sums:
            sums[field[:-1]] += int(rest[0])
    return sums


def module_command(module: str, *arguments: object) -> list[str]:
    """Give the command that runs a module in an interpreter like this one."""
    return [sys.executable, "-P", *_NO_SITE, "-m", module, *map(str, arguments)]
