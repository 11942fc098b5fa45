"""What continues a cached prefix equals what reads everything anew."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from meiqa.engine.local import LocalModel
from meiqa.engine.model import Floats, Prefix, VisualTokens
from meiqa.engine.package import EnginePackage
from meiqa.engine.runtime.decoder import Decoder, KeyValues, Row, Step
from meiqa.engine.writing import Writing
from tests.engine.cold import Piece, logits_anew, read_anew
from tests.engine.samples import open_model, picture, seen

TOLERANCE = 1e-4
SIZES = ((160, 224), (64, 640), (192, 192), (300, 130), (70, 330), (128, 128), (256, 448))


class Overheard:
    """A decoder that keeps the logits it gave."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.logits: list[Floats] = []

    def prefill(self, rows: Sequence[Row], ahead: Floats | None = None) -> list[KeyValues]:
        return self.decoder.prefill(rows, ahead)

    def last_logits(self, rows: Sequence[Row], prefixes: Sequence[KeyValues]) -> Floats:
        self.logits.append(self.decoder.last_logits(rows, prefixes))
        return self.logits[-1]

    def step(self, prefix: KeyValues, past: KeyValues, row: Row, wanted: int = 1) -> Step:
        return self.decoder.step(prefix, past, row, wanted)


@pytest.fixture(scope="module")
def model(package: EnginePackage) -> LocalModel:
    opened = open_model(package)
    opened.decoder = Overheard(opened.decoder)
    return opened


@pytest.fixture
def decoder(model: LocalModel) -> Overheard:
    assert isinstance(model.decoder, Overheard)
    model.decoder.logits.clear()
    return model.decoder


@pytest.fixture(scope="module")
def pictures(model: LocalModel) -> list[VisualTokens]:
    """Give seven pictures on seven grids."""
    tokens = [seen(model, picture(seed, size)) for seed, size in enumerate(SIZES)]
    assert len({picture.grid for picture in tokens}) > 4
    return tokens


@pytest.fixture(scope="module")
def prefixes(model: LocalModel, pictures: list[VisualTokens]) -> list[Prefix]:
    return model.prefill(pictures)


def opening(model: LocalModel, first: VisualTokens) -> list[Piece]:
    return [model.prompts.opening, first, model.prompts.closing]


def verdicts(model: LocalModel, first: VisualTokens, second: VisualTokens) -> Floats:
    """Logits (2,) of the answers to a comparison that is read in one go."""
    p = model.prompts
    asked = [*opening(model, first), p.second_opening, second, p.closing, p.compare]
    return logits_anew(model, asked)[list(p.verdict_ids)]


def test_one_prefix_against_seven_pictures(
    model: LocalModel, decoder: Overheard, pictures: list[VisualTokens], prefixes: list[Prefix]
) -> None:
    preferences = model.prefer_first([prefixes[0]], pictures)
    made = decoder.logits[0][:, model.prompts.verdict_ids]
    for index, other in enumerate(pictures):
        wanted = verdicts(model, pictures[0], other)
        np.testing.assert_allclose(made[index], wanted, atol=TOLERANCE, rtol=0)
        assert preferences[index] == pytest.approx(wanted[0] - wanted[1], abs=TOLERANCE)
    assert np.ptp(preferences) > 100 * TOLERANCE


def test_seven_prefixes_against_one_picture(
    model: LocalModel, decoder: Overheard, pictures: list[VisualTokens], prefixes: list[Prefix]
) -> None:
    preferences = model.prefer_first(prefixes, [pictures[3]] * 7)
    made = decoder.logits[0][:, model.prompts.verdict_ids]
    for index, other in enumerate(pictures):
        wanted = verdicts(model, other, pictures[3])
        np.testing.assert_allclose(made[index], wanted, atol=TOLERANCE, rtol=0)
        assert preferences[index] == pytest.approx(wanted[0] - wanted[1], abs=TOLERANCE)


def test_more_pairs_than_fit_one_call(
    model: LocalModel, pictures: list[VisualTokens], prefixes: list[Prefix]
) -> None:
    together = model.prefer_first([prefixes[1]], pictures * 3)
    paired = model.prefer_first([prefixes[1]] * 21, pictures * 3)
    alone = [model.prefer_first([prefixes[1]], [other])[0] for other in pictures] * 3
    np.testing.assert_allclose(together, alone, atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(paired, alone, atol=TOLERANCE, rtol=0)


def test_no_pairs_no_answers(model: LocalModel, prefixes: list[Prefix]) -> None:
    assert model.prefer_first([prefixes[0]], []).shape == (0,)
    assert model.prefer_first([], []).shape == (0,)
    assert model.prefill([]) == []


def test_the_grade_words(
    model: LocalModel, pictures: list[VisualTokens], prefixes: list[Prefix]
) -> None:
    p = model.prompts
    for tokens, prefix in zip(pictures, prefixes, strict=True):
        wanted = logits_anew(model, [*opening(model, tokens), p.levels])
        weights = np.exp(wanted[p.level_ids].astype(np.float64))
        np.testing.assert_allclose(model.grade(prefix), weights / weights.sum(), atol=TOLERANCE)


@pytest.mark.parametrize("index", [0, 1, 6])
def test_writing_equals_reading_everything_anew(
    model: LocalModel, pictures: list[VisualTokens], prefixes: list[Prefix], index: int
) -> None:
    question = model.prompts.score
    writing = Writing(model, prefixes[index], question, 16)
    written: list[int] = []
    for _ in range(12):
        text = np.concatenate([question, np.array(written, np.int64)])
        token = int(logits_anew(model, [*opening(model, pictures[index]), text]).argmax())
        assert writing.next_token == token
        written.append(token)
        writing.accept()
    assert writing.tokens == written
    assert len(set(written)) > 3
    text = np.concatenate([question, np.array(written, np.int64)])
    hidden = read_anew(model, [*opening(model, pictures[index]), text]).hidden[-12:]
    mean = writing.mean_hidden(len(writing.tokens))
    assert mean is not None
    np.testing.assert_allclose(mean, hidden.mean(axis=0), atol=TOLERANCE, rtol=0)


def test_a_description_keeps_to_its_limit(model: LocalModel, prefixes: list[Prefix]) -> None:
    long, short = (model.describe(prefixes[0], limit) for limit in (24, 6))
    assert long.text.startswith(short.text.rstrip("\ufffd"))
    assert short.key is not None
    assert np.isfinite(short.key).all()
    assert not np.array_equal(long.key, short.key)
    if long.text != short.text:
        assert not short.stats.complete


def test_a_prefix_read_in_company_is_the_one_read_alone(
    model: LocalModel, pictures: list[VisualTokens], prefixes: list[Prefix]
) -> None:
    for tokens, together in zip(pictures, prefixes, strict=True):
        (alone,) = model.prefill([tokens])
        assert together.next_position == alone.next_position
        assert together.opening.length == alone.opening.length
        np.testing.assert_allclose(
            together.opening.array[..., : alone.opening.length, :],
            alone.opening.array[..., : alone.opening.length, :],
            atol=TOLERANCE,
            rtol=0,
        )
