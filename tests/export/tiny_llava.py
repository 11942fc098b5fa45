"""Tiny LLaVA-OneVision checkpoints with random weights, made and saved by transformers itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedModel,
)

from meiqa.engine.prompts import Q_SIT
from tests.export import tiny_qwen

TILE_PIXELS, PATCH_SIZE = 68, 16
"""Four patches and a rest that no patch sees, as 384 and 14 leave."""
SIDES = (1, 2, 3)
VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": TILE_PIXELS,
    "patch_size": PATCH_SIZE,
    "vision_use_head": False,
}


def make_tokenizer() -> Tokenizer:
    """A tokenizer that keeps the answers of Q-SiT whole, as Qwen's does."""
    tokenizer = tiny_qwen.make_tokenizer()
    words = (*Q_SIT.level_words, *Q_SIT.verdicts)
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in words])
    return tokenizer


def llava_onevision_config(
    tied: bool = True, vision: Mapping[str, Any] = {}, sides: tuple[int, ...] = SIDES, **text: Any
) -> LlavaOnevisionConfig:
    """Photos of up to `sides` tiles down and across; `text` changes the decoder's shape."""
    tokenizer = make_tokenizer()
    ids = tiny_qwen.token_ids(tokenizer)
    vision = {**VISION, **vision}
    side = vision["image_size"]
    rotary = {"rope_theta": 10_000.0}
    top = {name: text.pop(name) for name in ("multimodal_projector_bias",) if name in text}
    return LlavaOnevisionConfig(
        vision_config=vision,
        text_config={"model_type": "qwen2", **tiny_qwen.text_config(tokenizer, rotary), **text},
        image_grid_pinpoints=[[side * down, side * across] for down in sides for across in sides],
        image_token_index=ids["image_token_id"],
        video_token_index=ids["video_token_id"],
        tie_word_embeddings=tied,
        **top,
    )


def make_llava_onevision(
    tied: bool = True, seed: int = 0, **shape: Any
) -> LlavaOnevisionForConditionalGeneration:
    """A random LLaVA-OneVision."""
    model = LlavaOnevisionForConditionalGeneration(llava_onevision_config(tied, **shape))
    tiny_qwen.liven(model, seed)
    return model.eval()


def save(model: PreTrainedModel, folder: Path, max_shard_size: str = "50GB") -> Path:
    """Write a checkpoint as transformers does, in shards if it is told so."""
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    make_tokenizer().save(str(folder / "tokenizer.json"))
    side = model.config.vision_config.image_size
    image = {
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "size": {"height": side, "width": side},
        "image_grid_pinpoints": model.config.image_grid_pinpoints,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(image, indent=2) + "\n")
    return folder
