"""The manifest of an engine package: what its records hold, and what is refused.

Its digest names everything that makes visual tokens and keys, so a memory can tell whether it was
made by this package; the calibration is not part of it, since it is fitted afterwards.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from meiqa.engine.calibration import (
    COUNT,
    COUNT_OR_NONE,
    FINITE,
    NOT_NEGATIVE,
    POSITIVE,
    SCORE_HEADS,
    YES_OR_NO,
    Calibration,
    PatternCalibration,
    Record,
    ScoreHead,
)
from meiqa.engine.prompts import PromptFamily
from meiqa.errors import PackageCorrupted, SchemaUnsupported

SCHEMA = 2
MANIFEST = "manifest.json"
GRAPHS = ("vision", "decoder")
PATTERNS = "patterns"
"""The graph that a package may have beside these."""
DATA_FILES = ("embedding.npy", "key_projection.npy", "tokenizer.json")
PRECISIONS = ("fp32", "fp16", "int8", "int4")
DEVICES = ("cpu", "cuda", "tensorrt")

Shape = tuple[int | str, ...]
"""Extent of each axis; a name stands for a dynamic one."""
Profile = Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
"""Least, usual and greatest shape of each input."""


@dataclass(frozen=True)
class ImageProcessing(Record):
    """How pixels become patches.

    Attributes:
        patch_size: side of a patch in pixels; merge_size: side of a visual token in patches.
        min_pixels, max_pixels: bounds of the area that the vision tower sees.
        mean, std: normalisation of each channel, for pixels scaled to 0-1.
        pad_to_grid: whether a photo less than a token from whole tokens keeps its pixels as they
            are, trimmed or continued by its mirror image, instead of being resized.
        tile_pixels: side of the square tiles in which the tower sees a photo; 0 where it sees it
            as one. tilings: rows and columns of tiles that a photo may be cut into.
    """

    later = ("pad_to_grid", "tile_pixels", "tilings")

    patch_size: int = field(metadata=COUNT)
    merge_size: int = field(metadata=COUNT)
    min_pixels: int = field(metadata=COUNT)
    max_pixels: int = field(metadata=COUNT)
    mean: tuple[float, float, float] = field(metadata={**FINITE, "count": 3})
    std: tuple[float, float, float] = field(metadata={**POSITIVE, "count": 3})
    pad_to_grid: bool = field(default=False, metadata=YES_OR_NO)
    tile_pixels: int = field(default=0, metadata=COUNT_OR_NONE)
    tilings: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.tile_pixels) != bool(self.tilings):
            raise PackageCorrupted(
                "the manifest does not say how photos are cut into tiles",
                seen=f"tile_pixels {self.tile_pixels}, tilings {self.tilings}",
                allowed="both, or neither",
            )
        if self.min_pixels > self.max_pixels:
            raise PackageCorrupted(
                "the manifest's bounds of the area are swapped",
                seen=f"min_pixels {self.min_pixels}, max_pixels {self.max_pixels}",
                allowed="min_pixels up to max_pixels",
            )

    @cached_property
    def cell_pixels(self) -> int:
        """Side of the square of pixels behind one visual token."""
        return self.patch_size * self.merge_size


@dataclass(frozen=True)
class DecoderShape(Record):
    """What the host has to know of the decoder.

    Attributes:
        layers, kv_heads, head_dim: of its keys and values.
        deepstack: features of `hidden_size` that follow a visual token in its row; they enter
            behind the first layers (Qwen3-VL).
        state_layers, state_width: layers that keep a state instead of keys and values, and its
            values (Qwen3.5).
    """

    later = ("state_layers", "state_width")

    layers: int = field(metadata=COUNT)
    kv_heads: int = field(metadata=COUNT)
    head_dim: int = field(metadata=COUNT)
    hidden_size: int = field(metadata=COUNT)
    vocab_size: int = field(metadata=COUNT)
    deepstack: int = field(metadata=COUNT_OR_NONE)
    state_layers: int = field(default=0, metadata=COUNT_OR_NONE)
    state_width: int = field(default=0, metadata=COUNT_OR_NONE)

    @property
    def embed_width(self) -> int:
        return self.hidden_size * (1 + self.deepstack)


@dataclass(frozen=True)
class Graph(Record):
    """One ONNX file with its interface, and maybe a second one with its weights."""

    file: str
    weights: str | None
    inputs: Mapping[str, Shape]
    outputs: Mapping[str, Shape]

    def __post_init__(self) -> None:
        named = isinstance(self.file, str) and isinstance(self.weights, str | None)
        if not (named and all(map(_are_ports, (self.inputs, self.outputs)))):
            raise PackageCorrupted(
                "a graph in the manifest does not say its files, inputs and outputs",
                seen=repr(asdict(self)),
                allowed="file names, and shapes by name",
            )

    @property
    def files(self) -> tuple[str, ...]:
        return (self.file,) if self.weights is None else (self.file, self.weights)


def _are_ports(ports: object) -> bool:
    return isinstance(ports, Mapping) and all(
        isinstance(name, str)
        and isinstance(shape, list | tuple)
        and all(isinstance(axis, int | str) for axis in shape)
        for name, shape in ports.items()
    )


@dataclass(frozen=True)
class PatternGraph(Record):
    """The distortion patterns: a graph over visual tokens, with what is needed to read it.

    It makes neither tokens nor keys, so it is not part of the package's digest.

    Attributes:
        count: patterns in the codebook.
        kinds: names of the distortions, the first for none.
        report: what was measured when it was made.
    """

    graph: Graph = field(metadata={"part": Graph})
    sha256: str
    count: int = field(metadata=COUNT)
    kinds: tuple[str, ...]
    calibration: PatternCalibration = field(metadata={"part": PatternCalibration})
    report: Mapping[str, Any] = field(metadata={"as_it_is": True})


@dataclass(frozen=True)
class TensorRtEngine(Record):
    """A graph compiled for one kind of GPU by one version of TensorRT.

    Attributes:
        file: path below the package; sha256: its digest.
        runtime: "tensorrt" or "tensorrt_rtx"; version: of that runtime.
        compute_capability: of the GPUs it runs on, as "8.9".
    """

    graph: str
    file: str
    sha256: str
    runtime: str
    version: str
    compute_capability: str
    precision: str
    profile: Profile
    size_bytes: int = field(metadata=COUNT)
    build_s: float = field(metadata=NOT_NEGATIVE)

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(len(shapes) != 3 for shapes in self.profile.values()):
            raise PackageCorrupted(
                "an engine in the manifest does not say which shapes it accepts",
                seen=repr(self.profile),
                allowed="the least, usual and greatest shape of each input",
            )


@dataclass(frozen=True)
class Manifest(Record):
    """Everything that is known about a package.

    Attributes:
        architecture: class name in the source checkpoint.
        source: name and SHA-256 of the checkpoint's weights.
        graphs: "vision" and "decoder".
        report: what was measured when the export was verified.
        files: SHA-256 of every file but the manifest, the engines and the patterns.
        patterns: None in a package without a reference mode.
        score_head: what makes the first score unless another is asked for.
        ends: tokens beside the prompt family's `stop` that end a turn of this model.
        bf16: whether the decoder may multiply floats in bf16 where a processor can: grades were
            measured so, and move no more than the export allowed.
    """

    later = ("patterns", "score_head", "ends", "bf16")

    architecture: str
    source: Mapping[str, str]
    precision: str
    graphs: Mapping[str, Graph] = field(metadata={"parts": Graph})
    image: ImageProcessing = field(metadata={"part": ImageProcessing})
    decoder: DecoderShape = field(metadata={"part": DecoderShape})
    prompt: PromptFamily = field(metadata={"part": PromptFamily})
    calibration: Calibration = field(metadata={"part": Calibration})
    report: Mapping[str, Any] = field(metadata={"as_it_is": True})
    files: Mapping[str, str]
    engines: tuple[TensorRtEngine, ...] = field(default=(), metadata={"parts": TensorRtEngine})
    patterns: PatternGraph | None = field(default=None, metadata={"part": PatternGraph})
    score_head: ScoreHead = "text"
    ends: tuple[str, ...] = ()
    bf16: bool = field(default=False, metadata=YES_OR_NO)

    @property
    def every_graph(self) -> Mapping[str, Graph]:
        """All graphs by name, that of the patterns included."""
        extra = {} if self.patterns is None else {PATTERNS: self.patterns.graph}
        return {**self.graphs, **extra}

    def to_json(self) -> str:
        """Write manifest.json."""
        return json.dumps({"schema": SCHEMA, **asdict(self)}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Read manifest.json; SchemaUnsupported or PackageCorrupted if it is another's."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise PackageCorrupted("manifest.json is not valid JSON", seen=str(error)) from error
        if not isinstance(values, dict):
            raise PackageCorrupted("manifest.json is not an object", seen=type(values).__name__)
        if (schema := values.pop("schema", None)) != SCHEMA:
            raise SchemaUnsupported(
                "the package was written for another version of meiqa",
                seen=f"schema {schema}",
                allowed=f"schema {SCHEMA}",
                hint="export the checkpoint again, or install the version that wrote it",
            )
        try:
            manifest = cls.from_dict(values)
            manifest._refuse_unusable()
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            what = "a part of the manifest is not what this version reads"
            raise PackageCorrupted(what, seen=str(error)) from error
        return manifest

    def _refuse_unusable(self) -> None:
        for name, found, known in (
            ("graphs", sorted(self.graphs), [sorted(GRAPHS)]),
            ("precision", self.precision, PRECISIONS),
            ("score_head", self.score_head, SCORE_HEADS),
        ):
            if found not in known:
                what = f"the manifest has other {name} than this version knows"
                allowed = " or ".join(map(str, known))
                raise PackageCorrupted(what, seen=repr(found), allowed=allowed)
        if not isinstance(self.report, dict) or not {"name", "sha256"} <= set(self.source):
            raise PackageCorrupted(
                "the manifest does not say where the package comes from or how it was verified",
                hint="export the checkpoint again with this version",
            )
        used = {*DATA_FILES, *(file for graph in self.graphs.values() for file in graph.files)}
        if unlisted := used - self.files.keys():
            raise PackageCorrupted(
                "the manifest has no digest of a file that is used",
                seen=", ".join(sorted(unlisted)),
                hint="export or install the package again",
            )

    @cached_property
    def digest(self) -> str:
        """SHA-256 over everything that makes visual tokens and keys: what a memory is tied to."""
        made_by: dict[str, Any] = {"decoder": self.decoder.identity, "prompt": asdict(self.prompt)}
        made_by["image"] = self.image.identity
        made_by["files"] = dict(self.files)
        if self.ends:
            made_by["ends"] = self.ends
        return hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()
