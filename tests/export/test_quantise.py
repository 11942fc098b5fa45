"""A whole package in fewer bits: all calls run, nothing depends on the batch, sizes shrink."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from meiqa.engine.local import LocalVlm
from meiqa.engine.package import EnginePackage
from meiqa.engine.runtime.base import GraphSession
from meiqa.export import int4, int8
from meiqa.export.graphs import save_graph
from meiqa.export.half import halved
from meiqa.export.piecewise import PiecewiseSession
from meiqa.export.quantise import Assignment, Quantisation, observe
from meiqa.export.verify import DECODER_SHAPES, random_feeds
from tests.engine.samples import SIZES, picture, seen
from tests.export.small_graphs import linear

Sessions = Mapping[str, GraphSession]
PRECISIONS = ("int8", "int4")


@pytest.fixture(scope="module")
def files(package: EnginePackage, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Give the float graphs, in a folder that may be written to."""
    folder = Path(shutil.copytree(package.path, tmp_path_factory.mktemp("float") / "package"))
    return {name: folder / f"{name}.onnx" for name in ("vision", "decoder")}


@pytest.fixture(scope="module")
def quantisations(package: EnginePackage, files: dict[str, Path]) -> dict[str, Quantisation]:
    """Give the model, calibrated, on its way to each precision."""

    def exercise(sessions: Sessions) -> None:
        vlm = LocalVlm(package, sessions["vision"], sessions["decoder"])
        prefixes = vlm.read([seen(vlm, picture(n, size)) for n, size in enumerate(SIZES)])
        for prefix in prefixes:
            vlm.grade(prefix)
            vlm.describe(prefix, 8)
            vlm.prefer_first([prefix], [prefixes[0].tokens])
        rng = np.random.default_rng(1)
        for sizes in DECODER_SHAPES:
            sessions["decoder"].run(random_feeds(package.manifest.decoder, sizes, rng))

    observed = observe(files, exercise)
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
    vision = saved(quantisation, quantisation.default(), tmp_path)["vision"]
    exact = PiecewiseSession(files["vision"])
    for number, size in enumerate([*SIZES, (64, 64)]):
        models = (LocalVlm(package, s, s) for s in (exact, vision))
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


def test_by_rule_pixels_and_logits_stay_in_float(quantisations: dict[str, Quantisation]) -> None:
    for precision, quantisation in quantisations.items():
        plan = quantisation.default()
        kept = {name: [la for la, p in plan[name].items() if p == "fp16"] for name in plan}
        assert kept == {"vision": ["stem.conv.weight"], "decoder": ["lm_head.weight"]}
        assert set(plan["decoder"].values()) == {precision, "fp16"}
        assert set(plan["vision"].values()) == {"int8", "fp16"}


def test_without_pictures_4_bits_leave_the_tower_in_half(
    files: dict[str, Path], tmp_path: Path
) -> None:
    quantisation = Quantisation(files, "int4", {})
    plan = quantisation.default()
    assert set(plan["vision"].values()) == {"fp16"}
    assert set(plan["decoder"].values()) == {"int4", "fp16"}
    saved(quantisation, plan, tmp_path)


@pytest.mark.parametrize(
    "rewrite",
    [
        halved,
        lambda made: int8.quantised(made, {"x": int8.Range.between(-1, 1)}, lambda layer: True),
        lambda made: int4.quantised(made, {}, lambda layer: True),
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


def test_nothing_chosen_is_the_float_model_smoothed(
    package: EnginePackage,
    files: dict[str, Path],
    quantisations: dict[str, Quantisation],
    tmp_path: Path,
) -> None:
    smoothed = saved(quantisations["int8"], {"vision": {}, "decoder": {}}, tmp_path)
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
