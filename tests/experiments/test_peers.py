"""`lowmem.benchmarks.experiments.peers.command` without any peer: turns, failures, kept steps, tables, and our side of the figures."""

from __future__ import annotations

import dataclasses
import json
import sys
from itertools import pairwise
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from lowmem.benchmarks.common.record_file import read, to_json, write
from lowmem.benchmarks.common.records import Machine, Origin, Repeated, Spread, Subject, TextQuality
from lowmem.benchmarks.experiments.peers import command as peers
from lowmem.benchmarks.experiments.peers import run as peers_run
from lowmem.benchmarks.experiments.peers import speed as peers_speed
from lowmem.benchmarks.experiments.peers.forms import (
    Form,
    FormResult,
    PeersRecord,
    SpeedTable,
    quality_forms,
    speed_forms,
)
from lowmem.benchmarks.experiments.peers.run import Peers, Run, StepError, find_peers, measure_forms
from lowmem.benchmarks.experiments.peers.speed import in_turns
from lowmem.benchmarks.experiments.peers.steps import logits_of, mean_square_inputs, stored_size
from lowmem.benchmarks.experiments.peers.table import render
from lowmem.benchmarks.experiments.peers.to_gguf import write_gguf
from lowmem.benchmarks.experiments.peers.worker import Round, Worker, WorkerError, prompt_of, timed

from lowmem.errors import InvalidRequestError, OutputError, SourceError
from tests.helpers import save_source, tiny_model
from tests.rtn_helpers import write_rtn_checkpoint

ALL = frozenset({"GPTQModel", "AutoRound", "bitsandbytes", "llama.cpp"})
NOBODY = Peers(frozenset(), sys.executable, sys.executable, ())
WORKER = """
import itertools, sys
from lowmem.benchmarks.experiments.peers.worker import Round, Started, serve
print("a library's banner")
count = itertools.count()
def one():
    number = next(count)
    if number == {fails}:
        raise RuntimeError("the kernel is gone")
    print("a library's chatter")
    return Round(1.0 + number, (0.25, 0.5 + number, 0.25))
sys.exit(serve(lambda: (Started("{kernel}", 2.0), one)))
"""


def run_in(work: Path, source: str = "nowhere", **options: object) -> Run:
    work.mkdir(exist_ok=True)
    return dataclasses.replace(Run(source, work, NOBODY, 200, None, 1), **options)


# --- workers and turns --------------------------------------------------------------------------------------


def worker(tmp_path: Path, kernel: str, fails: int = -1) -> Worker:
    command = [sys.executable, "-c", WORKER.format(kernel=kernel, fails=fails)]
    return Worker(command, tmp_path / f"{kernel}.log", {})


@pytest.mark.parametrize("keep_open", [True, False], ids=["together", "anew"])
def test_runtimes_take_turns_after_a_warm_up(tmp_path, monkeypatch, keep_open):
    """Every runtime once a round, another first each time; what fails is left out and says why."""
    monkeypatch.setattr(peers_speed, "SETTLE_SECONDS", 0)
    started: list[str] = []

    def start(kernel: str, fails: int = -1) -> Worker:
        started.append(kernel)
        return worker(tmp_path, kernel, fails)

    rounds = 2
    times = in_turns(
        {"a": lambda: start("a"), "b": lambda: start("b"), "bad": lambda: start("bad", 1)},
        rounds,
        keep_open=keep_open,
    )
    assert started == (["a", "b", "bad"] if keep_open else ["a", "b", "bad", "b", "a"])
    assert [r.prefill_seconds for r in times["a"].rounds] == ([2.0, 3.0] if keep_open else [2.0, 2.0])
    assert "the kernel is gone" in times["bad"].failure and times["bad"].rounds == ()
    speed = times["a"].speed("peer", "a", 100)
    assert speed.kernel == "a" and speed.load_seconds == 2.0 and len(speed.load_averages) == rounds
    assert speed.peak_bytes > 1 << 20
    assert speed.decode == Repeated(0.25, 0.25, 0.25, (0.25, 0.25))
    assert speed.prefill is not None and speed.prefill.values[0] == 50.0
    failed = times["bad"].speed("peer", "bad", 100)
    assert failed.prefill is None and failed.decode is None and failed.failure


def test_a_worker_that_cannot_start_says_why(tmp_path):
    with pytest.raises(WorkerError, match="no such runtime"):
        Worker([sys.executable, "-c", "raise SystemExit('no such runtime')"], tmp_path / "log", {})


def test_timing_stops_when_it_takes_too_long(monkeypatch):
    clock = iter([0.0, 3.0, 4.0, 6.0, 9.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    assert timed(iter(range(100)), most_seconds=5) == Round(3.0, (1.0, 2.0, 3.0))


def test_a_prompt_is_of_the_vocabulary_and_repeats_nothing():
    for vocabulary in (50, 4096, 49156):
        ids = prompt_of(512, vocabulary)
        assert len(ids) == 512 and 0 < min(ids) <= max(ids) < vocabulary
        assert all(one != two for one, two in pairwise(ids))


# --- steps that are kept ------------------------------------------------------------------------------------


def test_a_folder_is_of_one_run(tmp_path):
    source = save_source(tiny_model("gpt_bigcode_mqa", layers=1), tmp_path / "source", tokenizer=False)
    run = run_in(tmp_path / "work", str(source))
    run.begin(())
    run.keep("lowmem-4.conversion", {"a": 1})
    run.keep("llama-Q4_0.quality", {"b": 2})
    (run.work / "lowmem-4").mkdir()
    run.begin(())
    assert run.kept("lowmem-4.conversion") == {"a": 1}
    (run.work / "shaped-2").mkdir()
    (run.work / "shaped-2" / "lowmem-4.quality.json").write_text("{}")
    run.begin(("lowmem",))
    assert not list((run.work / "shaped-2").iterdir())
    assert run.kept("lowmem-4.conversion") is None and not (run.work / "lowmem-4").exists()
    assert run.kept("llama-Q4_0.quality") == {"b": 2}
    with pytest.raises(OutputError, match="of other iterations"):
        dataclasses.replace(run, iterations=2).begin(())
    (source / "config.json").write_text("{}")
    with pytest.raises(OutputError, match="of another model"):
        run.begin(())


def test_one_failure_is_recorded_and_the_rest_goes_on(tmp_path, monkeypatch):
    run = run_in(tmp_path / "work", only=("lowmem",))
    run.keep("prepared", {"calibration": "", "fingerprint": "", "dtype": "bfloat16", "texts": ["code"]})
    for bits in (8, 3, 2):
        run.keep(f"lowmem-{bits}.conversion", {"usage": None, "settings": {"bits": bits}, "versions": {}})
        run.keep(
            f"lowmem-{bits}.quality",
            {"texts": [to_json(text_quality())], "bits_per_weight": bits + 0.2, "weight_bytes": 7},
        )

    def no_process(*_: object) -> None:
        raise StepError("killed for its memory")

    monkeypatch.setattr(Run, "process", no_process)
    found = measure_forms(run, quality_forms(ALL, "bfloat16"))
    assert [form.failure for form in found] == ["", "killed for its memory", "", ""]
    assert [form.subject.bits_per_weight for form in found] == [8.2, 0.0, 3.2, 2.2]
    assert found[0].texts[0].kld.mean == 0.0025 and found[0].subject.method == "gptq"


def test_which_peers_are_here(monkeypatch):
    monkeypatch.setattr(peers_run.importlib.util, "find_spec", lambda name: None)
    found = find_peers(None, None)
    assert found.names == frozenset() and len(found.left_out) == 4
    assert any("pip install auto-round" in line and "--autoround-python" in line for line in found.left_out)
    with pytest.raises(InvalidRequestError, match="cannot be run"):
        find_peers("/nowhere/python", None)


def test_a_named_interpreter_must_have_its_peer(tmp_path):
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\nexit 1\n")
    fake.chmod(0o755)
    with pytest.raises(InvalidRequestError, match="has no llama-cpp-python"):
        find_peers(str(fake), None)


def test_forms_have_names_of_their_own():
    forms = quality_forms(ALL, "bfloat16")
    assert len({form.key for form in forms}) == len({form.label for form in forms}) == len(forms)
    assert {form.peer for form in quality_forms(frozenset(), "bfloat16")} == {"none", "lowmem"}
    timed_forms = speed_forms(ALL, "bfloat16")
    assert set(timed_forms) < set(forms) and not any(form.importance for form in timed_forms)


# --- our side of the figures --------------------------------------------------------------------------------


def test_mean_square_inputs_are_the_linears_own(tmp_path):
    """By hand on the first layer: its norms' outputs, and the last linear's input."""
    model = tiny_model("gpt_bigcode_mqa", layers=2)
    rows = torch.randint(0, 4096, (6, 9), generator=torch.Generator().manual_seed(2))
    found = mean_square_inputs(model, rows)
    parts = ("attn_qkv", "attn_output", "ffn_up", "ffn_down")
    assert set(found) == {f"blk.{layer}.{part}.weight" for layer in range(2) for part in parts}
    seen: dict[str, torch.Tensor] = {}
    layer = model.transformer.h[0]
    handles = [
        layer.ln_1.register_forward_hook(lambda m, a, o: seen.update(attn_qkv=o)),
        layer.ln_2.register_forward_hook(lambda m, a, o: seen.update(ffn_up=o)),
        layer.mlp.act.register_forward_hook(lambda m, a, o: seen.update(ffn_down=o)),
    ]
    with torch.no_grad():
        model(input_ids=rows)
    for handle in handles:
        handle.remove()
    for part, values in seen.items():
        mean = values.flatten(0, 1).square().mean(0).numpy()
        assert np.allclose(found[f"blk.0.{part}.weight"], mean, rtol=1e-4), part
    again = list(logits_of(model, rows))  # no hook is left behind
    assert sum(len(part) for part in again) == 6 and found["blk.1.ffn_down.weight"].shape == (256,)


def test_stored_bits_of_every_kind(tmp_path):
    model = tiny_model("gpt_bigcode_mqa", layers=1, dtype=torch.bfloat16)
    source = str(save_source(model, tmp_path / "source"))
    hidden = 64
    weights = hidden * (hidden + 32) + hidden * hidden + 2 * hidden * 4 * hidden
    tensors = sum(p.numel() for p in model.parameters())
    bits, nbytes = stored_size("dense", Path(source), source)
    assert (bits, nbytes) == (16, 2 * tensors)

    file = write_gguf(source, tmp_path / "m.gguf")
    bits, nbytes = stored_size("gguf", file, source)
    # Norms, biases and positions are float32 there.
    vectors = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 1 or ".wpe." in n)
    assert (bits, nbytes) == (16, 2 * tensors + 2 * vectors)

    write_rtn_checkpoint(tiny_model("gpt_bigcode_mqa", layers=1), tmp_path / "packed", bits=4, group_size=32)
    bits, _ = stored_size("gptq", tmp_path / "packed", source)
    columns = 3 * hidden + 4 * hidden  # g_idx: 32 bits an input
    # Of 32 weights: 4 bits each, a scale of 16 bits and a zero-point of 4.
    assert bits == pytest.approx(4 + 20 / 32 + 32 * columns / weights)


def test_stored_bits_of_a_quantized_gguf(tmp_path):
    """Q8_0: 34 bytes for 32 weights; norms and embedding do not count."""
    file = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    kind = gguf.GGMLQuantizationType.Q8_0
    for name in ("token_embd.weight", "blk.0.ffn_up.weight"):
        packed = gguf.quantize(np.ones((8, 64), np.float32), kind)
        writer.add_tensor(name, packed, raw_dtype=kind)
    writer.add_tensor("blk.0.attn_norm.weight", np.ones(64, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert stored_size("gguf", file, "") == (8.5, 2 * 8 * 2 * 34 + 4 * 64)


# --- the record ---------------------------------------------------------------------------------------------


def text_quality(kld: float = 0.0025) -> TextQuality:
    spread = Spread(kld, 0.0001, kld, kld, kld, kld)
    return TextQuality("code", 12288, 25.4, 25.3, 1.004, 0.001, spread, 0.9546, 0.001, 0.01, ())


def a_record() -> PeersRecord:
    machine = Machine("AMD EPYC", ("avx2",), 2, 1 << 34, "cpu", 0)
    origin = Origin(
        "python -m lowmem.benchmarks.experiments.peers.command",
        "2026-01-02T03:04:05+00:00",
        machine,
        (("lowmem", "1"),),
        "m",
        "d",
        0.1,
    )
    ours = Subject("lowmem 4-bit g128", "gptq", "float32", "lowmem-4", 4.16, 9)
    theirs = Subject("AutoRound 4-bit g128", "gptq", "float32", "autoround-4", 0.0, 0)
    good = FormResult("lowmem", ours, "{}", None, (text_quality(),), "")
    bad = FormResult("AutoRound", theirs, '{"iters": 200, "bits": 4}', None, (), "a | b")
    return PeersRecord(origin, "rows", 200, (("auto-round", "0.16.1"),), ("x is left out",), (good, bad), ())


def test_the_record_is_read_as_it_was_written(tmp_path, capsys):
    record = a_record()
    table = SpeedTable("tiny", 512, 64, 2, 1, 20.0, ())
    record = dataclasses.replace(record, speed=(table,))
    file = tmp_path / "peers.json"
    write(record, file)
    assert read(PeersRecord, file, "lowmem.benchmarks.experiments.peers.command") == record
    assert peers.main(["--show", "--out", str(tmp_path / "peers.json")]) == 0
    shown = capsys.readouterr().out
    assert "| lowmem 4-bit g128 | 4.16 | 0.002500 | 95.46% | 25.400 |" in shown
    assert "| AutoRound 4-bit g128 | failed: a / b |" in shown and "iters 200" in shown
    assert render(record) + "\n" == shown
    (tmp_path / "peers.json").write_text(json.dumps({"origin": 1}))
    with pytest.raises(SourceError, match="cannot be read"):
        read(PeersRecord, file, "lowmem.benchmarks.experiments.peers.command")
    assert peers.main(["--show", "--out", str(tmp_path / "absent.json")]) == 2


def test_the_command_names_no_place_of_one_machine():
    words = ["--llama-python", "/home/me/python", "--rounds", "3", "--work=/tmp/x", "--shaped", "2"]
    assert (
        peers.typed_command("lowmem.benchmarks.experiments.peers.command", words)
        == "python -m lowmem.benchmarks.experiments.peers.command --rounds 3 --shaped 2"
    )
    assert peers._shown(str(peers.embedded_model())) == "lowmem/data/tiny-starchat"
    assert peers._shown("/somewhere/else/model") == "model"


def test_a_form_on_the_fly_lies_in_the_source(tmp_path):
    run = run_in(tmp_path / "work", source=str(tmp_path))
    assert peers_run.path_of(run, Form("bnb-nf4", "bitsandbytes", "NF4")) == tmp_path
    inner = run.work / "autoround-4" / "model-w4g128"
    inner.mkdir(parents=True)
    (inner / "config.json").write_text("{}")
    assert peers_run.path_of(run, Form("autoround-4", "AutoRound", "4-bit g128", 4, 128)) == inner
