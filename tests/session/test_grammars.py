"""Grammars: every answer matches and ends, with the log-probabilities of the model's own distribution."""

from __future__ import annotations

import datetime
import json
import re
from dataclasses import replace
from functools import lru_cache
from typing import Any

import jsonschema
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lowmem import Grammar
from lowmem.config import SamplingParams
from lowmem.errors import InvalidRequestError
from lowmem.generate.sampling import Sampler
from lowmem.grammars import Grammars
from lowmem.loading.loader import LoadedModel, LoadOptions, load
from lowmem.models.dialogue import Message
from lowmem.prompts import opened
from lowmem.session import Session, join
from tests.helpers import TINY_STARCHAT
from tests.session.schemas import make_schema

GREEDY = SamplingParams(temperature=0, max_new_tokens=60)
WARM = SamplingParams(temperature=1.5, top_k=0, top_p=1, seed=1, max_new_tokens=60)
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["x", "y"]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
QUESTION = "Write a function that adds two numbers."


FORMATS = jsonschema.FormatChecker()


@FORMATS.checks("date", raises=ValueError)
def is_date(value: object) -> bool:
    """As RFC 3339 has it: with the year 0, which Python's dates lack."""
    return not isinstance(value, str) or bool(datetime.date.fromisoformat(value.replace("0000-", "2000-")))


@lru_cache(1)
def tiny() -> LoadedModel:
    return load(TINY_STARCHAT, LoadOptions(dtype=torch.float32))


@lru_cache(1)
def session() -> Session:
    return Session(tiny())


def check(schema: Any, text: str, reason: str | None) -> None:
    """The text is valid JSON under the schema, or was cut by the limit of tokens."""
    if reason == "length":
        return
    assert reason == "stop"
    jsonschema.validate(json.loads(text), schema, format_checker=FORMATS)


def random_answer(grammars: Grammars, schema: Any, seed: int) -> tuple[str, str]:
    """An answer of a model with random logits; (its text, why it ended)."""
    constraint = grammars.constraint(Grammar.json_schema(schema), tiny().tokenizer)
    sampler = Sampler(SamplingParams(temperature=1, seed=seed), [], 4096, "cpu", constraint)
    text, stream = "", constraint.text_stream()
    random_numbers = torch.Generator().manual_seed(seed)
    for _ in range(150):
        token = sampler.choose(3 * torch.randn(4096, generator=random_numbers)).id
        if token in tiny().stop_ids:
            return text + stream.finish(), "stop"
        text += stream.push(token)
        if sampler.ended:
            return text + stream.finish(), "stop"
    return text, "length"


def test_random_logits_give_valid_json_for_hundreds_of_schemas() -> None:
    grammars, ended = Grammars(tiny()), 0
    for seed in range(200):
        schema = make_schema(seed)
        text, reason = random_answer(grammars, schema, seed)
        check(schema, text, reason)
        ended += reason == "stop"
    assert ended > 160


def test_the_model_gives_valid_json() -> None:
    ended = 0
    for seed in range(6):
        schema = make_schema(1000 + seed)
        params = replace(GREEDY if seed % 2 else WARM, grammar=Grammar.json_schema(schema), seed=seed)
        answer = session().complete(QUESTION, params)
        check(schema, answer.text, answer.finish_reason)
        ended += answer.finish_reason == "stop"
    assert ended > 2


@pytest.mark.slow
def test_the_model_gives_valid_json_for_a_thousand_schemas() -> None:
    """848 of them end by themselves; in the others the small model repeats a digit or a text."""
    ended = 0
    for seed in range(1000):
        schema = make_schema(seed)
        params = replace(GREEDY if seed % 2 else WARM, grammar=Grammar.json_schema(schema), seed=seed)
        answer = session().complete(QUESTION, replace(params, max_new_tokens=200))
        check(schema, answer.text, answer.finish_reason)
        ended += answer.finish_reason == "stop"
    assert ended > 800


@pytest.mark.parametrize("params", [GREEDY, WARM], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [
        (Grammar.regex("[A-Z][a-z]{2,6}: (0|[1-9][0-9]{0,3})"), "[A-Z][a-z]{2,6}: (0|[1-9][0-9]{0,3})"),
        (Grammar.choice(["yes", "no", "perhaps", "größer 😀"]), "yes|no|perhaps|größer 😀"),
        (
            Grammar.lark('start: "sum(" NUMBER ("," NUMBER){1,2} ")"\nNUMBER: /[0-9]{1,3}/'),
            r"sum\(\d+(,\d+)+\)",
        ),
        (Grammar.gbnf('root ::= ("ab" | "c"){2} [0-9]?'), "(ab|c){2}[0-9]?"),
        (Grammar.regex("\n +x"), "\n +x"),
    ],
)
def test_answers_match(grammar: Grammar, pattern: str, params: SamplingParams) -> None:
    pieces = list(session().stream(QUESTION, replace(params, grammar=grammar)))
    text = "".join(piece.text for piece in pieces)
    assert pieces[-1].finish_reason == "stop" and re.fullmatch(pattern, text), text
    assert session().complete(QUESTION, replace(params, grammar=grammar)).text == text


def test_drafts_change_no_token() -> None:
    text = json.dumps({"name": "Ada", "age": 36, "tags": ["x", "y", "x"]})
    prompt = [Message("user", f"Repeat {text} and {text}"), Message("assistant", text), Message("user", text)]
    drafting, plain = Session(tiny()), Session(tiny(), speculate=False)
    drafted = 0
    for params in (GREEDY, replace(WARM, temperature=0.3, seed=2)):
        for schema in (PERSON, {"type": "object"}):
            asked = replace(params, grammar=Grammar.json_schema(schema), logprobs=2, max_new_tokens=40)
            one, two = (each.complete(prompt, asked) for each in (drafting, plain))
            assert (one.text, one.finish_reason, one.new_tokens) == (
                two.text,
                two.finish_reason,
                two.new_tokens,
            )
            drafted += one.drafted_tokens
    assert drafted


def test_log_probabilities_are_those_of_the_model() -> None:
    """Constrained to its own greedy answer, a model gives the same tokens with the same log-probabilities."""
    params = replace(GREEDY, logprobs=3, max_new_tokens=12)
    ids = opened(tiny(), session().encode(QUESTION))
    free = join(session().continue_ids(ids, params))
    bound = join(session().continue_ids(ids, replace(params, grammar=Grammar.choice([free.text]))))
    assert bound.text == free.text and bound.finish_reason == "stop"
    assert free.logprobs is not None and bound.logprobs is not None
    for one, other in zip(free.logprobs, bound.logprobs, strict=True):
        assert one.text == other.text and one.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert [text for text, _ in one.top] == [text for text, _ in other.top]


def test_limits_and_stop_texts_end_an_answer() -> None:
    endless = Grammar.json_schema({"type": "string", "minLength": 1000})
    answer = session().complete(QUESTION, replace(GREEDY, grammar=endless, max_new_tokens=9))
    assert (answer.finish_reason, answer.new_tokens) == ("length", 9)
    listed = Grammar.regex("(item [0-9]\n){5}END(\nmore)*")
    answer = session().complete(QUESTION, replace(GREEDY, grammar=listed, stop=("END",)))
    assert answer.finish_reason == "stop" and re.fullmatch("(item [0-9]\n){5}", answer.text)


def test_special_tokens_are_never_part_of_a_text() -> None:
    for grammar in (Grammar.lark('start: "a" <|user|> "b"'), Grammar.lark('start: "a" <|end|> "b"')):
        with pytest.raises(InvalidRequestError, match="no token for the text"):
            session().complete(QUESTION, replace(GREEDY, grammar=grammar))


def test_an_undecided_choice_leaves_the_constraint_where_it_was() -> None:
    grammars = Grammars(tiny())
    constraint = grammars.constraint(Grammar.regex("[ab]c"), tiny().tokenizer)
    sampler = Sampler(SamplingParams(temperature=0), [], 4096, "cpu", constraint)
    before = constraint.allowed().tolist()
    flat = torch.ones(4096)
    assert sampler.choose_clear(flat, 0.1) is None and constraint.allowed().tolist() == before
    flat[before[1]] = 9.0
    chosen = sampler.choose_clear(flat, 0.1)
    assert chosen is not None and chosen.id == before[1]
    (only,) = constraint.allowed().tolist()
    flat[0] = 99.0
    forced = sampler.choose_clear(flat, 0.1)  # a single token is clear whatever the rounding
    assert forced is not None and forced.id == only and sampler.ended


def test_a_choice_by_hand() -> None:
    """The likeliest of the allowed tokens, found without the sampler."""
    grammars, tokenizer = Grammars(tiny()), tiny().tokenizer
    constraint = grammars.constraint(Grammar.choice(["alpha", "beta", "bet"]), tokenizer)
    texts = {token: tokenizer.decode([token]) for token in range(5, 4092)}
    starts = {
        token for token, text in texts.items() if text and any(w.startswith(text) for w in ("alpha", "beta"))
    }
    assert set(constraint.allowed().tolist()) == starts
    logits = torch.randn(4096)
    sampler = Sampler(SamplingParams(temperature=0, repetition_penalty=1.3), [], 4096, "cpu", constraint)
    assert sampler.choose(logits).id == max(starts, key=lambda token: float(logits[token]))


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """A tokenizer as Llama's first one: spaces as ▁, bytes as tokens, the first space is not decoded."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "▁b"]
    own = Tokenizer(
        models.BPE({word: at for at, word in enumerate(words)}, [("▁", "a"), ("▁", "b")], byte_fallback=True)
    )
    own.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    own.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    own.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=own, eos_token="</s>")


@pytest.mark.parametrize("stops", [(2,), ()])
def test_other_tokenizers_and_rows(stops: tuple[int, ...]) -> None:
    """Spaces and bytes as Llama's tokenizer writes them, more rows than tokens, and no stop token."""
    tokenizer = sentencepiece_like()
    model = tiny().model  # of 4096 rows
    grammars = Grammars(replace(tiny(), model=model, tokenizer=tokenizer, stop_ids=stops))
    for text in (" a b", "é a", "😀", "ab"):
        for params in (SamplingParams(temperature=1, top_k=0, seed=3), SamplingParams(temperature=0)):
            constraint = grammars.constraint(Grammar.choice([text]), tokenizer)
            sampler = Sampler(params, [], 4096, "cpu", constraint)
            stream, found = constraint.text_stream(), ""
            for _ in range(20):
                found += stream.push(sampler.choose(torch.randn(4096)).id)
                if sampler.ended:
                    break
            assert sampler.ended and found + stream.finish() == text
    open_end = grammars.constraint(Grammar.regex("a+"), tokenizer)
    open_end.accept(int(open_end.allowed()[0]))
    assert (2 in open_end.allowed().tolist()) == bool(stops)


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        (Grammar.json_schema({"not": {"type": "string"}}), 'Unimplemented keys: \\["not"\\]'),
        (Grammar.json_schema({"$ref": "https://example.com/x"}), "example.com"),
        (Grammar.json_schema({"$ref": "#"}), "no text matches"),
        (Grammar.json_schema(False), "nsatisfiable|no text"),
        (Grammar.json_schema("{"), "JSON schema cannot be used"),
        (Grammar.json_schema("[]"), "not an object"),
        (Grammar.regex("("), "regular expression cannot be used"),
        (Grammar.regex("a(?=b)"), "regular expression"),
        (Grammar.choice([]), "not a list of texts"),
        (Grammar.choice([""]), "not a list of texts"),
        (Grammar.lark("start: missing"), "grammar cannot be used"),
        (Grammar.gbnf('root ::= "a'), "grammar cannot be used"),
        (Grammar.gbnf("root ::= " + "(" * 9000 + '"a"' + ")" * 9000), "nested too deeply"),
        (Grammar.regex("a" * 300_000), "300000 characters"),
    ],
)
def test_a_grammar_that_cannot_be_used_is_refused_in_one_line(grammar: Grammar, reason: str) -> None:
    with pytest.raises(InvalidRequestError, match=reason) as caught:
        session().stream(QUESTION, replace(GREEDY, grammar=grammar))
    assert "\n" not in str(caught.value) and "Correct or simplify it" in str(caught.value)


def test_a_seed_repeats_an_answer() -> None:
    params = replace(WARM, grammar=Grammar.json_schema(PERSON))
    texts = [session().complete(QUESTION, replace(params, seed=seed)).text for seed in (5, 5, 6, 7)]
    assert texts[0] == texts[1] and len(set(texts)) > 1


def test_the_generator_of_schemas_repeats_itself() -> None:
    assert (
        make_schema(3) == make_schema(3) and len({json.dumps(make_schema(seed)) for seed in range(50)}) > 40
    )
