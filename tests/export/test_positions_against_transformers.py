"""Positions of text and pictures are those of Qwen2.5-VL in transformers."""

from __future__ import annotations

from typing import cast

import numpy as np
import pytest
import torch
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLVisionConfig,
)
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

from meiqa.engine.prompts import positions_of

MERGE = 2


class PositionsOnly(Qwen2_5_VLModel):  # type: ignore[no-untyped-call]
    """The reference's positions without its weights."""

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)
        self.config = Qwen2_5_VLConfig(
            vision_config=Qwen2_5_VLVisionConfig(spatial_merge_size=MERGE)
        )


def reference_positions(pieces: list[int | tuple[int, int]]) -> tuple[np.ndarray, int]:
    """Positions (3, n) by transformers and the position of whatever comes next."""
    kinds: list[int] = []
    grids = []
    for piece in pieces:
        if isinstance(piece, tuple):
            kinds += [1] * (piece[0] * piece[1])
            grids.append((1, piece[0] * MERGE, piece[1] * MERGE))
        else:
            kinds += [0] * piece
    positions, deltas = PositionsOnly().get_rope_index(
        cast(torch.LongTensor, torch.zeros(1, len(kinds), dtype=torch.long)),
        cast(torch.IntTensor, torch.tensor([kinds], dtype=torch.int)),
        image_grid_thw=cast(torch.LongTensor, torch.tensor(grids)),
    )
    return positions[:, 0].numpy(), int(deltas[0]) + len(kinds)


@pytest.mark.parametrize(
    "pieces",
    [
        [7, (3, 5), 4],
        [7, (5, 3), 4],
        [1, (1, 1), 1],
        [6, (4, 4), 3, (2, 7), 9],
        [6, (1, 9), 3, (8, 1), 9],
    ],
    ids=str,
)
def test_positions_are_those_of_transformers(pieces: list[int | tuple[int, int]]) -> None:
    positions, following = positions_of(pieces)
    wanted, wanted_following = reference_positions(pieces)
    np.testing.assert_array_equal(positions, wanted)
    assert following == wanted_following
