"""A package of a Qwen checkpoint says what transformers says: the same text, the same logits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from optimum.exporters.tasks import TasksManager
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from meiqa.engine.local import LocalModel
from meiqa.engine.model import VisualTokens
from meiqa.engine.package import EnginePackage
from meiqa.engine.prompts import Prompts
from meiqa.engine.runtime import open_graphs
from meiqa.export.checkpoint import Checkpoint
from meiqa.export.package import ExportOptions, export_package
from meiqa.export.verify import random_feeds
from tests.engine.samples import picture
from tests.export import tiny_qwen
from tests.export.tiny import reference_sessions

TASK = "image-text-to-text"
TOLERANCE = 1e-4
SIZES = ((128, 128), (64, 256), (256, 64), (112, 144))
GRIDS = [(1, 1), (1, 5), (7, 1), *[(h, w) for h in (2, 3, 4, 6, 9) for w in (1, 4, 5, 8)]]


@dataclass(frozen=True, eq=False)
class Twins:
    """A checkpoint in transformers and as a package."""

    model: PreTrainedModel
    checkpoint: Path
    package: EnginePackage
    vlm: LocalModel


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def twins(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Twins:
    """Export a tiny checkpoint: Qwen2.5-VL untied and in shards, Qwen3-VL tied and whole."""
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = folder / "checkpoint"
    if request.param == "qwen2_5_vl":
        tiny_qwen.save(tiny_qwen.make_qwen2_5_vl(tied=False), checkpoint, max_shard_size="200KB")
    else:
        tiny_qwen.save(tiny_qwen.make_qwen3_vl(tied=True), checkpoint)
    package = export_package(checkpoint, folder / "package", ExportOptions("fp32"))
    loader = TasksManager.get_model_class_for_task("image-text-to-text", model_type=request.param)
    model = loader.from_pretrained(checkpoint, dtype=torch.float32).eval()
    return Twins(model, checkpoint, package, LocalModel.open(package, "cpu", 1))


def cells_of(twins: Twins, pixels: NDArray[np.uint8]) -> Tensor:
    """What transformers' own image processor makes of a picture, (patches, 3 * 2 * p * p)."""
    image = twins.package.manifest.image
    processor = Qwen2VLImageProcessorPil(
        do_resize=False,
        image_mean=list(image.mean),
        image_std=list(image.std),
        patch_size=image.patch_size,
        merge_size=image.merge_size,
    )
    patches: Tensor = processor(Image.fromarray(pixels), return_tensors="pt")["pixel_values"]
    return patches


def asked(
    twins: Twins, pictures: list[NDArray[np.uint8]], *texts: NDArray[np.int64]
) -> dict[str, Any]:
    """The prompt as transformers takes it: texts with pictures between them."""
    image, config = twins.package.manifest.image, twins.model.config
    cell = image.cell_pixels
    grids = [(p.shape[0] // cell, p.shape[1] // cell) for p in pictures]
    ids = [texts[0]]
    for (h, w), text in zip(grids, texts[1:], strict=True):
        ids += [np.full(h * w, config.image_token_id), text]
    joined = torch.from_numpy(np.concatenate(ids))[None]
    m = image.merge_size
    return {
        "input_ids": joined,
        "attention_mask": torch.ones_like(joined),
        "mm_token_type_ids": (joined == config.image_token_id).int(),
        "pixel_values": torch.cat([cells_of(twins, p) for p in pictures]),
        "image_grid_thw": torch.tensor([[1, h * m, w * m] for h, w in grids]),
    }


def seen(twins: Twins, size: tuple[int, int], seed: int) -> tuple[NDArray[np.uint8], VisualTokens]:
    pixels = picture(seed, size)
    return pixels, twins.vlm.encode(pixels)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_greedy_text_is_the_same(twins: Twins, size: tuple[int, int]) -> None:
    pixels, tokens = seen(twins, size, seed=sum(size))
    prompts: Prompts = twins.vlm.prompts
    after = np.concatenate([prompts.closing, prompts.score])
    with torch.no_grad():
        written = twins.model.generate(
            **asked(twins, [pixels], prompts.opening, after), max_new_tokens=24, do_sample=False
        )
    length = len(prompts.opening) + len(tokens.values) + len(after)
    wanted = prompts.tokenizer.decode(written[0, length:].tolist()).strip()
    made = twins.vlm.describe(twins.vlm.prefill([tokens])[0], 24)
    assert len(wanted) > 12
    assert made.text == wanted


@pytest.mark.parametrize("sizes", [(0, 1), (1, 2), (3, 3)], ids=str)
def test_the_logits_of_a_comparison_are_the_same(twins: Twins, sizes: tuple[int, int]) -> None:
    (first, tokens), (second, other) = (seen(twins, SIZES[i], n) for n, i in enumerate(sizes))
    p: Prompts = twins.vlm.prompts
    question = np.concatenate([p.closing, p.compare])
    between = np.concatenate([p.closing, p.second_opening])
    with torch.no_grad():
        logits = twins.model(**asked(twins, [first, second], p.opening, between, question)).logits
    one, two = p.verdict_ids
    wanted = float(logits[0, -1, one] - logits[0, -1, two])
    made = twins.vlm.prefer_first(twins.vlm.prefill([tokens]), [other])
    assert abs(wanted) > 100 * TOLERANCE
    assert made == pytest.approx([wanted], abs=TOLERANCE)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_visual_tokens_are_the_same(twins: Twins, grid: tuple[int, int]) -> None:
    cell = twins.package.manifest.image.cell_pixels
    pixels, tokens = seen(twins, (grid[0] * cell, grid[1] * cell), seed=1 + grid[0])
    inputs = asked(twins, [pixels], np.zeros(0, np.int64), np.zeros(0, np.int64))
    with torch.no_grad():
        made = twins.model.model.visual(inputs["pixel_values"], inputs["image_grid_thw"])
    features = [made.pooler_output, *(getattr(made, "deepstack_features", None) or [])]
    wanted = torch.cat([part.reshape(tokens.values.shape[0], -1) for part in features], -1)
    np.testing.assert_allclose(tokens.values, wanted.numpy(), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("seed", range(20))
def test_the_decoder_graph_equals_pytorch(twins: Twins, seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = rng.integers((1, 1, 1, 0, 0, 1), (4, 5, 9, 30, 12, 4))
    feeds = random_feeds(twins.package.manifest.decoder, sizes.tolist(), rng)
    wanted = reference_sessions(Checkpoint.open(twins.checkpoint))[1].run(feeds)
    (decoder,) = open_graphs(twins.package, ["decoder"], "cpu", 1)
    made = decoder.run(feeds)
    for name, values in wanted.items():
        np.testing.assert_allclose(made[name], values, atol=TOLERANCE, rtol=0)
