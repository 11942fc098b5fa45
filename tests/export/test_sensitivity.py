"""A layer that rounding spoils is found among many alike in a few trials."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import onnx_ir as ir
import pytest

from meiqa.engine.estimates import softmax
from meiqa.engine.model import Model
from meiqa.engine.runtime.decoder import GraphSession
from meiqa.export import calibration
from meiqa.export.calibration import (
    AIM,
    CHAIN_SHARE,
    Group,
    Quantisation,
    SensitivityStudy,
    Shares,
    fewest,
    observe,
)
from meiqa.export.layers import save_graph
from tests.export.small_graphs import Floats, model, node, normal, value, weights

LAYERS, WIDTH = 24, 64
LAST = f"state.{LAYERS - 1}"
PICTURES: list[Any] = list(normal(1, 6, WIDTH))
CALIBRATED_ON: list[Any] = list(normal(2, 256, WIDTH))


def deep(spoilt: Sequence[int], outlier: float = 1e4) -> ir.Model:
    """x (1, C) → layers that each add a little; those spoilt have an outlier that reads 0."""
    matrices = {f"layers.{n}.weight": 0.02 * normal(n, WIDTH, WIDTH) for n in range(LAYERS)}
    for n, matrix in enumerate(matrices.values()):
        matrix[:, 0] = 0.0
        matrix[0] = outlier if n in spoilt else 0.0
        matrix[0, 0] = 0.0
    x, stored, nodes = value("x", (1, WIDTH)), weights(**matrices), list[ir.Node]()
    state = x
    for n, weight in enumerate(stored.values()):
        nodes.append(node("MatMul", [state, weight], f"product.{n}"))
        nodes.append(node("Add", [state, nodes[-1].outputs[0]], f"state.{n}"))
        state = nodes[-1].outputs[0]
    return model(x, nodes, stored, 2)


class Looking:
    """What the study asks of a model, answered by a graph whose input is the picture itself."""

    def __init__(self, sessions: Mapping[str, GraphSession]) -> None:
        self._session = sessions["decoder"]

    def encode(self, picture: Floats) -> Floats:
        return np.append(np.float32(0.0), picture[1:])[None]

    def prefill(self, tokens: list[Floats]) -> list[SimpleNamespace]:
        states = [self._session.run({"x": each})[LAST][0] for each in tokens]
        return [
            SimpleNamespace(tokens=each, state=state)
            for each, state in zip(tokens, states, strict=True)
        ]

    def grade(self, prefix: SimpleNamespace) -> Any:
        return softmax(prefix.state[1:6].astype(np.float64))

    def prefer_first(self, firsts: list[SimpleNamespace], seconds: list[Floats]) -> Any:
        return np.array([firsts[0].state[1] - other[0, 1] for other in seconds])


def opened(sessions: Mapping[str, GraphSession]) -> Model:
    return cast(Model, Looking(sessions))


@pytest.mark.parametrize(
    ("precision", "budget", "spoilt", "trials"),
    [
        ("int8", 0.03, [], 1),
        ("int8", 0.03, [5], 2),
        ("int8", 0.03, [3, 17, 20], 5),
        ("int8", 0.03, [*range(LAYERS)], 9),
        ("int4", 0.06, [], 1),
        ("int4", 0.06, [5], 3),
    ],
)
def test_exactly_the_spoilt_layers_stay_in_float(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    budget: float,
    spoilt: list[int],
    trials: int,
) -> None:
    files = {"decoder": tmp_path / "decoder.onnx"}
    save_graph(deep(spoilt), files["decoder"])
    observed = observe(files, lambda running: exercise(opened(running)))
    monkeypatch.setitem(calibration.BUDGETS, precision, budget)
    shown: list[float] = []
    quantisation = Quantisation(files, precision, observed)
    study = SensitivityStudy(quantisation, opened, PICTURES, 1e9, shown.append)
    plan = study.plan()["decoder"]
    assert len(shown) == trials + len(study.together)
    assert sorted({*shown}) == shown
    assert shown[0] == 0
    assert shown[-1] < 1
    wanted = ["fp16" if n in spoilt else precision for n in range(LAYERS)]
    assert list(plan.values()) == wanted
    assert len(study.table) == trials


@pytest.mark.parametrize("share", [2.0, 0.9, 0.3, 0.0])
def test_layers_that_lose_most_are_left_until_all_together_are_borne(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    lossy = [2, 3, 11, 19]
    files = {"decoder": tmp_path / "decoder.onnx"}
    save_graph(deep(lossy, 4.0), files["decoder"])
    observed = observe(files, lambda running: exercise(opened(running)))
    monkeypatch.setitem(calibration.BUDGETS, "int8", 1e9)

    def planned(largest_move: float) -> tuple[SensitivityStudy, list[int]]:
        quantisation = Quantisation(files, "int8", observed)
        study = SensitivityStudy(quantisation, opened, PICTURES, largest_move)
        kept = study.plan()["decoder"].values()
        return study, [n for n, precision in enumerate(kept) if precision == "fp16"]

    whole, left = planned(1e9)
    (row,) = whole.together
    assert left == []
    assert row["layers"] == LAYERS
    assert row["grade_move"] == pytest.approx(whole.table[0]["grade_move"])
    study, left = planned(share * row["grade_move"] / AIM)
    moves = [each["grade_move"] for each in study.together]
    counts = [each["layers"] for each in study.together]
    assert moves[0] == row["grade_move"]
    assert counts == sorted({*counts}, reverse=True)
    allowed = study.together[0]["allowed_move"]
    assert all(move > allowed for move in moves[:-1])
    if share:
        assert moves[-1] <= allowed
        assert {*left} <= {*lossy} or {*lossy} <= {*left}
        assert len(left) == LAYERS - counts[-1] < LAYERS
    else:
        assert len(left) == LAYERS


@pytest.mark.parametrize("chained", [False, True])
def test_parts_of_a_group_spend_together_what_the_group_may(chained: bool) -> None:
    layers = {"a": Shares(0.1, 0.05), "b": Shares(0.1, 0.05), "c": Shares(0.2, 0.1)}
    whole = Group.of("decoder", "layers", chained, layers)
    assert whole.budget_share == (CHAIN_SHARE if chained else 0.4)
    small, large = (whole.only(names).budget_share for names in (["a", "b"], ["c"]))
    assert small == large
    together = small if chained else np.hypot(small, large)
    assert together == pytest.approx(whole.budget_share)


@pytest.mark.parametrize("most", [1, 2, 3, 7, 24, 32, 97])
def test_the_fewest_are_found_in_few_tries(most: int) -> None:
    for wanted in range(1, most + 1):
        tried: list[int] = []

        def enough(count: int, wanted: int = wanted, tried: list[int] = tried) -> bool:
            tried.append(count)
            return count >= wanted

        assert fewest(most, enough) == wanted
        assert len(tried) == len({*tried}) < max(1, 2 * (most - 1).bit_length())
        assert all(0 < count < most for count in tried)


def exercise(looking: Model) -> None:
    looking.prefill([looking.encode(picture) for picture in CALIBRATED_ON])
