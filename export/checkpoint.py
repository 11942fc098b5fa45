"""A checkpoint in Hugging Face's layout, opened for export: what it is, but not its weights yet."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from meiqa.engine.manifest import DecoderShape, ImageProcessing
from meiqa.errors import PackageCorrupted, PackageNotFound
from meiqa.export.decoder import DecoderConfig, SharedPrefixDecoder
from meiqa.export.families import FAMILIES
from meiqa.export.families.base import Family
from meiqa.export.weights import SHOWN_NAMES, StoredWeights, weightless

LEAST_PIXELS, MOST_PIXELS = 128 * 128, 1024 * 1024
"""Bounds of the area that the tower sees, unless the checkpoint's own are narrower."""
HEAD, EMBEDDING = "lm_head.weight", "embed_tokens.weight"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint with everything about it that is small.

    Attributes:
        folder: where it is.
        family: what it is.
        config: config.json.
        processing: preprocessor_config.json.
        weights: its tensors, on disk.
        tokenizer: its tokenizer.
    """

    folder: Path
    family: Family
    config: Mapping[str, Any]
    processing: Mapping[str, Any]
    weights: StoredWeights
    tokenizer: Tokenizer

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Open a checkpoint and check that its weights are those of its architecture.

        Raises:
            PackageNotFound: a file is missing.
            PackageCorrupted: a file is not what it should be, the architecture is not supported,
                or the weights do not fit it.
        """
        config = read_json(folder / "config.json")
        made = cls(
            folder=folder,
            family=family_of(folder, config),
            config=config,
            processing=read_processing(folder),
            weights=StoredWeights.open(folder),
            tokenizer=read_tokenizer(folder / "tokenizer.json"),
        )
        made.check_weights()
        return made

    @cached_property
    def text(self) -> DecoderConfig:
        """Shape of the decoder."""
        return self.family.decoder(self.config)

    def tower(self) -> nn.Module:
        """The vision tower, without weights."""
        with weightless():
            return self.family.tower(self.config).eval()

    def decoder(self) -> SharedPrefixDecoder:
        """The decoder, without weights; its output layer has its own, tied or not."""
        with weightless():
            return SharedPrefixDecoder(self.text).eval()

    def tower_weight(self, name: str) -> Tensor:
        """One parameter of the tower."""
        return self.family.tower_weight(name, self.weights.below("visual."))

    def decoder_weight(self, name: str) -> Tensor:
        """One parameter of the decoder."""
        return self.weights.below("language_model.")[self.stored_decoder_name(name)]

    def stored_decoder_name(self, name: str) -> str:
        """The tensor behind a parameter: a tied output layer is the embedding.

        One that is stored counts, whatever config.json says, as in transformers.
        """
        stored = f"language_model.{HEAD}" in self.weights
        tied = name == HEAD and self.text.tie_word_embeddings and not stored
        return EMBEDDING if tied else name

    def check_weights(self) -> None:
        """Refuse weights that are missing or do not fit, from their headers alone.

        Raises:
            PackageCorrupted: some do.
        """
        wrong = list(self.misfits())
        if wrong:
            raise PackageCorrupted(
                f"{self.folder} does not hold the weights of {self.family.architecture}",
                seen=", ".join(wrong[:SHOWN_NAMES]),
                hint="compare config.json with the weights",
            )

    def misfits(self) -> Iterator[str]:
        """Tensors that are missing, of another shape, or belong to nothing."""
        stored = self.weights.headers()
        read: set[str] = set()
        visual, text = (Recorded(stored, root, read) for root in ("visual.", "language_model."))
        for name, parameter in self.tower().named_parameters():
            found = visual_shape(self.family, name, visual)
            yield from misfit(f"visual.{name}", found, parameter.shape)
        for name, parameter in self.decoder().named_parameters():
            kept = text.get(self.stored_decoder_name(name))
            found = None if kept is None else kept.shape
            yield from misfit(f"language_model.{name}", found, parameter.shape)
        left = (name for name in stored.keys() - read if not name.endswith("num_batches_tracked"))
        yield from (f"{name} is unknown" for name in left)

    @property
    def image(self) -> ImageProcessing:
        """How pixels become the tower's patches."""
        patch, merge = self.family.grid(self.config)
        least, most = pixel_bounds(self.processing)
        try:
            mean, std = (tuple(self.processing[f"image_{part}"]) for part in ("mean", "std"))
        except (KeyError, TypeError) as error:
            raise PackageCorrupted(
                f"{self.folder / 'preprocessor_config.json'} does not say how to normalise pixels",
                seen=str(error),
                allowed="image_mean and image_std",
            ) from error
        return ImageProcessing(
            patch_size=patch,
            merge_size=merge,
            min_pixels=least,
            max_pixels=most,
            mean=mean,
            std=std,
        )

    @property
    def decoder_shape(self) -> DecoderShape:
        """What the host has to know of the decoder."""
        return decoder_shape_of(self.text)


def decoder_shape_of(text: DecoderConfig) -> DecoderShape:
    """What the host has to know of a decoder."""
    return DecoderShape(
        layers=text.num_hidden_layers,
        kv_heads=text.num_key_value_heads,
        head_dim=text.head_dim,
        hidden_size=text.hidden_size,
        vocab_size=text.vocab_size,
        deepstack=text.deepstack,
    )


def visual_shape(family: Family, name: str, stored: Mapping[str, Tensor]) -> torch.Size | None:
    """Shape of a parameter of the tower; None if what it is made of is missing."""
    try:
        return family.tower_weight(name, stored).shape
    except KeyError:
        return None


def misfit(name: str, found: torch.Size | None, wanted: torch.Size) -> Iterator[str]:
    """What is wrong with a tensor, if anything is."""
    if found is None:
        yield f"{name} is missing"
    elif found != wanted:
        yield f"{name} {list(found)} is not {list(wanted)}"


class Recorded(Mapping[str, Tensor]):
    """The tensors below a root, with a record of those that were asked for."""

    def __init__(self, tensors: Mapping[str, Tensor], root: str, read: set[str]) -> None:
        self._tensors, self._root, self._read = tensors, root, read

    def __getitem__(self, name: str) -> Tensor:
        self._read.add(self._root + name)
        return self._tensors[self._root + name]

    def __iter__(self) -> Iterator[str]:
        names = (name for name in self._tensors if name.startswith(self._root))
        return (name.removeprefix(self._root) for name in names)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def family_of(folder: Path, config: Mapping[str, Any]) -> Family:
    """The family that config.json names first."""
    named = config.get("architectures")
    architecture = str(named[0]) if isinstance(named, list) and named else "none"
    if architecture not in FAMILIES:
        raise PackageCorrupted(
            f"{folder} holds an architecture that can't be exported",
            seen=architecture,
            allowed=", ".join(sorted(FAMILIES)),
        )
    return FAMILIES[architecture]


def pixel_bounds(processing: Mapping[str, Any]) -> tuple[int, int]:
    """Least and most pixels that the tower is shown: the checkpoint's own bounds, within ours.

    Raises:
        PackageCorrupted: they are not whole numbers, or leave nothing.
    """
    size = processing.get("size")
    size = size if isinstance(size, Mapping) else {}
    least = processing.get("min_pixels") or size.get("shortest_edge") or LEAST_PIXELS
    most = processing.get("max_pixels") or size.get("longest_edge") or MOST_PIXELS
    for bound in (least, most):
        if type(bound) is not int:
            raise PackageCorrupted(
                "the checkpoint's bounds of the area are not whole numbers", seen=repr(bound)
            )
    if most < LEAST_PIXELS or least > MOST_PIXELS:
        raise PackageCorrupted(
            "the checkpoint sees areas that no photo is brought to",
            seen=f"{least} to {most} pixels",
            allowed=f"something between {LEAST_PIXELS} and {MOST_PIXELS}",
        )
    return max(LEAST_PIXELS, least), min(MOST_PIXELS, most)


def read_processing(folder: Path) -> dict[str, Any]:
    """How the checkpoint's pixels are normalised; transformers 5 writes it into another file."""
    new = folder / "processor_config.json"
    if not new.is_file() or (folder / "preprocessor_config.json").is_file():
        return read_json(folder / "preprocessor_config.json")
    part = read_json(new).get("image_processor")
    if not isinstance(part, dict):
        raise PackageCorrupted(f"{new} has no image_processor")
    return part


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
    """The tokenizer of a checkpoint, without limits of its own on the length of a text."""
    try:
        tokenizer = Tokenizer.from_str(required(path).read_text())
    except PackageNotFound:
        raise
    except Exception as error:  # the library raises nothing narrower
        raise PackageCorrupted(f"{path} is not a tokenizer", seen=str(error)) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
