"""Training reads and asks exactly as the engine does, so what was learned is what is asked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from meiqa.engine.local import LocalVlm
from meiqa.engine.package import EnginePackage
from meiqa.engine.runtime.base import Array, GraphSession
from meiqa.engine.runtime.onnx import open_sessions
from meiqa.engine.vlm import Prefix, VisualTokens
from meiqa.training.checkpoint import load_checkpoint
from meiqa.training.finetune import Reader, ReadPictures
from meiqa.training.towers import MEAN, STD, normalised
from tests.engine.samples import picture

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
    return Overheard(open_sessions(package, "cpu", 1)[1])


@pytest.fixture
def vlm(package: EnginePackage, decoder: Overheard) -> LocalVlm:
    return LocalVlm(package, open_sessions(package, "cpu", 1)[0], decoder)


@pytest.fixture
def prefixes(vlm: LocalVlm, trained: ReadPictures, decoder: Overheard) -> list[Prefix]:
    """Give training's visual tokens as the engine reads them."""
    read = vlm.read([VisualTokens(tokens.numpy(), GRID) for tokens in trained.tokens])
    decoder.logits.clear()
    return read


def assert_near(made: NDArray[np.float32], wanted: torch.Tensor) -> None:
    assert wanted.std() > 0.1
    np.testing.assert_allclose(made.reshape(wanted.shape), wanted.numpy(), atol=TOLERANCE, rtol=0)


def test_pixels_are_normalised_alike(vlm: LocalVlm, trained: ReadPictures) -> None:
    assert (vlm.image.mean, vlm.image.std) == (MEAN, STD)
    for pixels, tokens in zip(PICTURES, trained.tokens, strict=True):
        seen = vlm.encode(pixels)
        assert seen.grid == GRID
        assert_near(seen.values, tokens)


def test_prefixes_are_alike(prefixes: list[Prefix], trained: ReadPictures) -> None:
    for index, prefix in enumerate(prefixes):
        assert prefix.length == trained.lengths[index]
        assert prefix.next_position == trained.next_position
        assert_near(prefix.key_values, trained.key_values[:, :, index])


def test_grades_are_asked_alike(
    vlm: LocalVlm,
    decoder: Overheard,
    prefixes: list[Prefix],
    reader: Reader,
    trained: ReadPictures,
) -> None:
    with torch.no_grad():
        wanted = reader.asked(trained, reader.prompts.levels)
    for prefix, logits in zip(prefixes, wanted, strict=True):
        vlm.grade(prefix)
        assert_near(decoder.logits.pop(), logits)


def test_descriptions_are_asked_alike(
    vlm: LocalVlm,
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
        vlm.describe(prefix, 1)
        assert_near(decoder.logits[0][0, 0, 0], first)
        decoder.logits.clear()
        vlm.reflect(prefix, SUMMARY, 2.0, 3.5)
        # What follows in the same call is behind tokens of the draft.
        assert_near(decoder.logits[0][0, 0, 0], corrected)


@pytest.mark.parametrize("shared", [True, False], ids=["one-first", "paired"])
def test_comparisons_are_asked_alike(
    vlm: LocalVlm,
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
        verdicts = vlm.prefer_first(firsts, seconds)
        assert_near(decoder.logits.pop(), logits)
        difference = logits[:, first_id] - logits[:, second_id]
        np.testing.assert_allclose(verdicts, difference.numpy(), atol=TOLERANCE, rtol=0)
