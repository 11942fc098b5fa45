"""Opening an engine's memory: whose anchors, which learned cases, and whether it can learn."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from meiqa.errors import StoreLocked, StoreNotFound, StoreUnwritable
from meiqa.locations import embedded_assets, package_memory
from meiqa.memory import Admission, ContrastPolicy, MemoryBank, holds_anchors

__all__ = ["open_memory"]

LOG = logging.getLogger(__name__)


def open_memory(
    path: str | Path | None,
    package_digest: str,
    *,
    learn: bool,
    admission: Admission = "gated",
) -> MemoryBank:
    """Open the memory of a package; see `Engine.open`.

    While another process writes to it, the memory is opened read-only, with a warning. So is the
    user's own where it cannot be written; one that was asked for by its path is refused then.

    Only headers are read now, however large it is: each case is checked when it is read.

    Args:
        path: Directory of the memory; None for the user's own. Created to learn into.
        package_digest: Digest of the engine package, hexadecimal.
        learn: Open it for writing.
        admission: Which photos are remembered, when learning.

    Raises:
        StoreNotFound: there is no directory `path` to read, or what it holds is no memory.
        StoreUnwritable: `path` cannot be written, and `learn` asks for it.
        StoreError: the memory cannot be used.
        UsageError: no such admission.
    """
    policy = ContrastPolicy(admission=admission)
    contrast = package_memory(package_digest) if path is None else Path(path)
    if path is not None and not learn and not os.path.isdir(contrast):
        raise StoreNotFound(
            f"there is no memory directory {contrast}",
            hint="check the path; learning creates a new one",
        )
    anchors = contrast if holds_anchors(contrast) else embedded_assets() / "memory"
    if learn:
        try:
            return MemoryBank.compose(
                anchors, contrast, "rw", package_digest=package_digest, policy=policy
            )
        except StoreLocked as error:
            LOG.warning("nothing will be remembered: %s", error)
        except StoreUnwritable as error:
            if path is not None:
                hint = "name a writable directory, or only read it: --no-learn (learn=False)"
                raise StoreUnwritable(error.what, seen=error.seen, hint=hint) from error
            LOG.warning("nothing will be remembered: %s (%s)", error.what, error.seen)
    # The policy goes along, so that what it would have admitted is said not to be remembered.
    return MemoryBank.compose(anchors, contrast, "r", package_digest=package_digest, policy=policy)
