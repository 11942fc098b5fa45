"""The offline commands say what is wrong in one line."""

from __future__ import annotations

import runpy
import sys
import warnings
from pathlib import Path

import pytest

from meiqa.errors import UsageError
from training.commands import run_command


def ended(capsys: pytest.CaptureFixture[str], module: str, *arguments: str | Path) -> str:
    """What a command that cannot work says on stderr."""
    with (
        pytest.MonkeyPatch.context() as patch,
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", ".*found in sys.modules.*", RuntimeWarning)
        patch.setattr(sys, "argv", [module, *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            runpy.run_module(module, run_name="__main__")
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    return said


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("data", ("--data", "--work")),
        ("pretrain", ("--work",)),
        ("finetune", ("--work", "--out")),
    ],
)
def test_training_on_nothing(
    command: str, options: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (part for option in options for part in (option, tmp_path / option.strip("-")))
    assert str(tmp_path) in ended(capsys, f"training.{command}", *arguments)


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (UsageError("two\nlines", seen=1), 2, "error: two\\nlines; got 1\n"),
        (OSError(28, "No space left", "a"), 2, "error: [Errno 28] No space left: 'a'\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (None, None, ""),
    ],
    ids=repr,
)
def test_how_a_command_ends(
    raised: BaseException | None,
    code: int | None,
    line: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def main() -> None:
        if raised is not None:
            raise raised

    with pytest.raises(SystemExit) as caught:
        run_command(main)
    assert caught.value.code == code
    assert capsys.readouterr().err == line


def test_a_mistake_of_ours_keeps_its_traceback() -> None:
    def main() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_command(main)
