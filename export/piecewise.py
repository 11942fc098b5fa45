"""Run a graph of any size in bounded memory: piece by piece, each with its own weights only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, ValueInfoProto, helper

from meiqa.engine.runtime.base import Array
from meiqa.engine.runtime.onnx import UNWANTED_OPTIMIZERS

PIECE_BYTES = 1 << 30
Values = dict[str, NDArray[np.generic]]


@dataclass(frozen=True)
class Piece:
    """Consecutive nodes, the values they take, and those that later nodes or the caller want."""

    nodes: Sequence[NodeProto]
    takes: Sequence[str]
    gives: Sequence[str]


class PiecewiseSession:
    """A graph file behind `GraphSession`; weights that exceed the bound are read in each call.

    Args:
        path: an ONNX file, with its weights inside or beside it.
        piece_bytes: bound of the weights held at a time; one tensor may exceed it.
    """

    def __init__(self, path: Path, piece_bytes: int = PIECE_BYTES) -> None:
        self._path = path
        self._model = onnx.load(path, load_external_data=False)
        graph = self._model.graph
        self._weights = {weight.name: weight for weight in graph.initializer}
        self._outputs = [output.name for output in graph.output]
        self._pieces = list(self._cut(piece_bytes))
        self._whole: onnxruntime.InferenceSession | None = None

    @property
    def whole(self) -> bool:
        """Whether all weights are held at once, so that a call does not read them anew."""
        return len(self._pieces) == 1

    def _cut(self, piece_bytes: int) -> Iterator[Piece]:
        """Cut the graph where the weights of a piece would exceed the bound."""
        nodes = self._model.graph.node
        groups: list[list[NodeProto]] = [[]]
        held: set[str] = set()
        for node in nodes:
            needed = {name for name in node.input if name in self._weights}
            if held and sum(bytes_of(self._weights[n]) for n in held | needed) > piece_bytes:
                groups.append([])
                held = set()
            groups[-1].append(node)
            held |= needed
        wanted_after = set(self._outputs)
        for group in reversed(groups):
            made = {name for node in group for name in node.output}
            taken = {name for node in group for name in node.input if name} - made
            group_takes = sorted(taken - self._weights.keys())
            yield Piece(group, group_takes, sorted(made & wanted_after))
            wanted_after |= set(group_takes)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, NDArray[np.float32]]:
        """Execute the graph; see `GraphSession`."""
        if self.whole:
            self._whole = self._whole or session_of(self._path)
            made = self._whole.run(self._outputs, dict(inputs))
            return dict(zip(self._outputs, made, strict=True))
        values: Values = dict(inputs)
        for piece in reversed(self._pieces):
            values |= self._run_piece(piece, values)
        return {name: values[name].astype(np.float32, copy=False) for name in self._outputs}

    def _run_piece(self, piece: Piece, values: Values) -> Values:
        file = self._path.with_name(f".{self._path.name}.piece")
        feeds = {name: values[name] for name in piece.takes}
        file.write_bytes(self._as_model(piece, feeds).SerializeToString())
        try:
            made = session_of(file).run(list(piece.gives), feeds)
        finally:
            file.unlink()
        return dict(zip(piece.gives, made, strict=True))

    def _as_model(self, piece: Piece, feeds: Values) -> onnx.ModelProto:
        """The piece as a graph of its own, whose weights stay in the files where they are."""
        used = {name for node in piece.nodes for name in node.input}
        graph = helper.make_graph(
            piece.nodes,
            "piece",
            [
                helper.make_tensor_value_info(
                    name, helper.np_dtype_to_tensor_dtype(value.dtype), [None] * value.ndim
                )
                for name, value in feeds.items()
            ],
            [ValueInfoProto(name=name) for name in piece.gives],
            [weight for name, weight in self._weights.items() if name in used],
        )
        return helper.make_model(
            graph, opset_imports=self._model.opset_import, ir_version=self._model.ir_version
        )


def session_of(path: Path) -> onnxruntime.InferenceSession:
    """A graph in ONNX Runtime on the CPU, its weights not packed a second time."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.enable_cpu_mem_arena = False
    options.add_session_config_entry("session.disable_prepacking", "1")
    return onnxruntime.InferenceSession(
        path,
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=UNWANTED_OPTIMIZERS,
    )


def bytes_of(weight: TensorProto) -> int:
    """Size of a tensor, as it is once single precision was made of half."""
    width = max(4, helper.tensor_dtype_to_np_dtype(weight.data_type).itemsize)
    return int(np.prod(weight.dims)) * width
