"""What Numba compiles: as plain Python, and where there is no place to keep it."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from meiqa.kernels import graph

SEARCH = """
import numpy as np
from meiqa.kernels.graph import Graph
from meiqa.kernels.hnsw import search_graph
keys = np.eye(3, dtype=np.float16).view(np.uint16)
none = np.zeros((0, 1), np.int32)
graph = Graph(
    keys, np.eye(3, dtype=np.int8), np.ones(3, np.float32), np.full((3, 2), -1, np.int32),
    np.zeros(4, np.int32), none, np.zeros(1, np.int32)
)
print(search_graph(graph, np.array([0, 1, 0], np.float32), 2, None, 1).tolist())
"""


@pytest.mark.slow
def test_the_tests_pass_with_the_jit_off() -> None:
    here = Path(__file__).parent
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_hnsw.py"],
        cwd=here,
        env={**os.environ, "NUMBA_DISABLE_JIT": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-4000:]


def installed_where_nothing_may_be_written(folder: Path) -> dict[str, str]:
    """Copy the kernels as a package; give an environment in which they are found.

    A file in the place of the cache's folder keeps even root from writing. Run it with `-S`, or an
    editable install is found before the copy.
    """
    kernels = folder / "meiqa" / "kernels"
    kernels.mkdir(parents=True)
    (folder / "meiqa" / "__init__.py").touch()
    for name in ("__init__.py", "graph.py", "hnsw.py"):
        (kernels / name).write_bytes((Path(graph.__file__).parent / name).read_bytes())
        (kernels / name).chmod(0o444)
    (kernels / "__pycache__").touch()
    kernels.chmod(0o555)
    home = {"HOME": "/dev/null/home", "XDG_CACHE_HOME": "/dev/null/cache"}
    kept = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
    found = os.pathsep.join([str(folder), sysconfig.get_path("purelib")])
    return {**kept, **home, "PYTHONPATH": found, "PYTHONDONTWRITEBYTECODE": "1"}


@pytest.mark.slow
def test_searches_uncached_where_nothing_may_be_written(tmp_path: Path) -> None:
    environment = installed_where_nothing_may_be_written(tmp_path)
    run = subprocess.run(
        [sys.executable, "-S", "-c", SEARCH],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stdout) == (0, "[1, 0]\n"), run.stderr


def test_the_place_that_numba_is_given_is_used(tmp_path: Path) -> None:
    environment = installed_where_nothing_may_be_written(tmp_path)
    environment["NUMBA_CACHE_DIR"] = str(tmp_path / "cache")
    run = [sys.executable, "-S", "-c", "import meiqa.kernels.hnsw"]
    subprocess.run(run, env=environment, check=True)
    assert list((tmp_path / "cache").iterdir())
