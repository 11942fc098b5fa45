"""A decoder's layers are read from its graph's weights, and answer as the graph does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray

from meiqa.engine.runtime.decoder import (
    LAYERS_FILE,
    VIEWS,
    GraphDecoder,
    KeyValues,
    NativeDecoder,
    Row,
    floats,
    layers_beside,
    layers_of,
)
from meiqa.export.calibration import Quantisation, observe
from meiqa.export.checkpoint import weightless
from meiqa.export.decoder import DecoderConfig, SharedPrefixDecoder
from meiqa.export.fused import (
    LARGEST_SHARE,
    differences,
    fused_layers,
    row_difference,
    write_fused_layers,
)
from meiqa.export.graphs import decoder_interface, traced
from meiqa.export.layers import halve, read, save_graph
from meiqa.export.rounding import store_in_blocks
from meiqa.export.verify import PiecewiseSession, random_feeds
from meiqa.kernels.decoder import LAYER_LINEARS, OF_EACH_ROW
from meiqa.memory.segment import Segment, write_segment

TEXT = DecoderConfig(
    vocab_size=53,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    mrope_section=(4, 6, 6),
)
SHAPE = TEXT.shape
ROWS, STEPS, PREFIX_STEPS = 5, 7, 11
WEIGHTS = "decoder.onnx.data"
MAPS = Path("/proc/self/maps")


def write_graph(text: DecoderConfig, folder: Path) -> None:
    """Write the float graph of a random decoder."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        weights = SharedPrefixDecoder(text).state_dict()
        for name, weight in weights.items():
            weight.normal_(1.0 if "norm" in name else 0.0, 0.2)
    with weightless():
        empty = SharedPrefixDecoder(text).eval()
    graph = traced(empty, decoder_interface(text.shape), lambda name: weights[name])
    save_graph(graph, folder / "decoder.onnx")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder with the float graph of a random decoder."""
    folder = tmp_path_factory.mktemp("decoder")
    write_graph(TEXT, folder)
    return folder


@pytest.fixture(scope="module")
def int8_folder(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder with the same decoder in INT8."""
    files = {"decoder": folder / "decoder.onnx"}
    sizes = (2, 3, STEPS, PREFIX_STEPS, 0, 1)
    feeds = random_feeds(SHAPE, sizes, np.random.default_rng(1))
    observed = observe(files, lambda sessions: sessions["decoder"].run(feeds), "int8")
    quantisation = Quantisation(files, "int8", observed)
    out = tmp_path_factory.mktemp("int8")
    plan = quantisation.default()["decoder"]
    save_graph(quantisation.graph("decoder", plan), out / "decoder.onnx")
    return out


def whole(folder: Path) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Give the arrays of a decoder's layers, those in the graph's weights too, and its shape."""
    segment = Segment.open(folder / LAYERS_FILE)
    arrays, tensors = fused_layers(ir.load(folder / "decoder.onnx"), TEXT)
    shape = {name: value for name, value in segment.attributes.items() if name != VIEWS}
    return arrays | {name: read(tensor) for name, tensor in tensors.items()}, shape


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_layers_answer_as_the_graph_does(
    folder: Path, int8_folder: Path, precision: str
) -> None:
    place = folder if precision == "fp32" else int8_folder
    assert write_fused_layers(place, TEXT, precision)
    graph = GraphDecoder(PiecewiseSession(place / "decoder.onnx"), SHAPE)
    native = NativeDecoder(*layers_beside(place / WEIGHTS), 2)
    sizes = (1, ROWS, STEPS, PREFIX_STEPS, 0, 1)
    feeds = random_feeds(SHAPE, sizes, np.random.default_rng(2))
    prefix = KeyValues(floats(feeds["prefix"][:, :, 0]), PREFIX_STEPS)
    rows = [
        Row(floats(feeds["embeds"][0, row, :steps]), floats(feeds["positions"][:, 0, row, :steps]))
        for row, steps in enumerate((feeds["logit_positions"][0, :, 0] + 1).tolist())
    ]
    wanted, made = (decoder.last_logits(rows, [prefix]) for decoder in (graph, native))
    # In INT8 the head is in half precision, and a value may fall on the other side of a step.
    tolerance = 1e-4 if precision == "fp32" else 0.02 * float(np.abs(wanted).max())
    np.testing.assert_allclose(made, wanted, atol=tolerance, rtol=0)
    assert np.ptp(wanted) > 100 * 1e-4


def test_halves_answer_as_the_graph_does(folder: Path, tmp_path: Path) -> None:
    model = ir.load(folder / "decoder.onnx")
    halve(model)
    save_graph(model, tmp_path / "decoder.onnx")
    assert write_fused_layers(tmp_path, TEXT, "fp16")
    assert min(differences(tmp_path, SHAPE, "fp16").values()) > 0
    arrays, _ = whole(tmp_path)
    assert arrays["layers.1.down_proj"].dtype == arrays["lm_head"].dtype == np.float16


def test_rows_that_are_rounded_by_themselves(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"decoder": folder / "decoder.onnx"}
    sizes = (2, 3, STEPS, PREFIX_STEPS, 0, 1)
    feeds = random_feeds(SHAPE, sizes, np.random.default_rng(1))
    observed = observe(files, lambda sessions: sessions["decoder"].run(feeds), "int8")
    monkeypatch.setattr("meiqa.export.rounding.WORTH_OWN_ROWS", 0.0)
    quantisation = Quantisation(files, "int8", observed)
    plan = quantisation.default()["decoder"]
    save_graph(quantisation.graph("decoder", plan), tmp_path / "decoder.onnx")
    assert write_fused_layers(tmp_path, TEXT, "int8")
    arrays, _ = fused_layers(ir.load(tmp_path / "decoder.onnx"), TEXT)
    for linear in LAYER_LINEARS:
        assert arrays[f"layers.0.{linear}.input"][0] == OF_EACH_ROW


def test_floats_between_bytes(folder: Path, tmp_path: Path) -> None:
    files = {"decoder": folder / "decoder.onnx"}
    feeds = random_feeds(SHAPE, (2, 3, STEPS, PREFIX_STEPS, 0, 1), np.random.default_rng(1))
    observed = observe(files, lambda sessions: sessions["decoder"].run(feeds), "int8")
    quantisation = Quantisation(files, "int8", observed)
    plan = quantisation.default()["decoder"]
    plan |= {name: "fp16" for name in plan if "o_proj" in name or "layers.1.mlp" in name}
    save_graph(quantisation.graph("decoder", plan), tmp_path / "decoder.onnx")
    assert write_fused_layers(tmp_path, TEXT, "int8")
    _, tensors = fused_layers(ir.load(tmp_path / "decoder.onnx"), TEXT)
    assert tensors["layers.0.o_proj"].dtype == ir.DataType.FLOAT16
    assert tensors["layers.0.q_proj"].dtype == ir.DataType.INT8


def differing(place: Path, precision: str) -> list[str]:
    """Name the parts that differ by more than an export lets pass."""
    found = differences(place, SHAPE, precision)
    return [part for part, share in found.items() if share > LARGEST_SHARE[precision]]


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize(
    ("damaged", "noticed"),
    [
        ("frequencies", ["layers.0", "layers.1", "logits"]),
        *((f"layers.0.{linear}", ["layers.0"]) for linear in LAYER_LINEARS),
        *((f"layers.2.{linear}", ["layers.1", "logits"]) for linear in LAYER_LINEARS),
        *((f"layers.0.{part}_proj.bias", ["layers.0"]) for part in "qkv"),
        ("layers.0.input_layernorm", ["layers.0"]),
        ("layers.1.post_layernorm", ["layers.0", "layers.1", "logits"]),
        ("norm", ["logits"]),
        ("lm_head", ["logits"]),
    ],
)
def test_layers_that_answer_otherwise_are_noticed(
    folder: Path, int8_folder: Path, damaged: str, noticed: list[str], precision: str
) -> None:
    place = folder if precision == "fp32" else int8_folder
    assert write_fused_layers(place, TEXT, precision)
    assert differing(place, precision) == []
    arrays, attributes = whole(place)
    of_part = arrays[damaged]
    arrays[damaged] = 3 * of_part if damaged == "frequencies" else of_part[::-1].copy()
    write_segment(place / LAYERS_FILE, arrays, attributes)
    assert differing(place, precision) == noticed


@pytest.mark.parametrize(
    ("damaged", "factors"),
    [
        (["gate_proj.input", "up_proj.input"], [1.001, 1.0]),
        (["gate_proj.input", "up_proj.input"], [1.0, 0.0]),
        (["o_proj.scale"], [1.001]),
    ],
)
def test_bytes_that_mean_something_else_are_noticed(
    int8_folder: Path, damaged: list[str], factors: list[float]
) -> None:
    assert write_fused_layers(int8_folder, TEXT, "int8")
    arrays, attributes = whole(int8_folder)
    for name in (f"layers.0.{part}" for part in damaged):
        arrays[name] = (arrays[name] * factors).astype(np.float32)
    write_segment(int8_folder / LAYERS_FILE, arrays, attributes)
    assert differing(int8_folder, "int8") == ["layers.0"]


def test_layers_in_another_order_are_noticed(folder: Path) -> None:
    assert write_fused_layers(folder, TEXT, "fp32")
    arrays, attributes = whole(folder)
    places = {"layers.0.": "layers.1.", "layers.1.": "layers.0."}
    moved = {places.get(name[:9], name[:9]) + name[9:]: array for name, array in arrays.items()}
    write_segment(folder / LAYERS_FILE, moved, attributes)
    assert differing(folder, "fp32") == ["layers.0", "layers.1", "logits"]


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_what_is_not_a_number_agrees_with_nothing(
    folder: Path, int8_folder: Path, precision: str
) -> None:
    place = folder if precision == "fp32" else int8_folder
    assert write_fused_layers(place, TEXT, precision)
    arrays, attributes = whole(place)
    arrays["layers.2.down_proj.bias"] = np.full(TEXT.hidden_size, np.nan, np.float32)
    write_segment(place / LAYERS_FILE, arrays, attributes)
    found = differences(place, SHAPE, precision)
    assert [part for part, share in found.items() if share == np.inf] == ["layers.1", "logits"]


@pytest.mark.parametrize(("value", "behind", "share"), [(np.nan, 1, np.inf), (1.0, 16, 0.5)])
def test_a_row_is_behind_one_of_the_prefixes(value: float, behind: int, share: float) -> None:
    """One that is not a number is enough, and half of those behind the same prefix."""
    off = np.zeros((96, 4), np.float32)
    off[40 : 40 + behind] = value
    whole = np.ones_like(off)
    assert row_difference(off, whole, 0.5) == share
    assert row_difference(np.nan_to_num(off), whole, 1 / 4) == 0


def test_a_decoder_of_one_layer_is_compared(tmp_path: Path) -> None:
    text = replace(TEXT, num_hidden_layers=1)
    write_graph(text, tmp_path)
    made = write_fused_layers(tmp_path, text, "fp32")
    assert made is not None
    assert made.keys() <= {"layers.0", "logits"}


@pytest.mark.parametrize("part", ["bias", "scale", "input"])
def test_layers_of_other_shapes_are_refused(int8_folder: Path, part: str) -> None:
    assert write_fused_layers(int8_folder, TEXT, "int8")
    arrays, attributes = whole(int8_folder)
    name = f"layers.1.k_proj.{part}"
    # A range of its own is not another shape, but cannot be meant: its input is also the query's.
    arrays[name] = 2 * arrays[name] if part == "input" else arrays[name][:-1]
    with pytest.raises(ValueError, match=r"should have|round the same input"):
        layers_of(arrays, attributes)


def test_int8_layers_are_bytes(int8_folder: Path) -> None:
    assert write_fused_layers(int8_folder, TEXT, "int8")
    arrays, _ = whole(int8_folder)
    assert arrays["layers.1.down_proj"].dtype == np.int8
    assert arrays["layers.1.down_proj.input"].shape == (2,)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_no_weight_is_stored_twice(folder: Path, int8_folder: Path, precision: str) -> None:
    place = folder if precision == "fp32" else int8_folder
    assert write_fused_layers(place, TEXT, precision)
    twice = Segment.open(place / LAYERS_FILE).arrays
    assert not [name for name, array in twice.items() if array.ndim > 1 and name != "frequencies"]


def test_layers_that_hold_all_of_their_arrays_can_still_be_read(int8_folder: Path) -> None:
    """As packages had them whose layers were stored twice."""
    assert write_fused_layers(int8_folder, TEXT, "int8")
    found = differences(int8_folder, SHAPE, "int8")
    write_segment(int8_folder / LAYERS_FILE, *whole(int8_folder))
    assert differences(int8_folder, SHAPE, "int8") == found


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ([1 << 40, "<f4", [64]], "offset"),
        ([0, "<f4", [1 << 40]], "buffer"),
        ([-4, "<f4", [64]], "lies at -4"),
        ([0, "|O", [8]], r"of \|O"),
    ],
)
def test_places_outside_the_weights_are_refused(
    int8_folder: Path, place: list[object], message: str
) -> None:
    assert write_fused_layers(int8_folder, TEXT, "int8")
    segment = Segment.open(int8_folder / LAYERS_FILE)
    views = {**segment.attributes[VIEWS], "norm": place}
    write_segment(int8_folder / LAYERS_FILE, segment.arrays, {**segment.attributes, VIEWS: views})
    with pytest.raises(ValueError, match=message):
        layers_beside(int8_folder / WEIGHTS)


@pytest.mark.skipif(not MAPS.exists(), reason="the system does not list what is mapped")
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_layers_that_were_packed_need_no_file(
    folder: Path, int8_folder: Path, precision: str
) -> None:
    """A file that is cut off while it is mapped ends the process that reads it."""
    place = folder if precision == "fp32" else int8_folder
    assert write_fused_layers(place, TEXT, precision)
    layers, head = layers_beside(place / WEIGHTS)
    assert layers.layer_count == SHAPE.layers
    assert head.outputs == SHAPE.vocab_size
    assert str(place) not in MAPS.read_text()


def test_a_head_of_byte_blocks_stays_in_bytes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ir.load(folder / "decoder.onnx")
    store_in_blocks(model, lambda layer: layer.name.startswith("lm_head"))
    save_graph(model, tmp_path / "decoder.onnx")
    assert write_fused_layers(tmp_path, TEXT, "fp32")
    arrays, _ = whole(tmp_path)
    assert arrays["lm_head"].dtype == np.int8
    assert arrays["lm_head.scale"].shape == (2, 53)


def test_other_decoders_have_no_layers(folder: Path) -> None:
    assert not write_fused_layers(folder, TEXT, "int4")
    assert not write_fused_layers(folder, replace(TEXT, qk_norm=True), "fp32")
