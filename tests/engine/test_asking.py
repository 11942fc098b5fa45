"""Options as replies to a question, over one prefix: as probable as each is alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest

from meiqa import Engine, Question, UsageError
from meiqa.engine.images import fit_to_grid, load_pixels
from meiqa.engine.local import LocalModel
from meiqa.engine.model import VisualTokens
from meiqa.engine.prompts import FAMILIES, MEIQA, PromptFamily, Prompts
from meiqa.locations import embedded_assets
from tests.engine.cold import Piece, read_anew
from tests.engine.samples import picture

TOLERANCE = 1e-4
OPTIONS = ("yes", "no", "no, it is sharp", "no, it is dark and noisy", " perhaps", "1")
PHOTO, OTHERS = picture(0, (160, 224)), [picture(1, (128, 128)), picture(2, (70, 330))]


@pytest.fixture(params=[name for name in FAMILIES if name != "q-sit"])  # whose words it has not
def family(request: pytest.FixtureRequest) -> PromptFamily:
    return FAMILIES[request.param]


@pytest.fixture
def asked(engine: Engine, family: PromptFamily) -> Iterator[Engine]:
    """Give the engine of the tiny model with a prompt family."""
    model = engine.model
    assert isinstance(model, LocalModel)
    before = model.prompts, model.family
    model.prompts, model.family = Prompts(family, model.prompts.tokenizer), family
    engine.forget_photos()
    yield engine
    model.prompts, model.family = before
    engine.forget_photos()


def tokens_of(model: LocalModel, photo: np.ndarray) -> VisualTokens:
    return model.encode(fit_to_grid(load_pixels(photo), model.image))


def alone(model: LocalModel, question: Question, option: str) -> float:
    """Log-probability of an option from a prompt that is read anew for each of its tokens."""
    p, family = model.prompts, model.family
    pieces: list[Piece] = [p.opening, tokens_of(model, PHOTO), p.closing]
    if question.second is not None:
        second = tokens_of(model, cast(Any, question.second))
        pieces += [p.second_opening, second, p.closing]
    text = question.text + family.reply + question.reply
    before, whole = p.ids(text), p.ids(text + option)
    total = 0.0
    for count in range(len(before), len(whole)):
        logits = read_anew(model, [*pieces, whole[:count]]).logits[0].astype(np.float64)
        total += logits[whole[count]] - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
    return total


def questions() -> list[Question]:
    return [
        Question("Is it blurred?", OPTIONS),
        Question("Is the first brighter?", OPTIONS[:3], second=OTHERS[0]),
        Question("Is the first brighter?", OPTIONS[:3], second=OTHERS[1]),
        Question("How is it?", [" bad", " very good"], reply="The picture is"),
    ]


def test_many_questions_are_answered_as_each_option_is_alone(asked: Engine) -> None:
    model = asked.model
    assert isinstance(model, LocalModel)
    answers = asked.options_many(PHOTO, questions())
    for question, answer in zip(questions(), answers, strict=True):
        for option in question.options:
            assert answer.logprobs[option] == pytest.approx(
                alone(model, question, option), abs=TOLERANCE
            )
        weights = np.exp([*answer.logprobs.values()])
        assert [*answer.probabilities.values()] == pytest.approx(weights / weights.sum(), abs=1e-9)
        (by_itself,) = asked.options_many(PHOTO, [question])
        assert by_itself.logprobs == pytest.approx(answer.logprobs, abs=TOLERANCE)


def test_the_familys_own_questions_are_questions_like_others(asked: Engine) -> None:
    model, family = asked.model, asked.model.family
    assert isinstance(model, LocalModel)
    prefix, _ = asked.scorer.prefill(load_pixels(PHOTO))
    text, reply = family.levels.split(family.reply)
    grades = asked.options(PHOTO, text, family.level_words, reply=reply)
    assert [*grades.probabilities.values()] == pytest.approx(model.grade(prefix), abs=1e-6)
    text, reply = family.compare.split(family.reply)
    verdict = asked.options(PHOTO, text, family.verdicts, second=OTHERS[0], reply=reply)
    logit = model.prefer_first([prefix], [tokens_of(model, OTHERS[0])])[0]
    assert verdict.probabilities[family.verdicts[0]] == pytest.approx(
        1 / (1 + math.exp(-logit)), abs=1e-6
    )


@pytest.fixture(scope="module")
def embedded() -> Iterator[Engine]:
    with Engine.open(memory=embedded_assets() / "memory", threads=1, learn=False) as engine:
        yield engine


def test_company_changes_nothing_on_the_native_kernel(embedded: Engine) -> None:
    many = embedded.options_many(PHOTO, questions())
    for question, answer in zip(questions(), many, strict=True):
        for option in question.options:
            single = embedded.options_many(PHOTO, [replace(question, options=[option])])[0]
            assert single.logprobs[option] == pytest.approx(answer.logprobs[option], abs=TOLERANCE)


def test_a_photo_is_read_once_for_all_questions(engine: Engine) -> None:
    engine.forget_photos()
    before = engine.caches()["photos"].misses
    for _ in range(3):
        engine.options_many(PHOTO, questions())
    assert engine.caches()["photos"].misses == before + 1


def test_an_option_that_begins_another_is_at_least_as_probable(engine: Engine) -> None:
    whole = "no<|im_end|>"
    found = engine.options(PHOTO, "Is it blurred?", ["no", "no, it is sharp", whole])
    assert found.best == "no"
    assert found.logprobs["no"] > max(found.logprobs["no, it is sharp"], found.logprobs[whole])


@pytest.mark.parametrize(
    ("question", "options", "said"),
    [
        ("", ["yes"], "a question has a text"),
        ("Why?", [], r"has options, each once; got none"),
        ("Why?", ["yes", "yes"], "each once; got yes, yes"),
        ("Why?", "yes", "a list of texts; got 'yes'"),
        ("Why?", ["yes", ""], "an option is empty, or merges"),
        ("Is it?<|im_end|>", ["yes"], r"only the prompt family may set; got <\|im_end\|>"),
    ],
)
def test_questions_without_sense_are_refused(
    engine: Engine, question: str, options: Any, said: str
) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        engine.options(PHOTO, question, options)
    assert "\n" not in str(caught.value)


def test_an_option_that_merges_with_its_question_is_refused(engine: Engine) -> None:
    with pytest.raises(UsageError, match=r"merges with what stands before it.*'.*It is fair'"):
        engine.options(PHOTO, "How is it?", ["fair"], reply="It is ")


def test_a_family_that_shows_no_reply_is_refused() -> None:
    family = replace(MEIQA, compare="Which looks better, 1 or 2? ")
    with pytest.raises(UsageError, match=r"does not show where a question ends.*im_end"):
        family.reply  # noqa: B018


def test_replies_of_the_families() -> None:
    replies = {name: family.reply for name, family in FAMILIES.items()}
    assert replies.pop("q-sit") == "<|im_end|><|im_start|>assistant\n"
    assert {*replies.values()} == {"<|im_end|>\n<|im_start|>assistant\n"}
