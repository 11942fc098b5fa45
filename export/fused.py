"""A decoder's layers for the native kernel: what it reads, and where that lies among the weights.

They are taken from the finished graph, so both compute with the same rounded weights and ranges.
Nothing is stored twice: of what the graph keeps as it is, the place in its file is written down.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from meiqa.engine.manifest import DecoderShape
from meiqa.engine.runtime.decoder import (
    LAYERS_FILE,
    VIEWED,
    VIEWS,
    GraphDecoder,
    KeyValues,
    NativeDecoder,
    Row,
    floats,
    layers_beside,
)
from meiqa.errors import PackageCorrupted
from meiqa.export.decoder import DecoderConfig, axis_frequencies
from meiqa.export.layers import read
from meiqa.export.rounding import BY_ROWS
from meiqa.export.verify import PiecewiseSession, random_feeds
from meiqa.kernels.decoder import LAYER_LINEARS, MIDDLE, OF_EACH_ROW, FusedShape
from meiqa.memory.segment import write_segment

FUSED_PRECISIONS = ("fp32", "fp16", "int8")
COMPARED = 1, 11, 33
"""Prefix steps of the calls on which layers and graph are compared. Behind no prefix a lone token
attends to itself alone, whatever its query and key are."""
COMPARED_ROWS = {"fp32": 8, "fp16": 8, "int8": 128}
"""Rows of such a call."""
COMPARED_STEPS = {"fp32": 7, "fp16": 7, "int8": 1}
"""Tokens of a row. What is rounded otherwise in one is seen by all that follow it."""
AGREEING = {"fp32": 1.0, "fp16": 1.0, "int8": 1 / 16}
"""Share of a call's rows that have to agree. Between two roundings to bytes a value may fall on the
other side of a step, the more often the more layers in floats lie between, and that moves a deep
decoder's answer by a hundredth; the other rows agree as floats do. Layers that differ move all."""
LARGEST_SHARE = {"fp32": 1e-4, "fp16": 5e-3, "int8": 1e-4}
"""Mean difference of a row's logits up to which it agrees, as a share of the largest. Where scores
of attention are large, as trained decoders have them, sums in another order move some rows. The
kernel multiplies halves in single precision, and graphs halve what they are multiplied with."""
Arrays = dict[str, NDArray[np.generic]]
Tensors = dict[str, ir.TensorProtocol]


def write_fused_layers(
    folder: Path, text: DecoderConfig, precision: str
) -> dict[str, float] | None:
    """Write the layers of `decoder.onnx` beside it, if the kernel can run them.

    It can where the architecture is Qwen2.5-VL's and widths fit. Given back is the difference of
    their logits from the graph's, see `fused_difference`, and the largest value it is of.
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
    difference, largest = fused_difference(folder, text.shape, precision)
    allowed = LARGEST_SHARE[precision] * largest
    if not difference <= allowed:
        raise PackageCorrupted(
            "the layers for the native kernel do not answer as the decoder graph does",
            seen=f"{difference:.1e}",
            allowed=f"{allowed:.0e}",
        )
    return {"difference": difference, "of": largest}


def fused_difference(folder: Path, shape: DecoderShape, precision: str) -> tuple[float, float]:
    """Compare the layers with the graph beside them: mean difference of a row's logits up to which
    `AGREEING` rows of each call differ, of the worst call, and largest logit.
    """
    graph = GraphDecoder(PiecewiseSession(folder / "decoder.onnx"), shape)
    native = NativeDecoder(*layers_beside(folder / "decoder.onnx.data"), 1)
    differences: list[float] = []
    largest, rng = 0.0, np.random.default_rng(0)
    for before in COMPARED:
        sizes = (1, COMPARED_ROWS[precision], COMPARED_STEPS[precision], before, 0, 1)
        feeds = random_feeds(shape, sizes, rng)
        embeds, positions = floats(feeds["embeds"][0]), floats(feeds["positions"][:, 0])
        rows = [Row(embed, positions[:, index]) for index, embed in enumerate(embeds)]
        prefix = KeyValues(floats(feeds["prefix"][:, :, 0]), before)
        wanted, made = (decoder.last_logits(rows, [prefix]) for decoder in (graph, native))
        of_rows = np.abs(made - wanted).mean(axis=1)
        differences.append(float(np.quantile(of_rows, AGREEING[precision])))
        largest = max(largest, float(np.abs(wanted).max()))
    return max(differences), largest


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
