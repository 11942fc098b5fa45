"""INT8 graphs as TensorRT takes them: activations around zero."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from meiqa.errors import PackageCorrupted


def signed_activations(model: ir.Model) -> None:
    """Make a graph's Q/DQ what TensorRT takes, in place: INT8 around zero.

    Activations in uint8 with a zero point become int8 with the scale max(|min|, |max|) / 127, so
    nothing that was representable is cut, and steps are at most twice as wide. A bias in int32
    becomes the floats that it stands for. Weights, int8 around zero, stay and are not read.

    Raises:
        PackageCorrupted: some other tensor is quantised around another value than zero.
    """
    graph = model.graph
    made: dict[tuple[ir.Value, ir.Value | None], tuple[ir.Value, ir.Value]] = {}

    def constant(name: str, values: np.ndarray) -> ir.Value:
        value = ir.Value(name=name, const_value=ir.tensor(values, name=name))
        graph.register_initializer(value)
        return value

    def signed(scale: ir.Value, zero: ir.Value) -> tuple[ir.Value, ir.Value]:
        if (scale, zero) not in made:
            offset = int(_values(zero))
            widest = float(_values(scale)) * max(offset, 255 - offset)
            name = f"{scale.name}_signed_{len(made)}"
            made[scale, zero] = (
                constant(name, np.array(widest / 127, np.float32)),
                constant(f"{name}_zero", np.array(0, np.int8)),
            )
        return made[scale, zero]

    for node in [node for node in graph if node.op_type in ("QuantizeLinear", "DequantizeLinear")]:
        tensor, scale, zero = _quantisation(node)
        if _dtype(zero) == ir.DataType.UINT8:
            for index, value in enumerate(signed(scale, zero), start=1):
                node.replace_input_with(index, value)
            if node.op_type == "QuantizeLinear":
                node.outputs[0].dtype = ir.DataType.INT8
        elif _values(zero).any():
            raise PackageCorrupted(
                "a tensor of the graph is not quantised around zero", seen=tensor.name
            )
        elif _dtype(tensor) == ir.DataType.INT32:
            floats = (_values(tensor) * _values(scale)).astype(np.float32)
            node.outputs[0].replace_all_uses_with(constant(f"{tensor.name}_float", floats))
            graph.remove(node, safe=True)
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        del graph.initializers[name]


def _quantisation(node: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Tensor, scale and zero point of a Q or DQ.

    Raises:
        PackageCorrupted: it leaves its zero point, and so its type, to the reader.
    """
    tensor, scale, zero = (*node.inputs, None)[:3]
    if tensor is None or scale is None or zero is None:
        raise PackageCorrupted(
            "a tensor of the graph is quantised without zero point", seen=node.name
        )
    return tensor, scale, zero


def _dtype(value: ir.Value) -> ir.DataType | None:
    """Type of a constant, None where there is none."""
    return None if value.const_value is None else value.const_value.dtype


def _values(value: ir.Value) -> np.ndarray:
    """Values of a constant."""
    if value.const_value is None:
        raise PackageCorrupted("a scale or zero point of the graph is computed", seen=value.name)
    array: np.ndarray = value.const_value.numpy()
    return array
