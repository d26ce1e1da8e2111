"""On a card, the host waits for the device once a token: for the transfer that brings the token back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from lowmem.config import SamplingParams
from lowmem.generate.decoders.graph import GraphDecoder
from lowmem.generate.decoders.selection import SelectedDecoder
from lowmem.generate.engine import Engine
from lowmem.generate.sequence import Token
from tests.generate.decoding import drafting
from tests.helpers import KINDS, tiny_model
from tests.pretended_card import CARD, OnCard, PretendedCard, RepeatedGraphs

PROMPT = [5, 9, 11, 9, 300, 301, 302, 5, 9, 11]
COUNT = 16
SAMPLED = {"seed": 3, "temperature": 0.9}
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "greedy with logprobs": {"temperature": 0, "logprobs": 3},
    "greedy with penalties": {
        "temperature": 0,
        "repetition_penalty": 1.3,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.2,
        "logit_bias": ((7, 2.0),),
    },
    "all tokens": {**SAMPLED, "top_k": 0, "top_p": 1.0},
    "top-k": {**SAMPLED, "top_k": 40, "top_p": 1.0},
    "top-p": {**SAMPLED, "top_k": 0, "top_p": 0.9},
    "repeating": {**SAMPLED, "temperature": 0.3, "top_k": 20, "frequency_penalty": -2.0, "logprobs": 1},
    "everything": {
        **SAMPLED,
        "top_k": 50,
        "top_p": 0.95,
        "min_p": 0.01,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.1,
        "logit_bias": ((7, 2.0),),
        "logprobs": 5,
    },
}


def params_of(settings: str) -> SamplingParams:
    return SamplingParams(max_new_tokens=COUNT, **SETTINGS[settings])


def on_cpu(kind: str, params: SamplingParams) -> list[Token]:
    return list(Engine(tiny_model(kind), context=64, speculate=False).generate(PROMPT, params))


def waits_of(card: PretendedCard, tokens: Iterator[Token]) -> list[tuple[Token, list[str]]]:
    """Each token, and what the host has waited for since the one before."""
    card.taken()
    return [(token, card.taken()) for token in tokens]


def check(found: list[tuple[Token, list[str]]], expected: list[Token]) -> None:
    assert [token.id for token, _ in found] == [token.id for token in expected]
    for (token, waits), other in zip(found, expected, strict=True):
        assert waits == ["to to the host"], token
        assert [name for name, _ in token.top] == [name for name, _ in other.top]
        if other.logprob is not None:
            assert token.logprob == pytest.approx(other.logprob, abs=1e-4)


@pytest.mark.parametrize("settings", SETTINGS)
def test_an_eager_step_waits_once(settings: str) -> None:
    """Prefill and the first token included: ids come to the card from pinned memory."""
    params = params_of(settings)
    expected = on_cpu("gpt_bigcode_mqa", params)
    with PretendedCard() as card:
        engine = Engine(card.move(tiny_model("gpt_bigcode_mqa")), context=64, speculate=False)
        check(waits_of(card, engine.generate(PROMPT, params)), expected)
    assert isinstance(engine.cache.slots[0].layers[0].keys, OnCard)


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_waits_once(kind: str) -> None:
    params = params_of("everything")
    expected = on_cpu(kind, params)
    with PretendedCard() as card:
        engine = Engine(card.move(tiny_model(kind)), context=64, speculate=False)
        check(waits_of(card, engine.generate(PROMPT, params)), expected)


@pytest.mark.parametrize("settings", ["greedy", "everything"])
def test_a_captured_step_waits_once(settings: str) -> None:
    """After the capture, which is compared with the eager step."""
    params = params_of(settings)
    expected = on_cpu("gpt_bigcode_mqa", params)
    with PretendedCard() as card:
        engine = Engine(card.move(tiny_model("gpt_bigcode_mqa")), context=64, speculate=False)
        assert isinstance(engine.decoder, SelectedDecoder)
        engine.decoder.fast = fast = GraphDecoder(
            engine.decoder.eager, engine.cache, graphs=RepeatedGraphs(card)
        )
        list(engine.generate(PROMPT[:3], params))  # makes the window
        check(waits_of(card, engine.generate(PROMPT, params)), expected)
    assert engine.decoder.fast is fast


@pytest.mark.parametrize("settings", ["greedy", "repeating"])
def test_a_step_with_a_draft_waits_once_a_token(settings: str) -> None:
    """The rows of a step are chosen from one after the other, since the penalties follow the tokens."""
    params = params_of(settings)
    expected = on_cpu("gpt_bigcode_mqa", params)
    with PretendedCard() as card:
        engine = Engine(card.move(tiny_model("gpt_bigcode_mqa")), context=64)
        engine.drafting.paces = drafting()
        found = waits_of(card, engine.generate(PROMPT, params))
    assert [token.id for token, _ in found] == [token.id for token in expected]
    waits = [wait for _, several in found for wait in several]
    assert waits == ["to to the host"] * len(waits) and len(waits) == len(expected)
    assert engine.sequence is not None and engine.sequence.drafted_tokens


def test_what_waits_is_counted() -> None:
    """The pretended card itself."""
    with PretendedCard() as card:
        x = torch.arange(6.0, device=CARD)
        x.add_(1).fill_(2)
        x[1], x[2:4] = 5.0, x[4:6]
        torch.full((1, 1), 7, device=CARD)
        torch.tensor([1.0, 2.0]).pin_memory().to(CARD, non_blocking=True)
        torch.where(x > 3, x, 0.0)
        assert card.taken() == []
        assert x.tolist() == [2, 5, 2, 2, 2, 2]
        for wait in (
            lambda: x.cpu(),
            lambda: float(x[0]),
            lambda: int(x.argmax()),
            lambda: bool((x > 3).any()),
            lambda: x[x.argmax()],
            lambda: x[x > 3],
            lambda: x.nonzero(),
            lambda: torch.tensor([1.0, 2.0]).to(CARD),
            lambda: torch.tensor([1.0, 2.0]).to(CARD, non_blocking=True),
            lambda: x.copy_(torch.arange(6.0)),
            lambda: x[torch.tensor([0, 1])],
            lambda: torch.zeros(6).copy_(x),
            lambda: torch.equal(x, x),
        ):
            card.taken()
            wait()
            assert len(card.taken()) == 1
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.ones(6)
