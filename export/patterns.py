"""Distortion patterns → a small plain-ONNX graph in an engine package.

They make neither tokens nor keys, so they can be added to a package that has a memory already.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFilter
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional

from meiqa.engine.calibration import PatternCalibration
from meiqa.engine.images import ImageSource, fit_to_grid, load_pixels
from meiqa.engine.local import LocalModel
from meiqa.engine.manifest import PATTERNS, Graph, PatternGraph, Shape
from meiqa.engine.package import EnginePackage, file_digest
from meiqa.engine.runtime.decoder import GraphSession
from meiqa.engine.runtime.onnx import OnnxSession
from meiqa.errors import PackageCorrupted, PackageNotFound, UsageError
from meiqa.export.calibration import Pictures, Quantisation, observe, require_pictures
from meiqa.export.graphs import TorchSession, traced
from meiqa.export.verify import Feeds, require_parity

FILE = "patterns.safetensors"
"""Where a checkpoint has its patterns."""
RECORD = "record"
"""The entry of the file's metadata that holds everything but the weights, as JSON."""
LARGEST_DIFFERENCE = 1e-3
"""Between the graph and PyTorch, in points of the scale and of logits."""
SHARPNESS = 30.0
"""What cosines are multiplied by before the softmax over patterns, to begin with."""
CELLS_CHECKED = (1, 7, 36, 64)
MOST_PICTURES = 64
"""Pictures on which 8 bits are tried: on every other one ranges are observed, on the rest scores
are compared."""
LARGEST_MOVE = 0.03
"""Points by which 8 bits may move a score on average."""
GATE = "gate"
"""What the names of the layers begin with that stay in floats: 8 bits of the gate cost the hybrid
score .005 of its rank correlation, those of all other layers .0002."""
BLUR_PIXELS, JPEG_QUALITY, NOISE, DARKENED, PALED = 6.0, 5, 60.0, 0.25, 0.1


@dataclass(frozen=True)
class PatternConfig:
    """Shape of the patterns.

    Attributes:
        width: of a visual token.
        kinds: kinds of distortion, none included; count: patterns in the codebook.
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

    def features(self, tokens: Tensor) -> Tensor:
        """Turn tokens (…, T, D) into features of length 1 (…, T, F)."""
        described: Tensor = self.describe(functional.gelu(self.widen(self.norm(tokens))))
        return described / (described.square().sum(-1, keepdim=True) + 1e-6).sqrt()

    def score_alone(self, matches: Tensor) -> Tensor:
        """Score (…) by the length of the mean match; a match are the cosines above 0 (…, T, M)."""
        length = norm(matches.mean(-2)) * self.config.count**-0.5
        score: Tensor = self.alone[1] + 4.0 * self.alone[0] * length
        return score

    def comparable(self, tokens: Tensor) -> Tensor:
        """Turn tokens (…, T, D) into what is compared with the reference's cells (…, T, F)."""
        compared: Tensor = self.compare(functional.gelu(self.compare_widen(self.norm(tokens))))
        return compared

    def likeness(self, photo: Tensor, reference: Tensor) -> Tensor:
        """Compare cells (…, T, F) by MQAF's product of direction and length, up to 1 (…, T)."""
        of_photo, of_reference = norm(photo), norm(reference)
        cosine = (photo * reference).sum(-1) / (of_photo * of_reference)
        longer = torch.maximum(of_photo, of_reference)
        return cosine * (1.0 - (of_photo - of_reference).abs() / longer)

    def score_beside(self, likeness: Tensor) -> Tensor:
        """Score (…) by the likeness of cells (…, T)."""
        return self.beside[1] + self.beside[0] * likeness.mean(-1)

    def weight(self, photo: Tensor, reference: Tensor) -> Tensor:
        """Gate the FR score: its share (…), from the features of both (…, T, F)."""
        both = torch.cat([photo.mean(-2), reference.mean(-2)], -1)
        return torch.sigmoid(self.gate(functional.gelu(self.gate_hidden(both)))).squeeze(-1)

    def votes(self, cosines: Tensor) -> tuple[Tensor, Tensor]:
        """Let the nearest patterns vote for kinds, logits (…, T, K), and strengths (…, T)."""
        nearest = torch.softmax(self.sharpness * cosines, -1)
        return self.kinds(nearest), self.strengths(nearest).squeeze(-1)

    def changes(self, likeness: Tensor) -> Tensor:
        """Tell how strongly cells (…, T) differ from the reference's."""
        return self.changed[0] + self.changed[1] * (1.0 - likeness)

    def forward(self, tokens: Tensor, reference: Tensor) -> tuple[Tensor, ...]:
        """Turn tokens of photo and reference (T, D) into what `pattern_interface` names."""
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
    return (values.square().sum(-1) + 1e-6).sqrt()


@dataclass(frozen=True, eq=False)
class TrainedPatterns:
    """Patterns with what a package records of them.

    Attributes:
        source: SHA-256 of the checkpoint whose tower makes the tokens.
        kinds: names of the distortions, the first for none.
    """

    module: DistortionPatterns
    source: str
    kinds: tuple[str, ...]
    calibration: PatternCalibration
    report: dict[str, Any]

    @classmethod
    def load(cls, path: Path) -> TrainedPatterns:
        """Read weights in half precision, and everything else from the metadata."""
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


def pattern_interface(config: PatternConfig) -> Graph:
    """Describe the graph: tokens of photo and reference in; scores, kinds, strength, maps out."""
    tokens = ("cells", config.width)
    outputs: dict[str, Shape] = {"scores": (3,), "kinds": (config.kinds,), "strength": (1,)}
    outputs |= {"cells": ("cells",), "changes": ("cells",)}
    return Graph(f"{PATTERNS}.onnx", None, {"tokens": tokens, "reference": tokens}, outputs)


def pattern_graph(module: DistortionPatterns) -> ir.Model:
    weights = dict(module.named_parameters())
    return traced(module, pattern_interface(module.config), lambda name: weights[name].detach())


def add_patterns(
    package: Path, codebook: Path, pictures: Sequence[ImageSource] = ()
) -> EnginePackage:
    """Add distortion patterns to a package, in place of those that it has.

    Args:
        package: an engine package of the checkpoint that the patterns were trained for.
        codebook: a `patterns.safetensors`.
        pictures: photographs, which an INT8 package needs: its patterns are rounded, too.

    Raises:
        UsageError: the patterns are another checkpoint's, or pictures are missing.
        PackageNotFound, PackageCorrupted: one of both is not there or damaged, or the graph differs
            from PyTorch.
    """
    manifest = EnginePackage.open(package).manifest
    require_pictures(manifest.precision, pictures)
    taken = [fit_to_grid(load_pixels(p), manifest.image) for p in pictures[:MOST_PICTURES]]
    return write_patterns(TrainedPatterns.load(codebook), package, taken)


def write_patterns(
    trained: TrainedPatterns, folder: Path, pictures: Pictures = ()
) -> EnginePackage:
    """Write the graph of patterns into a package.

    With pictures, uint8 RGB on the tower's grid, the graph of an INT8 package is rounded to 8 bits.
    """
    package = EnginePackage.open(folder, verify=False)
    made_from = package.manifest.source["sha256"]
    if trained.source != made_from:
        raise UsageError(
            "these patterns were trained for another checkpoint",
            seen=f"{trained.source[:16]}… beside {made_from[:16]}…",
            hint="train them for this one: docs/reference-mode.md",
        )
    graph = pattern_interface(trained.module.config)
    unfinished = folder / f".{graph.file}"
    try:
        ir.save(pattern_graph(trained.module), unfinished)
        found = require_parity(
            PATTERNS,
            TorchSession(trained.module, graph),
            opened(unfinished, graph),
            pattern_feeds(trained.module.config.width),
            absolute=LARGEST_DIFFERENCE,
        )
        parity = {output: measured["difference"] for output, measured in found.items()}
        report = {**trained.report, "parity": parity}
        if pictures and package.manifest.precision == "int8":
            model = LocalModel.open(package)
            report["rounding"] = round_to_bytes(unfinished, graph, model, pictures)
        unfinished.replace(folder / graph.file)
    finally:
        unfinished.unlink(missing_ok=True)
    return package.rewritten(
        patterns=PatternGraph(
            graph=graph,
            sha256=file_digest(folder / graph.file),
            count=trained.module.config.count,
            kinds=trained.kinds,
            calibration=trained.calibration,
            report=report,
        )
    )


def opened(path: Path, graph: Graph) -> OnnxSession:
    return OnnxSession(path.parent, replace(graph, file=path.name), "cpu", None)


def pattern_feeds(width: int) -> Iterator[Feeds]:
    """Draw tokens of several numbers of cells."""
    rng = np.random.default_rng(0)
    for cells in CELLS_CHECKED:
        tokens, noise = rng.standard_normal((2, cells, width), np.float32)
        yield {"tokens": tokens, "reference": tokens + 0.3 * noise}


def round_to_bytes(
    path: Path, graph: Graph, model: LocalModel, pictures: Pictures
) -> dict[str, Any]:
    """Round a graph of patterns to 8 bits in place, unless that would move its scores.

    Returns:
        JSON-ready: `move` (mean difference of both scores from those in floats), `bits` (8 or 32).
    """

    def exercise(sessions: Mapping[str, GraphSession]) -> None:
        for feeds in calls_with(model, pictures[:MOST_PICTURES:2]):
            sessions[PATTERNS].run(feeds)

    files = {PATTERNS: path}
    quantisation = Quantisation(files, "int8", observe(files, exercise, "int8"))
    names = {layer.name for layer in quantisation.layers(PATTERNS)}
    plan = {name: "int8" for name in names if not name.startswith(GATE)}
    made = path.with_suffix(".int8")
    try:
        ir.save(quantisation.graph(PATTERNS, plan), made)
        sessions = opened(path, graph), opened(made, graph)
        moves = []
        for feeds in calls_with(model, pictures[1:MOST_PICTURES:2] or pictures):
            one, other = (session.run(feeds)["scores"] for session in sessions)
            moves.append(np.abs(one - other)[:2])  # the third is the gate's weight
        move = float(np.mean(moves))
        if move <= LARGEST_MOVE:
            made.replace(path)
        return {"move": move, "bits": 8 if move <= LARGEST_MOVE else 32}
    finally:
        made.unlink(missing_ok=True)


def calls_with(model: LocalModel, pictures: Pictures) -> Iterator[Feeds]:
    """Show each picture alone, and much worse versions beside it, so that ranges are wide."""
    for picture in pictures:
        reference = model.encode(picture).values
        yield {"tokens": reference, "reference": reference}
        for worse in worsened(picture):
            yield {"tokens": model.encode(worse).values, "reference": reference}


def worsened(picture: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    """Make a picture out of focus, compressed too much, noisy, dark, and pale."""
    image = Image.fromarray(picture)
    yield np.asarray(image.filter(ImageFilter.GaussianBlur(BLUR_PIXELS)))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=JPEG_QUALITY)
    yield np.asarray(Image.open(stream).convert("RGB"))
    noise = np.random.default_rng(picture.size).normal(0, NOISE, picture.shape)
    yield np.clip(picture + noise, 0, 255).astype(np.uint8)
    yield np.asarray(ImageEnhance.Brightness(image).enhance(DARKENED))
    yield np.asarray(ImageEnhance.Color(image).enhance(PALED))
