"""A local model that writes what it is told to, over a decoder that reads from a script."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from meiqa.engine.calibration import UNCALIBRATED
from meiqa.engine.local import LocalModel
from meiqa.engine.manifest import DecoderShape
from meiqa.engine.model import Description, Draft, Floats, Prefix, VisualTokens
from meiqa.engine.package import EnginePackage
from meiqa.engine.prompts import FAMILIES, MEIQA, PromptFamily, Prompts
from meiqa.engine.runtime.decoder import KeyValues, Row, Step

LIMIT = 40
WIDTH = 6
RATED = FAMILIES["visualquality-r1"]
OPENING = KeyValues(np.zeros((1, 2, 1, 3, 1), np.float32), 3)
PREFIX = Prefix(
    tokens=VisualTokens(np.zeros((1, WIDTH), np.float32), (1, 1)),
    opening=OPENING,
    key_values=OPENING,
    next_position=3,
)

# Qwen's way of parting a text before it is encoded.
QWEN_PARTS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def tokenizer_like_qwen() -> Tokenizer:
    """A small vocabulary in which tags are several tokens, and merge with what precedes them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_PARTS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"],
    )
    texts = [text for family in FAMILIES.values() for text in family.to_dict().values()]
    words = [f"it is{word}" for word in MEIQA.level_words]
    answers = ["It is soft.</think>\n<answer>3.45</answer>", "It is dark</think><answer>"]
    corpus = [text for text in texts if isinstance(text, str)] + words + answers
    tokenizer.train_from_iterator(corpus * 20, trainer)
    return tokenizer


QWEN = tokenizer_like_qwen()


class ScriptedDecoder:
    """A decoder that writes a text, and another one once a token is forced on it.

    It knows a token by its embedding, which holds its number; its hidden states are embeddings.
    Where a draft has left the text, there is no answer that is a number.
    """

    def __init__(
        self, free: Sequence[int], forced: Sequence[int], tokenizer: Tokenizer | None = None
    ) -> None:
        self._vocabulary = (tokenizer or QWEN).get_vocab_size()
        self.scripts = [list(free), list(forced)]
        self.read: list[int] = []
        self.forced: list[int] = []
        self.rooms: list[int] = []
        self.calls = 0
        self._begins = 0

    def prefill(self, rows: Sequence[Row], ahead: Floats | None = None) -> list[KeyValues]:
        raise AssertionError("there is nothing to be read")

    def last_logits(self, rows: Sequence[Row], prefixes: Sequence[KeyValues]) -> Floats:
        raise AssertionError("there is nothing to be graded")

    def step(self, prefix: KeyValues, past: KeyValues, row: Row, wanted: int = 1) -> Step:
        fed = [round(float(value)) for value in row.embeds[:, 0]]
        assert prefix.length == PREFIX.opening.length
        self.rooms.append(past.array.shape[3])
        assert past.length <= len(self.read)
        # What was read ahead in vain is dropped. What is kept of earlier calls is what they
        # returned, growth or not.
        del self.read[past.length :]
        assert past.array[0, 0, 0, : past.length, 0].tolist() == self.read
        running = np.arange(PREFIX.next_position + past.length, len(fed) + 3 + past.length)
        assert (row.positions == running).all()

        read, drafted = fed[: len(fed) - wanted + 1], fed[len(fed) - wanted + 1 :]
        if not self.read:
            self._begins = len(read)
        elif read != self.scripts[0][past.length - self._begins :][:1]:
            assert not self.forced, "forced twice"
            self.forced = read
            self.scripts.pop(0)
            self._begins = past.length + len(read)
        self.read += fed
        self.calls += 1
        logits = np.zeros((wanted, self._vocabulary), np.float32)
        script = self.scripts[0][past.length + len(read) - self._begins :]
        for place in range(wanted):
            if drafted[:place] == script[:place] and place < len(script):
                logits[place, script[place]] = 1
            else:
                logits[place] = np.nan
        key_values = np.repeat(row.embeds[None, None, None, :, :1], 2, axis=1)
        return Step(logits, row.embeds, key_values)


def ids_of(text: str | Sequence[str], tokenizer: Tokenizer | None = None) -> list[int]:
    """Tokens of a text, or of parts that are each encoded on their own."""
    parts = [text] if isinstance(text, str) else text
    encode = (tokenizer or QWEN).encode
    return [i for part in parts for i in encode(part, add_special_tokens=False).ids]


def scripted(
    decoder: ScriptedDecoder,
    family: PromptFamily = RATED,
    tokenizer: Tokenizer | None = None,
    ends: Sequence[str] = (),
) -> LocalModel:
    """A model of one layer that writes what its decoder is told to."""
    tokenizer = tokenizer or QWEN
    vocabulary = tokenizer.get_vocab_size()
    manifest = SimpleNamespace(
        image=SimpleNamespace(cell_pixels=1),
        calibration=UNCALIBRATED,
        score_head="text",
        prompt=family,
        decoder=DecoderShape(
            layers=1, kv_heads=1, head_dim=1, hidden_size=WIDTH, vocab_size=vocabulary, deepstack=0
        ),
    )
    package = SimpleNamespace(
        manifest=manifest,
        digest="scripted",
        widths=(WIDTH, WIDTH),
        prompts=Prompts(family, tokenizer, ends),
        embedding=np.repeat(np.arange(vocabulary, dtype=np.float32)[:, None], WIDTH, axis=1),
        array=lambda name: np.zeros((WIDTH + 1, WIDTH), np.float32),
    )
    return LocalModel(cast(EnginePackage, package), cast(Any, None), decoder)


@dataclass
class Told:
    """A description by a scripted model, and what the model was fed."""

    description: Description
    decoder: ScriptedDecoder

    @property
    def forced(self) -> str:
        """Text that was forced on the model."""
        return str(QWEN.decode(self.decoder.forced, skip_special_tokens=False))


def told(
    free: str | Sequence[str],
    forced: str = "9</answer>",
    family: PromptFamily = RATED,
    limit: int = LIMIT,
    drafts: Sequence[Draft] = (),
    measured: str = "",
) -> Told:
    """What comes of a model that writes `free`, and `forced` after what is forced on it."""
    after = [QWEN.token_to_id("<|im_end|>")] * 2
    decoder = ScriptedDecoder(ids_of(free) + after, ids_of(forced) + after)
    prefix = replace(PREFIX, tokens=replace(PREFIX.tokens, measured=measured))
    return Told(scripted(decoder, family).describe(prefix, limit, drafts), decoder)


def key_of(text: str | Sequence[str]) -> Floats:
    """The key of a description by a scripted model."""
    return np.full(WIDTH, np.mean(ids_of(text)), np.float32)
