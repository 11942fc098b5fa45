"""What the model learns to write, and the tokenizer that it writes with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from meiqa.engine.estimates import quality_word
from meiqa.engine.measures import measured_sentence, verdict_sentence
from meiqa.engine.prompts import MEIQA
from meiqa.types import SEVERITIES
from training.data import Photograph
from training.distortions import KINDS, TONES

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
)
PLAIN_TOKENS = ("<think>", "</think>", "<answer>", "</answer>")
VOCABULARY = 768


def distortion_sentence(photograph: Photograph) -> str:
    """What was done to the picture, if that is known."""
    if photograph.kind == 0:
        return ""
    named = (*KINDS, *TONES)[photograph.kind - 1]
    return f"{SEVERITIES[photograph.level - 1]} {named.name}. "


def describe(photograph: Photograph, score: float | None = None) -> str:
    """The description of a picture, with a verdict where its score is known.

    A first description is written before memory and comparisons have spoken: a verdict in it could
    only contradict theirs.
    """
    judged = "" if score is None else verdict_sentence(quality_word(score))
    return f"{distortion_sentence(photograph)}{measured_sentence(photograph.attributes)}{judged}"


def scored_answer(photograph: Photograph) -> str:
    """What the model writes after the score prompt."""
    return (
        f"{describe(photograph)}{MEIQA.description_end}"
        f"{MEIQA.answer_open}{photograph.score:.2f}{MEIQA.answer_close}{MEIQA.stop}"
    )


def reflection_pair(
    photograph: Photograph, other: Photograph, rng: np.random.Generator
) -> tuple[str, str]:
    """Prompt and answer of a reflection.

    The first impression is off: it scores as another picture's score would, and sometimes sees
    that picture's attributes. The corrected description is the true one, with the verdict.
    """
    seen = other if rng.random() < 0.5 else photograph
    mistaken = Photograph(
        photograph.name, other.score, photograph.kind, photograph.level, seen.attributes
    )
    fused = float(np.clip(photograph.score + rng.normal(0, 0.2), 1, 5))
    prompt = MEIQA.reflect.format(summary=describe(mistaken), initial=other.score, score=fused)
    return prompt, f"{describe(photograph, fused)}{MEIQA.description_end}"


def prompt_texts() -> list[str]:
    """Every fixed text of the prompt family."""
    family = MEIQA
    questions = [family.score, family.levels, family.compare]
    reflections = [family.reflect.format(summary="", initial=1.5, score=4.25)]
    return [family.opening, family.second_opening, family.closing, *questions, *reflections]


def train_tokenizer(corpus: Iterable[str]) -> Tokenizer:
    """A byte-level BPE with single digits, so that any text can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(PLAIN_TOKENS),
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in PLAIN_TOKENS])
    return tokenizer


def corpus_of(photographs: Sequence[Photograph]) -> list[str]:
    """The texts that the tokenizer is trained on."""
    levels = [f"{MEIQA.levels}{word}" for word in MEIQA.level_words] * 50
    return [scored_answer(p) for p in photographs] + prompt_texts() * 200 + levels
