"""One load to the first token, in a process of its own.

    python -m lowmem.benchmarks.experiments.pace.load FOLDER THREADS BEGAN


BEGAN: time.time() when the process was started. Prints a line of JSON: see `Load`. What the reads of the
same bytes take is measured in the same process, before and after.
"""

from __future__ import annotations

import json
import mmap
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lowmem.benchmarks.common.processes import resident

CHUNK = 16 << 20


@dataclass(frozen=True)
class Load:
    """Seconds. start: process start and imports. load: the call of `load`; first: from its end to the first
    token of a prompt of one token. ordered: of bringing all weights into the order in which they are read
    fastest, which a session does between its first tokens. bytes: of the safetensors files. peak: the most
    memory that was resident, mapped pages included, when all that was done; libraries: what was resident
    before the load. read: of read() of all files into one reused buffer, before and after the load. mapped:
    of the library's read loop over a new mapping of them, in which every page is touched for the first time,
    and again."""

    layers: int
    bytes: int
    start: float
    load: float
    first: float
    ordered: float
    peak: int
    libraries: int
    read: tuple[float, float]
    mapped: float
    mapped_again: float
    kernel: str

    @property
    def whole(self) -> float:
        """From the call of `load` to the first token."""
        return self.load + self.first

    @property
    def read_seconds(self) -> float:
        """Of read(), the mean of both."""
        return sum(self.read) / 2


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
    """Seconds of the library's loop over a new mapping, and over the same again."""
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
    from transformers import AutoTokenizer, GPTBigCodeForCausalLM  # noqa: F401  (what `load` imports)

    from lowmem.config import SamplingParams
    from lowmem.loading.loader import load
    from lowmem.session import Session

    torch.set_num_threads(threads)
    start = time.time() - began
    files = sorted(folder.glob("*.safetensors"))
    before = read_once(files)
    libraries = resident(os.getpid())["VmRSS"]
    clock = time.perf_counter()
    loaded = load(folder, context=512)
    loaded_at = time.perf_counter()
    engine = Session(loaded, context=512).engine
    next(engine.generate([1], SamplingParams(max_new_tokens=1, temperature=0)))
    first_at = time.perf_counter()
    engine.repacking.finish()
    ordered = time.perf_counter() - first_at
    peak = resident(os.getpid())["VmHWM"]
    after = read_once(files)
    found = Load(
        loaded.model.config.num_hidden_layers,
        sum(file.stat().st_size for file in files), start, loaded_at - clock, first_at - loaded_at,
        ordered, peak, libraries, (before, after), *read_mapped(files), loaded.kernel,
    )  # fmt: skip
    print(json.dumps(asdict(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
