"""A graph is taken for right where rounding is all that differs, and refused where it is wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from meiqa.engine.runtime.decoder import Array
from meiqa.errors import PackageCorrupted
from meiqa.export.decoder import DecoderConfig, SharedPrefixDecoder
from meiqa.export.graphs import TorchSession, decoder_interface, traced
from meiqa.export.layers import save_graph
from meiqa.export.package import ABSOLUTE, RELATIVE
from meiqa.export.verify import Feeds, PiecewiseSession, decoder_feeds, require_parity

CONFIG = DecoderConfig(
    vocab_size=211,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=2,
    mrope_section=(1, 1, 2),
    rope_theta=1e6,
)
OUTLIERS = (5, 40)
"""Channels of the residual stream that are huge in all tokens, as in trained decoders."""
MASSIVE = 100.0


def decoder_like_a_trained_one() -> SharedPrefixDecoder:
    """Random weights of many layers, with outlier channels and massive activations."""
    decoder = SharedPrefixDecoder(CONFIG).eval()
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        for name, weight in decoder.named_parameters():
            torch.nn.init.normal_(weight, std=1.0 if "norm" in name else 0.1)
        decoder.layers[0].mlp.down_proj.weight[list(OUTLIERS)] *= MASSIVE
        decoder.layers[0].self_attn.k_proj.bias *= 100.0  # Qwen2's reach some hundreds
    return decoder


@pytest.fixture(scope="module")
def right() -> SharedPrefixDecoder:
    return decoder_like_a_trained_one()


@pytest.fixture(scope="module")
def graph(right: SharedPrefixDecoder, tmp_path_factory: pytest.TempPathFactory) -> PiecewiseSession:
    path = tmp_path_factory.mktemp("graph") / "decoder.onnx"
    weights = right.state_dict()
    save_graph(traced(right, decoder_interface(CONFIG.shape), weights.__getitem__), path)
    return PiecewiseSession(path)


def compare(decoder: SharedPrefixDecoder, graph: PiecewiseSession) -> dict[str, dict[str, float]]:
    """Verify the graph as an export in single precision does."""
    reference = TorchSession(decoder, decoder_interface(CONFIG.shape))
    feeds = decoder_feeds(CONFIG.shape)
    return require_parity(
        "decoder", reference, graph, feeds, absolute=ABSOLUTE, relative=RELATIVE["fp32"]
    )


def test_massive_activations_do_not_refuse_a_right_graph(
    right: SharedPrefixDecoder, graph: PiecewiseSession
) -> None:
    hidden = np.abs(graph.run(next(decoder_feeds(CONFIG.shape)))["hidden"])
    assert hidden.max() > 50 * np.median(hidden)
    for seen in compare(right, graph).values():
        assert seen["difference"] <= 0.2 * max(ABSOLUTE, RELATIVE["fp32"] * seen["of"])


def swap_rotary_axes(decoder: SharedPrefixDecoder) -> None:
    decoder.rotary_frequencies.copy_(decoder.rotary_frequencies[[0, 2, 1]])


def forget_a_bias(decoder: SharedPrefixDecoder) -> None:
    decoder.layers[3].self_attn.q_proj.bias.zero_()


def exchange_a_layer(decoder: SharedPrefixDecoder) -> None:
    decoder.layers[4].load_state_dict(decoder.layers[3].state_dict())


def exchange_a_head(decoder: SharedPrefixDecoder) -> None:
    width = CONFIG.head_dim
    rows = decoder.layers[5].self_attn.q_proj.weight
    rows[:width] = rows[width : 2 * width].clone()


def exchange_a_word(decoder: SharedPrefixDecoder) -> None:
    decoder.lm_head.weight[7] = decoder.lm_head.weight[8]


@pytest.mark.parametrize(
    "fault", [swap_rotary_axes, forget_a_bias, exchange_a_layer, exchange_a_head, exchange_a_word]
)
def test_a_wrong_graph_is_refused(
    right: SharedPrefixDecoder,
    graph: PiecewiseSession,
    fault: Callable[[SharedPrefixDecoder], None],
) -> None:
    wrong = deepcopy(right)
    with torch.no_grad():
        fault(wrong)
    with pytest.raises(PackageCorrupted, match="differs from PyTorch in"):
        compare(wrong, graph)


class OneLess:
    """The graph with a wrong mask: the last token of each prefix isn't seen."""

    def __init__(self, graph: PiecewiseSession) -> None:
        self._graph = graph

    def run(self, inputs: Mapping[str, Array]) -> Mapping[str, NDArray[np.float32]]:
        lengths = np.maximum(inputs["prefix_lengths"] - 1, 0)
        return self._graph.run({**inputs, "prefix_lengths": lengths})


def test_a_wrong_mask_is_refused(right: SharedPrefixDecoder, graph: PiecewiseSession) -> None:
    with pytest.raises(PackageCorrupted, match="differs from PyTorch in"):
        compare(right, OneLess(graph))  # type: ignore[arg-type]


def test_a_graph_that_is_not_finite_is_refused(
    right: SharedPrefixDecoder, graph: PiecewiseSession
) -> None:
    class Overflowing:
        def run(self, inputs: Feeds) -> dict[str, NDArray[np.float32]]:
            made = graph.run(inputs)
            made["hidden"][0, 0, 0, 0] = np.nan
            return made

    with pytest.raises(PackageCorrupted, match="in hidden; got nan"):
        compare(right, Overflowing())  # type: ignore[arg-type]
