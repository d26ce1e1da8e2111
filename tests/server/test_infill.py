"""/infill, as llama.vim and llama.vscode call it. Answers equal those of the session."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowmem.config import SamplingParams
from lowmem.loading.loader import LoadedModel
from lowmem.models.dialogue import fim_tokens
from lowmem.prompts import PromptFitter, Snippet
from lowmem.server.guard import GuardSettings
from lowmem.server.lines import LineLimits, Lines
from lowmem.session import join
from lowmem.text.tokenizing import encode
from tests.server.server_fixture import MODEL, PATIENCE, Live, live_server, oracle, tiny

PREFIX, LINE, SUFFIX = "def add(a, b):\n", "    ret", "\n\nprint(add(1, 2))\n"
PARAMS = SamplingParams(temperature=0, max_new_tokens=24)
SNIPPETS = [{"filename": "a.py", "text": "x = 1\n", "time": 3}, {"filename": "b.py", "text": "y = 2"}]
# The fields of llama.vim's request (autoload/llama.vim); only the texts, and the number of tokens, are ours.
VIM: dict[str, Any] = {
    "id_slot": 0,
    "input_prefix": PREFIX,
    "input_suffix": SUFFIX,
    "input_extra": SNIPPETS,
    "prompt": LINE,
    "n_predict": 24,
    "stop": [],
    "n_indent": 4,
    "top_k": 40,
    "top_p": 0.90,
    "samplers": ["top_k", "top_p", "infill"],
    "stream": False,
    "cache_prompt": True,
    "t_max_prompt_ms": 500,
    "t_max_predict_ms": 100_000,
    "response_fields": [
        "content",
        "timings/prompt_n",
        "timings/prompt_ms",
        "timings/prompt_per_token_ms",
        "timings/prompt_per_second",
        "timings/predicted_n",
        "timings/predicted_ms",
        "timings/predicted_per_token_ms",
        "timings/predicted_per_second",
        "truncated",
        "tokens_cached",
    ],
}
PLAIN = {"input_prefix": PREFIX, "input_suffix": SUFFIX, "prompt": LINE, "n_predict": 24, "temperature": 0}


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with live_server() as live:
        yield live


def post(live: Live, body: dict[str, Any], path: str = "/infill", **options: Any) -> httpx.Response:
    return httpx.post(live.url + path, json=body, timeout=PATIENCE, **options)


def expected(params: SamplingParams = PARAMS, snippets: Any = ()) -> Any:
    found = tuple(Snippet(entry["filename"], entry["text"]) for entry in snippets)
    return join(oracle().fill_in(PREFIX + LINE, SUFFIX, params, snippets=found))


def test_an_answer_is_the_sessions(live: Live) -> None:
    answer = post(live, PLAIN).json()
    whole = expected()
    assert answer["content"] == whole.text and whole.text
    assert answer["stop"] is True and answer["truncated"] is False and answer["model"] == MODEL
    assert answer["stop_type"] == ("limit" if whole.finish_reason == "length" else "eos")
    assert answer["tokens_evaluated"] == whole.prompt_tokens
    assert answer["tokens_predicted"] == whole.new_tokens
    times = answer["timings"]
    assert times["prompt_n"] + times["cache_n"] == whole.prompt_tokens
    assert times["predicted_n"] == whole.new_tokens and times["prompt_ms"] > 0
    assert answer["generation_settings"]["n_predict"] == 24
    assert post(live, PLAIN, "/v1/infill/").json()["content"] == whole.text


def test_a_request_of_llama_vim_gets_the_fields_that_it_names(live: Live) -> None:
    answer = post(live, VIM)
    assert answer.status_code == 200, answer.text
    assert set(answer.json()) == set(VIM["response_fields"])
    warm = {"input_prefix": "", "input_suffix": "", "prompt": "", "n_predict": 0, "response_fields": [""]}
    warm |= {"temperature": 0.0, "samplers": [], "t_max_prompt_ms": 1, "t_max_predict_ms": 1}
    assert post(live, {**VIM, **warm}).json() == {}
    assert post(live, {**VIM, **warm, "input_extra": []}).status_code == 200


def test_a_prompt_that_was_warmed_is_in_the_cache(live: Live) -> None:
    snippets = [{"filename": f"{name}.py", "text": f"{name} = 1\n" * 20} for name in "pqr"]
    body = {**PLAIN, "input_extra": snippets}
    warm = post(live, {**body, "input_prefix": "", "input_suffix": "", "prompt": "", "n_predict": 0}).json()
    assert (warm["content"], warm["tokens_predicted"], warm["stop_type"]) == ("", 0, "limit")
    answer = post(live, body).json()
    assert answer["timings"]["cache_n"] >= warm["tokens_evaluated"] - 2 > 60
    assert answer["content"] == expected(snippets=snippets).text


def test_a_stream_ends_with_the_figures(live: Live) -> None:
    with httpx.stream("POST", f"{live.url}/infill", json={**PLAIN, "stream": True}, timeout=PATIENCE) as got:
        assert got.headers["content-type"].startswith("text/event-stream")
        *texts, last = [json.loads(line[6:]) for line in got.iter_lines() if line]
    assert "".join(chunk["content"] for chunk in texts) == expected().text
    assert not any(chunk["stop"] for chunk in texts)
    assert last["stop"] and last["content"] == "" and last["timings"]["predicted_n"] == expected().new_tokens


def test_a_stop_text_is_named(live: Live) -> None:
    text = expected().text
    stop = text[3:5]
    answer = post(live, {**PLAIN, "stop": ["\u2603", stop]}).json()
    assert (answer["content"], answer["stop_type"], answer["stopping_word"]) == (
        text[: text.index(stop)],
        "word",
        stop,
    )


def test_several_answers_come_as_a_list(live: Live) -> None:
    answers = post(live, {**PLAIN, "n_cmpl": 2, "temperature": 2, "seed": 5, "n_predict": 6}).json()
    one = post(live, {**PLAIN, "temperature": 2, "seed": 6, "n_predict": 6}).json()
    assert [answer["index"] for answer in answers] == [0, 1] and answers[1]["content"] == one["content"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input_extra": [{"filename": "a"}]}, "input_extra[0].text"),
        ({"n_indent": -2}, "n_indent"),
        ({"n_predict": "many"}, "n_predict"),
        ({"made_up": 1}, "made_up"),
        ({"grammar": "root ::= x"}, "grammar"),
        ({"model": "other"}, "model"),
    ],
)
def test_bad_requests_name_the_field(live: Live, fields: dict[str, Any], param: str) -> None:
    answer = post(live, {**PLAIN, **fields})
    assert answer.status_code == (404 if param == "model" else 400)
    assert answer.json()["error"]["param"] == param and "\n" not in answer.json()["error"]["message"]


def test_the_guards_are_those_of_the_other_routes(live: Live) -> None:
    before = live.worker.counts.answers
    assert post(live, PLAIN, headers={"Origin": "http://evil.example"}).status_code == 403
    assert live.worker.counts.answers == before
    with live_server(guard=GuardSettings(keys=("secret",), max_body=2000)) as locked:
        assert post(locked, PLAIN).status_code == 401
        headers = {"Authorization": "Bearer secret"}
        assert post(locked, PLAIN, headers=headers).status_code == 200
        assert post(locked, {**PLAIN, "input_prefix": "x" * 3000}, headers=headers).status_code == 413
        text = httpx.get(f"{locked.url}/metrics", headers=headers).text
        assert 'lowmem_requests_total{method="POST",route="/infill",status="200"} 1.0' in text


def test_files_begin_with_the_models_own_token() -> None:
    """StarCoder's <filename> stands before names, StarCoder2's <file_sep> also before the hole's file."""
    loaded = tiny()
    snippets = [Snippet("a.py", "x = 1\n"), Snippet("b.py", "y = '<fim_prefix>'")]
    marks = fim_tokens(loaded.tokenizer)
    assert marks is not None
    for spelled, before_hole in (("<filename>", 0), ("<file_sep>", 1)):
        tokenizer = _with_token(loaded, spelled)
        ids = PromptFitter(replace(loaded, tokenizer=tokenizer), 512).fit_hole("a", "b", 8, snippets).ids
        start = ids.index(marks[0])
        assert ids.count(marks[0]) == 1, "a text must not forge a token"
        (file,) = encode(tokenizer, spelled)
        first = [file, *encode(tokenizer, "a.py\nx = 1\n"), file]
        assert ids[: len(first)] == first
        assert tokenizer.decode(ids[:start]).startswith(f"{spelled}a.py\nx = 1\n{spelled}b.py\ny = '")
        assert ids[:start].count(file) == 2 + before_hole


def test_the_last_files_that_half_of_the_context_holds_are_kept() -> None:
    snippets = [Snippet(name, f"{name} = 1\n" * 12) for name in "abcdefgh"]
    for hole in (("x", ""), ("x\n" * 500, "y\n" * 500)):
        prompt = PromptFitter(tiny(), 256).fit_hole(*hole, 16, snippets)
        text = tiny().tokenizer.decode(prompt.ids)
        kept = [snippet.name for snippet in snippets if f"--- {snippet.name} ---" in text]
        assert kept and kept == list("abcdefgh")[-len(kept) :] and kept != list("abcdefgh")
        assert len(prompt.ids) + 16 <= 256 and text.index("---") < text.index("<fim_prefix>")


def _with_token(loaded: LoadedModel, spelled: str) -> Any:
    tokenizer = copy.deepcopy(loaded.tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": [spelled]})
    return tokenizer


def ended(text: str, limits: LineLimits, seconds: float = 0.0) -> str:
    """The answer that begins with `text`, of which each character takes `seconds`."""
    now = 0.0
    lines = Lines(limits, lambda: now)
    found = ""
    for character in text:
        found += lines.push(character)
        now += seconds
        if lines.over:
            return found
    return found + lines.finish()


@pytest.mark.parametrize(
    ("text", "indent", "kept"),
    [
        ("urn a\n    b\n  c\n", 4, "urn a\n    b"),
        ("urn a\n\n    b", 4, "urn a"),  # as in llama.cpp, an empty line has no indentation
        ("urn a\n\t\tb\n\n", 2, "urn a\n\t\tb"),
        ("a\nb", 0, "a\nb"),
        ("  a\n ", 4, "  a\n "),
        ("\n    a\nb", 4, "\n    a"),
    ],
)
def test_an_answer_ends_before_a_line_with_less_indentation(text: str, indent: int, kept: str) -> None:
    assert ended(text, LineLimits(indent)) == kept


def test_an_answer_ends_with_the_line_in_which_its_time_is_over() -> None:
    assert ended("one\ntwo\nthree\n", LineLimits(seconds=5), seconds=1) == "one\ntwo"
    assert ended("one\ntwo\n", LineLimits(seconds=50), seconds=1) == "one\ntwo\n"
    assert ended("\n\n  one\ntwo", LineLimits(seconds=0.5), seconds=1) == "\n\n  one"


@settings(max_examples=60)
@given(
    st.text(alphabet="a \t\n", max_size=40),
    st.lists(st.integers(1, 6), min_size=1),
    st.integers(0, 4),
)
def test_the_end_does_not_depend_on_how_the_text_arrives(text: str, sizes: list[int], indent: int) -> None:
    lines, found, at = Lines(LineLimits(indent), lambda: 0.0), "", 0
    for number in range(len(text)):
        size = sizes[number % len(sizes)]
        found += lines.push(text[at : at + size])
        at += size
    found += lines.finish()
    assert found == ended(text, LineLimits(indent)) and text.startswith(found)


def test_the_limits_end_the_models_answer(live: Live) -> None:
    long = {**PLAIN, "n_predict": 80}
    text = post(live, long).json()["content"]
    assert "\n" in text
    answer = post(live, {**long, "n_indent": 60}).json()
    assert answer["content"] == ended(text, LineLimits(60)) != text and answer["stop_type"] == "limit"
    answer = post(live, {**long, "t_max_predict_ms": 0.001}).json()
    assert answer["content"] == ended(text, LineLimits(seconds=1e-6), 1.0)
    assert answer["tokens_predicted"] < 80
