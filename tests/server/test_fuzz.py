"""Fuzz the API from its OpenAPI description: no request breaks it, and all responses match the
description."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from lowmem.server.protocol import ChatRequest, CompletionRequest
from tests.server.server_fixture import MODEL, Live, live_server

CHECKS = (
    not_a_server_error,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
FIELDS = {*ChatRequest.model_fields, *CompletionRequest.model_fields}
QUICK = 15
LONG = int(os.environ.get("LOWMEM_FUZZ_EXAMPLES", "1500"))


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    """A server with a small context, so that answers are short."""
    with live_server(context=64) as live:
        yield live


def corrected(case: Any, data: Any) -> Any:
    """Correct a generated body in some respects, so that requests get past the first checks.

    Most bodies name the model that is served; otherwise only the check of the name would be tested. Half of
    all bodies are changed to obey rules that the description cannot express: which fields exclude each other,
    the order of messages, the range of token ids. Half of those keep only the required fields, like the
    simplest input, which is always tried.
    """
    body = case.body
    if case.path == "/infill" and isinstance(body, dict):  # short answers, and few of them
        for name in ("n_cmpl", "n"):
            body.pop(name, None)
        body["n_predict"] = data.draw(st.sampled_from((0, 1, 2)))
        return case
    if case.path == "/v1/responses" and isinstance(body, dict):
        body["max_output_tokens"] = data.draw(st.sampled_from((1, 2)))
        return case
    if not isinstance(body, dict) or not {"messages", "prompt"} & set(body):
        return case
    how = data.draw(st.sampled_from(("bare", "fitting", "named", "unchanged")))
    if how != "unchanged":
        body["model"] = MODEL
    if how not in ("bare", "fitting"):
        return case
    conflicting = {"stream_options", "top_logprobs", "best_of", "echo", "chat_template_kwargs", "logit_bias"}
    for name in (
        conflicting | (set(body) - FIELDS)
        if how == "fitting"
        else set(body) - {"model", "messages", "prompt"}
    ):
        body.pop(name, None)
    messages = body.get("messages")
    for message in messages if isinstance(messages, list) else ():
        if isinstance(message, dict):
            message["role"] = "user"
            content = message.get("content")
            message["content"] = content[:8] if isinstance(content, str) else "Hi"
    if "prompt" in body and not isinstance(body["prompt"], str):
        body["prompt"] = data.draw(st.sampled_from(("def f():", ["a", "b"], [5, 6], [[5], [6, 7]])))
    return case


def fuzz(live: Live, examples: int) -> dict[str, dict[int, int]]:
    """Try every operation with `examples` inputs, half of them invalid. Returns counts of statuses."""
    schema = schemathesis.openapi.from_url(f"{live.url}/openapi.json")
    seen: dict[str, dict[int, int]] = {}
    for result in schema.get_all_operations():
        operation = result.ok()
        statuses = seen.setdefault(operation.label, {})
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            cases = operation.as_strategy(generation_mode=mode)
            try:
                _try(cases, live, statuses, examples)
            except Unsatisfiable:  # an operation without input has no invalid input
                assert mode is GenerationMode.NEGATIVE
    return seen


def _try(cases: Any, live: Live, statuses: dict[int, int], examples: int) -> None:
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        phases=(Phase.explicit, Phase.generate),
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases, data=st.data())
    def one(case: Any, data: Any) -> None:
        response = corrected(case, data).call(base_url=live.url, timeout=60)
        statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
        case.validate_response(response, checks=list(CHECKS))

    one()


def check(live: Live, examples: int) -> None:
    seen = fuzz(live, examples)
    assert {"POST /v1/chat/completions", "POST /v1/completions", "GET /v1/models"} <= set(seen)
    for label in ("POST /v1/chat/completions", "POST /v1/completions"):
        assert seen[label].get(200, 0) and seen[label].get(400, 0), seen  # both kinds were tried
    print(seen)
    assert not [status for statuses in seen.values() for status in statuses if status >= 500], seen
    assert live.worker.counts.failed == 0
    assert httpx.get(f"{live.url}/health").status_code == 200


def test_a_short_fuzz_finds_no_fault(live: Live) -> None:
    check(live, QUICK)


@pytest.mark.slow
def test_a_long_fuzz_finds_no_fault(live: Live) -> None:
    check(live, LONG)
