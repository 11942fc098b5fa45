"""How many processors work is shared among, also where the system does not say."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from meiqa.kernels.cores import cores_differ, usable_cores, usable_memory


def test_those_that_the_process_may_use() -> None:
    assert usable_cores() == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(("count", "expected"), [(6, 6), (None, 1)])
def test_all_of_them_where_the_system_does_not_say(
    monkeypatch: pytest.MonkeyPatch, count: int | None, expected: int
) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: count)
    assert usable_cores() == expected


def listed(root: Path, name: str, speeds: list[int]) -> Path:
    for number, speed in enumerate(speeds):
        file = root / f"cpu{number}" / name
        file.parent.mkdir(parents=True)
        file.write_text(f"{speed}\n")
    return root


@pytest.mark.parametrize("name", ["cpu_capacity", "cpufreq/cpuinfo_max_freq"])
@pytest.mark.parametrize(
    ("speeds", "differ"),
    [([1024, 1024, 1024], False), ([1024, 1024, 420], True), ([4900, 4800, 4900], False)],
)
def test_slow_cores_beside_fast_ones_are_told_by_the_system(
    name: str, speeds: list[int], differ: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2})
    assert cores_differ(listed(tmp_path, name, speeds)) is differ


def test_cores_that_this_process_may_not_use_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    assert not cores_differ(listed(tmp_path, "cpu_capacity", [1024, 1024, 420]))


def test_cores_are_alike_where_the_system_says_nothing(tmp_path: Path) -> None:
    assert not cores_differ(tmp_path)


@pytest.mark.parametrize("said", ["max", "9223372036854771712", "1073741824"])
def test_memory_is_bounded_by_the_control_group(
    said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    (tmp_path / "memory.max").write_text(f"{said}\n")
    limits = (tmp_path / "memory.max", tmp_path / "missing")
    monkeypatch.setattr("meiqa.kernels.cores._GROUP_LIMITS", limits)
    assert usable_memory() == (min(machine, 1 << 30) if said == "1073741824" else machine)
