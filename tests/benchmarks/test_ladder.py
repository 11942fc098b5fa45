"""The ladder of distortions, climbed by judges whose answers are known."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.ladder import (
    IMAGES_A_PHOTOGRAPH,
    Rungs,
    bench_ladder,
    images_of,
    ladder_text,
    main,
    photographs_of,
)
from meiqa.engine.images import load_pixels
from meiqa.errors import DecodeError, UsageError
from meiqa.locations import embedded_assets
from meiqa.types import Assessment, Failure
from tests.engine.samples import picture
from training.data import HELD_OUT_PRISTINE, pristine_names
from training.distortions import KINDS


class DifferenceEngine:
    """Scores by how far an image is from the first one it sees; always 3 initially."""

    def __enter__(self) -> DifferenceEngine:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def score_many(self, images: Iterable[Any], **options: Any) -> Iterator[Assessment | Failure]:
        assert options == {"k": 2, "learn": False}
        first = None
        for image in images:
            pixels = np.asarray(image, np.float64)
            first = pixels if first is None else first
            score = 5 - np.sqrt(np.mean((pixels - first) ** 2)) / 64
            yield Assessment("", score, 0.1, (1, 5), 3.0, "fair", 50.0, None)


@pytest.fixture
def photographs(tmp_path: Path) -> list[Path]:
    for at in range(2):
        Image.fromarray(picture(at, (64, 96))).save(tmp_path / f"{at}.png")
    (tmp_path / "index.csv").write_text("name,side\na,1\n")
    return photographs_of(tmp_path)


def test_a_judge_that_measures_the_difference(photographs: list[Path]) -> None:
    told: list[None] = []
    engine: Any = DifferenceEngine()
    report = bench_ladder(engine, photographs, k=2, on_image=lambda: told.append(None))
    assert len(photographs) == 2
    assert len(told) == 2 * IMAGES_A_PHOTOGRAPH == 2 * (1 + 5 * len(KINDS))
    assert report["fused"]["mean"]["within"] > 0.8
    assert report["initial"]["mean"] == {"srcc": 0, "within": 0, "falling": 0, "rising": 0}
    noise = next(row for row in report["fused"]["rows"] if row["name"] == "white noise")
    assert noise["within"] == 1
    assert noise["falling"] == 1
    lowest = min(report["fused"]["rows"], key=lambda row: float(row["srcc"]))
    assert report["fused"]["worst"] == {"name": lowest["name"], "srcc": lowest["srcc"]}
    assert f"worst: {lowest['name']}, " in ladder_text(report)
    assert len(ladder_text(report).splitlines()) == 2 + 1 + len(KINDS) + 1


def test_a_ladder_of_six() -> None:
    scores = np.array([[5, 4, 3, 3, 3.5, 1.0]])
    assert Rungs.of(1, scores).figures() == {
        "srcc": pytest.approx(0.8117, abs=1e-3),
        "within": pytest.approx(0.8117, abs=1e-3),
        "falling": 0.6,
        "rising": 0.2,
    }


def test_a_ladder_with_two_sides() -> None:
    perfect = np.array([[4.0, 1.0, 2.0, 4.0, 3.0, 1.5], [5.0, 1.0, 3.0, 5.0, 3.0, 1.0]])
    figures = Rungs.of(18, perfect).figures()
    assert figures["falling"] == 1
    assert figures["within"] > 0.9
    one_way = np.array([[3.0, 5.0, 4.0, 3.0, 2.0, 1.0]])
    assert Rungs.of(18, one_way).figures()["srcc"] == pytest.approx(0)


def test_the_images_are_the_same_in_every_run(photographs: list[Path]) -> None:
    kinds = [KINDS[10], KINDS[19]]
    first, again = (list(images_of(photographs[0], kinds)) for _ in range(2))
    assert len(first) == 11
    np.testing.assert_array_equal(first[0], load_pixels(photographs[0]).array)
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_index_gives_what_training_keeps_unseen(tmp_path: Path) -> None:
    rows = [f"p{at}.jpg,{300 + at},{600}" for at in range(120)]
    index = tmp_path / "pristine" / "index.csv"
    index.parent.mkdir()
    index.write_text("\n".join(["file,width,height", *rows]) + "\n")
    chosen = photographs_of(tmp_path, index)
    assert len(chosen) == HELD_OUT_PRISTINE
    assert [path.name for path in chosen] == pristine_names(tmp_path, held_out=True)


def test_folders_and_indexes_that_make_no_sense(tmp_path: Path, photographs: list[Path]) -> None:
    with pytest.raises(UsageError, match="no such directory"):
        photographs_of(tmp_path / "none")
    with pytest.raises(UsageError, match="No such file"):
        photographs_of(tmp_path, tmp_path / "none.csv")
    with pytest.raises(UsageError, match="no index of photographs"):
        photographs_of(tmp_path, tmp_path / "index.csv")
    engine: Any = DifferenceEngine()
    with pytest.raises(UsageError, match="no photographs"):
        bench_ladder(engine, [])
    (tmp_path / "broken.png").write_text("no picture")
    with pytest.raises(DecodeError):
        bench_ladder(engine, [tmp_path / "broken.png"], k=2)


def test_the_command(
    photographs: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    memories: list[Path] = []

    def opened(memory: Path, learn: bool) -> DifferenceEngine:
        assert not learn
        memories.append(memory)
        return DifferenceEngine()

    monkeypatch.setattr("benchmarks.ladder.Engine.open", opened)
    command = ["--images", str(tmp_path), "--limit", "1", "--k", "2"]
    main([*command, "--format", "json"])
    assert json.loads(capsys.readouterr().out)["photographs"] == 1
    main(command)
    assert capsys.readouterr().out.startswith("photographs: 1, types of distortion: 25;")
    assert memories == 2 * [embedded_assets() / "memory"]
    with pytest.raises(UsageError, match="no such directory"):
        main(["--images", str(tmp_path / "none")])
