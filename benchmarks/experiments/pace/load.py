"""One load to the first token, in a process of its own.

    python -m lowmem.benchmarks.experiments.pace.load FOLDER THREADS BEGAN

BEGAN: time.time() when the process was started. Prints a line of JSON: see `Load`. Reads of the same bytes
are timed in the same process, before and after.
"""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lowmem.benchmarks.common.processes import ROOT
from lowmem.benchmarks.common.record_file import from_json
from lowmem.benchmarks.experiments.common import say
from lowmem.benchmarks.experiments.processes import resident

CHUNK = 16 << 20


@dataclass(frozen=True)
class Load:
    """Times are seconds, sizes bytes."""

    layers: int
    bytes: int
    """Of the safetensors files."""
    start: float
    """Process start and imports."""
    load: float
    """The call of `load`."""
    first: float
    """From its end to the first token of a prompt of one token."""
    repacking: float
    """Repacking all weights, which a session does between its first tokens."""
    peak: int
    """Peak resident memory after all that, mapped pages included."""
    libraries: int
    """Resident memory before the load."""
    read: tuple[float, float]
    """read() of all files into one buffer, before and after the load."""
    mapped: float
    """The kernels' read loop over a new mapping of the files: every page is touched for the first time."""
    mapped_again: float
    """The same again."""
    kernel: str

    @property
    def whole(self) -> float:
        """From the call of `load` to the first token."""
        return self.load + self.first

    @property
    def read_seconds(self) -> float:
        """The mean of both reads."""
        return sum(self.read) / 2


def measure_loads(folder: Path, rounds: int, threads: int, log: Path) -> list[Load]:
    """Loads of `folder` in processes of their own, after one that warms the page cache."""
    found: list[Load] = []
    for number in range(rounds + 1):
        say(f"load: {number} of {rounds} …")
        module = "lowmem.benchmarks.experiments.pace.load"
        command = [sys.executable, "-m", module, str(folder), str(threads), str(time.time())]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
        with log.open("wb") as errors:
            answer = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors, check=True
            ).stdout
        found.append(from_json(Load, json.loads(answer.splitlines()[-1])))
    return found[1:]


def read_once(files: Sequence[Path]) -> float:
    """Seconds of read() into one buffer, file by file."""
    buffer = memoryview(bytearray(CHUNK))
    start = time.perf_counter()
    for file in files:
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass
    return time.perf_counter() - start


def read_mapped(files: Sequence[Path]) -> tuple[float, float]:
    """Seconds of the kernels' read loop over a new mapping, and over the same again."""
    import torch

    from lowmem.kernels.native import library as native

    maps = []
    for file in files:
        with file.open("rb") as opened:
            maps.append(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY))
    tensors = [torch.frombuffer(mapped, dtype=torch.uint8) for mapped in maps]
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        for tensor in tensors:
            native.read(tensor)
        seconds.append(time.perf_counter() - start)
    return seconds[0], seconds[1]


def main(argv: Sequence[str]) -> int:
    """The process."""
    folder, threads, began = Path(argv[0]), int(argv[1]), float(argv[2])
    import torch
    from transformers import AutoTokenizer, GPTBigCodeForCausalLM  # noqa: F401  (imported by `load`)

    from lowmem.config import SamplingParams
    from lowmem.loading.loader import LoadOptions, load
    from lowmem.session import Session

    torch.set_num_threads(threads)
    start = time.time() - began
    files = sorted(folder.glob("*.safetensors"))
    before = read_once(files)
    libraries = resident(os.getpid())["VmRSS"]
    clock = time.perf_counter()
    loaded = load(folder, LoadOptions(context=512))
    loaded_at = time.perf_counter()
    engine = Session(loaded, context=512).engine
    next(engine.generate([1], SamplingParams(max_new_tokens=1, temperature=0)))
    first_at = time.perf_counter()
    engine.repacking.finish()
    repacking = time.perf_counter() - first_at
    peak = resident(os.getpid())["VmHWM"]
    after = read_once(files)
    mapped, mapped_again = read_mapped(files)
    found = Load(
        layers=loaded.model.config.num_hidden_layers,
        bytes=sum(file.stat().st_size for file in files),
        start=start,
        load=loaded_at - clock,
        first=first_at - loaded_at,
        repacking=repacking,
        peak=peak,
        libraries=libraries,
        read=(before, after),
        mapped=mapped,
        mapped_again=mapped_again,
        kernel=loaded.kernel,
    )
    print(json.dumps(asdict(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
