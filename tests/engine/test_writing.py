"""Descriptions and ratings: what is read from greedy writing, and where writing is helped on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from meiqa.engine.drafting import Draft
from meiqa.engine.local import LocalVlm
from meiqa.engine.manifest import DecoderShape
from meiqa.engine.package import EnginePackage
from meiqa.engine.prompts import FAMILIES, MEIQA, PromptFamily, Prompts, layout
from meiqa.engine.runtime.base import Array
from meiqa.engine.runtime.onnx import open_sessions
from meiqa.engine.vlm import (
    ANSWER_TOKENS,
    NO_EFFORT,
    RATING_TOKENS,
    Description,
    Effort,
    Floats,
    Prefix,
    VisualTokens,
)
from meiqa.engine.writing import PAST_STEP, Writing
from tests.engine.samples import PHOTOS, seen

LIMIT = 40
WIDTH = 6
RATED = FAMILIES["visualquality-r1"]

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

    def __init__(self, free: Sequence[int], forced: Sequence[int]) -> None:
        self.scripts = [list(free), list(forced)]
        self.read: list[int] = []
        self.forced: list[int] = []
        self.rooms: list[int] = []
        self.calls = 0
        self._begins = 0

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Floats]:
        embeds, wanted = cast(Floats, inputs["embeds"]), inputs["logit_positions"].shape[2]
        fed = [round(float(value)) for value in embeds[0, 0, :, 0]]
        assert inputs["logit_positions"][0, 0].tolist() == [*range(len(fed) - wanted, len(fed))]
        self.rooms.append(inputs["past"].shape[5])
        length = int(inputs["past_lengths"][0, 0])
        assert length <= len(self.read)
        # What was read ahead in vain is dropped. What is kept of earlier calls is what they
        # returned, growth or not.
        del self.read[length:]
        kept = inputs["past"][0, 0, 0, 0, 0, :length, 0]
        assert kept.tolist() == self.read
        start, drafted = inputs["positions"][0, 0, 0, 0], fed[len(fed) - wanted + 1 :]
        assert start == PREFIX.next_position + length

        read = fed[: len(fed) - wanted + 1]
        if not self.read:
            self._begins = len(read)
        elif read != self.scripts[0][length - self._begins :][:1]:
            assert not self.forced, "forced twice"
            self.forced = read
            self.scripts.pop(0)
            self._begins = length + len(read)
        self.read += fed
        self.calls += 1
        logits = np.zeros((1, 1, wanted, QWEN.get_vocab_size()), np.float32)
        script = self.scripts[0][length + len(read) - self._begins :]
        for place in range(wanted):
            if drafted[:place] == script[:place] and place < len(script):
                logits[..., place, script[place]] = 1
            else:
                logits[..., place, :] = np.nan
        key_values = np.repeat(embeds[None, None, :, None, :, :, :1], 2, axis=1)
        return {"logits": logits, "hidden": embeds, "key_values": key_values}


@dataclass
class Told:
    """A description by a scripted model, and what the model was fed."""

    description: Description
    decoder: ScriptedDecoder

    @property
    def forced(self) -> str:
        """Text that was forced on the model."""
        return str(QWEN.decode(self.decoder.forced, skip_special_tokens=False))


def ids_of(text: str | Sequence[str]) -> list[int]:
    """Tokens of a text, or of parts that are each encoded on their own."""
    parts = [text] if isinstance(text, str) else text
    return [i for part in parts for i in QWEN.encode(part, add_special_tokens=False).ids]


def scripted(free: Sequence[int], forced: Sequence[int], family: PromptFamily) -> LocalVlm:
    """A model of one layer that writes what it is told to."""
    vocabulary = QWEN.get_vocab_size()
    embedding = np.repeat(np.arange(vocabulary, dtype=np.float32)[:, None], WIDTH, axis=1)
    shape = DecoderShape(
        layers=1, kv_heads=1, head_dim=1, hidden_size=WIDTH, vocab_size=vocabulary, deepstack=0
    )
    package = SimpleNamespace(
        prompts=Prompts(family, QWEN), embedding=embedding, manifest=SimpleNamespace(decoder=shape)
    )
    decoder = ScriptedDecoder(free, forced)
    return LocalVlm(cast(EnginePackage, package), cast(Any, None), decoder)


PREFIX = Prefix(
    np.zeros((1, 2, 1, 3, 1), np.float32), VisualTokens(np.zeros((1, WIDTH), np.float32), (1, 1)), 3
)


def told(
    free: str | Sequence[str],
    forced: str = "9</answer>",
    family: PromptFamily = RATED,
    limit: int = LIMIT,
    drafts: Sequence[Draft] = (),
) -> Told:
    """What comes of a model that writes `free`, and `forced` after a forced opening."""
    after = [QWEN.token_to_id("<|im_end|>")] * 2
    vlm = scripted(ids_of(free) + after, ids_of(forced) + after, family)
    description = vlm.describe(PREFIX, limit, drafts)
    return Told(description, cast(ScriptedDecoder, vlm._decoder))


def key_of(text: str | Sequence[str]) -> Floats:
    """The key of a description by a scripted model."""
    return np.full(WIDTH, np.mean(ids_of(text)), np.float32)


def test_tags_are_several_tokens_here_and_merge() -> None:
    assert all(len(ids_of(tag)) > 1 for tag in ("</think>", "<answer>", "</answer>"))
    pieces = [QWEN.decode([token]) for token in ids_of("It is soft.</think>\n<answer>3.45")]
    assert ".</" in pieces
    assert ">\n" in pieces


def test_a_marker_of_several_tokens() -> None:
    written = ["It is soft and dark", "</", "think", ">", "<answer>3.45</answer>"]
    made = told(written)
    assert made.description.text == "It is soft and dark"
    assert (made.description.rating, made.description.unreadable) == (3.45, False)
    assert made.description.complete
    assert not made.decoder.forced
    np.testing.assert_allclose(made.description.key, key_of(written[0]), rtol=1e-6)


def test_a_marker_that_merges_with_the_text_around_it() -> None:
    made = told("It is soft.</think>\n<answer>3.45</answer>")
    assert made.description.text == "It is soft."
    assert made.description.rating == 3.45
    # The full stop shares its token with the marker, so it does not count for the key.
    np.testing.assert_allclose(made.description.key, key_of("It is soft"), rtol=1e-6)


def test_writing_ends_when_the_answer_is_closed() -> None:
    text = "It is soft.</think>\n<answer>3.45</answer>"
    made = told([text, " and more"])
    assert made.description.tokens == len(ids_of(text)) - 1


def test_a_rating_in_json_is_read() -> None:
    text = 'Soft.</think>\n<answer>{"rating": 2.75}</answer>'
    made = told(text, family=FAMILIES["q-insight"])
    assert (made.description.text, made.description.rating) == ("Soft.", 2.75)
    assert not made.decoder.forced


def test_the_last_answer_counts_and_its_first_number() -> None:
    made = told("Soft.</think><answer>4, no, <answer>3.5 of 5</answer>")
    assert made.description.rating == 3.5


def test_numbers_outside_the_answer_do_not_count() -> None:
    made = told("Soft, 2 or 3.</think>4<answer>good</answer>5", forced="1.50</answer>")
    assert (made.description.text, made.description.rating) == ("Soft, 2 or 3.", 1.5)
    assert made.forced == "<answer>"
    unmarked = told("Soft.<answer>good</answer> 5", forced="1.50</answer>")
    assert (unmarked.description.text, unmarked.description.rating) == ("Soft.", 1.5)
    assert unmarked.forced == "</think><answer>"


@pytest.mark.parametrize(
    "answer", ["", "3.45", "<answer></answer>", "<answer>good</answer>", "<answer>good"]
)
def test_without_a_number_the_answer_is_opened_once_more(answer: str) -> None:
    made = told(f"It is soft.</think>\n{answer}", forced="2.25</answer>")
    assert made.forced == "<answer>"
    assert (made.description.rating, made.description.unreadable) == (2.25, False)
    assert made.description.text == "It is soft."
    assert made.description.complete


@pytest.mark.parametrize("forced", ["good</answer>3", "", "</answer>3"])
def test_without_a_number_twice_there_is_no_rating(forced: str) -> None:
    made = told("It is soft.</think><answer>good</answer>", forced=forced)
    assert (made.description.rating, made.description.unreadable) == (None, True)


def test_a_turn_that_ends_without_the_marker() -> None:
    made = told("It is soft.", forced="2.25</answer>")
    assert made.forced == "</think><answer>"
    assert (made.description.text, made.description.rating) == ("It is soft.", 2.25)
    assert made.description.complete


def test_an_answer_without_the_end_of_the_description() -> None:
    made = told(["It is soft", "<", "answer", ">3.45</answer>"])
    assert (made.description.text, made.description.rating) == ("It is soft", 3.45)
    np.testing.assert_allclose(made.description.key, key_of("It is soft"), rtol=1e-6)
    assert not made.decoder.forced


def test_a_turn_that_ends_at_once() -> None:
    made = told("", forced="2.25</answer>")
    assert (made.description.text, made.description.key) == ("", None)
    assert (made.description.rating, made.description.complete) == (2.25, True)


def test_an_empty_description() -> None:
    made = told("</think>\n<answer>3.45</answer>")
    assert (made.description.text, made.description.key) == ("", None)
    assert made.description.rating == 3.45
    assert not made.decoder.forced


def test_the_limit_cuts_a_description_and_opens_the_answer() -> None:
    words = ["It", " is", " soft", " and", " dark", " and", " more"]
    made = told(words, forced="2.25</answer>", limit=len(ids_of(words[:4])))
    assert made.description.text == "It is soft and"
    assert made.forced == "</think><answer>"
    assert (made.description.rating, made.description.complete) == (2.25, False)
    np.testing.assert_allclose(made.description.key, key_of(words[:4]), rtol=1e-6)


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_a_marker_begun_within_the_limit_is_completed(kept: int) -> None:
    words = ["It", " is", "</", "think", ">", "<answer>3.45</answer>"]
    made = told(words, limit=len(ids_of(words[: 2 + kept])))
    assert (made.description.text, made.description.complete) == ("It is", True)
    assert made.description.rating == 3.45


def test_what_only_looks_like_a_marker_at_the_limit_is_text() -> None:
    words = ["It", " is", "</", "dark", " and", " more"]
    made = told(words, forced="1.00</answer>", limit=len(ids_of(words[:2])))
    assert (made.description.text, made.description.complete) == ("It is</", False)
    assert made.description.rating == 1.0


@pytest.mark.parametrize(
    ("digits", "rating"), [("3.45 ", 3.45), ("3.", None), ("3.4", None), ("3", None)]
)
def test_a_number_that_the_limit_may_have_cut_is_no_rating(
    digits: str, rating: float | None
) -> None:
    # The digits are the last that the limit lets the model write; more would follow.
    fill = ["?"] * (RATING_TOKENS - len(ids_of(digits)))
    after = ["7", "8"] * 8 if rating is None else ["!"] * 16
    made = told("It is soft.", forced="".join([*fill, digits, *after]))
    assert made.description.rating == rating
    assert made.description.unreadable == (rating is None)


def test_an_answer_that_goes_on_is_cut_and_asked_for_again() -> None:
    made = told(["It is</think>", *["good "] * (2 * ANSWER_TOKENS)], forced="2.25</answer>")
    assert made.forced == "<answer>"
    assert made.description.rating == 2.25
    assert made.description.complete


def test_the_past_grows_where_an_answer_is_long() -> None:
    made = told(["It</think>", *["? "] * (2 * ANSWER_TOKENS)], forced="2.25</answer>", limit=4)
    rooms = made.decoder.rooms
    assert rooms == sorted(rooms)
    assert rooms[-1] == rooms[0] + PAST_STEP
    assert rooms[-1] >= len(made.decoder.read) - 1


def test_without_a_printed_rating_writing_stops_after_the_description() -> None:
    family = FAMILIES["levels"]
    made = told("It is soft, 3 of 5.", family=family)
    assert made.description.text == "It is soft, 3 of 5."
    assert (made.description.rating, made.description.unreadable) == (None, False)
    assert made.description.complete
    assert not made.decoder.forced
    cut = told(["It", " is", " soft"], family=family, limit=1)
    assert (cut.description.text, cut.description.complete) == ("It", False)
    assert not cut.decoder.forced


def test_a_reflection_ends_where_its_description_does() -> None:
    vlm = scripted(ids_of("It is dark.</think>\n<answer>3.45"), [0], RATED)
    written = vlm.reflect(PREFIX, "It is soft.", 3.0, 2.0)
    assert (written.text, written.rating, written.unreadable) == ("It is dark.", None, False)
    assert written.complete
    assert len(cast(ScriptedDecoder, vlm._decoder).scripts) == 2
    np.testing.assert_allclose(written.key, key_of("It is dark"), rtol=1e-6)


TOLD = ["It is soft and dark", "</", "think", ">", "<answer>3.45</answer>"]
GUESSES = {
    "right": [Draft("It is soft and dark", 3.45)],
    "wrong": [Draft("Sharp", 1.0)],
    "empty": [Draft("")],
    "unrated": [Draft("It is soft and dark")],
    "longer than the limit": [Draft("It is soft and dark " * 40, 3.45)],
    "several": [Draft("It is good", 3.0), Draft("It is soft and bad", 3.1), Draft("It is dark")],
}


@pytest.mark.parametrize("drafts", GUESSES.values(), ids=list(GUESSES))
@pytest.mark.parametrize("limit", [2, 3, 6, LIMIT])
def test_drafts_change_nothing_but_the_effort(drafts: Sequence[Draft], limit: int) -> None:
    plain = told(TOLD, forced="2.25</answer>", limit=limit)
    made = told(TOLD, forced="2.25</answer>", limit=limit, drafts=drafts)
    np.testing.assert_array_equal(made.description.key, plain.description.key)
    one, other = (vars(replace(a.description, key=None, effort=NO_EFFORT)) for a in (made, plain))
    assert one == other
    assert made.forced == plain.forced
    effort = made.description.effort
    assert effort.accepted <= effort.drafted
    assert effort.calls == made.decoder.calls == plain.decoder.calls - effort.accepted
    assert plain.description.effort == Effort(calls=plain.decoder.calls)


def test_a_right_draft_is_checked_in_one_call() -> None:
    text = "It is soft and dark</think><answer>3.45</answer>"
    made = told(text, drafts=[Draft("It is soft and dark", 3.45)])
    assert made.description.effort.calls == 1
    assert made.description.rating == 3.45


def test_after_a_disagreement_writing_finds_back_into_a_draft() -> None:
    text = "It is soft and dark</think><answer>3.45</answer>"
    made = told(text, drafts=[Draft("It is good and dark", 3.45)])
    assert made.description.effort.calls == 3  # the question, " soft", " and"


@pytest.fixture(scope="module")
def tiny(package: EnginePackage) -> LocalVlm:
    return LocalVlm(package, *open_sessions(package, "cpu", 1))


@pytest.fixture(scope="module")
def prefixes(tiny: LocalVlm) -> list[Prefix]:
    return tiny.read([seen(tiny, photo) for photo in PHOTOS[:4]])


@dataclass
class Twin:
    """Greedy writing the slow way: for each token the whole prompt is read anew."""

    tokens: list[int]
    hidden: Floats


def naive_greedy(vlm: LocalVlm, picture: VisualTokens, count: int) -> Twin:
    """Write `count` tokens, or fewer if the turn ends; no cache, no prefix."""
    p, table, s = vlm.prompts, vlm.package.embedding, vlm.shape
    tokens: list[int] = []
    while True:
        text = np.concatenate([p.closing, p.score, np.array(tokens, np.int64)])
        embeds = np.concatenate([table[p.opening], picture.values, table[text]])
        positions, _ = layout([len(p.opening), picture.grid, len(text)])
        made = vlm._decoder.run(
            {
                "embeds": embeds.astype(np.float32)[None, None],
                "positions": np.ascontiguousarray(positions, np.float32)[:, None, None],
                "prefix": np.zeros((s.layers, 2, 1, s.kv_heads, 0, s.head_dim), np.float32),
                "prefix_lengths": np.zeros(1, np.int64),
                "past": np.zeros((s.layers, 2, 1, s.kv_heads, 1, 0, s.head_dim), np.float32),
                "past_lengths": np.zeros((1, 1), np.int64),
                "logit_positions": np.array([[[len(embeds) - 1]]], np.int64),
            }
        )
        token = int(made["logits"][0, 0, 0].argmax())
        if token == p.stop or len(tokens) == count:
            return Twin(tokens, made["hidden"][0, 0, len(embeds) - len(tokens) :])
        tokens.append(token)


def asking_for(vlm: LocalVlm, family: PromptFamily) -> LocalVlm:
    """The same model, asked in another family's words."""
    other = LocalVlm(vlm.package, vlm._vision, vlm._decoder)
    other.prompts = Prompts(family, vlm.prompts.tokenizer)
    return other


def markers(prompts: Prompts, tokens: Sequence[int], pieces: int) -> Iterator[tuple[str, int]]:
    """Texts of so many tokens in a row whose first place is there, with that place."""
    for begin in range(3, len(tokens) - pieces + 1):
        text = prompts.text(tokens[begin : begin + pieces])
        first = prompts.text(tokens).find(text)
        if (
            text.isascii()
            and text.isprintable()
            and text.strip()
            and first == len(prompts.text(tokens[:begin]))
        ):
            yield text, begin


@pytest.mark.parametrize("pieces", [1, 2, 3])
def test_describing_equals_plain_greedy_writing(
    tiny: LocalVlm, prefixes: list[Prefix], pieces: int
) -> None:
    compared = 0
    for prefix in prefixes:
        twin = naive_greedy(tiny, prefix.tokens, LIMIT)
        found = list(markers(tiny.prompts, twin.tokens, pieces))
        # Whatever the random model writes serves as the end of its description and its answer.
        for (end, begins), (close, closes) in zip(found, found[2 * pieces :], strict=False):
            family = replace(MEIQA, description_end=end, answer_close=close)
            asked = asking_for(tiny, family)
            made = asked.describe(prefix, LIMIT)
            before = asked.prompts.tokenizer.decode(twin.tokens[:begins])
            assert (made.text, made.complete) == (before.strip(), True)
            assert made.key is not None
            wanted = twin.hidden[:begins].mean(axis=0)
            np.testing.assert_allclose(made.key, wanted, atol=1e-4, rtol=0)

            writing = Writing(asked, prefix, asked.prompts.score, 4)
            assert writing.until(end, LIMIT)
            assert [*writing.tokens, writing.next_token] == twin.tokens[: begins + pieces]
            writing.accept()
            assert writing.until(close, LIMIT, begins + pieces - 1)
            assert [*writing.tokens, writing.next_token] == twin.tokens[: closes + pieces]
            compared += 1
    assert compared >= 4


@pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
def test_every_family_asks_everything(
    tiny: LocalVlm, prefixes: list[Prefix], family: PromptFamily
) -> None:
    asked = asking_for(tiny, family)
    (prefix,) = asked.read([prefixes[0].tokens])
    twin = naive_greedy(asked, prefix.tokens, 12)
    made = asked.describe(prefix, 12)
    assert made.text == asked.prompts.tokenizer.decode(twin.tokens).strip()
    assert made.unreadable == (bool(family.answer_open) and made.rating is None)
    assert asked.reflect(prefix, made.text, 3.0, 2.0).key is not None
    assert asked.grade(prefix).sum() == pytest.approx(1.0)
    assert np.isfinite(asked.prefer_first([prefix], [prefixes[1].tokens])).all()
