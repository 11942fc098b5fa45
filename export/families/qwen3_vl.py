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
from meiqa.export.families.base import Config, Family, Section, read_decoder, text_section
from meiqa.export.families.qwen2_5_vl import (
    NORM_EPS,
    VISION_NAMES,
    AxialRotary,
    PatchEmbedding,
    TowerConfig,
    VisionAttention,
    VisionBlock,
    read_grid,
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
        """Tell how much of each learned place is in each patch along one axis, (cells * m, s)."""
        size = cells * self.merge_size
        device, dtype = self.weight.device, self.weight.dtype
        place = torch.arange(size, device=device).to(dtype) * (self.side - 1) / max(size - 1, 1)
        learned = torch.arange(self.side, device=device).to(dtype)
        return torch.relu(1 - (place[:, None] - learned).abs())

    def forward(self, h: int, w: int) -> Tensor:
        """Stretch the table over the patches, (h, w, M, E)."""
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


class Merger(PlainMlp):
    """Patches of cells (h, w, M, E) → visual tokens (h * w, D), or DeepStack features of them."""

    def __init__(self, config: TowerConfig, by_cell: bool) -> None:
        """Make one that normalises whole cells (M * E), as features need, or patches (E)."""
        super().__init__(config.cell_width, config.cell_width, config.out_hidden_size, "none")
        self.by_cell = by_cell
        self.norm = nn.LayerNorm(config.cell_width if by_cell else config.hidden_size, NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x.flatten(2)) if self.by_cell else self.norm(x).flatten(2)
        return super().forward(x).flatten(0, 1)


class Qwen3VlTower(nn.Module):
    """Patches of one image (h, w, M * 3 * p * p) → (h * w, (1 + n) * D).

    A row is a visual token followed by its DeepStack features.
    """

    def __init__(self, config: TowerConfig, side: int, tapped: tuple[int, ...]) -> None:
        """Make it with `side` x `side` learned positions and features behind the tapped blocks."""
        super().__init__()
        self.tapped = tapped
        self.patch_embed = PatchEmbedding(config, bias=True)
        self.pos_embed = LearnedPositions(config, side)
        self.rotary = AxialRotary(config)
        width, inner = config.hidden_size, config.intermediate_size
        self.blocks = nn.ModuleList(
            VisionBlock(
                width, nn.LayerNorm, VisionAttention(config), PlainMlp(width, inner, width, "tanh")
            )
            for _ in range(config.depth)
        )
        self.merger = Merger(config, by_cell=False)
        self.deepstack_merger_list = nn.ModuleList(Merger(config, by_cell=True) for _ in tapped)

    def forward(self, cells: Tensor) -> Tensor:
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
    return Section("", config, VISION_NAMES).below("vision_config")


def make_tower(config: Config, deepstack: bool = True) -> Qwen3VlTower:
    vision = vision_section(config)
    vision.only("hidden_act", "gelu_pytorch_tanh")
    shape = tower_shape(vision, text_section(config).whole("hidden_size"))
    places = vision.whole("num_position_embeddings")
    side = math.isqrt(places)
    if side * side != places:
        raise vision.refuse("num_position_embeddings", "a square number")
    tapped = vision.indexes("deepstack_visual_indexes", shape.depth) if deepstack else ()
    return Qwen3VlTower(shape, side, tapped)


def decoder(config: Config) -> DecoderConfig:
    text, vision = text_section(config), vision_section(config)
    text.only("attention_bias", False)
    tapped = vision.indexes("deepstack_visual_indexes", vision.whole("num_layers"))
    if len(tapped) > text.whole("num_layers"):
        raise vision.refuse("deepstack_visual_indexes", "at most one a layer of the decoder")
    return read_decoder(
        config,
        head_dim=text.whole("head_dim"),
        attention_bias=False,
        qk_norm=True,
        mrope_interleaved=True,
        deepstack=len(tapped),
    )


FAMILY = Family(
    architecture="Qwen3VLForConditionalGeneration",
    model_type="qwen3_vl",
    tower=make_tower,
    decoder=decoder,
    grid=lambda config: read_grid(vision_section(config)),
    tower_weight=tower_weight,
)
