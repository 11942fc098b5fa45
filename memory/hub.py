"""A hub: the PostgreSQL database by which many memories learn from each other.

A row is the case of one image, of one origin, for one package and kind of key, or says that it was
removed. What becomes of a row is decided in the database, by one trigger, whoever writes and in
whatever order (docs/hub.md). The trigger takes a lock that is held until the transaction is
visible, so that sequence numbers become visible in their order: who has seen one has seen all
before it.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.rows import dict_row

from meiqa.errors import (
    AccessDenied,
    MeiqaError,
    ServiceError,
    ServiceUnreachable,
    StoreMismatch,
    UsageError,
    one_line,
)
from meiqa.memory.cases import VECTOR_DTYPES, Entry, Features, Record
from meiqa.memory.database import Identity, Widths
from meiqa.memory.wal import Image, Waiting
from meiqa.types import KeyKind, Origin

logging.getLogger("psycopg").setLevel(logging.ERROR)  # its warnings repeat what it raises

ROLES = ("meiqa_reader", "meiqa_learner", "meiqa_anchors")
"""Who may read; learn and remove what was learned, too; write and remove anchors, too."""

_MIGRATIONS = (
    """
CREATE EXTENSION IF NOT EXISTS vector;
CREATE SEQUENCE meiqa.seq;
CREATE TABLE meiqa.cases (
    package text NOT NULL,
    key_kind text NOT NULL,
    origin text NOT NULL CHECK (origin IN ('anchor', 'contrast')),
    image text COLLATE "C" NOT NULL,
    seq bigint NOT NULL,
    device text NOT NULL,
    created double precision NOT NULL CHECK (created >= 0 AND created < 'Infinity'),
    base bigint NOT NULL,
    removal text,
    removed_at bigint NOT NULL DEFAULT 0,
    score double precision CHECK (score BETWEEN 1 AND 5),
    std double precision CHECK (std >= 0 AND std < 'Infinity'),
    summary text, provenance text,
    key halfvec, tokens bytea, scales bytea, grid_rows integer, grid_columns integer,
    PRIMARY KEY (package, key_kind, origin, image),
    CHECK (num_nulls(score, std, summary, provenance, key, tokens, scales, grid_rows, grid_columns)
        IN (0, 9))
);
ALTER TABLE meiqa.cases ALTER COLUMN tokens SET STORAGE EXTERNAL;
CREATE UNIQUE INDEX cases_by_seq ON meiqa.cases (package, key_kind, seq);

CREATE FUNCTION meiqa.settle() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM pg_advisory_xact_lock(hashtext('meiqa.cases'));
    IF TG_OP = 'UPDATE' THEN
        IF NEW.key IS NULL THEN
            IF NEW.removal = OLD.removal THEN RETURN NULL; END IF;
        ELSE
            IF NEW.base < OLD.removed_at OR OLD.key IS NOT NULL
                AND (NEW.created, NEW.score, NEW.std) <= (OLD.created, OLD.score, OLD.std)
            THEN RETURN NULL; END IF;
            NEW.removal := OLD.removal;
            NEW.removed_at := OLD.removed_at;
        END IF;
    END IF;
    NEW.seq := nextval('meiqa.seq');
    IF NEW.key IS NULL THEN NEW.removed_at := NEW.seq; END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER settle BEFORE INSERT OR UPDATE ON meiqa.cases
    FOR EACH ROW EXECUTE FUNCTION meiqa.settle();

DO $$ DECLARE name text; BEGIN
    FOREACH name IN ARRAY ARRAY['meiqa_reader', 'meiqa_learner', 'meiqa_anchors'] LOOP
        IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = name) THEN
            EXECUTE format('CREATE ROLE %I NOLOGIN', name);
        END IF;
    END LOOP;
END $$;
GRANT meiqa_reader TO meiqa_learner;
GRANT meiqa_learner TO meiqa_anchors;
GRANT USAGE ON SCHEMA meiqa TO meiqa_reader;
GRANT SELECT ON meiqa.cases, meiqa.hub, meiqa.seq TO meiqa_reader;
GRANT INSERT, UPDATE ON meiqa.cases TO meiqa_learner;
ALTER TABLE meiqa.cases ENABLE ROW LEVEL SECURITY;
CREATE POLICY reads ON meiqa.cases FOR SELECT TO meiqa_reader USING (true);
CREATE POLICY learns ON meiqa.cases FOR INSERT TO meiqa_learner WITH CHECK (origin = 'contrast');
CREATE POLICY relearns ON meiqa.cases FOR UPDATE TO meiqa_learner USING (origin = 'contrast');
CREATE POLICY anchors ON meiqa.cases FOR INSERT TO meiqa_anchors WITH CHECK (true);
CREATE POLICY corrects ON meiqa.cases FOR UPDATE TO meiqa_anchors USING (true);
""",
)
"""Each brings the schema from one version to the next; never changed, only added to."""

_BEGINNING = """
CREATE SCHEMA IF NOT EXISTS meiqa;
CREATE TABLE IF NOT EXISTS meiqa.hub (id uuid NOT NULL, version integer NOT NULL);
INSERT INTO meiqa.hub SELECT gen_random_uuid(), 0 WHERE NOT EXISTS (SELECT FROM meiqa.hub);
"""
_CONTENT = (
    *("score", "std", "summary", "provenance", "key", "tokens", "scales"),
    *("grid_rows", "grid_columns"),
)
_COLUMNS = (
    *("package", "key_kind", "origin", "image", "device", "created", "base", "removal"),
    *_CONTENT,
)
_VALUES = ", ".join(
    "%(key)b::float8[]::halfvec" if name == "key" else f"%({name})s" for name in _COLUMNS
)
_NEWER = ", ".join(f"{name} = EXCLUDED.{name}" for name in (*_COLUMNS, "seq", "removed_at"))
_PUSH = (
    f"INSERT INTO meiqa.cases ({', '.join(_COLUMNS)}) VALUES ({_VALUES})"
    f" ON CONFLICT (package, key_kind, origin, image) DO UPDATE SET {_NEWER} RETURNING seq"
)
_TOLD = (
    "origin, image, seq, device, created, key IS NULL AS removed, removal, removed_at, score, std"
)
_MINE = "package = %(package_digest)s AND key_kind = %(key_kind)s"
_READ = f"""
SELECT package, key_kind, {_TOLD}, summary, provenance, halfvec_send(key) AS key,
    tokens, scales, grid_rows, grid_columns FROM meiqa.cases"""
_ROWS_AT_ONCE = 200
ID_DIGITS = 16
"""Of an image's digest, which name the cases that are pulled, as they do what is learned here."""

_DEFAULTS = {
    "application_name": "meiqa",
    "client_encoding": "UTF8",  # the database's own need not be one that texts can be told in
    "connect_timeout": "10",
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "20000",
}
_HERE = ("", "localhost", "127.0.0.1", "::1")
_HALF_HEADER_BYTES = 4  # in front of a halfvec's elements: how many they are, and nothing


class Told(NamedTuple):
    """What a hub says of an image, without its content; see `meiqa.memory.replica`."""

    origin: Origin
    image: str
    seq: int
    device: str
    created: float
    removed: bool
    removal: str | None
    removed_at: int
    score: float | None
    std: float | None

    @property
    def rank(self) -> tuple[float, float, float]:
        """Of two cases of an image the one of higher rank stays; see `rank_of`."""
        return self.created, self.score or 0.0, self.std or 0.0

    @property
    def name(self) -> Image:
        """What it is known by."""
        return self.origin, self.image


def rank_of(record: Record) -> tuple[float, float, float]:
    """Rank a case: the later learned stays; at one moment, as in copies of a memory, the same."""
    return record.created, record.score, record.std


class Refused(NamedTuple):
    """A row of a hub that is no case, and why."""

    name: str
    reason: str


def address(url: str) -> str:
    """Give a hub's address with all that connecting needs; UsageError for one that can't be used.

    Passwords in it are refused: every process of the machine can read a command line. A hub on
    another machine is asked for TLS, unless the address or PGSSLMODE says otherwise; what a service
    file says is known only once it is connected (see `_connected`).
    """
    try:
        named = conninfo_to_dict(url)
    except psycopg.Error:  # whose text may repeat a password
        allowed = "postgresql://USER@HOST/DATABASE, or a line of libpq's parameters"
        raise UsageError("the hub's address can't be read", allowed=allowed) from None
    if named.get("password") or named.get("sslpassword"):
        hint = "use ~/.pgpass, PGPASSWORD or a service file"
        raise UsageError("the hub's address has a password in it", hint=hint)
    service = named.get("service") or os.environ.get("PGSERVICE")
    unsaid = not (service or os.environ.get("PGSSLMODE") or _is_here(_host(named)))
    tls = {"sslmode": "require"} if unsaid else {}
    parameters: dict[str, Any] = {**tls, **_DEFAULTS, **named}
    return make_conninfo(**parameters)


def _host(named: Mapping[str, Any]) -> str:
    """Give the machines that libpq turns to, but for those that a service file names."""
    address = named.get("hostaddr") or os.environ.get("PGHOSTADDR")
    return str(address or named.get("host") or os.environ.get("PGHOST") or "")


def _is_here(hosts: str) -> bool:
    return all(host in _HERE or host.startswith(("/", "@")) for host in hosts.split(","))


def shown(url: str) -> str:
    """Give an address as it may stand in a message."""
    named = conninfo_to_dict(url)
    where = _host(named) or named.get("service") or os.environ.get("PGSERVICE") or "this machine"
    port = f":{named['port']}" if named.get("port") else ""
    return one_line(f"{where}{port}/{named.get('dbname') or ''}")


@contextmanager
def hub_errors(url: str) -> Iterator[None]:
    """Turn the driver's errors into ours, naming the hub."""
    name = f"the hub {shown(url)}"
    try:
        yield
    except psycopg.errors.InsufficientPrivilege as error:
        hint = f"ask for a role of {', '.join(ROLES)} (docs/hub.md)"
        raise AccessDenied(f"{name} refuses that", seen=_said(error), hint=hint) from error
    except (psycopg.errors.InvalidSchemaName, psycopg.errors.UndefinedTable) as error:
        hint = "make one: meiqa hub init URL"
        raise ServiceError(f"there is no hub at {shown(url)}", hint=hint) from error
    except psycopg.OperationalError as error:
        hint = "check its address and that it runs; what was learned is kept for the next sync"
        raise ServiceUnreachable(f"{name} can't be used", seen=_said(error), hint=hint) from error
    except psycopg.Error as error:
        raise ServiceError(f"{name} failed", seen=_said(error)) from error


def _said(error: psycopg.Error) -> str:
    return error.diag.message_primary or str(error).strip().splitlines()[0]


def initialise(url: str) -> tuple[int, int]:
    """Make a hub of a database, or bring one up to date; give its schema's version before and now.

    Raises:
        AccessDenied: the role may not create schemas, roles or the extension `vector`.
        ServiceError: pgvector is not installed there, or a newer meiqa has made the schema.
    """
    with _connected(url) as connection:
        connection.execute("SELECT pg_advisory_xact_lock(hashtext('meiqa.hub'))")
        connection.execute(_BEGINNING)
        before = _version(connection)[1]
        for migration in _MIGRATIONS[before:]:
            connection.execute(migration)
        connection.execute("UPDATE meiqa.hub SET version = %s", [len(_MIGRATIONS)])
    return before, len(_MIGRATIONS)


def _version(connection: psycopg.Connection[Any]) -> tuple[str, int]:
    found = connection.execute("SELECT id::text, version FROM meiqa.hub").fetchone()
    if found is None:
        raise ServiceError("there is no hub in the database", hint="make one: meiqa hub init URL")
    if found[1] > len(_MIGRATIONS):
        what, seen = "the hub was made by a newer meiqa", f"schema version {found[1]}"
        raise StoreMismatch(what, seen=seen, allowed=len(_MIGRATIONS), hint="update meiqa")
    return found[0], found[1]


class Hub:
    """A connection to a hub; see `connected`.

    Attributes:
        id: Of the hub.
        reached: The last sequence number that was given.
    """

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self._connection = connection
        self.id, version = _version(connection)
        self.reached = 0
        if version < len(_MIGRATIONS):
            what, seen = "the hub has an older schema", f"version {version}"
            hint = "bring it up to date: meiqa hub init URL"
            raise StoreMismatch(what, seen=seen, allowed=len(_MIGRATIONS), hint=hint)
        (self.reached,) = connection.execute("SELECT last_value FROM meiqa.seq").fetchone() or (0,)
        # Whoever is cut off must not hold the others up for longer.
        connection.execute("SET idle_in_transaction_session_timeout = '60s'")
        connection.execute("SET lock_timeout = '30s'")
        connection.commit()

    def push(
        self, told: Sequence[tuple[Waiting, Entry | None]], device: str, identity: Identity
    ) -> list[int | None]:
        """Tell of cases, and of removals, as one; give the sequence numbers they were given.

        When it returns they are durable at the hub. What it has already, or has something newer
        of, changes nothing and has no number.
        """
        rows = [_pushed(waiting, entry, device, identity) for waiting, entry in told]
        numbers: list[int | None] = []
        with self._connection.transaction(), self._connection.cursor() as cursor:
            cursor.executemany(_PUSH, rows, returning=True)
            for _ in rows:
                changed = cursor.fetchone()
                numbers.append(changed and changed[0])
                cursor.nextset()
        return numbers

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Read everything inside as it is at one moment."""
        with self._connection.transaction():
            self._connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
            # It holds nobody up, and a gentle pull rests for longer.
            self._connection.execute("SET LOCAL idle_in_transaction_session_timeout = 0")
            yield

    def news(self, since: int, also: Sequence[Image], identity: Identity) -> list[Told]:
        """Tell what has changed after a sequence number, and how some other images stand."""
        query = f"""SELECT {_TOLD} FROM meiqa.cases WHERE {_MINE} AND (seq > %(since)s
            OR (origin, image) IN (SELECT * FROM unnest(%(origins)s::text[], %(images)s::text[])))
            ORDER BY seq"""
        origins, images = [origin for origin, _ in also], [image for _, image in also]
        values = {**identity.values, "since": since, "origins": origins, "images": images}
        return [Told(*row) for row in self._connection.execute(query, values, binary=True)]

    def entries(
        self, origin: Origin, images: Sequence[str], identity: Identity
    ) -> Iterator[Entry | Refused]:
        """Read the cases of images, by image; what is no case of this memory's is refused."""
        query = f"{_READ} WHERE {_MINE} AND origin = %(origin)s AND image = ANY(%(images)s)"
        values = {**identity.values, "origin": origin, "images": list(images)}
        for row in self._rows(f"{query} ORDER BY image", values):
            yield entry_of(row, identity.widths)

    def everything(self) -> Iterator[tuple[Entry | Refused, KeyKind]]:
        """Read all cases of all packages, by package, each with its kind of key."""
        query = f"{_READ} WHERE key IS NOT NULL ORDER BY package, key_kind, origin, image"
        for row in self._rows(query, {}):
            yield entry_of(row, None), row["key_kind"]

    def _rows(self, query: str, values: dict[str, Any]) -> Iterator[dict[str, Any]]:
        with self._connection.cursor("meiqa", row_factory=dict_row) as cursor:
            cursor.itersize = _ROWS_AT_ONCE
            yield from cursor.execute(query, values, binary=True)

    def status(self) -> dict[str, Any]:
        """Count what is there, by package, kind of key, origin and device."""
        counts = """SELECT package, key_kind, origin, device, count(key) AS cases,
            count(*) - count(key) AS removed, max(seq) AS seq FROM meiqa.cases
            GROUP BY package, key_kind, origin, device ORDER BY 1, 2, 3, 4"""
        with self._connection.cursor(row_factory=dict_row) as cursor:
            rows = cursor.execute(counts).fetchall()
            size = cursor.execute("SELECT pg_total_relation_size('meiqa.cases') AS bytes")
            return {"hub": self.id, "version": len(_MIGRATIONS), **size.fetchall()[0], "of": rows}


@contextmanager
def connected(url: str) -> Iterator[Hub]:
    """Connect to a hub.

    Raises:
        UsageError: the address can't be used.
        ServiceUnreachable: nobody answers there, or no longer.
        AccessDenied, ServiceError, StoreMismatch: there is no hub, or none for this role or meiqa.
    """
    with _connected(url) as connection:
        yield Hub(connection)


@contextmanager
def _connected(url: str) -> Iterator[psycopg.Connection[Any]]:
    conninfo = address(url)
    with hub_errors(conninfo), psycopg.connect(conninfo) as connection:
        asked = "sslmode" in conninfo_to_dict(conninfo) or os.environ.get("PGSSLMODE")
        modes = [each.val for each in connection.pgconn.info if each.keyword == b"sslmode"]
        plain = not (connection.pgconn.ssl_in_use or _is_here(connection.info.hostaddr))
        if plain and not asked and modes == [b"prefer"]:  # as it is where a service says nothing
            what = "the hub is on another machine and has no TLS"
            hint = "set TLS up there, or say sslmode=disable in the address or the service file"
            raise UsageError(what, seen=shown(conninfo), hint=hint)
        yield connection


def _pushed(
    waiting: Waiting, entry: Entry | None, device: str, identity: Identity
) -> dict[str, Any]:
    """Give the row that tells of a case, or without an entry, that it was removed."""
    row: dict[str, Any] = {
        **dict.fromkeys(_COLUMNS),
        **{"package": identity.package_digest, "key_kind": identity.key_kind},
        **{"origin": waiting.origin, "image": waiting.image, "base": waiting.base},
        **{"device": device, "created": 0.0, "removal": waiting.removal},
    }
    if entry is None:
        return row
    record, features = entry.record, entry.features
    _, levels, scales = features.blobs
    # Where the photo lies is nobody else's business.
    provenance = record.provenance if record.origin == "anchor" else "learned"
    return row | {
        **{"device": record.device or device, "created": record.created},
        **{"score": record.score, "std": record.std},
        **{"summary": record.summary, "provenance": provenance},
        **{"key": features.key.astype(float).tolist(), "tokens": levels, "scales": scales},
        **{"grid_rows": features.grid[0], "grid_columns": features.grid[1]},
    }


def entry_of(row: dict[str, Any], widths: Widths | None) -> Entry | Refused:
    """Read a row as a case, by the widths of a memory, or by its own."""
    name = one_line(f"{row['origin']} {row['image'][:ID_DIGITS]} of {row['device']}")
    try:
        return _checked(row, widths)
    except (MeiqaError, ValueError, TypeError) as error:
        return Refused(name, one_line(str(error)))


def _checked(row: dict[str, Any], widths: Widths | None) -> Entry:
    origin, image, device = row["origin"], row["image"], row["device"]
    if not re.fullmatch("[0-9a-f]{64}", image):
        raise ValueError("its image is named by no SHA-256")
    if not (device.isprintable() and 0 < len(device) <= 64):
        raise ValueError("its device's name is empty, too long or not printable")
    if not (math.isfinite(row["created"]) and 1.0 <= row["score"] <= 5.0):
        raise ValueError("its score or its moment is off the scale")
    if not (math.isfinite(row["std"]) and row["std"] >= 0.0):
        raise ValueError("its deviation is not a finite number of 0 or more")
    key = np.frombuffer(row["key"], ">f2", offset=_HALF_HEADER_BYTES).astype(VECTOR_DTYPES[0])
    scales = np.frombuffer(row["scales"], VECTOR_DTYPES[2])
    levels = np.frombuffer(row["tokens"], VECTOR_DTYPES[1])
    grid = row["grid_rows"], row["grid_columns"]
    token = widths.token if widths else len(levels) // max(1, len(scales))
    if (widths and len(key) != widths.key) or len(levels) != len(scales) * token:
        raise ValueError(f"its key has {len(key)} elements, its tokens {len(levels)}")
    if min(grid) < 1 or len(scales) not in (0, grid[0] * grid[1]):
        raise ValueError(f"its grid of {grid[0]} x {grid[1]} has {len(scales)} tokens")
    # A sum is finite only where all is, unless it overflows, which no unit key and no scale does.
    if not math.isfinite(float(key.sum(dtype=np.float64) + scales.sum(dtype=np.float64))):
        raise ValueError("its key or its scales are not finite")
    told = image[:ID_DIGITS], image, row["summary"], row["score"], row["std"], origin
    record = Record(*told, row["package"], row["provenance"], row["created"], device)
    return Entry(record, Features(key, levels.reshape(-1, token), scales, grid))
