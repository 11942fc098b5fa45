"""Label tables as spreadsheets write them, and scales that are told or refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from meiqa.errors import UsageError
from meiqa.labels import LabelTable


def table(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "labels.csv"
    path.write_text(text, newline="")
    return path


@pytest.mark.parametrize(
    "text",
    [
        "image,mos\na.jpg,4.5\nb.jpg,1.25\n",
        "image;mos\r\na.jpg;4,5\r\nb.jpg;1,25\r\n",
        "image;mos\na.jpg;4.5\nb.jpg;1.25\n",
        "image\tmos\na.jpg\t4,5\nb.jpg\t1.25\n",
        'image,mos\na.jpg,"4,5"\nb.jpg,1.25\n',
        "\ufeffimage;mos\na.jpg;4,5\nb.jpg;1,25\n",
    ],
)
def test_separators_and_decimal_commas(text: str, tmp_path: Path) -> None:
    labels = LabelTable.read(table(tmp_path, text))
    assert labels.files == ("a.jpg", "b.jpg")
    assert labels.scores == (4.5, 1.25)
    assert labels.mos_range == (1.0, 5.0)


@pytest.mark.parametrize("scores", [(9.6, 2.5), (10, 1), (6.1, 6.9), (0.4, 4.8)])
def test_a_scale_in_doubt_is_refused(scores: tuple[float, ...], tmp_path: Path) -> None:
    rows = "".join(f"{n}.jpg,{score}\n" for n, score in enumerate(scores))
    path = table(tmp_path, f"image,mos\n{rows}")
    with pytest.raises(UsageError, match=r"in doubt; got .*--mos-range LO HI"):
        LabelTable.read(path)
    assert LabelTable.read(path, mos_range=(0, 10)).mos_range == (0, 10)


def test_a_photo_with_several_scores_is_found(tmp_path: Path) -> None:
    text = "image,mos\na.jpg,4.5\nb.jpg,1.5\na.jpg,1\nb.jpg,1.5\n"
    found = LabelTable.read(table(tmp_path, text)).contradictions()
    assert found == {"a.jpg": [4.5, 1.0]}
