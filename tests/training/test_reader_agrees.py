"""Training reads and asks exactly as the engine does, so what was learned is what is asked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from meiqa.engine.local import LocalModel
from meiqa.engine.model import Prefix, VisualTokens
from meiqa.engine.package import EnginePackage
from meiqa.engine.runtime import open_graphs
from meiqa.engine.runtime.decoder import Array, GraphDecoder, GraphSession
from tests.engine.samples import picture
from training.checkpoint import load_checkpoint
from training.finetune import Reader, ReadPictures
from training.towers import MEAN, STD, normalised

TOLERANCE = 1e-4
GRID = (2, 3)
PICTURES = np.stack([picture(seed, (64 * GRID[0], 64 * GRID[1])) for seed in range(3)])
SUMMARY = "The picture is soft and dark. Overall poor quality."


class Overheard:
    """A session whose logits are kept."""

    def __init__(self, session: GraphSession) -> None:
        self.session = session
        self.logits: list[NDArray[np.float32]] = []

    def run(self, inputs: Mapping[str, Array]) -> dict[str, NDArray[np.float32]]:
        """Execute the graph."""
        made = self.session.run(inputs)
        self.logits.append(made["logits"])
        return made


@pytest.fixture(scope="module")
def reader(checkpoint: Path) -> Reader:
    loaded = load_checkpoint(checkpoint)
    return Reader(loaded.model, loaded.tokenizer)


@pytest.fixture(scope="module")
def trained(reader: Reader) -> ReadPictures:
    """Give the pictures as training reads them."""
    with torch.no_grad():
        features = reader.model.visual.cell_features(normalised(torch.from_numpy(PICTURES)))
        return reader.read(features.flatten(1, 2), GRID)


@pytest.fixture
def decoder(package: EnginePackage) -> Overheard:
    (session,) = open_graphs(package, ["decoder"], "cpu", 1)
    return Overheard(session)


@pytest.fixture
def model(package: EnginePackage, decoder: Overheard) -> LocalModel:
    (vision,) = open_graphs(package, ["vision"], "cpu", 1)
    return LocalModel(package, vision, GraphDecoder(decoder, package.manifest.decoder))


@pytest.fixture
def prefixes(model: LocalModel, trained: ReadPictures, decoder: Overheard) -> list[Prefix]:
    """Give training's visual tokens as the engine reads them."""
    read = model.prefill([VisualTokens(tokens.numpy(), GRID) for tokens in trained.tokens])
    decoder.logits.clear()
    return read


def assert_near(made: NDArray[np.float32], wanted: torch.Tensor) -> None:
    assert wanted.std() > 0.1
    np.testing.assert_allclose(made.reshape(wanted.shape), wanted.numpy(), atol=TOLERANCE, rtol=0)


def test_pixels_are_normalised_alike(model: LocalModel, trained: ReadPictures) -> None:
    assert (model.image.mean, model.image.std) == (MEAN, STD)
    for pixels, tokens in zip(PICTURES, trained.tokens, strict=True):
        seen = model.encode(pixels)
        assert seen.grid == GRID
        assert_near(seen.values, tokens)


def test_prefixes_are_alike(prefixes: list[Prefix], trained: ReadPictures) -> None:
    for index, prefix in enumerate(prefixes):
        assert prefix.opening.length == trained.lengths[index]
        assert prefix.next_position == trained.next_position
        assert_near(prefix.opening.array, trained.key_values[:, :, index])


def test_grades_are_asked_alike(
    model: LocalModel,
    decoder: Overheard,
    prefixes: list[Prefix],
    reader: Reader,
    trained: ReadPictures,
) -> None:
    with torch.no_grad():
        wanted = reader.asked(trained, reader.prompts.levels)
    for prefix, logits in zip(prefixes, wanted, strict=True):
        model.grade(prefix)
        assert_near(decoder.logits.pop(), logits)


def test_descriptions_are_asked_alike(
    model: LocalModel,
    decoder: Overheard,
    prefixes: list[Prefix],
    reader: Reader,
    trained: ReadPictures,
) -> None:
    with torch.no_grad():
        described = reader.asked(trained, reader.prompts.score)
        reflected = reader.asked(trained, reader.prompts.reflect(SUMMARY, 2.0, 3.5))
    for prefix, first, corrected in zip(prefixes, described, reflected, strict=True):
        decoder.logits.clear()
        model.describe(prefix, 1)
        assert_near(decoder.logits[0][0, 0, 0], first)
        decoder.logits.clear()
        model.reflect(prefix, SUMMARY, 2.0, 3.5)
        # What follows in the same call is behind tokens of the draft.
        assert_near(decoder.logits[0][0, 0, 0], corrected)


@pytest.mark.parametrize("shared", [True, False], ids=["one-first", "paired"])
def test_comparisons_are_asked_alike(
    model: LocalModel,
    decoder: Overheard,
    prefixes: list[Prefix],
    reader: Reader,
    trained: ReadPictures,
    shared: bool,
) -> None:
    partners = torch.tensor([[1, 2], [2, 0], [0, 1]])
    with torch.no_grad():
        wanted = reader.compared(trained, trained.tokens, trained.grid, partners).reshape(3, 2, -1)
    first_id, second_id = reader.prompts.verdict_ids
    for first, (others, logits) in enumerate(zip(partners.tolist(), wanted, strict=True)):
        seconds = [prefixes[other].tokens for other in others]
        firsts = [prefixes[first]] * (1 if shared else len(seconds))
        verdicts = model.prefer_first(firsts, seconds)
        assert_near(decoder.logits.pop(), logits)
        difference = logits[:, first_id] - logits[:, second_id]
        np.testing.assert_allclose(verdicts, difference.numpy(), atol=TOLERANCE, rtol=0)
