"""Other scorers: fits that must find what was drawn, model files, what is known of each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from scipy.ndimage import gaussian_filter

from benchmarks import naturalness
from benchmarks.naturalness import (
    BRISQUE_MODEL,
    BRISQUE_RANGES,
    NIQE_STATISTICS,
    Brisque,
    Niqe,
    luminance,
)
from benchmarks.nima import nima
from benchmarks.scorers import (
    OtherScorer,
    judge_by,
    main,
    published_scorers,
    scorers_text,
    sharpness,
)
from meiqa.engine.images import Pixels, load_pixels
from meiqa.engine.package import EnginePackage
from meiqa.errors import ImageTooSmall, UsageError
from meiqa.memory import FEWEST_PHOTOS
from tests.engine.samples import picture

SIDE = 288
NIMA = Path(__file__).parents[3] / "shared" / "data" / "weights" / "nima_mobilenet_aesthetic.hdf5"


def textured(seed: int, blur: float = 0.0, noise: float = 0.0) -> np.ndarray:
    """A picture with detail at all scales, as nature has it, perhaps blurred or noisy."""
    random = np.random.default_rng(seed)
    layers = [
        gaussian_filter(random.normal(size=(SIDE, SIDE)), scale) * scale**1.3
        for scale in (0.7, 1.5, 3, 6, 12, 24)
    ]
    plane = gaussian_filter(np.sum(layers, axis=0), blur) if blur else np.sum(layers, axis=0)
    grey = 128 + 40 * plane / plane.std() + noise * random.normal(size=plane.shape)
    return np.repeat(np.rint(grey.clip(0, 255)).astype(np.uint8)[..., None], 3, axis=2)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """Give model files in the published formats: two support vectors, made statistics."""
    ranges = [f"{number} {-number / 10} {number / 5}" for number in range(1, 37)]
    (tmp_path / BRISQUE_RANGES).write_text("\n".join(["x", "-1 1", *ranges]) + "\n")
    (tmp_path / BRISQUE_MODEL).write_text(
        "svm_type epsilon_svr\nkernel_type rbf\ngamma 0.05\nnr_class 2\ntotal_sv 2\n"
        "rho -50\nSV\n-10 1:-0.5 36:0.25 \n20 2:1e-1 \n"
    )
    features = [block_features(textured(seed)) for seed in range(8)]
    stacked = np.concatenate(features)
    savemat(
        tmp_path / NIQE_STATISTICS,
        {
            "mu_prisparam": stacked.mean(axis=0)[None],
            "cov_prisparam": np.cov(stacked, rowvar=False),
        },
    )
    return tmp_path


def block_features(pixels: np.ndarray) -> np.ndarray:
    """Features (B, 36) of the blocks of a picture, block by block."""
    grey = luminance(pixels)
    half = naturalness._halved(grey)
    planes = [
        (naturalness._normalised(plane, "nearest"), side)
        for plane, side in ((grey, 96), (half, 48))
    ]
    return np.array(
        [
            np.concatenate(
                [
                    naturalness._niqe_features(
                        plane[row * side : (row + 1) * side, at * side : (at + 1) * side]
                    )
                    for plane, side in planes
                ]
            )
            for row in range(SIDE // 96)
            for at in range(SIDE // 96)
        ]
    )


@pytest.mark.parametrize(("shape", "draw"), [(2.0, "normal"), (1.0, "laplace")])
def test_fits_find_the_shape_that_was_drawn(shape: float, draw: str) -> None:
    random = np.random.default_rng(0)
    values = getattr(random, draw)(size=200_000)
    found, variance = naturalness._symmetric(values)
    assert found == pytest.approx(shape, rel=0.03)
    assert variance == pytest.approx(values.var(), rel=0.01)
    # A side that is twice as wide holds twice as much.
    twice = random.random(200_000) < 2 / 3
    sides = np.where(twice, -2 * np.abs(values), np.abs(values))
    found, left, right = naturalness._asymmetric(sides)
    assert found == pytest.approx(shape, rel=0.05)
    assert left == pytest.approx(2 * right, rel=0.03)


def test_a_flat_plane_can_be_fitted() -> None:
    flat = np.zeros((96, 96))
    assert np.isfinite(naturalness._brisque_features(flat)).all()
    assert np.isfinite(naturalness._niqe_features(flat)).all()


def test_brisque_is_the_sum_over_support_vectors(models: Path) -> None:
    brisque = Brisque.read(models)
    assert brisque.vectors.shape == (2, 36)
    assert (brisque.vectors[0, 0], brisque.vectors[0, 35], brisque.vectors[1, 1]) == (
        -0.5,
        0.25,
        0.1,
    )
    grey = luminance(textured(1))
    features = np.concatenate(
        [
            naturalness._brisque_features(naturalness._normalised(plane, "constant"))
            for plane in (grey, naturalness._halved(grey))
        ]
    )
    lows, highs = -np.arange(1, 37) / 10, np.arange(1, 37) / 5
    scaled = -1 + 2 * (features - lows) / (highs - lows)
    kernel = [np.exp(-0.05 * np.sum((scaled - vector) ** 2)) for vector in brisque.vectors]
    assert brisque.score(textured(1)) == pytest.approx(-10 * kernel[0] + 20 * kernel[1] + 50)


def test_niqe_rises_with_blur_and_with_noise(models: Path) -> None:
    niqe = Niqe.read(models)
    clean = niqe.score(textured(20))
    blurred = [niqe.score(textured(20, blur=amount)) for amount in (1.0, 2.0)]
    noisy = [niqe.score(textured(20, noise=amount)) for amount in (10.0, 30.0)]
    assert clean < blurred[0] < blurred[1]
    assert clean < noisy[0] < noisy[1]


def test_niqe_of_too_small_a_photo(models: Path) -> None:
    with pytest.raises(ImageTooSmall, match="two blocks"):
        Niqe.read(models).score(picture(0, (96, 190)))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (BRISQUE_MODEL, "svm_type c_svc\nkernel_type rbf\nSV\n", "c_svc with kernel rbf"),
        (
            BRISQUE_MODEL,
            "svm_type nu_svr\nkernel_type rbf\ngamma 1\nrho 0\ntotal_sv 2\nSV\n1 1:1\n",
            "1 of 2 support vectors",
        ),
        (BRISQUE_MODEL, "something else", "not a model file"),
        (BRISQUE_RANGES, "x\n-1 1\n1 0 1\n", "1 features"),
        (BRISQUE_RANGES, "x\n0 1\n", "x 0 1"),
        (NIQE_STATISTICS, "text", "not a model file"),
        (NIQE_STATISTICS, None, "No such file"),
    ],
)
def test_damaged_model_files(models: Path, name: str, text: str | None, message: str) -> None:
    (models / name).unlink()
    if text is not None:
        (models / name).write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        published_scorers(models)
    assert name in str(caught.value)


def test_sharpness_falls_with_blur() -> None:
    pictures = [load_pixels(textured(3, blur=blur)) for blur in (0, 1, 2)]
    clean, blurred, lost = (sharpness(pixels) for pixels in pictures)
    assert clean > blurred > lost


def test_judging(tmp_path: Path) -> None:
    paths = []
    for at, level in enumerate((10, 200, 90, 30)):
        path = tmp_path / f"{at}.png"
        Image.fromarray(np.full((8, 8, 3), level, np.uint8)).save(path)
        paths.append(str(path))

    def bright(pixels: Pixels) -> float:
        if pixels.array.mean() > 150:
            raise ImageTooSmall("too small")
        return float(pixels.array.mean())

    scorers: dict[str, OtherScorer] = {
        "bright": lambda pixels: float(pixels.array.mean()),
        "some": bright,
    }
    told: list[None] = []
    human = np.array([1.0, 5.0, 3.0, 2.0])
    rows = judge_by(scorers, paths, human, lambda: told.append(None))
    assert [(row["name"], row["n"], row["srcc"]) for row in rows] == [
        ("bright", 4, 1),
        ("some", 3, 1),
    ]
    assert len(told) == 4
    own = {"srcc": 0.5, "plcc": 0.5, "krcc": 0.5}
    report = {"n": 4, "seconds_per_image": 0.1, "initial": own, "fused": own, "scorers": rows}
    assert "some                 3  1.0000" in scorers_text(report)


def test_it_stands_beside_the_engine(
    package: EnginePackage,
    anchors: Path,
    models: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    table = tmp_path / "labels.csv"
    names = [f"{at}.png" for at in range(FEWEST_PHOTOS + 2)]
    for at, name in enumerate(names):
        Image.fromarray(picture(at, (96, 192))).save(tmp_path / name)
    rows = [f"{name},{at / 100},{'train' if at > 1 else 'val'}" for at, name in enumerate(names)]
    table.write_text("file,mos,split\n" + "\n".join(rows) + "\n")
    arguments = [str(table), "--images", str(tmp_path), "--models", str(models), "--split", "val"]
    arguments += ["--package", str(package.path), "--memory", str(anchors), "--threads", "1"]
    main([*arguments, "--regressor-from", str(table), "--train-split", "train"])
    text = capsys.readouterr().out
    for name in ("meiqa, initial", "meiqa, fused", "BRISQUE", "NIQE", "ridge on visual tokens"):
        assert name in text
    with pytest.raises(UsageError, match="holds photos that are to be judged"):
        main([*arguments, "--regressor-from", str(table)])


@pytest.mark.skipif(not NIMA.exists(), reason="no weights of NIMA beside the checkout")
def test_nima_grades_on_its_scale() -> None:
    judged = nima(NIMA)
    grades = [judged(load_pixels(textured(seed, blur=seed))) for seed in range(3)]
    assert all(1.0 < grade < 10.0 for grade in grades)
    assert np.ptp(grades) > 0.05
