"""A checkpoint in Hugging Face's layout, opened for export: what it is, but not its weights yet.

Weights are read tensor by tensor, so that a large model is never in memory whole. Safetensors only:
nothing in a checkpoint is executed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import Tensor, nn

from meiqa.engine.manifest import ImageProcessing
from meiqa.errors import PackageCorrupted, PackageNotFound
from meiqa.export.decoder import DecoderConfig, SharedPrefixDecoder
from meiqa.export.families import FAMILIES
from meiqa.export.families.base import TEXT, VISUAL, Family

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
WANTED = ("*.json", "*.safetensors")
"""What is downloaded: never code, never pickled weights."""
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHOWN_NAMES = 4
LEAST_PIXELS, MOST_PIXELS = 128 * 128, 1024 * 1024
"""Bounds of the area that the tower sees, unless the checkpoint's own are narrower."""
HEAD, EMBEDDING = "lm_head.weight", "embed_tokens.weight"


def local_folder(checkpoint: str) -> Path:
    """Find the folder of a checkpoint, downloaded if it is a hub id.

    Raises:
        PackageNotFound: there is no such folder, and nothing of that name can be downloaded.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    folder = Path(checkpoint)
    if folder.is_dir():
        return folder
    if not HUB_ID.fullmatch(checkpoint):
        raise PackageNotFound(
            "there is no such checkpoint",
            seen=checkpoint,
            allowed="a folder, or a hub id like Qwen/Qwen2.5-VL-3B-Instruct",
        )
    try:
        return Path(snapshot_download(checkpoint, allow_patterns=list(WANTED)))
    except (HFValidationError, OSError) as error:
        raise PackageNotFound(
            f"{checkpoint} is no local folder and can't be downloaded",
            seen=str(error).splitlines()[0].removeprefix("Got: "),
            hint="check its name and the network, or download it and give the folder",
        ) from error


class StoredTensor(NamedTuple):
    """Where a tensor is: its shard, its name there and its shape."""

    shard: Path
    name: str
    shape: tuple[int, ...]


class StoredWeights(Mapping[str, Tensor]):
    """Tensors by canonical name; each access reads one from the disk, in single precision."""

    def __init__(self, tensors: Mapping[str, StoredTensor]) -> None:
        self._tensors = tensors

    @classmethod
    def open(cls, folder: Path, family: Family) -> StoredWeights:
        """Read the headers of a checkpoint's shards, but of what its family leaves unread."""
        found: dict[str, StoredTensor] = {}
        for shard in shards_of(folder):
            with opened(shard) as file:
                for name in file.keys():  # noqa: SIM118, not a mapping
                    known = family.canonical(name)
                    if not known.startswith(family.unread):
                        shape = tuple(file.get_slice(name).get_shape())
                        found[known] = StoredTensor(shard, name, shape)
        return cls(found)

    def below(self, root: str) -> StoredWeights:
        """Give the tensors whose names begin with `root`, without it."""
        names = (name for name in self._tensors if name.startswith(root))
        return StoredWeights({name.removeprefix(root): self._tensors[name] for name in names})

    def __getitem__(self, name: str) -> Tensor:
        stored = self._tensors[name]
        # Opened anew each time: an open shard keeps all that was read of it in memory.
        with opened(stored.shard) as file:
            tensor: Tensor = file.get_tensor(stored.name)
            return tensor.float() if tensor.is_floating_point() else tensor.clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors  # which a mapping would tell by reading it

    def headers(self) -> dict[str, Tensor]:
        """Give all tensors with their shapes but without values."""
        return {n: torch.empty(t.shape, device="meta") for n, t in self._tensors.items()}


def shards_of(folder: Path) -> list[Path]:
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    try:
        index = json.loads((folder / INDEX).read_text())
        names = sorted({str(name) for name in index["weight_map"].values()})
    except FileNotFoundError:
        raise PackageNotFound(
            "a checkpoint lacks its weights",
            seen=str(folder),
            allowed=f"{SINGLE}, or {INDEX} with its shards",
            hint="give a complete Hugging Face folder; weights that are pickled are not read",
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PackageCorrupted(f"{folder / INDEX} is not an index of shards") from error
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise PackageNotFound(
            f"{folder} lacks shards that its index names",
            seen=", ".join(missing[:SHOWN_NAMES]),
            hint="download the checkpoint again",
        )
    return [folder / name for name in names]


@contextmanager
def opened(shard: Path) -> Iterator[Any]:
    try:
        file = safe_open(shard, framework="pt")
    except (SafetensorError, OSError) as error:
        raise PackageCorrupted(
            f"{shard} is truncated or is not a safetensors file",
            seen=str(error),
            hint="download it again",
        ) from error
    with file as entered:
        yield entered


def digest_of(folder: Path) -> str:
    """Compute the SHA-256 over all shards in the order of their names, hex."""
    digest = hashlib.sha256()
    for shard in shards_of(folder):
        with shard.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


@contextmanager
def weightless() -> Iterator[None]:
    """Build modules with the shapes of their parameters only; buffers are real."""
    register = nn.Module.register_parameter

    def register_shape(module: nn.Module, name: str, value: nn.Parameter | None) -> None:
        shape = None if value is None else torch.empty_like(value, device="meta")
        register(module, name, None if shape is None else nn.Parameter(shape, requires_grad=False))

    nn.Module.register_parameter = register_shape  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def give_weights(module: nn.Module, weight: Callable[[str], Tensor], held_bytes: int) -> None:
    """Make a weightless module run.

    Its weights are read once where they fit into `held_bytes`; otherwise each part reads its own
    for its own forward pass only.
    """
    single = torch.float32.itemsize
    held = sum(parameter.numel() * single for parameter in module.parameters()) <= held_bytes
    for path, part in module.named_modules():
        shapes = dict(part.named_parameters(recurse=False))
        paths = {name: f"{path}.{name}" if path else name for name in shapes}
        read = partial(read_parameters, paths, weight)
        if held:
            read(part)
        elif shapes:
            part.register_forward_pre_hook(read)
            part.register_forward_hook(lambda part, *_, s=shapes: part._parameters.update(s))


def read_parameters(
    paths: Mapping[str, str], weight: Callable[[str], Tensor], part: nn.Module, *_: object
) -> None:
    for name, path in paths.items():
        part._parameters[name] = nn.Parameter(weight(path), requires_grad=False)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint with everything about it that is small; its tensors stay on disk.

    Attributes:
        config: config.json.
        processing: preprocessor_config.json.
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
        named = config.get("architectures")
        architecture = str(named[0]) if isinstance(named, list) and named else "none"
        if architecture not in FAMILIES:
            raise PackageCorrupted(
                f"{folder} holds an architecture that can't be exported",
                seen=architecture,
                allowed=", ".join(sorted(FAMILIES)),
            )
        family = FAMILIES[architecture]
        made = cls(
            folder=folder,
            family=family,
            config=config,
            processing=read_processing(folder),
            weights=StoredWeights.open(folder, family),
            tokenizer=read_tokenizer(folder / "tokenizer.json"),
        )
        if wrong := list(made.misfits()):
            raise PackageCorrupted(
                f"{folder} does not hold the weights of {family.architecture}",
                seen=", ".join(wrong[:SHOWN_NAMES]),
                hint="compare config.json with the weights",
            )
        return made

    @cached_property
    def ends(self) -> tuple[str, ...]:
        """The tokens that end what it writes, as generation_config.json says, if it is there."""
        file = self.folder / "generation_config.json"
        listed = read_json(file).get("eos_token_id") if file.is_file() else None
        ids = listed if isinstance(listed, list) else [] if listed is None else [listed]
        ends = [self.tokenizer.id_to_token(i) if type(i) is int and i >= 0 else None for i in ids]
        if None in ends:
            what, hint = f"{file} ends texts with a token that there is not", "correct eos_token_id"
            raise PackageCorrupted(what, seen=listed, hint=hint)
        return tuple(filter(None, ends))

    @cached_property
    def text(self) -> DecoderConfig:
        return self.family.decoder(self.config)

    def tower(self) -> nn.Module:
        """Build the vision tower, without weights."""
        with weightless():
            return self.family.tower(self.config).eval()

    def decoder(self) -> SharedPrefixDecoder:
        """Build the decoder, without weights; its output layer has its own, tied or not."""
        with weightless():
            return SharedPrefixDecoder(self.text).eval()

    def tower_weight(self, name: str) -> Tensor:
        return self.family.tower_weight(name, self.weights.below(VISUAL))

    def decoder_weight(self, name: str, stored: Mapping[str, Tensor] | None = None) -> Tensor:
        """Read a parameter of the decoder: a tied output layer is the embedding.

        One that is stored counts, whatever config.json says, as in transformers.
        """
        stored = self.weights.below(TEXT) if stored is None else stored
        tied = name == HEAD and self.text.tie_word_embeddings and name not in stored
        return self.family.decoder_weight(EMBEDDING if tied else name, stored)

    def misfits(self) -> Iterator[str]:
        """Name the tensors that are missing, of another shape, or of no part, by their headers."""
        for root, module, weight in (
            (VISUAL, self.tower(), self.family.tower_weight),
            (TEXT, self.decoder(), self.decoder_weight),
        ):
            stored, parameters = self.weights.below(root).headers(), module.named_parameters()
            wanted = {name: parameter.shape for name, parameter in parameters}
            for name, shape in wanted.items():
                try:
                    found = weight(name, stored).shape
                except KeyError:
                    yield f"{root}{name} is missing"
                    continue
                if found != shape:
                    yield f"{root}{name} {list(found)} is not {list(shape)}"
            for name in stored.keys() - wanted.keys():
                if not name.endswith("num_batches_tracked"):
                    yield f"{root}{name} is unknown"

    @property
    def image(self) -> ImageProcessing:
        """Read how pixels become the tower's patches."""
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
        pads = self.processing.get("pad_to_grid", False)
        tiles = self.family.tiles(self.config)
        return ImageProcessing(patch, merge, least, most, mean, std, pads, *tiles)


def pixel_bounds(processing: Mapping[str, Any]) -> tuple[int, int]:
    """Bound the pixels that the tower is shown: the checkpoint's own bounds, within ours."""
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
    """Read how pixels are normalised; transformers 5 writes it into another file."""
    new = folder / "processor_config.json"
    if not new.is_file() or (folder / "preprocessor_config.json").is_file():
        return read_json(folder / "preprocessor_config.json")
    part = read_json(new).get("image_processor")
    if not isinstance(part, dict):
        raise PackageCorrupted(f"{new} has no image_processor")
    return part


def required(path: Path) -> Path:
    if not path.is_file():
        raise PackageNotFound(
            "a checkpoint lacks a file", seen=str(path), hint="give a complete Hugging Face folder"
        )
    return path


def read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(required(path).read_text())
    except ValueError as error:
        raise PackageCorrupted(f"{path} is not valid JSON", seen=str(error)) from error
    if not isinstance(values, dict):
        raise PackageCorrupted(f"{path} is not an object", seen=type(values).__name__)
    return values


def read_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer, without limits of its own on the length of a text."""
    path = required(path)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise PackageCorrupted(f"{path} is not a tokenizer", seen=str(error)) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
