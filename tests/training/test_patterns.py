"""Patterns are learned from aligned versions, and their calibration is what was put in."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from training.calibrate_patterns import checked, fitted
from training.pattern_pairs import Version, Views, all_versions, parts_of, version_of
from training.patterns import (
    UNCALIBRATED,
    Judged,
    Recipe,
    alikeness,
    area,
    drawn,
    figures,
    judged,
    strengths,
    train,
    views_of,
    window,
)

WIDTH, CELLS = 16, 6
PIXELS = np.random.default_rng(0).integers(0, 256, (128, 192, 3)).astype(np.uint8)


def toy_views(count: int, seed: int) -> list[Views]:
    """Photographs whose tokens move along a direction of their kind, the further the stronger."""
    directions = np.random.default_rng(0).normal(size=(3, WIDTH)) * 2
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        content = rng.normal(size=(CELLS, WIDTH)) * 0.5
        kinds = np.array([0, *np.repeat([1, 2, 3], 5)])
        levels = np.array([0, *np.tile(np.arange(1, 6), 3)])
        shifts = [content + directions[k - 1] * lv / 5 for k, lv in zip(kinds, levels, strict=True)]
        tokens = np.concatenate(shifts) + rng.normal(size=(len(kinds) * CELLS, WIDTH)) * 0.05
        made.append(
            Views(
                tokens.astype(np.float16),
                np.tile([2, 3], (len(kinds), 1)),
                np.zeros(len(kinds), np.int64),
                kinds,
                levels,
                (4.6 - 0.7 * levels).astype(np.float32),
                np.repeat(kinds > 0, CELLS),
            )
        )
    return made


def test_patterns_learn_to_judge_and_to_name() -> None:
    seen, unseen = (
        [view for views in toy_views(count, seed) for view in views_of(views)]
        for count, seed in ((24, 1), (8, 2))
    )
    recipe = Recipe(patterns=32, minutes=math.inf, steps=150, views=4, versions=8)
    found = figures(judged(train(seen, WIDTH, recipe), unseen))
    assert found["alone"] > 0.75
    assert found["hybrid"] > 0.85
    assert found["kinds_named"] > 0.7


def test_views_are_sorted_with_their_tokens() -> None:
    stored = toy_views(1, 3)[0]
    order = np.random.default_rng(0).permutation(len(stored.kinds))
    cells = (order[:, None] * CELLS + np.arange(CELLS)).ravel()
    mixed = Views(
        stored.tokens[cells],
        stored.grids[order],
        stored.views[order],
        stored.kinds[order],
        stored.levels[order],
        stored.scores[order],
        stored.touched[cells],
    )
    (view,) = views_of(mixed)
    assert view.named[view.clean].tolist() == [0, 0]
    at = int(np.flatnonzero((view.named == [2, 4]).all(axis=1))[0])
    original = int(np.flatnonzero((stored.kinds == 2) & (stored.levels == 4))[0])
    expected = stored.tokens[original * CELLS : (original + 1) * CELLS]
    np.testing.assert_array_equal(view.tokens[at].numpy(), expected)
    assert view.mild.size
    assert (view.scores[view.mild] >= 3.6).all()


def test_drawn_pairs_are_aligned() -> None:
    (view,) = views_of(toy_views(1, 4)[0])
    rng = np.random.default_rng(0)
    for _ in range(20):
        batch = drawn(view, Recipe(versions=6), rng)
        assert batch.tokens.shape == batch.references.shape
        apart = (batch.tokens - batch.references)[batch.clean]
        kinds = batch.kinds[batch.clean]
        # Beside the untouched version only the shift of the kind is left, the same in every cell.
        assert apart.std(1).max() < 0.2
        assert (apart[kinds == 0].abs().max() if (kinds == 0).any() else 0) < 0.3


def test_two_sided_kinds_are_strong_at_both_ends() -> None:
    kinds, levels = np.full(5, 18), np.arange(1, 6)
    assert strengths(kinds, levels).tolist() == [4, 2, 0, 2, 4]
    assert strengths(np.full(5, 10), levels).tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (3, 2), (8, 8)])
def test_windows_are_rectangles_inside_the_grid(grid: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    for _ in range(30):
        rows, columns = np.divmod(window(grid, rng), grid[1])
        assert rows.max() < grid[0]
        assert len(set(rows)) * len(set(columns)) == len(rows)
        assert len(rows) >= min(4, grid[0] * grid[1], 2 * max(grid)) or 1 in grid


def test_patterns_that_are_alike_are_penalised() -> None:
    assert alikeness(torch.eye(8)) == pytest.approx(0.0, abs=1e-6)
    assert alikeness(torch.ones(8, 3)) == pytest.approx(1.0, abs=1e-5)


def test_only_the_part_of_a_photograph_is_distorted() -> None:
    version = Version(0, 10, 5, (0.0, 0.0, 0.5, 0.4))
    made = version_of(PIXELS, version, [1])
    mask = version.mask((2, 3)).repeat(64, 0).repeat(64, 1)
    assert 0 < mask.sum() < mask.size
    np.testing.assert_array_equal(made[~mask], PIXELS[~mask])
    assert (made[mask] != PIXELS[mask]).any()


def test_versions_are_every_type_and_level_once() -> None:
    named = [(v.kind, v.level) for v in all_versions()]
    assert len(set(named)) == len(named) == 126
    assert all(
        not v.whole and v.level in (1, 3, 4, 5) for v in parts_of(0, 20, np.random.default_rng(0))
    )


def test_area_is_that_under_the_curve() -> None:
    touched = np.array([True, True, False, False])
    assert area(np.array([3.0, 2.0, 1.0, 0.0], np.float32), touched) == 1.0
    assert area(np.array([0.0, 1.0, 2.0, 3.0], np.float32), touched) == 0.0
    assert area(np.zeros(4, np.float32), touched) == 0.5


def synthetic_judged(trusted: float, doubted: float, sharp: float) -> Judged:
    """Scores whose errors and logits are known."""
    rng = np.random.default_rng(0)
    shape, kinds = (40, 125), 5
    wanted = rng.uniform(1, 5, shape)
    weight, less = rng.uniform(0.6, 1.0, shape), rng.uniform(0.0, 0.4, shape)

    def errors(w: np.ndarray) -> np.ndarray:
        return rng.normal(size=shape) * np.sqrt(w * trusted**2 + (1 - w) * doubted**2)

    logits = rng.normal(size=(*shape, kinds))
    shares = np.exp(logits)
    shares /= shares.sum(-1, keepdims=True)
    drawn_kinds = (rng.random(shape)[..., None] > shares.cumsum(-1)).sum(-1).clip(0, kinds - 1)
    # Both parts are the hybrid itself, so that whatever the weight, it is this.
    hybrid, degraded = wanted + errors(weight), wanted + errors(less)
    return Judged(
        wanted=wanted,
        true_kinds=drawn_kinds,
        levels=wanted,
        alone=hybrid,
        full=hybrid,
        weight=weight,
        degraded_full=(degraded - (1 - less) * hybrid) / less,
        degraded_weight=less,
        kinds=logits * sharp,
        strength=wanted,
        cell_ranks=np.zeros(0),
    )


def test_the_calibration_is_what_the_errors_were_drawn_with() -> None:
    found = synthetic_judged(0.15, 0.3, 3.0)
    made = fitted(found, UNCALIBRATED)
    assert made.trusted_std == pytest.approx(0.15, abs=0.05)
    assert made.doubted_std == pytest.approx(0.3, abs=0.05)
    assert made.temperature == pytest.approx(3.0, rel=0.1)
    assert made.hybrid.b4 == pytest.approx(1.0, abs=0.1)
    report = checked(found, replace(UNCALIBRATED))
    assert report["interval_coverage"] == pytest.approx(0.95, abs=0.03)
    assert report["naming_overconfidence"] < 0.03
