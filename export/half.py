"""Half precision: linear layers and convolutions in fp16, everything between them in fp32.

Beside quantised layers only the weights are stored in half: processors multiply in single, and
casting a convolution's wide activations there and back costs more than the product.

Norms, softmax, rotary positions, the residual stream and the sums with biases keep fp32: their
ranges are wide and they hold no weights worth halving.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from meiqa.errors import PackageCorrupted
from meiqa.export.layers import Layer, derived, drop_unread, followed_by, layers_of, replace_node

LARGEST = float(np.finfo(np.float16).max)


def halved(model: ir.Model, chosen: Callable[[Layer], bool] = lambda layer: True) -> None:
    """Store the weights of linear layers and convolutions as fp16 and multiply in fp16, in place.

    Args:
        model: a float graph; its weights are only read when it is saved.
        chosen: which of its layers; all if not given.

    Raises:
        PackageCorrupted: a weight is beyond fp16's range, when it is read.
    """
    for layer in layers_of(model):
        if chosen(layer):
            halve(model.graph, layer)


def halve(graph: ir.Graph, layer: Layer) -> None:
    """Replace one layer by its half, between casts; its bias is added in fp32."""
    node = layer.node
    x = followed_by(graph, layer.input, "half", lambda value: cast(value, "FLOAT16"))
    weight = derived(
        graph, layer.weight, "half", ir.DataType.FLOAT16, layer.shape, in_half_range(layer.name)
    )
    product = ir.node(node.op_type, [x, weight], dict(node.attributes), name=node.name)
    back = cast(product.outputs[0], "FLOAT")
    if layer.bias is None:
        replace_node(graph, node, [product, back])
        return
    along = (layer.shape[0], *[1] * (len(layer.shape) - 2))
    bias = derived(
        graph, layer.bias, "column", ir.DataType.FLOAT, along, lambda values: values.reshape(along)
    )
    replace_node(graph, node, [product, back, ir.node("Add", [back.outputs[0], bias])])


def stored_in_half(model: ir.Model, chosen: Callable[[Layer], bool]) -> None:
    """Store the weights of some layers as fp16 and multiply in fp32, in place; see `halved`."""
    for layer in layers_of(model):
        if chosen(layer):
            rounded = in_half_range(layer.name)
            weight = derived(
                model.graph, layer.weight, "half", ir.DataType.FLOAT16, layer.shape, rounded
            )
            single = cast(weight, "FLOAT")
            model.graph.insert_before(layer.node, single)
            layer.node.replace_input_with(1, single.outputs[0])
    drop_unread(model.graph)


def cast(value: ir.Value, kind: str) -> ir.Node:
    """A node that changes a value's type."""
    return ir.node("Cast", [value], {"to": ir.DataType[kind]})


def in_half_range(name: str) -> Callable[[NDArray[np.float32]], NDArray[np.float16]]:
    """The rounding of a weight to fp16; the name is for the error."""

    def rounded(values: NDArray[np.float32]) -> NDArray[np.float16]:
        largest = float(np.abs(values).max(initial=0.0))
        if not largest <= LARGEST:
            raise PackageCorrupted(
                f"the weight {name} does not fit into fp16",
                seen=f"{largest:g}",
                allowed=f"up to {LARGEST:g}",
                hint="export with --precision fp32",
            )
        return values.astype(np.float16)

    return rounded
