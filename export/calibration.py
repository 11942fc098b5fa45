"""Which layer of a package bears which precision: what pictures show of its float graphs.

    observed = observe(files, exercise)
    quantisation = Quantisation(files, "int8", observed)
    plan = quantisation.default()  # or measured: SensitivityStudy(quantisation, …).plan()
    save_graph(quantisation.graph("decoder", plan["decoder"]), path)

The study quantises one group of layers at a time and leaves everything else in float; what that
moves, in grades and in preferences on pictures that were not calibrated on, decides. A group may
spend as much of a budget for the whole model as it has a share in what quantising saves: in the
bytes of all weights or in all multiplications, whichever is more. Where a group moves the answers
by more than that, its worst layers stay behind: as few of them as let the rest together be borne,
found by doubling and halving. The worst are those of whose output rounding by itself loses most.

Then all groups are quantised together. Where that moves grades by more than a finished package may,
layers that move them most for what they save are left in float, until it does not.

Convolutions feed one another, and a float one amid quantised ones costs two conversions of its wide
result. So the first of them are those that stay behind.
"""

from __future__ import annotations

import hashlib
import math
import re
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from meiqa.engine.estimates import expected_grade
from meiqa.engine.files import IMAGE_SUFFIXES
from meiqa.engine.model import Model, Prefix
from meiqa.engine.runtime.decoder import Array, GraphSession
from meiqa.errors import UsageError
from meiqa.export.layers import Layer, layers_of, save_changes, store_as_half
from meiqa.export.rounding import (
    Observed,
    Range,
    foldables,
    output_share_lost,
    quantise_int4,
    quantise_int8,
    result_of,
    smoothing_scales,
    store_in_blocks,
    values_to_observe,
    want_own_rows,
)
from meiqa.export.verify import PiecewiseSession

SAMPLED_VALUES, SAMPLED_ROWS = 1 << 22, 1024
"""A sample holds so many rows at most, and so many values: rows of wide layers are fewer."""
WRITING_EVERY = 16
"""Calls of one token write text; they are many and alike, so one in so many is looked at."""
LEFT_IN_FLOAT = "fp16"
IN_BLOCKS = "int8 in blocks"
LARGEST_HEAD = 0.2
"""Share of the decoder's weights up to which what makes logits stays in float."""
BUDGETS = {"int8": 0.1, "int4": 0.2}
"""Move, in grades, of which each group may spend its share."""
CHAIN_SHARE = 0.1
"""Of the budget, for all convolutions together; errors of single groups partly cancel, those of a
chain add up."""
AIM = 0.75
"""Part of what a finished package may move grades that the pictures studied may show of it, since
others move differently."""

Floats = NDArray[np.float32]
Files = Mapping[str, Path]
Assignment = dict[str, str]
"""Precision by the name of a layer's weight: "int4", "int8", `IN_BLOCKS` or "fp16"."""
Pictures = Sequence[NDArray[np.uint8]]
Answers = float | NDArray[np.float64]
"""Of a picture: its grade, 1-5, or the probability (1,) that it looks better than another."""
OpenModel = Callable[[Mapping[str, GraphSession]], Model]


def pictures_in(folder: Path, count: int) -> list[Path]:
    """Choose up to `count` photographs of a folder, spread by a hash of their names.

    Raises:
        UsageError: there are none.
    """
    if not folder.is_dir():
        raise UsageError("there is no folder with photographs", seen=folder)
    photographs = [
        path
        for path in folder.iterdir()
        if path.suffix.lower() in IMAGE_SUFFIXES and path.name[0] != "." and path.is_file()
    ]
    if not photographs:
        allowed = ", ".join(sorted(IMAGE_SUFFIXES))
        raise UsageError(f"{folder} holds no photographs", allowed=allowed)
    by_hash = sorted(photographs, key=lambda p: hashlib.sha256(p.name.encode()).hexdigest())
    return by_hash[:count]


def require_pictures(precision: str, pictures: Sequence[object]) -> None:
    """Refuse INT8 with UsageError where there is nothing to calibrate on."""
    if precision == "int8" and not pictures:
        raise UsageError(
            "int8 needs photographs to calibrate on",
            seen="none",
            hint="give a folder with some dozens of them: --calibration DIR",
        )


class Observer:
    """Collects what `Observed` holds of a value."""

    def __init__(self, width: int) -> None:
        self._rng = np.random.default_rng(0)
        self._seen = 0
        self._low = np.full(width, np.inf, np.float32)
        self._high = np.full(width, -np.inf, np.float32)
        self._sum = np.zeros(width)
        self._limit = min(SAMPLED_ROWS, max(1, SAMPLED_VALUES // width))
        self._keys, self._rows = np.zeros(0), np.zeros((0, width), np.float32)

    def add(self, values: Floats) -> None:
        """Look at tokens or pixels (n, C)."""
        self._seen += len(values)
        self._low = np.minimum(self._low, values.min(0))
        self._high = np.maximum(self._high, values.max(0))
        self._sum += np.einsum("ij,ij->j", values, values, dtype=np.float64)
        # The rows with the smallest random keys: each row seen is as likely as any other.
        keys = np.concatenate([self._keys, self._rng.random(len(values))])
        kept = np.argsort(keys)[: self._limit]
        old, new = kept[kept < len(self._rows)], kept[kept >= len(self._rows)] - len(self._rows)
        self._keys = keys[np.concatenate([old, new + len(self._rows)])]
        self._rows = np.concatenate([self._rows[old], values[new]])

    def observed(self) -> Observed:
        return Observed(self._low, self._high, self._sum / self._seen, self._rows, self._seen)


class ObservingSession:
    """A graph behind `GraphSession` that notes some of its values in passing.

    Args:
        session: executes the graph and returns those values besides its outputs.
        channel_axes: the axes that count their channels.
    """

    def __init__(self, session: GraphSession, channel_axes: Mapping[str, int]) -> None:
        self._session, self._axes = session, channel_axes
        self._observers: dict[str, Observer] = {}
        self._written = 0

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Floats]:
        """Execute the graph; see `GraphSession`. What is noted is returned too."""
        made = self._session.run(inputs)
        writes = "embeds" in inputs and inputs["embeds"].shape[2] == 1
        if not writes or self._written % WRITING_EVERY == 0:
            for name, axis in self._axes.items():
                channels_last = np.moveaxis(made[name], axis, -1)
                width = channels_last.shape[-1]
                observer = self._observers.setdefault(name, Observer(width))
                observer.add(channels_last.reshape(-1, width))
        self._written += writes
        return made

    def observed(self) -> dict[str, Observed]:
        return {name: observer.observed() for name, observer in self._observers.items()}


@contextmanager
def observing(path: Path, channel_axes: Mapping[str, int]) -> Iterator[ObservingSession]:
    """Open a graph file so that the values with these channel axes are noted."""
    model = onnx.load(path, load_external_data=False)
    present = {output.name for output in model.graph.output}
    missing = [name for name in channel_axes if name not in present]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in missing)
    twin = path.with_name(f".{path.name}.observed")  # beside it, so that it finds its weights
    try:
        twin.write_bytes(model.SerializeToString())
        yield ObservingSession(PiecewiseSession(twin), channel_axes)
    finally:
        twin.unlink(missing_ok=True)


def observe(
    files: Files, exercise: Callable[[Mapping[str, GraphSession]], None]
) -> dict[str, dict[str, Observed]]:
    """Note, by graph and activation, what layers read while `exercise` asks as the engine does."""
    with ExitStack() as stack:
        sessions = {
            name: stack.enter_context(observing(file, values_to_observe(ir.load(file))))
            for name, file in files.items()
        }
        exercise(sessions)
        return {name: session.observed() for name, session in sessions.items()}


class Quantisation:
    """The float graphs of a package and what is known about them.

    Args:
        files: float graphs by name.
        precision: "int8" or "int4"; only the decoder has layers in 4 bits.
        observed: by graph and activation; empty without pictures, and then nothing can be int8.
    """

    def __init__(
        self, files: Files, precision: str, observed: Mapping[str, Mapping[str, Observed]]
    ) -> None:
        self.files, self.precision = files, precision
        self._observed = {name: dict(observed.get(name, {})) for name in files}
        self._scales: dict[str, dict[str, Floats]] = {}
        self._by_rows: dict[str, set[str]] = {}
        for name, seen in self._observed.items():
            smooth = self.ladder(name)[:1] == ["int8"]
            self._scales[name] = smoothing_scales(ir.load(self.files[name]), seen) if smooth else {}
            for value, scales in self._scales[name].items():
                seen[value] = seen[value].divided(scales)
            self._by_rows[name] = want_own_rows(ir.load(self.files[name]), seen)

    def ladder(self, name: str) -> list[str]:
        """List the precisions that a graph's layers may have below float, the smallest first."""
        rungs = ["int4"] if self.precision == "int4" and name == "decoder" else []
        return [*rungs, "int8"] if self._observed.get(name) else rungs

    def layers(self, name: str) -> list[Layer]:
        return layers_of(ir.load(self.files[name]))

    def positions(self, name: str, layer: Layer) -> int:
        """Count the tokens or pixels for which a layer was at work."""
        value = result_of(layer) if layer.is_convolution else layer.input
        return self._observed[name][str(value.name)].seen

    def default(self) -> dict[str, Assignment]:
        """Plan every layer in the smallest precision, but what sees pixels or makes logits.

        A head that is a good part of the decoder has 8 bits, in blocks, with its input in float:
        reading it takes most of a token's time.
        """
        plan = {}
        for name in self.files:
            layers = self.layers(name)
            small = [*self.ladder(name), LEFT_IN_FLOAT][0]
            plan[name] = {layer.name: small for layer in layers}
            for layer in layers[:1] if name == "vision" else heads_among(layers):
                plan[name][layer.name] = LEFT_IN_FLOAT
            if name == "decoder":
                plan[name] |= dict.fromkeys(large_heads(layers), IN_BLOCKS)
        return plan

    def graph(self, name: str, assignment: Assignment) -> ir.Model:
        """Make a graph with each layer in its precision; those not named stay as they are."""
        model, seen = self._smoothed(name, assignment), self._observed[name]
        ranges = {value: Range.of(of_value) for value, of_value in seen.items()}

        def stored_as(precision: str) -> Callable[[Layer], bool]:
            return lambda layer: assignment.get(layer.name) == precision

        quantise_int8(model, ranges, stored_as("int8"), self._by_rows[name])
        quantise_int4(model, seen, stored_as("int4"))
        store_in_blocks(model, stored_as(IN_BLOCKS))
        store_as_half(model, stored_as("fp16"))
        return model

    def lost(self, name: str, layers: Collection[str], precision: str) -> dict[str, float]:
        """Give the share of linear layers' outputs that a precision loses by itself."""
        lost = {}
        for layer in layers_of(self._smoothed(name, layers)):
            if layer.name in layers:
                value = str(layer.input.name)
                seen, by_rows = self._observed[name][value], value in self._by_rows[name]
                lost[layer.name] = output_share_lost(layer, precision, seen, by_rows)
        return lost

    def _smoothed(self, name: str, layers: Collection[str]) -> ir.Model:
        """Load a graph and fold the scales of what some of its layers read."""
        model, scales = ir.load(self.files[name]), self._scales[name]
        for foldable in list(foldables(model)):
            value = str(foldable.value.name)
            if value in scales and any(layer.name in layers for layer in foldable.layers):
                foldable.fold(scales[value])
        return model


def heads_among(layers: Sequence[Layer]) -> list[Layer]:
    """Find what makes logits."""
    return [layer for layer in layers if layer.node.outputs[0].name == "logits"]


def large_heads(layers: Sequence[Layer]) -> list[str]:
    """Name the heads that hold more than `LARGEST_HEAD` of a decoder's weights."""
    allowed = LARGEST_HEAD * sum(math.prod(layer.shape) for layer in layers)
    return [head.name for head in heads_among(layers) if math.prod(head.shape) > allowed]


def preferences_of(model: Model, prefixes: Sequence[Prefix]) -> Iterator[Answers]:
    """Compare each picture with the one after it: probabilities (1,) that it looks better."""
    for prefix, other in zip(prefixes, [*prefixes[1:], *prefixes[:1]], strict=True):
        yield 1 / (1 + np.exp(-model.prefer_first([prefix], [other.tokens])))


def move_until_refused(made: Iterable[Answers], exact: Sequence[Answers], allowed: float) -> float:
    """Give the mean change of pictures' answers, added up until it exceeds what is allowed."""
    moved = 0.0
    for answers, wanted in zip(made, exact, strict=False):
        moved += float(np.abs(answers - wanted).mean()) / len(exact)
        if not moved <= allowed:  # as what is not a number
            break
    return moved


class Shares(NamedTuple):
    """Parts of the bytes of all graphs' weights and of all their multiplications."""

    byte_share: float
    work_share: float


class Group(NamedTuple):
    """Layers of a graph that are measured together, with the shares of each by its name.

    Attributes:
        budget_share: the part of the budget for the whole model that they may spend.
        chained: they are convolutions that feed one another.
    """

    graph: str
    name: str
    layers: Mapping[str, Shares]
    budget_share: float
    chained: bool

    @classmethod
    def of(cls, graph: str, name: str, chained: bool, layers: Mapping[str, Shares]) -> Group:
        """Let a group spend as much of the budget as it has a share in what quantising saves, and a
        chain `CHAIN_SHARE`."""
        group = cls(graph, name, layers, CHAIN_SHARE, chained)
        return group if chained else group._replace(budget_share=max(group.shares))

    @property
    def shares(self) -> Shares:
        return Shares(*np.sum(list(self.layers.values()), axis=0).tolist())

    def only(self, names: Collection[str]) -> Group:
        """Give some of the layers, with what they may spend.

        Errors of layers side by side add up in squares. So parts share the square of what the group
        may spend by their sizes: in whatever precisions they end, together they spend no more than
        it, and leaving out the worst does not leave too little for the others. A chain's parts may
        each spend as much as the chain.
        """
        part = self._replace(layers={n: shares for n, shares in self.layers.items() if n in names})
        if self.chained:
            return part
        size = max(part.shares) / max(self.shares)
        return part._replace(budget_share=self.budget_share * math.sqrt(size))


class Part(NamedTuple):
    """A layer's part of what its group moves grades by, as a square.

    Attributes:
        square_for_saving: that square for each share of the model that rounding it saves.
    """

    graph: str
    name: str
    square: float
    square_for_saving: float


def groups_of(quantisation: Quantisation) -> list[Group]:
    """Group the convolutions of each graph, and linear layers by what they are in their block."""
    layers = [(name, layer) for name in quantisation.files for layer in quantisation.layers(name)]
    sizes = np.array([math.prod(layer.shape) for _, layer in layers])
    works = sizes * [quantisation.positions(graph, layer) for graph, layer in layers]
    groups: dict[tuple[str, str, bool], dict[str, Shares]] = {}
    for index, (graph, layer) in enumerate(layers):
        chained = layer.is_convolution
        name = "convolutions" if chained else re.sub(r"\.\d+(?=\.)", ".*", layer.name, count=1)
        shares = Shares(float(sizes[index] / sizes.sum()), float(works[index] / works.sum()))
        groups.setdefault((graph, name, chained), {})[layer.name] = shares
    return [Group.of(*key, names) for key, names in groups.items()]


def fewest(most: int, enough: Callable[[int], bool]) -> int:
    """Find the least number from 1 on that is enough, as `most` is, by doubling and halving.

    Few are tried first: a trial that fails is cheap, and small parts tell less than large ones.
    """
    low, high = 0, 1
    while high < most and not enough(high):
        low, high = high, min(2 * high, most)
    return bisect_left(range(most), True, lo=low + 1, hi=high, key=enough)


class SensitivityStudy:
    """Measures what quantising parts of a model moves.

    Args:
        open_model: opens a model on sessions of the graphs.
        pictures: fitted to the grid, others than those calibrated on.
        largest_move: mean change of a grade by which a finished package may differ.
        show: told before each trial which share is done of those that are needed at most.
    """

    def __init__(
        self,
        quantisation: Quantisation,
        open_model: OpenModel,
        pictures: Pictures,
        largest_move: float,
        show: Callable[[float], None] = lambda share: None,
    ) -> None:
        self._quantisation, self._open_model = quantisation, open_model
        self._pictures, self._show = pictures, show
        self._allowed_together = AIM * largest_move
        self._float = {n: PiecewiseSession(file) for n, file in quantisation.files.items()}
        model = open_model(self._float)
        self._tokens = [model.encode(picture) for picture in pictures]
        prefixes = model.prefill(self._tokens)
        self._grades = [expected_grade(model.grade(prefix)) for prefix in prefixes]
        self._preferences = [*preferences_of(model, prefixes)]
        self.table: list[dict[str, Any]] = []
        self.together: list[dict[str, Any]] = []
        self._borne: list[tuple[Group, str, float]] = []  # in a precision, and the grades' move
        self._most = self._spared = 0  # trials that are needed at most; those that were needless

    def plan(self) -> dict[str, Assignment]:
        """Choose the precision of every layer.

        `table` then holds what was measured of groups, and `together` what of whole plans.
        """
        plan: dict[str, Assignment] = {name: {} for name in self._quantisation.files}
        groups = groups_of(self._quantisation)
        ladders = [self._ladder(group) for group in groups]
        trials = [
            len(ladder) * max(1, 2 * (len(group.layers) - 1).bit_length())
            for group, ladder in zip(groups, ladders, strict=True)
        ]
        self._most = sum(trials) + 1
        for at, (group, ladder) in enumerate(zip(groups, ladders, strict=True)):
            self._spared = sum(trials[:at]) - len(self.table)
            plan[group.graph] |= self._assigned(group, ladder)
        self._spared = sum(trials) - len(self.table)
        self._hold_together(plan)
        return plan

    def _ladder(self, group: Group) -> list[str]:
        heads = large_heads(self._quantisation.layers(group.graph))
        if group.layers.keys() <= {*heads}:
            return [IN_BLOCKS]
        return self._quantisation.ladder(group.graph)

    def _assigned(self, group: Group, ladder: Sequence[str]) -> Assignment:
        """Give the smallest precision to as many layers as bear it together, wider ones to others.

        Leaving more out is taken to help; see `Group.only`.
        """
        if not ladder:
            return dict.fromkeys(group.layers, LEFT_IN_FLOAT)
        smallest, *wider = ladder
        if self._bears(group, smallest):
            return dict.fromkeys(group.layers, smallest)
        order = self._worst_first(group, smallest)
        left = fewest(len(order), lambda count: self._bears(group.only(order[count:]), smallest))
        others = self._assigned(group.only(order[:left]), wider)
        return dict.fromkeys(group.layers, smallest) | others

    def _worst_first(self, group: Group, precision: str) -> list[str]:
        names = list(group.layers)
        if group.chained or len(names) == 1:
            return names
        lost = self._quantisation.lost(group.graph, names, precision)
        return sorted(names, key=lost.__getitem__, reverse=True)

    def _bears(self, group: Group, precision: str) -> bool:
        """Measure a group in a precision, note it, and say whether it stays below its share."""
        allowed = BUDGETS[self._quantisation.precision] * group.budget_share
        plan = {group.graph: dict.fromkeys(group.layers, precision)}
        with self._trial(plan) as model:
            prefixes: list[Prefix] = []
            grades = self._grades_by(model, plan, prefixes)
            grade, verdict = move_until_refused(grades, self._grades, allowed), None
            # Comparing takes most of a trial that is borne. Grades span 4 and preferences 1.
            if grade <= allowed:
                compared = preferences_of(model, prefixes)
                verdict = move_until_refused(compared, self._preferences, allowed / 4)
        bears = verdict is not None and 4 * verdict <= allowed
        if bears:
            self._borne.append((group, precision, grade))
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

    def _hold_together(self, plan: dict[str, Assignment]) -> None:
        """Leave layers in float until all that are not move grades no more than allowed.

        They are taken to move them by the root of the sum of their squares, times what was last
        measured is more than that.
        """
        allowed, parts = self._allowed_together, self._most_moving_first()
        while parts and (moved := self._move_together(plan)) > allowed:
            goal = sum(part.square for part in parts) * (allowed / moved) ** 2
            while parts and sum(part.square for part in parts) >= goal:
                part = parts.pop(0)
                plan[part.graph][part.name] = LEFT_IN_FLOAT

    def _move_together(self, plan: Mapping[str, Assignment]) -> float:
        """Measure what a whole plan moves grades by, and note it."""
        with self._trial(plan) as model:
            grades = self._grades_by(model, plan, [])
            moved = move_until_refused(grades, self._grades, math.inf)
        kept = [precision for assignment in plan.values() for precision in assignment.values()]
        self.together.append(
            {
                "layers": sum(precision != LEFT_IN_FLOAT for precision in kept),
                "grade_move": moved,
                "allowed_move": self._allowed_together,
            }
        )
        return moved

    def _most_moving_first(self) -> list[Part]:
        """Order the layers that were borne by the square of their move for what they save.

        That of a group is divided by what rounding loses of its layers' outputs, that of a chain
        evenly, so that its first layers come first.
        """
        by_size = sorted(self._borne, key=lambda borne: len(borne[0].layers))
        largest = {(group.graph, group.name, kept): (group, move) for group, kept, move in by_size}
        parts = []
        for (graph, _, precision), (group, move) in largest.items():
            savings = {name: max(shares) for name, shares in group.layers.items()}
            alone = group.chained or len(savings) == 1
            losses = savings if alone else self._quantisation.lost(graph, savings, precision)
            of_loss = move**2 / (sum(losses.values()) or 1)
            for name, saving in savings.items():
                square = of_loss * losses[name]
                parts.append(Part(graph, name, square, of_loss * (losses[name] / saving)))
        return sorted(parts, key=lambda part: part.square_for_saving, reverse=True)

    def _grades_by(
        self, model: Model, plan: Mapping[str, Assignment], prefixes: list[Prefix]
    ) -> Iterator[float]:
        """Grade the pictures by a model with a plan; their prefixes are added to those given."""
        self._show(min(1.0, (self._spared + len(self.table) + len(self.together)) / self._most))
        for picture, tokens in zip(self._pictures, self._tokens, strict=True):
            seen = model.encode(picture) if "vision" in plan else tokens
            prefixes.extend(model.prefill([seen]))
            yield expected_grade(model.grade(prefixes[-1]))

    @contextmanager
    def _trial(self, plan: Mapping[str, Assignment]) -> Iterator[Model]:
        """Open the model with graphs quantised, which are written for so long."""
        # Beside the float graphs, most of whose weights they read.
        beside = self._quantisation.files
        files = {name: beside[name].with_name(f".{name}.trial.onnx") for name in plan}
        try:
            for name, file in files.items():
                save_changes(self._quantisation.graph(name, plan[name]), file)
            trials = {name: PiecewiseSession(file) for name, file in files.items()}
            yield self._open_model({**self._float, **trials})
        finally:
            for file in files.values():
                for written in (file, file.with_name(f"{file.name}.data")):
                    written.unlink(missing_ok=True)
