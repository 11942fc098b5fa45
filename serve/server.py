"""The service as a process: engines, a socket, uvicorn, and an orderly end."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn

from meiqa.engine.local import LocalVlm
from meiqa.engine.pipeline import Engine
from meiqa.engine.runtime.sessions import sessions_on
from meiqa.engine.vlm import Vlm
from meiqa.errors import UsageError
from meiqa.serve.access import is_loopback
from meiqa.serve.app import create_app
from meiqa.serve.settings import Settings

__all__ = ["engines_sharing", "listen", "run"]

LOG = logging.getLogger(__name__)
_BACKLOG = 512
_FRAME_BYTES = 8 << 20
_TURN_S = 0.001
"""Python threads take turns this often, so that an engine does not hold up the event loop."""


def listen(host: str, port: int, settings: Settings) -> socket.socket:
    """Open the socket of a service; without keys, on the loopback interface only.

    Raises:
        UsageError: the host may not, or the address cannot, be listened on.
    """
    if settings.keys is None and not is_loopback(host):
        raise UsageError(
            "without keys the service is for this machine only",
            seen=f"--host {host}",
            allowed="127.0.0.1, ::1 or localhost",
            hint="meiqa api-key NAME --file KEYS, then meiqa serve --api-key-file KEYS",
        )
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        opened = socket.socket(family, kind, protocol)
        try:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            opened.bind(address)
        except BaseException:
            opened.close()
            raise
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(
            f"nothing can listen on {host}, port {port}: {reason}", hint="choose another --port"
        ) from None
    return opened


@contextmanager
def engines_sharing(
    open_first: Callable[[int | None], Engine], workers: int, device: str, threads: int | None
) -> Iterator[list[Engine]]:
    """Open engines that work side by side on one memory.

    Args:
        open_first: opens an engine with so many threads.
        workers: how many engines.
        threads: of each; by default the cores are shared out between them.
    """
    if threads is None and workers > 1:
        threads = max(1, (os.cpu_count() or 1) // workers)
    with open_first(threads) as first:
        others = [
            Engine(_another(first, device, threads), first.package, first.memory)
            for _ in range(workers - 1)
        ]
        yield [first, *others]


def _another(engine: Engine, device: str, threads: int | None) -> Vlm:
    if not isinstance(engine.vlm, LocalVlm):
        return engine.vlm
    return LocalVlm(engine.package, *sessions_on(device, engine.package, threads, verify=False))


def run(engines: list[Engine], settings: Settings, opened: socket.socket) -> None:
    """Serve until SIGTERM or SIGINT; what was accepted is finished before this returns."""
    longest_s = settings.upload_s + settings.max_budget_ms / 1e3
    config = uvicorn.Config(
        create_app(engines, settings),
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=_BACKLOG,
        limit_concurrency=8 * settings.max_requests,
        timeout_graceful_shutdown=round(longest_s) + 5,
        ws_max_size=_FRAME_BYTES,
        ws_max_queue=2,
    )
    server = uvicorn.Server(config)
    sys.setswitchinterval(_TURN_S)
    # uvicorn sends itself the signals again once it has ended: the end has been orderly by then.
    before = {each: signal.signal(each, _ignore) for each in (signal.SIGTERM, signal.SIGINT)}
    try:
        server.run(sockets=[opened])
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    if not server.started:
        raise UsageError("the service did not start", hint="the log above says why")
    LOG.info("ended; everything that was accepted is answered")


def _ignore(*_: object) -> None:
    """Do nothing."""
