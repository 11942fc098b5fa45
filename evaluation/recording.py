"""Photos scored under many settings, and the model asked once for what several of them need."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from meiqa.engine.comparing import Comparer, Pictured, PrefixCache
from meiqa.engine.images import Pixels
from meiqa.engine.model import Draft, Model, Prefix, StopRule
from meiqa.engine.scoring import Prediction, Scored, Scorer, ScoreRequest
from meiqa.memory import MemoryBank, RetrievalPolicy


class AskedOnce(Comparer):
    """Remembers what the model said of the photo at hand: its prediction and each comparison.

    Attributes:
        count: comparisons asked so far, each order counted.
    """

    def __init__(self, model: Model) -> None:
        super().__init__(model, PrefixCache())
        self.count = 0
        self._photo: Prefix | None = None
        self._prediction: Prediction | None = None
        self._logits: dict[str, NDArray[np.float64]] = {}

    def predicted(self, photo: Prefix, predict: Callable[[], Prediction]) -> Prediction:
        """Give what the model says of a photo before any comparison."""
        self._turn_to(photo)
        self._prediction = self._prediction or predict()
        return self._prediction

    def ask(
        self, photo: Prefix, others: Sequence[Pictured], *, both_orders: bool
    ) -> tuple[NDArray[np.float64], int]:
        """Ask, in both orders whatever is wanted, about those who were not asked about before."""
        self._turn_to(photo)
        by_digest = {other.image_digest: other for other in others}
        unasked = [other for digest, other in by_digest.items() if digest not in self._logits]
        reused = 0
        if unasked:
            logits, reused = super().ask(photo, unasked, both_orders=True)
            self.count += logits.size
            self._logits |= zip((other.image_digest for other in unasked), logits, strict=True)
        rows = [self._logits[other.image_digest] for other in others]
        return np.array(rows).reshape(-1, 2), reused

    def _turn_to(self, photo: Prefix) -> None:
        if photo is not self._photo:
            self._photo, self._prediction, self._logits = photo, None, {}


class Recorder(Scorer):
    """Scores as the engine does, from one memory, over answers that recorders share."""

    def __init__(self, asked: AskedOnce, memory: MemoryBank) -> None:
        super().__init__(asked.model, memory, RetrievalPolicy(), drafting=False)
        self.prefixes, self.comparer = asked.prefixes, asked
        self._asked, self._snapshot = asked, memory.snapshot()

    def recorded(self, pixels: Pixels, retrieval: RetrievalPolicy) -> Scored:
        """Score a photo without learning.

        Raises:
            ImageError: it cannot be judged.
        """
        self.retrieval = retrieval
        request = ScoreRequest(pixels.array, learn=False, detail=False)
        return self.score(lambda: pixels, request, self._snapshot)

    def predict(
        self,
        prefix: Prefix,
        summary_tokens: int,
        drafts: Sequence[Draft] = (),
        stop: StopRule = None,
    ) -> Prediction:
        """Ask the model, unless it was asked; see `Scorer.predict`."""
        ask = super().predict
        return self._asked.predicted(prefix, lambda: ask(prefix, summary_tokens, drafts, stop))
