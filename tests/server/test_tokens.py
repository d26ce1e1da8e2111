"""/tokenize and /detokenize, in llama.cpp's form and vLLM's. Tokens equal those of the model's tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from lowmem.models.dialogue import Message
from lowmem.server.guard import GuardSettings
from tests.server.server_fixture import MODEL, PATIENCE, Live, live_server, oracle

TEXT = "def f(x):\n    return 'é☃' <|end|> x"


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with live_server() as live:
        yield live


def post(live: Live, path: str, **body: Any) -> httpx.Response:
    return httpx.post(live.url + path, json=body, timeout=PATIENCE)


def ids_of(text: str, **options: Any) -> list[int]:
    return list(oracle().loaded.tokenizer(text, **options)["input_ids"])


def test_a_text_in_llama_cpps_form(live: Live) -> None:
    assert post(live, "/tokenize", content=TEXT).json() == {"tokens": ids_of(TEXT, add_special_tokens=False)}
    plain = post(live, "/tokenize", content=TEXT, parse_special=False).json()["tokens"]
    end = oracle().loaded.tokenizer.convert_tokens_to_ids("<|end|>")
    assert end in ids_of(TEXT) and end not in plain
    special = post(live, "/v1/tokenize", content=TEXT, add_special=True).json()
    assert special == {"tokens": ids_of(TEXT)}
    assert post(live, "/tokenize", content="").json() == {"tokens": []}


def test_pieces_make_up_the_text_byte_by_byte(live: Live) -> None:
    pieces = post(live, "/tokenize", content=TEXT, with_pieces=True).json()["tokens"]
    assert [piece["id"] for piece in pieces] == ids_of(TEXT, add_special_tokens=False)
    assert any(isinstance(piece["piece"], list) for piece in pieces), "no token is a part of a character"
    found = [piece["piece"] for piece in pieces]
    assert (
        b"".join(bytes(part) if isinstance(part, list) else part.encode() for part in found).decode() == TEXT
    )


def test_a_text_and_a_conversation_in_vllms_form(live: Live) -> None:
    answer = post(live, "/tokenize", model=MODEL, prompt="def f(x):", return_token_strs=True).json()
    assert answer["tokens"] == ids_of("def f(x):") and answer["count"] == len(answer["tokens"])
    assert answer["max_model_len"] == oracle().context and "".join(answer["token_strs"]) == "def f(x):"
    answer = post(live, "/tokenize", messages=[{"role": "user", "content": "Hi"}]).json()
    assert answer["tokens"] == oracle().encode([Message("user", "Hi")]) and answer["token_strs"] is None


def test_tokens_become_their_text_again(live: Live) -> None:
    answer = post(live, "/detokenize", tokens=ids_of(TEXT), model=MODEL).json()
    assert answer == {"content": TEXT, "prompt": TEXT}
    assert post(live, "/detokenize", tokens=[]).json()["content"] == ""


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "content"),
        ("/tokenize", {"content": "a", "prompt": "b"}, "prompt"),
        ("/tokenize", {"content": 5}, "content"),
        ("/tokenize", {"prompt": "a", "made_up": 1}, "made_up"),
        ("/tokenize", {"prompt": "a", "tools": []}, "tools"),
        ("/tokenize", {"messages": [{"role": "user"}]}, "messages[0].content"),
        ("/detokenize", {"tokens": [4096]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {}, "tokens"),
    ],
)
def test_bad_requests_name_the_field(live: Live, path: str, body: dict[str, Any], param: str) -> None:
    answer = post(live, path, **body)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param


def test_a_key_is_needed() -> None:
    with live_server(guard=GuardSettings(keys=("secret",))) as locked:
        for path in ("/tokenize", "/detokenize", "/v1/responses"):
            assert post(locked, path, content="a").status_code == 401
