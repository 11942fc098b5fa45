"""Our vision towers with a checkpoint's weights are transformers' towers; their graphs are too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from meiqa.engine.manifest import Graph
from meiqa.export.families import qwen2_5_vl, qwen3_vl
from meiqa.export.families.base import Config, Family
from meiqa.export.graphs import traced
from meiqa.export.layers import save_graph
from tests.export import tiny_qwen
from tests.export.tiny_qwen import MERGE_SIZE, PATCH_SIZE, TEMPORAL_PATCH_SIZE, WIDTH

TOLERANCE = 1e-4
CELL_VALUES = MERGE_SIZE**2 * 3 * PATCH_SIZE**2
EDGES = [(1, 1), (1, 7), (7, 1), (3, 3), (3, 4), (4, 3), (6, 9), (2, 2), (5, 8)]
"""Grids below, at and beyond whole windows of 3 x 3 cells."""
GRIDS = EDGES + [(int(h), int(w)) for h, w in np.random.default_rng(0).integers(1, 14, (15, 2))]


@dataclass(frozen=True)
class Twins:
    """transformers' tower and ours with its weights."""

    reference: nn.Module
    ours: nn.Module
    config: Config

    def wanted(self, cells: Tensor) -> Tensor:
        """What transformers' tower makes of cells (h, w, M * 3 * p * p): tokens, then features."""
        h, w, _ = cells.shape
        frames = (1, 1, TEMPORAL_PATCH_SIZE, 1)
        patches = cells.reshape(h * w * MERGE_SIZE**2, 3, 1, PATCH_SIZE**2).repeat(frames)
        grid = torch.tensor([[1, h * MERGE_SIZE, w * MERGE_SIZE]])
        with torch.no_grad():
            made = self.reference(patches.flatten(1), grid_thw=grid)
        return torch.cat([made.pooler_output, *getattr(made, "deepstack_features", [])], -1)

    def made(self, cells: Tensor) -> Tensor:
        """What our tower makes of the same."""
        with torch.no_grad():
            tokens: Tensor = self.ours(cells)
        return tokens


@cache
def twins(name: str) -> Twins:
    """Both towers of a family, ours with its weights taken through `tower_weight`."""
    family, make = FAMILIES[name]
    model = make()
    config: dict[str, Any] = model.config.to_dict()
    stored = model.model.visual.state_dict()
    ours = family.tower(config).eval()
    ours.load_state_dict({key: family.tower_weight(key, stored) for key in ours.state_dict()})
    return Twins(model.model.visual, ours, config)


FAMILIES: dict[str, tuple[Family, Callable[[], Any]]] = {
    "qwen2_5_vl": (qwen2_5_vl.FAMILY, tiny_qwen.make_qwen2_5_vl),
    "qwen3_vl": (qwen3_vl.FAMILY, tiny_qwen.make_qwen3_vl),
}
every_family = pytest.mark.parametrize("name", FAMILIES)


def random_cells(h: int, w: int) -> Tensor:
    """Cells of a picture of noise."""
    generator = torch.Generator().manual_seed(100 * h + w)
    return torch.randn(h, w, CELL_VALUES, generator=generator)


@every_family
@pytest.mark.parametrize("grid", GRIDS)
def test_tokens_and_features(name: str, grid: tuple[int, int]) -> None:
    both, cells = twins(name), random_cells(*grid)
    wanted = both.wanted(cells)
    assert wanted.std() > 0.5
    torch.testing.assert_close(both.made(cells), wanted, atol=TOLERANCE, rtol=0)


@every_family
def test_no_stored_weight_is_left_over(name: str) -> None:
    both = twins(name)
    assert both.ours.state_dict().keys() == both.reference.state_dict().keys()


def test_features_differ_from_tokens_and_from_each_other() -> None:
    tokens, first, second = twins("qwen3_vl").made(random_cells(4, 5)).split(WIDTH, -1)
    assert min((tokens - first).abs().max(), (first - second).abs().max()) > 0.5


def test_patches_see_their_own_window_only_before_full_attention() -> None:
    config = twins("qwen2_5_vl").config
    windowed = {**config["vision_config"], "fullatt_block_indexes": []}
    tower = qwen2_5_vl.FAMILY.tower({**config, "vision_config": windowed}).eval()
    tower.load_state_dict(twins("qwen2_5_vl").ours.state_dict())
    cells = random_cells(5, 7)
    changed = cells.clone()
    changed[3, 5] += 1
    with torch.no_grad():
        moved = (tower(changed) - tower(cells)).abs().amax(-1).reshape(5, 7) > 0
    window = torch.zeros(5, 7, dtype=torch.bool)
    window[3:, 3:6] = True
    assert torch.equal(moved, window)


@pytest.fixture(scope="module", params=FAMILIES)
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, onnxruntime.InferenceSession]:
    """Give a family's name and its tower's graph in a session."""
    path = tmp_path_factory.mktemp(request.param) / "vision.onnx"
    ours = twins(request.param).ours
    weights = dict(ours.named_parameters())
    tokens = ("tokens", twins(request.param).made(random_cells(1, 1)).shape[1])
    interface = Graph("vision.onnx", None, {"cells": ("h", "w", CELL_VALUES)}, {"tokens": tokens})
    graph = traced(ours, interface, lambda name: weights[name].detach())
    save_graph(graph, path)
    return request.param, onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def test_the_graph_agrees_on_grids_not_seen_at_export(
    exported: tuple[str, onnxruntime.InferenceSession],
) -> None:
    name, session = exported
    for grid in GRIDS:
        cells = random_cells(*grid)
        (made,) = session.run(None, {"cells": cells.numpy()})
        np.testing.assert_allclose(made, twins(name).made(cells), atol=TOLERANCE, rtol=0)
