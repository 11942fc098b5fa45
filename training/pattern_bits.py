"""What 8 bits would cost the patterns, and what they would bring.

    python -m meiqa.training.pattern_bits --work WORK --package PACKAGE

The package's graph of patterns is rounded by ONNX Runtime's own static quantisation, with signed
weights a channel and unsigned activations, on tokens of photographs that the patterns were trained
on; both graphs then judge the unseen ones.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from scipy.stats import spearmanr

from meiqa.engine.manifest import Graph
from meiqa.engine.package import EnginePackage
from meiqa.engine.runtime.onnx import OnnxSession
from meiqa.errors import PackageCorrupted
from meiqa.export.commands import run_command
from meiqa.training.pattern_pairs import read_views
from meiqa.training.patterns import View, views_of

CALIBRATED, EVERY = 40, 3
"""Views whose versions are observed; every which version is judged."""
REPETITIONS = 200

Feeds = dict[str, np.ndarray]


class Observed(CalibrationDataReader):  # type: ignore[misc]
    """Calls for ONNX Runtime's calibration."""

    def __init__(self, calls: Iterator[Feeds]) -> None:
        self._calls = calls

    def get_next(self) -> Feeds | None:
        """The next call, None at the end."""
        return next(self._calls, None)


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
    parser = argparse.ArgumentParser(prog="python -m meiqa.training.pattern_bits")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--package", type=Path, required=True)
    given = parser.parse_args()
    package = EnginePackage.open(given.package)
    patterns = package.manifest.patterns
    if patterns is None:
        raise PackageCorrupted("the package has no patterns", seen=given.package)
    seen, unseen = (
        [view for stored in read_views(given.work, unseen=kept) for view in views_of(stored)]
        for kept in (False, True)
    )
    path = package.path / patterns.graph.file
    report: dict[str, Any] = {"fp32": judged(path, patterns.graph, unseen)}
    with tempfile.TemporaryDirectory() as folder:
        rounded = Path(folder) / "int8.onnx"
        quantize_static(
            path,
            rounded,
            Observed(feeds for feeds, _ in calls_of(seen[:CALIBRATED])),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            weight_type=QuantType.QInt8,
            activation_type=QuantType.QUInt8,
            op_types_to_quantize=["Gemm", "MatMul"],
        )
        report["int8"] = judged(rounded, patterns.graph, unseen)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    run_command(main)
