"""`lowmem bench latency`: what is timed, in which order, what becomes of failures and interrupts. No test
compares a time with a number: clocks are the tests' own."""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench import latency_command, latency_rounds, latency_worker, machine_state
from bench.latency import (
    CONTEXTS,
    PROMPTS,
    Entry,
    Lengths,
    Place,
    choose_lengths,
    drift_of,
    enter,
    make_record,
    order,
    quantile,
    repeated,
    roofline_of,
)
from bench.latency_rounds import Found, Watcher, WorkFile, job_of, run_job, run_rounds
from bench.latency_view import make_watcher, print_record
from bench.latency_worker import DecodeTime, Job, PromptTime, Visit, time_engine, token_ids
from bench.lineup import Lineup, line_up
from bench.origin import origin_of
from bench.processes import converse
from bench.records import LatencyRecord, from_json, read_record, to_json
from bench.roofline import Rates, decode_ceiling, prefill_ceiling
from lowmem.errors import InvalidRequestError, LowmemError, OutputError
from lowmem.kernels import dispatch, native
from lowmem.plan.memory import need_on_device
from tests.helpers import save_source, tiny_model
from tests.rtn_helpers import write_rtn_checkpoint

LENGTHS = Lengths((4, 8), (6, 20), 3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a 4-bit form beside it."""
    folder = tmp_path_factory.mktemp("latency") / "tiny"
    save_source(tiny_model("gpt_bigcode_mqa"), folder, dtype=torch.bfloat16)
    write_rtn_checkpoint(tiny_model("gpt_bigcode_mqa"), folder.with_name("tiny-4bit"), bits=4)
    return folder


@pytest.fixture(scope="module")
def lineup(model: Path) -> Lineup:
    return line_up([str(model)])


@pytest.fixture
def entries(lineup: Lineup) -> list[Entry]:
    return [Entry(entrant, LENGTHS, 1 << 20) for entrant in lineup.entrants]


def visit(speed: float = 1.0, read: float = 1e9, new_tokens: int = 3, joules: float | None = None) -> Visit:
    """What a process might find: prompts of 10 ms a token, gaps of 100 and 300 ms, both over `speed`."""
    gaps = tuple((0.1, 0.3)[i % 2] / speed for i in range(new_tokens - 1))
    return Visit(
        threads=2,
        rates=(Rates(read, 4 * read, 1e10), Rates(read, 4 * read, 1e10)),
        free_bytes=1 << 30,
        kernel="torch",
        load_seconds=1.0,
        prompts=tuple(PromptTime(n, n / 100 / speed) for n in LENGTHS.prompts),
        decodes=tuple(DecodeTime(c, gaps, joules) for c in LENGTHS.contexts),
        peak_host_bytes=1 << 29,
        peak_device_bytes=0,
    )


# --- figures -----------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40), st.floats(0, 1))
def test_quantiles_are_numpys(values: list[float], share: float) -> None:
    assert quantile(values, share) == pytest.approx(numpy.quantile(values, share), rel=1e-9, abs=1e-6)


def test_repeated_keeps_the_rounds_in_order() -> None:
    found = repeated([3.0, 1.0, 2.0, 9.0])
    assert (found.median, found.low, found.high, found.values) == (2.5, 1.0, 9.0, (3.0, 1.0, 2.0, 9.0))


def test_drift() -> None:
    assert drift_of([40e9]) == 0
    assert drift_of([36e9, 45e9, 40e9]) == pytest.approx(0.25)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_every_form_once_a_round_in_turn(count: int) -> None:
    rounds = [order(count, r) for r in range(count)]
    assert all(sorted(places) == list(range(count)) for places in rounds)
    for position in range(count):  # over so many rounds each is once in each position
        assert sorted(places[position] for places in rounds) == list(range(count))
    assert order(3, 4) == [1, 2, 0]


# --- lengths -----------------------------------------------------------------------------------------------


def test_defaults_fit_the_positions() -> None:
    large = choose_lengths(None, None, 64, 8192)
    assert large.prompts == PROMPTS and large.contexts == CONTEXTS and not large.notes
    assert large.context == 4096 + 64
    small = choose_lengths(None, None, 64, 1024)
    assert small.prompts == (32, 128, 512)
    assert small.contexts == (128, 960)  # what is left of 1024 beside 64 new tokens
    assert small.context == 1024 and not small.notes
    assert choose_lengths(None, None, 64, None).contexts == CONTEXTS


def test_what_was_asked_for_and_does_not_fit_is_told() -> None:
    found = choose_lengths((500, 10, 10), (190, 193, 5, 300), 64, 256)
    assert found.prompts == (10,) and found.contexts == (5, 190)
    assert len(found.notes) == 2
    assert found.notes[0].startswith("contexts 193, 300 are left out: with 64 new tokens")
    assert "256 positions" in found.notes[0] and found.notes[1].startswith("prompt 500 is left out")


@pytest.mark.parametrize(
    ("prompts", "contexts", "new_tokens"),
    [((300,), None, 4), (None, (250,), 64), (None, (0,), 4), (None, None, 1)],
)
def test_lengths_that_leave_nothing(
    prompts: tuple[int, ...] | None, contexts: tuple[int, ...] | None, new_tokens: int
) -> None:
    with pytest.raises(InvalidRequestError):
        choose_lengths(prompts, contexts, new_tokens, 256)


def test_a_form_that_does_not_fit_says_how_much_it_needs(lineup: Lineup) -> None:
    entrant = lineup.entrants[0]
    need = need_on_device(
        entrant.candidate.shape, entrant.candidate.form, 9, cuda=False, own_context=100 << 20
    ).total
    place = Place("cpu", need - 1, "1.00 MiB are free", 100 << 20)
    refused = enter(entrant, LENGTHS, place)
    assert refused.needed_bytes == need and "1.00 MiB are free" in refused.reason
    assert f"needs {need / 2**20:.0f} MiB" in refused.reason


def test_lengths_that_do_not_fit_the_memory_are_left_out(lineup: Lineup) -> None:
    """With bytes for 9 tokens, contexts of 6 and 3 new tokens fit, and 20 do not."""
    entrant = lineup.entrants[0]
    need = need_on_device(entrant.candidate.shape, entrant.candidate.form, 9, cuda=False).total
    entry = enter(entrant, LENGTHS, Place("cpu", need, "", 0))
    assert entry.lengths.contexts == (6,) and entry.lengths.prompts == (4, 8) and not entry.reason
    assert entry.needed_bytes == need and "1 lengths do not fit" in entry.lengths.notes[0]


# --- what is timed -----------------------------------------------------------------------------------------


class FakeEngine:
    """Takes 0.01 s a prompt token that is not cached, and then 1, 2, 3 … s for each further token."""

    def __init__(self) -> None:
        self.now = 0.0
        self.held: list[int] = []
        self.calls: list[tuple[int, int, int]] = []

    def clock(self) -> float:
        return self.now

    def reset(self) -> None:
        self.held = []

    def generate(self, prompt: Sequence[int], params: Any) -> Iterator[int]:
        assert params.temperature == 0
        common = 0
        while common < min(len(self.held), len(prompt) - 1) and self.held[common] == prompt[common]:
            common += 1
        self.calls.append((len(prompt), common, params.max_new_tokens))
        self.held = list(prompt)
        self.now += (len(prompt) - common) / 100
        yield 7
        for number in range(1, params.max_new_tokens):
            self.held.append(7)
            self.now += number
            yield 7


class FakeMeter:
    """A joule a second of the engine's clock."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine

    def read(self) -> tuple[int, ...]:
        return (round(self.engine.now * 1e6),)

    def joules(self, before: tuple[int, ...], after: tuple[int, ...]) -> float:
        return (after[0] - before[0]) / 1e6


JOB = Job("m", "dense", "bfloat16", "cpu", 40, (10, 20), (5, 30), 4, 1, 0.0)


def test_what_the_clock_says() -> None:
    """TTFT is that of an empty cache; gaps begin at the first token; a context's prefill costs no gap."""
    engine = FakeEngine()
    steps: list[str] = []
    waited: list[float] = []
    prompts, decodes = time_engine(
        engine,
        JOB,
        token_ids(40, 1000),
        steps.append,
        finish=lambda: waited.append(engine.now),
        meter=FakeMeter(engine),
        clock=engine.clock,
    )
    assert [(p.tokens, pytest.approx(p.ttft)) for p in prompts] == [(10, 0.1), (20, 0.2)]
    for decode, context in zip(decodes, (5, 30), strict=True):
        assert decode.context == context
        assert decode.gaps == pytest.approx((1, 2, 3)) and decode.tpot == pytest.approx(2)
        assert decode.joules == pytest.approx(6.01)  # and the step of the first token
    assert steps == ["warm-up", "prefill of 10", "prefill of 20", "decode at 5", "decode at 30"]
    timed = [call for call in engine.calls if call[2] in (1, 4)]
    assert timed == [(10, 0, 1), (20, 0, 1), (5, 4, 4), (30, 29, 4)]
    assert engine.calls[0] == (10, 0, 3), "a warm-up comes before all"
    assert len(waited) == sum(new + 1 for _, _, new in engine.calls), (
        "the device is waited for at every stamp"
    )


def test_too_few_tokens_are_no_measurement() -> None:
    class Short(FakeEngine):
        def generate(self, prompt: Sequence[int], params: Any) -> Iterator[int]:
            return iter([7])

    with pytest.raises(RuntimeError, match="1 tokens came, and 3 were"):
        time_engine(Short(), JOB, token_ids(40, 1000), lambda text: None)


def test_a_prompt_may_fill_the_context() -> None:
    """The longest prompt leaves room for one token, so its warm-up asks for no more."""

    class Bounded(FakeEngine):
        def generate(self, prompt: Sequence[int], params: Any) -> Iterator[int]:
            room = job.context - len(prompt) + 1
            return islice(super().generate(prompt, params), room)

    job = replace(JOB, prompts=(8, 40), contexts=(6,), new_tokens=2, context=40)
    prompts, decodes = time_engine(Bounded(), job, token_ids(40, 1000), lambda text: None)
    assert [p.tokens for p in prompts] == [8, 40]
    assert [(d.context, len(d.gaps)) for d in decodes] == [(6, 1)]


def test_token_ids_are_in_the_vocabulary() -> None:
    ids = token_ids(5000, 100)
    assert min(ids) == 1 and max(ids) == 99 and ids == token_ids(5000, 100)


@pytest.mark.parametrize("label", ["bfloat16", "4-bit g32"])
def test_a_real_visit(label: str, entries: list[Entry], monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker's own code on a real model, here in this process; the model's stop ids end nothing."""
    entry = next(e for e in entries if e.label == label)
    monkeypatch.setattr("bench.roofline.LARGE_READ", 8 << 20)
    monkeypatch.setattr("bench.roofline._CPU_SIZES", (64,))
    found = latency_worker.measure(job_of(entry, "cpu", 0.0), lambda step: None)
    assert found.threads == 1 and len(found.rates) in (1, 2) and found.load_seconds > 0
    assert [p.tokens for p in found.prompts] == [4, 8] and all(p.ttft > 0 for p in found.prompts)
    assert [(d.context, len(d.gaps)) for d in found.decodes] == [(6, 2), (20, 2)]
    assert found.peak_host_bytes >= entry.entrant.subject.weight_bytes and found.peak_device_bytes == 0
    packed = dispatch.native_name() if native.available() else dispatch.REFERENCE
    assert found.kernel == ("torch" if label == "bfloat16" else packed)
    assert from_json(Visit, json.loads(json.dumps(to_json(found)))) == found


@pytest.mark.gpu
def test_a_real_visit_on_a_card(lineup: Lineup) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA card")
    entry = Entry(line_up([lineup.source], forms=["dense"], cuda=True).entrants[0], LENGTHS, 0)
    found = latency_worker.measure(job_of(entry, "cuda:0", 0.05), lambda step: None)
    assert found.peak_device_bytes >= entry.entrant.subject.weight_bytes
    assert [len(d.gaps) for d in found.decodes] == [2, 2]


# --- the record --------------------------------------------------------------------------------------------


def record_of(entries: list[Entry], visits: dict[str, list[Visit]], **options: Any) -> LatencyRecord:
    origin = origin_of(["bench", "latency", "m"], "m", "0")
    values: dict[str, Any] = {"failures": {}, "warnings": [], "probe": visit(), **options}
    return make_record(origin, entries, visits, values["failures"], values["probe"], values["warnings"])


def test_medians_quantiles_and_shares(entries: list[Entry]) -> None:
    entry = entries[0]
    found = record_of(
        [entry], {entry.label: [visit(1.0, joules=6.0), visit(4.0, joules=3.0), visit(2.0, joules=9.0)]}
    )
    subject = found.subjects[0]
    candidate = entry.entrant.candidate
    assert found.rounds == 3 and found.threads == 2 and found.roofline.matmul_dtype == "bfloat16"
    prompt = subject.prefill[1]
    assert prompt.prompt_tokens == 8 and prompt.ttft.values == pytest.approx((0.08, 0.02, 0.04))
    assert prompt.tokens_per_second.median == pytest.approx(200)
    ceiling = prefill_ceiling(candidate.shape, candidate.form, 8, 4e9, 1e10)
    assert prompt.ceiling_tokens_per_second == ceiling and prompt.share == pytest.approx(200 / ceiling)
    decode = subject.decode[1]
    assert decode.context_tokens == 20 and decode.tpot.values == pytest.approx((0.2, 0.05, 0.1))
    gaps = (0.1, 0.3, 0.025, 0.075, 0.05, 0.15)
    assert decode.itl_seconds == pytest.approx(gaps)
    for share, value in ((0.5, decode.itl_p50), (0.9, decode.itl_p90), (0.99, decode.itl_p99)):
        assert value == pytest.approx(float(numpy.quantile(gaps, share)))
    ceiling = decode_ceiling(candidate.shape, candidate.form, 20, 3, 4e9)  # of reads of the form's own size
    assert decode.ceiling_tokens_per_second == ceiling and decode.share == pytest.approx(10 / ceiling)
    assert decode.joules_per_token == pytest.approx(2.0)  # the median of 6, 3 and 9 over three tokens


def test_energy_is_told_for_all_rounds_or_not_at_all(entries: list[Entry]) -> None:
    entry = entries[0]
    found = record_of([entry], {entry.label: [visit(joules=6.0), visit()]})
    assert found.subjects[0].decode[0].joules_per_token is None


def test_drift_and_caches_are_remarked(entries: list[Entry]) -> None:
    """Two rounds, of which the first read 40 and the second 50 GB/s beside both forms."""
    visits = {e.label: [visit(read=40e9), visit(read=50e9)] for e in entries[:2]}
    found = record_of(entries[:2], visits)
    assert found.roofline.read_bytes_per_second.values == (40e9, 50e9)
    assert found.drift == pytest.approx(0.25) and "25% faster" in found.warnings[0]
    assert any("caches" in line and "180.0 GB/s" in line for line in found.warnings)
    calm = record_of(entries[:1], {entries[0].label: [visit(read=40e9), visit(read=43e9)]})
    assert not any("changed" in line for line in calm.warnings)


def test_a_share_above_the_ceiling_is_remarked(entries: list[Entry]) -> None:
    entry = entries[0]
    found = record_of([entry], {entry.label: [visit(speed=1e9)]})
    assert found.subjects[0].decode[0].share > 1 and any("of a ceiling" in w for w in found.warnings)


def test_the_rate_of_products_is_of_one_dtype() -> None:
    fast = replace(visit(), rates=(Rates(1.0, 1.0, 90.0),))
    slow = replace(visit(), rates=(Rates(3.0, 1.0, 10.0),))
    found = roofline_of(
        {"a": [fast], "b": [fast], "c": [slow]}, {"a": "bfloat16", "b": "bfloat16", "c": "float32"}
    )
    assert found.matmul_dtype == "bfloat16" and found.matmul_flops_per_second.values == (90.0,)
    assert found.read_bytes_per_second.values == (1.0,)


def test_forms_that_do_not_fit_or_fail_are_in_the_record(entries: list[Entry]) -> None:
    first, second, third = entries[:3]
    second = replace(second, reason="needs 30 GiB, and 20 GiB are free", needed_bytes=30 << 30)
    found = record_of(
        [first, second, third], {first.label: [visit()]}, failures={third.label: "exit code 137"}
    )
    assert [s.fits for s in found.subjects] == [True, False, False]
    assert found.subjects[1].reason == second.reason and found.subjects[1].needed_bytes == 30 << 30
    assert found.subjects[2].reason == "exit code 137" and not found.subjects[2].decode
    assert from_json(LatencyRecord, json.loads(json.dumps(to_json(found)))) == found


def test_where_nothing_fits_the_machine_is_still_told(entries: list[Entry]) -> None:
    found = record_of([replace(entries[0], reason="too large")], {}, probe=visit(read=7e9))
    assert found.rounds == 0 and found.roofline.read_bytes_per_second.median == 7e9
    assert not found.subjects[0].fits


def test_the_table(entries: list[Entry], capsys: pytest.CaptureFixture[str]) -> None:
    first, second = entries[:2]
    second = replace(second, reason="needs 30 GiB, and 20 GiB are free")
    print_record(record_of([first, second], {first.label: [visit()]}, warnings=["[b]busy[/b]"]))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Roofline: 1.0 GB/s of reads") and max(map(len, lines)) <= 100
    text = "\n".join(lines)
    assert "not measured: needs 30 GiB, and 20 GiB are free" in text and "! [b]busy[/b]" in text
    row = next(line for line in lines if line.startswith(first.label) and " 1.00 " in line)
    assert row.split()[-3:-1] == ["40.0", "100"]  # TTFT of 4 tokens in ms, tokens/s


# --- rounds ------------------------------------------------------------------------------------------------


def kept_in(folder: Path, **key: Any) -> WorkFile:
    return WorkFile(folder / "work.jsonl", {"key": 1, **key})


def test_rounds_are_interleaved(entries: list[Entry], tmp_path: Path) -> None:
    seen: list[str] = []
    found = Found()

    def measure(entry: Entry, step: Any) -> Visit:
        seen.append(entry.label)
        return visit()

    entries[1] = replace(entries[1], reason="too large")
    run_rounds(entries, 3, kept_in(tmp_path), measure, Watcher(), found)
    a, b, c = (e.label for e in entries if not e.reason)
    assert seen == [a, b, c, b, c, a, c, a, b]
    assert {label: len(visits) for label, visits in found.visits.items()} == {a: 3, b: 3, c: 3}


def test_the_time_left_is_what_forms_took_before(
    entries: list[Entry], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two forms of 10 and 30 seconds, two rounds: unknown, then three as long as the first, then as known."""
    now = [0.0]
    monkeypatch.setattr(latency_rounds.time, "monotonic", lambda: now[0])
    left: list[float | None] = []

    class Listener(Watcher):
        def began(self, title: str, done: int, total: int, seconds: float | None) -> None:
            left.append(seconds)

    def measure(entry: Entry, step: Any) -> Visit:
        now[0] += 10 if entry is entries[0] else 30
        return visit()

    run_rounds(entries[:2], 2, kept_in(tmp_path), measure, Listener(), Found())
    assert left == [None, 10 + 10 + 10, 30 + 10, 10]


def test_lines_for_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    watcher = make_watcher(quiet=False)
    watcher.began("round 1/1  NF4", 0, 1, None)
    watcher.ended("round 1/1  NF4", visit())
    watcher.ended("round 1/1  int8", "exit code 137")
    make_watcher(quiet=True).line("nothing")
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.splitlines() == [
        "round 1/1  NF4: load 1.00 s, prefill of 8: 100 tokens/s, decode at 20: 5.0 tokens/s",
        "round 1/1  int8: exit code 137",
    ]


def test_a_form_that_fails_ends_nothing_else(entries: list[Entry], tmp_path: Path) -> None:
    """It fails in the second round: it is not tried again, and its first round does not count."""
    bad = entries[1].label
    count = {entry.label: 0 for entry in entries}

    def measure(entry: Entry, step: Any) -> Visit | str:
        count[entry.label] += 1
        return "exit code 137" if entry.label == bad and count[bad] == 2 else visit()

    found = Found()
    run_rounds(entries, 3, kept_in(tmp_path), measure, Watcher(), found)
    assert found.failures == {bad: "exit code 137"} and bad not in found.visits and count[bad] == 2
    assert found.whole_rounds() == 3 and len(found.visits) == len(entries) - 1


def stop_after(limit: int, seen: list[str]) -> Any:
    def measure(entry: Entry, step: Any) -> Visit:
        if len(seen) == limit:
            raise KeyboardInterrupt
        seen.append(entry.label)
        return visit(speed=len(seen))

    return measure


def test_an_interrupt_keeps_what_is_done(entries: list[Entry], tmp_path: Path) -> None:
    seen: list[str] = []
    found = Found()
    with pytest.raises(KeyboardInterrupt):
        run_rounds(entries, 3, kept_in(tmp_path), stop_after(6, seen), Watcher(), found)
    assert found.whole_rounds() == 1 and {len(v) for v in found.whole().values()} == {1}
    later, again = Found(), []
    run_rounds(entries, 3, kept_in(tmp_path), stop_after(99, again), Watcher(), later)
    assert len(again) == 3 * len(entries) - 6 and later.whole_rounds() == 3
    for label, visits in found.visits.items():
        assert later.visits[label][: len(visits)] == visits


def test_what_does_not_agree_is_measured_again(entries: list[Entry], tmp_path: Path) -> None:
    def measured(work: WorkFile, **options: Any) -> int:
        seen: list[str] = []
        run_rounds(entries[:1], 1, work, stop_after(9, seen), Watcher(), Found(), **options)
        return len(seen)

    assert measured(kept_in(tmp_path)) == 1
    assert measured(kept_in(tmp_path)) == 0
    assert measured(kept_in(tmp_path), fresh=True) == 1
    assert measured(kept_in(tmp_path, digest="another")) == 1
    assert measured(kept_in(tmp_path)) == 1, "the file was of the other one"
    old = WorkFile(tmp_path / "work.jsonl", {"key": 1}, lambda: time.time() + 86401)
    assert measured(old) == 1


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", '{"key": 1}\n{"round": 0', '{"key": 1}\n{"round": 0, "time": 0}']
)
def test_a_damaged_work_file_counts_as_none(damage: str, entries: list[Entry], tmp_path: Path) -> None:
    (tmp_path / "work.jsonl").write_text(damage)
    seen: list[str] = []
    run_rounds(entries[:1], 1, kept_in(tmp_path), stop_after(9, seen), Watcher(), Found())
    assert len(seen) == 1


# --- processes ---------------------------------------------------------------------------------------------


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts a script in the worker's place."""

    def put(body: str) -> None:
        (tmp_path / "lowmem_fake_worker.py").write_text(f"import os, signal, sys, time\n{body}\n")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.setattr(latency_rounds, "WORKER", "lowmem_fake_worker")

    return put


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "memory ran out (exit code 137)"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "failed with exit code 139: it said nothing"),
        (
            "raise ValueError('no\\x1b[31m such thing')",
            "failed with exit code 1: ValueError: no?[31m such thing",
        ),
        ('print(\'{"failure": "memory ran out: 3 GiB"}\'); sys.exit(1)', "memory ran out: 3 GiB"),
        ("sys.exit(0)", "failed with exit code 0: it said nothing"),
    ],
)
def test_a_process_that_dies_says_why(body: str, expected: str, worker: Any) -> None:
    worker(body)
    found = run_job(JOB, 0, lambda step: None)
    assert isinstance(found, str) and expected in found and "\x1b" not in found


def test_the_job_reaches_the_process(worker: Any) -> None:
    worker(
        "import json\njob = json.load(sys.stdin)\n"
        "print(json.dumps({'step': os.environ['OMP_NUM_THREADS'] + os.environ['CUDA_VISIBLE_DEVICES']}))\n"
        "print(json.dumps({'failure': job['path']}))"
    )
    steps: list[str] = []
    assert run_job(JOB, 3, steps.append) == "m" and steps == ["3"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "expected"),
    [
        ("MemoryError('3 GiB')", "memory ran out: 3 GiB"),
        ("RuntimeError('CUDA out of memory. Tried')", "memory ran out: CUDA out of memory. Tried"),
        ("SourceError('m is damaged', 'Convert it again')", "m is damaged. Convert it again"),
        ("KeyError('a bug')", "failed with exit code 1: KeyError: 'a bug'"),
    ],
)
def test_what_the_worker_raises(error: str, expected: str, worker: Any) -> None:
    """And what libraries print to standard output is not taken for what the worker tells."""
    worker(
        "from bench import latency_worker\nfrom lowmem.errors import SourceError\n"
        "def measure(job, tell):\n    print('noise')\n    os.write(1, b'noise')\n"
        f"    raise {error}\n"
        "latency_worker.measure = measure\nsys.exit(latency_worker.main())"
    )
    assert run_job(JOB, 0, lambda step: None) == expected


def test_an_interrupt_kills_the_whole_group(worker: Any, tmp_path: Path) -> None:
    """The process has one of its own, which holds its standard output open."""
    worker(
        "import subprocess\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(os.getpid(), child.pid, flush=True)\ntime.sleep(600)"
    )
    pids: list[int] = []

    def hear(line: str) -> None:
        pids.extend(map(int, line.split()))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        converse(latency_rounds.WORKER, "", hear, tmp_path / "log", {})
    assert len(pids) == 2
    for _ in range(100):
        if not any(alive(pid) for pid in pids):
            break
        time.sleep(0.05)
    assert not any(alive(pid) for pid in pids)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


# --- the command -------------------------------------------------------------------------------------------


def command(*words: str) -> int:
    parser = argparse.ArgumentParser()
    latency_command.add_arguments(parser)
    return latency_command.run(parser.parse_args(words))


SHORT = ("--prompts", "4,8", "--contexts", "6,20", "--new-tokens", "3", "--quiet")


def test_a_real_run(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One form, one round, in processes of its own."""
    monkeypatch.setattr("bench.roofline.SECONDS", 0.01)
    words = [
        str(model),
        "--forms",
        "dense",
        "--rounds",
        "1",
        "--threads",
        "1",
        "--json",
        "--out",
        str(tmp_path),
    ]
    assert command(*words, *SHORT) == 0
    record = read_record(LatencyRecord, tmp_path)
    assert record is not None and json.loads(capsys.readouterr().out) == json.loads(
        (tmp_path / "latency.json").read_text()
    )
    assert (
        record.rounds == 1
        and record.threads == 1
        and record.drift == 0
        and record.origin.source == str(model)
    )
    assert [path.name for path in tmp_path.iterdir()] == ["latency.json"]
    (subject,) = record.subjects
    assert subject.fits and subject.load_seconds is not None and len(subject.load_seconds.values) == 1
    assert subject.peak_host_bytes >= subject.subject.weight_bytes
    assert [p.prompt_tokens for p in subject.prefill] == [4, 8]
    for prompt in subject.prefill:
        assert prompt.tokens_per_second.median == pytest.approx(prompt.prompt_tokens / prompt.ttft.median)
        assert prompt.share == pytest.approx(
            prompt.tokens_per_second.median / prompt.ceiling_tokens_per_second
        )
    for decode in subject.decode:
        assert len(decode.itl_seconds) == (3 - 1) * record.rounds
        assert decode.tpot.median == pytest.approx(sum(decode.itl_seconds) / 2)
        assert decode.share == pytest.approx(1 / decode.tpot.median / decode.ceiling_tokens_per_second)
        assert decode.itl_p50 <= decode.itl_p90 <= decode.itl_p99 <= max(decode.itl_seconds)


@pytest.fixture
def fake_jobs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Processes that find what `visit` says; the list has their paths, and `stop` at its end interrupts."""
    jobs: list[str] = []

    def run(job: Job, threads: int, step: Any) -> Visit:
        if jobs and jobs[-1] == "stop":
            jobs.pop()
            raise KeyboardInterrupt
        jobs.append(job.path and job.method)
        if len(jobs) == 7:
            jobs.append("stop")
        return visit()

    monkeypatch.setattr(latency_rounds, "run_job", run)
    monkeypatch.setattr(machine_state, "look_before", lambda load: machine_state.Before(("It is busy",), 0))
    return jobs


def test_the_record_of_an_interrupted_run(
    model: Path, tmp_path: Path, fake_jobs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Four forms: a look at the machine, a round, two more forms, Ctrl-C. Then the same command goes on."""
    words = [str(model), "--rounds", "2", "--out", str(tmp_path), *SHORT]
    assert command(*words) == 130
    assert "stopped with 1 of 2 rounds whole" in capsys.readouterr().err
    record = read_record(LatencyRecord, tmp_path)
    assert record is not None and record.rounds == 1 and len(record.subjects) == 4
    assert (
        record.warnings[0] == "It is busy" and "Interrupted: 1 of 2 rounds were measured" in record.warnings
    )
    assert (tmp_path / latency_rounds.WORK_FILE).exists()
    del fake_jobs[:]
    assert command(*words) == 0
    assert len(fake_jobs) == 1 + 2  # the machine, and what was left of the second round
    record = read_record(LatencyRecord, tmp_path)
    assert record is not None and record.rounds == 2 and not (tmp_path / latency_rounds.WORK_FILE).exists()
    assert all(len(s.load_seconds.values) == 2 for s in record.subjects if s.load_seconds)


def test_an_interrupt_before_a_whole_round_leaves_no_record(
    model: Path, tmp_path: Path, fake_jobs: list[str]
) -> None:
    fake_jobs.extend([""] * 4)
    assert command(str(model), "--out", str(tmp_path), *SHORT) == 130
    assert [path.name for path in tmp_path.iterdir()] == [latency_rounds.WORK_FILE]


def test_less_memory_marks_forms(model: Path, tmp_path: Path, fake_jobs: list[str]) -> None:
    assert command(str(model), "--ram", "1MiB", "--out", str(tmp_path), *SHORT) == 0
    record = read_record(LatencyRecord, tmp_path)
    assert record is not None and not any(subject.fits for subject in record.subjects)
    assert all("--ram allows 1 MiB" in s.reason and s.needed_bytes > 1 << 20 for s in record.subjects)
    assert fake_jobs == [""], "only the machine was looked at"


def test_a_converted_folder_needs_no_reference(model: Path, tmp_path: Path, fake_jobs: list[str]) -> None:
    """The 16-bit source of a checkpoint that was downloaded is nowhere: its times can be had without."""
    alone = tmp_path / "elsewhere"
    write_rtn_checkpoint(tiny_model("gpt_bigcode_mqa"), alone, bits=4)
    assert command(str(alone), "--rounds", "1", "--out", str(tmp_path / "out"), *SHORT) == 0
    record = read_record(LatencyRecord, tmp_path / "out")
    assert record is not None and [s.subject.label for s in record.subjects] == ["4-bit g32"]
    assert record.origin.source == str(alone)


@pytest.mark.parametrize(
    "words",
    [("--rounds", "0"), ("--vram", "8GiB"), ("--contexts", "5000"), ("--new-tokens", "1"), ("--ram", "x")],
)
def test_requests_that_mean_nothing(
    words: tuple[str, ...], model: Path, tmp_path: Path, fake_jobs: list[str]
) -> None:
    with pytest.raises(LowmemError):
        command(str(model), "--quiet", "--out", str(tmp_path), "--device", "cpu", *words)


def test_a_folder_that_cannot_be_written(model: Path, tmp_path: Path, fake_jobs: list[str]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        command(str(model), "--out", str(tmp_path / "file" / "below"), *SHORT)
    assert not fake_jobs, "before anything is measured"


def test_no_list_of_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command("m", "--prompts", "12,x")
    assert "no list of numbers" in capsys.readouterr().err


# --- the machine -------------------------------------------------------------------------------------------


def test_load_governor_and_busy_processes(tmp_path: Path) -> None:
    assert machine_state.load_warning(1.0, 2) == ""
    assert "load average 1.20 on 2 cores" in machine_state.load_warning(1.2, 2)
    for core, (governor, driver) in enumerate(
        [("powersave", "acpi-cpufreq"), ("powersave", "intel_pstate"), ("performance", "acpi-cpufreq")]
    ):
        folder = tmp_path / f"cpu{core}" / "cpufreq"
        folder.mkdir(parents=True)
        (folder / "scaling_governor").write_text(governor + "\n")
        (folder / "scaling_driver").write_text(driver + "\n")
    assert "keeps 1 cores slow" in machine_state.governor_warning(tmp_path)
    assert machine_state.governor_warning(tmp_path / "none") == ""
    before = {(1, "idle"): 5.0, (2, "make"): 1.0, (3, "gone"): 0.0}
    after = {(1, "idle"): 5.01, (2, "make"): 1.4, (4, "new"): 9.0}
    assert machine_state.busy_warnings(before, after, 0.5) == ["make (process 2) took 80% of a core"]


def test_swapping_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    before = machine_state.Before((), machine_state._swapped())
    assert machine_state.swap_warning(before) == ""
    moved = before.swapped + (64 << 20)
    monkeypatch.setattr(machine_state, "_swapped", lambda: moved)
    assert machine_state.swap_warning(before).startswith("64 MiB went to or from swap")


def test_a_busy_process_is_seen() -> None:
    """A real one, which computes until it is ended."""
    import subprocess
    import sys

    child = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            before, after = machine_state._processor_times(0.3)
            key = next((key for key in after if key[0] == child.pid), None)
            if key is not None and after[key] > before.get(key, after[key]):
                break
        assert key is not None and after[key] > before[key]
        assert not any(pid == os.getpid() for pid, _ in after)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
