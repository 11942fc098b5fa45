"""Which learned cases are kept: admission, merging, capacity and eviction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from meiqa.errors import UsageError
from meiqa.memory.cases import Case
from meiqa.memory.likeness import NEAR_DUPLICATE, layout
from meiqa.memory.retrieval import Sought
from meiqa.memory.view import CaseView

__all__ = ["Admission", "ContrastPolicy", "near_duplicates", "worth"]

Admission = Literal["gated", "all"]

_SECONDS_A_DAY = 86_400.0
_DOUBTFUL_STD = 0.5
_MOST_DUPLICATES = 16


@dataclass(frozen=True)
class ContrastPolicy:
    """What becomes of the cases that are learned.

    Attributes:
        admission: "gated" stores the cases whose score the comparisons moved by more than the
            reflection's gate allows; "all" stores every case.
        capacity: Most contrast cases; beyond it a twentieth of them is evicted, the least worth
            first. So many are searched fast without an index.
        merge_above: Cosine of layouts above which two cases are near-duplicates
            (`meiqa.memory.likeness`); the newer is kept. 1 merges the same image only.
        half_life_days: Time without a retrieval that halves what a case is worth.
        compact_after: Cases that wait before they are compacted in the background.

    >>> ContrastPolicy().admission
    'gated'

    Raises:
        UsageError: a value out of range.
    """

    admission: Admission = "gated"
    capacity: int = 4_000
    merge_above: float = NEAR_DUPLICATE
    half_life_days: float = 30.0
    compact_after: int = 256

    def __post_init__(self) -> None:
        if self.admission not in get_args(Admission):
            raise UsageError("unknown admission", seen=self.admission, allowed="gated, all")
        for name, value in (("capacity", self.capacity), ("compact_after", self.compact_after)):
            if value < 1:
                raise UsageError(f"{name} must be positive", seen=value, allowed="1 or more")
        if not 0.0 <= self.merge_above <= 1.0:
            raise UsageError("merge_above is a cosine", seen=self.merge_above, allowed="0 to 1")
        if not self.half_life_days > 0.0:
            raise UsageError("half_life_days must be positive", seen=self.half_life_days)


def worth(retrieved: int, idle_seconds: float, std: float, half_life_days: float) -> float:
    """Tell what a case is worth: more for use, less for age and for an uncertain score.

    worth = (1 + retrieved) · 2^(−idle / half-life) / (1 + (std / 0.5)²)

    Args:
        retrieved: How often it was retrieved.
        idle_seconds: Since it was last retrieved, or stored; a clock set back counts as 0.
        std: Standard deviation of its score.
        half_life_days: Time that halves it.

    >>> worth(3, 30 * 86_400, 0.5, half_life_days=30)
    1.0
    """
    halvings = max(idle_seconds, 0.0) / (_SECONDS_A_DAY * half_life_days)
    return float((1 + retrieved) * 0.5**halvings / (1.0 + (std / _DOUBTFUL_STD) ** 2))


def near_duplicates(view: CaseView, case: Case, above: float) -> list[str]:
    """Give the ids of the near-duplicates of a case among the 16 cases with the nearest keys.

    Raises:
        StoreCorrupted: a stored case is damaged.
    """
    if above >= 1.0:
        return []
    sought = Sought(view, case.key, None, None)
    rows: list[int] = sought.nearest(_MOST_DUPLICATES).rows.tolist()
    own_layout = layout(case.tokens, case.grid)
    return [sought.case(row).id for row in sought.alike(rows, own_layout, above)]
