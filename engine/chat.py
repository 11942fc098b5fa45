"""A prompt family's texts as the messages of a chat completion, and what is asked of it.

Families are written as the model reads them, in the turns of ChatML with vision markers (Qwen). A
server puts these marks around messages itself; so the texts are taken apart into the messages that
it puts together again. The beginning of the reply, with which most questions of a family end, is
sent as an unfinished turn of the assistant (`continue_final_message`, in vLLM and SGLang).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from meiqa.engine.prompts import PromptFamily
from meiqa.errors import UsageError

__all__ = ["Message", "about_one", "about_two", "chat", "unmarked"]

Message = dict[str, Any]

_TURN = re.compile(r"<\|im_start\|>(system|user|assistant)\n(.*?)(<\|im_end\|>\n?|\Z)", re.DOTALL)
_PICTURE = re.compile(r"<\|vision_start\|>\0(\d)\0<\|vision_end\|>")
_MARKS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "\0")
_FIRST, _SECOND = "\x000\x00", "\x001\x00"


def about_one(family: PromptFamily, question: str) -> str:
    """What a model reads when it is asked about one picture, which stands as a mark."""
    return f"{family.opening}{_FIRST}{family.closing}{question}"


def about_two(family: PromptFamily) -> str:
    """What a model reads when it is asked which of two pictures looks better."""
    second = f"{family.second_opening}{_SECOND}{family.closing}"
    return f"{family.opening}{_FIRST}{family.closing}{second}{family.compare}"


def chat(text: str, pictures: Sequence[str], written: str = "") -> dict[str, Any]:
    """The messages of a text, with what says how its last turn is to be gone on with.

    Args:
        text: of `about_one` or `about_two`.
        pictures: data URIs of its pictures.
        written: what of the reply is there already.

    Raises:
        UsageError: the text does not consist of turns in ChatML that end in the assistant's.
    """
    turns = list(_TURN.finditer(text))
    whole = "".join(turn[0] for turn in turns) == text
    if not whole or not turns or turns[-1][1] != "assistant" or turns[-1][3]:
        raise UsageError(
            "the prompt family cannot be asked of a server",
            seen=repr(text[:60]),
            allowed="turns in ChatML, <|im_start|>role … <|im_end|>, the assistant's last",
        )
    messages = [_message(turn[1], turn[2], pictures) for turn in turns[:-1]]
    reply = turns[-1][2] + written
    if not reply:
        return {"messages": messages, "add_generation_prompt": True}
    messages.append({"role": "assistant", "content": _plain(reply)})
    return {
        "messages": messages,
        "add_generation_prompt": False,
        "continue_final_message": True,
    }


def _message(role: str, text: str, pictures: Sequence[str]) -> Message:
    pieces = _PICTURE.split(text)  # text and numbers of pictures by turns
    if len(pieces) == 1:
        return {"role": role, "content": _plain(text)}
    content: list[dict[str, Any]] = []
    for place, piece in enumerate(pieces):
        if place % 2:
            content.append({"type": "image_url", "image_url": {"url": pictures[int(piece)]}})
        elif piece:
            content.append({"type": "text", "text": _plain(piece)})
    return {"role": role, "content": content}


def _plain(text: str) -> str:
    """A text without marks, which only a server may set.

    Raises:
        UsageError: there is one.
    """
    if found := [mark for mark in _MARKS if mark in text]:
        raise UsageError(
            "the prompt family cannot be asked of a server",
            seen=f"{found[0]!r} within a message",
            allowed="vision markers directly around pictures, and no others",
        )
    return text


def unmarked(text: str) -> str:
    """What a model wrote, without marks that it should not have written."""
    for mark in _MARKS:
        text = text.replace(mark, "")
    return text
