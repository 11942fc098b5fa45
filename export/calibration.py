"""What the layers of a graph read while pictures are judged: ranges, mean squares, a sample."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from meiqa.engine.runtime.base import Array, GraphSession
from meiqa.export.piecewise import PiecewiseSession

Floats = NDArray[np.float32]
SAMPLED_VALUES, SAMPLED_ROWS = 1 << 20, 1024
"""A sample holds so many rows at most, and so many values: rows of wide layers are fewer."""
WRITING_EVERY = 16
"""Calls of one token write text; they are many and alike, so one in so many is looked at."""


@dataclass(frozen=True, eq=False)
class Observed:
    """One value of a graph over all calls, its channels apart.

    Attributes:
        low, high: (C,) smallest and largest value of each channel.
        square: (C,) mean square of each channel.
        rows: (n, C) random tokens or pixels.
        seen: tokens or pixels seen.
    """

    low: Floats
    high: Floats
    square: NDArray[np.float64]
    rows: Floats
    seen: int

    @property
    def magnitude(self) -> Floats:
        """(C,) largest absolute value of each channel."""
        return np.maximum(np.abs(self.low), np.abs(self.high))

    def divided(self, scales: Floats) -> Observed:
        """The same with each channel divided by a positive number (C,)."""
        return replace(
            self,
            low=self.low / scales,
            high=self.high / scales,
            square=self.square / np.square(scales, dtype=np.float64),
            rows=self.rows / scales,
        )


class Observer:
    """Collects what `Observed` holds of a value with so many channels."""

    def __init__(self, width: int) -> None:
        self._rng = np.random.default_rng(0)
        self._seen = 0
        self._low = np.full(width, np.inf, np.float32)
        self._high = np.full(width, -np.inf, np.float32)
        self._sum = np.zeros(width)
        self._limit = min(SAMPLED_ROWS, max(1, SAMPLED_VALUES // width))
        self._keys, self._rows = np.zeros(0), np.zeros((0, width), np.float32)

    def add(self, values: Floats) -> None:
        """Look at tokens or pixels (n, C)."""
        self._seen += len(values)
        self._low = np.minimum(self._low, values.min(0))
        self._high = np.maximum(self._high, values.max(0))
        self._sum += np.einsum("ij,ij->j", values, values, dtype=np.float64)
        # The rows with the smallest random keys: each row seen is as likely as any other.
        keys = np.concatenate([self._keys, self._rng.random(len(values))])
        kept = np.argsort(keys)[: self._limit]
        old, new = kept[kept < len(self._rows)], kept[kept >= len(self._rows)] - len(self._rows)
        self._keys = keys[np.concatenate([old, new + len(self._rows)])]
        self._rows = np.concatenate([self._rows[old], values[new]])

    def observed(self) -> Observed:
        """Everything so far."""
        return Observed(self._low, self._high, self._sum / self._seen, self._rows, self._seen)


class ObservingSession:
    """A graph behind `GraphSession` that notes some of its values in passing.

    Args:
        session: executes the graph and returns those values besides its outputs.
        channel_axes: the values to note, with the axis that counts channels.
    """

    def __init__(self, session: GraphSession, channel_axes: Mapping[str, int]) -> None:
        self._session = session
        self._axes = channel_axes
        self._observers: dict[str, Observer] = {}
        self._written = 0

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Floats]:
        """Execute the graph; see `GraphSession`. What is noted is returned too."""
        made = self._session.run(inputs)
        writes = "embeds" in inputs and inputs["embeds"].shape[2] == 1
        if not writes or self._written % WRITING_EVERY == 0:
            for name, axis in self._axes.items():
                channels_last = np.moveaxis(made[name], axis, -1)
                width = channels_last.shape[-1]
                observer = self._observers.setdefault(name, Observer(width))
                observer.add(channels_last.reshape(-1, width))
        self._written += writes
        return made

    def observed(self) -> dict[str, Observed]:
        """What was noted of each value, once there was a call."""
        return {name: observer.observed() for name, observer in self._observers.items()}


@contextmanager
def observing(path: Path, channel_axes: Mapping[str, int]) -> Iterator[ObservingSession]:
    """Open a graph file so that the values with these channel axes are noted."""
    copy = path.with_name(f".{path.name}.observed")
    try:
        add_outputs(path, copy, list(channel_axes))
        yield ObservingSession(PiecewiseSession(copy), channel_axes)
    finally:
        copy.unlink(missing_ok=True)


def add_outputs(path: Path, copy: Path, names: Sequence[str]) -> None:
    """Write a twin of a graph, beside it so that it finds its weights, with values as outputs."""
    model = onnx.load(path, load_external_data=False)
    present = {output.name for output in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names if n not in present)
    copy.write_bytes(model.SerializeToString())
