"""`meiqa serve` and `api-key`: photos are judged over HTTP."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from meiqa.cli import options as cli
from meiqa.cli.options import Options, say

if TYPE_CHECKING:
    from meiqa.engine.engine import Engine


@cli.command()
@cli.option("--host H", "other than loopback needs keys", default="127.0.0.1")
@cli.option("--port N", "0 for any", click.IntRange(0, 65_535), default=8000)
@cli.option("--api-key-file FILE", "who may ask; `meiqa api-key` adds to it", cli.path)
@cli.option(
    "--budget-ms N",
    "for an answer, waiting included, where a request names none",
    cli.AMOUNT,
    default=2000.0,
)
@cli.option(
    "--reserve-ms N",
    "time kept for each photo that waits: more of it, fewer but better answers under load "
    "(default: as measured, without text and with the fewest neighbours)",
    cli.AMOUNT,
)
@cli.option("--max-upload-mb N", "of a request", cli.POSITIVE, default=32)
@cli.option(
    "--cors ORIGIN",
    "a site whose pages may ask, as https://app.example; may be given several times",
    name="origins",
    multiple=True,
)
@cli.option("--workers N", "engines side by side on one memory", cli.POSITIVE, default=1)
@cli.option("--log-format", type=("text", "json"), default="text")
@cli.HUB
@cli.engine_options()
def serve_command(options: Options) -> int:
    """Judge photos over HTTP, with a page for cameras; see docs/http-api.md."""
    with cli.optional_packages("serve"):
        from meiqa.serve.access import Keys, Settings, require_origin
        from meiqa.serve.app import engines_sharing, listen, run
        from meiqa.serve.middleware import log_to

    keys = None if options.api_key_file is None else Keys.read(options.api_key_file)
    settings = Settings(
        budget_ms=options.budget_ms,
        max_budget_ms=max(options.budget_ms, Settings.max_budget_ms),
        reserve_ms=options.reserve_ms,
        max_upload_bytes=options.max_upload_mb << 20,
        max_held_bytes=max(Settings.max_held_bytes, options.max_upload_mb << 21),
        keys=keys,
        origins=tuple(map(require_origin, options.origins)),
    )
    learn = keys is not None and keys.allow("memory:write")

    def first(threads: int | None) -> Engine:
        # A hub writes to the memory as well.
        changed = learn or options.hub is not None
        return cli.engine_of(Options(**{**vars(options), "threads": threads}), learn=changed)

    with listen(options.host, options.port, settings) as opened:
        log_to(form=options.log_format)
        workers, threads = options.workers, options.threads
        with (
            engines_sharing(first, workers, options.device, threads) as engines,
            cli.syncing(engines[0], options),
        ):
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


@cli.command()
@cli.argument("name", "NAME")
@cli.option("--file FILE", "made if need be", cli.path, required=True)
@cli.option("--scopes LIST", "of score, memory:write", default="score")
def api_key_command(options: Options) -> int:
    """Make a key for `meiqa serve --api-key-file`, and print it this once."""
    from meiqa.serve.access import add_key

    token = add_key(options.file, options.name, options.scopes.split(","))
    say(f"{options.file}: {options.name} may {options.scopes}; the key is shown this once")
    sys.stdout.write(token + "\n")
    return 0
