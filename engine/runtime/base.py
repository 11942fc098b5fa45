"""The seam to whatever executes a graph: named arrays in, named arrays out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from meiqa.errors import AnswerNotFinite

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


@runtime_checkable
class RowSession(GraphSession, Protocol):
    """A decoder that can also read rows, and run them for their last tokens alone, and faster."""

    def keys_and_values(
        self,
        embeds: NDArray[np.float32],
        positions: NDArray[np.float32],
        steps: NDArray[np.int64],
    ) -> list[NDArray[np.float32]]:
        """Keys and values (L, 2, H, steps, d) of rows without a prefix; see `last_logits`."""
        ...

    def last_logits(
        self,
        embeds: NDArray[np.float32],
        positions: NDArray[np.float32],
        steps: NDArray[np.int64],
        prefixes: Sequence[NDArray[np.float32]],
        wanted: Sequence[int],
    ) -> NDArray[np.float32]:
        """Logits (R, len(wanted)) of some tokens in place of each row's next one.

        Args:
            embeds: (R, S, D), padded on the right.
            positions: (3, R, S) temporal, row and column positions.
            steps: (R,) how many of the S tokens are real.
            prefixes: keys and values (L, 2, H, T, d) of each row's prefix, or of the only one.
            wanted: ids of the tokens.
        """
        ...


def require_finite(values: NDArray[np.float32]) -> None:
    """Refuse what overflowed on its way through the model.

    Raises:
        AnswerNotFinite: a value is not a number, or infinite.
    """
    if not np.isfinite(values).all():
        raise AnswerNotFinite(
            "the model's answer is not a number",
            hint="export the model with --precision fp32, whose range is wider",
        )
