"""4-bit weights in blocks along the input, one scale a block and output channel.

Activations stay in float. A block's scale is not simply what its largest weight needs: clipping a
few weights is worth it where the others get finer steps, weighed by how strong the inputs are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from meiqa.export.calibration import Observed
from meiqa.export.layers import Layer, derived, drop_unread, followed_by, layers_of

Floats = NDArray[np.float32]
BLOCK = 32
SMALLEST, LARGEST = -8, 7
CLIPS = np.linspace(0.95, 0.65, 7, dtype=np.float32)
"""Shares of a block's largest weight that are tried as what the largest code stands for."""


def quantised(
    model: ir.Model, observed: Mapping[str, Observed], chosen: Callable[[Layer], bool]
) -> None:
    """Store the weights of linear layers as 4-bit blocks, in place.

    The weights are only read when the model is saved.

    Args:
        observed: what calibration saw of the layers' inputs; all channels count alike for others.
        chosen: which layers.
    """
    for layer in layers_of(model):
        if not layer.is_convolution and chosen(layer):
            seen = observed.get(str(layer.input.name))
            importance = np.ones(layer.shape[0]) if seen is None else seen.square
            weight = in_blocks(model.graph, layer, importance.astype(np.float32))
            layer.node.replace_input_with(1, weight)
    drop_unread(model.graph)


def in_blocks(graph: ir.Graph, layer: Layer, importance: Floats) -> ir.Value:
    """The layer's weight as 4-bit integers, made float again where it is used."""
    inputs, outputs = layer.shape
    blocks = -(-inputs // BLOCK)

    def scales(weight: Floats) -> Floats:
        return best_scales(weight, importance)

    def codes(weight: Floats) -> NDArray[np.int8]:
        return without_filling(codes_of(by_blocks(weight), scales(weight)), inputs).astype(np.int8)

    scale = derived(graph, layer.weight, "scale", ir.DataType.FLOAT, (blocks, outputs), scales)
    code = derived(graph, layer.weight, "int4", ir.DataType.INT4, layer.shape, codes)
    block = {"axis": 0, "block_size": BLOCK}
    return followed_by(
        graph, code, "float", lambda value: ir.node("DequantizeLinear", [value, scale], block)
    )


def by_blocks(weight: Floats) -> Floats:
    """(inputs, outputs) → (blocks, BLOCK, outputs), the last block filled up with zeros."""
    filled = np.pad(weight, ((0, -len(weight) % BLOCK), (0, 0)))
    return filled.reshape(-1, BLOCK, weight.shape[1])


def without_filling(blocks: Floats, inputs: int) -> Floats:
    """The opposite of `by_blocks`."""
    return blocks.reshape(-1, blocks.shape[2])[:inputs]


def codes_of(blocks: Floats, scale: Floats) -> Floats:
    """Whole numbers of steps (blocks, BLOCK, outputs) that come nearest to the weights."""
    codes: Floats = np.clip(np.rint(blocks / scale[:, None]), SMALLEST, LARGEST)
    return codes


def unclipped_scales(weight: Floats) -> Floats:
    """Scale (blocks, outputs) of plain rounding, which clips nothing; 1 where all weights are 0."""
    largest = np.abs(by_blocks(weight)).max(1)
    return np.where(largest > 0, largest / LARGEST, 1.0).astype(np.float32)


def best_scales(weight: Floats, importance: Floats) -> Floats:
    """Scale (blocks, outputs) with the least squared error, weighted by importance (inputs,)."""
    whole = unclipped_scales(weight)
    best, least = whole, block_errors(weight, whole, importance)
    for clip in CLIPS:
        scale = clip * whole
        error = block_errors(weight, scale, importance)
        better = error < least
        best, least = np.where(better, scale, best), np.where(better, error, least)
    return best


def block_errors(weight: Floats, scale: Floats, importance: Floats) -> Floats:
    """Weighted squared error (blocks, outputs) of the weights as they come back."""
    blocks = by_blocks(weight)
    error = codes_of(blocks, scale) * scale[:, None] - blocks
    weights = by_blocks(importance[:, None])[..., 0]
    weighted: Floats = np.einsum("bio,bio,bi->bo", error, error, weights)
    return weighted
