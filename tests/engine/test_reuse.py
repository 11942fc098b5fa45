"""What continues a cached prefix equals what reads everything anew."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from numpy.typing import NDArray

from meiqa.engine.local import LocalVlm
from meiqa.engine.package import EnginePackage
from meiqa.engine.prompts import layout
from meiqa.engine.runtime.base import Array
from meiqa.engine.runtime.onnx import OnnxSession, open_sessions
from meiqa.engine.vlm import Floats, Prefix, VisualTokens
from meiqa.engine.writing import Writing
from tests.engine.samples import picture, seen

TOLERANCE = 1e-4
SIZES = ((160, 224), (64, 640), (192, 192), (300, 130), (70, 330), (128, 128), (256, 448))
Piece = NDArray[np.int64] | VisualTokens


class Overheard:
    """A session that keeps the logits of its calls."""

    def __init__(self, session: OnnxSession) -> None:
        self.session = session
        self.logits: list[Floats] = []

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Floats]:
        outputs = self.session.run(inputs)
        self.logits.append(outputs["logits"])
        return outputs


@pytest.fixture(scope="module")
def decoder(package: EnginePackage) -> Overheard:
    return Overheard(open_sessions(package, "cpu", 1)[1])


@pytest.fixture(scope="module")
def vlm(package: EnginePackage, decoder: Overheard) -> LocalVlm:
    return LocalVlm(package, open_sessions(package, "cpu", 1)[0], decoder)


@pytest.fixture(scope="module")
def pictures(vlm: LocalVlm) -> list[VisualTokens]:
    """Give seven pictures on seven grids."""
    tokens = [seen(vlm, picture(seed, size)) for seed, size in enumerate(SIZES)]
    assert len({picture.grid for picture in tokens}) > 4
    return tokens


@pytest.fixture(scope="module")
def prefixes(vlm: LocalVlm, pictures: list[VisualTokens]) -> list[Prefix]:
    return vlm.read(pictures)


def cold(vlm: LocalVlm, decoder: Overheard, pieces: list[Piece]) -> dict[str, Floats]:
    """One call over the whole prompt with nothing cached; logits of the last token."""
    table = vlm.package.embedding
    embeds = np.concatenate(
        [p.values if isinstance(p, VisualTokens) else table[p].astype(np.float32) for p in pieces]
    )
    positions, _ = layout([p.grid if isinstance(p, VisualTokens) else len(p) for p in pieces])
    s = vlm.shape
    return decoder.session.run(
        {
            "embeds": embeds[None, None],
            "positions": np.ascontiguousarray(positions, np.float32)[:, None, None],
            "prefix": np.zeros((s.layers, 2, 1, s.kv_heads, 0, s.head_dim), np.float32),
            "prefix_lengths": np.zeros(1, np.int64),
            "past": np.zeros((s.layers, 2, 1, s.kv_heads, 1, 0, s.head_dim), np.float32),
            "past_lengths": np.zeros((1, 1), np.int64),
            "logit_positions": np.array([[[len(embeds) - 1]]], np.int64),
        }
    )


def opening(vlm: LocalVlm, first: VisualTokens) -> list[Piece]:
    return [vlm.prompts.opening, first, vlm.prompts.closing]


def comparison(vlm: LocalVlm, first: VisualTokens, second: VisualTokens) -> list[Piece]:
    p = vlm.prompts
    return [*opening(vlm, first), p.second_opening, second, p.closing, p.compare]


def test_one_prefix_against_seven_pictures(
    vlm: LocalVlm, decoder: Overheard, pictures: list[VisualTokens], prefixes: list[Prefix]
) -> None:
    decoder.logits.clear()
    preferences = vlm.prefer_first([prefixes[0]], pictures)
    (made,) = decoder.logits
    first, second = vlm.prompts.verdict_ids
    for index, other in enumerate(pictures):
        wanted = cold(vlm, decoder, comparison(vlm, pictures[0], other))["logits"][0, 0, 0]
        np.testing.assert_allclose(made[0, index, 0], wanted, atol=TOLERANCE, rtol=0)
        assert preferences[index] == pytest.approx(wanted[first] - wanted[second], abs=TOLERANCE)
    assert np.ptp(preferences) > 100 * TOLERANCE


def test_seven_prefixes_against_one_picture(
    vlm: LocalVlm, decoder: Overheard, pictures: list[VisualTokens], prefixes: list[Prefix]
) -> None:
    decoder.logits.clear()
    preferences = vlm.prefer_first(prefixes, [pictures[3]] * 7)
    (made,) = decoder.logits
    first, second = vlm.prompts.verdict_ids
    for index, other in enumerate(pictures):
        wanted = cold(vlm, decoder, comparison(vlm, other, pictures[3]))["logits"][0, 0, 0]
        np.testing.assert_allclose(made[index, 0, 0], wanted, atol=TOLERANCE, rtol=0)
        assert preferences[index] == pytest.approx(wanted[first] - wanted[second], abs=TOLERANCE)


def test_more_pairs_than_fit_one_call(
    vlm: LocalVlm, pictures: list[VisualTokens], prefixes: list[Prefix]
) -> None:
    together = vlm.prefer_first([prefixes[1]], pictures * 3)
    paired = vlm.prefer_first([prefixes[1]] * 21, pictures * 3)
    alone = [vlm.prefer_first([prefixes[1]], [other])[0] for other in pictures] * 3
    np.testing.assert_allclose(together, alone, atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(paired, alone, atol=TOLERANCE, rtol=0)


def test_no_pairs_no_answers(vlm: LocalVlm, prefixes: list[Prefix]) -> None:
    assert vlm.prefer_first([prefixes[0]], []).shape == (0,)
    assert vlm.prefer_first([], []).shape == (0,)
    assert vlm.read([]) == []


def test_the_grade_words(
    vlm: LocalVlm, decoder: Overheard, pictures: list[VisualTokens], prefixes: list[Prefix]
) -> None:
    for tokens, prefix in zip(pictures, prefixes, strict=True):
        wanted = cold(vlm, decoder, [*opening(vlm, tokens), vlm.prompts.levels])["logits"][0, 0, 0]
        weights = np.exp(wanted[vlm.prompts.level_ids].astype(np.float64))
        np.testing.assert_allclose(vlm.grade(prefix), weights / weights.sum(), atol=TOLERANCE)


@pytest.mark.parametrize("index", [0, 1, 6])
def test_writing_equals_reading_everything_anew(
    vlm: LocalVlm,
    decoder: Overheard,
    pictures: list[VisualTokens],
    prefixes: list[Prefix],
    index: int,
) -> None:
    question = vlm.prompts.score
    writing = Writing(vlm, prefixes[index], question, 16)
    written: list[int] = []
    for _ in range(12):
        text = np.concatenate([question, np.array(written, np.int64)])
        outputs = cold(vlm, decoder, [*opening(vlm, pictures[index]), text])
        token = int(outputs["logits"][0, 0, 0].argmax())
        assert writing.next_token == token
        written.append(token)
        writing.accept()
    assert writing.tokens == written
    assert len(set(written)) > 3
    text = np.concatenate([question, np.array(written, np.int64)])
    hidden = cold(vlm, decoder, [*opening(vlm, pictures[index]), text])["hidden"][0, 0, -12:]
    np.testing.assert_allclose(writing.mean_hidden(), hidden.mean(axis=0), atol=TOLERANCE, rtol=0)


def test_a_description_keeps_to_its_limit(vlm: LocalVlm, prefixes: list[Prefix]) -> None:
    long, short = (vlm.describe(prefixes[0], limit) for limit in (24, 6))
    assert long.text.startswith(short.text.rstrip("\ufffd"))
    assert np.isfinite(short.key).all()
    assert not np.array_equal(long.key, short.key)
    if long.text != short.text:
        assert not short.complete


def test_a_prefix_read_in_company_is_the_one_read_alone(
    vlm: LocalVlm, pictures: list[VisualTokens], prefixes: list[Prefix]
) -> None:
    for tokens, together in zip(pictures, prefixes, strict=True):
        (alone,) = vlm.read([tokens])
        assert together.next_position == alone.next_position
        assert together.length == alone.length
        np.testing.assert_allclose(together.key_values, alone.key_values, atol=TOLERANCE, rtol=0)
