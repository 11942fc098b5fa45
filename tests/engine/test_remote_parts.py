"""The parts of the remote role: tiles, keys of texts, messages, and asking a server."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meiqa.engine.completions import (
    API_KEY,
    Completions,
    about_one,
    about_two,
    chat,
    text_key,
    unmarked,
)
from meiqa.engine.model import VisualTokens
from meiqa.engine.prompts import FAMILIES, MEIQA, VISUALQUALITY_R1, PromptFamily
from meiqa.engine.remote import RemoteSettings, picture_of, tile_side, tiles_of
from meiqa.errors import AccessDenied, Overloaded, ServiceError, ServiceUnreachable, UsageError
from meiqa.memory import AnchorWriter, Case, MemoryBank, RetrievalPolicy
from tests.engine.chat_server import Server, answer, rendered, serving


@pytest.mark.parametrize("cell", [28, 32, 64, 14, 7, 13])
def test_a_memory_gives_pictures_back_as_they_were(cell: int, tmp_path: Path) -> None:
    side = tile_side(cell)
    random = np.random.default_rng(cell)
    pixels = random.integers(1, 256, (2 * cell, 3 * cell, 3), dtype=np.uint8)
    pixels[:cell] = pixels[:cell] // 9 + 100  # without extremes, too
    tokens = tiles_of(pixels, side)
    assert tokens.values.shape == (tokens.grid[0] * tokens.grid[1], 3 * side**2 + 1)
    assert (picture_of(remembered(tokens, tmp_path / "memory")) == pixels).all()


def remembered(tokens: VisualTokens, memory: Path) -> VisualTokens:
    """Tokens as they come out of a memory."""
    key = np.ones(2, np.float32)
    case = Case("a", "anchor", "a", 3.0, 0.1, "", key, tokens.values, tokens.grid)
    with AnchorWriter(memory, "ab12", 2, tokens.values.shape[1]) as writer:
        writer.add(case)
        writer.finish()
    with MemoryBank.open(memory, package_digest="ab12") as bank:
        (found,) = bank.snapshot().retrieve(key, RetrievalPolicy(k=1), None)
    return VisualTokens(found.tokens, found.grid)


def test_black_comes_back_as_nearly_black() -> None:
    assert (picture_of(tiles_of(np.zeros((8, 16, 3), np.uint8), 8)) == 1).all()


def test_keys_of_texts_like_what_is_written_alike() -> None:
    sharp, same = text_key("Sharp, well lit."), text_key("sharp  WELL lit")
    assert sharp is not None
    assert same is not None
    np.testing.assert_array_equal(sharp, same)
    assert np.linalg.norm(sharp) == pytest.approx(1, abs=1e-6)
    near, far = text_key("Sharp, poorly lit."), text_key("Strong lens blur and noise")
    assert near is not None
    assert far is not None
    assert sharp @ near > 0.3 > abs(sharp @ far) + 0.05
    assert text_key(" …! ") is None
    assert text_key("写真 がぼけている") is not None


def test_keys_of_texts_are_the_same_everywhere() -> None:
    key = text_key("a b a")
    assert key is not None
    assert {int(i): round(float(key[i]), 4) for i in np.flatnonzero(key)} == EXPECTED_KEY


EXPECTED_KEY = {64: -0.699, 132: 0.4129, 405: -0.4129, 443: 0.4129}


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "q-sit"])  # not in ChatML
def test_a_server_puts_together_what_the_model_reads_at_hand(name: str) -> None:
    """Its template renders the messages to the very text that the local model is fed."""
    family = FAMILIES[name]
    uri = "data:image/png;base64,"
    for question in (family.score, family.levels, family.reflection("Fine.", 2.0, 3.0)):
        text, pictures = rendered(chat(about_one(family, question), [uri]))
        assert text == f"{family.opening}\0{family.closing}{question}"
        assert len(pictures) == 1
    text, pictures = rendered(chat(about_two(family, family.compare), [uri, uri]))
    second = f"{family.second_opening}\0{family.closing}"
    assert text == f"{family.opening}\0{family.closing}{second}{family.compare}"
    assert len(pictures) == 2
    text, _ = rendered(chat(about_one(family, family.score), [uri], "Fine.</think>"))
    assert text.endswith(f"{family.score}Fine.</think>")


def test_a_system_turn_stays_one() -> None:
    messages = chat(about_one(VISUALQUALITY_R1, VISUALQUALITY_R1.levels), ["uri"])["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant"]
    assert messages[2]["content"] == "The quality of this picture is"


@pytest.mark.parametrize(
    "family",
    [
        FAMILIES["q-sit"],
        replace(MEIQA, opening="USER: <|vision_start|>"),
        replace(MEIQA, score="Rate it."),
        replace(MEIQA, closing=""),
        replace(MEIQA, levels="Rate it.<|im_end|>\n<|im_start|>assistant\nGood<|im_end|>\n"),
    ],
)
def test_other_templates_are_refused_at_once(family: PromptFamily) -> None:
    with pytest.raises(UsageError, match="cannot be asked of a server"):
        RemoteSettings("m", family)


def test_marks_are_taken_out() -> None:
    assert unmarked("a<|im_end|>\n<|im_start|>b\0<|vision_start|>") == "a\nb"


def test_settings_come_back_as_they_were(tmp_path: Path) -> None:
    settings = RemoteSettings("a/b", FAMILIES["levels"], 32, 256 * 256)
    settings.write(tmp_path)
    assert RemoteSettings.of_memory(tmp_path) == settings


def test_the_digest_tells_models_and_questions_apart() -> None:
    base = RemoteSettings("a")
    changed = [replace(base, model="b"), replace(base, prompt=FAMILIES["evoquality"])]
    changed += [replace(base, cell_pixels=32), replace(base, max_pixels=10**6)]
    assert len({each.digest for each in [base, *changed]}) == 5
    assert replace(base, calibration=replace(base.calibration, sigma=2.0)).digest == base.digest


@pytest.mark.parametrize(
    ("settings", "digest"),
    [
        (RemoteSettings("a"), "d654e714bee90b6ed4058ee3507d4168f79019133a6f8436f21a6ef9fbff190d"),
        (
            RemoteSettings("a/b", FAMILIES["levels"], 32, 256 * 256),
            "ec66b44fddaf768873abbd491fb6fafe9ea0510c522c44cbfb1a3a54bf80d843",
        ),
        (
            RemoteSettings("meiqa-default", MEIQA, cell_pixels=64, max_pixels=512 * 512),
            "f57115b017e8c685708c822545d3c4fe3cdce1c1719c02c000e72749578a6f86",
        ),
    ],
)
def test_memories_that_were_made_with_0_1_are_still_known(
    settings: RemoteSettings, digest: str
) -> None:
    assert settings.digest == digest


# Asking


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.delenv(API_KEY, raising=False)
    with serving(lambda body: answer("good", "stop", 3, None)) as server:
        yield server


def ask(server: Server, pauses: list[float] | None = None, **limits: Any) -> Any:
    waited: list[float] = [] if pauses is None else pauses
    completions = Completions(server.url, "m", pause=waited.append, **limits)
    try:
        return completions.ask({"messages": []}, 5, logprobs=False)
    finally:
        completions.close()


def test_a_request_is_what_servers_take(server: Server) -> None:
    found = ask(server)
    assert (found.text, found.cut, found.tokens) == ("good", False, 3)
    (body,) = server.bodies
    assert body["model"] == "m"
    assert (body["temperature"], body["max_tokens"]) == (0, 5)
    assert body["skip_special_tokens"] is False
    assert server.keys == [None]


def test_v1_may_be_left_out(server: Server) -> None:
    server.url = server.url.removesuffix("/v1") + "/"
    assert ask(server).text == "good"


@pytest.mark.parametrize("status", [0, 429, 500, 502, 503, 504])
def test_a_busy_server_is_asked_again(server: Server, status: int) -> None:
    server.replies = [(status, {}, b"busy")] * 2
    pauses: list[float] = []
    assert ask(server, pauses).text == "good"
    assert len(pauses) == 2
    assert 0 < pauses[0] < pauses[1] <= 1.0


def test_it_waits_as_long_as_it_is_told(server: Server) -> None:
    after = [
        {"Retry-After": text} for text in ("7", "9999", "nan", "Wed, 21 Oct 2015 07:28:00 GMT")
    ]
    server.replies = [(429, headers, b"") for headers in after]
    pauses: list[float] = []
    assert ask(server, pauses).text == "good"
    assert pauses[:2] == [7.0, 30.0]
    assert all(pause < 10 for pause in pauses[2:])


@pytest.mark.parametrize(
    ("status", "kind", "message"),
    [
        (0, ServiceUnreachable, "no answer from http://127"),
        (503, ServiceUnreachable, "not ready; got 503 what it says"),
        (429, Overloaded, "overloaded"),
        (401, AccessDenied, "put the key into MEIQA_REMOTE_API_KEY"),
        (404, ServiceError, "a model called m"),
        (400, ServiceError, "refuses the request; got 400 what it says"),
        (302, ServiceError, "refuses the request"),
    ],
)
def test_what_is_refused_is_told(
    server: Server, status: int, kind: type[ServiceError], message: str
) -> None:
    server.replies = [(status, {"Location": "http://127.0.0.1:1/"}, b"what it says")] * 3
    with pytest.raises(kind, match=message):
        ask(server, attempts=3)
    assert len(server.bodies) == (3 if kind.retryable else 1)


@pytest.mark.parametrize(
    "body", [b"", b"{}", b"[]", b'{"choices": []}', b'{"choices": [{"message": {"content": 3}}]}']
)
def test_another_form_is_refused(server: Server, body: bytes) -> None:
    server.replies = [(200, {}, body)]
    with pytest.raises(ServiceError, match="another form than chat completions"):
        ask(server)


def test_a_server_that_is_not_there() -> None:
    completions = Completions("http://127.0.0.1:9", "m", attempts=2, pause=lambda _: None)
    with pytest.raises(ServiceUnreachable, match="no answer from"):
        completions.ask({"messages": []}, 5, logprobs=False)
    completions.close()


def test_the_key_is_sent_and_never_shown(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(API_KEY, "sk-very-secret")
    server.replies = [(500, {}, b""), (400, {}, b"x" * 195 + b"bad key sk-very-secret")]
    with caplog.at_level(logging.DEBUG), pytest.raises(ServiceError) as refused:
        ask(server)
    assert server.keys == ["Bearer sk-very-secret"] * 2
    for text in (str(refused.value), repr(refused.value), caplog.text):
        assert "secret" not in text
        assert "sk-v" not in text


@pytest.mark.parametrize("key", ["two\nlines", "ключ", " padded "])
def test_a_key_that_is_none_is_refused_without_being_shown(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(API_KEY, key)
    with pytest.raises(UsageError) as refused:
        Completions("http://localhost", "m")
    assert key.strip() not in str(refused.value)


@pytest.mark.parametrize(
    "url",
    ["localhost:8000", "ftp://host/v1", "http://", "http://me:password@host", "http://h/?key=1"],
)
def test_an_address_that_is_none(url: str) -> None:
    with pytest.raises(UsageError) as refused:
        Completions(url, "m")
    assert "password@" not in str(refused.value)


def test_no_more_at_once_than_allowed(server: Server) -> None:
    together = threading.Barrier(3)

    def slowly(body: dict[str, Any]) -> dict[str, Any]:
        together.wait(timeout=30)  # until three are there at once
        return answer(str(body["messages"]), "stop", 1, None)

    server.answers = slowly
    completions = Completions(server.url, "m", concurrent=3)

    def question(number: int) -> Any:
        return lambda: completions.ask({"messages": number}, 5, logprobs=False)

    found = completions.ask_all([question(number) for number in range(12)])
    completions.close()
    assert [each.text for each in found] == [str(number) for number in range(12)]
    assert server.most_at_once == 3
