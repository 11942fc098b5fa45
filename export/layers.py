"""The layers of a graph that hold its weights, and how to rewrite them without reading them.

A weight that was changed is a lazy tensor over the one it came from, so that saving a graph reads,
changes and writes one tensor after the other, whatever the model's size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

Change = Callable[[NDArray[Any]], NDArray[Any]]


@dataclass(frozen=True)
class Layer:
    """A product with a stored matrix (MatMul, weight (inputs, outputs)) or a convolution (Conv,
    weight (outputs, inputs / groups, …))."""

    node: ir.Node
    weight: ir.Value

    @property
    def name(self) -> str:
        """Name of its weight."""
        return str(self.weight.name)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of its weight."""
        assert self.weight.const_value is not None
        return tuple(self.weight.const_value.shape.numpy())

    @property
    def input(self) -> ir.Value:
        """What it reads."""
        value = self.node.inputs[0]
        assert value is not None
        return value

    def makes(self, output: str) -> bool:
        """Whether its result has that name."""
        return self.node.outputs[0].name == output

    @property
    def bias(self) -> ir.Value | None:
        """A convolution's bias; a linear layer's is a node of its own."""
        return self.node.inputs[2] if len(self.node.inputs) > 2 else None

    def values(self) -> NDArray[np.float32]:
        """Read its weight."""
        return read(self.weight.const_value)

    @property
    def is_convolution(self) -> bool:
        """Whether it is a convolution."""
        return self.node.op_type == "Conv"

    @property
    def output_axis(self) -> int:
        """Axis of the weight that counts output channels."""
        return 0 if self.is_convolution else 1


def layers_of(model: ir.Model) -> list[Layer]:
    """All linear layers and convolutions whose weights are stored in the graph as floats, in order.

    Products of two activations, which are attention's, are none.
    """
    found = []
    for node in model.graph:
        if node.op_type in ("MatMul", "Conv") and node.inputs[1] is not None:
            weight = node.inputs[1]
            tensor = weight.const_value if weight.is_initializer() else None
            if tensor is not None and tensor.dtype == ir.DataType.FLOAT and len(tensor.shape) > 1:
                found.append(Layer(node, weight))
    return found


def derived(
    graph: ir.Graph,
    source: ir.Value,
    suffix: str,
    dtype: ir.DataType,
    shape: Sequence[int],
    change: Change,
) -> ir.Value:
    """The initialiser `<source>.<suffix>` that is computed from another whenever it is read.

    Nodes that share a weight share what is derived from it.
    """
    name = f"{source.name}.{suffix}"
    if name not in graph.initializers:
        graph.register_initializer(stored(name, changed(source, dtype, shape, change, name)))
    return graph.initializers[name]


def changed(
    source: ir.Value, dtype: ir.DataType, shape: Sequence[int], change: Change, name: str
) -> ir.LazyTensor:
    """A tensor that is computed from an initialiser's present value whenever it is read."""
    tensor = source.const_value
    return ir.LazyTensor(
        lambda: ir.tensor(np.ascontiguousarray(change(read(tensor))), dtype=dtype, name=name),
        dtype=dtype,
        shape=ir.Shape(shape),
        name=name,
    )


def read(tensor: ir.TensorProtocol | None) -> NDArray[Any]:
    """A copy of an initialiser's values, none of which stays mapped or cached."""
    assert tensor is not None
    values = np.array(tensor.numpy())
    if isinstance(tensor, ir.ExternalTensor):
        tensor.release()
    return values


def stored(name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """A value that holds a tensor, to be registered as initialiser."""
    return ir.Value(
        name=name,
        type=ir.TensorType(tensor.dtype),
        shape=ir.Shape(tensor.shape.numpy()),
        const_value=tensor,
    )


def followed_by(
    graph: ir.Graph, value: ir.Value, suffix: str, make: Callable[[ir.Value], ir.Node]
) -> ir.Value:
    """The output `<value>.<suffix>` of a node right behind a value, which all who want it share."""
    name = f"{value.name}.{suffix}"
    for reader in value.consumers():
        if reader.outputs[0].name == name:
            return reader.outputs[0]
    node = make(value)
    node.outputs[0].name = name
    producer = value.producer()
    if producer is None:
        graph.insert_before(graph[0], node)
    else:
        graph.insert_after(producer, node)
    return node.outputs[0]


def replace_node(graph: ir.Graph, node: ir.Node, chain: Sequence[ir.Node]) -> None:
    """Put a chain of nodes where one was; the last one's output takes its output's name and users.

    Weights that nobody reads any more are dropped from the graph.
    """
    ir.convenience.replace_nodes_and_values(
        graph, node, [node], chain, [node.outputs[0]], [chain[-1].outputs[0]]
    )
    drop_unread(graph)


def drop_unread(graph: ir.Graph) -> None:
    """Remove initialisers without a reader."""
    for name in [n for n, v in graph.initializers.items() if not v.uses()]:
        if not graph.initializers[name].is_graph_output():
            del graph.initializers[name]


def constant(graph: ir.Graph, name: str, values: NDArray[Any]) -> ir.Value:
    """A small initialiser, made once."""
    if name not in graph.initializers:
        graph.register_initializer(stored(name, ir.tensor(values, name=name)))
    return graph.initializers[name]


def scaled(value: ir.Value, factors: NDArray[np.float32]) -> None:
    """Multiply an initialiser, in place but only once it is read, by what broadcasts to it."""
    assert value.const_value is not None
    shape = value.const_value.shape.numpy()
    value.const_value = changed(
        value, ir.DataType.FLOAT, shape, lambda values: values * factors, str(value.name)
    )
