"""What somebody decides about the photos of a cull, in a file that outlives a kill.

Each line is one JSON object: photos as they were judged, so that a second start need not judge
them again; ratings that were given; and that the last of them were taken back.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
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


class Decisions:
    """Ratings that somebody gave to photos; each is durable once the call that gives it returns.

    A context manager, to be used by one thread at a time.

    Attributes:
        path: of the file.
        ratings: 1-5, 0 for none or -1 for a reject, by the photo's absolute path.

    Raises:
        OutputUnwritable: the file can't be written.
        UsageError: it holds something else, or another process is at it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.ratings: dict[str, int] = {}
        self._before: list[dict[str, int | None]] = []  # what each decision took the place of
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
        self._add({"give": dict(ratings)})

    def undo(self) -> set[str]:
        """Take the last decision back, whoever's start it is of, and give its photos."""
        if not self._before:
            return set()
        photos = {*self._before[-1]}
        self._add({"undo": sorted(photos)})
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
                self._before.append({path: self.ratings.get(path) for path in ratings})
                self.ratings.update(ratings)
            case {"undo": _}:
                for path, rating in self._before.pop().items():
                    self.ratings.pop(path)
                    if rating is not None:
                        self.ratings[path] = rating
            case _:
                raise ValueError("no line of this kind")

    def _read(self) -> None:
        whole = 0
        for line in self.path.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n"):  # a power cut left part of it
                break
            try:
                self._follow(json.loads(line))
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                what = f"{self.path} holds something else than decisions"
                raise UsageError(what, seen=str(error), hint="move it away") from error
            whole += len(line)
        os.ftruncate(self._descriptor, whole)


def _identity(photos: Sequence[str], terms: Mapping[str, Any]) -> str:
    """What a cull depends on: how photos are judged, which ones, and whether they changed."""
    status: list[tuple[int, int] | None] = []
    for photo in photos:
        status.append(None)
        with suppress(OSError):  # a photo that is missing is judged to be missing
            found = os.stat(photo)
            status[-1] = found.st_size, found.st_mtime_ns
    text = json.dumps([terms, *photos, *status], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _words(value: object | None) -> str | None:
    return None if value is None else str(value)
