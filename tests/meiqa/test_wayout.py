"""What a cull has found becomes ratings, lists, copies, links and moves, and nothing is lost."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from meiqa import cli
from meiqa.errors import UsageError
from meiqa.journal import journals_in
from meiqa.testing import FakeEngine
from meiqa.wayout import Verdict, WayOut, plan, stars_given

Grey = Callable[..., Path]
Output = pytest.CaptureFixture[str]
RATED = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF '
    'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about="" '
    'xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmp:Rating="2" /></rdf:RDF></x:xmpmeta>'
)


def tree(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in files if "journal" not in p.name}


def rating(sidecar: Path) -> str:
    return sidecar.read_text().partition('xmp:Rating="')[2].partition('"')[0]


@pytest.fixture
def shoot(engine: FakeEngine, grey: Grey, tmp_path: Path) -> Path:
    """A folder of two shots of one thing, the first with a RAW, and of another in a subfolder.

    The engine takes photos of one size for shots of one thing, and likes the bright.
    """
    grey("shoot/1.jpg", 240)
    grey("shoot/2.JPG", 90)
    (tmp_path / "shoot/1.CR2").write_bytes(b"raw 1")
    (tmp_path / "shoot/2.CR2").write_bytes(b"raw 2")
    (tmp_path / "shoot/day 2").mkdir()
    Image.fromarray(np.full((9, 9, 3), 150, np.uint8)).save(tmp_path / "shoot/day 2/1.jpg")
    return tmp_path / "shoot"


def cull(*arguments: object) -> int:
    return cli.main(["cull", *map(str, arguments)])


def test_sidecars_by_lightrooms_names(shoot: Path, capsys: Output) -> None:
    before = tree(shoot)
    assert cull(shoot, "--xmp", "--dry-run") == 0
    told = capsys.readouterr().err
    assert f"meiqa: would write {shoot}/1.xmp: 5 stars, Green\n" in told
    assert f"meiqa: would write {shoot}/2.xmp: rejected, Red\n" in told
    assert tree(shoot) == before
    assert journals_in(shoot) == []
    assert cull(shoot, "--xmp") == 0
    made = tree(shoot).keys() - before.keys()
    assert made == {"1.xmp", "2.xmp", "day 2/1.xmp"}
    assert [rating(shoot / name) for name in sorted(made)] == ["5", "-1", "3"]
    assert 'xmp:Label="Green"' in (shoot / "1.xmp").read_text()
    assert 'xmp:Label="Red"' in (shoot / "2.xmp").read_text()
    capsys.readouterr()
    assert cull(shoot, "--xmp") == 0  # the second day
    assert capsys.readouterr().err.endswith("\nmeiqa: nothing is left to be done\n")
    assert cull("--undo", shoot) == 0
    assert tree(shoot) == before
    capsys.readouterr()
    assert cull("--undo", shoot) == 2
    nothing = "nothing to undo: the latest run has been undone already\n"
    assert capsys.readouterr().err == f"meiqa: error: {nothing}"
    assert cull("--resume", shoot) == 2
    assert "nothing to finish: the latest run has been undone" in capsys.readouterr().err


def test_sidecars_by_darktables_names(shoot: Path) -> None:
    (shoot / "1.CR2.XMP").write_text(RATED.replace('"2"', '"0"'))
    before = tree(shoot)
    assert cull(shoot, "--xmp", "--sidecar", "darktable") == 0
    made = {"1.jpg.xmp", "2.JPG.xmp", "2.CR2.xmp", "day 2/1.jpg.xmp"}
    assert tree(shoot).keys() - before.keys() == made
    assert rating(shoot / "1.CR2.XMP") == "5"


@pytest.mark.parametrize("where", ["1.xmp", "1.CR2.xmp", "1.jpg"])
def test_a_rating_by_hand_stays(where: str, shoot: Path, tmp_path: Path, capsys: Output) -> None:
    """Whatever the name of its sidecar, or in the photo itself."""
    held = (shoot / where).read_bytes() if where == "1.jpg" else b""
    (shoot / where).write_bytes(held + RATED.encode())
    before = tree(shoot)
    assert cull(shoot, "--xmp") == 0
    assert "rated by somebody, and left as they are: 1; --force" in capsys.readouterr().err
    assert {k: v for k, v in tree(shoot).items() if k in before} == before
    assert not (shoot / "1.xmp").exists() or where == "1.xmp"
    assert cull(shoot, "--xmp", "--force") == 0
    assert rating(shoot / "1.xmp") == "5"


def test_a_reject_that_somebody_rated_is_not_moved(shoot: Path, tmp_path: Path) -> None:
    (shoot / "2.xmp").write_text(RATED)
    assert cull(shoot, "--move-rejects-to", tmp_path / "bin") == 0
    assert (shoot / "2.JPG").exists()
    assert cull(shoot, "--move-rejects-to", tmp_path / "bin", "--force") == 0
    assert not (shoot / "2.JPG").exists()


def test_a_sidecar_that_is_no_xmp_stays_and_the_rest_goes_on(shoot: Path, capsys: Output) -> None:
    (shoot / "1.xmp").write_bytes(b"<broken")
    assert cull(shoot, "--xmp") == 1
    assert f"{shoot}/1.xmp is left as it is: no well-formed XMP; got" in capsys.readouterr().err
    assert (shoot / "1.xmp").read_bytes() == b"<broken"
    assert rating(shoot / "2.xmp") == "-1"


def test_shots_are_copied_linked_and_moved_whole(shoot: Path, tmp_path: Path) -> None:
    before = tree(tmp_path)
    picks, links, rejects = tmp_path / "out/picks", tmp_path / "links", tmp_path / "rejects"
    ways = ["--copy-to", picks, "--link-to", links, "--move-rejects-to", rejects, "--xmp"]
    assert cull(shoot, *ways) == 0
    assert tree(picks).keys() == {"1.jpg", "1.CR2", "1.xmp", "day 2/1.jpg", "day 2/1.xmp"}
    assert tree(rejects).keys() == {"2.JPG", "2.CR2", "2.xmp"}
    assert rating(rejects / "2.xmp") == "-1"
    assert not [name for name in tree(shoot) if name.startswith("2.")]
    assert (links / "1.CR2").readlink() == shoot / "1.CR2"
    done = tree(tmp_path)
    assert cull(shoot, *ways) == 0
    assert tree(tmp_path) == done
    assert cull("--undo", shoot) == 0
    assert tree(tmp_path) == before
    assert {each.name for each in tmp_path.iterdir()} == {"shoot"}


def test_the_second_run_is_undone_alone(shoot: Path, grey: Grey, tmp_path: Path) -> None:
    assert cull(shoot, "--copy-to", tmp_path / "picks") == 0
    first = tree(tmp_path / "picks")
    grey("shoot/0.jpg", 255)
    assert cull(shoot, "--copy-to", tmp_path / "picks") == 0
    assert tree(tmp_path / "picks").keys() - first.keys() == {"0.jpg"}
    assert cull("--undo", shoot) == 0
    assert tree(tmp_path / "picks") == first
    assert cull("--undo", shoot) == 0
    assert not (tmp_path / "picks").exists()


def test_without_a_file_that_is_gone_the_rest_is_undone_for_good(
    shoot: Path, tmp_path: Path, capsys: Output
) -> None:
    """Should it come back, the journal still knows where it belongs."""
    before, rejects = tree(shoot), tmp_path / "rejects"
    assert cull(shoot, "--xmp", "--move-rejects-to", rejects) == 0
    (journal,) = journals_in(shoot)
    os.rename(rejects / "2.CR2", tmp_path / "elsewhere")
    capsys.readouterr()
    assert cull("--undo", shoot) == 1
    told = capsys.readouterr().err
    assert f"{rejects}/2.CR2 is gone, and cannot be moved back to {shoot}/2.CR2\n" in told
    assert told.endswith("actions undone; nothing else is left to be undone\n")
    assert tree(shoot) == {name: held for name, held in before.items() if name != "2.CR2"}
    assert cull("--undo", shoot) == 2
    told = capsys.readouterr().err
    assert "nothing to undo: the latest run has been undone already, but for files" in told
    assert f"meiqa cull --undo {journal.path}\n" in told
    rejects.mkdir()
    os.rename(tmp_path / "elsewhere", rejects / "2.CR2")
    assert cull("--undo", journal.path) == 0
    assert tree(shoot) == before


def test_nothing_is_overwritten(shoot: Path, tmp_path: Path, capsys: Output) -> None:
    (tmp_path / "picks").mkdir()
    (tmp_path / "picks/1.jpg").write_bytes(b"mine")
    assert cull(shoot, "--copy-to", tmp_path / "picks") == 1
    assert "picks/1.jpg is left as it is; got another file than " in capsys.readouterr().err
    assert tree(tmp_path / "picks").keys() == {"1.jpg", "day 2/1.jpg"}
    assert (tmp_path / "picks/1.jpg").read_bytes() == b"mine"


def test_folders_that_are_named_side_by_side_keep_their_names(
    shoot: Path, grey: Grey, tmp_path: Path
) -> None:
    grey("other/1.jpg", 250)
    assert cull(shoot / "day 2", tmp_path / "other", "--copy-to", tmp_path / "picks") == 0
    assert tree(tmp_path / "picks").keys() == {"shoot/day 2/1.jpg", "other/1.jpg"}
    assert len(journals_in(tmp_path)) == 1


def test_a_target_within_the_folder_is_refused(shoot: Path, capsys: Output) -> None:
    for way in ("--copy-to", "--link-to", "--move-rejects-to"):
        assert cull(shoot, way, shoot / "day 2" / "out") == 2
        assert "would be culled with it the next time" in capsys.readouterr().err


def test_a_list_of_the_best(shoot: Path, tmp_path: Path, capsys: Output) -> None:
    strange = os.path.join(os.fsencode(shoot), b"3 \xff\n.png")
    Image.new("L", (3, 3), 99).save(shoot / "3.png")
    os.rename(shoot / "3.png", strange)
    Image.new("L", (4, 4), 99).save(shoot / "4.png")
    os.rename(shoot / "4.png", os.path.join(os.fsencode(shoot), b"4 \xff.png"))
    assert cull(shoot, "--list", tmp_path / "best") == 1
    assert "is not listed: a newline is in its name" in capsys.readouterr().err
    listed = (tmp_path / "best").read_bytes().splitlines()
    names = [b"1.jpg", b"4 \xff.png", b"day 2/1.jpg"]
    assert listed == [os.fsencode(shoot / os.fsdecode(name)) for name in names]
    (tmp_path / "best").write_text("mine")
    assert cull(shoot, "--list", tmp_path / "best") == 2
    assert (tmp_path / "best").read_text() == "mine"
    assert cull(shoot, "--list", tmp_path / "best", "--force") == 1
    assert cull("--undo", shoot) == 0
    assert (tmp_path / "best").read_text() == "mine"
    assert cull(shoot, "--list", "-") == 2


def test_links_are_followed_by_copies_and_never_moved(
    shoot: Path, grey: Grey, tmp_path: Path, capsys: Output
) -> None:
    there = grey("elsewhere/9.jpg", 50)
    (shoot / "0.jpg").symlink_to(there)
    assert cull(shoot, "--move-rejects-to", tmp_path / "bin", "--copy-to", tmp_path / "picks") == 1
    assert "0.jpg is not moved; got a link; allowed: a file" in capsys.readouterr().err
    assert there.exists()
    assert (shoot / "0.jpg").is_symlink()
    assert not (shoot / "2.JPG").exists()


def test_a_run_that_was_cut_short_comes_first(
    shoot: Path, tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    before = tree(shoot)
    with monkeypatch.context() as patch:
        patch.setattr("meiqa.journal.Move.do", killed)
        assert cull(shoot, "--xmp", "--move-rejects-to", tmp_path / "bin") == 130
    assert cull(shoot, "--xmp") == 2
    assert "an earlier run was cut short" in capsys.readouterr().err
    assert cull("--resume", shoot) == 0
    assert tree(tmp_path / "bin").keys() == {"2.JPG", "2.CR2", "2.xmp"}
    assert cull("--resume", shoot) == 2
    assert cull("--undo", journals_in(shoot)[0].path) == 0
    assert tree(shoot) == before


def test_a_journal_elsewhere(shoot: Path, tmp_path: Path) -> None:
    assert cull(shoot, "--xmp", "--journal", tmp_path / "j") == 0
    assert journals_in(shoot) == []
    assert cull("--undo", tmp_path / "j") == 0
    assert not (shoot / "1.xmp").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--sidecar", "darktable"], "--sidecar means nothing without --xmp"),
        (["--stars", "top10"], "--stars means nothing without --xmp"),
        (["--dry-run"], "--dry-run means nothing without --xmp or --list or"),
        (["--undo", "--xmp"], "means nothing beside"),
        (["--resume", "--undo"], "means nothing beside"),
        (["--xmp", "--stars", "3,2,4,5"], "neither four rising scores nor top and a percentage"),
        (["--xmp", "--stars", "3"], "neither four rising scores nor top and a percentage"),
        (["--xmp", "--stars", "top0"], "is not a number above 0 up to 100"),
        (["--undo", "b"], "one folder or journal is undone"),
        (["--undo"], "is no journal"),
        (["-", "--xmp"], "standard input is no file"),
    ],
)
def test_what_makes_no_sense_is_refused(
    options: list[str], told: str, engine: FakeEngine, capsys: Output
) -> None:
    assert cull("a.jpg", *options) == 2
    assert told in capsys.readouterr().err


def test_stars_by_scores_and_by_the_users_own_spread() -> None:
    given = stars_given((2.6, 3.2, 3.8, 4.3), [])
    assert [given(score) for score in (1.0, 2.59, 2.6, 3.2, 4.29, 4.3, 5.0)] == [
        1,
        1,
        2,
        3,
        4,
        5,
        5,
    ]
    scores = [number / 100 for number in range(100, 200)]
    given = stars_given(10.0, scores)
    counts = [sum(given(score) == stars for score in scores) for stars in (5, 4, 3, 2, 1)]
    assert counts == [10, 20, 40, 30, 0]
    given = stars_given(5.0, scores)
    counts = [sum(given(score) == stars for score in scores) for stars in (5, 4, 3, 2, 1)]
    assert counts == [5, 10, 20, 40, 25]
    assert stars_given(10.0, [3.0])(3.0) == 5


def test_photos_of_one_name_share_the_better_verdict(grey: Grey, tmp_path: Path) -> None:
    photos = [grey("d/1.jpg"), grey("d/1.png")]
    verdicts = [Verdict(str(photos[0]), -1), Verdict(str(photos[1]), 4)]
    found = plan(verdicts, WayOut([str(tmp_path / "d")], move_rejects_to=str(tmp_path / "out")))
    assert found.actions == []
    with pytest.raises(UsageError):
        WayOut([str(tmp_path)], copy_to=str(tmp_path / "out"))


# Whole libraries


def test_score_rates_a_library(shoot: Path, tmp_path: Path, capsys: Output) -> None:
    assert cli.main(["score", str(shoot), "--xmp", "--stars", "2.6,3.2,3.8,4.3"]) == 0
    names = ("1.xmp", "2.xmp", "day 2/1.xmp")
    assert [rating(shoot / name) for name in names] == ["5", "1", "3"]
    assert "undo them: meiqa cull --undo" in capsys.readouterr().err
    assert cull("--undo", shoot) == 0
    assert not (shoot / "1.xmp").exists()


@pytest.mark.parametrize("format", ["csv", "jsonl"])
def test_a_run_that_is_gone_on_with_rates_all_its_rows(
    format: str, shoot: Path, tmp_path: Path
) -> None:
    rows = ["--format", format, "--output", str(tmp_path / "rows")]
    assert cli.main(["score", str(shoot), *rows]) == 0
    assert cli.main(["score", str(shoot), *rows, "--resume", "--xmp", "--stars", "top10%"]) == 0
    names = ("1.xmp", "2.xmp", "day 2/1.xmp")
    assert [rating(shoot / name) for name in names] == ["5", "3", "3"]
