"""`lowmem bench latency`: timed intervals, lengths, and the record. The tests use their own clocks; none
compares a real time with a number."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy
import pytest
import torch
from lowmem.benchmarks.common.lineup import Lineup, LineupRequest, line_up
from lowmem.benchmarks.common.origin import origin_of
from lowmem.benchmarks.common.record_file import from_json, to_json
from lowmem.benchmarks.common.records import LatencyRecord
from lowmem.benchmarks.latency import command as latency_command
from lowmem.benchmarks.latency import timing
from lowmem.benchmarks.latency.planning import (
    CONTEXTS,
    PROMPTS,
    Budget,
    PlannedVersion,
    choose_lengths,
    plan_version,
)
from lowmem.benchmarks.latency.roofline import Rates, decode_ceiling, prefill_ceiling
from lowmem.benchmarks.latency.rounds import Rounds, order
from lowmem.benchmarks.latency.summary import drift_of, make_record, repeated, roofline_of
from lowmem.benchmarks.latency.tasks import Lengths, Timings, TimingTask
from lowmem.benchmarks.latency.timing import EngineTimer, token_ids

from lowmem.errors import InvalidRequestError
from lowmem.kernels import dispatch
from lowmem.kernels.native import library as native
from lowmem.kernels.registry import Native
from lowmem.plan.memory import need_on_device
from tests.benchmarks.latency_helpers import LENGTHS, TASK, timings, write_model


@pytest.fixture(scope="module")
def lineup(tmp_path_factory: pytest.TempPathFactory) -> Lineup:
    return line_up(LineupRequest((str(write_model(tmp_path_factory.mktemp("latency"))),)))


MACHINE = TimingTask("cpu", "bfloat16", 0)


@pytest.fixture
def entries(lineup: Lineup) -> list[PlannedVersion]:
    return [PlannedVersion(entrant, LENGTHS, 1 << 20) for entrant in lineup.entrants]


# --- figures ---------------------------------------------------------------------------------------------


def test_repeated_keeps_the_rounds_in_order() -> None:
    found = repeated([3.0, 1.0, 2.0, 9.0])
    assert (found.median, found.low, found.high, found.values) == (2.5, 1.0, 9.0, (3.0, 1.0, 2.0, 9.0))


def test_drift() -> None:
    assert drift_of([40e9]) == 0
    assert drift_of([36e9, 45e9, 40e9]) == pytest.approx(0.25)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_each_round_measures_every_version_once_in_rotating_order(count: int) -> None:
    rounds = [order(count, r) for r in range(count)]
    assert all(sorted(places) == list(range(count)) for places in rounds)
    for position in range(count):  # over `count` rounds each version is once in each position
        assert sorted(places[position] for places in rounds) == list(range(count))
    assert order(3, 4) == [1, 2, 0]


# --- lengths ---------------------------------------------------------------------------------------------


def test_default_lengths_fit_the_positions() -> None:
    large = choose_lengths(None, None, 64, 8192)
    assert large.prompts == PROMPTS and large.contexts == CONTEXTS and not large.notes
    assert large.context == 4096 + 64
    small = choose_lengths(None, None, 64, 1024)
    assert small.prompts == (32, 128, 512)
    assert small.contexts == (128, 960)  # 1024 positions minus 64 new tokens
    assert small.context == 1024 and not small.notes
    assert choose_lengths(None, None, 64, None).contexts == CONTEXTS


def test_requested_lengths_that_do_not_fit_are_noted() -> None:
    found = choose_lengths((500, 10, 10), (190, 193, 5, 300), 64, 256)
    assert found.prompts == (10,) and found.contexts == (5, 190)
    assert len(found.notes) == 2
    assert found.notes[0].startswith("left out contexts 193, 300: longer")
    assert "256 positions" in found.notes[0] and found.notes[1].startswith("left out prompt 500: ")


@pytest.mark.parametrize(
    ("prompts", "contexts", "new_tokens"),
    [((300,), None, 4), (None, (250,), 64), (None, (0,), 4), (None, None, 1)],
)
def test_no_usable_lengths_are_refused(
    prompts: tuple[int, ...] | None, contexts: tuple[int, ...] | None, new_tokens: int
) -> None:
    with pytest.raises(InvalidRequestError):
        choose_lengths(prompts, contexts, new_tokens, 256)


def test_a_version_that_does_not_fit_states_its_need(lineup: Lineup) -> None:
    entrant = lineup.entrants[0]
    need = need_on_device(
        entrant.candidate.shape, entrant.candidate.form, 9, cuda=False, own_context=100 << 20
    ).total
    budget = Budget("cpu", need - 1, "1.00 MiB are free", 100 << 20)
    refused = plan_version(entrant, LENGTHS, budget)
    assert refused.needed_bytes == need and "1.00 MiB are free" in refused.reason
    assert f"needs {need / 2**20:.0f} MiB" in refused.reason


def test_lengths_that_do_not_fit_the_memory_are_left_out(lineup: Lineup) -> None:
    """With memory for 9 tokens, a context of 6 with 3 new tokens fits, and one of 20 does not."""
    entrant = lineup.entrants[0]
    need = need_on_device(entrant.candidate.shape, entrant.candidate.form, 9, cuda=False).total
    entry = plan_version(entrant, LENGTHS, Budget("cpu", need, "", 0))
    assert entry.lengths.contexts == (6,) and entry.lengths.prompts == (4, 8) and not entry.reason
    assert entry.needed_bytes == need and "1 of the lengths need too much memory" in entry.lengths.notes[0]


# --- timed intervals -------------------------------------------------------------------------------------


class FakeEngine:
    """An engine that takes 0.01 s per uncached prompt token, and then 1, 2, 3 … s for each further token."""

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
    """A meter that counts one joule per second of the engine's clock."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine

    def read(self) -> tuple[int, ...]:
        return (round(self.engine.now * 1e6),)

    def joules(self, before: tuple[int, ...], after: tuple[int, ...]) -> float:
        return (after[0] - before[0]) / 1e6


def test_times_from_the_clock() -> None:
    """TTFT is measured with an empty cache. Gaps start at the first token and exclude the prefill."""
    engine = FakeEngine()
    steps: list[str] = []
    waited: list[float] = []
    timer = EngineTimer(engine, lambda: waited.append(engine.now), FakeMeter(engine), engine.clock)
    prompts, decodes = timer.time(TASK.lengths, token_ids(40, 1000), steps.append)
    assert [(p.tokens, pytest.approx(p.ttft)) for p in prompts] == [(10, 0.1), (20, 0.2)]
    for decode, context in zip(decodes, (5, 30), strict=True):
        assert decode.context == context
        assert decode.gaps == pytest.approx((1, 2, 3)) and decode.tpot == pytest.approx(2)
        assert decode.joules == pytest.approx(6.01)  # includes the step of the first token
    assert steps == ["warm-up", "prefill of 10", "prefill of 20", "decode at 5", "decode at 30"]
    timed = [call for call in engine.calls if call[2] in (1, 4)]
    assert timed == [(10, 0, 1), (20, 0, 1), (5, 4, 4), (30, 29, 4)]
    assert engine.calls[0] == (10, 0, 3), "the first call is a warm-up"
    assert len(waited) == sum(new + 1 for _, _, new in engine.calls), (
        "the device is synchronized at every time stamp"
    )


def test_too_few_tokens_are_an_error() -> None:
    class Short(FakeEngine):
        def generate(self, prompt: Sequence[int], params: Any) -> Iterator[int]:
            return iter([7])

    with pytest.raises(RuntimeError, match="1 of 3 tokens"):
        EngineTimer(Short()).time(TASK.lengths, token_ids(40, 1000), lambda text: None)


def test_a_prompt_may_fill_the_context() -> None:
    """The longest prompt leaves room for one token, so its warm-up generates only one."""

    class Bounded(FakeEngine):
        def generate(self, prompt: Sequence[int], params: Any) -> Iterator[int]:
            room = lengths.context - len(prompt) + 1
            return islice(super().generate(prompt, params), room)

    lengths = Lengths((8, 40), (6,), 2)
    prompts, decodes = EngineTimer(Bounded()).time(lengths, token_ids(40, 1000), lambda text: None)
    assert [p.tokens for p in prompts] == [8, 40]
    assert [(d.context, len(d.gaps)) for d in decodes] == [(6, 1)]


def test_token_ids_are_in_the_vocabulary() -> None:
    ids = token_ids(5000, 100)
    assert min(ids) == 1 and max(ids) == 99 and ids == token_ids(5000, 100)


@pytest.mark.parametrize("label", ["bfloat16", "4-bit g32"])
def test_a_real_task(label: str, entries: list[PlannedVersion], monkeypatch: pytest.MonkeyPatch) -> None:
    """The code of the worker on a real model in this process. Stop ids of the model are ignored."""
    entry = next(e for e in entries if e.label == label)
    monkeypatch.setattr("lowmem.benchmarks.latency.roofline.LARGE_READ", 8 << 20)
    monkeypatch.setattr("lowmem.benchmarks.latency.roofline._CPU_SIZES", (64,))
    found = timing.measure(entry.task(replace(MACHINE, seconds=0.0)), lambda step: None)
    assert found.threads == 1 and len(found.rates) in (1, 2) and found.load_seconds > 0
    assert [p.tokens for p in found.prompts] == [4, 8] and all(p.ttft > 0 for p in found.prompts)
    assert [(d.context, len(d.gaps)) for d in found.decodes] == [(6, 2), (20, 2)]
    assert found.peak_host_bytes >= entry.entrant.subject.weight_bytes and found.peak_device_bytes == 0
    packed = Native().name if native.available() else dispatch.REFERENCE
    assert found.kernel == ("torch" if label == "bfloat16" else packed)
    assert from_json(Timings, json.loads(json.dumps(to_json(found)))) == found and found.batch is None


@pytest.mark.gpu
def test_a_real_task_on_a_card(lineup: Lineup) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA card")
    entry = PlannedVersion(
        line_up(LineupRequest((lineup.source,), versions=("dense",), cuda=True)).entrants[0], LENGTHS, 0
    )
    found = timing.measure(entry.task(TimingTask("cuda:0", "bfloat16", 0)), lambda step: None)
    assert found.peak_device_bytes >= entry.entrant.subject.weight_bytes
    assert [len(d.gaps) for d in found.decodes] == [2, 2]


# --- the record ------------------------------------------------------------------------------------------


def record_of(
    planned: list[PlannedVersion],
    found: dict[str, list[Timings]],
    failures: dict[str, str] | None = None,
    warnings: tuple[str, ...] = (),
    probe: Timings | None = None,
) -> LatencyRecord:
    origin = origin_of(["bench", "latency", "m"], "m", "0")
    work: Any = None
    rounds = Rounds(planned, 3, work, lambda one, step: "", timings=found, failures=failures or {})
    return make_record(origin, rounds, probe or timings(), warnings)


def test_medians_quantiles_and_shares(entries: list[PlannedVersion]) -> None:
    entry = entries[0]
    found = record_of(
        [entry], {entry.label: [timings(1.0, joules=6.0), timings(4.0, joules=3.0), timings(2.0, joules=9.0)]}
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
    ceiling = decode_ceiling(
        candidate.shape, candidate.form, 20, 3, 4e9
    )  # with the bandwidth for reads of this version's size
    assert decode.ceiling_tokens_per_second == ceiling and decode.share == pytest.approx(10 / ceiling)
    assert decode.joules_per_token == pytest.approx(2.0)  # the median of 6, 3 and 9 over three tokens


def test_energy_is_reported_only_if_all_rounds_have_it(entries: list[PlannedVersion]) -> None:
    entry = entries[0]
    found = record_of([entry], {entry.label: [timings(joules=6.0), timings()]})
    assert found.subjects[0].decode[0].joules_per_token is None


def test_drift_and_caches_are_noted(entries: list[PlannedVersion]) -> None:
    """Two rounds: the bandwidth beside both versions was 40 GB/s in the first and 50 GB/s in the second."""
    visits = {e.label: [timings(read=40e9), timings(read=50e9)] for e in entries[:2]}
    found = record_of(entries[:2], visits)
    assert found.roofline.read_bytes_per_second.values == (40e9, 50e9)
    assert found.drift == pytest.approx(0.25) and "changed by 25%" in found.warnings[0]
    assert any("caches" in line and "180.0 GB/s" in line for line in found.warnings)
    calm = record_of(entries[:1], {entries[0].label: [timings(read=40e9), timings(read=43e9)]})
    assert not any("changed" in line for line in calm.warnings)


def test_a_share_above_the_ceiling_is_noted(entries: list[PlannedVersion]) -> None:
    entry = entries[0]
    found = record_of([entry], {entry.label: [timings(speed=1e9)]})
    assert found.subjects[0].decode[0].share > 1 and any("of a ceiling" in w for w in found.warnings)


def test_the_rate_of_products_is_per_dtype() -> None:
    fast = replace(timings(), rates=(Rates(1.0, 1.0, 90.0),))
    slow = replace(timings(), rates=(Rates(3.0, 1.0, 10.0),))
    found = roofline_of(
        {"a": [fast], "b": [fast], "c": [slow]}, {"a": "bfloat16", "b": "bfloat16", "c": "float32"}
    )
    assert found.matmul_dtype == "bfloat16" and found.matmul_flops_per_second.values == (90.0,)
    assert found.read_bytes_per_second.values == (1.0,)


def test_versions_that_do_not_fit_or_fail_are_in_the_record(entries: list[PlannedVersion]) -> None:
    first, second, third = entries[:3]
    second = replace(second, reason="needs 30 GiB, and 20 GiB are free", needed_bytes=30 << 30)
    found = record_of(
        [first, second, third], {first.label: [timings()]}, failures={third.label: "exit code 137"}
    )
    assert [s.fits for s in found.subjects] == [True, False, False]
    assert found.subjects[1].reason == second.reason and found.subjects[1].needed_bytes == 30 << 30
    assert found.subjects[2].reason == "exit code 137" and not found.subjects[2].decode
    assert from_json(LatencyRecord, json.loads(json.dumps(to_json(found)))) == found


def test_the_machine_is_recorded_even_if_nothing_fits(entries: list[PlannedVersion]) -> None:
    found = record_of([replace(entries[0], reason="too large")], {}, probe=timings(read=7e9))
    assert found.rounds == 0 and found.roofline.read_bytes_per_second.median == 7e9
    assert not found.subjects[0].fits


def test_the_tables(entries: list[PlannedVersion], capsys: pytest.CaptureFixture[str]) -> None:
    first, second = entries[:2]
    second = replace(second, reason="needs 30 GiB, and 20 GiB are free")
    latency_command._print(record_of([first, second], {first.label: [timings()]}, warnings=("[b]busy[/b]",)))
    text = capsys.readouterr().out
    assert "read memory at 1.00 GB/s" in text and max(map(len, text.splitlines())) <= 160
    assert "needs 30 GiB, and 20 GiB are free" in text and "! [b]busy[/b]" in text
    rows = [line.split() for line in text.splitlines() if line.split()[:1] == [first.label]]
    assert rows[0][1:3] == ["4", "100"] and rows[0][-1] == "40.0"  # prompt, tokens/s, TTFT in ms
