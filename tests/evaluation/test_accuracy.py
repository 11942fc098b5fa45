"""Label tables as people have them, and the figures that come out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from meiqa.errors import DecodeError, UsageError
from meiqa.evaluation.accuracy import judge
from meiqa.labels import LabelTable
from meiqa.types import Assessment, Failure, Neighbour


class NameEngine:
    """Read the fused score off the file's name; the initial one is rounded to halves."""

    def __init__(self) -> None:
        self.options: dict[str, Any] = {}

    def score_many(self, images: Iterable[str], **options: Any) -> Iterator[Assessment | Failure]:
        self.options = options
        for image in images:
            stem = Path(image).stem
            if stem == "missing":
                yield Failure(image, DecodeError(f"{image}: no such file"))
                continue
            score = float(stem)
            yield Assessment(
                path=image,
                score=score,
                std=0.25,
                ci95=(score - 0.5, score + 0.5),
                initial_score=round(2 * score) / 2,
                word="fair",
                percentile=50.0,
                summary=None,
                neighbours=(
                    Neighbour("a", "anchor", 3.0, 0.1, 0.5),
                    Neighbour("b", "anchor", 3.0, 0.1, None),
                ),
            )


def table(folder: Path, text: str) -> Path:
    path = folder / "labels.csv"
    path.write_text(text, encoding="utf-8")
    return path


def read(folder: Path, text: str, **options: Any) -> LabelTable:
    return LabelTable.read(table(folder, text), **options)


@pytest.mark.parametrize("image", ["file", "path", "image", "filename", "name", " File "])
@pytest.mark.parametrize("score", ["mos", "score", "quality", "MOS"])
def test_column_names(tmp_path: Path, image: str, score: str) -> None:
    labels = read(tmp_path, f"other,{score},{image}\n9,0.5,a.jpg\n")
    assert (labels.files, labels.scores) == (("a.jpg",), (0.5,))


def test_spreadsheet_exports_with_a_byte_order_mark(tmp_path: Path) -> None:
    assert read(tmp_path, "\ufefffile,mos\r\nä b.jpg,1\r\n\r\n").files == ("ä b.jpg",)


@pytest.mark.parametrize(
    ("scores", "limits", "mapped"),
    [
        ((0.0, 0.5), (0, 1), (1.0, 3.0)),
        ((0.5, 1.0), (0, 1), (3.0, 5.0)),
        ((1.0, 5.0), (1, 5), (1.0, 5.0)),
        ((0.0, 20.0), (0, 100), (1.0, 1.8)),
        ((25.0, 100.0), (0, 100), (2.0, 5.0)),
    ],
)
def test_the_scale_is_inferred(
    tmp_path: Path,
    scores: tuple[float, float],
    limits: tuple[float, float],
    mapped: tuple[float, float],
) -> None:
    labels = read(tmp_path, "file,mos\na,{}\nb,{}\n".format(*scores))
    assert labels.mos_range == limits
    assert labels.scores_1_to_5() == pytest.approx(mapped)


def test_the_scale_is_that_of_the_whole_table(tmp_path: Path) -> None:
    labels = read(tmp_path, "file,mos,split\na,0.5,val\nb,70,train\n", split="val")
    assert (labels.files, labels.mos_range) == (("a",), (0, 100))


def test_a_scale_can_be_given(tmp_path: Path) -> None:
    labels = read(tmp_path, "file,mos\na,0\nb,9\n", mos_range=(0, 9))
    assert labels.scores_1_to_5() == (1.0, 5.0)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, "holds no rows"),
        ("file,mos\n", {}, "holds no rows"),
        ("picture,mos\na,1\n", {}, "no image column; got the columns picture, mos"),
        ("file,dmos\na,1\n", {}, "no score column; got the columns file, dmos"),
        ("file,mos\na,1\nb,high\n", {}, "line 3: the score is not a number; got 'high'"),
        ("file,mos\na,nan\n", {}, "line 2: the score is not a number"),
        ("file,mos\na\n", {}, "line 2: the score is not a number; got ''"),
        ("file,mos\na,-3\nb,4\n", {}, "unknown scale; got -3 to 4"),
        ("file,mos\na,1\n", {"split": "val"}, "no split column"),
        ("file,mos,split\na,1,train\n", {"split": "val"}, "got val; allowed: train"),
        ("file,mos\na,9\n", {"mos_range": (1, 5)}, "outside the range given"),
        ("file,mos\na,1\n", {"mos_range": (5, 1)}, "range of human scores is empty"),
        ("file,mos\na,1\n", {"mos_range": (0, float("nan"))}, "range of human scores is empty"),
    ],
)
def test_tables_that_make_no_sense(
    tmp_path: Path, text: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        read(tmp_path, text, **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_table(tmp_path: Path) -> None:
    binary = tmp_path / "binary.csv"
    binary.write_bytes(b"\xff\xfe\x00file")
    for path in (tmp_path, tmp_path / "none.csv", binary):
        with pytest.raises(UsageError, match=path.name):
            LabelTable.read(path)


def test_a_limit_spreads_over_the_table(tmp_path: Path) -> None:
    labels = read(tmp_path, "file,mos\n" + "".join(f"{i},{i / 10}\n" for i in range(10)))
    assert labels.spread(3).files == ("0", "3", "6")
    assert labels.spread(3).scores == (0.0, 0.3, 0.6)
    assert labels.spread(None) is labels.spread(99) is labels


def test_report(tmp_path: Path) -> None:
    labels = read(tmp_path, "file,mos\n1.2.jpg,1.3\n2.2.jpg,2.1\n3.4.jpg,4.4\nmissing.jpg,3\n")
    engine = NameEngine()
    seen: list[Assessment | Failure] = []
    judged = judge(engine, labels, tmp_path, k=7, on_result=seen.append)  # type: ignore[arg-type]
    report = judged.report()
    assert engine.options == {"budget": None, "k": 7, "learn": False, "detail": False}
    assert report["n"] == 3
    assert report["k"] == 1
    assert report["mos_range"] == [1, 5]
    assert report["fused"]["srcc"] == pytest.approx(1)
    assert report["fused"]["rmse"] == pytest.approx(((0.1**2 + 0.1**2 + 1) / 3) ** 0.5)
    low, high = report["fused"]["srcc_ci95"]
    assert low <= report["fused"]["srcc"] <= high
    assert report["initial"].keys() == report["fused"].keys()
    assert report["initial"]["rmse"] != report["fused"]["rmse"]
    assert report["coverage95"] == pytest.approx(2 / 3)
    assert report["reliability"][0] == {"nominal": 0.5, "observed": pytest.approx(2 / 3)}
    assert report["tied_pairs"]["pairs"] == 0
    assert report["human"] == {"effective_bins": pytest.approx(3), "distinct": 3, "tie_rate": 0}
    assert report["seconds_per_image"] >= 0
    assert [failure["path"] for failure in report["failures"]] == [str(tmp_path / "missing.jpg")]
    assert len(seen) == 4


def test_pairs_that_the_initial_score_leaves_tied(tmp_path: Path) -> None:
    labels = read(tmp_path, "file,mos\n2.9.jpg,3.5\n3.0.jpg,2.5\n3.1.jpg,4.5\n4.jpg,4\n")
    report = judge(NameEngine(), labels, tmp_path).report()  # type: ignore[arg-type]
    assert report["tied_pairs"] == {"pairs": 3, "agreement": pytest.approx(2 / 3)}


def test_too_few_photos(tmp_path: Path) -> None:
    labels = read(tmp_path, "file,mos\n1.2.jpg,1.3\nmissing.jpg,3\n")
    with pytest.raises(UsageError, match=r"1 of 2 photos could be scored.*missing\.jpg"):
        judge(NameEngine(), labels, tmp_path)  # type: ignore[arg-type]


def test_missing_image_directory(tmp_path: Path) -> None:
    labels = read(tmp_path, "file,mos\n1.jpg,1\n2.jpg,2\n")
    with pytest.raises(UsageError, match="no such directory"):
        judge(NameEngine(), labels, tmp_path / "none")  # type: ignore[arg-type]
