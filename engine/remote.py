"""A model behind an OpenAI-compatible server.

Its visual tokens stay with it. So a photo is sent with every question, keys are made from what is
written (`text_key`), and a memory keeps the pictures of its cases instead of tokens. It stores rows
of int8 with a scale each: a row holds the pixels of a tile around mid-grey, and one element more
that is always the largest. So the scale is 1, and the pixels come back as they were.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from cachetools import LRUCache
from numpy.typing import NDArray
from PIL import Image

from meiqa.engine.calibration import UNCALIBRATED, Calibration, ScoreHead, check_score_head
from meiqa.engine.completions import (
    TEXT_KEY,
    TEXT_KEY_WIDTH,
    Completion,
    Completions,
    about_one,
    about_two,
    chat,
    text_key,
    unmarked,
)
from meiqa.engine.manifest import ImageProcessing
from meiqa.engine.model import (
    ANSWER_TOKENS,
    RATING_TOKENS,
    Asked,
    Description,
    Draft,
    Floats,
    GenerationStats,
    Model,
    Prefix,
    StopRule,
    VisualTokens,
)
from meiqa.engine.prompts import (
    VISUALQUALITY_R1,
    PromptFamily,
    Reply,
    fault_of,
    parse_reply,
    printed_rating,
)
from meiqa.engine.runtime.decoder import KeyValues
from meiqa.errors import AnswerUnreadable, MeiqaError, StoreNotFound, UsageError
from meiqa.memory.bank import REMOTE_SETTINGS

SCHEMA = 1
CELL_PIXELS = 28
"""Of Qwen2.5-VL; Qwen3-VL's are 32. Pictures of whole cells are not resized again by the server."""
MIN_PIXELS, MAX_PIXELS = 56 * 56, 448 * 448
PICTURE_BYTES = 256 << 20
"""Encoded pictures that are kept to be sent again."""
_MIDDLE, _REACH = 128, 127
_UNREAD = KeyValues(np.zeros((0, 2, 0, 0, 0), np.float32), 0)
"""The server keeps keys and values to itself."""


@dataclass(frozen=True)
class RemoteSettings:
    """How a remote model is asked, which lies beside the memory that was made so.

    The pictures it is sent have sides of whole cells, and at most so many pixels.
    """

    model: str
    prompt: PromptFamily = VISUALQUALITY_R1
    cell_pixels: int = CELL_PIXELS
    max_pixels: int = MAX_PIXELS
    calibration: Calibration = UNCALIBRATED

    def __post_init__(self) -> None:
        if not self.model:
            raise UsageError("a remote model has a name", hint="name it: --model NAME")
        if self.cell_pixels < 4 or self.max_pixels < max(MIN_PIXELS, self.cell_pixels**2):
            raise UsageError(
                "the pictures for a remote model would be too small",
                seen=f"cells of {self.cell_pixels} pixels, areas up to {self.max_pixels}",
                allowed=f"cells of 4 or more, areas of {MIN_PIXELS} and a cell or more",
            )
        p = self.prompt
        for text in (
            *(about_one(p, each) for each in (p.score, p.levels)),
            about_two(p, p.compare),
        ):
            chat(text, ["", ""])  # refuses a family that no messages stand for

    def write(self, memory: Path) -> None:
        """Lay them into a memory's directory, whole."""
        unfinished = memory / f".{REMOTE_SETTINGS}.tmp"
        text = json.dumps({"schema": SCHEMA, **asdict(self)}, indent=2) + "\n"
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(memory / REMOTE_SETTINGS)

    @classmethod
    def of_memory(cls, memory: str | Path) -> RemoteSettings:
        """Read those of a memory; StoreNotFound or UsageError where there are none of this form."""
        file = Path(memory, REMOTE_SETTINGS)
        if not file.parent.is_dir():
            raise StoreNotFound(f"there is no memory directory {memory}", hint="check the path")
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            if values.pop("schema") != SCHEMA or fault_of(values["prompt"]):
                raise ValueError("another schema or prompt family")
            values["prompt"] = PromptFamily.from_dict(values["prompt"])
            values["calibration"] = Calibration.from_dict(values["calibration"])
            return cls(**values)
        except FileNotFoundError:
            hint = "name one that was: meiqa memory build --remote URL makes it"
            what = f"the memory {memory} was not made with a remote model"
            raise UsageError(what, hint=hint) from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, MeiqaError) as error:
            raise UsageError(
                f"{file} is not what this version writes",
                seen=f"{type(error).__name__}: {error}",
                hint="build the memory again",
            ) from error

    @property
    def image(self) -> ImageProcessing:
        least, half = min(MIN_PIXELS, self.max_pixels), (0.5, 0.5, 0.5)
        return ImageProcessing(self.cell_pixels, 1, least, self.max_pixels, mean=half, std=half)

    @property
    def digest(self) -> str:
        """Identity of the model: its name and how it is asked; of its weights nothing is known."""
        name = hashlib.sha256(self.model.encode()).hexdigest()
        tiles = str(tile_side(self.cell_pixels))
        # The shape says nothing of this model, but memories are known by it since 0.1.
        shape = {"layers": 1, "kv_heads": 1, "head_dim": 1, "vocab_size": 1, "deepstack": 0}
        made_by = {
            "files": {"remote model": name, "tiles": tiles, "key": TEXT_KEY},
            "image": self.image.identity,
            "decoder": {**shape, "hidden_size": TEXT_KEY_WIDTH},
            "prompt": asdict(self.prompt),
        }
        return hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()


class RemoteModel(Model):
    """A model behind a server, in the role of `meiqa.engine.model.Model`."""

    def __init__(
        self,
        settings: RemoteSettings,
        memory: Path,
        completions: Completions,
        head: ScoreHead = "text",
    ) -> None:
        self.settings, self.head = settings, head
        self.digest = settings.digest
        self.image = settings.image
        self.calibration = settings.calibration
        self.summary_tokens = settings.prompt.summary_tokens
        self._tile = tile_side(settings.cell_pixels)
        # Three colours of each pixel of a tile, and the largest.
        self.widths = TEXT_KEY_WIDTH, 3 * self._tile**2 + 1
        self._memory = memory
        self.family = settings.prompt
        self._completions = completions
        self._pictures: LRUCache[str, str] = LRUCache(PICTURE_BYTES, getsizeof=len)

    @classmethod
    def connect(
        cls,
        url: str,
        memory: str | Path,
        *,
        model: str | None = None,
        head: str | None = None,
        settings: RemoteSettings | None = None,
        **limits: Any,
    ) -> RemoteModel:
        """Give the model that a memory was made with; nothing is sent yet.

        Args:
            model: what the server calls it, if that is to be checked.
            settings: of a memory that is yet to be made.
            limits: of `Completions`: concurrent requests, attempts, seconds to wait for an answer.
        """
        settings = settings or RemoteSettings.of_memory(memory)
        if model is not None and model != settings.model:
            raise UsageError(
                f"the memory {memory} was made with another model",
                seen=model,
                allowed=settings.model,
                hint="name that model, or build a memory with this one",
            )
        wanted = check_score_head(head or "text")
        if wanted == "grm" and settings.calibration.graded is None:
            raise UsageError("the remote model has no graded response", hint="meiqa calibrate")
        return cls(settings, Path(memory), Completions(url, settings.model, **limits), wanted)

    def calibrate(self, calibration: Calibration) -> None:
        """Write the settings beside the memory with another calibration; the digest stays."""
        self.settings = replace(self.settings, calibration=calibration)
        self.settings.write(self._memory)
        self.calibration = calibration

    def encode(self, pixels: NDArray[np.uint8]) -> VisualTokens:
        """Take a picture apart into tiles; nothing is sent."""
        return tiles_of(pixels, self._tile)

    def grid_of(self, pixels: NDArray[np.uint8]) -> tuple[int, int]:
        """Give rows and columns of tiles."""
        return pixels.shape[0] // self._tile, pixels.shape[1] // self._tile

    def prefill(self, pictures: Sequence[VisualTokens]) -> list[Prefix]:
        """Take pictures as they are; nothing is sent."""
        return [Prefix(picture, _UNREAD, _UNREAD, 0) for picture in pictures]

    def unwritten_key(self, tokens: VisualTokens) -> Floats:
        """Give no direction: what is not written has no key."""
        return np.zeros(TEXT_KEY_WIDTH, np.float32)

    def describe(
        self, prefix: Prefix, max_tokens: int, drafts: Sequence[Draft] = (), stop: StopRule = None
    ) -> Description:
        """Ask for a description and a rating, undrafted and unstopped; see `Model.describe`."""
        family = self.family
        # One request is enough, if the answer is written behind the description as usual.
        room = ANSWER_TOKENS if max_tokens >= family.summary_tokens and family.answer_open else 0
        first = self._written(prefix, family.score, max_tokens + room)
        reply = parse_reply(first.text, family, cut=first.cut)
        asked, rating, tokens = bool(family.answer_open), reply.rating, first.tokens
        if asked and rating is None:
            rating, more = self._rating(prefix, first, reply)
            tokens += more
        stats, unreadable = GenerationStats(tokens, reply.complete), asked and rating is None
        return Description(
            reply.description, text_key(reply.description), rating, unreadable, stats
        )

    def _rating(self, prefix: Prefix, first: Completion, reply: Reply) -> tuple[float | None, int]:
        """Ask on for a number: what is printed then, and the tokens that it took."""
        family, text, rating, tokens = self.family, first.text, None, 0
        if reply.marked and first.cut:
            more = self._written(prefix, family.score, ANSWER_TOKENS, text)
            text, tokens = text + more.text, more.tokens
            rating = parse_reply(text, family, cut=more.cut).rating
        if rating is None:
            # With a line break, since the tags' edges may be one token of the server's.
            ended = ("" if reply.marked else f"{family.description_end}\n") + family.answer_open
            forced = self._written(prefix, family.score, RATING_TOKENS, text + ended)
            tokens += forced.tokens
            rating = printed_rating(family.answer_open + forced.text, family, cut=forced.cut)
        return rating, tokens

    def reflect(self, prefix: Prefix, summary: str, initial: float, score: float) -> Description:
        """Ask for a corrected description; see `Model.reflect`."""
        family = self.family
        question = family.reflection(unmarked(summary), initial, score)
        answer = self._written(prefix, question, family.summary_tokens + RATING_TOKENS)
        reply = parse_reply(answer.text, family, cut=answer.cut)
        stats = GenerationStats(answer.tokens, complete=reply.complete)
        return Description(reply.description, text_key(reply.description), stats=stats)

    def log_probabilities(
        self, firsts: Sequence[Prefix], questions: Sequence[Asked]
    ) -> list[NDArray[np.float64]]:
        """Ask for the next token, several at once; see `Model.log_probabilities`.

        A server names the likeliest tokens only: options are single tokens here.
        """
        each = list(firsts) * len(questions) if len(firsts) == 1 else firsts
        asked = []
        for first, question in zip(each, questions, strict=True):
            pictures, about = [self._sent(first.tokens)], about_one
            if question.second is not None:
                pictures, about = [*pictures, self._sent(question.second)], about_two
            messages = chat(about(self.family, question.text), pictures)
            asked.append(partial(self._completions.ask, messages, max_tokens=1, logprobs=True))
        answers = self._completions.ask_all(asked)
        return [
            _logprobs_of(question.options, answer.logprobs)
            for question, answer in zip(questions, answers, strict=True)
        ]

    def close(self) -> None:
        """See `Model.close`."""
        self._completions.close()

    def _written(
        self, prefix: Prefix, question: str, max_tokens: int, written: str = ""
    ) -> Completion:
        text, picture = about_one(self.family, question), self._sent(prefix.tokens)
        messages = chat(text, [picture], unmarked(written))
        answer = self._completions.ask(messages, max_tokens, logprobs=False)
        text, stopped, _ = answer.text.partition(self.family.stop)
        return replace(answer, text=text, cut=answer.cut and not stopped)

    def _sent(self, tokens: VisualTokens) -> str:
        """A picture as a data URI: PNG, for nothing to be lost."""
        pixels = picture_of(tokens)
        key = hashlib.blake2b(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()
        if known := self._pictures.get(key):
            return str(known)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG", compress_level=1)
        uri = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")
        if len(uri) <= PICTURE_BYTES:
            self._pictures[key] = uri
        return uri


def _logprobs_of(answers: Sequence[str], found: Mapping[str, float]) -> NDArray[np.float64]:
    """Log-probabilities (n,) of answers among those of the likeliest tokens.

    A token that differs by spaces alone counts where the very answer is not among them: some
    servers cut them off at the end of the reply's beginning. An answer of which nothing is said
    cannot be likelier than the least of those that are named, and gets that.
    """
    spelled: dict[str, float] = {}
    for token, logprob in found.items():
        spelled[token.strip()] = max(logprob, spelled.get(token.strip(), -math.inf))
    known = [found.get(answer, spelled.get(answer.strip())) for answer in answers]
    if all(logprob is None for logprob in known):
        raise AnswerUnreadable(
            "the model's answer is none of those it was asked for",
            seen=", ".join(map(repr, list(found)[:5])),
            allowed=", ".join(map(repr, answers)),
            hint="ask it in the way it was trained on: --prompt",
        )
    least = min(found.values())
    return np.array([least if logprob is None else logprob for logprob in known])


def tile_side(cell_pixels: int) -> int:
    """Give the largest side of a tile, up to 8 pixels, that divides a model's cells.

    >>> tile_side(28), tile_side(32)
    (7, 8)
    """
    return max(side for side in range(1, 9) if cell_pixels % side == 0)


def tiles_of(pixels: NDArray[np.uint8], side: int) -> VisualTokens:
    """A picture (H, W, 3), both multiples of `side`, as tokens (H · W / side², 3 · side² + 1).

    Black becomes the darkest grey but one, for all values to lie as far from the middle as 127.
    """
    rows, columns = pixels.shape[0] // side, pixels.shape[1] // side
    around = np.maximum(pixels, 1).astype(np.float32) - _MIDDLE
    tiles = around.reshape(rows, side, columns, side, 3).swapaxes(1, 2).reshape(rows * columns, -1)
    values = np.pad(tiles, ((0, 0), (0, 1)), constant_values=_REACH)
    return VisualTokens(values, (rows, columns))


def picture_of(tokens: VisualTokens) -> NDArray[np.uint8]:
    """The picture (H, W, 3) that `tiles_of` made the tokens of, black apart."""
    rows, columns = tokens.grid
    values: Floats = np.rint(tokens.values[:, :-1]) + _MIDDLE
    side = round((values.shape[1] / 3) ** 0.5)
    tiles = values.clip(0, 255).astype(np.uint8).reshape(rows, columns, side, side, 3)
    return np.ascontiguousarray(tiles.swapaxes(1, 2).reshape(rows * side, columns * side, 3))
