"""Tiny Qwen-VL checkpoints with random weights, made and saved by transformers itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import (
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from training.texts import corpus_of, train_tokenizer

PATCH_SIZE, MERGE_SIZE, TEMPORAL_PATCH_SIZE = 8, 2, 2
CELL_PIXELS = PATCH_SIZE * MERGE_SIZE
WINDOW_SIDE = 3
"""Cells along a side of Qwen2.5-VL's windows here; 4 in the published models."""

WIDTH, HEADS, KV_HEADS, LAYERS, INNER = 64, 4, 2, 3, 96
QWEN3_HEAD_DIM = 24
"""Not WIDTH / HEADS, as in Qwen3."""

VISION = {
    "depth": 4,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": PATCH_SIZE,
    "spatial_merge_size": MERGE_SIZE,
    "temporal_patch_size": TEMPORAL_PATCH_SIZE,
    "out_hidden_size": WIDTH,
}
TEXT = {
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
}
DEEPSTACK_BLOCKS = (0, 2)
TEXTS = [
    "Slight blur. The picture is soft and dark, with little noise. Overall poor quality.",
    "The picture is sharp and well exposed, with natural colour. Overall good quality.",
]


def make_tokenizer() -> Tokenizer:
    """A tokenizer with Qwen's special tokens."""
    return train_tokenizer([*corpus_of([]), *TEXTS * 50])


def padded_vocabulary(tokenizer: Tokenizer) -> int:
    """Rows of the embedding: a multiple of 8 that leaves some without a token, as real ones do."""
    return (tokenizer.get_vocab_size() // 8 + 1) * 8


def token_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """The special tokens that config.json names; no token stands for a video."""
    return {
        "image_token_id": tokenizer.token_to_id("<|image_pad|>"),
        "vision_start_token_id": tokenizer.token_to_id("<|vision_start|>"),
        "vision_end_token_id": tokenizer.token_to_id("<|vision_end|>"),
        "video_token_id": padded_vocabulary(tokenizer) - 1,
    }


def text_config(tokenizer: Tokenizer, rotary: dict[str, Any]) -> dict[str, Any]:
    """What both families' decoders have in common."""
    return {
        **TEXT,
        "vocab_size": padded_vocabulary(tokenizer),
        "rope_parameters": {"rope_type": "default", **rotary},
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
        "bos_token_id": None,
    }


def qwen2_5_vl_config(tokenizer: Tokenizer, tied: bool = True) -> Qwen2_5_VLConfig:
    """Windows of 3 x 3 cells, full attention in the second and the last block."""
    windows = {"window_size": WINDOW_SIDE * CELL_PIXELS, "fullatt_block_indexes": [1, 3]}
    rotary = {"mrope_section": [2, 3, 3], "rope_theta": 1_000_000.0}
    return Qwen2_5_VLConfig(
        vision_config={**VISION, **windows},
        text_config=text_config(tokenizer, rotary),
        tie_word_embeddings=tied,
        **token_ids(tokenizer),
    )


def qwen3_vl_config(tokenizer: Tokenizer, tied: bool = True) -> Qwen3VLConfig:
    """Two DeepStack features and a 6 x 6 table of learned positions."""
    learned = {
        "num_position_embeddings": 36,
        "deepstack_visual_indexes": list(DEEPSTACK_BLOCKS),
        "hidden_act": "gelu_pytorch_tanh",
    }
    rotary = {"mrope_section": [5, 4, 3], "mrope_interleaved": True, "rope_theta": 5_000_000.0}
    return Qwen3VLConfig(
        vision_config={**VISION, **learned},
        text_config={**text_config(tokenizer, rotary), "head_dim": QWEN3_HEAD_DIM},
        tie_word_embeddings=tied,
        **token_ids(tokenizer),
    )


def qwen3_5_config(
    tokenizer: Tokenizer, tied: bool = True, vision: Mapping[str, Any] = {}, **text: Any
) -> Qwen3_5Config:
    """A layer in four attends, as in the published models; `text` changes the decoder's shape."""
    learned = {"num_position_embeddings": 36, "hidden_act": "gelu_pytorch_tanh"}
    rotary = {
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
        "rope_theta": 10_000.0,
        "partial_rotary_factor": 0.25,
    }
    linear = {
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 4,
    }
    rotary |= text.pop("rotary", {})
    return Qwen3_5Config(
        vision_config={**VISION, **learned, **vision},
        text_config={
            **text_config(tokenizer, rotary),
            "head_dim": 32,
            "num_hidden_layers": 4,
            **linear,
            **text,
        },
        tie_word_embeddings=tied,
        **token_ids(tokenizer),
    )


def make_qwen3_5(tied: bool = True, seed: int = 0, **shape: Any) -> Qwen3_5ForConditionalGeneration:
    """A random Qwen3.5."""
    model = Qwen3_5ForConditionalGeneration(qwen3_5_config(make_tokenizer(), tied, **shape))
    liven(model, seed)
    return model.eval()


def make_qwen2_5_vl(tied: bool = True, seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    """A random Qwen2.5-VL."""
    model = Qwen2_5_VLForConditionalGeneration(qwen2_5_vl_config(make_tokenizer(), tied))
    liven(model, seed)
    return model.eval()


def make_qwen3_vl(tied: bool = True, seed: int = 0) -> Qwen3VLForConditionalGeneration:
    """A random Qwen3-VL."""
    model = Qwen3VLForConditionalGeneration(qwen3_vl_config(make_tokenizer(), tied))
    liven(model, seed)
    return model.eval()


def liven(model: torch.nn.Module, seed: int) -> None:
    """Draw weights large enough for pictures and positions to make a difference."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for name, weight in model.named_parameters():
            torch.nn.init.normal_(weight, std=1.0 if is_norm(name) else 0.25)
            if name.endswith("A_log"):  # states that forget at once, and that hardly do
                torch.nn.init.uniform_(weight, -4.0, 1.0)


def is_norm(name: str) -> bool:
    """Whether a parameter belongs to a normalisation."""
    return "norm" in name or "ln_q" in name


def save(model: PreTrainedModel, folder: Path, max_shard_size: str = "50GB") -> Path:
    """Write a checkpoint as transformers does, in shards if it is told so."""
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    make_tokenizer().save(str(folder / "tokenizer.json"))
    image = {
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "patch_size": PATCH_SIZE,
        "merge_size": MERGE_SIZE,
        "temporal_patch_size": TEMPORAL_PATCH_SIZE,
        "min_pixels": 4 * CELL_PIXELS**2,
        "max_pixels": 64 * CELL_PIXELS**2,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(image, indent=2) + "\n")
    return folder
