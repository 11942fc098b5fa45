"""What the page on bulk scoring shows for other engines runs, where they are installed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.engine.samples import picture

PAGE = Path(__file__).parents[2] / "docs" / "bulk.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
ENGINES = ("ray", "datasets", "pyspark", "daft")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_snippet_scores_a_folder(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(engine, reason=f"{engine} is in no extra")
    (block,) = (each for each in BLOCKS if re.search(rf"^(import|from) {engine}\b", each, re.M))
    (tmp_path / "photos").mkdir()
    for seed in range(3):
        image = Image.fromarray(picture(seed, (60, 80)))
        image.save(tmp_path / "photos" / f"{seed}.jpg")
    monkeypatch.setenv("PYSPARK_PYTHON", sys.executable)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    check = (
        "import pyarrow.parquet as pq\n"
        "column = pq.read_table('scored')['score'].to_pylist() if engine == 'ray' else "
        "list(scored['score'])\n"
        "assert len(column) == 3 and all(1 <= one <= 5 for one in column), column\n"
    )
    program = f"engine = {engine!r}\n{block}\n{check}"
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
