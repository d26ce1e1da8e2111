"""verify finds every kind of damage, names file and tensor, and accepts intact checkpoints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowmem.checkpoint.files.shards import INDEX_FILE, SINGLE_FILE
from lowmem.checkpoint.manifest import MANIFEST_FILE, write_manifest
from lowmem.checkpoint.verify.converted import VerifyReport, verify
from lowmem.commands.verify import summary
from lowmem.errors import ForeignError, VerifyError
from tests.helpers import save_source, tiny_model
from tests.rtn_helpers import write_rtn_checkpoint

MIXED = {"c_attn": 6, "c_fc": 2}

UP = "model.layers.0.mlp.up_proj"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    write_rtn_checkpoint(tiny_model("llama"), folder, bits=4)
    write_manifest(folder)
    return folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    write_rtn_checkpoint(tiny_model("gpt_bigcode_mqa"), folder, bits=3, shards=3)
    write_manifest(folder)
    return folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def found(report: VerifyReport) -> list[str]:
    return [str(problem) for problem in report.problems]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("gpt_bigcode_mqa", {"bits": 8}),
        ("gpt_bigcode_mha", {"bits": 3, "group_size": -1}),
        ("starcoder2", {"bits": 2, "shards": 2}),
        ("llama", {"bits": 4, "layout": "gptq_v2"}),
        ("llama", {"bits": 6}),
        ("llama", {"bits": 3, "layout": "gptq_p"}),
    ],
    ids=str,
)
def test_whole_checkpoints_are_ok(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    write_rtn_checkpoint(tiny_model(kind), tmp_path, **options)
    theirs = verify(tmp_path)
    assert theirs.ok and not theirs.ours, found(theirs)
    assert "digests were not compared" in theirs.notes[0]
    write_manifest(tmp_path)
    steps: list[tuple[int, int]] = []
    ours = verify(tmp_path, lambda done, total: steps.append((done, total)))
    assert ours.ok and ours.ours and not ours.notes, found(ours)
    assert ours.format is not None and ours.format.default.bits == options["bits"]
    assert ours.linears == {"gpt_bigcode_mqa": 8, "gpt_bigcode_mha": 8, "starcoder2": 12, "llama": 14}[kind]
    assert steps == sorted(steps) and steps[-1][0] == steps[-1][1]
    ours.check()


def test_the_summary_names_the_widths_that_linears_have(tmp_path: Path) -> None:
    """Not the default of a mixed checkpoint as if all were stored so."""
    write_rtn_checkpoint(tiny_model("gpt_bigcode_mqa"), tmp_path / "mixed", bits=4, others=MIXED)
    write_rtn_checkpoint(tiny_model("gpt_bigcode_mqa"), tmp_path / "four", bits=4)
    mixed, four = verify(tmp_path / "mixed"), verify(tmp_path / "four")
    assert mixed.ok, found(mixed)
    assert summary(mixed).endswith(" 8 linears of 2/4/6 bits")
    assert summary(four).endswith(" 8 linears of 4 bits (g32)")


def test_a_dense_checkpoint_can_be_checked_too(tmp_path: Path) -> None:
    save_source(tiny_model("llama"), tmp_path)
    report = verify(tmp_path)
    assert report.ok and report.format is None and report.linears == 0


def test_a_stored_copy_of_a_tied_head_is_accepted(tmp_path: Path) -> None:
    model = write_rtn_checkpoint(tiny_model("gpt_bigcode_mqa"), tmp_path)
    tensors = load_file(tmp_path / SINGLE_FILE)
    tensors["lm_head.weight"] = model.lm_head.weight.detach().clone()
    save_file(tensors, tmp_path / SINGLE_FILE)
    write_manifest(tmp_path)
    assert verify(tmp_path).ok


def set_value(name: str, value: float) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name].view(-1)[5] = value

    return change


def set_tensor(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name] = make(tensors[name]).contiguous()

    return change


def drop(name: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        del tensors[name]

    return change


def add(name: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name] = torch.zeros(4)

    return change


@pytest.mark.parametrize(
    ("change", "tensor", "what"),
    [
        (drop(f"{UP}.qweight"), f"{UP}.qweight", "missing"),
        (drop(f"{UP}.g_idx"), f"{UP}.g_idx", "missing"),
        (drop("model.norm.weight"), "model.norm.weight", "missing"),
        (drop("lm_head.weight"), "lm_head.weight", "missing"),
        (set_tensor(f"{UP}.qweight", lambda t: t[:-1]), f"{UP}.qweight", r"shape \[7, 128\]"),
        (set_tensor(f"{UP}.qzeros", lambda t: t.T), f"{UP}.qzeros", "shape"),
        (set_tensor(f"{UP}.scales", lambda t: t[:1]), f"{UP}.scales", "shape"),
        (set_tensor(f"{UP}.qweight", lambda t: t.long()), f"{UP}.qweight", "int64"),
        (set_tensor(f"{UP}.scales", lambda t: t.int()), f"{UP}.scales", "int32"),
        (set_value(f"{UP}.scales", float("nan")), f"{UP}.scales", "not finite"),
        (set_value(f"{UP}.scales", float("inf")), f"{UP}.scales", "not finite"),
        (set_value(f"{UP}.g_idx", 2), f"{UP}.g_idx", "groups 0 to 2"),
        (set_value(f"{UP}.g_idx", -1), f"{UP}.g_idx", "groups -1"),
        (set_value(f"{UP}.g_idx", 1), f"{UP}.g_idx", "out of order"),
        (set_value(f"{UP}.qzeros", -1), f"{UP}.qzeros", "disagree"),
        (set_value("model.norm.weight", float("nan")), "model.norm.weight", "not finite"),
        (set_tensor("model.norm.weight", lambda t: t[1:]), "model.norm.weight", "shape"),
        (add("model.layers.5.norm"), "model.layers.5.norm", "not a tensor of this model"),
        (add(f"{UP}2.scales"), f"{UP}2.scales", "not a tensor of this model"),
    ],
)
def test_a_damaged_tensor_is_named(
    copy: Path, change: Callable[[Tensors], None], tensor: str, what: str
) -> None:
    """With new digests, so that only the checks of tensors can find it."""
    tensors = load_file(copy / SINGLE_FILE)
    change(tensors)
    save_file(tensors, copy / SINGLE_FILE)
    write_manifest(copy)
    report = verify(copy)
    assert len(report.problems) == 1, found(report)
    problem = report.problems[0]
    assert problem.tensor == tensor
    with pytest.raises(VerifyError, match=what):
        report.check()
    if "missing" not in what:
        assert problem.file == SINGLE_FILE


def test_any_flipped_byte_is_found(copy: Path) -> None:
    """One byte anywhere in any file, the manifest too."""
    generator = torch.Generator().manual_seed(0)
    for file in sorted(copy.iterdir()):
        data = file.read_bytes()
        for _ in range(3):
            place = int(torch.randint(len(data), (1,), generator=generator))
            changed = bytearray(data)
            changed[place] ^= 0x15
            file.write_bytes(changed)
            report = verify(copy)
            named = {problem.file for problem in report.problems}
            if file.name != MANIFEST_FILE:
                assert file.name in named, (file.name, place)
            else:  # a changed digest makes its file suspect, a broken manifest itself
                assert report.problems or json.loads(changed) == json.loads(data)
        file.write_bytes(data)
    assert verify(copy).ok


def test_missing_unlisted_and_truncated_files_are_named(copy: Path) -> None:
    (copy / "generation_config.json").unlink()
    (copy / "virus.txt").write_text("x")
    weights = (copy / SINGLE_FILE).read_bytes()
    (copy / SINGLE_FILE).write_bytes(weights[:-100])
    problems = found(verify(copy))
    assert "generation_config.json: the file is missing" in problems
    assert any(p.startswith("virus.txt: the file is not listed") for p in problems)
    assert any(p.startswith(f"{SINGLE_FILE}: ") and "truncated" in p for p in problems)
    assert any(p.startswith(f"{SINGLE_FILE}: has {len(weights) - 100} bytes") for p in problems)


def test_a_missing_shard_is_one_problem(sharded: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(sharded, tmp_path / "copy"))
    (copy / "model-00002-of-00003.safetensors").unlink()
    assert found(verify(copy)) == ["model-00002-of-00003.safetensors: the file is missing"]


def test_index_against_headers(sharded: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(sharded, tmp_path / "copy"))
    (copy / MANIFEST_FILE).unlink()
    index = json.loads((copy / INDEX_FILE).read_text())
    first = "model-00001-of-00003.safetensors"
    names = [name for name, file in index["weight_map"].items() if file == first]

    def with_map(change: dict[str, Any]) -> list[str]:
        (copy / INDEX_FILE).write_text(json.dumps({"weight_map": {**index["weight_map"], **change}}))
        return found(verify(copy))

    assert with_map({}) == []
    moved = with_map({names[0]: "model-00002-of-00003.safetensors"})
    assert any(names[0] in problem and "is in this file" in problem for problem in moved)
    assert any("ghost" in problem and "is missing" in problem for problem in with_map({"ghost": first}))
    assert any(
        "not the name of a file in the same folder" in problem
        for problem in with_map({names[0]: "../evil.safetensors"})
    )
    assert any("not the name of a file in the same folder" in problem for problem in with_map({names[0]: 5}))


def test_a_config_that_makes_no_model(copy: Path) -> None:
    (copy / MANIFEST_FILE).unlink()
    config = json.loads((copy / "config.json").read_text())
    for changed in ({**config, "model_type": "no-such"}, {**config, "num_attention_heads": "many"}):
        (copy / "config.json").write_text(json.dumps(changed))
        assert any(p.startswith("config.json: ") for p in found(verify(copy)))
    (copy / "config.json").write_text("not json")
    assert any(p.startswith("config.json: ") or "config.json" in p for p in found(verify(copy)))
    (copy / "config.json").write_text(json.dumps({**config, "quantization_config": None}))
    with pytest.raises(ForeignError, match=r"no config describes them\. Write quantize_config.json"):
        verify(copy)


def test_somebody_elses_old_tensors_and_zero_points_are_notes(copy: Path) -> None:
    (copy / MANIFEST_FILE).unlink()
    tensors = load_file(copy / SINGLE_FILE)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    tensors[f"{UP}.qzeros"][0, 0] = -1
    save_file(tensors, copy / SINGLE_FILE)
    report = verify(copy)
    assert report.ok
    assert any("inv_freq" in note for note in report.notes) and any(
        "disagree" in note for note in report.notes
    )


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(VerifyError, match="not a folder"):
        verify(tmp_path / "nowhere")


def test_the_command(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import argparse

    from lowmem.commands import verify as verify_command

    parser = argparse.ArgumentParser()
    verify_command.add_arguments(parser)
    assert verify_command.run(parser.parse_args([str(copy)])) == 0
    assert capsys.readouterr().out.startswith("ok: ")
    (copy / "extra").write_text("")
    (copy / "tokenizer.json").write_text("{}")
    assert verify_command.run(parser.parse_args([str(copy)])) == 2
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[0].startswith("extra: ") and lines[-1].startswith("2 problems: ")
    assert verify_command.run(parser.parse_args([str(copy), "--json"])) == 2
    record = json.loads(capsys.readouterr().out)
    assert not record["ok"] and [p["file"] for p in record["problems"]] == ["extra", "tokenizer.json"]
