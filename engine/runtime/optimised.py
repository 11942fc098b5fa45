"""Graphs as ONNX Runtime optimised them for this processor, kept for the next process.

Optimising is most of what opening a small package takes, and the result is bound to the processor
and to the version of ONNX Runtime. It lies in the user's cache under a name that says both, with
its digest in front. Nothing hangs on it: what is not there, or is not what was written, is made
anew; where nothing can be written, nothing is kept.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from meiqa.locations import user_cache

__all__ = ["LARGEST_BYTES", "MOST_KEPT", "KeptGraph", "kept_graphs", "processor"]

LOG = logging.getLogger(__name__)
LARGEST_BYTES = 64 << 20
"""Larger graphs take longer to write than they do to optimise."""
MOST_KEPT = 16
"""Graphs in the cache; beyond that those are removed that were not used for longest."""
SUFFIX = ".graph"
DIGEST_BYTES = hashlib.sha256().digest_size


@dataclass(frozen=True)
class KeptGraph:
    """A place for one optimised graph.

    Args:
        identity: everything that the result depends on.
    """

    identity: tuple[str, ...]

    @property
    def path(self) -> Path:
        """The file, which need not exist."""
        name = hashlib.sha256("\0".join(self.identity).encode()).hexdigest()
        return kept_graphs() / f"{name[:32]}{SUFFIX}"

    def read(self) -> bytes | None:
        """The graph in ONNX Runtime's own format; None if it is not there or not as written."""
        try:
            kept = self.path.read_bytes()
            os.utime(self.path)  # the oldest are those that were not used
        except OSError:  # also where a cache cannot be: nothing hangs on it
            return None
        digest, graph = kept[:DIGEST_BYTES], kept[DIGEST_BYTES:]
        if hashlib.sha256(graph).digest() != digest:
            LOG.warning("%s is damaged; the graph is optimised anew", self.path)
            return None
        return graph

    def begin(self) -> Path | None:
        """Make a file of one's own to write to; None where nothing can be written."""
        try:
            kept_graphs().mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(prefix="unfinished-", dir=kept_graphs())
        except OSError as error:
            LOG.debug("no optimised graphs are kept: %s", error)
            return None
        os.close(descriptor)
        return Path(name)

    def keep(self, unfinished: Path) -> None:
        """Give what was written its digest and its name."""
        try:
            graph = unfinished.read_bytes()
            unfinished.write_bytes(hashlib.sha256(graph).digest() + graph)
            os.replace(unfinished, self.path)
            remove_oldest()
        except OSError as error:
            LOG.debug("%s is not kept: %s", self.path, error)


def kept_graphs() -> Path:
    """The directory of all optimised graphs."""
    return user_cache() / "graphs"


def remove_oldest() -> None:
    """Keep no more than `MOST_KEPT` files, those of interrupted writers included."""
    files = sorted(kept_graphs().iterdir(), key=lambda file: file.stat().st_mtime, reverse=True)
    for file in files[MOST_KEPT:]:
        file.unlink(missing_ok=True)


def processor() -> str | None:
    """What a processor can do, in words that differ where its optimised graphs may.

    None where the system does not tell: there nothing should be kept.
    """
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            # Of the first of its cores; the others are only written down when they are read.
            first = file.read(8192).split("\n\n")[0]
    except OSError:
        return None
    telling = ("model name", "flags", "CPU implementer", "CPU part", "Features")
    return "\n".join(line for line in first.splitlines() if line.startswith(telling))
