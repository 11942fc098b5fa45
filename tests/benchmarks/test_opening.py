"""A whole memory is opened without reading it, and its readers share what they read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import opening
from benchmarks.opening import PACKAGE_DIGEST, bench_opening, write_synthetic_memory
from benchmarks.vectors import clustered_vectors
from meiqa.memory import AnchorWriter, MemoryBank, verify_memory


def test_a_whole_memory_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "_OPENINGS", 1)
    monkeypatch.setattr(opening, "_VERIFIED_OPENINGS", 1)
    result = bench_opening([3500], 16, 30, directory=tmp_path)
    (row,) = result["rows"]
    assert json.loads(json.dumps(result)) == result
    assert row["n"] == 3500
    assert row["write_s"] > 0
    assert 0 < row["open_ms"] <= row["open_max_ms"]
    assert row["verified_ms"] > 0
    assert row["files_mb"] > 1
    assert (
        0 <= row["resident_mb"] == pytest.approx(row["resident_share"] * row["files_mb"], abs=0.1)
    )
    assert 0 < row["retrieve_p50_ms"] <= row["retrieve_p95_ms"] <= row["retrieve_p99_ms"]
    # Opening takes no kernel: Numba, whose import takes longer, is for who searches.
    opened = (
        "import sys; from pathlib import Path; from meiqa.memory import MemoryBank\n"
        f"with MemoryBank.open(Path({str(tmp_path / '3500x16-0.memory')!r}), "
        f"package_digest={PACKAGE_DIGEST!r}) as bank: bank.snapshot()\n"
        "sys.exit('numba' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-P", "-c", opened], check=False).returncode == 0
    assert len(row["pss_mb"]) == 4
    for rss, pss in zip(row["rss_mb"], row["pss_mb"], strict=True):
        assert 0 < pss <= rss / 2


def test_an_interrupted_memory_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, _ = clustered_vectors(100, 16, 1, seed=0)
    add = AnchorWriter.add

    def interrupted(writer: AnchorWriter, case: object, **options: object) -> None:
        if len(writer.known_ids) == 60:
            raise KeyboardInterrupt
        add(writer, case, **options)  # type: ignore[arg-type]

    path = tmp_path / "memory"
    monkeypatch.setattr(AnchorWriter, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_synthetic_memory(path, keys)
    monkeypatch.undo()
    assert not path.exists()
    write_synthetic_memory(path, keys)
    with MemoryBank.open(path, package_digest=PACKAGE_DIGEST) as bank:
        assert bank.snapshot().count_anchors == 100
    assert verify_memory(path) == []
