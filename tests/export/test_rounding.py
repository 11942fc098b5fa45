"""INT8 and 4 bits round to the nearest step, and smoothing changes nothing but what that costs."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from meiqa.export.calibration import observing
from meiqa.export.layers import layers_of, save_graph
from meiqa.export.rounding import (
    BLOCK,
    BlockGrid,
    Observed,
    Range,
    best_block_grid,
    block_codes,
    block_errors,
    by_blocks,
    compensated_codes,
    evened,
    foldables,
    make_activations_signed,
    output_share_lost,
    quantise_int4,
    quantise_int8,
    share_lost,
    smoothing_scales,
    values_to_observe,
    want_own_rows,
)
from tests.export.small_graphs import (
    Floats,
    convolution,
    gated,
    linear,
    model,
    node,
    normal,
    result,
    stored_values,
    value,
    weights,
)


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
    quantise_int8(made, {"x": Range.between(-3, 3)}, all_layers)
    codes, steps = stored_values(made, "w.int8"), stored_values(made, "w.scale")
    assert codes.dtype == np.int8
    assert (np.abs(codes * steps - weight) <= 0.5001 * steps).all()
    assert (np.abs(codes).max(0) == 127).all()


def test_a_linear_layer_runs_on_integers_and_gives_floats(tmp_path: Path) -> None:
    weight, x = normal(0, 64, 24), normal(1, 5, 64).clip(-3, 3)
    made = linear(weight)
    assert values_to_observe(made) == {"x": -1}
    quantise_int8(made, {"x": Range.between(-3, 3)}, all_layers)
    np.testing.assert_allclose(result(made, x, tmp_path), x @ weight, atol=0.5)
    assert "MatMulIntegerToFloat" in kinds_run(tmp_path / "graph.onnx", tmp_path)


def test_a_convolution_runs_on_integers(tmp_path: Path) -> None:
    weight, bias = normal(0, 16, 8, 3, 3), normal(1, 16)
    x = normal(2, 1, 8, 9, 7).clip(-3, 3)
    exact = result(convolution(weight, bias), x, tmp_path)
    made = convolution(weight, bias)
    assert values_to_observe(made) == {"x": 1, "r": 1}
    ranges = {"x": Range.between(-3, 3), "r": Range.between(0, float(-exact.min()))}
    quantise_int8(made, ranges, all_layers)
    np.testing.assert_allclose(result(made, x, tmp_path), exact, atol=0.5)
    assert "QLinearConv" in kinds_run(tmp_path / "graph.onnx", tmp_path)


def test_zero_channels_and_constant_activations_come_back_as_they_are(tmp_path: Path) -> None:
    weight = normal(0, 40, 24)
    weight[:, 5] = 0.0
    made = linear(weight)
    quantise_int8(made, {"x": Range.between(0.0, 0.0)}, all_layers)
    np.testing.assert_array_equal(result(made, np.zeros((3, 40), np.float32), tmp_path), 0.0)


@pytest.mark.parametrize("scale", [0.0, 1e-12])
def test_a_bias_survives_weights_that_are_nearly_nothing(tmp_path: Path, scale: float) -> None:
    weight, bias = normal(0, 8, 3, 3, 3), normal(1, 8)
    weight[2] *= scale
    made = convolution(weight, bias)
    quantise_int8(made, {"x": Range.between(-3, 3), "r": Range.between(0, 20)}, all_layers)
    codes, steps = stored_values(made, "b.int32"), stored_values(made, "b.scale")
    assert steps[2] < 1e-6
    assert (np.abs(codes * steps.astype(np.float64) - bias) <= 0.5001 * steps).all()


def test_a_row_in_int8_gives_the_same_alone_and_among_others(tmp_path: Path) -> None:
    weight, x = normal(0, 64, 24), normal(1, 7, 64)
    x[0] *= 100
    made = linear(weight)
    quantise_int8(made, {"x": Range.between(-3, 3)}, all_layers)
    alone, among = (result(made, rows, tmp_path) for rows in (x[3:4], x))
    np.testing.assert_array_equal(alone[0], among[3])


def test_rows_by_themselves_lose_nothing_to_a_loud_one(tmp_path: Path) -> None:
    weight, x = normal(0, 64, 24), normal(1, 7, 64)
    x[0] *= 1e4
    x[1] = 0.0
    exact, made = x @ weight, linear(weight)
    quantise_int8(made, {}, all_layers, by_rows={"x"})
    rounded = result(made, x, tmp_path)
    assert "MatMulInteger" in kinds_run(tmp_path / "graph.onnx", tmp_path)
    np.testing.assert_array_equal(rounded[1], 0.0)
    np.testing.assert_allclose(rounded[2:], exact[2:], atol=0.5)
    np.testing.assert_array_equal(result(made, x[3:4], tmp_path)[0], rounded[3])
    fixed = linear(weight)
    quantise_int8(fixed, {"x": Range.between(float(x.min()), float(x.max()))}, all_layers)
    lost = np.abs(result(fixed, x, tmp_path) - exact)[2:]
    assert lost.mean() > 20 * np.abs(rounded - exact)[2:].mean()


def test_activations_with_loud_tokens_want_own_rows() -> None:
    usual = normal(1, 200, 64)
    loud = usual.copy()
    loud[3] *= 100
    for rows, wanted in ((usual, set()), (loud, {"x"})):
        seen = Observed(rows.min(0), rows.max(0), np.square(rows).mean(0), rows, len(rows))
        assert want_own_rows(linear(normal(0, 64, 24)), {"x": seen}) == wanted


@pytest.mark.parametrize(("precision", "own_rows"), [("int8", ()), ("int8", {"x"}), ("int4", ())])
def test_what_a_layer_loses_is_what_its_graph_loses(
    tmp_path: Path, precision: str, own_rows: Collection[str]
) -> None:
    weight, x = normal(0, 70, 24), normal(1, 100, 70)
    if precision == "int4":
        x = np.sign(x)  # all inputs count alike, as where nothing was observed
    seen = Observed(x.min(0), x.max(0), np.square(x).mean(0), x, len(x))
    (layer,), made = layers_of(linear(weight)), linear(weight)
    if precision == "int8":
        quantise_int8(made, {"x": Range.of(seen)}, all_layers, own_rows)
    else:
        quantise_int4(made, {}, all_layers)
    wanted = share_lost(result(made, x, tmp_path), x @ weight)
    lost = output_share_lost(layer, precision, seen, bool(own_rows))
    assert lost == pytest.approx(wanted, rel=1e-2)
    assert wanted > 1e-6


def test_other_runtimes_multiply_such_rows_in_floats(tmp_path: Path) -> None:
    weight, x = normal(0, 64, 24), normal(1, 7, 64)
    made = linear(weight)
    quantise_int8(made, {}, all_layers, by_rows={"x"})
    codes, steps = stored_values(made, "w.int8"), stored_values(made, "w.scale")
    make_activations_signed(made)
    assert [each.op_type for each in made.graph] == ["DequantizeLinear", "MatMul"]
    np.testing.assert_allclose(result(made, x, tmp_path), x @ (codes * steps), rtol=1e-5, atol=1e-5)


def restored(made: ir.Model, inputs: int) -> Floats:
    """The weight as it comes back, (inputs, outputs)."""
    codes, zero = (stored_values(made, f"w.{name}").astype(np.float32) for name in ("int4", "zero"))
    assert codes.min() >= -8
    assert codes.max() <= 7
    zero, scale = (
        np.repeat(v, BLOCK, axis=0)[:inputs] for v in (zero, stored_values(made, "w.scale"))
    )
    return (codes - zero) * scale


def in_four_bits(weight: Floats, observed: dict[str, Observed] | None = None) -> ir.Model:
    made = linear(weight)
    quantise_int4(made, observed or {}, lambda layer: True)
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
    plain = block_errors(weight, BlockGrid.unclipped(weight), importance)
    found = block_errors(weight, best_block_grid(weight, importance), importance)
    assert (found <= plain).all()
    assert found.sum() < 0.9 * plain.sum()


def test_plain_rounding_is_off_by_half_a_step_at_most() -> None:
    weight = normal(0, 64, 24)
    grid = BlockGrid.unclipped(weight)
    # One step at most where the zero point was rounded and an end of the span is clipped by that.
    largest = np.square(grid.scale / 2) * (BLOCK - 1) + np.square(grid.scale)
    assert (block_errors(weight, grid, np.ones(64, np.float32)) <= largest).all()


def test_what_one_weight_loses_others_make_good() -> None:
    """Where inputs are alike; the products with them count, and not the weights."""
    weight, rows = normal(0, 96, 40), normal(1, 300, 12) @ normal(2, 12, 96)
    rows += 0.1 * normal(3, 300, 96)
    seen = Observed(rows.min(0), rows.max(0), np.square(rows).mean(0), rows, len(rows))
    nearest, made = (
        np.square(rows @ (restored(in_four_bits(weight, observed), 96) - weight)).mean()
        for observed in ({}, {"x": seen})
    )
    assert made < 0.3 * nearest


def test_inputs_are_rounded_in_the_order_of_their_loudness() -> None:
    """So within a block it means nothing in which order they come."""
    weight, rows = normal(0, BLOCK, 40), normal(1, 300, 12) @ normal(2, 12, BLOCK)
    rows *= np.geomspace(0.2, 5, BLOCK, dtype=np.float32)
    grid = best_block_grid(weight, np.square(rows).mean(0))
    turned = np.random.default_rng(3).permutation(BLOCK)
    codes = compensated_codes(weight, grid, rows)
    made = compensated_codes(weight[turned], grid, rows[:, turned])
    assert (made == codes[turned]).mean() > 0.99
    np.testing.assert_array_equal(codes[-1], block_codes(by_blocks(weight), grid)[0, -1])


def test_loud_rows_count_no_more_than_others() -> None:
    rows = normal(1, 50, 8)
    loud = rows * np.geomspace(1e-3, 1e3, 50, dtype=np.float32)[:, None]
    np.testing.assert_allclose(evened(loud), evened(rows), rtol=1e-4)
    assert not evened(np.zeros((2, 8), np.float32)).any()


def test_strong_inputs_are_rounded_more_closely() -> None:
    weight = normal(0, 32, 200)
    rows = normal(1, 256, 32)
    rows[:, :4] *= 30
    seen = Observed(rows.min(0), rows.max(0), np.square(rows).mean(0), rows, len(rows))
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
    quantise_int4(made, {}, lambda layer: True)
    assert set(made.graph.initializers) == {"w", "b"}


def test_a_row_in_4_bits_gives_the_same_alone_and_among_others(tmp_path: Path) -> None:
    made, x = in_four_bits(normal(0, 64, 24)), normal(1, 7, 64)
    x[0] *= 100
    alone, among = (result(made, rows, tmp_path) for rows in (x[3:4], x))
    np.testing.assert_allclose(alone[0], among[3], atol=1e-5)


def with_outliers() -> ir.Model:
    """A gated layer whose activations have channels far beyond the others."""
    norm, up = 1 + 0.1 * normal(0, 48), normal(2, 48, 40)
    norm[5] *= 30
    up[:, 7] *= 50
    return gated(norm, 0.1 * normal(1, 48, 40), up, normal(3, 40, 24))


def observed(made: ir.Model, x: Floats, folder: Path) -> dict[str, Observed]:
    save_graph(made, folder / "float.onnx")
    with observing(folder / "float.onnx", values_to_observe(made), 256) as session:
        session.run({"x": x})
        return session.take_observed()


def smooth(made: ir.Model, seen: dict[str, Observed]) -> dict[str, Observed]:
    scales = smoothing_scales(made, seen)
    for foldable in list(foldables(made)):
        foldable.fold(scales[str(foldable.value.name)])
    return {name: seen[name].divided(scale) for name, scale in scales.items()}


def test_a_smoothed_graph_computes_the_same(tmp_path: Path) -> None:
    x = normal(4, 64, 48)
    exact = result(with_outliers(), x, tmp_path)
    made = with_outliers()
    scales = smoothing_scales(made, observed(made, x, tmp_path))
    assert set(scales) == {"normed", "inner"}
    assert all(np.ptp(scale) > 0.5 for scale in scales.values())
    smooth(made, observed(made, x, tmp_path))
    np.testing.assert_allclose(
        result(made, x, tmp_path), exact, rtol=1e-5, atol=1e-5 * np.abs(exact).max()
    )


def test_what_calibration_would_have_seen_follows(tmp_path: Path) -> None:
    x, made = normal(4, 64, 48), with_outliers()
    foreseen = smooth(made, observed(made, x, tmp_path))
    for name, seen in observed(made, x, tmp_path).items():
        for field in ("low", "high", "square"):
            np.testing.assert_allclose(
                getattr(foreseen[name], field), getattr(seen, field), rtol=1e-4
            )


def test_rounding_hurts_less_after_smoothing(tmp_path: Path) -> None:
    x = normal(4, 64, 48)
    exact = result(with_outliers(), x, tmp_path)
    errors = []
    for smoothing in (False, True):
        made = with_outliers()
        seen = observed(made, x, tmp_path)
        seen = smooth(made, seen) if smoothing else seen
        quantise_int8(made, {n: Range.of(s) for n, s in seen.items()}, lambda layer: True)
        errors.append(np.abs(result(made, x, tmp_path) - exact).mean())
    assert errors[1] < 0.5 * errors[0]


def with_a_loud_row() -> tuple[ir.Model, Floats]:
    """A gated layer and rows, the first of which is a thousand times as loud in one channel."""
    gate, up, x = 0.1 * normal(1, 48, 40), normal(2, 48, 40), normal(4, 64, 48)
    up[:, 7] *= 50
    gate[5], up[5], x[:, 5] = 0, 0, 0
    gate[5, 3], up[5, 3], x[0, 5] = 3, 30, 40
    return gated(np.ones(48, np.float32), gate, up, normal(3, 40, 24)), x


def test_a_loud_row_does_not_choose_the_smoothing_for_all(tmp_path: Path) -> None:
    made, x = with_a_loud_row()
    exact = result(made, x, tmp_path)
    errors = []
    for smoothing in (False, True):
        made, _ = with_a_loud_row()
        seen = observed(made, x, tmp_path)
        seen = smooth(made, seen) if smoothing else seen
        ranges = {n: Range.of(s) for n, s in seen.items()}
        quantise_int8(made, ranges, lambda layer: True, by_rows=seen)
        errors.append(np.abs(result(made, x, tmp_path) - exact)[1:].mean())
    assert errors[1] < 1.5 * errors[0]


def test_channels_without_signal_or_weight_are_left_alone(tmp_path: Path) -> None:
    made = gated(
        np.concatenate([np.zeros(1, np.float32), normal(0, 47)]),
        normal(1, 48, 40),
        np.concatenate([np.zeros((48, 1), np.float32), normal(2, 48, 39)], 1),
        normal(3, 40, 24),
    )
    scales = smoothing_scales(made, observed(made, normal(4, 64, 48), tmp_path))
    assert all(np.isfinite(scale).all() and (scale > 0).all() for scale in scales.values())
    assert scales["normed"][0] == scales["inner"][0] == 1.0


@pytest.mark.parametrize("second_reader", ["Relu", "MatMul"])
def test_an_activation_with_another_reader_is_not_scaled(second_reader: str) -> None:
    x, stored = value("x", ("n", 8)), weights(norm=normal(0, 8), w=normal(1, 8, 8))
    nodes = [node("Mul", [stored["norm"], x], "normed")]
    nodes.append(node("MatMul", [nodes[0].outputs[0], stored["w"]], "made"))
    other = [nodes[0].outputs[0], x][: 1 if second_reader == "Relu" else 2]
    nodes.append(node(second_reader, other, "other"))
    nodes.append(node("Add", [nodes[1].outputs[0], nodes[2].outputs[0]], "y"))
    assert list(foldables(model(x, nodes, stored, 2))) == []
