"""What is told of JPEGs is counted by kind, and of what never was one."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from benchmarks import jpeg
from tests.engine.test_detail import blurred, noisy, scene


def test_every_kind_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jpeg, "QUALITIES", (40, 90))
    Image.fromarray(noisy(blurred(scene(300, 420), 0.7), 2)).save(tmp_path / "photo.png")
    report = jpeg.judged([tmp_path / "photo.png"], [{0: [2 * each for each in range(1, 65)]}])
    assert report["never a JPEG"] == {"n": 2, "taken for one": 0}
    assert set(report["files"]) == {"file", "pixels", "cropped", "again", "camera tables"}
    for kind in ("file", "pixels", "cropped"):
        assert report["files"][kind]["n"] == 2
        assert report["files"][kind]["largest error"] == 0
    assert report["files"]["camera tables"]["n"] == 1
