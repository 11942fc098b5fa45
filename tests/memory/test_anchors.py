"""Anchor memories appear whole, open anywhere, and are refused when damaged or foreign."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from meiqa.errors import StoreCorrupted, StoreError, StoreMismatch, StoreNotFound, UsageError
from meiqa.memory import (
    AnchorWriter,
    Case,
    MemoryBank,
    RetrievalPolicy,
    Segment,
    write_segment,
)
from tests.memory.samples import (
    DIGEST,
    KEY_WIDTH,
    TOKEN_WIDTH,
    assert_same_case,
    build_anchors,
    make_case,
    make_cases,
    python_child,
)

FILES = ["anchors.seg", "anchors.sqlite3"]
CASES = [make_case(f"anchor-{n}", "anchor", tokens=n) for n in (0, 1, 3, 7, 2)]


def open_anchors(path: Path, digest: str = DIGEST, *, verify: bool = True) -> dict[str, Case]:
    """Open a memory and read all its anchors, by id."""
    everything = RetrievalPolicy(k=100_000, anchor_share=1.0)
    with MemoryBank.open(path, package_digest=digest, verify=verify) as bank:
        found = bank.snapshot().retrieve(np.ones(KEY_WIDTH, np.float32), everything, None)
    return {case.id: case for case in found}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_anchors(tmp_path_factory.mktemp("pristine") / "anchors", CASES)


@pytest.fixture
def anchors_path(tmp_path: Path, pristine: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "anchors"))


@pytest.mark.parametrize("count", [0, 1, 3, 7, 97])
def test_anchors_come_back(tmp_path: Path, count: int) -> None:
    cases = make_cases(count, "anchor")
    found = open_anchors(build_anchors(tmp_path / "a", cases))
    assert len(found) == count
    for case in cases:
        assert_same_case(found[case.id], case)


def test_photos_of_different_sizes_keep_their_own_tokens(anchors_path: Path) -> None:
    found = open_anchors(anchors_path)
    for case in CASES:
        assert_same_case(found[case.id], case)


def test_nothing_appears_before_the_writer_has_finished(tmp_path: Path) -> None:
    path = tmp_path / "anchors"
    with AnchorWriter(path, DIGEST, KEY_WIDTH, TOKEN_WIDTH) as writer:
        writer.add(CASES[0])
        assert not path.exists()
    assert not list(tmp_path.iterdir())


def test_a_taken_directory_is_never_overwritten(anchors_path: Path) -> None:
    with pytest.raises(StoreError, match="already exists"):
        AnchorWriter(anchors_path, DIGEST, KEY_WIDTH, TOKEN_WIDTH)
    assert len(open_anchors(anchors_path)) == len(CASES)


def test_a_directory_taken_meanwhile_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "anchors"
    with AnchorWriter(path, DIGEST, KEY_WIDTH, TOKEN_WIDTH) as writer:
        build_anchors(path, CASES)
        with pytest.raises(StoreError, match="already exists"):
            writer.finish()
    assert len(open_anchors(path)) == len(CASES)


def test_an_empty_directory_may_be_filled(tmp_path: Path) -> None:
    assert len(open_anchors(build_anchors(tmp_path, CASES))) == len(CASES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"origin": "contrast"}, "origin"),
        ({"score": 0.99}, "off the scale"),
        ({"score": float("nan")}, "off the scale"),
        ({"std": -1.0}, "std"),
        ({"std": float("inf")}, "std"),
        ({"id": ""}, "id"),
        ({"image_digest": ""}, "digest"),
        ({"grid": (0, 4)}, "grid"),
        ({"grid": (3, 2)}, "grid that does not fit .* allowed: 4 cells"),
        ({"key": np.ones(KEY_WIDTH + 1, np.float32)}, "key of the wrong shape"),
        ({"key": np.full(KEY_WIDTH, np.nan, np.float32)}, "not finite"),
        ({"tokens": np.ones((3, TOKEN_WIDTH + 1), np.float32)}, "tokens of the wrong shape"),
        ({"tokens": np.full((3, TOKEN_WIDTH), np.inf, np.float32)}, "not finite"),
    ],
)
def test_unstorable_cases_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    case = make_case("a", "anchor")
    for name, value in changes.items():
        object.__setattr__(case, name, value)
    with (
        AnchorWriter(tmp_path / "a", DIGEST, KEY_WIDTH, TOKEN_WIDTH) as writer,
        pytest.raises(UsageError, match=message),
    ):
        writer.add(case)


def test_two_anchors_may_not_share_an_id(tmp_path: Path) -> None:
    with AnchorWriter(tmp_path / "a", DIGEST, KEY_WIDTH, TOKEN_WIDTH) as writer:
        writer.add(CASES[0])
        with pytest.raises(UsageError, match="one id"):
            writer.add(CASES[0])


def test_anchors_of_another_package_are_refused_with_the_remedy(anchors_path: Path) -> None:
    with pytest.raises(StoreMismatch, match="meiqa memory build") as refusal:
        open_anchors(anchors_path, "cd34")
    assert DIGEST in str(refusal.value)
    assert "cd34" in str(refusal.value)


def test_absent_anchors(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(StoreNotFound, match="meiqa memory build"):
            open_anchors(path)


@settings(max_examples=80, deadline=None)
@given(data=st.data(), name=st.sampled_from(FILES), verify=st.booleans())
def test_damage_is_noticed(pristine: Path, data: st.DataObject, name: str, verify: bool) -> None:
    """When the memory is opened if it is verified, when a case is read if not."""
    content = bytearray((pristine / name).read_bytes())
    if data.draw(st.booleans()):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    else:
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    with tempfile.TemporaryDirectory() as directory:
        shutil.copytree(pristine, directory, dirs_exist_ok=True)
        (Path(directory) / name).write_bytes(content)
        try:
            found = open_anchors(Path(directory), verify=verify)
        except (StoreCorrupted, StoreMismatch):
            return
        assert not verify or len(found) == len(CASES)
        for case in CASES:
            if case.id in found:
                assert_same_case(found[case.id], case)


def test_files_of_two_builds_do_not_mix(tmp_path: Path, anchors_path: Path) -> None:
    other = build_anchors(tmp_path / "other", CASES[::-1])
    shutil.copy(other / "anchors.sqlite3", anchors_path)
    with pytest.raises(StoreCorrupted, match=r"anchors\.sqlite3 was altered"):
        open_anchors(anchors_path)


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("offsets", np.array([0, 0, 1, 4, 11, 14])),
        ("offsets", np.array([0, 4, 1, 4, 11, 13])),
        ("offsets", np.array([-1, 0, 1, 4, 11, 13])),
        ("offsets", np.arange(3)),
        ("keys", np.zeros((5, KEY_WIDTH - 1), np.float16)),
        ("levels", np.zeros((12, TOKEN_WIDTH), np.int8)),
        ("levels", np.zeros((), np.int8)),
        ("scales", np.zeros(13, np.float64)),
        ("grids", None),
        ("digests", np.zeros((5, 7), np.uint8)),
        ("digests", np.zeros((5, 8), np.uint8)),
        ("sorted_scores", np.zeros(6)),
        ("by_score", np.array([0, 1, 2, 3, 5], np.int32)),
        ("by_score", np.array([0, 1, 2, 3, -1], np.int32)),
        ("image_hashes", None),
        ("image_rows", np.zeros(5, np.int64)),
    ],
)
def test_arrays_that_do_not_fit_are_refused(
    anchors_path: Path, name: str, array: NDArray[Any] | None
) -> None:
    segment = Segment.open(anchors_path / "anchors.seg")
    arrays = {key: value for key, value in segment.arrays.items() if key != name}
    if array is not None:
        arrays[name] = array
    write_segment(anchors_path / "anchors.seg", arrays, segment.attributes)
    with pytest.raises(StoreCorrupted, match=r"anchors\.seg (has|is damaged)"):
        open_anchors(anchors_path, verify=False)


@pytest.fixture
def public_directory() -> Iterator[Path]:
    """A directory that other users can reach, unlike pytest's own."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


READ_ALL = """
import os, sys
from pathlib import Path
import numpy as np
from meiqa.memory import MemoryBank, RetrievalPolicy
if os.getuid() == 0:  # after the imports, which may be readable by the superuser only
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
path = Path(sys.argv[1])
assert not os.access(path, os.W_OK)
bank = MemoryBank(path, path, "r", package_digest="ab12")
print(len(bank.snapshot().retrieve(np.ones(8, np.float32), RetrievalPolicy(k=32), None)))
"""


def test_a_read_only_directory_can_be_read(public_directory: Path) -> None:
    """As another user, since the superuser may write anywhere."""
    path = build_anchors(public_directory / "anchors", CASES)
    with MemoryBank.open(path, "rw", package_digest=DIGEST) as bank:
        bank.remember(make_case("learned"), provenance="a test")
    before = sorted(file.name for file in path.iterdir())
    path.chmod(0o555)
    output, errors = python_child(READ_ALL, path).communicate(timeout=60)
    assert (output.strip(), errors) == (str(len(CASES) + 1), "")
    assert sorted(file.name for file in path.iterdir()) == before


def test_reading_leaves_no_file_behind(anchors_path: Path) -> None:
    with MemoryBank.open(anchors_path, package_digest=DIGEST) as bank:
        assert bank.snapshot().count_anchors == len(CASES)
        assert sorted(file.name for file in anchors_path.iterdir()) == FILES


@pytest.fixture(scope="module")
def indexed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("meiqa.memory.index.FLAT_BELOW", 1)
        return build_anchors(tmp_path_factory.mktemp("indexed") / "m", make_cases(60, "anchor"))


@pytest.mark.slow
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_a_damaged_index_is_no_danger(indexed: Path, data: st.DataObject) -> None:
    """Even one that is signed well: what is found is whole."""
    segment = Segment.open(indexed / "anchors.seg")
    names = sorted(name for name in segment.arrays if name.startswith("index_"))
    name = data.draw(st.sampled_from(names))
    altered = segment.arrays[name].copy()
    content = altered.reshape(-1).view(np.uint8)
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as directory:
        shutil.copytree(indexed, directory, dirs_exist_ok=True)
        write_segment(
            Path(directory) / "anchors.seg", {**segment.arrays, name: altered}, segment.attributes
        )
        key = np.random.default_rng(1).standard_normal(KEY_WIDTH, np.float32)
        with MemoryBank.open(directory, package_digest=DIGEST) as bank:
            for policy in (RetrievalPolicy(k=20), RetrievalPolicy(k=20, bins=1)):
                try:
                    found = bank.snapshot().retrieve(key, policy, None)
                except StoreCorrupted:
                    continue
                for case in found:
                    assert_same_case(case, make_case(case.id, "anchor"))
