"""What few bits do to a real decoder's text, beside other quantisers of the same weights.

    python -m benchmarks.text_quantisation CHECKPOINT --work DIR [--variant NAME …] [--output FILE]

The decoder of a checkpoint (such as `benchmarks.real_checkpoint` makes) reads the passages of
reading.json, beginnings of pages of this project's documentation as it was at 3e5dbcf: on 28 of
them activations are observed, on three others variants are compared with the float graph. Given are
the mean Kullback-Leibler divergence of the next token's distribution, in nats, the share of tokens
whose most probable successor is another, the mean loss, and the bytes of the graph's weights. `ort`
are ONNX Runtime's own quantisers of the same graph. The float graph stays in DIR for another run,
since tracing takes minutes. Rows go to FILE as they are measured; a run leaves out those that are
there, so one that was cut short can be taken up again.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

from meiqa.engine.manifest import DecoderShape
from meiqa.engine.runtime.decoder import GraphSession
from meiqa.errors import UsageError
from meiqa.evaluation.measuring import Column, run_on, table_text
from meiqa.export import calibration, rounding
from meiqa.export.calibration import Quantisation, observe
from meiqa.export.checkpoint import Checkpoint
from meiqa.export.graphs import decoder_interface, traced
from meiqa.export.layers import save_graph
from meiqa.export.verify import Feeds, PiecewiseSession
from meiqa.memory.segment import file_sha256

Floats = NDArray[np.float32]
READING = Path(__file__).parent / "reading.json"
TOKENS, FIRST = 192, 8
"""Tokens of a passage that are read, and that are not judged, since little is known of them."""
DOWN = "down_proj"
FLOAT = "float"
_COLUMNS = (
    Column("variant", "variant"),
    Column("kl", "KL", ".4f"),
    Column("other", "other token", ".3f"),
    Column("loss", "loss", ".3f"),
    Column("mb", "MB", ".0f"),
)


def passages(kind: str) -> list[str]:
    """Give the texts that are "observed" or "compared"."""
    found: list[str] = json.loads(READING.read_text())[kind]
    return found


class Reader:
    """Reads passages with a decoder's graph."""

    def __init__(self, checkpoint: Checkpoint, tokens: int) -> None:
        self._shape: DecoderShape = checkpoint.text.shape
        self._embedding = checkpoint.decoder_weight("embed_tokens.weight").float().numpy()
        self._tokenizer, self._count = checkpoint.tokenizer, tokens

    def ids(self, passage: str) -> NDArray[np.int64]:
        """Tokens of a passage."""
        encoded = self._tokenizer.encode(passage, add_special_tokens=False)
        return np.array(encoded.ids[: self._count], np.int64)

    def feeds(self, ids: NDArray[np.int64]) -> Feeds:
        """Inputs that ask for the successor of every token."""
        s, count = self._shape, len(ids)
        return {
            "embeds": self._embedding[ids][None, None].astype(np.float32),
            "positions": np.tile(np.arange(count, dtype=np.float32), (3, 1, 1, 1)),
            "prefix": np.zeros((s.layers, 2, 1, s.kv_heads, 0, s.head_dim), np.float32),
            "prefix_lengths": np.zeros(1, np.int64),
            "past": np.zeros((s.layers, 2, 1, s.kv_heads, 1, 0, s.head_dim), np.float32),
            "past_lengths": np.zeros((1, 1), np.int64),
            "logit_positions": np.arange(count)[None, None],
        }

    def log_probabilities(self, session: GraphSession, passage: str) -> Floats:
        """Give those of each token's successor, (tokens, vocabulary)."""
        logits = session.run(self.feeds(self.ids(passage)))["logits"][0, 0, FIRST:]
        logits = logits - logits.max(-1, keepdims=True)
        found: Floats = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return found


def compared(reader: Reader, exact: Mapping[str, Floats], made: GraphSession) -> dict[str, float]:
    """Compare a variant's graph with the float one's log-probabilities of all passages."""
    rows = []
    for passage, wanted in exact.items():
        found = reader.log_probabilities(made, passage)
        following = reader.ids(passage)[FIRST + 1 :]
        rows.append(
            (
                float((np.exp(wanted) * (wanted - found)).sum(-1).mean()),
                float((wanted.argmax(-1) != found.argmax(-1)).mean()),
                float(-found[np.arange(len(following)), following].mean()),
            )
        )
    return dict(zip(("kl", "other", "loss"), np.mean(rows, axis=0).tolist(), strict=True))


Variant = Callable[[Path, Path], None]
"""Writes a variant of the first file's graph to the second."""


ObservedFor = Callable[[str], Mapping[str, Any]]
"""Gives what was observed, with samples as large as a precision needs."""


def ours(
    precision: str,
    observed_for: ObservedFor,
    *,
    sampled_for: str | None = None,
    float_layers: str | None = None,
    **instead: object,
) -> Variant:
    """A graph of this project's; without some of what it does, or with other parts of rounding."""

    def write(source: Path, out: Path) -> None:
        observed = observed_for(sampled_for or precision)
        with ExitStack() as stack:
            for name, part in instead.items():
                stack.enter_context(patch.object(rounding, name, part))
            quantisation = Quantisation({"decoder": source}, precision, observed)
            plan = quantisation.default()["decoder"]
            if float_layers is not None:
                plan = {
                    n: calibration.LEFT_IN_FLOAT if float_layers in n else p
                    for n, p in plan.items()
                }
            save_graph(quantisation.graph("decoder", plan), out)

    return write


def as_they_come(rows: Floats) -> NDArray[np.intp]:
    """Leave the channels of rows in their order."""
    return np.arange(rows.shape[1])


def ort_dynamic(source: Path, out: Path) -> None:
    """ONNX Runtime's dynamic INT8: a scale an output channel, and one for each activation."""
    quantize_dynamic(
        source,
        out,
        weight_type=QuantType.QInt8,
        per_channel=True,
        use_external_data_format=True,
        op_types_to_quantize=["MatMul"],
    )


def ort_four_bits(symmetric: bool) -> Variant:
    """ONNX Runtime's round-to-nearest in blocks of 32."""

    def write(source: Path, out: Path) -> None:
        quantiser = MatMulNBitsQuantizer(
            onnx.load(source),
            bits=4,
            block_size=32,
            is_symmetric=symmetric,
            nodes_to_exclude=heads_of(source),
        )
        quantiser.process()
        quantiser.model.save_model_to_file(str(out), use_external_data_format=True)

    return write


def heads_of(source: Path) -> list[str]:
    """Name what makes logits, which 4 bits are too few for; ours has it in 8."""
    graph = ir.load(source).graph
    made = next(each for each in graph.outputs if each.name == "logits").producer()
    return [str(made.name)] if made is not None else []


VARIANTS: Mapping[str, Callable[[ObservedFor], Variant]] = {
    "int8": partial(ours, "int8"),
    "int8, gated products alone by rows": partial(ours, "int8", WORTH_OWN_ROWS=np.inf),
    "int8, gated products in fp16": partial(ours, "int8", float_layers=DOWN, WORTH_OWN_ROWS=np.inf),
    "int8, all rows by themselves": partial(ours, "int8", WORTH_OWN_ROWS=0.0),
    "int8, ort dynamic": lambda _: ort_dynamic,
    "int4": partial(ours, "int4"),
    "int4, samples as for int8": partial(ours, "int4", sampled_for="int8"),
    "int4, inputs as they come": partial(ours, "int4", loudest_first=as_they_come),
    "int4, nothing observed, no clipping": lambda _: ours(
        "int4", lambda precision: {}, CLIPS=rounding.CLIPS[:0]
    ),
    "int4, ort": lambda _: ort_four_bits(symmetric=False),
    "int4, ort symmetric": lambda _: ort_four_bits(symmetric=True),
}
"""Makes each variant by name, observing what it needs."""


def float_graph(checkpoint: Checkpoint, work: Path) -> Path:
    """Give the decoder's float graph, traced once for each folder."""
    source = work / "decoder.onnx"
    if not source.exists():
        work.mkdir(parents=True, exist_ok=True)
        interface = decoder_interface(checkpoint.text.shape)
        save_graph(traced(checkpoint.decoder(), interface, checkpoint.decoder_weight), source)
    return source


def measured(
    folder: Path, work: Path, tokens: int, names: Collection[str], say: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """Give a row for the float graph of a checkpoint's decoder, and for each of these variants."""
    checkpoint = Checkpoint.open(folder)
    reader = Reader(checkpoint, tokens)
    say("tracing")
    source = float_graph(checkpoint, work)
    whole = PiecewiseSession(source)
    exact = {each: reader.log_probabilities(whole, each) for each in passages("compared")}
    yield {"variant": FLOAT, **compared(reader, exact, whole), "mb": size_mb(source)}

    def read_all(sessions: Mapping[str, GraphSession]) -> None:
        for passage in passages("observed"):
            sessions["decoder"].run(reader.feeds(reader.ids(passage)))

    @cache
    def observed_for(precision: str) -> Mapping[str, Any]:
        return observe({"decoder": source}, read_all, precision)

    for name in names:
        say(name)
        with tempfile.TemporaryDirectory(dir=work) as made:
            out = Path(made) / "decoder.onnx"
            VARIANTS[name](observed_for)(source, out)
            found = compared(reader, exact, PiecewiseSession(out))
            yield {"variant": name, **found, "mb": size_mb(out)}


def size_mb(graph: Path) -> float:
    """Megabytes of a graph and its weights."""
    return sum(file.stat().st_size for file in graph.parent.glob(f"{graph.name}*")) / 1e6


def rows_in(output: Path | None, of: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Give the rows that a run before wrote.

    Raises:
        UsageError: they are of other weights, passages or versions, or of another machine.
    """
    if output is None or not output.exists():
        return []
    report = json.loads(output.read_text())
    if others := [name for name, value in of.items() if report.get(name) != value]:
        raise UsageError(f"{output} was measured otherwise", seen=f"other {', '.join(others)}")
    found: list[dict[str, Any]] = report["rows"]
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.text_quantisation", description=__doc__
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--variant", action="append", choices=VARIANTS, help="may be repeated")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    weights = sorted(given.checkpoint.glob("*.safetensors"))
    settings = {
        "tokens": given.tokens,
        "reading": file_sha256(READING)[:16],
        "weights": [file_sha256(file)[:16] for file in weights],
        **run_on("onnxruntime"),
    }
    rows = rows_in(given.output, settings)

    def say(step: str) -> None:
        sys.stderr.write(f"{step}\n")

    logging.disable(logging.INFO)  # ONNX Runtime's quantisers make the exporter tell all it does
    known = {row["variant"] for row in rows}
    names = [name for name in given.variant or VARIANTS if name not in known]
    for row in measured(given.checkpoint, given.work, given.tokens, names, say):
        if row["variant"] not in known:
            rows.append(row)
        if given.output is not None:
            report = {**settings, "rows": rows}
            given.output.write_text(json.dumps(report, indent=2) + "\n")
    sys.stdout.write(f"{table_text(rows, _COLUMNS)}\n")


if __name__ == "__main__":
    main()
