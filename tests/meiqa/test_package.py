"""`meiqa export`, `build` and `inspect`, as they are called."""

from __future__ import annotations

import builtins
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from meiqa import cli
from meiqa.engine.package import EnginePackage
from meiqa.errors import install_hint
from meiqa.locations import embedded_assets
from tests.engine.samples import copy_graphs, picture

Output = pytest.CaptureFixture[str]


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    folder = tmp_path / "photographs"
    folder.mkdir()
    for seed in range(3):
        Image.fromarray(picture(seed, (128, 192))).save(folder / f"{seed}.png")
    return folder


@pytest.fixture
def quick(package: EnginePackage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the graphs from a package, since tracing is slow."""
    # By its name, so that PyTorch is imported when a test needs it, not by each process.
    monkeypatch.setattr(
        "meiqa.export.package.Export.write_graphs", lambda made: copy_graphs(package, made.folder)
    )


def refusal(command: list[str], output: Output) -> str:
    """The one line with which a command ends that can't work."""
    assert cli.main(command) == 2
    (line,) = output.readouterr().err.splitlines()
    return str(line)


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_an_export_says_what_it_does_and_can_be_inspected(
    checkpoint: Path, photographs: Path, tmp_path: Path, capsys: Output
) -> None:
    out = tmp_path / "package"
    options = ["--out", str(out), "--precision", "fp32", "--calibration", str(photographs)]
    options += ["--prompt", "meiqa", "--max-pixels", "40000"]
    assert cli.main(["export", str(checkpoint), *options]) == 0
    said = capsys.readouterr().err
    assert "comparing the decoder graph with PyTorch" in said
    assert "describing 3 pictures" in said
    assert (
        said.splitlines()[-1] == f"meiqa: {out}: done; `meiqa inspect {out}` shows what is inside"
    )

    assert cli.main(["inspect", str(out), "--format", "json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["precision"], report["prompt"]) == ("fp32", "meiqa")
    assert report["image"]["max_pixels"] == 40000
    assert report["report"]["grades"]["pictures"] == 3

    assert cli.main(["inspect", str(out)]) == 0
    text = capsys.readouterr().out
    for shown in (
        "MeiqaConvHybrid",
        "decoder.onnx.data",
        "key_values",
        "mean_move",
        "none; `meiqa",
    ):
        assert shown in text


def test_the_shipped_package_shows_its_sensitivity(capsys: Output) -> None:
    assert cli.main(["inspect", str(embedded_assets() / "package")]) == 0
    text = capsys.readouterr().out
    assert "lm_head.weight" in text
    assert "int8" in text
    assert re.search(r"interval_coverage_degraded  0\.\d+", text)


@pytest.mark.slow
def test_an_export_of_nothing(tmp_path: Path, capsys: Output) -> None:
    said = refusal(["export", str(tmp_path), "--out", "p", "--precision", "fp16"], capsys)
    assert "config.json" in said
    command = ["export", str(tmp_path / "none"), "--out", "p", "--precision", "fp16"]
    said = refusal(command, capsys)
    assert "hub id" in said


def test_an_export_onto_something(checkpoint: Path, tmp_path: Path, capsys: Output) -> None:
    command = ["export", str(checkpoint), "--out", str(tmp_path), "--precision", "fp32"]
    assert "is there already" in refusal(command, capsys)


def test_int8_without_photographs(checkpoint: Path, tmp_path: Path, capsys: Output) -> None:
    command = ["export", str(checkpoint), "--out", str(tmp_path / "p")]
    assert "--calibration DIR" in refusal(command, capsys)


def test_an_unknown_prompt_family(checkpoint: Path, tmp_path: Path, capsys: Output) -> None:
    command = ["export", str(checkpoint), "--out", str(tmp_path / "p"), "--prompt", "q-instinct"]
    assert "visualquality-r1" in refusal([*command, "--precision", "fp32"], capsys)


@pytest.mark.slow
def test_a_hub_that_cannot_be_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    asked: list[tuple[str, list[str]]] = []

    def unreachable(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        raise OSError("no route\nto host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    command = ["export", "some/model", "--out", str(tmp_path / "p"), "--precision", "fp32"]
    assert "can't be downloaded; got no route" in refusal(command, capsys)
    assert asked == [("some/model", ["*.json", "*.safetensors"])]


@pytest.mark.parametrize(
    ("command", "module", "extra"),
    [
        (["export", "c", "--out", "p"], "meiqa.export.checkpoint", "export"),
        (["build", "p"], "meiqa.export.engines", "rtx"),
    ],
)
def test_what_is_not_installed_is_named_with_its_extra(
    command: list[str],
    module: str,
    extra: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Output,
) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == module:
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    said = refusal(command, capsys)
    assert "no torch" in said
    assert install_hint(extra) in said
