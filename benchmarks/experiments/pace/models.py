"""The models of `pace`: StarChat Alpha's dimensions, a few layers, in lowmem, llama.cpp and others.

Weights are made up, since times do not depend on them: lowmem's are random integers, llama.cpp's are
quantized by itself from random float16. Each model comes with StarChat's vocabulary and with one of 4096
tokens, whose head is so small that the layers dominate. The whole head takes 604 MB in 16 bits, as much as
three layers at 4 bits, and llama.cpp's recipes make it 6 bits: four layers with it would compare heads.
"""

from __future__ import annotations

import subprocess
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lowmem.benchmarks.experiments.common import say
from lowmem.benchmarks.experiments.peers.run import quantize_command
from lowmem.benchmarks.experiments.starchat.dimensions import WIDTHS, Dimensions
from lowmem.benchmarks.experiments.starchat.random_weights import (
    write_packed,
    write_source,
    write_with_vocabulary,
)

from lowmem.errors import OutputError

Head = Literal["small", "16-bit", "llama.cpp's"]
SMALL_VOCAB = 4096
OUR_WIDTHS = (*WIDTHS, (6, 128), (5, 128))
"""(bits, group size) that lowmem's kernels multiply by."""
WHOLE_HEAD_WIDTHS = WIDTHS[:2]
SMALL_KINDS = ("Q8_0", "Q4_0", "Q4_K_M", "Q3_K_M", "Q2_K")
WHOLE_KINDS: tuple[tuple[str, Head], ...] = (
    ("Q4_0", "16-bit"), ("Q8_0", "llama.cpp's"), ("Q4_0", "llama.cpp's"),
)  # fmt: skip


@dataclass(frozen=True)
class PaceModel:
    """One model in one version."""

    runtime: Literal["lowmem", "llama.cpp", "GPTQModel", "bitsandbytes"]
    kind: str
    """ "4-bit g128", or llama.cpp's name."""
    head: Head
    """ "small" with SMALL_VOCAB rows; else StarChat's, in 16 bits or by llama.cpp's recipe."""
    path: Path
    """Folder or GGUF file."""
    method: str = "gptq"
    """How `lowmem_worker` loads it."""

    @property
    def label(self) -> str:
        """Unique among the models of a run."""
        head = {"small": "", "16-bit": ", 16-bit head", "llama.cpp's": ", its own head"}[self.head]
        return f"{self.runtime} {self.kind}{head}"


def our_models(work: Path) -> list[PaceModel]:
    """lowmem's, in the order of OUR_WIDTHS."""
    small = [PaceModel("lowmem", f"{b}-bit g{g}", "small", work / f"packed-{b}-small") for b, g in OUR_WIDTHS]
    return small + [
        PaceModel("lowmem", f"{b}-bit g{g}", "16-bit", work / f"packed-{b}") for b, g in WHOLE_HEAD_WIDTHS
    ]


def other_models(work: Path, peers: Collection[str]) -> list[PaceModel]:
    """GPTQModel's kernels on lowmem's folders, and bitsandbytes on the float16 source."""
    found = []
    if "GPTQModel" in peers:
        for bits, group in WIDTHS:
            path = work / f"packed-{bits}-small"
            found.append(PaceModel("GPTQModel", f"{bits}-bit g{group}", "small", path, "gptqmodel"))
    if "bitsandbytes" in peers:
        for kind in ("int8", "NF4"):
            found.append(PaceModel("bitsandbytes", kind, "small", work / "source-small", kind.lower()))
    return found


def llama_models(work: Path) -> list[PaceModel]:
    """llama.cpp's."""
    ends = {"small": "small", "16-bit": "f16", "llama.cpp's": "own"}
    small: list[tuple[str, Head]] = [(kind, "small") for kind in SMALL_KINDS]
    return [
        PaceModel("llama.cpp", kind, head, work / f"{kind}-{ends[head]}.gguf")
        for kind, head in [*small, *WHOLE_KINDS]
    ]


def make_ours(models: Sequence[PaceModel], work: Path, layers: int) -> None:
    """Write the missing folders to `work`."""
    if any(model.runtime == "bitsandbytes" for model in models):
        _write_dense(work, layers, small=True)
    kinds = {model.kind for model in models if model.runtime in ("lowmem", "GPTQModel")}
    for bits, group in OUR_WIDTHS:
        if (kind := f"{bits}-bit g{group}") not in kinds:
            continue
        full, small = work / f"packed-{bits}", work / f"packed-{bits}-small"
        if not (full / "config.json").is_file():
            say(f"{kind}, {layers} layers …")
            write_packed(full, Dimensions(layers), bits, group)
        if not (small / "config.json").is_file():
            write_with_vocabulary(full, small, Dimensions(layers, vocab=SMALL_VOCAB))


def make_llama(models: Sequence[PaceModel], work: Path, layers: int, python: str) -> None:
    """Write the missing models of llama.cpp: a float16 source, its GGUF, and the versions made of that.

    python: an interpreter that has llama-cpp-python.
    """
    absent = [model for model in models if model.runtime == "llama.cpp" and not model.path.is_file()]
    for small in (True, False):
        missing = [model for model in absent if (model.head == "small") == small]
        if missing:
            dense = _dense_gguf(work, layers, small)
            for model in missing:
                _quantize(python, dense, model)
            dense.unlink()


def _dense_gguf(work: Path, layers: int, small: bool) -> Path:
    from lowmem.export.export import export

    out = work / f"source{'-small' if small else ''}.gguf"
    return out if out.is_file() else export(str(_write_dense(work, layers, small)), out).path


def _write_dense(work: Path, layers: int, small: bool) -> Path:
    """The float16 source; its layers' shards are shared by both vocabularies."""
    full, cut = work / "source", work / "source-small"
    if not (full / "config.json").is_file():
        say(f"float16, {layers} layers …")
        write_source(full, Dimensions(layers))
    if small and not (cut / "config.json").is_file():
        write_with_vocabulary(full, cut, Dimensions(layers, vocab=SMALL_VOCAB))
    return cut if small else full


def _quantize(python: str, dense: Path, model: PaceModel) -> None:
    """Raises OutputError where llama.cpp refuses."""
    say(f"{model.label} …")
    part, report = model.path.with_suffix(".part"), model.path.with_suffix(".json")
    embedding = None if model.head == "llama.cpp's" else "F16"
    command = [*quantize_command(python, dense, part, model.kind, embedding), "--report", str(report)]
    with model.path.with_suffix(".log").open("wb") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode
    if code:
        raise OutputError(f"llama.cpp cannot make {model.kind} of {dense}", f"See {log.name}")
    part.replace(model.path)
