"""A model of a few thousand random weights with the architecture of the real one.

What is made of it lies in tests/data/tiny, so that only the exporter's own tests need PyTorch:
`python -m tests.export.make_tiny` writes it anew.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from meiqa.engine.calibration import IDENTITY, PatternCalibration
from meiqa.engine.package import EnginePackage
from meiqa.export.checkpoint import Checkpoint, give_weights
from meiqa.export.decoder import DecoderConfig
from meiqa.export.families.conv_hybrid import ConvHybridConfig
from meiqa.export.graphs import TorchSession, decoder_interface, vision_interface
from meiqa.export.package import Export, ExportOptions, export_package
from meiqa.export.patterns import (
    DistortionPatterns,
    PatternConfig,
    TrainedPatterns,
    write_patterns,
)
from tests.engine.samples import SIZES, copy_graphs, picture
from training.checkpoint import ConvHybridVlm, TrainedVlm, save_checkpoint
from training.patterns import settle
from training.texts import corpus_of, train_tokenizer
from training.towers import MEAN, STD

COMMITTED_WIDTH, WIDTH, KERNEL_WIDTH = 32, 64, 128
"""Widths of the model whose files are committed, of the one that the exporter's tests export, as
errors of rounding and overheads have their usual shares only in a wider one, and of one that the
native kernel runs."""
MROPE_SECTIONS = {32: (1, 1, 2), 64: (2, 3, 3), 128: (4, 6, 6)}
STAGES = ((1, 8, 3, 1, 1), (2, 8, 3, 2, 2), (1, 16, 5, 2, 2), (1, 16, 3, 2, 2), (1, 16, 5, 2, 2))
TEXTS = [
    "Slight blur. The picture is soft and dark, with little noise. Overall poor quality.",
    "The picture is sharp and well exposed, with natural colour. Overall good quality.",
]
PATTERN_CALIBRATION = PatternCalibration(
    hybrid=IDENTITY,
    alone=IDENTITY,
    alone_std=0.5,
    trusted_std=0.3,
    doubted_std=0.5,
    correlation=0.2,
    temperature=2.0,
)
KINDS = ("none", "blur", "noise", "JPEG compression")


def make_checkpoint(width: int = WIDTH, seed: int = 0) -> TrainedVlm:
    """A random model."""
    tokenizer = train_tokenizer([*corpus_of([]), *TEXTS * 50])
    vision = ConvHybridConfig(hidden_size=width, stem_width=8, stages=STAGES, attention_blocks=1)
    text = DecoderConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=width,
        intermediate_size=width * 3 // 2,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        mrope_section=MROPE_SECTIONS[width],
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
    spread = 2 * model.language_model.config.hidden_size**-0.5
    for module in model.visual.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=spread)
        elif isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
            torch.nn.init.uniform_(module.bias, 0.0, 0.5)
    for name, weight in model.language_model.named_parameters():
        torch.nn.init.normal_(weight, std=1.0 if "norm" in name else spread)


def write_models(folder: Path) -> None:
    """Write the checkpoint, its fp32 and INT8 packages, and what patterns add to the former."""
    pictures = [picture(seed, size) for seed, size in enumerate(SIZES)]
    checkpoint = folder / "checkpoint"
    save_checkpoint(make_checkpoint(COMMITTED_WIDTH), checkpoint)
    (checkpoint / "model.safetensors").chmod(0o644)
    package = export_float(checkpoint, folder / "fp32", pictures)
    export_from(package, checkpoint, folder / "int8", "int8", pictures)

    patterned = folder / "patterned"
    shutil.copytree(package.path, patterned)
    write_patterns(random_patterns(package), patterned)
    for name in package.manifest.files:
        (patterned / name).unlink()


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
        chosen = ExportOptions(precision, pictures=pictures, largest_move=1.0)
        return export_package(checkpoint, out, chosen)


def reference_sessions(checkpoint: Checkpoint) -> tuple[TorchSession, TorchSession]:
    """A checkpoint's vision tower and decoder in PyTorch."""
    tower, decoder = checkpoint.tower(), checkpoint.decoder()
    give_weights(tower, checkpoint.tower_weight, 1 << 30)
    give_weights(decoder, checkpoint.decoder_weight, 1 << 30)
    shape = checkpoint.text.shape
    return (
        TorchSession(tower, vision_interface(checkpoint.image, shape)),
        TorchSession(decoder, decoder_interface(shape)),
    )


def random_patterns(package: EnginePackage, *, source: str | None = None) -> TrainedPatterns:
    """Patterns of random weights for a package's tower, or for another one."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        width = package.manifest.decoder.embed_width
        module = DistortionPatterns(
            PatternConfig(width, len(KINDS), count=40, hidden=16, features=8, gate=4)
        )
        torch.nn.init.normal_(module.kinds.weight, std=2.0)
        torch.nn.init.uniform_(module.strengths.weight, 0.0, 5.0)
        settle(module)
    made_for = source or package.manifest.source["sha256"]
    return TrainedPatterns(module.eval(), made_for, KINDS, PATTERN_CALIBRATION, {})
