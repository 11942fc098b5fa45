"""Prompts, replies and options in the tokens of Qwen's checkpoints."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from meiqa.engine.model import Description, Draft
from meiqa.engine.prompts import FAMILIES, PromptFamily, Prompts
from meiqa.errors import UsageError
from tests.engine import qwen
from tests.engine.scripted import PREFIX, RATED, ScriptedDecoder, ids_of, scripted

FOREIGN = [family for family in FAMILIES.values() if family.name != "meiqa"]
BETWEEN = ("", "\n", "\n\n", " ")
ENDS = ("<|endoftext|>",)


@cache
def made(name: str) -> Tokenizer:
    return qwen.small() if name == "small" else qwen.real(think=name == "qwen3")


@pytest.fixture(params=["small", "qwen2.5", "qwen3"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return made(request.param)


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer.decode([token]) for token in ids_of(text, tokenizer)]


def test_the_small_tokenizer_parts_texts_as_the_real_one() -> None:
    small, real = made("small"), made("qwen2.5")
    for text in (
        *(f"It is soft.{after}" for after in ("</think><answer>3.25</answer>", "\n</think>\n\n")),
        *("</think>\n<answer>\n3,25\n</answer><|im_end|>", " excellent yes", "Picture 1 2 0"),
        "<|im_start|>assistant\n<think>\n",
    ):
        assert pieces(small, text) == pieces(real, text)


@pytest.mark.parametrize("family", FOREIGN, ids=lambda family: str(family.name))
def test_every_family_can_be_asked(tokenizer: Tokenizer, family: PromptFamily) -> None:
    prompts = Prompts(family, tokenizer, ENDS)
    assert [tokenizer.decode([token]) for token in prompts.level_ids] == [*family.level_words]
    assert tuple(tokenizer.decode([token]) for token in prompts.verdict_ids) == family.verdicts
    assert len(prompts.stops) == 2


def test_digits_are_tokens_of_their_own_and_so_are_spaces_before_them(tokenizer: Tokenizer) -> None:
    assert pieces(tokenizer, "3.25</answer>")[:4] == ["3", ".", "2", "5"]
    assert pieces(tokenizer, " 1") == [" ", "1"]
    first, second = Prompts(RATED, tokenizer).options("Picture", (" 1", " 2")).steps
    assert [tokenizer.decode([token]) for token in first.ids] == [" ", " "]
    assert [tokenizer.decode([token]) for token in second.ids] == ["1", "2"]


def written(
    tokenizer: Tokenizer,
    free: str,
    forced: str = "",
    drafts: tuple[Draft, ...] = (),
    end: str = "<|im_end|>",
    limit: int = 40,
) -> tuple[Description, str]:
    """What a model makes that writes `free`, and `forced` once a text is forced on it."""
    after = [tokenizer.token_to_id(end)] * 2
    texts = (ids_of(free, tokenizer) + after, ids_of(forced, tokenizer) + after)
    decoder = ScriptedDecoder(*texts, tokenizer)
    model = scripted(decoder, RATED, tokenizer, ENDS)
    described = model.describe(PREFIX, limit, drafts)
    return described, tokenizer.decode(decoder.forced, skip_special_tokens=False)


@pytest.mark.parametrize("inner", ["", "\n"])
@pytest.mark.parametrize("between", BETWEEN)
def test_line_breaks_around_tags_change_nothing(
    tokenizer: Tokenizer, between: str, inner: str
) -> None:
    text = f"It is soft.{inner}</think>{between}<answer>{inner}3.25{inner}</answer>"
    found, forced = written(tokenizer, text)
    assert (found.text, found.rating, forced) == ("It is soft.", 3.25, "")


@pytest.mark.parametrize("between", ["", "\n"])
def test_drafts_hold_across_tags_that_merge(tokenizer: Tokenizer, between: str) -> None:
    text = f"It is soft and dark.</think>{between}<answer>3.25</answer>"
    drafts = (Draft("It is soft and dark.", 3.25),)
    found, _ = written(tokenizer, text, drafts=drafts)
    assert found.stats.calls <= 4
    assert found.stats.calls + found.stats.accepted == written(tokenizer, text)[0].stats.calls


def test_what_is_forced_shares_no_token_with_what_the_model_wrote(tokenizer: Tokenizer) -> None:
    found, forced = written(tokenizer, "It is soft and dark", "3.25</answer>", limit=4)
    assert (found.rating, found.stats.complete) == (3.25, False)
    assert forced.replace("\n", "") == "</think><answer>"
    assert "><" not in pieces(tokenizer, forced)


def test_drafts_hold_behind_what_is_forced(tokenizer: Tokenizer) -> None:
    drafts = (Draft("It is soft and dark", 3.25),)
    found, _ = written(tokenizer, "It is soft", "3.25</answer>", drafts, limit=4)
    plain, _ = written(tokenizer, "It is soft", "3.25</answer>", limit=4)
    assert found.rating == plain.rating == 3.25
    assert found.stats.calls <= 4
    assert plain.stats.calls >= 9


@pytest.mark.parametrize("end", ["<|im_end|>", "<|endoftext|>"])
def test_any_of_the_stop_tokens_ends_a_turn(tokenizer: Tokenizer, end: str) -> None:
    found, forced = written(tokenizer, "It is soft.", "2.25</answer>", end=end)
    assert (found.text, found.rating, found.stats.complete) == ("It is soft.", 2.25, True)
    assert forced.endswith("<answer>")


def test_options_that_merge_with_the_reply_are_refused(tokenizer: Tokenizer) -> None:
    prompts = Prompts(RATED, tokenizer)
    text = f"Is it soft?{RATED.reply}"
    assert len(prompts.options(text, ("yes", "no", "1")).steps) == 1
    with pytest.raises(UsageError, match="merges"):
        prompts.options(text, ("yes", "\nno"))


def test_a_prompt_is_what_the_chat_template_makes() -> None:
    jinja2 = pytest.importorskip("jinja2", reason="templates are Jinja's")
    made("qwen3")  # or skip
    assert qwen.REAL is not None
    config = json.loads(Path(qwen.REAL, "tokenizer_config.json").read_text(encoding="utf-8"))
    template = jinja2.Environment().from_string(config["chat_template"])
    for family in FOREIGN:
        picture = "<|vision_start|><|image_pad|><|vision_end|>"
        text = f"{family.opening}<|image_pad|>{family.closing}{family.levels}"
        system, _, rest = text.removeprefix("<|im_start|>system\n").partition("<|im_end|>\n")
        user = rest.removeprefix("<|im_start|>user\n").partition("<|im_end|>")[0]
        assert user.startswith(f"Picture 1: {picture}")
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        rendered = template.render(messages=messages, add_generation_prompt=True)
        assert text.startswith(rendered)
