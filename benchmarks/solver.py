"""Thurstone scaling: our kernels, the naive twin, NumPy, SciPy and choix on the same votes.

Two problems. *Photos*: each photo is solved alone against 32 neighbours of known score. Rivals
are Newton's method in NumPy over the whole batch, the same equations with stable functions and
the same stopping rule, in the faster of two formulations; and SciPy's `brentq`, photo by photo,
on a part of the batch, its time scaled up. *Items*: 100 items are scaled jointly from 3,200 votes
among them. choix's regularised Newton method (`opt_pairwise`), which solves the same kind of
problem, is the rival of the ratio; its other ways to an answer stand beside it. They fit
Bradley-Terry instead of Thurstone (but `ep_pairwise`, which approximates Thurstone's posterior),
so scores are compared by their correlation.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq, minimize
from scipy.special import erfcx, log_ndtr, ndtr

from benchmarks.timing import times_in_turns_ms
from meiqa.evaluation.measuring import quantiles_ms, run_on
from meiqa.kernels.thurstone import thurstone_joint, thurstone_map

__all__ = ["bench_solver", "main", "table_text"]

Floats = NDArray[np.float64]
Photos = tuple[Floats, Floats, Floats, Floats]
Hazards = Callable[[Floats], tuple[Floats, Floats]]

SIGMA, LAM = 0.6, 0.5
PHOTOS, NEIGHBOURS = 10_000, 32
ITEMS, VOTES = 100, 3_200
ROUNDS = 15
_BRENT_PHOTOS = 100
_LAST_STEP = 1e-8
_MAX_STEPS = 50


def bench_solver(
    photos: int = PHOTOS,
    neighbours: int = NEIGHBOURS,
    items: int = ITEMS,
    votes: int = VOTES,
    *,
    rounds: int = ROUNDS,
    seed: int = 0,
) -> dict[str, Any]:
    """Compare the solvers.

    Returns:
        `ratios`: times of the rivals over ours, medians of one run (vs_numpy, vs_scipy, vs_choix);
        `rows` with the times of each; `agreement`, the largest difference between answers; and
        what it was run on.
    """
    alone = _photos_row(photos, neighbours, rounds, seed)
    together = _items_row(items, votes, rounds, seed)
    return {
        "ratios": {**alone.pop("ratios"), **together.pop("ratios")},
        "photos": alone,
        "items": together,
        "settings": {
            **{"photos": photos, "neighbours": neighbours, "items": items, "votes": votes},
            **{"sigma": SIGMA, "lam": LAM, "rounds": rounds, "seed": seed, "warm_up": 1},
        },
        **run_on("numpy", "scipy", "choix"),
    }


def _photos_row(photos: int, neighbours: int, rounds: int, seed: int) -> dict[str, Any]:
    batch = _drawn_photos(photos, neighbours, seed)
    prior, known, stds, preferences = (part[:_BRENT_PHOTOS] for part in batch)
    few = prior, known, stds, preferences
    ways: dict[str, Callable[[], Any]] = {
        "meiqa": partial(thurstone_map, *batch, SIGMA, LAM),
        "numpy_log_ndtr": partial(_newton, _by_log_ndtr, *batch),
        "numpy_erfcx": partial(_newton, _by_erfcx, *batch),
        "scipy_brentq": partial(_by_brentq, *few),
    }
    each = {"meiqa": rounds, "numpy_log_ndtr": rounds, "numpy_erfcx": rounds, "scipy_brentq": 3}
    rows = {name: quantiles_ms(ms) for name, ms in times_in_turns_ms(ways, each).items()}
    scale = photos / len(few[0])
    ours = rows["meiqa"]["p50_ms"]
    numpy_ms = min(rows["numpy_log_ndtr"]["p50_ms"], rows["numpy_erfcx"]["p50_ms"])
    score, std = thurstone_map(*batch, SIGMA, LAM)
    other_score, other_std = _newton(_by_log_ndtr, *batch)
    return {
        "rows": rows,
        "scipy_photos": len(few[0]),
        "agreement": {
            "numpy_score": float(np.abs(score - other_score).max()),
            "numpy_std": float(np.abs(std - other_std).max()),
            "scipy_score": float(np.abs(score[: len(few[0])] - _by_brentq(*few)).max()),
        },
        "ratios": {
            "vs_numpy": round(numpy_ms / ours, 2),
            "vs_scipy": round(scale * rows["scipy_brentq"]["p50_ms"] / ours, 1),
        },
    }


def _items_row(items: int, votes: int, rounds: int, seed: int) -> dict[str, Any]:
    import choix

    pairs, truth = _drawn_votes(items, votes, seed)
    won = [(int(a), int(b)) for a, b in pairs]
    given = (np.zeros(items), np.full(items, LAM), np.full(items, np.nan), pairs, np.ones(votes))
    ways: dict[str, Callable[[], Any]] = {
        "meiqa": partial(thurstone_joint, *given, 1.0),
        "numpy_newton": partial(_joint_newton, items, pairs),
        "choix_opt": partial(choix.opt_pairwise, items, won, alpha=LAM),
        "choix_ilsr": partial(choix.ilsr_pairwise, items, won, alpha=0.01),
        "choix_mm": partial(choix.mm_pairwise, items, won, alpha=0.01),
        "choix_ep_probit": partial(choix.ep_pairwise, items, won, alpha=2 * LAM, model="probit"),
    }
    each = {name: rounds if name in ("meiqa", "numpy_newton") else 3 for name in ways}
    rows = {name: quantiles_ms(ms) for name, ms in times_in_turns_ms(ways, each).items()}
    score, std = thurstone_joint(*given, 1.0)
    answers = {name: way() for name, way in ways.items() if name.startswith("choix")}
    mean, covariance = answers.pop("choix_ep_probit")
    ours = rows["meiqa"]["p50_ms"]
    return {
        "rows": rows,
        "agreement": {
            "numpy_score": float(np.abs(score - ways["numpy_newton"]()).max()),
            "scipy_score": float(np.abs(score - _joint_by_scipy(items, pairs)).max()),
            "ep_probit_score": float(np.abs(score - mean).max()),
            "ep_probit_std": float(np.abs(std - np.sqrt(np.diag(covariance))).max()),
            **{f"{name}_plcc": _plcc(score, answer) for name, answer in answers.items()},
            "truth_plcc": _plcc(score, truth),
        },
        "ratios": {
            "vs_choix": round(rows["choix_opt"]["p50_ms"] / ours, 1),
            "vs_choix_ilsr": round(rows["choix_ilsr"]["p50_ms"] / ours, 1),
            "vs_choix_mm": round(rows["choix_mm"]["p50_ms"] / ours, 1),
            "vs_choix_ep": round(rows["choix_ep_probit"]["p50_ms"] / ours, 1),
            "joint_vs_numpy": round(rows["numpy_newton"]["p50_ms"] / ours, 2),
        },
    }


def _drawn_photos(photos: int, neighbours: int, seed: int) -> Photos:
    """Draw priors half a point from the truth, neighbours over the scale, noisy preferences."""
    random = np.random.default_rng(seed)
    truth = random.uniform(1, 5, photos)
    known = random.uniform(1, 5, (photos, neighbours))
    stds = np.full((photos, neighbours), 0.2)
    noise = random.normal(0, 0.5, known.shape)
    preferences = ndtr((truth[:, None] - known) / np.hypot(SIGMA, stds) + noise)
    return truth + random.normal(0, 0.5, photos), known, stds, preferences


def _drawn_votes(items: int, votes: int, seed: int) -> tuple[NDArray[np.int64], Floats]:
    """Draw items and votes (winner, loser) among random pairs of them."""
    random = np.random.default_rng(seed)
    truth = random.normal(0, 1, items)
    first = random.integers(0, items, votes)
    second = (first + random.integers(1, items, votes)) % items
    wins = random.uniform(size=votes) < ndtr(truth[first] - truth[second])
    pairs = np.where(wins[:, None], np.stack([first, second], 1), np.stack([second, first], 1))
    return pairs, truth


def _by_log_ndtr(z: Floats) -> tuple[Floats, Floats]:
    """φ/Φ at z and -z."""
    log_density = -0.5 * z * z - 0.5 * np.log(2 * np.pi)
    return np.exp(log_density - log_ndtr(z)), np.exp(log_density - log_ndtr(-z))


def _by_erfcx(z: Floats) -> tuple[Floats, Floats]:
    """φ/Φ at z and -z."""
    peak = np.sqrt(2 / np.pi)
    return peak / erfcx(-z * np.sqrt(0.5)), peak / erfcx(z * np.sqrt(0.5))


def _newton(
    hazards: Hazards, prior: Floats, known: Floats, stds: Floats, preferences: Floats
) -> tuple[Floats, Floats]:
    """Solve all photos at once, until the largest step is one that ours stops at."""
    widths = np.sqrt(SIGMA**2 + stds**2)
    score = prior.copy()
    for _ in range(_MAX_STEPS):
        z = (score[:, None] - known) / widths
        won, lost = hazards(z)
        slope = (((1 - preferences) * lost - preferences * won) / widths).sum(axis=1)
        slope += 2 * LAM * (score - prior)
        bend = (1 - preferences) * lost * (lost - z) + preferences * won * (won + z)
        curvature = (bend / widths**2).sum(axis=1) + 2 * LAM
        step = slope / curvature
        score = score - step
        if np.abs(step).max() <= _LAST_STEP * SIGMA:
            break
    return score, 1 / np.sqrt(curvature)


def _by_brentq(prior: Floats, known: Floats, stds: Floats, preferences: Floats) -> Floats:
    """Solve photo by photo; the std is not asked for."""
    scores = []
    for row in zip(prior, known, stds, preferences, strict=True):
        scores.append(brentq(_slope, -5.0, 11.0, args=row, xtol=1e-10))
    return np.array(scores)


def _slope(score: float, prior: float, known: Floats, stds: Floats, preferences: Floats) -> float:
    widths = np.sqrt(SIGMA**2 + stds**2)
    won, lost = _by_log_ndtr((score - known) / widths)
    total = (((1 - preferences) * lost - preferences * won) / widths).sum()
    return float(total + 2 * LAM * (score - prior))


def _joint_newton(items: int, pairs: NDArray[np.int64]) -> Floats:
    """Newton's method on the whole Hessian, undamped: the votes drawn here need no more."""
    score = np.zeros(items)
    for _ in range(_MAX_STEPS):
        z = score[pairs[:, 0]] - score[pairs[:, 1]]
        won, _ = _by_log_ndtr(z)
        gradient = 2 * LAM * score
        np.subtract.at(gradient, pairs[:, 0], won)
        np.add.at(gradient, pairs[:, 1], won)
        bend = won * (won + z)
        hessian = np.diag(np.full(items, 2 * LAM))
        np.add.at(hessian, (pairs[:, 0], pairs[:, 0]), bend)
        np.add.at(hessian, (pairs[:, 1], pairs[:, 1]), bend)
        np.subtract.at(hessian, (pairs[:, 0], pairs[:, 1]), bend)
        np.subtract.at(hessian, (pairs[:, 1], pairs[:, 0]), bend)
        step = np.linalg.solve(hessian, gradient)
        score = score - step
        if np.abs(step).max() <= _LAST_STEP:
            break
    return score


def _joint_by_scipy(items: int, pairs: NDArray[np.int64]) -> Floats:
    """BFGS on the loss, for the agreement alone."""

    def loss(score: Floats) -> float:
        z = score[pairs[:, 0]] - score[pairs[:, 1]]
        return float(LAM * score @ score - log_ndtr(z).sum())

    def gradient(score: Floats) -> Floats:
        won, _ = _by_log_ndtr(score[pairs[:, 0]] - score[pairs[:, 1]])
        slopes: Floats = 2 * LAM * score
        np.subtract.at(slopes, pairs[:, 0], won)
        np.add.at(slopes, pairs[:, 1], won)
        return slopes

    found: Floats = minimize(
        loss, np.zeros(items), jac=gradient, method="L-BFGS-B", options={"ftol": 0, "gtol": 1e-9}
    ).x
    return found


def _plcc(one: Floats, other: Floats) -> float:
    return round(float(np.corrcoef(one, other)[0, 1]), 6)


def table_text(result: dict[str, Any]) -> str:
    """Lay out the result for people."""
    lines = []
    for problem in ("photos", "items"):
        lines.append(f"{problem:<18}{'p50 ms':>12}{'p99 ms':>12}{'n':>5}")
        for name, row in result[problem]["rows"].items():
            lines.append(f"  {name:<16}{row['p50_ms']:12.3f}{row['p99_ms']:12.3f}{row['n']:5}")
        for name, value in result[problem]["agreement"].items():
            lines.append(f"  {'agreement: ' + name:<34}{value:.3g}")
        lines.append("")
    lines += [f"{name:<18}{value:12.1f}x" for name, value in result["ratios"].items()]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--photos", type=int, default=PHOTOS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--format", choices=("text", "json"), default="text")
    options = parser.parse_args(argv)
    result = bench_solver(options.photos, rounds=options.rounds)
    as_json = options.format == "json"
    sys.stdout.write((json.dumps(result, indent=2) if as_json else table_text(result)) + "\n")


if __name__ == "__main__":
    main()
