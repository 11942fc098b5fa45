"""What figures were measured on."""

from __future__ import annotations

import os
import platform

import numpy as np

from meiqa.benchmarks.machine import machine, versions


def test_machine_and_versions() -> None:
    assert machine()["cores"] == os.cpu_count()
    assert machine()["processor"]
    assert versions("numpy") == {"python": platform.python_version(), "numpy": np.__version__}
