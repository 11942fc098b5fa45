"""`meiqa ask`: questions of one's own about a photo."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from meiqa.cli import options as cli
from meiqa.cli.options import Options
from meiqa.formats import write_answers

if TYPE_CHECKING:
    from meiqa.engine.images import ImageSource


def texts(given: str) -> tuple[str, ...]:
    """Read options between commas; spaces around them are dropped."""
    options = tuple(map(str.strip, given.split(",")))
    if not all(options) or len({*options}) < len(options):
        raise click.BadParameter(f"{given!r} holds an empty option, or one twice")
    return options


@cli.command()
@cli.argument("image", "IMAGE")
@cli.argument("questions", "QUESTION...", nargs=-1, required=True)
@cli.option("--options A,B,C", "how the reply may begin", texts, required=True)
@cli.option(
    "--second PHOTO",
    "shown behind IMAGE, for questions about two; may be given again",
    cli.path,
    multiple=True,
)
@cli.format_option("text", "json", "jsonl", "csv")
@cli.RAW
@cli.engine_options()
def ask_command(options: Options) -> int:
    """Ask a model about a photo: how probable is each option as the reply?

    The default model knows its own questions only; others need the package of a general model
    (docs/options.md).
    """
    image, *seconds = cli.sources(cli.as_asked([options.image, *options.second], options))
    with cli.engine_of(options) as engine:
        from meiqa.engine.asking import Question

        pairs: Sequence[ImageSource | None] = seconds or [None]
        asked = [Question(text, options.options, p) for text in options.questions for p in pairs]
        write_answers(engine.options_many(image, asked), options.format, sys.stdout)
    return 0
