"""A model of a few thousand random weights with the architecture of the real one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from meiqa.engine.package import EnginePackage
from meiqa.export import package as packaging
from meiqa.export.checkpoint import Checkpoint
from meiqa.export.decoder import DecoderConfig
from meiqa.export.families.conv_hybrid import ConvHybridConfig
from meiqa.export.graphs import decoder_interface, vision_interface
from meiqa.export.package import Export, ExportOptions, export_package
from meiqa.export.verify import TorchSession
from meiqa.export.weights import give_weights
from meiqa.training.checkpoint import ConvHybridVlm, TrainedVlm, save_checkpoint
from meiqa.training.texts import corpus_of, train_tokenizer
from meiqa.training.towers import MEAN, STD

WIDTH = 64
STAGES = ((1, 8, 3, 1, 1), (2, 8, 3, 2, 2), (1, 16, 5, 2, 2), (1, 16, 3, 2, 2), (1, 16, 5, 2, 2))
MROPE_SECTION = (2, 3, 3)
TEXTS = [
    "Slight blur. The picture is soft and dark, with little noise. Overall poor quality.",
    "The picture is sharp and well exposed, with natural colour. Overall good quality.",
]


def make_checkpoint(seed: int = 0) -> TrainedVlm:
    """A random model."""
    tokenizer = train_tokenizer([*corpus_of([]), *TEXTS * 50])
    vision = ConvHybridConfig(hidden_size=WIDTH, stem_width=8, stages=STAGES, attention_blocks=1)
    text = DecoderConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=WIDTH,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        mrope_section=MROPE_SECTION,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = ConvHybridVlm(vision, text).eval()
        liven(model)
    return TrainedVlm(model, tokenizer, MEAN, STD)


def liven(model: ConvHybridVlm) -> None:
    """Draw weights under which pictures make a difference.

    With PyTorch's own the model repeats its last token, whatever it sees. Biases are positive, so
    that ReLU6 lets most values through, as in a trained tower.
    """
    for module in model.visual.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=0.25)
        elif isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
            torch.nn.init.uniform_(module.bias, 0.0, 0.5)
    for name, weight in model.language_model.named_parameters():
        torch.nn.init.normal_(weight, std=1.0 if "norm" in name else 0.25)


def save(folder: Path) -> Path:
    """Write the random model as a checkpoint."""
    save_checkpoint(make_checkpoint(), folder)
    return folder


def export_float(checkpoint: Path, out: Path, pictures: list[NDArray[np.uint8]]) -> EnginePackage:
    """Export in fp32."""
    return export_package(checkpoint, out, ExportOptions("fp32", pictures=pictures))


def export_from(
    float_package: EnginePackage,
    checkpoint: Path,
    out: Path,
    precision: str,
    pictures: list[NDArray[np.uint8]],
) -> EnginePackage:
    """Export in INT8 or INT4, taking the float graphs from a package, since tracing is slow."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Export, "write_graphs", lambda made: copy_graphs(float_package, made.folder))
        # Random weights have no grades worth keeping; the shipped package is held to the limit.
        patch.setitem(packaging.LARGEST_MOVES, precision, 1.0)
        return export_package(checkpoint, out, ExportOptions(precision, pictures=pictures))


def copy_graphs(package: EnginePackage, folder: Path) -> None:
    """Take the graphs of a package."""
    for graph in package.manifest.graphs.values():
        for name in graph.files:
            (folder / name).write_bytes((package.path / name).read_bytes())


def reference_sessions(checkpoint: Checkpoint) -> tuple[TorchSession, TorchSession]:
    """A checkpoint's vision tower and decoder in PyTorch."""
    tower, decoder = checkpoint.tower(), checkpoint.decoder()
    give_weights(tower, checkpoint.tower_weight, 1 << 30)
    give_weights(decoder, checkpoint.decoder_weight, 1 << 30)
    shape = checkpoint.decoder_shape
    return (
        TorchSession(tower, vision_interface(checkpoint.image, shape)),
        TorchSession(decoder, decoder_interface(shape)),
    )
