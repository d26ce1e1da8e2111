"""The engine: the tokens of transformers' own generate, and every way an answer can end."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lowmem.config import SamplingParams
from lowmem.errors import InvalidRequestError, LowmemError
from lowmem.generate.engine import Token, context_length, generate
from tests.helpers import tiny_model

GREEDY = SamplingParams(temperature=0, max_new_tokens=40)


class Counting(nn.Module):
    """Always says one more than the last id; 16 positions, 12 ids, and a record of what it was fed."""

    def __init__(self, nan_at: int = -1) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 1)
        text = SimpleNamespace(max_position_embeddings=16)
        self.config = SimpleNamespace(get_text_config=lambda: text)
        self.fed: list[list[int]] = []
        self.nan_at = nan_at

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: torch.Tensor, past_key_values: Any, use_cache: bool) -> Any:
        self.fed.append(input_ids[0].tolist())
        logits = nn.functional.one_hot((input_ids + 1) % 12, 12).float()
        if int(input_ids[0, -1]) == self.nan_at:
            logits[:] = torch.nan
        return SimpleNamespace(logits=logits)


@pytest.fixture(autouse=True)
def no_cache(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Counting has no real config to make a cache for."""
    if "counting" in request.node.name:
        monkeypatch.setattr("transformers.DynamicCache", lambda config: None)


@pytest.mark.parametrize("kind", ["gpt_bigcode_mqa", "gpt_bigcode_mha", "llama", "starcoder2", "qwen2"])
def test_greedy_tokens_are_transformers(kind: str) -> None:
    model = tiny_model(kind, vocab=512)
    prompt = torch.randint(1, 512, (1, 9), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        expected = model.generate(
            prompt, max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0, 9:]
    tokens = list(generate(model, prompt[0].tolist(), GREEDY))
    assert [token.id for token in tokens] == expected.tolist()
    assert [token.finish_reason for token in tokens] == [None] * 39 + ["length"]


def test_seeded_sampling_repeats() -> None:
    model = tiny_model("gpt_bigcode_mqa", vocab=512)
    params = SamplingParams(temperature=1.5, max_new_tokens=20, top_k=0, top_p=1, seed=4)

    def ids(params: SamplingParams) -> list[int]:
        return [token.id for token in generate(model, [5, 6, 7], params)]

    assert ids(params) == ids(params) != ids(SamplingParams(**{**vars(params), "seed": 5}))


def test_counting_prefill_is_the_first_next_and_decode_feeds_one_token() -> None:
    model = Counting()
    tokens = generate(model, [1, 2, 3], SamplingParams(temperature=0, max_new_tokens=3))
    assert model.fed == []
    assert next(tokens) == Token(4, None)
    assert model.fed == [[1, 2, 3]]
    assert list(tokens) == [Token(5, None), Token(6, "length")]
    assert model.fed == [[1, 2, 3], [4], [5]]


def test_counting_stops_at_a_stop_id_and_gives_it() -> None:
    tokens = list(generate(Counting(), [1], GREEDY, stop_ids=[9, 5]))
    assert [token.id for token in tokens] == [2, 3, 4, 5]
    assert tokens[-1].finish_reason == "stop"


def test_counting_a_stop_id_as_the_last_allowed_token_is_a_stop() -> None:
    tokens = list(generate(Counting(), [1], SamplingParams(temperature=0, max_new_tokens=2), stop_ids=[3]))
    assert tokens[-1] == Token(3, "stop")


@pytest.mark.parametrize("length", [1, 10, 15, 16])
def test_counting_ends_where_the_positions_end(length: int) -> None:
    """16 positions: the last token read is at the 16th, so 17 - length tokens can be given."""
    model = Counting()
    tokens = list(generate(model, [1] * length, GREEDY))
    assert len(tokens) == 17 - length
    assert tokens[-1].finish_reason == "context"
    assert sum(map(len, model.fed)) == 16


def test_context_limit_of_a_real_model_is_no_index_error() -> None:
    model = tiny_model("gpt_bigcode_mqa", vocab=512, positions=16)
    tokens = list(generate(model, [1] * 10, GREEDY))
    assert len(tokens) == 7 and tokens[-1].finish_reason == "context"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "empty"), ([1] * 17, "17 tokens.*16"), ([12], "vocabulary of 12"), ([-1], "vocabulary of 12")],
    ids=["empty", "long", "high", "negative"],
)
def test_counting_bad_prompts_are_refused_at_once(prompt: list[int], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        generate(Counting(), prompt, GREEDY)


def test_counting_bad_settings_are_refused_at_once() -> None:
    with pytest.raises(InvalidRequestError, match="top_p"):
        generate(Counting(), [1], SamplingParams(top_p=0))


def test_counting_an_output_that_is_not_finite_is_said() -> None:
    tokens = generate(Counting(nan_at=3), [1], GREEDY)
    assert [next(tokens).id, next(tokens).id] == [2, 3]
    with pytest.raises(LowmemError, match="not finite"):
        next(tokens)


def test_inference_mode_does_not_leak_to_the_caller() -> None:
    model = tiny_model("llama", vocab=512)
    tokens = generate(model, [1, 2], GREEDY)
    next(tokens)
    assert not torch.is_inference_mode_enabled()
    tokens.close()  # type: ignore[attr-defined]
    assert torch.is_grad_enabled()


def test_context_length_of_each_kind() -> None:
    for kind in ("gpt_bigcode_mqa", "llama", "starcoder2"):
        assert context_length(tiny_model(kind, vocab=512, positions=128)) == 128
