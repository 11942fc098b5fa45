"""LLaVA-OneVision: SigLIP sees a photo in tiles, an MLP brings it to a Qwen2 decoder.

A photo is shown as a whole and, larger, cut into tiles. The tower sees each by itself, and the
tokens of all tiles are put together line by line, with a learned mark behind each line. To the
decoder a picture is a line of tokens like text: its rotary positions have one axis.

Letters in shapes: n tiles, c patches of one, E width, H heads, d head width, D width of a visual
token, T visual tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from optimum.utils.normalized_config import NormalizedVisionConfig
from torch import Tensor, nn
from torch.nn import functional

from meiqa.errors import PackageCorrupted
from meiqa.export.decoder import DecoderConfig
from meiqa.export.families.base import (
    Config,
    Family,
    Section,
    Tilings,
    read_decoder,
    text_section,
)

PATCH_EMBEDDING = "embeddings.patch_embedding.weight"
PUBLISHED_TEXT = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False}
PUBLISHED_VISION = {"layer_norm_eps": 1e-6}
"""Figures that releases before 5 did not write out, since they are the classes' own."""
SHRUNK_ABOVE = 1.1
"""Of the side of the largest square of tiles: beyond that, transformers makes tokens fewer."""


@dataclass(frozen=True)
class TowerConfig:
    """Shape of the tower.

    Attributes:
        hidden_size: E; out_hidden_size: D; places: patches of a tile, c.
    """

    depth: int
    hidden_size: int
    intermediate_size: int
    heads: int
    out_hidden_size: int
    patch_size: int
    places: int
    eps: float
    projector_bias: bool


class Embeddings(nn.Module):
    """Pixels of patches (n, c, 3 * p * p) → what the blocks see, (n, c, E)."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.patch_embedding = nn.Linear(3 * config.patch_size**2, config.hidden_size)
        self.position_embedding = nn.Embedding(config.places, config.hidden_size)

    def forward(self, cells: Tensor) -> Tensor:
        seen: Tensor = self.patch_embedding(cells) + self.position_embedding.weight
        return seen


class Attention(nn.Module):
    """Attention among the patches of each tile."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(config.hidden_size, config.hidden_size) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            each(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for each in (self.q_proj, self.k_proj, self.v_proj)
        )
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        mixed: Tensor = self.out_proj((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))
        return mixed


class Mlp(nn.Module):
    """Two linear layers around a GELU."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(functional.gelu(self.fc1(x), approximate="tanh"))
        return out


class Block(nn.Module):
    """Attention and MLP, each behind a normalisation and a shortcut."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.eps)
        self.self_attn = Attention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.eps)
        self.mlp = Mlp(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        x = x + self.mlp(self.layer_norm2(x))
        return x


class Encoder(nn.Module):
    """All blocks."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(config) for _ in range(config.depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layers:
            x = block(x)
        return x


class Projector(nn.Module):
    """What the tower sees (n, c, E) → visual tokens (n, c, D)."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        width, bias = config.out_hidden_size, config.projector_bias
        self.linear_1 = nn.Linear(config.hidden_size, width, bias=bias)
        self.linear_2 = nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.linear_2(functional.gelu(self.linear_1(x)))
        return tokens


class LlavaOneVisionTower(nn.Module):
    """Patches of tiles (n, c, 3 * p * p) and the order (T,) of their tokens → tokens (T, D)."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.multi_modal_projector = Projector(config)
        self.image_newline = nn.Parameter(torch.zeros(config.out_hidden_size))

    def forward(self, cells: Tensor, order: Tensor) -> Tensor:
        tokens = self.multi_modal_projector(self.encoder(self.embeddings(cells))).flatten(0, 1)
        return torch.cat([tokens, self.image_newline[None]])[order]


def vision_section(config: Config) -> Section:
    vision = Section("", config, NormalizedVisionConfig.with_args(allow_new=True))
    vision = vision.below("vision_config")
    return replace(vision, values={**PUBLISHED_VISION, **vision.values})


def make_tower(config: Config) -> LlavaOneVisionTower:
    top, vision = Section("", config, NormalizedVisionConfig), vision_section(config)
    top.only("vision_feature_select_strategy", "full")
    top.only("vision_feature_layer", -1)
    top.only("projector_hidden_act", "gelu")
    vision.only("model_type", "siglip_vision_model")
    vision.only("hidden_act", "gelu_pytorch_tanh")
    vision.only("num_channels", 3)
    patch, tile = vision.whole("patch_size"), vision.whole("image_size")
    if tile < patch:
        raise vision.refuse("image_size", f"{patch} or more")
    shape = TowerConfig(
        depth=vision.whole("num_hidden_layers"),
        hidden_size=vision.whole("hidden_size"),
        intermediate_size=vision.whole("intermediate_size"),
        heads=vision.whole("num_attention_heads"),
        out_hidden_size=text_section(config).whole("hidden_size"),
        patch_size=patch,
        places=(tile // patch) ** 2,
        eps=vision.number("layer_norm_eps"),
        projector_bias=config.get("multimodal_projector_bias", True) is True,
    )
    if shape.hidden_size % shape.heads:
        raise vision.refuse("num_attention_heads", f"a divisor of {shape.hidden_size}")
    return LlavaOneVisionTower(shape)


def decoder(config: Config) -> DecoderConfig:
    """Read the decoder: of a picture's positions only that along its line of tokens turns heads."""
    text = {**PUBLISHED_TEXT, **text_section(config).values}
    if not (text.get("rope_parameters") or text.get("rope_scaling")):
        text["rope_parameters"] = {"rope_theta": text.get("rope_theta")}
    config = {**config, "text_config": text}
    section = text_section(config)
    width, heads = section.whole("hidden_size"), section.whole("num_attention_heads")
    return read_decoder(config, mrope_section=(0, 0, width // heads // 2))


def tiles(config: Config) -> tuple[int, Tilings]:
    """Read the side of a tile and how many of them, down and across, a photo may be cut into.

    Canvases on which transformers would make tokens fewer are left out.
    """
    top, side = (
        Section("", config, NormalizedVisionConfig),
        vision_section(config).whole("image_size"),
    )
    pinpoints, kind = top.value("image_grid_pinpoints"), str(top.value("vision_aspect_ratio"))
    most = kind.removeprefix("anyres_max_")
    if not most.isdecimal():
        raise top.refuse("vision_aspect_ratio", "anyres_max_ and a number of tiles")
    try:
        tilings = [(height / side, width / side) for height, width in pinpoints]
    except (TypeError, ValueError):
        tilings = []
    if not tilings or any(extent < 1 or extent % 1 for tiling in tilings for extent in tiling):
        raise top.refuse("image_grid_pinpoints", f"heights and widths, multiples of {side}")
    largest = int(most) * SHRUNK_ABOVE**2
    return side, tuple((int(r), int(c)) for r, c in tilings if r * c <= largest)


def tower_weight(name: str, stored: Mapping[str, Tensor]) -> Tensor:
    """Read a parameter of the tower: the convolution over a patch is a linear layer."""
    value = stored[name]
    if name != PATCH_EMBEDDING:
        return value
    if value.ndim != 4:
        raise PackageCorrupted(f"{name} is not a convolution", seen=list(value.shape))
    return value.flatten(1)


FAMILY = Family(
    architecture="LlavaOnevisionForConditionalGeneration",
    model_type="llava_onevision",
    tower=make_tower,
    decoder=decoder,
    grid=lambda config: (vision_section(config).whole("patch_size"), 1),
    prompt="q-sit",
    tower_weight=tower_weight,
    renamed={
        "vision_tower.vision_model.": "visual.",
        "vision_tower.": "visual.",
        "multi_modal_projector.": "visual.multi_modal_projector.",
        "image_newline": "visual.image_newline",
        "language_model.model.": "language_model.",
        "language_model.lm_head.": "language_model.lm_head.",
    },
    unread=("visual.post_layernorm.", "visual.head."),
    tiles=tiles,
)
