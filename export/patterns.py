"""Distortion patterns → a small plain-ONNX graph in an engine package.

    python -m meiqa.export.patterns training/default/patterns.safetensors PACKAGE --calibration DIR

In an INT8 package the graph is rounded to 8 bits, for which photographs are needed. `meiqa export`
does the same by itself where a checkpoint has patterns beside its weights. They make neither tokens
nor keys, so they can be added to a package that has a memory already.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional

from meiqa.engine.images import load_pixels
from meiqa.engine.judging import fitted_to
from meiqa.engine.local import LocalVlm
from meiqa.engine.manifest import PATTERNS, Graph, PatternCalibration, PatternGraph
from meiqa.engine.package import EnginePackage, file_digest
from meiqa.engine.runtime.onnx import OnnxSession, open_sessions
from meiqa.errors import PackageCorrupted, PackageNotFound, UsageError
from meiqa.export.commands import run_command
from meiqa.export.graphs import EXAMPLE_SIZES, LARGEST_GRID, Interface, traced
from meiqa.export.pattern_bits import MOST_PICTURES, Pictures, rounded
from meiqa.export.pictures import pictures_in
from meiqa.export.verify import TorchSession, largest_differences

FILE = "patterns.safetensors"
"""Where a checkpoint has its patterns."""
RECORD = "record"
"""The entry of the file's metadata that holds everything but the weights, as JSON."""
LARGEST_DIFFERENCE = 1e-3
"""Between the graph and PyTorch, in points of the scale and of logits."""
SHARPNESS = 30.0
"""What cosines are multiplied by before the softmax over patterns, to begin with."""
CELLS_CHECKED = (1, 7, 36, 64)


@dataclass(frozen=True)
class PatternConfig:
    """Shape of the patterns.

    Attributes:
        width: of a visual token.
        kinds: kinds of distortion, none included.
        count: patterns in the codebook.
        hidden: width between tokens and features; features: width of what is matched, and of what
            is compared with the reference.
        gate: width of the gate's hidden layer.
    """

    width: int
    kinds: int
    count: int = 1024
    hidden: int = 256
    features: int = 128
    gate: int = 64


class DistortionPatterns(nn.Module):
    """A codebook of patterns, and how what matches them becomes scores, kinds and strengths.

    All methods take any number of leading axes. T cells, D the tokens' width, M patterns.
    """

    def __init__(self, config: PatternConfig) -> None:
        super().__init__()
        self.config = c = config
        self.norm = nn.LayerNorm(c.width)
        self.widen = nn.Linear(c.width, c.hidden)
        self.describe = nn.Linear(c.hidden, c.features)
        self.compare_widen = nn.Linear(c.width, c.hidden)
        self.compare = nn.Linear(c.hidden, c.features)
        self.patterns = nn.Linear(c.features, c.count, bias=False)
        self.kinds = nn.Linear(c.count, c.kinds, bias=False)
        self.strengths = nn.Linear(c.count, 1, bias=False)
        self.gate_hidden = nn.Linear(2 * c.features, c.gate)
        self.gate = nn.Linear(c.gate, 1)
        self.sharpness = nn.Parameter(torch.tensor(SHARPNESS))
        self.alone = nn.Parameter(torch.tensor([3.0, 0.0]))
        self.beside = nn.Parameter(torch.tensor([4.0, 0.6]))
        self.changed = nn.Parameter(torch.tensor([0.0, 5.0]))
        nn.init.normal_(self.patterns.weight)
        nn.init.zeros_(self.kinds.weight)
        nn.init.constant_(self.strengths.weight, 2.0)

    def settle(self) -> None:
        """Give all patterns length 1, for matches to be cosines; to be called while training."""
        with torch.no_grad():
            self.patterns.weight.copy_(functional.normalize(self.patterns.weight, dim=-1))

    def features(self, tokens: Tensor) -> Tensor:
        """Tokens (…, T, D) → features of length 1 (…, T, F)."""
        described: Tensor = self.describe(functional.gelu(self.widen(self.norm(tokens))))
        return described / (described.square().sum(-1, keepdim=True) + 1e-6).sqrt()

    def score_alone(self, matches: Tensor) -> Tensor:
        """NR score (…): the length of the mean match; a match are the cosines above 0 (…, T, M)."""
        length = norm(matches.mean(-2)) * self.config.count**-0.5
        score: Tensor = self.alone[1] + 4.0 * self.alone[0] * length
        return score

    def comparable(self, tokens: Tensor) -> Tensor:
        """Tokens (…, T, D) → what of each cell is compared with the reference's (…, T, F)."""
        compared: Tensor = self.compare(functional.gelu(self.compare_widen(self.norm(tokens))))
        return compared

    def likeness(self, photo: Tensor, reference: Tensor) -> Tensor:
        """Likeness (…, T) of cells (…, T, F), up to 1: MQAF's product of direction and length."""
        of_photo, of_reference = norm(photo), norm(reference)
        cosine = (photo * reference).sum(-1) / (of_photo * of_reference)
        longer = torch.maximum(of_photo, of_reference)
        return cosine * (1.0 - (of_photo - of_reference).abs() / longer)

    def score_beside(self, likeness: Tensor) -> Tensor:
        """FR score (…) from the likeness of cells (…, T)."""
        return self.beside[1] + self.beside[0] * likeness.mean(-1)

    def weight(self, photo: Tensor, reference: Tensor) -> Tensor:
        """The gate (…): the share of the FR score, from the features of both (…, T, F)."""
        both = torch.cat([photo.mean(-2), reference.mean(-2)], -1)
        return torch.sigmoid(self.gate(functional.gelu(self.gate_hidden(both)))).squeeze(-1)

    def votes(self, cosines: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the kinds (…, T, K) and strengths (…, T), as the nearest patterns vote."""
        nearest = torch.softmax(self.sharpness * cosines, -1)
        return self.kinds(nearest), self.strengths(nearest).squeeze(-1)

    def changes(self, likeness: Tensor) -> Tensor:
        """How strongly cells (…, T) differ from the reference's."""
        return self.changed[0] + self.changed[1] * (1.0 - likeness)

    def forward(self, tokens: Tensor, reference: Tensor) -> tuple[Tensor, ...]:
        """Tokens of photo and reference (T, D) → scores (NR, FR, gate), kinds (K,), strength (1,),
        cells (T,) and changes (T,)."""
        of_photo, of_reference = self.features(tokens), self.features(reference)
        cosines = self.patterns(of_photo)
        likeness = self.likeness(self.comparable(tokens), self.comparable(reference))
        scores = [
            self.score_alone(functional.relu(cosines)),
            self.score_beside(likeness),
            self.weight(of_photo, of_reference),
        ]
        kinds, strengths = self.votes(cosines)
        return (
            torch.stack(scores),
            kinds.mean(-2),
            strengths.mean(-1, keepdim=True),
            strengths,
            self.changes(likeness),
        )


def norm(values: Tensor) -> Tensor:
    """Length along the last axis, never 0."""
    return (values.square().sum(-1) + 1e-6).sqrt()


@dataclass(frozen=True, eq=False)
class TrainedPatterns:
    """Patterns with what a package records of them.

    Attributes:
        module: their weights.
        source: SHA-256 of the checkpoint whose tower makes the tokens.
        kinds: names of the distortions, the first for none.
        calibration: see its class.
        report: what was measured.
    """

    module: DistortionPatterns
    source: str
    kinds: tuple[str, ...]
    calibration: PatternCalibration
    report: dict[str, Any]

    def save(self, path: Path) -> None:
        """Write weights in half precision, and everything else as metadata."""
        record = {
            "config": asdict(self.module.config),
            "source": self.source,
            "kinds": self.kinds,
            "calibration": asdict(self.calibration),
            "report": self.report,
        }
        weights = {n: w.half().contiguous() for n, w in self.module.state_dict().items()}
        save_file(weights, path, metadata={"format": "pt", RECORD: json.dumps(record)})

    @classmethod
    def load(cls, path: Path) -> TrainedPatterns:
        """Read what `save` wrote.

        Raises:
            PackageNotFound, PackageCorrupted: it is not there, or not such a file.
        """
        if not path.is_file():
            raise PackageNotFound(
                "there are no distortion patterns", seen=path, hint="see docs/reference-mode.md"
            )
        try:
            with safe_open(path, "pt") as file:
                record = json.loads(file.metadata()[RECORD])
                names = list(file.keys())  # it can't be iterated over
                weights = {name: file.get_tensor(name).float() for name in names}
            module = DistortionPatterns(PatternConfig(**record["config"]))
            module.load_state_dict(weights)
        except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise PackageCorrupted(f"{path} holds no distortion patterns", seen=error) from error
        return cls(
            module.eval(),
            record["source"],
            tuple(record["kinds"]),
            PatternCalibration.from_dict(record["calibration"]),
            record["report"],
        )


def pattern_interface(config: PatternConfig) -> Interface:
    """Tokens of photo and reference in; scores, kinds, strength and maps out."""
    tokens = ("cells", config.width)
    return Interface(
        {"tokens": tokens, "reference": tokens},
        {
            "scores": (3,),
            "kinds": (config.kinds,),
            "strength": (1,),
            "cells": ("cells",),
            "changes": ("cells",),
        },
    )


def pattern_graph(module: DistortionPatterns) -> ir.Model:
    """Trace the patterns."""
    interface = pattern_interface(module.config)
    cells = EXAMPLE_SIZES["h"] * EXAMPLE_SIZES["w"]
    example = {name: torch.zeros(cells, module.config.width) for name in interface.inputs}
    limits = {"cells": Dim("cells", min=1, max=LARGEST_GRID)}
    weights = dict(module.named_parameters())
    return traced(module, example, limits, interface, lambda name: weights[name].detach())


def add_patterns(trained: TrainedPatterns, folder: Path, pictures: Pictures = ()) -> EnginePackage:
    """Write the graph of patterns into a package, in place of those that it has.

    Args:
        pictures: uint8 RGB on the tower's grid. With them the graph of an INT8 package is rounded
            to 8 bits; without, or in another package, it stays in floats.

    Raises:
        UsageError: they were trained for another checkpoint's tower.
        PackageCorrupted: the graph differs from PyTorch.
    """
    package = EnginePackage.open(folder, verify=False)
    made_from = package.manifest.source["sha256"]
    if trained.source != made_from:
        raise UsageError(
            "these patterns were trained for another checkpoint",
            seen=f"{trained.source[:16]}… beside {made_from[:16]}…",
            hint="train them for this one: docs/reference-mode.md",
        )
    interface = pattern_interface(trained.module.config)
    graph = Graph(f"{PATTERNS}.onnx", None, interface.inputs, interface.outputs)
    unfinished = folder / f".{graph.file}"
    try:
        ir.save(pattern_graph(trained.module), unfinished)
        parity = checked(trained.module, interface, unfinished, graph)
        report = {**trained.report, "parity": parity}
        if pictures and package.manifest.precision == "int8":
            vlm = LocalVlm(package, *open_sessions(package, "cpu", None))
            report["rounding"] = rounded(unfinished, graph, vlm, pictures)
        unfinished.replace(folder / graph.file)
    finally:
        unfinished.unlink(missing_ok=True)
    return package.with_patterns(
        PatternGraph(
            graph=graph,
            sha256=file_digest(folder / graph.file),
            count=trained.module.config.count,
            kinds=trained.kinds,
            calibration=trained.calibration,
            report=report,
        )
    )


def checked(
    module: DistortionPatterns, interface: Interface, path: Path, graph: Graph
) -> dict[str, float]:
    """Compare a graph with PyTorch on numbers of cells that tracing has not seen.

    Raises:
        PackageCorrupted: they differ.
    """
    session = OnnxSession(path.parent, replace(graph, file=path.name), "cpu", None)
    found = largest_differences(
        TorchSession(module, interface), session, pattern_feeds(module.config.width)
    )
    for output, (difference, _) in found.items():
        if not difference <= LARGEST_DIFFERENCE:
            raise PackageCorrupted(
                f"the exported patterns differ from PyTorch in {output}",
                seen=f"{difference:.1e}",
                allowed=f"{LARGEST_DIFFERENCE:.0e}",
            )
    return {output: difference for output, (difference, _) in found.items()}


def pattern_feeds(width: int) -> Iterator[dict[str, np.ndarray]]:
    """Random tokens of several numbers of cells."""
    rng = np.random.default_rng(0)
    for cells in CELLS_CHECKED:
        tokens, noise = rng.standard_normal((2, cells, width), np.float32)
        yield {"tokens": tokens, "reference": tokens + 0.3 * noise}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m meiqa.export.patterns", description=__doc__)
    parser.add_argument("patterns", type=Path, help=f"a {FILE}")
    parser.add_argument("package", type=Path, help="the engine package they are added to")
    parser.add_argument(
        "--calibration", type=Path, metavar="DIR", help="photographs; an INT8 package needs them"
    )
    given = parser.parse_args()
    manifest = EnginePackage.open(given.package).manifest
    if manifest.precision == "int8" and given.calibration is None:
        raise UsageError(
            "int8 needs photographs to calibrate on",
            seen="none",
            hint="give a folder with some dozens of them: --calibration DIR",
        )
    pictures: Pictures = ()
    if given.calibration is not None:
        files = pictures_in(given.calibration, MOST_PICTURES)
        pictures = [fitted_to(load_pixels(file), manifest.image) for file in files]
    package = add_patterns(TrainedPatterns.load(given.patterns), given.package, pictures)
    made = package.manifest.patterns
    assert made is not None
    print(f"{package.path}: {PATTERNS}.onnx added, {made.report.get('rounding', 'in floats')}")


if __name__ == "__main__":
    run_command(main)
