"""Run graphs of any size in bounded memory, and compare them on shapes not seen before."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, ValueInfoProto, helper

from meiqa.engine.estimates import expected_grade
from meiqa.engine.manifest import DecoderShape, ImageProcessing
from meiqa.engine.model import Model
from meiqa.engine.runtime.decoder import Array, GraphSession
from meiqa.engine.runtime.onnx import UNWANTED_OPTIMIZERS
from meiqa.errors import PackageCorrupted
from meiqa.kernels.cores import usable_memory

PIECE_BYTES = 1 << 30
"""Of weights that are held at a time, at least."""
MEMORY_SHARE = 1 / 6
"""Of the memory that is free: three graphs may be held, each with a copy that is being made."""
GRIDS = ((1, 1), (1, 7), (9, 2), (4, 4), (5, 6))
DECODER_SHAPES: tuple[tuple[int, ...], ...] = (
    # prefixes, rows, steps, prefix steps, past steps, wanted logits
    (1, 1, 9, 0, 0, 1),
    (1, 7, 5, 13, 0, 1),
    (3, 1, 4, 6, 0, 4),
    (2, 3, 1, 5, 8, 1),
    (1, 1, 1, 17, 3, 1),
    (2, 2, 6, 0, 4, 2),
)
Feeds = Mapping[str, Array]
Values = dict[str, NDArray[np.generic]]


class Piece(NamedTuple):
    """Consecutive nodes, the values they take, and those that later nodes or the caller want."""

    nodes: Sequence[NodeProto]
    takes: Sequence[str]
    gives: Sequence[str]


class PiecewiseSession:
    """A graph file behind `GraphSession`, run piece by piece, each with its own weights only.

    Weights that exceed `piece_bytes`, the bound of those held at a time, are read in each call. By
    default that is what the machine has memory for.
    """

    def __init__(self, path: Path, piece_bytes: int | None = None) -> None:
        self._path = path
        self._model = onnx.load(path, load_external_data=False)
        graph = self._model.graph
        self._weights = {weight.name: weight for weight in graph.initializer}
        self._outputs = [output.name for output in graph.output]
        self._sizes = {name: single_bytes(weight) for name, weight in self._weights.items()}
        self._pieces = self._cut(held_bytes() if piece_bytes is None else piece_bytes)
        self._whole: onnxruntime.InferenceSession | None = None

    @property
    def whole(self) -> bool:
        """Whether all weights are held at once, so that a call does not read them anew."""
        return len(self._pieces) == 1

    @property
    def writes_quickly(self) -> bool:
        """Whether it is small enough to write hundreds of texts with."""
        return sum(self._sizes.values()) <= PIECE_BYTES

    def _cut(self, piece_bytes: int) -> list[Piece]:
        """Cut the graph where the weights of a piece would exceed the bound."""
        groups: list[list[NodeProto]] = [[]]
        held: set[str] = set()
        for node in self._model.graph.node:
            needed = {name for name in node.input if name in self._weights}
            if held and sum(self._sizes[name] for name in held | needed) > piece_bytes:
                groups.append([])
                held = set()
            groups[-1].append(node)
            held |= needed
        made = [{name for node in group for name in node.output} for group in groups]
        used = [{name for node in group for name in node.input if name} for group in groups]
        return [
            Piece(
                group,
                sorted(used[index] - made[index] - self._weights.keys()),
                sorted(made[index].intersection({*self._outputs}.union(*used[index + 1 :]))),
            )
            for index, group in enumerate(groups)
        ]

    def run(self, inputs: Feeds) -> dict[str, NDArray[np.float32]]:
        """Execute the graph; see `GraphSession`."""
        if self.whole:
            self._whole = self._whole or session_of(self._path)
            made = self._whole.run(self._outputs, dict(inputs))
            return dict(zip(self._outputs, made, strict=True))
        values: Values = dict(inputs)
        for piece in self._pieces:
            values |= self._run_piece(piece, {name: values[name] for name in piece.takes})
        return {name: values[name].astype(np.float32, copy=False) for name in self._outputs}

    def _run_piece(self, piece: Piece, feeds: Values) -> Values:
        """Run a piece as a graph of its own, whose weights stay in the files where they are."""
        inputs = [
            helper.make_tensor_value_info(
                name, helper.np_dtype_to_tensor_dtype(value.dtype), [None] * value.ndim
            )
            for name, value in feeds.items()
        ]
        outputs = [ValueInfoProto(name=name) for name in piece.gives]
        used = {name for node in piece.nodes for name in node.input}
        weights = [weight for name, weight in self._weights.items() if name in used]
        graph = helper.make_graph(piece.nodes, "piece", inputs, outputs, weights)
        model = helper.make_model(
            graph, opset_imports=self._model.opset_import, ir_version=self._model.ir_version
        )
        file = self._path.with_name(f".{self._path.name}.piece")
        file.write_bytes(model.SerializeToString())
        try:
            made = session_of(file).run(list(piece.gives), feeds)
        finally:
            file.unlink()
        return dict(zip(piece.gives, made, strict=True))


@contextmanager
def giving(path: Path, values: Iterable[str]) -> Iterator[PiecewiseSession]:
    """Open a graph file so that values within it are given besides its outputs."""
    model = onnx.load(path, load_external_data=False)
    present = {output.name for output in model.graph.output}
    missing = [name for name in values if name not in present]
    model.graph.output.extend(ValueInfoProto(name=name) for name in missing)
    twin = path.with_name(f".{path.name}.giving")  # beside it, so that it finds its weights
    try:
        twin.write_bytes(model.SerializeToString())
        yield PiecewiseSession(twin)
    finally:
        twin.unlink(missing_ok=True)


def single_bytes(weight: TensorProto) -> int:
    """Bytes of a weight once single precision was made of half."""
    width = max(4, helper.tensor_dtype_to_np_dtype(weight.data_type).itemsize)
    return int(np.prod(weight.dims)) * width


def held_bytes() -> int:
    """Bytes of weights that may be held at a time, by the memory that the system says is free."""
    told = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s+(\d+) kB", told.read_text()) if told.is_file() else None
    free = min(usable_memory(), 1024 * int(found[1])) if found else 0
    return max(PIECE_BYTES, int(MEMORY_SHARE * free))


def session_of(path: Path) -> onnxruntime.InferenceSession:
    """Open a graph in ONNX Runtime on the CPU, its weights not packed a second time."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.enable_cpu_mem_arena = False
    options.add_session_config_entry("session.disable_prepacking", "1")
    providers = ["CPUExecutionProvider"]
    return onnxruntime.InferenceSession(
        path, options, providers=providers, disabled_optimizers=UNWANTED_OPTIMIZERS
    )


def vision_feeds(image: ImageProcessing) -> Iterator[Feeds]:
    """Draw random pictures on several grids, or of several numbers of tiles."""
    rng = np.random.default_rng(0)
    width = image.merge_size**2 * 3 * image.patch_size**2
    for rows, columns in GRIDS:
        if image.tile_pixels:
            tiles, along = 1 + min(rows, columns), image.tile_pixels // image.cell_pixels
            cells = rng.standard_normal((tiles, along**2, width), np.float32)
            yield {"cells": cells, "order": rng.permutation(tiles * along**2 + 1)}
        else:
            yield {"cells": rng.standard_normal((rows, columns, width), np.float32)}


def decoder_feeds(shape: DecoderShape) -> Iterator[Feeds]:
    """Draw random inputs of several shapes, empty prefix and empty past among them."""
    rng = np.random.default_rng(0)
    for sizes in DECODER_SHAPES:
        yield random_feeds(shape, sizes, rng)


def random_feeds(shape: DecoderShape, sizes: Sequence[int], rng: np.random.Generator) -> Feeds:
    """Draw inputs of (prefixes, rows, steps, prefix steps, past steps, wanted logits)."""
    p, r, s, lp, lt, n = sizes
    layers, heads, width = shape.layers, shape.kv_heads, shape.head_dim

    def normal(*extents: int) -> NDArray[np.float32]:
        return rng.standard_normal(extents, np.float32)

    feeds: dict[str, Array] = {
        "embeds": 0.5 * normal(p, r, s, shape.embed_width),
        "positions": rng.integers(0, 64, (3, p, r, s)).astype(np.float32),
        "prefix": normal(layers, 2, p, heads, lp, width),
        "prefix_lengths": rng.integers(0, lp + 1, p),
        "past": normal(layers, 2, p, heads, r, lt, width),
        "past_lengths": rng.integers(0, lt + 1, (p, r)),
        "logit_positions": rng.integers(0, s, (p, r, n)),
    }
    if shape.state_layers:
        feeds["states"] = normal(shape.state_layers, p, r, shape.state_width)
        feeds["kept_lengths"] = rng.integers(0, s + 1, (p, r))
    return feeds


def require_parity(
    name: str,
    wanted: GraphSession,
    made: GraphSession,
    feeds: Iterator[Feeds],
    *,
    absolute: float,
    relative: float = 0.0,
) -> dict[str, dict[str, float]]:
    """Refuse a graph where a token differs by more than `absolute` and than `relative` times it.

    Gives the `difference` and the size, `of`, of the worst token of each output, that is of the
    vector along its last axis. Sizes are root mean squares: a few huge values, as every trained
    decoder has in its first token, neither excuse nor blame the others. Of logits, where any one
    may decide, the difference is the largest.

    Raises:
        PackageCorrupted: it differs by more.
    """
    found = largest_differences(wanted, made, feeds, absolute, relative)
    for output, (difference, size) in found.items():
        allowed = max(absolute, relative * size)
        if not difference <= allowed:
            raise PackageCorrupted(
                f"the exported {name} graph differs from PyTorch in {output}",
                seen=f"{difference:.1e}, of {size:.1e}",
                allowed=f"{allowed:.0e}",
                hint="please report it with the checkpoint's config.json",
            )
    return {output: {"difference": d, "of": size} for output, (d, size) in found.items()}


def largest_differences(
    wanted: GraphSession,
    made: GraphSession,
    feeds: Iterator[Feeds],
    absolute: float,
    relative: float,
) -> dict[str, tuple[float, float]]:
    """Give the difference and the size of the token of each output that `require_parity` would
    refuse first; NaN is worse than anything."""
    found: dict[str, tuple[float, float]] = {}
    worst: dict[str, float] = {}
    for feed in feeds:
        exact, other = wanted.run(feed), made.run(feed)
        for name, values in exact.items():
            apart = np.abs(values - other[name], dtype=np.float64)
            differences = apart.max(-1) if name == "logits" else root_mean_square(apart)
            sizes = root_mean_square(values)
            excess = np.ravel(differences / np.maximum(absolute, relative * sizes))
            token = int(excess.argmax())  # the first NaN, if there is one
            if not excess[token] <= worst.get(name, -1.0):
                worst[name] = float(excess[token])
                found[name] = float(differences.flat[token]), float(sizes.flat[token])
    return found


def root_mean_square(values: NDArray[Any]) -> NDArray[np.float64]:
    """Sizes (...) of vectors (..., D)."""
    squares: NDArray[np.float64] = np.square(values, dtype=np.float64).mean(-1)
    return np.sqrt(squares)


def grades_of(model: Model, pictures: Sequence[NDArray[np.uint8]]) -> NDArray[np.float64]:
    """Grade pictures (N,) on 1-5."""
    prefixes = model.prefill([model.encode(picture) for picture in pictures])
    return np.array([expected_grade(model.grade(prefix)) for prefix in prefixes])
