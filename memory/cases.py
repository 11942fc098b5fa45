"""The remembered photo, and what is asked of one before it is stored."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from meiqa.errors import UsageError
from meiqa.types import Origin

__all__ = ["Case", "FloatArray", "Widths", "check_case"]

FloatArray: TypeAlias = NDArray[np.float32]


@dataclass(frozen=True)
class Widths:
    """Widths of the vectors that one memory holds: (D_key,) keys and (T, D) tokens."""

    key: int
    token: int

    def __post_init__(self) -> None:
        for name, width in (("key", self.key), ("token", self.token)):
            if width < 1:
                raise UsageError(f"the {name} width must be positive", seen=width, allowed=">= 1")


@dataclass(frozen=True, eq=False)
class Case:
    """A photo with a known score, as the memory gives it back.

    Attributes:
        id: Unique within its origin; ties in retrieval are broken by it.
        origin: "anchor" (a human score, read-only) or "contrast" (learned online).
        image_digest: Digest of the pixels, hexadecimal.
        score: 1.00–5.00, higher is better.
        std: Standard deviation of the score, in the same unit.
        summary: What was written about the photo's quality; may be empty.
        key: float32 (D_key,). Stored as a unit vector in float16: its length is not kept.
        tokens: float32 (T, D) visual tokens. Stored in int8 with one scale per token.
        grid: Rows and columns of cells, T in all.
    """

    id: str
    origin: Origin
    image_digest: str
    score: float
    std: float
    summary: str
    key: FloatArray
    tokens: FloatArray
    grid: tuple[int, int]


def check_case(case: Case, origin: Origin, widths: Widths) -> None:
    """Refuse a case that could not be stored, or not be found again.

    Raises:
        UsageError: wrong origin, empty id or digest, score off the scale, wrong shape or grid,
            NaN or inf.
    """
    if case.origin != origin:
        raise UsageError(f"case {case.id!r} has the wrong origin", seen=case.origin, allowed=origin)
    if not case.id or not case.image_digest:
        raise UsageError("a case needs an id and an image digest", seen=case.id or "an empty id")
    if not 1.0 <= case.score <= 5.0:
        raise UsageError(
            f"case {case.id!r} has a score off the scale",
            seen=case.score,
            allowed="1.0 to 5.0",
            hint="map the label to the 1-5 scale first",
        )
    if not (math.isfinite(case.std) and case.std >= 0.0):
        raise UsageError(
            f"case {case.id!r} has no valid std", seen=case.std, allowed="a finite number >= 0"
        )
    _check_array(case.id, "key", case.key, (widths.key,))
    _check_array(case.id, "tokens", case.tokens, (len(case.tokens), widths.token))
    if min(case.grid) < 1 or len(case.tokens) not in (0, case.grid[0] * case.grid[1]):
        raise UsageError(
            f"case {case.id!r} has a grid that does not fit its tokens",
            seen=case.grid,
            allowed=f"{len(case.tokens)} cells in all",
        )


def _check_array(case_id: str, name: str, array: FloatArray, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise UsageError(
            f"case {case_id!r} has {name} of the wrong shape", seen=array.shape, allowed=shape
        )
    if not np.isfinite(array).all():
        raise UsageError(f"case {case_id!r} has {name} that are not finite")
