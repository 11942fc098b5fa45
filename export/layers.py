"""The layers of a graph that hold its weights, rewritten without being read.

A weight that was changed is a lazy tensor over the one it came from: saving a graph reads, changes
and writes one tensor after the other, whatever the model's size.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from meiqa.errors import PackageCorrupted

LARGEST_HALF = float(np.finfo(np.float16).max)
LOCK = ".lock"
SMALL_BYTES = 256
"""Tensors up to this size lie in the graph's file itself."""
Change = Callable[[NDArray[Any]], NDArray[Any]]


class Layer(NamedTuple):
    """A product with a stored matrix (MatMul, weight (inputs, outputs)) or a convolution (Conv,
    weight (outputs, inputs / groups, …))."""

    node: ir.Node
    weight: ir.Value

    @property
    def name(self) -> str:
        return str(self.weight.name)

    @property
    def shape(self) -> tuple[int, ...]:
        assert self.weight.const_value is not None
        return tuple(self.weight.const_value.shape.numpy())

    @property
    def input(self) -> ir.Value:
        value = self.node.inputs[0]
        assert value is not None
        return value

    @property
    def bias(self) -> ir.Value | None:
        """A convolution's bias; a linear layer's is a node of its own."""
        return self.node.inputs[2] if len(self.node.inputs) > 2 else None

    @property
    def is_convolution(self) -> bool:
        return self.node.op_type == "Conv"


def layers_of(model: ir.Model) -> list[Layer]:
    """Find all linear layers and convolutions whose weights are stored as floats, in order.

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
    source: ir.Value, suffix: str, dtype: ir.DataType, shape: Sequence[int], change: Change
) -> ir.Value:
    """Give the initialiser `<source>.<suffix>` that is computed from another when it is read.

    Nodes that share a weight share what is derived from it.
    """
    name, tensor = f"{source.name}.{suffix}", source.const_value
    values = lazy(name, dtype, shape, lambda: change(read(tensor)))
    return constant(graph_of(source), values)


def graph_of(value: ir.Value) -> ir.Graph:
    graph = value.graph
    assert isinstance(graph, ir.Graph)
    return graph


def lazy(
    name: str, dtype: ir.DataType, shape: Sequence[int], values: Callable[[], NDArray[Any]]
) -> ir.LazyTensor:
    """Make a tensor whose values are computed whenever it is read."""
    return ir.LazyTensor(
        lambda: ir.tensor(np.ascontiguousarray(values()), dtype=dtype, name=name),
        dtype=dtype,
        shape=ir.Shape(shape),
        name=name,
    )


def constant(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    """Give the initialiser of a tensor's name, made of it unless there is one."""
    name = str(tensor.name)
    if name not in graph.initializers:
        dtype, shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.shape.numpy())
        value = ir.Value(name=name, type=dtype, shape=shape, const_value=tensor)
        graph.register_initializer(value)
    return graph.initializers[name]


def scale(value: ir.Value, factors: NDArray[np.float32]) -> None:
    """Multiply an initialiser, in place but only once it is read, by what broadcasts to it."""
    tensor, name = value.const_value, str(value.name)
    assert tensor is not None
    shape = tensor.shape.numpy()
    value.const_value = lazy(name, ir.DataType.FLOAT, shape, lambda: read(tensor) * factors)


def read(tensor: ir.TensorProtocol | None) -> NDArray[Any]:
    """Copy an initialiser's values, none of which stays mapped or cached."""
    assert tensor is not None
    values = np.array(tensor.numpy())
    if isinstance(tensor, ir.ExternalTensor):
        tensor.release()
    return values


def followed_by(value: ir.Value, suffix: str, make: Callable[[ir.Value], ir.Node]) -> ir.Value:
    """Give the output `<value>.<suffix>` of a node right behind a value, shared by all readers."""
    name = f"{value.name}.{suffix}"
    for reader in value.consumers():
        if reader.outputs[0].name == name:
            return reader.outputs[0]
    node = make(value)
    node.outputs[0].name = name
    producer = value.producer()
    graph = graph_of(value)
    if producer is None:
        graph.insert_before(graph[0], node)
    else:
        graph.insert_after(producer, node)
    return node.outputs[0]


def drop_unread(graph: ir.Graph) -> None:
    for name in [n for n, v in graph.initializers.items() if not v.uses()]:
        if not graph.initializers[name].is_graph_output():
            del graph.initializers[name]


def cast(value: ir.Value, kind: str) -> ir.Node:
    return ir.node("Cast", [value], {"to": ir.DataType[kind]})


def halve(model: ir.Model) -> None:
    """Store the weights of all layers as fp16 and multiply in fp16, in place.

    Norms, softmax, rotary positions, the residual stream and the sums with biases keep fp32: their
    ranges are wide and they hold no weights worth halving.
    """
    for layer in layers_of(model):
        node, weight = layer.node, half_weight(layer)
        x = followed_by(layer.input, "half", lambda value: cast(value, "FLOAT16"))
        product = ir.node(node.op_type, [x, weight], dict(node.attributes), name=node.name)
        chain = [product, cast(product.outputs[0], "FLOAT")]
        if layer.bias is not None:  # it is added in fp32
            column = (layer.shape[0], *[1] * (len(layer.shape) - 2))
            floats = ir.DataType.FLOAT
            bias = derived(layer.bias, "column", floats, column, partial(np.reshape, shape=column))
            chain.append(ir.node("Add", [chain[-1].outputs[0], bias]))
        ir.convenience.replace_nodes_and_values(
            model.graph, node, [node], chain, [node.outputs[0]], [chain[-1].outputs[0]]
        )
    drop_unread(model.graph)


def store_as_half(model: ir.Model, chosen: Callable[[Layer], bool]) -> None:
    """Store the weights of some layers as fp16 and multiply in fp32, in place; see `halve`.

    Processors multiply in single, and casting a convolution's wide activations there and back
    costs more than the product.
    """
    for layer in layers_of(model):
        if chosen(layer):
            single = cast(half_weight(layer), "FLOAT")
            model.graph.insert_before(layer.node, single)
            layer.node.replace_input_with(1, single.outputs[0])
    drop_unread(model.graph)


def half_weight(layer: Layer) -> ir.Value:
    def rounded(values: NDArray[np.float32]) -> NDArray[np.float16]:
        largest = float(np.abs(values).max(initial=0.0))
        if not largest <= LARGEST_HALF:
            raise PackageCorrupted(
                f"the weight {layer.name} does not fit into fp16",
                seen=f"{largest:g}",
                allowed=f"up to {LARGEST_HALF:g}",
                hint="export with --precision fp32",
            )
        return values.astype(np.float16)

    return derived(layer.weight, "half", ir.DataType.FLOAT16, layer.shape, rounded)


def save_graph(model: ir.Model, path: Path) -> None:
    """Write a graph and, beside it, its weights, one tensor after the other."""
    ir.save(model, path, external_data=f"{path.name}.data")


def save_changes(model: ir.Model, path: Path) -> None:
    """Write a graph beside the file that it was loaded from, and only those weights that differ.

    Weights that are as they were stay where they are, in that file's own.
    """
    changed = {
        value: tensor
        for value in model.graph.initializers.values()
        if (tensor := value.const_value) is not None
        and not isinstance(tensor, ir.ExternalTensor)
        and tensor.nbytes > SMALL_BYTES
    }
    written = ir.external_data.convert_tensors_to_external(
        list(changed.values()), path.parent, f"{path.name}.data"
    )
    for value, tensor in zip(changed, written, strict=True):
        value.const_value = tensor
    ir.save(model, path)


@contextmanager
def temporary_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """Make a folder in `parent` that vanishes at the end, unless it has another name by then.

    Folders with the same prefix that killed processes left behind are removed first: a lock is
    held on those in which somebody works.
    """
    for left in parent.glob(f"{prefix}*"):
        # One that has no lock yet is being made, and one that vanishes meanwhile needs no removing.
        with suppress(FileNotFoundError, NotADirectoryError):
            lock = os.open(left / LOCK, os.O_RDWR)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left)
            except BlockingIOError:
                continue
            finally:
                os.close(lock)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    lock = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder
    finally:
        os.close(lock)
        shutil.rmtree(folder, ignore_errors=True)
