"""Colours: what a file says of them is honoured, and sRGB stays what it was, to the bit."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from meiqa.engine.colour import PROFILE_UNREADABLE, matrix_profile
from meiqa.engine.images import load_pixels

D65 = (0.3127, 0.3290)
PRO_PHOTO = (0.7347, 0.2653, 0.1596, 0.8404, 0.0366, 0.0001)
ADOBE = (0.64, 0.33, 0.21, 0.71, 0.15, 0.06)
DISPLAY_P3 = (0.68, 0.32, 0.265, 0.69, 0.15, 0.06)
SRGB = (0.64, 0.33, 0.30, 0.60, 0.15, 0.06)
CODES = np.linspace(0, 1, 1024)
SRGB_CURVE = np.where(CODES <= 0.04045, CODES / 12.92, ((CODES + 0.055) / 1.055) ** 2.4)
SRGB_PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
WIDE = {
    "ProPhoto": matrix_profile((0.3457, 0.3585), PRO_PHOTO, CODES**1.8),
    "Adobe RGB": matrix_profile(D65, ADOBE, CODES**2.2),
    "Display P3": matrix_profile(D65, DISPLAY_P3, SRGB_CURVE),
}


def grey_profile(gamma: float) -> bytes:
    """Make a grey ICC profile of a gamma."""
    curve = struct.pack(">4sIIH", b"curv", 0, 1, round(gamma * 256)) + b"\0\0"
    white = struct.pack(">4sIiii", b"XYZ ", 0, 63190, 65536, 54061)
    index = struct.pack(">I4sII4sII", 2, b"kTRC", 156, len(curve), b"wtpt", 172, len(white))
    head = struct.pack(">I4sI4s4s4s", 192, b"", 0x02400000, b"mntr", b"GRAY", b"XYZ ")
    head += struct.pack(">12s4s28siii", b"", b"acsp", b"", 63190, 65536, 54061)
    return head.ljust(128, b"\0") + index + curve + white


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """Give colours that every one of the spaces holds."""
    y, x = np.mgrid[0:64, 0:97]
    channels = [90 + y + x // 2, 170 - x // 2 + y // 4, 120 + y]
    return Image.fromarray(np.stack(channels, axis=2).clip(0, 255).astype(np.uint8))


def stored(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def in_space(photo: Image.Image, profile: bytes) -> Image.Image:
    source, target = (io.BytesIO(each) for each in (SRGB_PROFILE, profile))
    return ImageCms.profileToProfile(photo, source, target, 1, photo.mode)


def difference(data: bytes, photo: Image.Image) -> float:
    return float(np.abs(load_pixels(data).array.astype(int) - np.asarray(photo, int)).max())


@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP", "AVIF", "JPEG"])
@pytest.mark.parametrize("space", WIDE)
def test_what_looks_the_same_becomes_the_same(photo: Image.Image, space: str, format: str) -> None:
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}
    options |= {"AVIF": {"quality": 100, "subsampling": "4:4:4"}}
    profile = WIDE[space]
    data = stored(in_space(photo, profile), format, icc_profile=profile, **options.get(format, {}))
    assert difference(data, photo) <= (4 if format in ("PNG", "TIFF", "WEBP") else 12)
    assert load_pixels(data).notes == ()


@pytest.mark.parametrize("profile", [SRGB_PROFILE, matrix_profile(D65, SRGB, SRGB_CURVE)])
def test_srgb_stays_as_it_is(photo: Image.Image, profile: bytes) -> None:
    said, plain = stored(photo, icc_profile=profile), stored(photo)
    assert load_pixels(said).digest == load_pixels(plain).digest


def test_a_broken_profile_is_ignored_and_named(photo: Image.Image) -> None:
    for broken in (b"no profile at all", SRGB_PROFILE[:200], grey_profile(2.2)):
        pixels = load_pixels(stored(photo, "TIFF", icc_profile=broken))
        assert pixels.notes == (PROFILE_UNREADABLE,)
        assert np.array_equal(pixels.array, np.asarray(photo))


def test_a_grey_profile(photo: Image.Image) -> None:
    grey = photo.convert("L")
    lighter = load_pixels(stored(grey, icc_profile=grey_profile(1.0)))
    assert lighter.notes == ()
    assert lighter.array.mean() > np.asarray(grey).mean() + 20
    assert (lighter.array == lighter.array[:, :, :1]).all()
    wide = load_pixels(stored(grey, icc_profile=WIDE["Display P3"]))
    assert wide.notes == ()
    assert np.abs(wide.array[:, :, 0].astype(int) - np.asarray(grey, int)).max() <= 2


def test_a_cmyk_jpeg_with_its_profile(photo: Image.Image) -> None:
    """A profile of inks, made here, in which full ink leaves a quarter of the light."""
    profile = ink_profile()
    inks = Image.new("CMYK", (32, 32), (255, 255, 255, 0))
    plain = load_pixels(stored(inks, "JPEG", quality=100))
    shown = load_pixels(stored(inks, "JPEG", quality=100, icc_profile=profile))
    assert shown.notes == ()
    assert plain.array.max() < 8
    assert 100 < shown.array.mean() < 160


def ink_profile() -> bytes:
    """Make a CMYK profile: L* falls from 100 to 50 with the mean of the inks."""
    inks = np.stack(np.meshgrid(*[[0, 1]] * 4, indexing="ij"), axis=-1).reshape(16, 4)
    lightness = 100 - 66.7 * inks.mean(axis=1)
    lab = np.stack([lightness / 100 * 65280, *[np.full(16, 32768)] * 2], axis=1)
    ramp = struct.pack(">HH", 0, 65535)
    lut = struct.pack(">4sIBBBB", b"mft2", 0, 4, 3, 2, 0)
    lut += struct.pack(">9i", *(65536 * np.eye(3, dtype=int)).ravel())
    lut += struct.pack(">HH", 2, 2) + ramp * 4 + lab.round().astype(">u2").tobytes() + ramp * 3
    white = struct.pack(">4sIiii", b"XYZ ", 0, 63190, 65536, 54061)
    index = struct.pack(">I4sII4sII", 2, b"A2B0", 156, len(lut), b"wtpt", 156 + len(lut), 20)
    head = struct.pack(">I4sI4s4s4s", 176 + len(lut), b"", 0x02400000, b"prtr", b"CMYK", b"Lab ")
    head += struct.pack(">12s4s28siii", b"", b"acsp", b"", 63190, 65536, 54061)
    return head.ljust(128, b"\0") + index + lut + white


def test_transparency_and_palettes_keep_their_profile(photo: Image.Image) -> None:
    profile = WIDE["ProPhoto"]
    wide = in_space(photo, profile)
    clear = wide.convert("RGBA")
    clear.putalpha(Image.new("L", clear.size, 255))
    assert difference(stored(clear, icc_profile=profile), photo) <= 4
    palette = wide.quantize(200)
    near = load_pixels(stored(palette, icc_profile=profile)).array.astype(int)
    assert np.abs(near - np.asarray(photo, int)).mean() < 6


def png_with(image: Image.Image, *chunks: tuple[bytes, bytes]) -> bytes:
    data = stored(image)
    made = b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )
    return data[:33] + made + data[33:]


def gamma(value: float) -> tuple[bytes, bytes]:
    return b"gAMA", struct.pack(">I", round(value * 100_000))


def chromaticities(white: tuple[float, ...], corners: tuple[float, ...]) -> tuple[bytes, bytes]:
    return b"cHRM", struct.pack(">8I", *(round(each * 100_000) for each in (*white, *corners)))


def test_gamma_and_chromaticities_of_a_png(photo: Image.Image) -> None:
    linear = Image.fromarray(
        np.round(np.interp(np.asarray(photo) / 255, CODES, SRGB_CURVE) * 255).astype(np.uint8)
    )
    assert difference(png_with(linear, gamma(1.0)), photo) <= 5
    wide = in_space(photo, WIDE["Adobe RGB"])
    said = png_with(wide, gamma(1 / 2.2), chromaticities(D65, ADOBE))
    assert difference(said, photo) <= 4


@pytest.mark.parametrize(("code", "space"), [((12, 13), "Display P3"), ((9, 13), None)])
def test_cicp_of_a_png(photo: Image.Image, code: tuple[int, int], space: str | None) -> None:
    wide = photo if space is None else in_space(photo, WIDE[space])
    data = png_with(wide, (b"cICP", bytes([*code, 0, 1])))
    assert (difference(data, photo) <= 4) == (space is not None)


def test_a_damaged_text_costs_a_png_no_colours(photo: Image.Image) -> None:
    wide = in_space(photo, WIDE["Display P3"])
    data = png_with(wide, (b"cICP", bytes([12, 13, 0, 1])), (b"tEXt", b"Author\0somebody"))
    damaged = data.replace(b"somebody", b"nobody!!")
    assert difference(damaged, photo) <= 4


def test_cicp_of_srgb_changes_nothing(photo: Image.Image) -> None:
    said = png_with(photo, (b"cICP", bytes([1, 13, 0, 1])))
    assert load_pixels(said).digest == load_pixels(stored(photo)).digest


@pytest.mark.parametrize("index", ["R98", "R03"])
def test_a_camera_says_adobe_rgb_in_exif_alone(photo: Image.Image, index: str) -> None:
    wide = in_space(photo, WIDE["Adobe RGB"])
    wide.info.clear()
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0xA005] = {1: index}
    data = stored(wide, "JPEG", quality=100, subsampling=0, exif=exif)
    assert (difference(data, photo) <= 8) == (index == "R03")
    opened = Image.open(io.BytesIO(data))
    assert np.array_equal(load_pixels(opened).array, load_pixels(data).array)
    said = stored(photo, "JPEG", quality=100, subsampling=0, exif=exif, icc_profile=SRGB_PROFILE)
    assert difference(said, photo) <= 8


@pytest.mark.parametrize(
    "chunks",
    [[gamma(0.45455)], [gamma(0.45455), chromaticities(D65, SRGB)], [(b"sRGB", b"\0"), gamma(1.0)]],
)
def test_what_srgb_is_called_in_a_png_changes_nothing(
    photo: Image.Image, chunks: list[tuple[bytes, bytes]]
) -> None:
    assert load_pixels(png_with(photo, *chunks)).digest == load_pixels(stored(photo)).digest


def nclx(data: bytes, primaries: int, transfer: int) -> bytes:
    """Change what an AVIF says of its colours."""
    place = data.index(b"colrnclx") + 8
    return data[:place] + struct.pack(">HH", primaries, transfer) + data[place + 4 :]


def test_nclx_of_an_avif(photo: Image.Image) -> None:
    wide = in_space(photo, WIDE["Display P3"])
    wide.info.clear()
    data = stored(wide, "AVIF", quality=100, subsampling="4:4:4")
    assert difference(nclx(data, 12, 13), photo) <= 6
    for usual in (1, 13), (1, 1), (2, 2):
        assert load_pixels(nclx(data, *usual)).digest == load_pixels(data).digest
    bright = (
        load_pixels(nclx(data, 9, 16)).array.mean(),
        load_pixels(nclx(data, 9, 18)).array.mean(),
    )
    assert min(bright) > load_pixels(data).array.mean()
