"""The page of commands is what the program says of itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
import pytest

from meiqa import cli

ROOT = Path(__file__).parents[2]


def test_the_page_is_what_help_prints() -> None:
    run = [sys.executable, str(ROOT / "scripts" / "cli_docs.py"), "--check"]
    assert subprocess.run(run).returncode == 0, "python scripts/cli_docs.py writes docs/cli.md"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_is_where_the_table_says(name: str) -> None:
    command = cli.root.get_command(click.Context(cli.root), name)
    assert command is not None
    assert command.help
    assert cli.main([name, "--help"]) == 0


def test_every_command_is_in_the_table() -> None:
    modules = {path.stem for path in Path(cli.__file__).parent.glob("*.py")}
    assert modules - {"__init__", "options"} == {module for module, _ in cli.COMMANDS.values()}
