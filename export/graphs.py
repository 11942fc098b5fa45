"""PyTorch modules → plain ONNX graphs with dynamic shapes."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn.utils.fusion import fuse_conv_bn_eval

from meiqa.export.conv_hybrid import ConvHybridTower, ConvNorm, ResidualBlock
from meiqa.export.decoder import SharedPrefixDecoder

OPSET = 20
VISION_INPUTS, VISION_OUTPUTS = ("cells",), ("tokens",)
DECODER_INPUTS = (
    "embeds",
    "positions",
    "prefix",
    "prefix_lengths",
    "past",
    "past_lengths",
    "logit_positions",
)
DECODER_OUTPUTS = ("logits", "hidden", "key_values")


def folded_tower(tower: ConvHybridTower) -> ConvHybridTower:
    """A copy whose batch normalisations are folded into the convolutions before them."""
    tower = copy.deepcopy(tower).eval()
    for module in tower.modules():
        if isinstance(module, ConvNorm):
            module.conv = fuse_conv_bn_eval(module.conv, module.norm)
            module.norm = nn.Identity()  # type: ignore[assignment]
        elif isinstance(module, ResidualBlock):
            module.second = fuse_conv_bn_eval(module.second, module.norm)
            module.norm = nn.Identity()  # type: ignore[assignment]
    return tower


def export_vision(tower: ConvHybridTower, path: Path) -> None:
    """Write the vision graph: cells (h, w, m * m * 3 * p * p) → tokens (h * w, D)."""
    config = tower.config
    width = config.merge_size**2 * 3 * config.patch_size**2
    shapes = {"cells": {0: Dim("h", min=1, max=4096), 1: Dim("w", min=1, max=4096)}}
    export(folded_tower(tower), (torch.zeros(3, 5, width),), shapes, VISION_OUTPUTS, path)


def decoder_example(decoder: SharedPrefixDecoder) -> tuple[Tensor, ...]:
    """Inputs with every dynamic axis at a size of its own: P 2, R 3, S 5, Lp 7, Lt 11, N 4."""
    c = decoder.config
    layers, heads, width = c.num_hidden_layers, c.num_key_value_heads, c.head_dim
    return (
        torch.zeros(2, 3, 5, c.hidden_size),
        torch.zeros(3, 2, 3, 5),
        torch.zeros(layers, 2, 2, heads, 7, width),
        torch.full((2,), 7),
        torch.zeros(layers, 2, 2, heads, 3, 11, width),
        torch.full((2, 3), 11),
        torch.zeros(2, 3, 4, dtype=torch.long),
    )


def export_decoder(decoder: SharedPrefixDecoder, path: Path) -> None:
    """Write the decoder graph; names and shapes are those of `SharedPrefixDecoder.forward`."""
    p, r = Dim("prefixes", max=4096), Dim("rows", max=4096)
    s, lp, lt = (Dim(name, max=32768) for name in ("steps", "prefix_steps", "past_steps"))
    shapes = {
        "embeds": {0: p, 1: r, 2: s},
        "positions": {1: p, 2: r, 3: s},
        "prefix": {2: p, 4: lp},
        "prefix_lengths": {0: p},
        "past": {2: p, 4: r, 5: lt},
        "past_lengths": {0: p, 1: r},
        "logit_positions": {0: p, 1: r, 2: Dim("wanted", max=32768)},
    }
    export(copy.deepcopy(decoder).eval(), decoder_example(decoder), shapes, DECODER_OUTPUTS, path)


def export(
    module: nn.Module,
    example: tuple[Tensor, ...],
    shapes: dict[str, dict[int, Dim]],
    outputs: tuple[str, ...],
    path: Path,
) -> None:
    """Trace a module and write its graph."""
    torch.onnx.export(
        module,
        example,
        path,
        dynamo=True,
        opset_version=OPSET,
        input_names=list(shapes),
        output_names=list(outputs),
        dynamic_shapes=shapes,
        external_data=False,
        verbose=False,
    )
