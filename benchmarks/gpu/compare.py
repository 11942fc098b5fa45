"""The comparisons of one photo on a CUDA device, with a decoder in the shape of Qwen2.5-VL-3B.

    python -m benchmarks.gpu.compare --format json > benchmarks/results/compare-<gpu>.json

Needs the extras `gpu` and `export` in one environment, and about 24 GB on the device and in the
folder for temporary files. Weights are random: latency does not depend on them. Both sides compute
in fp16, transformers with its fused attention. K = 32 neighbours are asked about in both orders:

* transformers reads every pair from its first token, `rows` of them in a batch;
* transformers_prefix repeats the photo's cached prefix for the rows that continue it, and keeps
  those of the neighbours, cropped after use;
* graph runs the shared-prefix graph in ONNX Runtime; prefixes stay on the device.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.timing import times_in_turns_ms
from meiqa.errors import DeviceUnavailable, MeiqaError, install_hint
from meiqa.evaluation.measuring import quantiles_ms, run_on

__all__ = ["bench_gpu_compare", "main"]

Floats = NDArray[np.float32]
SHAPE = {
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "intermediate_size": 11_008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
}
MROPE_SECTION = (16, 24, 24)
VISUAL, BEFORE, AFTER = 256, 24, 48
"""Tokens of a picture, of the prompt up to and behind the first one, and behind the second."""
NEIGHBOURS, ROWS, ROUNDS = 32, 8, 10
LARGEST_DIFFERENCE = 0.05
"""Between hidden states of about 1 in fp16, summed in another order."""


def bench_gpu_compare(
    neighbours: int = NEIGHBOURS, rows: int = ROWS, rounds: int = ROUNDS, layers: int = 36
) -> dict[str, Any]:
    """Time the ways to all answers.

    Raises:
        DeviceUnavailable: PyTorch or ONNX Runtime has no CUDA device.
        MeiqaError: the ways do not agree.
    """
    torch = cuda_torch()
    runtime = cuda_runtime()
    torch.manual_seed(0)
    model, config = text_model(torch, layers)
    with tempfile.TemporaryDirectory() as folder:
        graph = exported(torch, model, config, Path(folder))
        session = runtime.InferenceSession(str(graph), providers=["CUDAExecutionProvider"])
        ways = Ways(torch, runtime, session, model, config, neighbours, rows)
        calls: dict[str, Callable[[], object]] = {
            "graph": ways.by_graph,
            "transformers_prefix": ways.with_prefixes,
            "transformers": ways.from_scratch,
        }
        difference = ways.largest_difference()
        times = times_in_turns_ms(calls, dict.fromkeys(calls, rounds), warm_up=2)
    rows_ms = {name: quantiles_ms(values) for name, values in times.items()}
    p50 = {name: row["p50_ms"] for name, row in rows_ms.items()}
    return {
        "ratios": {
            "vs_transformers": round(p50["transformers"] / p50["graph"], 2),
            "vs_transformers_prefix": round(p50["transformers_prefix"] / p50["graph"], 2),
        },
        "milliseconds": rows_ms,
        "largest_difference": difference,
        "settings": {
            **{"neighbours": neighbours, "rows": rows, "rounds": rounds, "warm_up": 2},
            **{"visual_tokens": VISUAL, "layers": layers, "precision": "fp16"},
        },
        "gpu": torch.cuda.get_device_name(0),
        **run_on("numpy", "onnxruntime-gpu", "torch", "transformers"),
    }


def cuda_torch() -> Any:
    """PyTorch, if it has a CUDA device.

    Raises:
        DeviceUnavailable: it has none, or is not installed.
    """
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        raise DeviceUnavailable(
            "PyTorch is not installed", hint=install_hint("gpu,export")
        ) from error
    if not torch.cuda.is_available():
        raise DeviceUnavailable(
            "this benchmark needs a CUDA device, and PyTorch sees none",
            seen=f"torch {torch.__version__}",
            hint="run it on a machine with an NVIDIA GPU and a CUDA build of PyTorch",
        )
    return torch


def cuda_runtime() -> Any:
    """ONNX Runtime, if it can use a CUDA device.

    Raises:
        DeviceUnavailable: it can't.
    """
    runtime = importlib.import_module("onnxruntime")
    available = runtime.get_available_providers()
    if "CUDAExecutionProvider" not in available:
        raise DeviceUnavailable(
            "this ONNX Runtime can't use CUDA",
            seen=", ".join(available),
            hint="install meiqa[gpu] in an environment without meiqa[cpu]",
        )
    return runtime


def text_model(torch: Any, layers: int) -> tuple[Any, Any]:
    """Transformers' text model with random weights in fp16 on the device, and our configuration."""
    family = "transformers.models.qwen2_5_vl"
    configuration = importlib.import_module(f"{family}.configuration_qwen2_5_vl")
    modeling = importlib.import_module(f"{family}.modeling_qwen2_5_vl")
    shape = {**SHAPE, "num_hidden_layers": layers}
    rotary = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": list(MROPE_SECTION)}
    config = configuration.Qwen2_5_VLTextConfig(rope_parameters=rotary, **shape)
    with torch.device("cuda"):
        model = modeling.Qwen2_5_VLTextModel(config).half().eval()
    ours = importlib.import_module("meiqa.export.decoder").DecoderConfig(
        mrope_section=MROPE_SECTION, **shape
    )
    return model, ours


def exported(torch: Any, model: Any, config: Any, folder: Path) -> Path:
    """The shared-prefix graph with the model's weights, multiplying in fp16."""
    decoder = importlib.import_module("meiqa.export.decoder").SharedPrefixDecoder
    graphs = importlib.import_module("meiqa.export.graphs")
    checkpoint = importlib.import_module("meiqa.export.checkpoint")
    layers = importlib.import_module("meiqa.export.layers")
    shape = config.shape
    stored = {**model.state_dict(), "lm_head.weight": model.embed_tokens.weight}
    with checkpoint.weightless():
        empty = decoder(config).eval()
    graph = graphs.traced(
        empty, graphs.decoder_interface(shape), lambda name: stored[name].detach().float().cpu()
    )
    layers.halve(graph)
    layers.save_graph(graph, folder / "decoder.onnx")
    torch.cuda.empty_cache()
    return folder / "decoder.onnx"


class Ways:
    """The same answers by three ways: last hidden states (2 K, D) of the photo shown first, then
    second."""

    def __init__(
        self,
        torch: Any,
        runtime: Any,
        session: Any,
        model: Any,
        config: Any,
        neighbours: int,
        rows: int,
    ) -> None:
        self.torch, self.session, self.model, self.config = torch, session, model, config
        self.count, self.rows = neighbours, rows
        self.prefix_steps, self.steps = BEFORE + VISUAL, VISUAL + AFTER
        self._value = runtime.OrtValue.ortvalue_from_numpy
        self._cache = importlib.import_module("transformers").DynamicCache
        total = self.prefix_steps + self.steps
        drawn = torch.randn(2 * neighbours, total, config.hidden_size, device="cuda")
        self.embeds = (0.02 * drawn).half()
        self.embeds[:neighbours, : self.prefix_steps] = self.embeds[0, : self.prefix_steps].clone()
        self.positions = torch.arange(total, device="cuda")
        with torch.inference_mode():
            self.photo = self._read(slice(0, 1))
            parts = range(neighbours, 2 * neighbours, rows)
            self.kept = [self._read(slice(at, min(at + rows, 2 * neighbours))) for at in parts]
        self.feeds = [self._feeds(at, cache) for at, cache in self._graph_calls()]

    def _run(self, embeds: Any, start: int, cache: Any = None) -> Any:
        rows, steps = embeds.shape[:2]
        places = self.positions[start : start + steps].expand(3, rows, steps)
        return self.model(
            inputs_embeds=embeds,
            position_ids=places,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state[:, -1]

    def _read(self, rows: slice) -> Any:
        cache = self._cache(config=self.model.config)
        self._run(self.embeds[rows, : self.prefix_steps], 0, cache)
        return cache

    def _all(self, parts: list[Any]) -> Floats:
        self.torch.cuda.synchronize()
        hidden: Floats = self.torch.cat(parts).float().cpu().numpy()
        return hidden

    def from_scratch(self) -> Floats:
        """Every pair from its first token."""
        with self.torch.inference_mode():
            starts = range(0, 2 * self.count, self.rows)
            return self._all([self._run(self.embeds[at : at + self.rows], 0) for at in starts])

    def with_prefixes(self) -> Floats:
        """Every pair from its second picture on, with transformers' cache."""
        after, made = self.embeds[:, self.prefix_steps :], []
        with self.torch.inference_mode():
            for at in range(0, self.count, self.rows):
                part = after[at : min(at + self.rows, self.count)]
                repeated = copy.deepcopy(self.photo)
                repeated.batch_repeat_interleave(len(part))
                made.append(self._run(part, self.prefix_steps, repeated))
            at = self.count
            for cache in self.kept:
                part = after[at : at + self.rows]
                made.append(self._run(part, self.prefix_steps, cache))
                cache.crop(-self.steps)
                at += len(part)
            return self._all(made)

    def _graph_calls(self) -> list[tuple[int, Any]]:
        """First row of each call of the graph, and the cache that its prefixes are in."""
        shared = [(at, self.photo) for at in range(0, self.count, self.rows)]
        own = zip(range(self.count, 2 * self.count, self.rows), self.kept, strict=True)
        return [*shared, *own]

    def _feeds(self, at: int, cache: Any) -> dict[str, Any]:
        """Inputs of one call, on the device."""
        c, end = self.config, self.count if at < self.count else 2 * self.count
        part = self.embeds[at : min(at + self.rows, end), self.prefix_steps :]
        prefixes = cache.layers[0].keys.shape[0]
        rows = len(part) // prefixes
        pairs = [self.torch.stack([layer.keys, layer.values]) for layer in cache.layers]
        lead = (prefixes, rows)
        arrays = {
            "embeds": part.float().cpu().numpy().reshape(*lead, self.steps, -1),
            "positions": np.broadcast_to(
                np.arange(self.prefix_steps, self.prefix_steps + self.steps, dtype=np.float32),
                (3, *lead, self.steps),
            ),
            "prefix": self.torch.stack(pairs).float().cpu().numpy(),
            "prefix_lengths": np.full(prefixes, self.prefix_steps),
            "past": np.zeros(
                (c.num_hidden_layers, 2, prefixes, c.num_key_value_heads, rows, 0, c.head_dim),
                np.float32,
            ),
            "past_lengths": np.zeros(lead, np.int64),
            "logit_positions": np.full((*lead, 1), self.steps - 1),
        }
        return {n: self._value(np.ascontiguousarray(a), "cuda", 0) for n, a in arrays.items()}

    def by_graph(self) -> Floats:
        """Every pair from its second picture on, with the shared-prefix graph."""
        made = []
        for feeds in self.feeds:
            binding = self.session.io_binding()
            for name, value in feeds.items():
                binding.bind_ortvalue_input(name, value)
            for name in ("logits", "hidden", "key_values"):
                binding.bind_output(name, "cuda")
            self.session.run_with_iobinding(binding)
            hidden = binding.get_outputs()[1].numpy()
            made.append(hidden.reshape(-1, self.steps, hidden.shape[-1])[:, -1])
        return np.concatenate(made)

    def largest_difference(self) -> float:
        """Between the answers of the three ways.

        Raises:
            MeiqaError: it is too large.
        """
        wanted = self.from_scratch()
        found = max(
            float(np.abs(way() - wanted).max()) for way in (self.with_prefixes, self.by_graph)
        )
        if not found <= LARGEST_DIFFERENCE:
            raise MeiqaError(
                "the ways to compare do not agree, so their times mean nothing",
                seen=f"{found:.1e}",
                allowed=f"{LARGEST_DIFFERENCE:.0e}",
            )
        return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and print JSON; without a CUDA device, say so and give 2."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.compare")
    parser.add_argument("--neighbours", type=int, default=NEIGHBOURS)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--layers", type=int, default=36, help="fewer fit a smaller device")
    parser.add_argument("--format", choices=("json",), default="json")
    given = parser.parse_args(arguments)
    try:
        result = bench_gpu_compare(given.neighbours, given.rows, given.rounds, given.layers)
    except MeiqaError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
