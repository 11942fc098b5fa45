"""Files as cameras and phones write them: HEIC, AVIF, JPEG XL, RAW, odd TIFFs, damaged JPEGs."""

from __future__ import annotations

import contextlib
import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
from PIL import ExifTags, Image
from pylibjxl.pillow_plugin import register_pillow

from benchmarks.photo_files import SENSOR, exif_bytes, raw_file, tiff_directory
from meiqa.engine import files
from meiqa.engine.engine import Engine
from meiqa.engine.files import looks_like_photo, raw_exif
from meiqa.engine.images import Developed, ImageSource, load_pixels
from meiqa.engine.package import EnginePackage
from meiqa.errors import DecodeError, ImageError, ImageTooLarge
from tests.engine.samples import encoded, smooth_photo


@pytest.fixture(scope="module", autouse=True)
def writers() -> None:
    """Let Pillow write what it is to read."""
    pillow_heif.register_heif_opener()
    register_pillow()


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return smooth_photo()


def off(array: np.ndarray, photo: Image.Image) -> float:
    return float(np.abs(array.astype(int) - np.asarray(photo, int)).mean())


def refusal(source: ImageSource, **options: int) -> str:
    with pytest.raises(ImageError) as raised:
        load_pixels(source, **options)
    return str(raised.value)


@pytest.mark.parametrize("format", ["HEIF", "JXL", "AVIF"])
class TestPhonesFormats:
    """What is the same for each of them."""

    def test_is_read(self, photo: Image.Image, format: str, tmp_path: Path) -> None:
        path = tmp_path / "without_a_suffix"
        path.write_bytes(encoded(photo, format, quality=95))
        assert looks_like_photo(path.read_bytes()[:32])
        assert off(load_pixels(path).array, photo) < 5

    def test_truncated_is_refused(self, photo: Image.Image, format: str) -> None:
        data = encoded(photo, format, quality=95)
        for share in (0.02, 0.3, 0.7):
            assert "<bytes>" in refusal(data[: int(len(data) * share)])

    def test_the_limit_is_told_from_the_header(self, photo: Image.Image, format: str) -> None:
        data = encoded(photo, format)
        assert load_pixels(data, max_pixels=97 * 64).array.shape == (64, 97, 3)
        with pytest.raises(ImageTooLarge):
            load_pixels(data, max_pixels=97 * 64 - 1)

    def test_damaged_bytes_never_raise_anything_else(self, photo: Image.Image, format: str) -> None:
        data = encoded(photo, format, quality=60)
        random = np.random.default_rng(0)
        for _ in range(60):
            damaged = bytearray(data)
            for place in random.integers(0, len(data), 4):
                damaged[place] = int(random.integers(0, 256))
            with contextlib.suppress(ImageError):
                load_pixels(bytes(damaged))

    def test_transparency_lies_over_white(self, format: str) -> None:
        clear = encoded(Image.new("RGBA", (32, 32)), format)
        assert load_pixels(clear).array.min() > 250


def test_an_animated_avif_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "AVIF", save_all=True, append_images=frames[1:])
    red, _, blue = load_pixels(data).array[9, 9]
    assert red > 240 > 15 > blue


def orientation(value: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif.tobytes()


def test_a_turned_heic_comes_upright(photo: Image.Image) -> None:
    turned = photo.transpose(Image.Transpose.ROTATE_90)
    data = encoded(turned, "HEIF", exif=orientation(6), quality=95)
    assert off(load_pixels(data).array, photo) < 5


def test_a_jpeg_xl_is_turned_by_its_codestream_alone(photo: Image.Image) -> None:
    """Its EXIF may say what has been done already."""
    said = encoded(photo, "JXL", exif=orientation(6), lossless=True)
    assert off(load_pixels(said).array, photo) == 0


@pytest.mark.parametrize(
    ("format", "module", "kind"),
    [("HEIF", "pillow_heif", "HEIF"), ("JXL", "pylibjxl.pillow_plugin", "JPEG XL")],
)
def test_without_the_library_a_file_is_named_with_the_extra(
    photo: Image.Image, format: str, module: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encoded(photo, format)
    without(module, monkeypatch)
    message = refusal(data)
    assert f"<bytes> is a {kind} file" in message
    assert "[photos]" in message
    assert "not an image" not in message


def without(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a library look as if it weren't installed."""
    monkeypatch.setitem(sys.modules, module, None)
    files._found.cache_clear()
    monkeypatch.setattr(files, "_found", files._found.__wrapped__)


def test_the_libraries_are_loaded_only_for_their_files(photo: Image.Image, tmp_path: Path) -> None:
    for format in ("PNG", "AVIF", "WEBP"):
        (tmp_path / format).write_bytes(encoded(photo, format))
    code = (
        "import sys; from meiqa.engine.images import load_pixels\n"
        "for path in sys.argv[1:]: load_pixels(path)\n"
        "print(sys.modules.keys() & {'pillow_heif', 'pylibjxl', 'rawpy', 'simplejpeg',"
        " 'PIL.ImageCms'})"
    )
    paths = map(str, sorted(tmp_path.iterdir()))
    run = subprocess.run(
        [sys.executable, "-c", code, *paths], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "set()"


@pytest.fixture(scope="module")
def path(photo: Image.Image, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a RAW whose preview and sensor differ."""
    path = tmp_path_factory.mktemp("raw") / "shot.dng"
    path.write_bytes(raw_file(encoded(photo, "JPEG", quality=95)))
    return path


class TestRaw:
    """RAW files: by preview, or developed."""

    def test_is_judged_by_its_preview(self, path: Path, photo: Image.Image) -> None:
        assert off(load_pixels(path).array, photo) < 3

    def test_is_found_by_its_content(self, path: Path, photo: Image.Image) -> None:
        assert off(load_pixels(path.read_bytes()).array, photo) < 3

    def test_is_developed_on_demand(self, path: Path) -> None:
        pixels = load_pixels(Developed(path))
        assert pixels.array.shape == (*SENSOR, 3)
        assert pixels.name == str(path)
        assert pixels.array.std() < 30

    def test_without_a_preview_it_is_developed(self, tmp_path: Path) -> None:
        path = tmp_path / "bare.dng"
        path.write_bytes(raw_file(None))
        assert load_pixels(path).array.shape == (*SENSOR, 3)

    def test_a_sensor_without_colours(self) -> None:
        pattern = struct.pack("<HHI", 33422, 1, 4)
        unread = struct.pack("<HHI", 33422, 1, 4 + (5 << 16))
        pixels = load_pixels(raw_file(None).replace(pattern, unread)).array
        assert pixels.shape == (*SENSOR, 3)
        assert (pixels[..., :1] == pixels).all()

    def test_damaged_tags_are_nothing_to_warn_of(self) -> None:
        """Warnings are errors in tests."""
        model = struct.pack("<HHI", 50708, 2, 13)
        far = struct.pack("<HHI", 50708, 2, 13 << 16)
        assert load_pixels(raw_file(None).replace(model, far)).array.shape == (*SENSOR, 3)

    def test_a_turned_one_comes_upright(self, photo: Image.Image) -> None:
        turned = photo.transpose(Image.Transpose.ROTATE_90)
        data = raw_file(encoded(turned, "JPEG", quality=95), turned=6)
        assert off(load_pixels(data).array, photo) < 3

    def test_broken_or_of_another_kind(self, path: Path, tmp_path: Path) -> None:
        other = tmp_path / "notes.nef"
        other.write_text("no sensor ever saw this\n" * 9)
        assert f"{other} is no RAW file that LibRaw reads" in refusal(other)
        cut = tmp_path / "cut.dng"
        cut.write_bytes(path.read_bytes()[:4000])
        assert str(cut) in refusal(cut)

    def test_without_the_library(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        without("rawpy", monkeypatch)
        assert "is a RAW file" in (message := refusal(path))
        assert "[photos]" in message


def jpeg(seed: int = 0, **options: object) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (30, 40, 3), np.uint8)
    image = Image.fromarray(pixels).resize((400, 304), Image.Resampling.BICUBIC)
    return encoded(image, "JPEG", quality=90, **options)


@pytest.mark.parametrize("options", [{}, {"subsampling": 0}])
def test_a_jpeg_damaged_in_its_middle_is_named(options: dict[str, object]) -> None:
    data = bytearray(jpeg(**options))
    middle = len(data) // 2
    data[middle : middle + 64] = bytes(range(100, 164))
    (note,) = load_pixels(bytes(data)).notes
    assert note.startswith("pixels damaged: Corrupt JPEG data")
    assert load_pixels(jpeg(**options)).notes == ()


def test_the_damage_stands_in_what_is_degraded(
    package: EnginePackage, anchors: Path, tmp_path: Path
) -> None:
    data = bytearray(jpeg())
    data[5000:5064] = bytes(range(100, 164))
    path = tmp_path / "damaged.jpg"
    path.write_bytes(data)
    with Engine.open(package, anchors, learn=False) as engine:
        assert any("pixels damaged" in each for each in engine.score(path).degraded)
        ranking = engine.rank([path, jpeg(1)])
    assert any(f"{path}: pixels damaged" in each for each in ranking.degraded)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_the_pixels_of_a_sound_jpeg_are_pillows(mode: str) -> None:
    data = encoded(Image.open(io.BytesIO(jpeg())).convert(mode), "JPEG")
    pillows = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(load_pixels(data).array, pillows)


def test_without_simplejpeg_a_jpeg_is_read_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = load_pixels(jpeg())
    without("simplejpeg", monkeypatch)
    assert load_pixels(jpeg()).digest == whole.digest


def test_a_jpeg_without_its_last_marker_is_whole() -> None:
    whole = load_pixels(jpeg())
    assert load_pixels(jpeg()[:-2]).digest == whole.digest
    assert load_pixels(jpeg()[:-2]).notes == ()
    assert "truncated" in refusal(jpeg()[:-400])


def png_with(image: Image.Image, kind: bytes, body: bytes, *, sound: bool = True) -> bytes:
    data = encoded(image, "PNG")
    crc = zlib.crc32(kind + body) ^ (not sound)
    chunk = struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)
    return data[:33] + chunk + data[33:]


@pytest.mark.parametrize("place", [33, -12])
def test_metadata_is_no_reason_to_refuse_a_png(photo: Image.Image, place: int) -> None:
    plain, data = load_pixels(photo), encoded(photo, "PNG")
    long = b"note\0\0" + zlib.compress(b"x" * 3_000_000)
    for body, wrong in ((long, 0), (b"note\0text", 1)):
        chunk = struct.pack(">I4s", len(body), b"zTXt" if not wrong else b"tEXt") + body
        chunk += struct.pack(">I", zlib.crc32(chunk[4:]) ^ wrong)
        made = data[:place] + chunk + data[place:]
        assert load_pixels(made).digest == plain.digest


def test_a_profile_that_unpacks_to_much_is_left_out(photo: Image.Image) -> None:
    body = b"wide\0\0" + zlib.compress(bytes(3_000_000))
    pixels = load_pixels(png_with(photo, b"iCCP", body))
    assert pixels.digest == load_pixels(photo).digest
    assert pixels.notes == ("colour profile damaged or too large: taken as sRGB",)


def tiff(samples: np.ndarray, **tags: list[int]) -> bytes:
    """Make an uncompressed TIFF: (H, W) or (H, W, C) samples, or with planes=[2] (C, H, W)."""
    planes = tags.get("planes", [1])
    rows, columns = samples.shape[1:] if planes == [2] else samples.shape[:2]
    channels = samples.size // (rows * columns)
    strips = channels if planes == [2] else 1
    size = samples.nbytes // strips
    given: dict[int, tuple[int, list[int] | bytes]] = {
        256: (4, [columns]), 257: (4, [rows]), 258: (3, [8 * samples.itemsize] * channels),
        259: (3, tags.get("compression", [1])), 262: (3, tags.get("photometric", [2])),
        273: (4, [8 + size * each for each in range(strips)]), 277: (3, [channels]),
        278: (4, [rows]), 279: (4, [size] * strips), 284: (3, planes),
        339: (3, [{"u": 1, "i": 2, "f": 3}[samples.dtype.kind]] * channels),
    }  # fmt: skip
    if channels in (2, 4):
        given[338] = (3, [2])
    data = samples.tobytes()
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + tiff_directory(given, 8 + len(data))


def test_a_16_bit_tiff_whose_white_is_zero() -> None:
    grey = np.linspace(0, 65535, 32 * 24).reshape(24, 32).astype("<u2")
    shown = load_pixels(tiff(grey, photometric=[1])).array
    negative = load_pixels(tiff(grey, photometric=[0])).array
    assert np.array_equal(negative, 255 - shown)
    assert shown[0, 0, 0] == 0


def test_16_bit_colours_with_and_without_alpha() -> None:
    colours = np.full((24, 32, 4), (60_000, 30_000, 10_000, 65_535), "<u2")
    expected = [60_000 / 257, 30_000 / 257, 10_000 / 257]
    for data in (tiff(colours), tiff(colours[:, :, :3].copy())):
        assert np.abs(load_pixels(data).array[3, 3] - expected).max() <= 1


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (tiff(np.zeros((3, 24, 32), "<u2"), planes=[2]), "3 x 16-bit samples, in separate planes"),
        (tiff(np.zeros((24, 32, 3), "<f4")), "3 x 32-bit floating-point samples"),
        (tiff(np.zeros((24, 32, 2), "<u2"), photometric=[1]), "2 x 16-bit samples"),
        (tiff(np.zeros((24, 32, 3), "u1"), compression=[50001]), "compression webp"),
        (tiff(np.zeros((24, 32, 3), "u1"), compression=[50002]), "compression 50002"),
    ],
)
def test_a_tiff_that_is_not_read_is_called_what_it_is(data: bytes, words: str) -> None:
    message = refusal(data)
    assert words in message
    assert "not an image" not in message
    assert "damaged" not in message


def test_files_that_are_open(photo: Image.Image, tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    path.write_bytes(encoded(photo, "PNG"))
    with path.open("rb") as file:
        pixels = load_pixels(file)
    assert (pixels.name, pixels.digest) == (str(path), load_pixels(path).digest)
    assert load_pixels(io.BytesIO(path.read_bytes())).name == "<file>"
    path.write_text("words")
    with path.open() as text:
        assert "open it as binary" in refusal(text)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("array", "what", "hint"),
    [
        (np.full((8, 9, 3), 0.5), "floats", "(array * 255).round().clip(0, 255)"),
        (np.full((8, 9, 3), 99.0), "floats", "(array).round().clip(0, 255)"),
        (np.zeros((3, 8, 9), np.uint8), "channels first", "array.transpose(1, 2, 0)"),
        (np.zeros((3, 8, 9)), "channels first", "(array.transpose(1, 2, 0) * 255).round()"),
        (np.zeros((8, 9, 3), np.uint16), "not an 8-bit", "(array // 257).astype"),
        (np.zeros((2, 8, 9, 3), np.uint8), "several images", "give a list of images"),
    ],
)
def test_an_array_is_refused_for_what_it_is(array: np.ndarray, what: str, hint: str) -> None:
    message = refusal(array)
    assert what in message
    assert hint in message


def test_a_refused_float_says_the_error_of_its_kind() -> None:
    with pytest.raises(DecodeError):
        load_pixels(np.zeros((8, 9, 3)))


@pytest.mark.parametrize("kind", ["JPEG", "TIFF", "PNG", "WEBP"])
def test_exif_is_read_with_the_photo(kind: str) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Model] = "Camera"
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.DateTimeOriginal] = "2026:05:01 12:00:00"
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.MakerNote] = b"its own" * 99
    exif[ExifTags.IFD.Exif] = 0  # Pillow writes a TIFF's only if its place has a value
    file = io.BytesIO()
    Image.new("RGB", (20, 30)).save(file, kind, exif=exif)
    photo = load_pixels(file.getvalue())
    assert photo.exif[ExifTags.Base.Model] == "Camera"
    assert photo.exif[ExifTags.Base.DateTimeOriginal] == "2026:05:01 12:00:00"
    assert ExifTags.Base.MakerNote not in photo.exif
    file.seek(0)
    assert raw_exif(file) == (photo.exif if kind == "TIFF" else {})
    assert file.tell() == 0


def test_an_exposure_that_is_cut_off_warns_nobody() -> None:
    cut = exif_bytes(1)[:-60]
    photo = load_pixels(encoded(Image.new("RGB", (20, 30)), "WEBP", exif=cut))
    assert photo.exif[ExifTags.Base.Make] == "Maker"


def test_exif_that_is_damaged_is_none() -> None:
    assert raw_exif(io.BytesIO(b"II*\0" + b"\xff" * 60)) == {}
    assert load_pixels(np.zeros((20, 20, 3), np.uint8)).exif == {}
