"""Folders as people keep them: photos are found by content, the rest is counted, twins are one."""

from __future__ import annotations

from pathlib import Path

import pytest

from meiqa import cli
from meiqa.cli import options
from meiqa.engine.images import Developed
from meiqa.errors import UsageError
from meiqa.evaluation.measuring import made_jpeg
from meiqa.folders import gather

JPEG = made_jpeg(0, (32, 48))


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """Give a folder with a bit of everything."""
    pictures = "a.jpg b.jpe c.mpo IMG_0004 odd.data d.HEIC d.aae e.mp4 f.MOV a.xmp notes.txt"
    for name in (*pictures.split(), "DSC_1.NEF", "DSC_1.JPG", "DSC_2.ARW", ".hidden.jpg"):
        (tmp_path / name).write_bytes(JPEG)
    for name in ("e.mp4", "f.MOV", "notes.txt"):
        (tmp_path / name).write_bytes(b"nothing to see here")
    for folder in ("@eaDir", ".thumbnails", "#recycle", "deeper"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "inner.jpg").write_bytes(JPEG)
    return tmp_path


def names(photos: list[str]) -> list[str]:
    return sorted(Path(photo).name for photo in photos)


def test_what_is_found_and_what_is_passed_over(library: Path) -> None:
    found = gather([str(library)])
    expected = ["DSC_1.JPG", "DSC_2.ARW", "IMG_0004", "a.jpg", "b.jpe", "c.mpo", "d.HEIC"]
    assert names(found.photos) == [*expected, "inner.jpg", "odd.data"]
    assert str(found) == (
        "9 photos; skipped 1 RAW twin, 3 hidden folders, 1 other file, 2 sidecars, 2 videos"
    )


def test_the_raw_file_stands_for_both_where_it_is_developed(library: Path) -> None:
    found = gather([str(library)], develop=True)
    assert {"DSC_1.NEF", "DSC_2.ARW"} <= {*names(found.photos)}
    assert "DSC_1.JPG" not in names(found.photos)
    assert found.passed_over["JPEG twin"] == 1


def test_hidden_folders_are_walked_on_demand(library: Path) -> None:
    found = gather([str(library)], hidden=True)
    assert names(found.photos).count("inner.jpg") == 4
    assert ".hidden.jpg" in names(found.photos)
    assert "hidden folder" not in found.passed_over


def test_a_hidden_folder_that_is_named_is_walked(library: Path) -> None:
    assert len(gather([str(library / "@eaDir")]).photos) == 1


def test_a_raw_file_and_a_photo_of_another_folder_are_two(tmp_path: Path) -> None:
    for name in ("raw/1.nef", "jpeg/1.jpg"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(JPEG)
    assert len(gather([str(tmp_path)]).photos) == 2


def test_nothing_but_photos_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(JPEG)
    assert str(gather([str(tmp_path)])) == "1 photo"
    assert gather([str(tmp_path / "a.jpg")]).photos == [str(tmp_path / "a.jpg")]


def test_a_folder_without_photos_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "a.xmp").write_text("<x/>")
    (failure,) = gather([str(tmp_path)]).failures
    assert "holds no photos" in str(failure.error)


@pytest.mark.parametrize("raw", ["preview", "develop"])
def test_commands_read_raw_files_as_asked(
    library: Path, raw: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[object] = []

    def sources(paths: list[str]) -> list[str]:
        seen.extend(paths)
        raise UsageError("enough")

    monkeypatch.setattr(options, "sources", sources)
    reference = ["score", "a.nef", "--reference", "b.nef"]
    for command in (["rank", str(library)], ["compare", "a.nef", "b.nef"], reference):
        assert cli.main([*command, "--raw", raw]) == 2
        assert all(isinstance(path, Developed) == (raw == "develop") for path in seen)
        assert seen
    assert "skipped 1" in capsys.readouterr().err.splitlines()[0]
