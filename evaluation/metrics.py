"""How well predicted scores agree with human ones, and how finely they tell photos apart.

Scores are rows ``(n,)`` on 1-5. A ValueError refuses rows that are empty, not finite, or of two
lengths where they are to be compared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.distance import jensenshannon
from scipy.special import ndtri
from scipy.stats import bootstrap, entropy, kendalltau, pearsonr, spearmanr

Floats = NDArray[np.float64]

_BINS = np.linspace(1.0, 5.0, 101)
_TELLING_GAP = 0.1
_RESAMPLES = 1000
NOMINAL_COVERAGES = (0.50, 0.68, 0.80, 0.90, 0.95, 0.99)


def srcc(predicted: ArrayLike, human: ArrayLike) -> float:
    """Return Spearman's rank correlation, ties sharing their mean rank; 0 if either is constant."""
    return _correlation(spearmanr, predicted, human)


def srcc_ci95(predicted: ArrayLike, human: ArrayLike) -> tuple[float, float]:
    """Return the 95 % interval of `srcc`: percentiles of the bootstrap over photos, seeded."""
    found = bootstrap(
        _paired(predicted, human),
        srcc,
        paired=True,
        vectorized=False,
        n_resamples=_RESAMPLES,
        method="percentile",
        rng=0,
    ).confidence_interval
    return float(found.low), float(found.high)


def plcc(predicted: ArrayLike, human: ArrayLike) -> float:
    """Return Pearson's correlation of the raw values, nothing fitted; 0 if either is constant."""
    return _correlation(pearsonr, predicted, human)


def krcc(predicted: ArrayLike, human: ArrayLike) -> float:
    """Return Kendall's rank correlation, tau-b; 0 if either is constant."""
    return _correlation(kendalltau, predicted, human)


def rmse(predicted: ArrayLike, human: ArrayLike) -> float:
    """Return the root of the mean squared error, in points of the 1-5 scale."""
    predictions, scores = _paired(predicted, human)
    return float(np.sqrt(np.mean((predictions - scores) ** 2)))


def js_divergence(predicted: ArrayLike, human: ArrayLike) -> float:
    """Return the Jensen-Shannon divergence of the two histograms, in bits (0-1).

    They have 100 equal bins over 1-5; scores outside fall into the end bins.
    """
    distance = jensenshannon(_histogram(predicted), _histogram(human), base=2.0)
    return float(np.clip(distance, 0.0, 1.0) ** 2)


def effective_bins(scores: ArrayLike) -> float:
    """Return exp(entropy) of the scores' histogram: 1 if all share a bin, 100 if spread evenly."""
    return float(np.exp(entropy(_histogram(scores))))


def distinct(scores: ArrayLike) -> int:
    """Return how many different scores there are once rounded to two decimals."""
    return len(_counts(scores))


def tie_rate(scores: ArrayLike) -> float:
    """Return the share of pairs whose scores are equal at two decimals; 0 if there is no pair."""
    counts = _counts(scores)
    total = int(counts.sum())
    return float(np.sum(counts * (counts - 1)) / max(total * (total - 1), 1))


def tied_pairs(initial: ArrayLike, fused: ArrayLike, human: ArrayLike) -> dict[str, float]:
    """Return how often fused scores order, as people do, the pairs that initial scores cannot.

    Counted are pairs whose initial scores are exactly equal and whose human scores differ by more
    than 0.1: below that, means of some thirty opinions do not tell who is right. A pair that fused
    scores leave tied counts a half.

    Returns:
        pairs: how many were counted; agreement: the share ordered as people do, NaN without pairs.
    """
    first, second = _paired(initial, fused)
    scores = _paired(initial, human)[1]
    pairs, points = 0, 0.0
    for value, count in zip(*np.unique(first, return_counts=True), strict=True):
        group = np.flatnonzero(first == value) if count > 1 else np.arange(0)
        higher, lower = np.nonzero(scores[group][:, None] - scores[group][None] > _TELLING_GAP)
        step = second[group][higher] - second[group][lower]
        pairs += len(step)
        points += float(np.sum(step > 0.0) + 0.5 * np.sum(step == 0.0))
    return {"pairs": pairs, "agreement": points / pairs if pairs else float("nan")}


def reliability(
    predicted: ArrayLike, deviations: ArrayLike, human: ArrayLike
) -> list[dict[str, float]]:
    """Return which share of human scores the central normal intervals cover, by nominal share."""
    predictions, scores = _paired(predicted, human)
    errors, widths = np.abs(predictions - scores), _paired(deviations, human)[0]
    return [
        {"nominal": share, "observed": float(np.mean(errors <= ndtri(0.5 + share / 2.0) * widths))}
        for share in NOMINAL_COVERAGES
    ]


def deviation_agreement(
    predicted: ArrayLike, deviations: ArrayLike, human: ArrayLike
) -> dict[str, float | list[float] | None]:
    """Return how a photo's own deviation goes with its error.

    Gives srcc, the rank correlation with the absolute error, None where all have one deviation, and
    coverage95, the share of human scores within 1.96 deviations by quarter, the surest first.
    """
    predictions, scores = _paired(predicted, human)
    errors, widths = np.abs(predictions - scores), _paired(deviations, human)[0]
    inside = errors <= ndtri(0.975) * widths
    quarters = np.array_split(np.argsort(widths, kind="stable"), 4)
    return {
        "srcc": srcc(widths, errors) if np.ptp(widths) > 1e-9 else None,
        "coverage95": [float(np.mean(inside[quarter])) for quarter in quarters if len(quarter)],
    }


def summarise(predicted: ArrayLike, human: ArrayLike) -> dict[str, float]:
    """Return every figure of agreement and fineness, by its name in the JSON of `meiqa eval`."""
    return {
        "srcc": srcc(predicted, human),
        "plcc": plcc(predicted, human),
        "krcc": krcc(predicted, human),
        "rmse": rmse(predicted, human),
        "js": js_divergence(predicted, human),
        **fineness(predicted),
    }


def fineness(scores: ArrayLike) -> dict[str, float]:
    """Return how finely scores tell photos apart, by the same names."""
    return {
        "effective_bins": effective_bins(scores),
        "distinct": distinct(scores),
        "tie_rate": tie_rate(scores),
    }


def _finite(values: ArrayLike) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0 or not np.isfinite(array).all():
        raise ValueError(f"scores must be one row of finite numbers, not shape {array.shape}")
    return array


def _paired(predicted: ArrayLike, human: ArrayLike) -> tuple[Floats, Floats]:
    predictions, scores = _finite(predicted), _finite(human)
    if predictions.size != scores.size:
        raise ValueError(f"{predictions.size} predictions cannot meet {scores.size} human scores")
    return predictions, scores


def _correlation(
    measure: Callable[[Floats, Floats], Any], predicted: ArrayLike, human: ArrayLike
) -> float:
    predictions, scores = _paired(predicted, human)
    if np.ptp(predictions) == 0.0 or np.ptp(scores) == 0.0:
        return 0.0
    return float(measure(predictions, scores).statistic)


def _histogram(values: ArrayLike) -> Floats:
    inside = np.clip(_finite(values), _BINS[0], _BINS[-1])
    return np.histogram(inside, _BINS)[0] / inside.size


def _counts(scores: ArrayLike) -> NDArray[np.int64]:
    """How often each score occurs, in hundredths."""
    return np.unique(np.rint(_finite(scores) * 100), return_counts=True)[1]
