"""Retrieval agrees with its naive twin, ties and odd sizes included."""

from __future__ import annotations

import itertools
import sqlite3
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from meiqa import memory
from meiqa.errors import StoreMismatch, UsageError
from meiqa.memory import (
    Case,
    MemoryBank,
    RetrievalPolicy,
    Snapshot,
    retrieval_key,
    spatial_descriptor,
    token_features,
)
from tests.memory.naive_retrieval import naive_retrieve
from tests.memory.samples import DIGEST, KEY_WIDTH, build_anchors, make_case, make_cases

SIZES = [0, 1, 3, 7, 97]
POLICIES = [
    RetrievalPolicy(k=k, anchor_share=share, bins=bins)
    for k, share, bins in itertools.product([0, 1, 7, 32, 300], [0.0, 0.5, 1.0], [1, 5, 13])
]


def snapshot_of(path: Path, anchors: list[Case], contrast: list[Case]) -> Snapshot:
    build_anchors(path, anchors)
    with MemoryBank.open(path, "rw", package_digest=DIGEST) as bank:
        for case in contrast:
            bank.remember(case, provenance="a test")
        return bank.snapshot()


def retrieve(
    snapshot: Snapshot,
    key: NDArray[Any],
    policy: RetrievalPolicy,
    exclude: str | None = None,
    descriptor: NDArray[Any] | None = None,
) -> list[str]:
    return [case.id for case in snapshot.retrieve(key, policy, exclude, descriptor)]


def query(seed: int = 3) -> NDArray[Any]:
    return np.random.default_rng(seed).standard_normal(KEY_WIDTH, np.float32)


@pytest.mark.parametrize(
    ("anchors", "contrast"), [(97, 7), (7, 97), (0, 97), (1, 7), (3, 3), (7, 1), (97, 0)]
)
def test_agrees_with_the_naive_twin(tmp_path: Path, anchors: int, contrast: int) -> None:
    anchor_cases, contrast_cases = make_cases(anchors, "anchor"), make_cases(contrast, "contrast")
    snapshot = snapshot_of(tmp_path / "m", anchor_cases, contrast_cases)
    assert (snapshot.count_anchors, snapshot.count_contrast) == (anchors, contrast)
    excluded = [None, *(case.image_digest for case in (anchor_cases + contrast_cases)[:2])]
    for number, policy in enumerate(POLICIES):
        exclude = excluded[number % len(excluded)]
        expected = naive_retrieve(anchor_cases, contrast_cases, query(number), policy, exclude)
        assert retrieve(snapshot, query(number), policy, exclude) == expected


def with_ties(count: int, origin: str) -> list[Case]:
    """Few distinct keys along the axes and few distinct scores, so that most of both are tied."""
    random = np.random.default_rng(count)
    return [
        make_case(
            f"{number * 37 % 101:03d}",
            "anchor" if origin == "anchor" else "contrast",
            image_digest=f"{origin}{number}",
            score=float(random.integers(1, 4)),
            key=np.eye(KEY_WIDTH, dtype=np.float32)[random.integers(3)],
        )
        for number in range(count)
    ]


@pytest.mark.parametrize("count", SIZES)
def test_ties_are_ordered_by_id(tmp_path: Path, count: int) -> None:
    anchors, contrast = with_ties(count, "anchor"), with_ties(count, "contrast")
    snapshot = snapshot_of(tmp_path / "m", anchors, contrast)
    key = np.eye(KEY_WIDTH, dtype=np.float32)[1]
    for policy in POLICIES:
        expected = naive_retrieve(anchors, contrast, key, policy, None)
        assert retrieve(snapshot, key, policy) == expected


def test_the_order_of_storing_does_not_matter(tmp_path: Path) -> None:
    anchors = [*make_cases(61, "anchor"), *with_ties(36, "anchor")]
    contrast = [*make_cases(13, "contrast"), *with_ties(8, "contrast")]
    forward = snapshot_of(tmp_path / "f", anchors, contrast)
    backward = snapshot_of(tmp_path / "b", anchors[::-1], contrast[::-1])
    for policy in POLICIES:
        assert retrieve(forward, query(), policy) == retrieve(backward, query(), policy)


def test_duplicate_keys_in_wide_memories_tie_exactly(tmp_path: Path) -> None:
    """BLAS may give equal rows unequal float32 products, depending on where they stand."""
    key = query(9)
    twins = [make_case(f"{number:04d}", key=key * (1 + number)) for number in range(97)]
    snapshot = snapshot_of(tmp_path / "m", [], twins[::-1])
    found = retrieve(snapshot, query(4), RetrievalPolicy(k=50))
    assert found == [f"{number:04d}" for number in range(50)]


def test_stratified_neighbours_span_the_scale(tmp_path: Path) -> None:
    near, far = np.eye(KEY_WIDTH, dtype=np.float32)[:2]
    anchors = [
        make_case(f"{number:02d}", "anchor", score=1 + number / 20, key=far) for number in range(60)
    ] + [make_case(f"{number}", "anchor", score=4.5, key=near) for number in range(60, 80)]
    snapshot = snapshot_of(tmp_path / "m", anchors, [])
    spread = snapshot.retrieve(near, RetrievalPolicy(k=20, bins=4), None)
    flat = snapshot.retrieve(near, RetrievalPolicy(k=20, bins=1), None)
    assert {case.score for case in flat} == {4.5}
    assert min(case.score for case in spread) < 1.5


def test_bins_with_none_near_the_query_are_searched_for_themselves(tmp_path: Path) -> None:
    """Scores fall with the distance from the query: the nearest are of the best bins alone."""
    own, other = np.eye(KEY_WIDTH, dtype=np.float32)[:2]
    angles = np.linspace(0.01, 1.5, 97, dtype=np.float32)
    anchors = [
        make_case(
            f"{n:02d}", "anchor", score=5 - n / 25, key=np.cos(angle) * own + np.sin(angle) * other
        )
        for n, angle in enumerate(angles)
    ]
    snapshot = snapshot_of(tmp_path / "m", anchors, [])
    for bins in (2, 5, 9):
        policy = RetrievalPolicy(k=10, bins=bins)
        found = retrieve(snapshot, own, policy)
        assert found == naive_retrieve(anchors, [], own, policy, None)
        assert int(found[-1]) >= 97 - 97 // bins - 1  # the farthest is the worst bin's nearest


@pytest.mark.slow
def test_an_index_gives_the_bins_what_comparing_with_all_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("hnswlib", reason="building an index takes the extra `index`")
    monkeypatch.setattr("meiqa.memory.index.FLAT_BELOW", 1)
    random = np.random.default_rng(8)
    keys = random.standard_normal((2_000, KEY_WIDTH), np.float32)
    scores = np.clip(3 + keys[:, 0] + random.standard_normal(len(keys)) / 2, 1, 5)
    anchors = [
        make_case(f"{n:04d}", "anchor", image_digest=f"{n}", score=float(score), key=key)
        for n, (key, score) in enumerate(zip(keys, scores, strict=True))
    ]
    build_anchors(tmp_path / "m", anchors)
    with MemoryBank.open(tmp_path / "m", "r", package_digest=DIGEST) as bank:
        assert bank.statistics().origins["anchor"].index == "frozen"
        snapshot, policy = bank.snapshot(), RetrievalPolicy()
        shared = []
        for seed in range(20):
            found = snapshot.retrieve(query(seed), policy, None)
            bins = np.searchsorted(
                np.quantile(scores, [0.2, 0.4, 0.6, 0.8]), [c.score for c in found]
            )
            assert np.bincount(bins, minlength=5).min() >= policy.k // 5
            expected = naive_retrieve(anchors, [], query(seed), policy, None)
            shared.append(len({case.id for case in found}.intersection(expected)))
    assert np.mean(shared) >= 0.97 * policy.k


def test_the_querys_own_image_is_left_out_everywhere(tmp_path: Path) -> None:
    anchors = [make_case(f"a{n}", "anchor", image_digest="own") for n in range(3)]
    contrast = [make_case("c0", image_digest="own"), make_case("c1")]
    snapshot = snapshot_of(tmp_path / "m", anchors, contrast)
    assert retrieve(snapshot, query(), RetrievalPolicy(k=9), "own") == ["c1"]
    assert len(retrieve(snapshot, query(), RetrievalPolicy(k=9), "another")) == 5


def test_anchors_fill_the_share_of_a_small_contrast_memory(tmp_path: Path) -> None:
    snapshot = snapshot_of(tmp_path / "m", make_cases(97, "anchor"), make_cases(3, "contrast"))
    origins = [case.origin for case in snapshot.retrieve(query(), RetrievalPolicy(), None)]
    assert origins == ["anchor"] * 29 + ["contrast"] * 3


def test_a_key_of_zeros_is_as_near_to_everything(tmp_path: Path) -> None:
    snapshot = snapshot_of(tmp_path / "m", [], make_cases(7, "contrast"))
    found = retrieve(snapshot, np.zeros(KEY_WIDTH, np.float32), RetrievalPolicy(k=3))
    assert found == ["contrast-0000", "contrast-0001", "contrast-0002"]


def test_percentile_is_the_share_of_anchors_below(tmp_path: Path) -> None:
    scores = [1.0, 2.0, 2.0, 3.0]
    anchors = [make_case(f"a{n}", "anchor", score=score) for n, score in enumerate(scores)]
    snapshot = snapshot_of(tmp_path / "m", anchors, [])
    expected = {0.5: 0.0, 1.0: 0.0, 2.0: 25.0, 2.5: 75.0, 5.0: 100.0}
    assert {score: snapshot.percentile(score) for score in expected} == expected
    assert np.isnan(snapshot_of(tmp_path / "none", [], []).percentile(3.0))


def test_unusable_keys_are_refused(tmp_path: Path) -> None:
    snapshot = snapshot_of(tmp_path / "m", make_cases(3, "anchor"), [])
    with pytest.raises(StoreMismatch, match="does not fit"):
        snapshot.retrieve(np.ones(KEY_WIDTH + 1, np.float32), RetrievalPolicy(), None)
    for bad in (np.nan, np.inf):
        with pytest.raises(UsageError, match="not finite"):
            snapshot.retrieve(np.full(KEY_WIDTH, bad, np.float32), RetrievalPolicy(), None)


@pytest.mark.parametrize("above", [-1.0, -0.2, 0.3, 0.8])
@pytest.mark.parametrize("bins", [5, 1])
def test_near_duplicates_of_the_query_are_left_out(tmp_path: Path, above: float, bins: int) -> None:
    anchors, contrast = make_cases(97, "anchor"), make_cases(13, "contrast")
    snapshot = snapshot_of(tmp_path / "m", anchors, contrast)
    seen, own = make_case("seen").tokens, anchors[3].image_digest
    for k in (1, 7, 32, 300):
        policy = RetrievalPolicy(k=k, exclude_above=above, bins=bins)
        look = spatial_descriptor(seen, (4, 1))
        expected = naive_retrieve(anchors, contrast, query(k), policy, own, look)
        assert retrieve(snapshot, query(k), policy, own, look) == expected


def test_what_is_described_alike_is_no_duplicate(tmp_path: Path) -> None:
    """The default leaves out the same picture, and nothing for having the same key."""
    key = query()
    anchors = [make_case(f"a{number}", "anchor", key=key) for number in range(5)]
    snapshot = snapshot_of(tmp_path / "m", anchors, [])
    look = spatial_descriptor(anchors[2].tokens * np.float32(1.1), anchors[2].grid)
    found = retrieve(snapshot, key, RetrievalPolicy(), "another", look)
    assert found == ["a0", "a1", "a3", "a4"]
    everything = RetrievalPolicy(exclude_above=1.0)
    assert len(retrieve(snapshot, key, everything, "another", look)) == 5


@pytest.mark.parametrize(
    "options",
    [
        {"k": -1},
        {"anchor_share": 1.1},
        {"anchor_share": float("nan")},
        {"bins": 0},
        {"exclude_above": 1.5},
        {"exclude_above": float("nan")},
        {"effort": 0},
    ],
)
def test_senseless_policies_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        RetrievalPolicy(**options)  # type: ignore[arg-type]


class Traced:
    """The SQL statements that are run through connections opened while this is entered."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.run: dict[str, list[str]] = {}
        connect = sqlite3.connect

        def traced(database: str, *arguments: Any, **options: Any) -> sqlite3.Connection:
            connection = connect(database, *arguments, **options)
            name = Path(str(database).partition("?")[0]).name
            connection.set_trace_callback(self.run.setdefault(name, []).append)
            return connection

        monkeypatch.setattr(sqlite3, "connect", traced)

    def taken(self) -> dict[str, list[str]]:
        """Give what was run since the last call, by database."""
        taken = {name: list(statements) for name, statements in self.run.items() if statements}
        for statements in self.run.values():
            statements.clear()
        return taken


def test_a_retrieval_takes_one_statement_for_each_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the number of neighbours, and with near-duplicates that are left out."""
    traced = Traced(monkeypatch)
    anchors, contrast = make_cases(97, "anchor"), make_cases(40, "contrast")
    build_anchors(tmp_path / "m", anchors)
    with MemoryBank.open(tmp_path / "m", "rw", package_digest=DIGEST) as bank:
        for case in contrast[:30]:
            bank.remember(case, provenance="a test")
        bank.compact()
        for case in contrast[30:]:
            bank.remember(case, provenance="a test")
        bank.snapshot().retrieve(query(), RetrievalPolicy(), None)
        traced.taken()
        for k in (8, 32, 100):
            for case in (anchors[3], contrast[3], make_case("unseen")):
                look = spatial_descriptor(case.tokens, case.grid)
                snapshot = bank.snapshot()
                assert traced.taken() == {"cases.sqlite3": ["PRAGMA data_version"]}
                snapshot.retrieve(case.key, RetrievalPolicy(k=k), "unseen", look)
                run = traced.taken()
                assert set(run) == {"anchors.sqlite3", "contrast-1.sqlite3"}
                for statements in run.values():
                    (statement,) = statements
                    assert statement.startswith("SELECT revision, id,")


def test_a_warm_photo_runs_through_three_files_of_the_memory(tmp_path: Path) -> None:
    anchors = make_cases(97, "anchor")
    build_anchors(tmp_path / "m", anchors)
    room, seen = Path(memory.__file__).parent.resolve(), set()

    def note(frame: FrameType, *_: object) -> None:
        file = Path(frame.f_code.co_filename)
        if file.suffix == ".py" and file.resolve().parent == room:
            seen.add(file.name)

    with MemoryBank.open(tmp_path / "m", "rw", package_digest=DIGEST) as bank:
        for case in make_cases(40, "contrast"):
            bank.remember(case, provenance="a test")
        for case in (make_case("first"), make_case("warm")):
            if case.id == "warm":
                sys.setprofile(note)
            try:
                snapshot = bank.snapshot()
                features = token_features(case.tokens)
                if snapshot.regression is not None:
                    snapshot.regression.score(features)
                key = retrieval_key(bank.key_kind, case.key, case.tokens)
                look = spatial_descriptor(case.tokens, case.grid)
                found = snapshot.retrieve(key, RetrievalPolicy(), case.image_digest, look)
                snapshot.percentile(3.0)
            finally:
                sys.setprofile(None)
            assert len(found) == 32
    assert snapshot.regression is not None
    assert seen == {"bank.py", "retrieval.py", "cases.py"}
