"""Chunks, cached prefixes, stored prefixes and drafts never change tokens, whatever scales the positions.

The oracle is transformers' generate on a fresh copy of the same model in float32.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lowmem.config import SamplingParams
from lowmem.generate.engine import Engine
from lowmem.generate.position_scaling import PositionScaling
from lowmem.generate.prefix_store import PrefixStore
from lowmem.models.architecture import inspect
from lowmem.models.positions import context_length
from tests.generate.decoding import drafting

POSITIONS, SWITCH, VOCABULARY = 64, 24, 61
_LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 3.0, 5.0, 7.0],
    "original_max_position_embeddings": SWITCH,
}
_DYNAMIC = {"rope_type": "dynamic", "factor": 3.0}
SCALINGS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "llama-none": ("llama", {}),
    "llama-linear": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "llama-yarn": (
        "llama",
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": SWITCH}},
    ),
    "llama-llama3": (
        "llama",
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": SWITCH,
            }
        },
    ),
    "llama-longrope": ("llama", {"rope_scaling": _LONGROPE}),
    "phi3-longrope": ("phi3", {"rope_scaling": _LONGROPE, "original_max_position_embeddings": SWITCH}),
    "llama-dynamic": ("llama", {"rope_scaling": _DYNAMIC, "max_position_embeddings": SWITCH}),
    "qwen2-dynamic": ("qwen2", {"rope_scaling": _DYNAMIC, "max_position_embeddings": SWITCH}),
    "olmo-dynamic": ("olmo", {"rope_scaling": _DYNAMIC, "max_position_embeddings": SWITCH}),
    "gemma3-linear": (
        "gemma3_text",
        {
            "head_dim": 8,
            "sliding_window": 9,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
            },
        },
    ),
    "gemma3-dynamic": (
        "gemma3_text",
        {
            "head_dim": 8,
            "sliding_window": 9,
            "max_position_embeddings": SWITCH,
            "rope_parameters": {
                "full_attention": {**_DYNAMIC, "rope_theta": 1e4},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
            },
        },
    ),
    "gpt_neox-dynamic": (
        "gpt_neox",
        {"rope_scaling": _DYNAMIC, "rotary_pct": 1.0, "max_position_embeddings": SWITCH},
    ),
}


@pytest.fixture(scope="module", params=SCALINGS, ids=list(SCALINGS))
def model(request: pytest.FixtureRequest) -> Any:
    family, options = SCALINGS[request.param]
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": POSITIONS,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if family != "gpt_neox":
        sizes["num_key_value_heads"] = 2
    config = AutoConfig.for_model(family, **{**sizes, **copy.deepcopy(options)})
    torch.manual_seed(3)
    made = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in made.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 1.2 * parameter.shape[-1] ** -0.5)
    return made


def _expected(model: Any, prompt: Sequence[int], count: int) -> list[int]:
    fresh = copy.deepcopy(model)
    ids = torch.tensor([list(prompt)])
    output = fresh.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count, pad_token_id=0
    )
    return list(output[0, len(prompt) :].tolist())


def _engine(model: Any, chunk: int) -> Engine:
    engine = Engine(copy.deepcopy(model), context=POSITIONS, chunk=chunk, speculate=True)
    engine.drafting.paces = drafting()
    engine.store = PrefixStore(1 << 20)
    return engine


def _answer(engine: Engine, prompt: Sequence[int], count: int) -> list[int]:
    params = SamplingParams(temperature=0, max_new_tokens=count)
    return [token.id for token in engine.generate(list(prompt), params)]


@pytest.mark.parametrize("length", [5, SWITCH - 2, SWITCH, SWITCH + 1, SWITCH + 9])
def test_one_prompt_gives_transformers_tokens(model: Any, length: int) -> None:
    prompt = random.Random(length).choices(range(VOCABULARY), k=length)
    assert _answer(_engine(model, chunk=7), prompt, 12) == _expected(model, prompt, 12)


@pytest.mark.parametrize("seed", range(3))
def test_requests_one_after_the_other_give_transformers_tokens(model: Any, seed: int) -> None:
    """Prompts that go on from earlier ones, or share their start, with answers across the switch."""
    choice = random.Random(seed)
    engine = _engine(model, chunk=choice.choice([5, 16, 64]))
    texts = [choice.choices(range(VOCABULARY), k=20) for _ in range(2)]
    for _ in range(7):
        text = choice.choice(texts)
        prompt = text[: choice.randrange(len(text) // 2, len(text) + 1)]
        count = choice.randrange(1, 14)
        answer = _answer(engine, prompt, count)
        assert answer == _expected(model, prompt, count)
        if choice.random() < 0.7 and len(prompt) + len(answer) < POSITIONS - 16:
            text[:] = [*prompt, *answer, *choice.choices(range(3), k=2)]


def test_an_interrupted_answer_leaves_rows_that_are_right(model: Any) -> None:
    prompt = random.Random(9).choices(range(VOCABULARY), k=SWITCH - 3)
    engine = _engine(model, chunk=64)
    tokens = engine.generate(prompt, SamplingParams(temperature=0, max_new_tokens=12))
    for _ in range(6):  # past the switch
        next(tokens)
    tokens.close()
    assert _answer(engine, prompt[:-1], 12) == _expected(model, prompt[:-1], 12)


def test_the_model_itself_is_as_before_outside_of_a_forward_of_the_engine(model: Any) -> None:
    mine = copy.deepcopy(model)
    PositionScaling(mine)
    PositionScaling(mine)
    prompt = random.Random(1).choices(range(VOCABULARY), k=SWITCH + 5)
    assert _expected(mine, prompt, 4) == _expected(model, prompt, 4)


def test_the_probe_follows_every_scaling(model: Any) -> None:
    assert len(inspect(model.config).layers) == 2


def test_dynamic_ntk_stretches_the_context(model: Any) -> None:
    stretched = "dynamic" in str(model.config.rope_parameters)
    assert context_length(model) == (3 * SWITCH if stretched else POSITIONS)
