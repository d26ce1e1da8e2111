"""A 16-bit model as GGUF: read back by transformers and by hand; what llama.cpp would misread is refused."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from lowmem.checkpoint.source.open import open_source
from lowmem.cli import main
from lowmem.errors import OutputError, SourceError
from lowmem.export.export import export
from lowmem.export.vocabulary import read_vocabulary
from tests.export.gguf_files import fields_of, tensors_of
from tests.helpers import TINY_STARCHAT, save_source, tiny_model, write_starchat_tokenizer

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 500000.0,
}


def write_gguf(folder: str, file: Path) -> Path:
    return export(folder, file).path


@pytest.mark.parametrize(
    ("dtype", "tied"), [(torch.float32, True), (torch.float16, False), (torch.bfloat16, True)], ids=str
)
def test_a_llama_comes_back_through_transformers_own_reader(tmp_path, dtype, tied):
    """transformers turns llama.cpp's order of q and k rows back: every tensor is the source's."""
    model = tiny_model("llama", hidden=64, heads=4, vocab=4096, dtype=dtype, tied=tied)
    file = write_gguf(str(save_source(model, tmp_path / "source")), tmp_path / "m.gguf")
    back = open_source(str(file))
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and tied:
            assert name not in back.infos
        else:
            assert torch.equal(back.read(name).float(), tensor.float()), name
    assert back.config().hidden_size == 64 and back.config().num_key_value_heads == 2
    kinds = {name: kind for name, (kind, _) in tensors_of(file).items()}
    matrix = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    assert kinds["blk.1.ffn_up.weight"] == kinds["token_embd.weight"] == matrix
    assert kinds["blk.1.attn_norm.weight"] == "F32"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_one_kv_head_is_stored_as_it_is(tmp_path, dtype):
    model = tiny_model("gpt_bigcode_mqa", dtype=dtype)
    file = write_gguf(str(save_source(model, tmp_path / "source", duplicate_head=True)), tmp_path / "m.gguf")
    state, stored = model.state_dict(), tensors_of(file)
    pairs = {
        "token_embd.weight": "transformer.wte.weight",
        "position_embd.weight": "transformer.wpe.weight",
        "output_norm.bias": "transformer.ln_f.bias",
        "blk.1.attn_qkv.weight": "transformer.h.1.attn.c_attn.weight",
        "blk.1.attn_qkv.bias": "transformer.h.1.attn.c_attn.bias",
        "blk.0.attn_output.weight": "transformer.h.0.attn.c_proj.weight",
        "blk.0.ffn_up.weight": "transformer.h.0.mlp.c_fc.weight",
        "blk.0.ffn_down.bias": "transformer.h.0.mlp.c_proj.bias",
    }
    for name, original in pairs.items():
        assert torch.equal(stored[name][1], state[original].float()), name
    assert len(stored) == 2 + 2 + 2 * 12 and "output.weight" not in stored
    assert stored["position_embd.weight"][0] == "F32"  # llama.cpp adds it, and has no sum of other types
    fields = fields_of(file)
    assert fields["general.architecture"] == "starcoder" and fields["starcoder.attention.head_count_kv"] == 1
    assert fields["tokenizer.ggml.pre"] == "starcoder" and fields["tokenizer.ggml.model"] == "gpt2"
    assert fields["tokenizer.ggml.eot_token_id"] == 4095 and fields["tokenizer.ggml.eos_token_id"] == 0
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert fields["starcoder.context_length"] == 256 and fields["starcoder.feed_forward_length"] == 256


def test_several_kv_heads_are_sorted_into_q_k_and_v(tmp_path):
    """By attention itself: q, k and v of llama.cpp's order, head by head, give the model's own output."""
    model = tiny_model("gpt_bigcode_mha", layers=1)
    file = write_gguf(str(save_source(model, tmp_path / "source")), tmp_path / "m.gguf")
    stored = tensors_of(file)
    hidden, heads = 64, 4
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 6, hidden, generator=generator)
    weight, bias = stored["blk.0.attn_qkv.weight"][1], stored["blk.0.attn_qkv.bias"][1]
    q, k, v = (
        (x @ part.T + offset).view(1, 6, heads, -1).transpose(1, 2)
        for part, offset in zip(weight.split(hidden), bias.split(hidden), strict=True)
    )
    mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    out_weight, out_bias = stored["blk.0.attn_output.weight"][1], stored["blk.0.attn_output.bias"][1]
    found = mixed.transpose(1, 2).reshape(1, 6, hidden) @ out_weight.T + out_bias
    attention = model.transformer.h[0].attn
    mask = torch.full((6, 6), -torch.inf).triu(1)[None, None]
    with torch.no_grad():
        expected = attention(x, attention_mask=mask)[0]
    assert torch.allclose(found, expected, atol=1e-5)
    assert fields_of(file)["starcoder.attention.head_count_kv"] == heads


def test_starchats_vocabulary(tmp_path):
    """The dialogue tokens at StarChat Alpha's ids are control tokens, and no other of the 49156 is."""
    write_starchat_tokenizer(tmp_path)
    found = read_vocabulary(PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json")), 49156)
    assert len(found.tokens) == len(found.types) == 49156
    assert found.tokens[49152:] == ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
    assert [i for i, kind in enumerate(found.types) if kind == gguf.TokenType.CONTROL] == [
        *range(5),
        *range(49152, 49156),
    ]
    assert found.pre == "starcoder"


def test_vocabulary_with_gaps():
    tokenizer = open_source(str(TINY_STARCHAT)).tokenizer()
    found = read_vocabulary(tokenizer, 4100)
    assert found.tokens[4096:] == ("[PAD4096]", "[PAD4097]", "[PAD4098]", "[PAD4099]")
    assert set(found.types[4096:]) == {gguf.TokenType.UNUSED} and len(found.merges) == 3831
    assert found.merges[0] == "Ġ Ġ"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre_tokenizer": {"type": "Whitespace"}}, "not a byte-level BPE"),
        ({"normalizer": {"type": "NFKC"}}, "not a byte-level BPE"),
    ],
)
def test_tokenizers_that_llama_cpp_would_misread(tmp_path, changes, message):
    folder = save_source(tiny_model("gpt_bigcode_mqa", layers=1), tmp_path / "source")
    data = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(data | changes))
    with pytest.raises(SourceError, match=message):
        write_gguf(str(folder), tmp_path / "m.gguf")
    assert not list(tmp_path.glob("*.gguf*"))


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("gpt_bigcode_mqa", {"activation_function": "relu"}, "is 'relu'"),
        ("gpt_bigcode_mqa", {"scale_attn_weights": False}, "not scaled"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "dynamic"),
        ("qwen2", {"rope_parameters": {"rope_type": "llama3", **LLAMA3}}, "'llama3'"),
        ("starcoder2", {"use_bias": False}, "no biases"),
        ("llama", {"hidden_act": "gelu"}, "'gelu'"),
    ],
)
def test_models_that_llama_cpp_would_compute_otherwise(tmp_path, kind, changes, message):
    folder = save_source(tiny_model(kind, layers=1), tmp_path / "source")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(SourceError, match=message):
        write_gguf(str(folder), tmp_path / "m.gguf")
    assert not list(tmp_path.glob("*.gguf*"))


def test_the_file_is_whole_or_not_there(tmp_path, monkeypatch, capsys):
    folder = save_source(tiny_model("gpt_bigcode_mqa", layers=1), tmp_path / "source")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_ti_data_to_file", full)
    with pytest.raises(OutputError, match=r"the disk is full: .*m.gguf"):
        write_gguf(str(folder), tmp_path / "m.gguf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]
    assert main(["export", str(tmp_path / "absent"), str(tmp_path / "m.gguf")]) == 2
    assert "does not exist" in capsys.readouterr().err
