"""Options over one image at once, and each from scratch: how far apart, and how long it takes.

    python -m benchmarks.options [--package DIR] [--options N] [--out FILE]

One photo of noise, N options of one word and N of several, and N second pictures for a question
about two. "at once" is one call over the prefix that is kept; "each alone" asks the same of the
prefix option by option; "from scratch" reads the prompt for each option anew, as a server does that
has no prefixes. All of them start from visual tokens. Times are medians of calls taken in turns.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.timing import times_in_turns_ms
from meiqa.engine.local import LocalModel
from meiqa.engine.model import Asked, Prefix
from meiqa.engine.package import EnginePackage
from meiqa.evaluation.measuring import run_on
from meiqa.locations import embedded_assets

ROUNDS = {"at once": 9, "each alone": 5, "from scratch": 3}
WORDS = ["dark", "bright", "soft", "sharp", "noisy", "clean"]
LogProbabilities = NDArray[np.float64]


def questions(model: LocalModel, count: int) -> dict[str, list[Asked]]:
    """Give what is asked, by name: N options of one question, or a question about N pairs."""
    reply, pixels = model.family.reply, photos(model, count + 1)
    text = f"How is it?{reply}"
    single = tuple(map(chr, range(33, 33 + count)))
    several = tuple(f"{one} and {other}" for one in WORDS for other in WORDS)[:count]
    verdicts = model.family.verdicts
    seconds = [Asked(model.family.compare, verdicts, model.encode(p)) for p in pixels[1:]]
    one = {f"{count} options of one token": single, f"{count} options of several tokens": several}
    return {name: [Asked(text, each)] for name, each in one.items()} | {f"{count} pairs": seconds}


def photos(model: LocalModel, count: int) -> NDArray[np.uint8]:
    """Give noise of the largest square that the model sees."""
    side = int(model.image.max_pixels**0.5) // model.image.cell_pixels * model.image.cell_pixels
    made = np.random.default_rng(0).integers(0, 256, (count, side, side, 3))
    return made.astype(np.uint8)


def ways(
    model: LocalModel, prefix: Prefix, asked: Sequence[Asked]
) -> dict[str, Callable[[], LogProbabilities]]:
    """Give the three ways to the log-probabilities of all options."""
    singles = [Asked(a.text, (option,), a.second) for a in asked for option in a.options]

    def at_once() -> LogProbabilities:
        return np.concatenate(model.log_probabilities([prefix], asked))

    def each_alone() -> LogProbabilities:
        return np.concatenate([model.log_probabilities([prefix], [one])[0] for one in singles])

    def from_scratch() -> LogProbabilities:
        alone = [(model.prefill([prefix.tokens]), [single]) for single in singles]
        return np.concatenate([model.log_probabilities(*one)[0] for one in alone])

    return {"at once": at_once, "each alone": each_alone, "from scratch": from_scratch}


def report(package: Path, count: int) -> dict[str, Any]:
    """Measure everything; ratios are of the medians of one run."""
    model = LocalModel.open(EnginePackage.open(package, verify=False))
    (prefix,) = model.prefill([model.encode(photos(model, 1)[0])])
    rows = []
    for name, asked in questions(model, count).items():
        called = ways(model, prefix, asked)
        wanted = called["from scratch"]()
        apart = max(float(np.abs(way() - wanted).max()) for way in called.values())
        times = {n: median(t) for n, t in times_in_turns_ms(called, ROUNDS).items()}
        ratios = {f"{n} / at once": t / times["at once"] for n, t in times.items()}
        rows.append({"asked": name, "largest_difference": apart, "ms": times, **ratios})
    return {"rows": rows, "package": model.digest, **run_on("numpy", "onnxruntime")}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table, and write the report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.options", description=__doc__)
    parser.add_argument("--package", type=Path, default=embedded_assets() / "package")
    parser.add_argument("--options", type=int, default=32)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    found = report(given.package, given.options)
    print("| asked | at once, ms | each alone | from scratch | largest difference |")
    print("|---|---|---|---|---|")
    for row in found["rows"]:
        alone, scratch = (row[f"{name} / at once"] for name in ("each alone", "from scratch"))
        cells = f"{row['ms']['at once']:.1f} | {alone:.1f}x | {scratch:.1f}x"
        print(f"| {row['asked']} | {cells} | {row['largest_difference']:.1e} |")
    if given.out is not None:
        given.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
