"""What somebody decides about the photos of a cull, in a file that outlives a kill.

Each line is one JSON object: photos as they were judged, so that a second start need not judge
them again; ratings that were given, beside what the photos were then; and which were taken back.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from meiqa.errors import ImageError, UsageError
from meiqa.outputs import append_whole, disk_errors, sync_folder
from meiqa.types import CulledPhoto, Culling, Failure

NAME = ".meiqa-review.jsonl"
_SCHEMA = 1
_PARTS = ("what", "seen", "allowed", "hint")
_BEGINNINGS = (b'{"meiqa_review": %d, ' % _SCHEMA, b'{"give": {')
"""What a file begins with."""


class Decisions:
    """Ratings that somebody gave to photos; each is durable once the call that gives it returns.

    A context manager, to be used by one thread at a time.

    Attributes:
        path: of the file.
        ratings: 1-5, 0 for none or -1 for a reject, by the photo's absolute path; none of a photo
            that has changed since.

    Raises:
        OutputUnwritable: the file can't be written.
        UsageError: it holds something else, or another process is at it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.ratings: dict[str, int] = {}
        self._decided: list[set[str]] = []  # photos of each decision that still stands
        self._given: dict[str, list[tuple[int, list[int] | None]]] = {}  # ratings, latest last
        self._judged: dict[str, Any] = {}
        hint = "name a place for it and for the journal: --journal FILE"
        with disk_errors(self.path, hint):
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            sync_folder(self.path.parent)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._read()
        except BaseException as error:
            os.close(self._descriptor)
            if isinstance(error, BlockingIOError):
                what = "these photos are being reviewed by another process"
                raise UsageError(what, seen=self.path, hint="wait for it to end") from None
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def found(self, photos: Sequence[str], terms: Mapping[str, Any]) -> Culling | None:
        """Give what was found of these very photos, judged on the same terms; None if nothing."""
        if self._judged.get("of") != _identity(photos, terms):
            return None
        groups = (tuple(CulledPhoto(**each) for each in group) for group in self._judged["groups"])
        failures = (Failure(path, ImageError(**parts)) for path, parts in self._judged["failures"])
        return Culling(tuple(groups), tuple(failures), tuple(self._judged["degraded"]))

    def remember(self, found: Culling, photos: Sequence[str], terms: Mapping[str, Any]) -> None:
        """Keep what was found of photos; OutputUnwritable if the disk refuses."""
        failures = [
            (each.path, {part: _words(getattr(each.error, part)) for part in _PARTS})
            for each in found.failures
        ]
        groups = [[asdict(photo) for photo in group] for group in found.groups]
        judged = {"groups": groups, "failures": failures, "degraded": found.degraded}
        self._add({"meiqa_review": _SCHEMA, "of": _identity(photos, terms), **judged})

    def give(self, ratings: Mapping[str, int]) -> None:
        """Decide about photos, all at once; OutputUnwritable if the disk refuses."""
        self._add({"give": {path: (rating, _status(path)) for path, rating in ratings.items()}})
        self._stand(ratings)

    def undo(self, shown: Set[str]) -> set[str]:
        """Take the last decision about photos that are shown back, whoever's start it is of.

        Returns:
            The photos that it was of; what it says of others, which are not shown, stays.
        """
        photos = next((each & shown for each in reversed(self._decided) if each & shown), set())
        if photos:
            self._add({"undo": sorted(photos)})
            self._stand(photos)
        return photos

    def _add(self, line: Mapping[str, Any]) -> None:
        with disk_errors(self.path):
            append_whole(self._descriptor, json.dumps(line).encode() + b"\n")
            os.fsync(self._descriptor)
        self._follow(line)

    def _follow(self, line: Mapping[str, Any]) -> None:
        match line:
            case {"meiqa_review": schema} if schema == _SCHEMA:
                self._judged = {**line}
            case {"give": ratings}:
                for path, (rating, status) in ratings.items():
                    self._given.setdefault(path, []).append((rating, status and [*status]))
                self._decided.append({*ratings})
            case {"undo": paths}:
                last = [each for each in self._decided if not each.isdisjoint(paths)][-1]
                for path in paths:
                    last.remove(path)
                    self._given[path].pop()
            case _:
                raise ValueError("no line of this kind")

    def _stand(self, photos: Iterable[str]) -> None:
        """Bring `ratings` up to what was given last to photos that are still what they were."""
        for photo in photos:
            given = self._given[photo]
            if given and given[-1][1] == _status(photo):
                self.ratings[photo] = given[-1][0]
            else:
                self.ratings.pop(photo, None)

    def _read(self) -> None:
        whole = 0
        for line in self.path.read_bytes().splitlines(keepends=True):
            try:
                if not line.endswith(b"\n"):
                    if whole or _begins(line):  # a power cut left part of it
                        break
                    raise ValueError("a line without an end")
                self._follow(json.loads(line))
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                what = f"{self.path} holds something else than decisions"
                raise UsageError(what, seen=str(error), hint="move it away") from error
            whole += len(line)
        os.ftruncate(self._descriptor, whole)
        self._stand(self._given)


def _identity(photos: Sequence[str], terms: Mapping[str, Any]) -> str:
    """What a cull depends on: how photos are judged, which ones, and whether they changed."""
    text = json.dumps([terms, *photos, *map(_status, photos)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _status(photo: str) -> list[int] | None:
    """Size and time of change, by which a photo is known; None of one that is missing."""
    with suppress(OSError):
        found = os.stat(photo)
        return [found.st_size, found.st_mtime_ns]
    return None


def _begins(line: bytes) -> bool:
    """Tell whether part of a line may be of the first one that we write."""
    return any(line.startswith(each) or each.startswith(line) for each in _BEGINNINGS)


def _words(value: object | None) -> str | None:
    return None if value is None else str(value)
