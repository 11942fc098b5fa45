"""`meiqa bench solver`, `budget`, `calibrate`, `growth`, `cold`, `scenarios`: what takes long."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meiqa.commands.options import (
    add_engine,
    add_format,
    count,
    engine_of,
    milliseconds,
    offline_packages,
    positive_count,
)

if TYPE_CHECKING:
    from meiqa.commands.options import Commands


def add_subjects(subjects: Commands) -> None:
    """Add these subjects to `meiqa bench`."""
    _add_solver(subjects)
    _add_budget(subjects)
    _add_calibrate(subjects)
    _add_growth(subjects)
    _add_cold(subjects)
    _add_scenarios(subjects)


def _solver(options: argparse.Namespace) -> int:
    with offline_packages("bench"):
        from meiqa.benchmarks.solver import bench_solver, table_text

        result = bench_solver(rounds=options.rounds)
    return _print(result, table_text(result), options)


def _budget(options: argparse.Namespace) -> int:
    from meiqa.benchmarks.budget import bench_budget, table_text

    _embedded_anchors(options)
    result = bench_budget(
        lambda: engine_of(options),
        options.budgets,
        photos=options.photos,
        images=None if options.images is None else Path(options.images),
    )
    return _print(result, table_text(result), options)


def _calibrate(options: argparse.Namespace) -> int:
    from dataclasses import asdict

    from meiqa.benchmarks.photographs import photographs_in
    from meiqa.engine.planning import costs_file

    _embedded_anchors(options)
    images = None if options.images is None else Path(options.images)
    with engine_of(options) as engine:
        costs = engine.calibrate(photographs_in(images, options.photos))
        kept = costs_file(engine.package.digest, options.device, options.threads)
    values = asdict(costs)
    spreads = values.pop("spreads")
    lines = [
        f"{name:<16}{value:10.3f}  ± {100 * spreads.get(name, 0.0):.0f} %"
        for name, value in values.items()
    ]
    return _print({"file": str(kept), **asdict(costs)}, "\n".join([*lines, str(kept)]), options)


def _growth(options: argparse.Namespace) -> int:
    from meiqa.benchmarks.growth import NEIGHBOURS, PHOTOS, bench_growth, table_text

    _embedded_anchors(options)
    result = bench_growth(
        lambda: engine_of(options),
        Path(options.memory),
        neighbours=() if options.peak else NEIGHBOURS,
        anchors=() if options.peak else options.anchors,
        photos=() if options.peak else PHOTOS,
        files=options.files,
        images=None if options.images is None else Path(options.images),
        rounds=options.rounds,
    )
    return _print(result, table_text(result), options)


def _cold(options: argparse.Namespace) -> int:
    from meiqa.benchmarks.cold import bench_cold, table_text

    image = None if options.image is None else Path(options.image)
    result = bench_cold(options.runs, image=image, k=options.k)
    return _print(result, table_text(result), options)


def _scenarios(options: argparse.Namespace) -> int:
    _embedded_anchors(options)
    with offline_packages("bench"):
        from meiqa.benchmarks.scenarios import bench_scenarios, table_text

        result = bench_scenarios(
            lambda: engine_of(options),
            options.scenarios,
            seconds=options.seconds,
            photos=options.photos,
            images=None if options.images is None else Path(options.images),
            server_rate=options.server_rate,
            server_latency_ms=options.server_latency_ms,
        )
    return _print(result, table_text(result), options)


def _embedded_anchors(options: argparse.Namespace) -> None:
    """Unless another is named, take the memory that is the same everywhere."""
    from meiqa.locations import embedded_assets

    if options.memory is None:
        options.memory = str(embedded_assets() / "memory")


def _print(result: dict[str, Any], text: str, options: argparse.Namespace) -> int:
    from meiqa.formats import json_text

    sys.stdout.write((json_text(result, indent=2) if options.format == "json" else text) + "\n")
    return 0


def _add_solver(subjects: Commands) -> None:
    solver = subjects.add_parser("solver", help="Thurstone's model: our kernels and their rivals")
    solver.add_argument("--rounds", type=positive_count, default=15, metavar="N")
    add_format(solver, "text", "json")
    solver.set_defaults(run=_solver)


def _add_budget(subjects: Commands) -> None:
    budget = subjects.add_parser("budget", help="how late answers are under a time limit")
    budget.add_argument(
        "--budgets",
        type=milliseconds,
        nargs="+",
        default=[50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0],
        metavar="MS",
    )
    budget.add_argument("--photos", type=positive_count, default=100, metavar="N")
    _add_images(budget)
    add_format(budget, "text", "json")
    add_engine(budget, memory="the embedded anchors alone")
    budget.set_defaults(run=_budget)


def _add_calibrate(subjects: Commands) -> None:
    calibrate = subjects.add_parser("calibrate", help="measure what stages cost here, and keep it")
    calibrate.add_argument("--photos", type=positive_count, default=20, metavar="N")
    _add_images(calibrate)
    add_format(calibrate, "text", "json")
    add_engine(calibrate, memory="the embedded anchors alone")
    calibrate.set_defaults(run=_calibrate)


def _add_growth(subjects: Commands) -> None:
    growth = subjects.add_parser("growth", help="cost against neighbours, anchors and photos")
    growth.add_argument(
        "--anchors",
        type=positive_count,
        nargs="+",
        default=[1_000, 10_000, 100_000],
        metavar="N",
        help="sizes of made memories (default: 1000 10000 100000)",
    )
    growth.add_argument(
        "--files",
        type=positive_count,
        nargs="*",
        default=[10, 1_000],
        metavar="N",
        help="files whose peak memory is compared (default: 10 1000)",
    )
    growth.add_argument("--peak", action="store_true", help="the peak memory and its ratio alone")
    growth.add_argument("--images", metavar="DIR", help="photographs to take the files from")
    growth.add_argument("--rounds", type=positive_count, default=5, metavar="N")
    add_format(growth, "text", "json")
    add_engine(growth, memory="the embedded anchors alone")
    growth.set_defaults(run=_growth)


def _add_cold(subjects: Commands) -> None:
    cold = subjects.add_parser("cold", help="a photo in a fresh process, beside its imports")
    cold.add_argument("--runs", type=positive_count, default=10, metavar="N")
    cold.add_argument("--image", metavar="PATH", help="the photo (default: a made one)")
    cold.add_argument("--k", type=count, metavar="N", help="how many neighbours to compare with")
    add_format(cold, "text", "json")
    cold.set_defaults(run=_cold)


def _add_scenarios(subjects: Commands) -> None:
    scenarios = subjects.add_parser("scenarios", help="MLPerf's scenarios, by MLCommons' LoadGen")
    names = ("SingleStream", "MultiStream", "Server", "Offline")
    scenarios.add_argument("--scenarios", nargs="+", choices=names, default=names, metavar="NAME")
    scenarios.add_argument(
        "--seconds",
        type=positive_count,
        default=60,
        metavar="S",
        help="least duration of each (default: 60; MLPerf asks for 600)",
    )
    scenarios.add_argument("--photos", type=positive_count, default=64, metavar="N")
    scenarios.add_argument(
        "--server-rate",
        type=float,
        metavar="N",
        help="photos a second that arrive in Server (default: 40 %% of what was seen)",
    )
    scenarios.add_argument(
        "--server-latency-ms",
        type=milliseconds,
        default=500.0,
        metavar="MS",
        help="how long 99 of 100 may take in Server (default: 500)",
    )
    _add_images(scenarios)
    add_format(scenarios, "text", "json")
    add_engine(scenarios, memory="the embedded anchors alone")
    scenarios.set_defaults(run=_scenarios)


def _add_images(command: argparse.ArgumentParser) -> None:
    command.add_argument("--images", metavar="DIR", help="photographs (default: made ones)")
