"""Photos and comparisons asked of the model once, and fused in as many ways as one likes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from meiqa.engine.caches import ByteLru
from meiqa.engine.comparing import Comparer, all_in_order, preferences_of
from meiqa.engine.fusing import Posterior, fuse
from meiqa.engine.images import ImageSource, load_pixels
from meiqa.engine.judging import ANCHOR_CACHE_BYTES, fitted_to, projected_key
from meiqa.engine.local import LocalVlm
from meiqa.engine.package import EnginePackage
from meiqa.engine.pipeline import Engine
from meiqa.engine.remembering import open_memory
from meiqa.engine.runtime.sessions import sessions_on
from meiqa.engine.scoring import Opinion, first_opinion
from meiqa.engine.vlm import Floats, Prefix, VisualTokens
from meiqa.errors import UsageError
from meiqa.memory import (
    NEAR_DUPLICATE,
    AnchorWriter,
    Case,
    MemoryBank,
    RetrievalPolicy,
    Snapshot,
    key_widths,
    layout,
    retrieval_key,
)
from meiqa.types import KeyKind

__all__ = ["Parts", "Recorded", "Recorder", "anchors_of", "random_key", "write_anchors"]

_RANDOM_WIDTH = 64


@dataclass(frozen=True, eq=False)
class Parts:
    """What an engine is made of, so that several ways of judging share one loaded model.

    Attributes:
        vlm, package, memory: see `Engine`.
        policy: what the engine retrieves by default.
    """

    vlm: LocalVlm
    package: EnginePackage
    memory: MemoryBank
    policy: RetrievalPolicy

    @classmethod
    @contextmanager
    def opened(
        cls,
        package: str | Path,
        memory: str | Path,
        *,
        device: str = "cpu",
        threads: int | None = None,
        verify: bool = True,
        exclude_above: float = NEAR_DUPLICATE,
        head: str | None = None,
    ) -> Iterator[Parts]:
        """Open package and memory for reading; arguments and errors are those of `Engine.open`."""
        opened = EnginePackage.open(package, verify=verify).headed(head)
        vlm = LocalVlm(opened, *sessions_on(device, opened, threads, verify=verify))
        calibration = opened.manifest.calibration
        policy = RetrievalPolicy(
            k=calibration.neighbours, bins=calibration.bins, exclude_above=exclude_above
        )
        with open_memory(memory, opened.digest, learn=False) as bank:
            yield cls(vlm, opened, bank, policy)

    def engine(self) -> Engine:
        """Give an engine whose caches are empty; it need not be closed."""
        return Engine(self.vlm, self.package, self.memory, exclude_above=self.policy.exclude_above)


@dataclass(frozen=True, eq=False)
class Recorded:
    """A photo that was read, described and graded, and the comparisons asked about it so far.

    Attributes:
        digest: of its pixels.
        prefix: what the model read.
        opinion: what it says before any comparison.
        key: of the description, or guessed from the visual tokens where nothing is written.
        logits: (2,) answers by the digest of the neighbour's pixels, as in `Verdicts`.
    """

    digest: str
    prefix: Prefix
    opinion: Opinion
    key: Floats
    logits: dict[str, NDArray[np.float64]] = field(default_factory=dict)

    def neighbours(
        self, snapshot: Snapshot, policy: RetrievalPolicy, kind: KeyKind | None
    ) -> tuple[Case, ...]:
        """Retrieve as the engine does, from a memory with keys of a kind; None for random ones."""
        tokens = self.prefix.tokens
        if kind is None:
            key = random_key(self.digest)
        else:
            key = retrieval_key(kind, self.key, tokens.values)
        own_layout = layout(tokens.values, tokens.grid)
        return snapshot.retrieve(key, policy, self.digest, layout=own_layout)


class Recorder:
    """Asks the model what it has not been asked before.

    Attributes:
        asked: comparisons so far, each order counted.
    """

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.asked = 0
        self._calibration = parts.package.manifest.calibration
        self._comparer = Comparer(parts.vlm, parts.package.digest, ByteLru(ANCHOR_CACHE_BYTES))

    def photo(self, image: ImageSource) -> Recorded:
        """See, read, describe and grade a photo.

        Raises:
            ImageError: it cannot be judged.
        """
        vlm = self.parts.vlm
        pixels = load_pixels(image)
        return self._recorded(pixels.digest, vlm.encode(fitted_to(pixels, vlm.image)))

    def remembered(self, case: Case) -> Recorded:
        """Read, describe and grade a remembered photo, of which the visual tokens are kept."""
        return self._recorded(case.image_digest, VisualTokens(case.tokens, case.grid))

    def posterior(
        self, photo: Recorded, neighbours: Sequence[Case], *, both_orders: bool = True
    ) -> Posterior:
        """Fuse the opinion of a photo with its comparisons; with one order, it is shown first."""
        self._ask(photo, neighbours)
        logits = np.array([photo.logits[case.image_digest] for case in neighbours]).reshape(-1, 2)
        if not both_orders:
            logits[:, 1] = np.nan
        return fuse(
            photo.opinion.prior,
            photo.opinion.prior_std,
            neighbours,
            preferences_of(logits, self._calibration.temperature),
            self._calibration,
        )

    def _recorded(self, digest: str, tokens: VisualTokens) -> Recorded:
        package = self.parts.package
        (prefix,) = self.parts.vlm.read([tokens])
        opinion = first_opinion(
            self.parts.vlm,
            prefix,
            self._calibration,
            package.manifest.prompt.summary_tokens,
            head=package.manifest.score_head,
        )
        key = opinion.key
        if key is None:
            key = projected_key(tokens, package.array("key_projection.npy"))
        return Recorded(digest, prefix, opinion, key)

    def _ask(self, photo: Recorded, neighbours: Sequence[Case]) -> None:
        """Compare, in both orders, with the neighbours that were not asked about."""
        unasked = {case.image_digest: case for case in neighbours}
        cases = [case for digest, case in unasked.items() if digest not in photo.logits]
        verdicts = self._comparer.compare(
            photo.prefix,
            cases,
            both_orders=True,
            temperature=self._calibration.temperature,
            next_wave=all_in_order,
        )
        for case, logits in zip(cases, verdicts.logits, strict=True):
            photo.logits[case.image_digest] = logits
        self.asked += 2 * len(cases)


def random_key(digest: str) -> Floats:
    """Draw a key that says nothing, by the digest of the pixels: the same in every run."""
    return np.random.default_rng(int(digest, 16)).standard_normal(_RANDOM_WIDTH, np.float32)


def anchors_of(parts: Parts) -> tuple[Case, ...]:
    """Give all anchors of a memory, in order of their ids.

    Raises:
        UsageError: an index does not reach all of them.
    """
    snapshot, shape = parts.memory.snapshot(), parts.vlm.shape
    count = snapshot.count_anchors
    width = key_widths(parts.memory.key_kind, shape.hidden_size, shape.embed_width).key
    everything = RetrievalPolicy(k=count, anchor_share=1.0, stratified=False)
    found = snapshot.retrieve(np.ones(width, np.float32), everything, None)
    if len(found) < count:
        raise UsageError("the memory's index does not reach all anchors", seen=len(found))
    return tuple(sorted(found, key=lambda case: case.id))


def write_anchors(
    anchors: Sequence[Case], path: Path, package_digest: str, key_kind: KeyKind = "summary"
) -> None:
    """Write a memory of anchors, whose keys are of a kind."""
    key_width, token_width = len(anchors[0].key), anchors[0].tokens.shape[1]
    with AnchorWriter(path, package_digest, key_width, token_width, key_kind=key_kind) as writer:
        for case in anchors:
            writer.add(case, provenance="copied from another memory")
        writer.finish()
