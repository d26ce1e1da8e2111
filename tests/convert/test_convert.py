"""From a source checkpoint to one that answers: families, layouts, and the content of the result."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lowmem.convert.recipe import ConvertOptions
from safetensors.torch import load_file
from torch import nn

from lowmem.checkpoint.dequantize import dequantize
from lowmem.checkpoint.headers.safetensors import read_header
from lowmem.checkpoint.verify.converted import verify
from lowmem.config import BITS, QuantConfig, SamplingParams
from lowmem.errors import (
    ArchitectureError,
    CalibrationError,
    InvalidRequestError,
    MemoryBudgetError,
    RecipeError,
    SourceError,
)
from lowmem.kernels.quant_linear import QuantLinear
from lowmem.loading.loader import LoadOptions, load
from lowmem.session import Session
from tests.convert.convert_helpers import quick_convert
from tests.helpers import KINDS, save_source, starchat_replica, tiny_model

TOKENS = torch.arange(1, 65).view(2, 32) * 7 % 4000


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("bits", BITS)
def test_the_loaded_result_matches_its_dequantized_integers(family, bits, tmp_path):
    """The loaded checkpoint has the logits of transformers' model with dequantized weights.

    At 8 bits they are close to the source's.

    At 4 bits biases and norms are the source's; otherwise they are tuned, and the oracle reads them from the
    file.
    """
    model = tiny_model(family)
    source = save_source(model, tmp_path / "source")
    # The file stores unquantized tensors in float16, so the oracle does too.
    steps = 0 if bits == 4 else 8
    quick_convert(source, tmp_path / "out", QuantConfig(bits=bits, group_size=32, tune_steps=steps))
    loaded = load(tmp_path / "out", LoadOptions(dtype=torch.float32))
    dense = copy.deepcopy(model)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for name, parameter in dense.named_parameters():  # not the buffers: rotary frequencies are not stored
        tuned = steps and parameter.dim() == 1 and name in stored and name.count(".") > 2
        parameter.data = stored[name].float() if tuned else parameter.data.half().float()
    quantized = {n: m for n, m in loaded.model.named_modules() if isinstance(m, QuantLinear)}
    assert set(quantized) == {n for n, m in model.named_modules() if type(m) is nn.Linear and n != "lm_head"}
    for name, q in quantized.items():
        weight = dequantize(q)
        dense.get_submodule(name).weight.data = weight
    assert torch.allclose(logits(loaded.model), logits(dense), atol=1e-4, rtol=1e-4)
    if bits == 8:
        change = (logits(loaded.model) - logits(model)).norm() / logits(model).norm()
        assert change < 0.05
    assert not verify(tmp_path / "out").problems


def test_starchat_alphas_layout_converts_and_runs(tmp_path):
    """Pickle shards with an index, a duplicated head, 49156 tokens, float16."""
    source = starchat_replica(tmp_path / "starchat")
    out = tmp_path / "out"
    quick_convert(source, out, QuantConfig(bits=4, group_size=32), rows=4)
    names = read_header(out / "model.safetensors").tensors
    assert "lm_head.weight" not in names
    assert names["transformer.wte.weight"].dtype == torch.float16
    config = json.loads((out / "config.json").read_text())
    assert config["tie_word_embeddings"] is True
    assert config["quantization_config"]["bits"] == 4
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [49155, 0]
    card = (out / "README.md").read_text()
    assert "license: bigcode-openrail-m" in card
    assert "use restrictions" in card
    loaded = load(out)
    assert loaded.stop_ids == (49155, 0)
    answer = Session(loaded).complete(
        "How do I sort a list?", SamplingParams(max_new_tokens=5, temperature=0)
    )
    assert 0 < answer.new_tokens <= 5
    from transformers import AutoTokenizer

    prompt = AutoTokenizer.from_pretrained(out).apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt == "<|system|>\n<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>"


def test_stop_tokens_of_the_source_are_kept(tmp_path):
    """Llama 3 lists its stop tokens only in generation_config.json; the end of a turn comes first."""
    source = save_source(tiny_model("llama"), tmp_path / "source")
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9], "temperature": 0.6}))
    quick_convert(source, tmp_path / "out", rows=4)
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [4095, 0, 7, 9]
    assert generation["temperature"] == 0.6


def test_store_head_writes_the_tied_head_for_old_readers(tmp_path):
    source = save_source(tiny_model("gpt_bigcode_mqa"), tmp_path / "source")
    options = ConvertOptions(device="cpu", compute_dtype="float32", store_head=True)
    quick_convert(source, tmp_path / "out", rows=4, options=options)
    from safetensors.torch import load_file

    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(tensors["lm_head.weight"], tensors["transformer.wte.weight"])


def test_an_untied_head_that_is_a_copy_is_stored_once(tmp_path):
    model = tiny_model("llama")
    model.lm_head.weight.data = model.model.embed_tokens.weight.data.clone()
    source = save_source(model, tmp_path / "source")
    quick_convert(source, tmp_path / "out", rows=4)
    assert "lm_head.weight" not in read_header(tmp_path / "out" / "model.safetensors").tensors
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True
    loaded = load(tmp_path / "out", LoadOptions(dtype=torch.float32))
    assert torch.equal(loaded.model.lm_head.weight, loaded.model.model.embed_tokens.weight)


def test_an_untied_head_is_kept(tmp_path):
    source = save_source(tiny_model("llama"), tmp_path / "source")
    quick_convert(source, tmp_path / "out", rows=4)
    assert "lm_head.weight" in read_header(tmp_path / "out" / "model.safetensors").tensors


def test_shards_have_an_index_and_hold_the_same_tensors(tmp_path):
    source = save_source(tiny_model("gpt_bigcode_mqa"), tmp_path / "source")
    quick_convert(source, tmp_path / "one", rows=4)
    options = ConvertOptions(device="cpu", compute_dtype="float32", shard_size=30_000)
    quick_convert(source, tmp_path / "many", rows=4, options=options)
    shards = sorted((tmp_path / "many").glob("model-*.safetensors"))
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert len(shards) > 3
    assert {p.name for p in shards} == set(index["weight_map"].values())
    from safetensors.torch import load_file

    one = load_file(tmp_path / "one" / "model.safetensors")
    many = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    assert one.keys() == many.keys() == index["weight_map"].keys()
    assert all(torch.equal(one[name], many[name]) for name in one)
    for shard in shards:
        header = read_header(shard)
        assert shard.stat().st_size < 30_000 + 20_000 or len(header.tensors) == 1
    assert not verify(tmp_path / "many").problems


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_of_the_source(dtype, tmp_path):
    """Unquantized tensors keep their 16-bit dtype; float32 becomes float16."""
    source = save_source(tiny_model("gpt_bigcode_mqa"), tmp_path / "source", dtype=dtype)
    quick_convert(source, tmp_path / "out", rows=4)
    stored = read_header(tmp_path / "out" / "model.safetensors").tensors["transformer.wte.weight"].dtype
    assert stored == (torch.bfloat16 if dtype == torch.bfloat16 else torch.float16)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] in str(stored)


def test_true_sequential_off_gives_another_good_result(tmp_path):
    model = tiny_model("llama")
    source = save_source(model, tmp_path / "source")
    quick_convert(source, tmp_path / "out", QuantConfig(bits=8, group_size=32, true_sequential=False))
    loaded = load(tmp_path / "out", LoadOptions(dtype=torch.float32))
    change = (logits(loaded.model) - logits(model)).norm() / logits(model).norm()
    assert change < 0.05


def test_hidden_states_in_a_file_give_the_same_bytes(tmp_path):
    """A small memory budget moves the hidden states to a file; the result stays the same."""
    from lowmem.convert import memory_plan

    from tests.convert.convert_helpers import digest_of

    source = save_source(tiny_model("gpt_bigcode_mqa"), tmp_path / "source")
    quick_convert(source, tmp_path / "kept")
    original = memory_plan.measure

    def only_in_a_file(*args):
        plan = original(*args)
        return replace(plan, host_peak=1 << 60) if plan.keep_hidden else plan

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory_plan, "measure", only_in_a_file)
        quick_convert(source, tmp_path / "file")
    assert digest_of(tmp_path / "file") == digest_of(tmp_path / "kept")


def nothing_left(folder: Path) -> bool:
    return not (folder / "out").exists() and not (folder / "out.partial").exists()


def test_refusals_leave_nothing_behind(tmp_path):
    source = save_source(tiny_model("gpt_bigcode_mqa"), tmp_path / "source")
    quick_convert(source, tmp_path / "converted", rows=4)
    cases = [
        (SourceError, "already quantized", tmp_path / "converted", {}),
        (SourceError, "does not exist", tmp_path / "nowhere", {}),
        (RecipeError, "--group-size 64", source, {"config": QuantConfig(group_size=96)}),
        (CalibrationError, "positions", source, {"row_length": 512}),
        (CalibrationError, "Use --rows", source, {"rows": 9999}),
        (MemoryBudgetError, "--memory", source, {"options": ConvertOptions(device="cpu", memory=100 << 20)}),
        (InvalidRequestError, "--device", source, {"options": ConvertOptions(device="cuda:99")}),
        (CalibrationError, "missing.txt", source, {"calibration": str(tmp_path / "missing.txt")}),
    ]
    for kind, words, folder, arguments in cases:
        with pytest.raises(kind, match=words):
            quick_convert(folder, tmp_path / "out", **arguments)
        assert nothing_left(tmp_path), words


def test_models_without_plain_linears_are_refused(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=4096, n_positions=128)
    source = save_source(GPT2LMHeadModel(config), tmp_path / "source")
    with pytest.raises(ArchitectureError, match="Conv1D"):
        quick_convert(source, tmp_path / "out")
    assert nothing_left(tmp_path)


def test_fused_experts_are_refused(tmp_path):
    from transformers import MixtralConfig

    from lowmem.models.architecture import inspect

    config = MixtralConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
    )
    with pytest.raises(ArchitectureError, match="experts"):
        inspect(config)


def test_weights_that_are_not_finite_name_the_tensor(tmp_path):
    model = tiny_model("gpt_bigcode_mqa")
    model.transformer.h[1].mlp.c_fc.weight.data[3, 4] = torch.nan
    source = save_source(model, tmp_path / "source")
    with pytest.raises((SourceError, CalibrationError), match=r"h\.1"):
        quick_convert(source, tmp_path / "out", rows=4)
    assert not (tmp_path / "out").exists()


def test_a_dead_input_is_logged_by_linear(tmp_path):
    """Norm gains and biases of zero make an input of c_attn dead; the report and the card say so."""
    model = tiny_model("gpt_bigcode_mqa")
    norm = model.transformer.h[0].ln_1
    norm.weight.data[5] = 0
    norm.bias.data[5] = 0
    source = save_source(model, tmp_path / "source")
    quick_convert(source, tmp_path / "out", rows=4)
    report = json.loads((tmp_path / "out" / "lowmem-report.json").read_text())
    dead = {r["name"]: r["dead_columns"] for r in report["linears"] if r["dead_columns"]}
    assert dead == {"transformer.h.0.attn.c_attn": 1}
    assert "1 inputs never used" in (tmp_path / "out" / "README.md").read_text()


def test_the_default_group_size_falls_back(tmp_path):
    """32 divides 96 inputs, 128 and 64 do not. A size chosen by the user would be refused instead."""
    source = save_source(tiny_model("gpt_bigcode_mqa", hidden=96, heads=3), tmp_path / "source")
    quick_convert(source, tmp_path / "out", QuantConfig(), rows=4)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["group_size"] == 32


def test_the_card_lists_every_linear_and_the_recipe(tmp_path):
    source = save_source(tiny_model("llama"), tmp_path / "source")
    summary = quick_convert(source, tmp_path / "out", QuantConfig(bits=3, group_size=32), rows=4)
    card = (tmp_path / "out" / "README.md").read_text()
    for layer in range(2):
        for name in ("self_attn.q_proj", "mlp.down_proj"):
            assert f"model.layers.{layer}.{name} |" in card
    assert "groups of 32" in card
    assert f"{summary.bits_per_weight:.2f} bits a weight" in card
    assert str(tmp_path) not in card
