"""The fused decoder against its naive twin, and alone against in company."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from meiqa.kernels.decoder import (
    BLOCK,
    FASTEST_IN_BF16,
    KERNELS,
    LAYER_LINEARS,
    OF_EACH_ROW,
    FusedDecoder,
    FusedShape,
    FusedWeights,
    Linear,
    Projection,
    bf16,
)
from tests.kernels import naive_decoder

Floats = NDArray[np.float32]
SHAPE = FusedShape(width=64, inner=80, heads=4, kv_heads=2, head_width=32, epsilon=1e-6)
NARROW = FusedShape(width=32, inner=16, heads=1, kv_heads=1, head_width=32, epsilon=1e-5)
WIDE = FusedShape(width=96, inner=208, heads=6, kv_heads=2, head_width=64, epsilon=1e-6)
SHARED = FusedShape(width=384, inner=1024, heads=6, kv_heads=2, head_width=64, epsilon=1e-6)
"""Large enough for threads to share a single token."""
LAYERS, PLACES = 3, 40
LEFT_IN_FLOATS = "k_proj", "gate_proj", "up_proj"
Drawn = Callable[..., FusedDecoder]


@dataclass(frozen=True)
class Rows:
    """Rows of different lengths, each with a prefix of its own length."""

    embeds: Floats
    positions: Floats
    steps: NDArray[np.int64]
    prefixes: list[Floats]
    lengths: NDArray[np.int64]

    def run(self, decoder: FusedDecoder, threads: int = 1) -> Floats:
        return decoder.last_hidden(
            self.embeds, self.positions, self.steps, self.prefixes, self.lengths, threads
        )

    def twins(self, weights: FusedWeights, *, in_bf16: bool = False) -> NDArray[np.float64]:
        wanted = []
        for row, steps in enumerate(self.steps):
            prefix = self.prefixes[row if len(self.prefixes) > 1 else 0]
            length = self.lengths[row if len(self.lengths) > 1 else 0]
            wanted.append(
                naive_decoder.last_hidden(
                    weights,
                    self.embeds[row, :steps],
                    self.positions[:, row, :steps],
                    prefix[:, :, :, :length],
                    in_bf16=in_bf16,
                )
            )
        return np.stack(wanted)

    def only(self, row: int) -> Rows:
        own = row if len(self.prefixes) > 1 else 0
        return Rows(
            self.embeds[row : row + 1],
            self.positions[:, row : row + 1],
            self.steps[row : row + 1],
            [self.prefixes[own]],
            self.lengths[own : own + 1],
        )


def drawn_weights(shape: FusedShape, precision: str) -> FusedWeights:
    rng = np.random.default_rng(0)
    queries, keys = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
    extents = {
        "q_proj": (shape.width, queries),
        "k_proj": (shape.width, keys),
        "v_proj": (shape.width, keys),
        "o_proj": (queries, shape.width),
        "gate_proj": (shape.width, shape.inner),
        "up_proj": (shape.width, shape.inner),
        "down_proj": (shape.inner, shape.width),
    }
    half = shape.head_width // 2
    owners = rng.integers(0, 3, half)
    frequencies = np.zeros((3, half), np.float32)
    frequencies[owners, np.arange(half)] = 100.0 ** (-np.arange(half) / half)

    def normal(*extent: int) -> Floats:
        return rng.standard_normal(extent, np.float32)

    def linear(name: str) -> Linear:
        weight = normal(*extents[name]) / np.float32(extents[name][0] ** 0.5)
        exact = Linear(weight, 0.3 * normal(weight.shape[1]))
        in_floats = precision == "fp32" or (precision == "mixed" and name in LEFT_IN_FLOATS)
        own = precision == "rows" or (precision == "down by rows" and name == "down_proj")
        return exact if in_floats else rounded(exact, OF_EACH_ROW if own else 0.06, 77)

    return FusedWeights(
        shape,
        frequencies,
        normal(shape.width),
        [(1 + 0.2 * normal(shape.width), 1 + 0.2 * normal(shape.width)) for _ in range(LAYERS)],
        [{name: linear(name) for name in LAYER_LINEARS} for _ in range(LAYERS)],
    )


def drawn_decoder(kernel: str, shape: FusedShape, precision: str) -> FusedDecoder:
    return FusedDecoder(drawn_weights(shape, precision), kernel)


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest) -> str:
    """Each kernel that runs here."""
    name: str = request.param
    return name


@pytest.fixture
def drawn(kernel: str) -> Drawn:
    """Draw decoders for each kernel that runs here."""
    return partial(drawn_decoder, kernel)


@pytest.fixture(params=[name for name, packing in KERNELS.items() if not packing.in_bf16])
def exactly(request: pytest.FixtureRequest) -> Drawn:
    """Draw decoders for each kernel that multiplies floats as they are."""
    return partial(drawn_decoder, request.param)


def rounded(linear: Linear, input_scale: float, input_zero: int) -> Linear:
    scale = (np.abs(linear.weight).max(axis=0) / 127).astype(np.float32)
    codes = np.rint(linear.weight / scale).astype(np.int8)
    return Linear(codes, linear.bias, scale, input_scale, input_zero)


def drawn_head(inputs: int, outputs: int) -> Linear:
    """Draw a layer of bytes whose blocks have steps of their own."""
    rng = np.random.default_rng(outputs)
    codes = rng.integers(-127, 128, (inputs, outputs)).astype(np.int8)
    steps = rng.uniform(1e-3, 1e-2, (inputs // BLOCK, outputs)).astype(np.float32)
    return Linear(codes, rng.standard_normal(outputs, np.float32), steps)


def halved(linear: Linear) -> Linear:
    """Store the weight of a layer in half precision."""
    return Linear(linear.weight.astype(np.float16), linear.bias)


def drawn_rows(shape: FusedShape, steps: list[int], lengths: list[int], seed: int = 0) -> Rows:
    rng = np.random.default_rng(seed)
    count, most = len(steps), max(steps)

    def prefix(length: int) -> Floats:
        spare = int(rng.integers(0, 3))
        extents = (LAYERS, 2, shape.kv_heads, length + spare, shape.head_width)
        return rng.standard_normal(extents, np.float32)

    return Rows(
        rng.standard_normal((count, most, shape.width), np.float32),
        rng.integers(0, PLACES, (3, count, most)).astype(np.float32),
        np.array(steps),
        [prefix(length) for length in lengths],
        np.array(lengths),
    )


@pytest.mark.parametrize("shape", [SHAPE, NARROW, WIDE])
@pytest.mark.parametrize(
    ("steps", "lengths"),
    [([1], [0]), ([1], [1]), ([3, 14, 15, 7], [33]), ([31, 1, 29], [0, 16, 47]), ([97], [3])],
)
def test_agrees_with_the_naive_twin(
    shape: FusedShape, steps: list[int], lengths: list[int], exactly: Drawn
) -> None:
    rows = drawn_rows(shape, steps, lengths)
    wanted = rows.twins(drawn_weights(shape, "fp32"))
    np.testing.assert_allclose(rows.run(exactly(shape, "fp32")), wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", [SHAPE, WIDE])
def test_halves_are_multiplied_as_the_floats_that_they_are(shape: FusedShape, kernel: str) -> None:
    exact = drawn_weights(shape, "fp32")
    halves = [{name: halved(linear) for name, linear in own.items()} for own in exact.layers]
    floats = [
        {n: Linear(w.weight.astype(np.float32), w.bias) for n, w in own.items()} for own in halves
    ]
    rows = drawn_rows(shape, [9, 20, 1, 14], [33])
    made, wanted = (
        rows.run(FusedDecoder(replace(exact, layers=layers), kernel)) for layers in (halves, floats)
    )
    np.testing.assert_array_equal(made, wanted)


@pytest.mark.parametrize("precision", ["int8", "mixed", "rows", "down by rows"])
@pytest.mark.parametrize("shape", [SHAPE, WIDE])
def test_bytes_agree_with_the_naive_twin(shape: FusedShape, precision: str, exactly: Drawn) -> None:
    twin = drawn_weights(shape, precision)
    rows = drawn_rows(shape, [9, 20, 1, 14], [33])
    found, wanted = rows.run(exactly(shape, precision)), rows.twins(twin)
    # Now and then a value lies so near the middle of two steps that it falls on the other one.
    difference = np.abs(found - wanted)
    assert np.median(difference) < 1e-3
    assert difference.max() < 0.15
    exact = rows.twins(drawn_weights(shape, "fp32"))
    assert np.median(np.abs(wanted - exact)) > 10 * np.median(difference)


@pytest.mark.skipif(not KERNELS[FASTEST_IN_BF16].in_bf16, reason="no kernel here has bf16")
@pytest.mark.parametrize("precision", ["fp32", "int8", "mixed", "rows"])
@pytest.mark.parametrize("shape", [SHAPE, NARROW, WIDE])
def test_products_in_bf16_agree_with_a_twin_that_rounds_both_factors(
    shape: FusedShape, precision: str
) -> None:
    weights = drawn_weights(shape, precision)
    rows = drawn_rows(shape, [9, 20, 1, 14], [33])
    found = rows.run(drawn_decoder(FASTEST_IN_BF16, shape, precision))
    rounded_twin = rows.twins(weights, in_bf16=True)
    difference, lost = np.abs(found - rounded_twin), np.abs(rows.twins(weights) - rounded_twin)
    # As bytes, a factor may lie so near the middle that it is rounded to the other side.
    assert np.median(difference) < 1e-3 * lost.mean()
    assert difference.max() < 0.5 * lost.max()


def test_floats_are_rounded_to_the_nearest_bf16_and_of_two_to_the_even_one() -> None:
    last = 2.0**-7
    given = np.array([1.0, 1 + 0.4 * last, 1 + 0.5 * last, 1 + 1.5 * last, -(1 + 0.6 * last)])
    wanted = np.array([1.0, 1.0, 1.0, 1 + 2 * last, -(1 + last)], np.float32)
    found = bf16(given.astype(np.float32))
    np.testing.assert_array_equal(found.astype(np.uint32) << 16, wanted.view(np.uint32))
    no_numbers = np.array([0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF], np.uint32)
    kept = bf16(no_numbers.view(np.float32)).astype(np.uint32) << 16
    assert np.isnan(kept.view(np.float32)).all()


@pytest.mark.parametrize("zero", [0, 77, 255])
def test_sums_of_bytes_are_those_of_whole_numbers(zero: int, kernel: str) -> None:
    """Also where sixteen bits, or a float's twenty-four, could not hold them."""
    shape = FusedShape(width=640, inner=16, heads=1, kv_heads=1, head_width=32, epsilon=0)
    rng = np.random.default_rng(zero)
    weight = rng.integers(-128, 128, (shape.width, 32)).astype(np.int8)
    weight[:, :2] = 127, -128
    by = np.full(32, 0.25, np.float32)
    value = Linear(weight, np.zeros(32, np.float32), by, 0.5, zero)
    weights = drawn_weights(shape, "fp32")
    # Inputs of ones have norm one: what is rounded is the norm's weight, with the input's sign.
    gains = rng.integers(-300, 300, shape.width).astype(np.float32)
    gains[: shape.width // 2] = 300
    readers = {**weights.layers[0], "v_proj": value}
    alone = FusedDecoder(replace(weights, layers=[readers], norms=[(gains, gains)]), kernel)
    rows = drawn_rows(shape, [7, 1], [0, 0])
    signs = np.where(rows.embeds < 0, np.float32(-1), np.float32(1))
    signs[0, 0] = 1
    made = alone.keys_and_values(signs, rows.positions, rows.steps, 1)
    for row, count in enumerate(rows.steps):
        codes = np.clip(2 * signs[row, :count] * gains + zero, 0, 255).astype(np.int64) - zero
        wanted = (codes @ weight.astype(np.int64)).astype(np.float32) * np.float32(0.125)
        np.testing.assert_array_equal(made[row][0, 1, 0], wanted)


@pytest.mark.parametrize("precision", ["fp32", "int8", "mixed", "rows", "down by rows"])
def test_kernels_that_fuse_products_with_sums_give_the_same_bits(precision: str) -> None:
    rows = drawn_rows(WIDE, [9, 20, 1, 14], [33])
    exact = [name for name, packing in KERNELS.items() if not packing.in_bf16]
    fuse = [kernel for kernel in exact if kernel != "portable"]
    found = [rows.run(drawn_decoder(kernel, WIDE, precision)) for kernel in fuse]
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])


@pytest.mark.parametrize("precision", ["fp32", "int8", "rows"])
@pytest.mark.parametrize("lengths", [[21], [21, 0, 40, 5, 5, 33, 8]])
def test_a_row_is_the_same_alone_and_in_any_company(
    precision: str, lengths: list[int], drawn: Drawn
) -> None:
    decoder = drawn(SHAPE, precision)
    rows = drawn_rows(SHAPE, [9, 20, 1, 14, 30, 2, 16], lengths)
    together = rows.run(decoder)
    for threads in (2, 3, 16):
        np.testing.assert_array_equal(rows.run(decoder, threads), together)
    for row in range(7):
        np.testing.assert_array_equal(rows.only(row).run(decoder)[0], together[row])


@pytest.mark.parametrize("loudest", [1e-38, 1.0, 3e4])
def test_rows_that_are_rounded_by_themselves_lose_nothing_to_loud_ones(
    loudest: float, drawn: Drawn
) -> None:
    """A token whose values are a thousand times as large as another's leaves the other its bits."""
    decoder = drawn(SHAPE, "rows")
    rows = drawn_rows(SHAPE, [6, 6], [4])
    sound = rows.run(decoder)
    rows.embeds[1] *= np.float32(loudest)
    found = rows.run(decoder)
    np.testing.assert_array_equal(found[0], sound[0])
    wanted = rows.twins(drawn_weights(SHAPE, "rows"))
    np.testing.assert_allclose(found[1], wanted[1], atol=0.2, rtol=0)


def test_positions_beyond_the_first_table(exactly: Drawn) -> None:
    decoder = exactly(SHAPE, "fp32")
    rows = drawn_rows(SHAPE, [5], [4])
    far = replace(rows, positions=rows.positions + 700)
    wanted = far.twins(drawn_weights(SHAPE, "fp32"))
    np.testing.assert_allclose(far.run(decoder), wanted, atol=1e-3, rtol=0)
    assert np.abs(far.run(decoder) - rows.run(decoder)).max() > 1e-2


def test_no_rows_no_states(drawn: Drawn) -> None:
    rows = drawn_rows(SHAPE, [2], [3])
    none = replace(
        rows, embeds=rows.embeds[:0], positions=rows.positions[:, :0], steps=rows.steps[:0]
    )
    assert none.run(drawn(SHAPE, "fp32")).shape == (0, SHAPE.width)


def test_what_is_not_a_number_stays_in_its_row(drawn: Drawn) -> None:
    decoder = drawn(SHAPE, "fp32")
    rows = drawn_rows(SHAPE, [4, 4, 4], [6])
    sound = rows.run(decoder)
    rows.embeds[1, 2] = np.nan
    found = rows.run(decoder)
    np.testing.assert_array_equal(found[[0, 2]], sound[[0, 2]])
    assert np.isnan(found[1]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": np.array([0, 2])}, "cannot have"),
        ({"steps": np.array([1, 9])}, "cannot have"),
        ({"lengths": np.array([99])}, "has no 99"),
        ({"prefixes": []}, "do not fit 2 rows"),
        ({"positions": -np.ones((3, 2, 4), np.float32)}, "begin at 0"),
        ({"embeds": np.zeros((2, 4, 48), np.float32)}, "should have"),
    ],
)
def test_what_does_not_fit_is_refused(
    change: dict[str, object], message: str, drawn: Drawn
) -> None:
    rows = replace(drawn_rows(SHAPE, [4, 2], [3]), **change)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        rows.run(drawn(SHAPE, "fp32"))


@pytest.mark.parametrize("name", ["gate_proj", "up_proj"])
def test_one_input_in_two_forms_is_refused(name: str) -> None:
    drawn = drawn_weights(SHAPE, "int8")
    layers = [{**drawn.layers[0], name: drawn.layers[0][name].in_floats()}, *drawn.layers[1:]]
    with pytest.raises(ValueError, match="both round it, or none"):
        replace(drawn, layers=layers)


def test_a_shape_without_panels_is_refused(drawn: Drawn) -> None:
    assert not replace(SHAPE, head_width=24).fits
    with pytest.raises(ValueError, match="no panels"):
        drawn(replace(SHAPE, head_width=24), "fp32")


@pytest.mark.parametrize("shape", [SHAPE, NARROW, WIDE])
@pytest.mark.parametrize("steps", [[1], [3, 14, 15], [97]])
def test_what_is_read_agrees_with_the_naive_twin(
    shape: FusedShape, steps: list[int], exactly: Drawn
) -> None:
    decoder, weights = exactly(shape, "fp32"), drawn_weights(shape, "fp32")
    rows = drawn_rows(shape, steps, [0] * len(steps))
    found = decoder.keys_and_values(rows.embeds, rows.positions, rows.steps, 2)
    nothing = np.zeros((LAYERS, 2, shape.kv_heads, 0, shape.head_width), np.float32)
    for row, (count, made) in enumerate(zip(steps, found, strict=True)):
        wanted: list[NDArray[np.float64]] = []
        place = rows.positions[:, row, :count]
        naive_decoder.last_hidden(weights, rows.embeds[row, :count], place, nothing, wanted)
        np.testing.assert_allclose(made, np.stack(wanted), atol=1e-4, rtol=0)


@pytest.mark.parametrize("precision", ["fp32", "int8", "mixed"])
def test_a_prefix_that_was_read_is_continued_as_if_it_stood_there(
    precision: str, drawn: Drawn
) -> None:
    decoder = drawn(SHAPE, precision)
    whole = drawn_rows(SHAPE, [40], [0])
    first = np.array([23])
    prefixes = decoder.keys_and_values(whole.embeds[:, :23], whole.positions[:, :, :23], first, 1)
    rest = Rows(whole.embeds[:, 23:], whole.positions[:, :, 23:], np.array([17]), prefixes, first)
    np.testing.assert_allclose(rest.run(decoder), whole.run(decoder), atol=1e-5, rtol=0)


def test_nothing_is_read_of_no_rows(drawn: Drawn) -> None:
    decoder = drawn(SHAPE, "fp32")
    rows = drawn_rows(SHAPE, [3], [0])
    nothing = decoder.keys_and_values(rows.embeds[:0], rows.positions[:, :0], rows.steps[:0], 1)
    assert nothing == []


@pytest.mark.parametrize("threads", [2, 3])
def test_many_callers_at_once_get_their_own_answers(threads: int, drawn: Drawn) -> None:
    decoder = drawn(SHAPE, "int8")
    rows = drawn_rows(SHAPE, [9, 20, 31, 4, 17], [5, 0, 40, 12, 3])
    wanted = rows.run(decoder, 1)
    with ThreadPoolExecutor(4) as callers:
        found = list(callers.map(lambda _: rows.run(decoder, threads), range(40)))
    for answer in found:
        np.testing.assert_array_equal(answer, wanted)


@pytest.mark.parametrize("precision", ["fp32", "down by rows"])
@pytest.mark.parametrize("steps", [[1], [37, 15], [250, 350]])
def test_threads_that_share_a_row_change_no_bit(
    precision: str, steps: list[int], drawn: Drawn
) -> None:
    decoder = drawn(SHARED, precision)
    rows = drawn_rows(SHARED, steps, [21])
    alone = rows.run(decoder)
    read = decoder.keys_and_values(rows.embeds, rows.positions, rows.steps, 1)
    for threads in (3, 8):
        np.testing.assert_array_equal(rows.run(decoder, threads), alone)
        shared = decoder.keys_and_values(rows.embeds, rows.positions, rows.steps, threads)
        for one, other in zip(read, shared, strict=True):
            np.testing.assert_array_equal(other, one)


@pytest.mark.parametrize("precision", ["fp32", "int8", "down by rows"])
@pytest.mark.parametrize(("tokens", "before", "written"), [(1, 23, 16), (5, 23, 12), (9, 0, 31)])
def test_what_is_written_continues_prefix_and_past(
    precision: str, tokens: int, before: int, written: int, drawn: Drawn
) -> None:
    decoder = drawn(SHARED, precision)
    whole = drawn_rows(SHARED, [40], [0])
    (own,) = decoder.keys_and_values(whole.embeds, whole.positions, whole.steps, 1)
    behind = before + written
    prefix, past = own[:, :, :, :before], np.full_like(own, np.nan)
    past[:, :, :, :written] = own[:, :, :, before:behind]
    row = slice(behind, behind + tokens)
    given = whole.embeds[0, row], whole.positions[:, 0, row], (prefix, before), (past, written)
    hidden, kept = decoder.step(*given, 1)
    np.testing.assert_allclose(kept, own[:, :, :, row], atol=1e-5, rtol=0)
    for count in range(tokens):
        rows = Rows(
            whole.embeds[:, row][:, : count + 1],
            whole.positions[:, :, row][:, :, : count + 1],
            np.array([count + 1]),
            [own],
            np.array([behind]),
        )
        np.testing.assert_array_equal(hidden[count], rows.run(decoder)[0])
    for threads in (2, 3, 8):
        for one, other in zip((hidden, kept), decoder.step(*given, threads), strict=True):
            np.testing.assert_array_equal(other, one)
    by_columns = (given[0], np.asfortranarray(given[1]), *given[2:])
    np.testing.assert_array_equal(decoder.step(*by_columns, 1)[0], hidden)


def test_a_past_that_is_shorter_than_it_says_is_refused(drawn: Drawn) -> None:
    decoder = drawn(SHAPE, "fp32")
    rows = drawn_rows(SHAPE, [2], [3])
    (prefix,) = rows.prefixes
    with pytest.raises(ValueError, match="has no 99"):
        decoder.step(rows.embeds[0], rows.positions[:, 0], (prefix, 3), (prefix, 99), 1)


@pytest.mark.parametrize("outputs", [1, 97, 320])
@pytest.mark.parametrize("count", [0, 1, 15])
@pytest.mark.parametrize("stored", ["bytes", "halves"])
def test_a_layer_of_few_bits_is_that_of_its_floats(
    outputs: int, count: int, stored: str, kernel: str
) -> None:
    head = drawn_head(96, outputs)
    if stored == "halves":
        head = halved(head.in_floats())
    rows = np.random.default_rng(count).standard_normal((count, 96), np.float32)
    made = Projection(head, kernel).of(rows, 1)
    exact = (
        head.in_floats() if stored == "bytes" else Linear(head.weight.astype(np.float32), head.bias)
    )
    np.testing.assert_array_equal(made, Projection(exact, kernel).of(rows, 1))
    wanted = rows.astype(np.float64) @ exact.weight + exact.bias
    np.testing.assert_allclose(made, wanted, atol=1e-4, rtol=0)
    for threads in (2, 5):
        np.testing.assert_array_equal(Projection(head, kernel).of(rows, threads), made)
    for row in range(count):
        alone = Projection(head, kernel).of(rows[row : row + 1], 3)
        np.testing.assert_array_equal(alone[0], made[row])


def test_projections_that_do_not_fit_are_refused() -> None:
    head = drawn_head(96, 5)
    with pytest.raises(ValueError, match="whole blocks"):
        Projection(replace(head, weight=head.weight[:80]))
    with pytest.raises(ValueError, match="should have"):
        Projection(head).of(np.zeros((2, 64), np.float32), 1)
    with pytest.raises(ValueError, match="not rounded"):
        Projection(rounded(head.in_floats(), 0.1, 3))


def test_threads_without_memory_are_an_error_and_work_again_afterwards() -> None:
    run = [sys.executable, "-m", "tests.kernels.no_memory"]
    said = subprocess.run(run, check=True, capture_output=True, text=True, timeout=120).stdout
    assert said.split() == ["MemoryError", "MemoryError", "MemoryError", "same"]


@pytest.mark.parametrize(
    ("weight", "scaled"),
    [
        (np.ones((64, 32)), False),
        (np.ones((64, 32), np.int8), False),
        (np.ones((64, 32), ">f4"), False),
        (np.ones((64, 32), np.uint8), True),
        (np.ones((64, 32), np.float32), True),
    ],
)
def test_weights_of_other_types_are_refused(weight: NDArray[Any], scaled: bool) -> None:
    bias, scale = np.zeros(32, np.float32), np.ones((64 // BLOCK, 32), np.float32)
    with pytest.raises(ValueError, match=f"a weight of {weight.dtype} should be"):
        Projection(Linear(weight, bias, scale if scaled else None))
