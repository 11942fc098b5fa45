"""Files of photographs: what they are by name and first bytes, and the library that reads them."""

from __future__ import annotations

import importlib
import io
import os
import struct
import zlib
from functools import cache
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from meiqa.engine.colour import ADOBE_RGB, SAYS_COLOURS, cicp_of
from meiqa.errors import DecodeError, install_hint


def suffixes(names: str) -> frozenset[str]:
    """Make the set of suffixes, in lower case, of names with spaces between them."""
    return frozenset(f".{name}" for name in names.split())


RAW_SUFFIXES = suffixes(
    "3fr arw cr2 cr3 crw dcr dng erf fff iiq kdc mef mos mrw nef nrw orf pef raf rw2 rwl sr2 srf "
    "srw x3f"
)
"""Suffixes of what cameras' sensors saw: what LibRaw reads."""
IMAGE_SUFFIXES = RAW_SUFFIXES | suffixes(
    "avif bmp gif heic heif hif jfif jp2 jpe jpeg jpg jxl mpo pgm png pnm ppm tif tiff webp"
)
"""Suffixes by which a photograph is recognised in a folder."""

# Photographs only: Pillow's other plugins run Ghostscript, follow references or hold no photo.
_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_JXL = (b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n")
_RAW_HEADS = (b"FUJIFILMCCD-RAW", b"IIRO", b"IIRS", b"MMOR", b"IIU\0", b"\0MRM", b"FOVb")
_AVIF_BRANDS, _HEIF_BRANDS = {b"avif", b"avis"}, {b"heic", b"heix", b"heim", b"heis", b"mif1"}
_HEAD_BYTES = 1 << 16
_IMAGE_MAGIC = (_JPEG, _PNG, b"GIF8", b"\0\0\0\x0cjP  ", *_TIFF, *_JXL, *_RAW_HEADS)
# What a PNG's pixels and colours hang on; the rest is metadata.
_PNG_NEEDED = frozenset(b"IHDR PLTE IDAT IEND tRNS gAMA cHRM sRGB iCCP cICP eXIf".split())
_LARGEST_PNG_PROFILE = 1 << 20
"""Bytes of a profile, or of a text, that Pillow unpacks."""
_SUBFILE, _MAKE, _DNG_VERSION = 254, 271, 50706
_BITS, _COMPRESSION, _PHOTOMETRIC, _SAMPLES, _PLANES, _SAMPLE_FORMAT = 258, 259, 262, 277, 284, 339
ORIENTATION, _INTEROPERABILITY = 274, 0xA005
_ORIENTATION_OF_FLIP = {3: 3, 5: 8, 6: 6}
"""EXIF's orientation for LibRaw's."""
_SAMPLE_FORMATS = {2: "signed integer", 3: "floating-point", 5: "complex", 6: "complex"}


def looks_like_photo(head: bytes) -> bool:
    """Tell from the first 32 bytes of a file whether it is likely to be a photograph."""
    webp = head[:4] == b"RIFF" and head[8:12] == b"WEBP"
    return webp or head.startswith(_IMAGE_MAGIC) or _heif_kind(head) is not None


def opened(stream: IO[bytes], name: str) -> Image.Image:
    """Open a file of a photograph with the library for it; pixels are read later.

    Raises:
        DecodeError: the library isn't installed, or the file is of a kind that isn't read.
    """
    head = stream.read(_HEAD_BYTES)
    stream.seek(0)
    kind = _heif_kind(head)
    image: Image.Image
    if kind == "HEIF":
        image = _library("pillow_heif", name, "HEIF").HeifImageFile(stream, name)
    elif head.startswith(_JXL):
        image = _library("pylibjxl.pillow_plugin", name, "JPEG XL").JxlImageFile(stream, name)
    else:
        image = _pillow(stream, head)
    # A PNG says it before its pixels, which may hold any bytes.
    says = head.partition(b"IDAT")[0] if head.startswith(_PNG) else head if kind else None
    if says and (cicp := cicp_of(says)):
        image.info["cicp"] = cicp
    return image


def said_of_colours(image: Image.Image) -> dict[Any, Any]:
    """Give what a loaded image says of its colours, for `to_srgb`; nothing if they are sRGB's."""
    if image.info.keys() & SAYS_COLOURS:
        return image.info
    try:  # cameras say Adobe RGB in EXIF alone, as DCF has it
        camera = image.format in ("JPEG", "MPO")
        index = image.getexif().get_ifd(_INTEROPERABILITY).get(1) if camera else None
    except Exception:  # unreadable EXIF is no reason to refuse the pixels
        return {}
    return ADOBE_RGB if str(index).startswith("R03") else {}


def is_raw(stream: IO[bytes], name: str) -> bool:
    """Tell whether a file holds what a camera's sensor saw, by its suffix or by its first bytes."""
    head = stream.read(_HEAD_BYTES)
    stream.seek(0)
    if os.path.splitext(name)[1].lower() in RAW_SUFFIXES or head.startswith(_RAW_HEADS):
        return not head.startswith((_JPEG, _PNG))
    if head[4:12] == b"ftypcrx " or head[8:10] == b"CR":
        return True
    try:
        tags = _tiff_tags(stream)
    except Exception:  # hostile bytes make Pillow's plugins raise nearly anything
        tags = {}
    stream.seek(0)
    # A camera's TIFF that begins with a thumbnail holds the sensor's samples behind it.
    return _DNG_VERSION in tags or (tags.get(_SUBFILE) == 1 and _MAKE in tags)


def exif_of(image: Image.Image) -> dict[int, Any]:
    """Give the EXIF of an opened file by tag; what is unreadable is left out."""
    try:
        return _told(image.getexif())
    except Exception:  # hostile bytes make Pillow's plugins raise nearly anything
        return {}


def raw_exif(stream: IO[bytes]) -> dict[int, Any]:
    """Give the EXIF of a RAW file that is built as a TIFF, as most are; nothing of others."""
    exif, is_tiff = Image.Exif(), stream.read(4) in _TIFF
    stream.seek(0)
    try:
        if is_tiff:
            exif.load_from_fp(stream)
        return _told(exif)
    except Exception:  # hostile bytes make Pillow's plugins raise nearly anything
        return {}
    finally:
        stream.seek(0)


def _told(exif: Image.Exif) -> dict[int, Any]:
    """The tags of a photo and of its exposure, without a maker's own, which are long."""
    tags = {**exif, **exif.get_ifd(ExifTags.IFD.Exif)}
    return {tag: value for tag, value in tags.items() if not isinstance(value, bytes)}


def raw_picture(stream: IO[bytes], name: str, *, develop: bool) -> Image.Image | bytes:
    """Give the largest preview in a RAW file, a JPEG or an image, or the developed picture.

    A file without a preview is developed, which takes a second or two.
    """
    rawpy = _library("rawpy", name, "RAW")
    try:
        with rawpy.imread(stream) as raw:
            preview = None if develop else _raw_preview(rawpy, raw)
            return preview or _image_of(raw.postprocess(use_camera_wb=True))
    except rawpy.LibRawError as error:
        raise DecodeError(f"{name} is no RAW file that LibRaw reads: {error}") from None


def readable_formats() -> str:
    """Name what is read, for messages."""
    Image.init()
    own = [name for name in _FORMATS if name in Image.OPEN and name != "MPO"]
    return ", ".join(sorted([*own, "HEIF", "JPEG XL", "RAW"]))


def loaded(image: Image.Image, notes: list[str]) -> Image.Image:
    """Read the pixels of an opened file; `notes` gets a line if a JPEG's are damaged.

    Libjpeg makes something of whatever it is given, and only warns. Pillow doesn't hear that;
    simplejpeg does, whose pixels are the same, bit for bit. Without it Pillow reads alone.
    """
    decoder = _found("simplejpeg") if image.format in ("JPEG", "MPO") else None
    colours = {"L": "GRAY", "RGB": "RGB"}.get(image.mode)
    if decoder is None or colours is None:
        image.load()
        return image
    assert isinstance(image, ImageFile.ImageFile)
    assert image.fp is not None
    image.fp.seek(0)
    data = image.fp.read()

    def strictly(data: bytes) -> Image.Image:
        pixels = decoder.decode_jpeg(data, colours, strict=True)
        return Image.fromarray(pixels[:, :, 0] if colours == "GRAY" else pixels)

    try:
        return strictly(data)
    except ValueError as error:
        warning = str(error)
    try:
        image.load()
    except OSError:
        try:
            return strictly(data + b"\xff\xd9")  # nothing but the end marker was missing
        except ValueError:
            pass
        raise
    if warning.startswith("Corrupt JPEG data"):
        notes.append(f"pixels damaged: {warning}")
    return image


def without_metadata(stream: IO[bytes]) -> tuple[IO[bytes], list[str]] | None:
    """Give a PNG without its texts and whatever else of it is no pixel, None for other files.

    Pillow refuses a photo whose text is damaged or unpacks to much. A profile that is left out is
    named in the notes beside it.
    """
    stream.seek(0)
    data = stream.read()
    if not data.startswith(_PNG):
        return None
    kept, notes, place = [_PNG], list[str](), len(_PNG)
    while place + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        chunk = data[place : place + 12 + length]
        if kind in _PNG_NEEDED:
            if kind == b"iCCP" and not _profile_unpacks(chunk):
                notes.append("colour profile damaged or too large: taken as sRGB")
            else:
                kept.append(chunk)
        place += len(chunk)
    return io.BytesIO(b"".join(kept)), notes


def describe_tiff(stream: IO[bytes]) -> str | None:
    """Say what the samples of a TIFF are like, None if it is none or can't be said."""
    stream.seek(0)
    try:
        tags = _tiff_tags(stream)
    except Exception:  # hostile bytes make Pillow's plugins raise nearly anything
        return None
    if not tags:
        return None
    bits = tags.get(_BITS, (1,))
    samples, planes = tags.get(_SAMPLES, 1), tags.get(_PLANES, 1) == 2
    said = _SAMPLE_FORMATS.get(tags.get(_SAMPLE_FORMAT, (1,))[0], "")
    words = f"{samples} x {max(bits)}-bit {said} samples".replace("  ", " ")
    words += ", in separate planes" if planes else ""
    return f"{words}, compression {_compression(tags.get(_COMPRESSION, 1))}"


def misread_tiff(image: Image.Image) -> bool:
    """Tell whether Pillow opens a TIFF that it would read wrongly, or not at all."""
    tags: Any = getattr(image, "tag_v2", {})
    separate = tags.get(_PLANES, 1) == 2 and max(tags.get(_BITS, (1,))) > 8
    return bool(separate or image.info.get("compression") == "webp")


def is_negative(image: Image.Image) -> bool:
    """Tell whether the samples of a 16-bit TIFF are darker the higher they are."""
    tags: Any = getattr(image, "tag_v2", {})
    return bool(tags.get(_PHOTOMETRIC) == 0)


def _pillow(stream: IO[bytes], head: bytes) -> Image.Image:
    """Open with the first plugins that can: a process that scores a JPEG needs no others.

    Loading Pillow's usual ones takes 5 ms, and loading all of them 20 ms.
    """
    if head.startswith(_JPEG):
        from PIL.JpegImagePlugin import jpeg_factory

        try:
            return jpeg_factory(stream, "")
        except (SyntaxError, IndexError, TypeError, struct.error):
            stream.seek(0)  # damaged: refused below
    Image.preinit()
    try:
        return Image.open(stream, formats=[name for name in _FORMATS if name in Image.OPEN])
    except UnidentifiedImageError:
        Image.init()
        return Image.open(stream, formats=[name for name in _FORMATS if name in Image.OPEN])


def _heif_kind(head: bytes) -> str | None:
    if head[4:8] != b"ftyp":
        return None
    size = int.from_bytes(head[:4], "big")
    brands = {head[8:12], *(head[at : at + 4] for at in range(16, min(size, len(head)), 4))}
    if brands & _AVIF_BRANDS:
        return "AVIF"
    return "HEIF" if brands & _HEIF_BRANDS else None


def _tiff_tags(stream: IO[bytes]) -> Any:
    """Read the tags of a TIFF's first picture; none of other files."""
    head = stream.read(8)
    if not head.startswith(_TIFF):
        return {}
    from PIL.TiffImagePlugin import ImageFileDirectory_v2  # takes 5 ms, and few photos are TIFFs

    if head[2] == 43 or head[3] == 43:
        head += stream.read(8)
    tags = ImageFileDirectory_v2(head)
    stream.seek(tags.next)
    tags.load(stream)
    return tags


def _compression(number: int) -> str:
    from PIL.TiffImagePlugin import COMPRESSION_INFO

    return str(COMPRESSION_INFO.get(number, number))


def _raw_preview(rawpy: Any, raw: Any) -> Image.Image | bytes | None:
    try:
        preview = raw.extract_thumb()
    except rawpy.LibRawError:
        return None
    if preview.format == rawpy.ThumbFormat.JPEG:
        return bytes(preview.data)
    image = _image_of(preview.data)
    image.getexif()[ORIENTATION] = _ORIENTATION_OF_FLIP.get(raw.sizes.flip, 1)
    return image


def _image_of(samples: NDArray[np.uint8]) -> Image.Image:
    """Make an image of samples (H, W, C); a sensor without colours gives one channel."""
    return Image.fromarray(samples[:, :, 0] if samples.shape[2:] == (1,) else samples)


def _profile_unpacks(chunk: bytes) -> bool:
    """Tell whether a PNG's profile is whole, and no larger than Pillow unpacks."""
    if zlib.crc32(chunk[4:-4]) != int.from_bytes(chunk[-4:], "big"):
        return False
    packed = chunk[8:-4].partition(b"\0")[2][1:]
    unpacking = zlib.decompressobj()
    try:
        unpacking.decompress(packed, _LARGEST_PNG_PROFILE)
    except zlib.error:
        return False
    return not unpacking.unconsumed_tail


@cache
def _found(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        return None


def _library(module: str, name: str, kind: str) -> Any:
    if (found := _found(module)) is not None:
        return found
    raise DecodeError(
        f"{name} is a {kind} file, and the library that reads it is not installed",
        hint=install_hint("photos"),
    )
