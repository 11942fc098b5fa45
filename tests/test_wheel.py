"""Wheels, each installed into an empty environment without network and compiler, score a photo."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import venv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from PIL import Image

from scripts.roots import Root, unpacked
from scripts.wheels import ARCHITECTURES, built, missing_tools
from tests.engine.samples import picture

ROOT = Path(__file__).parents[1]
HERE = platform.machine()
RELEASE, PYTHON = "trixie", "3.13"
SYSTEM = ("dash", "coreutils", "python3", "libstdc++6")
"""Of a machine that scores photos: no pip, no compiler."""
NO_NETWORK = ("Could not resolve", "Temporary failure", "Could not connect", "Unable to connect")
INSTALLED_BYTES = 200e6
Wheels = Callable[[str], Path]


@contextmanager
def needs_network() -> Iterator[None]:
    """Skip where Debian's packages are not to be had, and say what a tool said of another fault."""
    try:
        yield
    except subprocess.CalledProcessError as error:
        if any(words in error.stderr for words in NO_NETWORK):
            pytest.skip("Debian's packages cannot be fetched without network")
        pytest.fail(f"{error.cmd}: {error.stdout}{error.stderr}")


def run(*command: str | Path, cwd: Path, path: str = os.defpath) -> str:
    """Run a command with nothing of this environment's on its path, and give what it prints."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    clean["PATH"] = path
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env=clean, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Wheels:
    """Give what builds the wheel of an architecture, once."""

    @cache
    def wheel(machine: str) -> Path:
        if missing := missing_tools(ARCHITECTURES[machine]):
            pytest.skip(f"not installed: {', '.join(missing)}")
        with needs_network():
            return built(ARCHITECTURES[machine], tmp_path_factory.mktemp(machine))

    return wheel


@pytest.fixture(scope="module")
def python(wheel: Wheels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the interpreter of an environment that holds the wheel, and the extra `cpu`."""
    folder = tmp_path_factory.mktemp("wheel")
    venv.create(folder / "env", with_pip=True)
    python = folder / "env" / "bin" / "python"
    pip = (python, "-m", "pip", "--disable-pip-version-check", "-q")
    run(*pip, "download", "-d", folder / "all", f"{wheel(HERE)}[cpu]", cwd=folder)
    offline = ("--no-index", "--find-links", folder / "all", "--only-binary=:all:")
    run(*pip, "install", *offline, "meiqa[cpu]", cwd=folder, path="")
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
    held = bytes_of(site) - sum(bytes_of(site / name) for name in ("pip", "setuptools"))
    assert held <= 300e6, f"{held / 1e6:.0f} MB"


def bytes_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@contextmanager
def device(wheel: Path, machine: str) -> Iterator[Root]:
    """Give a system with nothing but Python and what docker/packages.sh puts into /opt/meiqa."""
    with TemporaryDirectory(prefix="meiqa-device-") as place:
        fetched = Path(place, "wheels")
        fetched.mkdir()
        (fetched / wheel.name).symlink_to(wheel)
        with needs_network():
            root = unpacked(Path(place, "root"), ARCHITECTURES[machine], RELEASE, *SYSTEM)
        script = ROOT / "docker" / "packages.sh"
        given = (fetched, machine, PYTHON)
        run(script, "fetch", *given, cwd=ROOT, path=os.environ["PATH"])
        run(script, "install", *given, root.path / "opt/meiqa", cwd=ROOT, path=os.environ["PATH"])
        yield root


@pytest.mark.slow
@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_it_scores_a_photo_on_a_device(wheel: Wheels, machine: str) -> None:
    with device(wheel(machine), machine) as root:
        Image.fromarray(picture(1, (240, 320))).save(root.path / "photo.png")
        score = ("python3", "-m", "meiqa", "score", "/photo.png", "--no-learn", "--format", "json")
        try:
            said = root.run(score, {"PYTHONPATH": "/opt/meiqa"})
        except subprocess.CalledProcessError as error:
            if machine != HERE and "unshare" in error.stderr:
                pytest.skip(f"no system of another architecture can be run here: {error.stderr}")
            raise AssertionError(error.stderr) from error
        (result,) = json.loads(said)
        assert 1.0 <= result["score"] <= 5.0
        assert result["summary"]
        held = bytes_of(root.path / "opt/meiqa")  # bytecode of what was imported included
        assert held <= INSTALLED_BYTES, f"{held / 1e6:.0f} MB"
