"""config.json of the families, as transformers 5 and older releases write it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from meiqa.errors import PackageCorrupted
from meiqa.export.decoder import DecoderConfig, DeltaConfig
from meiqa.export.families import llava_onevision, qwen2_5_vl, qwen3_5, qwen3_vl
from tests.export import tiny_llava, tiny_qwen

FAMILIES = {
    "qwen2_5_vl": qwen2_5_vl.FAMILY,
    "qwen3_vl": qwen3_vl.FAMILY,
    "qwen3_5": qwen3_5.FAMILY,
    "llava_onevision": llava_onevision.FAMILY,
}
TOKENIZER = tiny_qwen.make_tokenizer()
WRITTEN: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": tiny_qwen.qwen2_5_vl_config(TOKENIZER).to_dict(),
    "qwen3_vl": tiny_qwen.qwen3_vl_config(TOKENIZER).to_dict(),
    "qwen3_5": tiny_qwen.qwen3_5_config(TOKENIZER).to_dict(),
    "llava_onevision": tiny_llava.llava_onevision_config().to_dict(),
}
every_family = pytest.mark.parametrize("name", FAMILIES)
of_old_releases = pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
of_qwen = pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "qwen3_5"])

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
    "text_config.rope_parameters.rope_theta",
    "vision_config",
    "vision_config.hidden_size",
]
QWEN_FIELDS = [
    *SHARED_FIELDS,
    "text_config.rms_norm_eps",
    "text_config.rope_parameters.mrope_section",
]
QWEN3_TOWER_FIELDS = [
    "vision_config.depth",
    "vision_config.intermediate_size",
    "vision_config.num_heads",
    "vision_config.out_hidden_size",
    "vision_config.patch_size",
    "vision_config.spatial_merge_size",
    "vision_config.num_position_embeddings",
]
REQUIRED = {
    "qwen2_5_vl": QWEN_FIELDS,
    "qwen3_vl": [
        *QWEN_FIELDS,
        *QWEN3_TOWER_FIELDS,
        "text_config.head_dim",
        "vision_config.deepstack_visual_indexes",
    ],
    "qwen3_5": [
        *QWEN_FIELDS,
        *QWEN3_TOWER_FIELDS,
        "text_config.head_dim",
        "text_config.rope_parameters.partial_rotary_factor",
        "text_config.layer_types",
        "text_config.linear_num_key_heads",
        "text_config.linear_num_value_heads",
        "text_config.linear_key_head_dim",
        "text_config.linear_value_head_dim",
        "text_config.linear_conv_kernel_dim",
    ],
    "llava_onevision": [
        *SHARED_FIELDS,
        "image_grid_pinpoints",
        "vision_aspect_ratio",
        "vision_config.image_size",
        "vision_config.intermediate_size",
        "vision_config.num_attention_heads",
        "vision_config.num_hidden_layers",
        "vision_config.patch_size",
    ],
}


def read(name: str, config: dict[str, Any]) -> tuple[DecoderConfig, tuple[int, int]]:
    """Everything that the exporter reads from a config.json."""
    family = FAMILIES[name]
    family.tower(config)
    family.tiles(config)
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
    assert grid == ((16, 1) if name == "llava_onevision" else (8, 2))
    assert (
        shape
        == {
            "llava_onevision": DecoderConfig(456, 64, 96, 3, 4, 2, (0, 0, 8), rope_theta=10_000.0),
            "qwen3_5": DecoderConfig(
                448,
                64,
                96,
                4,
                4,
                2,
                (2, 1, 1),
                rope_theta=10_000.0,
                head_dim=32,
                attention_bias=False,
                qk_norm=True,
                mrope_interleaved=True,
                rotary_dim=8,
                attention_gate=True,
                delta=DeltaConfig((0, 1, 2), 4, 4, 16, 16, 4),
            ),
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


@of_old_releases
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
        ("qwen3_5", "text_config.attention_bias", True),
        ("qwen3_5", "text_config.layer_types", ["linear_attention"] * 4),
        ("qwen3_5", "text_config.layer_types", ["full_attention", "linear_attention"]),
        ("qwen3_5", "text_config.linear_num_value_heads", 6),
        ("qwen3_5", "text_config.linear_conv_kernel_dim", 1),
        ("qwen3_5", "text_config.rope_parameters.partial_rotary_factor", 1.5),
        ("qwen3_5", "text_config.rope_parameters.partial_rotary_factor", 0.22),
        ("qwen3_5", "text_config.rope_parameters.mrope_section", [2, 2, 1]),
        ("llava_onevision", "vision_feature_layer", -2),
        ("llava_onevision", "vision_feature_select_strategy", "default"),
        ("llava_onevision", "projector_hidden_act", "relu"),
        ("llava_onevision", "vision_aspect_ratio", "pad"),
        ("llava_onevision", "image_grid_pinpoints", [[68, 100]]),
        ("llava_onevision", "image_grid_pinpoints", []),
        ("llava_onevision", "image_grid_pinpoints", "all"),
        ("llava_onevision", "vision_config.model_type", "clip_vision_model"),
        ("llava_onevision", "vision_config.hidden_act", "gelu"),
        ("llava_onevision", "vision_config.image_size", 15),
        ("llava_onevision", "vision_config.num_attention_heads", 3),
    ],
)
def test_an_unusable_field_is_named(name: str, field: str, value: object) -> None:
    with pytest.raises(PackageCorrupted, match=f"config.json has an unusable {field}; got .*"):
        read(name, with_value(name, field, value))


@of_old_releases
def test_an_older_scaled_rotary_is_refused(name: str) -> None:
    config = copy.deepcopy(WRITTEN[name])
    rotary = config["text_config"].pop("rope_parameters")
    del rotary["rope_type"]
    config["text_config"]["rope_scaling"] = {**rotary, "type": "yarn"}
    with pytest.raises(PackageCorrupted, match=r"unusable text_config\.rope_scaling\.rope_type"):
        read(name, config)


@of_qwen
def test_a_missing_or_flat_weight_is_named(name: str) -> None:
    weight, embedding = FAMILIES[name].tower_weight, "patch_embed.proj.weight"
    with pytest.raises(PackageCorrupted, match=r"lacks visual\.patch_embed\.proj\.weight"):
        weight(embedding, {})
    with pytest.raises(PackageCorrupted, match="not a convolution over time and patch"):
        weight(embedding, {embedding: torch.zeros(2, 3)})


def test_llava_as_releases_before_5_write_it() -> None:
    config = copy.deepcopy(WRITTEN["llava_onevision"])
    text = config["text_config"]
    text["rope_theta"] = text.pop("rope_parameters")["rope_theta"]
    del text["rms_norm_eps"], config["vision_config"]["layer_norm_eps"]
    assert read("llava_onevision", config) == read("llava_onevision", WRITTEN["llava_onevision"])


@pytest.mark.parametrize(
    ("most", "tilings"),
    [("9", {(r, c) for r in (1, 2, 3) for c in (1, 2, 3)}), ("2", {(1, 1), (1, 2), (2, 1)})],
)
def test_photos_are_cut_into_no_more_tiles_than_keep_their_tokens(
    most: str, tilings: set[tuple[int, int]]
) -> None:
    config = with_value("llava_onevision", "vision_aspect_ratio", f"anyres_max_{most}")
    side, found = llava_onevision.FAMILY.tiles(config)
    assert side == tiny_llava.TILE_PIXELS
    assert {*found} == tilings


@pytest.mark.parametrize(
    ("stored", "ours"),
    [
        (
            "vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias",
            "encoder.layers.0.mlp.fc1.bias",
        ),
        ("model.vision_tower.encoder.layers.0.mlp.fc1.bias", "encoder.layers.0.mlp.fc1.bias"),
        ("multi_modal_projector.linear_1.bias", "multi_modal_projector.linear_1.bias"),
        ("model.image_newline", "image_newline"),
    ],
)
def test_llavas_tensors_by_their_names_in_all_releases(stored: str, ours: str) -> None:
    canonical = llava_onevision.FAMILY.canonical
    assert canonical(stored) == f"visual.{ours}"
    for name in ("language_model.model.", "model.language_model."):
        assert canonical(f"{name}norm.weight") == "language_model.norm.weight"
    assert canonical("language_model.lm_head.weight") == canonical("lm_head.weight")


def test_layers_for_several_tokens_at_once_are_left_out() -> None:
    unread = qwen3_5.FAMILY.unread
    assert qwen3_5.FAMILY.canonical("mtp.layers.0.mlp.up_proj.weight").startswith(unread)
    assert not qwen3_5.FAMILY.canonical("model.layers.0.mlp.up_proj.weight").startswith(unread)
