"""Machine code of compiled kernels as values: registers, spills, and the instructions of the longest loop."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Code:
    """One kernel for one target."""

    registers: int
    """32-bit registers of a thread."""
    shared: int
    """Bytes of shared memory of a program."""
    spilled: int
    """Bytes of a thread in memory."""
    instructions: tuple[str, ...]
    """Of the longest loop, as disassembled, without predicates; of the whole kernel if it has none."""
    flushes: int
    """Float32 instructions of the kernel, or 1 for all, that treat subnormal numbers as zero."""
    moves: int = 0
    """Instructions of the loop that store spilled registers or load them again."""
    waves: int = 0
    """Warps that a SIMD holds at once, where the compiler says so."""


def code_of(kernel: Any) -> Code:
    """The code of a kernel that Triton compiled."""
    shared = int(kernel.metadata.shared)
    if "cubin" in kernel.asm:
        usage, listing = _disassemble(kernel.asm["cubin"])
        return nvidia_code(usage, listing, shared)
    return amd_code(kernel.asm["amdgcn"], shared)


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """(what cuobjdump says of the resources, nvdisasm's listing): both come with Triton."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "kernel.cubin")
        Path(file).write_bytes(cubin)
        outputs = [
            subprocess.run(words, capture_output=True, text=True, check=True).stdout
            for words in (
                [str(tools / "cuobjdump"), "-res-usage", file],
                [str(tools / "nvdisasm"), "-c", file],
            )
        ]
    return outputs[0], outputs[1]


# --- NVIDIA -------------------------------------------------------------------------------------------------


def nvidia_code(usage: str, listing: str, shared: int) -> Code:
    """The code of a cubin. usage: of `cuobjdump -res-usage`; listing: of `nvdisasm -c`."""
    found = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    lines: list[str] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if match := re.match(r"\s*(\.L_\w+):", line):
            labels[match[1]] = len(lines)
        elif match := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(\S.*?)\s*;", line):
            lines.append(match[1])
    jumps = re.compile(r"BRA\b.*\(?(\.L_\w+)")
    loop = longest_loop(lines, labels, jumps)
    return Code(
        registers=found["REG"],
        shared=shared,
        spilled=found["STACK"] + found["LOCAL"],
        instructions=tuple(loop),
        moves=_moves(loop),
        flushes=sum(bool(re.match(r"F\w+\S*\.FTZ", line)) for line in lines),
    )


def longest_loop(lines: Sequence[str], labels: dict[str, int], jumps: re.Pattern[str]) -> Sequence[str]:
    """The lines of the longest loop; all of them where nothing jumps back.

    labels: the number of the line that each stands before. jumps: finds the label that a line jumps to.
    """
    loops = [
        (labels[match[1]], number + 1)
        for number, line in enumerate(lines)
        if (match := jumps.match(line)) and labels.get(match[1], number) < number
    ]
    if not loops:
        return lines
    first, last = max(loops, key=lambda loop: loop[1] - loop[0])
    return lines[first:last]


# --- AMD ----------------------------------------------------------------------------------------------------


def amd_code(assembly: str, shared: int) -> Code:
    """The code in LLVM's assembly for AMD, with its metadata."""
    lines: list[str] = []
    labels: dict[str, int] = {}
    for line in assembly.splitlines():
        if match := re.match(r"(\.L\w+):", line):
            labels[match[1]] = len(lines)
        elif match := re.match(r"\t([a-z]\w+\b.*?)\s*(?:;.*)?$", line):
            lines.append(match[1])

    def number(pattern: str) -> int:
        match = re.search(pattern, assembly)
        return int(match[1]) if match else 0

    loop = longest_loop(lines, labels, re.compile(r"s_c?branch\w*\s+(\.L\w+)"))
    spilled = number(r"\.vgpr_spill_count:\s*(\d+)") + number(r"\.sgpr_spill_count:\s*(\d+)")
    return Code(
        registers=number(r"\.vgpr_count:\s*(\d+)"),
        shared=shared,
        spilled=4 * spilled or number(r"\.private_segment_fixed_size:\s*(\d+)"),
        instructions=tuple(loop),
        moves=_moves(loop),
        flushes=int(number(r"\.amdhsa_float_denorm_mode_32 (\d+)") != 3),
        waves=number(r"; Occupancy: (\d+)"),
    )


def _moves(lines: Sequence[str]) -> int:
    return sum(line.startswith(("STL", "LDL", "scratch_")) for line in lines)


# --- instructions -------------------------------------------------------------------------------------------

HINTS = ("s_delay_alu", "s_wait", "s_clause", "s_nop", "NOP")
"""Not counted: they occupy no unit."""
_FLOATS = ("FFMA", "FMUL", "FADD", "HADD", "HFMA", "HMUL", "HMMA", "F2F", "I2F", "IMAD", "FSEL")
_INTEGERS = (
    "LOP",
    "SHF",
    "SGXT",
    "IADD",
    "PRMT",
    "LEA",
    "BFE",
    "SHL",
    "SHR",
    "ISETP",
    "LEA",
    "SEL",
    "IABS",
    "BMSK",
)


def counted(instructions: Iterable[str]) -> list[str]:
    """The opcodes of all instructions but HINTS."""
    opcodes = (line.split()[0] for line in instructions)
    return [opcode for opcode in opcodes if not opcode.startswith(HINTS)]


def is_float(opcode: str) -> bool:
    """Whether the units for floating point compute it; NVIDIA's compute IMAD, too."""
    return opcode.startswith(_FLOATS) or bool(re.match(r"v_\w*f(16|32)", opcode)) or "mfma" in opcode


def is_integer(opcode: str) -> bool:
    """Whether it is integer arithmetic of each thread: not of NVIDIA's uniform or AMD's scalar unit."""
    return opcode.startswith(_INTEGERS) or (opcode.startswith("v_") and not is_float(opcode))


def is_wide_load(instruction: str) -> bool:
    """Whether it loads 128 bits from global memory."""
    return bool(
        re.match(r"LDG\.E\S*\.128|global_load_(b128|dwordx4)|buffer_load_(b128|dwordx4)", instruction)
    )


def is_narrow_load(instruction: str) -> bool:
    """Whether it loads 16 or 32 bits from global memory; activations are loaded 64 bits at a time."""
    of_amd = r"(global|buffer)_load_(b32|dword|ushort|sshort|short|u16|u8|ubyte|d16|b96|dwordx3)\b"
    return bool(re.match(rf"LDG\.E(?!\S*\.(64|128))|{of_amd}", instruction))


def bytes_ahead(instructions: Sequence[str]) -> int:
    """Bytes that a thread has asked for at most before it waits for the first of them.

    Counts 128-bit loads, over two passes of the loop. Loads return in order: who reads the registers of one
    has waited for those before it. An upper bound, as the disassembly does not show where a thread waits.
    """
    pending: list[set[str]] = []
    most = 0
    for line in (*instructions, *instructions):
        used = registers_of(line)
        if is_wide_load(line):
            target = registers_of(line.split(",")[0])
            used -= target
        for place in reversed(range(len(pending))):
            if pending[place] & used:
                del pending[: place + 1]
                break
        if is_wide_load(line):
            pending.append(target)
            most = max(most, 16 * len(pending))
    return most


def registers_of(instruction: str) -> set[str]:
    """The vector registers that an instruction names. A 128-bit load's first one stands for four."""
    found = {f"R{number}" for number in re.findall(r"\bR(\d+)\b", instruction)}
    if match := re.match(r"LDG\S*\.128\S* R(\d+)$", instruction):
        found |= {f"R{int(match[1]) + offset}" for offset in range(4)}
    for first, last in re.findall(r"\bv\[(\d+):(\d+)\]", instruction):
        found |= {f"v{number}" for number in range(int(first), int(last) + 1)}
    return found | {f"v{number}" for number in re.findall(r"\bv(\d+)\b", instruction)}


def longest_first(opcodes: Iterable[str], name: Callable[[str], str]) -> list[tuple[str, int]]:
    """(name, how often), the most frequent first."""
    from collections import Counter

    return Counter(name(opcode) for opcode in opcodes).most_common()
