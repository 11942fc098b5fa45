"""The conv-hybrid vision tower: convolutions see native pixels, attention sees one token a cell.

A cell is the square of pixels that becomes one visual token (`patch_size * merge_size` a side).
Texture statistics (mean and deviation of the features inside a cell, at three depths) carry what
image quality is made of; a few attention blocks then let the cells see each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_weights

from meiqa.errors import PackageCorrupted
from meiqa.export.decoder import DecoderConfig
from meiqa.export.families.base import Config, Family


@dataclass(frozen=True)
class ConvHybridConfig:
    """Shape of the tower; `hidden_size` is the decoder's width."""

    hidden_size: int
    patch_size: int = 16
    merge_size: int = 4
    widths: tuple[int, ...] = (24, 48, 80, 160, 256)
    attention_blocks: int = 2
    attention_heads: int = 4

    @property
    def cell_pixels(self) -> int:
        """Side of the square of pixels behind one visual token."""
        return self.patch_size * self.merge_size


class ConvNorm(nn.Module):
    """Convolution, batch normalisation (folded into the convolution at export), ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.norm(self.conv(x)))


class ResidualBlock(nn.Module):
    """Two convolutions around a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = ConvNorm(width, width)
        self.second = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(x + self.norm(self.second(self.first(x))))


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
        w = config.widths
        self.stem = nn.Sequential(ConvNorm(3, w[0], 2), ConvNorm(w[0], w[1], 2))
        self.stage8 = nn.Sequential(ConvNorm(w[1], w[2], 2), ResidualBlock(w[2]))
        self.stage16 = nn.Sequential(ConvNorm(w[2], w[3], 2), ResidualBlock(w[3]))
        self.stage32 = nn.Sequential(ConvNorm(w[3], w[4], 2), ResidualBlock(w[4]))
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
        return 2 * sum(self.config.widths[2:])

    def cell_features(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) → statistics (B, h, w, statistics_width) of their cells."""
        cell = self.config.cell_pixels
        at8 = self.stage8(self.stem(images))
        at16 = self.stage16(at8)
        at32 = self.stage32(at16)
        statistics = torch.cat(
            [cell_statistics(f, cell // s) for f, s in ((at8, 8), (at16, 16), (at32, 32))], -1
        )
        rows, columns = images.shape[2] // cell, images.shape[3] // cell
        return statistics.reshape(images.shape[0], rows, columns, self.statistics_width)

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


def folded(tower: ConvHybridTower) -> ConvHybridTower:
    """The tower shaped for batch normalisations that are folded into convolutions."""
    for module in tower.modules():
        if isinstance(module, ConvNorm):
            module.conv = with_bias(module.conv)
            module.norm = nn.Identity()  # type: ignore[assignment]
        elif isinstance(module, ResidualBlock):
            module.second = with_bias(module.second)
            module.norm = nn.Identity()  # type: ignore[assignment]
    return tower


def with_bias(conv: nn.Conv2d) -> nn.Conv2d:
    """A convolution of the same shape that has a bias, too."""
    return nn.Conv2d(conv.in_channels, conv.out_channels, 3, conv.stride, 1)  # type: ignore[arg-type]


def folded_weight(name: str, stored: Mapping[str, Tensor]) -> Tensor:
    """A parameter of the folded tower."""
    module, _, kind = name.rpartition(".")
    block, _, convolution = module.rpartition(".")
    if convolution not in ("conv", "second"):
        return stored[name]
    mean, variance, scale, shift = (
        stored[f"{block}.norm.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
    )
    weight = stored[f"{module}.weight"]
    weight, bias = fuse_conv_bn_weights(
        weight, None, mean, variance, nn.BatchNorm2d(1).eps, scale, shift
    )
    return weight if kind == "weight" else bias


def read_tower(config: Config) -> ConvHybridTower:
    """The folded tower of a config.json."""
    return folded(ConvHybridTower(tower_config(config)))


def tower_config(config: Config) -> ConvHybridConfig:
    """Shape of the tower in config.json."""
    try:
        vision = config["vision_config"]
        return ConvHybridConfig(**{**vision, "widths": tuple(vision["widths"])})
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
    tower_weight=folded_weight,
    prompt="meiqa",
)
"""The embedded default model: this tower before a Qwen2.5-VL decoder."""
