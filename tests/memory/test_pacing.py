"""Work beside scoring rests, until somebody waits for it."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from meiqa.memory import pacing
from meiqa.memory.pacing import Pace

_STEP_S = 0.01


def _work(pace: Pace, steps: int) -> float:
    begun_s = time.perf_counter()
    for _ in pace.through(range(steps)):
        time.sleep(_STEP_S)
    return time.perf_counter() - begun_s


def test_gentle_work_rests_nine_tenths_of_the_time() -> None:
    assert _work(Pace(gently=True), 4) > 4 * _STEP_S * 9


def test_other_work_does_not_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    class Restless(threading.Event):
        """Replaces the event of a pace alone, since threads of other tests wait for theirs."""

        def wait(self, timeout: float | None = None) -> bool:
            pytest.fail(f"it rested for {timeout} s")

    of_events = SimpleNamespace(Event=Restless, main_thread=threading.main_thread)
    monkeypatch.setattr(pacing, "threading", of_events)
    pace = Pace()
    assert not pace.gentle
    _work(pace, 4)
    with pytest.raises(pytest.fail.Exception, match="rested"):
        _work(Pace(gently=True), 4)


def test_hurry_ends_a_rest_at_once() -> None:
    pace, begun_s = Pace(gently=True), time.perf_counter()
    threading.Timer(0.1, pace.hurry).start()
    for _ in pace.through(range(2)):
        time.sleep(0.5)
    assert time.perf_counter() - begun_s < 4.5  # one rest alone would be that long


def test_a_process_that_ends_does_not_wait_for_rests() -> None:
    code = (
        "import threading, time\n"
        "from meiqa.memory.pacing import Pace\n"
        "def work():\n"
        "    for _ in Pace(gently=True).through(range(300)): time.sleep(.01)\n"
        "threading.Thread(target=work).start()\n"
    )
    begun_s = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    assert time.perf_counter() - begun_s < 300 * 0.01 * 9
