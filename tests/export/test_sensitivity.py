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
from meiqa.export.calibration import (
    AIM,
    Moves,
    Quantisation,
    SensitivityStudy,
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


def study_of(path: Path, graph: ir.Model, precision: str, move: float) -> SensitivityStudy:
    files = {"decoder": path / "decoder.onnx"}
    save_graph(graph, files["decoder"])
    observed = observe(files, lambda running: exercise(opened(running)))
    return SensitivityStudy(Quantisation(files, precision, observed), opened, PICTURES, move)


@pytest.mark.parametrize(
    ("precision", "move", "spoilt", "groups", "wholes"),
    [
        ("int8", 0.03, [], 0, 1),
        ("int8", 0.03, [5], 1, 2),
        ("int8", 0.03, [3, 17, 20], 1, 2),
        ("int8", 0.03, [*range(LAYERS)], 1, 3),
        ("int4", 0.06, [], 0, 1),
        ("int4", 0.04, [5], 2, 2),
    ],
)
def test_exactly_the_spoilt_layers_stay_in_float(
    tmp_path: Path, precision: str, move: float, spoilt: list[int], groups: int, wholes: int
) -> None:
    study = study_of(tmp_path, deep(spoilt), precision, move)
    wanted = ["fp16" if n in spoilt else precision for n in range(LAYERS)]
    assert list(study.plan()["decoder"].values()) == wanted
    assert (len(study.table), len(study.wholes)) == (groups, wholes)


@pytest.mark.parametrize("share", [1.1, 0.9, 0.3, 0.0])
def test_layers_that_lose_most_are_left_until_the_whole_is_borne(
    tmp_path: Path, share: float
) -> None:
    lossy = {2, 3, 11, 19}
    whole = study_of(tmp_path, deep([*lossy], 4.0), "int8", 1e9)
    assert {*whole.plan()["decoder"].values()} == {"int8"}
    assert whole.table == []
    moved = Moves(whole.wholes[0]["grade_move"], whole.wholes[0]["verdict_move"]).both
    study = study_of(tmp_path, deep([*lossy], 4.0), "int8", share * moved / AIM)
    left = {n for n, kept in enumerate(study.plan()["decoder"].values()) if kept == "fp16"}
    counts = [row["layers"] for row in study.wholes]
    assert counts[0] == LAYERS
    assert counts[-1] == LAYERS - len(left)
    assert counts == sorted({*counts}, reverse=True)
    if share > 1:
        assert left == set()
    elif share:
        assert study.wholes[-1]["grade_move"] <= study.wholes[-1]["allowed_move"]
        assert left <= lossy or lossy <= left
        assert 0 < len(left) < LAYERS
    else:
        assert len(left) == LAYERS


def test_what_is_done_is_shown_before_each_measurement(tmp_path: Path) -> None:
    files = {"decoder": tmp_path / "decoder.onnx"}
    save_graph(deep([3, 17, 20]), files["decoder"])
    observed = observe(files, lambda running: exercise(opened(running)))
    shown: list[float] = []
    quantisation = Quantisation(files, "int4", observed)
    study = SensitivityStudy(quantisation, opened, PICTURES, 0.06, shown.append)
    study.plan()
    assert len(shown) == len(study.table) + len(study.wholes)
    assert sorted({*shown}) == shown
    assert shown[0] == 0
    assert shown[-1] < 1


def exercise(looking: Model) -> None:
    looking.prefill([looking.encode(picture) for picture in CALIBRATED_ON])
