"""The decoder as a model calls it: over whatever executes its graph, or natively beside that.

A *row* is some tokens of one prompt; a *prefix* is what an earlier row left for those that continue
it: keys and values, and the state of layers that keep one instead. Rows are padded, stacked and cut
into calls here, so that a model says what it asks and never how that lies in memory.

A decoder that the native kernel can run has its layers in the segment `decoder.layers`, which
`meiqa.export.fused` wrote from the very graph beside it: arrays, or where they lie among the
graph's weights. Whether kernel or graph is faster is measured where that is in doubt.
"""

from __future__ import annotations

import math
import mmap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from meiqa.engine.manifest import DecoderShape
from meiqa.engine.package import EnginePackage
from meiqa.errors import AnswerNotFinite, PackageCorrupted
from meiqa.kernels.decoder import (
    FASTEST,
    FASTEST_IN_BF16,
    LAYER_LINEARS,
    FusedDecoder,
    FusedShape,
    FusedWeights,
    Linear,
    Projection,
    checked_blocks,
)
from meiqa.memory.segment import Segment

Floats = NDArray[np.float32]
Array = NDArray[np.float32] | NDArray[np.int64]

ROWS_PER_CALL = 8
"""Rows of one call of a graph: more no longer fit the cache of a CPU core."""
ROWS_WITH_STATES = 4
"""The same where each row brings a state, of a MiB or two a layer: no more time, less memory."""
LAYERS_FILE = "decoder.layers"
EXPORT_AGAIN = "export the package again"
ROWS_BY_THEMSELVES = 64
"""Rows of one call of the kernel, which works on each row by itself; bounds the memory."""
NO_STATE = np.zeros((0, 0), np.float32)
"""What decoders leave whose layers all keep keys and values."""
VIEWS = "graph"
"""Attribute of the layers' segment: offset, dtype and shape of arrays among the graph's weights."""
VIEWED = ("|i1", "<f2", "<f4")
STEPS = PREFIX_STEPS = 80
"""Tokens of a comparison and of its prefix, photos of 512 x 512 pixels: what is measured."""
_TRIALS, _FEWEST_TRIALS, _TRIAL_SECONDS = 5, 2, 1.0
_AS_FAST = 1.03
Stored = Mapping[str, NDArray[np.generic]]
Way = TypeVar("Way")


class GraphSession(Protocol):
    """One loaded graph: named arrays in, named arrays out."""

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Floats]:
        """Execute the graph: every input by name, and every output."""
        ...


@dataclass(frozen=True, eq=False)
class Row:
    """Tokens that continue a prefix, or that begin a prompt.

    Attributes:
        embeds: (S, D) float32, S at least 1, D the manifest's `DecoderShape.embed_width`.
        positions: (3, S) temporal, row and column position of each token, whole numbers from 0 on.
    """

    embeds: Floats
    positions: Floats

    def behind(self, count: int) -> Row:
        """Leave out the first tokens."""
        return Row(self.embeds[count:], self.positions[:, count:])

    def followed_by(self, embeds: Floats) -> Row:
        """Append text (n, D), whose positions go on one by one."""
        if not len(embeds):
            return self
        start = self.positions.max() + 1
        text = np.broadcast_to(np.arange(start, start + len(embeds)), (3, len(embeds)))
        return Row(np.concatenate([self.embeds, embeds]), np.hstack([self.positions, text]))


@dataclass(frozen=True, eq=False)
class KeyValues:
    """What a row leaves for those that continue it: keys and values (L, 2, H, T, d), C-contiguous.

    Of the T tokens the first `length` count; the others are masked. A `state` (M, W) is that of M
    layers which keep one instead, behind exactly so many tokens: it can't be counted back.
    """

    array: Floats
    length: int
    state: Floats = field(default_factory=lambda: NO_STATE)

    @classmethod
    def nothing(cls, shape: DecoderShape) -> KeyValues:
        """Give what a prompt begins with."""
        array = np.zeros((shape.layers, 2, shape.kv_heads, 0, shape.head_dim), np.float32)
        return cls(array, 0, np.zeros((shape.state_layers, shape.state_width), np.float32))

    @property
    def nbytes(self) -> int:
        return int(self.array.nbytes + self.state.nbytes)

    def first(self, length: int) -> KeyValues:
        """Count fewer tokens, of the same array; ValueError where there is a state."""
        if self.state.size and length != self.length:
            raise ValueError(f"a state behind {self.length} tokens has no part of {length}")
        return KeyValues(self.array, length, self.state)


@dataclass(frozen=True, eq=False)
class Step:
    """What a row gives that is written on.

    Attributes:
        logits: (wanted, V) of the tokens that follow its last `wanted` ones, finite or not.
        hidden: (S, hidden_size) last hidden state of each of its tokens.
        key_values: (L, 2, H, S, d) of its tokens, to be added to the past.
        state: (M, W) behind the first token whose logits were wanted.
    """

    logits: Floats
    hidden: Floats
    key_values: Floats
    state: Floats = field(default_factory=lambda: NO_STATE)


class Past:
    """What was written behind a prefix, in arrays that grow in place.

    Tokens that were only tried count when the writer says so. A state has not seen them then: they
    are `unseen`, and have to be fed once more.
    """

    def __init__(self, prefix: KeyValues, room: int) -> None:
        self.length = 0
        self.unseen: list[int] = []
        self._prefix, self._state = prefix, prefix.state
        self._array = self._empty(room)

    @property
    def room(self) -> int:
        """How many more tokens there is room for."""
        return int(self._array.shape[3]) - self.length

    @property
    def key_values(self) -> KeyValues:
        """What the next step continues, beside the prefix."""
        return KeyValues(self._array, self.length, self._state)

    def grow(self, tokens: int) -> None:
        """Make room for so many more tokens."""
        self._array = np.concatenate([self._array, self._empty(tokens)], axis=3)

    def read(self, step: Step, fed: int, tried: int) -> None:
        """Keep a step's first tokens: those that were fed count now, those tried not yet."""
        kept = self.length + fed + tried
        self._array[:, :, :, self.length : kept] = step.key_values[:, :, :, : fed + tried]
        self.length += fed
        self.unseen, self._state = [], step.state

    def count(self, token: int) -> None:
        """Count the next of the tokens that were tried."""
        if self._state.size:
            self.unseen.append(token)
        else:
            self.length += 1

    def _empty(self, room: int) -> Floats:
        layers, two, heads, _, width = self._prefix.array.shape
        return np.zeros((layers, two, heads, room, width), np.float32)


class Decoder(Protocol):
    """Reads rows; each result is the same whatever other rows are in the call.

    AnswerNotFinite where something overflows.
    """

    def prefill(self, rows: Sequence[Row], ahead: Floats | None = None) -> list[KeyValues]:
        """Read rows that begin a prompt, any number, of any lengths.

        Gives each one's keys and values, read-only. Their `length` says how far was read: S
        tokens, or S + n; `KeyValues.first` gives the row's own.

        Args:
            ahead: (n, D) text that follows every row in most of its continuations. A decoder to
                which that is nearly free reads it as well.
        """
        ...

    def last_logits(self, rows: Sequence[Row], prefixes: Sequence[KeyValues]) -> Floats:
        """Give the logits (R, V) of the token behind each row.

        Args:
            prefixes: what each row continues, or the only one, which all continue and which is
                neither copied nor read again.
        """
        ...

    def step(self, prefix: KeyValues, past: KeyValues, row: Row, wanted: int = 1) -> Step:
        """Read one row behind a prefix and a past, which is what was written after the prefix.

        Logits are asked of the row's last `wanted` tokens. The past's state is behind both.
        """
        ...


class GraphDecoder:
    """A decoder graph in a session: ONNX Runtime's, TensorRT's, or PyTorch's in the export."""

    def __init__(self, session: GraphSession, shape: DecoderShape) -> None:
        self.session = session
        self._nothing = KeyValues.nothing(shape)
        self.rows_per_call = ROWS_WITH_STATES if shape.state_layers else ROWS_PER_CALL
        self._vocabulary = shape.vocab_size

    def prefill(self, rows: Sequence[Row], ahead: Floats | None = None) -> list[KeyValues]:
        """Read rows that begin a prompt, and nothing ahead; see `Decoder`."""
        kept = []
        for part in parts_of(len(rows), self.rows_per_call):
            made = self._called(rows[part], [self._nothing] * len(rows[part]))
            for index, row in enumerate(rows[part]):
                # Copied, so that a cached prefix does not keep its neighbours of the call alive.
                array = made["key_values"][:, :, index, :, 0, : len(row.embeds)].copy()
                array.setflags(write=False)  # so that a device need not be sent it twice
                kept.append(KeyValues(array, len(row.embeds), self._state(made, index).copy()))
        return kept

    def last_logits(self, rows: Sequence[Row], prefixes: Sequence[KeyValues]) -> Floats:
        """Give logits behind rows; see `Decoder`."""
        found = [np.zeros((0, self._vocabulary), np.float32)]
        for part in parts_of(len(rows), self.rows_per_call):
            continued = prefixes if len(prefixes) == 1 else prefixes[part]
            logits = self._called(rows[part], continued)["logits"]
            found.append(logits.reshape(len(rows[part]), -1))
        return np.concatenate(found)

    def step(self, prefix: KeyValues, past: KeyValues, row: Row, wanted: int = 1) -> Step:
        """Read a row behind a prefix and a past; see `Decoder`."""
        made = self._run([row], [prefix], past, wanted)
        own = made["key_values"][:, :, 0, :, 0]
        return Step(made["logits"][0, 0], made["hidden"][0, 0], own, self._state(made, 0))

    def _state(self, made: Mapping[str, Floats], prefix: int) -> Floats:
        """Give the state (M, W) that the first row of a prefix leaves."""
        return made["kept_states"][:, prefix, 0] if self._nothing.state.size else NO_STATE

    def _called(self, rows: Sequence[Row], prefixes: Sequence[KeyValues]) -> dict[str, Floats]:
        """Run rows without a past, for the logits of their last tokens."""
        made = self._run(rows, prefixes)
        require_finite(made["logits"])
        return made

    def _run(
        self,
        rows: Sequence[Row],
        prefixes: Sequence[KeyValues],
        past: KeyValues | None = None,
        wanted: int = 1,
    ) -> dict[str, Floats]:
        # Prefixes of a call, and rows of each: all over the only one, or one over each.
        across = (1, len(rows)) if len(prefixes) == 1 else (len(rows), 1)
        embeds, positions, steps = padded(rows)
        longest = embeds.shape[1]
        asked = steps[:, None] + np.arange(-wanted, 0)
        inputs: dict[str, Array] = {
            "embeds": embeds.reshape(*across, longest, -1),
            "positions": positions.reshape(3, *across, longest),
            "prefix": _stacked(prefixes),
            "prefix_lengths": np.array([prefix.length for prefix in prefixes], np.int64),
            "past": self._behind(past, across),
            "past_lengths": np.full(across, 0 if past is None else past.length, np.int64),
            "logit_positions": asked.reshape(*across, wanted),
        }
        if self._nothing.state.size:
            before = np.stack([each.state for each in (prefixes if past is None else [past])], 1)
            states = np.broadcast_to(before[:, :, None], (len(before), *across, before.shape[2]))
            inputs["states"] = np.ascontiguousarray(states)  # each row changes its own
            inputs["kept_lengths"] = (steps - wanted + 1).reshape(across)
        return self.session.run(inputs)

    def _behind(self, past: KeyValues | None, across: tuple[int, int]) -> Floats:
        """Keys and values of what was written, (L, 2, P, H, R, T, d)."""
        if past is not None:
            # Its own memory, which is writable: what is read-only a device may keep.
            return past.array[:, :, None, :, None]
        layers, _, heads, _, width = self._nothing.array.shape
        return np.zeros((layers, 2, across[0], heads, across[1], 0, width), np.float32)


def parts_of(count: int, most: int) -> Iterator[slice]:
    """Cut so many rows into calls of at most `most`."""
    return (slice(start, start + most) for start in range(0, count, most))


def _stacked(prefixes: Sequence[KeyValues]) -> Floats:
    """Prefixes side by side (L, 2, B, H, T, d), padded to the longest; a single one as it lies."""
    if len(prefixes) == 1:
        return prefixes[0].array[:, :, None]
    layers, _, heads, _, width = prefixes[0].array.shape
    longest = max(prefix.length for prefix in prefixes)
    stacked = np.zeros((layers, 2, len(prefixes), heads, longest, width), np.float32)
    for index, prefix in enumerate(prefixes):
        stacked[:, :, index, :, : prefix.length] = prefix.array[..., : prefix.length, :]
    return stacked


def padded(rows: Sequence[Row]) -> tuple[Floats, Floats, NDArray[np.int64]]:
    """Lay rows side by side: embeddings (R, S, D), positions (3, R, S), real tokens (R,)."""
    steps = np.array([len(row.embeds) for row in rows], np.int64)
    embeds = np.zeros((len(rows), int(steps.max()), rows[0].embeds.shape[1]), np.float32)
    positions = np.zeros((3, *embeds.shape[:2]), np.float32)
    for index, row in enumerate(rows):
        embeds[index, : len(row.embeds)] = row.embeds
        positions[:, index, : len(row.embeds)] = row.positions
    return embeds, positions, steps


def require_finite(values: Floats) -> None:
    """Refuse what overflowed on its way through the model."""
    if not np.isfinite(values).all():
        raise AnswerNotFinite(
            "the model's answer is not a number",
            hint="export the model with --precision fp32, whose range is wider",
        )


class NativeDecoder:
    """A decoder's layers and what makes logits, in the native kernel.

    Rows are shared among the threads, or each row where there are fewer of them.
    """

    def __init__(self, layers: FusedDecoder, head: Projection, threads: int) -> None:
        self._layers, self._head, self.threads = layers, head, threads

    def prefill(self, rows: Sequence[Row], ahead: Floats | None = None) -> list[KeyValues]:
        """Read rows that begin a prompt, and what follows them; see `Decoder`."""
        longer = rows if ahead is None else [row.followed_by(ahead) for row in rows]
        kept = []
        for part in parts_of(len(longer), ROWS_BY_THEMSELVES):
            for array in self._layers.keys_and_values(*padded(longer[part]), self.threads):
                require_finite(array)
                array.setflags(write=False)
                kept.append(KeyValues(array, array.shape[3]))
        return kept

    def last_logits(self, rows: Sequence[Row], prefixes: Sequence[KeyValues]) -> Floats:
        """Give logits behind rows, over prefixes that are read where they lie; see `Decoder`."""
        found = [np.zeros((0, self._head.outputs), np.float32)]
        for part in parts_of(len(rows), ROWS_BY_THEMSELVES):
            continued = prefixes if len(prefixes) == 1 else prefixes[part]
            hidden = self._layers.last_hidden(
                *padded(rows[part]),
                [prefix.array for prefix in continued],
                np.array([prefix.length for prefix in continued], np.int64),
                self.threads,
            )
            found.append(self._head.of(hidden, self.threads))
            require_finite(found[-1])
        return np.concatenate(found)

    def step(self, prefix: KeyValues, past: KeyValues, row: Row, wanted: int = 1) -> Step:
        """Read a row behind a prefix and a past; see `Decoder`."""
        before, written = ((each.array, each.length) for each in (prefix, past))
        hidden, own = self._layers.step(row.embeds, row.positions, before, written, self.threads)
        return Step(self._head.of(hidden[-wanted:], self.threads), hidden, own)


def comparisons(decoder: Decoder, package: EnginePackage, rows: int) -> Callable[[], object]:
    """Give a call of so many comparisons of random words, as long as with photos of 512 x 512."""
    ids = np.random.default_rng(0).integers(0, len(package.embedding), (rows + 1, STEPS))
    embeds = np.zeros((*ids.shape, package.manifest.decoder.embed_width), np.float32)
    embeds[..., : package.embedding.shape[1]] = package.embedding[ids]
    positions = np.tile(np.arange(STEPS, dtype=np.float32), (3, 1))
    first, *others = (Row(each, positions) for each in embeds)
    prefixes = decoder.prefill([first])
    return lambda: decoder.last_logits(others, prefixes)


def fastest(
    calls: Mapping[Way, Callable[[], object]], *, clock: Callable[[], float] = time.perf_counter
) -> Way:
    """Measure which of some calls is fastest, in about a second or with two trials of each.

    Slow cores beside fast ones, or units of the processor that cores share, may hold up the others.
    Of those that are about as fast the first is given.
    """
    for call in calls.values():
        call()  # what starts threads and takes memory
    best = dict.fromkeys(calls, math.inf)
    first = clock()
    for trial in range(_TRIALS):
        if trial >= _FEWEST_TRIALS and clock() - first > _TRIAL_SECONDS:
            break
        for way, call in calls.items():
            began = clock()
            call()
            best[way] = min(best[way], clock() - began)
    return next(way for way, took in best.items() if took <= _AS_FAST * min(best.values()))


def thread_counts(most: int) -> list[int]:
    """Give 1, 2, 4 … and the most.

    >>> thread_counts(6)
    [1, 2, 4, 6]
    """
    return [2**i for i in range(most.bit_length()) if 2**i < most] + [most]


def kernel_for(package: EnginePackage) -> str:
    """Name the fastest kernel that a package allows."""
    return FASTEST_IN_BF16 if package.manifest.bf16 else FASTEST


def read_layers(package: EnginePackage) -> tuple[FusedDecoder, Projection] | None:
    """Read a package's layers for the fastest kernel that it allows, and what makes logits; None
    where it has none."""
    stored = stored_layers(package)
    return None if stored is None else packed(*stored, kernel_for(package))


def stored_layers(package: EnginePackage) -> tuple[FusedWeights, Linear] | None:
    """Map a package's layers, and what makes logits; None where it has none."""
    if LAYERS_FILE not in package.manifest.files:
        return None
    path, graph = package.path / LAYERS_FILE, package.manifest.every_graph["decoder"]
    try:
        layers, head = stored_beside(package.path / (graph.weights or graph.file))
    except (KeyError, TypeError, ValueError) as error:
        what, hint = f"{path} does not hold the decoder's layers", EXPORT_AGAIN
        raise PackageCorrupted(what, seen=str(error), hint=hint) from error
    shape, own = package.manifest.decoder, layers.shape
    found = (len(layers.layers), own.kv_heads, own.head_width, own.width, *head.weight.shape)
    width = shape.hidden_size
    listed = (shape.layers, shape.kv_heads, shape.head_dim, width, width, shape.vocab_size)
    if found != listed:
        raise PackageCorrupted(
            f"{path} holds another decoder than the manifest describes",
            seen=found,
            allowed=listed,
            hint=EXPORT_AGAIN,
        )
    return layers, head


def layers_beside(weights: Path, kernel: str = FASTEST) -> tuple[FusedDecoder, Projection]:
    """Read the layers in the folder of a decoder graph's weights, and what makes logits.

    KeyError, TypeError or ValueError if something is missing or does not fit.
    """
    return packed(*stored_beside(weights), kernel)


def packed(layers: FusedWeights, head: Linear, kernel: str) -> tuple[FusedDecoder, Projection]:
    """Pack layers for a kernel, and what makes logits: a copy, which outlives their files."""
    return FusedDecoder(layers, kernel), Projection(head, kernel)


def stored_beside(weights: Path) -> tuple[FusedWeights, Linear]:
    """Map the layers in the folder of a decoder graph's weights; see `layers_beside`.

    The files have to stay as they are while any of the arrays is used.
    """
    # Opening a package compares the manifest's digests of both files, unless it is told not to.
    segment = Segment.open(weights.with_name(LAYERS_FILE), verify=False)
    attributes = {**segment.attributes}
    views = attributes.pop(VIEWS, {})
    with weights.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    arrays = {**segment.arrays, **{name: _view(mapped, *place) for name, place in views.items()}}
    return layers_of(arrays, attributes), head_of(arrays)


def _view(mapped: mmap.mmap, offset: int, dtype: str, shape: list[int]) -> NDArray[np.generic]:
    if dtype not in VIEWED or any(type(size) is not int or size < 0 for size in (offset, *shape)):
        raise ValueError(f"an array lies at {offset}, of {dtype} and {shape}")
    return np.frombuffer(mapped, dtype, math.prod(shape), offset).reshape(shape)


def head_of(arrays: Stored) -> Linear:
    """Give what makes logits, of what `meiqa.export.fused` stored: floats or bytes in blocks."""
    weight = arrays["lm_head"]
    no_bias = np.zeros(weight.shape[-1], np.float32)
    if "lm_head.scale" not in arrays:
        return Linear(weights(weight), no_bias)
    scale = floats(arrays["lm_head.scale"])
    return checked_blocks(Linear(np.asarray(weight, np.int8), no_bias, scale))


def layers_of(arrays: Stored, attributes: Mapping[str, object]) -> FusedWeights:
    """Give the layers, of what `meiqa.export.fused` stored.

    KeyError, TypeError or ValueError if something is missing or does not fit.
    """
    shape = FusedShape(**attributes)  # type: ignore[arg-type]
    count = sum(name.endswith(".input_layernorm") for name in arrays)
    names = [f"layers.{index}" for index in range(count)]
    before = [floats(arrays[f"{name}.input_layernorm"]) for name in names]
    after = [floats(arrays[f"{name}.post_layernorm"]) for name in names]
    linears = [{n: _linear(arrays, f"{name}.{n}") for n in LAYER_LINEARS} for name in names]
    norms = list(zip(before, after, strict=True))
    common = floats(arrays["frequencies"]), floats(arrays["norm"])
    return FusedWeights(shape, *common, norms, linears)


def _linear(arrays: Stored, name: str) -> Linear:
    bias = floats(arrays[f"{name}.bias"])
    if f"{name}.scale" not in arrays:
        return Linear(weights(arrays[name]), bias)
    scale, zero = arrays[f"{name}.input"].tolist()
    codes, scales = np.asarray(arrays[name], np.int8), floats(arrays[f"{name}.scale"])
    return Linear(codes, bias, scales, scale, int(zero))


def weights(array: NDArray[np.generic]) -> NDArray[np.floating[Any]]:
    """Take weights in half or single precision as contiguous and aligned, see `floats`."""
    return np.require(array, np.float16 if array.dtype == np.float16 else np.float32, ["C", "A"])


def floats(array: NDArray[np.generic]) -> Floats:
    """Take an array as contiguous and aligned float32, copied only where it isn't."""
    return np.require(array, np.float32, ["C", "A"])
