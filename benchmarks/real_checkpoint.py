"""A checkpoint whose language is real: a published decoder behind a small random tower.

    python -m benchmarks.real_checkpoint GGUF --out CHECKPOINT [--layers N]

Weights of a Llama or Qwen2 decoder, as GGUF files hold them, are put into the shape of Qwen2.5-VL
in bfloat16, with a vision tower of random weights before them: no whole vision-language model is
small enough to be tried often, and what quantising does to massive activations and to written text
shows in the decoder alone. Needs the packages `gguf` and `accelerate`. Text logits equal those of
the decoder by itself; the largest difference is printed.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

PATCH_SIZE, MERGE_SIZE = 14, 2
VISION = {
    "depth": 2,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_heads": 4,
    "patch_size": PATCH_SIZE,
    "spatial_merge_size": MERGE_SIZE,
    "temporal_patch_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": [1],
}
MARKS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|im_start|>", "<|im_end|>")
SHARD = "600MB"
SENTENCE = "The photograph is sharp where it matters, and its colours are natural."


def with_marks(tokenizer: Any, model: Any) -> None:
    """Add the tokens that stand around a picture, with a row of the embedding each."""
    tokenizer.add_special_tokens({"additional_special_tokens": list(MARKS)})
    model.resize_token_embeddings(max(len(tokenizer), model.config.vocab_size), mean_resizing=False)


def config_of(model: Any, tokenizer: Any) -> Qwen2_5_VLConfig:
    """Describe the decoder as Qwen2.5-VL does."""
    text = model.config
    half = text.hidden_size // text.num_attention_heads // 2
    rows = half * 3 // 8
    rotary = {
        "rope_type": "default",
        "mrope_section": [half - 2 * rows, rows, rows],
        "rope_theta": text.rope_parameters["rope_theta"],
    }
    copied = (
        *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "vocab_size"),
    )
    start, end, pad, _, stop = map(tokenizer.convert_tokens_to_ids, MARKS)
    return Qwen2_5_VLConfig(
        vision_config={**VISION, "out_hidden_size": text.hidden_size},
        text_config={
            **{name: getattr(text, name) for name in copied},
            "rope_parameters": rotary,
            "eos_token_id": stop,
            "bos_token_id": None,
        },
        tie_word_embeddings=text.tie_word_embeddings,
        vision_start_token_id=start,
        vision_end_token_id=end,
        image_token_id=pad,
        video_token_id=start,
    )


def dressed(model: Any, config: Qwen2_5_VLConfig) -> Any:
    """Put the decoder's weights behind a random tower; a bias that it lacks is nothing."""
    torch.manual_seed(0)
    whole: Any = Qwen2_5_VLForConditionalGeneration(config)
    whole.eval()
    given: dict[str, Any] = {
        name.replace("model.", "model.language_model.", 1): weight
        for name, weight in model.state_dict().items()
    }
    missing, unexpected = whole.load_state_dict(given, strict=False)
    assert not unexpected, unexpected
    for name in missing:
        assert ".visual." in name or name.endswith(("_proj.bias", "lm_head.weight")), name
        if name.endswith("_proj.bias") and "language_model" in name:
            torch.nn.init.zeros_(whole.get_parameter(name))
    return whole


def make_checkpoint(gguf: Path, out: Path, layers: int | None = None) -> float:
    """Write the checkpoint, and give the largest difference of text logits.

    Args:
        layers: take the first so many of the decoder; all by default.
    """
    where, file = str(gguf.parent), gguf.name
    tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=file)
    model: Any = AutoModelForCausalLM.from_pretrained(where, gguf_file=file, dtype=torch.float32)
    model.eval()
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = len(model.model.layers)
    with_marks(tokenizer, model)
    whole = dressed(model, config_of(model, tokenizer))
    asked = tokenizer(SENTENCE, return_tensors="pt")
    with torch.no_grad():
        wanted, made = (each(**asked).logits for each in (model, whole))
    whole.to(torch.bfloat16).save_pretrained(out, max_shard_size=SHARD)
    tokenizer.backend_tokenizer.save(str(out / "tokenizer.json"))
    side = PATCH_SIZE * MERGE_SIZE
    image = {
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "patch_size": PATCH_SIZE,
        "merge_size": MERGE_SIZE,
        "temporal_patch_size": 2,
        "min_pixels": 4 * side**2,
        "max_pixels": 256 * side**2,
    }
    (out / "preprocessor_config.json").write_text(json.dumps(image, indent=2) + "\n")
    return float((wanted - made).abs().max())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real_checkpoint", description=__doc__
    )
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, help="the first so many; all by default")
    given = parser.parse_args()
    difference = make_checkpoint(given.gguf, given.out, given.layers)
    sys.stdout.write(f"text logits differ by {difference:.1e}\n")


if __name__ == "__main__":
    main()
