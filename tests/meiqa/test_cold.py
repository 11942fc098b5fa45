"""A cold `meiqa score photo.jpg` imports what it needs, and nothing that takes long to load."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from meiqa.evaluation.measuring import made_jpeg

NOT_NEEDED = {
    *("numba", "llvmlite", "scipy", "hnswlib"),  # solvers and searches of more than one photo
    *("torch", "transformers", "onnx", "tensorrt", "tensorrt_rtx", "matplotlib"),
    *("meiqa.evaluation", "meiqa.export", "meiqa.serve", "meiqa.engine.remote"),
    *("importlib.metadata", "email", "PIL.TiffImagePlugin", "numpy.ma"),
}
PROBE = """
import gc, sys
from meiqa.cli import main
code = main(sys.argv[1:])
print(*sorted(sys.modules.keys() & set({names!r})), file=sys.stderr)
print("collecting again:", gc.isenabled() and gc.get_freeze_count() > 10_000)
sys.exit(code)
"""


@pytest.mark.parametrize("k", ["8", "32"])
def test_a_cold_score_imports_nothing_that_it_does_not_need(tmp_path: Path, k: str) -> None:
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(made_jpeg(0))
    probe = PROBE.format(names=sorted(NOT_NEEDED))
    run = subprocess.run(
        [sys.executable, "-P", "-c", probe, "score", str(photo), "--no-learn", "--k", k],
        env={**os.environ, "MEIQA_MEMORY": str(tmp_path / "memory")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr.strip() == ""
    assert "compared" in run.stdout
    assert run.stdout.endswith("collecting again: True\n")
