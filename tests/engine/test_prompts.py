"""What the model is asked: tokens, and positions as Qwen2.5-VL gives them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer

from meiqa.engine.package import EnginePackage
from meiqa.engine.prompts import (
    FAMILIES,
    MEIQA,
    PromptFamily,
    Prompts,
    Reply,
    parse_reply,
    positions_of,
    prompt_family,
)
from meiqa.errors import PackageCorrupted, UsageError


def prompts_of(package: EnginePackage, family: PromptFamily) -> Prompts:
    """A family in the tiny model's tokens, and some of its own for answers that it has not."""
    tokenizer = Tokenizer.from_str(package.prompts.tokenizer.to_str())
    if family is FAMILIES["q-sit"]:
        words = (*family.level_words, *family.verdicts)
        tokenizer.add_tokens([AddedToken(word, normalized=False) for word in words])
    return Prompts(family, tokenizer)


def test_positions_by_hand() -> None:
    positions, following = positions_of([2, (2, 3), 1])
    assert positions.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5],
        [0, 1, 2, 2, 2, 3, 3, 3, 5],
        [0, 1, 2, 3, 4, 2, 3, 4, 5],
    ]
    assert following == 6


def test_a_suffix_goes_on_where_its_prefix_ended() -> None:
    whole, following = positions_of([4, (2, 3), 2, (3, 1), 5])
    _, middle = positions_of([4, (2, 3)])
    suffix, end = positions_of([2, (3, 1), 5], middle)
    np.testing.assert_array_equal(suffix, whole[:, 4 + 6 :])
    assert end == following


@pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
def test_every_answer_is_one_token_of_its_own(package: EnginePackage, family: PromptFamily) -> None:
    prompts = prompts_of(package, family)
    ids = [*prompts.level_ids, *prompts.verdict_ids, *prompts.stops]
    assert len(set(ids)) == len(ids)
    words = [prompts.tokenizer.decode([int(token)]).strip() for token in prompts.level_ids]
    assert [*map(str.lower, words)] == ["bad", "poor", "fair", "good", "excellent"]


@pytest.mark.parametrize(
    "changes",
    [
        {"level_words": (" bad", " poor", " fair", " good", " magnificent")},
        {"verdicts": ("12", "2")},
        {"stop": "the end"},
        {"stop": ""},
    ],
    ids=str,
)
def test_an_answer_of_many_tokens_is_refused(
    package: EnginePackage, changes: dict[str, object]
) -> None:
    family = replace(MEIQA, **changes)  # type: ignore[arg-type]
    with pytest.raises(PackageCorrupted, match="not a single token"):
        Prompts(family, package.prompts.tokenizer)


def test_an_answer_that_merges_with_its_question_is_refused(package: EnginePackage) -> None:
    assert package.prompts.single("fair") != package.prompts.single(" fair")
    family = replace(MEIQA, levels="It is ", level_words=("fair", *MEIQA.level_words[1:]))
    with pytest.raises(PackageCorrupted, match=r"merges with the end of its question.*It is fair"):
        Prompts(family, package.prompts.tokenizer)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
def test_pieces_are_the_whole_prompt(package: EnginePackage, family: PromptFamily) -> None:
    prompts, picture = prompts_of(package, family), "<|image_pad|>"
    pad = prompts.single(picture)
    opening = [*prompts.opening, pad, *prompts.closing]
    text = f"{family.opening}{picture}{family.closing}"
    for name in ("score", "levels"):
        whole = prompts.ids(text + getattr(family, name)).tolist()
        assert whole == [*opening, *getattr(prompts, name)]
    reflection = family.reflection("It is dark.", 3.456, 2.1)
    assert prompts.ids(text + reflection).tolist() == [
        *opening,
        *prompts.reflect("It is dark.", 3.456, 2.1),
    ]
    second = f"{family.second_opening}{picture}{family.closing}{family.compare}"
    assert prompts.ids(text + second).tolist() == [
        *opening,
        *prompts.second_opening,
        pad,
        *prompts.closing,
        *prompts.compare,
    ]


@pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
def test_a_prompt_is_a_chat_of_one_user_turn(family: PromptFamily) -> None:
    for question in (family.score, family.levels, family.compare, family.reflect):
        turns = (family.opening + question).split("<|im_start|>")
        assert turns[0] == ""
        roles = [turn.split(maxsplit=1)[0] for turn in turns[1:]]
        assert roles == ["system", "user", "assistant"][-len(roles) :]
        assert all(turn.rstrip("\n").endswith("<|im_end|>") for turn in turns[1:-1])
        assert "<|im_end|>" not in turns[-1]


def test_the_reflection_shows_both_scores(package: EnginePackage) -> None:
    prompts = package.prompts
    text = prompts.tokenizer.decode(prompts.reflect("a dark picture", 3.456, 2.1).tolist())
    assert "a dark picture" in text
    assert "3.46" in text
    assert "2.10" in text


def test_a_family_of_other_fields_is_refused() -> None:
    values = MEIQA.to_dict()
    assert PromptFamily.from_dict(values) == MEIQA
    for changed in ({**values, "colour": "blue"}, {k: v for k, v in values.items() if k != "stop"}):
        with pytest.raises(PackageCorrupted, match="other fields"):
            PromptFamily.from_dict(changed)


def test_the_default_familys_reflection_is_what_it_was_trained_on() -> None:
    values = {"summary": "{score} {", "initial": 3.456, "score": 2.1}
    text = MEIQA.reflection("{score} {", 3.456, 2.1)
    assert text == MEIQA.reflect.format(**values)


@pytest.mark.parametrize("name", [*FAMILIES])
def test_a_family_by_name(name: str) -> None:
    assert prompt_family(name).name == name
    assert PromptFamily.from_dict(json.loads(json.dumps(prompt_family(name).to_dict()))) == (
        prompt_family(name)
    )


def test_what_the_foreign_families_ask() -> None:
    rating, json_rating = FAMILIES["visualquality-r1"], FAMILIES["q-insight"]
    for fact in ("from 1 to 5", "two decimals", "<think> </think>", "<answer> </answer>"):
        assert fact in rating.score
    assert '{"rating": number}' in json_rating.score
    assert "<think> </think>" in json_rating.opening
    assert FAMILIES["evoquality"].score == rating.score
    assert FAMILIES["evoquality"].verdicts == ("0", "1")
    assert not FAMILIES["levels"].answer_open
    assert FAMILIES["q-sit"].levels.endswith("assistant\nThe quality of this image is")
    assert FAMILIES["q-sit"].level_words == (" Bad", " Poor", " Fair", " Good", " Excellent")


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(UsageError, match=r"unknown prompt family; got qalign; .*q-insight.*json"):
        prompt_family("qalign")


def write(path: Path, values: object) -> str:
    path.write_text(json.dumps(values), encoding="utf-8")
    return str(path)


def test_a_family_from_a_file(tmp_path: Path) -> None:
    braces = 'As {"a": {}} } {0}: {summary}{initial:.1f}, {score}'
    wanted = replace(
        MEIQA, name="mine", score='Give {"rating": n} {', reflect=braces, verdicts=("0", "1")
    )
    family = prompt_family(write(tmp_path / "mine.json", wanted.to_dict()))
    assert family == wanted
    assert family.reflection("{score}", 3.456, 2.5) == 'As {"a": {}} } {0}: {score}3.5, 2.5'


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown field": ({"colour": "blue"}, "other fields.*unknown colour"),
    "number": ({"score": 3}, "needs a text as score; got 3"),
    "lone surrogate": ({"score": "\ud800"}, "needs a text as score"),
    "empty": ({"stop": ""}, "empty stop"),
    "four words": ({"level_words": ["a", "b", "c", "d"]}, "needs 5 different texts as level_words"),
    "words in a row": ({"level_words": "abcde"}, "needs 5 different texts as level_words"),
    "a nested word": ({"level_words": ["a", "b", "c", "d", []]}, "needs 5 different texts"),
    "same verdicts": ({"verdicts": ["1", "1"]}, "needs 2 different texts as verdicts"),
    "half an answer": ({"answer_close": ""}, "both answer_open and answer_close"),
    "typing error": ({"reflect": "{sumary} {initial} {score}"}, "no placeholder {sumary}"),
    "no score": ({"reflect": "{summary} {initial}"}, r"got no {score}"),
    "no limit": ({"summary_tokens": 0}, "a whole number from 1 up as summary_tokens"),
    "limit as text": ({"summary_tokens": "96"}, "a whole number from 1 up"),
    "wrong format": ({"reflect": "{summary:.2f} {initial} {score}"}, "wrong format in reflect"),
}


@pytest.mark.parametrize(("changes", "said"), FAULTS.values(), ids=list(FAULTS))
def test_a_file_that_is_no_family_is_refused(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    path = write(tmp_path / "mine.json", {**MEIQA.to_dict(), **changes})
    with pytest.raises(UsageError, match=said) as caught:
        prompt_family(path)
    assert str(caught.value).startswith(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(PackageCorrupted, match=said):
        PromptFamily.from_dict({**MEIQA.to_dict(), **changes})


def test_a_file_without_a_field_is_refused(tmp_path: Path) -> None:
    values = {name: value for name, value in MEIQA.to_dict().items() if name != "stop"}
    with pytest.raises(UsageError, match=r"other fields.*no stop"):
        prompt_family(write(tmp_path / "mine.json", values))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[]", "not a JSON object; got list"),
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (None, "cannot be read; got No such file"),
    ],
    ids=str,
)
def test_a_file_that_is_no_object_is_refused(
    tmp_path: Path, content: bytes | None, said: str
) -> None:
    path = tmp_path / "mine.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=said):
        prompt_family(str(path))


RATED, GRADED = FAMILIES["visualquality-r1"], FAMILIES["levels"]


@pytest.mark.parametrize(
    ("text", "cut", "wanted"),
    [
        ("Soft.</think>\n<answer>3.25</answer>", False, Reply("Soft.", 3.25, True, True)),
        ("Soft.</think><answer>3.2", True, Reply("Soft.", None, True, True)),
        ("Soft.</think><answer>3.2", False, Reply("Soft.", 3.2, True, True)),
        ("Soft.</think><answer>3.2</answer><answer>4", True, Reply("Soft.", None, True, True)),
        (" Soft. ", True, Reply("Soft.", None, False, False)),
        (" Soft. ", False, Reply("Soft.", None, False, True)),
        ("Soft. <answer>4.5</answer>", False, Reply("Soft.", 4.5, False, True)),
        ("Soft. <answer>4.5", True, Reply("Soft. <answer>4.5", None, False, False)),
        ("<answer>2</answer>", False, Reply("<answer>2</answer>", 2.0, False, True)),
        ("Soft.</think><answer>7</answer>", False, Reply("Soft.", None, True, True)),
        ("Soft.</think>3.5", False, Reply("Soft.", None, True, True)),
        ('S</think><answer>{"rating": 1.5}</answer>', False, Reply("S", 1.5, True, True)),
        ("", False, Reply("", None, False, True)),
    ],
)
def test_a_reply_is_taken_apart(text: str, cut: bool, wanted: Reply) -> None:
    assert parse_reply(text, RATED, cut=cut) == wanted


@pytest.mark.parametrize(
    ("answer", "rating"),
    [
        ("3,25", 3.25),
        ("+3.5", 3.5),
        ("-2", None),
        ("\u22122.5", None),
        ("Picture 1: 3.25", 3.25),
        ("Picture 1 has 3.25.", 3.25),
        ("1. 4,5", 4.5),
        ("On a scale from 1 to 5: 4", 4.0),
        ("4/5", 4.0),
        ("3.5 out of 5", 3.5),
        ("**Rating:** 2", 2.0),
        ('{"rating": "3,75", "confidence": 0.5}', 3.75),
        ("3.25 (3.25)", 3.25),
        ("Picture 1 is good, picture 2 too", None),
        ("12", None),
        ("3x", None),
    ],
)
def test_the_number_that_is_meant_is_the_rating(answer: str, rating: float | None) -> None:
    reply = parse_reply(f"Soft.</think><answer>{answer}</answer>", RATED, cut=False)
    assert reply.rating == rating


def test_a_comma_at_a_cut_ends_no_rating() -> None:
    assert parse_reply("Soft.</think><answer>3,", RATED, cut=True).rating is None
    assert parse_reply("Soft.</think><answer>3,2", RATED, cut=True).rating is None


@pytest.mark.parametrize("cut", [True, False])
def test_no_rating_is_read_where_none_is_asked_for(cut: bool) -> None:
    found = parse_reply("Soft. 4.5", GRADED, cut=cut)
    assert found == Reply("Soft. 4.5", None, marked=False, complete=not cut)
    assert parse_reply("Soft.<|im_end|>", GRADED, cut=cut) == Reply("Soft.", None, True, True)
