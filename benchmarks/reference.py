"""The reference mode on photographs that nobody trained on, under KADID-10k's distortions.

    python -m benchmarks.reference --data DATA [--package PACKAGE]

Every photograph is distorted by every type at every level. What people gave KADID's images of that
type and level, on average, is what the scores are compared with: of the patterns without a
reference, beside the untouched photograph, beside a mildly distorted one and beside ever worse
ones; of PSNR, SSIM and MS-SSIM beside the untouched and the mildly distorted one.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.ladder import MIDDLE, TWO_SIDED, images_of, photographs_of
from benchmarks.similarity import METRICS, similarities
from meiqa.engine.engine import opened_model
from meiqa.engine.images import fit_to_grid, load_pixels
from meiqa.engine.local import LocalModel
from meiqa.engine.model import VisualTokens
from meiqa.engine.package import EnginePackage
from meiqa.engine.patterns import PatternScore, PatternScorer, required
from meiqa.evaluation.measuring import Column, run_on, table_text
from meiqa.evaluation.metrics import srcc
from meiqa.locations import embedded_assets
from training.distortions import KINDS, kadid_scores

__all__ = ["bench_reference", "main", "reference_text"]

Floats = NDArray[np.float64]
MILD_SCORE = 3.6
"""A reference is mildly distorted when people give its distortion at least so much."""
RUNGS = (1.0, 2.0, 3.0, 4.0, 5.0)
"""Edges of the ladder of reference quality: what people give the reference's distortion."""
LADDER_REFERENCES = 3
"""References of every quality that a distorted photograph is put beside."""
SCORES = ("alone", "beside", "hybrid", "degraded_beside", "degraded_hybrid")


@dataclass(frozen=True, eq=False)
class Seen:
    """One photograph under V distortions; everything (V,) but the ladder.

    Attributes:
        scores: by name, of `SCORES`, `METRICS` and "degraded_" metrics.
        weights, degraded_weights: the gate beside the untouched and the mild reference.
        named: index of the likeliest kind, 0 for none; listed: whether the true one is listed.
        ladder: (n, 4) quality of the reference, gate, hybrid score, and what people gave.
    """

    scores: dict[str, Floats]
    weights: Floats
    degraded_weights: Floats
    named: NDArray[np.int64]
    listed: NDArray[np.bool_]
    ladder: Floats


@dataclass(frozen=True, eq=False)
class Distorted:
    """The V distortions: their types, levels, strengths and KADID's mean scores, (V,)."""

    kinds: NDArray[np.int64]
    strengths: NDArray[np.int64]
    wanted: Floats

    @classmethod
    def of(cls, table: Floats) -> Distorted:
        """All types at all levels, in the order of `images_of`; human scores (25, 5)."""
        kinds, levels = (np.indices(table.shape) + 1).reshape(2, -1)
        strengths = np.where(np.isin(kinds, TWO_SIDED), np.abs(levels - MIDDLE), levels)
        return cls(np.where(strengths > 0, kinds, 0), strengths, table.ravel())


def bench_reference(
    package: Path, photographs: Sequence[Path], table: Floats, workers: int = 1
) -> dict[str, Any]:
    """Judge photographs under every distortion.

    Args:
        package: An engine package with patterns.
        photographs: P that nothing was trained on.
        table: KADID's mean scores by type and level, (25, 5).
        workers: Processes.

    Returns:
        JSON-ready: photographs, images; srcc (of each score with KADID's, over all images),
        within (the mean of that within each photograph), types (by type), gate (mean weight of the
        reference: untouched, mild), ladder (by the reference's quality: weight and srcc), naming
        (shares named first and listed, both of strengths 3 and more too, and with nothing listed
        where nothing was done), bars, seconds, machine, versions.
    """
    distorted = Distorted.of(table)
    started = time.perf_counter()
    with ProcessPoolExecutor(workers) as pool:
        seen = list(pool.map(partial(judged, package, distorted), photographs))
    seconds = time.perf_counter() - started
    return {
        "photographs": len(seen),
        "images": len(seen) * len(distorted.wanted),
        **agreement(seen, distorted),
        **naming(seen, distorted),
        "seconds": round(seconds, 1),
        "patterns": EnginePackage.open(package).manifest.every_graph["patterns"].file,
        **run_on("numpy", "onnxruntime", "scikit-image"),
    }


def judged(package: Path, distorted: Distorted, photograph: Path) -> Seen:
    """Put every distorted version of a photograph beside its references."""
    model, judge = judges(package)
    images = list(images_of(photograph, KINDS))
    tokens = [model.encode(fit_to_grid(load_pixels(image), model.image)) for image in images]
    clean, versions_ = images[0], images[1:]
    mild = np.flatnonzero((distorted.wanted >= MILD_SCORE) & (distorted.kinds > 0))
    rng = np.random.default_rng(int(load_pixels(photograph).digest[:16], 16))
    beside = rng.choice(mild, len(versions_))
    with_clean = [opinion(judge, t, tokens[0]) for t in tokens[1:]]
    with_mild = [opinion(judge, t, tokens[1 + j]) for t, j in zip(tokens[1:], beside, strict=True)]
    alone = [judge.judge(t) for t in tokens[1:]]
    plain = [similarities(image, clean) for image in versions_]
    from_mild = [
        similarities(image, versions_[j]) for image, j in zip(versions_, beside, strict=True)
    ]
    names = kind_names(package)
    listed = [
        (names[kind] in {d.kind for d in o.distortions}) if kind else not o.distortions
        for o, kind in zip(alone, distorted.kinds, strict=True)
    ]
    return Seen(
        scores={
            "alone": np.array([o.score for o in alone]),
            "beside": np.array([o.full_reference for o in with_clean]),
            "hybrid": np.array([o.score for o in with_clean]),
            "degraded_beside": np.array([o.full_reference for o in with_mild]),
            "degraded_hybrid": np.array([o.score for o in with_mild]),
            **{m: np.array([p[m] for p in plain]) for m in METRICS},
            **{f"degraded_{m}": np.array([p[m] for p in from_mild]) for m in METRICS},
        },
        weights=np.array([o.weight for o in with_clean]),
        degraded_weights=np.array([o.weight for o in with_mild]),
        named=np.array([judge.judge(t).probabilities.argmax() for t in tokens[1:]]),
        listed=np.array(listed),
        ladder=ladder_of(judge, tokens, distorted, rng),
    )


def ladder_of(
    judge: PatternScorer,
    tokens: Sequence[VisualTokens],
    distorted: Distorted,
    rng: np.random.Generator,
) -> Floats:
    """Random distorted versions beside references of every quality."""
    rows = []
    for low, high in pairwise(RUNGS):
        worse = np.flatnonzero((distorted.wanted >= low) & (distorted.wanted < high))
        for at, wanted in enumerate(distorted.wanted):
            for j in rng.choice(worse, LADDER_REFERENCES):
                found = opinion(judge, tokens[1 + at], tokens[1 + j])
                rows.append((distorted.wanted[j], found.weight, found.score, wanted))
    return np.array(rows)


def opinion(judge: PatternScorer, photo: VisualTokens, reference: VisualTokens) -> PatternScore:
    """What the engine says: two photos that are the same are never compared."""
    if np.array_equal(photo.values, reference.values):
        return judge.identical(photo)
    return judge.judge(photo, reference)


@cache
def judges(package: Path) -> tuple[LocalModel, PatternScorer]:
    """The package's model and patterns on one thread of this process."""
    model, patterns = opened_model(EnginePackage.open(package), "cpu", 1)
    return model, required(patterns)


def kind_names(package: Path) -> tuple[str, ...]:
    """What the package calls the kinds of distortion."""
    patterns = EnginePackage.open(package, verify=False).manifest.patterns
    assert patterns is not None
    return patterns.kinds


def agreement(seen: Sequence[Seen], distorted: Distorted) -> dict[str, Any]:
    """How the scores go with people's, and the gate with the reference."""
    names = list(seen[0].scores)
    scores = {name: np.stack([one.scores[name] for one in seen]) for name in names}
    wanted = np.tile(distorted.wanted, (len(seen), 1))
    pooled = {name: srcc(scores[name].ravel(), wanted.ravel()) for name in names}
    within = {
        name: float(np.mean([srcc(row, distorted.wanted) for row in scores[name]]))
        for name in names
    }
    types = []
    for kind in KINDS:
        here = np.s_[:, 5 * (kind.number - 1) : 5 * kind.number]
        row = {name: srcc(scores[name][here].ravel(), wanted[here].ravel()) for name in names}
        types.append({"type": kind.number, "name": kind.name, **row})
    ladder = np.concatenate([one.ladder for one in seen])
    rungs = []
    for low, high in pairwise(RUNGS):
        rung = ladder[(ladder[:, 0] >= low) & (ladder[:, 0] < high)]
        rungs.append(
            {
                "reference": f"{low:.0f}-{high:.0f}",
                "weight": float(rung[:, 1].mean()),
                "hybrid": srcc(rung[:, 2], rung[:, 3]),
            }
        )
    best = max(pooled[metric] for metric in METRICS)
    return {
        "srcc": pooled,
        "within": within,
        "types": types,
        "gate": {
            "untouched": float(np.mean([one.weights for one in seen])),
            "mild": float(np.mean([one.degraded_weights for one in seen])),
        },
        "ladder": rungs,
        "bars": {
            "hybrid over best of PSNR, SSIM, MS-SSIM (0.03)": pooled["hybrid"] - best,
            "hybrid over alone (0.03)": pooled["hybrid"] - pooled["alone"],
            "alone (0.75)": pooled["alone"],
        },
    }


def naming(seen: Sequence[Seen], distorted: Distorted) -> dict[str, Any]:
    """How often the kind that was applied is named."""
    named = np.stack([one.named for one in seen])
    right = named == distorted.kinds
    listed = np.stack([one.listed for one in seen])
    strong = distorted.strengths >= 3
    return {
        "naming": {
            "first": float(right.mean()),
            "listed": float(listed.mean()),
            "first_of_strong": float(right[:, strong].mean()),
            "listed_of_strong": float(listed[:, strong].mean()),
            "nothing_of_undistorted": float(listed[:, distorted.kinds == 0].mean()),
        }
    }


_COLUMNS = (
    Column("name", "score"),
    Column("srcc", "SRCC", ".3f"),
    Column("within", "within a photo", ".3f"),
)


def reference_text(report: dict[str, Any]) -> str:
    """Lay out the report of `bench_reference` as tables."""
    rows = [
        {"name": name, "srcc": value, "within": report["within"][name]}
        for name, value in report["srcc"].items()
    ]
    lines = [f"{report['images']} images of {report['photographs']} photographs", ""]
    lines += [table_text(rows, _COLUMNS), ""]
    lines += [
        f"reference {rung['reference']}: weight {rung['weight']:.2f}, hybrid {rung['hybrid']:.3f}"
        for rung in report["ladder"]
    ]
    lines += [f"{name}: {value:.3f}" for name, value in report["gate"].items()]
    lines += [f"named {name}: {value:.1%}" for name, value in report["naming"].items()]
    lines += [f"{name}: {value:+.3f}" for name, value in report["bars"].items()]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print its tables, or JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reference", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="with pristine/ and labels/")
    parser.add_argument("--package", type=Path, default=embedded_assets() / "package")
    parser.add_argument("--limit", type=int, help="the first so many photographs")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--format", choices=("text", "json"), default="text")
    given = parser.parse_args(arguments)
    pristine = given.data / "pristine"
    photographs = photographs_of(pristine / "images", pristine / "index.csv")[: given.limit]
    table = kadid_scores(given.data / "labels" / "KADID-10k.txt").astype(np.float64)
    report = bench_reference(given.package, photographs, table, given.workers)
    as_json = given.format == "json"
    text = json.dumps(report, indent=2) if as_json else reference_text(report)
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
