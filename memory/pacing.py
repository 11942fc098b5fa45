"""Work beside scoring, which is done in small steps with rests between them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

_REST = 9.0  # times as long as it works
_WORK_S = 0.002


class Pace:
    """How much of the time a task works: all of it, or a tenth while nobody waits for its end.

    >>> list(Pace(gently=True).through("abc"))
    ['a', 'b', 'c']
    """

    def __init__(self, *, gently: bool = False) -> None:
        self._hurried = threading.Event()
        if not gently:
            self.hurry()

    @property
    def gentle(self) -> bool:
        """Whether it rests; not where a process that has ended waits for its threads."""
        return not self._hurried.is_set() and threading.main_thread().is_alive()

    def hurry(self) -> None:
        """End the rests, since somebody waits now."""
        self._hurried.set()

    def through(self, steps: Iterable[T]) -> Iterator[T]:
        """Go through steps, and rest between them."""
        begun_s = time.perf_counter()
        for step in steps:
            yield step
            worked_s = time.perf_counter() - begun_s
            if worked_s > _WORK_S and self.gentle:
                self._hurried.wait(_REST * worked_s)
                begun_s = time.perf_counter()
