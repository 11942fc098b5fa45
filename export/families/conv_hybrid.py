"""The conv-hybrid vision tower: convolutions see native pixels, attention sees one token a cell.

A cell is the square of pixels that becomes one visual token (`patch_size * merge_size` a side).
Texture statistics (mean and deviation of the features inside a cell, at six depths) carry what
image quality is made of; a few attention blocks then let the cells see each other.

The convolutions are those of EfficientNet-Lite (arXiv 1905.11946, without squeeze-and-excitation
and with ReLU6, for devices). Batch normalisations are folded into them before training.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from meiqa.errors import PackageCorrupted
from meiqa.export.decoder import DecoderConfig
from meiqa.export.families.base import Config, Family

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


@dataclass(frozen=True)
class ConvHybridConfig:
    """Shape of the tower.

    Attributes:
        hidden_size: The decoder's width.
        patch_size, merge_size: Pixels of a patch, patches of a cell, a side.
        stem_width: Channels of the first convolution.
        stages: The stages of blocks; all but the first are described by statistics.
        attention_blocks, attention_heads: What lets the cells see each other.
    """

    hidden_size: int
    patch_size: int = 16
    merge_size: int = 4
    stem_width: int = 32
    stages: tuple[Stage, ...] = LITE_0
    attention_blocks: int = 2
    attention_heads: int = 4

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
    """Mean and deviation of each feature inside each cell.

    Args:
        features: (B, C, h * window, w * window).
        window: side of a cell in feature pixels.

    Returns:
        (B, h * w, 2 * C), cells in row-major order.
    """
    mean = functional.avg_pool2d(features, window)
    square = functional.avg_pool2d(features * features, window)
    deviation = torch.sqrt(torch.relu(square - mean * mean) + 1e-5)
    return torch.cat([mean, deviation], 1).flatten(2).transpose(1, 2)


class ConvHybridTower(nn.Module):
    """Pixels of one image → one visual token a cell."""

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
        self.statistics_norm = nn.LayerNorm(self.statistics_width)
        self.embed = nn.Linear(self.statistics_width, config.hidden_size)
        self.blocks = nn.ModuleList(
            AttentionBlock(config.hidden_size, config.attention_heads)
            for _ in range(config.attention_blocks)
        )
        self.merger_norm = nn.LayerNorm(config.hidden_size)
        self.merger = nn.Linear(config.hidden_size, config.hidden_size)

    @property
    def statistics_width(self) -> int:
        """Number of statistics that describe a cell."""
        return 2 * sum(outputs for _, outputs, *_ in self.config.stages[1:])

    def cell_features(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) → statistics (B, h, w, statistics_width) of their cells."""
        cell, scale = self.config.cell_pixels, STEM_STRIDE
        rows, columns = images.shape[2] // cell, images.shape[3] // cell
        x = functional.relu6(self.stem(images))
        maps = []
        for (_, _, _, stride, _), stage in zip(self.config.stages, self.stages, strict=True):
            x, scale = stage(x), scale * stride
            maps.append((x, scale))
        statistics = [cell_statistics(features, cell // scale) for features, scale in maps[1:]]
        described = torch.cat(statistics, -1)
        return described.reshape(images.shape[0], rows, columns, self.statistics_width)

    def tokens_from_features(self, features: Tensor) -> Tensor:
        """Statistics (B, cells, statistics_width) → visual tokens (B, cells, hidden_size)."""
        x = self.embed(self.statistics_norm(features))
        for block in self.blocks:
            x = block(x)
        tokens: Tensor = self.merger(self.merger_norm(x))
        return tokens

    def unpatchify(self, cells: Tensor) -> Tensor:
        """Patches in merge-window order (h, w, m * m * 3 * p * p) → image (1, 3, H, W)."""
        h, w, _ = cells.shape
        m, p = self.config.merge_size, self.config.patch_size
        grid = cells.reshape(h, w, m, m, 3, p, p).permute(4, 0, 2, 5, 1, 3, 6)
        return grid.reshape(1, 3, h * m * p, w * m * p)

    def forward(self, cells: Tensor) -> Tensor:
        """Patches of one image (h, w, m * m * 3 * p * p) → visual tokens (h * w, hidden_size)."""
        features = self.cell_features(self.unpatchify(cells))
        return self.tokens_from_features(features.flatten(1, 2))[0]


def read_tower(config: Config) -> ConvHybridTower:
    """The tower of a config.json."""
    return ConvHybridTower(tower_config(config))


def tower_config(config: Config) -> ConvHybridConfig:
    """Shape of the tower in config.json."""
    try:
        vision = config["vision_config"]
        stages = tuple(tuple(stage) for stage in vision["stages"])
        return ConvHybridConfig(**{**vision, "stages": stages})
    except (KeyError, TypeError) as error:
        raise unreadable("vision_config", error) from error


def decoder_config(config: Config) -> DecoderConfig:
    """Shape of the decoder in config.json."""
    try:
        text = config["text_config"]
        return DecoderConfig(**{**text, "mrope_section": tuple(text["mrope_section"])})
    except (KeyError, TypeError) as error:
        raise unreadable("text_config", error) from error


def unreadable(part: str, error: Exception) -> PackageCorrupted:
    """The error for a part of config.json that has missing or unknown fields."""
    return PackageCorrupted(f"config.json has no {part} that this version reads", seen=str(error))


def grid(config: Config) -> tuple[int, int]:
    """Side of a patch in pixels, and of a cell in patches."""
    vision = tower_config(config)
    return vision.patch_size, vision.merge_size


FAMILY = Family(
    architecture="MeiqaConvHybridForConditionalGeneration",
    model_type="meiqa_conv_hybrid",
    tower=read_tower,
    decoder=decoder_config,
    grid=grid,
    prompt="meiqa",
)
"""The embedded default model: this tower before a Qwen2.5-VL decoder."""
