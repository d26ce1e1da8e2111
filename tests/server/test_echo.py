"""`echo` with log-probabilities: those of the prompt, against transformers' own forward."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch

from lowmem.generate.scoring import SCORED_ROWS
from lowmem.session import Session
from tests.generate.decoding import score
from tests.server.server_fixture import MODEL, PATIENCE, Live, live_server, oracle

PROMPT = "def add(a, b):\n    return a"


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with live_server() as live:
        yield live


def complete(live: Live, prompt: Any, **fields: Any) -> httpx.Response:
    body = {"model": MODEL, "prompt": prompt, "temperature": 0, "echo": True, "logprobs": 1, **fields}
    return httpx.post(f"{live.url}/v1/completions", json=body, timeout=PATIENCE)


def choices(live: Live, prompt: Any, **fields: Any) -> list[Any]:
    answer = complete(live, prompt, **fields)
    assert answer.status_code == 200, answer.text
    return list(answer.json()["choices"])


def expected(ids: list[int]) -> tuple[list[float], list[float]]:
    """(each token's log-probability, the best one at its place) from the second token on."""
    with torch.inference_mode():
        logits = oracle().loaded.model(input_ids=torch.tensor([ids])).logits[0].float()
    logprobs = logits.log_softmax(-1)[:-1]
    own = logprobs.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    return own.tolist(), logprobs.amax(-1).tolist()


@pytest.mark.parametrize("new", [0, 1, 3])
def test_the_prompts_logprobs_come_before_the_answers(live: Live, new: int) -> None:
    ids = oracle().encode(PROMPT, raw=True)
    (choice,) = choices(live, ids, max_tokens=new)
    answer = complete(live, ids, max_tokens=max(new, 1), echo=False).json()["choices"][0] if new else None
    assert choice["text"] == PROMPT + (answer["text"] if answer else "")
    logprobs = choice["logprobs"]
    own, best = expected(ids)
    assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
    assert logprobs["token_logprobs"][1 : len(ids)] == pytest.approx(own, abs=1e-4)
    tops = [max(top.values()) for top in logprobs["top_logprobs"][1 : len(ids)]]
    assert tops == pytest.approx(best, abs=1e-4)
    assert all(
        value in top.values()  # the same bits, as the harness compares them
        for value, top in zip(logprobs["token_logprobs"][1:], logprobs["top_logprobs"][1:], strict=True)
    )
    assert "".join(logprobs["tokens"]) == choice["text"]
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        assert choice["text"][offset:].startswith(token)
    if answer:
        assert logprobs["token_logprobs"][len(ids) :] == pytest.approx(
            answer["logprobs"]["token_logprobs"], abs=1e-4
        )
    assert len(logprobs["tokens"]) == len(ids) + new
    assert choice["finish_reason"] == "length"


def test_every_kind_of_prompt_and_batches(live: Live) -> None:
    texts = [PROMPT, "import os\n"]
    ids = [oracle().encode(text, raw=True) for text in texts]
    for prompts in (texts, ids):
        found = choices(live, prompts, max_tokens=1)
        assert [choice["index"] for choice in found] == [0, 1]
        for choice, tokens in zip(found, ids, strict=True):
            assert choice["logprobs"]["token_logprobs"][1 : len(tokens)] == pytest.approx(
                expected(tokens)[0], abs=1e-4
            )
    for prompt in (texts[0], ids[0]):
        assert choices(live, prompt, max_tokens=1) == choices(live, texts, max_tokens=1)[:1]


def test_the_token_that_ends_an_answer_counts(live: Live) -> None:
    """Harnesses drop the last entry as the answer's: it must be there, also if the answer ends at once."""
    ids = oracle().encode(PROMPT, raw=True)
    alone = complete(live, ids, max_tokens=9, echo=False).json()
    assert alone["choices"][0]["finish_reason"] == "stop"
    count = alone["usage"]["completion_tokens"]
    answer = complete(live, ids, max_tokens=9).json()
    assert answer["choices"][0]["text"] == PROMPT + alone["choices"][0]["text"]
    assert answer["choices"][0]["logprobs"]["tokens"][-1] == "<|end|>"
    assert len(answer["choices"][0]["logprobs"]["tokens"]) == len(ids) + count
    assert answer["usage"]["prompt_tokens"] == len(ids)
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_a_stream_has_the_same_entries(live: Live) -> None:
    ids = oracle().encode(PROMPT * 20, raw=True)
    (whole,) = choices(live, ids, max_tokens=3)
    lines = complete(live, ids, max_tokens=3, stream=True).text.split("\n\n")
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line and "[DONE]" not in line]
    parts = [chunk["choices"][0] for chunk in chunks]
    assert "".join(part["text"] for part in parts) == whole["text"]
    for name in ("tokens", "token_logprobs", "text_offset"):
        entries = [entry for part in parts if part["logprobs"] for entry in part["logprobs"][name]]
        assert entries == pytest.approx(whole["logprobs"][name], abs=1e-4)


def test_parts_of_a_long_prompt_join(live: Live) -> None:
    ids = oracle().encode(PROMPT * 30, raw=True)
    assert len(ids) > 2 * SCORED_ROWS
    session, ends = Session(oracle().loaded), list[int]()
    tokens = score(session.engine, ids, 2, lambda done, total: ends.append(done))
    assert ends[:2] == [SCORED_ROWS, 2 * SCORED_ROWS]
    assert [token.id for token in tokens] == ids and tokens[0].logprob is None
    assert [token.logprob for token in tokens[1:]] == pytest.approx(expected(ids)[0], abs=1e-4)
    assert all(len(token.top) == 2 for token in tokens[1:])


def test_an_echo_without_an_answer_needs_no_logprobs(live: Live) -> None:
    (choice,) = choices(live, PROMPT, max_tokens=0, logprobs=None)
    assert choice["text"] == PROMPT and choice["logprobs"] is None


def test_a_chat_after_an_echo_is_the_same(live: Live) -> None:
    """Scoring leaves the cache in a state that the next request may use."""
    options = {"max_tokens": 12, "echo": False, "logprobs": None}
    before = complete(live, PROMPT, **options).json()["choices"]
    choices(live, PROMPT + "x", max_tokens=1)
    assert complete(live, PROMPT, **options).json()["choices"] == before
