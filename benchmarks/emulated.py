"""The decoder's kernels for other processors: compiled with another compiler, run by an emulator.

`tests/kernels/rows` is a program of the kernels alone. It is built here, and fed with the rows and
the decoder of a call.
"""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from meiqa.kernels.decoder import FusedWeights, Linear, Packing, as_read, turned

Floats = NDArray[np.float32]
SOURCE = Path(__file__).parents[1] / "tests" / "kernels" / "rows"
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
ARM64 = {
    "CMAKE_SYSTEM_NAME": "Linux",
    "CMAKE_SYSTEM_PROCESSOR": "aarch64",
    "CMAKE_CXX_COMPILER": COMPILER,
    "CMAKE_EXE_LINKER_FLAGS": "-static",
}


def built(folder: Path, settings: Mapping[str, str]) -> Path:
    """Build the program in a folder with these settings of CMake's; gives its path."""
    given = [f"-D{name}={value}" for name, value in settings.items()]
    for words in (["-S", str(SOURCE), "-B", str(folder), *given], ["--build", str(folder), "-j2"]):
        subprocess.run(["cmake", *words], check=True, capture_output=True)
    return folder / "rows"


@dataclass(frozen=True)
class Program:
    """The program, and what it is run by.

    Attributes:
        path: of the program; emulator: words before it.
    """

    path: Path
    emulator: Sequence[str] = ()

    def kernels(self) -> dict[str, Packing]:
        """Ask which kernels run on the processor, the fastest first."""
        listed = (line.split() for line in self._run().decode().splitlines())
        return {
            name: Packing(int(together), int(lowest), halves == "1", int(side_by_side))
            for name, together, lowest, halves, side_by_side in listed
        }

    def last_hidden(
        self,
        kernel: str,
        packing: Packing,
        decoder: FusedWeights,
        rows: Rows,
        times: int = 1,
    ) -> Floats:
        """Give what `FusedDecoder.last_hidden` gives on another processor, (R, D)."""
        none = Linear(np.zeros((decoder.shape.width, 0), np.float32), np.zeros(0, np.float32))
        return self._called((kernel, str(times)), packing, (decoder, none), rows)[0]

    def logits(
        self, kernel: str, packing: Packing, decoder: FusedWeights, head: Linear, rows: Rows
    ) -> Floats:
        """Give what `Projection.of` gives of these hidden states on another processor, (R, V)."""
        made = self._called((kernel, "1"), packing, (decoder, head), rows)[1]
        return made[:, : head.weight.shape[1]]

    def _called(
        self,
        how: tuple[str, str],
        packing: Packing,
        model: tuple[FusedWeights, Linear],
        rows: Rows,
    ) -> tuple[Floats, Floats]:
        asked = b"".join(as_bytes(array) for array in call_of(*model, packing, rows))
        made = np.frombuffer(self._run(*how, given=asked), np.float32)
        hidden, count = len(rows.embeds) * model[0].shape.width, len(rows.embeds)
        return made[:hidden].reshape(count, -1), made[hidden:].reshape(count, -1)

    def _run(self, *arguments: str, given: bytes = b"") -> bytes:
        command = [*self.emulator, str(self.path), *arguments]
        return subprocess.run(command, input=given, check=True, capture_output=True).stdout


@dataclass(frozen=True)
class Rows:
    """Rows, each with a prefix: embeds (S, D), positions (3, S) and prefix (L, 2, H, T, d) each."""

    embeds: Sequence[Floats]
    positions: Sequence[Floats]
    prefixes: Sequence[Floats]


def call_of(
    decoder: FusedWeights, head: Linear, packing: Packing, rows: Rows
) -> Iterator[NDArray[np.generic]]:
    """Give all arrays of a call, in the order in which the program asks for them."""
    s = decoder.shape
    shape = (s.width, s.inner, s.kv_heads, s.heads // s.kv_heads, s.head_width, len(decoder.layers))
    yield np.array(shape, np.int64)
    yield np.array([s.epsilon], np.float32)
    yield decoder.frequencies.argmax(axis=0).astype(np.int32)
    yield decoder.last_norm
    for norms, linears in zip(decoder.norms, decoder.layers, strict=True):
        yield from norms
        for linear in as_read(linears):
            yield from arrays_of(linear, packing)
    places = max(int(positions.max()) for positions in rows.positions) + 1
    yield from turned(decoder.frequencies, places)
    yield np.array([len(embeds) for embeds in rows.embeds], np.int64)
    for embeds, positions, prefix in zip(rows.embeds, rows.positions, rows.prefixes, strict=True):
        yield embeds
        yield from positions.astype(np.int32)
        yield np.array([prefix.shape[3]], np.int64)
        yield prefix
    yield from arrays_of(head, packing)


def arrays_of(linear: Linear, packing: Packing) -> Iterator[NDArray[np.generic]]:
    """Give the arrays of a linear layer."""
    *arrays, steps, zero = linear.packed(packing)
    yield from arrays
    yield np.array([steps, zero, arrays[0].dtype == np.float16], np.float32)


def as_bytes(array: NDArray[np.generic]) -> bytes:
    """Give an array's bytes behind their number."""
    return struct.pack("<q", array.nbytes) + array.tobytes()
