from __future__ import annotations

import io

import pytest

from meiqa.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def drawn(total: int, stream: io.StringIO) -> str:
    with Progress(total, stream) as progress:
        for _ in range(total):
            progress.clear()
            progress.advance()
    return stream.getvalue()


def test_a_terminal_sees_the_count_and_is_left_clean() -> None:
    text = drawn(3, Terminal())
    assert "[----------" in text
    assert "2/3" in text
    assert "s left" in text
    assert text.endswith("\r\x1b[K")


@pytest.mark.parametrize(
    ("total", "stream"), [(3, io.StringIO()), (1, Terminal()), (0, Terminal())]
)
def test_nothing_is_drawn_for_a_file_or_a_single_photo(total: int, stream: io.StringIO) -> None:
    assert drawn(total, stream) == ""
