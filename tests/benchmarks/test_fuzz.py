"""Damaged files are made alike from a seed, and what comes of each is counted."""

from __future__ import annotations

import json

import numpy as np

from benchmarks.fuzz import bench_fuzz, damaged, fuzz_text
from benchmarks.photo_files import WAYS

FORMATS = len(WAYS) + 1  # DNG


def test_damage_is_the_same_for_a_seed() -> None:
    one, other = bytes(range(256)) * 4, bytes(1024)
    made = [damaged(one, other, np.random.default_rng([0, n])) for n in range(50)]
    assert made == [damaged(one, other, np.random.default_rng([0, n])) for n in range(50)]
    assert sum(data != one for data in made) > 40
    assert len({len(data) for data in made}) > 5


def test_every_format_is_read_and_counted() -> None:
    found = bench_fuzz(2 * FORMATS, seed=1)
    assert json.loads(json.dumps(found)) == found
    assert found["faults"] == []
    assert all(sum(counts.values()) == 2 for counts in found["outcomes"].values())
    assert len(fuzz_text(found).splitlines()) == FORMATS + 2
