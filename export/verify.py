"""PyTorch against what was exported: graphs on shapes not seen before, then grades of pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from meiqa.engine.grading import expected_grade
from meiqa.engine.local import LocalVlm
from meiqa.engine.manifest import DecoderShape, ImageProcessing
from meiqa.engine.runtime.base import Array, GraphSession
from meiqa.engine.vlm import Vlm
from meiqa.export.graphs import Interface

GRIDS = ((1, 1), (1, 7), (9, 2), (4, 4), (5, 6))
DECODER_SHAPES: tuple[tuple[int, ...], ...] = (
    # prefixes, rows, steps, prefix steps, past steps, wanted logits
    (1, 1, 9, 0, 0, 1),
    (1, 7, 5, 13, 0, 1),
    (3, 1, 4, 6, 0, 4),
    (2, 3, 1, 5, 8, 1),
    (1, 1, 1, 17, 3, 1),
    (2, 2, 6, 0, 4, 2),
)
Feeds = Mapping[str, Array]


class TorchSession:
    """A PyTorch module behind `GraphSession`: the reference that exports are compared with."""

    def __init__(self, module: nn.Module, interface: Interface) -> None:
        self._module, self._interface = module, interface

    def run(self, inputs: Feeds) -> dict[str, NDArray[np.float32]]:
        """Execute the module; see `GraphSession`."""
        arguments = (
            torch.from_numpy(np.require(inputs[n], requirements="W"))
            for n in self._interface.inputs
        )
        with torch.no_grad():
            made = self._module(*arguments)
        tensors = made if isinstance(made, tuple) else (made,)
        named = zip(self._interface.outputs, tensors, strict=True)
        return {name: tensor.numpy() for name, tensor in named}


def vision_feeds(image: ImageProcessing) -> Iterator[Feeds]:
    """Random pictures on several grids."""
    rng = np.random.default_rng(0)
    width = image.merge_size**2 * 3 * image.patch_size**2
    for grid in GRIDS:
        yield {"cells": rng.standard_normal((*grid, width), np.float32)}


def decoder_feeds(shape: DecoderShape) -> Iterator[Feeds]:
    """Random inputs of several shapes, empty prefix and empty past among them."""
    rng = np.random.default_rng(0)
    for sizes in DECODER_SHAPES:
        yield random_feeds(shape, sizes, rng)


def random_feeds(shape: DecoderShape, sizes: Sequence[int], rng: np.random.Generator) -> Feeds:
    """Random inputs of (prefixes, rows, steps, prefix steps, past steps, wanted logits)."""
    p, r, s, lp, lt, n = sizes
    layers, heads, width = shape.layers, shape.kv_heads, shape.head_dim

    def normal(*extents: int) -> NDArray[np.float32]:
        return rng.standard_normal(extents, np.float32)

    return {
        "embeds": 0.5 * normal(p, r, s, shape.embed_width),
        "positions": rng.integers(0, 64, (3, p, r, s)).astype(np.float32),
        "prefix": normal(layers, 2, p, heads, lp, width),
        "prefix_lengths": rng.integers(0, lp + 1, p),
        "past": normal(layers, 2, p, heads, r, lt, width),
        "past_lengths": rng.integers(0, lt + 1, (p, r)),
        "logit_positions": rng.integers(0, s, (p, r, n)),
    }


def largest_differences(
    wanted: GraphSession, made: GraphSession, feeds: Iterator[Feeds]
) -> dict[str, tuple[float, float]]:
    """Largest difference of each output between two sessions, and the largest value it was of.

    NaN where an output is not a number.
    """
    found: dict[str, tuple[float, float]] = {}
    for feed in feeds:
        exact, other = wanted.run(feed), made.run(feed)
        for name, values in exact.items():
            now = float(np.abs(values - other[name]).max()), float(np.abs(values).max())
            before = found.get(name, now)
            found[name] = float(np.max([now[0], before[0]])), max(now[1], before[1])
    return found


def grades(vlm: Vlm, pictures: Sequence[NDArray[np.uint8]]) -> NDArray[np.float64]:
    """Expected grade (N,) of each picture."""
    prefixes = vlm.read([vlm.encode(picture) for picture in pictures])
    return np.array([expected_grade(vlm.grade(prefix)) for prefix in prefixes])


def mean_move(
    wanted: LocalVlm, made: LocalVlm, pictures: Sequence[NDArray[np.uint8]]
) -> tuple[float, float]:
    """Mean and largest change of the expected grade from one model to its twin."""
    moves = np.abs(grades(wanted, pictures) - grades(made, pictures))
    return float(moves.mean()), float(moves.max())
