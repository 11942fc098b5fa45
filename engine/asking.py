"""Questions of one's own about a photo: how probable each option is as the reply."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from meiqa.engine.images import ImageSource, Pixels, fit_to_grid, load_pixels
from meiqa.engine.local import LocalModel
from meiqa.engine.model import Asked, Prefix, VisualTokens
from meiqa.errors import UsageError
from meiqa.types import Answer


@dataclass(frozen=True)
class Question:
    """A question about a photo, with the options for its reply.

    The prompt family puts its turns around it. An option is read as it stands, spaces included:
    behind the reply's beginning, `reply`, if there is one. Options may be of several tokens.

    >>> Question("Is there motion blur?", ["yes", "no"], reply="").options
    ('yes', 'no')

    Args:
        text: the question; options: what may follow, all different.
        second: a photo that is shown behind the first, for questions about two.
        reply: how the reply begins, with whatever options follow.

    Raises:
        UsageError: there is no question, no option, or one twice.
    """

    text: str
    options: Sequence[str]
    second: ImageSource | None = None
    reply: str = ""

    def __post_init__(self) -> None:
        if not self.text:
            raise UsageError("a question has a text", seen=repr(self.text))
        if isinstance(self.options, str) or not all(isinstance(o, str) for o in self.options):
            raise UsageError("options are a list of texts", seen=repr(self.options)[:64])
        object.__setattr__(self, "options", tuple(self.options))
        if not self.options or len({*self.options}) < len(self.options):
            raise UsageError(
                "a question has options, each once", seen=", ".join(self.options) or "none"
            )


def answer_all(
    model: LocalModel, photo: Pixels, prefix: Prefix, questions: Sequence[Question]
) -> list[Answer]:
    """Answer questions about a photo that was read, all of them in one pass over its prefix.

    A photo that several questions show second is decoded and encoded once.
    """
    prompts, reply = model.prompts, model.family.reply
    seconds = {id(q.second): load_pixels(q.second) for q in questions if q.second is not None}
    encoded = {key: _encoded(model, pixels) for key, pixels in seconds.items()}
    asked = []
    for question in questions:
        prompts.require_plain(question.text)
        prompts.require_plain(question.reply)
        text = f"{question.text}{reply}{question.reply}"
        asked.append(Asked(text, tuple(question.options), encoded.get(id(question.second))))
    answers = []
    for question, logprobs in zip(questions, model.log_probabilities([prefix], asked), strict=True):
        shares = np.exp(logprobs - logprobs.max())
        shares /= shares.sum()
        beside = seconds.get(id(question.second))
        answers.append(
            Answer(
                path=photo.name,
                question=question.text,
                probabilities=dict(zip(question.options, shares.tolist(), strict=True)),
                logprobs=dict(zip(question.options, logprobs.tolist(), strict=True)),
                second=None if beside is None else beside.name,
            )
        )
    return answers


def _encoded(model: LocalModel, pixels: Pixels) -> VisualTokens:
    return model.encode(fit_to_grid(pixels, model.image))
