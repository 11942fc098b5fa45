"""The way out of a cull: verdicts become sidecars, lists, copies, links and moves, to be undone.

Files of one name in one folder are one *shot*, whatever their suffixes: RAW, JPEG, sidecars. They
share a verdict, that of the best photo among them, and stay together.
"""

from __future__ import annotations

import math
import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Literal

from meiqa.engine.files import IMAGE_SUFFIXES
from meiqa.errors import MeiqaError, OutputUnwritable, UsageError
from meiqa.journal import Action, Copy, Link, Make, Move, Write
from meiqa.outputs import STDOUT, Kind, disk_errors, output_target
from meiqa.sidecars import embedded_packet, merged, rated_by_hand, told
from meiqa.types import Culling, Failure

_LIST = Kind("list")
STARS = (1.8, 2.6, 3.4, 4.2)
"""The scores from which on a photo has two, three, four and five stars: those of the words."""


@dataclass(frozen=True)
class Verdict:
    """What is made of a photo: `rating` 1-5, 0 for none, or -1 for a reject; `label` may be ""."""

    path: str
    rating: int
    label: str = ""

    @classmethod
    def of_cull(cls, path: str, rating: int) -> Verdict:
        """Label a reject red, and a photo that is kept green."""
        return cls(path, rating, "Red" if rating < 0 else "Green")


@dataclass(frozen=True)
class WayOut:
    """What is to be done with photos.

    Attributes:
        paths: what the run was given; folders below them are made again below a target.
        sidecar: rate shots in sidecars, named as this program names them.
        list: the file for the names of photos that are kept.
        copy_to, link_to: folders for the shots that are kept.
        move_rejects_to: the folder for the others.
        force: replace ratings that were given by hand, and a list that is there; otherwise a shot
            that somebody rated is neither rated nor moved.

    Raises:
        OutputUnwritable, UsageError: a target can't be written, or the next run would walk it.
    """

    paths: Sequence[str]
    sidecar: Literal["lightroom", "darktable"] | None = None
    list: str | None = None
    copy_to: str | None = None
    link_to: str | None = None
    move_rejects_to: str | None = None
    force: bool = False

    def __post_init__(self) -> None:
        for target in filter(None, (self.copy_to, self.link_to, self.move_rejects_to)):
            for path in self.paths:
                inside = Path(os.path.realpath(target)).is_relative_to(os.path.realpath(path))
                if inside and os.path.isdir(path):
                    what = f"{target} lies in {path}, and would be culled with it the next time"
                    raise UsageError(what, hint="name a folder outside")
        if self.list in STDOUT:
            raise UsageError("--list writes a file", hint="--format csv prints what was found")
        if self.list is not None:
            output_target(self.list, _LIST, force=self.force)

    @property
    def base(self) -> str:
        """The folder that all photos lie in or below."""
        return common_folder(self.paths)

    def __str__(self) -> str:
        parts = [
            (self.sidecar, "write ratings into XMP sidecars"),
            (self.list, f"list the kept photos in {self.list}"),
            (self.copy_to, f"copy them to {self.copy_to}"),
            (self.link_to, f"link to them in {self.link_to}"),
            (self.move_rejects_to, f"move the rejects to {self.move_rejects_to}"),
        ]
        return ", ".join(words for asked, words in parts if asked)


@dataclass
class Plan:
    """What will be done, what can't be, and how many shots are left as somebody rated them."""

    actions: list[Action] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    by_hand: int = 0


def folder_of(path: str) -> str:
    """Give a folder itself, or that of a file, as an absolute path."""
    path = os.path.abspath(path)
    return path if os.path.isdir(path) else os.path.dirname(path)


def common_folder(paths: Iterable[str]) -> str:
    """Give the folder that folders and files lie in or below, one of them or above them all."""
    return os.path.commonpath([folder_of(path) for path in paths])


def stars_given(stars: Sequence[float] | float, scores: Iterable[float]) -> Callable[[float], int]:
    """Give the function from scores to stars, 1-5.

    Args:
        stars: the scores from which on there are two to five, or the percentage of photos with
            five; each star less then goes to twice as many.
        scores: of the run's photos.
    """
    if not isinstance(stars, float):
        return lambda score: 1 + bisect_right(stars, score)
    ranked = sorted(scores, reverse=True)
    places = (min(stars / 100 * part, 1.0) * len(ranked) for part in (15, 7, 3, 1))
    thresholds = [ranked[math.ceil(place - 1e-9) - 1] for place in places if ranked]
    return lambda score: 1 + bisect_right(thresholds, score)


def verdicts_of(found: Culling, stars: Sequence[float] | float) -> list[Verdict]:
    """Keep the best shot of each group, and all of a series, green; reject the others, red.

    A series has the stars of its best photo, so that no choice by stars takes it apart.
    """
    given = stars_given(stars, (photo.score for group in found.groups for photo in group))
    verdicts = []
    for group in found.groups:
        kept = [photo for photo in group if photo.kept]
        rating = given(max(photo.score for photo in kept))
        verdicts += [Verdict.of_cull(each.path, rating) for each in kept]
        verdicts += [Verdict.of_cull(each.path, -1) for each in group if not each.kept]
    return verdicts


def plan(verdicts: Iterable[Verdict], way: WayOut) -> Plan:
    """Say what has to be done; nothing is changed.

    Raises:
        OutputUnwritable, UsageError: the list can't be written.
    """
    planned = Plan()
    shots: dict[tuple[str, str], Verdict] = {}
    for each in sorted(verdicts, key=lambda each: each.rating, reverse=True):
        folder, name = os.path.split(os.path.abspath(each.path))
        shots.setdefault((folder, _stem(name)), each)
    files_in = cache(_files_in)
    for (folder, stem), verdict in sorted(shots.items()):
        files = _files_of(stem, files_in(folder))
        shot = _Shot(folder, files, verdict, way)
        try:
            by_hand = shot.is_by_hand()
            written = [] if way.sidecar is None or by_hand else shot.sidecars()
            planned.actions += [] if verdict.rating < 0 and by_hand else shot.placed(written)
            planned.by_hand += by_hand
        except MeiqaError as error:
            planned.failures.append(Failure(verdict.path, error))
    if way.list is not None:
        kept = (each for each in shots.values() if each.rating >= 0)
        planned.actions += _listed(sorted(each.path for each in kept), way, planned.failures)
    planned.actions = [*_folders(planned.actions), *planned.actions]
    return planned


class _Shot:
    """Files of one name in one folder, with their verdict."""

    def __init__(self, folder: str, files: list[str], verdict: Verdict, way: WayOut) -> None:
        self._folder, self._files, self._verdict, self._way = folder, files, verdict, way

    def is_by_hand(self) -> bool:
        """Tell whether somebody rated it, who is to have the last word."""
        way = self._way
        asked = way.sidecar or (way.move_rejects_to and self._verdict.rating < 0)
        return bool(asked and not way.force) and any(map(self._is_rated, self._files))

    def sidecars(self) -> list[Write]:
        """Rate it."""
        photo = os.path.basename(self._verdict.path)
        if self._way.sidecar == "lightroom":
            names = [os.path.splitext(photo)[0] + ".xmp"]
        else:
            photos = {photo, *filter(_is_photo, self._files)}
            names = [f"{name}.xmp" for name in sorted(photos)]
        there = {name.casefold(): name for name in self._files}
        writes = (self._written(there.get(name.casefold(), name)) for name in names)
        return [each for each in writes if each.new != each.old]

    def placed(self, written: Sequence[Write]) -> list[Action]:
        """Copy, link or move its files, all or none, and write its sidecars where they are then."""
        way = self._way
        sources = [os.path.join(self._folder, name) for name in self._files]
        if self._verdict.rating < 0 and way.move_rejects_to is not None:
            rewritten = {each.target for each in written}
            moved = [self._moved(each, way.move_rejects_to, each in rewritten) for each in sources]
            there = [self._below(way.move_rejects_to, each.target) for each in written]
            pairs = zip(written, there, strict=True)
            return [*moved, *(replace(e, target=to, moved=e.old is not None) for e, to in pairs)]
        placed: list[Copy | Link] = []
        sources += [each.target for each in written if each.old is None]
        if self._verdict.rating >= 0 and way.copy_to is not None:
            placed += [Copy(each, self._below(way.copy_to, each)) for each in sources]
        if self._verdict.rating >= 0 and way.link_to is not None:
            placed += [Link(each, self._below(way.link_to, each)) for each in sources]
        with disk_errors(self._folder):
            return [*written, *(each for each in placed if not each.is_there())]

    def _is_rated(self, name: str) -> bool:
        path = os.path.join(self._folder, name)
        with disk_errors(path):
            if name.lower().endswith(".xmp"):
                return rated_by_hand(Path(path).read_bytes(), path)
            if _is_photo(name):
                with suppress(OutputUnwritable):  # a packet in a photo is no file to be written
                    packet = embedded_packet(path)
                    return packet is not None and rated_by_hand(packet, path)
        return False

    def _written(self, name: str) -> Write:
        path = os.path.join(self._folder, name)
        path, old = os.path.realpath(path) if os.path.islink(path) else path, None
        if os.path.lexists(path):
            with disk_errors(path):
                old = Path(path).read_bytes()
        rating, label = self._verdict.rating, self._verdict.label
        new = merged(old, path, rating, label, force=self._way.force)
        held = None if old is None else _text(old)
        return Write(path, held, _text(new), told=told(new, path))

    def _below(self, folder: str, source: str) -> str:
        return os.path.join(os.path.abspath(folder), os.path.relpath(source, self._way.base))

    def _moved(self, source: str, folder: str, rewritten: bool) -> Move:
        target = self._below(folder, source)
        if os.path.lexists(target):
            raise OutputUnwritable(f"{source} is not moved: {target} exists")
        if os.path.islink(source):
            raise OutputUnwritable(f"{source} is not moved", seen="a link", allowed="a file")
        with disk_errors(source):
            found = os.stat(source)
        known = (None, None) if rewritten else (found.st_size, found.st_mtime_ns)
        return Move(source, target, *known)


def _listed(photos: Sequence[str], way: WayOut, failures: list[Failure]) -> list[Write]:
    """List photos, one a line."""
    assert way.list is not None
    target = str(output_target(way.list, _LIST, force=way.force, inputs=photos))
    for photo in photos:
        if "\n" in photo:
            error = OutputUnwritable(f"{photo} is not listed: a newline is in its name")
            failures.append(Failure(photo, error))
    text = "".join(f"{photo}\n" for photo in photos if "\n" not in photo)
    with disk_errors(target):
        old = _text(Path(target).read_bytes()) if os.path.exists(target) else ""
    return [] if old == text else [Write(target, old or None, text)]


def _folders(actions: Iterable[Action]) -> list[Make]:
    """The folders that targets lack, upper ones first."""
    lacking = {
        str(folder)
        for each in {os.path.dirname(each.target) for each in actions}
        for folder in (Path(each), *Path(each).parents)
        if not folder.exists()
    }
    return [Make(each) for each in sorted(lacking)]


def _files_in(folder: str) -> list[str]:
    with disk_errors(folder):
        return sorted(each.name for each in os.scandir(folder) if each.is_file())


def _files_of(stem: str, names: Sequence[str]) -> list[str]:
    """The names that differ in their suffix only, and those that add one to one of them."""
    same = {name.casefold() for name in names if _stem(name) == stem}

    def belongs(name: str) -> bool:
        return name.casefold() in same or (_stem(name) in same and not _is_photo(name))

    return [*filter(belongs, names)]


def _stem(name: str) -> str:
    """A name without its suffix, as file systems compare names that see no cases."""
    return os.path.splitext(name)[0].casefold()


def _is_photo(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")
