"""How many processors work is shared among, also where the system does not say."""

from __future__ import annotations

import os

import pytest

from meiqa.kernels.cores import usable_cores


def test_those_that_the_process_may_use() -> None:
    assert usable_cores() == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(("count", "expected"), [(6, 6), (None, 1)])
def test_all_of_them_where_the_system_does_not_say(
    monkeypatch: pytest.MonkeyPatch, count: int | None, expected: int
) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: count)
    assert usable_cores() == expected
