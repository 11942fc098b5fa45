"""The memory of an engine: anchors and contrast cases behind one face."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType

from meiqa.errors import UsageError
from meiqa.memory.anchors import AnchorMemory
from meiqa.memory.cases import Case, FloatArray
from meiqa.memory.contrast import ContrastMemory, ContrastView, Mode
from meiqa.memory.records import Identity
from meiqa.memory.retrieval import RetrievalPolicy, nearest_anchors, shares

__all__ = ["Case", "MemoryBank", "Snapshot"]


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The memory as it was at one moment; safe to share between threads."""

    _anchors: AnchorMemory
    _contrast: ContrastView
    _note_retrieved: Callable[[Sequence[int]], None]

    @property
    def count_anchors(self) -> int:
        """Number of anchors."""
        return len(self._anchors)

    @property
    def count_contrast(self) -> int:
        """Number of contrast cases."""
        return len(self._contrast)

    def retrieve(
        self, key: FloatArray, policy: RetrievalPolicy, exclude_digest: str | None
    ) -> tuple[Case, ...]:
        """Give the neighbours of a photo: anchors, then contrast cases, each nearest first.

        The result depends on the key, the policy and the stored cases only; equal similarities are
        ordered by id. All cases are given when there are fewer than `policy.k`.

        Args:
            key: float32 (D_key,), of any length.
            policy: How many, and from where.
            exclude_digest: Digest of the query's own image, whose cases are left out.

        Raises:
            StoreMismatch: the key has another width than the stored ones.
            UsageError: the key is not finite.
        """
        near_anchors = self._anchors.table.rank(key, exclude_digest)
        near_contrast = self._contrast.table.rank(key, exclude_digest)
        from_anchors, from_contrast = shares(
            policy, int(near_anchors.eligible.sum()), int(near_contrast.eligible.sum())
        )
        anchor_rows = nearest_anchors(
            near_anchors, self._anchors.score_ranks, from_anchors, policy
        ).tolist()
        contrast_rows = near_contrast.nearest(from_contrast).tolist()
        self._note_retrieved([self._contrast.revisions[row] for row in contrast_rows])
        return (
            *(self._anchors.case(row) for row in anchor_rows),
            *(self._contrast.case(row) for row in contrast_rows),
        )

    def percentile(self, score: float) -> float:
        """Give the share of anchors that score below, 0–100; NaN when there are no anchors."""
        return self._anchors.percentile(score)


class MemoryBank:
    """Anchors, read-only, and contrast cases, which grow; a context manager.

    >>> import tempfile
    >>> import numpy as np
    >>> from meiqa.memory import AnchorWriter
    >>> path = Path(tempfile.mkdtemp()) / "memory"
    >>> with AnchorWriter(path, "ab12", key_width=2, token_width=3) as writer:
    ...     writer.finish()
    >>> case = Case("photo", "contrast", "d1", 3.2, 0.1, "sharp",
    ...             np.ones(2, np.float32), np.ones((4, 3), np.float32), (2, 2))
    >>> with MemoryBank.open(path, "rw", package_digest="ab12") as bank:
    ...     bank.remember(case, provenance="example")
    ...     found = bank.snapshot().retrieve(case.key, RetrievalPolicy(k=4), None)
    >>> [neighbour.id for neighbour in found]
    ['photo']
    """

    def __init__(self, anchors: AnchorMemory, contrast: ContrastMemory) -> None:
        self._anchors = anchors
        self._contrast = contrast

    @classmethod
    def open(
        cls, path: str | Path, mode: Mode = "r", *, package_digest: str, verify: bool = True
    ) -> MemoryBank:
        """Open a directory that holds both the anchors and the contrast cases.

        Args and errors are those of `compose`.
        """
        return cls.compose(path, path, mode, package_digest=package_digest, verify=verify)

    @classmethod
    def compose(
        cls,
        anchors_path: str | Path,
        contrast_path: str | Path,
        mode: Mode = "r",
        *,
        package_digest: str,
        verify: bool = True,
    ) -> MemoryBank:
        """Open anchors, which may be on a read-only file system, with contrast cases beside them.

        Args:
            anchors_path: Directory of the anchors.
            contrast_path: Directory of the contrast cases; created in mode "rw", may be absent in
                mode "r".
            mode: "r", or "rw" to remember and forget.
            package_digest: Digest of the engine package, hexadecimal.
            verify: Check the digest of every array of the anchors.

        Raises:
            StoreNotFound: there are no anchors.
            StoreCorrupted: a file is damaged.
            StoreMismatch: a part was encoded by another package; the hint says what to run.
            StoreLocked: mode "rw", and another process is writing.
            StoreUnwritable: mode "rw", and the directory of the contrast cases cannot be written.
            UsageError: unknown mode.
        """
        if mode not in ("r", "rw"):
            raise UsageError("unknown mode for a memory", seen=mode, allowed="r, rw")
        anchors = AnchorMemory.open(
            Path(anchors_path), package_digest=package_digest, verify=verify
        )
        identity = Identity(package_digest, anchors.widths)
        return cls(anchors, ContrastMemory(Path(contrast_path), mode, identity))

    def __enter__(self) -> MemoryBank:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def snapshot(self) -> Snapshot:
        """Freeze what is stored now; what is remembered or forgotten later does not change it."""
        return Snapshot(self._anchors, self._contrast.view(), self._contrast.note_retrieved)

    def remember(self, case: Case, *, provenance: str) -> None:
        """Store a contrast case; when the call returns, neither a kill nor a power cut undoes it.

        A case with the same id or the same image is replaced.

        Args:
            case: Its origin must be "contrast".
            provenance: Where the score comes from, in a few words.

        Raises:
            UsageError: the case cannot be stored.
            StoreError: the bank is read-only or closed, or the disk is full.
        """
        self._contrast.remember(case, provenance)

    def forget(self, since: datetime | None = None) -> int:
        """Remove the contrast cases stored at `since` or later, or all; give how many.

        Raises:
            UsageError: `since` has no time zone.
            StoreError: the bank is read-only or closed.
        """
        return self._contrast.forget(since)

    def close(self) -> None:
        """Let go of the files; snapshots stay valid."""
        self._contrast.close()
