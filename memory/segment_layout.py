"""The layout of segments, immutable files of named arrays; little-endian throughout.

    0   8 bytes  magic "MEIQASEG"
    8   uint32   format version
    12  uint32   zero
    16  uint64   length of the header in bytes
    24  uint64   length of the file in bytes
    32  32 bytes SHA-256 of bytes 0-31 followed by the header
    64  header   JSON: {"attributes": {...}, "arrays": [{name, dtype, shape, offset, sha256}]}
    ..  arrays   C order, each at a multiple of 64 bytes, zeros between them

The first 64 bytes keep their meaning in every version, so that a newer file is told from a damaged
one. A file is never changed once it has its name: a new one is written beside it and renamed.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "ALIGNMENT",
    "DTYPES",
    "LARGEST_HEADER_BYTES",
    "MAGIC",
    "PREAMBLE",
    "PREAMBLE_BYTES",
    "VERSION",
    "Array",
]

Array = NDArray[Any]

MAGIC = b"MEIQASEG"
VERSION = 1
ALIGNMENT = 64
PREAMBLE = struct.Struct("<8sIIQQ")
PREAMBLE_BYTES = PREAMBLE.size + 32
LARGEST_HEADER_BYTES = 1 << 24
DTYPES = {name: np.dtype(name) for name in ("|i1", "|u1", "<i4", "<i8", "<f2", "<f4", "<f8")}
