"""NIMA as published, one of the other scorers: MobileNet trained on people's votes on AVA."""

from __future__ import annotations

from pathlib import Path

import h5py  # type: ignore[import-untyped]
import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from benchmarks.scorers import OtherScorer
from meiqa.engine.images import Pixels
from meiqa.export.families.conv_hybrid import Overview
from training.backbone import begin_from_votes
from training.towers import conv_config, normalised

SIDE = 224


def nima(weights: Path) -> OtherScorer:
    """Open NIMA as published: a picture at 224 x 224, and the mean of ten grades of beauty."""
    eye = Overview(conv_config(16)).eval()
    begin_from_votes(eye, weights)
    with h5py.File(weights) as stored:
        kernel, bias = (
            torch.from_numpy(stored[f"dense_1/dense_1/{part}:0"][()]) for part in ("kernel", "bias")
        )

    @torch.no_grad()
    def judged(pixels: Pixels) -> float:
        image = Image.fromarray(pixels.array).resize((SIDE,) * 2, Image.Resampling.NEAREST)
        x = functional.relu6(eye.stem(normalised(torch.from_numpy(np.array(image))[None])))
        for block in eye.blocks:
            x = block(x)
        grades = (x.mean((2, 3)) @ kernel + bias).softmax(-1)
        return float(grades[0] @ torch.arange(1.0, 11.0))

    return judged
