"""The house holds the bars that are counted on the tree, and the count sees what it should."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import house


@pytest.fixture(scope="module")
def counts() -> dict[str, Any]:
    return house.counted(None)


def test_what_can_be_read_from_the_tree(counts: dict[str, Any]) -> None:
    assert counts["functions with more than 7 parameters"] == []
    assert counts["circles between files"] == []
    assert counts["places that score a photo"] == ["engine/scoring.py"]
    assert counts["README, lines"] <= 160
    assert counts["ARCHITECTURE, lines"] <= 200
    # 120 without the two subsystems that scale beyond a machine, a bulk run's five and a hub's two,
    # and without the fourth and the fifth family of checkpoints, which are a file each.
    assert counts["installed Python, files"] <= 120 + 7 + 2


def test_a_photo_is_followed_through_its_way(counts: dict[str, Any]) -> None:
    more, fewer = counts["a photo, K = 32"], counts["a photo, K = 0"]
    assert {"engine/engine.py", "engine/scoring.py", "engine/images.py"} <= {*fewer["files"]}
    assert "engine/comparing.py" in more["files"]
    assert more["changes of file"] > fewer["changes of file"] > 0


def test_the_counts_are_laid_out(counts: dict[str, Any]) -> None:
    assert json.loads(json.dumps(counts)) == counts
    text = house.text_of(counts)
    assert all(line.startswith(name) for name, line in zip(counts, text.split("\n"), strict=True))


def test_circles_are_found_wherever_the_import_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = {
        "a.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import meiqa.b\n",
        "b.py": "def load():\n    from meiqa import c\n",
        "c.py": "from meiqa.a import thing\n",
        "d.py": "from meiqa.a import thing\n",
    }
    for name, source in sources.items():
        (tmp_path / name).write_text(source)
    modules = {f"meiqa.{Path(name).stem}": tmp_path / name for name in sources}
    monkeypatch.setattr(house, "modules", lambda: modules)
    assert house.circles() == [["meiqa.a", "meiqa.b", "meiqa.c"]]
