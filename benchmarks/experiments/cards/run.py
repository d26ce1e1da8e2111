"""Compile every launch for every target, in parallel, and read the code."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from lowmem.benchmarks.common.record_file import from_json, to_json
from lowmem.benchmarks.experiments.cards.arithmetic import CONTEXT, loop_of
from lowmem.benchmarks.experiments.cards.launches import (
    CASES,
    FORMATS,
    combinations,
    compile_for,
    launch_of,
)
from lowmem.benchmarks.experiments.cards.machine_code import code_of
from lowmem.benchmarks.experiments.cards.record import FAMILY_OF_LIMITS, Built, Loop
from lowmem.benchmarks.experiments.cards.specs import CARDS, FAMILIES
from lowmem.benchmarks.experiments.common import say

from lowmem.checkpoint.files.whole import write_json

_LOOPS = ("decode, 1 row", "decode, 2 rows", "decode, 4 rows", "5 to 16 rows")
"""Launches whose loops are recorded for FAMILY_OF_LIMITS; for the cards' families only the first."""
_KERNELS = ("fields", "decode", "prefill", "choice", "linear")
"""Files whose changes make a finished step stale."""


@dataclass(frozen=True)
class Job:
    """One launch on one target, for every format."""

    target: str
    launch: str
    dtype: str
    zeros: str
    formats: tuple[str, ...]

    @property
    def keeps_loops(self) -> bool:
        """Whether the record gets its loops."""
        of_cards = {card.family for card in CARDS}
        return (self.launch in _LOOPS and self.target == FAMILY_OF_LIMITS) or (
            self.launch == _LOOPS[0] and self.zeros == "middle" and self.target in of_cards
        )


def jobs(targets: Sequence[str], launches: Sequence[str], formats: Sequence[str]) -> Iterator[Job]:
    """All combinations that the cases name."""
    for target in targets:
        for name in launches:
            case = CASES[name]
            chosen = tuple(format for format in formats if format.startswith(case.only[1]))
            for dtype, zeros in combinations(case, target):
                yield Job(target, name, dtype, zeros, chosen)


def do(job: Job) -> tuple[Built, list[Loop]]:
    """Compile a job's launches and read their code."""
    from triton.backends.compiler import GPUTarget

    family = FAMILIES[job.target]
    target = GPUTarget(family.backend, family.arch, family.warp)
    codes, loops, problems = [], [], []
    for format in job.formats:
        launch = launch_of(CASES[job.launch], FORMATS[format], job.dtype, job.zeros, job.target)
        try:
            code = code_of(compile_for(launch, target))
        except Exception as error:  # a compiler fails in many ways, and each is a finding
            codes.append((0, 0, 0, 0.0))
            problems.append((format, " ".join(f"{type(error).__name__}: {error}".split())[:200]))
            continue
        share = round(code.moves / len(code.instructions), 4)
        codes.append((code.registers, code.shared, code.spilled, share))
        if job.keeps_loops:
            loops.append(loop_of((job.target, job.launch, job.dtype, job.zeros, format), launch, code))
    registers, shared, spilled, moved = (tuple(column) for column in zip(*codes, strict=True))
    names = (job.target, job.launch, job.dtype, job.zeros)
    return Built(*names, job.formats, registers, shared, spilled, moved, tuple(problems)), loops


def do_all(all_jobs: Iterable[Job], workers: int, work: Path) -> tuple[list[Built], list[Loop]]:
    """Every job, in `workers` processes. What was done with the same kernels is kept in `work`."""
    wanted = list(all_jobs)
    work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="lowmem-triton-") as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        if workers == 1:
            found = [_kept(job, work) for job in wanted]
        else:
            with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
                found = list(pool.map(_kept, wanted, [work] * len(wanted)))
    return [one for one, _ in found], [loop for _, loops in found for loop in loops]


def _kept(job: Job, work: Path) -> tuple[Built, list[Loop]]:
    """A job's result, from `work` if it is there."""
    file = work / f"{hashlib.sha256(f'{job} {_sources()}'.encode()).hexdigest()[:24]}.json"
    if file.is_file():
        data = json.loads(file.read_text(encoding="utf-8"))
        return from_json(Built, data["built"]), [from_json(Loop, loop) for loop in data["loops"]]
    built, loops = do(job)
    write_json(file, {"built": to_json(built), "loops": [to_json(loop) for loop in loops]})
    say(f"{job.target}, {job.launch}, {job.dtype}, {job.zeros}: {_summary(built)}")
    return built, loops


@functools.cache
def _sources() -> str:
    """Changes with Triton, the kernels and what reads their code."""
    import triton

    import lowmem.kernels.triton

    found = hashlib.sha256(triton.__version__.encode())
    kernels, here = Path(lowmem.kernels.triton.__file__).parent, Path(__file__).parent
    for folder, names in ((kernels, _KERNELS), (here, ("launches", "machine_code", "arithmetic"))):
        for name in names:
            found.update((folder / f"{name}.py").read_bytes())
    return found.hexdigest()


def _summary(one: Built) -> str:
    failed = f", {len(one.problems)} not built: {one.problems[0][1]}" if one.problems else ""
    return f"registers {one.registers}, spilled {one.spilled}{failed}"


def versions(formats: Sequence[str]) -> Iterator[tuple[str, int, int, int, int]]:
    """StarChat Alpha in each format: what arithmetic.paces takes. From header-only replicas.

    The layouts of one width have the same sizes; the one that lowmem writes is counted.
    """
    from lowmem.benchmarks.experiments.starchat.dimensions import Dimensions
    from lowmem.benchmarks.experiments.starchat.replicas import gptq_header_replica

    from lowmem.checkpoint.formats import LinearFormat
    from lowmem.plan.memory import CUDA_CONTEXT, Form, bytes_read_a_token, need_on_device
    from lowmem.plan.shape import read_shape

    dimensions = Dimensions()
    weights = dimensions.layers * sum(inputs * outputs for inputs, outputs in dimensions.linears.values())
    form = Form("gptq", "bfloat16")
    with tempfile.TemporaryDirectory(prefix="lowmem-cards-") as temporary:
        for name in formats:
            format = FORMATS[name]
            if format.layout != LinearFormat(format.bits, format.group_size).layout:
                continue
            folder = gptq_header_replica(Path(temporary) / name, format.bits, format.group_size)
            shape = read_shape(folder)
            linear_bytes = sum(tensor.nbytes for tensor in shape.tensors if tensor.packed)
            need = need_on_device(shape, form, CONTEXT, cuda=True, own_context=CUDA_CONTEXT)
            yield name, weights, linear_bytes, bytes_read_a_token(shape, form), need.total
