from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

def kernels() -> list[tuple[str, tuple[int, int, bool, int]]]: ...

class StoredLinear:
    def __init__(
        self,
        panels: NDArray[Any],
        blocks: NDArray[np.float32],
        bias: NDArray[np.float32],
        scale: NDArray[np.float32],
        start: NDArray[np.int32],
        steps: float,
        zero: float,
    ) -> None: ...

def multiply(
    kernel: str,
    stored: StoredLinear,
    rows: NDArray[np.float32],
    threads: int,
    out: NDArray[np.float32],
) -> None: ...

class Decoder:
    def __init__(
        self,
        kernel: str,
        width: int,
        inner: int,
        kv_heads: int,
        group: int,
        head_width: int,
        epsilon: float,
        axes: NDArray[np.int32],
        last_norm: NDArray[np.float32],
    ) -> None: ...
    def add_layer(
        self,
        attention_norm: NDArray[np.float32],
        mlp_norm: NDArray[np.float32],
        query: StoredLinear,
        key: StoredLinear,
        value: StoredLinear,
        mix: StoredLinear,
        gate_up: StoredLinear,
        down: StoredLinear,
    ) -> None: ...
    def run(
        self,
        embeds: NDArray[np.float32],
        positions: NDArray[np.int32],
        steps: NDArray[np.int64],
        prefixes: Sequence[NDArray[np.float32]],
        prefix_steps: NDArray[np.int64],
        cosines: NDArray[np.float32],
        sines: NDArray[np.float32],
        threads: int,
        out: NDArray[np.float32],
    ) -> None: ...
    def read(
        self,
        embeds: NDArray[np.float32],
        positions: NDArray[np.int32],
        steps: NDArray[np.int64],
        cosines: NDArray[np.float32],
        sines: NDArray[np.float32],
        threads: int,
        kept: Sequence[NDArray[np.float32]],
    ) -> None: ...
    def step(
        self,
        embeds: NDArray[np.float32],
        positions: NDArray[np.int32],
        steps: NDArray[np.int64],
        prefix: NDArray[np.float32],
        prefix_steps: int,
        past: NDArray[np.float32],
        past_steps: int,
        cosines: NDArray[np.float32],
        sines: NDArray[np.float32],
        threads: int,
        hidden: NDArray[np.float32],
        kept: NDArray[np.float32],
    ) -> None: ...
