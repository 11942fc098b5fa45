"""The layers of a small decoder a second time, for the native kernel of the last token.

They are taken from the finished graph, so both compute with the same rounded weights and ranges.
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
    GraphDecoder,
    KeyValues,
    NativeDecoder,
    Row,
    floats,
    layers_of,
)
from meiqa.errors import PackageCorrupted
from meiqa.export.decoder import DecoderConfig, axis_frequencies
from meiqa.export.layers import read
from meiqa.export.rounding import BLOCK, BY_ROWS
from meiqa.export.verify import PiecewiseSession, random_feeds
from meiqa.kernels.decoder import LAYER_LINEARS, MIDDLE, OF_EACH_ROW, FusedShape
from meiqa.memory.segment import Segment, write_segment

LARGEST_BYTES = 32 << 20
"""Layers beyond a processor's cache gain little; those of large models are not stored twice."""
FUSED_PRECISIONS = ("fp32", "int8")
COMPARED = ((5, 7, 11), (3, 1, 0), (2, 33, 17))
"""Rows, steps and prefix steps of the calls on which layers and graph are compared."""
LARGEST_SHARE = {"fp32": 1e-5, "int8": 5e-3}
"""Mean difference of the logits that is allowed, as a share of the largest. Between two roundings
to bytes, a value may fall on the other side of a step."""
Arrays = dict[str, NDArray[np.generic]]


def write_fused_layers(
    folder: Path, text: DecoderConfig, precision: str
) -> dict[str, float] | None:
    """Write the layers of `decoder.onnx` beside it, if the kernel can run them.

    It can where the architecture is Qwen2.5-VL's, widths fit, and the layers are small. Given back
    is the mean difference of their logits from the graph's, and the largest value it is of.
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
    model = ir.load(folder / "decoder.onnx")
    stored = model.graph.initializers.values()
    layers = [v.const_value for v in stored if str(v.name).startswith("layers.")]
    if sum(tensor.nbytes for tensor in layers if tensor is not None) > LARGEST_BYTES:
        return None
    write_segment(folder / LAYERS_FILE, fused_arrays(model, text), asdict(shape))
    difference, largest = fused_difference(folder, text.shape)
    allowed = LARGEST_SHARE[precision] * largest
    if not difference <= allowed:
        raise PackageCorrupted(
            "the layers for the native kernel do not answer as the decoder graph does",
            seen=f"{difference:.1e}",
            allowed=f"{allowed:.0e}",
        )
    return {"difference": difference, "of": largest}


def fused_difference(folder: Path, shape: DecoderShape) -> tuple[float, float]:
    """Compare the stored layers with the graph beside them: mean difference and largest logit."""
    segment = Segment.open(folder / LAYERS_FILE)
    graph = GraphDecoder(PiecewiseSession(folder / "decoder.onnx"), shape)
    layers = layers_of(segment.arrays, segment.attributes)
    native = NativeDecoder(graph, layers, floats(segment.arrays["lm_head"]), 1)
    differences, largest = [], 0.0
    rng = np.random.default_rng(0)
    for count, steps, before in COMPARED:
        feeds = random_feeds(shape, (1, count, steps, before, 0, 1), rng)
        embeds, positions = floats(feeds["embeds"][0]), floats(feeds["positions"][:, 0])
        rows = [Row(embeds[index], positions[:, index]) for index in range(count)]
        prefix = KeyValues(floats(feeds["prefix"][:, :, 0]), before)
        wanted, made = (decoder.last_logits(rows, [prefix]) for decoder in (graph, native))
        differences.append(float(np.abs(made - wanted).mean()))
        largest = max(largest, float(np.abs(wanted).max()))
    return max(differences), largest


def fused_arrays(model: ir.Model, text: DecoderConfig) -> Arrays:
    """Take what `meiqa.engine.runtime.decoder` reads from a decoder's float or INT8 graph."""
    arrays: Arrays = {
        "frequencies": axis_frequencies(text).numpy(),
        "norm": stored(model, "norm.weight"),
        "lm_head": head_of(model),
    }
    for index in range(text.num_hidden_layers):
        layer = f"layers.{index}"
        for norm, source in (("input", "input"), ("post", "post_attention")):
            weight = stored(model, f"{layer}.{source}_layernorm.weight")
            arrays[f"{layer}.{norm}_layernorm"] = weight
        for linear in LAYER_LINEARS:
            part = "mlp" if linear in LAYER_LINEARS[4:] else "self_attn"
            name, source = f"{layer}.{linear}", f"{layer}.{part}.{linear}"
            weight = arrays[name] = weight_of(model, f"{source}.weight")
            biased = f"{source}.bias" in model.graph.initializers
            width = weight.shape[1]
            bias = stored(model, f"{source}.bias") if biased else np.zeros(width, np.float32)
            arrays[f"{name}.bias"] = bias
            if weight.dtype == np.int8:
                arrays[f"{name}.scale"] = stored(model, f"{source}.weight.scale")
                arrays[f"{name}.input"] = input_range(model, f"{source}.weight.int8")
    return arrays


def head_of(model: ir.Model) -> NDArray[np.float32]:
    """Read what makes logits (inputs, vocabulary), in floats."""
    weight = weight_of(model, "lm_head.weight")
    if weight.dtype != np.int8:
        return weight.astype(np.float32)
    steps = floats(stored(model, "lm_head.weight.scale"))
    if steps.ndim == 2:
        steps = np.repeat(steps, BLOCK, axis=0)[: len(weight)]
    return weight.astype(np.float32) * steps


def weight_of(model: ir.Model, name: str) -> NDArray[np.generic]:
    """Read a weight (inputs, outputs): signed bytes, or floats that may have been halved."""
    for form in (f"{name}.int8", f"{name}.half", f"{name}.transposed", name):
        if form in model.graph.initializers:
            found = stored(model, form)
            return found if found.dtype == np.int8 else found.astype(np.float32)
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


def stored(model: ir.Model, name: str) -> NDArray[np.generic]:
    return read(model.graph.initializers[name].const_value)
