"""The tokenizer keeps what the model must answer whole, and loses nothing it learns to write."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer

from meiqa.engine.measures import measure_attributes
from meiqa.engine.prompts import MEIQA, Prompts
from tests.engine.samples import picture
from training.data import Photograph
from training.texts import (
    VOCABULARY,
    corpus_of,
    describe,
    prompt_texts,
    reflection_pair,
    scored_answer,
    train_tokenizer,
)


def photograph(seed: int, score: float, kind: int, level: int) -> Photograph:
    return Photograph(f"{seed}.png", score, kind, level, measure_attributes(picture(seed)))


PHOTOGRAPHS = [
    photograph(0, 1.0, 25, 5),
    photograph(1, 5.0, 0, 0),
    photograph(2, 3.14159, 1, 1),
    photograph(3, 4.6, 0, 0),
]


@pytest.fixture(scope="module", params=[0, len(PHOTOGRAPHS)], ids=["prompts", "photographs"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """Give a tokenizer trained on the prompts alone, or on some answers too."""
    return train_tokenizer(corpus_of(PHOTOGRAPHS[: request.param]))


def test_answers_are_single_tokens(tokenizer: Tokenizer) -> None:
    prompts = Prompts(MEIQA, tokenizer)
    family = prompts.family
    singles = [
        *prompts.level_ids.tolist(),
        *prompts.verdict_ids,
        *prompts.stops,
        prompts.single(family.description_end),
        prompts.single(family.answer_open),
        prompts.single(family.answer_close),
    ]
    assert len(set(singles)) == 5 + 2 + 4
    assert max(singles) < tokenizer.get_vocab_size() <= VOCABULARY


def test_a_grade_word_is_the_token_after_its_question(tokenizer: Tokenizer) -> None:
    prompts = Prompts(MEIQA, tokenizer)
    for word, token in zip(MEIQA.level_words, prompts.level_ids, strict=True):
        wanted = [*prompts.levels.tolist(), token]
        assert prompts.ids(MEIQA.levels + word).tolist() == wanted


@pytest.mark.parametrize("index", range(len(PHOTOGRAPHS)))
def test_what_is_written_survives_the_tokenizer(tokenizer: Tokenizer, index: int) -> None:
    subject, other = PHOTOGRAPHS[index], PHOTOGRAPHS[index - 1]
    rng = np.random.default_rng(index)
    texts = [
        describe(subject, subject.score),
        scored_answer(subject),
        *reflection_pair(subject, other, rng),
        *prompt_texts(),
        "Ünïcode, 3.75 — even what was never seen: 雨",
    ]
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("subject", PHOTOGRAPHS, ids=lambda p: p.name)
def test_an_answer_describes_and_then_rates(subject: Photograph) -> None:
    description, rating = scored_answer(subject).split(MEIQA.description_end)
    assert description == describe(subject)
    assert "Overall" not in description  # the verdict is the fused score's
    assert rating == f"<answer>{subject.score:.2f}</answer><|im_end|>"


def test_a_reflection_corrects_to_the_truth() -> None:
    subject, other = PHOTOGRAPHS[0], PHOTOGRAPHS[1]
    for seed in range(8):
        question, answer = reflection_pair(subject, other, np.random.default_rng(seed))
        assert "Rating 5.00." in question
        assert answer == f"{describe(subject, 1.0)}{MEIQA.description_end}"
