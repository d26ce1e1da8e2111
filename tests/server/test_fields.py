"""The table of request fields: every one is tried in a live server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from lowmem.server.fields import ACCEPTED, CHAT, REFUSED, TEXT
from lowmem.server.protocol import ChatRequest, CompletionRequest
from tests.docs.fields import FILE, page
from tests.server.server_fixture import MODEL, PATIENCE, Live, live_server

BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "Hi"}]},
    TEXT: {"prompt": "def f("},
}
ASKS = [True, False, 0, -1, 0.5, 1, 3, "x", ["x"], {"x": 1}, [5]]
"""Values of which each refused field must refuse at least one."""


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with live_server() as live:
        yield live


CLIENT = httpx.Client(timeout=PATIENCE)


def post(live: Live, to: str, **fields: Any) -> httpx.Response:
    body = {"model": MODEL, "max_tokens": 1, "temperature": 0, **BODIES[to], **fields}
    return CLIENT.post(live.url + to, json=body)


def error(answer: httpx.Response) -> tuple[int, str | None, str | None]:
    found = answer.json()["error"]
    return answer.status_code, found["param"], found["code"]


REFUSED_ON = [(row, route, name) for row in REFUSED for route in row.routes for name in row.names]
ACCEPTED_ON = [(route, name) for row in ACCEPTED for route in row.routes for name in row.names]


@pytest.mark.parametrize("route", [CHAT, TEXT])
def test_no_field_stands_twice(route: str) -> None:
    schema = ChatRequest if route == CHAT else CompletionRequest
    names = [name for _, at, name in REFUSED_ON if at == route]
    names += [name for at, name in ACCEPTED_ON if at == route] + list(schema.model_fields)
    assert len(names) == len(set(names))


def test_every_refused_field_is_refused_by_name_with_the_next_step(live: Live) -> None:
    for row, route, name in REFUSED_ON:
        if name in BODIES[CHAT] or name in BODIES[TEXT]:
            asks: list[Any] = [BODIES[TEXT if route == CHAT else CHAT][name]]
        else:
            asks = [value for value in ASKS if not row.asks_nothing(value)]
        assert asks, name
        for value in asks[:3]:
            answer = post(live, route, **{name: value})
            assert error(answer) == (400, name, "unsupported_parameter"), (route, name, value)
            message = answer.json()["error"]["message"]
            assert message.startswith(f"{name} is not supported") and row.advice in message


def test_values_that_ask_for_nothing_pass(live: Live) -> None:
    for route in (CHAT, TEXT):
        plain = post(live, route).json()["choices"]
        rows = [(row, name) for row, at, name in REFUSED_ON if at == route and name not in BODIES[route]]
        for number in range(max(len(row.neutral) for row, _ in rows)):
            fields = {name: row.neutral[number % len(row.neutral)] for row, name in rows if row.neutral}
            assert post(live, route, **fields).json()["choices"] == plain
        for empty in (None, "", [], {}):
            answer = post(live, route, **{name: empty for _, name in rows})
            assert answer.status_code == 200 and answer.json()["choices"] == plain, (
                answer.text,
                live.log[-2:],
            )


def test_fields_that_change_no_answer_are_accepted(live: Live) -> None:
    for route in (CHAT, TEXT):
        names = [name for at, name in ACCEPTED_ON if at == route]
        for value in (True, "x", 7, {"a": 1}):
            answer = post(live, route, **dict.fromkeys(names, value))
            assert answer.status_code == 200, answer.text
            assert answer.json()["choices"] == post(live, route).json()["choices"]


def test_an_unknown_field_is_refused_and_null_is_not(live: Live) -> None:
    answer = post(live, CHAT, made_up=1)
    assert error(answer) == (400, "made_up", "unknown_parameter")
    assert "--ignore-field" in answer.json()["error"]["message"]
    assert post(live, CHAT, made_up=None).status_code == 200


def test_a_field_that_the_server_was_told_to_ignore_passes() -> None:
    with live_server(ignored=("made_up", "ignore_eos")) as live:
        assert post(live, CHAT, made_up=1, ignore_eos=True).status_code == 200
        assert error(post(live, CHAT, other=1))[1] == "other"


# What each used field does: a value that changes the answer of its route.
EFFECTS: dict[str, dict[str, Any]] = {
    "stop": {"stop": "e"},
    "n": {"n": 2},
    "max_tokens": {"max_tokens": 2},
    "n_predict": {"max_tokens": None, "n_predict": 2},
    "temperature": {"temperature": 2, "seed": 3, "top_k": 0, "top_p": 1},
    "top_p": {"temperature": 2, "seed": 3, "top_p": 0.01, "top_k": 0},
    "top_k": {"temperature": 2, "seed": 3, "top_k": 1, "top_p": 1},
    "min_p": {"temperature": 2, "seed": 3, "min_p": 1, "top_k": 0, "top_p": 1},
    "repetition_penalty": {"repetition_penalty": 50},
    "presence_penalty": {"presence_penalty": 2, "max_tokens": 60},
    "frequency_penalty": {"frequency_penalty": 2, "max_tokens": 60},
    "logit_bias": {"logit_bias": {str(token): 100 for token in (300, 301)}},
    "seed": {"temperature": 2, "seed": 4, "top_k": 0, "top_p": 1},
}


@pytest.mark.parametrize("name", EFFECTS)
def test_used_fields_change_the_answer(live: Live, name: str) -> None:
    fields = {"max_tokens": 12, **EFFECTS[name]}
    without = {key: value for key, value in fields.items() if key != name}
    if name == "seed":
        without["seed"] = 5
    for route in (CHAT, TEXT):
        changed, plain = (post(live, route, **each).json()["choices"] for each in (fields, without))
        assert changed != plain, route


def test_the_tables_of_the_documents_are_todays() -> None:
    text = FILE.read_text()
    assert text == page(text), "run python -m tests.docs.fields"
