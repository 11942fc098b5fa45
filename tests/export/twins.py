"""Random checkpoints of every family and shape: in transformers, and as the engine runs them."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedModel
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from meiqa.engine.images import fitted
from meiqa.engine.local import LocalModel
from meiqa.engine.manifest import ImageProcessing
from meiqa.engine.package import EnginePackage
from meiqa.export.checkpoint import Checkpoint
from meiqa.export.package import Export, ExportOptions, export_package
from tests.engine.samples import picture
from tests.export import tiny_llava, tiny_qwen

Pixels = NDArray[np.uint8]
Ids = NDArray[np.int64]
EVERY_SHAPE = "MEIQA_EXPORT_EVERY_SHAPE"
SHARDS = "200KB"


@dataclass(frozen=True, eq=False)
class Twins(ABC):
    """A checkpoint in transformers, and in the engine."""

    model: PreTrainedModel
    checkpoint: Path
    package: EnginePackage
    vlm: LocalModel

    @property
    def image(self) -> ImageProcessing:
        return self.package.manifest.image

    @property
    @abstractmethod
    def sizes(self) -> Sequence[tuple[int, int]]:
        """Heights and widths of pictures on many grids."""

    @abstractmethod
    def shown(self, pictures: Sequence[Pixels]) -> dict[str, Any]:
        """What transformers takes of pictures, from its own image processor."""

    @abstractmethod
    def visual(self, pixels: Pixels) -> Tensor:
        """What transformers makes of a picture, (T, features)."""

    def asked(self, pictures: Sequence[Pixels], *texts: Ids) -> dict[str, Any]:
        """The prompt as transformers takes it: texts with pictures between them."""
        image_token, ids = self.model.config.image_token_id, [texts[0]]
        for pixels, text in zip(pictures, texts[1:], strict=True):
            ids += [np.full(len(self.visual(pixels)), image_token), text]
        joined = torch.from_numpy(np.concatenate(ids))[None]
        return {
            "input_ids": joined,
            "attention_mask": torch.ones_like(joined),
            **self.shown(pictures),
        }

    def picture(self, size: tuple[int, int], seed: int) -> Pixels:
        """A picture as the engine brings it to the tower."""
        drawn = picture(seed, size)
        return fitted(drawn, self.image) if self.image.tile_pixels else drawn


class QwenTwins(Twins):
    """Pictures are grids of patches."""

    @property
    def sizes(self) -> Sequence[tuple[int, int]]:
        cell = self.image.cell_pixels
        grids = [(1, 1), (1, 5), (7, 1), *[(h, w) for h in (2, 3, 4, 6, 9) for w in (1, 4, 5, 8)]]
        return [(h * cell, w * cell) for h, w in grids]

    def shown(self, pictures: Sequence[Pixels]) -> dict[str, Any]:
        image = self.image
        processor = Qwen2VLImageProcessorPil(
            do_resize=False,
            image_mean=list(image.mean),
            image_std=list(image.std),
            patch_size=image.patch_size,
            merge_size=image.merge_size,
        )
        made = [processor(Image.fromarray(pixels), return_tensors="pt") for pixels in pictures]
        return {
            name: torch.cat([each[name] for each in made])
            for name in ("pixel_values", "image_grid_thw")
        }

    def asked(self, pictures: Sequence[Pixels], *texts: Ids) -> dict[str, Any]:
        inputs = super().asked(pictures, *texts)
        is_picture = inputs["input_ids"] == self.model.config.image_token_id
        return {**inputs, "mm_token_type_ids": is_picture.int()}

    def visual(self, pixels: Pixels) -> Tensor:
        with torch.no_grad():
            shown = self.shown([pixels])
            made = self.model.model.visual(shown["pixel_values"], shown["image_grid_thw"])
        features = [made.pooler_output, *(getattr(made, "deepstack_features", None) or [])]
        return torch.cat([part.reshape(len(features[0]), -1) for part in features], -1)


class LlavaTwins(Twins):
    """Pictures are tiles."""

    @property
    def sizes(self) -> Sequence[tuple[int, int]]:
        side = self.image.tile_pixels
        return [
            *((side, side), (side, 3 * side), (2 * side, 2 * side), (3 * side, side)),
            *((90, 200), (200, 90), (97, 131), (131, 97), (70, 330), (40, 44), (160, 161)),
        ]

    def shown(self, pictures: Sequence[Pixels]) -> dict[str, Any]:
        image, side = self.image, self.image.tile_pixels
        processor = LlavaOnevisionImageProcessorPil(
            size={"height": side, "width": side},
            image_grid_pinpoints=self.model.config.image_grid_pinpoints,
            image_mean=list(image.mean),
            image_std=list(image.std),
        )
        made = [processor(Image.fromarray(pixels), return_tensors="pt") for pixels in pictures]
        # Shown together they would be padded so, and with batch_num_images not be cut into tiles.
        tiles = torch.nn.utils.rnn.pad_sequence([m["pixel_values"][0] for m in made], True)
        return {"pixel_values": tiles, "image_sizes": torch.cat([m["image_sizes"] for m in made])}

    def visual(self, pixels: Pixels) -> Tensor:
        with torch.no_grad():
            (tokens,) = self.model.model.get_image_features(**self.shown([pixels])).pooler_output
        return torch.as_tensor(tokens)


@dataclass(frozen=True)
class TinyShape:
    """A shape of a family, the checkpoint's largest shard, and whether CI traces its graphs."""

    name: str
    make: Callable[[], PreTrainedModel]
    twins: type[Twins]
    largest_shard: str = "50GB"
    traced: bool = False

    def opened(self, folder: Path) -> Twins:
        """Write a checkpoint and open it, as a package whose graphs are traced, or in PyTorch."""
        checkpoint, saver = folder / "checkpoint", tiny_qwen
        if self.twins is LlavaTwins:
            saver = tiny_llava
        saver.save(self.make(), checkpoint, self.largest_shard)
        load = AutoModelForImageTextToText.from_pretrained
        model = load(checkpoint, dtype=torch.float32).eval()
        if self in TRACED:
            package = export_package(checkpoint, folder / "package", ExportOptions("fp32"))
            return self.twins(model, checkpoint, package, LocalModel.open(package, "cpu", 1))
        vlm = in_pytorch(checkpoint, folder / "package")
        return self.twins(model, checkpoint, vlm.package, vlm)


def in_pytorch(checkpoint: Path, folder: Path) -> LocalModel:
    """Open a checkpoint in the engine without tracing it: its graphs are PyTorch's modules."""
    folder.mkdir()
    export = Export(Checkpoint.open(checkpoint), folder, ExportOptions("fp32"))
    export.write_data()
    for graph in export.graphs.values():
        for name in graph.files:
            (folder / name).touch()
    export.seal()
    return export.model(export.reference_sessions())


def qwen3_5(
    name: str, *, largest_shard: str = "50GB", traced: bool = False, **shape: Any
) -> TinyShape:
    make = lambda: tiny_qwen.make_qwen3_5(**shape)  # noqa: E731
    return TinyShape(f"qwen3_5 {name}", make, QwenTwins, largest_shard, traced)


def llava(
    name: str, *, largest_shard: str = "50GB", traced: bool = False, **shape: Any
) -> TinyShape:
    make = lambda: tiny_llava.make_llava_onevision(**shape)  # noqa: E731
    return TinyShape(f"llava_onevision {name}", make, LlavaTwins, largest_shard, traced)


QWEN3_5 = (
    qwen3_5(
        "one layer of each kind",
        traced=True,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        vision={"depth": 2},
    ),
    qwen3_5("as 0.8 B"),
    qwen3_5(
        "as 2 B, in shards", largest_shard=SHARDS, hidden_size=96, vision={"out_hidden_size": 96}
    ),
    qwen3_5(
        "as 4 B, untied and in shards", largest_shard=SHARDS, tied=False, linear_num_value_heads=8
    ),
    qwen3_5(
        "attention first, a shorter convolution",
        layer_types=["full_attention", "linear_attention", "linear_attention", "full_attention"],
        linear_conv_kernel_dim=3,
    ),
    qwen3_5(
        "untied, other widths of keys and values",
        tied=False,
        linear_key_head_dim=8,
        linear_value_head_dim=24,
        linear_num_key_heads=2,
        linear_num_value_heads=6,
    ),
    qwen3_5(
        "one key-value head, half of its channels turned, eight layers",
        seed=1,
        num_key_value_heads=1,
        num_hidden_layers=8,
        rotary={"partial_rotary_factor": 0.5, "mrope_section": [4, 2, 2]},
    ),
)
LLAVA = (
    llava("as 0.5 B", traced=True),
    llava("untied and in shards", tied=False, largest_shard=SHARDS),
    llava("in shards, no pixels left over", largest_shard=SHARDS, vision={"image_size": 64}),
    llava("wide tower", vision={"hidden_size": 64, "num_attention_heads": 4, "patch_size": 14}),
    llava("untied, one key-value head", tied=False, num_key_value_heads=1, num_hidden_layers=2),
    llava("two tiles a side, no biases", sides=(1, 2), multimodal_projector_bias=False),
)
OTHERS = (
    TinyShape(
        "qwen2_5_vl untied and in shards",
        lambda: tiny_qwen.make_qwen2_5_vl(tied=False),
        QwenTwins,
        SHARDS,
        traced=True,
    ),
    TinyShape("qwen3_vl", tiny_qwen.make_qwen3_vl, QwenTwins, traced=True),
)
SHAPES = (*OTHERS, *QWEN3_5, *LLAVA)
TRACED = tuple(shape for shape in SHAPES if shape.traced or EVERY_SHAPE in os.environ)
"""Tracing takes half a minute a shape: CI traces one of each family, and all if it is asked to."""
