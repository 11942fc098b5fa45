"""The two vision towers that were compared, behind one interface, and the tower with its heads."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from meiqa.export.decoder import GatedMlp, RmsNorm, rotate
from meiqa.export.families.conv_hybrid import (
    LITE_0,
    ConvHybridConfig,
    ConvHybridTower,
    SameConvolution,
)
from training.distortions import KINDS, TONES

MOBILE_NET: tuple[tuple[int, int], ...] = (
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    *((512, 1),) * 5,
    (1024, 2),
    (1024, 1),
)
"""Output channels and stride of each block of the second eye."""
MEAN, STD = (127 / 255,) * 3, (128 / 255,) * 3
"""Normalisation of each channel that EfficientNet-Lite was trained with; it travels in the
manifest."""


class WindowAttentionBlock(nn.Module):
    """A block of Qwen2.5-VL's vision tower: RMS norms, 2-D rotary positions, SwiGLU."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = RmsNorm(width, 1e-6), RmsNorm(width, 1e-6)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = GatedMlp(width, width * 8 // 3)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        windows, patches, width = x.shape
        split = self.qkv(self.norm1(x)).reshape(windows, patches, 3, self.heads, -1)
        query, key, value = split.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = functional.scaled_dot_product_attention(
            rotate(query, cosine, sine), rotate(key, cosine, sine), value
        )
        x = x + self.proj(mixed.transpose(1, 2).reshape(windows, patches, width))
        x = x + self.mlp(self.norm2(x))
        return x


class WindowVitTower(nn.Module):
    """Qwen2.5-VL's tower in small: window attention, every third block sees the whole image.

    A window is 8 x 8 patches of 16 pixels, two by two cells; windows are batched.
    """

    def __init__(self, hidden_size: int, width: int = 192, depth: int = 6, heads: int = 3) -> None:
        super().__init__()
        self.patch, self.merge, self.window, self.heads = 16, 4, 8, heads
        self.embed = nn.Conv2d(3, width, self.patch, self.patch, bias=False)
        self.blocks = nn.ModuleList(WindowAttentionBlock(width, heads) for _ in range(depth))
        self.norm = RmsNorm(width, 1e-6)
        merged = width * self.merge**2
        self.merger = nn.Sequential(
            nn.Linear(merged, merged // 4), nn.GELU(), nn.Linear(merged // 4, hidden_size)
        )
        self.head_dim = width // heads

    def rotary(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine (windows, 1, patches, head_dim) of row and column positions."""
        quarter = self.head_dim // 4
        frequencies = 10_000.0 ** (-torch.arange(quarter, device=rows.device) / quarter)
        angles = torch.cat([rows[..., None] * frequencies, columns[..., None] * frequencies], -1)
        angles = torch.cat([angles, angles], -1)[:, None]
        return angles.cos(), angles.sin()

    def in_windows(self, grid: Tensor, side: int) -> Tensor:
        """(B, H, W, C) → (B * windows, side * side, C)."""
        b, h, w, c = grid.shape
        cut = grid.reshape(b, h // side, side, w // side, side, c).transpose(2, 3)
        return cut.reshape(-1, side * side, c)

    def tokens(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), sides multiples of 128 → visual tokens (B, cells, hidden_size)."""
        grid = self.embed(images).permute(0, 2, 3, 1)
        b, h, w, c = grid.shape
        count = torch.arange(h * w, device=images.device)
        row, column = (count // w).reshape(h, w), (count % w).reshape(h, w)
        place = self.in_windows(torch.stack([row, column], -1)[None].float(), self.window)
        order = self.in_windows(count.reshape(1, h, w, 1), self.window).flatten()
        cosine, sine = self.rotary(place[..., 0], place[..., 1])
        x = self.in_windows(grid, self.window)
        everywhere = (
            cosine.transpose(0, 1).flatten(1, 2)[None],
            sine.transpose(0, 1).flatten(1, 2)[None],
        )
        for index, block in enumerate(self.blocks):
            if index % 3 == 2:
                x = block(x.reshape(b, -1, c), *everywhere).reshape(x.shape)
            else:
                x = block(x, cosine.repeat(b, 1, 1, 1), sine.repeat(b, 1, 1, 1))
        plain = torch.empty_like(order)
        plain[order] = count
        restored = self.norm(x.reshape(b, h * w, c)[:, plain]).reshape(b, h, w, c)
        cells = self.in_windows(restored, self.merge).reshape(b, -1, self.merge**2 * c)
        merged: Tensor = self.merger(cells)
        return merged


class SingleConvolution(nn.Conv2d):
    """A convolution that autocast leaves in single precision."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


class ConvTower(ConvHybridTower):
    """The conv-hybrid tower behind the interface of the comparison.

    Attributes:
        in_half: whether convolutions compute in half precision (bfloat16).
    """

    in_half = False

    def seen(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) → cell statistics (B, h, w, F)."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.in_half):
            features: Tensor = self.cell_features(images)
        return features

    def tokens(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) → visual tokens (B, cells, hidden_size)."""
        return self.tokens_from_features(self.seen(images).flatten(1, 2))

    def keep_what_is_known(self) -> None:
        """Freeze what sees edges and colours: the first blocks, and every depthwise filter.

        The filters are few of the parameters, but two thirds of a step's time.
        """
        assert self.overview is not None
        first = [self.stem, *self.stages[:2], self.overview.stem, *self.overview.blocks[:3]]
        filters = [m for m in self.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
        for module in (*first, *filters):
            module.requires_grad_(False)
        for module in self.modules():
            if isinstance(module, SameConvolution) and module.after and module.conv.groups > 1:
                # Backwards through a depthwise stride, half precision is 20 times slower.
                module.conv.__class__ = SingleConvolution


def conv_config(hidden_size: int) -> ConvHybridConfig:
    """Shape of the default model's tower."""
    return ConvHybridConfig(
        hidden_size, stages=LITE_0[:-1], attention_blocks=1, overview=MOBILE_NET
    )


def make_tower(name: str, hidden_size: int) -> ConvTower | WindowVitTower:
    """The tower called `conv` or `vit`."""
    if name == "conv":
        return ConvTower(conv_config(hidden_size))
    if name == "vit":
        return WindowVitTower(hidden_size)
    raise ValueError(f"unknown tower {name!r}; allowed: conv, vit")


class JudgedTower(nn.Module):
    """A tower with the heads of its pretraining: score, distortion type and its level."""

    def __init__(self, tower: ConvTower | WindowVitTower, hidden_size: int) -> None:
        super().__init__()
        self.tower = tower
        self.mix = nn.Sequential(nn.Linear(hidden_size, hidden_size), nn.GELU())
        self.score = nn.Linear(hidden_size, 1)
        self.kind = nn.Linear(hidden_size, len(KINDS) + len(TONES) + 1)
        self.level = nn.Linear(hidden_size, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images → score (B,) on 1-5, distortion logits (B, 33), level (B,)."""
        return self.judged(self.tower.tokens(images))

    def judged(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same of visual tokens (B, cells, D)."""
        pooled = self.mix(tokens).mean(1)
        score = 3.0 + self.score(pooled).squeeze(-1)
        return score, self.kind(pooled), self.level(pooled).squeeze(-1)


def normalised(pixels: Tensor) -> Tensor:
    """uint8 (B, H, W, 3) → float (B, 3, H, W) in channels-last memory."""
    mean, std = (torch.tensor(values, device=pixels.device) for values in (MEAN, STD))
    return ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2)
