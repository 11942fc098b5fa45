"""The text decoder of all families as one graph with a prompt in three segments.

* prefix: keys and values of P image prefixes, each shared by R rows and never copied.
* past: keys and values that the rows generated themselves so far.
* own: the tokens of this call.

Row (p, r) continues prefix p. The queries of all rows of a prefix are folded into one matrix
against it, so R comparisons of one photo read its keys and values once.

Layers of Gated DeltaNet (Qwen3.5) keep a state of constant size in place of keys and values. It
can't be shared or cut: each row of a call brings the state behind what it continues, and is given
the one behind as many of its own tokens as it says.

Qwen3-VL's visual tokens carry n DeepStack features beside them, and those of text carry zeros:
embeddings are then 1 + n widths wide, and the k-th feature joins the hidden states behind layer k.

Letters in shapes: P prefixes, R rows of each, S own tokens, Lp prefix tokens, Lt past tokens,
N tokens whose logits are wanted, L layers, H key-value heads, g query heads to one of them,
d head width, D hidden width, n DeepStack features of a token, V vocabulary; M layers with a state
of W values, B = P * R rows, C tokens of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan_op  # pinned; the public one compiles each new shape
from torch.nn import functional

from meiqa.engine.manifest import DecoderShape

MASKED = -1e9
"""Added to the score of a position that must not be seen; finite, so that softmax stays defined."""
CHUNK = 32
"""Most tokens over which Gated DeltaNet solves a triangular system at once."""
UNIT_EPS = 1e-6
"""Added to the squared length of Gated DeltaNet's queries and keys before they are normalised."""


@dataclass(frozen=True)
class DeltaConfig:
    """Shape of the layers that keep a state: Gated DeltaNet (arXiv 2412.06464).

    Attributes:
        layers: which of the decoder's layers they are; the others attend.
        key_heads, value_heads: heads of queries and keys, each for equally many heads of values.
        key_width, value_width: of a head; its state is (key_width, value_width).
        kernel: tokens that the causal convolution sees, the last of them its own.
    """

    layers: tuple[int, ...]
    key_heads: int
    value_heads: int
    key_width: int
    value_width: int
    kernel: int

    @property
    def convolved(self) -> int:
        """Channels of queries, keys and values before they are convolved."""
        return 2 * self.key_heads * self.key_width + self.value_heads * self.value_width

    @property
    def remembered(self) -> int:
        """Values of what the convolution has to know of earlier tokens."""
        return (self.kernel - 1) * self.convolved

    @property
    def state_width(self) -> int:
        """Values of a layer's state, W: of the convolution, then of all heads."""
        return self.remembered + self.value_heads * self.key_width * self.value_width


@dataclass(frozen=True)
class DecoderConfig:
    """Shape of the decoder, with the field names of Hugging Face's `text_config`.

    Attributes:
        mrope_section: rotary channels of the temporal, row and column axis, which alternate channel
            by channel if they are interleaved.
        head_dim: 0 means hidden_size / num_attention_heads.
        deepstack: features that each embedding carries for the first layers, n.
        rotary_dim: how many of a head's channels positions turn, the first ones; 0 means all.
        attention_gate: whether a gate for each channel that attention gives is made beside queries.
        delta: the layers that keep a state instead of keys and values, if there are any.
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
    rotary_dim: int = 0
    attention_gate: bool = False
    delta: DeltaConfig | None = None

    def __post_init__(self) -> None:
        if not self.head_dim:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)

    @property
    def turned(self) -> int:
        """Channels of a head that positions turn."""
        return self.rotary_dim or self.head_dim

    @property
    def shape(self) -> DecoderShape:
        """What the host has to know of the decoder."""
        kept = 0 if self.delta is None else len(self.delta.layers)
        return DecoderShape(
            layers=self.num_hidden_layers - kept,
            kv_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            hidden_size=self.hidden_size,
            vocab_size=self.vocab_size,
            deepstack=self.deepstack,
            state_layers=kept,
            state_width=0 if self.delta is None else self.delta.state_width,
        )


class Segments(NamedTuple):
    """What the rows of a call continue; see `forward` of the decoder.

    Keys and values are padded; of each prefix and past only so many as its length says are real.
    The last two are for layers that keep a state.
    """

    prefix: Tensor
    prefix_lengths: Tensor
    past: Tensor
    past_lengths: Tensor
    states: Tensor | None = None
    kept_lengths: Tensor | None = None


class RmsNorm(nn.Module):
    """Root-mean-square normalisation with a learned scale."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Apply rotary positions to (..., S, d), to its first channels where the tables are narrower.

    The tables broadcast to it.
    """
    if (width := cosine.shape[-1]) < x.shape[-1]:
        return torch.cat([rotate(x[..., :width], cosine, sine), x[..., width:]], -1)
    low, high = x.chunk(2, -1)
    return x * cosine + torch.cat([-high, low], -1) * sine


class SegmentedAttention(nn.Module):
    """Grouped-query attention over prefix, past and own tokens with one softmax."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.kv_heads = config.num_key_value_heads
        self.group = config.num_attention_heads // config.num_key_value_heads
        self.head_dim = config.head_dim
        self.gated = config.attention_gate
        width, kv_width = config.num_attention_heads * self.head_dim, self.kv_heads * self.head_dim
        asked = 2 * width if self.gated else width
        self.q_proj = nn.Linear(config.hidden_size, asked, bias=config.attention_bias)
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
        asked, gate = self.q_proj(x), None
        if self.gated:  # head by head, queries first
            asked, gate = asked.reshape(p, r, s, h * g, 2, d).unbind(4)
        query = self.q_norm(asked.reshape(p, r, s, h, g, d)).permute(0, 3, 1, 4, 2, 5)
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
        mixed = mixed.reshape(p, r, s, h * g * d)
        if gate is not None:
            mixed = mixed * gate.reshape(mixed.shape).sigmoid()
        return self.o_proj(mixed), torch.stack([key, value])


class CausalConvolution(nn.Module):
    """Each channel's weighted sum over a token and those before it."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, 1, kernel))

    def forward(self, x: Tensor) -> Tensor:
        """(B, kernel - 1 + S, channels) → (B, S, channels)."""
        kernel = self.weight.shape[2]
        steps = x.shape[1] - kernel + 1
        seen = x[:, :steps] * self.weight[:, 0, 0]
        for tap in range(1, kernel):
            seen = seen + x[:, tap : tap + steps] * self.weight[:, 0, tap]
        return functional.silu(seen)


class GatedDeltaNet(nn.Module):
    """Linear attention whose state forgets, and replaces what it held for a key.

    A head's state goes from token to token by S ← exp(decay) S + k (β (v - kᵀ exp(decay) S)), and
    gives qᵀ S. That is computed chunk by chunk (arXiv 2412.06464, section 3.3): within a chunk all
    tokens at once, of one chunk after the other only what depends on the state.
    """

    def __init__(self, config: DecoderConfig, delta: DeltaConfig) -> None:
        super().__init__()
        self.delta = delta
        width = delta.value_heads * delta.value_width
        self.in_proj_qkv = nn.Linear(config.hidden_size, delta.convolved, bias=False)
        self.in_proj_z = nn.Linear(config.hidden_size, width, bias=False)
        self.in_proj_b = nn.Linear(config.hidden_size, delta.value_heads, bias=False)
        self.in_proj_a = nn.Linear(config.hidden_size, delta.value_heads, bias=False)
        self.conv1d = CausalConvolution(delta.convolved, delta.kernel)
        self.dt_bias = nn.Parameter(torch.zeros(delta.value_heads))
        self.A_log = nn.Parameter(torch.zeros(delta.value_heads))
        self.norm = RmsNorm(delta.value_width, config.rms_norm_eps)
        self.out_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, x: Tensor, states: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Mix hidden states x (P, R, S, D), normalised.

        Args:
            states: (P, R, W) before the first token.
            kept: (P, R) how many of the tokens the states that are given back have seen.

        Returns:
            The mixed values (P, R, S, D) and the new states (P, R, W).
        """
        p, r, s, _ = x.shape
        rows, kept = x.reshape(p * r, s, x.shape[3]), kept.reshape(p * r)
        state = states.reshape(p * r, states.shape[2])
        before, state = state[:, : self.delta.remembered], state[:, self.delta.remembered :]
        read = self.in_proj_qkv(rows)
        read = torch.cat([before.reshape(p * r, self.delta.kernel - 1, read.shape[2]), read], 1)
        mixed, state = self.recur(self.conv1d(read), self.rates(rows, kept), state)
        gate = self.in_proj_z(rows).reshape(mixed.shape)
        mixed = (self.norm(mixed) * functional.silu(gate)).reshape(p, r, s, -1)
        last = kept[:, None] + torch.arange(self.delta.kernel - 1, device=x.device)
        last = torch.gather(read, 1, last.unsqueeze(-1).expand(-1, -1, read.shape[2]))
        return self.out_proj(mixed), torch.cat([last.flatten(1), state], 1).reshape(states.shape)

    def rates(self, x: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Give of tokens (B, S, D) what each head forgets before them, as a logarithm, and what it
        writes of them, both (B, S, H), and which are `kept` (B, S, 1), 1 or 0."""
        decay = -self.A_log.exp() * functional.softplus(self.in_proj_a(x) + self.dt_bias)
        counts = torch.arange(x.shape[1], device=x.device) < kept[:, None]
        return decay, self.in_proj_b(x).sigmoid(), counts.float().unsqueeze(-1)

    def recur(
        self, convolved: Tensor, rates: tuple[Tensor, Tensor, Tensor], state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Read tokens (B, S, channels) from a state (B, H * dk * dv) on.

        Gives what each head reads, (B, S, H, dv), and the state behind the tokens that are kept.
        """
        delta = self.delta
        steps, heads = convolved.shape[1], delta.value_heads
        size = shorter(steps, CHUNK)  # one token is a chunk of one
        count = (steps + size - 1) // size

        def by_chunk(x: Tensor) -> Tensor:
            """(B, S, H, d) → (chunks, B, H, C, d), padded with zeros, which change no state."""
            x = functional.pad(x, (0, 0, 0, 0, 0, count * size - steps))
            x = x.reshape(x.shape[0], count, size, x.shape[2], x.shape[3])
            return x.permute(1, 0, 3, 2, 4)

        keys = delta.key_heads * delta.key_width
        query, key, value = torch.split(convolved, [keys, keys, convolved.shape[2] - 2 * keys], -1)
        query, key = (
            by_chunk(unit(by_head(each, delta.key_heads))).repeat_interleave(
                heads // delta.key_heads, 2
            )
            for each in (query, key)
        )
        query = query * delta.key_width**-0.5
        value = by_chunk(by_head(value, heads))
        decay, writes, counts = (by_chunk(rate.unsqueeze(-1)) for rate in rates)

        faded = decay.cumsum(3)  # from before the chunk to behind each token
        between = (faded - faded.transpose(-1, -2)).tril().exp().tril()
        overlap = (writes * key @ key.transpose(-1, -2)) * between
        solved = unit_lower_inverse(overlap.tril(-1))
        kept_decay = decay * counts
        kept_faded = kept_decay.cumsum(3)
        last, kept_last = faded[..., -1:, :], kept_faded[..., -1:, :]
        state = state.reshape(state.shape[0], heads, delta.key_width, delta.value_width)
        _, state, mixed = scan_op(
            next_chunk,
            (state, state.clone()),
            (
                solved @ (writes * value),
                solved @ (writes * faded.exp() * key),
                query * faded.exp(),
                (query @ key.transpose(-1, -2)) * between,
                (key * (last - faded).exp()).transpose(-1, -2),
                last.exp(),
                (key * counts * (kept_last - kept_faded).exp()).transpose(-1, -2),
                kept_last.exp(),
            ),
            (),
        )
        mixed = mixed.permute(1, 0, 3, 2, 4)
        mixed = mixed.reshape(mixed.shape[0], count * size, heads, delta.value_width)[:, :steps]
        return mixed, state.flatten(1)


def shorter(steps: int, most: int) -> int:
    """Give the lesser of two lengths, one of which is not known yet while a graph is traced."""
    least: int = torch.sym_min(steps, most)  # type: ignore[no-untyped-call]
    return least


def next_chunk(state: Tensor, kept: Tensor, *chunk: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Go over a chunk: the states behind it, and behind the tokens that are kept; what is read."""
    value, known, query, attention, key, left, kept_key, kept_left = chunk
    new = value - known @ state
    behind = state * left + key @ new
    return behind, kept * kept_left + kept_key @ new, query @ state + attention @ new


def by_head(x: Tensor, heads: int) -> Tensor:
    """(B, S, heads * d) → (B, S, heads, d)."""
    return x.reshape(x.shape[0], x.shape[1], heads, x.shape[2] // heads)


def unit(x: Tensor) -> Tensor:
    """Give (..., d) the length 1."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + UNIT_EPS)


def unit_lower_inverse(lower: Tensor) -> Tensor:
    """Invert I + `lower` (..., C, C), which is strictly lower triangular, for C up to CHUNK.

    Of inverted diagonal blocks, ever wider ones are made by pairs: the inverse of ((A, 0), (B, D))
    has -D⁻¹ B A⁻¹ in its corner. Powers of `lower`, which would do as well, can be huge.
    """
    place = torch.arange(lower.shape[-1], device=lower.device)
    inverse = (place[:, None] == place).float()
    width = 1
    while width < CHUNK:
        block = place // width
        corner = (block[:, None] % 2 == 1) & (block[:, None] - block == 1)
        joined = lower * corner.float()
        inverse = inverse - (inverse @ joined @ inverse if width > 1 else joined)
        width *= 2
    return inverse


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
    """What mixes tokens and a gated MLP, each behind a normalisation and a shortcut."""

    def __init__(self, config: DecoderConfig, index: int) -> None:
        super().__init__()
        self.input_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.keeps_state = config.delta is not None and index in config.delta.layers
        if config.delta is not None and self.keeps_state:
            self.linear_attn = GatedDeltaNet(config, config.delta)
        else:
            self.self_attn = SegmentedAttention(config)
        self.post_attention_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMlp(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, *seen: Any) -> tuple[Tensor, Tensor]:
        """Run the layer; `seen` is what its mixing takes besides the hidden states."""
        mix = self.linear_attn if self.keeps_state else self.self_attn
        mixed, left = mix(self.input_layernorm(x), *seen)
        x = x + mixed
        return x + self.mlp(self.post_attention_layernorm(x)), left


class SharedPrefixDecoder(nn.Module):
    """Decoder whose rows continue shared prefixes."""

    rotary_frequencies: Tensor

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
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
    ) -> tuple[Tensor, ...]:
        """Run all layers: hidden states (P, R, S, D), new key-values (L, 2, P, H, R, S, d), and new
        states (M, P, R, W) where layers keep them."""
        rotary = self.rotary(positions)
        prefix_bias, own_bias = self.biases(segments, embeds.shape[2])
        x, *features = [embeds]
        if self.config.deepstack:
            x, *features = torch.split(embeds, self.config.hidden_size, -1)
        key_values, states = list[Tensor](), list[Tensor]()
        for index, layer in enumerate(self.layers):
            if layer.keeps_state:
                assert segments.states is not None
                x, state = layer(x, segments.states[len(states)], segments.kept_lengths)
                states.append(state)
            else:
                prefix, past = (each[len(key_values)] for each in (segments.prefix, segments.past))
                x, own = layer(x, rotary, prefix, prefix_bias, past, own_bias)
                key_values.append(own)
            if index < len(features):
                x = x + features[index]
        left = [torch.stack(each) for each in (key_values, states) if each]
        return self.norm(x), *left

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run one call of the graph.

        Args:
            inputs: in this order
                embeds (P, R, S, (1 + n) * D) of the rows' new tokens, padded on the right,
                positions (3, P, R, S) in time, row and column, as float,
                prefix (L, 2, P, H, Lp, d), prefix_lengths (P,),
                past (L, 2, P, H, R, Lt, d), past_lengths (P, R),
                logit_positions (P, R, N): which of the S tokens of each row need logits;
                and where layers keep a state
                states (M, P, R, W) before each row,
                kept_lengths (P, R): how many of its tokens its new state is to have seen.

        Returns:
            logits (P, R, N, V), hidden (P, R, S, D), key_values (L, 2, P, H, R, S, d), and where
            layers keep a state kept_states (M, P, R, W).
        """
        embeds, positions, prefix, prefix_lengths, past, past_lengths, wanted, *kept = inputs
        segments = Segments(prefix, prefix_lengths, past, past_lengths, *kept)
        hidden, *left = self.hidden_states(embeds, positions, segments)
        wanted = wanted.unsqueeze(-1).expand(-1, -1, -1, hidden.shape[-1])
        return self.lm_head(torch.gather(hidden, 2, wanted)), hidden, *left


def axis_frequencies(config: DecoderConfig) -> Tensor:
    """Compute the rotary frequency of each pair of channels on the axis that owns it.

    Gives (3, half of the channels of a head that are turned).
    """
    half = config.turned // 2
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
