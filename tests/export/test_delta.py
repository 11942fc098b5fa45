"""Gated DeltaNet by chunks is the recurrence, and keeps the state that it is asked for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from meiqa.export.decoder import CHUNK, DecoderConfig, DeltaConfig, GatedDeltaNet

DELTA = DeltaConfig((0,), key_heads=2, value_heads=4, key_width=8, value_width=12, kernel=4)
CONFIG = DecoderConfig(
    vocab_size=8,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    mrope_section=(1, 1, 2),
    delta=DELTA,
)
LENGTHS = (1, 2, 7, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 3 * CHUNK + 1)


@pytest.fixture
def layer() -> GatedDeltaNet:
    torch.manual_seed(0)
    made = GatedDeltaNet(CONFIG, DELTA).eval()
    with torch.no_grad():
        for weight in made.parameters():
            weight.normal_(0.0, 0.5)
    return made


def recurrence(
    convolved: Tensor, decay: Tensor, writes: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The slow twin of `GatedDeltaNet.recur` for one row, in double precision."""
    convolved, decay, writes, state = (x.double() for x in (convolved, decay, writes, state))
    wide = DELTA.key_heads * DELTA.key_width
    query, key, value = convolved.split([wide, wide, convolved.shape[1] - 2 * wide], 1)
    shared = DELTA.value_heads // DELTA.key_heads
    state, read = state.reshape(DELTA.value_heads, DELTA.key_width, DELTA.value_width), []
    for token in range(len(convolved)):
        q, k = (
            functional.normalize(x[token].reshape(DELTA.key_heads, -1), dim=-1)
            .repeat_interleave(shared, 0)
            .unsqueeze(1)
            for x in (query, key)
        )
        v = value[token].reshape(DELTA.value_heads, 1, -1)
        state = state * decay[token].exp()[:, None, None]
        state = state + k.transpose(1, 2) @ (writes[token][:, None, None] * (v - k @ state))
        read.append((q @ state).squeeze(1) * DELTA.key_width**-0.5)
    return torch.stack(read), state.flatten()


def drawn(steps: int, alike: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens of a row before they are read, what they forget and write, and a state."""
    torch.manual_seed(steps)
    convolved = torch.randn(steps, DELTA.convolved)
    decay, writes = -torch.rand(steps, DELTA.value_heads), torch.rand(steps, DELTA.value_heads)
    if alike:  # one key throughout, written wholly, nothing forgotten: the worst to invert
        convolved = convolved[:1] + 1e-3 * convolved
        decay, writes = decay * 1e-3, torch.ones_like(writes)
    return convolved, decay, writes, torch.randn(DELTA.state_width - DELTA.remembered)


@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("steps", LENGTHS)
def test_chunks_are_the_recurrence(layer: GatedDeltaNet, steps: int, alike: bool) -> None:
    convolved, decay, writes, state = drawn(steps, alike)
    rates = decay[None], writes[None], torch.ones(1, steps, 1)
    with torch.no_grad():
        read, left = layer.recur(convolved[None], rates, state[None])
    wanted, after = recurrence(convolved, decay, writes, state)
    torch.testing.assert_close(read[0].double(), wanted, atol=1e-4, rtol=0)
    torch.testing.assert_close(left[0].double(), after, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kept", [0, 1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 70])
def test_the_state_behind_some_tokens_is_that_of_these_alone(
    layer: GatedDeltaNet, kept: int
) -> None:
    x, before = torch.randn(1, 3, 70, 16), torch.randn(1, 3, DELTA.state_width)
    lengths = torch.tensor([[kept, 70, 5]])
    with torch.no_grad():
        mixed, states = layer(x, before, lengths)
        for row, length in enumerate(lengths[0].tolist()):
            one = slice(row, row + 1)
            if not length:
                torch.testing.assert_close(states[:, one], before[:, one])
                continue
            alone, state = layer(x[:, one, :length], before[:, one], torch.tensor([[length]]))
            torch.testing.assert_close(states[:, one], state, atol=1e-4, rtol=0)
            torch.testing.assert_close(mixed[:, one, :length], alone, atol=1e-4, rtol=0)
