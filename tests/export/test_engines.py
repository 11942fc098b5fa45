"""TensorRT engines of the default model, built without a GPU and opened as far as that goes."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, save

from meiqa.engine.estimates import expected_grade
from meiqa.engine.images import grid_of, tiles_of
from meiqa.engine.local import LocalModel
from meiqa.engine.manifest import GRAPHS, PATTERNS, Graph, ImageProcessing, TensorRtEngine
from meiqa.engine.package import EnginePackage, file_digest, write_manifest
from meiqa.engine.runtime.decoder import GraphDecoder
from meiqa.engine.runtime.tensorrt import (
    TensorRt,
    hull,
    installed_tensorrts,
    loaded_engine,
    open_gpu,
)
from meiqa.errors import DeviceUnavailable, PackageCorrupted, PackageError, UsageError
from meiqa.export import engines as building
from meiqa.export.engines import (
    EngineBuild,
    Limits,
    build_engines,
    builder_for,
    decoder_profiles,
    graphs_for,
    grid_boxes,
    longest_side,
    profile_of,
    vision_profiles,
)
from meiqa.export.package import ExportOptions, export_package
from meiqa.locations import embedded_assets, user_cache
from tests.engine.samples import PHOTOS, seen

CAPABILITIES = ("8.6", "8.9", "12.0")
DEFAULT = embedded_assets() / "package"
CHECKPOINT = Path(__file__).parents[2] / "training" / "default"

needs_builder = pytest.mark.skipif(
    find_spec("tensorrt_rtx") is None,
    reason="tensorrt_rtx is not installed: pip install meiqa[rtx]",
)


def sealed(folder: Path, **changes: Any) -> EnginePackage:
    """A package whose graphs were changed, with their digests and other fields brought up."""
    manifest = EnginePackage.open(folder, verify=False).manifest
    graphs = changes.get("graphs", manifest.graphs)
    names = {*manifest.files, *(name for graph in graphs.values() for name in graph.files)}
    files = {name: file_digest(folder / name) for name in sorted(names)}
    write_manifest(folder, replace(manifest, files=files, **changes))
    return EnginePackage.open(folder)


@pytest.fixture(scope="module")
def float_package(tmp_path_factory: pytest.TempPathFactory) -> EnginePackage:
    """Give the default model in fp32, exported from its checkpoint."""
    out = tmp_path_factory.mktemp("float") / "package"
    return export_package(CHECKPOINT, out, ExportOptions("fp32"))


@pytest.fixture(scope="module")
def int8_package(tmp_path_factory: pytest.TempPathFactory) -> EnginePackage:
    """Give a copy of the default model."""
    folder = tmp_path_factory.mktemp("int8") / "package"
    return EnginePackage.open(Path(shutil.copytree(DEFAULT, folder)))


@pytest.fixture
def copied(int8_package: EnginePackage, tmp_path: Path) -> Path:
    """Give the folder of a package of one's own, without engines."""
    folder = Path(shutil.copytree(DEFAULT, tmp_path / "package"))
    return sealed(folder, engines=()).path


@pytest.fixture(scope="module", params=["fp16", "int8"])
def built(request: pytest.FixtureRequest) -> tuple[EnginePackage, list[TensorRtEngine]]:
    """Give a package with engines for every capability, and what the build returned."""
    source = {"fp16": "float_package", "int8": "int8_package"}[request.param]
    package: EnginePackage = request.getfixturevalue(source)
    made = build_engines(package.path, CAPABILITIES, request.param)
    return EnginePackage.open(package.path), made


@needs_builder
class TestBuiltEngines:
    def test_there_is_one_for_each_graph_and_capability(
        self, built: tuple[EnginePackage, list[TensorRtEngine]]
    ) -> None:
        package, made = built
        graphs = [*GRAPHS, PATTERNS]
        wanted = [(graph, capability) for capability in CAPABILITIES for graph in graphs]
        assert [(engine.graph, engine.compute_capability) for engine in made] == wanted
        assert list(package.manifest.engines) == made
        assert len({engine.file for engine in made}) == len(made)

    def test_the_records_tell_what_is_there(
        self, built: tuple[EnginePackage, list[TensorRtEngine]]
    ) -> None:
        package, made = built
        for engine in made:
            file = package.path / engine.file
            assert file.stat().st_size == engine.size_bytes
            assert file_digest(file) == engine.sha256
            assert engine.version == installed_tensorrts()[0].version
            assert engine.runtime in file.name
            assert engine.version in file.name
            assert f"sm{engine.compute_capability.replace('.', '')}" in file.name
            assert engine.precision in file.name
        assert {file.name for file in (package.path / "engines").iterdir()} == {
            Path(engine.file).name for engine in made
        }

    def test_inputs_shapes_and_ranges_are_recorded(
        self, built: tuple[EnginePackage, list[TensorRtEngine]]
    ) -> None:
        package, made = built
        for engine in made:
            graph = package.manifest.every_graph[engine.graph]
            assert engine.profile.keys() == graph.inputs.keys()
            for name, axes in graph.inputs.items():
                least, usual, greatest = engine.profile[name]
                for axis, low, middle, high in zip(axes, least, usual, greatest, strict=True):
                    assert 1 <= low <= middle <= high
                    if isinstance(axis, int):
                        assert low == high == axis
        vision, decoder = made[:2]
        assert vision.profile["cells"][2][:2] == (64, 64)
        assert decoder.profile["embeds"][2][:2] == (8, 8)

    def test_the_names_of_inputs_and_outputs_are_in_the_engine(
        self, built: tuple[EnginePackage, list[TensorRtEngine]]
    ) -> None:
        package, made = built
        for engine in made:
            content = (package.path / engine.file).read_bytes()
            graph = package.manifest.every_graph[engine.graph]
            assert all(name.encode() in content for name in (*graph.inputs, *graph.outputs))

    def test_they_reopen_up_to_the_driver(
        self, built: tuple[EnginePackage, list[TensorRtEngine]], tmp_path: Path
    ) -> None:
        """Without a driver TensorRT reads the plan and stops where it wants a stream."""
        package, made = built
        try:
            open_gpu()
        except DeviceUnavailable:
            pass
        else:
            pytest.skip("there is a GPU: tests/engine/test_tensorrt.py runs the engines")
        runtime = installed_tensorrts()[0]
        for engine in made:
            with pytest.raises(PackageCorrupted, match=r"cudaError|CUDA") as caught:
                loaded_engine(package.path / engine.file, engine, runtime)
            assert "Serialization" not in str(caught.value)
            diagnosed = runtime.api.Runtime(runtime.logger).get_engine_validity(
                (package.path / engine.file).read_bytes()
            )[1]
            assert not diagnosed & int(runtime.api.EngineInvalidityDiagnostics.MALFORMED_ENGINE)
        cut = tmp_path / "engines" / "cut.engine"
        cut.parent.mkdir()
        cut.write_bytes((package.path / made[0].file).read_bytes()[:-100])
        with pytest.raises(PackageCorrupted, match=r"cut\.engine.*Serialization.*meiqa build"):
            loaded_engine(cut, made[0], runtime)

    def test_a_build_leaves_no_other_trace(
        self, built: tuple[EnginePackage, list[TensorRtEngine]]
    ) -> None:
        package, _ = built
        names = {path.name for path in package.path.iterdir()}
        graphs = {graph.file for graph in package.manifest.every_graph.values()}
        assert names == {"manifest.json", "engines", *package.manifest.files, *graphs}
        assert package.digest == EnginePackage.open(package.path).digest


@needs_builder
class TestBuilding:
    def test_a_rebuild_replaces_record_and_file(self, copied: Path) -> None:
        runtime = installed_tensorrts()[0]
        before = [
            TensorRtEngine(
                graph=graph,
                file=f"engines/{graph}-{version}-{capability}.engine",
                sha256="",
                runtime=runtime.name,
                version=version,
                compute_capability=capability,
                precision="int8",
                profile={},
                size_bytes=1,
                build_s=0.0,
            )
            for graph in GRAPHS
            for version, capability in (
                (runtime.version, "8.9"),
                (runtime.version, "8.6"),
                ("1", "8.9"),
            )
        ]
        (copied / "engines").mkdir()
        for engine in before:
            (copied / engine.file).touch()
        EnginePackage.open(copied).rewritten(engines=before)
        made = build_engines(copied, ["8.9"], limits=Limits(batch=2))
        assert made[1].profile["embeds"][2][0] == 2
        kept = [engine for index, engine in enumerate(before) if index % 3 != 0]
        assert list(EnginePackage.open(copied).manifest.engines) == [*kept, *made]
        assert set(copied.glob("engines/*")) == {copied / e.file for e in (*kept, *made)}

    def test_progress_goes_up_to_the_end(self, copied: Path) -> None:
        steps: list[tuple[str, float]] = []
        build_engines(
            copied,
            ["8.9"],
            progress=lambda engine, phase, share: steps.append((engine, share)),
        )
        for graph in GRAPHS:
            shares = [share for engine, share in steps if engine == f"{graph} int8 for 8.9"]
            assert shares == sorted(shares)
            assert shares[0] < 0.5
            assert shares[-1] == 1.0
            assert len(shares) > 100

    def test_ctrl_c_stops_the_build_and_leaves_nothing(self, copied: Path) -> None:
        handler = signal.getsignal(signal.SIGINT)

        def interrupt(engine: str, phase: str, share: float) -> None:
            if engine.startswith("decoder") and share > 0.1:
                signal.raise_signal(signal.SIGINT)

        with pytest.raises(KeyboardInterrupt):
            build_engines(copied, ["8.9"], progress=interrupt)
        assert signal.getsignal(signal.SIGINT) is handler
        assert EnginePackage.open(copied).manifest.engines == ()
        assert [path.name for path in copied.glob(".*")] == []
        assert not list(copied.glob("engines/decoder*"))

    def test_a_failing_observer_stops_the_build(self, copied: Path) -> None:
        def fail(engine: str, phase: str, share: float) -> None:
            raise BrokenPipeError("nobody reads")

        with pytest.raises((BrokenPipeError, PackageError), match="nobody reads"):
            build_engines(copied, ["8.9"], progress=fail)
        assert EnginePackage.open(copied).manifest.engines == ()

    def test_a_full_disk(self, copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(handle: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(PackageError, match="No space left on device"):
            build_engines(copied, ["8.9"])
        assert EnginePackage.open(copied).manifest.engines == ()
        assert list((copied / "engines").iterdir()) == []

    def test_a_capability_that_the_builder_does_not_know(self, copied: Path) -> None:
        with pytest.raises(UsageError, match=r"got 9\.0; allowed: 7\.5, .*8\.9.*12\.0"):
            build_engines(copied, ["8.9", "9.0"])
        assert not (copied / "engines").exists()

    def test_an_operator_that_tensorrt_does_not_know(
        self, float_package: EnginePackage, tmp_path: Path
    ) -> None:
        folder = Path(shutil.copytree(float_package.path, tmp_path / "package"))
        kinds = [("cells", ["h", "w", 12288]), ("tokens", ["n", 256])]
        read, made = (helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in kinds)
        nodes = [
            helper.make_node("DynamicQuantizeLinear", ["cells"], ["q", "s", "z"], name="odd"),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["tokens"]),
        ]
        graph = helper.make_graph(nodes, "vision", [read], [made])
        save(helper.make_model(graph), folder / "vision.onnx")
        sealed(folder)
        with pytest.raises(PackageCorrupted) as caught:
            build_engines(folder, ["8.9"])
        message = str(caught.value)
        assert "vision.onnx" in message
        assert "unsupported node odd (DynamicQuantizeLinear)" in message
        assert "\n" not in message

    def test_a_graph_of_another_interface(
        self, float_package: EnginePackage, tmp_path: Path
    ) -> None:
        folder = Path(shutil.copytree(float_package.path, tmp_path / "package"))
        graphs = EnginePackage.open(folder).manifest.graphs
        other = replace(graphs["vision"], outputs={"something": (1, 2)})
        sealed(folder, graphs={**graphs, "vision": other})
        with pytest.raises(PackageCorrupted, match=r"vision\.onnx.*got tokens.*something"):
            build_engines(folder, ["8.9"])


@pytest.mark.parametrize(
    ("own", "asked", "allowed"),
    [("int8", "fp16", "int8"), ("int8", "fp32", "int8"), ("fp32", "int8", "fp32, fp16")],
)
def test_precisions_that_a_package_can_t_give(
    copied: Path, own: str, asked: str, allowed: str
) -> None:
    sealed(copied, precision=own)
    with pytest.raises(UsageError) as caught:
        build_engines(copied, ["8.9"], asked)
    message = str(caught.value)
    assert f"package in {own}" in message
    assert f"allowed: {allowed};" in message
    assert f"meiqa export CHECKPOINT --out OTHER --precision {asked}" in message


def fake_runtime(name: str) -> TensorRt:
    members = {"NONE": 0, "CURRENT": 1, "SM89": 89, "SM120": 120}
    capability = SimpleNamespace(__members__=members)
    return TensorRt(name, "1.0", SimpleNamespace(ComputeCapability=capability), None)


class TestWhoBuilds:
    @pytest.fixture(autouse=True)
    def hopper(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(building, "open_gpu", lambda: SimpleNamespace(capability="9.0"))

    def installed(self, monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
        runtimes = [fake_runtime(name) for name in names]
        monkeypatch.setattr(building, "installed_tensorrts", lambda: runtimes)

    @pytest.mark.parametrize(
        ("asked", "name", "targets"),
        [
            (["8.9", "12.0", "8.9"], "tensorrt_rtx", {"8.9": 89, "12.0": 120}),
            (["9.0"], "tensorrt", {"9.0": None}),
            ([], "tensorrt", {"9.0": None}),
        ],
    )
    def test_the_first_that_can(
        self, monkeypatch: pytest.MonkeyPatch, asked: list[str], name: str, targets: dict[str, Any]
    ) -> None:
        self.installed(monkeypatch, "tensorrt_rtx", "tensorrt")
        runtime, chosen = builder_for(asked)
        assert (runtime.name, chosen) == (name, targets)

    @pytest.mark.parametrize(
        ("name", "asked", "allowed"),
        [("tensorrt_rtx", "8.7", r"8\.9, 12\.0;"), ("tensorrt", "8.9", r"9\.0;")],
    )
    def test_nobody_can(
        self, monkeypatch: pytest.MonkeyPatch, name: str, asked: str, allowed: str
    ) -> None:
        self.installed(monkeypatch, name)
        with pytest.raises(UsageError, match=f"{name}.*got {asked}; allowed: {allowed}.*device"):
            builder_for([asked])


@pytest.mark.parametrize("name", ["batch", "suffix", "prefix", "past"])
def test_limits_start_at_one(name: str) -> None:
    with pytest.raises(UsageError, match=f"--max-{name}"):
        Limits(**{name: 0})


def test_building_needs_no_pytorch() -> None:
    code = "import sys, meiqa.export.engines; print('torch' in sys.modules)"
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "False"


class TestProfiles:
    @pytest.mark.parametrize("most", [1, 2, 64, 149, 256, 1280, 16384])
    def test_the_boxes_hold_every_photo(self, most: int) -> None:
        random = np.random.default_rng(most)
        boxes = grid_boxes(most)
        image = ImageProcessing(14, 2, 1, most * 28**2, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        for _ in range(2000):
            aspect = 100 ** random.uniform(0, 1)
            area = random.uniform(0.1, 3) * most * 28**2
            short = max(1, round((area / aspect) ** 0.5))
            sides = [short, int(short * aspect)]
            height, width = random.permutation(sides)
            rows, columns = grid_of(height, width, image)
            assert any(rows <= a and columns <= b for a, b in boxes), (rows, columns)

    @pytest.mark.parametrize("most", [1, 64, 149, 1280, 16384])
    def test_no_box_is_much_larger_than_a_photo(self, most: int) -> None:
        assert all(a * b <= max(2 * most, 256) for a, b in grid_boxes(most))
        assert max(max(box) for box in grid_boxes(most)) == longest_side(most)

    def test_the_usual_photo_is_what_kernels_are_chosen_for(
        self, int8_package: EnginePackage
    ) -> None:
        square, *others = vision_profiles(int8_package)
        assert square["cells"][1] == (8, 8, 12288)
        for profile in others:
            least, usual, greatest = profile["cells"]
            assert all(a <= b <= c for a, b, c in zip(least, usual, greatest, strict=True))
            assert usual[0] * usual[1] <= 64

    def test_photos_in_tiles_have_a_profile_of_their_own(self, int8_package: EnginePackage) -> None:
        half, tilings = (0.5, 0.5, 0.5), tuple((r, c) for r in range(1, 7) for c in range(1, 7))
        image = ImageProcessing(14, 1, 1, 1 << 20, half, half, False, 384, tilings)
        vision = {"cells": ("tiles", 729, 588), "order": ("shown",)}
        graphs = {"vision": Graph("vision.onnx", None, vision, {"tokens": ("tokens", 64)})}
        manifest = replace(int8_package.manifest, image=image, graphs=graphs)
        (profile,) = vision_profiles(EnginePackage(int8_package.path, manifest))
        rng = np.random.default_rng(0)
        for height, width in rng.integers(40, 3000, (40, 2)):
            tiles, order = tiles_of(np.zeros((height, width, 3), np.uint8), image)
            assert len(tiles) <= profile["cells"][2][0]
            assert len(order) <= profile["order"][2][0]

    def test_limits_end_up_in_the_profiles(self, int8_package: EnginePackage) -> None:
        limits = Limits(batch=3, suffix=50, prefix=40, past=30)
        paired, shared, writing = decoder_profiles(int8_package, limits)
        assert paired["embeds"][2][:3] == (3, 1, 50)
        assert shared["embeds"][2][:3] == (1, 3, 50)
        assert writing["embeds"][2][:3] == (1, 1, 50)
        assert [p["prefix"][2][4] for p in (paired, shared, writing)] == [40, 40, 40]
        assert [p["past"][2][5] for p in (paired, shared, writing)] == [1, 1, 30]

    def test_an_axis_of_which_nothing_is_known(self, int8_package: EnginePackage) -> None:
        with pytest.raises(PackageCorrupted, match="got w"):
            profile_of(int8_package.manifest.graphs["vision"], {"h": (1, 1, 1)})


class OrtSession:
    """A graph file in ONNX Runtime.

    Moving int8 Q/DQ past a Reshape, ONNX Runtime 1.31 gives them a zero point of uint8, and then
    refuses its own graph.
    """

    def __init__(self, path: Path) -> None:
        self.session = onnxruntime.InferenceSession(
            path,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=["QDQPropagationTransformer"],
        )

    def run(self, inputs: Any) -> dict[str, Any]:
        names = [value.name for value in self.session.get_outputs()]
        return dict(zip(names, self.session.run(names, inputs), strict=True))


@pytest.fixture(scope="module")
def rewritten(int8_package: EnginePackage) -> Iterator[dict[str, Path]]:
    """Give the INT8 graphs as TensorRT takes them."""
    with graphs_for(int8_package, "int8") as paths:
        yield paths


class TestSignedActivations:
    def test_only_int8_around_zero_is_left(self, rewritten: dict[str, Path]) -> None:
        for graph in GRAPHS:
            path = rewritten[graph]
            nodes = [n for n in ir.load(path).graph if n.op_type.endswith("quantizeLinear")]
            nodes += [n for n in ir.load(path).graph if n.op_type == "QuantizeLinear"]
            assert nodes
            for node in nodes:
                zero = node.inputs[2].const_value
                assert zero.dtype == ir.DataType.INT8
                assert not zero.numpy().any()

    def test_weights_stay_what_they_were(
        self, int8_package: EnginePackage, rewritten: dict[str, Path]
    ) -> None:
        for name, path in rewritten.items():
            before, after = (
                {
                    key: value.const_value.numpy()
                    for key, value in ir.load(file).graph.initializers.items()
                    if value.const_value.dtype == ir.DataType.INT8 and value.const_value.size > 1
                }
                for file in (int8_package.path / f"{name}.onnx", path)
            )
            assert before.keys() == after.keys()
            assert all((before[key] == after[key]).all() for key in before)

    def test_answers_stay_close(
        self, int8_package: EnginePackage, rewritten: dict[str, Path]
    ) -> None:
        theirs = LocalModel.open(int8_package, "cpu", 1)
        vision, decoder = (OrtSession(rewritten[name]) for name in GRAPHS)
        shape = int8_package.manifest.decoder
        ours = LocalModel(int8_package, vision, GraphDecoder(decoder, shape))
        tokens = [[seen(model, photo) for photo in PHOTOS] for model in (theirs, ours)]
        for wanted, made in zip(*tokens, strict=True):
            off = np.linalg.norm(made.values - wanted.values) / np.linalg.norm(wanted.values)
            assert off < 0.15
        grades = [
            [expected_grade(model.grade(prefix)) for prefix in model.prefill(seen_by)]
            for model, seen_by in zip((theirs, ours), tokens, strict=True)
        ]
        assert np.abs(np.subtract(*grades)).mean() < 0.03

    def test_a_tensor_around_another_value(self, copied: Path) -> None:
        model = ir.load(copied / "vision.onnx")
        weight = next(
            node
            for node in model.graph
            if node.op_type == "DequantizeLinear" and node.inputs[2].dtype == ir.DataType.INT8
        )
        zero = weight.inputs[2]
        zero.const_value = ir.tensor(np.full(zero.shape.numpy(), 3, np.int8), name=zero.name)
        ir.save(model, copied / "vision.onnx")
        with (
            pytest.raises(PackageCorrupted, match="not quantised around zero"),
            graphs_for(sealed(copied), "int8"),
        ):
            pass
        assert list(copied.glob(".graphs*")) == []


class TestTimingCache:
    """It is kept for `tensorrt` only; for `tensorrt_rtx` these calls do nothing."""

    @pytest.fixture
    def build(
        self, int8_package: EnginePackage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> Callable[[str], EngineBuild]:
        monkeypatch.setenv("MEIQA_CACHE", str(tmp_path / "cache"))

        def made(name: str) -> EngineBuild:
            runtime = TensorRt(name, "10.16.2", None, None)
            return EngineBuild(int8_package, runtime, "vision", "int8", "8.7", None)

        return made

    def test_a_later_build_starts_from_it(self, build: Callable[[str], EngineBuild]) -> None:
        known = []
        config = SimpleNamespace(
            create_timing_cache=lambda content: known.append(content),
            set_timing_cache=lambda cache, ignore_mismatch: True,
            get_timing_cache=lambda: SimpleNamespace(serialize=lambda: b"timings"),
        )
        for _ in range(2):
            with build("tensorrt").timing_cache(config):
                pass
        assert known == [b"", b"timings"]
        assert [path.name for path in user_cache().iterdir()] == ["timing-10.16.2-sm87.cache"]

    def test_rtx_has_none(self, build: Callable[[str], EngineBuild]) -> None:
        with build("tensorrt_rtx").timing_cache(None):
            pass
        assert not user_cache().exists()


def test_the_record_holds_the_hull_of_the_profiles(int8_package: EnginePackage) -> None:
    whole = hull(decoder_profiles(int8_package, Limits()))
    assert whole["embeds"][0][:3] == (1, 1, 1)
    assert whole["embeds"][2][:2] == (8, 8)
