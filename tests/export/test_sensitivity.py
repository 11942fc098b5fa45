"""A layer that rounding spoils is found among many alike in a few trials."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
    steps_of,
)
from meiqa.export.layers import save_graph
from tests.export.small_graphs import Floats, model, node, normal, value, weights

LAYERS, WIDTH = 24, 64
LAST = f"state.{LAYERS - 1}"
PICTURES: list[Any] = list(normal(1, 24, WIDTH))
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


def study_of(
    path: Path,
    graph: ir.Model,
    precision: str,
    move: float,
    show: Callable[[float], None] = lambda share: None,
) -> SensitivityStudy:
    files = {"decoder": path / "decoder.onnx"}
    save_graph(graph, files["decoder"])
    observed = observe(files, lambda running: exercise(opened(running)), precision)
    quantisation = Quantisation(files, precision, observed)
    return SensitivityStudy(quantisation, opened, PICTURES, move, show)


def planned(study: SensitivityStudy) -> list[str]:
    return list(study.plan()["decoder"].values())


@pytest.mark.parametrize(
    ("precision", "move", "spoilt", "groups", "plans"),
    [
        ("int8", 0.03, [], 0, 1),
        ("int8", 0.03, [5], 1, 2),
        ("int8", 0.03, [3, 17, 20], 1, 2),
        ("int8", 0.03, [*range(LAYERS)], 1, 3),
        ("int4", 0.06, [], 0, 1),
        ("int4", 0.06, [5], 2, 2),
    ],
)
def test_exactly_the_spoilt_layers_stay_in_float(
    tmp_path: Path, precision: str, move: float, spoilt: list[int], groups: int, plans: int
) -> None:
    study = study_of(tmp_path, deep(spoilt), precision, move)
    assert planned(study) == ["fp16" if n in spoilt else precision for n in range(LAYERS)]
    assert (len(study.table), len(study.plans)) == (groups, plans)


LOSSY = {2, 3, 11, 19}


def moved_by(row: Mapping[str, Any]) -> float:
    return Moves(row["grade_move"], row["verdict_move"]).worse


@pytest.fixture
def whole_move(tmp_path: Path) -> float:
    """What all layers move answers by, some of which lose more than others."""
    study = study_of(tmp_path, deep([*LOSSY], 4.0), "int8", 1e9)
    assert planned(study) == ["int8"] * LAYERS
    assert study.table == []
    return moved_by(study.plans[0])


@pytest.mark.parametrize("share", [0.9, 0.3])
def test_layers_that_lose_most_are_left_until_the_whole_is_borne(
    tmp_path: Path, whole_move: float, share: float
) -> None:
    study = study_of(tmp_path, deep([*LOSSY], 4.0), "int8", share * whole_move / AIM)
    left = {n for n, kept in enumerate(planned(study)) if kept == "fp16"}
    assert left <= LOSSY or left >= LOSSY
    assert 0 < len(left) < LAYERS
    *refused, taken = study.plans
    assert all(moved_by(row) > share * whole_move for row in refused)
    assert moved_by(taken) <= share * whole_move
    assert taken["fp16"] == pytest.approx(len(left) / LAYERS)
    assert taken["int8"] == pytest.approx(1 - len(left) / LAYERS)


def test_where_nothing_may_be_moved_all_layers_are_left(tmp_path: Path) -> None:
    study = study_of(tmp_path, deep([]), "int8", 0.0)
    assert planned(study) == ["fp16"] * LAYERS


def test_a_whole_that_its_groups_do_not_explain_is_measured_few_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SensitivityStudy, "_moves", lambda *_: Moves(0.031, 0.0))
    study = study_of(tmp_path, deep([]), "int8", 0.03 / AIM)
    assert planned(study) == ["fp16"] * LAYERS
    assert len(study.plans) < 10


@pytest.mark.parametrize("lost", [0.0, float("nan")])
def test_losses_that_tell_nothing_are_those_of_layers_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: float
) -> None:
    monkeypatch.setattr(Quantisation, "lost", lambda _, __, names, ___: dict.fromkeys(names, lost))
    study = study_of(tmp_path, deep([5]), "int8", 0.03)
    assert planned(study)[5] == "fp16"
    assert moved_by(study.plans[-1]) <= AIM * 0.03


@pytest.mark.parametrize(
    ("squares", "steps"),
    [
        ({"int8": 1.0, "fp16": 0.0}, [("fp16", 1.0, 1 / 8)]),
        ({"int8": 0.0, "fp16": 0.0}, []),
        ({"int4": 1.0, "int8": 0.1, "fp16": 0.0}, [("int8", 0.9, 0.9 / 4), ("fp16", 0.1, 0.1 / 8)]),
        ({"int4": 1.0, "int8": 0.99, "fp16": 0.0}, [("fp16", 1.0, 1 / 12)]),
        ({"int4": 1.0, "int8": 2.0, "fp16": 0.0}, [("fp16", 1.0, 1 / 12)]),
        ({"fp16": 0.0}, []),
    ],
)
def test_steps_go_where_bits_are_worth_most(
    squares: Mapping[str, float], steps: Sequence[tuple[str, float, float]]
) -> None:
    made = steps_of("decoder", ("layer",), 0.5, squares)
    assert [step.precision for step in made] == [to for to, _, _ in steps]
    assert [step.square for step in made] == pytest.approx([less for _, less, _ in steps])
    assert [step.worth for step in made] == pytest.approx([2 * worth for _, _, worth in steps])


def test_what_is_done_is_shown_before_each_measurement(tmp_path: Path) -> None:
    shown: list[float] = []
    study = study_of(tmp_path, deep([3, 17, 20]), "int4", 0.04, shown.append)
    study.plan()
    assert study.table
    assert len(shown) == len(study.table) + len(study.plans)
    assert sorted({*shown}) == shown
    assert shown[0] == 0
    assert shown[-1] < 1


def exercise(looking: Model) -> None:
    looking.prefill([looking.encode(picture) for picture in CALIBRATED_ON])
