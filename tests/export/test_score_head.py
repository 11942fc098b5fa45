"""The score head of an exported package."""

from __future__ import annotations

from pathlib import Path

import pytest

from meiqa.engine.manifest import NEUTRAL_GRADED
from meiqa.errors import UsageError
from meiqa.export.checkpoint import Checkpoint
from meiqa.export.package import Export, ExportOptions


@pytest.mark.parametrize("head", ["text", "levels", "grm"])
def test_the_manifest_names_it(head: str, checkpoint: Path, tmp_path: Path) -> None:
    export = Export(Checkpoint.open(checkpoint), tmp_path, ExportOptions("fp32", score_head=head))
    manifest = export.manifest({}, {})
    assert manifest.score_head == head
    assert manifest.calibration.graded == (NEUTRAL_GRADED if head == "grm" else None)


def test_another_is_refused() -> None:
    with pytest.raises(UsageError, match="text, levels, grm"):
        ExportOptions("fp32", score_head="softmax")
