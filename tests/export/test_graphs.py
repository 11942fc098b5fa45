"""The exported graphs say what PyTorch says, whatever the shapes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from meiqa.engine.manifest import DecoderShape
from meiqa.engine.package import EnginePackage
from meiqa.engine.runtime import open_graphs
from meiqa.engine.runtime.decoder import GraphSession
from meiqa.export.checkpoint import Checkpoint
from meiqa.export.graphs import TorchSession
from meiqa.export.verify import Feeds, PiecewiseSession, random_feeds
from tests.export.tiny import reference_sessions

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
def reference(checkpoint: Path) -> tuple[TorchSession, TorchSession]:
    """Give the vision tower and the decoder in PyTorch."""
    return reference_sessions(Checkpoint.open(checkpoint))


@pytest.fixture(scope="module")
def sessions(package: EnginePackage) -> tuple[GraphSession, GraphSession]:
    vision, decoder = open_graphs(package, ["vision", "decoder"], "cpu", 1)
    return vision, decoder


@pytest.fixture(scope="module")
def shape(package: EnginePackage) -> DecoderShape:
    return package.manifest.decoder


def same(
    made: GraphSession, wanted: GraphSession, feeds: Feeds, other: Feeds | None = None
) -> None:
    """Assert that two sessions give the same, or that one does with two inputs."""
    found, exact = made.run(feeds), wanted.run(feeds if other is None else other)
    assert found.keys() == exact.keys()
    for name, values in exact.items():
        np.testing.assert_allclose(found[name], values, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("sizes", random_shapes(24), ids=str)
def test_the_decoder_graph_equals_pytorch(
    reference: tuple[TorchSession, TorchSession],
    sessions: tuple[GraphSession, GraphSession],
    shape: DecoderShape,
    sizes: Shape,
) -> None:
    feeds = random_feeds(shape, sizes, np.random.default_rng(sum(sizes)))
    same(sessions[1], reference[1], feeds)


@pytest.mark.parametrize("grid", [(1, 1), (1, 9), (8, 1), (3, 5), (7, 7), (2, 31)], ids=str)
def test_the_vision_graph_equals_pytorch(
    reference: tuple[TorchSession, TorchSession],
    sessions: tuple[GraphSession, GraphSession],
    package: EnginePackage,
    grid: tuple[int, int],
) -> None:
    width = package.manifest.graphs["vision"].inputs["cells"][2]
    assert isinstance(width, int)
    cells = np.random.default_rng(3).standard_normal((*grid, width), np.float32)
    same(sessions[0], reference[0], {"cells": cells})


@pytest.mark.parametrize("sizes", [(1, 1, 3, 8, 5, 1), (3, 4, 2, 11, 7, 2)], ids=str)
def test_what_lies_beyond_the_lengths_does_not_matter(
    sessions: tuple[GraphSession, GraphSession], shape: DecoderShape, sizes: Shape
) -> None:
    clean = random_feeds(shape, sizes, np.random.default_rng(1))
    dirty = {name: value.copy() for name, value in clean.items()}
    for p, length in enumerate(clean["prefix_lengths"]):
        dirty["prefix"][:, :, p, :, int(length) :] = 1e4
    for (p, r), length in np.ndenumerate(clean["past_lengths"]):
        dirty["past"][:, :, p, :, r, int(length) :] = -1e4
    assert any((dirty[name] != clean[name]).any() for name in clean)
    same(sessions[1], sessions[1], dirty, clean)


def test_padding_gives_what_the_bare_segments_give(
    sessions: tuple[GraphSession, GraphSession], shape: DecoderShape
) -> None:
    padded = dict(random_feeds(shape, (1, 2, 4, 6, 3, 4), np.random.default_rng(2)))
    padded["prefix_lengths"][:] = 4
    padded["past_lengths"][:] = 2
    bare = {**padded, "prefix": padded["prefix"][..., :4, :], "past": padded["past"][..., :2, :]}
    same(sessions[1], sessions[1], padded, bare)


@pytest.mark.parametrize("piece_bytes", [1, 20_000, 1 << 30])
def test_a_graph_gives_the_same_piece_by_piece(
    package: EnginePackage,
    sessions: tuple[GraphSession, GraphSession],
    shape: DecoderShape,
    piece_bytes: int,
) -> None:
    feeds = random_feeds(shape, (2, 3, 4, 5, 6, 2), np.random.default_rng(4))
    same(PiecewiseSession(package.path / "decoder.onnx", piece_bytes), sessions[1], feeds)
    assert {file.name for file in package.path.iterdir()} == {
        "manifest.json",
        *package.manifest.files,
    }


@pytest.mark.parametrize("name", ["vision", "decoder"])
def test_a_graph_keeps_the_names_of_its_weights_and_nothing_of_its_making(
    package: EnginePackage, checkpoint: Path, name: str
) -> None:
    model = onnx.load(package.path / f"{name}.onnx", load_external_data=False)
    opened = Checkpoint.open(checkpoint)
    module = opened.tower() if name == "vision" else opened.decoder()
    kept = {weight.name for weight in model.graph.initializer}
    assert {n for n, _ in module.named_parameters()} - {"embed_tokens.weight"} <= kept
    assert {opset.domain for opset in model.opset_import} == {""}
    assert not any(node.doc_string or node.metadata_props for node in model.graph.node)


def test_convolutions_pad_by_themselves(package: EnginePackage) -> None:
    model = onnx.load(package.path / "vision.onnx", load_external_data=False)
    assert not any(node.op_type == "Pad" for node in model.graph.node)
    pads = [
        tuple(attribute.ints)
        for node in model.graph.node
        for attribute in node.attribute
        if attribute.name == "pads" and node.op_type == "Conv"
    ]
    assert (0, 0, 1, 1) in pads
    assert (1, 1, 1, 1) in pads
    assert (1, 1, 2, 2) in pads
