"""The slow, obvious twin of every kernel."""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray
from scipy.special import erfcx, expit, log_ndtr, ndtri

from meiqa.kernels.graph import Graph

Floats = NDArray[np.float64]


def pixels_to_patches(
    pixels: NDArray[np.uint8],
    patch: int,
    merge: int,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    temporal: int = 1,
) -> NDArray[np.float32]:
    """Cut patches by slicing, one window after the other."""
    image = (pixels / 255.0 - np.array(mean)) / np.array(std)
    rows = []
    for window_y in range(0, pixels.shape[0], patch * merge):
        for window_x in range(0, pixels.shape[1], patch * merge):
            for y in range(window_y, window_y + patch * merge, patch):
                for x in range(window_x, window_x + patch * merge, patch):
                    planes = image[y : y + patch, x : x + patch].transpose(2, 0, 1)
                    rows.append(np.repeat(planes[:, None], temporal, axis=1).ravel())
    return np.array(rows, dtype=np.float32)


def thurstone_loss(
    score: float,
    prior: float,
    neighbour_scores: Floats,
    neighbour_stds: Floats,
    preferences: Floats,
    sigma: float,
    lam: float,
) -> float:
    """Return the loss that the kernel minimises, for one photo, ``(K,)`` neighbours."""
    loss = lam * (score - prior) ** 2
    for known, spread, preference in zip(
        neighbour_scores, neighbour_stds, preferences, strict=True
    ):
        if np.isnan(preference):
            continue
        z = (score - known) / np.sqrt(sigma**2 + spread**2)
        loss -= preference * log_ndtr(z) + (1.0 - preference) * log_ndtr(-z)
    return float(loss)


def thurstone_slope(
    score: float,
    prior: float,
    neighbour_scores: Floats,
    neighbour_stds: Floats,
    preferences: Floats,
    sigma: float,
    lam: float,
) -> float:
    """Return the loss's derivative, for one photo, ``(K,)`` neighbours."""
    slope = 2.0 * lam * (score - prior)
    for known, spread, preference in zip(
        neighbour_scores, neighbour_stds, preferences, strict=True
    ):
        if np.isnan(preference):
            continue
        width = np.sqrt(sigma**2 + spread**2)
        z = (score - known) / width
        slope += ((1.0 - preference) * hazard(-z) - preference * hazard(z)) / width
    return float(slope)


def hazard(z: float) -> float:
    """Return φ(z)/Φ(z)."""
    return float(np.sqrt(2.0 / np.pi) / erfcx(-z / np.sqrt(2.0)))


def thurstone_closed_form(
    prior: Floats,
    neighbour_scores: Floats,
    preferences: Floats,
    sigma: float,
    lam: float,
    clip: float = 0.01,
) -> Floats:
    """Average each photo's probit pseudo-observations s_j + σΦ⁻¹(y_j) with its prior.

    ME-IQA's closed form; y is clipped, because Φ⁻¹ diverges at 0 and 1.
    """
    asked = ~np.isnan(preferences)
    clipped = np.clip(np.where(asked, preferences, 0.5), clip, 1.0 - clip)
    observations = np.where(asked, neighbour_scores + sigma * ndtri(clipped), 0.0)
    fused: Floats = (observations.sum(axis=1) + lam * prior) / (asked.sum(axis=1) + lam)
    return fused


def hnsw_search(
    graph: Graph,
    query: NDArray[np.float32],
    count: int,
    eligible: NDArray[np.bool_] | None,
    effort: int,
) -> list[int]:
    """Walk the graph with sorted lists."""
    rows = len(graph.keys)
    allowed = np.ones(rows, bool) if eligible is None else eligible
    available = int(allowed.sum())
    count = min(count, available)
    effort = max(effort, count)
    found: list[int] = []
    if query.any() and available**2 > 8 * effort * rows:
        found = _hnsw_walk(graph, _hnsw_scores(graph, query), allowed, effort)
    if len(found) < count:
        found = np.flatnonzero(allowed).tolist()
    cosines = _half_cosines(graph, query)
    return sorted(found, key=lambda row: (-cosines[row], row))[:count]


def _hnsw_scores(graph: Graph, query: NDArray[np.float32]) -> NDArray[np.float32]:
    wide = query.astype(np.float64)
    steps = min(32767, (2**31 - 1) // (128 * len(query)))
    coarse = np.rint(wide / np.abs(wide).max() * steps).astype(np.int64)
    products = graph.levels.astype(np.int64) @ coarse
    return products.astype(np.float32) * graph.scales


def _half_cosines(graph: Graph, query: NDArray[np.float32]) -> Floats:
    keys = graph.keys.view(np.float16).astype(np.float64)
    wide = query.astype(np.float64)
    peak = np.abs(wide).max(initial=0.0)
    products = (keys * (wide / peak if peak else wide)).sum(axis=1)
    lengths = np.sqrt((keys * keys).sum(axis=1))
    return np.divide(products, lengths, out=np.zeros(len(keys)), where=lengths > 0)


def _hnsw_walk(
    graph: Graph, scores: NDArray[np.float32], allowed: NDArray[np.bool_], effort: int
) -> list[int]:
    def worth(row: int) -> tuple[float, int]:
        return float(scores[row]), -row

    here = int(graph.entry[0])
    first, last = graph.upper_offsets[here : here + 2].tolist()
    for level in reversed(range(last - first)):
        moved = True
        while moved:
            links = graph.upper_links[graph.upper_offsets[here] + level]
            nearest = max([here, *(int(link) for link in links if link >= 0)], key=worth)
            moved, here = nearest != here, nearest
    seen, frontier = {here}, [here]
    found = [here] if allowed[here] else []
    while frontier:
        best = max(frontier, key=worth)
        frontier.remove(best)
        if len(found) == effort and worth(best) < worth(found[-1]):
            break
        fresh = [int(link) for link in dict.fromkeys(graph.links[best].tolist()) if link >= 0]
        for row in fresh:
            if row in seen:
                continue
            seen.add(row)
            if len(found) == effort and worth(row) < worth(found[-1]):
                continue
            frontier.append(row)
            if allowed[row]:
                found = sorted([*found, row], key=worth, reverse=True)[:effort]
    return found


def thurstone_joint(
    prior: Floats,
    weights: Floats,
    known_stds: Floats,
    pairs: NDArray[np.int64],
    preferences: Floats,
    sigma: Floats | float,
    counts: Floats | float = 1.0,
) -> tuple[Floats, Floats]:
    """Newton's method on the whole Hessian, damped until the loss falls."""
    free = np.isnan(known_stds)
    spreads = np.where(free, 0.0, known_stds)
    widths = np.sqrt(sigma**2 + (spreads[pairs] ** 2).sum(axis=1))
    signs = np.zeros((len(pairs), len(prior)))
    for m, (a, b) in enumerate(pairs):
        signs[m, a], signs[m, b] = 1.0 / widths[m], -1.0 / widths[m]
    signs = signs[:, free]
    offset = -(signs @ prior[free]) + (prior[pairs[:, 0]] - prior[pairs[:, 1]]) / widths

    def loss(x: Floats) -> float:
        z = signs @ x + offset
        errors = preferences * log_ndtr(z) + (1.0 - preferences) * log_ndtr(-z)
        return float(weights[free] @ (x - prior[free]) ** 2 - (counts * errors).sum())

    x = prior[free].copy()
    for _ in range(200):
        z = signs @ x + offset
        won = np.array([hazard(each) for each in z])
        lost = np.array([hazard(-each) for each in z])
        slope = counts * ((1.0 - preferences) * lost - preferences * won)
        bend = counts * ((1.0 - preferences) * lost * (lost - z) + preferences * won * (won + z))
        gradient = signs.T @ slope + 2.0 * weights[free] * (x - prior[free])
        hessian = signs.T @ (bend[:, None] * signs) + np.diag(2.0 * weights[free])
        step = np.linalg.solve(hessian, gradient)
        while loss(x - step) > loss(x) + 1e-12 * abs(loss(x)):
            step = 0.5 * step
        x = x - step
        if np.abs(step).max(initial=0.0) < 1e-12:
            break
    score, std = prior.copy(), spreads.copy()
    score[free] = x
    std[free] = np.sqrt(np.diag(np.linalg.inv(hessian)))
    return score, std


def thurstone_map(
    prior: Floats,
    neighbour_scores: Floats,
    neighbour_stds: Floats,
    preferences: Floats,
    sigma: float,
    lam: float,
) -> tuple[Floats, Floats]:
    """Solve each photo alone, as one free item among known ones."""
    scores, stds = [], []
    for i in range(len(prior)):
        asked = np.flatnonzero(~np.isnan(preferences[i]))
        score, std = thurstone_joint(
            np.append(prior[i], neighbour_scores[i, asked]),
            np.full(1 + len(asked), lam),
            np.append(np.nan, neighbour_stds[i, asked]),
            np.stack([np.zeros(len(asked), np.int64), 1 + np.arange(len(asked))], axis=1),
            preferences[i, asked],
            sigma,
        )
        scores.append(score[0])
        stds.append(std[0])
    return np.array(scores), np.array(stds)


def grade_probabilities(ability: float, discrimination: float, first: float, step: float) -> Floats:
    """Probabilities (5,) of the grades: each less what the next one up takes."""
    reached = [1.0]
    for k in range(4):
        reached.append(float(expit(discrimination * (ability - first - k * step))))
    return np.array(
        [here - above for here, above in zip(reached, [*reached[1:], 0.0], strict=True)]
    )


def modes(probabilities: Floats) -> int:
    """Count the grades, or runs of equal ones, that lie above both their sides."""
    runs = [probabilities[0]]
    runs += [b for a, b in itertools.pairwise(probabilities) if b != a]
    around = [-np.inf, *runs, -np.inf]
    return sum(a < b > c for a, b, c in zip(around, around[1:], around[2:], strict=False))
