"""Kernels that this processor does not run: against the naive twin, and bit by bit against those
that it runs.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from benchmarks.emulated import ARM64, COMPILER, EMULATOR, Program, Rows, built
from meiqa.kernels.decoder import FASTEST, KERNELS, FusedDecoder, FusedShape, Packing, Projection
from tests.kernels import test_decoder as native

PROCESSORS = {
    "cortex-a53": {"portable"},
    "cortex-a76": {"dotprod", "portable"},
    "max": {"i8mm", "dotprod", "portable"},
}
SHAPES = (native.SHAPE, native.WIDE)
PRECISIONS = ("fp32", "int8", "mixed", "down by rows")
STEPS, LENGTHS = [9, 20, 1, 14], [33, 0, 47, 5]


@pytest.fixture(scope="module")
def arm64(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the program for ARM64."""
    for tool in ("cmake", COMPILER, EMULATOR):
        if not shutil.which(tool):
            pytest.skip(f"{tool} is not installed, so ARM64's kernels cannot be run")
    return built(tmp_path_factory.mktemp("arm64"), ARM64)


def rows_of(shape: FusedShape) -> tuple[native.Rows, Rows]:
    drawn = native.drawn_rows(shape, STEPS, LENGTHS)
    each = range(len(STEPS))
    return drawn, Rows(
        [drawn.embeds[row, : STEPS[row]] for row in each],
        [drawn.positions[:, row, : STEPS[row]] for row in each],
        [np.ascontiguousarray(drawn.prefixes[row][:, :, :, : LENGTHS[row]]) for row in each],
    )


def only(rows: Rows, row: int) -> Rows:
    one = slice(row, row + 1)
    return Rows(rows.embeds[one], rows.positions[one], rows.prefixes[one])


def require_the_same(program: Program, kernel: str, packing: Packing) -> None:
    """Compare a kernel with those of this processor, with the twin, and alone with in company."""
    for shape in SHAPES:
        drawn, rows = rows_of(shape)
        for precision in PRECISIONS:
            weights = native.drawn_weights(shape, precision)
            found = program.last_hidden(kernel, packing, weights, rows)
            np.testing.assert_array_equal(found, drawn.run(FusedDecoder(weights)))
            if precision == "fp32":
                np.testing.assert_allclose(found, drawn.twins(weights), atol=1e-5, rtol=1e-5)
            alone = program.last_hidden(kernel, packing, weights, only(rows, 1))
            np.testing.assert_array_equal(alone[0], found[1])
        blocks = native.drawn_head(shape.width, 97)
        for head in (blocks, native.halved(blocks.in_floats())):
            logits = program.logits(kernel, packing, weights, head, rows)
            np.testing.assert_array_equal(logits, Projection(head).of(found, 1))


@pytest.mark.skipif(FASTEST == "portable", reason="no kernel here fuses products with sums")
@pytest.mark.parametrize("processor", PROCESSORS)
def test_arm64_gives_the_same_bits(processor: str, arm64: Path) -> None:
    program = Program(arm64, (EMULATOR, "-cpu", processor))
    kernels = program.kernels()
    assert set(kernels) == PROCESSORS[processor]
    require_the_same(program, *next(iter(kernels.items())))


@pytest.mark.skipif("avx512" not in KERNELS, reason="AVX-VNNI's kernel is run by AVX-512")
def test_avx_vnni_gives_the_same_bits(tmp_path: Path) -> None:
    if not shutil.which("cmake"):
        pytest.skip("cmake is not installed, so the kernel cannot be built on its own")
    program = Program(built(tmp_path, {"MEIQA_AVXVNNI": "-mavx512vl;-mavx512vnni"}))
    require_the_same(program, "avxvnni", KERNELS["avx512"])
