"""What is noted of a graph's values is what NumPy says of all calls together."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from meiqa.export.calibration import (
    SAMPLED_ROWS,
    WRITING_EVERY,
    Observer,
    ObservingSession,
    observing,
)
from meiqa.export.graphs import save_graph
from meiqa.export.int8 import values_to_observe
from tests.export.small_graphs import Floats, convolution, linear, normal


def test_calls_add_up() -> None:
    calls = [normal(seed, 3 + seed, 5) for seed in range(4)]
    observer = Observer(5)
    for call in calls:
        observer.add(call)
    seen, together = observer.observed(), np.concatenate(calls)
    np.testing.assert_array_equal(seen.low, together.min(0))
    np.testing.assert_array_equal(seen.high, together.max(0))
    np.testing.assert_allclose(seen.square, np.square(together).mean(0), rtol=1e-6)
    assert seen.seen == len(together)
    np.testing.assert_array_equal(np.sort(seen.rows, 0), np.sort(together, 0))


def test_the_sample_is_drawn_from_all_calls_alike() -> None:
    observer = Observer(2)
    for call in range(8):
        observer.add(np.full((SAMPLED_ROWS, 2), call, np.float32))
    rows = observer.observed().rows
    assert rows.shape == (SAMPLED_ROWS, 2)
    counts = np.bincount(rows[:, 0].astype(int), minlength=8)
    assert counts.min() > SAMPLED_ROWS / 16


def test_dividing_channels_divides_everything_that_was_seen() -> None:
    values, scales = normal(0, 50, 5), np.array([1, 2, 4, 0.5, 10], np.float32)
    one, other = Observer(5), Observer(5)
    one.add(values)
    other.add(values / scales)
    divided, wanted = one.observed().divided(scales), other.observed()
    for field in ("low", "high", "square", "rows", "magnitude"):
        np.testing.assert_allclose(getattr(divided, field), getattr(wanted, field), rtol=1e-5)


def test_a_graph_is_observed_in_passing_and_left_as_it_was(tmp_path: Path) -> None:
    made = convolution(normal(0, 8, 3, 3, 3), normal(1, 8))
    save_graph(made, tmp_path / "graph.onnx")
    files = sorted(path.name for path in tmp_path.iterdir())
    x = normal(2, 1, 3, 9, 7)
    with observing(tmp_path / "graph.onnx", values_to_observe(made)) as session:
        outputs = session.run({"x": x})
        seen = session.observed()
    assert sorted(path.name for path in tmp_path.iterdir()) == files
    np.testing.assert_array_equal(seen["x"].high, x.max((0, 2, 3)))
    np.testing.assert_array_equal(seen["r"].high, -outputs["y"].min((0, 2, 3)))
    assert seen["r"].seen == 7 * 5


class Echo:
    """Gives back what it gets."""

    def run(self, inputs: dict[str, Floats]) -> dict[str, Floats]:
        return dict(inputs)


def test_of_calls_that_write_few_are_looked_at() -> None:
    session = ObservingSession(Echo(), {"embeds": -1})
    for _ in range(WRITING_EVERY + 1):
        session.run({"embeds": np.ones((1, 1, 1, 4), np.float32)})
    assert session.observed()["embeds"].seen == 2
    session.run({"embeds": np.ones((1, 2, 3, 4), np.float32)})
    assert session.observed()["embeds"].seen == 8


def test_a_linear_layer_without_a_call_has_nothing_observed(tmp_path: Path) -> None:
    made = linear(normal(0, 8, 8))
    save_graph(made, tmp_path / "graph.onnx")
    with observing(tmp_path / "graph.onnx", values_to_observe(made)) as session:
        assert session.observed() == {}
