"""The seam to whatever executes a graph: named arrays in, named arrays out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32] | NDArray[np.int64]


class GraphSession(Protocol):
    """One loaded graph."""

    def run(self, inputs: Mapping[str, Array]) -> dict[str, NDArray[np.float32]]:
        """Execute the graph.

        Args:
            inputs: every input of the graph by name.

        Returns:
            Every output by name.
        """
        ...
