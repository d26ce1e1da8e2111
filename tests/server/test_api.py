"""The API through OpenAI's client. Answers equal those of the session."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from lowmem.config import SamplingParams
from lowmem.models.dialogue import Message
from lowmem.session import join
from tests.server.server_fixture import MODEL, Live, live_server, oracle

QUESTION = "Write a Python function that reverses a list."
GREEDY = SamplingParams(temperature=0, max_new_tokens=24)
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with live_server() as live:
        yield live


@pytest.fixture(scope="module")
def client(live: Live) -> openai.OpenAI:
    return live.client()


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def chat(client: openai.OpenAI, text: str = QUESTION, **options: Any) -> Any:
    return client.chat.completions.create(
        **{"model": MODEL, "messages": user(text), "temperature": 0, "max_tokens": 24, **options}
    )


def complete(client: openai.OpenAI, prompt: Any, **options: Any) -> Any:
    return client.completions.create(
        **{"model": MODEL, "prompt": prompt, "temperature": 0, "max_tokens": 24, **options}
    )


def answer_to(text: str, params: SamplingParams = GREEDY) -> str:
    """The answer of the session, without the newline that its template puts before an answer."""
    return oracle().complete([Message("user", text)], params).text.removeprefix("\n")


def test_models_lists_each_name_of_the_model(client: openai.OpenAI) -> None:
    (card,) = client.models.list().data
    assert card.id == MODEL and card.object == "model"
    assert client.models.retrieve(MODEL) == card
    assert card.model_extra == {"max_model_len": oracle().context}


def test_a_chat_answers_as_the_session_does(client: openai.OpenAI) -> None:
    answer = chat(client)
    (choice,) = answer.choices
    assert choice.message.content == answer_to(QUESTION)
    assert choice.message.role == "assistant" and choice.finish_reason == "length" and choice.logprobs is None
    assert answer.object == "chat.completion" and answer.model == MODEL
    assert answer.usage.prompt_tokens == oracle().count([Message("user", QUESTION)])
    assert answer.usage.completion_tokens == 24
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 24


def test_a_stream_gives_role_text_reason_and_usage_in_this_order(client: openai.OpenAI) -> None:
    chunks = list(chat(client, max_tokens=200, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len({chunk.id for chunk in chunks}) == 1
    *texts, last, usage = chunks
    assert len(texts) > 3, "the text was not streamed"
    assert all(chunk.choices[0].finish_reason is None and chunk.usage is None for chunk in texts)
    assert last.choices[0].finish_reason == "length" and not last.choices[0].delta.content
    assert usage.choices == [] and usage.usage.completion_tokens == 200
    text = "".join(chunk.choices[0].delta.content or "" for chunk in texts)
    assert text == answer_to(QUESTION, SamplingParams(temperature=0, max_new_tokens=200))


def test_a_stream_without_usage_has_none_and_ends_with_done(live: Live) -> None:
    body = {"model": MODEL, "messages": user("Hi"), "stream": True, "max_tokens": 3, "temperature": 0}
    answer = httpx.post(f"{live.url}/v1/chat/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    assert all("usage" not in json.loads(event) for event in events[:-1])


def test_completions_continue_texts_lists_and_token_ids(client: openai.OpenAI) -> None:
    first, second = "def add(a, b):\n", "import os\n"
    texts = [oracle().complete(text, GREEDY, raw=True).text for text in (first, second)]
    ids = [oracle().encode(text, raw=True) for text in (first, second)]
    assert complete(client, first).choices[0].text == texts[0]
    both = complete(client, [first, second])
    assert [choice.text for choice in both.choices] == texts
    assert [choice.index for choice in both.choices] == [0, 1]
    assert both.usage.prompt_tokens == len(ids[0]) + len(ids[1])
    assert complete(client, ids[0]).choices[0].text == texts[0]
    assert [choice.text for choice in complete(client, ids).choices] == texts


def test_completions_stream_and_echo(client: openai.OpenAI) -> None:
    prompt = "def add(a, b):\n"
    text = oracle().complete(prompt, GREEDY, raw=True).text
    chunks = list(complete(client, prompt, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == text
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert complete(client, prompt, echo=True).choices[0].text == prompt + text
    echoed = "".join(chunk.choices[0].text for chunk in complete(client, prompt, echo=True, stream=True))
    assert echoed == prompt + text
    ids = oracle().encode(prompt, raw=True)
    assert complete(client, ids, echo=True).choices[0].text == prompt + text


def test_completions_default_to_sixteen_tokens(client: openai.OpenAI) -> None:
    assert complete(client, "import", max_tokens=openai.omit).usage.completion_tokens == 16


def test_a_suffix_fills_in_the_middle(client: openai.OpenAI) -> None:
    prefix, suffix = "def add(a, b):\n    return ", "\n\nprint(add(1, 2))\n"
    expected = join(oracle().fill_in(prefix, suffix, GREEDY))
    answer = complete(client, prefix, suffix=suffix)
    assert answer.choices[0].text == expected.text
    assert answer.usage.prompt_tokens == expected.prompt_tokens
    assert expected.text != oracle().complete(prefix, GREEDY, raw=True).text
    streamed = "".join(c.choices[0].text for c in complete(client, prefix, suffix=suffix, stream=True))
    assert streamed == expected.text


def test_stop_texts_end_an_answer_and_are_left_out(client: openai.OpenAI) -> None:
    whole = answer_to(QUESTION)
    stop = whole[10:13]
    before = whole[: whole.index(stop)]
    for given in (stop, [stop], ["never there", stop]):
        choice = chat(client, stop=given).choices[0]
        assert choice.message.content == before and choice.finish_reason == "stop"
    chunks = list(chat(client, stop=stop, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == before


def test_a_seed_repeats_an_answer_and_choices_use_the_following_seeds(client: openai.OpenAI) -> None:
    warm: dict[str, Any] = {"temperature": 1.5, "top_p": 1.0, "max_tokens": 12}
    texts = [choice.message.content for choice in chat(client, n=3, seed=7, **warm).choices]
    alone = [chat(client, seed=seed, **warm) for seed in (7, 8, 9)]
    assert texts == [answer.choices[0].message.content for answer in alone]
    assert len(set(texts)) == 3
    several = chat(client, n=3, seed=7, **warm)
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert several.usage.prompt_tokens == alone[0].usage.prompt_tokens
    assert several.usage.completion_tokens == sum(answer.usage.completion_tokens for answer in alone)
    chunks = [c for c in chat(client, n=3, seed=7, stream=True, **warm) if c.choices]
    for index, text in enumerate(texts):
        own = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert own[0].delta.role == "assistant"
        assert "".join(choice.delta.content or "" for choice in own) == text


def test_sampling_settings_reach_the_session(client: openai.OpenAI) -> None:
    params = SamplingParams(
        12, temperature=1.3, top_k=7, top_p=0.8, min_p=0.01, repetition_penalty=1.2, seed=5
    )
    extras = {"top_k": 7, "min_p": 0.01, "repetition_penalty": 1.2}
    answer = chat(client, temperature=1.3, top_p=0.8, seed=5, max_tokens=12, extra_body=extras)
    assert answer.choices[0].message.content == answer_to(QUESTION, params)
    card = chat(client, seed=3, temperature=openai.omit, max_tokens=openai.omit, max_completion_tokens=12)
    assert card.choices[0].message.content == answer_to(QUESTION, SamplingParams(12, seed=3))


def test_chat_logprobs_equal_those_of_the_session(client: openai.OpenAI) -> None:
    expected = (
        oracle().complete([Message("user", QUESTION)], SamplingParams(8, temperature=0, logprobs=3)).logprobs
    )
    assert expected is not None and expected[0].text == "\n"  # from the template, not part of the answer
    choice = chat(client, max_tokens=8, logprobs=True, top_logprobs=3).choices[0]
    content = choice.logprobs.content
    assert "".join(entry.token for entry in content) == choice.message.content
    for entry, known in zip(content, expected[1:], strict=True):
        assert entry.logprob == pytest.approx(known.logprob, abs=1e-5)
        assert [top.token for top in entry.top_logprobs] == [text for text, _ in known.top]
        assert bytes(entry.bytes).decode() == entry.token
    streamed = [
        entry
        for chunk in chat(client, max_tokens=8, logprobs=True, top_logprobs=3, stream=True)
        for entry in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else ())
    ]
    assert [entry.token for entry in streamed] == [entry.token for entry in content]
    assert chat(client, max_tokens=4, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []


def test_completion_logprobs_have_offsets(client: openai.OpenAI) -> None:
    choice = complete(client, "def add(a, b):\n", max_tokens=8, logprobs=2).choices[0]
    assert "".join(choice.logprobs.tokens) == choice.text
    for token, offset, top in zip(
        choice.logprobs.tokens, choice.logprobs.text_offset, choice.logprobs.top_logprobs, strict=True
    ):
        assert choice.text[offset:].startswith(token) and len(top) == 2 and token in top
    chunks = list(complete(client, "def add(a, b):\n", max_tokens=8, logprobs=2, stream=True))
    offsets = [at for c in chunks if c.choices[0].logprobs for at in c.choices[0].logprobs.text_offset]
    assert offsets == choice.logprobs.text_offset


def test_the_next_turn_of_a_chat_computes_only_what_is_new(client: openai.OpenAI) -> None:
    first = chat(client, "Explain tuples.")
    turns = [
        *user("Explain tuples."),
        {"role": "assistant", "content": first.choices[0].message.content},
        *user("And lists?"),
    ]
    second = chat(client, messages=turns)
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert cached >= first.usage.prompt_tokens + first.usage.completion_tokens - 2
    assert second.usage.prompt_tokens > cached


def test_two_conversations_in_turn_keep_their_prefixes(client: openai.OpenAI) -> None:
    """An editor and a chat do not evict each other's cached prefix."""
    turns = [user(f"Tell me about {thing}, with an example and its output.") for thing in ("sets", "loops")]
    for number in range(3):
        for messages in turns:
            answer = chat(client, messages=messages)
            cached = answer.usage.prompt_tokens_details.cached_tokens
            assert (cached > 30) == (number > 0)
            expected = oracle().complete(
                [Message(each["role"], each["content"]) for each in messages], GREEDY
            )
            assert answer.choices[0].message.content == expected.text.removeprefix("\n")
            messages.append({"role": "assistant", "content": answer.choices[0].message.content})
            messages.append(user("Go on.")[0])


def test_roles_and_message_parts(client: openai.OpenAI) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "developer",
            "content": [{"type": "text", "text": "Use Py"}, {"type": "text", "text": "thon."}],
        },
        *user("Hello"),
    ]
    expected = oracle().complete(
        [Message("system", "Be brief.\n\nUse Python."), Message("user", "Hello")], GREEDY
    )
    answer = chat(client, messages=messages)
    assert answer.choices[0].message.content == expected.text.removeprefix("\n")
    assert answer.usage.prompt_tokens == expected.prompt_tokens


def test_a_lone_surrogate_is_accepted(live: Live) -> None:
    """A text may be cut inside an emoji: JSON can represent that, UTF-8 cannot."""
    body = '{"model":"tiny-starchat","max_tokens":2,"messages":[{"role":"user","content":"a \\ud83d"}]}'
    answer = httpx.post(
        f"{live.url}/v1/chat/completions", content=body, headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 200


@pytest.mark.parametrize(
    ("options", "param", "code"),
    [
        ({"messages": []}, "messages", None),
        ({"messages": [{"role": "critic", "content": "x"}]}, "messages[0].role", None),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", None),
        ({"messages": [{"role": "user"}]}, "messages[0].content", None),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0]",
            "unsupported_content",
        ),
        ({"temperature": 3}, "temperature", None),
        ({"temperature": "hot"}, "temperature", None),
        ({"top_p": 1.1}, "top_p", None),
        ({"n": 17}, "n", None),
        ({"max_tokens": 0}, "max_tokens", None),
        ({"stop": "x" * 257}, "stop", None),
        ({"stop": ["x"] * 17}, "stop", None),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", None),
        ({"top_logprobs": 2}, "top_logprobs", None),
        ({"n": 16, "logprobs": True, "top_logprobs": 20, "max_tokens": 1000}, "logprobs", None),
        ({"stream_options": {"include_usage": True}}, "stream_options", None),
        ({"tools": [TOOL], "tool_choice": {"type": "custom"}}, "tool_choice", "unsupported_parameter"),
        ({"response_format": {"type": "structural_tag"}}, "response_format", "unsupported_parameter"),
        ({"logit_bias": {"word": 1}}, "logit_bias", None),
        ({"logit_bias": {"5000": 1}}, "logit_bias", None),
        ({"logit_bias": {"5": 101}}, "logit_bias", None),
        ({"frequency_penalty": 2.5}, "frequency_penalty", None),
    ],
    ids=str,
)
def test_unsupported_chat_options_are_refused_by_name(
    client: openai.OpenAI, options: dict[str, Any], param: str, code: str | None
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, **options)
    body = caught.value.body
    assert isinstance(body, dict) and set(body) == {"message", "type", "param", "code"}
    assert body["type"] == "invalid_request_error"
    assert (body["param"], body["code"]) == (param, code)
    assert param.partition("[")[0] in body["message"] or code == "unsupported_content"


@pytest.mark.parametrize(
    "harmless",
    [
        {
            "tools": [TOOL],
            "tool_choice": "auto",
            "logit_bias": {},
            "frequency_penalty": 0,
            "presence_penalty": 0.0,
        },
        {"response_format": {"type": "text"}, "user": "me", "metadata": {"a": "b"}, "store": False},
        {"made_up_by_an_editor": None},
    ],
    ids=str,
)
def test_default_values_and_fields_that_change_nothing_are_accepted(
    client: openai.OpenAI, harmless: dict[str, Any]
) -> None:
    assert chat(client, max_tokens=2, extra_body=harmless).usage.completion_tokens == 2


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [5000]}, "prompt"),  # not in the vocabulary
        ({"prompt": ["a"] * 65}, "prompt"),
        ({"prompt": ["a"] * 20, "n": 4}, "n"),
        ({"prompt": "a", "best_of": 3}, "best_of"),
        ({"prompt": "a", "suffix": "b", "echo": True, "logprobs": 1}, "echo"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": [5], "suffix": "b"}, "suffix"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
    ],
    ids=str,
)
def test_unsupported_completion_options_are_refused_by_name(
    client: openai.OpenAI, options: dict[str, Any], param: str | None
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, **options)
    assert isinstance(caught.value.body, dict)
    assert (caught.value.param or "").partition("[")[0] == (param or "")


def test_a_prompt_beyond_the_context_is_refused(client: openai.OpenAI) -> None:
    turns = [*user("word " * 700), {"role": "assistant", "content": "yes"}, *user("word " * 700)]
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, messages=turns)
    assert caught.value.code == "context_length_exceeded" and caught.value.param == "messages"
    assert f"maximum context length is {oracle().context} tokens" in str(caught.value)
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, "word " * 1100)
    assert caught.value.code == "context_length_exceeded" and caught.value.param == "prompt"


def test_max_tokens_beyond_the_context_stops_at_its_end(client: openai.OpenAI) -> None:
    prompt = "word " * (oracle().context - 20)
    answer = complete(client, prompt, max_tokens=10**6)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.total_tokens <= oracle().context + 1


def test_unknown_models_and_routes_are_not_found(client: openai.OpenAI, live: Live) -> None:
    for call in (lambda: chat(client, model="gpt-4o"), lambda: client.models.retrieve("a/b")):
        with pytest.raises(openai.NotFoundError) as caught:
            call()
        assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError) as caught:
        client.embeddings.create(model=MODEL, input="x")
    assert "/v1/embeddings" in str(caught.value)
    wrong = httpx.get(f"{live.url}/v1/chat/completions")
    assert wrong.status_code == 405 and wrong.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "body",
    [b"{", b"", b"null", b"[]", b'"x"', b"\xff\xfe", b"[" * 100_000, b"9" * 5000, b'{"model": NaN}'],
    ids=lambda body: repr(body[:10]),
)
def test_an_invalid_body_is_a_bad_request(live: Live, body: bytes) -> None:
    answer = httpx.post(
        f"{live.url}/v1/chat/completions", content=body, headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_concurrent_requests_get_their_own_answers(client: openai.OpenAI) -> None:
    questions = [f"What is {number} plus {number * 7}?" for number in range(12)]
    with ThreadPoolExecutor(12) as threads:
        answers = list(threads.map(lambda text: chat(client, text), questions))
    assert [answer.choices[0].message.content for answer in answers] == [
        answer_to(question) for question in questions
    ]


def test_requests_are_not_logged(client: openai.OpenAI, live: Live) -> None:
    chat(client, "a secret word", max_tokens=3)
    httpx.get(f"{live.url}/another-secret")
    assert not any("secret" in line for line in live.log)
    line = next(line for line in live.log if "/v1/chat/completions 200" in line and "+ 3 tokens" in line)
    assert "length" in line


def test_metrics_in_prometheus_format(client: openai.OpenAI, live: Live) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    def values() -> dict[str, float]:
        answer = httpx.get(f"{live.url}/metrics")
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
        samples = [s for family in text_string_to_metric_families(answer.text) for s in family.samples]
        return {sample.name: sample.value for sample in samples if not sample.labels} | {
            "ok": sum(
                sample.value
                for sample in samples
                if sample.name == "lowmem_requests_total"
                and sample.labels == {"method": "POST", "route": "/v1/completions", "status": "200"}
            )
        }

    before = values()
    answer = complete(client, "def f():\n", max_tokens=5)
    after = values()
    assert after["ok"] == before["ok"] + 1
    assert after["lowmem_completion_tokens_total"] == before["lowmem_completion_tokens_total"] + 5
    assert (
        after["lowmem_prompt_tokens_total"]
        == before["lowmem_prompt_tokens_total"] + answer.usage.prompt_tokens
    )
    assert after["lowmem_answers_total"] == before["lowmem_answers_total"] + 1
    assert after["lowmem_time_to_first_token_seconds_count"] == (
        before["lowmem_time_to_first_token_seconds_count"] + 1
    )
    assert after["lowmem_accepted_tokens_total"] <= after["lowmem_drafted_tokens_total"]
    assert after["lowmem_resident_memory_bytes"] > 50 << 20


def test_health_and_the_pages_status(live: Live, client: openai.OpenAI) -> None:
    assert httpx.get(f"{live.url}/health").json() == {"status": "ok"}
    chat(client, max_tokens=4)
    status = httpx.get(f"{live.url}/page/status").json()
    assert status["model"] == MODEL and status["context"] == oracle().context
    assert status["tokens_per_second"] > 0 and status["queue"] == 0 and status["busy"] is False
    assert status["memory"]["host"] > 50 << 20


def test_fastapi_pages_are_not_served(live: Live) -> None:
    """FastAPI's documentation pages would load scripts from other hosts."""
    for path in ("/docs", "/redoc", "/docs/oauth2-redirect"):
        assert httpx.get(live.url + path).status_code == 404
    assert httpx.get(f"{live.url}/openapi.json").json()["info"]["title"] == "lowmem"
