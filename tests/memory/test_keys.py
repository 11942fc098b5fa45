"""Keys of summaries, of images and of both; memories of one kind, and of another after rekeying."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import numpy as np
import pytest

from meiqa.errors import StoreCorrupted, StoreError, StoreMismatch, UsageError
from meiqa.memory import (
    AnchorWriter,
    Case,
    MemoryBank,
    RetrievalPolicy,
    key_widths,
    retrieval_key,
    verify_memory,
)
from meiqa.memory.cases import unit_rows
from meiqa.types import KeyKind
from tests.memory.samples import (
    DIGEST,
    KEY_WIDTH,
    TOKEN_WIDTH,
    build_anchors,
    make_case,
    make_cases,
    uses_of,
)

EVERYTHING = RetrievalPolicy(k=1000)
KINDS: tuple[KeyKind, ...] = ("summary", "image", "both")
Vector = np.ndarray[tuple[int], np.dtype[np.float32]]


def unit(vector: Vector) -> Vector:
    scaled: Vector = unit_rows(vector[None])[0]
    return scaled


def keyed(case: Case, kind: KeyKind) -> Case:
    object.__setattr__(case, "key", retrieval_key(kind, case.key, case.tokens))
    return case


def built(path: Path, kind: KeyKind, anchors: int = 5) -> Path:
    widths = key_widths(kind, KEY_WIDTH, TOKEN_WIDTH)
    with AnchorWriter(path, DIGEST, widths.key, widths.token, key_kind=kind) as writer:
        for case in make_cases(anchors, "anchor"):
            writer.add(keyed(case, kind), provenance="a laboratory")
        writer.finish()
    return path


def keys_of(path: Path) -> dict[str, Vector]:
    with MemoryBank.open(path, package_digest=DIGEST) as bank:
        width = key_widths(bank.key_kind, KEY_WIDTH, TOKEN_WIDTH).key
        found = bank.snapshot().retrieve(np.ones(width, np.float32), EVERYTHING, None)
    return {case.id: case.key for case in found}


def test_keys_are_made_as_they_are_defined() -> None:
    summary = np.float32([3.0, 0.0, 4.0])
    tokens = np.float32([[1.0, 2.0], [3.0, 0.0]])
    assert retrieval_key("summary", summary, tokens) is summary
    image = retrieval_key("image", summary, tokens)
    np.testing.assert_allclose(image, np.float32([2.0, 1.0]) / np.sqrt(5), atol=1e-6)
    both = retrieval_key("both", summary, tokens)
    np.testing.assert_allclose(both[:3] * np.sqrt(2), [0.6, 0.0, 0.8], atol=1e-6)
    np.testing.assert_allclose(both[3:] * np.sqrt(2), image, atol=1e-6)
    assert float(both @ both) == pytest.approx(1.0)


def test_a_cosine_of_both_is_the_mean_of_the_two() -> None:
    one, other = make_case("one"), make_case("other")
    cosines = {
        kind: float(
            unit(retrieval_key(kind, one.key, one.tokens))
            @ unit(retrieval_key(kind, other.key, other.tokens))
        )
        for kind in KINDS
    }
    assert cosines["both"] == pytest.approx((cosines["summary"] + cosines["image"]) / 2, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_memory_says_its_kind_and_keeps_it(tmp_path: Path, kind: KeyKind) -> None:
    path = built(tmp_path / "m", kind)
    with MemoryBank.open(path, "rw", package_digest=DIGEST) as bank:
        assert bank.key_kind == bank.statistics().key_kind == kind
        bank.remember(keyed(make_case("learnt"), kind), provenance="a test")
        bank.add_anchor(keyed(make_case("added", "anchor"), kind), provenance="a test")
        assert bank.compact()
    with MemoryBank.open(path, package_digest=DIGEST, verify=True) as bank:
        assert bank.key_kind == kind
        key = keyed(make_case("learnt"), kind).key
        nearest = bank.snapshot().retrieve(key, RetrievalPolicy(k=1, anchor_share=0), None)
    assert [case.id for case in nearest] == ["learnt"]
    assert verify_memory(path) == []


def test_a_memory_from_before_holds_summaries(tmp_path: Path) -> None:
    """No kind was recorded in a database then; a segment without one reads the same."""
    path = build_anchors(tmp_path / "m", make_cases(3, "anchor"))
    with MemoryBank.open(path, "rw", package_digest=DIGEST) as bank:
        bank.remember(make_case("learnt"), provenance="a test")
    for name in ("anchors.sqlite3", "cases.sqlite3"):
        connection = sqlite3.connect(path / name)
        assert connection.execute("DELETE FROM store WHERE name = 'key_kind'").rowcount == 1
        connection.commit()
        connection.close()
    with MemoryBank.open(path, "rw", package_digest=DIGEST) as bank:
        assert bank.key_kind == "summary"
        assert bank.snapshot().count_contrast == 1


def test_an_unknown_kind_is_damage(tmp_path: Path) -> None:
    path = build_anchors(tmp_path / "m")
    connection = sqlite3.connect(path / "anchors.sqlite3")
    connection.execute("UPDATE store SET value = 'sound' WHERE name = 'key_kind'")
    connection.commit()
    connection.close()
    with pytest.raises(StoreCorrupted, match="'sound' is no kind of key"):
        MemoryBank.open(path, package_digest=DIGEST)


@pytest.mark.parametrize("compacted", [False, True])
def test_anchors_and_contrast_cases_must_be_of_one_kind(tmp_path: Path, compacted: bool) -> None:
    summaries, images = built(tmp_path / "s", "summary"), built(tmp_path / "i", "image")
    with MemoryBank(summaries, tmp_path / "c", "rw", package_digest=DIGEST) as bank:
        bank.remember(make_case("learnt"), provenance="a test")
        if compacted:
            bank.compact()
    if compacted:
        for file in (tmp_path / "c").glob("cases.*"):
            file.unlink()
    with pytest.raises(StoreMismatch) as refusal:
        MemoryBank(images, tmp_path / "c", package_digest=DIGEST)
    said = str(refusal.value)
    assert "\n" not in said
    for part in ("keys of another kind", "got summary", "allowed: image", "meiqa memory rekey"):
        assert part in said


def test_an_interrupted_build_is_finished_with_its_kind(tmp_path: Path) -> None:
    widths = key_widths("image", KEY_WIDTH, TOKEN_WIDTH)
    arguments = (tmp_path / "m", DIGEST, widths.key, widths.token)
    AnchorWriter(*arguments, key_kind="image", resume=True).suspend()
    with pytest.raises(StoreMismatch, match="finish it with --key image, or begin again: rm -r"):
        AnchorWriter(tmp_path / "m", DIGEST, KEY_WIDTH, TOKEN_WIDTH, resume=True)


@pytest.mark.parametrize("kind", ["image", "both"])
@pytest.mark.parametrize("compacted", [False, True])
def test_rekeying_gives_what_building_gives(tmp_path: Path, kind: KeyKind, compacted: bool) -> None:
    source = built(tmp_path / "s", "summary")
    with MemoryBank.open(source, "rw", package_digest=DIGEST) as bank:
        for name in ("learnt", "removed"):
            bank.remember(make_case(name), provenance="a test")
        if compacted:
            bank.compact()
        bank.remove(["removed", "anchor-0001"])
        bank.snapshot().retrieve(make_case("learnt").key, RetrievalPolicy(), None)
        bank.remember(make_case("later"), provenance="writes the counters")
    with MemoryBank.open(source, package_digest=DIGEST) as bank:
        assert bank.rekey(kind, tmp_path / "new") == 6
        records = list(bank.cases())
    with MemoryBank.open(tmp_path / "new", package_digest=DIGEST, verify=True) as bank:
        assert bank.key_kind == kind
        assert list(bank.cases()) == records
    assert uses_of(tmp_path / "new") == uses_of(source)
    assert uses_of(source)["learnt"][0] == 1
    assert verify_memory(tmp_path / "new") == []
    found = keys_of(tmp_path / "new")
    wanted = {name: keyed(make_case(name), kind).key for name in found}
    for name, key in found.items():
        # Tokens are rounded to 8 bits, keys to 16.
        np.testing.assert_allclose(key, unit(wanted[name]), atol=0.01)
    assert {path.name for path in tmp_path.iterdir()} == {"s", "new"}


def test_both_give_the_summaries_back(tmp_path: Path) -> None:
    source = built(tmp_path / "s", "summary")
    for kind, here, there in (("both", "s", "b"), ("summary", "b", "again")):
        with MemoryBank.open(tmp_path / here, package_digest=DIGEST) as bank:
            bank.rekey(kind, tmp_path / there)  # type: ignore[arg-type]
    again = keys_of(tmp_path / "again")
    for name, key in keys_of(source).items():
        np.testing.assert_allclose(again[name], key, atol=2e-3)


def test_what_cannot_be_rekeyed_is_refused(tmp_path: Path) -> None:
    with MemoryBank.open(built(tmp_path / "i", "image"), package_digest=DIGEST) as bank:
        for kind in ("summary", "both"):
            with pytest.raises(StoreMismatch, match=r"no summary keys.*memory build"):
                bank.rekey(kind, tmp_path / "new")  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="already"):
            bank.rekey("image", tmp_path / "new")
    with MemoryBank.open(built(tmp_path / "s", "summary"), package_digest=DIGEST) as bank:
        with pytest.raises(UsageError, match="allowed: summary, image, both"):
            bank.rekey("sound", tmp_path / "new")  # type: ignore[arg-type]
        with pytest.raises(StoreError, match="already exists"):
            bank.rekey("image", tmp_path / "i")
    assert not (tmp_path / "new").exists()
