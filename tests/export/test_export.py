"""`lowmem export` of quantized checkpoints: every tensor, what it says of losses, nothing half-written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowmem.checkpoint import cache
from lowmem.checkpoint.files import whole
from lowmem.checkpoint.manifest import write_manifest
from lowmem.checkpoint.packing import pack_rows, pack_zeros
from lowmem.checkpoint.source.open import open_source
from lowmem.cli import main
from lowmem.errors import LowmemError, OutputError, SourceError
from lowmem.export import write
from lowmem.export.export import ExportOptions, export
from lowmem.models.dialogue import CHAT_TEMPLATE
from tests.export.gguf_files import fields_of, tensors_of
from tests.helpers import KINDS, TINY_STARCHAT, save_source, tiny_config, tiny_model
from tests.rtn_helpers import rtn, write_rtn_checkpoint

QKV = ("attn_q", "attn_k", "attn_v", "attn_qkv")


def through_transformers(file: Path) -> dict[str, torch.Tensor]:
    """A llama-like file's tensors under transformers' names, by its own loading of GGUF."""
    source = open_source(str(file))
    return {name: source.read(name).float() for name in source.infos}


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize(("bits", "type_name"), [(4, "Q4_0"), (5, "Q5_0"), (6, "Q8_0"), (3, "Q4_0")])
def test_every_weight_is_kept(tmp_path, kind, bits, type_name):
    """transformers, which undoes llama.cpp's order of q and k, reads the weights of the linears."""
    model = write_rtn_checkpoint(tiny_model(kind), tmp_path / "m", bits=bits, sym=True)
    found = export(str(tmp_path / "m"), tmp_path / "m.gguf")
    assert found.kinds == ((type_name, 14),) and not found.losses
    back = through_transformers(found.path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(back[name], tensor.float()), name


def test_transformers_loads_the_file(tmp_path):
    """from_pretrained(gguf_file=…) makes the same model of it: logits, config and tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = write_rtn_checkpoint(tiny_model("llama"), tmp_path / "m", sym=True)
    export(str(tmp_path / "m"), tmp_path / "m.gguf")
    auto: Any = AutoModelForCausalLM
    back = auto.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    ids = torch.randint(0, 4096, (1, 40))
    with torch.inference_mode():
        assert torch.allclose(back(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-4)
    text = "def main():\n    return 'x'"
    own = open_source(str(tmp_path / "m")).tokenizer()
    assert (
        AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")(text)["input_ids"]
        == own(text)["input_ids"]
    )


@pytest.mark.parametrize("layout", ["gptq", "gptq_v2", "gptq_p"])
def test_gpt_bigcode_with_several_kv_heads(tmp_path, layout):
    """Packed columns are sorted like a dense matrix's rows: all q, all k, all v."""
    model = write_rtn_checkpoint(
        tiny_model("gpt_bigcode_mha"), tmp_path / "m", group_size=64, layout=layout, sym=True
    )
    stored = tensors_of(export(str(tmp_path / "m"), tmp_path / "m.gguf").path)
    fused = model.transformer.h[1].attn.c_attn.weight.view(4, 3, 16, 64).transpose(0, 1).reshape(192, 64)
    assert stored["blk.1.attn_qkv.weight"][0] == "Q4_0"
    assert torch.equal(stored["blk.1.attn_qkv.weight"][1], fused)
    assert torch.equal(stored["blk.0.ffn_up.weight"][1], model.transformer.h[0].mlp.c_fc.weight)
    assert torch.equal(stored["token_embd.weight"][1], model.transformer.wte.weight)


@pytest.mark.parametrize("kind", KINDS)
def test_asymmetric_4_bits_fit_in_5(tmp_path, kind):
    write_rtn_checkpoint(tiny_model(kind), tmp_path / "m")
    found = export(str(tmp_path / "m"), tmp_path / "m.gguf")
    assert [name for name, _ in found.kinds] == ["Q5_0"] and not found.losses
    assert found.bits_per_weight == 5.5


def test_linears_of_several_widths(tmp_path):
    model = write_rtn_checkpoint(tiny_model("gpt_bigcode_mqa"), tmp_path / "m", sym=True)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["quantization_config"]["dynamic"] = {r"+:.*\.c_fc": {"bits": 8}}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    expected = {}
    for layer in (0, 1):
        name = f"transformer.h.{layer}.mlp.c_fc"
        wide = rtn(torch.randn(256, 64), 8, 32, sym=True)
        expected[f"blk.{layer}.ffn_up.weight"] = wide.weight()
        tensors |= {f"{name}.qweight": pack_rows(wide.q, 8), f"{name}.qzeros": pack_zeros(wide.zeros, 8)}
        tensors |= {f"{name}.scales": wide.scales, f"{name}.g_idx": wide.g_idx}
    save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    found = export(str(tmp_path / "m"), tmp_path / "m.gguf")
    assert dict(found.kinds) == {"Q4_0": 6, "Q8_0": 2}
    stored = tensors_of(found.path)
    for name, weight in expected.items():
        assert torch.equal(stored[name][1], weight)
    down = model.transformer.h[1].mlp.c_proj.weight
    assert torch.equal(stored["blk.1.ffn_down.weight"][1], down)


@pytest.mark.parametrize(("bits", "type_name", "bound"), [(4, "Q8_0", 0.01), (8, "F16", 3e-4)])
def test_what_is_rounded_is_said(tmp_path, capsys, bits, type_name, bound):
    model = write_rtn_checkpoint(tiny_model("gpt_bigcode_mqa"), tmp_path / "m", bits=bits, act_order_seed=3)
    assert main(["export", str(tmp_path / "m"), str(tmp_path / "m.gguf"), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["linears"] == {type_name: 8} and not data["exact"]
    (rounded,) = data["rounded"]
    assert "out of order" in rounded["what"] and len(rounded["tensors"]) == 8
    # The stated errors are those between the file and the weights of the checkpoint.
    stored, squares, energy, largest = tensors_of(tmp_path / "m.gguf"), 0.0, 0.0, 0.0
    names = {
        "attn.c_attn": "attn_qkv",
        "attn.c_proj": "attn_output",
        "mlp.c_fc": "ffn_up",
        "mlp.c_proj": "ffn_down",
    }
    for layer in (0, 1):
        for own, theirs in names.items():
            weight = model.transformer.h[layer].get_submodule(own).weight.detach()
            difference = (stored[f"blk.{layer}.{theirs}.weight"][1] - weight).double()
            squares, energy = (
                squares + float(difference.square().sum()),
                energy + float(weight.double().square().sum()),
            )
            largest = max(largest, float(difference.abs().max()))
    assert rounded["relative_error"] == pytest.approx((squares / energy) ** 0.5) and largest > 0
    assert rounded["largest_error"] == pytest.approx(largest)
    assert rounded["relative_error"] < bound
    assert main(["export", str(tmp_path / "m"), str(tmp_path / "m.gguf"), "--force"]) == 0
    out = capsys.readouterr().out
    assert "with the losses below" in out and "rounded: 8 × " in out


@pytest.mark.parametrize(
    ("head", "kind", "lost"), [(None, "BF16", 0), ("f16", "F16", 1), ("q8_0", "Q8_0", 1)]
)
def test_the_type_of_embedding_and_head(tmp_path, head, kind, lost):
    model = tiny_model("llama", dtype=torch.bfloat16)
    model.model.embed_tokens.weight.data[0, 0] = 2.0**-30  # float16 has no such number
    save_source(model, tmp_path / "m")
    found = export(str(tmp_path / "m"), tmp_path / "m.gguf", ExportOptions(head))
    stored = tensors_of(found.path)
    assert {stored[name][0] for name in ("token_embd.weight", "output.weight")} == {kind}
    assert stored["blk.0.ffn_up.weight"][0] == "BF16" and (len(found.losses) > 0) == bool(lost)
    difference = stored["output.weight"][1] - model.lm_head.weight.detach().float()
    assert float(difference.abs().max()) <= 2**-7 * float(model.lm_head.weight.detach().abs().max())


def test_starchats_dialogue_ends_a_turn(tmp_path):
    """Neither the config nor the tokenizer of StarChat names `<|end|>`, or has a template."""
    fields = fields_of(export(str(TINY_STARCHAT), tmp_path / "m.gguf").path)
    assert fields["tokenizer.chat_template"] == CHAT_TEMPLATE
    assert fields["tokenizer.ggml.eot_token_id"] == 4095 and fields["tokenizer.ggml.eos_token_id"] == 0
    assert fields["general.name"] == "tiny-starchat" and fields["general.architecture"] == "starcoder"
    tokens = fields["tokenizer.ggml.tokens"]
    assert tokens[fields["tokenizer.ggml.fim_pre_token_id"]] == "<fim_prefix>"
    assert tokens[fields["tokenizer.ggml.fim_suf_token_id"]] == "<fim_suffix>"
    assert tokens[fields["tokenizer.ggml.fim_mid_token_id"]] == "<fim_middle>"


def test_template_and_licence_of_the_checkpoint(tmp_path, capsys):
    model = write_rtn_checkpoint(tiny_model("llama"), tmp_path / "own", sym=True)
    assert model is not None
    template = "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}"
    (tmp_path / "own" / "chat_template.jinja").write_text(template)
    (tmp_path / "own" / "README.md").write_text(
        "---\nbase_model: HuggingFaceH4/starchat-alpha\nlicense: bigcode-openrail-m\n---\n"
    )
    out = tmp_path / "m.gguf"
    assert main(["export", str(tmp_path / "own"), str(out)]) == 0
    fields = fields_of(out)
    assert fields["tokenizer.chat_template"] == template
    assert fields["general.license"] == "bigcode-openrail-m" and fields["general.file_type"] == 2
    assert fields["general.name"] == "starchat-alpha 4-bit g32 GPTQ"
    assert fields["general.base_model.0.name"] == "starchat-alpha"
    assert fields["general.base_model.0.organization"] == "HuggingFaceH4"
    assert "use restrictions bind this file too" in capsys.readouterr().out


def test_a_sliding_window_limits_the_context(tmp_path):
    from transformers import AutoModelForCausalLM

    config = tiny_config("starcoder2")
    config.sliding_window = 128
    save_source(AutoModelForCausalLM.from_config(config), tmp_path / "m")
    found = export(str(tmp_path / "m"), tmp_path / "m.gguf")
    assert fields_of(found.path)["starcoder2.context_length"] == 128
    assert "limited to 128 tokens" in found.notes[0]


def test_the_name_of_the_file(tmp_path, monkeypatch, capsys):
    write_rtn_checkpoint(tiny_model("gpt_bigcode_mqa", layers=1), tmp_path / "coder", sym=True)
    monkeypatch.chdir(tmp_path)
    assert main(["export", "coder"]) == 0
    assert (tmp_path / "coder-Q4_0.gguf").is_file()
    written = (tmp_path / "coder-Q4_0.gguf").read_bytes()
    assert main(["export", "coder"]) == 2
    assert "coder-Q4_0.gguf exists. Give another name, or --force" in capsys.readouterr().err
    assert main(["export", "coder", "--force"]) == 0
    assert (tmp_path / "coder-Q4_0.gguf").read_bytes() == written  # the same bytes each time


def test_a_checkpoint_in_the_cache(tmp_path, monkeypatch, capsys):
    """By its name in `lowmem list`; the file is named after the model, not after the folder."""
    monkeypatch.setenv("LOWMEM_CACHE", str(tmp_path / "cache"))
    folder = cache.claim("owner/coder", "4bit-g32")
    write_rtn_checkpoint(tiny_model("gpt_bigcode_mqa", layers=1), folder, sym=True)
    (folder / "README.md").write_text("---\nbase_model: owner/coder\n---\n")
    write_manifest(folder)
    (entry,) = cache.entries()
    monkeypatch.chdir(tmp_path)
    assert main(["export", entry.name]) == 0
    assert "wrote coder-Q4_0.gguf" in capsys.readouterr().out and (tmp_path / "coder-Q4_0.gguf").is_file()


def test_refusals(tmp_path):
    write_rtn_checkpoint(tiny_model("llama", layers=1), tmp_path / "m", sym=True)
    export(str(tmp_path / "m"), tmp_path / "m.gguf")
    with pytest.raises(SourceError, match="is a GGUF file already"):
        export(str(tmp_path / "m.gguf"), tmp_path / "x.gguf")
    with pytest.raises(OutputError, match="is a folder"):
        export(str(tmp_path / "m"), tmp_path)
    with pytest.raises(OutputError, match="does not exist"):
        export(str(tmp_path / "m"), tmp_path / "none" / "x.gguf")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"model_type": "olmo"}))
    with pytest.raises(
        SourceError, match=r"'olmo', which cannot be exported\. Models of the types gpt_bigcode, llama"
    ):
        export(str(tmp_path / "m"), tmp_path / "x.gguf")
    assert not list(tmp_path.glob("x.gguf*"))


def test_damaged_values_are_refused_before_anything_is_written(tmp_path):
    write_rtn_checkpoint(tiny_model("llama", layers=1), tmp_path / "m", sym=True)
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.scales"][0, 0] = float("nan")
    save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match=r"up_proj.scales' has values that are not finite"):
        export(str(tmp_path / "m"), tmp_path / "m.gguf")
    assert not list(tmp_path.glob("m.gguf*"))


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), OSError(28, "No space left on device")], ids=["ctrl-c", "full"]
)
def test_an_interrupted_export_leaves_the_old_file(tmp_path, monkeypatch, error):
    write_rtn_checkpoint(tiny_model("llama", layers=1), tmp_path / "m", sym=True)
    out = tmp_path / "m.gguf"
    out.write_bytes(b"old")

    def stop(_done: int, _total: int) -> None:
        assert (tmp_path / "m.gguf.part").stat().st_size > 0
        raise error

    with pytest.raises((KeyboardInterrupt, OutputError)):
        export(str(tmp_path / "m"), out, ExportOptions(force=True), progress=stop)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "m.gguf"] and out.read_bytes() == b"old"


def test_a_disk_that_is_too_small_is_refused_beforehand(tmp_path, monkeypatch):
    write_rtn_checkpoint(tiny_model("llama", layers=1), tmp_path / "m", sym=True)
    monkeypatch.setattr(whole, "free_bytes", lambda folder: 1000)
    with pytest.raises(OutputError, match=r"the export needs .* give another OUT"):
        export(str(tmp_path / "m"), tmp_path / "m.gguf")
    assert not list(tmp_path.glob("m.gguf*"))


def test_a_file_that_reads_back_differently_is_refused(tmp_path, monkeypatch):
    """As from a faulty disk: one bit of what was written."""
    write_rtn_checkpoint(tiny_model("llama", layers=1), tmp_path / "m", sym=True)
    pread = os.pread

    def flipped(handle: int, count: int, offset: int) -> bytes:
        data = bytearray(pread(handle, count, offset))
        if count == 64 * 36:  # a Q4_0 matrix of 64 x 64
            data[5] ^= 1
        return bytes(data)

    monkeypatch.setattr(write.os, "pread", flipped)
    with pytest.raises(OutputError, match=r"blk.0.attn_q.weight was read back .* other weights"):
        export(str(tmp_path / "m"), tmp_path / "m.gguf")
    assert not list(tmp_path.glob("m.gguf*"))


def test_progress_counts_every_byte(tmp_path):
    write_rtn_checkpoint(tiny_model("gpt_bigcode_mqa"), tmp_path / "m", sym=True)
    seen: list[tuple[int, int]] = []
    export(str(tmp_path / "m"), tmp_path / "m.gguf", progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] and [d for d, _ in seen] == sorted(d for d, _ in seen)
    assert issubclass(OutputError, LowmemError)
