"""`cards`: machine code read from fixed texts, arithmetic by hand, and the kernels compiled for real."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from lowmem.benchmarks.common.processes import ROOT
from lowmem.benchmarks.common.record_file import from_json, to_json
from lowmem.benchmarks.common.records import Machine, Origin
from lowmem.benchmarks.experiments.cards.machine_code import (
    amd_code,
    bytes_ahead,
    counted,
    is_float,
    is_integer,
    is_narrow_load,
    is_wide_load,
    nvidia_code,
)
from lowmem.benchmarks.experiments.cards.record import (
    LIMITS,
    Built,
    CardsRecord,
    Loop,
    Pace,
    missed,
)

pytest.importorskip("triton")

from lowmem.benchmarks.experiments.cards import __main__ as command
from lowmem.benchmarks.experiments.cards.arithmetic import flights, loop_of, paces, slots, warps_held
from lowmem.benchmarks.experiments.cards.launches import (
    CASES,
    CHOICES,
    FORMATS,
    ZEROS,
    combinations,
    launch_of,
)
from lowmem.benchmarks.experiments.cards.run import jobs
from lowmem.benchmarks.experiments.cards.specs import CARDS, FAMILIES
from lowmem.benchmarks.experiments.cards.table import render

from lowmem.kernels.contract import LinearSpec
from lowmem.kernels.triton.choice import Choice, tuned

FOUR = "4-bit gptq g128"
SASS = """
        .section .text.few_rows
.text.few_rows:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/               @P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0020*/                   LDG.E.128 R16, [R6.64] ;
        /*0030*/                   LDG.E.128 R20, [R6.64+0x10] ;
        /*0040*/                   LDG.E.64 R24, [R26.64] ;
        /*0050*/                   LOP3.LUT R30, R17, 0xf, RZ, 0xc0, !PT ;
        /*0060*/                   FFMA R40, R30, R20, R40 ;
        /*0070*/                   LDG.E.128 R44, [R8.64] ;
        /*0080*/              @!P1 FADD.FTZ R41, R45, R41 ;
        /*0090*/                   NOP ;
        /*0098*/                   LDL R53, [R1] ;
        /*00a0*/               @P2 BRA `(.L_x_1) ;
.L_x_0:
        /*00b0*/                   EXIT ;
.L_x_2:
        /*00c0*/                   BRA `(.L_x_2);
"""
USAGE = " Function few_rows:\n  REG:48 STACK:8 SHARED:0 LOCAL:0 CONSTANT[0]:412 TEXTURE:0 SURFACE:0 SAMPLER:0"
AMDGCN = """
few_rows:                               ; @few_rows
\ts_load_b64 s[8:9], s[0:1], 0x30
.LBB0_2:                                ; =>This Inner Loop Header: Depth=1
\tglobal_load_b128 v[23:26], v[9:10], off
\tbuffer_load_b128 v[27:30], v9, s[4:7], 0 offen
\ts_delay_alu instid0(VALU_DEP_1)
\ts_waitcnt vmcnt(0)
\tv_and_b32_e32 v5, 15, v24
\tv_dual_fmac_f32 v6, v5, v7 :: v_dual_fmac_f32 v8, v5, v9
\tscratch_store_b32 off, v6, off offset:4
\ts_cbranch_scc1 .LBB0_2
; %bb.3:
\ts_endpgm
\t.amdhsa_float_denorm_mode_32 3
; Occupancy: 9
    .private_segment_fixed_size: 12
    .sgpr_spill_count: 0
    .vgpr_count:     167
    .vgpr_spill_count: 2
"""


def a_loop(**changes: object) -> Loop:
    loop = Loop(
        "sm_86", "decode, 1 row", "bfloat16", "middle", FOUR,
        3.0, 1.4, 1.3, (("FFMA", 1.06),), 9, 0, 0, 48, 40, 32,
    )  # fmt: skip
    return dataclasses.replace(loop, **changes)


def a_record(built: tuple[Built, ...] = (), loops: tuple[Loop, ...] = (), **more: object) -> CardsRecord:
    origin = Origin("python", "2026-01-01T00:00:00", Machine("one", (), 2, 1, "cpu", 0), (), "m", "", 0.0)
    record = CardsRecord(origin, "3.9.0", built, loops, (), ())
    return dataclasses.replace(record, **more)


# --- machine code -------------------------------------------------------------------------------------------


def test_nvidia_s_listing():
    code = nvidia_code(USAGE, SASS, 2048)
    assert (code.registers, code.shared, code.spilled, code.flushes) == (48, 2048, 8, 1)
    assert code.instructions[0] == "LDG.E.128 R16, [R6.64]"
    assert code.instructions[-1].startswith("BRA")
    opcodes = counted(code.instructions)
    assert len(opcodes) == 9  # NOP is none
    assert code.moves == 1
    assert [opcode for opcode in opcodes if is_float(opcode)] == ["FFMA", "FADD.FTZ"]
    assert [opcode for opcode in opcodes if is_integer(opcode)] == ["LOP3.LUT"]
    assert sum(map(is_wide_load, code.instructions)) == 3
    assert not any(map(is_narrow_load, code.instructions))
    assert is_narrow_load("LDG.E R8, [R2.64]") and is_narrow_load("LDG.E.U16 R8, [R2.64]")


def test_amd_s_assembly():
    code = amd_code(AMDGCN, 2048)
    assert (code.registers, code.spilled, code.flushes, code.waves, code.moves) == (167, 8, 0, 9, 1)
    opcodes = counted(code.instructions)
    assert opcodes == [
        "global_load_b128", "buffer_load_b128", "v_and_b32_e32", "v_dual_fmac_f32", "scratch_store_b32",
        "s_cbranch_scc1",
    ]  # fmt: skip
    assert [is_float(opcode) for opcode in opcodes] == [False, False, False, True, False, False]
    assert [is_integer(opcode) for opcode in opcodes] == [False, False, True, False, False, False]
    flushing = AMDGCN.replace("denorm_mode_32 3", "denorm_mode_32 0").replace(
        "spill_count: 2", "spill_count: 0"
    )
    assert (amd_code(flushing, 0).flushes, amd_code(flushing, 0).spilled) == (1, 12)


def test_bytes_ahead_end_where_a_loaded_register_is_read():
    code = nvidia_code(USAGE, SASS, 0)
    # Two loads, of which the first is read, then the second; then a third alone.
    assert bytes_ahead(code.instructions) == 32
    loads = [f"LDG.E.128 R{4 * number}, [R90.64]" for number in range(3)]
    assert bytes_ahead([*loads, "FADD R20, R10, R20"]) == 48
    assert bytes_ahead(["global_load_b128 v[0:3], v[9:10], off", "v_and_b32_e32 v5, 15, v2"]) == 16


# --- arithmetic ---------------------------------------------------------------------------------------------


def test_occupancy():
    """48 registers: 65536 / (48 · 128) = 10 programs of 4 warps, as NVIDIA's calculator says; 167: 3."""
    code = nvidia_code(USAGE, SASS, 2048)
    assert warps_held(FAMILIES["sm_86"], code, 4) == 40
    assert warps_held(FAMILIES["sm_86"], dataclasses.replace(code, registers=167), 4) == 12
    assert warps_held(FAMILIES["sm_86"], dataclasses.replace(code, shared=50 << 10), 4) == 4
    assert warps_held(FAMILIES["sm_75"], dataclasses.replace(code, registers=32), 4) == 32
    assert warps_held(FAMILIES["gfx1100"], amd_code(AMDGCN, 0), 8) == 18


def test_slots_count_the_unit_that_is_short():
    assert slots(a_loop()) == 3.0
    assert slots(a_loop(integers=2.0)) == 4.0  # 64 lanes of 128
    assert slots(a_loop(target="sm_75", floats=1.6)) == 3.2
    assert slots(a_loop(target="gfx1100")) == pytest.approx(2.7)  # without scalar instructions


def test_the_speed_of_a_card():
    """RTX 3060: 28 · 128 · 1.777 GHz; memory at 80 % of 360 GB/s."""
    weights, linear_bytes = 15_000_000_000, 7_700_000_000
    found = {
        pace.card: pace
        for pace in paces([a_loop()], [(FOUR, weights, linear_bytes, linear_bytes + 600_000_000, 9 << 30)])
    }
    pace = found["RTX 3060 12GB"]
    assert pace.available == pytest.approx(28 * 128 * 1.777e9 / 360e9 * 7.7 / 15, rel=1e-3)
    assert pace.memory_bound and pace.fits
    assert pace.tokens == pytest.approx(0.8 * 360 / 8.3, rel=1e-3)
    assert set(found) == {card.name for card in CARDS if card.family == "sm_86"}
    (slow,) = [
        p
        for p in paces([a_loop(per_weight=50.0)], [(FOUR, weights, linear_bytes, linear_bytes, 13 << 30)])
        if p.card == "RTX 3060 12GB"
    ]
    assert not slow.memory_bound and not slow.fits
    assert slow.tokens == pytest.approx(28 * 128 * 1.777e9 / (50 * weights), rel=1e-3)


def test_bytes_in_flight():
    (flight,) = [flight for flight in flights([a_loop()]) if flight.card == "RTX 3060 12GB"]
    assert flight.needed == pytest.approx(360e9 / 28 * 800 / 1.777e9, rel=1e-3)
    assert (flight.of_launch, flight.of_occupancy) == (8 * 32 * 32, 40 * 32 * 32)


# --- launches -----------------------------------------------------------------------------------------------


def test_launches_are_those_of_the_product():
    for name, case in CASES.items():
        launch = launch_of(case, FORMATS[FOUR], "bfloat16", "stored", "sm_86")
        assert launch.kernel.__name__ == case.kernel
        if case.kernel == "few_rows":
            assert launch.constant("ROWS") == case.rows and launch.constant("BITS") == 4
            assert launch.options["MIDDLE"] is False
            assert launch.options["WHOLE"] is ("odd" not in name)
            assert launch.options["SPLIT"] is ("shared" in name)


def test_each_family_s_launches_are_timed_on_cards():
    spec = LinearSpec(6144, 24576, True, FORMATS[FOUR])
    for choice in (*CHOICES.values(), Choice()):

        def seconds(other: Choice, rows: int, choice: Choice = choice) -> float:
            """Least where everything but the number of parts and of dense rows is as in `choice`."""
            same = dataclasses.replace(other.decode, parts=1) == choice.decode
            near = (other.decode.block, other.decode.warps) == (choice.decode.block, choice.decode.warps)
            return 5.0 - same - near - (other.tile == choice.tile) - (other.prefill == choice.prefill)

        found = tuned(spec, 28, seconds)
        assert dataclasses.replace(found.decode, parts=1) == choice.decode
        assert (found.tile, found.prefill) == (choice.tile, choice.prefill)


def test_every_kernel_is_built_in_both_dtypes_and_with_both_zero_points():
    for target in FAMILIES:
        for kernel in ("few_rows", "many_rows"):
            cases = [case for case in CASES.values() if case.kernel == kernel]
            found = {pair for case in cases for pair in combinations(case, target)}
            assert {dtype for dtype, _ in found} == {"bfloat16", "float16"}
            assert {zeros for _, zeros in found} == set(ZEROS)
        assert {job.formats for job in jobs([target], ["decode, 1 row"], list(FORMATS))} == {tuple(FORMATS)}


# --- the record ---------------------------------------------------------------------------------------------


def test_faults_are_named():
    formats = (FOUR, "2-bit gptq g32")
    built = Built(
        "sm_86", "decode, 1 row", "bfloat16", "middle", formats, (48, 0), (0, 0), (4, 0), (0.02, 0.0),
        (("2-bit gptq g32", "ValueError: no"),),
    )  # fmt: skip
    loops = (a_loop(per_weight=5.1, flushes=1, narrow=2), a_loop(zeros="stored", narrow=8))
    lines = list(missed(a_record((built,), loops)))
    assert len(lines) == 5
    assert "ValueError: no" in lines[0] and "4 bytes spilled, 2.0% of the loop" in lines[1]
    assert "5.10 instructions per weight, more than 5.0" in lines[2]
    assert "subnormal" in lines[3] and "narrower" in lines[4]


def test_a_record_survives_its_file(tmp_path, capsys):
    built = Built("sm_86", "decode, 1 row", "bfloat16", "middle", (FOUR,), (48,), (0,), (0,), (0.0,))
    pace = Pace("RTX 3060 12GB", FOUR, 9.2, 10.0, 34.0, True)
    record = a_record((built,), (a_loop(),), flights=tuple(flights([a_loop()])), paces=(pace,))
    assert from_json(CardsRecord, json.loads(json.dumps(to_json(record)))) == record
    text = render(record)
    assert f"| {FOUR} | 5.0 | 3.00 |" in text and "9.2 / 10.0" in text and "34 *" in text
    file = tmp_path / "cards.json"
    file.write_text(json.dumps(to_json(record)))
    assert command.main(["--show", "--out", str(file)]) == 0
    assert capsys.readouterr().out == text + "\n"
    file.write_text("{}")
    assert command.main(["--show", "--out", str(file)]) == 2


def test_the_interpreter_s_setting_is_refused(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert command.main(["--out", str(tmp_path / "cards.json"), "--work", str(tmp_path)]) == 2
    assert "TRITON_INTERPRET" in capsys.readouterr().err


def test_the_committed_record():
    """What docs/measurements.md says: everything is built, nothing spills, every limit is kept."""
    record = command.CARDS.read()
    assert list(missed(record)) == []
    assert {spilled for one in record.built for spilled in one.spilled} == {0}
    assert {one.target for one in record.built} == set(FAMILIES)
    assert {loop.format for loop in record.loops if loop.target == "sm_86"} == set(FORMATS)
    assert {pace.card for pace in record.paces} == {card.name for card in CARDS}
    page = (ROOT / "docs" / "measurements.md").read_text(encoding="utf-8")
    assert [line for line in render(record).splitlines() if line.startswith("|") and line not in page] == []


# --- for real -----------------------------------------------------------------------------------------------

COMPILE = """
import json, sys
from lowmem.benchmarks.common.record_file import to_json
from lowmem.benchmarks.experiments.cards.run import Job, do
for words in json.loads(sys.argv[1]):
    built, loops = do(Job(*words[:4], tuple(words[4])))
    print(json.dumps([to_json(built), [to_json(loop) for loop in loops]]))
"""


def in_a_process(words: list[str], folder: Path) -> str:
    """The output of Python where Triton compiles: the tests' own process interprets."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *words],
        env={**environment, "TRITON_CACHE_DIR": str(folder / "cache")},
        capture_output=True,
        text=True,
        timeout=3000,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_inner_loop_is_not_worse_than_the_committed_one(tmp_path):
    """Limits, spills, loads and subnormals: every width for one family, and what spills most easily."""
    todo = [
        ["sm_86", "decode, 1 row", "bfloat16", "middle", list(FORMATS)],
        ["gfx1100", "decode, 1 row", "bfloat16", "middle", [FOUR]],
        ["sm_86", "5 to 16 rows", "bfloat16", "stored", [FOUR]],
        ["sm_86", "decode, 4 rows", "bfloat16", "stored", ["7-bit gptq_p g128"]],
        ["sm_90", "5 to 16 rows", "bfloat16", "stored", ["8-bit gptq g128"]],
        ["gfx1100", "decode, 4 rows", "bfloat16", "stored", [FOUR]],
    ]
    lines = in_a_process(["-c", COMPILE, json.dumps(todo)], tmp_path).splitlines()
    found = [json.loads(line) for line in lines]
    built = tuple(from_json(Built, one) for one, _ in found)
    loops = tuple(from_json(Loop, loop) for _, some in found for loop in some)
    assert list(missed(a_record(built, loops))) == []
    assert {loop.format.split()[0] for loop in loops} >= set(LIMITS)
    assert all(number > 0 for one in built for number in one.registers)
    committed = command.CARDS.read()
    if committed.triton != version("triton"):
        return
    for loop in loops:
        before = committed.loop(loop.target, loop.launch, loop.format, loop.dtype, loop.zeros)
        assert before and loop.wide >= before.wide
        assert loop.per_weight <= 1.02 * before.per_weight, (loop.target, loop.launch, loop.format)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_everything_is_built(tmp_path):
    words = ["-m", "lowmem.benchmarks.experiments.cards", "--work", str(tmp_path / "work")]
    in_a_process([*words, "--out", str(tmp_path / "cards.json")], tmp_path)
    assert list(missed(command.CARDS.read(tmp_path / "cards.json"))) == []


def test_loops_that_were_unrolled_are_counted_right():
    """Twice the loads of words: twice the weights in a pass."""
    launch = launch_of(CASES["decode, 1 row"], FORMATS[FOUR], "bfloat16", "middle", "sm_86")
    load = "LDG.E.128 R16, [R6.64]"
    code = dataclasses.replace(
        nvidia_code(USAGE, SASS, 0), instructions=(load,) * 9 + ("FFMA R1, R2, R3, R1",) * 247
    )
    names = ("sm_86", "decode, 1 row", "bfloat16", "middle", FOUR)
    assert loop_of(names, launch, code).per_weight == 1.0
    twice = dataclasses.replace(code, instructions=code.instructions * 2)
    assert loop_of(names, launch, twice).per_weight == 1.0
