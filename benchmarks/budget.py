"""How late answers are under budgets from 50 ms to 5 s, and what these buy.

Each budget has an engine of its own, whose caches are empty. The clock starts with the call, so
decoding counts; what an engine does once, with its first photo under a budget, does not.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from meiqa.benchmarks.machine import machine, versions
from meiqa.benchmarks.photographs import photographs_in
from meiqa.benchmarks.timing import quantiles_ms
from meiqa.engine.pipeline import Engine
from meiqa.types import Budget

__all__ = ["BUDGETS_MS", "bench_budget", "main", "table_text"]

BUDGETS_MS = (50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0)
PHOTOS = 100
WARM_UP = 3
_ALLOWED = 1.1


def bench_budget(
    open_engine: Callable[[], Engine],
    budgets_ms: Sequence[float] = BUDGETS_MS,
    *,
    photos: int = PHOTOS,
    images: Path | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Score photos under each budget.

    Args:
        open_engine: Opens an engine; it is closed again.
        budgets_ms: The budgets.
        photos: How many are timed under each.
        images: A directory of photographs; made ones of 1024 x 768 if it is None.
        seed: Of the made ones.

    Returns:
        `rows` of budget_ms, n, p50_ms, p95_ms, p99_ms, max_ms, late (p99 over the budget), k (the
        median number of neighbours asked about) and left_out (how often what was named); `in_time`,
        whether each p99 is at most 10 % over; and what it was run on.
    """
    rows: list[dict[str, Any]] = []
    for number, budget_ms in enumerate(budgets_ms):
        given = list(photographs_in(images, photos + WARM_UP, seed + 10_000 * number))
        times, asked, left_out = [], [], Counter[str]()
        with open_engine() as engine:
            for index, photo in enumerate(given):
                began = time.perf_counter()
                result = engine.score(
                    photo if isinstance(photo, bytes) else str(photo),
                    budget=Budget(ms=budget_ms),
                    learn=False,
                )
                elapsed_ms = 1e3 * (time.perf_counter() - began)
                if index >= WARM_UP:
                    times.append(elapsed_ms)
                    asked.append(sum(n.preference is not None for n in result.neighbours))
                    left_out.update(result.degraded)
        summed = quantiles_ms(times)
        rows.append(
            {
                "budget_ms": budget_ms,
                **summed,
                "max_ms": round(max(times), 3),
                "late": round(summed["p99_ms"] / budget_ms, 3),
                "k": float(np.median(asked)),
                "left_out": dict(left_out.most_common()),
            }
        )
    return {
        "rows": rows,
        "in_time": all(row["late"] <= _ALLOWED for row in rows),
        "settings": {
            "photos": photos,
            "images": "made, 1024 x 768" if images is None else str(images.name),
            "warm_up": WARM_UP,
            "seed": seed,
        },
        "machine": machine(),
        "versions": versions("numpy", "onnxruntime", "pillow", "meiqa"),
    }


def table_text(result: dict[str, Any]) -> str:
    """Lay out the rows for people."""
    lines = [f"{'budget ms':>10}{'p50 ms':>10}{'p99 ms':>10}{'late':>7}{'k':>5}  left out"]
    for row in result["rows"]:
        left = "; ".join(f"{what} ({times})" for what, times in row["left_out"].items())
        lines.append(
            f"{row['budget_ms']:10.0f}{row['p50_ms']:10.1f}{row['p99_ms']:10.1f}"
            f"{row['late']:7.2f}{row['k']:5.0f}  {left[:70]}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the rows."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS_MS, metavar="MS")
    parser.add_argument("--photos", type=int, default=PHOTOS)
    parser.add_argument("--images", type=Path, metavar="DIR")
    parser.add_argument("--memory", metavar="DIR")
    parser.add_argument("--format", choices=("text", "json"), default="text")
    options = parser.parse_args(argv)
    result = bench_budget(
        lambda: Engine.open(memory=options.memory, learn=False),
        options.budgets,
        photos=options.photos,
        images=options.images,
    )
    as_json = options.format == "json"
    sys.stdout.write((json.dumps(result, indent=2) if as_json else table_text(result)) + "\n")


if __name__ == "__main__":
    main()
