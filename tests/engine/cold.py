"""The slow way: a whole prompt in one call, with nothing cached."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from meiqa.engine.local import LocalModel
from meiqa.engine.model import Floats, VisualTokens
from meiqa.engine.prompts import positions_of
from meiqa.engine.runtime.decoder import KeyValues, Row, Step

Piece = NDArray[np.int64] | VisualTokens


def read_anew(model: LocalModel, pieces: Sequence[Piece]) -> Step:
    """Read a prompt of texts and pictures, for the logits of its last token."""
    embeds = [p.values if isinstance(p, VisualTokens) else model.embed(p) for p in pieces]
    positions, _ = positions_of([p.grid if isinstance(p, VisualTokens) else len(p) for p in pieces])
    past = KeyValues.nothing(model.package.manifest.decoder)
    return model.decoder.step(past, past, Row(np.concatenate(embeds), positions))


def logits_anew(model: LocalModel, pieces: Sequence[Piece]) -> Floats:
    """Give the logits (V,) of the token that follows a prompt."""
    logits: Floats = read_anew(model, pieces).logits[0]
    return logits
