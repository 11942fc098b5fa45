"""Progress bars for people who watch: on a terminal, on stderr."""

from __future__ import annotations

import time
from collections import deque
from typing import Self, TextIO

__all__ = ["Progress", "StepProgress"]

_WIDTH = 30
_LATEST = 32
_SHORTEST_S = 1e-3
_CLEAR_LINE = "\r\x1b[K"


class Progress:
    """Count finished images; draws nothing unless the stream is a terminal.

    Speed and time left follow from the latest images: those that a build finds done already, or a
    slow beginning, do not count for long.

    Args:
        total: images in all.
        stream: where to draw.
        done: how many of them an earlier run has finished.
    """

    def __init__(self, total: int, stream: TextIO, done: int = 0) -> None:
        self._total = total
        self._stream = stream
        self._visible = total > 1 and stream.isatty()
        self._done = done
        self._moments = deque([time.monotonic()], maxlen=_LATEST + 1)

    def __enter__(self) -> Self:
        self._draw()
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def clear(self) -> None:
        """Free the line, so that results can be printed to the same terminal."""
        if self._visible:
            self._stream.write(_CLEAR_LINE)
            self._stream.flush()

    def advance(self) -> None:
        """Count one more image and draw the bar again."""
        self._done += 1
        self._moments.append(time.monotonic())
        self._draw()

    def _draw(self) -> None:
        if not self._visible:
            return
        bar = _bar(self._done / self._total)
        self._stream.write(f"{_CLEAR_LINE}{bar} {self._done}/{self._total}{self._speed()}")
        self._stream.flush()

    def _speed(self) -> str:
        if len(self._moments) == 1:
            return ""
        seconds = (self._moments[-1] - self._moments[0]) / (len(self._moments) - 1)
        left = f"{seconds * (self._total - self._done):.0f} s left"
        return f"  {1 / max(seconds, _SHORTEST_S):.3g} images/s  {left}"


class StepProgress:
    """Show how far a named step is; draws nothing unless the stream is a terminal."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._visible = stream.isatty()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._visible:
            self._stream.write(_CLEAR_LINE)
            self._stream.flush()

    def show(self, step: str, share: float) -> None:
        """Draw a step of which this share, 0 to 1, is done."""
        if self._visible:
            self._stream.write(f"{_CLEAR_LINE}{_bar(share)} {step}")
            self._stream.flush()


def _bar(share: float) -> str:
    filled = int(_WIDTH * share)
    return "[" + "#" * filled + "-" * (_WIDTH - filled) + "]"
