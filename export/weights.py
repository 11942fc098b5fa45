"""Weights of a checkpoint, read tensor by tensor, so that a large model is never in memory whole.

Safetensors only: nothing in a checkpoint is executed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from meiqa.errors import PackageCorrupted, PackageNotFound

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DIGEST_CHUNK_BYTES = 1 << 24
SHOWN_NAMES = 4


def canonical(name: str) -> str:
    """The name of a stored tensor below "visual." or "language_model.".

    Layouts differ between releases: "model.layers.0…" and "model.language_model.layers.0…" are one.

    >>> canonical("model.layers.0.mlp.up_proj.weight")
    'language_model.layers.0.mlp.up_proj.weight'
    """
    name = name.removeprefix("model.")
    known = name.startswith(("visual.", "language_model."))
    return name if known else f"language_model.{name}"


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is: its shard, its name there and its shape."""

    shard: Path
    name: str
    shape: tuple[int, ...]


class StoredWeights(Mapping[str, Tensor]):
    """Tensors by canonical name; each access reads one from the disk, in single precision."""

    def __init__(self, tensors: Mapping[str, StoredTensor], root: str = "") -> None:
        self._tensors, self._root = tensors, root

    @classmethod
    def open(cls, folder: Path) -> StoredWeights:
        """Read the headers of a checkpoint's shards.

        Raises:
            PackageNotFound: a shard is missing.
            PackageCorrupted: a shard is truncated or is not a safetensors file.
        """
        found: dict[str, StoredTensor] = {}
        for shard in shards_of(folder):
            with opened(shard) as file:
                for name in file.keys():  # noqa: SIM118, not a mapping
                    shape = tuple(file.get_slice(name).get_shape())
                    found[canonical(name)] = StoredTensor(shard, name, shape)
        return cls(found)

    def below(self, root: str) -> StoredWeights:
        """The tensors whose names begin with `root`, without it."""
        return StoredWeights(self._tensors, self._root + root)

    def __getitem__(self, name: str) -> Tensor:
        stored = self._tensors[self._root + name]
        # Opened anew each time: an open shard keeps all that was read of it in memory.
        with opened(stored.shard) as file:
            tensor: Tensor = file.get_tensor(stored.name)
            return tensor.float() if tensor.is_floating_point() else tensor.clone()

    def __iter__(self) -> Iterator[str]:
        names = (name for name in self._tensors if name.startswith(self._root))
        return (name[len(self._root) :] for name in names)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._root + name in self._tensors

    def headers(self) -> dict[str, Tensor]:
        """All tensors with their shapes but without values."""
        return {
            name: torch.empty(stored.shape, device="meta") for name, stored in self._tensors.items()
        }


def shards_of(folder: Path) -> list[Path]:
    """The weight files of a checkpoint."""
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
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise PackageNotFound(
            f"{folder} lacks shards that its index names",
            seen=", ".join(missing[:SHOWN_NAMES]),
            hint="download the checkpoint again",
        )
    return [folder / name for name in names]


@contextmanager
def opened(shard: Path) -> Iterator[Any]:
    """A shard, for reading."""
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
    """SHA-256 over all shards in the order of their names, hex."""
    digest = hashlib.sha256()
    for shard in shards_of(folder):
        with shard.open("rb") as file:
            while chunk := file.read(DIGEST_CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def weightless() -> Iterator[None]:
    """Within, modules are built with the shapes of their parameters only; buffers are real."""
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
        names = [name for name, _ in part.named_parameters(recurse=False)]
        read = reader(path, names, weight)
        if held:
            read(part, None)
        elif names:
            part.register_forward_pre_hook(read)
            part.register_forward_hook(forgetter({n: getattr(part, n) for n in names}))


def reader(
    path: str, names: Iterable[str], weight: Callable[[str], Tensor]
) -> Callable[[nn.Module, object], None]:
    """A hook that reads parameters."""

    def read(part: nn.Module, _: object) -> None:
        for name in names:
            value = weight(f"{path}.{name}" if path else name)
            part._parameters[name] = nn.Parameter(value, requires_grad=False)

    return read


def forgetter(
    shapes: Mapping[str, nn.Parameter],
) -> Callable[[nn.Module, object, object], None]:
    """A hook that puts the shapes back in the place of the values."""

    def forget(part: nn.Module, _: object, __: object) -> None:
        part._parameters.update(shapes)

    return forget
