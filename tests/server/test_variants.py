"""Harmless variants of requests, taken as they are meant: numbers, paths, methods, a missing model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from lowmem.server.paths import OTHER_APIS, hint, path_meant
from tests.server.server_fixture import MODEL, PATIENCE, Live, live_server

PLAIN: dict[str, Any] = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "Hi"}],
    "temperature": 1,
    "top_k": 40,
    "seed": 7,
    "max_tokens": 8,
}


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with live_server(context=64) as live:
        yield live


def post(live: Live, body: dict[str, Any], path: str = "/v1/chat/completions") -> httpx.Response:
    return httpx.post(live.url + path, json=body, timeout=PATIENCE)


def text_of(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    return str(choice["message"]["content"] if "message" in choice else choice["text"])


@pytest.mark.parametrize(
    "variant",
    [
        {"max_tokens": 8.0},
        {"max_tokens": "8"},
        {"max_tokens": None, "max_completion_tokens": 8.0},
        {"max_tokens": None, "n_predict": 8},
        {"temperature": "1.0"},
        {"top_k": 40.0},
        {"seed": 7.0},
        {"seed": "7"},
        {"n": 1.0},
        {"stream": "false"},
        {"stream": 0},
        {"model": None},
        {"model": ""},
        {"stop": []},
        {"stop": ""},
        {"stop": ["", "never there"]},
        {"stop": None},
        {"top_logprobs": 0},
        {"stream_options": {"include_usage": False}},
        {"tools": []},
        {"logit_bias": []},
        {"logit_bias": {}, "presence_penalty": 0, "frequency_penalty": "0.0"},
        {"chat_template_kwargs": {}},
    ],
    ids=str,
)
def test_variants_of_values_give_the_same_answer(live: Live, variant: dict[str, Any]) -> None:
    assert text_of(post(live, {**PLAIN, **variant})) == text_of(post(live, PLAIN))


def test_minus_one_means_no_limit_no_filter_and_no_seed(live: Live) -> None:
    greedy = {**PLAIN, "temperature": 0}
    answer = post(live, {**greedy, "max_tokens": -1}).json()
    assert answer["usage"]["total_tokens"] in (64, 65)  # the context is full; the last token has no place
    for limit in (-2, -1.0, "-1"):
        assert post(live, {**greedy, "max_tokens": limit}).json()["choices"] == answer["choices"]
    off = text_of(post(live, {**PLAIN, "top_k": 0}))
    assert text_of(post(live, {**PLAIN, "top_k": -1})) == off
    drawn = {text_of(post(live, {**PLAIN, "seed": -1, "temperature": 2, "top_k": -1})) for _ in range(4)}
    assert len(drawn) > 1
    prompt = {"prompt": "def f(", "temperature": 0, "max_tokens": -1}
    assert post(live, prompt, "/v1/completions").json()["usage"]["completion_tokens"] > 16


def test_a_top_p_of_zero_is_greedy(live: Live) -> None:
    greedy = text_of(post(live, {**PLAIN, "temperature": 0}))
    assert text_of(post(live, {**PLAIN, "temperature": 2, "top_p": 0})) == greedy


@pytest.mark.parametrize(
    ("variant", "param"),
    [
        ({"max_tokens": 8.5}, "max_tokens"),
        ({"max_tokens": -3}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"max_tokens": 1e300}, "max_tokens"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": "nan"}, "temperature"),
        ({"top_k": -2}, "top_k"),
        ({"seed": "9" * 40}, "seed"),
        ({"stream": 2}, "stream"),
        ({"model": "another-model"}, "model"),
    ],
    ids=str,
)
def test_values_without_a_meaning_are_refused(live: Live, variant: dict[str, Any], param: str) -> None:
    answer = post(live, {**PLAIN, **variant})
    assert answer.status_code in (400, 404) and answer.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/v1/chat/completions/", "/v1/chat/completions"),
        ("/chat/completions", "/v1/chat/completions"),
        ("/v1/v1/chat/completions", "/v1/chat/completions"),
        ("/completions/", "/v1/completions"),
        ("/v1/models//", "/v1/models"),
        ("/models", "/v1/models"),
        ("/models/a/b", "/v1/models/a/b"),
        ("/health/", "/health"),
        ("/", "/"),
        ("//", "/"),
        ("//v1//chat/completions", "/v1/chat/completions"),
        ("/page/app.js", "/page/app.js"),
        ("/v1/modelsx", "/v1/modelsx"),
    ],
)
def test_paths_as_meant(path: str, meant: str) -> None:
    assert path_meant(path) == meant


def test_variants_of_paths_are_served(live: Live) -> None:
    for path in ("/v1/chat/completions/", "/chat/completions", "/v1/v1/chat/completions"):
        assert text_of(post(live, PLAIN, path)) == text_of(post(live, PLAIN))
    assert httpx.get(f"{live.url}/models/").json() == httpx.get(f"{live.url}/v1/models").json()


def test_head_and_options(live: Live) -> None:
    for path in ("/", "/v1/models", "/health"):
        head, get = httpx.head(live.url + path), httpx.get(live.url + path)
        assert head.status_code == get.status_code == 200 and head.content == b""
        assert head.headers["content-type"] == get.headers["content-type"]
    options = httpx.options(f"{live.url}/v1/chat/completions")
    assert options.status_code == 204 and "POST" in options.headers["allow"]
    assert any(line.split()[1:4] == ["HEAD", "/health", "200"] for line in live.log)


@pytest.mark.parametrize("path", [*OTHER_APIS, "/v1/nowhere", "/nowhere"])
def test_other_apis_are_answered_with_the_next_step(live: Live, path: str) -> None:
    answer = post(live, {}, path)
    assert answer.status_code == 404
    message = answer.json()["error"]["message"]
    assert hint(path) in message and "/v1/" in message
