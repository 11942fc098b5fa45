"""Whatever colours a photo was stored in → sRGB, by LittleCMS; sRGB itself is left as it is."""

from __future__ import annotations

import io
import struct
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SAYS_COLOURS = {"icc_profile", "cicp", "gamma", "chromaticity"}
"""What Pillow calls that which tells of an image's colours; without any they are sRGB's."""
ADOBE_RGB: dict[str, Any] = {
    "gamma": 256 / 563,
    "chromaticity": (0.3127, 0.3290, 0.64, 0.33, 0.21, 0.71, 0.15, 0.06),
}
"""What a camera means that says R03 in EXIF, where it embeds no profile (DCF, optional colours)."""
PROFILE_UNREADABLE = "colour profile unreadable: taken as sRGB"
_ALIKE = 2
"""Levels by which a profile's colours may differ from sRGB's and still be called sRGB."""
_SRGB_GAMMA = 1 / 2.2
_D50 = np.array([0.9642, 1.0, 0.8249])
_BRADFORD = np.array(
    [[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]]
)
_D65 = (0.3127, 0.3290)
_SRGB = (0.64, 0.33, 0.30, 0.60, 0.15, 0.06)
_PRIMARIES = {  # ITU-T H.273, table 2
    1: _SRGB,
    5: (0.64, 0.33, 0.29, 0.60, 0.15, 0.06),
    6: (0.630, 0.340, 0.310, 0.595, 0.155, 0.070),
    7: (0.630, 0.340, 0.310, 0.595, 0.155, 0.070),
    9: (0.708, 0.292, 0.170, 0.797, 0.131, 0.046),
    12: (0.680, 0.320, 0.265, 0.690, 0.150, 0.060),
}
_GAMMAS = {4: 2.2, 5: 2.8, 8: 1.0}
_PQ, _HLG = 16, 18
_CHANNELS = {"L": "GRAY", "RGB": "RGB ", "RGBA": "RGB ", "CMYK": "CMYK"}
"""Modes that LittleCMS converts, and the colour space that their profile has to be of."""

Curve = NDArray[np.float64]
"""Linear light of code values that go evenly from 0 to 1."""


def to_srgb(image: Image.Image, info: Mapping[Any, Any], notes: list[str]) -> Image.Image:
    """Convert a loaded 8-bit image from its ICC profile, CICP code or gamma to sRGB.

    Args:
        info: what the file says of its colours, as Pillow gives it: `icc_profile`, or `srgb`,
            `gamma` and `chromaticity` of a PNG; `cicp` is primaries and transfer by ITU-T H.273.
        notes: gets a line if they can't be told.

    Returns:
        The very image given where that is sRGB, or nothing is said.
    """
    profile = _profile_of(info)
    if profile is None:
        return image
    space = profile[16:20].decode("latin-1")
    straight = _straightened(image, space)
    try:
        if _CHANNELS[straight.mode] != space:
            raise ValueError("the profile is of another kind of colours")
        transform = _transform(profile, straight.mode)
    except Exception:  # LittleCMS and its wrapper raise many things over broken profiles
        notes.append(PROFILE_UNREADABLE)
        return image
    if transform is None:
        return image
    converted: Image.Image = transform.apply(straight)
    return converted


def cicp_of(head: bytes) -> tuple[int, int] | None:
    """Find colour primaries and transfer in the head of a HEIF, AVIF or PNG file."""
    for name, layout in ((b"colrnclx", ">HH"), (b"cICP", ">BB")):
        _, _, found = head.partition(name)
        if len(found) >= struct.calcsize(layout):
            primaries, transfer = struct.unpack_from(layout, found)
            return primaries, transfer
    return None


def _straightened(image: Image.Image, space: str) -> Image.Image:
    """Bring an image into a mode whose values a profile of such colours explains."""
    if image.mode in ("L", "CMYK") and not image.has_transparency_data:
        return image.convert("RGB") if (image.mode, space) == ("L", "RGB ") else image
    if image.mode in ("1", "LA") and space == "GRAY":
        return image.convert("L") if image.mode == "1" else image
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


def _profile_of(info: Mapping[Any, Any]) -> bytes | None:
    """Give the ICC profile of an image, or one made from what stands in its place."""
    if icc := info.get("icc_profile"):
        return bytes(icc)
    if (cicp := info.get("cicp")) is not None:
        return _cicp_profile(*cicp)
    if "srgb" in info or not ("gamma" in info or "chromaticity" in info):
        return None
    white, primaries = _D65, _SRGB
    if chromaticity := info.get("chromaticity"):
        white, primaries = tuple(chromaticity[:2]), tuple(chromaticity[2:])
    gamma = info.get("gamma") or _SRGB_GAMMA
    usual = abs(gamma - _SRGB_GAMMA) < 0.01
    if usual and np.allclose((*white, *primaries), (*_D65, *_SRGB), atol=0.005):
        return None  # what writers of sRGB say of it
    return matrix_profile(white, primaries, np.linspace(0, 1, 1024) ** (1 / gamma))


@lru_cache(maxsize=8)
def _cicp_profile(primaries: int, transfer: int) -> bytes | None:
    """Make the profile of a code of ITU-T H.273; None for sRGB, and for what has no meaning."""
    corners = _PRIMARIES.get(primaries)
    if corners is None or (corners == _SRGB and transfer not in (*_GAMMAS, _PQ, _HLG)):
        return None
    return matrix_profile(_D65, corners, _linear(transfer))


def _linear(transfer: int) -> Curve:
    """Give the linear light of code values, 1 at the white of a page.

    PQ is that of SMPTE ST 2084 with white at 203 cd/m², HLG that of BT.2100 with white at 75 %
    (BT.2408); what is brighter is clipped. The curves of video are shown as sRGB's, as browsers do.
    """
    code = np.linspace(0, 1, 1024)
    if transfer in _GAMMAS:
        return np.asarray(code ** _GAMMAS[transfer])
    if transfer == _PQ:
        power = code ** (1 / 78.84375)
        light = (np.maximum(power - 0.8359375, 0) / (18.8515625 - 18.6875 * power)) ** (1 / 0.1593)
        return np.asarray(np.minimum(light * 10_000 / 203, 1))
    if transfer == _HLG:
        high = (np.exp((code - 0.55991073) / 0.17883277) + 0.28466892) / 12
        scene = np.where(code <= 0.5, code**2 / 3, high)
        return np.minimum(scene / 0.26496256, 1)
    return np.where(code <= 0.04045, code / 12.92, ((code + 0.055) / 1.055) ** 2.4)


def matrix_profile(white: tuple[float, ...], primaries: tuple[float, ...], curve: Curve) -> bytes:
    """Make an ICC profile (v2, matrix and curve) for LittleCMS.

    Args:
        white: x, y; primaries: x, y of red, green and blue.
        curve: of all three channels.
    """
    corners = _xyz(np.reshape(primaries, (3, 2)))
    shown = _xyz(np.reshape(white, (1, 2)))[:, 0]
    columns = corners * np.linalg.solve(corners, shown)
    adapt = np.linalg.inv(_BRADFORD) @ np.diag(_BRADFORD @ _D50 / (_BRADFORD @ shown)) @ _BRADFORD
    table = np.round(curve * 65535).astype(">u2")
    tags = {b"wtpt": _xyz_tag(_D50)}
    for channel, column in zip(b"rgb", (adapt @ columns).T, strict=True):
        tags[bytes([channel]) + b"XYZ"] = _xyz_tag(column)
        tags[bytes([channel]) + b"TRC"] = struct.pack(">4sII", b"curv", 0, len(table)) + bytes(
            table
        )
    place, index, body = 132 + 12 * len(tags), b"", b""
    for name, tag in tags.items():
        index += struct.pack(">4sII", name, place + len(body), len(tag))
        body += tag
    size = place + len(body)
    head = struct.pack(">I4sI4s4s4s", size, b"", 0x02400000, b"mntr", b"RGB ", b"XYZ ")
    head += struct.pack(">12s4s28s", b"", b"acsp", b"") + _fixed(_D50)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + index + body


def _xyz(xy: NDArray[np.float64]) -> NDArray[np.float64]:
    """XYZ at Y = 1, one column each, of chromaticities (n, 2)."""
    x, y = xy.T
    return np.stack([x / y, np.ones_like(y), (1 - x - y) / y])


def _fixed(values: NDArray[np.float64]) -> bytes:
    return bytes(np.round(values * 65536).astype(">i4"))


def _xyz_tag(values: NDArray[np.float64]) -> bytes:
    return struct.pack(">4sI", b"XYZ ", 0) + _fixed(values)


@lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> Any:
    """Open the way from a profile to sRGB, None if both are alike."""
    from PIL import ImageCms  # an image without a profile does without it

    transform = ImageCms.buildTransform(
        ImageCms.ImageCmsProfile(io.BytesIO(profile)),
        ImageCms.createProfile("sRGB"),
        mode,
        "RGBA" if mode == "RGBA" else "RGB",
        ImageCms.Intent.RELATIVE_COLORIMETRIC,
        ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )
    probe = _probe().convert(mode)
    if mode == "CMYK":
        return transform
    shown, given = (
        np.asarray(each.convert("RGB"), int) for each in (transform.apply(probe), probe)
    )
    return None if np.abs(shown - given).max() <= _ALIKE else transform


def _probe() -> Image.Image:
    """Colours from all over RGB."""
    levels = np.arange(0, 256, 15, dtype=np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels), axis=-1)
    return Image.fromarray(grid.reshape(len(levels), -1, 3))
