"""Memories that learn from each other by a hub, on a real server."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import numpy as np
import psycopg
import pytest

from benchmarks.hub_server import Server, serving
from meiqa.errors import ServiceError, ServiceUnreachable, StoreMismatch, UsageError
from meiqa.memory import Case, ContrastPolicy, MemoryBank, RetrievalPolicy, verify_memory
from meiqa.memory.hub import connected, initialise
from meiqa.memory.replica import Replica, Synced
from tests.memory.samples import DIGEST, KEY_WIDTH, assert_same_case, build_anchors, make_case

Seen = dict[tuple[str, str], tuple[float, str, str]]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture
def hub(server: Server) -> str:
    return server.hub()


@pytest.fixture(scope="module")
def no_anchors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_anchors(tmp_path_factory.mktemp("anchors") / "m")


def photo(name: str, origin: str = "contrast", score: float | None = None) -> Case:
    digest = sha256(name.encode()).hexdigest()
    case_id = digest[:16] if origin == "contrast" else name
    return make_case(case_id, origin, score=score, image_digest=digest)  # type: ignore[arg-type]


class Device:
    """A device with a memory of its own."""

    def __init__(self, path: Path, hub: str, name: str, policy: ContrastPolicy | None = None):
        self.path, self.hub, self.name = path, hub, name
        self.bank = MemoryBank.open(path, "rw", package_digest=DIGEST, policy=policy)

    def learn(self, *names: str, score: float | None = None) -> None:
        for name in names:
            self.bank.remember(photo(name, score=score), provenance=f"reflected on /home/{name}")

    def anchor(self, name: str, score: float | None = None) -> None:
        self.bank.add_anchor(photo(name, "anchor", score), provenance="a jury")

    def forget(self, name: str) -> None:
        ids = [each.id for each in self.bank.cases() if each.image_digest == digest_of(name)]
        assert self.bank.remove(ids) == 1

    def sync(self) -> Synced:
        return Replica(self.bank, self.hub, self.name).sync()

    def holds(self) -> Seen:
        """What it finds, and whom it was learned by."""
        everything = RetrievalPolicy(k=100_000)
        found = self.bank.snapshot().retrieve(np.ones(KEY_WIDTH, np.float32), everything, None)
        return {
            (case.origin, case.image_digest): (case.score, case.summary, case.device or self.name)
            for case in found
        }


def digest_of(name: str) -> str:
    return sha256(name.encode()).hexdigest()


@pytest.fixture
def devices(tmp_path: Path, hub: str, no_anchors: Path) -> Iterator[tuple[Device, Device, Device]]:
    names = ("attic", "barn", "cellar")
    made = [Device(Path(shutil.copytree(no_anchors, tmp_path / name)), hub, name) for name in names]
    yield made[0], made[1], made[2]
    for device in made:
        device.bank.close()
        assert verify_memory(device.path) == []


Three = tuple[Device, Device, Device]


def in_step(*devices: Device) -> Seen:
    """Sync until everybody has heard of everything; give what all of them hold."""
    for _ in range(2):
        for device in devices:
            device.sync()
    first, *others = [device.holds() for device in devices]
    for other in others:
        assert other == first
    return first


def test_what_one_device_learned_all_are_told(devices: Three) -> None:
    attic, barn, cellar = devices
    attic.learn("cat", "dog")
    barn.anchor("church")
    assert attic.sync().pushed == 2
    assert barn.sync() == Synced(pushed=1, pulled=2)
    assert cellar.sync() == Synced(pulled=3)
    assert cellar.sync() == Synced()
    held = in_step(*devices)
    assert {name: device for name, (_, _, device) in held.items()} == {
        ("contrast", digest_of("cat")): "attic",
        ("contrast", digest_of("dog")): "attic",
        ("anchor", digest_of("church")): "barn",
    }
    found = cellar.bank.snapshot().retrieve(photo("cat").key, RetrievalPolicy(k=3), None)
    cat = next(case for case in found if case.image_digest == digest_of("cat"))
    assert cat.device == "attic"
    assert_same_case(cat, photo("cat"))
    assert all("/home/" not in record.provenance for record in cellar.bank.cases())
