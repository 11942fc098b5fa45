"""This engine beside others with the same weights: many continuations of one prefix.

    python -m benchmarks.peers CHECKPOINT [--gguf FILE] [--package PACKAGE …] [--output FILE]
    python -m benchmarks.peers --read FILE --format markdown

Every engine reads a prefix of 300 tokens and 64 continuations of 80 tokens, for the logits behind
each, and writes 80 tokens one by one behind the prefix. The text is this documentation's. Engines
are transformers, from scratch and with its cache of the prefix; llama.cpp with the weights of FILE,
in Q4_K_M, and with these in Q8_0; OpenVINO with the graph of a package in fp32; and each PACKAGE,
by its graph in ONNX Runtime, and by the native kernel where it has the layers for it: without and
with bf16, where it allows that.

CHECKPOINT, FILE and packages should hold the same weights, as `benchmarks.real_checkpoint` makes
them of FILE. How far each one's last tokens are from transformers' stands beside its time, as the
mean Kullback-Leibler divergence in nats, so that a fast engine that is wrong shows. What is not
installed, or not given, is named.

Each runs in a process of its own. Of up to three rounds the fastest counts, in wall time and in the
processor's: cores that others use stretch the first.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from benchmarks.peer_engines import (
    Floats,
    FromScratch,
    Ids,
    LlamaCpp,
    OnDecoder,
    PeerEngine,
    WithPrefixCache,
    Work,
)
from benchmarks.processes import peak_kb
from meiqa.engine.package import EnginePackage
from meiqa.errors import UsageError, one_line
from meiqa.evaluation.measuring import Column, run_on, table_text
from meiqa.kernels.decoder import FASTEST, FASTEST_IN_BF16

__all__ = ["bars", "main", "markdown_text", "peers_of", "peers_text", "run", "text_work"]

DOCS = Path(__file__).parents[1] / "docs"
PAGES = ("decisions.md", "privacy.md", "reference-mode.md", "memory.md")
PREFIX, CONTINUATIONS, STEPS, THREADS = 300, 64, 80, 2
ROUNDS, LONG_S = 3, 60.0
"""Rounds of each engine; none begins after so many seconds."""
REFERENCE = "transformers from scratch, fp32"
OURS = "meiqa"
SMALL_KL = 0.02
LARGEST_KL = {32: 1e-3, 16: SMALL_KL, 8: SMALL_KL, 4: 0.1}
"""By the bits of a weight, up to where an engine of this project's counts."""
MANY_TIMES, MORE_TIMES, AS_FAST, ABOUT_AS_FAST = 16.0, 2.0, 1.0, 0.9
COLUMNS = (
    Column("name", "engine"),
    Column("wall_s", "wall s", ".2f"),
    Column("cpu_s", "CPU s", ".1f"),
    Column("ratio", "times as fast", ".1f"),
    Column("cpu_ratio", "by CPU", ".1f"),
    Column("written_per_s", "tokens/s", ".1f"),
    Column("kl", "KL", ".4f"),
    Column("peak_mb", "peak MB", ".0f"),
)
PACKAGES = ("numpy", "onnxruntime", "torch", "transformers", "openvino", "llama_cpp_python")
Measured = tuple[dict[str, Any], Floats]
"""The row of an engine, and its logits (N + 1, V) behind the continuations and what is written."""


@dataclass(frozen=True)
class Peer:
    """An engine that may be measured.

    Attributes:
        bits: of a weight, about.
        needs: modules that it imports.
        open: gives the engine for some work; can be sent to another process.
    """

    name: str
    bits: int
    needs: tuple[str, ...]
    open: Callable[[Work], PeerEngine]


def peers_of(checkpoint: Path, gguf: Path | None, packages: Sequence[Path]) -> Iterator[Peer]:
    """Name the engines that can be made of what is given, what others are compared with first."""
    torch = ("torch", "transformers")
    yield Peer(REFERENCE, 32, torch, partial(FromScratch, checkpoint))
    name = "transformers with its prefix cache, fp32"
    yield Peer(name, 32, torch, partial(WithPrefixCache, checkpoint))
    if gguf is not None:
        llama = ("llama_cpp",)
        yield Peer("llama.cpp, Q4_K_M", 4, llama, partial(LlamaCpp, gguf))
        yield Peer("llama.cpp, Q8_0", 8, llama, partial(LlamaCpp.in_q8_0, gguf))
    for folder in packages:
        manifest = EnginePackage.open(folder).manifest
        precision = manifest.precision
        bits = {"fp32": 32, "fp16": 16, "int8": 8, "int4": 4}[precision]
        if precision == "fp32":
            for computed, width in (("f32", 32), ("bf16", 16)):
                opened = partial(OnDecoder.by_openvino, folder, computed)
                yield Peer(f"OpenVINO, {computed}", width, ("openvino",), opened)
        yield Peer(f"{OURS} {precision}, graph", bits, (), partial(OnDecoder.by_graph, folder))
        kernels = {"native": FASTEST} | ({"native, bf16": FASTEST_IN_BF16} if manifest.bf16 else {})
        for way, kernel in kernels.items():
            opened = partial(OnDecoder.natively, folder, kernel)
            yield Peer(f"{OURS} {precision}, {way}", bits, (), opened)


def text_work(checkpoint: Path, prefix: int, continuations: int, steps: int, threads: int) -> Work:
    """Cut pages of the documentation into a prefix and so many continuations of it.

    Raises:
        UsageError: they are too short.
    """
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    text = "\n".join((DOCS / page).read_text() for page in PAGES)
    ids: Ids = np.array(tokenizer.encode(text, add_special_tokens=False).ids, np.int64)
    wanted = prefix + continuations * steps
    if len(ids) < wanted:
        raise UsageError("the documentation has too few tokens", seen=wanted, allowed=len(ids))
    return Work(ids[:prefix], ids[prefix:wanted].reshape(continuations, steps), threads)


def measured(peer: Peer, work: Work) -> Measured:
    """Measure an engine in this process."""
    engine = peer.open(work)
    logits, rounds = timed(engine.score)
    written, writing = timed(engine.writer())
    wall_s, cpu_s = (min(times) for times in zip(*rounds, strict=True))
    row = {
        "name": peer.name,
        "bits": peer.bits,
        "wall_s": wall_s,
        "cpu_s": cpu_s,
        "written_per_s": work.continuations.shape[1] / min(wall for wall, _ in writing),
        "peak_mb": peak_kb() / 1e3,
        "rounds": rounds,
    }
    return row, np.vstack([logits, written])


def timed(call: Callable[[], Floats]) -> tuple[Floats, list[tuple[float, float]]]:
    """Call some times; what it gave at last, and the seconds by the wall and of the processor."""
    taken: list[tuple[float, float]] = []
    while len(taken) < ROUNDS and sum(wall for wall, _ in taken) < LONG_S:
        began = time.perf_counter(), time.process_time()
        found = call()
        taken.append((time.perf_counter() - began[0], time.process_time() - began[1]))
    return found, taken


def divergence(wanted: Floats, found: Floats) -> float:
    """Give the mean Kullback-Leibler divergence of distributions from the wanted ones, in nats."""
    exact, made = (log_softmax(logits.astype(np.float64)) for logits in (wanted, found))
    return float((np.exp(exact) * (exact - made)).sum(-1).mean())


def log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Give log-probabilities of logits (N, V)."""
    below: NDArray[np.float64] = logits - logits.max(-1, keepdims=True)
    found: NDArray[np.float64] = below - np.log(np.exp(below).sum(-1, keepdims=True))
    return found


def run(peers: Iterable[Peer], work: Work, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure one engine after the other, each in a process of its own.

    Returns:
        `rows` of those that were measured, and `missing`: why others were not.
    """
    rows: list[dict[str, Any]] = []
    missing: dict[str, str] = {}
    exact: Floats | None = None
    for peer in peers:
        absent = [module for module in peer.needs if find_spec(module) is None]
        if absent:
            missing[peer.name] = f"no {' and no '.join(absent)} installed"
            continue
        say(peer.name)
        try:
            row, logits = in_a_process(partial(measured, peer, work))
        except Exception as error:  # of a peer's own, or the process was killed
            missing[peer.name] = f"{type(error).__name__}: {one_line(str(error))}"
            continue
        if peer.name == REFERENCE:
            exact = logits
        rows.append(row if exact is None else {**row, "kl": divergence(exact, logits)})
    return {"rows": with_ratios(rows), "missing": missing}


def in_a_process(
    call: Callable[[], tuple[dict[str, Any], Floats]],
) -> tuple[dict[str, Any], Floats]:
    """Call in a new process, whose memory and threads are its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as beside:
        return beside.submit(call).result()


def with_ratios(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Say of each row how many times as fast it is as transformers from scratch."""
    base = next((row for row in rows if row["name"] == REFERENCE), None)
    if base is None:
        return [*rows]
    keys = {"ratio": "wall_s", "cpu_ratio": "cpu_s"}
    return [{**row, **{k: base[of] / row[of] for k, of in keys.items()}} for row in rows]


@dataclass(frozen=True)
class Bar:
    """What is to be reached: at least so many times as fast, in reading or in writing."""

    what: str
    wanted: float
    found: float

    @property
    def text(self) -> str:
        """One line about it."""
        met = "met" if self.found >= self.wanted else "MISSED"
        return f"{self.what}: {self.found:.2f}x, wanted {self.wanted:g}x: {met}"


def bars(rows: Sequence[Mapping[str, Any]]) -> Iterator[Bar]:
    """Compare this project's best rows with the others; what was not measured is left out."""

    def fastest(chosen: Iterable[Mapping[str, Any]], key: str = "ratio") -> float:
        return max((row[key] for row in chosen), default=math.nan)

    ours = [
        row
        for row in rows
        if row["name"].startswith(OURS) and "ratio" in row and row["kl"] <= LARGEST_KL[row["bits"]]
    ]
    others = [row for row in rows if not row["name"].startswith(OURS) and "ratio" in row]
    small = fastest(row for row in ours if row["bits"] == 8)
    whole = fastest(row for row in ours if row["bits"] == 32)
    found = [
        Bar(f"INT8, KL <= {SMALL_KL}, beside every other", MORE_TIMES, small / fastest(others)),
        Bar(f"INT8, KL <= {SMALL_KL}, beside {REFERENCE}", MANY_TIMES, small),
        Bar(
            "fp32 beside the best other in fp32",
            AS_FAST,
            whole / fastest(row for row in others if row["bits"] == 32),
        ),
    ]
    for bits in (8, 4):
        own, other = (
            fastest((row for row in each if row["bits"] == bits), "written_per_s")
            for each in (ours, others)
        )
        what = f"writing in {bits} bits beside llama.cpp"
        found.append(Bar(what, ABOUT_AS_FAST, own / other))
    return (bar for bar in found if not math.isnan(bar.found))


def peers_text(report: Mapping[str, Any]) -> str:
    """Lay out the report for people."""
    missing = [f"{name}: not measured, {why}" for name, why in report["missing"].items()]
    reached = [bar.text for bar in bars(report["rows"])]
    return "\n".join([table_text(report["rows"], COLUMNS), *missing, "", *reached])


def markdown_text(report: Mapping[str, Any]) -> str:
    """Lay out the rows as a table of a document."""
    lines = [[column.heading for column in COLUMNS], ["---"] * len(COLUMNS)]
    for row in report["rows"]:
        cells = ((row.get(column.key), column.form) for column in COLUMNS)
        lines.append(["" if value is None else format(value, form) for value, form in cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


LAYOUTS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "text": peers_text,
    "markdown": markdown_text,
    "json": partial(json.dumps, indent=2),
}


def report_of(given: argparse.Namespace) -> Mapping[str, Any]:
    """Measure what is given."""
    lengths = {"prefix": given.prefix, "continuations": given.continuations, "steps": given.steps}
    work = text_work(given.checkpoint, **lengths, threads=given.threads)

    def say(step: str) -> None:
        sys.stderr.write(f"{step}\n")

    peers = peers_of(given.checkpoint, given.gguf, given.package)
    installed = [name for name in PACKAGES if find_spec(name.removesuffix("_python"))]
    return {
        "settings": {**lengths, "threads": given.threads, "text": PAGES},
        **run(peers, work, say),
        **run_on(*installed),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, or read what was measured, and print it."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, nargs="?", help="of Qwen2.5-VL's architecture")
    parser.add_argument("--gguf", type=Path, help="the same weights for llama.cpp, in Q4_K_M")
    parser.add_argument("--package", type=Path, action="append", default=[], help="may be repeated")
    parser.add_argument("--prefix", type=int, default=PREFIX, help="tokens of it")
    parser.add_argument("--continuations", type=int, default=CONTINUATIONS, help="how many")
    parser.add_argument("--steps", type=int, default=STEPS, help="tokens of a continuation")
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--format", choices=LAYOUTS, default="text")
    parser.add_argument("--output", type=Path, help="a file for the report, in JSON")
    parser.add_argument("--read", type=Path, help="print this report in place of measuring")
    given = parser.parse_args(arguments)
    if (given.checkpoint is None) == (given.read is None):
        parser.error("give CHECKPOINT or --read FILE")
    report = json.loads(given.read.read_text()) if given.read else report_of(given)
    if given.output is not None:
        given.output.write_text(json.dumps(report, indent=2) + "\n")
    sys.stdout.write(LAYOUTS[given.format](report) + "\n")


if __name__ == "__main__":
    main()
