"""Qwen2.5-VL: a vision tower with window attention before a Qwen2 decoder.

The grid is h x w cells of m x m patches, and a cell becomes one visual token. Most blocks attend
inside windows of `side` x `side` cells; those at the right and bottom edges are smaller. They are
computed as one batch: the grid is padded to whole windows and the padding is masked.

Letters in shapes: h, w cells, M = m * m patches of a cell, E width, H heads, d head width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from optimum.utils.normalized_config import NormalizedVisionConfig
from torch import Tensor, nn
from torch.nn import functional

from meiqa.errors import PackageCorrupted
from meiqa.export.decoder import MASKED, GatedMlp, RmsNorm, rotate
from meiqa.export.families.base import Config, Family, Section, read_decoder, text_section

NORM_EPS = 1e-6
PATCH_EMBEDDING = "patch_embed.proj.weight"
VISION_NAMES = NormalizedVisionConfig.with_args(
    allow_new=True, num_layers="depth", num_attention_heads="num_heads"
)
PUBLISHED_VISION = {
    "depth": 32,
    "intermediate_size": 3420,
    "num_heads": 16,
    "out_hidden_size": 3584,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
"""Figures of the published towers: transformers 4.49 to 4.51 did not write out what equals them."""

ROTARY = {"rope_parameters": {"rope_theta": 10_000.0}}
"""The towers' rotary positions, which transformers writes out since version 5."""


@dataclass(frozen=True)
class TowerConfig:
    """Shape that the towers of both Qwen families have in common.

    Attributes:
        hidden_size: E; out_hidden_size: width of a visual token, which is the decoder's.
        patch_size: pixels along a side of a patch; merge_size: patches along a side of a cell, m.
    """

    depth: int
    hidden_size: int
    intermediate_size: int
    heads: int
    out_hidden_size: int
    patch_size: int
    merge_size: int
    rope_theta: float

    @property
    def cell_width(self) -> int:
        return self.hidden_size * self.merge_size**2


def tower_shape(vision: Section, text_width: int) -> TowerConfig:
    """Read the shape of a tower before a decoder of some width."""
    vision = replace(vision, values={**ROTARY, **vision.values})
    for name in ("in_channels", "in_chans"):
        vision.only(name, 3)
    shape = TowerConfig(
        depth=vision.whole("num_layers"),
        hidden_size=vision.whole("hidden_size"),
        intermediate_size=vision.whole("intermediate_size"),
        heads=vision.whole("num_attention_heads"),
        out_hidden_size=vision.whole("out_hidden_size"),
        patch_size=vision.whole("patch_size"),
        merge_size=vision.whole("spatial_merge_size"),
        rope_theta=vision.below("rope_parameters").number("rope_theta"),
    )
    if shape.hidden_size % (4 * shape.heads):  # rotary: two axes, each with pairs of channels
        raise vision.refuse("num_attention_heads", f"a divisor of {shape.hidden_size} / 4")
    if shape.out_hidden_size != text_width:
        raise vision.refuse("out_hidden_size", f"the decoder's width, {text_width}")
    return shape


class PatchEmbedding(nn.Module):
    """Pixels of patches (h, w, M * 3 * p * p) → their embeddings (h, w, M, E)."""

    def __init__(self, config: TowerConfig, bias: bool) -> None:
        super().__init__()
        self.patches = config.merge_size**2
        self.proj = nn.Linear(3 * config.patch_size**2, config.hidden_size, bias=bias)

    def forward(self, cells: Tensor) -> Tensor:
        h, w, _ = cells.shape
        out: Tensor = self.proj(cells.reshape(h, w, self.patches, self.proj.in_features))
        return out


class AxialRotary(nn.Module):
    """Rotary positions of patches: half of the channels turn by row, half by column."""

    frequencies: Tensor

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.merge_size = config.merge_size
        count = config.hidden_size // config.heads // 4
        exponents = -torch.arange(count, dtype=torch.float32) / count
        self.register_buffer("frequencies", config.rope_theta**exponents, persistent=False)

    def angles(self, cells: int) -> Tensor:
        """Angles (cells, m, d / 4) along one axis."""
        device = self.frequencies.device
        cell = torch.arange(cells, device=device) * self.merge_size
        place = cell[:, None] + torch.arange(self.merge_size, device=device)
        return place.to(self.frequencies.dtype).unsqueeze(-1) * self.frequencies

    def forward(self, h: int, w: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine, each (h, w, M, 1, d)."""
        m = self.merge_size
        rows, columns = self.angles(h)[:, None, :, None], self.angles(w)[None, :, None, :]
        shape = (h, w, m, m, rows.shape[-1])
        angles = torch.cat([rows.expand(shape), columns.expand(shape)], -1)
        angles = torch.cat([angles, angles], -1).reshape(h, w, m * m, 1, 4 * rows.shape[-1])
        return angles.cos(), angles.sin()


def windows_along(cells: int, side: int) -> int:
    return (cells + side - 1) // side


def into_windows(x: Tensor, side: int) -> Tensor:
    """(h, w, M, ...) → (windows, side * side * M, ...), padded with zeros to whole windows."""
    h, w, patches, *rest = x.shape
    down, across = windows_along(h, side), windows_along(w, side)
    beyond = (0, 0) * (len(rest) + 1) + (0, across * side - w, 0, down * side - h)
    x = functional.pad(x, beyond)
    x = x.reshape(down, side, across, side, patches, *rest).transpose(1, 2)
    return x.reshape(down * across, side * side * patches, *rest)


def out_of_windows(x: Tensor, h: int, w: int, side: int) -> Tensor:
    """(windows, side * side * M, E) → (h, w, M, E), without the padding."""
    down, across = windows_along(h, side), windows_along(w, side)
    x = x.reshape(down, across, side, side, x.shape[1] // side**2, x.shape[2]).transpose(1, 2)
    x = x.reshape(down * side, across * side, x.shape[4], x.shape[5])
    return x[:h, :w]


class VisionAttention(nn.Module):
    """Attention among all patches of an image, or among those of each window."""

    def __init__(self, config: TowerConfig, side: int = 0) -> None:
        """Make it for windows of `side` x `side` cells, or with 0 for the whole image."""
        super().__init__()
        self.heads, self.side = config.heads, side
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], bias: Tensor | None) -> Tensor:
        """Mix (h, w, M, E), with cosine and sine (h, w, M, 1, d) and a bias (windows, 1, 1, N)."""
        h, w, patches, width = x.shape
        split = (h, w, patches, 3, self.heads, width // self.heads)
        query, key, value = self.qkv(x).reshape(split).unbind(3)
        query, key = rotate(query, *rotary) * split[-1] ** -0.5, rotate(key, *rotary)
        query, key, value = self.grouped(query), self.grouped(key), self.grouped(value)
        scores = query.transpose(1, 2) @ key.permute(0, 2, 3, 1)
        if bias is not None:
            scores = scores + bias
        mixed = (scores.softmax(-1) @ value.transpose(1, 2)).transpose(1, 2).flatten(2)
        if self.side:
            mixed = out_of_windows(mixed, h, w, self.side)
        out: Tensor = self.proj(mixed.reshape(x.shape))
        return out

    def grouped(self, x: Tensor) -> Tensor:
        """(h, w, M, H, d) → (B, N, H, d): one group a window, or one of all patches."""
        return into_windows(x, self.side) if self.side else x.flatten(0, 2).unsqueeze(0)


class VisionBlock(nn.Module):
    """Attention and MLP, each behind a normalisation and a shortcut."""

    def __init__(
        self, width: int, norm: Callable[[int, float], nn.Module], attn: nn.Module, mlp: nn.Module
    ) -> None:
        super().__init__()
        self.norm1 = norm(width, NORM_EPS)
        self.attn = attn
        self.norm2 = norm(width, NORM_EPS)
        self.mlp = mlp

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], bias: Tensor | None = None
    ) -> Tensor:
        x = x + self.attn(self.norm1(x), rotary, bias)
        x = x + self.mlp(self.norm2(x))
        return x


class Merger(nn.Module):
    """Patches of cells (h, w, M, E) → visual tokens (h * w, D)."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.ln_q = RmsNorm(config.hidden_size, NORM_EPS)
        self.mlp = nn.Sequential(
            nn.Linear(config.cell_width, config.cell_width),
            nn.GELU(),
            nn.Linear(config.cell_width, config.out_hidden_size),
        )

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.mlp(self.ln_q(x).flatten(2))
        return tokens.flatten(0, 1)


class Qwen25VlTower(nn.Module):
    """Patches of one image (h, w, M * 3 * p * p) → visual tokens (h * w, D)."""

    def __init__(self, config: TowerConfig, side: int, full_blocks: tuple[int, ...]) -> None:
        """Make it with windows of `side` x `side` cells but in the full-attention blocks."""
        super().__init__()
        self.patches, self.side, self.full_blocks = config.merge_size**2, side, full_blocks
        self.patch_embed = PatchEmbedding(config, bias=False)
        self.rotary = AxialRotary(config)
        width, inner = config.hidden_size, config.intermediate_size
        self.blocks = nn.ModuleList(
            VisionBlock(
                width,
                RmsNorm,
                VisionAttention(config, 0 if index in full_blocks else side),
                GatedMlp(width, inner, bias=True),
            )
            for index in range(config.depth)
        )
        self.merger = Merger(config)

    def forward(self, cells: Tensor) -> Tensor:
        h, w, _ = cells.shape
        rotary = self.rotary(h, w)
        real = into_windows(cells.new_ones(h, w, self.patches), self.side)
        bias = ((1 - real) * MASKED)[:, None, None, :]  # hides the padding of the windows
        x = self.patch_embed(cells)
        for index, block in enumerate(self.blocks):
            x = block(x, rotary, None if index in self.full_blocks else bias)
        tokens: Tensor = self.merger(x)
        return tokens


def make_tower(config: Config) -> Qwen25VlTower:
    vision = vision_section(config)
    vision.only("hidden_act", "silu")
    shape = tower_shape(vision, text_section(config).whole("hidden_size"))
    side = vision.whole("window_size") // shape.merge_size // shape.patch_size
    if not side:
        raise vision.refuse("window_size", f"at least {shape.merge_size * shape.patch_size}")
    return Qwen25VlTower(shape, side, vision.indexes("fullatt_block_indexes", shape.depth))


def vision_section(config: Config) -> Section:
    """Find the tower's fields, with the published figures where they were left out."""
    vision = Section("", config, VISION_NAMES).below("vision_config")
    return replace(vision, values={**PUBLISHED_VISION, **vision.values})


def read_grid(vision: Section) -> tuple[int, int]:
    return vision.whole("patch_size"), vision.whole("spatial_merge_size")


def tower_weight(name: str, stored: Mapping[str, Tensor]) -> Tensor:
    """Read the value of one parameter of the tower.

    A still picture is the same frame throughout the patch's time, so that the stored convolution
    over time and patch is a linear layer with its weights summed over time, in single precision.
    """
    if name not in stored:
        raise PackageCorrupted(f"the checkpoint lacks visual.{name}")
    value = stored[name]
    if name != PATCH_EMBEDDING:
        return value
    if value.ndim != 5:
        raise PackageCorrupted(
            f"visual.{name} is not a convolution over time and patch", seen=list(value.shape)
        )
    return value.float().sum(2).flatten(1)


FAMILY = Family(
    architecture="Qwen2_5_VLForConditionalGeneration",
    model_type="qwen2_5_vl",
    tower=make_tower,
    decoder=read_decoder,
    grid=lambda config: read_grid(vision_section(config)),
    tower_weight=tower_weight,
)
