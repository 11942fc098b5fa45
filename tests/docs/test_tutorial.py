"""The tutorial runs as it stands, and the reference is what the docstrings say."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
from PIL import Image

from tests.engine.samples import picture

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give an empty folder with two photographs, and a memory that is nobody's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEIQA_MEMORY", str(tmp_path / "memory"))
    for seed, name in enumerate(("photo.png", "other.png")):
        Image.fromarray(picture(seed, (240, 320))).save(tmp_path / name)
    return tmp_path


def test_the_tutorial_runs_block_by_block(folder: Path) -> None:
    blocks = BLOCK.findall((ROOT / "docs" / "python.md").read_text())
    assert len(blocks) > 8
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "docs/python.md", "exec"), names)


def test_the_page_on_families_runs_block_by_block(folder: Path) -> None:
    from meiqa.export.families import FAMILIES

    blocks = BLOCK.findall((ROOT / "docs" / "families.md").read_text())
    assert len(blocks) > 8
    names: dict[str, object] = {"__name__": "families"}
    known = dict(FAMILIES)
    try:
        for block in blocks:
            exec(compile(block, "docs/families.md", "exec"), names)
    finally:
        FAMILIES.clear()
        FAMILIES.update(known)
    assert len(list((folder / "toy-package").iterdir())) > 5


def test_the_page_on_priors_runs_block_by_block(folder: Path) -> None:
    pytest.importorskip("torch", reason="the example is in PyTorch, which is not installed")
    names: dict[str, object] = {}
    for block in BLOCK.findall((ROOT / "docs" / "priors.md").read_text()):
        exec(compile(block, "docs/priors.md", "exec"), names)


def test_the_reference_is_up_to_date() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "api_docs.py"))
    message = "docs/api.md is not what the docstrings say: python scripts/api_docs.py"
    assert script["PAGE"].read_text() == script["page"](), message
