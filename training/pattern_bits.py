"""What 8 bits cost the patterns, and what they bring.

    python -m training.pattern_bits --work WORK --patterns FILE --package PACKAGE

The patterns as they were trained, and as they are in the package, judge the photographs that
nothing was trained on.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
from scipy.stats import spearmanr

from meiqa.engine.manifest import Graph
from meiqa.engine.package import EnginePackage
from meiqa.engine.runtime.onnx import OnnxSession
from meiqa.errors import PackageCorrupted
from meiqa.export.patterns import TrainedPatterns, pattern_graph
from training.commands import run_command
from training.pattern_pairs import read_views
from training.patterns import View, views_of

EVERY = 3
"""Every which version is judged."""
REPETITIONS = 200

Feeds = dict[str, np.ndarray]


def calls_of(views: Sequence[View]) -> Iterator[tuple[Feeds, float]]:
    """Versions beside the untouched one, with KADID's score."""
    for view in views:
        whole = [i for i in view.whole if view.named[i, 0] > 0]
        for index in whole[::EVERY]:
            tokens, reference = (view.tokens[i].float().numpy() for i in (index, view.clean))
            yield {"tokens": tokens, "reference": reference}, float(view.scores[index])


def judged(path: Path, graph: Graph, views: Sequence[View]) -> dict[str, float]:
    """Rank correlations with KADID's scores, milliseconds of a call, and bytes of the file."""
    session = OnnxSession(path.parent, replace(graph, file=path.name), "cpu", 1)
    rows = []
    for feeds, wanted in calls_of(views):
        alone, beside, weight = session.run(feeds)["scores"]
        rows.append((wanted, alone, weight * beside + (1 - weight) * alone))
    wanted, alone, hybrid = np.array(rows).T
    feeds = {"tokens": np.ones((64, feeds["tokens"].shape[1]), np.float32)}
    feeds["reference"] = feeds["tokens"]
    times = []
    for _ in range(REPETITIONS):
        started = time.perf_counter()
        session.run(feeds)
        times.append(1e3 * (time.perf_counter() - started))
    return {
        "alone": float(spearmanr(alone, wanted).statistic),
        "hybrid": float(spearmanr(hybrid, wanted).statistic),
        "ms": float(np.median(times)),
        "bytes": path.stat().st_size,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m training.pattern_bits")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--patterns", type=Path, required=True)
    parser.add_argument("--package", type=Path, required=True)
    given = parser.parse_args()
    package = EnginePackage.open(given.package)
    patterns = package.manifest.patterns
    if patterns is None:
        raise PackageCorrupted("the package has no patterns", seen=given.package)
    unseen = [view for stored in read_views(given.work, unseen=True) for view in views_of(stored)]
    with tempfile.TemporaryDirectory() as folder:
        floats = Path(folder) / "floats.onnx"
        ir.save(pattern_graph(TrainedPatterns.load(given.patterns).module), floats)
        report = {
            "trained": judged(floats, patterns.graph, unseen),
            "package": judged(package.path / patterns.graph.file, patterns.graph, unseen),
        }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    run_command(main)
