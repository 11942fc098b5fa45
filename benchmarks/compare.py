"""The comparisons of one photo: this engine beside transformers, from the same weights.

`python -m benchmarks.compare` asks for K = 32 neighbours in both orders, 64 answers, and
prints how often each way to them fits into the time of the fastest:

* transformers: Qwen2.5-VL's text model in PyTorch reads every pair from its first token, all of
  them in one batch.
* transformers_prefix: the same with its own cache. The photo's prefix, with all that stands before
  the second picture, is kept once and repeated for the rows that continue it; those of the
  neighbours are kept as a batch and cropped after use.
  Rows are taken 8, or all K, at a time, whichever is faster.
* fp32, int8: this engine as it asks; the prefixes are there, as after scoring the
  photo and in a warm cache, for it as for transformers' cache.
* no_reuse: the fp32 engine reads every pair from its first token.

Pictures are 64 visual tokens, drawn at random: neither side encodes any. The checkpoint is random,
too, in the shape of the default model, unless one is given; latency does not depend on values. All
ways in fp32 have to give the same answers, or no ratio is printed; how far those in INT8 are off is
printed with them.

fp32 and int8 run the fastest kernel of this processor that multiplies floats as they are. Timed
beside are the other such kernels that it could run, which are those of other processors
(`avx2_fp32`, `portable_int8`), and what the kernels replace, the decoder's graph in ONNX Runtime
(`graph_fp32`, `graph_int8`).
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from benchmarks.timing import times_in_turns_ms
from meiqa.engine.local import LocalModel
from meiqa.engine.model import Prefix, VisualTokens
from meiqa.engine.package import EnginePackage
from meiqa.engine.prompts import MEIQA, PromptFamily, positions_of
from meiqa.engine.runtime import open_graphs
from meiqa.engine.runtime.decoder import (
    ROWS_PER_CALL,
    Decoder,
    GraphDecoder,
    KeyValues,
    NativeDecoder,
    Row,
    packed,
    padded,
    stored_layers,
)
from meiqa.errors import MeiqaError, UsageError
from meiqa.evaluation.measuring import quantiles_ms, run_on
from meiqa.kernels.cores import usable_cores
from meiqa.kernels.decoder import FASTEST, KERNELS, FusedShape
from meiqa.locations import embedded_assets

__all__ = ["bench_compare", "main", "table_text"]

Floats = NDArray[np.float32]
Answers = NDArray[np.float64]
GRID = (8, 8)
"""64 visual tokens: a photo of 512 x 512 pixels."""
NEIGHBOURS, ROUNDS, SLOW_ROUNDS, WARM_UP = 32, 20, 5, 1
LARGEST_DIFFERENCE = 1e-4
GEMM_SIDES = (1024, 1536, 2048)
WEIGHT_STD = 0.06
"""Spread of random weights: wide enough for pictures to make a difference."""
TEXT = {
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
}
ROTARY = {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": [8, 12, 12]}
PATCH, MERGE = 8, 2
VISION = {
    **{"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2},
    **{"patch_size": PATCH, "spatial_merge_size": MERGE, "temporal_patch_size": 2},
    **{"window_size": 64, "fullatt_block_indexes": [0], "out_hidden_size": 256},
}


@dataclass(frozen=True, eq=False)
class Asked:
    """One photo and its neighbours as a model has read them."""

    model: LocalModel
    photo: Prefix
    neighbours: Sequence[Prefix]

    @classmethod
    def of(cls, model: LocalModel, pictures: Sequence[VisualTokens]) -> Asked:
        """The first picture is the photo."""
        photo, *neighbours = model.prefill(pictures)
        return cls(model, photo, neighbours)

    def answers(self) -> Answers:
        """(2 K,) by how much the first picture is ahead: the photo first, then second."""
        shown_first = self.model.prefer_first([self.photo], [n.tokens for n in self.neighbours])
        photos = [self.photo.tokens] * len(self.neighbours)
        return np.concatenate([shown_first, self.model.prefer_first(self.neighbours, photos)])

    def pairs(self) -> list[tuple[Prefix, Prefix]]:
        """First and second picture of all answers."""
        return [(self.photo, n) for n in self.neighbours] + [
            (n, self.photo) for n in self.neighbours
        ]

    def prompts(self) -> list[Row]:
        """The whole prompt of each answer."""
        return [
            whole_prompt(self.model, first.tokens, second.tokens) for first, second in self.pairs()
        ]

    def shared(self, first: Prefix) -> int:
        """Tokens that do not depend on the second picture: the prefix, and what opens that one."""
        return first.opening.length + len(self.model.prompts.second_opening)

    def suffixes(self) -> list[Row]:
        """What depends on the second picture in each prompt."""
        return [
            Row(row.embeds[self.shared(first) :], row.positions[:, self.shared(first) :])
            for row, (first, _) in zip(self.prompts(), self.pairs(), strict=True)
        ]

    def from_logits(self, logits: Floats) -> Answers:
        """By how much the first picture is ahead in logits (R, V)."""
        first, second = self.model.prompts.verdict_ids
        ahead: Answers = logits[:, first].astype(np.float64) - logits[:, second]
        return ahead


def whole_prompt(model: LocalModel, first: VisualTokens, second: VisualTokens) -> Row:
    """A comparison from its first token."""
    p, table = model.prompts, model.package.embedding
    before, between = p.opening, np.concatenate([p.closing, p.second_opening])
    question = np.concatenate([p.closing, p.compare])
    embeds = [table[before], first.values, table[between], second.values, table[question]]
    positions, _ = positions_of([len(before), first.grid, len(between), second.grid, len(question)])
    return Row(np.concatenate(embeds).astype(np.float32), positions)


def on_kernel(graph: Decoder, package: EnginePackage, threads: int, kernel: str) -> Decoder:
    """Give a decoder on a native kernel; the graph itself where the package has no layers."""
    stored = stored_layers(package)
    return graph if stored is None else NativeDecoder(*packed(*stored, kernel), threads)


def without_reuse(asked: Asked, decoder: Decoder) -> Callable[[], Answers]:
    """The engine, as many whole prompts at a time as it takes."""
    shape = asked.model.package.manifest.decoder
    empty = np.zeros((shape.layers, 2, shape.kv_heads, 0, shape.head_dim), np.float32)
    rows, nothing = asked.prompts(), KeyValues(empty, 0)

    def answers() -> Answers:
        return asked.from_logits(decoder.last_logits(rows, [nothing] * len(rows)))

    return answers


class Transformers:
    """Qwen2.5-VL's text model in PyTorch with a checkpoint's weights."""

    def __init__(self, checkpoint: Path, threads: int) -> None:
        self.torch = importlib.import_module("torch")
        self.torch.set_num_threads(threads)
        opened = importlib.import_module("meiqa.export.checkpoint").Checkpoint.open(checkpoint)
        text = opened.text
        if text.qk_norm or text.deepstack:
            raise UsageError(
                "only the text model of Qwen2.5-VL is a rival here", seen=str(checkpoint)
            )
        family = "transformers.models.qwen2_5_vl"
        configuration = importlib.import_module(f"{family}.configuration_qwen2_5_vl")
        modeling = importlib.import_module(f"{family}.modeling_qwen2_5_vl")
        rotary = {"rope_theta": text.rope_theta, "mrope_section": list(text.mrope_section)}
        config = configuration.Qwen2_5_VLTextConfig(
            vocab_size=text.vocab_size,
            rope_parameters={"rope_type": "default", **rotary},
            bos_token_id=None,
            eos_token_id=None,
            **{name: getattr(text, name) for name in TEXT},
        )
        self.model = modeling.Qwen2_5_VLTextModel(config).eval()
        names = self.model.state_dict()
        self.model.load_state_dict({name: opened.decoder_weight(name).float() for name in names})
        self.head = opened.decoder_weight("lm_head.weight").float().T.contiguous()
        self._cache = importlib.import_module("transformers").DynamicCache
        self._config = config

    def logits(self, rows: Sequence[Row], cache: Any = None) -> Floats:
        """Logits (R, V) of the last tokens of rows of one length; appends to a cache."""
        torch = self.torch
        embeds, positions, _ = padded(rows)
        with torch.inference_mode():
            hidden = self.model(
                inputs_embeds=torch.from_numpy(embeds),
                position_ids=torch.from_numpy(positions).long(),
                past_key_values=cache,
                use_cache=cache is not None,
            ).last_hidden_state[:, -1]
            logits: Floats = (hidden @ self.head).numpy()
        return logits

    def read(self, rows: Sequence[Row]) -> Any:
        """The cache of prefixes of one length."""
        cache = self._cache(config=self._config)
        self.logits(rows, cache)
        return cache

    def from_scratch(self, asked: Asked) -> Callable[[], Answers]:
        """All pairs in one batch."""
        rows = asked.prompts()
        return lambda: asked.from_logits(self.logits(rows))

    def with_prefixes(self, asked: Asked, batch: int) -> Callable[[], Answers]:
        """Each pair continues what was read of its first picture, `batch` rows at a time."""
        rows, count = asked.suffixes(), len(asked.neighbours)
        opened = [
            Row(row.embeds[: asked.shared(first)], row.positions[:, : asked.shared(first)])
            for row, (first, _) in zip(asked.prompts(), asked.pairs(), strict=True)
        ]
        photo = self.read(opened[:1])
        starts = range(0, count, batch)
        kept = [self.read(opened[count + at : count + min(at + batch, count)]) for at in starts]

        def answers() -> Answers:
            made = []
            for at in starts:
                part = rows[at : min(at + batch, count)]
                repeated = copy.deepcopy(photo)
                repeated.batch_repeat_interleave(len(part))
                made.append(self.logits(part, repeated))
            for at, cache in zip(starts, kept, strict=True):
                part = rows[count + at : count + min(at + batch, count)]
                made.append(self.logits(part, cache))
                cache.crop(-len(part[0].embeds))
            return asked.from_logits(np.concatenate(made))

        return answers


def bench_compare(
    checkpoint: Path | None = None,
    *,
    neighbours: int = NEIGHBOURS,
    rounds: int = ROUNDS,
    threads: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Time all ways to the answers about one photo.

    Args:
        checkpoint: a folder in Hugging Face's layout with a decoder of Qwen2.5-VL's architecture;
            by default a random one in the default model's shape.
        rounds: how often the engine is timed; transformers a quarter as often.

    Raises:
        UsageError: the checkpoint's decoder is another.
        MeiqaError: the ways do not agree.
    """
    threads = threads or usable_cores()
    with tempfile.TemporaryDirectory() as folder:
        source = checkpoint or random_checkpoint(Path(folder) / "checkpoint", seed)
        packages = exported(source, Path(folder), None if checkpoint else MEIQA)
        return _measured(source, packages, neighbours, rounds, threads, seed)


def _measured(
    source: Path,
    packages: Mapping[str, EnginePackage],
    neighbours: int,
    rounds: int,
    threads: int,
    seed: int,
) -> dict[str, Any]:
    width = packages["fp32"].manifest.decoder.hidden_size
    rng = np.random.default_rng(seed)
    spread = float(np.std(packages["fp32"].embedding))
    drawn = spread * rng.standard_normal((neighbours + 1, GRID[0] * GRID[1], width), np.float32)
    pictures = [VisualTokens(values, GRID) for values in drawn]
    ways: dict[str, Callable[[], Answers]] = {}
    asked: dict[str, Asked] = {}
    for precision, package in packages.items():
        vision, session = open_graphs(package, ["vision", "decoder"], "cpu", threads)
        graph: Decoder = GraphDecoder(session, package.manifest.decoder)
        decoder = on_kernel(graph, package, threads, FASTEST)
        asked[precision] = Asked.of(LocalModel(package, vision, decoder), pictures)
        ways[precision] = asked[precision].answers
        if decoder is not graph:
            in_floats = [name for name, packing in KERNELS.items() if not packing.in_bf16]
            others = {k: on_kernel(graph, package, threads, k) for k in in_floats if k != FASTEST}
            for name, other in {**others, "graph": graph}.items():
                by_other = Asked.of(LocalModel(package, vision, other), pictures)
                ways[f"{name}_{precision}"] = by_other.answers
        if precision == "fp32":
            ways["no_reuse"] = without_reuse(asked[precision], decoder)
    rival, exact = Transformers(source, threads), asked["fp32"]
    ways["transformers"] = rival.from_scratch(exact)
    for batch in sorted({ROWS_PER_CALL, neighbours}):
        ways[f"transformers_prefix_{batch}"] = rival.with_prefixes(exact, batch)
    differences = agreement(ways)
    slow = max(1, rounds * SLOW_ROUNDS // ROUNDS)
    counts = {name: slow if name.startswith("transformers") else rounds for name in ways}
    gemm = gemm_ways(threads)
    times = times_in_turns_ms({**ways, **gemm}, {**counts, **dict.fromkeys(gemm, rounds)})
    rows_ms = {name: quantiles_ms(times[name]) for name in ways}
    # The machine's rate is what it reaches undisturbed.
    rates = {name: 2e-6 * side_of(name) ** 3 / min(times[name]) for name in gemm}
    text = importlib.import_module("meiqa.export.checkpoint").Checkpoint.open(source).text
    work = multiplications(text, exact, last_layer_whole="graph_fp32" not in ways)
    rate = max(rates.values())
    p50 = {name: row["p50_ms"] for name, row in rows_ms.items()}
    prefix = min(v for name, v in p50.items() if name.startswith("transformers_prefix"))
    return {
        "ratios": {
            "vs_transformers": round(p50["transformers"] / p50["fp32"], 2),
            "vs_transformers_prefix": round(prefix / p50["fp32"], 2),
            "vs_no_reuse": round(p50["no_reuse"] / p50["fp32"], 2),
            "int8_vs_transformers": round(p50["transformers"] / p50["int8"], 2),
        },
        "gemm_fraction": round(2e-6 * work / p50["fp32"] / rate, 3),
        "milliseconds": rows_ms,
        "gemm_gflops": {name: round(value, 1) for name, value in rates.items()},
        "gflop": round(2e-9 * work, 3),
        "largest_difference": differences,
        "settings": {
            **{"neighbours": neighbours, "answers": 2 * neighbours, "threads": threads},
            "visual_tokens": GRID[0] * GRID[1],
            "prefix_tokens": exact.shared(exact.photo),
            **{"suffix_tokens": len(exact.suffixes()[0].embeds)},
            **{"rounds": rounds, "warm_up": WARM_UP, "seed": seed},
            "fused": "graph_fp32" in ways,
        },
        **run_on("numpy", "onnxruntime", "torch", "transformers"),
    }


def agreement(ways: Mapping[str, Callable[[], Answers]]) -> dict[str, float]:
    """Largest difference of each way's answers from transformers' own.

    Raises:
        MeiqaError: one in fp32 is beyond 1e-4.
    """
    wanted = ways["transformers"]()
    found = {name: float(np.abs(way() - wanted).max()) for name, way in ways.items()}
    wrong = {n: d for n, d in found.items() if "int8" not in n and not d <= LARGEST_DIFFERENCE}
    if wrong:
        raise MeiqaError(
            "the ways to compare do not agree, so their times mean nothing",
            seen=", ".join(f"{name} {value:.1e}" for name, value in wrong.items()),
            allowed=f"{LARGEST_DIFFERENCE:.0e}",
        )
    return {name: round(value, 7) for name, value in found.items()}


def multiplications(text: Any, asked: Asked, *, last_layer_whole: bool) -> int:
    """Multiplications that the engine does for all answers, from the shapes.

    The fused kernel has read what opens the second picture with the first, and does not finish the
    last layer; a graph does all of it.
    """
    shape = FusedShape(
        text.hidden_size,
        text.intermediate_size,
        text.num_attention_heads,
        text.num_key_value_heads,
        text.head_dim,
        text.rms_norm_eps,
    )
    layers, total = text.num_hidden_layers, 0
    for row, (first, _) in zip(asked.prompts(), asked.pairs(), strict=True):
        prefix = first.opening.length if last_layer_whole else asked.shared(first)
        steps = len(row.embeds) - prefix
        whole = layers + 1 if last_layer_whole else layers
        total += sum(shape.multiplications(whole, steps, prefix))
        if last_layer_whole:
            total -= sum(shape.multiplications(1, steps, prefix))
        total += text.hidden_size * text.vocab_size
    return total


def gemm_ways(threads: int) -> dict[str, Callable[[], object]]:
    """Products of square fp32 matrices in ONNX Runtime, whose kernels are the fastest here."""
    onnx = importlib.import_module("onnx")
    onnxruntime = importlib.import_module("onnxruntime")
    ways: dict[str, Callable[[], object]] = {}
    for side in GEMM_SIDES:
        rng = np.random.default_rng(side)
        weight, values = (rng.standard_normal((side, side), np.float32) for _ in range(2))
        ends = [
            onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [side, side])
            for n in ("x", "y")
        ]
        graph = onnx.helper.make_graph(
            [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])],
            *("gemm", ends[:1], ends[1:], [onnx.numpy_helper.from_array(weight, "w")]),
        )
        opset = onnx.helper.make_opsetid("", 21)
        model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.force_spinning_stop", "1")
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        ways[f"gemm_{side}"] = lambda run=session.run, x=values: run(None, {"x": x})  # type: ignore[misc]
    return ways


def side_of(name: str) -> int:
    """Side of the matrices of one of `gemm_ways`."""
    return int(name.removeprefix("gemm_"))


def random_checkpoint(folder: Path, seed: int) -> Path:
    """Write a Qwen2.5-VL checkpoint in the default model's shape, made by transformers."""
    torch = importlib.import_module("torch")
    transformers = importlib.import_module("transformers")
    tokenizer = Tokenizer.from_file(str(embedded_assets() / "package" / "tokenizer.json"))
    ids = {
        name: tokenizer.token_to_id(f"<|{token}|>")
        for name, token in (
            ("image_token_id", "image_pad"),
            ("vision_start_token_id", "vision_start"),
            ("vision_end_token_id", "vision_end"),
        )
    }
    size = tokenizer.get_vocab_size()
    text = {**TEXT, "vocab_size": size, "rope_parameters": ROTARY, "bos_token_id": None}
    config = transformers.Qwen2_5_VLConfig(
        vision_config=VISION,
        text_config={**text, "eos_token_id": tokenizer.token_to_id("<|im_end|>")},
        tie_word_embeddings=True,
        video_token_id=size - 1,
        **ids,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.Qwen2_5_VLForConditionalGeneration(config).eval()
        for name, weight in model.named_parameters():
            if "norm" not in name and "ln_q" not in name:
                torch.nn.init.normal_(weight, std=WEIGHT_STD)
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    cell = PATCH * MERGE
    image = {
        **{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]},
        **{"patch_size": PATCH, "merge_size": MERGE},
        **{"temporal_patch_size": 2, "min_pixels": 4 * cell**2, "max_pixels": 64 * cell**2},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(image, indent=2) + "\n")
    return folder


def exported(source: Path, folder: Path, prompt: PromptFamily | None) -> dict[str, EnginePackage]:
    """Packages of a checkpoint in fp32 and INT8, the latter calibrated on noise.

    Args:
        prompt: what is asked; by default what suits the checkpoint's family.
    """
    packaging = importlib.import_module("meiqa.export.package")
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, (128, 128, 3), np.uint8) for _ in range(32)]
    options = {
        "fp32": packaging.ExportOptions("fp32", prompt=prompt, key_pictures=0),
        "int8": packaging.ExportOptions(
            "int8", prompt=prompt, pictures=noise, sensitivity=False, key_pictures=0
        ),
    }
    return {
        precision: packaging.export_package(source, folder / precision, chosen)
        for precision, chosen in options.items()
    }


def table_text(result: Mapping[str, Any]) -> str:
    """Lay out the result of `bench_compare` for people."""
    rows = sorted(result["milliseconds"].items(), key=lambda item: item[1]["p50_ms"])
    lines = [f"{'':24}{'p50 ms':>10}{'p95 ms':>10}{'p99 ms':>10}"]
    lines += [
        f"{name:24}{row['p50_ms']:10.1f}{row['p95_ms']:10.1f}{row['p99_ms']:10.1f}"
        for name, row in rows
    ]
    lines += ["", *(f"{name:24}{value:10.2f} x" for name, value in result["ratios"].items())]
    lines.append(f"{'gemm_fraction':24}{result['gemm_fraction']:10.2f}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print its table, or JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, help="by default a random one is made")
    parser.add_argument("--neighbours", type=int, default=NEIGHBOURS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--threads", type=int, help="by default all of this process")
    parser.add_argument("--format", choices=("text", "json"), default="text")
    given = parser.parse_args(arguments)
    result = bench_compare(
        given.checkpoint, neighbours=given.neighbours, rounds=given.rounds, threads=given.threads
    )
    text = json.dumps(result, indent=2) if given.format == "json" else table_text(result)
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
