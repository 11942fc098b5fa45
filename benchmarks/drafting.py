"""Descriptions written with drafts from the memory beside plain greedy writing, in turns.

`python -m benchmarks.drafting` describes photographs both ways in one process: the time of
each, drafts' retrieval included, how many calls of the decoder it takes, and whether the texts are
the same. A photograph that the memory holds is no draft of itself.

Losing variant, measured beside: several drafts checked in one call as rows over the same prefix.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from meiqa.cli.score import demo_photos
from meiqa.engine.images import ImageSource, Pixels, fit_to_grid, load_pixels
from meiqa.engine.local import LocalModel
from meiqa.engine.model import Description, Draft, Prefix
from meiqa.engine.package import EnginePackage
from meiqa.engine.runtime import open_graphs
from meiqa.engine.runtime.decoder import Array, GraphSession
from meiqa.engine.scoring import DRAFTS
from meiqa.engine.writing import PROPOSED_TOKENS
from meiqa.errors import UsageError
from meiqa.evaluation.measuring import machine, versions
from meiqa.locations import embedded_assets
from meiqa.memory import MemoryBank, retrieval_key

__all__ = ["bench_drafting", "main", "table_text"]

_ROUNDS = 5
_ROWS = (1, 2, 4, 8)
_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})


@dataclass(frozen=True, eq=False)
class _Way:
    """One description and the milliseconds that it took."""

    made: Description
    ms: float


def bench_drafting(
    images: Path | None = None,
    *,
    package: Path | None = None,
    memory: Path | None = None,
    threads: int | None = None,
    rounds: int = _ROUNDS,
) -> dict[str, Any]:
    """Describe photographs plainly and with drafts.

    Args:
        images: a folder of photographs; those of `meiqa demo` by default, from scikit-image.
        package: engine package; memory: its memory; the embedded ones by default.
        threads: of the runtime; as many as there are cores by default.
        rounds: how often each photograph is described each way, after once as warm-up.

    Returns:
        `plain` and `drafted` with n, milliseconds, calls and accepted tokens per call; `ratio` of
        their median times; `identical`, whether text, rating and token count are the same for all;
        `key_difference`, the greatest of any entry of a key; `rows_ms`, one call that checks so
        many drafts; and what it was run on.

    Raises:
        UsageError: there are no photographs; ImageError: one of them cannot be judged.
    """
    opened = EnginePackage.open(package or embedded_assets() / "package")
    model = LocalModel.open(opened, threads=threads)
    (decoder,) = open_graphs(opened, ["decoder"], "cpu", threads)
    kept = memory or embedded_assets() / "memory"
    plain: list[_Way] = []
    drafted: list[_Way] = []
    with MemoryBank.open(kept, package_digest=opened.digest) as bank:
        for source in _sources(images):
            pixels = load_pixels(source)
            (prefix,) = model.prefill([model.encode(fit_to_grid(pixels, model.image))])
            for turn in range(rounds + 1):
                pair = _plainly(model, prefix), _with_drafts(model, bank, prefix, pixels)
                if turn:
                    plain.append(pair[0])
                    drafted.append(pair[1])
    return {
        "ratio": round(_median_ms(plain) / _median_ms(drafted), 3),
        "plain": _summary(plain),
        "drafted": _summary(drafted),
        "identical": all(_same(*pair) for pair in zip(plain, drafted, strict=True)),
        "key_difference": max(_key_gap(*pair) for pair in zip(plain, drafted, strict=True)),
        "rows_ms": _rows_ms(model, decoder, prefix, rounds),
        "settings": {"rounds": rounds, "warm_up": 1, "photographs": len(plain) // rounds},
        "machine": machine(),
        "versions": versions("onnxruntime", "numpy"),
    }


def _sources(images: Path | None) -> Sequence[ImageSource]:
    if images is None:
        return [photo for _, photo in demo_photos()]
    found = sorted(path for path in images.rglob("*") if path.suffix.lower() in _SUFFIXES)
    if not found:
        raise UsageError(
            f"there are no photographs in {images}", allowed=", ".join(sorted(_SUFFIXES))
        )
    return found


def _plainly(model: LocalModel, prefix: Prefix) -> _Way:
    began = time.perf_counter()
    made = model.describe(prefix, model.summary_tokens)
    return _Way(made, 1e3 * (time.perf_counter() - began))


def _with_drafts(model: LocalModel, bank: MemoryBank, prefix: Prefix, pixels: Pixels) -> _Way:
    snapshot = bank.snapshot()
    began = time.perf_counter()
    guess = model.unwritten_key(prefix.tokens)
    key = retrieval_key(bank.key_kind, guess, prefix.tokens.values)
    cases = snapshot.retrieve(key, DRAFTS, pixels.digest)
    drafts = [Draft(case.summary, case.score) for case in cases if case.summary]
    made = model.describe(prefix, model.summary_tokens, drafts)
    return _Way(made, 1e3 * (time.perf_counter() - began))


def _same(plain: _Way, drafted: _Way) -> bool:
    one, other = plain.made, drafted.made
    return (one.text, one.rating, one.stats.tokens, one.stats.complete, one.unreadable) == (
        *(other.text, other.rating, other.stats.tokens, other.stats.complete, other.unreadable),
    )


def _key_gap(plain: _Way, drafted: _Way) -> float:
    if plain.made.key is None or drafted.made.key is None:
        return 0.0
    return float(np.abs(plain.made.key - drafted.made.key).max())


def _median_ms(ways: Sequence[_Way]) -> float:
    return float(np.median([way.ms for way in ways]))


def _summary(ways: Sequence[_Way]) -> dict[str, float]:
    times, stats = np.array([way.ms for way in ways]), [way.made.stats for way in ways]
    calls = sum(each.calls for each in stats)
    return {
        "n": len(ways),
        **{f"p{share}_ms": round(float(np.percentile(times, share)), 3) for share in (50, 95, 99)},
        "calls": round(calls / len(ways), 2),
        "tokens": round(sum(each.tokens for each in stats) / len(ways), 2),
        "drafted_per_call": round(sum(each.drafted for each in stats) / calls, 2),
        "accepted_per_call": round(sum(each.accepted for each in stats) / calls, 2),
    }


def _rows_ms(
    model: LocalModel, decoder: GraphSession, prefix: Prefix, rounds: int
) -> dict[str, float]:
    """Median milliseconds of a first call that checks so many drafts, a row to each, in turns."""
    s, tokens = model.package.manifest.decoder, len(model.prompts.score) + PROPOSED_TOKENS
    wanted = np.arange(tokens - PROPOSED_TOKENS, tokens)
    position = np.arange(tokens, dtype=np.float32) + prefix.next_position
    times: dict[int, list[float]] = {rows: [] for rows in _ROWS}
    for _ in range(10 * rounds):
        for rows in _ROWS:
            feeds: dict[str, Array] = {
                "embeds": np.zeros((1, rows, tokens, s.embed_width), np.float32),
                "positions": np.tile(position, (3, 1, rows, 1)),
                "prefix": prefix.key_values.array[:, :, None],
                "prefix_lengths": np.array([prefix.opening.length], np.int64),
                "past": np.zeros((s.layers, 2, 1, s.kv_heads, rows, 0, s.head_dim), np.float32),
                "past_lengths": np.zeros((1, rows), np.int64),
                "logit_positions": np.tile(wanted, (1, rows, 1)),
            }
            began = time.perf_counter()
            decoder.run(feeds)
            times[rows].append(1e3 * (time.perf_counter() - began))
    return {str(rows): round(float(np.median(taken)), 3) for rows, taken in times.items()}


def table_text(result: Mapping[str, Any]) -> str:
    """Lay out what `bench_drafting` gives for people."""
    columns = ("p50_ms", "p95_ms", "p99_ms", "calls", "tokens", "accepted_per_call")
    lines: list[tuple[str, ...]] = [("", *columns)]
    lines += [(way, *(str(result[way][name]) for name in columns)) for way in ("plain", "drafted")]
    widths = [max(len(line[at]) for line in lines) for at in range(len(lines[0]))]
    table = [
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    ]
    texts = "identical" if result["identical"] else "NOT identical"
    rows = ", ".join(f"{rows}: {ms} ms" for rows, ms in result["rows_ms"].items())
    return "\n".join(
        [
            *table,
            f"{result['ratio']:.2f} times as fast, {result['plain']['n']} descriptions each,"
            f" texts {texts}",
            f"one call that checks several drafts in rows: {rows}",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print its table, or JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.drafting")
    parser.add_argument("--images", type=Path, help="a folder of photographs")
    parser.add_argument("--rounds", type=int, default=_ROUNDS)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--format", choices=("text", "json"), default="text")
    given = parser.parse_args(arguments)
    result = bench_drafting(given.images, rounds=given.rounds, threads=given.threads)
    text = json.dumps(result, indent=2) if given.format == "json" else table_text(result)
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
