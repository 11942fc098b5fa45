"""Opening a package: whole and unchanged, or refused in one clear line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meiqa.engine.manifest import IDENTITY, UNCALIBRATED, Calibration, Logistic, Manifest
from meiqa.engine.package import EnginePackage
from meiqa.errors import PackageCorrupted, PackageError, PackageNotFound, SchemaUnsupported

FILES = (
    *("decoder.onnx", "decoder.onnx.data", "embedding.npy", "key_projection.npy"),
    *("tokenizer.json", "vision.onnx", "vision.onnx.data"),
)


@pytest.fixture
def folder(package: EnginePackage, tmp_path: Path) -> Path:
    """Give a copy that may be damaged."""
    return Path(shutil.copytree(package.path, tmp_path / "copy"))


def refusal(folder: Path, kind: type[PackageError], *, verify: bool = True) -> str:
    with pytest.raises(kind) as caught:
        EnginePackage.open(folder, verify=verify)
    message = str(caught.value)
    assert "\n" not in message
    return message


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads((folder / "manifest.json").read_text())
    change(values)
    (folder / "manifest.json").write_text(json.dumps(values))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", [0, -1])
def test_a_changed_byte_is_found(folder: Path, name: str, place: int) -> None:
    content = bytearray((folder / name).read_bytes())
    content[place] ^= 1
    (folder / name).write_bytes(content)
    assert name in refusal(folder, PackageCorrupted)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(folder: Path, name: str, verify: bool) -> None:
    (folder / name).unlink()
    assert name in refusal(folder, PackageCorrupted, verify=verify)


def test_the_files_are_all_there_is_to_check(package: EnginePackage) -> None:
    assert tuple(sorted(package.manifest.files)) == FILES


@pytest.mark.parametrize("missing", ["nowhere", "."])
def test_a_folder_without_a_manifest_is_not_a_package(tmp_path: Path, missing: str) -> None:
    assert "manifest.json" in refusal(tmp_path / missing, PackageNotFound)


@pytest.mark.parametrize("schema", [0, 1, 3, "2", None])
def test_another_schema_is_refused(folder: Path, schema: object) -> None:
    rewrite(folder, lambda values: values.update(schema=schema))
    assert f"schema {schema}" in refusal(folder, SchemaUnsupported)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe{}"])
def test_a_manifest_that_is_not_one_is_refused(folder: Path, content: bytes) -> None:
    (folder / "manifest.json").write_bytes(content)
    assert "manifest.json" in refusal(folder, PackageCorrupted)


@pytest.mark.parametrize("part", [None, "image", "decoder", "prompt", "calibration"])
def test_unknown_and_lacking_keys_are_named(folder: Path, part: str | None) -> None:
    rewrite(folder, lambda values: (values[part] if part else values).update(colour="blue"))
    assert "colour" in refusal(folder, PackageCorrupted)
    lost = "report" if part is None else None

    def lose(values: dict[str, Any]) -> None:
        nonlocal lost
        record = values[part] if part else values
        del record["colour"]
        lost = lost or next(iter(record))
        del record[lost]

    rewrite(folder, lose)
    assert str(lost) in refusal(folder, PackageCorrupted)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("graphs", []),
        ("graphs", {}),
        ("image", None),
        ("prompt", "meiqa"),
        ("calibration", 3),
        ("files", []),
    ],
)
def test_a_part_of_another_kind_is_refused(folder: Path, part: str, value: object) -> None:
    rewrite(folder, lambda values: values.update({part: value}))
    refusal(folder, PackageCorrupted)


def test_a_graph_that_no_digest_covers_is_refused(folder: Path) -> None:
    shutil.copy(folder / "vision.onnx", folder / "other.onnx")
    rewrite(folder, lambda values: values["graphs"]["vision"].update(file="other.onnx"))
    assert "other.onnx" in refusal(folder, PackageCorrupted)


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("calibration", "sigma", 0.0),
        ("calibration", "sigma", float("nan")),
        ("calibration", "lam", -0.1),
        ("calibration", "temperature", float("inf")),
        ("calibration", "temperature", 10**400),
        ("calibration", "text_std", -1.0),
        ("calibration", "std_scale", -1e-9),
        ("calibration", "std_floor", "0.1"),
        ("calibration", "reflect_above", None),
        ("calibration", "grade_share", 1.01),
        ("calibration", "neighbours", 2.5),
        ("calibration", "neighbours", -1),
        ("calibration", "bins", 0),
        ("calibration", "bins", True),
        ("image", "patch_size", 0),
        ("image", "merge_size", "4"),
        ("image", "min_pixels", 10**9),
        ("image", "mean", [0.5, 0.5]),
        ("image", "mean", 0.5),
        ("image", "std", [0.2, 0.2, 0.0]),
        ("decoder", "layers", 0),
        ("decoder", "vocab_size", 1e3),
    ],
)
def test_a_number_that_makes_no_sense_is_named(
    folder: Path, part: str, name: str, value: object
) -> None:
    rewrite(folder, lambda values: values[part].update({name: value}))
    message = refusal(folder, PackageCorrupted)
    assert name in message
    assert "got" in message
    assert "allowed: " in message


@pytest.mark.parametrize("head", ["text", "levels"])
def test_a_logistic_is_of_finite_numbers(folder: Path, head: str) -> None:
    rewrite(folder, lambda values: values["calibration"][head].update(b4=float("nan")))
    assert "Logistic.b4" in refusal(folder, PackageCorrupted)


@pytest.mark.parametrize(("name", "value"), [("file", 3), ("inputs", None), ("outputs", [1])])
def test_a_graph_is_described_by_names(folder: Path, name: str, value: object) -> None:
    rewrite(folder, lambda values: values["graphs"]["vision"].update({name: value}))
    assert "names" in refusal(folder, PackageCorrupted)


def test_the_ends_of_what_is_allowed_are_allowed() -> None:
    for share in (0, 1.0):
        replace(UNCALIBRATED, grade_share=share, std_floor=0.0, reflect_above=0, neighbours=0)


def test_the_digest_is_computed_once(package: EnginePackage) -> None:
    manifest = Manifest.from_json(package.manifest.to_json())
    assert manifest.digest is manifest.digest
    assert manifest == package.manifest
    assert replace(manifest, precision="other", files={}).digest != manifest.digest


def test_a_manifest_is_read_as_it_was_written(package: EnginePackage) -> None:
    assert Manifest.from_json(package.manifest.to_json()) == package.manifest


def test_a_calibration_is_kept_and_does_not_change_the_digest(folder: Path) -> None:
    before = EnginePackage.open(folder)
    fitted = replace(
        UNCALIBRATED,
        grade_share=0.25,
        levels=Logistic(1.5, 2.0, 3.1, 0.4, 1.7),
        sigma=0.42,
        neighbours=8,
    )
    before.with_calibration(fitted)
    after = EnginePackage.open(folder)
    assert after.manifest.calibration == fitted
    assert after.digest == before.digest
    assert {file.name for file in folder.iterdir()} == {"manifest.json", *FILES}


def test_a_calibration_survives_json() -> None:
    values = json.loads(json.dumps(UNCALIBRATED, default=vars))
    assert Calibration.from_dict(values) == UNCALIBRATED


@pytest.mark.parametrize("raw", [1.0, 2.7, 3.3, 4.9])
def test_the_logistic_is_the_formula(raw: float) -> None:
    b1, b2, b3, b4, b5 = 1.2, 1.7, 3.1, 0.5, 1.4
    wanted = b1 * (0.5 - 1 / (1 + np.exp(b2 * (raw - b3)))) + b4 * raw + b5
    assert 1 < wanted < 5
    assert float(Logistic(b1, b2, b3, b4, b5)(raw)) == pytest.approx(wanted, abs=1e-12)


def test_the_logistic_stays_on_the_scale() -> None:
    steep = Logistic(9.0, 1e3, 3.0, 0.0, 3.0)
    assert steep(np.array([-1e6, 1e6])).tolist() == [1.0, 5.0]
    assert IDENTITY(np.array([0.0, 2.5, 77.0])).tolist() == [1.0, 2.5, 5.0]
