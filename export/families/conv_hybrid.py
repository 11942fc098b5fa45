"""The conv-hybrid vision tower: convolutions see native pixels, attention sees one token a cell.

A cell is the square of pixels that becomes one visual token (`patch_size * merge_size` a side).
Texture statistics (mean and deviation of the features inside a cell, at six depths) carry what
image quality is made of; a few attention blocks then let the cells see each other.

The convolutions are those of EfficientNet-Lite (arXiv 1905.11946, without squeeze-and-excitation
and with ReLU6, for devices). Batch normalisations are folded into them before training.

A tower with an `overview` has a second eye: MobileNet (arXiv 1704.04861) sees the picture at half
the resolution, where a cell is one place of its last map. Such a tower also has statistics of the
tones themselves, and each cell learns what the whole picture's statistics are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from meiqa.errors import PackageCorrupted
from meiqa.export.decoder import DecoderConfig
from meiqa.export.families.base import Config, Family

Shape = TypeVar("Shape", "ConvHybridConfig", DecoderConfig)
Stage = tuple[int, int, int, int, int]
"""Blocks, output channels, kernel size, stride of the first block, expansion."""

LITE_0: tuple[Stage, ...] = (
    (1, 16, 3, 1, 1),
    (2, 24, 3, 2, 6),
    (2, 40, 5, 2, 6),
    (3, 80, 3, 2, 6),
    (3, 112, 5, 1, 6),
    (4, 192, 5, 2, 6),
    (1, 320, 3, 1, 6),
)
STEM_STRIDE = 2
OVERVIEW_SCALE = 2
SMALLEST_DESCRIBED = 256
"""Maps of the overview with fewer channels have no statistics: the convolutions at native
resolution see what they see."""
NEARLY_WHITE = 0.9
"""Tones beyond this, of -1 to 1, are nearly clipped; as dark ones are below its negative."""
TONES = 8
MOST_UNUSUAL = 6.0
"""Deviations from the usual that a statistic can tell."""


@dataclass(frozen=True)
class ConvHybridConfig:
    """Shape of the tower; all stages but the first are described by statistics.

    Attributes:
        hidden_size: the decoder's width.
        patch_size, merge_size: pixels of a patch, patches of a cell, a side.
        overview: output channels and stride of each block of the second eye, which may lack.
    """

    hidden_size: int
    patch_size: int = 16
    merge_size: int = 4
    stem_width: int = 32
    stages: tuple[Stage, ...] = LITE_0
    attention_blocks: int = 2
    attention_heads: int = 4
    overview: tuple[tuple[int, int], ...] = ()

    @property
    def cell_pixels(self) -> int:
        """Side of the square of pixels behind one visual token."""
        return self.patch_size * self.merge_size


class SameConvolution(nn.Module):
    """A convolution that pads as TensorFlow does: what is left over goes below and to the right."""

    def __init__(
        self, inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__()
        lacking = size - stride
        self.after = lacking % 2
        self.conv = nn.Conv2d(inputs, outputs, size, stride, lacking // 2, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        if self.after:
            x = functional.pad(x, (0, self.after, 0, self.after))
        convolved: Tensor = self.conv(x)
        return convolved


class InvertedBottleneck(nn.Module):
    """Widen, convolve each channel by itself, narrow; around a shortcut where the shapes allow."""

    def __init__(self, inputs: int, outputs: int, size: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = inputs * expansion
        self.expand = SameConvolution(inputs, inner, 1) if expansion > 1 else None
        self.depthwise = SameConvolution(inner, inner, size, stride, groups=inner)
        self.project = SameConvolution(inner, outputs, 1)
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        inner = x if self.expand is None else functional.relu6(self.expand(x))
        made: Tensor = self.project(functional.relu6(self.depthwise(inner)))
        return x + made if self.shortcut else made


class SeparableConvolution(nn.Module):
    """Convolve each channel by itself, then mix the channels."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.depthwise = SameConvolution(inputs, inputs, 3, stride, groups=inputs)
        self.project = SameConvolution(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu6(self.project(functional.relu6(self.depthwise(x))))


class Overview(nn.Module):
    """The second eye: the picture at half its resolution → statistics of its cells."""

    def __init__(self, config: ConvHybridConfig) -> None:
        super().__init__()
        self.stem = SameConvolution(3, config.stem_width, 3, STEM_STRIDE)
        inputs = (config.stem_width, *(outputs for outputs, _ in config.overview))
        self.blocks = nn.ModuleList(
            SeparableConvolution(width, outputs, stride)
            for width, (outputs, stride) in zip(inputs, config.overview, strict=False)
        )
        scale, self.windows = STEM_STRIDE * OVERVIEW_SCALE, {}
        strides = [stride for _, stride in config.overview]
        for number, (outputs, stride) in enumerate(config.overview):
            scale *= stride
            last = number + 1 == len(strides) or strides[number + 1] > 1
            if last and outputs >= SMALLEST_DESCRIBED:
                self.windows[number] = config.cell_pixels // scale
        self.statistics_width = sum(
            config.overview[number][0] * (2 if window > 1 else 1)
            for number, window in self.windows.items()
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """Describe images (B, 3, H, W) by statistics (B, cells, .), one tensor a scale."""
        x = functional.relu6(self.stem(functional.avg_pool2d(images, OVERVIEW_SCALE)))
        statistics = []
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number in self.windows:
                statistics.append(cell_statistics(x, self.windows[number]))
        return statistics


class AttentionBlock(nn.Module):
    """Pre-norm transformer block over the cells of one image, every cell sees every other."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, cells, width = x.shape
        split = self.qkv(self.norm1(x)).reshape(batch, cells, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4).unbind(0)
        scores = query @ key.transpose(-1, -2) * (width // self.heads) ** -0.5
        mixed = (scores.softmax(-1) @ value).transpose(1, 2).reshape(batch, cells, width)
        x = x + self.proj(mixed)
        x = x + self.mlp(self.norm2(x))
        return x


def cell_statistics(features: Tensor, window: int) -> Tensor:
    """Describe each cell of features (B, C, h * window, w * window) by mean and deviation.

    Returns:
        (B, h * w, 2 * C), cells in row-major order; (B, h * w, C) where a cell is one place.
    """
    features = features.float()
    if window == 1:
        return features.flatten(2).transpose(1, 2)
    mean = functional.avg_pool2d(features, window)
    square = functional.avg_pool2d(features * features, window)
    deviation = torch.sqrt(torch.relu(square - mean * mean) + 1e-5)
    return torch.cat([mean, deviation], 1).flatten(2).transpose(1, 2)


def tones(images: Tensor) -> Tensor:
    """Give colours, brightest, darkest, their gap, both ends' clipping: (B, TONES, H, W)."""
    bright, dark = images.amax(1, keepdim=True), images.amin(1, keepdim=True)
    clipped = [functional.relu(part - NEARLY_WHITE) * 10 for part in (bright, -bright)]
    return torch.cat([images, bright, dark, bright - dark, *clipped], 1)


class Standardised(nn.Module):
    """Statistics less their usual value, in units of their usual deviation.

    Unlike a layer norm it keeps how strong all of them are: flat contrast is nothing else. What
    hardly ever happens is kept within bounds.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(width), requires_grad=False)
        self.scale = nn.Parameter(torch.ones(width), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return ((x - self.mean) * self.scale).clamp(-MOST_UNUSUAL, MOST_UNUSUAL)


class WholePicture(nn.Module):
    """Tell each cell what the mean and the deviation over all cells are."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.join = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        deviation = torch.sqrt((x - mean).square().mean(1, keepdim=True) + 1e-5)
        told: Tensor = x + self.join(torch.cat([mean, deviation], -1))
        return told


class ConvHybridTower(nn.Module):
    """Patches of one image (h, w, m * m * 3 * p * p) → visual tokens (h * w, hidden_size)."""

    def __init__(self, config: ConvHybridConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = SameConvolution(3, config.stem_width, 3, STEM_STRIDE)
        self.stages = nn.ModuleList()
        width = config.stem_width
        for blocks, outputs, size, stride, expansion in config.stages:
            shapes = [(width, stride), *[(outputs, 1)] * (blocks - 1)]
            self.stages.append(
                nn.Sequential(
                    *(InvertedBottleneck(w, outputs, size, s, expansion) for w, s in shapes)
                )
            )
            width = outputs
        self.overview = Overview(config) if config.overview else None
        norm = Standardised if self.overview else nn.LayerNorm
        self.statistics_norm = norm(self.statistics_width)
        self.embed = nn.Linear(self.statistics_width, config.hidden_size)
        self.whole = WholePicture(config.hidden_size) if self.overview else nn.Identity()
        self.blocks = nn.ModuleList(
            AttentionBlock(config.hidden_size, config.attention_heads)
            for _ in range(config.attention_blocks)
        )
        self.merger_norm = nn.LayerNorm(config.hidden_size)
        self.merger = nn.Linear(config.hidden_size, config.hidden_size)

    @property
    def statistics_width(self) -> int:
        width = 2 * sum(outputs for _, outputs, *_ in self.config.stages[1:])
        if self.overview is not None:
            width += self.overview.statistics_width + 2 * TONES
        return width

    def cell_features(self, images: Tensor) -> Tensor:
        """Describe the cells of images (B, 3, H, W) by statistics (B, h, w, statistics_width)."""
        cell, scale = self.config.cell_pixels, STEM_STRIDE
        rows, columns = images.shape[2] // cell, images.shape[3] // cell
        x = functional.relu6(self.stem(images))
        maps = []
        for (_, _, _, stride, _), stage in zip(self.config.stages, self.stages, strict=True):
            x, scale = stage(x), scale * stride
            maps.append((x, scale))
        statistics = [cell_statistics(features, cell // scale) for features, scale in maps[1:]]
        if self.overview is not None:
            statistics += [*self.overview(images), cell_statistics(tones(images), cell)]
        described = torch.cat(statistics, -1)
        return described.reshape(images.shape[0], rows, columns, self.statistics_width)

    def tokens_from_features(self, features: Tensor) -> Tensor:
        """Turn statistics (B, cells, statistics_width) into visual tokens (B, cells, D)."""
        x = self.whole(self.embed(self.statistics_norm(features)))
        for block in self.blocks:
            x = block(x)
        tokens: Tensor = self.merger(self.merger_norm(x))
        return tokens

    def unpatchify(self, cells: Tensor) -> Tensor:
        """Put patches in merge-window order together to an image (1, 3, H, W)."""
        h, w, _ = cells.shape
        m, p = self.config.merge_size, self.config.patch_size
        grid = cells.reshape(h, w, m, m, 3, p, p).permute(4, 0, 2, 5, 1, 3, 6)
        return grid.reshape(1, 3, h * m * p, w * m * p)

    def forward(self, cells: Tensor) -> Tensor:
        features = self.cell_features(self.unpatchify(cells))
        return self.tokens_from_features(features.flatten(1, 2))[0]


def tower_config(config: Config) -> ConvHybridConfig:
    return read_section(config, "vision_config", ConvHybridConfig)


def decoder_config(config: Config) -> DecoderConfig:
    return read_section(config, "text_config", DecoderConfig)


def read_section(config: Config, name: str, kind: type[Shape]) -> Shape:
    def fixed(value: Any) -> Any:
        return tuple(map(fixed, value)) if isinstance(value, list) else value

    try:
        return kind(**{field: fixed(value) for field, value in config[name].items()})
    except (KeyError, TypeError, AttributeError) as error:
        what = f"config.json has no {name} that this version reads"
        raise PackageCorrupted(what, seen=str(error)) from error


def grid(config: Config) -> tuple[int, int]:
    vision = tower_config(config)
    return vision.patch_size, vision.merge_size


FAMILY = Family(
    architecture="MeiqaConvHybridForConditionalGeneration",
    model_type="meiqa_conv_hybrid",
    tower=lambda config: ConvHybridTower(tower_config(config)),
    decoder=decoder_config,
    grid=grid,
    prompt="meiqa",
)
"""The embedded default model: this tower before a Qwen2.5-VL decoder."""
