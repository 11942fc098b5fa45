"""The folder that is made holds what it says."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from benchmarks.mixed_folder import make_folder
from meiqa.engine.images import load_pixels
from meiqa.folders import gather


def test_a_folder_holds_so_many_photos_and_what_lies_beside_them(tmp_path: Path) -> None:
    made = make_folder(tmp_path / "mixed", 45, None)
    assert len(made.photos) == 45
    kinds = Counter(Path(photo).suffix.lower() for photo in made.photos)
    assert {"", ".heic", ".jxl", ".avif", ".dng", ".mpo", ".jpg"} <= kinds.keys()
    found = gather([str(made.folder)])
    assert ({*found.photos}, found.passed_over) == (made.photos, made.passed_over)
    assert made.passed_over.keys() == {
        *("sidecar", "video", "hidden folder", "other file", "RAW twin")
    }
    assert all(load_pixels(photo).array.size == 240 * 320 * 3 for photo in sorted(made.photos)[:14])
