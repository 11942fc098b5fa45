"""Patterns of an INT8 package are rounded as its other graphs are, where that moves no score."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from meiqa.engine.images import load_pixels
from meiqa.engine.judging import fitted_to
from meiqa.engine.package import EnginePackage
from meiqa.engine.runtime.onnx import OnnxSession
from meiqa.errors import UsageError
from meiqa.export import pattern_bits
from meiqa.export.patterns import PATTERNS, add_patterns, main
from tests.engine.samples import SIZES, picture
from tests.export.random_patterns import random_patterns


@pytest.fixture
def pictures(package: EnginePackage) -> list[np.ndarray]:
    given = [picture(seed, size) for seed, size in enumerate(SIZES)]
    return [fitted_to(load_pixels(each), package.manifest.image) for each in given]


def quantised(folder: Path) -> bool:
    nodes = onnx.load(folder / f"{PATTERNS}.onnx").graph.node
    return any(node.op_type == "QuantizeLinear" for node in nodes)


def test_an_int8_package_has_its_patterns_in_8_bits(
    int8_package: EnginePackage, tmp_path: Path, pictures: list[np.ndarray]
) -> None:
    folder = copied(int8_package, tmp_path)
    in_floats = add_patterns(random_patterns(int8_package), folder).manifest.patterns
    assert in_floats is not None
    assert not quantised(folder)
    tokens = np.random.default_rng(0).normal(size=(2, 6, in_floats_width(folder)))
    feeds = dict(zip(("tokens", "reference"), tokens.astype(np.float32), strict=True))
    wanted = OnnxSession(folder, in_floats.graph, "cpu", 1).run(feeds)["scores"]
    made = add_patterns(random_patterns(int8_package), folder, pictures).manifest.patterns
    assert made is not None
    assert made.report["rounding"]["bits"] == 8
    assert 0 < made.report["rounding"]["move"] <= pattern_bits.LARGEST_MOVE
    assert quantised(folder)
    found = OnnxSession(folder, made.graph, "cpu", 1).run(feeds)["scores"]
    assert 0 < np.abs(found - wanted).max() < 0.2
    assert EnginePackage.open(folder).manifest.patterns == made  # its digest is the new one's
    assert not list(folder.glob("*.int8"))


def test_where_8_bits_would_move_scores_floats_stay(
    int8_package: EnginePackage,
    tmp_path: Path,
    pictures: list[np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pattern_bits, "LARGEST_MOVE", 0.0)
    folder = copied(int8_package, tmp_path)
    made = add_patterns(random_patterns(int8_package), folder, pictures).manifest.patterns
    assert made is not None
    assert made.report["rounding"]["bits"] == 32
    assert not quantised(folder)


def test_other_packages_keep_floats(
    package: EnginePackage, tmp_path: Path, pictures: list[np.ndarray]
) -> None:
    folder = copied(package, tmp_path)
    made = add_patterns(random_patterns(package), folder, pictures).manifest.patterns
    assert made is not None
    assert "rounding" not in made.report
    assert not quantised(folder)


def test_the_command_wants_photographs_for_an_int8_package(
    int8_package: EnginePackage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(int8_package, tmp_path)
    random_patterns(int8_package).save(tmp_path / "patterns.safetensors")
    given = ["patterns", str(tmp_path / "patterns.safetensors"), str(folder)]
    monkeypatch.setattr("sys.argv", given)
    with pytest.raises(UsageError, match="int8 needs photographs"):
        main()


def copied(package: EnginePackage, tmp_path: Path) -> Path:
    return Path(shutil.copytree(package.path, tmp_path / "package"))


def in_floats_width(folder: Path) -> int:
    return EnginePackage.open(folder).manifest.decoder.embed_width
