"""Static INT8 by Q/DQ: signed weights per output channel, unsigned activations per tensor.

The scale of an activation is fixed beforehand, from what calibration observed, so a photo's result
never depends on what else is in the batch. Products of two activations, which are attention's, stay
in float: besides losing accuracy, ONNX Runtime's quantised kernel leaves its output unset where
nothing is summed, as over an empty prefix.

Runtimes fuse a convolution into integer arithmetic only if its result is quantised as well; a
linear layer's result stays in float.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from meiqa.export.calibration import Observed
from meiqa.export.layers import (
    Layer,
    constant,
    derived,
    drop_unread,
    followed_by,
    layers_of,
    read,
)

Floats = NDArray[np.float32]
Steps = Callable[[Floats], Floats]
LEVELS, LARGEST, LARGEST_BIAS = 255, 127, 1 << 30


@dataclass(frozen=True)
class Range:
    """Scale and zero point of an unsigned 8-bit activation."""

    scale: np.float32
    zero_point: np.uint8

    @classmethod
    def between(cls, low: float, high: float) -> Range:
        """The range that holds 0 and all values from `low` to `high`; 0 is exact."""
        low, high = min(0.0, low), max(0.0, high)
        scale = np.float32((high - low) / LEVELS or 1.0)
        return cls(scale, np.uint8(np.clip(np.rint(-low / scale), 0, LEVELS)))

    def rounded(self, values: Floats) -> Floats:
        """Values as they come back."""
        zero = np.float32(self.zero_point)
        codes = np.clip(np.rint(values / self.scale) + zero, 0, LEVELS)
        rounded: Floats = (codes - zero) * self.scale
        return rounded


def whole_range(observed: Observed) -> Range:
    """From the smallest to the largest value seen."""
    return Range.between(float(observed.low.min()), float(observed.high.max()))


def values_to_observe(model: ir.Model) -> dict[str, int]:
    """Names of the activations that quantising a graph needs to know, with their channel axes."""
    axes = {}
    for layer in layers_of(model):
        axes[str(layer.input.name)] = 1 if layer.is_convolution else -1
        if layer.is_convolution:
            axes[str(result_of(layer).name)] = 1
    return axes


def result_of(layer: Layer) -> ir.Value:
    """What a convolution gives to others: its output, after a ReLU or ReLU6 that alone reads it."""
    output = layer.node.outputs[0]
    readers = list(output.consumers())
    if (
        len(readers) == 1
        and readers[0].op_type in ("Relu", "Clip")
        and not output.is_graph_output()
    ):
        return readers[0].outputs[0]
    return output


def quantised(
    model: ir.Model, ranges: Mapping[str, Range], chosen: Callable[[Layer], bool]
) -> None:
    """Quantise layers of a float graph in place; its weights are only read when it is saved.

    Args:
        ranges: by the names of `values_to_observe`.
        chosen: which layers.
    """
    graph = model.graph
    # All are found first: rewriting one changes what the next one reads.
    wanted = [(la, la.input, result_of(la)) for la in layers_of(model) if chosen(la)]
    for layer, source, result in wanted:
        at_input = ranges[str(source.name)]
        steps = partial(layer_steps, layer.output_axis, bias_limit(layer, at_input))
        if layer.bias is not None:
            bias = bias_in_steps(graph, layer, layer.bias, steps, at_input)
            layer.node.replace_input_with(2, bias)
        layer.node.replace_input_with(1, weight_in_steps(graph, layer, steps))
        layer.node.replace_input_with(0, through_bytes(graph, source, at_input))
        if layer.is_convolution:
            requantise(graph, result, ranges[str(result.name)])
    drop_unread(graph)


def bias_limit(layer: Layer, at_input: Range) -> Callable[[], Floats | float]:
    """Reads the smallest steps (C,) in which a layer's bias still fits into its integer."""
    tensor = None if layer.bias is None else layer.bias.const_value

    def smallest() -> Floats | float:
        return 0.0 if tensor is None else np.abs(read(tensor)) / (at_input.scale * LARGEST_BIAS)

    return smallest


def layer_steps(axis: int, smallest: Callable[[], Floats | float], weight: Floats) -> Floats:
    """Step (C,) of each output channel of a weight: `LARGEST` of them are its largest value."""
    largest = np.abs(weight).max(axis=tuple(i for i in range(weight.ndim) if i != axis))
    steps = np.maximum(largest / LARGEST, smallest())
    return np.where(steps > 0, steps, 1.0).astype(np.float32)


def weight_in_steps(graph: ir.Graph, layer: Layer, steps: Steps) -> ir.Value:
    """The layer's weight as signed bytes, made float again where it is used."""
    axis, width = layer.output_axis, layer.shape[layer.output_axis]

    def whole(weight: Floats) -> NDArray[np.int8]:
        step = np.expand_dims(steps(weight), [i for i in range(weight.ndim) if i != axis])
        codes: NDArray[np.int8] = np.rint(weight / step).astype(np.int8)
        return codes

    scale = derived(graph, layer.weight, "scale", ir.DataType.FLOAT, (width,), steps)
    codes = derived(graph, layer.weight, "int8", ir.DataType.INT8, layer.shape, whole)
    zero = constant(graph, f"{layer.name}.zero", np.zeros(width, np.int8))
    return dequantised(graph, codes, scale, zero, axis)


def bias_in_steps(
    graph: ir.Graph, layer: Layer, bias: ir.Value, steps: Steps, at_input: Range
) -> ir.Value:
    """A convolution's bias in the steps of its sums."""
    width, weight = layer.shape[0], layer.weight.const_value

    def sum_steps(_: Floats) -> Floats:
        return steps(read(weight)) * at_input.scale

    def whole(values: Floats) -> NDArray[np.int32]:
        exact = values.astype(np.float64) / sum_steps(values)
        codes: NDArray[np.int32] = np.rint(exact).astype(np.int32)
        return codes

    scale = derived(graph, bias, "scale", ir.DataType.FLOAT, (width,), sum_steps)
    codes = derived(graph, bias, "int32", ir.DataType.INT32, (width,), whole)
    zero = constant(graph, f"{bias.name}.zero", np.zeros(width, np.int32))
    return dequantised(graph, codes, scale, zero, 0)


def dequantised(
    graph: ir.Graph, codes: ir.Value, scale: ir.Value, zero: ir.Value, axis: int
) -> ir.Value:
    """Stored integers as floats."""
    return followed_by(
        graph,
        codes,
        "float",
        lambda value: ir.node("DequantizeLinear", [value, scale, zero], {"axis": axis}),
    )


def through_bytes(graph: ir.Graph, value: ir.Value, at: Range) -> ir.Value:
    """An activation rounded to unsigned bytes and back, once for all who read it so."""
    scale = constant(graph, f"{value.name}.scale", np.array(at.scale))
    zero = constant(graph, f"{value.name}.zero", np.array(at.zero_point))
    codes = followed_by(
        graph, value, "uint8", lambda v: ir.node("QuantizeLinear", [v, scale, zero])
    )
    return followed_by(
        graph, codes, "float", lambda v: ir.node("DequantizeLinear", [v, scale, zero])
    )


def requantise(graph: ir.Graph, result: ir.Value, at: Range) -> None:
    """Make all who read a convolution's result read it through bytes."""
    readers = [(node, index) for node, index in result.uses() if node.op_type != "QuantizeLinear"]
    for node, index in readers:
        node.replace_input_with(index, through_bytes(graph, result, at))
