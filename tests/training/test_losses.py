"""The losses on values that can be worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from training.finetune import LEVEL_DEVIATION, level_targets, soft_answer_loss
from training.pretrain import correlation_loss


def test_grades_are_soft_around_the_score() -> None:
    targets = level_targets(torch.tensor([3.0, 4.5, 1.0]))
    assert targets.shape == (3, 5)
    torch.testing.assert_close(targets.sum(-1), torch.ones(3))
    step = math.exp(-1 / (2 * LEVEL_DEVIATION**2))
    assert float(targets[0, 3] / targets[0, 2]) == pytest.approx(step)
    torch.testing.assert_close(targets[0], targets[0].flip(0))
    assert float(targets[1, 3]) == pytest.approx(float(targets[1, 4]))
    assert targets[2].tolist() == sorted(targets[2].tolist(), reverse=True)


def test_an_answer_costs_its_surprise() -> None:
    even = torch.zeros(2, 4)
    wanted = torch.tensor([[1.0, 0.0], [0.3, 0.7]])
    assert float(soft_answer_loss(even, (1, 3), wanted)) == pytest.approx(math.log(4))


def test_tokens_that_are_no_answer_cost_too() -> None:
    logits = torch.tensor([[0.0, math.log(2.0), math.log(5.0)]])
    wanted = torch.tensor([[0.5, 0.5]])
    by_hand = 0.5 * math.log(8) + 0.5 * math.log(4)
    assert float(soft_answer_loss(logits, (0, 1), wanted)) == pytest.approx(by_hand)


@pytest.mark.parametrize(
    ("predicted", "loss"),
    [([2.0, 4.0, 6.0], 0.0), ([3.0, 2.0, 1.0], 2.0), ([1.0, 0.0, 1.0], 1.0), ([2.0] * 3, 1.0)],
)
def test_order_is_judged_by_correlation(predicted: list[float], loss: float) -> None:
    made = correlation_loss(torch.tensor(predicted), torch.tensor([1.0, 2.0, 3.0]))
    assert float(made) == pytest.approx(loss, abs=1e-5)
