"""Journals: what is to be done with a user's files is written down first, and can be undone.

An action is done or undone in steps of which each leaves every file whole in one place or another.
How far it got is seen from the files alone, so that a run that was killed can be finished or undone
from its journal, any number of times. Nothing is ever put in place of a file that is not known.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from meiqa.errors import OutputUnwritable, UsageError
from meiqa.outputs import disk_errors, sync_folder

_PREFIX = ".meiqa-journal-"
_SCHEMA = 1
_DISK_IS_FULL = {errno.EDQUOT, errno.ENOSPC}
_CLOCK_STEP_NS = 2_000_000_000
"""What file systems round times of change to, at worst (FAT)."""


class _Gone(OutputUnwritable):
    """A file is not there any more, so that nothing is left to be done with it, or undone."""


class _Action(ABC):
    """Something done to a user's files; a kill at any moment leaves it to be done, or undone."""

    @abstractmethod
    def do(self) -> None:
        """Do it, unless it is done; OutputUnwritable where something unknown is in the way."""

    @abstractmethod
    def undo(self) -> None:
        """Undo it, unless it is undone; OutputUnwritable where something changed since."""

    def __str__(self) -> str:
        source = f"{vars(self)['source']} to " if "source" in vars(self) else ""
        return f"{type(self).__name__.lower()} {source}{vars(self)['target']}"


@dataclass(frozen=True)
class Make(_Action):
    """A folder to be made; it stays as long as there is something in it."""

    target: str

    def do(self) -> None:
        with suppress(FileExistsError):
            os.mkdir(self.target)

    def undo(self) -> None:
        with suppress(OSError):
            os.rmdir(self.target)


@dataclass(frozen=True)
class Write(_Action):
    """A small file to be written; `old` is what it held, None where there was none.

    Both are UTF-8, with lone surrogates for other bytes. Where an action before this one `moved`
    the file to its target, it is not there any more once that is undone. `told` says in words what
    is written.
    """

    target: str
    old: str | None
    new: str
    moved: bool = False
    told: str = ""

    def __str__(self) -> str:
        return f"{super().__str__()}{self.told and ': '}{self.told}"

    def do(self) -> None:
        self._turn(self.old, self.new)

    def undo(self) -> None:
        if not self.moved or not _is_vacant(self.target):
            self._turn(self.new, self.old)

    def _turn(self, before: str | None, after: str | None) -> None:
        held = None if _is_vacant(self.target) else Path(self.target).read_bytes()
        known = [None if each is None else _bytes(each) for each in (before, after)]
        if held not in known:
            if held is None:
                raise _Gone(f"{self.target} is gone, and what it held cannot be changed")
            raise _refused(self.target, "another content than the journal knows")
        if after is None:
            Path(self.target).unlink(missing_ok=True)
        elif held != known[1]:
            with _unfinished(self.target) as unfinished:
                _write_durably(unfinished, _bytes(after))
                if held is not None:
                    shutil.copymode(self.target, unfinished)
                _put(unfinished, self.target)


@dataclass(frozen=True)
class Copy(_Action):
    """A file to be copied to where there is none."""

    source: str
    target: str

    def do(self) -> None:
        if not self.is_there():
            _place_copy(self.source, self.target)

    def undo(self) -> None:
        if self.is_there() or os.path.lexists(self.target):
            os.unlink(self.target)

    def is_there(self) -> bool:
        """Tell whether it was done; OutputUnwritable if another file is there."""
        if _is_vacant(self.target):
            return False
        if not _same_content(self.source, self.target):
            raise _refused(self.target, f"another file than {self.source}")
        return True


@dataclass(frozen=True)
class Link(_Action):
    """A symbolic link to be made where there is nothing."""

    source: str
    target: str

    def do(self) -> None:
        if not self.is_there():
            os.symlink(self.source, self.target)

    def undo(self) -> None:
        if self.is_there():
            os.unlink(self.target)

    def is_there(self) -> bool:
        """Tell whether it was done; OutputUnwritable if another file is there."""
        if not os.path.lexists(self.target):
            return False
        if not os.path.islink(self.target) or os.readlink(self.target) != self.source:
            raise _refused(self.target, f"another file than a link to {self.source}")
        return True


@dataclass(frozen=True)
class Move(_Action):
    """A file to be moved to where there is none, if need be to another disk.

    `size` (bytes) and `mtime_ns` tell whether it is the same file still; None where another action
    of the journal knows its content.
    """

    source: str
    target: str
    size: int | None = None
    mtime_ns: int | None = None

    def do(self) -> None:
        self._shift(self.source, self.target)

    def undo(self) -> None:
        self._shift(self.target, self.source)

    def _shift(self, start: str, end: str) -> None:
        if not self._is_at(start):
            if not self._is_at(end):
                if os.path.lexists(start):
                    raise _refused(start, "changed")
                back = "back " if start == self.target else ""
                raise _Gone(f"{start} is gone, and cannot be moved {back}to {end}")
            if _is_vacant(start):
                Path(start).unlink(missing_ok=True)
            return
        if not _is_vacant(end):
            if not _same_content(start, end):
                raise _refused(end, "another file")
            os.unlink(start)  # a move to another disk had come so far
            return
        try:
            _put(start, end)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            _place_copy(start, end)
            os.unlink(start)
        for path in (end, start):
            sync_folder(Path(path).parent)

    def _is_at(self, path: str) -> bool:
        with suppress(FileNotFoundError):
            found = os.lstat(path)
            if self.size is None or self.mtime_ns is None:
                return found.st_size > 0
            same_time = abs(found.st_mtime_ns - self.mtime_ns) <= _CLOCK_STEP_NS
            return stat.S_ISREG(found.st_mode) and found.st_size == self.size and same_time
        return False


Action = Make | Write | Copy | Link | Move
_KINDS: dict[str, Callable[..., Action]] = {
    "Make": Make,
    "Write": Write,
    "Copy": Copy,
    "Link": Link,
    "Move": Move,
}


class Journal:
    """The actions of one run, in a file that says whether they were done or undone.

    Attributes:
        path: of the file.
        actions: in the order in which they are done.
        state: "planned" until all was tried, then "done", "undone", or "gone": undone but for files
            that were not there any more.

    Raises:
        UsageError: the file is no journal.
    """

    def __init__(self, path: str | Path) -> None:
        self.path, self.state = Path(path), "planned"
        self.actions: list[Action] = []
        try:
            head, *lines = self.path.read_bytes().splitlines()
            read = json.loads(head)
            count = read["actions"] if read["meiqa_journal"] == _SCHEMA else len(lines) + 1
            for line in map(json.loads, lines[:count]):
                self.actions.append(_KINDS[line.pop("do")](**line))
            if len(self.actions) < count:
                raise ValueError("actions are missing")
            for state in lines[count:]:
                with suppress(ValueError):  # a power cut leaves part of one
                    self.state = json.loads(state)["state"]
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            seen = error.strerror if isinstance(error, OSError) else "another file"
            raise UsageError(f"{path} is no journal of meiqa's", seen=seen) from error

    @classmethod
    def begin(cls, path: str | Path, actions: Sequence[Action]) -> Journal:
        """Write actions down, durably, before the first is done.

        Raises:
            OutputUnwritable: the journal is there already, or the disk refuses.
        """
        head = {"meiqa_journal": _SCHEMA, "actions": len(actions)}
        lines = [head, *({"do": type(each).__name__, **vars(each)} for each in actions)]
        hint = "name another place: --journal FILE"
        if os.path.lexists(path):
            raise OutputUnwritable(f"{path} exists", hint=hint)
        text = "".join(json.dumps(line) + "\n" for line in lines)
        with disk_errors(path, hint), _unfinished(path) as unfinished:
            _write_durably(unfinished, text.encode())
            os.replace(unfinished, path)
        return cls(path)

    @classmethod
    def of(cls, place: str, way: Literal["do", "undo"]) -> Journal:
        """Give the journal at a path, or the latest of a folder's, that is to be done or undone.

        Raises:
            UsageError: there is none.
        """
        states = {"planned"} if way == "do" else {"planned", "done"}
        if is_folder := os.path.isdir(place):
            found = journals_in(place)
        else:  # files that were gone may have come back to one that is named
            found, states = [cls(place)], states | {"gone"} if way == "undo" else states
        for journal in reversed(found):
            if journal.state in states:
                return journal
        nothing = f"nothing to {'undo' if way == 'undo' else 'finish'}: "
        if not found:
            raise UsageError(f"{nothing}no run left a journal in {place}")
        run = "the latest run" if is_folder else "that run"
        state, hint = f"has been {found[-1].state} already", None
        if found[-1].state == "gone":
            state = "has been undone already, but for files that are gone"
            hint = f"if they come back: meiqa cull --undo {shlex.quote(str(found[-1].path))}"
        raise UsageError(f"{nothing}{run} {state}", hint=hint)

    def do(self) -> list[OutputUnwritable]:
        """Do what isn't done; give what could not be.

        Raises:
            OutputUnwritable: the disk is full.
            UsageError: another process is at it.
        """
        return self._go_through("do")

    def undo(self) -> list[OutputUnwritable]:
        """Undo what was done, last first; give what could not be. See `do`."""
        return self._go_through("undo")

    def _go_through(self, way: str) -> list[OutputUnwritable]:
        refused = []
        with self._locked() as descriptor:
            for action in self.actions[:: 1 if way == "do" else -1]:
                try:
                    with disk_errors(action.target):
                        getattr(action, way)()
                        for path in vars(action).keys() & {"source", "target"}:
                            left = _unfinished_place(getattr(action, path))
                            if left.exists():  # a read-only disk refuses to remove nothing, too
                                left.unlink()
                except OutputUnwritable as error:
                    if getattr(error.__cause__, "errno", None) in _DISK_IS_FULL:
                        error.hint = f"make room, then: meiqa cull --resume or --undo {self.path}"
                        raise
                    refused.append(error)
            self.state = "done"
            if way == "undo" and all(isinstance(each, _Gone) for each in refused):
                self.state = "gone" if refused else "undone"
            with disk_errors(self.path):
                os.write(descriptor, b'\n{"state": "%s"}\n' % self.state.encode())
                os.fsync(descriptor)
        return refused

    @contextmanager
    def _locked(self) -> Iterator[int]:
        with disk_errors(self.path):
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                what = f"another process is at {self.path}"
                raise UsageError(what, hint="wait for it to end") from None
            yield descriptor
        finally:
            os.close(descriptor)


def journals_in(folder: str | Path) -> list[Journal]:
    """Give the journals that lie in a folder, in the order of their beginning."""
    return [Journal(path) for path in sorted(Path(folder).glob(f"{_PREFIX}*.jsonl"))]


def new_journal(folder: str | Path) -> Path:
    """Give the path of a journal that begins now."""
    return Path(folder) / f"{_PREFIX}{datetime.now():%Y%m%d-%H%M%S-%f}.jsonl"


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _refused(path: str, seen: str) -> OutputUnwritable:
    return OutputUnwritable(f"{path} is left as it is", seen=seen)


def _is_vacant(path: str) -> bool:
    """Whether there is nothing, or an empty file, by which a place is held."""
    return not os.path.lexists(path) or (os.path.isfile(path) and not os.path.getsize(path))


def _same_content(one: str, other: str) -> bool:
    """Whether two files, not one by two names, hold the same; not if one is missing."""

    def digest(path: str) -> str:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with suppress(FileNotFoundError):
        return not os.path.samefile(one, other) and digest(one) == digest(other)
    return False


def _put(start: str | Path, end: str) -> None:
    """Rename a file; renaming alone would replace any other, so an empty one holds the place."""
    if not os.path.lexists(end):
        os.close(os.open(end, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
    os.replace(start, end)


def _unfinished_place(target: str | Path) -> Path:
    """A place beside a file, of a name that isn't too long where the file's isn't."""
    name = hashlib.sha256(os.fsencode(os.path.basename(target))).hexdigest()[:16]
    return Path(target).with_name(f".meiqa-{name}.tmp")


@contextmanager
def _unfinished(target: str | Path) -> Iterator[Path]:
    """Give the place where a file is written until it is whole."""
    path = _unfinished_place(target)
    try:
        yield path
        sync_folder(path.parent)
    finally:
        path.unlink(missing_ok=True)


def _write_durably(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _place_copy(source: str, target: str) -> None:
    """Copy a file with its times to a place that is free, whole and verified, or not at all."""
    with _unfinished(target) as unfinished:
        shutil.copyfile(source, unfinished)
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        if not _same_content(source, str(unfinished)):
            raise OSError(errno.EIO, "the copy differs from its original")
        with suppress(PermissionError):  # FAT keeps times, and no modes
            shutil.copystat(source, unfinished)
        _put(unfinished, target)
