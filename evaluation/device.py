"""What a device makes of the decoder's kernels: `meiqa bench device`."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from meiqa.engine.package import EnginePackage
from meiqa.engine.runtime.decoder import (
    PREFIX_STEPS,
    STEPS,
    NativeDecoder,
    comparisons,
    kernel_for,
    packed,
    stored_layers,
    thread_counts,
)
from meiqa.errors import UsageError
from meiqa.evaluation.measuring import Column, run_on, table_text
from meiqa.kernels.cores import usable_cores
from meiqa.kernels.decoder import KERNELS, FusedDecoder, Projection

ROWS = 8
"""Comparisons of a thread."""
_FEATURES = re.compile(
    r"avx2|avx_vnni|avx512_vnni|avx512_bf16|amx_int8|asimd|asimdhp|asimddp|i8mm|bf16|sve2?|sme2?"
)
_COLUMNS = (
    Column("kernel", "kernel"),
    Column("precision", "precision"),
    Column("threads", "threads", "d"),
    Column("gmac_per_s", "GMAC/s", ".1f"),
    Column("ms", "ms a comparison", ".3f"),
)


def bench_device(
    package: EnginePackage, rounds: int, *, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Any]:
    """Time comparisons by every kernel that this processor runs, in turns.

    Args:
        package: whose decoder; how its pictures look does not matter.
        rounds: calls of each, of which the fastest counts: what else runs only makes them slower.
        clock: seconds that pass.

    Returns:
        `rows` of kernel, precision, threads, gmac_per_s (10^9 multiplications a second) and ms (of
        a comparison), the kernel that is used first; `features` of the processor, `kernel`, and
        what it was run on.

    Raises:
        UsageError: the package's decoder does not run in the kernels.
    """
    decoders = {
        (kernel, precision): decoder
        for kernel in KERNELS
        for precision, decoder in _decoders(package, kernel).items()
    }
    calls = {
        (*of, threads): comparisons(NativeDecoder(*decoder, threads), package, ROWS * threads)
        for of, decoder in decoders.items()
        for threads in thread_counts(usable_cores())
    }
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for way, call in calls.items():
            call()
            began = clock()
            call()
            best[way] = min(best[way], clock() - began)
    one, _ = next(iter(decoders.values()))
    work = sum(one.shape.multiplications(one.layer_count, STEPS, PREFIX_STEPS))
    rows = [
        {
            **{"kernel": kernel, "precision": precision, "threads": threads},
            "gmac_per_s": round(1e-9 * work * threads * ROWS / seconds, 2),
            "ms": round(1e3 * seconds / (threads * ROWS), 4),
        }
        for (kernel, precision, threads), seconds in best.items()
    ]
    return {
        **{"kernel": kernel_for(package), "features": _features(), "rows": rows, "rounds": rounds},
        **run_on("numpy", "meiqa"),
    }


def device_text(result: Mapping[str, Any]) -> str:
    """Lay out the result for people; its last line says all that decides, to be sent on."""
    machine = result["machine"]
    fastest = [row for row in result["rows"] if row["kernel"] == result["kernel"]]
    figures = ", ".join(
        f"{row['precision']} x{row['threads']} {row['gmac_per_s']:.1f} GMAC/s {row['ms']:.3f} ms"
        for row in fastest
    )
    line = (
        f"meiqa {result['versions']['meiqa']} | {machine['processor']}, {machine['cores']} cores, "
        f"{' '.join(result['features']) or 'no features listed'} | {result['kernel']}: {figures}"
    )
    return f"{table_text(result['rows'], _COLUMNS)}\n\n{line}"


def _decoders(package: EnginePackage, kernel: str) -> dict[str, tuple[FusedDecoder, Projection]]:
    """Give a package's layers for a kernel, in bytes where it has such, and in floats; and what
    makes logits.
    """
    stored = stored_layers(package)
    if stored is None:
        raise UsageError(
            "the package's decoder does not run in the kernels",
            seen=str(package.path),
            hint="take the default package, which does",
        )
    layers, head = stored
    name = "bf16" if KERNELS[kernel].in_bf16 else "fp32"
    exact = {name: packed(layers.in_floats(), head, kernel)}
    rounded = any(w.scale is not None for own in layers.layers for w in own.values())
    return {"int8": packed(layers, head, kernel), **exact} if rounded else exact


def _features() -> list[str]:
    """Tell which instructions the system says that the processor has, of those that matter here,
    and on ARM the numbers of its kinds of cores.
    """
    listed = Path("/proc/cpuinfo")
    words = listed.read_text() if listed.is_file() else ""
    named = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", words, re.MULTILINE)
    known = [word for word in (named[1].split() if named else ()) if _FEATURES.fullmatch(word)]
    parts = re.findall(r"^CPU part\s*:\s*(\w+)$", words, re.MULTILINE)
    return known + [f"part {part}" for part in dict.fromkeys(parts)]
