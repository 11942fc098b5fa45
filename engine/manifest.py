"""The manifest of an engine package: what its records hold, and what is refused.

Its digest names everything that makes visual tokens and keys, so a memory can tell whether it was
made by this package; the calibration is not part of it, since it is fitted afterwards.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from functools import cached_property
from numbers import Integral, Real
from typing import Any, Literal, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from meiqa.engine.prompts import PromptFamily
from meiqa.errors import PackageCorrupted, SchemaUnsupported, UsageError
from meiqa.kernels.graded import LEAST_STEP

SCHEMA = 2
MANIFEST = "manifest.json"
GRAPHS = ("vision", "decoder")
PATTERNS = "patterns"
"""The graph that a package may have beside these."""
DATA_FILES = ("embedding.npy", "key_projection.npy", "tokenizer.json")
PRECISIONS = ("fp32", "fp16", "int8", "int4")
DEVICES = ("cpu", "cuda", "tensorrt")

ScoreHead = Literal["text", "levels", "grm"]
"""What makes the first score: printed rating with grade words, the words' expectation, or their
graded response."""
SCORE_HEADS: tuple[ScoreHead, ...] = get_args(ScoreHead)

Record = TypeVar("Record", bound="_Fields")


@dataclass(frozen=True)
class _Allowed:
    """Numbers that a field of the manifest may hold: in words, and as a test."""

    words: str
    holds: Callable[[Any], bool]
    kind: type = Real

    def refuse_others(self, name: str, value: Any) -> None:
        """Raise PackageCorrupted unless the value is such a number and finite."""
        number = isinstance(value, self.kind) and not isinstance(value, bool)
        if not (number and abs(value) <= sys.float_info.max and self.holds(value)):
            raise PackageCorrupted(
                f"a number in the manifest makes no sense: {name}",
                seen=repr(value),
                allowed=self.words,
            )


_FINITE = _Allowed("a finite number", lambda value: True)
_POSITIVE = _Allowed("a number above 0", lambda value: value > 0)
_NOT_NEGATIVE = _Allowed("0 or a number above it", lambda value: value >= 0)
_SHARE = _Allowed("0 to 1", lambda value: 0 <= value <= 1)
_COUNT = _Allowed("a whole number, 1 or more", lambda value: value >= 1, Integral)
_COUNT_OR_NONE = _Allowed("a whole number, 0 or more", lambda value: value >= 0, Integral)


@dataclass(frozen=True)
class _Fields:
    """A part of the manifest whose keys are the fields of a dataclass.

    Fields with a default came with a later version, and may be missing.
    """

    @classmethod
    def from_dict(cls: type[Record], values: Mapping[str, Any]) -> Record:
        """Read a part; unknown and missing keys are errors, lists become tuples."""
        names = {field.name for field in fields(cls)}
        optional = {field.name for field in fields(cls) if field.default is not MISSING}
        if not names - optional <= values.keys() <= names:
            raise PackageCorrupted(
                f"the manifest's {cls.__name__} has other fields than this version reads",
                seen=", ".join(sorted(values.keys() ^ names)),
                hint="export the checkpoint again with this version",
            )
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})

    def _require(self, allowed: _Allowed, *names: str) -> None:
        """Refuse fields that hold anything but the numbers allowed.

        Raises:
            PackageCorrupted: one does.
        """
        for name in names:
            allowed.refuse_others(f"{type(self).__name__}.{name}", getattr(self, name))


@dataclass(frozen=True)
class ImageProcessing(_Fields):
    """How pixels become patches.

    Attributes:
        patch_size: side of a patch in pixels; merge_size: side of a cell in patches.
        min_pixels, max_pixels: bounds of the area that the vision tower sees.
        mean, std: normalisation of each channel, for pixels scaled to 0-1.
    """

    patch_size: int
    merge_size: int
    min_pixels: int
    max_pixels: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        self._require(_COUNT, "patch_size", "merge_size", "min_pixels", "max_pixels")
        if self.min_pixels > self.max_pixels:
            raise PackageCorrupted(
                "the manifest's bounds of the area are swapped",
                seen=f"min_pixels {self.min_pixels}, max_pixels {self.max_pixels}",
                allowed="min_pixels up to max_pixels",
            )
        for name, values, allowed in (("mean", self.mean, _FINITE), ("std", self.std, _POSITIVE)):
            if not isinstance(values, tuple) or len(values) != 3:
                raise PackageCorrupted(
                    f"the manifest's {name} of the channels is not one number each",
                    seen=repr(values),
                    allowed="3 numbers",
                )
            for value in values:
                allowed.refuse_others(f"ImageProcessing.{name}", value)

    @property
    def cell_pixels(self) -> int:
        """Side of the square of pixels behind one visual token."""
        return self.patch_size * self.merge_size


@dataclass(frozen=True)
class DecoderShape(_Fields):
    """What the host has to know of the decoder.

    Attributes:
        layers, kv_heads, head_dim: of the keys and values.
        hidden_size: width of the hidden states and of a token's embedding.
        vocab_size: number of tokens.
        deepstack: how many more features of that width follow a visual token in its row; they
            enter behind the first layers (Qwen3-VL).
    """

    layers: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    deepstack: int

    def __post_init__(self) -> None:
        self._require(_COUNT, "layers", "kv_heads", "head_dim", "hidden_size", "vocab_size")
        self._require(_COUNT_OR_NONE, "deepstack")

    @property
    def embed_width(self) -> int:
        """Width of what the decoder is fed for a token."""
        return self.hidden_size * (1 + self.deepstack)


@dataclass(frozen=True)
class Logistic(_Fields):
    """Five-parameter logistic from the model's own scale to 1-5 (method of VQEG)."""

    b1: float
    b2: float
    b3: float
    b4: float
    b5: float

    def __post_init__(self) -> None:
        self._require(_FINITE, *(field.name for field in fields(self)))

    def __call__(self, raw: NDArray[np.float64] | float) -> NDArray[np.float64]:
        """b1 (1/2 - 1 / (1 + exp(b2 (raw - b3)))) + b4 raw + b5, kept on the 1-5 scale."""
        x = np.asarray(raw, np.float64)
        curve = self.b1 * (0.5 - 1.0 / (1.0 + np.exp(np.clip(self.b2 * (x - self.b3), -60, 60))))
        return np.clip(curve + self.b4 * x + self.b5, 1.0, 5.0)


IDENTITY = Logistic(b1=0.0, b2=1.0, b3=3.0, b4=1.0, b5=0.0)
"""The logistic of a model whose scores need no mapping."""


@dataclass(frozen=True)
class GradedHead(_Fields):
    """Graded response of the five grade words (`meiqa.kernels.graded`).

    Attributes:
        weights: (5,) of the words' centred log-probabilities in the ability; offset: added to it.
        discrimination, first, step: a, b_1 and d of the model, a d of `LEAST_STEP` or more.
        score: from the expectation over the grades to the score.
        std_scale, std_floor: the score's deviation from people's is
            sqrt(scale^2 * variance of the grade + floor^2).
    """

    weights: tuple[float, ...]
    offset: float
    discrimination: float
    first: float
    step: float
    score: Logistic
    std_scale: float
    std_floor: float

    def __post_init__(self) -> None:
        if not isinstance(self.weights, tuple) or len(self.weights) != 5:
            raise PackageCorrupted(
                "the graded response does not weigh each of five grade words",
                seen=repr(self.weights),
                allowed="5 numbers",
            )
        for weight in self.weights:
            _FINITE.refuse_others("GradedHead.weights", weight)
        self._require(_FINITE, "offset", "first")
        self._require(_POSITIVE, "discrimination", "step")
        self._require(_NOT_NEGATIVE, "std_scale", "std_floor")
        gap = self.discrimination * self.step
        if not LEAST_STEP * (1.0 - 1e-12) <= gap < float("inf"):
            raise PackageCorrupted(
                "the graded response could have two modes",
                seen=f"discrimination times step {gap:.6g}",
                allowed=f"ln 3 = {LEAST_STEP:.6f} or more",
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GradedHead:
        """Read what stands in the manifest."""
        made = super().from_dict(values)
        return replace(made, score=Logistic.from_dict(values["score"]))


NEUTRAL_GRADED = GradedHead(
    weights=(-0.2, -0.1, 0.0, 0.1, 0.2),
    offset=0.0,
    discrimination=2.0,
    first=-1.5,
    step=1.0,
    score=IDENTITY,
    std_scale=1.0,
    std_floor=0.0,
)
"""The graded response of a package exported with this head, before one is fitted."""


@dataclass(frozen=True)
class Calibration(_Fields):
    """What is fitted on photographs that the model was not trained on.

    Attributes:
        text, levels: logistic of the printed rating and of the expectation over grade words.
        text_std, levels_std: deviation of each mapped score from people's.
        grade_share: weight of the grade words in the score that fusion starts from; the rest is
            the printed rating's.
        sigma: deviation of a comparison, in score units (Thurstone Case V).
        lam: weight of that starting score in the fusion.
        temperature: divides the difference of the two verdicts' logits.
        std_scale, std_floor: map the posterior's deviation to the observed one:
            sqrt((scale * std)^2 + floor^2).
        reflect_above: a score that moved by more than this is reflected on and remembered.
        neighbours: K, the neighbours of a photo unless asked otherwise.
        bins: strata over the anchors' scores.
        memory_correlation: how far the errors of the starting score go with those of the memory's
            regression on visual tokens (Pearson), which is joined with it.
        graded: graded response of the grade words, None where none was fitted.
    """

    text: Logistic
    levels: Logistic
    text_std: float
    levels_std: float
    grade_share: float
    sigma: float
    lam: float
    temperature: float
    std_scale: float
    std_floor: float
    reflect_above: float
    neighbours: int
    bins: int
    memory_correlation: float = 0.5
    graded: GradedHead | None = None

    def __post_init__(self) -> None:
        self._require(_POSITIVE, "sigma", "lam", "temperature")
        self._require(
            _NOT_NEGATIVE, "text_std", "levels_std", "std_scale", "std_floor", "reflect_above"
        )
        self._require(_SHARE, "grade_share", "memory_correlation")
        self._require(_COUNT_OR_NONE, "neighbours")
        self._require(_COUNT, "bins")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Calibration:
        """Read what stands in the manifest."""
        made = super().from_dict(values)
        text, levels = (Logistic.from_dict(values[name]) for name in ("text", "levels"))
        graded = None if made.graded is None else GradedHead.from_dict(values["graded"])
        return replace(made, text=text, levels=levels, graded=graded)


UNCALIBRATED = Calibration(
    text=IDENTITY,
    levels=IDENTITY,
    text_std=0.6,
    levels_std=0.6,
    grade_share=0.5,
    sigma=0.7,
    lam=0.5,
    temperature=1.0,
    std_scale=1.0,
    std_floor=0.0,
    reflect_above=0.75,
    neighbours=32,
    bins=5,
)
"""What an exported package starts with, before `meiqa.training.calibrate` fits it."""


Shape = tuple[int | str, ...]
"""Extent of each axis; a name stands for a dynamic one."""


@dataclass(frozen=True)
class Graph(_Fields):
    """One ONNX file with its interface.

    Attributes:
        file: the graph; weights: the file of its weights, None where they are inside the graph.
        inputs, outputs: shape of each by name.
    """

    file: str
    weights: str | None
    inputs: Mapping[str, Shape]
    outputs: Mapping[str, Shape]

    def __post_init__(self) -> None:
        named = isinstance(self.file, str) and isinstance(self.weights, str | None)
        if not (named and all(map(are_ports, (self.inputs, self.outputs)))):
            raise PackageCorrupted(
                "a graph in the manifest does not say its files, inputs and outputs",
                seen=repr(asdict(self)),
                allowed="file names, and shapes by name",
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Graph:
        """Read what stands in the manifest."""
        made = super().from_dict(values)
        inputs, outputs = (
            {name: tuple(shape) for name, shape in ports.items()}
            for ports in (made.inputs, made.outputs)
        )
        return replace(made, inputs=inputs, outputs=outputs)

    @property
    def files(self) -> tuple[str, ...]:
        """The graph's file and, if there is one, that of its weights."""
        return (self.file,) if self.weights is None else (self.file, self.weights)


def are_ports(ports: object) -> bool:
    """Whether these are shapes by name."""
    return isinstance(ports, Mapping) and all(
        isinstance(name, str)
        and isinstance(shape, list | tuple)
        and all(isinstance(axis, int | str) for axis in shape)
        for name, shape in ports.items()
    )


@dataclass(frozen=True)
class PatternCalibration(_Fields):
    """How the scores of the distortion patterns go with people's, on photographs kept unseen.

    Attributes:
        hybrid, alone: logistic of the score with a reference, and of that without one.
        alone_std: deviation of the latter, mapped, from people's.
        trusted_std, doubted_std: deviation of the mapped hybrid score where the gate gives the
            reference the whole weight, and where it gives it none.
        correlation: how far the errors of the hybrid score go with those of the model's (Pearson).
        temperature: divides the logits of the kinds of distortion.
    """

    hybrid: Logistic
    alone: Logistic
    alone_std: float
    trusted_std: float
    doubted_std: float
    correlation: float
    temperature: float

    def __post_init__(self) -> None:
        self._require(_POSITIVE, "alone_std", "trusted_std", "doubted_std", "temperature")
        self._require(_SHARE, "correlation")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PatternCalibration:
        """Read what stands in the manifest."""
        made = super().from_dict(values)
        hybrid, alone = (Logistic.from_dict(values[name]) for name in ("hybrid", "alone"))
        return replace(made, hybrid=hybrid, alone=alone)


@dataclass(frozen=True)
class PatternGraph(_Fields):
    """The distortion patterns: a graph over visual tokens, with what is needed to read it.

    It makes neither tokens nor keys, so it is not part of the package's digest.

    Attributes:
        graph: its file and interface; sha256: the file's digest.
        count: patterns in the codebook.
        kinds: names of the distortions, the first for none.
        calibration: see its class.
        report: what was measured when it was made.
    """

    graph: Graph
    sha256: str
    count: int
    kinds: tuple[str, ...]
    calibration: PatternCalibration
    report: Mapping[str, Any]

    def __post_init__(self) -> None:
        self._require(_COUNT, "count")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PatternGraph:
        """Read what stands in the manifest."""
        made = super().from_dict(values)
        return replace(
            made,
            graph=Graph.from_dict(values["graph"]),
            calibration=PatternCalibration.from_dict(values["calibration"]),
        )


Profile = Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
"""Least, usual and greatest shape of each input."""


@dataclass(frozen=True)
class TensorRtEngine(_Fields):
    """A graph compiled for one kind of GPU by one version of TensorRT.

    Attributes:
        graph: which of the package's graphs.
        file: path below the package; sha256: its digest.
        runtime: "tensorrt" or "tensorrt_rtx"; version: of that runtime.
        compute_capability: of the GPUs it runs on, as "8.9".
        precision: "fp32", "fp16" or "int8".
        profile: shapes it accepts.
        size_bytes, build_s: what it took.
    """

    graph: str
    file: str
    sha256: str
    runtime: str
    version: str
    compute_capability: str
    precision: str
    profile: Profile
    size_bytes: int
    build_s: float

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TensorRtEngine:
        """Read what stands in the manifest."""
        made = super().from_dict(values)
        made._require(_COUNT, "size_bytes")
        made._require(_NOT_NEGATIVE, "build_s")
        profile: Profile = {
            name: (tuple(least), tuple(usual), tuple(most))
            for name, (least, usual, most) in made.profile.items()
        }
        return replace(made, profile=profile)


@dataclass(frozen=True)
class Manifest:
    """Everything that is known about a package.

    Attributes:
        architecture: class name in the source checkpoint.
        source: name and SHA-256 of the checkpoint's weights.
        precision: one of `PRECISIONS`.
        graphs: "vision" and "decoder".
        image, decoder, prompt, calibration: see their classes.
        report: what was measured when the export was verified.
        files: SHA-256 of every file but the manifest and the engines.
        engines: graphs compiled with TensorRT.
        patterns: the distortion patterns, None in a package without a reference mode.
        score_head: what makes the first score unless another is asked for.
    """

    architecture: str
    source: Mapping[str, str]
    precision: str
    graphs: Mapping[str, Graph]
    image: ImageProcessing
    decoder: DecoderShape
    prompt: PromptFamily
    calibration: Calibration
    report: Mapping[str, Any]
    files: Mapping[str, str]
    engines: tuple[TensorRtEngine, ...] = ()
    patterns: PatternGraph | None = None
    score_head: ScoreHead = "text"

    @property
    def every_graph(self) -> Mapping[str, Graph]:
        """All graphs by name, that of the patterns included."""
        extra = {} if self.patterns is None else {PATTERNS: self.patterns.graph}
        return {**self.graphs, **extra}

    def to_json(self) -> str:
        """The text of manifest.json."""
        return json.dumps({"schema": SCHEMA, **asdict(self)}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Read manifest.json.

        Raises:
            SchemaUnsupported: written for another version.
            PackageCorrupted: not what this version writes.
        """
        values = parsed(text)
        schema = values.pop("schema", None)
        if schema != SCHEMA:
            raise SchemaUnsupported(
                "the package was written for another version of meiqa",
                seen=f"schema {schema}",
                allowed=f"schema {SCHEMA}",
                hint="export the checkpoint again, or install the version that wrote it",
            )
        values.setdefault("score_head", "text")  # came with a later version
        values.setdefault("patterns", None)
        names = {field.name for field in fields(cls)}
        if values.keys() != names:
            raise PackageCorrupted(
                "the manifest has other fields than this version reads",
                seen=", ".join(sorted(values.keys() ^ names)),
            )
        try:
            return cls._of_parts(values)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise PackageCorrupted(
                "a part of the manifest is not what this version reads", seen=str(error)
            ) from error

    @classmethod
    def _of_parts(cls, values: Mapping[str, Any]) -> Manifest:
        graphs = {name: Graph.from_dict(graph) for name, graph in values["graphs"].items()}
        if graphs.keys() != set(GRAPHS):
            raise PackageCorrupted(
                "the manifest has other graphs than this version runs",
                seen=", ".join(sorted(graphs)) or "none",
                allowed=", ".join(GRAPHS),
            )
        if values["precision"] not in PRECISIONS:
            raise PackageCorrupted(
                "the manifest has a precision that this version does not know",
                seen=repr(values["precision"]),
                allowed=", ".join(PRECISIONS),
            )
        if values["score_head"] not in SCORE_HEADS:
            raise PackageCorrupted(
                "the manifest has a score head that this version does not know",
                seen=repr(values["score_head"]),
                allowed=", ".join(SCORE_HEADS),
            )
        if not isinstance(values["report"], dict) or not {"name", "sha256"} <= set(
            values["source"]
        ):
            raise PackageCorrupted(
                "the manifest does not say where the package comes from or how it was verified",
                hint="export the checkpoint again with this version",
            )
        used = {*DATA_FILES, *(file for graph in graphs.values() for file in graph.files)}
        unlisted = used - values["files"].keys()
        if unlisted:
            raise PackageCorrupted(
                "the manifest has no digest of a file that is used",
                seen=", ".join(sorted(unlisted)),
                hint="export or install the package again",
            )
        return cls(
            **{
                **values,
                "graphs": graphs,
                "image": ImageProcessing.from_dict(values["image"]),
                "decoder": DecoderShape.from_dict(values["decoder"]),
                "prompt": PromptFamily.from_dict(values["prompt"]),
                "calibration": Calibration.from_dict(values["calibration"]),
                "engines": tuple(TensorRtEngine.from_dict(engine) for engine in values["engines"]),
                "patterns": values["patterns"] and PatternGraph.from_dict(values["patterns"]),
            }
        )

    @cached_property
    def digest(self) -> str:
        """SHA-256 over everything that makes visual tokens and keys: what a memory is tied to."""
        everything = asdict(self)
        made_by = {name: everything[name] for name in ("files", "image", "decoder", "prompt")}
        return hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()


def parsed(text: str) -> dict[str, Any]:
    """A JSON object, or PackageCorrupted."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise PackageCorrupted("manifest.json is not valid JSON", seen=str(error)) from error
    if not isinstance(values, dict):
        raise PackageCorrupted("manifest.json is not an object", seen=type(values).__name__)
    return values


def check_score_head(head: str) -> ScoreHead:
    """The score head of that name, or UsageError."""
    if head not in SCORE_HEADS:
        raise UsageError("unknown score head", seen=head, allowed=", ".join(SCORE_HEADS))
    return head
