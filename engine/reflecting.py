"""Reflection: when comparisons moved a score a lot, write down why and remember the case."""

from __future__ import annotations

from dataclasses import dataclass

from meiqa.engine.fusing import Posterior
from meiqa.engine.scoring import Opinion
from meiqa.engine.vlm import Description, Floats, Prefix, VisualTokens, Vlm
from meiqa.memory import Case, retrieval_key
from meiqa.types import KeyKind


@dataclass(frozen=True, eq=False)
class Reflection:
    """A corrected description and the case it makes."""

    description: Description
    case: Case


def gate_opens(opinion: Opinion, posterior: Posterior, reflect_above: float) -> bool:
    """Whether the comparisons moved the score by more than the gate allows."""
    return abs(posterior.score - opinion.score) > reflect_above


def reflect(
    vlm: Vlm,
    prefix: Prefix,
    image_digest: str,
    summary: str,
    initial_score: float,
    posterior: Posterior,
    key_kind: KeyKind,
) -> Reflection | None:
    """Describe the photo again in the light of its fused score; None if nothing was written.

    The case is stored under the corrected description's key (alone, or beside the image's), so that
    photos which would get the same corrected description find it.
    """
    description = vlm.reflect(prefix, summary, initial_score, posterior.score)
    if description.key is None:
        return None
    key = retrieval_key(key_kind, description.key, prefix.tokens.values)
    case = learned_case(prefix.tokens, image_digest, description.text, key, posterior)
    return Reflection(description, case)


def learned_case(
    tokens: VisualTokens, image_digest: str, summary: str, key: Floats, posterior: Posterior
) -> Case:
    """A photo with its fused score as it is remembered; never an anchor."""
    return Case(
        id=image_digest[:16],
        origin="contrast",
        image_digest=image_digest,
        score=posterior.score,
        std=posterior.std,
        summary=summary,
        key=key,
        tokens=tokens.values,
        grid=tokens.grid,
    )
