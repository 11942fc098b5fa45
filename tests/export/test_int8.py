"""INT8 rounds to the nearest step and keeps what it must not touch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from meiqa.export.int8 import Range, quantised, values_to_observe
from tests.export.small_graphs import convolution, linear, normal, result, stored_values


def all_layers(_: object) -> bool:
    return True


def kinds_run(path: Path, folder: Path) -> list[str]:
    """Operators that ONNX Runtime executes a graph with."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return [n.op_type for n in onnx.load(folder / "optimised.onnx").graph.node]


@pytest.mark.parametrize(("low", "high"), [(-1.0, 3.0), (0.5, 2.0), (-3.0, -1.0), (0.0, 0.0)])
def test_a_range_holds_zero_exactly_and_its_ends_nearly(low: float, high: float) -> None:
    made = Range.between(low, high)
    values = np.array([0.0, low, high], np.float32)
    back = made.rounded(values)
    assert back[0] == 0.0
    np.testing.assert_allclose(back, values, atol=float(made.scale))


def test_a_weight_is_never_off_by_more_than_half_a_step() -> None:
    weight = normal(0, 40, 24) * np.geomspace(1e-6, 1e3, 24, dtype=np.float32)
    made = linear(weight)
    quantised(made, {"x": Range.between(-3, 3)}, all_layers)
    codes, steps = stored_values(made, "w.int8"), stored_values(made, "w.scale")
    assert codes.dtype == np.int8
    assert (np.abs(codes * steps - weight) <= 0.5001 * steps).all()
    assert (np.abs(codes).max(0) == 127).all()


def test_a_linear_layer_runs_on_integers_and_gives_floats(tmp_path: Path) -> None:
    weight, x = normal(0, 64, 24), normal(1, 5, 64).clip(-3, 3)
    made = linear(weight)
    assert values_to_observe(made) == {"x": -1}
    quantised(made, {"x": Range.between(-3, 3)}, all_layers)
    np.testing.assert_allclose(result(made, x, tmp_path), x @ weight, atol=0.5)
    assert "MatMulIntegerToFloat" in kinds_run(tmp_path / "graph.onnx", tmp_path)


def test_a_convolution_runs_on_integers(tmp_path: Path) -> None:
    weight, bias = normal(0, 16, 8, 3, 3), normal(1, 16)
    x = normal(2, 1, 8, 9, 7).clip(-3, 3)
    exact = result(convolution(weight, bias), x, tmp_path)
    made = convolution(weight, bias)
    assert values_to_observe(made) == {"x": 1, "r": 1}
    ranges = {"x": Range.between(-3, 3), "r": Range.between(0, float(-exact.min()))}
    quantised(made, ranges, all_layers)
    np.testing.assert_allclose(result(made, x, tmp_path), exact, atol=0.5)
    assert "QLinearConv" in kinds_run(tmp_path / "graph.onnx", tmp_path)


def test_zero_channels_and_constant_activations_come_back_as_they_are(tmp_path: Path) -> None:
    weight = normal(0, 40, 24)
    weight[:, 5] = 0.0
    made = linear(weight)
    quantised(made, {"x": Range.between(0.0, 0.0)}, all_layers)
    np.testing.assert_array_equal(result(made, np.zeros((3, 40), np.float32), tmp_path), 0.0)


@pytest.mark.parametrize("scale", [0.0, 1e-12])
def test_a_bias_survives_weights_that_are_nearly_nothing(tmp_path: Path, scale: float) -> None:
    weight, bias = normal(0, 8, 3, 3, 3), normal(1, 8)
    weight[2] *= scale
    made = convolution(weight, bias)
    quantised(made, {"x": Range.between(-3, 3), "r": Range.between(0, 20)}, all_layers)
    codes, steps = stored_values(made, "b.int32"), stored_values(made, "b.scale")
    assert steps[2] < 1e-6
    assert (np.abs(codes * steps.astype(np.float64) - bias) <= 0.5001 * steps).all()


def test_a_row_gives_the_same_alone_and_among_others(tmp_path: Path) -> None:
    weight, x = normal(0, 64, 24), normal(1, 7, 64)
    x[0] *= 100
    made = linear(weight)
    quantised(made, {"x": Range.between(-3, 3)}, all_layers)
    alone, among = (result(made, rows, tmp_path) for rows in (x[3:4], x))
    np.testing.assert_array_equal(alone[0], among[3])
