"""Run rows by two threads in a process that may take no more memory, then in one that may again."""

from __future__ import annotations

import resource
from functools import partial

import numpy as np

from meiqa.kernels.decoder import FASTEST, FusedShape
from tests.kernels.test_decoder import LAYERS, drawn_decoder

SHAPE = FusedShape(width=32, inner=32768, heads=1, kv_heads=1, head_width=32, epsilon=1e-6)
ROWS, STEPS, THREADS = 8, 300, 2


def main() -> None:
    """Say what comes of it."""
    decoder = drawn_decoder(FASTEST, SHAPE, "fp32")
    rng = np.random.default_rng(0)
    embeds = rng.standard_normal((ROWS, STEPS, SHAPE.width), np.float32)
    places = np.tile(np.arange(STEPS, dtype=np.float32), (3, ROWS, 1))
    none = np.zeros((LAYERS, 2, 1, 0, SHAPE.head_width), np.float32)
    steps, length = np.full(ROWS, STEPS), np.zeros(1, np.int64)
    short = embeds[:, :1], places[:, :, :1], np.ones(ROWS, np.int64)
    decoder.last_hidden(*short, [none], length, THREADS)  # starts the threads
    run = partial(decoder.last_hidden, embeds, places)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (8 << 20), limits[1]))
    for _ in range(3):
        try:
            run(steps, [none], length, THREADS)
        except MemoryError as error:
            print(type(error).__name__)  # noqa: T201
    resource.setrlimit(resource.RLIMIT_AS, limits)
    one, two = (run(steps, [none], length, threads) for threads in (1, THREADS))
    print("same" if (one == two).all() else "another")  # noqa: T201


if __name__ == "__main__":
    main()
