"""Pages of other origins: refused with the next step, or allowed by --allow-origin, with CORS headers."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from lowmem.commands.serve import check_origins
from lowmem.errors import InvalidRequestError
from lowmem.server.cors import Origins, is_origin
from lowmem.server.guard import GuardSettings
from tests.server.server_fixture import MODEL, PATIENCE, Live, live_server

APP = "http://localhost:3000"
KEY = "a-key-of-the-house"
BODY = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    guard = GuardSettings(keys=(KEY,), origins=(APP, "vscode-webview://*", "null"))
    with live_server(guard=guard) as live:
        yield live


def post(live: Live, origin: str, key: str = KEY) -> httpx.Response:
    headers = {"Origin": origin, "Authorization": f"Bearer {key}"}
    return httpx.post(f"{live.url}/v1/chat/completions", json=BODY, headers=headers, timeout=PATIENCE)


def preflight(live: Live, origin: str, **more: str) -> httpx.Response:
    """What a browser asks before it posts JSON with a key. It sends no key."""
    asked = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
        **more,
    }
    return httpx.options(f"{live.url}/v1/chat/completions", headers=asked)


@pytest.mark.parametrize("origin", [APP, "HTTP://LOCALHOST:3000", "vscode-webview://0a1b", "null"])
def test_an_allowed_origin_may_ask_and_read(live: Live, origin: str) -> None:
    asked = preflight(live, origin)
    assert asked.status_code == 204
    allowed = {name.strip() for name in asked.headers["access-control-allow-headers"].lower().split(",")}
    assert {"authorization", "content-type", "x-stainless-os"} <= allowed
    assert "POST" in asked.headers["access-control-allow-methods"]
    answer = post(live, origin)
    assert answer.status_code == 200
    for response in (asked, answer, post(live, origin, key="wrong")):
        assert response.headers["access-control-allow-origin"] == origin
        assert "origin" in response.headers["vary"].lower()
        assert "access-control-allow-credentials" not in response.headers
    assert post(live, origin, key="wrong").status_code == 401
    read = httpx.get(f"{live.url}/v1/models", headers={"Origin": origin, "Authorization": f"Bearer {KEY}"})
    assert read.headers["access-control-allow-origin"] == origin


def test_a_private_network_is_allowed_to_allowed_origins_only(live: Live) -> None:
    private = {"Access-Control-Request-Private-Network": "true"}
    assert preflight(live, APP, **private).headers["access-control-allow-private-network"] == "true"
    assert "access-control-allow-private-network" not in preflight(live, APP).headers
    assert "access-control-allow-private-network" not in preflight(live, "http://evil", **private).headers


@pytest.mark.parametrize("origin", ["http://localhost:3001", "https://localhost:3000", "http://evil.example"])
def test_another_origin_is_refused_with_the_option_by_name(live: Live, origin: str) -> None:
    for answer in (preflight(live, origin), post(live, origin)):
        assert answer.status_code == 403
        assert f"--allow-origin {origin}" in answer.json()["error"]["message"]
        assert not [name for name in answer.headers if name.startswith("access-control")]
    assert sum(f"--allow-origin {origin}" in line for line in live.log) == 1  # once: browsers hide it


def test_a_star_allows_every_origin_and_hosts_are_still_checked() -> None:
    with live_server(guard=GuardSettings(origins=("*",))) as live:
        assert post(live, "http://anything.example").status_code == 200
        assert preflight(live, "http://anything.example", Host="evil.example").status_code == 403


@pytest.mark.parametrize(
    "name",
    [
        APP,
        f"{APP}/",
        "https://app.example",
        "app://obsidian.md",
        "app://*",
        "chrome-extension://abc",
        "null",
        "*",
    ],
)
def test_origins_are_accepted(name: str) -> None:
    assert is_origin(name)
    check_origins([name])


@pytest.mark.parametrize(
    "name", ["localhost:3000", f"{APP}/app", "https://*", "http://*.example", "", "app:"]
)
def test_what_no_browser_sends_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequestError, match="not an origin"):
        check_origins([name])


def test_no_origin_is_allowed_by_default() -> None:
    assert not any(Origins().allow(origin) for origin in ("", "null", APP, "*"))
    assert not Origins(["app://*"]).allow("app")
    assert Origins([f"{APP.upper()}/"]).allow(APP)
