"""A server of chat completions with a local model behind it, as vLLM speaks them.

It knows nothing of prompt families: it renders messages by the template of ChatML, as Qwen's does,
and answers whatever it is asked.
"""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

from meiqa.engine.images import load_pixels
from meiqa.engine.local import LocalModel
from meiqa.engine.model import Prefix, VisualTokens
from meiqa.engine.prompts import positions_of
from meiqa.engine.runtime.decoder import Row
from meiqa.engine.writing import Writing

MODEL = "meiqa-default"


def rendered(body: dict[str, Any]) -> tuple[str, list[bytes]]:
    """What the model reads, with a NUL for each picture, and the pictures."""
    text, pictures = "", []
    for message in body["messages"]:
        content = message["content"]
        text += f"<|im_start|>{message['role']}\n"
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part["type"] == "text":
                text += part["text"]
                continue
            header, _, data = part["image_url"]["url"].partition(",")
            assert header == "data:image/png;base64"
            pictures.append(base64.b64decode(data, validate=True))
            text += "<|vision_start|>\0<|vision_end|>"
        text += "<|im_end|>\n"
    if body.get("continue_final_message"):
        assert body["messages"][-1]["role"] == "assistant"
        assert body["add_generation_prompt"] is False
        text = text.removesuffix("<|im_end|>\n")
    elif body.get("add_generation_prompt", True):
        text += "<|im_start|>assistant\n"
    return text, pictures


@dataclass
class ChatModel:
    """A local model that answers chat completions, one at a time."""

    model: LocalModel
    lock: threading.Lock = field(default_factory=threading.Lock)
    seen: dict[bytes, VisualTokens] = field(default_factory=dict)
    read: dict[bytes, Prefix] = field(default_factory=dict)

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        text, pictures = rendered(body)
        with self.lock:
            prefix, row_pieces = self._taken_apart(text, pictures)
            if body["max_tokens"] == 1:
                return self._next_token(prefix, row_pieces, body)
            (question,) = row_pieces
            return self._written(prefix, question, body["max_tokens"])

    def _taken_apart(self, text: str, pictures: list[bytes]) -> tuple[Prefix, list[Any]]:
        opening, *rest = text.split("\0")
        family = self.model.prompts.family
        assert opening == family.opening
        assert rest[0].startswith(family.closing)
        for data in pictures:
            if data not in self.seen:
                self.seen[data] = self.model.encode(load_pixels(data).array)
        first = pictures[0]
        if first not in self.read:
            self.read[first] = self.model.prefill([self.seen[first]])[0]
        pieces: list[Any] = [self.model.prompts.ids(rest[0].removeprefix(family.closing))]
        for picture, following in zip(pictures[1:], rest[1:], strict=True):
            pieces += [self.seen[picture], self.model.prompts.ids(following)]
        return self.read[first], pieces

    def _next_token(
        self, prefix: Prefix, pieces: list[Any], body: dict[str, Any]
    ) -> dict[str, Any]:
        model = self.model
        extents = [
            piece.grid if isinstance(piece, VisualTokens) else len(piece) for piece in pieces
        ]
        embeds = [
            piece.values if isinstance(piece, VisualTokens) else model.embed(piece)
            for piece in pieces
        ]
        row = Row(np.concatenate(embeds), positions_of(extents, prefix.next_position)[0])
        logits = model.decoder.last_logits([row], [prefix.opening])[0].astype(np.float64)
        logprobs = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
        best = np.argsort(-logprobs)[: body["top_logprobs"]]
        named = [
            {"token": model.prompts.text([int(token)]), "logprob": float(logprobs[token])}
            for token in best
        ]
        content = [{**named[0], "top_logprobs": named}]
        return answer(named[0]["token"], "length", 1, {"content": content})

    def _written(self, prefix: Prefix, question: np.ndarray, limit: int) -> dict[str, Any]:
        writing = Writing(self.model, prefix, question, limit)
        while not writing.stopped and len(writing.tokens) < limit:
            writing.accept()
        text = self.model.prompts.text(writing.tokens)
        return answer(text, "stop" if writing.stopped else "length", len(writing.tokens), None)


def answer(text: str, reason: str, tokens: int, logprobs: Any) -> dict[str, Any]:
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "finish_reason": reason,
        "logprobs": logprobs,
    }
    return {
        "object": "chat.completion",
        "choices": [choice],
        "usage": {"completion_tokens": tokens},
    }


@dataclass
class Server:
    """A running server.

    Attributes:
        url: of its API.
        bodies, keys: of the requests it got.
        replies: (status, headers, body) to give before it answers again, first to last; a status
            of 0 breaks the connection.
        most_at_once: requests.
    """

    url: str = ""
    answers: Any = None
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    replies: list[tuple[int, dict[str, str], bytes]] = field(default_factory=list)
    most_at_once: int = 0
    at_once: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def handle(
        self, path: str, key: str | None, body: dict[str, Any]
    ) -> tuple[int, dict[str, str], bytes]:
        with self.lock:
            self.bodies.append(body)
            self.keys.append(key)
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
            reply = self.replies.pop(0) if self.replies else None
        try:
            if reply is not None:
                return reply
            if not re.fullmatch("/v1/chat/completions", path):
                return 404, {}, b'{"detail":"Not Found"}'
            return 200, {}, json.dumps(self.answers(body)).encode()
        finally:
            with self.lock:
                self.at_once -= 1


@contextmanager
def serving(answers: Any) -> Iterator[Server]:
    """Serve what a function makes of a request's body, on a port of this machine."""
    server = Server(answers=answers)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            key = self.headers.get("Authorization")
            status, headers, data = server.handle(self.path, key, body)
            if status == 0:
                self.close_connection = True
                self.connection.close()
                return
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    class Http(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            pass

    http = Http(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{http.server_address[1]}/v1"
    thread = threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
