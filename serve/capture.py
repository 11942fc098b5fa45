"""Frames of a camera or of a video file, of which only the newest is kept.

PyAV (BSD; its wheels bring FFmpeg, LGPL) opens both V4L2 devices and files, on x86-64 and on ARM.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meiqa.errors import UsageError

__all__ = ["Capture", "CapturedFrame"]

_OPENING_S = 10.0


@dataclass(frozen=True, eq=False)
class CapturedFrame:
    """A frame (H, W, 3), upright.

    Attributes:
        at_s: seconds since the first frame.
        dropped: frames before it that nobody took.
    """

    pixels: NDArray[np.uint8]
    at_s: float
    dropped: int


class Capture:
    """A camera, or a file that is played at its own speed; a context manager and an iterable.

    Args:
        source: the path of a V4L2 device or of a video file.
        live: whether it is a device.

    Raises:
        ModuleNotFoundError: PyAV is not installed.
        UsageError: the source can't be opened, or has no pictures.
    """

    def __init__(self, source: str | Path, *, live: bool) -> None:
        import av

        self._source, self._live = source, live
        try:
            self._container = av.open(
                str(source), format="v4l2" if live else None, timeout=(_OPENING_S, None)
            )
        except (OSError, ValueError, av.FFmpegError) as error:
            reason = getattr(error, "strerror", None) or type(error).__name__
            raise UsageError(
                f"{source} can't be opened as a {'camera' if live else 'video'}: {reason}",
                allowed=_devices() if live else None,
                hint="is another program using it?" if live else "check the path",
            ) from None
        if not self._container.streams.video:
            self._container.close()
            raise UsageError(f"{source} has no pictures", hint="choose a video file")
        self._changed = threading.Condition()
        self._newest: Any = None
        self._dropped = 0
        self._ended = False
        self._failed: Exception | None = None
        self._thread = threading.Thread(target=self._read, name="camera", daemon=True)

    @property
    def rate_hz(self) -> float | None:
        """Frames a second that it announces."""
        rate = self._container.streams.video[0].average_rate
        return None if not rate else float(rate)

    def __enter__(self) -> Capture:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        self._thread.join()
        self._container.close()

    def __iter__(self) -> Iterator[CapturedFrame]:
        """Give the newest frame, each at most once, until there are no more.

        Raises:
            UsageError: it broke off.
        """
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._newest is not None or self._ended)
                (frame, at_s), self._newest = self._newest or (None, 0.0), None
            if frame is None:
                break
            pixels = frame.to_ndarray(format="rgb24")
            turned = np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90)))
            yield CapturedFrame(turned, at_s, self._dropped)
        if self._failed is not None:
            raise UsageError(f"{self._source} broke off: {self._failed}", hint="is it damaged?")

    def _read(self) -> None:
        began_s: float | None = None
        try:
            for frame in self._container.decode(video=0):
                now_s = time.monotonic()
                began_s = now_s if began_s is None else began_s
                due_s = now_s - began_s if self._live else float(frame.time or 0.0)
                if not self._keep(frame, due_s, due_s - (now_s - began_s)):
                    return
        except Exception as error:  # whatever a damaged file makes of a decoder
            self._failed = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _keep(self, frame: Any, at_s: float, early_s: float) -> bool:
        """Keep a frame once its time has come; False when nobody wants any more."""
        with self._changed:
            if early_s > 0:
                self._changed.wait_for(lambda: self._ended, early_s)
            if self._ended:
                return False
            self._dropped += self._newest is not None
            self._newest = frame, at_s
            self._changed.notify_all()
            return True


def _devices() -> str:
    return ", ".join(sorted(map(str, Path("/dev").glob("video*")))) or "no camera is plugged in"
