"""A long chat: what is left out to fit the context, when, and how much of the KV cache survives it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowmem.config import SamplingParams
from lowmem.errors import InvalidRequestError
from lowmem.generate.engine import Engine
from lowmem.loading.loader import LoadedModel, load
from lowmem.models.dialogue import Message, first_turn, share_room, split_turns
from lowmem.session import Session
from tests.helpers import TINY_STARCHAT, save_source, tiny_model

PARAMS = SamplingParams(temperature=0, max_new_tokens=8)
# (tokens of a question, tokens that the turn adds in the end): the answer makes it longer.
TURNS = st.lists(
    st.tuples(st.integers(1, 40), st.integers(0, 40)).map(lambda t: (t[0], t[0] + t[1])),
    min_size=1,
    max_size=25,
)


def turn(name: str) -> list[Message]:
    return [Message("user", f"What is {name}?"), Message("assistant", f"{name} is a letter.")]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load(save_source(tiny_model("gpt_bigcode_mqa"), tmp_path_factory.mktemp("context")))


def with_template(loaded: LoadedModel, template: str) -> LoadedModel:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TINY_STARCHAT, local_files_only=True)
    tokenizer.chat_template = template
    return replace(loaded, dialogue=None, tokenizer=tokenizer)


def used(turns: Sequence[tuple[int, int]], first: int) -> int:
    """Tokens of the dialogue from turn `first` on."""
    return sum(whole for _, whole in turns[first:-1]) + turns[-1][0]


def start(turns: Sequence[tuple[int, int]], budget: int) -> int:
    return first_turn([whole for _, whole in turns], [question for question, _ in turns], budget)


@given(turns=TURNS, budget=st.integers(1, 300))
def test_what_stays_fits_and_no_more_goes_than_needed(turns: list[tuple[int, int]], budget: int) -> None:
    first = start(turns, budget)
    last = len(turns) - 1
    assert 0 <= first <= last
    assert used(turns, first) <= budget or first == last
    if used(turns, 0) <= budget:
        assert first == 0
    if last and used(turns, last - 1) <= budget:
        assert first < last  # the turn before the last stays wherever it fits


@given(turns=TURNS, more=st.tuples(st.integers(1, 40), st.integers(0, 40)), budget=st.integers(1, 300))
def test_the_start_stays_while_it_fits(
    turns: list[tuple[int, int]], more: tuple[int, int], budget: int
) -> None:
    """With a turn more the dialogue starts where it did, unless that no longer fits; then half is free."""
    before, grown = start(turns, budget), [*turns, more]
    after = start(grown, budget)
    if used(grown, before) <= budget:
        assert after == before
    else:
        assert after > before or before == len(grown) - 1
        assert used(grown, after) <= budget // 2 or after >= len(grown) - 2


@given(turns=TURNS, budget=st.integers(400, 600))
def test_the_start_moves_seldom(turns: list[tuple[int, int]], budget: int) -> None:
    """Between two moves at least half of the budget, less two turns, must have been written."""
    starts = [start(turns[: n + 1], budget) for n in range(len(turns))]
    moves = sum(a != b for a, b in pairwise(starts))
    assert moves <= sum(whole for _, whole in turns) / (budget / 2 - 80)


def test_turns() -> None:
    user, assistant = Message("user", "a"), Message("assistant", "b")
    assert split_turns([]) == []
    assert split_turns([user, assistant, user]) == [(user, assistant), (user,)]
    assert split_turns([user, user, assistant]) == [(user,), (user, assistant)]
    assert split_turns([assistant, user, assistant, assistant]) == [
        (assistant,),
        (user, assistant, assistant),
    ]


def test_the_border_is_exact(loaded: LoadedModel) -> None:
    """Prompt and room for the answer just fit: nothing is dropped; with one token less, a turn is."""
    messages = [Message("system", "Be brief."), *turn("a"), *turn("b"), Message("user", "c?")]
    tokens = Session(loaded).count(messages)
    just = Session(loaded, context=tokens + 8).complete(messages, PARAMS)
    assert (just.dropped_turns, just.prompt_tokens, just.cut_tokens) == (0, tokens, 0)
    session = Session(loaded, context=tokens + 7)
    less = session.complete(messages, PARAMS)
    kept = [messages[0], *messages[3:]]
    assert less.dropped_turns == 1 and less.prompt_tokens == session.count(kept) < tokens
    assert less.text == Session(loaded).complete(kept, PARAMS).text  # system text and turn b, nothing else
    assert session.complete(messages, replace(PARAMS, max_new_tokens=7)).dropped_turns == 0
    # An answer may be long, but only a quarter of the context is kept free for it.
    many = replace(PARAMS, max_new_tokens=1000)
    quarter = next(context for context in range(tokens, 128) if context - context // 4 >= tokens)
    assert next(iter(Session(loaded, context=quarter).stream(messages, many))).dropped_turns == 0
    assert next(iter(Session(loaded, context=quarter - 1).stream(messages, many))).dropped_turns == 1
    given = session.complete(messages[1:], PARAMS, system="Be brief.")  # the same in another spelling
    assert (given.dropped_turns, given.text) == (1, less.text)


def test_the_last_message_stays_until_it_alone_does_not_fit(loaded: LoadedModel) -> None:
    messages = [Message("system", "Be brief."), *turn("a"), Message("user", "What is the letter after b?")]
    alone = Session(loaded).count([messages[0], messages[-1]])
    tight = Session(loaded, context=alone).complete(messages, PARAMS)
    # No room is left but for the token that needs no position; the engine says so.
    assert (tight.dropped_turns, tight.prompt_tokens) == (1, alone)
    assert (tight.new_tokens, tight.finish_reason) == (1, "context")
    with pytest.raises(InvalidRequestError, match=f"have {alone} tokens.*room for {alone - 1}") as caught:
        Session(loaded, context=alone - 1).stream(messages, PARAMS)
    assert "\n" not in str(caught.value) and "--context" in caught.value.hint
    with pytest.raises(InvalidRequestError, match="the prompt has"):  # one string: the engine's own error
        Session(loaded, context=32).stream("word " * 40, PARAMS)
    assert Session(loaded, context=64).complete([*turn("a"), Message("user", "b")], PARAMS).dropped_turns == 0


TEMPLATES = {
    "dialogue": None,
    "template": "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}",
    # As ChatML models do: a default system text where none is given, and a rule about the order of roles.
    "strict": "{% if messages[0]['role'] != 'system' %}<|system|>\nYou are helpful.<|end|>\n{% endif %}"
    "{% for m in messages %}"
    "{% if m['role'] == 'user' and loop.previtem and loop.previtem['role'] == 'user' %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}<|assistant|>",
}


@pytest.mark.parametrize("system", [None, "Answer in one line."])
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_a_long_chat_reuses_most_of_its_prefix_on_most_turns(
    loaded: LoadedModel, template: str | None, system: str | None
) -> None:
    """Forty turns in a context of 256 tokens, each request with the whole history."""
    session = Session(with_template(loaded, template) if template else loaded, context=256)
    history: list[Message] = []
    reused, dropped, prompts = [], [], []
    for n in range(40):
        history.append(Message("user", f"What comes after {n}?"))
        done = session.complete(history, PARAMS, system=system)
        assert done.prompt_tokens + 8 <= 256 and done.finish_reason in ("length", "stop")
        history.append(Message("assistant", f"It is {n + 1}."))  # not what it said: those tokens are new
        reused.append(done.cached_tokens / done.prompt_tokens)
        dropped.append(done.dropped_turns)
        prompts.append(done.prompt_tokens)
    moves = [n for n in range(1, 40) if dropped[n] != dropped[n - 1]]
    assert dropped == sorted(dropped) and dropped[-1] > 20
    assert all(dropped[n] - dropped[n - 1] >= 3 for n in moves)
    assert sum(share > 0.6 for share in reused) >= 30
    assert all(reused[n] > 0.6 for n in range(5, 40) if n not in moves)
    assert all(prompts[n] < 160 for n in moves)  # half of the room is free again


def test_a_template_that_grows_with_the_dialogue_still_fits(loaded: LoadedModel) -> None:
    """Its turns tell less than the whole: what the estimate has missed goes turn by turn."""
    growing = "{% for m in messages %}{{ ' and' * loop.index * loop.index }}{{ m['content'] }}{% endfor %}"
    session = Session(with_template(loaded, growing), context=256)
    messages = [message for n in range(12) for message in turn(str(n))] + [Message("user", "c")]
    done = session.complete(messages, PARAMS)
    assert 0 < done.dropped_turns <= 12 and done.prompt_tokens + 8 <= 256


@given(before=st.integers(0, 100), after=st.integers(0, 100), room=st.integers(0, 120))
def test_room_is_shared_around_a_hole(before: int, after: int, room: int) -> None:
    kept_before, kept_after = share_room(before, after, room)
    assert 0 <= kept_before <= before and 0 <= kept_after <= after
    assert kept_before + kept_after == min(room, before + after)  # nothing is wasted
    if before >= room and after >= room:
        assert kept_after == room // 4


def fill(loaded: LoadedModel, context: int, prefix: str, suffix: str) -> Any:
    return list(Session(loaded, context=context).fill_in(prefix, suffix, PARAMS))


def test_a_long_file_is_cut_at_its_far_ends(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[list[int]] = []
    real = Engine.start

    def hear(self: Engine, prompt: list[int], *rest: Any, **options: Any) -> Any:
        heard.append(prompt)
        return real(self, prompt, *rest, **options)

    monkeypatch.setattr(Engine, "start", hear)
    prefix, suffix = (first + "".join(f" {n % 10}" for n in range(49)) for first in ("a", "b"))
    before, after = (loaded.tokenizer(text).input_ids for text in (prefix, suffix))
    assert len(before) == len(after) == 99
    whole = fill(loaded, 209, prefix, suffix)[-1]  # 3 markers and room for 8 tokens
    assert heard[-1] == [1, *before, 3, *after, 2] and whole.cut_tokens == whole.dropped_turns == 0
    cut = fill(loaded, 51, prefix, suffix)[-1]
    assert heard[-1] == [1, *before[-30:], 3, *after[:10], 2]
    assert cut.cut_tokens == 158 and cut.prompt_tokens == 43
    fill(loaded, 51, prefix, "b")
    assert heard[-1] == [1, *before[-39:], 3, *after[:1], 2]
    with pytest.raises(InvalidRequestError, match="no room"):
        fill(loaded, 3, "a", "b")
