"""Kills, full disks and readers beside a writer: what was acknowledged is there, and whole.

MEIQA_TEST_SECONDS sets how long readers and a writer meet, at least (3 seconds by default).
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import pytest

from meiqa.memory import AnchorWriter, Case, MemoryBank, RetrievalPolicy, verify_memory
from tests.memory.samples import (
    DIGEST,
    KEY_WIDTH,
    assert_same_case,
    build_anchors,
    make_case,
    make_cases,
    python_child,
)

CALLS = 60_000  # of a writer: about twenty steps
PATIENCE_S = 300.0  # with a process that does not go on; how fast it goes is not looked at
SECONDS = float(os.environ.get("MEIQA_TEST_SECONDS", "3"))
IMAGES = 17

# What is stored: by origin and image, the id of the case.
State = dict[tuple[str, str], str]

WRITER = """
import os, signal, sys, threading
from meiqa.memory import ContrastPolicy, MemoryBank
from tests.memory.test_crashes import act
path, acknowledged = sys.argv[1:]

def die_after(calls):
    def count(*_):
        nonlocal calls
        calls -= 1
        if calls == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    threading.setprofile(count)
    sys.setprofile(count)

def work(run, calls):
    file = os.open(acknowledged, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    if calls:
        die_after(calls)
    policy = ContrastPolicy(compact_after=5)
    bank = MemoryBank.open(path, "rw", package_digest="ab12", policy=policy)
    for number in range(1_000_000):
        act(bank, run, number)
        os.write(file, b".")

print("ready", flush=True)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        try:
            work(*map(int, line.split()))
        finally:
            os._exit(1)
    print(child, flush=True)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


def stored_case(run: int, number: int) -> Case:
    origin = "anchor" if number % 3 == 0 else "contrast"
    return make_case(
        f"{run}-{number}",
        "anchor" if origin == "anchor" else "contrast",
        image_digest=f"{number % IMAGES}",
        tokens=97,
    )


def is_removal(number: int) -> bool:
    return number % 7 == 6


def is_compaction(number: int) -> bool:
    return number % 3 == 2


def act(bank: MemoryBank, run: int, number: int) -> None:
    """Do one step of a writer."""
    if is_compaction(number):
        bank.compact()
    elif is_removal(number):
        bank.remove([f"{run}-{number - 1}"])
    else:
        case = stored_case(run, number)
        store = bank.add_anchor if case.origin == "anchor" else bank.remember
        store(case, provenance="a test")


def after(state: State, run: int, number: int) -> State:
    """Give what a step makes of a state."""
    if is_compaction(number):
        return state
    if is_removal(number):
        removed = f"{run}-{number - 1}"
        return {place: case_id for place, case_id in state.items() if case_id != removed}
    case = stored_case(run, number)
    return {**state, (case.origin, case.image_digest): case.id}


def read_state(path: Path, mode: str) -> State:
    """Read everything, and check that it is whole."""
    everything = RetrievalPolicy(k=100_000)
    with MemoryBank.open(path, mode, package_digest=DIGEST) as bank:  # type: ignore[arg-type]
        found = bank.snapshot().retrieve(np.ones(KEY_WIDTH, np.float32), everything, None)
    for case in found:
        run, number = map(int, case.id.split("-"))
        assert_same_case(case, stored_case(run, number))
    state: State = {(case.origin, case.image_digest): case.id for case in found}
    assert len(state) == len(found)
    return state


def size_of(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "a process does not go on"
        time.sleep(0.001)


def killed(writers: subprocess.Popen[str], run: int, acknowledged: Path, draw: Random) -> int:
    """Let a writer run until it is killed at a random instant; give the steps it acknowledged.

    By turns it kills itself with a call that it makes, of Python or of what Python calls, so that
    where it dies does not depend on how fast it goes; or it is killed from outside, which can be
    in the middle of such a call.
    """
    assert writers.stdin is not None
    assert writers.stdout is not None
    acknowledged.unlink(missing_ok=True)
    calls = draw.randrange(1, CALLS) if run % 2 else 0
    writers.stdin.write(f"{run} {calls}\n")
    pid = int(writers.stdout.readline())
    if not calls:
        steps = draw.randrange(6)
        wait_until(lambda: size_of(acknowledged) >= steps)
        time.sleep(draw.uniform(0.0, 0.04))
        os.kill(pid, signal.SIGKILL)
    assert int(writers.stdout.readline()) == -signal.SIGKILL, "the writer ended by itself"
    return size_of(acknowledged)


@pytest.mark.parametrize("kills", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_killed_writers_lose_nothing_that_they_acknowledged(tmp_path: Path, kills: int) -> None:
    """Writers in turn, each killed at a random instant, replacing and removing earlier cases."""
    path, acknowledged = build_anchors(tmp_path / "m"), tmp_path / "acknowledged"
    draw, state, steps, compactions_killed = Random(20), State(), 0, 0
    with python_child(WRITER, path, acknowledged) as writers:
        assert writers.stdout is not None
        assert writers.stdout.readline() == "ready\n"
        for run in range(kills):
            count = killed(writers, run, acknowledged, draw)
            compactions_killed += any(path.glob(".*.seg.*.partial"))
            for number in range(count):
                state = after(state, run, number)
            found = read_state(path, "rw" if run % 2 else "r")
            # The step that was under way may have been done, or not.
            assert found in (state, after(state, run, count))
            state, steps = found, steps + count
        writers.communicate(timeout=PATIENCE_S)
    assert steps > kills
    assert compactions_killed > kills // 20
    open_and_close(path)
    assert verify_memory(path) == []


def open_and_close(path: Path) -> None:
    """Let a writer remove what killed ones have left."""
    MemoryBank.open(path, "rw", package_digest=DIGEST).close()


FULL_DISK = """
import resource, sys
from meiqa.errors import StoreUnwritable
from meiqa.memory import ContrastPolicy, MemoryBank
from tests.memory.samples import make_case
limit, compact_every = 800_000, int(sys.argv[2])
policy = ContrastPolicy(compact_after=100_000)
bank = MemoryBank.open(sys.argv[1], "rw", package_digest="ab12", policy=policy)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
refused = 0
for number in range(100_000):
    origin = "anchor" if number % 2 else "contrast"
    case = make_case(f"{number}", origin, tokens=997)
    try:
        if origin == "anchor":
            bank.add_anchor(case, provenance="a test")
        else:
            bank.remember(case, provenance="a test")
    except StoreUnwritable as error:
        refused += 1
        if refused == 5:
            break
    else:
        print(number, flush=True)
        if number % compact_every == compact_every - 1:
            try:
                bank.compact()
            except StoreUnwritable:
                refused += 1
bank.snapshot()
"""


@pytest.mark.slow
@pytest.mark.parametrize("compact_every", [10, 100_000])
def test_a_full_disk_loses_nothing_acknowledged(tmp_path: Path, compact_every: int) -> None:
    path = build_anchors(tmp_path / "m", make_cases(3, "anchor"))
    output, errors = python_child(FULL_DISK, path, compact_every).communicate(timeout=PATIENCE_S)
    acknowledged = output.split()
    assert errors == ""
    assert len(acknowledged) > 10
    everything = RetrievalPolicy(k=100_000)
    with MemoryBank.open(path, "rw", package_digest=DIGEST) as bank:
        found = bank.snapshot().retrieve(np.ones(KEY_WIDTH, np.float32), everything, None)
        by_id = {case.id: case for case in found}
        for case_id in acknowledged:
            origin = "anchor" if int(case_id) % 2 else "contrast"
            expected = make_case(case_id, origin, tokens=997)  # type: ignore[arg-type]
            assert_same_case(by_id[case_id], expected)
        bank.compact()
    assert verify_memory(path) == []


FULL_BUILD = """
import resource, sys
from meiqa.errors import StoreError
from meiqa.memory import AnchorWriter
from tests.memory.samples import make_cases
writer = AnchorWriter(sys.argv[1], "ab12", 8, 6, resume=True)
limit = int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    with writer:
        for case in make_cases(300, "anchor"):
            if case.id not in writer.known_ids:
                writer.add(case, provenance="a laboratory")
        writer.finish()
except StoreError as error:
    print(type(error).__name__)
"""


def test_a_build_on_a_full_disk_goes_on_when_there_is_room(tmp_path: Path) -> None:
    path = tmp_path / "m"
    for limit in (100_000, 150_000):
        output, errors = python_child(FULL_BUILD, path, limit).communicate(timeout=PATIENCE_S)
        assert (output.strip(), errors) == ("StoreUnwritable", "")
        assert not path.exists()
    with AnchorWriter(path, DIGEST, KEY_WIDTH, 6, resume=True) as writer:
        assert 0 < len(writer.known_ids) <= 300
        for case in make_cases(300, "anchor"):
            if case.id not in writer.known_ids:
                writer.add(case, provenance="a laboratory")
        writer.finish()
    with MemoryBank.open(path, package_digest=DIGEST) as bank:
        assert bank.snapshot().count_anchors == 300
    assert verify_memory(path) == []


READER = """
import sys, threading
import numpy as np
from meiqa.memory import MemoryBank, RetrievalPolicy
from tests.memory.samples import assert_same_case, make_case
ended = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
bank = MemoryBank.open(sys.argv[1], "r", package_digest="ab12")
states = set()
progress = open(sys.argv[2], "ab", buffering=0)
print("ready", flush=True)
while not ended.is_set():
    snapshot = bank.snapshot()
    found = snapshot.retrieve(np.ones(8, np.float32), RetrievalPolicy(k=100_000), None)
    assert len(found) == snapshot.count_anchors + snapshot.count_contrast
    places = {(case.origin, case.image_digest) for case in found}
    assert len(places) == len(found), "two versions of a case"
    for case in found:
        image = case.id.split("-")[0]
        assert_same_case(case, make_case(case.id, case.origin, image_digest=image, tokens=197))
    seen = tuple(case.id for case in found)
    if seen not in states:
        states.add(seen)
        progress.write(b".")
"""


@pytest.mark.slow
def test_readers_beside_a_writer_see_whole_records_only(tmp_path: Path) -> None:
    path = build_anchors(tmp_path / "m")
    progress = [tmp_path / f"states of {number}" for number in range(4)]
    readers = [python_child(READER, path, file) for file in progress]
    for reader in readers:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "ready\n"
    start, done = time.monotonic(), Counter[str]()
    with MemoryBank.open(path, "rw", package_digest=DIGEST) as bank:
        for number in range(1_000_000):
            met = [
                size_of(file) > 3 or each.poll()
                for file, each in zip(progress, readers, strict=True)
            ]
            if all(met) and time.monotonic() > start + SECONDS:
                break
            assert time.monotonic() < start + PATIENCE_S, "a reader does not go on"
            image = f"{number % 29}"
            case = make_case(
                f"{image}-{number}",
                "anchor" if number % 2 else "contrast",
                image_digest=image,
                tokens=197,
            )
            (bank.add_anchor if number % 2 else bank.remember)(case, provenance="a test")
            if number % 13 == 0:
                done["compactions"] += bank.compact()
            if number % 31 == 0:
                done["removed"] += bank.remove([case.id])
    for reader in readers:
        output, errors = reader.communicate(timeout=PATIENCE_S)
        assert (output, errors, reader.returncode) == ("", "", 0)
    assert min(done["compactions"], done["removed"]) > 0
    open_and_close(path)
    assert verify_memory(path) == []
