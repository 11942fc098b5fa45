"""`meiqa memory …`: what photographs are compared with; `meiqa hub …`: by what it is shared."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from meiqa.cli import options as cli
from meiqa.cli.options import Options, say
from meiqa.errors import StoreMismatch, StoreNotFound, UsageError, one_line
from meiqa.formats import json_text, tree_text
from meiqa.locations import embedded_assets
from meiqa.outputs import Kind, open_output
from meiqa.progress import Progress

if TYPE_CHECKING:
    from meiqa.engine.model import Model
    from meiqa.engine.remote import RemoteSettings
    from meiqa.memory import MemoryBank

KEYS = ("summary", "image", "both")
EXPORT = Kind("export")

memory_command = cli.Group("memory", help="Build and tend a memory.", no_args_is_help=False)
hub_command = cli.Group(
    "hub",
    help="Let memories learn from each other by a PostgreSQL database; see docs/hub.md.",
    no_args_is_help=False,
)


def moment(text: str) -> datetime:
    """Read a moment; without a zone it is local time."""
    try:
        read = datetime.fromisoformat(text)
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a time like 2026-05-31T12:00") from None
    return read if read.tzinfo else read.astimezone()


MEMORY = cli.argument("memory", "MEM")
URL = cli.argument("url", "URL")
WHICH = cli.together(
    cli.option("--origin", type=("anchor", "contrast")),
    cli.option("--since TIME", "stored then or later, as 2026-05-31T12:00", moment),
)
ANCHORING = cli.together(
    cli.PACKAGE,
    cli.DEVICE,
    cli.option("--provenance TEXT", "where the score comes from"),
    cli.option("--std S", "standard error of the scores", cli.number(), default=0.2),
    cli.flag("--keep-thumbnails", "keep a small JPEG with each anchor (default: no image is kept)"),
    cli.option(
        "--remote URL",
        "a model behind an OpenAI-compatible server in place of a package; photos are sent there "
        "(docs/remote.md)",
        excludes="--package --device",
    ),
    cli.flag(
        "--keep-pictures",
        "agree that the memory keeps the anchors' pictures, scaled down",
        needs="--remote",
    ),
)


@memory_command.command("create")
@cli.argument("memory", "DIR")
@cli.PACKAGE
def create(options: Options) -> int:
    """Make an empty memory, to learn into; of the default package, beside the embedded anchors."""
    from meiqa.engine.package import EnginePackage
    from meiqa.memory import create_memory

    package = EnginePackage.open(options.package or embedded_assets() / "package", verify=False)
    beside = create_memory(options.memory, package.digest, *package.widths)
    say(f"{options.memory}: {'learns beside the embedded anchors' if beside else 'no anchors'}")
    return 0


@memory_command.command("build")
@cli.LABELS
@cli.option("--out MEM", "must not exist", cli.path, required=True)
@cli.option(
    "--key",
    "find neighbours by what is written about photos (summary), their visual tokens (image), or "
    "both",
    KEYS,
    default="summary",
)
@ANCHORING
@cli.option("--model NAME", "what that server calls it", needs="--remote")
@cli.option("--prompt FAMILY", "what it is asked", needs="--remote")
@cli.option(
    "--cell-pixels N",
    "sides of pictures are multiples of N (default: 28, for Qwen2.5-VL)",
    cli.POSITIVE,
    needs="--remote",
)
@cli.option("--max-pixels N", "largest area of a picture", cli.POSITIVE, needs="--remote")
@cli.RAY
def build(options: Options) -> int:
    """Make a memory of photographs with human scores."""
    from meiqa.engine.anchoring import AnchorMaker, AnchorOptions, build_anchors
    from meiqa.engine.remote import RemoteModel

    labels, out = cli.table_of(options), Path(options.out)
    kept = AnchorOptions(
        provenance=options.provenance or f"label table {Path(options.labels).name}",
        std=options.std,
        key_kind=options.key,
        keep_thumbnails=options.keep_thumbnails,
    )
    with ExitStack() as stack:
        model, make = stack.enter_context(_describer(options)), None
        if options.ray is not None:
            stack.enter_context(cli.cluster(options))
            from meiqa.ray import mapped

            opened = partial(_local_model, options)
            make = partial(mapped, AnchorMaker(opened, Path(options.images), kept))
        say(_needed(model, len(labels)))
        progress = stack.enter_context(Progress(len(labels)))
        failures = build_anchors(
            model,
            labels,
            Path(options.images),
            out,
            kept,
            on_photo=progress.advance,
            make=make,
        )
        if isinstance(model, RemoteModel):  # lay beside the memory how its model was asked
            model.settings.write(out)
    say(f"{out}: {len(labels) - len(failures)} anchors")
    return cli.report_failures([failure.to_dict() for failure in failures], len(labels))


@memory_command.command("add")
@MEMORY
@cli.argument("image", "IMAGE")
@cli.option("--score S", "of the photograph", cli.number(1, 5), required=True)
@cli.RAW
@ANCHORING
@cli.option("--model NAME", "which has to be the memory's", needs="--remote")
def add(options: Options) -> int:
    """Add one photograph with its human score."""
    from meiqa.engine.anchoring import AnchorOptions, anchor_case, thumbnail_of
    from meiqa.engine.images import load_pixels

    memory = options.memory
    with _describer(options, memory) as model, _bank(memory, "rw") as bank:
        if bank.identity.package_digest != model.digest:
            raise StoreMismatch(
                "the memory was built with another package",
                seen=options.package or options.remote or "the embedded package",
                hint="name its package: --package DIR",
            )
        (image,) = cli.as_asked([options.image], options)
        pixels = load_pixels(image)
        kept = AnchorOptions(std=options.std, key_kind=bank.key_kind)
        case = anchor_case(model, pixels, options.image, options.score, kept)
        bank.add_anchor(
            case,
            provenance=options.provenance or "added by hand",
            thumbnail=thumbnail_of(pixels) if options.keep_thumbnails else None,
        )
    say(f"{memory}: {options.image} is an anchor of {options.score:.2f}")
    return 0


@memory_command.command("list")
@MEMORY
@cli.format_option("text", "jsonl")
@WHICH
def list_cases(options: Options) -> int:
    """List what is stored."""
    with _bank(options.memory, "r") as bank:
        thumbnails = bank.snapshot().anchors.thumbnail_bytes()
        for record in bank.cases(options.origin, options.since):
            kept = thumbnails.get(record.id, 0) if record.origin == "anchor" else 0
            if options.format == "jsonl":
                sys.stdout.write(json_text({**asdict(record), "thumbnail_bytes": kept}) + "\n")
                continue
            stored = datetime.fromtimestamp(record.created, UTC).isoformat(" ", "seconds")
            line = f"{record.origin:<9}{record.score:.2f} ± {record.std:.2f}  {stored}  {record.id}"
            line += f"  (thumbnail, {kept} bytes)" if kept else ""
            line += f"  (by {record.device})" if record.device else ""
            sys.stdout.write(one_line(line) + "\n")
    return 0


@memory_command.command("remove")
@MEMORY
@cli.argument("ids", "[ID]...", nargs=-1)
@WHICH
def remove(options: Options) -> int:
    """Remove what fulfils every condition given."""
    memory, ids = options.memory, options.ids or None
    with _bank(memory, "rw") as bank:
        removed = bank.remove(ids, origin=options.origin, since=options.since)
    if ids and not removed:
        raise UsageError(
            f"{memory} has no such case",
            seen=", ".join(ids),
            hint=f"ids are as `meiqa memory list {memory}` prints them",
        )
    say(f"{memory}: {removed} {'case' if removed == 1 else 'cases'} removed")
    return 0


@memory_command.command("stats")
@MEMORY
@cli.format_option("text", "json")
def stats(options: Options) -> int:
    """Count, weigh and measure it."""
    with _bank(options.memory, "r") as bank:
        cli.print_report(asdict(bank.statistics()), options.format, tree_text)
    return 0


@memory_command.command("compact")
@MEMORY
def compact(options: Options) -> int:
    """Merge what was added into new segments."""
    with _bank(options.memory, "rw") as bank:
        merged = bank.compact()
    say(f"{options.memory}: " + ("compacted" if merged else "there was nothing to merge"))
    return 0


@memory_command.command("verify")
@MEMORY
def verify(options: Options) -> int:
    """Read every byte and tell what is wrong."""
    from meiqa.memory import verify_memory

    findings = verify_memory(options.memory)
    for finding in findings:
        say(one_line(f"{finding.file}: {finding.problem}"))
    say(f"{options.memory}: {len(findings)} findings")
    return cli.EXIT_FAILURES if findings else 0


@memory_command.command("evict")
@MEMORY
@cli.option("--keep N", "how many stay", cli.COUNT, required=True)
def evict(options: Options) -> int:
    """Remove the contrast cases that are worth least."""
    with _bank(options.memory, "rw") as bank:
        evicted = bank.evict(options.keep)
    say(f"{options.memory}: {evicted} contrast cases evicted")
    return 0


@memory_command.command("export")
@MEMORY
@cli.option("--out FILE", "- for standard output", cli.path, required=True)
@cli.option("--format", type=("jsonl", "parquet"), default="jsonl")
@cli.flag("--force", "replace what is there, whatever it is")
def export(options: Options) -> int:
    """Write records, keys and thumbnails to a file."""
    with (
        cli.optional_packages("parquet"),
        _bank(options.memory, "r") as bank,
        open_output(options.out, EXPORT, force=options.force) as file,
    ):
        written = bank.export(file.name, options.format)
    say(f"{options.out}: {written} cases")
    return 0


@memory_command.command("rekey")
@MEMORY
@cli.option("--key", "find neighbours by this; see build", KEYS, required=True)
@cli.option("--out NEW", "must not exist", cli.path, required=True)
def rekey(options: Options) -> int:
    """Write it again with keys of another kind, without the photographs."""
    with _bank(options.memory, "r") as bank:
        written = bank.rekey(options.key, options.out)
    say(f"{options.out}: {written} cases with keys of kind {options.key}")
    return 0


@memory_command.command("thin")
@MEMORY
@cli.option("--keep N", "how many anchors stay", cli.POSITIVE, default=256)
@cli.option("--out NEW", "must not exist", cli.path, required=True)
def thin(options: Options) -> int:
    """Write it again for a small device: fewer anchors, which nothing is compared with."""
    with _bank(options.memory, "r") as bank:
        kept = bank.thin(options.out, options.keep)
    say(f"{options.out}: {kept} anchors without tokens, and what was learned of all")
    return 0


@memory_command.command("sync")
@MEMORY
@cli.option("--hub URL", "postgresql://USER@HOST/DATABASE", required=True)
@cli.HUB_DEVICE
@cli.flag("--anew", "from the beginning: the hub was set back, or is another one than before")
def sync(options: Options) -> int:
    """Tell a hub what was learned here, and learn what others did."""
    return sync_once(options, anew=options.anew)


def sync_once(options: Options, *, anew: bool = False) -> int:
    """Sync --memory with --hub, and say what came of it; give the exit code."""
    with cli.optional_packages("hub"):
        from meiqa.memory.replica import Replica
    with _bank(options.memory, "rw") as bank:
        done = Replica(bank, options.hub, cli.hub_device(options)).sync(anew=anew)
    for complaint in done.complaints:
        say(one_line(complaint))
    say(f"{options.memory}: {done}")
    return cli.EXIT_FAILURES if done.complaints else 0


@hub_command.command("init")
@URL
def init(options: Options) -> int:
    """Make a hub of a database, or bring one up to date."""
    with cli.optional_packages("hub"):
        from meiqa.memory.hub import ROLES, initialise
    before, now = initialise(options.url)
    say(f"the hub has schema version {now}" + (f", it had {before}" if before else ""))
    say(f"roles: {', '.join(ROLES)}; a camera: CREATE ROLE name LOGIN IN ROLE {ROLES[1]}")
    return 0


@hub_command.command("status")
@URL
@cli.format_option("text", "json")
def status(options: Options) -> int:
    """Count what it holds, by package, origin and device."""
    with cli.optional_packages("hub"):
        from meiqa.memory.hub import connected
    with connected(options.url) as hub:
        cli.print_report(hub.status(), options.format, tree_text)
    return 0


@hub_command.command("export")
@URL
@cli.option("--out FILE", "- for standard output", cli.path, required=True)
@cli.option("--format", type=("jsonl", "parquet"), default="jsonl")
@cli.flag("--force", "replace what is there, whatever it is")
def export_hub(options: Options) -> int:
    """Write the records and keys of all its cases to a file."""
    with cli.optional_packages("hub"):
        from meiqa.memory.hub import Refused, connected
    from meiqa.memory.maintenance import exported, write_rows

    refused: list[Refused] = []

    def rows() -> Iterator[dict[str, Any]]:
        for entry, key_kind in hub.everything():
            if isinstance(entry, Refused):
                refused.append(entry)
            else:
                yield exported(entry, 0, key_kind)

    with (
        cli.optional_packages("parquet"),
        connected(options.url) as hub,
        open_output(options.out, EXPORT, force=options.force) as file,
    ):
        written = write_rows(Path(file.name), rows(), options.format)
    for each in refused:
        say(one_line(f"refused: {each.name}: {each.reason}"))
    say(f"{options.out}: {written} cases")
    return cli.EXIT_FAILURES if refused else 0


@contextmanager
def _describer(options: Options, memory: str | None = None) -> Iterator[Model]:
    """The model that describes anchors; for a remote one of a `memory` there, as that says."""
    if options.remote is None:
        yield _local_model(options)
        return
    from meiqa.engine.remote import RemoteModel

    if not options.keep_pictures:
        raise UsageError(
            "a remote model compares pictures, so its memory keeps them, scaled down",
            hint="agree to that by --keep-pictures",
        )
    settings = _remote_settings(options, memory)
    model = RemoteModel.connect(options.remote, memory or options.out, settings=settings)
    try:
        yield model
    finally:
        model.close()


def _needed(model: Model, photos: int) -> str:
    """Say what the anchors of so many photographs will take, of the largest size."""
    key, token = model.widths
    tokens = model.image.max_pixels // model.image.cell_pixels**2
    stored = photos * (tokens * (token + 4) + 2 * key)  # as of `quantise_tokens`, `encode_key`
    size = f"about {stored / 1e6:.3g} MB on the disk, twice that while it is built"
    return f"{photos} photographs: {size}"


def _local_model(options: Options) -> Model:
    """The model of a package; on Ray there is one for each core, with a thread."""
    from meiqa.engine.local import LocalModel
    from meiqa.engine.package import EnginePackage

    package = EnginePackage.open(options.package or embedded_assets() / "package")
    return LocalModel.open(package, options.device, vars(options).get("threads"))


def _remote_settings(options: Options, memory: str | None) -> RemoteSettings:
    """How a remote model is asked: as a memory says that is there, or as the options say."""
    from meiqa.engine.prompts import prompt_family
    from meiqa.engine.remote import RemoteSettings

    if memory is not None:
        settings = RemoteSettings.of_memory(memory)
        if options.model not in (None, settings.model):
            raise UsageError(
                f"the memory {memory} was made with another model",
                seen=options.model,
                allowed=settings.model,
            )
        return settings
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
    return RemoteSettings(options.model or "", **chosen)


@contextmanager
def _bank(path: str, mode: Literal["r", "rw"]) -> Iterator[MemoryBank]:
    """A memory for the package that it was built with; the embedded anchors if it has none."""
    from meiqa.memory import MemoryBank, holds_anchors, package_digest_of

    anchors = Path(path) if holds_anchors(path) else embedded_assets() / "memory"
    if not Path(path).is_dir():
        raise StoreNotFound(
            "there is no memory",
            seen=path,
            hint="meiqa memory create makes one",
        )
    digest = package_digest_of(anchors)
    with MemoryBank(anchors, path, mode, package_digest=digest) as bank:
        yield bank
