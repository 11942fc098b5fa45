"""Drafts are proposed from what is remembered, and change how fast is written, never what."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from meiqa.engine.budget import SHORT_SUMMARY_TOKENS
from meiqa.engine.engine import Engine
from meiqa.engine.local import LocalModel
from meiqa.engine.model import Description, Draft, Prefix, StopRule
from meiqa.engine.package import EnginePackage
from meiqa.engine.prompts import MEIQA
from meiqa.engine.scoring import DRAFTS, Scorer
from meiqa.engine.writing import LONGEST_GAP, LONGEST_SUFFIX, Proposer, Writing
from meiqa.locations import embedded_assets
from meiqa.memory import retrieval_key
from meiqa.testing import FakeModel
from tests.engine.samples import (
    ANCHORS,
    PHOTOS,
    asking,
    fake_engine,
    open_model,
    read_memory,
    seen,
    toned,
    write_anchors,
)
from tests.engine.scripted import LIMIT, told

LIMITS = (1, 7, 24)


def naive_continuation(drafts: Sequence[Sequence[int]], written: list[int]) -> set[int]:
    """Tokens that follow the longest suffix of a text, of bounded length, in the drafts.

    Tokens behind it that no draft holds are skipped, in the text and in the drafts.
    """
    text, gap = [-1, *written], 0
    while text and (not drafts or not any(text[-1] in (-1, *draft) for draft in drafts)):
        text, gap = text[:-1], gap + 1
    if gap > LONGEST_GAP:
        return set()
    for length in range(min(LONGEST_SUFFIX, len(text)), 0, -1):
        ends = [
            (whole, end)
            for whole in ([-1, *draft, -1] for draft in drafts)
            for end in range(length, len(whole))
            if whole[end - length : end] == text[-length:]
        ]
        if ends:
            return {whole[end + gap] for whole, end in ends if end + gap < len(whole)} - {-1}
    return set()


def test_a_continuation_begins_after_the_longest_suffix() -> None:
    random = np.random.default_rng(5)
    proposed = 0
    for _ in range(300):
        drafts = [random.integers(0, 4, size).tolist() for size in random.integers(0, 9, 4)]
        written = random.integers(0, 6, random.integers(0, 7)).tolist()
        allowed = naive_continuation(drafts, written)
        found = Proposer(drafts).continuation(written, 5)
        assert found[0] in allowed if found else not allowed
        assert len(found) <= 5
        assert -1 not in found
        proposed += bool(found)
    assert proposed > 150


def test_the_majority_decides_and_the_first_draft_between_equals() -> None:
    drafts = [[1, 2, 9], [1, 3, 4], [1, 3, 5]]
    assert Proposer(drafts).continuation([], 9) == [1, 3, 4]
    assert Proposer(drafts[:2]).continuation([1], 9) == [2, 9]


def test_unknown_tokens_stand_for_as_many_others() -> None:
    drafts = [[1, 2, 3, 4, 5, 6]]
    assert Proposer(drafts).continuation([1, 9], 9) == [3, 4, 5, 6]
    assert Proposer(drafts).continuation([9, 9, 9], 2) == [4, 5]
    assert Proposer([[1, *range(20, 40)]]).continuation([1, *[9] * LONGEST_GAP], 1) == [28]


def test_a_longer_suffix_outvotes_more_drafts() -> None:
    drafts = [[1, 2, 7], [5, 2, 8], [5, 2, 8]]
    assert Proposer(drafts).continuation([1, 2], 1) == [7]
    assert Proposer(drafts).continuation([6, 2], 1) == [8]


@pytest.mark.parametrize("drafts", [[], [[]], [[], [3]]])
def test_without_a_place_nothing_is_proposed(drafts: list[list[int]]) -> None:
    proposer = Proposer(drafts)
    assert proposer.continuation([3], 4) == []
    assert proposer.continuation([2], 4) == []
    assert proposer.continuation([2] * (LONGEST_GAP + 1), 4) == []
    assert proposer.continuation([], 0) == []


TOLD = ["It is soft and dark", "</", "think", ">", "<answer>3.45</answer>"]
GUESSES = {
    "right": [Draft("It is soft and dark", 3.45)],
    "wrong": [Draft("Sharp", 1.0)],
    "empty": [Draft("")],
    "unrated": [Draft("It is soft and dark")],
    "longer than the limit": [Draft("It is soft and dark " * 40, 3.45)],
    "several": [Draft("It is good", 3.0), Draft("It is soft and bad", 3.1), Draft("It is dark")],
}


@pytest.mark.parametrize("drafts", GUESSES.values(), ids=list(GUESSES))
@pytest.mark.parametrize("limit", [2, 3, 6, LIMIT])
def test_drafts_change_nothing_but_the_calls(drafts: Sequence[Draft], limit: int) -> None:
    plain = told(TOLD, forced="2.25</answer>", limit=limit)
    made = told(TOLD, forced="2.25</answer>", limit=limit, drafts=drafts)
    require_same(made.description, plain.description, key_tolerance=0.0)
    assert made.forced == plain.forced
    stats = made.description.stats
    assert stats.accepted <= stats.drafted
    assert stats.calls == made.decoder.calls == plain.decoder.calls - stats.accepted
    assert (plain.description.stats.drafted, plain.description.stats.accepted) == (0, 0)


@pytest.mark.parametrize(("between", "calls"), [("\n", 1), ("", 2)])
def test_a_right_draft_is_checked_in_one_call(between: str, calls: int) -> None:
    text = f"It is soft and dark</think>{between}<answer>3.45</answer>"
    made = told(text, drafts=[Draft("It is soft and dark", 3.45)])
    assert made.description.stats.calls == calls
    assert made.description.rating == 3.45


def test_after_a_disagreement_writing_finds_back_into_a_draft() -> None:
    text = "It is soft and dark</think>\n<answer>3.45</answer>"
    made = told(text, drafts=[Draft("It is good and dark", 3.45)])
    assert made.description.stats.calls == 3  # the question, " soft", " and"


@pytest.fixture(scope="module")
def tiny(package: EnginePackage) -> LocalModel:
    return open_model(package)


@pytest.fixture(scope="module")
def prefixes(tiny: LocalModel) -> list[Prefix]:
    return tiny.prefill([seen(tiny, photo) for photo in PHOTOS[:3]])


def corrupted(text: str, random: np.random.Generator) -> str:
    """A text of which a part is missing and another is doubled."""
    cut, other = sorted(random.integers(0, len(text) + 1, 2))
    return text[:cut] + text[other:] + text[cut : cut + 3]


def guesses(described: Description, others: Sequence[Description]) -> Iterator[list[Draft]]:
    """Drafts of many kinds for a description."""
    random = np.random.default_rng(len(described.text))
    wrong = [Draft(other.text, 2.0) for other in others]
    yield [Draft(described.text, described.rating)]
    yield wrong
    yield [Draft("")]
    yield [Draft(described.text * 5, 4.5)]
    yield [Draft(described.text[3:]), *wrong, Draft("The picture is sharp.", 3.0)]
    for _ in range(6):
        yield [Draft(corrupted(described.text, random), 3.3) for _ in range(random.integers(1, 5))]


def require_same(drafted: Description, plain: Description, key_tolerance: float) -> None:
    """Compare all but the calls that it took."""
    written = ("text", "rating", "unreadable")
    for name in written:
        assert getattr(drafted, name) == getattr(plain, name), name
    assert drafted.stats.tokens == plain.stats.tokens
    assert drafted.stats.complete == plain.stats.complete
    assert (drafted.key is None) == (plain.key is None)
    if drafted.key is not None and plain.key is not None:
        np.testing.assert_allclose(drafted.key, plain.key, atol=key_tolerance, rtol=0)


def ending_itself(model: LocalModel, prefix: Prefix) -> LocalModel:
    """The same random model, in whose words a description and its answer have ends."""
    text = model.describe(prefix, max(LIMITS)).text
    return asking(model, replace(MEIQA, description_end=text[8:10], answer_close=text[-3:-1]))


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("ends", [False, True])
def test_a_drafted_description_is_the_plain_one(
    tiny: LocalModel, prefixes: list[Prefix], limit: int, ends: bool
) -> None:
    saved = 0
    for prefix in prefixes:
        model = ending_itself(tiny, prefix) if ends else tiny
        plain = model.describe(prefix, limit)
        others = [tiny.describe(other, limit) for other in prefixes if other is not prefix]
        for drafts in guesses(plain, others):
            drafted = model.describe(prefix, limit, drafts)
            require_same(drafted, plain, key_tolerance=1e-5)
            assert drafted.stats.calls == plain.stats.calls - drafted.stats.accepted
            saved += drafted.stats.accepted
    assert saved > 0 or limit == 1


def plain_reflection(model: LocalModel, prefix: Prefix, summary: str) -> Description:
    """A reflection without drafts."""
    prompts, limit = model.prompts, len(model.prompts.ids(summary)) + 32
    writing = Writing(model, prefix, prompts.reflect(summary, 3.0, 2.0), limit)
    marked = writing.until(prompts.family.description_end, limit)
    ids = [*writing.tokens, writing.next_token] if marked else writing.tokens
    text, tokens = prompts.before(ids, prompts.family.description_end if marked else "")
    complete = marked or writing.stopped
    key = writing.mean_hidden(tokens)
    return Description(text.strip(), key, stats=writing.stats(complete=complete))


def test_reflecting_with_the_first_summary_as_draft_is_plain_reflecting(
    tiny: LocalModel, prefixes: list[Prefix]
) -> None:
    drafted = 0
    for prefix in prefixes:
        summary = tiny.describe(prefix, 12).text
        made = tiny.reflect(prefix, summary, 3.0, 2.0)
        require_same(made, plain_reflection(tiny, prefix, summary), key_tolerance=1e-5)
        drafted += made.stats.drafted
    # A random model does not say the same again; an apt draft is used wherever it is given.
    assert drafted > 0


def test_a_reflection_that_repeats_the_summary_takes_fewer_calls(
    tiny: LocalModel, prefixes: list[Prefix]
) -> None:
    repeating = asking(tiny, replace(MEIQA, reflect=MEIQA.score))
    said = repeating.describe(prefixes[0], 16).text
    made = repeating.reflect(prefixes[0], said, 3.0, 2.0)
    assert made.text.startswith(said.rstrip("\ufffd"))
    assert made.stats.accepted > 0
    assert tiny.reflect(prefixes[0], said, 3.0, 2.0).text != made.text


def test_photos_are_drafted_by_their_neighbours(
    engine: Engine, drafted: Engine, undrafted: Engine
) -> None:
    """Unasked only where the model writes all words: the shipped one's are mostly measured."""
    assert engine.score(PHOTOS[0], k=4, learn=False).counters["drafted_tokens"] == 0
    for photo in PHOTOS[:3]:
        one, plain = (each.score(photo, k=4, learn=False) for each in (drafted, undrafted))
        assert (one.summary, one.initial_score) == (plain.summary, plain.initial_score)
        assert one.score == pytest.approx(plain.score, abs=1e-4)
        assert one.counters["drafted_tokens"] > 0 == plain.counters["drafted_tokens"]
        assert one.counters["written_tokens"] == plain.counters["written_tokens"]
        saved = plain.counters["writing_calls"] - one.counters["writing_calls"]
        assert one.counters["accepted_tokens"] == saved


def drafting_engine(package: EnginePackage, anchors: Path, *, drafting: bool) -> Engine:
    model, memory = open_model(package), read_memory(package, anchors)
    return Engine(Scorer(model, memory, drafting=drafting))


@pytest.fixture(scope="module")
def drafted(package: EnginePackage, anchors: Path) -> Iterator[Engine]:
    """Give the same engine with drafts, whether they pay or not."""
    with drafting_engine(package, anchors, drafting=True) as opened:
        yield opened


@pytest.fixture(scope="module")
def undrafted(package: EnginePackage, anchors: Path) -> Iterator[Engine]:
    """Give the same engine without drafts."""
    with drafting_engine(package, anchors, drafting=False) as opened:
        yield opened


class Noting(FakeModel):
    """A model that keeps the drafts it was given."""

    drafts: Sequence[Draft] = ()

    def describe(
        self, prefix: Prefix, max_tokens: int, drafts: Sequence[Draft] = (), stop: StopRule = None
    ) -> Description:
        self.drafts = drafts
        return super().describe(prefix, max_tokens, drafts, stop)


def test_a_photo_in_the_memory_is_no_draft_of_itself(tmp_path: Path) -> None:
    scores = np.linspace(1.0, 5.0, ANCHORS)
    photos = [toned(score, number) for number, score in enumerate(scores)]
    model = Noting()
    with fake_engine(model, write_anchors(tmp_path / "anchors", model, photos)) as engine:
        engine.score(toned(scores[5], 99))
        assert scores[5] in [draft.score for draft in model.drafts]
        engine.score(photos[5])
    assert scores[5] not in [draft.score for draft in model.drafts]
    assert len(model.drafts) == DRAFTS.k
    assert all(draft.summary.startswith("This photo looks") for draft in model.drafts)


@pytest.fixture(scope="module")
def shipped() -> Iterator[Engine]:
    assets = embedded_assets()
    with Engine.open(assets / "package", assets / "memory", threads=1, learn=False) as opened:
        yield opened


@pytest.mark.parametrize("limit", [SHORT_SUMMARY_TOKENS, 96])
def test_the_shipped_model_writes_the_same_with_drafts(shipped: Engine, limit: int) -> None:
    model, snapshot = shipped.model, shipped.memory.snapshot()
    calls = np.zeros(2)
    for photo in PHOTOS[:5]:
        tokens = seen(model, photo)
        (prefix,) = model.prefill([tokens])
        plain = model.describe(prefix, limit)
        key = retrieval_key(shipped.memory.key_kind, model.unwritten_key(tokens), tokens.values)
        cases = snapshot.retrieve(key, DRAFTS, None)
        drafts = [Draft(case.summary, case.score) for case in cases if case.summary]
        drafted = model.describe(prefix, limit, drafts)
        # Several tokens in one call are summed in another order, which INT8 rounds the other way
        # now and then.
        require_same(drafted, plain, key_tolerance=1e-2)
        calls += plain.stats.calls, drafted.stats.calls
    assert calls[1] < 0.8 * calls[0]
