"""Devices that learn and sync while they are killed, the server stops and the network is cut.

    python -m benchmarks.hub_chaos [--devices 8] [--seconds 300] [--kills 200]

Each device is a process with a memory of its own. It learns photos, some of which all devices see,
adds anchors, removes some, compacts and syncs, in random order, and notes what was acknowledged.
One after the other is killed by SIGKILL at a random moment and started again; meanwhile the server
is stopped as by a power cut, or the network in front of it is cut, for a second or two. At the end
all sync in peace, and it is counted:

- `lost`: photos that somebody learned, and nobody removed, that are not at the hub, or in an older
  state than one that was acknowledged;
- `doubled`: cases beyond one an image in a memory;
- `unlike`: memories that do not hold what the hub holds, and all of it;
- `returned`: removals that were acknowledged and that the hub does not know, or whose photo it got
  back from somebody who did not know of it;
- `damaged`: what `meiqa memory verify` finds.

Ends with 1 if any of them is not 0.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import psycopg

from benchmarks.hub_server import Network, Server, serving
from benchmarks.processes import ENVIRONMENT, module_command, say
from meiqa.errors import MeiqaError
from meiqa.evaluation.measuring import run_on
from meiqa.memory import AnchorWriter, Case, ContrastPolicy, MemoryBank, verify_memory
from meiqa.memory.replica import Replica
from meiqa.types import Origin

__all__ = ["chaos", "main"]

_MODULE = "benchmarks.hub_chaos"
_DIGEST = sha256(b"a package for hub_chaos").hexdigest()
_KEY, _TOKEN = 8, 6
_PHOTOS = 400
_OUTAGE_S = 8.0
_PATIENCE_S = 120.0
# Nothing is evicted or merged, either of which would be no loss.
_POLICY = ContrastPolicy(capacity=100_000, merge_above=1.0, compact_after=32)
_REMOVABLE = 3  # every third photo may be removed


def photo(number: int, origin: Origin, by: str) -> Case:
    """Make the case that a device makes of a photo."""
    digest = sha256(f"{origin} {number}".encode()).hexdigest()
    draw = np.random.default_rng([number, *by.encode()])
    return Case(
        id=digest[:16] if origin == "contrast" else f"anchor-{number}",
        origin=origin,
        image_digest=digest,
        score=float(draw.uniform(1.0, 5.0)),
        std=0.25,
        summary=f"photo {number} as {by} saw it",
        key=draw.standard_normal(_KEY).astype(np.float32),
        tokens=draw.standard_normal((4, _TOKEN)).astype(np.float32),
        grid=(2, 2),
    )


class Device:
    """What a process does: it learns, removes, compacts and syncs, and notes what is done."""

    def __init__(self, folder: Path, hub: str) -> None:
        self._name, self._hub = folder.name, hub
        self._bank = MemoryBank.open(
            folder / "memory", "rw", package_digest=_DIGEST, policy=_POLICY
        )
        self._notes = (folder / "notes").open("a", buffering=1)
        self._forgotten = {each["image"] for each in notes_of(folder) if each["did"] == "begins"}
        self._draw = random.Random()

    def work(self) -> None:
        """Go on until killed."""
        acts = [self._learn] * 12 + [self._remove] * 2 + [self._compact] + [self._sync] * 4
        while True:
            self._draw.choice(acts)()

    def _learn(self) -> None:
        number = self._draw.randrange(_PHOTOS)
        origin: Origin = "anchor" if number % 5 == 0 else "contrast"
        case = photo(number, origin, self._name)
        if case.image_digest in self._forgotten:
            return
        if origin == "anchor":
            self._bank.add_anchor(case, provenance="a jury")
        else:
            self._bank.remember(case, provenance="scored here")
        record = self._bank.snapshot().views[origin].record_of_image(case.image_digest)
        assert record is not None
        self._note("learned", origin, case.image_digest, record.created)

    def _remove(self) -> None:
        number = self._draw.randrange(0, _PHOTOS, _REMOVABLE)
        origin: Origin = "anchor" if number % 5 == 0 else "contrast"
        image = photo(number, origin, self._name).image_digest
        record = self._bank.snapshot().views[origin].record_of_image(image)
        if record is not None:
            self._note("begins", origin, image, 0.0)
            self._forgotten.add(image)
            if self._bank.remove([record.id], origin=origin):
                self._note("removed", origin, image, 0.0)

    def _compact(self) -> None:
        self._bank.compact()

    def _sync(self) -> None:
        try:
            Replica(self._bank, self._hub, self._name).sync()
            self._note("synced", "contrast", "", 0.0)
        except MeiqaError as error:
            if not error.retryable:
                self._note("failed", "contrast", str(error), 0.0)

    def _note(self, did: str, origin: Origin, image: str, created: float) -> None:
        row = {"did": did, "origin": origin, "image": image, "created": created}
        self._notes.write(json.dumps(row) + "\n")


def notes_of(folder: Path) -> list[dict[str, Any]]:
    """Read what a device has noted; a kill may have cut the last line."""
    path, rows = folder / "notes", []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def nurse(folder: Path, hub: str) -> None:
    """Start a device's process with every line that is read, in a fork, which is ready at once."""
    for _ in sys.stdin:
        child = os.fork()
        if child == 0:
            try:
                Device(folder, hub).work()
            except BaseException as error:
                (folder / "died").write_text(repr(error))
            finally:
                os._exit(1)
        say(str(child))
        os.waitpid(child, 0)
        say("ended")


class Nursed:
    """A device, from outside."""

    def __init__(self, folder: Path, hub: str) -> None:
        command = module_command(_MODULE, "--nurse", folder, "--hub", hub)
        self.folder = folder
        self._process = subprocess.Popen(
            command, env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._child = 0
        self.start()

    def start(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("start\n")
        self._process.stdin.flush()
        self._child = int(self._process.stdout.readline())

    def kill(self) -> None:
        assert self._process.stdout is not None
        os.kill(self._child, signal.SIGKILL)
        self._process.stdout.readline()

    def end(self) -> None:
        self.kill()
        self._process.communicate(timeout=_PATIENCE_S)


def chaos(devices: int, seconds: float, kills: int, seed: int = 0) -> dict[str, Any]:
    """Let it all happen, and count what is wrong; see the module."""
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="meiqa-hub-") as place, serving() as server:
        hub = server.hub()
        network = Network(server.user(hub, "meiqa_anchors"))
        folders = [Path(place) / f"device-{number}" for number in range(devices)]
        for folder in folders:
            with AnchorWriter(folder / "memory", _DIGEST, _KEY, _TOKEN) as writer:
                writer.finish()
        nursed = [Nursed(folder, network.address) for folder in folders]
        try:
            outages = _disturb(nursed, server, network, seconds, kills, draw)
        finally:
            for each in nursed:
                each.end()
            network.mend()
        found = _judged(folders, network.address, hub)
        network.close()
    wrong = ("lost", "doubled", "unlike", "returned", "damaged", "died")
    return {
        **found,
        "right": not any(found[name] for name in wrong),
        "kills": kills,
        "outages": outages,
        "settings": {"devices": devices, "seconds": seconds, "photos": _PHOTOS, "seed": seed},
        **run_on("psycopg"),
    }


def _disturb(
    nursed: Sequence[Nursed],
    server: Server,
    network: Network,
    seconds: float,
    kills: int,
    draw: random.Random,
) -> dict[str, int]:
    """Kill devices, stop the server and cut the network, at random; count the outages."""
    begun, outages = time.monotonic(), {"server": 0, "network": 0}
    next_outage, mend_at, broken = _OUTAGE_S / 4, 0.0, ""
    for kill in range(kills):
        at = seconds * (kill + draw.random()) / kills
        while (now := time.monotonic() - begun) < at:
            if broken and now >= mend_at:
                server.start() if broken == "server" else network.mend()
                next_outage, broken = now + draw.uniform(0.5, 1.0) * _OUTAGE_S, ""
            elif not broken and now >= next_outage:
                broken = draw.choice(
                    ["server", "network"] if server.can_be_stopped else ["network"]
                )
                server.stop() if broken == "server" else network.cut()
                outages[broken] += 1
                mend_at = now + draw.uniform(0.5, 2.0)
            time.sleep(0.01)
        each = draw.choice(nursed)
        each.kill()
        each.start()
    if broken == "server":
        server.start()
    return outages


def _judged(folders: Sequence[Path], address: str, hub: str) -> dict[str, Any]:
    """Sync all in peace, and count what is wrong."""
    banks = {
        folder.name: MemoryBank.open(
            folder / "memory", "rw", package_digest=_DIGEST, policy=_POLICY
        )
        for folder in folders
    }
    for _ in range(2):
        for name, bank in banks.items():
            Replica(bank, address, name).sync()
    with psycopg.connect(hub) as connection:
        rows = connection.execute(
            "SELECT origin, image, created, device, base, removed_at, key IS NULL FROM meiqa.cases"
        ).fetchall()
    live = {(row[0], row[1]): (row[2], row[3]) for row in rows if not row[6]}
    state = {(row[0], row[1]): row[4:] for row in rows}
    told = [(folder.name, each) for folder in folders for each in notes_of(folder)]
    removed = {(e["origin"], e["image"]) for _, e in told if e["did"] in ("begins", "removed")}
    lost = doubled = unlike = 0
    for name, each in told:
        place = each["origin"], each["image"]
        if each["did"] == "learned" and place not in removed:
            lost += live.get(place, (0.0, "")) < (each["created"], name)
    for name, bank in banks.items():
        records = list(bank.cases())
        held = {(e.origin, e.image_digest): (e.created, e.device or name) for e in records}
        doubled += len(records) - len(held)
        unlike += held != live
        bank.close()
    acknowledged = {(e["origin"], e["image"]) for _, e in told if e["did"] == "removed"}
    returned = 0
    for place in acknowledged:
        base, removed_at, is_removed = state.get(place, (0, 0, False))
        returned += removed_at == 0 or (not is_removed and base < removed_at)
    damage = [finding for folder in folders for finding in verify_memory(folder / "memory")]
    did = [each["did"] for _, each in told]
    return {
        **{"lost": lost, "doubled": doubled, "unlike": unlike, "returned": returned},
        "damaged": len(damage),
        "died": [(f / "died").read_text() for f in folders if (f / "died").exists()],
        "failed": sorted({each["image"] for _, each in told if each["did"] == "failed"}),
        **{name: did.count(name) for name in ("learned", "removed", "synced")},
        "cases at the end": len(live),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it and print JSON."""
    parser = argparse.ArgumentParser(prog=f"python -m {_MODULE}", description=__doc__)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--nurse", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--hub", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.nurse:
        nurse(given.nurse, given.hub)
        return 0
    result = chaos(given.devices, given.seconds, given.kills, given.seed)
    say(json.dumps(result, indent=2))
    return 0 if result["right"] else 1


if __name__ == "__main__":
    sys.exit(main())
