"""An answer of a chat model ends where its template ends a turn, though its config names another token."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import lowmem
from lowmem.config import QuantConfig, SamplingParams
from tests.convert.convert_helpers import quick_convert
from tests.models.test_templates import of_family


def write_model(folder: Path, tokenizer: PreTrainedTokenizerFast, end: int) -> None:
    """A random llama that gives the token `end` after every other."""
    config = AutoConfig.for_model(
        "llama",
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for layer in model.model.layers:  # the layers add nothing
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.abs_()
        model.lm_head.weight[end] = 1
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("family", ["chatml", "llama 3", "gemma", "phi 3", "glm"])
def test_answers_end_and_conversions_say_where(family: str, tmp_path: Path) -> None:
    tokenizer, end = of_family(family)
    number = tokenizer.convert_tokens_to_ids(end)
    assert number != tokenizer.eos_token_id
    folder = tmp_path / "model"
    write_model(folder, tokenizer, number)
    quick_convert(folder, tmp_path / "converted", QuantConfig(bits=8, group_size=32))
    written = json.loads((tmp_path / "converted" / "generation_config.json").read_text())["eos_token_id"]
    assert written == [number, tokenizer.eos_token_id]
    for each in (folder, tmp_path / "converted"):
        session = lowmem.Session(lowmem.open_model(str(each), context=128, device="cpu", dtype="float32"))
        answer = session.complete("hi", SamplingParams(temperature=0, max_new_tokens=8))
        assert (answer.text, answer.finish_reason) == ("", "stop")
