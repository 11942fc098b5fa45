"""The reference mode end to end, on the tiny model with patterns of random weights."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from meiqa.engine.engine import Engine
from meiqa.engine.manifest import PATTERNS
from meiqa.engine.package import EnginePackage
from meiqa.engine.patterns import PatternScore, interpolated, painted
from meiqa.errors import ImageError, PackageCorrupted, UsageError
from meiqa.types import Assessment, Failure
from tests.engine.samples import PHOTOS, picture

PHOTO = PHOTOS[0]
WORSE = np.clip(PHOTO + np.random.default_rng(0).normal(0, 40, PHOTO.shape), 0, 255).astype(
    np.uint8
)


@pytest.fixture(scope="module")
def judge(patterned: EnginePackage, anchors: Path) -> Iterator[Engine]:
    """Give an engine with patterns that can't learn."""
    with Engine.open(patterned.path, anchors, threads=1, learn=False) as engine:
        yield engine


def test_patterns_leave_the_package_digest_as_it_is(
    package: EnginePackage, patterned: EnginePackage
) -> None:
    assert patterned.manifest.patterns is not None
    assert EnginePackage.open(patterned.path).digest == package.digest


def test_without_a_reference_the_score_is_the_same_as_without_patterns(
    engine: Engine, judge: Engine
) -> None:
    plain, patterned = engine.score(PHOTO), judge.score(PHOTO)
    assert patterned.score == plain.score
    assert patterned.std == plain.std
    assert patterned.reference is None
    assert plain.distortions == ()


def test_a_reference_enters_the_score_and_says_by_how_much(judge: Engine) -> None:
    alone, beside = judge.score(WORSE), judge.score(WORSE, reference=PHOTO)
    assert beside.reference is not None
    assert beside.reference.moved == pytest.approx(beside.score - alone.score)
    assert 0.0 < beside.reference.weight < 1.0
    low, high = sorted((alone.score, beside.reference.score))
    assert low - 1e-9 <= beside.score <= high + 1e-9
    assert beside.std <= min(alone.std, beside.reference.std) + 1e-9
    assert beside.initial_score == alone.initial_score
    assert beside.to_dict()["reference"]["moved"] == round(beside.reference.moved, 4)


def test_the_mode_follows_from_the_reference(judge: Engine) -> None:
    alone, beside = judge.patterns(WORSE), judge.patterns(WORSE, PHOTO)
    assert alone.full_reference is None
    assert alone.weight == 0.0
    assert beside.full_reference is not None
    assert beside.no_reference == alone.no_reference


def test_a_photo_that_is_its_reference_has_the_top_of_the_scale(judge: Engine) -> None:
    found = judge.score(PHOTO, reference=PHOTO.copy())
    assert found.score == 5.0
    assert found.reference is not None
    assert found.reference.score == 5.0
    assert found.distortions == ()
    assert not judge.patterns(PHOTO, PHOTO).map.any()


def test_a_reference_of_another_scene_is_noted(judge: Engine) -> None:
    note = "the reference may show another scene"
    assert note in judge.score(WORSE, reference=picture(1, PHOTO.shape[:2])).degraded
    for photo in (WORSE, PHOTO):
        assert note not in judge.score(photo, reference=PHOTO).degraded


def test_one_reference_serves_many_photos(judge: Engine) -> None:
    together = list(judge.score_many([WORSE, PHOTO], reference=PHOTO, learn=False))
    apart = [judge.score(photo, reference=PHOTO) for photo in (WORSE, PHOTO)]
    for one, other in zip(together, apart, strict=True):
        assert isinstance(one, Assessment)
        assert one.score == pytest.approx(other.score, abs=1e-6)


def test_a_reference_of_the_same_shape_is_brought_onto_the_photos_grid(judge: Engine) -> None:
    double = np.array(Image.fromarray(PHOTO).resize((PHOTO.shape[1] * 2, PHOTO.shape[0] * 2)))
    assert judge.score(WORSE, reference=double).reference is not None


def test_a_reference_of_another_shape_is_refused(judge: Engine) -> None:
    with pytest.raises(ImageError, match="another shape"):
        judge.score(PHOTO, reference=picture(0, (224, 160)))
    (failure,) = judge.score_many([PHOTO], reference=picture(0, (224, 160)))
    assert isinstance(failure, Failure)


def test_a_package_without_patterns_refuses_a_reference_in_one_line(engine: Engine) -> None:
    with pytest.raises(UsageError, match="no distortion patterns"):
        engine.score(PHOTO, reference=PHOTO)
    with pytest.raises(UsageError, match="no distortion patterns"):
        engine.patterns(PHOTO)


def test_nothing_is_learned_beside_a_reference(
    patterned: EnginePackage, memory: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "keen"
    shutil.copytree(patterned.path, folder)
    opened = EnginePackage.open(folder)
    opened.rewritten(calibration=replace(opened.manifest.calibration, reflect_above=0.0))
    with Engine.open(folder, memory, threads=1, learn="all") as engine:
        engine.score(WORSE, reference=PHOTO)
        assert engine.memory.snapshot().count_contrast == 0
        engine.score(WORSE)
        assert engine.memory.snapshot().count_contrast == 1


def test_a_changed_file_of_patterns_is_noticed(patterned: EnginePackage, tmp_path: Path) -> None:
    folder = tmp_path / "package"
    shutil.copytree(patterned.path, folder)
    with (folder / f"{PATTERNS}.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(PackageCorrupted):
        EnginePackage.open(folder)
    (folder / f"{PATTERNS}.onnx").unlink()
    with pytest.raises(PackageCorrupted):
        EnginePackage.open(folder, verify=False)


def test_the_map_is_as_large_as_the_photo_and_between_the_cells(judge: Engine) -> None:
    height, width = PHOTO.shape[:2]
    opinion = judge.patterns(WORSE, PHOTO)
    over = opinion.over(height, width)
    assert over.shape == (height, width)
    assert over.min() >= opinion.map.min() - 1e-6
    assert over.max() <= opinion.map.max() + 1e-6


def test_the_map_has_each_cells_value_at_its_middle() -> None:
    cells = np.array([[0.0, 0.5, 1.0], [0.2, 0.4, 0.6]], np.float32)
    opinion = PatternScore(3.0, 0.5, 3.0, None, 0.0, np.ones(1), (), 0.0, cells)
    np.testing.assert_allclose(opinion.over(2 * 11, 3 * 11)[5::11, 5::11], cells, atol=1e-6)


@pytest.mark.parametrize("size", [1, 3, 7])
def test_interpolation_between_rows_is_numpys(size: int) -> None:
    values = np.random.default_rng(size).random((size, 2), np.float32)
    at = np.linspace(0, size - 1, 13)
    expected = np.stack([np.interp(at, np.arange(size), column) for column in values.T], axis=1)
    np.testing.assert_allclose(interpolated(values, at), expected, atol=1e-6)


def test_the_map_hides_nothing_where_nothing_is_wrong(tmp_path: Path) -> None:
    strengths = np.zeros(PHOTO.shape[:2], np.float32)
    strengths[:80] = 1.0
    over = painted(PHOTO, strengths)
    np.testing.assert_array_equal(over[80:], PHOTO[80:])
    assert (over[:80, :, 0] > over[:80, :, 1]).all()
