"""Bytes to pixels: decode any photograph to upright 8-bit RGB, then fit it to the patch grid."""

from __future__ import annotations

import hashlib
import io
import math
import re
import stat
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from meiqa.engine.colour import to_srgb
from meiqa.engine.files import (
    ORIENTATION,
    describe_tiff,
    exif_of,
    is_negative,
    is_raw,
    loaded,
    misread_tiff,
    opened,
    raw_exif,
    raw_picture,
    readable_formats,
    said_of_colours,
    without_metadata,
)
from meiqa.engine.manifest import ImageProcessing
from meiqa.errors import DecodeError, ImageError, ImageTooLarge, ImageTooSmall, UsageError

DEFAULT_MAX_PIXELS = 100_000_000
ImageSource = str | Path | bytes | IO[bytes] | Image.Image | NDArray[Any]


class Developed(str):
    """The path of a RAW file that is to be developed, not judged by its embedded preview.

    The preview is what the camera made of the shot; developing takes a second or two.
    """


class NamedBytes(bytes):
    """An encoded image, and what messages and results call it."""

    name: str

    def __new__(cls, data: bytes | bytearray, name: str) -> NamedBytes:
        made = super().__new__(cls, data)
        made.name = name
        return made


MAX_ASPECT, SMALLEST_SIDE = 100.0, 16
_STRIP_BYTES = 1 << 16
"""Of samples copied at a time; memory of this size is used again, and not mapped anew."""
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns a photo of each EXIF orientation upright."""
_Decoded = tuple[NDArray[np.uint8], list[str], dict[int, Any]]
_DAMAGED = "the file is damaged or incomplete: fetch it again"
_pillow_lock = threading.Lock()


@dataclass(frozen=True, eq=False)
class Pixels:
    """A decoded photograph.

    `array` is RGB uint8, ``(H, W, 3)``, C-contiguous and read-only, so that `digest`, the SHA-256
    of its shape and bytes in hex, stays true. `name` is what messages call the photo; `notes` say
    what of its file is damaged; `exif` has what the camera wrote of the shot, by tag;
    `luminance_table` is that of a JPEG file, row by row, empty where the pixels are from another
    file or an open image, and None where they were given as such: a camera gives many a second.
    """

    array: NDArray[np.uint8]
    digest: str
    name: str
    notes: tuple[str, ...] = ()
    exif: Mapping[int, Any] = field(default_factory=dict)
    luminance_table: tuple[int, ...] | None = None


def load_pixels(source: ImageSource, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> Pixels:
    """Decode a photograph to upright 8-bit RGB; DecodeError or ImageTooLarge if it can't be.

    EXIF orientation is applied; colours become sRGB, by what the file says they are; transparency
    is laid over white, the page most viewers show it on; 16-bit samples are scaled to 8; of an
    animation the first frame is taken (of an open Pillow image, its current frame), of an HDR photo
    the base picture, of a RAW file the largest preview. JPEGs are decoded at full size, never in
    draft mode, so a photo has one digest whatever is asked of it.

    Args:
        source: a path, an encoded image or an open binary file of one, an open Pillow image (left
            as it is) or a uint8 array of shape ``(H, W)``, ``(H, W, 1)``, ``(H, W, 3)`` RGB or
            ``(H, W, 4)`` RGBA.
        max_pixels: the largest H x W, held against the header before anything is decoded.

    >>> load_pixels(np.zeros((2, 3), np.uint8)).array.shape
    (2, 3, 3)
    """
    name = source_name(source)
    table: tuple[int, ...] | None = ()
    if isinstance(source, np.ndarray):
        source, table = _image_from_array(source, name), None
    if isinstance(source, Image.Image):
        array, notes, exif = _decode(source, name, max_pixels)
    else:
        with _byte_stream(source, name) as stream:
            (array, notes, exif), table = _from_file(
                stream, name, max_pixels, isinstance(source, Developed)
            )
    array.flags.writeable = False
    digest = hashlib.sha256(np.array(array.shape, dtype="<i8").tobytes())
    digest.update(array.data)
    return Pixels(array, digest.hexdigest(), name, tuple(notes), exif, table)


def source_name(source: ImageSource) -> str:
    """Give what messages call a source: its path, or its kind where it has none."""
    if isinstance(source, str | Path):
        return str(source)
    if isinstance(source, Image.Image):
        return str(getattr(source, "filename", "") or "<image>")
    if isinstance(source, NamedBytes):
        return source.name
    if isinstance(source, bytes | np.ndarray):
        return "<array>" if isinstance(source, np.ndarray) else "<bytes>"
    name = getattr(source, "name", None)  # a file opened by its number is called by it
    return name if isinstance(name, str) else "<file>"


def fit_to_grid(photo: Pixels, image: ImageProcessing) -> NDArray[np.uint8]:
    """Bring a photo to whole visual tokens ``(H, W, 3)``; ImageError if it can't be judged."""
    height, width = photo.array.shape[:2]
    if min(height, width) < SMALLEST_SIDE:
        raise ImageTooSmall(
            f"{photo.name} is too small to be judged",
            seen=f"{width} x {height} pixels",
            allowed=f"at least {SMALLEST_SIDE} on each side",
        )
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise ImageError(
            f"{photo.name} is too elongated to be judged",
            seen=f"{width} x {height} pixels",
            allowed=f"an aspect ratio of at most {MAX_ASPECT:.0f}:1",
            hint="crop it",
        )
    return fitted(photo.array, image)


def fitted(pixels: NDArray[np.uint8], image: ImageProcessing) -> NDArray[np.uint8]:
    """Bring pixels (H, W, 3) to whole visual tokens: see `ImageProcessing.pad_to_grid`.

    Where they are seen in tiles, that is to the largest size within the canvas that suits them.
    """
    if image.tile_pixels:
        return resized(pixels, *_within(pixels.shape[:2], _canvas(pixels.shape[:2], image)))
    cell, (height, width) = image.cell_pixels, pixels.shape[:2]
    wanted = [count * cell for count in grid_of(height, width, image)]
    lacking = [wanted[0] - height, wanted[1] - width]
    if not image.pad_to_grid or not any(lacking) or max(map(abs, lacking)) >= cell:
        return resized(pixels, *wanted)
    top, left = (max(0, -more) // 2 for more in lacking)
    inner = pixels[top : top + wanted[0], left : left + wanted[1]]
    margins = [(max(0, more) // 2, max(0, more + 1) // 2) for more in lacking]
    return np.pad(inner, [*margins, (0, 0)], mode="symmetric")


def resized(pixels: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Resize pixels (H, W, 3); the very array given if it is of that size.

    Bicubic, after an integer box reduction of photos at least four times too large.
    """
    if pixels.shape[:2] == (height, width):
        return pixels
    image = Image.fromarray(pixels)
    return np.array(image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=2.0))


def grid_of(height: int, width: int, image: ImageProcessing) -> tuple[int, int]:
    """Choose rows and columns of visual tokens for a photo, keeping the aspect ratio.

    Qwen2.5-VL's "smart resize", but within the limits for every shape.
    """
    multiple, most = image.cell_pixels, image.max_pixels // image.cell_pixels**2
    fewest = -(-image.min_pixels // multiple**2)
    rows, columns = max(1, round(height / multiple)), max(1, round(width / multiple))
    if rows * columns > most:
        shrink = math.sqrt(height * width / image.max_pixels) * multiple
        rows, columns = max(1, math.floor(height / shrink)), max(1, math.floor(width / shrink))
    elif rows * columns < fewest:
        grow = math.sqrt(image.min_pixels / (height * width)) / multiple
        rows, columns = math.ceil(height * grow), math.ceil(width * grow)
    if fewest <= rows * columns <= most:
        return rows, columns
    return _nearest_grid(width / height, fewest, most)


def _nearest_grid(aspect: float, fewest: int, most: int) -> tuple[int, int]:
    """Search every grid of `fewest` to `most` tokens for the aspect nearest to width / height.

    The rounding of "smart resize" leaves the limits for elongated photos and for limits that lie
    close together.
    """
    grids = [
        (rows, min(max(round(rows * aspect), 1, -(-fewest // rows)), most // rows))
        for rows in range(1, most + 1)
        if max(1, -(-fewest // rows)) <= most // rows
    ]
    if not grids:
        raise UsageError(
            "no image size lies within the package's pixel limits",
            seen=f"{fewest} visual tokens at least and {most} at most",
            hint="export it with a larger --max-pixels",
        )
    return min(grids, key=lambda grid: (abs(math.log(grid[1] / grid[0] / aspect)), grid))


def token_grid(size: tuple[int, ...], image: ImageProcessing) -> tuple[int, int]:
    """Give rows and columns of the visual tokens of pixels of a size (H, W).

    Those of a photo in tiles are one long row: lines of tokens with a mark behind each, and before
    them the photo as a whole.
    """
    if image.tile_pixels:
        return 1, len(_order_of(_within(size, _canvas(size, image)), image))
    return size[0] // image.cell_pixels, size[1] // image.cell_pixels


def tiles_of(
    pixels: NDArray[np.uint8], image: ImageProcessing
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Cut pixels (H, W, 3), `fitted` if they are not yet, into tiles: LLaVA's "any resolution".

    Returns:
        Tiles (n, s, s, 3), the first of which is the whole photo. s is what whole patches cover.
        The order (T,) of visual tokens, as places among those of all tiles, tile by tile, and of
        the mark that ends a line, which follows them. Tokens that see only the canvas are left out.
    """
    side, patch, pixels = image.tile_pixels, image.patch_size, fitted(pixels, image)
    size, (height, width) = pixels.shape[:2], _canvas(pixels.shape[:2], image)
    margins = [
        ((whole - part) // 2, (whole - part + 1) // 2)
        for whole, part in zip((height, width), size, strict=True)
    ]
    canvas = np.pad(pixels, [*margins, (0, 0)])
    rows, columns, along = height // side, width // side, side // patch
    cut = canvas.reshape(rows, side, columns, side, 3).swapaxes(1, 2)
    tiles = np.concatenate([resized(pixels, side, side)[None], cut.reshape(-1, side, side, 3)])
    shown = np.ascontiguousarray(tiles[:, : along * patch, : along * patch])
    return shown, _order_of(size, image)


def _order_of(size: tuple[int, ...], image: ImageProcessing) -> NDArray[np.int64]:
    """Give the order that `tiles_of` tells, of pixels of a size (H, W) to which they are fitted."""
    rows, columns = (length // image.tile_pixels for length in _canvas(size, image))
    along = image.tile_pixels // image.patch_size
    mark = (1 + rows * columns) * along**2
    places = np.arange(along**2, mark).reshape(rows, columns, along, along)
    places = _without_margins(places.swapaxes(1, 2).reshape(rows * along, columns * along), size)
    lines = np.pad(places, [(0, 0), (0, 1)], constant_values=mark)
    return np.concatenate([np.arange(along**2), lines.ravel()])


def canvases(image: ImageProcessing) -> list[tuple[int, int]]:
    """List heights and widths, of whole tiles, that photos are laid on; none without tiles.

    One that is above the limit of the area counts only if all are.
    """
    least = min((rows * columns for rows, columns in image.tilings), default=0)
    side = image.tile_pixels
    return [
        (rows * side, columns * side)
        for rows, columns in image.tilings
        if rows * columns <= max(image.max_pixels // side**2, least)
    ]


def _canvas(size: tuple[int, ...], image: ImageProcessing) -> tuple[int, int]:
    """Choose the canvas on which most of a photo's pixels are left, and of those the smallest."""

    def suits(canvas: tuple[int, int]) -> tuple[int, int]:
        scale = min(canvas[1] / size[1], canvas[0] / size[0])
        kept = min(int(size[1] * scale) * int(size[0] * scale), size[0] * size[1])
        return kept, -canvas[0] * canvas[1]

    return max(canvases(image), key=suits)


def _within(size: tuple[int, ...], canvas: tuple[int, int]) -> tuple[int, int]:
    """Give the height and width at which a photo touches the edges of a canvas."""
    scale = min(canvas[0] / size[0], canvas[1] / size[1])
    height, width = (
        min(math.ceil(length * scale), most) for length, most in zip(size, canvas, strict=True)
    )
    return height, width


def _without_margins(places: NDArray[np.int64], size: tuple[int, ...]) -> NDArray[np.int64]:
    """Leave out rows or columns of places that lie beside a photo, which is centred."""
    (rows, columns), (height, width) = places.shape, size
    if width / height > columns / rows:
        beside = (rows - int(round(height * (columns / width), 7))) // 2
        return places[beside : rows - beside]
    beside = (columns - int(round(width * (rows / height), 7))) // 2
    return places[:, beside : columns - beside]


def _image_from_array(array: NDArray[Any], name: str) -> Image.Image:
    colours = array.shape[2:] in ((), (1,), (3,), (4,)) and array.ndim in (2, 3)
    if array.dtype != np.uint8 or not colours:
        raise DecodeError(
            f"{name} is {_array_kind(array, colours)}",
            seen=f"{array.dtype} {array.shape}",
            allowed="uint8 (H, W), (H, W, 1), (H, W, 3) or (H, W, 4)",
            hint=_array_remedy(array, colours),
        )
    if array.size == 0:
        raise _no_pixels(name, array.shape[1], array.shape[0])
    single = array[:, :, 0] if array.shape[2:] == (1,) else array
    return Image.fromarray(np.ascontiguousarray(single))


def _channels_first(array: NDArray[Any]) -> bool:
    return array.ndim == 3 and array.shape[0] in (1, 3, 4)


def _array_kind(array: NDArray[Any], colours: bool) -> str:
    if array.ndim == 4:
        return "several images"
    if not colours:
        return "an image with its channels first" if _channels_first(array) else "not an image"
    return "an image of floats" if array.dtype.kind == "f" else "not an 8-bit image"


def _array_remedy(array: NDArray[Any], colours: bool) -> str | None:
    """Give the conversion to what is taken, for axes and for samples."""
    if array.ndim == 4:
        return "give a list of images"
    if not colours and not _channels_first(array):
        return None
    axes = "" if colours else ".transpose(1, 2, 0)"
    if array.dtype == np.uint8:
        return f"array{axes}"
    if array.dtype.kind == "f" and array.size:
        scale = " * 255" if np.nanmax(array) <= 1 else ""
        return f"(array{axes}{scale}).round().clip(0, 255).astype(numpy.uint8)"
    if array.dtype == np.uint16:
        return f"(array{axes} // 257).astype(numpy.uint8), for samples that go up to 65535"
    return f"scale it to 0-255: array{axes}.astype(numpy.uint8)"


def _byte_stream(source: object, name: str) -> IO[bytes]:
    if hasattr(source, "read"):
        source = source.read()
        if not isinstance(source, bytes):
            hint = "open it as binary: open(path, 'rb')"
            raise DecodeError(f"{name} gives {type(source).__name__}, not bytes", hint=hint)
    if isinstance(source, bytes):
        if not source:
            raise DecodeError(f"{name} is empty", hint=_DAMAGED)
        return io.BytesIO(source)
    if not isinstance(source, str | Path):
        raise DecodeError(
            "an image cannot be read from such an object",
            seen=type(source).__name__,
            allowed="a path, bytes, an open file, a Pillow image or a uint8 array",
        )
    try:
        status = Path(source).stat()
        if stat.S_ISDIR(status.st_mode):
            raise DecodeError(f"{name} is a directory, not an image")
        if not stat.S_ISREG(status.st_mode):  # a pipe or a device could block, or never end
            raise DecodeError(f"{name} is not a regular file")
        if status.st_size == 0:
            raise DecodeError(f"{name} is empty", hint=_DAMAGED)
        return open(source, "rb")
    except FileNotFoundError:
        raise DecodeError(f"{name}: no such file", hint="check the path") from None
    except PermissionError:
        raise DecodeError(f"{name} may not be read", hint="check its permissions") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DecodeError(f"{name} cannot be opened: {reason}") from None


def _from_file(
    stream: IO[bytes], name: str, max_pixels: int, develop: bool
) -> tuple[_Decoded, tuple[int, ...]]:
    """Decode a file, and give the luminance table of a JPEG."""
    told: dict[int, Any] = {}
    with _quietly():
        raw = is_raw(stream, name)
        if raw:
            told = raw_exif(stream)
    if raw:
        picture = raw_picture(stream, name, develop=develop)
        if isinstance(picture, Image.Image):
            array, notes, exif = _decode(picture, name, max_pixels)
            return (array, notes, {**told, **exif}), ()
        stream = io.BytesIO(picture)
    try:
        with _header(stream, name, max_pixels) as image:
            array, notes, exif = _decode(image, name, max_pixels, loaded)
            return (array, notes, {**told, **exif}), _luminance_table(image)
    except DecodeError:
        bare = without_metadata(stream)
        if bare is None:
            raise
    stream, notes = bare
    with _header(stream, name, max_pixels) as image:
        array, more, exif = _decode(image, name, max_pixels, loaded)
        return (array, notes + more, exif), _luminance_table(image)


def _luminance_table(image: Image.Image) -> tuple[int, ...]:
    """Give the table (64,) that a JPEG's luma was quantised with; () of another file."""
    tables: Mapping[int, Sequence[int]] = getattr(image, "quantization", {})
    return tuple(tables[min(tables)]) if tables else ()


@contextmanager
def _quietly() -> Iterator[None]:
    """Hear no warnings: broken metadata is no reason to refuse the pixels, nor the user's concern.

    Their filters are global in Python, so this is one thread's at a time.
    """
    with _pillow_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _header(stream: IO[bytes], name: str, max_pixels: int) -> Image.Image:
    """Read the header, with Pillow's own limit set to ours.

    Plugins may allocate while they open, so the limit has to hold there already. It is a module
    global of Pillow: it is changed for the moment of the header only, by one thread at a time, and
    put back.
    """
    with _quietly():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, max_pixels
        try:
            image = opened(stream, name)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            count = re.search(r"\d+", str(error))
            raise _too_large(name, f"{count[0]} pixels" if count else None, max_pixels) from None
        except UnidentifiedImageError:
            if kind := describe_tiff(stream):
                raise _unread_tiff(name, kind) from None
            raise DecodeError(
                f"{name} is not an image, or its header is damaged", allowed=readable_formats()
            ) from None
        except DecodeError:
            raise
        except Exception as error:  # hostile bytes make Pillow's plugins raise nearly anything
            raise _undecodable(name, error) from None
        finally:
            Image.MAX_IMAGE_PIXELS = before
        if image.format == "TIFF":  # which reads it again with the pixels, and warns then
            with suppress(Exception):
                image.getexif()
    if misread_tiff(image):
        raise _unread_tiff(name, describe_tiff(stream))
    return image


def _loaded_alone(image: Image.Image, notes: list[str]) -> Image.Image:
    image.load()
    return image


def _decode(
    image: Image.Image,
    name: str,
    max_pixels: int,
    load: Callable[[Image.Image, list[str]], Image.Image] = _loaded_alone,
) -> _Decoded:
    """Give upright RGB, what is damaged, and EXIF."""
    notes: list[str] = []
    _check_size(image, name, max_pixels)
    try:
        pixels = load(image, notes)
        _check_size(pixels, name, max_pixels)  # a damaged header may have announced less
        colours = _eight_bit(pixels, name)
        with _quietly():
            exif, said = exif_of(image), said_of_colours(image)
        if said:
            colours = to_srgb(colours, said, notes)
        return _samples(_upright(_on_white(colours), image)), notes, exif
    except ImageError:
        raise
    except Exception as error:  # hostile bytes make Pillow's plugins raise nearly anything
        raise _undecodable(name, error) from None


def _check_size(image: Image.Image, name: str, max_pixels: int) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise _no_pixels(name, width, height)
    if width * height > max_pixels:
        raise _too_large(name, f"{width} x {height} pixels", max_pixels)


def _samples(image: Image.Image) -> NDArray[np.uint8]:
    """Copy an image's samples strip by strip: of a whole one Pillow makes two copies more."""
    width, height = image.size
    samples = np.empty((height, width, len(image.getbands())), np.uint8)
    rows = max(1, _STRIP_BYTES // samples[0].nbytes)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        samples[top:bottom] = np.asarray(image.crop((0, top, width, bottom)))
    return samples


def _upright(pixels: Image.Image, image: Image.Image) -> Image.Image:
    """Turn pixels as the image that they were read from says."""
    if image.format == "JXL":  # its pixels come upright, whatever its EXIF says
        return pixels
    try:
        with _quietly():
            turn = _UPRIGHT.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # unreadable EXIF is no reason to refuse the pixels
        return pixels
    return pixels if turn is None else pixels.transpose(turn)


def _eight_bit(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "F":
        raise _unsupported_samples(name, "floating-point samples")
    if image.mode == "I" or image.mode.startswith("I;16"):
        samples = np.asarray(image)
        if samples.min() < 0 or samples.max() > 65535:
            raise _unsupported_samples(name, "32-bit integer samples")
        # Scaled to 0–255; Pillow would clip instead.
        grey = ((samples.astype(np.uint32) + 128) // 257).astype(np.uint8)
        return Image.fromarray(255 - grey if is_negative(image) else grey)
    # Pillow converts premultiplied grey only to straight grey.
    return image.convert("LA") if image.mode == "La" else image


def _on_white(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _no_pixels(name: str, width: int, height: int) -> DecodeError:
    return DecodeError(f"{name} has no pixels", seen=f"{width} x {height}", hint=_DAMAGED)


def _too_large(name: str, seen: str | None, max_pixels: int) -> ImageTooLarge:
    allowed, hint = f"at most {max_pixels} pixels", "scale it down first"
    return ImageTooLarge(f"{name} is too large", seen=seen, allowed=allowed, hint=hint)


def _unsupported_samples(name: str, seen: str) -> DecodeError:
    return DecodeError(
        f"{name} has no defined range of brightness",
        seen=seen,
        allowed="8 or 16 bits a sample",
        hint="save it as an 8-bit or 16-bit image",
    )


def _unread_tiff(name: str, seen: str | None) -> DecodeError:
    return DecodeError(
        f"{name} is a TIFF of a kind that is not read",
        seen=seen,
        allowed="integers of 8 or 16 bits, interleaved; no compression, LZW, Deflate or JPEG",
        hint="save it as an 8-bit TIFF or PNG",
    )


def _undecodable(name: str, error: Exception) -> DecodeError:
    reason = str(error) or type(error).__name__
    return DecodeError(f"{name} cannot be decoded: {reason}", hint=_DAMAGED)
