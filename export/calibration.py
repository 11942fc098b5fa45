"""Which layer of a package bears which precision: what pictures show of its float graphs.

    observed = observe(files, exercise, "int8")
    quantisation = Quantisation(files, "int8", observed)
    plan = quantisation.default()  # or measured: SensitivityStudy(quantisation, …).plan()
    save_graph(quantisation.graph("decoder", plan["decoder"]), path)

The study looks for a small package that moves grades and preferences no more than is allowed, on
pictures that were not calibrated on. It begins with every layer in the fewest bits. Where that is
too much, each group of layers is quantised by itself and measured, and what that moves is divided
among its layers by what rounding loses of their outputs. Those that move answers most for what they
save then go to more bits, float at last, until the whole, measured anew, is borne.

Convolutions feed one another, and a float one amid quantised ones costs two conversions of its wide
result. So the first of them are those that go first.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from meiqa.engine.estimates import expected_grade
from meiqa.engine.files import IMAGE_SUFFIXES
from meiqa.engine.model import Model, Prefix, VisualTokens
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
from meiqa.export.verify import PiecewiseSession, giving

SAMPLED_ROWS = {"int8": 1024, "int4": 4096}
"""Most rows of a sample. 4 bits need more: errors are made good by what channels have in common,
which few rows don't tell."""
WIDE = 4096
"""Channels up to which a sample holds all its rows; of wider values it holds fewer, in the same
memory."""
WRITING_EVERY = 16
"""Calls of one token write text; they are many and alike, so one in so many is looked at."""
LEFT_IN_FLOAT = "fp16"
IN_BLOCKS = "int8 in blocks"
LARGEST_HEAD = 0.2
"""Share of the decoder's weights up to which what makes logits stays in float."""
AIM = 0.75
"""Part of what a finished package may move answers that the pictures studied may show, since others
move differently."""
SURE = 0.8
"""Part of the allowed square that a plan is made for, and of that again each time that it was too
little: measuring a plan takes minutes with a large model."""
FURTHEST = 0.25
"""Part of its present move that a plan is brought down to at most before it is measured anew: what
little is left is known less well."""
PREFERENCE_WEIGHT = 1.5
"""A change of a preference, 0-1, counts as so many times that of a grade, 1-5."""
GRADE_SPAN = 4.0
"""Change of an answer that is not a number."""
EXPECTED_PLANS = 4
"""Measured whole, for telling how much is done."""
BITS = {"int4": 4, "int8": 8, IN_BLOCKS: 8, LEFT_IN_FLOAT: 16}
"""Of a weight."""

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
    """Collects what `Observed` holds of a value of `width` channels."""

    def __init__(self, width: int, most_rows: int) -> None:
        self._rng = np.random.default_rng(0)
        self._seen = 0
        self._low = np.full(width, np.inf, np.float32)
        self._high = np.full(width, -np.inf, np.float32)
        self._sum = np.zeros(width)
        limit = max(1, min(most_rows, most_rows * WIDE // width))
        self._keys, self._rows = np.full(limit, np.inf), np.empty((limit, width), np.float32)

    def add(self, values: Floats) -> None:
        """Look at tokens or pixels (n, C)."""
        self._seen += len(values)
        self._low = np.minimum(self._low, values.min(0))
        self._high = np.maximum(self._high, values.max(0))
        self._sum += np.einsum("ij,ij->j", values, values, dtype=np.float64)
        # The rows with the smallest random keys: each row seen is as likely as any other.
        keys, limit = np.concatenate([self._keys, self._rng.random(len(values))]), len(self._rows)
        order = np.argsort(keys)
        kept, left = order[:limit], order[limit:]
        new, places = kept[kept >= limit], left[left < limit]
        self._keys[places], self._rows[places] = keys[new], values[new - limit]

    def observed(self) -> Observed:
        """Give what was seen, with its rows in random order."""
        rows = self._rows[np.argsort(self._keys)[: self._seen]]
        return Observed(self._low, self._high, self._sum / self._seen, rows, self._seen)


class ObservingSession:
    """A graph behind `GraphSession` that notes some of its values in passing.

    Args:
        session: executes the graph and returns those values besides its outputs.
        channel_axes: the axes that count their channels.
        most_rows: of each value's sample.
    """

    def __init__(
        self, session: GraphSession, channel_axes: Mapping[str, int], most_rows: int
    ) -> None:
        self._session, self._axes, self._most_rows = session, channel_axes, most_rows
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
                if name not in self._observers:
                    self._observers[name] = Observer(width, self._most_rows)
                self._observers[name].add(channels_last.reshape(-1, width))
        self._written += writes
        return made

    def take_observed(self) -> dict[str, Observed]:
        """Give what was seen and forget it, value by value, as samples are large."""
        return {name: self._observers.pop(name).observed() for name in list(self._observers)}


@contextmanager
def observing(
    path: Path, channel_axes: Mapping[str, int], most_rows: int
) -> Iterator[ObservingSession]:
    """Open a graph file so that the values with these channel axes are noted."""
    with giving(path, channel_axes) as session:
        yield ObservingSession(session, channel_axes, most_rows)


def fewest_bits(precision: str, name: str) -> str:
    """Give the smallest precision of a graph's layers: only the decoder has any in 4 bits."""
    return precision if name == "decoder" else "int8"


def observe(
    files: Files, exercise: Callable[[Mapping[str, GraphSession]], None], precision: str
) -> dict[str, dict[str, Observed]]:
    """Note, by graph and activation, what layers read while `exercise` asks as the engine does.

    Samples are as large as layers need that may go down to "int8" or "int4".
    """
    with ExitStack() as stack:
        sessions = {}
        for name, file in files.items():
            values = values_to_observe(ir.load(file))
            most_rows = SAMPLED_ROWS[fewest_bits(precision, name)]
            sessions[name] = stack.enter_context(observing(file, values, most_rows))
        exercise(sessions)
        return {name: session.take_observed() for name, session in sessions.items()}


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
        rungs = ["int4"] if fewest_bits(self.precision, name) == "int4" else []
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


def mean_move(made: Iterable[Answers], exact: Iterable[Answers]) -> float:
    """Give the mean change of pictures' answers."""
    changes = [np.abs(one - other).mean() for one, other in zip(made, exact, strict=True)]
    return float(np.nan_to_num(changes, nan=GRADE_SPAN).mean())


class Shares(NamedTuple):
    """Parts of the bytes of all graphs' weights and of all their multiplications."""

    byte_share: float
    work_share: float


Readers = tuple[str, ...]
"""Names of layers that read one value. They have one precision, as a kernel that multiplies several
of them at once reads that value either rounded or in floats."""


def together(shares: Iterable[Shares]) -> Shares:
    """Add up shares.

    >>> together([Shares(0.25, 0.5), Shares(0.5, 0.25)])
    Shares(byte_share=0.75, work_share=0.75)
    """
    return Shares(*map(sum, zip(*shares, strict=True)))


class Group(NamedTuple):
    """Layers of a graph that are measured together, with the shares of those that read one value.

    Attributes:
        chained: they are convolutions that feed one another.
    """

    graph: str
    name: str
    chained: bool
    readers: Mapping[Readers, Shares]

    @property
    def layers(self) -> list[str]:
        return [name for readers in self.readers for name in readers]

    @property
    def shares(self) -> Shares:
        return together(self.readers.values())


class Moves(NamedTuple):
    """Mean changes of grades, 1-5, and of preferences, 0-1."""

    grade_move: float
    verdict_move: float

    @property
    def worse(self) -> float:
        """The larger one, as a change of grades."""
        return max(self.grade_move, PREFERENCE_WEIGHT * self.verdict_move)


class Step(NamedTuple):
    """A way of layers to more bits, by which answers move less: as a square, by how much less.

    Attributes:
        worth: that square for each bit, and each share of the model, that is given back.
    """

    graph: str
    readers: Readers
    precision: str
    square: float
    worth: float


def groups_of(quantisation: Quantisation) -> list[Group]:
    """Group the convolutions of each graph, and linear layers by what they are in their block.

    Layers that read one value stay together.
    """
    layers = [(name, layer) for name in quantisation.files for layer in quantisation.layers(name)]
    sizes = np.array([math.prod(layer.shape) for _, layer in layers])
    works = sizes * [quantisation.positions(graph, layer) for graph, layer in layers]
    shares = map(Shares, (sizes / sizes.sum()).tolist(), (works / works.sum()).tolist())
    reading: dict[tuple[str, bool, str], dict[str, Shares]] = {}
    for (graph, layer), of_layer in zip(layers, shares, strict=True):
        value = graph, layer.is_convolution, str(layer.input.name)
        reading.setdefault(value, {})[layer.name] = of_layer
    groups: dict[tuple[str, str, bool], dict[Readers, Shares]] = {}
    for (graph, chained, _), of_layers in reading.items():
        kinds = (re.sub(r"\.\d+(?=\.)", ".*", name, count=1) for name in of_layers)
        name = "convolutions" if chained else " + ".join(kinds)
        groups.setdefault((graph, name, chained), {})[tuple(of_layers)] = together(
            of_layers.values()
        )
    return [Group(*key, readers) for key, readers in groups.items()]


def steps_of(
    graph: str, readers: Readers, share: float, squares: Mapping[str, float]
) -> list[Step]:
    """Go from the first precision on to those that move answers least for the bits they take."""
    precision, steps = next(iter(squares)), list[Step]()
    while precision != LEFT_IN_FLOAT:
        wider = [
            Step(graph, readers, to, less, less / (share * (BITS[to] - BITS[precision])))
            for to, square in squares.items()
            if BITS[to] > BITS[precision] and (less := squares[precision] - square) > 0
        ]
        if not wider:
            break
        steps.append(max(wider, key=lambda step: step.worth))
        precision = steps[-1].precision
    return steps


class SensitivityStudy:
    """Measures what quantising a model moves.

    Args:
        open_model: opens a model on sessions of the graphs.
        pictures: fitted to the grid, others than those calibrated on.
        largest_move: mean change of a grade by which a finished package may differ.
        show: told before each measurement which share of those expected is done.
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
        self._pictures, self._allowed, self._show = pictures, AIM * largest_move, show
        self._ladders = [(group, self._ladder(group)) for group in groups_of(quantisation)]
        self._expected = EXPECTED_PLANS + sum(len(ladder) - 1 for _, ladder in self._ladders)
        self.table: list[dict[str, Any]] = []
        self.plans: list[dict[str, Any]] = []
        with self._trial({}) as model:
            self._tokens = [model.encode(picture) for picture in pictures]
            self._exact = self._answers(model, self._tokens)

    def plan(self) -> dict[str, Assignment]:
        """Choose the precision of every layer.

        The whole is borne then, or what groups move explains no more of what it moves. `table`
        holds what was measured of groups, and `plans` what of whole plans.
        """
        plan: dict[str, Assignment] = {name: {} for name in self._quantisation.files}
        for group, (smallest, *_) in self._ladders:
            plan[group.graph] |= dict.fromkeys(group.layers, smallest)
        steps: list[Step] | None = None
        while (moved := self._plan_moved(plan)) > self._allowed and steps != []:
            steps = self._steps() if steps is None else steps
            part = max(self._allowed / moved, FURTHEST)
            goal = SURE ** len(self.plans) * part**2 * sum(step.square for step in steps)
            while steps and sum(step.square for step in steps) >= goal:
                step = steps.pop(0)
                plan[step.graph] |= dict.fromkeys(step.readers, step.precision)
        return plan

    def _ladder(self, group: Group) -> list[str]:
        """List the precisions that a group may have, the smallest first."""
        heads = {head.name for head in heads_among(self._quantisation.layers(group.graph))}
        rungs = self._quantisation.ladder(group.graph)
        return [*([IN_BLOCKS] if {*group.layers} <= heads else rungs), LEFT_IN_FLOAT]

    def _steps(self) -> list[Step]:
        """Measure each group in each precision, and order its layers' steps by their worth."""
        steps = []
        for group, ladder in self._ladders:
            by_precision = {rung: self._squares(group, rung) for rung in ladder[:-1]}
            for readers, shares in group.readers.items():
                squares = {rung: of_readers[readers] for rung, of_readers in by_precision.items()}
                squares[LEFT_IN_FLOAT] = 0.0
                steps += steps_of(group.graph, readers, max(shares), squares)
        return sorted(steps, key=lambda step: step.worth, reverse=True)

    def _squares(self, group: Group, precision: str) -> dict[Readers, float]:
        """Measure a group in a precision, note it, and divide the square among its layers.

        Errors add in squares. They are divided by what rounding loses of the layers' outputs where
        that tells anything; otherwise by size, and of a chain more to layers with more behind them.
        """
        name = group.name if len(group.readers) > 1 else " + ".join(group.layers)
        row: dict[str, Any] = {"graph": group.graph, "group": name, "precision": precision}
        row |= {"layers": len(group.layers), **group.shares._asdict()}
        moves = self._moves({group.graph: dict.fromkeys(group.layers, precision)})
        self.table.append(row | moves._asdict())
        losses = {readers: max(shares) for readers, shares in group.readers.items()}
        if group.chained:
            behind = range(len(losses), 0, -1)
            losses = {n: count * losses[n] for count, n in zip(behind, losses, strict=True)}
        elif len(losses) > 1:
            lost = self._quantisation.lost(group.graph, group.layers, precision)
            measured = {readers: sum(lost[name] for name in readers) for readers in losses}
            losses = measured if 0 < sum(measured.values()) < math.inf else losses
        square = moves.worse**2 / sum(losses.values())
        return {readers: square * loss for readers, loss in losses.items()}

    def _plan_moved(self, plan: Mapping[str, Assignment]) -> float:
        """Measure a whole plan, note it, and give what it moves."""
        moves = self._moves(plan)
        work = {rung: 0.0 for _, ladder in self._ladders for rung in ladder}
        for group, _ in self._ladders:
            for readers, shares in group.readers.items():
                work[plan[group.graph][readers[0]]] += shares.work_share
        self.plans.append(work | moves._asdict() | {"allowed_move": self._allowed})
        return moves.worse

    def _moves(self, plan: Mapping[str, Assignment]) -> Moves:
        """Grade and compare the pictures by a model with a plan."""
        self._show(min(1.0, (len(self.table) + len(self.plans)) / self._expected))
        with self._trial(plan) as model:
            seen = self._tokens
            if "vision" in plan:
                seen = [model.encode(picture) for picture in self._pictures]
            made = self._answers(model, seen)
        (grades, preferences), (exact_grades, exact_preferences) = made, self._exact
        grade_move = mean_move(grades, exact_grades)
        return Moves(grade_move, mean_move(preferences, exact_preferences))

    def _answers(
        self, model: Model, tokens: Sequence[VisualTokens]
    ) -> tuple[list[Answers], list[Answers]]:
        """Grade pictures, and compare each with the next."""
        prefixes = model.prefill(tokens)
        grades = [expected_grade(model.grade(prefix)) for prefix in prefixes]
        return [*grades], [*preferences_of(model, prefixes)]

    @contextmanager
    def _trial(self, plan: Mapping[str, Assignment]) -> Iterator[Model]:
        """Open the model with graphs quantised, which are written for so long."""
        # Beside the float graphs, most of whose weights they read.
        floats = self._quantisation.files
        files = {name: floats[name].with_name(f".{name}.trial.onnx") for name in plan}
        try:
            for name, file in files.items():
                save_changes(self._quantisation.graph(name, plan[name]), file)
            opened = {name: PiecewiseSession(file) for name, file in {**floats, **files}.items()}
            yield self._open_model(opened)
        finally:
            for file in files.values():
                for written in (file, file.with_name(f"{file.name}.data")):
                    written.unlink(missing_ok=True)
