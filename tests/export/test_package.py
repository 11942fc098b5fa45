"""An export gives a whole verified package, or leaves nothing."""

from __future__ import annotations

import errno
import json
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from PIL import Image

from meiqa.engine.calibration import NEUTRAL_GRADED
from meiqa.engine.model import Model
from meiqa.engine.package import EnginePackage
from meiqa.engine.prompts import MEIQA
from meiqa.engine.runtime.decoder import kernel_for
from meiqa.errors import PackageCorrupted, PackageUnwritable, UsageError
from meiqa.export import package as packaging
from meiqa.export.calibration import AIM, SAMPLED_ROWS, Pictures, pictures_in
from meiqa.export.checkpoint import Checkpoint
from meiqa.export.fused import LARGEST_SHARE
from meiqa.export.layers import temporary_folder
from meiqa.export.package import LARGEST_MOVES, Export, ExportOptions, export_package
from meiqa.export.verify import PiecewiseSession, grades_of
from meiqa.kernels.decoder import FASTEST, FASTEST_IN_BF16, KERNELS
from tests.engine.samples import copy_graphs, open_model, picture, relative_difference, seen
from tests.export.tiny import KERNEL_WIDTH, export_float, export_from, make_checkpoint
from training.checkpoint import save_checkpoint

PICTURES = [picture(0)]


def test_the_package_is_complete(package: EnginePackage) -> None:
    assert {file.name for file in package.path.iterdir()} == {
        "manifest.json",
        *package.manifest.files,
    }
    assert package.manifest.precision == "fp32"
    assert EnginePackage.open(package.path).digest == package.digest


def test_int8_is_smaller_and_says_nearly_the_same(
    package: EnginePackage, int8_package: EnginePackage
) -> None:
    assert int8_package.manifest.precision == "int8"
    assert int8_package.digest != package.digest
    packages = (package, int8_package)
    sizes = [(p.path / "decoder.onnx.data").stat().st_size for p in packages]
    assert sizes[1] < sizes[0]
    exact, rounded = (seen(open_model(p), picture(77)) for p in packages)
    assert 0 < relative_difference(exact.values, rounded.values) < 0.1
    exact_read, rounded_read = (open_model(p).prefill([exact])[0].opening.array for p in packages)
    assert 0 < relative_difference(exact_read, rounded_read) < 0.1


def test_attention_stays_in_float(int8_package: EnginePackage) -> None:
    for name in ("vision.onnx", "decoder.onnx"):
        graph = onnx.load(int8_package.path / name).graph
        made_by = {output: node for node in graph.node for output in node.output}
        weights = {initialiser.name for initialiser in graph.initializer}
        kinds = {True: 0, False: 0}
        for node in graph.node:
            if node.op_type == "MatMul" and node.input[1] not in weights:
                second = made_by[node.input[1]]
                quantised = second.op_type == "DequantizeLinear"
                assert not quantised or second.input[0] in weights, node.name
                kinds[quantised] += 1
        assert min(kinds.values()) > 0


def test_the_key_projection_was_fitted(package: EnginePackage) -> None:
    projection = package.array("key_projection.npy")
    width = package.manifest.decoder.hidden_size
    assert projection.shape == (width + 1, width)
    assert np.abs(projection).max() > 0


def test_the_report_states_what_was_measured(package: EnginePackage) -> None:
    parity, grades = (package.manifest.report[part] for part in ("parity", "grades"))
    assert parity["vision"].keys() == {"tokens"}
    assert parity["decoder"].keys() == {"logits", "hidden", "key_values"}
    for measured in parity.values():
        assert all(0 <= output["difference"] <= 1e-4 for output in measured.values())
    assert grades["held_out"] is False  # there are too few pictures to keep some back
    assert grades["pictures"] > 0
    assert 0 <= grades["mean_move"] <= grades["largest_move"] <= 1e-3


@pytest.fixture
def export(
    checkpoint: Path, package: EnginePackage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., EnginePackage]:
    """Give an export into an otherwise empty folder, with the graphs taken from a package."""
    monkeypatch.setattr(Export, "write_graphs", lambda made: copy_graphs(package, made.folder))
    out = tmp_path / "below" / "package"

    def run(**options: Any) -> EnginePackage:
        chosen: dict[str, Any] = {"precision": "fp32", "pictures": PICTURES, **options}
        return export_package(checkpoint, out, ExportOptions(**chosen))

    return run


def nothing_left(tmp_path: Path) -> bool:
    return list((tmp_path / "below").iterdir()) == []


@pytest.mark.parametrize(("accepted", "aimed"), [(1.0, LARGEST_MOVES["int8"]), (0.02, 0.02)])
def test_precisions_are_chosen_for_what_is_allowed_or_for_less(
    export: Callable[..., EnginePackage],
    monkeypatch: pytest.MonkeyPatch,
    accepted: float,
    aimed: float,
) -> None:
    monkeypatch.setattr("meiqa.export.package.STUDIED", slice(2, 4))
    shown: list[tuple[str, float]] = []
    said: list[str] = []
    made = export(
        precision="int8",
        say=said.append,
        pictures=[picture(n) for n in range(4)],
        largest_move=accepted,
        show=lambda *step: shown.append(step),
    )
    report = made.manifest.report
    assert {plan["allowed_move"] for plan in report["plans"]} == {AIM * aimed}
    assert report["plans"][-1]["grade_move"] <= AIM * aimed
    assert report["grades"]["mean_move"] <= accepted
    assert any(step.startswith("multiplications: ") and " in int8" in step for step in said)
    told = [share for step, share in shown if step == "choosing the precision of layers"]
    assert len(told) == len(report["plans"]) + len(report["sensitivity"])


def test_a_target_that_is_there_is_refused(
    export: Callable[..., EnginePackage], tmp_path: Path
) -> None:
    (tmp_path / "below" / "package").mkdir(parents=True)
    with pytest.raises(UsageError, match="is there already"):
        export()
    assert list((tmp_path / "below" / "package").iterdir()) == []


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(UsageError, match=r"int7.*fp32, fp16, int8, int4"):
        ExportOptions(precision="int7")


def test_int8_without_pictures_is_refused() -> None:
    with pytest.raises(UsageError, match="--calibration DIR"):
        ExportOptions(precision="int8")


def test_without_pictures_grades_are_checked_on_made_ones(
    export: Callable[..., EnginePackage],
) -> None:
    made = export(pictures=())
    assert made.manifest.report["grades"]["synthetic"] is True
    assert not made.array("key_projection.npy").any()


def test_a_smaller_area_is_kept_in_the_manifest(export: Callable[..., EnginePackage]) -> None:
    assert export(max_pixels=200 * 200).manifest.image.max_pixels == 200 * 200


def test_an_area_below_the_least_is_refused(
    export: Callable[..., EnginePackage], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="--max-pixels"):
        export(max_pixels=100)
    assert nothing_left(tmp_path)


STEPS = (
    *("write_graphs", "check_graphs", "write_data", "quantise", "check_grades"),
    "fit_key_projection",
)


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), PackageUnwritable),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
    ids=repr,
)
@pytest.mark.parametrize("step", STEPS)
def test_an_export_that_breaks_off_leaves_nothing(
    export: Callable[..., EnginePackage],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    error: BaseException,
    raised: type[BaseException],
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(Export, step, fail)
    with pytest.raises(raised):
        export()
    assert nothing_left(tmp_path)


def test_a_disk_that_fills_up_is_named(
    export: Callable[..., EnginePackage], tmp_path: Path
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # as a quota would do
    try:
        with pytest.raises(PackageUnwritable, match="package can't be written; got File too large"):
            export()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert nothing_left(tmp_path)


def test_a_disk_that_is_too_small_is_refused_at_once(
    export: Callable[..., EnginePackage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(PackageUnwritable, match=r"too little space.*0.0 GiB"):
        export()
    assert nothing_left(tmp_path)


def test_what_an_export_needs_and_how_far_it_is_are_told(
    export: Callable[..., EnginePackage],
) -> None:
    said: list[str] = []
    shown: list[tuple[str, float]] = []
    pictures = [*PICTURES] * 4
    export(pictures=pictures, say=said.append, show=lambda *step: shown.append(step))
    assert re.fullmatch(
        r"\S+ billion weights: up to \d GiB of memory, and \S+ GiB on the disk until .*",
        said[0],
    )
    assert shown == [("describing pictures", at / 4) for at in range(4)]


def test_samples_take_memory_where_layers_are_rounded_by_what_they_read(checkpoint: Path) -> None:
    opened = Checkpoint.open(checkpoint)
    taken = {each: packaging.sampled_bytes(opened, each) for each in LARGEST_MOVES}
    assert taken["fp32"] == taken["fp16"] == 0
    assert taken["int4"] == 4 * taken["int8"]
    headers = opened.weights.headers().items()
    widths = [each.shape[1] for name, each in headers if name.endswith("down_proj.weight")]
    assert taken["int8"] > 4 * SAMPLED_ROWS["int8"] * sum(widths) > 0


def test_what_a_killed_export_left_is_removed_and_what_another_makes_is_not(
    export: Callable[..., EnginePackage], tmp_path: Path
) -> None:
    below = tmp_path / "below"
    below.mkdir()
    killer = (
        "import os, pathlib, signal\n"
        "from meiqa.export.layers import temporary_folder\n"
        f"with temporary_folder(pathlib.Path({str(below)!r}), '.package.partial-') as folder:\n"
        "    (folder / 'decoder.onnx').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", killer], check=False)
    assert killed.returncode == -signal.SIGKILL
    (left,) = below.iterdir()
    with temporary_folder(below, ".package.partial-") as running:
        assert not left.exists()
        (running / "decoder.onnx").write_text("half")
        export()
        assert set(below.iterdir()) == {below / "package", running}
    assert set(below.iterdir()) == {below / "package"}


def test_a_breakdown_while_quantising_leaves_nothing(
    export: Callable[..., EnginePackage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(packaging, "exercise", lambda *_, **__: None)
    monkeypatch.setattr(packaging.Quantisation, "graph", fail)
    with pytest.raises(KeyboardInterrupt):
        export(precision="int4", sensitivity=False)
    assert nothing_left(tmp_path)


def test_answers_that_the_tokenizer_splits_are_refused_at_once(
    export: Callable[..., EnginePackage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Export, "write_graphs", lambda _: pytest.fail("it has begun"))
    with pytest.raises(PackageCorrupted, match="single token"):
        export(prompt=replace(MEIQA, verdicts=("the first one", "the second one")))
    assert nothing_left(tmp_path)


@pytest.mark.parametrize("difference", [2.0, float("nan"), float("inf")])
@pytest.mark.parametrize("graph", ["vision", "decoder"])
def test_graphs_that_differ_from_pytorch_are_refused(
    export: Callable[..., EnginePackage],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    graph: str,
    difference: float,
) -> None:
    run = PiecewiseSession.run

    def disturbed(session: PiecewiseSession, inputs: Any) -> Any:
        made = run(session, inputs)
        if ("cells" in inputs) == (graph == "vision"):
            made[next(iter(made))].flat[-1] += difference
        return made

    monkeypatch.setattr(PiecewiseSession, "run", disturbed)
    with pytest.raises(PackageCorrupted, match=f"exported {graph} graph differs from PyTorch in "):
        export()
    assert nothing_left(tmp_path)


def test_grades_that_move_too_much_are_refused(
    export: Callable[..., EnginePackage], tmp_path: Path
) -> None:
    with pytest.raises(PackageCorrupted, match=r"int8 moves the grades too much.*--no-sens"):
        export(precision="int8", sensitivity=False, largest_move=0.0)
    assert nothing_left(tmp_path)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, EnginePackage]:
    """Give a checkpoint that the native kernel runs, and its fp32 package."""
    checkpoint = tmp_path_factory.mktemp("checkpoint") / "wide"
    save_checkpoint(make_checkpoint(KERNEL_WIDTH), checkpoint)
    out = tmp_path_factory.mktemp("fp32") / "package"
    return checkpoint, export_float(checkpoint, out, PICTURES)


def test_bf16_is_allowed_where_it_was_measured_and_less_than_fp32_was_asked_for(
    wide: tuple[Path, EnginePackage], tmp_path: Path
) -> None:
    checkpoint, exact = wide
    rounded = export_from(exact, checkpoint, tmp_path / "package", "int8", PICTURES)
    can = KERNELS[FASTEST_IN_BF16].in_bf16
    for package, allowed in ((exact, False), (rounded, can)):
        assert package.manifest.bf16 == allowed
        assert ("mean_move_in_bf16" in package.manifest.report["grades"]) == allowed
        assert kernel_for(package) == (FASTEST_IN_BF16 if allowed else FASTEST)
        compared = package.manifest.report["parity"]["decoder.layers"]
        assert compared.keys() <= {"layers.0", "logits"}
        assert 0 < max(compared.values()) <= LARGEST_SHARE[package.manifest.precision]


@pytest.mark.skipif(not KERNELS[FASTEST_IN_BF16].in_bf16, reason="no kernel here has bf16")
def test_bf16_that_moves_grades_too_much_is_not_allowed(
    wide: tuple[Path, EnginePackage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(range(3))

    def moved(model: Model, pictures: Pictures) -> NDArray[np.float64]:
        return grades_of(model, pictures) + (5.0 if next(calls) == 2 else 0.0)

    monkeypatch.setattr(packaging, "grades_of", moved)
    checkpoint, exact = wide
    manifest = export_from(exact, checkpoint, tmp_path / "package", "int8", PICTURES).manifest
    assert not manifest.bf16
    assert manifest.report["grades"]["mean_move_in_bf16"] > 1.0


def test_the_choice_of_pictures_does_not_depend_on_how_many(tmp_path: Path) -> None:
    for number in range(6):
        Image.fromarray(picture(number, (64, 64))).save(tmp_path / f"{number}.png")
    (tmp_path / "notes.txt").touch()
    (tmp_path / "._0.png").touch()
    (tmp_path / "folder.png").mkdir()
    few, many = pictures_in(tmp_path, 2), pictures_in(tmp_path, 9)
    assert (len(few), len(many)) == (2, 6)
    assert few == many[:2]


def test_a_folder_without_photographs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no photographs"):
        pictures_in(tmp_path, 3)
    with pytest.raises(UsageError, match="no folder"):
        pictures_in(tmp_path / "nowhere", 3)


def sealed(checkpoint: Path, folder: Path, options: ExportOptions) -> EnginePackage:
    """Give a package of that checkpoint and these settings, with files that are empty."""
    folder.mkdir(exist_ok=True)
    export = Export(Checkpoint.open(checkpoint), folder, options)
    used = [file for graph in export.graphs.values() for file in graph.files]
    for name in (*used, "embedding.npy", "key_projection.npy", "tokenizer.json"):
        (folder / name).touch()
    export.seal()
    return EnginePackage.open(folder)


@pytest.mark.parametrize("head", ["text", "levels", "grm"])
def test_the_manifest_names_the_score_head(head: str, checkpoint: Path, tmp_path: Path) -> None:
    manifest = sealed(checkpoint, tmp_path, ExportOptions("fp32", score_head=head)).manifest
    assert manifest.score_head == head
    assert manifest.calibration.graded == (NEUTRAL_GRADED if head == "grm" else None)


def test_the_manifest_names_every_token_that_ends_a_turn(checkpoint: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
    tokenizer = Checkpoint.open(copy).tokenizer
    plain = sealed(copy, tmp_path / "plain", ExportOptions("fp32"))
    ids = [tokenizer.token_to_id(token) for token in ("<|im_end|>", "<|vision_end|>")]
    config = copy / "generation_config.json"
    for listed, ends in ((ids, ("<|vision_end|>",)), (ids[0], ()), (None, ())):
        config.write_text(json.dumps({"eos_token_id": listed}))
        package = sealed(copy, tmp_path / "sealed", ExportOptions("fp32"))
        assert package.manifest.ends == ends
        assert (package.digest == plain.digest) == (not ends)
    config.write_text('{"eos_token_id": [99999999]}')
    with pytest.raises(PackageCorrupted, match=r"a token that there is not; got \[99999999\]"):
        Export(Checkpoint.open(copy), tmp_path, ExportOptions("fp32"))


def test_another_score_head_is_refused() -> None:
    with pytest.raises(UsageError, match="text, levels, grm"):
        ExportOptions("fp32", score_head="softmax")
