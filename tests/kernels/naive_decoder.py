"""The slow, obvious twin of the fused decoder: one row, all tokens of all layers, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from meiqa.kernels.decoder import OF_EACH_ROW, FusedWeights, Linear, bf16

Doubles = NDArray[np.float64]


def last_hidden(
    decoder: FusedWeights,
    embeds: NDArray[np.float32],
    positions: NDArray[np.float32],
    prefix: NDArray[np.float32],
    kept: list[Doubles] | None = None,
    *,
    in_bf16: bool = False,
) -> Doubles:
    """Normalised hidden state (D,) of the last of some tokens (S, D) behind a prefix.

    With `kept`, the tokens' keys and values (2, H, S, d) of each layer are appended to it. In bf16
    what attention multiplies is rounded, and what all layers do if none has bytes.
    """
    s = decoder.shape
    factors = in_bits_of_bf16 if in_bf16 else np.asarray
    applied = applied_in_bf16 if in_bf16 and decoder.of_floats else applied_exactly
    axes = decoder.frequencies.argmax(axis=0)
    angles = positions[axes].T.astype(np.float64) * decoder.frequencies.sum(axis=0)
    x = embeds.astype(np.float64)
    for index, (norms, layer) in enumerate(zip(decoder.norms, decoder.layers, strict=True)):
        y = normalised(x, norms[0], s.epsilon)
        query = rotated(applied(layer["q_proj"], y).reshape(len(x), s.heads, -1), angles)
        key = rotated(applied(layer["k_proj"], y).reshape(len(x), s.kv_heads, -1), angles)
        value = applied(layer["v_proj"], y).reshape(len(x), s.kv_heads, -1)
        if kept is not None:
            kept.append(np.stack([key, value]).swapaxes(1, 2))
        mixed = np.zeros_like(query)
        for head in range(s.heads):
            kv = head // (s.heads // s.kv_heads)
            keys = factors(np.concatenate([prefix[index, 0, kv], key[:, kv]]))
            values = factors(np.concatenate([prefix[index, 1, kv], value[:, kv]]))
            for step in range(len(x)):
                seen = len(keys) - len(x) + step + 1
                scores = keys[:seen] @ factors(query[step, head] / np.sqrt(s.head_width))
                weights = np.exp(scores - scores.max())
                mixed[step, head] = factors(weights) @ values[:seen] / weights.sum()
        x = x + applied(layer["o_proj"], mixed.reshape(len(x), -1))
        y = normalised(x, norms[1], s.epsilon)
        gate, up = applied(layer["gate_proj"], y), applied(layer["up_proj"], y)
        x = x + applied(layer["down_proj"], gate / (1 + np.exp(-gate)) * up)
    return normalised(x, decoder.last_norm, s.epsilon)[-1]


def in_bits_of_bf16(x: NDArray[Any]) -> Doubles:
    """Round to bf16."""
    codes = bf16(x.astype(np.float32)).astype(np.uint32)
    return (codes << 16).view(np.float32).astype(np.float64)


def applied_in_bf16(linear: Linear, x: Doubles) -> Doubles:
    """A linear layer of floats, of which both factors are rounded to bf16."""
    return in_bits_of_bf16(x) @ in_bits_of_bf16(linear.weight) + linear.bias


def applied_exactly(linear: Linear, x: Doubles) -> Doubles:
    """A linear layer; one of bytes rounds its input as QuantizeLinear does."""
    if linear.scale is None:
        return x @ linear.weight.astype(np.float64) + linear.bias
    if linear.input_scale == OF_EACH_ROW:
        step = np.abs(x).max(axis=-1, keepdims=True) / 127
        rounded = np.rint(x / np.where(step > 0, step, 1)) * step
        return rounded @ (linear.weight * linear.scale.astype(np.float64)) + linear.bias
    codes = np.clip(np.rint(x / linear.input_scale) + linear.input_zero, 0, 255)
    rounded = (codes - linear.input_zero) * linear.input_scale
    return rounded @ (linear.weight * linear.scale.astype(np.float64)) + linear.bias


def normalised(x: Doubles, weight: NDArray[np.float32], epsilon: float) -> Doubles:
    """Root-mean-square normalisation."""
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + epsilon) * weight


def rotated(x: Doubles, angles: Doubles) -> Doubles:
    """Heads (S, H, d) turned by angles (S, d / 2)."""
    low, high = np.split(x, 2, axis=-1)
    cosine, sine = np.cos(angles)[:, None], np.sin(angles)[:, None]
    return np.concatenate([low * cosine - high * sine, high * cosine + low * sine], axis=-1)
