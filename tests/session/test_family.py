"""StarChat's family by name: the replicas of tests/session/family.py complete, answer, stop and fill in.

transformers is the oracle. The weights are random and small, so this shows that layouts, settings, tokens and
prompts are read as published, and nothing about the quality of answers.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lowmem
from lowmem.checkpoint.source.fitted import fitted
from lowmem.checkpoint.source.open import open_source
from lowmem.cli import main
from lowmem.config import QuantConfig, SamplingParams
from lowmem.models.architecture import inspect
from lowmem.models.dialogue import Message
from lowmem.plan.shape import as_converted, read_shape
from lowmem.prompts import PromptFitter
from lowmem.session import join
from tests.convert.convert_helpers import quick_convert
from tests.helpers import starchat_replica, write_weights
from tests.session.family import CHAT, END_50256, FAMILY, NAMED, STARCODER, replica, transformers_model

GREEDY = SamplingParams(temperature=0, max_new_tokens=12)
each_model = pytest.mark.parametrize("name", FAMILY)


def open_replica(folder: Path) -> lowmem.Session:
    return lowmem.Session(lowmem.open_model(str(folder), context=128, device="cpu", dtype="float32"))


@each_model
def test_it_completes_and_fills_in_as_transformers_does(name: str, tmp_path: Path) -> None:
    folder = replica(name, tmp_path / name)
    session = open_replica(folder)
    loaded = session.loaded
    theirs = transformers_model(folder)
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

    assert session.complete("def f(x):", GREEDY, raw=True).text == expected("def f(x):") != ""
    dash = "-" if "santacoder" in name else "_"
    hole = f"<fim{dash}prefix>def f(x):\n<fim{dash}suffix>\n# end<fim{dash}middle>"
    prompt = PromptFitter(loaded, 128).fit_hole("def f(x):\n", "\n# end", 12)
    assert prompt.ids == tokenizer(hole)["input_ids"]
    assert join(session.fill_in("def f(x):\n", "\n# end", GREEDY)).text == expected(hole)


@each_model
def test_plan_reads_the_shape_of_the_model(name: str, tmp_path: Path) -> None:
    """Without torch, and from the stored names and layout."""
    folder = replica(name, tmp_path / name)
    shape, source = read_shape(folder), open_source(folder)
    config = source.config()
    model = transformers_model(folder)
    architecture = inspect(config)
    linears = [linear for layer in architecture.layers for linear in layer.linears]
    assert (shape.model_type, shape.layers) == (architecture.model_type, 2) == (config.model_type, 2)
    assert shape.linear_sizes == {(linear.in_features, linear.out_features) for linear in linears}
    assert sum(tensor.linear for tensor in shape.tensors) == len(linears)
    assert sum(t.numel for t in shape.tensors) == sum(p.numel() for p in model.parameters())
    assert shape.positions == config.max_position_embeddings
    with torch.no_grad():
        cache = model(torch.zeros(1, 5, dtype=torch.long), use_cache=True).past_key_values
    assert {layer.keys.shape for layer in cache.layers} == {(1, shape.kv_heads, 5, shape.head_dim)}
    assert shape.transposed == FAMILY[name].first_layout
    assert shape.stored == str(FAMILY[name].dtype).removeprefix("torch.")


@each_model
def test_it_stops_and_so_does_its_conversion(name: str, tmp_path: Path) -> None:
    end = "<|end|>" if name.startswith("starchat") else "<|endoftext|>"
    folder = replica(name, tmp_path / name, always=end)
    quick_convert(folder, tmp_path / "converted", QuantConfig(bits=4, group_size=32), rows=4)
    for checked in (folder, tmp_path / "converted"):
        assert main(["verify", str(checked)]) == 0
    written = json.loads((tmp_path / "converted" / "generation_config.json").read_text())
    stops = (
        written["eos_token_id"] if isinstance(written["eos_token_id"], list) else [written["eos_token_id"]]
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert stops[0] == tokenizer.convert_tokens_to_ids(end)
    for each in (folder, tmp_path / "converted"):
        session = open_replica(each)
        assert session.loaded.stop_ids == tuple(stops)
        answer = session.complete("def f(x):", GREEDY)
        assert (answer.text, answer.finish_reason) == ("", "stop")
    planned, made = as_converted(read_shape(folder), 4), read_shape(tmp_path / "converted")
    assert made.linear_sizes == planned.linear_sizes and made.signature == planned.signature


@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("name", ["starchat-alpha", "santacoder", "starcoder2-15b"])
def test_other_widths(name: str, bits: int, tmp_path: Path) -> None:
    folder = replica(name, tmp_path / name)
    quick_convert(folder, tmp_path / "converted", QuantConfig(bits=bits, group_size=32), rows=4)
    assert main(["verify", str(tmp_path / "converted")]) == 0
    prompt = torch.arange(20).view(1, -1)
    theirs, ours = transformers_model(folder), open_replica(tmp_path / "converted").loaded.model
    with torch.no_grad():
        wanted, found = theirs(prompt).logits, ours(prompt).logits
    error = (found - wanted).norm() / (wanted - wanted.mean(-1, keepdim=True)).norm()
    assert error < {3: 0.5, 8: 0.05}[bits]


# ---- what was not found: both possibilities

UNKNOWN_FILES = [name for name, published in FAMILY.items() if "weight files not found" in published.source]


def test_some_files_were_not_found() -> None:
    assert {"starcoder", "starcoderbase-1b", "starcoderbase-3b", "starcoderplus"} <= set(UNKNOWN_FILES)


@pytest.mark.parametrize("name", UNKNOWN_FILES)
def test_other_kinds_of_weight_files_hold_the_same_model(name: str, tmp_path: Path) -> None:
    folder = replica(name, tmp_path / name)
    first, shape = open_source(folder), read_shape(folder)
    tensors = {tensor: first.read(tensor) for tensor in first.infos}
    for stored in (tensors, {**tensors, "lm_head.weight": tensors["transformer.wte.weight"].clone()}):
        other = tmp_path / f"{len(stored)}"
        shutil.copytree(folder, other, ignore=shutil.ignore_patterns("*.safetensors"))
        write_weights(stored, other, format="bin", shards=3)
        second = fitted(open_source(other))
        assert all(torch.equal(second.read(tensor), tensors[tensor]) for tensor in tensors)
        assert read_shape(other) == shape and not second.untied


@pytest.mark.parametrize("declared", [None, [], CHAT, [*STARCODER, *CHAT]], ids=["no file", "", "4", "23"])
def test_alphas_dialogue_does_not_depend_on_its_special_tokens_map(
    declared: list[str] | None, tmp_path: Path
) -> None:
    folder = replica("starchat-alpha", tmp_path / "alpha")
    (folder / "special_tokens_map.json").unlink()
    if declared is not None:
        special = {"additional_special_tokens": declared, **NAMED}
        (folder / "special_tokens_map.json").write_text(json.dumps(special))
    loaded = open_replica(folder).loaded
    assert loaded.dialogue is not None and loaded.stop_ids == (loaded.dialogue.end_id, 0)
    assert loaded.dialogue.encode(loaded.tokenizer, ASKED, True) == loaded.tokenizer(PROMPT)["input_ids"]


# ---- StarChat's dialogue

ASKED = [Message("user", "How do I sort a list in Python?")]
PROMPT = "<|system|>\n<|end|>\n<|user|>\nHow do I sort a list in Python?<|end|>\n<|assistant|>"
"""As the cards of Alpha and Beta spell it."""


@pytest.mark.parametrize("name", ["starchat-alpha", "starchat-beta"])
def test_the_dialogue_is_that_of_the_cards(name: str, tmp_path: Path) -> None:
    folder = replica(name, tmp_path / name)
    assert not (folder / "chat_template.jinja").exists()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template is None and tokenizer.pad_token is None
    loaded = open_replica(folder).loaded
    assert loaded.dialogue is not None
    assert loaded.dialogue.render(ASKED, True) == PROMPT
    ids = loaded.dialogue.encode(tokenizer, ASKED, True)
    assert ids == tokenizer(PROMPT)["input_ids"]
    added = json.loads((folder / "added_tokens.json").read_text())
    assert [i for i in ids if i in added.values()] == [
        added[f"<|{marker}|>"] for marker in ("system", "end", "user", "end", "assistant")
    ]
    further = [*ASKED, Message("assistant", "sorted(xs)"), Message("user", "And in reverse?")]
    assert loaded.dialogue.render(further, True) == (
        f"{PROMPT}\nsorted(xs)<|end|>\n<|user|>\nAnd in reverse?<|end|>\n<|assistant|>"
    )
    assert (
        loaded.dialogue.encode(tokenizer, further, True)
        == tokenizer(loaded.dialogue.render(further, True))["input_ids"]
    )
    assert loaded.stop_ids == (added["<|end|>"], 0)


def test_the_dialogue_ids_of_the_whole_vocabulary(tmp_path: Path) -> None:
    """At 49156 tokens, the markers have the ids that the cards name."""
    loaded = open_replica(starchat_replica(tmp_path / "alpha", n_positions=128)).loaded
    assert loaded.dialogue is not None
    ids = loaded.dialogue.encode(loaded.tokenizer, ASKED, True)
    newline = loaded.tokenizer("\n")["input_ids"]
    asked = loaded.tokenizer("\nHow do I sort a list in Python?")["input_ids"]
    assert ids == [49152, *newline, 49155, *newline, 49153, *asked, 49155, *newline, 49154]
    assert loaded.stop_ids == (49155, 0)


def test_starchat_alpha_is_stored_as_published(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = replica("starchat-alpha", tmp_path / "alpha")
    names = {path.name for path in folder.iterdir()}
    assert names == {
        *(f"pytorch_model-0000{number}-of-00004.bin" for number in range(1, 5)),
        *("pytorch_model.bin.index.json", "config.json", "generation_config.json", "added_tokens.json"),
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    }
    source = open_source(folder)
    assert {info.dtype for info in source.infos.values()} == {"float16"}
    assert source.same_values("lm_head.weight", "transformer.wte.weight")
    assert fitted(source) is source and not source.untied
    assert main(["verify", str(folder)]) == 0
    assert "lm_head.weight is stored twice" in capsys.readouterr().err
    quick_convert(folder, tmp_path / "converted", QuantConfig(bits=4, group_size=32), rows=4)
    converted = open_source(tmp_path / "converted")
    assert "lm_head.weight" not in converted.infos and converted.config().tie_word_embeddings
    written = json.loads((tmp_path / "converted" / "generation_config.json").read_text())
    assert written["eos_token_id"] == [source.tokenizer().convert_tokens_to_ids("<|end|>"), 0]


# ---- SantaCoder's first layout


def first_layout_logits(folder: Path, ids: list[int]) -> torch.Tensor:
    """The forward pass of modeling_gpt2_mq.py, written from its description, on the stored tensors.

    A Conv1D computes x @ W + b; keys and values are the two halves of kv_attn, for all heads alike.
    """
    config = json.loads((folder / "config.json").read_text())
    stored = torch.load(folder / "pytorch_model.bin")
    heads, width = config["n_head"], config["n_embd"]

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * stored[f"transformer.{name}.weight"] + stored[f"transformer.{name}.bias"]

    def conv(name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ stored[f"transformer.{name}.weight"] + stored[f"transformer.{name}.bias"]

    def gelu_fast(x: torch.Tensor) -> torch.Tensor:
        return 0.5 * x * (1 + torch.tanh(x * 0.7978845608 * (1 + 0.044715 * x * x)))

    x = stored["transformer.wte.weight"][ids] + stored["transformer.wpe.weight"][: len(ids)]
    for layer in range(config["n_layer"]):
        inner = norm(f"h.{layer}.ln_1", x)
        keys, values = conv(f"h.{layer}.attn.kv_attn", inner).split(width // heads, dim=-1)
        out = []
        for queries in conv(f"h.{layer}.attn.q_attn", inner).split(width // heads, dim=-1):
            scores = queries @ keys.T / (width // heads) ** 0.5
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), float("-inf"))
            out.append(scores.softmax(-1) @ values)
        x = x + conv(f"h.{layer}.attn.c_proj", torch.cat(out, dim=-1))
        inner = gelu_fast(conv(f"h.{layer}.mlp.c_fc", norm(f"h.{layer}.ln_2", x)))
        x = x + conv(f"h.{layer}.mlp.c_proj", inner)
    logits: torch.Tensor = norm("ln_f", x) @ stored["transformer.wte.weight"].T
    return logits


def test_santacoders_first_layout_computes_what_its_own_code_does(tmp_path: Path) -> None:
    folder = replica("santacoder", tmp_path / "santacoder")
    ids = [5, 40, 7, 260, 3, 99, 14]
    wanted = first_layout_logits(folder, ids)
    with torch.no_grad():
        found = open_replica(folder).loaded.model(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_the_conversion_of_the_first_layout_is_that_of_the_second(tmp_path: Path) -> None:
    """Converted from either layout, the tensors have the same bytes; the config names no code."""
    first = replica("santacoder", tmp_path / "first")
    second = tmp_path / "second"
    transformers_model(first).save_pretrained(second)
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(first / file, second / file)
    made = []
    for folder in (first, second):
        out = tmp_path / f"{folder.name}-4bit"
        quick_convert(folder, out, QuantConfig(bits=4, group_size=32), rows=4)
        made.append(open_source(out))
    assert made[0].infos.keys() == made[1].infos.keys()
    for name in made[0].infos:
        assert torch.equal(made[0].read(name), made[1].read(name)), name
    config = json.loads((tmp_path / "first-4bit" / "config.json").read_text())
    assert config["model_type"] == "gpt_bigcode" and "auto_map" not in config
    loaded: Any = AutoModelForCausalLM.from_config(made[0].config())
    assert type(loaded).__name__ == "GPTBigCodeForCausalLM"


def test_a_pickled_head_that_shares_the_embeddings_storage(tmp_path: Path) -> None:
    """As torch.save writes a tied model's state; whether bigcode/santacoder's file has one was not found."""
    folder = replica("santacoder", tmp_path / "santacoder")
    shape, stored = read_shape(folder), torch.load(folder / "pytorch_model.bin")
    torch.save({**stored, "lm_head.weight": stored["transformer.wte.weight"]}, folder / "pytorch_model.bin")
    assert read_shape(folder) == shape and main(["verify", str(folder)]) == 0
    ids = [5, 40, 7, 260, 3]
    with torch.no_grad():
        found = open_replica(folder).loaded.model(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(found, first_layout_logits(folder, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_reading_rows_and_ranges_of_joined_tensors(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = replica("santacoder", tmp_path / "santacoder")
    expected = transformers_model(folder).state_dict()
    if kind == "safetensors":
        write_weights(torch.load(folder / "pytorch_model.bin"), folder, shards=2)
        (folder / "pytorch_model.bin").unlink()
    source = fitted(open_source(folder))
    assert main(["verify", str(folder)]) == 0
    assert "4 tensors are not of this model, and are not used" in capsys.readouterr().err
    for name, info in source.infos.items():
        if name in expected:
            assert info.shape == tuple(expected[name].shape)
            assert torch.equal(source.read(name), expected[name])
            if len(info.shape) == 2:
                assert torch.equal(source.read(name, slice(3, 9)), expected[name][3:9])
                assert torch.equal(source.read(name, torch.tensor([2, 30])), expected[name][[2, 30]])
    if kind == "safetensors":
        joined = "transformer.h.1.attn.c_attn.weight"
        assert sum(part.size for part in source.byte_ranges([joined])) == source.infos[joined].nbytes


def test_the_first_published_settings_of_santacoder_and_starcoder2_still_stop(tmp_path: Path) -> None:
    """bigcode/santacoder first named token 50256, beyond its vocabulary, as the end."""
    folder = replica("santacoder", tmp_path / "santacoder", always="<|endoftext|>")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "bos_token_id": 50256, "eos_token_id": 50256}))
    (folder / "generation_config.json").write_text(json.dumps(END_50256))
    answer = open_replica(folder).complete("def f(x):", GREEDY)
    assert (answer.text, answer.finish_reason) == ("", "stop")


def test_a_setting_that_only_its_own_code_computes_is_refused_by_its_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = replica("santacoder", tmp_path / "santacoder")
    config = json.loads((folder / "config.json").read_text())
    config["scale_attn_by_inverse_layer_idx"] = True
    (folder / "config.json").write_text(json.dumps(config))
    for command in (["plan"], ["run", "-p", "x"], ["convert", str(tmp_path / "out")], ["verify"]):
        assert main([command[0], str(folder), *command[1:]]) == 2
        printed = capsys.readouterr()
        assert "which only the code beside its weights does" in printed.err + printed.out, command


def test_a_first_layout_without_half_of_its_attention_is_damaged(tmp_path: Path) -> None:
    folder = replica("santacoder", tmp_path / "santacoder")
    stored = torch.load(folder / "pytorch_model.bin")
    for part in ("weight", "bias"):
        del stored[f"transformer.h.1.attn.q_attn.{part}"]
    torch.save(stored, folder / "pytorch_model.bin")
    assert main(["verify", str(folder)]) != 0
    with pytest.raises(lowmem.LowmemError, match=r"h\.1\.attn"):
        open_replica(folder)
