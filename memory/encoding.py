"""How vectors are stored: unit keys in float16, visual tokens in int8 with a scale per token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meiqa.memory.cases import FloatArray

__all__ = [
    "EncodedTokens",
    "decode_keys",
    "dequantise_tokens",
    "encode_key",
    "quantise_tokens",
    "unit_rows",
]

_LEVELS = 127
_SMALLEST_PEAK = np.float32(1e-30)


@dataclass(frozen=True, eq=False)
class EncodedTokens:
    """Visual tokens as stored: int8 `levels` (T, D) and float32 `scales` (T,)."""

    levels: NDArray[np.int8]
    scales: FloatArray


def quantise_tokens(tokens: FloatArray) -> EncodedTokens:
    """Round tokens to 255 levels each, symmetric around zero.

    A token with largest magnitude m comes back with every element within m / 254 (half a level)
    plus float32 rounding, a relative 2e-7 of m. A token with m below 1e-30 comes back as zeros.

    Args:
        tokens: float32 (T, D), finite, magnitudes below 1e38.

    >>> encoded = quantise_tokens(np.float32([[1.0, -0.5, 0.0]]))
    >>> encoded.levels.tolist()
    [[127, -64, 0]]
    """
    peaks = np.abs(tokens).max(axis=1, initial=0.0)
    scales = np.where(peaks < _SMALLEST_PEAK, 0.0, peaks / np.float32(_LEVELS)).astype(np.float32)
    divisors = np.where(scales == 0.0, np.float32(np.inf), scales)
    levels = np.rint(tokens / divisors[:, None])
    return EncodedTokens(np.clip(levels, -_LEVELS, _LEVELS).astype(np.int8), scales)


def dequantise_tokens(encoded: EncodedTokens) -> FloatArray:
    """Give stored tokens back as float32 (T, D); the error bound is `quantise_tokens`'s."""
    tokens: FloatArray = encoded.levels * encoded.scales[:, None]
    return tokens


def unit_rows(rows: FloatArray) -> FloatArray:
    """Scale each row of (N, D) to length 1; rows of zeros stay zeros."""
    wide = rows.astype(np.float64)
    peaks = np.abs(wide).max(axis=1, initial=0.0, keepdims=True)
    wide /= np.where(peaks > 0.0, peaks, 1.0)  # so that the squares cannot underflow
    lengths = np.sqrt((wide * wide).sum(axis=1, keepdims=True))
    return (wide / np.where(lengths > 0.0, lengths, 1.0)).astype(np.float32)


def encode_key(key: FloatArray) -> NDArray[np.float16]:
    """Give a key (D_key,) as a float16 unit vector; cosine similarity moves by less than 1e-3."""
    stored: NDArray[np.float16] = unit_rows(key[None])[0].astype(np.float16)
    return stored


def decode_keys(stored: NDArray[np.float16]) -> FloatArray:
    """Give stored keys (N, D_key) as read-only float32 unit rows."""
    keys = unit_rows(stored.astype(np.float32))
    keys.setflags(write=False)
    return keys
