"""Reports for people: one HTML file with thumbnails, which needs no script and no other file."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import TextIO

from PIL import Image

from meiqa.engine.images import load_pixels
from meiqa.errors import ImageError, OutputUnwritable, one_line
from meiqa.types import CulledPhoto, Culling, Failure, RankedPhoto, Ranking, quality_word

__all__ = ["Report", "open_report"]

THUMBNAIL_SIDE = 240
THUMBNAIL_QUALITY = 78
LOWEST, HIGHEST = 1.0, 5.0
Z95 = 1.959964

_HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --back: #fff; --ink: #1b1f24; --soft: #57606a; --line: #d0d7de;
 --card: #f6f8fa; --mark: #0a5c36; --on-mark: #fff; --bar: #0550ae; }}
@media (prefers-color-scheme: dark) {{ :root {{ --back: #0d1117; --ink: #e6edf3; --soft: #9ba5b0;
 --line: #3d444d; --card: #161b22; --mark: #7ee2a8; --on-mark: #04260f; --bar: #79b8ff; }} }}
body {{ margin: 0 auto; padding: 1rem; max-width: 72rem; background: var(--back); color: var(--ink);
 font: 1rem/1.45 system-ui, sans-serif; }}
h1 {{ font-size: 1.5rem; }} h2 {{ font-size: 1.1rem; margin: 0 0 .5rem; }}
.soft {{ color: var(--soft); }}
ol, ul.failed {{ padding: 0; }} ol {{ list-style: none; margin: 0; display: grid; gap: 1rem;
 grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); }}
section {{ border-top: 1px solid var(--line); padding: 1rem 0; content-visibility: auto;
 contain-intrinsic-size: auto 22rem; }}
li.photo {{ background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
 padding: .6rem; content-visibility: auto; contain-intrinsic-size: auto 22rem; }}
li.best {{ border: 3px solid var(--mark); }}
.badge {{ background: var(--mark); color: var(--on-mark); border-radius: .3rem; padding: 0 .4rem;
 font-weight: 600; }}
.thumb {{ display: grid; place-items: center; height: 12rem; }}
.thumb img {{ max-width: 100%; max-height: 12rem; }}
p {{ margin: .3rem 0; }} .name {{ overflow-wrap: anywhere; font-weight: 600; }}
.score {{ font-size: 1.25rem; font-variant-numeric: tabular-nums; }}
.scale {{ position: relative; height: .5rem; border-radius: .25rem; background: var(--line); }}
.scale i {{ position: absolute; top: 0; bottom: 0; border-radius: .25rem; background: var(--bar);
 opacity: .45; }}
.scale b {{ position: absolute; top: -.2rem; bottom: -.2rem; width: .2rem; margin-left: -.1rem;
 background: var(--bar); }}
.failed li {{ margin-left: 1.2rem; overflow-wrap: anywhere; }}
@media print {{ section, li.photo {{ break-inside: avoid; content-visibility: visible; }} }}
</style>
</head>
<body>
<main>
<h1>{title}</h1>
<p class="soft">{note}</p>
"""
_TAIL = "</main>\n</body>\n</html>\n"


class Report:
    """Writes one page; see `open_report`."""

    def __init__(self, stream: TextIO, path: Path) -> None:
        self._stream, self._path = stream, path

    def write_ranking(self, ranking: Ranking) -> None:
        """Write photos best first."""
        count = _counted(len(ranking.photos), "photo")
        note = f"{count}, best first, each compared with those next to it. {_SCALE}"
        self._put(_HEAD.format(title="Ranking", note=note))
        self._put("<ol>\n")
        for photo in ranking.photos:
            self._photo(photo, f"{photo.rank}", best=photo.rank == 1, facts=_moved(photo))
        self._put("</ol>\n")
        self._end(ranking.failures)

    def write_culling(self, culling: Culling) -> None:
        """Write groups of several shots first, each with its best in front, then single photos."""
        several = [group for group in culling.groups if len(group) > 1]
        single = [group[0] for group in culling.groups if len(group) == 1]
        shots = sum(map(len, several))
        note = (
            f"{_counted(shots, 'photo')} in {_counted(len(several), 'group')} of near-identical "
            f"shots, and {len(single)} without another like it. Of each group the best is marked. "
            f"{_SCALE}"
        )
        self._put(_HEAD.format(title="Best shots", note=note))
        for number, group in enumerate(several, 1):
            heading = f"Group {number}: {len(group)} shots"
            self._put(f'<section aria-labelledby="g{number}">\n<h2 id="g{number}">{heading}</h2>\n')
            self._put("<ol>\n")
            for photo in group:
                self._photo(photo, f"{photo.place}", best=photo.place == 1, facts=_likeness(photo))
            self._put("</ol>\n</section>\n")
        if single:
            self._put('<section aria-labelledby="single">\n<h2 id="single">Single photos</h2>\n')
            self._put("<ol>\n")
            for photo in single:
                self._photo(photo, "", best=False, facts="")
            self._put("</ol>\n</section>\n")
        self._end(culling.failures)

    def _photo(
        self, photo: RankedPhoto | CulledPhoto, place: str, *, best: bool, facts: str
    ) -> None:
        """One card."""
        name, score = _text(photo.path), photo.score
        low, high = max(LOWEST, score - Z95 * photo.std), min(HIGHEST, score + Z95 * photo.std)
        badge = '<span class="badge">best</span> ' if best else ""
        lead = f"{place}. " if place else ""
        summary = f"<p>{_text(photo.summary)}</p>\n" if photo.summary else ""
        told = f'<p class="soft">{facts}</p>\n' if facts else ""
        self._put(
            f'<li class="photo{" best" if best else ""}">\n'
            f'<div class="thumb">{_thumbnail(photo.path)}</div>\n'
            f'<p class="name">{lead}{badge}{name}</p>\n'
            f'<p><span class="score">{score:.2f}</span> {quality_word(score)} '
            f'<span class="soft">(95 % interval {low:.2f} to {high:.2f})</span></p>\n'
            f'<div class="scale" aria-hidden="true">'
            f'<i style="left:{_share(low):.1f}%;right:{100 - _share(high):.1f}%"></i>'
            f'<b style="left:{_share(score):.1f}%"></b></div>\n'
            f"{summary}{told}</li>\n"
        )

    def _end(self, failures: tuple[Failure, ...]) -> None:
        if failures:
            heading = f"{_counted(len(failures), 'photo')} could not be judged"
            self._put(f'<section aria-labelledby="failed">\n<h2 id="failed">{heading}</h2>\n')
            self._put('<ul class="failed">\n')
            for failure in failures:
                path, error = _text(failure.path), _text(str(failure.error))
                told = error if path in error else f"{path}: {error}"
                self._put(f"<li>{told}</li>\n")
            self._put("</ul>\n</section>\n")
        self._put(_TAIL)
        with _disk_errors(self._path):
            self._stream.flush()

    def _put(self, text: str) -> None:
        with _disk_errors(self._path):
            self._stream.write(text)


_SCALE = "Scores go from 1.00 to 5.00, higher is better."


@contextmanager
def open_report(path: str | Path) -> Iterator[Report]:
    """Open a report, which has its name once it is whole; one that is there is replaced.

    It is opened before the work, so that a place that cannot be written is refused at once.

    Raises:
        OutputUnwritable: the disk refuses.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with _disk_errors(path):
            if path.is_dir():
                raise IsADirectoryError(None, "it is a directory")
            # Names that are not UTF-8 are written with escapes.
            stream = unfinished.open("w", encoding="utf-8", errors="backslashreplace")
        with stream:
            yield Report(stream, path)
        with _disk_errors(path):
            os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputUnwritable(f"cannot write {path}", seen=error.strerror) from error


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


def _likeness(photo: CulledPhoto) -> str:
    like = "" if photo.place == 1 else f", likeness to the best {photo.likeness:.2f}"
    return f"{photo.alone:.2f} alone{like}"


def _share(score: float) -> float:
    """Where a score lies on its scale, in percent."""
    return 100.0 * (score - LOWEST) / (HIGHEST - LOWEST)


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _text(text: str) -> str:
    """A text that stands for itself in HTML, within quotes too, with controls escaped."""
    return escape(one_line(text), quote=True)
