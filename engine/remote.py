"""A model behind an OpenAI-compatible server in place of a package: the `remote` VLM role.

Its visual tokens stay with it. So a photo goes to the server with every question, a memory keeps
its cases' pictures (see `meiqa.engine.tiles`), and keys are made from what is written
(`meiqa.engine.text_keys`). Everything else is as with a local model.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from meiqa.engine.caches import ByteLru, ContentKey
from meiqa.engine.chat import about_one, about_two, chat, unmarked
from meiqa.engine.completions import Completion, Completions
from meiqa.engine.drafting import Draft
from meiqa.engine.images import ImageSource
from meiqa.engine.manifest import UNCALIBRATED, Calibration, DecoderShape, ImageProcessing, Manifest
from meiqa.engine.package import EnginePackage
from meiqa.engine.pipeline import Engine
from meiqa.engine.prompts import VISUALQUALITY_R1, PromptFamily, fault_of
from meiqa.engine.rating import printed_rating
from meiqa.engine.remembering import open_memory
from meiqa.engine.text_keys import TEXT_KEY, TEXT_KEY_WIDTH, text_key
from meiqa.engine.tiles import picture_of, tile_side, tile_width, tiles_of
from meiqa.engine.vlm import ANSWER_TOKENS, RATING_TOKENS, Description, Prefix, VisualTokens
from meiqa.errors import AnswerUnreadable, MeiqaError, StoreNotFound, UsageError
from meiqa.memory import NEAR_DUPLICATE, Admission, MemoryBank
from meiqa.types import Assessment, Failure

__all__ = [
    "CELL_PIXELS",
    "MAX_PIXELS",
    "RemoteEngine",
    "RemotePackage",
    "RemoteSettings",
    "RemoteVlm",
    "connected",
    "open_remote",
]

SETTINGS = "remote.json"
SCHEMA = 1
CELL_PIXELS = 28
"""Of Qwen2.5-VL; Qwen3-VL's are 32. Pictures of whole cells are not resized again by the server."""
MIN_PIXELS, MAX_PIXELS = 56 * 56, 448 * 448
PICTURE_BYTES = 256 << 20
"""Encoded pictures that are kept to be sent again."""


@dataclass(frozen=True)
class RemoteSettings:
    """How a remote model is asked, which lies beside the memory that was made so.

    Attributes:
        model: what the server calls it.
        prompt: what it is asked.
        cell_pixels: sides of the pictures it is sent are multiples of this.
        max_pixels: largest area of these pictures.
        calibration: as in a package.
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
        about = about_one(self.prompt, self.prompt.score)
        for text in (about, about_one(self.prompt, self.prompt.levels), about_two(self.prompt)):
            chat(text, ["", ""])  # refuses a family that no messages stand for

    def to_json(self) -> str:
        """The text of remote.json."""
        return json.dumps({"schema": SCHEMA, **asdict(self)}, indent=2) + "\n"

    def write(self, memory: Path) -> None:
        """Lay them into a memory's directory, whole."""
        unfinished = memory / f".{SETTINGS}.tmp"
        unfinished.write_text(self.to_json(), encoding="utf-8")
        unfinished.replace(memory / SETTINGS)

    @classmethod
    def read(cls, memory: Path) -> RemoteSettings | None:
        """Those of a memory; None if it has none.

        Raises:
            UsageError: they are not what this version writes.
        """
        file = memory / SETTINGS
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            if values.pop("schema") != SCHEMA or fault_of(values["prompt"]):
                raise ValueError("another schema or prompt family")
            prompt = PromptFamily.from_dict(values.pop("prompt"))
            calibration = Calibration.from_dict(values.pop("calibration"))
            return cls(prompt=prompt, calibration=calibration, **values)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, MeiqaError) as error:
            raise UsageError(
                f"{file} is not what this version writes",
                seen=f"{type(error).__name__}: {error}",
                hint="build the memory again",
            ) from error

    @classmethod
    def of_memory(cls, memory: str | Path) -> RemoteSettings:
        """Those of a memory.

        Raises:
            StoreNotFound: there is no memory.
            UsageError: it has none, or they are not what this version writes.
        """
        if not Path(memory).is_dir():
            raise StoreNotFound(f"there is no memory directory {memory}", hint="check the path")
        settings = cls.read(Path(memory))
        if settings is None:
            raise UsageError(
                f"the memory {memory} was not made with a remote model",
                hint="name one that was: meiqa memory build --remote URL makes it",
            )
        return settings


class RemotePackage(EnginePackage):
    """What the engine asks of a package, for a model that has none.

    Its digest covers the model's name and how it is asked; that the server serves the same weights
    under that name tomorrow is for its owner to know.
    """

    @classmethod
    def of(cls, settings: RemoteSettings, memory: Path) -> RemotePackage:
        """The package of a model that is asked so; its path is the memory's."""
        name = hashlib.sha256(settings.model.encode()).hexdigest()
        made_by = {"remote model": name, "tiles": str(tile_side(settings.cell_pixels))}
        manifest = Manifest(
            architecture="remote",
            source={"name": settings.model, "sha256": ""},
            precision="remote",
            graphs={},
            image=ImageProcessing(
                patch_size=settings.cell_pixels,
                merge_size=1,
                min_pixels=min(MIN_PIXELS, settings.max_pixels),
                max_pixels=settings.max_pixels,
                mean=(0.5, 0.5, 0.5),
                std=(0.5, 0.5, 0.5),
            ),
            decoder=DecoderShape(1, 1, 1, TEXT_KEY_WIDTH, 1, 0),
            prompt=settings.prompt,
            calibration=settings.calibration,
            report={},
            files={**made_by, "key": TEXT_KEY},
        )
        return cls(memory, manifest)

    @property
    def settings(self) -> RemoteSettings:
        """How the model is asked."""
        manifest = self.manifest
        return RemoteSettings(
            manifest.source["name"],
            manifest.prompt,
            manifest.image.cell_pixels,
            manifest.image.max_pixels,
            manifest.calibration,
        )

    @property
    def tile_side(self) -> int:
        """Side of the tiles that stand for visual tokens."""
        return tile_side(self.manifest.image.cell_pixels)

    @property
    def widths(self) -> tuple[int, int]:
        """Widths of keys and of tokens."""
        return TEXT_KEY_WIDTH, tile_width(self.tile_side)

    def with_calibration(self, calibration: Calibration) -> RemotePackage:
        """Rewrite the settings beside the memory with another calibration; the digest stays."""
        settings = replace(self.settings, calibration=calibration)
        settings.write(self.path)
        return RemotePackage.of(settings, self.path)

    def array(self, name: str) -> NDArray[Any]:
        """The only array that is asked for: the key of unwritten text, which there is not."""
        key, token = self.widths
        return np.zeros((token + 1, key), np.float32)


@dataclass(frozen=True, eq=False)
class RemotePrefix(Prefix):
    """A picture as it is sent; the server keeps keys and values to itself."""

    picture: str

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.tokens.nbytes + len(self.picture)


class RemoteVlm:
    """A model behind a server, in the role of `meiqa.engine.vlm.Vlm`."""

    def __init__(self, package: RemotePackage, completions: Completions) -> None:
        self.package = package
        self._family = package.manifest.prompt
        self._completions = completions
        self._pictures: ByteLru[_Encoded] = ByteLru(PICTURE_BYTES)

    @property
    def image(self) -> ImageProcessing:
        """How it wants its pixels."""
        return self.package.manifest.image

    def encode(self, pixels: NDArray[np.uint8]) -> VisualTokens:
        """Take a picture apart into tiles; nothing is sent."""
        return tiles_of(pixels, self.package.tile_side)

    def read(self, pictures: Sequence[VisualTokens]) -> list[Prefix]:
        """Make pictures ready to be sent; nothing is sent."""
        nothing = np.zeros((0, 2, 0, 0, 0), np.float32)
        return [RemotePrefix(nothing, tokens, 0, self._sent(tokens)) for tokens in pictures]

    def describe(
        self,
        prefix: Prefix,
        max_tokens: int,
        drafts: Sequence[Draft] = (),
        enough: Callable[[], bool] = lambda: False,
    ) -> Description:
        """Ask for a description and a rating; see `Vlm.describe`.

        Neither drafts nor `enough` have a use: a server writes by itself.
        """
        family = self._family
        # One request is enough, if the answer is written behind the description as usual.
        room = ANSWER_TOKENS if max_tokens >= family.summary_tokens and family.answer_open else 0
        first = self._written(prefix, family.score, max_tokens + room)
        text, tokens = first.text, first.tokens
        described, marked, _ = text.partition(family.description_end)
        if not marked and not first.cut and family.answer_open:
            # An answer without the end marker before it ends the description as well.
            described = text.rpartition(family.answer_open)[0] or text
        rating = None
        if family.answer_open:
            rating, more = self._rating(prefix, text, marked=bool(marked), cut=first.cut)
            tokens += more
        text = described.strip()
        return Description(
            text=text,
            key=text_key(text),
            rating=rating,
            unreadable=bool(family.answer_open) and rating is None,
            complete=bool(marked) or not first.cut,
            tokens=tokens,
        )

    def _rating(
        self, prefix: Prefix, text: str, *, marked: bool, cut: bool
    ) -> tuple[float | None, int]:
        """The number that is printed as the answer, and the tokens that further asking took."""
        family, tokens = self._family, 0
        after = text.partition(family.description_end)[2] if marked else text
        rating = printed_rating(after, family, cut=cut) if marked or not cut else None
        if rating is None and marked and cut:
            more = self._written(prefix, family.score, ANSWER_TOKENS, text)
            text, after, tokens = text + more.text, after + more.text, more.tokens
            rating = printed_rating(after, family, cut=more.cut)
        if rating is None:
            ended = ("" if marked else family.description_end) + family.answer_open
            forced = self._written(prefix, family.score, RATING_TOKENS, text + ended)
            tokens += forced.tokens
            rating = printed_rating(family.answer_open + forced.text, family, cut=forced.cut)
        return rating, tokens

    def reflect(self, prefix: Prefix, summary: str, initial: float, score: float) -> Description:
        """Ask for a corrected description; see `Vlm.reflect`."""
        family = self._family
        question = family.reflection(unmarked(summary), initial, score)
        answer = self._written(prefix, question, family.summary_tokens + RATING_TOKENS)
        described, marked, _ = answer.text.partition(family.description_end)
        text = described.strip()
        complete = bool(marked) or not answer.cut
        return Description(text, text_key(text), None, False, complete, answer.tokens)

    def grade(self, prefix: Prefix) -> NDArray[np.float64]:
        """Probabilities (5,) of the grade words; see `Vlm.grade`."""
        text = about_one(self._family, self._family.levels)
        answer = self._completions.ask(
            chat(text, [self._sent(prefix.tokens)]), max_tokens=1, logprobs=True
        )
        chosen = _logprobs_of(self._family.level_words, answer.logprobs)
        weights = np.exp(chosen - chosen.max())
        probabilities: NDArray[np.float64] = weights / weights.sum()
        return probabilities

    def prefer_first(
        self, firsts: Sequence[Prefix], seconds: Sequence[VisualTokens]
    ) -> NDArray[np.float64]:
        """Logits (K,) that the first looks better, several asked at once; see `Vlm`."""
        many = list(firsts) * len(seconds) if len(firsts) == 1 else firsts
        text = about_two(self._family)
        asked = [
            partial(
                self._completions.ask,
                chat(text, [self._sent(first.tokens), self._sent(second)]),
                max_tokens=1,
                logprobs=True,
            )
            for first, second in zip(many, seconds, strict=True)
        ]
        logits = np.zeros(len(asked))
        for index, answer in enumerate(self._completions.ask_all(asked) if asked else ()):
            one, other = _logprobs_of(self._family.verdicts, answer.logprobs)
            logits[index] = one - other
        return logits

    def close(self) -> None:
        """Let go of connections."""
        self._completions.close()

    def _written(
        self, prefix: Prefix, question: str, max_tokens: int, written: str = ""
    ) -> Completion:
        """What is written behind a question and what there is of the reply."""
        messages = chat(
            about_one(self._family, question), [self._sent(prefix.tokens)], unmarked(written)
        )
        answer = self._completions.ask(messages, max_tokens, logprobs=False)
        text, stopped, _ = answer.text.partition(self._family.stop)
        return replace(answer, text=text, cut=answer.cut and not stopped)

    def _sent(self, tokens: VisualTokens) -> str:
        """A picture as a data URI: PNG, for nothing to be lost."""
        pixels = picture_of(tokens)
        digest = hashlib.blake2b(pixels.data, digest_size=16)
        key = ContentKey(digest.hexdigest(), tokens.grid, self.package.digest)
        if known := self._pictures.get(key):
            return known.uri
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG", compress_level=1)
        encoded = base64.b64encode(file.getvalue()).decode("ascii")
        made = _Encoded(f"data:image/png;base64,{encoded}")
        self._pictures.put(key, made)
        return made.uri


@dataclass(frozen=True)
class _Encoded:
    """A picture as it is sent."""

    uri: str

    @property
    def nbytes(self) -> int:
        return len(self.uri)


def _logprobs_of(answers: Sequence[str], found: Mapping[str, float]) -> NDArray[np.float64]:
    """Log-probabilities (n,) of answers among those of the likeliest tokens.

    A token that differs by spaces alone counts where the very answer is not among them: some
    servers cut them off at the end of the reply's beginning. An answer of which nothing is said
    cannot be likelier than the least of those that are named, and gets that.

    Raises:
        AnswerUnreadable: none of the answers is named.
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


class RemoteEngine(Engine):
    """An engine whose model is behind a server."""

    def __init__(
        self, vlm: RemoteVlm, memory: MemoryBank, *, learn: bool, exclude_above: float
    ) -> None:
        # A server writes by itself: there is nothing to draft.
        super().__init__(vlm, vlm.package, memory, exclude_above=exclude_above, drafting=False)
        self._remote, self._learns = vlm, learn

    def score_many(
        self, images: Iterable[ImageSource], *, learn: bool = True, **options: Any
    ) -> Iterator[Assessment | Failure]:
        """Assess photos; see `Engine.score_many`. None is learned unless pictures may be kept."""
        return super().score_many(images, learn=learn and self._learns, **options)

    def close(self) -> None:
        """Let go of the memory and of connections."""
        super().close()
        self._remote.close()


def open_remote(
    url: str,
    model: str | None,
    memory: str | Path | None,
    *,
    learn: bool = False,
    admission: Admission = "gated",
    exclude_above: float = NEAR_DUPLICATE,
    head: str | None = None,
    **limits: Any,
) -> RemoteEngine:
    """Open an engine with a model behind a server.

    Args:
        url: of the API, as `http://host:8000/v1`.
        model: what the server calls it; by default that which the memory was made with.
        memory: its directory, which `meiqa memory build --remote` made.
        learn: open the memory for writing: learned cases **keep their pictures**, scaled down.
        admission, exclude_above, head: see `Engine.open`.
        limits: of `Completions`: concurrent requests, attempts, seconds to wait for an answer.

    Raises:
        StoreError: the memory cannot be used, or was made with another model.
        UsageError: there is no memory, or an option makes no sense.
    """
    if memory is None:
        raise UsageError(
            "a remote model needs a memory that was made with it",
            hint="name it, or build one: meiqa memory build LABELS.csv --remote URL --model NAME …",
        )
    settings = RemoteSettings.of_memory(memory)
    if model is not None and model != settings.model:
        raise UsageError(
            f"the memory {memory} was made with another model",
            seen=model,
            allowed=settings.model,
            hint="name that model, or build a memory with this one",
        )
    vlm = connected(url, settings, Path(memory), head=head, **limits)
    try:
        bank = open_memory(memory, vlm.package.digest, learn=learn, admission=admission)
    except BaseException:
        vlm.close()
        raise
    return RemoteEngine(vlm, bank, learn=learn, exclude_above=exclude_above)


def connected(
    url: str, settings: RemoteSettings, memory: Path, *, head: str | None = None, **limits: Any
) -> RemoteVlm:
    """A model that is asked so; nothing is sent yet. `limits` are those of `Completions`."""
    package = RemotePackage.of(settings, memory).headed(head)
    assert isinstance(package, RemotePackage)
    return RemoteVlm(package, Completions(url, settings.model, **limits))
