"""What `meiqa bench` measures: budgets kept, a cold start, and MLPerf's four scenarios."""

from __future__ import annotations

import importlib
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from meiqa.engine.engine import Engine
from meiqa.evaluation.measuring import (
    Column,
    made_jpeg,
    photographs_in,
    quantiles_ms,
    run_on,
    table_text,
)
from meiqa.types import Budget, Failure

WARM_UP = 3
_PACKAGES = ("numpy", "onnxruntime", "meiqa")
_ALLOWED = 1.1


def bench_budget(
    open_engine: Callable[[], Engine],
    budgets_ms: Sequence[float],
    *,
    photos: int = 100,
    images: Path | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Measure how late answers are under budgets, and what these buy.

    Each budget has an engine of its own, whose caches are empty. The clock starts with the call,
    so decoding counts; what an engine does once, with its first photo under a budget, does not.

    Args:
        open_engine: opens an engine; it is closed again.
        photos: how many are timed under each.
        images: a directory of photographs; made ones of 1024 x 768 if it is None.
        clock: seconds that pass.

    Returns:
        `rows` of budget_ms, n, p50_ms, p95_ms, p99_ms, max_ms, late (p99 over the budget), k (the
        median number of neighbours asked about) and left_out (how often what was named); `in_time`,
        whether each p99 is at most 10 % over; and what it was run on.
    """
    rows: list[dict[str, Any]] = []
    for number, budget_ms in enumerate(budgets_ms):
        times, asked, left_out = [], [], Counter[str]()
        with open_engine() as engine:
            given = photographs_in(images, photos + WARM_UP, 10_000 * number)
            for index, photo in enumerate(given):
                source = photo if isinstance(photo, bytes) else str(photo)
                began = clock()
                result = engine.score(source, budget=Budget(ms=budget_ms), learn=False)
                elapsed_ms = 1e3 * (clock() - began)
                if index >= WARM_UP:
                    times.append(elapsed_ms)
                    asked.append(sum(n.preference is not None for n in result.neighbours))
                    left_out.update(result.left_out)
        summed = quantiles_ms(times)
        late = round(summed["p99_ms"] / budget_ms, 3)
        rows.append({"budget_ms": budget_ms, **summed, "max_ms": round(max(times), 3)})
        rows[-1] |= {"late": late, "k": float(np.median(asked))}
        rows[-1] |= {"left_out": dict(left_out.most_common())}
    return {
        "rows": rows,
        "in_time": all(row["late"] <= _ALLOWED for row in rows),
        "settings": {"photos": photos, "images": _named(images), "warm_up": WARM_UP},
        **run_on("pillow", *_PACKAGES),
    }


def budget_text(result: dict[str, Any]) -> str:
    """Lay out the result of `bench_budget`."""
    columns = (
        Column("budget_ms", "budget ms", ".0f"),
        Column("p50_ms", "p50 ms", ".1f"),
        Column("p99_ms", "p99 ms", ".1f"),
        Column("late", "late", ".2f"),
        Column("k", "k", ".0f"),
        Column("words", "left out"),
    )
    rows = []
    for row in result["rows"]:
        words = "; ".join(f"{what} ({times})" for what, times in row["left_out"].items())
        rows.append({**row, "words": words[:70]})
    return table_text(rows, columns)


_NO_SITE = ("-S",) if sys.flags.no_site else ()  # a child starts as this interpreter did
_IMPORT = re.compile(r"import time:\s+(\d+) \|\s+(\d+) \|\s+(\S+)")
_SLOWEST = 12


def bench_cold(
    runs: int = 10, *, image: Path | None = None, k: int | None = None
) -> dict[str, Any]:
    """Time `meiqa score photo.jpg` in a fresh process, beside importing what it stands on.

    Both are run in turns and the best of several runs is compared: the first ones read files that
    the rest finds in the system's cache, compile what an installation has compiled, and optimise
    the graphs for this processor.

    Args:
        runs: how often; one more of each goes before.
        image: the photo; a made one of 1024 x 768 if it is None.
        k: neighbours; the package's number if it is None.

    Returns:
        `ratio` of the best times, `rows` of each command, `modules`: what importing took most for
        (milliseconds of each module by itself), and what it was run on.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        photo = image or folder / "photo.jpg"
        if image is None:
            photo.write_bytes(made_jpeg(0))
        python = [sys.executable, "-P", *_NO_SITE]
        score = ["-m", "meiqa", "score", str(photo), "--no-learn"]
        score += [] if k is None else ["--k", str(k)]
        environment = {
            **{n: value for n, value in os.environ.items() if n != "PYTHONDONTWRITEBYTECODE"},
            "MEIQA_MEMORY": str(folder / "memory"),
            "MEIQA_CACHE": str(folder / "cache"),
            "PYTHONPYCACHEPREFIX": str(folder / "bytecode"),
        }

        def said(*arguments: str) -> str:
            command, piped = [*python, *arguments], subprocess.PIPE
            done = subprocess.run(command, env=environment, check=True, stdout=piped, stderr=piped)
            return done.stderr.decode()

        base = ("-c", "import numpy, onnxruntime")
        commands = {"numpy and onnxruntime": base, "meiqa score": score}
        commands |= {"meiqa --version": ("-m", "meiqa", "--version")}
        times: dict[str, list[float]] = {name: [] for name in commands}
        for turn in range(runs + 1):
            for name, command in commands.items():
                began = time.perf_counter()
                said(*command)
                if turn:
                    times[name].append(1e3 * (time.perf_counter() - began))
        # What a package imports in turn is left out.
        by_package: Counter[str] = Counter()
        for own, _, module in _IMPORT.findall(said("-X", "importtime", *score)):
            by_package[module.partition(".")[0]] += int(own)
    rows = {name: quantiles_ms(each) for name, each in times.items()}
    return {
        "ratio": round(rows["meiqa score"]["min_ms"] / rows["numpy and onnxruntime"]["min_ms"], 2),
        "rows": rows,
        "modules": {name: round(us / 1e3, 1) for name, us in by_package.most_common(_SLOWEST)},
        "settings": {"runs": runs, "warm_up": 1, "k": k, "image": image and image.name},
        **run_on(*_PACKAGES),
    }


def cold_text(result: dict[str, Any]) -> str:
    """Lay out the result of `bench_cold`."""
    rows = [{"command": name, **row} for name, row in result["rows"].items()]
    best, median = Column("min_ms", "best ms", ".0f"), Column("p50_ms", "p50 ms", ".0f")
    modules = [{"module": name, "ms": ms} for name, ms in result["modules"].items()]
    imports = table_text(modules, (Column("module", "import of"), Column("ms", "ms", ".1f")))
    commands = table_text(rows, (Column("command", "command"), best, median))
    return f"{commands}\n\nratio {result['ratio']:.2f}\n\n{imports}"


_SERVER_SHARE = 0.4
_OFFLINE_MARGIN = 1.2  # of photos, so that a faster run still lasts long enough
_RATED = 8
_SUMMARY = "mlperf_log_summary.txt"
_LATENCIES = {
    "50.00 percentile latency (ns)": "p50_ms",
    "90.00 percentile latency (ns)": "p90_ms",
    "99.00 percentile latency (ns)": "p99_ms",
    "Mean latency (ns)": "mean_ms",
    "Max latency (ns)": "max_ms",
}
_RATES = {
    "QPS w/o loadgen overhead": "queries_per_second",
    "Scheduled samples per second": "scheduled_per_second",
    "Completed samples per second": "samples_per_second",
    "Samples per second": "samples_per_second",
}
_LINE = re.compile(r"^[ *]*(?P<name>[^:]+?)\s*:\s*(?P<value>.+?)\s*$")


def bench_scenarios(
    open_engine: Callable[[], Engine],
    scenarios: Sequence[str],
    *,
    seconds: float = 60.0,
    photos: int = 64,
    images: Path | None = None,
    server_rate: float | None = None,
    server_latency_ms: float = 500.0,
) -> dict[str, Any]:
    """Run MLPerf's scenarios one after the other, driven and judged by MLCommons' LoadGen.

    * SingleStream: a photo at a time, the next as soon as the last is judged.
    * MultiStream: the same with 8 photos in a query.
    * Server: photos arrive at random (Poisson) at a rate; 99 of 100 must be judged within a limit.
    * Offline: all photos at once.

    When each query comes, what counts and whether a run is valid is LoadGen's business; the
    figures are read from its summary. Photos are in memory, encoded; what was read of a photo is
    dropped before the next one, since MLPerf allows no cache of queries. The neighbours' prefixes
    are kept: they are the model's memory, not the query's.

    Args:
        open_engine: opens an engine; it is closed again.
        seconds: the least duration of each. MLPerf asks for 600; shorter runs may be too short for
            the number of queries that a percentile needs, and LoadGen calls them invalid then.
        photos: how many different ones there are.
        images: a directory of photographs; made ones of 1024 x 768 if it is None.
        server_rate: photos a second that arrive in Server; by default a share of what the engine
            was seen to do.
        server_latency_ms: how long 99 of 100 may take in Server.

    Returns:
        `scenarios` by name, see `summary_of`; and what it was run on.
    """
    loadgen = importlib.import_module("mlperf_loadgen")
    settings = loadgen.TestSettings()
    settings.mode = loadgen.TestMode.PerformanceOnly
    settings.min_duration_ms = int(1e3 * seconds)
    settings.min_query_count = 1
    given = photographs_in(images, photos)
    samples = [each if isinstance(each, bytes) else each.read_bytes() for each in given]
    with open_engine() as engine, tempfile.TemporaryDirectory() as folder:
        judge = _Judge(engine, samples)
        rate = judge.rate(_RATED)
        arriving = server_rate or round(_SERVER_SHARE * rate, 3)
        settings.single_stream_expected_latency_ns = int(1e9 / rate)
        settings.multi_stream_expected_latency_ns = int(8e9 / rate)
        settings.server_target_qps = arriving
        settings.server_target_latency_ns = int(1e6 * server_latency_ms)
        settings.offline_expected_qps = _OFFLINE_MARGIN * rate
        found = {}
        for scenario in scenarios:
            settings.scenario = getattr(loadgen.TestScenario, scenario)
            found[scenario] = summary_of(_run(loadgen, settings, judge, Path(folder) / scenario))
    return {
        "scenarios": found,
        "settings": {
            **{"seconds": seconds, "photos": photos, "warm_up": _RATED, "images": _named(images)},
            **{"expected_per_second": round(rate, 3), "server_per_second": arriving},
            **{"server_latency_ms": server_latency_ms, "offline_margin": _OFFLINE_MARGIN},
        },
        **run_on("mlcommons-loadgen", *_PACKAGES),
    }


@dataclass(frozen=True)
class _Judge:
    """The system under test: queries wait in a line, and one thread judges their photos."""

    engine: Engine
    samples: Sequence[bytes]

    def score(self, indices: Sequence[int]) -> None:
        """Judge photos of one query; MeiqaError if one of them can't be judged."""
        self.engine.forget_photos()
        for result in self.engine.score_many([self.samples[i] for i in indices], learn=False):
            if isinstance(result, Failure):
                raise result.error
            self.engine.forget_photos()

    def rate(self, count: int) -> float:
        """Measure photos a second, once as many have been judged to warm up."""
        indices = [number % len(self.samples) for number in range(count)]
        self.score(indices)
        began = time.perf_counter()
        self.score(indices)
        return count / (time.perf_counter() - began)


def _run(loadgen: Any, settings: Any, judge: _Judge, folder: Path) -> str:
    """Let LoadGen run one scenario; give the text of its summary."""
    waiting: queue.Queue[list[Any] | None] = queue.Queue()
    errors: list[BaseException] = []

    def work() -> None:
        while (query := waiting.get()) is not None:
            try:
                if not errors:  # LoadGen waits for all queries, whatever happened
                    judge.score([sample.index for sample in query])
            except BaseException as error:
                errors.append(error)
            finally:
                answered = [loadgen.QuerySampleResponse(sample.id, 0, 0) for sample in query]
                loadgen.QuerySamplesComplete(answered)

    folder.mkdir()
    logs = loadgen.LogSettings()
    logs.enable_trace = False
    logs.log_output.outdir = str(folder)
    logs.log_output.copy_summary_to_stdout = False
    count = len(judge.samples)
    worker = threading.Thread(target=work, name="judge")
    worker.start()
    tested = loadgen.ConstructSUT(lambda query: waiting.put(list(query)), lambda: None)
    library = loadgen.ConstructQSL(count, count, lambda _: None, lambda _: None)
    try:
        loadgen.StartTestWithLogSettings(tested, library, settings, logs, "")
    finally:
        waiting.put(None)
        worker.join()
        loadgen.DestroyQSL(library)
        loadgen.DestroySUT(tested)
    if errors:
        raise errors[0]
    return (folder / _SUMMARY).read_text()


def summary_of(text: str) -> dict[str, Any]:
    """Read LoadGen's summary.

    Returns:
        `valid`: whether it found the run so; `notes`: what was not satisfied; latencies and rates
        under our names; and `loadgen`, every line of the summary that names a value.
    """
    matches = [match for line in text.splitlines() if (match := _LINE.match(line))]
    said = {match["name"]: match["value"] for match in matches}
    unmet = [name for name, value in said.items() if name.endswith("atisfied") and value != "Yes"]
    latencies, rates = (
        {ours: said[theirs] for theirs, ours in names.items() if theirs in said}
        for names in (_LATENCIES, _RATES)
    )
    valid = said.get("Result is") == "VALID"
    return {
        "valid": valid,
        "notes": unmet,
        **{name: round(float(ns) / 1e6, 3) for name, ns in latencies.items()},
        **{name: float(rate) for name, rate in rates.items()},
        "loadgen": said,
    }


def scenarios_text(result: dict[str, Any]) -> str:
    """Lay out the result of `bench_scenarios`."""
    rows = []
    for name, row in result["scenarios"].items():
        rate = row.get("samples_per_second", row.get("queries_per_second"))
        if rate is None:  # MultiStream's summary has no rate
            rate = 1e3 / row["mean_ms"]
        verdict = "valid" if row["valid"] else f"invalid: {', '.join(row['notes']).lower()} no"
        rows.append({**row, "name": name, "rate": rate, "verdict": verdict})
    columns = (
        Column("name", "scenario"),
        Column("p50_ms", "p50 ms", ".1f"),
        Column("p90_ms", "p90 ms", ".1f"),
        Column("p99_ms", "p99 ms", ".1f"),
        Column("rate", "per second", ".2f"),
        Column("verdict", "LoadGen says"),
    )
    return f"{table_text(rows, columns)}\n\nLatencies and rates are of queries: 8 photos, or all."


def _named(images: Path | None) -> str:
    return "made, 1024 x 768" if images is None else images.name
