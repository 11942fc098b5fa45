"""Descriptions written with drafts from the memory beside plain greedy writing, in turns.

    python -m benchmarks.drafting --images DIR

Each photograph is described both ways in one process: the time of each, drafts' retrieval included,
how many calls of the decoder it takes, and whether the texts are the same. A photograph that the
memory holds is no draft of itself.

Losing variant, measured beside: several drafts checked in one call as rows over the same prefix.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from benchmarks.timing import times_in_turns_ms
from meiqa.cli.score import demo_photos
from meiqa.engine.images import ImageSource, load_pixels
from meiqa.engine.local import LocalModel
from meiqa.engine.model import Model, Prefix
from meiqa.engine.package import EnginePackage
from meiqa.engine.runtime import open_graphs
from meiqa.engine.runtime.decoder import Array, GraphSession
from meiqa.engine.scoring import Scored, Scorer, ScoreRequest
from meiqa.engine.writing import PROPOSED_TOKENS
from meiqa.evaluation.measuring import Column, quantiles_ms, run_on, table_text
from meiqa.folders import gather
from meiqa.locations import embedded_assets
from meiqa.memory import MemoryBank

__all__ = ["bench_drafting", "drafting_text", "main"]

_ROUNDS = 5
_ROWS = (1, 2, 4, 8)


class _GradedOnce:
    """A model that grades the photograph at hand once: to describe it again is to write alone."""

    def __init__(self, model: LocalModel) -> None:
        self._model = model
        self._graded: Prefix | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def grade(self, prefix: Prefix) -> NDArray[np.float64]:
        if self._graded is not prefix:
            self._graded, self._grades = prefix, self._model.grade(prefix)
        return self._grades


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
        ImageError: there are no photographs, or one of them cannot be judged.
    """
    opened = EnginePackage.open(package or embedded_assets() / "package")
    model = LocalModel.open(opened, threads=threads)
    (decoder,) = open_graphs(opened, ["decoder"], "cpu", threads)
    pairs: list[tuple[Scored, Scored]] = []
    with MemoryBank.open(
        memory or embedded_assets() / "memory", package_digest=opened.digest
    ) as bank:
        snapshot = bank.snapshot()
        plainly, with_drafts = (
            Scorer(cast(Model, _GradedOnce(model)), bank, drafting=drafting)
            for drafting in (False, True)
        )
        for source in _sources(images):
            request = ScoreRequest(source, k=0, learn=False)
            for turn in range(rounds + 1):
                one, other = (
                    scorer.score(partial(load_pixels, source), request, snapshot)
                    for scorer in (plainly, with_drafts)
                )
                if turn:
                    pairs.append((one, other))
    plain, drafted = (_summary(each) for each in zip(*pairs, strict=True))
    return {
        "ratio": round(plain["p50_ms"] / drafted["p50_ms"], 3),
        "plain": plain,
        "drafted": drafted,
        "identical": all(_written(one) == _written(other) for one, other in pairs),
        "key_difference": max(float(np.abs(one.key - other.key).max()) for one, other in pairs),
        "rows_ms": _rows_ms(model, decoder, pairs[-1][0].prefix, rounds),
        "settings": {"rounds": rounds, "warm_up": 1, "photographs": len(pairs) // rounds},
        **run_on("onnxruntime", "numpy"),
    }


def _sources(images: Path | None) -> Sequence[ImageSource]:
    if images is None:
        return [photo for _, photo in demo_photos()]
    found = gather([str(images)])
    if found.failures:
        raise found.failures[0].error
    return found.photos


def _written(scored: Scored) -> tuple[object, ...]:
    """Give all that must not depend on drafts."""
    made = scored.prediction.description
    assert made is not None
    return made.text, made.rating, made.stats.tokens, made.stats.complete, made.unreadable


def _summary(ways: Sequence[Scored]) -> dict[str, float]:
    stats = [each.prediction.stats for each in ways]
    calls = sum(each.calls for each in stats)
    return {
        **quantiles_ms([each.deadline.timings_ms["describe"] for each in ways]),
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

    def feeds(rows: int) -> dict[str, Array]:
        return {
            "embeds": np.zeros((1, rows, tokens, s.embed_width), np.float32),
            "positions": np.tile(position, (3, 1, rows, 1)),
            "prefix": prefix.key_values.array[:, :, None],
            "prefix_lengths": np.array([prefix.opening.length], np.int64),
            "past": np.zeros((s.layers, 2, 1, s.kv_heads, rows, 0, s.head_dim), np.float32),
            "past_lengths": np.zeros((1, rows), np.int64),
            "logit_positions": np.tile(wanted, (1, rows, 1)),
        }

    ways = {str(rows): partial(decoder.run, feeds(rows)) for rows in _ROWS}
    times = times_in_turns_ms(ways, dict.fromkeys(ways, 10 * rounds))
    return {rows: round(float(np.median(taken)), 3) for rows, taken in times.items()}


def drafting_text(result: Mapping[str, Any]) -> str:
    """Lay out what `bench_drafting` gives for people."""
    rows = [{"way": way, **result[way]} for way in ("plain", "drafted")]
    columns = (
        Column("way", ""),
        *(Column(f"p{share}_ms", f"p{share} ms", ".1f") for share in (50, 95, 99)),
        Column("calls", "calls", ".1f"),
        Column("tokens", "tokens", ".1f"),
        Column("accepted_per_call", "accepted a call", ".2f"),
    )
    texts = "identical" if result["identical"] else "NOT identical"
    checked = ", ".join(f"{rows}: {ms} ms" for rows, ms in result["rows_ms"].items())
    return "\n".join(
        [
            table_text(rows, columns),
            f"{result['ratio']:.2f} times as fast, {result['plain']['n']} descriptions each,"
            f" texts {texts}",
            f"one call that checks several drafts in rows: {checked}",
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
    text = json.dumps(result, indent=2) if given.format == "json" else drafting_text(result)
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
