"""The decoder seam: what rows give over prefixes, through the graph and through the kernel."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from meiqa.engine.package import EnginePackage
from meiqa.engine.runtime import open_graphs, open_runtime
from meiqa.engine.runtime.decoder import (
    ROWS_PER_CALL,
    Array,
    Decoder,
    Floats,
    GraphDecoder,
    GraphSession,
    KeyValues,
    NativeDecoder,
    Past,
    Row,
)
from meiqa.engine.runtime.onnx import OnnxSession
from meiqa.errors import AnswerNotFinite
from meiqa.locations import embedded_assets

TOLERANCE = 1e-4
LENGTHS = (5, 1, 9, 3, 7, 2, 4, 6, 8, 5, 3)


class Overheard:
    """A session that keeps the inputs of its calls."""

    def __init__(self, session: GraphSession) -> None:
        self.session = session
        self.calls: list[Mapping[str, Array]] = []

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Floats]:
        """Execute the graph."""
        self.calls.append(inputs)
        return self.session.run(inputs)


@pytest.fixture(scope="module")
def session(package: EnginePackage) -> Overheard:
    graph = package.manifest.graphs["decoder"]
    return Overheard(OnnxSession(package.path, graph, "cpu", 1))


@pytest.fixture
def decoder(session: Overheard, package: EnginePackage) -> GraphDecoder:
    session.calls.clear()
    return GraphDecoder(session, package.manifest.decoder)


def some_row(package: EnginePackage, seed: int, length: int, start: int = 0) -> Row:
    """Random tokens from a position on."""
    ids = np.random.default_rng(seed).integers(package.manifest.decoder.vocab_size, size=length)
    positions = np.tile(np.arange(start, start + length, dtype=np.float32), (3, 1))
    return Row(package.embedding[ids].astype(np.float32), positions)


def joined(*rows: Row) -> Row:
    """One row of the tokens of several."""
    return Row(
        np.concatenate([row.embeds for row in rows]),
        np.concatenate([row.positions for row in rows], axis=1),
    )


def alone(decoder: Decoder, row: Row) -> Floats:
    """Logits behind a row that continues nothing."""
    (read,) = decoder.prefill([row.behind(0)])
    return decoder.last_logits([row], [read.first(0)])[0]


@pytest.fixture
def firsts(package: EnginePackage) -> list[Row]:
    return [some_row(package, seed, length) for seed, length in enumerate(LENGTHS)]


@pytest.fixture
def seconds(package: EnginePackage, firsts: list[Row]) -> list[Row]:
    return [
        some_row(package, 100 + seed, length, len(first.embeds))
        for seed, (first, length) in enumerate(zip(firsts, reversed(LENGTHS), strict=True))
    ]


def test_rows_over_a_prefix_each_are_the_whole_rows(
    package: EnginePackage,
    decoder: GraphDecoder,
    firsts: list[Row],
    seconds: list[Row],
    session: Overheard,
) -> None:
    prefixes = decoder.prefill(firsts)
    assert [prefix.length for prefix in prefixes] == list(LENGTHS)
    session.calls.clear()
    found = decoder.last_logits(seconds, prefixes)
    assert found.shape == (len(LENGTHS), len(package.embedding))
    assert [len(call["embeds"]) for call in session.calls] == [ROWS_PER_CALL, 3]
    for logits, first, second in zip(found, firsts, seconds, strict=True):
        np.testing.assert_allclose(logits, alone(decoder, joined(first, second)), atol=TOLERANCE)


def test_rows_over_one_prefix_read_it_where_it_lies(
    decoder: GraphDecoder, firsts: list[Row], package: EnginePackage, session: Overheard
) -> None:
    (prefix,) = decoder.prefill(firsts[:1])
    rows = [some_row(package, seed, length, LENGTHS[0]) for seed, length in enumerate(LENGTHS)]
    session.calls.clear()
    found = decoder.last_logits(rows, [prefix])
    assert all(np.shares_memory(call["prefix"], prefix.array) for call in session.calls)
    for logits, row in zip(found, rows, strict=True):
        np.testing.assert_allclose(logits, alone(decoder, joined(firsts[0], row)), atol=TOLERANCE)


def test_what_lies_behind_a_prefixs_length_is_masked(
    decoder: GraphDecoder, firsts: list[Row], package: EnginePackage
) -> None:
    ahead = package.embedding[[3, 4]].astype(np.float32)
    row = firsts[2]
    (short,) = decoder.prefill([row])
    (long,) = decoder.prefill([row.followed_by(ahead)])
    np.testing.assert_allclose(long.array[..., : short.length, :], short.array, atol=TOLERANCE)
    question = some_row(package, 5, 4, short.length)
    wanted = decoder.last_logits([question], [short])
    found = decoder.last_logits([question], [long.first(short.length)])
    np.testing.assert_allclose(found, wanted, atol=TOLERANCE)
    paired = decoder.last_logits([question] * 2, [long.first(short.length), short])
    np.testing.assert_allclose(paired, np.repeat(wanted, 2, axis=0), atol=TOLERANCE)


def test_reading_ahead_or_not_gives_the_same_answers(
    decoder: GraphDecoder, firsts: list[Row], package: EnginePackage
) -> None:
    ahead = package.embedding[[3, 4, 9]].astype(np.float32)
    kept = decoder.prefill(firsts, ahead)
    questions = [
        joined(row, some_row(package, seed, 2)).behind(len(row.embeds))
        for seed, row in enumerate(firsts)
    ]
    whole = [
        Row(np.concatenate([ahead, q.embeds]), _running(len(first.embeds), len(ahead) + 2))
        for first, q in zip(firsts, questions, strict=True)
    ]
    rest = [
        row.behind(prefix.length - len(first.embeds))
        for row, prefix, first in zip(whole, kept, firsts, strict=True)
    ]
    found = decoder.last_logits(rest, kept)
    for logits, first, row in zip(found, firsts, whole, strict=True):
        np.testing.assert_allclose(logits, alone(decoder, joined(first, row)), atol=TOLERANCE)


def _running(start: int, count: int) -> Floats:
    return np.tile(np.arange(start, start + count, dtype=np.float32), (3, 1))


def test_no_rows_no_answers(decoder: GraphDecoder, session: Overheard) -> None:
    assert decoder.prefill([]) == []
    assert decoder.last_logits([], []).shape[0] == 0
    assert session.calls == []


def test_a_prefix_is_read_only_and_keeps_no_neighbour_alive(
    decoder: GraphDecoder, firsts: list[Row]
) -> None:
    for prefix in decoder.prefill(firsts):
        assert not prefix.array.flags.writeable
        assert prefix.array.flags.c_contiguous
        assert prefix.array.base is None


def test_steps_are_the_whole_row_read_at_once(
    decoder: GraphDecoder, firsts: list[Row], package: EnginePackage, session: Overheard
) -> None:
    (prefix,) = decoder.prefill(firsts[:1])
    row = some_row(package, 77, 6, LENGTHS[0])
    layers, _, heads, _, width = prefix.array.shape
    past = KeyValues(np.zeros((layers, 2, heads, 8, width), np.float32), 0)
    whole = decoder.step(prefix, past, row, wanted=6)
    assert whole.logits.shape == (6, package.manifest.decoder.vocab_size)
    for index in range(6):
        token = Row(row.embeds[index : index + 1], row.positions[:, index : index + 1])
        made = decoder.step(prefix, past, token)
        np.testing.assert_allclose(made.logits[0], whole.logits[index], atol=TOLERANCE)
        np.testing.assert_allclose(made.hidden[0], whole.hidden[index], atol=TOLERANCE)
        past.array[..., past.length : past.length + 1, :] = made.key_values
        past = past.first(past.length + 1)
        # A device may keep what is read-only, and the past changes in place.
        assert session.calls[-1]["past"].flags.writeable
    np.testing.assert_allclose(past.array[..., :6, :], whole.key_values, atol=TOLERANCE)


@pytest.fixture(scope="module")
def both() -> tuple[EnginePackage, GraphDecoder, NativeDecoder]:
    """Give the embedded package with its decoder as graph and as native kernel."""
    package = EnginePackage.open(embedded_assets() / "package", verify=False)
    native = open_runtime(package, threads=2).decoder
    assert isinstance(native, NativeDecoder)
    (session,) = open_graphs(package, ["decoder"], "cpu", 2)
    return package, GraphDecoder(session, package.manifest.decoder), native


def test_the_kernel_answers_as_the_graph_does(
    both: tuple[EnginePackage, GraphDecoder, NativeDecoder],
) -> None:
    package, graph, native = both
    rows = [some_row(package, seed, length) for seed, length in enumerate(LENGTHS * 7)]
    seconds = [
        some_row(package, 200 + seed, 1 + seed % 5, len(row.embeds))
        for seed, row in enumerate(rows)
    ]
    wanted, found = graph.prefill(rows), native.prefill(rows)
    assert [kept.length for kept in found] == [kept.length for kept in wanted]
    scale = max(float(np.abs(kept.array).max()) for kept in wanted)
    for one, other in zip(wanted, found, strict=True):
        assert float(np.abs(one.array - other.array).mean()) < 5e-3 * scale
    for prefixes in (wanted, wanted[:1]):
        expected, made = (d.last_logits(seconds, prefixes) for d in (graph, native))
        assert made.shape == (len(rows), len(package.embedding))
        assert float(np.abs(made - expected).mean()) < 5e-3 * float(np.abs(expected).max())
    assert native.prefill([]) == []
    assert native.last_logits([], []).shape[0] == 0


@pytest.mark.parametrize("tokens", [1, 3, 17])
def test_the_kernel_writes_as_the_graph_does(
    both: tuple[EnginePackage, GraphDecoder, NativeDecoder], tokens: int
) -> None:
    package, graph, native = both
    (prefix,) = graph.prefill([some_row(package, 1, 9)])
    past = Past(prefix, 24)
    past.read(graph.step(prefix, past.key_values, some_row(package, 2, 5, 9)), 5, 0)
    row = some_row(package, 3, tokens, 14)
    wanted = min(2, tokens)
    expected, made = (d.step(prefix, past.key_values, row, wanted) for d in (graph, native))
    for name in ("logits", "hidden", "key_values"):
        one, other = getattr(expected, name), getattr(made, name)
        assert one.shape == other.shape
        assert float(np.abs(one - other).mean()) < 5e-3 * float(np.abs(one).max()), name


def test_the_kernel_reads_ahead_what_it_would_read_later(
    both: tuple[EnginePackage, GraphDecoder, NativeDecoder],
) -> None:
    package, _, native = both
    ahead = package.embedding[[3, 4, 9]].astype(np.float32)
    row, question = some_row(package, 1, 9), some_row(package, 2, 4, 12)
    (short,), (long,) = native.prefill([row]), native.prefill([row], ahead)
    assert long.length == short.length + 3
    assert not long.array.flags.writeable
    np.testing.assert_array_equal(long.array[..., : short.length, :], short.array)
    whole = Row(np.concatenate([ahead, question.embeds]), _running(9, 7))
    wanted = native.last_logits([whole], [short])
    np.testing.assert_array_equal(native.last_logits([whole.behind(3)], [long]), wanted)
    np.testing.assert_array_equal(native.last_logits([whole], [long.first(9)]), wanted)


def test_a_state_has_no_part() -> None:
    array, state = np.zeros((1, 2, 1, 5, 4), np.float32), np.ones((3, 7), np.float32)
    read = KeyValues(array, 5, state)
    assert read.first(5).state is state
    assert read.nbytes == array.nbytes + state.nbytes
    with pytest.raises(ValueError, match="a state behind 5 tokens has no part of 4"):
        read.first(4)
    assert KeyValues(array, 5).first(4).length == 4


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_overflows_is_refused(
    package: EnginePackage, session: Overheard, firsts: list[Row], value: float
) -> None:
    class Overflowing:
        """A session with one logit that is no number."""

        def run(self, inputs: Mapping[str, Array]) -> dict[str, Floats]:
            """Execute the graph."""
            made = session.run(inputs)
            made["logits"][..., -1] = value
            return made

    decoder = GraphDecoder(Overflowing(), package.manifest.decoder)
    with pytest.raises(AnswerNotFinite):
        decoder.prefill(firsts)
    with pytest.raises(AnswerNotFinite):
        alone(GraphDecoder(Overflowing(), package.manifest.decoder), firsts[0])
