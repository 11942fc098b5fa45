"""An export gives a whole verified package, or leaves nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from meiqa.engine.package import EnginePackage
from meiqa.errors import PackageCorrupted, UsageError
from meiqa.export import package as packaging
from meiqa.export.package import export_package, pictures_in
from tests.engine.samples import open_vlm, picture, seen

PICTURES = [picture(0)]


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
    # Of the decoder's 200 kB only the output layer and the norms stay in float.
    sizes = [(p.path / "decoder.onnx").stat().st_size for p in (package, int8_package)]
    assert sizes[1] < sizes[0]
    pixels = picture(77)
    tokens = [seen(open_vlm(p), pixels).values for p in (package, int8_package)]
    difference = np.abs(tokens[0] - tokens[1])
    assert 0 < difference.mean() < 0.1 * np.abs(tokens[0]).mean()


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
