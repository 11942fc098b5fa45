"""Engines that read one prefix and many continuations of it, each by its own means.

All are given the same tokens and asked for the same logits. Each shares the prefix as well as it
can: transformers repeats its cache, llama.cpp copies the sequence, which moves no memory, and
OpenVINO runs this project's graph, which reads one prefix for all rows of a call.
"""

from __future__ import annotations

import copy
import ctypes
import importlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from benchmarks.compare import Transformers
from meiqa.engine.package import EnginePackage
from meiqa.engine.runtime import open_graphs
from meiqa.engine.runtime.decoder import (
    ROWS_PER_CALL,
    Array,
    Decoder,
    GraphDecoder,
    NativeDecoder,
    Past,
    Row,
    packed,
    parts_of,
    stored_layers,
)
from meiqa.errors import MeiqaError

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]
TOKENS_PER_CALL = 512
"""What llama.cpp computes at once by default."""
Q8_0 = 7
"""llama.cpp's number for files with bytes in blocks of 32."""


@dataclass(frozen=True, eq=False)
class Work:
    """Tokens that every engine reads.

    Attributes:
        prefix: (P,) token numbers that all continue.
        continuations: (N, S) token numbers.
        threads: that an engine may use.
    """

    prefix: Ids
    continuations: Ids
    threads: int

    def prefix_row(self, table: NDArray[np.generic]) -> Row:
        """Give the prefix as a decoder's row, of a table of embeddings (V, D)."""
        return row_of(table, self.prefix, 0)

    def rows(self, table: NDArray[np.generic]) -> list[Row]:
        """Give the continuations as rows behind the prefix."""
        return [row_of(table, each, len(self.prefix)) for each in self.continuations]

    def token_rows(self, table: NDArray[np.generic]) -> list[Row]:
        """Give the first continuation as rows of one token each."""
        behind = enumerate(self.continuations[0], len(self.prefix))
        return [row_of(table, np.array([token]), position) for position, token in behind]


def row_of(table: NDArray[np.generic], ids: Ids, start: int) -> Row:
    """Give text that begins at a position as a decoder's row."""
    positions = np.arange(start, start + len(ids), dtype=np.float32)
    return Row(table[ids].astype(np.float32), np.tile(positions, (3, 1)))


class PeerEngine(Protocol):
    """What is measured: an engine that was opened for some work."""

    def score(self) -> Floats:
        """Read the prefix and all continuations; logits (N, V) behind each of these."""
        ...

    def writer(self) -> Callable[[], Floats]:
        """Read the prefix, and give a call that reads the first continuation token by token.

        The call asks for logits behind each token, and gives the last ones, (V,).
        """
        ...


class WithPrefixCache:
    """transformers in fp32, its cache of the prefix repeated for the rows that continue it."""

    def __init__(self, checkpoint: Path, work: Work) -> None:
        self._work, self._text = work, Transformers(checkpoint, work.threads)
        self._table = self._text.model.embed_tokens.weight.detach().numpy()

    def score(self) -> Floats:
        """Read the prefix once; see `PeerEngine`."""
        prefix, rows = self._read_prefix(), self._work.rows(self._table)
        found = []
        for part in parts_of(len(rows), ROWS_PER_CALL):
            repeated = copy.deepcopy(prefix)
            repeated.batch_repeat_interleave(len(rows[part]))
            found.append(self._text.logits(rows[part], repeated))
        return np.concatenate(found)

    def writer(self) -> Callable[[], Floats]:
        """Append to the cache, and crop it; see `PeerEngine`."""
        cache, rows = self._read_prefix(), self._work.token_rows(self._table)

        def write() -> Floats:
            for row in rows:
                logits = self._text.logits([row], cache)
            cache.crop(-len(rows))
            last: Floats = logits[0]
            return last

        return write

    def _read_prefix(self) -> Any:
        return self._text.read([self._work.prefix_row(self._table)])


class FromScratch(WithPrefixCache):
    """transformers in fp32, every continuation read from the prefix's first token on."""

    def score(self) -> Floats:
        """Read the prefix again for each; see `PeerEngine`."""
        prefix, continuations = self._work.prefix, self._work.continuations
        rows = [row_of(self._table, np.append(prefix, each), 0) for each in continuations]
        calls = parts_of(len(rows), ROWS_PER_CALL)
        return np.concatenate([self._text.logits(rows[part]) for part in calls])


@cache
def llama_cpp() -> Any:
    """Import llama.cpp's library, and let it say nothing but by what it returns."""
    api = importlib.import_module("llama_cpp")
    api.llama_log_set(silence(), ctypes.c_void_p(0))
    return api


@cache
def silence() -> Any:
    """Give a function that tells nobody; cached, since the library goes on calling it."""
    return importlib.import_module("llama_cpp").llama_log_callback(lambda *_: None)


class LlamaCpp:
    """llama.cpp with the weights of a GGUF file; sequences share the cells of the prefix."""

    def __init__(self, gguf: Path, work: Work) -> None:
        self._api, self._work = llama_cpp(), work
        self._model = self._api.llama_model_load_from_file(
            str(gguf).encode(), self._api.llama_model_default_params()
        )
        if not self._model:
            raise MeiqaError("llama.cpp can't load the model", seen=gguf)
        self._vocabulary = self._api.llama_vocab_n_tokens(
            self._api.llama_model_get_vocab(self._model)
        )
        self._rows = max(1, TOKENS_PER_CALL // work.continuations.shape[1])
        self._context = self._opened()
        self._memory = self._api.llama_get_memory(self._context)

    @classmethod
    def in_q8_0(cls, gguf: Path, work: Work) -> LlamaCpp:
        """Store the weights anew, in 8 bits, as llama.cpp's own quantiser does it."""
        api = llama_cpp()
        settings = api.llama_model_quantize_default_params()
        settings.ftype, settings.allow_requantize = Q8_0, True
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder) / "q8_0.gguf"
            ends = str(gguf).encode(), str(made).encode()
            if api.llama_model_quantize(*ends, ctypes.byref(settings)):
                raise MeiqaError("llama.cpp can't quantise the model", seen=gguf)
            return cls(made, work)  # mapped, the weights outlive the name of their file

    def score(self) -> Floats:
        """Read the prefix once, and continuations in calls of the default size."""
        self._read_prefix()
        found = []
        for part in parts_of(len(self._work.continuations), self._rows):
            ids = self._work.continuations[part]
            sequences = range(1, len(ids) + 1)
            for sequence in sequences:
                self._api.llama_memory_seq_cp(self._memory, 0, sequence, -1, -1)
            found.append(self._decoded(ids, len(self._work.prefix), sequences))
            for sequence in sequences:
                self._api.llama_memory_seq_rm(self._memory, sequence, -1, -1)
        return np.concatenate(found)

    def writer(self) -> Callable[[], Floats]:
        """Append to the prefix's own sequence, and cut it off; see `PeerEngine`."""
        self._read_prefix()
        behind = len(self._work.prefix)

        def write() -> Floats:
            tokens = enumerate(self._work.continuations[0], behind)
            for at, token in tokens:
                logits = self._decoded(np.array([[token]]), at, [0])
            self._api.llama_memory_seq_rm(self._memory, 0, behind, -1)
            last: Floats = logits[0]
            return last

        return write

    def _opened(self) -> Any:
        """Open a context with room for the prefix and the continuations of one call."""
        settings = self._api.llama_context_default_params()
        in_call = self._rows * self._work.continuations.shape[1]
        settings.n_ctx = len(self._work.prefix) + in_call
        settings.n_batch = settings.n_ubatch = max(TOKENS_PER_CALL, in_call)
        settings.n_seq_max, settings.kv_unified = self._rows + 1, True
        settings.n_threads = settings.n_threads_batch = self._work.threads
        context = self._api.llama_init_from_model(self._model, settings)
        if not context:
            raise MeiqaError("llama.cpp can't make a context", seen=settings.n_ctx)
        return context

    def _read_prefix(self) -> None:
        self._api.llama_memory_clear(self._memory, True)
        for part in parts_of(len(self._work.prefix), TOKENS_PER_CALL):
            self._decoded(self._work.prefix[None, part], part.start, [0])

    def _decoded(self, ids: Ids, start: int, sequences: Sequence[int]) -> Floats:
        """Read tokens (R, S) of so many sequences; logits (R, V) behind each."""
        batch = self._api.llama_batch_init(ids.size, 0, 1)
        count, steps = ids.shape
        for index, token in enumerate(ids.ravel()):
            row, step = divmod(index, steps)
            batch.token[index], batch.pos[index] = int(token), start + step
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, sequences[row]
            batch.logits[index] = step == steps - 1
        batch.n_tokens = ids.size
        failed = self._api.llama_decode(self._context, batch)
        self._api.llama_batch_free(batch)
        if failed:
            raise MeiqaError("llama.cpp can't read the tokens", seen=failed)
        logits = self._api.llama_get_logits(self._context)
        return np.ctypeslib.as_array(logits, (count, self._vocabulary)).copy()


class OnDecoder:
    """A package of this project's, by one of its decoders."""

    def __init__(self, package: EnginePackage, decoder: Decoder, work: Work) -> None:
        self._work, self._table, self._decoder = work, package.embedding, decoder

    @classmethod
    def natively(cls, folder: Path, kernel: str, work: Work) -> OnDecoder:
        """Run the layers in a native kernel."""
        package = EnginePackage.open(folder)
        stored = stored_layers(package)
        if stored is None:
            raise MeiqaError("the package has no layers for the kernel", seen=folder.name)
        return cls(package, NativeDecoder(*packed(*stored, kernel), work.threads), work)

    @classmethod
    def by_graph(cls, folder: Path, work: Work) -> OnDecoder:
        """Run the graph in ONNX Runtime."""
        package = EnginePackage.open(folder)
        (session,) = open_graphs(package, ["decoder"], "cpu", work.threads)
        return cls(package, GraphDecoder(session, package.manifest.decoder), work)

    @classmethod
    def by_openvino(cls, folder: Path, precision: str, work: Work) -> OnDecoder:
        """Run the graph in OpenVINO, computing in "f32" or "bf16"."""
        package = EnginePackage.open(folder)
        graph = folder / package.manifest.graphs["decoder"].file
        session = OpenVinoSession(graph, precision, work.threads)
        return cls(package, GraphDecoder(session, package.manifest.decoder), work)

    def score(self) -> Floats:
        """Read the prefix once, and continuations in the decoder's own calls."""
        prefixes = self._decoder.prefill([self._work.prefix_row(self._table)])
        return self._decoder.last_logits(self._work.rows(self._table), prefixes)

    def writer(self) -> Callable[[], Floats]:
        """Read tokens behind a growing past; see `PeerEngine`."""
        (prefix,) = self._decoder.prefill([self._work.prefix_row(self._table)])
        rows = self._work.token_rows(self._table)

        def write() -> Floats:
            past = Past(prefix, len(rows))
            for row in rows:
                step = self._decoder.step(prefix, past.key_values, row)
                past.read(step, fed=1, tried=0)
            last: Floats = step.logits[-1]
            return last

        return write


class OpenVinoSession:
    """A graph in OpenVINO on the CPU."""

    def __init__(self, graph: Path, precision: str, threads: int) -> None:
        openvino = importlib.import_module("openvino")
        settings = {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
        }
        model = openvino.Core().compile_model(graph, "CPU", settings)
        self._request = model.create_infer_request()

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Floats]:
        """Execute the graph; see `GraphSession`."""
        found = self._request.infer(dict(inputs), share_inputs=True)
        return {port.any_name: values for port, values in found.items()}
