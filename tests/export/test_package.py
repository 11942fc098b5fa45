"""An export gives a whole verified package, or leaves nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from meiqa.engine.package import EnginePackage
from meiqa.errors import PackageCorrupted, UsageError
from meiqa.export import package as packaging
from meiqa.export.package import export_package, pictures_in
from tests.engine.samples import open_vlm, picture, seen

PICTURES = [picture(0)]


def relative_difference(exact: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    return float(np.linalg.norm(exact - other) / np.linalg.norm(exact))


def test_the_package_is_complete(package: EnginePackage) -> None:
    assert {file.name for file in package.path.iterdir()} == {
        "manifest.json",
        *package.manifest.files,
    }
    assert package.manifest.precision == "fp32"
    assert EnginePackage.open(package.path).digest == package.digest


def test_int8_is_smaller_and_says_nearly_the_same(
    package: EnginePackage, int8_package: EnginePackage
) -> None:
    assert int8_package.manifest.precision == "int8"
    assert int8_package.digest != package.digest
    packages = (package, int8_package)
    sizes = [(p.path / "decoder.onnx").stat().st_size for p in packages]
    assert sizes[1] < sizes[0]
    exact, rounded = (seen(open_vlm(p), picture(77)) for p in packages)
    assert 0 < relative_difference(exact.values, rounded.values) < 0.1
    exact_prefix, rounded_prefix = (open_vlm(p).read([exact])[0] for p in packages)
    assert 0 < relative_difference(exact_prefix.key_values, rounded_prefix.key_values) < 0.1


def test_attention_stays_in_float(int8_package: EnginePackage) -> None:
    for name in ("vision.onnx", "decoder.onnx"):
        graph = onnx.load(int8_package.path / name).graph
        made_by = {output: node for node in graph.node for output in node.output}
        weights = {initialiser.name for initialiser in graph.initializer}
        kinds = {True: 0, False: 0}
        for node in graph.node:
            if node.op_type == "MatMul" and node.input[1] not in weights:
                second = made_by[node.input[1]]
                quantised = second.op_type == "DequantizeLinear"
                assert not quantised or second.input[0] in weights, node.name
                kinds[quantised] += 1
        assert min(kinds.values()) > 0


def test_the_key_projection_was_fitted(package: EnginePackage) -> None:
    projection = package.array("key_projection.npy")
    width = package.manifest.decoder.hidden_size
    assert projection.shape == (width + 1, width)
    assert np.abs(projection).max() > 0


def test_a_target_that_is_there_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    with pytest.raises(UsageError, match="is there already"):
        export_package(checkpoint, tmp_path / "package", "fp32", PICTURES)
    assert list((tmp_path / "package").iterdir()) == []


def test_an_unknown_precision_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"int4.*fp32, int8"):
        export_package(checkpoint, tmp_path / "package", "int4", PICTURES)


def test_an_export_without_pictures_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="pictures"):
        export_package(checkpoint, tmp_path / "package", "fp32", [])


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("step", ["export_vision", "export_decoder", "add_key_projection"])
def test_an_export_that_breaks_off_leaves_nothing(
    checkpoint: Path,
    package: EnginePackage,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    error: BaseException,
) -> None:
    def write(graph: str) -> None:
        def copy(_: object, path: Path) -> None:
            shutil.copy(package.path / graph, path)

        monkeypatch.setattr(packaging, f"export_{graph.removesuffix('.onnx')}", copy)

    def fail(*_: object) -> None:
        raise error

    write("vision.onnx")
    write("decoder.onnx")
    monkeypatch.setattr(packaging, step, fail)
    with pytest.raises(type(error)):
        export_package(checkpoint, tmp_path / "package", "fp32", PICTURES)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("difference", [2e-4, float("nan"), float("inf")])
@pytest.mark.parametrize("graph", ["vision", "decoder"])
def test_graphs_that_differ_from_pytorch_are_refused(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    graph: str,
    difference: float,
) -> None:
    for name in ("vision", "decoder"):
        monkeypatch.setattr(packaging, f"export_{name}", lambda _, path: path.write_bytes(b""))
        found = difference if name == graph else 0.0
        monkeypatch.setattr(packaging, f"{name}_parity", lambda *_, found=found: found)
    with pytest.raises(PackageCorrupted, match="differ from PyTorch"):
        export_package(checkpoint, tmp_path / "package", "fp32", PICTURES)
    assert list(tmp_path.iterdir()) == []


def test_the_choice_of_pictures_does_not_depend_on_how_many(tmp_path: Path) -> None:
    from PIL import Image

    for number in range(6):
        Image.fromarray(picture(number, (64, 64))).save(tmp_path / f"{number}.png")
    few, many = pictures_in(tmp_path, 2), pictures_in(tmp_path, 5)
    assert (len(few), len(many)) == (2, 5)
    for one, same in zip(few, many, strict=False):
        np.testing.assert_array_equal(one, same)


def test_int8_that_moves_the_grades_is_refused(
    package: EnginePackage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "package"
    shutil.copytree(package.path, folder)
    monkeypatch.setattr(packaging, "LARGEST_INT8_MOVE", 0.0)
    with pytest.raises(PackageCorrupted, match="quantisation moves the grades too much"):
        packaging.quantise_package(folder, [picture(3, (128, 192))])
