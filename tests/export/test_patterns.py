"""Patterns become a graph of their tower alone, in 8 bits where that moves no score."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray

from meiqa.engine.images import fit_to_grid, load_pixels
from meiqa.engine.manifest import PATTERNS, TensorRtEngine
from meiqa.engine.package import EnginePackage
from meiqa.engine.runtime.onnx import OnnxSession
from meiqa.errors import PackageCorrupted, PackageNotFound, UsageError
from meiqa.export import patterns
from meiqa.export.engines import pattern_profiles
from meiqa.export.package import Export
from meiqa.export.patterns import (
    FILE,
    DistortionPatterns,
    TrainedPatterns,
    add_patterns,
    write_patterns,
)
from tests.engine.samples import SIZES, picture
from tests.export.tiny import random_patterns
from training.patterns import save_patterns

Floats = NDArray[np.float64]


@pytest.fixture
def folder(package: EnginePackage, tmp_path: Path) -> Path:
    """Give a copy of the tiny package."""
    return Path(shutil.copytree(package.path, tmp_path / "package"))


def naive(module: DistortionPatterns, tokens: Floats, reference: Floats) -> dict[str, Floats]:
    """The graph's outputs, cell by cell and pattern by pattern."""
    weights = {n: w.detach().double().numpy() for n, w in module.named_parameters()}

    def gelu(x: Floats) -> Floats:
        return x * 0.5 * (1 + np.array([torch.erf(torch.tensor(v / 2**0.5)) for v in x]))

    def two_layers(token: Floats, first: str, second: str) -> Floats:
        x = (token - token.mean()) / np.sqrt(token.var() + 1e-5)
        x = x * weights["norm.weight"] + weights["norm.bias"]
        x = gelu(weights[f"{first}.weight"] @ x + weights[f"{first}.bias"])
        return weights[f"{second}.weight"] @ x + weights[f"{second}.bias"]

    def feature(token: Floats) -> Floats:
        x = two_layers(token, "widen", "describe")
        return x / np.sqrt((x**2).sum() + 1e-6)

    def length(x: Floats) -> float:
        return float(np.sqrt((x**2).sum() + 1e-6))

    photo, beside = ([feature(t) for t in part] for part in (tokens, reference))
    codebook = weights["patterns.weight"]
    cosines = [np.array([p @ f for p in codebook]) for f in photo]
    likeness = []
    for pair in zip(tokens, reference, strict=True):
        a, b = (two_layers(token, "compare_widen", "compare") for token in pair)
        la, lb = length(a), length(b)
        likeness.append(a @ b / (la * lb) * (1 - abs(la - lb) / max(la, lb)))
    kinds, cells = [], []
    for c in cosines:
        w = np.exp(weights["sharpness"] * c)
        w /= w.sum()
        kinds.append(weights["kinds.weight"] @ w)
        cells.append(float(weights["strengths.weight"][0] @ w))
    alone, both = weights["alone"], weights["beside"]
    mean = np.concatenate([np.mean(photo, 0), np.mean(beside, 0)])
    hidden = gelu(weights["gate_hidden.weight"] @ mean + weights["gate_hidden.bias"])
    gate = weights["gate.weight"][0] @ hidden + weights["gate.bias"][0]
    pooled = length(np.mean(np.maximum(cosines, 0), 0)) / np.sqrt(len(codebook))
    scores = [
        alone[1] + 4 * alone[0] * pooled,
        both[1] + both[0] * np.mean(likeness),
        1 / (1 + np.exp(-gate)),
    ]
    changed = weights["changed"]
    return {
        "scores": np.array(scores),
        "kinds": np.mean(kinds, 0),
        "strength": np.array([np.mean(cells)]),
        "cells": np.array(cells),
        "changes": changed[0] + changed[1] * (1 - np.array(likeness)),
    }


@pytest.mark.parametrize("cells", [1, 3, 7])
def test_the_graph_says_what_its_naive_twin_says(
    package: EnginePackage, folder: Path, cells: int
) -> None:
    trained = random_patterns(package)
    made = write_patterns(trained, folder).manifest.patterns
    assert made is not None
    session = OnnxSession(folder, made.graph, "cpu", 1)
    rng = np.random.default_rng(cells)
    tokens, reference = rng.normal(size=(2, cells, trained.module.config.width))
    found = session.run(
        {"tokens": tokens.astype(np.float32), "reference": reference.astype(np.float32)}
    )
    for name, expected in naive(trained.module, tokens, reference).items():
        np.testing.assert_allclose(found[name], expected, atol=2e-4)


def test_the_graph_is_plain_onnx_of_one_small_file(package: EnginePackage, folder: Path) -> None:
    write_patterns(random_patterns(package), folder)
    graph = onnx.load(folder / f"{PATTERNS}.onnx", load_external_data=False)
    assert {node.domain for node in graph.graph.node} <= {"", "ai.onnx"}
    assert not list(folder.glob(f"{PATTERNS}.onnx.*"))


def test_patterns_are_read_as_they_were_written(package: EnginePackage, tmp_path: Path) -> None:
    trained = random_patterns(package)
    save_patterns(trained, tmp_path / FILE)
    read = TrainedPatterns.load(tmp_path / FILE)
    assert (read.source, read.kinds, read.calibration) == (
        trained.source,
        trained.kinds,
        trained.calibration,
    )
    for name, weight in trained.module.state_dict().items():
        torch.testing.assert_close(read.module.state_dict()[name], weight, atol=1e-2, rtol=1e-3)


def test_patterns_of_another_tower_are_refused(package: EnginePackage, folder: Path) -> None:
    with pytest.raises(UsageError, match="another checkpoint"):
        write_patterns(random_patterns(package, source="0" * 64), folder)
    assert EnginePackage.open(folder).manifest.patterns is None


def test_files_that_hold_no_patterns_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PackageNotFound):
        TrainedPatterns.load(tmp_path / FILE)
    (tmp_path / FILE).write_bytes(b"nothing of the kind")
    with pytest.raises(PackageCorrupted):
        TrainedPatterns.load(tmp_path / FILE)


def test_an_export_takes_what_lies_beside_the_weights(
    package: EnginePackage, folder: Path, tmp_path: Path
) -> None:
    class Source:
        folder = tmp_path

    export = object.__new__(Export)
    export.checkpoint, export.folder, export.pictures = Source(), folder, []  # type: ignore[assignment]
    export.options = type("Options", (), {"say": staticmethod(lambda step: None)})()
    export.add_patterns()
    assert EnginePackage.open(folder).manifest.patterns is None
    save_patterns(random_patterns(package), tmp_path / FILE)
    export.add_patterns()
    assert EnginePackage.open(folder).manifest.patterns is not None


def test_new_patterns_drop_the_engines_of_the_old(package: EnginePackage, folder: Path) -> None:
    made = write_patterns(random_patterns(package), folder)
    common = {"file": "f", "sha256": "0", "runtime": "tensorrt_rtx", "version": "1"}
    engines = [
        TensorRtEngine(
            graph=graph,
            compute_capability="8.9",
            precision="fp16",
            profile={},
            size_bytes=1,
            build_s=0.0,
            **common,
        )
        for graph in ("vision", PATTERNS)
    ]
    made.rewritten(engines=engines)
    again = write_patterns(random_patterns(package), folder)
    assert [engine.graph for engine in again.manifest.engines] == ["vision"]


def test_a_profile_holds_every_grid(package: EnginePackage, folder: Path) -> None:
    made = write_patterns(random_patterns(package), folder)
    (profile,) = pattern_profiles(made)
    image = made.manifest.image
    least, _, most = profile["tokens"]
    assert least[0] == 1
    assert most[0] == image.max_pixels // image.cell_pixels**2


@pytest.fixture
def pictures(package: EnginePackage) -> list[np.ndarray]:
    given = [picture(seed, size) for seed, size in enumerate(SIZES)]
    return [fit_to_grid(load_pixels(each), package.manifest.image) for each in given]


def quantised(folder: Path) -> bool:
    nodes = onnx.load(folder / f"{PATTERNS}.onnx").graph.node
    return any(node.op_type == "QuantizeLinear" for node in nodes)


def test_an_int8_package_has_its_patterns_in_8_bits(
    int8_package: EnginePackage, tmp_path: Path, pictures: list[np.ndarray]
) -> None:
    folder = copied(int8_package, tmp_path)
    in_floats = write_patterns(random_patterns(int8_package), folder).manifest.patterns
    assert in_floats is not None
    assert not quantised(folder)
    tokens = np.random.default_rng(0).normal(size=(2, 6, in_floats_width(folder)))
    feeds = dict(zip(("tokens", "reference"), tokens.astype(np.float32), strict=True))
    wanted = OnnxSession(folder, in_floats.graph, "cpu", 1).run(feeds)["scores"]
    made = write_patterns(random_patterns(int8_package), folder, pictures).manifest.patterns
    assert made is not None
    assert made.report["rounding"]["bits"] == 8
    assert 0 < made.report["rounding"]["move"] <= patterns.LARGEST_MOVE
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
    monkeypatch.setattr(patterns, "LARGEST_MOVE", 0.0)
    folder = copied(int8_package, tmp_path)
    made = write_patterns(random_patterns(int8_package), folder, pictures).manifest.patterns
    assert made is not None
    assert made.report["rounding"]["bits"] == 32
    assert not quantised(folder)


def test_other_packages_keep_floats(
    package: EnginePackage, tmp_path: Path, pictures: list[np.ndarray]
) -> None:
    folder = copied(package, tmp_path)
    made = write_patterns(random_patterns(package), folder, pictures).manifest.patterns
    assert made is not None
    assert "rounding" not in made.report
    assert not quantised(folder)


def test_an_int8_package_wants_photographs(int8_package: EnginePackage, tmp_path: Path) -> None:
    folder = copied(int8_package, tmp_path)
    save_patterns(random_patterns(int8_package), tmp_path / FILE)
    with pytest.raises(UsageError, match="int8 needs photographs"):
        add_patterns(folder, tmp_path / FILE)
    pictures = [picture(seed, size) for seed, size in enumerate(SIZES)]
    made = add_patterns(folder, tmp_path / FILE, pictures)
    assert made.manifest.patterns is not None
    assert made.manifest.patterns.report["rounding"]["bits"] == 8


def test_a_float_package_takes_a_codebook_without_photographs(
    package: EnginePackage, folder: Path, tmp_path: Path
) -> None:
    save_patterns(random_patterns(package), tmp_path / FILE)
    assert add_patterns(folder, tmp_path / FILE).manifest.patterns is not None
    assert not quantised(folder)


def copied(package: EnginePackage, tmp_path: Path) -> Path:
    return Path(shutil.copytree(package.path, tmp_path / "package"))


def in_floats_width(folder: Path) -> int:
    return EnginePackage.open(folder).manifest.decoder.embed_width
