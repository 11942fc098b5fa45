"""How benchmarks take times of several ways to do the same."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping

__all__ = ["times_in_turns_ms"]


def times_in_turns_ms(
    ways: Mapping[str, Callable[[], object]],
    rounds: Mapping[str, int],
    *,
    warm_up: int = 1,
) -> dict[str, list[float]]:
    """Time several ways to do the same, in turns, so that a busy machine slows all of them.

    Before each call that counts the way is called once more: the processor's caches and its threads
    are then its own, not those of the way before it.

    Args:
        ways: What is called, by name.
        rounds: How often each is called; the slow ones less often, spread over the run.
        warm_up: Calls of each before the first that counts.
    """
    for way in ways.values():
        for _ in range(warm_up):
            way()
    times: dict[str, list[float]] = {name: [] for name in ways}
    most = max(rounds.values())
    gc.collect()
    for turn in range(most):
        for name, way in ways.items():
            if turn * rounds[name] // most < (turn + 1) * rounds[name] // most:
                way()
                began = time.perf_counter()
                way()
                times[name].append(1e3 * (time.perf_counter() - began))
    return times
