"""Reports for people: one HTML page with thumbnails, which needs no script and no other file."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterable, Iterator
from html import escape
from itertools import chain
from typing import IO

from PIL import Image

from meiqa.engine.estimates import HIGHEST, LOWEST, Z95, quality_word
from meiqa.engine.images import load_pixels
from meiqa.errors import ImageError, one_line
from meiqa.formats import failure_line, place_phrase
from meiqa.locations import embedded_assets
from meiqa.types import CulledPhoto, Culling, Failure, RankedPhoto, Ranking

THUMBNAIL_SIDE = 240
THUMBNAIL_QUALITY = 78

_HEAD = """<!DOCTYPE html>
<!-- made by meiqa -->
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<main>
<h1>{title}</h1>
<p class="soft">{note} Scores go from 1.00 to 5.00, higher is better.</p>
"""
_TAIL = "</main>\n</body>\n</html>\n"


def write_page(found: Ranking | Culling, file: IO[bytes]) -> None:
    """Write photos best first, or groups of shots with the best in front, then single photos."""
    if isinstance(found, Ranking):
        count = _counted(len(found.photos), "photo")
        title, note = "Ranking", f"{count}, best first, each compared with those next to it."
        cards = (
            _card(each, each.rank, "best" if each.rank == 1 else "", _moved(each))
            for each in found.photos
        )
        body = _list(cards)
    else:
        several = [group for group in found.groups if len(group) > 1]
        single = [group[0] for group in found.groups if len(group) == 1]
        shots, groups = _counted(sum(map(len, several)), "photo"), _counted(len(several), "group")
        title, body = "Best shots", _groups(several, single)
        note = (
            f"{shots} in {groups}, and {len(single)} without another like it. Of near-identical "
            "shots the best is marked; brackets, focus stacks and panoramas are kept whole."
        )
    if found.degraded:
        note += f" Left out for lack of time: {escape('; '.join(found.degraded))}."
    style = (embedded_assets() / "report.css").read_text(encoding="utf-8")
    head = _HEAD.format(title=title, note=note, style=style)
    for text in chain([head], body, _failed(found.failures), [_TAIL]):
        file.write(text.encode("utf-8", "backslashreplace"))


def _groups(several: list[tuple[CulledPhoto, ...]], single: list[CulledPhoto]) -> Iterator[str]:
    for number, group in enumerate(several, 1):
        cards = (
            _card(photo, photo.place, _badge(photo), _text(place_phrase(photo, len(group))))
            for photo in group
        )
        heading = f"Group {number}: {_named(group)}"
        yield from _section(f"g{number}", heading, _list(cards))
    if single:
        cards = (_card(photo, None, "", "") for photo in single)
        yield from _section("single", "Single photos", _list(cards))


def _failed(failures: tuple[Failure, ...]) -> Iterator[str]:
    if failures:
        told = (
            f"<li>{_text(failure_line(failure.path, str(failure.error)))}</li>\n"
            for failure in failures
        )
        heading = f"{_counted(len(failures), 'photo')} could not be judged"
        yield from _section("failed", heading, ['<ul class="failed">\n', *told, "</ul>\n"])


def _section(name: str, heading: str, body: Iterable[str]) -> Iterator[str]:
    yield f'<section aria-labelledby="{name}">\n<h2 id="{name}">{heading}</h2>\n'
    yield from body
    yield "</section>\n"


def _list(cards: Iterable[str]) -> Iterator[str]:
    yield "<ol>\n"
    yield from cards
    yield "</ol>\n"


def _card(photo: RankedPhoto | CulledPhoto, place: int | None, mark: str, facts: str) -> str:
    score = photo.score
    low, high = max(LOWEST, score - Z95 * photo.std), min(HIGHEST, score + Z95 * photo.std)
    badge = f'<span class="badge">{mark}</span> ' if mark else ""
    lead = "" if place is None else f"{place}. "
    summary = f"<p>{_text(photo.summary)}</p>\n" if photo.summary else ""
    told = f'<p class="soft">{facts}</p>\n' if facts else ""
    return (
        f'<li class="photo{" best" if mark else ""}">\n'
        f'<div class="thumb">{_thumbnail(photo.path)}</div>\n'
        f'<p class="name">{lead}{badge}{_text(photo.path)}</p>\n'
        f'<p><span class="score">{score:.2f}</span> {quality_word(score)} '
        f'<span class="soft">(95 % interval {low:.2f} to {high:.2f})</span></p>\n'
        f'<div class="scale" aria-hidden="true">'
        f'<i style="left:{_share(low):.1f}%;right:{100 - _share(high):.1f}%"></i>'
        f'<b style="left:{_share(score):.1f}%"></b></div>\n'
        f"{summary}{told}</li>\n"
    )


def _thumbnail(path: str) -> str:
    """A photo as an image element that holds it; words where it cannot be read any more."""
    try:
        small = Image.fromarray(load_pixels(path).array)
    except ImageError:
        return '<span class="soft">no picture</span>'
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS, reducing_gap=2.0)
    file = io.BytesIO()
    small.save(file, "JPEG", quality=THUMBNAIL_QUALITY)
    data = base64.b64encode(file.getvalue()).decode("ascii")
    width, height = small.size
    return (
        f'<img src="data:image/jpeg;base64,{data}" width="{width}" height="{height}" '
        f'alt="{_text(os.path.basename(path))}" loading="lazy" decoding="async">'
    )


def _moved(photo: RankedPhoto) -> str:
    direction = "up" if photo.places > 0 else "down"
    moved = f", {_counted(abs(photo.places), 'place')} {direction}" if photo.places else ""
    return f"{photo.alone:.2f} alone, compared with {photo.compared}{moved}"


def _named(group: tuple[CulledPhoto, ...]) -> str:
    first, count = group[0], f"{len(group)} shots"
    return f"{first.kind} of {count}, kept whole" if first.in_series else count


def _badge(photo: CulledPhoto) -> str:
    if photo.in_series:
        return "kept"
    return "best" if photo.best else ""


def _share(score: float) -> float:
    """Where a score lies on its scale, in percent."""
    return 100.0 * (score - LOWEST) / (HIGHEST - LOWEST)


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _text(text: str) -> str:
    """A text that stands for itself in HTML, within quotes too, with controls escaped."""
    return escape(one_line(text), quote=True)
