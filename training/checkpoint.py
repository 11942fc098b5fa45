"""The default model as a trainable module, written as a checkpoint and read back.

Half precision on disk, single in memory.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import nn

from meiqa.export.checkpoint import (
    EMBEDDING,
    HEAD,
    SINGLE,
    StoredWeights,
    read_json,
    read_tokenizer,
)
from meiqa.export.decoder import DecoderConfig, SharedPrefixDecoder
from meiqa.export.families.conv_hybrid import (
    FAMILY,
    ConvHybridConfig,
    ConvHybridTower,
    decoder_config,
    tower_config,
)

MIN_PIXELS, MAX_PIXELS = 128 * 128, 512 * 512


class ConvHybridVlm(nn.Module):
    """Conv-hybrid vision tower and Qwen2.5-VL decoder."""

    def __init__(self, vision: ConvHybridConfig, text: DecoderConfig) -> None:
        super().__init__()
        self.visual = ConvHybridTower(vision)
        self.language_model = SharedPrefixDecoder(text)


@dataclass(frozen=True)
class TrainedVlm:
    """A model with what is needed to prompt it.

    Attributes:
        model: weights in single precision.
        tokenizer: its tokenizer.
        pixel_mean, pixel_std: normalisation of each colour channel.
    """

    model: ConvHybridVlm
    tokenizer: Tokenizer
    pixel_mean: tuple[float, float, float]
    pixel_std: tuple[float, float, float]


def save_checkpoint(trained: TrainedVlm, folder: Path) -> None:
    """Write a checkpoint; the tied output layer is not stored twice."""
    folder.mkdir(parents=True, exist_ok=True)
    model = trained.model
    state = model.state_dict()
    if model.language_model.config.tie_word_embeddings:
        del state[f"language_model.{HEAD}"]
    halves = {
        f"model.{name}": value.half().contiguous() if value.is_floating_point() else value
        for name, value in state.items()
    }
    save_file(halves, folder / SINGLE, metadata={"format": "pt"})
    config = {
        "architectures": [FAMILY.architecture],
        "model_type": FAMILY.model_type,
        "torch_dtype": "float16",
        "text_config": asdict(model.language_model.config),
        "vision_config": asdict(model.visual.config),
    }
    processing = {
        "image_mean": trained.pixel_mean,
        "image_std": trained.pixel_std,
        "min_pixels": MIN_PIXELS,
        "max_pixels": MAX_PIXELS,
        "pad_to_grid": True,
    }
    for name, values in (("config", config), ("preprocessor_config", processing)):
        (folder / f"{name}.json").write_text(json.dumps(values, indent=2) + "\n")
    trained.tokenizer.save(str(folder / "tokenizer.json"))


def load_checkpoint(folder: Path) -> TrainedVlm:
    """Read a checkpoint to go on training with.

    Raises:
        PackageNotFound, PackageCorrupted: a file is missing or is not what it should be.
    """
    config = read_json(folder / "config.json")
    processing = read_json(folder / "preprocessor_config.json")
    model = ConvHybridVlm(tower_config(config), decoder_config(config))
    stored = dict(StoredWeights.open(folder, FAMILY))
    if model.language_model.config.tie_word_embeddings:
        stored[f"language_model.{HEAD}"] = stored[f"language_model.{EMBEDDING}"]
    with torch.no_grad():
        model.load_state_dict(stored)
    mean, std = (tuple(processing[f"image_{part}"]) for part in ("mean", "std"))
    return TrainedVlm(model.eval(), read_tokenizer(folder / "tokenizer.json"), mean, std)
