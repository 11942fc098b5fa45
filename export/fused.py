"""A decoder's layers for the native kernel: what it reads, and where that lies among the weights.

They are taken from the finished graph, so both compute with the same rounded weights and ranges.
Nothing is stored twice: of what the graph keeps as it is, the place in its file is written down.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import pairwise
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
AGREEING = {"fp32": 1.0, "fp16": 1.0, "int8": 3 / 4}
"""Share of the rows that have to agree. Where values that differ in their last digits are rounded
to bytes, one may fall on the other side of a step: in a row of some dozens with trained weights."""
LARGEST_SHARE = {"fp32": 1e-4, "fp16": 5e-3, "int8": 1e-4}
"""Up to which a row agrees, see `differences`. The kernel multiplies halves in single precision,
and graphs halve what they are multiplied with."""
Arrays = dict[str, NDArray[np.generic]]
Floats = NDArray[np.float32]
Tensors = dict[str, ir.TensorProtocol]


def write_fused_layers(
    folder: Path, text: DecoderConfig, precision: str
) -> dict[str, float] | None:
    """Write the layers of `decoder.onnx` beside it, if the kernel can run them.

    It can where the architecture is Qwen2.5-VL's and widths fit. Given back is the part that
    differs most from the graph's, and by which share; see `differences`.
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
        )
    return {part: found[part]}


def differences(folder: Path, shape: DecoderShape, precision: str) -> dict[str, float]:
    """Compare each layer with the graph's, on what that one reads, and then what makes logits.

    One by one, since what a layer rounds otherwise is seen in all that follow it. Given is, for
    each part, how far `AGREEING` rows differ in their last token: as a share of what the graph's
    layer adds to it, or of its logits. It is infinite where that is not a number.
    """
    graph = folder / "decoder.onnx"
    weights, head = stored_beside(graph.with_name(f"{graph.name}.data"))
    states = hidden_states(ir.load(graph), shape.layers)
    call, share = GraphCall(graph, shape, states), AGREEING[precision]
    no_scale, epsilon = np.ones_like(weights.last_norm), weights.shape.epsilon
    found = {}
    for index, (before, behind) in enumerate(pairwise(states)):
        wanted = call.last(behind)
        size = np.sqrt(np.square(wanted).mean(axis=1, keepdims=True) + epsilon)
        off = size * call.behind(index, replace(weights, last_norm=no_scale)) - wanted
        found[f"layers.{index}"] = in_most_rows(off, wanted - call.last(before), share)
    wanted = floats(call.made["logits"].reshape(-1, shape.vocab_size))
    off = Projection(head).of(call.behind(shape.layers - 1, weights), 1) - wanted
    return {**found, "logits": in_most_rows(off, wanted, share)}


def in_most_rows(off: Floats, whole: Floats, share: float) -> float:
    """Give how far that share of rows is off at most, as a share of the whole row."""
    of_rows = np.abs(off).mean(axis=1) / np.abs(whole).mean(axis=1)
    return float(np.nan_to_num(np.quantile(of_rows, share), nan=np.inf))


class GraphCall:
    """What a decoder's graph reads and gives in a call, for the kernel's layers to be held against.

    Args:
        states: names of the hidden states before each layer and behind the last.
    """

    def __init__(self, graph: Path, shape: DecoderShape, states: Sequence[str]) -> None:
        sizes = len(COMPARED), COMPARED_ROWS, COMPARED_STEPS, max(COMPARED), 0, 1
        feeds = {**random_feeds(shape, sizes, np.random.default_rng(0))}
        feeds["prefix_lengths"] = np.array(COMPARED)
        with giving(graph, states[1:]) as session:
            self.made = {**feeds, **session.run(feeds)}
        self._states = states
        self._last = self.made["logit_positions"].reshape(-1).astype(np.int64)

    def rows(self, state: str) -> Floats:
        """Hidden states (R, S, D) of all rows, one prefix's after the other's."""
        return floats(self.made[state].reshape(len(self._last), COMPARED_STEPS, -1))

    def last(self, state: str) -> Floats:
        """Hidden states (R, D) of the tokens whose logits were asked."""
        of_row = self._last[:, None, None]
        return np.take_along_axis(self.rows(state), of_row, axis=1)[:, 0]

    def behind(self, index: int, weights: FusedWeights) -> Floats:
        """Normalised hidden states (R, D) that a layer of the kernel makes of the graph's."""
        own = slice(index, index + 1)
        layer = FusedDecoder(replace(weights, norms=weights.norms[own], layers=weights.layers[own]))
        positions = floats(self.made["positions"].reshape(3, len(self._last), COMPARED_STEPS))
        prefixes = np.moveaxis(self.made["prefix"][own], 2, 0)
        return layer.last_hidden(
            self.rows(self._states[index]),
            positions,
            self._last + 1,
            [floats(prefix) for prefix in prefixes for _ in range(COMPARED_ROWS)],
            np.repeat(COMPARED, COMPARED_ROWS),
            1,
        )


def hidden_states(model: ir.Model, layers: int) -> list[str]:
    """Name what the norms before each layer and behind the last read."""
    norms = [*(f"layers.{index}.input_layernorm" for index in range(layers)), "norm"]
    names = []
    for norm in norms:
        weight = model.graph.initializers[f"{norm}.weight"]
        (scaled,) = weight.consumers()
        (normalised,) = (value for value in scaled.inputs if value is not weight)
        product = None if normalised is None else normalised.producer()
        state = None if product is None else product.inputs[0]
        assert state is not None
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
    add_head(model, arrays, tensors)
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


def add_head(model: ir.Model, arrays: Arrays, tensors: Tensors) -> None:
    """Take what makes logits (inputs, vocabulary): in floats, or as bytes with steps of blocks.

    Bytes with a step for each word are made floats, as what they are multiplied with is here.
    """
    weight = weight_of(model, "lm_head.weight")
    if weight.dtype != ir.DataType.INT8:
        tensors["lm_head"] = weight
        return
    scale = stored(model, "lm_head.weight.scale")
    if len(scale.shape) == 1:
        arrays["lm_head"] = read(weight).astype(np.float32) * floats(read(scale))
    else:
        tensors |= {"lm_head": weight, "lm_head.scale": scale}


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
