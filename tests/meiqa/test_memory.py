"""`meiqa memory …` over a tiny random model."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from meiqa import cli
from meiqa.engine import anchoring
from meiqa.engine.anchoring import AnchorOptions, build_anchors
from meiqa.engine.local import LocalModel
from meiqa.engine.package import EnginePackage
from meiqa.labels import LabelTable
from meiqa.locations import embedded_assets
from meiqa.memory import MemoryBank, RetrievalPolicy, package_digest_of
from tests.engine.samples import picture

Output = pytest.CaptureFixture[str]
PHOTOGRAPHS = 7


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for seed in range(PHOTOGRAPHS):
        Image.fromarray(picture(seed, (128, 192))).save(folder / f"{seed}.png")
    return folder


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    table = tmp_path / "labels.csv"
    rows = [f"{seed}.png,{1 + seed * 0.5}" for seed in range(PHOTOGRAPHS)]
    table.write_text("\n".join(["image,mos", *rows]) + "\n")
    return table


@pytest.fixture
def built(package: EnginePackage, images: Path, labels: Path, tmp_path: Path) -> Path:
    """Give a memory of all photographs."""
    out = tmp_path / "memory"
    command = ["memory", "build", str(labels), "--images", str(images), "--out", str(out)]
    assert cli.main([*command, "--package", str(package.path), "--mos-range", "1", "5"]) == 0
    return out


def ran(capsys: Output, *command: str | Path) -> str:
    """What a command of `meiqa memory` prints."""
    capsys.readouterr()
    assert cli.main(["memory", *map(str, command)]) == 0
    out, said = capsys.readouterr()
    return out or said


def test_a_built_memory_holds_the_scores(built: Path, package: EnginePackage) -> None:
    with MemoryBank.open(built, package_digest=package.digest) as bank:
        records = list(bank.cases())
    assert [(record.id, record.score) for record in records] == [
        (f"{seed}.png", 1 + seed * 0.5) for seed in range(PHOTOGRAPHS)
    ]
    assert {record.provenance for record in records} == {"label table labels.csv"}
    assert {record.package_digest for record in records} == {package.digest}


def test_what_a_build_will_take_on_the_disk_is_told(
    package: EnginePackage, images: Path, labels: Path, tmp_path: Path, capsys: Output
) -> None:
    command = ["build", labels, "--images", images, "--out", tmp_path / "memory"]
    said = ran(capsys, *command, "--package", package.path, "--mos-range", "1", "5")
    told = re.search(rf"{PHOTOGRAPHS} photographs: about (\S+) MB on the disk", said)
    assert told is not None
    segments = sum(file.stat().st_size for file in tmp_path.rglob("*.seg"))
    assert 0 < segments <= 1e6 * float(told[1]) + 10 * 4096  # each array begins a page


def test_a_memory_is_created_and_learned_into(tmp_path: Path, capsys: Output) -> None:
    made, photo = tmp_path / "made", tmp_path / "photo.png"
    Image.fromarray(picture(3, (128, 192))).save(photo)
    score = ["score", str(photo), "--memory", str(made)]
    assert cli.main(score) == 2
    assert "meiqa memory create" in capsys.readouterr().err
    assert str(made) in ran(capsys, "create", made)
    assert cli.main([*score, "--admission", "all"]) == 0
    listed = ran(capsys, "list", made, "--origin", "contrast").splitlines()
    assert len(listed) == 1
    assert cli.main(["memory", "create", str(made)]) == 2
    assert "already exists" in capsys.readouterr().err


def test_the_empty_memory_of_another_package_answers_questions(
    package: EnginePackage, images: Path, tmp_path: Path, capsys: Output
) -> None:
    made, of = tmp_path / "made", ["--package", str(package.path)]
    asked = ["ask", str(images / "0.png"), "Is it dark?", "--options", "a,b", *of]
    assert cli.main(asked) == 2
    assert "meiqa memory create MEMORY --package P" in capsys.readouterr().err
    assert cli.main(["memory", "create", str(made), *of]) == 0
    assert "made: no anchors" in capsys.readouterr().err
    assert cli.main([*asked, "--memory", str(made)]) == 0
    assert "Is it dark?" in capsys.readouterr().out


def test_photographs_that_cannot_be_judged_are_left_out(
    package: EnginePackage, images: Path, labels: Path, tmp_path: Path, capsys: Output
) -> None:
    (images / "3.png").write_bytes(b"no image")
    out = tmp_path / "memory"
    command = ["memory", "build", str(labels), "--images", str(images), "--out", str(out)]
    assert cli.main([*command, "--package", str(package.path)]) == 1
    said = capsys.readouterr().err
    assert "3.png" in said
    assert f"{PHOTOGRAPHS - 1} anchors" in said


def test_an_interrupted_build_goes_on_and_ends_the_same(
    built: Path,
    package: EnginePackage,
    images: Path,
    labels: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vlm = LocalModel.open(package, "cpu", 1)
    out, seen = tmp_path / "again", []
    make = anchoring.anchor_case

    def interrupted(*arguments: Any, **options: Any) -> Any:
        if len(seen) in (2, 5):
            seen.append("")
            raise KeyboardInterrupt
        seen.append(arguments[2])
        return make(*arguments, **options)

    monkeypatch.setattr(anchoring, "anchor_case", interrupted)
    kept = AnchorOptions(provenance="label table labels.csv")
    table = LabelTable.read(labels, mos_range=(1, 5))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            build_anchors(vlm, table, images, out, kept)
        assert not out.exists()
    build_anchors(vlm, table, images, out, kept)
    assert sorted(filter(None, seen)) == [f"{seed}.png" for seed in range(PHOTOGRAPHS)]

    def content(path: Path) -> list[Any]:
        with MemoryBank.open(path, package_digest=package.digest, verify=True) as bank:
            key = np.ones(package.manifest.decoder.hidden_size, np.float32)
            found = bank.snapshot().retrieve(key, RetrievalPolicy(k=PHOTOGRAPHS), None)
        return [(c.id, c.score, c.summary, c.key.tobytes(), c.tokens.tobytes()) for c in found]

    assert content(out) == content(built)


@pytest.fixture
def extended(
    built: Path, package: EnginePackage, images: Path, capsys: Output
) -> Callable[..., str]:
    """Give a run of a command on a memory to which one anchor was added by hand."""
    Image.fromarray(picture(99, (128, 192))).save(images / "99.png")
    options = ["--score", "4.5", "--package", str(package.path), "--provenance", "me"]
    assert cli.main(["memory", "add", str(built), str(images / "99.png"), *options]) == 0
    return lambda action, *rest: ran(capsys, action, built, *rest)


def test_what_was_added_is_listed_compacted_and_removed(
    extended: Callable[..., str], images: Path
) -> None:
    added = str(images / "99.png")
    listed = [json.loads(line) for line in extended("list", "--format", "jsonl").splitlines()]
    assert len(listed) == PHOTOGRAPHS + 1
    (mine,) = [record for record in listed if record["provenance"] == "me"]
    assert (mine["id"], mine["score"], mine["origin"]) == (added, 4.5, "anchor")

    assert json.loads(extended("stats", "--format", "json"))["origins"]["anchor"]["recent"] == 1
    assert "compacted" in extended("compact")
    assert "nothing to merge" in extended("compact")
    assert json.loads(extended("stats", "--format", "json"))["origins"]["anchor"]["recent"] == 0
    assert "0 findings" in extended("verify")

    assert "1 case removed" in extended("remove", added)
    assert added not in extended("list")
    assert "0 contrast cases evicted" in extended("evict", "--keep", "3")


def test_records_are_exported(built: Path, extended: Callable[..., str], tmp_path: Path) -> None:
    out = tmp_path / "cases.jsonl"
    assert f"{PHOTOGRAPHS + 1} cases" in extended("export", "--out", out)
    assert len(out.read_text().splitlines()) == PHOTOGRAPHS + 1
    whole = out.read_bytes()
    assert cli.main(["memory", "export", str(built), "--out", str(out)]) == 2
    assert cli.main(["memory", "export", str(built), "--out", "/dev/full", "--force"]) == 2
    assert f"{PHOTOGRAPHS + 1} cases" in extended("export", "--out", out, "--force")
    assert out.read_bytes() == whole
    assert extended("export", "--out", "-").startswith('{"id": ')


def test_no_image_is_kept_unless_asked_for(
    built: Path, extended: Callable[..., str], tmp_path: Path
) -> None:
    """No file of a memory holds the beginning of a JPEG, a PNG or of the pixels themselves."""
    assert "thumbnail" not in extended("list")
    extended("export", "--out", tmp_path / "cases.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "cases.jsonl").read_text().splitlines()]
    assert {row["thumbnail"] for row in rows} == {None}
    content = b"".join(file.read_bytes() for file in built.iterdir() if file.is_file())
    pixels = [picture(seed, (128, 192))[0].tobytes()[:64] for seed in (*range(PHOTOGRAPHS), 99)]
    for trace in (b"\xff\xd8\xff\xe0", b"\x89PNG", b"JFIF", *pixels):
        assert trace not in content


def test_thumbnails_are_kept_if_asked_for(
    package: EnginePackage, images: Path, labels: Path, tmp_path: Path, capsys: Output
) -> None:
    out, package_of = tmp_path / "memory", ("--package", str(package.path), "--keep-thumbnails")
    Image.fromarray(picture(5, (256, 512))).save(images / "5.png")
    assert ran(capsys, "build", labels, "--images", images, "--out", out, *package_of)
    Image.fromarray(picture(99, (128, 192))).save(images / "99.png")
    assert ran(capsys, "add", out, images / "99.png", "--score", "4", *package_of)
    listed = ran(capsys, "list", out, "--format", "jsonl").splitlines()
    sizes = {row["id"]: row["thumbnail_bytes"] for row in map(json.loads, listed)}
    assert "(thumbnail, " in ran(capsys, "list", out)
    ran(capsys, "export", out, "--out", tmp_path / "cases.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "cases.jsonl").read_text().splitlines()]
    assert len(rows) == PHOTOGRAPHS + 1
    for row in rows:
        thumbnail = base64.b64decode(row["thumbnail"])
        assert len(thumbnail) == sizes[row["id"]] > 0
        with Image.open(io.BytesIO(thumbnail)) as opened:
            assert opened.format == "JPEG"
            assert opened.size == ((160, 80) if row["id"] == "5.png" else (160, 107))


@pytest.mark.parametrize("kind", ["image", "both"])
def test_a_memory_is_built_or_rekeyed_with_keys_of_a_kind(
    built: Path,
    package: EnginePackage,
    images: Path,
    labels: Path,
    tmp_path: Path,
    capsys: Output,
    kind: str,
) -> None:
    assert "summary" in ran(capsys, "stats", built)
    ran(capsys, "rekey", built, "--key", kind, "--out", tmp_path / "rekeyed")
    command = ("build", labels, "--images", images, "--out", tmp_path / "b", "--key", kind)
    ran(capsys, *command, "--package", package.path, "--mos-range", "1", "5")
    keys = []
    for path in (tmp_path / "rekeyed", tmp_path / "b"):
        assert json.loads(ran(capsys, "stats", path, "--format", "json"))["key_kind"] == kind
        ran(capsys, "export", path, "--force", "--out", tmp_path / "cases.jsonl")
        rows = [json.loads(line) for line in (tmp_path / "cases.jsonl").read_text().splitlines()]
        keys.append(np.array([row["key"] for row in rows]))
    np.testing.assert_allclose(*keys, atol=0.01)


def test_damage_is_found(built: Path, capsys: Output) -> None:
    segment = built / "anchors.seg"
    content = bytearray(segment.read_bytes())
    content[-1] ^= 1
    segment.write_bytes(content)
    assert cli.main(["memory", "verify", str(built)]) == 1
    assert "anchors.seg" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("stats", "nowhere"), "there is no memory"),
        (("add", "{built}", "{built}/x.png", "--score", "7"), "from 1 up to 5"),
        (("remove", "{built}"), "say what is to be removed"),
        (("list", "{built}", "--since", "soon"), "is not a time"),
        (("add", "{built}", "x.png", "--score", "3"), "another package"),
        (("rekey", "{built}", "--key", "summary", "--out", "x"), "of this kind already"),
        (("rekey", "{built}", "--key", "image", "--out", "{built}"), "already exists"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused_in_one_line(
    command: tuple[str, ...], said: str, built: Path, capsys: Output
) -> None:
    capsys.readouterr()
    assert cli.main(["memory", *(part.format(built=built) for part in command)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_an_anchor_is_added_beside_the_embedded_ones(images: Path, tmp_path: Path) -> None:
    path = tmp_path / "created"
    assert cli.main(["memory", "create", str(path)]) == 0
    assert cli.main(["memory", "add", str(path), str(images / "1.png"), "--score", "4.2"]) == 0
    anchors, digest = embedded_assets() / "memory", package_digest_of(embedded_assets() / "memory")
    with MemoryBank(anchors, path, package_digest=digest) as bank:
        assert [each.record.score for each in bank.snapshot().anchors.recent] == [4.2]
