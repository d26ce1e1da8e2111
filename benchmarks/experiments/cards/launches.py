"""The launches of lowmem's kernels, recorded from the product's own code, and compiled without a card."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch

from lowmem.checkpoint.formats import LinearFormat
from lowmem.kernels.contract import LinearSpec
from lowmem.kernels.trial import sample_linear
from lowmem.kernels.triton.choice import Choice, DecodeShape, PrefillShape, in_parts

FORMATS = {
    f"{bits}-bit {layout} g{group}": LinearFormat(bits, group, layout=layout)
    for bits, layout, group in (
        (8, "gptq", 128),
        (7, "gptq_p", 128),
        (6, "gptq_p", 128),
        (5, "gptq_p", 128),
        (4, "gptq", 128),
        (3, "gptq", 64),
        (3, "gptq_p", 64),
        (2, "gptq", 32),
    )
}
"""Every width in the layouts that store it differently, with the group size of the converter's choice."""
DTYPES = ("bfloat16", "float16")
ZEROS = ("middle", "stored")
_WHOLE, _EDGES, _FEW_OUTPUTS = (1024, 512), (1056, 544), (4096, 256)
_MULTIPROCESSORS = 28
_STEP_32 = Choice(tile=PrefillShape(16, 32, warps=8), prefill=PrefillShape(64, 32, warps=8))
_RDNA = replace(_STEP_32, decode=DecodeShape(128, 8, several=64))
CHOICES = {
    "sm_75": _STEP_32,
    "sm_90": Choice(tile=PrefillShape(16, stages=3)),
    "sm_100": Choice(decode=DecodeShape(128, 4)),
    "gfx90a": _STEP_32,
    "gfx1100": _RDNA,
    "gfx1201": _RDNA,
}
"""Launches of the families where the usual ones run out of registers; all are among those timed on cards."""


@dataclass(frozen=True)
class Case:
    """A launch that a linear asks for."""

    kernel: str
    rows: int
    sizes: tuple[int, int] = _WHOLE
    """(inputs, outputs) of the linear."""
    combinations: tuple[tuple[str, str], ...] = ()
    """(dtype, zero-points); see `combinations`."""
    only: tuple[str, str] = ("", "")
    """How the names of the families, and of the formats, begin for which it is built; "": all."""


_ALL = tuple((dtype, zeros) for zeros in ZEROS for dtype in DTYPES)
_PAIRS = (("bfloat16", "middle"), ("float16", "stored"))
ALL_OF = ("sm_75", "sm_86")
"""Families for which decode of one row is built in all combinations of dtype and zero-points."""
CASES = {
    "decode, 1 row": Case("few_rows", 1, combinations=_PAIRS),
    "decode, 2 rows": Case("few_rows", 2, combinations=_PAIRS[:1], only=("sm_86", "")),
    "decode, 4 rows": Case("few_rows", 4, combinations=(_PAIRS[0], ("bfloat16", "stored"))),
    "decode, 4 rows, odd sizes": Case("few_rows", 4, _EDGES, _PAIRS, only=("", "4-bit")),
    "decode, 1 row, inputs shared": Case("few_rows", 1, _FEW_OUTPUTS, _PAIRS[:1], only=("", "4-bit")),
    "add_parts": Case("add_parts", 1, _FEW_OUTPUTS, _PAIRS, only=("", "4-bit")),
    "5 to 16 rows": Case("many_rows", 16, combinations=(("bfloat16", "stored"),)),
    "17 rows and more": Case("many_rows", 64, combinations=(("float16", "middle"),)),
    "dequantize": Case("dequantize", 512, combinations=(("bfloat16", "stored"),)),
}


def combinations(case: Case, target: str) -> tuple[tuple[str, str], ...]:
    """(dtype, zero-points) in which a case is built for a family: each of both at least once in a kernel."""
    if not target.startswith(case.only[0]):
        return ()
    return _ALL if case is CASES["decode, 1 row"] and target in ALL_OF else case.combinations


@dataclass(frozen=True)
class Launch:
    """One launch of a Triton kernel."""

    kernel: Any
    args: tuple[Any, ...]
    options: Mapping[str, Any]
    """Constants and launch options, by name."""

    def constant(self, name: str) -> int:
        """A constant of the kernel, or a launch option."""
        return int(self.options[name])


class _Recorder:
    """Stands in for a kernel: keeps its launches."""

    def __init__(self, kernel: Any, found: list[Launch]) -> None:
        self.kernel, self.found = kernel, found

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            self.found.append(Launch(self.kernel, args, options))

        return launch


@contextmanager
def _recorded() -> Iterator[list[Launch]]:
    from lowmem.kernels.triton import decode, prefill

    found: list[Launch] = []
    with ExitStack() as stack:
        for module, name in (
            (decode, "few_rows"), (decode, "add_parts"), (prefill, "many_rows"), (prefill, "dequantize"),
        ):  # fmt: skip
            stack.enter_context(mock.patch.object(module, name, _Recorder(getattr(module, name), found)))
        yield found


def launch_of(case: Case, format: LinearFormat, dtype: str, zeros: str, target: str) -> Launch:
    """The launch of a case, as TritonLinear makes it on a family of cards."""
    from lowmem.kernels.triton.linear import TritonLinear

    stored = LinearFormat(format.bits, format.group_size, sym=zeros == "middle", layout=format.layout)
    spec = LinearSpec(*case.sizes, True, stored)
    floats = getattr(torch, dtype)
    choice = CHOICES.get(target, Choice())
    choice = replace(choice, decode=in_parts(choice.decode, spec, _MULTIPROCESSORS))
    with torch.no_grad():
        module = TritonLinear(sample_linear(spec, torch.device("cpu"), floats), choice)
        with _recorded() as found:
            module(torch.zeros(case.rows, spec.in_features, dtype=floats))
    return next(launch for launch in found if launch.kernel.__name__ == case.kernel)


_TYPES = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16",
    torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip
_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


def compile_for(launch: Launch, target: Any) -> Any:
    """The kernel that Triton would build for a launch on a target (a GPUTarget). No card is needed.

    As at a launch, pointers and integers that are multiples of 16 are known to be, unless the kernel asks for
    one code for all numbers. Raises what Triton raises.
    """
    from triton.compiler import ASTSource, compile

    names = list(launch.kernel.arg_names)
    plain = set(getattr(launch.kernel, "do_not_specialize", None) or ())
    signature: dict[str, str] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for number, (name, value) in enumerate(zip(names, launch.args, strict=False)):
        tensor = isinstance(value, torch.Tensor)
        signature[name] = _TYPES[value.dtype] if tensor else "i32"
        if tensor or (value % 16 == 0 and name not in plain):
            attributes[(number,)] = [["tt.divisibility", 16]]
        if tensor and target.backend == "hip":  # tensors of less than 2 GiB
            attributes[(number,)].append(["tt.pointer_range", 32])
    constants = {name: value for name, value in launch.options.items() if name in names}
    if "FACTORS" in constants:  # recorded on the CPU, where the interpreter multiplies float32
        constants["FACTORS"] = ""
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(
        launch.kernel,
        {name: signature[name] for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        attributes,
    )
    options = {name: value for name, value in launch.options.items() if name in _OPTIONS}
    return compile(source, target=target, options={"enable_fp_fusion": True, **options})
