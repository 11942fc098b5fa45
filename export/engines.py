"""Engine package → TensorRT engines inside it, for given compute capabilities. Needs no PyTorch.

With `tensorrt_rtx` no GPU is needed either; `tensorrt` builds for the device that is present. The
networks are strongly typed: an engine computes in the types that stand in its graph. So the graph
is rewritten before it is compiled where TensorRT wants other types than ONNX Runtime.
"""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import onnx_ir as ir

from meiqa.engine.images import MAX_ASPECT
from meiqa.engine.manifest import PATTERNS, Graph, ImageProcessing, Profile, TensorRtEngine
from meiqa.engine.model import ANSWER_TOKENS, RATING_TOKENS
from meiqa.engine.package import EnginePackage
from meiqa.engine.runtime.decoder import ROWS_PER_CALL
from meiqa.engine.runtime.tensorrt import TensorRt, hull, installed_tensorrts, open_gpu
from meiqa.engine.writing import PAST_STEP, PROPOSED_TOKENS
from meiqa.errors import DeviceUnavailable, PackageCorrupted, PackageError, UsageError
from meiqa.export.layers import halve, save_graph, temporary_folder
from meiqa.export.rounding import make_activations_signed
from meiqa.locations import user_cache

ENGINE_PRECISIONS = ("fp32", "fp16", "int8")
FOLDER = "engines"
USUAL_SIDE = 512
"""Side in pixels of the photo that kernels are chosen for."""
SMALL_BOX = 256
"""Cells that any profile of the vision graph may hold, however few a photo has."""
ROOM_FOR_WRITING = 1.5
"""A summary that is read back may fall into more tokens than it was written in."""

Range = tuple[int, int, int]
"""Least, usual and greatest size of an axis."""


@dataclass(frozen=True)
class Limits:
    """Largest calls that engines accept; None is what the package itself needs.

    Attributes:
        batch: comparisons in one call; suffix: tokens that follow a prefix in one call.
        prefix: tokens of a prompt's opening with its picture.
        past: tokens that were written after a prefix, the question included.
    """

    batch: int | None = None
    suffix: int | None = None
    prefix: int | None = None
    past: int | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and value < 1:
                said = f"no engine holds so few: --max-{name}"
                raise UsageError(said, seen=value, allowed="1 up")


OnStep = Callable[[str, str, float], None]
"""Told of what is built, as "decoder int8 for 8.9", TensorRT's name of its present work, and the
share of this engine's work that is done, 0 to 1."""


def build_engines(
    path: str | Path,
    capabilities: Sequence[str] = (),
    precision: str | None = None,
    limits: Limits | None = None,
    progress: OnStep | None = None,
) -> list[TensorRtEngine]:
    """Build the engines of a package and record them in its manifest.

    Older engines for the same version of TensorRT and the same compute capability are replaced.

    Args:
        capabilities: compute capabilities such as "8.9"; none means the present device's.
        precision: "fp32", "fp16" or "int8"; None is the package's own.

    Returns:
        The new engines: one of each graph for each capability.

    Raises:
        UsageError: a capability can't be targeted, or the package can't give the precision.
        DeviceUnavailable: no TensorRT, or no device where one is needed.
        PackageError: a graph can't be compiled, or the package can't be written.
        KeyboardInterrupt: interrupted; finished capabilities are kept.
    """
    package = EnginePackage.open(path)
    precision = engine_precision(package, precision)
    runtime, targets = builder_for(capabilities)
    profiles = {
        "vision": vision_profiles(package),
        "decoder": decoder_profiles(package, limits or Limits()),
    }
    if package.manifest.patterns is not None:
        profiles[PATTERNS] = pattern_profiles(package)
    every: list[TensorRtEngine] = []
    try:
        with graphs_for(package, precision) as sources:
            for capability, target in targets.items():
                made = []
                for graph in profiles:
                    build = EngineBuild(package, runtime, graph, precision, capability, target)
                    made.append(build.run(sources[graph], profiles[graph], progress))
                record(package.path, made)
                every += made
    except OSError as error:
        raise PackageError(
            f"the package at {package.path} can't be written to",
            seen=error.strerror or str(error),
            hint="free space or copy the package to a directory of your own",
        ) from error
    return every


def engine_precision(package: EnginePackage, asked: str | None) -> str:
    """Choose the engines' precision, refused if this package can't give it."""
    own = package.manifest.precision
    precision = asked or own
    given = {"fp32": ("fp32", "fp16"), "fp16": ("fp16",), "int8": ("int8",)}.get(own, ())
    if precision in given:
        return precision
    wanted = precision if precision in ENGINE_PRECISIONS else "fp16"
    raise UsageError(
        f"a package in {own} can't become TensorRT engines in {precision}",
        seen=precision,
        allowed=", ".join(given) or "none from this package",
        hint=f"meiqa export CHECKPOINT --out OTHER --precision {wanted}, then meiqa build OTHER",
    )


def builder_for(asked: Sequence[str]) -> tuple[TensorRt, dict[str, Any]]:
    """Find the first installed TensorRT that builds for all capabilities, or for the device's.

    With it goes by capability what its builder calls that.
    """
    refusals: list[UsageError | DeviceUnavailable] = []
    for runtime in installed_tensorrts():
        try:
            known = buildable(runtime)
            chosen = list(dict.fromkeys(asked)) or [open_gpu().capability]
        except DeviceUnavailable as error:
            refusals.append(error)
            continue
        unknown = [capability for capability in chosen if capability not in known]
        if not unknown:
            return runtime, {capability: known[capability] for capability in chosen}
        refusal = UsageError(
            f"{runtime.name} {runtime.version} can't build for this compute capability",
            seen=unknown[0],
            allowed=", ".join(known),
            hint="install the full TensorRT on a device of that kind and build there",
        )
        refusals.append(refusal)
    raise refusals[0]


def buildable(runtime: TensorRt) -> dict[str, Any]:
    """List what can be built for: any capability that RTX knows, or the present device's."""
    if runtime.name == "tensorrt_rtx":
        members = runtime.api.ComputeCapability.__members__.items()
        numbers = {name.removeprefix("SM"): member for name, member in members}
        return {f"{n[:-1]}.{n[-1]}": member for n, member in numbers.items() if n.isdecimal()}
    return {open_gpu().capability: None}


@contextmanager
def graphs_for(package: EnginePackage, precision: str) -> Iterator[dict[str, Path]]:
    """Give files of the graphs in the types that TensorRT is to compute in.

    Rewritten ones are streamed, weight by weight, to the disk that holds the package.
    """
    graphs = package.manifest.every_graph
    own = {name: package.path / graph.file for name, graph in graphs.items()}
    if precision == package.manifest.precision != "int8":
        yield own
        return
    with temporary_folder(package.path, ".graphs-") as folder:
        for source in own.values():
            model = ir.load(source)
            if precision == "int8":
                make_activations_signed(model)
            else:
                halve(model)
            save_graph(model, folder / source.name)
        yield {name: folder / source.name for name, source in own.items()}


@dataclass(frozen=True)
class EngineBuild:
    package: EnginePackage
    runtime: TensorRt
    graph: str
    precision: str
    capability: str
    target: Any
    """What the builder calls the capability; None where it knows but the present device."""

    def __str__(self) -> str:
        return f"{self.graph} {self.precision} for {self.capability}"

    @property
    def architecture(self) -> str:
        return "sm" + self.capability.replace(".", "")

    def run(
        self, source: Path, profiles: Sequence[Profile], progress: OnStep | None
    ) -> TensorRtEngine:
        """Compile the graph and write the engine, of which the manifest does not know yet."""
        started = time.perf_counter()
        self.runtime.forget_errors()
        builder = self.runtime.api.Builder(self.runtime.logger)
        network = self._parsed(builder, source)
        config = self._configured(builder, profiles)
        with self.timing_cache(config), interruptible() as interrupted:
            monitor = build_monitor(self.runtime.api, str(self), interrupted, progress)
            config.progress_monitor = monitor
            serialised = builder.build_serialized_network(network, config)
        if monitor.failure is not None:
            raise monitor.failure
        if interrupted.is_set():
            raise KeyboardInterrupt
        if serialised is None:
            self._refused(source, self.runtime.errors)
        if progress is not None:
            progress(str(self), "Done", 1.0)
        build_s = time.perf_counter() - started
        return self._written(memoryview(serialised), hull(profiles), build_s)

    def _parsed(self, builder: Any, source: Path) -> Any:
        api = self.runtime.api
        flags = 1 << int(api.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        network = builder.create_network(flags)
        parser = api.OnnxParser(network, self.runtime.logger)
        if not parser.parse_from_file(str(source)):
            errors = [parser.get_error(index) for index in range(parser.num_errors)]
            # TensorRT's own description is often a bare condition, so the node goes with it.
            said = [
                f"{error.code().name.lower().replace('_', ' ')} {error.node_name()} "
                f"({error.node_operator()}): {error.desc()}"
                for error in errors
            ]
            self._refused(source, "; ".join(said))
        self._check_ports(network)
        return network

    def _refused(self, source: Path, seen: str) -> NoReturn:
        raise PackageCorrupted(
            f"{self.runtime.name} {self.runtime.version} can't compile {source.name}",
            seen=" ".join(seen.split()),
            hint="export the package again with this version of meiqa, or use another precision",
        )

    def _check_ports(self, network: Any) -> None:
        """Refuse a graph whose inputs or outputs are not those that the manifest lists."""
        graph = self.package.manifest.every_graph[self.graph]
        read = [network.get_input(index) for index in range(network.num_inputs)]
        made = [network.get_output(index) for index in range(network.num_outputs)]
        for ports, listed in ((read, graph.inputs), (made, graph.outputs)):
            found = {port.name: len(port.shape) for port in ports}
            if found != {name: len(shape) for name, shape in listed.items()}:
                raise PackageCorrupted(
                    f"{graph.file} has other inputs or outputs than its manifest says",
                    seen=", ".join(found),
                    allowed=", ".join(listed),
                    hint="export the package again",
                )

    def _configured(self, builder: Any, profiles: Sequence[Profile]) -> Any:
        config = builder.create_builder_config()
        if self.target is not None:
            config.num_compute_capabilities = 1
            config.set_compute_capability(self.target, 0)
        # 32-bit floats are to be those of ONNX Runtime, not TensorFloat-32.
        config.clear_flag(self.runtime.api.BuilderFlag.TF32)
        for profile in profiles:
            added = builder.create_optimization_profile()
            for name, shapes in profile.items():
                added.set_shape(name, *shapes)
            if config.add_optimization_profile(added) < 0:
                raise UsageError("TensorRT refuses a profile", seen=dict(profile))
        return config

    @contextmanager
    def timing_cache(self, config: Any) -> Iterator[None]:
        """Reuse the timings of earlier builds; `tensorrt_rtx` times nothing and keeps none."""
        if self.runtime.name == "tensorrt_rtx":
            yield
            return
        file = user_cache() / f"timing-{self.runtime.version}-{self.architecture}.cache"
        known = file.read_bytes() if file.is_file() else b""
        config.set_timing_cache(config.create_timing_cache(known), ignore_mismatch=False)
        yield
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, memoryview(config.get_timing_cache().serialize()))

    def _written(self, engine: memoryview, profile: Profile, build_s: float) -> TensorRtEngine:
        digest = hashlib.sha256(engine).hexdigest()
        # With the digest in its name a new engine never takes the place of one that is in use.
        runtime = f"{self.runtime.name}{self.runtime.version}"
        parts = (self.graph, runtime, self.architecture, self.precision, digest[:8])
        file = f"{FOLDER}/{'-'.join(parts)}.engine"
        (self.package.path / FOLDER).mkdir(exist_ok=True)
        write_whole(self.package.path / file, engine)
        return TensorRtEngine(
            graph=self.graph,
            file=file,
            sha256=digest,
            runtime=self.runtime.name,
            version=self.runtime.version,
            compute_capability=self.capability,
            precision=self.precision,
            profile=profile,
            size_bytes=engine.nbytes,
            build_s=round(build_s, 3),
        )


def build_monitor(
    api: Any, engine: str, interrupted: threading.Event, progress: OnStep | None
) -> Any:
    """Make a monitor that reports the share of the work done and stops when told to."""

    class Monitor(api.IProgressMonitor):  # type: ignore[misc]
        """The builder's phases are nested; each lasts for a step of the one around it."""

        def __init__(self) -> None:
            api.IProgressMonitor.__init__(self)
            self.failure: BaseException | None = None
            self._phases: dict[str, list[int]] = {}
            self._share = 0.0
            self._lock = threading.Lock()

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            with self._lock:
                self._phases[name] = [0, max(1, steps)]

        def step_complete(self, name: str, step: int) -> bool:
            with self._lock:
                if name in self._phases:
                    self._phases[name][0] = step + 1
                share, width = 0.0, 1.0
                for done, steps in self._phases.values():
                    share += width * min(done, steps) / steps
                    width /= steps
                self._share = max(self._share, min(share, 1.0))
                try:
                    if progress is not None and self.failure is None:
                        progress(engine, name, self._share)
                except BaseException as error:  # raised when TensorRT has returned
                    self.failure = error
            return self.failure is None and not interrupted.is_set()

        def phase_finish(self, name: str) -> None:
            with self._lock:
                self._phases.pop(name, None)

    return Monitor()


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Turn Ctrl-C into an event, since a KeyboardInterrupt can't cross TensorRT's frames."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = signal.signal(signal.SIGINT, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


def write_whole(path: Path, content: memoryview) -> None:
    """Write a file whole or not at all."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with unfinished.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def record(path: Path, made: list[TensorRtEngine]) -> None:
    """Put new engines into the manifest and remove the files that they replace."""

    def target(engine: TensorRtEngine) -> tuple[str, ...]:
        return engine.graph, engine.runtime, engine.version, engine.compute_capability

    package = EnginePackage.open(path, verify=False)
    replaced = {target(engine) for engine in made}
    kept = [engine for engine in package.manifest.engines if target(engine) not in replaced]
    package.rewritten(engines=[*kept, *made])
    used = {engine.file for engine in (*kept, *made)}
    for engine in package.manifest.engines:
        if engine.file not in used:
            with suppress(OSError):  # an engine that is being read stays, but nobody opens it again
                (path / engine.file).unlink()


def usual_and_most(package: EnginePackage) -> tuple[int, int]:
    """Count the visual tokens of the photo that kernels are chosen for, and of the largest."""
    image = package.manifest.image
    if image.tile_pixels:
        along = image.tile_pixels // image.cell_pixels
        # All tokens of each tile at most, and the mark behind each line of it.
        usual, most = (tiles * along * (along + 1) for tiles in usual_and_most_tiles(image))
        return usual, most
    most = image.max_pixels // image.cell_pixels**2
    return min(most, max(1, USUAL_SIDE // image.cell_pixels) ** 2), most


def usual_and_most_tiles(image: ImageProcessing) -> tuple[int, int]:
    """Count the tiles of a usual photo and of the largest, the photo as a whole included."""
    most = 1 + max(1, image.max_pixels // image.tile_pixels**2)
    return most // 2 + 1, most


def vision_profiles(package: EnginePackage) -> list[Profile]:
    """Cover every grid that the package's photos are fitted to, or every number of tiles."""
    (likely, most), image = usual_and_most(package), package.manifest.image
    if image.tile_pixels:
        ranges = {"tiles": (1, *usual_and_most_tiles(image)), "shown": (1, likely, most)}
        return [profile_of(package.manifest.graphs["vision"], ranges)]
    usual = max(1, USUAL_SIDE // image.cell_pixels)
    profiles = []
    for height, width in grid_boxes(most):
        short, long = sorted((height, width))
        across = min(usual, isqrt(most), short)
        along = min(max(usual, most // short), most // across, long)
        rows, columns = (along, across) if width < height else (across, along)
        ranges = {"h": (1, rows, height), "w": (1, columns, width)}
        profiles.append(profile_of(package.manifest.graphs["vision"], ranges))
    return profiles


def pattern_profiles(package: EnginePackage) -> list[Profile]:
    """Cover any number of cells: patterns don't see the grid."""
    cells = {"cells": (1, *usual_and_most(package))}
    return [profile_of(package.manifest.every_graph[PATTERNS], cells)]


def grid_boxes(most: int) -> list[tuple[int, int]]:
    """Find greatest (rows, columns) of profiles that cover all grids of at most `most` cells.

    One box for all would have to be as wide as the widest photo and as high as the highest, and
    TensorRT reserves memory for all of it. So a square one is followed by pairs of ever longer
    ones, none of which holds much more than `most` cells.
    """
    longest = longest_side(most)
    room = max(2 * most, SMALL_BOX)
    side = min(longest, isqrt(room))
    boxes = [(side, side)]
    while side < longest:
        short = most // (side + 1)
        side = min(longest, room // short)
        boxes += [(short, side), (side, short)]
    return boxes


def longest_side(most: int) -> int:
    """Count the most columns of a photo as elongated as the limit, rounded to whole cells."""
    shrunk = min(most, isqrt(int(MAX_ASPECT) * most))
    rounded = (min(most // rows, int(MAX_ASPECT * (rows + 0.5))) for rows in range(1, most + 1))
    return max(shrunk, *rounded)


def decoder_profiles(package: EnginePackage, limits: Limits) -> list[Profile]:
    """Cover the three calls that the engine makes.

    * many prefixes with a row each: reading photos, comparing pairs;
    * one prefix with many rows: comparing a photo with its neighbours, grading;
    * one row with a past: writing, and checking what drafts propose.
    """
    usual, needed = call_lengths(package)
    batch, past = limits.batch or ROWS_PER_CALL, limits.past or needed.past
    suffix, prefix = limits.suffix or needed.suffix, limits.prefix or needed.prefix

    def up_to(most: int, likely: int) -> Range:
        return 1, min(likely, most), most

    one, many = up_to(1, 1), up_to(batch, batch)
    after_prefix = {
        "steps": up_to(suffix, usual.suffix),
        "prefix_steps": up_to(prefix, usual.prefix),
    }
    # Reading has no prefix but the prefix itself for its steps.
    read = {**after_prefix, "steps": up_to(max(suffix, prefix), usual.suffix)}
    calls: list[dict[str, Range]] = [
        {**read, "prefixes": many, "rows": one, "past_steps": one},
        {**after_prefix, "prefixes": one, "rows": many, "past_steps": one},
        {
            **after_prefix,
            "steps": up_to(suffix, 1),
            "prefixes": one,
            "rows": one,
            "past_steps": up_to(past, usual.past),
            "wanted": up_to(min(suffix, PROPOSED_TOKENS + 1), 1),
        },
    ]
    graph = package.manifest.graphs["decoder"]
    return [profile_of(graph, {"wanted": one, **call}) for call in calls]


class CallLengths(NamedTuple):
    """Tokens of the segments of a decoder call."""

    suffix: int
    prefix: int
    past: int


def call_lengths(package: EnginePackage) -> tuple[CallLengths, CallLengths]:
    """Count the usual and the greatest lengths of a package's calls."""
    prompts, (usual, most) = package.prompts, usual_and_most(package)
    around = len(prompts.opening) + len(prompts.closing)
    asked = len(prompts.second_opening) + len(prompts.closing) + len(prompts.compare)
    limit = prompts.family.summary_tokens
    summary = int(limit * ROOM_FOR_WRITING)
    reflect = len(prompts.reflect("", 1.0, 1.0)) + summary
    longest_question = max(len(prompts.score), len(prompts.levels), reflect)
    # What `LocalModel` writes behind a description, and the steps in which it makes room.
    described = len(prompts.score) + limit + ANSWER_TOKENS + RATING_TOKENS
    suffix = max(asked + most, longest_question + PROPOSED_TOKENS)
    past = max(described, reflect + summary) + 2 * PAST_STEP
    return (
        CallLengths(asked + usual, around + usual, len(prompts.score) + limit // 2),
        CallLengths(suffix, around + most, past),
    )


def profile_of(graph: Graph, ranges: Mapping[str, Range]) -> Profile:
    """Bound the shape of every input by the ranges of its named axes."""
    dynamic = {axis for axes in graph.inputs.values() for axis in axes if isinstance(axis, str)}
    if unknown := dynamic - ranges.keys():
        raise PackageCorrupted(
            f"{graph.file} has dynamic axes that no profile is known for",
            seen=", ".join(sorted(unknown)),
            allowed=", ".join(ranges),
            hint="export the package again with this version",
        )

    def shape(axes: Sequence[int | str], end: int) -> tuple[int, ...]:
        return tuple(axis if isinstance(axis, int) else ranges[axis][end] for axis in axes)

    inputs = graph.inputs.items()
    return {name: (shape(axes, 0), shape(axes, 1), shape(axes, 2)) for name, axes in inputs}
