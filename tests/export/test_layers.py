"""Weights in fp16 are half as large, nearly the same and never infinite."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from meiqa.errors import PackageCorrupted
from meiqa.export.layers import halve, store_as_half
from tests.export.small_graphs import convolution, linear, normal, result, stored_values


def test_a_linear_layer_is_stored_in_half_and_nearly_the_same(tmp_path: Path) -> None:
    weight, x = normal(0, 40, 24), normal(1, 5, 40)
    made = linear(weight)
    halve(made)
    assert stored_values(made, "w.half").dtype == np.float16
    assert set(made.graph.initializers) == {"w.half"}
    np.testing.assert_allclose(result(made, x, tmp_path), x @ weight, atol=0.05)


def test_a_convolution_keeps_its_bias_in_single(tmp_path: Path) -> None:
    weight, bias, x = normal(0, 8, 3, 3, 3), normal(1, 8), normal(2, 1, 3, 9, 7)
    exact = result(convolution(weight, bias), x, tmp_path)
    made = convolution(weight, bias)
    halve(made)
    np.testing.assert_array_equal(stored_values(made, "b.column")[:, 0, 0], bias)
    np.testing.assert_allclose(result(made, x, tmp_path), exact, atol=0.05)


def test_layers_that_are_not_chosen_stay_as_they_are() -> None:
    made = linear(normal(0, 40, 24))
    store_as_half(made, lambda layer: layer.name != "w")
    assert set(made.graph.initializers) == {"w"}


@pytest.mark.parametrize("beyond", [70000.0, -70000.0, np.inf, np.nan])
def test_a_weight_beyond_half_is_refused(tmp_path: Path, beyond: float) -> None:
    weight = normal(0, 40, 24)
    weight[3, 5] = beyond
    made = linear(weight)
    halve(made)
    with pytest.raises(PackageCorrupted, match="the weight w does not fit into fp16"):
        result(made, normal(1, 5, 40), tmp_path)


def test_weights_stored_in_half_multiply_in_single(tmp_path: Path) -> None:
    weight, bias, x = normal(0, 8, 3, 3, 3), normal(1, 8), normal(2, 1, 3, 9, 7)
    made = convolution(weight, bias)
    store_as_half(made, lambda layer: True)
    assert stored_values(made, "w.half").dtype == np.float16
    assert set(made.graph.initializers) == {"w.half", "b"}
    found = result(made, x, tmp_path)
    rounded = convolution(weight.astype(np.float16).astype(np.float32), bias)
    np.testing.assert_allclose(found, result(rounded, x, tmp_path), atol=1e-5)
