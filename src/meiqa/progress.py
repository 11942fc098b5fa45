"""Progress bars for people who watch: on a terminal, on stderr."""

from __future__ import annotations

import sys
import time
from collections import deque
from typing import Self


class Progress:
    """Count finished images, or show a step; draws nothing unless stderr is a terminal.

    Speed and time left follow from the latest images: those that a build finds done already, or a
    slow beginning, do not count for long.

    Args:
        total: images in all; of a single one nothing is drawn.
        done: how many of them an earlier run has finished.
    """

    def __init__(self, total: int = 1, done: int = 0) -> None:
        self._total, self._done = total, done
        self._moments = deque([(time.monotonic(), done)], maxlen=33)
        self._drawn = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def clear(self) -> None:
        """Free the line, so that results can be printed to the same terminal."""
        if self._drawn:
            self._put("")

    def advance(self, *_: object, images: int = 1) -> None:
        """Count one more image, or several, and draw the bar again."""
        self._done += images
        self._moments.append((time.monotonic(), self._done))
        if self._total > 1:
            (began, first), (now, last) = self._moments[0], self._moments[-1]
            seconds = (now - began) / max(last - first, 1)
            left = f"{seconds * (self._total - self._done):.0f} s left"
            speed = f"{1 / max(seconds, 1e-3):.3g} images/s  {left}"
            self.show(f"{self._done}/{self._total}  {speed}", self._done / self._total)

    def show(self, step: str, share: float) -> None:
        """Draw a step of which this share, 0 to 1, is done."""
        self._put(f"[{'#' * int(30 * share):-<30}] {step}")

    def _put(self, line: str) -> None:
        if sys.stderr.isatty():
            sys.stderr.write(f"\r\x1b[K{line}")
            sys.stderr.flush()
            self._drawn = bool(line)
