"""Cell statistics of prepared sets, computed once, since convolutions stay as they are."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch

from meiqa.export.families.conv_hybrid import ConvHybridTower
from training.data import Photograph, PhotographSet
from training.towers import ConvTower, normalised

CONVOLUTIONS = ("stem.", "stages.", "overview.")
"""What the tower's weights begin with that statistics are made of; the rest reads them."""


@dataclass(frozen=True)
class CellSet:
    """Cell statistics (N, h, w, F) of photographs."""

    features: np.ndarray
    photographs: tuple[Photograph, ...]

    def window(
        self, index: int, side: tuple[int, int], at: np.ndarray, *, mirrored: bool
    ) -> np.ndarray:
        """A window (h * w, F) of one photograph, `at` (2,) in 0-1.

        Cells are texture: a photograph smaller than the window is continued by its mirror images,
        and a mirrored one's cells are those of the photograph in another order.
        """
        view: np.ndarray = self.features[index]
        view = view[:, ::-1] if mirrored else view
        lacking = [(0, max(0, s - n)) for n, s in zip(view.shape[:2], side, strict=True)]
        view = np.pad(view, [*lacking, (0, 0)], mode="symmetric")
        top, left = (at * (np.array(view.shape[:2]) - side + 1)).astype(int)
        window: np.ndarray = view[top : top + side[0], left : left + side[1]]
        return window.reshape(side[0] * side[1], -1)


def cells_digest(tower: ConvHybridTower, records: Path) -> str:
    """What cell statistics depend on: the tower's convolutions, and the records."""
    digest = hashlib.sha256(records.read_bytes())
    for name, value in tower.state_dict().items():
        if name.startswith(CONVOLUTIONS):
            digest.update(name.encode())
            # In the precision in which a stage hands a tower on to the next, which sees the same.
            # Zeros have a sign, which a moving average may lose.
            digest.update((value.half().cpu().contiguous() + 0.0).numpy().tobytes())
    return digest.hexdigest()[:12]


Drawn: TypeAlias = tuple[np.ndarray, Photograph]
"""A window (h * w, F) and what is known of its photograph."""


@torch.no_grad()
def cached_cells(tower: ConvTower, work: Path, name: str) -> CellSet:
    """Cell statistics of a prepared set, computed once for this tower."""
    photographs = PhotographSet.load(work, name)
    path = work / f"cells-{name}-{cells_digest(tower, work / f'{name}.jsonl')}.npy"
    if not path.exists():
        cell, device = tower.config.cell_pixels, tower.embed.weight.device
        count, height, width = photographs.pixels.shape[:3]
        shape = (count, height // cell, width // cell, tower.statistics_width)
        made = np.lib.format.open_memmap(
            path.with_suffix(".tmp"), mode="w+", dtype=np.float16, shape=shape
        )
        for start in range(0, count, 8):
            pixels = torch.from_numpy(np.array(photographs.pixels[start : start + 8])).to(device)
            made[start : start + 8] = tower.seen(normalised(pixels)).float().cpu().numpy()
            if start % 800 == 0:
                print(f"cells of {name}: {start} of {count}", flush=True)
        made.flush()
        path.with_suffix(".tmp").rename(path)
    return CellSet(np.load(path, mmap_mode="r"), photographs.photographs)
