"""The arrays of an HNSW graph that is searched where it lies; `meiqa.kernels.hnsw` walks them.

They are apart from the kernel, whose import brings Numba: opening a memory takes a look at them,
searching it takes the kernel.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

LARGEST_WIDTH = 1 << 16


class Graph(NamedTuple):
    """A graph over N rows of width D, all arrays C-contiguous.

    Attributes:
        keys: float16 keys as uint16 bit patterns, ``(N, D)``, finite.
        levels: int8 rows for walking, ``(N, D)``; row ≈ levels × scale, up to its length.
        scales: float32 ``(N,)``.
        links: int32 neighbours at level 0, ``(N, M0)``; -1 where there is none.
        upper_offsets: int32 ``(N + 1,)``; the upper levels 1, 2, … of row i are
            ``upper_links[upper_offsets[i]:upper_offsets[i + 1]]``.
        upper_links: int32 ``(U, M)``; -1 where there is none.
        entry: int32 ``(1,)``: the row where the walk begins.
    """

    keys: NDArray[np.uint16]
    levels: NDArray[np.int8]
    scales: NDArray[np.float32]
    links: NDArray[np.int32]
    upper_offsets: NDArray[np.int32]
    upper_links: NDArray[np.int32]
    entry: NDArray[np.int32]


def check_graph(graph: Graph) -> None:
    """Refuse arrays of the wrong dtype, shape or layout, without reading them.

    Raises:
        ValueError: names the array.
    """
    rows, width = graph.keys.shape if graph.keys.ndim == 2 else (-1, -1)
    expected = {
        "keys": (np.uint16, (rows, width)),
        "levels": (np.int8, (rows, width)),
        "scales": (np.float32, (rows,)),
        "links": (np.int32, (rows, None)),
        "upper_offsets": (np.int32, (rows + 1,)),
        "upper_links": (np.int32, (None, None)),
        "entry": (np.int32, (1,)),
    }
    for name, (dtype, shape) in expected.items():
        array = getattr(graph, name)
        fits = array.ndim == len(shape) and all(
            extent is None or extent == seen
            for extent, seen in zip(shape, array.shape, strict=True)
        )
        if array.dtype != dtype or not fits or not array.flags.c_contiguous:
            raise ValueError(f"{name} must be a contiguous {np.dtype(dtype)} array of {shape}")
    if not 1 <= width <= LARGEST_WIDTH or rows >= 1 << 31:
        raise ValueError(f"{rows} rows of width {width} are more than the kernel can number")
