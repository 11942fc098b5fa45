"""What a service bears: its capacity, most of it, three times as much, and most of it again.

Photos arrive at random (Poisson), each at its own moment, whether those before it were answered or
not; times count from that moment, so what waits in the generator counts as well. Capacity is, as in
MLPerf's Server scenario, the highest rate at which 99 % are answered within their budget; it is
searched for from what users who never pause get. After the overload the same load as before it
tells how long the recovery takes.

The generator has its own process, but shares the processor with a service on the same machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np

from benchmarks.processes import say
from meiqa.errors import MeiqaError, ServiceUnreachable
from meiqa.evaluation.measuring import Column, photographs_in, run_on, table_text

__all__ = ["Asked", "Plan", "bench_load", "checks_of", "load_text", "phase_row"]

_MODULE = "benchmarks.load"
_SETTLED_S = 2.0
_REFUSAL_MS = 50.0
_SERVED = 0.99
"""Share of the requests that a rate within the capacity answers in time."""
_COLUMNS = (
    Column("phase", "phase"),
    Column("rate", "asked/s", ".1f"),
    Column("sent", "sent", ".0f"),
    Column("goodput", "in time/s", ".1f"),
    Column("late", "late", ".0f"),
    Column("refused", "refused", ".0f"),
    Column("errors", "errors", ".0f"),
    Column("p50_ms", "p50 ms", ".0f"),
    Column("p99_ms", "p99 ms", ".0f"),
    Column("refusal_p99_ms", "refusal p99", ".0f"),
    Column("written", "written", ".2f"),
    Column("neighbours", "compared", ".1f"),
    Column("resident_mb", "MB", ".0f"),
)


@dataclass(frozen=True)
class Plan:
    """What is asked of a service.

    Attributes:
        budget_ms: of every request.
        seconds: of every phase.
        users: who ask without a pause, to find where the search begins.
        searches: phases of the search for the capacity.
        shares: of the capacity, in the phases that follow; the first is also the last.
    """

    budget_ms: float = 1000.0
    seconds: float = 20.0
    users: int = 24
    searches: int = 5
    shares: tuple[float, float] = (0.8, 3.0)
    seed: int = 0


@dataclass(frozen=True)
class Asked:
    """What became of one request.

    Attributes:
        at_s: when it should be sent, from the phase's beginning.
        took_ms: from then to the answer.
        status: of the answer; 0 where none came.
        written, compared: of an assessment: whether there is a text, and with how many neighbours.
        known: the service had read the photo before.
    """

    at_s: float
    took_ms: float
    status: int
    written: bool = False
    compared: int = 0
    known: bool = False


class _Lines:
    """Connections that post photos, with next to no work for each: the processor is the service's.

    An HTTP client's bookkeeping takes 4 ms a request, at three times the capacity a third of a core
    of those that the service runs on.
    """

    def __init__(self, url: str, path: str, api_key: str | None) -> None:
        parts = urlsplit(url)
        self._address = parts.hostname or "localhost", parts.port or 80
        key = "" if api_key is None else f"Authorization: Bearer {api_key}\r\n"
        self._head = f"POST {path} HTTP/1.1\r\nHost: {parts.netloc}\r\n{key}Content-Length: "
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def post(self, photo: bytes) -> tuple[int, bytes]:
        """Send a photo; give the status and the body of the answer.

        Raises:
            OSError, EOFError: the connection broke.
        """
        reader, writer = await self._line()
        writer.write(f"{self._head}{len(photo)}\r\n\r\n".encode() + photo)
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        (length,) = re.findall(r"\r\ncontent-length: (\d+)", head)
        body = await reader.readexactly(int(length))
        if "\r\nconnection: close" in head:
            writer.close()
        else:
            self._idle.append((reader, writer))
        return int(head.split(" ", 2)[1]), body

    async def _line(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        while self._idle:
            reader, writer = self._idle.pop()
            if not reader.at_eof():
                return reader, writer
            writer.close()
        return await asyncio.open_connection(*self._address)

    def close(self) -> None:
        """Close what is idle."""
        for _, writer in self._idle:
            writer.close()


class _Asker:
    """Sends photos, one after the other, whoever asks."""

    def __init__(self, lines: _Lines, photos: Sequence[Path | bytes]) -> None:
        self._lines = lines
        self._photos = [
            photo if isinstance(photo, bytes) else photo.read_bytes() for photo in photos
        ]
        self._numbers = count()

    async def ask(self, began: float, at_s: float) -> tuple[Asked, float]:
        """Send the next photo; give what became of it, and after how many seconds to ask again."""
        photo = self._photos[next(self._numbers) % len(self._photos)]
        status, found, after_s = 0, {}, 0.0
        try:
            status, answer = await self._lines.post(photo)
            took_ms = 1e3 * (time.perf_counter() - began - at_s)
            found = json.loads(answer)
            after_s = found.get("retry_after_ms", 0) / 1e3
        except (OSError, EOFError, ValueError):  # counted as an error: its status is 0
            took_ms = 1e3 * (time.perf_counter() - began - at_s)
        asked = Asked(at_s, took_ms, status)
        if status == 200:
            compared = sum(each["preference"] is not None for each in found["neighbours"])
            known = bool(found["counters"].get("photo_cache_hits"))
            asked = Asked(at_s, took_ms, 200, found["summary"] is not None, compared, known)
        return asked, after_s


async def _without_pause(asker: _Asker, users: int, seconds: float) -> list[Asked]:
    """Let users ask again as soon as they are answered, or as late as they are told to."""
    began = time.perf_counter()
    done: list[Asked] = []

    async def user() -> None:
        while (now_s := time.perf_counter() - began) < seconds:
            asked, after_s = await asker.ask(began, now_s)
            done.append(asked)
            if asked.status != 200:
                await asyncio.sleep(max(0.05, after_s))

    await asyncio.gather(*(user() for _ in range(users)))
    return done


async def _at_random(asker: _Asker, rate: float, seconds: float, seed: int) -> list[Asked]:
    """Send photos at the moments of a Poisson process."""
    dice = random.Random(seed)
    tasks: list[asyncio.Task[tuple[Asked, float]]] = []
    began = time.perf_counter()
    at_s = dice.expovariate(rate)
    while at_s < seconds:
        await asyncio.sleep(max(0.0, began + at_s - time.perf_counter()))
        tasks.append(asyncio.create_task(asker.ask(began, at_s)))
        at_s += dice.expovariate(rate)
    return [asked for asked, _ in await asyncio.gather(*tasks)]


def phase_row(
    phase: str, done: Sequence[Asked], seconds: float, budget_ms: float, **more: float
) -> dict[str, Any]:
    """Sum up a phase."""
    answered = [asked for asked in done if asked.status == 200]
    refused = [asked.took_ms for asked in done if asked.status in (429, 503)]
    times_ms = [asked.took_ms for asked in answered]
    in_time = sum(ms <= budget_ms for ms in times_ms)

    def percentile(values: Sequence[float], percent: float) -> float:
        return round(float(np.percentile(values, percent)), 3) if values else float("nan")

    def mean(values: Sequence[float]) -> float:
        return round(float(np.mean(values)), 4) if values else float("nan")

    return {
        "phase": phase,
        "rate": round(len(done) / seconds, 3),
        "sent": len(done),
        "goodput": round(in_time / seconds, 3),
        "late": len(answered) - in_time,
        "refused": len(refused),
        "errors": len(done) - len(answered) - len(refused),
        "p50_ms": percentile(times_ms, 50),
        "p99_ms": percentile(times_ms, 99),
        "refusal_p50_ms": percentile(refused, 50),
        "refusal_p99_ms": percentile(refused, 99),
        "refusal_max_ms": percentile(refused, 100),
        "written": mean([asked.written for asked in answered]),
        "neighbours": mean([asked.compared for asked in answered]),
        "known": mean([asked.known for asked in answered]),
        **more,
    }


def _in_time(row: dict[str, Any]) -> float:
    """Give the share of a phase's requests that were answered in time."""
    answered = row["sent"] - row["late"] - row["refused"] - row["errors"]
    return float(answered / max(1, row["sent"]))


def recovery_s(done: Sequence[Asked], budget_ms: float) -> float:
    """Give when the last request was sent that was not answered in time."""
    return max(
        (asked.at_s for asked in done if asked.status != 200 or asked.took_ms > budget_ms),
        default=0.0,
    )


def checks_of(
    rows: Sequence[dict[str, Any]], budget_ms: float, recovered_s: float
) -> dict[str, Any]:
    """Hold the last phases (capacity, most of it, overload, most of it again) against the goals."""
    capacity, most, over, _ = rows[-4:]
    return {
        "most: p99 within the budget": most["p99_ms"] <= budget_ms,
        "most: none refused, no errors": most["refused"] == most["errors"] == 0,
        "overload: goodput at least 85 % of capacity": over["goodput"]
        >= 0.85 * capacity["goodput"],
        "overload: refused within 50 ms": not over["refused"]
        or over["refusal_p99_ms"] < _REFUSAL_MS,
        "overload: no errors": over["errors"] == 0,
        "recovered within 2 s": recovered_s <= _SETTLED_S,
        "memory bounded": over["resident_mb"] <= 1.5 * capacity["resident_mb"],
    }


async def bench_load(
    url: str,
    photos: Sequence[Path | bytes],
    plan: Plan,
    *,
    api_key: str | None = None,
    on_phase: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure a service that runs.

    Returns:
        JSON-ready: rows, one a phase (rate and goodput a second; p50_ms and p99_ms of what was
        answered; refusal_p99_ms; written, neighbours, known: of the answers, the share with a
        text, the mean number of neighbours and the share of photos read before; resident_mb of the
        service), recovered_s, checks, plan, machine and versions.

    Raises:
        ServiceUnreachable: nothing answers there.
    """
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    timeout = httpx.Timeout(30 + plan.budget_ms / 1e3)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=256)
    rows: list[dict[str, Any]] = []
    async with httpx.AsyncClient(
        base_url=url, headers=headers, timeout=timeout, limits=limits
    ) as client:
        lines = _Lines(url, f"/v1/score?budget_ms={plan.budget_ms:g}", api_key)
        asker = _Asker(lines, photos)
        try:
            await _resident_mb(client)
        except httpx.HTTPError as error:
            raise ServiceUnreachable(f"no answer from {url}: {error}") from None
        await _without_pause(asker, 2, min(5.0, plan.seconds))  # caches and estimates settle

        async def note(phase: str, done: Sequence[Asked]) -> None:
            resident_mb = await _resident_mb(client)
            rows.append(
                phase_row(phase, done, plan.seconds, plan.budget_ms, resident_mb=resident_mb)
            )
            on_phase(phase)

        await note("no pauses", await _without_pause(asker, plan.users, plan.seconds))
        rate, low, high, found = max(rows[0]["goodput"], 0.5), 0.0, float("inf"), rows[0]
        for number in range(plan.searches):
            done = await _at_random(asker, rate, plan.seconds, plan.seed + 100 + number)
            await note("search", done)
            if _in_time(rows[-1]) >= _SERVED:
                low, found = rate, rows[-1]
            else:
                high = rate
            rate = min(1.5 * rate, (low + high) / 2)
        capacity = low or rate
        rows.append({**found, "phase": "capacity"})
        most, over = plan.shares
        recovered_s = 0.0
        for number, share in enumerate((most, over, most)):
            done = await _at_random(asker, share * capacity, plan.seconds, plan.seed + number)
            await note(f"{share:.0%}" + (" again" if number == 2 else ""), done)
            recovered_s = recovery_s(done, plan.budget_ms)
        lines.close()
    return {
        "rows": rows,
        "recovered_s": round(recovered_s, 3),
        "checks": checks_of(rows, plan.budget_ms, recovered_s),
        "plan": {**vars(plan), "photos": len(photos)},
        **run_on("meiqa", "fastapi", "uvicorn", "httpx", "onnxruntime"),
    }


async def _resident_mb(client: httpx.AsyncClient) -> float:
    """Ask a service how much memory it holds."""
    text = (await client.get("/metrics")).text
    found = re.search(r"^process_resident_memory_bytes (\S+)$", text, re.MULTILINE)
    return float("nan") if found is None else round(float(found[1]) / 1e6, 1)


def load_text(result: dict[str, Any]) -> str:
    """Lay the result out for people."""
    plan = result["plan"]
    lines = [
        f"budget {plan['budget_ms']:g} ms, {plan['seconds']:g} s a phase, {plan['photos']} photos,"
        f" {result['machine']['processor']}, {result['machine']['cores']} cores",
        table_text(result["rows"], _COLUMNS),
        f"recovered after {result['recovered_s']:.1f} s",
        *(f"{'met ' if met else 'MISSED'}  {name}" for name, met in result["checks"].items()),
    ]
    return "\n".join(lines)


@contextmanager
def service(options: Sequence[str]) -> Iterator[str]:
    """Run `meiqa serve` with these options, and give its address."""
    command = [sys.executable, "-m", "meiqa", "serve", "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        line = ""
        for line in process.stderr:
            if found := re.search(r"serving on (http://\S+:\d+)", line):
                break
        else:
            raise ServiceUnreachable(f"the service did not start: {line.strip()}")
        # What it logs is read by nobody, and must not fill the pipe.
        threading.Thread(target=process.stderr.read, daemon=True).start()
        _wait_until_ready(found[1])
        yield found[1]
    finally:
        process.terminate()
        process.wait()


def _wait_until_ready(url: str) -> None:
    for _ in range(600):
        try:
            if httpx.get(f"{url}/readyz").status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.1)
    raise ServiceUnreachable(f"{url} does not become ready")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and print its table, or JSON."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {_MODULE}",
        description=__doc__,
        epilog="What stands behind -- goes to `meiqa serve`.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--images", type=Path, metavar="DIR", help="photographs (default: made)")
    parser.add_argument("--photos", type=int, default=200, metavar="N", help="of them (200)")
    parser.add_argument("--url", help="a service that runs (default: one is started)")
    parser.add_argument("--api-key", help="where it asks for one")
    parser.add_argument("--budget-ms", type=float, default=Plan.budget_ms, metavar="N")
    parser.add_argument("--seconds", type=float, default=Plan.seconds, metavar="N")
    parser.add_argument("--users", type=int, default=Plan.users, metavar="N")
    parser.add_argument("--searches", type=int, default=Plan.searches, metavar="N")
    parser.add_argument("--format", choices=("text", "json"), default="text")
    parser.add_argument("serve", nargs="*", metavar="-- OPTION", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    plan = Plan(given.budget_ms, given.seconds, given.users, given.searches)
    try:
        photos = list(photographs_in(given.images, given.photos))
        if given.url is None:
            with service(given.serve) as url:
                result = asyncio.run(bench_load(url, photos, plan))
        else:
            result = asyncio.run(bench_load(given.url, photos, plan, api_key=given.api_key))
    except MeiqaError as error:
        parser.error(str(error))
    say(json.dumps(result, indent=2) if given.format == "json" else load_text(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
