"""The number in what a model answers when it is asked for a rating."""

from __future__ import annotations

import re

import numpy as np

from meiqa.engine.prompts import PromptFamily

LOWEST, HIGHEST = 1.0, 5.0
"""The scale of ratings, for all families."""
_NUMBER = re.compile(r"\d+(?:\.\d+)?")


def printed_rating(text: str, family: PromptFamily, *, cut: bool) -> float | None:
    """The first number of the last answer in a text; None if there is none on the scale.

    A number at the very end of a text that was `cut` does not count: it may lack digits.
    """
    _, opened, answer = text.rpartition(family.answer_open)
    if not opened:
        return None
    answer, closed, _ = answer.partition(family.answer_close)
    if cut and not closed:
        answer = answer.rstrip("0123456789.")
    number = _NUMBER.search(answer)
    rating = float(number.group()) if number else np.nan
    return rating if LOWEST <= rating <= HIGHEST else None
