"""A folder as people have it, and whether `meiqa score` counts it right.

    python -m benchmarks.mixed_folder DIR [--photos 1000] [--pictures PICTURES]

Makes DIR, which must not exist, with photos of every format, RAW files beside their JPEGs,
brackets, files without a suffix, sidecars, videos, thumbnails and bins; scores it, and compares
what was scored and what was passed over with what was made. Pictures are drawn, or taken from a
folder.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.photo_files import file_of, raw_file
from meiqa.folders import Gathered, gather

SIZE = (320, 240)
PHOTOS_IN_A_FOLDER = 40
SUFFIXES = {
    **{"JPEG": ".jpg", "PNG": ".PNG", "WebP": ".webp", "TIFF": ".tif", "GIF": ".gif"},
    **{"BMP": ".bmp", "HEIC": ".HEIC", "AVIF": ".avif", "JXL": ".jxl"},
}
EXIF, EXPOSURE_TIME, EXPOSURE_BIAS, TAKEN = 0x8769, 0x829A, 0x9204, 0x9003
BRACKET = (-2.0, 0.0, 2.0)


@dataclass
class Made:
    """What was made: the photos that are to be scored, and the counts of what is passed over."""

    folder: Path
    photos: set[str] = field(default_factory=set)
    passed_over: Counter[str] = field(default_factory=Counter)

    def photo(self, name: str, data: bytes) -> None:
        """Write one that is to be scored."""
        self.photos.add(str(self._write(name, data)))

    def other(self, name: str, data: bytes, kind: str) -> None:
        """Write one that is to be passed over."""
        self._write(name, data)
        self.passed_over[kind] += 1

    def unseen(self, name: str, data: bytes) -> None:
        """Write one that is not even counted."""
        self._write(name, data)

    def _write(self, name: str, data: bytes) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path


def make_folder(folder: Path, photos: int, pictures: Path | None) -> Made:
    """Make a folder with so many photos that are to be scored."""
    made, shown = Made(folder), _pictures(pictures)
    for number in itertools.count():
        inner = f"2026-{number // PHOTOS_IN_A_FOLDER:03}"
        if number % PHOTOS_IN_A_FOLDER == 0:
            _add_surroundings(made, inner)
        left = photos - len(made.photos)
        if not left:
            return made
        _add_shot(made, f"{inner}/IMG_{number:04}", next(shown), number, left)
    raise AssertionError("unreachable")


def _add_shot(made: Made, stem: str, picture: Image.Image, number: int, left: int) -> None:
    """Add what one press of the shutter leaves, at most `left` photos."""
    jpeg, way = file_of(picture, "JPEG"), number % (len(SUFFIXES) + 5)
    if way < len(SUFFIXES):
        format, suffix = [*SUFFIXES.items()][way]
        made.photo(f"{stem}{suffix}", file_of(picture, format, number))
        if format in ("HEIC", "JPEG"):
            made.other(f"{stem}.{'AAE' if format == 'HEIC' else 'xmp'}", b"<x/>", "sidecar")
        if format == "HEIC":  # a live photo's second half
            made.other(f"{stem}.MOV", b"\0\0\0\x14ftypqt  ", "video")
    elif way == len(SUFFIXES):
        made.photo(f"{stem}.JPG", jpeg)
        made.other(f"{stem}.DNG", raw_file(jpeg), "RAW twin")
    elif way == len(SUFFIXES) + 1:
        made.photo(f"{stem}.dng", raw_file(jpeg))
    elif way == len(SUFFIXES) + 2:
        made.photo(stem, file_of(picture, ("JPEG", "HEIC", "WebP")[number % 3]))
    elif way == len(SUFFIXES) + 3:
        made.photo(f"{stem}.mpo", _stereo(picture))
    else:
        for place, bias in enumerate(BRACKET[:left]):
            made.photo(f"{stem}_{place}.jpg", _exposed(picture, bias, number))


def _add_surroundings(made: Made, inner: str) -> None:
    """Add what cameras, systems and people leave beside photos."""
    jpeg = file_of(Image.new("RGB", (64, 48), "grey"), "JPEG")
    made.other(f"{inner}/clip.mp4", b"\0\0\0\x18ftypisom" + bytes(64), "video")
    made.other(f"{inner}/takeout.json", b"{}", "sidecar")
    made.other(f"{inner}/invoice.pdf", b"%PDF-1.7\n", "other file")
    made.other(f"{inner}/README", b"no photo\n", "other file")
    for name in ("@eaDir", ".thumbnails", "#recycle"):
        made.other(f"{inner}/{name}/IMG_0001.jpg", jpeg, "hidden folder")
    for name in (".DS_Store", "._IMG_0001.jpg"):
        made.unseen(f"{inner}/{name}", jpeg)


def _pictures(folder: Path | None) -> Iterator[Image.Image]:
    """Give pictures without end."""
    if folder is not None:
        for path in itertools.cycle(gather([str(folder)]).photos):
            with Image.open(path) as image:
                yield image.convert("RGB").resize(SIZE)
    for number in itertools.count():
        random = np.random.default_rng(number)
        coarse = Image.fromarray(random.integers(0, 256, (6, 8, 3), np.uint8))
        smooth = np.asarray(coarse.resize(SIZE, Image.Resampling.BICUBIC), np.float32)
        noisy = smooth + random.normal(0, random.uniform(0, 30), smooth.shape)
        yield Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def _stereo(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "MPO", save_all=True, append_images=[picture])
    return file.getvalue()


def _exposed(picture: Image.Image, bias: float, number: int) -> bytes:
    exif, file = Image.Exif(), io.BytesIO()
    exif[EXIF] = {
        EXPOSURE_TIME: 2.0**bias / 60,
        EXPOSURE_BIAS: bias,
        TAKEN: f"2026:06:01 12:{number // 60 % 60:02}:{number % 60:02}",
    }
    picture.point(lambda tone: int(min(255, tone * 2 ** (bias / 2)))).save(file, "JPEG", exif=exif)
    return file.getvalue()


def check_folder(made: Made) -> dict[str, Any]:
    """Score the folder, and compare.

    Returns:
        `scored`, `passed_over`, and `wrong`: what differs from what was made, in words.
    """
    command = [sys.executable, "-m", "meiqa", "score", str(made.folder), "--format", "json"]
    run = subprocess.run([*command, "--no-learn", "--k", "0"], capture_output=True, text=True)
    rows = json.loads(run.stdout)
    scored = Counter(row["path"] for row in rows if "score" in row)
    expected = Gathered(photos=[*made.photos], passed_over=made.passed_over)
    wrong = [
        *(f"not scored: {path}" for path in sorted(made.photos - scored.keys())),
        *(f"scored, though to be passed over: {path}" for path in scored.keys() - made.photos),
        *(f"scored twice: {path}" for path, times in scored.items() if times > 1),
    ]
    if str(expected) not in run.stderr:
        wrong.append(f"not told: {expected}; told: {run.stderr.strip()}")
    if run.returncode:
        wrong.append(f"exit code {run.returncode}")
    return {"scored": len(scored), "passed_over": dict(made.passed_over), "wrong": wrong}


def main(argv: list[str] | None = None) -> int:
    """Command line; 1 if anything is counted wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mixed_folder", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="made, so it must not exist")
    parser.add_argument("--photos", type=int, default=1000)
    parser.add_argument("--pictures", type=Path, help="a folder of photos; drawn by default")
    options = parser.parse_args(argv)
    options.folder.mkdir(parents=True)
    found = check_folder(make_folder(options.folder, options.photos, options.pictures))
    print(json.dumps(found, indent=2))
    return 1 if found["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
