"""Layers that keep a state: what rows behind one prefix take in groups, and the runtime's operator.

    python -m benchmarks.states [--rows N] [--threads N] [--out FILE]

Two layers of Qwen3.5's 0.8 B in width, with random weights and few words: one keeps a state, the
other attends. Rows of 80 tokens continue a prefix of 300, so many a call; "anew" reads prefix and
row in one. Beside it, what alone goes over the state, in the graph's plain operators by chunks of
several widths and by ONNX Runtime's `com.microsoft::LinearAttention`. Times are medians of calls
taken in turns, so ratios hold on a busy machine, too.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper
from torch import Tensor, nn

from benchmarks.timing import times_in_turns_ms
from meiqa.engine.manifest import Graph
from meiqa.engine.runtime.decoder import GraphDecoder, Row
from meiqa.evaluation.measuring import run_on
from meiqa.export import decoder as decoding
from meiqa.export.decoder import DecoderConfig, DeltaConfig, GatedDeltaNet, SharedPrefixDecoder
from meiqa.export.graphs import decoder_interface, traced
from meiqa.export.layers import save_graph

DELTA = DeltaConfig(
    layers=(0,), key_heads=16, value_heads=16, key_width=128, value_width=128, kernel=4
)
CONFIG = DecoderConfig(
    vocab_size=512,
    hidden_size=1024,
    intermediate_size=3584,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=2,
    mrope_section=(11, 11, 10),
    mrope_interleaved=True,
    head_dim=256,
    rotary_dim=64,
    attention_bias=False,
    attention_gate=True,
    qk_norm=True,
    delta=DELTA,
)
PREFIX, SUFFIX = 300, 80
GROUPS = (1, 2, 4, 8)
CHUNKS = (16, 32, 64)
LENGTHS = ((1, PREFIX), (8, SUFFIX), (1, 1))
"""Rows and tokens over whose states operators go."""
ROUNDS = 5
Arrays = Mapping[str, NDArray[np.float32]]


class OverState(nn.Module):
    """What of a layer goes over the state, with nothing before and behind."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = GatedDeltaNet(CONFIG, DELTA)

    def forward(self, convolved: Tensor, decay: Tensor, writes: Tensor, state: Tensor) -> Any:
        return self.layer.recur(convolved, (decay, writes, torch.ones_like(decay[..., :1])), state)


def session(path: Path | bytes, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def by_chunks(folder: Path, width: int, threads: int) -> Callable[[Arrays], list[Any]]:
    """Trace what goes over the state by chunks; it takes what the operator does."""
    decoding.CHUNK = width
    heads, state = DELTA.value_heads, DELTA.state_width - DELTA.remembered
    rows = ("prefixes", "steps")
    inputs = {
        "convolved": (*rows, DELTA.convolved),
        "decay": (*rows, heads),
        "writes": (*rows, heads),
        "state": ("prefixes", state),
    }
    outputs = {"mixed": (*rows, heads, DELTA.value_width), "kept": ("prefixes", state)}
    module, file = OverState().eval(), folder / f"{width}.onnx"
    weights = module.state_dict()
    save_graph(traced(module, Graph(file.name, None, inputs, outputs), weights.__getitem__), file)
    opened = session(file, threads)

    def run(given: Arrays) -> list[Any]:
        convolved = np.concatenate([given[name] for name in ("query", "key", "value")], -1)
        count = len(convolved)
        return list(
            opened.run(
                None,
                {
                    "convolved": convolved,
                    "decay": given["decay"],
                    "writes": given["beta"],
                    "state": given["past_state"].reshape(count, -1),
                },
            )
        )

    return run


def by_operator(threads: int) -> Callable[[Arrays], list[Any]]:
    """Make a graph of the runtime's operator alone."""
    names = ("query", "key", "value", "past_state", "decay", "beta")
    node = helper.make_node(
        "LinearAttention",
        names,
        ("output", "present_state"),
        domain="com.microsoft",
        q_num_heads=DELTA.key_heads,
        kv_num_heads=DELTA.value_heads,
        update_rule="gated_delta",
    )
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in names]
    made = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in node.output]
    graph = helper.make_graph([node], "operator", ports, made)
    domains = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=domains, ir_version=10)
    opened = session(model.SerializeToString(), threads)
    return lambda given: list(opened.run(None, dict(given)))


def tokens(rows: int, steps: int) -> Arrays:
    """Draw the operator's inputs; queries and keys have the length 1."""
    rng = np.random.default_rng(0)

    def units() -> NDArray[np.float32]:
        drawn = rng.standard_normal((rows, steps, DELTA.key_heads, DELTA.key_width), np.float32)
        drawn /= np.linalg.norm(drawn, axis=-1, keepdims=True)
        return drawn.reshape(rows, steps, -1)

    heads, shape = DELTA.value_heads, (DELTA.key_width, DELTA.value_width)
    return {
        "query": units(),
        "key": units(),
        "value": rng.standard_normal((rows, steps, heads * DELTA.value_width), np.float32),
        "past_state": 0.1 * rng.standard_normal((rows, heads, *shape), np.float32),
        "decay": -0.1 * rng.random((rows, steps, heads), np.float32),
        "beta": rng.random((rows, steps, heads), np.float32),
    }


def operators(folder: Path, threads: int) -> list[dict[str, Any]]:
    """Time what goes over the state, in each way."""
    ways = {f"chunks of {width}": by_chunks(folder, width, threads) for width in CHUNKS}
    ways["LinearAttention"] = by_operator(threads)
    rows = []
    for count, steps in LENGTHS:
        given = tokens(count, steps)
        wanted = ways["LinearAttention"](given)[0].reshape(count, steps, -1)
        apart = max(
            float(np.abs(way(given)[0].reshape(wanted.shape) - wanted).max())
            for way in ways.values()
        )
        calls = {name: partial(way, given) for name, way in ways.items()}
        times = times_in_turns_ms(calls, dict.fromkeys(calls, ROUNDS))
        ms = {name: median(each) for name, each in times.items()}
        rows.append({"rows": count, "tokens": steps, "ms": ms, "largest_difference": apart})
    return rows


def random_decoder(folder: Path, threads: int) -> GraphDecoder:
    """Trace the two layers."""
    torch.manual_seed(0)
    module = SharedPrefixDecoder(CONFIG).eval()
    with torch.no_grad():
        for name, weight in module.named_parameters():
            nn.init.normal_(weight, std=1.0 if "norm" in name else 0.02)
    weights = module.state_dict()
    graph = traced(module, decoder_interface(CONFIG.shape), weights.__getitem__)
    save_graph(graph, folder / "decoder.onnx")
    opened = session(folder / "decoder.onnx", threads)
    names = [output.name for output in opened.get_outputs()]

    class Session:
        def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
            return dict(zip(names, opened.run(None, dict(inputs)), strict=True))

    return GraphDecoder(Session(), CONFIG.shape)


def groups(folder: Path, count: int, threads: int) -> dict[str, Any]:
    """Time rows that continue one prefix, so many a call, and read anew."""
    decoder, rng = random_decoder(folder, threads), np.random.default_rng(0)

    def row(start: int, steps: int) -> Row:
        places = np.arange(start, start + steps, dtype=np.float32)
        embeds = 0.5 * rng.standard_normal((steps, CONFIG.hidden_size), np.float32)
        return Row(embeds, np.tile(places, (3, 1)))

    opening, rows = row(0, PREFIX), [row(PREFIX, SUFFIX) for _ in range(count)]
    whole = [opening.followed_by(each.embeds) for each in rows]
    (prefix,) = decoder.prefill([opening])
    (nothing,) = [type(prefix).nothing(CONFIG.shape)]

    def in_groups(size: int) -> NDArray[np.float32]:
        decoder.rows_per_call = size
        return decoder.last_logits(rows, [prefix])

    calls: dict[str, Callable[[], NDArray[np.float32]]] = {
        f"{size} a call": partial(in_groups, size) for size in GROUPS
    }
    calls["anew"] = lambda: np.concatenate([decoder.last_logits([e], [nothing]) for e in whole])
    wanted = calls["anew"]()
    apart = max(float(np.abs(call() - wanted).max()) for call in calls.values())
    times = times_in_turns_ms(calls, dict.fromkeys(calls, ROUNDS) | {"anew": 3})
    ms = {name: median(each) / count for name, each in times.items()}
    return {
        "rows": count,
        "ms_a_row": ms,
        "largest_difference": apart,
        "logits_of": float(np.abs(wanted).max()),
        "state_mib_a_layer": 4 * DELTA.state_width / 2**20,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Print two tables, and write the report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.states", description=__doc__)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    chosen = decoding.CHUNK
    with TemporaryDirectory() as folder:
        grouped = groups(Path(folder), given.rows, given.threads)
        over = operators(Path(folder), given.threads)
    report = {
        "chunk": chosen,
        "groups": grouped,
        "operators": over,
        "threads": given.threads,
        **run_on("numpy", "onnxruntime", "torch"),
    }
    print("| rows behind one prefix | ms a row | largest difference from anew |")
    print("|---|---|---|")
    for name, ms in grouped["ms_a_row"].items():
        print(f"| {name} | {ms:.1f} | {grouped['largest_difference']:.1e} |")
    names = list(over[0]["ms"])
    print(f"\n| over the state, ms | {' | '.join(names)} | largest difference |")
    print("|---" * (len(names) + 2) + "|")
    for each in over:
        cells = " | ".join(f"{each['ms'][name]:.2f}" for name in names)
        apart = f"{each['largest_difference']:.1e}"
        print(f"| {each['rows']} x {each['tokens']} tokens | {cells} | {apart} |")
    if given.out is not None:
        given.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
