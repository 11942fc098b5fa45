"""Our decoder with the weights of Qwen2.5-VL's or Qwen3-VL's text model is that model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel

from meiqa.engine.prompts import positions_of
from meiqa.export.decoder import DecoderConfig, Segments, SharedPrefixDecoder
from training.finetune import no_segments

TOLERANCE = 1e-4
WIDTH = 64
POSITIONS, _ = positions_of([5, (3, 4), 4, (2, 2), 4])
"""(3, LENGTH): text, a picture of 3 x 4, text, a picture of 2 x 2, text."""
LENGTH = POSITIONS.shape[1]
VISUAL = torch.tensor([0] * 5 + [1] * 12 + [0] * 4 + [1] * 4 + [0] * 4, dtype=torch.bool)

QWEN2_5 = DecoderConfig(
    vocab_size=101,
    hidden_size=WIDTH,
    intermediate_size=112,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    mrope_section=(2, 3, 3),
    rope_theta=100.0,  # turns far over these few positions, so that a wrong one is seen
)
QWEN3 = replace(
    QWEN2_5,
    mrope_section=(5, 4, 3),
    tie_word_embeddings=False,
    head_dim=24,
    attention_bias=False,
    qk_norm=True,
    mrope_interleaved=True,
    deepstack=2,
)


@dataclass(frozen=True)
class Twins:
    """transformers' text model, our decoder with its weights, and what both are given.

    Attributes:
        embeds: (1, LENGTH, (1 + n) * D), where text has features of zero.
        wanted: the reference's logits (LENGTH, V).
    """

    ours: SharedPrefixDecoder
    embeds: Tensor
    wanted: Tensor


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def twins(request: pytest.FixtureRequest) -> Twins:
    """Give both models of a family, ours with the other's weights, copied by name."""
    torch.manual_seed(0)
    config, make = {
        "qwen2_5_vl": (QWEN2_5, qwen2_5_reference),
        "qwen3_vl": (QWEN3, qwen3_reference),
    }[request.param]
    reference = make(config).eval()
    with torch.no_grad():
        # The reference starts with small weights, zero biases and unit scales: too tame to tell.
        for name, parameter in reference.named_parameters():
            parameter.normal_(0.0, 1.0 if "q_norm" in name or "k_norm" in name else 0.25)
    head = reference.embed_tokens.weight
    if not config.tie_word_embeddings:
        head = torch.randn(head.shape) * 0.25
    ours = SharedPrefixDecoder(config).eval()
    ours.load_state_dict({**reference.state_dict(), "lm_head.weight": head})
    embeds = torch.randn(1, LENGTH, config.shape.embed_width)
    embeds[:, ~VISUAL, WIDTH:] = 0
    return Twins(ours, embeds, reference_hidden(reference, embeds) @ head.detach().T)


def common_fields(config: DecoderConfig) -> dict[str, Any]:
    """What both families' text configurations are given."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": config.rope_theta,
            "mrope_section": list(config.mrope_section),
        },
    }


def qwen2_5_reference(config: DecoderConfig) -> PreTrainedModel:
    """transformers' Qwen2.5-VL text model of this shape."""
    return Qwen2_5_VLTextModel(Qwen2_5_VLTextConfig(**common_fields(config)))


def qwen3_reference(config: DecoderConfig) -> PreTrainedModel:
    """transformers' Qwen3-VL text model of this shape."""
    fields = {**common_fields(config), "head_dim": config.head_dim}
    return Qwen3VLTextModel(Qwen3VLTextConfig(**fields))


def reference_hidden(reference: PreTrainedModel, embeds: Tensor) -> Tensor:
    """Hidden states (LENGTH, D) of transformers' model, given features the way it takes them."""
    embeds, *features = embeds.split(WIDTH, -1)
    stacked = {
        "visual_pos_masks": VISUAL[None],
        "deepstack_visual_embeds": [feature[0, VISUAL] for feature in features],
    }
    with torch.no_grad():
        made = reference(
            inputs_embeds=embeds,
            position_ids=torch.from_numpy(POSITIONS).long()[:, None],
            use_cache=False,
            **(stacked if features else {}),
        )
    return made.last_hidden_state[0]


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


@pytest.fixture
def positions() -> Tensor:
    return torch.from_numpy(POSITIONS)


def test_a_whole_sequence(twins: Twins, positions: Tensor) -> None:
    assert twins.wanted.std() > 0.1
    made, _ = run(twins.ours, twins.embeds, positions, no_segments(twins.ours, 1, 1))
    torch.testing.assert_close(made, twins.wanted, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("cut", [1, 5, 17, 28])
def test_a_prefix_and_what_follows(twins: Twins, positions: Tensor, cut: int) -> None:
    empty = no_segments(twins.ours, 1, 1)
    _, key_values = run(twins.ours, twins.embeds[:, :cut], positions[:, :cut], empty)
    segments = Segments(
        key_values[:, :, :, :, 0], torch.tensor([cut]), empty.past, empty.past_lengths
    )
    made, _ = run(twins.ours, twins.embeds[:, cut:], positions[:, cut:], segments)
    torch.testing.assert_close(made, twins.wanted[cut:], atol=TOLERANCE, rtol=0)


def test_a_prefix_a_past_and_one_token(twins: Twins, positions: Tensor) -> None:
    empty = no_segments(twins.ours, 1, 1)
    _, key_values = run(twins.ours, twins.embeds[:, :-1], positions[:, :-1], empty)
    segments = Segments(
        key_values[:, :, :, :, 0, :17],
        torch.tensor([17]),
        key_values[..., 17:, :],
        torch.tensor([[LENGTH - 1 - 17]]),
    )
    made, _ = run(twins.ours, twins.embeds[:, -1:], positions[:, -1:], segments)
    torch.testing.assert_close(made, twins.wanted[-1:], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("order", [[0, 2, 1], [1, 0, 2], [2, 1, 0]])
def test_the_three_axes_are_told_apart(twins: Twins, positions: Tensor, order: list[int]) -> None:
    made, _ = run(twins.ours, twins.embeds, positions[order], no_segments(twins.ours, 1, 1))
    assert (made - twins.wanted).abs().max() > 100 * TOLERANCE


def test_each_feature_counts(twins: Twins, positions: Tensor) -> None:
    for start in range(WIDTH, twins.embeds.shape[-1], WIDTH):
        without = twins.embeds.clone()
        without[..., start : start + WIDTH] = 0
        made, _ = run(twins.ours, without, positions, no_segments(twins.ours, 1, 1))
        assert (made - twins.wanted).abs().max() > 100 * TOLERANCE


def test_rotary_channels_must_fill_half_a_head() -> None:
    with pytest.raises(ValueError, match="must sum to half a head, which is 12"):
        SharedPrefixDecoder(replace(QWEN3, mrope_section=(4, 4, 3)))
