"""The head and the embedding in a plan: their exact bytes, and where 8 bits are chosen."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lowmem.cli import main
from lowmem.commands.plan import record
from lowmem.errors import InvalidRequestError
from lowmem.kernels.table_format import table_bytes
from lowmem.loading.loader import LoadOptions, load
from lowmem.loading.opening import open_model
from lowmem.plan.candidates import with_8bit_head, with_spare_heads
from lowmem.plan.memory import Form, bytes_read_a_token, head_bytes, need_on_device, weights_bytes
from lowmem.plan.planner import Budget, make_plan
from lowmem.plan.request import ModelRequest, plan_for
from lowmem.plan.shape import ModelShape, read_shape
from tests.helpers import TINY_STARCHAT, save_source, tiny_model
from tests.plan.test_planner import GIB, forms_of, shape_of
from tests.plan.test_shape import FAMILIES, build
from tests.rtn_helpers import write_rtn_checkpoint

CONTEXT = 2048


def need(shape: ModelShape, form: Form) -> int:
    return need_on_device(shape, form, CONTEXT, cuda=True).total


# ---- bytes -----------------------------------------------------------------------------------------------


def test_starchats_head_by_hand() -> None:
    """49,156 rows of 6144, padded to 769 tiles of 64: a byte each, and a float16 for each 128."""
    assert table_bytes(49156, 6144) == 769 * 64 * (6144 + 2 * 48) == 307_107_840
    for bad in (0, 48, 100):
        with pytest.raises(ValueError):
            table_bytes(64, bad)


@pytest.mark.parametrize("method", ["dense", "gptq", "int8", "nf4"])
@pytest.mark.parametrize("kind", ["gpt_bigcode_mqa", "llama"])
def test_bytes_are_those_of_the_loaded_model(method: str, kind: str, tmp_path: Path) -> None:
    """To the byte, tied and untied, by every method, but for rotary frequencies and NF4's table of codes."""
    model = tiny_model(kind, vocab=4100, dtype=torch.bfloat16)
    if method == "gptq":
        write_rtn_checkpoint(model, tmp_path)
    else:
        save_source(model, tmp_path, dtype=torch.bfloat16)
    shape, on_the_fly = read_shape(tmp_path), method if method in ("int8", "nf4") else None
    sizes, others = {}, set()
    for bits in (16, 8):
        options = LoadOptions(dtype=torch.bfloat16, on_the_fly=on_the_fly, head_bits=bits)  # type: ignore[arg-type]
        sizes[bits] = load(tmp_path, options).weight_bytes
        others.add(sizes[bits] - weights_bytes(shape, Form(method, "bfloat16", bits)))  # type: ignore[arg-type]
    assert len(others) == 1 and others.pop() < 1024
    assert sizes[16] - sizes[8] == head_bytes(shape, 16) - head_bytes(shape, 8)
    tables = 1 if kind == "gpt_bigcode_mqa" else 2
    assert head_bytes(shape, 16) == tables * 4100 * 64 * 2
    assert head_bytes(shape, 8) == tables * 65 * 64 * (64 + 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_headers_tell_the_tables_of_every_family(family: str, tmp_path: Path) -> None:
    _, model = build(family)
    model.save_pretrained(tmp_path)
    weights = {id(m.weight): m.weight for m in (model.get_input_embeddings(), model.get_output_embeddings())}
    shape = read_shape(tmp_path)
    assert head_bytes(shape, 16) == 2 * sum(weight.numel() for weight in weights.values())
    assert head_bytes(shape, 8) == sum(table_bytes(*weight.shape) for weight in weights.values())


def test_a_step_reads_the_head_and_not_the_embedding() -> None:
    tied = shape_of()
    head = replace(tied.tensors[0], name="lm_head.weight")
    untied = replace(tied, tensors=(*tied.tensors, head))
    for bits in (16, 8):
        form = Form("dense", "float16", bits)
        read = bytes_read_a_token(tied, form)
        assert read == weights_bytes(tied, form) == bytes_read_a_token(untied, form)
        assert weights_bytes(untied, form) == read + head_bytes(tied, bits)


# ---- the choice ------------------------------------------------------------------------------------------


def test_a_card_gets_an_8bit_head_only_where_a_better_version_then_fits() -> None:
    """Between the needs of 4 bits with both heads; below 3 bits are whole, above 4 bits need none."""
    forms = with_spare_heads(forms_of(shape_of(hidden=2048), [4, 3]))
    labels = [c.label for c in forms]
    assert [label for label in labels if "bnb" not in label] == [
        *("float16", "4-bit", "4-bit, 8-bit head", "3-bit", "3-bit, 8-bit head")
    ]
    by_label = {c.label: need(c.shape, c.form) for c in forms if c.form.method == "gptq"}
    assert by_label["3-bit"] < by_label["4-bit, 8-bit head"] < by_label["4-bit"]
    gptq = [c for c in forms if c.form.method == "gptq"]
    for have, label in (
        (by_label["4-bit"], "4-bit"),
        (by_label["4-bit"] - 1, "4-bit, 8-bit head"),
        (by_label["4-bit, 8-bit head"], "4-bit, 8-bit head"),
        (by_label["4-bit, 8-bit head"] - 1, "3-bit"),
        (by_label["3-bit"] - 1, "3-bit, 8-bit head"),
    ):
        plan = make_plan(gptq, Budget("card", 64 * GIB, have), CONTEXT)
        assert (plan.chosen.candidate.label, plan.chosen.device) == (label, "card"), have
        shown = [o.candidate.label for o in plan.options]
        assert ("8-bit head" in " ".join(shown)) == plan.chosen.candidate.only_to_fit
        assert ("--head-bits 16" in plan.reason) == plan.chosen.candidate.only_to_fit
    plan = make_plan(gptq, Budget("card", 64 * GIB, by_label["4-bit"] - 1), CONTEXT)
    assert "4-bit, 8-bit head is the best version that fits card" in plan.reason
    assert "; 4-bit would need " in plan.reason


def test_a_cpu_keeps_16_bits_unless_it_is_asked(tmp_path: Path) -> None:
    shaped = forms_of(shape_of(hidden=2048), [4])
    only = [c for c in with_spare_heads(shaped) if c.form.method == "gptq"]
    host = make_plan(only, Budget("cpu", 64 * GIB), CONTEXT).chosen
    assert host.candidate.label == "4-bit"
    split = make_plan(only, Budget("card", 64 * GIB, 1 << 20), CONTEXT).chosen
    assert (split.device, split.candidate.label) == ("cpu", "4-bit")
    asked = [c for c in map(with_8bit_head, shaped) if c is not None]
    assert make_plan(asked, Budget("cpu", 64 * GIB), CONTEXT).chosen.candidate.form.head_bits == 8


def test_a_request_chooses_the_head(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LOWMEM_CACHE", str(tmp_path))
    labels = {
        bits: plan_for(ModelRequest(TINY_STARCHAT, device="cpu", head_bits=bits)).chosen.candidate.label
        for bits in (None, 16, 8)
    }
    assert labels == {None: "bfloat16", 16: "bfloat16", 8: "bfloat16, 8-bit head"}
    plan = plan_for(ModelRequest(TINY_STARCHAT, device="cpu", head_bits=8))
    assert {o.candidate.form.head_bits for o in (*plan.options, *plan.possible)} == {8}
    chosen = record(plan)["chosen"]
    assert isinstance(chosen, dict) and (chosen["head_bits"], chosen["head"]) == (8, table_bytes(4096, 256))
    loaded = open_model(ModelRequest(TINY_STARCHAT, device="cpu", head_bits=8, context=64))
    assert loaded.label == "bfloat16, 8-bit head"
    assert loaded.option is not None and loaded.option.candidate.form.head_bits == 8


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    """Other widths, and a model whose rows no group divides: before anything is loaded."""
    with pytest.raises(InvalidRequestError, match=r"head_bits=4 is not supported\. Use 16 or 8"):
        ModelRequest("m", head_bits=4)
    save_source(tiny_model("llama", hidden=80, heads=5), tmp_path)
    with pytest.raises(InvalidRequestError, match=r"cannot be held in 8 bits.* Use --head-bits 16"):
        plan_for(ModelRequest(tmp_path, device="cpu", head_bits=8))
    assert plan_for(ModelRequest(tmp_path, device="cpu")).chosen.candidate.form.head_bits == 16
    assert with_spare_heads(forms_of(shape_of(hidden=80), [4])) == forms_of(shape_of(hidden=80), [4])


def test_the_option_of_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    """`auto` and 16 are the plan as it was; 8 is named wherever the version is."""
    found = {}
    for words in ([], ["--head-bits", "auto"], ["--head-bits", "16"], ["--head-bits", "8"]):
        assert main(["plan", str(TINY_STARCHAT), "--device", "cpu", "--json", *words]) == 0
        found[" ".join(words)] = json.loads(capsys.readouterr().out)["chosen"]
    for words in ("", "--head-bits auto", "--head-bits 16"):
        assert (found[words]["label"], found[words]["head"]) == ("bfloat16", 2 * 4096 * 256)
    chosen = found["--head-bits 8"]
    assert (chosen["label"], chosen["head"]) == ("bfloat16, 8-bit head", table_bytes(4096, 256))
    words = [
        "run",
        str(TINY_STARCHAT),
        "--device",
        "cpu",
        "--head-bits",
        "8",
        "-p",
        "def",
        "--max-tokens",
        "2",
    ]
    assert main(words) == 0
    assert "bfloat16, 8-bit head, 12 MiB of weights" in capsys.readouterr().err
    for command in ("run", "fim", "serve", "plan"):
        with pytest.raises(SystemExit) as caught:
            main([command, str(TINY_STARCHAT), "--head-bits", "4"])
        assert caught.value.code == 2
        assert "invalid choice: '4' (choose from" in capsys.readouterr().err
