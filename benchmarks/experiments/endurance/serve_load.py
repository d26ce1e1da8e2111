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
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from lowmem.benchmarks.common.records import Origin
from lowmem.benchmarks.demo import embedded_model
from lowmem.benchmarks.experiments.common import RESULTS, Experiment, made_with, origin_here, say, table

from lowmem.text.units import format_bytes

SERVED = "model"
PATIENCE = 120.0
GROWTH = 16 << 20
"""Growth of resident memory that is not a leak, in bytes: buffers of the largest requests so far."""


FUNCTION = {
    "name": "function",
    "schema": {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 9}, "arguments": {"type": "integer"}},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    },
}
"""Some answers must match this."""


def _chat(rest: str) -> bytes:
    return b'{"model": "model", "messages": [{"role": "user", "content": ' + rest.encode() + b"}"


MALFORMED: tuple[tuple[str, bytes], ...] = (
    ("no JSON", b'{"model": '),
    ("brackets", b"[" * 50_000),
    ("no messages", b'{"model": "model", "messages": []}'),
    ("no text", _chat('{"a": 1}') + b"]}"),
    ("no number", _chat('"x"') + b'], "temperature": "hot"}'),
    ("no such model", _chat('"x"').replace(b'"model": "model"', b'"model": "other"') + b"]}"),
    ("a forced tool", _chat('"x"') + b'], "tool_choice": "required"}'),
    ("too long", _chat('"' + "word " * 50_000 + '"') + b"]}"),
    ("too large", b" " * (3 << 20)),
)
"""Bodies that must be answered with a 4xx."""


@dataclass(frozen=True)
class Asked:
    """A request, and the answer that it got alone."""

    path: str
    body: dict[str, Any]
    answer: str = ""


@dataclass
class Tally:
    """What came of all requests."""

    right: int = 0
    wrong: int = 0
    left: int = 0
    """Clients that disconnected."""
    malformed: int = 0
    """Malformed requests that were refused."""
    busy: int = 0
    """429s: the queue was full."""
    tokens: int = 0
    unexpected: Counter[str] = field(default_factory=Counter)
    """Statuses and errors that must not occur, by kind."""
    first_token: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)

    def compare(self, text: str, asked: Asked) -> None:
        """Count an answer as right or wrong."""
        self.right += text == asked.answer
        self.wrong += text != asked.answer


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


def requests_of(count: int, seed: int) -> list[Asked]:
    """Different requests of every kind: chats, also with a schema, completions, fill-in; greedy or seeded."""
    dice = random.Random(seed)
    things = ("list", "dictionary", "file", "string", "socket", "thread", "matrix", "date", "queue", "tree")
    deeds = ("sorts", "reverses", "reads", "copies", "prints", "merges", "counts", "checks")
    made = []
    for number in range(count):
        what = f"Write function number {number} that {dice.choice(deeds)} a {dice.choice(things)}."
        sampling = {"temperature": 1.0, "seed": number} if number % 3 == 1 else {"temperature": 0}
        body: dict[str, Any] = {"model": SERVED, "max_tokens": dice.choice((8, 24, 60)), **sampling}
        path = "/v1/chat/completions"
        if number % 4 == 3:
            path = "/v1/completions"
            body["prompt"] = f"def function_{number}(a, b):\n    "
            if number % 8 == 7:
                body["suffix"] = f"\n\nprint(function_{number}(1, 2))\n"
        else:
            body["messages"] = [{"role": "user", "content": what}]
            if number % 5 == 2:
                body["response_format"] = {"type": "json_schema", "json_schema": FUNCTION}
        made.append(Asked(path, body))
    return made


async def whole_answer(client: httpx.AsyncClient, asked: Asked) -> tuple[str, int]:
    """An answer and its tokens; httpx.HTTPStatusError for any status but 200."""
    response = await client.post(asked.path, json=asked.body)
    response.raise_for_status()
    data = response.json()
    choice = data["choices"][0]
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    return text, data["usage"]["completion_tokens"]


async def streamed_answer(
    client: httpx.AsyncClient, asked: Asked, *, leave_after: int | None = None
) -> tuple[str, float]:
    """The text of a stream and the seconds to its first event; disconnects after `leave_after` events."""
    start, first, events = time.perf_counter(), 0.0, 0
    parts: list[str] = []
    async with client.stream("POST", asked.path, json={**asked.body, "stream": True}) as response:
        if response.status_code != 200:
            await response.aread()
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                return "".join(parts), first
            data = json.loads(line.removeprefix("data: "))
            if "error" in data:
                raise ValueError(f"error event {data['error']['code']}")
            first = first or time.perf_counter() - start
            choice = data["choices"][0]
            parts.append(choice.get("text") or choice.get("delta", {}).get("content") or "")
            events += 1
            if events == leave_after:
                return "".join(parts), first
    raise ValueError("a stream ended without [DONE]")


async def malformed(client: httpx.AsyncClient, asked: Asked, tally: Tally, dice: random.Random) -> None:
    """Send a malformed request."""
    name, body = dice.choice(MALFORMED)
    try:
        response = await client.post(asked.path, content=body, headers={"Content-Type": "application/json"})
    except (httpx.WriteError, httpx.ReadError, httpx.RemoteProtocolError):
        if name != "too large":  # the server closes the connection unread, which may lose its answer
            raise
        tally.malformed += 1
        return
    if 400 <= response.status_code < 500 and response.json()["error"]["message"]:
        tally.malformed += 1
    else:
        tally.unexpected[f"{name}: {response.status_code}"] += 1


async def visit(client: httpx.AsyncClient, known: Sequence[Asked], tally: Tally, dice: random.Random) -> None:
    """One request of one client, of a random kind."""
    asked, kind = dice.choice(known), dice.random()
    start = time.perf_counter()
    try:
        if kind < 0.15:
            await malformed(client, asked, tally, dice)
        elif kind < 0.25:
            try:
                await asyncio.wait_for(whole_answer(client, asked), dice.uniform(0.01, 0.5))
            except asyncio.TimeoutError:
                pass
            tally.left += 1
        elif kind < 0.35:
            await streamed_answer(client, asked, leave_after=dice.randint(1, 4))
            tally.left += 1
        else:
            if kind < 0.7:
                text, first = await streamed_answer(client, asked)
                tally.first_token.append(first)
            else:
                text, tokens = await whole_answer(client, asked)
                tally.tokens += tokens
            tally.compare(text, asked)
            tally.whole.append(time.perf_counter() - start)
    except httpx.HTTPStatusError as error:
        if error.response.status_code == 429 and int(error.response.headers["retry-after"]) >= 1:
            tally.busy += 1
            await asyncio.sleep(dice.uniform(0.2, 1.0))
        else:
            tally.unexpected[f"status {error.response.status_code}"] += 1
    except (httpx.HTTPError, ValueError) as error:
        tally.unexpected[f"{type(error).__name__} {str(error)[:60]}"] += 1


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
