"""The text decoder of Qwen2.5-VL and Qwen3-VL as one graph with a prompt in three segments.

* prefix: keys and values of P image prefixes, each shared by R rows and never copied.
* past: keys and values that the rows generated themselves so far.
* own: the tokens of this call.

Row (p, r) continues prefix p. The queries of all rows of a prefix are folded into one matrix
against it, so R comparisons of one photo read its keys and values once.

Qwen3-VL's visual tokens carry n DeepStack features beside them, and those of text carry zeros:
embeddings are then 1 + n widths wide, and the k-th feature joins the hidden states behind layer k.

Letters in shapes: P prefixes, R rows of each, S own tokens, Lp prefix tokens, Lt past tokens,
N tokens whose logits are wanted, L layers, H key-value heads, g query heads to one of them,
d head width, D hidden width, n DeepStack features of a token, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from meiqa.engine.manifest import DecoderShape

MASKED = -1e9
"""Added to the score of a position that must not be seen; finite, so that softmax stays defined."""


@dataclass(frozen=True)
class DecoderConfig:
    """Shape of the decoder, with the field names of Hugging Face's `text_config`.

    Attributes:
        mrope_section: rotary channels of the temporal, row and column axis, which alternate channel
            by channel if they are interleaved.
        head_dim: 0 means hidden_size / num_attention_heads.
        deepstack: features that each embedding carries for the first layers, n.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    mrope_section: tuple[int, int, int]
    rope_theta: float = 1_000_000.0
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    head_dim: int = 0
    attention_bias: bool = True
    qk_norm: bool = False
    mrope_interleaved: bool = False
    deepstack: int = 0

    def __post_init__(self) -> None:
        if not self.head_dim:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)

    @property
    def shape(self) -> DecoderShape:
        """What the host has to know of the decoder."""
        return DecoderShape(
            layers=self.num_hidden_layers,
            kv_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            hidden_size=self.hidden_size,
            vocab_size=self.vocab_size,
            deepstack=self.deepstack,
        )


class Segments(NamedTuple):
    """What the rows of a call attend to besides their own tokens; see `forward` of the decoder.

    Keys and values are padded; of each prefix and past only so many as its length says are real.
    """

    prefix: Tensor
    prefix_lengths: Tensor
    past: Tensor
    past_lengths: Tensor


class RmsNorm(nn.Module):
    """Root-mean-square normalisation with a learned scale."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Apply rotary positions to (..., S, d) with tables that broadcast to it."""
    low, high = x.chunk(2, -1)
    return x * cosine + torch.cat([-high, low], -1) * sine


class SegmentedAttention(nn.Module):
    """Grouped-query attention over prefix, past and own tokens with one softmax."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.kv_heads = config.num_key_value_heads
        self.group = config.num_attention_heads // config.num_key_value_heads
        self.head_dim = config.head_dim
        width, kv_width = config.num_attention_heads * self.head_dim, self.kv_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.q_norm, self.k_norm = (
            RmsNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
            for _ in "qk"
        )

    def by_kv_head(self, x: Tensor) -> Tensor:
        """Turn (P, R, S, H * d) into (P, H, R, S, d)."""
        return x.reshape(*x.shape[:3], self.kv_heads, self.head_dim).permute(0, 3, 1, 2, 4)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        prefix: Tensor,
        prefix_bias: Tensor,
        past: Tensor,
        own_bias: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Mix hidden states x (P, R, S, D), normalised.

        Args:
            rotary: cosine and sine, each (P, 1, R, S, d).
            prefix: (2, P, H, Lp, d), with its bias (P, 1, 1, 1, Lp), 0 or MASKED.
            past: (2, P, H, R, Lt, d), with the bias of past and own (P, 1, R, 1, S, Lt + S).

        Returns:
            The mixed values (P, R, S, D) and the new keys and values (2, P, H, R, S, d).
        """
        p, r, s, _ = x.shape
        h, g, d = self.kv_heads, self.group, self.head_dim
        query = self.q_norm(self.q_proj(x).reshape(p, r, s, h, g, d)).permute(0, 3, 1, 4, 2, 5)
        query = rotate(query, *(table.unsqueeze(3) for table in rotary)) * d**-0.5
        query = query.reshape(p, h, r, g * s, d)
        key = rotate(self.k_norm(self.by_kv_head(self.k_proj(x))), *rotary)
        value = self.by_kv_head(self.v_proj(x))
        own_keys, own_values = torch.cat([past[0], key], 3), torch.cat([past[1], value], 3)

        seen = query.reshape(p, h, r * g * s, d) @ prefix[0].transpose(-1, -2)
        seen = seen.reshape(p, h, r, g * s, seen.shape[-1]) + prefix_bias
        own = query @ own_keys.transpose(-1, -2)
        own = (own.reshape(p, h, r, g, s, own.shape[-1]) + own_bias).reshape(own.shape)
        weights = torch.cat([seen, own], -1).softmax(-1)
        of_prefix, of_own = torch.split(weights, [seen.shape[-1], own.shape[-1]], -1)
        mixed = of_prefix.reshape(p, h, r * g * s, seen.shape[-1]) @ prefix[1]
        mixed = mixed.reshape(p, h, r, g * s, d) + of_own @ own_values
        mixed = mixed.reshape(p, h, r, g, s, d).permute(0, 2, 4, 1, 3, 5)
        return self.o_proj(mixed.reshape(p, r, s, h * g * d)), torch.stack([key, value])


class GatedMlp(nn.Module):
    """SwiGLU."""

    def __init__(self, width: int, inner: int, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=bias)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class DecoderLayer(nn.Module):
    """Attention and gated MLP, each behind a normalisation and a shortcut."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.input_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SegmentedAttention(config)
        self.post_attention_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMlp(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, *seen: Any) -> tuple[Tensor, Tensor]:
        """Run the layer; `seen` is what attention takes besides the hidden states."""
        mixed, key_values = self.self_attn(self.input_layernorm(x), *seen)
        x = x + mixed
        return x + self.mlp(self.post_attention_layernorm(x)), key_values


class SharedPrefixDecoder(nn.Module):
    """Decoder whose rows continue shared prefixes."""

    rotary_frequencies: Tensor

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.register_buffer("rotary_frequencies", axis_frequencies(config), persistent=False)

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Turn 3-D positions (3, P, R, S) into cosine and sine (P, 1, R, S, d)."""
        frequencies = self.rotary_frequencies[:, None, None, None, :]
        angles = (positions.unsqueeze(-1) * frequencies).sum(0)
        angles = torch.cat([angles, angles], -1).unsqueeze(1)
        return angles.cos(), angles.sin()

    def biases(self, segments: Segments, steps: int) -> tuple[Tensor, Tensor]:
        """Make additive masks of the prefix segment and of past and own tokens."""
        device = segments.prefix.device
        place = torch.arange(segments.prefix.shape[4], device=device)
        beyond = (place >= segments.prefix_lengths[:, None]).float() * MASKED

        place = torch.arange(segments.past.shape[5], device=device)
        forgotten = (place >= segments.past_lengths[..., None]).float() * MASKED
        step = torch.arange(steps, device=device)
        later = (step > step[:, None]).float() * MASKED
        rows = segments.past_lengths.shape
        own = torch.cat(
            [
                forgotten[:, :, None, :].expand(*rows, steps, place.shape[0]),
                later.expand(*rows, steps, steps),
            ],
            -1,
        )
        return beyond[:, None, None, None, :], own[:, None, :, None, :, :]

    def hidden_states(
        self, embeds: Tensor, positions: Tensor, segments: Segments
    ) -> tuple[Tensor, Tensor]:
        """Run all layers: hidden states (P, R, S, D), new key-values (L, 2, P, H, R, S, d)."""
        rotary = self.rotary(positions)
        prefix_bias, own_bias = self.biases(segments, embeds.shape[2])
        x, *features = [embeds]
        if self.config.deepstack:
            x, *features = torch.split(embeds, self.config.hidden_size, -1)
        collected = []
        for index, layer in enumerate(self.layers):
            x, key_values = layer(
                x, rotary, segments.prefix[index], prefix_bias, segments.past[index], own_bias
            )
            collected.append(key_values)
            if index < len(features):
                x = x + features[index]
        return self.norm(x), torch.stack(collected)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Run one call of the graph.

        Args:
            inputs: in this order
                embeds (P, R, S, (1 + n) * D) of the rows' new tokens, padded on the right,
                positions (3, P, R, S) in time, row and column, as float,
                prefix (L, 2, P, H, Lp, d), prefix_lengths (P,),
                past (L, 2, P, H, R, Lt, d), past_lengths (P, R),
                logit_positions (P, R, N): which of the S tokens of each row need logits.

        Returns:
            logits (P, R, N, V), hidden (P, R, S, D), key_values (L, 2, P, H, R, S, d).
        """
        embeds, positions, prefix, prefix_lengths, past, past_lengths, logit_positions = inputs
        segments = Segments(prefix, prefix_lengths, past, past_lengths)
        hidden, key_values = self.hidden_states(embeds, positions, segments)
        wanted = logit_positions.unsqueeze(-1).expand(-1, -1, -1, hidden.shape[-1])
        return self.lm_head(torch.gather(hidden, 2, wanted)), hidden, key_values


def axis_frequencies(config: DecoderConfig) -> Tensor:
    """Compute each half-head channel's rotary frequency on the axis that owns it, (3, d / 2)."""
    half = config.head_dim // 2
    if sum(config.mrope_section) != half:
        raise ValueError(
            f"mrope_section {config.mrope_section} must sum to half a head, which is {half}"
        )
    frequencies = config.rope_theta ** (-torch.arange(half, dtype=torch.float32) / half)
    section = config.mrope_section
    owners = torch.repeat_interleave(torch.arange(3), torch.tensor(section))
    if config.mrope_interleaved:
        owners = torch.zeros(half, dtype=torch.long)
        for axis in (1, 2):  # every third channel, until the axis has its share; else temporal
            owners[axis : 3 * section[axis] : 3] = axis
    return functional.one_hot(owners, 3).T * frequencies
