"""Static INT8 by Q/DQ: signed weights per channel, unsigned activations calibrated on pictures.

Only convolutions and linear layers are quantised. The activation's scale is fixed beforehand, so a
photo's result never depends on what else is in the batch. What stays in float: attention, norms,
the first convolution (it sees pixels) and the output layer (its logits are compared closely).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)

Feeds = Mapping[str, np.ndarray]


class RecordedFeeds(CalibrationDataReader):  # type: ignore[misc]
    """Inputs that a graph was seen to get, one call after the other."""

    def __init__(self, feeds: Iterable[Feeds]) -> None:
        self._feeds: Iterator[Feeds] = iter(feeds)

    def get_next(self) -> Feeds | None:
        """The next call's inputs, None at the end."""
        return next(self._feeds, None)


def quantise(
    source: Path, target: Path, feeds: Iterable[Feeds], kept_in_float: Iterable[str]
) -> None:
    """Write the INT8 twin of a float graph.

    Args:
        source, target: ONNX files.
        feeds: inputs to calibrate the activations on.
        kept_in_float: names of nodes that stay as they are.
    """
    quantize_static(
        source,
        target,
        RecordedFeeds(feeds),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["Conv", "MatMul"],
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod.MinMax,
        nodes_to_exclude=[*kept_in_float, *products_of_activations(source)],
    )


def products_of_activations(path: Path) -> list[str]:
    """The matrix products without weights, which are attention's.

    Besides losing accuracy, their quantised kernel leaves its output unset where nothing is summed,
    as over an empty prefix.
    """
    graph = onnx.load(path, load_external_data=False).graph
    weights = {initialiser.name for initialiser in graph.initializer}
    products = (node for node in graph.node if node.op_type == "MatMul")
    return [node.name for node in products if node.input[1] not in weights]


def float_nodes_of_vision(path: Path) -> list[str]:
    """The first convolution: it reads pixels, whose range is its accuracy."""
    nodes = onnx.load(path, load_external_data=False).graph.node
    return [next(node.name for node in nodes if node.op_type == "Conv")]


def float_nodes_of_decoder(path: Path) -> list[str]:
    """The output layer, whose closest logits decide."""
    nodes = onnx.load(path, load_external_data=False).graph.node
    return [node.name for node in nodes if "logits" in node.output]
