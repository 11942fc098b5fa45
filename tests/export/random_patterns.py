"""Patterns of random weights for the tiny model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from meiqa.engine.manifest import IDENTITY, PatternCalibration
from meiqa.engine.package import EnginePackage

if TYPE_CHECKING:
    from meiqa.export.patterns import TrainedPatterns

CALIBRATION = PatternCalibration(
    hybrid=IDENTITY,
    alone=IDENTITY,
    alone_std=0.5,
    trusted_std=0.3,
    doubted_std=0.5,
    correlation=0.2,
    temperature=2.0,
)
KINDS = ("none", "blur", "noise", "JPEG compression")


def random_patterns(package: EnginePackage, *, source: str | None = None) -> TrainedPatterns:
    """Patterns for a package's tower, or for another one."""
    import torch

    from meiqa.export.patterns import DistortionPatterns, PatternConfig, TrainedPatterns

    with torch.random.fork_rng():
        torch.manual_seed(0)
        width = package.manifest.decoder.embed_width
        module = DistortionPatterns(
            PatternConfig(width, len(KINDS), count=40, hidden=16, features=8, gate=4)
        )
        torch.nn.init.normal_(module.kinds.weight, std=2.0)
        torch.nn.init.uniform_(module.strengths.weight, 0.0, 5.0)
        module.settle()
    return TrainedPatterns(
        module.eval(), source or package.manifest.source["sha256"], KINDS, CALIBRATION, {}
    )
