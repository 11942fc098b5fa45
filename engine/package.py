"""The engine package: one directory with manifest, graphs, embeddings and tokenizer.

`meiqa.export` writes it, the engine opens it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from meiqa.engine.calibration import Calibration, ScoreHead, check_score_head
from meiqa.engine.manifest import MANIFEST, PATTERNS, Manifest, PatternGraph, TensorRtEngine
from meiqa.engine.prompts import Prompts
from meiqa.errors import PackageCorrupted, PackageNotFound, UsageError


@dataclass(frozen=True)
class EnginePackage:
    """A package that was opened; see `open`."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(
        cls, path: str | Path, *, verify: bool = True, head: str | None = None
    ) -> EnginePackage:
        """Open a package.

        Args:
            verify: compare the SHA-256 of every file with the manifest's.
            head: what makes the first score in this process; the package's own by default.

        Raises:
            PackageNotFound: there is no manifest.
            PackageCorrupted, SchemaUnsupported: this version can't use it.
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
        listed = dict(package.manifest.files)
        if patterns := package.manifest.patterns:
            listed[patterns.graph.file] = patterns.sha256
        digests = listed.values() if verify else [None] * len(listed)
        with ThreadPoolExecutor() as beside:
            for _ in beside.map(package.check, listed, digests):
                pass
        return package if head is None else package.headed(check_score_head(head))

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
        return self.manifest.digest

    @property
    def widths(self) -> tuple[int, int]:
        """Widths of the keys and of the visual tokens that it makes."""
        return self.manifest.decoder.hidden_size, self.manifest.decoder.embed_width

    @cached_property
    def prompts(self) -> Prompts:
        tokenizer = Tokenizer.from_file(str(self.path / "tokenizer.json"))
        return Prompts(self.manifest.prompt, tokenizer, self.manifest.ends)

    @cached_property
    def embedding(self) -> NDArray[np.float16 | np.float32]:
        """Token embeddings (V, D), memory-mapped, in half precision but in an fp32 package."""
        return self.array("embedding.npy")

    def array(self, name: str) -> NDArray[Any]:
        """A NumPy file of the package, memory-mapped, read-only."""
        mapped: NDArray[Any] = np.load(self.path / name, mmap_mode="r", allow_pickle=False)
        return mapped

    def headed(self, head: ScoreHead) -> EnginePackage:
        """Give the package another score head, in this process alone."""
        if head == "grm" and self.manifest.calibration.graded is None:
            raise UsageError(
                f"the package at {self.path} has no graded response",
                hint="fit one on its anchors: meiqa calibrate LABELS.csv --images DIR "
                f"--package {self.path} --memory DIR",
            )
        return replace(self, manifest=replace(self.manifest, score_head=head))

    def rewritten(
        self,
        *,
        calibration: Calibration | None = None,
        engines: Sequence[TensorRtEngine] | None = None,
        patterns: PatternGraph | None = None,
    ) -> EnginePackage:
        """Rewrite the manifest, as it is on the disk now, with other parts; the digest stays.

        Args:
            patterns: their file must be there; engines of those before them are dropped.
        """
        present = EnginePackage.open(self.path, verify=False).manifest
        kept = present.engines if engines is None else engines
        if patterns is not None:
            kept = [engine for engine in kept if engine.graph != PATTERNS]
        changed = replace(
            present,
            calibration=calibration or present.calibration,
            engines=tuple(kept),
            patterns=patterns or present.patterns,
        )
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
