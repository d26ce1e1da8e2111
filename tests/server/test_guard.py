"""Access checks: hosts, origins, API keys, body sizes, and the security headers of responses."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from lowmem.server import guard
from lowmem.server.guard import GuardSettings, explain, is_open
from tests.server.server_fixture import MODEL, PATIENCE, Live, eventually, live_server
from tests.server.test_api import chat

KEY, OTHER = "a-key-of-the-house", "another-key"
BODY = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    """A server without keys, with one additional host name, and bodies of at most 20 KiB."""
    with live_server(guard=GuardSettings(hosts=("box.lan",), max_body=20 << 10)) as live:
        yield live


@pytest.fixture(scope="module")
def locked() -> Iterator[Live]:
    with live_server(guard=GuardSettings(keys=(KEY, OTHER))) as live:
        yield live


def post(live: Live, headers: dict[str, str] | None = None, **options: Any) -> httpx.Response:
    return httpx.post(
        f"{live.url}/v1/chat/completions", json=BODY, headers=headers, timeout=PATIENCE, **options
    )


def code_of(answer: httpx.Response) -> str:
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return str(error["code"])


@pytest.mark.parametrize(
    "host", ["localhost", "127.0.0.1", "LOCALHOST:1234", "[::1]:80", "box.lan", "localhost."]
)
def test_own_host_names_are_accepted(live: Live, host: str) -> None:
    assert httpx.get(f"{live.url}/v1/models", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "10.0.0.1",
        "",
        "local host",
        "[::1",
    ],
)
def test_other_host_names_are_refused_on_every_path(live: Live, host: str) -> None:
    """With DNS rebinding, a foreign host name that resolves to this address could use the server."""
    for path in ("/v1/models", "/", "/health", "/page/status", "/nowhere"):
        answer = httpx.get(live.url + path, headers={"Host": host})
        assert answer.status_code == 403 and code_of(answer) == "host_not_allowed"
    assert post(live, {"Host": host}).status_code == 403


def test_two_host_headers_are_refused(live: Live) -> None:
    host, port = live.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), PATIENCE) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n")
        assert client.recv(100).split(b" ")[1] in (b"400", b"403")


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://localhost:1", "https://evil", ""])
def test_pages_of_other_origins_cannot_post(live: Live, origin: str) -> None:
    answer = post(live, {"Origin": origin})
    assert answer.status_code == 403 and code_of(answer) == "origin_not_allowed"


def test_the_servers_page_can_post(live: Live) -> None:
    assert post(live, {"Origin": live.url}).status_code == 200
    behind_a_proxy = {"Host": "box.lan", "Origin": "https://box.lan"}
    assert post(live, behind_a_proxy).status_code == 200


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""]
)
def test_content_types_of_html_forms_are_refused(live: Live, kind: str) -> None:
    """Any web page can send these content types without a CORS preflight."""
    answer = httpx.post(
        f"{live.url}/v1/chat/completions", content=b'{"model":"x"}', headers={"Content-Type": kind}
    )
    assert answer.status_code == 415 and code_of(answer) == "unsupported_media_type"


def test_compressed_bodies_are_refused(live: Live) -> None:
    """A small compressed body could expand to a large one."""
    assert post(live, {"Content-Encoding": "gzip"}).status_code == 415


def test_no_cors_headers_are_sent(live: Live) -> None:
    asked = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    answers = [
        httpx.options(f"{live.url}/v1/chat/completions", headers=asked),
        httpx.get(f"{live.url}/v1/models", headers={"Origin": "http://evil.example"}),
        post(live, {"Origin": live.url}),
    ]
    assert answers[0].status_code in (403, 405)
    assert not [name for answer in answers for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize("path", ["/", "/health", "/v1/models", "/nowhere", "/page/status", "/metrics"])
def test_every_response_has_security_headers(live: Live, path: str) -> None:
    answers = [httpx.get(live.url + path), httpx.get(live.url + path, headers={"Host": "evil.example"})]
    for answer in answers:
        assert answer.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'")
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["x-request-id"].startswith("req_")
        assert answer.headers["cache-control"]
    assert answers[0].headers["x-request-id"] != answers[1].headers["x-request-id"]


def test_a_body_with_a_too_large_content_length_is_not_read(live: Live) -> None:
    host, port = live.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), PATIENCE) as client:
        client.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 99999999999999999999\r\n\r\n"
        )
        answer = b"".join(iter(lambda: client.recv(10_000), b""))  # until the connection is closed
    assert answer.split(b" ")[1] == b"413" and b"request_too_large" in answer


def test_a_chunked_body_is_read_only_up_to_the_limit(live: Live) -> None:
    sent = 0

    def parts() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(100_000):
            sent += 4096
            yield b" " * 4096

    url = f"{live.url}/v1/chat/completions"
    try:
        answer = httpx.post(url, content=parts(), headers={"Content-Type": "application/json"})
        assert answer.status_code == 413 and code_of(answer) == "request_too_large"
    except httpx.TransportError:  # the connection may be closed before the response was read
        pass
    assert sent < 50 << 20


def test_the_total_size_of_bodies_is_limited(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "BODIES_AT_ONCE", 0)
    answer = post(live)
    assert answer.status_code == 503 and code_of(answer) == "overloaded" and answer.headers["retry-after"]


def test_bodies_count_from_arrival_to_the_end_of_their_request(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bodies count against the total limit while they arrive, and until their request ends."""
    monkeypatch.setattr(guard, "BODIES_AT_ONCE", 1)
    host, port = live.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), PATIENCE) as client:
        client.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 20480\r\n\r\n" + b" " * 20470
        )
        eventually(lambda: post(live).status_code == 503)
    eventually(lambda: post(live).status_code == 200)


def test_a_stalled_body_times_out(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.2)
    host, port = live.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), PATIENCE) as client:
        client.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 100\r\n\r\n{"
        )
        assert client.recv(10_000).split(b" ")[1] == b"408"


def test_only_valid_keys_are_accepted(locked: Live) -> None:
    for key in (KEY, OTHER):
        assert chat(locked.client(key), max_tokens=2).choices
    for key in ("", "wrong", KEY + "x", KEY[:-1], KEY.upper()):
        with pytest.raises(openai.AuthenticationError) as caught:
            chat(locked.client(key or "none"))
        assert caught.value.code == "invalid_api_key"
    basic = httpx.get(f"{locked.url}/v1/models", headers={"Authorization": f"Basic {KEY}"})
    assert basic.status_code == 401 and basic.headers["www-authenticate"] == "Bearer"
    assert KEY not in "".join(locked.log)


def test_every_path_that_uses_the_model_needs_a_key(locked: Live) -> None:
    schema = httpx.get(f"{locked.url}/openapi.json", headers={"Authorization": f"Bearer {KEY}"}).json()
    paths = {(path, method) for path, entry in schema["paths"].items() for method in entry}
    assert len(paths) >= 7
    hidden = {("/openapi.json", "get"), ("/nowhere", "get")}
    for path, method in paths | hidden:
        answer = httpx.request(method, locked.url + path, json={} if method == "post" else None)
        assert answer.status_code == (200 if path == "/health" else 401), path
    assert httpx.get(f"{locked.url}/").status_code == 200
    assert schema["components"]["securitySchemes"]["key"]["scheme"] == "bearer"


def test_paths_without_key_are_the_page_files() -> None:
    for path in ("/", "/health", "/page/app.js"):
        assert is_open("GET", path) and not is_open("POST", path)
    for path in ("/page/status", "/v1/models", "/metrics", "/openapi.json", "/pages", "//", "/health/x"):
        assert not is_open("GET", path)


def test_logged_errors_do_not_quote_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(error: Exception) -> str:
        try:
            raise error
        except Exception as caught:
            return explain(caught, "req_1")

    assert "secret" not in fail(ValueError("secret")) and "ValueError" in fail(ValueError("secret"))
    assert "CUDA out of memory" in fail(RuntimeError("CUDA out of memory"))
    assert len(fail(ValueError("x")).splitlines()) == 1 and "test_guard.py" in fail(ValueError("x"))
    monkeypatch.setenv("LOWMEM_DEBUG", "1")
    assert "in fail" in fail(ValueError("x"))
