"""Write docs/cli.md: the help of every command, as the program prints it.

python scripts/cli_docs.py            # write it
python scripts/cli_docs.py --check    # exit with 1 if it is not what would be written
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click

from meiqa.cli import root

PAGE = Path(__file__).parents[1] / "docs" / "cli.md"
HEAD = """# The command line

What `--help` prints. This page is written by `python scripts/cli_docs.py`.
"""
WIDTH = 100


def page() -> str:
    """Give the text of the page."""
    return "\n".join([HEAD, *sections(root, None, "meiqa")])


def sections(command: click.Command, parent: click.Context | None, name: str) -> Iterator[str]:
    """Give the help of a command and of those below it."""
    settings = {**command.context_settings, "terminal_width": WIDTH, "max_content_width": WIDTH}
    context = click.Context(command, parent, name, **settings)
    yield f"## `{context.command_path}`\n\n```\n{command.get_help(context)}\n```\n"
    if isinstance(command, click.Group):
        for each in command.list_commands(context):
            below = command.get_command(context, each)
            assert below is not None
            yield from sections(below, context, each)


def main() -> int:
    """Write the page, or compare it."""
    if "--check" in sys.argv[1:]:
        return int(PAGE.read_text(encoding="utf-8") != page())
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
