"""Many clients at once against `lowmem serve`: some disconnect, some send malformed requests.

    python -m lowmem.benchmarks.experiments.endurance.serve_load [MODEL] [--clients 64] [--seconds 60]

The queue has room for three quarters of the clients, and --parallel requests are answered at once. Every
complete answer is compared with the answer that the same request got alone, before. Correct and wrong
answers, disconnected clients and malformed requests are counted, and the server's resident memory is sampled.
Ends with 1 if an answer was wrong, a status unexpected or memory grew.

MODEL is the embedded model at 4 bits in bfloat16, converted first, unless another is given: there a step of
several sequences is one native forward, and no answer may depend on what shares it.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
from lowmem.benchmarks.common.records import Origin
from lowmem.benchmarks.demo import embedded_model
from lowmem.benchmarks.experiments.common import RESULTS, Experiment, made_with, origin_here, say, table
from lowmem.benchmarks.experiments.endurance.load_clients import (
    SERVED,
    Asked,
    Tally,
    requests_of,
    visit,
    whole_answer,
)

from lowmem.text.units import format_bytes

PATIENCE = 120.0
GROWTH = 16 << 20
"""Growth of resident memory that is not a leak, in bytes: buffers of the largest requests so far."""


@dataclass(frozen=True)
class ServeLoad:
    """`serve_load.json`; seconds and bytes. For the counts see `Tally`."""

    origin: Origin
    clients: int
    seconds: float
    parallel: int
    right: int
    wrong: int
    left: int
    malformed: int
    busy: int
    tokens: int
    unexpected: tuple[tuple[str, int], ...]
    first_token_median: float
    first_token_worst: float
    whole_median: float
    whole_worst: float
    cancelled: int
    """Answers that the server gave up."""
    memory: tuple[int, ...]
    """Resident, once a second."""
    memory_idle_before: int
    memory_idle_after: int

    def quarters(self) -> list[int]:
        """The most memory in each quarter of the time."""
        size = max(1, len(self.memory) // 4)
        parts = [self.memory[at : at + size] for at in range(0, 4 * size, size)]
        return [max(part) for part in parts if part]

    @property
    def passed(self) -> bool:
        """Nothing was wrong, and memory did not grow after the first quarter."""
        quarters = self.quarters()
        growth = quarters[-1] - quarters[min(1, len(quarters) - 1)]
        return not self.wrong and not self.unexpected and self.right > 0 and growth <= GROWTH


async def load(url: str, pid: int, args: argparse.Namespace) -> tuple[Tally, list[int], int, int]:
    """All clients for --seconds: the tally, memory once a second, and idle memory before and after."""
    process, tally = psutil.Process(pid), Tally()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)

    def connect() -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=url, timeout=PATIENCE, limits=limits)

    async with connect() as client:
        known = []
        for asked in requests_of(4 * args.clients, args.seed):
            text, _ = await whole_answer(client, asked)
            known.append(Asked(asked.path, asked.body, text))
        idle_before = process.memory_info().rss
        end, memory = time.monotonic() + args.seconds, []

        async def one(number: int) -> None:
            dice = random.Random(args.seed * 1000 + number)
            async with connect() as own:
                while time.monotonic() < end:
                    await visit(own, known, tally, dice)

        async def watch() -> None:
            while time.monotonic() < end:
                memory.append(process.memory_info().rss)
                await asyncio.sleep(1.0)

        await asyncio.gather(watch(), *(one(number) for number in range(args.clients)))
        await at_rest(client)
        for asked in known[:8]:  # it still answers as before
            text, _ = await whole_answer(client, asked)
            tally.compare(text, asked)
        return tally, memory, idle_before, process.memory_info().rss


async def at_rest(client: httpx.AsyncClient) -> None:
    """Wait until the server answers nothing and its queue is empty."""
    for _ in range(int(PATIENCE * 10)):
        status = (await client.get("/page/status")).json()
        if not status["busy"] and not status["queue"]:
            return
        await asyncio.sleep(0.1)
    raise TimeoutError("the server does not come to rest")


def cancelled(url: str) -> int:
    """Answers that the server gave up, from its metrics."""
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return int(float(next(line for line in lines if line.startswith("lowmem_cancelled_total")).split()[1]))


def measure(args: argparse.Namespace, words: Sequence[str]) -> ServeLoad:
    """Start a server, load it, and end it."""
    origin = origin_here("endurance.serve_load", words, Path(args.model).name)
    command = [sys.executable, "-m", "lowmem", "serve", args.model, "--port", "0", "--served-name", SERVED]
    command += ["--quiet", "--queue", str(max(1, args.clients * 3 // 4)), "--parallel", str(args.parallel)]
    command += ["--dtype", args.dtype] if args.dtype else []
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if " at http" not in line:
            raise SystemExit(f"the server did not start: {line!r}")
        url = line.partition(" at ")[2].partition(" ")[0]
        say(f"{args.clients} clients for {args.seconds:g} s against {url}")
        tally, memory, before, after = asyncio.run(load(url, process.pid, args))
        given_up = cancelled(url)
        process.terminate()
        if process.wait(PATIENCE) != 0:
            tally.unexpected[f"the server ended with {process.returncode}"] += 1
    finally:
        process.kill()
        process.wait()
    counts = {
        name: getattr(tally, name) for name in ("right", "wrong", "left", "malformed", "busy", "tokens")
    }
    return ServeLoad(
        origin=origin,
        clients=args.clients,
        seconds=args.seconds,
        parallel=args.parallel,
        **counts,
        unexpected=tuple(tally.unexpected.items()),
        first_token_median=statistics.median(tally.first_token or [0.0]),
        first_token_worst=max(tally.first_token, default=0.0),
        whole_median=statistics.median(tally.whole or [0.0]),
        whole_worst=max(tally.whole, default=0.0),
        cancelled=given_up,
        memory=tuple(memory),
        memory_idle_before=before,
        memory_idle_after=after,
    )


def render(record: ServeLoad) -> str:
    """The figures as Markdown."""
    idle = (record.memory_idle_before, record.memory_idle_after)
    lines = (
        ("correct answers", str(record.right)),
        ("wrong answers", str(record.wrong)),
        ("clients that disconnected", f"{record.left} ({record.cancelled} answers given up)"),
        ("malformed requests refused", str(record.malformed)),
        ("429, the queue was full", str(record.busy)),
        ("anything else", ", ".join(f"{name}: {count}" for name, count in record.unexpected) or "0"),
        (
            "first token, median and worst",
            f"{record.first_token_median:.2f} s, {record.first_token_worst:.2f} s",
        ),
        ("whole answer, median and worst", f"{record.whole_median:.2f} s, {record.whole_worst:.2f} s"),
        ("resident memory by quarter", ", ".join(map(format_bytes, record.quarters()))),
        ("idle memory before and after", ", ".join(map(format_bytes, idle))),
    )
    verdict = "passed" if record.passed else "NOT passed"
    title = f"{record.clients} clients for {record.seconds:g} s, {record.parallel} answers at once"
    return f"{table((title, ''), lines)}\n\n{verdict}; {made_with(record.origin)}"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; the exit code."""
    experiment = Experiment("endurance.serve_load", ServeLoad, RESULTS / "serve_load.json", render)
    parser = experiment.parser(__doc__)
    parser.add_argument("model", nargs="?", help="(the embedded model at 4 bits)")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--parallel", type=int, default=8, help="as of lowmem serve (%(default)s)")
    parser.add_argument("--dtype", help="as of lowmem serve")
    parser.add_argument("--seed", type=int, default=1)
    words = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(words)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    def measured() -> ServeLoad:
        if args.model:
            return measure(args, words)
        with tempfile.TemporaryDirectory(prefix="lowmem-load-") as folder:
            args.model = str(Path(folder) / "tiny-starchat-4bit")
            convert = ["convert", str(embedded_model()), args.model, "--bits", "4", "--rows", "16"]
            subprocess.run([sys.executable, "-m", "lowmem", *convert], check=True, stdout=subprocess.DEVNULL)
            return measure(args, words)

    code = experiment.run(args, measured)
    return code or int(not experiment.read(args.out).passed)


if __name__ == "__main__":
    sys.exit(main())
