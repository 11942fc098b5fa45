"""How well predicted scores agree with human ones, and how finely they tell photos apart."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri
from scipy.stats import kendalltau, rankdata

__all__ = [
    "distinct",
    "effective_bins",
    "js_divergence",
    "krcc",
    "plcc",
    "reliability",
    "rmse",
    "srcc",
    "summarise",
    "tie_rate",
    "tied_pairs",
]

_LOWEST, _HIGHEST, _BINS = 1.0, 5.0, 100
_DECIMALS = 2
_TELLING_GAP = 0.1
NOMINAL_COVERAGES = (0.50, 0.68, 0.80, 0.90, 0.95, 0.99)


def srcc(predicted: ArrayLike, human: ArrayLike) -> float:
    """Return Spearman's rank correlation, ties sharing their mean rank; 0 if either is constant.

    Example:
        >>> srcc([1.0, 2.0, 4.0], [1.5, 3.0, 3.5])
        1.0
    """
    predictions, scores = _paired(predicted, human)
    return plcc(rankdata(predictions), rankdata(scores))


def plcc(predicted: ArrayLike, human: ArrayLike) -> float:
    """Return Pearson's correlation of the raw values, no mapping fitted; 0 if either is constant.

    Example:
        >>> round(plcc([1.0, 2.0, 3.0], [1.0, 3.0, 2.0]), 3)
        0.5
    """
    predictions, scores = _paired(predicted, human)
    if _constant(predictions) or _constant(scores):
        return 0.0
    x, y = predictions - predictions.mean(), scores - scores.mean()
    return float(np.clip(x @ y / np.sqrt((x @ x) * (y @ y)), -1.0, 1.0))


def krcc(predicted: ArrayLike, human: ArrayLike) -> float:
    """Return Kendall's rank correlation, tau-b; 0 if either is constant.

    Example:
        >>> round(krcc([1.0, 2.0, 3.0], [1.0, 3.0, 2.0]), 3)
        0.333
    """
    predictions, scores = _paired(predicted, human)
    if _constant(predictions) or _constant(scores):
        return 0.0
    return float(kendalltau(predictions, scores, variant="b").statistic)


def rmse(predicted: ArrayLike, human: ArrayLike) -> float:
    """Return the root of the mean squared error, in points of the 1-5 scale.

    Example:
        >>> rmse([1.0, 4.0], [1.0, 2.0]) == 2.0**0.5
        True
    """
    predictions, scores = _paired(predicted, human)
    return float(np.sqrt(np.mean((predictions - scores) ** 2)))


def js_divergence(predicted: ArrayLike, human: ArrayLike) -> float:
    """Return the Jensen-Shannon divergence of the two histograms, in bits (0-1).

    The histograms have 100 equal bins over 1-5; scores outside fall into the end bins. The two
    need not have the same length.

    Example:
        >>> js_divergence([2.0, 2.0], [4.0, 4.0])
        1.0
    """
    p, q = _histogram(predicted), _histogram(human)
    nats = _entropy((p + q) / 2.0) - (_entropy(p) + _entropy(q)) / 2.0
    return float(np.clip(nats / np.log(2.0), 0.0, 1.0))


def effective_bins(scores: ArrayLike) -> float:
    """Return exp(entropy) of the scores' histogram: 1 if all share a bin, 100 if spread evenly.

    Example:
        >>> effective_bins([3.0, 3.0, 3.0])
        1.0
    """
    return float(np.exp(_entropy(_histogram(scores))))


def distinct(scores: ArrayLike) -> int:
    """Return how many different scores there are once rounded to two decimals.

    Example:
        >>> distinct([3.001, 3.002, 4.0])
        2
    """
    return len(_tie_counts(scores))


def tie_rate(scores: ArrayLike) -> float:
    """Return the share of pairs whose scores are equal at two decimals; 0 if there is no pair.

    Example:
        >>> tie_rate([3.0, 3.0, 3.0, 4.0])
        0.5
    """
    counts = _tie_counts(scores)
    total = int(counts.sum())
    if total < 2:
        return 0.0
    return float(np.sum(counts * (counts - 1)) / (total * (total - 1)))


def tied_pairs(initial: ArrayLike, fused: ArrayLike, human: ArrayLike) -> dict[str, float]:
    """Return how often fused scores order, as people do, the pairs that initial scores cannot.

    Counted are pairs whose initial scores are exactly equal and whose human scores differ by more
    than 0.1: below that, means of some thirty opinions do not tell who is right. A pair that fused
    scores leave tied counts a half.

    Returns:
        pairs: how many were counted; agreement: the share ordered as people do, NaN without pairs.

    Example:
        >>> tied_pairs([3.0, 3.0, 3.0, 4.0], [2.8, 3.1, 3.1, 4.0], [2.0, 3.0, 4.0, 1.0])
        {'pairs': 3, 'agreement': 0.8333333333333334}
    """
    first, second = _paired(initial, fused)
    scores = _paired(initial, human)[1]
    pairs, points = 0, 0.0
    for group in _groups_of_equals(first):
        higher, lower = np.nonzero(scores[group][:, None] - scores[group][None] > _TELLING_GAP)
        step = second[group][higher] - second[group][lower]
        pairs += len(step)
        points += float(np.sum(step > 0.0) + 0.5 * np.sum(step == 0.0))
    return {"pairs": pairs, "agreement": points / pairs if pairs else float("nan")}


def reliability(
    predicted: ArrayLike, deviations: ArrayLike, human: ArrayLike
) -> list[dict[str, float]]:
    """Return which share of human scores the central normal intervals cover, by nominal share.

    Args:
        predicted: predicted scores, ``(n,)``; deviations: their standard deviations, ``(n,)``.
        human: mean opinion scores of the same photos, ``(n,)``.

    Example:
        >>> reliability([3.0, 3.0], [0.5, 0.5], [3.1, 3.9])[0]
        {'nominal': 0.5, 'observed': 0.5}
    """
    predictions, scores = _paired(predicted, human)
    errors = np.abs(predictions - scores)
    widths = _paired(deviations, human)[0]
    return [
        {
            "nominal": nominal,
            "observed": float(np.mean(errors <= ndtri((1.0 + nominal) / 2.0) * widths)),
        }
        for nominal in NOMINAL_COVERAGES
    ]


def summarise(predicted: ArrayLike, human: ArrayLike) -> dict[str, float]:
    """Return every figure of agreement and fineness, by its name in the JSON of `meiqa eval`.

    Args:
        predicted: predicted scores, ``(n,)``, 1-5.
        human: mean opinion scores of the same photos, ``(n,)``, 1-5.

    Raises:
        ValueError: the two differ in length, are empty, not one-dimensional or not finite.

    Example:
        >>> figures = summarise([2.0, 3.0, 4.0], [2.5, 3.0, 3.5])
        >>> figures["srcc"], figures["distinct"], figures["tie_rate"]
        (1.0, 3, 0.0)
    """
    return {
        "srcc": srcc(predicted, human),
        "plcc": plcc(predicted, human),
        "krcc": krcc(predicted, human),
        "rmse": rmse(predicted, human),
        "js": js_divergence(predicted, human),
        "effective_bins": effective_bins(predicted),
        "distinct": distinct(predicted),
        "tie_rate": tie_rate(predicted),
    }


def _finite(values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0 or not np.isfinite(array).all():
        raise ValueError(f"scores must be one row of finite numbers, not shape {array.shape}")
    return array


def _paired(
    predicted: ArrayLike, human: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    predictions, scores = _finite(predicted), _finite(human)
    if predictions.size != scores.size:
        raise ValueError(f"{predictions.size} predictions cannot meet {scores.size} human scores")
    return predictions, scores


def _constant(values: NDArray[np.float64]) -> bool:
    return bool(values.min() == values.max())


def _histogram(values: ArrayLike) -> NDArray[np.float64]:
    inside = np.clip(_finite(values), _LOWEST, _HIGHEST)
    counts, _ = np.histogram(inside, bins=_BINS, range=(_LOWEST, _HIGHEST))
    return counts / inside.size


def _entropy(shares: NDArray[np.float64]) -> float:
    occupied = shares[shares > 0.0]
    return float(-np.sum(occupied * np.log(occupied)) + 0.0)


def _tie_counts(scores: ArrayLike) -> NDArray[np.int64]:
    hundredths = np.rint(_finite(scores) * 10**_DECIMALS)
    return np.unique(hundredths, return_counts=True)[1]


def _groups_of_equals(values: NDArray[np.float64]) -> Iterator[NDArray[np.intp]]:
    """Positions of values that are equal, two or more at a time."""
    order = np.argsort(values, kind="stable")
    ends = np.flatnonzero(np.diff(values[order])) + 1
    return (group for group in np.split(order, ends) if len(group) > 1)
