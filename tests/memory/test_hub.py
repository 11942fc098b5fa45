"""Memories that learn from each other by a hub, on a real server."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest

from benchmarks.hub_server import Network, Server
from meiqa.errors import (
    AccessDenied,
    MeiqaError,
    ServiceError,
    ServiceUnreachable,
    StoreMismatch,
    UsageError,
)
from meiqa.memory import Case, ContrastPolicy, MemoryBank, RetrievalPolicy, verify_memory
from meiqa.memory.hub import Hub, address, connected, initialise
from meiqa.memory.replica import Replica, Synced
from tests.memory.samples import DIGEST, KEY_WIDTH, assert_same_case, build_anchors, make_case

Seen = dict[tuple[str, str], tuple[float, str, str]]

A_REMOVAL = """INSERT INTO meiqa.cases (package, key_kind, origin, image, device, created, base)
    VALUES ('another', 'summary', 'contrast', 'none', 'nobody', 0, 0)"""


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


def test_a_removal_reaches_everybody_and_no_late_push_undoes_it(devices: Three) -> None:
    attic, barn, cellar = devices
    attic.learn("cat", "dog")
    in_step(*devices)
    barn.forget("cat")
    cellar.learn("cat")  # without knowing that it was removed
    barn.sync()
    assert cellar.sync().pushed == 0
    assert {image for _, image in in_step(*devices)} == {digest_of("dog")}
    cellar.learn("cat")  # knowing it
    assert {image for _, image in in_step(*devices)} == {digest_of("cat"), digest_of("dog")}


@pytest.mark.parametrize("moment", ["push", "reading"])
def test_what_is_learned_again_while_its_removal_is_told_stays(
    devices: Three, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    attic, barn, _ = devices
    attic.learn("cat")
    in_step(attic, barn)
    attic.forget("cat")
    done = getattr(Hub, moment)

    def learn_again(*arguments: Any) -> Any:
        monkeypatch.setattr(Hub, moment, done)
        result = done(*arguments)
        attic.learn("cat", score=4.5)
        return result

    monkeypatch.setattr(Hub, moment, learn_again)
    attic.sync()
    assert [score for score, _, _ in in_step(attic, barn).values()] == [4.5]
    attic.forget("cat")
    assert not in_step(attic, barn)


def test_who_was_away_hears_that_a_photo_was_removed_and_learned_again(devices: Three) -> None:
    """However clocks go: what is learned again on a device that lags is no older case."""
    attic, barn, cellar = devices
    attic.learn("cat", score=1.5)
    in_step(*devices)
    barn.forget("cat")
    in_step(barn, cellar)
    with psycopg.connect(attic.hub) as connection:
        cellar.learn("cat", score=4.5)
        cellar.sync()
        # A clock that lags by a year, as the trigger would let it in.
        connection.execute("ALTER TABLE meiqa.cases DISABLE TRIGGER settle")
        connection.execute("UPDATE meiqa.cases SET created = created - 3e7")
        connection.execute("ALTER TABLE meiqa.cases ENABLE TRIGGER settle")
    attic.sync()
    assert [score for score, _, _ in attic.holds().values()] == [4.5]


@pytest.mark.parametrize("first", [0, 1])
def test_two_devices_that_learned_one_photo_come_to_one_case(devices: Three, first: int) -> None:
    """Whoever pushes first, the later learned stays."""
    attic, barn, _ = devices
    attic.learn("cat", score=2.0)
    barn.learn("cat", score=3.0)
    (attic, barn)[first].sync()
    ((score, _, device),) = in_step(*devices).values()
    assert (score, device) == (3.0, "barn")


def test_what_is_told_twice_changes_nothing(devices: Three) -> None:
    attic, barn, _ = devices
    attic.learn("cat", "dog")
    attic.sync()
    attic.forget("dog")
    waiting = attic.bank.outbox()
    with connected(attic.hub) as hub:
        pushed = [(waiting[0], None)]
        assert hub.push(pushed, "attic", attic.bank.identity) != [None]
        barn.sync()
        barn.learn("dog")
        barn.sync()
        # The acknowledgement was lost, and the removal is told again after all that.
        assert hub.push(pushed, "attic", attic.bank.identity) == [None]
    assert {image for _, image in in_step(*devices)} == {digest_of("cat"), digest_of("dog")}


def test_nobody_passes_a_push_that_takes_long(devices: Three) -> None:
    """Or the later one's sequence number, once pulled, would hide the earlier one for good."""
    attic, barn, cellar = devices
    attic.learn("cat")
    barn.learn("dog")
    with connected(attic.hub) as hub:
        attic.bank.follow(hub.id)
    with psycopg.connect(attic.hub) as connection, ThreadPoolExecutor(1) as pool:
        waiting, entry = attic.bank.outbox()[0], attic.bank.snapshot().contrast.recent[0]
        Hub(connection).push([(waiting, entry)], "attic", attic.bank.identity)
        connection.execute(A_REMOVAL)  # begins a transaction that holds the numbers
        passing = pool.submit(barn.sync)
        assert not wait([passing], 0.5).done
        assert cellar.sync().pulled == 1
        connection.commit()
        assert passing.result(60).pushed == 1
    assert cellar.sync().pulled == 1
    assert len(in_step(*devices)) == 2


def test_eviction_is_nobody_elses_business(tmp_path: Path, hub: str, no_anchors: Path) -> None:
    few = ContrastPolicy(capacity=20)
    small = Device(Path(shutil.copytree(no_anchors, tmp_path / "s")), hub, "small", few)
    large = Device(Path(shutil.copytree(no_anchors, tmp_path / "l")), hub, "large")
    large.learn(*map(str, range(50)))
    large.sync()
    small.sync()
    small.learn(*(f"its own {number}" for number in range(30)))
    small.bank.evict(keep=0)
    assert small.sync() == Synced()  # what is gone can't be told
    large.learn(*(f"another {number}" for number in range(50)))
    large.sync()
    assert small.sync().pulled == 20  # what would be evicted at once is not even fetched
    large.learn("one more")
    large.sync()
    assert small.sync().pulled == 1
    kept = small.holds()
    assert len(kept) == 19
    assert small.sync() == Synced()
    assert small.holds() == kept
    large.sync()
    assert len(large.holds()) == 101
    small.bank.close()
    large.bank.close()


@pytest.mark.parametrize("count", [40, 300])
def test_a_pull_of_many_is_as_one_of_few(devices: Three, count: int) -> None:
    """Many go straight into a segment, and what is told of them meanwhile holds."""
    attic, barn, _ = devices
    attic.learn(*map(str, range(count)))
    attic.anchor("church")
    barn.learn("7", "8", "mine", score=2.5)
    barn.anchor("church", score=4.0)
    held = in_step(attic, barn)
    assert len(held) == count + 2
    assert held["contrast", digest_of("7")][2] == "barn"
    attic.forget("9")
    attic.bank.compact()
    assert in_step(attic, barn).keys() == held.keys() - {("contrast", digest_of("9"))}


def test_a_camera_may_not_write_anchors_and_learns_all_the_same(
    server: Server, devices: Three
) -> None:
    """The database refuses it, whatever the program asks."""
    office, camera, _ = devices
    camera.hub = server.user(office.hub, "meiqa_learner")
    camera.learn("cat")
    camera.anchor("church", score=1.0)
    done = camera.sync()
    assert done.pushed == 1
    assert (done.kept, done.complaints) == ({"anchor": 1}, [])
    assert "1 anchor cases kept: this role may not write them" in str(done)
    office.hub = server.user(office.hub, "meiqa_anchors")
    office.anchor("church", score=4.0)
    office.sync()
    camera.sync()
    assert camera.holds()["anchor", digest_of("church")][0] == 4.0
    assert camera.sync() == Synced()
    with psycopg.connect(camera.hub, autocommit=True) as connection:
        spoil = "UPDATE meiqa.cases SET score = 1 WHERE origin = 'anchor'"
        assert connection.execute(spoil).rowcount == 0  # it sees no anchor to write
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute("DELETE FROM meiqa.cases")


def test_who_may_only_read_learns_from_others(server: Server, devices: Three) -> None:
    attic, barn, _ = devices
    attic.learn("cat")
    attic.sync()
    barn.hub = server.user(attic.hub, "meiqa_reader")
    barn.learn("dog")
    done = barn.sync()
    assert (done.pushed, done.pulled, done.kept) == (0, 1, {"contrast": 1})
    assert done.complaints == ["1 contrast cases kept: this role may not write them"]
    assert len(barn.holds()) == 2


def test_who_has_no_role_is_told_so(server: Server, devices: Three) -> None:
    attic, *_ = devices
    with psycopg.connect(attic.hub, autocommit=True) as connection:
        connection.execute(f"CREATE ROLE nobody_{os.getpid()} LOGIN")
    attic.hub = psycopg.conninfo.make_conninfo(attic.hub, user=f"nobody_{os.getpid()}")
    with pytest.raises(AccessDenied, match="meiqa_learner"):
        attic.sync()


def test_a_hub_out_of_reach_loses_nothing(devices: Three) -> None:
    attic, barn, _ = devices
    network = Network(attic.hub)
    attic.hub = network.address
    attic.learn("cat")
    network.cut()
    with pytest.raises(ServiceUnreachable, match="kept for the next sync") as caught:
        attic.sync()
    assert caught.value.retryable
    assert len(attic.holds()) == 1
    network.mend()
    assert attic.sync().pushed == 1
    network.close()
    assert barn.sync().pulled == 1


SPOILT = {
    "a key of another width": "key = '[1,2,3]'",
    "tokens that are cut off": "tokens = substr(tokens, 2)",
    "a scale that is no number": "scales = '\\x0000c07f'::bytea || substr(scales, 5)",
    "a grid of other tokens": "grid_rows = 7",
    "an image with no digest": "image = 'cat.jpg'",
    "a device without a name": "device = ''",
}


@pytest.mark.parametrize("what", SPOILT)
def test_a_malformed_row_is_refused_by_name_and_the_rest_goes_on(devices: Three, what: str) -> None:
    attic, barn, _ = devices
    attic.learn("cat", "dog", "fox")
    attic.sync()
    with psycopg.connect(attic.hub) as connection:
        connection.execute("ALTER TABLE meiqa.cases DISABLE TRIGGER settle")
        spoil = f"UPDATE meiqa.cases SET {SPOILT[what]} WHERE image = %s"
        connection.execute(spoil, [digest_of("cat")])  # type: ignore[arg-type]
    done = barn.sync()
    assert (done.pulled, len(done.refused)) == (2, 1)
    assert digest_of("cat")[:16] in done.refused[0].name or "cat.jpg" in done.refused[0].name
    assert {image for _, image in barn.holds()} == {digest_of("dog"), digest_of("fox")}
    assert barn.sync() == Synced()


def test_a_malformed_row_among_many_takes_no_place(devices: Three) -> None:
    """What is held stays, if the later case that should take its place can't be read."""
    attic, barn, _ = devices
    barn.learn("7", score=2.5)
    attic.learn(*map(str, range(300)), score=4.0)
    attic.sync()
    with psycopg.connect(attic.hub) as connection:
        connection.execute("ALTER TABLE meiqa.cases DISABLE TRIGGER settle")
        spoil = "UPDATE meiqa.cases SET grid_rows = 7 WHERE image = %s"
        connection.execute(spoil, [digest_of("7")])
        connection.execute("ALTER TABLE meiqa.cases ENABLE TRIGGER settle")
    done = barn.sync()
    assert (done.pulled, len(done.refused)) == (299, 1)
    held = barn.holds()
    assert len(held) == 300
    assert held["contrast", digest_of("7")][0] == 2.5


def test_beside_scoring_what_is_pulled_is_there_with_its_index(
    devices: Three, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("meiqa.memory.index.FLAT_BELOW", 100)
    monkeypatch.setattr("meiqa.memory.versions.FLAT_BELOW", 100)
    attic, barn, _ = devices
    attic.learn(*map(str, range(300)))
    attic.sync()
    absorb, indexed = barn.bank.absorb, []

    def noted(*given: Any) -> None:
        absorb(*given)
        indexed.append(barn.bank.snapshot().contrast.version.index is not None)

    monkeypatch.setattr(barn.bank, "absorb", noted)
    Replica(barn.bank, barn.hub, barn.name, gently=True).sync()
    assert indexed == [True]


def test_a_pull_may_rest_for_longer_than_a_transaction_may_idle(devices: Three) -> None:
    attic, *_ = devices
    with psycopg.connect(attic.hub) as connection:
        hub = Hub(connection)
        connection.execute("SET idle_in_transaction_session_timeout = '50ms'")
        connection.commit()
        with hub.reading():
            time.sleep(0.3)
            assert hub.news(0, [], attic.bank.identity) == []


def test_pictures_of_a_remote_model_are_not_shared(devices: Three) -> None:
    attic, *_ = devices
    (attic.path / "remote.json").write_text("{}")
    with pytest.raises(UsageError, match="pictures, which are not shared"):
        attic.sync()


def test_what_the_database_refuses_of_ours_is_named_and_the_rest_goes_on(devices: Three) -> None:
    attic, barn, _ = devices
    odd = replace(photo("cat"), summary="no text of PostgreSQL's: \0")
    attic.bank.remember(odd, provenance="a test")
    attic.learn("dog")
    done = attic.sync()
    assert (done.pushed, [each.name for each in done.refused]) == (
        1,
        [f"contrast {digest_of('cat')[:16]}"],
    )
    assert barn.sync().pulled == 1


def test_models_are_kept_apart(devices: Three, tmp_path: Path) -> None:
    attic, *_ = devices
    attic.learn("cat")
    attic.sync()
    path = build_anchors(tmp_path / "other", digest="cd34")
    with MemoryBank.open(path, "rw", package_digest="cd34") as other:
        assert Replica(other, attic.hub, "other").sync() == Synced()
    with connected(attic.hub) as hub:
        status = hub.status()
    assert [(row["package"], row["device"], row["cases"]) for row in status["of"]] == [
        (DIGEST, "attic", 1)
    ]


def test_a_memory_is_the_replica_of_one_hub(server: Server, devices: Three) -> None:
    attic, *_ = devices
    attic.sync()
    attic.hub = server.hub()
    with pytest.raises(StoreMismatch, match="replica of another hub"):
        attic.sync()


def test_a_hub_that_was_set_back_is_told_all_again(server: Server, devices: Three) -> None:
    attic, barn, _ = devices
    attic.learn("cat", "dog")
    in_step(attic, barn)
    with psycopg.connect(attic.hub) as connection:  # as a restored copy is
        connection.execute("DELETE FROM meiqa.cases; SELECT setval('meiqa.seq', 1)")
    with pytest.raises(StoreMismatch, match="set back"):
        barn.sync()
    assert Replica(barn.bank, barn.hub, barn.name).sync(anew=True).pushed == 2
    assert Replica(attic.bank, attic.hub, attic.name).sync(anew=True).pushed == 0
    assert len(in_step(attic, barn)) == 2


def test_schemas_have_versions(server: Server, hub: str) -> None:
    assert initialise(hub) == (1, 1)
    with psycopg.connect(hub, autocommit=True) as connection:
        for version, what in ((9, "newer meiqa"), (0, "meiqa hub init")):
            connection.execute("UPDATE meiqa.hub SET version = %s", [version])
            with pytest.raises(StoreMismatch, match=what), connected(hub):
                pass
        connection.execute("DROP SCHEMA meiqa CASCADE")
    with pytest.raises(ServiceError, match="meiqa hub init"), connected(hub):
        pass


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://camera:secret@hub.example.org/photos",
        "host=hub.example.org password=secret",
        "postgresql://camera:secret@hub.example.org:port:/photos?what",
        "postgresql:/camera:secret",
        "host=hub.example.org sslpassword=secret",
    ],
)
def test_passwords_stand_neither_in_addresses_nor_in_errors(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        address(url)
    shown: BaseException | None = caught.value
    assert "secret" not in str(shown)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_a_hub_elsewhere_is_asked_for_tls(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "sslmode=require" in address("postgresql://camera@hub.example.org/photos")
    assert "sslmode=verify-full" in address("postgresql://c@hub.example.org/p?sslmode=verify-full")
    assert "sslmode" not in address("postgresql://camera@localhost/photos")
    for elsewhere in ("hostaddr=192.0.2.1", "host=localhost hostaddr=192.0.2.1", "host=/tmp,far"):
        assert "sslmode=require" in address(elsewhere)
    monkeypatch.setenv("PGHOST", "hub.example.org")
    assert "sslmode=require" in address("dbname=photos")
    monkeypatch.setenv("PGSSLMODE", "verify-full")  # which libpq takes
    assert "sslmode" not in address("dbname=photos")


def test_a_service_file_that_says_nothing_of_tls_means_no_hub_without(
    hub: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    network = Network(hub)
    named = psycopg.conninfo.conninfo_to_dict(network.address)
    file = tmp_path / "services"
    lines = [f"{name}={value}" for name, value in named.items()]
    file.write_text("\n".join(["[photos]", *lines, ""]))
    monkeypatch.setenv("PGSERVICEFILE", str(file))
    with connected("service=photos"):
        pass
    monkeypatch.setattr("meiqa.memory.hub._HERE", ("",))  # so that it counts as another machine
    with pytest.raises(UsageError, match="no TLS"), connected("service=photos"):
        pass
    file.write_text("\n".join(["[photos]", *lines, "sslmode=disable", ""]))
    with connected("service=photos"):
        pass
    network.close()


def test_a_password_does_not_come_back_from_a_server_that_refuses_it(
    hub: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGPASSWORD", "secret")
    wrong = psycopg.conninfo.make_conninfo(hub, user="nobody_at_all")
    with pytest.raises(MeiqaError) as caught, connected(wrong):
        pass
    assert "secret" not in str(caught.value)


def test_a_database_of_any_encoding_holds_a_hub(server: Server) -> None:
    with psycopg.connect(server.address, autocommit=True) as connection:
        connection.execute(
            "CREATE DATABASE ascii ENCODING 'SQL_ASCII' TEMPLATE template0 LOCALE 'C'"
        )
    url = psycopg.conninfo.make_conninfo(server.address, dbname="ascii")
    initialise(url)
    with connected(address(url)) as hub:
        assert isinstance(hub.id, str)
