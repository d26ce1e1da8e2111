"""The models of `lowmem.benchmarks.experiments.pace.command`: StarChat Alpha's dimensions, a few layers, in our forms and llama.cpp's.

Weights are made up, since times do not depend on them: ours are random integers, llama.cpp's are quantized by
itself from random float16. Each model comes with StarChat's vocabulary and with one of 4096, whose head is so
small that the layers are what is timed. A model's own head is 604 MB in 16 bits, as much as three of its
layers at 4 bits, and llama.cpp's recipes make 6 bits of it, so that four layers with it compare heads.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lowmem.benchmarks.common.processes import ROOT
from lowmem.benchmarks.experiments.full_size.shaped import (
    Dimensions,
    write_packed,
    write_source,
    write_with_vocabulary,
)

from lowmem.errors import OutputError

Head = Literal["small", "16-bit", "llama.cpp's"]
SMALL_VOCAB = 4096
WIDTHS = ((8, 128), (4, 128), (3, 64), (2, 32))
FULL_WIDTHS = ((8, 128), (4, 128))
SMALL_KINDS = ("Q8_0", "Q4_0", "Q4_K_M", "Q3_K_M", "Q2_K")
FULL_KINDS = (("Q4_0", "16-bit"), ("Q8_0", "llama.cpp's"), ("Q4_0", "llama.cpp's"))


@dataclass(frozen=True)
class PaceModel:
    """One model in one form. kind: "4-bit g128" or llama.cpp's name. head: "small" with SMALL_VOCAB rows,
    else StarChat's, in 16 bits or as llama.cpp's recipe has it. path: folder or GGUF."""

    runtime: Literal["lowmem", "llama.cpp"]
    kind: str
    head: Head
    path: Path

    @property
    def label(self) -> str:
        """Unique among those of a run."""
        head = {"small": "", "16-bit": ", 16-bit head", "llama.cpp's": ", its own head"}[self.head]
        return f"{self.runtime} {self.kind}{head}"


def our_models(work: Path) -> list[PaceModel]:
    """Ours, in the order of WIDTHS."""
    small = [PaceModel("lowmem", f"{b}-bit g{g}", "small", work / f"packed-{b}-small") for b, g in WIDTHS]
    whole = [PaceModel("lowmem", f"{b}-bit g{g}", "16-bit", work / f"packed-{b}") for b, g in FULL_WIDTHS]
    return small + whole


def llama_models(work: Path) -> list[PaceModel]:
    """llama.cpp's."""
    ends = {"small": "small", "16-bit": "f16", "llama.cpp's": "own"}
    wanted = [*((kind, "small") for kind in SMALL_KINDS), *FULL_KINDS]
    return [
        PaceModel("llama.cpp", kind, head, work / f"{kind}-{ends[head]}.gguf")  # type: ignore[arg-type]
        for kind, head in wanted
    ]


def make_ours(models: Sequence[PaceModel], work: Path, layers: int, say: Callable[[str], None]) -> None:
    """Write what is missing of ours in `work`."""
    kinds = {model.kind for model in models if model.runtime == "lowmem"}
    for bits, group in WIDTHS:
        if (kind := f"{bits}-bit g{group}") not in kinds:
            continue
        full, small = work / f"packed-{bits}", work / f"packed-{bits}-small"
        if not (full / "config.json").is_file():
            say(f"{kind}, {layers} layers …")
            write_packed(full, Dimensions(layers), bits, group)
        if not (small / "config.json").is_file():
            write_with_vocabulary(full, small, Dimensions(layers, vocab=SMALL_VOCAB))


def make_llama(
    models: Sequence[PaceModel],
    work: Path,
    layers: int,
    python: str,
    threads: int,
    say: Callable[[str], None],
) -> None:
    """Write what is missing of llama.cpp's: the source in float16, its GGUF, and the forms made of that."""
    absent = [model for model in models if model.runtime == "llama.cpp" and not model.path.is_file()]
    for small in (True, False):
        missing = [model for model in absent if (model.head == "small") == small]
        if not missing:
            continue
        dense = _dense_gguf(work, layers, small, say)
        for model in missing:
            say(f"{model.label} …")
            _quantize(python, dense, model, threads)
        dense.unlink()
    for source in ("source", "source-small"):
        shutil.rmtree(work / source, ignore_errors=True)


def _dense_gguf(work: Path, layers: int, small: bool, say: Callable[[str], None]) -> Path:
    from lowmem.benchmarks.experiments.peers.to_gguf import write_gguf

    full, cut = work / "source", work / "source-small"
    if not (full / "config.json").is_file():
        say(f"float16, {layers} layers …")
        write_source(full, Dimensions(layers))
    if small and not (cut / "config.json").is_file():
        write_with_vocabulary(full, cut, Dimensions(layers, vocab=SMALL_VOCAB))
    out = work / f"source{'-small' if small else ''}.gguf"
    return out if out.is_file() else write_gguf(str(cut if small else full), out)


def _quantize(python: str, dense: Path, model: PaceModel, threads: int) -> None:
    part, report = model.path.with_suffix(".part"), model.path.with_suffix(".json")
    command = [
        python,
        "-m",
        "lowmem.benchmarks.experiments.peers.llama",
        "quantize",
        str(dense),
        "--out",
        str(part),
    ]
    command += ["--type", model.kind, "--threads", str(threads), "--report", str(report)]
    if model.head != "llama.cpp's":
        command += ["--embedding", "F16"]
    with model.path.with_suffix(".log").open("wb") as log:
        code = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT).returncode
    if code:
        raise OutputError(f"llama.cpp cannot make {model.kind} of {dense}", f"See {log.name}")
    part.replace(model.path)
