"""Progress for people who watch, on stderr: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Self

LONG_S = 60.0
"""Where nobody sees a bar, a line is written when so much is left, and then as often."""


class Progress:
    """Count finished images, or show how much of a step is done.

    Speed and time left follow from the latest images: those that a build finds done already, or a
    slow beginning, do not count for long. Where stderr is no terminal nothing is drawn; of work
    that takes minutes a line a minute says the same.

    Args:
        total: images in all; of a single one nothing is drawn.
        done: how many of them an earlier run has finished.
    """

    def __init__(self, total: int = 1, done: int = 0) -> None:
        self._total, self._done = total, done
        self._moments = deque([(time.monotonic(), done)], maxlen=33)
        self._drawn = False
        self._told = -math.inf
        self._step, self._began = "", 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def clear(self) -> None:
        """Free the line, so that results can be printed to the same terminal."""
        if self._drawn:
            self._put("")

    def over(self, say: Callable[[str], None]) -> Callable[[str], None]:
        """Give a way to say lines on a terminal where something may be drawn."""

        def said(line: str) -> None:
            self.clear()
            say(line)

        return said

    def advance(self, *_: object, images: int = 1) -> None:
        """Count one more image, or several, and draw the bar again."""
        self._done += images
        self._moments.append((time.monotonic(), self._done))
        if self._total > 1:
            (began, first), (now, last) = self._moments[0], self._moments[-1]
            seconds = (now - began) / max(last - first, 1)
            speed = f"{self._done}/{self._total}  {1 / max(seconds, 1e-3):.3g} images/s"
            left_s = seconds * (self._total - self._done)
            self._draw(speed, self._done / self._total, left_s)

    def show(self, step: str, share: float) -> None:
        """Draw a step of which this share, 0 to 1, is done."""
        if step != self._step:
            self._step, self._began = step, time.monotonic()
        taken_s = time.monotonic() - self._began
        self._draw(step, share, taken_s / share - taken_s if share else math.nan)

    def _draw(self, said: str, share: float, left_s: float) -> None:
        text = said if math.isnan(left_s) else f"{said}  {left_s:.0f} s left"
        if sys.stderr.isatty():
            self._put(f"[{'#' * int(30 * share):-<30}] {text}")
        elif left_s >= LONG_S and time.monotonic() - self._told >= LONG_S:
            sys.stderr.write(f"meiqa: {text}\n")
            sys.stderr.flush()
            self._told = time.monotonic()

    def _put(self, line: str) -> None:
        sys.stderr.write(f"\r\x1b[K{line}")
        sys.stderr.flush()
        self._drawn = bool(line)
