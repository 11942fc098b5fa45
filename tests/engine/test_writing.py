"""Descriptions and ratings: what is read from greedy writing, and where writing is helped on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from meiqa.engine.estimates import quality_word
from meiqa.engine.model import ANSWER_TOKENS, RATING_TOKENS
from meiqa.engine.prompts import FAMILIES, Prompts
from meiqa.engine.writing import PAST_STEP
from tests.engine.scripted import PREFIX, QWEN, ScriptedDecoder, ids_of, key_of, scripted, told


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
    assert made.description.stats.complete
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
    assert made.description.stats.tokens == len(ids_of(text)) - 1


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
    assert unmarked.forced == "</think>\n<answer>"


@pytest.mark.parametrize(
    "answer", ["", "3.45", "<answer></answer>", "<answer>good</answer>", "<answer>good"]
)
def test_without_a_number_the_answer_is_opened_once_more(answer: str) -> None:
    made = told(f"It is soft.</think>\n{answer}", forced="2.25</answer>")
    assert made.forced == "<answer>"
    assert (made.description.rating, made.description.unreadable) == (2.25, False)
    assert made.description.text == "It is soft."
    assert made.description.stats.complete


@pytest.mark.parametrize("forced", ["good</answer>3", "", "</answer>3"])
def test_without_a_number_twice_there_is_no_rating(forced: str) -> None:
    made = told("It is soft.</think><answer>good</answer>", forced=forced)
    assert (made.description.rating, made.description.unreadable) == (None, True)


def test_a_turn_that_ends_without_the_marker() -> None:
    made = told("It is soft.", forced="2.25</answer>")
    assert made.forced == "</think>\n<answer>"
    assert (made.description.text, made.description.rating) == ("It is soft.", 2.25)
    assert made.description.stats.complete


def test_an_answer_without_the_end_of_the_description() -> None:
    made = told(["It is soft", "<", "answer", ">3.45</answer>"])
    assert (made.description.text, made.description.rating) == ("It is soft", 3.45)
    np.testing.assert_allclose(made.description.key, key_of("It is soft"), rtol=1e-6)
    assert not made.decoder.forced


def test_a_turn_that_ends_at_once() -> None:
    made = told("", forced="2.25</answer>")
    assert (made.description.text, made.description.key) == ("", None)
    assert (made.description.rating, made.description.stats.complete) == (2.25, True)


def test_an_empty_description() -> None:
    made = told("</think>\n<answer>3.45</answer>")
    assert (made.description.text, made.description.key) == ("", None)
    assert made.description.rating == 3.45
    assert not made.decoder.forced


def test_the_limit_cuts_a_description_and_opens_the_answer() -> None:
    words = ["It", " is", " soft", " and", " dark", " and", " more"]
    made = told(words, forced="2.25</answer>", limit=len(ids_of(words[:4])))
    assert made.description.text == "It is soft and"
    assert made.forced == "</think>\n<answer>"
    assert (made.description.rating, made.description.stats.complete) == (2.25, False)
    np.testing.assert_allclose(made.description.key, key_of(words[:4]), rtol=1e-6)


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_a_marker_begun_within_the_limit_is_completed(kept: int) -> None:
    words = ["It", " is", "</", "think", ">", "<answer>3.45</answer>"]
    made = told(words, limit=len(ids_of(words[: 2 + kept])))
    assert (made.description.text, made.description.stats.complete) == ("It is", True)
    assert made.description.rating == 3.45


def test_what_only_looks_like_a_marker_at_the_limit_is_text() -> None:
    words = ["It", " is", "</", "dark", " and", " more"]
    made = told(words, forced="1.00</answer>", limit=len(ids_of(words[:2])))
    assert (made.description.text, made.description.stats.complete) == ("It is</", False)
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
    assert made.description.stats.complete


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
    assert made.description.stats.complete
    assert not made.decoder.forced
    cut = told(["It", " is", " soft"], family=family, limit=1)
    assert (cut.description.text, cut.description.stats.complete) == ("It", False)
    assert not cut.decoder.forced


def test_a_reflection_ends_where_its_description_does() -> None:
    decoder = ScriptedDecoder(ids_of("It is dark.</think>\n<answer>3.45"), [0])
    written = scripted(decoder).reflect(PREFIX, "It is soft.", 3.0, 2.0)
    assert (written.text, written.rating, written.unreadable) == ("It is dark.", None, False)
    assert written.stats.complete
    assert len(decoder.scripts) == 2
    np.testing.assert_allclose(written.key, key_of("It is dark"), rtol=1e-6)


class After:
    """A stop rule that says so after so many looks."""

    def __init__(self, looks: int) -> None:
        self.looks = looks

    def __call__(self) -> bool:
        self.looks -= 1
        return self.looks < 0


def test_a_description_ends_where_the_rule_says_so() -> None:
    """As at the limit: the answer is asked for, however little time there is."""
    words = ["It", " is", " soft", " and", " dark", " and", " more"]
    after = [QWEN.token_to_id("<|im_end|>")] * 2
    decoder = ScriptedDecoder(ids_of(words) + after, ids_of("2.25</answer>") + after)
    made = scripted(decoder).describe(PREFIX, 40, stop=After(len(ids_of(words[:4]))))
    assert (made.text, made.rating, made.stats.complete) == ("It is soft and", 2.25, False)
    assert QWEN.decode(decoder.forced) == "</think>\n<answer>"


MEASURED = "The picture is dark, with some noise."
TOLD = " dark, with some noise."


def test_what_was_measured_is_told_to_the_model() -> None:
    begun, rest = "It is soft. The picture is", "</think><answer>3.45</answer>"
    made = told(begun, rest, measured=MEASURED)
    assert (made.description.text, made.description.rating) == (f"It is soft. {MEASURED}", 3.45)
    assert made.forced == TOLD
    np.testing.assert_allclose(made.description.key, key_of([begun, TOLD]), rtol=1e-6)
    # What is told takes one call, and is no token that the model wrote.
    assert made.description.stats.tokens == len(ids_of([begun, rest])) - 1
    assert made.description.stats.calls == made.description.stats.tokens + 2


def test_what_is_told_does_not_count_against_the_limit() -> None:
    begun = "The picture is"
    made = told(
        begun, "</think><answer>3.45</answer>", limit=len(ids_of(begun)) + 4, measured=MEASURED
    )
    assert (made.description.text, made.description.stats.complete) == (MEASURED, True)
    assert made.description.rating == 3.45


def test_a_limit_before_what_was_measured_cuts_the_text() -> None:
    made = told("It is soft. The picture is", "2.25</answer>", limit=3, measured=MEASURED)
    assert made.forced == "</think>\n<answer>"
    assert MEASURED not in made.description.text
    assert not made.description.stats.complete


def test_a_text_is_looked_through_only_where_something_is_to_be_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks, text = list[int](), Prompts.text

    def looked(own: Prompts, ids: Sequence[int]) -> str:
        looks.append(len(ids))
        return text(own, ids)

    monkeypatch.setattr(Prompts, "text", looked)
    written = "It is soft.</think><answer>3.45</answer>"
    told(written, measured=MEASURED)
    something = len(looks)
    told(written)
    assert len(looks) - something < something


def test_it_is_told_once_and_only_where_the_model_comes_to_it() -> None:
    twice = "The picture is here. The picture is</think><answer>3.45</answer>"
    assert told("The picture is", twice, measured=MEASURED).description.text == (
        f"{MEASURED}The picture is here. The picture is"
    )
    other = told("It is soft.</think><answer>3.45</answer>", measured=MEASURED)
    assert (other.description.text, other.forced) == ("It is soft.", "")
    unmeasured = told("The picture is soft.</think><answer>3.45</answer>")
    assert (unmeasured.description.text, unmeasured.forced) == ("The picture is soft.", "")


@pytest.mark.parametrize("score", [1.0, 2.49, 2.51, 3.5, 4.9])
def test_the_verdict_of_a_reflection_is_the_word_of_its_score(score: float) -> None:
    after = [QWEN.token_to_id("<|im_end|>")] * 2
    decoder = ScriptedDecoder(ids_of("The picture is") + after, ids_of("</think>") + after)
    prefix = replace(PREFIX, tokens=replace(PREFIX.tokens, measured=MEASURED))
    made = scripted(decoder).reflect(prefix, "It is soft. Overall bad quality.", 3.0, score)
    assert made.text == f"{MEASURED} Overall {quality_word(score)} quality."
