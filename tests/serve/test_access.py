"""Keys, scopes, and what a browser may be talked into."""

from __future__ import annotations

from pathlib import Path

import pytest

from meiqa import cli
from meiqa.errors import AccessDenied, KeyRequired, UsageError
from meiqa.serve.access import Keys, Settings, add_key, authorise, is_loopback, require_origin
from meiqa.serve.app import listen
from tests.serve.conftest import Serve, jpeg


def test_a_key_file_holds_hashes_and_no_key(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    token = add_key(file, "phone", ["score"])
    text = file.read_text()
    assert token not in text
    assert text.startswith("phone score sha256:")
    assert file.stat().st_mode & 0o077 == 0
    key = authorise(Keys.read(file), token, "score")
    assert key is not None
    assert key.name == "phone"


def test_keys_are_added_to_a_file_by_hand_too(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\n\nold score sha256:" + 64 * "0")  # without a line's end
    token = add_key(file, "new", ["memory:write"])
    keys = Keys.read(file)
    assert [key.name for key in keys.keys] == ["old", "new"]
    with pytest.raises(AccessDenied, match="lacks the scope"):
        authorise(keys, token, "score")


@pytest.mark.parametrize(
    "line",
    [
        "phone score secret-in-the-wrong-place",
        "phone admin sha256:" + 64 * "0",
        "phone score",
        "a score sha256:" + 64 * "0" + "\na score sha256:" + 64 * "1",
        "",
    ],
)
def test_a_key_file_that_makes_no_sense_is_refused_without_showing_it(
    line: str, tmp_path: Path
) -> None:
    (tmp_path / "keys").write_text(line)
    with pytest.raises(UsageError) as refused:
        Keys.read(tmp_path / "keys")
    assert "secret" not in str(refused.value)


def test_a_name_is_taken_once(tmp_path: Path) -> None:
    add_key(tmp_path / "keys", "phone", ["score"])
    with pytest.raises(UsageError, match="of this name"):
        add_key(tmp_path / "keys", "phone", ["score"])


def test_without_keys_only_loopback_is_listened_on() -> None:
    with pytest.raises(UsageError, match="this machine only"):
        listen("0.0.0.0", 0, Settings())
    with pytest.raises(UsageError, match="this machine only"):
        listen("example.org", 0, Settings())
    listen("127.0.0.1", 0, Settings()).close()


def test_loopback_has_several_names() -> None:
    assert [is_loopback(host) for host in ("::1", "127.9.9.9", "LOCALHOST")] == [True] * 3
    assert not any(is_loopback(host) for host in ("", "10.0.0.1", "::", "localhost.evil.org"))


def test_keys_open_what_their_scopes_say(serve: Serve, keys: tuple[Keys, str, str]) -> None:
    known, reader, writer = keys
    api = serve(Settings(budget_ms=30_000, keys=known))

    def status(path: str, token: str | None, method: str = "POST") -> int:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        body = {"content": jpeg(1)} if method == "POST" else {}
        return api.request(method, path, headers=headers, **body).status_code  # type: ignore[arg-type]

    assert status("/v1/score", None) == 401
    assert status("/v1/score", "guess") == 401
    assert status("/v1/score", reader) == 200
    assert status("/v1/score?learn=true", reader) == 403
    assert status("/v1/memory/cases?id=a&score=3", reader) == 403
    assert status("/v1/memory/cases?id=a", reader, "DELETE") == 403
    assert status("/v1/memory/cases", writer, "GET") == 200
    assert status("/metrics", None, "GET") == 401
    assert status("/metrics", reader, "GET") == 200
    assert status("/healthz", None, "GET") == 200


def test_a_refusal_asks_for_a_bearer_key(serve: Serve, keys: tuple[Keys, str, str]) -> None:
    answer = serve(Settings(keys=keys[0])).post("/v1/score", content=b"")
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert answer.json()["type"] == "urn:meiqa:problem:key-required"


def test_without_keys_nobody_writes(serve: Serve) -> None:
    api = serve(Settings())
    for path in ("/v1/memory/cases?id=a&score=3", "/v1/score?learn=true"):
        answer = api.post(path, content=jpeg(1))
        assert answer.status_code == 403
        assert "api-key" in answer.json()["hint"]


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},  # a name made to point at this machine
        {"Origin": "https://evil.example"},  # a page of another site
        {"Origin": "null"},
        {"Host": "[:::"},
    ],
)
def test_without_keys_other_sites_pages_are_refused(serve: Serve, headers: dict[str, str]) -> None:
    assert serve(Settings()).get("/v1/model", headers=headers).status_code == 403


def test_the_services_own_page_may_ask(serve: Serve) -> None:
    headers = {"Origin": "http://localhost:8000", "Host": "localhost:8000"}
    assert serve(Settings()).get("/v1/model", headers=headers).status_code == 200


APP = "https://app.example"
PREFLIGHT = {"Access-Control-Request-Method": "POST"}


def test_pages_of_a_site_that_is_let_in_may_ask_and_read(serve: Serve) -> None:
    api = serve(Settings(origins=(APP, "http://localhost:5173")))
    for origin in (APP, "http://localhost:5173"):
        headers = {"Origin": origin, "Host": "localhost:8000"}
        asked = api.get("/v1/model", headers=headers)
        assert asked.status_code == 200
        assert asked.headers["access-control-allow-origin"] == origin
        assert "Retry-After" in asked.headers["access-control-expose-headers"]
        refused = api.post("/v1/score", content=b"no photo", headers=headers)
        assert refused.status_code == 422
        assert refused.headers["access-control-allow-origin"] == origin
        before = api.options(
            "/v1/score",
            headers={
                **headers,
                **PREFLIGHT,
                "Access-Control-Request-Headers": "authorization,content-type",
            },
        )
        assert before.status_code == 200
        assert before.headers["access-control-allow-origin"] == origin


@pytest.mark.parametrize("origin", ["https://app.example.evil", "http://app.example", "null"])
def test_pages_of_no_other_site_may(serve: Serve, origin: str) -> None:
    api = serve(Settings(origins=(APP,)))
    headers = {"Origin": origin, "Host": "localhost:8000"}
    asked = api.get("/v1/model", headers=headers)
    assert asked.status_code == 403
    assert "access-control-allow-origin" not in asked.headers
    before = api.options("/v1/score", headers={**headers, **PREFLIGHT})
    assert before.status_code == 400
    assert "access-control-allow-origin" not in before.headers


def test_by_default_no_site_is_let_in(serve: Serve) -> None:
    api = serve(Settings())
    headers = {"Origin": APP, "Host": "localhost:8000", **PREFLIGHT}
    assert api.options("/v1/score", headers=headers).status_code == 403
    own = api.get("/v1/model", headers={"Host": "localhost:8000"})
    assert "access-control-allow-origin" not in own.headers


def test_a_host_that_is_not_this_machine_is_none_from_an_allowed_page_either(serve: Serve) -> None:
    api = serve(Settings(origins=(APP,)))
    headers = {"Origin": APP, "Host": "evil.example"}
    assert api.get("/v1/model", headers=headers).status_code == 403


def test_with_keys_an_allowed_page_needs_one(serve: Serve, keys: tuple[Keys, str, str]) -> None:
    known, reader, _ = keys
    api = serve(Settings(keys=known, origins=(APP,)))
    assert api.get("/v1/model", headers={"Origin": APP}).status_code == 401
    headers = {"Origin": APP, "Authorization": f"Bearer {reader}"}
    assert api.get("/v1/model", headers=headers).headers["access-control-allow-origin"] == APP


@pytest.mark.parametrize(
    "origin", ["https://app.example", "http://localhost:5173", "http://127.0.0.1:8080"]
)
def test_an_origin_is_scheme_host_and_port(origin: str) -> None:
    assert require_origin(origin) == origin


@pytest.mark.parametrize(
    "origin",
    [
        *("*", "null", "", "app.example", "//app.example", "ftp://app.example"),
        *("https://", "https://app.example/", "https://app.example/page", "https://*.example"),
        *("https://App.example", "HTTPS://app.example", "https://app.example:443"),
        *("http://app.example:80", "https://me@app.example", "https://app.example?x"),
        *("https://app.example:x", "https://[::", "https://a b", "https://app.example#x"),
    ],
)
def test_what_is_no_origin_is_refused_in_one_line(
    origin: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError, match="not the origin of a site"):
        require_origin(origin)
    assert cli.main(["serve", f"--cors={origin}"]) == 2
    said = capsys.readouterr().err
    assert "not the origin of a site" in said
    assert said.count("\n") == 1


def test_a_missing_token_is_told_apart_from_a_missing_scope(keys: tuple[Keys, str, str]) -> None:
    known, reader, _ = keys
    with pytest.raises(KeyRequired):
        authorise(known, None)
    with pytest.raises(AccessDenied) as refused:
        authorise(known, reader, "memory:write")
    assert not isinstance(refused.value, KeyRequired)
