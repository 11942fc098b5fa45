"""`meiqa memory …`: what photographs are compared with."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from meiqa.commands.options import (
    EXIT_FAILURES,
    add_format,
    add_remote,
    count,
    offline_packages,
    positive_count,
    report_failures,
    say,
)
from meiqa.errors import StoreMismatch, StoreNotFound, UsageError, one_line

if TYPE_CHECKING:
    from meiqa.commands.options import Commands
    from meiqa.engine.anchoring import Describer
    from meiqa.engine.local import LocalVlm
    from meiqa.memory import MemoryBank
    from meiqa.types import KeyKind


def add_commands(commands: Commands) -> None:
    """Add `meiqa memory` with its own commands to the parser."""
    memory = commands.add_parser("memory", help="build and tend a memory")
    actions = memory.add_subparsers(metavar="ACTION", required=True)
    _add_build(actions)
    _add_add(actions)
    _add_list(actions)
    _add_remove(actions)
    _add_stats(actions)
    _add_compact(actions)
    _add_verify(actions)
    _add_evict(actions)
    _add_export(actions)
    _add_rekey(actions)


def _build(options: argparse.Namespace) -> int:
    from meiqa.engine.anchoring import build_anchors
    from meiqa.labels import LabelTable
    from meiqa.progress import Progress

    labels = LabelTable.read(options.labels, split=options.split, mos_range=options.mos_range)
    labels = labels.spread(options.limit)
    with _describer(options) as vlm, Progress(len(labels), sys.stderr) as progress:
        failures = build_anchors(
            vlm,
            labels,
            Path(options.images),
            Path(options.out),
            provenance=options.provenance or f"label table {Path(options.labels).name}",
            std=options.std,
            key_kind=options.key,
            keep_thumbnails=options.keep_thumbnails,
            on_photo=lambda _: progress.advance(),
        )
        _keep_settings(vlm, Path(options.out))
    say(f"{options.out}: {len(labels) - len(failures)} anchors")
    return report_failures([failure.to_dict() for failure in failures], len(labels))


def _add(options: argparse.Namespace) -> int:
    from meiqa.engine.anchoring import anchor_case, thumbnail_of
    from meiqa.engine.images import load_pixels
    from meiqa.memory import package_digest_of

    if not 1 <= options.score <= 5:
        raise UsageError("a score is on the 1-5 scale", seen=options.score, allowed="1 to 5")
    with _describer(options, options.memory) as vlm, _bank(options.memory, "rw") as bank:
        if package_digest_of(options.memory) != vlm.package.digest:
            raise StoreMismatch(
                "the memory was built with another package",
                seen=f"{vlm.package.path}",
                hint="name its package: --package DIR",
            )
        pixels = load_pixels(options.image)
        case = anchor_case(
            vlm, pixels, options.image, options.score, options.std, key_kind=bank.key_kind
        )
        bank.add_anchor(
            case,
            provenance=options.provenance or "added by hand",
            thumbnail=thumbnail_of(pixels) if options.keep_thumbnails else None,
        )
    say(f"{options.memory}: {options.image} is an anchor of {options.score:.2f}")
    return 0


def _list(options: argparse.Namespace) -> int:
    from meiqa.formats import json_text

    with _bank(options.memory, "r") as bank:
        thumbnails = bank.thumbnail_bytes()
        for record in bank.cases(options.origin, options.since):
            kept = thumbnails.get(record.id, 0) if record.origin == "anchor" else 0
            if options.format == "jsonl":
                sys.stdout.write(json_text({**asdict(record), "thumbnail_bytes": kept}) + "\n")
                continue
            stored = datetime.fromtimestamp(record.created, UTC).isoformat(" ", "seconds")
            line = f"{record.origin:<9}{record.score:.2f} ± {record.std:.2f}  {stored}  {record.id}"
            line += f"  (thumbnail, {kept} bytes)" if kept else ""
            sys.stdout.write(one_line(line) + "\n")
    return 0


def _remove(options: argparse.Namespace) -> int:
    with _bank(options.memory, "rw") as bank:
        removed = bank.remove(options.ids or None, origin=options.origin, since=options.since)
    if options.ids and not removed:
        raise UsageError(
            f"{options.memory} has no such case",
            seen=", ".join(options.ids),
            hint=f"ids are as `meiqa memory list {options.memory}` prints them",
        )
    say(f"{options.memory}: {removed} {'case' if removed == 1 else 'cases'} removed")
    return 0


def _stats(options: argparse.Namespace) -> int:
    from meiqa.formats import json_text

    with _bank(options.memory, "r") as bank:
        statistics = asdict(bank.statistics())
    as_json = options.format == "json"
    text = json_text(statistics, indent=2) if as_json else "\n".join(_statistics_lines(statistics))
    sys.stdout.write(text + "\n")
    return 0


def _statistics_lines(statistics: dict[str, object], indent: str = "") -> Iterator[str]:
    for name, value in statistics.items():
        if isinstance(value, dict):
            yield f"{indent}{name}"
            yield from _statistics_lines(value, indent + "  ")
        else:
            yield f"{indent}{name:<20}{value}"


def _compact(options: argparse.Namespace) -> int:
    with _bank(options.memory, "rw") as bank:
        merged = bank.compact()
    say(f"{options.memory}: " + ("compacted" if merged else "there was nothing to merge"))
    return 0


def _verify(options: argparse.Namespace) -> int:
    from meiqa.memory import verify_memory

    findings = verify_memory(options.memory)
    for finding in findings:
        say(one_line(f"{finding.file}: {finding.problem}"))
    say(f"{options.memory}: {len(findings)} findings")
    return EXIT_FAILURES if findings else 0


def _evict(options: argparse.Namespace) -> int:
    with _bank(options.memory, "rw") as bank:
        evicted = bank.evict(options.keep)
    say(f"{options.memory}: {evicted} contrast cases evicted")
    return 0


def _export(options: argparse.Namespace) -> int:
    with offline_packages("parquet"), _bank(options.memory, "r") as bank:
        written = bank.export(options.out, options.format)
    say(f"{options.out}: {written} cases")
    return 0


def _rekey(options: argparse.Namespace) -> int:
    with _bank(options.memory, "r") as bank:
        written = bank.rekey(options.key, options.out)
    say(f"{options.out}: {written} cases with keys of kind {options.key}")
    return 0


@contextmanager
def _describer(options: argparse.Namespace, memory: str | None = None) -> Iterator[Describer]:
    """The model that describes anchors; for a remote one of a `memory` there, as that says."""
    if options.remote is None:
        yield _open_vlm(options)
        return
    from meiqa.engine.prompts import prompt_family
    from meiqa.engine.remote import RemoteSettings, connected

    if not options.keep_pictures:
        raise UsageError(
            "a remote model compares pictures, so its memory keeps them, scaled down",
            hint="agree to that by --keep-pictures",
        )
    if options.package is not None or options.device != "cpu":
        raise UsageError("a remote model takes the place of a package and its device")
    if memory is not None:
        settings = RemoteSettings.of_memory(memory)
    else:
        if options.key != "summary":
            raise UsageError(
                "a remote model shows no visual tokens to make keys of", allowed="--key summary"
            )
        named = {
            "prompt": options.prompt and prompt_family(options.prompt),
            "cell_pixels": options.cell_pixels,
            "max_pixels": options.max_pixels,
        }
        chosen = {name: value for name, value in named.items() if value is not None}
        settings = RemoteSettings(options.model or "", **chosen)
    vlm = connected(options.remote, settings, Path(memory or options.out))
    try:
        yield vlm
    finally:
        vlm.close()


def _keep_settings(vlm: Describer, memory: Path) -> None:
    """Lay beside a memory how its remote model was asked."""
    from meiqa.engine.package import EnginePackage

    if type(vlm.package) is not EnginePackage:
        from meiqa.engine.remote import RemotePackage

        assert isinstance(vlm.package, RemotePackage)
        vlm.package.settings.write(memory)


def _open_vlm(options: argparse.Namespace) -> LocalVlm:
    from meiqa.engine.local import LocalVlm
    from meiqa.engine.package import EnginePackage
    from meiqa.engine.runtime.sessions import sessions_on
    from meiqa.locations import embedded_assets

    package = EnginePackage.open(options.package or embedded_assets() / "package")
    return LocalVlm(package, *sessions_on(options.device, package, None, verify=True))


@contextmanager
def _bank(path: str, mode: Literal["r", "rw"]) -> Iterator[MemoryBank]:
    """A memory for the package that it was built with; the embedded anchors if it has none."""
    from meiqa.locations import embedded_assets
    from meiqa.memory import MemoryBank, holds_anchors, package_digest_of

    anchors = Path(path) if holds_anchors(path) else embedded_assets() / "memory"
    if not Path(path).is_dir():
        raise StoreNotFound("there is no memory", seen=path, hint="meiqa memory build makes one")
    digest = package_digest_of(anchors)
    with MemoryBank.compose(anchors, path, mode, package_digest=digest) as bank:
        yield bank


def _add_build(actions: Commands) -> None:
    action = actions.add_parser("build", help="make a memory of photographs with human scores")
    action.add_argument("labels", metavar="LABELS.csv", help="with an image and a mos column")
    action.add_argument("--images", required=True, metavar="DIR", help="where the images are")
    action.add_argument("--out", required=True, metavar="MEM", help="must not exist")
    action.add_argument("--split", metavar="S", help="only the rows of this split")
    action.add_argument("--limit", type=positive_count, metavar="N", help="N of them, spread")
    action.add_argument(
        "--mos-range", nargs=2, type=float, metavar=("LO", "HI"), help="ends of the human scale"
    )
    _add_key(action, default="summary")
    _add_anchoring(action)
    add_remote(action)
    action.add_argument("--prompt", metavar="FAMILY", help="with --remote: what it is asked")
    action.add_argument(
        "--cell-pixels",
        type=positive_count,
        metavar="N",
        help="with --remote: sides of pictures are multiples of N (default: 28, for Qwen2.5-VL)",
    )
    action.add_argument(
        "--max-pixels", type=positive_count, metavar="N", help="with --remote: largest area"
    )
    _add_keep_pictures(action)
    action.set_defaults(run=_build)


def _add_add(actions: Commands) -> None:
    action = actions.add_parser("add", help="add one photograph with its human score")
    action.add_argument("memory", metavar="MEM")
    action.add_argument("image", metavar="IMAGE")
    action.add_argument("--score", type=float, required=True, metavar="S", help="1 to 5")
    _add_anchoring(action)
    add_remote(action)
    _add_keep_pictures(action)
    action.set_defaults(run=_add)


def _add_anchoring(action: argparse.ArgumentParser) -> None:
    action.add_argument("--package", metavar="DIR", help="engine package (default: the embedded)")
    action.add_argument("--device", choices=("cpu", "cuda", "tensorrt"), default="cpu")
    action.add_argument("--provenance", metavar="TEXT", help="where the score comes from")
    action.add_argument(
        "--std", type=float, default=0.2, metavar="S", help="standard error of the scores"
    )
    action.add_argument(
        "--keep-thumbnails",
        action="store_true",
        help="keep a small JPEG with each anchor (default: no image is kept)",
    )


def _add_keep_pictures(action: argparse.ArgumentParser) -> None:
    action.add_argument(
        "--keep-pictures",
        action="store_true",
        help="with --remote: agree that the memory keeps the anchors' pictures, scaled down",
    )


def _add_list(actions: Commands) -> None:
    action = actions.add_parser("list", help="list what is stored")
    action.add_argument("memory", metavar="MEM")
    add_format(action, "text", "jsonl")
    _add_conditions(action)
    action.set_defaults(run=_list)


def _add_remove(actions: Commands) -> None:
    action = actions.add_parser("remove", help="remove what fulfils every condition given")
    action.add_argument("memory", metavar="MEM")
    action.add_argument("ids", nargs="*", metavar="ID")
    _add_conditions(action)
    action.set_defaults(run=_remove)


def _add_conditions(action: argparse.ArgumentParser) -> None:
    action.add_argument("--origin", choices=("anchor", "contrast"))
    action.add_argument(
        "--since", type=_moment, metavar="TIME", help="stored then or later, as 2026-05-31T12:00"
    )


def _add_stats(actions: Commands) -> None:
    action = actions.add_parser("stats", help="count, weigh and measure it")
    action.add_argument("memory", metavar="MEM")
    add_format(action, "text", "json")
    action.set_defaults(run=_stats)


def _add_compact(actions: Commands) -> None:
    action = actions.add_parser("compact", help="merge what was added into new segments")
    action.add_argument("memory", metavar="MEM")
    action.set_defaults(run=_compact)


def _add_verify(actions: Commands) -> None:
    action = actions.add_parser("verify", help="read every byte and tell what is wrong")
    action.add_argument("memory", metavar="MEM")
    action.set_defaults(run=_verify)


def _add_evict(actions: Commands) -> None:
    action = actions.add_parser("evict", help="remove the contrast cases that are worth least")
    action.add_argument("memory", metavar="MEM")
    action.add_argument("--keep", type=count, required=True, metavar="N")
    action.set_defaults(run=_evict)


def _add_export(actions: Commands) -> None:
    action = actions.add_parser("export", help="write records, keys and thumbnails to a file")
    action.add_argument("memory", metavar="MEM")
    action.add_argument("--out", required=True, metavar="FILE")
    action.add_argument("--format", choices=("jsonl", "parquet"), default="jsonl")
    action.set_defaults(run=_export)


def _add_rekey(actions: Commands) -> None:
    action = actions.add_parser(
        "rekey", help="write it again with keys of another kind, without the photographs"
    )
    action.add_argument("memory", metavar="MEM")
    _add_key(action)
    action.add_argument("--out", required=True, metavar="NEW", help="must not exist")
    action.set_defaults(run=_rekey)


def _add_key(action: argparse.ArgumentParser, default: KeyKind | None = None) -> None:
    of = "what is written about photos (summary), their visual tokens (image), or both"
    action.add_argument(
        "--key",
        choices=("summary", "image", "both"),
        default=default,
        required=default is None,
        help=f"find neighbours by {of}" + (f" (default: {default})" if default else ""),
    )


def _moment(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time like 2026-05-31T12:00") from None
    return moment if moment.tzinfo else moment.astimezone()
