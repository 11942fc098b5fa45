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

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.export import Dim
from torch.func import functional_call

from meiqa.engine.manifest import DecoderShape, Graph, ImageProcessing, Shape
from meiqa.engine.runtime.decoder import Array
from meiqa.export.layers import constant, lazy

OPSET = 21


AXES = {
    "h": (3, Dim("h", min=1, max=4096)),
    "w": (5, Dim("w", min=1, max=4096)),
    "cells": (15, Dim("cells", min=1, max=4096)),
    "tiles": (4, Dim("tiles", min=1, max=4096)),
    "shown": (13, Dim("shown", min=1, max=65536)),
    "prefixes": (2, Dim("prefixes", max=4096)),
    "rows": (3, Dim("rows", max=4096)),
    "steps": (5, Dim("steps", max=32768)),
    "prefix_steps": (7, Dim("prefix_steps", max=32768)),
    "past_steps": (11, Dim("past_steps", max=32768)),
    "wanted": (4, Dim("wanted", max=32768)),
}
"""Dynamic axes, each with a size of its own while it is traced: none is taken for another."""
INDEX_INPUTS = ("prefix_lengths", "past_lengths", "logit_positions", "kept_lengths", "order")
"""Inputs of whole numbers, int64; all others are float32."""
Weight = Callable[[str], Tensor]
"""Reads a parameter by its name."""


def vision_interface(image: ImageProcessing, shape: DecoderShape) -> Graph:
    """Describe the vision graph: cells of patches in, a row of features a visual token out.

    Where the tower sees tiles, the cells are those of each, and `order` says which tokens follow
    each other: see `meiqa.engine.images.tiles_of`.
    """
    width = image.merge_size**2 * 3 * image.patch_size**2
    cells: dict[str, Shape] = {"cells": ("h", "w", width)}
    if image.tile_pixels:
        along = image.tile_pixels // image.cell_pixels
        cells = {"cells": ("tiles", along**2, width), "order": ("shown",)}
    tokens = {"tokens": ("tokens", shape.embed_width)}
    return Graph("vision.onnx", "vision.onnx.data", cells, tokens)


def decoder_interface(shape: DecoderShape) -> Graph:
    """Describe the decoder's graph; see `SharedPrefixDecoder.forward`."""
    layers, heads, width = shape.layers, shape.kv_heads, shape.head_dim
    rows: Shape = ("prefixes", "rows")
    states: dict[str, Shape] = {}
    kept: dict[str, Shape] = {}
    if shape.state_layers:
        state = (shape.state_layers, *rows, shape.state_width)
        states, kept = {"states": state, "kept_lengths": rows}, {"kept_states": state}
    return Graph(
        "decoder.onnx",
        "decoder.onnx.data",
        {
            "embeds": (*rows, "steps", shape.embed_width),
            "positions": (3, *rows, "steps"),
            "prefix": (layers, 2, "prefixes", heads, "prefix_steps", width),
            "prefix_lengths": ("prefixes",),
            "past": (layers, 2, "prefixes", heads, "rows", "past_steps", width),
            "past_lengths": rows,
            "logit_positions": (*rows, "wanted"),
            **states,
        },
        {
            "logits": (*rows, "wanted", shape.vocab_size),
            "hidden": (*rows, "steps", shape.hidden_size),
            "key_values": (layers, 2, "prefixes", heads, "rows", "steps", width),
            **kept,
        },
    )


class TorchSession:
    """A PyTorch module behind `GraphSession`: the reference that exports are compared with."""

    def __init__(self, module: nn.Module, interface: Graph) -> None:
        self._module, self._interface = module, interface

    def run(self, inputs: Mapping[str, Array]) -> dict[str, NDArray[np.float32]]:
        """Execute the module; see `GraphSession`."""
        arguments = (
            torch.from_numpy(np.require(inputs[n], requirements="W"))
            for n in self._interface.inputs
        )
        with torch.no_grad():
            made = self._module(*arguments)
        tensors = made if isinstance(made, tuple) else (made,)
        named = zip(self._interface.outputs, tensors, strict=True)
        return {name: tensor.numpy() for name, tensor in named}


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


def traced(module: nn.Module, interface: Graph, weight: Weight) -> ir.Model:
    """Trace a weightless module into a graph whose initialisers are read when it is saved."""
    shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
    # One zero stands for all values: no memory is taken, whatever the model's size.
    stand_ins = {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}
    example, dynamic = [], []
    for name, axes in interface.inputs.items():
        sizes = [AXES[axis][0] if isinstance(axis, str) else axis for axis in axes]
        dtype = torch.long if name in INDEX_INPUTS else torch.float32
        example.append(torch.zeros(sizes, dtype=dtype))
        dynamic.append({i: AXES[a][1] for i, a in enumerate(axes) if isinstance(a, str)})
    with without_exporter_noise():
        program = torch.onnx.export(
            WithWeights(module).eval(),
            (stand_ins, *example),
            dynamo=True,
            opset_version=OPSET,
            input_names=[*stand_ins, *interface.inputs],
            output_names=list(interface.outputs),
            dynamic_shapes=({name: None for name in stand_ins}, tuple(dynamic)),
            external_data=False,
            verbose=False,
        )
    assert program is not None
    model = program.model
    split_products(model)
    for name in stand_ins:
        initialise(model.graph, name, shapes[name], weight)
    # The exporter notes about each node where in the source code it came from.
    for noted in (model, model.graph, *model.graph):
        noted.doc_string = None
        noted.metadata_props.clear()
    for node in model.graph:
        for value in node.outputs:
            value.metadata_props.clear()
    return model


def split_products(model: ir.Model) -> None:
    """Write each Gemm with a transposed weight as the transposition, a product and a sum.

    Layers are then of one kind, however many axes their input has.
    """
    graph = model.graph
    for gemm in [node for node in graph if node.op_type == "Gemm"]:
        x, weight, *bias = gemm.inputs
        assert gemm.attributes.get_int("transB", 0)
        turned = ir.node("Transpose", [weight], {"perm": [1, 0]})
        chain = [turned, ir.node("MatMul", [x, turned.outputs[0]], name=gemm.name)]
        if bias:
            chain.append(ir.node("Add", [chain[-1].outputs[0], bias[0]]))
        ir.convenience.replace_nodes_and_values(
            graph, gemm, [gemm], chain, [gemm.outputs[0]], [chain[-1].outputs[0]]
        )


@contextmanager
def without_exporter_noise() -> Iterator[None]:
    """Silence the exporter on operators not installed, names of axes and PyTorch's own calls."""
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


def initialise(graph: ir.Graph, name: str, shape: torch.Size, weight: Weight) -> None:
    """Turn an input that stands for a parameter into an initialiser, transposed if used so."""
    value = next(v for v in graph.inputs if v.name == name)
    graph.inputs.remove(value)
    turned = [node for node in value.consumers() if node.op_type == "Transpose" and len(shape) == 2]
    if turned:
        renamed = name if len(turned) == len(value.consumers()) else f"{name}.transposed"
        value.name = f"{name}.unused"
        transposed = lazy(renamed, ir.DataType.FLOAT, shape[::-1], lambda: weight(name).T.numpy())
        made = constant(graph, transposed)
        for node in turned:
            node.outputs[0].replace_all_uses_with(made)
            graph.remove(node, safe=True)
    if value.consumers():
        value.name = name
        value.const_value = lazy(name, ir.DataType.FLOAT, shape, lambda: weight(name).numpy())
        graph.register_initializer(value)
