"""Which layers don't bear fewer bits, measured group by group.

One group of layers is quantised at a time and everything else left in float; what that moves, in
grades and in verdicts of comparisons on pictures that were not calibrated on, decides. A group may
spend as much of a budget for the whole model as it has a share in what quantising saves: in the
bytes of all weights or in all multiplications, whichever is more. Where a group moves the answers
by more than that, its layers are measured one by one, and those that do so too stay behind.

Convolutions feed one another, and a float one amid quantised ones costs two conversions of its wide
result: more time than its few bits would save. So they stay in float up to one of them and are
quantised from there on.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from meiqa.engine.grading import expected_grade
from meiqa.engine.runtime.base import GraphSession
from meiqa.engine.vlm import VisualTokens, Vlm
from meiqa.export.graphs import save_graph
from meiqa.export.piecewise import PiecewiseSession
from meiqa.export.quantise import LEFT_IN_FLOAT, Assignment, Quantisation

BUDGETS = {"int8": 0.1, "int4": 0.2}
"""Move, in grades, of which each group may spend its share."""
CHAIN_SHARE = 0.1
"""Of the budget, for all convolutions together; errors of single groups partly cancel, those of a
chain add up."""
COMPARED = 4
"""Pictures that each picture is compared with."""

Pictures = Sequence[NDArray[np.uint8]]
OpenVlm = Callable[[Mapping[str, GraphSession]], Vlm]


@dataclass(frozen=True, eq=False)
class Answers:
    """What a model says of pictures: grades (N,) on 1-5, preferences (N, K) on 0-1."""

    grades: NDArray[np.float64]
    preferences: NDArray[np.float64]

    @classmethod
    def of(cls, vlm: Vlm, tokens: list[VisualTokens]) -> Answers:
        """Grade all pictures and compare each with the ones after it."""
        prefixes = vlm.read(tokens)
        around = [*tokens[1:], *tokens * COMPARED]
        logits = [vlm.prefer_first([p], around[i:][:COMPARED]) for i, p in enumerate(prefixes)]
        grades = [expected_grade(vlm.grade(prefix)) for prefix in prefixes]
        return cls(np.array(grades), 1 / (1 + np.exp(-np.stack(logits))))

    def moves_to(self, other: Answers) -> tuple[float, float]:
        """Mean change of grades and of preferences."""
        return (
            float(np.abs(self.grades - other.grades).mean()),
            float(np.abs(self.preferences - other.preferences).mean()),
        )


class Shares(NamedTuple):
    """Parts of the bytes of all graphs' weights and of all their multiplications."""

    byte_share: float
    work_share: float


@dataclass(frozen=True)
class Group:
    """Layers of a graph that are judged together.

    Attributes:
        layers: the shares of each by its name.
        chained: they are convolutions that feed one another.
    """

    graph: str
    name: str
    layers: Mapping[str, Shares]
    chained: bool = False

    @property
    def shares(self) -> Shares:
        """Of all its layers together."""
        return Shares(*np.sum(list(self.layers.values()), axis=0).tolist())

    @property
    def budget_share(self) -> float:
        """Part of the budget that it may spend."""
        return CHAIN_SHARE if self.chained else max(self.shares)

    def only(self, names: Collection[str]) -> Group:
        """Some of its layers."""
        return replace(self, layers={n: costs for n, costs in self.layers.items() if n in names})


def groups_of(quantisation: Quantisation) -> list[Group]:
    """The convolutions of each graph, and linear layers by what they are in their block."""
    layers = [
        (graph, layer) for graph in quantisation.files for layer in quantisation.layers(graph)
    ]
    sizes = np.array([prod(layer.shape) for _, layer in layers])
    works = sizes * [quantisation.positions(graph, layer) for graph, layer in layers]
    groups: dict[tuple[str, str, bool], dict[str, Shares]] = {}
    shares = zip(sizes / sizes.sum(), works / works.sum(), strict=True)
    for (graph, layer), (of_bytes, of_work) in zip(layers, shares, strict=True):
        chained = layer.is_convolution
        name = "convolutions" if chained else re.sub(r"\.\d+(?=\.)", ".*", layer.name, count=1)
        of_layer = Shares(float(of_bytes), float(of_work))
        groups.setdefault((graph, name, chained), {})[layer.name] = of_layer
    return [Group(graph, name, names, chained) for (graph, name, chained), names in groups.items()]


class SensitivityStudy:
    """Measures what quantising parts of a model moves.

    Args:
        quantisation: makes the trials.
        open_vlm: a model on sessions of the graphs.
        pictures: photographs, fitted to the grid, others than those calibrated on.
        folder: where the trials' graphs are written for the time they run.
    """

    def __init__(
        self, quantisation: Quantisation, open_vlm: OpenVlm, pictures: Pictures, folder: Path
    ) -> None:
        self._quantisation, self._open_vlm = quantisation, open_vlm
        self._pictures, self._folder = pictures, folder
        self._float = {n: PiecewiseSession(file) for n, file in quantisation.files.items()}
        vlm = open_vlm(self._float)
        self._tokens = [vlm.encode(picture) for picture in pictures]
        self._exact = Answers.of(vlm, self._tokens)
        self.table: list[dict[str, Any]] = []

    def plan(self) -> dict[str, Assignment]:
        """Precision of every layer; `table` then holds all measurements."""
        plan: dict[str, Assignment] = {name: {} for name in self._quantisation.files}
        for group in groups_of(self._quantisation):
            assigned = self._cut if group.chained else self._assigned
            plan[group.graph] |= assigned(group, self._quantisation.ladder(group.graph))
        return plan

    def _cut(self, group: Group, ladder: Sequence[str]) -> Assignment:
        """Few bits from that convolution on from which the model bears them.

        It is found by halving: a shorter rest is taken to move answers less.
        """
        names = list(group.layers)
        low, high = 0, len(names)
        while ladder and low < high:
            middle = (low + high) // 2
            if self._bears(group.only(names[middle:]), ladder[0]):
                high = middle
            else:
                low = middle + 1
        few = ladder[0] if ladder else LEFT_IN_FLOAT
        return dict.fromkeys(names, few) | dict.fromkeys(names[:high], LEFT_IN_FLOAT)

    def _assigned(self, group: Group, ladder: Sequence[str]) -> Assignment:
        """The smallest precision that each of a group's layers bears."""
        if not ladder:
            return dict.fromkeys(group.layers, LEFT_IN_FLOAT)
        smallest, *wider = ladder
        assigned = dict.fromkeys(group.layers, smallest)
        if self._bears(group, smallest):
            return assigned
        failing: Collection[str] = group.layers
        if len(group.layers) > 1:
            # If none fails alone, all of them do together.
            alone = [name for name in group.layers if not self._bears(group.only([name]), smallest)]
            failing = alone or group.layers
        return assigned | self._assigned(group.only(failing), wider)

    def _bears(self, group: Group, precision: str) -> bool:
        """Measure a group in a precision, note it, and say whether it stays below its share."""
        with self._trial(group, precision) as session:
            vlm = self._open_vlm({**self._float, group.graph: session})
            tokens = self._tokens
            if group.graph == "vision":
                tokens = [vlm.encode(picture) for picture in self._pictures]
            grade, verdict = self._exact.moves_to(Answers.of(vlm, tokens))
        # Grades span 4 and preferences 1.
        allowed = BUDGETS[self._quantisation.precision] * group.budget_share
        # What is not a number must not pass as small.
        bears = bool(grade <= allowed and 4 * verdict <= allowed)
        self.table.append(
            {
                "graph": group.graph,
                "group": group.name if len(group.layers) > 1 else next(iter(group.layers)),
                "layers": len(group.layers),
                "precision": precision,
                **group.shares._asdict(),
                "grade_move": grade,
                "verdict_move": verdict,
                "allowed_move": allowed,
                "borne": bears,
            }
        )
        return bears

    @contextmanager
    def _trial(self, group: Group, precision: str) -> Iterator[GraphSession]:
        """A graph of which one group of layers is quantised."""
        model = self._quantisation.graph(group.graph, dict.fromkeys(group.layers, precision))
        file = self._folder / f".{group.graph}.trial.onnx"
        try:
            save_graph(model, file)
            yield PiecewiseSession(file)
        finally:
            for written in (file, file.with_name(f"{file.name}.data")):
                written.unlink(missing_ok=True)
