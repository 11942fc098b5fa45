"""What the model is asked, as tokens with 3-D positions.

Every prompt begins with the same turn opening and the first picture (the *prefix*) and differs
only in what follows (the *suffix*): so one prefix serves scoring, comparing and reflecting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from meiqa.errors import PackageCorrupted

LEVEL_WORDS = ("bad", "poor", "fair", "good", "excellent")
"""The five grades, worth 1 to 5."""


@dataclass(frozen=True)
class PromptFamily:
    """The texts around the pictures of one family of models.

    Attributes:
        name: what the family is called in the manifest.
        opening: turn opening up to the first picture.
        second_opening: from the end of the first picture to the second.
        closing: what closes a picture.
        score: asks for description and rating; ends inside the description.
        levels: asks for a grade word; the next token is one of `level_words`.
        compare: asks which picture looks better; the next token is one of `verdicts`.
        reflect: asks for a corrected description; has {summary}, {initial}, {score}.
        description_end: ends the description.
        answer_open, answer_close: around the printed rating.
        stop: ends the turn.
        level_words: tokens of the grades, from 1 to 5.
        verdicts: tokens for "the first" and "the second".
    """

    name: str
    opening: str
    second_opening: str
    closing: str
    score: str
    levels: str
    compare: str
    reflect: str
    description_end: str
    answer_open: str
    answer_close: str
    stop: str
    level_words: tuple[str, ...]
    verdicts: tuple[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Fields as they stand in the manifest."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PromptFamily:
        """Read what `to_dict` wrote.

        Raises:
            PackageCorrupted: fields are missing or unknown.
        """
        names = {field.name for field in fields(cls)}
        if values.keys() != names:
            raise PackageCorrupted(
                "the manifest's prompt family has other fields than this version reads",
                seen=", ".join(sorted(values.keys() ^ names)),
                hint="export the checkpoint again with this version",
            )
        lists = {"level_words": tuple(values["level_words"]), "verdicts": tuple(values["verdicts"])}
        return cls(**{**values, **lists})


MEIQA = PromptFamily(
    name="meiqa",
    opening="<|im_start|>user\nPicture 1: <|vision_start|>",
    second_opening="Picture 2: <|vision_start|>",
    closing="<|vision_end|>",
    score="Describe and rate its quality.<|im_end|>\n<|im_start|>assistant\n<think>",
    levels="Rate its quality in a word.<|im_end|>\n<|im_start|>assistant\nOverall",
    compare="Which looks better, 1 or 2?<|im_end|>\n<|im_start|>assistant\n",
    reflect=(
        "First impression: {summary} Rating {initial:.2f}. Beside remembered pictures it rates "
        "{score:.2f}. Describe it again.<|im_end|>\n<|im_start|>assistant\n<think>"
    ),
    description_end="</think>",
    answer_open="<answer>",
    answer_close="</answer>",
    stop="<|im_end|>",
    level_words=tuple(f" {word}" for word in LEVEL_WORDS),
    verdicts=("1", "2"),
)
"""The family of the embedded default model: the chat layout of Qwen2.5-VL with short questions."""


class Prompts:
    """A prompt family in the tokens of one tokenizer."""

    def __init__(self, family: PromptFamily, tokenizer: Tokenizer) -> None:
        self.family = family
        self.tokenizer = tokenizer

    def ids(self, text: str) -> np.ndarray:
        """Tokens of a text, int64 (n,)."""
        return np.array(self.tokenizer.encode(text, add_special_tokens=False).ids, np.int64)

    def single(self, text: str) -> int:
        """The one token a text must be.

        Raises:
            PackageCorrupted: the tokenizer splits it.
        """
        ids = self.ids(text)
        if len(ids) != 1:
            raise PackageCorrupted(
                "an answer of the prompt family is not a single token",
                seen=f"{text!r} is {len(ids)} tokens",
                hint="choose answers that the tokenizer keeps whole",
            )
        return int(ids[0])

    @cached_property
    def opening(self) -> np.ndarray:
        """Tokens up to the first picture."""
        return self.ids(self.family.opening)

    @cached_property
    def second_opening(self) -> np.ndarray:
        """Tokens from the first picture to the second."""
        return self.ids(self.family.second_opening)

    @cached_property
    def closing(self) -> np.ndarray:
        """Tokens that close a picture."""
        return self.ids(self.family.closing)

    @cached_property
    def score(self) -> np.ndarray:
        """Tokens that ask for description and rating."""
        return self.ids(self.family.score)

    @cached_property
    def levels(self) -> np.ndarray:
        """Tokens that ask for a grade word."""
        return self.ids(self.family.levels)

    @cached_property
    def compare(self) -> np.ndarray:
        """Tokens that ask which of two pictures looks better."""
        return self.ids(self.family.compare)

    @cached_property
    def stop(self) -> int:
        """The token that ends a turn."""
        return self.single(self.family.stop)

    @cached_property
    def description_end(self) -> int:
        """The token that ends a description."""
        return self.single(self.family.description_end)

    @cached_property
    def level_ids(self) -> np.ndarray:
        """Tokens of the five grades, from 1 to 5."""
        return np.array([self.single(word) for word in self.family.level_words], np.int64)

    @cached_property
    def verdict_ids(self) -> tuple[int, int]:
        """Tokens for "the first looks better" and "the second looks better"."""
        first, second = self.family.verdicts
        return self.single(first), self.single(second)

    def reflect(self, summary: str, initial: float, score: float) -> np.ndarray:
        """Tokens that ask for a corrected description."""
        return self.ids(self.family.reflect.format(summary=summary, initial=initial, score=score))


def text_positions(start: int, count: int) -> np.ndarray:
    """Positions (3, count) of text: the three axes move together."""
    return np.broadcast_to(np.arange(start, start + count, dtype=np.float32), (3, count))


def picture_positions(start: int, grid: tuple[int, int]) -> np.ndarray:
    """Positions (3, h * w) of a picture: one moment, its rows, its columns."""
    rows, columns = np.mgrid[: grid[0], : grid[1]].reshape(2, -1)
    return (start + np.stack([np.zeros_like(rows), rows, columns])).astype(np.float32)


def layout(pieces: Sequence[int | tuple[int, int]], start: int = 0) -> tuple[np.ndarray, int]:
    """Positions of text pieces (their token counts) and pictures (their grids) in a row.

    Returns:
        Positions (3, n) and the position of whatever comes next. As in Qwen2.5-VL, text after a
        picture goes on behind the picture's longer side.
    """
    parts = []
    for piece in pieces:
        if isinstance(piece, tuple):
            parts.append(picture_positions(start, piece))
            start += max(piece)
        else:
            parts.append(text_positions(start, piece))
            start += piece
    return np.concatenate(parts, axis=1), start
