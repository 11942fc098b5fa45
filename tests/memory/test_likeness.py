"""What two photos of one scene share, and strangers do not."""

from __future__ import annotations

import numpy as np
import pytest

from meiqa.memory import NEAR_DUPLICATE, spatial_descriptor
from tests.memory.naive_retrieval import naive_descriptor


@pytest.mark.parametrize("grid", [(1, 3), (2, 2), (3, 7), (4, 4), (5, 1), (8, 8), (13, 97)])
def test_agrees_with_the_naive_twin(grid: tuple[int, int]) -> None:
    random = np.random.default_rng(grid[0])
    tokens = random.standard_normal((grid[0] * grid[1], 5), np.float32) + np.float32(3)
    look = spatial_descriptor(tokens, grid)
    assert look.dtype == np.float32
    assert float(look @ look) == pytest.approx(1.0, abs=1e-5)
    np.testing.assert_allclose(look, naive_descriptor(tokens, grid), atol=1e-5)


def test_neither_size_nor_a_common_shift_matters() -> None:
    random = np.random.default_rng(0)
    small = random.standard_normal((4, 4, 6)).astype(np.float32)
    large = small.repeat(3, axis=0).repeat(2, axis=1)
    look = spatial_descriptor(small.reshape(16, 6), (4, 4))
    shifted = spatial_descriptor(
        2 * large.reshape(-1, 6) + random.standard_normal(6, np.float32), (12, 8)
    )
    assert float(look @ shifted) == pytest.approx(1.0, abs=1e-5)
    mirrored = spatial_descriptor(small[:, ::-1].reshape(16, 6), (4, 4))
    assert float(look @ mirrored) < NEAR_DUPLICATE


@pytest.mark.parametrize(
    ("tokens", "grid"),
    [
        (np.full((49, 6), 0.1, np.float32), (7, 7)),
        (np.ones((1, 6), np.float32), (1, 1)),
        (np.empty((0, 6), np.float32), (3, 3)),
    ],
    ids=["even", "single", "none"],
)
def test_what_has_no_layout_is_like_nothing(
    tokens: np.ndarray[tuple[int, int], np.dtype[np.float32]], grid: tuple[int, int]
) -> None:
    assert not spatial_descriptor(tokens, grid).any()
