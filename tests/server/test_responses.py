"""/v1/responses through OpenAI's client. Answers equal those of the session."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Literal

import httpx
import jsonschema
import openai
import pydantic
import pytest

from lowmem.config import SamplingParams
from lowmem.models.dialogue import Message
from lowmem.server.responses import REFUSED
from tests.server.server_fixture import MODEL, PATIENCE, Live, eventually, live_server, oracle, with_tools

QUESTION = "Write a Python function that reverses a list."
LENGTH = 16
GREEDY = SamplingParams(temperature=0, max_new_tokens=LENGTH)
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
FORMAT = {"format": {"type": "json_schema", "name": "trip", "schema": SCHEMA}}
TOOL = {"type": "function", "name": "weather", "description": "Tells it.", "parameters": SCHEMA}


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with live_server() as live:
        yield live


@pytest.fixture(scope="module")
def hermes() -> Iterator[Live]:
    with live_server(loaded=with_tools()) as live:
        yield live


def ask(live: Live, **options: Any) -> Any:
    fields = {
        "model": MODEL,
        "input": QUESTION,
        "temperature": 0,
        "max_output_tokens": LENGTH,
        "store": False,
        **options,
    }
    return live.client().responses.create(**fields)


def answer_to(*messages: Message) -> str:
    return oracle().complete(list(messages), GREEDY).text.removeprefix("\n")


def test_a_text_is_answered_as_the_session_does(live: Live) -> None:
    response = ask(live, metadata={"a": "b"}, user="me", truncation="disabled")
    assert response.output_text == answer_to(Message("user", QUESTION))
    assert response.status == "incomplete" and response.incomplete_details.reason == "max_output_tokens"
    assert response.object == "response" and response.model == MODEL and response.metadata == {"a": "b"}
    (message,) = response.output
    assert message.role == "assistant" and message.content[0].annotations == []
    usage = response.usage
    assert usage.input_tokens == oracle().count([Message("user", QUESTION)])
    assert usage.output_tokens == LENGTH and usage.total_tokens == usage.input_tokens + LENGTH


def test_a_conversation_with_instructions_and_its_own_answers(live: Live) -> None:
    first = ask(live, instructions="Be brief.")
    assert first.output_text == answer_to(Message("system", "Be brief."), Message("user", QUESTION))
    items = [
        {"role": "user", "content": QUESTION},
        *(item.model_dump() for item in first.output),
        {"role": "user", "type": "message", "content": [{"type": "input_text", "text": "Shorter"}]},
    ]
    second = ask(live, instructions="Be brief.", input=items)
    assert second.output_text == answer_to(
        Message("system", "Be brief."),
        Message("user", QUESTION),
        Message("assistant", first.output_text),
        Message("user", "Shorter"),
    )


def test_a_stream_gives_the_typed_events_in_order(live: Live) -> None:
    events = list(ask(live, stream=True, stream_options={"include_obfuscation": False}))
    kinds = [event.type for event in events]
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * len(deltas),
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert len(deltas) > 2, "the text was not streamed"
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = answer_to(Message("user", QUESTION))
    last = events[-1].response
    assert "".join(deltas) == events[-4].text == last.output_text == text
    assert last.usage.output_tokens == LENGTH and last.id == events[0].response.id
    assert {event.item_id for event in events[3:-3]} == {last.output[0].id}
    for event in events:  # every field that the client's types require is there
        type(event).model_validate(event.model_dump(warnings=False))


def test_the_clients_stream_helper_reads_it(live: Live) -> None:
    text, stop, _ = answer_to(Message("user", QUESTION)).partition("python")
    asked = live.client().responses.stream(
        model=MODEL, input=QUESTION, temperature=0, extra_body={"stop": [stop]}
    )
    with asked as stream:
        final = stream.get_final_response()
    assert (
        stop
        and final.output_text == text
        and final.status == "completed"
        and final.incomplete_details is None
    )


def test_the_events_are_named(live: Live) -> None:
    body = {"input": "Hi", "stream": True, "max_output_tokens": 2}
    with httpx.stream("POST", f"{live.url}/responses", json=body, timeout=PATIENCE) as answer:
        lines = [line for line in answer.iter_lines() if line]
    for name, data in zip(lines[::2], lines[1::2], strict=True):
        assert name == f"event: {json.loads(data.removeprefix('data: '))['type']}"


def calls_of(response: Any) -> list[tuple[str, Any]]:
    return [(one.name, json.loads(one.arguments)) for one in response.output if one.type == "function_call"]


def check_events(events: list[Any]) -> None:
    """Items come one after the other, each complete, and the last response has them."""
    last = events[-1].response
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert [item.id for item in done] == [item.id for item in last.output]
    for at, item in enumerate(last.output):
        own = [event for event in events if getattr(event, "output_index", None) == at]
        assert own[0].type == "response.output_item.added" and own[-1].type == "response.output_item.done"
        deltas = "".join(event.delta for event in own if event.type.endswith(".delta"))
        assert deltas == (item.arguments if item.type == "function_call" else item.content[0].text)
        assert {event.item_id for event in own[1:-1]} == {item.id}
    for event in events:
        type(event).model_validate(event.model_dump(warnings=False))


def test_a_loop_with_tools(live: Live, hermes: Live) -> None:
    """A forced call, its result, and an answer by a schema, whole and streamed."""
    for server in (live, hermes):
        for choice in ("required", {"type": "function", "name": "weather"}):
            items: list[Any] = [{"role": "user", "content": QUESTION}]
            fields = {"tools": [TOOL], "tool_choice": choice, "max_output_tokens": 80}
            first = ask(server, input=items, **fields)
            events = list(ask(server, input=items, **fields, stream=True))
            check_events(events)
            assert calls_of(first) == calls_of(events[-1].response)
            ((name, arguments),) = calls_of(first)
            jsonschema.validate(arguments, SCHEMA)
            assert name == "weather" and first.status == "completed" and first.tools[0].name == name
            (call,) = first.output
            items += [call.model_dump(exclude_none=True)]
            items += [{"type": "function_call_output", "call_id": call.call_id, "output": "Sunny"}]
            last = ask(server, input=items, tools=[TOOL], text=FORMAT, max_output_tokens=60)
            jsonschema.validate(json.loads(last.output_text), SCHEMA)
            assert last.usage.input_tokens > 10 + oracle().count([Message("user", QUESTION)])


def test_words_and_calls_are_items_of_their_own(hermes: Live) -> None:
    """The model is made to write its own call format by a grammar."""
    call = '{"name": "weather", "arguments": {"city": "Oslo", "days": 3}}'
    pattern = re.escape(f"Wait.\n<tool_call>\n{call}\n</tool_call>\n<tool_call>\n{call}\n</tool_call>")
    for parallel in (True, False):
        fields = {
            "tools": [TOOL],
            "parallel_tool_calls": parallel,
            "max_output_tokens": 200,
            "extra_body": {"guided_regex": pattern},
        }
        events = list(ask(hermes, **fields, stream=True))
        check_events(events)
        for response in (ask(hermes, **fields), events[-1].response):
            kinds = [item.type for item in response.output]
            assert kinds == ["message", *["function_call"] * (2 if parallel else 1)]
            assert response.output_text.strip() == "Wait."
            assert calls_of(response)[0] == ("weather", {"city": "Oslo", "days": 3})
            assert response.parallel_tool_calls == parallel


def test_a_call_that_is_cut_is_incomplete(live: Live) -> None:
    fields = {"tools": [TOOL], "tool_choice": "required", "max_output_tokens": 6}
    events = list(ask(live, **fields, stream=True))
    check_events(events)
    for response in (ask(live, **fields), events[-1].response):
        assert response.status == "incomplete"
        assert all(item.status == "incomplete" for item in response.output[-1:])


def test_the_client_parses_a_model_of_pydantic(live: Live) -> None:
    class Trip(pydantic.BaseModel):
        city: Literal["Oslo", "Rome"]
        days: int

    response = live.client().responses.parse(
        model=MODEL, input=QUESTION, text_format=Trip, temperature=0, max_output_tokens=60
    )
    assert isinstance(response.output_parsed, Trip)
    for given in ({"type": "json_object"}, {"type": "text"}):
        response = ask(live, text={"format": given, "verbosity": "medium"})
        assert response.output_text.startswith("{") == (given["type"] == "json_object")


ASKS: dict[str, Any] = {
    "background": True,
    "include": ["message.output_text.logprobs"],
    "truncation": "auto",
    "top_logprobs": 2,
    "n": 2,
    "max_tokens": 5,
    "n_predict": 5,
    "max_completion_tokens": 5,
    "messages": [{"role": "user", "content": "Hi"}],
}


@pytest.mark.parametrize("name", [name for row in REFUSED for name in row.names])
def test_what_is_not_here_is_refused_with_the_next_step(live: Live, name: str) -> None:
    body = {"input": "Hi", "max_output_tokens": 1, name: ASKS.get(name, "x")}
    answer = httpx.post(f"{live.url}/v1/responses", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, name, "unsupported_parameter")
    row = next(row for row in REFUSED if name in row.names)
    assert row.advice in error["message"]
    for value in (None, *row.neutral):
        assert httpx.post(f"{live.url}/v1/responses", json={**body, name: value}).status_code == 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input[0].type"),
        ({"input": [{"type": "function_call", "arguments": "{}"}]}, "input[0].name"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id"),
        ({"input": [{"type": "function_call_output", "call_id": "x"}]}, "input[0].output"),
        (
            {
                "instructions": "x",
                "input": [
                    {"role": "assistant", "content": "y"},
                    {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
                    {"type": "function_call_output", "call_id": "1", "output": [{"type": "input_image"}]},
                ],
            },
            "input[2].content[0]",
        ),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [{"type": "function", "name": "f", "parameters": [1]}]}, "tools[0].parameters"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "tools": []}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "g"}}, "tool_choice"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text"),
        ({"text": {"format": {"type": "grammar"}}}, "text"),
        ({"text": {"verbosity": "low"}}, "verbosity"),
        ({"text": {"format": {"type": "json_object"}}, "response_format": {"type": "json_object"}}, "text"),
        ({"input": [{"role": "user", "content": "a"}, {"role": "bard", "content": "b"}]}, "input[1].role"),
        ({"instructions": "x", "input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]"),
        ({"input": "word " * 20_000}, "input"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"made_up": 1}, "made_up"),
        ({"reasoning": {"effort": "high"}}, "reasoning"),
    ],
)
def test_bad_requests_name_the_field(live: Live, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        live.client().post("/responses", body={"input": "Hi", **fields}, cast_to=object)
    assert caught.value.param == param and "messages[" not in caught.value.message
    assert "response_format.json" not in caught.value.message and '"function":' not in caught.value.message


def test_nothing_is_kept(live: Live) -> None:
    with pytest.raises(openai.NotFoundError, match="not kept"):
        live.client().responses.retrieve("resp_1")


def test_an_answer_ends_when_the_client_leaves(live: Live) -> None:
    before = live.worker.counts.cancelled
    live.gate.close(at=3)
    stream = ask(live, stream=True, max_output_tokens=500)
    live.gate.wait_until_held()
    next(iter(stream))
    stream.close()
    live.gate.open()
    eventually(lambda: live.worker.counts.cancelled == before + 1)
