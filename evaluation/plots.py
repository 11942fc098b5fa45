"""The results of `meiqa eval` as pictures.

Colours are those of M. Okabe and K. Ito, which people with any kind of colour vision can tell
apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from meiqa.evaluation.accuracy import Judged

_HUMAN, _INITIAL, _FUSED = "#555555", "#E69F00", "#0072B2"
_GUIDE = "#9a9a9a"
_SCALE = (1.0, 5.0)
_GRADES = range(1, 6)
_BINS = np.linspace(1.0, 5.0, 101)
STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#666666",
    "axes.grid": True,
    "axes.labelcolor": "#222222",
    "axes.labelsize": 11,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "figure.constrained_layout.h_pad": 0.1,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.1,
    "figure.dpi": 160,
    "figure.facecolor": "white",
    "font.size": 10,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "savefig.facecolor": "white",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
}


def draw_all(judged: Judged, report: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw photos and their report, as `meiqa eval` gives it, into a folder; give the files.

    Always drawn are predicted.png, histograms.png and reliability.png; with budgets budgets.png.
    """
    drawings: dict[str, Callable[[], Figure]] = {
        "predicted": lambda: predicted_against_human(judged, report),
        "histograms": lambda: histograms(judged, report),
        "reliability": lambda: reliability_curve(report["reliability"], len(judged.human)),
    }
    if "budgets" in report:
        drawings["budgets"] = lambda: srcc_against_budget(report["budgets"]["rows"])
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with rc_context(STYLE):
        for name, draw in drawings.items():
            path = folder / f"{name}.png"
            draw().savefig(path)
            written.append(path)
    return written


def predicted_against_human(judged: Judged, report: Mapping[str, Any]) -> Figure:
    """Every photo, by the initial and by the fused score, with the diagonal."""
    figure = Figure(figsize=(8.4, 4.4))
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    stages = (("initial", judged.initial, _INITIAL), ("fused", judged.fused, _FUSED))
    for axes, (stage, scores, colour) in zip(panels, stages, strict=True):
        axes.plot(_SCALE, _SCALE, color=_GUIDE, linewidth=1.2, zorder=1)
        axes.scatter(scores, judged.human, s=13, color=colour, alpha=0.5, linewidths=0)
        axes.set(xlim=_SCALE, ylim=_SCALE, aspect="equal", xlabel=f"{stage} score")
        axes.set(xticks=_GRADES, yticks=_GRADES)
        axes.set_title(f"{stage}: SRCC {report[stage]['srcc']:.3f}")
    panels[0].set_ylabel("human score")
    return figure


def histograms(judged: Judged, report: Mapping[str, Any]) -> Figure:
    """How people, the initial and the fused scores spread over the 100 bins of the metrics."""
    figure = Figure(figsize=(7.0, 5.4))
    panels = figure.subplots(3, 1, sharex=True)
    drawn = (
        ("human", judged.human, _HUMAN),
        ("initial", judged.initial, _INITIAL),
        ("fused", judged.fused, _FUSED),
    )
    for axes, (name, scores, colour) in zip(panels, drawn, strict=True):
        figures = report[name]
        apart = f", {figures['js']:.2f} bits from people's" if "js" in figures else ""
        axes.hist(np.clip(scores, *_SCALE), bins=_BINS, color=colour)
        axes.set_title(f"{name}: {figures['effective_bins']:.0f} effective bins{apart}")
        axes.grid(visible=False, axis="x")
        axes.yaxis.get_major_locator().set_params(integer=True, nbins=4)
    panels[-1].set(xlim=_SCALE, xlabel="score")
    panels[1].set_ylabel("photos in each of 100 bins")
    return figure


def reliability_curve(rows: Sequence[Mapping[str, float]], count: int) -> Figure:
    """Which share of human scores the intervals cover, against what they promise."""
    figure = Figure(figsize=(4.8, 4.6))
    axes = figure.subplots()
    promised = np.linspace(0.0, 1.0, 201)
    margin = 1.96 * np.sqrt(promised * (1.0 - promised) / count)
    low, high = np.clip((promised - margin, promised + margin), 0.0, 1.0)
    axes.fill_between(promised, low, high, color="#ececec", label=f"chance, {count} photos")
    axes.plot((0, 1), (0, 1), color=_GUIDE, linewidth=1.2, label="as promised")
    nominal, observed = ([row[name] for row in rows] for name in ("nominal", "observed"))
    axes.plot(nominal, observed, "o-", color=_FUSED, markersize=6, label="observed")
    axes.set(xlim=(0.4, 1.0), ylim=(0.4, 1.0), aspect="equal")
    axes.set(xlabel="nominal coverage of the interval", ylabel="human scores inside")
    axes.set_title("reliability of the intervals")
    axes.legend(frameon=False, loc="upper left")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda share, _: f"{100 * share:.0f} %")
    return figure


def srcc_against_budget(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Agreement by the time allowed for each photo."""
    unbounded, *limited = rows
    limited = sorted(limited, key=lambda row: float(row["budget_ms"]))
    figure, axes = draw_agreement(
        "agreement by budget",
        "time allowed for each photo, ms",
        [row["budget_ms"] for row in limited],
        [row["srcc"] for row in limited],
        {
            "initial score": unbounded["srcc"] - unbounded["gain"],
            "without a limit": unbounded["srcc"],
        },
    )
    axes.set_xlim(left=0.0)
    return figure


def draw_agreement(
    title: str,
    varied: str,
    values: Sequence[float],
    reached: Sequence[float],
    levels: Mapping[str, float],
) -> tuple[Figure, Axes]:
    """Draw SRCC against what was varied, with levels to compare with, the initial score's first."""
    figure = Figure(figsize=(6.2, 4.2))
    axes = figure.subplots()
    axes.plot(values, reached, "o-", color=_FUSED, markersize=6)
    axes.set(xlabel=varied, ylabel="SRCC with people", title=title)
    for (name, height), colour in zip(levels.items(), (_INITIAL, _FUSED), strict=False):
        axes.axhline(height, color=colour, linewidth=1.4, linestyle=(0, (5, 3)), zorder=1)
        axes.annotate(
            name,
            (0.0, height),
            xycoords=("axes fraction", "data"),
            xytext=(4, 4),
            textcoords="offset points",
            ha="left",
            color="#444444",
        )
    return figure, axes
