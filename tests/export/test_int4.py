"""4-bit blocks lose less than plain rounding, whatever the sizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from meiqa.export.calibration import Observed
from meiqa.export.int4 import BLOCK, best_scales, block_errors, quantised, unclipped_scales
from tests.export.small_graphs import (
    Floats,
    convolution,
    linear,
    normal,
    result,
    stored_values,
)


def restored(made: ir.Model, inputs: int) -> Floats:
    """The weight as it comes back, (inputs, outputs)."""
    codes, scale = stored_values(made, "w.int4").astype(np.float32), stored_values(made, "w.scale")
    assert codes.min() >= -8
    assert codes.max() <= 7
    return codes * np.repeat(scale, BLOCK, axis=0)[:inputs]


def in_four_bits(weight: Floats, observed: dict[str, Observed] | None = None) -> ir.Model:
    made = linear(weight)
    quantised(made, observed or {}, lambda layer: True)
    return made


@pytest.mark.parametrize("inputs", [1, 31, 32, 33, 40, 64, 97])
def test_any_number_of_inputs_is_cut_into_blocks(tmp_path: Path, inputs: int) -> None:
    weight, x = normal(0, inputs, 24), normal(1, 5, inputs)
    made = in_four_bits(weight)
    exact = x @ restored(made, inputs)
    np.testing.assert_allclose(result(made, x, tmp_path), exact, atol=0.03 * np.abs(exact).max())


def test_onnx_runtime_multiplies_blocks_directly(tmp_path: Path) -> None:
    result(in_four_bits(normal(0, 64, 24)), normal(1, 5, 64), tmp_path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    providers = ["CPUExecutionProvider"]
    onnxruntime.InferenceSession(tmp_path / "graph.onnx", options, providers=providers)
    nodes = onnx.load(tmp_path / "optimised.onnx").graph.node
    assert [node.op_type for node in nodes] == ["MatMulNBits"]


def test_the_search_never_loses_against_plain_rounding_and_wins_somewhere() -> None:
    weight = np.random.default_rng(0).standard_t(3, (97, 50)).astype(np.float32)
    importance = np.geomspace(1e-3, 1e3, 97, dtype=np.float32)
    plain = block_errors(weight, unclipped_scales(weight), importance)
    found = block_errors(weight, best_scales(weight, importance), importance)
    assert (found <= plain).all()
    assert found.sum() < 0.9 * plain.sum()


def test_plain_rounding_is_off_by_half_a_step_at_most() -> None:
    weight = normal(0, 64, 24)
    scale = unclipped_scales(weight)
    largest = np.square(np.abs(scale / 2)) * BLOCK
    assert (block_errors(weight, scale, np.ones(64, np.float32)) <= largest).all()


def test_strong_inputs_are_rounded_more_closely() -> None:
    weight = normal(0, 32, 200)
    square = np.ones(32)
    square[:4] = 1000.0
    seen = Observed(-np.ones(32, np.float32), np.ones(32, np.float32), square, normal(1, 2, 32), 2)
    alike, weighed = (
        np.square(restored(in_four_bits(weight, observed), 32) - weight)[:4].sum()
        for observed in ({}, {"x": seen})
    )
    assert weighed < 0.8 * alike


def test_channels_of_zeros_stay_zeros(tmp_path: Path) -> None:
    weight = normal(0, 40, 24)
    weight[:, 7] = 0.0
    np.testing.assert_array_equal(
        result(in_four_bits(weight), normal(1, 5, 40), tmp_path)[:, 7], 0.0
    )


def test_convolutions_have_no_such_form() -> None:
    made = convolution(normal(0, 8, 3, 3, 3), normal(1, 8))
    quantised(made, {}, lambda layer: True)
    assert set(made.graph.initializers) == {"w", "b"}


def test_a_row_gives_the_same_alone_and_among_others(tmp_path: Path) -> None:
    made, x = in_four_bits(normal(0, 64, 24)), normal(1, 7, 64)
    x[0] *= 100
    alone, among = (result(made, rows, tmp_path) for rows in (x[3:4], x))
    np.testing.assert_allclose(alone[0], among[3], atol=1e-5)
