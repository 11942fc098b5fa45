"""The exported graphs say what PyTorch says, whatever the shapes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from meiqa.engine.package import EnginePackage
from meiqa.engine.runtime.base import GraphSession
from meiqa.engine.runtime.onnx import open_sessions
from meiqa.export.checkpoint import ConvHybridVlm, load_checkpoint
from meiqa.export.graphs import DECODER_INPUTS
from meiqa.export.parity import decoder_inputs

TOLERANCE = 1e-4
Shape = tuple[int, int, int, int, int, int]


def random_shapes(count: int) -> list[Shape]:
    """(prefixes, rows, steps, prefix steps, past steps, wanted logits), every edge among them."""
    random = np.random.default_rng(5)
    edges: list[Shape] = [
        (1, 1, 1, 0, 0, 1),
        (1, 1, 2, 0, 9, 1),
        (1, 5, 3, 12, 0, 2),
        (4, 1, 7, 1, 1, 7),
        (3, 4, 5, 9, 6, 3),
    ]
    highs = (5, 8, 12, 40, 20, 6)
    drawn = [
        tuple(int(random.integers(low, high)) for low, high in zip(lows, highs, strict=True))
        for lows in [(1, 1, 1, 0, 0, 1)] * (count - len(edges))
    ]
    return edges + drawn  # type: ignore[operator]


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> ConvHybridVlm:
    return load_checkpoint(checkpoint).model


@pytest.fixture(scope="module")
def sessions(package: EnginePackage) -> tuple[GraphSession, GraphSession]:
    return open_sessions(package, "cpu", 1)


def feeds_of(inputs: tuple[Tensor, ...]) -> dict[str, NDArray[np.float32] | NDArray[np.int64]]:
    return {name: value.numpy() for name, value in zip(DECODER_INPUTS, inputs, strict=True)}


@pytest.mark.parametrize("shape", random_shapes(24), ids=str)
def test_the_decoder_graph_equals_pytorch(
    model: ConvHybridVlm, sessions: tuple[GraphSession, GraphSession], shape: Shape
) -> None:
    inputs = decoder_inputs(model.language_model, shape, torch.Generator().manual_seed(sum(shape)))
    with torch.no_grad():
        wanted = model.language_model(*inputs)
    made = sessions[1].run(feeds_of(inputs))
    for name, tensor in zip(("logits", "hidden", "key_values"), wanted, strict=True):
        np.testing.assert_allclose(made[name], tensor.numpy(), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("grid", [(1, 1), (1, 9), (8, 1), (3, 5), (7, 7), (2, 31)], ids=str)
def test_the_vision_graph_equals_pytorch(
    model: ConvHybridVlm, sessions: tuple[GraphSession, GraphSession], grid: tuple[int, int]
) -> None:
    width = model.visual.config.cell_pixels**2 * 3
    cells = torch.randn(*grid, width, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        wanted = model.visual(cells)
    made = sessions[0].run({"cells": cells.numpy()})["tokens"]
    assert made.shape == (grid[0] * grid[1], model.visual.config.hidden_size)
    np.testing.assert_allclose(made, wanted.numpy(), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("shape", [(1, 1, 3, 8, 5, 1), (3, 4, 2, 11, 7, 2)], ids=str)
def test_what_lies_beyond_the_lengths_does_not_matter(
    model: ConvHybridVlm, sessions: tuple[GraphSession, GraphSession], shape: Shape
) -> None:
    inputs = decoder_inputs(model.language_model, shape, torch.Generator().manual_seed(1))
    clean = feeds_of(inputs)
    dirty = {name: value.copy() for name, value in clean.items()}
    for p, length in enumerate(clean["prefix_lengths"]):
        dirty["prefix"][:, :, p, :, int(length) :] = 1e4
    for (p, r), length in np.ndenumerate(clean["past_lengths"]):
        dirty["past"][:, :, p, :, r, int(length) :] = -1e4
    assert any((dirty[name] != clean[name]).any() for name in clean)
    made, wanted = sessions[1].run(dirty), sessions[1].run(clean)
    for name, values in wanted.items():
        np.testing.assert_allclose(made[name], values, atol=TOLERANCE, rtol=0)


def test_padding_gives_what_the_bare_segments_give(
    model: ConvHybridVlm, sessions: tuple[GraphSession, GraphSession]
) -> None:
    inputs = decoder_inputs(
        model.language_model, (1, 2, 4, 6, 3, 4), torch.Generator().manual_seed(2)
    )
    padded = feeds_of(inputs)
    padded["prefix_lengths"][:] = 4
    padded["past_lengths"][:] = 2
    bare = {**padded, "prefix": padded["prefix"][..., :4, :], "past": padded["past"][..., :2, :]}
    made, wanted = sessions[1].run(padded), sessions[1].run(bare)
    np.testing.assert_allclose(made["logits"], wanted["logits"], atol=TOLERANCE, rtol=0)


def test_the_manifest_states_the_parity_that_was_measured(package: EnginePackage) -> None:
    assert package.manifest.parity.keys() == {"vision", "decoder"}
    assert all(0 <= difference <= TOLERANCE for difference in package.manifest.parity.values())
