"""Engine package → TensorRT engines inside it, for given compute capabilities. Needs no PyTorch.

With `tensorrt_rtx` no GPU is needed either; `tensorrt` builds for the device that is present. The
networks are strongly typed: an engine computes in the types that stand in its graph. So the graph
is rewritten before it is compiled where TensorRT wants other types than ONNX Runtime.
"""

from __future__ import annotations

import hashlib
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from meiqa.engine.manifest import PATTERNS, Profile, TensorRtEngine
from meiqa.engine.package import EnginePackage
from meiqa.engine.runtime.tensorrt import TensorRt, hull, installed_tensorrts, open_gpu
from meiqa.errors import DeviceUnavailable, PackageCorrupted, PackageError, UsageError
from meiqa.export.profiles import Limits, decoder_profiles, pattern_profiles, vision_profiles
from meiqa.export.temporary import temporary_folder
from meiqa.locations import user_cache

ENGINE_PRECISIONS = ("fp32", "fp16", "int8")
FOLDER = "engines"


@dataclass(frozen=True)
class BuildStep:
    """How far a build is.

    Attributes:
        engine: what is being built, as "decoder int8 for 8.9".
        phase: what TensorRT calls its work.
        share: of this engine's work that is done, 0 to 1.
    """

    engine: str
    phase: str
    share: float


OnStep = Callable[[BuildStep], None]


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
        path: the package.
        capabilities: compute capabilities such as "8.9"; none means the present device's.
        precision: "fp32", "fp16" or "int8"; None is the package's own.
        limits: the largest calls; see `Limits`.
        progress: told about every step.

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
    made: list[TensorRtEngine] = []
    with writing_to(package.path), graphs_for(package, precision) as sources:
        for capability, target in targets.items():
            made += _record(
                package.path,
                [
                    _Build(package, runtime, graph, precision, capability, target).run(
                        sources[graph], profiles[graph], progress
                    )
                    for graph in profiles
                ],
            )
    return made


def engine_precision(package: EnginePackage, asked: str | None) -> str:
    """The precision of the engines, refused if this package can't give it."""
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
    """The first installed TensorRT that builds for all capabilities; see `targeted`."""
    refusals: list[UsageError | DeviceUnavailable] = []
    for runtime in installed_tensorrts():
        try:
            return runtime, targeted(runtime, asked)
        except (UsageError, DeviceUnavailable) as error:
            refusals.append(error)
    raise refusals[0]


def targeted(runtime: TensorRt, asked: Sequence[str]) -> dict[str, Any]:
    """Compute capabilities to build for, with what the builder calls them.

    Args:
        runtime: what is to build.
        asked: capabilities; none means the present device's.

    Raises:
        UsageError: one can't be built for.
        DeviceUnavailable: there is no device and one is needed.
    """
    known = buildable(runtime)
    chosen = list(dict.fromkeys(asked)) or [open_gpu().capability]
    for capability in chosen:
        if capability not in known:
            raise UsageError(
                f"{runtime.name} {runtime.version} can't build for this compute capability",
                seen=capability,
                allowed=", ".join(known),
                hint="install the full TensorRT on a device of that kind and build there",
            )
    return {capability: known[capability] for capability in chosen}


def buildable(runtime: TensorRt) -> dict[str, Any]:
    """Every capability that can be built for: any that RTX knows, or the present device's."""
    if runtime.name == "tensorrt_rtx":
        members = runtime.api.ComputeCapability.__members__.items()
        numbers = {name.removeprefix("SM"): member for name, member in members}
        return {f"{n[:-1]}.{n[-1]}": member for n, member in numbers.items() if n.isdecimal()}
    return {open_gpu().capability: None}


@contextmanager
def graphs_for(package: EnginePackage, precision: str) -> Iterator[dict[str, Path]]:
    """Files of the graphs in the types that TensorRT is to compute in.

    Rewritten ones are streamed, weight by weight, to the disk that holds the package, where they
    stay as long as the context.
    """
    graphs = package.manifest.every_graph
    own = {name: package.path / graph.file for name, graph in graphs.items()}
    if precision == package.manifest.precision != "int8":
        yield own
        return
    with temporary_folder(package.path, ".graphs-") as folder:
        yield {name: _rewritten(source, precision, folder) for name, source in own.items()}


def _rewritten(source: Path, precision: str, folder: Path) -> Path:
    # Imported where a graph must be rewritten: building from other packages needs none of it.
    import onnx_ir as ir

    from meiqa.export.half import halved
    from meiqa.export.signed import signed_activations

    model = ir.load(source)
    if precision == "int8":
        signed_activations(model)
    else:
        halved(model)
    target = folder / source.name
    ir.save(model, target, external_data=f"{source.name}.data")
    return target


@dataclass(frozen=True)
class _Build:
    """One engine to be built."""

    package: EnginePackage
    runtime: TensorRt
    graph: str
    precision: str
    capability: str
    target: Any
    """What the builder calls the capability; None where it knows but the present device."""

    def __str__(self) -> str:
        return f"{self.graph} {self.precision} for {self.capability}"

    def run(
        self, source: Path, profiles: Sequence[Profile], progress: OnStep | None
    ) -> TensorRtEngine:
        """Compile the graph and write the engine, of which the manifest does not know yet."""
        started = time.perf_counter()
        self.runtime.forget_errors()
        builder = self.runtime.api.Builder(self.runtime.logger)
        network = self._parsed(builder, source)
        config = self._configured(builder, profiles)
        with self._timing_cache(config), _interruptible() as interrupted:
            monitor = _monitor(self.runtime.api, str(self), interrupted, progress)
            config.progress_monitor = monitor
            serialised = builder.build_serialized_network(network, config)
        if monitor.failure is not None:
            raise monitor.failure
        if interrupted.is_set():
            raise KeyboardInterrupt
        if serialised is None:
            self._refused(source, self.runtime.errors)
        if progress is not None:
            progress(BuildStep(str(self), "Done", 1.0))
        build_s = time.perf_counter() - started
        return self._written(memoryview(serialised), hull(profiles), build_s)

    def _parsed(self, builder: Any, source: Path) -> Any:
        api = self.runtime.api
        flags = 1 << int(api.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        network = builder.create_network(flags)
        parser = api.OnnxParser(network, self.runtime.logger)
        if not parser.parse_from_file(str(source)):
            errors = [parser.get_error(index) for index in range(parser.num_errors)]
            self._refused(
                source,
                "; ".join(map(_parser_error, errors)),
            )
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
    def _timing_cache(self, config: Any) -> Iterator[None]:
        """Reuse the timings of earlier builds; `tensorrt_rtx` times nothing and keeps none."""
        if self.runtime.name == "tensorrt_rtx":
            yield
            return
        file = user_cache() / f"timing-{self.runtime.version}-{_sm(self.capability)}.cache"
        known = file.read_bytes() if file.is_file() else b""
        config.set_timing_cache(config.create_timing_cache(known), ignore_mismatch=False)
        yield
        file.parent.mkdir(parents=True, exist_ok=True)
        _write(file, memoryview(config.get_timing_cache().serialize()))

    def _written(self, engine: memoryview, profile: Profile, build_s: float) -> TensorRtEngine:
        digest = hashlib.sha256(engine).hexdigest()
        # With the digest in its name a new engine never takes the place of one that is in use.
        parts = (
            self.graph,
            f"{self.runtime.name}{self.runtime.version}",
            _sm(self.capability),
            self.precision,
            digest[:8],
        )
        file = f"{FOLDER}/{'-'.join(parts)}.engine"
        (self.package.path / FOLDER).mkdir(exist_ok=True)
        _write(self.package.path / file, engine)
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


def _parser_error(error: Any) -> str:
    """What is wrong with which node; TensorRT's own description is often a bare condition."""
    kind = error.code().name.lower().replace("_", " ")
    return f"{kind} {error.node_name()} ({error.node_operator()}): {error.desc()}"


def _sm(capability: str) -> str:
    return "sm" + capability.replace(".", "")


def _monitor(api: Any, engine: str, interrupted: threading.Event, progress: OnStep | None) -> Any:
    """A progress monitor that reports the share of the work done and stops when told to."""

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
                self._report(name)
            return self.failure is None and not interrupted.is_set()

        def phase_finish(self, name: str) -> None:
            with self._lock:
                self._phases.pop(name, None)

        def _report(self, phase: str) -> None:
            share, width = 0.0, 1.0
            for done, steps in self._phases.values():
                share += width * min(done, steps) / steps
                width /= steps
            self._share = max(self._share, min(share, 1.0))
            if progress is None or self.failure is not None:
                return
            try:
                progress(BuildStep(engine, phase, self._share))
            except BaseException as error:  # it must not cross TensorRT's frames; raised afterwards
                self.failure = error

    return Monitor()


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
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


@contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """Give a package that can't be written to, or a full disk, an error of ours."""
    try:
        yield
    except OSError as error:
        raise PackageError(
            f"the package at {path} can't be written to",
            seen=error.strerror or str(error),
            hint="free space or copy the package to a directory of your own",
        ) from error


def _write(path: Path, content: memoryview) -> None:
    """Write a file whole or not at all."""
    handle, unfinished = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(unfinished).chmod(0o644)
        Path(unfinished).replace(path)
    except BaseException:
        Path(unfinished).unlink(missing_ok=True)
        raise


def _record(path: Path, made: list[TensorRtEngine]) -> list[TensorRtEngine]:
    """Put new engines into the manifest and remove the files that they replace."""

    def target(engine: TensorRtEngine) -> tuple[str, ...]:
        return engine.graph, engine.runtime, engine.version, engine.compute_capability

    package = EnginePackage.open(path, verify=False)
    replaced = {target(engine) for engine in made}
    kept = [engine for engine in package.manifest.engines if target(engine) not in replaced]
    package.with_engines([*kept, *made])
    used = {engine.file for engine in (*kept, *made)}
    for engine in package.manifest.engines:
        if engine.file not in used:
            with suppress(OSError):  # an engine that is being read stays, but nobody opens it again
                (path / engine.file).unlink()
    return made
