"""Our decoder with Qwen2.5-VL's weights is Qwen2.5-VL's text model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

from meiqa.engine.prompts import layout
from meiqa.export.decoder import DecoderConfig, Segments, SharedPrefixDecoder

TOLERANCE = 1e-4
LENGTH = 29


@pytest.fixture(scope="module")
def twins() -> tuple[Qwen2_5_VLTextModel, SharedPrefixDecoder]:
    """Give the reference and our decoder with its weights, copied by name."""
    torch.manual_seed(0)
    config = DecoderConfig(
        vocab_size=101,
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        mrope_section=(2, 3, 3),
        rope_theta=100.0,  # turns far over these few positions, so that a wrong one is seen
    )
    reference = Qwen2_5_VLTextModel(
        Qwen2_5_VLTextConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": config.rope_theta,
                "mrope_section": list(config.mrope_section),
            },
        )
    )
    reference.train(False)
    with torch.no_grad():
        # The reference starts with small weights, zero biases and unit scales: too tame to tell.
        for parameter in reference.parameters():
            parameter.normal_(0.0, 0.25)
    ours = SharedPrefixDecoder(config).eval()
    weights = reference.state_dict()
    ours.load_state_dict({**weights, "lm_head.weight": weights["embed_tokens.weight"]})
    return reference, ours


@pytest.fixture(scope="module")
def embeds() -> Tensor:
    return torch.randn(1, LENGTH, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def positions() -> Tensor:
    """Give (3, LENGTH): text, a picture of 3 x 4, text, a picture of 2 x 2, text."""
    placed, _ = layout([5, (3, 4), 4, (2, 2), 4])
    return torch.from_numpy(placed)


@pytest.fixture(scope="module")
def wanted(
    twins: tuple[Qwen2_5_VLTextModel, SharedPrefixDecoder], embeds: Tensor, positions: Tensor
) -> Tensor:
    """Give the reference's logits (LENGTH, V)."""
    reference, _ = twins
    with torch.no_grad():
        hidden = reference(
            inputs_embeds=embeds, position_ids=positions.long()[:, None], use_cache=False
        ).last_hidden_state
    logits: Tensor = (hidden @ reference.embed_tokens.weight.T)[0]
    return logits.detach()


def run(
    decoder: SharedPrefixDecoder, embeds: Tensor, positions: Tensor, segments: Segments
) -> tuple[Tensor, Tensor]:
    """Logits (S, V) and new key-values of one row."""
    with torch.no_grad():
        logits, _, key_values = decoder(
            embeds[:, None],
            positions[:, None, None],
            segments.prefix,
            segments.prefix_lengths,
            segments.past,
            segments.past_lengths,
            torch.arange(embeds.shape[1])[None, None],
        )
    return logits[0, 0], key_values


def test_a_whole_sequence(
    twins: tuple[Qwen2_5_VLTextModel, SharedPrefixDecoder],
    embeds: Tensor,
    positions: Tensor,
    wanted: Tensor,
) -> None:
    _, ours = twins
    assert wanted.std() > 0.1
    made, _ = run(ours, embeds, positions, ours.no_segments(1, 1))
    torch.testing.assert_close(made, wanted, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("cut", [1, 5, 17, 28])
def test_a_prefix_and_what_follows(
    twins: tuple[Qwen2_5_VLTextModel, SharedPrefixDecoder],
    embeds: Tensor,
    positions: Tensor,
    wanted: Tensor,
    cut: int,
) -> None:
    _, ours = twins
    empty = ours.no_segments(1, 1)
    _, key_values = run(ours, embeds[:, :cut], positions[:, :cut], empty)
    segments = Segments(
        key_values[:, :, :, :, 0], torch.tensor([cut]), empty.past, empty.past_lengths
    )
    made, _ = run(ours, embeds[:, cut:], positions[:, cut:], segments)
    torch.testing.assert_close(made, wanted[cut:], atol=TOLERANCE, rtol=0)


def test_a_prefix_a_past_and_one_token(
    twins: tuple[Qwen2_5_VLTextModel, SharedPrefixDecoder],
    embeds: Tensor,
    positions: Tensor,
    wanted: Tensor,
) -> None:
    _, ours = twins
    empty = ours.no_segments(1, 1)
    _, key_values = run(ours, embeds[:, :-1], positions[:, :-1], empty)
    segments = Segments(
        key_values[:, :, :, :, 0, :17],
        torch.tensor([17]),
        key_values[..., 17:, :],
        torch.tensor([[LENGTH - 1 - 17]]),
    )
    made, _ = run(ours, embeds[:, -1:], positions[:, -1:], segments)
    torch.testing.assert_close(made, wanted[-1:], atol=TOLERANCE, rtol=0)


def test_the_three_axes_are_told_apart(
    twins: tuple[Qwen2_5_VLTextModel, SharedPrefixDecoder],
    embeds: Tensor,
    positions: Tensor,
    wanted: Tensor,
) -> None:
    _, ours = twins
    swapped = positions[[0, 2, 1]]
    made, _ = run(ours, embeds, swapped, ours.no_segments(1, 1))
    assert (made - wanted).abs().max() > 100 * TOLERANCE
