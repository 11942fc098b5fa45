"""How fast ARM64's kernels should be, told without a device.

    python -m benchmarks.arm [--format json]

* The inner loops of the linear layers and of attention, as they were compiled: cycles by llvm-mca,
  and what share of the time the loop's products alone would take. AVX-512's of this architecture
  stand beside.
* Instructions of a comparison, counted under emulation: those of two runs less those of one. Beside
  stand its products of vectors, which nothing can do without, and what else it has to calculate.
* What that makes of a comparison on one core: cycles of the loops, and for all other instructions
  `PER_CYCLE` of them a cycle. An estimate: of caches and memory it knows nothing.

Debian's packages g++-aarch64-linux-gnu, qemu-user-static and llvm-19 have to be installed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.emulated import ARM64, EMULATOR, Program, Rows, built
from meiqa.evaluation.measuring import Column, table_text

MCA, ITERATIONS, PER_CYCLE = "llvm-mca-19", 200, 2
LAYERS, STEPS, PREFIX_STEPS = 4, 80, 80
"""Of the default model, and of a comparison of two photos of 512 x 512 pixels."""
EMULATED = {"portable": "cortex-a53", "dotprod": "cortex-a76", "i8mm": "max"}
DEVICES = {
    "Raspberry Pi 5": ("neoverse-n1", 2.4, 4),
    "Jetson Orin Nano": ("neoverse-n1", 1.5, 6),
    "Jetson AGX Orin": ("neoverse-n1", 2.2, 12),
}
"""Model of the core, GHz, cores. llvm-mca takes A76 and A78 for an A57; N1 is the A76's twin."""


@dataclass(frozen=True)
class Loop:
    """The inner loop of some products.

    Attributes:
        kernel, precision: whose; product: its instruction and how many multiplications it does.
        cores: the models of llvm-mca to ask.
    """

    kernel: str
    precision: str
    product: str
    multiplications: int
    cores: Sequence[str]
    triple: str = "aarch64"


SMALL = ("cortex-a76", "cortex-a78", "neoverse-n1", "neoverse-v1")
LOOPS = (
    Loop("dotprod", "int8", "sdot", 16, SMALL),
    Loop("i8mm", "int8", "smmla", 32, ("neoverse-v1", "neoverse-n2")),
    Loop("dotprod", "fp32", "fmla", 4, SMALL),
    Loop("avx512", "int8", "vpdpbusd.*%zmm", 64, ("znver4",), "x86_64"),
    Loop("avx512", "fp32", "vfmadd231ps.*%zmm", 16, ("znver4",), "x86_64"),
)


def listing(program: Path, tool: str) -> list[tuple[int, str]]:
    """Give all instructions of a program with their addresses."""
    words = [tool, "-d", "--no-show-raw-insn", str(program)]
    text = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    found = re.findall(r"^\s+([0-9a-f]+):\t(.*)$", text, re.MULTILINE)
    return [(int(at, 16), re.split(r"\s+(?://|# )", line)[0].strip()) for at, line in found]


def inner_loop(lines: Sequence[tuple[int, str]], product: str) -> list[str]:
    """Find the loop without a branch inside that has most of some products."""
    place = {at: index for index, (at, _) in enumerate(lines)}
    best: list[str] = []
    for index, (at, line) in enumerate(lines):
        back = re.match(r"(?:b\.\w+|j\w+)\s+([0-9a-f]+) <", line)
        if not back or not at - 2000 < (to := int(back[1], 16)) < at or to not in place:
            continue
        body = [text for _, text in lines[place[to] : index]]
        if any(re.match(r"b\.|b |bl |j|call|ret|cb", text) for text in body):
            continue
        if count(body, product) > count(best, product):
            best = body
    return best


def count(body: Sequence[str], product: str) -> int:
    """Count a loop's products."""
    return sum(bool(re.match(product, text)) for text in body)


def cycles(body: Sequence[str], core: str, triple: str) -> float:
    """Ask llvm-mca for the cycles of one turn of a loop."""
    words = [MCA, f"-mtriple={triple}", f"-mcpu={core}", f"-iterations={ITERATIONS}"]
    words += ["-mattr=+dotprod,+i8mm"] if triple == "aarch64" else []
    told = subprocess.run(
        words, input="\n".join(body) + "\n", check=True, capture_output=True, text=True
    ).stdout
    total = re.search(r"Total Cycles:\s+(\d+)", told)
    assert total, told
    return int(total[1]) / ITERATIONS


def loop_rows(programs: Mapping[str, tuple[Path, str]]) -> list[dict[str, Any]]:
    """Tell of each loop on each core: cycles a turn, and the share of its products alone."""
    lines = {triple: listing(*found) for triple, found in programs.items()}
    rows = []
    for loop in LOOPS:
        body = inner_loop(lines[loop.triple], loop.product)
        only = [text for text in body if re.match(loop.product, text)]
        for core in loop.cores:
            taken, least = cycles(body, core, loop.triple), cycles(only, core, loop.triple)
            done = len(only) * loop.multiplications
            rows.append(
                {
                    **{"kernel": loop.kernel, "precision": loop.precision, "core": core},
                    **{"products": len(only), "instructions": len(body) + 1},
                    **{"cycles": round(taken, 2), "macs_per_cycle": round(done / taken, 1)},
                    "of_peak": round(least / taken, 3),
                }
            )
    return rows


def instructions_in(log: Path) -> int:
    """Count what QEMU says that it executed: blocks, and the instructions of each."""
    executed, lengths = Counter[bytes](), Counter[bytes]()
    block: bytes | None = None
    begins = False
    with log.open("rb") as lines:
        for line in lines:
            if line.startswith(b"Trace"):
                executed[line.split(b"/", 2)[1]] += 1
            elif line.startswith(b"IN:"):
                begins = True
            elif line.startswith(b"0x"):
                if begins:
                    block, begins = b"%016x" % int(line.split(b":")[0], 16), False
                    lengths[block] = 0
                assert block
                lengths[block] += 1
    return sum(times * lengths[block] for block, times in executed.items())


def comparison() -> tuple[Any, Rows]:
    """Give the default model's layers and a comparison whose values mean nothing."""
    packages = importlib.import_module("meiqa.engine.package")
    runtime = importlib.import_module("meiqa.engine.runtime.decoder")
    assets = importlib.import_module("meiqa.locations").embedded_assets()
    decoder, _ = runtime.stored_layers(packages.EnginePackage.open(assets / "package"))
    s, rng = decoder.shape, np.random.default_rng(0)
    prefix = (len(decoder.layers), 2, s.kv_heads, PREFIX_STEPS, s.head_width)
    row = Rows(
        [rng.standard_normal((STEPS, s.width), np.float32)],
        [np.tile(np.arange(STEPS, dtype=np.float32), (3, 1))],
        [rng.standard_normal(prefix, np.float32)],
    )
    return decoder, row


def elementwise(shape: Any) -> int:
    """Count operations on single values between a comparison's products, at the least.

    A sum of codes becomes a float in 3, a code is made in 7, an exponential takes 17 and SiLU 4
    more, a softmax 3 more, a norm 3, a rotation 2.
    """
    tokens, queries = (LAYERS - 1) * STEPS, shape.heads * shape.head_width
    keys = shape.kv_heads * shape.head_width
    outputs = queries + 2 * keys + 2 * shape.width + 2 * shape.inner
    codes = 2 * shape.width + queries + shape.inner
    seen = STEPS * PREFIX_STEPS + STEPS * (STEPS + 1) // 2
    each = 3 * outputs + 7 * codes + 21 * shape.inner + 3 * 2 * shape.width + 2 * (queries + keys)
    return int(tokens * each + (LAYERS - 1) * shape.heads * seen * 20)


def instruction_rows(program: Path, folder: Path) -> list[dict[str, Any]]:
    """Tell of each kernel and precision what a comparison takes, and what it cannot do without."""
    decoder, row = comparison()
    exact = decoder.in_floats()
    linear, attention = decoder.shape.multiplications(LAYERS, STEPS, PREFIX_STEPS)
    between = elementwise(decoder.shape) // 4
    rows = []
    for kernel, precision, width in (
        ("dotprod", "int8", 16),
        ("i8mm", "int8", 32),
        ("dotprod", "fp32", 4),
        ("portable", "int8", 4),
    ):
        emulator = (EMULATOR, "-cpu", EMULATED[kernel])
        packing = Program(program, emulator).kernels()[kernel]
        log = folder / "log"
        words = (*emulator, "-d", "exec,nochain,in_asm", "-D", str(log))
        counted = []
        for times in (1, 2):
            given = decoder if precision == "int8" else exact
            Program(program, words).last_hidden(kernel, packing, given, row, times)
            counted.append(instructions_in(log))
        products = linear // width + attention // 4
        taken = counted[1] - counted[0]
        rows.append(
            {
                **{"kernel": kernel, "precision": precision, "instructions": taken},
                **{"products": products, "ideal": products + between},
                "over_ideal": round(taken / (products + between), 2),
                "over_products": round(taken / products, 2),
            }
        )
    return rows


def estimates(
    loops: Sequence[Mapping[str, Any]], counted: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Estimate a comparison on one core of each device, in milliseconds."""
    linear, attention = comparison()[0].shape.multiplications(LAYERS, STEPS, PREFIX_STEPS)
    rows = []
    for device, (core, ghz, cores) in DEVICES.items():
        by = {row["precision"]: row for row in loops if row["core"] == core}
        for precision, loop in by.items():
            found = next(
                row
                for row in counted
                if (row["kernel"], row["precision"]) == ("dotprod", precision)
            )
            spent, outside = 0.0, found["instructions"]
            for work, part in ((linear, loop), (attention, by["fp32"])):
                turns = work / (part["macs_per_cycle"] * part["cycles"])
                spent += turns * part["cycles"]
                outside -= turns * part["instructions"]
            spent += outside / PER_CYCLE
            rows.append(
                {
                    **{"device": device, "core": core, "ghz": ghz, "cores": cores},
                    **{"precision": precision, "ms": round(1e-6 * spent / ghz, 2)},
                }
            )
    return rows


def bench_arm() -> dict[str, Any]:
    """Build the kernels and ask all three."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        arm64, here = built(folder / "arm64", ARM64), built(folder / "here", {})
        loops = loop_rows(
            {
                "aarch64": (arm64, "aarch64-linux-gnu-objdump"),
                "x86_64": (here, "objdump"),
            }
        )
        counted = instruction_rows(arm64, folder)
        return {"loops": loops, "comparison": counted, "estimates": estimates(loops, counted)}


def arm_text(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Lay out the three tables for people."""
    words = ("kernel", "precision", "core", "device")
    return "\n\n".join(
        table_text(rows, [Column(key, key, "" if key in words else "g") for key in rows[0]])
        for rows in found.values()
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print its tables, or JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.arm", description=__doc__)
    parser.add_argument("--format", choices=("text", "json"), default="text")
    found = bench_arm()
    text = json.dumps(found, indent=2) if parser.parse_args(arguments).format == "json" else ""
    sys.stdout.write((text or arm_text(found)) + "\n")


if __name__ == "__main__":
    main()
