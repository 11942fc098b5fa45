"""PyTorch against the exported graphs, on shapes that the export has not seen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from meiqa.export.conv_hybrid import ConvHybridTower
from meiqa.export.decoder import SharedPrefixDecoder
from meiqa.export.graphs import DECODER_INPUTS, VISION_INPUTS

GRIDS = ((1, 1), (1, 7), (4, 3), (8, 8))
DECODER_SHAPES = (
    # prefixes, rows, steps, prefix steps, past steps, wanted logits
    (1, 1, 9, 0, 0, 1),
    (1, 7, 5, 13, 0, 1),
    (3, 1, 4, 6, 0, 4),
    (2, 3, 1, 5, 8, 1),
    (1, 1, 1, 17, 3, 1),
    (2, 2, 6, 0, 4, 2),
)


def largest_difference(
    module: nn.Module, path: Path, names: Sequence[str], inputs: tuple[Tensor, ...]
) -> float:
    """Largest difference between a module's outputs and its graph's; NaN if one of them is."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    feeds = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
    with torch.no_grad():
        wanted = module(*inputs)
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    pairs = zip(wanted, session.run(None, feeds), strict=True)
    return float(np.max([np.abs(w.numpy() - made).max() for w, made in pairs]))


def vision_parity(tower: ConvHybridTower, path: Path) -> float:
    """Largest difference of visual tokens over several grids."""
    generator = torch.Generator().manual_seed(0)
    width = tower.config.merge_size**2 * 3 * tower.config.patch_size**2
    cells = (torch.randn(*grid, width, generator=generator) for grid in GRIDS)
    return float(np.max([largest_difference(tower, path, VISION_INPUTS, (x,)) for x in cells]))


def decoder_parity(decoder: SharedPrefixDecoder, path: Path) -> float:
    """Largest difference of logits, hidden states and key-values over several shapes."""
    generator = torch.Generator().manual_seed(0)
    inputs = (decoder_inputs(decoder, shape, generator) for shape in DECODER_SHAPES)
    return float(np.max([largest_difference(decoder, path, DECODER_INPUTS, x) for x in inputs]))


def decoder_inputs(
    decoder: SharedPrefixDecoder,
    shape: tuple[int, int, int, int, int, int],
    generator: torch.Generator,
) -> tuple[Tensor, ...]:
    """Random inputs of (prefixes, rows, steps, prefix steps, past steps, wanted logits)."""
    p, r, s, lp, lt, n = shape
    c = decoder.config
    layers, heads, width = c.num_hidden_layers, c.num_key_value_heads, c.head_dim

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator)

    def whole(high: int, *sizes: int) -> Tensor:
        return torch.randint(0, high, sizes, generator=generator)

    return (
        normal(p, r, s, c.hidden_size) * 0.5,
        whole(64, 3, p, r, s).float(),
        normal(layers, 2, p, heads, lp, width),
        whole(lp + 1, p),
        normal(layers, 2, p, heads, r, lt, width),
        whole(lt + 1, p, r),
        whole(s, p, r, n),
    )
