"""What was begun can be finished or undone, wherever it was killed; nothing is ever lost."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from meiqa import journal as journals
from meiqa.errors import OutputUnwritable, UsageError
from meiqa.journal import Action, Copy, Journal, Link, Make, Move, Write

Tree = dict[str, tuple[str, bytes]]
NAMES = ["a.jpg", "new\nline.jpg", "not utf-8 \udcff.jpg", "grün.jpg"]
MOST_OPERATIONS = 400


def tree(folder: Path) -> Tree:
    """What lies below a folder, journals left out."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = ("link", os.fsencode(os.readlink(path)))
        elif path.is_dir():
            found[name] = ("folder", b"")
        elif not path.name.startswith(".meiqa-journal-"):
            found[name] = ("file", path.read_bytes())
    return found


def prepared(folder: Path) -> list[Action]:
    """Make a folder with files, and give actions of every kind on them."""
    (folder / "in").mkdir(parents=True)
    actions: list[Action] = []
    for number, name in enumerate(NAMES):
        (folder / "in" / name).write_bytes(bytes([number]) * 3000)
    (folder / "in" / "old.xmp").write_bytes(b"old \xff")
    (folder / "in" / "b.xmp").write_bytes(b"b")
    (folder / "in" / "empty.wav").touch()
    (folder / "in" / "reject.jpg").write_bytes(b"reject")
    os.utime(folder / "in" / "empty.wav", (1e9, 1e9))
    source, out = str(folder / "in"), str(folder / "out")
    actions += [Make(out), Make(f"{out}/deep")]
    actions += [Move(f"{source}/old.xmp", f"{out}/old.xmp")]
    actions += [Write(f"{out}/old.xmp", "old \udcff", "new", moved=True)]
    actions += [Write(f"{source}/a.xmp", None, "a"), Write(f"{source}/b.xmp", "b", "better")]
    actions += [Copy(f"{source}/{name}", f"{out}/deep/{name}") for name in NAMES[:2]]
    actions += [Link(f"{source}/{name}", f"{out}/{name}") for name in NAMES[2:]]
    for name in ("reject.jpg", "empty.wav"):
        status = os.stat(f"{source}/{name}")
        actions.append(
            Move(f"{source}/{name}", f"{out}/{name}", status.st_size, status.st_mtime_ns)
        )
    return actions


def begun(folder: Path, actions: Sequence[Action]) -> Journal:
    return Journal.begin(journals.new_journal(folder), actions)


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let in/ and out/ lie on different disks."""
    replace = os.replace

    def other_disk(start: Any, end: Any) -> None:
        if Path(start).parent.name != Path(end).parent.name:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        replace(start, end)

    monkeypatch.setattr(os, "replace", other_disk)


def test_all_is_done_and_undone(tmp_path: Path) -> None:
    actions = prepared(tmp_path)
    before = tree(tmp_path)
    journal = begun(tmp_path, actions)
    assert tree(tmp_path) == before
    assert journal.do() == []
    done = tree(tmp_path)
    assert done["out/reject.jpg"] == ("file", b"reject")
    assert done["out/old.xmp"] == ("file", b"new")
    assert "in/reject.jpg" not in done
    assert Journal(journal.path).state == "done"
    assert Journal(journal.path).do() == []
    assert tree(tmp_path) == done
    assert Journal(journal.path).undo() == []
    assert tree(tmp_path) == before
    assert Journal(journal.path).state == "undone"
    assert Journal(journal.path).undo() == []


def killed_at(operation: int, run: Callable[[], object]) -> bool:
    """Run something in a process that is killed before its n-th call for a file; was it?"""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # other threads are not needed there
        child = os.fork()
    if not child:
        count = 0

        def watch(event: str, _: object) -> None:
            nonlocal count
            if event == "open" or event.startswith(("os.", "shutil.", "fcntl.")):
                count += 1
                if count == operation:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(watch)
            run()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def each_kill(folder: Path, run: Callable[[Path, list[Action]], object]) -> Any:
    """Give a fresh folder for each operation that a run may be killed at."""
    for operation in range(1, MOST_OPERATIONS):
        fresh = folder / str(operation)
        actions = prepared(fresh)
        before = tree(fresh)
        if not killed_at(operation, lambda: run(fresh, actions)):  # noqa: B023
            assert operation > 30
            return
        yield fresh, before
        shutil.rmtree(fresh)
    raise AssertionError("it never ends")


def nothing_is_lost(before: Tree, now: Tree) -> bool:
    held = {content for _, content in now.values()}
    return all(content in held for name, (_, content) in before.items() if ".xmp" not in name)


@pytest.mark.slow
@pytest.mark.parametrize("disks", [1, 2])
@pytest.mark.parametrize("then", ["do", "undo"])
def test_killed_at_every_step_it_can_be_finished_or_undone(
    disks: int, then: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if disks == 2:
        request.getfixturevalue("elsewhere")
    whole = tmp_path / "whole"
    begun(whole, prepared(whole)).do()
    done = tree(whole)

    def run(folder: Path, actions: list[Action]) -> None:
        begun(folder, actions).do()

    for folder, before in each_kill(tmp_path, run):
        assert nothing_is_lost(before, tree(folder))
        found = journals.journals_in(folder)
        for journal in found:
            assert getattr(journal, then)() == []
        left = {k: v for k, v in tree(folder).items() if not k.startswith(".meiqa")}
        links = {k: (kind, os.path.basename(c)) for k, (kind, c) in done.items() if kind == "link"}
        wanted = {**done, **links} if then == "do" and found else before
        seen = {k: (n, os.path.basename(c) if n == "link" else c) for k, (n, c) in left.items()}
        assert seen == wanted


@pytest.mark.slow
@pytest.mark.parametrize("disks", [1, 2])
def test_an_undoing_that_is_killed_at_any_step_can_be_gone_on_with(
    disks: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if disks == 2:
        request.getfixturevalue("elsewhere")

    def run(folder: Path, actions: list[Action]) -> None:
        journal = begun(folder, actions)
        journal.do()
        journal.undo()

    for folder, before in each_kill(tmp_path, run):
        assert nothing_is_lost(before, tree(folder))
        for journal in journals.journals_in(folder):
            assert journal.undo() == []
        assert {k: v for k, v in tree(folder).items() if not k.startswith(".meiqa")} == before


def test_a_full_disk_ends_it_and_tells_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    actions = prepared(tmp_path)
    before = tree(tmp_path)
    journal = begun(tmp_path, actions)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", full)
        with pytest.raises(OutputUnwritable, match=r"No space left.*make room, then.*--resume"):
            journal.do()
    assert Journal(journal.path).state == "planned"
    assert Journal(journal.path).do() == []
    assert Journal(journal.path).undo() == []
    assert tree(tmp_path) == before


def test_undoing_refuses_what_changed_and_goes_on(tmp_path: Path) -> None:
    journal = begun(tmp_path, prepared(tmp_path))
    journal.do()
    (tmp_path / "in/a.xmp").write_bytes(b"edited")
    (tmp_path / "out/deep/a.jpg").write_bytes(b"edited, too")
    (tmp_path / "in" / NAMES[1]).unlink()  # the copy is the only one now
    (tmp_path / "out/reject.jpg").write_bytes(b"painted over")
    (tmp_path / "out/empty.wav").unlink()
    refused = [str(error) for error in journal.undo()]
    assert len(refused) == 5
    gone = f"{tmp_path}/out/empty.wav is gone, and cannot be moved back to {tmp_path}/in/empty.wav"
    refused.remove(gone)
    assert all("is left as it is; got " in line and "\n" not in line for line in refused)
    left = tree(tmp_path)
    assert left["in/old.xmp"] == ("file", b"old \xff")
    assert left["in/a.xmp"][1] == b"edited"
    assert left["out/deep/a.jpg"][1] == b"edited, too"
    assert left[f"out/deep/{NAMES[1]}"][1] == b"\1" * 3000
    assert left["out/reject.jpg"][1] == b"painted over"
    assert Journal(journal.path).state == "done"


def test_what_came_to_lie_in_the_way_is_never_replaced(tmp_path: Path) -> None:
    journal = begun(tmp_path, prepared(tmp_path))
    (tmp_path / "out/deep").mkdir(parents=True)
    in_the_way = [f"out/deep/{NAMES[0]}", f"out/{NAMES[2]}", "out/reject.jpg", "in/a.xmp"]
    for name in in_the_way:
        (tmp_path / name).write_bytes(b"mine")
    (tmp_path / "in/old.xmp").write_bytes(b"mine, too")
    assert len(journal.do()) == 5
    for _ in range(2):
        now = tree(tmp_path)
        assert all(now[name] == ("file", b"mine") for name in in_the_way)
        assert now["in/reject.jpg"] == ("file", b"reject")
        journal.undo()


def test_another_process_is_waited_for(tmp_path: Path) -> None:
    journal = begun(tmp_path, prepared(tmp_path))
    with journal._locked(), pytest.raises(UsageError, match="another process is at"):
        Journal(journal.path).do()


@pytest.mark.parametrize("text", [b"", b"{}", b"\xff", b'{"meiqa_journal": 1, "actions": 1}\n'])
def test_another_file_is_no_journal(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(text)
    with pytest.raises(UsageError, match="is no journal"):
        Journal(tmp_path / "a")


def test_a_state_that_a_power_cut_left_in_part_is_passed_over(tmp_path: Path) -> None:
    journal = begun(tmp_path, prepared(tmp_path))
    with journal.path.open("ab") as file:
        file.write(b'{"sta')
    assert Journal(journal.path).do() == []
    assert Journal(journal.path).state == "done"


def test_a_journal_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"mine")
    with pytest.raises(OutputUnwritable, match="exists; name another place: --journal FILE"):
        Journal.begin(tmp_path / "a", [])
