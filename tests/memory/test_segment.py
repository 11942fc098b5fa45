"""Segments come back as they were written, or are refused by name."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from meiqa.errors import StoreCorrupted, StoreError, StoreMismatch, StoreNotFound, UsageError
from meiqa.memory import Segment, write_segment

DTYPES = ["int8", "uint8", "int32", "int64", "float16", "float32", "float64"]


def example_arrays() -> dict[str, NDArray[Any]]:
    random = np.random.default_rng(5)
    return {
        "keys": random.standard_normal((7, 3)).astype(np.float16),
        "none": np.empty((0, 3), np.float32),
        "levels": random.integers(-127, 128, (97,), np.int8),
        "offsets": np.arange(3, dtype=np.int64),
    }


@pytest.fixture(scope="module")
def segment_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("segment") / "a.seg"
    write_segment(path, example_arrays(), {"package": "ab12"})
    return path.read_bytes()


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damaged") / "b.seg"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 7), (97, 1, 3), (5, 0)])
def test_arrays_come_back(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    write_segment(tmp_path / "a.seg", {"x": array, "y": array[..., None]}, {"n": 3, "s": "é"})
    segment = Segment.open(tmp_path / "a.seg")
    for name, expected in (("x", array), ("y", array[..., None])):
        assert segment.arrays[name].dtype == dtype
        np.testing.assert_array_equal(segment.arrays[name], expected)
    assert dict(segment.attributes) == {"n": 3, "s": "é"}


def test_arrays_are_aligned_read_only_and_little_endian(tmp_path: Path) -> None:
    big = np.arange(5, dtype=">f4")
    write_segment(tmp_path / "a.seg", {**example_arrays(), "big": big[::2]}, {})
    segment = Segment.open(tmp_path / "a.seg")
    np.testing.assert_array_equal(segment.arrays["big"], big[::2])
    for array in segment.arrays.values():
        assert array.ctypes.data % 64 == 0
        assert array.dtype.str[0] in "<|"
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0


def test_arrays_outlive_the_segment(tmp_path: Path) -> None:
    write_segment(tmp_path / "a.seg", example_arrays(), {})
    keys = Segment.open(tmp_path / "a.seg").arrays["keys"]
    (tmp_path / "a.seg").unlink()
    np.testing.assert_array_equal(keys, example_arrays()["keys"])


def assert_refused_or_unchanged(path: Path) -> None:
    """A change between the arrays may pass; one that reaches the reader may not."""
    try:
        segment = Segment.open(path)
    except StoreCorrupted:
        return
    assert dict(segment.attributes) == {"package": "ab12"}
    for name, expected in example_arrays().items():
        np.testing.assert_array_equal(segment.arrays[name], expected)


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_changed_bytes_are_noticed(
    segment_bytes: bytes, scratch: Path, data: st.DataObject
) -> None:
    content = bytearray(segment_bytes)
    positions = st.integers(0, len(content) - 1)
    for position in data.draw(st.lists(positions, min_size=1, max_size=4, unique=True)):
        content[position] ^= data.draw(st.integers(1, 255))
    scratch.write_bytes(content)
    assert_refused_or_unchanged(scratch)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_truncation_is_refused(
    segment_bytes: bytes, scratch: Path, data: st.DataObject
) -> None:
    scratch.write_bytes(segment_bytes[: data.draw(st.integers(0, len(segment_bytes) - 1))])
    for verify in (True, False):
        with pytest.raises(StoreCorrupted, match=r"b\.seg"):
            Segment.open(scratch, verify=verify)


@given(content=st.binary(max_size=400))
@settings(max_examples=50, deadline=None)
def test_foreign_files_are_refused(scratch: Path, content: bytes) -> None:
    for prefix in (b"", b"MEIQASEG"):
        scratch.write_bytes(prefix + content)
        with pytest.raises(StoreCorrupted):
            Segment.open(scratch)


def sign(header: Any, body: bytes = bytes(256), version: int = 1) -> bytes:
    """Make a segment whose header is well signed, whatever it says."""
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 64)
    length = 64 + len(encoded) + len(body)
    preamble = struct.pack("<8sIIQQ", b"MEIQASEG", version, 0, len(encoded), length)
    return preamble + hashlib.sha256(preamble + encoded).digest() + encoded + body


def entry(**changes: Any) -> dict[str, Any]:
    return {"name": "x", "dtype": "<f4", "shape": [2], "offset": 320, "sha256": ""} | changes


@pytest.mark.parametrize(
    "header",
    [
        [],
        {},
        {"attributes": {}},
        {"attributes": 3, "arrays": []},
        {"attributes": {}, "arrays": {}},
        *(
            {"attributes": {}, "arrays": arrays}
            for arrays in (
                [3],
                [entry(offset=0)],
                [entry(offset=321)],
                [entry(offset=-64)],
                [entry(offset=1 << 62)],
                [entry(offset=True)],
                [entry(offset=320.0)],
                [entry(shape=[1 << 40])],
                [entry(shape=[1 << 63, 1 << 63])],
                [entry(shape=[0, 1 << 80])],
                [entry(shape=[-1])],
                [entry(shape=7)],
                [entry(dtype="|O")],
                [entry(dtype=[])],
                [entry(), entry()],
                [{"name": "x"}],
            )
        ),
    ],
)
def test_lying_headers_are_refused(tmp_path: Path, header: Any) -> None:
    (tmp_path / "a.seg").write_bytes(sign(header))
    with pytest.raises(StoreCorrupted):
        Segment.open(tmp_path / "a.seg", verify=False)


def test_another_version_is_not_called_damage(tmp_path: Path) -> None:
    (tmp_path / "a.seg").write_bytes(sign({"anything": 1}, version=2))
    with pytest.raises(StoreMismatch, match="version 2"):
        Segment.open(tmp_path / "a.seg")


def test_verification_can_be_left_out(tmp_path: Path, segment_bytes: bytes) -> None:
    content = bytearray(segment_bytes)
    content[-1] ^= 1
    (tmp_path / "a.seg").write_bytes(content)
    with pytest.raises(StoreCorrupted, match="'offsets' was altered"):
        Segment.open(tmp_path / "a.seg")
    assert Segment.open(tmp_path / "a.seg", verify=False).arrays["offsets"][0] == 0


def test_absent_segment(tmp_path: Path) -> None:
    with pytest.raises(StoreNotFound):
        Segment.open(tmp_path / "a.seg")


@pytest.mark.parametrize("dtype", ["complex64", "O", "bool", "U3"])
def test_other_dtypes_are_refused(tmp_path: Path, dtype: str) -> None:
    with pytest.raises(UsageError, match="dtype"):
        write_segment(tmp_path / "a.seg", {"x": np.zeros(2, dtype)}, {})
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_segment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    write_segment(tmp_path / "a.seg", {"x": np.arange(3)}, {})
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(StoreError, match="No space left"):
        write_segment(tmp_path / "a.seg", {"x": np.arange(5)}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["a.seg"]
    assert len(Segment.open(tmp_path / "a.seg").arrays["x"]) == 3
