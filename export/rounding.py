"""Weights in fewer bits: static INT8 by Q/DQ after smoothing, and 4 bits in blocks.

INT8: signed weights with a scale a channel, unsigned activations with one a tensor. The scale of
an activation is fixed beforehand, from what calibration observed, so a photo's result never depends
on what else is in the batch. Where a few tokens are far louder than all others, as in the gated
products of trained decoders, a fixed scale leaves the others few codes; there each row has its own,
computed in the graph from nothing but the row. Products of two activations, which are attention's,
stay in float: ONNX Runtime's quantised kernel leaves its output unset where nothing is summed, as
over an empty prefix. Runtimes fuse a convolution into integer arithmetic only if its result is
quantised as well.

Smoothing (after Xiao et al. 2023, "SmoothQuant", equation 4) moves outlier channels from
activations into weights, where rounding hurts less: a linear layer's input is divided by one number
a channel and the rows of its weight multiplied by it. The division is folded into what makes the
input: a norm's weight, or the columns of the layer behind one factor of a gated product.

INT4: blocks along the input, a scale and a zero point for each block and output channel;
activations stay in float.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from meiqa.errors import PackageCorrupted
from meiqa.export.layers import (
    Change,
    Layer,
    cast,
    constant,
    derived,
    drop_unread,
    followed_by,
    layers_of,
    read,
    scale,
)
from meiqa.kernels.decoder import MIDDLE

Floats = NDArray[np.float32]
Chosen = Callable[[Layer], bool]

LEVELS, LARGEST_CODE, LARGEST_BIAS = 255, 127, 1 << 30
BY_ROWS, LEAST_LARGEST = "MatMulInteger", 1e-30
WORTH_OWN_ROWS = 4.0
STRENGTHS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Smoothing exponents tried besides no smoothing at all; 1 moves an outlier whole."""
COMPARED_ROWS = 256
BLOCK = 32
SMALLEST_INT4, LARGEST_INT4 = -8, 7
DAMPING = 0.01
CLIPS = np.linspace(0.95, 0.65, 7, dtype=np.float32)
"""Shares of a block's span that are tried as what the outermost codes stand for: clipping a few
weights is worth it where the others get finer steps."""


@dataclass(frozen=True, eq=False)
class Observed:
    """One value of a graph over all calls of calibration, its channels apart.

    Attributes:
        low, high: (C,) smallest and largest value of each channel.
        square: (C,) mean square of each channel.
        rows: (n, C) random tokens or pixels, of so many seen.
    """

    low: Floats
    high: Floats
    square: NDArray[np.float64]
    rows: Floats
    seen: int

    @property
    def magnitude(self) -> Floats:
        """(C,) largest absolute value of each channel."""
        return np.maximum(np.abs(self.low), np.abs(self.high))

    def evened(self) -> Observed:
        """Give the sample alone, each row as loud as any other."""
        rows = evened(self.rows)
        squares = np.square(rows, dtype=np.float64).mean(0)
        return replace(self, low=rows.min(0), high=rows.max(0), square=squares, rows=rows)

    def divided(self, scales: Floats) -> Observed:
        """Divide each channel by a positive number (C,)."""
        return replace(
            self,
            low=self.low / scales,
            high=self.high / scales,
            square=self.square / np.square(scales, dtype=np.float64),
            rows=self.rows / scales,
        )


@dataclass(frozen=True)
class Range:
    """Scale and zero point of an unsigned 8-bit activation."""

    scale: np.float32
    zero_point: np.uint8

    @classmethod
    def between(cls, low: float, high: float) -> Range:
        """Hold 0, which is exact, and all values from `low` to `high`."""
        low, high = min(0.0, low), max(0.0, high)
        step = np.float32((high - low) / LEVELS or 1.0)
        return cls(step, np.uint8(np.clip(np.rint(-low / step), 0, LEVELS)))

    @classmethod
    def of(cls, observed: Observed) -> Range:
        return cls.between(float(observed.low.min()), float(observed.high.max()))

    def rounded(self, values: Floats) -> Floats:
        """Round values as they come back."""
        zero = np.float32(self.zero_point)
        codes: Floats = np.clip(np.rint(values / self.scale) + zero, 0, LEVELS)
        return (codes - zero) * self.scale


def values_to_observe(model: ir.Model) -> dict[str, int]:
    """Name the activations whose ranges INT8 needs, with their channel axes."""
    axes = {}
    for layer in layers_of(model):
        axes[str(layer.input.name)] = 1 if layer.is_convolution else -1
        if layer.is_convolution:
            axes[str(result_of(layer).name)] = 1
    return axes


def result_of(layer: Layer) -> ir.Value:
    """Find what a convolution gives to others: its output, after a ReLU that alone reads it."""
    output = layer.node.outputs[0]
    readers = list(output.consumers())
    clipped = len(readers) == 1 and readers[0].op_type in ("Relu", "Clip")
    return readers[0].outputs[0] if clipped and not output.is_graph_output() else output


def quantise_int8(
    model: ir.Model, ranges: Mapping[str, Range], chosen: Chosen, by_rows: Collection[str] = ()
) -> None:
    """Quantise layers of a float graph in place; its weights are only read when it is saved.

    Ranges go by the names of `values_to_observe`; activations `by_rows` need none.
    """
    graph = model.graph
    # All are found first: rewriting one changes what the next one reads.
    wanted = [(la, la.input, result_of(la)) for la in layers_of(model) if chosen(la)]
    for layer, source, result in wanted:
        if source.name in by_rows:
            multiply_by_rows(graph, layer)
            continue
        store_in_bytes(graph, layer, ranges[str(source.name)].scale)
        layer.node.replace_input_with(0, through_bytes(graph, source, ranges[str(source.name)]))
        if layer.is_convolution:
            at_result = ranges[str(result.name)]
            for node, index in [use for use in result.uses() if use[0].op_type != "QuantizeLinear"]:
                node.replace_input_with(index, through_bytes(graph, result, at_result))
    drop_unread(graph)


def store_in_bytes(graph: ir.Graph, layer: Layer, input_scale: np.float32) -> None:
    """Store a layer's weight as signed bytes, and a convolution's bias in the steps of its sums."""
    axis = 0 if layer.is_convolution else 1
    width = layer.shape[axis]
    weight = layer.weight.const_value
    bias = None if layer.bias is None else layer.bias.const_value

    def steps(values: Floats) -> Floats:
        # Wide enough for the bias to fit into its integer.
        least = 0.0 if bias is None else np.abs(read(bias)) / (input_scale * LARGEST_BIAS)
        return channel_steps(values, axis, least)

    def codes(values: Floats) -> NDArray[np.float32]:
        other = [i for i in range(values.ndim) if i != axis]
        return np.rint(values / np.expand_dims(steps(values), other))

    def sum_steps(_: Floats) -> Floats:
        return steps(read(weight)) * input_scale

    def bias_codes(values: Floats) -> NDArray[np.float64]:
        return np.rint(values.astype(np.float64) / sum_steps(values))

    def stored(source: ir.Value, kind: str, whole: Change, scales: Change) -> ir.Value:
        shape, along = (layer.shape, axis) if source is layer.weight else ((width,), 0)
        dtype = ir.DataType[kind.upper()]
        scale = derived(source, "scale", ir.DataType.FLOAT, (width,), scales)
        code = derived(source, kind, dtype, shape, lambda values: whole(values).astype(kind))
        zero = ir.tensor(np.zeros(width, kind), name=f"{source.name}.zero")
        return dequantised([code, scale, constant(graph, zero)], axis=along)

    if layer.bias is not None:
        layer.node.replace_input_with(2, stored(layer.bias, "int32", bias_codes, sum_steps))
    layer.node.replace_input_with(1, stored(layer.weight, "int8", codes, steps))


def multiply_by_rows(graph: ir.Graph, layer: Layer) -> None:
    """Multiply a linear layer's input as bytes with a scale for each of its rows, in place."""
    codes, step = rows_in_bytes(graph, layer.input)
    shape = layer.shape
    weight = derived(
        layer.weight,
        "int8",
        ir.DataType.INT8,
        shape,
        lambda values: np.rint(values / channel_steps(values, 1)).astype(np.int8),
    )
    by = derived(
        layer.weight,
        "scale",
        ir.DataType.FLOAT,
        shape[1:],
        lambda values: channel_steps(values, 1),
    )
    product = ir.node(BY_ROWS, [codes, weight, middle(graph)], name=layer.node.name)
    chain = [product, cast(product.outputs[0], "FLOAT")]
    for factor in (step, by):
        chain.append(ir.node("Mul", [chain[-1].outputs[0], factor]))
    ir.convenience.replace_nodes_and_values(
        graph, layer.node, [layer.node], chain, [layer.node.outputs[0]], [chain[-1].outputs[0]]
    )


def rows_in_bytes(graph: ir.Graph, value: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Round the rows of an activation around the middle code, and give what a step of each is."""

    def number(name: str, at: float) -> ir.Value:
        return constant(graph, ir.tensor(np.array(at, np.float32), name=name))

    def then(before: ir.Value, name: str, op: str, *others: ir.Value) -> ir.Value:
        return followed_by(before, name, lambda v: ir.node(op, [v, *others]))

    most = number("largest_code", LARGEST_CODE)
    last = constant(graph, ir.tensor(np.array([-1], np.int64), name="last_axis"))
    largest = then(then(value, "size", "Abs"), "largest", "ReduceMax", last)
    largest = then(largest, "bounded", "Max", number("least_largest", LEAST_LARGEST))
    step = then(largest, "step", "Div", most)
    steps = followed_by(largest, "steps", lambda v: ir.node("Div", [most, v]))
    scaled = followed_by(steps, "in_steps", lambda v: ir.node("Mul", [value, v]))
    whole = then(then(scaled, "whole", "Round"), "codes", "Add", number("middle_code", MIDDLE))
    return followed_by(whole, "uint8", lambda v: cast(v, "UINT8")), step


def middle(graph: ir.Graph) -> ir.Value:
    """Give the code that stands for 0 where rows are rounded by themselves."""
    return constant(graph, ir.tensor(np.array(MIDDLE, np.uint8), name="middle"))


def want_own_rows(model: ir.Model, observed: Mapping[str, Observed]) -> set[str]:
    """Name the activations whose rows are rounded much better by themselves.

    They are gated products, whose loudest tokens need not be among those observed, and others of
    which a fixed range makes `WORTH_OWN_ROWS` times the squared error, that of each row as a share
    of the row's own squares: a loud row would outweigh all others.
    """
    found = set()
    for layer in layers_of(model):
        name = str(layer.input.name)
        if layer.is_convolution or name not in observed or name in found:
            continue
        rows = observed[name].rows
        fixed, own = Range.of(observed[name]).rounded(rows), rounded_by_rows(rows)
        much_lost = share_lost(fixed, rows) > WORTH_OWN_ROWS * share_lost(own, rows)
        if much_lost or is_gated(layer.input):
            found.add(name)
    return found


def is_gated(value: ir.Value) -> bool:
    """Tell whether an activation is the product of two others, in whatever shape."""
    node = value.producer()
    if node is not None and node.op_type == "Reshape" and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return (
        node is not None
        and node.op_type == "Mul"
        and not any(given is None or given.is_initializer() for given in node.inputs)
    )


def share_lost(made: Floats, rows: Floats) -> float:
    """Give the mean squared error of rows, as a share of each row's squares."""
    squares = np.square(rows, dtype=np.float64).sum(1)
    lost = np.square(made - rows, dtype=np.float64).sum(1)
    return float((lost[squares > 0] / squares[squares > 0]).sum()) / len(rows)


def rounded_by_rows(rows: Floats) -> Floats:
    """Round rows as they come back, each by itself."""
    step = np.maximum(np.abs(rows).max(1, keepdims=True), LEAST_LARGEST) / np.float32(LARGEST_CODE)
    rounded: Floats = np.rint(rows / step) * step
    return rounded


def channel_steps(weight: Floats, axis: int, least: Floats | float = 0.0) -> Floats:
    """Choose steps (C,) of output channels: `LARGEST_CODE` of them are the largest weight."""
    largest = np.abs(weight).max(axis=tuple(i for i in range(weight.ndim) if i != axis))
    steps = np.maximum(largest / LARGEST_CODE, least)
    return np.where(steps > 0, steps, 1.0).astype(np.float32)


def through_bytes(graph: ir.Graph, value: ir.Value, at: Range) -> ir.Value:
    """Round an activation to unsigned bytes and back, once for all who read it so."""
    step = constant(graph, ir.tensor(np.array(at.scale), name=f"{value.name}.scale"))
    zero = constant(graph, ir.tensor(np.array(at.zero_point), name=f"{value.name}.zero"))
    codes = followed_by(value, "uint8", lambda v: ir.node("QuantizeLinear", [v, step, zero]))
    return dequantised([codes, step, zero])


def dequantised(stored: Sequence[ir.Value], **attributes: int) -> ir.Value:
    """Make floats of integers, their scale and, if there is one, their zero point."""
    codes, *rest = stored
    return followed_by(
        codes, "float", lambda v: ir.node("DequantizeLinear", [v, *rest], attributes)
    )


@dataclass(frozen=True)
class Foldable:
    """An activation whose channels can be scaled for nothing.

    Attributes:
        makers: initialisers whose last axis counts its channels and that it is proportional to.
        layers: the linear layers that read it; nobody else does.
    """

    value: ir.Value
    makers: Sequence[ir.Value]
    layers: Sequence[Layer]

    def fold(self, scales: Floats) -> None:
        """Divide the activation's channels by numbers (C,), multiply its readers' rows by them."""
        for maker in self.makers:
            scale(maker, (1.0 / scales).astype(np.float32))
        for layer in self.layers:
            scale(layer.weight, scales[:, None])


def foldables(model: ir.Model) -> Iterator[Foldable]:
    """Find all activations of a graph whose channels can be scaled for nothing."""
    by_node = {layer.node: layer for layer in layers_of(model) if not layer.is_convolution}
    for value in dict.fromkeys(layer.input for layer in by_node.values()):
        readers = list(value.consumers())
        if value.is_graph_output() or any(reader not in by_node for reader in readers):
            continue
        makers = makers_of(value, by_node)
        stored = [*makers, *(by_node[reader].weight for reader in readers)]
        if makers and all(len(v.uses()) == 1 for v in stored):
            yield Foldable(value, makers, [by_node[reader] for reader in readers])


def makers_of(value: ir.Value, layers: Mapping[ir.Node, Layer]) -> list[ir.Value]:
    """Find initialisers through which an activation's channels can be scaled, if there are any."""
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
    """Find weight and bias of the linear layer that makes a value, if nobody else reads it."""
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
    """Choose by activation the scales (C,) to fold; those not observed are left alone."""
    by_name = {str(foldable.value.name): foldable for foldable in foldables(model)}
    return {name: best_scales(f, observed[name]) for name, f in by_name.items() if name in observed}


def best_scales(foldable: Foldable, seen: Observed) -> Floats:
    """Choose the scales (C,) with the least error of the layers' outputs over the sample.

    Candidates balance each channel's largest activation and weight; their mean logarithm is 0. Of
    gated products, whose rows are rounded by themselves, every row counts alike: the loudest would
    choose for all.
    """
    by_rows = is_gated(foldable.value)
    seen = seen.evened() if by_rows else seen
    weights = np.concatenate([read(layer.weight.const_value) for layer in foldable.layers], 1)
    activation, weight = seen.magnitude, np.abs(weights).max(1)
    known = (activation > 0) & (weight > 0)
    candidates = [np.ones_like(weight)]
    for strength in STRENGTHS:
        logs = np.zeros_like(activation)
        logs[known] = strength * np.log(activation[known]) - (1 - strength) * np.log(weight[known])
        logs[known] -= logs[known].mean() if known.any() else 0.0
        candidates.append(np.exp(logs).astype(np.float32))
    errors = [output_error(seen.divided(s), weights * s[:, None], by_rows) for s in candidates]
    best: Floats = candidates[int(np.argmin(errors))]
    return best


def output_error(seen: Observed, weight: Floats, by_rows: bool) -> float:
    """Measure a layer's squared error when its input and its weight are rounded to 8 bits."""
    exact = seen.rows[:COMPARED_ROWS] @ weight
    return float(np.square(product_in_bytes(seen, weight, by_rows) - exact).mean(0).sum())


def product_in_bytes(seen: Observed, weight: Floats, by_rows: bool) -> Floats:
    """Multiply the sample by a layer's weight, both rounded to 8 bits."""
    rows, step = seen.rows[:COMPARED_ROWS], channel_steps(weight, 1)
    made = rounded_by_rows(rows) if by_rows else Range.of(seen).rounded(rows)
    product: Floats = made @ (np.rint(weight / step) * step)
    return product


def output_share_lost(layer: Layer, precision: str, seen: Observed, by_rows: bool) -> float:
    """Give the share of a linear layer's output that "int8" or "int4" loses over the sample.

    In 4 bits weights are rounded to the nearest: compensating takes minutes, and layers that lose
    much before it do so behind it.
    """
    weight, rows = read(layer.weight.const_value), seen.rows[:COMPARED_ROWS]
    if precision == "int8":
        made = product_in_bytes(seen, weight, by_rows)
    else:
        grid = best_block_grid(weight, importance(seen))
        blocks = rounded_blocks(by_blocks(weight), grid)
        made = rows @ blocks.reshape(-1, weight.shape[1])[: len(weight)]
    return share_lost(made, rows @ weight)


def quantise_int4(model: ir.Model, observed: Mapping[str, Observed], chosen: Chosen) -> None:
    """Store the weights of linear layers as 4-bit blocks, in place; they are read when saved.

    The strength of observed inputs weighs rounding errors; all channels count alike for others.
    """
    for layer in layers_of(model):
        if not layer.is_convolution and chosen(layer):
            seen = observed.get(str(layer.input.name))
            layer.node.replace_input_with(1, weight_in_blocks(layer, seen))
    drop_unread(model.graph)


def store_in_blocks(model: ir.Model, chosen: Chosen) -> None:
    """Store the weights of linear layers as bytes with a step for each block, in place.

    Their inputs stay in float, so what is lost is next to nothing.
    """
    for layer in layers_of(model):
        if not layer.is_convolution and chosen(layer):
            layer.node.replace_input_with(1, weight_in_byte_blocks(layer))
    drop_unread(model.graph)


def weight_in_byte_blocks(layer: Layer) -> ir.Value:
    """Store a layer's weight as signed bytes, made float again where it is used."""
    inputs, outputs = layer.shape

    def steps(weight: Floats) -> Floats:
        largest = np.abs(by_blocks(weight)).max(1) / LARGEST_CODE
        return np.where(largest > 0, largest, 1.0).astype(np.float32)

    def codes(weight: Floats) -> NDArray[np.int8]:
        whole = np.rint(by_blocks(weight) / steps(weight)[:, None]).astype(np.int8)
        rounded: NDArray[np.int8] = whole.reshape(-1, outputs)[:inputs]
        return rounded

    blocks = -(-inputs // BLOCK), outputs
    step = derived(layer.weight, "scale", ir.DataType.FLOAT, blocks, steps)
    code = derived(layer.weight, "int8", ir.DataType.INT8, layer.shape, codes)
    return dequantised([code, step], axis=0, block_size=BLOCK)


def importance(seen: Observed) -> Floats:
    """Weigh the errors of each input (C,) where every observed row counts alike."""
    squares: Floats = np.square(evened(seen.rows)).mean(0)
    return squares


def evened(rows: Floats) -> Floats:
    """Give rows (n, C) the same length, so that loud ones don't count for all."""
    lengths = np.sqrt(np.square(rows).mean(1, keepdims=True))
    return (rows / np.where(lengths > 0, lengths, 1.0)).astype(np.float32)


def weight_in_blocks(layer: Layer, seen: Observed | None) -> ir.Value:
    """Store a layer's weight as 4-bit integers, made float again where it is used.

    By what was `seen` of its input errors are judged; without, all inputs count alike.
    """
    inputs, outputs = layer.shape
    blocks = -(-inputs // BLOCK)

    def grid(weight: Floats) -> BlockGrid:
        alike = np.ones(inputs, np.float32)
        return best_block_grid(weight, alike if seen is None else importance(seen))

    def scales(weight: Floats) -> Floats:
        return grid(weight).scale

    def zeros(weight: Floats) -> NDArray[np.int8]:
        return grid(weight).zero.astype(np.int8)

    def codes(weight: Floats) -> NDArray[np.int8]:
        if seen is not None:
            return compensated_codes(weight, grid(weight), evened(seen.rows))
        nearest = block_codes(by_blocks(weight), grid(weight)).astype(np.int8)
        rounded: NDArray[np.int8] = nearest.reshape(-1, outputs)[:inputs]
        return rounded

    step = derived(layer.weight, "scale", ir.DataType.FLOAT, (blocks, outputs), scales)
    zero = derived(layer.weight, "zero", ir.DataType.INT4, (blocks, outputs), zeros)
    code = derived(layer.weight, "int4", ir.DataType.INT4, layer.shape, codes)
    return dequantised([code, step, zero], axis=0, block_size=BLOCK)


def by_blocks(weight: Floats) -> Floats:
    """Cut (inputs, outputs) into (blocks, BLOCK, outputs), the last one filled with zeros."""
    filled = np.pad(weight, ((0, -len(weight) % BLOCK), (0, 0)))
    return filled.reshape(-1, BLOCK, weight.shape[1])


class BlockGrid(NamedTuple):
    """The steps (blocks, outputs) of 4-bit weights, and the codes that stand for 0."""

    scale: Floats
    zero: Floats

    @classmethod
    def between(cls, low: Floats, high: Floats) -> BlockGrid:
        """Hold 0, which is exact, and all values from `low` (≤ 0) to `high` (≥ 0)."""
        steps = LARGEST_INT4 - SMALLEST_INT4
        scale = np.where(high > low, (high - low) / steps, 1.0).astype(np.float32)
        zero = np.clip(np.rint(-low / scale) + SMALLEST_INT4, SMALLEST_INT4, LARGEST_INT4)
        return cls(scale, zero)

    @classmethod
    def unclipped(cls, weight: Floats) -> BlockGrid:
        """Hold all weights (inputs, outputs) of each block."""
        blocks = by_blocks(weight)
        return cls.between(blocks.min(1, initial=0.0), blocks.max(1, initial=0.0))

    def narrowed(self, share: np.float32) -> BlockGrid:
        """Hold less: so much of what lies on either side of 0."""
        low, high = ((code - self.zero) * self.scale for code in (SMALLEST_INT4, LARGEST_INT4))
        return self.between(share * low, share * high)


def block_codes(blocks: Floats, grid: BlockGrid) -> Floats:
    """Round weights to codes (blocks, BLOCK, outputs)."""
    codes: Floats = np.rint(blocks / grid.scale[:, None]) + grid.zero[:, None]
    return codes.clip(SMALLEST_INT4, LARGEST_INT4)


def rounded_blocks(blocks: Floats, grid: BlockGrid) -> Floats:
    """Round weights (blocks, BLOCK, outputs) as they come back."""
    rounded: Floats = (block_codes(blocks, grid) - grid.zero[:, None]) * grid.scale[:, None]
    return rounded


def best_block_grid(weight: Floats, importance: Floats) -> BlockGrid:
    """Choose the grid with the least error, weighted by importance (inputs,)."""
    best = whole = BlockGrid.unclipped(weight)
    least = block_errors(weight, whole, importance)
    for share in CLIPS:
        tried = whole.narrowed(share)
        error = block_errors(weight, tried, importance)
        better = error < least
        least = np.where(better, error, least)
        best = BlockGrid(
            *(np.where(better, new, old) for new, old in zip(tried, best, strict=True))
        )
    return best


def compensated_codes(weight: Floats, grid: BlockGrid, rows: Floats) -> NDArray[np.int8]:
    """Round a weight (inputs, outputs) so that its products with rows (n, inputs) change little.

    Input by input, and what rounding one loses, those that are still to come make good as far as
    they are alike (Frantar et al. 2022, "GPTQ", in the form of its Cholesky factor). The loudest
    come first, as nearly all others can still make their errors good; grids stay those of the
    blocks (GPTQ's "activation order" with "static groups").
    """
    inputs, outputs = weight.shape
    order = loudest_first(rows)
    factor = inverse_factor(rows[:, order])
    left, codes = weight[order].astype(np.float64), np.empty(weight.shape, np.int8)
    for start in range(0, inputs, BLOCK):
        end = min(start + BLOCK, inputs)
        lost = np.empty((end - start, outputs))
        for i in range(start, end):
            step, zero = grid.scale[order[i] // BLOCK], grid.zero[order[i] // BLOCK]
            code = (np.rint(left[i] / step) + zero).clip(SMALLEST_INT4, LARGEST_INT4)
            lost[i - start] = (left[i] - (code - zero) * step) / factor[i, i]
            left[i + 1 : end] -= np.outer(factor[i, i + 1 : end], lost[i - start])
            codes[order[i]] = code
        left[end:] -= factor[start:end, end:].T @ lost
    return codes


def loudest_first(rows: Floats) -> NDArray[np.intp]:
    """Order the channels of rows (n, C) by their mean square."""
    return np.argsort(-np.square(rows).mean(0), kind="stable")


def inverse_factor(rows: Floats) -> NDArray[np.float64]:
    """Give the upper Cholesky factor of the inverse of the rows' damped second moments."""
    moments: NDArray[np.float64] = (rows.T @ rows / len(rows)).astype(np.float64)
    moments[np.diag_indices_from(moments)] += DAMPING * np.trace(moments) / len(moments) + 1e-12
    factor: NDArray[np.float64] = np.linalg.cholesky(np.linalg.inv(moments)).T
    return factor


def block_errors(weight: Floats, grid: BlockGrid, importance: Floats) -> Floats:
    """Measure the weighted squared error (blocks, outputs) of weights as they come back."""
    blocks = by_blocks(weight)
    error = rounded_blocks(blocks, grid) - blocks
    weights = by_blocks(importance[:, None])[..., 0]
    weighted: Floats = np.einsum("bio,bio,bi->bo", error, error, weights)
    return weighted


def multiply_rows_in_floats(model: ir.Model) -> None:
    """Undo `multiply_by_rows` in place: rows in floats, weights in bytes made floats."""
    for node in [node for node in model.graph if node.op_type == BY_ROWS]:
        codes, weight, _ = node.inputs
        (single,) = node.outputs[0].consumers()
        (stepped,) = single.outputs[0].consumers()
        (made,) = stepped.outputs[0].consumers()
        rows, by = unrounded(codes), made.inputs[1]
        assert weight is not None
        assert by is not None
        assert by.shape is not None
        zero = ir.tensor(np.zeros(by.shape.numpy(), np.int8), name=f"{weight.name}.zero")
        floats = dequantised([weight, by, constant(model.graph, zero)], axis=1)
        product = ir.node("MatMul", [rows, floats], name=node.name)
        ir.convenience.replace_nodes_and_values(
            model.graph, made, [made], [product], made.outputs, product.outputs
        )
    RemoveUnusedNodesPass()(model)


def make_byte_blocks_floats(model: ir.Model) -> None:
    """Undo `store_in_blocks` in place: TensorRT knows blocks of fewer bits only."""
    for node in [node for node in model.graph if node.op_type == "DequantizeLinear"]:
        codes, step = node.inputs[:2]
        if len(node.inputs) > 2 or codes is None or step is None:
            continue
        weight, steps = constant_values(codes), np.repeat(constant_values(step), BLOCK, axis=0)
        floats = (weight * steps[: len(weight)]).astype(np.float32)
        whole = constant(model.graph, ir.tensor(floats, name=f"{codes.name}_float"))
        node.outputs[0].replace_all_uses_with(whole)
        model.graph.remove(node, safe=True)
    drop_unread(model.graph)


def unrounded(codes: ir.Value | None) -> ir.Value:
    """Find the activation that `rows_in_bytes` rounded."""
    value = codes
    for _ in ("Cast", "Add", "Round", "Mul"):
        producer = None if value is None else value.producer()
        assert producer is not None
        value = producer.inputs[0]
    assert value is not None
    return value


def make_activations_signed(model: ir.Model) -> None:
    """Make a graph's Q/DQ what TensorRT takes, in place: INT8 around zero, rows in floats.

    Activations in uint8 with a zero point become int8 with the scale max(|min|, |max|) / 127, so
    nothing that was representable is cut, and steps are at most twice as wide. A bias in int32
    becomes the floats that it stands for. Weights, int8 around zero, stay and are not read.

    Raises:
        PackageCorrupted: some other tensor is quantised around another value than zero.
    """
    multiply_rows_in_floats(model)
    make_byte_blocks_floats(model)
    graph = model.graph
    for node in [node for node in graph if node.op_type in ("QuantizeLinear", "DequantizeLinear")]:
        tensor, step, zero = (*node.inputs, None)[:3]
        if tensor is None or step is None or zero is None:
            raise PackageCorrupted(
                "a tensor of the graph is quantised without zero point", seen=node.name
            )
        offset = constant_values(zero)
        if offset.dtype == np.uint8:
            # With the scale and zero point in the names, equal ranges share what is made of them.
            name = f"{step.name}_signed_{zero.name}"
            widest = float(constant_values(step)) * max(int(offset), LEVELS - int(offset))
            signed = ir.tensor(np.array(widest / LARGEST_CODE, np.float32), name=name)
            centre = ir.tensor(np.array(0, np.int8), name=f"{name}_zero")
            node.replace_input_with(1, constant(graph, signed))
            node.replace_input_with(2, constant(graph, centre))
            if node.op_type == "QuantizeLinear":
                node.outputs[0].dtype = ir.DataType.INT8
        elif offset.any():
            raise PackageCorrupted(
                "a tensor of the graph is not quantised around zero", seen=tensor.name
            )
        elif offset.dtype == np.int32:
            floats = (constant_values(tensor) * constant_values(step)).astype(np.float32)
            bias = constant(graph, ir.tensor(floats, name=f"{tensor.name}_float"))
            node.outputs[0].replace_all_uses_with(bias)
            graph.remove(node, safe=True)
    drop_unread(graph)


def constant_values(value: ir.Value) -> NDArray[Any]:
    """Read a scale, zero point or bias, which must not be computed in the graph."""
    if value.const_value is None:
        raise PackageCorrupted("a scale or zero point of the graph is computed", seen=value.name)
    return value.const_value.numpy()
