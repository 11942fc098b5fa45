"""Graphs of one or two layers, built by hand, and what they give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from meiqa.export.layers import save_graph
from meiqa.export.verify import PiecewiseSession

Floats = NDArray[np.float32]


def normal(seed: int, *shape: int) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def value(name: str, shape: Sequence[int | str]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))


def node(kind: str, inputs: Sequence[ir.Value], output: str, **attributes: Any) -> ir.Node:
    made = ir.node(kind, inputs, attributes)
    made.outputs[0].name = output
    return made


def model(
    x: ir.Value, nodes: Sequence[ir.Node], stored: Mapping[str, ir.Value], rank: int
) -> ir.Model:
    """A model from `x` to the last node's output."""
    output = nodes[-1].outputs[0]
    output.type, output.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([None] * rank)
    graph = ir.Graph(
        [x], [output], nodes=nodes, initializers=list(stored.values()), opset_imports={"": 21}
    )
    return ir.Model(graph, ir_version=10)


def weights(**arrays: Floats) -> dict[str, ir.Value]:
    """Initialisers, as lazy as those of a traced graph."""
    made = {}
    for name, array in arrays.items():
        made[name] = value(name, array.shape)
        made[name].const_value = ir.LazyTensor(
            lambda array=array: ir.tensor(array),  # type: ignore[misc]
            dtype=ir.DataType.FLOAT,
            shape=ir.Shape(array.shape),
            name=name,
        )
    return made


def linear(weight: Floats) -> ir.Model:
    """x (n, inputs) → y (n, outputs)."""
    x, stored = value("x", ("n", len(weight))), weights(w=weight)
    return model(x, [node("MatMul", [x, stored["w"]], "y")], stored, 2)


def convolution(weight: Floats, bias: Floats) -> ir.Model:
    """x (1, C, h, w) → minus the ReLU "r" of a convolution."""
    x, stored = value("x", (1, weight.shape[1], "h", "w")), weights(w=weight, b=bias)
    nodes = [node("Conv", [x, stored["w"], stored["b"]], "c")]
    nodes.append(node("Relu", nodes[0].outputs, "r"))
    nodes.append(node("Neg", nodes[1].outputs, "y"))
    return model(x, nodes, stored, 4)


def gated(norm: Floats, gate: Floats, up: Floats, down: Floats) -> ir.Model:
    """x (n, C) → norm weight, then SwiGLU: `down(silu(gate(x)) * up(x))`."""
    x = value("x", ("n", len(norm)))
    stored = weights(norm=norm, gate=gate, up=up, down=down)
    nodes = [node("Mul", [stored["norm"], x], "normed")]
    nodes.append(node("MatMul", [nodes[0].outputs[0], stored["gate"]], "gated"))
    nodes.append(node("Sigmoid", nodes[1].outputs, "open"))
    nodes.append(node("Mul", [nodes[1].outputs[0], nodes[2].outputs[0]], "silu"))
    nodes.append(node("MatMul", [nodes[0].outputs[0], stored["up"]], "upped"))
    nodes.append(node("Mul", [nodes[3].outputs[0], nodes[4].outputs[0]], "inner"))
    nodes.append(node("MatMul", [nodes[5].outputs[0], stored["down"]], "y"))
    return model(x, nodes, stored, 2)


def result(made: ir.Model, x: Floats, folder: Path) -> Floats:
    """Save a model and run it."""
    save_graph(made, folder / "graph.onnx")
    return PiecewiseSession(folder / "graph.onnx").run({"x": x})["y"]


def stored_values(made: ir.Model, name: str) -> NDArray[Any]:
    tensor = made.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()
