"""MLPerf's four scenarios, driven and judged by MLCommons' own load generator.

* SingleStream: a photo at a time, the next as soon as the last is judged.
* MultiStream: the same with 8 photos in a query.
* Server: photos arrive at random (Poisson) at a rate; 99 of 100 must be judged within a limit.
* Offline: all photos at once.

When each query comes, what counts and whether a run is valid is LoadGen's business; the figures
are read from its summary. Official submissions run each scenario for 600 s (`--seconds 600`);
shorter runs, as by default, may be too short for the number of queries that a percentile needs,
and LoadGen calls them invalid then. Photos are in memory, encoded; what was read of a photo is
dropped before the next one, since MLPerf allows no cache of queries. The neighbours' prefixes are
kept: they are the model's memory, not the query's.
"""

from __future__ import annotations

import argparse
import importlib
import json
import queue
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from meiqa.benchmarks.machine import machine, versions
from meiqa.benchmarks.photographs import photographs_in
from meiqa.engine.pipeline import Engine
from meiqa.types import Failure

__all__ = ["SCENARIOS", "bench_scenarios", "main", "summary_of", "table_text"]

SCENARIOS = ("SingleStream", "MultiStream", "Server", "Offline")
SECONDS, PHOTOS = 60.0, 64
SERVER_SHARE, SERVER_LATENCY_MS = 0.4, 500.0
_OFFLINE_MARGIN = 1.2  # of photos, so that a faster run still lasts long enough
_WARM_UP = 8
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
    scenarios: Sequence[str] = SCENARIOS,
    *,
    seconds: float = SECONDS,
    photos: int = PHOTOS,
    images: Path | None = None,
    server_rate: float | None = None,
    server_latency_ms: float = SERVER_LATENCY_MS,
) -> dict[str, Any]:
    """Run scenarios one after the other.

    Args:
        open_engine: Opens an engine; it is closed again.
        scenarios: Which of `SCENARIOS`.
        seconds: The least duration of each.
        photos: How many different ones there are.
        images: A directory of photographs; made ones of 1024 x 768 if it is None.
        server_rate: Photos a second that arrive in Server; by default a share of what the engine
            was seen to do.
        server_latency_ms: How long 99 of 100 may take in Server.

    Returns:
        `scenarios` by name: whether LoadGen found the run `valid`, `notes` where not, latencies of
        queries, rates, and all that its summary says under `loadgen`; and what it was run on.
    """
    given = list(photographs_in(images, photos))
    samples = [each if isinstance(each, bytes) else each.read_bytes() for each in given]
    found: dict[str, Any] = {}
    with open_engine() as engine, tempfile.TemporaryDirectory() as folder:
        judge = _Judge(engine, samples)
        rate = judge.rate(_WARM_UP)
        arriving = server_rate or round(SERVER_SHARE * rate, 3)
        for scenario in scenarios:
            limits = _Limits(seconds, rate, arriving, server_latency_ms)
            text = _run(scenario, judge, limits, Path(folder) / scenario)
            found[scenario] = summary_of(text)
    return {
        "scenarios": found,
        "settings": {
            **{"seconds": seconds, "photos": photos, "warm_up": _WARM_UP},
            "images": "made, 1024 x 768" if images is None else images.name,
            **{"expected_per_second": round(rate, 3), "server_per_second": arriving},
            **{"server_latency_ms": server_latency_ms, "offline_margin": _OFFLINE_MARGIN},
        },
        "machine": machine(),
        "versions": versions("mlcommons-loadgen", "numpy", "onnxruntime", "meiqa"),
    }


class _Judge:
    """The system under test: queries wait in a line, and one thread judges their photos."""

    def __init__(self, engine: Engine, samples: Sequence[bytes]) -> None:
        self.samples = samples
        self._engine = engine

    def score(self, indices: Sequence[int]) -> None:
        """Judge photos of one query.

        Raises:
            MeiqaError: one of them can't be judged.
        """
        self._engine.forget_photos()
        for result in self._engine.score_many([self.samples[i] for i in indices], learn=False):
            if isinstance(result, Failure):
                raise result.error
            self._engine.forget_photos()

    def rate(self, count: int) -> float:
        """Photos a second, once as many have been judged to warm up."""
        indices = [number % len(self.samples) for number in range(count)]
        self.score(indices)
        began = time.perf_counter()
        self.score(indices)
        return count / (time.perf_counter() - began)


class _Limits:
    """What LoadGen is told of a run."""

    def __init__(self, seconds: float, rate: float, server_rate: float, latency_ms: float) -> None:
        self.seconds, self.rate = seconds, rate
        self.server_rate, self.latency_ms = server_rate, latency_ms

    def settings(self, loadgen: Any, scenario: str) -> Any:
        """The settings of a scenario."""
        made = loadgen.TestSettings()
        made.scenario = getattr(loadgen.TestScenario, scenario)
        made.mode = loadgen.TestMode.PerformanceOnly
        made.min_duration_ms = int(1e3 * self.seconds)
        made.min_query_count = 1
        made.single_stream_expected_latency_ns = int(1e9 / self.rate)
        made.multi_stream_expected_latency_ns = int(8e9 / self.rate)
        made.server_target_qps = self.server_rate
        made.server_target_latency_ns = int(1e6 * self.latency_ms)
        made.offline_expected_qps = _OFFLINE_MARGIN * self.rate
        return made


def _run(scenario: str, judge: _Judge, limits: _Limits, folder: Path) -> str:
    """Let LoadGen run one scenario; the text of its summary."""
    loadgen = importlib.import_module("mlperf_loadgen")
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
        settings = limits.settings(loadgen, scenario)
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
        `valid`; `notes`: what was not satisfied; latencies and rates under our names; and
        `loadgen`, every line of the summary that names a value.
    """
    matches = [match for line in text.splitlines() if (match := _LINE.match(line))]
    said = {match["name"]: match["value"] for match in matches}
    unmet = [name for name, value in said.items() if name.endswith("atisfied") and value != "Yes"]
    made: dict[str, Any] = {"valid": said.get("Result is") == "VALID", "notes": unmet}
    for name, ours in _LATENCIES.items():
        if name in said:
            made[ours] = round(float(said[name]) / 1e6, 3)
    for name, ours in _RATES.items():
        if name in said:
            made[ours] = float(said[name])
    return {**made, "loadgen": said}


def table_text(result: dict[str, Any]) -> str:
    """Lay out the result for people."""
    lines = [f"{'':<14}{'p50 ms':>10}{'p90 ms':>10}{'p99 ms':>10}{'per second':>12}  LoadGen says"]
    for name, row in result["scenarios"].items():
        rate = row.get("samples_per_second", row.get("queries_per_second"))
        if rate is None:  # MultiStream's summary has no rate
            rate = 1e3 / row["mean_ms"]
        verdict = "valid" if row["valid"] else f"invalid: {', '.join(row['notes']).lower()} no"
        latencies = "".join(f"{row[each]:10.1f}" for each in ("p50_ms", "p90_ms", "p99_ms"))
        lines.append(f"{name:<14}{latencies}{rate:12.2f}  {verdict}")
    return "\n".join([*lines, "", "Latencies and rates are those of queries: 8 photos, or all."])


def main(argv: Sequence[str] | None = None) -> None:
    """Print the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--photos", type=int, default=PHOTOS)
    parser.add_argument("--images", type=Path, metavar="DIR")
    parser.add_argument("--memory", metavar="DIR")
    parser.add_argument("--format", choices=("text", "json"), default="text")
    options = parser.parse_args(argv)
    result = bench_scenarios(
        lambda: Engine.open(memory=options.memory, learn=False),
        seconds=options.seconds,
        photos=options.photos,
        images=options.images,
    )
    as_json = options.format == "json"
    sys.stdout.write((json.dumps(result, indent=2) if as_json else table_text(result)) + "\n")


if __name__ == "__main__":
    main()
