"""Move outlier channels from activations into weights, where rounding hurts less.

A linear layer's input is divided by one number a channel and the rows of its weight multiplied by
it: what the graph computes stays the same. The division costs nothing, since it is folded into what
makes the input: a norm's weight, or the columns of the layer behind one factor of a gated product.
After "SmoothQuant" (Xiao et al. 2023, equation 4).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from meiqa.export.calibration import Observed
from meiqa.export.int8 import Range, layer_steps
from meiqa.export.layers import Layer, layers_of, scaled

Floats = NDArray[np.float32]
STRENGTHS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Exponents that are tried besides no smoothing at all; 1 moves an outlier whole."""
COMPARED_ROWS = 256


@dataclass(frozen=True)
class Foldable:
    """An activation whose channels can be scaled.

    Attributes:
        value: the activation.
        makers: initialisers whose last axis counts its channels and that it is proportional to.
        layers: the linear layers that read it; nobody else does.
    """

    value: ir.Value
    makers: Sequence[ir.Value]
    layers: Sequence[Layer]


def foldables(model: ir.Model) -> Iterator[Foldable]:
    """All activations of a graph whose channels can be scaled for nothing."""
    layers = layers_of(model)
    by_node = {layer.node: layer for layer in layers if not layer.is_convolution}
    for value in dict.fromkeys(layer.input for layer in by_node.values()):
        readers = list(value.consumers())
        if value.is_graph_output() or any(reader not in by_node for reader in readers):
            continue
        makers = makers_of(value, by_node)
        stored = [*makers, *(by_node[reader].weight for reader in readers)]
        if makers and all(len(v.uses()) == 1 for v in stored):
            yield Foldable(value, makers, [by_node[reader] for reader in readers])


def makers_of(value: ir.Value, layers: Mapping[ir.Node, Layer]) -> list[ir.Value]:
    """Initialisers through which an activation's channels can be scaled, if there is a way."""
    producer = value.producer()
    if producer is None:
        return []
    inputs = [given for given in producer.inputs if given is not None]
    if producer.op_type == "LayerNormalization":
        return inputs[1:] if all(given.is_initializer() for given in inputs[1:]) else []
    if producer.op_type != "Mul":
        return []
    for factor in inputs:
        if factor.is_initializer():
            return [factor] if factor.shape is not None and len(factor.shape) == 1 else []
    return next((made for factor in inputs if (made := columns_of(factor, layers))), [])


def columns_of(factor: ir.Value, layers: Mapping[ir.Node, Layer]) -> list[ir.Value]:
    """Weight and bias of the linear layer that makes a value, if nobody else reads it."""
    node = factor.producer()
    if node is None or len(factor.uses()) != 1 or factor.is_graph_output():
        return []
    if node in layers:
        return [layers[node].weight]
    if node.op_type != "Add":
        return []
    stored = [given for given in node.inputs if given is not None and given.is_initializer()]
    summed = [given for given in node.inputs if given is not None and not given.is_initializer()]
    if len(stored) != 1 or len(summed) != 1:
        return []
    weights = columns_of(summed[0], layers)
    return [*weights, *stored] if weights else []


def smoothing_scales(model: ir.Model, observed: Mapping[str, Observed]) -> dict[str, Floats]:
    """How to smooth a float graph: by activation, the scales (C,) to `fold`.

    Args:
        observed: what calibration saw of the activations; others are left alone.
    """
    return {
        str(foldable.value.name): best_scales(foldable, observed[str(foldable.value.name)])
        for foldable in foldables(model)
        if str(foldable.value.name) in observed
    }


def fold(foldable: Foldable, scales: Floats) -> None:
    """Divide an activation's channels by numbers (C,) and multiply its readers' rows by them."""
    for maker in foldable.makers:
        scaled(maker, (1.0 / scales).astype(np.float32))
    for layer in foldable.layers:
        scaled(layer.weight, scales[:, None])


def best_scales(foldable: Foldable, seen: Observed) -> Floats:
    """The scales (C,) with the least error of the layers' outputs over the sample."""
    weights = np.concatenate([layer.values() for layer in foldable.layers], 1)
    largest = np.abs(weights).max(1)
    candidates = [np.ones_like(largest)]
    candidates += [scales_of(seen.magnitude, largest, strength) for strength in STRENGTHS]
    errors = [
        output_error(seen.divided(scales), weights * scales[:, None]) for scales in candidates
    ]
    best: Floats = candidates[int(np.argmin(errors))]
    return best


def scales_of(activation: Floats, weight: Floats, strength: float) -> Floats:
    """Scales (C,) from each channel's largest activation and weight, their mean logarithm 0."""
    known = (activation > 0) & (weight > 0)
    logs = np.zeros_like(activation)
    logs[known] = strength * np.log(activation[known]) - (1 - strength) * np.log(weight[known])
    logs[known] -= logs[known].mean() if known.any() else 0.0
    scales: Floats = np.exp(logs).astype(np.float32)
    return scales


def output_error(seen: Observed, weight: Floats) -> float:
    """Squared error of a layer's output when its input and its weight are rounded to 8 bits."""
    rows = seen.rows[:COMPARED_ROWS]
    whole = Range.between(float(seen.low.min()), float(seen.high.max()))
    step = layer_steps(1, lambda: 0.0, weight)
    product = whole.rounded(rows) @ (np.rint(weight / step) * step)
    return float(np.square(product - rows @ weight).mean(0).sum())
