"""Qwen3.5: Qwen3-VL's tower, without DeepStack, before a decoder of layers that keep a state.

Of four layers three are Gated DeltaNet, and the fourth attends, with a gate on what it gives; a
quarter of a head's channels turn with positions.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from meiqa.export.decoder import DecoderConfig, DeltaConfig
from meiqa.export.families import qwen3_vl
from meiqa.export.families.base import (
    Config,
    Family,
    Section,
    read_decoder,
    rotary_section,
    text_section,
)
from meiqa.export.families.qwen2_5_vl import tower_weight

ATTENDS, KEEPS_STATE = "full_attention", "linear_attention"


def decoder(config: Config) -> DecoderConfig:
    text = text_section(config)
    text.only("attention_bias", False)
    head_dim = text.whole("head_dim")
    return read_decoder(
        config,
        head_dim=head_dim,
        attention_bias=False,
        qk_norm=True,
        mrope_interleaved=True,
        rotary_dim=turned_channels(text, head_dim),
        attention_gate=True,
        delta=delta(text),
    )


def turned_channels(text: Section, head_dim: int) -> int:
    """Count the channels of a head that positions turn."""
    rotary = rotary_section(text)
    turned = int(head_dim * rotary.number("partial_rotary_factor"))
    if turned % 2 or not 0 < turned <= head_dim:
        raise rotary.refuse("partial_rotary_factor", f"an even share of {head_dim} channels")
    return turned


def delta(text: Section) -> DeltaConfig:
    """Read the layers that keep a state."""
    kinds = text.value("layer_types")
    known = isinstance(kinds, list) and {*kinds} == {ATTENDS, KEEPS_STATE}
    if not known or len(kinds) != text.whole("num_layers"):
        raise text.refuse("layer_types", f"{ATTENDS} or {KEEPS_STATE} of each layer, and both")
    shape = DeltaConfig(
        layers=tuple(index for index, kind in enumerate(kinds) if kind == KEEPS_STATE),
        key_heads=text.whole("linear_num_key_heads"),
        value_heads=text.whole("linear_num_value_heads"),
        key_width=text.whole("linear_key_head_dim"),
        value_width=text.whole("linear_value_head_dim"),
        kernel=text.whole("linear_conv_kernel_dim"),
    )
    if shape.value_heads % shape.key_heads:
        raise text.refuse("linear_num_value_heads", f"a multiple of {shape.key_heads}")
    if shape.kernel < 2:
        raise text.refuse("linear_conv_kernel_dim", "2 or more")
    return shape


def decoder_weight(name: str, stored: Mapping[str, Tensor]) -> Tensor:
    """Read a parameter of the decoder: most norms are stored less 1."""
    less_one = name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight")
    return stored[name] + 1 if less_one else stored[name]


FAMILY = Family(
    architecture="Qwen3_5ForConditionalGeneration",
    model_type="qwen3_5",
    tower=lambda config: qwen3_vl.make_tower(config, deepstack=False),
    decoder=decoder,
    grid=qwen3_vl.FAMILY.grid,
    tower_weight=tower_weight,
    decoder_weight=decoder_weight,
    unread=("language_model.mtp.",),
)
