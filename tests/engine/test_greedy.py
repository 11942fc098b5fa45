"""What is written over cached prefixes is what is written when all is read anew for each token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest

from meiqa.engine.local import LocalModel
from meiqa.engine.model import Floats, Prefix, VisualTokens
from meiqa.engine.package import EnginePackage
from meiqa.engine.prompts import FAMILIES, MEIQA, Prompts
from meiqa.engine.writing import Writing
from tests.engine.cold import read_anew
from tests.engine.samples import PHOTOS, asking, open_model, seen

LIMIT = 40


@pytest.fixture(scope="module")
def tiny(package: EnginePackage) -> LocalModel:
    return open_model(package)


@pytest.fixture(scope="module")
def prefixes(tiny: LocalModel) -> list[Prefix]:
    return tiny.prefill([seen(tiny, photo) for photo in PHOTOS[:4]])


@dataclass
class Twin:
    """Greedy writing the slow way: for each token the whole prompt is read anew."""

    tokens: list[int]
    hidden: Floats


def naive_greedy(model: LocalModel, picture: VisualTokens, count: int) -> Twin:
    """Write `count` tokens, or fewer if the turn ends; no cache, no prefix."""
    p, tokens = model.prompts, list[int]()
    while True:
        text = np.concatenate([p.closing, p.score, np.array(tokens, np.int64)])
        made = read_anew(model, [p.opening, picture, text])
        token = int(made.logits[0].argmax())
        if token in p.stops or len(tokens) == count:
            return Twin(tokens, made.hidden[len(made.hidden) - len(tokens) :])
        tokens.append(token)


def markers(prompts: Prompts, tokens: Sequence[int], pieces: int) -> Iterator[tuple[str, int]]:
    """Texts of so many tokens in a row whose first place is there, with that place."""
    for begin in range(3, len(tokens) - pieces + 1):
        text = prompts.text(tokens[begin : begin + pieces])
        first = prompts.text(tokens).find(text)
        if (
            text.isascii()
            and text.isprintable()
            and text.strip()
            and first == len(prompts.text(tokens[:begin]))
        ):
            yield text, begin


@pytest.mark.slow
@pytest.mark.parametrize("pieces", [1, 2, 3])
def test_describing_equals_plain_greedy_writing(
    tiny: LocalModel, prefixes: list[Prefix], pieces: int
) -> None:
    compared = 0
    for prefix in prefixes:
        twin = naive_greedy(tiny, prefix.tokens, LIMIT)
        found = list(markers(tiny.prompts, twin.tokens, pieces))
        # Whatever the random model writes serves as the end of its description and its answer.
        for (end, begins), (close, closes) in zip(found, found[2 * pieces :], strict=False):
            family = replace(MEIQA, description_end=end, answer_close=close)
            asked = asking(tiny, family)
            made = asked.describe(prefix, LIMIT)
            before = asked.prompts.tokenizer.decode(twin.tokens[:begins])
            assert (made.text, made.stats.complete) == (before.strip(), True)
            assert made.key is not None
            wanted = twin.hidden[:begins].mean(axis=0)
            np.testing.assert_allclose(made.key, wanted, atol=1e-4, rtol=0)

            writing = Writing(asked, prefix, asked.prompts.score, 4)
            assert writing.until(end, LIMIT)
            assert [*writing.tokens, writing.next_token] == twin.tokens[: begins + pieces]
            writing.accept()
            assert writing.until(close, LIMIT, begins + pieces - 1)
            assert [*writing.tokens, writing.next_token] == twin.tokens[: closes + pieces]
            compared += 1
    assert compared >= 4


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "q-sit"])  # has its words
def test_every_family_asks_everything(tiny: LocalModel, prefixes: list[Prefix], name: str) -> None:
    family = FAMILIES[name]
    asked = asking(tiny, family)
    (prefix,) = asked.prefill([prefixes[0].tokens])
    twin = naive_greedy(asked, prefix.tokens, 12)
    made = asked.describe(prefix, 12)
    assert made.text == asked.prompts.tokenizer.decode(twin.tokens).strip()
    assert made.unreadable == (bool(family.answer_open) and made.rating is None)
    assert asked.reflect(prefix, made.text, 3.0, 2.0).key is not None
    assert asked.grade(prefix).sum() == pytest.approx(1.0)
    assert np.isfinite(asked.prefer_first([prefix], [prefixes[1].tokens])).all()
