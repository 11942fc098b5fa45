"""Every kind of file that people hand to a photo tool: handled right, or refused in one line."""

from __future__ import annotations

import contextlib
import io
import os
import stat
import struct
import warnings
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from meiqa.engine.images import Pixels, fit_to_grid, grid_of, load_pixels
from meiqa.engine.manifest import ImageProcessing
from meiqa.errors import (
    DecodeError,
    ImageError,
    ImageTooLarge,
    ImageTooSmall,
    MeiqaError,
    UsageError,
)
from tests.engine.samples import encoded, smooth_photo

LOSSY = {"JPEG", "WEBP", "AVIF"}


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return smooth_photo()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + png_chunk(b"IDAT", zlib.compress(rows))
        + png_chunk(b"IEND", b"")
    )


def refusal(source: object, **limits: int) -> MeiqaError:
    with pytest.raises(ImageError) as caught:
        load_pixels(source, **limits)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None
    return caught.value


@pytest.mark.parametrize(
    "format", ["AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP"]
)
def test_every_format_gives_the_photo(photo: Image.Image, format: str, tmp_path: Path) -> None:
    path = tmp_path / "photo"
    path.write_bytes(encoded(photo, format))
    pixels = load_pixels(path)
    assert pixels.array.shape == (64, 97, 3)
    assert pixels.array.dtype == np.uint8
    assert pixels.array.flags.c_contiguous
    assert not pixels.array.flags.writeable
    assert pixels.name == str(path)
    difference = np.abs(pixels.array.astype(int) - np.asarray(photo).astype(int))
    assert difference.mean() < (8 if format in LOSSY | {"GIF"} else 0.5)


def test_path_bytes_image_and_array_give_one_digest(photo: Image.Image, tmp_path: Path) -> None:
    data = encoded(photo, "PNG")
    path = tmp_path / "photo.png"
    path.write_bytes(data)
    sources = [path, str(path), data, photo, Image.open(path), np.asarray(photo)]
    assert len({load_pixels(source).digest for source in sources}) == 1


def test_digest_tells_shape_and_content_apart() -> None:
    wide, tall = np.zeros((2, 6, 3), np.uint8), np.zeros((6, 2, 3), np.uint8)
    other = wide.copy()
    other[1, 5, 2] = 1
    assert len({load_pixels(array).digest for array in (wide, tall, other)}) == 3


def test_the_array_given_is_not_shared() -> None:
    array = np.zeros((4, 4, 3), np.uint8)
    pixels = load_pixels(array)
    array[:] = 9
    assert pixels.array.max() == 0


@pytest.mark.parametrize("shape", [(3, 5), (3, 5, 1), (3, 5, 3), (3, 5, 4)])
def test_array_layouts(shape: tuple[int, ...]) -> None:
    assert load_pixels(np.full(shape, 255, np.uint8)).array.shape == (3, 5, 3)


def test_strided_array_is_read_in_its_own_order() -> None:
    array = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    np.testing.assert_array_equal(load_pixels(array[::-1, ::2]).array, array[::-1, ::2])


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4, 3)),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4), np.uint16),
        np.zeros((4, 4), bool),
        np.zeros(4, np.uint8),
        np.zeros((4, 4, 2), np.uint8),
        np.zeros((1, 4, 4, 3), np.uint8),
    ],
)
def test_arrays_without_a_defined_meaning_are_refused(array: np.ndarray) -> None:
    assert "uint8" in str(refusal(array))


@pytest.mark.parametrize("shape", [(0, 0, 3), (0, 5), (5, 0, 3)])
def test_array_without_pixels(shape: tuple[int, ...]) -> None:
    assert "no pixels" in str(refusal(np.zeros(shape, np.uint8)))


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("PNG", {}),
        ("JPEG", {"quality": 95}),
        ("JPEG", {"progressive": True}),
        ("GIF", {}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("WEBP", {}),
        ("AVIF", {}),
        ("PPM", {}),
    ],
)
@pytest.mark.parametrize("share", [0.02, 0.3, 0.7])
def test_truncated(
    photo: Image.Image, format: str, options: dict[str, object], share: float, tmp_path: Path
) -> None:
    data = encoded(photo, format, **options)
    path = tmp_path / "cut.img"
    path.write_bytes(data[: int(len(data) * share)])
    error = refusal(path)
    assert isinstance(error, DecodeError)
    assert str(path) in str(error)


@pytest.mark.parametrize("content", [b"\0" * 100, b"hello, I am text\n" * 9, b"\x89PNG\r\n\x1a\n"])
def test_not_an_image(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "notes.jpg"
    path.write_bytes(content)
    assert str(path) in str(refusal(path))
    assert "<bytes>" in str(refusal(content))


def test_postscript_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "figure.eps"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")
    assert "not an image" in str(refusal(path))


def test_empty(tmp_path: Path) -> None:
    path = tmp_path / "empty.png"
    path.touch()
    assert f"{path} is empty" in str(refusal(path))
    assert "<bytes> is empty" in str(refusal(b""))


def test_zero_sized_header() -> None:
    assert isinstance(refusal(png(0, 0, 8, 2, b"")), DecodeError)
    assert "no pixels" in str(refusal(Image.new("RGB", (0, 5))))


def test_missing_directory_and_odd_paths(tmp_path: Path) -> None:
    assert "no such file" in str(refusal(tmp_path / "none.jpg"))
    assert "is a directory" in str(refusal(tmp_path))
    assert "cannot be opened" in str(refusal("a\0b.jpg"))
    assert "such an object" in str(refusal(7))
    fifo = tmp_path / "pipe.jpg"
    os.mkfifo(fifo)
    assert "not a regular file" in str(refusal(fifo))


def test_a_newline_in_the_name_does_not_break_the_line(tmp_path: Path) -> None:
    assert "a\\nb.jpg" in str(refusal(tmp_path / "a\nb.jpg"))


def test_unreadable_permissions(
    photo: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "secret.png"
    path.write_bytes(encoded(photo, "PNG"))
    path.chmod(0)
    if os.access(path, os.R_OK):  # permissions do not bind the superuser

        def refuse(*_: object) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("builtins.open", refuse)
    error = refusal(path)
    path.chmod(stat.S_IRUSR)
    assert "may not be read" in str(error)


def test_the_limit_is_told_from_the_header() -> None:
    """The data holds one row: decoding would fail, so the refusal came before it."""
    bomb = png(20_000, 20_000, 8, 2, b"\0" * 60_001)
    error = refusal(bomb)
    assert isinstance(error, ImageTooLarge)
    assert "400000000 pixels" in str(error)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP"])
def test_the_limit_is_exact(photo: Image.Image, format: str) -> None:
    data = encoded(photo, format)
    assert load_pixels(data, max_pixels=97 * 64).array.shape == (64, 97, 3)
    assert isinstance(refusal(data, max_pixels=97 * 64 - 1), ImageTooLarge)


def test_the_limit_holds_for_arrays_and_open_images(photo: Image.Image) -> None:
    assert isinstance(refusal(photo, max_pixels=100), ImageTooLarge)
    assert isinstance(refusal(np.asarray(photo), max_pixels=100), ImageTooLarge)


def test_pillows_own_limit_neither_leaks_nor_stays_changed(
    photo: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_pixels(encoded(photo, "PNG")).array.shape == (64, 97, 3)
    assert Image.MAX_IMAGE_PIXELS == 1000


def test_cmyk(photo: Image.Image) -> None:
    pixels = load_pixels(encoded(photo.convert("CMYK"), "JPEG", quality=95))
    difference = np.abs(pixels.array.astype(int) - np.asarray(photo).astype(int))
    assert difference.mean() < 6


def test_16_bit_grey_is_scaled_not_clipped() -> None:
    values = np.linspace(0, 65535, 12, dtype=np.uint16).reshape(3, 4)
    expected = np.round(values / 257).astype(np.uint8)
    for format in ("PNG", "TIFF", "PPM"):
        array = load_pixels(encoded(Image.fromarray(values), format)).array
        np.testing.assert_array_equal(array, np.repeat(expected[:, :, None], 3, axis=2))


def test_16_bit_colour_png() -> None:
    row = b"\0" + struct.pack(">6H", 65535, 0, 32896, 0, 65535, 257)
    array = load_pixels(png(2, 1, 16, 2, row)).array
    np.testing.assert_allclose(array, [[[255, 0, 128], [0, 255, 1]]], atol=1)


@pytest.mark.parametrize("mode", ["F", "I"])
def test_samples_without_a_range_are_refused(mode: str) -> None:
    image = Image.fromarray(np.full((4, 4), 1e6, np.float32 if mode == "F" else np.int32))
    assert "range of brightness" in str(refusal(encoded(image, "TIFF")))


@pytest.mark.parametrize("mode", ["1", "L", "P", "YCbCr", "HSV", "LAB"])
def test_other_modes_become_rgb(photo: Image.Image, mode: str) -> None:
    image = Image.new("LAB", (97, 64)) if mode == "LAB" else photo.convert(mode)
    assert load_pixels(image).array.shape == (64, 97, 3)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa", "La"])
def test_transparency_lies_over_white(mode: str) -> None:
    source = Image.new("LA" if mode in ("LA", "La") else "RGBA", (2, 2))
    assert (load_pixels(source.convert(mode)).array == 255).all()


def test_half_transparency_is_half_white() -> None:
    assert load_pixels(Image.new("LA", (1, 1), (0, 128))).array[0, 0, 0] == 127


def test_transparent_palette_and_colour_key() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putpixel((1, 0), 1)
    array = load_pixels(encoded(palette, "PNG", transparency=0)).array
    np.testing.assert_array_equal(array, [[[255, 255, 255], [200, 100, 50]]])
    keyed = encoded(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG", transparency=(1, 2, 3))
    assert (load_pixels(keyed).array == 255).all()


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animation_gives_its_first_frame(format: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert load_pixels(data).array[4, 4].tolist() == [255, 0, 0]


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(photo: Image.Image, format: str, orientation: int) -> None:
    """Store the photo the way a turned camera would; it must come back upright."""
    stored_by = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = photo.transpose(stored_by[orientation]) if orientation > 1 else photo
    exif = Image.Exif()
    exif[0x0112] = orientation
    array = load_pixels(encoded(stored, format, exif=exif)).array
    assert array.shape == (64, 97, 3)
    assert np.abs(array.astype(int) - np.asarray(photo).astype(int)).mean() < 8


def test_broken_exif_does_not_cost_the_photo(photo: Image.Image) -> None:
    data = encoded(photo, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x05garbage")
    assert load_pixels(data).array.shape == (64, 97, 3)


def test_an_open_image_stays_as_it_was(photo: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.open(io.BytesIO(encoded(photo, "JPEG", exif=exif)))
    assert load_pixels(image).array.shape == (97, 64, 3)
    assert image.size == (97, 64)
    assert image.getexif()[0x0112] == 6


@settings(deadline=None)
@given(st.binary(max_size=200), st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"]))
def test_damaged_bytes_never_raise_anything_else(noise: bytes, format: str) -> None:
    data = bytearray(encoded(Image.new("RGB", (9, 7), "teal"), format))
    for index, byte in enumerate(noise):
        data[(index * 7919 + byte) % len(data)] ^= byte
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(ImageError):
            load_pixels(bytes(data))


def limits(multiple: int, low: int, high: int) -> ImageProcessing:
    """Give a package's limits of the area that its vision tower sees."""
    return ImageProcessing(multiple, 1, low, high, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def blank(height: int, width: int) -> Pixels:
    return load_pixels(np.zeros((height, width, 3), np.uint8))


def test_a_photo_that_fits_comes_back_itself() -> None:
    photo = blank(56, 84)
    assert fit_to_grid(photo, limits(28, 56 * 84, 56 * 84)) is photo.array


def test_a_photo_near_its_grid_keeps_its_pixels_where_the_package_says_so() -> None:
    image = replace(limits(28, 784, 784 * 300), pad_to_grid=True)
    pixels = np.random.default_rng(0).integers(0, 256, (53, 87, 3), np.uint8)
    made = fit_to_grid(load_pixels(pixels), image)
    assert made.shape == (56, 84, 3)
    assert np.array_equal(made[1:54], pixels[:, 1:85])  # three rows short, three columns too many
    assert np.array_equal(made[0], made[1])
    assert np.array_equal(made[54:], made[52:54][::-1])
    assert fit_to_grid(blank(56, 84), image).shape == (56, 84, 3)
    shrunk = fit_to_grid(blank(300, 200), replace(image, max_pixels=784 * 20))
    assert shrunk.shape == (140, 84, 3)  # far from its grid: resized as ever


def smart_resize(height: int, width: int, factor: int, low: int, high: int) -> tuple[int, int]:
    """Qwen2.5-VL's published rule, the slow obvious twin."""
    h, w = max(factor, round(height / factor) * factor), max(factor, round(width / factor) * factor)
    if h * w > high:
        beta = (height * width / high) ** 0.5
        h = max(factor, int(height / beta / factor) * factor)
        w = max(factor, int(width / beta / factor) * factor)
    elif h * w < low:
        beta = (low / (height * width)) ** 0.5
        h, w = -int(-height * beta // factor) * factor, -int(-width * beta // factor) * factor
    return h, w


@pytest.mark.parametrize(
    ("height", "width"), [(1, 1), (3, 7), (97, 64), (480, 640), (1000, 99), (1500, 2000)]
)
def test_grid_follows_smart_resize(height: int, width: int) -> None:
    expected = smart_resize(height, width, 28, 4 * 784, 256 * 784)
    rows, columns = grid_of(height, width, limits(28, 4 * 784, 256 * 784))
    assert (28 * rows, 28 * columns) == expected


@pytest.mark.parametrize(("height", "width"), [(16, 17), (97, 64), (480, 640), (1500, 2000)])
def test_photos_are_resized_to_their_grid(height: int, width: int) -> None:
    image = limits(28, 4 * 784, 256 * 784)
    fitted, grid = fit_to_grid(blank(height, width), image), grid_of(height, width, image)
    assert fitted.shape == (28 * grid[0], 28 * grid[1], 3)
    assert fitted.flags.c_contiguous


@settings(deadline=None)
@given(
    st.integers(1, 300),
    st.integers(1, 300),
    st.sampled_from([8, 28, 56]),
    st.integers(1, 40),
    st.integers(0, 40),
)
def test_grid_keeps_its_limits(
    height: int, width: int, multiple: int, fewest: int, spread: int
) -> None:
    low, high = fewest * multiple**2, (fewest + spread) * multiple**2
    rows, columns = grid_of(height, width, limits(multiple, low, high))
    assert min(rows, columns) >= 1
    assert low <= rows * columns * multiple**2 <= high


def test_elongated_photos_are_refused_at_101_to_1() -> None:
    image = limits(28, 784, 784 * 300)
    assert fit_to_grid(blank(16, 1600), image).size > 0
    for height, width in ((16, 1601), (1601, 16)):
        with pytest.raises(ImageError, match=r"<array> is too elongated.*at most 100:1; crop it"):
            fit_to_grid(blank(height, width), image)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (15, 200), (200, 15)])
def test_small_photos_are_refused(height: int, width: int) -> None:
    with pytest.raises(ImageTooSmall, match=rf"<array> is too small.*{width} x {height}.*16"):
        fit_to_grid(blank(height, width), limits(28, 784, 784 * 300))


def test_limits_that_no_size_meets() -> None:
    with pytest.raises(UsageError, match=r"pixel limits; got .* at most; export it"):
        fit_to_grid(blank(99, 99), limits(28, 785, 1000))


def test_resizing_keeps_a_flat_colour_and_the_layout(photo: Image.Image) -> None:
    array = np.asarray(photo)
    fitted = fit_to_grid(load_pixels(photo), limits(28, 784, 784 * 300))
    assert fitted.shape == (56, 84, 3)
    assert np.abs(fitted.mean(axis=(0, 1)) - array.mean(axis=(0, 1))).max() < 3
