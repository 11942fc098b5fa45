"""What is known of a photo's quality, as arrays: for networks that are conditioned on it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from meiqa.engine.model import Floats
from meiqa.engine.scoring import Scored


@dataclass(frozen=True, eq=False)
class QualityPrior:
    """A photo's quality as float32 arrays; those of several photos stack.

    Attributes:
        digest: of the package that made it: what `embedding` can be compared within.
        kinds: names of the distortions, the first for none.
        score: (2,) the score, 1-5, and its deviation.
        distortions: (N,) probabilities of the kinds; they add up to 1.
        strength: (1,) of damage of any kind, 0-5.
        map: (h, w) how strongly each visual token is distorted, 0-1; as large as the photo's
            shape makes it.
        embedding: (F,) see `Embedding`.
    """

    digest: str
    kinds: tuple[str, ...]
    score: Floats
    distortions: Floats
    strength: Floats
    map: Floats
    embedding: Floats

    @classmethod
    def of(cls, scored: Scored, kinds: tuple[str, ...]) -> QualityPrior:
        """Gather what was found of a photo by a package whose patterns know these kinds."""
        seen, posterior = scored.patterns, scored.posterior
        assert seen is not None
        assert scored.embedding is not None
        return cls(
            digest=scored.embedding.digest,
            kinds=kinds,
            score=np.array([posterior.score, posterior.std], np.float32),
            distortions=seen.probabilities.astype(np.float32),
            strength=np.array([seen.strength], np.float32),
            map=seen.map,
            embedding=np.array(scored.embedding.values, np.float32),
        )
