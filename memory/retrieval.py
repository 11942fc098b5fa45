"""Which remembered photos a query is compared with.

The share of anchors is taken from bins of equal population over their scores, so that the
neighbours span the scale; contrast cases are taken nearest first (arXiv 2603.20785, section 3).

The order is exact and repeatable: candidates found with BLAS in float32 are ranked by their cosine
in float64, summed the same way for every row, and equal cosines are ranked by id. Neither the
number of threads nor the order in which cases were stored changes what is retrieved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meiqa.errors import StoreMismatch, UsageError
from meiqa.memory.cases import FloatArray
from meiqa.memory.encoding import unit_rows

__all__ = ["KeyTable", "Ranking", "RetrievalPolicy", "nearest_anchors", "ranks_of", "shares"]

Rows = NDArray[np.intp]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class RetrievalPolicy:
    """How many neighbours there are and where they come from.

    Attributes:
        k: Neighbours in all; 0 asks for none.
        anchor_share: Share of anchors among them, 0–1, rounded to the nearest count, halves up.
        bins: Bins of equal population over the anchors' scores.
        stratified: Take the same number from each bin, then the most similar of the rest.

    >>> RetrievalPolicy(k=8).anchor_share
    0.5

    Raises:
        UsageError: a value out of range.
    """

    k: int = 32
    anchor_share: float = 0.5
    bins: int = 5
    stratified: bool = True

    def __post_init__(self) -> None:
        if self.k < 0:
            raise UsageError("k must not be negative", seen=self.k, allowed="0 or more")
        if not 0.0 <= self.anchor_share <= 1.0:
            raise UsageError("anchor_share is a share", seen=self.anchor_share, allowed="0 to 1")
        if self.bins < 1:
            raise UsageError("there must be at least one bin", seen=self.bins, allowed="1 or more")


@dataclass(frozen=True, eq=False)
class KeyTable:
    """What a search walks: unit keys (N, D_key), ranks of the ids (N,), rows of each image."""

    keys: FloatArray
    id_ranks: Rows
    rows_by_digest: Mapping[str, Sequence[int]]

    @classmethod
    def build(cls, keys: FloatArray, ids: Sequence[str], digests: Sequence[str]) -> KeyTable:
        """Index unit keys (N, D_key) by the ids and image digests of their cases."""
        rows_by_digest: dict[str, list[int]] = {}
        for row, digest in enumerate(digests):
            rows_by_digest.setdefault(digest, []).append(row)
        by_id = sorted(range(len(ids)), key=ids.__getitem__)
        return cls(keys, ranks_of(np.array(by_id, np.intp)), rows_by_digest)

    def __len__(self) -> int:
        return len(self.keys)

    def rank(self, key: FloatArray, exclude_digest: str | None) -> Ranking:
        """Compare a key (D_key,) with every row but those of the excluded image.

        Raises:
            StoreMismatch: the key has another width than the stored ones.
            UsageError: the key is not finite.
        """
        width = self.keys.shape[1]
        if key.shape != (width,):
            raise StoreMismatch(
                "the key does not fit the memory", seen=f"shape {key.shape}", allowed=(width,)
            )
        if not np.isfinite(key).all():
            raise UsageError("the key is not finite")
        eligible = np.ones(len(self), np.bool_)
        if exclude_digest is not None:
            eligible[list(self.rows_by_digest.get(exclude_digest, ()))] = False
        query = unit_rows(key[None])[0]
        return Ranking(self, query, self.keys @ query, eligible)


@dataclass(frozen=True, eq=False)
class Ranking:
    """One query against one table: approximate cosines (N,) and the rows that may be taken (N,)."""

    table: KeyTable
    query: FloatArray
    cosines: FloatArray
    eligible: Mask

    def nearest(self, count: int, among: Mask | None = None) -> Rows:
        """Give the `count` most similar eligible rows, nearest first, ties by id.

        Fewer are given when fewer are eligible.
        """
        if count <= 0:
            return np.empty(0, np.intp)
        rows = np.flatnonzero(self.eligible if among is None else self.eligible & among)
        if count < len(rows):
            cosines = self.cosines[rows]
            cutoff = np.partition(cosines, len(rows) - count)[len(rows) - count]
            rows = rows[cosines >= cutoff - self._margin]
        return self.in_order(rows)[:count]

    def in_order(self, rows: Rows) -> Rows:
        """Sort rows by their exact cosine, highest first, ties by id."""
        products = self.table.keys[rows].astype(np.float64) * self.query
        return rows[np.lexsort((self.table.id_ranks[rows], -products.sum(axis=1)))]

    @property
    def _margin(self) -> float:
        """Twice the largest error of a float32 dot product of two unit vectors, in any order."""
        return 2.0 * (len(self.query) + 4) * 2.0**-24


def shares(policy: RetrievalPolicy, anchors: int, contrast: int) -> tuple[int, int]:
    """Split k between the available anchors and contrast cases; each fills what the other lacks.

    >>> shares(RetrievalPolicy(k=32), anchors=1000, contrast=3)
    (29, 3)
    """
    wanted = int(policy.k * policy.anchor_share + 0.5)
    from_contrast = min(policy.k - min(wanted, anchors), contrast)
    return min(policy.k - from_contrast, anchors), from_contrast


def ranks_of(order: Rows) -> Rows:
    """Invert a permutation: the rank of each row, from the rows in order."""
    ranks = np.empty_like(order)
    ranks[order] = np.arange(len(order))
    return ranks


def nearest_anchors(
    ranking: Ranking, score_ranks: Rows, count: int, policy: RetrievalPolicy
) -> Rows:
    """Take `count` anchors, stratified over their scores if the policy says so, nearest first.

    Args:
        ranking: The query against the anchors.
        score_ranks: Rank of each anchor by score, ties by id (N,).
        count: How many to take; `count // bins` from each bin, the rest by similarity alone.
        policy: `bins` and `stratified`.
    """
    if not policy.stratified:
        return ranking.nearest(count)
    bins = score_ranks * policy.bins // max(len(score_ranks), 1)
    per_bin = count // policy.bins
    taken = np.concatenate([ranking.nearest(per_bin, bins == each) for each in range(policy.bins)])
    rest = np.ones(len(score_ranks), np.bool_)
    rest[taken] = False
    return ranking.in_order(np.concatenate([taken, ranking.nearest(count - len(taken), rest)]))
