"""Checkpoints in Hugging Face's layout: config.json, model.safetensors, tokenizer.json.

Safetensors only: nothing in a checkpoint is executed. Half precision on disk, single in memory.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import nn

from meiqa.errors import PackageCorrupted, PackageNotFound
from meiqa.export.conv_hybrid import ConvHybridConfig, ConvHybridTower
from meiqa.export.decoder import DecoderConfig, SharedPrefixDecoder

ARCHITECTURE = "MeiqaConvHybridForConditionalGeneration"
SUPPORTED = (ARCHITECTURE,)


class ConvHybridVlm(nn.Module):
    """Conv-hybrid vision tower and Qwen2.5-VL decoder."""

    def __init__(self, vision: ConvHybridConfig, text: DecoderConfig) -> None:
        super().__init__()
        self.visual = ConvHybridTower(vision)
        self.language_model = SharedPrefixDecoder(text)


@dataclass(frozen=True)
class Checkpoint:
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


def save_checkpoint(checkpoint: Checkpoint, folder: Path) -> None:
    """Write a checkpoint; the tied output layer is not stored twice."""
    folder.mkdir(parents=True, exist_ok=True)
    model = checkpoint.model
    state = model.state_dict()
    if model.language_model.config.tie_word_embeddings:
        del state["language_model.lm_head.weight"]
    halves = {
        f"model.{name}": value.half().contiguous() if value.is_floating_point() else value
        for name, value in state.items()
    }
    save_file(halves, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": [ARCHITECTURE],
        "torch_dtype": "float16",
        "text_config": asdict(model.language_model.config),
        "vision_config": asdict(model.visual.config),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    image = {"image_mean": checkpoint.pixel_mean, "image_std": checkpoint.pixel_std}
    (folder / "preprocessor_config.json").write_text(json.dumps(image, indent=2) + "\n")
    checkpoint.tokenizer.save(str(folder / "tokenizer.json"))


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        PackageNotFound: a file is missing.
        PackageCorrupted: a file is not what it should be, the architecture is not supported, or
            the weights do not fit it.
    """
    config = read_json(folder / "config.json")
    architecture = (config.get("architectures") or ["none"])[0]
    if architecture not in SUPPORTED:
        raise PackageCorrupted(
            f"{folder} holds an architecture that can't be exported",
            seen=architecture,
            allowed=", ".join(SUPPORTED),
        )
    image = read_json(folder / "preprocessor_config.json")
    try:
        model = ConvHybridVlm(*shapes_in(config))
        mean, std = tuple(image["image_mean"]), tuple(image["image_std"])
    except (KeyError, TypeError, ValueError) as error:
        raise PackageCorrupted(
            f"the configuration in {folder} is not what this version reads", seen=str(error)
        ) from error
    load_weights(model, required(folder / "model.safetensors"))
    return Checkpoint(model.eval(), read_tokenizer(folder / "tokenizer.json"), mean, std)


def shapes_in(config: dict[str, Any]) -> tuple[ConvHybridConfig, DecoderConfig]:
    """Shapes of the tower and of the decoder in config.json."""
    vision, text = config["vision_config"], config["text_config"]
    return (
        ConvHybridConfig(**{**vision, "widths": tuple(vision["widths"])}),
        DecoderConfig(**{**text, "mrope_section": tuple(text["mrope_section"])}),
    )


def load_weights(model: ConvHybridVlm, path: Path) -> None:
    """Copy weights into the model; every weight must be there and none left over."""
    try:
        stored = {name.removeprefix("model."): value for name, value in load_file(path).items()}
    except SafetensorError as error:
        raise PackageCorrupted(f"{path} is not a safetensors file", seen=str(error)) from error
    embedding = "language_model.embed_tokens.weight"
    if model.language_model.config.tie_word_embeddings and embedding in stored:
        stored["language_model.lm_head.weight"] = stored[embedding]
    found = {(name, tuple(value.shape)) for name, value in stored.items()}
    expected = {(name, tuple(value.shape)) for name, value in model.state_dict().items()}
    if found != expected:
        raise PackageCorrupted(
            f"{path} does not hold this architecture's weights",
            seen=", ".join(f"{name} {list(shape)}" for name, shape in sorted(found ^ expected)[:4]),
        )
    singles = {n: v.float() if v.is_floating_point() else v for n, v in stored.items()}
    with torch.no_grad():
        model.load_state_dict(singles)


def required(path: Path) -> Path:
    """The path, if there is a file."""
    if not path.is_file():
        raise PackageNotFound(
            "a checkpoint lacks a file", seen=str(path), hint="give a complete Hugging Face folder"
        )
    return path


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a checkpoint."""
    try:
        values = json.loads(required(path).read_text())
    except ValueError as error:
        raise PackageCorrupted(f"{path} is not valid JSON", seen=str(error)) from error
    if not isinstance(values, dict):
        raise PackageCorrupted(f"{path} is not an object", seen=type(values).__name__)
    return values


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a checkpoint."""
    text = required(path).read_text()
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing narrower
        raise PackageCorrupted(f"{path} is not a tokenizer", seen=str(error)) from error
