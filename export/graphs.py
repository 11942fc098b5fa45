"""PyTorch modules → plain ONNX graphs with dynamic shapes, whose weights are read when written.

A module is traced with its parameters as inputs, so no weight is needed and none can be folded or
merged; afterwards each becomes an initialiser of the parameter's own name that is read from the
checkpoint while the graph is saved, one at a time.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.func import functional_call

from meiqa.engine.manifest import DecoderShape, Graph, ImageProcessing, Shape
from meiqa.export.decoder import SharedPrefixDecoder

OPSET = 21
LARGEST_GRID, MOST_ROWS, MOST_TOKENS = 4096, 4096, 32768
INDEX_INPUTS = ("prefix_lengths", "past_lengths", "logit_positions")
"""Inputs of whole numbers, int64; all others are float32."""
Weight = Callable[[str], Tensor]


@dataclass(frozen=True)
class Interface:
    """Inputs and outputs of a graph; axes that are named are dynamic."""

    inputs: Mapping[str, Shape]
    outputs: Mapping[str, Shape]

    def as_graph(self, name: str) -> Graph:
        """How the manifest lists it."""
        return Graph(f"{name}.onnx", f"{name}.onnx.data", self.inputs, self.outputs)


def vision_interface(image: ImageProcessing, shape: DecoderShape) -> Interface:
    """Cells of patches in, one row of features a visual token out."""
    width = image.merge_size**2 * 3 * image.patch_size**2
    return Interface({"cells": ("h", "w", width)}, {"tokens": ("tokens", shape.embed_width)})


def decoder_interface(shape: DecoderShape) -> Interface:
    """See `SharedPrefixDecoder.forward`."""
    layers, heads, width = shape.layers, shape.kv_heads, shape.head_dim
    rows: Shape = ("prefixes", "rows")
    return Interface(
        {
            "embeds": (*rows, "steps", shape.embed_width),
            "positions": (3, *rows, "steps"),
            "prefix": (layers, 2, "prefixes", heads, "prefix_steps", width),
            "prefix_lengths": ("prefixes",),
            "past": (layers, 2, "prefixes", heads, "rows", "past_steps", width),
            "past_lengths": rows,
            "logit_positions": (*rows, "wanted"),
        },
        {
            "logits": (*rows, "wanted", shape.vocab_size),
            "hidden": (*rows, "steps", shape.hidden_size),
            "key_values": (layers, 2, "prefixes", heads, "rows", "steps", width),
        },
    )


def vision_graph(tower: nn.Module, interface: Interface, weight: Weight) -> ir.Model:
    """Trace the vision tower."""
    limits = {"h": Dim("h", min=1, max=LARGEST_GRID), "w": Dim("w", min=1, max=LARGEST_GRID)}
    return traced(
        tower, {"cells": torch.zeros(sized(interface, "cells"))}, limits, interface, weight
    )


def decoder_graph(decoder: SharedPrefixDecoder, interface: Interface, weight: Weight) -> ir.Model:
    """Trace the decoder."""
    few = {name: Dim(name, max=MOST_ROWS) for name in ("prefixes", "rows")}
    tokens = ("steps", "prefix_steps", "past_steps", "wanted")
    many = {name: Dim(name, max=MOST_TOKENS) for name in tokens}
    example = {
        name: torch.zeros(
            sized(interface, name), dtype=torch.long if name in INDEX_INPUTS else torch.float32
        )
        for name in interface.inputs
    }
    return traced(decoder, example, few | many, interface, weight)


EXAMPLE_SIZES = {
    "h": 3,
    "w": 5,
    "prefixes": 2,
    "rows": 3,
    "steps": 5,
    "prefix_steps": 7,
    "past_steps": 11,
    "wanted": 4,
}
"""Dynamic axes have sizes of their own while they are traced: none is taken for another."""


def sized(interface: Interface, name: str) -> tuple[int, ...]:
    """Shape of an example input."""
    shape = interface.inputs[name]
    return tuple(EXAMPLE_SIZES[axis] if isinstance(axis, str) else axis for axis in shape)


class WithWeights(nn.Module):
    """A module whose parameters are an input."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, weights: dict[str, Tensor], *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        made: Tensor | tuple[Tensor, ...] = functional_call(
            self.module, weights, inputs, tie_weights=False
        )
        return made


def traced(
    module: nn.Module,
    example: Mapping[str, Tensor],
    dims: Mapping[str, Dim],
    interface: Interface,
    weight: Weight,
) -> ir.Model:
    """Trace a weightless module into a graph whose initialisers are read when it is saved."""
    shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
    # One zero stands for all values: no memory is taken, whatever the model's size.
    stand_ins = {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}
    dynamic = [
        {index: dims[axis] for index, axis in enumerate(shape) if isinstance(axis, str)}
        for shape in interface.inputs.values()
    ]
    with without_exporter_noise():
        program = torch.onnx.export(
            WithWeights(module).eval(),
            (stand_ins, *example.values()),
            dynamo=True,
            opset_version=OPSET,
            input_names=[*stand_ins, *example],
            output_names=list(interface.outputs),
            dynamic_shapes=({name: None for name in stand_ins}, tuple(dynamic)),
            external_data=False,
            verbose=False,
        )
    assert program is not None
    model = program.model
    for name in stand_ins:
        initialise(model.graph, name, shapes[name], weight)
    absorb_padding(model)
    forget_origins(model)
    return model


def absorb_padding(model: ir.Model) -> None:
    """Let convolutions pad by themselves where zeros are put around what they alone read.

    PyTorch's convolutions pad both sides alike, ONNX's need not; a padded copy costs time and
    would be quantised by itself.
    """
    for node in list(model.graph):
        if node.op_type != "Pad" or node.attributes.get_string("mode", "constant") != "constant":
            continue
        (padded,) = node.outputs
        source, sizes, *fill = node.inputs
        readers = list(padded.consumers())
        if source is None or sizes is None or sizes.const_value is None or len(readers) != 1:
            continue
        (reader,) = readers
        if reader.op_type != "Conv" or any(f is not None and not zero(f) for f in fill):
            continue
        before, after = np.split(sizes.const_value.numpy(), 2)
        around = np.concatenate([before[2:], after[2:]])
        own = np.array(reader.attributes.get_ints("pads", [0] * len(around)))
        reader.attributes["pads"] = ir.AttrInt64s("pads", (own + around).tolist())
        reader.replace_input_with(0, source)
        model.graph.remove(node, safe=True)


def zero(value: ir.Value) -> bool:
    """Whether a value is known to be nothing but zeros."""
    return value.const_value is not None and not value.const_value.numpy().any()


@contextmanager
def without_exporter_noise() -> Iterator[None]:
    """Silence what the exporter says about its own doings: operators of libraries not installed,
    names of axes, deprecated calls inside PyTorch."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "# The axis name", UserWarning)
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)`", FutureWarning)
            yield
    finally:
        logger.setLevel(level)


def forget_origins(model: ir.Model) -> None:
    """Drop what the exporter notes about the source code of each node."""
    for noted in (model, model.graph, *model.graph):
        noted.doc_string = None
        noted.metadata_props.clear()
    for node in model.graph:
        for value in node.outputs:
            value.metadata_props.clear()


def initialise(graph: ir.Graph, name: str, shape: torch.Size, weight: Weight) -> None:
    """Turn an input that stands for a parameter into an initialiser, transposed if used so."""
    value = next(v for v in graph.inputs if v.name == name)
    graph.inputs.remove(value)
    turned = [node for node in value.consumers() if node.op_type == "Transpose" and len(shape) == 2]
    if turned:
        renamed = name if len(turned) == len(value.consumers()) else f"{name}.transposed"
        made = stored_value(renamed, shape[::-1], lambda: weight(name).T)
        for node in turned:
            node.outputs[0].replace_all_uses_with(made)
            graph.remove(node, safe=True)
        value.name = f"{name}.unused"
        graph.register_initializer(made)
    if value.consumers():
        value.name = name
        value.const_value = lazy(name, shape, lambda: weight(name))
        graph.register_initializer(value)


def stored_value(name: str, shape: torch.Size, read: Callable[[], Tensor]) -> ir.Value:
    """An initialiser that is read when it is written."""
    tensor = lazy(name, shape, read)
    return ir.Value(
        name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor
    )


def lazy(name: str, shape: torch.Size, read: Callable[[], Tensor]) -> ir.LazyTensor:
    """A tensor that is read whenever it is looked at."""
    return ir.LazyTensor(
        lambda: ir.tensor(read().contiguous().numpy(), name=name),
        dtype=ir.DataType.FLOAT,
        shape=ir.Shape(shape),
        name=name,
    )


def save_graph(model: ir.Model, path: Path) -> None:
    """Write a graph and, beside it, its weights, one tensor after the other."""
    ir.save(model, path, external_data=f"{path.name}.data")
