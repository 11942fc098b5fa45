"""Which files of folders are photographs, and what is passed over on the way."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from heapq import nsmallest
from itertools import islice
from typing import TypeVar

from meiqa.engine.files import IMAGE_SUFFIXES, RAW_SUFFIXES, looks_like_photo, suffixes
from meiqa.errors import DecodeError
from meiqa.types import Failure

_VIDEOS = suffixes("3gp avi insv lrv m2ts m4v mkv mov mp4 mpg mts webm wmv")
_SIDECARS = suffixes("aae cos dop json pp3 thm vrd xml xmp")
_TWINS = suffixes("avif heic heif hif jpe jpeg jpg jxl")
"""What a camera or phone writes beside a RAW file of the same shot."""
_SYSTEM_FOLDERS = frozenset(["@eadir", "@recycle", "#recycle", "$recycle.bin", "lost+found"])
_HEAD_BYTES = 32
Item = TypeVar("Item")


@dataclass
class Gathered:
    """What was found: photos in order of their paths, what can't be read, what was passed over."""

    photos: list[str] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    passed_over: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        counts = [_counted(number, kind) for kind, number in sorted(self.passed_over.items())]
        skipped = f"; skipped {', '.join(counts)}" if counts else ""
        return _counted(len(self.photos), "photo") + skipped


@dataclass(frozen=True)
class Selection:
    """Which photos are taken: a shard of them, of that a sample, of that the first ones.

    Shard and sample follow from the ids alone, and are the same whatever the order.

    Attributes:
        shard: which of how many, from 1 on; sample, limit: at most so many.
    """

    shard: tuple[int, int] | None = None
    sample: int | None = None
    limit: int | None = None

    @property
    def is_open(self) -> bool:
        """Whether a folder that grows has more of them."""
        return self.sample is None and self.limit is None

    def of(self, items: Iterable[Item], id_of: Callable[[Item], str]) -> Iterator[Item]:
        """Give the items that are taken."""
        taken = iter(items)
        if self.shard is not None:
            number, count = self.shard
            taken = (each for each in taken if lot(id_of(each)) % count == number - 1)
        if self.sample is not None:
            taken = iter(nsmallest(self.sample, taken, key=lambda each: lot(id_of(each))))
        return islice(taken, self.limit)


def lot(id: str) -> int:
    """Give a number of 128 bits that follows from an id, and is as good as drawn."""
    data = id.encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(data, digest_size=16).digest(), "big")


def gather(paths: Sequence[str], *, hidden: bool = False, develop: bool = False) -> Gathered:
    """Replace each directory by the photos in and below it; other paths stay.

    A RAW file and the JPEG or HEIC of the same name are one photo.

    Args:
        hidden: walk hidden and system folders and files (thumbnails, bins), too.
        develop: of a RAW file and its JPEG take the former, otherwise the latter.
    """
    found = Gathered()
    for path in paths:
        if not os.path.isdir(path):
            found.photos.append(path)
            continue
        unreadable: list[OSError] = []
        photos = sorted(_photos_below(path, hidden, develop, unreadable, found.passed_over))
        errors = {str(e.filename): DecodeError(f"{e.filename}: {e.strerror}") for e in unreadable}
        if not photos and not errors:
            hint = "give a directory with images"
            errors = {path: DecodeError(f"{path} holds no photos", hint=hint)}
        found.photos += photos
        found.failures += [Failure(name, error) for name, error in errors.items()]
    return found


def _photos_below(
    path: str, hidden: bool, develop: bool, unreadable: list[OSError], passed_over: Counter[str]
) -> Iterator[str]:
    for folder, inner, files in os.walk(path, onerror=unreadable.append):
        if not hidden:
            shown = [name for name in inner if not _is_hidden(name)]
            passed_over.update(["hidden folder"] * (len(inner) - len(shown)))
            inner[:] = shown
            files = [name for name in files if not name.startswith(".")]
        kinds = {name: _kind(os.path.join(folder, name)) for name in files}
        photos = [name for name, kind in kinds.items() if kind == "photo"]
        twins = _twins(photos, develop)
        passed_over.update(kind for kind in kinds.values() if kind != "photo")
        passed_over.update(["JPEG twin" if develop else "RAW twin"] * len(twins))
        yield from (os.path.join(folder, name) for name in photos if name not in twins)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _SYSTEM_FOLDERS


def _kind(path: str) -> str:
    suffix = os.path.splitext(path)[1].lower()
    if suffix in IMAGE_SUFFIXES:
        return "photo"
    if suffix in _VIDEOS:
        return "video"
    if suffix in _SIDECARS:
        return "sidecar"
    try:
        with open(path, "rb") if os.path.isfile(path) else open(os.devnull, "rb") as file:
            return "photo" if looks_like_photo(file.read(_HEAD_BYTES)) else "other file"
    except OSError:
        return "other file"


def _twins(names: Iterable[str], develop: bool) -> set[str]:
    """Of files of one shot, those that the other stands for."""
    raws, pictures = dict[str, str](), dict[str, str]()
    for name in names:
        stem, suffix = os.path.splitext(name.lower())
        if suffix in RAW_SUFFIXES:
            raws[stem] = name
        elif suffix in _TWINS:
            pictures[stem] = name
    given = pictures if develop else raws
    return {given[stem] for stem in raws.keys() & pictures.keys()}


def _counted(number: int, kind: str) -> str:
    return f"{number} {kind}{'' if number == 1 else 's'}"
