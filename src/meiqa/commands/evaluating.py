"""`meiqa eval`: photos that people have scored are judged."""

from __future__ import annotations

import argparse
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meiqa.commands.options import (
    add_effort,
    add_engine,
    add_exclude_above,
    add_format,
    add_head,
    budget_of,
    engine_of,
    milliseconds,
    offline_packages,
    positive_count,
    report_failures,
)
from meiqa.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from meiqa.benchmarks.accuracy import Judged
    from meiqa.benchmarks.recording import Parts
    from meiqa.commands.options import Commands
    from meiqa.labels import LabelTable


def add_commands(commands: Commands) -> None:
    """Add this command to the parser."""
    command = commands.add_parser("eval", help="measure the agreement with human scores")
    command.add_argument("labels", metavar="LABELS.csv", help="with an image and a mos column")
    command.add_argument("--images", required=True, metavar="DIR", help="where the images are")
    command.add_argument("--split", metavar="S", help="only the rows of this split")
    command.add_argument(
        "--limit", type=positive_count, metavar="N", help="N photos, spread over the table"
    )
    command.add_argument(
        "--mos-range",
        nargs=2,
        type=float,
        metavar=("LO", "HI"),
        help="ends of the human scale (default: 0-1, 1-5 or 0-100, whichever holds all scores)",
    )
    _add_extras(command)
    add_format(command, "text", "json")
    add_effort(command)
    add_exclude_above(command)
    add_head(command)
    add_engine(command, memory="the embedded anchors alone")
    command.set_defaults(run=_eval)


def _add_extras(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--ablation",
        action="store_true",
        help="what memory, retrieval key, number of neighbours and both orders are worth",
    )
    command.add_argument(
        "--contrast-from",
        metavar="TABLE.csv",
        help="photos that the ablation's contrast memory is learnt from, without their scores"
        " (default: a quarter of the anchors)",
    )
    command.add_argument(
        "--budgets", type=milliseconds, nargs="+", metavar="MS", help="judge under time limits, too"
    )
    command.add_argument(
        "--peers", action="store_true", help="sharpness and other ways to judge the same photos"
    )
    command.add_argument(
        "--peer-models", metavar="DIR", help="published models of BRISQUE and NIQE, for --peers"
    )
    command.add_argument(
        "--regressor-from",
        metavar="TABLE.csv",
        help="for --peers: fit a regressor on visual tokens to these photos",
    )
    command.add_argument(
        "--train-split",
        metavar="S",
        help="only the rows of this split of --contrast-from and --regressor-from",
    )
    command.add_argument("--plots", metavar="DIR", type=Path, help="draw the results into DIR")


def _eval(options: argparse.Namespace) -> int:
    from meiqa.benchmarks.accuracy import judge
    from meiqa.formats import json_text
    from meiqa.labels import LabelTable
    from meiqa.locations import embedded_assets
    from meiqa.progress import Progress

    if options.memory is None:  # what this user's photos taught would change the figures
        options.memory = str(embedded_assets() / "memory")
    _require_what_it_needs(options)
    table = LabelTable.read(options.labels, split=options.split, mos_range=options.mos_range)
    labels = table.spread(options.limit)
    contrast, training = (
        _other_table(path, options.train_split, labels)
        for path in (options.contrast_from, options.regressor_from)
    )
    with engine_of(options) as engine, Progress(len(labels), sys.stderr) as progress:
        judged = judge(
            engine,
            labels,
            options.images,
            k=options.k,
            budget=budget_of(options),
            on_result=lambda _: progress.advance(),
        )
    report = {**judged.report(), **_extras(options, labels, judged, contrast, training)}
    if options.plots is not None:
        from meiqa.benchmarks.plots import draw_all

        report["plots"] = [str(path) for path in draw_all(judged, report, options.plots)]
    text = json_text(report, indent=2) if options.format == "json" else _text(report)
    sys.stdout.write(text + "\n")
    return report_failures(report["failures"], len(labels))


def _require_what_it_needs(options: argparse.Namespace) -> None:
    """Refuse now what would fail after much work, or be left unused."""
    needs = (
        ("--contrast-from", options.contrast_from, "--ablation", options.ablation),
        ("--peer-models", options.peer_models, "--peers", options.peers),
        ("--regressor-from", options.regressor_from, "--peers", options.peers),
        (
            "--train-split",
            options.train_split,
            "--contrast-from or --regressor-from",
            options.contrast_from or options.regressor_from,
        ),
    )
    for option, value, other, given in needs:
        if value is not None and not given:
            raise UsageError(f"{option} means nothing without {other}")
    if options.plots is not None:
        with offline_packages("plots"):
            import meiqa.benchmarks.plots  # noqa: F401
        options.plots.mkdir(parents=True, exist_ok=True)


def _extras(
    options: argparse.Namespace,
    labels: LabelTable,
    judged: Judged,
    contrast: LabelTable | None,
    training: LabelTable | None,
) -> dict[str, Any]:
    """What was asked for beyond the agreement with people."""
    extras: dict[str, Any] = {}
    if options.peers and training is None:
        extras["peers"] = _peers(options, judged, None, None)
    if not (options.ablation or options.budgets or training):
        return extras
    with _parts(options) as parts:
        if training is not None:
            extras["peers"] = _peers(options, judged, parts, training)
        if options.ablation:
            extras["ablation"] = _ablation(options, labels, parts, contrast)
        if options.budgets:
            extras["budgets"] = _budgets(options, labels, parts)
    return extras


def _other_table(path: str | None, split: str | None, labels: LabelTable) -> LabelTable | None:
    """Read photos to learn from; none of them may be one that is judged."""
    from meiqa.labels import LabelTable

    if path is None:
        return None
    table = LabelTable.read(path, split=split)
    shared = set(table.files) & set(labels.files)
    if shared:
        raise UsageError(
            f"{path} holds photos that are to be judged",
            seen=f"{len(shared)}, {min(shared)} among them",
            hint="choose other rows with --split and --train-split",
        )
    return table


@contextmanager
def _parts(options: argparse.Namespace) -> Iterator[Parts]:
    from meiqa.benchmarks.recording import Parts
    from meiqa.locations import embedded_assets

    policies = {} if options.exclude_above is None else {"exclude_above": options.exclude_above}
    with Parts.opened(
        options.package or embedded_assets() / "package",
        options.memory,
        device=options.device,
        threads=options.threads,
        verify=options.verify,
        head=options.head,
        **policies,
    ) as parts:
        yield parts


def _ablation(
    options: argparse.Namespace, labels: LabelTable, parts: Parts, contrast: LabelTable | None
) -> dict[str, Any]:
    from meiqa.benchmarks.ablation import ablate
    from meiqa.progress import Progress

    with Progress(len(labels), sys.stderr) as progress:
        return ablate(
            parts, labels, options.images, contrast_from=contrast, on_photo=progress.advance
        )


def _budgets(options: argparse.Namespace, labels: LabelTable, parts: Parts) -> dict[str, Any]:
    from meiqa.benchmarks.hurry import sweep_budgets
    from meiqa.progress import Progress

    runs = 1 + len(options.budgets)
    with Progress(runs * len(labels), sys.stderr) as progress:
        return sweep_budgets(
            parts, labels, options.images, options.budgets, on_result=lambda _: progress.advance()
        )


def _peers(
    options: argparse.Namespace, judged: Judged, parts: Parts | None, training: LabelTable | None
) -> list[dict[str, Any]]:
    from meiqa.benchmarks.peers import judge_peers, published_peers, regressor_peer
    from meiqa.benchmarks.regressor import fitted_regressor
    from meiqa.progress import Progress

    peers = published_peers(None if options.peer_models is None else Path(options.peer_models))
    if parts is not None and training is not None:
        with Progress(len(training), sys.stderr) as progress:
            regressor = fitted_regressor(
                parts.vlm, training, options.images, on_photo=progress.advance
            )
        peers.append(regressor_peer(parts.vlm, regressor))
    photos = [assessment.path for assessment in judged.assessments]
    with Progress(len(photos), sys.stderr) as progress:
        return judge_peers(peers, photos, judged.human, on_photo=progress.advance)


def _text(report: dict[str, Any]) -> str:
    from meiqa.benchmarks.ablation import ablation_text
    from meiqa.benchmarks.hurry import budgets_text
    from meiqa.benchmarks.peers import peers_text
    from meiqa.formats import evaluation_text

    sections = [evaluation_text(report)]
    if "peers" in report:
        sections.append(peers_text([*_own_rows(report), *report["peers"]]))
    if "ablation" in report:
        sections.append(ablation_text(report["ablation"]))
    if "budgets" in report:
        sections.append(budgets_text(report["budgets"]))
    if "plots" in report:
        sections.append("\n".join(["Drawn:", *(f"  {path}" for path in report["plots"])]))
    return "\n\n".join(sections)


def _own_rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """What the peers are to be compared with."""
    fused_ms = 1e3 * report["seconds_per_image"]
    return [
        {"name": "meiqa, initial", "n": report["n"], **report["initial"]},
        {"name": "meiqa, fused", "n": report["n"], **report["fused"], "ms_per_image": fused_ms},
    ]
