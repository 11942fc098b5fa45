"""The last token's hidden state of rows that continue prefixes, in one fused native call.

It computes what the decoder graph does (export/decoder.py), for two purposes: a verdict, and the
prefix that it continues. Of the last layer nothing is computed but the last token, or the keys and
values. Those of a prefix are read where they lie, padding costs nothing, and between two products
nothing leaves the processor's cache. A row's result is the same bit for bit, whatever else is in
the call and however many threads run.

Weights are floats, or signed bytes with a scale for each output channel, whose input is rounded to
unsigned bytes by one range: the arithmetic of a QuantizeLinear and DequantizeLinear pair.
Sums of rounded inputs are whole numbers, and all kernels have the same ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from meiqa.kernels import _decoder

Floats = NDArray[np.float32]
Number = TypeVar("Number", bound=np.generic)
PANEL, LANES, BLOCK = 32, 16, 32
OF_EACH_ROW = -1.0
"""In place of an input's scale: each row of it has its own."""
MIDDLE = 128
FIRST_POSITIONS = 512
NOT_A_NUMBER = 0x7FC0
"""In bf16."""


class Packing(NamedTuple):
    """How a kernel wants linear layers.

    Attributes:
        together: bytes of an output that lie side by side; 0 for floats that hold the bytes.
        lowest: the code that stands for 0 of a rounded input's 0 to 255.
        halves: whether weights in half precision stay so; else they are made floats.
        side_by_side: floats of an output that are multiplied at once: two in bf16, else one.
    """

    together: int
    lowest: int
    halves: bool
    side_by_side: int

    @property
    def in_bf16(self) -> bool:
        """Whether products of floats round what they are given to bf16."""
        return self.side_by_side > 1


KERNELS = {name: Packing(*packing) for name, packing in _decoder.kernels()}
"""Kernels that run on this processor, the fastest first."""
FASTEST_IN_BF16 = next(iter(KERNELS))
"""For packages that allow it; without such products it is the fastest."""
FASTEST = next(name for name, packing in KERNELS.items() if not packing.in_bf16)
"""Of the kernels that multiply floats as they are."""
LAYER_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class FusedShape:
    """Shape of a decoder.

    Attributes:
        width: of the hidden states, D; inner: of the MLP.
        heads: query heads; kv_heads: key-value heads, H; head_width: of one head, d.
        epsilon: of the normalisations.
    """

    width: int
    inner: int
    heads: int
    kv_heads: int
    head_width: int
    epsilon: float

    @property
    def fits(self) -> bool:
        """Whether the widths divide as the kernel's panels want them."""
        return (
            self.heads % self.kv_heads == 0
            and self.head_width % PANEL == 0
            and self.width % PANEL == 0
            and self.inner % LANES == 0
        )

    def multiplications(self, layers: int, steps: int, prefix_steps: int) -> tuple[int, int]:
        """Count those of a row of `steps` tokens: of linear layers, and of attention.

        A token attends to the prefix, to those before it and to itself. Of the last layer all that
        is done for each token is its keys and values.
        """
        queries, keys = self.heads * self.head_width, self.kv_heads * self.head_width
        other = 2 * self.width * queries + 3 * self.width * self.inner
        linear = 2 * layers * steps * self.width * keys + ((layers - 1) * steps + 1) * other
        seen = steps * prefix_steps + steps * (steps + 1) // 2
        return linear, 2 * queries * ((layers - 1) * seen + prefix_steps + steps)


@dataclass(frozen=True, eq=False)
class Linear:
    """A linear layer.

    Attributes:
        weight: (inputs, outputs), float32, float16 or int8.
        bias: (outputs,).
        scale: of an int8 weight, (outputs,); or (inputs / `BLOCK`, outputs), where each block of
            inputs has its own and the input is not rounded.
        input_scale, input_zero: range of its input, rounded to unsigned bytes; a scale of
            `OF_EACH_ROW` gives each row its own, with which its largest value is 127 steps from 0.
    """

    weight: NDArray[Any]
    bias: Floats
    scale: Floats | None = None
    input_scale: float = 1.0
    input_zero: int = 0

    def in_floats(self) -> Linear:
        """The same weight in floats, for an input that is not rounded."""
        if self.scale is None:
            return self
        steps = self.scale
        if steps.ndim == 2:
            steps = np.repeat(steps, BLOCK, axis=0)[: len(self.weight)]
        return Linear((self.weight * steps).astype(np.float32), self.bias)

    def beside(self, other: Linear) -> Linear:
        """Both layers' outputs in turns, `LANES` of one and `LANES` of the other.

        Their input is rounded for both alike, or for none.
        """
        weight, bias = in_turns(self.weight, other.weight), in_turns(self.bias, other.bias)
        if self.scale is None or other.scale is None:
            return Linear(weight, bias)
        scale = in_turns(self.scale, other.scale)
        return Linear(weight, bias, scale, self.input_scale, self.input_zero)

    def packed(self, packing: Packing, *, in_bf16: bool = False) -> Packed:
        """Cut the layer into panels of `PANEL` outputs, as a kernel wants it.

        Args:
            in_bf16: round a weight of floats to bf16; only for a kernel that multiplies in it.

        Raises:
            ValueError: the weight is not of float32, float16, or int8 with a scale.
        """
        allowed = (np.float32, np.float16) if self.scale is None else (np.int8,)
        if self.weight.dtype not in allowed:
            names = " or ".join(each.__name__ for each in allowed)
            raise ValueError(f"a weight of {self.weight.dtype} should be of {names}")
        bias, none = whole_panels(self.bias), np.zeros(0, np.int32)
        no_blocks, no_scale = np.zeros((0, 0, 0), np.float32), none.astype(np.float32)
        if self.scale is None or self.scale.ndim == 2:
            blocks = no_blocks if self.scale is None else in_panels(self.scale, 1)[..., 0]
            if in_bf16:
                panels = in_panels(bf16(self.weight), packing.side_by_side)
            elif self.weight.dtype == np.float16 and not packing.halves:
                panels = in_panels(self.weight.astype(np.float32), 1)
            else:
                panels = in_panels(self.weight, 1)
            return Packed(panels, blocks, bias, no_scale, none, 0.0, 0.0)
        own = self.input_scale == OF_EACH_ROW
        scale = np.float32(1.0 if own else self.input_scale)
        steps = OF_EACH_ROW if own else float(np.float32(1.0) / scale)
        zero = MIDDLE if own else self.input_zero
        code = np.int32(zero + packing.lowest)
        weight = self.weight if packing.together else self.weight.astype(np.float32)
        return Packed(
            in_panels(weight, max(1, packing.together)),
            no_blocks,
            bias,
            whole_panels(self.scale * scale),
            whole_panels(-code * self.weight.sum(axis=0, dtype=np.int32)),
            steps,
            float(zero),
        )


class Packed(NamedTuple):
    """A linear layer as a kernel reads it.

    Attributes:
        panels: (panels, inputs / together, `PANEL`, together), of floats, halves, bf16 in uint16
            or bytes, filled with 0.
        blocks: (panels, inputs / `BLOCK`, `PANEL`) steps of blocks; empty where there are none.
        bias: (outputs,), padded to whole panels, as are the next two.
        scale: of a sum of codes; start: what it begins with, so that an input of zero gives 0.
            Both are empty for an input that is not rounded.
        steps: to one of a rounded input, else 0, or `OF_EACH_ROW`; zero: its zero point.
    """

    panels: NDArray[Any]
    blocks: Floats
    bias: Floats
    scale: Floats
    start: NDArray[np.int32]
    steps: float
    zero: float


def bf16(array: NDArray[np.floating[Any]]) -> NDArray[np.uint16]:
    """Round to the upper halves of float32, the nearest one and of two the even one."""
    bits = array.astype(np.float32).view(np.uint32)
    nearest = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(array), NOT_A_NUMBER, nearest).astype(np.uint16)


def in_panels(weight: NDArray[Number], together: int) -> NDArray[Number]:
    """A weight (inputs, outputs) as the panels of `Packed`."""
    split = whole_panels(weight).reshape(len(weight) // together, together, -1, PANEL)
    return np.ascontiguousarray(split.transpose(2, 0, 3, 1))


def whole_panels(array: NDArray[Number]) -> NDArray[Number]:
    """Fill the last axis up to whole panels with zeros."""
    spare = -array.shape[-1] % PANEL
    return np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, spare)]) if spare else array


def in_turns(one: NDArray[Number], two: NDArray[Number]) -> NDArray[Number]:
    """Last axes of two arrays in turns, `LANES` of each."""
    shape = (*one.shape[:-1], one.shape[-1] // LANES, LANES)
    both = np.stack([one.reshape(shape), two.reshape(shape)], -2)
    return np.ascontiguousarray(both.reshape(*one.shape[:-1], -1))


@dataclass(frozen=True, eq=False)
class FusedWeights:
    """A decoder's layers as they are stored; nothing is copied.

    Attributes:
        shape: of the decoder; it has to fit.
        frequencies: (3, d / 2) rotary frequency of each channel of half a head on the axis that
            turns it, 0 on the others.
        last_norm: (D,).
        norms: (before the attention, before the MLP) of each layer.
        layers: of each layer, its linears by the names of `LAYER_LINEARS`.

    Raises:
        ValueError: the shape does not fit, or a weight has another; or layers that read the same
            input round it in different ways, or only one of gate and up does.
    """

    shape: FusedShape
    frequencies: Floats
    last_norm: Floats
    norms: Sequence[tuple[Floats, Floats]]
    layers: Sequence[Mapping[str, Linear]]

    def __post_init__(self) -> None:
        s = self.shape
        if not s.fits:
            raise ValueError(f"the kernel has no panels for {s}")
        checked(self.frequencies, (3, s.head_width // 2))
        checked(self.last_norm, (s.width,))
        for norms, linears in zip(self.norms, self.layers, strict=True):
            for norm in norms:
                checked(norm, (s.width,))
            for name, linear in linears.items():
                inputs, outputs = self._extents(name)
                checked(linear.weight, (inputs, outputs))
                checked(linear.bias, (outputs,))
                if linear.scale is not None:
                    checked(linear.scale, (outputs,))
            for readers in (LAYER_LINEARS[:3], LAYER_LINEARS[4:6]):
                require_one_range([linears[name] for name in readers])
            if (linears["gate_proj"].scale is None) != (linears["up_proj"].scale is None):
                raise ValueError("gate_proj and up_proj read one input: both round it, or none")

    @property
    def of_floats(self) -> bool:
        """Whether no layer has bytes."""
        return all(each.scale is None for own in self.layers for each in own.values())

    def in_floats(self) -> FusedWeights:
        """The same weights in floats, for inputs that are not rounded."""
        layers = [{name: each.in_floats() for name, each in own.items()} for own in self.layers]
        return replace(self, layers=layers)

    def _extents(self, name: str) -> tuple[int, int]:
        """Inputs and outputs of a linear layer."""
        s = self.shape
        queries, keys = s.heads * s.head_width, s.kv_heads * s.head_width
        return {
            "q_proj": (s.width, queries),
            "k_proj": (s.width, keys),
            "v_proj": (s.width, keys),
            "o_proj": (queries, s.width),
            "gate_proj": (s.width, s.inner),
            "up_proj": (s.width, s.inner),
            "down_proj": (s.inner, s.width),
        }[name]


class FusedDecoder:
    """A decoder's layers, ready to run. It keeps nothing of the weights but what it packed.

    A kernel of bf16 multiplies all layers in it where all have floats. Beside layers of bytes those
    in floats stay as they are: they were left so on purpose.

    Args:
        weights: of the layers.
        kernel: one of `KERNELS`; by default the fastest that multiplies floats as they are.

    Attributes:
        shape: of the decoder; layer_count: how many layers it has, L.

    Raises:
        ValueError: the kernel is none of these, or reads no weights of such a type.
    """

    def __init__(self, weights: FusedWeights, kernel: str = FASTEST) -> None:
        s = self.shape = weights.shape
        self.layer_count = len(weights.layers)
        self._native = _decoder.Decoder(
            kernel,
            s.width,
            s.inner,
            s.kv_heads,
            s.heads // s.kv_heads,
            s.head_width,
            s.epsilon,
            weights.frequencies.argmax(axis=0).astype(np.int32),
            weights.last_norm,
        )
        packing = KERNELS[kernel]
        in_bf16 = packing.in_bf16 and weights.of_floats
        for norms, linears in zip(weights.norms, weights.layers, strict=True):
            packed = (
                _decoder.StoredLinear(*each.packed(packing, in_bf16=in_bf16))
                for each in as_read(linears)
            )
            self._native.add_layer(*norms, *packed)
        self._frequencies = weights.frequencies.copy()
        self._angles = turned(self._frequencies, FIRST_POSITIONS)

    def last_hidden(
        self,
        embeds: Floats,
        positions: Floats,
        steps: NDArray[np.int64],
        prefixes: Sequence[Floats],
        prefix_steps: NDArray[np.int64],
        threads: int,
    ) -> Floats:
        """Normalised hidden state (R, D) of each row's last token.

        Args:
            embeds: (R, S, D), padded on the right.
            positions: (3, R, S), whole numbers from 0 on.
            steps: (R,) how many of the S tokens are real, at least one.
            prefixes: keys and values (L, 2, H, T, d) of each row's prefix, or of the one that all
                rows share; T may differ.
            prefix_steps: (len(prefixes),) how many of its T tokens a prefix begins with count.
            threads: among which rows are shared.

        Raises:
            ValueError: shapes do not agree.
        """
        rows = len(embeds)
        places, angles = self._checked_rows(embeds, positions, steps)
        if len(prefixes) not in (1, rows) or len(prefixes) != len(prefix_steps):
            raise ValueError(f"{len(prefixes)} prefixes do not fit {rows} rows")
        for prefix, length in zip(prefixes, prefix_steps, strict=True):
            self._check_before(prefix, length)
        out = np.empty((rows, self.shape.width), np.float32)
        if rows:
            self._native.run(
                np.ascontiguousarray(embeds),
                places,
                steps,
                [np.ascontiguousarray(prefix) for prefix in prefixes],
                prefix_steps,
                *angles,
                threads,
                out,
            )
        return out

    def keys_and_values(
        self, embeds: Floats, positions: Floats, steps: NDArray[np.int64], threads: int
    ) -> list[Floats]:
        """What rows leave for those that continue them: (L, 2, H, steps, d) of each.

        Arguments are those of `last_hidden`, without any prefix; of the last layer nothing but
        the keys and values is computed.

        Raises:
            ValueError: shapes do not agree.
        """
        s = self.shape
        places, angles = self._checked_rows(embeds, positions, steps)
        kept = [
            np.empty((self.layer_count, 2, s.kv_heads, count, s.head_width), np.float32)
            for count in steps.tolist()
        ]
        if kept:
            self._native.read(
                np.ascontiguousarray(embeds),
                places,
                steps,
                *angles,
                threads,
                kept,
            )
        return kept

    def step(
        self,
        embeds: Floats,
        positions: Floats,
        prefix: tuple[Floats, int],
        past: tuple[Floats, int],
        threads: int,
    ) -> tuple[Floats, Floats]:
        """Read one row behind a prefix and what was written after it.

        Args:
            embeds: (S, D).
            positions: (3, S), whole numbers from 0 on.
            prefix, past: keys and values (L, 2, H, T, d), and how many of the T tokens count.
            threads: among which the row's products and heads are shared.

        Returns:
            Normalised hidden states (S, D), and the row's keys and values (L, 2, H, S, d).

        Raises:
            ValueError: shapes do not agree.
        """
        s, count = self.shape, len(embeds)
        steps = np.array([count])
        places, angles = self._checked_rows(embeds[None], positions[:, None], steps)
        for before in (prefix, past):
            self._check_before(*before)
        hidden = np.empty((count, s.width), np.float32)
        kept = np.empty((self.layer_count, 2, s.kv_heads, count, s.head_width), np.float32)
        self._native.step(
            np.ascontiguousarray(embeds[None]),
            places,
            steps,
            np.ascontiguousarray(prefix[0]),
            prefix[1],
            np.ascontiguousarray(past[0]),
            past[1],
            *angles,
            threads,
            hidden,
            kept,
        )
        return hidden, kept

    def _check_before(self, array: Floats, length: int) -> None:
        s, capacity = self.shape, array.shape[3]
        checked(array, (self.layer_count, 2, s.kv_heads, capacity, s.head_width))
        if not 0 <= length <= capacity:
            raise ValueError(f"a prefix of {capacity} tokens has no {length}")

    def _checked_rows(
        self, embeds: Floats, positions: Floats, steps: NDArray[np.int64]
    ) -> tuple[NDArray[np.int32], tuple[Floats, Floats]]:
        """Whole positions of rows whose shapes agree, with tables of angles that hold all of them.

        Threads share the tables: they are replaced both at once, and used as they were got.
        """
        rows, longest = embeds.shape[:2]
        checked(embeds, (rows, longest, self.shape.width))
        checked(positions, (3, rows, longest))
        if len(steps) != rows or not ((steps >= 1) & (steps <= longest)).all():
            raise ValueError(f"rows of {longest} tokens cannot have {steps}")
        places = positions.astype(np.int32, order="C")
        if places.min(initial=0) < 0:
            raise ValueError("positions begin at 0")
        angles = self._angles
        if (farthest := int(places.max(initial=0))) >= len(angles[0]):
            self._angles = angles = turned(self._frequencies, 2 * farthest)
        return places, angles


class Projection:
    """A linear layer by itself, of floats that are not rounded: what makes logits.

    Args:
        linear: in floats, or in bytes with steps of blocks; else ValueError.
        kernel: one of `KERNELS`; all of them multiply it with floats as they are.
    """

    def __init__(self, linear: Linear, kernel: str = FASTEST) -> None:
        if linear.scale is not None and linear.scale.ndim != 2:
            raise ValueError("the input of a layer by itself is not rounded")
        self.inputs, self.outputs = checked_blocks(linear).weight.shape
        self._kernel = kernel
        self._stored = _decoder.StoredLinear(*linear.packed(KERNELS[kernel]))

    def of(self, rows: Floats, threads: int) -> Floats:
        """Multiply rows (R, inputs): (R, outputs), each the same in any company."""
        checked(rows, (len(rows), self.inputs))
        whole = -(-self.outputs // PANEL) * PANEL
        out = np.empty((len(rows), whole), np.float32)
        _decoder.multiply(self._kernel, self._stored, np.ascontiguousarray(rows), threads, out)
        return out[:, : self.outputs]


def checked_blocks(linear: Linear) -> Linear:
    """Give a layer whose inputs make whole blocks, if it has steps of them; else ValueError."""
    if linear.scale is not None:
        inputs, outputs = linear.weight.shape
        if inputs % BLOCK:
            raise ValueError(f"{inputs} inputs are no whole blocks of {BLOCK}")
        checked(linear.scale, (inputs // BLOCK, outputs))
    return linear


def turned(frequencies: Floats, positions: int) -> tuple[Floats, Floats]:
    """Cosines and sines of the first positions, (positions, d / 2) each."""
    place = np.arange(positions, dtype=np.float32)[:, None]
    angles = place * frequencies.sum(axis=0)
    return np.cos(angles), np.sin(angles)


def as_read(linears: Mapping[str, Linear]) -> list[Linear]:
    """A layer's linears as the kernel reads them: gate and up are one, in turns."""
    gate_up = linears["gate_proj"].beside(linears["up_proj"])
    return [*(linears[name] for name in LAYER_LINEARS[:4]), gate_up, linears["down_proj"]]


def require_one_range(readers: Sequence[Linear]) -> None:
    """Refuse, as a ValueError, layers that round the same input to bytes in different ways."""
    ranges = {(each.input_scale, each.input_zero) for each in readers if each.scale is not None}
    if len(ranges) > 1:
        raise ValueError(f"layers round the same input by {sorted(ranges)}")


def checked(array: NDArray[Number], shape: tuple[int, ...]) -> NDArray[Number]:
    """Give an array of that shape; ValueError if it has another."""
    if array.shape != shape:
        raise ValueError(f"an array of shape {array.shape} should have {shape}")
    return array
