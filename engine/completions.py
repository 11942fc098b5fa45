"""A model behind a server that speaks OpenAI's chat completions: messages, requests, answers.

Prompt families are written as the model reads them, in the turns of ChatML with vision markers
(Qwen). A server puts these marks around messages itself; so the texts are taken apart into
messages. The beginning of the reply, with which most questions end, is sent as an unfinished turn
of the assistant (`continue_final_message`, in vLLM and SGLang).
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
import os
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from meiqa.engine.prompts import PromptFamily
from meiqa.errors import (
    AccessDenied,
    Overloaded,
    ServiceError,
    ServiceUnreachable,
    UsageError,
    install_hint,
)

if TYPE_CHECKING:
    import httpx

LOG = logging.getLogger(__name__)

API_KEY = "MEIQA_REMOTE_API_KEY"
"""The environment variable that holds the key; there is no other way to give one."""
CONNECT_S, ANSWER_S = 10.0, 120.0
ATTEMPTS = 5
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
CONCURRENT = 8
TOP_LOGPROBS = 20
"""The most that OpenAI's protocol, and vLLM unless told otherwise, give."""
TEXT_KEY = "hashed-words-1"
"""Name of the method of `text_key`: another would make another memory."""
TEXT_KEY_WIDTH = 512
_BUSY = (408, 425, 429, 500, 502, 503, 504)
_TURN = re.compile(r"<\|im_start\|>(system|user|assistant)\n(.*?)(<\|im_end\|>\n?|\Z)", re.DOTALL)
_PICTURE = re.compile(r"<\|vision_start\|>\0(\d)\0<\|vision_end\|>")
_MARKS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "\0")
_FIRST, _SECOND = "\x000\x00", "\x001\x00"
_WORD = re.compile(r"\w+")


def about_one(family: PromptFamily, question: str) -> str:
    """Give what a model reads that is asked about one picture, which stands as a mark."""
    return f"{family.opening}{_FIRST}{family.closing}{question}"


def about_two(family: PromptFamily, question: str) -> str:
    """Give what a model reads that is asked about two pictures."""
    return about_one(family, f"{family.second_opening}{_SECOND}{family.closing}{question}")


def chat(text: str, pictures: Sequence[str], written: str = "") -> dict[str, Any]:
    """Give the messages of a text, with what says how its last turn is to be gone on with.

    Args:
        text: of `about_one` or `about_two`; UsageError if it is not ChatML up to the reply.
        pictures: data URIs of its pictures.
        written: what of the reply is there already.
    """
    turns = list(_TURN.finditer(text))
    whole = "".join(turn[0] for turn in turns) == text
    if not whole or not turns or turns[-1][1] != "assistant" or turns[-1][3]:
        raise UsageError(
            "the prompt family cannot be asked of a server",
            seen=repr(text[:60]),
            allowed="turns in ChatML, <|im_start|>role … <|im_end|>, the assistant's last",
        )
    messages = [{"role": t[1], "content": _content(t[2], pictures)} for t in turns[:-1]]
    reply = turns[-1][2] + written
    if not reply:
        return {"messages": messages, "add_generation_prompt": True}
    messages.append({"role": "assistant", "content": _plain(reply)})
    unfinished = {"add_generation_prompt": False, "continue_final_message": True}
    return {"messages": messages, **unfinished}


def _content(text: str, pictures: Sequence[str]) -> str | list[dict[str, Any]]:
    pieces = _PICTURE.split(text)  # text and numbers of pictures by turns
    if len(pieces) == 1:
        return _plain(text)
    content: list[dict[str, Any]] = []
    for place, piece in enumerate(pieces):
        if place % 2:
            content.append({"type": "image_url", "image_url": {"url": pictures[int(piece)]}})
        elif piece:
            content.append({"type": "text", "text": _plain(piece)})
    return content


def _plain(text: str) -> str:
    """Refuse marks, which only a server may set."""
    if found := [mark for mark in _MARKS if mark in text]:
        raise UsageError(
            "the prompt family cannot be asked of a server",
            seen=f"{found[0]!r} within a message",
            allowed="vision markers directly around pictures, and no others",
        )
    return text


def unmarked(text: str) -> str:
    """Take out marks that a model should not have written."""
    for mark in _MARKS:
        text = text.replace(mark, "")
    return text


def text_key(text: str) -> NDArray[np.float32] | None:
    """Give the direction of a text (512,), the same everywhere; None where it has no words.

    Each word, in lower case, and each pair of words in a row adds 1 + ln(times it occurs) to the
    element that its BLAKE2b hash names, or takes as much away, as the hash's next bit says: so the
    words that share an element cancel on average (Weinberger et al., "Feature Hashing for Large
    Scale Multitask Learning", 2009).

    >>> bool((text_key("Sharp. Well exposed.") == text_key("sharp, well EXPOSED")).all())
    True
    """
    words = _WORD.findall(text.lower())
    terms = Counter(words) + Counter(map(" ".join, itertools.pairwise(words)))
    key = np.zeros(TEXT_KEY_WIDTH, np.float64)
    for term, times in terms.items():
        number = int.from_bytes(hashlib.blake2b(term.encode(), digest_size=8).digest(), "little")
        number, index = divmod(number, TEXT_KEY_WIDTH)
        key[index] += (1.0 if number % 2 else -1.0) * (1.0 + math.log(times))
    length = float(np.linalg.norm(key))
    # Terms that cancel each other wholly would leave nothing to search by.
    return (key / length).astype(np.float32) if length else None


@dataclass(frozen=True)
class Completion:
    """What a server wrote; `cut` where the limit of tokens ended it.

    `logprobs` are those of the likeliest first tokens by their text, if they were asked for.
    """

    text: str
    cut: bool
    tokens: int
    logprobs: Mapping[str, float]


class Completions:
    """A model behind a server; safe to share between threads.

    Args:
        url: of the API, as `http://host:8000/v1`; `/v1` may be left out.
        concurrent: most requests at once; attempts: most times that one is sent.
        answer_s: seconds to wait for an answer; pause: called to wait so many seconds.

    Raises:
        UsageError: the address is none, or holds a password; or httpx is not installed.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        concurrent: int = CONCURRENT,
        attempts: int = ATTEMPTS,
        answer_s: float = ANSWER_S,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self.url, self.model = _api_address(url), model
        self._attempts, self._pause = attempts, pause
        self._client = _client(concurrent, answer_s)
        self._pool = ThreadPoolExecutor(concurrent, thread_name_prefix="remote")

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._client.close()

    def ask_all(self, requests: Sequence[Callable[[], Completion]]) -> list[Completion]:
        """Send requests, as many at once as are allowed; the answers in their order."""
        return list(self._pool.map(lambda request: request(), requests))

    def ask(self, question: Mapping[str, Any], max_tokens: int, *, logprobs: bool) -> Completion:
        """Send a question of `chat`, again while the server is busy, and read the answer.

        Raises:
            ServiceUnreachable: no answer came, or only that of a server that is not ready.
            AccessDenied: the key is missing or wrong.
            Overloaded: it asked to come back later, until the last attempt.
            ServiceError: it refused the request, or its answer is none.
        """
        body = {
            "model": self.model,
            **question,
            "max_tokens": max_tokens,
            "temperature": 0,
            "repetition_penalty": 1.0,
            "skip_special_tokens": False,
        }
        if logprobs:
            body |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
        for attempt in range(1, self._attempts):
            # Longer from attempt to attempt, and never as long as all others wait.
            longest_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** (attempt - 1))
            wait_s = longest_s * random.uniform(0.5, 1.0)
            try:
                response = self._posted(body)
            except ServiceUnreachable:
                pass  # the last attempt says why
            else:
                if response.status_code not in _BUSY:
                    return self._completion(response, logprobs)
                wait_s = max(wait_s, _retry_after_s(response))
            LOG.info("%s is asked again in %.1f s", self.url, wait_s)
            self._pause(wait_s)
        return self._completion(self._posted(body), logprobs)

    def _posted(self, body: Mapping[str, Any]) -> httpx.Response:
        import httpx

        try:
            return self._client.post(f"{self.url}/chat/completions", json=body)
        except httpx.TransportError as error:
            seen, hint = type(error).__name__, "see whether the server runs"
            raise ServiceUnreachable(f"no answer from {self.url}", seen=seen, hint=hint) from None
        except httpx.HTTPError as error:
            raise ServiceError(f"{self.url} cannot be asked", seen=error) from None

    def _completion(self, response: httpx.Response, logprobs: bool) -> Completion:
        if response.status_code != 200:
            raise self._refusal(response.status_code, response.text)
        try:
            answer = response.json()
            choice = answer["choices"][0]
            text, reason = choice["message"]["content"] or "", choice["finish_reason"]
            tokens = int((answer.get("usage") or {}).get("completion_tokens", 0))
            found = _first_logprobs(choice) if logprobs else {}
            if not isinstance(text, str):
                raise TypeError("the content is no text")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            what = f"{self.url} answers in another form than chat completions"
            raise ServiceError(what, seen=f"{type(error).__name__}: {error}"[:200]) from None
        if logprobs and not found:
            hint = "serve the model with vLLM or SGLang, which give them"
            raise ServiceError(f"{self.url} gives no log-probabilities", hint=hint)
        return Completion(text, reason == "length", tokens, found)

    def _refusal(self, status: int, said: str) -> ServiceError:
        """Make the error that a status other than success means."""
        if key := os.environ.get(API_KEY):
            said = said.replace(key, "…")  # a server may repeat it
        said = f"{status} {said[:200]}".strip()
        if status in (401, 403):
            hint = f"put the key into {API_KEY}"
            return AccessDenied(f"{self.url} denies access", seen=status, hint=hint)
        if status == 429:
            return Overloaded(f"{self.url} is overloaded", seen=said)
        if status in _BUSY:
            return ServiceUnreachable(f"{self.url} is not ready", seen=said)
        if status == 404:
            hint = f"see whether it serves a model called {self.model}"
            return ServiceError(f"{self.url} has no such model or address", seen=said, hint=hint)
        return ServiceError(f"{self.url} refuses the request", seen=said)


def _api_address(url: str) -> str:
    parts = urlsplit(url)
    if parts.username or parts.password or parts.query or parts.fragment:
        raise UsageError(
            "the address of a remote model holds no password, query or fragment",
            hint=f"put a key into the environment: {API_KEY}",
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        allowed = "http(s)://host:port/v1"
        raise UsageError("a remote model has an address", seen=url, allowed=allowed)
    return url.rstrip("/") if parts.path.strip("/") else f"{url.rstrip('/')}/v1"


def _client(concurrent: int, answer_s: float) -> httpx.Client:
    try:
        import httpx
    except ModuleNotFoundError as error:
        what, seen = "a remote model needs a package that is not installed", f"no {error.name}"
        raise UsageError(what, seen=seen, hint=install_hint("serve")) from error
    key = os.environ.get(API_KEY, "")
    if not key.isascii() or not key.isprintable() or key != key.strip():
        raise UsageError(f"{API_KEY} holds something else than a key")  # and is not shown
    return httpx.Client(
        headers={"Authorization": f"Bearer {key}"} if key else {},
        timeout=httpx.Timeout(answer_s, connect=CONNECT_S),
        limits=httpx.Limits(max_connections=concurrent),
        follow_redirects=False,  # a key goes to the address it was given for, and nowhere else
    )


def _first_logprobs(choice: Mapping[str, Any]) -> dict[str, float]:
    """Read those of the likeliest first tokens; of tokens with one text the largest."""
    content = (choice.get("logprobs") or {}).get("content") or []
    found: dict[str, float] = {}
    for entry in content[0]["top_logprobs"] if content else ():
        logprob = float(entry["logprob"])
        if math.isfinite(logprob):
            found[entry["token"]] = max(logprob, found.get(entry["token"], -math.inf))
    return found


def _retry_after_s(response: httpx.Response) -> float:
    """Read for how long the server asks to wait, as far as one is willing to."""
    try:
        asked = float(response.headers.get("retry-after", "0"))
    except ValueError:  # a date
        return 0.0
    return min(max(asked, 0.0), LONGEST_PAUSE_S) if math.isfinite(asked) else 0.0
