"""`meiqa serve` and `api-key`: photos are judged over HTTP."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from meiqa.commands.options import (
    add_engine,
    milliseconds,
    offline_packages,
    open_engine,
    port_number,
    positive_count,
    say,
)

if TYPE_CHECKING:
    from meiqa.commands.options import Commands
    from meiqa.engine.pipeline import Engine


def add_commands(commands: Commands) -> None:
    """Add these commands to the parser."""
    _add_serve(commands)
    _add_api_key(commands)


def _serve(options: argparse.Namespace) -> int:
    with offline_packages("serve"):
        from meiqa.serve.access import Keys
        from meiqa.serve.logs import log_to
        from meiqa.serve.server import engines_sharing, listen, run
        from meiqa.serve.settings import Settings

    keys = None if options.api_key_file is None else Keys.read(options.api_key_file)
    usual_ms, most_ms = options.budget_ms, Settings.max_budget_ms
    settings = Settings(
        budget_ms=usual_ms,
        max_budget_ms=max(usual_ms, most_ms),
        reserve_ms=options.reserve_ms,
        max_upload_bytes=options.max_upload_mb << 20,
        max_held_bytes=max(Settings.max_held_bytes, options.max_upload_mb << 21),
        keys=keys,
    )
    learn = keys is not None and keys.allow("memory:write")

    def first(threads: int | None) -> Engine:
        return open_engine(
            options.package,
            options.memory,
            device=options.device,
            threads=threads,
            verify=options.verify,
            learn=learn,
        )

    with listen(options.host, options.port, settings) as opened:
        log_to(form=options.log_format)
        with engines_sharing(first, options.workers, options.device, options.threads) as engines:
            say(f"serving on {_address(opened.getsockname())}{_who(keys is None, learn)}")
            run(engines, settings, opened)
    return 0


def _address(name: tuple[str, int]) -> str:
    host = f"[{name[0]}]" if ":" in name[0] else name[0]
    return f"http://{host}:{name[1]}"


def _who(alone: bool, learn: bool) -> str:
    if alone:
        return ", to this machine only and without keys; nobody may write to the memory"
    return ", to who has a key" + ("" if learn else "; none may write to the memory")


def _api_key(options: argparse.Namespace) -> int:
    from meiqa.serve.access import add_key

    token = add_key(options.file, options.name, options.scopes.split(","))
    say(f"{options.file}: {options.name} may {options.scopes}; the key is shown this once")
    sys.stdout.write(token + "\n")
    return 0


def _add_serve(commands: Commands) -> None:
    command = commands.add_parser("serve", help="judge photos over HTTP")
    command.add_argument(
        "--host", default="127.0.0.1", help="other than loopback needs keys (default: 127.0.0.1)"
    )
    command.add_argument(
        "--port", type=port_number, default=8000, metavar="N", help="0 for any (8000)"
    )
    command.add_argument(
        "--api-key-file", metavar="FILE", help="who may ask; `meiqa api-key` adds to it"
    )
    command.add_argument(
        "--budget-ms",
        type=milliseconds,
        default=2000.0,
        metavar="N",
        help="for an answer, waiting included, where a request names none (default: 2000)",
    )
    command.add_argument(
        "--reserve-ms",
        type=milliseconds,
        metavar="N",
        help="time kept for each photo that waits: more of it, fewer but better answers under load"
        " (default: as measured, without text and with the fewest neighbours)",
    )
    command.add_argument(
        "--max-upload-mb", type=positive_count, default=32, metavar="N", help="of a request (32)"
    )
    command.add_argument(
        "--workers",
        type=positive_count,
        default=1,
        metavar="N",
        help="engines that work side by side on one memory (1)",
    )
    command.add_argument("--log-format", choices=("text", "json"), default="text")
    add_engine(command)
    command.set_defaults(run=_serve)


def _add_api_key(commands: Commands) -> None:
    command = commands.add_parser("api-key", help="make a key for `meiqa serve --api-key-file`")
    command.add_argument("name", metavar="NAME", help="who gets it")
    command.add_argument("--file", required=True, metavar="FILE", help="made if need be")
    command.add_argument(
        "--scopes", default="score", metavar="LIST", help="of score, memory:write (default: score)"
    )
    command.set_defaults(run=_api_key)
