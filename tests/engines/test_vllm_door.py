"""The layer around vLLM's application: hosts, origins, keys, sizes, and the trimmed line end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from lowmem.engines.vllm_command import copy_door
from lowmem.engines.vllm_door import VARIABLE, Door

KEY = "0123456789abcdef"
CHAT = "/v1/chat/completions"
CHUNKS = ["", "\n", "one", " two"]


def choice(key: str, text: str, index: int = 0) -> dict[str, Any]:
    return {"index": index, key: {"role": "assistant", "content": text}}


async def chat(request: Request) -> Response:
    body = await request.json()
    if not body.get("stream"):
        choices = [choice("message", body["text"]), choice("message", body["text"], 1)]
        return JSONResponse({"id": "é", "choices": choices})
    events = [f"data: {json.dumps({'choices': [choice('delta', text)]})}\n\n" for text in CHUNKS]
    text = "".join([*events, "data: [DONE]\n\n"])

    async def pieces() -> Any:
        for at in range(0, len(text), 7):  # cut anywhere
            yield text[at : at + 7]

    return StreamingResponse(pieces(), media_type="text/event-stream")


async def echo(request: Request) -> Response:
    return Response(await request.body())


def client(monkeypatch: pytest.MonkeyPatch, base: str = "http://localhost", **rules: Any) -> TestClient:
    full = {"keys": [], "hosts": [], "origins": [], "max_body": 1000, "trims": True, **rules}
    monkeypatch.setenv(VARIABLE, json.dumps(full))
    routes = [
        Route(path, echo, methods=["GET", "POST"]) for path in ("/health", "/invocations", "/v1/models")
    ]
    app = Starlette(routes=[*routes, Route(CHAT, chat, methods=["POST"])])
    app.add_middleware(Door)
    return TestClient(app, base_url=base)


def test_every_path_but_health_needs_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = client(monkeypatch, keys=[KEY, "another-key"])
    assert asked.get("/health").status_code == 200
    for path in ("/invocations", "/v1/models", CHAT):
        assert asked.post(path).status_code == 401
    assert asked.post("/health").status_code == 401
    for key in (KEY, "another-key"):
        assert asked.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 200
    wrong = asked.get("/v1/models", headers={"Authorization": "Bearer no"})
    assert wrong.status_code == 401 and wrong.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:8000", "localhost:", "127.0.0.1:1", "[::1]:8000", "Box.LAN"]
)
def test_own_names(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = client(monkeypatch, hosts=["box.lan"])
    assert asked.get("/v1/models", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.com", "box.lan.evil.com", "localhost@evil.com", "", "a b"])
def test_other_names_are_refused(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = client(monkeypatch, hosts=["box.lan"]).get("/health", headers={"Host": host})
    assert refused.status_code == 403 and "--allow-host" in refused.json()["error"]["message"]


def test_pages_of_other_origins_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = client(monkeypatch, origins=["http://app"])
    for origin, status in (
        ("http://app", 200),
        ("http://localhost", 200),
        ("http://evil", 403),
        ("null", 403),
    ):
        assert asked.post("/invocations", headers={"Origin": origin}).status_code == status
    assert client(monkeypatch, origins=["*"]).post("/invocations", headers={"Origin": "x"}).status_code == 200


def test_large_bodies_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = client(monkeypatch)
    assert asked.post("/invocations", content=b"x" * 1000).content == b"x" * 1000
    assert asked.post("/invocations", content=b"x" * 1001).status_code == 413
    assert asked.post("/invocations", content=iter([b"x" * 600] * 2)).status_code == 413


def test_a_large_body_in_parts_is_refused_where_fastapi_answers_errors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    application = FastAPI()

    @application.post("/parsed")
    def parsed(body: dict[str, Any]) -> dict[str, Any]:
        return body

    rules = {"hosts": ["testserver"], "keys": [], "origins": [], "max_body": 1000}
    monkeypatch.setenv(VARIABLE, json.dumps(rules))
    asked = TestClient(Door(application))
    headers = {"Content-Type": "application/json"}
    assert asked.post("/parsed", content=iter([b'{"a": ', b"1}"]), headers=headers).json() == {"a": 1}
    refused = asked.post("/parsed", content=iter([b'{"a": ', b"1" * 1000, b"}"]), headers=headers)
    assert refused.status_code == 413 and refused.json()["error"]["code"] == "request_too_large"


@pytest.mark.parametrize(
    ("text", "wanted"), [("\none", "one"), ("\n\none", "\none"), ("one\n", "one\n"), ("", "")]
)
def test_a_whole_answer_loses_one_line_end(text: str, wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = client(monkeypatch).post(CHAT, json={"text": text})
    assert [c["message"]["content"] for c in answer.json()["choices"]] == [wanted] * 2
    assert answer.json()["id"] == "é" and int(answer.headers["content-length"]) == len(answer.content)
    kept = client(monkeypatch, trims=False).post(CHAT, json={"text": text})
    assert kept.json()["choices"][0]["message"]["content"] == text


def test_a_streamed_answer_loses_one_line_end(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = client(monkeypatch).post(CHAT, json={"stream": True})
    lines = [line for line in answer.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    texts = [json.loads(line[6:])["choices"][0]["delta"]["content"] for line in lines[:-1]]
    assert texts == ["", "", "one", " two"]


def test_what_vllm_imports_needs_no_lowmem(tmp_path: Path) -> None:
    copy_door(tmp_path)
    import subprocess
    import sys

    command = [
        sys.executable,
        "-S",
        "-c",
        "import lowmem_door.engines.vllm_door, sys; print('lowmem' in sys.modules)",
    ]
    done = subprocess.run(command, cwd=tmp_path, env={}, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
