"""A decoder's layers for the native kernel: what it reads, and where that lies among the weights.

They are taken from the finished graph, so both compute with the same rounded weights and ranges.
Nothing is stored twice: of what the graph keeps as it is, the place in its file is written down.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from meiqa.engine.manifest import DecoderShape
from meiqa.engine.runtime.decoder import LAYERS_FILE, VIEWED, VIEWS, floats, stored_beside
from meiqa.errors import PackageCorrupted
from meiqa.export.decoder import DecoderConfig, axis_frequencies
from meiqa.export.layers import read
from meiqa.export.rounding import BY_ROWS
from meiqa.export.verify import giving, random_feeds
from meiqa.kernels.decoder import (
    LAYER_LINEARS,
    MIDDLE,
    OF_EACH_ROW,
    FusedDecoder,
    FusedShape,
    FusedWeights,
    Projection,
)
from meiqa.memory.segment import write_segment

FUSED_PRECISIONS = ("fp32", "fp16", "int8")
COMPARED = 1, 11, 33
"""Prefix steps of the rows on which layers and graph are compared. Behind no prefix a lone token
attends to itself alone, whatever its query and key are."""
COMPARED_ROWS, COMPARED_STEPS = 32, 3
"""Rows behind each such prefix, and tokens of a row."""
IN_A_ROW = 2
"""Layers that are run one after the other before they are compared. What one rounds otherwise is
seen in all that follow it."""
AGREEING = {"fp32": 1.0, "fp16": 1.0, "int8": 1 / 2}
"""Share of the rows behind each prefix that have to agree. Where values that differ in their last
digits are rounded to bytes, one may fall on the other side of a step: with the trained weights of a
decoder 896 wide, in one of thirty rows of a layer, and oftener in wider ones."""
LARGEST_SHARE = {"fp32": 1e-4, "fp16": 5e-3, "int8": 1e-4}
"""Largest share of a row by which it may differ and agree. The kernel multiplies halves in single
precision, and graphs halve what they are multiplied with."""
LEAST_ADDED = 1e-3
"""Share of a hidden state that layers are taken to add to it at least."""
Arrays = dict[str, NDArray[np.generic]]
Floats = NDArray[np.float32]
Tensors = dict[str, ir.TensorProtocol]


def write_fused_layers(
    folder: Path, text: DecoderConfig, precision: str
) -> dict[str, float] | None:
    """Write the layers of `decoder.onnx` beside it, if the kernel can run them.

    It can where the architecture is Qwen2.5-VL's and widths fit. Given is which part of it differs
    most from the graph's, and by which share; see `differences`.
    """
    shape = FusedShape(
        width=text.hidden_size,
        inner=text.intermediate_size,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_width=text.head_dim,
        epsilon=text.rms_norm_eps,
    )
    others = text.qk_norm, text.deepstack, text.rotary_dim, text.attention_gate, text.delta
    if any(others) or precision not in FUSED_PRECISIONS or not shape.fits:
        return None
    arrays, tensors = fused_layers(ir.load(folder / "decoder.onnx"), text)
    views = {n: place_of(tensor) for n, tensor in tensors.items() if lies_as_it_is(tensor)}
    arrays |= {name: read(tensor) for name, tensor in tensors.items() if name not in views}
    write_segment(folder / LAYERS_FILE, arrays, {**asdict(shape), VIEWS: views})
    found = differences(folder, text.shape, precision)
    part = max(found, key=lambda name: found[name])
    if not found[part] <= LARGEST_SHARE[precision]:
        raise PackageCorrupted(
            f"{part} of the native kernel does not answer as in the decoder graph",
            seen=f"{found[part]:.1e}",
            allowed=f"{LARGEST_SHARE[precision]:.0e}",
            hint="please report it with the checkpoint's config.json",
        )
    return {part: found[part]}


def differences(folder: Path, shape: DecoderShape, precision: str) -> dict[str, float]:
    """Compare the kernel with the graph: each layer and the next, on what the graph's read.

    Given is by how much rows differ, see `row_difference`: of each layer and the next, by the name
    of the former, what they add to the last token's hidden state; and of `logits` behind the last.
    """
    weights, head = stored_beside(folder / "decoder.onnx.data")
    no_scale = replace(weights, last_norm=np.ones_like(weights.last_norm))
    call, agreeing = call_graph(folder / "decoder.onnx", shape), AGREEING[precision]
    firsts = range(max(1, shape.layers - IN_A_ROW + 1))
    found = {}
    for first in firsts:
        last = min(first + IN_A_ROW, shape.layers)
        before, behind = (call.last(call.states[index]) for index in (first, last))
        size = np.sqrt(np.square(behind).mean(axis=1, keepdims=True) + weights.shape.epsilon)
        off = size * hidden_behind(no_scale, first, call) - behind
        added = np.abs(behind - before) + LEAST_ADDED * np.abs(behind)
        found[f"layers.{first}"] = row_difference(off, added, agreeing)
    off = Projection(head).of(hidden_behind(weights, firsts[-1], call), 1) - call.logits
    return {**found, "logits": row_difference(off, call.logits, agreeing)}


def row_difference(off: Floats, whole: Floats, agreeing: float) -> float:
    """Give the share of itself by which the worst row (R, N) is off that has to agree.

    Of those behind each prefix `agreeing` have to. It is infinite where one is not a number.
    """
    rows = np.abs(off).mean(axis=1) / np.abs(whole).mean(axis=1)
    of_prefixes = np.quantile(rows.reshape(len(COMPARED), COMPARED_ROWS), agreeing, axis=1)
    return float(np.nan_to_num(of_prefixes.max(), nan=np.inf, posinf=np.inf))


@dataclass(frozen=True, eq=False)
class GraphCall:
    """What a decoder's graph read and gave in a call, row by row, one prefix after the other.

    Attributes:
        states: hidden states (R, S, D) before each layer and behind the last.
        positions: (3, R, S).
        prefixes: keys and values (L, 2, H, T, d) of each row's, of which COMPARED count.
        asked: (R,) the tokens whose logits were asked.
        logits: (R, V).
    """

    states: Sequence[Floats]
    positions: Floats
    prefixes: Sequence[Floats]
    asked: NDArray[np.int64]
    logits: Floats

    def last(self, state: Floats) -> Floats:
        """Give the hidden states (R, D) of the tokens whose logits were asked."""
        return np.take_along_axis(state, self.asked[:, None, None], axis=1)[:, 0]


def call_graph(graph: Path, shape: DecoderShape) -> GraphCall:
    """Run a decoder's graph on random rows behind prefixes of several lengths."""
    sizes = len(COMPARED), COMPARED_ROWS, COMPARED_STEPS, max(COMPARED), 0, 1
    feeds = {**random_feeds(shape, sizes, np.random.default_rng(0))}
    feeds["prefix_lengths"] = np.array(COMPARED)
    names = hidden_states(ir.load(graph), shape.layers)
    with giving(graph, names[1:]) as session:
        values = {**feeds, **session.run(feeds)}
    rows = len(COMPARED) * COMPARED_ROWS
    states = [floats(values[name].reshape(rows, COMPARED_STEPS, -1)) for name in names]
    prefixes = [floats(prefix) for prefix in np.moveaxis(feeds["prefix"], 2, 0)]
    return GraphCall(
        states,
        floats(feeds["positions"].reshape(3, rows, COMPARED_STEPS)),
        [prefix for prefix in prefixes for _ in range(COMPARED_ROWS)],
        feeds["logit_positions"].reshape(rows).astype(np.int64),
        floats(values["logits"].reshape(rows, -1)),
    )


def hidden_behind(weights: FusedWeights, first: int, call: GraphCall) -> Floats:
    """Run some of the kernel's layers on what the graph's first of them read.

    Gives normalised hidden states (R, D) of the tokens whose logits were asked.
    """
    some = slice(first, first + IN_A_ROW)
    layers = replace(weights, norms=weights.norms[some], layers=weights.layers[some])
    return FusedDecoder(layers).last_hidden(
        call.states[first],
        call.positions,
        call.asked + 1,
        [prefix[some] for prefix in call.prefixes],
        np.repeat(COMPARED, COMPARED_ROWS),
        1,
    )


def hidden_states(model: ir.Model, layers: int) -> list[str]:
    """Name what the norms before each layer and behind the last read."""
    names = []
    for norm in (*(f"layers.{index}.input_layernorm" for index in range(layers)), "norm"):
        weight = model.graph.initializers[f"{norm}.weight"]
        (scaled,) = weight.consumers()
        (normalised,) = (value for value in scaled.inputs if value is not weight)
        product = None if normalised is None else normalised.producer()
        state = None if product is None else product.inputs[0]
        if state is None:
            raise KeyError(f"what {norm} of the decoder's graph reads")
        names.append(str(state.name))
    return names


def lies_as_it_is(tensor: ir.TensorProtocol) -> bool:
    """Say whether a tensor can be read in the graph's file of weights, where it is."""
    return isinstance(tensor, ir.ExternalTensor) and tensor.dtype.numpy().str in VIEWED


def place_of(tensor: ir.TensorProtocol) -> tuple[int, str, list[int]]:
    """Give the offset, dtype and shape of a tensor in the graph's file of weights."""
    assert isinstance(tensor, ir.ExternalTensor)
    return tensor.offset or 0, tensor.dtype.numpy().str, [*tensor.shape.numpy()]


def fused_layers(model: ir.Model, text: DecoderConfig) -> tuple[Arrays, Tensors]:
    """Take what `meiqa.engine.runtime.decoder` reads from a decoder's float or INT8 graph.

    Given are arrays that the graph has in no such form, and tensors that it has.
    """
    arrays: Arrays = {"frequencies": axis_frequencies(text).numpy()}
    tensors = {"norm": stored(model, "norm.weight")}
    add_head(model, tensors)
    for index in range(text.num_hidden_layers):
        layer = f"layers.{index}"
        for norm, source in (("input", "input"), ("post", "post_attention")):
            weight = stored(model, f"{layer}.{source}_layernorm.weight")
            tensors[f"{layer}.{norm}_layernorm"] = weight
        for linear in LAYER_LINEARS:
            part = "mlp" if linear in LAYER_LINEARS[4:] else "self_attn"
            name, source = f"{layer}.{linear}", f"{layer}.{part}.{linear}"
            weight = tensors[name] = weight_of(model, f"{source}.weight")
            if f"{source}.bias" in model.graph.initializers:
                tensors[f"{name}.bias"] = stored(model, f"{source}.bias")
            else:
                arrays[f"{name}.bias"] = np.zeros(weight.shape.numpy()[1], np.float32)
            if weight.dtype == ir.DataType.INT8:
                tensors[f"{name}.scale"] = stored(model, f"{source}.weight.scale")
                arrays[f"{name}.input"] = input_range(model, f"{source}.weight.int8")
    return arrays, tensors


def add_head(model: ir.Model, tensors: Tensors) -> None:
    """Take what makes logits (inputs, vocabulary): in floats, or as bytes with steps of blocks."""
    weight = tensors["lm_head"] = weight_of(model, "lm_head.weight")
    if weight.dtype == ir.DataType.INT8:
        tensors["lm_head.scale"] = stored(model, "lm_head.weight.scale")


def weight_of(model: ir.Model, name: str) -> ir.TensorProtocol:
    """Find a weight (inputs, outputs): signed bytes, or floats that may have been halved."""
    for form in (f"{name}.int8", f"{name}.half", f"{name}.transposed", name):
        if form in model.graph.initializers:
            return stored(model, form)
    raise KeyError(f"the decoder's graph has no weight {name}")


def input_range(model: ir.Model, codes: str) -> NDArray[np.float32]:
    """Read scale and zero point (2,) of what a weight of bytes is multiplied with."""
    (reader,) = model.graph.initializers[codes].consumers()
    if reader.op_type == BY_ROWS:
        return np.array([OF_EACH_ROW, MIDDLE], np.float32)
    (product,) = reader.outputs[0].consumers()
    given = product.inputs[0]
    producer = None if given is None else given.producer()
    if producer is None or producer.op_type != "DequantizeLinear":
        raise KeyError(f"the input of {codes} is not quantised")
    scale, zero = (value.const_value for value in producer.inputs[1:] if value is not None)
    return np.array([read(scale), read(zero)], np.float32)


def stored(model: ir.Model, name: str) -> ir.TensorProtocol:
    """Find an initialiser's tensor."""
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor
