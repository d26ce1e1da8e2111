"""StarChat's family by name: small replicas of the published layouts are converted, answer, stop and fill in.

The settings are those of the published config.json, special_tokens_map.json and added_tokens.json, with fewer
and smaller layers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import lowmem
from lowmem.cli import main
from lowmem.config import QuantConfig, SamplingParams
from lowmem.prompts import PromptFitter
from lowmem.session import join
from tests.convert.convert_helpers import quick_convert

STARCODER = [
    *("<|endoftext|>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>", "<filename>"),
    *("<gh_stars>", "<issue_start>", "<issue_comment>", "<issue_closed>", "<jupyter_start>"),
    *("<jupyter_text>", "<jupyter_code>", "<jupyter_output>", "<empty_output>", "<commit_before>"),
    *("<commit_msg>", "<commit_after>", "<reponame>"),
]
STARCODER2 = [
    *("<|endoftext|>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>", "<repo_name>"),
    *("<file_sep>", "<issue_start>", "<issue_comment>", "<issue_closed>", "<jupyter_start>"),
]
SANTACODER = ["<|endoftext|>", "<fim-prefix>", "<fim-middle>", "<fim-suffix>", "<fim-pad>"]
CHAT = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
BIGCODE: dict[str, Any] = {
    "model_type": "gpt_bigcode",
    "activation_function": "gelu",
    "multi_query": True,
    "n_positions": 8192,
    "architectures": ["GPTBigCodeForCausalLM"],
    "attention_softmax_in_fp32": True,
    "inference_runner": 0,
    "max_batch_size": None,
    "max_sequence_length": None,
    "pad_key_length": True,
    "validate_runner_input": True,
    "pre_allocate_kv_cache": False,
    "scale_attention_softmax_in_fp32": True,
    "scale_attn_weights": True,
}
TANH = {**BIGCODE, "activation_function": "gelu_pytorch_tanh"}
SECOND: dict[str, Any] = {
    "model_type": "starcoder2",
    "hidden_act": "gelu_pytorch_tanh",
    "use_bias": True,
    "norm_type": "layer_norm",
    "norm_epsilon": 1e-05,
    "sliding_window": 4096,
    "max_position_embeddings": 16384,
    "mlp_type": "default",
}


@dataclass(frozen=True)
class Published:
    """What a model's repository holds, beside the sizes of its layers."""

    config: dict[str, Any]
    tokens: Sequence[str]
    """Special tokens at the start of the vocabulary."""
    added: Sequence[str] = ()
    """Special tokens behind it."""
    heads: int = 4
    kv_heads: int = 1


FAMILY = {
    "starchat-alpha": Published({**BIGCODE, "use_cache": False}, STARCODER, CHAT),
    "starchat-beta": Published({**BIGCODE, "use_cache": False}, STARCODER, CHAT),
    "starcoder": Published(BIGCODE, STARCODER),
    "starcoderbase": Published(BIGCODE, STARCODER),
    "starcoderbase-1b": Published(TANH, STARCODER),
    "starcoderbase-3b": Published(BIGCODE, STARCODER, heads=2),
    "starcoderbase-7b": Published(BIGCODE, STARCODER),
    "starcoderplus": Published(BIGCODE, STARCODER),
    "tiny_starcoder_py": Published(TANH, STARCODER),
    "gpt_bigcode-santacoder": Published({**TANH, "n_positions": 2048}, (), SANTACODER),
    "starcoder2-3b": Published({**SECOND, "rope_theta": 999999.4420358813}, STARCODER2, kv_heads=2),
    "starcoder2-7b": Published({**SECOND, "rope_theta": 1000000}, STARCODER2, kv_heads=2),
    "starcoder2-15b": Published(
        {**SECOND, "rope_theta": 100000, "tie_word_embeddings": False}, STARCODER2, kv_heads=2
    ),
}


def replica(name: str, folder: Path, always: str | None = None) -> Path:
    """Write a small random checkpoint in the layout of a published one.

    always: the token that the model gives after every other; otherwise its tokens depend on the text.
    """
    published = FAMILY[name]
    folder.mkdir()
    tokenizer = _write_tokenizer(published, folder)
    eos = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    if published.config["model_type"] == "starcoder2":
        sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": published.heads, "num_key_value_heads": published.kv_heads}
    else:
        sizes = {"n_embd": 64, "n_inner": 128, "n_layer": 2, "n_head": published.heads}
    data = published.config | sizes | {"vocab_size": len(tokenizer), "bos_token_id": eos, "eos_token_id": eos}
    (folder / "config.json").write_text(json.dumps(data))
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * (0.3 if parameter.dim() == 2 else 0.1))
        if always is not None:
            norm = (
                model.model.norm if published.config["model_type"] == "starcoder2" else model.transformer.ln_f
            )
            head = model.get_output_embeddings().weight
            head[tokenizer.convert_tokens_to_ids(always)] += 10
            norm.bias.fill_(10)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(data))  # as it was published
    return folder


def _write_tokenizer(published: Published, folder: Path) -> PreTrainedTokenizerFast:
    vocabulary = [*published.tokens, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({token: at for at, token in enumerate(vocabulary)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([*published.tokens, *published.added])
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    backend.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False, "model_max_length": 8192}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | names))
    found: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(folder)
    return found


def open_replica(folder: Path) -> lowmem.Session:
    return lowmem.Session(lowmem.open_model(str(folder), context=128, device="cpu", dtype="float32"))


GREEDY = SamplingParams(temperature=0, max_new_tokens=12)
each_model = pytest.mark.parametrize("name", FAMILY)


@each_model
def test_it_completes_and_fills_in_as_transformers_does(name: str, tmp_path: Path) -> None:
    folder = replica(name, tmp_path / name)
    session = open_replica(folder)
    loaded = session.loaded
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (loaded.dialogue is not None) == name.startswith("starchat")

    def expected(text: str) -> str:
        given = tokenizer(text, return_tensors="pt").input_ids
        made = theirs.generate(
            given,
            attention_mask=torch.ones_like(given),
            do_sample=False,
            max_new_tokens=GREEDY.max_new_tokens,
            eos_token_id=list(loaded.stop_ids),
            pad_token_id=0,
        )
        return tokenizer.decode(made[0, given.shape[1] :], skip_special_tokens=True)

    assert session.complete("def f(x):", GREEDY, raw=True).text == expected("def f(x):")
    dash = "-" if "santacoder" in name else "_"
    hole = f"<fim{dash}prefix>def f(x):\n<fim{dash}suffix>\n# end<fim{dash}middle>"
    prompt = PromptFitter(loaded, 128).fit_hole("def f(x):\n", "\n# end", 12)
    assert prompt.ids == tokenizer(hole)["input_ids"]
    assert join(session.fill_in("def f(x):\n", "\n# end", GREEDY)).text == expected(hole)


@each_model
def test_it_stops_and_so_does_its_conversion(name: str, tmp_path: Path) -> None:
    end = "<|end|>" if name.startswith("starchat") else "<|endoftext|>"
    folder = replica(name, tmp_path / name, always=end)
    quick_convert(folder, tmp_path / "converted", QuantConfig(bits=8, group_size=32))
    assert main(["verify", str(tmp_path / "converted")]) == 0
    stops = json.loads((tmp_path / "converted" / "generation_config.json").read_text())["eos_token_id"]
    for each in (folder, tmp_path / "converted"):
        session = open_replica(each)
        assert session.loaded.stop_ids == tuple(stops if isinstance(stops, list) else [stops])
        answer = session.complete("def f(x):", GREEDY)
        assert (answer.text, answer.finish_reason) == ("", "stop")


def test_the_first_layout_of_santacoder_is_refused_by_its_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is of type gpt2, with keys and values of one head in a tensor of their own."""
    folder = replica("gpt_bigcode-santacoder", tmp_path / "santacoder")
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "architectures": ["GPT2LMHeadCustomModel"],
        "attention_head_type": "multiquery",
        "auto_map": {"AutoModelForCausalLM": "modeling_gpt2_mq.GPT2LMHeadCustomModel"},
        "model_type": "gpt2",
    }
    (folder / "config.json").write_text(json.dumps(config))
    for command in (["plan"], ["run", "-p", "x"], ["convert", str(tmp_path / "out")]):
        assert main([command[0], str(folder), *command[1:]]) == 2
        assert "this is SantaCoder's first layout" in capsys.readouterr().err
