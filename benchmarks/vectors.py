"""Vectors to measure searches with."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["clustered_vectors"]

Floats = NDArray[np.float32]

_LATENT, _PER_CLUSTER, _NOISE = 64, 100, 0.02
_CHUNK_ROWS = 1 << 16


def clustered_vectors(
    count: int, dims: int, queries: int, seed: int
) -> tuple[NDArray[np.float16], Floats]:
    """Draw unit vectors that have neighbours, and queries of the same kind.

    A mixture of Gaussians in 64 dimensions, 100 vectors to a component on average and as wide as
    the spread of the components, is carried into `dims` dimensions by one random matrix; a little
    noise in all dimensions is added. Embeddings of sentences have about as many dimensions of
    their own.

    Returns:
        float16 (count, dims) and float32 (queries, dims), of length 1.
    """
    random = np.random.default_rng([seed, count, dims])
    centres = random.standard_normal((max(count // _PER_CLUSTER, 1), _LATENT), np.float32)
    carry = random.standard_normal((_LATENT, dims), np.float32) / np.float32(_LATENT**0.5)

    def draw(rows: int) -> Floats:
        latent = centres[random.integers(len(centres), size=rows)]
        latent += random.standard_normal(latent.shape, np.float32)
        vectors = latent @ carry
        vectors += np.float32(_NOISE) * random.standard_normal(vectors.shape, np.float32)
        unit: Floats = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return unit

    vectors = np.empty((count, dims), np.float16)
    for start in range(0, count, _CHUNK_ROWS):
        part = vectors[start : start + _CHUNK_ROWS]
        part[:] = draw(len(part))
    return vectors, draw(queries)
