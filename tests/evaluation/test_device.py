"""What `meiqa bench device` says of a machine."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from meiqa.engine.package import EnginePackage
from meiqa.errors import UsageError
from meiqa.evaluation.device import ROWS, bench_device, device_text
from meiqa.kernels.cores import usable_cores
from meiqa.kernels.decoder import FASTEST, KERNELS, FusedShape
from meiqa.locations import embedded_assets


@pytest.fixture(scope="module")
def package() -> EnginePackage:
    return EnginePackage.open(embedded_assets() / "package", verify=False)


def test_every_kernel_is_timed_and_the_last_line_says_what_decides(package: EnginePackage) -> None:
    ticks = iter(np.arange(10_000) * 0.016 * ROWS)
    found = bench_device(package, 1, clock=lambda: float(next(ticks)))
    assert {row["kernel"] for row in found["rows"]} == set(KERNELS)
    for row in found["rows"]:
        floats = "bf16" if KERNELS[row["kernel"]].in_bf16 else "fp32"
        assert row["precision"] in ("int8", floats)
    assert {1, usable_cores()} <= {row["threads"] for row in found["rows"]}
    assert all(row["ms"] == 16 / row["threads"] for row in found["rows"])
    rates = [row["gmac_per_s"] / row["threads"] for row in found["rows"]]
    assert rates == pytest.approx([11.6] * len(rates), abs=0.1)
    last = device_text(found).splitlines()[-1]
    assert f"| {FASTEST}: int8 x1 11." in last
    assert "GMAC/s 16.000 ms" in last
    assert found["machine"]["processor"] in last


def test_a_package_without_layers_is_refused(package: EnginePackage) -> None:
    manifest = replace(package.manifest, files={})
    with pytest.raises(UsageError, match="does not run in the kernels"):
        bench_device(replace(package, manifest=manifest), 1)


def test_multiplications_are_those_of_the_tokens_one_by_one() -> None:
    shape, layers, steps, prefix = FusedShape(64, 80, 4, 2, 32, 1e-6), 3, 5, 7
    linear = attention = 0
    for layer in range(layers):
        for step in range(steps):
            linear += 64 * 2 * (2 * 32)
            if layer < layers - 1 or step == steps - 1:
                linear += 64 * 128 + 128 * 64 + 3 * 64 * 80
                attention += 4 * 2 * 32 * (prefix + step + 1)
    assert shape.multiplications(layers, steps, prefix) == (linear, attention)
