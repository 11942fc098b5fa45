"""The native kernel of the last token behind the seam, beside the graph that does everything else.

A package whose decoder is small enough to stay in a processor's cache holds its layers a second
time, in `decoder.layers`: a segment (see docs/memory-format.md for the container) that
`meiqa.export.fused` wrote from the very graph beside it. Where the file is missing, as in larger
or older packages, the graph answers alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from meiqa.engine.package import EnginePackage
from meiqa.engine.runtime.base import Array, GraphSession
from meiqa.errors import PackageCorrupted
from meiqa.kernels.cores import usable_cores
from meiqa.kernels.decoder import FASTEST, LAYER_LINEARS, FusedDecoder, FusedShape, Linear
from meiqa.memory.segment import Segment

LAYERS_FILE = "decoder.layers"
Floats = NDArray[np.float32]
Stored = Mapping[str, NDArray[np.generic]]


class FusedSession:
    """A decoder's graph, and its layers in the fused kernel for the rows' last tokens.

    Args:
        graph: the graph session that runs whatever is asked of the whole graph.
        decoder: the same layers.
        head: (D, V) makes logits of hidden states.
        threads: among which rows are shared; by default those of this process.
    """

    def __init__(
        self, graph: GraphSession, decoder: FusedDecoder, head: Floats, threads: int | None
    ) -> None:
        self._graph, self._decoder, self._head = graph, decoder, head
        self._threads = threads or usable_cores()

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Floats]:
        """Execute the graph; see `GraphSession`."""
        return self._graph.run(inputs)

    def keys_and_values(
        self, embeds: Floats, positions: Floats, steps: NDArray[np.int64]
    ) -> list[Floats]:
        """Keys and values of rows without a prefix; see `RowSession`."""
        return self._decoder.keys_and_values(embeds, positions, steps, self._threads)

    def last_logits(
        self,
        embeds: Floats,
        positions: Floats,
        steps: NDArray[np.int64],
        prefixes: Sequence[Floats],
        wanted: Sequence[int],
    ) -> Floats:
        """Logits (R, len(wanted)) of each row's last token; see `RowSession`."""
        lengths = np.array([prefix.shape[3] for prefix in prefixes], np.int64)
        hidden = self._decoder.last_hidden(
            embeds, positions, steps, prefixes, lengths, self._threads
        )
        logits: Floats = hidden @ self._head[:, list(wanted)]
        return logits


def with_fused_layers(
    graph: GraphSession, package: EnginePackage, threads: int | None, kernel: str = FASTEST
) -> GraphSession:
    """The decoder's session, with the fused kernel where the package has layers for it.

    Args:
        kernel: which of those that run on this processor.

    Raises:
        PackageCorrupted: the layers are not those of the package's decoder.
    """
    if LAYERS_FILE not in package.manifest.files:
        return graph
    # The manifest's digest of the file was compared when the package was opened.
    segment = Segment.open(package.path / LAYERS_FILE, verify=False)
    try:
        decoder = decoder_of(segment.arrays, segment.attributes, kernel)
        head = np.asarray(segment.arrays["lm_head"], np.float32)
    except (KeyError, TypeError, ValueError) as error:
        raise PackageCorrupted(
            f"{segment.path} does not hold the decoder's layers",
            seen=str(error),
            hint="export the package again",
        ) from error
    shape = package.manifest.decoder
    own = decoder.shape
    found = (len(decoder.layers), own.kv_heads, own.head_width, own.width, *head.shape)
    listed = (
        *(shape.layers, shape.kv_heads, shape.head_dim, shape.hidden_size),
        *(shape.hidden_size, shape.vocab_size),
    )
    if found != listed:
        raise PackageCorrupted(
            f"{segment.path} holds another decoder than the manifest describes",
            seen=found,
            allowed=listed,
            hint="export the package again",
        )
    return FusedSession(graph, decoder, head, threads)


def decoder_of(
    arrays: Stored, attributes: Mapping[str, object], kernel: str = FASTEST
) -> FusedDecoder:
    """A decoder from what `meiqa.export.fused` stored.

    Raises:
        KeyError, TypeError, ValueError: something is missing or does not fit.
    """
    shape = FusedShape(**attributes)  # type: ignore[arg-type]
    count = sum(name.endswith(".input_layernorm") for name in arrays)
    names = [f"layers.{index}" for index in range(count)]
    return FusedDecoder(
        shape,
        floats(arrays["frequencies"]),
        floats(arrays["norm"]),
        [
            (floats(arrays[f"{name}.input_layernorm"]), floats(arrays[f"{name}.post_layernorm"]))
            for name in names
        ],
        [{n: linear_of(arrays, f"{name}.{n}") for n in LAYER_LINEARS} for name in names],
        kernel,
    )


def linear_of(arrays: Stored, name: str) -> Linear:
    """A linear layer by its name."""
    bias = floats(arrays[f"{name}.bias"])
    if f"{name}.scale" not in arrays:
        return Linear(floats(arrays[name]), bias)
    scale, zero = arrays[f"{name}.input"].tolist()
    return Linear(
        np.asarray(arrays[name], np.int8), bias, floats(arrays[f"{name}.scale"]), scale, int(zero)
    )


def floats(array: NDArray[np.generic]) -> Floats:
    """An array as float32."""
    return np.ascontiguousarray(array, np.float32)
