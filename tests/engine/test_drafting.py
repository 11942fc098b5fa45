"""Drafts are proposed from what is remembered, and change how fast is written, never what."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from meiqa.engine import judging
from meiqa.engine.drafting import LONGEST_GAP, LONGEST_SUFFIX, Draft, Proposer
from meiqa.engine.judging import projected_key, remembered_drafts
from meiqa.engine.local import LocalVlm
from meiqa.engine.package import EnginePackage
from meiqa.engine.pipeline import Engine
from meiqa.engine.planning import SHORT_SUMMARY_TOKENS
from meiqa.engine.prompts import MEIQA, Prompts
from meiqa.engine.vlm import NO_EFFORT, Description, Prefix
from meiqa.locations import embedded_assets
from meiqa.memory import Case
from tests.engine.samples import PHOTOS, SIZES, open_vlm, picture, read_memory, seen

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


@pytest.fixture(scope="module")
def tiny(package: EnginePackage) -> LocalVlm:
    return open_vlm(package)


@pytest.fixture(scope="module")
def prefixes(tiny: LocalVlm) -> list[Prefix]:
    return tiny.read([seen(tiny, photo) for photo in PHOTOS[:3]])


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
    """Compare all but the effort."""
    one, other = (vars(replace(made, key=None, effort=NO_EFFORT)) for made in (drafted, plain))
    assert one == other
    assert (drafted.key is None) == (plain.key is None)
    if drafted.key is not None and plain.key is not None:
        np.testing.assert_allclose(drafted.key, plain.key, atol=key_tolerance, rtol=0)


def ending_itself(vlm: LocalVlm, prefix: Prefix) -> LocalVlm:
    """The same random model, in whose words a description and its answer have ends."""
    text = vlm.describe(prefix, max(LIMITS)).text
    other = LocalVlm(vlm.package, vlm._vision, vlm._decoder)
    family = replace(MEIQA, description_end=text[8:10], answer_close=text[-3:-1])
    other.prompts = Prompts(family, vlm.prompts.tokenizer)
    return other


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("ends", [False, True])
def test_a_drafted_description_is_the_plain_one(
    tiny: LocalVlm, prefixes: list[Prefix], limit: int, ends: bool
) -> None:
    saved = 0
    for prefix in prefixes:
        vlm = ending_itself(tiny, prefix) if ends else tiny
        plain = vlm.describe(prefix, limit)
        others = [tiny.describe(other, limit) for other in prefixes if other is not prefix]
        for drafts in guesses(plain, others):
            drafted = vlm.describe(prefix, limit, drafts)
            require_same(drafted, plain, key_tolerance=1e-5)
            assert drafted.effort.calls == plain.effort.calls - drafted.effort.accepted
            saved += drafted.effort.accepted
    assert saved > 0 or limit == 1


def test_reflecting_with_the_first_summary_as_draft_is_plain_reflecting(
    tiny: LocalVlm, prefixes: list[Prefix], monkeypatch: pytest.MonkeyPatch
) -> None:
    summaries = [tiny.describe(prefix, 12).text for prefix in prefixes]
    asked = list(zip(prefixes, summaries, strict=True))
    drafted = [tiny.reflect(prefix, summary, 3.0, 2.0) for prefix, summary in asked]
    monkeypatch.setattr(LocalVlm, "_proposer", lambda *_: Proposer())
    for made, (prefix, summary) in zip(drafted, asked, strict=True):
        require_same(made, tiny.reflect(prefix, summary, 3.0, 2.0), key_tolerance=1e-5)
    # A random model does not say the same again; an apt draft is used wherever it is given.
    assert sum(made.effort.drafted for made in drafted) > 0


def test_a_reflection_that_repeats_the_summary_takes_fewer_calls(
    tiny: LocalVlm, prefixes: list[Prefix], monkeypatch: pytest.MonkeyPatch
) -> None:
    (prefix, *_) = prefixes
    repeated = tiny.reflect(prefix, "soft", 3.0, 2.0).text
    monkeypatch.setattr(tiny.prompts, "reflect", lambda *_: tiny.prompts.score)
    said = tiny.describe(prefix, 16).text
    made = tiny.reflect(prefix, said, 3.0, 2.0)
    assert made.text.startswith(said.rstrip("\ufffd"))
    assert made.effort.accepted > 0
    assert repeated != said


def test_photos_are_drafted_by_their_neighbours(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafted = [engine.score(photo, k=4, learn=False) for photo in PHOTOS[:3]]
    monkeypatch.setattr(judging, "remembered_drafts", lambda *_: ())
    for one, photo in zip(drafted, PHOTOS, strict=False):
        plain = engine.score(photo, k=4, learn=False)
        assert (one.summary, one.initial_score) == (plain.summary, plain.initial_score)
        assert one.score == pytest.approx(plain.score, abs=1e-4)
        assert one.counters["drafted_tokens"] > 0 == plain.counters["drafted_tokens"]
        assert one.counters["written_tokens"] == plain.counters["written_tokens"]
        saved = plain.counters["writing_calls"] - one.counters["writing_calls"]
        assert one.counters["accepted_tokens"] == saved


def test_a_photo_in_the_memory_is_no_draft_of_itself(
    package: EnginePackage, anchors: Path, tiny: LocalVlm
) -> None:
    tokens = seen(tiny, picture(1000, SIZES[0]))
    projection = package.array("key_projection.npy")
    with read_memory(package, anchors) as bank:
        snapshot, kind = bank.snapshot(), bank.key_kind
        (nearest, *_) = snapshot.retrieve(
            projected_key(tokens, projection), judging.DRAFTS, exclude_digest=None
        )
        with_itself, without = (
            remembered_drafts(snapshot, kind, tokens, projection, digest)
            for digest in (None, nearest.image_digest)
        )
    assert of_case(nearest) in with_itself
    assert of_case(nearest) not in without
    assert len(without) == judging.DRAFTS.k


def of_case(case: Case) -> Draft:
    return Draft(case.summary, case.score)


@pytest.fixture(scope="module")
def shipped() -> Iterator[Engine]:
    assets = embedded_assets()
    with Engine.open(assets / "package", assets / "memory", threads=1, learn=False) as opened:
        yield opened


@pytest.mark.parametrize("limit", [SHORT_SUMMARY_TOKENS, 96])
def test_the_shipped_model_writes_the_same_with_drafts(shipped: Engine, limit: int) -> None:
    vlm, snapshot = shipped.vlm, shipped.memory.snapshot()
    projection = shipped.package.array("key_projection.npy")
    calls = np.zeros(2)
    for photo in islice(PHOTOS, 5):
        tokens = seen(vlm, photo)
        (prefix,) = vlm.read([tokens])
        plain = vlm.describe(prefix, limit)
        drafts = remembered_drafts(snapshot, shipped.memory.key_kind, tokens, projection, None)
        drafted = vlm.describe(prefix, limit, drafts)
        # Several tokens in one call are summed in another order, which INT8 rounds the other way
        # now and then.
        require_same(drafted, plain, key_tolerance=1e-2)
        calls += plain.effort.calls, drafted.effort.calls
    assert calls[1] < 0.8 * calls[0]
