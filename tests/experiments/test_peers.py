"""`peers` without any peer: turns, failures, kept steps, tables, and lowmem's side of the figures."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from lowmem.benchmarks.common.record_file import to_json
from lowmem.benchmarks.common.records import Machine, Origin, Spread, Subject, TextQuality
from lowmem.benchmarks.experiments.common import rows, typed_command, write
from lowmem.benchmarks.experiments.peers import __main__ as peers
from lowmem.benchmarks.experiments.peers.record import (
    PeersRecord,
    Version,
    VersionResult,
    all_versions,
)
from lowmem.benchmarks.experiments.peers.run import Run, StepError, measure_versions
from lowmem.benchmarks.experiments.peers.steps import logits_of, mean_square_inputs, stored_size
from lowmem.benchmarks.experiments.peers.table import render
from lowmem.benchmarks.experiments.workers import interpreters, turns
from lowmem.benchmarks.experiments.workers.interpreters import Peers, find_peers
from lowmem.benchmarks.experiments.workers.protocol import gaps, prompt_of
from lowmem.benchmarks.experiments.workers.turns import (
    LLAMA,
    Turns,
    Worker,
    WorkerError,
    llama_command,
)

from lowmem.errors import InvalidRequestError, OutputError, SourceError
from lowmem.export.export import export
from tests.helpers import save_source, tiny_model
from tests.rtn_helpers import write_rtn_checkpoint

ALL = frozenset({"GPTQModel", "AutoRound", "bitsandbytes", "llama.cpp"})
WORKER = """
import itertools, sys
from lowmem.benchmarks.experiments.workers.protocol import serve
print("a library's banner")
class Runtime:
    kernel, load_seconds = "{kernel}", 2.0
    count = itertools.count()
    def visit(self, offset):
        number = next(self.count)
        if number == {fails}:
            raise RuntimeError("the kernel is gone")
        print("a library's chatter")
        return dict(number=offset + number)
sys.exit(serve(Runtime))
"""


def run_in(work: Path, source: str = "nowhere", **options: object) -> Run:
    work.mkdir(exist_ok=True)
    return dataclasses.replace(Run(source, work, Peers(), 200, None, 1), **options)


# --- workers and turns --------------------------------------------------------------------------------------


def worker(tmp_path: Path, kernel: str, fails: int = -1) -> Worker:
    command = [sys.executable, "-c", WORKER.format(kernel=kernel, fails=fails)]
    return Worker(command, tmp_path / f"{kernel}.log")


def test_runtimes_take_turns_after_a_warm_up(tmp_path, monkeypatch):
    """Every runtime once a round, another first each time; a failure excludes a runtime and says why."""
    monkeypatch.setattr(turns, "PAUSE_SECONDS", 0)
    started: list[str] = []

    def start(kernel: str, fails: int = -1) -> Worker:
        started.append(kernel)
        return worker(tmp_path, kernel, fails)

    openers = {"a": lambda: start("a"), "b": lambda: start("b"), "bad": lambda: start("bad", 1)}
    openers["absent"] = lambda: Worker(
        [sys.executable, "-c", "raise SystemExit('no such runtime')"], tmp_path / "log"
    )
    visit = {"what": "visit", "offset": 10}
    with Turns(openers, [visit]) as taken:
        answers = taken.ask("visits", 2, visit)
        assert started == ["a", "b", "bad"] and set(taken.workers) == {"a", "b"}
        only = taken.ask("visits", 1, visit, labels=["b"])
    numbers = [answer["visit"]["number"] for answer in answers["a"]]
    assert numbers == [11, 12]
    assert set(answers) == {"a", "b"} and set(only) == {"b"}
    facts = taken.facts["a"]
    assert facts.kernel == "a" and facts.load_seconds == 2.0 and len(facts.load_averages) == 2
    assert facts.peak_bytes > 1 << 20 and not facts.failure
    assert "the kernel is gone" in taken.facts["bad"].failure and "no such" in taken.facts["absent"].failure
    assert not taken.workers


def test_a_worker_that_cannot_start_says_why(tmp_path):
    with pytest.raises(WorkerError, match="no such runtime"):
        Worker([sys.executable, "-c", "raise SystemExit('no such runtime')"], tmp_path / "log")


def test_timing_stops_when_it_takes_too_long(monkeypatch):
    clock = iter([3.0, 4.0, 4.0, 6.0, 6.0, 9.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    assert gaps(iter(range(100)), most_seconds=5) == [1.0, 2.0, 3.0]


def test_a_prompt_is_of_the_vocabulary_and_repeats_nothing():
    for vocabulary in (50, 4096, 49156):
        ids = prompt_of(512, vocabulary)
        assert len(ids) == 512 and 0 < min(ids) <= max(ids) < vocabulary
        assert all(one != two for one, two in pairwise(ids))


FAKE_LLAMA = """
import ctypes, types
import numpy as np
class Params(types.SimpleNamespace): pass
class Batch:
    def __init__(self, n):
        self.token, self.pos, self.n_seq_id, self.logits = ([0] * n for _ in range(4))
        self.seq_id = [[0] for _ in range(n)]
held = np.zeros((600, 5), np.float32)
LLAMA_FLASH_ATTN_TYPE_DISABLED = 0
def llama_decode(context, batch):
    wanted = [i for i in range(batch.n_tokens) if batch.logits[i]]
    for row, i in enumerate(wanted):
        held[row] = np.arange(5) == (batch.token[i] + batch.pos[i]) % 5
    return 0
def llama_get_logits(context): return held.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
def llama_print_system_info(): return b"CPU : AVX2 = 1 | AVX512_VNNI = 1 | REPACK = 1"
def llama_model_quantize(source, out, params):
    open(out, "wb").write(open(source, "rb").read() + bytes([params._obj.ftype])); return 0
class Quantize(ctypes.Structure):
    _fields_ = [(n, ctypes.c_int) for n in ("nthread", "ftype", "token_embedding_type", "output_tensor_type")]
llama_model_quantize_default_params = Quantize
def llama_vocab_n_tokens(vocab): return 5
def llama_batch_init(n, a, b): return Batch(n)
def __getattr__(name): return lambda *a: Params()
"""


@pytest.fixture
def peer_python(tmp_path: Path) -> str:
    """An interpreter with numpy and a made-up llama_cpp, without lowmem and torch."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "llama_cpp.py").write_text(FAKE_LLAMA)
    about = site / "llama_cpp_python-0.0.1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: llama-cpp-python\nVersion: 0.0.1\n")
    for folder in Path(np.__file__).parent.parent.glob("numpy*"):
        (site / folder.name).symlink_to(folder)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nunset PYTHONPATH\nPYTHONPATH="{site}" exec "{sys.executable}" -S "$@"\n')
    python.chmod(0o755)
    check = "import lowmem"
    assert subprocess.run([str(python), "-c", check], capture_output=True, cwd=tmp_path).returncode == 1
    return str(python)


def test_the_scripts_for_peers_run_where_lowmem_is_not_installed(tmp_path, monkeypatch, peer_python):
    """By path, with the standard library, the peer and the file beside them alone."""
    monkeypatch.setattr(turns, "PAUSE_SECONDS", 0)
    peers_found = find_peers(peer_python)
    assert "llama.cpp" in peers_found.names and peers_found.llama_version() == "0.0.1"
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    command = llama_command(peer_python, file, 32, 1)
    requests = [{"what": "prefill", "tokens": 6}, {"what": "decode", "context": 6, "tokens": 3},
                {"what": "rows", "context": 6, "rows": 4, "steps": 2}]  # fmt: skip
    with Turns({"x": lambda: Worker(command, tmp_path / "log")}, requests) as taken:
        (found,) = taken.ask("all", 1, *requests)["x"]
    assert taken.facts["x"].kernel == "llama.cpp AVX512_VNNI REPACK"
    assert found["prefill"]["seconds"] > 0 and len(found["decode"]["seconds"]) == 3
    assert len(found["rows"]["one"]) == len(found["rows"]["many"]) == 2
    np.save(tmp_path / "rows.npy", np.array([[1, 2, 3], [4, 4, 4]], np.int32))
    step = [peer_python, str(LLAMA), "logits", str(file), "--rows", str(tmp_path / "rows.npy")]
    subprocess.run([*step, "--out", str(tmp_path / "logits.npy")], check=True, cwd=tmp_path)
    assert np.load(tmp_path / "logits.npy").argmax(-1).tolist() == [[1, 3, 0], [4, 0, 1]]
    run = run_in(tmp_path / "work", peers=Peers(frozenset({"llama.cpp"}), llama=peer_python))
    run.keep("prepared", {"calibration": "", "fingerprint": "", "dtype": "bfloat16", "texts": []})
    (run.work / "importance.npz").touch()
    (run.work / "source.gguf").write_bytes(b"GGUF")
    (result,) = measure_versions(
        dataclasses.replace(run, only=("llama-Q8_0",)), [Version("llama-Q8_0", "llama.cpp", "Q8_0")]
    )
    assert (run.work / "llama-Q8_0.gguf").read_bytes() == b"GGUF\x07"
    assert json.loads(result.recipe)["embedding"] == "BF16" and result.conversion is not None
    assert dict(run.peer_versions()) == {"llama-cpp-python": "0.0.1"}
    assert result.failure  # nothing measures a file that is no GGUF


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
    run.begin(("lowmem",))
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
    found = measure_versions(run, all_versions(ALL, "bfloat16"))
    assert [version.failure for version in found] == ["", "killed for its memory", "", ""]
    assert [version.subject.bits_per_weight for version in found] == [8.2, 0.0, 3.2, 2.2]
    assert found[0].texts[0].kld.mean == 0.0025 and found[0].subject.method == "gptq"


def test_which_peers_are_here(monkeypatch):
    monkeypatch.setattr(interpreters.importlib.util, "find_spec", lambda name: None)
    found = find_peers()
    assert found.names == frozenset() and len(found.left_out) == 4
    assert any("pip install auto-round" in line and "--autoround-python" in line for line in found.left_out)
    with pytest.raises(InvalidRequestError, match="cannot be run"):
        find_peers("/nowhere/python")


def test_a_named_interpreter_must_have_its_peer(tmp_path):
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\nexit 1\n")
    fake.chmod(0o755)
    with pytest.raises(InvalidRequestError, match="has no llama-cpp-python"):
        find_peers(str(fake))


def test_versions_have_names_of_their_own():
    versions = all_versions(ALL, "bfloat16")
    assert len({v.key for v in versions}) == len({v.label for v in versions}) == len(versions)
    assert {v.peer for v in all_versions(frozenset(), "bfloat16")} == {"none", "lowmem"}


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

    file = export(source, tmp_path / "m.gguf").path
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
        "python -m lowmem.benchmarks.experiments.peers",
        "2026-01-02T03:04:05+00:00",
        machine,
        (("lowmem", "1"),),
        "m",
        "d",
        0.1,
    )
    ours = Subject("lowmem 4-bit g128", "gptq", "float32", "lowmem-4", 4.16, 9)
    theirs = Subject("AutoRound 4-bit g128", "gptq", "float32", "autoround-4", 0.0, 0)
    good = VersionResult("lowmem", ours, "{}", None, (text_quality(),), "")
    bad = VersionResult("AutoRound", theirs, '{"iters": 200, "bits": 4}', None, (), "a | b")
    return PeersRecord(origin, "rows", 200, (("auto-round", "0.16.1"),), ("x is left out",), (good, bad))


def test_the_record_is_read_as_it_was_written(tmp_path, capsys):
    record = a_record()
    file = tmp_path / "peers.json"
    write(record, file)
    assert peers.PEERS.read(file) == record
    assert peers.main(["--show", "--out", str(tmp_path / "peers.json")]) == 0
    shown = capsys.readouterr().out
    assert "| lowmem 4-bit g128 | 4.16 | 0.002500 | 95.46% | 25.400 |" in shown
    assert "| AutoRound 4-bit g128 | failed: a / b |" in shown and "iters 200" in shown
    assert render(record) + "\n" == shown
    (tmp_path / "peers.json").write_text(json.dumps({"origin": 1}))
    with pytest.raises(SourceError, match="cannot be read"):
        peers.PEERS.read(file)
    assert peers.main(["--show", "--out", str(tmp_path / "absent.json")]) == 2


def test_the_command_names_no_place_of_one_machine():
    words = ["--llama-python", "/home/me/python", "--threads", "3", "--work=/tmp/x", "--only", "llama"]
    assert (
        typed_command("peers", words)
        == "python -m lowmem.benchmarks.experiments.peers --threads 3 --only llama"
    )
    assert peers.shown(str(peers.embedded_model())) == "lowmem/data/tiny-starchat"
    assert peers.shown("/somewhere/else/model") == "model"


def test_a_version_made_on_the_fly_is_loaded_from_the_source(tmp_path):
    run = run_in(tmp_path / "work", source=str(tmp_path))
    assert run.path_of(Version("bnb-nf4", "bitsandbytes", "NF4")) == tmp_path
    inner = run.work / "autoround-4" / "model-w4g128"
    inner.mkdir(parents=True)
    (inner / "config.json").write_text("{}")
    assert run.path_of(Version("autoround-4", "AutoRound", "4-bit g128", 4, 128)) == inner


def test_json_has_one_row_to_a_line():
    data = {
        "a": [1, 2],
        "samples": [[float(i), i] * 20 for i in range(3)],
        "b": {"c" * 60: "d" * 60, "e": None},
    }
    text = rows(data)
    assert json.loads(text) == data
    assert text.splitlines()[1] == ' "a": [1, 2],' and len(text.splitlines()) == 2 + 1 + 5 + 4


def test_the_committed_record_is_shown(capsys):
    assert peers.main(["--show"]) == 0
    assert "| lowmem 4-bit g128 |" in capsys.readouterr().out
