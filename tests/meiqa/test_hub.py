"""`meiqa hub …`, `meiqa memory sync`, and engines that follow a hub while they score."""

from __future__ import annotations

import json
import shutil
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import psycopg
import pytest
from PIL import Image

from meiqa import cli
from meiqa.cli import options as cli_options
from meiqa.engine.engine import Engine
from meiqa.engine.package import EnginePackage
from meiqa.memory import MemoryBank, RetrievalPolicy
from meiqa.memory.replica import Replica
from tests.engine.samples import picture

Output = pytest.CaptureFixture[str]
PATIENCE_S = 60.0


@pytest.fixture
def memory(anchors: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(anchors, tmp_path / "memory"))


def learned(memory: Path, package: EnginePackage, seed: int) -> str:
    """Let a memory learn a picture; give the case's id."""
    with Engine.open(package, memory, learn="all") as engine:
        found = engine.score(picture(seed, (96, 96)))
        (record,) = engine.memory.cases("contrast")
        assert not any(note.startswith("not remembered") for note in found.degraded)
    return record.id


def test_a_bulk_run_learns_from_a_hub_before_it_scores(
    hub: str, memory: Path, package: EnginePackage, tmp_path: Path, capsys: Output
) -> None:
    other, photo = shutil.copytree(memory, tmp_path / "other"), tmp_path / "photo.png"
    learned(memory, package, 1)
    assert cli.main(["hub", "init", hub]) == 0
    assert cli.main(["memory", "sync", str(memory), "--hub", hub]) == 0
    Image.fromarray(picture(2, (96, 96))).save(photo)
    model = ["--package", str(package.path), "--memory", str(other)]
    run = ["bulk", str(photo), "--out", str(tmp_path / "out"), "--address", "none", *model]
    assert cli.main([*run, "--hub", hub]) == 0
    assert "0 pushed, 1 pulled, 0 removed" in capsys.readouterr().err


def test_two_memories_learn_from_each_other_on_the_command_line(
    hub: str, memory: Path, package: EnginePackage, tmp_path: Path, capsys: Output
) -> None:
    other = shutil.copytree(memory, tmp_path / "other")
    case_id = learned(memory, package, 1)
    assert cli.main(["hub", "init", hub]) == 0
    for path, name in ((memory, "attic"), (other, "barn")):
        command = ["memory", "sync", str(path), "--hub", hub, "--hub-device", name]
        assert cli.main(command) == 0
    said = capsys.readouterr().err
    assert "25 pushed, 0 pulled, 0 removed" in said
    assert "0 pushed, 1 pulled, 0 removed" in said  # of the anchors it has copies
    assert cli.main(["memory", "list", str(other), "--format", "jsonl"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    (case,) = [row for row in rows if row["origin"] == "contrast"]
    assert (case["id"], case["device"], case["provenance"]) == (case_id, "attic", "learned")

    assert cli.main(["memory", "list", str(other), "--origin", "contrast"]) == 0
    assert capsys.readouterr().out.rstrip().endswith(f"{case_id}  (by attic)")

    assert cli.main(["hub", "status", hub, "--format", "json"]) == 0
    status = json.loads(capsys.readouterr().out)
    counts = {row["origin"]: (row["cases"], row["device"]) for row in status["of"]}
    assert counts == {"anchor": (24, "attic"), "contrast": (1, "attic")}

    out = tmp_path / "hub.jsonl"
    assert cli.main(["hub", "export", hub, "--out", str(out)]) == 0
    exported = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(exported) == 25
    assert {row["key_kind"] for row in exported} == {"summary"}


def test_what_is_wrong_is_said_in_one_line(memory: Path, capsys: Output) -> None:
    nowhere = "postgresql://camera@127.0.0.1:1/photos"
    assert cli.main(["memory", "sync", str(memory), "--hub", nowhere]) == 2
    assert "127.0.0.1:1/photos can't be used" in capsys.readouterr().err
    told = "postgresql://camera:secret@127.0.0.1/photos"
    for command in (["memory", "sync", str(memory)], ["serve"], ["camera", "--video", "v"]):
        assert cli.main([*command, "--hub", told]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert "secret" not in said
    assert cli.main(["serve", "--sync-every", "3"]) == 2
    assert "means nothing without --hub" in capsys.readouterr().err


def test_pictures_of_a_remote_model_are_not_shared(hub: str, memory: Path, capsys: Output) -> None:
    (memory / "remote.json").write_text("{}")
    assert cli.main(["memory", "sync", str(memory), "--hub", hub]) == 2
    assert "pictures, which are not shared" in capsys.readouterr().err


def test_an_engine_learns_from_others_while_it_scores(
    hub: str, memory: Path, package: EnginePackage, tmp_path: Path
) -> None:
    """Its neighbours name the device, and its counters the moment of the hub."""
    other = Path(shutil.copytree(memory, tmp_path / "other"))
    named = SimpleNamespace(hub=hub, hub_device="barn", sync_every=0.05)
    photo = picture(2, (96, 96))
    everything = RetrievalPolicy(k=100, exclude_above=1.0)
    with (
        Engine.open(package, other, retrieval=everything) as engine,
        cli_options.syncing(engine, named),  # type: ignore[arg-type]
    ):
        before = engine.score(photo, learn=False)
        case_id = learned(memory, package, 1)
        with MemoryBank.open(memory, "rw", package_digest=package.digest) as bank:
            Replica(bank, hub, "attic").sync()
        end = time.monotonic() + PATIENCE_S
        while not engine.memory.snapshot().count_contrast:
            assert time.monotonic() < end
            time.sleep(0.01)
        after = engine.score(photo, learn=False)
        again = engine.score(photo, learn=False)
    assert {one.device for one in before.neighbours} == {None}
    assert [one.device for one in after.neighbours if one.id == case_id] == ["attic"]
    assert after.counters["hub_sequence"] > before.counters.get("hub_sequence", -1)
    assert again.score == pytest.approx(after.score, abs=1e-3)


def test_an_engine_goes_on_without_its_hub(
    hub: str, memory: Path, package: EnginePackage, caplog: pytest.LogCaptureFixture
) -> None:
    """It says once that it can't sync, and syncs when it can."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    away = psycopg.conninfo.make_conninfo(hub, host="127.0.0.1", port=str(port))
    named = SimpleNamespace(hub=away, hub_device="barn", sync_every=0.01)
    with (
        Engine.open(package, memory) as engine,
        cli_options.syncing(engine, named),  # type: ignore[arg-type]
    ):
        assert engine.score(picture(3, (96, 96))).score >= 1.0
        end = time.monotonic() + PATIENCE_S
        while not caplog.messages:
            assert time.monotonic() < end
            time.sleep(0.01)
        time.sleep(0.2)
    assert sum("not synced" in message for message in caplog.messages) == 1
