"""The committed tiny packages are whole, current, and say what their checkpoint says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from meiqa.engine.manifest import SCHEMA
from meiqa.engine.package import EnginePackage
from meiqa.engine.runtime import open_graphs
from meiqa.export.checkpoint import Checkpoint
from meiqa.export.graphs import decoder_interface, vision_interface
from meiqa.export.verify import decoder_feeds, largest_differences, vision_feeds
from tests.engine.samples import ANCHORS, read_memory
from tests.export.make_tiny import TINY
from tests.export.tiny import reference_sessions

MOST_BYTES = 1_000_000


@pytest.mark.parametrize("name", ["fp32", "int8", "patterned"])
def test_a_committed_manifest_has_the_current_schema(name: str) -> None:
    assert json.loads((TINY / name / "manifest.json").read_text())["schema"] == SCHEMA


def test_the_committed_packages_open_and_fit_together(
    tiny_files: Path, patterned: EnginePackage
) -> None:
    package = EnginePackage.open(tiny_files / "fp32")
    assert patterned.digest == package.digest
    assert patterned.manifest.patterns is not None
    assert EnginePackage.open(tiny_files / "int8").manifest.source == package.manifest.source
    with read_memory(package, tiny_files / "anchors") as memory:
        assert memory.snapshot().count_anchors == ANCHORS


def test_the_committed_files_stay_small() -> None:
    assert sum(file.stat().st_size for file in TINY.rglob("*") if file.is_file()) < MOST_BYTES


def test_the_committed_graphs_are_those_of_the_committed_checkpoint(tiny_files: Path) -> None:
    checkpoint, package = (
        Checkpoint.open(tiny_files / "checkpoint"),
        EnginePackage.open(tiny_files / "fp32"),
    )
    manifest = package.manifest
    assert (manifest.image, manifest.decoder) == (
        checkpoint.image,
        checkpoint.text.shape,
    )
    assert manifest.graphs == {
        "vision": vision_interface(manifest.image, manifest.decoder),
        "decoder": decoder_interface(manifest.decoder),
    }
    calls = (vision_feeds(manifest.image), decoder_feeds(manifest.decoder))
    opened = open_graphs(package, ["vision", "decoder"], "cpu", 1)
    sessions = zip(reference_sessions(checkpoint), opened, strict=True)
    for (wanted, made), feeds in zip(sessions, calls, strict=True):
        for difference, size in largest_differences(wanted, made, feeds, 1e-4, 0.0).values():
            assert difference <= max(1e-4, 1e-5 * size)
