"""The wheel, in an environment of its own and outside the checkout, scores a photo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from PIL import Image

from tests.engine.samples import picture

ROOT = Path(__file__).parents[1]


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command with nothing of this environment's on its path, and give what it prints."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env=clean, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the interpreter of an environment that holds the wheel, and the extra `cpu`."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-q")
    run(*pip, "wheel", "--no-deps", "-w", folder, ROOT, cwd=folder)
    (wheel,) = folder.glob("meiqa-*.whl")
    venv.create(folder / "env", with_pip=True)
    python = folder / "env" / "bin" / "python"
    run(python, "-m", "pip", "-q", "install", f"{wheel}[cpu]", cwd=folder)
    return python


def test_it_scores_a_photo(python: Path, tmp_path: Path) -> None:
    Image.fromarray(picture(1, (240, 320))).save(tmp_path / "photo.png")
    command = (python.parent / "meiqa", "score", "photo.png", "--no-learn", "--format", "json")
    (result,) = json.loads(run(*command, cwd=tmp_path))
    assert 1.0 <= result["score"] <= 5.0
    assert result["summary"]


def test_the_library_opens_inside_a_checkout(python: Path) -> None:
    program = "from meiqa import Engine; Engine.open(learn=False).close(); print('opened')"
    assert run(python, "-c", program, cwd=ROOT).strip() == "opened"


def test_the_base_install_is_small(python: Path) -> None:
    packages = run(python, "-m", "pip", "list", "--format", "json", cwd=python.parent)
    names = {each["name"].lower() for each in json.loads(packages)}
    assert not names & {"numba", "llvmlite", "scipy", "hnswlib", "torch"}
    site = next((python.parent.parent / "lib").glob("python*/site-packages"))
    held = sum(
        file.stat().st_size
        for file in site.rglob("*")
        if file.is_file() and file.relative_to(site).parts[0] not in {"pip", "setuptools"}
    )
    assert held <= 300e6, f"{held / 1e6:.0f} MB"
