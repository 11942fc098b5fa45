"""Opening a package: whole and unchanged, or refused in one clear line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from meiqa.engine.calibration import UNCALIBRATED, Logistic
from meiqa.engine.manifest import Manifest, TensorRtEngine
from meiqa.engine.package import EnginePackage
from meiqa.errors import (
    PackageCorrupted,
    PackageError,
    PackageNotFound,
    SchemaUnsupported,
    UsageError,
)

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
    before.rewritten(calibration=fitted)
    after = EnginePackage.open(folder)
    assert after.manifest.calibration == fitted
    assert after.digest == before.digest
    assert {file.name for file in folder.iterdir()} == {"manifest.json", *FILES}


def test_a_rewritten_manifest_keeps_what_others_changed(folder: Path) -> None:
    before = EnginePackage.open(folder)
    engine = TensorRtEngine(
        *("patterns", "patterns.engine", "0", "tensorrt", "10", "8.9", "fp16"), {}, 1, 0.0
    )
    before.rewritten(engines=[engine])
    after = before.rewritten(calibration=replace(UNCALIBRATED, sigma=0.5))
    assert after.manifest.engines == (engine,)
    assert after.manifest == EnginePackage.open(folder).manifest
    assert before.rewritten(engines=[]).manifest.engines == ()
    assert after.rewritten(engines=[]).manifest.calibration.sigma == 0.5


def test_another_head_is_of_this_process_alone(folder: Path) -> None:
    assert EnginePackage.open(folder, head="levels").manifest.score_head == "levels"
    assert EnginePackage.open(folder).manifest.score_head == "text"
    with pytest.raises(UsageError, match="text, levels, grm"):
        EnginePackage.open(folder, head="softmax")
    with pytest.raises(UsageError, match=r"no graded response.*fit one"):
        EnginePackage.open(folder, head="grm")


@pytest.mark.parametrize("profile", [{"cells": [[1], [2]]}, {"cells": 3}, 3])
def test_an_engine_says_which_shapes_it_accepts(folder: Path, profile: object) -> None:
    engine = TensorRtEngine(
        *("vision", "v.engine", "0", "tensorrt", "10", "8.9", "fp16"),
        {"cells": ((1,), (2,), (3,))},
        *(1, 0.0),
    )
    assert EnginePackage.open(folder).rewritten(engines=[engine]).manifest.engines == (engine,)
    assert EnginePackage.open(folder).manifest.engines == (engine,)
    rewrite(folder, lambda values: values["engines"][0].update(profile=profile))
    refusal(folder, PackageCorrupted)


def test_padding_changes_the_digest_only_where_it_is_done(package: EnginePackage) -> None:
    manifest = package.manifest
    image = manifest.image
    assert not image.pad_to_grid
    assert "pad_to_grid" not in image.identity
    assert replace(manifest, image=replace(image, pad_to_grid=True)).digest != manifest.digest
    values = json.loads(manifest.to_json())
    del values["image"]["pad_to_grid"]  # as versions before this field wrote it
    assert Manifest.from_json(json.dumps(values)).digest == manifest.digest
    values["image"]["pad_to_grid"] = 1
    with pytest.raises(PackageCorrupted, match=r"pad_to_grid.*true or false"):
        Manifest.from_json(json.dumps(values))
