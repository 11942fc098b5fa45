"""The encodings keep their documented error bounds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from meiqa.memory.cases import (
    decode_keys,
    dequantise_tokens,
    encode_key,
    quantise_tokens,
    unit_rows,
)

values = st.floats(-(2.0**99), 2.0**99, width=32)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 7).flatmap(
        lambda width: st.lists(st.lists(values, min_size=width, max_size=width), max_size=5).map(
            lambda rows: np.array(rows, np.float32).reshape(-1, width)
        )
    )
)
def test_tokens_come_back_within_half_a_level(tokens: NDArray[Any]) -> None:
    levels, scales = quantise_tokens(tokens)
    back = dequantise_tokens(levels, scales)
    assert levels.dtype == np.dtype(np.int8)
    assert scales.dtype == back.dtype == np.dtype(np.float32)
    assert back.shape == tokens.shape
    peaks = np.abs(tokens.astype(np.float64)).max(axis=1, keepdims=True, initial=0.0)
    bound = np.where(peaks < 1e-30, peaks, peaks * (1 / 254 + 2e-7))
    assert (np.abs(back.astype(np.float64) - tokens) <= bound).all()


@pytest.mark.parametrize("tokens", [0, 1, 3, 7, 97])
def test_one_loud_token_does_not_coarsen_the_others(tokens: int) -> None:
    quiet = np.random.default_rng(tokens).standard_normal((tokens, 97), np.float32)
    loud = np.full((1, 97), 1e6, np.float32)
    both = dequantise_tokens(*quantise_tokens(np.concatenate([loud, quiet])))
    np.testing.assert_array_equal(both[1:], dequantise_tokens(*quantise_tokens(quiet)))


def test_silent_tokens_come_back_as_zeros() -> None:
    tokens = np.array([[0.0, 0.0], [1e-40, -1e-31]], np.float32)
    np.testing.assert_array_equal(dequantise_tokens(*quantise_tokens(tokens)), np.zeros((2, 2)))


@pytest.mark.parametrize("width", [1, 3, 7, 97])
def test_unit_rows(width: int) -> None:
    rows = np.random.default_rng(width).standard_normal((7, width), np.float32)
    lengths = np.array([1e-40, 1e-20, 1.0, 7.0, 1e20, 1e30, 1e37], np.float32)
    scaled = rows * lengths[:, None]
    np.testing.assert_allclose(np.linalg.norm(unit_rows(scaled), axis=1), 1.0, rtol=1e-6)
    np.testing.assert_array_equal(unit_rows(np.zeros((2, width), np.float32)), 0.0)
    assert unit_rows(rows[:0]).shape == (0, width)


@pytest.mark.parametrize("width", [1, 3, 7, 97, 3584])
def test_stored_keys_keep_their_direction(width: int) -> None:
    key = 1e6 * np.random.default_rng(width).standard_normal(width).astype(np.float32)
    stored = decode_keys(encode_key(key)[None])[0]
    assert abs(float(stored @ unit_rows(key[None])[0]) - 1.0) < 1e-3
    assert not stored.flags.writeable
