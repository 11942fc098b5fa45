"""Asking a server that speaks OpenAI's chat completions: timeouts, retries, answers checked."""

from __future__ import annotations

import logging
import math
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from meiqa.errors import AccessDenied, Overloaded, ServiceError, ServiceUnreachable, UsageError

if TYPE_CHECKING:
    import httpx

__all__ = ["API_KEY", "Completion", "Completions"]

LOG = logging.getLogger(__name__)

API_KEY = "MEIQA_REMOTE_API_KEY"
"""The environment variable that holds the key; there is no other way to give one."""
CONNECT_S, ANSWER_S = 10.0, 120.0
ATTEMPTS = 5
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
CONCURRENT = 8
TOP_LOGPROBS = 20
"""The most that OpenAI's protocol, and vLLM unless told otherwise, give."""
_BUSY = (408, 425, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class Completion:
    """What a server wrote.

    Attributes:
        text: of the reply.
        cut: the limit of tokens ended it.
        tokens: written.
        logprobs: of the likeliest first tokens by their text; empty where none were asked for.
    """

    text: str
    cut: bool
    tokens: int
    logprobs: Mapping[str, float]


class Completions:
    """A model behind a server; safe to share between threads.

    Args:
        url: of the API, as `http://host:8000/v1`; `/v1` may be left out.
        model: what the server calls it.
        concurrent: most requests at once.
        attempts: most times that one is sent.
        answer_s: seconds to wait for an answer.
        pause: what is called to wait so many seconds.

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
        """Let go of connections."""
        self._pool.shutdown(cancel_futures=True)
        self._client.close()

    def ask_all(self, requests: Sequence[Callable[[], Completion]]) -> list[Completion]:
        """Send requests, as many at once as are allowed; the answers in their order."""
        if len(requests) == 1:
            return [requests[0]()]
        waiting = [self._pool.submit(request) for request in requests]
        try:
            return [future.result() for future in waiting]
        except BaseException:
            for future in waiting:
                future.cancel()
            raise

    def ask(self, question: Mapping[str, Any], max_tokens: int, *, logprobs: bool) -> Completion:
        """Send one request, again while the server is busy, and read the answer.

        Args:
            question: of `meiqa.engine.chat.chat`.
            max_tokens: most that may be written.
            logprobs: ask for those of the first token.

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
        return self._completion(self._posted(body), logprobs)

    def _posted(self, body: Mapping[str, Any]) -> httpx.Response:
        import httpx

        for attempt in range(1, self._attempts + 1):
            last = attempt == self._attempts
            try:
                response = self._client.post(f"{self.url}/chat/completions", json=body)
            except httpx.TransportError as error:
                if last:
                    raise ServiceUnreachable(
                        f"no answer from {self.url}",
                        seen=type(error).__name__,
                        hint="see whether the server runs",
                    ) from None
                wait_s = _pause_s(attempt)
            except httpx.HTTPError as error:
                raise ServiceError(f"{self.url} cannot be asked", seen=error) from None
            else:
                if response.status_code not in _BUSY or last:
                    self._refuse(response)
                    return response
                wait_s = max(_pause_s(attempt), _retry_after_s(response))
            LOG.info("%s is asked again in %.1f s", self.url, wait_s)
            self._pause(wait_s)
        raise AssertionError("the last attempt returns or raises")

    def _refuse(self, response: httpx.Response) -> None:
        """Raise what a status other than success means."""
        status = response.status_code
        if status == 200:
            return
        said = _said(response)
        if status in (401, 403):
            raise AccessDenied(
                f"{self.url} denies access", seen=status, hint=f"put the key into {API_KEY}"
            )
        if status == 429:
            raise Overloaded(f"{self.url} is overloaded", seen=said)
        if status in _BUSY:
            raise ServiceUnreachable(f"{self.url} is not ready", seen=said)
        if status == 404:
            hint = f"see whether it serves a model called {self.model}"
            raise ServiceError(f"{self.url} has no such model or address", seen=said, hint=hint)
        raise ServiceError(f"{self.url} refuses the request", seen=said)

    def _completion(self, response: httpx.Response, logprobs: bool) -> Completion:
        try:
            answer = response.json()
            choice = answer["choices"][0]
            text, reason = choice["message"]["content"] or "", choice["finish_reason"]
            usage = answer.get("usage") or {}
            tokens = int(usage.get("completion_tokens", 0))
            found = _first_logprobs(choice) if logprobs else {}
            if not isinstance(text, str):
                raise TypeError("the content is no text")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise ServiceError(
                f"{self.url} answers in another form than chat completions",
                seen=f"{type(error).__name__}: {error}"[:200],
            ) from None
        if logprobs and not found:
            raise ServiceError(
                f"{self.url} gives no log-probabilities",
                hint="serve the model with vLLM or SGLang, which give them",
            )
        return Completion(text, reason == "length", tokens, found)


def _api_address(url: str) -> str:
    parts = urlsplit(url)
    if parts.username or parts.password or parts.query or parts.fragment:
        raise UsageError(
            "the address of a remote model holds no password, query or fragment",
            hint=f"put a key into the environment: {API_KEY}",
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(
            "a remote model has an address", seen=url, allowed="http(s)://host:port/v1"
        )
    return url.rstrip("/") if parts.path.strip("/") else f"{url.rstrip('/')}/v1"


def _client(concurrent: int, answer_s: float) -> httpx.Client:
    try:
        import httpx
    except ModuleNotFoundError as error:
        raise UsageError(
            "a remote model needs a package that is not installed",
            seen=f"no {error.name}",
            hint="pip install 'meiqa[serve]'",
        ) from error
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
    """Log-probabilities of the likeliest first tokens; of tokens with one text the largest."""
    content = (choice.get("logprobs") or {}).get("content") or []
    found: dict[str, float] = {}
    for entry in content[0]["top_logprobs"] if content else ():
        logprob = float(entry["logprob"])
        if math.isfinite(logprob):
            found[entry["token"]] = max(logprob, found.get(entry["token"], -math.inf))
    return found


def _said(response: httpx.Response) -> str:
    """Status and the beginning of what a server says, without a key that it repeats."""
    said = response.text
    if key := os.environ.get(API_KEY):
        said = said.replace(key, "…")
    return f"{response.status_code} {said[:200]}".strip()


def _pause_s(attempt: int) -> float:
    """Longer from attempt to attempt, and never the same for all who wait."""
    longest: float = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** (attempt - 1))
    return longest * random.uniform(0.5, 1.0)


def _retry_after_s(response: httpx.Response) -> float:
    """Seconds that the server asks to wait, as far as one is willing to."""
    try:
        asked = float(response.headers.get("retry-after", "0"))
    except ValueError:  # a date
        return 0.0
    return min(max(asked, 0.0), LONGEST_PAUSE_S) if math.isfinite(asked) else 0.0
