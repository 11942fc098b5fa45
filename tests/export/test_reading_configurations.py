"""config.json of both Qwen families, as transformers 5 and older releases write it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from meiqa.errors import PackageCorrupted
from meiqa.export.decoder import DecoderConfig
from meiqa.export.families import qwen2_5_vl, qwen3_vl
from tests.export import tiny_qwen

FAMILIES = {"qwen2_5_vl": qwen2_5_vl.FAMILY, "qwen3_vl": qwen3_vl.FAMILY}
TOKENIZER = tiny_qwen.make_tokenizer()
WRITTEN: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": tiny_qwen.qwen2_5_vl_config(TOKENIZER).to_dict(),
    "qwen3_vl": tiny_qwen.qwen3_vl_config(TOKENIZER).to_dict(),
}
every_family = pytest.mark.parametrize("name", FAMILIES)

VISION_OF_A_FINE_TUNE = {
    "hidden_size": 1280,
    "in_chans": 3,
    "model_type": "qwen2_5_vl",
    "spatial_patch_size": 14,
    "tokens_per_second": 2,
}
"""All that transformers 4.49 wrote of a published tower."""

SHARED_FIELDS = [
    "text_config.vocab_size",
    "text_config.hidden_size",
    "text_config.intermediate_size",
    "text_config.num_hidden_layers",
    "text_config.num_attention_heads",
    "text_config.num_key_value_heads",
    "text_config.rms_norm_eps",
    "text_config.rope_parameters.mrope_section",
    "text_config.rope_parameters.rope_theta",
    "vision_config",
    "vision_config.hidden_size",
]
REQUIRED = {
    "qwen2_5_vl": SHARED_FIELDS,
    "qwen3_vl": [
        *SHARED_FIELDS,
        "text_config.head_dim",
        "vision_config.depth",
        "vision_config.intermediate_size",
        "vision_config.num_heads",
        "vision_config.out_hidden_size",
        "vision_config.patch_size",
        "vision_config.spatial_merge_size",
        "vision_config.num_position_embeddings",
        "vision_config.deepstack_visual_indexes",
    ],
}


def read(name: str, config: dict[str, Any]) -> tuple[DecoderConfig, tuple[int, int]]:
    """Everything that the exporter reads from a config.json."""
    family = FAMILIES[name]
    family.tower(config)
    return family.decoder(config), family.grid(config)


def changed(name: str, field: str, change: Callable[[dict[str, Any], str], object]) -> Any:
    """A written config.json with a change to the object that holds a field."""
    config = copy.deepcopy(WRITTEN[name])
    *path, last = field.split(".")
    holder = config
    for step in path:
        holder = holder[step]
    change(holder, last)
    return config


def with_value(name: str, field: str, value: object) -> Any:
    """A written config.json with another value of a field."""
    return changed(name, field, lambda holder, last: holder.update({last: value}))


@every_family
def test_what_transformers_5_writes(name: str) -> None:
    shape, grid = read(name, WRITTEN[name])
    assert grid == (8, 2)
    assert (
        shape
        == {
            "qwen2_5_vl": DecoderConfig(448, 64, 96, 3, 4, 2, (2, 3, 3)),
            "qwen3_vl": DecoderConfig(
                448,
                64,
                96,
                3,
                4,
                2,
                (5, 4, 3),
                rope_theta=5_000_000.0,
                head_dim=24,
                attention_bias=False,
                qk_norm=True,
                mrope_interleaved=True,
                deepstack=2,
            ),
        }[name]
    )


@every_family
@pytest.mark.parametrize("kind", [{"type": "mrope"}, {"type": "default", "rope_type": "default"}])
def test_rotary_fields_as_older_releases_write_them(name: str, kind: dict[str, str]) -> None:
    config = copy.deepcopy(WRITTEN[name])
    rotary = config["text_config"].pop("rope_parameters")
    config["text_config"]["rope_theta"] = rotary.pop("rope_theta")
    config["text_config"]["rope_scaling"] = {"mrope_section": rotary["mrope_section"], **kind}
    del config["vision_config"]["rope_parameters"]
    assert read(name, config) == read(name, WRITTEN[name])


def test_text_fields_at_the_top_level() -> None:
    nested = copy.deepcopy(WRITTEN["qwen2_5_vl"])
    flat = {**nested.pop("text_config"), **nested}
    assert read("qwen2_5_vl", flat) == read("qwen2_5_vl", WRITTEN["qwen2_5_vl"])


def test_published_figures_that_were_not_written_out() -> None:
    config = with_value("qwen2_5_vl", "text_config.hidden_size", 3584)
    config["vision_config"] = VISION_OF_A_FINE_TUNE
    with torch.device("meta"):
        tower = qwen2_5_vl.make_tower(config)
    assert len(tower.blocks) == 32
    assert (tower.side, tower.full_blocks) == (4, (7, 15, 23, 31))
    assert qwen2_5_vl.FAMILY.grid(config) == (14, 2)


@every_family
@pytest.mark.parametrize(
    ("top", "text", "tied"),
    [(True, None, True), (None, True, True), (False, None, False), (None, None, False)],
)
def test_where_the_tied_head_is_told(
    name: str, top: bool | None, text: bool | None, tied: bool
) -> None:
    config = copy.deepcopy(WRITTEN[name])
    for holder, value in ((config, top), (config["text_config"], text)):
        holder.pop("tie_word_embeddings", None)
        if value is not None:
            holder["tie_word_embeddings"] = value
    assert read(name, config)[0].tie_word_embeddings is tied


@pytest.mark.parametrize(
    ("name", "field"), [(name, field) for name in FAMILIES for field in REQUIRED[name]]
)
def test_a_missing_field_is_named(name: str, field: str) -> None:
    with pytest.raises(PackageCorrupted, match=f"config.json lacks {field}$"):
        read(name, changed(name, field, lambda holder, last: holder.pop(last)))


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("qwen2_5_vl", "text_config.num_hidden_layers", "three"),
        ("qwen2_5_vl", "text_config.num_hidden_layers", True),
        ("qwen2_5_vl", "text_config.num_hidden_layers", 0),
        ("qwen2_5_vl", "text_config.num_attention_heads", 7),
        ("qwen2_5_vl", "text_config.num_key_value_heads", 3),
        ("qwen2_5_vl", "text_config.rms_norm_eps", float("nan")),
        ("qwen2_5_vl", "text_config.hidden_act", "gelu"),
        ("qwen2_5_vl", "text_config.use_sliding_window", True),
        ("qwen2_5_vl", "text_config.rope_parameters", 10000),
        ("qwen2_5_vl", "text_config.rope_parameters.rope_type", "yarn"),
        ("qwen2_5_vl", "text_config.rope_parameters.mrope_section", [2, 3]),
        ("qwen2_5_vl", "text_config.rope_parameters.mrope_section", [2, 3, 4]),
        ("qwen2_5_vl", "text_config.rope_parameters.mrope_section", "2, 3, 3"),
        ("qwen2_5_vl", "text_config", 4),
        ("qwen2_5_vl", "tie_word_embeddings", "yes"),
        ("qwen2_5_vl", "vision_config", []),
        ("qwen2_5_vl", "vision_config.num_heads", 3),
        ("qwen2_5_vl", "vision_config.in_channels", 1),
        ("qwen2_5_vl", "vision_config.in_chans", 4),
        ("qwen2_5_vl", "vision_config.out_hidden_size", 32),
        ("qwen2_5_vl", "vision_config.window_size", 15),
        ("qwen2_5_vl", "vision_config.fullatt_block_indexes", [1, 4]),
        ("qwen2_5_vl", "vision_config.rope_parameters", "axial"),
        ("qwen3_vl", "text_config.attention_bias", True),
        ("qwen3_vl", "vision_config.hidden_act", "silu"),
        ("qwen3_vl", "vision_config.num_position_embeddings", 37),
        ("qwen3_vl", "vision_config.deepstack_visual_indexes", [2, 0]),
        ("qwen3_vl", "vision_config.deepstack_visual_indexes", [0, 1, 2, 3]),
    ],
)
def test_an_unusable_field_is_named(name: str, field: str, value: object) -> None:
    with pytest.raises(PackageCorrupted, match=f"config.json has an unusable {field}; got .*"):
        read(name, with_value(name, field, value))


@every_family
def test_an_older_scaled_rotary_is_refused(name: str) -> None:
    config = copy.deepcopy(WRITTEN[name])
    rotary = config["text_config"].pop("rope_parameters")
    del rotary["rope_type"]
    config["text_config"]["rope_scaling"] = {**rotary, "type": "yarn"}
    with pytest.raises(PackageCorrupted, match=r"unusable text_config\.rope_scaling\.rope_type"):
        read(name, config)


@every_family
def test_a_missing_or_flat_weight_is_named(name: str) -> None:
    weight, embedding = FAMILIES[name].tower_weight, "patch_embed.proj.weight"
    with pytest.raises(PackageCorrupted, match=r"lacks visual\.patch_embed\.proj\.weight"):
        weight(embedding, {})
    with pytest.raises(PackageCorrupted, match="not a convolution over time and patch"):
        weight(embedding, {embedding: torch.zeros(2, 3)})
