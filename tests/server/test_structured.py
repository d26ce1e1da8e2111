"""Structured output and tools, asked for through the live server by OpenAI's client."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import openai
import pytest

from lowmem.server.fields import CHAT, TEXT
from tests.server.server_fixture import MODEL, PATIENCE, Live, live_server, with_tools

SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"$ref": "#/$defs/days"}},
    "required": ["city", "days"],
    "additionalProperties": False,
    "$defs": {"days": {"type": "integer", "minimum": 1, "maximum": 9}},
}
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "Forecast", "parameters": SCHEMA},
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
USER = {"role": "user", "content": "What is the weather?"}
BODIES: dict[str, dict[str, Any]] = {CHAT: {"messages": [USER]}, TEXT: {"prompt": "def f("}}
CLIENT = httpx.Client(timeout=PATIENCE)


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with live_server() as live:
        yield live


@pytest.fixture(scope="module")
def hermes() -> Iterator[Live]:
    with live_server(loaded=with_tools()) as live:
        yield live


def post(live: Live, to: str = CHAT, **fields: Any) -> httpx.Response:
    body = {"model": MODEL, "max_tokens": 60, "temperature": 0, **BODIES[to], **fields}
    return CLIENT.post(live.url + to, json=body)


def text_of(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    assert choice["finish_reason"] == "stop"
    return str(choice["text"] if "text" in choice else choice["message"]["content"])


FORMATS: list[tuple[dict[str, Any], Any]] = [
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}}, SCHEMA),
    ({"response_format": {"type": "json_schema", "schema": SCHEMA}}, SCHEMA),
    ({"response_format": {"type": "json_object", "schema": SCHEMA}}, SCHEMA),
    ({"structured_outputs": {"json": SCHEMA, "regex": None}}, SCHEMA),
    ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, SCHEMA),
    ({"structured_outputs": {"regex": "[a-c]{3}"}}, "[a-c]{3}"),
    ({"structured_outputs": {"choice": ["yes", "no"]}}, "yes|no"),
    ({"structured_outputs": {"grammar": 'root ::= "a" [0-9]'}}, "a[0-9]"),
    ({"structured_outputs": {"grammar": 'start: "a" /[0-9]/'}}, "a[0-9]"),
    ({"guided_json": SCHEMA}, SCHEMA),
    ({"guided_regex": "[0-9]{4}"}, "[0-9]{4}"),
    ({"guided_choice": ["red", "blue"], "guided_decoding_backend": "guidance"}, "red|blue"),
    ({"guided_grammar": 'start: "x"'}, "x"),
    ({"json_schema": SCHEMA}, SCHEMA),
    ({"grammar": 'root ::= "yes" | "no"'}, "yes|no"),
]


@pytest.mark.parametrize(("fields", "what"), FORMATS, ids=[str(fields)[:60] for fields, _ in FORMATS])
def test_answers_have_the_format(live: Live, fields: dict[str, Any], what: Any) -> None:
    for route in (CHAT, TEXT):
        text = text_of(post(live, route, **fields))
        if isinstance(what, str):
            assert re.fullmatch(what, text), text
        else:
            jsonschema.validate(json.loads(text), what)


def test_a_json_object_is_one_or_was_cut(live: Live) -> None:
    for fields in (
        {"response_format": {"type": "json_object"}},
        {"structured_outputs": {"json_object": True}},
    ):
        (choice,) = post(live, **fields, temperature=1, seed=3).json()["choices"]
        if choice["finish_reason"] == "stop":
            assert isinstance(json.loads(choice["message"]["content"]), dict)
        assert choice["message"]["content"].startswith("{")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}},
            "response_format",
        ),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "structural_tag"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "schema": [1]}}, "response_format"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs"),
        ({"structured_outputs": {"whitespace_pattern": " "}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"structured_outputs": {"choice": "ab"}}, "structured_outputs.choice"),
        ({"guided_regex": "a", "grammar": 'root ::= "a"'}, "grammar"),
        ({"grammar": "root ::= ("}, "grammar"),
        ({"guided_choice": ["a" * 300_000]}, "guided_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {}}], "tool_choice": "required"}, "tools"),
        (
            {
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}],
                "tool_choice": "required",
            },
            "tools",
        ),
        ({"tools": [WEATHER], "tool_choice": "required", "guided_regex": "a"}, "tool_choice"),
    ],
    ids=str,
)
def test_what_cannot_be_obeyed_is_refused_by_name(live: Live, fields: dict[str, Any], param: str) -> None:
    answer = post(live, **fields)
    found = answer.json()["error"]
    assert (answer.status_code, found["param"]) == (400, param), found
    assert "\n" not in found["message"]
    assert text_of(post(live, guided_choice=["ok"])) == "ok"  # the next request is answered


def called(choice: Any) -> list[tuple[str, Any]]:
    return [(call.function.name, json.loads(call.function.arguments)) for call in choice.message.tool_calls]


@pytest.mark.parametrize("tools", [[WEATHER], [CLOCK, WEATHER]], ids=len)
@pytest.mark.parametrize("named", [True, False])
def test_a_forced_call(live: Live, hermes: Live, tools: list[Any], named: bool) -> None:
    choice: Any = {"type": "function", "function": {"name": "weather"}} if named else "required"
    for server in (live, hermes):
        for stream in (False, True):
            asked: dict[str, Any] = {
                "model": MODEL,
                "messages": [USER],
                "tools": tools,
                "tool_choice": choice,
            }
            asked |= {"temperature": 1, "seed": 4, "max_tokens": 80}
            if stream:
                with server.client().chat.completions.stream(**asked) as events:
                    answer: Any = events.get_final_completion()
            else:
                answer = server.client().chat.completions.create(**asked)
            (found,) = answer.choices
            ((name, arguments),) = called(found)
            assert found.finish_reason == "tool_calls" and not found.message.content
            assert name == "weather" if named else name in ("weather", "clock")
            jsonschema.validate(arguments, SCHEMA if name == "weather" else {"type": "object"})


def test_a_call_in_words_is_found_in_the_stream(hermes: Live) -> None:
    """The model is made to write its own call format by a grammar, with tool_choice auto."""
    call = '{"name": "weather", "arguments": {"city": "Oslo", "days": 3}}'
    pattern = re.escape(f"Wait.\n<tool_call>\n{call}\n</tool_call>\n<tool_call>\n{call}\n</tool_call>")
    for stream in (False, True):
        for parallel in (True, False):
            asked: dict[str, Any] = {
                "model": MODEL,
                "messages": [USER],
                "tools": [WEATHER],
                "max_tokens": 200,
            }
            asked |= {"parallel_tool_calls": parallel, "extra_body": {"guided_regex": pattern}}
            if stream:
                with hermes.client().chat.completions.stream(**asked) as events:
                    answer: Any = events.get_final_completion()
            else:
                answer = hermes.client().chat.completions.create(**asked)
            (found,) = answer.choices
            assert called(found) == [("weather", {"city": "Oslo", "days": 3})] * (2 if parallel else 1)
            assert found.finish_reason == "tool_calls" and found.message.content.strip() == "Wait."
            assert len({call.id for call in found.message.tool_calls}) == len(found.message.tool_calls)


def test_no_call_is_looked_for_unless_tools_may_be_called(hermes: Live, live: Live) -> None:
    call = '<tool_call>{"name": "clock", "arguments": {}}</tool_call>'
    for server, fields in (
        (hermes, {"tools": [CLOCK], "tool_choice": "none"}),
        (hermes, {}),
        (live, {"tools": [CLOCK]}),
    ):
        assert text_of(post(server, **fields, guided_choice=[call])) == call


def test_a_loop_with_tools(live: Live, hermes: Live) -> None:
    """Call, result, answer: as agents do it with OpenAI's client."""
    for server in (live, hermes):
        client, messages = server.client(), [USER]
        first = client.chat.completions.create(
            model=MODEL,
            messages=messages,
            tools=[WEATHER],
            tool_choice="required",
            max_tokens=80,  # type: ignore[arg-type]
        ).choices[0]
        assert first.message.tool_calls
        messages.append(first.message.model_dump(exclude_none=True))
        (call,) = first.message.tool_calls
        messages.append({"role": "tool", "tool_call_id": call.id, "content": "Sunny"})
        last = client.chat.completions.create(
            model=MODEL,
            messages=messages,  # type: ignore[arg-type]
            tools=[WEATHER],  # type: ignore[list-item]
            max_tokens=60,
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
        ).choices[0]
        assert last.finish_reason == "stop"
        jsonschema.validate(json.loads(last.message.content or ""), SCHEMA)


def test_the_same_answer_streamed_and_at_once(live: Live) -> None:
    fields: dict[str, Any] = {"json_schema": SCHEMA, "seed": 5, "temperature": 1}
    whole = text_of(post(live, **fields))
    client: openai.OpenAI = live.client()
    chunks = client.chat.completions.create(
        model=MODEL,
        messages=[USER],  # type: ignore[list-item]
        stream=True,
        max_tokens=60,
        seed=5,
        temperature=1,
        extra_body={"json_schema": SCHEMA},
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole


@pytest.mark.slow
def test_pydantic_ai_gets_its_output_type(live: Live, hermes: Live) -> None:
    """An agent with a typed output, which pydantic-ai asks for as a forced call or as a JSON schema.

    Through chat completions and through responses.
    """
    pydantic_ai = pytest.importorskip("pydantic_ai")
    from pydantic import BaseModel, Field
    from pydantic_ai import NativeOutput
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
    from pydantic_ai.providers.openai import OpenAIProvider

    class Trip(BaseModel):
        city: str = Field(max_length=12)
        days: int = Field(ge=1, le=9)

    for server in (live, hermes):
        provider = OpenAIProvider(base_url=f"{server.url}/v1", api_key="none")
        for kind in (OpenAIChatModel, OpenAIResponsesModel):
            for output in (Trip, NativeOutput(Trip)):
                model = kind(MODEL, provider=provider)
                agent = pydantic_ai.Agent(
                    model, output_type=output, model_settings={"max_tokens": 120, "seed": 1}
                )
                assert isinstance(agent.run_sync("Plan a trip").output, Trip)
