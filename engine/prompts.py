"""What a model is asked, as texts and as tokens with 3-D positions, and what its reply says.

Every prompt begins with the same turn opening and the first picture (the *prefix*) and differs
only in what follows (the *suffix*): so one prefix serves scoring, comparing and reflecting.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from meiqa.errors import PackageCorrupted, UsageError
from meiqa.types import QualityWord

if TYPE_CHECKING:  # who decodes photos needs none
    from tokenizers import Tokenizer

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]

LEVEL_WORDS: tuple[QualityWord, ...] = get_args(QualityWord)
"""The five grades, worth 1 to 5."""

PLACEHOLDER = re.compile(r"\{([A-Za-z_]\w*)(?::([^{}]*))?\}")
"""A name in braces, with or without a format; any other brace of a text stands for itself."""
PLACEHOLDERS = ("summary", "initial", "score")
ANSWERS = {"level_words": 5, "verdicts": 2}
"""The fields that list answers, with their number."""
MAY_BE_EMPTY = ("second_opening", "answer_open", "answer_close")
KEPT_QUESTIONS = 256
LOWEST, HIGHEST = 1.0, 5.0  # the scale of printed ratings, for all families
_NUMBER = r"(?<![\w.,])([-+\u2212]?\d++(?:[.,]\d++)?+)(?!\w)"
_NAMED = re.compile(rf"{_NUMBER}\s*(?:/|of|out of)\s*5\b|[:=][\s\"'*]*{_NUMBER}")
"""A number before the scale's end, or behind a name."""


@dataclass(frozen=True)
class PromptFamily:
    """The texts around the pictures of one family of models.

    Attributes:
        opening: turn opening up to the first picture; closing: what closes a picture.
        second_opening: from the end of the first picture to the second.
        score: asks for description and rating; ends inside the description.
        levels: asks for a grade word; the next token is one of `level_words`.
        compare: asks which picture looks better; the next token is one of `verdicts`.
        reflect: asks for a corrected description; has {summary}, {initial}, {score}.
        description_end: ends the description; one token or several.
        answer_open, answer_close: around the printed rating; both empty where none is printed.
        stop: the token that ends the turn.
        level_words: tokens of the grades, from 1 to 5.
        verdicts: tokens for "the first" and "the second".
        summary_tokens: tokens that a description may take when time allows.
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
    summary_tokens: int

    @property
    def reply(self) -> str:
        """What stands between a question and its reply; UsageError if the texts don't show it.

        It begins where the user's turn stops, and is what all of the family's questions have there.
        """
        ends = [text.rpartition(self.stop) for text in (self.score, self.levels, self.compare)]
        if not all(stop for _, stop, _ in ends):
            raise UsageError(
                f"the prompt family {self.name} does not show where a question ends",
                seen=f"a question without {self.stop!r}",
                hint="export the model with a family whose questions end a turn: --prompt",
            )
        alike = takewhile(
            lambda chars: len({*chars}) == 1, zip(*(e[2] for e in ends), strict=False)
        )
        shared = "".join(chars[0] for chars in alike)
        # A tag's first character is no part of it.
        return self.stop + (shared[: shared.rfind("\n") + 1] or shared)

    @property
    def measured(self) -> bool:
        """Whether descriptions have the sentence of `meiqa.engine.measures`, as ours do."""
        return self.name == "meiqa"

    def to_dict(self) -> dict[str, Any]:
        """Give the fields as they stand in the manifest."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PromptFamily:
        """Read what `to_dict` wrote; PackageCorrupted if it is no prompt family."""
        if fault := fault_of(values):
            raise PackageCorrupted(
                f"the manifest's prompt family {fault[0]}",
                seen=fault[1],
                hint="export the checkpoint again with this version",
            )
        return cls(**{**values, **{name: tuple(values[name]) for name in ANSWERS}})

    def reflection(self, summary: str, initial: float, score: float) -> str:
        return _filled(self.reflect, {"summary": summary, "initial": initial, "score": score})


def _filled(text: str, values: dict[str, Any]) -> str:
    """Fill a text's placeholders in one pass, so that values may hold braces too."""
    return PLACEHOLDER.sub(lambda found: format(values[found[1]], found[2] or ""), text)


def fault_of(values: dict[str, Any]) -> tuple[str, str] | None:
    """Tell what keeps values from being a prompt family, and what was seen; None if nothing."""
    names = {field.name for field in fields(PromptFamily)}
    for word, wrong in ("unknown", values.keys() - names), ("no", names - values.keys()):
        if wrong:
            return "has other fields than this version reads", f"{word} {', '.join(sorted(wrong))}"
    limit = values["summary_tokens"]
    if type(limit) is not int or limit < 1:
        return "needs a whole number from 1 up as summary_tokens", repr(limit)
    for name in sorted(names - ANSWERS.keys() - {"summary_tokens"}):
        if not _is_text(values[name]):
            return f"needs a text as {name}", repr(values[name])
        if not values[name] and name not in MAY_BE_EMPTY:
            return f"has an empty {name}", "''"
    for name, count in ANSWERS.items():
        given = values[name] if isinstance(values[name], list | tuple) else ()
        texts = {each for each in given if _is_text(each) and each}
        if not len(given) == len(texts) == count:
            return f"needs {count} different texts as {name}", repr(values[name])
    if bool(values["answer_open"]) != bool(values["answer_close"]):
        return "needs both answer_open and answer_close, or neither", "one of them"
    return _reflection_fault(values["reflect"])


def _is_text(value: object) -> bool:
    """Say whether a value is a text that can be written as UTF-8."""
    return isinstance(value, str) and not any("\ud800" <= char <= "\udfff" for char in value)


def _reflection_fault(text: str) -> tuple[str, str] | None:
    used = {found[1] for found in PLACEHOLDER.finditer(text)}
    if unknown := sorted(used - set(PLACEHOLDERS)):
        return f"has no placeholder {{{unknown[0]}}} in reflect", f"{{{unknown[0]}}}"
    if missing := [name for name in PLACEHOLDERS if name not in used]:
        return "needs {summary}, {initial} and {score} in reflect", f"no {{{missing[0]}}}"
    try:
        _filled(text, {"summary": "", "initial": 1.5, "score": 4.25})
    except ValueError as error:
        return "has a placeholder of a wrong format in reflect", str(error)
    return None


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
    summary_tokens=96,
)
"""The family of the embedded default model: the chat layout of Qwen2.5-VL with short questions."""


QWEN_OPENING = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\nPicture 1: <|vision_start|>"
)
"""Qwen's chat layout with its default system turn; pictures are announced by number."""
REPLY = "<|im_end|>\n<|im_start|>assistant\n"
GRADE_QUESTION = "Which word fits the quality of this picture: bad, poor, fair, good or excellent?"
GRADE_REPLY = f"{REPLY}The quality of this picture is"

VISUALQUALITY_R1 = replace(
    MEIQA,
    name="visualquality-r1",
    opening=QWEN_OPENING,
    score=(
        "How good is this picture's quality overall? Rate it with a float from 1 to 5 that has two "
        "decimals; 1 stands for very poor and 5 for excellent quality. Think about it within "
        "<think> </think> tags first, and then write the rating alone within <answer> </answer> "
        f"tags.{REPLY}<think>"
    ),
    levels=f"{GRADE_QUESTION}{GRADE_REPLY}",
    compare=(
        "Which of the two pictures has the better quality? Write only its number, 1 or 2, within "
        f"<answer> </answer> tags.{REPLY}<answer>"
    ),
    reflect=(
        "You rated this picture's quality {initial:.2f} and thought: {summary} Beside pictures "
        "whose quality is known it comes out at {score:.2f}, on a scale from 1 (very poor) to 5 "
        "(excellent). Describe its quality again, in agreement with that, within <think> </think> "
        f"tags.{REPLY}<think>"
    ),
    summary_tokens=384,
)
"""For VisualQuality-R1: a description in think tags, then a rating with two decimals.

A reply begins with the opened tag, so that it is a description from its first token on.
"""

EVOQUALITY = replace(
    VISUALQUALITY_R1,
    name="evoquality",
    compare=(
        "Compare the quality of these two pictures. Reply with nothing but the index of the better "
        f"one: 0 if it is the first picture, 1 if it is the second.{REPLY}"
    ),
    verdicts=("0", "1"),
)
"""For EvoQuality: rates as VisualQuality-R1 does, and answers 0 or 1 for the better of a pair."""

Q_INSIGHT = replace(
    VISUALQUALITY_R1,
    name="q-insight",
    opening=(
        "<|im_start|>system\nYou help a user with questions about pictures. Before you answer, "
        "reason about the question within <think> </think> tags; then give the answer within "
        "<answer> </answer> tags.<|im_end|>\n<|im_start|>user\nPicture 1: <|vision_start|>"
    ),
    score=(
        "How good is this picture's quality overall? Rate it with a float from 1 to 5 that has two "
        "decimals; 1 stands for very poor and 5 for excellent quality. The answer is JSON with "
        f'the key "rating", such as {{"rating": number}}.{REPLY}<think>'
    ),
)
"""For Q-Insight: a system turn that asks for the tags, and a rating as JSON.

The model was trained with the question before the picture. Here, as in every family, the picture
comes first, since all prompts share what was read up to and including it.
"""

LEVELS = replace(
    VISUALQUALITY_R1,
    name="levels",
    score=f"Describe the quality of this picture in a few sentences.{REPLY}",
    compare=f"Which of the two pictures has the better quality, 1 or 2?{REPLY}Picture ",
    reflect=(
        "Of this picture's quality it was said: {summary} That was worth {initial:.2f} on a scale "
        "from 1 (bad) to 5 (excellent); beside pictures whose quality is known it comes out at "
        f"{{score:.2f}}. Describe its quality again, in agreement with that.{REPLY}"
    ),
    description_end="<|im_end|>",
    answer_open="",
    answer_close="",
)
"""For level-token heads: the word that ends a fixed phrase is the grade; no rating is printed."""

_LLAVA_REPLY = "<|im_end|><|im_start|>assistant\n"
Q_SIT = replace(
    LEVELS,
    name="q-sit",
    opening="<|im_start|>user ",
    second_opening="",
    closing="\n",
    score=f"Describe this image's quality in a few sentences.{_LLAVA_REPLY}",
    levels=(
        "Rate this image's quality with one of five words: Excellent, Good, Fair, Poor or Bad, "
        f"from high to low.{_LLAVA_REPLY}The quality of this image is"
    ),
    compare=(
        "Which of the two images has the better quality, the first or the second?"
        f"{_LLAVA_REPLY}The better image is the"
    ),
    reflect=(
        "Of this image's quality it was said: {summary} That was worth {initial:.2f} on a scale "
        "from 1 (Bad) to 5 (Excellent); beside images whose quality is known it comes out at "
        f"{{score:.2f}}. Describe its quality again, in agreement with that.{_LLAVA_REPLY}"
    ),
    level_words=(" Bad", " Poor", " Fair", " Good", " Excellent"),
    verdicts=(" first", " second"),
)
"""For Q-SiT and Q-SiT-mini: LLaVA-OneVision's turns, and a level word behind the answer's beginning
that it was trained with. Each picture of a pair is shown in tiles, where LLaVA shows several
pictures only small. No comparison was trained."""

_ALL = (MEIQA, VISUALQUALITY_R1, Q_INSIGHT, EVOQUALITY, LEVELS, Q_SIT)
FAMILIES = {family.name: family for family in _ALL}


def prompt_family(name_or_path: str) -> PromptFamily:
    """Give a family by its name, or one read from a JSON file; UsageError without either."""
    if name_or_path in FAMILIES:
        return FAMILIES[name_or_path]
    if not name_or_path.endswith(".json"):
        allowed = f"{', '.join(FAMILIES)}, or the path of a .json file"
        raise UsageError("unknown prompt family", seen=name_or_path, allowed=allowed)
    try:
        values = json.loads(Path(name_or_path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{name_or_path} cannot be read", seen=error.strerror) from error
    except ValueError as error:
        raise UsageError(f"{name_or_path} is not JSON", seen=error) from error
    if not isinstance(values, dict):
        raise UsageError(f"{name_or_path} is not a JSON object", seen=type(values).__name__)
    if fault := fault_of(values):
        raise UsageError(f"{name_or_path} {fault[0]}", seen=fault[1])
    return PromptFamily.from_dict(values)


@dataclass(frozen=True)
class Reply:
    """What a model wrote when it was asked to describe a picture and to rate it.

    The description's end may be marked; it is complete if it ended by itself, and not at a limit.
    """

    description: str
    rating: float | None
    marked: bool
    complete: bool


def parse_reply(text: str, family: PromptFamily, *, cut: bool) -> Reply:
    """Take a reply apart.

    An answer without the end marker before it ends the description as well, unless the reply was
    `cut` at a limit: then nobody knows whether the description had ended.
    """
    described, marked, after = text.partition(family.description_end)
    answers = bool(family.answer_open) and (bool(marked) or not cut)
    if answers and not marked:
        described, after = text.rpartition(family.answer_open)[0] or text, text
    rating = printed_rating(after, family, cut=cut) if answers else None
    return Reply(described.strip(), rating, bool(marked), bool(marked) or not cut)


def printed_rating(text: str, family: PromptFamily, *, cut: bool) -> float | None:
    """Read the rating in the last answer of a text; None if there is none on the scale.

    A number at the very end of a text that was `cut` does not count: it may lack digits.
    """
    _, opened, answer = text.rpartition(family.answer_open)
    if not opened:
        return None
    answer, closed, _ = answer.partition(family.answer_close)
    if cut and not closed:
        answer = answer.rstrip("0123456789.,")
    rating = _rating_in(answer)
    return rating if rating is not None and LOWEST <= rating <= HIGHEST else None


def _rating_in(answer: str) -> float | None:
    """Read the number that is meant; None where it may be one of several.

    >>> _rating_in("Picture 1: 3,25"), _rating_in("4 of 5"), _rating_in("from 1 to 5, good")
    (3.25, 4.0, None)
    """
    if named := _NAMED.search(answer):
        numbers = [named[1] or named[2]]
    else:
        numbers = re.findall(_NUMBER, answer)
        numbers = [n for n in numbers if "." in n or "," in n] or numbers
    values = {float(n.replace(",", ".").replace("\u2212", "-")) for n in numbers}
    return values.pop() if len(values) == 1 else None


class Step(NamedTuple):
    """Where options part: the tokens that stand behind the question, and what may come next.

    `options` are indices of those that go on there, `ids` their next tokens; all are int64 (n,).
    """

    behind: Ids
    options: Ids
    ids: Ids


class Options(NamedTuple):
    """A question's tokens, and the steps whose tokens together are its options."""

    question: Ids
    steps: tuple[Step, ...]


class Prompts:
    """A prompt family in the tokens of one tokenizer.

    Attributes:
        opening, second_opening, closing, score, levels, compare: the family's texts, int64 (n,).
        stops: the tokens that end a turn.
        level_ids: tokens of the five grades, from 1 to 5, int64 (5,).
        verdict_ids: tokens for "the first looks better" and "the second looks better".
        between_tags: what we write between a description's end and the answer's opening: a line
            break where the two would share a token, as models do that part their lines.
    """

    def __init__(
        self, family: PromptFamily, tokenizer: Tokenizer, ends: Sequence[str] = ()
    ) -> None:
        self.family, self.tokenizer = family, tokenizer
        self.opening, self.second_opening = map(self.ids, (family.opening, family.second_opening))
        self.closing, self.score = map(self.ids, (family.closing, family.score))
        self.levels, self.compare = map(self.ids, (family.levels, family.compare))
        self.stops = frozenset(map(self.single, (family.stop, *ends)))
        words = [self._answer(family.levels, word) for word in family.level_words]
        self.level_ids = np.array(words, np.int64)
        self.verdict_ids = [self._answer(family.compare, verdict) for verdict in family.verdicts]
        tags = family.description_end, family.answer_open
        merge = [*self.ids("".join(tags))] != [*self.ids(tags[0]), *self.ids(tags[1])]
        self.between_tags = "\n" if merge else ""
        self.options = lru_cache(KEPT_QUESTIONS)(self._options)

    def ids(self, text: str) -> Ids:
        """Give the tokens of a text, int64 (n,)."""
        return np.array(self.tokenizer.encode(text, add_special_tokens=False).ids, np.int64)

    def text(self, ids: Sequence[int]) -> str:
        """Give the text of tokens, special ones included."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=False))

    def single(self, text: str) -> int:
        """Give the one token that a text must be; PackageCorrupted if it is split."""
        ids = self.ids(text)
        if len(ids) != 1:
            raise PackageCorrupted(
                "an answer of the prompt family is not a single token",
                seen=f"{text!r} is {len(ids)} tokens",
                hint="choose answers that the tokenizer keeps whole",
            )
        return int(ids[0])

    def _answer(self, question: str, answer: str) -> int:
        token = self.single(answer)
        if self._continuation(question, answer) != [token]:
            raise PackageCorrupted(
                "an answer of the prompt family merges with the end of its question",
                seen=repr(question[-24:] + answer),
                hint="put a space either at the end of the question or before the answers",
            )
        return token

    def _continuation(self, question: str, option: str) -> list[int]:
        """The tokens that an option adds to a question; none if it merges with its end."""
        before, whole = self.ids(question).tolist(), self.ids(question + option).tolist()
        return whole[len(before) :] if whole[: len(before)] == before else []

    def _options(self, question: str, options: tuple[str, ...]) -> Options:
        """Give a question and its options in tokens; they are kept, under the name `options`.

        Raises:
            UsageError: an option is empty, or merges with the end of the question.
        """
        steps: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        for index, option in enumerate(options):
            ids = self._continuation(question, option)
            if not ids:
                raise UsageError(
                    "an option is empty, or merges with what stands before it",
                    seen=repr(question[-24:] + option),
                    hint="begin it otherwise: with a space, or without one",
                )
            for place, token in enumerate(ids):
                steps.setdefault(tuple(ids[:place]), []).append((index, token))
        return Options(
            self.ids(question),
            tuple(
                Step(np.array(behind, np.int64), *np.array(following, np.int64).T)
                for behind, following in steps.items()
            ),
        )

    def require_plain(self, text: str) -> None:
        """Refuse, as a UsageError, a text with marks of the chat or of pictures in it."""
        marks = self.tokenizer.get_added_tokens_decoder().values()
        if found := [mark.content for mark in marks if mark.special and mark.content in text]:
            raise UsageError(
                "a question holds a mark that only the prompt family may set",
                seen=found[0],
                allowed="plain text",
            )

    def before(self, ids: Sequence[int], marker: str) -> tuple[str, int]:
        """Give the text before the last place of a marker, and how many tokens are wholly so.

        Where the marker is empty or missing, that is everything.
        """
        if not marker or marker not in self.text(ids):
            return self.tokenizer.decode(ids), len(ids)
        begins = len(ids) - 1
        while marker not in self.text(ids[begins:]):
            begins -= 1
        # A token may hold the description's last characters beside the marker's first.
        last = self.text(ids[begins:]).partition(marker)[0]
        return self.tokenizer.decode(ids[:begins]) + last, begins

    def reflect(self, summary: str, initial: float, score: float) -> Ids:
        return self.ids(self.family.reflection(summary, initial, score))


def positions_of(pieces: Sequence[int | tuple[int, int]], start: int = 0) -> tuple[Floats, int]:
    """Lay out text pieces (their token counts) and pictures (their grids) in a row.

    Gives positions (3, n) and the position of whatever comes next. The three axes of text move
    together; a picture is one moment, its rows, its columns; and as in Qwen2.5-VL, text after it
    goes on behind its longer side.
    """
    parts = []
    for piece in pieces:
        if isinstance(piece, tuple):
            rows, columns = np.mgrid[: piece[0], : piece[1]].reshape(2, -1)
            parts.append(start + np.stack([np.zeros_like(rows), rows, columns]))
            start += max(piece)
        else:
            parts.append(np.broadcast_to(np.arange(start, start + piece), (3, piece)))
            start += piece
    return np.concatenate(parts, axis=1).astype(np.float32), start
