"""What a service allows, in one frozen value."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from meiqa.errors import UsageError
from meiqa.serve.access import Keys

__all__ = ["Settings"]


@dataclass(frozen=True)
class Settings:
    """Limits of the service; `Settings()` serves whoever reaches it on the loopback interface.

    Attributes:
        budget_ms: for the answer to one photo, waiting included, where a request names none.
        max_budget_ms: the longest that a request may ask for.
        reserve_ms: time kept for every photo that waits, so what its answer is worth under load;
            None for what the engine takes without text and with the fewest neighbours.
        margin_ms: kept back of every budget for the way of the answer.
        max_waiting: requests that wait at most.
        max_requests: requests at once at most, those that are being uploaded included.
        max_upload_bytes: of one request.
        max_held_bytes: of all uploads that are held at once.
        max_photos: of one ranking.
        upload_s: how long an upload may take.
        keys: who may do what; None for anybody to score, and for nobody to write.
    """

    budget_ms: float = 2000.0
    max_budget_ms: float = 60_000.0
    reserve_ms: float | None = None
    margin_ms: float = 20.0
    max_waiting: int = 128
    max_requests: int = 128
    max_upload_bytes: int = 32 << 20
    max_held_bytes: int = 512 << 20
    max_photos: int = 64
    upload_s: float = 30.0
    keys: Keys | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int | float):
                continue
            if not (math.isfinite(value) and value > 0):
                raise UsageError(
                    f"{field.name} must be positive", seen=value, allowed="a number above 0"
                )
        if self.budget_ms > self.max_budget_ms:
            raise UsageError(
                "the usual budget is longer than the longest",
                seen=f"{self.budget_ms:g} ms",
                allowed=f"at most {self.max_budget_ms:g} ms",
            )
