"""What is observed, which layer gets which precision, and what the study keeps in float."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from meiqa.engine.local import LocalModel
from meiqa.engine.model import Model
from meiqa.engine.package import EnginePackage
from meiqa.engine.runtime.decoder import GraphDecoder, GraphSession
from meiqa.export.calibration import (
    IN_BLOCKS,
    SAMPLED_ROWS,
    WIDE,
    WRITING_EVERY,
    Assignment,
    Moves,
    Observer,
    ObservingSession,
    Quantisation,
    SensitivityStudy,
    groups_of,
    mean_move,
    observe,
    observing,
    preferences_of,
)
from meiqa.export.layers import halve, read, save_changes, save_graph
from meiqa.export.rounding import (
    BLOCK,
    Range,
    quantise_int4,
    quantise_int8,
    values_to_observe,
)
from meiqa.export.verify import DECODER_SHAPES, PiecewiseSession, decoder_feeds, random_feeds
from tests.engine.samples import SIZES, picture, seen
from tests.export.small_graphs import Floats, convolution, linear, normal


def test_calls_add_up() -> None:
    calls = [normal(seed, 3 + seed, 5) for seed in range(4)]
    observer = Observer(5, 64)
    for call in calls:
        observer.add(call)
    seen, together = observer.observed(), np.concatenate(calls)
    np.testing.assert_array_equal(seen.low, together.min(0))
    np.testing.assert_array_equal(seen.high, together.max(0))
    np.testing.assert_allclose(seen.square, np.square(together).mean(0), rtol=1e-6)
    assert seen.seen == len(together)
    np.testing.assert_array_equal(np.sort(seen.rows, 0), np.sort(together, 0))


def test_the_sample_is_drawn_from_all_calls_alike() -> None:
    observer = Observer(2, 1024)
    for call in range(8):
        observer.add(np.full((1024, 2), call, np.float32))
    rows = observer.observed().rows
    assert rows.shape == (1024, 2)
    for some in rows, rows[:256]:
        counts = np.bincount(some[:, 0].astype(int), minlength=8)
        assert counts.min() > len(some) / 16


def test_a_sample_that_is_not_full_is_in_random_order() -> None:
    observer = Observer(1, 1024)
    observer.add(np.arange(512, dtype=np.float32)[:, None])
    rows = observer.observed().rows[:, 0]
    np.testing.assert_array_equal(np.sort(rows), np.arange(512))
    assert 192 < rows[:256].mean() < 320


def test_samples_of_wide_values_have_fewer_rows() -> None:
    observer = Observer(2 * WIDE, 8)
    observer.add(np.zeros((8, 2 * WIDE), np.float32))
    assert observer.observed().rows.shape == (4, 2 * WIDE)


def test_dividing_channels_divides_everything_that_was_seen() -> None:
    values, scales = normal(0, 50, 5), np.array([1, 2, 4, 0.5, 10], np.float32)
    one, other = Observer(5, 64), Observer(5, 64)
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
    with observing(tmp_path / "graph.onnx", values_to_observe(made), 256) as session:
        outputs = session.run({"x": x})
        seen = session.take_observed()
    assert sorted(path.name for path in tmp_path.iterdir()) == files
    np.testing.assert_array_equal(seen["x"].high, x.max((0, 2, 3)))
    np.testing.assert_array_equal(seen["r"].high, -outputs["y"].min((0, 2, 3)))
    assert seen["r"].seen == 7 * 5


class Echo:
    """Gives back what it gets."""

    def run(self, inputs: dict[str, Floats]) -> dict[str, Floats]:
        return dict(inputs)


def test_of_calls_that_write_few_are_looked_at() -> None:
    session = ObservingSession(Echo(), {"embeds": -1}, 64)
    for _ in range(WRITING_EVERY + 1):
        session.run({"embeds": np.ones((1, 1, 1, 4), np.float32)})
    session.run({"embeds": np.ones((1, 2, 3, 4), np.float32)})
    assert session.take_observed()["embeds"].seen == 8


def test_samples_are_as_large_as_a_precision_needs(tmp_path: Path) -> None:
    files = {name: tmp_path / f"{name}.onnx" for name in ("vision", "decoder")}
    for file in files.values():
        save_graph(linear(normal(0, 8, 8)), file)

    def sizes(precision: str) -> list[int]:
        seen = observe(files, lambda each: [s.run(feeds) for s in each.values()], precision)
        return [len(seen[name]["x"].rows) for name in files]

    feeds = {"x": normal(1, 5000, 8)}
    assert sizes("int8") == [SAMPLED_ROWS["int8"]] * 2
    assert sizes("int4") == [SAMPLED_ROWS["int8"], SAMPLED_ROWS["int4"]]


def test_a_linear_layer_without_a_call_has_nothing_observed(tmp_path: Path) -> None:
    made = linear(normal(0, 8, 8))
    save_graph(made, tmp_path / "graph.onnx")
    with observing(tmp_path / "graph.onnx", values_to_observe(made), 256) as session:
        assert session.take_observed() == {}


Sessions = Mapping[str, GraphSession]
PRECISIONS = ("int8", "int4")


def opened(package: EnginePackage, sessions: Sessions) -> LocalModel:
    """A package's model on other graphs."""
    decoder = GraphDecoder(sessions["decoder"], package.manifest.decoder)
    return LocalModel(package, sessions["vision"], decoder)


@pytest.fixture(scope="module")
def files(package: EnginePackage, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Give the float graphs, in a folder that may be written to."""
    folder = Path(shutil.copytree(package.path, tmp_path_factory.mktemp("float") / "package"))
    return {name: folder / f"{name}.onnx" for name in ("vision", "decoder")}


@pytest.fixture(scope="module")
def quantisations(package: EnginePackage, files: dict[str, Path]) -> dict[str, Quantisation]:
    """Give the model, calibrated, on its way to each precision."""

    def exercise(sessions: Sessions) -> None:
        model = opened(package, sessions)
        pictures = [seen(model, picture(n, size)) for n, size in enumerate(SIZES)]
        prefixes = model.prefill(pictures)
        for prefix in prefixes:
            model.grade(prefix)
            model.describe(prefix, 8)
            model.prefer_first([prefix], [prefixes[0].tokens])
        rng = np.random.default_rng(1)
        for sizes in DECODER_SHAPES:
            sessions["decoder"].run(random_feeds(package.manifest.decoder, sizes, rng))

    observed = observe(files, exercise, "int8")
    return {precision: Quantisation(files, precision, observed) for precision in PRECISIONS}


def saved(quantisation: Quantisation, plan: Mapping[str, Assignment], folder: Path) -> Sessions:
    for name in plan:
        save_graph(quantisation.graph(name, plan[name]), folder / f"{name}.onnx")
        onnx.checker.check_model(folder / f"{name}.onnx", full_check=True)
    return {name: PiecewiseSession(folder / f"{name}.onnx") for name in plan}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("sizes", DECODER_SHAPES, ids=str)
def test_the_decoder_takes_all_shapes(
    package: EnginePackage,
    files: dict[str, Path],
    quantisations: dict[str, Quantisation],
    tmp_path: Path,
    precision: str,
    sizes: tuple[int, ...],
) -> None:
    quantisation = quantisations[precision]
    decoder = saved(quantisation, quantisation.default(), tmp_path)["decoder"]
    feeds = random_feeds(package.manifest.decoder, sizes, np.random.default_rng(0))
    exact, made = PiecewiseSession(files["decoder"]).run(feeds), decoder.run(feeds)
    for name, wanted in exact.items():
        assert made[name].shape == wanted.shape
        error = np.linalg.norm(made[name] - wanted) / np.linalg.norm(wanted)
        assert 0 < error < (0.2 if precision == "int8" else 0.6), name


@pytest.mark.parametrize("precision", PRECISIONS)
def test_rows_do_not_see_each_other(
    package: EnginePackage,
    quantisations: dict[str, Quantisation],
    tmp_path: Path,
    precision: str,
) -> None:
    quantisation = quantisations[precision]
    decoder = saved(quantisation, quantisation.default(), tmp_path)["decoder"]
    rng = np.random.default_rng(0)
    many = random_feeds(package.manifest.decoder, (1, 7, 5, 13, 0, 1), rng)
    many["embeds"][:, 0] *= 100
    rows = {"embeds": 1, "positions": 2, "past": 4, "past_lengths": 1, "logit_positions": 1}
    one = {n: v.take([3], axis=rows[n]) if n in rows else v for n, v in many.items()}
    among, alone = decoder.run(many), decoder.run(one)
    np.testing.assert_allclose(alone["logits"][0, 0], among["logits"][0, 3], rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(alone["hidden"][0, 0], among["hidden"][0, 3], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_tower_takes_all_sizes(
    package: EnginePackage,
    files: dict[str, Path],
    quantisations: dict[str, Quantisation],
    tmp_path: Path,
    precision: str,
) -> None:
    quantisation = quantisations[precision]
    made_sessions = saved(quantisation, quantisation.default(), tmp_path)
    exact = {name: PiecewiseSession(file) for name, file in files.items()}
    for number, size in enumerate([*SIZES, (64, 64)]):
        models = (opened(package, sessions) for sessions in (exact, made_sessions))
        wanted, made = (seen(model, picture(number + 50, size)).values for model in models)
        assert 0 < np.linalg.norm(made - wanted) / np.linalg.norm(wanted) < 0.1


@pytest.mark.parametrize(("precision", "share"), [("fp32", 1.0), ("int8", 0.3), ("int4", 0.2)])
def test_weights_take_their_share_of_the_bytes(
    files: dict[str, Path],
    quantisations: dict[str, Quantisation],
    tmp_path: Path,
    precision: str,
    share: float,
) -> None:
    quantisation = quantisations["int4"]
    plan = {layer.name: precision for layer in quantisation.layers("decoder")}
    saved(quantisation, {"decoder": plan}, tmp_path)
    sizes = [
        Path(f"{f}.data").stat().st_size for f in (files["decoder"], tmp_path / "decoder.onnx")
    ]
    assert share * 0.7 < sizes[1] / sizes[0] <= share


def test_by_rule_pixels_and_logits_stay_in_float(
    quantisations: dict[str, Quantisation], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("meiqa.export.calibration.LARGEST_HEAD", 1.0)
    for precision, quantisation in quantisations.items():
        plan = quantisation.default()
        kept = {name: [la for la, p in plan[name].items() if p == "fp16"] for name in plan}
        assert kept == {"vision": ["stem.conv.weight"], "decoder": ["lm_head.weight"]}
        assert set(plan["decoder"].values()) == {precision, "fp16"}
        assert set(plan["vision"].values()) == {"int8", "fp16"}


def test_a_large_head_has_8_bits(quantisations: dict[str, Quantisation]) -> None:
    for quantisation in quantisations.values():
        plan = quantisation.default()["decoder"]
        assert plan["lm_head.weight"] == IN_BLOCKS
        made = quantisation.graph("decoder", plan).graph.initializers
        smoothed = quantisation.graph("decoder", dict.fromkeys(plan, "fp32"))
        exact = smoothed.graph.initializers["lm_head.weight"]
        codes, steps = (read(made[f"lm_head.weight.{n}"].const_value) for n in ("int8", "scale"))
        weight, steps = read(exact.const_value), np.repeat(steps, BLOCK, axis=0)[: len(codes)]
        assert np.abs(weight - codes * steps).max() <= 0.5001 * steps.max()
        assert len(np.unique(steps[:, 0])) > 1 or len(codes) <= BLOCK


def test_without_pictures_4_bits_leave_the_tower_in_half(
    files: dict[str, Path], tmp_path: Path
) -> None:
    quantisation = Quantisation(files, "int4", {})
    plan = quantisation.default()
    assert set(plan["vision"].values()) == {"fp16"}
    assert set(plan["decoder"].values()) == {"int4", IN_BLOCKS}
    saved(quantisation, plan, tmp_path)


@pytest.mark.parametrize(
    "rewrite",
    [
        halve,
        lambda made: quantise_int8(made, {"x": Range.between(-1, 1)}, lambda layer: True),
        lambda made: quantise_int4(made, {}, lambda layer: True),
    ],
    ids=["half", "int8", "int4"],
)
def test_weights_are_read_when_saved_and_not_before(
    tmp_path: Path, rewrite: Callable[[ir.Model], None]
) -> None:
    def unread() -> ir.TensorProtocol:
        raise InterruptedError("the weight is read")

    made = linear(np.ones((64, 64), np.float32))
    lazy = ir.LazyTensor(unread, dtype=ir.DataType.FLOAT, shape=ir.Shape([64, 64]))
    made.graph.initializers["w"].const_value = lazy
    rewrite(made)
    with pytest.raises(InterruptedError):
        save_graph(made, tmp_path / "graph.onnx")


def test_what_no_chosen_layer_reads_stays_where_it_is(
    files: dict[str, Path], quantisations: dict[str, Quantisation]
) -> None:
    for name, file in files.items():
        before, made = ir.load(file).graph, quantisations["int8"].graph(name, {}).graph
        for weight, value in before.initializers.items():
            assert type(made.initializers[weight].const_value) is type(value.const_value)


def test_all_chosen_is_the_float_model_smoothed(
    package: EnginePackage,
    files: dict[str, Path],
    quantisations: dict[str, Quantisation],
    tmp_path: Path,
) -> None:
    quantisation = quantisations["int8"]
    plan = {name: {la.name: "fp32" for la in quantisation.layers(name)} for name in files}
    smoothed = saved(quantisation, plan, tmp_path)
    feeds = random_feeds(package.manifest.decoder, (2, 3, 4, 5, 6, 1), np.random.default_rng(0))
    exact = PiecewiseSession(files["decoder"]).run(feeds)
    for name, made in smoothed["decoder"].run(feeds).items():
        np.testing.assert_allclose(made, exact[name], atol=1e-5 * np.abs(exact[name]).max())
    weight = "layers.0.mlp.down_proj.weight"
    changed = [
        {w.name: w.raw_data for w in onnx.load(file).graph.initializer}[weight]
        for file in (files["decoder"], tmp_path / "decoder.onnx")
    ]
    assert changed[0] != changed[1]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_only_what_differs_is_written_beside_a_graph(
    package: EnginePackage,
    files: dict[str, Path],
    quantisations: dict[str, Quantisation],
    tmp_path: Path,
    precision: str,
) -> None:
    quantisation = quantisations[precision]
    few = {la.name: precision for la in quantisation.layers("decoder") if "mlp" in la.name}
    whole, beside = tmp_path / "whole.onnx", files["decoder"].with_name("beside.onnx")
    save_graph(quantisation.graph("decoder", few), whole)
    save_changes(quantisation.graph("decoder", few), beside)
    sizes = {file: Path(f"{file}.data").stat().st_size for file in (whole, beside)}
    assert 0 < sizes[beside] < 0.2 * sizes[whole]
    for feed in decoder_feeds(package.manifest.decoder):
        wanted, made = PiecewiseSession(whole).run(feed), PiecewiseSession(beside).run(feed)
        for name, values in wanted.items():
            np.testing.assert_array_equal(made[name], values)


PICTURES = [picture(n, (128, 192)) for n in (70, 71, 72)]


def study(
    package: EnginePackage, quantisation: Quantisation, largest_move: float
) -> SensitivityStudy:
    def open_model(sessions: Mapping[str, GraphSession]) -> LocalModel:
        return opened(package, sessions)

    return SensitivityStudy(quantisation, open_model, PICTURES, largest_move)


def test_layers_are_grouped_by_kind_and_shares_add_up(
    quantisations: dict[str, Quantisation],
) -> None:
    groups = {group.name: group for group in groups_of(quantisations["int8"])}
    assert groups["layers.*.mlp.down_proj.weight"].layers == [
        f"layers.{n}.mlp.down_proj.weight" for n in range(2)
    ]
    gate_up = groups["layers.*.mlp.gate_proj.weight + layers.*.mlp.up_proj.weight"]
    assert [*gate_up.readers] == [
        tuple(f"layers.{n}.mlp.{kind}_proj.weight" for kind in ("gate", "up")) for n in range(2)
    ]
    convolutions = groups["convolutions"]
    assert convolutions.chained
    assert convolutions.layers[0] == "stem.conv.weight"
    assert len(convolutions.layers) == len([n for n in all_layers(quantisations) if "conv" in n])
    assert sum(group.shares.byte_share for group in groups.values()) == pytest.approx(1)
    assert sum(group.shares.work_share for group in groups.values()) == pytest.approx(1)
    stem = convolutions.readers["stem.conv.weight",]
    assert stem.work_share > 3 * stem.byte_share
    assert convolutions.shares.work_share > convolutions.shares.byte_share


def all_layers(quantisations: dict[str, Quantisation]) -> list[str]:
    return [layer.name for layer in quantisations["int8"].layers("vision")]


def moving_by(squares: Callable[[Mapping[str, Mapping[str, str]]], float]) -> object:
    """Make a stand-in of `SensitivityStudy._moves` whose grades move by the root of a sum."""
    return lambda _, plan: Moves(math.sqrt(squares(plan)), 0.0)


@pytest.mark.parametrize("worst", [0, 1, 7, 100])
def test_convolutions_are_quantised_from_one_on(
    package: EnginePackage,
    quantisations: dict[str, Quantisation],
    monkeypatch: pytest.MonkeyPatch,
    worst: int,
) -> None:
    names = [name for name in all_layers(quantisations) if "conv" in name]

    def squares(plan: Mapping[str, Mapping[str, str]]) -> float:
        return sum(plan.get("vision", {}).get(name) == "int8" for name in names[:worst])

    monkeypatch.setattr(SensitivityStudy, "_moves", moving_by(squares))
    plan = study(package, quantisations["int8"], 0.9).plan()["vision"]
    left = [name for name in names if plan[name] == "fp16"]
    assert left == names[: len(left)]
    assert min(worst, len(names)) <= len(left) <= 2 * worst + 2 * bool(worst)
    assert {*plan.values()} <= {"int8", "fp16"}


@pytest.mark.parametrize(("allowed", "kept"), [(1e9, {"int8", IN_BLOCKS}), (0.0, {"fp16"})])
def test_what_may_be_moved_decides(
    package: EnginePackage,
    files: dict[str, Path],
    quantisations: dict[str, Quantisation],
    monkeypatch: pytest.MonkeyPatch,
    allowed: float,
    kept: set[str],
) -> None:
    before = sorted(files["decoder"].parent.iterdir())
    made = study(package, quantisations["int8"], allowed)
    plan = made.plan()
    assert {p for of_graph in plan.values() for p in of_graph.values()} == kept
    for name in plan:
        assert set(plan[name]) == {layer.name for layer in quantisations["int8"].layers(name)}
    assert sorted(files["decoder"].parent.iterdir()) == before
    assert bool(made.table) == (allowed == 0)
    for row in (*made.table, *made.plans[:1]):
        assert 0 < row["grade_move"] < 1
        assert 0 < row["verdict_move"] < 1


@pytest.mark.parametrize(("in_bytes", "kept"), [(0.01, "int8"), (1.0, "fp16")])
@pytest.mark.parametrize(
    "readers",
    [
        ["layers.1.mlp.down_proj.weight"],
        ["layers.0.mlp.gate_proj.weight", "layers.0.mlp.up_proj.weight"],
        ["layers.1.mlp.up_proj.weight", "layers.1.mlp.gate_proj.weight"],
    ],
)
def test_only_layers_that_are_not_borne_go_up_the_ladder(
    package: EnginePackage,
    quantisations: dict[str, Quantisation],
    monkeypatch: pytest.MonkeyPatch,
    in_bytes: float,
    kept: str,
    readers: list[str],
) -> None:
    """A head is in blocks, and those that read the same value go together."""
    weak, *_ = readers

    def squares(plan: Mapping[str, Mapping[str, str]]) -> float:
        in_precision = plan.get("decoder", {}).get(weak, "fp16")
        return {"int4": 1.0, "int8": in_bytes, "fp16": 0.0}[in_precision]

    def lost(_: Quantisation, __: str, names: list[str], ___: str) -> dict[str, float]:
        return {name: float(name == weak) for name in names}

    monkeypatch.setattr(SensitivityStudy, "_moves", moving_by(squares))
    monkeypatch.setattr(Quantisation, "lost", lost)
    plan = study(package, quantisations["int4"], 0.5).plan()["decoder"]
    left = {name: precision for name, precision in plan.items() if precision != "int4"}
    assert left == {**dict.fromkeys(readers, kept), "lm_head.weight": IN_BLOCKS}


def test_moves_are_mean_changes() -> None:
    one, other = [np.array([0.5]), np.array([0.5])], [np.array([0.5]), np.array([0.9])]
    assert mean_move(one, other) == pytest.approx(0.2)
    assert mean_move(other, one) == pytest.approx(0.2)
    assert mean_move(one, one) == 0
    assert mean_move([float("nan"), 1.0], [1.0, 1.0]) == 2.0


def test_a_preference_counts_for_more_than_a_grade() -> None:
    assert Moves(0.03, 0.01).worse == 0.03
    assert Moves(0.01, 0.04).worse == pytest.approx(0.06)


def test_each_picture_is_compared_with_the_next() -> None:
    class Comparing:
        def prefer_first(self, firsts: list[Any], seconds: list[Any]) -> Any:
            return np.array([float(firsts[0].tokens - second) for second in seconds])

    prefixes: Any = [SimpleNamespace(tokens=n) for n in range(6)]
    made = [*preferences_of(cast(Model, Comparing()), prefixes)]
    wanted = [[n - (n + 1) % 6] for n in range(6)]
    np.testing.assert_allclose(made, 1 / (1 + np.exp(-np.array(wanted))))
