"""The engine package: one directory with manifest, graphs, embeddings and tokenizer.

`meiqa.export` writes it, the engine opens it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from meiqa.engine.manifest import (
    DEVICES,
    MANIFEST,
    PATTERNS,
    Calibration,
    Manifest,
    PatternGraph,
    ScoreHead,
    TensorRtEngine,
    check_score_head,
)
from meiqa.engine.prompts import Prompts
from meiqa.errors import PackageCorrupted, PackageNotFound, UsageError


@dataclass(frozen=True)
class EnginePackage:
    """A package that was opened; see `open`."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = True) -> EnginePackage:
        """Open a package.

        Args:
            path: its directory.
            verify: compare the SHA-256 of every file with the manifest's.

        Raises:
            PackageNotFound: there is no manifest.
            PackageCorrupted: a file is missing or was changed.
            SchemaUnsupported: written for another version.
        """
        path = Path(path)
        try:
            text = (path / MANIFEST).read_text()
        except OSError as error:
            raise PackageNotFound(
                f"there is no engine package at {path}",
                seen=error.strerror,
                hint="give a directory that holds manifest.json",
            ) from error
        except UnicodeDecodeError as error:
            raise PackageCorrupted(f"{path / MANIFEST} is not text") from error
        package = cls(path, Manifest.from_json(text))
        for name, digest in package.manifest.files.items():
            package.check(name, digest if verify else None)
        if patterns := package.manifest.patterns:
            package.check(patterns.graph.file, patterns.sha256 if verify else None)
        return package

    def check(self, name: str, digest: str | None) -> None:
        """Refuse a file that is missing or, given a digest, was changed."""
        file = self.path / name
        if not file.is_file():
            raise PackageCorrupted(f"the package lacks {file}", hint="export or install it again")
        if digest is not None and file_digest(file) != digest:
            raise PackageCorrupted(
                f"{file} is not the file that the manifest names",
                seen="another SHA-256",
                hint="export or install the package again",
            )

    @property
    def digest(self) -> str:
        """Identity of the package, hex."""
        return self.manifest.digest

    @property
    def widths(self) -> tuple[int, int]:
        """Widths of the keys and of the visual tokens that it makes."""
        return self.manifest.decoder.hidden_size, self.manifest.decoder.embed_width

    @cached_property
    def prompts(self) -> Prompts:
        """The prompt family in this package's tokens."""
        tokenizer = Tokenizer.from_file(str(self.path / "tokenizer.json"))
        return Prompts(self.manifest.prompt, tokenizer)

    @cached_property
    def embedding(self) -> NDArray[np.float16 | np.float32]:
        """Token embeddings (V, D), memory-mapped, in half precision but in an fp32 package."""
        return self.array("embedding.npy")

    def array(self, name: str) -> NDArray[Any]:
        """A NumPy file of the package, memory-mapped, read-only."""
        mapped: NDArray[Any] = np.load(self.path / name, mmap_mode="r", allow_pickle=False)
        return mapped

    def with_calibration(self, calibration: Calibration) -> EnginePackage:
        """Rewrite the manifest with another calibration; the digest stays."""
        return self._rewritten(calibration=calibration)

    def with_score_head(self, head: ScoreHead) -> EnginePackage:
        """Rewrite the manifest with another score head; the digest stays."""
        return self._rewritten(score_head=head)

    def headed(self, head: str | None) -> EnginePackage:
        """The package with another score head, in this process alone; None leaves it as it is.

        Raises:
            UsageError: there is no such head, or the package has no graded response.
        """
        if head is not None:
            wanted = check_score_head(head)
            return replace(self, manifest=replace(self.manifest, score_head=wanted)).headed(None)
        if self.manifest.score_head == "grm" and self.manifest.calibration.graded is None:
            raise UsageError(
                f"the package at {self.path} has no graded response",
                hint="fit one: python -m meiqa.training.graded LABELS.csv --images DIR "
                f"--package {self.path}",
            )
        return self

    def with_engines(self, engines: Sequence[TensorRtEngine]) -> EnginePackage:
        """Rewrite the manifest with other engines; the digest stays."""
        return self._rewritten(engines=tuple(engines))

    def with_patterns(self, patterns: PatternGraph) -> EnginePackage:
        """Rewrite the manifest with other distortion patterns; the digest stays.

        Their file must be there. Engines of the patterns before them are dropped.
        """
        kept = [e for e in self.manifest.engines if e.graph != PATTERNS]
        return self._rewritten(patterns=patterns, engines=tuple(kept))

    def _rewritten(self, **changes: Any) -> EnginePackage:
        """Change the manifest as it is on the disk now, where others may have changed it too."""
        present = EnginePackage.open(self.path, verify=False).manifest
        changed = replace(present, **changes)
        write_manifest(self.path, changed)
        return EnginePackage(self.path, changed)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json whole or not at all."""
    unfinished = folder / f".{MANIFEST}.{os.getpid()}.tmp"
    unfinished.write_text(manifest.to_json())
    unfinished.replace(folder / MANIFEST)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_device(device: str) -> None:
    """Refuse a device name that does not exist."""
    if device not in DEVICES:
        raise UsageError("unknown device", seen=device, allowed=", ".join(DEVICES))
