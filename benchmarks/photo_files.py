"""Files of photographs as cameras and phones write them, made from pictures by program."""

from __future__ import annotations

import io
import struct
from collections.abc import Mapping

import numpy as np
import pillow_heif
from PIL import ExifTags, Image
from PIL.TiffImagePlugin import IFDRational
from pylibjxl.pillow_plugin import register_pillow

from meiqa.engine.files import ORIENTATION

SENSOR = (64, 96)
"""Rows and columns of the sensor of the RAW files that are made."""


def exif_bytes(orientation: int) -> bytes:
    """Make EXIF that says how a photo was held, by what camera, when and at what exposure."""
    exif = Image.Exif()
    exif[ORIENTATION], exif[271], exif[272] = orientation, "Maker", "Camera of some length"
    exif.get_ifd(ExifTags.IFD.Exif).update(
        {
            36867: "2026:05:01 12:00:00",
            37521: "25",
            33434: IFDRational(1, 125),
            33437: IFDRational(28, 10),
            34855: 200,
            37380: IFDRational(-2, 3),
            37386: IFDRational(50, 1),
        }
    )
    return exif.tobytes()


WAYS: Mapping[str, tuple[tuple[str, str, Mapping[str, object]], ...]] = {
    "JPEG": (
        ("RGB", "JPEG", {"quality": 90, "exif": exif_bytes(1)}),
        ("RGB", "JPEG", {"quality": 60, "progressive": True}),
        ("L", "JPEG", {}),
        ("CMYK", "JPEG", {}),
    ),
    "PNG": (
        ("RGB", "PNG", {"exif": exif_bytes(3)}),
        ("RGBA", "PNG", {}),
        ("P", "PNG", {}),
        ("I;16", "PNG", {}),
    ),
    "WebP": (
        ("RGB", "WEBP", {"quality": 80, "exif": exif_bytes(6)}),
        ("RGBA", "WEBP", {"lossless": True}),
    ),
    "TIFF": (
        ("RGB", "TIFF", {}),
        ("RGB", "TIFF", {"compression": "tiff_lzw"}),
        ("L", "TIFF", {"compression": "tiff_adobe_deflate"}),
        ("RGB", "TIFF", {"compression": "jpeg"}),
    ),
    "GIF": (("P", "GIF", {}), ("L", "GIF", {"interlace": 1})),
    "BMP": (("RGB", "BMP", {}), ("P", "BMP", {}), ("1", "BMP", {})),
    "HEIC": (("RGB", "HEIF", {"quality": 80, "exif": exif_bytes(1)}), ("RGBA", "HEIF", {})),
    "AVIF": (("RGB", "AVIF", {"quality": 80, "exif": exif_bytes(1)}), ("RGBA", "AVIF", {})),
    "JXL": (("RGB", "JXL", {}), ("RGB", "JXL", {"lossless": True})),
}
"""For each format the modes and options in which it is written: (mode, Pillow's name, options)."""


def register_writers() -> None:
    """Let Pillow write what phones write."""
    pillow_heif.register_heif_opener()
    register_pillow()


def files_of(picture: Image.Image) -> dict[str, list[bytes]]:
    """Write a picture in every format that is read, several ways each."""
    made = {
        format: [file_of(picture, format, way) for way in range(len(ways))]
        for format, ways in WAYS.items()
    }
    preview = encoded(picture.convert("RGB"), "JPEG", {"quality": 90})
    return made | {"DNG": [raw_file(preview), raw_file(None)]}


def file_of(picture: Image.Image, format: str, way: int = 0) -> bytes:
    """Write a picture in one of the ways of a format."""
    register_writers()
    mode, name, options = WAYS[format][way % len(WAYS[format])]
    return encoded(picture.convert(mode), name, options)


def encoded(picture: Image.Image, format: str, options: Mapping[str, object]) -> bytes:
    """Write a picture as Pillow does."""
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


def tiff_directory(tags: dict[int, tuple[int, list[int] | bytes]], place: int) -> bytes:
    """Lay out a TIFF directory that begins at a place: {tag: (type, values)}."""
    codes = {1: "B", 2: "s", 3: "H", 4: "I", 5: "I", 10: "i"}
    entries, behind = b"", b""
    end = place + 2 + 12 * len(tags) + 4
    for tag, (kind, values) in sorted(tags.items()):
        data = (
            values
            if isinstance(values, bytes)
            else struct.pack(f"<{len(values)}{codes[kind]}", *values)
        )
        count = len(values) // (2 if kind in (5, 10) else 1)
        if len(data) <= 4:
            entries += struct.pack("<HHI4s", tag, kind, count, data)
        else:
            entries += struct.pack("<HHII", tag, kind, count, end + len(behind))
            behind += data + b"\0" * (len(data) % 2)
    return struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0) + behind


def raw_file(preview: bytes | None, samples: np.ndarray | None = None, turned: int = 1) -> bytes:
    """Make a DNG: its preview a JPEG, its sensor grey unless samples are given."""
    rows, columns = SENSOR
    if samples is None:
        samples = np.full(SENSOR, 20_000, "<u2")
    matrix = [10_000, 10_000, 0, 10_000, 0, 10_000]
    matrix += [0, 10_000, 10_000, 10_000, 0, 10_000, 0, 10_000, 0, 10_000, 10_000, 10_000]
    sensor: dict[int, tuple[int, list[int] | bytes]] = {
        254: (4, [0]), 256: (4, [columns]), 257: (4, [rows]), 258: (3, [16]), 259: (3, [1]),
        262: (3, [32803]), 273: (4, [8]), 277: (3, [1]), 278: (4, [rows]),
        279: (4, [samples.nbytes]), 33421: (3, [2, 2]), 33422: (1, [0, 1, 1, 2]),
        50717: (4, [65535]),
    }  # fmt: skip
    about: dict[int, tuple[int, list[int] | bytes]] = {
        271: (2, b"Maker\0"), 272: (2, b"Camera\0"), 274: (3, [turned]),
        50706: (1, [1, 4, 0, 0]), 50708: (2, b"Maker Camera\0"), 50721: (10, matrix),
        33434: (5, [1, 125]), 34855: (3, [200]), 36867: (2, b"2026:05:01 12:00:00\0"),
        50778: (3, [21]),
    }  # fmt: skip
    head, pixels = b"II*\0" + struct.pack("<I", 8 + samples.nbytes), samples.tobytes()
    if preview is None:
        return head + pixels + tiff_directory(sensor | about, 8 + len(pixels))
    width, height = Image.open(io.BytesIO(preview)).size
    first = about | {
        254: (4, [1]), 256: (4, [width]), 257: (4, [height]), 258: (3, [8, 8, 8]), 259: (3, [7]),
        262: (3, [6]), 273: (4, [0]), 277: (3, [3]), 278: (4, [height]),
        279: (4, [len(preview)]), 330: (4, [0]),
    }  # fmt: skip
    place = 8 + len(pixels)
    end = place + len(tiff_directory(first, place))
    first |= {273: (4, [end]), 330: (4, [end + len(preview) + len(preview) % 2])}
    padded = preview + b"\0" * (len(preview) % 2)
    behind = tiff_directory(sensor, end + len(padded))
    return head + pixels + tiff_directory(first, place) + padded + behind
