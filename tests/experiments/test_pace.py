"""`pace`: what is counted, what is compared with what, and which workers take turns; no times."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lowmem.benchmarks.common.record_file import to_json
from lowmem.benchmarks.common.records import Machine, Origin
from lowmem.benchmarks.experiments.common import repeated, write
from lowmem.benchmarks.experiments.pace import __main__ as pace
from lowmem.benchmarks.experiments.pace import first_answer
from lowmem.benchmarks.experiments.pace import linears as pace_linears
from lowmem.benchmarks.experiments.pace import load as pace_load
from lowmem.benchmarks.experiments.pace.linears import Case, Linear
from lowmem.benchmarks.experiments.pace.load import Load
from lowmem.benchmarks.experiments.pace.models import PaceModel, llama_models, other_models, our_models
from lowmem.benchmarks.experiments.pace.record import (
    BESIDE,
    EIGHT,
    FOUR,
    THREE,
    PaceRecord,
    Share,
    Timing,
    goals,
    ratio,
    whole_model,
)
from lowmem.benchmarks.experiments.pace.table import render
from lowmem.benchmarks.experiments.starchat.dimensions import Dimensions
from lowmem.benchmarks.experiments.starchat.random_weights import (
    write_packed,
    write_source,
    write_with_vocabulary,
)
from lowmem.benchmarks.experiments.workers import lowmem_worker, turns
from lowmem.benchmarks.experiments.workers.interpreters import Peers
from lowmem.benchmarks.experiments.workers.lowmem_worker import Batch, Runtime
from lowmem.benchmarks.experiments.workers.protocol import prompt_of
from lowmem.benchmarks.experiments.workers.turns import RuntimeFacts, WorkerError
from safetensors import safe_open

from lowmem.checkpoint.headers.gguf import read_gguf_header
from lowmem.errors import SourceError
from lowmem.export.export import export
from lowmem.generate.decoders.contract import Feed, StepOutput
from lowmem.kernels.native import library as native
from lowmem.loading.loader import LoadOptions, load

ALL = ("GPTQModel", "bitsandbytes")
SMALL = Dimensions(2, n_embd=128, heads=2, n_positions=512, vocab=4096)
needs_library = pytest.mark.skipif(not native.available(), reason="our kernels were not compiled")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_packed(tmp_path_factory.mktemp("pace") / "packed-4", SMALL, 4, 64)


@pytest.fixture
def runtime(packed: Path) -> Runtime:
    return Runtime(load(packed, LoadOptions(context=96)), 96)


def ask(runtime: Runtime, what: str, **request: Any) -> dict[str, Any]:
    """As `serve` does."""
    return getattr(runtime, what)(**request)


# --- made-up models -----------------------------------------------------------------------------------------


def test_another_vocabulary_shares_the_layers(packed: Path, tmp_path: Path) -> None:
    out = write_with_vocabulary(packed, packed.with_name("other"), dataclasses.replace(SMALL, vocab=4200))
    index = json.loads((out / "model.safetensors.index.json").read_bytes())["weight_map"]
    for name, file in index.items():
        assert (out / file).samefile(packed / file) == (".h." in name)
    with safe_open(out / index["transformer.wte.weight"], "pt") as opened:
        assert opened.get_tensor("transformer.wte.weight").shape == (4200, 128)
    assert load(out).model.get_output_embeddings().weight.shape == (4200, 128)


def test_labels_are_unique() -> None:
    labels = [
        model.label
        for model in [*our_models(Path("x")), *llama_models(Path("x")), *other_models(Path("x"), ALL)]
    ]
    assert len(set(labels)) == len(labels) and {FOUR, EIGHT, THREE, "llama.cpp Q4_0"} <= set(labels)


# --- our worker ---------------------------------------------------------------------------------------------


def test_bytes_of_a_step_by_hand(runtime: Runtime) -> None:
    """Two layers of 128 inputs, 2 heads on one of 64; 4 bits, groups of 64; head and vectors in bfloat16."""
    weights = 128 * 256 + 128 * 128 + 2 * 128 * 512
    outputs = 256 + 128 + 512 + 128
    assert ask(runtime, "bytes", context=10) == {
        "packed": 2 * weights // 2,
        "scales": 2 * weights // 64 * 2,
        "head": 4096 * 128 * 2,
        "vectors": 2 * (2 * (outputs + 4 * 128) + 2 * 128),
        "kv": 2 * 2 * 64 * 2 * 10,
    }


def test_what_is_timed_is_what_was_asked(runtime: Runtime) -> None:
    """And the cache holds the context afterwards, so that the next request finds it."""
    assert ask(runtime, "prefill", tokens=40)["seconds"] > 0
    assert len(ask(runtime, "decode", context=40, tokens=5)["seconds"]) == 5
    found = ask(runtime, "rows", context=40, rows=4, steps=3)
    assert len(found["one"]) == len(found["many"]) == 3
    assert runtime.engine.cache.slots[0].tokens == prompt_of(40, 4096)


def test_rows_go_through_in_one_forward(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    fed: list[int] = []
    step = runtime.engine.decoder.step

    def spy(feeds: list[Feed]) -> StepOutput:
        output, rows = step(feeds), len(feeds[0].ids)
        fed.append(rows)
        assert output.logits[0].shape == (rows, 4096) and feeds[0].slot.length == 40 + rows
        return output

    monkeypatch.setattr(runtime.engine.decoder, "step", spy)
    ask(runtime, "rows", context=40, rows=4, steps=2)
    assert fed == [1, 4, 1, 4]


def test_a_share_lies_between_reads_of_the_models_own_weights(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every packed weight, all scales and the head once before and once after; then as much of a buffer."""
    read: list[torch.Tensor] = []
    monkeypatch.setattr(lowmem_worker, "_LARGE", 0)
    monkeypatch.setattr(native, "read", lambda tensor: read.append(tensor) or 0)
    found = ask(runtime, "share", context=40, steps=3, batches=2)
    parts = ask(runtime, "bytes", context=41)
    matrices = parts["packed"] + parts["scales"] + parts["head"]
    addresses = [tensor.data_ptr() for tensor in read]
    own = (len(read) - 2) // 4
    assert addresses[:own] == addresses[own : 2 * own] and len(set(addresses[:own])) == own
    assert sum(tensor.nbytes for tensor in read[:own]) == matrices == read[2 * own].nbytes
    assert found["bytes"] == sum(parts.values())
    assert [len(batch["seconds"]) for batch in found["batches"]] == [3, 3]


def test_bytes_of_a_gguf(packed: Path, tmp_path: Path) -> None:
    """As many as ours in float16; positions are looked up, and the tied embedding is the head."""
    source = write_source(tmp_path / "source", SMALL)
    file = export(str(source), tmp_path / "x.gguf").path
    found = pace.gguf_bytes(file, 10)
    weights = 128 * 256 + 128 * 128 + 2 * 128 * 512
    assert found["packed"] == 2 * weights * 2 and found["head"] == 4096 * 128 * 2
    assert found["kv"] == 2 * 2 * 64 * 2 * 10
    everything = sum(tensor.nbytes for tensor in read_gguf_header(file).tensors.values())
    lookups = 512 * 128 * 4 + 2 * 128 * 4  # positions and the last norm, in float32
    assert found["packed"] + found["head"] + found["vectors"] == everything - lookups


# --- loads --------------------------------------------------------------------------------------------------


def test_all_bytes_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace_load, "CHUNK", 1000)
    sizes: list[int] = []
    files = []
    for number, size in enumerate((2500, 1000)):
        files.append(tmp_path / str(number))
        files[-1].write_bytes(b"x" * size)
    original = Path.open

    class Counted:
        def __init__(self, opened: Any) -> None:
            self.opened = opened

        def __enter__(self) -> Counted:
            return self

        def __exit__(self, *_: object) -> None:
            self.opened.close()

        def readinto(self, buffer: Any) -> int:
            sizes.append(self.opened.readinto(buffer))
            return sizes[-1]

    monkeypatch.setattr(Path, "open", lambda self, *a, **k: Counted(original(self, *a, **k)))
    assert pace_load.read_once(files) > 0
    assert [size for size in sizes if size] == [1000, 1000, 500, 1000]


@needs_library
def test_a_load_tells_all(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pace_load.main([str(packed), "1", "0"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bytes"] == sum(file.stat().st_size for file in packed.glob("*.safetensors"))
    assert set(found) == {field.name for field in dataclasses.fields(Load)}


# --- single linears -----------------------------------------------------------------------------------------


def test_each_pass_lies_between_two_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace_linears, "PASS_SECONDS", 0.0)
    order: list[str] = []
    cases = [Case(name, lambda name=name: order.append(name)) for name in ("ours", "read", "other")]
    times = pace_linears._turns(cases)
    assert order[3:] == ["read", "ours", "other"] * 3 + ["read"]  # after a warm-up of each
    assert [len(times[name]) for name in ("ours", "other", "read")] == [3, 3, 4]


@needs_library
@pytest.mark.parametrize("bits,group", [(8, 128), (6, 128), (4, 128), (3, 64), (2, 32)])
def test_a_linear_counts_weights_and_scales(
    bits: int, group: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace_linears, "FILE_BYTES", 1 << 20)
    monkeypatch.setattr(pace_linears, "PASS_SECONDS", 0.0)
    pool = pace_linears.Pool(tmp_path / "linears.dat")
    assert bool(pool.all.view(torch.float16).isfinite().all())
    read: list[torch.Tensor] = []
    monkeypatch.setattr(native, "read", lambda tensor: read.append(tensor) or 0)
    for panels in (False, True):
        read.clear()
        (found,) = pace_linears.measure(pool, Linear(bits, group, 256, 128), [2], panels=panels)
        assert found.rows == 2 and found.bytes == 256 * 128 * bits // 8 + 256 // group * 128 * 2
        assert found.copies == (1 << 20) // found.bytes
        mapped = [
            pool.all.data_ptr() <= tensor.data_ptr() < pool.all.data_ptr() + (1 << 20) for tensor in read
        ]
        assert all(mapped) != panels and any(mapped) != panels
        assert sum(tensor.nbytes for tensor in read) == 5 * found.copies * found.bytes  # a warm-up, and 3 + 1
        assert (found.torch_seconds is None) == (
            bits in (6, 3, 2)
        ) and f"{bits}-bit g{group} 256→128, 2 rows" in str(found)


# --- turns --------------------------------------------------------------------------------------------------


class FakeWorker:
    """A worker that notes its requests; "bad" fails in its second turn."""

    asked: ClassVar[list[tuple[str, str]]] = []
    load_seconds = 1.0

    def __init__(self, command: list[str], log: Path, threads: int) -> None:
        self.name = Path(command[4]).name
        if self.name == "missing":
            raise WorkerError("no such file")
        self.kernel = f"kernel of {self.name}"

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        if request["what"] == "bytes":
            return {"packed": 7, "kv": 512}
        self.asked.append((self.name, request["what"]))
        if self.name == "bad" and self.asked.count(("bad", "decode")) == 3:  # one is the warm-up
            raise WorkerError("it fell over")
        return {"seconds": [1.0, 3.0, 2.0]}

    def peak_bytes(self) -> int:
        return 9

    def close(self) -> None:
        self.asked.append((self.name, "close"))


def test_a_group_of_models_is_timed_in_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "Worker", FakeWorker)
    monkeypatch.setattr(turns, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(FakeWorker, "asked", [])
    args = pace.parser().parse_args(["--work", str(tmp_path)])
    models = [PaceModel("lowmem", name, "small", tmp_path / name) for name in ("a", "missing", "bad", "c")]
    with pace.Group(models, args, Peers()) as group:
        begun = len(FakeWorker.asked)
        group.decode(512, 3)
        decoded = [name for name, what in FakeWorker.asked[begun:] if what == "decode"]
        assert decoded == ["a", "bad", "c", "bad", "c", "a", "c", "a"]
        facts = {facts.label: facts for facts in group.facts(models)}
        assert facts["lowmem missing"].failure == "no such file"
        assert facts["lowmem bad"].failure == "it fell over"
        assert dict(facts["lowmem a"].bytes) == {"packed": 7, "kv": 512}
        assert [(t.model, t.seconds.values) for t in group.timings] == [
            ("lowmem a", (2.0,) * 3),
            ("lowmem bad", (2.0,)),
            ("lowmem c", (2.0,) * 3),
        ]
        assert group.timings[0].bytes == group.bytes_of("lowmem a", 512 + pace.STEPS // 2) == 7 + 516
    assert [name for name, what in FakeWorker.asked if what == "close"] == ["bad", "c", "a"]


# --- goals and tables ---------------------------------------------------------------------------------------


def timing(model: str, what: str, *seconds: float, tokens: int = 1) -> Timing:
    return Timing(model, what, tokens, repeated(seconds), 1000)


def a_record() -> PaceRecord:
    machine = Machine("a CPU", (), 2, 1, "cpu", 0)
    origin = Origin(
        "python -m lowmem.benchmarks.experiments.pace",
        "2026-11-23",
        machine,
        (("lowmem", "1"),),
        "made up",
        "",
        0.0,
    )
    timings = (
        timing(FOUR, "decode 512", 0.010, 0.020),
        timing("llama.cpp Q4_0", "decode 512", 0.015, 0.028),
        timing(EIGHT, "decode 512", 0.020, 0.020),
        timing("llama.cpp Q8_0", "decode 512", 0.024, 0.024),
        timing(THREE, "decode 512", 0.008, 0.016),
        timing(FOUR, "prefill 512", 2.0, tokens=512),
        timing("llama.cpp Q4_0", "prefill 512", 3.5, tokens=512),
        timing("llama.cpp Q8_0", "prefill 512", 3.0, tokens=512),
        timing(FOUR, "1 row", 0.010, 0.020),
        timing(FOUR, "4 rows", 0.012, 0.024, tokens=4),
    )
    share = Share(
        FOUR, 512, 1000, (Batch(100.0, (10.0, 12.0, 20.0), 100.0, 90.0), Batch(90.0, (10.0,), 110.0, 1.0))
    )
    # The larger model's counts.
    small_load = Load(2, 1000, 5.0, 9.0, 9.0, 0.3, 1, 1, (0.2, 0.3), 0.4, 0.1, "k")
    loads = (small_load, Load(4, 1000, 5.0, 0.2, 0.09, 0.3, 3_000_000, 2_000_000, (0.2, 0.3), 0.4, 0.1, "k"))
    facts = (
        RuntimeFacts(FOUR, "k", 1.0, bytes=(("packed", 1), ("head", 2))),
        RuntimeFacts(EIGHT, failure="it broke"),
    )
    return PaceRecord(origin, 4, 2, 2, "0.3.36", facts, timings, (share,), loads)


def test_goals_compare_what_they_say() -> None:
    """Of each round's own ratio the median, and whether it is on the right side of the bound."""
    found = {goal.name: goal for goal in goals(a_record())}
    met = [goal.met for goal in found.values()]
    assert met == [False, None, None, True, False, True, True, True, True]
    expected = [1000 / 12 / 100, (1.5 + 1.4) / 2, 1.2, 1.25, 1.5, 1.2, 0.29 / 0.25]
    # The share is the median of the batches: 1000 bytes in 12 s and in 10 s, beside 100 bytes a second.
    expected[0] = (1000 / 12 / 100 + 1.0) / 2
    assert [goal.found.median for goal in found.values() if goal.found] == pytest.approx(expected)
    assert list(found)[6].endswith("(Q8_0)")  # its best


def test_what_was_not_measured_is_not_met() -> None:
    empty = dataclasses.replace(a_record(), timings=(), shares=(), loads=())
    assert [goal.met for goal in goals(empty)] == [None] * 9
    assert ratio(None, timing(FOUR, "decode 512", 1.0)) is None


def test_a_ratio_is_a_tokens() -> None:
    """A prompt of 512 tokens in 4 s beside one of 256 in 1 s: 7.8 ms a token beside 3.9."""
    found = ratio(timing("a", "x", 4.0, tokens=512), timing("b", "x", 1.0, tokens=256))
    assert found is not None and found.median == 2.0


def test_a_whole_model_is_layers_and_one_head() -> None:
    """Four layers of 5 ms each, and a head of 49156 rows of 1 us."""
    label = "llama.cpp Q4_0, its own head"
    timings = (
        timing("llama.cpp Q4_0", BESIDE, 0.020 + 0.004096),
        timing("llama.cpp Q4_0", "decode 512", 7.0),
        timing(label, "decode 512", 0.020 + 0.049156),
    )
    models = tuple(RuntimeFacts(name, "k", 1.0) for name in ("llama.cpp Q4_0", label))
    record = dataclasses.replace(a_record(), models=models, timings=timings)
    assert whole_model(record, 40) == {label: pytest.approx(0.2 + 0.049156)}


def test_a_record_is_written_read_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "pace.json"
    write(a_record(), file)
    assert to_json(pace.PACE.read(file)) == to_json(a_record())
    assert pace.main(["--show", "--out", str(file)]) == 0
    text = capsys.readouterr().out
    assert text.strip() == render(a_record())
    for part in (
        "3 MB, 2 MB of it",
        "1.45 × (1.40 × to 1.50 ×) | met",
        "| ≥ 1.35 × | 1.20 × (1.20 × to 1.20 ×) | missed",
        "it broke",
    ):
        assert part in text
    assert "llama-cpp-python 0.3.36" in text
    with pytest.raises(SourceError, match=r"python -m lowmem\.benchmarks\.experiments\.pace"):
        pace.PACE.read(tmp_path / "nothing.json")


@pytest.mark.parametrize("name", ["pace.json", "pace_decode.json", "pace_widths.json"])
def test_the_committed_record_is_shown(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert pace.main(["--show", "--out", str(pace.RESULTS / name)]) == 0
    assert "lowmem 4-bit g128" in capsys.readouterr().out


def test_first_answers_are_shown_by_wait(capsys: pytest.CaptureFixture[str]) -> None:
    assert first_answer.main(["--show"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "40 layers" in lines[0] and [line.split(":")[0] for line in lines[1:]] == [
        f"asked after {wait} s" for wait in (0, 5, 10, 20)
    ]
