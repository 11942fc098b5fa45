"""Qwen3-VL: a vision tower with DeepStack features before a Qwen3 decoder.

Every block sees the whole image. A learned position embedding, stretched over the grid, is added to
the patches. Besides the visual tokens, mergers behind some blocks give features of the same width:
the decoder adds the k-th to its hidden states behind its layer k.

Letters in shapes: h, w cells, M = m * m patches of a cell, E width, s side of the learned table,
D width of a visual token, n DeepStack features.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from meiqa.export.decoder import DecoderConfig
from meiqa.export.families.base import (
    Config,
    Family,
    Section,
    decoder_shape,
    text_section,
)
from meiqa.export.families.qwen2_5_vl import (
    NORM_EPS,
    VISION_NAMES,
    AxialRotary,
    PatchEmbedding,
    TowerConfig,
    VisionAttention,
    tower_shape,
    tower_weight,
)


class LearnedPositions(nn.Module):
    """Learned embeddings of s x s places, stretched bilinearly over a grid of patches."""

    def __init__(self, config: TowerConfig, side: int) -> None:
        super().__init__()
        self.side, self.merge_size = side, config.merge_size
        self.weight = nn.Parameter(torch.zeros(side * side, config.hidden_size))

    def shares(self, cells: int) -> Tensor:
        """How much of each learned place is in each patch along one axis, (cells * m, s)."""
        size = cells * self.merge_size
        device, dtype = self.weight.device, self.weight.dtype
        place = torch.arange(size, device=device).to(dtype) * (self.side - 1) / max(size - 1, 1)
        learned = torch.arange(self.side, device=device).to(dtype)
        return torch.relu(1 - (place[:, None] - learned).abs())

    def forward(self, h: int, w: int) -> Tensor:
        """Embeddings of the patches, (h, w, M, E)."""
        m, width = self.merge_size, self.weight.shape[1]
        table = self.weight.reshape(self.side, self.side * width)
        rows = (self.shares(h) @ table).reshape(h * m, self.side, width)
        places = (self.shares(w) @ rows).reshape(h, m, w, m, width)
        return places.transpose(1, 2).reshape(h, w, m * m, width)


class PlainMlp(nn.Module):
    """Two linear layers around a GELU."""

    def __init__(self, inputs: int, inner: int, outputs: int, approximate: str) -> None:
        super().__init__()
        self.linear_fc1 = nn.Linear(inputs, inner)
        self.activation = nn.GELU(approximate)
        self.linear_fc2 = nn.Linear(inner, outputs)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear_fc2(self.activation(self.linear_fc1(x)))
        return out


class VisionBlock(nn.Module):
    """Attention and MLP, each behind a normalisation and a shortcut."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.norm1 = nn.LayerNorm(width, NORM_EPS)
        self.attn = VisionAttention(config)
        self.norm2 = nn.LayerNorm(width, NORM_EPS)
        self.mlp = PlainMlp(width, config.intermediate_size, width, "tanh")

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attn(self.norm1(x), rotary, None)
        x = x + self.mlp(self.norm2(x))
        return x


class Merger(PlainMlp):
    """The patches of a cell → one visual token, or one DeepStack feature of it."""

    def __init__(self, config: TowerConfig, by_cell: bool) -> None:
        """Make one that normalises whole cells (M * E), as features need, or patches (E)."""
        super().__init__(config.cell_width, config.cell_width, config.out_hidden_size, "none")
        self.by_cell = by_cell
        self.norm = nn.LayerNorm(config.cell_width if by_cell else config.hidden_size, NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """(h, w, M, E) → (h * w, D)."""
        x = self.norm(x.flatten(2)) if self.by_cell else self.norm(x).flatten(2)
        return super().forward(x).flatten(0, 1)


class Qwen3VlTower(nn.Module):
    """Pixels of one image → one visual token a cell and its DeepStack features."""

    def __init__(self, config: TowerConfig, side: int, tapped: tuple[int, ...]) -> None:
        """Make it with `side` x `side` learned positions and features behind the tapped blocks."""
        super().__init__()
        self.tapped = tapped
        self.patch_embed = PatchEmbedding(config, bias=True)
        self.pos_embed = LearnedPositions(config, side)
        self.rotary = AxialRotary(config)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.merger = Merger(config, by_cell=False)
        self.deepstack_merger_list = nn.ModuleList(Merger(config, by_cell=True) for _ in tapped)

    def forward(self, cells: Tensor) -> Tensor:
        """Patches of one image (h, w, M * 3 * p * p) → (h * w, (1 + n) * D).

        A row is a visual token followed by its DeepStack features.
        """
        h, w, _ = cells.shape
        rotary = self.rotary(h, w)
        x = self.patch_embed(cells) + self.pos_embed(h, w)
        features: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            x = block(x, rotary)
            if index in self.tapped:
                features.append(self.deepstack_merger_list[len(features)](x))
        return torch.cat([self.merger(x), *features], -1)


def vision_section(config: Config) -> Section:
    """The tower's fields."""
    return Section("", config, VISION_NAMES).below("vision_config")


def make_tower(config: Config) -> Qwen3VlTower:
    """Vision tower of a config.json.

    Raises:
        PackageCorrupted: a field is missing, unreadable or does not fit the others.
    """
    vision = vision_section(config)
    vision.only("hidden_act", "gelu_pytorch_tanh")
    shape = tower_shape(vision, text_section(config).whole("hidden_size"))
    places = vision.whole("num_position_embeddings")
    side = math.isqrt(places)
    if side * side != places:
        raise vision.refuse("num_position_embeddings", "a square number")
    return Qwen3VlTower(shape, side, vision.indexes("deepstack_visual_indexes", shape.depth))


def decoder(config: Config) -> DecoderConfig:
    """Shape of the decoder in a config.json.

    Raises:
        PackageCorrupted: a field is missing, unreadable or asks for what the graph can't do.
    """
    text, vision = text_section(config), vision_section(config)
    text.only("attention_bias", False)
    tapped = vision.indexes("deepstack_visual_indexes", vision.whole("num_layers"))
    if len(tapped) > text.whole("num_layers"):
        raise vision.refuse("deepstack_visual_indexes", "at most one a layer of the decoder")
    return decoder_shape(
        config,
        head_dim=text.whole("head_dim"),
        attention_bias=False,
        qk_norm=True,
        mrope_interleaved=True,
        deepstack=len(tapped),
    )


def grid(config: Config) -> tuple[int, int]:
    """Pixels a patch and patches a cell, each along one side."""
    vision = vision_section(config)
    return vision.whole("patch_size"), vision.whole("spatial_merge_size")


FAMILY = Family(
    architecture="Qwen3VLForConditionalGeneration",
    model_type="qwen3_vl",
    tower=make_tower,
    decoder=decoder,
    grid=grid,
    tower_weight=tower_weight,
)
