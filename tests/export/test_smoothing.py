"""Smoothing changes nothing in float and a lot after rounding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from meiqa.export.calibration import Observed, observing
from meiqa.export.graphs import save_graph
from meiqa.export.int8 import quantised, values_to_observe, whole_range
from meiqa.export.smoothing import fold, foldables, smoothing_scales
from tests.export.small_graphs import Floats, gated, model, node, normal, result, value, weights


def with_outliers() -> ir.Model:
    """A gated layer whose activations have channels far beyond the others."""
    norm, up = 1 + 0.1 * normal(0, 48), normal(2, 48, 40)
    norm[5] *= 30
    up[:, 7] *= 50
    return gated(norm, 0.1 * normal(1, 48, 40), up, normal(3, 40, 24))


def observed(made: ir.Model, x: Floats, folder: Path) -> dict[str, Observed]:
    save_graph(made, folder / "float.onnx")
    with observing(folder / "float.onnx", values_to_observe(made)) as session:
        session.run({"x": x})
        return session.observed()


def smooth(made: ir.Model, seen: dict[str, Observed]) -> dict[str, Observed]:
    scales = smoothing_scales(made, seen)
    for foldable in list(foldables(made)):
        fold(foldable, scales[str(foldable.value.name)])
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
        quantised(made, {n: whole_range(s) for n, s in seen.items()}, lambda layer: True)
        errors.append(np.abs(result(made, x, tmp_path) - exact).mean())
    assert errors[1] < 0.5 * errors[0]


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
