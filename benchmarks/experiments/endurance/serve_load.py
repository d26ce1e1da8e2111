"""Many clients at once against `lowmem serve`: some leave in the middle, some send rubbish.

    python -m lowmem.benchmarks.experiments.endurance.serve_load [MODEL] [--clients 64] [--seconds 60] [--json FILE]

The queue has room for three quarters of them. Every whole answer is compared with the one that the same
request got alone, before. What is counted: answers
that were right, answers that were not (there must be none), what became of clients that left and of rubbish,
and the server's resident memory while it goes on. Ends with 1 where something was not as it has to be.

Unless --dtype says otherwise the server computes in float32: in 16 bits a prompt's rows are rounded a little
differently with other numbers of them, so that what was cached could be seen in the answers.
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
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from lowmem.benchmarks.common.origin import machine_here, versions

from lowmem.text.units import format_bytes

TINY = Path(__file__).resolve().parents[3] / "lowmem" / "data" / "tiny-starchat"
SERVED = "model"
PATIENCE = 120.0
_GROWTH = 16 << 20  # bytes of resident memory that are no leak: buffers of the largest requests so far

# Bodies that are no request; each has to be answered with a 4xx.
_RUBBISH: tuple[tuple[str, bytes], ...] = (
    ("no JSON", b'{"model": '),
    ("brackets", b"[" * 50_000),
    ("no messages", b'{"model": "model", "messages": []}'),
    ("no text", b'{"model": "model", "messages": [{"role": "user", "content": {"a": 1}}]}'),
    (
        "no number",
        b'{"model": "model", "messages": [{"role": "user", "content": "x"}], "temperature": "hot"}',
    ),
    ("no such model", b'{"model": "other", "messages": [{"role": "user", "content": "x"}]}'),
    ("tools", b'{"model": "model", "messages": [{"role": "user", "content": "x"}], "tools": [{}]}'),
    (
        "too long",
        b'{"model": "model", "messages": [{"role": "user", "content": "' + b"word " * 50_000 + b'"}]}',
    ),
    ("too large", b" " * (3 << 20)),
)


@dataclass(frozen=True)
class Asked:
    """A request, and the answer that it got alone."""

    path: str
    body: dict[str, Any]
    answer: str = ""


@dataclass
class Tally:
    """What came of all requests.

    wrong: whole answers that were another's, or broken. unexpected: statuses and errors that should not have
    been, by kind.
    """

    right: int = 0
    wrong: int = 0
    left: int = 0
    rubbish: int = 0
    busy: int = 0
    tokens: int = 0
    unexpected: Counter[str] = field(default_factory=Counter)
    first_token: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Record:
    """The figures of a run; seconds and bytes. memory: resident, once a second."""

    model: str
    clients: int
    seconds: float
    right: int
    wrong: int
    left: int
    rubbish: int
    busy: int
    tokens: int
    unexpected: dict[str, int]
    first_token_median: float
    first_token_worst: float
    whole_median: float
    whole_worst: float
    cancelled: int
    memory: tuple[int, ...]
    memory_idle_before: int
    memory_idle_after: int
    date: str
    machine: dict[str, Any]
    versions: dict[str, str]

    @property
    def growth(self) -> int:
        """Bytes by which the last quarter's memory is above that of the quarter after the start."""
        quarter = max(1, len(self.memory) // 4)
        return max(self.memory[-quarter:]) - max(self.memory[quarter : 2 * quarter] or self.memory[:quarter])

    @property
    def passed(self) -> bool:
        """Nothing was wrong, and memory flat."""
        return not self.wrong and not self.unexpected and self.right > 0 and self.growth <= _GROWTH


def requests_of(count: int, seed: int) -> list[Asked]:
    """Different requests of every kind: chats, texts, holes; greedy, or with a seed."""
    random_of = random.Random(seed)
    things = ("list", "dictionary", "file", "string", "socket", "thread", "matrix", "date", "queue", "tree")
    deeds = ("sorts", "reverses", "reads", "copies", "prints", "merges", "counts", "checks")
    made = []
    for number in range(count):
        what = f"Write function number {number} that {random_of.choice(deeds)} a {random_of.choice(things)}."
        sampling: dict[str, Any] = {"temperature": 0}
        if number % 3 == 1:
            sampling = {"temperature": 1.0, "seed": number}
        fields = {"model": SERVED, "max_tokens": random_of.choice((8, 24, 60)), **sampling}
        if number % 4 == 3:
            prompt = f"def function_{number}(a, b):\n    "
            suffix = {"suffix": f"\n\nprint(function_{number}(1, 2))\n"} if number % 8 == 7 else {}
            made.append(Asked("/v1/completions", {"prompt": prompt, **suffix, **fields}))
        else:
            made.append(
                Asked("/v1/chat/completions", {"messages": [{"role": "user", "content": what}], **fields})
            )
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
    """The text of a stream and the seconds to its first; leaves after so many events."""
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


async def behave(
    client: httpx.AsyncClient, known: Sequence[Asked], tally: Tally, dice: random.Random
) -> None:
    """One request of one client, of whatever kind the dice say."""
    asked, kind = dice.choice(known), dice.random()
    start = time.perf_counter()
    try:
        if kind < 0.15:
            name, body = dice.choice(_RUBBISH)
            response = await client.post(
                asked.path, content=body, headers={"Content-Type": "application/json"}
            )
            if 400 <= response.status_code < 500 and response.json()["error"]["message"]:
                tally.rubbish += 1
            else:
                tally.unexpected[f"{name}: {response.status_code}"] += 1
        elif kind < 0.25:
            try:
                await asyncio.wait_for(whole_answer(client, asked), dice.uniform(0.01, 0.5))
            except asyncio.TimeoutError:
                pass
            tally.left += 1
        elif kind < 0.35:
            await streamed_answer(client, asked, leave_after=dice.randint(1, 4))
            tally.left += 1
        elif kind < 0.7:
            text, first = await streamed_answer(client, asked)
            _count(tally, text == asked.answer)
            tally.first_token.append(first)
            tally.whole.append(time.perf_counter() - start)
        else:
            text, tokens = await whole_answer(client, asked)
            _count(tally, text == asked.answer)
            tally.tokens += tokens
            tally.whole.append(time.perf_counter() - start)
    except httpx.HTTPStatusError as error:
        if error.response.status_code == 429 and int(error.response.headers["retry-after"]) >= 1:
            tally.busy += 1
            await asyncio.sleep(dice.uniform(0.2, 1.0))
        else:
            tally.unexpected[f"status {error.response.status_code}"] += 1
    except (httpx.WriteError, httpx.ReadError, httpx.RemoteProtocolError) as error:
        # A body that is refused unread ends its connection: the answer may be lost with it.
        if kind < 0.15 and name == "too large":
            tally.rubbish += 1
        else:
            tally.unexpected[type(error).__name__] += 1
    except (httpx.HTTPError, ValueError) as error:
        tally.unexpected[f"{type(error).__name__} {str(error)[:60]}"] += 1


def _count(tally: Tally, right: bool) -> None:
    tally.right += right
    tally.wrong += not right


async def load(
    url: str, pid: int, clients: int, seconds: float, seed: int
) -> tuple[Tally, list[int], int, int]:
    """All clients for so long: what came of it, the memory each second, and that before and after."""
    process = psutil.Process(pid)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE, limits=limits) as client:
        known = []
        for asked in requests_of(4 * clients, seed):
            text, _ = await whole_answer(client, asked)
            known.append(Asked(asked.path, asked.body, text))
        idle_before = process.memory_info().rss
        tally, end = Tally(), time.monotonic() + seconds

        async def one(number: int) -> None:
            dice = random.Random(seed * 1000 + number)
            async with httpx.AsyncClient(base_url=url, timeout=PATIENCE, limits=limits) as own:
                while time.monotonic() < end:
                    await behave(own, known, tally, dice)

        memory: list[int] = []

        async def watch() -> None:
            while time.monotonic() < end:
                memory.append(process.memory_info().rss)
                await asyncio.sleep(1.0)

        await asyncio.gather(watch(), *(one(number) for number in range(clients)))
        await settled(client)
        for asked in known[:8]:  # it answers as before
            text, _ = await whole_answer(client, asked)
            _count(tally, text == asked.answer)
        return tally, memory, idle_before, process.memory_info().rss


async def settled(client: httpx.AsyncClient) -> None:
    """Until nothing waits and nothing is written."""
    for _ in range(int(PATIENCE * 10)):
        status = (await client.get("/page/status")).json()
        if not status["busy"] and not status["queue"]:
            return
        await asyncio.sleep(0.1)
    raise TimeoutError("the server does not come to rest")


def cancelled(url: str) -> int:
    """Answers that the server gave up."""
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return int(float(next(line for line in lines if line.startswith("lowmem_cancelled_total")).split()[1]))


def measure(
    model: str, dtype: str, clients: int, seconds: float, seed: int, say: Callable[[str], None]
) -> Record:
    """Start a server, load it, and end it."""
    command = [
        sys.executable,
        "-m",
        "lowmem",
        "serve",
        model,
        "--port",
        "0",
        "--served-name",
        SERVED,
        "--quiet",
        "--dtype",
        dtype,
    ]
    process = subprocess.Popen(
        [*command, "--queue", str(max(1, clients * 3 // 4))], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if " at http" not in line:
            raise SystemExit(f"the server did not start: {line!r}")
        url = line.partition(" at ")[2].partition(" ")[0]
        say(f"{clients} clients for {seconds:g} s against {url}")
        tally, memory, before, after = asyncio.run(load(url, process.pid, clients, seconds, seed))
        given_up = cancelled(url)
        process.terminate()
        if process.wait(PATIENCE) != 0:
            tally.unexpected[f"the server ended with {process.returncode}"] += 1
    finally:
        process.kill()
        process.wait()
    return Record(
        model=Path(model).name,
        clients=clients,
        seconds=seconds,
        right=tally.right,
        wrong=tally.wrong,
        left=tally.left,
        rubbish=tally.rubbish,
        busy=tally.busy,
        tokens=tally.tokens,
        unexpected=dict(tally.unexpected),
        first_token_median=statistics.median(tally.first_token or [0.0]),
        first_token_worst=max(tally.first_token, default=0.0),
        whole_median=statistics.median(tally.whole or [0.0]),
        whole_worst=max(tally.whole, default=0.0),
        cancelled=given_up,
        memory=tuple(memory),
        memory_idle_before=before,
        memory_idle_after=after,
        date=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        machine=asdict(machine_here()),
        versions=dict(versions(("torch", "transformers", "fastapi", "uvicorn"))),
    )


def table(record: Record) -> str:
    """The figures in lines."""
    quarter = max(1, len(record.memory) // 4)
    rows = (
        ("answers that were right", record.right),
        ("answers that were not", record.wrong),
        ("clients that left", f"{record.left} ({record.cancelled} answers given up)"),
        ("rubbish that was refused", record.rubbish),
        ("429, the queue was full", record.busy),
        ("anything else", record.unexpected or 0),
        (
            "first token, median and worst",
            f"{record.first_token_median:.2f} s, {record.first_token_worst:.2f} s",
        ),
        ("whole answer, median and worst", f"{record.whole_median:.2f} s, {record.whole_worst:.2f} s"),
        (
            "resident memory by quarters",
            ", ".join(
                format_bytes(max(record.memory[at : at + quarter]))
                for at in range(0, quarter * 4, quarter)
                if record.memory[at : at + quarter]
            ),
        ),
        (
            "idle before and after",
            f"{format_bytes(record.memory_idle_before)}, {format_bytes(record.memory_idle_after)}",
        ),
    )
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m lowmem.benchmarks.experiments.endurance.serve_load", description=__doc__
    )
    parser.add_argument("model", nargs="?", default=str(TINY))
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--dtype", default="float32", help="as of lowmem serve (%(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the record there")
    args = parser.parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    record = measure(
        args.model, args.dtype, args.clients, args.seconds, args.seed, lambda line: print(line, flush=True)
    )
    print(table(record))
    if args.json:
        args.json.write_text(json.dumps(asdict(record), indent=1) + "\n", encoding="utf-8")
    print("passed" if record.passed else "NOT passed")
    return 0 if record.passed else 1


if __name__ == "__main__":
    sys.exit(main())
