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
    assert "images/s" in text
    assert text.endswith("\r\x1b[K")


def test_speed_and_time_left_follow_from_the_latest_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A hundred that are found done at once do not make the rest look fast."""
    now, stream = 0.0, Terminal()
    monkeypatch.setattr("meiqa.progress.time.monotonic", lambda: now)
    with Progress(200, stream) as progress:
        for _ in range(100):
            progress.advance()
        for _ in range(40):
            now += 4.0
            progress.advance()
        drawn_last = stream.getvalue()
    assert drawn_last.endswith("140/200  0.25 images/s  240 s left")


@pytest.mark.parametrize(
    ("total", "stream"), [(3, io.StringIO()), (1, Terminal()), (0, Terminal())]
)
def test_nothing_is_drawn_for_a_file_or_a_single_photo(total: int, stream: io.StringIO) -> None:
    assert drawn(total, stream) == ""
