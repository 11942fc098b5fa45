"""The study keeps in float what moves the answers, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meiqa.engine.local import LocalVlm
from meiqa.engine.package import EnginePackage
from meiqa.engine.runtime.base import GraphSession
from meiqa.export import sensitivity
from meiqa.export.quantise import Quantisation
from meiqa.export.sensitivity import Answers, Group, SensitivityStudy, groups_of
from tests.engine.samples import picture
from tests.export.test_quantise import files, quantisations

__all__ = ["files", "quantisations"]

PICTURES = [picture(n, (128, 192)) for n in (70, 71, 72)]


def study(package: EnginePackage, quantisation: Quantisation, folder: Path) -> SensitivityStudy:
    def open_vlm(sessions: Mapping[str, GraphSession]) -> LocalVlm:
        return LocalVlm(package, sessions["vision"], sessions["decoder"])

    return SensitivityStudy(quantisation, open_vlm, PICTURES, folder)


def test_layers_are_grouped_by_kind_and_shares_add_up(
    quantisations: dict[str, Quantisation],
) -> None:
    groups = {group.name: group for group in groups_of(quantisations["int8"])}
    assert set(groups["layers.*.mlp.down_proj.weight"].layers) == {
        f"layers.{n}.mlp.down_proj.weight" for n in range(2)
    }
    convolutions = groups["convolutions"]
    assert convolutions.chained
    assert next(iter(convolutions.layers)) == "stem.conv.weight"
    assert len(convolutions.layers) == len([n for n in all_layers(quantisations) if "conv" in n])
    assert sum(group.shares.byte_share for group in groups.values()) == pytest.approx(1)
    assert sum(group.shares.work_share for group in groups.values()) == pytest.approx(1)
    stem = convolutions.layers["stem.conv.weight"]
    assert stem.work_share > 3 * stem.byte_share
    assert convolutions.shares.work_share > convolutions.shares.byte_share


def all_layers(quantisations: dict[str, Quantisation]) -> list[str]:
    return [layer.name for layer in quantisations["int8"].layers("vision")]


@pytest.mark.parametrize("fewest", [0, 1, 7, 100])
def test_convolutions_are_quantised_from_one_on(
    package: EnginePackage,
    quantisations: dict[str, Quantisation],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fewest: int,
) -> None:
    names = [name for name in all_layers(quantisations) if "conv" in name]

    def bears(_: SensitivityStudy, group: Group, __: str) -> bool:
        return not group.chained or names.index(next(iter(group.layers))) >= fewest

    monkeypatch.setattr(SensitivityStudy, "_bears", bears)
    plan = study(package, quantisations["int8"], tmp_path).plan()["vision"]
    assert [name for name in names if plan[name] == "fp16"] == names[:fewest]
    assert {plan[name] for name in names[fewest:]} <= {"int8"}


@pytest.mark.parametrize(("budget", "kept"), [(1e9, "int8"), (0.0, "fp16")])
def test_the_budget_decides(
    package: EnginePackage,
    quantisations: dict[str, Quantisation],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    budget: float,
    kept: str,
) -> None:
    monkeypatch.setitem(sensitivity.BUDGETS, "int8", budget)
    made = study(package, quantisations["int8"], tmp_path)
    plan = made.plan()
    assert {p for of_graph in plan.values() for p in of_graph.values()} == {kept}
    for name in plan:
        assert set(plan[name]) == {layer.name for layer in quantisations["int8"].layers(name)}
    assert list(tmp_path.iterdir()) == []
    for row in made.table:
        assert row["borne"] == (budget > 0)
        assert 0 < row["grade_move"] < 1


def test_only_layers_that_fail_alone_go_up_the_ladder(
    package: EnginePackage,
    quantisations: dict[str, Quantisation],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weak = "layers.1.mlp.down_proj.weight"

    def bears(_: SensitivityStudy, group: Group, precision: str) -> bool:
        return weak not in group.layers or precision == "int8"

    monkeypatch.setattr(SensitivityStudy, "_bears", bears)
    plan = study(package, quantisations["int4"], tmp_path).plan()
    assert [name for name, p in plan["decoder"].items() if p != "int4"] == [weak]
    assert plan["decoder"][weak] == "int8"


def test_layers_that_fail_only_together_go_up_together(
    package: EnginePackage,
    quantisations: dict[str, Quantisation],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(SensitivityStudy, "_bears", lambda _, group, __: len(group.layers) == 1)
    plan = study(package, quantisations["int8"], tmp_path).plan()
    assert plan["decoder"]["layers.0.mlp.down_proj.weight"] == "fp16"
    assert plan["decoder"]["lm_head.weight"] == "int8"


def test_moves_are_mean_changes() -> None:
    def answers(grades: Sequence[float], preferences: Any) -> Answers:
        return Answers(np.array(grades), np.array(preferences))

    one, other = answers([1, 2], [[0.5], [0.5]]), answers([1.5, 1.5], [[0.5], [0.9]])
    assert one.moves_to(other) == pytest.approx((0.5, 0.2))
    assert one.moves_to(one) == (0, 0)
