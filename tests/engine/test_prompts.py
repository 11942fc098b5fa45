"""What the model is asked: tokens, and positions as Qwen2.5-VL gives them."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import numpy as np
import pytest
import torch
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLVisionConfig,
)
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

from meiqa.engine.package import EnginePackage
from meiqa.engine.prompts import MEIQA, PromptFamily, Prompts, layout
from meiqa.errors import PackageCorrupted

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
    positions, following = layout(pieces)
    wanted, wanted_following = reference_positions(pieces)
    np.testing.assert_array_equal(positions, wanted)
    assert following == wanted_following


def test_positions_by_hand() -> None:
    positions, following = layout([2, (2, 3), 1])
    assert positions.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5],
        [0, 1, 2, 2, 2, 3, 3, 3, 5],
        [0, 1, 2, 3, 4, 2, 3, 4, 5],
    ]
    assert following == 6


def test_a_suffix_goes_on_where_its_prefix_ended() -> None:
    whole, following = layout([4, (2, 3), 2, (3, 1), 5])
    _, middle = layout([4, (2, 3)])
    suffix, end = layout([2, (3, 1), 5], middle)
    np.testing.assert_array_equal(suffix, whole[:, 4 + 6 :])
    assert end == following


def test_every_answer_is_one_token_of_its_own(package: EnginePackage) -> None:
    prompts = package.prompts
    ids = [*prompts.level_ids, *prompts.verdict_ids, prompts.stop, prompts.description_end]
    assert len(set(ids)) == len(ids)
    words = [prompts.tokenizer.decode([int(token)]).strip() for token in prompts.level_ids]
    assert words == ["bad", "poor", "fair", "good", "excellent"]


@pytest.mark.parametrize(
    "changes",
    [
        {"level_words": (" bad", " poor", " fair", " good", " magnificent")},
        {"verdicts": ("12", "2")},
        {"description_end": "the end"},
        {"stop": ""},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_an_answer_of_many_tokens_is_refused(
    package: EnginePackage, changes: dict[str, object]
) -> None:
    prompts = Prompts(replace(MEIQA, **changes), package.prompts.tokenizer)  # type: ignore[arg-type]
    with pytest.raises(PackageCorrupted, match="not a single token"):
        _ = (prompts.level_ids, prompts.verdict_ids, prompts.description_end, prompts.stop)


def test_the_reflection_shows_both_scores(package: EnginePackage) -> None:
    prompts = package.prompts
    text = prompts.tokenizer.decode(prompts.reflect("a dark picture", 3.456, 2.1).tolist())
    assert "a dark picture" in text
    assert "3.46" in text
    assert "2.10" in text


def test_a_family_of_other_fields_is_refused() -> None:
    values = MEIQA.to_dict()
    assert PromptFamily.from_dict(values) == MEIQA
    for changed in ({**values, "colour": "blue"}, {k: v for k, v in values.items() if k != "stop"}):
        with pytest.raises(PackageCorrupted, match="other fields"):
            PromptFamily.from_dict(changed)
