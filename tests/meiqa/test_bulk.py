"""`meiqa bulk` in one process: where photos come from, and rows that are written once."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pickle
import shutil
import subprocess
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pyarrow import fs

from meiqa import batches, cli, scorer, sources
from meiqa.batches import Condition
from meiqa.cli import options
from meiqa.engine.calibration import model_terms
from meiqa.errors import UsageError
from meiqa.sources import Picture, images_of
from meiqa.testing import FakeEngine

Output = pytest.CaptureFixture[str]
PHOTOS = 17


def jpeg(number: int) -> bytes:
    noise = np.random.default_rng(number).integers(0, 255, (6, 8, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize((64 + number, 48)).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Photos, one of them broken."""
    photos = tmp_path / "photos"
    (photos / "inner").mkdir(parents=True)
    for number in range(PHOTOS):
        (photos / ("inner" if number % 2 else ".") / f"{number:02}.jpg").write_bytes(jpeg(number))
    (photos / "broken.jpg").write_bytes(b"no photo")
    return photos


@pytest.fixture
def bulk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run the command without Ray, and with an engine without a model; give its exit code."""
    engine = FakeEngine()
    terms = model_terms(engine.model.digest, engine.model.calibration)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(batches, "_opened", lambda options: engine)
    monkeypatch.setattr(options, "terms_unopened", lambda options: terms)

    def run(source: object, out: str = "out", *more: str) -> int:
        return cli.main(["bulk", str(source), "--out", out, "--address", "none", *more])

    return run


def rows_in(out: str | Path) -> list[dict[str, Any]]:
    """Rows as other programs read them: hidden and underscored names are none of theirs."""
    rows: list[dict[str, Any]] = pq.read_table(out).to_pylist()
    assert len({row["id"] for row in rows}) == len(rows)
    return rows


def test_a_folder_has_a_row_for_each_photo_with_the_score_of_meiqa_score(
    folder: Path, tiny_files: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    monkeypatch.chdir(folder.parent)
    model = ["--package", str(tiny_files / "fp32"), "--memory", str(tiny_files / "anchors")]
    run = ["bulk", str(folder), "--out", "out", "--address", "none", "--k", "2", *model]
    assert cli.main([*run, "--embedding"]) == 1
    assert f"{PHOTOS} scored; 1 failed (DecodeError 1)" in capsys.readouterr().out
    rows = {Path(row["path"]).name: row for row in rows_in("out")}
    assert "not an image" in rows.pop("broken.jpg")["error"]
    alone = ["--format", "jsonl", "--no-learn", "--k", "2", *model]
    assert cli.main(["score", str(folder), *alone]) == 1
    each = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    scores = {Path(one["path"]).name: one["score"] for one in each if "score" in one}
    assert {name: row["score"] for name, row in rows.items()} == pytest.approx(scores, abs=1e-3)
    (first, *_) = rows.values()
    assert first["error"] is None
    assert json.loads(first["options"])["k"] == 2
    assert len(first["embedding"]) > 8
    assert first["word"] in {"bad", "poor", "fair", "good", "excellent"}


def test_a_run_is_gone_on_with_and_takes_in_what_is_new(
    bulk: Any, folder: Path, capsys: Output
) -> None:
    assert bulk(folder) == 1
    before = {row["id"]: row for row in rows_in("out")}
    (folder / "new.jpg").write_bytes(jpeg(30))
    (folder / "00.jpg").unlink()
    assert bulk(f"{folder}/", "out", "--resume") == 1  # as a shell completes it
    assert "out: new photos: 1" in capsys.readouterr().err
    after = {row["id"]: row for row in rows_in("out")}
    assert before.items() <= after.items()
    assert [Path(row["path"]).name for id, row in after.items() if id not in before] == ["new.jpg"]


def test_a_run_that_could_not_be_planned_leaves_its_directory_free(
    bulk: Any, folder: Path, capsys: Output
) -> None:
    assert bulk(folder.parent / "missing.txt") == 2
    assert "missing.txt: no such file" in capsys.readouterr().err
    assert bulk(folder) == 1
    assert rows_in("out")


def test_a_photo_that_vanishes_is_an_error_row(bulk: Any, folder: Path) -> None:
    names = folder.parent / "names.txt"
    names.write_text("".join(f"{path}\n" for path in folder.rglob("*.jpg")) + "gone.jpg\n")
    assert bulk(names) == 1
    errors = [row["error"] for row in rows_in("out") if row["error"]]
    assert len(errors) == 2
    assert any("gone.jpg: no such file" in error for error in errors)


def test_a_killed_part_is_written_again(bulk: Any, folder: Path) -> None:
    assert bulk(folder) == 1
    whole = sorted(map(str, rows_in("out")))
    # What a kill leaves: rows without their report, a file that was being written.
    Path("out/_meiqa/done-00000.json").unlink()
    Path("out/.meiqa-part-00000-123.tmp").write_bytes(b"PAR1")
    Path("out/_meiqa/.meiqa-done-00000-123.tmp").write_bytes(b"{")
    assert bulk(folder, "out", "--resume") == 1
    assert not [name for name in os.listdir("out/_meiqa") if name.endswith(".tmp")]
    assert sorted(map(str, rows_in("out"))) == whole
    assert sorted(os.listdir("out")) == ["_meiqa", "part-00000.parquet", "part-00001.parquet"]


def test_a_photo_that_its_workers_die_of_is_an_error_row(
    bulk: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score_many, deadly = FakeEngine.score_many, str(folder / "04.jpg")

    def dying(engine: FakeEngine, images: Iterable[Any], **options: Any) -> Iterator[Any]:
        def watched() -> Iterator[Any]:
            for image in images:
                if image == deadly:
                    raise KeyboardInterrupt  # nothing is tidied up behind it
                yield image

        yield from score_many(engine, watched(), **options)

    monkeypatch.setattr(FakeEngine, "score_many", dying)
    assert [bulk(folder, "out", "--resume") for _ in range(4)] == [130] * 4
    assert bulk(folder, "out", "--resume") == 1
    rows = rows_in("out")
    assert len(rows) == PHOTOS + 1
    (row,) = (each for each in rows if each["path"] == deadly)
    assert "the processes that judged it died" in row["error"]
    assert sum(each["error"] is not None for each in rows) == 2


def table(path: Path, columns: dict[str, Any], rows_a_group: int = 3) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=rows_a_group)
    return path


def a_glob(folder: Path) -> tuple[object, list[str]]:
    return folder / "**" / "*.jpg", ["--hidden"]


def a_list(folder: Path) -> tuple[object, list[str]]:
    names = folder.parent / "photos.txt"
    names.write_text("".join(f"{path}\n" for path in [*folder.rglob("*.jpg")] * 2))
    return names, []


def uris(folder: Path) -> tuple[object, list[str]]:
    names = folder.parent / "uris.txt"
    names.write_text("".join(f"{path.as_uri()}\n" for path in folder.rglob("*.jpg")))
    return names, []


def a_tar(folder: Path) -> tuple[object, list[str]]:
    with tarfile.open(folder.parent / "shard.tar", "w") as tar:
        for path in folder.rglob("*.jpg"):
            tar.add(path, path.name)
            tar.addfile(tarfile.TarInfo(f"{path.stem}.json"))
    return folder.parent / "shard.tar", []


def a_table_of_bytes(folder: Path) -> tuple[object, list[str]]:
    photos = sorted(folder.rglob("*.jpg"))
    columns = {"key": [path.name for path in photos], "jpg": [p.read_bytes() for p in photos]}
    return table(folder.parent / "bytes.parquet", columns), ["--id", "key"]


def a_table_of_structs(folder: Path) -> tuple[object, list[str]]:
    cells = [{"bytes": path.read_bytes(), "path": None} for path in sorted(folder.rglob("*.jpg"))]
    return table(folder.parent / "structs.parquet", {"image": cells}), []


def a_table_of_paths(folder: Path) -> tuple[object, list[str]]:
    paths = [str(path) for path in folder.rglob("*.jpg")]
    return table(folder.parent / "paths.parquet", {"file": paths}), ["--column", "file"]


def by_content(folder: Path) -> tuple[object, list[str]]:
    shutil.copy(folder / "00.jpg", folder / "copy.jpg")
    return folder, ["--by-content"]


@pytest.mark.parametrize(
    "given",
    [
        *(a_glob, a_list, uris, a_tar),
        *(a_table_of_bytes, a_table_of_structs, a_table_of_paths, by_content),
    ],
)
def test_photos_come_from(given: Any, bulk: Any, folder: Path) -> None:
    assert bulk(folder, "plain") == 1
    source, options = given(folder)
    assert bulk(source, "out", *options) == 1
    rows, plain = rows_in("out"), rows_in("plain")
    assert len(rows) == PHOTOS + 1
    assert sorted(row["score"] or 0 for row in rows) == sorted(row["score"] or 0 for row in plain)
    if given is a_table_of_bytes:
        assert "07.jpg" in {row["id"] for row in rows}
    assert bulk(source, "out", "--resume", *options) == 1
    assert rows_in("out") == rows


def test_shards_are_whole_together_and_samples_stay(bulk: Any, folder: Path) -> None:
    for number in (1, 2, 3):
        bulk(folder, f"shard{number}", "--shard", f"{number}/3")
    parts = [{row["id"] for row in rows_in(f"shard{number}")} for number in (1, 2, 3)]
    assert len(set.union(*parts)) == sum(map(len, parts)) == PHOTOS + 1
    bulk(folder, "sample", "--sample", "6")
    sample = rows_in("sample")
    (folder / "zz.jpg").write_bytes(jpeg(31))
    bulk(folder, "sample", "--sample", "6", "--resume")
    assert rows_in("sample") == sample
    assert len(sample) == 6


def test_a_sample_of_a_table_has_the_scores_of_its_photos(bulk: Any, folder: Path) -> None:
    source, options = a_table_of_bytes(folder)
    bulk(source, "all", *options)
    bulk(source, "sample", "--sample", "9", *options)
    scores = {row["id"]: row["score"] for row in rows_in("all")}
    sample = {row["id"]: row["score"] for row in rows_in("sample")}
    assert len(sample) == 9
    assert sample.items() <= scores.items()
    with pytest.raises(UsageError, match="planned in another order"):
        [*images_of([Picture(str(place), "x", "t.parquet", place, column="c") for place in (2, 1)])]


def test_broken_sources_are_error_rows(
    bulk: Any, folder: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "no.parquet").write_bytes(b"no table")
    (folder / "no.tar").write_bytes(b"no tar" * 200)
    assert bulk(folder / "*.*") == 1
    told = capsys.readouterr().err
    assert f"warning: {folder / 'no.tar'} cannot be read" in told
    broken = {Path(row["path"]).name for row in rows_in("out") if row["error"]}
    assert broken == {"broken.jpg", "no.parquet", "no.tar"}
    lines = b"caf\xe9.jpg\nhttp://example.org/a.jpg\n" + os.fsencode(folder / "00.jpg")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines), "utf-8"))
    assert bulk("-", "piped") == 1
    assert [bool(row["error"]) for row in rows_in("piped")] == [True, True, False]


def test_a_table_that_vanishes_or_shrinks_is_error_rows(
    bulk: Any, folder: Path, capsys: Output
) -> None:
    source, options = a_table_of_bytes(folder)
    bulk(source, "out", *options)
    done = Path("out/_meiqa/done-00000.json")
    whole = pq.read_table(source)
    for left, reason in ((0, "no such file"), (5, "has fewer rows")):
        done.unlink()
        if left:
            pq.write_table(whole.slice(0, left), source)
        else:
            Path(str(source)).unlink()
        assert bulk(source, "out", "--resume", *options) == 1
        assert ("new photos were not looked for" in capsys.readouterr().err) == (not left)
        errors = [row["error"] for row in rows_in("out") if row["error"]]
        assert sum(reason in error for error in errors) == 16 - left


def test_photos_whose_storage_was_away_are_looked_at_again(
    bulk: Any, folder: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(uri: str) -> Any:
        raise UsageError(f"{uri} cannot be opened") from OSError("slow down")

    names = folder.parent / "names.txt"
    names.write_text("s3://bucket/00.jpg\ns3://bucket/00.jpg\n")
    monkeypatch.setattr(sources, "_file_system", away)
    assert bulk(names, "out", "--filter", "score > 5") == 1
    told = capsys.readouterr()
    assert "1 failed (PhotoUnreachable 1)" in told.out
    assert told.err.count("named twice") == 1
    assert bulk(names, "other", "--by-content") == 2
    monkeypatch.setattr(sources, "_file_system", lambda uri: (fs.LocalFileSystem(), str(folder)))
    assert bulk(names, "out", "--filter", "score > 5", "--resume") == 0
    assert "1 scored; 0 of them written" in capsys.readouterr().out
    assert not [*Path("out").glob("part-*")]


def test_what_means_nothing_is_refused(bulk: Any, folder: Path, capsys: Output) -> None:
    def refused(*arguments: Any) -> str:
        assert bulk(*arguments) == 2
        return capsys.readouterr().err

    tar, table = a_tar(folder)[0], a_table_of_bytes(folder)[0]
    assert "--by-content is for files of their own" in refused(tar, "a", "--by-content")
    assert "--by-content is for files of their own" in refused(table, "b", "--by-content")
    assert "without --memory" in refused(folder, "c", "--hub", "postgresql://hub/photos")
    assert "beside --address none" in refused(folder, "c", "--workers", "1", "2")
    assert "--workers is no range" in refused(
        folder, "d", "--address", "local", "--workers", "4", "2"
    )


def test_workers_with_another_calibration_are_refused(
    bulk: Any, folder: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    terms = {**options.terms_unopened(options.Options()), "calibration": "cd" * 32}
    monkeypatch.setattr(options, "terms_unopened", lambda _: terms)
    assert bulk(folder) == 2
    assert "the calibration is another one on" in capsys.readouterr().err


def test_a_filter_leaves_rows_out_and_counts_them(bulk: Any, folder: Path, capsys: Output) -> None:
    bulk(folder, "all", "--format", "jsonl")
    lines = [line for file in Path("all").glob("*.jsonl") for line in file.read_text().splitlines()]
    scores = sorted(json.loads(line)["score"] or 0 for line in lines)
    bound = scores[-8]
    capsys.readouterr()
    bulk(folder, "best", "--filter", f"score >= {bound} and std > 0")
    assert (
        f"{PHOTOS} scored; {sum(s >= bound for s in scores)} of them written"
        in capsys.readouterr().out
    )
    rows = rows_in("best")
    assert sorted(row["score"] for row in rows if row["score"]) == [s for s in scores if s >= bound]
    assert sum(row["error"] is not None for row in rows) == 1


@pytest.mark.parametrize("text", ["", "score", "score > x", "path > 1", "score > 1 or std < 2"])
def test_another_condition_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="the condition can't be read"):
        Condition(text)


def test_what_is_there_is_kept(bulk: Any, folder: Path, capsys: Output) -> None:
    def refused(*arguments: Any) -> str:
        assert bulk(*arguments) == 2
        return capsys.readouterr().err

    bulk(folder)
    rows = rows_in("out")
    assert "out exists; go on with it: --resume" in refused(folder)
    assert "written with another limit" in refused(folder, "out", "--resume", "--limit", "3")
    with open("out/_meiqa/lock", "rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "written by another run" in refused(folder, "out", "--resume")
    assert rows_in("out") == rows
    Path("other").mkdir()
    Path("other/letter.txt").write_text("Dear")
    assert "holds something else" in refused(folder, "other", "--force")
    assert os.listdir("other") == ["letter.txt"]
    Path("out/part-2.txt").write_text("mine")
    bulk(folder, "out", "--force", "--limit", "3")
    assert Path("out/part-2.txt").read_text() == "mine"
    Path("out/part-2.txt").unlink()
    assert len(rows_in("out")) == 3
    assert "no such file, folder or glob" in refused("nowhere", "new")
    assert "has no column nothing" in refused(
        a_table_of_paths(folder)[0], "x", "--column", "nothing"
    )


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk is mounted by root only")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_told_and_gone_on_from(
    bulk: Any, folder: Path, small_disk: Path, capsys: Output
) -> None:
    out, ballast = small_disk / "out", small_disk / "ballast"
    ballast.write_bytes(b"0" * (256 - 28 << 10))
    assert bulk(folder, str(out)) == 2
    assert "No space left on device" in capsys.readouterr().err
    written = rows_in(out)
    ballast.unlink()
    assert bulk(folder, str(out), "--resume") == 1
    rows = rows_in(out)
    assert len(rows) == PHOTOS + 1
    assert all(row in rows for row in written)


def test_a_scorer_is_a_plain_callable_that_can_be_pickled(tiny_files: Path) -> None:
    package, memory = str(tiny_files / "fp32"), str(tiny_files / "anchors")
    score = pickle.loads(pickle.dumps(scorer("photo", package=package, memory=memory, k=0)))
    found = score({"photo": [jpeg(1), b"nothing", None], "name": ["a", "b", "c"]})
    assert found["name"] == ["a", "b", "c"]
    assert [error is None for error in found["error"]] == [True, False, False]
    assert 1 <= found["score"][0] <= 5
    with pytest.raises(UsageError, match="the batch has no column photo"):
        score({"picture": []})
    with pytest.raises(UsageError, match="the batch has a column score"):
        score({"photo": [], "score": []})
