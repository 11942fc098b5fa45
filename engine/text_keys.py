"""Retrieval keys of texts whose hidden states nobody shows: hashed words and pairs of words."""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections import Counter

import numpy as np

from meiqa.engine.vlm import Floats

__all__ = ["TEXT_KEY", "TEXT_KEY_WIDTH", "text_key"]

TEXT_KEY = "hashed-words-1"
"""Name of the method: another would make another memory."""
TEXT_KEY_WIDTH = 512
_WORD = re.compile(r"\w+")


def text_key(text: str) -> Floats | None:
    """Direction of a text (512,), the same everywhere; None where it has no words.

    Each word, in lower case, and each pair of words in a row adds 1 + ln(times it occurs) to the
    element that its BLAKE2b hash names, or takes as much away, as the hash's next bit says: so the
    words that share an element cancel on average (Weinberger et al., "Feature Hashing for Large
    Scale Multitask Learning", 2009).

    >>> text_key("Sharp. Well exposed.") @ text_key("sharp, well EXPOSED")
    1.0
    """
    words = _WORD.findall(text.lower())
    if not words:
        return None
    terms = Counter(words) + Counter(map(" ".join, itertools.pairwise(words)))
    key = np.zeros(TEXT_KEY_WIDTH, np.float64)
    for term, times in terms.items():
        number = int.from_bytes(hashlib.blake2b(term.encode(), digest_size=8).digest(), "little")
        number, index = divmod(number, TEXT_KEY_WIDTH)
        key[index] += (1.0 if number % 2 else -1.0) * (1.0 + math.log(times))
    length = float(np.linalg.norm(key))
    # Terms that cancel each other wholly would leave nothing to search by.
    return (key / length).astype(np.float32) if length else None
