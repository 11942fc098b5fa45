"""Resident memory of an export, measured on a random checkpoint with the shape of a real one.

    python -m benchmarks.export_memory --work DIR [--precision fp16]

Writes a checkpoint shaped like Qwen2.5-VL-3B (7.5 GB in bfloat16) into DIR, exports it in a process
of its own, and prints the peak of that process as JSON. DIR needs about 17 GB, or 24 in fp32.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from meiqa.locations import embedded_assets

TEXT = {
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}
VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "out_hidden_size": 2048,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "hidden_act": "silu",
}
Shapes = dict[str, tuple[int, ...]]


def linear(name: str, inputs: int, outputs: int, *, bias: bool = True) -> Shapes:
    """Tensors of a linear layer."""
    shapes: Shapes = {f"{name}.weight": (outputs, inputs)}
    return {**shapes, f"{name}.bias": (outputs,)} if bias else shapes


def gated_mlp(name: str, width: int, inner: int, *, bias: bool) -> Shapes:
    """Tensors of a SwiGLU."""
    return {
        **linear(f"{name}.gate_proj", width, inner, bias=bias),
        **linear(f"{name}.up_proj", width, inner, bias=bias),
        **linear(f"{name}.down_proj", inner, width, bias=bias),
    }


def shards() -> Iterator[Shapes]:
    """Tensors of each shard: one for the embeddings, one a layer or block."""
    width, inner = 2048, 11008
    yield {"model.embed_tokens.weight": (151936, width), "model.norm.weight": (width,)}
    for index in range(36):
        layer = f"model.layers.{index}"
        yield {
            **linear(f"{layer}.self_attn.q_proj", width, width),
            **linear(f"{layer}.self_attn.k_proj", width, 256),
            **linear(f"{layer}.self_attn.v_proj", width, 256),
            **linear(f"{layer}.self_attn.o_proj", width, width, bias=False),
            **gated_mlp(f"{layer}.mlp", width, inner, bias=False),
            f"{layer}.input_layernorm.weight": (width,),
            f"{layer}.post_attention_layernorm.weight": (width,),
        }
    seen, seen_inner = 1280, 3420
    for index in range(32):
        block = f"visual.blocks.{index}"
        yield {
            **linear(f"{block}.attn.qkv", seen, 3 * seen),
            **linear(f"{block}.attn.proj", seen, seen),
            **gated_mlp(f"{block}.mlp", seen, seen_inner, bias=True),
            f"{block}.norm1.weight": (seen,),
            f"{block}.norm2.weight": (seen,),
        }
    yield {
        "visual.patch_embed.proj.weight": (seen, 3, 2, 14, 14),
        "visual.merger.ln_q.weight": (seen,),
        **linear("visual.merger.mlp.0", 4 * seen, 4 * seen),
        **linear("visual.merger.mlp.2", 4 * seen, width),
    }


def random_bfloat16(
    shape: tuple[int, ...], norm: bool, rng: np.random.Generator
) -> NDArray[np.generic]:
    """Small normal numbers, or ones for a normalisation."""
    from ml_dtypes import bfloat16

    values = np.ones(shape, np.float32) if norm else rng.standard_normal(shape, np.float32) * 0.02
    return values.astype(bfloat16)


def write_checkpoint(folder: Path) -> int:
    """Write the random checkpoint; bytes of its weights."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    rng, total = np.random.default_rng(0), 0
    weight_map: dict[str, str] = {}
    for index, shapes in enumerate(shards()):
        file = f"model-{index:05d}.safetensors"
        tensors = {
            name: random_bfloat16(shape, "norm" in name or "ln_q" in name, rng)
            for name, shape in shapes.items()
        }
        save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(shapes, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    config = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        **TEXT,
        "vision_config": VISION,
    }
    processing = {"image_mean": [0.481, 0.458, 0.408], "image_std": [0.269, 0.261, 0.276]}
    for name, values in (
        ("config", config),
        ("preprocessor_config", processing),
        ("model.safetensors.index", {"metadata": {}, "weight_map": weight_map}),
    ):
        (folder / f"{name}.json").write_text(json.dumps(values))
    shutil.copy(embedded_assets() / "package" / "tokenizer.json", folder)
    return total


def measure(work: Path, precision: str) -> dict[str, object]:
    """Export the random checkpoint; its size, the time and the peak of resident memory."""
    checkpoint, package = work / "checkpoint", work / "package"
    weight_bytes = write_checkpoint(checkpoint)
    command = (
        *(sys.executable, "-m", "meiqa", "export", checkpoint),
        *("--out", package, "--precision", precision),
    )
    started = time.monotonic()
    subprocess.run(command, check=True)
    seconds = time.monotonic() - started
    # The largest child of this process; in KiB on Linux.
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    package_bytes = sum(path.stat().st_size for path in package.iterdir())
    return {
        "checkpoint_gb": round(weight_bytes / 1e9, 2),
        "precision": precision,
        "package_gb": round(package_bytes / 1e9, 2),
        "export_s": round(seconds, 1),
        "peak_resident_gb": round(peak / 1e9, 2),
        "machine": platform.platform(),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.export_memory")
    parser.add_argument("--work", type=Path, required=True, help="an empty or new folder")
    parser.add_argument("--precision", choices=("fp32", "fp16", "int4"), default="fp16")
    arguments = parser.parse_args()
    sys.stdout.write(json.dumps(measure(arguments.work, arguments.precision), indent=2) + "\n")


if __name__ == "__main__":
    main()
