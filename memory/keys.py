"""The keys by which cases are found: of what was written, of what is seen, or of both.

A memory holds keys of one kind, and the key of a query is made by the same function as theirs.
"""

from __future__ import annotations

import numpy as np

from meiqa.errors import UsageError
from meiqa.memory.cases import FloatArray, Widths
from meiqa.memory.encoding import unit_rows
from meiqa.types import KeyKind

__all__ = ["key_widths", "retrieval_key", "summary_of_key"]


def retrieval_key(kind: KeyKind, summary: FloatArray, tokens: FloatArray) -> FloatArray:
    """Make the key of a photo, stored or sought.

    "summary" takes the summary's key as it is, "image" the direction of the mean visual token, and
    "both" the two unit vectors one behind the other, over √2, so that a cosine is the mean of
    theirs.

    Args:
        kind: Of the memory's keys.
        summary: Key of what was written, or what is projected in its place (D_summary,).
        tokens: Visual tokens (T, D), T of at least 1.

    >>> retrieval_key("both", np.float32([3, 0]), np.float32([[0, 2], [0, 4]])).round(3).tolist()
    [0.7070000171661377, 0.0, 0.0, 0.7070000171661377]
    """
    if kind == "summary":
        return summary
    mean = tokens.mean(axis=0, dtype=np.float64).astype(np.float32)
    image: FloatArray = unit_rows(mean[None])[0]
    if kind == "image":
        return image
    parts = np.concatenate([unit_rows(summary[None])[0], image])
    both: FloatArray = parts * np.float32(np.sqrt(0.5))
    return both


def summary_of_key(key: FloatArray, width: int) -> FloatArray:
    """Give the direction of the summary's key, with which a "summary" or "both" key begins."""
    part: FloatArray = unit_rows(key[None, :width])[0]
    return part


def key_widths(kind: KeyKind, summary: int, token: int) -> Widths:
    """Give the widths of keys and tokens, for summary keys and visual tokens of these widths.

    Raises:
        UsageError: there is no such kind.

    >>> key_widths("both", 256, 512)
    Widths(key=768, token=512)
    """
    keys: dict[KeyKind, int] = {"summary": summary, "image": token, "both": summary + token}
    if kind not in keys:
        raise UsageError("unknown kind of key", seen=kind, allowed=", ".join(keys))
    return Widths(keys[kind], token)
